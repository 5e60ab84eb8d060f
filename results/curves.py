"""Plots of a run: its losses and scores over the epochs, and the scores of its images.

Nothing else here needs matplotlib, which takes half a second to import, so it is imported on use.
"""

import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cli import DISK_ERRORS, atomic_write
from metrics import (
    CURVE_THRESHOLDS,
    FALSE_BOXES,
    Evaluation,
    Thresholds,
    froc,
    mean_average_precision,
)

CURVES = {  # of curves.png: {title: {name in the history: label}}
    "loss": {"train_loss": "training", "loss": "validation"},
    "average precision": {"rsna": "RSNA mAP", "total": "total AP"},
    "image ROC AUC": {"auc": "validation"}, "learning rate": {"learning_rate": "after the epoch"}}
ALLOWED = [2 ** (step / 8) for step in range(-32, 9)]  # false boxes an image, 1/16 to 2


def draw_history(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Plots losses, scores and learning rate over the epochs."""
    _plot(path, 3.4, _draw_epochs, history)


def draw_scores(path: Path, evaluation: Evaluation, thresholds: Thresholds) -> None:
    """Plots ROC, precision-recall and FROC curves, and the score over each threshold, with those in
    use. The evaluation's grid is thresholds.and_curves()."""
    _plot(path, 4, _draw_scores, evaluation, thresholds)


def _plot(path, height, draw, *values):
    """Writes as PNG what draw(figure, *values) draws on an empty figure, 14 inches wide.

    The figure has Matplotlib's default style, whatever a matplotlibrc says. A plot never ends a
    run: any error but that of a full disk is a warning.
    """
    if "matplotlib" not in sys.modules:
        os.environ["MPLBACKEND"] = "agg"  # a notebook may have left one that is not installed
    try:
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            figure, content = Figure((14, height), layout="constrained"), io.BytesIO()
            draw(figure, *values)
            figure.savefig(content, format="png")
        with atomic_write(path, durable=False) as file:
            file.write(content.getbuffer())
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        path.unlink(missing_ok=True)  # that of an earlier run
        print(f"warning: no {path.name}: {' '.join(str(error).split())}")


def _draw_epochs(figure, history):
    epochs = range(1, len(history) + 1)
    for axes, (title, names) in zip(figure.subplots(1, len(CURVES)), CURVES.items()):
        for name, label in names.items():
            values = [scores.get(name, math.nan) for scores in history]
            axes.plot(epochs, values, marker=".", label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.legend()


def _draw_scores(figure, evaluation, thresholds):
    from sklearn.metrics import precision_recall_curve, roc_curve

    roc, precision, score, boxes = figure.subplots(1, 4)
    positive, confidences, gate = evaluation.positive, evaluation.confidences, thresholds.gate
    if positive.any() and not positive.all():
        roc.plot(*roc_curve(positive, confidences)[:2])
        above = confidences >= gate
        roc.plot(above[~positive].mean(), above[positive].mean(), "o", label="gate in use")
        roc.legend()
        precision.plot(*precision_recall_curve(positive, confidences)[1::-1])
    roc.set(title="images: ROC", xlabel="false positive rate", ylabel="true positive rate")
    precision.set(title="images: precision and recall", xlabel="recall", ylabel="precision")
    scores = [evaluation.scores_at(step, gate) for step in CURVE_THRESHOLDS]
    score.plot(CURVE_THRESHOLDS, [*map(mean_average_precision, scores)], label="box threshold")
    scores = [evaluation.scores_at(thresholds.box, step) for step in CURVE_THRESHOLDS]
    score.plot(CURVE_THRESHOLDS, [*map(mean_average_precision, scores)], label="gate threshold")
    score.axvline(thresholds.box, color="C0", linestyle="--", label="box threshold in use")
    score.axvline(gate, color="C1", linestyle="--", label="gate threshold in use")
    score.set(title="RSNA mean average precision", xlabel="threshold")
    score.legend()
    images, true_boxes = len(positive), evaluation.true_boxes.sum()
    boxes.plot(ALLOWED, froc(evaluation.candidates, true_boxes, images, ALLOWED))
    boxes.plot(FALSE_BOXES, froc(evaluation.candidates, true_boxes, images, FALSE_BOXES), "o")
    boxes.set(title="boxes: FROC", xlabel="false boxes an image", ylabel="true boxes found",
              xscale="log", xticks=FALSE_BOXES, xticklabels=["1/8", "1/4", "1/2", "1", "2"],
              ylim=(0, 1))
    boxes.minorticks_off()
