import errno
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from PIL import Image

from metrics import Evaluation, Grid, Thresholds
from results import curves

EPOCH = {"train_loss": 0.9, "loss": 0.8, "rsna": 0.1, "total": 0.05, "auc": 0.7}


@pytest.fixture
def figure(monkeypatch):
    """The figures that are saved."""
    saved, save = [], Figure.savefig

    def savefig(figure, *args, **options):
        saved.append(figure)
        save(figure, *args, **options)
    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def evaluation(positive):
    """Three images, all of which are found at a box threshold of 0.55, if the gate is at most 0.6,
    and none at the others."""
    grid = Grid([*curves.CURVE_THRESHOLDS, 0.55], [*curves.CURVE_THRESHOLDS])
    scores = np.zeros((3, 10, 9))
    scores[:, -1, :6] = 1
    return Evaluation(0.5, grid, np.array([0.2, 0.6, 0.9]), np.array(positive),
                      np.full(3, ""), scores, np.array([[0.9, 1], [0.8, 0], [0.7, 1]]))


@pytest.mark.parametrize("draw", [
    lambda path: curves.draw_history(path, [EPOCH]),
    lambda path: curves.draw_scores(path, evaluation([False, True, True]), Thresholds(0.55))])
def test_a_figure_is_written_as_png(tmp_path, draw):
    path = tmp_path / "plot.png"
    draw(path)
    assert list(tmp_path.iterdir()) == [path]
    with Image.open(path) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300


def test_curves_hold_the_history(tmp_path, figure):
    second = {**EPOCH, "rsna": 0.2, "learning_rate": 0.001}
    curves.draw_history(tmp_path / "plot.png", [EPOCH, second])
    lines = {axes.get_title(): [list(line.get_ydata()) for line in axes.get_lines()]
             for axes in figure[0].axes}
    assert lines["loss"] == [[0.9, 0.9], [0.8, 0.8]]
    assert lines["average precision"] == [[0.1, 0.2], [0.05, 0.05]]
    first, second = lines["learning rate"][0]  # histories of earlier versions lack it
    assert math.isnan(first) and second == 0.001


def test_a_single_epoch_has_no_fractions_of_an_epoch_on_its_axis(tmp_path, figure):
    curves.draw_history(tmp_path / "plot.png", [EPOCH])
    axes = figure[0].axes[0]
    left, right = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if left <= tick <= right] == [1]


def test_scores_are_drawn_over_both_thresholds_with_those_in_use(tmp_path, figure):
    thresholds = Thresholds(0.55, 0.5)
    curves.draw_scores(tmp_path / "plot.png", evaluation([False, True, True]), thresholds)
    box, gate, box_in_use, gate_in_use = figure[0].axes[2].get_lines()
    assert set(box.get_ydata()) == {0.0}
    assert gate.get_ydata()[0] == 1 and gate.get_ydata()[-1] == 0
    assert box_in_use.get_xdata()[0] == 0.55 and gate_in_use.get_xdata()[0] == 0.5


def test_froc_is_drawn_with_the_rates_at_which_it_is_read(tmp_path, figure):
    curves.draw_scores(tmp_path / "plot.png", evaluation([False, True, True]), Thresholds(0.55))
    curve, rates = figure[0].axes[3].get_lines()
    assert list(rates.get_xdata()) == [1 / 8, 1 / 4, 1 / 2, 1, 2]
    assert list(rates.get_ydata()) == [0.5, 0.5, 1, 1, 1]  # of 3 images, 1/2 allows one false box
    assert curve.get_ydata()[0] == 0.5 and curve.get_ydata()[-1] == 1


def test_the_gate_in_use_is_marked_on_the_roc_curve(tmp_path, figure):
    thresholds = Thresholds(0.55, gate=0.7)
    curves.draw_scores(tmp_path / "plot.png", evaluation([False, True, True]), thresholds)
    _, mark = figure[0].axes[0].get_lines()
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (0, 0.5)


@pytest.mark.parametrize("positive", [[True] * 3, [False] * 3])
def test_a_single_class_has_no_decision_curves(tmp_path, figure, positive):
    curves.draw_scores(tmp_path / "plot.png", evaluation(positive), Thresholds(0.55))
    assert isinstance(figure[0], Figure) and not figure[0].axes[0].get_lines()


EXOTIC = """
text.usetex: True
font.family: NoSuchFont
figure.dpi: 9999
savefig.format: pdf
axes.prop_cycle: cycler("linestyle", ["-"])
lines.linewidth: thick
"""


def test_settings_of_matplotlib_that_others_left_change_nothing(tmp_path):
    (tmp_path / "matplotlibrc").write_text(EXOTIC)
    curves.draw_history(tmp_path / "plain.png", [EPOCH])
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from results import curves
curves.draw_history(Path("exotic.png"), [{EPOCH}])"""
    variables = os.environ | {"MPLBACKEND": "module://of_a_notebook"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, check=True)
    plain, exotic = ((tmp_path / f"{name}.png").read_bytes() for name in ("plain", "exotic"))
    assert plain == exotic


def test_a_plot_that_fails_is_a_warning_and_leaves_none_of_an_earlier_run(
        tmp_path, monkeypatch, capsys):
    (tmp_path / "plot.png").write_text("earlier")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    curves.draw_history(tmp_path / "plot.png", [EPOCH])
    assert capsys.readouterr().out.startswith("warning: no plot.png: import of matplotlib.figure")
    assert not (tmp_path / "plot.png").exists()


def test_a_full_disk_is_told_as_one(tmp_path, monkeypatch):
    def refuse(path, durable):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(curves, "atomic_write", refuse)
    with pytest.raises(OSError, match="No space left"):
        curves.draw_history(tmp_path / "plot.png", [EPOCH])


def test_a_prediction_without_labels_does_not_wait_for_matplotlib():
    code = "import predict, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
