"""Who may import whom: downward only, no input or output in the pure files, one door each."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "aiosgd"

# from the ground up; a module may import from layers below its own, never from its own or above
LAYERS = [
    "aiosgd aiosgd.errors",
    "aiosgd.plugins.registry aiosgd.codecs.base aiosgd.runtime.frame aiosgd.runtime.job",
    (
        "aiosgd.runtime.toml_source aiosgd.runtime.connection aiosgd.runtime.executor "
        "aiosgd.runtime.pool aiosgd.runtime.security aiosgd.runtime.handshake aiosgd.plugins.code "
        "aiosgd.codecs.fedavg aiosgd.codecs.parameter_server aiosgd.codecs.plain aiosgd.codecs.gossip"
    ),
    "aiosgd.runtime.config aiosgd.codecs.* aiosgd.plugins.* aiosgd.legacy aiosgd.runtime.endpoint",
    (
        "aiosgd.plugins.kinds aiosgd.runtime.results aiosgd.runtime.hello aiosgd.runtime.mesh "
        "aiosgd.runtime.finite aiosgd.plugins.torch aiosgd.plugins.jax "
        "aiosgd.plugins.torch.model aiosgd.plugins.torch.dataset "
        "aiosgd.codecs.quantised"
    ),
    (
        "aiosgd.runtime.workload aiosgd.runtime.actor aiosgd.runtime.probe aiosgd.catalogue "
        "aiosgd.runtime.checkpoint aiosgd.ddp"
    ),
    "aiosgd.runtime.learner aiosgd.runtime.record aiosgd.runtime.watchdog aiosgd.runtime.tracking",
    "aiosgd.runtime.archive",
    "aiosgd.runtime.session aiosgd.runtime.harvest",
    "aiosgd.runtime.coordinator aiosgd.display",
    "aiosgd.runtime.part",
    "aiosgd.runtime.visit aiosgd.runtime.metrics",
    "aiosgd.runtime.node aiosgd.runtime.survey",
    "aiosgd.runtime.simulation.*",
    "aiosgd.check.*",
    "aiosgd.aio",
    "aiosgd.api aiosgd.launch aiosgd.bench aiosgd.bench.rows aiosgd.bench.peers aiosgd.bench.gloo",
    "aiosgd.bench.wire aiosgd.bench.jobs",
    "aiosgd.bench.calibrate aiosgd.testing",
    "aiosgd.cli_jobs aiosgd.cli_launch aiosgd.runtime.supervisor aiosgd.report.* aiosgd.scaffold.*",
    "aiosgd.dashboard.*",
    "aiosgd.cli_dashboard",
    "aiosgd.cli",
    "aiosgd.__main__",
]
# never import what does or waits for anything: time is an input, randomness is a generator
PURE = ["runtime/frame.py", "runtime/handshake.py", "runtime/job.py", "runtime/toml_source.py"]
PURE += [
    "plugins/compressors/base.py",
    "plugins/compressors/casts.py",
    "plugins/compressors/chain.py",
    "plugins/compressors/packing.py",
    "plugins/compressors/sparse.py",
    "plugins/compressors/lowrank.py",
    "plugins/compressors/feedback.py",
    "plugins/compressors/lossless.py",
    "plugins/compressors/rotations.py",
    "plugins/topologies.py",
    "plugins/compressors/quantisers.py",
    "plugins/compressors/signs.py",
    "plugins/optimizers.py",
    "plugins/models.py",
    "plugins/partitions.py",
]
PURE += ["plugins/assignments.py", "codecs/base.py", "codecs/plain.py", "codecs/local.py"]
PURE += [
    "codecs/decentralised.py",
    "codecs/choco.py",
    "codecs/asynchronous.py",
    "codecs/local_sgd.py",
    "codecs/gossip.py",
    "codecs/federated.py",
    "codecs/robust.py",
    "codecs/private.py",
    "codecs/fedavg.py",
    "codecs/parameter_server.py",
    "codecs/allreduce.py",
    "codecs/ef21.py",
    "codecs/quantised.py",
]
DOERS = {"asyncio", "socket", "selectors", "threading", "time", "random", "logging", "uvloop"}
DOORS = {
    "msgpack": {"aiosgd.runtime.frame"},
    "msgpack_numpy": {"aiosgd.runtime.frame"},
    "typer": {"aiosgd.cli", "aiosgd.cli_dashboard", "aiosgd.cli_jobs", "aiosgd.cli_launch"},
    "rich": {"aiosgd.display"},
    "uvloop": {"aiosgd.cli"},
    "safetensors": {"aiosgd.runtime.results", "aiosgd.runtime.checkpoint"},
    "starlette": {"aiosgd.dashboard.server"},
    "uvicorn": {"aiosgd.dashboard.server"},
    "ray": {"aiosgd.plugins.launchers.ray_driver"},
    "zstandard": {"aiosgd.plugins.compressors.lossless"},
    "tomli_w": {"aiosgd.runtime.results"},
    **{name: {f"aiosgd.plugins.trackers.{name}"} for name in ("tensorboard", "mlflow", "wandb")},
    "torch": {"aiosgd.plugins.torch", "aiosgd.ddp", "aiosgd.bench.gloo"},
    "jax": {"aiosgd.plugins.jax"},
    "threadpoolctl": {
        "aiosgd.runtime.part",
        "aiosgd.runtime.simulation.simulate",
        "aiosgd.runtime.simulation.player",
    },
}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports while it runs; types alone do not count."""
    found = set()
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def runtime_nodes(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from runtime_nodes(child)


def layer(module: str) -> int:
    exact = [i for i, names in enumerate(LAYERS) if module in names.split()]
    if exact:
        return exact[0]
    for i, names in enumerate(LAYERS):
        if any(module.startswith(n[:-1]) for n in names.split() if n.endswith(".*")):
            return i
    raise AssertionError(f"{module} has no layer: add it to LAYERS")


def family(module: str) -> str:
    """A folder below `plugins` or `runtime` is one room, and so is `check`."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[1:2] in (["check"], ["report"], ["dashboard"]) else 3])


@pytest.mark.parametrize(
    "module", [m for m in MODULES if m not in ("aiosgd.codecs", "aiosgd.runtime", "aiosgd.check")]
)
def test_imports_go_downward_only(module):
    own = [name for name in imports(MODULES[module]) if name.split(".")[0] == "aiosgd"]
    for other in own:
        assert other in MODULES
        same_room = (
            family(other) == family(module) and module.count(".") >= family(module).count(".") + 1
        )
        in_folder = other.startswith(f"{module}.")
        assert same_room or in_folder or layer(other) < layer(module), f"{module} -> {other}"


@pytest.mark.parametrize("module", MODULES)
def test_plugins_and_codecs_never_see_the_runtime(module):
    if module.startswith(("aiosgd.codecs", "aiosgd.plugins")):
        assert not any(name.startswith("aiosgd.runtime") for name in imports(MODULES[module]))


@pytest.mark.parametrize("file", PURE)
def test_pure_files_do_nothing_but_compute(file):
    assert not {name.split(".")[0] for name in imports(PACKAGE / file)} & DOERS


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_one_door(library):
    users = {
        m for m, path in MODULES.items() if library in {n.split(".")[0] for n in imports(path)}
    }
    assert users == DOORS[library]


def test_the_runtime_knows_no_concrete_plugin():
    concrete = {"plain", "fedavg", "parameter_server", "local", "testing"}
    for module, path in MODULES.items():
        if module.startswith("aiosgd.runtime"):
            assert not {f"aiosgd.codecs.{name}" for name in concrete} & imports(path)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_runs_code_from_data(module):
    text = MODULES[module].read_text()
    assert not re.search(r"\bimport pickle\b|\bpickle\.|(?<![\w.])(eval|exec)\(", text)
    assert "allow_pickle=True" not in text


def test_only_the_command_line_measures():
    for module, path in MODULES.items():
        if any(name.startswith("aiosgd.bench") for name in imports(path)):
            assert module == "aiosgd.cli" or module.startswith("aiosgd.bench.")


def test_no_room_for_leftovers():
    names = {path.stem for path in MODULES.values()}
    banned = {"utils", "util", "common", "helpers", "interfaces", "constants", "types", "manager"}
    assert not names & banned


def test_the_layer_table_names_only_what_exists():
    for names in LAYERS:
        for name in names.split():
            assert name in MODULES or name.endswith(".*"), name
