"""The synthetic data set: layout, headers, boxes, repeatability, and that it spares what it did
not make."""

import _multiprocessing
import json
import tempfile
import uuid

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom import config, dcmread
from pydicom.encaps import get_frame

import sample_data
from cli import InputError

TRAIN, TEST = 10, 2


def contents(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    sample_data.main(["--train", str(TRAIN), "--test", str(TEST), "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def labels(folder):
    return pd.read_csv(folder / "stage_2_train_labels.csv")


@pytest.fixture(scope="module")
def classes(folder):
    return pd.read_csv(folder / "stage_2_detailed_class_info.csv")


@pytest.fixture(scope="module")
def datasets(folder):
    with config.disable_value_validation():
        return [dcmread(path) for path in sorted(folder.glob("*/*.dcm"))]


def test_the_layout_is_the_challenges(folder, labels):
    train = {path.stem for path in folder.glob("stage_2_train_images/*")}
    test = {path.stem for path in folder.glob("stage_2_test_images/*")}
    assert (len(train), len(test), len(train & test)) == (TRAIN, TEST, 0)
    assert all(str(uuid.UUID(name)) == name for name in train | test)
    assert set(labels["patientId"]) == train


def test_tables_have_the_columns_of_the_challenge(labels, classes):
    assert list(labels) == ["patientId", "x", "y", "width", "height", "Target"]
    assert list(classes) == ["patientId", "class"]


def test_both_tables_have_the_same_rows(labels, classes):
    assert list(labels["patientId"]) == list(classes["patientId"])
    assert list(labels["Target"] == 1) == list(classes["class"] == sample_data.OPACITY)


def test_ten_images_are_of_every_class_and_four_are_positive(labels, classes):
    assert set(classes["class"]) == set(sample_data.CLASSES)
    assert labels[labels["Target"] == 1]["patientId"].nunique() == 4


def test_images_without_an_opacity_have_no_box(labels):
    assert labels[labels["Target"] == 0].drop(columns=["patientId", "Target"]).isna().all(axis=None)


def test_table_cells_are_written_as_in_the_challenge(folder):
    rows = (folder / "stage_2_train_labels.csv").read_text().splitlines()[1:]
    assert all(row.endswith(",,,,,0") or row.endswith(".0,1") for row in rows)


def test_boxes_lie_in_the_image(labels):
    boxes = labels[labels["Target"] == 1]
    assert (boxes[["x", "y"]] >= 0).all(axis=None)
    assert (boxes[["width", "height"]] > 0).all(axis=None)
    assert (boxes["x"] + boxes["width"]).max() <= 1024
    assert (boxes["y"] + boxes["height"]).max() <= 1024


def test_header_is_the_challenges(datasets):
    for dataset in datasets:
        assert dataset.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.50"
        assert dataset.SOPClassUID.name == "Secondary Capture Image Storage"
        assert (dataset.Modality, dataset.ConversionType) == ("CR", "WSD")
        assert dataset.BodyPartExamined == "CHEST"
        assert (dataset.Rows, dataset.Columns, dataset.BitsStored) == (1024, 1024, 8)
        assert dataset.PhotometricInterpretation == "MONOCHROME2"
        assert dataset.PatientSex in ("M", "F") and dataset.ViewPosition in ("AP", "PA")
        assert dataset.PatientAge.isdecimal() and len(dataset.PixelSpacing) == 2
        assert "WindowCenter" not in dataset and "RescaleSlope" not in dataset


def test_pixels_are_a_jpeg_stream_without_jfif(datasets):
    for dataset in datasets:
        stream = get_frame(dataset.PixelData, 0, number_of_frames=1)
        assert stream[:2] == b"\xff\xd8" and stream[2:4] != b"\xff\xe0"
        assert b"JFIF" not in stream[:64]
        pixels = dataset.pixel_array
        assert pixels.shape == (1024, 1024) and pixels.dtype == np.uint8 and pixels.std() > 20


def test_encoding_keeps_the_image(tmp_path):
    image = np.tile(np.linspace(0, 255, 1024), (1024, 1)).astype(np.uint8)
    (tmp_path / "image.jpg").write_bytes(sample_data.encode_jpeg(image))
    with Image.open(tmp_path / "image.jpg") as decoded:
        assert np.abs(np.int16(decoded) - image).max() <= 3


def test_an_image_depends_on_its_seed_and_index_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_data.cli, "usable_cores", lambda: 1)
    sample_data.write_images(tmp_path / "one", 3, seed=42, split=0)
    monkeypatch.setattr(sample_data.cli, "usable_cores", lambda: 3)
    sample_data.write_images(tmp_path / "three", 3, seed=42, split=0)
    made = contents(tmp_path / "one")
    assert made == contents(tmp_path / "three")
    assert made.items() <= contents(folder / "stage_2_train_images").items()
    assert sample_data.patient_id_of(42, 0, 0) != sample_data.patient_id_of(43, 0, 0)


def test_box_sizes_follow_the_challenge():
    rng = np.random.default_rng(0)
    sizes = np.array([sample_data.draw_box_size(rng) for _ in range(4000)])
    assert np.percentile(sizes, [5, 50, 95], axis=0) == pytest.approx(
        np.array([[124, 121], [217, 298], [317, 623]]), rel=0.07)
    areas = sizes.prod(axis=1)
    assert np.percentile(areas, [5, 50, 95]) == pytest.approx([17153, 64829, 180948], rel=0.12)


def test_a_box_holds_its_opacity_and_two_have_a_lung_each():
    rng = np.random.default_rng(3)
    _, lungs = sample_data.draw_chest(rng, set())
    for _ in range(30):
        fields = sample_data.opacity_fields(rng, lungs)
        opacities = [sample_data.draw_opacity(rng, field) for field in fields]
        for patch, box in opacities:
            x, y, width, height = (int(value) // sample_data.CELL for value in box)
            visible = patch > 0.35
            inside = visible[y:y + height, x:x + width].sum()
            assert inside == visible.sum() > 0.4 * width * height
        if len(opacities) == 2:
            (left, _, width, _), (right, *_) = sorted(box for _, box in opacities)
            assert left + width <= right + 40


@pytest.fixture(scope="module")
def release_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "release"
    sample_data.main(["--train", str(TRAIN), "--test", str(TEST), "--layout", "rsna", "--output",
                      str(folder)])
    return folder


def test_the_release_has_the_same_images_in_a_folder_for_each_study(folder, release_folder):
    with config.disable_value_validation():
        expected = {dataset.SOPInstanceUID: dataset
                    for dataset in map(dcmread, folder.glob("*/*.dcm"))}
        found = {path: dcmread(path) for path in release_folder.glob("mdai*/*/*/*.dcm")}
    assert len(found) == len(expected) == TRAIN + TEST
    for path, dataset in found.items():
        same = expected[dataset.SOPInstanceUID]
        assert path.parts[-3:-1] == (dataset.StudyInstanceUID, dataset.SeriesInstanceUID)
        assert path.stem == dataset.SOPInstanceUID
        assert dataset.PixelData == same.PixelData and dataset.PatientID != same.PatientID
    assert len({dataset.PatientID for dataset in found.values()}) == TRAIN + TEST


def test_the_release_names_every_image_once_and_the_test_images(folder, release_folder):
    annotations, mapping, submission = (release_folder / name for name in sample_data.RELEASE_FILES)
    entries = json.loads(mapping.read_text())
    assert {entry["subset_img_id"] for entry in entries} == {
        path.stem for path in folder.glob("*/*.dcm")}
    assert set(pd.read_csv(submission)["patientId"]) == {
        path.stem for path in folder.glob("stage_2_test_images/*")}
    groups = json.loads(annotations.read_text())["labelGroups"]
    assert [group["name"] for group in groups] == ["Calculated", "Team 1"]


def test_one_layout_replaces_the_other(tmp_path):
    sample_data.main([*TWO, str(tmp_path)])
    sample_data.main(["--layout", "rsna", *TWO, str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [sample_data.RELEASE_IMAGES, *sample_data.RELEASE_FILES, "synthetic.json"])
    sample_data.main([*TWO, str(tmp_path)])
    assert not list(tmp_path.glob("mdai*")) and not list(tmp_path.glob("pneumonia*"))


def test_refuses_an_image_that_others_added_to_the_release(tmp_path):
    sample_data.main(["--layout", "rsna", *TWO, str(tmp_path)])
    (tmp_path / sample_data.RELEASE_IMAGES / "1.2.3").mkdir()
    with pytest.raises(InputError, match=f"{sample_data.RELEASE_IMAGES} holds data"):
        sample_data.main([*TWO, str(tmp_path)])


@pytest.mark.parametrize("name", sample_data.IMAGES + sample_data.TABLES
                         + sample_data.RELEASE_FILES)
def test_refuses_data_of_others(tmp_path, name):
    path = tmp_path / name
    path.write_text("patientId\n") if name.endswith(".csv") else path.mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=f"{name} holds data .* did not make: .*--output"):
        sample_data.main(["--train", "1", "--test", "0", "--output", str(tmp_path)])
    assert sorted(tmp_path.rglob("*")) == before


FOREIGN = "00436515-870c-4b36-a041-de91049b9ab4"
TWO = ["--train", "2", "--test", "1", "--output"]


def test_refuses_an_image_that_others_put_beside_its_own(tmp_path):
    sample_data.main([*TWO, str(tmp_path)])
    (tmp_path / "stage_2_train_images" / f"{FOREIGN}.dcm").write_bytes(b"a radiograph")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="stage_2_train_images"):
        sample_data.main([*TWO, str(tmp_path)])
    assert contents(tmp_path) == before


def test_refuses_a_link_to_other_data(tmp_path):
    output = tmp_path / "data"
    sample_data.main(["--train", "1", "--test", "0", "--output", str(output)])
    (output / "stage_2_test_images").rmdir()
    (output / "stage_2_test_images").symlink_to(tmp_path)
    with pytest.raises(InputError, match="stage_2_test_images"):
        sample_data.main(["--output", str(output)])


def test_a_folder_that_is_read_only_is_refused_and_keeps_its_data(tmp_path, monkeypatch):
    sample_data.main([*TWO, str(tmp_path)])
    before = contents(tmp_path)

    def refuse(**_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match="cannot write to .*Permission denied.*--output"):
        sample_data.main([*TWO, str(tmp_path)])
    assert contents(tmp_path) == before


def test_says_what_it_made_and_what_comes_next(tmp_path, capsys):
    sample_data.main([*TWO, str(tmp_path)])
    out = capsys.readouterr().out
    assert "2 training images (2 positive" in out
    assert out.endswith(f"data_processing.py, with TRAINML_DATA_PATH={tmp_path}\n")


def test_replaces_its_own_and_leaves_the_rest(tmp_path):
    sample_data.main([*TWO, str(tmp_path)])
    (tmp_path / "notes.txt").write_text("mine")
    sample_data.main(["--train", "1", "--test", "0", "--seed", "7", "--output", str(tmp_path)])
    assert len(list(tmp_path.glob("*/*.dcm"))) == 1 and (tmp_path / "notes.txt").exists()


def test_the_same_flags_make_the_same_data_again(tmp_path):
    sample_data.main([*TWO, str(tmp_path)])
    first = contents(tmp_path)
    sample_data.main([*TWO, str(tmp_path)])
    assert contents(tmp_path) == first


@pytest.mark.parametrize("arguments", [["--train", "0"], ["--test", "-1"], ["--seed", "-1"]])
def test_refuses_impossible_numbers(arguments, tmp_path):
    with pytest.raises(InputError, match=arguments[0]):
        sample_data.main([*arguments, "--output", str(tmp_path / "data")])
    assert not (tmp_path / "data").exists()


def test_images_are_made_without_semaphores(tmp_path, monkeypatch):
    def refuse(*_):
        raise FileNotFoundError(2, "No such file or directory")
    monkeypatch.setattr(_multiprocessing, "SemLock", refuse)
    assert len(sample_data.write_images(tmp_path / "images", 2, seed=0, split=0)) == 2
