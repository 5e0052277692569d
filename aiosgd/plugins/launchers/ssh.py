"""The launcher of nodes on machines that `ssh` reaches."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiosgd.errors import ClusterError, PluginError
from aiosgd.plugins.launchers.base import (
    Launched,
    Launcher,
    Printed,
    Wanted,
    check_seconds,
    check_words,
    folder_name,
    ignore,
    node_words,
    read_secret_line,
)
from aiosgd.plugins.launchers.processes import Command, node_processes
from aiosgd.plugins.registry import make_dataclass

_HOST = re.compile(
    r"(?:(?P<user>[\w.-]+)@)?(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[\w.-]+)(?::(?P<port>\d+))?"
)

# makes a folder of its own, goes there, and becomes the node; all that varies is an argument
_SCRIPT = """
[ -z "$1" ] || cd -- "$1" || exit 1
run_dir=$2; name=$3; shift 3
if [ -z "$run_dir" ]; then
    run_dir=$(mktemp -d) || exit 1
    trap 'rm -rf -- "$run_dir"' EXIT
fi
"$@" --run-dir "$run_dir/$name"
"""


@dataclass(frozen=True)
class Host:
    """A machine to start nodes on.

    Attributes:
        host: as `ssh` takes it: a name, an alias of ~/.ssh/config, or an address.
        user, port: None: as ssh's own configuration has it.
        workdir: the folder that the node starts in; empty: the user's home.
        python: the command of the Python that has aiosgd there, in shell words.
        address: where nodes on it are reached; empty: `host`.
    """

    host: str
    user: str = ""
    port: int | None = None
    workdir: str = ""
    python: str = ""
    address: str = ""

    def __post_init__(self) -> None:
        _check_word("host", self.host)
        _check_word("user", self.user or "x")
        if self.port is not None and not 0 < self.port < 65536:
            raise ValueError(f"the port of {self.host} is {self.port}; a port is 1..65535")
        check_words(f"the python of {self.host}", self.python)

    @classmethod
    def read(cls, value: str | dict[str, Any]) -> Host:
        """Read `[user@]host[:port]`, or a table of the attributes.

        Raises:
            ValueError, ConfigError: what is wrong with it.
        """
        if isinstance(value, dict):
            host: Host = make_dataclass(cls, value, "launcher.hosts", "a host")
            return host
        match = _HOST.fullmatch(value)
        if match is None:
            raise ValueError(f"the host {value!r} is none; expected [user@]host[:port]")
        port = int(match["port"]) if match["port"] else None
        return cls(match["host"].strip("[]"), match["user"] or "", port)

    @property
    def reached_at(self) -> str:
        """Where nodes on it are reached, as the host of an address."""
        address = self.address or self.host
        return f"[{address}]" if ":" in address else address


def _check_word(what: str, text: str) -> None:
    """Refuse what ssh could take for an option, or for several words."""
    if not isinstance(text, str) or not re.fullmatch(r"[\w.:%][\w.:%-]*", text):
        raise ValueError(f"the {what} {text!r} is none; expected letters, digits, '.', '-', '_'")


class Ssh(Launcher):
    """Nodes on other machines, through the system's `ssh`: worker 0 on the first host, and so on.

    Where there are more nodes than hosts, it begins with the first host again. ssh must get in
    without a question: keys and known hosts are its own business (`ssh HOST true` has to work). The
    secret travels through ssh's standard input. A node ends when its connection ends.
    """

    @dataclass(frozen=True)
    class Params:
        """The hosts, and what holds for all of them.

        Attributes:
            hosts: `[user@]host[:port]` each, or a table with host, user, port, workdir, python,
                address (where nodes on it are reached, if not at `host`).
            hosts_file: a file with one host per line, `#` for comments; after `hosts`.
            python: the command of the Python that has aiosgd.
            workdir: the folder that nodes start in; empty: the home folder.
            run_dir: where nodes keep their copies of jobs; empty: a temporary folder.
            data_dir: where nodes keep data; empty: where nodes usually do.
            listen: the address that nodes listen on; `::` where only IPv6 is there.
            options: more options for ssh: `["-i", "key", "-o", "StrictHostKeyChecking=yes"]`.
            timeout: seconds until all nodes listen.
        """

        hosts: list[str | dict[str, Any]] | None = None
        hosts_file: str = ""
        python: str = "python3"
        workdir: str = ""
        run_dir: str = ""
        data_dir: str = ""
        listen: str = "0.0.0.0"  # noqa: S104 - links need the secret
        options: list[str] | None = None
        timeout: float = 60.0

        def __post_init__(self) -> None:
            check_seconds("timeout", self.timeout)
            check_words("python", self.python)
            if not self.all_hosts:
                raise ValueError('there is no host; give hosts=["node1", "user@node2:2222"]')

        @property
        def all_hosts(self) -> list[Host]:
            """The hosts, read."""
            return [Host.read(value) for value in (*(self.hosts or ()), *self._hosts_of_file())]

        def _hosts_of_file(self) -> list[str]:
            if not self.hosts_file:
                return []
            try:
                lines = Path(self.hosts_file).read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"hosts_file {self.hosts_file} cannot be read: {error}") from error
            return [text for line in lines if (text := line.partition("#")[0].strip())]

    def __init__(self, params: Params) -> None:
        self._params = params
        self._hosts = params.all_hosts

    @contextlib.asynccontextmanager
    async def launch(self, wanted: Wanted, printed: Printed = ignore) -> AsyncIterator[Launched]:
        """Start one `ssh` per node."""
        if shutil.which("ssh") is None:
            raise PluginError("the launcher 'ssh' needs ssh, which is not on PATH")
        with wanted.secret() as secret_file:
            secret = read_secret_line(secret_file)
            hosts = [self._hosts[i % len(self._hosts)] for i in range(len(wanted.names))]
            commands = {
                name: Command(self._words(host, name, wanted), secret, f" on {host.host}")
                for name, host in zip(wanted.names, hosts, strict=True)
            }
            running = node_processes(commands, printed, timeout=self._params.timeout)
            async with running as (listening, over):
                addresses = [
                    f"{host.reached_at}:{_port(name, text)}"
                    for name, host, text in zip(wanted.names, hosts, listening, strict=True)
                ]
                yield Launched.split(wanted, addresses, secret_file=secret_file, over=over)

    def _words(self, host: Host, name: str, wanted: Wanted) -> list[str]:
        """Return the command that holds a node on another machine."""
        settings = (
            "BatchMode=yes",  # a question would wait for ever
            "ConnectTimeout=15",
            "ServerAliveInterval=5",  # a dead connection is noticed, at both ends
            "ServerAliveCountMax=3",
        )
        return [
            *("ssh", "-T", "-a", "-x"),
            *(self._params.options or ()),
            *(word for setting in settings for word in ("-o", setting)),
            *(("-p", str(host.port)) if host.port else ()),
            *(("-l", host.user) if host.user else ()),
            *("--", host.host, shlex.join(self._remote(host, name, wanted))),
        ]

    def _remote(self, host: Host, name: str, wanted: Wanted) -> Sequence[str]:
        """Return what runs over there; the remote shell sees each word quoted."""
        params = self._params
        python = shlex.split(host.python or params.python)
        node = node_words(python, wanted, host=self._listen(host), data_dir=params.data_dir)
        places = (host.workdir or params.workdir, params.run_dir, folder_name(name))
        last = ("--secret-stdin", "--until-stdin-closes", "--supervisor")
        return ["sh", "-c", _SCRIPT, "sh", *places, *node, *last]

    def _listen(self, host: Host) -> str:
        ipv4_only = self._params.listen == "0.0.0.0"  # noqa: S104
        return "::" if ipv4_only and ":" in (host.address or host.host) else self._params.listen


def _port(name: str, address: str) -> int:
    port = address.rpartition(":")[2]
    if not port.isdigit():
        raise ClusterError(f"{name} says that it listens on {address!r}, which is no address")
    return int(port)
