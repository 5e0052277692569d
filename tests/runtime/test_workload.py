import dataclasses
import hashlib
import sys
import traceback

import numpy as np
import pytest

from aiosgd.codecs.base import Codec
from aiosgd.codecs.fedavg import FedAvg, FedAvgServer
from aiosgd.codecs.parameter_server import ParameterServer, Server
from aiosgd.codecs.plain import Plain
from aiosgd.errors import CodecError, ConfigError, PluginLoadError, PluginNotFoundError
from aiosgd.plugins.code import is_file
from aiosgd.plugins.datasets import Data, Synthetic
from aiosgd.plugins.registry import make_params
from aiosgd.plugins.topologies import Regular
from aiosgd.runtime import workload
from aiosgd.runtime.config import JobConfig, make_job
from tests.runtime.memory_transport import load_small

SOURCE = """
from __future__ import annotations

from dataclasses import dataclass

from aiosgd import Codec


@dataclass(frozen=True)
class Settings:
    turn: int = 7


class Mine(Codec):
    Params = Settings

    async def update(self, block):
        self.set_result(block.value)


class Other(Mine):
    pass


text = "no class"
"""


@pytest.fixture
def write(tmp_path):
    """Write a module and return its path; whatever it imports as is forgotten afterwards."""
    before = set(sys.modules)

    def write(source, name="codec.py"):
        path = tmp_path / name
        path.write_text(source)
        return path

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refusal(options, workers=2):
    with pytest.raises(ConfigError) as caught:
        load_small(options, workers)
    return str(caught.value)


# checks ---------------------------------------------------------------------------------------


def test_a_mode_that_the_codec_is_not_made_for_is_refused():
    assert refusal({"codec": "fedavg", "mode": "async"}) == (
        "codec 'fedavg' is not made for mode 'async'; it has: sync"
    )


@pytest.mark.parametrize(
    ("codec", "exchange", "own"),
    [("parameter_server", "gradients", "updates"), ("fedavg", "updates", "weights")],
)
def test_an_exchange_that_a_codec_cannot_do_is_refused(codec, exchange, own):
    assert refusal({"codec": codec, "exchange": exchange}) == (
        f"codec {codec!r} cannot exchange {exchange!r}; it exchanges {own!r}"
    )


def test_a_mode_that_the_server_half_is_not_made_for_is_refused(write):
    class OnlySync(Server):
        modes = ("sync",)

    job = JobConfig(codec="parameter_server", mode="async")
    workload._check_codec(job, workload.Codecs(codec=ParameterServer, server_codec=Server))
    with pytest.raises(ConfigError) as caught:
        workload._check_codec(job, workload.Codecs(codec=ParameterServer, server_codec=OnlySync))
    expected = "server codec 'OnlySync' is not made for mode 'async'; it has: sync"
    assert str(caught.value) == expected
    path = write("from aiosgd.codecs.fedavg import FedAvgServer as Half")
    options = {"codec": "parameter_server", "mode": "async", "server_codec": f"{path}:Half"}
    assert refusal(options).startswith(f"server codec '{path}:Half' is not made for mode 'async'")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "exchange = 'gradient'",
            "exchange is 'gradient'; expected 'gradients' or 'updates' or 'weights'",
        ),
        ("exchange = ['weights']", "exchange is ['weights']; expected 'gradients' or"),
        ("modes = 'sync'", "modes is 'sync'; expected a tuple of 'sync' and 'async'"),
        ("modes = ('sync', 'asynch')", "modes is ('sync', 'asynch'); expected a tuple of"),
        ("modes = ()", "modes is (); expected a tuple of"),
        ("modes = None", "modes is None; expected a tuple of"),
        ("modes = 3", "modes is 3; expected a tuple of"),
    ],
)
def test_class_attributes_that_no_job_could_honour_are_refused(write, line, message):
    path = write(f"from aiosgd.codecs.plain import Plain\nclass Mine(Plain):\n    {line}\n")
    for options in ({"codec": f"{path}:Mine"}, {"codec": "fedavg", "server_codec": f"{path}:Mine"}):
        with pytest.raises(PluginLoadError) as caught:
            load_small(options)
        assert str(caught.value).startswith(f"codec '{path}:Mine': {message}")


