"""Radiographs in files, without PyTorch: finds DICOM files, reads their headers and their pixels.

PNG, JPEG and TIFF images are found and read here, too: what follows the decoder is the same.
"""

import io
import json
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
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

from cli import IMAGE_SIDE, InputError
from greyscale import displayed, note, read_cells, read_hints, unit_range

# of one frame, about twice the largest radiographs; more is refused before it is allocated
MAX_PIXELS = 2**25
# layout of the challenge; the marker is sample_data.py's
TRAIN_IMAGES, TEST_IMAGES = "stage_2_train_images", "stage_2_test_images"
MARKER = "synthetic.json"
TAGS = ["PatientSex", "PatientAge", "ViewPosition", "Rows", "Columns"]
TAG_NUMBERS = [Tag(name) for name in TAGS]  # looked up once, not for every file
DICOM_SUFFIXES = {"", ".dcm", ".dicom", ".dic", ".ima"}  # and numbers; any other is looked into
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*")  # of PNG, JPEG and TIFF
NOT_DICOM = "is not a DICOM file"


def patient_id_of(path: Path, folder: Path | None = None) -> str:
    """The file's stem, or its path below `folder` without suffix.

    A trailing `.123` is part of a UID, not a suffix; bytes that are not UTF-8 become escapes.
    """
    name = path.relative_to(folder).as_posix() if folder else path.name
    stem, suffix = os.path.splitext(name)
    return _text(name if suffix[1:].isdigit() else stem)


def _text(name):
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def find_dicom_files(
        folder: Path, leave_out: Iterable[Path] = (),
) -> tuple[dict[str, Path], list[tuple[Path, str]]]:
    """Searches `folder`, its sub-folders and linked folders, except hidden ones and `leave_out`.

    Returns files {patient_id: Path} and skipped [(Path, reason)]. Where stems collide, the ids of
    all of them are their paths below `folder`, which is printed. Only there, and where the suffix
    is another kind's, are files opened.
    """
    found, skipped = _search(folder, leave_out)
    return name_files(found, folder), skipped


def _search(folder, leave_out):
    """Paths of what may be DICOM files, and what is skipped."""
    found, skipped, stems = [], [], defaultdict(list)
    for path in _walk(folder, leave_out, skipped):
        stems[patient_id_of(path)].append(path)
    for paths in stems.values():
        for path in paths:
            reason = _refusal(path, shared=len(paths) > 1)
            if reason:
                skipped.append((path, reason))
            else:
                found.append(path)
    return found, skipped


def find_radiographs(
        sources: Sequence[Path], leave_out: Iterable[Path] = (),
) -> tuple[dict[str, Path], list[tuple[Path, str]]]:
    """Takes every file of `sources` and searches its folders.

    Returns what find_dicom_files does. A folder without DICOM files is searched for PNG, JPEG and
    TIFF images; in one with any, these are counted, which is printed, and not read: they are
    copies, masks or documents. Raises InputError as refuse_mixture does.
    """
    found, skipped = [], []
    for source in sources:
        if source.is_dir():
            paths, left_out = _search_radiographs(source, leave_out)
            refuse_mixture(source, paths)
            found += paths
            skipped += left_out
        else:
            found.append(source)
    folders = [source if source.is_dir() else source.parent for source in sources]
    if len(folders) == 1:
        return name_files(found, folders[0]), skipped
    common = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    return name_files([Path(os.path.abspath(path)) for path in found], Path(common)), skipped


def _search_radiographs(folder, leave_out):
    found, skipped = _search(folder, leave_out)
    images = [path for path, reason in skipped
              if reason == NOT_DICOM and path.suffix.lower() in IMAGE_SUFFIXES]
    if images:
        skipped = [item for item in skipped if item[0].suffix.lower() not in IMAGE_SUFFIXES
                   or item[1] != NOT_DICOM]
        if any(_is_dicom(path) for path in found):
            print(f"{len(images)} PNG, JPEG or TIFF files are not read, because {folder} holds "
                  "DICOM files")
        else:
            found += images
    return found, skipped


