import contextlib
import io
import itertools
import json
import re
import shlex
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import SMALL, assert_same_weights
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import engine
import train
from cli import InputError
from engine import Start
from metrics import Thresholds
from model import PneumoniaUNET, load_checkpoint, save_checkpoint
from radiographs import readers
from results.records import Records

CONTINUED = ("last.pth.tar", "loss.best.pth.tar", "prec.best.pth.tar")  # what a run continues from


def parse(argv):
    """The flags of a run, as main takes them."""
    return train.parse_args(argv, Start.of_file(train.make_parser().parse_args(argv).checkpoint))


# Whole runs


@pytest.fixture(scope="module")
def start(phantoms, train_csv):
    """start(save, *flags) runs train.py on the phantoms; returns metrics.json and the lines
    printed, or only those if the run was interrupted."""
    def start(save, *flags):
        flags = ["--data", phantoms / "stage_2_train_images", "--labels", train_csv,
                 "--save", save, *SMALL, *flags]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                train.main([str(flag) for flag in flags])
            except KeyboardInterrupt:
                return None, out.getvalue().splitlines()
        return json.loads((save / "metrics.json").read_text()), out.getvalue().splitlines()
    return start


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    """Folder, metrics and lines of a run of two epochs with a search."""
    save = tmp_path_factory.mktemp("run") / "a"
    return save, *start(save, "--train-threshold", "--epochs", "2")


@pytest.fixture
def scratch(finished, tmp_path):
    """tmp_path/a, with a copy of what the finished run would be continued from."""
    (tmp_path / "a").mkdir()
    for name in ("last.pth.tar", "split.csv"):
        (tmp_path / "a" / name).symlink_to(finished[0] / name)
    return tmp_path / "a"


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_run_ends_in_its_thresholds_and_the_lines_of_the_tutorial(finished):
    _, figures, lines = finished
    assert lines[-6].startswith("box threshold ") and figures["threshold_source"] in lines[-6]
    assert lines[-5].endswith(f", {figures['froc_2']:.2f} at 2")
    assert lines[-4].startswith(f"Image ROC AUC: {figures['image_roc_auc']:.4f}")
    scored = figures["scored_images"]
    assert f"{figures['rsna_standard_error']:.4f} (bootstrap over {scored} images)" in lines[-3]
    assert lines[-2:] == [
        f"RSNA Mean Average Precision: {figures['rsna_mean_average_precision']:.4f}",
        f"Total Average Precision: {figures['total_average_precision']:.4f}"]


def test_a_run_writes_its_files_and_no_other(finished):
    save, *_ = finished
    assert {path.name for path in save.iterdir() if path.name != ".training.lock"} == {
        "last.pth.tar", "loss.best.pth.tar", "prec.best.pth.tar", "final.pth.tar", "validation",
        "logs", "metrics.json", "split.csv", "report.html", "curves.png", "scores.png"}


