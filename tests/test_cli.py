import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import cli

# Paths


def test_a_folder_is_returned_as_a_path(tmp_path):
    for found in (cli.require(str(tmp_path), "folder", flag="--data", variable="X"),
                  cli.output_folder(str(tmp_path), flag="--output")):
        assert found == tmp_path and isinstance(found, Path)


def test_a_file_is_returned_as_a_path(tmp_path):
    (tmp_path / "a.csv").touch()
    assert cli.require(str(tmp_path / "a.csv"), "file", flag="--labels") == tmp_path / "a.csv"


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("variable, remedy", [("X", "--data, or set X"), (None, "--data")])
def test_what_does_not_exist_is_named_with_flag_and_variable(tmp_path, kind, variable, remedy):
    path = tmp_path / "nowhere"
    with pytest.raises(cli.InputError) as error:
        cli.require(path, kind, flag="--data", variable=variable)
    assert str(error.value) == f"{path} does not exist: give another with {remedy}"


def test_a_name_too_long_for_any_file_is_one_that_does_not_exist():
    with pytest.raises(cli.InputError, match="xxx does not exist: give another with --data"):
        cli.require("x" * 300, "data", flag="--data")


@pytest.mark.parametrize("kind, words", [
    ("zip", "is a zip file, not the folder that it unpacks to: give another with"),
    ("text", "is a file, not the folder that it is in: give another with")])
def test_a_file_in_place_of_a_folder_is_named_as_what_it_is(tmp_path, kind, words):
    path = tmp_path / "scans"
    path.write_text("no DICOM")
    if kind == "zip":
        zipfile.ZipFile(path, "w").close()
    with pytest.raises(cli.InputError) as error:
        cli.require(path, "folder", flag="--data", variable="TRAINML_DATA_PATH")
    assert str(error.value) == f"{path} {words} --data, or set TRAINML_DATA_PATH"


