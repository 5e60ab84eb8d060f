import contextlib
import csv
import json
import os
import shutil
import stat
import zipfile

import numpy as np
import pytest
from PIL import Image

import cli
import metrics
import predict
from cli import InputError
from metrics import Thresholds
from model import PneumoniaUNET, Runtime, choose_runtime, load_checkpoint, save_checkpoint
from radiographs import readers

CPU = choose_runtime("cpu", "fp32")


def run(data, checkpoint, output, *flags):
    flags = ["--data", data, "--model", checkpoint, "--output", output, *flags]
    return predict.main([str(flag) for flag in flags])


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def read_annotations(output):
    return json.loads((output / "annotations.json").read_text("utf-8"))


@pytest.fixture
def square(tmp_path, write_dicom):
    """Folder `data` in tmp_path with one image, a.dcm."""
    (tmp_path / "data").mkdir()
    write_dicom(tmp_path / "data" / "a.dcm", np.eye(32, dtype=np.uint8))
    return tmp_path / "data"


# Results


@pytest.fixture
def mixed(tmp_path, checkpoint, write_dicom, capsys):
    """Status, input, output and last line of a prediction of four images and two other files."""
    data, output = tmp_path / "in put", tmp_path / "not" / "there yet"
    (data / "sub").mkdir(parents=True)
    (data / "sub" / "x.dcm").write_text("no radiograph")
    rng = np.random.default_rng(0)
    for name in ("a.dcm", "sub/Ünï code.DCM", "1.2.3"):
        write_dicom(data / name, rng.integers(0, 4096, (48, 64)).astype(np.uint16))
    write_dicom(data / "sub" / "b.dcm", np.eye(4, dtype=np.uint8))
    (data / "readme.txt").write_text("no radiograph")
    data.chmod(stat.S_IRUSR | stat.S_IXUSR)
    status = run(data, checkpoint, output)
    return status, data, output, capsys.readouterr().out.splitlines()[-1]


def test_every_file_is_in_annotations_or_skipped(mixed):
    status, data, output, _ = mixed
    skipped = dict(read_csv(output / "skipped.csv")[1:])
    assert status == 0
    assert read_annotations(output).keys() == {"a", "b", "Ünï code", "1.2.3"}
    assert {os.path.relpath(path, data) for path in skipped} == {"sub/x.dcm", "readme.txt"}


def test_the_submission_holds_the_annotations(mixed):
    *_, output, _ = mixed
    rows = [list(row) for row in read_annotations(output).items()]
    assert read_csv(output / "submission.csv")[:5] == [["patientId", "PredictionString"], *rows]
    assert any(text for _, text in rows)


def test_every_prediction_has_its_picture(mixed):
    *_, output, _ = mixed
    pictures = {path.stem for path in (output / "images").iterdir()}
    assert pictures == read_annotations(output).keys()


def test_the_last_line_counts_predictions_and_skipped_files(mixed):
    *_, output, line = mixed
    assert line == ("images predicted: 4, with opacities: 4; files skipped: 2; "
                    f"see {output / 'report.html'}")


def test_nothing_to_predict_is_status_1(square, checkpoint, tmp_path):
    (square / "a.dcm").write_text("no DICOM")
    output = tmp_path / "output"
    assert run(square, checkpoint, output) == 1
    assert read_annotations(output) == {} and (output / "skipped.csv").exists()


def test_results_among_the_images_are_not_skipped_files_of_the_next_run(square, checkpoint):
    for _ in range(2):
        assert run(square, checkpoint, square) == 0
    assert not (square / "skipped.csv").exists()


def test_a_run_that_skips_nothing_removes_the_report_of_before(square, checkpoint, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "skipped.csv").write_text("old")
    assert run(square, checkpoint, tmp_path / "output", "--no-save-images") == 0
    assert not (tmp_path / "output" / "skipped.csv").exists()


def test_without_save_images_none_are_written(square, checkpoint, tmp_path):
    assert run(square, checkpoint, tmp_path / "output", "--no-save-images") == 0
    assert not list(tmp_path.glob("output/images/*"))


def test_a_run_that_predicts_nothing_keeps_the_results_of_before(
        square, checkpoint, tmp_path, capsys):
    output = tmp_path / "output"
    output.mkdir()
    (square / "a.dcm").write_text("no DICOM")
    results = [output / "annotations.json", output / "submission.csv"]
    for path in results:
        path.write_text("old")
    assert run(square, checkpoint, output) == 1
    assert [path.read_text() for path in results] == ["old", "old"]
    assert "annotations.json of an earlier run stays" in capsys.readouterr().out
    assert (output / "skipped.csv").exists()


