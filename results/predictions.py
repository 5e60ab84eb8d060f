"""What a prediction keeps in its folder: tables, a report and, until all files are done, a journal
from which the next run goes on."""

import gc
import hashlib
import json
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cli
import metrics
import parallel
from data_processing import Labels, check_boxes
from model import Runtime
from radiographs import Reading, patient_id_of

from .curves import draw_scores
from .drawing import Overlay, make_overlay
from .layout import picture_path, report_names
from .report import Row, named_figures, score_lines, write_report

JOURNAL = ".unfinished-{}.jsonl"  # of each process; a search for radiographs ignores hidden files


class Prediction(NamedTuple):
    """What became of one file, in plain values."""
    patient_id: str
    path: str
    row: Row  # of the report; the remark of a file that was skipped is the reason
    boxes: str = ""  # "confidence x y width height ..." in pixels of the original image
    scores: Sequence[Sequence[float]] = ()  # (T, G) of a labelled image, at Thresholds.and_curves()
    candidates: Sequence[tuple[float, bool]] = ()  # of a labelled image, for FROC
    is_fault: bool = False  # whether it was skipped because the network or this code is at fault
    size: Sequence[int] = ()  # (height, width) of an image in pixels
    stamp: Sequence[int] | None = None  # stamp_of the file

    def __str__(self):
        return f"{self.path} {self.row.remark}"

    @classmethod
    def skipped(cls, patient_id: str, path: Path, reason: str, **options: Any) -> "Prediction":
        """That of a file in which nothing could be looked for."""
        return cls(patient_id, str(path), Row(str(path), "skipped", reason), **options)


def stamp_of(path: str | Path) -> list[int] | None:
    """What changes with a file: its size in bytes and the time it was written; None if it is
    gone."""
    with suppress(OSError):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]


def dicom_writer(folder: Path, files: dict[str, Path], checkpoint: Path) -> "DicomWriter":  # noqa: F821
    """The DicomWriter of images predicted with a checkpoint; raises InputError if its package,
    highdicom, is missing."""
    from .dicom_objects import DicomWriter  # imported on use: few need highdicom
    gc.freeze()  # reports make garbage often; its collection need not search all modules
    return DicomWriter(folder, files, hashlib.sha256(checkpoint.read_bytes()).hexdigest())


