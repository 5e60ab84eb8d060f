"""What a run found, in lines of text and as a page: report.html, which opens from the disk without
a server."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple
from urllib.parse import quote

from cli import write_text
from metrics import FALSE_BOXES, average_precision_image, image_confidence

from .drawing import Overlay
from .layout import picture_path

PAGE = Path(__file__).with_name("report.html")  # a template: $name is filled in
METRIC_NAMES = {  # in JSON files and final.pth.tar, of what Evaluation.summarize returns
    "rsna": "rsna_mean_average_precision", "rsna_standard_error": "rsna_standard_error",
    "total": "total_average_precision", "auc": "image_roc_auc", "auc_AP": "image_roc_auc_AP",
    "auc_PA": "image_roc_auc_PA"}
COLUMNS = "picture", "id", "result", "highest probability", "true boxes", "score"


class Row(NamedTuple):
    """What the page says of one image."""
    patient_id: str  # the path of a file that was skipped
    outcome: str  # "found", "not found" or "skipped"
    remark: str = ""
    confidence: float = math.nan
    score: float = math.nan
    true_boxes: int | None = None  # None where the truth is unknown

    @classmethod
    def of(cls, overlay: Overlay) -> "Row":
        """The row of an image that was predicted."""
        row = cls(overlay.patient_id, "found" if len(overlay.boxes) else "not found",
                  confidence=image_confidence(overlay.mask))
        if overlay.truth is None:
            return row
        score = average_precision_image(overlay.boxes, overlay.confidences, overlay.truth)
        return row._replace(score=score, true_boxes=len(overlay.truth))


def score_lines(figures: dict[str, float], images: int) -> list[str]:
    """Lines that scripts print of Evaluation.summarize; the last two are the tutorial's."""
    views = [f"{view} {figures[f'auc_{view}']:.4f}" for view in ("AP", "PA")
             if not math.isnan(figures[f"auc_{view}"])]
    within = f" (within views: {', '.join(views)})" if views else ""
    found = ", ".join(f"{figures[f'froc_{rate:g}']:.2f} at {rate:g}" for rate in FALSE_BOXES)
    return [f"True boxes found (FROC), at false boxes an image: {found}",
            f"Image ROC AUC: {figures['auc']:.4f}{within}",
            f"Standard error of the RSNA mAP: {figures['rsna_standard_error']:.4f} "
            f"(bootstrap over {images} images)",
            f"RSNA Mean Average Precision: {figures['rsna']:.4f}",
            f"Total Average Precision: {figures['total']:.4f}"]


def finite(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures with None for NaN, which JSON lacks."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def named_figures(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures of Evaluation.summarize by their names in files."""
    return {METRIC_NAMES.get(name, name): value for name, value in finite(figures).items()}


def write_report(path: Path, rows: Iterable[Row], *, lines: Sequence[str],
                 pictures: str | None = None, plots: Sequence[str] = ()) -> None:
    """Writes the page: the worst scores first or, without truth, the highest confidences.

    `lines` of text come first; `pictures` names a folder and `plots` files, both beside the page.
    """
    rows = sorted(rows, key=lambda row: [
        math.inf if math.isnan(value) else value for value in (row.score, -row.confidence)])
    labelled = [row for row in rows if row.true_boxes is not None]
    columns = COLUMNS if labelled else COLUMNS[:4]
    folder, plots = path.parent, [name for name in plots if (path.parent / name).exists()]
    write_text(path, Template(PAGE.read_text("utf-8")).substitute(
        lines="<br>".join(map(escape, lines)), decisions=_decisions(labelled) if labelled else "",
        plots="".join(f'<p><img class="plot" src="{name}" alt="{name}">' for name in plots),
        head="".join(f"<th>{name}" for name in columns),
        rows="\n".join(_html_row(row, folder, pictures, len(columns)) for row in rows)))


def _html_row(row, folder, pictures, columns):
    link = ""
    has_id = row.outcome != "skipped"  # instead of a path, which need not be UTF-8
    if pictures and has_id and os.path.exists(picture_path(folder / pictures, row.patient_id)):
        name = quote(f"{pictures}/{row.patient_id}.png")
        link = f'<a href="{name}"><img loading="lazy" src="{name}" alt=""></a>'
    remark = f"<p>{escape(row.remark)}" if row.remark else ""  # goes on after the name
    numbers = [f"{row.confidence:.3f}", str(row.true_boxes), f"{row.score:.3f}"]
    numbers = ["-" if number in ("nan", "None") else number for number in numbers]
    cells = [link, escape(row.patient_id) + remark, row.outcome, *numbers][:columns]
    return f'<tr class="{row.outcome}">' + "".join(f"<td>{cell}" for cell in cells)


def _decisions(rows):
    counts = Counter((row.true_boxes > 0, row.outcome) for row in rows)
    lines = [f"<tr><th>{name}<td>{counts[key, 'found']}<td>{counts[key, 'not found']}"
             for name, key in (("with an opacity", True), ("without one", False))]
    return "<table><tr><th>images<th>found<th>not found" + "".join(lines) + "</table>"
