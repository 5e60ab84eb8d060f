import io
import warnings

import numpy as np
import pytest
from conftest import make_dicom
from PIL import Image
from pydicom import dcmread, uid
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, RLELossless

from radiographs import dicom, errors

GRADIENT = np.add.outer(np.arange(64), 2 * np.arange(64))  # 0..189


def prepare(path, side=64):
    return dicom.load_and_prepare_image(path, side)


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
    GRADIENT.astype(np.uint8), GRADIENT.astype(np.uint16) * 300,
    (GRADIENT - 90).astype(np.int16) * 100, (GRADIENT - 90).astype(np.int8),
    GRADIENT.astype(np.uint32) * 10_000_000])
def test_every_depth_is_scaled_by_its_own_range(tmp_path, write_dicom, pixels):
    image, original_size = prepare(write_dicom(tmp_path / "a.dcm", pixels))
    assert image.dtype == np.float32 and original_size == (64, 64)
    np.testing.assert_allclose(image, unit(pixels.astype(float)), atol=1e-6)


def test_monochrome1_is_inverted(tmp_path, write_dicom):
    path = write_dicom(tmp_path / "a.dcm", GRADIENT.astype(np.uint8),
                       PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(prepare(path)[0], 1 - unit(GRADIENT), atol=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("write", [make_file, jpeg_dicom])
def test_a_constant_image_gives_zeros_and_is_named(tmp_path, write, photometric):
    path = write(tmp_path / "a.dcm", np.full((32, 32), 7, np.uint8),
                 PhotometricInterpretation=photometric)
    with pytest.warns(errors.ImageWarning, match="is constant"):
        assert not prepare(path)[0].any()


def test_integer_reduction_averages_blocks(tmp_path, write_dicom):
    pixels = np.random.default_rng(0).integers(0, 65536, (256, 256)).astype(np.uint16)
    means = pixels.reshape(64, 4, 64, 4).mean(axis=(1, 3))
    image, _ = prepare(write_dicom(tmp_path / "a.dcm", pixels))
    np.testing.assert_allclose(image, unit(means), atol=1e-5)


def test_any_shape_becomes_a_square_and_keeps_its_size(tmp_path, write_dicom):
    path = write_dicom(tmp_path / "a.dcm", np.arange(3000, dtype=np.uint16).reshape(30, 100))
    image, original_size = prepare(path, 128)
    assert image.shape == (128, 128) and original_size == (30, 100)


def test_modality_rescale_and_window_act_before_the_range(tmp_path, write_dicom):
    pixels = GRADIENT.astype(np.int16)
    path = write_dicom(tmp_path / "a.dcm", pixels, RescaleSlope=-2, RescaleIntercept=10,
                       WindowCenter=-90, WindowWidth=101)
    shown = np.clip((-2.0 * pixels + 10 - -90.5) / 100 + 0.5, 0, 1)  # DICOM PS3.3 C.11.2.1.2
    np.testing.assert_allclose(prepare(path)[0], unit(shown), atol=1e-5)


def test_challenge_files_take_the_short_way_to_nearly_the_same_image(tmp_path, write_dicom):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)
    smooth = Image.fromarray(noise).resize((1024, 1024), Image.BICUBIC)
    path = jpeg_dicom(tmp_path / "a.dcm", np.asarray(smooth))
    expected = unit(np.asarray(smooth.reduce(4), float))
    assert np.abs(prepare(path, 256)[0] - expected).mean() < 0.005


def smooth_gradient():
    small = Image.fromarray(GRADIENT.astype(np.uint8))
    return np.asarray(small.resize((256, 256), Image.BICUBIC))


def test_a_monochrome1_jpeg_is_inverted(tmp_path):
    smooth = smooth_gradient()
    path = jpeg_dicom(tmp_path / "a.dcm", smooth, PhotometricInterpretation="MONOCHROME1")
    image, _ = prepare(path, 256)
    assert np.abs(image - (1 - unit(smooth.astype(float)))).mean() < 0.01


def test_a_jpeg_with_a_display_hint_gets_it_applied(tmp_path):
    path = jpeg_dicom(tmp_path / "a.dcm", smooth_gradient(), WindowCenter=90, WindowWidth=20)
    image, _ = prepare(path, 256)
    assert np.mean((image == 0) | (image == 1)) > 0.7


@pytest.mark.parametrize("ours", ["unit_range", "displayed", "check_size"])
def test_a_fault_of_our_own_is_not_blamed_on_the_file(tmp_path, write_dicom, monkeypatch, ours):
    monkeypatch.setattr(dicom, ours, None)
    with pytest.raises(TypeError, match="NoneType"):
        prepare(write_dicom(tmp_path / "a.dcm", GRADIENT.astype(np.uint8)))


def test_the_luminance_of_a_colour_image_is_used_with_a_warning(tmp_path, write_dicom):
    colour = np.stack([GRADIENT, GRADIENT * 0, GRADIENT * 0], -1).astype(np.uint8)
    with pytest.warns(errors.ImageWarning, match="colour"):
        image, _ = prepare(write_dicom(tmp_path / "a.dcm", colour))
    np.testing.assert_allclose(image, unit(GRADIENT), atol=1e-5)


def test_the_first_of_several_frames_is_used_with_a_warning(tmp_path):
    frames = make_dicom(GRADIENT.astype(np.uint8), NumberOfFrames=2)
    frames.PixelData += bytes(64 * 64)
    frames.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.warns(errors.ImageWarning, match="2 frames"):
        image, _ = prepare(tmp_path / "a.dcm")
    np.testing.assert_allclose(image, unit(GRADIENT), atol=1e-6)


def test_gaps_in_float_pixels_become_dark(tmp_path):
    dataset = make_dicom(np.zeros((64, 64), np.float32))
    del dataset.PixelData, dataset.PixelRepresentation, dataset.HighBit, dataset.BitsStored
    values = GRADIENT.astype(np.float32)
    values[0, 5] = np.nan
    dataset.BitsAllocated, dataset.FloatPixelData = 32, values.tobytes()
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    image, _ = prepare(tmp_path / "a.dcm")
    assert image[0, 5] == 0 and image[63, 63] == 1


def test_an_rle_file_is_read_exactly(tmp_path):
    dataset = make_dicom(GRADIENT.astype(np.uint16))
    dataset.compress(RLELossless)
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_allclose(prepare(tmp_path / "a.dcm")[0], unit(GRADIENT), atol=1e-6)


@pytest.fixture
def unusable(tmp_path, write_dicom):
    """Folder of files that no image can be read from."""
    (tmp_path / "text.dcm").write_text("hello")
    (tmp_path / "empty.dcm").write_bytes(b"")
    whole = write_dicom(tmp_path / "whole.dcm", GRADIENT.astype(np.uint8)).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-100])
    write_dicom(tmp_path / "huge.dcm", GRADIENT.astype(np.uint8), Rows=65535, Columns=65535)
    without = make_dicom(GRADIENT.astype(np.uint8))
    del without.PixelData
    without.save_as(tmp_path / "without.dcm", enforce_file_format=True)
    other = jpeg_dicom(tmp_path / "other size.dcm", GRADIENT.astype(np.uint8), Rows=32)
    (tmp_path / "cut jpeg.dcm").write_bytes(other.read_bytes()[:-100])
    return tmp_path