class Predictions:
    """The Predictions of radiographs `found` by radiographs.find_radiographs, and the files in
    `folder` made of them.

    If the run ends early, what is done is written, and journals stay. A run with the same
    `settings` (plain values by name) takes over from them what holds for files as they are now.
    """

    def __init__(self, folder: Path, found: tuple[dict[str, Path], list[tuple[Path, str]]],
                 runtime: Runtime, *, settings: dict[str, Any], thresholds: metrics.Thresholds,
                 labels: Labels, trained_on: Collection[str] = ()):
        self.folder, self.runtime = folder, runtime
        self.thresholds, self.labels = thresholds, labels
        self.trained_on = trained_on  # ids of images that are not scored
        self.files, left_out = found
        self.left_out = [Prediction.skipped(patient_id_of(path), path, reason)
                         for path, reason in left_out]
        fields = [*Prediction._fields, *Row._fields]
        self.settings = json.loads(json.dumps(settings | {"fields": fields}))
        self.model = settings["model"][0]
        self.pictures = folder / "images" if settings["save_images"] else None
        self.annotations = folder / "annotations.json"
        # the tables of a complete run are replaced by those of a complete one alone
        self.keeps_tables = self.annotations.exists() and not self._journals()
        earlier = parallel.once(self._read_journals, runtime)
        parts = parallel.gather([earlier], runtime)  # of machines with folders of their own
        self.made = {key: made for part in parts for key, made in part.items()}
        if self.made:
            print(f"goes on with the run that ended early: {len(self.made)} of {len(self.files)} "
                  "files are done")

    def __enter__(self) -> "Predictions":
        self.journal = open(self.folder / JOURNAL.format(self.runtime.rank), "a", encoding="utf-8")
        # on a line of its own, should the last one be cut off
        self._log(self.settings, before="\n" if self.journal.tell() else "")
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.journal.close()
        if kind is None:
            for path in self._journals():
                path.unlink(missing_ok=True)
        elif self.runtime.rank == 0:
            if self.runtime.world > 1:
                self.made = self._read_journals() | self.made
            if self.keeps_tables:
                print(f"{self._summarize_part()}; {self.annotations} of an earlier run stays as "
                      "it is")
            elif self.made:
                self._write()

    @property
    def left(self) -> dict[str, Path]:
        """The files that are not done, by patient_id."""
        return {key: path for key, path in self.files.items() if key not in self.made}

    def add(self, patient_id: str, reading: Reading, mask: np.ndarray | None) -> Overlay | None:
        """Adds what was found in one of the files; returns its Overlay, or None if there is no
        mask or one that is not finite."""
        path, overlay = self.files[patient_id], None
        options = {"is_fault": reading.internal_error, "stamp": stamp_of(path)}
        if mask is None:
            made = Prediction.skipped(patient_id, path, reading.problem, **options)
        elif not np.isfinite(mask).all():
            reason = (f"has no result, since {self.model} gives values that are not finite: try "
                      "--precision fp32, or another checkpoint with --model")
            made = Prediction.skipped(patient_id, path, reason, **options | {"is_fault": True})
        else:
            overlay = make_overlay(patient_id, reading.value, mask, self.thresholds,
                                   self.labels.boxes.get(patient_id))._replace(model=self.model)
            boxes = metrics.prediction_string(overlay.boxes, overlay.confidences)
            if overlay.truth is not None:
                image = mask, overlay.original_size, overlay.truth
                options["scores"] = metrics.score_mask(
                    *image, self.thresholds.and_curves(), self.thresholds.size_weight)
                options["candidates"] = metrics.find_candidates(*image, self.thresholds)
            row = Row.of(overlay)._replace(remark=reading.note)
            made = Prediction(
                patient_id, str(path), row, boxes, size=overlay.original_size, **options)
        self.made[patient_id] = made
        self._log(made)
        return overlay

    def finish(self) -> int:
        """Writes the results of all processes; returns the exit status: 1 if no image was
        predicted, or the network or this code is at fault that one was not."""
        made = parallel.gather(list(self.made.values()), self.runtime)
        self.made = {one.patient_id: one for one in made}
        if self.runtime.rank == 0:
            self._write()
        parallel.gather([], self.runtime)  # journals stay until the results are written
        predicted, _ = self._split()
        return int(not predicted or any(one.is_fault for one in made))

    # Journals

    def _log(self, values, before=""):
        self.journal.write(f"{before}{json.dumps(values)}\n")
        self.journal.flush()

    def _journals(self):
        return sorted(self.folder.glob(JOURNAL.format("*")))

    def _read_journals(self):
        """The Predictions in journals that still hold; deletes journals of other settings."""
        made = {}
        for path in self._journals():
            lines = list(_json_lines(path))
            settings = [line for line in lines if isinstance(line, dict)] or [{}]
            changed = [key for key, value in self.settings.items()
                       if any(line.get(key) != value for line in settings)]
            if changed:
                print("does not go on with the run that ended early, whose settings were others: "
                      f"{', '.join(changed)}")
                path.unlink()
                continue
            for line in lines:
                if isinstance(line, list):
                    one = Prediction(*line)._replace(row=Row(*line[2]))
                    made |= {one.patient_id: one} if self._holds(one) else {}
        return made

    def _holds(self, made):
        """Whether a Prediction is of one of the files as it is now and has its picture, which is
        written after the DICOM objects."""
        path, is_skipped = self.files.get(made.patient_id), made.row.outcome == "skipped"
        is_drawn = is_skipped or (not self.settings["dicom"] if not self.pictures else
                                  os.path.exists(picture_path(self.pictures, made.patient_id)))
        is_same = str(path) == made.path and stamp_of(path) == made.stamp
        return is_same and is_drawn and not made.is_fault

    # What is written

    def _split(self):
        """Predicted and skipped ones, in the order of the files."""
        made = [*self.left_out, *(self.made[key] for key in self.files if key in self.made)]
        return ([one for one in made if one.row.outcome != "skipped"],
                [one for one in made if one.row.outcome == "skipped"])

    def _write(self):
        """Writes tables and the report, and prints what was found, left out and, with labels,
        scored."""
        predicted, skipped = self._split()
        self._write_tables(predicted, skipped)
        cli.warn("images have remarks", [one for one in predicted if one.row.remark])
        cli.warn("files are skipped and listed in skipped.csv", skipped)
        found = sum(one.row.outcome == "found" for one in predicted)
        summary = (f"images predicted: {len(predicted)}, with opacities: {found}; "
                   f"files skipped: {len(skipped)}")
        lines, page, plot, figures = [], *report_names(self.folder)
        if self.left:  # the run ends early
            summary = f"{self._summarize_part()}; {summary}"
        else:
            self._compare_labels(predicted)
            lines = self._score(predicted, self.folder / plot, self.folder / figures)
        write_report(self.folder / page, [one.row for one in (*predicted, *skipped)],
                     lines=[f"model: {self.model}", str(self.thresholds), summary, *lines],
                     pictures=self.pictures and self.pictures.name,
                     plots=[plot] if len(lines) > 1 else [])
        print(f"{summary}; see {self.folder / page}", *lines, sep="\n")

    def _summarize_part(self):
        return (f"partial: {len(self.made)} of {len(self.files)} files are done, and the same "
                "command goes on with the others")

    def _write_tables(self, predicted, skipped):
        """Writes annotations.json and submission.csv, which has a row for ids that could not be
        read, too, and skipped.csv if there are any.

        If no image was predicted, the results of an earlier run are kept, which is printed.
        """
        boxes = {one.patient_id: one.boxes for one in predicted}
        reasons = self.folder / "skipped.csv"
        if boxes or not self.annotations.exists():
            cli.write_text(self.annotations, json.dumps(boxes, indent=1, ensure_ascii=False))
            unread = {one.patient_id: "" for one in skipped
                      if one.patient_id in self.files or one.path.lower().endswith(".dcm")}
            cli.write_csv(self.folder / "submission.csv",
                          [("patientId", "PredictionString"), *(boxes | unread).items()])
        else:
            print(f"no image was predicted: {self.annotations} of an earlier run stays as it "
                  "is")
        if skipped:
            rows = [(one.path, one.row.remark) for one in skipped]
            cli.write_csv(reasons, [("file", "reason"), *rows])
        else:
            reasons.unlink(missing_ok=True)

    def _compare_labels(self, predicted):
        if self.labels.boxes:
            ids, labelled = {one.patient_id for one in predicted}, self.labels.boxes.keys()
            cli.warn("ids of the labels have no image that can be read", sorted(labelled - ids))
            cli.warn("images have no label and are not scored", sorted(ids - labelled))

    def _score(self, predicted, plot, table):
        """Draws and writes the scores of images that the model was not trained on; returns lines of
        text on them, none without labels."""
        labelled = [one for one in predicted if one.scores]
        try:
            check_boxes(self.labels.boxes, {one.patient_id: one.size for one in labelled})
        except cli.InputError as error:
            return [f"not scored: {error}"]
        scored = [one for one in labelled if one.patient_id not in self.trained_on]
        lines = []
        if len(scored) < len(labelled):
            lines = ["images that the model was trained on, so not scored: "
                     f"{len(labelled) - len(scored)}"]
        if not scored:
            return lines
        evaluation = metrics.Evaluation(
            loss=float("nan"), grid=self.thresholds.and_curves(),
            confidences=np.array([one.row.confidence for one in scored]),
            true_boxes=np.array([one.row.true_boxes for one in scored]),
            views=np.array([self.labels.views.get(one.patient_id, "") for one in scored]),
            scores=np.array([one.scores for one in scored]),
            candidates=np.array([pair for one in scored for pair in one.candidates]).reshape(-1, 2))
        draw_scores(plot, evaluation, self.thresholds)
        figures = evaluation.summarize(self.thresholds)
        cli.write_text(table, json.dumps(named_figures(figures) | self.thresholds.stored() | {
            "scored_images": len(scored)}, indent=1))
        return lines + score_lines(figures, len(scored))


def _json_lines(path):
    """The values in a file of JSON lines, without a line that was cut off."""
    for line in path.read_text("utf-8").splitlines():
        with suppress(ValueError):
            yield json.loads(line)
