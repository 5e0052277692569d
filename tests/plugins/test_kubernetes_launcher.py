"""The manifests for Kubernetes: what they say, and that its schemas take them."""

import re

import pytest

from aiosgd.errors import ConfigError
from aiosgd.plugins.launchers import Wanted
from aiosgd.plugins.launchers.kubernetes import Kubernetes, yaml_text
from aiosgd.plugins.registry import make_params


def kubernetes(**values):
    return Kubernetes(make_params(Kubernetes, values, "launcher"))


@pytest.fixture
def wanted(tmp_path):
    (tmp_path / "cluster.secret").write_text("ab" * 32)
    return Wanted(workers=3, servers=1, secret_file=tmp_path / "cluster.secret")


async def test_addresses_are_the_pods_names_and_the_steps_are_kubectl_s(wanted, tmp_path):
    launcher = kubernetes(folder=str(tmp_path / "k"), name="sgd", namespace="lab")
    async with launcher.launch(wanted) as nodes:
        assert nodes.workers[2] == "sgd-worker-2.sgd.lab.svc.cluster.local:9000"
        assert nodes.servers == ("sgd-server-0.sgd.lab.svc.cluster.local:9000",)
    steps = "\n".join(nodes.next_steps)
    assert f"kubectl --namespace lab apply -f {tmp_path / 'k'}" in steps
    assert f"--from-file=secret={wanted.secret_file}" in steps
    assert "never run on a cluster" in steps
    files = {path.name: path.read_text() for path in (tmp_path / "k").iterdir()}
    assert set(files) == {"service.yaml", "worker.yaml", "server.yaml"}
    assert not any("ab" * 32 in text for text in files.values())


async def test_nothing_is_overwritten_nor_half_told(wanted, tmp_path):
    with pytest.raises(ConfigError, match="exists already; name another with"):
        async with kubernetes(folder=str(tmp_path)).launch(wanted):
            raise AssertionError("never gets here")
    with pytest.raises(ConfigError, match=r"launcher\.folder /proc/x: "):
        async with kubernetes(folder="/proc/x").launch(wanted):
            raise AssertionError("never gets here")
    with pytest.raises(ConfigError, match="needs a secret file that stays"):
        async with kubernetes(folder=str(tmp_path / "k")).launch(Wanted(workers=1)):
            raise AssertionError("never gets here")


def test_what_is_asked_for_is_in_the_manifest(wanted):
    launcher = kubernetes(
        image="r/i:1", cpus="4", memory="8Gi", gpus=2, storage="5Gi", storage_class="fast",
        labels={"zone": "b"},
    )  # fmt: skip
    spec = launcher.manifests(wanted)["worker"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["replicas"] == 3
    assert container["image"] == "r/i:1"
    assert container["resources"] == {
        "requests": {"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": "2"},
        "limits": {"memory": "8Gi", "nvidia.com/gpu": "2"},
    }
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["metadata"]["name"] not in {volume["name"] for volume in pod["volumes"]}
    assert pod["nodeSelector"] == {"zone": "b"}


def test_a_node_reads_the_secret_where_its_copy_is(wanted):
    pod = kubernetes().manifests(wanted)["worker"]["spec"]["template"]["spec"]
    (copies,), (node,) = pod["initContainers"], pod["containers"]
    assert copies["command"][-1] == "/run/aiosgd/cluster.secret"
    words = node["command"]
    assert words[words.index("--secret-file") + 1] == "/run/aiosgd/cluster.secret"
    mounted = [{m["name"] for m in c["volumeMounts"]} for c in (copies, node)]
    assert [("secret" in names) for names in mounted] == [True, False]
    assert "--allow-code" not in words
    taking = Wanted(workers=1, allow_code=True)
    node = kubernetes().manifests(taking)["worker"]["spec"]["template"]["spec"]["containers"][0]
    assert node["command"][-1] == "--allow-code"


def test_without_servers_there_is_no_set_of_them():
    assert set(kubernetes().manifests(Wanted(workers=1))) == {"service", "worker"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "My_Name"}, "'My_Name' is no name"),
        ({"namespace": "-x"}, "'-x' is no name"),
        ({"gpus": -1}, "gpus is -1; expected 0 or more"),
    ],
)
def test_parameters_are_checked(values, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        kubernetes(**values)


NASTY = {
    "a": ["yes", "no", "1", "1.5", "", "- x", "a: b", "# c", "ü", "\n", "null", "0x1", "on"],
    "b": [True, False, 1, 1.5, None, [], {}],
    "c": [{"d": [{"e": [[1, 2], ["x"]]}]}],
    "12": {"f": {"g": []}},
    "true": "x",
}


@pytest.mark.extra
def test_the_yaml_reads_back_as_what_it_was_made_of(wanted):
    yaml = pytest.importorskip("yaml")
    for value in (NASTY, *kubernetes(storage="1Gi", gpus=1).manifests(wanted).values()):
        assert yaml.safe_load(yaml_text(value)) == value


@pytest.mark.extra
@pytest.mark.parametrize("values", [{}, {"gpus": 1, "storage": "5Gi", "labels": {"a": "b"}}])
def test_kubernetes_own_schemas_take_the_manifests(wanted, values):
    validate = pytest.importorskip("kubernetes_validate")
    for manifest in kubernetes(**values).manifests(wanted).values():
        validate.validate(manifest, "1.30", strict=True)
    manifest["spec"]["replicas"] = "three"
    with pytest.raises(validate.ValidationError):
        validate.validate(manifest, "1.30", strict=True)
