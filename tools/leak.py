"""Measures what it is worth to train on other images of the patients that a network is scored on.

    for seed in 1 2 3; do
      folder=output/leak-$seed
      python -m tools.leak tables data/train.csv $folder --seed $seed
      for kind in with without; do
        python train.py --data data/stage_2_train_images --labels $folder/$kind.csv --seed $seed \
          --optimizer adamw --epochs 10 --width 16 --no-save-images --save $folder/$kind
      done
    done
    python -m tools.leak scores data/stage_2_train_images output/leak-1 output/leak-2 output/leak-3

`tables` takes half of the images of each patient with several for test.csv. without.csv has all
images of the other patients; in with.csv some of these are replaced by the rest of the test
patients' images, as many with opacities and as many without. `scores` prints the table of
docs/experiments.md.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

import metrics
from data_processing import read_labels
from dataset import PneumoniaDataset
from engine import evaluate
from model import choose_runtime, load_checkpoint
from radiographs import find_dicom_files

KINDS = "with", "without"


def write_tables(train_csv, folder, seed):
    """test.csv, with.csv and without.csv in a folder, from a train.csv with the column patient."""
    table = pd.read_csv(train_csv, dtype=str, keep_default_na=False)
    images = table.groupby("patientId")[["patient", "Target"]].first()
    images = images.sample(frac=1, random_state=np.random.default_rng(seed))
    count = images.groupby("patient")["patient"].transform("size")
    position = images.groupby("patient").cumcount()
    test = images[position < count // 2]
    sisters, others = images[(position >= count // 2) & (count > 1)], images[count == 1]
    kept = []
    for target, group in others.groupby("Target"):
        replaced = sum(sisters["Target"] == target)
        if replaced > len(group):
            raise SystemExit(f"{replaced} images with Target {target} cannot be replaced: only "
                             f"{len(group)} are of other patients")
        kept.append(group[replaced:])
    ids = {"test": test.index, "with": [*pd.concat(kept).index, *sisters.index],
           "without": others.index}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in ids.items():
        rows = table[table["patientId"].isin(part)]
        rows.to_csv(folder / f"{name}.csv", index=False)
        positive = rows.loc[rows["Target"] == "1", "patientId"].nunique()
        print(f"{folder / name}.csv: {len(part)} images, {positive} with opacities, "
              f"{rows['patient'].nunique()} patients; images replaced: {len(sisters)}")


def score_folder(data, folder, runtime):
    """{kind: Evaluation} of both networks of a folder on its test.csv, and each image's patient."""
    labels = read_labels(folder / "test.csv")
    files = find_dicom_files(data)[0]
    dataset = PneumoniaDataset({key: files[key] for key in labels.boxes}, labels, workers=2)
    evaluations = {}
    for kind in KINDS:
        model, _ = load_checkpoint(folder / kind / "final.pth.tar", runtime.device)
        evaluations[kind] = evaluate(model, dataset, range(len(dataset)),
                                     metrics.Thresholds().alone(), runtime=runtime)
    return evaluations, np.array(dataset.patients)


def figures(evaluation, weights):
    """RSNA mAP and AUC at the default thresholds, each image counted `weights` (N,) times."""
    from sklearn.metrics import roc_auc_score

    scores = evaluation.scores_at(metrics.Thresholds().box, metrics.Thresholds().gate)
    counted = weights * ~np.isnan(scores)
    return np.array([counted @ np.nan_to_num(scores) / counted.sum(),
                     roc_auc_score(evaluation.positive, evaluation.confidences,
                                   sample_weight=weights)])


def differences(runs, weights):
    """(runs, 2) differences with - without in RSNA mAP and AUC; weights {patient: count}."""
    rows = []
    for evaluations, patients in runs:
        counts = np.array([weights[patient] for patient in patients], float)
        rows.append(figures(evaluations["with"], counts) - figures(evaluations["without"], counts))
    return np.array(rows)


def print_scores(data, folders):
    runtime = choose_runtime("auto", "auto")
    runs = [score_folder(data, Path(folder), runtime) for folder in folders]
    print("| images of the test patients in training | RSNA mAP, each run | AUC, each run |")
    print("|---|---|---|")
    for kind in KINDS:
        table = [figures(evaluations[kind], np.ones(len(patients)))
                 for evaluations, patients in runs]
        cells = [", ".join(f"{value:.3f}" for value in column) for column in zip(*table)]
        print(f"| {kind} | {' | '.join(cells)} |")
    names = sorted({patient for _, patients in runs for patient in patients})
    found = differences(runs, dict.fromkeys(names, 1))
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), metrics.BOOTSTRAPS)
    samples = [differences(runs, dict(zip(names, counts))).mean(0) for counts in drawn]
    for name, column, error in zip(("RSNA mAP", "AUC"), found.T, np.std(samples, axis=0)):
        seeds = column.std(ddof=1) / len(column) ** 0.5 if len(column) > 1 else float("nan")
        print(f"{name}, with - without: {column.mean():+.4f}; standard error {error:.4f} by "
              f"bootstrap over {len(names)} test patients, {seeds:.4f} over the seeds")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    tables = commands.add_parser("tables", help="write test.csv, with.csv and without.csv")
    tables.add_argument("labels", type=Path, help="train.csv with the column patient")
    tables.add_argument("folder", type=Path)
    tables.add_argument("--seed", type=int, default=1)
    scores = commands.add_parser("scores", help="score the networks trained on the tables")
    scores.add_argument("data", type=Path, help="folder of DICOM files")
    scores.add_argument("folders", nargs="+")
    args = parser.parse_args()
    if args.command == "tables":
        write_tables(args.labels, args.folder, args.seed)
    else:
        print_scores(args.data, args.folders)


if __name__ == "__main__":
    main()