@pytest.mark.parametrize("data, output", [(".", "results"), (".", "."), ("data", ".")])
def test_results_inside_the_data_folder_are_not_searched(
        square, tmp_path, checkpoint, data, output):
    for _ in range(2):
        assert run(tmp_path / data, checkpoint, tmp_path / output) == 0
        assert read_annotations(tmp_path / output).keys() == {"a"}
    skipped = tmp_path / output / "skipped.csv"
    assert not skipped.exists() or not any("images" in row[0] for row in read_csv(skipped))


def test_pictures_of_files_that_share_their_stem_lie_in_sub_folders(
        tmp_path, checkpoint, write_dicom):
    for patient in ("p1", "p2"):
        (tmp_path / "data" / patient).mkdir(parents=True)
        write_dicom(tmp_path / "data" / patient / "IM0", np.eye(32, dtype=np.uint8))
    assert run(tmp_path / "data", checkpoint, tmp_path / "output") == 0
    assert read_annotations(tmp_path / "output").keys() == {"p1/IM0", "p2/IM0"}
    assert (tmp_path / "output" / "images" / "p1" / "IM0.png").exists()
    assert (tmp_path / "output" / "images" / "p2" / "IM0.png").exists()


def test_a_name_too_long_costs_its_picture_alone(
        square, tmp_path, checkpoint, write_dicom, capsys):
    write_dicom(square / ("a" * 255), np.eye(32, dtype=np.uint8))
    assert run(square, checkpoint, tmp_path / "output") == 0
    assert read_annotations(tmp_path / "output").keys() == {"a" * 255, "a"}
    assert [path.name for path in (tmp_path / "output" / "images").iterdir()] == ["a.png"]
    assert "File name too long" in capsys.readouterr().out


def test_an_internal_error_costs_its_file_and_ends_with_status_1(
        tmp_path, checkpoint, write_dicom, monkeypatch, capfd):
    for name in "abc":
        write_dicom(tmp_path / f"{name}.dcm", np.eye(32, dtype=np.uint8))

    def read(path, side, display_size, load=readers.read_radiograph):
        return load(path, side if path.stem != "b" else None, display_size)  # a mistake of ours
    monkeypatch.setattr(readers, "read_radiograph", read)
    assert run(tmp_path, checkpoint, tmp_path / "output") == 1
    assert read_annotations(tmp_path / "output").keys() == {"a", "c"}
    [(path, reason)] = read_csv(tmp_path / "output" / "skipped.csv")[1:]
    assert path == str(tmp_path / "b.dcm") and "internal error" in reason
    assert capfd.readouterr().err.count("Traceback") == 1


def test_batch_size_does_not_change_the_boxes(tmp_path, checkpoint, write_dicom):
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64)).astype(np.uint8)
        write_dicom(tmp_path / f"{i}.dcm", pixels)
    (tmp_path / "1.dcm").write_text("no DICOM")
    paths = sorted(tmp_path.glob("*.dcm"))
    model, _ = load_checkpoint(checkpoint)
    with readers.read_images(paths, side=64, workers=1) as readings:
        readings = list(zip("01234", readings))
    one, many = (list(predict.predict_masks(model, readings, CPU, batch_size=size))
                 for size in (1, 3))
    assert [key for key, *_ in one] == [key for key, *_ in many] == list("01234")
    for (key, _, first), (_, _, second) in zip(one, many):
        if key == "1":
            assert first is None and second is None
        else:
            np.testing.assert_allclose(first, second, atol=1e-5)


# A network or a run that fails


@pytest.fixture
def broken(tmp_path):
    """Function that makes a checkpoint of which a weight or, in the last layer, a bias is a
    value."""
    def make(value, name):
        model = PneumoniaUNET(patch_size=2)
        dict(model.named_parameters())[name].data.view(-1)[0] = value
        save_checkpoint(tmp_path / "broken.pth.tar", model, rescale_factor=16)
        return tmp_path / "broken.pth.tar"
    return make


FIRST, LAST = list(dict(PneumoniaUNET(patch_size=2).named_parameters()))[::len(
    dict(PneumoniaUNET(patch_size=2).named_parameters())) - 1]


@pytest.mark.parametrize("value, name", [
    (np.nan, FIRST), (np.inf, LAST), (-np.inf, LAST)])  # of -inf alone, the mask would be 0
