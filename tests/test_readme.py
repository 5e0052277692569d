"""The front door tells the truth: its code runs, its commands and options exist."""

import itertools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

from aiosgd.cli import app
from aiosgd.codecs.testing import LocalCluster
from aiosgd.plugins.kinds import KINDS
from aiosgd.runtime.config import load_cluster, make_job

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words and words[0] == "aiosgd"]


def readme_codec() -> type:
    source = next(block for block in blocks("python") if "class Plain" in block)
    namespace: dict = {}
    exec(compile(source, "README.md", "exec"), namespace)
    return namespace["Plain"]


@pytest.mark.parametrize("seed", range(5))
async def test_the_codec_in_20_lines_computes_the_mean(seed):
    cluster = LocalCluster(readme_codec(), workers=5, seed=seed)
    results = await cluster.step({worker: np.full(3, worker, "f4") for worker in range(5)})
    for result in results.values():
        np.testing.assert_array_equal(result, np.full(3, 2, "f4"))


def test_the_codec_has_20_lines():
    source = next(block for block in blocks("python") if "class Plain" in block)
    code = [line for line in source.splitlines() if line.strip() and line.strip()[0] not in '#"']
    assert len(code) <= 20


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_and_option_exists(words):
    command = get_command(app).commands[words[1]]
    known = {flag for parameter in command.params for flag in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known | {"--help"}


@pytest.mark.parametrize("words", [w for w in commands() if "--set" in w], ids=" ".join)
def test_every_set_is_accepted(words):
    sets = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
    assert make_job({}, sets)


def test_the_cluster_file_is_valid(tmp_path):
    text = next(block for block in blocks("toml") if "workers" in block)
    (tmp_path / "cluster.toml").write_text(text)
    assert len(load_cluster(tmp_path / "cluster.toml").workers) == 2


@pytest.mark.parametrize(
    "kind",
    ["codec", "compressor", "model", "dataset", "optimizer", "assignment", "partition", "topology"],
)
def test_every_built_in_is_named(kind):
    for entry in KINDS[kind].entries():
        if entry.distribution == "aiosgd":
            assert f"`{entry.name}`" in README


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./-]+)\)", README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("script", re.findall(r"python (tests/bench/\w+\.py)", README))
def test_benchmarks_exist(script):
    assert (ROOT / script).exists()


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