def test_the_class_of_a_codec_s_own_server_half_is_checked_too():
    class Half(Codec):
        modes = ("synch",)

    codecs = workload.Codecs(codec=ParameterServer, server_codec=Half)
    with pytest.raises(PluginLoadError, match=r"^codec 'Half': modes is \('synch',\)"):
        workload._check_codec(JobConfig(codec="parameter_server"), codecs)


def test_a_compressor_without_effect_is_refused():
    assert refusal({"codec": "local", "compressor": "fp16"}) == (
        "compressor 'fp16' has no effect: codec 'local' compresses nothing"
    )
    made = load_small({"codec": "plain", "compressor": "fp16"}).compressor(np.random.default_rng(0))
    assert type(made).__name__ == "Fp16"
    assert load_small({"codec": "local", "compressor": "none"})


def test_a_compressor_may_be_for_the_server_half_alone():
    class Half(Codec):
        compresses = True

    class Whole(Plain):
        compresses = False

    job = JobConfig(compressor="fp16")
    workload._check_codec(job, workload.Codecs(codec=Whole, server_codec=Half))
    with pytest.raises(ConfigError, match="has no effect"):
        workload._check_codec(job, workload.Codecs(codec=Whole, server_codec=FedAvgServer))


def test_a_topology_without_effect_is_refused():
    assert refusal({"codec": "plain", "topology": "ring"}) == (
        "topology 'ring' has no effect: codec 'plain' uses none"
    )
    assert refusal({"codec": "dpsgd", "topology_params": {"degree": 4}}) == (
        "topology.degree: Full has no such parameter; it has: none"
    )
    with pytest.raises(PluginNotFoundError, match="no topology is named 'nonesuch'"):
        load_small({"codec": "dpsgd", "topology": "nonesuch"})


def test_overlap_is_refused_where_it_makes_no_sense():
    assert refusal({"overlap": True, "mode": "async"}) == (
        "overlap is for mode 'sync'; async workers never wait for an exchange"
    )
    weights = (
        "overlap cannot be used with exchange 'weights': a step's weights would be lost; "
        "use gradients or updates"
    )
    assert refusal({"overlap": True, "exchange": "weights"}) == weights
    assert refusal({"overlap": True, "codec": "fedavg"}) == weights
    assert load_small({"overlap": True, "exchange": "updates"})


def test_a_batch_larger_than_the_data_is_refused_with_the_largest_that_fits():
    assert refusal({"batch_size": 33}, 3) == (
        "batch_size 33 x 3 blocks = 99 samples per step, but the data set has 96; "
        "use a batch_size of at most 32"
    )
    assert load_small({"batch_size": 32}, 3).steps == 1


def test_more_blocks_than_samples_are_refused():
    assert refusal({"batch_size": 1}, 97) == (
        "97 blocks per step need as many samples, but the data set has 96; use fewer workers"
    )
    assert load_small({"batch_size": 1}, 96).steps == 1


@pytest.mark.parametrize("partition", ["iid", "shards", "dirichlet"])
def test_redundancy_needs_shared_data(partition):
    assert refusal({"partition": partition, "redundancy": 2}) == (
        f"redundancy 2 needs partition 'shared': with '{partition}' a worker does not see the "
        "samples of another's block"
    )
    assert load_small({"partition": "shared", "redundancy": 2}).shares is None


def test_a_target_accuracy_needs_test_samples(monkeypatch):
    def without_tests(self, paths):
        data = original(self, paths)
        return Data(data.train_x, data.train_y, data.test_x[:0], data.test_y[:0], data.classes)

    original = Synthetic.load
    monkeypatch.setattr(Synthetic, "load", without_tests)
    assert refusal({"target_accuracy": 0.5}) == (
        "target_accuracy is 0.5, but data set 'synthetic' has no test samples to measure it on"
    )
    assert load_small({})


def test_parameters_are_checked_with_the_place_where_they_stand():
    options = {
        "codec_params": {"turn": 1},
        "server_codec_params": {"turn": 1},
        "compressor_params": {"ratio": 1},
        "model_params": {"hiden": [1]},
        "dataset_params": {"sample": 1},
        "partition_params": {"alpha": 1.0},
        "assignment_params": {"size": 1},
        "topology_params": {"degree": 1},
        "optimizer_params": {"momentun": 0.5},
    }
    for option, values in options.items():
        (name,) = values
        assert refusal({option: values}).startswith(f"{option.removesuffix('_params')}.{name}")


