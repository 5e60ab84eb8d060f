import struct

import gdcm
import numpy as np
import pytest
from conftest import make_dicom
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from test_dicom import jpeg_dicom

from radiographs import dicom, errors, greyscale

GRADIENT = np.add.outer(np.arange(64), 2 * np.arange(64))  # 0..189
ALL_16 = np.arange(2**16).reshape(256, 256)


def prepare(path, side=64):
    return dicom.load_and_prepare_image(path, side)[0]


def unit(values):
    return (values - values.min()) / np.ptp(values)


def write_with_overlay(path, pixels, position, **tags):
    dataset = make_dicom(pixels, **tags)
    dataset.add_new(0x60000100, "US", 16)
    dataset.add_new(0x60000102, "US", position)
    dataset.save_as(path, enforce_file_format=True)
    return path


# Hints that cannot be used


def item(descriptor=None, data=None, descriptor_vr="US", data_vr="OW"):
    """An item of a LUT sequence; its elements are empty by default."""
    table = Dataset()
    table.add_new("LUTDescriptor", descriptor_vr, descriptor)
    table.add_new("LUTData", data_vr, data)
    return table


@pytest.mark.parametrize(
    "tags, hint",
    [
        ({"WindowCenter": 90, "WindowWidth": 0}, "Window Center and Width"),
        ({"WindowCenter": 90, "WindowWidth": 0.5}, "Window Center and Width"),
        ({"WindowCenter": float("nan"), "WindowWidth": 50}, "Window Center and Width"),
        ({"WindowCenter": 90, "WindowWidth": None}, "Window Center and Width"),
        ({"WindowCenter": 90}, "Window Center and Width"),
        ({"WindowCenter": 5000, "WindowWidth": 10}, "Window Center and Width"),
        (
            {"WindowCenter": 90, "WindowWidth": 0, "VOILUTFunction": "LINEAR_EXACT"},
            "Window Center and Width",
        ),
        (
            {"WindowCenter": 90, "WindowWidth": -1, "VOILUTFunction": "SIGMOID"},
            "Window Center and Width",
        ),
        ({"RescaleSlope": None, "RescaleIntercept": 0}, "Rescale Slope and Intercept"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "Rescale Slope and Intercept"),
        ({"RescaleSlope": float("inf"), "RescaleIntercept": 0}, "Rescale Slope and Intercept"),
        ({"ModalityLUTSequence": []}, "Modality LUT"),
        ({"ModalityLUTSequence": [item()]}, "Modality LUT"),
        ({"VOILUTSequence": [item([256, 0, 16], bytes(100))]}, "VOI LUT"),
        ({"VOILUTSequence": [item([256, 0, 16], bytes(512))]}, "VOI LUT"),
        ({"PixelPaddingValue": None}, "PixelPaddingValue"),
        ({"PixelPaddingValue": 255, "PixelPaddingRangeLimit": 0}, "PixelPaddingRangeLimit"),
    ],
)
def test_a_hint_that_cannot_be_used_is_left_out_with_a_note(tmp_path, write_dicom, tags, hint):
    path = write_dicom(tmp_path / "a.dcm", GRADIENT.astype(np.uint16), **tags)
    with pytest.warns(
        errors.ImageWarning, match=f"^is read without its {hint}, which cannot be used$"
    ):
        image = prepare(path)
    np.testing.assert_allclose(image, unit(GRADIENT), atol=1e-6)


def test_text_where_a_number_belongs_is_left_out_with_a_note(tmp_path, write_dicom):
    path = write_dicom(
        tmp_path / "a.dcm", GRADIENT.astype(np.uint16), RescaleSlope=1.25, RescaleIntercept=0
    )
    path.write_bytes(path.read_bytes().replace(b"1.25", b"much"))
    with pytest.warns(errors.ImageWarning, match="Rescale Slope"):
        np.testing.assert_allclose(prepare(path), unit(GRADIENT), atol=1e-6)


