"""Jobs on real nodes, their trackers, and the nodes' metrics, as users have them."""

import asyncio
import json
import re
import signal
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

import aiosgd
from aiosgd import aio
from aiosgd.errors import ConfigError
from aiosgd.runtime import results

pytestmark = pytest.mark.usefixtures("no_process_left")


def lines_of(folder):
    return [json.loads(line) for line in (folder / "job.jsonl").read_text().splitlines()]


def tables_of(lines):
    return [line["table"] for line in lines if "table" in line]


def check_whole(outcome):
    lines = lines_of(outcome.folder)
    rows = [line for line in lines if line.get("table") == "train"]
    assert [(row["node"], row["step"], row["loss"]) for row in rows] == [
        (row.node, row.step, row.loss) for row in outcome.train
    ]
    assert tables_of(lines).count("eval") == len(outcome.eval)
    assert lines[-1]["summary"] == outcome.summary.to_dict()
    return lines


@pytest.fixture
def two(shared_nodes, cluster_of):
    return cluster_of(shared_nodes[:2])


def test_news_come_while_a_job_trains_and_tables_when_it_has_ended(two, tmp_path):
    options = {"max_steps": 2000, "epochs": 1000, "output": tmp_path, "target_accuracy": 0.9}
    outcome = aiosgd.submit(two, tracker=["jsonl"], **options)
    lines = check_whole(outcome)
    assert lines[0]["nodes"] == {str(i): str(address) for i, address in enumerate(two.workers)}
    events = [line["event"] for line in lines if "event" in line]
    assert events[0] == "begin"
    assert events.count("evaluation") == len(outcome.eval)
    first = next(line for line in lines if line.get("event") == "evaluation")
    tested = outcome.eval[outcome.eval.node == first["node"]][0]
    assert (first["step"], first["accuracy"]) == (tested.step, tested.accuracy)


def test_a_job_that_was_left_to_its_nodes_is_tracked_when_it_is_fetched(two, tmp_path):
    async def work():
        folder = await aio.start(two, output=tmp_path, max_steps=3, tracker="jsonl")
        assert not (folder / "job.jsonl").exists()
        while any(one.status.job_id for one in await aio.status(two)):
            await asyncio.sleep(0.05)
        # of a submitter that was killed while it tracked, too
        (folder / "job.jsonl").write_text('{"event": "begin"}\n')
        outcome = await aio.fetch(two, folder.name, tmp_path)
        (tmp_path / "other" / folder.name).mkdir(parents=True)
        (tmp_path / "other" / folder.name / "job.jsonl").touch()  # of nobody knows whom
        with pytest.raises(ConfigError, match="exists already"):
            await aio.fetch(two, folder.name, tmp_path / "other")
        return outcome

    lines = check_whole(asyncio.run(asyncio.wait_for(work(), 60)))
    assert [line["event"] for line in lines if "event" in line] == ["begin", "begin", "end"]


def test_a_job_that_was_not_submitted_from_here_tells_no_tracker(two, tmp_path):
    """Its options come from its nodes, and trackers send what there is to whom they name."""

    async def work():
        folder = await aio.start(two, output=tmp_path, max_steps=3, tracker="jsonl")
        while any(one.status.job_id for one in await aio.status(two)):
            await asyncio.sleep(0.05)
        notes = []
        outcome = await aio.fetch(two, folder.name, tmp_path / "other", note=notes.append)
        return outcome, notes

    outcome, notes = asyncio.run(asyncio.wait_for(work(), 60))
    assert outcome.summary.state == "done"
    assert not (outcome.folder / "job.jsonl").exists()
    assert notes == [
        "the job's trackers (jsonl) are told nothing: the job was not submitted from here"
    ]


def test_a_tracker_that_is_not_installed_where_a_job_is_fetched_is_a_line(
    two, tmp_path, monkeypatch
):
    async def work():
        folder = await aio.start(two, output=tmp_path, max_steps=3, tracker="wandb")
        while any(one.status.job_id for one in await aio.status(two)):
            await asyncio.sleep(0.05)
        monkeypatch.setitem(__import__("sys").modules, "wandb", None)
        notes = []
        outcome = await aio.fetch(two, folder.name, tmp_path, note=notes.append)
        return outcome, notes

    monkeypatch.setattr("aiosgd.plugins.trackers.wandb.Wandb.require", lambda: None)
    outcome, (note,) = asyncio.run(asyncio.wait_for(work(), 60))
    assert outcome.summary.state == "done"
    assert "tracker 'wandb' failed and records no more: tracker wandb needs" in note
    assert note in (outcome.folder / "submit.log").read_text()


def test_a_job_that_is_cancelled_is_tracked_to_its_end(two, tmp_path, start_command, write_cluster):
    words = ("--epochs", 1_000_000, "--tracker", "jsonl", "--tracker", "csv")
    submitter = start_command("submit", write_cluster(two), *words)
    submitter.wait_for(r"step \d+/")
    submitter.signal(signal.SIGTERM)
    assert submitter.end() == 130
    (folder,) = (tmp_path / "runs").iterdir()
    lines = lines_of(folder)
    assert any(line.get("event") == "progress" for line in lines)
    assert lines[-1]["summary"]["state"] == "cancelled"
    assert tables_of(lines).count("train") == len(results.read_table(folder, "train"))


def test_a_second_simulation_of_check_is_not_tracked(command, tmp_path):
    words = ("--workers", 2, "--max-steps", 2, "--check", "--tracker", "jsonl")
    done = command("simulate", *words)
    assert done.code == 0, done.err
    assert "a second run is the same" in done.out
    (folder,) = (tmp_path / "runs").iterdir()
    assert sum(line.get("event") == "begin" for line in lines_of(folder)) == 1


# Metrics ------------------------------------------------------------------------------------------


def test_a_node_says_where_its_metrics_are(start_nodes, cluster_of, tmp_path):
    (node,) = start_nodes(1, "--metrics-port", 0)
    url = re.search(
        r"^aiosgd node metrics on (http://127\.0\.0\.1:\d+/metrics)$",
        node.process.out,
        re.MULTILINE,
    )
    aiosgd.submit(cluster_of([node]), max_steps=3, output=tmp_path)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url[1], timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    assert samples["aiosgd_steps_total"] == 3