def test_tensorboard_counts_epochs_from_1_and_shows_both_losses_over_them(finished):
    save, figures, _ = finished
    events = EventAccumulator(str(save / "logs")).Reload()
    for tag, name in (("loss/train", "train_loss"), ("loss/validation", "loss"),
                      ("auc/validation", "auc")):
        logged = [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
        history = [scores[name] for scores in figures["history"]]
        assert logged == list(enumerate(history, 1)), tag


def test_every_validation_image_is_drawn(finished):
    save, figures, _ = finished
    validation = parts_in(save)["validation"]
    assert len(validation) == figures["validation_images"] == figures["scored_images"]
    assert {path.stem for path in (save / "validation").iterdir()} == validation


def test_the_report_holds_every_validation_image_and_the_figures(finished):
    save, *_ = finished
    page = (save / "report.html").read_text("utf-8")
    sources = set(re.findall(r'<img (?:loading="lazy"|class="plot") src="([^"]*)"', page))
    pictures = {f"validation/{path.name}" for path in (save / "validation").iterdir()}
    assert sources == {"curves.png", "scores.png"} | pictures


def test_validation_pictures_are_the_radiographs_at_display_resolution(finished):
    save, *_ = finished
    with Image.open(next((save / "validation").iterdir())) as picture:
        assert picture.mode == "P" and picture.width == 1024


def test_pictures_in_tensorboard_are_named_by_their_ids(finished):
    save, *_ = finished
    events = EventAccumulator(str(save / "logs"), size_guidance={"images": 0}).Reload()
    ids = {path.stem for path in (save / "validation").iterdir()}
    tags = events.Tags()["images"]
    assert tags and {tag.removeprefix("validation/") for tag in tags} <= ids


def test_the_history_holds_the_learning_rate_of_each_epoch(finished):
    _, figures, _ = finished
    rates = [scores["learning_rate"] for scores in figures["history"]]
    assert rates[-1] == pytest.approx(0.01 * figures["arguments"]["learning_rate"], rel=0.01)


def test_the_final_file_holds_the_last_weights_and_the_thresholds(finished):
    save, figures, _ = finished
    _, final = load_checkpoint(save / "final.pth.tar")
    for name in ("best_threshold", "gate_threshold", "threshold_source", "size_weight",
                 "rsna_mean_average_precision", "history"):
        assert final[name] == figures[name], name
    assert final["rescale_factor"] == 16
    assert_same_weights(save / "final.pth.tar", save / "last.pth.tar")


def test_a_stopped_run_continues_to_the_same_end(finished, start, tmp_path, monkeypatch):
    save, figures, _ = finished

    def save_and_stop(*arguments, save_epoch=Records.save_epoch):
        save_epoch(*arguments)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Records, "save_epoch", save_and_stop)
        start(tmp_path / "b", "--train-threshold", "--epochs", "2")
    last = tmp_path / "b" / "last.pth.tar"
    again, _ = start(last.parent, "--checkpoint", last)
    assert_same_weights(save / "last.pth.tar", last)
    varying = ("seconds", "arguments")
    assert {key: value for key, value in again.items() if key not in varying} == {
        key: value for key, value in figures.items() if key not in varying}


def test_a_stopped_run_prints_the_command_that_continues_it_with_all_its_paths(
        start, tmp_path, phantoms, train_csv, monkeypatch):
    monkeypatch.setattr(Records, "finish", interrupt)
    _, lines = start(tmp_path / "my run", "--epochs", "1")
    start_of_line, command = lines[-1].split("python train.py ")
    args = parse(shlex.split(command))
    assert start_of_line == "continue with: "
    assert args.checkpoint == str(tmp_path / "my run" / "last.pth.tar")
    assert (args.data, args.labels, args.save) == tuple(map(str, (
        phantoms / "stage_2_train_images", train_csv, tmp_path / "my run")))


def test_a_run_says_that_it_replaces_the_checkpoints_in_its_folder(scratch, start, monkeypatch):
    monkeypatch.setattr(train, "train_one_epoch", interrupt)
    _, lines = start(scratch)
    assert f"{scratch} holds the checkpoints of an earlier run, which this one replaces" in lines


def test_a_second_training_in_a_folder_is_refused_while_the_first_one_runs(start, tmp_path):
    from filelock import FileLock
    with FileLock(tmp_path / ".training.lock"):
        with pytest.raises(InputError, match="another training is writing to .*--save"):
            start(tmp_path, "--epochs", "1")
    assert not list(tmp_path.glob("*.tar"))


def test_a_run_stopped_before_its_first_epoch_does_not_offer_the_file_of_another(
        scratch, start, monkeypatch):
    monkeypatch.setattr(train, "train_one_epoch", interrupt)
    figures, lines = start(scratch)
    assert figures is None and lines and not any("continue with" in line for line in lines)