@pytest.mark.parametrize("function", ["", "SHARP"])
def test_a_window_without_a_known_function_is_linear(tmp_path, write_dicom, function):
    path = write_dicom(
        tmp_path / "a.dcm",
        GRADIENT.astype(np.uint16),
        WindowCenter=90,
        WindowWidth=101,
        VOILUTFunction=function,
    )
    with pytest.warns(errors.ImageWarning, match="without its VOI LUT Function"):
        image = prepare(path)
    np.testing.assert_allclose(image, np.clip((GRADIENT - 89.5) / 100 + 0.5, 0, 1), atol=1e-6)


@pytest.mark.parametrize(
    "function, width, expected",
    [
        ("LINEAR", 1, lambda x: x > 89.5),
        ("LINEAR_EXACT", 0.5, lambda x: np.clip((x - 90) / 0.5 + 0.5, 0, 1)),
        ("SIGMOID", 0.5, lambda x: 1 / (1 + np.exp(-4 * np.clip(x - 90, -9, 9) / 0.5))),
    ],
)
def test_the_narrowest_windows_are_used(tmp_path, write_dicom, recwarn, function, width, expected):
    path = write_dicom(
        tmp_path / "a.dcm",
        GRADIENT.astype(np.uint16),
        WindowCenter=90,
        WindowWidth=width,
        VOILUTFunction=function,
    )
    np.testing.assert_allclose(prepare(path), expected(GRADIENT.astype(float)), atol=1e-6)
    assert not recwarn.list


# Windows and outliers


@pytest.mark.parametrize("center", [-500, 0, 10000])
def test_a_window_that_turns_nearly_all_white_or_black_is_no_use(tmp_path, write_dicom, center):
    path = write_dicom(tmp_path / "a.dcm", (GRADIENT * 20).astype(np.int16), WindowCenter=center,
                       WindowWidth=60 if center == 0 else 12500)
    image = prepare(path)
    if center == 0:
        with pytest.warns(errors.ImageWarning, match="without its Window Center and Width"):
            np.testing.assert_allclose(prepare(path), unit(GRADIENT), atol=1e-6)
    assert 0.2 < image.mean() < 0.8


@pytest.mark.parametrize("center, width", [(9000, 100), (1890, 0)])
def test_the_second_window_serves_where_the_first_does_not(tmp_path, write_dicom, center, width):
    path = write_dicom(tmp_path / "a.dcm", (GRADIENT * 20).astype(np.uint16),
                       WindowCenter=[center, 1890, 40], WindowWidth=[width, 1001, 80])
    with pytest.warns(errors.ImageWarning, match="is read with window 2 of several"):
        image = prepare(path)
    np.testing.assert_allclose(
        image, np.clip((GRADIENT * 20 - 1889.5) / 1000 + 0.5, 0, 1), atol=1e-5)


def test_a_window_of_an_image_that_is_nearly_black_is_used(tmp_path, write_dicom, recwarn):
    pixels = np.zeros((64, 64), np.uint16)
    pixels[:5, :32] = np.arange(1000, 1160).reshape(5, 32)  # 4 % of it
    path = write_dicom(tmp_path / "a.dcm", pixels, WindowCenter=1080.5, WindowWidth=101)
    assert 0.9 < np.mean(prepare(path) == 0) and not recwarn.list


def chest():
    """Smooth values 100..3889 without outliers."""
    return (GRADIENT.repeat(4, 0).repeat(4, 1) * 20 + 100).astype(np.uint16)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("outliers", [
    np.s_[100, 30:33], np.s_[10:18, 100:110], np.s_[200:215, 3:40]], ids=["hot", "dot", "letters"])
def test_outliers_do_not_darken_the_rest(tmp_path, write_dicom, photometric, outliers):
    pixels = chest()
    tags = {"PhotometricInterpretation": photometric}
    expected = prepare(write_dicom(tmp_path / "a.dcm", pixels, **tags), 256)
    pixels[outliers] = 65535
    path = write_dicom(tmp_path / "b.dcm", pixels, **tags)
    with pytest.warns(errors.ImageWarning, match="a few pixels far brighter or darker"):
        image = prepare(path, 256)
    others = np.ones((256, 256), bool)
    others[outliers] = False
    np.testing.assert_allclose(image[others], expected[others], atol=1e-6)


