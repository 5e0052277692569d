"""What a node checks and keeps of a job."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from aiosgd.errors import ClusterError, CodecError, ConfigError
from aiosgd.runtime.config import JobConfig
from aiosgd.runtime.part import (
    Settings,
    check_code,
    check_files,
    check_request,
    file_path,
    first_error,
    job_folder,
    keep_sources,
    store_file,
)

JOB = "20250102-030405-test-0123"
SHA = hashlib.sha256(b"data").hexdigest()


@pytest.fixture
def settings(tmp_path):
    return Settings(run_dir=tmp_path / "runs", data_dir=tmp_path / "data")


def request(**facts):
    return {"job_id": JOB, "node": 0, "sources": [], "plugins": [], "files": [], **facts}


def test_a_jobs_folder_is_inside_the_run_dir(settings):
    assert job_folder(settings, JOB, -1) == settings.run_dir / JOB / "nodes" / "-1"


@pytest.mark.parametrize("job_id", ["", "..", "../x", f"{JOB}/..", f"/{JOB}", JOB.upper() + "\n"])
def test_a_job_id_from_a_peer_never_leads_elsewhere(settings, job_id):
    with pytest.raises(ConfigError, match="job id"):
        job_folder(settings, job_id, 0)


@pytest.mark.parametrize(
    "sha256", [None, 7, "", "x", "../" + SHA, SHA[:-1], SHA + "0", SHA.upper()]
)
def test_only_a_sha256_names_a_data_file(tmp_path, sha256):
    with pytest.raises(ConfigError, match="is no sha256"):
        file_path(tmp_path, sha256)


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    data = np.frombuffer(b"data", np.uint8)
    store_file(tmp_path, SHA, data)
    store_file(tmp_path, SHA, data)
    with pytest.raises(ConfigError, match=f"sha256 is {SHA}; the submitter said 000"):
        store_file(tmp_path, "0" * 64, data)
    assert [path.name for path in (tmp_path / "sha256").iterdir()] == [SHA]
    assert file_path(tmp_path, SHA).read_bytes() == b"data"


def test_a_kept_file_is_asked_for_again_if_its_size_is_wrong(settings):
    question = request(files=[["x.npz", SHA, 4]])
    assert check_request(question, settings) == [SHA]
    store_file(settings.data_dir, SHA, np.frombuffer(b"data", np.uint8))
    assert check_request(question, settings) == []
    file_path(settings.data_dir, SHA).write_bytes(b"dat")
    assert check_request(question, settings) == [SHA]


def test_a_damaged_file_is_removed_before_it_is_used(tmp_path):
    store_file(tmp_path, SHA, np.frombuffer(b"data", np.uint8))
    path = file_path(tmp_path, SHA)
    check_files({"x.npz": path})
    path.write_bytes(b"date")
    with pytest.raises(ConfigError, match=r"x\.npz was damaged"):
        check_files({"x.npz": path})
    assert not path.exists()


def test_source_code_needs_a_node_that_takes_it(settings):
    with pytest.raises(ClusterError, match=r"my\.py:My is the job's own code.*--allow-code"):
        check_request(request(sources=["my.py:My"]), settings)
    willing = Settings(run_dir=settings.run_dir, data_dir=settings.data_dir, allow_code=True)
    assert check_request(request(sources=["my.py:My"]), willing) == []


@pytest.mark.parametrize("factory", ["subprocess:run", "my.py:make", 3])
def test_a_job_that_names_code_of_its_own_needs_a_node_that_takes_it(settings, factory):
    job = JobConfig(model="torch", model_params={"factory": factory})
    with pytest.raises(ClusterError, match=rf"{factory} is the job's own code.*--allow-code"):
        check_code(job, [], settings)


def test_a_willing_node_wants_the_files_and_only_those(settings):
    willing = dataclasses.replace(settings, allow_code=True)
    module = JobConfig(model="torch", model_params={"factory": "pkg:make"})
    file = JobConfig(model="torch", model_params={"factory": "my.py:make"})
    check_code(module, [], willing)
    check_code(file, [["my.py:make", b""]], willing)
    for job, sources in ((file, []), (module, [["my.py:make", b""]])):
        with pytest.raises(ConfigError, match="the job names the files"):
            check_code(job, sources, willing)


def test_what_reads_a_data_set_is_no_code_that_a_node_runs(settings):
    check_code(JobConfig(dataset="torch", dataset_params={"factory": "pkg:read"}), [], settings)


def test_plugins_must_be_of_the_same_distribution_and_version(settings):
    from importlib.metadata import version

    mine = version("aiosgd")
    assert check_request(request(plugins=[["codec", "plain", "aiosgd", mine]]), settings) == []
    for distribution, other in (("aiosgd", "0.0.1"), ("other", mine)):
        with pytest.raises(ClusterError, match="install the same version on both") as caught:
            check_request(request(plugins=[["codec", "plain", distribution, other]]), settings)
        assert f"from {distribution} {other} at the submitter" in str(caught.value)


def test_sources_are_kept_under_names_of_our_own_and_logged(tmp_path):
    lines = []
    sources = [
        [name, np.frombuffer(text, np.uint8)]
        for name, text in (("../../a.py:A", b"one"), ("b.py:B", b"two"))
    ]
    kept = keep_sources(tmp_path, sources, lines.append)
    assert kept == {
        "../../a.py:A": tmp_path / "codec_0.py",
        "b.py:B": tmp_path / "codec_1.py",
    }
    assert [Path(path).read_bytes() for path in kept.values()] == [b"one", b"two"]
    assert hashlib.sha256(b"one").hexdigest() in lines[0]


def test_the_first_deliberate_error_of_a_group_is_the_reason():
    ours, bug = CodecError("ours"), KeyError("bug")
    assert first_error(bug) is bug
    assert first_error(ExceptionGroup("", [bug, ExceptionGroup("", [ours])])) is ours
    assert first_error(ExceptionGroup("", [bug, ValueError()])) is bug
