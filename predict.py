"""Finds lung opacities in a folder of DICOM files with a trained model.

    python predict.py --data data/stage_2_test_images --model output/final.pth.tar

Writes annotations.json, submission.csv, images/<patientId>.png and, where a file could not be read, skipped.csv.
"""

import argparse
import csv
import errno
import io
import json
import math
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data_processing import read_labels, warn
from dataset import rescale_boxes
from dicom import IMAGE_SIDE, INTERNAL_ERROR, find_dicom_files, read_images
from job import (InputError, atomic_write, default_path, make_folder, require, require_folder,
                 result_folders, run, usable_cores)
from metrics import (MIN_AREA, Evaluation, Thresholds, average_precision_image, parse_boxes, prediction_string,
                     score_lines, summarize)
from model import SMALLEST_GRID, load_checkpoint

BOX_THRESHOLD = 0.5  # mask probability; used where no search has found a better one
GATE_THRESHOLD = 0.8  # image_confidence below which there are no boxes, likewise
SIZE_WEIGHT = 0.8  # of a region's own sides in their geometric mean with TYPICAL_SIDES
TYPICAL_SIDES = (217 / 1024, 298 / 1024)  # median width and height of the challenge's boxes, in shares of the image
RESCALE_FACTORS = (1, 2, 4, 8, 16)
LOG_SECONDS = 30  # between progress lines in a job log
DRAWINGS_WAITING = 64  # more would only fill the memory, and hide a full disk until the end
NAME_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EILSEQ,
               errno.EINVAL)  # the picture's name cannot be used; the disk is in order
OVERLAY_WIDTH, LEGEND_HEIGHT, CAPTION_HEIGHT = 512, 24, 20  # pixels
TRUTH, PREDICTION, HEAT = (64, 220, 120), (255, 208, 48), (255, 72, 32)  # RGB


class Runtime(NamedTuple):
    """Where the network runs and in which precision: passed along instead of two global switches."""
    device: torch.device
    dtype: torch.dtype

    def autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


def choose_runtime(device, precision):
    """Resolves `auto`: the first of CUDA, MPS and CPU that is there, and the fastest precision it computes natively.

    Raises InputError for a device that is not there and for fp16 on the CPU.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in available if available[name]) if device == "auto" else device
    if not available[device]:
        raise InputError(f"--device {device}: there is none here; use --device auto")
    if device == "cpu" and precision == "fp16":
        raise InputError("--precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
    if precision == "auto":
        precision = {"cuda": "bf16" if _cuda_has_bf16() else "fp16", "mps": "fp32",
                     "cpu": "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"}[device]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    torch.backends.cudnn.benchmark = True  # every batch but the last has the same shape
    return Runtime(torch.device(device), dtype)


def _cuda_has_bf16():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def progress(iterable, *, total, description):
    """A bar on a terminal; in a job log a plain line every LOG_SECONDS."""
    if sys.stderr.isatty():
        yield from tqdm(iterable, total=total, desc=description, leave=False)
        return
    shown = time.monotonic()
    for done, item in enumerate(iterable, 1):
        yield item
        if time.monotonic() - shown > LOG_SECONDS:
            shown = time.monotonic()
            print(f"{description}: {done} of {total}", flush=True)


def segment(model, images, runtime):
    """images float (B, 1, S, S) in 0..1 -> mask logits (B, 1, S, S), float32."""
    with runtime.autocast():
        return model(images).float()


def to_probabilities(logits):
    """Logits (B, 1, S, S) -> mask probabilities (B, S, S), NumPy."""
    return logits.sigmoid()[:, 0].cpu().numpy()


@torch.inference_mode()
def predict_masks(model, images, runtime):
    """images uint8 (B, 1, S, S) -> mask probabilities (B, S, S), NumPy."""
    return to_probabilities(segment(model, to_network(images, runtime.device), runtime))


def to_network(images, device):
    """uint8 (B, 1, S, S) in 0..255 -> float32 in 0..1 on the device, channels last."""
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return images.float().div_(255)


def check_side(model, rescale_factor):
    """Raises InputError if the images would have fewer squares a side than the model's halvings need."""
    side, smallest = IMAGE_SIDE // rescale_factor, SMALLEST_GRID * model.patch_size
    if side < smallest:
        raise InputError(f"--rescale-factor {rescale_factor} makes images of {side} pixels a side, the checkpoint's "
                         f"network takes {smallest} and more: give {IMAGE_SIDE // smallest} or less")


