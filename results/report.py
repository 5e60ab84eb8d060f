"""The page that shows what a run found: report.html, which opens from the disk without a server."""

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
from metrics import average_precision_image, image_confidence

from .drawing import Overlay, picture_path

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Lung opacities</title><link rel="icon" href="data:,">
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse } #rows { table-layout: fixed; width: 100%; min-width: 58rem }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ccc; text-align: left }
td { overflow-wrap: anywhere } #rows th { position: sticky; top: 0; background: #fff }
#rows th + th { cursor: pointer }
#rows th:first-child { width: 128px } #rows th:nth-child(2) { width: 33% }
.plot, dialog img { max-width: 100%; max-height: 92vh }
td img { display: block; width: 128px; height: 128px; object-fit: contain; background: #000 }
dialog { border: 0; padding: 0; background: #000 } form > * { font: inherit; margin-right: 1rem }
</style>
<h1>Lung opacities</h1>
<p><strong>For illustration and learning only. Not for clinical use.</strong></p>
<p>$lines</p>
$decisions $plots
<form onsubmit="return false"><select><option value="">all results<option>found<option>not found
<option>skipped</select><input type="search" placeholder="search an id"><output></output></form>
<table id="rows"><thead><tr>$head</tr></thead><tbody>$rows</tbody></table>
<dialog onclick="this.close()"><img alt="the picture in full size"></dialog>
<script>
const [select, search, count] = document.querySelector("form").elements;
const body = document.querySelector("#rows tbody"), rows = [...body.rows];
const dialog = document.querySelector("dialog");
function filter() {
  for (const row of rows)
    row.hidden = select.value && row.className != select.value
      || !row.cells[1].textContent.toLowerCase().includes(search.value.toLowerCase());
  count.value = rows.filter(row => !row.hidden).length + " of " + rows.length + " images";
}
function sort(column) {
  const keys = new Map(rows.map(row => [row, row.cells[column].textContent]));
  const {compare} = new Intl.Collator("en", {numeric: true});
  rows.sort((a, b) => compare(keys.get(a), keys.get(b)));
  if (keys.get(rows[0]) == keys.get(body.rows[0])) rows.reverse();
  body.replaceChildren(...rows);
}
select.onchange = search.oninput = filter;
document.querySelectorAll("#rows th + th").forEach((head, i) => head.onclick = () => sort(i + 1));
body.onclick = event => {
  const link = event.target.closest("a");
  if (link) { event.preventDefault(); dialog.firstChild.src = link.href; dialog.showModal(); }
};
filter();
</script>
""")


class Row(NamedTuple):
    """One image of the page."""
    patient_id: str
    outcome: str  # "found", "not found" or "skipped"
    reason: str = ""
    confidence: float = math.nan
    score: float = math.nan
    true_boxes: int | None = None  # None where the truth is unknown


def row_of(overlay: Overlay) -> Row:
    """The row of a predicted image."""
    row = Row(overlay.patient_id, "found" if len(overlay.boxes) else "not found",
              confidence=image_confidence(overlay.mask))
    if overlay.truth is None:
        return row
    score = average_precision_image(overlay.boxes, overlay.confidences, overlay.truth)
    return row._replace(score=score, true_boxes=len(overlay.truth))


def write_report(folder: Path, rows: Iterable[Row], *, lines: Sequence[str],
                 pictures: str | None = None, plots: Sequence[str] = ()) -> Path:
    """Writes folder/report.html: the worst scores first or, without truth, the highest confidences.

    `lines` of text come first; `pictures` names a folder and `plots` files, both in `folder`.
    """
    rows = sorted(rows, key=lambda row: [
        math.inf if math.isnan(value) else value for value in (row.score, -row.confidence)])
    labelled = [row for row in rows if row.true_boxes is not None]
    names = ["picture", "id", "result", "highest probability", "true boxes", "score"]
    names = names[:6 if labelled else 4]
    path = folder / "report.html"
    write_text(path, PAGE.substitute(
        lines="<br>".join(map(escape, lines)), decisions=_decisions(labelled) if labelled else "",
        plots="".join(f'<p><img class="plot" src="{name}" alt="{name}">' for name in plots),
        head="".join(f"<th>{name}" for name in names),
        rows="\n".join(_html_row(row, folder, pictures, len(names)) for row in rows)))
    return path


def _html_row(row, folder, pictures, columns):
    name, link = f"{pictures}/{row.patient_id}.png", ""
    has_id = row.outcome != "skipped"  # instead of a path, which need not be UTF-8
    if pictures and has_id and os.path.exists(picture_path(folder / pictures, row.patient_id)):
        link = f'<a href="{quote(name)}"><img loading="lazy" src="{quote(name)}" alt=""></a>'
    result = f"{row.outcome}: {row.reason}" if row.reason else row.outcome
    numbers = [f"{row.confidence:.3f}", str(row.true_boxes), f"{row.score:.3f}"]
    numbers = ["-" if number in ("nan", "None") else number for number in numbers]
    cells = [link, escape(row.patient_id), escape(result), *numbers][:columns]
    return f'<tr class="{row.outcome}">' + "".join(f"<td>{cell}" for cell in cells)


def _decisions(rows):
    counts = Counter((row.true_boxes > 0, row.outcome) for row in rows)
    lines = [f"<tr><th>{name}<td>{counts[key, 'found']}<td>{counts[key, 'not found']}"
             for name, key in (("with an opacity", True), ("without one", False))]
    return "<table><tr><th>images<th>found<th>not found" + "".join(lines) + "</table>"
