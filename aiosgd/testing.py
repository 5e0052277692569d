"""The test kit of codec authors, and a pytest plugin.

from aiosgd.testing import assert_codec

def test_my_codec_keeps_its_promises():
    assert_codec(MyCodec)

def test_my_codec_survives_a_slow_worker(sim_cluster):
    job = sim_cluster(MyCodec, workers=4, slow="1:5")
    assert not job.error
    assert len(set(job.bits.values())) == 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from aiosgd.check.simulated import Job
    from aiosgd.codecs.base import Codec

__all__ = ["assert_codec", "simulated"]


def assert_codec(
    codec: type[Codec] | str,
    *,
    params: Mapping[str, Any] | None = None,
    server_codec: type[Codec] | None = None,
    workers: int = 5,
    seeds: int = 200,
) -> None:
    """Make all checks of a codec, as `aiosgd check` does.

    Args:
        codec: a class, a registered name or FILE.py:CLASS.
        params: its parameters, as a job gives them.
        server_codec: what servers run, if not the codec's own server half.
        workers: at most so many.
        seeds: orders of delivery for each mode.

    Raises:
        AssertionError: a check fails; the message is the report, with a replay and a chart.
        ConfigError, PluginError: the codec cannot be loaded, or its parameters are wrong.
    """
    __tracebackhide__ = True
    from aiosgd.check import report, runner  # noqa: PLC0415 - pytest loads plugins at its start
    from aiosgd.check.checks import Options  # noqa: PLC0415
    from aiosgd.check.subject import subject_of  # noqa: PLC0415

    subject = subject_of(codec, params, server_codec)
    done = runner.check(subject, Options(workers=workers, seeds=seeds))
    if not done.passed:
        raise AssertionError(report.text(done))


def simulated(
    codec: type[Codec] | str,
    *,
    params: Mapping[str, Any] | None = None,
    server_codec: type[Codec] | None = None,
    noise: float = 0.0,
    **numbers: Any,
) -> Job:
    """Simulate a small job of a codec: least squares, in virtual time, on a simulated network.

    Args:
        codec: as `assert_codec` takes it.
        params: as `assert_codec` takes them.
        server_codec: as `assert_codec` takes it.
        noise: of the targets; without it, each block alone has the optimum of all.
        numbers: `workers` (2), `servers` (1 if the codec has a server half), `redundancy`,
            `steps` (4), `size`, `mode`, `exchange`, `seed`, `schedule`, `jitter` in seconds,
            `slow` as WORKER:FACTOR, `faults` as `aiosgd simulate` takes them.

    Returns:
        How it ended: `error` (empty if it ended well), `time_s`, `weights` of each node, `bits`
        of the workers' weights, `bytes_sent`, `story`.

    Raises:
        ConfigError, PluginError: as `assert_codec`, or a number is out of range.
    """
    from aiosgd.check.case import Case  # noqa: PLC0415
    from aiosgd.check.simulated import simulate  # noqa: PLC0415
    from aiosgd.check.subject import subject_of  # noqa: PLC0415

    subject = subject_of(codec, params, server_codec)
    defaults = {
        "servers": int(subject.server is not None),
        "exchange": subject.codec.exchange,
        "mode": subject.modes[0],
        "steps": 4,
        "size": 3,
    }
    return simulate(subject, Case(check="simulated", **defaults | numbers), noise=noise)


@pytest.fixture
def sim_cluster() -> Callable[..., Job]:
    """`sim_cluster(codec, **numbers)`: how a simulated job of a codec ended; see `simulated`."""
    return simulated