def test_parameters_of_a_server_half_that_is_not_there_are_refused():
    assert refusal({"server_codec_params": {"turn": 1}}) == (
        "server_codec.turn has no effect: codec 'plain' has no server half"
    )


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ("codec", "codec"),
        ("server_codec", "codec"),
        ("compressor", "compressor"),
        ("model", "model"),
        ("dataset", "dataset"),
        ("partition", "partition"),
        ("assignment", "assignment"),
        ("optimizer", "optimizer"),
    ],
)
def test_every_plugin_is_looked_up(option, kind):
    with pytest.raises(PluginNotFoundError, match=f"no {kind} is named 'nonesuch'"):
        load_small({option: "nonesuch"})


# what a job comes to --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps_per_epoch", "steps"),
    [
        ({"batch_size": 4, "epochs": 3}, 12, 36),
        ({"batch_size": 7, "epochs": 3}, 6, 18),
        ({"batch_size": 4, "epochs": 3, "max_steps": 20}, 12, 20),
        ({"batch_size": 4, "epochs": 1, "max_steps": 20}, 12, 12),
        ({"batch_size": 48}, 1, 1),
    ],
)
def test_steps(options, steps_per_epoch, steps):
    load = load_small(options)
    assert (load.steps_per_epoch, load.steps) == (steps_per_epoch, steps)


def test_redundancy_and_assignment_decide_who_computes_what():
    assert load_small({}, 3).owners == ((0,), (1,), (2,))
    assert load_small({"redundancy": 2}, 3).owners == ((0, 1), (0, 2), (1, 2))
    duplicate = load_small({"redundancy": 2, "assignment": "duplicate"}, 4)
    assert duplicate.owners == ((0, 1), (2, 3))
    assert duplicate.block_count == 2


def test_the_initial_weights_depend_on_the_seed_alone():
    first, second = load_small({}, 2), load_small({"batch_size": 2, "codec": "local"}, 5)
    assert first.initial().tobytes() == second.initial().tobytes()
    assert first.initial().tobytes() != load_small({"seed": 1}).initial().tobytes()


@pytest.mark.parametrize("partition", ["iid", "shards", "dirichlet"])
def test_shares_depend_on_the_seed_and_deal_out_every_sample(partition):
    shares = load_small({"partition": partition}, 3).shares
    assert np.sort(np.concatenate(shares)).tolist() == list(range(96))
    again = load_small({"partition": partition, "batch_size": 1}, 3).shares
    other = load_small({"partition": partition, "seed": 1}, 3).shares
    assert [share.tolist() for share in again] == [share.tolist() for share in shares]
    assert [share.tolist() for share in other] != [share.tolist() for share in shares]


@pytest.mark.parametrize(
    ("granularity", "groups"),
    [
        ("model", [["weight0", "bias0", "weight1", "bias1"]]),
        ("tensor", [["weight0"], ["bias0"], ["weight1"], ["bias1"]]),
        (4, [["weight0"], ["bias0"], ["weight1"], ["bias1"]]),
        (64, [["weight0"], ["bias0", "weight1"], ["bias1"]]),
        (63, [["weight0"], ["bias0"], ["weight1", "bias1"]]),
        (112, [["weight0", "bias0"], ["weight1", "bias1"]]),
        (111, [["weight0"], ["bias0", "weight1", "bias1"]]),
        (10_000, [["weight0", "bias0", "weight1", "bias1"]]),
    ],
)
def test_groups_by_granularity(granularity, groups):
    """A layer of 6 x 4 and one of 4 x 3: 96, 16, 48 and 12 bytes."""
    load = load_small({"granularity": granularity})
    assert [list(group) for group in load.groups] == groups
    shapes = {name: shape for group in load.groups for name, shape in group.items()}
    assert shapes == dict(load.model.shapes)
    assert sum(map(workload.group_size, load.groups)) == load.model.size == 43


# codecs ---------------------------------------------------------------------------------------


def make(load, node, group=0, servers=(-1, -2)):
    part = np.zeros(workload.group_size(load.groups[group]), np.float32)
    return load.make_codec(node, group, (0, 1), servers, part, logger=print)


