import math

import numpy as np
import pytest

import metrics
from metrics import average_precision_image, box_iou, parse_boxes, prediction_string


def paint(box, side):
    mask = np.zeros((side, side), bool)
    x, y, width, height = map(int, box)
    mask[y:y + height, x:x + width] = True
    return mask


def slow_average_precision(predicted, confidences, targets, side):
    """The challenge's text, word by word, on painted masks and with whole numbers until the last division."""
    if not len(predicted) and not len(targets):
        return math.nan
    order = sorted(range(len(predicted)), key=lambda i: (-confidences[i], i))
    scores = []
    for percent in (40, 45, 50, 55, 60, 65, 70, 75):
        free, hits = list(range(len(targets))), 0
        for i in order:
            best, best_overlap = None, None
            for j in free:
                a, b = paint(predicted[i], side), paint(targets[j], side)
                overlap = (int((a & b).sum()), int((a | b).sum()))
                if best is None or overlap[0] * best_overlap[1] > best_overlap[0] * overlap[1]:
                    best, best_overlap = j, overlap
            if best is not None and best_overlap[0] * 100 > percent * best_overlap[1]:
                free.remove(best)
                hits += 1
        scores.append(hits / (len(predicted) + len(targets) - hits))
    return sum(scores) / len(scores)


def random_case(rng, side):
    def boxes(count):
        corners = rng.integers(0, side - 4, (count, 2))
        return np.hstack([corners, np.minimum(rng.integers(1, side, (count, 2)), side - corners)])
    targets = boxes(rng.integers(0, 4))
    predicted = boxes(rng.integers(0, 4))
    if len(targets) and rng.random() < 0.7:  # near misses, exact copies and touching boxes
        near = targets[rng.integers(0, len(targets), rng.integers(1, 4))].copy()
        near[:, :2] += rng.integers(-1, 2, (len(near), 2)) * rng.integers(0, 4)
        predicted = np.vstack([predicted, np.clip(near, 0, None)])
        predicted[:, 2:] = np.minimum(predicted[:, 2:], side - predicted[:, :2])
        predicted = predicted[(predicted[:, 2:] > 0).all(axis=1)]
    return predicted, rng.choice([0.2, 0.5, 0.9], len(predicted)), targets  # few values: ties


def test_metric_equals_a_slow_reference_on_10000_cases():
    rng, side, kinds = np.random.default_rng(0), 16, {"nan": 0, "zero": 0, "between": 0}
    for _ in range(10_000):
        case = random_case(rng, side)
        fast, slow = average_precision_image(*case), slow_average_precision(*case, side)
        assert fast == pytest.approx(slow, abs=1e-9, nan_ok=True), case
        kinds["nan" if math.isnan(fast) else "zero" if fast == 0 else "between"] += 1
    assert min(kinds.values()) > 100, kinds


def test_iou_of_exactly_a_threshold_is_no_hit():
    for numerator, denominator, hits in ((2, 5, 0), (1, 2, 2), (3, 5, 4), (3, 4, 7)):
        score = average_precision_image([[0, 0, numerator, 1]], [1.0], [[0, 0, denominator, 1]])
        assert score == hits / 8


def test_two_predictions_cannot_hit_one_target():
    box = [10, 10, 20, 20]
    assert average_precision_image([box, box], [0.9, 0.8], [box]) == 0.5


def test_true_negatives_count_in_the_tutorials_number_alone():
    scores = [0.5, 0.0, math.nan, math.nan]
    assert metrics.mean_average_precision(scores) == 0.25
    assert metrics.total_average_precision(scores) == 0.125
    assert metrics.mean_average_precision([math.nan]) == 0


def test_box_iou_of_touching_and_nested_boxes():
    iou = box_iou([[0, 0, 2, 2]], [[2, 0, 2, 2], [0, 0, 1, 1], [1, 1, 2, 2], [0, 0, 2, 2]])
    assert iou.tolist() == [[0, 0.25, 1 / 7, 1]]


def test_parse_boxes_finds_regions_with_their_mean_probability():
    mask = np.zeros((8, 10), np.float32)
    mask[1:3, 2:5] = 0.5
    mask[5:8, 6:10] = 0.75
    mask[0, 9] = 1  # below the minimum area
    boxes, confidences = parse_boxes(mask, 0.4, min_area=2)
    assert boxes.tolist() == [[6, 5, 4, 3], [2, 1, 3, 2]]
    assert confidences.tolist() == [0.75, 0.5]
    assert parse_boxes(mask, 0.4)[0].tolist() == [[9, 0, 1, 1], [6, 5, 4, 3], [2, 1, 3, 2]]
    assert len(parse_boxes(mask, 1.0)[0]) == 0


def test_diagonal_neighbours_are_one_region():
    assert parse_boxes(np.eye(4), 0.5)[0].tolist() == [[0, 0, 4, 4]]


def test_prediction_string_is_in_descending_confidence():
    text = prediction_string([[1, 2, 3, 4], [5, 6, 7, 8]], [0.25, 0.5])
    assert text == "0.5000 5.0 6.0 7.0 8.0 0.2500 1.0 2.0 3.0 4.0"
    assert prediction_string([], []) == ""


def test_roc_auc_counts_pairs_and_ties():
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 5, 60) / 4, rng.random(60) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    assert metrics.roc_auc(scores, labels) == pytest.approx(np.mean(pairs))
    assert math.isnan(metrics.roc_auc(scores, np.zeros(60)))


def test_threshold_search_finds_the_best_pair():
    thresholds = len(metrics.BOX_THRESHOLDS)
    has_target = np.array([True] * 20 + [False] * 20)
    image_scores = np.where(has_target, 0.8, 0.42)  # a gate from 0.45 to 0.8 keeps the positives alone
    scores = np.zeros((40, thresholds))
    scores[:20, 28:33] = 0.6
    table, (row, column) = metrics.search_thresholds(scores, image_scores, has_target)
    assert 29 <= row <= 31 and 0.45 <= metrics.GATE_THRESHOLDS[column] <= 0.8
    assert table[row, column] == pytest.approx(0.6)
    assert table[30, 0] == pytest.approx(0.3)  # without a gate every negative counts 0
    assert table[30, -1] == 0


def test_cross_validation_keeps_what_holds_for_all_images_and_loses_luck():
    rng = np.random.default_rng(0)
    has_target = np.array([True] * 20 + [False] * 20)
    image_scores = np.where(has_target, 0.8, 0.42)
    scores = np.zeros((40, 60))
    scores[:20, 28:33] = 0.6
    assert metrics.cross_validated_precision(scores, image_scores, has_target) == pytest.approx(0.6)
    scores[:20] = rng.random((20, 60)) < 0.2  # every threshold is worth 0.2
    table, place = metrics.search_thresholds(scores, image_scores, has_target)
    promised = metrics.cross_validated_precision(scores, image_scores, has_target)
    assert promised == pytest.approx(0.2, abs=0.03) and promised < table[place]