def test_outliers_below_the_rest_are_cut_too(tmp_path, write_dicom):
    pixels = chest().astype(np.int16)
    pixels[5, 5:20] = -30000
    with pytest.warns(errors.ImageWarning, match="a few pixels"):
        assert 0.3 < prepare(write_dicom(tmp_path / "a.dcm", pixels)).mean() < 0.7


@pytest.mark.parametrize("brightest", [3900, 7000])
def test_a_bright_marker_within_reach_of_the_rest_changes_nothing(
        tmp_path, write_dicom, recwarn, brightest):
    pixels = chest()
    pixels[10:18, 100:110] = brightest
    image = prepare(write_dicom(tmp_path / "a.dcm", pixels), 256)
    np.testing.assert_allclose(image, unit(pixels.astype(float)), atol=1e-5)
    assert not recwarn.list


def test_a_marker_in_a_plain_jpeg_file_does_not_darken_the_rest(tmp_path):
    pixels = (GRADIENT.repeat(4, 0).repeat(4, 1) // 4).astype(np.uint8)  # 0..47
    pixels[16:32, 96:112] = 255
    with pytest.warns(errors.ImageWarning, match="a few pixels"):
        radiograph = dicom.read_radiograph(jpeg_dicom(tmp_path / "a.dcm", pixels), 256, 256)
    assert np.median(radiograph.image) > 100 and np.median(radiograph.display) > 100


def test_gaps_are_not_taken_for_outliers(recwarn):
    values = chest().astype(np.float32)
    values[:, :100] = np.nan
    np.testing.assert_array_equal(greyscale.without_outliers(values), values)
    nothing = np.full((4, 4), np.nan)
    np.testing.assert_array_equal(greyscale.without_outliers(nothing), nothing)
    assert not recwarn.list


# Stored bits


def test_high_bit_says_where_the_value_lies(tmp_path, write_dicom, recwarn):
    pixels = (GRADIENT * 20 << 4 | 7).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", pixels, BitsStored=12, HighBit=15)
    np.testing.assert_allclose(prepare(path), unit(GRADIENT), atol=1e-6)
    assert not recwarn.list


def test_high_bit_of_signed_pixels_keeps_the_sign(tmp_path, write_dicom, recwarn):
    values = GRADIENT - 90
    path = write_dicom(
        tmp_path / "a.dcm",
        (values << 4).astype(np.int16),
        BitsStored=12,
        HighBit=15,
        WindowCenter=-20,
        WindowWidth=101,
    )
    np.testing.assert_allclose(prepare(path), unit(np.clip(values, -70.5, 29.5)), atol=1e-6)
    assert not recwarn.list


def test_a_high_bit_that_the_values_contradict_is_named(tmp_path, write_dicom):
    path = write_dicom(tmp_path / "a.dcm", GRADIENT.astype(np.uint16), BitsStored=12, HighBit=15)
    with pytest.warns(errors.ImageWarning, match="High Bit 15"):
        np.testing.assert_allclose(prepare(path), unit(GRADIENT), atol=1e-6)


@pytest.mark.parametrize(
    "pixels", [(GRADIENT * 300).astype(np.uint16), (GRADIENT * 200 - 20000).astype(np.int16)]
)
def test_values_above_the_stored_bits_are_used_whole_with_a_note(tmp_path, write_dicom, pixels):
    path = write_dicom(tmp_path / "a.dcm", pixels, BitsStored=12, HighBit=11)
    with pytest.warns(errors.ImageWarning, match="more than the 12 bits"):
        np.testing.assert_allclose(prepare(path), unit(GRADIENT), atol=1e-6)


@pytest.mark.parametrize("dtype, lowest", [(np.uint16, 0), (np.int16, -90)])
def test_an_overlay_in_the_unused_bits_is_masked(tmp_path, recwarn, dtype, lowest):
    values = GRADIENT + lowest
    cells = (values & 0xFFF | (np.eye(64, dtype=int) << 12)).astype(np.uint16).view(dtype)
    path = write_with_overlay(tmp_path / "a.dcm", cells, 12, BitsStored=12, HighBit=11)
    np.testing.assert_allclose(prepare(path), unit(GRADIENT), atol=1e-6)
    assert not recwarn.list


def test_an_overlay_in_the_low_bits_is_shifted_away(tmp_path, recwarn):
    cells = (GRADIENT << 4 | np.eye(64, dtype=int)).astype(np.uint16)
    path = write_with_overlay(tmp_path / "a.dcm", cells, 1, BitsStored=12, HighBit=15)
    np.testing.assert_allclose(prepare(path), unit(GRADIENT), atol=1e-6)
    assert not recwarn.list


def test_signed_values_need_not_fill_the_unused_bits(tmp_path, write_dicom, recwarn):
    cells = (GRADIENT - 90 & 0xFFF).astype(np.int16)  # -1 is 0x0FFF
    path = write_dicom(tmp_path / "a.dcm", cells, BitsStored=12, HighBit=11)
    np.testing.assert_allclose(prepare(path), unit(GRADIENT), atol=1e-6)
    assert not recwarn.list


# Padding


def padded(dtype, value):
    pixels = GRADIENT.astype(dtype) + 1000
    pixels[:16] = value
    return pixels


def expected_of_padded(inverted):
    shown = unit(GRADIENT[16:])
    return np.vstack([np.zeros((16, 64)), 1 - shown if inverted else shown])


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    "dtype, value, tag",
    [
        (np.uint16, 65535, 65535),
        (np.uint16, 0, 0),
        (np.int16, -2000, -2000),
        (np.int16, -2000, 63536),
    ],
)
def test_padding_goes_to_the_dark_end_before_scaling(
    tmp_path, recwarn, photometric, dtype, value, tag
):
    dataset = make_dicom(padded(dtype, value), PhotometricInterpretation=photometric)
    dataset.add_new("PixelPaddingValue", "US" if tag >= 0 else "SS", tag)
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    image = prepare(tmp_path / "a.dcm")
    np.testing.assert_allclose(image, expected_of_padded(photometric == "MONOCHROME1"), atol=1e-6)
    assert not recwarn.list