def test_a_mask_that_is_not_finite_is_an_error_and_nobody_healthy(
        square, tmp_path, broken, value, name):
    output, path = tmp_path / "output", broken(value, name)
    assert run(square, path, output) == 1
    assert read_annotations(output) == {}
    [(_, reason)] = read_csv(output / "skipped.csv")[1:]
    assert str(path) in reason and "--precision fp32" in reason


def test_labels_do_not_need_a_finite_mask(tmp_path, phantoms, broken):
    assert run(phantoms / "stage_2_test_images", broken(np.nan, FIRST), tmp_path / "output",
               "--labels", phantoms / "stage_2_test_labels.csv") == 1


def test_ids_that_cannot_be_read_are_in_the_submission_alone(square, tmp_path, checkpoint):
    (square / "b.dcm").write_text("no DICOM")
    (square / "c.dcm").symlink_to(tmp_path / "nowhere")
    (square / "readme.txt").write_text("not an id")
    assert run(square, checkpoint, tmp_path / "output") == 0
    assert read_annotations(tmp_path / "output").keys() == {"a"}
    rows = read_csv(tmp_path / "output" / "submission.csv")[1:]
    assert [key for key, _ in rows] == ["a", "c", "b"] and rows[0][1] and not rows[1][1]


@pytest.fixture
def stoppable(tmp_path, phantoms, checkpoint, monkeypatch, capsys):
    """predict(output, *flags, stop) predicts four files, one of them damaged; before image number
    `stop` the run ends with an error. Returns the last line."""
    data = tmp_path / "four"
    shutil.copytree(phantoms / "stage_2_test_images", data)
    damaged, *_ = sorted(data.iterdir())
    damaged.write_text("no DICOM")
    masks_of = Runtime.predict_masks

    def predict_four(output, *flags, stop=None, error=KeyboardInterrupt):
        seen = []

        def predict_masks(runtime, model, images):
            seen.append(len(images))
            if len(seen) - 1 == stop:
                raise error
            return masks_of(runtime, model, images)
        monkeypatch.setattr(Runtime, "predict_masks", predict_masks)
        ends = pytest.raises(error) if stop is not None else contextlib.nullcontext()
        with ends:
            assert run(data, checkpoint, output, "--batch-size", "1", *flags) == 0
        return sum(seen), capsys.readouterr().out.splitlines()
    return predict_four


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_a_run_that_ends_early_writes_what_is_done_and_says_so(stoppable, tmp_path, error):
    _, lines = stoppable(tmp_path / "output", stop=2, error=error)
    assert lines[-1].startswith("partial: 3 of 4 files are done") and "predicted: 2," in lines[-1]
    assert len(read_annotations(tmp_path / "output")) == 2
    assert "partial: 3 of 4 files" in (tmp_path / "output" / "report.html").read_text("utf-8")


@pytest.mark.parametrize("flags", [[], ["--labels", "stage_2_test_labels.csv"]])
def test_the_next_run_goes_on_and_ends_as_one_that_was_not_stopped(
        stoppable, phantoms, tmp_path, flags):
    flags = [phantoms / word if word.endswith("csv") else word for word in flags]
    stoppable(tmp_path / "whole", *flags)
    for stop in (1, 1):
        stoppable(tmp_path / "parts", *flags, stop=stop)
    images, _ = stoppable(tmp_path / "parts", *flags)
    assert images == 1
    whole, parts = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert parts == whole


def test_a_line_of_the_journal_that_was_cut_off_is_done_again(stoppable, tmp_path):
    stoppable(tmp_path / "output", stop=2)
    journal = tmp_path / "output" / ".unfinished-0.jsonl"
    journal.write_text(journal.read_text()[:-40])
    assert stoppable(tmp_path / "output")[0] == 2
    assert len(read_annotations(tmp_path / "output")) == 3


def test_a_run_of_other_settings_starts_again_and_says_so(stoppable, tmp_path):
    stoppable(tmp_path / "output", stop=2)
    images, lines = stoppable(tmp_path / "output", "--box-threshold", "0.3")
    assert images == 3
    assert any(line.startswith("does not go on") and line.endswith(": thresholds")
               for line in lines)


def test_files_that_have_changed_since_are_predicted_again(stoppable, tmp_path):
    stoppable(tmp_path / "output", stop=2)
    *_, last = sorted((tmp_path / "output" / "images").iterdir())
    path = tmp_path / "four" / f"{last.stem}.dcm"
    os.utime(path, (1, 1))
    assert stoppable(tmp_path / "output")[0] == 2


