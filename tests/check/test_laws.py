"""Each law holds for a codec that keeps it, and is broken by one that does not."""

import itertools

import planted
import pytest

from aiosgd.check.case import Case
from aiosgd.check.laws import LAWS, expanded
from aiosgd.check.local import play
from aiosgd.check.runner import check
from aiosgd.check.simulated import simulate
from aiosgd.check.subject import subject_of
from aiosgd.codecs.base import WORKERS, Envelope
from aiosgd.codecs.fedavg import FedAvg
from aiosgd.codecs.local import Local
from aiosgd.codecs.parameter_server import ParameterServer, Server
from aiosgd.codecs.plain import Plain


class ForgetsToKeep(Server):
    """Keeps half of what it tells its workers."""

    def weights(self):
        return self.state - (self.state - self.ctx.initial) / 2


class HalfKept(ParameterServer):
    server = ForgetsToKeep


class Twice(Local):
    """Counts its own blocks twice."""

    def set_result(self, value, operation=None):
        super().set_result(2 * value, operation)


LAW_CASES = [
    ("mean", Plain, planted.SumsInstead),
    ("sum", planted.SumsInstead, Plain),
    ("own", Local, Twice),
    ("consensus", Plain, Local),
    ("final", FedAvg, Local),
    ("average", Plain, planted.SumsInstead),
    ("single", Plain, Twice),
    ("zero", Plain, planted.OutOfNothing),
    ("scale", Plain, planted.OutOfNothing),
    ("kept", ParameterServer, HalfKept),
]


def verdict(name, codec, mode):
    law, subject = LAWS[name], subject_of(codec)
    servers = int(subject.server is not None)
    case = Case(
        check=name,
        mode=mode,
        exchange=codec.exchange,
        workers=law.workers or 3,
        servers=servers,
        steps=3,
        size=3,
    )
    run = play(subject, case, law.values)
    assert not run.error
    return law.judge(subject, run)


@pytest.mark.parametrize(("name", "keeps", "breaks"), LAW_CASES)
def test_a_law_tells_who_keeps_it_from_who_breaks_it(name, keeps, breaks):
    assert verdict(name, keeps, "sync") == ""
    assert verdict(name, breaks, "sync") != ""


@pytest.mark.parametrize("name", ["mean", "consensus", "kept"])
def test_async_laws_hold_at_the_end(name):
    assert verdict(name, ParameterServer, "async") == ""


class Lost(Local):
    """A tenth of each update gets lost."""

    def set_result(self, value, operation=None):
        super().set_result(value - value / 10, operation)


@pytest.mark.parametrize(
    ("name", "codec"), [("kept", HalfKept), ("consensus", Local), ("average", Lost)]
)
def test_async_laws_can_be_broken(name, codec):
    assert verdict(name, codec, "async") != ""


def test_every_law_but_first_come_is_tried_here():
    assert {name for name, *_ in LAW_CASES} == set(LAWS) - {"first-come"}


def test_laws_bring_what_they_imply():
    assert expanded({"consensus", "mean"}) == ("mean", "consensus", "single", "zero")


@pytest.mark.proof
def test_who_may_depend_on_who_comes_first_is_not_checked_for_order():
    class Hasty(planted.AddsInArrivalOrder):
        laws = frozenset({"mean", "first-come"})

    report = check(subject_of(Hasty), only=["schedules", "jitter"])
    assert report.passed, report.failures


def test_what_comes_after_the_last_result_is_handled_too():
    class FailsLate(Local):
        accepts_late = True

        async def update(self, block):
            await super().update(block)
            return Envelope(WORKERS, None)

        async def receive(self, message):
            if message.step < self.ctx.step:
                raise RuntimeError("late trouble")

    assert "late trouble" in play(subject_of(FailsLate), Case(check="contract")).error


def test_jitter_and_the_schedule_decide_when_a_simulated_job_ends():
    subject, case = subject_of(Plain), Case(check="jitter", steps=3)
    calm = {simulate(subject, case.but(schedule=i)).time_s for i in range(3)}
    late = {simulate(subject, case.but(schedule=i, jitter=0.005)).time_s for i in range(3)}
    assert len(calm) == 1
    assert len(late) == 3
    assert min(late) > max(calm)


GOSSIPS = ["dpsgd", "gradient_tracking", "d2", "choco"]


# D2 takes symmetric weights alone
AVERAGES = {*itertools.product(GOSSIPS, ["ring", "line", "exponential", "star"])}


@pytest.mark.parametrize(("name", "topology"), sorted(AVERAGES - {("d2", "exponential")}))
def test_mixing_keeps_the_average_wherever_it_is_doubly_stochastic(name, topology):
    case = Case(check="average", exchange="weights", workers=5, steps=4, size=3, topology=topology)
    run = play(subject_of(name), case)
    assert not run.error
    assert LAWS["average"].judge(subject_of(name), run) == ""


def test_an_asynchronous_average_is_that_of_all_updates():
    case = Case(
        check="average", mode="async", exchange="updates", workers=5, steps=4, topology="ring"
    )
    run = play(subject_of("adpsgd"), case)
    assert LAWS["average"].judge(subject_of("adpsgd"), run) == ""


def test_of_a_matrix_that_is_not_doubly_stochastic_the_average_says_nothing():
    star = 'star(weights="uniform")'
    case = Case(check="average", exchange="weights", workers=4, topology=star)
    run = play(subject_of("dpsgd"), case)
    assert LAWS["average"].judge(subject_of("dpsgd"), run) == ""
    metropolis = play(subject_of(planted.TakesTheMean), case.but(topology="star"))
    assert LAWS["average"].judge(subject_of("dpsgd"), metropolis) != ""


@pytest.mark.parametrize("compressor", ["fp16", "int8", "ef(topk(ratio=0.1))", "powersgd"])
@pytest.mark.parametrize("name", [name for name, law in LAWS.items() if law.lossy])
def test_what_is_said_to_hold_with_any_compressor_does(name, compressor):
    law, subject = LAWS[name], subject_of(Plain)
    for mode in law.lossy:
        case = Case(check=name, mode=mode, workers=3, steps=3, size=7, compressor=compressor)
        run = play(subject, case, law.values)
        assert not run.error
        assert law.judge(subject, run) == ""
