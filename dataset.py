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
from data_processing import Labels, check_boxes, files_of_table, patients_of_files, read_labels
from metrics import rescale_boxes
from radiographs import find_dicom_files, read_images

HELD_OUT = 10  # one image in so many is kept for validation
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
        self.boxes = [np.asarray(labels.boxes[key], float).reshape(-1, 4)
                      for key in self.patient_ids]
        check_boxes(dict(zip(self.patient_ids, self.boxes)),
                    dict(zip(self.patient_ids, self.original_sizes)))
        self.views = [labels.views.get(key, "") for key in self.patient_ids]
        self.patients = [labels.patient_of(key) for key in self.patient_ids]

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
        """The ids of each part: "training", "validation" and, with folds, "test", all images of a
        patient in one of them; `limits` caps their numbers by random choice. Raises InputError for
        a part without any."""
        labels, parts = self.labels, {"training": [], "validation": []}
        if folds:
            parts["test"] = split_folds(labels, folds)[fold]
            labels = labels.among(labels.boxes.keys() - parts["test"])
        parts["validation"] = hold_out(labels, seed)
        parts["training"] = sorted(labels.boxes.keys() - parts["validation"])
        for name, ids in parts.items():
            refuse_if(not ids, f"--folds {folds} --fold {fold} leave no image for {name}: take "
                      "another fold, fewer folds or more images")
        for name, limit in (limits or {}).items():
            if len(parts.get(name, ())) > limit:
                parts[name] = sorted(random.Random(seed).sample(parts[name], limit))
        return parts

    def split_as(self, earlier: Mapping[str, str]) -> dict[str, list[str]]:
        """The ids of each part of a split made `earlier`, {patient_id: part}. Names the images
        that are gone since, and those that it does not have. Raises InputError for a part without
        any."""
        warn("images of the run to continue are gone", sorted(earlier.keys() - self.files.keys()))
        warn("images are not in the split of the run to continue and are left out",
             sorted(self.files.keys() - earlier.keys()))
        parts = {name: [] for name in ("training", "validation", *earlier.values())}
        for patient_id in sorted(earlier.keys() & self.files.keys()):
            parts[earlier[patient_id]].append(patient_id)
        for name, ids in parts.items():
            refuse_if(not ids, f"no image of the run's part for {name} is left: give the --data "
                      "and --labels that it began with")
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
    if not labels.patients:
        print(f"{table} has no column patient, so headers and ids tell the patients; images of one "
              "that they do not tell may be in several parts")
        files = {key: found[key] for key in labels.boxes}
        labels = labels._replace(patients=patients_of_files(files, table.parent))
    positive = sum(labels.positive.values())
    negative = len(labels.boxes) - positive
    refuse_if(
        min(positive, negative) < FEWEST,
        f"{table} and {data} share {positive} images with opacities and {negative} without; "
        f"training needs {FEWEST} of each: check --labels and --data")
    return Labelled({key: found[key] for key in labels.boxes}, labels)


def divide(labels: Labels, patients: Iterable[str], count: int) -> list[list[str]]:
    """Divides the ids into `count` parts of about the same size and share of opacities, all images
    of a patient in one part.

    Goes through the `patients` in their order. One with an opacity joins the part with the fewest
    such images, then the fewest images; one without joins the part with the fewest images.
    """
    ids, positive = {}, labels.positive
    for patient_id in sorted(labels.boxes):
        ids.setdefault(labels.patient_of(patient_id), []).append(patient_id)
    parts, sizes = [[] for _ in range(count)], [(0, 0)] * count  # images with opacities, all images
    for patient in patients:
        found = sum(positive[patient_id] for patient_id in ids[patient])
        chosen = min(range(count), key=lambda part: sizes[part][0 if found else 1:])
        parts[chosen] += ids[patient]
        sizes[chosen] = sizes[chosen][0] + found, sizes[chosen][1] + len(ids[patient])
    return [sorted(part) for part in parts]


def split_folds(labels: Labels, folds: int) -> list[list[str]]:
    """The ids of each fold, divided in the order of the MD5 of the patients: whatever the order of
    the table, the same images make the same folds."""
    def digest(patient: str) -> str:
        return hashlib.md5(patient.encode(), usedforsecurity=False).hexdigest()
    return divide(labels, sorted(set(map(labels.patient_of, labels.boxes)), key=digest), folds)


def hold_out(labels: Labels, seed: int) -> list[str]:
    """The ids of a random part in HELD_OUT; depends on the images, patients and seed alone."""
    patients = sorted(set(map(labels.patient_of, labels.boxes)))
    order = np.random.default_rng(seed).permutation(patients).tolist()
    return divide(labels, order, HELD_OUT)[0]


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
