import math

import numpy as np
import pytest
from scipy import ndimage

import metrics
from metrics import Thresholds, average_precision_image, find_boxes, parse_boxes, prediction_string


def paint(box, side):
    mask = np.zeros((side, side), bool)
    x, y, width, height = map(int, box)
    mask[y:y + height, x:x + width] = True
    return mask


def slow_average_precision(predicted, confidences, targets, side):
    """The challenge's text, word by word, on painted masks and with whole numbers until the last
    division."""
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


def test_iou_of_exactly_a_threshold_is_not_a_hit():
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


@pytest.mark.parametrize("target, iou", [
    ([2, 0, 2, 2], 0), ([0, 0, 1, 1], 0.25), ([0, 0, 1, 2], 0.5), ([0, 0, 2, 2], 1)])
def test_touching_and_nested_boxes_hit_below_their_iou(target, iou):
    score = average_precision_image([[0, 0, 2, 2]], [1.0], [target])
    assert score == sum(iou > threshold for threshold in metrics.IOU_THRESHOLDS) / 8


def test_boxes_go_to_another_image_size_and_back():
    boxes = np.array([[10, 20, 30, 40], [0, 0, 1000, 500]])
    there = metrics.rescale_boxes(boxes, (500, 1000), (64, 64))
    np.testing.assert_allclose(there[1], [0, 0, 64, 64])
    np.testing.assert_allclose(metrics.rescale_boxes(there, (64, 64), (500, 1000)), boxes)


def test_parse_boxes_finds_regions_with_their_mean_and_highest_probability():
    mask = np.zeros((8, 10), np.float32)
    mask[1:3, 2:5] = 0.5
    mask[5:8, 6:10] = 0.75
    mask[6, 7], mask[7, 8] = 1, 0.5
    mask[0, 9] = 1  # below the minimum area
    boxes, confidences, peaks = parse_boxes(mask, 0.4, min_area=2)
    assert boxes.tolist() == [[6, 5, 4, 3], [2, 1, 3, 2]]
    assert confidences.tolist() == [0.75, 0.5] and peaks.tolist() == [1, 0.5]
    assert parse_boxes(mask, 0.4)[0].tolist() == [[9, 0, 1, 1], [6, 5, 4, 3], [2, 1, 3, 2]]
    assert len(parse_boxes(mask, 1.0)[0]) == 0


def test_diagonal_neighbours_are_one_region():
    assert parse_boxes(np.eye(4), 0.5)[0].tolist() == [[0, 0, 4, 4]]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3)])
def test_a_mask_that_is_one_region_gives_one_box(shape):
    boxes, confidences, _ = parse_boxes(np.full(shape, 0.75), 0.5)
    assert boxes.tolist() == [[0, 0, shape[1], shape[0]]] and confidences.tolist() == [0.75]


# Boxes in original pixels


RAW = Thresholds(box=0.5, gate=0.7, size_weight=1)


def test_boxes_come_back_in_original_pixels():
    mask = np.zeros((64, 64), np.float32)
    mask[16:32, 8:24] = 0.8
    mask[60:61, 60:61] = 0.9  # 16 x 16 original pixels: too small
    boxes, confidences = find_boxes(mask, (2048, 1024), RAW)
    assert boxes.tolist() == [[128, 512, 256, 512]] and confidences.tolist() == pytest.approx([0.8])


@pytest.mark.parametrize("gate, count", [(0.75, 1), (0.5, 1), (0.76, 0), (1, 0)])
def test_an_image_below_the_gate_has_no_boxes(gate, count):
    mask = np.zeros((64, 64))
    mask[16:32, 8:24] = 0.75
    boxes, confidences = find_boxes(mask, (1024, 1024), RAW._replace(gate=gate))
    assert boxes.shape == (count, 4) and confidences.shape == (count,)


@pytest.mark.parametrize("side", [128, 256, 1024, 4000])
def test_the_minimum_area_is_a_share_of_the_image(side):
    mask = np.zeros((64, 64), np.float32)
    mask[:4, :5] = 0.8  # 20 of 4,096: above 5,000 / 1,024**2
    mask[60:, 60:63] = 0.8
    mask[60:, 55:57] = 0.9  # 8 of 4,096
    mask[32:37, 32:36] = 0.79
    boxes, _ = find_boxes(mask, (side, side), RAW)
    np.testing.assert_allclose(boxes * 64 / side, [[0, 0, 5, 4], [32, 32, 4, 5]])


TYPICAL = 2000 * metrics.TYPICAL_SIDES[0], 1000 * metrics.TYPICAL_SIDES[1]


def regress(box, weight=0.8):
    [regressed] = metrics.regress_sides(np.array([box], float), (1000, 2000), weight)
    return regressed


def test_a_box_of_the_typical_sides_stays():
    box = [500, 300, *TYPICAL]
    np.testing.assert_allclose(regress(box), box)


