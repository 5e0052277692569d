"""What slow workers cost: a parameter server in sync and in async mode, in the simulator.

    python examples/stragglers.py

Sixteen workers, a quarter of which compute ten times slower. In sync mode everybody waits for the
slowest in every step. In async mode nobody waits, and the server adds each update by itself instead
of their mean, so that it also takes larger steps, from weights that are older. What counts is the
virtual time until the first worker's model knows 80 % of the test digits.
"""

import argparse
from pathlib import Path

import aiosgd

JOBS = {
    "sync, all fast": {"mode": "sync", "stragglers": ""},
    "sync, stragglers": {"mode": "sync"},
    "async, stragglers": {"mode": "async", "learning_rate": 0.02},
}
KNOWS = 0.8


def seconds_until(accuracy, rows):
    """Return when a worker first reached an accuracy, or None."""
    times = rows["time_s"][rows["accuracy"] >= accuracy]
    return min(times) if len(times) else None


def main():
    """Simulate the three jobs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=40)
    epochs = parser.parse_args().epochs
    print(f"{'':18} seconds to {KNOWS:.0%}  accuracy")
    for name, options in JOBS.items():
        result = aiosgd.simulate(
            codec="parameter_server",
            workers=16,
            servers=1,
            epochs=epochs,
            network=Path(__file__).with_suffix(".toml"),
            title=name.replace(", ", "-").replace(" ", "-"),
            **{"stragglers": "25%:10", "learning_rate": 0.1, **options},
        )
        seconds = seconds_until(KNOWS, result.eval)
        shown = "never" if seconds is None else f"{seconds:.2f}"
        print(f"{name:18} {shown:>14} {result.metrics['accuracy']:9.3f}")


if __name__ == "__main__":
    main()
