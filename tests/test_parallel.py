"""What a process is told by its launcher, and how its errors are reported."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

import cli
import parallel
from parallel import Launch

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
KUBEFLOW = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-0", "MASTER_PORT": "23456"}


@pytest.fixture
def launch(monkeypatch):
    """launch(variables) sets these of a launcher's variables and no other."""
    def launch(variables):
        for name in LAUNCH:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    return launch


LEFT_OVER = [
    {}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": ""}, {"LOCAL_RANK": "1"},
    dict.fromkeys(LAUNCH, ""), {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3"},
    {"RANK": "one", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "many"}]


@pytest.mark.parametrize("variables", LEFT_OVER)
def test_variables_that_are_left_over_are_those_of_a_single_process(launch, variables):
    launch(variables)
    assert parallel.find_launch() == Launch()
    assert parallel.join("cpu", "fp32")[-2:] == (0, 1)


def test_torchrun_tells_a_process_its_place(launch):
    launch({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    assert parallel.find_launch() == Launch(world=8, local_rank=1, local_world=4)


def test_a_launcher_without_local_variables_has_one_process_a_machine(launch):
    launch(KUBEFLOW)
    assert parallel.find_launch() == Launch(world=2, local_rank=0, local_world=1)


@pytest.mark.parametrize("variables", [{"LOCAL_RANK": "1"}, {"WORLD_SIZE": "2"}, KUBEFLOW])
def test_a_process_that_is_first_on_its_machine_prints(variables):
    others = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    script = "import parallel; parallel.run(lambda: print('epoch 1'))"
    printed = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True,
                                      env=others | variables)
    assert printed == "epoch 1\n"


def test_processes_that_lack_a_variable_are_refused_in_one_line(launch):
    launch({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "23456"})
    with pytest.raises(cli.InputError, match="2 processes cannot be connected .*MASTER_ADDR.*: "
                                             "start them with torchrun, or unset WORLD_SIZE"):
        parallel.join("cpu", "fp32")


@pytest.mark.parametrize("message", [
    "[gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer",
    "[gloo/transport/tcp/pair.cc:393] writev: Broken pipe"])
def test_a_lost_connection_says_that_another_process_has_ended(launch, monkeypatch, message):
    def main():
        raise RuntimeError(message)
    launch({})
    monkeypatch.setattr(cli, "run", lambda run_in_turn: run_in_turn())
    with pytest.raises(cli.Failure, match="another process of this run has ended"):
        parallel.run(main)


STOPPED_WHILE_IT_EXPLAINS = """
import os, signal
import parallel
parallel.FIRST_SECONDS = 0

class Error(RuntimeError):
    def __str__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return "the first process has ended"

def main():
    raise Error

parallel.run(main)
"""


@pytest.mark.parametrize("rank, status, lines", [
    ("0", 143, ["-c: stopped"]), ("1", -15, [])])
def test_a_process_that_is_stopped_while_it_explains_an_error_has_no_traceback(
        rank, status, lines):
    process = subprocess.run([sys.executable, "-c", STOPPED_WHILE_IT_EXPLAINS], text=True,
                             env=os.environ | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                                               "PYTHONPATH": str(ROOT)},
                             stderr=subprocess.PIPE)
    assert (process.returncode, process.stderr.splitlines()) == (status, lines)