def test_sides_go_towards_the_typical_ones_about_their_middle():
    x, y, width, height = regress([900, 100, TYPICAL[0] / 32, TYPICAL[1] * 3])
    np.testing.assert_allclose(width, TYPICAL[0] / 16)  # 32 ** 0.8 = 16
    np.testing.assert_allclose(x + width / 2, 900 + TYPICAL[0] / 64)
    np.testing.assert_allclose(height, 3 ** 0.8 * TYPICAL[1])
    np.testing.assert_allclose(y + height / 2, 100 + 1.5 * TYPICAL[1])


def test_a_box_at_the_upper_left_edge_is_cut_off_there():
    x, y, width, height = regress([0, 0, 20, 900])
    assert x == 0 and width > 20 and y > 0 and height < 900


def test_a_box_at_the_lower_right_edge_is_cut_off_there():
    x, y, width, height = regress([1980, 990, 20, 10])
    assert x < 1980 and x + width == 2000 and y < 990 and y + height == 1000


def test_a_weight_of_1_leaves_the_sides():
    for box in ([900, 100, 14, 894], [0, 0, 20, 900]):
        np.testing.assert_allclose(regress(box, weight=1), box)


def test_no_boxes_stay_no_boxes():
    assert metrics.regress_sides(np.zeros((0, 4)), (1000, 2000), 0.8).shape == (0, 4)


def test_a_mask_is_scored_at_every_box_threshold_with_every_gate():
    mask = np.zeros((64, 64))
    mask[16:32, 8:24], mask[16:32, 40:56] = 0.4, 0.7
    [faint], _ = find_boxes(mask[:, :32], (2048, 512), Thresholds(box=0.3, gate=0))
    table = metrics.score_mask(mask, (2048, 1024), [faint], metrics.Grid([0.3, 0.5], [0, 0.4, 0.5]))
    assert table == [[0.5, 0.5, 0], [0, 0, 0]]


def test_regions_below_the_gate_are_left_out_beside_one_above_it():
    mask = np.zeros((64, 64))
    mask[16:32, 8:24], mask[16:32, 40:56] = 0.7, 0.9
    boxes, confidences = find_boxes(mask, (64, 64), Thresholds(gate=0.8, size_weight=1))
    assert boxes.tolist() == [[40, 16, 16, 16]] and confidences == pytest.approx([0.9])
    assert len(find_boxes(mask, (64, 64), Thresholds(gate=0.7))[0]) == 2
    assert len(find_boxes(mask, (64, 64), Thresholds(gate=0.91))[0]) == 0


def test_scores_on_a_grid_are_those_of_the_boxes_found():
    rng = np.random.default_rng(0)
    grid = metrics.Grid([0.3, 0.5, 0.6], [0, 0.5, 0.6, 0.7])
    for _ in range(20):
        mask = ndimage.gaussian_filter(rng.random((64, 64)), 4)
        mask = (mask - mask.min()) / np.ptp(mask) * 0.8
        truth = rng.uniform(5, 30, (2, 4))
        expected = [[average_precision_image(*find_boxes(mask, (64, 64), Thresholds(box, gate)),
                                             truth) for gate in grid.gates] for box in grid.boxes]
        assert metrics.score_mask(mask, (64, 64), truth, grid) == expected


# FROC


def slow_froc(confidences, hits, targets, images):
    """Tries every confidence as the threshold."""
    shares = []
    for allowed in metrics.FALSE_BOXES:
        best = 0
        for threshold in confidences:
            taken = [hit for confidence, hit in zip(confidences, hits) if confidence >= threshold]
            if taken.count(False) / images <= allowed:
                best = max(best, taken.count(True) / targets)
        shares.append(best)
    return shares


def test_froc_equals_a_slow_reference():
    rng = np.random.default_rng(0)
    for _ in range(300):
        count, images = rng.integers(0, 40), int(rng.integers(1, 12))
        confidences = rng.integers(0, 12, count) / 11  # some are equal
        hits = rng.random(count) < 0.4
        targets = int(hits.sum() + rng.integers(1, 5))
        expected = slow_froc(confidences.tolist(), hits.tolist(), targets, images)
        shares = metrics.froc(
            np.stack([confidences, hits], axis=1), targets, images, metrics.FALSE_BOXES)
        assert shares == pytest.approx(expected)


def test_froc_takes_candidates_of_equal_confidence_together():
    # 1/8 false box an image allows none of 4 images' two candidates with 0.9, one of which is false
    candidates = np.array([[0.9, 1], [0.9, 0], [0.5, 1]])
    shares = metrics.froc(candidates, 2, 4, metrics.FALSE_BOXES)
    assert shares == [0, 1, 1, 1, 1]


