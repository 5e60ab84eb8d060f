"""Finds the files of radiographs in folders and gives each its patient_id."""

import json
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from cli import InputError

from .dicom import NOT_DICOM, is_dicom, reason_of

# layout of the challenge; the marker is sample_data.py's
TRAIN_IMAGES, TEST_IMAGES = "stage_2_train_images", "stage_2_test_images"
MARKER = "synthetic.json"
DICOM_SUFFIXES = {"", ".dcm", ".dicom", ".dic", ".ima"}  # and numbers; other files are opened
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
PICTURES = "images", "validation"  # folders, in which the results are the PNG files
RESULTS = (  # of a run, not its input
    "logs", "curves.png", "scores.png", "report.html", "annotations.json",
    "submission.csv", "skipped.csv", "split.csv", "metrics.json", "last.pth.tar",
    "loss.best.pth.tar", "prec.best.pth.tar", "final.pth.tar")


def patient_id_of(path: Path, folder: Path | None = None) -> str:
    """The file's stem, or its path below `folder` without suffix.

    A trailing `.123` is part of a UID, not a suffix; bytes that are not UTF-8 are escaped.
    """
    name = path.relative_to(folder).as_posix() if folder else path.name
    stem, suffix = os.path.splitext(name)
    return _text(name if suffix[1:].isdigit() else stem)


def _text(name):
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def result_paths(output: Path, data: Path) -> list[Path]:
    """What a search of `data` must skip: `output` if it lies inside, else the results in it."""
    output, data = output.resolve(), data.resolve()
    if data in output.parents:
        return [output]
    folders = [output / name for name in PICTURES] if data == output else []
    pictures = [path for folder in folders for path in folder.rglob("*.png")]
    objects = [path for path in (output / "dicom").rglob("*.s[rc].dcm") if data == output]
    return [output / name for name in RESULTS] + pictures + objects


def find_dicom_files(
        folder: Path, leave_out: Iterable[Path] = (),
) -> tuple[dict[str, Path], list[tuple[Path, str]]]:
    """Searches `folder`, its sub-folders and linked folders, except hidden ones and `leave_out`.

    Returns files {patient_id: Path} and skipped [(Path, reason)]. Files with the same stem get
    their paths below `folder` as ids, which is printed. Only these files, and those with another
    kind's suffix, are opened.
    """
    found, skipped = _search(folder, leave_out)
    return name_files(found, folder), skipped


def _search(folder, leave_out):
    """Paths of what may be DICOM files, and what is skipped."""
    found, skipped, stems = [], [], defaultdict(list)
    for path in _walk(folder, leave_out, skipped):
        stems[patient_id_of(path)].append(path)
    for paths in stems.values():
        for path in paths:
            reason = _refusal(path, shared=len(paths) > 1)
            if reason:
                skipped.append((path, reason))
            else:
                found.append(path)
    return found, skipped


def find_radiographs(
        sources: Sequence[Path], leave_out: Iterable[Path] = (),
) -> tuple[dict[str, Path], list[tuple[Path, str]]]:
    """Takes the files among `sources` and searches the folders.

    Returns what find_dicom_files does. PNG, JPEG and TIFF images in a folder are taken only if it
    holds no DICOM files; otherwise they are copies, masks or documents, and their number is
    printed. Raises InputError if there are no files at all, and as refuse_mixture does.
    """
    found, skipped = [], []
    for source in sources:
        if source.is_dir():
            paths, left_out = _search_radiographs(source, leave_out)
            refuse_mixture(source, paths)
            found += paths
            skipped += left_out
        else:
            found.append(source)
    if not found and not skipped:
        raise InputError(f"no files in {', '.join(map(str, sources))}: give another with --data")
    skipped = list(dict.fromkeys(skipped))  # sources may overlap
    folders = [source if source.is_dir() else source.parent for source in sources]
    if len(folders) == 1:
        return name_files(found, folders[0]), skipped
    common = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    return name_files([Path(os.path.abspath(path)) for path in found], Path(common)), skipped


def _search_radiographs(folder, leave_out):
    found, skipped = _search(folder, leave_out)
    images, others = [], []
    for path, reason in skipped:
        if reason == NOT_DICOM and path.suffix.lower() in IMAGE_SUFFIXES:
            images.append(path)
        else:
            others.append((path, reason))
    if images and any(_refusal(path, shared=True) is None for path in found):
        print(f"{folder} holds DICOM files, so its PNG, JPEG and TIFF files are not read "
              f"({len(images)})")
        return found, others
    return found + images, others


def name_files(paths: Iterable[Path], folder: Path) -> dict[str, Path]:
    """Maps patient_id to path: the id is the stem or, if several paths share it, which is printed,
    the path below `folder`."""
    files, stems, alike = {}, defaultdict(list), []
    for path in dict.fromkeys(paths):
        stems[patient_id_of(path)].append(path)
    for stem, same in stems.items():
        if len(same) == 1:
            files[stem] = same[0]
        else:
            alike += same
    ids = Counter(patient_id_of(path, folder) for path in alike)
    for path in alike:
        patient_id = patient_id_of(path, folder)
        if ids[patient_id] > 1:  # in the same folder, with another suffix
            patient_id = _text(path.relative_to(folder).as_posix())
        while patient_id in files:  # "a.dcm" is also the stem of "a.dcm.dcm"
            patient_id += "_"
        files[patient_id] = path
    if alike:
        print(f"{len(alike)} files share their names with others: their ids are their paths below "
              f"{folder}, such as {patient_id}")
    return files


def refuse_mixture(folder: Path, files: Collection) -> None:
    """Raises InputError if sample_data.py made the folder but not all of its files."""
    try:
        made = json.loads((Path(folder).parent / MARKER).read_text())
        expected = {TRAIN_IMAGES: made["train"], TEST_IMAGES: made["test"]}[Path(folder).name]
    except (OSError, ValueError, KeyError, TypeError):
        return  # not a folder of sample_data.py
    if len(files) > expected:
        raise InputError(
            f"{folder} holds {len(files)} files, but sample_data.py made {expected}: phantoms and "
            "radiographs are mixed; give each a folder of its own, named by TRAINML_DATA_PATH")


def _walk(folder, leave_out, skipped):
    """Yields paths of files, searching each real folder once; adds unusable ones to `skipped`."""
    def unreadable(error: OSError) -> None:
        skipped.append((Path(error.filename), reason_of(error)))

    seen = {os.path.realpath(path) for path in leave_out} - {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        named = [name for name in folders if name.lower().endswith(".dcm")]
        skipped += [(Path(root, name), "is a folder") for name in named]
        for name in sorted(names):
            left_out = os.path.join(real, name) in seen
            if not (left_out or name.startswith(".") or name.upper() == "DICOMDIR"):
                yield Path(root, name)


def _refusal(path, shared):
    """Why this is not a DICOM file, None if it may be one; `shared`: another file has its stem."""
    suffix = path.suffix.lower()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "is not a regular file"
        if shared or (suffix not in DICOM_SUFFIXES and not suffix[1:].isdigit()):
            return None if is_dicom(path) else NOT_DICOM
    except OSError as error:
        gone = isinstance(error, FileNotFoundError) and path.is_symlink()
        return "is a link to nothing" if gone else reason_of(error)
    return None
