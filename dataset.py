"""From radiographs to tensors: the cache of prepared images, masks, augmentation, the split."""

import hashlib
import mmap
import os
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from dicom import IMAGE_SIDE, INTERNAL_ERROR, read_images
from dicom import load_and_prepare_image as load_and_prepare_image  # users look for the reader here
from job import InputError, InternalError

MAX_UNREADABLE = 0.05  # share of the training images; beyond it something is wrong with the whole folder


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

    files {patient_id: path} and boxes {patient_id: (n, 4)} in original pixels have the same keys; views {patient_id:
    "AP" or "PA"} may lack some. The images lie as uint8 in a nameless temporary file that is mapped into memory, so nothing of it is left when the run ends, however
    it ends. Unreadable files are left out: `skipped` [(path, reason)].

    Raises InputError if more than MAX_UNREADABLE of the files cannot be read, InternalError if our
    own code is to blame for that, and InputError if there is no room for the cache.
    """

    def __init__(self, files, boxes, *, views=None, rescale_factor=4, workers=1, progress=iter):
        self.side = IMAGE_SIDE // rescale_factor
        self.images = self._allocate(len(files))
        self.patient_ids, self.original_sizes, self.skipped, self.notes = [], [], [], []
        readings = read_images(files.values(), rescale_factor=rescale_factor, workers=workers)
        for (patient_id, path), reading in zip(files.items(), progress(readings)):
            if reading.problem:
                self.skipped.append((path, reading.problem))
                continue
            if reading.note:
                self.notes.append((path, reading.note))
            self.images[len(self.patient_ids)], original_size = reading.value
            self.patient_ids.append(patient_id)
            self.original_sizes.append(original_size)
            self._release()
        if len(self.skipped) > MAX_UNREADABLE * len(files):
            path, reason = self.skipped[0]
            kind = InternalError if INTERNAL_ERROR in dict(self.skipped).values() else InputError
            raise kind(f"{len(self.skipped)} of {len(files)} images cannot be read, more than "
                       f"{MAX_UNREADABLE:.0%}; the first is {path}: {reason}")
        self.boxes = [np.asarray(boxes[patient_id], float).reshape(-1, 4) for patient_id in self.patient_ids]
        self.views = [(views or {}).get(patient_id, "") for patient_id in self.patient_ids]

    def _allocate(self, count):
        size = count * self.side**2
        try:
            cache = tempfile.TemporaryFile()
        except OSError:
            raise InputError(
                f"no temporary folder can be written to, and {size / 1e9:.1f} GB of prepared images need "
                "one: set TMPDIR") from None
        with cache as file:
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
        if hasattr(self._map, "madvise"):  # not on Windows
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


def split_fold(patient_ids, *, folds, fold):
    """Splits ids into those outside and those in a fold of cross-validation: MD5 of the id modulo `folds`.

    Depends on each id alone, so a fold stays the same when other images come or go.
    """
    parts = [], []
    for patient_id in sorted(patient_ids):
        digest = int(hashlib.md5(patient_id.encode(), usedforsecurity=False).hexdigest(), 16)
        parts[digest % folds == fold].append(patient_id)
    return parts


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
