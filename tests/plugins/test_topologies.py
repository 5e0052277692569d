import numpy as np
import pytest

from aiosgd.errors import ConfigError
from aiosgd.plugins import topologies
from aiosgd.plugins.registry import make_params
from aiosgd.plugins.topologies import (
    Circulant,
    Edges,
    ErdosRenyi,
    Exponential,
    Full,
    Graph,
    Line,
    Linked,
    OnePeer,
    Regular,
    Ring,
    SmallWorld,
    Star,
    Torus,
    Tree,
)

ALL = {
    "full": (Full, {}),
    "ring": (Ring, {}),
    "ring, directed": (Ring, {"directed": True}),
    "line": (Line, {}),
    "star": (Star, {}),
    "torus": (Torus, {}),
    "exponential": (Exponential, {}),
    "one_peer": (OnePeer, {}),
    "regular": (Regular, {}),
    "regular, directed": (Regular, {"degree": 3, "directed": True}),
    "regular, dense": (Regular, {"degree": 6}),
    "erdos_renyi": (ErdosRenyi, {}),
    "erdos_renyi, directed": (ErdosRenyi, {"directed": True, "weights": "uniform"}),
    "small_world": (SmallWorld, {"probability": 0.5}),
    "tree": (Tree, {}),
    "tree, uniform": (Tree, {"children": 3, "weights": "uniform"}),
}
ANY_SIZE = [name for name in ALL if not name.startswith(("regular", "small_world"))]
DIRECTED = [
    "ring, directed",
    "exponential",
    "one_peer",
    "regular, directed",
    "erdos_renyi, directed",
]
ROWS_ONLY = ["erdos_renyi, directed", "tree, uniform"]


def make(kind, workers, seed=0, **params):
    return kind(make_params(kind, params, "topology")).graph(workers, seed)


def graph(name, workers, seed=0):
    kind, params = ALL[name]
    return make(kind, workers, seed, **params)


def links(graph, step=0):
    return {(i, j) for i in range(graph.workers) for j in graph.receivers(i, step)}


def matrix(graph, step=0):
    whole = np.zeros((graph.workers, graph.workers))
    for i in range(graph.workers):
        for j, weight in graph.weights(i, step).items():
            whole[i, j] = weight
    return whole


def gap(graph):
    """Return the spectral gap by its definition, without anything that the graph does for it."""
    product = np.eye(graph.workers)
    for step in range(graph.period):
        product = matrix(graph, step) @ product
    return 1 - sorted(np.abs(np.linalg.eigvals(product)))[-2] ** (1 / graph.period)


# every topology -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [8, 12, 13])
@pytest.mark.parametrize("name", ALL)
def test_who_sends_is_who_is_heard(name, workers):
    one = graph(name, workers)
    assert (links(one) == {(j, i) for i, j in links(one)}) is (name not in DIRECTED)
    for step in range(2 * one.period):
        heard = {(j, i) for i in range(workers) for j in one.weights(i, step) if i != j}
        assert heard == links(one, step)
        for i in range(workers):
            assert list(one.receivers(i, step)) == sorted({*one.receivers(i, step)} - {i})
            assert list(one.weights(i, step)) == sorted(one.weights(i, step))
            assert i in one.weights(i, step)


@pytest.mark.parametrize("workers", [8, 12, 13])
@pytest.mark.parametrize("name", ALL)
def test_rows_add_up_to_one_and_columns_where_the_average_is_kept(name, workers):
    one = graph(name, workers)
    assert one.is_doubly_stochastic is (name not in ROWS_ONLY)
    for step in range(one.period):
        whole = matrix(one, step)
        assert whole.min() == 0 or name == "full"
        assert (whole.diagonal() > 0).all()
        np.testing.assert_allclose(whole.sum(axis=1), 1)
        if one.is_doubly_stochastic:
            np.testing.assert_allclose(whole.sum(axis=0), 1)


@pytest.mark.parametrize("workers", [8, 12, 13])
@pytest.mark.parametrize("name", ALL)
def test_each_worker_is_reached_from_each(name, workers):
    one = graph(name, workers)
    reach = np.linalg.matrix_power(sum(matrix(one, s) > 0 for s in range(one.period)), workers)
    assert (reach > 0).all()


