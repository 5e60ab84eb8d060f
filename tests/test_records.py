import json
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import records
import train
from cli import InputError
from metrics import Thresholds
from model import PneumoniaUNET, choose_runtime
from records import STATEFUL, Records, check_disk, resume

CPU = choose_runtime("cpu", "fp32")


@pytest.fixture
def begun():
    """Arguments of a run and the state that it stopped in."""
    args, *_ = train.parse_args(["--optimizer", "adagrad", "--width", "4"])
    training = train.build_training(train.build_model(args), args, 10, CPU)
    training.optimizer.step()
    training.scheduler.step()
    state = {name: getattr(training, name).state_dict() for name in STATEFUL}
    return args, {**state, "history": [{}, {}]}


def test_a_run_goes_on_where_its_epochs_ended(begun):
    args, state = begun
    training = train.build_training(train.build_model(args), args, 10, CPU)
    resume(training, state, 5)
    assert training.scheduler.last_epoch == 10


def test_a_run_goes_on_in_a_precision_that_scales_the_loss(begun):
    args, state = begun
    training = train.build_training(train.build_model(args), args, 10, CPU)
    scaling = training._replace(scaler=torch.amp.GradScaler("cpu"))  # as for float16 on a GPU
    resume(scaling, state, 5)
    assert scaling.scaler.get_scale() == 65536


def test_a_run_goes_on_on_a_device_that_lacks_the_fused_form(begun, monkeypatch):
    args, state = begun
    assert state["optimizer"]["param_groups"][0]["fused"]
    optimizer_class, _, options = train.OPTIMIZERS["adagrad"]
    monkeypatch.setitem(train.OPTIMIZERS, "adagrad", (optimizer_class, (), options))
    training = train.build_training(train.build_model(args), args, 10, CPU)
    resume(training, state, 5)
    assert not training.optimizer.param_groups[0]["fused"]


def test_too_little_room_for_checkpoints_is_found_out_before_training(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 5_000_000})
    monkeypatch.setattr(records.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="5 MB left.*--save"):
        check_disk(tmp_path, PneumoniaUNET())


@pytest.mark.parametrize("steps_done, kept", [(0, []), (2, [1, 2])])
def test_tensorboard_keeps_the_steps_that_are_done_and_no_other(tmp_path, steps_done, kept):
    for done, steps in ((0, 3), (steps_done, 1)):
        with Records(tmp_path, {}, [], done) as run:
            run.log_steps(done + steps, [0.5] * steps, 0.1)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [event.step for event in events.Scalars("steps/loss")] == [*kept, steps_done + 1]


def test_a_run_that_goes_on_with_other_data_tells_which_images_changed_their_part(
        tmp_path, capsys):
    images = SimpleNamespace(patient_ids=["a", "b", "c", "d"])
    with Records(tmp_path, {}, []) as run:
        run.write_split(images, {"training": [0, 1], "validation": [2]})
        assert not capsys.readouterr().out
        begun = tmp_path / "split.csv"
        run.write_split(images, {"training": [0, 2, 3], "validation": [1]}, begun)
        told = capsys.readouterr().out
        assert told.startswith("warning: 3 images are new") and told.endswith(": c, d, b\n")
        run.write_split(images, {"training": [0, 2, 3], "validation": [1]}, begun)
        assert not capsys.readouterr().out


def test_metrics_without_a_value_are_null_since_json_has_no_nan(tmp_path):
    arguments = dict.fromkeys(records.COMPARED, 1)
    figures = dict.fromkeys(records.METRIC_NAMES, 0.5) | {"auc": float("nan")}
    with Records(tmp_path, arguments, [{"loss": 0.5, "auc": float("nan")}]) as run:
        run.finish(figures, Thresholds(), {}, {})
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text and json.loads(text)["history"] == [{"loss": 0.5, "auc": None}]
    assert json.loads(text)["image_roc_auc"] is None
