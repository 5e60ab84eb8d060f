"""Reads the headers and the pixels of DICOM files, without PyTorch.

PNG, JPEG and TIFF images are read here, too: after decoding they are treated the same.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydicom import config, dcmread
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, pixel_array
from pydicom.tag import Tag
from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLosslessSV1

from cli import IMAGE_SIDE

from .greyscale import displayed, note, read_cells, read_hints, unit_range

# in a frame, about twice the largest radiographs; more is refused before it is allocated
MAX_PIXELS = 2**25
TAGS = ["PatientSex", "PatientAge", "ViewPosition", "Rows", "Columns"]
TAG_NUMBERS = [Tag(name) for name in TAGS]  # looked up once, not for every file
IMAGE_SIGNATURES = (  # PNG, JPEG, TIFF and BigTIFF in both byte orders
    b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NOT_DICOM = "is not a DICOM file"


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's preamble; raises OSError if it cannot be opened."""
    return _start(path)[128:] == b"DICM"


def _start(path):
    if isinstance(path, io.BytesIO):
        return bytes(path.getbuffer()[:132])
    with open(path, "rb") as file:
        return file.read(132)


def read_header(path: Path) -> dict[str, Any]:
    """Reads TAGS without the pixels, as {tag: value or None}; raises UnreadableImage."""
    with decoding_errors():
        header = dcmread(path, stop_before_pixels=True, specific_tags=TAG_NUMBERS)
        return {tag: header.get(tag) for tag in TAGS}


