"""A training run that is killed again and again must end as if nothing had happened."""

import json
import random
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, assert_same_weights

pytestmark = pytest.mark.linux
KILLS = 20


def begin(flags):
    """Starts a run and returns its process when the images are prepared and the training
    begins."""
    words = [sys.executable, ROOT / "train.py", *flags]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True)
    assert any("validation images" in line for line in process.stdout)
    return process


def history(save):
    return json.loads((save / "metrics.json").read_text())["history"]


@pytest.mark.soak
def test_killed_runs_end_with_the_weights_of_an_undisturbed_one(train_flags, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    process = begin([*train_flags, "--save", undisturbed, "--epochs", 3])
    began = time.monotonic()
    process.communicate()
    duration = time.monotonic() - began
    assert process.returncode == 0

    rng, kills, runs, caught = random.Random(7), 0, 0, 0
    while kills < KILLS:
        save, ended = tmp_path / f"run {runs}", False
        while not ended:
            last = save / "last.pth.tar"
            more = ["--checkpoint", last] if last.exists() else ["--epochs", 3]
            process = begin([*train_flags, "--save", save, *more])
            try:
                process.communicate(timeout=rng.uniform(0, duration) if kills < KILLS else None)
                assert process.returncode == 0
                ended = True
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate(timeout=60)  # nothing else may hold the pipe
                kills += 1
                parts = list(save.glob(".*.part"))
                caught += len(parts) > 0
                print(f"kill {kills} of {KILLS}{', while a file was written' if parts else ''}",
                      flush=True)
                for part in parts:
                    part.unlink()
        for name in ("last.pth.tar", "final.pth.tar"):
            assert_same_weights(save / name, undisturbed / name)
        assert history(save) == history(undisturbed)
        shutil.rmtree(save)
        runs += 1
    print(f"{kills} kills, {caught} of them while a file was written; all {runs} runs ended with "
          "the right weights")
