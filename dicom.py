"""DICOM files without PyTorch: which there are in a folder, their headers, their pixels, and the processes that read them."""

import io
import mmap
import multiprocessing
import os
import signal
import stat
import sys
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydicom import config, dcmread
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, pixel_array
from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLosslessSV1

from greyscale import ImageWarning, displayed, note, read_cells, read_hints, unit_range

IMAGE_SIDE = 1024  # pixels a side in the challenge; the network sees IMAGE_SIDE / rescale_factor
MAX_PIXELS = 2**25  # pixels of one frame, about twice the largest radiographs; more is refused before it is allocated
TIME_LIMIT = 5  # seconds that one file may take
AHEAD = 16  # files read ahead of the consumer for each worker
TAGS = ["PatientSex", "PatientAge", "ViewPosition", "Rows", "Columns"]


def patient_id_of(path):
    """The file's stem; a name that ends in digits, such as a bare UID, has no suffix to lose."""
    return path.name if path.suffix[1:].isdigit() else path.stem


def find_dicom_files(folder):
    """Looks through `folder` and its sub-folders, hidden files apart.

    Returns files {patient_id: Path} in order of their paths, and skipped [(Path, reason)] for what can be no DICOM file
    or repeats an earlier file's stem. Contents are not read here.
    """
    files, skipped = {}, []
    for root, folders, names in os.walk(folder, onerror=lambda e: skipped.append((Path(e.filename), e.strerror))):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        skipped += [(Path(root, name), "is a folder") for name in folders if name.lower().endswith(".dcm")]
        for path in (Path(root, name) for name in sorted(names) if not name.startswith(".")):
            reason = _not_a_file(path)
            first = files.setdefault(patient_id_of(path), path) if reason is None else path
            if first is not path:
                reason = f"has the same name as {first}"
            if reason:
                skipped.append((path, reason))
    return files, skipped


def _not_a_file(path):
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "is a link to nothing" if path.is_symlink() else error.strerror
    return None if stat.S_ISREG(mode) else "is no regular file"


def read_header(path):
    """Reads the tags of TAGS and nothing of the pixels: {tag: value or None}; raises ValueError if it is no DICOM."""
    with config.disable_value_validation():
        try:
            header = dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
            return {tag: header.get(tag) for tag in TAGS}
        except Exception as error:  # pydicom raises many types on a broken file; each means that it cannot be read
            raise ValueError(reason_of(error)) from None


def reason_of(error):
    """One plain line on why a DICOM file cannot be read, for whatever pydicom or a decoder raised."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened: {error.strerror}"
    if "'DICM' prefix" in text:
        return "is no DICOM file"
    if isinstance(error, MemoryError):
        return "takes too much memory to read"
    if isinstance(error, RecursionError):
        return "nests its sequences too deeply"
    if "all available plugins" in text:
        return "holds pixels that no decoder can read: they are damaged, or not what the header says"
    if isinstance(error, TypeError) or "object has no attribute" in text:  # speaks of Python's objects alone
        return "has a header that is damaged or lacks a needed value"
    return f"is damaged or of an unknown kind ({text or type(error).__name__:.150})"


def limit_memory(more=5 * 2**28):
    """Lets this process allocate `more` bytes than it holds: some MB of hostile DICOM can inflate to many GB."""
    if sys.platform != "linux":
        return
    import resource
    held = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    with suppress(ValueError):  # there is a lower limit already
        resource.setrlimit(resource.RLIMIT_AS, (held + more, held + more))


class UnreadableImage(ValueError):
    """A file that holds no radiograph we can decode; the message is the reason."""


@contextmanager
def decoding_errors():
    """Around calls into pydicom and its decoders: whatever they raise on a broken file becomes UnreadableImage."""
    try:
        with config.disable_value_validation():
            yield
    except UnreadableImage:
        raise
    except Exception as error:  # they raise many types
        raise UnreadableImage(reason_of(error)) from error


def load_and_prepare_image(
        path: str | Path, rescale_factor: int = 4) -> tuple[np.ndarray, tuple[int, int]]:
    """Reads one DICOM file of any size as the network sees it.

    Returns the image, float32 (S, S) with S = 1024 / rescale_factor, scaled to 0..1 by its own
    range (a constant image gives zeros) with air dark (MONOCHROME2), and its original size (height,
    width) in pixels. Raises UnreadableImage with the reason; warns with ImageWarning where the
    image is constant, colour became grey, or part of the file was left out or is in doubt.
    """
    side = IMAGE_SIDE // rescale_factor
    with decoding_errors():
        dataset = dcmread(path)
        header = _header_values(dataset)
    _check_header(header)
    try:
        frame = _read_jpeg(dataset, header, side) if header["is_plain_jpeg"] else None
        frame = frame or _read_pixels(dataset, header)
        small = frame.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=1.0)
    except MemoryError as error:
        raise UnreadableImage(reason_of(error)) from None
    image = unit_range(np.asarray(small))
    if not image.any():
        note("is constant: all of its pixels have the same value")
    return image, (header["Rows"], header["Columns"])


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
    if not 0 < rows * columns <= MAX_PIXELS:
        raise UnreadableImage(f"declares {columns} x {rows} pixels; 1 to {MAX_PIXELS:,} can be read")
    if not header["syntax"]:
        raise UnreadableImage("does not say how its pixels are encoded: it has no transfer syntax")
    if frames > 1:
        note(f"has {frames} frames; only the first is used")


def _read_jpeg(dataset, header, side):
    """First frame of the challenge's own kind of file as a Pillow image `L` with air dark.

    None if Pillow does not know the stream, as with 12 bits under the name of 8. Decodes at 1/2, 1/4
    or 1/8 of the size while that is not below `side`: on average 0.07 of 255 grey levels from
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
        image.draft("L", (side, side))
        image.load()
    return ImageOps.invert(image) if header["PhotometricInterpretation"] == "MONOCHROME1" else image


