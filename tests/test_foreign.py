"""A script that has nothing but msgpack and msgpack-numpy exchanges arrays with a node."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "foreign_peer.py"


def test_the_script_knows_nothing_of_aiosgd():
    tree = ast.parse(SCRIPT.read_text())
    names = {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }
    assert names == {"msgpack", "msgpack_numpy", "numpy", "os", "socket", "struct", "sys"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))


@pytest.mark.usefixtures("no_process_left")
def test_arrays_go_both_ways(shared_nodes):
    address = shared_nodes[0].address
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), address.host, str(address.port)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "6 arrays there and back, 1 given, 1 ping\n"