def name_files(paths: Iterable[Path], folder: Path) -> dict[str, Path]:
    """{patient_id: path}: the stem or, where stems collide, which is printed, the path below
    `folder`."""
    files, stems, alike = {}, defaultdict(list), []
    for path in dict.fromkeys(paths):
        stems[patient_id_of(path)].append(path)
    for stem, same in stems.items():
        if len(same) == 1:
            files[stem] = same[0]
        else:
            alike += same
    ids = Counter(patient_id_of(path, folder) for path in alike)
    for path in alike:
        patient_id = patient_id_of(path, folder)
        if ids[patient_id] > 1:  # in the same folder, with another suffix
            patient_id = _text(path.relative_to(folder).as_posix())
        files[patient_id] = path
    if alike:
        print(f"{len(alike)} files share their names with others: their ids are their paths below "
              f"{folder}, such as {patient_id}")
    return files


def refuse_mixture(folder: Path, files: Collection) -> None:
    """Raises InputError if sample_data.py made the folder, but not all of its files."""
    marker = Path(folder).parent / MARKER
    if not marker.exists():
        return
    made = json.loads(marker.read_text())
    expected = {TRAIN_IMAGES: made["train"], TEST_IMAGES: made["test"]}.get(Path(folder).name)
    if expected is not None and len(files) > expected:
        raise InputError(
            f"{folder} holds {len(files)} files, sample_data.py made {expected}: phantoms and "
            "radiographs are mixed; give each a folder of its own, named by TRAINML_DATA_PATH")


def _walk(folder, leave_out, skipped):
    """Yields the paths of files, and searches each real folder once."""
    def unreadable(error: OSError) -> None:
        skipped.append((Path(error.filename), error.strerror))

    seen = {os.path.realpath(path) for path in leave_out} - {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        named = [name for name in folders if name.lower().endswith(".dcm")]
        skipped += [(Path(root, name), "is a folder") for name in named]
        for name in sorted(names):
            left_out = os.path.join(real, name) in seen
            if not (left_out or name.startswith(".") or name.upper() == "DICOMDIR"):
                yield Path(root, name)


def _refusal(path, shared):
    """Why this is not a DICOM file, None if it may be one; `shared`: another file has its stem."""
    suffix = path.suffix.lower()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "is not a regular file"
        if shared or (suffix not in DICOM_SUFFIXES and not suffix[1:].isdigit()):
            return None if _is_dicom(path) else NOT_DICOM
    except OSError as error:
        gone = path.is_symlink() and not path.exists()
        return "is a link to nothing" if gone else reason_of(error)
    return None


def _is_dicom(path):
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
    """One plain line on why a file cannot be read, for whatever pydicom or a decoder raised."""
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
    # a message that names a tag or pixels is for people; others are about Python objects
    about_file = re.search(r"\([0-9A-F]{4},[0-9A-F]{4}\)|pixel data|file position|image file", text)
    if about_file and not re.search(r"<|\\x|\bb'", text):
        return f"is damaged or of an unknown kind ({text:.150})"
    return "has a header that is damaged or lacks a needed value"


class UnreadableImage(ValueError):
    """A file that holds no radiograph we can decode; the message is the reason."""


@contextmanager
def decoding_errors() -> Iterator[None]:
    """Around calls into pydicom and its decoders: what they raise becomes UnreadableImage."""
    try:
        with config.disable_value_validation():
            yield
    except UnreadableImage:
        raise
    except Exception as error:  # they raise many types
        raise UnreadableImage(reason_of(error)) from error


class Radiograph(NamedTuple):
    """One file as the network sees it and as people do; air is dark in both."""
    image: np.ndarray  # (S, S) with S = 1024 / rescale_factor, by its own range
    original_size: tuple[int, int]  # (height, width) in pixels
    display: np.ndarray | None = None  # uint8 (height, width) at the original's aspect


def load_and_prepare_image(
        path: str | Path, rescale_factor: int = 4) -> tuple[np.ndarray, tuple[int, int]]:
    """Reads one file of any size as the network sees it.

    Returns the image, float32 (S, S) with S = 1024 / rescale_factor, scaled to 0..1 by its own
    range (a constant image gives zeros) with air dark (MONOCHROME2), and its original size (height,
    width) in pixels. Raises UnreadableImage with the reason; warns with ImageWarning where the
    image is constant, colour became grey, or part of the file was left out or is in doubt.
    """
    return read_radiograph(path, rescale_factor)[:2]


def read_radiograph(path: str | Path | io.BytesIO, rescale_factor: int = 4,
                    image_size: int | None = None) -> Radiograph:
    """Reads one DICOM, PNG, JPEG or TIFF file, whatever its name, or its content in memory.

    As load_and_prepare_image, with the display, at most `image_size` pixels on its longest side, if
    that is given; it does not change what the network sees.
    """
    side = IMAGE_SIDE // rescale_factor
    with decoding_errors():
        start = _start(path)
    is_image = start.startswith(IMAGE_STARTS) and start[128:] != b"DICM"
    try:
        if is_image:
            frame = shown = _read_image(path)
            original_size = frame.size[::-1]
        else:
            frame, shown, original_size = _read_dicom(path, side, image_size)
        small = frame.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=1.0)
        display = _display(shown, image_size) if image_size else None
    except MemoryError as error:
        raise UnreadableImage(reason_of(error)) from None
    image = unit_range(np.asarray(small))
    if not image.any():
        note("is constant: all of its pixels have the same value")
    return Radiograph(image, original_size, display)


