"""Calibration: what is measured becomes a network, and from a known network's figures that one."""

import dataclasses
from pathlib import Path as Folder

import pytest

from aiosgd.bench import calibrate
from aiosgd.bench.calibrate import BlockFigures, ExchangeFigures, LinkFigures, Measured
from aiosgd.bench.jobs import Site
from aiosgd.bench.wire import Target
from aiosgd.errors import ClusterError
from aiosgd.runtime.config import Address, Cluster, Setting
from aiosgd.runtime.simulation.network import NetworkModel, Path
from aiosgd.runtime.simulation.networks import load_network, write_network

TRUTH = NetworkModel(
    name="truth",
    bytes_per_s=2e9,
    path=Path(latency_s=1e-4),
    message_s=1e-5,
    byte_s=2e-10,
    flops=5e10,
    codec_message_s=6e-5,
    codec_byte_s=1e-10,
    least_s=8e-5,
    weight_s=1e-9,
    step_s=5e-5,
    wake_s=2e-4,
    evaluation_s=3e-3,
    hop_s=7e-5,
    cores=2,
)
SIZES = {"digits": 4_810, "thread": 4_810, "whole": 118_282, "part": 118_282, "large": 2_500_000}
SAMPLES = {"digits": 64, "thread": 64, "whole": 64, "part": 8, "large": 1}


def link(node=0, **changes):
    """Return what a link of TRUTH shows."""
    trip_s = 2 * TRUTH.path.latency_s + 4 * TRUTH.message_s
    sent, worked = (
        {size: size * per for size in (calibrate.SMALL, calibrate.LARGE)}
        for per in (1 / TRUTH.bytes_per_s, 2 * TRUTH.byte_s)
    )
    figures = LinkFigures(
        node=node,
        over="tcp",
        round_trip_s=trip_s,
        trip_cpu_s=1e-4,
        jitter_s=5e-5,
        small_s=trip_s + sent[calibrate.SMALL],
        large_s=trip_s + sent[calibrate.LARGE],
        small_cpu_s=1e-4 + worked[calibrate.SMALL],
        large_cpu_s=1e-4 + worked[calibrate.LARGE],
        row_s=2e-5,
        row_cpu_s=2 * TRUTH.message_s,
    )
    return dataclasses.replace(figures, **changes)


def block(name, workers=2):
    """Return what a job that exchanges nothing shows on TRUTH."""
    size, samples = SIZES[name], SAMPLES[name]
    compute_s = TRUTH.least_s + size * (TRUTH.weight_s + 6 * samples / TRUTH.flops)
    codec_s = 4 * size * TRUTH.codec_byte_s if name in ("whole", "large") else 0.0
    hop_s = TRUTH.hop_s if name in ("thread", "large") else 0.0
    return BlockFigures(
        size=size,
        samples=samples,
        compute_s=dict.fromkeys(range(workers), compute_s),
        step_s=(step_s := compute_s + TRUTH.step_s + hop_s + codec_s),
        epoch_s=step_s + TRUTH.evaluation_s + 2 * TRUTH.hop_s,
    )


def exchange(name, messages):
    options = {**calibrate._EXCHANGES[name], "codec": "plain", "workers": 2, "max_steps": 10}
    made = ExchangeFigures(options=options, messages=messages, step_s=0.0)
    return dataclasses.replace(made, step_s=calibrate.simulated_s(TRUTH, made))


def measured(**changes):
    given = {
        "links": [link(0), link(1), link(-1)],
        "cores": 2,
        "blocks": {name: block(name) for name in SIZES},
        "exchanges": {"whole": exchange("whole", 1), "parts": exchange("parts", 4)},
    }
    return Measured(**{**given, **changes})


def fitted(**changes):
    return calibrate.fit(measured(exchanges={}, **changes))


# From figures to a network --------------------------------------------------------------------


def test_the_figures_of_a_known_network_give_it_back():
    found, expected = (
        {
            field.name: getattr(model, field.name)
            for field in dataclasses.fields(NetworkModel)
            if isinstance(getattr(TRUTH, field.name), float)
        }
        for model in (calibrate.fit(measured()), TRUTH)
    )
    assert len(found) == 13
    assert found == pytest.approx(expected, rel=0.05)


def test_its_links_are_alike_and_its_cores_shared():
    found = fitted()
    assert found.path == Path(latency_s=pytest.approx(1e-4), jitter_s=0.0)
    assert (found.overrides, found.nodes_bytes_per_s, found.slow) == ((), {}, {})
    assert found.cores == 2


def test_without_exchanges_codecs_take_nothing_for_a_message():
    found = fitted()
    assert (found.codec_message_s, found.wake_s) == (0.0, 0.0)


def test_a_jitter_that_matters_is_taken_off_the_latency():
    found = fitted(links=[link(jitter_s=0.02, round_trip_s=0.1, small_s=0.1, large_s=0.11)])
    assert found.path.jitter_s == pytest.approx(0.01)
    assert 2 * found.path.latency_s + found.path.jitter_s == pytest.approx(0.1, rel=0.01)


def test_far_nodes_have_links_of_their_own_the_furthest_last():
    far = [link(node, round_trip_s=trip_s) for node, trip_s in ((5, 0.2), (3, 0.05), (4, 0.1))]
    found = fitted(links=[link(0), link(1), link(2), link(6), *far])
    assert [override.between for override in found.overrides] == [(3,), (4,), (5,)]
    assert all(set(override.others) == set(range(7)) for override in found.overrides)
    assert found.overrides[-1].path.latency_s == pytest.approx(0.1, rel=0.01)


