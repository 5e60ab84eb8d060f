"""A training run that is killed again and again must end as if nothing had happened."""

import json
import random
import shutil
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from test_robustness import train_flags  # noqa: F401, a fixture
from test_train import assert_same_weights

KILLS = 20


@pytest.mark.soak
def test_killed_runs_end_with_the_weights_of_an_undisturbed_one(train_flags, tmp_path):  # noqa: F811
    def begin(save, *flags):
        """Starts a run and returns its process when the images are prepared and the training begins."""
        flags = [*train_flags, "--save", save, *flags]
        words = [sys.executable, ROOT / "train.py", *map(str, flags)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert any("validation images" in line for line in process.stdout)
        return process

    def history(save):
        return json.loads((save / "metrics.json").read_text())["history"]

    undisturbed = tmp_path / "undisturbed"
    process, began = begin(undisturbed, "--epochs", 3), time.monotonic()
    process.communicate()
    duration = time.monotonic() - began
    assert process.returncode == 0

    rng, kills, runs, caught = random.Random(7), 0, 0, 0
    while kills < KILLS:
        save, ended = tmp_path / f"run {runs}", False
        while not ended:
            last = save / "last.pth.tar"
            process = begin(save, *(["--checkpoint", last] if last.exists() else ["--epochs", 3]))
            try:
                process.communicate(timeout=rng.uniform(0, duration) if kills < KILLS else None)
                assert process.returncode == 0
                ended = True
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate(timeout=60)  # nothing else may hold the pipe
                kills += 1
                writing = len(list(save.glob(".*")))
                caught += writing > 0
                print(f"kill {kills} of {KILLS}{', while a file was written' if writing else ''}", flush=True)
                for part in save.glob(".*"):
                    part.unlink()
        for name in ("last.pth.tar", "final.pth.tar"):
            assert_same_weights(save / name, undisturbed / name)
        assert history(save) == history(undisturbed)
        shutil.rmtree(save)
        runs += 1
    print(f"{kills} kills, {caught} of them while a file was written; all {runs} runs ended with the right weights")