def test_a_picture_that_is_gone_is_drawn_again(stoppable, tmp_path):
    stoppable(tmp_path / "output", stop=2)
    lost, *_ = (tmp_path / "output" / "images").iterdir()
    lost.unlink()
    stoppable(tmp_path / "output")
    assert lost.exists()


def test_the_results_of_a_complete_run_are_not_replaced_by_a_part(stoppable, tmp_path):
    stoppable(tmp_path / "output")
    before = read_annotations(tmp_path / "output")
    _, lines = stoppable(tmp_path / "output", "--box-threshold", "0.3", stop=1)
    assert read_annotations(tmp_path / "output") == before
    assert lines[-1].startswith("partial: ") and lines[-1].endswith("stays as it is")
    stoppable(tmp_path / "output", "--box-threshold", "0.3")
    assert read_annotations(tmp_path / "output") != before


# Pictures and the report


def test_pictures_are_the_radiographs_at_the_size_asked_for(tmp_path, checkpoint, write_dicom):
    pixels = np.random.default_rng(0).integers(0, 4096, (300, 600)).astype(np.uint16)
    write_dicom(tmp_path / "a.dcm", pixels)
    run(tmp_path, checkpoint, tmp_path / "output", "--image-size", "500")
    with Image.open(tmp_path / "output" / "images" / "a.png") as picture:
        assert picture.mode == "P" and picture.width == 500 and picture.height > 250


def test_pictures_do_not_change_the_boxes(tmp_path, phantoms, checkpoint):
    for flag in ("--save-images", "--no-save-images"):
        run(phantoms / "stage_2_test_images", checkpoint, tmp_path / flag, flag)
    assert read_annotations(tmp_path / "--save-images") == (
        read_annotations(tmp_path / "--no-save-images"))


def test_the_report_links_every_picture_and_names_every_skipped_file(mixed):
    *_, data, output, _ = mixed
    page = (output / "report.html").read_text("utf-8")
    assert page.count('<a href="images/') == 4
    assert page.count('<tr class="skipped">') == 2 and "readme.txt<p>is not a DICOM" in page


def test_a_prediction_does_not_replace_the_report_of_a_training(
        square, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINML_OUTPUT_PATH", str(tmp_path / "job"))
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "report.html").write_text("of train.py")
    predict.main(["--data", str(square), "--model", str(checkpoint)])
    assert (tmp_path / "job" / "report.html").read_text() == "of train.py"
    assert "<td>a<td>" in (tmp_path / "job" / "predictions.html").read_text("utf-8")


def test_without_a_variable_predictions_have_a_folder_of_their_own(monkeypatch):
    assert predict.make_parser().parse_args([]).output == os.path.join("output", "predictions")


def test_remarks_stand_in_the_report(tmp_path, checkpoint):
    save_image(tmp_path / "a.png", "RGB")
    run(tmp_path, checkpoint, tmp_path / "output")
    assert "is a colour image" in (tmp_path / "output" / "report.html").read_text("utf-8")


def test_without_save_images_the_report_has_no_pictures(square, checkpoint, tmp_path):
    run(square, checkpoint, tmp_path / "output")
    run(square, checkpoint, tmp_path / "output", "--no-save-images")
    page = (tmp_path / "output" / "report.html").read_text("utf-8")
    assert '<tr class="found"><td><td>a<td>' in page and "<a href" not in page


def test_labels_add_scores_and_curves_to_the_report(tmp_path, phantoms, checkpoint):
    run(phantoms / "stage_2_test_images", checkpoint, tmp_path, "--no-save-images",
        "--labels", phantoms / "stage_2_test_labels.csv")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<th>score" in page and 'src="scores.png"' in page
    assert (tmp_path / "scores.png").exists()


# Other formats


def save_image(path, mode="L"):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def predict_sources(checkpoint, output, *sources):
    status = predict.main([str(flag) for flag in (
        "--data", *sources, "--model", checkpoint, "--output", output)])
    return status, read_annotations(output).keys()


@pytest.mark.parametrize("name, mode", [
    ("a.png", "L"), ("a.png", "RGBA"), ("a.jpg", "RGB"), ("a.tif", "I;16")])
