"""What a training run keeps in its folder: checkpoints, from which it can continue, TensorBoard
logs, split.csv, metrics.json, and report.html with its pictures."""

import json
import platform
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import cli
from dataset import PneumoniaDataset
from engine import Training
from metrics import Evaluation, Thresholds
from model import Runtime, save_checkpoint
from radiographs import Radiograph, Reading, read_images

from .curves import draw_history, draw_scores
from .drawing import IMAGE_SIZE, Overlay, draw_overlay, make_overlay, picture_writer
from .report import Row, finite, named_figures, score_lines, write_report

COMPARED = ("batch_size", "epochs", "optimizer", "width", "rescale_factor", "learning_rate")
SHOWN, SHOWN_SIZE = 4, 512  # validation images in TensorBoard every epoch; their longest side
DRAWN_TOGETHER = 16  # images in a batch of overlays
LAPS = "prepare", "train", "score"  # phases of a run whose seconds are kept


class Records:
    """The files in `folder` of a `training` on the `parts` {name: indices} of a data set.

    Checkpoints and metrics.json hold the run's `settings` {flag: plain value} and its history.
    TensorBoard drops what it has of the steps that the run logs again.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], training: Training,
                 dataset: PneumoniaDataset, parts: dict[str, list[int]]):
        # imported on use: predict.py and endpoint.py start faster without them
        from filelock import FileLock, Timeout
        from torch.utils.tensorboard import SummaryWriter

        self.lock = FileLock(folder / ".training.lock", timeout=0)
        try:
            self.lock.acquire()
        except Timeout:
            raise cli.InputError(f"another training is writing to {folder}: wait for its end, or "
                                 "give another folder with --save") from None
        self.folder, self.settings, self.training = folder, settings, training
        self.dataset, self.parts = dataset, parts
        self.history = training.history
        if not self.history and any(folder.glob("*.pth.tar")):
            print(f"{folder} holds the checkpoints of an earlier run, which this one replaces")
        self._write_split()
        self.writer = None
        with self._unless_logs_fail():
            next_step = training.scheduler.last_epoch + 1
            self.writer = SummaryWriter(folder / "logs", purge_step=next_step)
            self.writer.add_custom_scalars_multilinechart(
                ["loss/train", "loss/validation"], "loss", "both")

    @contextmanager
    def _unless_logs_fail(self):
        """An error in the block ends TensorBoard's logs, with a warning, but not the run, unless
        the disk itself is at fault."""
        try:
            yield
        except Exception as error:  # of TensorBoard's many parts
            if isinstance(error, OSError) and error.errno in cli.DISK_ERRORS:
                raise
            print(f"warning: no more logs for TensorBoard: {type(error).__name__}: {error}")
            self.writer = None

    @staticmethod
    def check_disk(folder: Path, model: nn.Module) -> None:
        """Raises InputError if a run's checkpoints will not fit on the disk: they take 9 times the
        weights, with Adam's states and a file being written."""
        needed = 9 * sum(value.nbytes for value in model.state_dict().values())
        free = shutil.disk_usage(folder).free
        cli.refuse_if(free < needed, f"{folder} has {free / 1e6:.0f} MB left, but a run needs "
                      f"{needed / 1e6:.0f}: free some, or give another folder with --save")

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """If the run was stopped, first prints how to continue it, since torchrun may kill this
        process while it closes the logs."""
        last = self.folder / "last.pth.tar"
        was_stopped = kind is not None and issubclass(kind, (KeyboardInterrupt, RuntimeError))
        if was_stopped and self.history and last.exists():
            flags = {"checkpoint": last} | {
                name: self.settings[name] for name in ("data", "labels", "save")}
            print("continue with: python train.py",
                  *(f"--{name} {shlex.quote(str(path))}" for name, path in flags.items()))
        if self.writer:
            self.writer.close()
        self.lock.release()

    def _write_split(self):
        """Writes split.csv: which part each image belongs to, and a number for its patient. A run
        that continues takes along the files beside its checkpoint."""
        numbers = {name: number for number, name in enumerate(sorted(set(self.dataset.patients)))}
        rows = [(self.dataset.patient_ids[index], name, numbers[self.dataset.patients[index]])
                for name, part in self.parts.items() for index in part]
        if self.history:
            self._take_along(Path(self.settings["checkpoint"]))
        cli.write_csv(self.folder / "split.csv", [("patientId", "split", "patient"), *rows])

    def _take_along(self, checkpoint):
        """If a run continues in another folder than that of its `checkpoint`, copies this file and
        the best files beside it, and deletes best files of any other run here."""
        if checkpoint.parent.resolve() == self.folder.resolve():
            return
        best = (checkpoint.with_name(name) for name in ("loss.best.pth.tar", "prec.best.pth.tar"))
        for source in (checkpoint, *best):
            target = self.folder / ("last.pth.tar" if source == checkpoint else source.name)
            if source.exists():
                with cli.atomic_write(target) as file:
                    file.write(source.read_bytes())
            else:
                target.unlink(missing_ok=True)

    def log_steps(self, last_step: int, losses: Sequence[float], learning_rate: float) -> None:
        """Logs the losses of the steps up to `last_step`, and the learning rate there."""
        if self.writer:
            with self._unless_logs_fail():
                for step, loss in enumerate(losses, last_step - len(losses) + 1):
                    self.writer.add_scalar("steps/loss", loss, step)
                self.writer.add_scalar("steps/learning_rate", learning_rate, last_step)

    def log_epoch(self, evaluation: Evaluation, thresholds: Thresholds, speed: float) -> None:
        """Logs the last epoch of the history: its figures, the decision on the image as a
        precision-recall curve, and pictures of validation images with opacities."""
        if self.writer:
            with self._unless_logs_fail():
                self._log_epoch(evaluation, thresholds, speed)

    def _log_epoch(self, evaluation, thresholds, speed):
        scores, epoch = self.history[-1], len(self.history)
        tags = {"loss/train": scores["train_loss"], "loss/validation": scores["loss"],
                "precision/rsna": scores["rsna"], "precision/total": scores["total"],
                "auc/validation": scores["auc"], "speed/images_per_second": speed}
        for tag, value in tags.items():
            self.writer.add_scalar(tag, value, epoch)
        self.writer.add_pr_curve(
            "image has opacity", evaluation.positive, evaluation.confidences, epoch)
        positive = [index for index in self.parts["validation"] if len(self.dataset.boxes[index])]
        for overlay in self._overlays(positive[:SHOWN], thresholds, image_size=SHOWN_SIZE):
            picture = np.asarray(draw_overlay(overlay, legend=False).convert("RGB"))
            self.writer.add_image(
                f"validation/{overlay.patient_id}", picture, epoch, dataformats="HWC")

    def save_epoch(self, thresholds: Thresholds) -> None:
        """Writes last.pth.tar, from which a run continues exactly, curves.png, and a best file if
        the last epoch of the history is the best yet or there is no such file."""
        best = {"loss.best": min(self.history, key=lambda scores: scores["loss"]),
                "prec.best": max(reversed(self.history), key=lambda scores: scores["rsna"])}
        for name, scores in best.items():
            path = self.folder / f"{name}.pth.tar"
            if scores is self.history[-1] or not path.exists():
                self._save(name, thresholds)
        self._save("last", thresholds, **self.training.state_dict())
        draw_history(self.folder / "curves.png", self.history)

    def _save(self, name, thresholds, **state):
        """Writes a checkpoint: the weights, all that predict.py needs, how the weights were
        trained, and `state`."""
        save_checkpoint(
            self.folder / f"{name}.pth.tar", self.training.model, args=self.settings,
            history=self.history, rescale_factor=self.settings["rescale_factor"],
            **thresholds.stored(), **state)

    def finish(self, evaluation: Evaluation, thresholds: Thresholds, scored: Sequence[int],
               laps: Sequence[float]) -> dict[str, float]:
        """Writes final.pth.tar, report.html, metrics.json and a row of TensorBoard's HParams table
        (the flags usually compared, and the scores); prints and returns the figures of the images
        with indices `scored`. `laps` are the times at which the phases of the run began."""
        figures = evaluation.summarize(thresholds)
        lines = [str(thresholds), *score_lines(figures, len(scored))]
        self._save("final", thresholds, **named_figures(figures))
        draw_scores(self.folder / "scores.png", evaluation, thresholds)
        self._report(thresholds, scored, lines)
        scores = {f"final/{name}": figures[name] for name in ("rsna", "total", "auc")}
        compared = {key: str(self.settings[key]) for key in COMPARED}
        if self.writer:
            with self._unless_logs_fail():
                self.writer.add_hparams(compared, scores, run_name=".")
        sizes = {f"{name}_images": len(part) for name, part in self.parts.items()}
        sizes |= {f"{name}_patients": len({self.dataset.patients[index] for index in part})
                  for name, part in self.parts.items()}
        ends = pairwise([*laps, time.monotonic()])
        cli.write_text(self.folder / "metrics.json", json.dumps({
            **named_figures(figures), **thresholds.stored(), **sizes,
            "skipped_images": len(self.dataset.skipped), "scored_images": len(scored),
            "history": [finite(scores) for scores in self.history], "arguments": self.settings,
            "versions": versions(),
            "seconds": {name: end - start for name, (start, end) in zip(LAPS, ends)}}, indent=1))
        print(f"see {self.folder / 'report.html'}", *lines, sep="\n")
        return figures

    def _report(self, thresholds, scored, lines):
        """Writes report.html with a row for each scored image and, unless --no-save-images was
        given, their pictures in validation/."""
        has_pictures, rows = self.settings["save_images"], []
        overlays = self._overlays(scored, thresholds, workers=self.settings["workers"],
                                  image_size=IMAGE_SIZE if has_pictures else None)
        folder = self.folder / "validation" if has_pictures else None
        with picture_writer(folder) as write_picture:
            for overlay in cli.progress(overlays, total=len(scored), description="draw"):
                rows.append(Row.of(overlay))
                write_picture(overlay)
        write_report(self.folder / "report.html", rows, lines=lines,
                     pictures=folder and folder.name, plots=["curves.png", "scores.png"])

    def _overlays(self, indices, thresholds, **options):
        return overlays(self.training.model, self.dataset, indices, thresholds,
                        runtime=self.training.runtime, **options)


def overlays(model: nn.Module, dataset: PneumoniaDataset, indices: Sequence[int],
             thresholds: Thresholds, *, runtime: Runtime, image_size: int | None = IMAGE_SIZE,
             workers: int = 1) -> Iterator[Overlay]:
    """Yields an Overlay, with the truth, for images of a data set. Their files are read again for
    display at `image_size` pixels; if that is None, the overlay shows the network's image."""
    model.eval()
    reader = nullcontext(repeat(Reading()))
    if image_size:
        reader = read_images([dataset.paths[index] for index in indices], side=dataset.side,
                             workers=workers, display_size=image_size)
    with reader as readings:
        for batch in cli.batched(zip(indices, readings), DRAWN_TOGETHER):
            images, _ = dataset[[index for index, _ in batch]]
            masks = runtime.predict_masks(model, images)
            for (index, reading), image, mask in zip(batch, images[:, 0].numpy(), masks):
                # no reading without an image size, or if the file is gone by now
                radiograph = reading.value or Radiograph(image, dataset.original_sizes[index])
                yield make_overlay(dataset.patient_ids[index], radiograph, mask, thresholds,
                                   dataset.boxes[index])


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__}
