"""Boxes and scores: mask to boxes, the challenge's metric, threshold search, submission strings.

Boxes are `[x, y, width, height]` with the upper-left corner at (x, y), in original pixels unless
said otherwise; masks are in network pixels, and `rescale_boxes` is the only bridge.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from skimage import measure

# https://www.kaggle.com/c/rsna-pneumonia-detection-challenge/overview/evaluation
IOU_THRESHOLDS = (0.40, 0.45, 0.50, 0.55, 0.60, 0.65, 0.70, 0.75)
# smallest region, as a share of the image; 99 % of the challenge's boxes exceed 9,624 / 1024**2
MIN_AREA = 5000 / 1024**2
TYPICAL_SIDES = (217 / 1024, 298 / 1024)  # the challenge's median width and height, as shares
CURVE_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of scores.png
BOX_THRESHOLDS = np.arange(1, 60) / 60  # what the search tries
GATE_THRESHOLDS = np.arange(20) / 20
BOOTSTRAPS = 200  # samples of the images for a standard error
FEWEST_SCORED = 20  # images with true or predicted boxes; one lucky image proves nothing
FALSE_BOXES = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # an image, at which FROC is read
FROC_IOU = 0.5  # above which a true box is found, in FROC
FROC_THRESHOLDS = (0.7, 0.3, 0.1)  # box thresholds that offer further candidates, in this order
PROOF = 2  # standard errors by which new thresholds must beat the given ones


class Thresholds(NamedTuple):
    """How a mask becomes boxes: two thresholds, and the weight by which regress_sides then corrects
    the boxes. No search changes the weight; it is kept here because files from before it was
    introduced need 1."""
    box: float = 0.5  # a pixel above this probability belongs to a region
    gate: float = 0.8  # a region whose highest probability is below this is left out
    source: str = "defaults"  # where the two come from, in words
    size_weight: float = 0.8

    def __str__(self):
        return f"box threshold {self.box:.2f}, gate threshold {self.gate:.2f} ({self.source})"

    def alone(self) -> "Grid":
        """The grid of these two alone."""
        return Grid([self.box], [self.gate])

    def and_curves(self) -> "Grid":
        """These two, and those of the curves in scores.png."""
        return Grid([self.box, *CURVE_THRESHOLDS], [self.gate, *CURVE_THRESHOLDS])

    def stored(self) -> dict[str, Any]:
        """The values by their names in checkpoints and metrics.json."""
        return {"best_threshold": self.box, "gate_threshold": self.gate,
                "threshold_source": self.source, "size_weight": self.size_weight}

    @classmethod
    def of_checkpoint(cls, checkpoint: dict[str, Any]) -> "Thresholds":
        """The values in a checkpoint; older files lack some, or hold None for a failed search."""
        box = checkpoint.get("best_threshold")
        return cls(box=cls().box if box is None else float(box),
                   gate=float(checkpoint.get("gate_threshold") or 0),
                   source=checkpoint.get("threshold_source", "of the checkpoint"),
                   size_weight=float(checkpoint.get("size_weight", 1)))


class Grid(NamedTuple):
    """Thresholds at which masks are scored, each of the T with each of the G."""
    boxes: Sequence[float]  # (T,)
    gates: Sequence[float]  # (G,)


class Evaluation(NamedTuple):
    """One pass of a network over N labelled images, whose boxes are scored on a grid."""
    loss: float
    grid: Grid
    confidences: np.ndarray  # (N,) image_confidence of each mask
    true_boxes: np.ndarray  # (N,) number of true boxes
    views: np.ndarray  # (N,) "AP", "PA" or ""
    scores: np.ndarray  # (N, T, G) average precision; NaN for a true negative
    candidates: np.ndarray = np.zeros((0, 2))  # (K, 2) for FROC: confidences, and 1 for a hit or 0

    @property
    def positive(self) -> np.ndarray:
        """Whether each image has a true box (N,)."""
        return self.true_boxes > 0

    def scores_at(self, box: float, gate: float) -> np.ndarray:
        """Scores (N,) at two thresholds of the grid."""
        return self.scores[:, self.grid.boxes.index(box), self.grid.gates.index(gate)]

    def summarize(self, thresholds: Thresholds) -> dict[str, float]:
        """Figures at these thresholds, which are of the grid."""
        scores = self.scores_at(thresholds.box, thresholds.gate)
        figures = {"loss": self.loss, "rsna": float(mean_average_precision(scores)),
                   "rsna_standard_error": float(bootstrap(scores).std()),
                   "total": total_average_precision(scores),
                   "auc": roc_auc(self.confidences, self.positive)}
        for view in ("AP", "PA"):
            part = self.views == view
            figures[f"auc_{view}"] = roc_auc(self.confidences[part], self.positive[part])
        shares = froc(self.candidates, self.true_boxes.sum(), len(self.true_boxes), FALSE_BOXES)
        return figures | {f"froc_{allowed:g}": share for allowed, share in zip(FALSE_BOXES, shares)}


def rescale_boxes(boxes, from_size: tuple[int, int], to_size: tuple[int, int]) -> np.ndarray:
    """Boxes (n, 4) of an image of from_size (height, width) in the pixels of to_size."""
    scale = np.array([to_size[1] / from_size[1], to_size[0] / from_size[0]] * 2)
    return np.asarray(boxes, float).reshape(-1, 4) * scale


def image_confidence(mask: np.ndarray) -> float:
    """Confidence in 0..1 that the image has an opacity: its mask's highest probability."""
    return float(mask.max())