def test_a_single_image_is_predicted(tmp_path, checkpoint, name, mode):
    path = save_image(tmp_path / name, mode)
    assert predict_sources(checkpoint, tmp_path / "output", path) == (0, {"a"})
    assert (tmp_path / "output" / "images" / "a.png").exists()


def test_files_and_folders_are_predicted_together(tmp_path, square, checkpoint):
    path = save_image(tmp_path / "b.png")
    assert predict_sources(checkpoint, tmp_path / "output", square, path) == (0, {"a", "b"})


@pytest.mark.parametrize("name", ["images", "images/a.png"])
def test_a_file_that_its_picture_would_replace_is_kept(tmp_path, checkpoint, name):
    (tmp_path / "images").mkdir()
    path = save_image(tmp_path / "images" / "a.png")
    before = path.read_bytes()
    with pytest.raises(InputError, match="images/a.png would be replaced by its picture.*--output"):
        run(tmp_path / name, checkpoint, tmp_path)
    assert path.read_bytes() == before


def test_plots_of_an_earlier_run_are_not_predicted(tmp_path, checkpoint):
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "scores.png")
    assert predict_sources(checkpoint, tmp_path, tmp_path) == (0, {"a"})


def test_damaged_images_are_skipped_with_the_reason(tmp_path, checkpoint):
    for name in ("a.png", "b.png"):
        path = save_image(tmp_path / name)
    path.write_bytes(path.read_bytes()[:2000])
    assert predict_sources(checkpoint, tmp_path / "output", tmp_path) == (0, {"a"})
    [(path, reason)] = read_csv(tmp_path / "output" / "skipped.csv")[1:]
    assert path.endswith("b.png") and reason.startswith("is damaged")


# Models


def test_without_a_model_the_shipped_one_speaks_and_is_named(
        square, tmp_path, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(cli, "SHIPPED", checkpoint)
    monkeypatch.delenv("TRAINML_MODEL_PATH", raising=False)
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(square), "--output", str(tmp_path / "results")]
    assert predict.main(flags) == 0
    assert "; the shipped model (docs/model-card.md); box " in capsys.readouterr().out
    page = (tmp_path / "results" / "report.html").read_text("utf-8")
    assert "model: the shipped model (docs/model-card.md)<br>" in page

    shutil.copy(checkpoint, tmp_path / "final.pth.tar")  # one's own comes first
    assert predict.main(flags) == 0
    assert "; ./final.pth.tar; box " in capsys.readouterr().out


def test_a_job_without_its_model_does_not_get_the_shipped_one(
        square, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(cli, "SHIPPED", checkpoint)
    monkeypatch.setenv("TRAINML_MODEL_PATH", str(tmp_path / "models"))
    with pytest.raises(InputError, match="final.pth.tar does not exist.*TRAINML_MODEL_PATH"):
        predict.main(["--data", str(square), "--output", str(tmp_path / "output")])


# Thresholds


@pytest.mark.parametrize("stored, used", [(0.0, 0.0), (None, Thresholds().box)])
def test_a_threshold_of_0_is_kept_and_none_is_replaced(square, tmp_path, capsys, stored, used):
    save_checkpoint(tmp_path / "final.pth.tar", PneumoniaUNET(patch_size=2), best_threshold=stored,
                    rescale_factor=16)
    run(square, tmp_path / "final.pth.tar", tmp_path / "output", "--no-save-images")
    assert f"box threshold {used:.2f}, " in capsys.readouterr().out


@pytest.mark.parametrize("flags, used", [
    (["--bt", "0.3"], "box threshold 0.30, gate threshold 0.00 (box given by flag)"),
    (["--gt", "0.9"], "box threshold 0.04, gate threshold 0.90 (gate given by flag)"),
    (["--box-threshold", "0", "--gate-threshold", "0"],
     "box threshold 0.00, gate threshold 0.00 (box and gate given by flag)"),
])
def test_flags_take_the_place_of_the_checkpoints_thresholds(
        square, tmp_path, checkpoint, capsys, flags, used):
    run(square, checkpoint, tmp_path / "output", "--no-save-images", *flags)
    assert used in capsys.readouterr().out


@pytest.mark.parametrize("stored, weight", [({}, 1.0), ({"size_weight": 0.8}, 0.8)])
def test_files_of_earlier_versions_keep_their_boxes(
        square, tmp_path, checkpoint, monkeypatch, stored, weight):
    model, _ = load_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "final.pth.tar", model, rescale_factor=16, best_threshold=0.04,
                    **stored)
    weights = []

    def regress_sides(boxes, original_size, weight):
        weights.append(weight)
        return boxes
    monkeypatch.setattr(metrics, "regress_sides", regress_sides)
    run(square, tmp_path / "final.pth.tar", tmp_path / "output", "--no-save-images")
    assert weights == [weight]


