import math
import re

import numpy as np
import pytest

from metrics import Thresholds
from results.drawing import Overlay
from results.report import Row, score_lines, write_report

NAME = "<b>bold<img src=x onerror=alert(1)>&amp;"


def write(folder, rows, **options):
    write_report(folder / "report.html", rows, lines=["box threshold 0.50"], **options)
    return (folder / "report.html").read_text("utf-8")


def ids(page):
    return re.findall(r'<tr class="[^"]*"><td>.*?<td>(.*?)<td>', page)


def predicted(patient_id, confidence, **fields):
    return Row(patient_id, "found", confidence=confidence, **fields)


# Rows


def overlay(truth, boxes=((0, 0, 10, 10),)):
    boxes = np.array(boxes).reshape(-1, 4)
    mask = np.full((4, 4), 0.7, np.float32)
    return Overlay("a", mask, mask, boxes, np.ones(len(boxes)), (64, 64), truth, Thresholds())


@pytest.mark.parametrize("truth, boxes, row", [
    (None, [[0, 0, 10, 10]], Row("a", "found", "", 0.7)),
    (np.array([[0, 0, 10, 10]]), [[0, 0, 10, 10]], Row("a", "found", "", 0.7, 1.0, 1)),
    (np.array([[0, 0, 10, 10]]), [], Row("a", "not found", "", 0.7, 0.0, 1)),
])
def test_a_row_holds_what_became_of_an_image(truth, boxes, row):
    made = Row.of(overlay(truth, boxes))
    assert str(made._replace(confidence=round(made.confidence, 6))) == str(row)


def test_the_highest_confidence_comes_first_and_skipped_files_last(tmp_path):
    page = write(tmp_path, [Row("s", "skipped", "is damaged"), predicted("a", 0.1),
                            predicted("b", 0.9)])
    assert ids(page) == ["b", "a", "s<p>is damaged"]


def test_with_truth_the_worst_score_comes_first_and_true_negatives_last(tmp_path):
    page = write(tmp_path, [predicted("negative", 0.9, true_boxes=0),
                            predicted("good", 0.9, score=0.8, true_boxes=1),
                            predicted("bad", 0.2, score=0.1, true_boxes=2)])
    assert ids(page) == ["bad", "good", "negative"]


def test_with_truth_the_decisions_are_counted(tmp_path):
    page = write(tmp_path, [predicted("a", 0.9, true_boxes=1), predicted("b", 0.9, true_boxes=0),
                            Row("c", "not found", true_boxes=0), predicted("d", 0.9)])
    assert "<th>with an opacity<td>1<td>0" in page and "<th>without one<td>1<td>1" in page


def test_without_truth_there_are_no_decisions_and_scores(tmp_path):
    page = write(tmp_path, [predicted("a", 0.9)])
    assert "with an opacity" not in page and "<th>score" not in page


def test_the_page_says_that_it_is_not_for_clinical_use(tmp_path):
    assert "Not for clinical use." in write(tmp_path, [predicted("a", 0.9)])


# Text and links


@pytest.mark.parametrize("row", [predicted(NAME, 0.5), Row(NAME, "skipped", "no"),
                                 Row("a", "skipped", NAME)])
def test_names_with_markup_stay_text(tmp_path, row):
    page = write(tmp_path, [row])
    assert "<b>" not in page and "&lt;b&gt;bold&lt;img src=x" in page


def test_lines_with_markup_stay_text(tmp_path):
    write_report(tmp_path / "report.html", [], lines=["<b>"])
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page


def test_pictures_are_relative_links_loaded_lazily(tmp_path):
    (tmp_path / "images" / "p 1").mkdir(parents=True)
    (tmp_path / "images" / "p 1" / "50% #ü.png").touch()
    page = write(tmp_path, [predicted("p 1/50% #ü", 0.5)], pictures="images")
    link = "images/p%201/50%25%20%23%C3%BC.png"
    assert f'<a href="{link}"><img loading="lazy" src="{link}"' in page


def test_an_image_without_a_picture_has_no_link(tmp_path):
    assert "<a href" not in write(tmp_path, [predicted("a" * 300, 0.5)], pictures="images")


def test_a_skipped_file_has_no_picture_of_an_earlier_run(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "IM0.png").touch()
    assert "<a href" not in write(tmp_path, [Row("IM0", "skipped", "no")], pictures="images")


def test_nothing_is_requested_from_elsewhere(tmp_path):
    (tmp_path / "curves.png").touch()
    page = write(tmp_path, [predicted("a", 0.5)], plots=["curves.png", "not_drawn.png"])
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert set(sources) == {"data:,", "curves.png"} and "//" not in page


@pytest.mark.parametrize("pictures", [None, "images"])
def test_bytes_that_are_not_text_are_escaped(tmp_path, pictures):
    row = Row("f\udcf6hn", "skipped", "is damaged")
    assert r"\udcf6" in write(tmp_path, [row], pictures=pictures)


# Lines


@pytest.mark.parametrize("pa, within", [
    (0.25, " (within views: AP 0.7500, PA 0.2500)"), (math.nan, " (within views: AP 0.7500)")])
def test_score_lines_end_in_the_lines_of_the_tutorial(pa, within):
    figures = {"auc": 0.5, "auc_AP": 0.75, "auc_PA": pa, "rsna": 0.6, "rsna_standard_error": 0.01,
               "total": 0.3} | dict.fromkeys(["froc_0.125", "froc_0.25", "froc_0.5"], 0.125) | {
                   "froc_1": 0.5, "froc_2": 1}
    assert score_lines(figures, 40) == [
        "True boxes found (FROC), at false boxes an image: 0.12 at 0.125, 0.12 at 0.25, "
        "0.12 at 0.5, 0.50 at 1, 1.00 at 2",
        f"Image ROC AUC: 0.5000{within}",
        "Standard error of the RSNA mAP: 0.0100 (bootstrap over 40 images)",
        "RSNA Mean Average Precision: 0.6000", "Total Average Precision: 0.3000"]
