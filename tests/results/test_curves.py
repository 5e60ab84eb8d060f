import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from PIL import Image

from metrics import Evaluation, Thresholds
from results import curves

EPOCH = {"train_loss": 0.9, "loss": 0.8, "rsna": 0.1, "total": 0.05, "auc": 0.7}


@pytest.fixture
def figure(monkeypatch):
    """The figures that are saved."""
    saved = []
    monkeypatch.setattr(curves, "_save", lambda figure, path: saved.append(figure))
    return saved


def evaluation(positive):
    """Three images, all of which are found at a box threshold of 0.55 and none at the others."""
    box_thresholds = [*curves.CURVE_THRESHOLDS, 0.55]
    scores = np.zeros((3, len(box_thresholds)))
    scores[:, -1] = 1
    return Evaluation(0.5, box_thresholds, np.array([0.2, 0.6, 0.9]), np.array(positive),
                      np.full(3, ""), scores)


@pytest.mark.parametrize("draw", [
    lambda folder: curves.draw_history(folder, [EPOCH]),
    lambda folder: curves.draw_scores(folder, evaluation([False, True, True]), Thresholds(0.55))])
def test_a_figure_is_written_as_png(tmp_path, draw):
    draw(tmp_path)
    [path] = tmp_path.iterdir()
    with Image.open(path) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300


def test_curves_hold_the_history(tmp_path, figure):
    curves.draw_history(tmp_path, [EPOCH, {**EPOCH, "rsna": 0.2, "learning_rate": 0.001}])
    lines = {axes.get_title(): [list(line.get_ydata()) for line in axes.get_lines()]
             for axes in figure[0].axes}
    assert lines["loss"] == [[0.9, 0.9], [0.8, 0.8]]
    assert lines["average precision"] == [[0.1, 0.2], [0.05, 0.05]]
    first, second = lines["learning rate"][0]  # histories of earlier versions lack it
    assert math.isnan(first) and second == 0.001


def test_a_single_epoch_has_no_fractions_of_an_epoch_on_its_axis(tmp_path, figure):
    curves.draw_history(tmp_path, [EPOCH])
    axes = figure[0].axes[0]
    left, right = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if left <= tick <= right] == [1]


def test_scores_are_drawn_over_both_thresholds_with_those_in_use(tmp_path, figure):
    thresholds = Thresholds(0.55, 0.5)
    curves.draw_scores(tmp_path, evaluation([False, True, True]), thresholds)
    box, gate, box_in_use, gate_in_use = figure[0].axes[2].get_lines()
    assert set(box.get_ydata()) == {0.0}
    assert gate.get_ydata()[0] == 1 and gate.get_ydata()[-1] == 0
    assert box_in_use.get_xdata()[0] == 0.55 and gate_in_use.get_xdata()[0] == 0.5


def test_the_gate_in_use_is_marked_on_the_roc_curve(tmp_path, figure):
    curves.draw_scores(tmp_path, evaluation([False, True, True]), Thresholds(0.55, gate=0.7))
    _, mark = figure[0].axes[0].get_lines()
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (0, 0.5)


@pytest.mark.parametrize("positive", [[True] * 3, [False] * 3])
def test_a_single_class_has_no_decision_curves(tmp_path, figure, positive):
    curves.draw_scores(tmp_path, evaluation(positive), Thresholds(0.55))
    assert isinstance(figure[0], Figure) and not figure[0].axes[0].get_lines()


def test_a_prediction_without_labels_does_not_wait_for_matplotlib():
    code = "import predict, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
