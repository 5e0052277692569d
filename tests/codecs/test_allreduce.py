import asyncio
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosgd.codecs.allreduce import AllReduce, Hierarchical, doubling, ring
from aiosgd.codecs.base import Block
from aiosgd.codecs.plain import Plain
from aiosgd.codecs.testing import LocalCluster
from aiosgd.errors import ConfigError

ITEM = 4  # bytes of a float32
PART = 64  # bytes: 16 elements
CODECS = [AllReduce, Hierarchical]
COUNTS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16]
RING, SMALL = {"part": PART, "small": 0}, {"part": 4 * PART, "small": 1 << 20}


def values_of(size):
    """Return a feed of vectors whose sum in another order has other bits."""
    return lambda step, block: (
        np.random.default_rng([step, block]).normal(size=size) * 10.0 ** (block % 5 - 4)
    ).astype(np.float32)


def check(cluster, size, steps=3):
    """Check the results of all steps: the mean of all blocks, with the same bits everywhere."""
    feed, blocks = values_of(size), cluster.codecs[0].ctx.block_count
    for step, results in enumerate(cluster.results[-steps:]):
        assert len({result.tobytes() for result in results.values()}) == 1
        exact = np.mean([feed(step, block).astype(float) for block in range(blocks)], axis=0)
        np.testing.assert_allclose(results[0], exact, atol=1e-6)
    assert cluster.late == 0


def is_at_rest(codec):
    return not (codec.parts or codec.values or codec.arrived or hasattr(codec, "result"))


async def run(codec, workers, size, steps=3, **facts):
    cluster = LocalCluster(codec, workers=workers, initial=np.zeros(size), **facts)
    await cluster.run(values_of(size), steps)
    check(cluster, size, steps)
    assert all(map(is_at_rest, cluster.codecs.values()))
    return cluster


def traffic(cluster, steps=1):
    """Return per sender (messages, elements) of one step; every step has the same."""
    messages, elements = Counter(), Counter()
    for one in cluster.sent:
        messages[one.sender] += 1
        elements[one.sender] += one.content["value"].size
    return {node: (messages[node] / steps, elements[node] / steps) for node in cluster.workers}


@pytest.mark.proof
@pytest.mark.parametrize("params", [RING, SMALL])
@pytest.mark.parametrize("workers", COUNTS)
@pytest.mark.parametrize("codec", CODECS)
async def test_the_result_is_the_mean_whatever_the_size(codec, workers, params):
    round_ = workers * PART // ITEM  # elements of one part for each worker
    sizes = {0, 1, 2, 3, workers - 1, workers, workers + 1, round_ - 1, round_, round_ + 1}
    steps = 3 if workers < 8 else 1
    for seed, size in enumerate(sorted(sizes)):
        await run(codec, workers, size, steps, seed=seed, params=params)


@pytest.mark.proof
@pytest.mark.parametrize("fifo", [True, False])
@pytest.mark.parametrize("params", [RING, SMALL])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seed", range(10))
async def test_the_bits_do_not_depend_on_the_order(codec, seed, params, fifo):
    for workers in (2, 5, 6):
        reference = await run(codec, workers, 99, 2, seed=1000, params=params)
        cluster = await run(codec, workers, 99, 2, seed=seed, params=params, fifo=fifo)
        for ours, theirs in zip(cluster.results, reference.results, strict=True):
            assert ours[0].tobytes() == theirs[0].tobytes()


@st.composite
def ownerships(draw):
    """Draw who computes which block: several blocks, one or none, alone or together."""
    workers = draw(st.integers(1, 9))
    owner = st.sets(st.integers(0, workers - 1), min_size=1, max_size=3).map(sorted)
    return workers, draw(st.lists(owner, min_size=1, max_size=7))


@pytest.mark.proof
@settings(deadline=None, max_examples=150)
@given(
    ownership=ownerships(),
    size=st.integers(0, 150),
    part=st.integers(ITEM, 200),
    small=st.sampled_from([0, 1 << 20]),
    group_size=st.integers(-1, 10),
    seed=st.integers(0, 99),
    fifo=st.booleans(),
)
def test_any_ownership_any_size_any_parts(ownership, size, part, small, group_size, seed, fifo):
    workers, owners = ownership
    codec, params = AllReduce, {"part": part, "small": small}
    if group_size >= 0:
        codec, params["group_size"] = Hierarchical, group_size
    facts = {"owners": owners, "params": params, "seed": seed, "fifo": fifo}
    asyncio.run(run(codec, workers, size, **facts))


