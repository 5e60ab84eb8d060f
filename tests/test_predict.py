import csv
import json
import os
import stat
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import dicom
import predict
from job import InputError
from model import PneumoniaUNET, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network that sees opacities in bright places: enough to get boxes without training."""
    torch.manual_seed(0)
    model = PneumoniaUNET()
    path = tmp_path_factory.mktemp("model") / "final.pth.tar"
    save_checkpoint(path, model, best_threshold=0.04, gate_threshold=0.0, rescale_factor=16)
    return path


def run(data, checkpoint, output, *flags):
    return predict.main(["--data", str(data), "--model", str(checkpoint), "--output", str(output), *flags])


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_every_file_is_in_annotations_or_skipped(tmp_path, checkpoint, write_dicom, capsys):
    data, output = tmp_path / "in put", tmp_path / "not" / "there yet"
    (data / "sub" / "x.dcm").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.dcm", "sub/Ünï code.DCM", "1.2.3"):
        write_dicom(data / name, rng.integers(0, 4096, (48, 64)).astype(np.uint16))
    write_dicom(data / "sub" / "b.dcm", np.eye(4, dtype=np.uint8))
    (data / "readme.txt").write_text("no radiograph")
    data.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert run(data, checkpoint, output) == 0
    annotations = json.loads((output / "annotations.json").read_text("utf-8"))
    assert set(annotations) == {"a", "b", "Ünï code", "1.2.3"}
    assert read_csv(output / "submission.csv") == [["patientId", "PredictionString"], *map(list, annotations.items())]
    skipped = dict(read_csv(output / "skipped.csv")[1:])
    assert {os.path.relpath(path, data) for path in skipped} == {"sub/x.dcm", "readme.txt"}
    assert {path.stem for path in (output / "images").iterdir()} == set(annotations)
    assert "4 images predicted" in capsys.readouterr().out


def test_nothing_to_predict_is_status_1_and_old_reports_go(tmp_path, checkpoint, write_dicom):
    data, output = tmp_path / "data", tmp_path / "output"
    data.mkdir()
    (data / "a.dcm").write_text("no DICOM")
    assert run(data, checkpoint, output) == 1
    assert json.loads((output / "annotations.json").read_text()) == {} and (output / "skipped.csv").exists()
    write_dicom(data / "a.dcm", np.eye(32, dtype=np.uint8))
    assert run(data, checkpoint, output, "--no-save-images") == 0
    assert not (output / "skipped.csv").exists() and not list((output / "images").iterdir())


def test_a_run_that_predicts_nothing_keeps_the_results_of_before(tmp_path, checkpoint, capsys):
    data, output = tmp_path / "data", tmp_path / "output"
    data.mkdir()
    output.mkdir()
    (data / "a.dcm").write_text("no DICOM")
    for name in ("annotations.json", "submission.csv"):
        (output / name).write_text("old")
    assert run(data, checkpoint, output) == 1
    assert [(output / name).read_text() for name in ("annotations.json", "submission.csv")] == ["old", "old"]
    assert "annotations.json" in capsys.readouterr().out and (output / "skipped.csv").exists()


@pytest.mark.parametrize("data, output", [(".", "results"), (".", "."), ("scans", ".")])
def test_results_inside_the_data_folder_are_not_searched(tmp_path, checkpoint, write_dicom, data, output):
    (tmp_path / "scans").mkdir()
    write_dicom(tmp_path / "scans" / "a.dcm", np.eye(32, dtype=np.uint8))
    for _ in range(2):
        assert run(tmp_path / data, checkpoint, tmp_path / output) == 0
        assert json.loads((tmp_path / output / "annotations.json").read_text()).keys() == {"a"}
    skipped = tmp_path / output / "skipped.csv"
    assert not skipped.exists() or not any("images" in row[0] for row in read_csv(skipped))


def test_pictures_of_files_that_share_their_stem_lie_in_sub_folders(tmp_path, checkpoint, write_dicom):
    for patient in ("p1", "p2"):
        (tmp_path / "data" / patient).mkdir(parents=True)
        write_dicom(tmp_path / "data" / patient / "IM0", np.eye(32, dtype=np.uint8))
    assert run(tmp_path / "data", checkpoint, tmp_path / "output") == 0
    assert json.loads((tmp_path / "output" / "annotations.json").read_text()).keys() == {"p1/IM0", "p2/IM0"}
    assert (tmp_path / "output" / "images" / "p1" / "IM0.png").exists()
    assert (tmp_path / "output" / "images" / "p2" / "IM0.png").exists()


def test_a_name_too_long_costs_its_picture_alone(tmp_path, checkpoint, write_dicom, capsys):
    (tmp_path / "data").mkdir()
    for name in ("a" * 255, "b.dcm"):
        write_dicom(tmp_path / "data" / name, np.eye(32, dtype=np.uint8))
    assert run(tmp_path / "data", checkpoint, tmp_path / "output") == 0
    assert json.loads((tmp_path / "output" / "annotations.json").read_text()).keys() == {"a" * 255, "b"}
    assert [path.name for path in (tmp_path / "output" / "images").iterdir()] == ["b.png"]
    assert "File name too long" in capsys.readouterr().out


def test_an_internal_error_costs_its_file_and_ends_with_status_1(
        tmp_path, checkpoint, write_dicom, monkeypatch, capfd):
    for name in "abc":
        write_dicom(tmp_path / f"{name}.dcm", np.eye(32, dtype=np.uint8))

    def read(path, rescale_factor, load=dicom.load_and_prepare_image):
        return load(path, rescale_factor if path.stem != "b" else None)  # a mistake of ours
    monkeypatch.setattr(dicom, "load_and_prepare_image", read)
    assert run(tmp_path, checkpoint, tmp_path / "output") == 1
    assert json.loads((tmp_path / "output" / "annotations.json").read_text()).keys() == {"a", "c"}
    [(path, reason)] = read_csv(tmp_path / "output" / "skipped.csv")[1:]
    assert path == str(tmp_path / "b.dcm") and "internal error" in reason
    assert capfd.readouterr().err.count("Traceback") == 1


def test_a_zip_file_is_named_as_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as archive:
        archive.writestr("a.dcm", b"")
    with pytest.raises(InputError, match="scans.zip is a zip file, not a folder.*--data.*TRAINML_DATA_PATH"):
        predict.main(["--data", str(tmp_path / "scans.zip")])


@pytest.mark.parametrize("stored, used", [(0.0, 0.0), (None, predict.BOX_THRESHOLD)])
def test_a_threshold_of_0_is_kept_and_none_is_replaced(tmp_path, write_dicom, capsys, stored, used):
    save_checkpoint(tmp_path / "final.pth.tar", PneumoniaUNET(), best_threshold=stored, rescale_factor=16)
    (tmp_path / "data").mkdir()
    write_dicom(tmp_path / "data" / "a.dcm", np.eye(32, dtype=np.uint8))
    assert run(tmp_path / "data", tmp_path / "final.pth.tar", tmp_path / "output", "--no-save-images") == 0
    assert f"box threshold {used:.2f}, " in capsys.readouterr().out


def test_batch_size_does_not_change_the_boxes(tmp_path, checkpoint, write_dicom):
    for i in range(5):
        write_dicom(tmp_path / f"{i}.dcm", np.random.default_rng(i).integers(0, 255, (64, 64)).astype(np.uint8))
    files = {path.stem: path for path in sorted(tmp_path.glob("*.dcm"))}
    model, _ = predict.load_checkpoint(checkpoint)
    runtime = predict.choose_runtime("cpu", "fp32")
    one, many = ([mask for *_, mask in predict.predict_files(
        model, files, runtime, batch_size=size, rescale_factor=16, workers=2)] for size in (1, 3))
    np.testing.assert_allclose(one, many, atol=1e-5)


def test_boxes_come_back_in_original_pixels():
    mask = np.zeros((64, 64), np.float32)
    mask[16:32, 8:24] = 0.8
    mask[60:61, 60:61] = 0.9  # 16 x 16 original pixels: too small
    thresholds = {"box_threshold": 0.5, "gate_threshold": 0.7, "size_weight": 1}
    boxes, confidences = predict.find_boxes(mask, (2048, 1024), **thresholds)
    assert boxes.tolist() == [[128, 512, 256, 512]] and confidences.tolist() == pytest.approx([0.8])
    assert len(predict.find_boxes(mask * 0.77, (2048, 1024), **thresholds)[0]) == 0


@pytest.mark.parametrize("side", [128, 256, 1024, 4000])
def test_the_minimum_area_is_a_share_of_the_image(side):
    mask = np.zeros((64, 64), np.float32)
    mask[:4, :5] = 0.8  # 20 of 4,096: above 5,000 / 1,024**2
    mask[60:, 60:63] = 0.8
    mask[60:, 55:57] = 0.9  # 8 of 4,096
    mask[32:37, 32:36] = 0.7
    thresholds = {"box_threshold": 0.5, "gate_threshold": 0.7, "size_weight": 1}
    boxes, _ = predict.find_boxes(mask, (side, side), **thresholds)
    np.testing.assert_allclose(boxes * 64 / side, [[0, 0, 5, 4], [32, 32, 4, 5]])


def test_sides_go_towards_the_typical_ones_within_the_image():
    typical_width, typical_height = 2000 * predict.TYPICAL_SIDES[0], 1000 * predict.TYPICAL_SIDES[1]
    boxes = np.array([[500, 300, typical_width, typical_height], [900, 100, typical_width / 32, typical_height * 3],
                      [0, 0, 20, 900], [1980, 990, 20, 10]])
    same, pulled, *edges = predict.regress_sides(boxes, (1000, 2000), 0.8)
    np.testing.assert_allclose(same, boxes[0])
    np.testing.assert_allclose(pulled[2], typical_width / 16)  # 32 ** 0.8 = 16
    np.testing.assert_allclose(pulled[0] + pulled[2] / 2, 900 + typical_width / 64)
    np.testing.assert_allclose(pulled[3], 3 ** 0.8 * typical_height)
    np.testing.assert_allclose(pulled[1] + pulled[3] / 2, 100 + 1.5 * typical_height)
    assert edges[0][0] == 0 and edges[0][2] > 20 and edges[0][3] < 900
    assert edges[1][0] < 1980 and edges[1][0] + edges[1][2] == 2000 and edges[1][1] + edges[1][3] == 1000
    np.testing.assert_allclose(predict.regress_sides(boxes[:3], (1000, 2000), 1), boxes[:3])
    assert predict.regress_sides(np.zeros((0, 4)), (1000, 2000), 0.8).shape == (0, 4)


@pytest.mark.parametrize("stored, weight", [({}, 1.0), ({"size_weight": 0.8}, 0.8)])
def test_files_of_earlier_versions_keep_their_boxes(tmp_path, checkpoint, write_dicom, monkeypatch, stored, weight):
    model, _ = predict.load_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "final.pth.tar", model, rescale_factor=16, best_threshold=0.04, **stored)
    (tmp_path / "data").mkdir()
    write_dicom(tmp_path / "data" / "a.dcm", np.eye(32, dtype=np.uint8))
    weights = []

    def regress_sides(boxes, original_size, weight):
        weights.append(weight)
        return boxes
    monkeypatch.setattr(predict, "regress_sides", regress_sides)
    assert run(tmp_path / "data", tmp_path / "final.pth.tar", tmp_path / "output", "--no-save-images") == 0
    assert weights == [weight]


def test_labels_score_the_folder_and_name_what_is_missing(tmp_path, phantoms, checkpoint, capsys):
    labels = phantoms / "stage_2_test_labels.csv"
    (tmp_path / "labels.csv").write_text(labels.read_text() + "elsewhere,,,,,0\n")
    flags = ["--labels", str(tmp_path / "labels.csv")]
    assert run(phantoms / "stage_2_test_images", checkpoint, tmp_path / "output", *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("RSNA Mean Average Precision: ") and lines[-1].startswith("Total Average Precision: ")
    assert any("1 ids of the labels have no image that can be read: elsewhere" in line for line in lines)


def test_perfect_predictions_score_1(capsys):
    predict.print_scores([(0.9, True, "AP", 1.0), (0.1, False, "AP", float("nan"))], [], [])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "RSNA Mean Average Precision: 1.0000", "Total Average Precision: 0.5000"]


def test_a_caption_says_which_thresholds_are_in_use():
    blank = np.zeros((64, 64), np.uint8), np.zeros((64, 64)), ([], [], (64, 64))
    with_caption = predict.draw_overlay(*blank, caption="box threshold 0.50")
    assert np.asarray(with_caption)[-20:].any() and not np.asarray(predict.draw_overlay(*blank))[-20:].any()


def test_overlay_shows_truth_prediction_and_keeps_the_aspect():
    mask = np.zeros((64, 64), np.float32)
    predicted = ([[200, 400, 300, 500]], [0.7], (2000, 1000))
    picture = predict.draw_overlay(np.zeros((64, 64), np.uint8), mask, predicted, truth=[[100, 1200, 600, 300]])
    assert picture.size == (512, 1024 + 44)
    pixels = np.asarray(picture)[:1024]
    for colour, x, y in ((predict.PREDICTION, 200, 400), (predict.TRUTH, 100, 1200)):
        rows, columns = np.nonzero((pixels == colour).all(axis=-1))
        assert abs(columns.min() - x * 0.512) <= 2 and rows.size > 100
        assert (pixels[round(y * 0.512), round((x + 6) * 0.512)] == colour).all()


def test_heat_map_follows_the_mask():
    mask = np.zeros((64, 64), np.float32)
    mask[:, 32:] = 1
    pixels = np.asarray(predict.draw_overlay(np.full((64, 64), 128, np.uint8), mask, ([], [], (512, 512))), int)
    assert (pixels[100, 100] == 128).all() and pixels[100, 400, 0] > pixels[100, 400, 2] + 50


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1)])
def test_extreme_shapes_can_be_drawn(shape):
    picture = predict.draw_overlay(np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.float32), ([], [], shape))
    assert picture.size[0] == 512 and 60 <= picture.size[1] <= 2048 + 44


def test_overlay_is_a_png(tmp_path):
    predict.save_overlay(tmp_path / "a.png", np.zeros((64, 64), np.uint8), np.zeros((64, 64)), ([], [], (64, 64)))
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.size == (512, 556)


def test_names_that_are_no_text_survive(tmp_path):
    predict.write_text(tmp_path / "a.json", json.dumps({"caf\udce9": "Ü"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"caf\udce9": "Ü"}


@pytest.mark.parametrize("argv, message", [
    (["--data", "nowhere"], "nowhere does not exist.*--data.*TRAINML_DATA_PATH"),
    (["--data", ".", "--model", "nothing.tar"], "nothing.tar does not exist.*--model.*TRAINML_MODEL_PATH"),
    (["--device", "cpu", "--precision", "fp16"], "fp16 needs a GPU"),
])
def test_mistakes_are_named(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        predict.main(argv)


def test_progress_prints_plain_lines_in_a_job_log(monkeypatch, capsys):
    monkeypatch.setattr(predict, "LOG_SECONDS", -1)
    assert list(predict.progress(range(3), total=3, description="work")) == [0, 1, 2]
    assert capsys.readouterr().out.splitlines() == ["work: 1 of 3", "work: 2 of 3", "work: 3 of 3"]
