"""Builds train.csv and predict.csv from DICOM headers and label files.

    python data_processing.py                      # writes train.csv, one row per label row
    python data_processing.py --type prediction    # writes predict.csv, one row per image
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import cli
from dicom import read_header
from folders import find_dicom_files, refuse_mixture
from labels import BOX_COLUMNS, read_boxes, read_table, refuse_row
from readers import INTERNAL_ERROR, read_files

TABLES = ("stage_2_train_labels.csv", "stage_2_detailed_class_info.csv")
HEADER_COLUMNS = ["patientId", "PatientSex", "PatientAge", "ViewPosition"]
TRAINING_COLUMNS = HEADER_COLUMNS + BOX_COLUMNS + ["Target", "class"]
YEARS = {"": 1, "Y": 1, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
MAX_AGE = 120  # years; the five ages of 148 and above in the challenge are typing errors


def _header_row(path):
    header = read_header(path)
    for tag in ("PatientSex", "ViewPosition"):
        header[tag] = str(header[tag] or "").strip() or None
    header["PatientAge"] = _age(header["PatientAge"])
    return header


def _age(value):
    """Years from a bare number (`62`) or a DICOM age string (`062Y`, `006M`); None if it is
    unreadable or at least MAX_AGE."""
    match = re.fullmatch(r"(\d{1,9})([YMWD]?)", str(value).strip())
    age = int(match[1]) * YEARS[match[2]] if match else MAX_AGE
    return round(age, 2) if age < MAX_AGE else None


def read_headers(folder: Path) -> pd.DataFrame:
    """Table of HEADER_COLUMNS, Rows and Columns, one row per readable DICOM file in `folder`.

    Its attrs["internal_errors"] counts the files left out because of a bug of ours. Raises
    InputError if no file is readable, InternalError if a bug of ours is to blame.
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
    cli.warn("files are left out", [f"{path} {reason}" for path, reason in skipped])
    internal_errors = sum(reason == INTERNAL_ERROR for _, reason in skipped)
    if internal_errors and not rows:
        raise cli.InternalError(f"no header in {folder} could be read")
    if not rows:
        raise cli.InputError(
            f"no DICOM file in {folder}: give the folder that holds the images with --images")
    table = pd.DataFrame(rows)
    table.attrs["internal_errors"] = internal_errors
    return table


def build_training_csv(images: Path, labels: Path, output: Path) -> pd.DataFrame:
    """Joins the headers in folder `images` with the label tables in folder `labels` and writes
    `output`/train.csv.

    One row per label row that has an image; boxes in original pixels. Returns the table. Raises
    InputError for missing or broken tables.
    """
    labels_path, classes_path = (Path(labels, name) for name in TABLES)
    boxes = read_boxes(labels_path).drop(columns="ViewPosition")
    classes = read_table(classes_path, ["patientId", "class"]).drop_duplicates()
    repeated = classes["patientId"].duplicated()
    refuse_row(repeated, classes, "patientId", classes_path, "has two different classes")
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
    """The table without boxes that lie wholly outside their image. An image that loses its last box
    is dropped with it, since it is not known to be free of opacities."""
    right, bottom = table["x"] + table["width"], table["y"] + table["height"]
    columns, rows = (pd.to_numeric(table[name], errors="coerce") for name in ("Columns", "Rows"))
    outside = (right <= 0) | (bottom <= 0) | (table["x"] >= columns) | (table["y"] >= rows)
    beyond = (table["x"] < 0) | (table["y"] < 0) | (right > columns) | (bottom > rows)
    cli.warn("boxes lie outside their image and are dropped, as are images left without a box",
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
    images = cli.require(args.images, "folder", flag="--images", variable="TRAINML_DATA_PATH")
    output = cli.require(args.output, "output", flag="--output", variable="TRAINML_MODEL_PATH")
    if args.type == "prediction":
        table = build_prediction_csv(images, output)
    else:
        labels = Path(args.labels)
        for name in TABLES:
            cli.require(labels / name, "file", flag="--labels", variable="TRAINML_DATA_PATH")
        table = build_training_csv(images, labels, output)
    return 1 if table.attrs["internal_errors"] else 0


if __name__ == "__main__":
    cli.run(main)
