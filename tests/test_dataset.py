import os

import numpy as np
import pytest
import torch

import dataset as ds
import dicom
from job import InputError, InternalError
from metrics import parse_boxes

GRADIENT = np.add.outer(np.arange(64), 2 * np.arange(64))  # 0..189


def unit(values):
    return (values - values.min()) / np.ptp(values)


@pytest.mark.parametrize("original_size", [(1024, 1024), (2048, 1536), (1000, 1000)])
@pytest.mark.parametrize("rescale_factor", [1, 4, 8])
def test_a_painted_box_comes_back_within_a_network_pixel(original_size, rescale_factor):
    rng, side = np.random.default_rng(0), 1024 // rescale_factor
    pixel = np.array([original_size[1], original_size[0]] * 2) / side
    for _ in range(30):
        corner = rng.uniform(0, 700, 2)
        box = np.concatenate([corner, rng.uniform(60, 290, 2)])
        mask = ds.boxes_to_mask([box], original_size, side)
        back = ds.rescale_boxes(parse_boxes(mask, 0.5)[0], (side, side), original_size)[0]
        assert (np.abs(back - box) <= pixel).all()
        assert (np.abs(back[:2] + back[2:] - box[:2] - box[2:]) <= pixel[:2]).all()


def test_boxes_beyond_the_image_are_clipped():
    mask = ds.boxes_to_mask([[-50, -50, 100, 100], [1000, 1000, 500, 500]], (1024, 1024), 64)
    assert parse_boxes(mask, 0.5)[0].tolist() == [[0, 0, 3, 3], [62, 62, 2, 2]] and mask.max() == 1


@pytest.fixture
def small_dataset(tmp_path, write_dicom):
    files = {f"p{i}": write_dicom(tmp_path / f"p{i}.dcm", GRADIENT.astype(np.uint8) + i) for i in range(5)}
    boxes = {"p1": [[16, 8, 16, 32]]}
    return ds.PneumoniaDataset(files, {key: boxes.get(key, ()) for key in files}, rescale_factor=16, workers=2)


def test_dataset_gives_images_and_masks(small_dataset):
    assert len(small_dataset) == 5 and small_dataset.patient_ids == ["p0", "p1", "p2", "p3", "p4"]
    images, masks = small_dataset.__getitems__([1, 0])
    assert images.shape == masks.shape == (2, 1, 64, 64) and images.dtype == masks.dtype == torch.uint8
    assert parse_boxes(masks[0, 0].numpy(), 0.5)[0].tolist() == [[16, 8, 16, 32]]
    np.testing.assert_array_equal(images[0, 0], (unit(GRADIENT) * 255 + 0.5).astype(np.uint8))
    assert small_dataset[1][1].sum() == 16 * 32 and not masks[1].any()


def test_few_unreadable_images_are_dropped_and_many_refused(tmp_path, write_dicom):
    files = {f"p{i}": write_dicom(tmp_path / f"p{i}.dcm", np.eye(8, dtype=np.uint8)) for i in range(20)}
    files["p7"].write_text("no DICOM")
    options = {"boxes": dict.fromkeys(files, ()), "rescale_factor": 16}
    dataset = ds.PneumoniaDataset(files, **options)
    assert len(dataset) == 19 and "p7" not in dataset.patient_ids
    assert [path for path, _ in dataset.skipped] == [files["p7"]]
    files["p8"].write_text("no DICOM")
    with pytest.raises(InputError, match="2 of 20 images cannot be read, more than 5%.*p7"):
        ds.PneumoniaDataset(files, **options)


def test_no_room_for_the_cache_is_found_out_at_once(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(InputError, match="no room for .* GB .*TMPDIR"):
        ds.PneumoniaDataset({"a": tmp_path / "a.dcm"}, {"a": ()})


def test_without_a_temporary_folder_a_line_says_what_to_set(tmp_path, monkeypatch):
    def refuse():
        raise FileNotFoundError(2, "No usable temporary directory found")
    monkeypatch.setattr(ds.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match="no temporary folder .*TMPDIR"):
        ds.PneumoniaDataset({"a": tmp_path / "a.dcm"}, {"a": ()})


def test_the_cache_does_without_madvise(small_dataset):
    images = small_dataset.images.copy()
    small_dataset._map = object()  # Windows has no such call
    np.testing.assert_array_equal(small_dataset.__getitems__([0, 1])[0][:, 0], images[:2])


def test_internal_errors_are_not_blamed_on_the_images(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(dicom, "load_and_prepare_image", None)
    with pytest.raises(InternalError, match="1 of 1 images cannot be read.*internal error"):
        ds.PneumoniaDataset({"a": tmp_path / "a.dcm"}, {"a": ()}, rescale_factor=16)
    assert "Traceback" in capfd.readouterr().err


def test_split_is_seeded_stratified_and_independent_of_order():
    labels = {f"id{i:03}": i % 4 == 0 for i in range(200)}
    training, validation = ds.split_patients(labels, validation_share=0.1, seed=1)
    again = ds.split_patients(dict(reversed(labels.items())), validation_share=0.1, seed=1)
    assert (training, validation) == again and len(validation) == 20
    assert not set(training) & set(validation) and set(training) | set(validation) == set(labels)
    assert sum(labels[key] for key in validation) == 5
    assert validation != ds.split_patients(labels, validation_share=0.1, seed=2)[1]


def augment(seed, count=6, side=64):
    image = torch.zeros(count, 1, side, side)
    image[:, :, 20:40, 10:30] = 0.5
    return ds.Augmentation(torch.Generator().manual_seed(seed))(image, (image > 0).float())


def test_augmentation_moves_image_and_mask_alike_and_differs_for_every_image():
    images, masks = augment(0)
    assert set(masks.unique().tolist()) == {0, 1} and 0 <= images.min() and images.max() <= 1
    inside = (images > images.amax(dim=(1, 2, 3), keepdim=True) / 2).float()
    overlap = (inside * masks).sum(dim=(1, 2, 3)) / torch.maximum(inside, masks).sum(dim=(1, 2, 3))
    assert overlap.min() > 0.9
    assert all((masks[i] != masks[j]).any() for i in range(6) for j in range(i))


def test_augmentation_is_seeded():
    for first, second in zip(augment(3), augment(3)):
        assert torch.equal(first, second)
    assert not torch.equal(augment(3)[0], augment(4)[0])
