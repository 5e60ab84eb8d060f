"""Finds the files of radiographs in folders and gives each its patient_id."""

import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from .dicom import is_dicom, start_of
from .errors import NOT_DICOM, reason_of
from .pictures import other_kind

DICOM_SUFFIXES = {"", ".dcm", ".dicom", ".dic", ".ima"}  # and numbers; other files are opened
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff"}
Found = tuple[dict[str, Path], list[tuple[Path, str]]]  # {patient_id: path}, [(skipped, reason)]


def patient_id_of(path: Path, folder: Path | None = None) -> str:
    """The file's stem, or its path below `folder` without suffix.

    A trailing `.123` is part of a UID, not a suffix; bytes that are not UTF-8 are escaped.
    """
    name = _name_below(folder, path) if folder else path.name
    stem, suffix = os.path.splitext(name)
    return _printable(name if suffix[1:].isdigit() else stem)


def _name_below(folder, path):
    return Path(os.path.relpath(path, folder)).as_posix()


def _printable(name):
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def find_dicom_files(folder: Path, leave_out: Iterable[Path] = ()) -> Found:
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
            reason = _refusal(path, look_inside=len(paths) > 1)
            if reason:
                skipped.append((path, reason))
            else:
                found.append(path)
    return found, skipped


def find_radiographs(sources: Sequence[Path], leave_out: Iterable[Path] = ()) -> Found:
    """Takes the files among `sources` and searches the folders; returns what find_dicom_files does.

    PNG, JPEG and TIFF images in a folder are taken only if it holds no DICOM files; otherwise they
    are copies, masks or documents, and their number is printed.
    """
    found, skipped, folders = [], [], []
    for source in sources:
        paths, left_out = [source], []
        if source.is_dir():
            paths, left_out = _search_radiographs(source, leave_out)
        found += paths
        skipped += left_out
        folders.append(os.path.abspath(source if source.is_dir() else source.parent))
    # sources may overlap
    files = name_files({os.path.abspath(path): path for path in found}.values(),
                       Path(os.path.commonpath(folders)))
    return files, list(dict.fromkeys(skipped))


def _search_radiographs(folder, leave_out):
    found, skipped = _search(folder, leave_out)
    pictures, others = [], []
    for path, reason in skipped:
        if reason == NOT_DICOM and path.suffix.lower() in PICTURE_SUFFIXES:
            pictures.append(path)
        else:
            others.append((path, reason))
    if pictures and any(_refusal(path, look_inside=True) is None for path in found):
        print(f"{folder} holds DICOM files, so its PNG, JPEG and TIFF files are not read "
              f"({len(pictures)})")
        return found, others
    return found + pictures, others


def name_files(paths: Iterable[Path], folder: Path) -> dict[str, Path]:
    """Maps patient_id to path: the id is the stem or, if several paths share it, which is printed,
    the path below `folder`, with its suffix only where that tells files apart."""
    paths = list(paths)
    stems = Counter(map(patient_id_of, paths))
    files = {patient_id_of(path): path for path in paths if stems[patient_id_of(path)] == 1}
    alike = [path for path in paths if stems[patient_id_of(path)] > 1]
    below = Counter(patient_id_of(path, folder) for path in alike)
    for path in alike:
        patient_id = patient_id_of(path, folder)
        if below[patient_id] > 1:
            patient_id = _printable(_name_below(folder, path))
        while patient_id in files:  # "a.dcm" is also the stem of "a.dcm.dcm"
            patient_id += "_"
        files[patient_id] = path
    if alike:
        print(f"{len(alike)} files share their names with others: their ids are their paths below "
              f"{folder}, such as {patient_id}")
    return files


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


def _refusal(path, look_inside):
    """Why this is not a DICOM file, None if it may be one; without `look_inside`, files are opened
    only if they have another kind's suffix."""
    suffix = path.suffix.lower()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "is not a regular file"
        if look_inside or (suffix not in DICOM_SUFFIXES and not suffix[1:].isdigit()):
            start = start_of(path)
            return None if is_dicom(start) else other_kind(start) or NOT_DICOM
    except OSError as error:
        gone = isinstance(error, FileNotFoundError) and path.is_symlink()
        return "is a link to nothing" if gone else reason_of(error)
    return None
