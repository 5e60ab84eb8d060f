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
    assert metrics.mean_average_precision(np.array(scores)) == 0.25
    assert metrics.total_average_precision(scores) == 0.125
    assert metrics.mean_average_precision(np.array([math.nan])) == 0


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


GATES = metrics.GATE_THRESHOLDS.tolist()
DEFAULT = 29, GATES.index(0.8)


def evaluation_of(scores, confidences, positive):
    return metrics.Evaluation(0.0, confidences, positive, np.full(len(scores), ""), scores)


@pytest.fixture
def separable():
    """20 positive images with confidence 0.7, best at box thresholds 28 to 32, and 20 false alarms with 0.42."""
    positive = np.array([True] * 20 + [False] * 20)
    scores = np.zeros((40, 59))
    scores[:20, 28:33] = 0.6
    return evaluation_of(scores, np.where(positive, 0.7, 0.42), positive)


def test_the_search_leaves_defaults_that_are_wrong(separable):
    (row, column), table = metrics.search_thresholds(separable, GATES, DEFAULT)
    assert 28 <= row <= 32 and 0.45 <= GATES[column] <= 0.7
    assert table[row, column] == pytest.approx(0.6)


def test_the_search_keeps_defaults_where_nothing_scores(separable):
    nothing = separable._replace(scores=np.zeros((40, 59)))
    assert metrics.search_thresholds(nothing, GATES, DEFAULT)[0] == DEFAULT


def test_the_search_keeps_defaults_where_a_better_pair_may_be_luck():
    rng, moved, kept = np.random.default_rng(5), 0, 0
    for _ in range(50):
        steps = rng.normal(0, 0.05, (100, 59))  # an image's score changes gradually, and no threshold is better than others
        scores = 0.5 + np.cumsum(steps, axis=1) - np.cumsum(steps, axis=1).mean(axis=1, keepdims=True)
        evaluation = evaluation_of(scores, np.full(100, 0.9), np.ones(100, bool))
        (row, _), table = metrics.search_thresholds(evaluation, [0.8], (29, 0))
        kept += row == 29
        moved += table.argmax() != 29
    assert moved >= 45 and kept >= 30


def test_the_search_is_the_same_at_every_call(separable):
    first, second = (metrics.search_thresholds(separable, GATES, DEFAULT)[0] for _ in range(2))
    assert first == second


def test_a_gate_takes_the_boxes_of_the_images_below_it(separable):
    assert metrics.summarize(separable, 0, 30)["rsna"] == pytest.approx(0.3)
    assert metrics.summarize(separable, 0.5, 30)["rsna"] == pytest.approx(0.6)
    assert metrics.summarize(separable, 0.71, 30)["rsna"] == 0


def test_the_standard_error_is_that_of_a_mean():
    scores = np.random.default_rng(5).random(400)
    assert metrics.bootstrap(scores).std() == pytest.approx(scores.std() / 20, rel=0.15)
    with_gaps = np.concatenate([scores, np.full(1000, np.nan)])
    assert metrics.bootstrap(with_gaps).std() == pytest.approx(scores.std() / 20, rel=0.15)
    assert metrics.bootstrap(np.full(5, np.nan)).std() == 0


def test_auc_within_views_does_not_reward_knowing_the_view():
    positive = np.array([True] * 38 + [False] * 62 + [True] * 9 + [False] * 91)
    views = np.array(["AP"] * 100 + ["PA"] * 100)
    by_view_alone = metrics.Evaluation(0.0, np.where(views == "AP", 0.9, 0.1), positive, views, np.zeros((200, 1)))
    figures = metrics.summarize(by_view_alone, gate=0)
    assert figures["auc"] > 0.7 and figures["auc_AP"] == figures["auc_PA"] == 0.5


def test_score_lines_end_in_the_lines_of_the_tutorial(separable):
    lines = metrics.score_lines(metrics.summarize(separable, 0.5, 30), 40)
    assert lines == ["Image ROC AUC: 1.0000", "Standard error of the RSNA mAP: 0.0000 (bootstrap over 40 images)",
                     "RSNA Mean Average Precision: 0.6000", "Total Average Precision: 0.3000"]