@pytest.mark.parametrize("workers", [8, 12, 13])
@pytest.mark.parametrize("name", ALL)
def test_the_spectral_gap_is_one_less_the_second_eigenvalue(name, workers):
    one = graph(name, workers)
    assert one.spectral_gap == pytest.approx(gap(one), abs=1e-2 if name == "one_peer" else 1e-9)
    assert one.spectral_gap > 0


@pytest.mark.parametrize("name", ANY_SIZE)
def test_one_worker_is_alone_and_two_are_a_pair(name):
    alone, pair = graph(name, 1), graph(name, 2)
    assert (alone.receivers(0), dict(alone.weights(0)), alone.spectral_gap) == ((), {0: 1.0}, 1.0)
    assert links(pair) == {(0, 1), (1, 0)}
    assert pair.spectral_gap == pytest.approx(1)
    assert pair.weights(1) == {0: 0.5, 1: 0.5}


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_gives_the_same_graph_and_only_random_ones_have_others(name):
    one, again, other = graph(name, 12, 1), graph(name, 12, 1), graph(name, 12, 2)
    assert links(one) == links(again)
    is_random = name.startswith(("regular", "erdos_renyi", "small_world"))
    assert (links(one) != links(other)) is is_random


# each by its definition -----------------------------------------------------------------------


def test_who_sends_to_whom():
    assert graph("full", 5).receivers(2) == (0, 1, 3, 4)
    assert graph("ring", 6).receivers(0) == (1, 5)
    assert graph("ring, directed", 6).receivers(5) == (0,)
    assert [graph("line", 4).receivers(i) for i in range(4)] == [(1,), (0, 2), (1, 3), (2,)]
    assert [graph("star", 4).receivers(i) for i in range(3)] == [(1, 2, 3), (0,), (0,)]
    assert graph("torus", 12).receivers(0) == (1, 3, 4, 8)  # 3 rows of 4
    assert graph("torus", 7).receivers(0) == (1, 6)
    assert make(Torus, 12, rows=2).receivers(0) == (1, 5, 6)
    assert graph("exponential", 6).receivers(5) == (0, 1, 3)
    assert list(graph("exponential", 6).weights(0)) == [0, 2, 4, 5]
    assert [graph("one_peer", 6).receivers(0, step) for step in range(4)] == [
        (1,),
        (2,),
        (4,),
        (1,),
    ]
    assert [graph("tree", 7).receivers(i) for i in (0, 1, 6)] == [(1, 2), (0, 3, 4), (2,)]
    assert make(Tree, 7, children=3).receivers(1) == (0, 4, 5, 6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("degree", "workers", "directed"),
    [(1, 2, False), (2, 7, False), (3, 4, False), (3, 20, False), (4, 9, False), (8, 10, False),
     (9, 10, False), (27, 30, False), (1, 5, True), (3, 5, True), (7, 9, True)],
)  # fmt: skip
def test_a_regular_graph_has_one_degree(degree, workers, directed, seed):
    one = make(Regular, workers, seed, degree=degree, directed=directed)
    assert {len(one.receivers(i)) for i in range(workers)} == {degree}
    assert {weight for i in range(workers) for weight in one.weights(i).values()} == {
        1 / (degree + 1)
    }
    back = {(j, i) for i, j in links(one)}
    assert directed or back == links(one)


def test_random_links_are_as_frequent_as_asked():
    counts = [len(links(make(ErdosRenyi, 40, seed, probability=0.3))) for seed in range(40)]
    assert np.mean(counts) == pytest.approx(2 * 780 * 0.3, rel=0.03)  # 1 % is one deviation
    options = {"probability": 0.2, "directed": True, "weights": "uniform"}
    drawn = [links(make(ErdosRenyi, 30, seed, **options)) for seed in range(40)]
    assert np.mean([len(one) for one in drawn]) == pytest.approx(870 * 0.2, rel=0.04)
    assert len({pair for one in drawn for pair in one}) == 870
    assert len(links(make(ErdosRenyi, 30, probability=1.0))) == 870


