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
from PIL import Image
from pydicom import config, dcmread
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array
from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit

IMAGE_SIDE = 1024  # pixels a side in the challenge; the network sees IMAGE_SIDE / rescale_factor
MAX_PIXELS = 2**25  # pixels of one frame, about twice the largest radiographs; more is refused before it is allocated
TIME_LIMIT = 5  # seconds that one file may take
AHEAD = 16  # files read ahead of the consumer for each worker
VALUE_TAGS = ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "WindowCenter", "VOILUTSequence")
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


class ImageWarning(UserWarning):
    """A radiograph that was read, but not as a plain grey image."""


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


def load_and_prepare_image(path, rescale_factor=4):
    """Reads one DICOM file of any size as the network sees it.

    Returns the image, float32 (S, S) with S = 1024 / rescale_factor, scaled to 0..1 by its own range (a constant image
    gives zeros) with air dark (MONOCHROME2), and its original size (height, width). Raises UnreadableImage with the
    reason; warns with ImageWarning where colour became grey or frames after the first were left out.
    """
    side = IMAGE_SIDE // rescale_factor
    with decoding_errors():
        header = dcmread(path)
        _check_header(header)
        frame = _read_frame(header, side)
    image = unit_range(np.asarray(frame.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=1.0)))
    if header.PhotometricInterpretation == "MONOCHROME1":
        image = 1 - image if image.any() else image
    return image, (int(header.Rows), int(header.Columns))


def _check_header(header):
    """Refuses what cannot be decoded, or should not be tried, by the header alone."""
    if not any(tag in header for tag in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise UnreadableImage("has no pixel data")
    columns, rows = int(header.get("Columns") or 0), int(header.get("Rows") or 0)
    if not 0 < rows * columns <= MAX_PIXELS:
        raise UnreadableImage(f"declares {columns} x {rows} pixels; 1 to {MAX_PIXELS:,} can be read")
    if "TransferSyntaxUID" not in header.file_meta:
        raise UnreadableImage("does not say how its pixels are encoded: it has no transfer syntax")
    if header.file_meta.TransferSyntaxUID == JPEGExtended12Bit and header.get("BitsStored") != 8:
        raise UnreadableImage(f"is JPEG extended 12-bit ({JPEGExtended12Bit}), for which there is no decoder with a "
                              "permissive licence")


def _read_frame(header, side):
    """First frame as a Pillow image: `L` for the challenge's own kind of file, else `F` in 0..1."""
    if int(header.get("NumberOfFrames") or 1) > 1:
        warnings.warn(f"has {header.NumberOfFrames} frames; only the first is used", ImageWarning, stacklevel=3)
    grey = header.get("SamplesPerPixel", 1) == 1 and header.PhotometricInterpretation.startswith("MONOCHROME")
    if header.file_meta.TransferSyntaxUID == JPEGBaseline8Bit and grey and not any(tag in header for tag in VALUE_TAGS):
        return _read_jpeg(header, side)
    return Image.fromarray(unit_range(_read_pixels(header)))


def _read_jpeg(header, side):
    """Decodes at 1/2, 1/4 or 1/8 of the size while that is not below `side`: on average 0.07 of 255 grey levels from
    decoding in full and averaging blocks, at two thirds of the time."""
    frame = get_frame(header.PixelData, 0, number_of_frames=int(header.get("NumberOfFrames") or 1))
    image = Image.open(io.BytesIO(frame), formats=["JPEG"])
    if image.size != (header.Columns, header.Rows) or image.mode != "L":
        raise UnreadableImage(f"declares {header.Columns} x {header.Rows} grey pixels, but its JPEG stream holds "
                              f"{image.size[0]} x {image.size[1]} of mode {image.mode}")
    image.draft("L", (side, side))
    image.load()
    return image


def _read_pixels(header):
    """First frame of any other file in displayed grey values, (height, width)."""
    pixels = pixel_array(header, index=0)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, header)
    if pixels.ndim == 3:
        warnings.warn("is a colour image; its luminance is used", ImageWarning, stacklevel=4)
        return pixels[..., :3] @ np.float32([0.299, 0.587, 0.114])  # ITU-R BT.601
    if not header.PhotometricInterpretation.startswith("MONOCHROME"):
        raise UnreadableImage(f"has the photometric interpretation {header.PhotometricInterpretation}")
    values = apply_modality_lut(pixels, header)
    header.pop("RescaleSlope", None)  # pydicom's window turns the grey scale round for a negative slope
    return apply_voi_lut(values, header)


def unit_range(pixels):
    """Scales to 0..1 float32 by the finite values' own range; zeros if they are all the same."""
    pixels = pixels.astype(np.result_type(pixels.dtype, np.float32))
    finite = np.isfinite(pixels)
    if not finite.all():
        pixels[~finite] = pixels[finite].min(initial=0)
    low, high = float(pixels.min()), float(pixels.max())
    return np.zeros(pixels.shape, np.float32) if high == low else ((pixels - low) / (high - low)).astype(np.float32)


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
