"""Writes a synthetic copy of the two JSON files of RSNA's own release in their full size, and
prints how long release.py takes to read them and how much memory.

    python -m tools.time_release
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import release

STUDIES, ANNOTATIONS = 30_000, 83_809
POSITIVE, BOXES, NOT_NORMAL, NORMAL = 7_106, 11_390, 12_788, 9_790  # of the truth
NAMELESS = 98  # annotations on a study, not on an image
UID = "1.2.276.0.7230010.3.1.{level}.8323329.{index}.1517874{index:06d}.{index:06d}"


def uids_of(index: int) -> dict[str, str]:
    """The UIDs of an image, as long as RSNA's."""
    return {f"{name}InstanceUID": UID.format(level=level, index=index)
            for level, name in enumerate(("Study", "Series", "SOP"), start=2)}


def make_files(folder: Path) -> tuple[Path, Path]:
    """Writes annotations and mapping into a folder, with RSNA's numbers of images and boxes."""
    rng = np.random.default_rng(0)
    images = [*range(POSITIVE), *rng.choice(POSITIVE, BOXES - POSITIVE)]
    notes = [(image, "L_opacity", True) for image in images]
    notes += [(POSITIVE + image, "L_not_normal" if image < NOT_NORMAL else "L_normal", False)
              for image in range(NOT_NORMAL + NORMAL)]
    readers = rng.integers(STUDIES, size=ANNOTATIONS - len(notes)).tolist()
    notes += [(image, "L_reader", image % 3 == 0) for image in readers]
    annotations = []
    for number, (image, label, has_box) in enumerate(notes):
        box = dict(zip(release.SIDES, rng.uniform(20, 500, 4).tolist())) if has_box else None
        annotations.append({
            "id": f"A_{number:06x}", **uids_of(image), "labelId": label, "width": 1024,
            "height": 1024, "data": box, "note": None, "annotationNumber": number,
            "createdById": "U_reader", "createdAt": "2018-07-20T15:33:30.000Z",
            "updatedAt": "2018-07-20T15:33:30.000Z"})
    for annotation in annotations[-NAMELESS:]:
        del annotation["SOPInstanceUID"]
    truth = {"L_opacity": release.OPACITY, "L_not_normal": "No Lung Opacity / Not Normal",
             "L_normal": "Normal"}
    groups = [{"name": release.TRUTH, "labels": [{"id": key, "name": name}
                                                 for key, name in truth.items()]},
              {"name": "Team 1", "labels": [{"id": "L_reader", "name": release.OPACITY}]}]
    studies = [{**uids_of(index), "number": index, "findings": ""} for index in range(STUDIES)]
    mapping = [{"subset_img_id": f"{index:08x}-0000-4000-8000-000000000000", **uids_of(index),
                "img_id": f"{1 + index // 3:08d}_{index % 3:03d}.png", "subset_group": "all",
                "orig_labels": ["No Finding"]} for index in range(STUDIES)]
    project = {"name": "synthetic", "labelGroups": groups,
               "datasets": [{"studies": studies, "annotations": annotations}]}
    paths = folder / "annotations.json", folder / "mapping.json"
    for path, document in zip(paths, (project, mapping)):
        path.write_text(json.dumps(document))
    return paths


def time_reading(annotations: Path, mapping: Path) -> None:
    """Reads both files and prints what was found, the seconds and the peak of memory (Linux)."""
    started, used = time.perf_counter(), time.process_time()
    labels = release.read_release(annotations, mapping)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    positive = labels.boxes[labels.boxes["Target"] == 1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    sizes = " and ".join(f"{path.stat().st_size / 1e6:.0f}" for path in (annotations, mapping))
    print(f"{sizes} MB: {len(labels.classes)} labelled images, {positive['patientId'].nunique()} "
          f"positive, {len(positive)} boxes, {len(set(labels.patients.values()))} patients; "
          f"{seconds:.1f} s ({used:.1f} of them of the processor), peak memory of the process "
          f"{peak:.2f} GB")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        time_reading(*map(Path, sys.argv[1:]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            paths = make_files(Path(folder))
            subprocess.run([sys.executable, "-m", "tools.time_release", *paths], check=True)
