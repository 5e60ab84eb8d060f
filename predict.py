"""Finds lung opacities in radiographs with a trained model.

    python predict.py -d data/stage_2_test_images --model output/final.pth.tar --output output/new
    python predict.py -d scan.dcm photo.jpg --model output/final.pth.tar --output output/new

Reads DICOM files and PNG, JPEG and TIFF images. Writes to --output: report.html, annotations.json,
submission.csv, images/<patientId>.png and, where a file could not be read, skipped.csv. In the
folder of a training run it would replace that run's report.html.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import cli
import metrics
import parallel
from data_processing import (
    Labels,
    files_of_table,
    read_labels,
    read_split,
    refuse_mixture,
)
from model import Runtime, load_checkpoint
from radiographs import Reading, find_radiographs, read_images
from results import (
    IMAGE_SIZE,
    Overlay,
    Row,
    draw_scores,
    make_overlay,
    picture_writer,
    refuse_to_replace,
    result_paths,
    score_lines,
    write_report,
)


class Prediction(NamedTuple):
    """What became of one file."""
    path: Path
    row: Row  # of the report
    boxes: str = ""  # "confidence x y width height ..." in pixels of the original image
    scores: Sequence[float] = ()  # of a labelled image, at Thresholds.and_curve()
    internal_error: bool = False

    def __str__(self):
        return f"{self.path} {self.row.remark}"

    @classmethod
    def skipped(cls, path: Path, reason: str, internal_error: bool = False) -> "Prediction":
        """That of a file that could not be read."""
        return cls(path, Row(str(path), "skipped", reason), internal_error=internal_error)

    @classmethod
    def of(cls, path: Path, overlay: Overlay, remark: str) -> "Prediction":
        """That of an image with the boxes of an Overlay, and a remark on how it was read."""
        boxes = metrics.prediction_string(overlay.boxes, overlay.confidences)
        scores = () if overlay.truth is None else metrics.score_mask(
            overlay.mask, overlay.original_size, overlay.truth, overlay.thresholds.and_curve(),
            overlay.thresholds.size_weight)
        return cls(path, Row.of(overlay)._replace(remark=remark), boxes, scores)


def find_files(
        data: Sequence[str], output: Path,
) -> tuple[dict[str, Path], list[tuple[Path, str]]]:
    """What find_radiographs finds in folders and files, without the results of a run in `output`.

    Raises InputError if there are no files at all, and as refuse_mixture does.
    """
    sources = [Path(path) for path in data]
    leave_out = [path for source in sources for path in result_paths(output, source)]
    files, skipped = find_radiographs(sources, leave_out)
    cli.refuse_if(not files and not skipped,
                  f"no files in {', '.join(data)}: give another with --data")
    for source in sources:
        refuse_mixture(source, [path for path in files.values() if source in path.parents])
    return files, skipped


def predict_files(model: torch.nn.Module, files: Mapping[str, Path], runtime: Runtime, *,
                  batch_size: int, rescale_factor: int, workers: int, image_size: int | None = None,
                  ) -> Iterator[tuple[str, Reading, np.ndarray | None]]:
    """Yields (patient_id, Reading, mask) for each of files {patient_id: path}, in their order; the
    mask (S, S) of an unreadable file is None. With an `image_size`, images for display are read,
    too."""
    with read_images(files.values(), side=cli.IMAGE_SIDE // rescale_factor, workers=workers,
                     display_size=image_size) as readings:
        for batch in cli.batched(zip(files, readings), batch_size):
            images = {key: reading.value.image[None] for key, reading in batch if reading.value}
            masks = {}
            if images:
                stacked = torch.from_numpy(np.stack(list(images.values())))
                masks = dict(zip(images, runtime.predict_masks(model, stacked)))
            for patient_id, reading in batch:
                yield patient_id, reading, masks.get(patient_id)


def thresholds_in_use(checkpoint: dict[str, Any], box: float | None,
                      gate: float | None) -> metrics.Thresholds:
    """The thresholds of a checkpoint, with `box` and `gate` in their place if given."""
    thresholds = metrics.Thresholds.of_checkpoint(checkpoint)
    given = {name: value for name, value in (("box", box), ("gate", gate)) if value is not None}
    if given:
        thresholds = thresholds._replace(**given, source=f"{' and '.join(given)} given by flag")
    return thresholds


def find_trained_on(model: Path) -> set[str]:
    """Ids of the images that a checkpoint was trained on, if its run's split.csv lies beside it."""
    path = model.with_name("split.csv")
    parts = read_split(path) if path.exists() else {}
    return {patient_id for patient_id, part in parts.items() if part == "training"}


