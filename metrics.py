"""Boxes and scores in NumPy: mask to boxes, the challenge's metric, threshold search, submission strings.

Boxes are `[x, y, width, height]` with the upper-left corner at (x, y); no function here cares in which pixels.
"""

import numpy as np
from scipy import ndimage

# https://www.kaggle.com/c/rsna-pneumonia-detection-challenge/overview/evaluation
IOU_THRESHOLDS = (0.40, 0.45, 0.50, 0.55, 0.60, 0.65, 0.70, 0.75)
MIN_AREA = 5000 / 1024**2  # share of the image; 99 % of the challenge's boxes cover 9,624 / 1024**2
BOX_THRESHOLDS = np.arange(1, 60) / 60  # mask probabilities that the search tries
GATE_THRESHOLDS = np.arange(20) / 20  # image probabilities that the search tries
HALVINGS = 60  # of cross_validated_precision


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
    """The challenge's score of a data set: mean over images (N,) without the NaN of true negatives; 0 if all are."""
    scores = np.asarray(scores, float)
    return float(scores[~np.isnan(scores)].mean()) if not np.isnan(scores).all() else 0.0


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


def gate_scores(scores, image_scores, has_target, gate):
    """Average precisions (N, ...) once images with image_scores (N,) below the gate have no boxes: such an image is
    worth 0 with a target, NaN without one (has_target (N,))."""
    below = np.where(has_target, 0.0, np.nan)
    return np.where(np.asarray(image_scores) >= gate, np.transpose(scores), below).T


def search_thresholds(scores, image_scores, has_target, gate_thresholds=GATE_THRESHOLDS):
    """Finds the pair of thresholds with the best mean average precision.

    scores (N, T): average precision of each image at each of T mask thresholds, were its boxes all kept; image_scores
    (N,) in 0..1, has_target (N,). Returns the table (T, G) of mean average precision at each mask and gate threshold,
    and the indices of its best place, taken from the table's 3 x 3 running mean so that no lucky single place wins.
    """
    table = _threshold_tables(scores, image_scores, has_target, gate_thresholds, np.ones((1, len(scores))))[0]
    return table, np.unravel_index(_best_places(table[None])[0], table.shape)


def cross_validated_precision(scores, image_scores, has_target, gate_thresholds=GATE_THRESHOLDS):
    """Mean average precision at thresholds that other images gave: what the search promises for unseen images.

    Thresholds are found on one random half of the images and scored on the other, both ways, in HALVINGS halvings; the
    mean. Arguments as in search_thresholds.
    """
    halves = np.tile(np.arange(len(scores)) % 2.0, (HALVINGS, 1))
    halves = np.random.default_rng(0).permuted(halves, axis=1)
    tables = _threshold_tables(scores, image_scores, has_target, gate_thresholds, np.concatenate([halves, 1 - halves]))
    unseen = np.roll(tables, HALVINGS, axis=0).reshape(2 * HALVINGS, -1)
    return float(unseen[np.arange(2 * HALVINGS), _best_places(tables)].mean())


def _threshold_tables(scores, image_scores, has_target, gate_thresholds, chosen):
    """Mean average precision (C, T, G) of the images that each row of `chosen` (C, N), 0.0 or 1.0, picks."""
    gated = (gate_scores(scores, image_scores, has_target, gate) for gate in gate_thresholds)
    return np.stack([chosen @ np.nan_to_num(part) / np.maximum(chosen @ ~np.isnan(part), 1) for part in gated], axis=-1)


def _best_places(tables):
    """Index into each flattened table (C, T, G) of the highest running mean over 3 x 3 places."""
    return ndimage.uniform_filter(tables, (1, 3, 3), mode="nearest").reshape(len(tables), -1).argmax(axis=1)


def prediction_string(boxes, confidences):
    """`confidence x y width height ...` in descending confidence; empty for no boxes."""
    order = np.argsort(-np.asarray(confidences, float), kind="stable")
    return " ".join(f"{confidences[i]:.4f} " + " ".join(f"{value:.1f}" for value in boxes[i]) for i in order)
