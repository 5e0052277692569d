import dataclasses
import tomllib
from fractions import Fraction
from pathlib import Path

import msgpack
import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from aiosgd.errors import ConfigError
from aiosgd.runtime.config import (
    KINDS,
    Address,
    Cluster,
    Compute,
    JobConfig,
    from_dict,
    load_cluster,
    make_job,
    to_dict,
)
from aiosgd.runtime.security import SecurityFiles
from aiosgd.runtime.toml_source import _Lines

NODES = 'workers = ["a:1", "b:2", "c:3"]\nservers = ["s:1"]\n'


@pytest.fixture
def cluster_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> Path:
        path = Path("cluster.toml")
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("127.0.0.1:1", "127.0.0.1", 1, "127.0.0.1:1"),
        ("Node-1.lab_a:65535", "node-1.lab_a", 65535, "node-1.lab_a:65535"),
        ("[::1]:9000", "::1", 9000, "[::1]:9000"),
        ("[2001:DB8:0:0::1]:9000", "2001:db8::1", 9000, "[2001:db8::1]:9000"),
        ("localhost:09000", "localhost", 9000, "localhost:9000"),
    ],
)
def test_address_is_read_and_written(text, host, port, shown):
    address = Address.parse(text, "here")
    assert (address.host, address.port, str(address)) == (host, port, shown)
    assert Address.parse(str(address), "here") == address


@pytest.mark.parametrize(
    "text",
    [
        *("", "host", "host:", ":9000", "host:0", "host:65536", "host:-1", "host:+1", "host:9 "),
        *(
            "host:9000\n",
            "::1:9000",
            "[::1]",
            "[host]:9000",
            "[]:1",
            "http://a:1",
            "a b:1",
            "a/b:1",
        ),
        *("1.2.3:80", "256.1.1.1:80", "host:٣", "a:1:2", "host:123456"),
    ],
)
def test_bad_address_is_refused_with_place_value_and_expectation(text):
    message = refusal(Address.parse, text, "here")
    shown = text.replace("\n", "\\n")
    assert message == f'here is "{shown}"; expected host:port with a port of 1..65535'


def test_port_zero_is_allowed_where_asked_for():
    assert Address.parse("host:0", "here", allow_zero=True).port == 0
    message = refusal(Address.parse, "host:65536", "here", allow_zero=True)
    assert message.endswith("with a port of 0..65535")


# The lines of a TOML text ------------------------------------------------------------------


def test_lines_of_keys_and_items():
    text = """\
# workers = ["comment"]
top = "a # no = comment"
"quoted.key" = 1.5
'lit' . "e\\u0072al" = 1979-05-27 07:32:00Z
list = [ # ] in a comment
  "a]", 'b"',

  [1,
   2], { inline = 3, "x y" = [
     4] },
]
text = \"\"\"
fake = 1
[fake]
quote \\\"\"\" and four quotes:\"\"\"\"
raw = '''
fake = '2'
''''
plain = 'a' # "
[job] # table
epochs=5
[ job . codec_params ]
turn = 150
[[many]]
x = 1
[last]
"""
    tomllib.loads(text)
    found = _Lines(text).found
    line_of = {".".join(map(str, keys)): line for keys, line in found.items()}
    assert line_of == {
        "top": 2,
        "quoted.key": 3,
        "lit": 4,
        "lit.eral": 4,
        "list": 5,
        "list.0": 6,
        "list.1": 6,
        "list.2": 8,
        "list.2.0": 8,
        "list.2.1": 9,
        "list.3": 9,
        "list.3.inline": 9,
        "list.3.x y": 9,
        "list.3.x y.0": 10,
        "text": 12,
        "raw": 16,
        "plain": 19,
        "job": 20,
        "job.epochs": 21,
        "job.codec_params": 22,
        "job.codec_params.turn": 23,
        "many": 24,
        "many.x": 25,
        "last": 26,
    }