@pytest.fixture
def another_run(tmp_path):
    """A folder with the files of another run."""
    for name in CONTINUED:
        save_checkpoint(tmp_path / name, PneumoniaUNET(width=4))
    return tmp_path


def test_a_run_that_continues_elsewhere_takes_its_files_along(
        finished, start, another_run, monkeypatch):
    monkeypatch.setattr(train, "train_one_epoch", interrupt)
    save, *_ = finished
    start(another_run, "--checkpoint", save / "last.pth.tar", "--epochs", "3")
    for name in CONTINUED:
        assert (another_run / name).read_bytes() == (save / name).read_bytes(), name


def test_a_run_that_continues_elsewhere_leaves_no_best_file_of_another_run(
        scratch, start, another_run, monkeypatch):
    monkeypatch.setattr(train, "train_one_epoch", interrupt)
    start(another_run, "--checkpoint", scratch / "last.pth.tar", "--epochs", "3")
    assert {path.name for path in another_run.glob("*.tar")} == {"last.pth.tar"}


def parts_in(folder):
    table = pd.read_csv(folder / "split.csv", index_col="patientId")
    return {name: set(rows.index) for name, rows in table.groupby("split")}


def test_a_run_that_continues_keeps_its_parts_and_names_images_that_are_gone(
        finished, start, train_csv, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_one_epoch", interrupt)
    rows = pd.read_csv(train_csv)
    kept = sorted(set(rows["patientId"]))[:32]
    rows[rows["patientId"].isin(kept)].to_csv(tmp_path / "train.csv", index=False)
    _, lines = start(tmp_path / "b", "--checkpoint", finished[0] / "last.pth.tar",
                     "--epochs", "3", "--labels", tmp_path / "train.csv")
    assert any("images of the run to continue are gone (8)" in line for line in lines)
    before = parts_in(finished[0])
    assert parts_in(tmp_path / "b") == {name: ids & set(kept) for name, ids in before.items()}


def test_a_run_of_before_continues_with_the_parts_in_its_table(
        finished, start, tmp_path, monkeypatch):
    """Its split.csv has two columns, and parts that share patients."""
    monkeypatch.setattr(train, "train_one_epoch", interrupt)
    ids = sorted(set.union(*parts_in(finished[0]).values()))
    rows = [f"{key},{'validation' if index % 10 == 0 else 'training'}"
            for index, key in enumerate(ids)]
    (tmp_path / "split.csv").write_text("\n".join(["patientId,split", *rows]))
    (tmp_path / "last.pth.tar").symlink_to(finished[0] / "last.pth.tar")
    start(tmp_path / "b", "--checkpoint", tmp_path / "last.pth.tar", "--epochs", "3")
    assert parts_in(tmp_path / "b")["validation"] == set(ids[::10])


def test_a_run_without_its_split_does_not_continue_with_another(scratch, start):
    (scratch / "split.csv").unlink()
    with pytest.raises(InputError, match="split.csv does not exist: put the run's own there"):
        start(scratch, "--checkpoint", scratch / "last.pth.tar", "--epochs", "3")


def test_more_epochs_than_planned_are_told_before_the_first_step(scratch, start, monkeypatch):
    monkeypatch.setattr(train, "train_one_epoch", interrupt)
    _, lines = start(scratch, "--checkpoint", scratch / "last.pth.tar", "--epochs", "3")
    assert any(line.startswith("--epochs 3: the run was planned for 2") for line in lines)


def test_an_epoch_is_in_tensorboard_before_its_checkpoint(start, tmp_path, monkeypatch):
    monkeypatch.setattr(Records, "save_epoch", interrupt)
    start(tmp_path, "--epochs", "1", "--no-save-images")
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == [1]


def test_tables_say_how_many_patients_each_part_has(finished):
    save, figures, _ = finished
    table = pd.read_csv(save / "split.csv")
    counts = table.groupby("split")["patient"].nunique()
    assert counts.sum() == table["patient"].nunique() < len(table)
    for name, count in counts.items():
        assert figures[f"{name}_patients"] == count


def test_a_warm_start_from_a_finished_run_trains_all_its_epochs(finished, start, tmp_path):
    save, *_ = finished
    figures, _ = start(tmp_path, "--checkpoint", save / "final.pth.tar", "--epochs", "1",
                       "--optimizer", "sgd", "--lr", "0.01", "--no-save-images")
    assert len(figures["history"]) == 1 and figures["arguments"]["optimizer"] == "sgd"
    began, ended = (load_checkpoint(folder / "final.pth.tar")[0] for folder in (save, tmp_path))
    change = [(a - b).abs().max() for a, b in zip(began.parameters(), ended.parameters())]
    assert 0 < max(change) < 0.3  # trained on from there, and not from new random weights


def test_a_batch_larger_than_the_set_counts_the_images_that_are_there(
        start, tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=itertools.count().__next__)  # an epoch takes a second
    monkeypatch.setattr(engine, "time", clock)
    _, lines = start(tmp_path, "--batch-size", "64", "--epochs", "1", "--no-save-images")
    [epoch] = [line for line in lines if line.startswith("epoch 1/1")]
    assert re.search(r" 3[5-7]\.0 images/s$", epoch)


def test_a_fold_is_trained_without_and_scored_alone(start, tmp_path):
    figures, _ = start(tmp_path, "--folds", "3", "--fold", "1", "--epochs", "1",
                       "--optimizer", "sgd")
    parts = parts_in(tmp_path)
    expected = parts["test"]
    assert sum(map(len, parts.values())) == 40 and 12 <= len(expected) <= 15
    assert 2 <= len(parts["validation"]) <= 4
    assert figures["scored_images"] == len(expected)
    assert figures["loss"] != figures["history"][-1]["loss"]  # of validation
    assert {path.stem for path in (tmp_path / "validation").iterdir()} == expected


def test_learning_rate_in_log_and_metrics_is_the_value_used(start, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *_: None)
    figures, lines = start(tmp_path, "--optimizer", "sgd")
    assert figures["arguments"]["learning_rate"] == 0.05 and "learning_rate=0.05" in lines[0]


def test_an_internal_error_leaves_out_its_image_and_ends_with_status_1(
        phantoms, train_csv, tmp_path, monkeypatch, capfd):
    broken = min((phantoms / "stage_2_train_images").iterdir())

    def read(path, side, display_size, load=readers.read_radiograph):
        return load(path, side) if path != broken else None.mistake
    monkeypatch.setattr(readers, "read_radiograph", read)
    monkeypatch.setattr(train, "fit", lambda *_: None)
    assert train.main(["--data", str(broken.parent), "--labels", str(train_csv),
                       "--save", str(tmp_path), *SMALL, "--no-save-images"]) == 1
    output = capfd.readouterr()
    assert output.err.count("Traceback") == 1
    assert f"{broken} was not read because of an internal error" in output.out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["skipped_images"] == 1
    assert metrics["training_images"] + metrics["validation_images"] == 39


# Optimizer and schedule


@pytest.mark.parametrize("flags", [
    ["--optimizer", "adam"], ["--optimizer", "adamw"], ["--optimizer", "adamax"],
    ["--optimizer", "sgd"], ["--optimizer", "adagrad", "--lr", "0.1"]])
def test_every_optimizer_steps_and_every_flag_of_it_acts(flags):
    extra = ["--momentum", "0.5"] if "sgd" in flags else ["--eps", "0.01"]
    args = parse([*flags, "--weight-decay", "0.1", *extra])
    model = torch.nn.Linear(2, 1)
    before = model.weight.clone()
    optimizer, scheduler = train.build_optimizer(model, args, total_steps=20)
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == 0.1
    assert group["momentum"] == 0.5 if "sgd" in flags else group["eps"] == 0.01
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_learning_rate_warms_up_and_decays_to_the_given_share():
    args = parse(["--lr", "0.5", "--lrd", "0.2"])
    optimizer, scheduler = train.build_optimizer(torch.nn.Linear(1, 1), args, total_steps=100)
    rates = []
    for _ in range(100):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.05) and max(rates) == rates[10] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("optimizer, device, fused", [
    ("adamw", "cpu", True), ("adagrad", "cpu", True), ("adamax", "cpu", False),
    ("adamw", "meta", False)])
