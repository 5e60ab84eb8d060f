"""DICOM files, without PyTorch: finds them in a folder, reads their headers and their pixels."""

import io
import mmap
import multiprocessing
import os
import re
import signal
import stat
import sys
import traceback
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydicom import config, dcmread
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, pixel_array
from pydicom.tag import Tag
from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLosslessSV1

from greyscale import ImageWarning, displayed, note, read_cells, read_hints, unit_range

IMAGE_SIDE = 1024  # pixels a side in the challenge; the network sees IMAGE_SIDE / rescale_factor
MAX_PIXELS = 2**25  # pixels of one frame, about twice the largest radiographs; more is refused before it is allocated
TIME_LIMIT = 5  # seconds of CPU time for one file, the same on a busy machine and an idle one
WAIT_LIMIT = 300  # seconds by the clock until a reader is taken for asleep
TAGS = ["PatientSex", "PatientAge", "ViewPosition", "Rows", "Columns"]
TAG_NUMBERS = [Tag(name) for name in TAGS]  # looked up once, not for every file
DICOM_SUFFIXES = {"", ".dcm", ".dicom", ".dic", ".ima"}  # and numbers; any other is looked into
INTERNAL_ERROR = "was not read because of an internal error; its traceback is on stderr"


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
    files, skipped, stems, alike = {}, [], defaultdict(list), []
    for path in _walk(folder, leave_out, skipped):
        stems[patient_id_of(path)].append(path)
    for stem, paths in stems.items():
        found = []
        for path in paths:
            reason = _refusal(path, shared=len(paths) > 1)
            if reason:
                skipped.append((path, reason))
            else:
                found.append(path)
        if len(found) == 1:
            files[stem] = found[0]
        else:
            alike += found
    ids = Counter(patient_id_of(path, folder) for path in alike)
    for path in alike:
        patient_id = patient_id_of(path, folder)
        if ids[patient_id] > 1:  # in the same folder, with another suffix
            patient_id = _text(path.relative_to(folder).as_posix())
        files[patient_id] = path
    if alike:
        print(f"{len(alike)} files share their names with others: their ids are their paths below "
              f"{folder}, such as {patient_id}")
    return files, skipped


def _walk(folder, leave_out, skipped):
    """Yields the paths of files, and searches each real folder once."""
    def unreadable(error):
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
            if not name.startswith(".") and name.upper() != "DICOMDIR":
                yield Path(root, name)


def _refusal(path, shared):
    """Why this is not a DICOM file, None if it may be one; `shared`: another file has its stem."""
    suffix = path.suffix.lower()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "is not a regular file"
        if shared or (suffix not in DICOM_SUFFIXES and not suffix[1:].isdigit()):
            with open(path, "rb") as file:
                return None if file.read(132)[128:] == b"DICM" else "is not a DICOM file"
    except OSError as error:
        gone = path.is_symlink() and not path.exists()
        return "is a link to nothing" if gone else reason_of(error)
    return None


def read_header(path: Path) -> dict[str, Any]:
    """Reads TAGS without the pixels, as {tag: value or None}; raises UnreadableImage."""
    with decoding_errors():
        header = dcmread(path, stop_before_pixels=True, specific_tags=TAG_NUMBERS)
        return {tag: header.get(tag) for tag in TAGS}


