"""Turns DICOM headers and the two label tables of the challenge into the table that the other scripts read.

    python data_processing.py                      # writes train.csv, one row per label row
    python data_processing.py --type prediction    # writes predict.csv, one row per image
"""

import argparse
import re
from pathlib import Path

import pandas as pd

from dicom import INTERNAL_ERROR, find_dicom_files, read_files, read_header
from job import (InputError, InternalError, atomic_write, default_path, make_folder, require,
                 require_folder, run, usable_cores)

HEADER_COLUMNS = ["patientId", "PatientSex", "PatientAge", "ViewPosition"]
BOX_COLUMNS = ["x", "y", "width", "height"]
TRAINING_COLUMNS = HEADER_COLUMNS + BOX_COLUMNS + ["Target", "class"]
YEARS = {"": 1, "Y": 1, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
MAX_AGE = 120  # years; the five ages of 148 and above in the challenge are typing errors
NAMED = 5  # ids or files named in a warning; the rest are counted


def _header_row(path):
    header = read_header(path)
    return header | {"PatientSex": _text(header["PatientSex"]),
                     "PatientAge": _age(header["PatientAge"]),
                     "ViewPosition": _text(header["ViewPosition"])}


def _text(value):
    return str(value).strip() or None if value is not None else None


def _age(value):
    """Years from a bare number (`62`) or a DICOM age string (`062Y`, `006M`); None if 120 and above or unreadable."""
    match = re.fullmatch(r"(\d{1,9})([YMWD]?)", str(value).strip())
    age = int(match[1]) * YEARS[match[2]] if match else MAX_AGE
    return round(age, 2) if age < MAX_AGE else None


def read_headers(folder):
    """Table of HEADER_COLUMNS, Rows and Columns, one row per readable DICOM file in `folder`.

    Its attrs["internal_errors"] counts files left out because of a fault of our own. Raises
    InputError if there is no readable file, InternalError if that is our own fault.
    """
    files, skipped = find_dicom_files(folder)
    rows = []
    readings = read_files(_header_row, files.values(), workers=usable_cores(), chunk_size=64)
    for (patient_id, path), reading in zip(files.items(), readings):
        if reading.problem:
            skipped.append((path, reading.problem))
        else:
            rows.append({"patientId": patient_id, **reading.value})
    warn("left out, no readable DICOM file", [f"{path} ({reason})" for path, reason in skipped])
    internal_errors = sum(reason == INTERNAL_ERROR for _, reason in skipped)
    if internal_errors and not rows:
        raise InternalError(f"no header in {folder} could be read")
    if not rows:
        raise InputError(f"no DICOM file in {folder}: give the folder that holds the images with --images")
    table = pd.DataFrame(rows)
    table.attrs["internal_errors"] = internal_errors
    return table


def warn(what, items):
    """Prints a count and the first few of `items`; nothing if there are none."""
    items = [str(item) for item in items]
    if items:
        more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
        print(f"warning: {len(items)} {what}: {', '.join(items[:NAMED])}{more}")


def read_table(path, columns):
    """Reads a CSV with at least `columns`; raises InputError naming the file, and line and value where one is wrong.

    Text columns come stripped; x, y, width, height and Target as numbers. A byte order mark or Windows line ends may be
    there.
    """
    try:
        table = pd.read_csv(path, dtype=str, encoding="utf-8-sig", keep_default_na=False, skipinitialspace=True)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as a table: {error}") from None
    table.columns = table.columns.str.strip()
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}: it has {', '.join(table.columns)}")
    if table.empty:
        raise InputError(f"{path} has no rows: give a complete table")
    table = table[columns].apply(lambda column: column.fillna("").str.strip())
    _refuse(table["patientId"] == "", table, "patientId", path, "is empty")
    for column in set(BOX_COLUMNS + ["Target"]) & set(columns):
        numbers = pd.to_numeric(table[column].replace("", None), errors="coerce")
        _refuse((table[column] != "") & ~numbers.abs().lt(float("inf")), table, column, path, "is no finite number")
        table[column] = numbers
    return table


