"""The launcher of nodes as the tasks of a Slurm job."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aiosgd.errors import ClusterError, ConfigError, PluginError
from aiosgd.plugins.launchers.base import (
    Launched,
    Launcher,
    Printed,
    Wanted,
    check_seconds,
    check_words,
    ignore,
    node_words,
    read_secret_line,
)
from aiosgd.plugins.launchers.processes import Command, Process, children, listening_in

POLL = 0.5
"""Seconds between two looks into the shared folder."""
ASK = 3.0
"""Seconds between two questions to Slurm: its controller serves the whole cluster."""
REMIND = 60.0
"""Seconds after which a job that still waits in the queue is worth another line."""
START_TIMEOUT = 120.0
"""Seconds from the job's start until all nodes listen: a shared file system is slow with Python."""
STOP_TIMEOUT = 60.0
"""Seconds that Slurm has to end a cancelled job; it kills what does not end after its KillWait, 30 s."""
WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
LIVING = WAITING | {"RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "RESIZING"}

# Submits a job, and cancels it once standard input closes: at the end of the launcher's context, and
# when the launcher dies. It waits until the job is gone, for nothing of it shall stay behind, not
# even the folder, "$1", with the secret.
_GUARD = """
folder=$1; shift
trap 'rm -rf -- "$folder"' EXIT
id=$(sbatch "$@") || exit $?
id=${id%%;*}
echo "job $id"
cat >/dev/null
scancel "$id"
while squeue -h -j "$id" -o %i 2>/dev/null | grep -q .; do sleep 0.3; done
"""

# A task: says where it is, becomes a node, and says how that ended. "$1": where nodes keep jobs.
_TASK = """
echo "host $SLURMD_NODENAME $(hostname -f 2>/dev/null || hostname)"
run_dir=$1; shift
"$@" --run-dir "$run_dir/node-$SLURM_PROCID"
echo "ended $?"
"""


class Slurm(Launcher):
    """Nodes as tasks of one Slurm job, which `sbatch` submits and `srun` starts on its hosts.

    Task i is worker i; the servers come last. A folder that all hosts share carries the secret (a
    file of mode 0600) and what the tasks say. Slurm places the tasks, limits their resources and
    their time; a node process that dies is started again within its task. At the end, and if this
    process dies, the job is cancelled.
    """

    @dataclass(frozen=True)
    class Params:
        """What sbatch is told, and how long the nodes may take.

        Attributes:
            partition, account, qos, time: as sbatch takes them (time: minutes, or `1:30:00`); empty:
                Slurm's defaults.
            hosts: how many hosts the tasks are spread over (`--nodes`); 0: as Slurm likes.
            cpus, gpus: per task; gpus 0: none is asked for.
            memory: per task's CPU (`--mem-per-cpu`): `2G`.
            options: more options for sbatch: `["--constraint=ib", "--exclusive"]`.
            folder: an existing folder that all hosts share, for a temporary one inside; empty: the
                current one.
            python: the command of the Python that has aiosgd on the hosts; empty: this one.
            run_dir: where nodes keep their copies of jobs; empty: in the temporary folder.
            data_dir: where nodes keep data; empty: where nodes usually do.
            address: where nodes are reached: `{node}` is Slurm's name of the host, `{fqdn}` what it
                calls itself: `{node}.ib.example.org`.
            listen: the address that nodes listen on; `::` where only IPv6 is there.
            timeout: seconds that the job may wait in the queue; 0: for ever.
        """

        partition: str = ""
        account: str = ""
        qos: str = ""
        time: str | int = ""
        hosts: int = 0
        cpus: int = 1
        gpus: int = 0
        memory: str | int = ""
        options: list[str] = field(default_factory=list)
        folder: str = ""
        python: str = ""
        run_dir: str = ""
        data_dir: str = ""
        address: str = "{node}"
        listen: str = "0.0.0.0"  # noqa: S104 - links need the secret
        timeout: float = 0.0

        def __post_init__(self) -> None:
            if self.timeout:
                check_seconds("timeout", self.timeout)
            check_words("python", self.python)
            for name, value, least in (
                ("hosts", self.hosts, 0),
                ("cpus", self.cpus, 1),
                ("gpus", self.gpus, 0),
            ):
                if value < least:
                    raise ValueError(f"{name} is {value}; expected {least} or more")
            try:
                self.reached_at("a", "b")
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(
                    f"address is {self.address!r}; expected a host with {{node}} or {{fqdn}} in it"
                ) from error

        def reached_at(self, node: str, fqdn: str) -> str:
            """Return where a node on a host is reached."""
            return self.address.format(node=node, fqdn=fqdn)

    def __init__(self, params: Params) -> None:
        self._params = params

    @contextlib.asynccontextmanager
    async def launch(self, wanted: Wanted, printed: Printed = ignore) -> AsyncIterator[Launched]:
        """Submit the job, and wait until Slurm has started it and all nodes listen."""
        for tool in ("sbatch", "squeue", "scancel"):
            if shutil.which(tool) is None:
                raise PluginError(
                    f"the launcher 'slurm' needs {tool}, which is not on PATH; run it on a login "
                    "node of the cluster"
                )
        with wanted.secret() as secret_file, self._shared_folder() as folder:
            (folder / "secret").touch(0o600)
            (folder / "secret").write_text(read_secret_line(secret_file))
            (folder / "job.sh").write_text(self._script(wanted, folder))
            words = ["sh", "-c", _GUARD, "sh", str(folder), *self._sbatch(wanted, folder)]
            async with _submitted(words) as job_id:
                job = _Job(job_id, folder, wanted.names, printed)
                printed("slurm", f"submitted job {job_id}")
                await job.start(self._params.timeout)
                addresses = await self._addresses(job)
                async with job.watched() as over:
                    yield Launched.split(wanted, addresses, secret_file=secret_file, over=over)

    @contextlib.contextmanager
    def _shared_folder(self) -> Iterator[Path]:
        parent = Path(self._params.folder or ".").resolve()
        if not parent.is_dir():
            raise ConfigError(f"launcher.folder {parent} is no folder; expected a shared one")
        try:
            made = tempfile.TemporaryDirectory(
                prefix="aiosgd-slurm-", dir=parent, ignore_cleanup_errors=True
            )
        except OSError as error:
            raise ConfigError(f"launcher.folder {parent}: {error.strerror}") from error
        with made as folder:
            yield Path(folder)

    def _sbatch(self, wanted: Wanted, folder: Path) -> list[str]:
        """Return sbatch's arguments."""
        params = self._params
        texts = {
            "partition": params.partition,
            "account": params.account,
            "qos": params.qos,
            "time": params.time,
            "nodes": params.hosts,
            "gpus-per-task": params.gpus,
            "mem-per-cpu": params.memory,
        }
        return [
            *("--parsable", "--job-name=aiosgd", "--no-requeue", "--no-kill"),
            f"--ntasks={len(wanted.names)}",
            f"--cpus-per-task={params.cpus}",
            f"--chdir={folder}",
            "--output=job.out",
            *(f"--{name}={value}" for name, value in texts.items() if value),
            *params.options,
            str(folder / "job.sh"),
        ]

    def _script(self, wanted: Wanted, folder: Path) -> str:
        """Return the job's script; in a lost task or on a lost host, the others go on."""
        params = self._params
        python = shlex.split(params.python) or [sys.executable]
        node = node_words(python, wanted, host=params.listen, data_dir=params.data_dir)
        words = [
            *("srun", f"--cpus-per-task={params.cpus}", "--kill-on-bad-exit=0", "--wait=0"),
            *("--no-kill", "--input=none", "--output=%t.out", "--error=%t.err"),
            *("sh", "-c", _TASK, "sh", params.run_dir or str(folder)),
            *(*node, "--secret-file", str(folder / "secret")),
        ]
        return f"#!/bin/sh\n# written by aiosgd launch slurm\nexec {shlex.join(words)}\n"

    async def _addresses(self, job: _Job) -> list[str]:
        """Return where the tasks listen, in their order."""
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            tasks = await job.tasks(range(len(job.names)))
            if all(task.port for task in tasks):
                return [f"{self._params.reached_at(*task.host)}:{task.port}" for task in tasks]
            job.check_alive(tasks)
            if time.monotonic() > deadline:
                silent = [n for n, task in zip(job.names, tasks, strict=True) if not task.port]
                raise ClusterError(
                    f"slurm job {job.job_id}: {', '.join(silent)} did not listen within "
                    f"{START_TIMEOUT:g} s; is {job.folder} shared with the hosts?"
                )
            await job.ask()
            await asyncio.sleep(POLL)


@contextlib.asynccontextmanager
async def _submitted(words: Sequence[str]) -> AsyncIterator[str]:
    """Submit a job for the time of the context; gives its id.

    Raises:
        ClusterError: sbatch refuses it, in its own words.
    """
    async with children({"slurm": Command(words)}, STOP_TIMEOUT) as processes:
        guard = processes["slurm"]
        assert guard.stdout is not None
        line = (await guard.stdout.readline()).decode(errors="replace")
        match = re.fullmatch(r"job (\d+)\n", line)
        if match is None:
            raise ClusterError(await _refusal(guard))
        yield match[1]


async def _refusal(guard: Process) -> str:
    assert guard.stderr is not None
    lines = (await guard.stderr.read()).decode(errors="replace").splitlines()
    words = "; ".join(line.removeprefix("sbatch: error: ") for line in lines if line.strip())
    return f"sbatch refuses the job: {words or 'it gave no reason'}"


@dataclass(frozen=True)
class _Task:
    """What a task has said so far: the names of its host, its node's port, its exit code."""

    host: tuple[str, str] = ("", "")
    port: int = 0
    code: int | None = None


@dataclass
class _Job:
    """A job that was submitted, as seen from the shared folder and from Slurm's controller."""

    job_id: str
    folder: Path
    names: list[str]
    printed: Printed
    state: str = "PENDING"
    reason: str = "None"
    _next_question: float = 0.0
    _ended: set[int] = field(default_factory=set)

    async def start(self, timeout: float) -> None:
        """Wait until the job runs, and say why it does not; 0 seconds are for ever.

        Raises:
            ClusterError: it waited for too long, or ended.
        """
        began = told_at = time.monotonic()
        told = ""
        while True:
            await self.ask()
            waited = time.monotonic() - began
            if self.state not in WAITING:
                self.check_alive([])
                return
            why = f"is {self.state.lower()}: {self.reason}"
            if self.reason != "None" and (why != told or time.monotonic() - told_at > REMIND):
                told, told_at = why, time.monotonic()
                self.printed("slurm", f"job {self.job_id} {why} ({waited:.0f} s)")
            if timeout and waited > timeout:
                raise ClusterError(
                    f"slurm job {self.job_id} {why} after {timeout:g} s; launcher.timeout is how "
                    "long it may wait"
                )
            await asyncio.sleep(POLL)

    async def ask(self) -> None:
        """Ask Slurm for the job's state, if the last question was some time ago."""
        if time.monotonic() < self._next_question:
            return
        self._next_question = time.monotonic() + ASK
        words = ("squeue", "-h", "-t", "all", "-j", self.job_id, "-o", "%T|%r")
        pipe = asyncio.subprocess.PIPE
        asking = await asyncio.create_subprocess_exec(*words, stdout=pipe, stderr=pipe)
        out, err = await asking.communicate()
        if asking.returncode == 0 and b"|" in out:
            self.state, _, self.reason = out.decode().strip().partition("|")
        elif b"Invalid job id" in err:  # Slurm forgets jobs some minutes after their end
            self.state, self.reason = "ENDED", "None"
        # a controller that is restarted does not answer for a while: the job goes on

    def check_alive(self, tasks: Sequence[_Task]) -> None:
        """Raise ClusterError if the job has ended, or a task before its node listened."""
        for i, task in enumerate(tasks):
            if task.code is not None and not task.port:
                words = self._last_words(f"{i}.err") or f"exit code {task.code}"
                host = task.host[0]
                raise ClusterError(f"{self.names[i]} on {host} did not start: {words}")
        if self.state not in LIVING:
            words = self._last_words("job.out") or self._last_words("0.err")
            raise ClusterError(f"slurm job {self.how_ended}{f': {words}' if words else ''}")

    @property
    def how_ended(self) -> str:
        """The job's id and end: `12 ended: CANCELLED`."""
        reason = f" ({self.reason})" if self.reason != "None" else ""
        return f"{self.job_id} ended: {self.state}{reason}"

    async def tasks(self, numbers: Iterable[int]) -> list[_Task]:
        """Read what tasks have said; in a thread, for a shared file system may take its time."""
        return await asyncio.to_thread(lambda: [self._task(number) for number in numbers])

    def _task(self, number: int) -> _Task:
        """Read what a task has said."""
        try:
            text = (self.folder / f"{number}.out").read_text(errors="replace")
        except FileNotFoundError:
            return _Task()
        host = re.search(r"^host (\S+) (\S+)$", text, re.MULTILINE)
        ended = re.search(r"^ended (\d+)$", text, re.MULTILINE)
        port = (listening_in(text) or "").rpartition(":")[2]
        return _Task(
            (host[1], host[2]) if host else ("", ""),
            int(port) if port.isdigit() else 0,
            int(ended[1]) if ended else None,
        )

    def _last_words(self, file: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / file).read_text(errors="replace").strip().splitlines()
            return lines[-1].removeprefix("aiosgd: ") if lines else ""
        return ""

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[asyncio.Future[str]]:
        """Tell of tasks that end, for the time of the context; gives what is done with the job."""
        watch = asyncio.ensure_future(self._watch())
        try:
            yield watch
        finally:
            if not watch.done():  # what ends the context may be the end of the job
                watch.cancel()
                await asyncio.wait([watch])
                self._next_question = 0.0
                await self._look()

    async def _watch(self) -> str:
        while self.state in LIVING:
            await asyncio.sleep(ASK)
            await self._look()
        return f"slurm job {self.how_ended}"

    async def _look(self) -> None:
        """Tell which tasks have ended, and whether the job has."""
        left = [i for i in range(len(self.names)) if i not in self._ended]
        for i, task in zip(left, await self.tasks(left), strict=True):
            if task.code is not None:
                self._ended.add(i)
                self.printed(self.names[i], f"ended with exit code {task.code}")
        await self.ask()
        if self.state == "COMPLETING":
            self.printed("slurm", f"job {self.job_id} was ended; its tasks are being stopped")
        elif self.state not in LIVING:
            self.printed("slurm", f"job {self.how_ended}")
