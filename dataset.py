"""From radiographs to tensors: the cache of prepared images, masks, augmentation, the splits."""

import hashlib
import os
import random
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from cli import IMAGE_SIDE, InputError, InternalError, progress, refuse_if, warn
from data_processing import Labels, files_of_table, read_labels
from metrics import rescale_boxes
from radiographs import find_dicom_files, read_images

VALIDATION_SHARE = 0.1
FEWEST = 10  # images of each class that a run needs
MAX_UNREADABLE = 0.05  # share of the images; beyond it something is wrong with the whole folder


def boxes_to_mask(boxes, original_size: tuple[int, int], side: int) -> np.ndarray:
    """Boxes (n, 4) in original pixels -> mask uint8 (side, side) of 0 and 1 in network pixels."""
    mask = np.zeros((side, side), np.uint8)
    for x, y, width, height in rescale_boxes(boxes, original_size, (side, side)):
        left, top = max(round(x), 0), max(round(y), 0)
        right, bottom = max(round(x + width), left + 1), max(round(y + height), top + 1)
        mask[top:bottom, left:right] = 1
    return mask


class PneumoniaDataset(Dataset):
    """Radiographs with masks, in network pixels; the constructor decodes every file once.

    Takes files {patient_id: path} and their Labels. The images are kept as uint8 in an unnamed
    temporary file, one after another, which the system removes however the run ends. Unreadable
    files are in `skipped` [(path, reason)], remarks on readable ones in `notes` [(path, remark)].

    Raises InputError if more than MAX_UNREADABLE of the files cannot be read or the disk has no
    room for the images, InternalError if a fault of these scripts is to blame.
    """

    def __init__(self, files: Mapping[str, Path], labels: Labels, *, side: int = 256,
                 workers: int = 1):
        self.side = side
        self._file = _allocate(len(files) * self.side**2)
        self.patient_ids, self.paths, self.original_sizes = [], [], []
        self.skipped, self.notes = [], []
        self.internal_errors = 0  # images left out because of a fault of these scripts
        with read_images(files.values(), side=self.side, workers=workers) as readings:
            readings = progress(readings, total=len(files), description="prepare")
            for (patient_id, path), reading in zip(files.items(), readings):
                self._add(patient_id, path, reading)
        self._check_skipped(len(files))
        self.boxes = [labels.boxes[key] for key in self.patient_ids]
        self.views = [labels.views[key] for key in self.patient_ids]

    def __getstate__(self) -> dict:
        """For another process on this machine: Linux lets it open the unnamed file of the images as
        long as this process holds it."""
        return self.__dict__ | {"_file": f"/proc/{os.getpid()}/fd/{self._file.fileno()}"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self._file = open(state["_file"], "rb")

    def _add(self, patient_id, path, reading):
        if reading.problem:
            self.skipped.append((path, reading.problem))
            self.internal_errors += reading.internal_error
            return
        if reading.note:
            self.notes.append((path, reading.note))
        self._file.write(reading.value.image)
        self._file.flush()
        self.patient_ids.append(patient_id)
        self.paths.append(path)
        self.original_sizes.append(reading.value.original_size)

    def _check_skipped(self, count):
        if len(self.skipped) > MAX_UNREADABLE * count:
            path, reason = self.skipped[0]
            kind = InternalError if self.internal_errors else InputError
            raise kind(f"{len(self.skipped)} of {count} images cannot be read, more than "
                       f"{MAX_UNREADABLE:.0%}; the first is {path}: {reason}")

    def __len__(self) -> int:
        return len(self.patient_ids)

    def __getitem__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A whole batch: images in 0..255 and masks of 0 and 1, both uint8 (B, 1, S, S)."""
        # mapped anew for each batch, so memory stays small; threads and workers may share the file
        prepared = np.memmap(self._file, np.uint8, "r", shape=(len(self), self.side, self.side))
        images = np.asarray(prepared[indices])
        masks = [boxes_to_mask(self.boxes[i], self.original_sizes[i], self.side) for i in indices]
        return torch.from_numpy(images)[:, None], torch.from_numpy(np.stack(masks))[:, None]


def _allocate(size):
    """An unnamed temporary file with `size` bytes reserved, except on macOS and Windows."""
    file = tempfile.TemporaryFile()
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise InputError(
            f"no room for {size / 1e9:.1f} GB of prepared images in {tempfile.gettempdir()} "
            f"({error.strerror}): set TMPDIR to a larger disk, or raise --rescale-factor"
        ) from None
    return file


class Labelled(NamedTuple):
    """Radiographs that have both a file and labels."""
    files: dict[str, Path]  # {patient_id: path}
    labels: Labels

    def split(self, *, seed: int, folds: int | None = None, fold: int | None = None,
              limits: Mapping[str, int] | None = None) -> dict[str, list[str]]:
        """The ids of each part: "training", "validation" and, with folds, "test"; `limits` caps
        their numbers by random choice. Raises InputError for a part without any."""
        positive, parts = self.labels.positive, {"training": [], "validation": []}
        if folds:
            outside, parts["test"] = split_fold(positive, folds=folds, fold=fold)
            positive = {key: positive[key] for key in outside}
        parts["training"], parts["validation"] = split_patients(positive, seed=seed)
        for name, ids in parts.items():
            refuse_if(not ids, f"--folds {folds} --fold {fold} leave no image for {name}: take "
                      "another fold, fewer folds or more images")
        for name, limit in (limits or {}).items():
            if len(parts.get(name, ())) > limit:
                parts[name] = sorted(random.Random(seed).sample(parts[name], limit))
        return parts

    def load(self, parts: Mapping[str, list[str]], *, rescale_factor: int,
             workers: int) -> tuple[PneumoniaDataset, dict[str, list[int]]]:
        """Prepares the images of all parts {name: ids}; returns the data set and the indices of
        each part, both without the images that cannot be read."""
        files = {key: self.files[key] for ids in parts.values() for key in ids}
        dataset = PneumoniaDataset(files, self.labels, side=IMAGE_SIDE // rescale_factor,
                                   workers=workers)
        warn("images have remarks", [f"{path} {note}" for path, note in dataset.notes])
        warn("images cannot be read and are left out",
             [f"{path} {problem}" for path, problem in dataset.skipped])
        index_of = {patient_id: index for index, patient_id in enumerate(dataset.patient_ids)}
        return dataset, {name: [index_of[key] for key in ids if key in index_of]
                         for name, ids in parts.items()}


def find_labelled(data: Path, table: Path, leave_out: Iterable[Path] = ()) -> Labelled:
    """The images in folder `data`, except `leave_out`, that a label table names.

    Raises InputError if there are too few to train on.
    """
    labels = read_labels(table)
    found, skipped = find_dicom_files(data, leave_out)
    warn("files are left out", [f"{path} {reason}" for path, reason in skipped])
    found = files_of_table(found, table, labels.boxes.keys())
    warn("ids of the table have no image and are left out",
         sorted(labels.boxes.keys() - found.keys()))
    labels = labels.among(found)
    positive = sum(labels.positive.values())
    negative = len(labels.boxes) - positive
    refuse_if(
        min(positive, negative) < FEWEST,
        f"{table} and {data} share {positive} images with opacities and {negative} without; "
        f"training needs {FEWEST} of each: check --labels and --data")
    return Labelled({key: found[key] for key in labels.boxes}, labels)


def split_fold(patient_ids: Iterable[str], *, folds: int, fold: int) -> tuple[list[str], list[str]]:
    """Splits ids into those outside and those in a fold: MD5 of the id modulo `folds`.

    Depends on each id alone, so a fold stays the same when other images are added or removed.
    """
    outside, inside = [], []
    for patient_id in sorted(patient_ids):
        digest = hashlib.md5(patient_id.encode(), usedforsecurity=False).hexdigest()
        part = inside if int(digest, 16) % folds == fold else outside
        part.append(patient_id)
    return outside, inside


def split_patients(opacities: Mapping[str, bool], *, seed: int) -> tuple[list[str], list[str]]:
    """Splits {patient_id: has_opacity} at random into (training, validation) ids: of each class,
    VALIDATION_SHARE is held out.

    Depends on the ids and the seed alone, not on the order of the table: ids follow the batches of
    annotation.
    """
    rng = np.random.default_rng(seed)
    training, validation = [], []
    for has_opacity in (False, True):
        ids = sorted(key for key, value in opacities.items() if value == has_opacity)
        ids = rng.permutation(ids).tolist()
        held_out = round(len(ids) * VALIDATION_SHARE)
        training += ids[held_out:]
        validation += ids[:held_out]
    return sorted(training), sorted(validation)


class Augmentation:
    """Warps and exposes each image of a batch at random; its mask gets the same warp.

    Calls take and return images and masks, float (B, 1, S, S) in 0..1, on any device; masks are not
    interpolated. All random numbers come from the given CPU generator, so they do not depend on the
    device.
    """
    rotation = 8 * np.pi / 180  # radians
    scale, shift = 0.12, 0.08  # share of the image
    displacement = 0.015  # standard deviation of the smooth field, in half images
    exposure = 0.25  # log2 of gamma; gain goes half as far

    def __init__(self, generator: torch.Generator | None):
        self.generator = generator

    def __call__(self, images: torch.Tensor,
                 masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count, _, height, width = images.shape
        device = images.device
        # one warp for image and mask
        nodes = self._nodes(count).to(device, non_blocking=True)
        grid = F.interpolate(nodes, (height, width), mode="bilinear", align_corners=True)
        grid = grid.permute(0, 2, 3, 1)  # (B, S, S, 2)
        images = F.grid_sample(images, grid, mode="bilinear", align_corners=True)
        masks = F.grid_sample(masks, grid, mode="nearest", align_corners=True)
        # exposure of the image alone
        exponents = [self._uniform((count, 1, 1, 1), limit)
                     for limit in (self.exposure, self.exposure / 2)]
        gamma, gain = (2 ** torch.stack(exponents)).to(device, non_blocking=True)
        return (images**gamma * gain).clamp_(0, 1), masks

    def _nodes(self, count):
        """Nodes (B, 2, 5, 5) of the sampling grid: rotated, scaled, flipped, shifted, displaced."""
        angle = self._uniform(count, self.rotation)
        scale = 1 + self._uniform(count, self.scale)
        flip = torch.randint(2, (count,), generator=self.generator) * 2 - 1
        cos, sin = angle.cos() * scale, angle.sin() * scale
        matrix = torch.stack([cos * flip, -sin, sin * flip, cos], dim=1).view(count, 2, 2)
        shift = self._uniform((count, 2, 1), 2 * self.shift)  # the grid runs from -1 to 1
        theta = torch.cat([matrix, shift], dim=2)
        nodes = F.affine_grid(theta, (count, 1, 5, 5), align_corners=True).permute(0, 3, 1, 2)
        return nodes + torch.randn(nodes.shape, generator=self.generator) * self.displacement

    def _uniform(self, shape, limit):
        return (torch.rand(shape, generator=self.generator) * 2 - 1) * limit
