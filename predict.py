"""Finds lung opacities in radiographs with a trained model.

    python predict.py -d data/stage_2_test_images --model output/final.pth.tar --output output/new
    python predict.py -d scan.dcm photo.jpg --model output/final.pth.tar --output output/new

Reads DICOM files and PNG, JPEG and TIFF images. Writes to --output: report.html, annotations.json,
submission.csv, images/<patientId>.png, with --dicom dicom/<patientId>.sr.dcm and .sc.dcm and, if
a file could not be read, skipped.csv. In the folder of a training run it would replace that run's
report.html.
"""

import argparse
import gc
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cli
import metrics
import parallel
from data_processing import Labels, read_labels
from model import Runtime, choose_runtime, load_checkpoint
from radiographs import INTERNAL_ERROR, Reading, find_radiographs, read_images, result_paths
from results import (
    CURVE_THRESHOLDS,
    IMAGE_SIZE,
    Overlay,
    Row,
    draw_scores,
    make_overlay,
    picture_path,
    picture_writer,
    row_of,
    write_report,
)


def predict_files(model: torch.nn.Module, files: dict[str, Path], runtime: Runtime, *,
                  batch_size: int, rescale_factor: int, workers: int, image_size: int | None = None,
                  ) -> Iterator[tuple[str, Reading, np.ndarray | None]]:
    """Yields (patient_id, Reading, mask) for each of files {patient_id: path}; the mask (S, S) of
    an unreadable file is None. With an `image_size`, images for display are read, too."""
    readings = read_images(files.values(), rescale_factor=rescale_factor, workers=workers,
                           image_size=image_size)
    for batch in cli.batched(zip(files, readings), batch_size):
        images = [reading.value.image[None] for _, reading in batch if reading.value]
        masks = iter(())
        if images:
            masks = iter(runtime.predict_masks(model, torch.from_numpy(np.stack(images))))
        for patient_id, reading in batch:
            yield patient_id, reading, next(masks) if reading.value else None


def thresholds_in_use(checkpoint: dict[str, Any], box: float | None,
                      gate: float | None) -> metrics.Thresholds:
    """The thresholds of a checkpoint, with `box` and `gate` in their place if given."""
    thresholds = metrics.Thresholds.of_checkpoint(checkpoint)
    given = {name: value for name, value in (("box", box), ("gate", gate)) if value is not None}
    if given:
        thresholds = thresholds._replace(**given, source=f"{' and '.join(given)} given by flag")
    return thresholds


def picture_folder(output: Path, files: dict[str, Path]) -> Path:
    """Where the pictures of `files` go; raises InputError if one would replace a file."""
    folder = output / "images"
    for patient_id, path in files.items():
        picture = picture_path(folder, patient_id)
        if os.path.exists(picture) and os.path.samefile(picture, path):
            raise cli.InputError(f"{path} would be replaced by its picture: give another folder "
                                 "with --output, or --no-save-images")
    return folder


