"""Reads RSNA's own release of the 2018 challenge, for which nobody needs an account.

https://www.rsna.org/education/ai-resources-and-training/ai-image-challenge/rsna-pneumonia-detection-challenge-2018
links three files: the images (a zip archive), the annotations of all of them (an export of MD.ai,
JSON) and a mapping (JSON) from these images to Kaggle's ids and to the patients of NIH's
ChestX-ray14. data_processing.py joins them into train.csv and test.csv.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cli import IMAGE_SIDE, LABELS, TRAIN_IMAGES, InputError, default_path, warn

TRUTH = "Calculated"  # label group of the adjudicated labels; the other groups are single readers'
OPACITY = "Lung Opacity"
CLASSES = {OPACITY, "No Lung Opacity / Not Normal", "Normal"}
SIDES = ["x", "y", "width", "height"]
MAPPED = ["subset_img_id", "img_id", "SOPInstanceUID"]  # Kaggle's id, NIH's file name, RSNA's name
# RSNA's name of each file, and what the first bytes of a renamed one hold
KINDS = {"annotations": ("pneumonia-challenge-annotations", rb'\s*\{.*"(labelGroups|datasets)"'),
         "mapping": ("pneumonia-challenge-dataset-mapping", rb'\s*\[.*"(subset_)?img_id"')}
HEAD = 4096  # bytes
# first eight characters of the ids of the challenge's 3,000 test images, unique among all 29,684
TEST_IDS = Path(__file__).with_name("test_ids.txt")


class Release(NamedTuple):
    """The labelled images; ids are Kaggle's or, of images that Kaggle did not have, RSNA's."""
    boxes: pd.DataFrame  # patientId, x, y, width, height (original pixels), Target; sorted by id
    classes: pd.DataFrame  # patientId, class
    patients: dict[str, str]  # {patientId: NIH patient}, of patients with several images
    instances: dict[str, str]  # {SOPInstanceUID, the file's stem: patientId}; unlabelled ones, too


def release_files(labels: Path) -> tuple[Path, Path] | None:
    """The files of annotations and mapping in the folder `labels`, or the file of annotations
    `labels` and the mapping beside it; None for a folder without annotations or with Kaggle's
    tables, which are read where both are.

    Raises InputError if there is not exactly one of each.
    """
    is_file = labels.suffix.lower() == ".json" and labels.is_file()
    found = find_release(labels.parent if is_file else labels)
    if is_file:
        found["annotations"] = [labels]
    elif Path(labels, LABELS).exists() or not found["annotations"]:
        return None
    for kind, paths in found.items():
        if len(paths) != 1:
            names = ", ".join(path.name for path in paths) or "none"
            raise InputError(f"one file of RSNA's {kind} is needed beside the other, but {labels} "
                             f"has {names}: README, Dataset staging, names the three files")
    return found["annotations"][0], found["mapping"][0]


def find_release(folder: Path) -> dict[str, list[Path]]:
    """The files of "annotations" and "mapping" in a folder, known by content or RSNA's names."""
    found = {kind: [] for kind in KINDS}
    for path in sorted(filter(Path.is_file, folder.glob("[!.]*.json"))):
        with open(path, "rb") as file:
            head = file.read(HEAD)
        for kind, (name, pattern) in KINDS.items():
            if path.name.startswith(name) or re.match(pattern, head, re.DOTALL):
                found[kind].append(path)
    return found


def image_folder() -> str:
    """Name of the folder of training images in $TRAINML_DATA_PATH: Kaggle's or, of RSNA's own
    release, the only one there, whose name varies; if there are several, "" for the whole."""
    data = default_path("TRAINML_DATA_PATH")
    if Path(data, TRAIN_IMAGES).exists() or not find_release(Path(data))["annotations"]:
        return TRAIN_IMAGES
    names = [path.name for path in Path(data).glob("[!.]*") if path.is_dir()]
    return names[0] if len(names) == 1 else ""


def read_release(annotations: Path, mapping: Path) -> Release:
    """Reads both files; raises InputError if they are broken or do not belong together."""
    truth, mapped = read_annotations(annotations), read_mapping(mapping)
    ids = mapped.dropna(subset="SOPInstanceUID").set_index("SOPInstanceUID")["patientId"]
    unknown = truth.loc[~truth["SOPInstanceUID"].isin(ids.index), "SOPInstanceUID"].unique()
    if len(unknown) == truth["SOPInstanceUID"].nunique():
        raise InputError(f"{mapping} names none of the images of {annotations}: give the mapping "
                         "of the same release")
    warn(f"labelled images are not in {mapping}, which tells the test images and the patients",
         unknown)
    truth["patientId"] = truth["SOPInstanceUID"].map(ids).fillna(truth["SOPInstanceUID"])
    truth = truth.sort_values("patientId", kind="stable", ignore_index=True)
    truth["Target"] = (truth["class"] == OPACITY).astype(int)
    return Release(truth[["patientId", *SIDES, "Target"]],
                   truth[["patientId", "class"]].drop_duplicates(),
                   _patients(mapped), dict(ids) | dict(zip(unknown, unknown)))


