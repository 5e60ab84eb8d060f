import io
import os
import zipfile
from pathlib import Path

import pytest

import job


def test_a_folder_is_returned_as_a_path(tmp_path):
    assert job.require_folder(str(tmp_path), flag="--data", variable="X") == tmp_path


@pytest.mark.parametrize("kind, words", [("zip", "is a zip file, not a folder: give the folder it unpacks to with"),
                                         ("text", "is a file, not a folder: give the folder that holds it with")])
def test_a_file_in_place_of_a_folder_is_named_as_what_it_is(tmp_path, kind, words):
    path = tmp_path / "scans"
    path.write_text("no DICOM")
    if kind == "zip":
        zipfile.ZipFile(path, "w").close()
    with pytest.raises(job.InputError) as error:
        job.require_folder(path, flag="--data", variable="TRAINML_DATA_PATH")
    assert str(error.value) == f"{path} {words} --data, or set TRAINML_DATA_PATH"


@pytest.mark.parametrize("output, left_out", [
    ("data/results", ["data/results"]),
    ("data", ["data/images", "data/validation", "data/logs"]),
    (".", ["images", "validation", "logs"]),
])
def test_only_folders_of_results_are_left_out_of_the_data(tmp_path, output, left_out):
    found = job.result_folders(tmp_path / output, tmp_path / "data")
    assert found == [tmp_path / name for name in left_out]


@pytest.mark.parametrize("files, cores", [
    ({"cpu.max": "150000 100000\n"}, 2), ({"cpu.max": "max 100000\n"}, 4), ({}, 4),
    ({"cpu.max": "10000 100000\n"}, 1), ({"cpu.max": "6400000 100000\n"}, 4),
    ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
])
def test_the_quota_of_a_container_limits_the_cores(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(os, "process_cpu_count", lambda: 4, raising=False)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert job.usable_cores(tmp_path) == cores


def test_only_cores_of_this_process_count():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert job.usable_cores(Path("/no/such/folder")) == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("error, status, message", [
    (job.InternalError("nothing could be read"), 1, "error: nothing could be read"),
    (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), 2, "set TMPDIR to one that can"),
])
def test_errors_are_one_line_and_a_status(capsys, monkeypatch, error, status, message):
    def main():
        raise error
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as ended:
        job.run(main)
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == status and line.endswith(message)
