import dataclasses
import re

import numpy as np
import pytest

from aiosgd.errors import JobFailedError
from aiosgd.runtime.learner import Learner, Sampler, sketch
from tests.runtime.memory_transport import load_small

FEDERATED = ["iid", "shards", "dirichlet"]
MOMENTUM = {"optimizer_params": {"momentum": 0.9}}


def sampler_of(options=(), workers=2, **changes):
    return Sampler(dataclasses.replace(load_small(dict(options), workers), **changes))


def learner_of(options=(), workers=2):
    load = load_small(dict(options), workers)
    return Learner(load, load.initial()), load


def gradient_at(load, weights, step, block):
    indices = Sampler(load).indices(step, block)
    gradient = np.empty_like(weights)
    x, y = load.data.train_x[indices], load.data.train_y[indices]
    loss, accuracy = load.model.gradients(weights, x, y, gradient)
    return gradient, loss, accuracy


# shared data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 12])
def test_an_epoch_sees_each_sample_once_if_sizes_divide(workers, batch_size):
    load = load_small({"batch_size": batch_size}, workers)
    sampler = Sampler(load)
    assert load.steps_per_epoch == 96 // (workers * batch_size)
    for epoch in range(2):
        steps = range(epoch * load.steps_per_epoch, (epoch + 1) * load.steps_per_epoch)
        seen = [sampler.indices(step, block) for step in steps for block in range(workers)]
        assert all(len(indices) == batch_size for indices in seen)
        assert np.sort(np.concatenate(seen)).tolist() == list(range(96))


@pytest.mark.parametrize(("workers", "batch_size"), [(2, 7), (5, 4), (1, 95)])
def test_an_epoch_sees_no_sample_twice_and_leaves_out_less_than_a_batch(workers, batch_size):
    load = load_small({"batch_size": batch_size}, workers)
    sampler = Sampler(load)
    steps = range(load.steps_per_epoch)
    seen = np.concatenate([sampler.indices(s, block) for s in steps for block in range(workers)])
    assert len(set(seen.tolist())) == len(seen)
    assert 96 - workers * batch_size < len(seen) <= 96
    assert seen.min() >= 0
    assert seen.max() < 96


def test_what_one_epoch_leaves_out_another_sees():
    load = load_small({"batch_size": 20, "epochs": 20}, 4)
    sampler = Sampler(load)
    seen = {i for step in range(load.steps) for b in range(4) for i in sampler.indices(step, b)}
    assert seen == set(range(96))


