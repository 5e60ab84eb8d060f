"""Prints how the parts of a split compare, and how many of their images show a patient who is in
the training part, too.

    python -m tools.balance train.csv
    python -m tools.balance kaggle/stage_2_train_labels.csv    # needs no image
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

import dataset
from data_processing import find_patients, read_labels

SEEDS = range(10)


def read_patients(path):
    """The Labels of a table; patients of a table without that column are looked up by their ids."""
    labels = read_labels(Path(path))
    if labels.patients:
        return labels
    ids = pd.Series(list(labels.boxes))
    patients = find_patients(pd.DataFrame({"patientId": ids, "PatientID": None}))
    return labels._replace(patients=dict(zip(ids, patients)))


def print_part(name, part, nominal, labels):
    """One line: size against the nominal one, share of positive images, images and positive images
    whose patient is outside the part, too."""
    has_opacity = labels.positive
    outside = {labels.patient_of(key) for key in labels.boxes.keys() - part}
    leaked = np.array([labels.patient_of(key) in outside for key in part])
    positive = np.array([has_opacity[key] for key in part])
    share, whole = positive.mean(), np.mean(list(has_opacity.values()))
    print(f"| {name} | {len(part)} | {len(part) / nominal:.3f} | {share:.2%} | "
          f"{100 * (share - whole):+.2f} | {leaked.mean():.1%} | {leaked[positive].mean():.1%} |")


def main():
    labels = read_patients(sys.argv[1])
    images = len(labels.boxes)
    print("| part | images | of nominal | positive | points from the whole | with their patient "
          "outside | of the positive ones |\n|---|---|---|---|---|---|---|")
    image_wise = labels._replace(patients={})
    for name, found in (("an image a patient", image_wise), ("by patient", labels)):
        for seed in SEEDS:
            part = set(dataset.hold_out(found, seed))
            print_part(f"{name}, seed {seed}", part, images / dataset.HELD_OUT, labels)
    for folds in (3, 5):
        for number, part in enumerate(dataset.split_folds(labels, folds)):
            print_part(f"fold {number} of {folds}", set(part), images / folds, labels)


if __name__ == "__main__":
    main()
