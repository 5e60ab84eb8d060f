import numpy as np
import pytest

from data_processing import Labels
from metrics import Thresholds
from model import choose_runtime
from radiographs import Radiograph, Reading
from results.predictions import Predictions

BLACK = Reading(Radiograph(np.zeros((64, 64), np.uint8), (1024, 1024)))
SETTINGS = {"model": ["final.pth.tar", None], "image_size": None, "save_images": False,
            "dicom": False}


def begin(folder, ids, labels=Labels({}, {}), thresholds=Thresholds()):
    found = {key: folder / f"{key}.dcm" for key in ids}, []
    return Predictions(folder, found, choose_runtime("cpu", "fp32"), settings=SETTINGS,
                       thresholds=thresholds, labels=labels)


@pytest.fixture
def perfect(tmp_path):
    """Predictions of two images, one with a box that is found exactly and one without any, and
    their overlays."""
    masks = np.zeros((2, 64, 64))
    masks[0, 16:32, 8:24], masks[1] = 0.9, 0.1
    labels = Labels({"ill": np.array([[128, 256, 256, 256]]), "well": np.zeros((0, 4))},
                    {"ill": "AP", "well": "PA"})
    thresholds = Thresholds(0.5, 0.5, size_weight=1)
    with begin(tmp_path, labels.boxes, labels, thresholds) as predictions:
        yield predictions, {key: predictions.add(key, BLACK, mask)
                            for key, mask in zip(labels.boxes, masks)}


def test_perfect_predictions_score_1(perfect, capsys):
    predictions, _ = perfect
    assert predictions.finish() == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "RSNA Mean Average Precision: 1.0000", "Total Average Precision: 0.5000"]


def test_annotations_are_boxes_in_original_pixels(perfect):
    predictions, _ = perfect
    boxes = {key: made.boxes for key, made in predictions.made.items()}
    assert boxes == {"ill": "0.9000 128.0 256.0 256.0 256.0", "well": ""}


def test_the_truth_is_drawn_beside_the_prediction(perfect):
    _, overlays = perfect
    assert overlays["ill"].truth.tolist() == overlays["ill"].boxes.tolist()
    assert overlays["well"].truth.shape == overlays["well"].boxes.shape == (0, 4)


def test_a_picture_knows_its_id_and_the_thresholds_in_use(perfect):
    _, overlays = perfect
    assert overlays["ill"].patient_id == "ill"
    assert str(overlays["ill"].thresholds) == "box threshold 0.50, gate threshold 0.50 (defaults)"


def test_without_labels_no_truth_is_drawn_and_nothing_scored(tmp_path, capsys):
    with begin(tmp_path, ["a"]) as predictions:
        overlay = predictions.add("a", BLACK, np.zeros((64, 64)))
        predictions.finish()
    assert overlay.truth is None and "Precision" not in capsys.readouterr().out


def test_a_complete_run_leaves_no_journal(tmp_path):
    with begin(tmp_path, ["a"]) as predictions:
        predictions.add("a", BLACK, np.zeros((64, 64)))
        assert list(tmp_path.glob(".*"))
        predictions.finish()
    assert not list(tmp_path.glob(".*"))