def reason_of(error: Exception) -> str:
    """One plain line on why a DICOM file cannot be read, for whatever pydicom or a decoder raised."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened: {error.strerror}"
    if "'DICM' prefix" in text:
        return "is not a DICOM file"
    if isinstance(error, MemoryError):
        return "takes too much memory to read"
    if isinstance(error, RecursionError):
        return "nests its sequences too deeply"
    if "all available plugins" in text:
        return "holds pixels that no decoder can read: they are damaged, or not what the header says"
    # a message that names a tag or the pixel data is for people; others are about Python objects
    about_dicom = re.search(r"\([0-9A-F]{4},[0-9A-F]{4}\)|pixel data|file position", text)
    if about_dicom and not re.search(r"<|\\x|\bb'", text):
        return f"is damaged or of an unknown kind ({text:.150})"
    return "has a header that is damaged or lacks a needed value"


def limit_memory(more: int = 5 * 2**28) -> None:
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
    """What became of one file: a `value` or a `problem`; `note` tells what the value lacks."""
    value: Any = None
    problem: str = ""
    note: str = ""
    trace: str = ""  # of an error of our own


def _read(function, path, caught):
    caught.clear()
    _limit_time(TIME_LIMIT)
    try:
        value = function(path)
    except UnreadableImage as error:
        return Reading(problem=str(error))
    except MemoryError as error:
        return Reading(problem=reason_of(error))
    except Exception:
        return Reading(problem=INTERNAL_ERROR, trace=traceback.format_exc())
    return Reading(value, note="; ".join(str(warning.message) for warning in caught))


def _limit_time(seconds):
    """Has this process killed by SIGPROF after so many seconds of CPU time; 0 for never."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _serve(connection, parent_end, function):
    """Loop of a reader: silences stderr, ignores Ctrl-C, ends when the parent closes the pipe."""
    parent_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    limit_memory()
    with warnings.catch_warnings(record=True) as caught, suppress(EOFError, OSError):
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ImageWarning)
        while True:
            readings = [_read(function, path, caught) for path in connection.recv()]
            _limit_time(0)
            connection.send(readings)


_starting = Lock()  # a reader must not inherit the other end of another's pipe before it is closed


def read_files(
        function: Callable[[Path], Any], paths: Iterable[Path], *, workers: int, chunk_size: int = 8,
) -> Iterator[Reading]:
    """Yields a Reading of function(path) for each path, in order, from processes that read ahead.

    The function raises UnreadableImage for a file that it cannot read, and warns with ImageWarning
    of what it leaves out; the traceback of any other error is printed once. The files of a reader
    that crashes or takes too long are tried again one by one while no other is read.
    """
    paths, printed = list(paths), {""}
    size = min(chunk_size, len(paths) // (4 * workers) + 1)  # of what a reader gets at a time
    started, idle, window = [], SimpleQueue(), deque()

    # fork starts in milliseconds and is safe here: the child runs neither PyTorch nor threads
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)

    def start():
        with _starting:
            ours, theirs = context.Pipe()  # pipes need no semaphores, so /dev/shm may be missing
            process = context.Process(target=_serve, args=(theirs, ours, function), daemon=True)
            process.start()
            theirs.close()
        started.append(process)
        idle.put((process, ours))

    def read(chunk):
        process, connection = idle.get()
        problem = f"took more than {WAIT_LIMIT} seconds to read"
        try:
            connection.send(chunk)
            if connection.poll(WAIT_LIMIT):
                readings = connection.recv()
                idle.put((process, connection))
                return readings
        except (EOFError, OSError):
            problem = "crashed its decoder"
        process.kill()
        process.join()
        if -process.exitcode == getattr(signal, "SIGPROF", None):
            problem = f"took more than {TIME_LIMIT} seconds of CPU time to decode"
        start()
        return problem

    def take():
        chunk, future = window.popleft()
        readings = future.result()
        if isinstance(readings, str):
            wait([future for _, future in window])
            again = [read([path]) for path in chunk]
            readings = [Reading(problem=one) if isinstance(one, str) else one[0] for one in again]
        for reading in readings:
            place = reading.trace.rstrip().rpartition("\n")[0]
            if place not in printed:
                print(reading.trace, file=sys.stderr)
                printed.add(place)
        return readings

    for _ in range(min(workers, len(paths))):
        start()
    pool = ThreadPoolExecutor(workers)
    try:
        for first in range(0, len(paths), size):
            chunk = paths[first:first + size]
            window.append((chunk, pool.submit(read, chunk)))
            if len(window) > 2 * workers:
                yield from take()
        while window:
            yield from take()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.kill()
        pool.shutdown()
        for process in started:
            process.kill()
            process.join()


def read_images(paths: Iterable[Path], *, rescale_factor: int, workers: int) -> Iterator[Reading]:
    """Yields a Reading of read_image for each path, in order."""
    return read_files(partial(read_image, rescale_factor=rescale_factor), paths, workers=workers)


def read_image(path: Path, rescale_factor: int) -> tuple[np.ndarray, tuple[int, int]]:
    """load_and_prepare_image with the image as uint8 (S, S) in 0..255."""
    image, original_size = load_and_prepare_image(path, rescale_factor)
    return (image * 255 + 0.5).astype(np.uint8), original_size
