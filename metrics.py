"""Boxes and scores in NumPy: mask to boxes, the challenge's metric, threshold search, submission strings.

Boxes are `[x, y, width, height]` with the upper-left corner at (x, y); no function here cares in which pixels.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

# https://www.kaggle.com/c/rsna-pneumonia-detection-challenge/overview/evaluation
IOU_THRESHOLDS = (0.40, 0.45, 0.50, 0.55, 0.60, 0.65, 0.70, 0.75)
MIN_AREA = 5000 / 1024**2  # share of the image; 99 % of the challenge's boxes cover 9,624 / 1024**2
BOX_THRESHOLDS = np.arange(1, 60) / 60  # mask probabilities that the search tries
GATE_THRESHOLDS = np.arange(20) / 20  # image probabilities that the search tries
BOOTSTRAPS = 1000  # samples of the images that a standard error is computed from
PROOF = 2  # standard errors by which other thresholds must beat the defaults


class Thresholds(NamedTuple):
    """Probabilities above which a pixel belongs to a box (`box`) and below which an image has no boxes (`gate`)."""
    box: float
    gate: float
    source: str = "defaults"

    def __str__(self):
        return f"box threshold {self.box:.2f}, gate threshold {self.gate:.2f} ({self.source})"


class Evaluation(NamedTuple):
    """One pass of a network over N labelled images, at T box thresholds."""
    loss: float
    confidences: np.ndarray  # (N,) image_confidence of each mask
    positive: np.ndarray  # (N,) whether the image has a true box
    views: np.ndarray  # (N,) "AP", "PA" or ""
    scores: np.ndarray  # (N, T) average precision without a gate; NaN for a true negative


def parse_boxes(mask, threshold, min_area=0):
    """Boxes around the connected regions (8 neighbours) of a probability mask (H, W) above `threshold`.

    Regions of fewer than `min_area` pixels of the mask are left out. Returns boxes (n, 4) in pixels of the mask and
    confidences (n,), each the mean probability of its region, in descending order of confidence.
    """
    above = mask > threshold
    rows, columns = above.any(axis=1).nonzero()[0], above.any(axis=0).nonzero()[0]
    if not rows.size:
        return np.zeros((0, 4)), np.zeros(0)
    top, left = rows[0], columns[0]
    part = slice(top, rows[-1] + 1), slice(left, columns[-1] + 1)
    labels, count = ndimage.label(above[part], structure=np.ones((3, 3)))
    inside = labels[above[part]]
    areas = np.bincount(inside, minlength=count + 1)[1:]
    confidences = np.bincount(inside, weights=mask[part][above[part]], minlength=count + 1)[1:] / areas
    boxes = np.array([[left + x.start, top + y.start, x.stop - x.start, y.stop - y.start]
                      for y, x in ndimage.find_objects(labels)], dtype=float)
    keep = np.flatnonzero(areas >= min_area)
    keep = keep[np.argsort(-confidences[keep], kind="stable")]
    return boxes[keep], confidences[keep]


def box_iou(boxes, others):
    """Intersection over union of boxes (n, 4) with others (m, 4) by coordinates: (n, m) in 0..1."""
    first, second = np.asarray(boxes, float).reshape(-1, 1, 4), np.asarray(others, float).reshape(1, -1, 4)
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., :2] + first[..., 2:], second[..., :2] + second[..., 2:])
    intersection = np.clip(high - low, 0, None).prod(axis=-1)
    union = first[..., 2:].prod(axis=-1) + second[..., 2:].prod(axis=-1) - intersection
    return intersection / np.maximum(union, np.finfo(float).tiny)


def average_precision_image(predicted_boxes, confidences, target_boxes):
    """The challenge's score of one image: the mean over IOU_THRESHOLDS of TP / (TP + FP + FN).

    In descending confidence each prediction takes the target left over that it overlaps most, if their IoU is above the
    threshold. Both kinds of boxes in the same pixels. NaN if there are neither predictions nor targets, 0 if there is
    only one of the two.
    """
    predictions, targets = len(predicted_boxes), len(target_boxes)
    if not predictions or not targets:
        return 0.0 if predictions or targets else float("nan")
    iou = box_iou(predicted_boxes, target_boxes)[np.argsort(-np.asarray(confidences, float), kind="stable")]
    hits = [_count_hits(iou, threshold) for threshold in IOU_THRESHOLDS]
    return float(np.mean([hit / (predictions + targets - hit) for hit in hits]))


def _count_hits(iou, threshold):
    """One-to-one matches in rows' order; iou (predictions, targets)."""
    iou, hits = iou.copy(), 0
    for row in iou:
        best = row.argmax()
        if row[best] > threshold:
            iou[:, best] = 0
            hits += 1
    return hits