# Labels


def test_labels_score_the_folder(tmp_path, phantoms, checkpoint, capsys):
    labels = phantoms / "stage_2_test_labels.csv"
    images = phantoms / "stage_2_test_images"
    assert run(images, checkpoint, tmp_path / "output", "--labels", labels) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("RSNA Mean Average Precision: ")
    assert lines[-1].startswith("Total Average Precision: ")
    assert any("bootstrap over 4 images" in line for line in lines)
    figures = json.loads((tmp_path / "output" / "metrics.json").read_text("utf-8"))
    assert lines[-2].endswith(f"{figures['rsna_mean_average_precision']:.4f}")
    assert figures["scored_images"] == 4 and 0 <= figures["froc_0.125"] <= figures["froc_2"] <= 1


def test_labels_without_an_image_are_named(tmp_path, phantoms, checkpoint, capsys):
    text = (phantoms / "stage_2_test_labels.csv").read_text() + "elsewhere,,,,,0\n"
    (tmp_path / "labels.csv").write_text(text)
    run(phantoms / "stage_2_test_images", checkpoint, tmp_path / "output", "--no-save-images",
        "--labels", tmp_path / "labels.csv")
    assert "ids of the labels have no image that can be read (1): elsewhere" in (
        capsys.readouterr().out)


def test_images_without_a_label_are_predicted_and_named(tmp_path, phantoms, checkpoint, capsys):
    head, *rows = (phantoms / "stage_2_test_labels.csv").read_text().splitlines()
    left_out = rows[-1].split(",")[0]
    rows = [row for row in rows if not row.startswith(left_out)]
    (tmp_path / "labels.csv").write_text("\n".join([head, *rows]))
    run(phantoms / "stage_2_test_images", checkpoint, tmp_path / "output", "--no-save-images",
        "--labels", tmp_path / "labels.csv")
    out = capsys.readouterr().out
    assert len(read_annotations(tmp_path / "output")) == 4
    assert f"images have no label and are not scored (1): {left_out}" in out
    assert "bootstrap over 3 images" in out


# Mistakes


def test_a_zip_file_is_named_as_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as archive:
        archive.writestr("a.dcm", b"")
    message = "scans.zip is a zip file, not the folder.*--data.*TRAINML_DATA_PATH"
    with pytest.raises(InputError, match=message):
        predict.main(["--data", str(tmp_path / "scans.zip")])


@pytest.mark.parametrize("argv, message", [
    (["--data", "nowhere"], "nowhere does not exist.*--data.*TRAINML_DATA_PATH"),
    (["--data", ".", "--model", "nothing.tar"],
     "nothing.tar does not exist.*--model.*TRAINML_MODEL_PATH"),
    (["--data", ".", "--model", __file__, "--device", "cpu", "--precision", "fp16"],
     "fp16 needs a GPU"),
])
def test_missing_paths_and_unusable_flags_are_named(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        predict.main(argv)


def test_labels_that_do_not_exist_are_named(square, tmp_path, checkpoint):
    with pytest.raises(InputError, match="none.csv does not exist: give another with --labels"):
        run(square, checkpoint, tmp_path / "output", "--labels", "none.csv")


def test_images_too_small_for_the_network_are_refused(square, tmp_path):
    save_checkpoint(tmp_path / "final.pth.tar", PneumoniaUNET(patch_size=4), rescale_factor=4)
    with pytest.raises(InputError, match="--rescale-factor 16 makes .*give 8 or less"):
        run(square, tmp_path / "final.pth.tar", tmp_path / "output", "--rf", "16")


def test_processes_of_a_machine_share_its_readers(square, checkpoint, tmp_path, monkeypatch):
    """As the second launcher variable says; one process alone is left of them here."""
    asked = []

    def read_images(paths, **options):
        asked.append(options["workers"])
        raise KeyboardInterrupt
    monkeypatch.setattr(predict, "read_images", read_images)
    monkeypatch.setattr(predict.parallel, "find_launch",
                        lambda: predict.parallel.Launch(local_world=4))
    with pytest.raises(KeyboardInterrupt):
        run(square.parent, checkpoint, tmp_path, "--workers", "8")
    assert asked == [2]
