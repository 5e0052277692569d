"""The network model: latency, shared cards, order, loss as delay, cuts, crashes; and its draws."""

import asyncio
import math

import pytest

from aiosgd.runtime.simulation.draws import draw, uniform
from aiosgd.runtime.simulation.loop import run_virtually
from aiosgd.runtime.simulation.network import Network, NetworkModel, Override, Path
from aiosgd.runtime.simulation.trace import Trace, What

MEGABYTE = 1_000_000
IDEAL = {"message_s": 0.0, "byte_s": 0.0}


def arrivals(messages, model, seed=0, faults=lambda network: None, trace=None, seconds=1000):
    """Send (time, sender, to, size); return the arrival time of each, None if there is none."""
    times = [None] * len(messages)

    async def main():
        loop = asyncio.get_running_loop()
        network = Network(loop, model, seed, trace or Trace())

        def arrived(i):
            times[i] = loop.time()

        for i, (time, sender, to, size) in enumerate(messages):
            loop.call_later(time, network.send, sender, to, size, lambda i=i: arrived(i))
        faults(network)
        await asyncio.sleep(seconds)

    run_virtually(main())
    return times


def lan(**changes):
    return NetworkModel(**{"bytes_per_s": 1e8, "path": Path(latency_s=0.001), **IDEAL, **changes})


def test_a_message_takes_its_transmission_and_the_latency():
    assert arrivals([(0, 0, 1, MEGABYTE)], lan()) == [pytest.approx(0.011, abs=1e-8)]


def test_processors_take_their_time_at_both_ends_and_one_message_after_the_other():
    model = lan(bytes_per_s=math.inf, message_s=0.01)
    times = arrivals([(0, 0, 1, 10), (0, 2, 1, 10), (0, 2, 3, 10)], model)
    assert times == [pytest.approx(0.021), pytest.approx(0.031), pytest.approx(0.031)]


def test_links_of_one_sender_share_its_card():
    same = arrivals([(0, 0, to, MEGABYTE) for to in (1, 2, 3, 4)], lan())
    assert same == [pytest.approx(0.041, abs=1e-6)] * 4
    small_beside_large = arrivals([(0, 0, 1, 100 * MEGABYTE), (0.1, 0, 2, MEGABYTE)], lan())
    assert small_beside_large[1] == pytest.approx(0.121, abs=1e-6)
    assert small_beside_large[0] == pytest.approx(1.011, abs=1e-6)


def test_messages_of_one_link_follow_each_other():
    assert arrivals([(0, 0, 1, MEGABYTE), (0, 0, 1, MEGABYTE)], lan()) == [
        pytest.approx(0.011, abs=1e-6),
        pytest.approx(0.021, abs=1e-6),
    ]


def test_many_senders_share_the_receivers_card():
    times = arrivals([(0, sender, 0, MEGABYTE) for sender in (1, 2, 3, 4)], lan())
    assert max(times) == pytest.approx(0.041, abs=1e-6)


def test_a_node_may_have_a_slower_card():
    model = lan(nodes_bytes_per_s={1: 1e7})
    assert arrivals([(0, 0, 1, MEGABYTE)], model) == [pytest.approx(0.101, rel=0.02)]
    assert arrivals([(0, 1, 0, MEGABYTE)], model) == [pytest.approx(0.101, rel=0.02)]


def test_overrides_hold_both_ways_and_the_last_wins():
    slow, slower = Path(latency_s=1.0), Path(latency_s=2.0)
    model = lan(
        overrides=[
            Override(between={0, 1}, others={2}, path=slow),
            Override(between={1}, others={2}, path=slower),
        ]
    )
    times = arrivals([(0, 0, 2, 0), (0, 2, 0, 0), (0, 2, 1, 0), (0, 0, 1, 0)], model)
    assert times == [pytest.approx(t, abs=1e-6) for t in (1.0, 1.0, 2.0, 0.001)]


