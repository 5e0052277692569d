"""Networks: the built-in ones, files read and written, and what is wrong with a file."""

import dataclasses
import math

import pytest

from aiosgd.errors import ConfigError
from aiosgd.runtime import results
from aiosgd.runtime.config import JobConfig
from aiosgd.runtime.simulation.network import NetworkModel, Override, Path
from aiosgd.runtime.simulation.networks import (
    BUILT_IN,
    load_network,
    network_text,
    replayed,
    write_network,
)

EVERYTHING = NetworkModel(
    name='an "attic"',
    bytes_per_s=12.5e6,
    path=Path(latency_s=0.02, jitter_s=0.003, loss=0.01, retry_s=0.3),
    overrides=(
        Override(between=(0, 1), others=(-1, 2), path=Path(latency_s=0.5, jitter_s=0.003)),
        Override(between=(0,), others=(), path=Path(loss=0.25)),
    ),
    message_s=4e-5,
    byte_s=3e-10,
    flops=3e9,
    noise=0.125,
    nodes_bytes_per_s={0: 1.25e6, -1: math.inf},
    codec_message_s=2e-5,
    codec_byte_s=1e-10,
    least_s=7e-5,
    weight_s=1e-9,
    step_s=5e-5,
    wake_s=6e-5,
    evaluation_s=9e-5,
    hop_s=8e-5,
    cores=2,
    slow={3: 4.0, 0: 1.5},
)


@pytest.fixture
def file(tmp_path):
    """`file(text)`: the path of a network's file."""

    def write(text):
        path = tmp_path / "net.toml"
        path.write_text(text)
        return path

    return write


def flat(model):
    """Return a model's values by name, without what a test may compare only roughly."""
    values = dataclasses.asdict(model)
    found = {f"path.{name}": value for name, value in values.pop("path").items()}
    for i, override in enumerate(values.pop("overrides")):
        found |= {f"{i}.{name}": value for name, value in override.pop("path").items()}
        found |= {f"{i}.{name}": str(sorted(nodes)) for name, nodes in override.items()}
    for name in ("nodes_bytes_per_s", "slow", "replayed_s"):
        found |= {f"{name}.{node}": value for node, value in values.pop(name).items()}
    return found | values


# Built in -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lan", "wan", "mobile"])
def test_built_in_networks_are_found_by_name(name):
    assert load_network(name) is BUILT_IN[name]
    assert load_network(name).name == name


def test_built_in_networks_are_what_they_are_said_to_be():
    lan, wan, mobile = (BUILT_IN[name] for name in ("lan", "wan", "mobile"))
    assert (lan.bytes_per_s, wan.bytes_per_s, mobile.bytes_per_s) == (125e6, 12.5e6, 2.5e6)
    ways = [(one.path.latency_s, one.path.latency_s + one.path.jitter_s) for one in (wan, mobile)]
    assert ways == [pytest.approx((0.045, 0.055)), pytest.approx((0.03, 0.09))]
    assert (lan.path.loss, wan.path.loss, mobile.path.loss) == (0, 0.001, 0.01)
    assert mobile.flops < wan.flops
    assert mobile.message_s > wan.message_s


@pytest.mark.parametrize("name", ["lna", "LAN"])
def test_a_near_miss_of_a_name_is_told(name):
    with pytest.raises(ConfigError, match=r"no network is named .*; expected one of lan, wan, mob"):
        load_network(name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
        load_network(tmp_path / "none.toml")


# Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", [EVERYTHING, *BUILT_IN.values(), NetworkModel(name="x", block_s=0.04)]
)
def test_what_is_written_is_read_again(tmp_path, model):
    path = tmp_path / "net.toml"
    write_network(model, path, ["where it is from", ""])
    assert path.read_text().startswith("# where it is from\n#\nname = ")
    expected = {**flat(model), **({"flops": NetworkModel().flops} if model.block_s else {})}
    found = flat(load_network(path))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        is_number = isinstance(value, float)
        assert value == (pytest.approx(expected[name], 1e-11, 0) if is_number else expected[name])


def test_every_field_can_be_written():
    default = NetworkModel()
    unused = [
        field.name
        for field in dataclasses.fields(NetworkModel)
        if getattr(EVERYTHING, field.name) == getattr(default, field.name)
    ]
    assert unused == ["block_s", "replayed_s"]  # instead of flops; never written


def test_an_empty_file_is_the_default_with_its_own_name(file):
    assert load_network(file("")) == NetworkModel(name="net")


def test_units(file):
    model = load_network(
        file(
            "[link]\nlatency_ms = 20\njitter_ms = 0.5\nmbit_per_s = 8\nretry_ms = 100\n"
            "[nodes]\n-2 = 16\n[processor]\nmessage_us = 3\nbyte_ns = 2\n"
            "[compute]\nblock_ms = 40\nhop_us = 5\nweight_ns = 6\n"
        )
    )
    assert model.path == Path(latency_s=0.02, jitter_s=0.0005, retry_s=pytest.approx(0.1))
    assert (model.bytes_per_s, model.nodes_bytes_per_s) == (1e6, {-2: 2e6})
    assert (model.message_s, model.byte_s) == pytest.approx((3e-6, 2e-9))
    assert (model.block_s, model.hop_s, model.weight_s) == pytest.approx((0.04, 5e-6, 6e-9))


def test_links_inherit_what_they_do_not_set(file):
    text = "[link]\nlatency_ms = 10\nloss = 0.1\n[[links]]\nbetween=[0]\nothers=[1]\nloss = 0\n"
    (override,) = load_network(file(text)).overrides
    assert override.path == Path(latency_s=0.01, loss=0.0)


def test_nothing_is_overwritten(file):
    path = file("mine")
    with pytest.raises(ConfigError, match="exists already; nothing is ever overwritten"):
        write_network(NetworkModel(), path)
    assert path.read_text() == "mine"