@pytest.mark.linux
@pytest.mark.parametrize("kind", ["data", "folder"])
def test_a_pipe_is_not_waited_for(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(cli.InputError, match="pipe is neither a file nor a folder: .* --data"):
        cli.require(tmp_path / "pipe", kind, flag="--data")


def test_a_folder_for_results_is_made_and_left_empty(tmp_path):
    cli.output_folder(tmp_path / "not" / "there", flag="--output")
    assert list((tmp_path / "not" / "there").iterdir()) == []


@pytest.mark.linux
def test_a_folder_for_results_that_cannot_be_made_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(cli.InputError, match="cannot write to .*file/x .Not a directory.*--output"):
        cli.output_folder(tmp_path / "file" / "x", flag="--output")


@pytest.mark.parametrize("flag", ["--data", "--table", "--output"])
@pytest.mark.parametrize("address", ["gs://bucket/x", "s3://bucket", "https://host/x"])
def test_an_address_is_refused_to_read_from_and_to_write_to(tmp_path, monkeypatch, flag, address):
    monkeypatch.chdir(tmp_path)
    parser = cli.Parser("")
    for name, kind in (("--data", "folder"), ("--table", "file"), ("--output", "output")):
        parser.add_path(name, kind=kind, help="")
    args = parser.parse_args(["--data", ".", "--output", ".", flag, address])
    with pytest.raises(cli.InputError, match=f"^{address} is an address, .* with {flag}$"):
        parser.check_paths(args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value, path", [("/input", "/input/x"), ("", "data/x"), (None, "data/x")])
def test_a_variable_names_a_folder_unless_it_is_empty(monkeypatch, value, path):
    if value is not None:
        monkeypatch.setenv("TRAINML_DATA_PATH", value)
    assert cli.default_path("TRAINML_DATA_PATH", "x") == path


# Flags


@pytest.mark.parametrize("text, kind, value", [
    ("1", int, 1), ("0.5", float, 0.5), ("3", float, 3.0), ("1", float, 1.0)])
def test_a_number_in_its_bounds_is_taken(text, kind, value):
    found = cli.bounded(0.5, 3, kind)(text)
    assert found == value and type(found) is kind


@pytest.mark.parametrize("text", ["0.4", "3.1", "nan", "inf", "-inf"])
def test_a_number_out_of_its_bounds_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not between 0.5 and 3"):
        cli.bounded(0.5, 3)(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan"])
def test_a_number_that_must_be_above_its_bound_is_refused_at_it(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not above 0"):
        cli.bounded(0, float("inf"), above=True)(text)


def test_infinity_is_refused_where_no_upper_bound_is_set():
    with pytest.raises(argparse.ArgumentTypeError):
        cli.bounded(0, float("inf"))("inf")


@pytest.mark.parametrize("flags, message", [
    (["--x", "0"], "argument --x: 0 is not 1 or more"),
    (["--x", "one"], "argument --x: invalid number value: 'one'"),
    (["--y"], "unrecognized arguments: --y")])
def test_an_unusable_flag_is_refused_in_one_line(flags, message):
    parser = cli.Parser("")
    parser.add_argument("--x", type=cli.bounded(1, float("inf"), int))
    with pytest.raises(cli.InputError) as error:
        parser.parse_args(flags)
    assert str(error.value) == f"{message}; see --help"


@pytest.mark.parametrize("flag, value", [
    ("--rf", "3"), ("--bs", "0"), ("--workers", "0"), ("--device", "mps"), ("--precision", "fp8")])
def test_runtime_options_refuse_unusable_values(flag, value):
    parser = cli.Parser("")
    parser.add_runtime_options(batch_size=8, rescale_factor=4)
    with pytest.raises(cli.InputError, match=flag):
        parser.parse_args([flag, value])


@pytest.mark.parametrize("files, cores", [
    ({"cpu.max": "150000 100000\n"}, 2), ({"cpu.max": "max 100000\n"}, 4), ({}, 4),
    ({"cpu.max": "10000 100000\n"}, 1), ({"cpu.max": "6400000 100000\n"}, 4),
])
def test_the_quota_of_a_container_limits_the_cores(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cli.usable_cores(tmp_path) == cores


@pytest.mark.linux
def test_only_cores_of_this_process_count():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert cli.usable_cores(Path("/no/such/folder")) == 1
    finally:
        os.sched_setaffinity(0, allowed)


# Files


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), cli.atomic_write(tmp_path / "a") as file:
        file.write(b"half of")
        1 / 0
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_an_error_of_the_disk_names_the_file(tmp_path):
    with pytest.raises(OSError) as error, cli.atomic_write(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(tmp_path / "a")


@pytest.mark.linux
def test_names_that_are_not_text_survive(tmp_path):
    text = json.dumps({"caf\udce9": "Ü"}, ensure_ascii=False)
    cli.write_text(tmp_path / "a.json", text)
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"caf\udce9": "Ü"}


def test_a_table_is_written_with_quotes_where_they_are_needed(tmp_path):
    cli.write_csv(tmp_path / "a.csv", [("file", "reason"), (Path("a,b"), "Ü")])
    assert (tmp_path / "a.csv").read_bytes() == 'file,reason\n"a,b",Ü\n'.encode()


# Lines


@pytest.mark.parametrize("items, line", [
    ([], ""), ([Path("a")], "warning: files are odd (1): a\n"),
    (iter(range(5)), "warning: files are odd (5): 0, 1, 2, 3, 4\n"),
    (range(7), "warning: files are odd (7): 0, 1, 2, 3, 4 and 2 more\n")])
def test_a_warning_counts_all_and_names_the_first(capsys, items, line):
    cli.warn("files are odd", items)
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("count, batches", [
    (0, []), (3, [[0, 1, 2]]), (7, [[0, 1, 2], [3, 4, 5], [6]])])
def test_batches_hold_all_items_in_order(count, batches):
    assert list(cli.batched(iter(range(count)), 3)) == batches


def test_progress_prints_plain_lines_in_a_job_log(monkeypatch, capsys):
    monkeypatch.setattr(cli, "LOG_SECONDS", 0)
    assert list(cli.progress(range(3), total=3, description="work")) == [0, 1, 2]
    line = r"work: (\d) of 3 images, .*image.*, .* left"
    done = [re.fullmatch(line, text)[1] for text in capsys.readouterr().out.splitlines()]
    assert done[-1] == "3" and done == sorted(set(done))


def test_progress_tells_units_and_what_the_loop_adds(monkeypatch, capsys):
    monkeypatch.setattr(cli, "LOG_SECONDS", 0)
    bar = cli.progress(range(2), total=2, description="epoch 1", scale=8)
    for step in bar:
        bar.set_postfix_str(f"step {step}", refresh=False)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("epoch 1: 16 of 16 images") and last.endswith("left, step 1")


def test_progress_is_silent_for_short_work(capsys):
    assert list(cli.progress(range(3), total=3, description="work")) == [0, 1, 2]
    assert not capsys.readouterr().out


# How a script ends


@pytest.fixture
def end(capsys, monkeypatch):
    """end(main) runs a script's main and returns its status and the lines on stderr."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr("sys.argv", ["scripts/train.py"])

    def run(main):
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
        return ended.value.code, capsys.readouterr().err.splitlines()
    return run


@pytest.mark.parametrize("error, status, message", [
    (cli.InputError("x is missing: give it with --x"), 2, "error: x is missing: give it with --x"),
    (cli.InternalError("nothing could be read"), 1, "error: nothing could be read"),
    (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), 2,
     "error: no temporary folder is writable: set TMPDIR to one that is"),
    (OSError(28, "No space left on device", "a.tar"), 1,
     "error: No space left on device: a.tar; what was written before is intact"),
    (MemoryError("Unable to allocate 9 GiB"), 1,
     "error: out of memory: lower --batch-size or raise --rescale-factor"),
    (RuntimeError("not enough memory: you tried to allocate memory"), 1,
     "error: out of memory: lower --batch-size or raise --rescale-factor"),
    (RuntimeError("CUDA out of memory. Tried to"), 1,
     "error: out of memory: lower --batch-size or raise --rescale-factor"),
    (KeyboardInterrupt(2), 130, "stopped"), (KeyboardInterrupt(15), 143, "stopped"),
])
def test_errors_are_one_line_and_a_status(end, error, status, message):
    def main():
        raise error
    assert end(main) == (status, [f"train.py: {message}"])


@pytest.mark.parametrize("status", [0, 1, None])
def test_a_script_ends_with_the_status_of_its_main(end, status):
    assert end(lambda: status) == (status, [])


@pytest.mark.parametrize("error", [RuntimeError("a fault"), OSError(5, "Input/output error")])
def test_an_unexpected_error_keeps_its_traceback(monkeypatch, error):
    def main():
        raise error
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(type(error)) as found:
        cli.run(main)
    assert found.value is error


STOPPED_AS_IT_EXITS = """
import atexit, os, signal
import cli
atexit.register(os.kill, os.getpid(), signal.{name})
cli.run(lambda: 0)
"""


@pytest.mark.linux
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_that_comes_while_the_interpreter_ends_leaves_no_traceback(name):
    process = subprocess.run([sys.executable, "-c", STOPPED_AS_IT_EXITS.format(name=name)],
                             text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
                             stderr=subprocess.PIPE)
    assert (process.returncode, process.stderr) == (-getattr(signal, name), "")