def test_jitter_never_changes_the_order_of_a_link():
    model = lan(path=Path(latency_s=0.001, jitter_s=1.0))
    times = arrivals([(i * 1e-3, 0, 1, 10) for i in range(200)], model)
    assert times == sorted(times)
    assert max(times) < 1.3
    others = arrivals([(0, sender, sender + 1000, 10) for sender in range(200)], model)
    assert others != sorted(others)


def test_loss_is_delay_with_a_pause_that_doubles():
    model = lan(path=Path(latency_s=0.0, loss=0.5, retry_s=1.0))
    times = arrivals([(0, sender, sender + 1000, 0) for sender in range(400)], model)
    shares = [sum(round(t) == delay for t in times) / 400 for delay in (0, 1, 3, 7)]
    assert shares == [pytest.approx(share, abs=0.08) for share in (0.5, 0.25, 0.125, 0.0625)]


def test_a_cut_holds_what_is_sent_and_a_heal_lets_it_through():
    def faults(network):
        loop = asyncio.get_running_loop()
        loop.call_later(0.5, network.cut, [0], [1, 2])
        loop.call_later(3, network.heal)

    sent = [(0, 0, 1, 10), (1, 0, 1, 10), (1, 2, 0, 10), (1, 1, 2, 10), (4, 0, 1, 10)]
    times = arrivals(sent, lan(), faults=faults)
    assert times[0] < 0.01
    assert 3 < times[1] < 3.2
    assert 3 < times[2] < 3.2
    assert times[3] < 1.01
    assert 4 < times[4] < 4.01


def test_a_crash_drops_what_is_under_way_and_nothing_of_the_next_life():
    def faults(network):
        loop = asyncio.get_running_loop()
        loop.call_later(0.005, network.crash, 0)

    trace = Trace(keep=True)
    sent = [(0, 0, 1, MEGABYTE), (0, 2, 0, MEGABYTE), (0, 2, 1, MEGABYTE), (1, 0, 1, 10)]
    times = arrivals(sent, lan(), faults=faults, trace=trace)
    assert times[:2] == [None, None]
    assert None not in times[2:]
    kinds = [event.what for event in trace.events]
    assert kinds.count(What.CRASH) == 1
    assert kinds.count(What.SEND) == kinds.count(What.DELIVER) + kinds.count(What.DROP)


def test_one_links_fate_does_not_depend_on_the_others():
    model = lan(path=Path(latency_s=0.001, jitter_s=0.5, loss=0.2), bytes_per_s=math.inf)
    alone = arrivals([(0, 0, 1, 10), (0.7, 0, 1, 10)], model, seed=5)
    crowd = [(0, 7, sender, 10) for sender in range(20, 60)]
    assert arrivals([(0, 0, 1, 10), (0.7, 0, 1, 10), *crowd], model, seed=5)[:2] == alone
    assert arrivals([(0, 0, 1, 10), (0.7, 0, 1, 10)], model, seed=6) != alone


def test_the_trace_is_the_same_for_the_same_seed_and_counts_everything():
    model = lan(path=Path(latency_s=0.001, jitter_s=0.5))
    sent = [(0, i, (i * 7 + 1) % 20, 100 * i) for i in range(20) if i != (i * 7 + 1) % 20]
    traces = [Trace(), Trace(keep=True), Trace()]
    for seed, trace in zip((1, 1, 2), traces, strict=True):
        arrivals(sent, model, seed=seed, trace=trace)
    assert traces[0].digest == traces[1].digest != traces[2].digest
    assert traces[1].count == len(traces[1].events) == 2 * len(sent)


def test_draws_are_even_and_depend_on_every_part_of_their_key():
    values = [uniform(1, i) for i in range(4000)]
    assert 0 <= min(values) < 0.01 < 0.99 < max(values) < 1
    assert sum(values) / 4000 == pytest.approx(0.5, abs=0.02)
    keys = [(1, 2, 3), (1, 3, 2), (2, 1, 3), (1, 2), (1, 2, 3, 0), (1, 2, 3, 1)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(1, 2, 3) == draw(1, 2, 3) < 1 << 64