def _read_pixels(dataset, header):
    """First frame of any other file as a Pillow image `F` in 0..1 with air dark, in full size."""
    with decoding_errors():
        header |= read_cells(dataset)
        pixels = _decode(dataset, header)
    if pixels.ndim == 3:
        note("is a colour image; its luminance is used")
        pixels = pixels[..., :3] @ np.float32([0.299, 0.587, 0.114])  # ITU-R BT.601
    elif header["is_grey"]:
        pixels = displayed(pixels, header)
    else:
        raise UnreadableImage(
            f"has the photometric interpretation {header['PhotometricInterpretation']}")
    return Image.fromarray(unit_range(pixels))


def _decode(dataset, header):
    """Pixels of the first frame, (height, width[, samples]); those of a grey one as stored."""
    if header["syntax"] == JPEGExtended12Bit and header["BitsStored"] > 8:
        # pydicom refuses 12 bits by this name, but GDCM goes by the stream alone and decodes them
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    pixels = pixel_array(dataset, index=0, correct_unused_bits=not header["is_grey"])
    is_palette = header["PhotometricInterpretation"] == "PALETTE COLOR"
    return apply_color_lut(pixels, dataset) if is_palette else pixels


class Reading(NamedTuple):
    """What became of one file: `image` uint8 (S, S) or None with the `problem`; `note` says what was left out."""
    image: np.ndarray | None
    original_size: tuple[int, int] | None
    problem: str = ""
    note: str = ""


def _read(path, rescale_factor):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            image, original_size = load_and_prepare_image(path, rescale_factor)
        except UnreadableImage as error:
            return Reading(None, None, problem=str(error))
    note = "; ".join(str(warning.message) for warning in caught if issubclass(warning.category, ImageWarning))
    return Reading((image * 255 + 0.5).astype(np.uint8), original_size, note=note)


def _serve(connection, parent_end, rescale_factor):
    """Body of a reader process: quiet, deaf to Ctrl-C, ended by the end of its parent."""
    parent_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    limit_memory()
    while True:
        try:
            connection.send(_read(connection.recv(), rescale_factor))
        except (EOFError, BrokenPipeError):
            return


_starting = Lock()  # one at a time: a reader must not inherit the other end of another's pipe before it is closed


class _Reader:
    """A process that reads one file at a time, replaced when a file crashes its decoder or takes too long."""

    def __init__(self, rescale_factor):
        self.rescale_factor = rescale_factor
        self.start()

    def start(self):
        # fork starts in milliseconds and is safe here: the child runs neither PyTorch nor threads
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        with _starting:
            self.connection, child_end = context.Pipe()
            arguments = (child_end, self.connection, self.rescale_factor)
            self.process = context.Process(target=_serve, args=arguments, daemon=True)
            self.process.start()
            child_end.close()

    def stop(self):
        self.process.kill()
        self.process.join()
        self.connection.close()

    def read(self, path):
        try:
            self.connection.send(path)
            if self.connection.poll(TIME_LIMIT):
                return self.connection.recv()
            problem = f"took more than {TIME_LIMIT} seconds to decode"
        except (EOFError, OSError):
            problem = "crashed its decoder"
        self.stop()
        self.start()
        return Reading(None, None, problem=problem)


def read_images(paths, *, rescale_factor, workers):
    """Yields a Reading for each path, in order, decoded by `workers` processes up to AHEAD files ahead each."""
    idle, window = SimpleQueue(), deque()
    readers = [_Reader(rescale_factor) for _ in range(workers)]
    for reader in readers:
        idle.put(reader)

    def read(path):
        reader = idle.get()
        try:
            return reader.read(path)
        finally:
            idle.put(reader)

    pool = ThreadPoolExecutor(workers)
    try:
        for path in paths:
            window.append(pool.submit(read, path))
            if len(window) > AHEAD * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        for reader in readers:
            reader.stop()
