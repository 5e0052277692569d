"""Assignments: who computes which block."""

import math
from collections import Counter

import pytest

from aiosgd.errors import ConfigError
from aiosgd.plugins import assignments
from aiosgd.plugins.assignments import Duplicate, Iid


def test_iid_gives_each_subset_one_block_in_order():
    expected = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    assert Iid(None).owners(4, 2) == expected


def test_duplicate_groups_consecutive_workers():
    assert Duplicate(None).owners(6, 2) == ((0, 1), (2, 3), (4, 5))


@pytest.mark.parametrize("assignment", [Iid(None), Duplicate(None)])
@pytest.mark.parametrize("workers", [1, 2, 9])
def test_without_redundancy_block_i_is_worker_i(assignment, workers):
    assert assignment.owners(workers, 1) == tuple((i,) for i in range(workers))


@pytest.mark.parametrize("assignment", [Iid(None), Duplicate(None)])
def test_with_full_redundancy_everyone_owns_the_one_block(assignment):
    assert assignment.owners(5, 5) == ((0, 1, 2, 3, 4),)


@pytest.mark.parametrize(
    ("assignment", "blocks"),
    [(Iid(None), math.comb), (Duplicate(None), lambda n, r: n // r)],
)
@pytest.mark.parametrize("redundancy", [1, 2, 3, 4, 6, 12])
def test_work_is_equal_and_each_block_has_as_many_owners_as_asked(assignment, blocks, redundancy):
    owners = assignment.owners(12, redundancy)
    assert len(owners) == len(set(owners)) == blocks(12, redundancy)
    assert all(len(set(block)) == redundancy for block in owners)
    assert all(list(block) == sorted(block) for block in owners)
    loads = Counter(worker for block in owners for worker in block)
    assert set(loads) == set(range(12))
    assert len(set(loads.values())) == 1


@pytest.mark.parametrize("assignment", [Iid(None), Duplicate(None)])
@pytest.mark.parametrize(("workers", "redundancy"), [(3, 0), (3, -1), (3, 4), (0, 1)])
def test_impossible_redundancies_are_refused(assignment, workers, redundancy):
    with pytest.raises(ConfigError, match=f"redundancy is {redundancy} with {workers} workers"):
        assignment.owners(workers, redundancy)


def test_duplicate_needs_whole_groups():
    with pytest.raises(ConfigError, match=r"7 workers are no whole number of groups .* 2"):
        Duplicate(None).owners(7, 2)


def test_absurd_numbers_of_blocks_are_refused_before_they_are_made(monkeypatch):
    with pytest.raises(ConfigError, match=r"100 workers with redundancy 50 make \d{30} blocks"):
        Iid(None).owners(100, 50)
    with pytest.raises(ConfigError, match="100001 workers; expected at most 100000"):
        Duplicate(None).owners(100_001, 1)
    monkeypatch.setattr(assignments, "MAX_BLOCKS", 10)
    assert len(Iid(None).owners(5, 2)) == 10
    with pytest.raises(ConfigError, match="make 15 blocks; expected at most 10"):
        Iid(None).owners(6, 2)
