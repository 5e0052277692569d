"""Which topologies and compressors a codec is tried with, and how users fix them."""

import planted
import pytest
from typer.testing import CliRunner

from aiosgd.check.case import Case
from aiosgd.check.checks import COMPRESSORS, TOPOLOGIES, Options, checks_of
from aiosgd.check.local import play
from aiosgd.check.runner import check, replay
from aiosgd.check.shrink import candidates
from aiosgd.check.simulated import simulate
from aiosgd.check.subject import subject_of
from aiosgd.cli import app
from aiosgd.errors import ConfigError

EVERYWHERE = ["contract", "schedules", "convergence"]


def tried(name, by, **options):
    """Return the topologies and the compressors that a check plays."""
    subject = subject_of(name)
    cases = list(checks_of(subject)[by].cases(subject, Options(**{"seeds": 16, **options})))
    return {case.topology for case in cases}, {case.compressor for case in cases}


@pytest.mark.parametrize("by", [*EVERYWHERE, "jitter", "faults"])
def test_a_gossip_codec_is_tried_on_several_topologies(by):
    topologies, compressors = tried("dpsgd", by)
    fewer = set(TOPOLOGIES[:1]) if by == "jitter" else {"full", *TOPOLOGIES}
    assert fewer <= topologies
    assert compressors == {"none"}


@pytest.mark.parametrize("by", [*EVERYWHERE, "faults"])
def test_a_codec_that_compresses_is_tried_with_several_compressors(by):
    assert tried("plain", by) == ({"full"}, {"none", *COMPRESSORS})


def test_a_server_half_that_compresses_does():
    assert tried("parameter_server", "contract")[1] == {"none", *COMPRESSORS}


def test_a_codec_without_either_is_tried_with_neither():
    assert tried("local", "schedules") == ({"full"}, {"none"})


def test_laws_that_a_compressor_breaks_are_tried_without():
    assert tried("plain", "mean")[1] == {"none"}
    assert tried("plain", "consensus")[1] == {"none", *COMPRESSORS}


def test_a_topology_that_a_codec_does_not_start_with_is_left_out():
    topologies, _ = tried("choco", "schedules")
    assert "one_peer" not in topologies
    assert "line" in topologies


def test_what_users_fix_is_all_that_is_tried():
    fixed = {"topology": "ring(directed=true)", "compressor": "fp16"}
    for by in (*EVERYWHERE, "jitter", "faults", "traffic"):
        assert tried("choco", by, **fixed) == ({"ring(directed=true)"}, {"fp16"})


def test_a_topology_for_a_certain_number_of_workers_is_tried_with_that():
    subject = subject_of("dpsgd")
    options = Options(seeds=4, topology="edges(links=[[0,1],[1,2],[2,3]])")
    counts = {
        case.workers for one in checks_of(subject).values() for case in one.cases(subject, options)
    }
    assert counts == {4}
    assert check(subject, options, only=["contract"]).passed


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("plain", {"topology": "ring"}, "topology 'ring' has no effect: codec plain uses none"),
        ("dpsgd", {"compressor": "fp16"}, "codec dpsgd compresses nothing"),
        ("choco", {"topology": "one_peer"}, "'one_peer', 3 workers: the topology changes"),
        ("dpsgd", {"topology": "edges(links=[[0,9]])"}, "names a worker that is not there"),
    ],
)
def test_what_does_not_fit_the_codec_is_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        check(subject_of(name), Options(**options))


@pytest.mark.parametrize(
    ("name", "case"), [("plain", "contract topology=ring"), ("dpsgd", "zero compressor=fp16")]
)
def test_a_case_of_another_codec_is_refused(name, case):
    with pytest.raises(ConfigError, match="has no effect"):
        replay(subject_of(name), case)


def test_shrinking_tries_first_without_topology_and_compressor():
    case = Case(check="a", workers=3, topology="line", compressor="fp16", overlap=True)
    first = [
        (one.topology, one.compressor, one.overlap)
        for one, _ in zip(
            candidates(case, checks_of(subject_of("plain"))["mean"]), range(3), strict=False
        )
    ]
    assert first == [("full", "fp16", True), ("line", "none", True), ("line", "fp16", False)]


def test_a_job_overlaps_only_where_it_may():
    for name, may in (("plain", True), ("dpsgd", False)):
        subject = subject_of(name)
        cases = list(checks_of(subject)["jitter"].cases(subject, Options(seeds=64)))
        assert any(case.overlap for case in cases) == may
        assert not any(case.overlap for case in cases if case.mode == "async")
        assert any(case.granularity == "tensor" for case in cases)


def test_an_answer_to_a_neighbour_may_go_against_the_link():
    report = check(subject_of("adpsgd"), Options(topology="ring(directed=true)"), only=["contract"])
    assert report.passed


def test_a_message_between_strangers_is_told_with_both_and_the_step():
    failure = check(subject_of(planted.SendsToAll), Options(seeds=1), only=["contract"]).failures[0]
    assert failure.error.startswith("worker ")
    assert failure.error.endswith("in step 0, which is none of its neighbours in topology ring")
    assert "topology=ring" in failure.command


def test_what_all_nodes_draw_alike_depends_on_the_seed_of_the_case():
    seeds = [play(subject_of("local"), Case(check="a", seed=i)).context.seed for i in (0, 5)]
    assert seeds == [0, 5]


@pytest.mark.proof
def test_the_command_line_fixes_a_topology_and_replays_it():
    words = ["check", "dpsgd", "--case", "single topology=ring(directed=true)"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1  # of two workers none is alone
    assert "--case 'single topology=ring(directed=true)'" in done.stdout
    both = CliRunner().invoke(app, [*words, "--topology", "ring"])
    assert "--case has a topology" in both.stderr
    fixed = [
        "--topology",
        "ring",
        "--set",
        "topology.directed=true",
        "--workers",
        "3",
        "--seeds",
        "1",
    ]
    found = CliRunner().invoke(app, ["check", "dpsgd", *fixed])
    assert found.exit_code == 0, found.output
    assert "sync ring(directed=true), 3 workers" in found.stdout


@pytest.mark.parametrize(
    ("name", "way"), [("dpsgd", {"topology": "ring"}), ("plain", {"compressor": "fp16"})]
)
def test_a_simulated_job_has_the_topology_and_the_compressor_of_its_case(name, way):
    subject = subject_of(name)
    case = Case(check="a", exchange=subject.codec.exchange, workers=5, steps=2, size=1000)
    jobs = [simulate(subject, case.but(**changes)) for changes in ({}, way)]
    assert [job.error for job in jobs] == ["", ""]
    assert jobs[1].bytes_sent < 0.6 * jobs[0].bytes_sent