def test_a_folder_that_is_not_there_cannot_be_written_to(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        write_network(NetworkModel(), tmp_path / "none" / "net.toml")


# What is wrong --------------------------------------------------------------------------------

WRONG = [
    ("lnik = 1", r":1: lnik: no such key \(did you mean 'link'\?\)"),
    ("[link]\nlatency = 1", r":2: \[link\] latency: no such key \(did you mean 'latency_ms'\?\)"),
    ("[link]\nmbit_per = 1", r":2: \[link\] mbit_per: no such key .*'mbit_per_s'"),
    ("[link]\nlatency_ms = '1'", r":2: \[link\] latency_ms is '1'; expected a number"),
    ("[link]\n\nlatency_ms = -1", r":3: \[link\] latency_ms is -1\.0; expected 0 or more"),
    ("[link]\nlatency_ms = nan", r"latency_ms is nan; expected 0 or more"),
    ("[link]\nlatency_ms = inf", r"latency_ms is inf; expected 0 or more and at most"),
    ("[link]\nloss = 1", r"loss is 1\.0; expected 0 or more and at most 0\.99"),
    ("[link]\nmbit_per_s = 0", r":2: \[link\] mbit_per_s is 0\.0; expected more than 0"),
    ("link = 3", r":1: link is 3; expected a table"),
    ("[nodes]\nzero = 1", r":2: \[nodes\] zero is no node; expected 0, 1, …, of a server -1, -2"),
    ("[nodes]\n0 = 0", r":2: \[nodes\] 0 is 0\.0; expected more than 0"),
    ("[processor]\ncores = 1.5", r":2: \[processor\] cores is 1\.5; expected a whole number"),
    ("[processor]\ncores = 0", r":2: \[processor\] cores is 0; expected more than 0"),
    ("[processor]\ncores = true", r"cores is True; expected a whole number"),
    ("[compute]\ngflop = 1", r":2: \[compute\] gflop: no such key \(did you mean 'gflops'\?\)"),
    ("[compute]\nstraglers = {}", r"straglers: no such key \(did you mean 'stragglers'\?\)"),
    ("[compute]\ngflops = 1\nblock_ms = 1", r":3: \[compute\] block_ms stands beside gflops"),
    ("[compute]\nnoise = 2", r"noise is 2\.0; expected 0 or more and at most 1"),
    ("[compute]\nstragglers = {3 = 0}", r":2: \[compute.stragglers\] 3 is 0\.0; expected more"),
    ("[compute]\nstragglers = 3", r":2: \[compute\] stragglers is 3; expected a table"),
    ("[compute]\nreplay = 'none'", r":2: \[compute\] replay is 'none'; expected the folder of"),
    ("[compute]\nreplay = ''", r":2: \[compute\] replay is ''; expected the folder of a run"),
    ("name = 3", r":1: name is 3; expected a string"),
    ("links = 3", r":1: links is 3; expected a list"),
    ("links = [3]", r":1: links\[0\] is 3; expected a table"),
    ("[[links]]\nbetween = [0]", r":1: links\[0\]\.others is missing; expected a list of nodes"),
    (
        "[[links]]\nbetween=[0]\nothers=[1]\n[[links]]\nbetween=[0]\nothers=[1]\nlos = 1",
        r":4: links\[1\]\.los: no such key \(did you mean 'loss'\?\)",
    ),
    ("[[links]]\nbetween=['0']\nothers=[1]", r"links\[0\]\.between\[0\] is '0'; expected a whole"),
    ("[link", r":1: "),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_wrong_is_named_with_its_line(file, text, message):
    with pytest.raises(ConfigError, match=rf"net\.toml(:\d+: (\[\w+\] )?)?{message}"):
        load_network(file(text))


# A run's block times --------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """The folder of a run of two workers: node 0 computed two blocks of 8 in its first step."""
    folder = tmp_path / "run"
    folder.mkdir()
    results.write_job(folder, JobConfig(batch_size=8), {})
    cells = [(0, 0, 16, 0.5), (0, 1, 8, 0.3), (0, 2, 0, 0.0), (1, 0, 5, 0.2)]
    rows = [
        f"{node},{step},0,1.0,0.5,0.5,{samples},{seconds},0.1,0,0,0.0"
        for node, step, samples, seconds in cells
    ]
    names = ",".join(results.TRAIN.names)
    (folder / "train.csv").write_text("\n".join([names, *rows]) + "\n")
    return folder


def test_a_runs_block_times(run):
    assert replayed(run) == {0: (0.25, 0.25, 0.3), 1: (0.2,)}


def test_replay_is_relative_to_the_file(run, file):
    model = load_network(file("[compute]\nreplay = 'run'"))
    assert model.replayed_s == replayed(run)
    with pytest.raises(ConfigError, match="replayed times are not written"):
        write_network(model, file("").with_name("other.toml"))


def test_a_run_without_blocks_cannot_be_replayed(run):
    path = run / "train.csv"
    path.write_text(path.read_text().splitlines()[0])
    with pytest.raises(ConfigError, match=r"train\.csv has no block"):
        replayed(run)


@pytest.mark.parametrize("cell", ["-1.0", "nan", "inf"])
def test_a_time_that_is_none_is_refused(run, cell):
    path = run / "train.csv"
    path.write_text(path.read_text().replace(",0.3,", f",{cell},"))
    with pytest.raises(ConfigError, match="compute_s of node 0 is no time"):
        replayed(run)


def test_the_text_of_a_network_is_what_is_written(tmp_path):
    path = tmp_path / "net.toml"
    write_network(EVERYTHING, path)
    assert path.read_text() == network_text(EVERYTHING)
