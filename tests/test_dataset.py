import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import cli
import dataset as ds
from cli import InputError, InternalError
from data_processing import Labels
from metrics import parse_boxes, rescale_boxes
from radiographs import readers

GRADIENT = np.add.outer(np.arange(64), 2 * np.arange(64))  # 0..189


def unit(values):
    return (values - values.min()) / np.ptp(values)


# Masks


@pytest.mark.parametrize("original_size", [(1024, 1024), (2048, 1536), (1000, 1000)])
@pytest.mark.parametrize("rescale_factor", [1, 4, 8])
def test_a_painted_box_comes_back_within_a_network_pixel(original_size, rescale_factor):
    rng, side = np.random.default_rng(0), 1024 // rescale_factor
    pixel = np.array([original_size[1], original_size[0]] * 2) / side
    for _ in range(30):
        corner = rng.uniform(0, 700, 2)
        box = np.concatenate([corner, rng.uniform(60, 290, 2)])
        mask = ds.boxes_to_mask([box], original_size, side)
        back = rescale_boxes(parse_boxes(mask, 0.5)[0], (side, side), original_size)[0]
        assert (np.abs(back - box) <= pixel).all()
        assert (np.abs(back[:2] + back[2:] - box[:2] - box[2:]) <= pixel[:2]).all()


def test_boxes_beyond_the_image_are_clipped():
    mask = ds.boxes_to_mask([[-50, -50, 100, 100], [1000, 1000, 500, 500]], (1024, 1024), 64)
    assert parse_boxes(mask, 0.5)[0].tolist() == [[0, 0, 3, 3], [62, 62, 2, 2]] and mask.max() == 1


# The data set


@pytest.fixture
def small_dataset(tmp_path, write_dicom):
    """Five images p0 to p4, of which p1 has a box and a view."""
    files = {f"p{i}": write_dicom(tmp_path / f"p{i}.dcm", GRADIENT.astype(np.uint8) + i)
             for i in range(5)}
    boxes = dict.fromkeys(files, ()) | {"p1": [[16, 8, 16, 32]]}
    views = dict.fromkeys(files, "") | {"p1": "AP"}
    return ds.PneumoniaDataset(files, Labels(boxes, views), side=64, workers=2)


def test_images_keep_the_order_of_the_files(small_dataset):
    assert len(small_dataset) == 5
    assert small_dataset.patient_ids == ["p0", "p1", "p2", "p3", "p4"]


def test_a_batch_holds_the_images_asked_for(small_dataset):
    images, masks = small_dataset[[1, 0]]
    assert images.shape == masks.shape == (2, 1, 64, 64)
    assert images.dtype == masks.dtype == torch.uint8
    np.testing.assert_array_equal(images[0, 0], (unit(GRADIENT) * 255 + 0.5).astype(np.uint8))


def test_a_batch_holds_masks_of_the_boxes(small_dataset):
    _, masks = small_dataset[[1, 0]]
    assert parse_boxes(masks[0, 0].numpy(), 0.5)[0].tolist() == [[16, 8, 16, 32]]
    assert masks[0].sum() == 16 * 32 and not masks[1].any()


def test_a_batch_does_not_change_what_is_stored(small_dataset):
    images, _ = small_dataset[[0]]
    images.zero_()
    assert small_dataset[[0]][0].any()


def test_threads_share_the_images(small_dataset):
    expected = [small_dataset[[index]][0] for index in range(5)]
    order = [index % 5 for index in range(2000)]
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda index: small_dataset[[index]][0], order)
        assert all(torch.equal(images, expected[index]) for index, images in zip(order, found))


def test_sizes_views_and_boxes_of_the_images_are_kept(small_dataset):
    assert small_dataset.original_sizes == [(64, 64)] * 5
    assert small_dataset.views == ["", "AP", "", "", ""]
    assert [len(boxes) for boxes in small_dataset.boxes] == [0, 1, 0, 0, 0]


