"""Reads the headers and the pixels of DICOM files.

PNG, JPEG and TIFF images are read here, too: after decoding they are treated the same.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydicom import config, dcmread
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, pixel_array
from pydicom.tag import Tag
from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLosslessSV1

from .greyscale import add_note, bit_layout, display_hints, displayed, unit_range

# in a frame, about twice the largest radiographs; more is refused before it is allocated
MAX_PIXELS = 2**25
TAGS = ["PatientSex", "PatientAge", "ViewPosition", "PatientID", "Rows", "Columns"]
TAG_NUMBERS = [Tag(name) for name in TAGS]  # looked up once, not for every file
IMAGE_SIGNATURES = (  # PNG, JPEG, TIFF and BigTIFF in both byte orders
    b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NOT_DICOM = "is not a DICOM file"
DAMAGED = "is damaged or of an unknown kind"
REASONS = {  # by the type of an error
    InvalidDicomError: NOT_DICOM,
    Image.DecompressionBombError: f"declares more than the {MAX_PIXELS:,} pixels that can be read",
    UnidentifiedImageError: DAMAGED,
    MemoryError: "takes too much memory to read",
    RecursionError: "nests its sequences too deeply",
}
ABOUT_THE_FILE = (  # first words of pydicom's and Pillow's messages that make sense to users
    "A (00", "Missing required element: (", "No tag to read at file position", "Unknown (00",
    "The number of bytes of pixel data", "Unable to decode the pixel data", "broken data stream",
    "image file is truncated", "Truncated File Read")


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's preamble; raises OSError if it cannot be opened."""
    return _start_of(path)[128:] == b"DICM"


def _start_of(file):
    if isinstance(file, io.BytesIO):
        return bytes(file.getbuffer()[:132])
    with open(file, "rb") as opened:
        return opened.read(132)


def read_header(path: Path) -> dict[str, Any]:
    """Reads TAGS without the pixels, as {tag: value or None}; raises UnreadableImage."""
    with decoding_errors():
        header = dcmread(path, stop_before_pixels=True, specific_tags=TAG_NUMBERS)
        return {tag: header.get(tag) for tag in TAGS}


