"""From DICOM files to tensors: the pixel reader, the cache of prepared images, masks, augmentation, the split."""

import io
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydicom import config, dcmread
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array
from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit
from torch.utils.data import Dataset

from job import InputError, limit_memory, reason_of

IMAGE_SIDE = 1024  # pixels a side in the challenge; the network sees IMAGE_SIDE / rescale_factor
MAX_PIXELS = 2**25  # pixels of one frame, about twice the largest radiographs; more is refused before it is allocated
TIME_LIMIT = 5  # seconds that one file may take
AHEAD = 16  # files read ahead of the consumer for each worker
MAX_UNREADABLE = 0.05  # share of the training images; beyond it something is wrong with the whole folder
VALUE_TAGS = ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "WindowCenter", "VOILUTSequence")


class UnreadableImage(ValueError):
    """A file that holds no radiograph we can decode; the message is the reason."""


class ImageWarning(UserWarning):
    """A radiograph that was read, but not as a plain grey image."""


def load_and_prepare_image(path, rescale_factor=4):
    """Reads one DICOM file of any size as the network sees it.

    Returns the image, float32 (S, S) with S = 1024 / rescale_factor, scaled to 0..1 by its own range (a constant image
    gives zeros) with air dark (MONOCHROME2), and its original size (height, width). Raises UnreadableImage with the
    reason; warns with ImageWarning where colour became grey or frames after the first were left out.
    """
    side = IMAGE_SIDE // rescale_factor
    with config.disable_value_validation():
        try:
            header = dcmread(path)
            _check_header(header)
            frame = _read_frame(header, side)
        except UnreadableImage:
            raise
        except Exception as error:  # pydicom and its decoders raise many types on broken files
            raise UnreadableImage(reason_of(error)) from None
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


def rescale_boxes(boxes, from_size, to_size):
    """Boxes (n, 4) of an image of from_size (height, width) in pixels of to_size: the one bridge between the frames."""
    scale = np.array([to_size[1] / from_size[1], to_size[0] / from_size[0]] * 2)
    return np.asarray(boxes, float).reshape(-1, 4) * scale


def boxes_to_mask(boxes, original_size, side):
    """Paints boxes (n, 4) in original pixels into a mask uint8 (side, side) of 0 and 1 in network pixels."""
    mask = np.zeros((side, side), np.uint8)
    for x, y, width, height in rescale_boxes(boxes, original_size, (side, side)):
        left, top = max(round(x), 0), max(round(y), 0)
        mask[top:max(round(y + height), top + 1), left:max(round(x + width), left + 1)] = 1
    return mask


def _extend(descriptor, offset, size):
    """Stands in for posix_fallocate, which macOS lacks."""
    os.ftruncate(descriptor, offset + size)