def parse_boxes(mask: np.ndarray, threshold: float,
                min_area: float = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes around the connected regions (8 neighbours) of a mask of probabilities (H, W).

    A region has at least `min_area` pixels above `threshold`. Returns boxes (n, 4) in pixels of the
    mask, confidences (n,), the mean probability of each region, in descending order, and peaks
    (n,), its highest.
    """
    above = mask > threshold
    bounds = Image.fromarray(above).getbbox()
    if not bounds:
        return np.zeros((0, 4)), np.zeros(0), np.zeros(0)
    left, top, right, bottom = bounds
    part = slice(top, bottom), slice(left, right)  # a fifth of the mask or less
    labels = measure.label(above[part], connectivity=2)
    regions = [region for region in measure.regionprops(labels, mask[part])
               if region.area >= min_area]
    regions.sort(key=lambda region: -region.intensity_mean)
    boxes = [[left + x0, top + y0, x1 - x0, y1 - y0]
             for y0, x0, y1, x1 in (region.bbox for region in regions)]
    values = [(region.intensity_mean, region.intensity_max) for region in regions]
    return np.array(boxes, float).reshape(-1, 4), *np.array(values, float).reshape(-1, 2).T


def find_boxes(mask: np.ndarray, original_size: tuple[int, int],
               thresholds: Thresholds) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) in original pixels and confidences (n,) of a mask (S, S) of probabilities.

    Regions smaller than MIN_AREA are left out, and those that do not reach the gate: hysteresis
    thresholding (Canny, doi:10.1109/TPAMI.1986.4767851, VIII).
    """
    if image_confidence(mask) < thresholds.gate:  # most images end here
        return np.zeros((0, 4)), np.zeros(0)
    boxes, confidences, peaks = _find_regions(mask, original_size, thresholds)
    return boxes[peaks >= thresholds.gate], confidences[peaks >= thresholds.gate]


def _find_regions(mask, original_size, thresholds):
    """Boxes, confidences and peaks of the regions that may reach a gate."""
    boxes, confidences, peaks = parse_boxes(mask, thresholds.box, MIN_AREA * mask.size)
    boxes = rescale_boxes(boxes, mask.shape, original_size)
    return regress_sides(boxes, original_size, thresholds.size_weight), confidences, peaks


def regress_sides(boxes: np.ndarray, original_size: tuple[int, int], weight: float) -> np.ndarray:
    """Boxes (n, 4) of an image (height, width), their sides pulled towards TYPICAL_SIDES.

    Boxes found small are mostly too small, and large ones too large (regression to the mean). Each
    side becomes side**weight * typical**(1 - weight) about its centre, clipped to the image. A
    weight of 1 changes nothing.
    """
    size = np.array(original_size[::-1])
    grown = boxes[:, 2:] ** weight * (size * TYPICAL_SIDES) ** (1 - weight) - boxes[:, 2:]
    low = np.clip(boxes[:, :2] - grown / 2, 0, size)
    high = np.clip(boxes[:, :2] + boxes[:, 2:] + grown / 2, 0, size)
    return np.hstack([low, high - low])


def average_precision_image(predicted_boxes, confidences, target_boxes) -> float:
    """The challenge's score of one image: the mean over IOU_THRESHOLDS of TP / (TP + FP + FN).

    In descending order of confidence, each prediction takes the free target with the highest IoU,
    if that is strictly above the threshold. Both kinds of boxes are in the same pixels. NaN if
    there are neither predictions nor targets, 0 if there is only one of the two.
    """
    predictions, targets = len(predicted_boxes), len(target_boxes)
    if not predictions or not targets:
        return 0.0 if predictions or targets else float("nan")
    order, iou = _ranked_iou(predicted_boxes, confidences, target_boxes)
    hits = np.array([sum(_hits(iou, threshold)) for threshold in IOU_THRESHOLDS])
    return float((hits / (predictions + targets - hits)).mean())


def _ranked_iou(predicted_boxes, confidences, target_boxes):
    """The order of the predictions (n,), the most confident first, and their IoU (n, m) with the
    targets in that order."""
    # imported on use: importing torchvision needs a temporary folder, which prediction does not
    from torchvision.ops import box_convert, box_iou

    order = np.argsort(-np.asarray(confidences, float), kind="stable")
    # in float64: with float32 an IoU of exactly a threshold may exceed it
    corners = [box_convert(torch.as_tensor(np.reshape(boxes, (-1, 4))).double(), "xywh", "xyxy")
               for boxes in (predicted_boxes, target_boxes)]
    return order, box_iou(*corners).numpy()[order]


def _hits(iou, threshold):
    """Which rows of iou (predictions, targets) take a target, one to one, row by row."""
    iou, hits = iou.copy(), []
    for row in iou:
        hits.append(bool(row.max(initial=0) > threshold))
        if hits[-1]:
            iou[:, row.argmax()] = 0
    return hits


def find_candidates(mask: np.ndarray, original_size: tuple[int, int], target_boxes: np.ndarray,
                    thresholds: Thresholds) -> list[tuple[float, bool]]:
    """Candidates of a mask for FROC: the confidence of each, and whether it hits a target box.

    First the boxes of find_boxes without the gate. Lower thresholds find fainter opacities but melt
    neighbours into one, higher ones part them, so each of FROC_THRESHOLDS adds the boxes whose IoU
    with all candidates so far is at most FROC_IOU. In descending order of confidence, each takes
    the free target with the highest IoU, if that is strictly above FROC_IOU.
    """
    boxes, confidences = find_boxes(mask, original_size, thresholds._replace(gate=0))
    for threshold in FROC_THRESHOLDS:
        more = find_boxes(mask, original_size, thresholds._replace(box=threshold, gate=0))
        order, iou = _ranked_iou(*more, boxes)
        new = order[iou.max(axis=1, initial=0) <= FROC_IOU]
        boxes, confidences = (np.concatenate(pair) for pair in zip(
            (boxes, confidences), (values[new] for values in more)))
    order, iou = _ranked_iou(boxes, confidences, target_boxes)
    return list(zip(confidences[order].tolist(), _hits(iou, FROC_IOU)))


def froc(candidates: np.ndarray, true_boxes: int, images: int,
         false_boxes: Sequence[float]) -> list[float]:
    """Free-response ROC: the share of all true boxes found at these false boxes an image.

    Takes the candidates (K, 2) of all images, and the numbers of true boxes and of images, those
    without candidates included. A confidence above which there are more false boxes than allowed is
    not used, so candidates of equal confidence are taken together. NaN without true boxes.
    """
    if not true_boxes:
        return [float("nan")] * len(false_boxes)
    confidences, hits = candidates[np.argsort(-candidates[:, 0], kind="stable")].T
    last = np.append(confidences[1:] != confidences[:-1], True)[:len(confidences)]  # of equal ones
    false, found = np.cumsum(1 - hits)[last], np.cumsum(hits)[last]
    return [float(found[false <= allowed * images].max(initial=0) / true_boxes)
            for allowed in false_boxes]


def score_mask(mask: np.ndarray, original_size: tuple[int, int], target_boxes: np.ndarray,
               grid: Grid, size_weight: float = Thresholds().size_weight) -> list[list[float]]:
    """Average precision (T, G) of the boxes found at the thresholds of a grid."""
    table = []
    for box_threshold in grid.boxes:
        boxes, confidences, peaks = _find_regions(
            mask, original_size, Thresholds(box_threshold, size_weight=size_weight))
        scores = {}  # {number of boxes: score}; a higher gate leaves a part of the boxes
        counts = (peaks[:, None] >= np.array(grid.gates)).sum(axis=0).tolist()
        for count, gate in zip(counts, grid.gates):
            if count not in scores:
                scores[count] = average_precision_image(
                    boxes[peaks >= gate], confidences[peaks >= gate], target_boxes)
        table.append([scores[count] for count in counts])
    return table


def mean_average_precision(scores: np.ndarray) -> np.ndarray:
    """The challenge's score: mean over images (N, ...) without the NaN of true negatives, or 0."""
    return np.nansum(scores, axis=0) / np.maximum((~np.isnan(scores)).sum(axis=0), 1)


def total_average_precision(scores: np.ndarray) -> float:
    """The tutorial's number: sum over images (N,) divided by all, a true negative counting 0."""
    return float(np.nansum(scores) / len(scores))


def roc_auc(confidences: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve of the image decision; NaN if one of the two classes is absent."""
    if positive.all() or not positive.any():
        return float("nan")
    # imported on use: without /dev/shm scikit-learn warns on stderr at import
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, confidences))


def bootstrap(scores: np.ndarray) -> np.ndarray:
    """mean_average_precision, (BOOTSTRAPS, ...), of samples of the images with scores (N, ...);
    every call draws the same samples."""
    images = len(scores)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(images, np.full(images, 1 / images), BOOTSTRAPS).astype(float)
    sums, counts = (np.tensordot(drawn, part, 1) for part in
                    (np.nan_to_num(scores), ~np.isnan(scores)))
    return sums / np.maximum(counts, 1)


def search_thresholds(evaluation: Evaluation, default: tuple[int, int]) -> tuple[int, int]:
    """The pair of thresholds that an Evaluation proves best, as indices of (box threshold, gate).

    The best of many noisy scores is mostly luck. So each pair is ranked by its gain over `default`
    less PROOF standard errors of that gain; `default` stays unless this is above 0 for some pair
    (docs/experiments.md). A pair close to the default needs little proof: its gain varies little.
    """
    table, samples = mean_average_precision(evaluation.scores), bootstrap(evaluation.scores)
    gains = samples - samples[:, default[0], default[1]][:, None, None]
    proven = table - table[default] - PROOF * gains.std(axis=0)
    best = np.unravel_index(proven.argmax(), proven.shape)
    return best if proven[best] > 0 else default


def choose_thresholds(evaluate: Callable[[Grid], Evaluation], given: Thresholds) -> Thresholds:
    """The given thresholds, or those that search_thresholds proves better, on the images that
    `evaluate` scores at the thresholds of any grid."""
    grid = Grid(np.union1d(BOX_THRESHOLDS, given.box).tolist(),
                np.union1d(GATE_THRESHOLDS, given.gate).tolist())
    default = grid.boxes.index(given.box), grid.gates.index(given.gate)
    evaluation = evaluate(grid)
    scored = int((~np.isnan(evaluation.scores_at(given.box, given.gate))).sum())
    if scored < FEWEST_SCORED:
        return given._replace(
            source=f"{given.source}; {scored} images with boxes are too few for a search")
    box, gate = search_thresholds(evaluation, default)
    images = f"{len(evaluation.scores)} images"
    source = f"searched on {images}"
    if (box, gate) == default:
        source = f"{given.source}; a search on {images} proved nothing better"
    return given._replace(box=grid.boxes[box], gate=grid.gates[gate], source=source)


def prediction_string(boxes: np.ndarray, confidences: np.ndarray) -> str:
    """`confidence x y width height ...` in descending order of confidence; empty for no boxes."""
    order = np.argsort(-np.asarray(confidences, float), kind="stable")
    return " ".join(f"{confidences[i]:.4f} " + " ".join(f"{value:.1f}" for value in boxes[i])
                    for i in order)