def patients_of_mapping(path: Path) -> dict[str, str]:
    """Reads {patientId: NIH patient} of RSNA's mapping, for patients with several images; numbers
    have no leading zeros. Raises InputError as read_mapping does."""
    return _patients(read_mapping(path))


def _patients(mapped):
    known = mapped.dropna(subset=["patientId", "patient"])
    known = known[known["patient"].duplicated(keep=False)]
    return dict(zip(known["patientId"], known["patient"]))


def challenge_test_ids(ids: Iterable[str]) -> set[str]:
    """Those of the ids that are Kaggle's of the challenge's test images."""
    starts = set(TEST_IDS.read_text().split())
    return {patient_id for patient_id in ids if patient_id[:8] in starts}


def read_annotations(path: Path) -> pd.DataFrame:
    """Table of the truth in MD.ai's export: SOPInstanceUID, class, x, y, width, height, a row for
    each box, or one with NaN, in the order of the file; boxes in original pixels.

    Raises InputError for another project, an image of two classes, and a box that has no area or
    lies in another frame than IMAGE_SIDE x IMAGE_SIDE.
    """
    project = _read_json(path)
    try:
        groups = [group for group in project["labelGroups"] if group["name"] == TRUTH]
        names = {label["id"]: str(label["name"]) for group in groups for label in group["labels"]}
        notes = [note for dataset in project["datasets"] for note in dataset["annotations"]
                 if note.get("labelId") in names]
        rows = [_row(note, names[note["labelId"]]) for note in notes]
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not an export of MD.ai with label groups and annotations: "
                         "give RSNA's annotations") from None
    if len(groups) != 1 or set(names.values()) != CLASSES or not rows:
        raise InputError(f"{path} is of another project: its label groups {TRUTH} ({len(groups)}) "
                         f"have {len(rows)} annotations of the labels {sorted(names.values())}; "
                         f"RSNA's (1) has the labels {sorted(CLASSES)}")
    columns = ["SOPInstanceUID", "class", *SIDES, "columns", "rows"]
    table = pd.DataFrame(rows, columns=columns, dtype=object)
    nameless = table["SOPInstanceUID"].isna()
    warn(f"annotations of {path} name no image and are left out", table["class"][nameless])
    table = table[~nameless]
    _check_boxes(table[table["class"] == OPACITY], path)
    classes = table[["SOPInstanceUID", "class"]].drop_duplicates()
    second = classes.loc[classes["SOPInstanceUID"].duplicated(), "SOPInstanceUID"]
    if len(second):
        raise InputError(f"{path}: image {second.iloc[0]} has two classes: download it again")
    table = table.drop(columns=["columns", "rows"]).drop_duplicates()
    return table.astype(dict.fromkeys(SIDES, float))


def _row(note, name):
    box = (note.get("data") or {}) if name == OPACITY else {}
    return (_text(note, "SOPInstanceUID"), name, *(box.get(side) for side in SIDES),
            note.get("width"), note.get("height"))


def _text(entry, key):
    return str(entry[key]) if entry.get(key) else None


def _check_boxes(table, path):
    numbers = table[[*SIDES, "columns", "rows"]].apply(pd.to_numeric, errors="coerce")
    good = np.isfinite(numbers[SIDES]).all(axis=1) & (numbers[["width", "height"]] > 0).all(axis=1)
    good &= (numbers[["columns", "rows"]] == IMAGE_SIDE).all(axis=1)
    if not good.all():
        image, _, *box, columns, rows = table[~good].iloc[0]
        raise InputError(f"{path}: image {image} has the box {box} in a frame {columns} x {rows} "
                         f"pixels; it must be {IMAGE_SIDE} x {IMAGE_SIDE}: download it again")


def read_mapping(path: Path) -> pd.DataFrame:
    """Table of RSNA's mapping: MAPPED, None where a key is missing, patientId (Kaggle's id or, if
    it is not known, the SOPInstanceUID) and patient (NIH's number without leading zeros, or NaN).

    Raises InputError for another file, and for an image or id that is named twice.
    """
    entries = _read_json(path)
    try:
        rows = [[_text(entry, key) for key in MAPPED] for entry in entries]
    except (TypeError, AttributeError):
        rows = []
    table = pd.DataFrame(rows, columns=MAPPED, dtype=object)
    if table["subset_img_id"].isna().all():
        raise InputError(f"{path} is not a list with subset_img_id: give RSNA's mapping")
    for column in ("subset_img_id", "SOPInstanceUID"):
        repeated = table.loc[table[column].notna() & table[column].duplicated(), column]
        if len(repeated):
            raise InputError(f"{path} has {column} {repeated.iloc[0]} twice: download it again")
    table["patientId"] = table["subset_img_id"].fillna(table["SOPInstanceUID"])
    table["patient"] = table["img_id"].str.extract(r"^0*(\d+)_")[0]
    return table


def _read_json(path: Path) -> Any:
    content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        text = content.strip()
        ends = not text or text[:1] in b"{[" and (
            text[-1:] not in b"}]" or getattr(error, "pos", 0) >= len(text))
        reason = "ends in the middle" if ends else f"is not JSON ({error})"
        raise InputError(
            f"{path} ({len(content):,} bytes) {reason}: download it again") from None
