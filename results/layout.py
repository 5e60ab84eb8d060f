"""Where the files of a run lie in its folder."""

import os
from collections.abc import Mapping
from pathlib import Path

from cli import InputError, default_path

PICTURES = "images", "validation"  # folders, in which the results are the PNG files
RESULTS = (  # files and folders of training and prediction
    "logs", "curves.png", "scores.png", "report.html", "predictions.html", "predictions.png",
    "annotations.json", "submission.csv", "skipped.csv", "split.csv", "metrics.json",
    "predictions.json", "last.pth.tar", "loss.best.pth.tar", "prec.best.pth.tar", "final.pth.tar")


def result_paths(output: Path, data: Path) -> list[Path]:
    """What a search of `data` must leave out: `output` if it lies inside, else the results in
    it."""
    output, data = output.resolve(), data.resolve()
    if data in output.parents:
        return [output]
    folders = [output / name for name in PICTURES] if data == output else []
    pictures = [path for folder in folders for path in folder.rglob("*.png")]
    objects = [path for path in (output / "dicom").rglob("*.s[rc].dcm") if data == output]
    return [output / name for name in RESULTS] + pictures + objects


def report_names(folder: Path) -> tuple[str, str, str]:
    """Names of a prediction's page, its plot and its figures. Where train.py saves by default they
    are others than those of a training, which would replace them."""
    if folder.resolve() == Path(default_path("TRAINML_OUTPUT_PATH")).resolve():
        return "predictions.html", "predictions.png", "predictions.json"
    return "report.html", "scores.png", "metrics.json"


def picture_path(folder: Path, patient_id: str) -> Path:
    """`folder`/<patient_id>.png, its name in UTF-8 whatever the locale."""
    return folder / os.fsdecode(f"{patient_id}.png".encode())


def refuse_to_replace(files: Mapping[str, Path], folder: Path | None) -> None:
    """Raises InputError if the picture of one of the `files` {patient_id: path} would replace it in
    `folder`; None if there are no pictures."""
    for patient_id, path in files.items() if folder else ():
        picture = picture_path(folder, patient_id)
        if os.path.exists(picture) and os.path.samefile(picture, path):
            raise InputError(f"{path} would be replaced by its picture: give another folder with "
                             "--output, or --no-save-images")
