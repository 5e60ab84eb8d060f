"""Reads label tables: CSV files with the boxes of each radiograph, checked line by line."""

import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from cli import InputError, warn

BOX_COLUMNS = ["x", "y", "width", "height"]
SMALLEST_BOX = 2  # pixels a side; if all are smaller, they must be shares of the image
OTHER_KINDS = {  # first bytes of files named .csv that are something else
    rb"PK\x03\x04": "a zip archive or an Excel workbook", rb"\x1f\x8b": "a gzip file",
    rb"\xff\xfe|\xfe\xff|[^\0]{0,99}\0": "UTF-16 text",
}


class Labels(NamedTuple):
    """What a table says of each radiograph, by patient_id."""
    boxes: dict[str, np.ndarray]  # (n, 4) in original pixels
    views: dict[str, str]  # "AP", "PA" or ""


def _read_cells(path):
    """All cells of a CSV file as stripped text, its header included; the index holds the line
    numbers. Empty lines are dropped and trailing commas ignored.

    Raises InputError for a file that is not text in UTF-8 and for a row longer than the first one.
    """
    try:
        content = Path(path).read_bytes()
        for start, kind in OTHER_KINDS.items():
            if re.match(start, content):
                raise InputError(f"{path} is {kind}, not a table: save it as CSV in UTF-8")
        text = re.sub(r"[, \t\r]+$", "", content.decode("utf-8-sig"), flags=re.MULTILINE)
        cells = pd.read_csv(io.StringIO(text), header=None, dtype=str, na_filter=False,
                            skip_blank_lines=False, skipinitialspace=True)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = str(error).strip()
        raise InputError(f"{path} cannot be read as a table: {reason}") from None
    cells.index += 1
    cells = cells.apply(lambda column: column.str.strip())
    return cells[(cells != "").any(axis=1)]


def read_table(path: Path, columns: list[str], optional: tuple[str, ...] = ()) -> pd.DataFrame:
    """Reads `columns` of a CSV, all required, and `optional` ones, empty where the file has none;
    the index holds the line numbers.

    Text is stripped; x, y, width, height and Target are numbers, NaN where empty. A byte order mark
    and Windows line ends are accepted. Raises InputError naming the file, and the line and value of
    a wrong cell.
    """
    cells = _read_cells(path)
    table = cells[1:].set_axis(cells.iloc[0], axis="columns").rename_axis(columns=None)
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}: it has {', '.join(table)}")
    if table.empty:
        raise InputError(f"{path} has no rows: give a complete table")
    table = table.loc[:, ~table.columns.duplicated()]
    table = table.reindex(columns=[*columns, *optional], fill_value="")
    refuse_row(table["patientId"] == "", table, "patientId", path, "is empty")
    for column in [name for name in columns if name in (*BOX_COLUMNS, "Target")]:
        numbers = pd.to_numeric(table[column], errors="coerce")
        wrong = (table[column] != "") & ~numbers.abs().lt(float("inf"))
        refuse_row(wrong, table, column, path, "is not a finite number")
        table[column] = numbers
    return table


def refuse_row(wrong: pd.Series, table: pd.DataFrame, column: str, path: Path, reason: str) -> None:
    """Raises InputError naming line and value of the first row of a table where `wrong` is true."""
    if wrong.any():
        line = wrong.idxmax()
        raise InputError(
            f"{path}, line {line}: {column} '{table[column][line]}' {reason}; "
            "fix or remove the row")


def read_boxes(path: Path) -> pd.DataFrame:
    """Reads the label columns of a table: boxes in pixels, exact repeats of a row dropped.

    Raises InputError for a Target other than 0 or 1, for Target 1 without a box, for a box without
    an area, and for boxes that are shares of the image.
    """
    table = read_table(path, ["patientId", *BOX_COLUMNS, "Target"], ("ViewPosition",))
    repeated = table.duplicated()
    warn(f"rows of {path} repeat others and are dropped", table["patientId"][repeated])
    table = table[~repeated]
    refuse_row(~table["Target"].isin([0, 1]), table, "Target", path, "is neither 0 nor 1")
    positive = table["Target"] == 1
    for column in BOX_COLUMNS:
        missing = positive & table[column].isna()
        refuse_row(missing, table, column, path, "is missing though Target is 1")
    for column in ("width", "height"):
        refuse_row(positive & (table[column] <= 0), table, column, path, "is not above 0")
    if table.loc[positive, ["width", "height"]].max(axis=None) < SMALLEST_BOX:
        raise InputError(
            f"{path} has no box of {SMALLEST_BOX} pixels: give x, y (of the upper left corner), "
            "width and height in pixels, not as shares of the image")
    return table


def read_labels(path: Path) -> Labels:
    """Reads a train.csv, or a label table of the challenge, which has no views; raises InputError
    as read_boxes does."""
    table = read_boxes(path)
    boxes = dict.fromkeys(table["patientId"], np.zeros((0, 4)))
    positive = table[table["Target"] == 1]
    for patient_id, rows in positive.groupby("patientId")[BOX_COLUMNS]:
        boxes[patient_id] = rows.to_numpy()
    return Labels(boxes, dict(zip(table["patientId"], table["ViewPosition"])))
