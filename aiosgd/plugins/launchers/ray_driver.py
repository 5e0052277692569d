"""The process that is connected to Ray, and the actors that hold the nodes.

A process of its own, because Ray's driver is: it has signal handlers, threads and a log, and its end
is the end of its actors. It reads one line of JSON from standard input, what to start; it ends when
standard input closes. It says what happens in lines of JSON: `{"node", "address"}` of a node that
listens, `{"node", "says"}`, or `{"error"}`, which is the last.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is told to anybody

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

REMIND = 10.0
"""Seconds after which nodes that still have no room are worth another line."""
STOP_TIMEOUT = 8.0
"""Seconds that a node has to stop."""
PORT_TIMEOUT = 20.0
"""Seconds until the port is free that a killed actor's node had: it ends with the actor, but later."""
CONNECT_TIMEOUT = 20.0
"""Seconds within which Ray answers."""
LONGEST = 4000
"""Characters of a node's line that are passed on: the launcher drops what is beyond its buffer."""
LOOK = 0.5
"""Seconds within which the end of standard input is noticed."""


class Holder:
    """An actor that holds a node process; the process ends with the actor's.

    A restarted actor on the same host finds its folder there, and in it the port that the node had
    in this launch; one of an earlier launch may be anybody's by now.
    """

    def __init__(self, order: dict[str, Any], name: str) -> None:
        self._order = order
        self._folder = Path(order["folder"], name.replace(" -", "-").replace(" ", "-"))
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._host = ray.util.get_node_ip_address()
        self._port_file = self._folder / f"port-{order['launch']}"
        self._port = self._port_file.read_text() if self._port_file.exists() else "0"
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(  # noqa: S603 - the words of our own launcher
            self._words(), stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace"
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its last words say why
            process.stdin.write(self._order["secret"] + "\n")
            process.stdin.flush()
        return process

    def _words(self) -> list[str]:
        python = shlex.split(self._order["python"]) or [sys.executable]
        own = [self._host if word == "{host}" else word for word in self._order["words"]]
        own[own.index("--port") + 1] = self._port
        last = ("--secret-stdin", "--until-stdin-closes", "--supervisor")
        return [*python, *own, "--run-dir", str(self._folder), *last]

    def listen(self) -> dict[str, str]:
        """Wait until the node listens; return its `address`, or an `error` with its last words."""
        deadline = time.monotonic() + PORT_TIMEOUT
        while True:
            assert self._process.stdout is not None
            assert self._process.stderr is not None
            line = self._process.stdout.readline()
            if "listening on " in line:
                break
            words = self._process.stderr.read().strip().rpartition("\n")[2][:LONGEST]
            if self._port == "0" or time.monotonic() > deadline:
                return {"error": words.removeprefix("aiosgd: ") or f"it printed {line!r}"}
            time.sleep(LOOK)
            self._process = self._start()
        threading.Thread(target=self._process.stdout.read, daemon=True).start()
        self._port = line.strip().rpartition(":")[2]
        self._port_file.write_text(self._port)
        host = f"[{self._host}]" if ":" in self._host else self._host
        return {"address": f"{host}:{self._port}"}

    def tell(self) -> str | int:
        """Wait for the next line of the node's stderr, or its exit code."""
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        return line.rstrip()[:LONGEST] if line else self._process.wait()

    def stop(self) -> None:
        """End the node, and remove its port's file, and its folder if that is a temporary one."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._port_file.unlink(missing_ok=True)
        if not self._order["run_dir"]:
            shutil.rmtree(self._folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another node of this host is still in it
                self._folder.parent.rmdir()


class Failure(Exception):  # noqa: N818 - the word for what goes to the launcher
    """What the launcher is told before the end."""


class Driver:
    """The nodes of one launch."""

    def __init__(self, order: dict[str, Any], closed: threading.Event) -> None:
        launch = secrets.token_hex(8)
        folder = order["run_dir"] or str(Path(tempfile.gettempdir(), f"aiosgd-ray-{launch}"))
        self._order = {**order, "folder": folder, "launch": launch}
        self._closed = closed
        self._group: PlacementGroup | None = None
        self._actors: dict[str, Any] = {}
        self._addresses: dict[str, str] = {}
        self._away: set[str] = set()
        self._asked: dict[Any, tuple[str, str]] = {}
        """What is asked -> whom, and which method."""

    def run(self) -> None:
        """Bring the nodes up, tell of them until standard input closes, and take them down."""
        try:
            self._connect()
            self._place()
            self._start()
            while not self._closed.is_set():
                self._hear()
        finally:
            self._stop()

    def _connect(self) -> None:
        """Connect to Ray, which would try for ever with an address where nobody answers."""
        address = self._order["address"]
        instead = "`ray start --head` starts one, --set launcher.address=HOST:PORT names another"
        silent = (
            f"no Ray cluster answers at {address!r} within {CONNECT_TIMEOUT:g} s; {instead}; if the "
            "cluster uses tokens, set RAY_AUTH_MODE=token"
        )
        giving_up = threading.Timer(CONNECT_TIMEOUT, _give_up, [silent])
        giving_up.start()
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # whatever Ray raises
            reason = " ".join(str(error).split())
            raise Failure(f"there is no Ray cluster at {address!r}: {reason}; {instead}") from error
        finally:
            giving_up.cancel()

    def _bundle(self) -> dict[str, float]:
        """Return what one node takes."""
        order = self._order
        every = {"CPU": order["cpus"], "GPU": order["gpus"], "memory": order["memory"]}
        return {k: v for k, v in {**every, **order["resources"]}.items() if v}

    def _place(self) -> None:
        """Wait until Ray has room for all nodes, and say that it has none."""
        count, began = len(self._order["names"]), time.monotonic()
        self._group = placement_group([self._bundle()] * count, strategy=self._order["strategy"])
        ready, told_at = self._group.ready(), began - REMIND + 2
        while not ray.wait([ready], timeout=LOOK)[0]:
            waited = time.monotonic() - began
            if self._closed.is_set() or waited > self._order["timeout"]:
                raise Failure(f"{self._no_room(count)} after {waited:.0f} s")
            if time.monotonic() - told_at > REMIND:
                told_at = time.monotonic()
                say(node="ray", says=f"{self._no_room(count)} ({waited:.0f} s)")

    def _no_room(self, count: int) -> str:
        there, free = ray.cluster_resources(), ray.available_resources()
        rows = [
            f"{value:g} {name} each, of {there.get(name, 0):g} in all with {free.get(name, 0):g} free"
            for name, value in self._bundle().items()
        ]
        strategy = self._order["strategy"]
        return f"Ray has no room yet for {count} nodes ({strategy}): {'; '.join(rows)}"

    def _start(self) -> None:
        bundle = self._bundle()
        named = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
        options = {option: bundle.pop(name, 0) for option, name in named.items()}
        for i, name in enumerate(self._order["names"]):
            actor = ray.remote(Holder).options(
                **{**options, "memory": options["memory"] or None},
                resources=bundle,
                max_restarts=self._order["restarts"],
                max_concurrency=4,  # `listen` and `tell` wait for the node
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, i),
            )
            self._actors[name] = actor.remote(self._order, name)
            self._ask(name, "listen")

    def _ask(self, name: str, method: str) -> None:
        self._asked[getattr(self._actors[name], method).remote()] = (name, method)

    def _hear(self) -> None:
        """Take answers as they come, for a short while."""
        if not self._asked:
            raise Failure("no actor is left")
        answers, _ = ray.wait(list(self._asked), timeout=LOOK)
        for answer in answers:
            name, method = self._asked.pop(answer)
            try:
                value = ray.get(answer)
            except ray.exceptions.ActorDiedError as error:
                self._lost(name, error)
            except ray.exceptions.ActorUnavailableError:  # Ray starts it again
                self._returns(name, method)
            else:
                self._answered(name, method, value)

    def _answered(self, name: str, method: str, value: Any) -> None:
        match method:
            case "listen":
                self._listens(name, value)
            case "tell":
                self._told(name, value)

    def _returns(self, name: str, method: str) -> None:
        """Tell of an actor that is started again, and ask what it was asked, or where it is."""
        if name not in self._away:
            say(node=name, says="lost: its actor died; Ray starts it again")
            self._away.add(name)
        time.sleep(LOOK)
        self._ask(name, "listen" if method == "tell" else method)

    def _listens(self, name: str, value: dict[str, str]) -> None:
        self._away.discard(name)
        before, now = self._addresses.get(name), value.get("address")
        if now is None:
            words = f"{name} did not start: {value['error']}"
            if before is None:
                raise Failure(words)
            say(node="ray", says=words)
            return
        if before is None:
            say(node=name, address=now)
        elif before == now:
            say(node=name, says=f"is back on {now}")
        else:
            say(node=name, says=f"is back, but on {now}: no job finds it there, it was on {before}")
        self._addresses[name] = now
        self._ask(name, "tell")

    def _told(self, name: str, value: str | int) -> None:
        if isinstance(value, int):
            say(node=name, says=f"ended with exit code {value}")
        else:
            say(node=name, says=value)
            self._ask(name, "tell")

    def _lost(self, name: str, error: Exception) -> None:
        """Tell of an actor that is not started again."""
        words = (
            f"lost: its actor died and is not started again: {' '.join(str(error).split())[:300]}"
        )
        if name not in self._addresses and not self._closed.is_set():
            raise Failure(f"{name}: {words}")
        say(node=name, says=words)

    def _stop(self) -> None:
        """End the nodes, and give back what they took."""
        if not ray.is_initialized():
            return
        deadline = time.monotonic() + STOP_TIMEOUT
        self._asked = {}
        for name in self._actors:
            self._ask(name, "stop")
        while self._asked and time.monotonic() < deadline:
            self._hear()
        for actor in self._actors.values():
            ray.kill(actor)
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
        ray.shutdown()


def say(**words: str) -> None:
    """Tell the launcher something."""
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Read what to start, and see to it until standard input closes."""
    order = json.loads(sys.stdin.readline())
    closed = threading.Event()
    threading.Thread(target=_await_close, args=(closed,), daemon=True).start()
    try:
        Driver(order, closed).run()
    except Failure as failure:
        say(error=str(failure))
        sys.exit(1)


def _give_up(words: str) -> None:
    """End the process though its main thread hangs."""
    say(error=words)
    os._exit(1)


def _await_close(closed: threading.Event) -> None:
    """Wait for the end of standard input; a driver that then hangs in Ray is left at once."""
    sys.stdin.read()
    closed.set()
    time.sleep(STOP_TIMEOUT + 4)
    os._exit(1)  # Ray ends the actors of a driver that is gone


if __name__ == "__main__":
    main()