def reason_of(error: Exception) -> str:
    """One plain line on why a file cannot be read, for any error of pydicom or a decoder."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened: {error.strerror}"
    for kind, reason in REASONS.items():
        if isinstance(error, kind):
            return reason
    text = " ".join(str(error).split())
    if text.startswith("Unable to decode as exceptions were raised by all"):
        return ("holds pixels that no decoder can read: they are damaged, or not what the header "
                "says")
    if text.startswith(ABOUT_THE_FILE):
        return f"{DAMAGED} ({text:.150})"
    return "has a header that is damaged or lacks a needed value"


class UnreadableImage(ValueError):
    """A file that holds no radiograph we can decode; the message is the reason."""


@contextmanager
def decoding_errors() -> Iterator[None]:
    """Turns whatever pydicom and its decoders raise inside the block into UnreadableImage."""
    try:
        with config.disable_value_validation():
            yield
    except UnreadableImage:
        raise
    except Exception as error:  # they raise many types
        raise UnreadableImage(reason_of(error)) from error


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
    colour, or part of the file was ignored or is in doubt.
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
        start = _start_of(path)
    if start.startswith(IMAGE_SIGNATURES) and start[128:] != b"DICM":
        frame = shown = _picture_frame(path)
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


def _picture_frame(path):
    """First frame of a PNG, JPEG or TIFF file as a Pillow image `F` in 0..1, rotated by its EXIF
    orientation, without alpha."""
    with decoding_errors(), Image.open(path, formats=["PNG", "JPEG", "TIFF"]) as image:
        _check_size(*image.size, getattr(image, "n_frames", 1))
        is_deep = image.mode.startswith("I;16")
        is_inverted = is_deep and image.format == "TIFF" and image.tag_v2.get(262) == 0
        image = ImageOps.exif_transpose(image)
        if not is_deep and image.mode not in ("L", "I", "F"):
            image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
        pixels = np.asarray(image)
    if is_inverted:  # as MONOCHROME1; Pillow inverts such files of 8 bits itself
        pixels = np.negative(pixels, dtype=np.float32)
    return Image.fromarray(unit_range(_luminance(pixels)))


def _dicom_frames(path, side, display_size):
    """First frame for the network and for display as Pillow images, and the original size."""
    with decoding_errors():
        dataset = dcmread(path)
        header, hints = _header_of(dataset), display_hints(dataset)
        has_pixels = any(keyword in dataset for keyword in PIXELS)
    if not has_pixels:
        raise UnreadableImage("has no pixel data: it holds no image, or was cut off before its end")
    _check_size(header["Columns"], header["Rows"], header["NumberOfFrames"])
    if not header["TransferSyntaxUID"]:
        raise UnreadableImage("does not say how its pixels are encoded: it has no transfer syntax")
    original_size = header["Rows"], header["Columns"]
    frame = None
    if header["TransferSyntaxUID"] == JPEGBaseline8Bit and _is_grey(header) and not hints:
        frame = shown = _jpeg_frame(dataset, header, (side, side))
    if not frame:
        frame = shown = _full_frame(dataset, header, hints)
    elif display_size:
        shown = _jpeg_frame(dataset, header, _shrink(original_size[::-1], display_size))
    return frame, shown, original_size


# keyword: value where it is absent or empty
INTEGERS = {"Rows": 0, "Columns": 0, "NumberOfFrames": 1, "SamplesPerPixel": 1}
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def _header_of(dataset):
    """What decides how a file is decoded, as plain values by keyword."""
    header = {name: int(dataset.get(name) or default) for name, default in INTEGERS.items()}
    photometric = np.ravel(dataset.get("PhotometricInterpretation") or "")
    header["PhotometricInterpretation"] = "\\".join(map(str, photometric))
    header["TransferSyntaxUID"] = dataset.file_meta.get("TransferSyntaxUID")
    return header


def _is_grey(header):
    is_monochrome = header["PhotometricInterpretation"].startswith("MONOCHROME")
    return header["SamplesPerPixel"] == 1 and is_monochrome


def _is_negative(header):
    return header["PhotometricInterpretation"] == "MONOCHROME1"


def _check_size(columns, rows, frames):
    if not 0 < rows * columns <= MAX_PIXELS:
        raise UnreadableImage(
            f"declares {columns} x {rows} pixels; 1 to {MAX_PIXELS:,} can be read")
    if frames > 1:
        add_note(f"has {frames} frames; only the first is used")


def _jpeg_frame(dataset, header, size):
    """First frame of a plain JPEG file, the challenge's kind, as a Pillow image `L`, air dark.

    None if Pillow cannot decode the stream, such as 12 bits declared as 8. Decodes at 1/2, 1/4 or
    1/8 of the full size, but not below `size`: this takes two thirds of the time of decoding in
    full and averaging blocks, and differs from it by 0.07 of 255 grey levels on average.
    """
    declared = header["Columns"], header["Rows"]
    with decoding_errors():
        stream = get_frame(dataset.PixelData, 0, number_of_frames=header["NumberOfFrames"])
        try:
            image = Image.open(io.BytesIO(stream), formats=["JPEG"])
        except UnidentifiedImageError:
            return None
        if image.size != declared or image.mode != "L":
            raise UnreadableImage(
                f"declares {declared[0]} x {declared[1]} grey pixels, but its JPEG stream holds "
                f"{image.size[0]} x {image.size[1]} of mode {image.mode}")
        image.draft("L", size)
        image.load()
    return ImageOps.invert(image) if _is_negative(header) else image


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
    return Image.fromarray(unit_range(_luminance(pixels)))


def _luminance(pixels):
    """Grey values (height, width) of pixels (height, width[, samples])."""
    if pixels.ndim == 2:
        return pixels
    add_note("is a colour image; its luminance is used")
    return pixels[..., :3] @ np.float32([0.299, 0.587, 0.114])  # ITU-R BT.601


def _decode(dataset, header, bits_stored):
    """Pixels of the first frame, (height, width[, samples]); those of a grey one as stored."""
    if header["TransferSyntaxUID"] == JPEGExtended12Bit and bits_stored > 8:
        # pydicom refuses 12 bits in this syntax, but GDCM looks only at the stream and decodes them
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    pixels = pixel_array(dataset, index=0, correct_unused_bits=not _is_grey(header))
    is_palette = header["PhotometricInterpretation"] == "PALETTE COLOR"
    return apply_color_lut(pixels, dataset) if is_palette else pixels
