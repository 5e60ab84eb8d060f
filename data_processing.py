"""Builds train.csv and predict.csv from DICOM headers and label files.

    python data_processing.py                      # writes train.csv, one row per label row
    python data_processing.py --type prediction    # writes predict.csv, one row per image
"""

import argparse
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import cli
from dicom import find_dicom_files, read_header, refuse_mixture
from readers import INTERNAL_ERROR, read_files

TABLES = ("stage_2_train_labels.csv", "stage_2_detailed_class_info.csv")
HEADER_COLUMNS = ["patientId", "PatientSex", "PatientAge", "ViewPosition"]
BOX_COLUMNS = ["x", "y", "width", "height"]
TRAINING_COLUMNS = HEADER_COLUMNS + BOX_COLUMNS + ["Target", "class"]
YEARS = {"": 1, "Y": 1, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
MAX_AGE = 120  # years; the five ages of 148 and above in the challenge are typing errors
SMALLEST_BOX = 2  # pixels a side; if all boxes are below, they are shares of the image
OTHER_KINDS = {  # how a file named .csv starts that is not one
    rb"PK\x03\x04": "a zip archive or an Excel workbook", rb"\x1f\x8b": "a gzip file",
    rb"\xff\xfe|\xfe\xff|[^\0]{0,99}\0": "UTF-16 text",
}


def _header_row(path):
    header = read_header(path)
    for tag in ("PatientSex", "ViewPosition"):
        header[tag] = str(header[tag] or "").strip() or None
    header["PatientAge"] = _age(header["PatientAge"])
    return header


def _age(value):
    """Years from a bare number (`62`) or a DICOM age string (`062Y`, `006M`); None if 120 and above
    or unreadable."""
    match = re.fullmatch(r"(\d{1,9})([YMWD]?)", str(value).strip())
    age = int(match[1]) * YEARS[match[2]] if match else MAX_AGE
    return round(age, 2) if age < MAX_AGE else None


def read_headers(folder: Path) -> pd.DataFrame:
    """Table of HEADER_COLUMNS, Rows and Columns, one row per readable DICOM file in `folder`.

    Its attrs["internal_errors"] counts files left out because of a fault of our own. Raises
    InputError if there is no readable file, InternalError if that is our own fault.
    """
    files, skipped = find_dicom_files(folder)
    refuse_mixture(folder, files)
    rows = []
    readings = read_files(_header_row, files.values(), workers=cli.usable_cores(), chunk_size=64)
    for (patient_id, path), reading in zip(files.items(), readings):
        if reading.problem:
            skipped.append((path, reading.problem))
        else:
            rows.append({"patientId": patient_id, **reading.value})
    cli.warn("left out, not readable as DICOM", [f"{path} ({reason})" for path, reason in skipped])
    internal_errors = sum(reason == INTERNAL_ERROR for _, reason in skipped)
    if internal_errors and not rows:
        raise cli.InternalError(f"no header in {folder} could be read")
    if not rows:
        raise cli.InputError(
            f"no DICOM file in {folder}: give the folder that holds the images with --images")
    table = pd.DataFrame(rows)
    table.attrs["internal_errors"] = internal_errors
    return table


def _read_cells(path):
    """All cells of a CSV file as stripped text, those of the first line included; the index holds
    the line numbers, and lines without any content are left out.

    Raises InputError for a file that is not text in UTF-8, and for a row longer than the first one;
    commas at a row's end add no fields to it.
    """
    try:
        content = Path(path).read_bytes()
        for start, kind in OTHER_KINDS.items():
            if re.match(start, content):
                raise cli.InputError(f"{path} is {kind}, not a table: save it as CSV in UTF-8")
        text = re.sub(r"[, \t\r]+$", "", content.decode("utf-8-sig"), flags=re.MULTILINE)
        cells = pd.read_csv(io.StringIO(text), header=None, dtype=str, na_filter=False,
                            skip_blank_lines=False, skipinitialspace=True)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = str(error).strip()
        raise cli.InputError(f"{path} cannot be read as a table: {reason}") from None
    cells.index += 1
    cells = cells.apply(lambda column: column.str.strip())
    return cells[(cells != "").any(axis=1)]


def read_table(path: Path, columns: list[str], optional: tuple[str, ...] = ()) -> pd.DataFrame:
    """Reads a CSV with at least `columns`; the index holds the line numbers.

    A column of `optional` that is not there comes empty. Text columns come stripped; x, y, width,
    height and Target as numbers. A byte order mark or Windows line ends may be there. Raises
    InputError naming the file, and line and value where one is wrong.
    """
    cells = _read_cells(path)
    table = cells[1:].set_axis(cells.iloc[0], axis="columns").rename_axis(columns=None)
    missing = [column for column in columns if column not in table]
    if missing:
        raise cli.InputError(
            f"{path} has no column {', '.join(missing)}: it has {', '.join(table)}")
    if table.empty:
        raise cli.InputError(f"{path} has no rows: give a complete table")
    table = table.loc[:, ~table.columns.duplicated()]
    table = table.reindex(columns=[*columns, *optional], fill_value="")
    _refuse(table["patientId"] == "", table, "patientId", path, "is empty")
    for column in set(BOX_COLUMNS + ["Target"]) & set(columns):
        numbers = pd.to_numeric(table[column], errors="coerce")
        wrong = (table[column] != "") & ~numbers.abs().lt(float("inf"))
        _refuse(wrong, table, column, path, "is not a finite number")
        table[column] = numbers
    return table


def _refuse(wrong, table, column, path, reason):
    """Raises InputError for the first row where `wrong` is true."""
    if wrong.any():
        line = wrong.idxmax()
        raise cli.InputError(
            f"{path}, line {line}: {column} '{table[column][line]}' {reason}; "
            "fix or remove the row")


def read_boxes(path: Path) -> pd.DataFrame:
    """Reads the label columns of a table: boxes in pixels, exact repeats of a row dropped.

    Raises InputError for a Target other than 0 or 1, for Target 1 without a box, for a box without
    an area, and for boxes that are shares of the image.
    """
    table = read_table(path, ["patientId", *BOX_COLUMNS, "Target"], ("ViewPosition",))
    repeated = table.duplicated()
    cli.warn(f"rows of {path} repeat others and are dropped", table["patientId"][repeated])
    table = table[~repeated]
    _refuse(~table["Target"].isin([0, 1]), table, "Target", path, "is neither 0 nor 1")
    positive = table["Target"] == 1
    for column in BOX_COLUMNS:
        missing = positive & table[column].isna()
        _refuse(missing, table, column, path, "is missing though Target is 1")
    for column in ("width", "height"):
        _refuse(positive & (table[column] <= 0), table, column, path, "is not above 0")
    if table.loc[positive, ["width", "height"]].max(axis=None) < SMALLEST_BOX:
        raise cli.InputError(
            f"{path} has no box of {SMALLEST_BOX} pixels: give x, y (of the upper left corner), "
            "width and height in pixels, not as shares of the image")
    return table


def read_labels(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Boxes {patient_id: (n, 4)} in original pixels and views {patient_id: "AP", "PA" or ""} of a
    train.csv, or of a label table of the challenge, which has no views.

    Raises InputError as read_boxes does.
    """
    table = read_boxes(path)
    boxes = dict.fromkeys(table["patientId"], np.zeros((0, 4)))
    positive = table[table["Target"] == 1]
    for patient_id, rows in positive.groupby("patientId")[BOX_COLUMNS]:
        boxes[patient_id] = rows.to_numpy()
    return boxes, dict(zip(table["patientId"], table["ViewPosition"]))


def build_training_csv(images: Path, labels: Path, output: Path) -> pd.DataFrame:
    """Joins the headers in folder `images` with the label tables in folder `labels` and writes
    `output`/train.csv.

    One row per label row whose image is there; boxes in original pixels. Returns the table. Raises
    InputError for missing or broken tables.
    """
    labels_path, classes_path = (Path(labels, name) for name in TABLES)
    boxes = read_boxes(labels_path).drop(columns="ViewPosition")
    classes = read_table(classes_path, ["patientId", "class"]).drop_duplicates()
    repeated = classes["patientId"].duplicated()
    _refuse(repeated, classes, "patientId", classes_path, "has two different classes")
    headers = read_headers(images)
    ids, labelled = set(headers["patientId"]), set(boxes["patientId"])
    cli.warn("images without labels are left out", sorted(ids - labelled))
    cli.warn("labels without an image are left out", sorted(labelled - ids))
    cli.warn("labels have no class", sorted(labelled - set(classes["patientId"])))
    table = boxes.merge(headers, on="patientId").merge(classes, on="patientId", how="left")
    if table.empty:
        raise cli.InputError(
            f"no image in {images} has a label in {labels_path}: check --images and --labels")
    table = drop_boxes_outside(table).astype({"Target": int})
    table.attrs = headers.attrs
    return _write(table[TRAINING_COLUMNS], Path(output, "train.csv"))


def drop_boxes_outside(table: pd.DataFrame) -> pd.DataFrame:
    """The table without boxes wholly outside their image, and without an image that loses its last
    box: it is not known to be free of opacities."""
    right, bottom = table["x"] + table["width"], table["y"] + table["height"]
    columns, rows = table["Columns"].astype(float), table["Rows"].astype(float)
    outside = (right <= 0) | (bottom <= 0) | (table["x"] >= columns) | (table["y"] >= rows)
    beyond = (table["x"] < 0) | (table["y"] < 0) | (right > columns) | (bottom > rows)
    cli.warn("boxes lie outside their image and are dropped, and images left without a box too",
         table["patientId"][outside])
    cli.warn("boxes reach beyond their image and are clipped in training",
         table["patientId"][beyond & ~outside])
    return table[~outside]


def build_prediction_csv(images: Path, output: Path) -> pd.DataFrame:
    """Writes `output`/predict.csv with one row per DICOM file in `images`; returns the table."""
    return _write(read_headers(images)[HEADER_COLUMNS], Path(output, "predict.csv"))


def _write(table, path):
    with cli.atomic_write(path) as file:
        table.to_csv(file, index=False)
    print(f"{path}: {len(table)} rows, {table['patientId'].nunique()} images")
    return table


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--images", "-i", default=cli.default_path("TRAINML_DATA_PATH", "stage_2_train_images"),
        help="folder of DICOM files (default: %(default)s)")
    add("--labels", "-l", default=cli.default_path("TRAINML_DATA_PATH"),
        help="folder of the two label tables (default: %(default)s)")
    add("--output", "-o", default=cli.default_path("TRAINML_MODEL_PATH"),
        help="folder for the CSV file (default: %(default)s)")
    add("--type", "-t", default="training", choices=["training", "train", "prediction"],
        help="train means training (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    cli.require(args.images, "folder", flag="--images", variable="TRAINML_DATA_PATH")
    cli.require(args.output, "output", flag="--output", variable="TRAINML_MODEL_PATH")
    if args.type == "prediction":
        table = build_prediction_csv(args.images, args.output)
    else:
        for name in TABLES:
            path = Path(args.labels, name)
            cli.require(path, "file", flag="--labels", variable="TRAINML_DATA_PATH")
        table = build_training_csv(args.images, args.labels, args.output)
    return 1 if table.attrs["internal_errors"] else 0


if __name__ == "__main__":
    cli.run(main)
