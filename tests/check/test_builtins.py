"""The codecs that come with the package keep their promises."""

import os

import pytest

from aiosgd.check.checks import Options
from aiosgd.check.runner import check
from aiosgd.check.subject import load_subject
from aiosgd.plugins.kinds import CODECS

# what has no default, for a default would pretend a guarantee; and randomness that a simulation knows
GIVEN = {
    "robust": ("codec.hostile=0",),
    "dp": ("codec.clip=1.0", "codec.noise=1e-4", "codec.entropy='seed'"),
    "secure_sum": ("codec.entropy='seed'",),
}
# orders of delivery; fewer than a user's 200 unless all are asked for
SEEDS = 200 if "AIOSGD_EVERY_FAULT" in os.environ else 32
IN_PARTS = [
    ("fedavg", ("codec.turn=1",)),
    ("parameter_server", ("codec.part=4",)),
    ("allreduce", ("codec.small=0", "codec.part=4")),
    ("hierarchical", ("codec.small=0", "codec.group_size=2")),
]


@pytest.mark.proof
@pytest.mark.parametrize("name", [entry.name for entry in CODECS.entries()])
def test_a_built_in_codec_passes_all_checks(name):
    report = check(load_subject(name, GIVEN.get(name, ())), Options(seeds=SEEDS))
    assert report.passed, report.failures
    runs = {outcome.check: outcome.runs for outcome in report.outcomes}
    assert min(runs[one] for one in ("contract", "schedules", "faults")) > 10


@pytest.mark.proof
@pytest.mark.parametrize(("name", "sets"), IN_PARTS)
def test_a_built_in_codec_passes_with_other_parameters(name, sets):
    few = ["contract", "repeatable", "jitter"]
    report = check(load_subject(name, sets), Options(workers=4, seeds=24), only=few)
    assert report.passed, report.failures