def test_workers_and_servers_get_their_halves_and_parameters():
    load = load_small({"codec": "fedavg", "codec_params": {"turn": 3}})
    worker, server = make(load, 1), make(load, -1)
    assert (type(worker), type(server)) == (FedAvg, FedAvgServer)
    assert worker.ctx.params.turn == server.ctx.params.turn == 3  # it declares none of its own
    assert (worker.ctx.role, server.ctx.role) == ("worker", "server")
    assert load.exchange == "weights"


def test_a_server_half_with_parameters_of_its_own_gets_those(write):
    path = write(SOURCE)
    options = {"codec": "fedavg", "codec_params": {"turn": 3}, "server_codec": f"{path}:Mine"}
    assert make(load_small(options), -1).ctx.params.turn == 7
    load = load_small({**options, "server_codec_params": {"turn": 4}})
    assert (make(load, -1).ctx.params.turn, make(load, 0).ctx.params.turn) == (4, 3)


def test_a_codec_knows_its_place():
    load = load_small({"mode": "async", "redundancy": 2, "granularity": "tensor", "epochs": 2}, 2)
    ctx = make(load, 1, group=1).ctx
    assert (ctx.node, ctx.workers, ctx.servers, ctx.server) == (1, (0, 1), (-1, -2), -2)
    assert (ctx.mode, ctx.steps, ctx.step) == ("async", 48, 0)
    assert (ctx.block_owners, ctx.blocks) == (((0, 1),), (0,))
    assert ctx.shapes == {"bias0": (4,)}
    assert ctx.initial.shape == (4,)
    assert ctx.logger is print
    assert ctx.exchange == "gradients"
    load = load_small({"codec": "parameter_server"})
    assert make(load, 0).ctx.exchange == make(load, -1).ctx.exchange == "updates"
    assert make(load, 1, servers=()).ctx.server is None


@pytest.mark.parametrize(
    ("init", "cause"),
    [
        (
            "def __init__(self, n): pass",
            r"TypeError: .*missing 1 required positional argument: 'n'",
        ),
        ("def __init__(self): 1 / 0", "ZeroDivisionError: division by zero"),
        ("def __init__(self): raise SystemExit(4)", "SystemExit: 4"),
    ],
)
def test_a_codec_that_cannot_be_made_says_why(write, init, cause):
    path = write(f"from aiosgd.codecs.plain import Plain\nclass Mine(Plain):\n    {init}\n")
    load = load_small({"codec": f"{path}:Mine", "server_codec": "plain"})
    hint = r"; a codec takes no arguments: it prepares itself in start\(\)$"
    with pytest.raises(CodecError, match=f"^codec Mine cannot be made on node 1: {cause}{hint}"):
        make(load, 1)
    assert make(load, -1)


def test_a_codec_in_the_older_form_that_cannot_be_made_says_why(write):
    path = write(
        "from aiosgd import legacy\n"
        "class Mine(legacy.Codec):\n    def __init__(self, node_id): 1 / 0\n"
    )
    with pytest.raises(CodecError) as caught:
        make(load_small({"codec": f"{path}:Mine"}), 1)
    expected = "codec Mine cannot be made on node 1: ZeroDivisionError: division by zero"
    assert str(caught.value) == expected


def test_a_worker_s_codec_without_update_is_told_so_as_it_is(write):
    path = write("from aiosgd import Codec\nclass Mine(Codec):\n    pass\n")
    with pytest.raises(CodecError, match=r"^codec Mine has no update\(block\)"):
        make(load_small({"codec": f"{path}:Mine"}), 1)


def test_groups_are_dealt_out_among_the_servers():
    load = load_small({"codec": "parameter_server", "granularity": "tensor"})
    assert [make(load, 0, group).ctx.server for group in range(4)] == [-1, -2, -1, -2]
    assert [make(load, 0, group, (-1,)).ctx.server for group in range(4)] == [-1] * 4