def image_confidence(mask):
    """Confidence in 0..1 that the image has an opacity: the highest probability of its mask (S, S)."""
    return float(mask.max())


def find_boxes(mask, original_size, *, box_threshold, gate_threshold, size_weight=SIZE_WEIGHT):
    """Boxes (n, 4) in original pixels and confidences (n,) of a mask (S, S) of probabilities.

    No boxes if image_confidence is below `gate_threshold`; regions below MIN_AREA are left out.
    `size_weight` is that of regress_sides.
    """
    if image_confidence(mask) < gate_threshold:
        return np.zeros((0, 4)), np.zeros(0)
    boxes, confidences = parse_boxes(mask, box_threshold, MIN_AREA * mask.size)
    return regress_sides(rescale_boxes(boxes, mask.shape, original_size), original_size, size_weight), confidences


def regress_sides(boxes, original_size, weight):
    """Boxes (n, 4) of an image (height, width), their sides drawn towards TYPICAL_SIDES, cut off at the image.

    Each side becomes side**weight * typical**(1 - weight) about its centre, because boxes that come out small are mostly
    too small, and large ones too large (regression to the mean). A weight of 1 leaves them as they are.
    """
    size = np.array(original_size[::-1])
    grown = boxes[:, 2:] ** weight * (size * TYPICAL_SIDES) ** (1 - weight) - boxes[:, 2:]
    low = np.clip(boxes[:, :2] - grown / 2, 0, size)
    high = np.clip(boxes[:, :2] + boxes[:, 2:] + grown / 2, 0, size)
    return np.hstack([low, high - low])


