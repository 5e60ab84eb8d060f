import hashlib
import json
import math
import platform
import resource

import numpy as np
import pytest
import torch

import dicom
import train
from job import InputError
from metrics import Thresholds
from model import PneumoniaUNET, load_checkpoint, save_checkpoint
from predict import predict_masks

SMALL = ["--rescale-factor", "16", "--batch-size", "8", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture
def start(phantoms, train_csv, tmp_path):
    """start(*flags) runs train.py on the phantoms, saving to tmp_path or to a given --save."""
    def start(*flags, save=tmp_path / "out"):
        train.main(["--data", str(phantoms / "stage_2_train_images"), "--labels", str(train_csv), "--save", str(save),
                    *SMALL, *flags])
        return json.loads((save / "metrics.json").read_text())
    return start


def weights(path):
    return load_checkpoint(path)[0].state_dict()


def assert_same_weights(first, second):
    for (name, one), two in zip(weights(first).items(), weights(second).values()):
        assert torch.equal(one, two), name


def without_times(metrics):
    return {key: value for key, value in metrics.items() if key not in ("seconds", "arguments")}


def test_a_run_writes_its_files_repeats_and_continues(start, tmp_path, capsys, monkeypatch):
    first = start("--train-threshold", "--epochs", "2", save=tmp_path / "a")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5].startswith("box threshold ") and first["threshold_source"] in lines[-5]
    assert f"{first['rsna_standard_error']:.4f} (bootstrap over 4 images)" in lines[-3]
    assert lines[-2] == f"RSNA Mean Average Precision: {first['rsna_mean_average_precision']:.4f}"
    assert lines[-1] == f"Total Average Precision: {first['total_average_precision']:.4f}"
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"last.pth.tar", "loss.best.pth.tar", "prec.best.pth.tar", "final.pth.tar", "images", "logs",
                     "metrics.json", "split.csv"}
    assert len(list((tmp_path / "a" / "images").glob("*.png"))) == first["validation_images"] == 4
    _, final = load_checkpoint(tmp_path / "a" / "final.pth.tar")
    assert final["best_threshold"] == first["best_threshold"] and final["rescale_factor"] == 16
    assert_same_weights(tmp_path / "a" / "final.pth.tar", tmp_path / "a" / "last.pth.tar")

    def interrupt(training, history, args, save_epoch=train.save_epoch):
        save_epoch(training, history, args)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_epoch", interrupt)
        start("--train-threshold", "--epochs", "2", save=tmp_path / "b")
    assert f"--checkpoint {tmp_path / 'b' / 'last.pth.tar'}" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_one_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        start(save=tmp_path / "a")  # last.pth.tar there is an older run's
    assert "continue with" not in capsys.readouterr().out
    second = start("--checkpoint", str(tmp_path / "b" / "last.pth.tar"), save=tmp_path / "b")
    assert_same_weights(tmp_path / "a" / "last.pth.tar", tmp_path / "b" / "last.pth.tar")
    assert without_times(second) == without_times(first) and len(second["history"]) == 2


def test_an_internal_error_leaves_out_its_image_and_ends_with_status_1(
        phantoms, train_csv, tmp_path, monkeypatch, capfd):
    broken = min((phantoms / "stage_2_train_images").iterdir())

    def read(path, rescale_factor, load=dicom.load_and_prepare_image):
        return load(path, rescale_factor if path != broken else None)  # a mistake of ours
    monkeypatch.setattr(dicom, "load_and_prepare_image", read)
    monkeypatch.setattr(train, "fit", lambda *_: None)
    monkeypatch.setattr(train, "finish", lambda *_: dict.fromkeys(
        ("image_roc_auc", "rsna_mean_average_precision", "total_average_precision"), 0.5))
    assert train.main(["--data", str(broken.parent), "--labels", str(train_csv), "--save", str(tmp_path),
                       "--epochs", "1", *SMALL]) == 1
    output = capfd.readouterr()
    assert output.err.count("Traceback") == 1 and f"{broken}: was not read because of an internal error" in output.out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["skipped_images"] == 1 and metrics["training_images"] + metrics["validation_images"] == 39


@pytest.mark.parametrize("flags", [["--optimizer", "adamw"], ["--optimizer", "adamax"], ["--optimizer", "sgd"],
                                   ["--optimizer", "adagrad", "--lr", "0.1"]])