class Results:
    """Boxes, scores and remarks of the files predicted so far."""

    def __init__(self, files: dict[str, Path], skipped: list, labels: Labels,
                 thresholds: metrics.Thresholds):
        self.files, self.skipped, self.labels, self.thresholds = files, skipped, labels, thresholds
        self.annotations = {}  # {patient_id: prediction string}
        self.notes = []  # remarks on files that could be read
        self.rows = []  # of the report, one for each image
        self.scores = []  # of each image with a label, at the box threshold and CURVE_THRESHOLDS

    def add(self, patient_id: str, reading: Reading, mask: np.ndarray | None) -> Overlay | None:
        """Adds the result for one file; returns its overlay, or None if it could not be read."""
        path = self.files[patient_id]
        truth = self.labels.boxes.get(patient_id)
        if reading.problem:
            self.skipped.append((path, reading.problem))
            return None
        if reading.note:
            self.notes.append(f"{path} {reading.note}")
        overlay = make_overlay(patient_id, reading.value, mask, self.thresholds, truth)
        self.annotations[patient_id] = metrics.prediction_string(overlay.boxes, overlay.confidences)
        self.rows.append(row_of(overlay))
        if truth is not None:
            self.scores.append(metrics.score_mask(
                mask, overlay.original_size, truth, [self.thresholds.box, *CURVE_THRESHOLDS],
                self.thresholds.size_weight))
        return overlay

    def gather(self, runtime: Runtime) -> None:
        """Merges the results of all processes, in the order of the files."""
        self.skipped = parallel.gather(self.skipped, runtime)
        self.notes = parallel.gather(self.notes, runtime)
        self.rows = parallel.gather(self.rows, runtime)
        self.scores = parallel.gather(self.scores, runtime)
        self.annotations = dict(parallel.gather(list(self.annotations.items()), runtime))

    def write(self, output: Path) -> None:
        """Writes annotations.json and submission.csv, and skipped.csv if anything was skipped.

        If no image was predicted, the results of an earlier run are kept, which is printed.
        """
        annotations, submission = output / "annotations.json", output / "submission.csv"
        earlier = [str(path) for path in (annotations, submission) if path.exists()]
        if self.annotations or not earlier:
            cli.write_text(annotations, json.dumps(self.annotations, indent=1, ensure_ascii=False))
            rows = [("patientId", "PredictionString"), *self.annotations.items()]
            cli.write_csv(submission, rows)
        else:
            print(f"no image was predicted: {' and '.join(earlier)} of an earlier run stay as "
                  "they are")
        if self.skipped:
            cli.write_csv(output / "skipped.csv", [("file", "reason"), *self.skipped])
        else:
            (output / "skipped.csv").unlink(missing_ok=True)

    def report(self, output: Path, pictures: str | None) -> None:
        """Writes report.html and prints what was found, left out and, with labels, scored."""
        cli.warn("images have remarks", self.notes)
        cli.warn("files are skipped and listed in skipped.csv",
                 [f"{path} {reason}" for path, reason in self.skipped])
        found = sum(bool(boxes) for boxes in self.annotations.values())
        summary = (f"images predicted: {len(self.annotations)}, with opacities: {found}; "
                   f"files skipped: {len(self.skipped)}")
        lines, plots = [], []
        if self.scores:
            evaluation = self._evaluation()
            draw_scores(output, evaluation, self.thresholds)
            plots.append("scores.png")
            figures = metrics.summarize(evaluation, self.thresholds.gate)
            lines = metrics.score_lines(figures, len(self.scores))
        rows = [*self.rows, *(Row(str(path), "skipped", reason) for path, reason in self.skipped)]
        path = write_report(output, rows, lines=[str(self.thresholds), summary, *lines],
                            pictures=pictures, plots=plots)
        print(f"{summary}; see {path}")
        self._compare_labels()
        for line in lines:
            print(line)

    def _evaluation(self):
        rows = [row for row in self.rows if row.true_boxes is not None]
        return metrics.Evaluation(
            loss=float("nan"), confidences=np.array([row.confidence for row in rows]),
            positive=np.array([row.true_boxes > 0 for row in rows]),
            views=np.array([self.labels.views[row.patient_id] for row in rows]),
            scores=np.array(self.scores))

    def _compare_labels(self):
        if self.labels.boxes:
            missing = self.labels.boxes.keys() - self.annotations.keys()
            cli.warn("ids of the labels have no image that can be read", sorted(missing))
            unlabelled = self.annotations.keys() - self.labels.boxes.keys()
            cli.warn("images have no label and are not scored", sorted(unlabelled))


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("files").add_argument
    data = cli.default_path("TRAINML_DATA_PATH")
    shown = data.replace("%", "%%")  # argparse fills in what follows a percent sign
    add("--data", "-d", nargs="+", default=[data],
        help=f"folders or files, DICOM, PNG, JPEG or TIFF (default: {shown})")
    add("--model", default=cli.default_path("TRAINML_MODEL_PATH", "final.pth.tar"),
        help="checkpoint of the network (default: %(default)s)")
    add("--output", default=cli.default_path("TRAINML_OUTPUT_PATH"),
        help="folder for the results (default: %(default)s)")
    add("--labels",
        help="train.csv or label table of these images: adds scores and true boxes")
    add("--save-images", default=True, action=cli.Switch,
        help="write annotated PNG images (default: on)")
    add("--dicom", default=False, action=cli.Switch,
        help="write a structured report and a secondary capture of each DICOM image (default: off)")
    add = parser.add_argument_group("what is marked and drawn").add_argument
    add("--box-threshold", "--bt", type=cli.bounded(0, 1),
        help="mask probability above which a pixel belongs to a box (default: the checkpoint's)")
    add("--gate-threshold", "--gt", type=cli.bounded(0, 1),
        help="highest probability below which an image has no boxes (default: the checkpoint's)")
    add("--image-size", type=cli.bounded(64, 8192, int), default=IMAGE_SIZE,
        help="longest side of the annotated images in pixels (default: %(default)s)")
    add("--heat", default=False, action=cli.Switch, help="tint images by the mask (default: off)")
    parser.add_runtime_options(batch_size=16, rescale_factor=None)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    runtime = parallel.join(choose_runtime(args.device, args.precision))
    sources = [cli.require(path, "data", flag="--data", variable="TRAINML_DATA_PATH")
               for path in args.data]
    path = cli.require(args.model, "file", flag="--model", variable="TRAINML_MODEL_PATH")

    # network and thresholds
    model, checkpoint = load_checkpoint(path, runtime.device)
    rescale_factor = args.rescale_factor or checkpoint.get("rescale_factor") or 4
    model.check_side(rescale_factor)
    thresholds = thresholds_in_use(checkpoint, args.box_threshold, args.gate_threshold)
    labels = Labels({}, {})
    if args.labels:
        labels = read_labels(cli.require(args.labels, "file", flag="--labels"))

    # files
    output = cli.require(args.output, "output", flag="--output", variable="TRAINML_OUTPUT_PATH")
    leave_out = [path for source in sources for path in result_paths(output, source)]
    files, skipped = parallel.once(partial(find_radiographs, sources, leave_out), runtime)
    source = args.data[0] if len(args.data) == 1 else f"the {len(args.data)} paths given"
    print(f"files in {source}: {len(files)}; {runtime.device.type}, {runtime.dtype}; {thresholds}")

    # predictions and pictures
    objects = None
    if args.dicom:
        from results.dicom_objects import DicomWriter  # imported on use: needs highdicom
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        objects = DicomWriter(output / "dicom", files, digest)
        gc.freeze()  # reports make garbage often; its collection need not search all modules
    results = Results(files, skipped if runtime.rank == 0 else [], labels, thresholds)
    batches = list(cli.batched(files, args.batch_size))  # the same in any number of processes
    share = {key: files[key] for batch in parallel.share(batches, runtime) for key in batch}
    predictions = predict_files(model, share, runtime, batch_size=args.batch_size,
                                rescale_factor=rescale_factor, workers=args.workers,
                                image_size=args.image_size if args.save_images or objects else None)
    folder = picture_folder(output, files) if args.save_images else None
    write_objects = objects.write if objects else None
    with picture_writer(folder, heat=args.heat, also=write_objects) as write_picture:
        for prediction in cli.progress(predictions, total=len(share), description="predict"):
            overlay = results.add(*prediction)
            if overlay:
                write_picture(overlay)
    results.gather(runtime)
    refused = parallel.gather(objects.refused, runtime) if objects else []
    if runtime.rank == 0:
        results.write(output)
        results.report(output, pictures="images" if args.save_images else None)
        cli.warn("images get no DICOM objects", sorted(refused))
    parallel.leave(runtime)
    internal_error = any(reason == INTERNAL_ERROR for _, reason in results.skipped)
    return 1 if internal_error or not results.annotations else 0


if __name__ == "__main__":
    cli.run(main)