def test_slow_cards_and_slow_workers_are_named():
    slow = link(2, small_s=0.1, large_s=1.0)
    found = fitted(
        links=[link(0), link(1), slow],
        blocks={
            name: dataclasses.replace(one, compute_s={0: one.typical_s, 1: one.typical_s, 2: 0.1})
            for name in SIZES
            for one in [block(name)]
        },
    )
    assert found.nodes_bytes_per_s == {2: pytest.approx(1e7, rel=0.02)}
    assert found.slow == {2: pytest.approx(0.1 / block("whole").typical_s)}


def test_figures_that_noise_has_turned_round_give_a_network_nevertheless(tmp_path):
    blocks = {name: block(name) for name in SIZES}
    blocks["whole"], blocks["part"] = blocks["part"], blocks["whole"]
    blocks["whole"] = dataclasses.replace(blocks["whole"], samples=64)
    blocks["part"] = dataclasses.replace(blocks["part"], samples=8)
    odd = link(round_trip_s=1e-9, small_s=1e-3, large_s=0.0, large_cpu_s=0.0, small_cpu_s=0.0)
    path = tmp_path / "odd.toml"
    write_network(fitted(links=[odd], blocks=blocks), path)
    assert load_network(path).flops > 0


# The file's comments --------------------------------------------------------------------------


def test_comments_say_what_was_measured_and_what_was_not():
    text = "\n".join(calibrate.comments(measured(exchanges={}), ["a:1", "b:2", "c:3"]))
    assert "a:1 (node 0), tcp: round trip 0.24 ms, 1 MB 0.74 ms, 10 MB 5.24 ms, 50,000" in text
    assert "c:3 (node -1)" in text
    assert "Links between nodes were not measured" in text
    assert "share its cores" in text
    assert "One worker: what codecs take was not measured" in text


@pytest.mark.parametrize(
    ("hosts", "are_here"),
    [(["127.0.0.1", "127.0.0.2"], True), (["localhost", "::1"], True), (["127.0.0.1", "h"], False)],
)
def test_cores_are_shared_only_by_nodes_of_this_machine(hosts, are_here):
    targets = [Target(Address(host, 1)) for host in hosts]
    assert (calibrate.cores_shared(targets) is not None) == are_here


# Real nodes -----------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """Measure little: the figures themselves prove nothing here."""
    for name, count in {"ROUND_TRIPS": 20, "PIPELINED": 200, "BLOCK_STEPS": 12}.items():
        monkeypatch.setattr(calibrate, name, count)
    for name in ("SMALL_TRANSFERS", "LARGE_TRANSFERS"):
        monkeypatch.setattr(calibrate, name, 2)
    for name in ("_BLOCKS", "_EXCHANGES"):
        table = getattr(calibrate, name)
        few = {key: {**options, "max_steps": 8} for key, options in table.items()}
        monkeypatch.setattr(calibrate, name, few)


async def test_real_nodes_are_measured(cluster, tmp_path, short):
    said = []
    others = (Setting(("mode",), "async", "cluster.toml:9: [job] mode"),)
    two = Cluster(cluster.workers[:2], cluster.servers, others)
    found = await calibrate.measure(Site(two, tmp_path), said.append, rounds=1)
    assert [one.node for one in found.links] == [0, 1, -1]
    assert all(one.over == "unix" for one in found.links)
    assert all(0 < one.small_s < one.large_s for one in found.links)
    assert {name: one.size for name, one in found.blocks.items()} == SIZES
    assert {name: one.samples for name, one in found.blocks.items()} == SAMPLES
    assert {name: one.messages for name, one in found.exchanges.items()} == {
        "whole": 1,
        "parts": 4,
        "large": 1,
    }
    assert all(one.options["codec"] == "plain" for one in found.exchanges.values())
    assert len(calibrate.comments(found, calibrate.addresses(two))) == 14
    assert f"the link to {two.workers[0]}" in said
    assert not list(tmp_path.iterdir())


async def test_one_worker_exchanges_nothing(cluster, tmp_path, short):
    one = Cluster(cluster.workers[:1])
    found = await calibrate.measure(Site(one, tmp_path), lambda _: None, unix=False, rounds=1)
    assert (found.exchanges, found.links[0].over) == ({}, "tcp")


async def test_a_node_that_is_busy_is_not_measured(cluster, tmp_path, monkeypatch):
    async def ask(self, content):
        return {"job": "20260101-000000-other-0000", "cpu_s": 0.0}

    monkeypatch.setattr(calibrate.Prober, "ask", ask)
    with pytest.raises(ClusterError, match="is busy with job 20260101-000000-other-0000; wait"):
        await calibrate.measure(Site(cluster, tmp_path), lambda _: None)


async def test_a_node_that_does_not_answer_is_named(cluster, tmp_path, monkeypatch):
    async def late(*_):
        raise TimeoutError  # as asyncio.timeout does

    monkeypatch.setattr(calibrate, "_probe", late)
    with pytest.raises(ClusterError, match=f"{cluster.workers[0]}: to measure its link took over"):
        await calibrate.measure(Site(cluster, Folder(tmp_path)), lambda _: None)