@pytest.mark.parametrize("workers", [2, 3, 10, 3000])
def test_numbers_of_pairs_count_each_pair_once(workers):
    count = workers * (workers - 1) // 2
    numbers = np.unique(np.linspace(0, count - 1, 2000).astype(np.int64))
    i, j = topologies._pairs(numbers).T
    assert ((i >= 0) & (i < j) & (j < workers)).all()
    np.testing.assert_array_equal(j * (j - 1) // 2 + i, numbers)


def test_a_small_world_is_a_ring_with_some_links_led_elsewhere():
    ring = Circulant(30, (1, 2, -1, -2))
    assert links(make(SmallWorld, 30, probability=0.0)) == links(ring)
    moved = []
    for seed in range(20):
        one = links(make(SmallWorld, 30, seed, probability=0.25))
        assert len(one) == 120
        moved.append(len(links(ring) - one) / 120)
    assert np.mean(moved) == pytest.approx(0.25, abs=0.06)  # few come back to where they were
    whole = make(SmallWorld, 5, probability=1.0)
    assert len(links(whole)) == 20


def test_metropolis_and_uniform_weights():
    star, uniform = make(Star, 4), make(Star, 4, weights="uniform")
    np.testing.assert_allclose([*star.weights(0).values()], [1 / 4] * 4)
    np.testing.assert_allclose([*star.weights(1).values()], [1 / 4, 3 / 4])
    assert dict(uniform.weights(1)) == {0: 0.5, 1: 0.5}
    line = matrix(make(Line, 3))
    np.testing.assert_allclose(line, np.array([[2, 1, 0], [1, 1, 1], [0, 1, 2]]) / 3)


# gaps that are known --------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [4, 6, 9, 16])
def test_known_gaps(workers):
    rounds = (workers - 1).bit_length()
    angle = 2 * np.pi / workers
    ring = max(abs(1 + 2 * np.cos(angle * k)) for k in range(1, workers)) / 3
    assert graph("ring", workers).spectral_gap == pytest.approx(1 - ring)
    assert graph("full", workers).spectral_gap == pytest.approx(1)
    if workers % 2 == 0:
        assert graph("exponential", workers).spectral_gap == pytest.approx(2 / (rounds + 1))
    assert graph("star", workers).spectral_gap == pytest.approx(1 / workers)
    line = (1 + 2 * np.cos(np.pi / workers)) / 3
    assert graph("line", workers).spectral_gap == pytest.approx(1 - line)


@pytest.mark.parametrize("workers", [2, 4, 8, 64])
def test_one_peer_after_another_gives_the_exact_average_of_a_power_of_two(workers):
    assert graph("one_peer", workers).spectral_gap == 1


def test_large_graphs_cost_what_their_links_cost():
    ring, peers = graph("ring", 100_000), graph("one_peer", 10_000)
    assert ring.spectral_gap * 100_000**2 == pytest.approx(13, rel=0.02)
    assert len(graph("exponential", 10_000).receivers(7)) == len(set(range(peers.period))) == 14
    assert peers.receivers(9_999, 13) == (8191,)
    assert graph("full", 100_000).receivers(0)[-1] == 99_999
    assert graph("torus", 2500).receivers(0) == (1, 49, 50, 2450)


def test_the_gap_of_many_workers_is_about_that_of_the_whole_matrix(monkeypatch):
    for name in ("star", "regular, directed", "regular"):
        one, same = graph(name, 60, 3), graph(name, 60, 3)
        whole = one.spectral_gap
        monkeypatch.setattr(topologies, "DENSE", 50)
        assert same.spectral_gap == pytest.approx(whole, rel=0.1)
        monkeypatch.undo()


class InTurn(Graph):
    """A star in even steps, a directed ring in odd ones."""

    def __init__(self, workers):
        super().__init__(workers, period=2)
        self.turns = graph("star", workers), graph("ring, directed", workers)

    def receivers(self, worker, step=0):
        return self.turns[step % 2].receivers(worker)

    def weights(self, worker, step=0):
        return self.turns[step % 2].weights(worker)


def test_the_gap_of_links_that_change_is_per_step(monkeypatch):
    one, same = InTurn(60), InTurn(60)
    assert one.is_doubly_stochastic
    assert one.spectral_gap == pytest.approx(gap(one))
    monkeypatch.setattr(topologies, "DENSE", 50)
    assert same.spectral_gap == pytest.approx(gap(one), rel=0.1)


def test_a_gap_that_is_too_small_for_many_workers_is_not_made_up(monkeypatch):
    monkeypatch.setattr(topologies, "DENSE", 50)
    assert graph("line", 400).spectral_gap is None


# links of one's own ---------------------------------------------------------------------------


def test_links_come_from_a_file(tmp_path):
    path = tmp_path / "links.txt"
    path.write_text("# a square\n0 1\n1,2 # to the right\n\n2\t3\n3 , 0\n")
    ring = make(Edges, 4, file=str(path))
    assert links(ring) == links(graph("ring", 4))
    one_way = make(Edges, 4, file=str(path), directed=True)
    assert links(one_way) == links(graph("ring, directed", 4))


def test_portable_parameters_have_the_links_of_the_file(tmp_path):
    path = tmp_path / "links.txt"
    path.write_text("0 1\n1 2\n")
    topology = Edges(make_params(Edges, {"file": str(path), "weights": "uniform"}, "topology"))
    portable = topology.portable()
    path.unlink()
    assert (portable.file, portable.weights) == ("", "uniform")
    assert links(Edges(portable).graph(3, 0)) == links(graph("line", 3))
    assert Ring(None).portable() is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 1\n1 2 3\n", "links.txt:2 is '1 2 3'; expected two ids of workers"),
        ("0 1\n\n-1 0\n", "links.txt:3 is '-1 0'; expected two ids"),
        ("0 a", "links.txt:1 is '0 a'; expected two ids"),
        ("# none\n", "links.txt has no links; expected two ids in each line"),
        ("0 1\n1 4\n", "the link 1 4 names a worker that is not there; expected 0..3"),
        ("0 1\n2 3\n", "no way leads from worker 0 to worker 2; expected one from each to each"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    (tmp_path / "links.txt").write_text(text)
    with pytest.raises(ConfigError) as caught:
        make(Edges, 4, file=str(tmp_path / "links.txt"))
    assert message in str(caught.value)
    assert str(caught.value).startswith("topology edges: ")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"topology edges: .*nothing.txt cannot be read"):
        make(Edges, 4, file=str(tmp_path / "nothing.txt"))


# what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "workers", "params", "message"),
    [
        (Regular, 5, {"degree": 3}, "degree is 3 with 5 workers; expected at most 4, and degree"),
        (Regular, 4, {"degree": 4}, "degree is 4 with 4 workers; expected at most 3"),
        (Regular, 30, {"degree": 1}, "of 100 graphs of 30 workers none was connected"),
        (Regular, 5, {"degree": 0}, "topology: degree is 0; expected 1 or more"),
        (SmallWorld, 4, {}, "degree is 4 with 4 workers; expected at most 3"),
        (SmallWorld, 9, {"degree": 3}, "topology: degree is 3; expected an even number"),
        (SmallWorld, 9, {"probability": 1.5}, "topology: probability is 1.5; expected 0..1"),
        (ErdosRenyi, 50, {"probability": 0.001}, "expected a probability above 0.001"),
        (ErdosRenyi, 9, {"probability": -1.0}, "topology: probability is -1; expected 0..1"),
        (ErdosRenyi, 9, {"directed": True}, "weights 'metropolis' need undirected links"),
        (Torus, 10, {"rows": 3}, "10 workers are no whole number of columns in 3 rows"),
        (Torus, 10, {"rows": -1}, "topology: rows is -1; expected 0 or more"),
        (Tree, 10, {"children": 0}, "topology: children is 0; expected 1 or more"),
        (Star, 10, {"weights": "half"}, "topology.weights is 'half'; expected one of"),
        (Edges, 2, {}, "topology: expected one of file and links"),
        (Edges, 2, {"file": "a", "links": [[0, 1]]}, "topology: expected one of file and links"),
        (Edges, 2, {"links": [[0, 1, 2]]}, "expected a list of 2 values"),
        (Edges, 3, {"links": [[0, 1], [1, 2]], "directed": True}, "from worker 1 to worker 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(kind, workers, params, message):
    with pytest.raises(ConfigError) as caught:
        make(kind, workers, **params)
    assert message in str(caught.value)


def test_metropolis_weights_need_balance():
    rows = [{1}, {2, 0}, {0}]  # connected, but worker 0 hears from two and sends to one
    assert not Linked("own", rows, "uniform").is_doubly_stochastic
    with pytest.raises(ConfigError, match="topology own: weights 'metropolis' need"):
        Linked("own", rows)