@pytest.mark.parametrize("redundancy", [2, 3])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seed", range(10))
async def test_a_redundant_block_counts_once(codec, seed, redundancy):
    for params in (RING, SMALL):
        await run(codec, 4, 100, seed=seed, redundancy=redundancy, params=params)


@pytest.mark.parametrize("codec", CODECS)
async def test_of_several_copies_the_first_owner_s_counts(codec):
    cluster = LocalCluster(codec, workers=3, redundancy=2)  # blocks 01, 02, 12
    results = await cluster.step({0: {0: 1.0, 1: 2.0}, 1: {0: 50.0, 2: 6.0}, 2: {1: 60.0, 2: 70.0}})
    assert results == {worker: [3.0] for worker in range(3)}


@pytest.mark.parametrize("codec", CODECS)
async def test_nobody_waits_for_a_worker_that_is_first_owner_of_nothing(codec):
    cluster = LocalCluster(codec, workers=3, redundancy=2, initial=[0.0])
    results = await cluster.step({0: {0: 1.0, 1: 2.0}, 1: {0: 1.0, 2: 6.0}, 2: None})
    assert results == {worker: [3.0] for worker in range(3)}


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
async def test_several_blocks_are_added_in_the_order_of_their_ids(workers):
    owners = [(block % workers,) for block in range(3 * workers)]
    for params in (RING, SMALL):
        await run(AllReduce, workers, 77, owners=owners, params=params)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_the_order_of_their_ids_decides_and_not_that_of_their_coming(order):
    codec = LocalCluster(AllReduce, workers=1, owners=[(0,)] * 3, initial=[0.0]).codecs[0]
    for block in order:
        await codec.update(Block(block, 0, np.float32([[1e8, 1.0, -1e8][block]]), 1))
    assert codec.take_result() == [0.0]  # 1e8 + 1 is 1e8, and the exact mean is 1/3


@pytest.mark.parametrize("codec", CODECS)
async def test_equals_plain_where_sums_are_exact(codec):
    def whole(step, block):
        return np.arange(50) * (block + 1) - 7 * step

    for params in (RING, SMALL):
        ours = await LocalCluster(codec, workers=5, params=params).run(whole, steps=2)
        plain = await LocalCluster(Plain, workers=5).run(whole, steps=2)
        for one, other in zip(ours, plain, strict=True):
            assert one[0].tobytes() == other[0].tobytes()


@pytest.mark.parametrize("exchange", ["gradients", "updates", "weights"])
async def test_the_mean_of_anything_is_the_mean(exchange):
    await run(AllReduce, 3, 40, exchange=exchange, params=RING)


def test_it_is_for_sync_mode_and_does_not_compress():
    for codec in CODECS:
        assert codec.modes == ("sync",)
        assert not codec.compresses
        assert codec.laws == {"mean", "consensus"}


# what it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("workers", [2, 3, 4, 5, 9])
async def test_the_ring_sends_the_least_that_is_possible(workers, rounds):
    parts, size = workers * rounds, workers * rounds * PART // ITEM
    cluster = await run(AllReduce, workers, size, steps=2, params=RING)
    share = 2 * (workers - 1) / workers
    assert set(traffic(cluster, 2).values()) == {(share * parts, share * size)}
    assert {one.to - one.sender for one in cluster.sent} == {1, 1 - workers}  # to the right only


@pytest.mark.parametrize("params", [RING, SMALL])
async def test_two_workers_send_the_vector_once_at_any_size(params):
    cluster = await run(AllReduce, 2, 96, steps=2, params=params)
    assert {size for _, size in traffic(cluster, 2).values()} == {96}


@pytest.mark.parametrize(("workers", "rounds"), [(2, 1), (4, 2), (8, 3), (16, 4)])
async def test_doubling_sends_log_n_messages(workers, rounds):
    cluster = await run(AllReduce, workers, 10, params=SMALL)
    assert set(traffic(cluster, 3).values()) == {(rounds, rounds * 10)}


