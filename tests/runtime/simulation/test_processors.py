"""Processors in the network model: work while bytes flow, cores that are shared, codecs, blocks."""

import asyncio
import dataclasses
import math
from pathlib import Path as Folder

import numpy as np
import pytest

from aiosgd.runtime.config import JobConfig
from aiosgd.runtime.simulation.compare import predict
from aiosgd.runtime.simulation.loop import run_virtually
from aiosgd.runtime.simulation.network import Network, NetworkModel, Path
from aiosgd.runtime.simulation.simulate import Simulation, play
from aiosgd.runtime.simulation.trace import Trace
from aiosgd.runtime.simulation.world import Scenario
from aiosgd.runtime.workload import load

MEGABYTE = 1_000_000
FREE = NetworkModel(
    bytes_per_s=math.inf, path=Path(latency_s=0.0), message_s=0.0, byte_s=0.0, block_s=0.001
)


def model(**changes):
    return dataclasses.replace(FREE, **changes)


def arrivals(messages, network_model, before=lambda network: None, seed=0):
    """Send (time, sender, to, size); return the arrival time of each."""
    times = [math.nan] * len(messages)

    async def main():
        loop = asyncio.get_running_loop()
        network = Network(loop, network_model, seed, Trace())
        before(network)
        for i, (time, sender, to, size) in enumerate(messages):
            arrive = lambda i=i: times.__setitem__(i, loop.time())  # noqa: E731
            loop.call_later(time, network.send, sender, to, size, arrive)
        await asyncio.sleep(1000)

    run_virtually(main())
    return times


# Messages -------------------------------------------------------------------------------------


def test_of_a_large_message_one_end_works_on_the_first_bytes_while_the_other_sends_the_rest():
    (time,) = arrivals([(0, 0, 1, 100 * MEGABYTE)], model(byte_s=1e-9))
    assert time == pytest.approx(0.1, rel=0.01)


def test_a_small_message_is_worked_on_by_one_end_after_the_other():
    (time,) = arrivals([(0, 0, 1, 50_000)], model(byte_s=1e-7))
    assert time == pytest.approx(0.01, rel=1e-6)


def test_the_slowest_of_card_and_processors_sets_the_pace():
    slow_card = model(byte_s=1e-9, bytes_per_s=1e7)
    assert arrivals([(0, 0, 1, 10 * MEGABYTE)], slow_card) == [pytest.approx(1.0, rel=0.01)]
    slow_processor = model(byte_s=1e-7, bytes_per_s=1e8)
    assert arrivals([(0, 0, 1, 10 * MEGABYTE)], slow_processor) == [pytest.approx(1.0, rel=0.02)]


def test_a_large_message_that_drips_in_does_not_keep_others_from_the_processor():
    messages = [(0, 0, 2, 10 * MEGABYTE), (0.5, 1, 2, 10)]
    large, small = arrivals(messages, model(byte_s=1e-9, nodes_bytes_per_s={0: 1e7}))
    assert large == pytest.approx(1.0, rel=0.01)
    assert small == pytest.approx(0.5, abs=1e-3)


def test_a_codecs_work_is_the_receivers_alone_and_comes_after_the_last_byte():
    working = model(codec_message_s=0.5, codec_byte_s=1e-6, bytes_per_s=1e6)
    assert arrivals([(0, 0, 1, MEGABYTE)], working) == [pytest.approx(2.5, rel=0.01)]
    both = arrivals([(0, 0, 1, 1), (0, 0, 2, 1)], model(codec_message_s=0.5))
    assert both == [pytest.approx(0.5)] * 2
    after_another = arrivals([(0, 0, 1, 1), (0, 2, 1, 1)], model(codec_message_s=0.5))
    assert after_another == [pytest.approx(0.5), pytest.approx(1.0)]


