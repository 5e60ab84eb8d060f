"""Reads the headers and the pixels of DICOM files, and of PNG, JPEG and TIFF images by pictures.py:
after decoding they are treated the same.
"""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps
from pydicom import dcmread
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, pixel_array
from pydicom.tag import Tag
from pydicom.uid import UID, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLosslessSV1

from .errors import UnreadableImage, add_note, check_size, decoding_errors
from .greyscale import (
    bit_layout,
    display_hints,
    displayed,
    luminance,
    text_of,
    unit_range,
    without_outliers,
)
from .pictures import SIGNATURES, check_jpeg, grey_jpeg, other_kind, picture_frame

TAGS = ["PatientSex", "PatientAge", "ViewPosition", "PatientID", "Rows", "Columns"]
TAG_NUMBERS = [Tag(name) for name in TAGS]
PROJECTIONS = {"CR", "DX", "DR", "RG", "RF", "XA"}  # values of Modality; some others are used, too
PROJECTION_CLASSES = "X-Ray", "Radiography", "Secondary Capture"  # in names of SOP classes
NOT_PROJECTIONS = {
    "CT", "MR", "PT", "NM", "US", "OCT", "OPT", "SM", "GM", "ES", "SEG", "RTDOSE", "RTSTRUCT",
    "RTPLAN", "RTRECORD", "SR", "PR", "KO", "REG", "FID", "AU", "ECG", "HD", "EPS", "PLAN", "DOC"}


def start_of(file: str | Path | io.BytesIO) -> bytes:
    """The first bytes of a file, up to DICOM's mark; raises OSError if it cannot be opened."""
    if isinstance(file, io.BytesIO):
        return bytes(file.getbuffer()[:132])
    with open(file, "rb") as opened:
        return opened.read(132)


def is_dicom(start: bytes) -> bool:
    """Whether a file with these first bytes has DICOM's preamble."""
    return start[128:] == b"DICM"


def read_header(path: Path) -> dict[str, Any]:
    """Reads TAGS without the pixels, as {tag: value or None}; raises UnreadableImage."""
    with decoding_errors():
        header = dcmread(path, stop_before_pixels=True, specific_tags=TAG_NUMBERS)
        return {tag: header.get(tag) for tag in TAGS}


class Radiograph(NamedTuple):
    """One file as a network sees it and as people do; air is dark in both."""
    image: np.ndarray  # uint8 (side, side)
    original_size: tuple[int, int]  # (height, width) in pixels
    display: np.ndarray | None = None  # uint8 (height, width) at the original's aspect


def load_and_prepare_image(
        path: str | Path | io.BytesIO, side: int = 256) -> tuple[np.ndarray, tuple[int, int]]:
    """Reads one DICOM, PNG, JPEG or TIFF file of any size, whatever its name, or its content in
    memory, as a network sees it.

    Returns the image, float32 (side, side), scaled to 0..1 by its own range (a constant image gives
    zeros) with air dark (MONOCHROME2), and its original size (height, width) in pixels. Raises
    UnreadableImage with the reason; warns with ImageWarning if the image is constant, was in
    colour, has outliers or, by its header, shows something else than a frontal chest, or if part of
    the file was ignored or is in doubt.
    """
    return _prepare(path, side)[:2]


def read_radiograph(path: str | Path | io.BytesIO, side: int,
                    display_size: int | None = None) -> Radiograph:
    """Like load_and_prepare_image, with the image as uint8 in 0..255. With a `display_size`, also
    returns an image for people, at most that many pixels on its longest side."""
    image, original_size, display = _prepare(path, side, display_size)
    return Radiograph((image * 255 + 0.5).astype(np.uint8), original_size, display)


def _prepare(path, side, display_size=None):
    """The fields of a Radiograph, the image as float32 in 0..1; it does not depend on the
    `display_size`."""
    with decoding_errors():
        start = start_of(path)
        is_picture = start.startswith(SIGNATURES) and not is_dicom(start)
        if is_picture:
            content = path.getvalue() if isinstance(path, io.BytesIO) else Path(path).read_bytes()
        elif reason := other_kind(start):
            raise UnreadableImage(reason)
    if is_picture:
        frame = shown = picture_frame(content)
        original_size = frame.size[::-1]
    else:
        frame, shown, original_size = _dicom_frames(path, side, display_size)
    small = frame.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=1.0)
    display = _for_display(shown, display_size) if display_size else None
    image = unit_range(np.asarray(small))
    if not image.any():
        add_note("is constant: all of its pixels have the same value")
    return image, original_size, display


def _shrink(size, longest):
    """A size scaled down, at the same aspect, to at most `longest` pixels on its longest side."""
    scale = min(longest / max(size), 1)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _for_display(frame, display_size):
    size = _shrink(frame.size, display_size)
    if size != frame.size:
        frame = frame.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if frame.mode == "L":
        return np.asarray(ImageOps.autocontrast(frame))
    return (unit_range(np.asarray(frame)) * 255 + 0.5).astype(np.uint8)