def draw_overlay(image, mask, predicted, truth=None, caption=""):
    """Draws what the network saw and found, OVERLAY_WIDTH pixels wide at the original aspect, legend and caption below.

    image uint8 (S, S); mask (S, S) probabilities; predicted (boxes, confidences) and truth boxes, all in the pixels of
    the original size, which comes with them: predicted = (boxes, confidences, original_size).
    """
    boxes, confidences, original_size = predicted
    height = int(np.clip(round(OVERLAY_WIDTH * original_size[0] / original_size[1]), 16, 4 * OVERLAY_WIDTH))
    size = (OVERLAY_WIDTH, height)
    canvas = Image.new("RGB", (OVERLAY_WIDTH, height + LEGEND_HEIGHT + CAPTION_HEIGHT))
    canvas.paste(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    canvas.paste(HEAT, (0, 0), Image.fromarray((mask * 140).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR))
    draw = ImageDraw.Draw(canvas)
    for box in rescale_boxes(truth if truth is not None else [], original_size, size[::-1]):
        draw.rectangle(_corners(box), outline=TRUTH, width=2)
    for box, confidence in zip(rescale_boxes(boxes, original_size, size[::-1]), confidences):
        _dashed_rectangle(draw, _corners(box))
        place = box[0] + 3, max(box[1] - 17, 1)
        draw.text(place, f"{confidence:.2f}", PREDICTION, _font(), stroke_width=1, stroke_fill="black")
    canvas.paste(_legend(truth is not None), (0, height))
    draw.text((8, height + LEGEND_HEIGHT + CAPTION_HEIGHT // 2), caption, "white", _font(12), anchor="lm")
    return canvas


@cache
def _font(size=14):
    return ImageFont.load_default(size)


def _corners(box):
    x, y, width, height = box
    return [x, y, x + width, y + height]


def _dashed_rectangle(draw, corners, dash=8):
    left, top, right, bottom = corners
    for start in np.arange(left, right, 2 * dash):
        for y in (top, bottom):
            draw.line([start, y, min(start + dash, right), y], PREDICTION, 2)
    for start in np.arange(top, bottom, 2 * dash):
        for x in (left, right):
            draw.line([x, start, x, min(start + dash, bottom)], PREDICTION, 2)


@cache
def _legend(with_truth):
    """The strip below a picture: truth, prediction, and the scale of the heat map."""
    strip = Image.new("RGB", (OVERLAY_WIDTH, LEGEND_HEIGHT))
    draw, y = ImageDraw.Draw(strip), LEGEND_HEIGHT // 2
    if with_truth:
        draw.line([8, y, 40, y], TRUTH, 2)
        draw.text((46, y), "truth", "white", _font(), anchor="lm")
    for x in (100, 116):
        draw.line([x, y, x + 8, y], PREDICTION, 2)
    draw.text((132, y), "prediction, confidence", "white", _font(), anchor="lm")
    draw.text((330, y), "mask probability 0", "white", _font(), anchor="lm")
    for x in range(40):
        draw.line([452 + x, y - 6, 452 + x, y + 6], tuple(channel * x // 72 for channel in HEAT))
    draw.text((497, y), "1", "white", _font(), anchor="lm")
    return strip


def picture_path(folder: Path, patient_id: str) -> Path:
    """The PNG of an id, in UTF-8 whatever the locale."""
    return folder / os.fsdecode(f"{patient_id}.png".encode())


def save_overlay(path, *overlay):
    """Writes draw_overlay(*overlay) as a PNG; a name that the disk does not take costs the picture."""
    content = io.BytesIO()
    draw_overlay(*overlay).save(content, format="PNG", compress_level=1)  # 3 times faster than 6
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content.getbuffer())
    except OSError as error:
        if error.errno not in NAME_ERRORS:
            raise
        print(f"warning: no picture of {path.stem}: {error.strerror}")


def save_overlays(pictures):
    """Draws (path, arguments of draw_overlay) as they come, in threads, with a limit to those that wait."""
    waiting = deque()
    with ThreadPoolExecutor(2) as drawers:
        for path, overlay in pictures:
            waiting.append(drawers.submit(save_overlay, path, *overlay))
            if len(waiting) > DRAWINGS_WAITING:
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()


def batched(iterable, size):
    """Lists of `size` items, the last one shorter (itertools.batched is there from Python 3.12 only)."""
    iterator = iter(iterable)
    return iter(lambda: list(islice(iterator, size)), [])


def predict_files(model, files, runtime, *, batch_size, rescale_factor, workers):
    """Yields (patient_id, Reading, mask) for each of files {patient_id: path}; mask None where unreadable."""
    readings = zip(files, read_images(files.values(), rescale_factor=rescale_factor, workers=workers))
    for batch in batched(readings, batch_size):
        images = [reading.value[0][None] for _, reading in batch if reading.value]
        masks = iter(predict_masks(model, torch.from_numpy(np.stack(images)), runtime) if images else [])
        for patient_id, reading in batch:
            yield patient_id, reading, next(masks) if reading.value else None


def write_text(path, text):
    """Writes UTF-8 whole or not at all; bytes of a file name that are no text come out as escapes."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_csv(path, rows):
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    write_text(path, table.getvalue())


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", "-d", default=default_path("TRAINML_DATA_PATH"), help="folder of DICOM files")
    add("--model", default=default_path("TRAINML_MODEL_PATH", "final.pth.tar"), help="checkpoint of the network")
    add("--output", default=default_path("TRAINML_OUTPUT_PATH"), help="folder for the results")
    add("--labels", help="train.csv or label table of these images: draws and scores the truth, too")
    add("--rescale-factor", "--rf", type=int, choices=RESCALE_FACTORS, help="1024 / side of the network's image "
        "(default: the checkpoint's)")
    add("--save-images", default=True, action=argparse.BooleanOptionalAction, help="write annotated PNG images")
    add_runtime_options(parser, batch_size=16)
    return parser


def add_runtime_options(parser, *, batch_size):
    """The flags that train.py and predict.py share."""
    add = parser.add_argument
    add("--batch-size", "--bs", type=number(1, math.inf, int), default=batch_size, help="images in a batch")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="where the network runs")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="of the network's arithmetic")
    add("--workers", type=number(1, math.inf, int), default=usable_cores(), help="processes that decode images")


def number(low, high, kind=float):
    """A type for argparse: a number of `kind`, finite and in low..high."""
    def parse(text):
        if not (low <= kind(text) <= high and math.isfinite(kind(text))):
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return kind(text)
    parse.__name__ = "number"  # argparse: "invalid number value"
    return parse


def main(argv=None):
    args = make_parser().parse_args(argv)
    runtime = choose_runtime(args.device, args.precision)
    folder = require_folder(args.data, flag="--data", variable="TRAINML_DATA_PATH")
    if args.labels:
        require(args.labels, flag="--labels")
    model, checkpoint = load_checkpoint(
        require(args.model, flag="--model", variable="TRAINML_MODEL_PATH"), runtime.device)
    rescale_factor = args.rescale_factor or checkpoint.get("rescale_factor") or 4
    check_side(model, rescale_factor)
    output = make_folder(args.output, flag="--output", variable="TRAINML_OUTPUT_PATH")
    pictures = make_folder(output / "images", flag="--output", variable="TRAINML_OUTPUT_PATH")
    thresholds = thresholds_of(checkpoint)
    boxes, views = read_labels(args.labels) if args.labels else ({}, {})
    files, skipped = find_dicom_files(folder, result_folders(output, folder))
    print(f"{len(files)} files in {folder}; {runtime.device.type}, {runtime.dtype}; {thresholds}")

    results = predict_files(model, files, runtime, batch_size=args.batch_size, workers=args.workers,
                            rescale_factor=rescale_factor)
    annotations, notes, scored = {}, [], []

    def annotate():
        for patient_id, reading, mask in progress(results, total=len(files), description="predict"):
            if mask is None:
                skipped.append((files[patient_id], reading.problem))
                continue
            if reading.note:
                notes.append(f"{files[patient_id]} {reading.note}")
            image, original_size = reading.value
            found = find_boxes(mask, original_size, box_threshold=thresholds.box,
                               gate_threshold=thresholds.gate, size_weight=float(checkpoint.get("size_weight", 1)))
            annotations[patient_id] = prediction_string(*found)
            truth = boxes.get(patient_id)
            if truth is not None:
                scored.append((image_confidence(mask), len(truth) > 0, views[patient_id],
                               average_precision_image(*found, truth)))
            yield picture_path(pictures, patient_id), (image, mask, (*found, original_size), truth, str(thresholds))
    if args.save_images:
        save_overlays(annotate())
    else:
        deque(annotate(), maxlen=0)
    write_results(output, annotations, skipped)
    warn("images are read with a remark", notes)
    warn("files are skipped, see skipped.csv", [f"{path} {reason}" for path, reason in skipped])
    found = sum(bool(boxes) for boxes in annotations.values())
    print(f"{len(annotations)} images predicted, {found} with opacities; {len(skipped)} files skipped; see {output}")
    if args.labels:
        print_scores(scored, boxes.keys() - annotations.keys(), annotations.keys() - boxes.keys())
    return 0 if annotations and INTERNAL_ERROR not in dict(skipped).values() else 1


def thresholds_of(checkpoint):
    """Thresholds of a checkpoint; a file of an earlier version may lack some, or hold None for a failed search."""
    box, gate = checkpoint.get("best_threshold"), checkpoint.get("gate_threshold")
    source = checkpoint.get("threshold_source", "of the checkpoint")
    return Thresholds(BOX_THRESHOLD if box is None else float(box), float(gate or 0), source)


def print_scores(scored, missing, unlabelled):
    """Prints the scores of the labelled images; scored [(confidence, positive, view, average precision)]."""
    warn("ids of the labels have no image that can be read", sorted(missing))
    warn("images have no label and are not scored", sorted(unlabelled))
    if scored:
        confidences, positive, views, scores = map(np.array, zip(*scored))
        evaluation = Evaluation(float("nan"), confidences, positive, views, scores[:, None])
        print(*score_lines(summarize(evaluation, gate=0), len(scored)), sep="\n")


def write_results(output, annotations, skipped):
    """Writes annotations.json and submission.csv, and skipped.csv if anything was skipped.

    Without annotations the results of an earlier run stay, which is printed.
    """
    results = [output / "annotations.json", output / "submission.csv"]
    earlier = " and ".join(str(path) for path in results if path.exists())
    if earlier and not annotations:
        print(f"no image was predicted: {earlier} of an earlier run are kept")
    else:
        write_text(output / "annotations.json", json.dumps(annotations, indent=1, ensure_ascii=False))
        write_csv(output / "submission.csv", [("patientId", "PredictionString"), *annotations.items()])
    if skipped:
        write_csv(output / "skipped.csv", [("file", "reason"), *skipped])
    else:
        (output / "skipped.csv").unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
