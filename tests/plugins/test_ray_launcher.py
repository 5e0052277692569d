"""Nodes as Ray actors: what the driver may say, through a stand-in; and a Ray cluster of this host."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aiosgd.errors import ClusterError, ConfigError, PluginError
from aiosgd.plugins.launchers import Wanted
from aiosgd.plugins.launchers import ray as module
from aiosgd.plugins.launchers.ray import Ray
from aiosgd.plugins.registry import make_params

NEEDS_RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: aiosgd[ray]"
)


def ray_launcher(**values):
    return Ray(make_params(Ray, values, "launcher"))


@pytest.fixture
def driver(monkeypatch):
    """`driver(script)`: a stand-in of the driver; its `order` is what it was asked for."""

    def install(script):
        head = "import json, sys\norder = json.loads(sys.stdin.readline())\n"
        say = "def say(**w): print(json.dumps(w), flush=True)\n"
        monkeypatch.setattr(module, "DRIVER", (sys.executable, "-c", f"{head}{say}{script}"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    return install


LISTENS = "for i, name in enumerate(order['names']): say(node=name, address=f'10.0.0.{i}:1')\n"


async def test_the_nodes_are_those_that_the_driver_names(driver, tmp_path):
    driver(
        f"print('noise of Ray')\n{LISTENS}open({str(tmp_path / 'order')!r}, 'w').write(json.dumps(order))\nsys.stdin.read()"
    )
    launcher = ray_launcher(cpus=0.5, resources={"tpu": 1.0})
    async with launcher.launch(Wanted(workers=2, servers=1, allow_code=True)) as nodes:
        assert nodes.workers == ("10.0.0.0:1", "10.0.0.1:1")
        assert nodes.servers == ("10.0.0.2:1",)
        secret = nodes.secret_file.read_text().strip()
    order = json.loads((tmp_path / "order").read_text())
    assert order["names"] == ["worker 0", "worker 1", "server -1"]
    assert order["secret"] == secret
    assert (order["cpus"], order["resources"]) == (0.5, {"tpu": 1.0})
    assert order["words"][-1] == "--allow-code"


async def test_a_line_beyond_all_measure_is_dropped(driver):
    driver(f"print('x' * 200_000)\n{LISTENS}say(node='worker 0', says='y' * 200_000)\n")
    heard = []
    async with ray_launcher().launch(Wanted(workers=1), lambda *line: heard.append(line)) as nodes:
        assert await nodes.over == "the connection to Ray has ended"
    assert heard == []


async def test_what_ray_has_to_say_is_passed_on(driver):
    driver(
        f"say(node='ray', says='no room')\n{LISTENS}say(node='worker 0', says='oh')\nsys.stdin.read()\nsay(node='ray', says='bye')"
    )
    heard = []
    async with ray_launcher().launch(Wanted(workers=1), lambda *line: heard.append(line)):
        pass
    assert heard == [("ray", "no room"), ("worker 0", "oh"), ("ray", "bye")]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("say(error='there is no cluster'); sys.exit(1)", "there is no cluster"),
        ("sys.exit('Ray burnt down')", "Ray's driver ended: Ray burnt down"),
        ("sys.exit()", "Ray's driver ended: it said nothing"),
    ],
)
async def test_why_nothing_starts_is_told(driver, script, words):
    driver(script)
    with pytest.raises(ClusterError, match=words):
        async with ray_launcher().launch(Wanted(workers=1)):
            raise AssertionError("never gets here")


@pytest.mark.parametrize(
    ("script", "words"),
    [("say(error='no actor is left')", "no actor is left"), ("", "connection to Ray has ended")],
)
async def test_the_end_of_all_nodes_is_noticed(driver, script, words):
    driver(LISTENS + script)
    async with ray_launcher().launch(Wanted(workers=1)) as nodes:
        assert words in await nodes.over


async def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"needs Ray: pip install 'aiosgd\[ray\]'"):
        async with ray_launcher().launch(Wanted(workers=1)):
            raise AssertionError("never gets here")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"timeout": 0}, "timeout is 0.0; expected seconds"),
        ({"restarts": -2}, "restarts is -2; expected -1 or more"),
        ({"cpus": -1.0}, "cpus is -1.0; expected 0 or more"),
        ({"resources": {"tpu": -1.0}}, "tpu is -1.0; expected 0 or more"),
        ({"cpus": 0}, "Ray places nothing that takes nothing"),
        ({"strategy": "NEAR"}, "strategy is 'NEAR'; expected one of"),
        ({"python": "py 'x"}, 'launcher: python is "py \'x", which has no closing quotation'),
    ],
)
def test_parameters_are_checked(values, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        ray_launcher(**values)


# What an actor does -----------------------------------------------------------------------------

NODE = """#!{python}
import sys
print("port", sys.argv[sys.argv.index("--port") + 1], file=sys.stderr)
print("listening on 127.0.0.1:7007", flush=True)
print("one", "", "z" * 100_000, "last", sep="\\n", file=sys.stderr, flush=True)
sys.stdin.read()
sys.exit(5)
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """`holder(launch)`: what an actor of that launch holds: a stand-in of a node; it listens."""
    ray = pytest.importorskip("ray")
    from aiosgd.plugins.launchers.ray_driver import Holder

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    (tmp_path / "node").write_text(NODE.format(python=sys.executable))
    order = {"folder": str(tmp_path), "run_dir": str(tmp_path), "secret": "s"}
    order |= {"python": f"{sys.executable} '{tmp_path}/node'", "words": ["--port", "0"]}
    held = []

    def start(launch):
        held.append(Holder({**order, "launch": launch}, "worker 0"))
        assert held[-1].listen() == {"address": "127.0.0.1:7007"}
        return held[-1]

    yield start
    for one in held:
        with one._process:  # closes its pipes
            one.stop()