def no_boxes(ids):
    return Labels(dict.fromkeys(ids, ()), dict.fromkeys(ids, ""))


@pytest.fixture
def twenty(tmp_path, write_dicom):
    """Files of 20 images, and the other arguments of a data set."""
    files = {f"p{i}": write_dicom(tmp_path / f"p{i}.dcm", np.eye(8, dtype=np.uint8))
             for i in range(20)}
    return files, {"labels": no_boxes(files), "side": 64}


def test_few_unreadable_images_are_dropped(twenty):
    files, options = twenty
    files["p7"].write_text("no DICOM")
    dataset = ds.PneumoniaDataset(files, **options)
    assert len(dataset) == 19 and "p7" not in dataset.patient_ids
    assert [path for path, _ in dataset.skipped] == [files["p7"]]
    assert dataset.internal_errors == 0


def test_many_unreadable_images_are_refused(twenty):
    files, options = twenty
    for name in ("p7", "p8"):
        files[name].write_text("no DICOM")
    with pytest.raises(InputError, match="2 of 20 images cannot be read, more than 5%.*p7"):
        ds.PneumoniaDataset(files, **options)


def test_an_image_with_a_remark_is_kept_and_named(twenty, write_dicom):
    files, options = twenty
    write_dicom(files["p7"], np.zeros((8, 8), np.uint8))
    dataset = ds.PneumoniaDataset(files, **options)
    assert len(dataset) == 20
    assert dataset.notes == [(files["p7"], "is constant: all of its pixels have the same value")]