def _refuse(wrong, table, column, path, reason):
    """Raises InputError for the first row where `wrong` is true; line numbers count the head line as 1."""
    if wrong.any():
        row = wrong.idxmax()
        raise InputError(f"{path}, line {row + 2}: {column} '{table[column][row]}' {reason}; mend or remove the row")


def check_boxes(table, path):
    """Raises InputError for a Target other than 0 or 1, for Target 1 without a box, and for a box without an area."""
    _refuse(~table["Target"].isin([0, 1]), table, "Target", path, "is neither 0 nor 1")
    positive = table["Target"] == 1
    for column in BOX_COLUMNS:
        _refuse(positive & table[column].isna(), table, column, path, "is missing though Target is 1")
    for column in ("width", "height"):
        _refuse(positive & (table[column] <= 0), table, column, path, "is not above 0")


def build_training_csv(images, labels, output):
    """Joins the headers in folder `images` with the label tables in folder `labels` and writes `output`/train.csv.

    One row per label row whose image is there; boxes in original pixels. Returns the table. Raises InputError for
    missing or broken tables.
    """
    labels_path = Path(labels, "stage_2_train_labels.csv")
    classes_path = Path(labels, "stage_2_detailed_class_info.csv")
    boxes = read_table(labels_path, ["patientId"] + BOX_COLUMNS + ["Target"])
    check_boxes(boxes, labels_path)
    classes = read_table(classes_path, ["patientId", "class"]).drop_duplicates()
    _refuse(classes["patientId"].duplicated(), classes, "patientId", classes_path, "has two different classes")
    headers = read_headers(images)
    ids, labelled = set(headers["patientId"]), set(boxes["patientId"])
    warn("images without labels are left out", sorted(ids - labelled))
    warn("labels without an image are left out", sorted(labelled - ids))
    warn("labels have no class", sorted(labelled - set(classes["patientId"])))
    table = boxes.merge(headers, on="patientId").merge(classes, on="patientId", how="left")
    if table.empty:
        raise InputError(f"no image in {images} has a label in {labels_path}: check --images and --labels")
    outside = ((table[["x", "y"]] < 0).any(axis=1) | (table["x"] + table["width"] > table["Columns"].astype(float))
               | (table["y"] + table["height"] > table["Rows"].astype(float)))
    warn("boxes reach beyond their image and are clipped in training", table["patientId"][outside])
    table["Target"] = table["Target"].astype(int)
    table.attrs = headers.attrs
    return _write(table[TRAINING_COLUMNS], Path(output, "train.csv"))


def build_prediction_csv(images, output):
    """Writes `output`/predict.csv with one row per DICOM file in folder `images`; returns the table."""
    return _write(read_headers(images)[HEADER_COLUMNS], Path(output, "predict.csv"))


def _write(table, path):
    with atomic_write(path) as file:
        table.to_csv(file, index=False)
    print(f"{path}: {len(table)} rows, {table['patientId'].nunique()} images")
    return table


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--images", "-i", default=default_path("TRAINML_DATA_PATH", "stage_2_train_images"), help="folder of images")
    add("--labels", "-l", default=default_path("TRAINML_DATA_PATH"), help="folder of the two label tables")
    add("--output", "-o", default=default_path("TRAINML_MODEL_PATH"), help="folder for the CSV file")
    add("--type", "-t", default="training", choices=["training", "train", "prediction"], help="which table to write")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    require_folder(args.images, flag="--images", variable="TRAINML_DATA_PATH")
    make_folder(args.output, flag="--output", variable="TRAINML_MODEL_PATH")
    if args.type == "prediction":
        table = build_prediction_csv(args.images, args.output)
        return 1 if table.attrs["internal_errors"] else 0
    for name in ("stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"):
        require(Path(args.labels, name), flag="--labels", variable="TRAINML_DATA_PATH")
    table = build_training_csv(args.images, args.labels, args.output)
    return 1 if table.attrs["internal_errors"] else 0


if __name__ == "__main__":
    run(main)