def test_every_optimizer_steps_and_every_flag_of_it_acts(flags):
    extra = ["--weight-decay", "0.1", *(["--momentum", "0.5"] if "sgd" in flags else ["--eps", "0.01"])]
    args, *_ = train.parse_args(flags + extra)
    model = torch.nn.Linear(2, 1)
    before = model.weight.clone()
    optimizer, scheduler = train.build_optimizer(model, args, total_steps=20)
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == 0.1 and group.get("momentum", 0.5) == 0.5 and group.get("eps", 0.01) == 0.01
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_learning_rate_warms_up_and_decays_to_the_given_share():
    args, *_ = train.parse_args(["--lr", "0.5", "--lrd", "0.2"])
    optimizer, scheduler = train.build_optimizer(torch.nn.Linear(1, 1), args, total_steps=100)
    rates = []
    for _ in range(100):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.05) and max(rates) == rates[10] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("rescale_factor, patch_size", [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)])
def test_every_network_sees_at_most_64_squares_a_side(rescale_factor, patch_size):
    args, *_ = train.parse_args(["--rescale-factor", str(rescale_factor)])
    assert train.build_model(args).patch_size == patch_size


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_training_on_the_cpu_does_not_fetch_its_memory_anew_at_every_step():
    args, *_ = train.parse_args(SMALL)
    train.build_training(PneumoniaUNET(), args, 10, train.choose_runtime("cpu", "fp32"))
    faults = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**23, requires_grad=True).mul(2).sigmoid().relu().exp().sum().backward()  # 8,192 pages each
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert max(faults[-2:]) < 1000


@pytest.mark.parametrize("argv, message", [
    (["--momentum", "0.9"], "--momentum acts on --optimizer sgd alone"),
    (["--optimizer", "sgd", "--eps", "0.1"], "--eps has no part"),
    (["--folds", "3"], "--folds and --fold go together"),
    (["--folds", "3", "--fold", "3"], "--fold 3: with --folds 3 the last fold is 2"),
    (["--checkpoint", "nothing.tar"], "nothing.tar does not exist.*--checkpoint"),
])
def test_flags_that_cannot_act_are_refused(argv, message):
    with pytest.raises(InputError, match=message):
        train.parse_args(argv)


@pytest.mark.parametrize("flags", [["--epochs", "0"], ["--lr", "-1"], ["--lr", "nan"], ["--bs", "x"], ["--bt", "2"],
                                   ["--rf", "3"], ["--optimizer", "lion"]])
def test_values_out_of_range_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(flags)
    assert stop.value.code == 2 and flags[0][:3] in capsys.readouterr().err


def test_a_continued_run_keeps_its_flags(tmp_path):
    model = PneumoniaUNET()
    stored = train.plain_args(train.parse_args(["--optimizer", "sgd", "--lr", "0.2", "--rf", "8", "--data", "old"])[0])
    save_checkpoint(tmp_path / "last.pth.tar", model, optimizer={}, args=stored)
    continued = ["--checkpoint", str(tmp_path / "last.pth.tar")]
    args, *_ = train.parse_args([*continued, "--epochs", "7"])
    assert (args.optimizer, args.learning_rate, args.rescale_factor, args.epochs) == ("sgd", 0.2, 8, 7)
    assert args.data != "old"
    with pytest.raises(InputError, match="--learning-rate 0.3: the run to continue has 0.2"):
        train.parse_args([*continued, "--lr", "0.3"])


def test_warm_start_takes_weights_alone_and_refuses_another_network(tmp_path):
    save_checkpoint(tmp_path / "w.pth.tar", PneumoniaUNET(alpha_leaky=0.1))
    flags = ["--checkpoint", str(tmp_path / "w.pth.tar")]
    args, model, state = train.parse_args([*flags, "--alpha-leaky", "0.1"])
    assert model.config["alpha_leaky"] == 0.1 and "optimizer" not in state
    with pytest.raises(InputError, match="give --alpha-leaky 0.1"):
        train.parse_args(flags)
    save_checkpoint(tmp_path / "w.pth.tar", PneumoniaUNET(patch_size=4))
    assert train.parse_args(flags)[1].patch_size == 4
    with pytest.raises(InputError, match="--rescale-factor 16 makes images of 64 pixels.*give 8 or less"):
        train.parse_args([*flags, "--rescale-factor", "16"])


def test_a_loss_that_is_not_finite_names_step_and_learning_rate():
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1)
    with pytest.raises(InputError, match="loss is nan at step 39 of epoch 2, learning rate 0.5"):
        train.check_losses([0.1, math.nan, 0.1], 40, 2, scheduler)


def test_loss_falls_towards_the_truth():
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, :, 2:6, 2:6] = 1
    assert train.combined_loss(20 * masks - 10, masks) < 0.01 < 10 < train.combined_loss(10 - 20 * masks, masks)


def test_too_little_room_for_checkpoints_is_found_out_before_training(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 5_000_000})
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="5 MB left.*--save"):
        train.check_disk(tmp_path, PneumoniaUNET())