def test_no_room_for_the_cache_is_found_out_at_once(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(InputError, match="no room for .* GB .*TMPDIR"):
        ds.PneumoniaDataset({"a": tmp_path / "a.dcm"}, no_boxes("a"))


def test_without_a_temporary_folder_a_line_says_what_to_set(tmp_path, monkeypatch):
    def refuse():
        raise FileNotFoundError(2, "No usable temporary directory found")
    monkeypatch.setattr(ds.tempfile, "TemporaryFile", refuse)
    status, message = cli._run_explained(
        lambda: ds.PneumoniaDataset({"a": tmp_path / "a.dcm"}, no_boxes("a")))
    assert status == 2 and message.endswith("set TMPDIR to one that is")


def test_the_cache_does_without_posix_fallocate(twenty, monkeypatch):
    files, options = twenty
    monkeypatch.delattr(os, "posix_fallocate")  # macOS has no such call
    assert ds.PneumoniaDataset(files, **options)[[19]][0].max() == 255


def test_internal_errors_are_not_blamed_on_the_images(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(readers, "read_radiograph", lambda *_, **__: None.mistake)
    with pytest.raises(InternalError, match="1 of 1 images cannot be read.*internal error"):
        ds.PneumoniaDataset({"a": tmp_path / "a.dcm"}, no_boxes("a"), side=64)
    assert "Traceback" in capfd.readouterr().err


# Splits


LABELS = {f"id{i:03}": i % 4 == 0 for i in range(200)}
PATIENTS = {key: f"patient {index % 90}" for index, key in enumerate(LABELS)}


def labels_of(positive, patients=()):
    """Labels with a box for each id that is positive."""
    boxes = {key: np.ones((int(value), 4)) for key, value in positive.items()}
    return Labels(boxes, patients=dict(patients))


def split(positive, patients=(), **options):
    return ds.Labelled({}, labels_of(positive, patients)).split(**options)


def patients_in(ids):
    return {PATIENTS[key] for key in ids}


def test_a_split_depends_on_ids_patients_and_seed_and_not_on_their_order():
    first, again, other = (ds.hold_out(labels_of(table, PATIENTS), seed) for table, seed in (
        (LABELS, 1), (dict(reversed(LABELS.items())), 1), (LABELS, 2)))
    assert first == again != other


@pytest.mark.parametrize("folds", [None, 3, 5])
def test_no_patient_is_in_two_parts_and_no_image_is_lost(folds):
    for seed in range(10):
        parts = split(LABELS, PATIENTS, seed=seed, folds=folds, fold=folds and seed % folds)
        assert sorted(sum(parts.values(), [])) == sorted(LABELS)
        named = [patients_in(ids) for ids in parts.values()]
        assert sum(map(len, named)) == len(set.union(*named)) == 90


def test_folds_have_the_same_size_and_share_of_opacities_as_far_as_whole_patients_allow():
    for fold in ds.split_folds(labels_of(LABELS, PATIENTS), 5):
        assert abs(len(fold) - 40) <= 2 and abs(sum(LABELS[key] for key in fold) - 10) <= 1


def test_a_tenth_of_the_images_is_held_out_with_its_share_of_opacities():
    for patients in ({}, PATIENTS):
        held_out = ds.hold_out(labels_of(LABELS, patients), seed=1)
        assert abs(len(held_out) - 20) <= 2 and abs(sum(LABELS[key] for key in held_out) - 5) <= 1


def test_folds_follow_the_digest_of_the_patients_and_not_the_order_of_the_table():
    folds, again = (ds.split_folds(labels_of(table, PATIENTS), 3) for table in (
        LABELS, dict(reversed(LABELS.items()))))
    first = min(PATIENTS.values(), key=lambda name: hashlib.md5(name.encode()).hexdigest())
    assert folds == again and first in patients_in(folds[0])


def test_an_image_without_a_patient_is_a_patient_of_its_own():
    assert Labels({"a": ()}, patients={"b": "x"}).patient_of("a") == "a"


def test_a_split_made_earlier_is_kept_and_other_images_are_named(capsys):
    labelled = ds.Labelled(dict.fromkeys("abcd", None), labels_of(dict.fromkeys("abcd", True)))
    before = {"a": "training", "c": "validation", "b": "training", "x": "training"}
    parts = labelled.split_as(before)
    assert parts == {"training": ["a", "b"], "validation": ["c"]}
    out = capsys.readouterr().out
    assert "are gone (1): x" in out and "are left out (1): d" in out


def test_without_folds_there_are_two_parts():
    parts = split(LABELS, seed=1, folds=None, fold=None)
    validation = ds.hold_out(labels_of(LABELS), seed=1)
    training = sorted(LABELS.keys() - validation)
    assert parts == {"training": training, "validation": validation}


def test_with_folds_training_and_validation_split_what_is_outside_the_fold():
    parts = split(LABELS, seed=1, folds=3, fold=1)
    test = ds.split_folds(labels_of(LABELS), 3)[1]
    outside = LABELS.keys() - test
    assert parts["test"] == test
    assert set(parts["training"] + parts["validation"]) == outside
    assert len(parts["validation"]) == pytest.approx(len(outside) / 10, abs=1)


@pytest.mark.parametrize("images, folds, part", [(2, 2, "training"), (40, 200, "test")])
def test_a_fold_that_leaves_a_part_empty_is_refused(images, folds, part):
    labels = {str(number): number % 2 == 0 for number in range(images)}
    last = folds - 1
    with pytest.raises(InputError, match=f"--fold {last} leave no image for {part}"):
        split(labels, seed=1, folds=folds, fold=last)


LIMITS = {"training": 5, "test": 1}


def test_limits_cut_the_parts_to_some_of_their_ids():
    whole = split(LABELS, seed=1, folds=3, fold=1)
    cut = split(LABELS, seed=1, folds=3, fold=1, limits=LIMITS)
    assert {name: len(ids) for name, ids in cut.items()} == LIMITS | {
        "validation": len(whole["validation"])}
    assert all(set(ids) <= set(whole[name]) for name, ids in cut.items())


def test_limits_above_the_size_of_a_part_change_nothing():
    whole = split(LABELS, seed=1)
    assert split(LABELS, seed=1, limits={"training": 180, "validation": 21}) == whole


# From files and tables to a data set


def load(data, train_csv, output, limits=None):
    labelled = ds.find_labelled(data, train_csv, [output])
    parts = labelled.split(seed=42, limits=limits)
    return labelled.load(parts, rescale_factor=16, workers=2)


@pytest.fixture
def images(phantoms):
    return phantoms / "stage_2_train_images"


def test_all_labelled_images_are_loaded_in_two_parts(images, train_csv, tmp_path):
    dataset, parts = load(images, train_csv, tmp_path)
    assert set(parts) == {"training", "validation"} and 3 <= len(parts["validation"]) <= 5
    assert sorted(parts["training"] + parts["validation"]) == list(range(40))
    assert len(dataset) == 40
    assert sum(len(boxes) > 0 for boxes in dataset.boxes) == 16
    assert set(dataset.views) == {"AP", "PA"}


def test_limits_cut_the_parts_before_images_are_read(images, train_csv, tmp_path):
    whole, parts = load(images, train_csv, tmp_path)
    cut, fewer = load(images, train_csv, tmp_path, limits={"training": 5, "test": 1})
    assert len(cut) == 5 + len(parts["validation"]) and len(fewer["training"]) == 5
    kept = {whole.patient_ids[index] for index in parts["training"]}
    assert {cut.patient_ids[index] for index in fewer["training"]} < kept


def test_an_unreadable_image_is_left_out_of_its_part(images, train_csv, tmp_path, capsys):
    for path in images.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / path.name).unlink()
    (tmp_path / path.name).write_text("no DICOM")
    dataset, parts = load(tmp_path, train_csv, tmp_path / "output")
    assert path.stem not in dataset.patient_ids
    assert sorted(parts["training"] + parts["validation"]) == list(range(39))
    assert f"images cannot be read and are left out (1): {tmp_path / path.name} is not a DICOM" in (
        capsys.readouterr().out)


def test_too_few_images_of_a_class_are_refused_with_both_counts(images, train_csv, tmp_path):
    rows = train_csv.read_text().splitlines()
    negative = [row for row in rows[1:] if ",0," in row]
    positive = [row for row in rows[1:] if row not in negative]
    (tmp_path / "train.csv").write_text("\n".join([rows[0], *positive, *negative[:9]]))
    with pytest.raises(InputError, match="share 16 images with opacities and 9 without; .* 10 of"):
        load(images, tmp_path / "train.csv", tmp_path)


# Augmentation


def augment(seed, count=6, side=64):
    image = torch.zeros(count, 1, side, side)
    image[:, :, 20:40, 10:30] = 0.5
    return ds.Augmentation(torch.Generator().manual_seed(seed))(image, (image > 0).float())


def test_augmented_values_stay_in_their_range():
    images, masks = augment(0)
    assert set(masks.unique().tolist()) == {0, 1} and 0 <= images.min() and images.max() <= 1


def test_augmentation_moves_image_and_mask_alike():
    images, masks = augment(0)
    inside = (images > images.amax(dim=(1, 2, 3), keepdim=True) / 2).float()
    both, either = inside * masks, torch.maximum(inside, masks)
    assert (both.sum(dim=(1, 2, 3)) / either.sum(dim=(1, 2, 3))).min() > 0.9


def test_augmentation_differs_for_every_image():
    _, masks = augment(0)
    assert all((masks[i] != masks[j]).any() for i in range(6) for j in range(i))


def test_augmentation_is_seeded():
    for first, second in zip(augment(3), augment(3)):
        assert torch.equal(first, second)
    assert not torch.equal(augment(3)[0], augment(4)[0])


def test_a_split_of_which_a_part_has_no_image_left_is_refused():
    labelled = ds.Labelled({"a": None}, labels_of({"a": True}))
    with pytest.raises(InputError, match="no image of the run's part for validation is left"):
        labelled.split_as({"a": "training", "b": "validation"})
