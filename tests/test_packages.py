"""Plugins in distributions of their own, installed by pip into an environment of their own."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parent / "packages"

pytestmark = pytest.mark.slow


class Environment:
    """A virtual environment that sees what this one has, and what is installed into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self.python = folder / "venv/bin/python"
        (own,) = (folder / "venv/lib").glob("python*/site-packages")
        lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
        (own / "parent.pth").write_text("\n".join(lines) + "\n")

    def install(self, *names: str) -> None:
        """Install from tests/packages; nothing is downloaded."""
        copies = [
            shutil.copytree(PACKAGES / name, self.folder / name, dirs_exist_ok=True)
            for name in names
        ]
        self._run(
            *(sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet"),
            *("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"),
            *copies,
        ).check_returncode()

    def aiosgd(self, *words: object) -> subprocess.CompletedProcess[str]:
        return self._run(self.python, "-m", "aiosgd", *words)

    def _run(self, *command: object) -> subprocess.CompletedProcess[str]:
        # the backend that builds the wheels is installed beside the tests
        return subprocess.run(
            list(map(str, command)),
            cwd=self.folder,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    pytest.importorskip("hatchling")
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.install("good", "broken")
    return environment


def test_plugins_of_other_distributions_are_listed_broken_ones_included(environment):
    listed = environment.aiosgd("plugins", "codec", "--json")
    assert listed.returncode == 0, listed.stderr
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert (rows["median"]["distribution"], rows["median"]["version"]) == ("aiosgd-median", "1.2.3")
    assert rows["broken"]["distribution"] == "aiosgd-broken"
    assert {"plain", "fedavg"} <= rows.keys()


def test_a_codec_trains_by_its_name(environment):
    words = ("--codec", "median", "--set", "codec.scale=2.0", "--epochs", 3, "--workers", 3)
    done = environment.aiosgd("run", *words, "--batch-size", 32, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["state"] == "done"
    assert summary["metrics"]["accuracy"] > 0.6
    job = (environment.folder / "runs" / summary["job_id"] / "job.toml").read_text()
    assert "aiosgd-median 1.2.3" in job


def test_a_codecs_parameters_are_shown_and_checked(environment):
    shown = environment.aiosgd("plugins", "show", "codec", "median")
    assert "scale = 1.0  (a number)" in shown.stdout
    wrong = environment.aiosgd("run", "--codec", "median", "--set", "codec.scal=2")
    assert wrong.returncode == 2
    assert "did you mean 'scale'?" in wrong.stderr


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("run", "--codec", "broken"), "SystemExit: this plugin has had enough"),
        (("plugins", "show", "codec", "broken"), "SystemExit: this plugin has had enough"),
        (("run", "--model", "missing"), "ModuleNotFoundError: No module named"),
    ],
)
def test_a_broken_plugin_is_named_with_its_distribution_and_cause(environment, words, cause):
    done = environment.aiosgd(*words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "from aiosgd-broken 0.1" in line
    assert cause in line


def test_a_name_that_two_distributions_claim_is_an_error_that_names_both(environment):
    environment.install("clash")
    done = environment.aiosgd("run", "--codec", "median")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "aiosgd-median 1.2.3" in line
    assert "aiosgd-clash 2.0" in line
    assert "uninstall one of them" in line
    assert environment.aiosgd("plugins", "codec").returncode == 0
    assert environment.aiosgd("run", "--codec", "plain", "--max-steps", 1).returncode == 0
