import io
import os
import signal

import numpy as np
import pytest
import torch
from conftest import make_dicom
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, RLELossless

import dataset as ds
from job import InputError
from metrics import parse_boxes

GRADIENT = np.add.outer(np.arange(64), 2 * np.arange(64))  # 0..189


def prepare(path, side=64):
    return ds.load_and_prepare_image(path, 1024 // side)


def jpeg_dicom(path, pixels, **tags):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    dataset = make_dicom(pixels, transfer_syntax=JPEGBaseline8Bit, **tags)
    dataset.PixelData = encapsulate([stream.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)
    return path


def unit(values):
    return (values - values.min()) / np.ptp(values)


@pytest.mark.parametrize("pixels", [
    GRADIENT.astype(np.uint8), GRADIENT.astype(np.uint16) * 300, (GRADIENT - 90).astype(np.int16) * 100,
    (GRADIENT - 90).astype(np.int8), GRADIENT.astype(np.uint32) * 10_000_000])
def test_every_depth_is_scaled_by_its_own_range(tmp_path, write_dicom, pixels):
    image, original_size = prepare(write_dicom(tmp_path / "a.dcm", pixels))
    assert image.dtype == np.float32 and original_size == (64, 64)
    np.testing.assert_allclose(image, unit(pixels.astype(float)), atol=1e-6)


def test_monochrome1_is_inverted(tmp_path, write_dicom):
    path = write_dicom(tmp_path / "a.dcm", GRADIENT.astype(np.uint8), PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(prepare(path)[0], 1 - unit(GRADIENT), atol=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_constant_image_gives_zeros_without_a_warning(tmp_path, write_dicom, recwarn, photometric):
    path = write_dicom(tmp_path / "a.dcm", np.full((32, 32), 7, np.uint8), PhotometricInterpretation=photometric)
    assert not prepare(path)[0].any() and not recwarn.list


def test_integer_reduction_averages_blocks(tmp_path, write_dicom):
    pixels = np.random.default_rng(0).integers(0, 65536, (256, 256)).astype(np.uint16)
    means = pixels.reshape(64, 4, 64, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(prepare(write_dicom(tmp_path / "a.dcm", pixels))[0], unit(means), atol=1e-5)


def test_any_shape_becomes_a_square_and_keeps_its_size(tmp_path, write_dicom):
    path = write_dicom(tmp_path / "a.dcm", np.arange(3000, dtype=np.uint16).reshape(30, 100))
    image, original_size = prepare(path, 128)
    assert image.shape == (128, 128) and original_size == (30, 100)


def test_modality_rescale_and_window_act_before_the_range(tmp_path, write_dicom):
    pixels = GRADIENT.astype(np.int16)
    path = write_dicom(tmp_path / "a.dcm", pixels, RescaleSlope=-2, RescaleIntercept=10, WindowCenter=-90,
                       WindowWidth=101)
    shown = np.clip((-2.0 * pixels + 10 - -90.5) / 100 + 0.5, 0, 1)  # DICOM PS3.3 C.11.2.1.2
    np.testing.assert_allclose(prepare(path)[0], unit(shown), atol=1e-5)


def test_challenge_files_take_the_short_way_to_nearly_the_same_image(tmp_path, write_dicom):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (32, 32)).astype(np.uint8)).resize((1024, 1024), Image.BICUBIC)
    path = jpeg_dicom(tmp_path / "a.dcm", np.asarray(smooth))
    expected = unit(np.asarray(smooth.reduce(4), float))
    assert np.abs(ds.load_and_prepare_image(path, 4)[0] - expected).mean() < 0.005


def test_colour_and_frames_are_used_in_part_with_a_warning(tmp_path, write_dicom):
    colour = np.stack([GRADIENT, GRADIENT * 0, GRADIENT * 0], -1).astype(np.uint8)
    with pytest.warns(ds.ImageWarning, match="colour"):
        image, _ = prepare(write_dicom(tmp_path / "a.dcm", colour))
    np.testing.assert_allclose(image, unit(GRADIENT), atol=1e-5)
    frames = make_dicom(GRADIENT.astype(np.uint8), NumberOfFrames=2)
    frames.PixelData += bytes(64 * 64)
    frames.save_as(tmp_path / "b.dcm", enforce_file_format=True)
    with pytest.warns(ds.ImageWarning, match="2 frames"):
        np.testing.assert_allclose(prepare(tmp_path / "b.dcm")[0], unit(GRADIENT), atol=1e-6)


def test_float_pixels_with_gaps(tmp_path):
    dataset = make_dicom(np.zeros((64, 64), np.float32))
    del dataset.PixelData, dataset.PixelRepresentation, dataset.HighBit, dataset.BitsStored
    values = GRADIENT.astype(np.float32)
    values[0, 5] = np.nan
    dataset.BitsAllocated, dataset.FloatPixelData = 32, values.tobytes()
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    image, _ = prepare(tmp_path / "a.dcm")
    assert image[0, 5] == 0 and image[63, 63] == 1


def test_rle(tmp_path):
    dataset = make_dicom(GRADIENT.astype(np.uint16))
    dataset.compress(RLELossless)
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_allclose(prepare(tmp_path / "a.dcm")[0], unit(GRADIENT), atol=1e-6)


def test_unusable_files_say_why(tmp_path, write_dicom):
    (tmp_path / "text.dcm").write_text("hello")
    (tmp_path / "empty.dcm").write_bytes(b"")
    whole = write_dicom(tmp_path / "whole.dcm", GRADIENT.astype(np.uint8)).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-100])
    write_dicom(tmp_path / "huge.dcm", GRADIENT.astype(np.uint8), Rows=65535, Columns=65535)
    without = make_dicom(GRADIENT.astype(np.uint8))
    del without.PixelData
    without.save_as(tmp_path / "without.dcm", enforce_file_format=True)
    jpeg_dicom(tmp_path / "other size.dcm", GRADIENT.astype(np.uint8), Rows=32)
    for name, reason in (("text", "DICOM"), ("empty", "empty|DICOM"), ("cut", "pixel data"),
                         ("missing", "No such file"),
                         ("huge", "65535 x 65535 pixels"), ("without", "no pixel data"), ("other size", "64 x 64")):
        with pytest.raises(ds.UnreadableImage, match=reason):
            prepare(tmp_path / f"{name}.dcm")


def test_reader_processes_keep_order_and_survive_crashes_and_hangs(tmp_path, write_dicom, monkeypatch):
    paths = [write_dicom(tmp_path / f"{i}.dcm", np.full((8, 8), i, np.uint8)) for i in range(8)]

    def read(path, rescale_factor):
        if path.stem == "3":
            os.kill(os.getpid(), signal.SIGKILL)
        if path.stem == "5":
            signal.pause()
        return ds.Reading(np.uint8([[int(path.stem)]]), (8, 8))
    monkeypatch.setattr(ds, "_read", read)  # the readers are forked, so they see it
    monkeypatch.setattr(ds, "TIME_LIMIT", 0.5)
    readings = list(ds.read_images(paths, rescale_factor=16, workers=2))
    assert [reading.problem or int(reading.image[0, 0]) for reading in readings] == [
        0, 1, 2, "crashed its decoder", 4, "took more than 0.5 seconds to decode", 6, 7]


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