def test_froc_without_candidates_is_0_and_without_true_boxes_nan():
    assert metrics.froc(np.zeros((0, 2)), 3, 5, [1, 2]) == [0, 0]
    assert np.isnan(metrics.froc(np.array([[0.5, 0]]), 0, 5, [1, 2])).all()


@pytest.fixture
def faint_mask():
    """Two joined opacities and a faint one, and the boxes around each in its pixels."""
    mask = np.zeros((64, 64))
    mask[8:24, 8:56] = 0.6
    mask[8:24, 8:24] = mask[8:24, 40:56] = 0.8
    mask[40:56, 8:24] = 0.2
    return mask, [[8, 8, 16, 16], [40, 8, 16, 16], [8, 40, 16, 16]]


def test_candidates_of_other_thresholds_follow_the_boxes_in_use(faint_mask):
    mask, boxes = faint_mask
    found = metrics.find_candidates(mask, (64, 64), boxes, Thresholds(size_weight=1))
    confidences, hits = zip(*found)
    assert confidences == pytest.approx([0.8, 0.8, 0.6 + 0.2 * 2 / 3, 0.2])
    assert hits == (True, True, False, True)


def test_each_target_is_hit_once_and_by_the_most_confident(faint_mask):
    joined = [[8, 8, 48, 16]]  # IoU 1/3 with each of the two in it
    hits = dict(metrics.find_candidates(faint_mask[0], (64, 64), joined, Thresholds(size_weight=1)))
    assert list(hits.values()) == [False, True, False]
    near = [[8, 8, 16, 16], [8, 9, 16, 16]]
    found = metrics.find_candidates(faint_mask[0], (64, 64), near, Thresholds(size_weight=1))
    assert sum(hit for _, hit in found) == 1


@pytest.mark.parametrize("boxes", [[], np.zeros((0, 4))])
def test_nothing_is_hit_without_true_boxes_or_candidates(boxes, faint_mask):
    assert not any(hit for _, hit in metrics.find_candidates(
        faint_mask[0], (64, 64), boxes, Thresholds()))
    assert metrics.find_candidates(np.zeros((64, 64)), (64, 64), boxes, Thresholds()) == []
    assert metrics.find_candidates(np.zeros((64, 64)), (64, 64), [[0, 0, 9, 9]], Thresholds()) == []


def test_an_evaluation_reads_froc_at_five_rates():
    evaluation = metrics.Evaluation(0.0, Thresholds().alone(), np.full(4, 0.9),
                                    np.array([2, 1, 0, 0]), np.full(4, ""), np.zeros((4, 1, 1)),
                                    np.array([[0.9, 1], [0.8, 0], [0.7, 1]]))
    figures = evaluation.summarize(Thresholds())
    shares = [figures[f"froc_{rate}"] for rate in ("0.125", "0.25", "0.5", "1", "2")]
    assert shares == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3])


# Text


def test_prediction_string_is_in_descending_confidence():
    text = prediction_string([[1, 2, 3, 4], [5, 6, 7, 8]], [0.25, 0.5])
    assert text == "0.5000 5.0 6.0 7.0 8.0 0.2500 1.0 2.0 3.0 4.0"
    assert prediction_string([], []) == ""


def test_roc_auc_counts_pairs_and_ties():
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 5, 60) / 4, rng.random(60) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    assert metrics.roc_auc(scores, labels) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("positive", [False, True])
def test_roc_auc_of_one_class_alone_is_nan(positive):
    assert math.isnan(metrics.roc_auc(np.linspace(0, 1, 60), np.full(60, positive)))


# Scores of many images and the search


GATES = metrics.GATE_THRESHOLDS.tolist()
GRID = metrics.Grid(metrics.BOX_THRESHOLDS.tolist(), GATES)
DEFAULT = 29, GATES.index(0.8)


def evaluation_of(scores, confidences, positive, grid=GRID):
    """Of images with one region each, which has the image's confidence as its peak; `scores`
    (N, T) are those without a gate."""
    below = np.where(positive, 0.0, np.nan)[:, None, None]
    above = confidences[:, None, None] >= np.array(grid.gates)
    return metrics.Evaluation(0.0, grid, confidences, positive, np.full(len(scores), ""),
                              np.where(above, scores[:, :, None], below))


@pytest.fixture
def separable():
    """20 positive images with confidence 0.7, best at box thresholds 28 to 32, and 20 false alarms
    with 0.42."""
    positive = np.array([True] * 20 + [False] * 20)
    scores = np.zeros((40, 59))
    scores[:20, 28:33] = 0.6
    return evaluation_of(scores, np.where(positive, 0.7, 0.42), positive)


def test_the_search_leaves_defaults_that_are_wrong(separable):
    row, column = metrics.search_thresholds(separable, DEFAULT)
    assert 28 <= row <= 32 and 0.45 <= GATES[column] <= 0.7


