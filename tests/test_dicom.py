import io
import os
import signal

import numpy as np
import pytest
from conftest import make_dicom
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, RLELossless

import dicom

GRADIENT = np.add.outer(np.arange(64), 2 * np.arange(64))  # 0..189


def prepare(path, side=64):
    return dicom.load_and_prepare_image(path, 1024 // side)


def jpeg_dicom(path, pixels, **tags):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    dataset = make_dicom(pixels, transfer_syntax=JPEGBaseline8Bit, **tags)
    dataset.PixelData = encapsulate([stream.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)
    return path


def make_file(path, pixels, **tags):
    make_dicom(pixels, **tags).save_as(path, enforce_file_format=True)
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
@pytest.mark.parametrize("write", [make_file, jpeg_dicom])
def test_a_constant_image_gives_zeros_and_is_named(tmp_path, write, photometric):
    path = write(tmp_path / "a.dcm", np.full((32, 32), 7, np.uint8), PhotometricInterpretation=photometric)
    with pytest.warns(dicom.ImageWarning, match="is constant"):
        assert not prepare(path)[0].any()


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
    assert np.abs(dicom.load_and_prepare_image(path, 4)[0] - expected).mean() < 0.005


def test_a_monochrome1_jpeg_is_inverted(tmp_path):
    smooth = np.asarray(Image.fromarray(GRADIENT.astype(np.uint8)).resize((256, 256), Image.BICUBIC))
    path = jpeg_dicom(tmp_path / "a.dcm", smooth, PhotometricInterpretation="MONOCHROME1")
    image, _ = prepare(path, 256)
    assert np.abs(image - (1 - unit(smooth.astype(float)))).mean() < 0.01


def test_a_jpeg_with_a_display_hint_gets_it_applied(tmp_path):
    smooth = np.asarray(Image.fromarray(GRADIENT.astype(np.uint8)).resize((256, 256), Image.BICUBIC))
    path = jpeg_dicom(tmp_path / "a.dcm", smooth, WindowCenter=90, WindowWidth=20)
    image, _ = prepare(path, 256)
    assert np.mean((image == 0) | (image == 1)) > 0.7


@pytest.mark.parametrize("ours", ["unit_range", "displayed", "_read_pixels", "_check_header"])
def test_a_fault_of_our_own_is_not_blamed_on_the_file(tmp_path, write_dicom, monkeypatch, ours):
    def fail(*args, **options):
        raise TypeError("a fault of ours")
    monkeypatch.setattr(dicom, ours, fail)
    with pytest.raises(TypeError, match="a fault of ours"):
        prepare(write_dicom(tmp_path / "a.dcm", GRADIENT.astype(np.uint8)))


def test_too_little_memory_for_an_image_is_a_reason(tmp_path, write_dicom, monkeypatch):
    def fail(*args, **options):
        raise MemoryError
    monkeypatch.setattr(dicom, "displayed", fail)
    with pytest.raises(dicom.UnreadableImage, match="takes too much memory"):
        prepare(write_dicom(tmp_path / "a.dcm", GRADIENT.astype(np.uint8)))


def test_colour_and_frames_are_used_in_part_with_a_warning(tmp_path, write_dicom):
    colour = np.stack([GRADIENT, GRADIENT * 0, GRADIENT * 0], -1).astype(np.uint8)
    with pytest.warns(dicom.ImageWarning, match="colour"):
        image, _ = prepare(write_dicom(tmp_path / "a.dcm", colour))
    np.testing.assert_allclose(image, unit(GRADIENT), atol=1e-5)
    frames = make_dicom(GRADIENT.astype(np.uint8), NumberOfFrames=2)
    frames.PixelData += bytes(64 * 64)
    frames.save_as(tmp_path / "b.dcm", enforce_file_format=True)
    with pytest.warns(dicom.ImageWarning, match="2 frames"):
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
        with pytest.raises(dicom.UnreadableImage, match=reason):
            prepare(tmp_path / f"{name}.dcm")


def test_reader_processes_keep_order_and_survive_crashes_and_hangs(tmp_path, write_dicom, monkeypatch):
    paths = [write_dicom(tmp_path / f"{i}.dcm", np.full((8, 8), i, np.uint8)) for i in range(8)]

    def read(path, rescale_factor):
        if path.stem == "3":
            os.kill(os.getpid(), signal.SIGKILL)
        if path.stem == "5":
            signal.pause()
        return dicom.Reading(np.uint8([[int(path.stem)]]), (8, 8))
    monkeypatch.setattr(dicom, "_read", read)  # the readers are forked, so they see it
    monkeypatch.setattr(dicom, "TIME_LIMIT", 0.5)
    readings = list(dicom.read_images(paths, rescale_factor=16, workers=2))
    assert [reading.problem or int(reading.image[0, 0]) for reading in readings] == [
        0, 1, 2, "crashed its decoder", 4, "took more than 0.5 seconds to decode", 6, 7]


def test_files_are_found_in_sub_folders_whatever_their_case(tmp_path):
    (tmp_path / "x.dcm" / "deep").mkdir(parents=True)
    names = ["x.dcm/deep/Ünïcode name.DCM", "1.2.840.10008", "1.2.840.10009", "b.dcm", "x.dcm/b.dcm", ".hidden.dcm"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.dcm")
    files, skipped = dicom.find_dicom_files(tmp_path)
    assert sorted(files) == ["1.2.840.10008", "1.2.840.10009", "b", "Ünïcode name"]
    assert files["b"] == tmp_path / "b.dcm"
    reasons = {path.relative_to(tmp_path).as_posix(): reason for path, reason in skipped}
    assert reasons == {"x.dcm": "is a folder", "pipe.dcm": "is no regular file",
                       "x.dcm/b.dcm": f"has the same name as {tmp_path / 'b.dcm'}"}
