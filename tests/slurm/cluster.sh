#!/bin/sh
# A Slurm cluster of one host, for tests: munged, slurmctld and slurmd, run by root, all files in DIR.
#
#   tests/slurm/cluster.sh start DIR    says `export SLURM_CONF=DIR/slurm.conf` when it takes jobs
#   tests/slurm/cluster.sh stop DIR     ends the daemons that `start` has started
#
# Debian: apt-get install slurm-wlm munge. The host counts as eight CPUs, so that tests on two cores
# have room for several tasks; a second partition, `full`, is down: what is sent there waits.
set -eu

dir=$(mkdir -p "$2" && cd "$2" && pwd)
host=$(hostname -s)

start() {
    for tool in munged slurmctld slurmd sinfo python3; do
        command -v "$tool" >/dev/null || { echo "slurm: there is no $tool" >&2; exit 1; }
    done
    mkdir -p "$dir/spool" "$dir/state"
    chmod 755 "$dir"
    set -- $(python3 -c '
import socket
taken = [socket.socket() for _ in range(2)]
for one in taken:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in taken))')
    cat >"$dir/slurm.conf" <<END
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$1
SlurmdPort=$2
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=5
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=10 State=UP
PartitionName=full Nodes=$host MaxTime=10 State=DOWN
END
    head -c 1024 /dev/urandom >"$dir/munge.key"
    chmod 600 "$dir/munge.key"
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
        --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" \
        2>>"$dir/munged.log"
    export SLURM_CONF="$dir/slurm.conf"
    slurmctld -c
    slurmd
    for _ in $(seq 150); do
        if [ "$(sinfo -h -p main -o %T 2>/dev/null)" = idle ]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.2
    done
    tail -n 5 "$dir"/*.log >&2
    stop
    exit 1
}

runs() {
    case "$(ps -o stat= -p "$1")" in
        '' | Z*) return 1 ;; # where nobody reaps orphans, a zombie is what is left
    esac
}

stop() {
    for daemon in slurmd slurmctld munged; do
        [ -f "$dir/$daemon.pid" ] || continue
        pid=$(cat "$dir/$daemon.pid")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 50); do
            runs "$pid" || break
            sleep 0.2
        done
        ! runs "$pid" || kill -9 "$pid"
    done
}

"$1"