def test_an_optimizer_is_fused_where_pytorch_has_that_form(optimizer, device, fused):
    args = parse(["--optimizer", optimizer])
    built, _ = train.build_optimizer(torch.nn.Linear(1, 1, device=device), args, total_steps=1)
    assert bool(built.defaults.get("fused")) == fused


# Flags


def test_the_help_of_a_switch_shows_its_default_once():
    text = " ".join(train.make_parser().format_help().split())
    assert "at the end (default: on) --train" in text and "(default: True)" not in text


@pytest.mark.parametrize("argv, message", [
    (["--momentum", "0.9"], "--momentum acts on --optimizer sgd alone"),
    (["--optimizer", "sgd", "--eps", "0.1"], "--eps has no effect"),
    (["--folds", "3"], "--folds and --fold go together"),
    (["--fold", "0"], "--folds and --fold go together"),
    (["--folds", "3", "--fold", "3"], "--fold 3: with --folds 3 the last fold is 2"),
    (["--checkpoint", "nothing.tar"], "nothing.tar does not exist.*--checkpoint"),
])
def test_flags_that_cannot_act_are_refused(argv, message):
    with pytest.raises(InputError, match=message):
        parse(argv)


def test_a_missing_table_is_named_with_the_script_that_writes_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "train.csv does not exist: .*--labels .python data_processing.py writes one"
    with pytest.raises(InputError, match=message):
        train.main(["--data", "."])