def reason_of(error: Exception) -> str:
    """One plain line on why a file cannot be read, for any error of pydicom or a decoder."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened: {error.strerror}"
    if "'DICM' prefix" in text:
        return NOT_DICOM
    if isinstance(error, Image.DecompressionBombError):
        return f"declares more than the {MAX_PIXELS:,} pixels that can be read"
    if isinstance(error, MemoryError):
        return "takes too much memory to read"
    if isinstance(error, RecursionError):
        return "nests its sequences too deeply"
    if "all available plugins" in text:
        return ("holds pixels that no decoder can read: they are damaged, or not what the header "
                "says")
    # a message that names a tag or pixels makes sense to users; others are about Python objects
    about_file = re.search(r"\([0-9A-F]{4},[0-9A-F]{4}\)|pixel data|file position|image file", text)
    if about_file and not re.search(r"<|Traceback|\\x|\bb'", text):
        return f"is damaged or of an unknown kind ({text:.150})"
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
    """One file as the network sees it and as people do; air is dark in both."""
    image: np.ndarray  # (S, S), S = 1024 / rescale_factor; 0..1, as uint8 (readers.py) 0..255
    original_size: tuple[int, int]  # (height, width) in pixels
    display: np.ndarray | None = None  # uint8 (height, width) at the original's aspect


def load_and_prepare_image(
        path: str | Path, rescale_factor: int = 4) -> tuple[np.ndarray, tuple[int, int]]:
    """Reads one file of any size as the network sees it.

    Returns the image, float32 (S, S) with S = 1024 / rescale_factor, scaled to 0..1 by its own
    range (a constant image gives zeros) with air dark (MONOCHROME2), and its original size (height,
    width) in pixels. Raises UnreadableImage with the reason; warns with ImageWarning if the image
    is constant, was in colour, or part of the file was ignored or is in doubt.
    """
    return read_radiograph(path, rescale_factor)[:2]


def read_radiograph(path: str | Path | io.BytesIO, rescale_factor: int = 4,
                    image_size: int | None = None) -> Radiograph:
    """Reads one DICOM, PNG, JPEG or TIFF file, whatever its name, or its content in memory.

    Like load_and_prepare_image; with `image_size` it also returns the display, at most that many
    pixels on its longest side, which does not change the network's image.
    """
    side = IMAGE_SIDE // rescale_factor
    with decoding_errors():
        start = _start(path)
    if start.startswith(IMAGE_SIGNATURES) and start[128:] != b"DICM":
        frame = shown = _read_image(path)
        original_size = frame.size[::-1]
    else:
        frame, shown, original_size = _read_dicom(path, side, image_size)
    small = frame.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=1.0)
    display = _display(shown, image_size) if image_size else None
    image = unit_range(np.asarray(small))
    if not image.any():
        note("is constant: all of its pixels have the same value")
    return Radiograph(image, original_size, display)


def _shrink(size, longest):
    """A size scaled down, at the same aspect, to at most `longest` pixels on its longest side."""
    scale = min(longest / max(size), 1)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _display(frame, image_size):
    size = _shrink(frame.size, image_size)
    if size != frame.size:
        frame = frame.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if frame.mode == "L":
        return np.asarray(ImageOps.autocontrast(frame))
    return (unit_range(np.asarray(frame)) * 255 + 0.5).astype(np.uint8)


def _read_dicom(path, side, image_size):
    """Frames for the network and for display as Pillow images, and the original size."""
    with decoding_errors():
        dataset = dcmread(path)
        header = _header_values(dataset)
    _check_header(header)
    original_size = header["Rows"], header["Columns"]
    frame = _read_jpeg(dataset, header, (side, side)) if header["is_plain_jpeg"] else None
    if not frame:
        frame = _read_pixels(dataset, header)
        return frame, frame, original_size
    shown = frame
    if image_size:
        shown = _read_jpeg(dataset, header, _shrink(original_size[::-1], image_size))
    return frame, shown, original_size


def _read_image(path):
    """First frame of a PNG, JPEG or TIFF file as a Pillow image `F` in 0..1, rotated by its EXIF
    orientation, without alpha."""
    with decoding_errors(), Image.open(path, formats=["PNG", "JPEG", "TIFF"]) as image:
        _check_size(*image.size)
        _note_frames(getattr(image, "n_frames", 1))
        is_deep = image.mode.startswith("I;16")
        is_inverted = is_deep and image.format == "TIFF" and image.tag_v2.get(262) == 0
        image = ImageOps.exif_transpose(image)
        if not is_deep and image.mode not in ("L", "I", "F"):
            image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
        pixels = np.asarray(image)
    if is_inverted:  # as MONOCHROME1; Pillow inverts such files of 8 bits itself
        pixels = np.negative(pixels, dtype=np.float32)
    return Image.fromarray(unit_range(_luminance(pixels)))


# keyword: value where it is absent or empty
INTEGERS = {"Rows": 0, "Columns": 0, "NumberOfFrames": 1, "SamplesPerPixel": 1}
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def _header_values(dataset):
    """What decides how a file is read, as plain values by keyword, with its display hints."""
    header = {name: int(dataset.get(name) or default) for name, default in INTEGERS.items()}
    photometric = "\\".join(map(str, np.ravel(dataset.get("PhotometricInterpretation") or "")))
    header["PhotometricInterpretation"] = photometric
    header["syntax"] = dataset.file_meta.get("TransferSyntaxUID")
    header["has_pixels"] = any(keyword in dataset for keyword in PIXELS)
    is_grey = header["SamplesPerPixel"] == 1 and photometric.startswith("MONOCHROME")
    hints = read_hints(dataset)
    is_plain_jpeg = header["syntax"] == JPEGBaseline8Bit and is_grey and not hints
    return header | hints | {"is_grey": is_grey, "is_plain_jpeg": is_plain_jpeg}


def _check_header(header):
    """Refuses, by the header alone, what cannot be decoded or should not be tried."""
    if not header["has_pixels"]:
        raise UnreadableImage("has no pixel data: it holds no image, or was cut off before its end")
    _check_size(header["Columns"], header["Rows"])
    if not header["syntax"]:
        raise UnreadableImage("does not say how its pixels are encoded: it has no transfer syntax")
    _note_frames(header["NumberOfFrames"])


def _check_size(columns, rows):
    if not 0 < rows * columns <= MAX_PIXELS:
        raise UnreadableImage(
            f"declares {columns} x {rows} pixels; 1 to {MAX_PIXELS:,} can be read")


def _note_frames(frames):
    if frames > 1:
        note(f"has {frames} frames; only the first is used")


def _read_jpeg(dataset, header, size):
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
    return ImageOps.invert(image) if header["PhotometricInterpretation"] == "MONOCHROME1" else image


def _read_pixels(dataset, header):
    """First frame of any other file as a Pillow image `F` in 0..1 with air dark, in full size."""
    with decoding_errors():
        header = header | read_cells(dataset)
        pixels = _decode(dataset, header)
    if pixels.ndim == 3:
        pixels = _luminance(pixels)
    elif header["is_grey"]:
        pixels = displayed(pixels, header)
    else:
        raise UnreadableImage(
            f"has the photometric interpretation {header['PhotometricInterpretation']}")
    return Image.fromarray(unit_range(pixels))


def _luminance(pixels):
    """Grey values (height, width) of pixels (height, width[, samples])."""
    if pixels.ndim == 2:
        return pixels
    note("is a colour image; its luminance is used")
    return pixels[..., :3] @ np.float32([0.299, 0.587, 0.114])  # ITU-R BT.601


def _decode(dataset, header):
    """Pixels of the first frame, (height, width[, samples]); those of a grey one as stored."""
    if header["syntax"] == JPEGExtended12Bit and header["BitsStored"] > 8:
        # pydicom refuses 12 bits in this syntax, but GDCM looks only at the stream and decodes them
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    pixels = pixel_array(dataset, index=0, correct_unused_bits=not header["is_grey"])
    is_palette = header["PhotometricInterpretation"] == "PALETTE COLOR"
    return apply_color_lut(pixels, dataset) if is_palette else pixels