def _dicom_frames(path, side, display_size):
    """First frame for the network and for display as Pillow images, and the original size."""
    with decoding_errors():
        dataset = dcmread(path)
        header, hints = _header_of(dataset), display_hints(dataset)
        pixels = [len(dataset[tag].value or ()) for tag in PIXELS if tag in dataset]
    _refuse_object(header)
    if not pixels:
        raise UnreadableImage("has no pixel data: it holds no image, or was cut off before its end")
    if not any(pixels):
        raise UnreadableImage("has an element for pixel data, but it is empty")
    check_size(header["Columns"], header["Rows"], header["NumberOfFrames"])
    if not header["TransferSyntaxUID"]:
        raise UnreadableImage("does not say how its pixels are encoded: it has no transfer syntax")
    _note_view(header)
    original_size = header["Rows"], header["Columns"]
    frame = None
    if header["TransferSyntaxUID"] == JPEGBaseline8Bit and _is_grey(header) and not hints:
        frame = shown = _jpeg_frame(dataset, header, (side, side))
    if not frame:
        frame = shown = _full_frame(dataset, header, hints)
    elif display_size:
        shown = _jpeg_frame(dataset, header, _shrink(original_size[::-1], display_size))
    return frame, shown, original_size


# tags are looked up once, not for every file; integers have a value where they are absent or empty
INTEGERS = {"Rows": 0, "Columns": 0, "NumberOfFrames": 1, "SamplesPerPixel": 1}
WORDS = {name: Tag(name) for name in (
    "Modality", "SOPClassUID", "PhotometricInterpretation", "ViewPosition", "BodyPartExamined",
    "PatientOrientation")}
PIXELS = [Tag(name) for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")]


def _header_of(dataset):
    """What decides how a file is decoded, as plain values by keyword."""
    header = {name: int(dataset.get(name) or default) for name, default in INTEGERS.items()}
    header |= {name: text_of(dataset, tag) for name, tag in WORDS.items()}
    header["TransferSyntaxUID"] = dataset.file_meta.get("TransferSyntaxUID")
    return header


def _is_grey(header):
    is_monochrome = header["PhotometricInterpretation"].startswith("MONOCHROME")
    return header["SamplesPerPixel"] == 1 and is_monochrome


def _is_negative(header):
    return header["PhotometricInterpretation"] == "MONOCHROME1"


def _refuse_object(header):
    """Refuses objects that are not projection images, by Modality or, where it does not tell, by
    SOP class."""
    modality = header["Modality"]
    if modality in PROJECTIONS:
        return
    if modality in NOT_PROJECTIONS:
        raise UnreadableImage(f"is not a radiograph: its Modality is {modality}")
    kind = UID(header["SOPClassUID"]).name
    if "Storage" in kind and not any(word in kind for word in PROJECTION_CLASSES):
        raise UnreadableImage(f"is not a radiograph: its SOP class is {kind}")


def _note_view(header):
    """Remarks on what the header says of an image other than a frontal, upright one of a chest."""
    view, part = header["ViewPosition"], header["BodyPartExamined"]
    if view and not any(word in view for word in ("AP", "PA", "ANTERO", "POSTERO")):
        add_note(f"has the view position {view}, not AP or PA")
    if part and not any(word in part for word in ("CHEST", "THORA", "LUNG", "BODY")):
        add_note(f"shows the body part {part}, not the chest")
    orientation = header["PatientOrientation"].split("\\")
    if len(orientation) == 2 and [end[:1] for end in orientation] != ["L", "F"]:
        add_note(f"is turned, mirrored or a side view: its patient orientation is "
                 f"{'/'.join(orientation)}, that of an upright frontal image L/F")


def _jpeg_frame(dataset, header, size):
    """First frame of a plain JPEG file, the challenge's kind, as a Pillow image `L`, air dark, in a
    fraction of its full size, but not below `size`; None if it is of another kind than declared.

    Decoding at 1/2, 1/4 or 1/8 takes two thirds of the time of decoding in full and averaging
    blocks, and differs from it by 0.07 of 255 grey levels on average.
    """
    declared = header["Columns"], header["Rows"]
    with decoding_errors():
        stream = get_frame(dataset.PixelData, 0, number_of_frames=header["NumberOfFrames"])
        pixels = grey_jpeg(stream, size)
        if pixels is None:
            return None
        rows, columns, colours, _ = simplejpeg.decode_jpeg_header(stream)
        if (columns, rows) != declared or colours != "Gray":
            raise UnreadableImage(
                f"declares {declared[0]} x {declared[1]} grey pixels, but its JPEG stream holds "
                f"{columns} x {rows} of {colours}")
    pixels = without_outliers(pixels)
    return Image.fromarray(255 - pixels if _is_negative(header) else pixels)


def _full_frame(dataset, header, hints):
    """First frame of any other file as a Pillow image `F` in 0..1 with air dark, in full size."""
    with decoding_errors():
        layout = bit_layout(dataset)
        pixels = _decode(dataset, header, layout.stored)
    if pixels.ndim == 2:
        if not _is_grey(header):
            raise UnreadableImage(
                f"has the photometric interpretation {header['PhotometricInterpretation']}")
        pixels = displayed(pixels, layout, hints, negative=_is_negative(header))
    return Image.fromarray(unit_range(without_outliers(luminance(pixels))))


def _decode(dataset, header, bits_stored):
    """Pixels of the first frame, (height, width[, samples]); those of a grey one as stored."""
    if header["TransferSyntaxUID"] == JPEGExtended12Bit and bits_stored > 8:
        # pydicom refuses 12 bits in this syntax, but GDCM looks only at the stream and decodes them
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    if header["TransferSyntaxUID"] == JPEGBaseline8Bit:
        check_jpeg(get_frame(dataset.PixelData, 0, number_of_frames=header["NumberOfFrames"]))
    pixels = pixel_array(dataset, index=0, correct_unused_bits=not _is_grey(header))
    is_palette = header["PhotometricInterpretation"] == "PALETTE COLOR"
    return apply_color_lut(pixels, dataset) if is_palette else pixels