@pytest.mark.filterwarnings("ignore:End of file reached")  # of pydicom
@pytest.mark.parametrize("name, reason", [
    ("text", "DICOM"), ("empty", "empty|DICOM"), ("cut", "pixel data"), ("missing", "No such file"),
    ("huge", "65535 x 65535 pixels"), ("without", "no pixel data"), ("other size", "64 x 64"),
    ("cut jpeg", "no pixel data: it holds no image, or was cut off")])
def test_unusable_files_say_why(unusable, name, reason):
    with pytest.raises(errors.UnreadableImage, match=reason):
        prepare(unusable / f"{name}.dcm")


@pytest.mark.parametrize("error", [
    KeyError("Rows"), TypeError("'<=' not supported between instances of 'int' and 'list'"),
    AttributeError("'FileDataset' object has no attribute 'Rows'"),
    ValueError(r"invalid literal for int(): b'\x03'"),
    ValueError("could not broadcast input array from shape (15000,) into shape (30000,)"),
    OSError("cannot identify image file <_io.BytesIO object at 0x7f5c>, no pixel data")])
def test_a_reason_shows_no_python(error):
    assert errors.reason_of(error) == "has a header that is damaged or lacks a needed value"


def test_a_reason_quotes_what_pydicom_says_of_the_file():
    assert "Missing required element: (0028,0100)" in errors.reason_of(
        AttributeError("Missing required element: (0028,0100) 'Bits Allocated'"))


# What the header says of the object and the view


@pytest.mark.parametrize("tags, words", [
    ({"Modality": "SEG"}, "Modality is SEG"), ({"Modality": "CT"}, "Modality is CT"),
    ({"Modality": "rtdose"}, "Modality is RTDOSE"), ({"Modality": "US"}, "Modality is US"),
    ({"Modality": "OT", "SOPClassUID": uid.CTImageStorage}, "SOP class is CT Image Storage"),
    ({"Modality": None, "SOPClassUID": uid.SegmentationStorage}, "is Segmentation Storage")])
def test_objects_that_are_not_projection_images_are_refused(tmp_path, write_dicom, tags, words):
    path = write_dicom(tmp_path / "a.dcm", GRADIENT.astype(np.uint8), **tags)
    with pytest.raises(errors.UnreadableImage, match=f"is not a radiograph: .*{words}"):
        prepare(path)


@pytest.mark.parametrize("modality", ["KO", "PR", "SR"])
def test_objects_without_pixels_are_named_too(tmp_path, modality):
    dataset = make_dicom(GRADIENT.astype(np.uint8), Modality=modality)
    del dataset.PixelData, dataset.Rows, dataset.Columns
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(errors.UnreadableImage, match=f"its Modality is {modality}"):
        prepare(tmp_path / "a.dcm")