class Results:
    """The predictions of a run in `output`, and what is written of them."""

    def __init__(self, output: Path, labels: Labels, thresholds: metrics.Thresholds,
                 trained_on: Set[str] = frozenset()):
        self.output, self.labels, self.thresholds = output, labels, thresholds
        self.trained_on = trained_on  # ids of images that are not scored
        self.predictions = []

    @property
    def predicted(self) -> list[Prediction]:
        """Those of images."""
        return [made for made in self.predictions if made.row.outcome != "skipped"]

    @property
    def skipped(self) -> list[Prediction]:
        """Those of files that could not be read."""
        return [made for made in self.predictions if made.row.outcome == "skipped"]

    @property
    def status(self) -> int:
        """Exit status: 1 if no image was predicted, or a fault of this code cost one."""
        return int(not self.predicted or any(made.internal_error for made in self.predictions))

    def add(self, path: Path, patient_id: str, reading: Reading,
            mask: np.ndarray | None) -> Overlay | None:
        """Adds the prediction of a file; returns its Overlay, or None if it could not be read."""
        if mask is None:
            made = Prediction.skipped(path, reading.problem, reading.internal_error)
            self.predictions.append(made)
            return None
        overlay = make_overlay(patient_id, reading.value, mask, self.thresholds,
                               self.labels.boxes.get(patient_id))
        self.predictions.append(Prediction.of(path, overlay, reading.note))
        return overlay

    def write_tables(self) -> None:
        """Writes annotations.json and submission.csv, and skipped.csv if anything was skipped.

        If no image was predicted, the results of an earlier run are kept, which is printed.
        """
        boxes = {made.row.patient_id: made.boxes for made in self.predicted}
        annotations, skipped = self.output / "annotations.json", self.output / "skipped.csv"
        if boxes or not annotations.exists():
            cli.write_text(annotations, json.dumps(boxes, indent=1, ensure_ascii=False))
            cli.write_csv(self.output / "submission.csv",
                          [("patientId", "PredictionString"), *boxes.items()])
        else:
            print(f"no image was predicted: {annotations} of an earlier run stays as it is")
        if self.skipped:
            reasons = [(made.path, made.row.remark) for made in self.skipped]
            cli.write_csv(skipped, [("file", "reason"), *reasons])
        else:
            skipped.unlink(missing_ok=True)

    def report(self, pictures: str | None) -> None:
        """Writes report.html and prints what was found, left out and, with labels, scored.
        `pictures` names the folder of the pictures in `output`."""
        cli.warn("images have remarks", [made for made in self.predicted if made.row.remark])
        cli.warn("files are skipped and listed in skipped.csv", self.skipped)
        found = sum(made.row.outcome == "found" for made in self.predicted)
        summary = (f"images predicted: {len(self.predicted)}, with opacities: {found}; "
                   f"files skipped: {len(self.skipped)}")
        lines, plots = self._score()
        rows = [made.row for made in (*self.predicted, *self.skipped)]
        path = write_report(self.output, rows, lines=[str(self.thresholds), summary, *lines],
                            pictures=pictures, plots=plots)
        print(f"{summary}; see {path}")
        if self.labels.boxes:
            ids, labelled = {made.row.patient_id for made in self.predicted}, set(self.labels.boxes)
            cli.warn("ids of the labels have no image that can be read", sorted(labelled - ids))
            cli.warn("images have no label and are not scored", sorted(ids - labelled))
        for line in lines:
            print(line)

    def _score(self):
        """Lines of text and names of plots on the scores; none without labels."""
        labelled = [made for made in self.predicted if made.scores]
        scored = [made for made in labelled if made.row.patient_id not in self.trained_on]
        lines = []
        if len(scored) < len(labelled):
            lines = [f"images that the model was trained on, so not scored: "
                     f"{len(labelled) - len(scored)}"]
        if not scored:
            return lines, []
        evaluation = metrics.Evaluation(
            loss=float("nan"), box_thresholds=self.thresholds.and_curve(),
            confidences=np.array([made.row.confidence for made in scored]),
            positive=np.array([made.row.true_boxes > 0 for made in scored]),
            views=np.array([self.labels.views.get(made.row.patient_id, "") for made in scored]),
            scores=np.array([made.scores for made in scored]))
        draw_scores(self.output, evaluation, self.thresholds)
        figures = evaluation.summarize(self.thresholds)
        return lines + score_lines(figures, len(scored)), ["scores.png"]


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_path("--data", "-d", kind="data", variable="TRAINML_DATA_PATH", nargs="+",
                    help="folders or files, DICOM, PNG, JPEG or TIFF")
    parser.add_path("--model", kind="file", variable="TRAINML_MODEL_PATH", part="final.pth.tar",
                    help="checkpoint of the network")
    parser.add_path("--output", kind="output", variable="TRAINML_OUTPUT_PATH",
                    help="folder for the results")
    parser.add_path("--labels", kind="file",
                    help="train.csv or label table of these images: adds scores and true boxes")
    parser.add_to_files("--save-images", action=argparse.BooleanOptionalAction,
                        help="write annotated PNG images (default: on)")
    add = parser.add_argument_group("what is marked and drawn").add_argument
    add("--box-threshold", "--bt", type=cli.bounded(0, 1),
        help="mask probability above which a pixel belongs to a box (default: the checkpoint's)")
    add("--gate-threshold", "--gt", type=cli.bounded(0, 1),
        help="highest probability below which an image has no boxes (default: the checkpoint's)")
    add("--image-size", type=cli.bounded(64, 8192, int), default=IMAGE_SIZE,
        help="longest side of the annotated images in pixels (default: %(default)s)")
    parser.add_runtime_options(batch_size=16, rescale_factor=None)
    parser.set_defaults(save_images=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    parser.check_paths(args)
    runtime = parallel.join(args.device, args.precision)

    # network, thresholds and truth
    model, checkpoint = load_checkpoint(Path(args.model), runtime.device)
    rescale_factor = args.rescale_factor or checkpoint.get("rescale_factor") or 4
    model.check_side(rescale_factor)
    thresholds = thresholds_in_use(checkpoint, args.box_threshold, args.gate_threshold)
    labels = read_labels(args.labels) if args.labels else Labels({})

    # files, and this process's share of them
    output = Path(args.output)
    files, skipped = parallel.once(partial(find_files, args.data, output), runtime)
    if args.labels:
        files = files_of_table(files, Path(args.labels), labels.boxes.keys())
    source = args.data[0] if len(args.data) == 1 else f"the {len(args.data)} paths given"
    print(f"files in {source}: {len(files)}; {runtime.device.type}, {runtime.dtype}; {thresholds}")
    batches = list(cli.batched(files, args.batch_size))  # the same in any number of processes
    share = {key: files[key] for batch in parallel.share(batches, runtime) for key in batch}

    # masks, boxes and pictures
    folder = output / "images" if args.save_images else None
    if folder:
        refuse_to_replace(files, folder)
    masks = predict_files(model, share, runtime, batch_size=args.batch_size,
                          rescale_factor=rescale_factor, workers=args.workers,
                          image_size=args.image_size if folder else None)
    results = Results(output, labels, thresholds, find_trained_on(Path(args.model)))
    with picture_writer(folder) as write_picture:
        for patient_id, *found in cli.progress(masks, total=len(share), description="predict"):
            overlay = results.add(files[patient_id], patient_id, *found)
            if overlay:
                write_picture(overlay)

    # the results of all processes
    made = parallel.gather(results.predictions, runtime)
    results.predictions = [*(Prediction.skipped(*left_out) for left_out in skipped), *made]
    if runtime.rank == 0:
        results.write_tables()
        results.report(pictures="images" if folder else None)
    return results.status


if __name__ == "__main__":
    parallel.run(main)