@pytest.mark.parametrize("value, limit", [(60000, 65535), (65535, 60000)])
def test_a_padding_range_goes_to_the_dark_end(tmp_path, write_dicom, value, limit):
    pixels = padded(np.uint16, np.linspace(60000, 65535, 64).astype(np.uint16))
    path = write_dicom(
        tmp_path / "a.dcm", pixels, PixelPaddingValue=value, PixelPaddingRangeLimit=limit
    )
    np.testing.assert_allclose(prepare(path), expected_of_padded(False), atol=1e-6)


def test_padding_stays_dark_where_a_transform_turns_the_scale_round(tmp_path, write_dicom):
    path = write_dicom(
        tmp_path / "a.dcm",
        padded(np.uint16, 0),
        PixelPaddingValue=0,
        RescaleSlope=-1,
        RescaleIntercept=0,
    )
    np.testing.assert_allclose(prepare(path), expected_of_padded(True), atol=1e-6)


def test_float_pixels_too_large_for_differences_count_as_gaps(recwarn):
    values = np.array([[-3e38, 1, 2, 3e38]], np.float32)
    np.testing.assert_allclose(greyscale.unit_range(values), [[0, 0, 1, 0]])
    assert not recwarn.list


def test_gaps_in_float_pixels_do_not_widen_the_range():
    values = np.array([[np.nan, 1000.0], [1500.0, 2000.0]])
    np.testing.assert_allclose(greyscale.unit_range(values), [[0, 0], [0.5, 1]])


# Tables


def slow_look_up(values, entries, first):
    """PS3.3 C.11.1.1 value by value."""
    return np.array(
        [entries[min(max(value - first, 0), len(entries) - 1)] for value in values.ravel().tolist()]
    )