@pytest.mark.parametrize("flags", [
    ["--epochs", "0"], ["--lr", "-1"], ["--lr", "nan"], ["--bs", "x"], ["--bt", "2"],
    ["--rf", "3"], ["--optimizer", "lion"], ["--seed", "-1"], ["--seed", "1000000001"]])
def test_values_out_of_range_are_refused(flags):
    with pytest.raises(InputError, match=flags[0]):
        parse(flags)


@pytest.fixture
def stopped(tmp_path):
    """Flags that continue a run which was stopped."""
    args = parse(["--optimizer", "sgd", "--lr", "0.2", "--rf", "8",
                                 "--data", "old"])
    save_checkpoint(tmp_path / "last.pth.tar", PneumoniaUNET(patch_size=2), optimizer={},
                    history=[{}, {}], args=vars(args))
    return ["--checkpoint", str(tmp_path / "last.pth.tar")]


def test_a_continued_run_keeps_its_flags(stopped):
    args = parse([*stopped, "--epochs", "7"])
    assert (args.optimizer, args.learning_rate, args.rescale_factor) == ("sgd", 0.2, 8)
    assert args.epochs == 7


def test_a_continued_run_does_not_keep_its_folders(stopped):
    assert parse(stopped).data == parse([]).data


def test_a_continued_run_refuses_another_recipe(stopped):
    with pytest.raises(InputError, match="--learning-rate 0.3: the run to continue has 0.2"):
        parse([*stopped, "--lr", "0.3"])


def test_a_continued_run_refuses_fewer_epochs_than_it_has_done(stopped):
    with pytest.raises(InputError, match="--epochs 1: the run to continue has done 2; give 2"):
        parse([*stopped, "--epochs", "1"])


def warm_start(tmp_path, model, *flags):
    save_checkpoint(tmp_path / "w.pth.tar", model)
    argv = ["--checkpoint", str(tmp_path / "w.pth.tar"), *flags]
    return Start.of_file(argv[1]), parse(argv)