@NEEDS_RAY
@pytest.mark.extra
def test_a_node_s_lines_are_told_to_its_end(holder):
    held = holder("a")
    assert [held.tell() for _ in range(5)] == ["port 0", "one", "", "z" * 4000, "last"]
    held.stop()
    assert held.tell() == 5


@NEEDS_RAY
@pytest.mark.extra
def test_a_port_is_kept_for_the_actor_s_return_alone(holder, tmp_path):
    assert holder("a").tell() == "port 0"
    back = holder("a")
    assert back.tell() == "port 7007"
    assert holder("b").tell() == "port 0"
    back.stop()
    assert [path.name for path in (tmp_path / "worker-0").iterdir()] == ["port-b"]


# A Ray cluster of two nodes on this host --------------------------------------------------------

CLUSTER = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
from ray.cluster_utils import Cluster
node = {"num_cpus": 2, "node_ip_address": "127.0.0.2", "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
cluster.add_node(num_cpus=2, node_ip_address="127.0.0.2")
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory):
    """The address of the cluster; 127.0.0.2, for Ray takes 127.0.0.1 for the host's outer address."""
    with (tmp_path_factory.mktemp("ray") / "log").open("w") as log:
        cluster = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "AIOSGD_TEST_SESSION": ""},  # it outlives single tests
        )
    address = cluster.stdout.readline().strip()
    assert address, Path(log.name).read_text()
    yield address
    cluster.communicate(timeout=60)


@pytest.fixture
def launch_ray(start_command, ray_address):
    """`launch_ray(*words)`: `aiosgd launch ray` on the cluster."""
    where = ("--set", f"launcher.address={ray_address}")
    return lambda *words: start_command("launch", "ray", *where, *words)


def actor_of(node):
    """Return the process of the actor that holds a node."""
    found = subprocess.run(
        ["pgrep", "-f", rf"aiosgd node .*/aiosgd-ray-\w+/{node} "],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    parents = {parent_of(int(pid)) for pid in found.stdout.split()}
    (actor,) = (p for p in parents if Path(f"/proc/{p}/cmdline").read_bytes().startswith(b"ray::"))
    return actor


def parent_of(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"PPid:\s+(\d+)", status)[1])


@NEEDS_RAY
@pytest.mark.extra
def test_an_actor_that_is_killed_is_lost_and_comes_back(launch_ray, tmp_path):
    job = launch_ray(
        *("--workers", 3, "--", "--epochs", 4000, "--checkpoint-every", 50),
        *("--on-loss", "continue", "--step-timeout", 60),
    )
    job.wait_for(r"step \d{3,}/")
    assert (tmp_path / "cluster.secret").stat().st_mode & 0o777 == 0o600
    os.kill(actor_of("worker-2"), signal.SIGKILL)
    job.wait_for(r"failed: .*worker 2.* goes on after step")
    job.wait_for("worker 2: lost: its actor died; Ray starts it again")
    job.wait_for(r"worker 2: is back on 127\.0\.0\.2:")
    job.wait_for(r"\ngoes on after step")
    job.signal(signal.SIGINT)
    assert job.end() == 130
    assert not list(tmp_path.glob("cluster.*"))


@NEEDS_RAY
@pytest.mark.extra
def test_a_job_on_ray(launch_ray):
    job = launch_ray("--", "--codec", "fedavg", "--max-steps", 5)
    assert job.end() == 0, job.err
    assert "test accuracy" in job.out


@NEEDS_RAY
@pytest.mark.extra
def test_a_cluster_without_room_says_so(launch_ray):
    full = launch_ray("--workers", 9, "--set", "launcher.timeout=3")
    assert full.end() == 3
    assert "no room yet for 9 nodes (PACK): 1 CPU each, of 4 in all" in full.err
