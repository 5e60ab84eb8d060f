"""Plots of a run: its losses and scores over the epochs, and the scores of its images.

Nothing else here needs matplotlib, which takes half a second to import, so it is imported on use.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from cli import atomic_write
from metrics import CURVE_THRESHOLDS, Evaluation, Thresholds, mean_average_precision

CURVES = {  # of curves.png: {title: {name in the history: label}}
    "loss": {"train_loss": "training", "loss": "validation"},
    "average precision": {"rsna": "RSNA mAP", "total": "total AP"},
    "image ROC AUC": {"auc": "validation"}, "learning rate": {"learning_rate": "after the epoch"}}
GATES = [step / 50 for step in range(51)]


def draw_history(folder: Path, history: Sequence[dict[str, float]]) -> None:
    """Writes folder/curves.png: losses, scores and learning rate over the epochs."""
    from matplotlib.figure import Figure

    figure, epochs = Figure((14, 3.4), layout="constrained"), range(1, len(history) + 1)
    for axes, (title, names) in zip(figure.subplots(1, len(CURVES)), CURVES.items()):
        for name, label in names.items():
            values = [scores.get(name, math.nan) for scores in history]
            axes.plot(epochs, values, marker=".", label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.legend()
    _save(figure, folder / "curves.png")


def draw_scores(folder: Path, evaluation: Evaluation, thresholds: Thresholds) -> None:
    """Writes folder/scores.png: ROC and precision-recall curves, and the score over each threshold,
    with those in use. The evaluation's box thresholds are that in use and CURVE_THRESHOLDS."""
    from matplotlib.figure import Figure
    from sklearn.metrics import precision_recall_curve, roc_curve

    figure = Figure((14, 4), layout="constrained")
    roc, precision, score = figure.subplots(1, 3)
    positive, confidences, gate = evaluation.positive, evaluation.confidences, thresholds.gate
    if positive.any() and not positive.all():
        roc.plot(*roc_curve(positive, confidences)[:2])
        above = confidences >= gate
        roc.plot(above[~positive].mean(), above[positive].mean(), "o", label="gate in use")
        roc.legend()
        precision.plot(*precision_recall_curve(positive, confidences)[1::-1])
    roc.set(title="image decision: ROC", xlabel="false positive rate", ylabel="true positive rate")
    precision.set(title="image decision: precision and recall", xlabel="recall", ylabel="precision")
    scores = [evaluation.scores_at(step, gate) for step in CURVE_THRESHOLDS]
    score.plot(CURVE_THRESHOLDS, [*map(mean_average_precision, scores)], label="box threshold")
    scores = [evaluation.scores_at(thresholds.box, step) for step in GATES]
    score.plot(GATES, [*map(mean_average_precision, scores)], label="gate threshold")
    score.axvline(thresholds.box, color="C0", linestyle="--", label="box threshold in use")
    score.axvline(gate, color="C1", linestyle="--", label="gate threshold in use")
    score.set(title="RSNA mean average precision", xlabel="threshold")
    score.legend()
    _save(figure, folder / "scores.png")


def _save(figure, path):
    content = io.BytesIO()
    figure.savefig(content, format="png")
    with atomic_write(path) as file:
        file.write(content.getbuffer())
