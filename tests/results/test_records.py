import json
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cli import InputError
from metrics import Evaluation, Thresholds
from model import PneumoniaUNET, choose_runtime
from results import records
from results.records import Records


def training(steps_done, history=()):
    """What Records takes of a training."""
    return SimpleNamespace(history=list(history), model=PneumoniaUNET(width=2),
                           runtime=choose_runtime("cpu", "fp32"),
                           scheduler=SimpleNamespace(last_epoch=steps_done))


IMAGES = SimpleNamespace(patient_ids=["a", "b", "c", "d"], skipped=[],
                         patients=["Mr. X", "Mr. X", "c", "d"])
BEFORE = {"training": [0, 1], "validation": [2]}


def test_too_little_room_for_checkpoints_is_found_out_before_training(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 5_000_000})
    monkeypatch.setattr(records.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="5 MB left.*--save"):
        Records.check_disk(tmp_path, PneumoniaUNET())


@pytest.mark.parametrize("steps_done, kept", [(0, []), (2, [1, 2])])
def test_tensorboard_keeps_the_steps_that_are_done_and_no_other(tmp_path, steps_done, kept):
    for done, steps in ((0, 3), (steps_done, 1)):
        with Records(tmp_path, {}, training(done), IMAGES, BEFORE) as run:
            run.log_steps(done + steps, [0.5] * steps, 0.1)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [event.step for event in events.Scalars("steps/loss")] == [*kept, steps_done + 1]


def begin(folder, parts, history=()):
    """Begins a run, which continues the one in its folder if there is a history."""
    settings = {"checkpoint": folder / "last.pth.tar"}
    with Records(folder, settings, training(0, history), IMAGES, parts):
        pass


def test_a_split_has_numbers_instead_of_the_names_of_patients(tmp_path):
    begin(tmp_path, BEFORE)
    text = (tmp_path / "split.csv").read_text()
    assert text.startswith("patientId,split,patient\n") and "Mr. X" not in text


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    with Records(tmp_path, {}, training(0), IMAGES, BEFORE) as run:
        monkeypatch.setattr(run.writer, "add_scalar", lambda *_: 1 / 0)
        run.log_steps(1, [0.5], 0.1)
        run.log_steps(2, [0.5], 0.1)
    assert capsys.readouterr().out.count("no more logs for TensorBoard: ZeroDivisionError") == 1


def test_metrics_without_a_value_are_null_since_json_has_no_nan(tmp_path):
    settings = dict.fromkeys(records.COMPARED, 1) | {
        "checkpoint": str(tmp_path / "last.pth.tar"), "save_images": False, "workers": 1}
    without_negatives = Evaluation(0.5, Thresholds().and_curves(), np.ones(2), np.ones(2, int),
                                   np.full(2, ""), np.zeros((2, 10, 10)))
    before = training(1, [{"loss": 0.5, "auc": float("nan")}])
    with Records(tmp_path, settings, before, IMAGES, BEFORE) as run:
        run.finish(without_negatives, Thresholds(), [], [0, 1, 2])
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text and json.loads(text)["history"] == [{"loss": 0.5, "auc": None}]
    assert json.loads(text)["image_roc_auc"] is None