@pytest.mark.parametrize("workers", [3, 5, 6, 7, 9])
async def test_doubling_folds_those_beyond_the_power_of_two(workers):
    cluster = await run(AllReduce, workers, 10, params=SMALL)
    rounds = int(math.log2(workers))
    extra = workers - 2**rounds
    sent = [messages for messages, _ in traffic(cluster, 3).values()]
    assert sent == [rounds + 1] * extra + [rounds] * (2**rounds - extra) + [1] * extra


@pytest.mark.parametrize("codec", CODECS)
async def test_one_worker_sends_nothing(codec):
    cluster = await run(codec, 1, 100, params=RING)
    assert cluster.sent == []


@pytest.mark.parametrize("small", [399, 400])
async def test_the_threshold_is_in_bytes(small):
    cluster = await run(AllReduce, 4, 100, params={"part": 1 << 20, "small": small}, steps=1)
    assert traffic(cluster)[0] == ((2, 200) if small == 400 else (6, 150))


@pytest.mark.parametrize(("workers", "group_size"), [(4, 2), (9, 3), (8, 4), (6, 2), (6, 6)])
async def test_a_hierarchy_s_traffic(workers, group_size):
    groups = workers // group_size
    parts = 1 if groups == 1 else groups * 2
    size = parts * PART // ITEM
    params = {**RING, "group_size": group_size}
    cluster = await run(Hierarchical, workers, size, params=params, steps=1)
    parts = math.ceil(size * ITEM / PART)
    shares = (group_size - 1) * groups + 2 * (groups - 1)  # in units of 1 / groups
    leads = (shares * parts / groups, shares * size / groups)
    for node, found in traffic(cluster).items():
        assert found == ((parts, size) if node % group_size else leads)
    between = [one for one in cluster.sent if one.sender // group_size != one.to // group_size]
    assert all(one.sender % group_size == one.to % group_size == 0 for one in between)
    assert sum(one.content["value"].size for one in between) == 2 * (groups - 1) * size


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7, 8, 9, 15, 16])
async def test_groups_have_about_root_n_workers_unless_told_otherwise(workers):
    codec = LocalCluster(Hierarchical, workers=workers).codecs[0]
    assert {len(group) for group in codec.groups(0)[:-1]} <= {math.isqrt(workers)}
    assert [*itertools.chain(*codec.groups(0))] == [*range(workers)]


def test_a_worker_that_contributes_nothing_joins_the_group_next_to_it():
    owners = [(1, 2), (4, 5), (6, 7), (7, 0)]  # 0, 2, 3, 5 and 8 are first owners of nothing
    hierarchy = LocalCluster(Hierarchical, workers=9, owners=owners, params={"group_size": 2})
    assert hierarchy.codecs[0].groups(0) == [[1, 4, 0, 2, 3, 5], [6, 7, 8]]
    flat = LocalCluster(AllReduce, workers=4, owners=[(0, 1), (2, 3)])
    assert flat.codecs[0].groups(0) == [[0, 1], [2, 3]]


def test_a_leader_adds_its_members_by_id_and_then_what_comes_from_other_groups():
    params = {"small": 0, "group_size": 3}
    leader = LocalCluster(Hierarchical, workers=9, params=params).codecs[3]
    adds, takes = leader.plan(400)[0]
    assert (adds.sources, adds.to) == ((4, 5, 0), (6,))
    assert (takes.sources, takes.to) == ((0,), (4, 5))


async def test_groups_of_one_are_an_all_reduce():
    for params in (RING, SMALL):
        ours = await run(Hierarchical, 4, 100, params={**params, "group_size": 1})
        theirs = await run(AllReduce, 4, 100, params=params)
        assert ours.results[-1][0].tobytes() == theirs.results[-1][0].tobytes()


# the pipeline ---------------------------------------------------------------------------------


async def handed_in(codec, workers, params=RING, size=None):
    """Return a cluster in which all workers have handed in their blocks; nothing has arrived."""
    size = size or workers * PART // ITEM * 2
    cluster = LocalCluster(codec, workers=workers, initial=np.zeros(size), params=params)
    feed = values_of(size)
    cluster.begin({worker: feed(0, worker) for worker in range(workers)})
    for worker in range(workers):
        await cluster.deliver(None, worker)
    return cluster


