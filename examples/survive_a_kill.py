"""A worker's process is killed in the middle of a job; the job goes on from its last checkpoint.

    python examples/survive_a_kill.py

Starts three nodes on this machine, submits a job that writes a checkpoint every 50 steps, kills the
process of one worker once there are two, and shows that the result is that of a run in which nothing
happened, bit for bit. A node that crashes is started again by its own parent process.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import aiosgd

NODES = 3
JOB = {"codec": "plain", "epochs": 50, "seed": 1}


class Node:
    """A node process, and the lines that it prints."""

    def __init__(self, folder):
        command = [sys.executable, "-m", "aiosgd", "node", "--port", "0", "--run-dir", str(folder)]
        self.folder = folder
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.address = re.search(r"127\.0\.0\.1:\d+", self.process.stdout.readline())[0]

    def kill(self):
        """Kill the child that does the work, as a crash or the system would."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        os.kill(int(children.split()[0]), signal.SIGKILL)

    def stop(self):
        """End the node."""
        self.process.terminate()
        self.process.wait(20)
        self.process.stdout.close()


def kill_after_checkpoint(node):
    """Wait for a node's second checkpoint, by which all nodes have the first, and kill it."""
    while len(list(node.folder.glob("**/checkpoints/*/state.safetensors"))) < 2:
        time.sleep(0.01)
    node.kill()
    print(f"killed the worker at {node.address}")


def main():
    """Train with a kill and without, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        nodes = [Node(Path(folder) / f"node{i}") for i in range(NODES)]
        try:
            cluster = Path(folder) / "cluster.toml"
            cluster.write_text(f"workers = {[node.address for node in nodes]}\n".replace("'", '"'))
            calm = aiosgd.submit(cluster, **JOB, title="calm")
            killer = threading.Thread(target=kill_after_checkpoint, args=[nodes[1]], daemon=True)
            killer.start()
            result = aiosgd.submit(
                cluster, **JOB, title="killed", checkpoint_every=50, on_loss="continue"
            )
            killer.join()
        finally:
            for node in nodes:
                node.stop()
    same = all((result.parameters[name] == calm.parameters[name]).all() for name in calm.parameters)
    print(f"accuracy {result.metrics['accuracy']:.3f} after {result.summary.steps} steps")
    print("the same bits as without the kill" if same else "other bits than without the kill")
    sys.exit(not same)


if __name__ == "__main__":
    main()