def test_the_search_keeps_defaults_where_nothing_scores(separable):
    nothing = separable._replace(scores=np.zeros((40, 59, 20)))
    assert metrics.search_thresholds(nothing, DEFAULT) == DEFAULT


def test_the_search_keeps_defaults_where_a_better_pair_may_be_luck():
    rng, moved, kept = np.random.default_rng(5), 0, 0
    for _ in range(50):
        # an image's score changes gradually, and no threshold is better than others
        walk = np.cumsum(rng.normal(0, 0.05, (100, 59)), axis=1)
        scores = 0.5 + walk - walk.mean(axis=1, keepdims=True)
        evaluation = evaluation_of(scores, np.full(100, 0.9), np.ones(100, bool),
                                   metrics.Grid(GRID.boxes, [0.8]))
        row, _ = metrics.search_thresholds(evaluation, (29, 0))
        kept += row == 29
        moved += metrics.mean_average_precision(scores).argmax() != 29
    assert moved >= 45 and kept >= 30


def test_the_search_is_the_same_at_every_call(separable):
    first, second = (metrics.search_thresholds(separable, DEFAULT) for _ in range(2))
    assert first == second


def choose(separable, given):
    """choose_thresholds where images score 0.6 at box thresholds from 28 / 60 to 32 / 60."""
    def evaluate(grid):
        good = np.abs(np.array(grid.boxes) - 0.5) < 0.04
        scores = np.where(separable.positive[:, None] & good, 0.6, 0)
        return evaluation_of(scores, separable.confidences, separable.positive, grid)
    return metrics.choose_thresholds(evaluate, given)


def test_thresholds_are_chosen_where_they_are_proved_better(separable):
    box, gate, source, size_weight = choose(separable, Thresholds())
    assert 0.45 < box < 0.55 and 0.42 < gate <= 0.7 and size_weight == Thresholds().size_weight
    assert source == "searched on 40 images"


def test_given_thresholds_that_none_beats_stay_to_the_last_digit(separable):
    given = Thresholds(0.487654321, 0.612345678, "given by flags")
    box, gate, source, _ = choose(separable, given)
    assert (box, gate) == given[:2]
    assert source == "given by flags; a search on 40 images proved nothing better"


def test_thresholds_print_their_values_and_source():
    assert str(Thresholds()) == "box threshold 0.50, gate threshold 0.80 (defaults)"


def test_a_gate_takes_the_boxes_of_the_images_below_it(separable):
    def score(gate):
        return separable.summarize(Thresholds(0.5, gate))["rsna"]
    assert score(0) == pytest.approx(0.3) and score(0.5) == pytest.approx(0.6) and score(0.75) == 0


def test_figures_are_those_of_the_box_threshold_in_use(separable):
    assert separable.summarize(Thresholds(27 / 60, gate=0.5))["rsna"] == 0


def test_the_standard_error_is_that_of_a_mean():
    scores = np.random.default_rng(5).random(400)
    assert metrics.bootstrap(scores).std() == pytest.approx(scores.std() / 20, rel=0.15)
    with_gaps = np.concatenate([scores, np.full(1000, np.nan)])
    assert metrics.bootstrap(with_gaps).std() == pytest.approx(scores.std() / 20, rel=0.15)
    assert metrics.bootstrap(np.full(5, np.nan)).std() == 0


def test_auc_within_views_does_not_reward_knowing_the_view():
    positive = np.array([True] * 38 + [False] * 62 + [True] * 9 + [False] * 91)
    views = np.array(["AP"] * 100 + ["PA"] * 100)
    confidences = np.where(views == "AP", 0.9, 0.1)
    by_view_alone = metrics.Evaluation(0.0, Thresholds().alone(), confidences, positive, views,
                                       np.zeros((200, 1, 1)))
    figures = by_view_alone.summarize(Thresholds())
    assert figures["auc"] > 0.7 and figures["auc_AP"] == figures["auc_PA"] == 0.5


# Thresholds in files


@pytest.mark.parametrize("stored, thresholds", [
    ({}, Thresholds(0.5, 0.0, "of the checkpoint", 1.0)),
    ({"best_threshold": np.float64(0.12)}, Thresholds(0.12, 0.0, "of the checkpoint", 1.0)),
    ({"best_threshold": 0.4, "gate_threshold": 0.7, "threshold_source": "defaults",
      "size_weight": 0.8}, Thresholds(0.4, 0.7, "defaults", 0.8)),
])
def test_thresholds_are_those_of_the_checkpoint(stored, thresholds):
    assert Thresholds.of_checkpoint(stored) == thresholds


def test_stored_thresholds_come_back():
    thresholds = Thresholds(0.4, 0.7, "searched on 68 images", 0.9)
    assert Thresholds.of_checkpoint(thresholds.stored()) == thresholds