async def test_a_part_is_passed_on_the_moment_it_arrives():
    cluster = await handed_in(AllReduce, 3)
    under_way = len(cluster.sent)
    for hop, (sender, to) in enumerate([(0, 1), (1, 2), (2, 0), (0, 1)]):
        for _ in range(2 if hop in (1, 2) else 1):  # behind one part of the sender's own
            await cluster.deliver(sender, to)
        latest = cluster.sent[-1]
        if hop < 3:
            assert (latest.sender, latest.to) == (to, (to + 1) % 3)
    assert len(cluster.sent) > under_way
    assert cluster.pending
    assert not cluster.results[0]


async def test_a_leader_passes_a_part_on_while_others_are_missing():
    cluster = await handed_in(Hierarchical, 4, {**RING, "group_size": 4})
    before = len(cluster.sent)
    for member in (3, 1, 2):
        assert len(cluster.sent) == before
        await cluster.deliver(member, 0)
    after = cluster.sent[before:]
    assert [(one.sender, one.to, one.content["part"]) for one in after] == [
        (0, member, 0) for member in (1, 2, 3)
    ]
    assert not cluster.results[0]


@pytest.mark.parametrize("codec", CODECS)
async def test_what_comes_before_the_own_update_is_kept(codec):
    cluster = LocalCluster(codec, workers=4, params=RING)
    feed = values_of(100)
    cluster.begin({worker: feed(0, worker) for worker in range(4)})
    for worker in (0, 2, 3):
        await cluster.deliver(None, worker)
    while [link for link in cluster.pending if link[0] is not None]:
        await cluster.deliver(*next(link for link in cluster.pending if link[0] is not None))
    assert cluster.pending == [(None, 1)]
    await cluster.finish()
    check(cluster, 100, steps=1)


async def test_a_block_leaves_without_a_copy():
    cluster = LocalCluster(AllReduce, workers=2, params=RING, initial=np.zeros(100))
    block = Block(0, 0, np.zeros(100, np.float32), 1)
    sends = await cluster.codecs[0].update(block)
    assert len(sends) == 4  # the other half of the parts begins at the other worker
    assert all(np.shares_memory(one.content["value"], block.value) for one in sends)


@pytest.mark.parametrize("codec", CODECS)
async def test_all_memory_is_the_node_s_and_never_much_more_than_the_result(codec):
    taken = []

    def memory(size):
        taken.append(np.zeros(size, np.uint8))
        return taken[-1]

    cluster = await run(codec, 5, 1000, params=RING, steps=1, memory=memory)
    for result in cluster.results[0].values():
        assert sum(np.shares_memory(result, piece) for piece in taken) == 1
    sizes = Counter(piece.size for piece in taken)
    assert sizes.pop(4000) == 5
    assert max(sizes) <= PART


# the schedules --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 10))
def test_in_a_ring_one_node_finishes_each_part_and_the_parts_take_turns(count):
    nodes = [10 * i for i in range(count)]
    for part in range(count):
        kinds = [[stage.kind for stage in ring(nodes, place, part)] for place in range(count)]
        finishing = [place for place in range(count) if kinds[place] == ["finish"]]
        assert finishing == [(part - 1) % count]
        assert kinds.count(["add", "take"]) == count - 1


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_in_doubling_partners_wait_for_each_other(count):
    stages = [doubling(range(count), place) for place in range(count)]
    for place, number in itertools.product(range(count), range(count.bit_length() - 1)):
        (partner,) = stages[place][number].to
        assert stages[partner][number].to == (place,)
        assert stages[place][number + 1].sources == (partner,)


# parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "params", "message"),
    [
        (AllReduce, {"part": 3}, "part is 3; expected 4 bytes or more"),
        (AllReduce, {"small": -1}, "small is -1; expected 0 bytes or more"),
        (Hierarchical, {"group_size": -1}, "group_size is -1; expected 0"),
        (Hierarchical, {"part": 0}, "part is 0; expected 4 bytes or more"),
    ],
)
def test_parameters_are_checked(codec, params, message):
    with pytest.raises(ConfigError, match=message):
        LocalCluster(codec, params=params)