class PneumoniaDataset(Dataset):
    """Radiographs with masks, in network pixels; every file is decoded once, when the data set is made.

    files {patient_id: path} and boxes {patient_id: (n, 4)} in original pixels have the same keys. The images lie as
    uint8 in a nameless temporary file that is mapped into memory, so nothing of it is left when the run ends, however
    it ends. Unreadable files are left out: `skipped` [(path, reason)].

    Raises InputError if more than MAX_UNREADABLE of the files cannot be read or the disk has no room for the cache.
    """

    def __init__(self, files, boxes, *, rescale_factor=4, workers=1, progress=iter):
        self.side = IMAGE_SIDE // rescale_factor
        self.images = self._allocate(len(files))
        self.patient_ids, self.original_sizes, self.skipped, self.notes = [], [], [], []
        readings = read_images(files.values(), rescale_factor=rescale_factor, workers=workers)
        for (patient_id, path), reading in zip(files.items(), progress(readings)):
            if reading.image is None:
                self.skipped.append((path, reading.problem))
                continue
            if reading.note:
                self.notes.append((path, reading.note))
            self.images[len(self.patient_ids)] = reading.image
            self.patient_ids.append(patient_id)
            self.original_sizes.append(reading.original_size)
            self._release()
        if len(self.skipped) > MAX_UNREADABLE * len(files):
            path, reason = self.skipped[0]
            raise InputError(f"{len(self.skipped)} of {len(files)} images cannot be read, more than "
                             f"{MAX_UNREADABLE:.0%}; the first is {path}: {reason}")
        self.boxes = [np.asarray(boxes[patient_id], float).reshape(-1, 4) for patient_id in self.patient_ids]

    def _allocate(self, count):
        size = count * self.side**2
        with tempfile.TemporaryFile() as file:
            try:
                getattr(os, "posix_fallocate", _extend)(file.fileno(), 0, size)
            except OSError as error:
                raise InputError(
                    f"no room for {size / 1e9:.1f} GB of prepared images in {tempfile.gettempdir()} "
                    f"({error.strerror}): set TMPDIR to a larger disk, or raise --rescale-factor") from None
            self._map = mmap.mmap(file.fileno(), size)
        return np.frombuffer(self._map, np.uint8).reshape(count, self.side, self.side)

    def _release(self):
        """Hands the mapped pages back to the file cache, so that resident memory does not grow with the data set."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def __len__(self):
        return len(self.patient_ids)

    def __getitem__(self, index):
        images, masks = self.__getitems__([index])
        return images[0], masks[0]

    def __getitems__(self, indices):
        """A whole batch at once: images and masks uint8 (B, 1, S, S), in 0..255 and 0..1."""
        images = torch.from_numpy(self.images[indices])[:, None]
        masks = np.stack([boxes_to_mask(self.boxes[i], self.original_sizes[i], self.side) for i in indices])
        self._release()
        return images, torch.from_numpy(masks)[:, None]


def split_patients(labels, *, validation_share, seed):
    """Splits {patient_id: has_opacity} at random, each of the two classes by itself, into (training, validation) ids.

    Depends on the ids and the seed alone, not on the order of the table: ids follow the batches of annotation.
    """
    rng = np.random.default_rng(seed)
    parts = [], []
    for has_opacity in (False, True):
        ids = rng.permutation(sorted(key for key, label in labels.items() if bool(label) == has_opacity)).tolist()
        held_out = round(len(ids) * validation_share)
        parts[0].extend(ids[held_out:])
        parts[1].extend(ids[:held_out])
    return sorted(parts[0]), sorted(parts[1])


class Augmentation:
    """Another random warp and exposure for every image of a batch, the same geometry for image and mask.

    Calls take images and masks, float (B, 1, S, S) in 0..1, on any device, and return the same; no value of a mask is
    new. The draws come from the CPU generator given, so they do not depend on the device.
    """
    rotation = 8 * np.pi / 180  # radians
    scale, shift = 0.12, 0.08  # share of the image
    displacement = 0.015  # standard deviation of the smooth field, in half images
    exposure = 0.25  # log2 of gamma; gain goes half as far

    def __init__(self, generator):
        self.generator = generator

    def _uniform(self, count, limit):
        return (torch.rand(count, generator=self.generator) * 2 - 1) * limit

    def __call__(self, images, masks):
        count = len(images)
        nodes = self._nodes(count).to(images.device, non_blocking=True)
        grid = F.interpolate(nodes, images.shape[-2:], mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
        gamma, gain = 2 ** torch.stack([self._uniform(count, self.exposure), self._uniform(count, self.exposure / 2)])
        gamma, gain = (factor.to(images.device, non_blocking=True).view(-1, 1, 1, 1) for factor in (gamma, gain))
        images = F.grid_sample(images, grid, mode="bilinear", align_corners=True)
        masks = F.grid_sample(masks, grid, mode="nearest", align_corners=True)
        return (images ** gamma * gain).clamp_(0, 1), masks

    def _nodes(self, count):
        """Nodes (B, 2, 5, 5) of the sampling grid: turned, scaled, shifted, flipped, and each displaced."""
        angle, scale = self._uniform(count, self.rotation), 1 + self._uniform(count, self.scale)
        flip = torch.randint(2, (count,), generator=self.generator) * 2 - 1
        cos, sin = angle.cos() * scale, angle.sin() * scale
        shift = self._uniform((count, 2, 1), 2 * self.shift)  # the grid runs from -1 to 1
        theta = torch.cat([torch.stack([cos * flip, -sin, sin * flip, cos], 1).view(count, 2, 2), shift], dim=2)
        nodes = F.affine_grid(theta, (count, 1, 5, 5), align_corners=True).permute(0, 3, 1, 2)  # (B, 2, 5, 5)
        return nodes + torch.randn(nodes.shape, generator=self.generator) * self.displacement