def fit(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """A size with its longest side cut to `longest` pixels at the same aspect."""
    scale = min(longest / max(size), 1)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _display(frame, image_size):
    size = fit(frame.size, image_size)
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
        shown = _read_jpeg(dataset, header, fit(original_size[::-1], image_size))
    return frame, shown, original_size


def _read_image(path):
    """First frame of a PNG, JPEG or TIFF file as a Pillow image `F` in 0..1, turned as its EXIF
    data say, without alpha."""
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
    """What decides how a file is read, as plain values by DICOM keyword, with its display hints."""
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
    """Refuses what cannot be decoded, or should not be tried, by the header alone."""
    columns, rows, frames = header["Columns"], header["Rows"], header["NumberOfFrames"]
    if not header["has_pixels"]:
        raise UnreadableImage("has no pixel data")
    _check_size(columns, rows)
    if not header["syntax"]:
        raise UnreadableImage("does not say how its pixels are encoded: it has no transfer syntax")
    _note_frames(frames)


def _check_size(columns, rows):
    if not 0 < rows * columns <= MAX_PIXELS:
        raise UnreadableImage(
            f"declares {columns} x {rows} pixels; 1 to {MAX_PIXELS:,} can be read")


def _note_frames(frames):
    if frames > 1:
        note(f"has {frames} frames; only the first is used")


def _read_jpeg(dataset, header, size):
    """First frame of the challenge's own kind of file as a Pillow image `L` with air dark.

    None if Pillow does not know the stream, as with 12 bits under the name of 8. Decodes at 1/2,
    1/4 or 1/8 of the size while that is not below `size`: on average 0.07 of 255 grey levels from
    decoding in full and averaging blocks, at two thirds of the time.
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
        header |= read_cells(dataset)
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
        # pydicom refuses 12 bits by this name, but GDCM goes by the stream alone and decodes them
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    pixels = pixel_array(dataset, index=0, correct_unused_bits=not header["is_grey"])
    is_palette = header["PhotometricInterpretation"] == "PALETTE COLOR"
    return apply_color_lut(pixels, dataset) if is_palette else pixels
