"""Links that are authenticated, encrypted, or within a machine: real nodes, real commands."""

import pytest

from aiosgd.runtime import results
from aiosgd.runtime.security import write_secret
from tests.runtime.certificates import Authority

pytestmark = pytest.mark.usefixtures("no_process_left")


@pytest.fixture
def secret(tmp_path):
    write_secret(tmp_path / "cluster.secret")
    return tmp_path / "cluster.secret"


@pytest.fixture
def tls(tmp_path):
    return Authority(tmp_path).issue("node")


def options(files):
    """Return TLS files as options of a node."""
    return [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", path)]


def security(files):
    """Return files as they stand in a cluster.toml."""
    return "[security]\n" + "".join(f'{name} = "{path}"\n' for name, path in files.items())


@pytest.fixture
def submit(cluster_of, write_cluster, command):
    """`submit(nodes, files, *more)`: an `aiosgd submit` that has ended."""

    def run(nodes, files, *more):
        toml = write_cluster(cluster_of(nodes), security(files))
        return command("submit", toml, "--max-steps", 2, "--title", "secure", *more)

    return run


def roads(tmp_path):
    """Return what the nodes' logs say about links."""
    (folder,) = (tmp_path / "runs").glob("*-secure-*")
    logs = [(folder / f"nodes/{node}/node.log").read_text() for node in (0, 1)]
    return [
        line.split(" INFO ")[1] for log in logs for line in log.splitlines() if "linked" in line
    ]


def refused(done, words):
    """Check that a command was refused with one clear line."""
    assert done.code == 3, done.err
    line = done.err.splitlines()[-1]
    assert line.startswith("aiosgd: worker 0: 127.0.0.1:")
    assert words in line


def test_a_job_with_a_secret_leaves_no_trace_of_it(start_nodes, submit, secret, tmp_path):
    nodes = start_nodes(2, "--secret-file", secret)
    done = submit(nodes, {"secret_file": secret.name})
    assert done.code == 0, done.err
    assert roads(tmp_path) == [f"linked to worker {i} over a unix socket" for i in (1, 0)]
    text = secret.read_text().strip()
    for path in (tmp_path / "runs").rglob("*.*"):
        assert text.encode() not in path.read_bytes()
    assert not any(text in one.err + one.out for one in [done, *(n.process for n in nodes)])


def test_without_the_secret_or_with_another_nobody_gets_in(
    start_nodes, submit, secret, tmp_path, monkeypatch
):
    nodes = start_nodes(1, "--secret-file", secret)
    write_secret(tmp_path / "other")
    refused(submit(nodes, {"secret_file": "other"}), "node and caller have different secrets")
    refused(submit(nodes, {}), "the node has a secret and the caller has none: give the caller")
    monkeypatch.setenv("AIOSGD_SECRET_FILE", str(secret))
    assert submit(nodes, {}).code == 0


def test_a_secret_for_a_node_that_has_none_is_refused(start_nodes, submit, secret):
    done = submit(start_nodes(1), {"secret_file": secret})
    refused(
        done, "the caller has a secret and the node has none: start the node with --secret-file"
    )


@pytest.mark.parametrize(
    ("node_option", "submit_option"), [("--no-unix", ()), ("", ("--set", "wire.unix=false"))]
)
def test_unix_sockets_can_be_switched_off(
    start_nodes, submit, tmp_path, node_option, submit_option
):
    nodes = start_nodes(2, *filter(None, [node_option]))
    assert submit(nodes, {}, *submit_option).code == 0
    later, earlier = roads(tmp_path)
    assert later.startswith("linked to worker 1 over TCP 127.0.0.1:")
    assert earlier == f"linked to worker 0 over TCP {nodes[0].address}"


@pytest.mark.parametrize("with_secret", [False, True])
def test_a_job_over_tls(start_nodes, submit, tls, secret, tmp_path, with_secret):
    more = {"secret_file": secret} if with_secret else {}
    nodes = start_nodes(2, *options({**tls, **more}))
    done = submit(nodes, {**tls, **more})
    assert done.code == 0, done.err
    later, earlier = roads(tmp_path)
    assert later.startswith("linked to worker 1 over TLS 127.0.0.1:")
    assert earlier == f"linked to worker 0 over TLS {nodes[0].address}"


def test_tls_and_no_tls_do_not_go_together(start_nodes, submit, tls):
    refused(submit(start_nodes(1), tls), "no TLS: the other end")
    refused(submit(start_nodes(1, *options(tls)), {}), "the node speaks TLS only: give the caller")


def test_a_certificate_that_does_not_hold_is_refused(start_nodes, submit, tls, tmp_path):
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other").issue("stranger")
    nodes = start_nodes(1, *options(tls))
    refused(submit(nodes, {**tls, "tls_ca": other["tls_ca"]}), "certificate does not hold: ")
    refused(submit(nodes, {**other, "tls_ca": tls["tls_ca"]}), "may not take our tls_cert")
    nodes[0].process.wait_for("no TLS: the other end's certificate does not hold: unable to get")


def test_a_secret_lets_a_node_listen_beyond_this_machine(start_nodes, secret):
    (node,) = start_nodes(1, "--host", "0.0.0.0", "--secret-file", secret, "--allow-code")
    assert node.stop() == 0


def test_a_new_secret_is_written_once(command, tmp_path):
    done = command("new", "secret", "mine")
    assert (done.code, done.err) == (0, "")
    assert (tmp_path / "mine").read_text().strip() not in done.out
    again = command("new", "secret", "mine")
    assert again.code == 2
    assert again.err == "aiosgd: mine exists; a secret never takes the place of a file\n"


def test_run_keeps_its_nodes_to_itself_whatever_the_environment_says(
    command, tmp_path, monkeypatch
):
    monkeypatch.setenv("AIOSGD_SECRET_FILE", str(tmp_path / "none"))
    done = command("run", "--max-steps", 2, "--title", "secure")
    assert done.code == 0, done.err
    assert roads(tmp_path) == [f"linked to worker {i} over a unix socket" for i in (1, 0)]
    (folder,) = (tmp_path / "runs").iterdir()
    assert results.read_summary(folder).state == "done"