def test_a_network_that_overfits_four_images_finds_their_boxes():
    """The whole way from images to score: what is learned by heart must be found again."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images, masks = rng.integers(0, 60, (4, 1, 64, 64)).astype(np.uint8), np.zeros((4, 1, 64, 64), np.uint8)
    for i in range(3):
        masks[i, :, 10 + 5 * i:40 + 5 * i, 20:40] = 1
    images = torch.from_numpy(images + 120 * masks)
    model, runtime = PneumoniaUNET(), train.choose_runtime("cpu", "fp32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    targets = torch.from_numpy(masks).float()
    for _ in range(30):
        loss = train.combined_loss(train.segment(model, train.to_network(images, "cpu"), runtime), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = predict_masks(model, images, runtime)
    scores = []
    for i in range(4):
        found = train.find_boxes(predicted[i], (1024, 1024), box_threshold=0.5, gate_threshold=0.5)
        truth = [[320, 16 * (10 + 5 * i), 320, 480]] if i < 3 else []
        scores.append(train.average_precision_image(*found, truth))
    assert scores[:3] == [1, 1, 1] and math.isnan(scores[3])


class Brightness(torch.nn.Module):
    """Takes bright regions for opacities."""

    def forward(self, images):
        return 20 * (torch.nn.functional.avg_pool2d(images, 9, 1, 4) - 0.93)


@pytest.fixture
def labelled(phantoms, train_csv):
    """Arguments, data set and parts of train.py on the phantoms."""
    args, *_ = train.parse_args(["--data", str(phantoms / "stage_2_train_images"), "--labels", str(train_csv), *SMALL])
    return args, *train.load_data(args)


def test_scores_of_one_pass_are_those_of_the_boxes_that_are_drawn(labelled):
    args, dataset, parts = labelled
    indices, thresholds = parts["training"], Thresholds(0.3, 0.5)
    _, _, (loader,), _ = train.build_loaders(dataset, {"training": indices, "validation": indices}, args)
    model, runtime = Brightness(), train.choose_runtime("cpu", "fp32")
    for index, (_, _, (boxes, *_), *_) in train.overlays(model, dataset, indices[::2], runtime, thresholds):
        dataset.boxes[index] = boxes  # every second image agrees with the model at these thresholds
    evaluation = train.evaluate(model, loader, runtime, [0.2, thresholds.box])
    figures = train.summarize(evaluation, thresholds.gate, column=1)
    drawn = [train.average_precision_image(*found[:2], truth)
             for _, (_, _, found, truth, _) in train.overlays(model, dataset, indices, runtime, thresholds)]
    assert 0.1 < np.nanmean(drawn) < 1 and np.isnan(drawn).any()
    assert figures["rsna"] == pytest.approx(np.nanmean(drawn))
    assert figures["total"] == pytest.approx(np.nansum(drawn) / len(indices))
    assert evaluation.scores.shape == (len(indices), 2) and set(evaluation.views) == {"AP", "PA"}


class Blind(torch.nn.Module):
    """Is sure of an opacity in the same corner of every image, where there is none."""

    def forward(self, images):
        logits = torch.full_like(images, -9.0)
        logits[..., :12, :12] = 9.0
        return logits


def test_where_nothing_scores_the_defaults_stay_and_the_log_says_why(labelled, monkeypatch):
    args, dataset, parts = labelled
    args.train_threshold = True
    _, loader, _, _ = train.build_loaders(dataset, parts, args)
    thresholds = train.choose_thresholds(Blind(), loader, train.choose_runtime("cpu", "fp32"), args, Quiet())
    assert thresholds[:2] == (train.BOX_THRESHOLD, train.GATE_THRESHOLD)
    assert "defaults; a search on 4 images proved nothing better" in str(thresholds)


class Quiet:
    """A SummaryWriter that writes nothing."""

    def add_scalar(self, *_):
        pass


def test_a_fold_is_trained_without_and_scored_alone(start, tmp_path):
    figures = start("--folds", "3", "--fold", "1", "--epochs", "1")
    split = dict(line.split(",") for line in (tmp_path / "out" / "split.csv").read_text().splitlines()[1:])
    parts = {part: {key for key, value in split.items() if value == part} for part in ("training", "validation", "test")}
    assert parts["test"] == {key for key in split if int(hashlib.md5(key.encode()).hexdigest(), 16) % 3 == 1}
    assert len(parts["validation"]) == round(0.1 * (40 - len(parts["test"]))) and sum(map(len, parts.values())) == 40
    assert figures["scored_images"] == len(parts["test"])
    assert {path.stem for path in (tmp_path / "out" / "images").iterdir()} == parts["test"]


def test_learning_rate_in_log_and_metrics_is_the_value_used(start, capsys):
    assert start("--epochs", "1", "--optimizer", "sgd")["arguments"]["learning_rate"] == 0.05
    assert "learning_rate=0.05" in capsys.readouterr().out
