"""The checker finds every planted bug, makes it small, and its replay shows it again."""

import planted
import pytest

from aiosgd.check.case import Case
from aiosgd.check.checks import Options
from aiosgd.check.runner import check, replay
from aiosgd.check.subject import subject_of

# codec, the check that finds it, most workers and steps of the shrunk case, words of the message
BUGS = [
    ("MutatesAfterSend", "contract", 2, 2, "changed an array after it was sent"),
    ("MutatesReceived", "contract", 2, 1, "read-only"),
    ("MutatesBlock", "contract", 1, 1, "read-only"),
    ("SendsToNobody", "contract", 1, 1, "sends to node 1, which the job does not have"),
    ("SendsASet", "contract", 2, 1, "cannot be sent"),
    ("AliasesItsResult", "contract", 1, 2, "changed a result after it was published"),
    ("PublishesTwice", "contract", 1, 1, "set_result was called twice"),
    ("WrongShape", "contract", 1, 1, "set_result got shape"),
    ("EchoesForEver", "contract", 2, 1, "and no end"),
    ("UsesGlobalRandomness", "repeatable", 1, 1, "all randomness comes from"),
    ("SumsInstead", "mean", 2, 1, "expected"),
    ("ForgetsABlock", "mean", 4, 1, "expected"),
    ("DoubleCounts", "mean", 2, 1, ""),
    ("PublishesEarly", "mean", 3, 1, "expected"),
    ("DependsOnTheNumber", "mean", 4, 1, "expected"),
    ("WrongAlone", "single", 1, 1, "results are missing: node 0 in step 0"),
    ("LosesUpdates", "mean", 2, 2, "neither the sum"),
    ("AnswersLate", "mean", 1, 1, "results are missing"),
    ("OutOfNothing", "zero", 1, 1, "all blocks are zero"),
    ("DiffersByNode", "consensus", 2, 1, "do not agree"),
    ("SwallowsSmallValues", "scale", 4, 3, "all blocks were doubled"),
    ("AddsInArrivalOrder", "schedules", 3, 1, "depends on the order of delivery"),
    ("WaitsForEachOther", "schedules", 2, 1, "results are missing"),
    ("WaitsInSomeOrders", "schedules", 2, 1, "results are missing"),
    ("WrongStepTag", "schedules", 2, 2, "results are missing"),
    ("AddsInArrivalOrder", "jitter", 3, 4, "other weights than on a calm network"),
    ("IgnoresTheLate", "faults", 3, 4, "other weights than without the fault"),
    ("HidesTheLost", "faults", 3, 4, "should not be: what was held up arrived"),
    ("Diverges", "convergence", 1, 300, "of its way to the optimum"),
    ("WrongTraffic", "traffic", 2, 1, "traffic() says"),
    ("SendsToAll", "contract", 4, 1, "none of its neighbours in topology ring"),
    ("KeepsItsFirstNeighbours", "contract", 4, 2, "none of its neighbours in topology one_peer"),
    ("TakesTheMean", "average", 3, 1, "on average, as what they computed"),
    ("WaitsForItsReceivers", "schedules", 4, 1, "results are missing"),
    ("DecompressesTwice", "contract", 2, 1, "receive failed"),
    ("OneStreamForAll", "contract", 1, 1, "of stream 'block 0' has shape (1,)"),
    ("KeepsItsOwnWhole", "consensus", 2, 1, "do not agree"),
    ("CompressesWeights", "convergence", 1, 300, "of its way to the optimum"),
    ("SharesItsState", "jitter", 2, 4, "no result within"),
]
# those of them that nothing but these shows
SHOWN_BY = {
    "topology": ("SendsToAll", "KeepsItsFirstNeighbours", "TakesTheMean", "WaitsForItsReceivers"),
    "compressor": ("DecompressesTwice", "OneStreamForAll", "KeepsItsOwnWhole", "CompressesWeights"),
    "granularity": ("SharesItsState",),
}


@pytest.mark.parametrize(("name", "by", "workers", "steps", "words"), BUGS)
def test_a_planted_bug_is_found_made_small_and_replayed(name, by, workers, steps, words):
    subject = subject_of(getattr(planted, name))
    report = check(subject, Options(workers=4, seeds=240), only=[by])
    assert not report.passed
    failure = report.failures[0]
    assert words in failure.error
    assert (failure.case.workers, failure.case.steps) <= (workers, steps)
    assert failure.story
    again = replay(subject, str(failure.case)).failures[0]
    assert again.error == failure.error
    assert again.story == failure.story or by == "repeatable"


@pytest.mark.proof
@pytest.mark.parametrize("way", SHOWN_BY)
def test_what_a_bug_needs_is_left_in_its_case_and_nothing_else_shows_it(way):
    for name in SHOWN_BY[way]:
        by = next(bug[1] for bug in BUGS if bug[0] == name)
        subject = subject_of(getattr(planted, name))
        case = check(subject, Options(workers=4, seeds=48), only=[by]).failures[0].case
        default = getattr(Case(check=by), way)
        assert getattr(case, way) != default
        ways = {one: getattr(case, one) for one in SHOWN_BY if one != way}
        assert ways == {one: getattr(Case(check=by), one) for one in ways}
        assert replay(subject, str(case.but(**{way: default}))).passed


@pytest.mark.proof
@pytest.mark.parametrize("pattern", [planted.Exchange, planted.Gossips])
def test_the_patterns_that_the_planted_codecs_break_are_right(pattern):
    report = check(subject_of(pattern), Options(workers=4, seeds=60))
    assert report.passed, report.failures


def test_who_waits_for_whom_ends_the_story_of_a_deadlock():
    report = check(subject_of(planted.WaitsForEachOther), only=["schedules"])
    waits = [moment for moment in report.failures[0].story if moment.kind == "wait"]
    assert [(moment.node, moment.label) for moment in waits] == [
        (
            0,
            "waits in step 0; last hook: update(block 0); heard in this step from nobody, not from 1",
        ),
        (
            1,
            "waits in step 0; last hook: update(block 1); heard in this step from nobody, not from 0",
        ),
    ]


def test_what_another_check_has_shown_is_not_shown_twice():
    report = check(subject_of(planted.WaitsForEachOther), Options(workers=2, seeds=5))
    shown = {one.check: (len(one.failures), len(one.known)) for one in report.outcomes}
    assert shown["mean"] == (1, 0)
    assert shown["schedules"] == (0, 1)
