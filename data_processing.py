"""Builds train.csv and predict.csv from DICOM headers and label files.

    python data_processing.py                      # writes train.csv, one row per label row
    python data_processing.py --type prediction    # writes predict.csv, one row per image

Reads Kaggle's files or RSNA's own release. From the latter it also writes test.csv, the truth of
the challenge's test images, and instances.csv, which tells the file of each image.
"""

import io
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

import cli
import release
from radiographs import find_dicom_files, read_header, readings_of

INSTANCES = "instances.csv"
BOX_COLUMNS = ["x", "y", "width", "height"]
BEYOND = 5  # pixels by which a box may reach beyond its image; annotations do
SMALLEST_BOX = 2  # pixels a side; if all are smaller, they must be shares of the image
OTHER_KINDS = {  # first bytes of files named .csv that are something else
    rb"PK\x03\x04": "a zip archive or an Excel workbook", rb"\x1f\x8b": "a gzip file",
    rb"\xff\xfe|\xfe\xff|[^\0]{0,99}\0": "UTF-16 text",
}
HEADER_COLUMNS = ["patientId", "PatientSex", "PatientAge", "ViewPosition"]
TRAINING_COLUMNS = HEADER_COLUMNS + BOX_COLUMNS + ["Target", "class", "patient"]
# NIH's patients with several images in the challenge, by the first eight characters of patientId;
# from torchxrayvision's comparison of the pixels (scripts/CrossReferenceWithNIH, Apache 2.0)
NIH_PATIENTS = Path(__file__).with_name("nih_patients.csv")
KAGGLE_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
YEARS = {"": 1, "Y": 1, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
MAX_AGE = 120  # years; the five ages of 148 and above in the challenge are typing errors


class Labels(NamedTuple):
    """What a table says of each radiograph, by patient_id."""
    boxes: dict[str, np.ndarray]  # (n, 4) in original pixels
    views: dict[str, str] = {}  # "AP", "PA" or ""
    patients: dict[str, str] = {}  # the patient, where the table names one

    @property
    def positive(self) -> dict[str, bool]:
        """Whether each radiograph has a box."""
        return {key: len(boxes) > 0 for key, boxes in self.boxes.items()}

    def patient_of(self, patient_id: str) -> str:
        """The patient of a radiograph; its own id where nothing is known."""
        return self.patients.get(patient_id, patient_id)

    def among(self, ids: Collection[str]) -> "Labels":
        """The Labels of just these ids, in the table's order."""
        return Labels(*({key: values[key] for key in values if key in ids} for values in self))


def _read_cells(path):
    """All cells of a CSV file as stripped text, its header included; the index holds the line
    numbers. Empty lines are dropped and separators at the end of a line ignored.

    Cells are separated by commas, or by semicolons or tabs if the first line has more of these or
    Excel's `sep=` says so; numbers may then have decimal commas. Raises InputError for a file that
    is not text in UTF-8 and for a row longer than the first one.
    """
    try:
        content = Path(path).read_bytes()
        for start, kind in OTHER_KINDS.items():
            if re.match(start, content):
                raise cli.InputError(f"{path} is {kind}, not a table: save it as CSV in UTF-8")
        named, text = re.fullmatch(r"(?:sep=(.)\r?\n)?(.*)", content.decode("utf-8-sig"),
                                   flags=re.DOTALL).groups()
        separator = named or max(",;\t", key=text.partition("\n")[0].count)
        text = re.sub(rf"[{re.escape(separator)} \t\r]+$", "", text, flags=re.MULTILINE)
        cells = pd.read_csv(io.StringIO(text), header=None, dtype=str, na_filter=False,
                            sep=separator, skip_blank_lines=False, skipinitialspace=True)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = str(error).strip().rpartition("C error: ")[2]
        raise cli.InputError(f"{path} cannot be read as a table: {reason}") from None
    cells.index += 1 + bool(named)
    cells = cells.apply(lambda column: column.str.strip())
    if separator != ",":
        cells = cells.replace(r"^(-?\d+),(\d+)$", r"\1.\2", regex=True)
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
        raise cli.InputError(
            f"{path} has no column {', '.join(missing)}: it has {', '.join(table)}")
    if table.empty:
        raise cli.InputError(f"{path} has no rows: give a complete table")
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
        raise cli.InputError(
            f"{path}, line {line}: {column} '{table[column][line]}' {reason}; "
            "fix or remove the row")


def read_boxes(path: Path) -> pd.DataFrame:
    """Reads the label columns of a table: boxes in pixels, exact repeats of a row dropped.

    Raises InputError for a Target other than 0 or 1, for Target 1 without a box and 0 with one, for
    an image with both, for a box without an area, and for boxes that are shares of the image.
    """
    table = read_table(path, ["patientId", *BOX_COLUMNS, "Target"], ("ViewPosition", "patient"))
    repeated = table.duplicated()
    cli.warn(f"rows of {path} repeat others and are dropped", table["patientId"][repeated])
    table = table[~repeated]
    refuse_row(~table["Target"].isin([0, 1]), table, "Target", path, "is neither 0 nor 1")
    positive = table["Target"] == 1
    for column in BOX_COLUMNS:
        missing = positive & table[column].isna()
        refuse_row(missing, table, column, path, "is missing though Target is 1")
    contradicted = ~positive & table[BOX_COLUMNS].notna().any(axis=1)
    refuse_row(contradicted, table, "Target", path, "is 0, but the row has a box")
    both = set(table["patientId"][positive]) & set(table["patientId"][~positive])
    refuse_row(table["patientId"].isin(both), table, "patientId", path, "has rows of both targets")
    for column in ("width", "height"):
        refuse_row(positive & (table[column] <= 0), table, column, path, "is not above 0")
    if table.loc[positive, ["width", "height"]].max(axis=None) < SMALLEST_BOX:
        raise cli.InputError(
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
    named = table[table["patient"] != ""]
    return Labels(boxes, dict(zip(table["patientId"], table["ViewPosition"])),
                  dict(zip(named["patientId"], named["patient"])))


def check_boxes(boxes: Mapping[str, np.ndarray], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Compares boxes {patient_id: (n, 4)} with the original sizes (height, width) of their images.

    Raises InputError if in most images with boxes one lies more than BEYOND pixels outside: then
    labels and images are not in the same pixels, or the boxes not x, y, width and height. Warns
    of boxes outside in few images, and if all are in the upper left quarter of theirs.
    """
    corners = {key: (boxes[key][:, :2].min(axis=0), boxes[key][:, :2] + boxes[key][:, 2:],
                     np.array(size[::-1])) for key, size in sizes.items() if len(boxes[key])}
    outside = [f"{key}: {boxes[key].round().astype(int).tolist()} in {size[0]} x {size[1]} pixels"
               for key, (low, high, size) in corners.items()
               if (low < -BEYOND).any() or (high > size + BEYOND).any()]
    cli.refuse_if(
        len(outside) > len(corners) / 2,
        f"the boxes of {len(outside)} of {len(corners)} images reach beyond them, such as "
        f"{''.join(outside[:1])}: give x, y (of the upper left corner), width and height in the "
        "pixels of these images")
    cli.warn("boxes reach beyond their image", outside)
    if len(corners) >= 5 and all((high < size / 2).all() for _, high, size in corners.values()):
        print("warning: all boxes lie in the upper left quarter of their images: are the labels in "
              "the pixels of smaller ones?")


def read_split(path: Path) -> dict[str, str]:
    """The part of each image, {patient_id: part}, in the split.csv of a run; raises InputError as
    read_table does."""
    table = read_table(path, ["patientId", "split"])
    return dict(zip(table["patientId"], table["split"]))


def _header_row(path):
    header = read_header(path)
    for tag in ("PatientSex", "ViewPosition", "PatientID"):
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
    """Table of HEADER_COLUMNS, PatientID, Rows and Columns, one row per readable DICOM file in
    `folder`.

    Its attrs["internal_errors"] counts the files left out because of a fault of these
    scripts. Raises InputError if no file is readable, InternalError if such a fault is to blame.
    """
    files, skipped = find_dicom_files(folder)
    refuse_mixture(folder, files)
    rows, internal_errors = [], 0
    with readings_of(_header_row, files.values(), workers=cli.usable_cores(),
                     chunk_size=64) as readings:
        for (patient_id, path), reading in zip(files.items(), readings):
            if reading.problem:
                skipped.append((path, reading.problem))
                internal_errors += reading.internal_error
            else:
                rows.append({"patientId": patient_id, **reading.value})
    cli.warn("files are left out", [f"{path} {reason}" for path, reason in skipped])
    if internal_errors and not rows:
        raise cli.InternalError(f"no header in {folder} could be read")
    table = pd.DataFrame(rows, columns=[*HEADER_COLUMNS, "PatientID", "Rows", "Columns"])
    table.attrs["internal_errors"] = internal_errors
    return table


def refuse_mixture(folder: Path, files: Collection) -> None:
    """Raises InputError if sample_data.py made the folder but not all of its files."""
    try:
        made = json.loads((Path(folder).parent / cli.MARKER).read_text())
        expected = {cli.TRAIN_IMAGES: made["train"],
                    cli.TEST_IMAGES: made["test"]}[Path(folder).name]
    except (OSError, ValueError, KeyError, TypeError):
        return  # not a folder of sample_data.py
    if len(files) > expected:
        raise cli.InputError(
            f"{folder} holds {len(files)} files, but sample_data.py made {expected}: phantoms and "
            "radiographs are mixed; give each a folder of its own, named by TRAINML_DATA_PATH")


def build_training_csv(images: Path, labels: Path, output: Path) -> pd.DataFrame:
    """Joins the headers in folder `images` with the label tables in folder `labels` and writes
    `output`/train.csv.

    One row per label row that has an image; boxes in original pixels. Returns the table. Raises
    InputError for missing or broken tables.
    """
    labels_path, classes_path = (
        cli.require(Path(labels, name), "file", flag="--labels", variable="TRAINML_DATA_PATH")
        for name in (cli.LABELS, cli.CLASSES))
    boxes = read_boxes(labels_path).drop(columns="ViewPosition")
    classes = read_table(classes_path, ["patientId", "class"]).drop_duplicates()
    repeated = classes["patientId"].duplicated()
    refuse_row(repeated, classes, "patientId", classes_path, "has two different classes")
    headers = read_headers(images)
    known = known_patients(headers["patientId"], labels)
    table = _join(boxes, classes, headers.assign(patient=find_patients(headers, known)))
    cli.refuse_if(table.empty, f"no image in {images} has a label in {labels_path}: check --images "
                  "and --labels")
    return _write(table[TRAINING_COLUMNS], Path(output, "train.csv"))


def _join(boxes, classes, headers):
    """One row for each of `boxes` that has a header, with its class; what is left out is named."""
    ids, labelled = set(headers["patientId"]), set(boxes["patientId"])
    cli.warn("images without labels are left out", sorted(ids - labelled))
    cli.warn("labels without an image are left out", sorted(labelled - ids))
    cli.warn("labels have no class", sorted(labelled - set(classes["patientId"])))
    table = boxes.merge(headers, on="patientId", suffixes=(" given", ""))
    table = table.merge(classes, on="patientId", how="left")
    if "patient given" in table:
        table["patient"] = table["patient given"].where(table["patient given"] != "",
                                                        table["patient"])
    table = drop_boxes_outside(table).astype({"Target": int})
    table.attrs = headers.attrs
    return table


def build_release_csvs(images: Path, annotations: Path, mapping: Path, output: Path, *,
                       unseen_patients: bool = False) -> pd.DataFrame:
    """Joins the headers in folder `images` with the two JSON files of RSNA's own release, and
    writes train.csv, test.csv (both as build_training_csv does) and instances.csv into `output`.

    With `unseen_patients`, test.csv has no image of a patient who is in train.csv. Returns the
    table of train.csv. Raises InputError as release.read_release does.
    """
    labels = release.read_release(annotations, mapping)
    headers = read_headers(images)
    headers["patientId"] = headers["patientId"].map(lambda key: labels.instances.get(key, key))
    headers["patient"] = find_patients(headers, labels.patients)
    table = _join(labels.boxes, labels.classes, headers)
    cli.refuse_if(table.empty, f"no image in {images} has a label in {annotations}: check --images "
                  "and --labels")
    _compare_labels(labels.boxes, annotations.with_name(cli.LABELS))
    is_test = table["patientId"].isin(_test_ids(annotations.parent, labels.boxes["patientId"]))
    training, test = table[~is_test], table[is_test]
    seen = test["patient"].isin(training["patient"])
    print(f"test images: {test['patientId'].nunique()}, of them "
          f"{test.loc[seen, 'patientId'].nunique()} of patients who are in train.csv"
          f"{', which are left out' if unseen_patients else ''}")
    if unseen_patients:
        test = test[~seen]
    instances = pd.DataFrame(labels.instances.items(), columns=["SOPInstanceUID", "patientId"])
    _write(instances, Path(output, INSTANCES))
    _write(test[TRAINING_COLUMNS], Path(output, "test.csv"))
    return _write(training[TRAINING_COLUMNS], Path(output, "train.csv"))


def _test_ids(folder, ids):
    """Ids of the test images: those of Kaggle's sample submission if it is in the folder, else the
    challenge's."""
    submission = Path(folder, cli.SUBMISSION)
    if not submission.exists():
        return release.challenge_test_ids(ids)
    test_ids = set(read_table(submission, ["patientId"])["patientId"])
    cli.warn(f"ids of {submission} have no label in the release", sorted(test_ids - set(ids)))
    return test_ids


def _compare_labels(boxes, path):
    """Prints how many images have other labels than in Kaggle's table, if this lies beside."""
    if path.exists():
        here, there = (table.groupby("patientId")["Target"].agg(["max", "sum"])
                       for table in (boxes, read_boxes(path)))
        pairs = here.merge(there, on="patientId", suffixes=("", " there"))
        differ = pairs["max"] != pairs["max there"], pairs["sum"] != pairs["sum there"]
        print(f"of {len(pairs)} images that {path} names, {differ[0].sum()} have another Target "
              f"here, and {differ[1].sum()} another number of boxes")


def files_of_table(files: dict[str, Path], path: Path,
                   ids: Collection[str]) -> dict[str, Path]:
    """The files {patient_id: path} under the ids of the table at `path`, which has `ids`.

    RSNA's files are named by their SOPInstanceUID; their ids are in instances.csv, if that lies
    beside the table. Files of which it gives ids that the table does not have (train.csv and
    test.csv share one instances.csv) are left out, as are second files of an image; both are
    printed.
    """
    instances = Path(path).with_name(INSTANCES)
    if not instances.exists():
        return files
    table = read_table(instances, ["SOPInstanceUID", "patientId"])
    named = dict(zip(table["SOPInstanceUID"], table["patientId"]))
    found, others, second = {}, 0, []
    for name, file in files.items():
        patient_id = named.get(name, name)
        if name in named and patient_id not in ids:
            others += 1
        elif patient_id in found:
            second.append(file)
        else:
            found[patient_id] = file
    if others:
        print(f"{others} images that {instances} names are not in {path} and are not read")
    cli.warn("files show an image that another file shows, too, and are left out", second)
    return found


def known_patients(ids: Iterable[str], labels: Path) -> dict[str, str]:
    """NIH's number of the patient, {patientId: number}: of RSNA's mapping if it lies in the folder
    `labels`, else of the table here, which has the challenge's patients with several images."""
    for mapping in release.find_release(labels)["mapping"]:
        return release.patients_of_mapping(mapping)
    table = pd.read_csv(NIH_PATIENTS, dtype=str, index_col="patientId")["patient"]
    return {key: table[key[:8]] for key in ids if KAGGLE_ID.fullmatch(key) and key[:8] in table}


def patients_of_files(files: Mapping[str, Path], labels: Path) -> dict[str, str]:
    """The patients of files {patient_id: path}, {patient_id: patient}, as in build_training_csv."""
    with readings_of(_header_row, files.values(), workers=cli.usable_cores(),
                     chunk_size=64) as readings:
        names = [(reading.value or {}).get("PatientID") for reading in readings]
    headers = pd.DataFrame({"patientId": list(files), "PatientID": names})
    return dict(zip(files, find_patients(headers, known_patients(files, labels))))


def find_patients(headers: pd.DataFrame, known: Mapping[str, str]) -> pd.Series:
    """The patient of each image in a table of read_headers: the PatientID where it names several
    of the images, else the patient that is `known`, else the image's own id. Prints how many of
    each there are, but no PatientID."""
    ids, names = headers["patientId"], headers["PatientID"].astype(object)
    named = names.duplicated(keep=False) & names.notna()
    if named.any() and names.nunique() == 1:
        print("all images have the same PatientID, so it is not taken for a patient")
        named[:] = False
    numbers = ids.map(known).where(~named)
    patients = names.where(named).fillna(numbers).fillna(ids)
    print(f"{len(ids)} images of {patients.nunique()} patients: {named.sum()} images with a "
          f"PatientID that names several, {numbers.count()} with NIH's number, "
          f"{(~named & numbers.isna()).sum()} each taken for a patient of its own")
    return patients


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
    headers = read_headers(images)
    if headers.empty:
        print(f"no DICOM file in {images}, so the table is empty; predict.py does not need it")
    return _write(headers[HEADER_COLUMNS], Path(output, "predict.csv"))


def _write(table, path):
    with cli.atomic_write(path) as file:
        table.to_csv(file, index=False)
    print(f"{path}: {len(table)} rows, {table['patientId'].nunique()} images")
    return table


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_path("--images", "-i", kind="folder", help="folder of DICOM files",
                    variable="TRAINML_DATA_PATH",
                    part=release.image_folder())
    parser.add_path("--labels", "-l", kind="data", variable="TRAINML_DATA_PATH",
                    help="folder of Kaggle's two label tables or of RSNA's own release, or the "
                         "release's file of annotations")
    parser.add_path("--output", "-o", kind="output", help="folder for the CSV file",
                    variable="TRAINML_MODEL_PATH")
    parser.add_argument("--type", "-t", default="training",
                        choices=["training", "train", "prediction"],
                        help="train means training (default: %(default)s)")
    parser.add_argument("--unseen-patients", action="store_true",
                        help="leave images of patients who are in train.csv out of test.csv")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.type == "prediction":
        args.labels = None
    parser.check_paths(args)
    images, output = Path(args.images), Path(args.output)
    files = release.release_files(Path(args.labels)) if args.labels else None
    cli.refuse_if(args.unseen_patients and not files,
                  "--unseen-patients acts on RSNA's own release alone")
    if args.type == "prediction":
        table = build_prediction_csv(images, output)
    elif files:
        table = build_release_csvs(images, *files, output, unseen_patients=args.unseen_patients)
    else:
        table = build_training_csv(images, Path(args.labels), output)
    return 1 if table.attrs["internal_errors"] else 0


if __name__ == "__main__":
    cli.run(main)