scalars = st.one_of(
    st.text(max_size=8), st.integers(-9, 9), st.floats(allow_nan=False), st.booleans()
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def keys_of(value, path=()):
    """Every path to a key in tables that no list contains."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from keys_of(inner, (*path, key))


@given(st.dictionaries(st.text(max_size=4), values, max_size=4))
def test_every_key_of_any_toml_is_found_on_a_line_that_has_it(table):
    text = tomli_w.dumps(table)
    lines = text.split("\n")
    found = _Lines(text).found
    for path in keys_of(table):
        written = tomli_w.dumps({path[-1]: 0}).removesuffix(" = 0\n")
        assert written in lines[found[path] - 1]


# cluster.toml ------------------------------------------------------------------------------


def test_cluster_file_is_read(cluster_file):
    path = cluster_file(
        'workers = ["192.168.1.2:9000", "[::1]:9000"]\n[job]\ncodec = "fedavg"\nepochs = 5\n'
        "[job.codec_params]\nturn = 150\n[security]\n"
    )
    cluster = load_cluster(path)
    assert cluster.workers == (Address("192.168.1.2", 9000), Address("::1", 9000))
    assert cluster.servers == ()
    assert cluster.path == path
    assert [(setting.path, setting.value, setting.place) for setting in cluster.job] == [
        (("codec",), "fedavg", "cluster.toml:3: [job] codec"),
        (("epochs",), 5, "cluster.toml:4: [job] epochs"),
        (("codec_params", "turn"), 150, "cluster.toml:6: [job.codec_params] turn"),
    ]
    assert make_job({}, cluster=cluster).codec_params == {"turn": 150}


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf" + NODES.encode(), NODES.replace("\n", "\r\n")])
def test_cluster_file_of_a_windows_editor_is_read(cluster_file, text):
    assert len(load_cluster(cluster_file(text)).workers) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('worker = ["a:1"]', "cluster.toml:1: worker: no such key (did you mean 'workers'?)"),
        (
            NODES + "zzzz = 1",
            "cluster.toml:3: zzzz: no such key; known: workers, servers, security, job",
        ),
        ("", "cluster.toml: workers is empty; expected one host:port or more"),
        ("\nworkers = []", "cluster.toml:2: workers is empty; expected one host:port or more"),
        ('workers = "a:1"', "cluster.toml:1: workers is 'a:1'; expected a list"),
        ('workers = [\n"a:1",\n# "x:0",\n7]', "cluster.toml:4: workers[1] is 7; expected a string"),
        (
            'workers = ["a:1",\n\n  "host:0"\n]',
            'cluster.toml:3: workers[1] is "host:0"; expected host:port with a port of 1..65535',
        ),
        (
            'workers = ["a:1"]\nservers = ["b:1",\n"A:1"]',
            'cluster.toml:3: servers[1] is "a:1"; expected another address than workers[0]\'s',
        ),
        (
            'workers = ["[::1]:5", "[0::1]:5"]',
            'cluster.toml:1: workers[1] is "[::1]:5"; expected another address than workers[0]\'s',
        ),
        ("workers = [", "cluster.toml:1: Invalid value (at end of document)"),
        (
            "workers = []\n\njob = = 3",
            "cluster.toml:3: Invalid value (at line 3, column 7)",
        ),
        (b"\xff = 1", "cluster.toml is not UTF-8 text: invalid start byte"),
        ("a = " + "[" * 20_000, "cluster.toml is nested too deeply"),
        (f"a = {'9' * 5000}", "cluster.toml: Exceeds the limit"),
        (NODES + "job = 3", "cluster.toml:3: job is 3; expected a table"),
        (NODES + "security = 3", "cluster.toml:3: security is 3; expected a table"),
        (
            NODES + "[security]\ntls_crt = ''",
            "cluster.toml:4: [security] tls_crt: no such key (did you mean 'tls_cert'?)",
        ),
        (
            NODES + "[job]\nlearning_rat = 1",
            "cluster.toml:4: [job] learning_rat: no such key (did you mean 'learning_rate'?)",
        ),
        (
            NODES + "[job]\n\nlearning_rate = -1",
            "cluster.toml:5: [job] learning_rate is -1; expected more than 0",
        ),
        (
            NODES + '[job]\nepochs = "5"',
            "cluster.toml:4: [job] epochs is '5'; expected a whole number",
        ),
        (
            NODES + "[job]\ncodec_params = 5",
            "cluster.toml:4: [job] codec_params is 5; expected a table",
        ),
        (
            NODES + "job.compute = {policy = 'auto', treads = 1}",
            "cluster.toml:3: [job.compute] treads: no such key (did you mean 'threads'?)",
        ),
        (
            NODES + "[job.compute.slow]\n1 = 2.0\n2 = 0.5",
            "cluster.toml:5: [job.compute.slow] 2 is 0.5; expected a factor of 1 or more",
        ),
        (
            NODES + "[[job.codec_params]]\nx = 1",
            "cluster.toml:3: [job] codec_params is [{'x': 1}]; expected a table",
        ),
    ],
)
def test_bad_cluster_file_is_refused_with_its_line(cluster_file, text, message):
    assert refusal(load_cluster, cluster_file(text)).startswith(message)


def test_security_names_files_next_to_the_cluster_file(cluster_file, tmp_path):
    path = cluster_file(
        f"{NODES}[security]\nsecret_file = 'cluster.secret'\ntls_cert = '/etc/node.pem'\n"
        "tls_key = 'keys/node.key'\ntls_ca = '~/ca.pem'"
    )
    assert load_cluster(path).security == SecurityFiles(
        secret_file=path.parent / "cluster.secret",
        tls_cert=Path("/etc/node.pem"),
        tls_key=path.parent / "keys/node.key",
        tls_ca=Path.home() / "ca.pem",
    )
    assert load_cluster(cluster_file(NODES)).security == SecurityFiles()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("secret_file = 3", "cluster.toml:4: [security] secret_file is 3; expected a string"),
        ("secret_file = ''", "cluster.toml:4: [security] secret_file is ''; expected a file"),
        (
            "secret_file = 'x'\ntls_key = 'x'",
            "cluster.toml:5: [security] tls_key needs tls_cert and tls_ca, too",
        ),
        (
            "tls_ca = 'x'\ntls_cert = 'x'",
            "cluster.toml:5: [security] tls_cert needs tls_key, too",
        ),
    ],
)
def test_wrong_security_is_refused_with_its_line(cluster_file, lines, message):
    assert refusal(load_cluster, cluster_file(f"{NODES}[security]\n{lines}")) == message


@pytest.mark.parametrize(
    ("given", "unix"), [([], True), (["wire.unix=false"], False), (["wire.unix=true"], True)]
)
def test_links_go_over_unix_sockets_unless_they_shall_not(given, unix):
    job = make_job({}, given)
    assert job.wire.unix is unix
    assert from_dict(to_dict(job)) == job
    assert make_job({"wire": {"unix": unix}}) == job


def test_the_wire_table_is_checked():
    assert "--set wire.unix is 1; expected true or false" in refusal(make_job, {}, ["wire.unix=1"])
    assert "did you mean 'unix'?" in refusal(make_job, {}, ["wire.unx=true"])
    assert "did you mean 'wire'?" in refusal(make_job, {}, ["wir.unix=true"])


def test_missing_cluster_file_and_folder_are_refused(tmp_path):
    missing = tmp_path / "none.toml"
    assert refusal(load_cluster, missing) == f"{missing} cannot be read: No such file or directory"
    assert refusal(load_cluster, str(tmp_path)) == f"{tmp_path} cannot be read: Is a directory"


# Layers ------------------------------------------------------------------------------------


def cluster_with(cluster_file, job: str) -> Cluster:
    return load_cluster(cluster_file(f"{NODES}[job]\n{job}"))


def test_defaults_are_those_of_the_documentation():
    assert make_job({}) == JobConfig()
    assert make_job({"epochs": None, "compute": None}) == JobConfig()


def test_each_layer_wins_over_those_before(cluster_file):
    cluster = cluster_with(cluster_file, "epochs = 2\nseed = 2\nbatch_size = 2")
    job = make_job({"seed": 3, "batch_size": 3, "title": None}, ["batch_size=4"], cluster)
    assert (job.redundancy, job.epochs, job.seed, job.batch_size) == (1, 2, 3, 4)
    assert make_job({}, ["seed=1", "seed=2"]).seed == 2


def test_layers_of_a_table_are_merged_key_by_key(cluster_file):
    cluster = cluster_with(
        cluster_file, "codec_params = {a = 1, b = 1, c = {x = 1}}\ncompute.policy = 'inline'"
    )
    flags = {"codec_params": {"b": 2, "d": (2,)}, "compute": Compute(threads=2, slow={"0": 2})}
    job = make_job(flags, ["codec.d=[3]", "codec.c.y=3", "compute.slow.1=5"], cluster)
    assert job.codec_params == {"a": 1, "b": 2, "c": {"x": 1, "y": 3}, "d": [3]}
    assert job.compute == Compute(policy="auto", threads=2, slow={"0": 2.0, "1": 5.0})
    assert make_job({}, (), cluster).codec_params == {"a": 1, "b": 1, "c": {"x": 1}}


def test_parameters_of_a_replaced_plugin_are_left_out(cluster_file):
    cluster = cluster_with(
        cluster_file,
        "codec = 'fedavg'\nserver_codec = 'mean'\ncodec_params.turn = 1\n"
        "server_codec_params.x = 1\nmodel = 'mlp'\nmodel_params.hidden = [1]\ndataset_params.n = 1",
    )
    job = make_job({"codec": "plain", "model": "mlp", "dataset": "csv"}, ["codec.n=2"], cluster)
    assert (job.codec, job.codec_params, job.server_codec) == ("plain", {"n": 2}, None)
    assert (job.server_codec_params, job.model_params) == ({}, {"hidden": [1]})
    assert job.dataset_params == {"n": 1}  # the file does not say whose they are
    assert make_job({}, ["codec=fedavg"], cluster).codec_params == {"turn": 1}
    assert make_job({"server_codec": "sum"}, (), cluster).server_codec_params == {}


# Values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("150", 150),
        (" 1.5 ", 1.5),
        ("true", True),
        ("[128,128]", [128, 128]),
        ('"cosine"', "cosine"),
        ("cosine", "cosine"),
        ("'a=b'", "a=b"),
        ("/data/a=b.csv", "/data/a=b.csv"),
        ("15O", "15O"),
        ("ef(topk(ratio=0.01))", "ef(topk(ratio=0.01))"),
        ("1\nepochs = 3", "1\nepochs = 3"),
        ("inf", float("inf")),
        ("{a = 1}", {"a": 1}),
    ],
)
def test_set_takes_toml_or_a_bare_word(text, value):
    job = make_job({}, [f"codec.turn={text}"])
    assert job.codec_params == {"turn": value}
    assert type(job.codec_params["turn"]) is type(value)
    assert job.epochs == 1


@pytest.mark.parametrize("kind", KINDS)
def test_set_knows_every_kind(kind):
    assert getattr(make_job({}, [f"{kind}.x=1"]), f"{kind}_params") == {"x": 1}
    assert getattr(make_job({}, [f"{kind}_params.x=1"]), f"{kind}_params") == {"x": 1}
    assert getattr(make_job({}, [f"job.{kind}.x=1"]), f"{kind}_params") == {"x": 1}
    assert getattr(make_job({}, [f"{kind}=other"]), kind) == "other"


def test_set_reaches_plain_keys_and_compute():
    sets = ["job.epochs=3", "learning_rate=1", "compute.policy=thread", "compute.slow.1=5.0"]
    job = make_job({}, sets)
    assert (job.epochs, job.learning_rate) == (3, 1.0)
    assert job.compute == Compute(policy="thread", slow={"1": 5.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("codec.turn", "--set is 'codec.turn'; expected key.path=value"),
        ("=3", "--set is '=3'; expected key.path=value"),
        ("codec..turn=3", "--set is 'codec..turn=3'; expected key.path=value"),
        ("codec.turn=", "--set codec.turn has no value; expected key.path=value"),
        ("codec.turn=[1", "--set codec.turn is '[1', which is no TOML value: Unclosed array"),
        ("codec.turn='x", '--set codec.turn is "\'x", which is no TOML value: '),
        (f"codec.x={'[' * 20_000}", "--set codec.x is '[["),
        ("codex.turn=1", "--set codex.turn: no such key (did you mean 'codec'?)"),
        ("zzzz.turn=1", "--set zzzz.turn: no such key; known: codec, server_codec, compressor"),
        ("epoch=1", "--set epoch: no such key (did you mean 'epochs'?)"),
        ("compute.polcy=auto", "--set compute.polcy: no such key (did you mean 'policy'?)"),
        ("compute.policy=thred", "--set compute.policy is 'thred'; expected one of 'auto', 'thr"),
        ("compute.threads=0", "--set compute.threads is 0; expected 1 or more"),
        ("compute.slow.x=2", "--set compute.slow.x names worker 'x'; expected a worker's id: 0, 1"),
        ("compute.slow.01=2", "--set compute.slow.01 names worker '01'; expected a worker's id"),
        ("compute.slow.1=0.9", "--set compute.slow.1 is 0.9; expected a factor of 1 or more"),
        ("compute.slow.1.2=3", "--set compute.slow.1.2 sets a key of an option that is no table"),
        ("compute=3", "--set compute is 3; expected a table"),
        (
            "compute={threads=1}",
            "--set compute is a table; set its keys one by one: --set compute.",
        ),
        ("epochs.x=3", "--set epochs.x sets a key of an option that is no table"),
        ("epochs={}", "--set epochs is {}; expected a whole number"),
        (
            "mode=asink",
            "--set mode is 'asink'; expected one of 'sync', 'async' (did you mean 'async",
        ),
        ("exchange=x", "--set exchange is 'x'; expected 'gradients' or 'updates' or 'weights'"),
        ("overlap=1", "--set overlap is 1; expected true or false"),
        (
            "granularity=3",
            "--set granularity is 3; expected 'model', 'tensor' or a bucket of 4 byt",
        ),
        ("granularity=layer", "--set granularity is 'layer'; expected 'model' or 'tensor' or a wh"),
        ("learning_rate=inf", "--set learning_rate is inf; expected a finite number"),
        ("learning_rate=nan", "--set learning_rate is nan; expected a number"),
        ("codec.x=nan", "--set codec.x is nan; expected a number"),
        ("codec.x=[1, nan]", "--set codec.x[1] is nan; expected a number"),
        ("codec.x=2024-01-01", "--set codec.x is datetime.date(2024, 1, 1); expected a TOML value"),
        (
            "seed=9223372036854775808",
            "--set seed is 9223372036854775808; expected an integer of 64",
        ),
        (f"step_timeout=1{'0' * 400}", "--set step_timeout is 1000"),
        ("tracker=1", "--set tracker is 1; expected a list"),
        ('tracker=["csv", 1]', "--set tracker[1] is 1; expected a string"),
        ('tracker=["csv", " "]', "--set tracker is ['csv', '']; expected names"),
        ("trackers=csv", "--set trackers: no such key (did you mean 'tracker'?)"),
        (
            "tracker.project=x",
            "--set tracker.project is 'x'; a tracker's parameter is tracker.NAME",
        ),
        ("tracker.mlflow.x=nan", "--set tracker.mlflow.x is nan; expected a number"),
    ],
)
def test_bad_set_is_refused(text, message):
    assert refusal(make_job, {}, [text]).startswith(message)


def test_set_below_a_value_is_refused():
    message = refusal(make_job, {}, ["codec.a=3", "codec.a.b=4"])
    assert message == "--set codec.a.b sets a key of a, which is 3"


@pytest.mark.parametrize(
    ("option", "good", "bad", "expected"),
    [
        ("learning_rate", [1e-9, 5], [0, -1, 0.0], "more than 0"),
        ("step_timeout", [0.1], [0, -1.5], "more than 0"),
        ("batch_size", [1], [0, -1], "1 or more"),
        ("epochs", [1], [0], "1 or more"),
        ("max_steps", [1], [0], "1 or more"),
        ("workers", [1], [0], "1 or more"),
        ("redundancy", [1], [0], "1 or more"),
        ("servers", [0], [-1], "0 or more"),
        ("seed", [0, 2**63 - 1], [-1], "0 or more"),
        ("target_accuracy", [0.001, 1], [0, 1.001, -1], "more than 0 and at most 1"),
        ("granularity", ["model", "tensor", 4], [3, 0, -4], "'model', 'tensor' or a bucket of 4 b"),
        (
            "title",
            ["", "a", "-._", "A.b_c-9", "x" * 40],
            [".a", "x" * 41, "a/b", "é", "a b", "a\n"],
            "at most 40 letters, digits, '-', '_' and '.', not starting with '.'",
        ),
        ("output", ["runs", "/tmp/a b"], ["", "a\0b"], "a folder"),
        *[(kind, ["x", "a/f.py:C"], ["", "  "], "a name") for kind in KINDS],
    ],
)
def test_ranges(option, good, bad, expected):
    for value in good:
        assert getattr(make_job({option: value}), option) == value
    for value in bad:
        flag = option.replace("_", "-")
        message = refusal(make_job, {option: value})
        assert message.startswith(f"--{flag} is {value!r}; expected {expected}")
        assert refusal(JobConfig, **{option: value}).startswith(f"{option} is {value!r}; ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"learning_rat": 1}, "--learning-rat: no such key (did you mean 'learning_rate'?)"),
        ({"learning_rate": "1"}, "--learning-rate is '1'; expected a number"),
        ({"epochs": 1.0}, "--epochs is 1.0; expected a whole number"),
        ({"epochs": True}, "--epochs is True; expected a whole number"),
        ({"seed": {}}, "--seed is {}; expected a whole number"),
        ({"model_params": [1]}, "--model-params is [1]; expected a table"),
        (
            {"codec_params": {"f": print}},
            "--codec-params.f is <built-in function print>; expected a",
        ),
        ({"codec_params": {"f": [None]}}, "--codec-params.f[0] is None; expected a TOML value"),
        ({"output": "\udc80"}, "--output is '\\udc80'; expected a TOML value"),
        ({"compute": {"slow": {1: 0}}}, "--compute.slow.1 is 0; expected a factor of 1 or more"),
        (
            {"seed": np.uint64(2**63)},
            f"--seed is {np.uint64(2**63)!r}; expected an integer of 64 bits",
        ),
    ],
)
def test_bad_flag_is_refused(flags, message):
    assert refusal(make_job, flags).startswith(message)


def test_compute_is_checked_when_made():
    assert refusal(Compute, threads=0) == "compute.threads is 0; expected 1 or more"
    assert refusal(Compute, slow={"-1": 2.0}).startswith("compute.slow.-1 names worker '-1'")
    assert Compute(slow={"1": 2, "0": 1}).slow == {"1": 2.0, "0": 1.0}


def test_python_values_become_plain_ones():
    flags = {
        "learning_rate": np.float32(0.5),
        "epochs": np.int64(3),
        "target_accuracy": Fraction(1, 2),
        "output": Path("a/b"),
        "title": np.str_("t"),
        "tracker": ["csv"],
        "codec_params": {"x": (1, np.int8(2)), "y": None},
    }
    job = make_job(flags)
    values = (job.learning_rate, job.epochs, job.target_accuracy, job.output, job.title)
    assert values == (0.5, 3, 0.5, "a/b", "t")
    assert [type(value) for value in values] == [float, int, float, str, str]
    assert job.tracker == ("csv",)
    assert job.codec_params == {"x": [1, 2]}
    assert {type(item) for item in job.codec_params["x"]} == {int}


@pytest.mark.parametrize("given", ["jsonl,é", "jsonl, é,jsonl", ["jsonl", "é"], ("jsonl,é", "é")])
def test_trackers_are_a_list_or_have_commas_between_them(given):
    assert make_job({"tracker": given}).tracker == ("jsonl", "é")


def test_each_tracker_has_parameters_of_its_own(cluster_file):
    more = 'tracker = "jsonl"\n[job.tracker_params.jsonl]\nx = 1'
    job = make_job({}, ("tracker.jsonl.y=2",), cluster_with(cluster_file, more))
    assert (job.tracker, job.tracker_params) == (("jsonl",), {"jsonl": {"x": 1, "y": 2}})
    others = make_job({"tracker": "mlflow"}, (), cluster_with(cluster_file, more))
    assert (others.tracker, others.tracker_params) == (("mlflow",), {})


def test_a_job_is_no_window_into_the_callers_values():
    params = {"hidden": [1]}
    job = make_job({"model_params": params})
    params["hidden"].append(2)
    to_dict(job)["model_params"]["hidden"].append(3)
    assert job.model_params == {"hidden": [1]}


# Sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"workers": 4}, "--workers is 4; expected at most 3, as cluster.toml lists"),
        ({"servers": 2}, "--servers is 2; expected at most 1, as cluster.toml lists"),
        ({"redundancy": 4}, "--redundancy is 4; expected at most 3, the number of workers"),
        (
            {"redundancy": 3, "workers": 2},
            "--redundancy is 3; expected at most 2, the number of workers",
        ),
    ],
)
def test_more_than_the_cluster_has_is_refused(cluster_file, flags, message):
    assert refusal(make_job, flags, (), load_cluster(cluster_file(NODES))) == message


def test_what_the_cluster_has_is_accepted(cluster_file):
    cluster = cluster_with(cluster_file, "redundancy = 3")
    assert make_job({"workers": 3, "servers": 1}, (), cluster).redundancy == 3
    assert refusal(make_job, {"workers": 2}, (), cluster) == (
        "cluster.toml:4: [job] redundancy is 3; expected at most 2, the number of workers"
    )
    nodes = Cluster(workers=(Address("a", 1),))
    assert refusal(make_job, {"workers": 2}, (), nodes).endswith("at most 1, as the cluster lists")
    assert make_job({"workers": 99, "redundancy": 9}).workers == 99
    assert "the number of workers" in refusal(make_job, {"workers": 2, "redundancy": 3})


# The plain form ----------------------------------------------------------------------------

FULL = JobConfig(
    codec="a/f.py:C",
    server_codec="s",
    mode="async",
    exchange="weights",
    redundancy=2,
    learning_rate=0.1 + 0.2,
    max_steps=7,
    workers=3,
    servers=0,
    overlap=True,
    granularity=65536,
    seed=2**63 - 1,
    target_accuracy=0.5,
    checkpoint_every=7,
    title="t",
    tracker=("csv", "é"),
    tracker_params={"é": {"x": 1, "y": {"z": [2.5]}}},
    codec_params={"a": [1, [2.5, "x"], {}], "b": {"c": True}, "inf": float("inf")},
    model_params={"hidden": (1, 2)},
    compute=Compute(policy="inline", threads=1, slow={"0": 2, "11": 1.5}),
)


@pytest.mark.parametrize("job", [JobConfig(), FULL])
def test_plain_form_is_lossless_through_msgpack_and_toml(job):
    values = to_dict(job)
    assert from_dict(values) == job
    assert from_dict(msgpack.unpackb(msgpack.packb(values))) == job
    assert from_dict(tomllib.loads(tomli_w.dumps(values))) == job
    assert to_dict(from_dict(values)) == values


def test_plain_form_leaves_none_out_and_names_all_else():
    options = {option.name for option in dataclasses.fields(JobConfig)}
    unset = {"server_codec", "exchange", "max_steps", "workers", "servers", "target_accuracy"}
    unset |= {"checkpoint_every"}
    assert to_dict(JobConfig()).keys() == options - unset
    assert to_dict(JobConfig())["compute"] == {"policy": "auto", "slow": {}}
    assert to_dict(FULL).keys() == options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "job is []; expected a table"),
        ({"epoch": 1}, "job.epoch: no such key (did you mean 'epochs'?)"),
        ({"epochs": 0}, "job.epochs is 0; expected 1 or more"),
        ({b"epochs": 1}, "job.b'epochs': no such key"),
        ({"compute": {"policy": 1}}, "job.compute.policy is 1; expected one of 'auto'"),
    ],
)
def test_bad_plain_form_is_refused(values, message):
    assert refusal(from_dict, values).startswith(message)
    assert refusal(from_dict, values, "job.toml: job").startswith("job.toml: " + message)