@pytest.mark.parametrize("seed", range(5))
def test_a_link_keeps_its_order_whatever_its_messages_take(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.choice([1, 60_000, 70_000, MEGABYTE], 40)
    messages = [(0.001 * i, 0, 1, int(size)) for i, size in enumerate(sizes)]
    jittery = model(
        path=Path(latency_s=0.01, jitter_s=0.05, loss=0.1, retry_s=0.02),
        byte_s=2e-9,
        codec_byte_s=1e-9,
        bytes_per_s=1e9,
        cores=1,
    )
    times = arrivals(messages, jittery, seed=seed)
    assert times == sorted(set(times))


# Cores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "nodes", "longest"),
    [(None, 8, 1.0), (2, 2, 1.0), (2, 3, 1.5), (2, 4, 2.0), (1, 3, 3)],
)
def test_equal_work_that_begins_together_ends_when_even_shares_would(cores, nodes, longest):
    def occupy(network):
        ends.extend(network.occupy(node, 10**9, thread=True) for node in range(nodes))

    ends = []
    arrivals([], model(cores=cores), occupy)
    assert max(ends) == longest * 1e9


def test_nodes_that_are_done_take_no_share():
    ends = []

    def occupy(network):
        network.occupy(0, 10**9, thread=False)
        network.occupy(1, 10**9, thread=False)
        asyncio.get_running_loop().call_later(
            1.0, lambda: ends.append(network.occupy(2, 10**9, thread=False))
        )

    arrivals([], model(cores=2), occupy)
    assert ends == [2 * 10**9]


def test_a_loop_waits_for_its_own_work_but_not_for_its_thread():
    for thread, expected in ((False, 1.5), (True, 0.5)):
        (time,) = arrivals(
            [(0, 0, 1, 1)],
            model(codec_message_s=0.5),
            lambda network, thread=thread: network.occupy(1, 10**9, thread=thread),
        )
        assert time == pytest.approx(expected)


# Blocks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_load():
    return load(JobConfig(max_steps=6, batch_size=16), 2, Folder())


def step_s(small_load, **changes):
    return predict(small_load, 2, 0, model(**changes)).step_s


def test_what_a_step_takes_is_the_sum_of_its_parts(small_load):
    base, size = step_s(small_load), small_load.model.size
    assert base == pytest.approx(0.001)
    assert step_s(small_load, step_s=0.002) == pytest.approx(0.003)
    assert step_s(small_load, wake_s=0.004) == pytest.approx(0.005)
    assert step_s(small_load, codec_message_s=0.004) == pytest.approx(0.005)
    computed = step_s(small_load, block_s=None, flops=6e9, least_s=0.01, weight_s=1e-6)
    assert computed == pytest.approx(0.01 + size * 16 * 1e-9 + size * 1e-6)


def test_a_codec_takes_as_long_for_its_own_block_as_for_anothers(small_load):
    size = 4 * small_load.model.size
    both = step_s(small_load, codec_byte_s=1e-6) - 0.001
    assert 2 * size * 1e-6 <= both <= 2 * (size + 200) * 1e-6
    groups = load(JobConfig(max_steps=6, batch_size=16, granularity="tensor"), 2, Folder())
    assert len(groups.groups) == 4
    assert step_s(groups, codec_message_s=0.004) == pytest.approx(0.001 + (3 + 4) * 0.004)


def test_an_evaluation_takes_time_between_epochs(small_load):
    job = JobConfig(epochs=3, batch_size=64)
    two = load(job, 2, Folder())
    assert two.steps == 33
    plain, more = (
        predict(two, 2, 0, model(evaluation_s=seconds)).train_s for seconds in (0.0, 0.5)
    )
    assert more - plain == pytest.approx(1.0)  # the last one is not part of training


def test_only_long_blocks_hop_to_a_thread(small_load):
    assert step_s(small_load, hop_s=0.1) == pytest.approx(0.001)
    assert step_s(small_load, hop_s=0.1, block_s=0.002) == pytest.approx(0.102)


def test_a_worker_that_is_slow_is_waited_for(small_load):
    figures = predict(small_load, 2, 0, model(slow={1: 5.0}))
    assert figures.step_s == pytest.approx(0.005)
    assert figures.wait_s == pytest.approx(0.002)  # the median of 4 and 0


def test_replayed_times_come_in_their_order_and_again(small_load):
    scenario = Scenario(network=model(replayed_s={0: (0.01, 0.03), 7: (1.0,)}), slow={0: 2.0})
    world = play(Simulation(load=small_load, workers=2, scenario=scenario)).world
    assert list(world.sessions[0].train.array()["compute_s"]) == [0.02, 0.06] * 3
    assert list(world.sessions[1].train.array()["compute_s"]) == [0.001] * 6