def packed(entries, layout, order="<"):
    """LUT Data as bytes: `words` of 16 bits, or `bytes`, two in a word."""
    if layout == "words":
        return struct.pack(f"{order}{len(entries)}H", *entries)
    pairs = zip(entries[::2], [*entries[1::2], 0])
    return b"".join(struct.pack(f"{order}H", low | high << 8) for low, high in pairs)


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
)
@pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize(
    "bits, layout, count, first",
    [
        (8, "bytes", 256, 0),
        (8, "bytes", 255, 10),
        (8, "words", 256, 100),
        (8, "bytes", 4096, 0),
        (10, "words", 1024, 500),
        (12, "words", 4096, 0),
        (14, "words", 4096, 60000),
        (16, "words", 65536, 0),
    ],
)
def test_tables_of_every_width_equal_a_slow_reference(
    tmp_path, syntax, keyword, bits, layout, count, first
):
    entries = np.random.default_rng(bits).integers(0, 2**bits, count).tolist()
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    pixels = ALL_16.astype(f"{order}u2")
    table = item([count % 2**16, first, bits], packed(entries, layout, order))
    dataset = make_dicom(pixels, transfer_syntax=syntax, **{keyword: [table]})
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    expected = unit(slow_look_up(ALL_16, entries, first)).reshape(256, 256)
    np.testing.assert_allclose(prepare(tmp_path / "a.dcm", 256), expected, atol=1e-6)


@pytest.mark.parametrize("vr, written", [("SS", -1024), ("US", 64512)])
@pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
def test_a_signed_first_value_equals_a_slow_reference(tmp_path, keyword, vr, written):
    entries = np.random.default_rng(0).integers(0, 4096, 4096).tolist()
    values = ALL_16 - 2**15
    table = item([4096, written, 12], packed(entries, "words"), descriptor_vr=vr)
    make_dicom(values.astype(np.int16), **{keyword: [table]}).save_as(
        tmp_path / "a.dcm", enforce_file_format=True
    )
    expected = unit(slow_look_up(values, entries, -1024)).reshape(256, 256)
    np.testing.assert_allclose(prepare(tmp_path / "a.dcm", 256), expected, atol=1e-6)


def test_a_table_written_as_numbers_equals_a_slow_reference(tmp_path):
    entries = np.random.default_rng(0).integers(0, 4096, 100).tolist()
    table = item([100, 20, 12], entries, data_vr="US")
    dataset = make_dicom(GRADIENT.astype(np.uint8), VOILUTSequence=[table])
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    expected = unit(slow_look_up(GRADIENT, entries, 20)).reshape(64, 64)
    np.testing.assert_allclose(prepare(tmp_path / "a.dcm"), expected, atol=1e-6)


def test_the_modality_table_acts_before_the_voi_table(tmp_path, write_dicom):
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 1024, 256).tolist(), rng.integers(0, 2**16, 1024).tolist()
    path = write_dicom(
        tmp_path / "a.dcm",
        GRADIENT.astype(np.uint8),
        ModalityLUTSequence=[item([256, 0, 10], packed(first, "words"))],
        VOILUTSequence=[item([1024, 0, 16], packed(second, "words"))],
    )
    expected = slow_look_up(slow_look_up(GRADIENT, first, 0), second, 0)
    np.testing.assert_allclose(prepare(path), unit(expected).reshape(64, 64), atol=1e-6)


# JPEG of 12 bits


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_jpeg_extended_of_12_bits_is_close_to_its_original(tmp_path, write_dicom, photometric):
    pixels = (unit(GRADIENT) * 4095).astype(np.uint16)
    source = write_dicom(
        tmp_path / "a.dcm", pixels, BitsStored=12, HighBit=11, PhotometricInterpretation=photometric
    )
    reader, change, writer = (
        gdcm.ImageReader(),
        gdcm.ImageChangeTransferSyntax(),
        gdcm.ImageWriter(),
    )
    reader.SetFileName(str(source))
    assert reader.Read()
    codec = gdcm.JPEGCodec()
    codec.SetLossless(False)
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    change.SetUserCodec(codec)
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(tmp_path / "b.dcm"))
    assert (
        writer.Write()
        and dcmread(tmp_path / "b.dcm").file_meta.TransferSyntaxUID == dicom.JPEGExtended12Bit
    )
    image = prepare(tmp_path / "b.dcm")
    assert np.abs(image - prepare(source)).mean() * 4095 < 2