def test_a_warm_start_takes_the_weights_and_continues_nothing(tmp_path):
    given = PneumoniaUNET(alpha_leaky=0.1)
    start, _ = warm_start(tmp_path, given)
    assert start.model.config == given.config and not start.continues
    assert torch.equal(start.model.up_1[1].conv.weight, given.up_1[1].conv.weight)


NETWORK = {"width": 4, "alpha_leaky": 0.1, "bn_eps": 0.001, "bn_momentum": 0.2}


def test_a_warm_start_inherits_the_flags_of_its_network(tmp_path):
    save_checkpoint(tmp_path / "w.pth.tar", PneumoniaUNET(**NETWORK), rescale_factor=8)
    args = vars(parse(["--checkpoint", str(tmp_path / "w.pth.tar")]))
    expected = NETWORK | {"rescale_factor": 8}
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("flag, value, message", [
    ("--width", "8", "has width 4: give --width 4"),
    ("--alpha-leaky", "0.3", "has alpha_leaky 0.1: give --alpha-leaky 0.1"),
    ("--bn-eps", "1", "has bn_eps 0.001: give --bn-eps 0.001"),
    ("--bn-momentum", "1", "has bn_momentum 0.2: give --bn-momentum 0.2"),
    ("--rescale-factor", "4", "has rescale_factor 8: give --rescale-factor 8")])
def test_a_warm_start_refuses_flags_of_another_network(tmp_path, flag, value, message):
    save_checkpoint(tmp_path / "w.pth.tar", PneumoniaUNET(**NETWORK), rescale_factor=8)
    with pytest.raises(InputError, match=message):
        parse(["--checkpoint", str(tmp_path / "w.pth.tar"), flag, value])


def test_a_warm_start_takes_another_recipe_than_its_network_was_trained_with(tmp_path):
    save_checkpoint(tmp_path / "w.pth.tar", PneumoniaUNET(), history=[{}, {}],
                    args=vars(parse(["--optimizer", "adamw", "--epochs", "2"])))
    args = parse(["--checkpoint", str(tmp_path / "w.pth.tar"), "--optimizer", "sgd",
                  "--epochs", "1"])
    assert (args.optimizer, args.epochs) == ("sgd", 1)


def test_a_warm_start_keeps_the_patches_of_its_network(tmp_path):
    assert warm_start(tmp_path, PneumoniaUNET(patch_size=2))[0].model.patch_size == 2


def test_a_warm_start_refuses_images_too_small_for_its_network(tmp_path):
    message = "--rescale-factor 16 makes images of 64 pixels.*give 8 or less"
    with pytest.raises(InputError, match=message):
        warm_start(tmp_path, PneumoniaUNET(patch_size=4), "--rescale-factor", "16")


def test_a_warm_start_refuses_one_image_of_so_few_patches_that_batchnorm_has_one_value(tmp_path):
    flags = ["--rescale-factor", "8", "--batch-size", "1"]
    with pytest.raises(InputError, match="--batch-size 1 leaves BatchNorm one value.*give 2"):
        warm_start(tmp_path, PneumoniaUNET(patch_size=4), *flags)


@pytest.mark.parametrize("flags, thresholds", [
    ([], Thresholds(0.5, 0.8, "defaults")),
    (["--bt", "0.4"], Thresholds(0.4, 0.8, "given by flags")),
    (["--gt", "0"], Thresholds(0.5, 0, "given by flags"))])
def test_thresholds_are_those_of_the_flags(flags, thresholds):
    assert train.build_thresholds(parse(flags)) == thresholds


def test_debug_shortens_a_run_and_leaves_the_search_out():
    args = parse(["--debug", "--epochs", "9", "--train-threshold"])
    assert args.epochs == train.DEBUG_EPOCHS and not args.train_threshold