def test_random_numbers_differ_between_nodes_and_groups_and_repeat_between_runs():
    load = load_small({"granularity": "tensor", "compressor": "fp16"})
    draws = {
        (node, group): make(load, node, group).ctx.rng.random()
        for node in (-2, -1, 0, 1)
        for group in range(4)
    }
    assert len(set(draws.values())) == len(draws)
    assert make(load, -1, 2).ctx.rng.random() == draws[-1, 2]
    other = load_small({"granularity": "tensor", "seed": 1})
    assert make(other, -1, 2).ctx.rng.random() not in draws.values()
    codec = make(load, 0)
    assert codec.ctx.compressor.rng.random() not in draws.values()
    assert codec.ctx.compressor is not make(load, 0).ctx.compressor


def test_each_optimizer_is_fresh():
    load = load_small({"optimizer_params": {"momentum": 0.5}})
    first, second = load.make_optimizer(), load.make_optimizer()
    assert first.state["momentum"] is not second.state["momentum"]
    assert first.steps == load.steps
    assert first.learning_rate == pytest.approx(0.1)


def test_every_context_has_the_topology_of_the_job():
    options = {"codec": "dpsgd", "topology": "regular", "topology_params": {"degree": 3}}
    load = load_small({**options, "seed": 5}, 6)
    topology = Regular(make_params(Regular, options["topology_params"], "topology"))
    graphs = [topology.graph(6, seed) for seed in (5, 6)]
    ours, others = ([graph.receivers(i) for i in range(6)] for graph in graphs)
    codecs = [load.make_codec(i, 0, range(6), (), load.initial()) for i in range(6)]
    assert [codec.ctx.neighbours for codec in codecs] == ours != others
    assert load.mixing == f"topology regular: spectral gap {graphs[0].spectral_gap:.3g}"


def test_a_full_topology_is_none_and_nothing_is_said_of_it():
    load = load_small({"codec": "dpsgd"}, 3)
    assert (load.topology, load.mixing) == (None, "")
    assert load.make_codec(0, 0, (0, 1, 2), (), load.initial()).ctx.neighbours == (1, 2)


def test_a_job_that_is_sent_has_links_in_the_place_of_their_file(tmp_path):
    path = tmp_path / "links.txt"
    path.write_text("0 1\n1 2\n")
    job = JobConfig(codec="dpsgd", topology="edges", topology_params={"file": str(path)})
    sent = workload.portable(job)
    path.unlink()
    assert sent.topology_params["links"] == [[0, 1], [1, 2]]
    assert workload.portable(sent) == sent
    assert workload._graph(sent, 3).receivers(1) == (0, 2)
    ring = JobConfig(codec="dpsgd", topology="ring")
    assert workload.portable(ring) is ring


def test_plugins_of_names_everything_that_nodes_must_have():
    job = JobConfig(codec="parameter_server", server_codec="plain", compressor="fp16")
    named = {(entry.kind, entry.name) for entry in workload.plugins_of(job)}
    assert named == {
        ("codec", "parameter_server"),
        ("codec", "plain"),
        ("compressor", "fp16"),
        ("model", "mlp"),
        ("dataset", "digits"),
        ("partition", "shared"),
        ("assignment", "iid"),
        ("topology", "full"),
        ("optimizer", "sgd"),
    }
    files = JobConfig(codec="a.py:A", server_codec="b.py:B")
    assert not [entry for entry in workload.plugins_of(files) if entry.kind == "codec"]


# codecs from files ----------------------------------------------------------------------------


def load_file(name, sources=None):
    return workload.load_codecs(JobConfig(codec=name), sources).codec


def test_a_codec_comes_from_a_file(write):
    path = write(SOURCE)
    load = load_small({"codec": f"{path}:Mine", "codec_params": {"turn": 5}})
    assert load.codec.__name__ == "Mine"
    assert load.codec_params.turn == 5
    assert load.server_codec is None
    assert is_file(f"{path}:Mine")
    assert not is_file("plain")


def test_a_server_half_comes_from_a_file(write):
    path = write(SOURCE)
    codecs = workload.load_codecs(JobConfig(codec="fedavg", server_codec=f"{path}:Other"))
    assert (codecs.codec, codecs.server_codec.__name__) == (FedAvg, "Other")


def test_the_file_may_be_elsewhere_on_this_machine(write):
    path = write(SOURCE, "codec_0.py")
    assert load_file("there/mine.py:Mine", {"there/mine.py:Mine": path}).__name__ == "Mine"


