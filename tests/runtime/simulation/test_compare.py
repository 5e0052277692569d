"""Predictions beside measurements: of simulated runs, which are exact, and of real ones."""

import dataclasses
import json
import math

import numpy as np
import pytest

import aiosgd
from aiosgd.errors import ConfigError
from aiosgd.runtime import results
from aiosgd.runtime.results import TRAIN
from aiosgd.runtime.simulation.compare import (
    Comparison,
    Figures,
    compare,
    error,
    figures,
)
from aiosgd.runtime.simulation.network import NetworkModel, Path
from aiosgd.runtime.simulation.networks import replayed

SLOW = NetworkModel(
    name="slow", bytes_per_s=1e6, path=Path(latency_s=0.01, jitter_s=0.005), block_s=0.02
)


@pytest.fixture
def simulated(tmp_path):
    """`simulated(**options)`: the folder of a run that was simulated on SLOW."""

    def run(**options):
        given = {"network": SLOW, "workers": 3, "epochs": 2, "seed": 5, **options}
        return aiosgd.simulate(output=tmp_path / "runs", **given).folder

    return run


def table(*rows):
    """Return a table like train.csv of (node, step, time_s, wait_s)."""
    made = np.zeros(len(rows), TRAIN)
    for name, column in zip(
        ("node", "step", "time_s", "wait_s"), zip(*rows, strict=True), strict=True
    ):
        made[name] = column
    return made.view(np.recarray)


# Figures --------------------------------------------------------------------------------------


def test_figures_are_medians_over_nodes_and_steps():
    rows = table(
        (0, 0, 9.0, 0.1), (0, 1, 10.0, 0.2), (0, 2, 13.0, 0.3), (1, 0, 1.0, 0.4), (1, 1, 10.0, 9.0)
    )
    assert figures(rows, 900, 4.0) == Figures(
        step_s=3.0, wait_s=0.3, bytes_per_step=300.0, train_s=4.0
    )


def test_a_single_step_has_no_pause():
    found = figures(table((0, 0, 9.0, 0.1)), 10, 1.0)
    assert math.isnan(found.step_s)
    assert (found.wait_s, found.bytes_per_step) == (0.1, 10)


def test_no_step_at_all_is_no_error():
    found = figures(np.zeros(0, TRAIN).view(np.recarray), 0, 0.0)
    assert all(math.isnan(x) for x in (found.step_s, found.wait_s, found.bytes_per_step))


@pytest.mark.parametrize(
    ("predicted", "measured", "expected"),
    [(3.0, 2.0, 0.5), (1.0, 2.0, -0.5), (2.0, 2.0, 0.0), (0.0, 0.0, 0.0)],
)
def test_error(predicted, measured, expected):
    assert error(predicted, measured) == expected


def test_an_error_of_nothing_is_unknown():
    assert math.isnan(error(1.0, 0.0))


def comparison(sent, expected, *, is_exact=True):
    one = Figures(step_s=1.0, wait_s=math.nan, bytes_per_step=sent, train_s=2.0)
    other = dataclasses.replace(one, bytes_per_step=expected, step_s=1.5)
    return Comparison(run="r", network="n", predicted=other, measured=one, is_exact=is_exact)


def test_other_bytes_are_worth_a_warning_where_they_have_to_be_the_same():
    assert "the run sent 100 bytes per step, its simulation 101:" in comparison(100, 101).warning
    assert not comparison(100, 100).warning
    assert not comparison(100, 101, is_exact=False).warning


def test_json_has_no_nan():
    made = comparison(100, 100).to_dict()
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made["figures"]["step_s"] == {"predicted": 1.5, "measured": 1.0, "error": 0.5}
    assert made["figures"]["wait_s"]["error"] is None


# Simulated runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["plain", "allreduce", "parameter_server"])
def test_a_simulated_run_is_predicted_exactly(simulated, tmp_path, codec):
    compared = compare(simulated(codec=codec), SLOW, tmp_path)
    assert compared.errors == pytest.approx(dict.fromkeys(compared.errors, 0.0), abs=1e-9)
    assert (compared.network, compared.warning) == ("slow", "")


def test_another_network_is_off_by_what_it_changes(simulated, tmp_path):
    faster = dataclasses.replace(SLOW, block_s=0.01)
    compared = compare(simulated(), faster, tmp_path)
    saved = compared.measured.step_s - compared.predicted.step_s
    assert saved == pytest.approx(0.01, rel=0.2)
    assert compared.errors["bytes_per_step"] == 0


def test_replayed_block_times_are_those_of_the_run(simulated, tmp_path):
    noisy = dataclasses.replace(SLOW, noise=0.9)
    folder = simulated(network=noisy)
    replaying = dataclasses.replace(SLOW, replayed_s=replayed(folder))
    exact, other = (compare(folder, model, tmp_path).errors for model in (replaying, SLOW))
    assert exact == pytest.approx(dict.fromkeys(exact, 0.0), abs=1e-7)
    assert abs(other["train_s"]) > 0.01


def test_async_runs_need_not_send_the_same(simulated, tmp_path):
    assert not compare(simulated(mode="async"), SLOW, tmp_path).is_exact


def test_a_run_that_failed_is_refused(simulated, tmp_path):
    folder = simulated()
    summary = results.read_summary(folder)
    (folder / "summary.json").unlink()
    results.write_summary(folder, dataclasses.replace(summary, state="failed"))
    with pytest.raises(ConfigError, match=r"summary\.json: state is failed; expected done"):
        compare(folder, SLOW, tmp_path)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"summary\.json"):
        compare(tmp_path, SLOW, tmp_path)


# A real run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["plain", "allreduce", "parameter_server"])
def test_a_real_run_sends_what_its_simulation_sends(cluster, tmp_path, codec):
    run = aiosgd.submit(cluster, codec=codec, workers=3, max_steps=12, output=tmp_path / "runs")
    compared = compare(run.folder, NetworkModel(), tmp_path)
    assert compared.predicted.bytes_per_step == compared.measured.bytes_per_step
    assert not compared.warning
    assert compared.measured.train_s == run.summary.train_s
    assert 0 < compared.measured.step_s < compared.measured.train_s