def mean_average_precision(scores):
    """The challenge's score of a data set: mean over images (N, ...) without the NaN of true negatives; 0 if all are."""
    return np.nansum(scores, axis=0) / np.maximum((~np.isnan(scores)).sum(axis=0), 1)


def total_average_precision(scores):
    """The tutorial's number: sum over images (N,) divided by all of them, a true negative counting 0."""
    return float(np.nansum(scores) / max(len(scores), 1))


def roc_auc(scores, labels):
    """Area under the ROC curve of image scores (N,) for boolean labels (N,), from the rank sum (Mann-Whitney U).

    NaN if one of the two classes is absent.
    """
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    positives, negatives = scores[labels], np.sort(scores[~labels])
    if not positives.size or not negatives.size:
        return float("nan")
    below = np.searchsorted(negatives, positives, "left") + np.searchsorted(negatives, positives, "right")
    return float(below.mean() / 2 / negatives.size)


def summarize(evaluation, gate, column=0):
    """Figures of an Evaluation at one of its box thresholds and a gate, under the names of metrics.json."""
    scores = gate_scores(evaluation, gate)[:, column]
    figures = {"loss": evaluation.loss, "rsna": float(mean_average_precision(scores)),
               "rsna_standard_error": float(bootstrap(scores).std()), "total": total_average_precision(scores),
               "auc": roc_auc(evaluation.confidences, evaluation.positive)}
    for view in ("AP", "PA"):
        part = evaluation.views == view
        figures[f"auc_{view}"] = roc_auc(evaluation.confidences[part], evaluation.positive[part])
    return figures


def score_lines(figures, images):
    """What a script prints of the figures of summarize; the last two lines are the tutorial's."""
    by_view = [f"{view} {figures[f'auc_{view}']:.4f}" for view in ("AP", "PA") if figures[f"auc_{view}"] >= 0]
    return [f"Image ROC AUC: {figures['auc']:.4f}" + (f" (within views: {', '.join(by_view)})" if by_view else ""),
            f"Standard error of the RSNA mAP: {figures['rsna_standard_error']:.4f} (bootstrap over {images} images)",
            f"RSNA Mean Average Precision: {figures['rsna']:.4f}", f"Total Average Precision: {figures['total']:.4f}"]


def gate_scores(evaluation, gate):
    """Scores (N, T) of an Evaluation once images below the gate have no boxes: such an image is worth 0 if it has a true
    box, NaN if it has none."""
    below = np.where(evaluation.positive, 0.0, np.nan)[:, None]
    return np.where(evaluation.confidences[:, None] >= gate, evaluation.scores, below)


def search_thresholds(evaluation, gate_thresholds, default):
    """Finds the pair of thresholds with the best mean average precision on the images of an Evaluation.

    The best of many noisy scores is mostly luck, so the `default` pair stays unless the gain over it exceeds PROOF
    standard errors of that gain (docs/experiments.md). Pairs are indices of (box threshold, gate threshold). Returns the
    pair and the table (T, G) of mean average precision at every pair; its maximum is taken after smoothing over 3 x 3
    pairs, so that a noisy peak is not chosen.
    """
    gated = [gate_scores(evaluation, gate) for gate in gate_thresholds]
    table = np.stack([mean_average_precision(scores) for scores in gated], axis=1)
    smooth = ndimage.uniform_filter(table, 3, mode="nearest")
    best = tuple(int(index) for index in np.unravel_index(smooth.argmax(), table.shape))
    gains = np.subtract(*(bootstrap(gated[gate][:, column]) for column, gate in (best, default)))
    return best if table[best] - table[default] > PROOF * gains.std() else default, table


def bootstrap(scores):
    """mean_average_precision of BOOTSTRAPS bootstrap samples of the images with scores (N,); the same draws for all."""
    images = len(scores)
    drawn = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), BOOTSTRAPS)
    return drawn @ np.nan_to_num(scores) / np.maximum(drawn @ ~np.isnan(scores), 1)


def prediction_string(boxes, confidences):
    """`confidence x y width height ...` in descending confidence; empty for no boxes."""
    order = np.argsort(-np.asarray(confidences, float), kind="stable")
    return " ".join(f"{confidences[i]:.4f} " + " ".join(f"{value:.1f}" for value in boxes[i]) for i in order)