@pytest.mark.parametrize("step", [0, 1, 5, 6, 13])
def test_a_global_batch_does_not_depend_on_the_number_of_workers(step):
    batches = [
        np.concatenate(
            [
                sampler_of({"batch_size": 16 // workers}, workers).indices(step, block)
                for block in range(workers)
            ]
        ).tolist()
        for workers in (1, 2, 4, 16)
    ]
    assert batches[1:] == batches[:1] * 3


def test_samples_depend_on_seed_epoch_step_and_block_only():
    first, second = sampler_of(), sampler_of()
    late = second.indices(25, 1).tolist()
    for step in (30, 0, 11, 24, 12, 25):
        first.indices(step, 0)
    assert first.indices(25, 1).tolist() == late
    assert first.indices(1, 1).tolist() != late  # the same place in another epoch
    assert sampler_of({"seed": 1}).indices(25, 1).tolist() != late
    assert first.indices(25, 0).tolist() != late


def test_batches_are_mixed():
    indices = sampler_of({"batch_size": 48}, 1).indices(0, 0)
    assert (np.diff(indices) < 0).any()
    assert indices.max() > 60


# federated data -------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", FEDERATED)
@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_a_worker_covers_its_own_share_fully_before_it_repeats(partition, batch_size):
    load = load_small({"partition": partition, "batch_size": batch_size}, 3)
    sampler = Sampler(load)
    for worker, share in enumerate(load.shares):
        passes = 3
        steps = -(-passes * len(share) // batch_size)
        stream = np.concatenate([sampler.indices(step, worker) for step in range(steps)])
        assert len(stream) == steps * batch_size
        rounds = [stream[i * len(share) : (i + 1) * len(share)].tolist() for i in range(passes)]
        for one in rounds:
            assert sorted(one) == share.tolist()
        assert len(share) < 6 or rounds[0] != rounds[1]


def test_a_batch_may_be_larger_than_a_share():
    shares = [np.array([3, 5]), np.arange(6, 96)]
    sampler = sampler_of({"batch_size": 5, "partition": "iid"}, shares=shares)
    stream = np.concatenate([sampler.indices(step, 0) for step in range(2)]).reshape(5, 2)
    assert np.sort(stream).tolist() == [[3, 5]] * 5


def test_workers_shuffle_independently():
    shares = [np.arange(48), np.arange(48)]
    sampler = sampler_of({"batch_size": 48, "partition": "iid"}, shares=shares)
    assert sampler.indices(0, 0).tolist() != sampler.indices(0, 1).tolist()


def test_several_blocks_of_one_worker_have_different_samples():
    owners = ((0,), (1,), (0,), (0,))
    shares = [np.arange(60), np.arange(60, 96)]
    sampler = sampler_of({"partition": "iid"}, shares=shares, owners=owners)
    own = [sampler.indices(step, block) for step in range(5) for block in (0, 2, 3)]
    assert np.sort(np.concatenate(own)).tolist() == list(range(60))
    other = [sampler.indices(step, 1) for step in range(9)]
    assert np.sort(np.concatenate(other)).tolist() == list(range(60, 96))


# the learner ----------------------------------------------------------------------------------


def test_the_initial_weights_are_copied():
    load = load_small({})
    initial = load.initial()
    learner = Learner(load, initial)
    learner.apply(np.ones_like(initial), 0)
    assert initial.tobytes() == load.initial().tobytes()
    assert learner.weights.dtype == np.float32


def test_a_block_s_gradient_is_that_of_its_samples():
    learner, load = learner_of()
    computed = learner.advance(3, 1)
    gradient, loss, accuracy = gradient_at(load, load.initial(), 3, 1)
    assert computed.value.tobytes() == gradient.tobytes()
    assert (computed.block, computed.samples) == (1, 4)
    assert (computed.loss, computed.accuracy) == (loss, accuracy)
    assert computed.seconds > 0


@pytest.mark.parametrize("exchange", ["gradients", "updates", "weights"])
def test_values_are_read_only_and_new_each_time(exchange):
    learner, _ = learner_of({"exchange": exchange})
    first, second = learner.advance(0, 0), learner.advance(0, 0)
    assert not first.value.flags.writeable
    assert not np.shares_memory(first.value, second.value)
    assert not np.shares_memory(first.value, learner.weights)


@pytest.mark.parametrize("exchange", ["updates", "weights"])
def test_the_other_exchanges_hold_the_optimizer_s_step(exchange):
    learner, load = learner_of({"exchange": exchange, **MOMENTUM})
    weights = learner.weights
    expected, optimizer = weights.copy(), load.make_optimizer()
    for step in range(3):
        value = learner.advance(step, 0).value
        before = expected.copy()
        gradient, *_ = gradient_at(load, expected, step, 0)
        optimizer.apply(expected, gradient, step)
        want = expected if exchange == "weights" else expected - before
        assert np.abs(value - want).max() <= 1e-7
        learner.hold(value, step)
        learner.settle()
        assert np.abs(weights - expected).max() <= 1e-6


def test_each_block_has_an_optimizer_of_its_own():
    """All owners of a block compute the same, whatever other blocks they have."""
    options = {"exchange": "updates", "redundancy": 2, **MOMENTUM}
    busy, _ = learner_of(options, 3)
    other, _ = learner_of(options, 3)
    for step in range(3):
        both = [busy.advance(step, block).value for block in (0, 1)]
        assert other.advance(step, 1).value.tobytes() == both[1].tobytes()
        assert both[0].tobytes() != both[1].tobytes()


@pytest.mark.parametrize(
    ("exchange", "optimizer", "skips"),
    [
        ("gradients", {}, True),
        ("gradients", MOMENTUM, True),
        ("updates", {}, True),
        ("updates", MOMENTUM, False),
        ("weights", MOMENTUM, False),
        ("weights", {"optimizer": "adam"}, False),
    ],
)
def test_a_block_may_be_skipped_unless_its_optimizer_remembers(exchange, optimizer, skips):
    assert learner_of({"exchange": exchange, **optimizer})[0].may_skip is skips


# hold and settle ------------------------------------------------------------------------------


def test_a_held_result_is_applied_once_by_the_next_advance():
    learner, load = learner_of()
    result = np.ones_like(learner.weights)
    learner.hold(result, 0)
    assert learner.holds_result
    assert learner.weights.tobytes() == load.initial().tobytes()
    computed = learner.advance(1, 0)
    assert not learner.holds_result
    moved = load.initial() - np.float32(0.1)
    assert np.abs(learner.weights - moved).max() <= 1e-7
    assert computed.value.tobytes() == gradient_at(load, learner.weights, 1, 0)[0].tobytes()
    learner.advance(1, 1)
    learner.settle()
    assert np.abs(learner.weights - moved).max() <= 1e-7


def test_settle_applies_a_held_result_once():
    learner, load = learner_of({"exchange": "updates"})
    learner.settle()
    assert learner.weights.tobytes() == load.initial().tobytes()
    learner.hold(np.ones_like(learner.weights), 0)
    learner.settle()
    learner.settle()
    assert learner.weights.tobytes() == (load.initial() + 1).tobytes()
    assert not learner.holds_result


def test_a_result_is_applied_with_the_rate_of_its_step():
    options = {"optimizer_params": {"schedule": "step", "decay_steps": 1, "decay_rate": 0.5}}
    learner, _ = learner_of(options)
    for step, rate in ((0, 0.1), (2, 0.025)):
        before = learner.weights.copy()
        learner.hold(np.ones_like(before), step)
        learner.settle()
        assert np.abs(before - learner.weights - rate).max() <= 1e-7


@pytest.mark.parametrize("exchange", ["gradients", "updates", "weights"])
def test_results_may_be_read_only_and_are_not_kept(exchange):
    learner, load = learner_of({"exchange": exchange, **MOMENTUM})
    result = np.full_like(learner.weights, 2.0)
    result.setflags(write=False)
    learner.hold(result, 0)
    learner.settle()
    assert not np.shares_memory(learner.weights, result)
    assert (result == 2.0).all()
    expected = {
        "gradients": load.initial() - np.float32(0.2),
        "updates": load.initial() + 2,
        "weights": result,
    }[exchange]
    assert np.abs(learner.weights - expected).max() <= 1e-6


@pytest.mark.parametrize("exchange", ["gradients", "updates", "weights"])
def test_the_neutral_result_changes_nothing(exchange):
    learner, load = learner_of({"exchange": exchange})
    neutral = learner.neutral()
    assert not np.shares_memory(neutral, learner.weights)
    learner.apply(neutral, 0)
    assert learner.weights.tobytes() == load.initial().tobytes()


def test_evaluation_is_on_the_test_set():
    learner, load = learner_of()
    data = load.data
    expected = load.model.evaluate(load.initial(), data.test_x, data.test_y)
    assert learner.evaluate() == expected


def test_without_test_samples_there_is_no_loss_and_no_accuracy():
    load = load_small({})
    data = dataclasses.replace(load.data, test_x=load.data.test_x[:0], test_y=load.data.test_y[:0])
    learner = Learner(dataclasses.replace(load, data=data), load.initial())
    assert np.isnan(learner.evaluate()).all()


def test_a_sketch_is_linear_and_keeps_distances():
    rng = np.random.default_rng(1)
    ratios = []
    for _ in range(200):
        x, y = rng.standard_normal((2, 1000)).astype(np.float32)
        x *= rng.random(1000) < 0.1
        apart = sketch(x) - sketch(y)
        assert np.allclose(apart, sketch(x - y), atol=1e-4)
        ratios.append(np.linalg.norm(apart) ** 2 / np.linalg.norm(x - y) ** 2)
    assert abs(np.mean(ratios) - 1) < 0.05
    assert np.std(ratios) < 0.25  # √(2/64) is 0.18


def test_a_sketch_tells_any_two_weights_apart():
    for i in range(130):
        unit = np.zeros(130, np.float32)
        unit[i] = 1
        assert np.linalg.norm(sketch(unit)) == 1


# what is not finite ---------------------------------------------------------------------------

EXCHANGES = ["gradients", "updates", "weights"]


class Spoilt:
    """A model whose gradients have a flaw in some of the calls."""

    def __init__(self, model, flaws):
        self.model = model
        self.flaws = flaws
        self.calls = -1

    def gradients(self, weights, x, y, out):
        self.calls += 1
        loss, accuracy = self.model.gradients(weights, x, y, out)
        if self.calls in self.flaws:
            out[25] = self.flaws[self.calls]
        return loss, accuracy

    def for_worker(self):
        return self

    def __getattr__(self, name):
        return getattr(self.model, name)


def spoilt_learner(options, flaws):
    load = load_small(options)
    load = dataclasses.replace(load, model=Spoilt(load.model, flaws))
    return Learner(load, load.initial()), load


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_gradient_that_is_not_finite_stops_the_job_with_its_name(exchange):
    learner, _ = spoilt_learner({"exchange": exchange}, {1: np.nan})
    learner.advance(0, 0)
    with pytest.raises(JobFailedError) as caught:
        learner.advance(1, 0)
    assert re.fullmatch(
        r"step 1: the gradient of \w+ is nan \(1 of 4 values\); loss \d\.\d+; "
        "a smaller learning rate, or --nan skip",
        str(caught.value),
    )


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_skipped_block_goes_by_a_neutral_value(exchange):
    learner, _ = spoilt_learner({"exchange": exchange, "nan": "skip"}, {0: np.inf})
    computed = learner.advance(0, 0)
    assert re.fullmatch(r"the gradient of \w+ is inf \(1 of 4 values\)", computed.flaw)
    assert computed.value.tobytes() == learner.neutral().tobytes()
    assert not computed.value.flags.writeable
    assert learner.advance(1, 0).flaw == ""
    assert learner.advance(1, 0).value.tobytes() != learner.neutral().tobytes()


@pytest.mark.parametrize("exchange", ["updates", "weights"])
def test_an_optimizer_that_remembers_never_sees_what_was_skipped(exchange):
    options = {"exchange": exchange, "nan": "skip", **MOMENTUM}
    spoilt, _ = spoilt_learner(options, {1: np.nan})
    whole, _ = learner_of(options)
    values = [[learner.advance(step, 0).value for step in (0, 2)] for learner in (whole,)]
    values.append([spoilt.advance(step, 0).value for step in range(3)][::2])
    assert values[0][1].tobytes() == values[1][1].tobytes()


@pytest.mark.parametrize(("exchange", "words"), [("updates", "update"), ("weights", "weights")])
def test_a_value_that_overflows_only_in_the_optimizer_is_named_for_what_it_is(exchange, words):
    options = {"exchange": exchange, "learning_rate": 1e30}
    learner, _ = spoilt_learner(options, {0: 1e30})
    with pytest.raises(JobFailedError, match=rf"step 0: the {words} of \w+ (is|are) -inf \(1 of 4"):
        learner.advance(0, 0)


@pytest.mark.parametrize("nan", ["stop", "skip"])
def test_weights_that_are_not_finite_end_the_job_in_any_case(nan):
    learner, _ = learner_of({"nan": nan})
    learner.weights[3] = np.inf
    with pytest.raises(
        JobFailedError, match=r"step 0: the weights of \w+ are inf \(1 of "
    ) as caught:
        learner.advance(0, 0)
    assert ("--nan skip" in str(caught.value)) == (nan == "stop")


def test_a_neutral_result_leaves_a_held_one_as_it_is():
    learner, _ = learner_of({"exchange": "weights"})
    held = np.arange(learner.weights.size, dtype=np.float32)
    learner.hold(held, 0)
    assert learner.neutral().tobytes() == held.tobytes()