@pytest.mark.parametrize("tags", [
    {"Modality": "DX", "SOPClassUID": uid.CTImageStorage},  # as some converters write
    {"Modality": "CXR"}, {"Modality": None, "SOPClassUID": "1.2.3.4"},
    {"ViewPosition": "AP SUPINE"}, {"ViewPosition": None}, {"BodyPartExamined": "Thorax"},
    {"BodyPartExamined": ""}, {"PatientOrientation": ["L", "F"]}, {"PatientOrientation": ""}])
def test_a_frontal_chest_has_no_remark(tmp_path, write_dicom, tags):
    path = write_dicom(tmp_path / "a.dcm", GRADIENT.astype(np.uint8), **tags)
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.ImageWarning)
        prepare(path)


@pytest.mark.parametrize("tags, words", [
    ({"ViewPosition": "LL"}, "view position LL, not AP or PA"),
    ({"ViewPosition": "lateral"}, "view position LATERAL"),
    ({"BodyPartExamined": "KNEE"}, "body part KNEE, not the chest"),
    ({"PatientOrientation": ["R", "F"]}, "patient orientation is R/F"),
    ({"PatientOrientation": ["L", "H"]}, "patient orientation is L/H"),
    ({"PatientOrientation": ["F", "R"]}, "turned, mirrored"),
    ({"PatientOrientation": ["A", "F"]}, "a side view")])
@pytest.mark.parametrize("write", [make_file, jpeg_dicom])
def test_another_view_or_body_part_is_read_with_a_remark(tmp_path, write, tags, words):
    path = write(tmp_path / "a.dcm", GRADIENT.astype(np.uint8), **tags)
    with pytest.warns(errors.ImageWarning, match=words):
        prepare(path)


@pytest.mark.parametrize("keyword", ["PixelData", "FloatPixelData"])
def test_pixel_data_that_are_present_but_empty_are_named_so(tmp_path, keyword):
    dataset = make_dicom(GRADIENT.astype(np.uint8))
    del dataset.PixelData
    setattr(dataset, keyword, b"")
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(errors.UnreadableImage, match="pixel data, but it is empty"):
        prepare(tmp_path / "a.dcm")


# Damaged JPEG streams


SMOOTH = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
SMOOTH = np.asarray(Image.fromarray(SMOOTH).resize((256, 256), Image.BICUBIC))


def damaged_jpeg(pixels, **options):
    """Streams that lack a block, and that were cut and closed again."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, **options)
    stream, third = stream.getvalue(), len(stream.getvalue()) // 3
    return [stream[:third] + stream[third + 300:], stream[:third] + b"\xff\xd9"]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("tags", [{}, {"WindowCenter": 100, "WindowWidth": 200}, "colour"])
def test_a_jpeg_stream_that_lost_a_part_is_refused(tmp_path, number, tags):
    pixels, tags = (SMOOTH, {}) if tags == "colour" else (SMOOTH[..., 0], tags)
    path = jpeg_dicom(tmp_path / "a.dcm", pixels, **tags)
    prepare(path)
    dataset = dcmread(path)
    dataset.PixelData = encapsulate([damaged_jpeg(pixels)[number]])
    dataset.save_as(path)
    with pytest.raises(errors.UnreadableImage, match="is damaged .*(Corrupt|Premature end)"):
        prepare(path)


def test_a_jpeg_stream_of_another_size_than_declared_is_refused(tmp_path):
    path = jpeg_dicom(tmp_path / "a.dcm", GRADIENT.astype(np.uint8), Columns=32)
    with pytest.raises(errors.UnreadableImage, match="32 x 64 .* holds 64 x 64"):
        prepare(path)


# The image for display


LARGE = GRADIENT.repeat(4, 0).repeat(4, 1).astype(np.uint8)  # 256 x 256


@pytest.mark.parametrize("make", [
    lambda path: jpeg_dicom(path, LARGE),
    lambda path: Image.fromarray(LARGE).save(path, "PNG") or path])
def test_the_image_for_display_does_not_change_that_of_the_network(tmp_path, make):
    path = make(tmp_path / "a")
    alone, shown = dicom.read_radiograph(path, 64), dicom.read_radiograph(path, 64, 200)
    np.testing.assert_array_equal(alone.image, shown.image)
    assert alone.display is None and shown.display.shape == (200, 200)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_the_image_for_display_has_all_pixels_and_air_dark(tmp_path, photometric):
    path = jpeg_dicom(tmp_path / "a.dcm", np.tile(np.arange(256, dtype=np.uint8), (128, 1)),
                      PhotometricInterpretation=photometric)
    display = dicom.read_radiograph(path, 64, 1024).display
    ramp = np.arange(256) if photometric == "MONOCHROME2" else np.arange(256)[::-1]
    assert display.shape == (128, 256) and np.abs(display - ramp.astype(int)).max() <= 3


def test_a_large_image_is_displayed_at_its_aspect(tmp_path, write_dicom):
    pixels = np.add.outer(np.arange(300), np.arange(1200)).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", pixels)
    display = dicom.read_radiograph(path, 64, 400).display
    assert display.shape == (100, 400) and display.min() == 0 and display.max() == 255