async def test_tracebacks_name_the_file_as_the_user_does(write):
    path = write(SOURCE.replace("self.set_result(block.value)", "1 / 0"), "codec_0.py")
    codec = load_file("there/mine.py:Mine", {"there/mine.py:Mine": path})
    with pytest.raises(ZeroDivisionError) as caught:
        await codec().update(None)
    frame = traceback.extract_tb(caught.value.__traceback__)[-1]
    line = 1 + SOURCE.splitlines().index("        self.set_result(block.value)")
    assert (frame.filename, frame.lineno) == ("there/mine.py", line)


def test_a_file_without_a_class_is_refused():
    assert refusal({"codec": "ring.py"}) == (
        "codec 'ring.py' names no class; expected FILE.py:CLASS"
    )
    assert refusal({"server_codec": "a/ring.py"}).startswith("codec 'a/ring.py' names no class")


def test_files_of_one_name_do_not_get_in_each_other_s_way(write, tmp_path):
    (tmp_path / "a").mkdir()
    one, two = write(SOURCE), write(SOURCE.replace("7", "8"), "a/codec.py")
    first, second = load_file(f"{one}:Mine"), load_file(f"{two}:Mine")
    for codec, turn in ((first, 7), (second, 8)):
        assert codec.Params().turn == turn
        assert sys.modules[codec.__module__].Mine is codec


def test_a_changed_file_is_read_again_at_once(write, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert load_file(f"{write(SOURCE)}:Mine").Params().turn == 7
    assert load_file(f"{write(SOURCE.replace('7', '9'))}:Mine").Params().turn == 9
    assert [path.name for path in tmp_path.iterdir()] == ["codec.py"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module_he"),
        ("def", "SyntaxError: invalid syntax"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_cannot_be_imported_is_refused_with_the_cause(write, source, reason):
    path = write(source)
    with pytest.raises(PluginLoadError) as caught:
        load_file(f"{path}:Mine")
    assert str(caught.value).startswith(f"codec '{path}:Mine' cannot be loaded: {reason}")
    digest = hashlib.sha256(source.encode()).hexdigest()
    assert not [name for name in sys.modules if digest in name]


def test_a_missing_file_or_class_is_refused(write, tmp_path):
    path = write(SOURCE)
    with pytest.raises(ConfigError) as caught:
        load_file(f"{tmp_path}/none.py:Mine")
    assert (
        str(caught.value) == f"codec '{tmp_path}/none.py:Mine': there is no file {tmp_path}/none.py"
    )
    with pytest.raises(PluginLoadError, match=r"': codec\.py has no 'Nine'"):
        load_file(f"{path}:Nine")
    with pytest.raises(PluginLoadError, match="is 'no class'; expected a subclass of aiosgd"):
        load_file(f"{path}:text")


# data -----------------------------------------------------------------------------------------


def test_data_files_are_found_where_the_data_set_has_them_or_where_they_are_said_to_be(tmp_path):
    kept = tmp_path / "kept.npz"
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    np.savez(kept, x=x, y=np.arange(20) % 2)
    options = {"dataset": "npz", "dataset_params": {"path": str(kept)}, "model": "softmax"}
    job = JobConfig(**options, batch_size=2)
    (file,) = workload.dataset_files(job, tmp_path)
    assert (file.name, file.path) == ("kept.npz", kept)
    load = workload.load(job, 2, tmp_path)
    assert len(load.data.train_y) == 16
    moved = kept.rename(tmp_path / "moved")
    again = workload.load(job, 2, tmp_path, paths={"kept.npz": moved})
    assert again.data.train_x.tobytes() == load.data.train_x.tobytes()


def test_a_workload_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_small({}).steps = 3


def test_on_a_node_a_job_reads_only_the_files_that_came_with_it(tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("root:x:0:hunter2\n")
    stolen = make_job({"dataset": "csv", "dataset_params": {"path": str(secret)}})
    with pytest.raises(ConfigError, match=r"^data file 'secret.csv' did not come with the job$"):
        workload.load(stolen, 2, tmp_path, paths={})
    options = {"codec": "dpsgd", "topology": "edges", "topology_params": {"file": str(secret)}}
    with pytest.raises(ConfigError, match="names a file of the submitter's") as found:
        workload.load(make_job(options), 2, tmp_path, paths={})
    assert "hunter2" not in str(found.value)
