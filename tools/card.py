"""Prints the tables of docs/model-card.md, from the runs of a cross-validation.

    for fold in 0 1 2 3 4; do
      OMP_NUM_THREADS=1 python train.py --optimizer adamw --epochs 40 --width 16 --seed 1 \
        --no-save-images --workers 1 --folds 5 --fold $fold --save output/fold-$fold
    done
    python -m tools.card output/fold-*

Reads final.pth.tar, split.csv and metrics.json of each run, and the images and the train.csv that
it was trained on. Each network scores the fold that it has not seen, at the thresholds of its file.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

import metrics
from cli import IMAGE_SIDE, usable_cores
from data_processing import read_labels, read_split
from dataset import PneumoniaDataset
from engine import evaluate
from metrics import Thresholds
from model import choose_runtime, load_checkpoint
from radiographs import find_dicom_files

AGES, AGE_NAMES = (0, 20, 40, 60, 200), ("below 20", "20 to 39", "40 to 59", "60 and above")
AREAS = (0, 40_000, 80_000, 1024**2)  # original pixels
AREA_NAMES = ("below 40,000", "40,000 to 80,000", "above 80,000")
BINS = np.linspace(0, 1, 6)  # of the confidence, for calibration
WORST = 20  # images of each kind of error
HEADERS = ["patientId", "PatientSex", "PatientAge", "ViewPosition", "class"]


def score_fold(run, runtime):
    """A row for each image of the fold that a run left out, and the candidates of all for FROC."""
    arguments = json.loads((run / "metrics.json").read_text("utf-8"))["arguments"]
    data, table, fold = (arguments[name] for name in ("data", "labels", "fold"))
    model, state = load_checkpoint(run / "final.pth.tar", runtime.device)
    thresholds = Thresholds.of_checkpoint(state)
    files, labels = find_dicom_files(data)[0], read_labels(table)
    parts = read_split(run / "split.csv")
    files = {key: files[key] for key, part in sorted(parts.items()) if part == "test"}
    side = IMAGE_SIDE // state["rescale_factor"]
    dataset = PneumoniaDataset(files, labels, side=side, workers=usable_cores())
    evaluation = evaluate(model, dataset, range(len(dataset)), thresholds.alone(), runtime=runtime)
    print(f"fold {fold}: {len(dataset)} images, {thresholds}", flush=True)
    images = pd.DataFrame({
        "patientId": dataset.patient_ids, "fold": fold, "positive": evaluation.positive,
        "confidence": evaluation.confidences, "marked": evaluation.confidences >= thresholds.gate,
        "score": evaluation.scores[:, 0, 0], "true_boxes": evaluation.true_boxes,
        "areas": [boxes[:, 2] * boxes[:, 3] for boxes in dataset.boxes]})
    headers = pd.read_csv(table, dtype=str).drop_duplicates("patientId")[HEADERS]
    return images.merge(headers, on="patientId"), evaluation.candidates


def share(values):
    """Mean of booleans with its binomial standard error."""
    mean = values.mean()
    return f"{mean:.2f} +- {(mean * (1 - mean) / max(len(values), 1)) ** 0.5:.2f}"


def table_line(name, images):
    """Figures of some images as a line of a Markdown table."""
    scores, positive = images["score"].to_numpy(float), images["positive"].to_numpy(bool)
    confidences, rng = images["confidence"].to_numpy(), np.random.default_rng(0)
    drawn = rng.integers(len(images), size=(metrics.BOOTSTRAPS, len(images)))
    aucs = [metrics.roc_auc(confidences[sample], positive[sample]) for sample in drawn]
    marked = images["marked"].to_numpy(bool)
    return (f"| {name} | {len(images)} | {positive.sum()} | "
            f"{metrics.mean_average_precision(scores):.3f} +- "
            f"{metrics.bootstrap(scores).std():.3f} | "
            f"{metrics.roc_auc(confidences, positive):.3f} +- {np.nanstd(aucs):.3f} | "
            f"{share(marked[positive])} | {share(~marked[~positive])} |")


def print_groups(images):
    print("\n| images | number | with opacities | RSNA mAP | AUC | sensitivity | specificity |\n"
          "|---|---|---|---|---|---|---|")
    print(table_line("all", images))
    ages = pd.cut(pd.to_numeric(images["PatientAge"]), AGES, right=False, labels=AGE_NAMES)
    groups = {"view": images["ViewPosition"], "sex": images["PatientSex"], "age": ages,
              "fold": images["fold"]}
    for kind, values in groups.items():
        for value, part in images.groupby(values, observed=True):
            print(table_line(f"{kind} {value}", part))
    for value, part in images[~images["positive"]].groupby("class"):
        print(f"specificity, class {value}: {share(~part['marked'])} of {len(part)}")


def print_sizes(images):
    """Positive images by the size of their largest true box."""
    positive = images[images["positive"]]
    sizes = pd.cut(positive["areas"].map(max), AREAS, labels=AREA_NAMES)
    print("\n| largest true box, pixels | images | RSNA mAP of these | marked |\n|---|---|---|---|")
    for size, part in positive.groupby(sizes, observed=True):
        scores = part["score"].to_numpy(float)
        print(f"| {size} | {len(part)} | {scores.mean():.3f} +- "
              f"{metrics.bootstrap(scores).std():.3f} | {share(part['marked'])} |")


def print_froc(candidates, images):
    shares = metrics.froc(candidates, images["true_boxes"].sum(), len(images), metrics.FALSE_BOXES)
    print("\nFROC:", ", ".join(f"{value:.2f} at {rate:g}" for value, rate in
                               zip(shares, metrics.FALSE_BOXES)), "false boxes an image")


def print_calibration(images):
    print("\n| highest probability | images | mean | share with opacities |\n|---|---|---|---|")
    bins = pd.cut(images["confidence"], BINS, include_lowest=True)
    for interval, part in images.groupby(bins, observed=True):
        print(f"| {max(interval.left, 0):.1f} to {interval.right:.1f} | {len(part)} | "
              f"{part['confidence'].mean():.2f} | {share(part['positive'])} |")


def print_worst(images, show):
    """What the headers and labels say of the most confident errors."""
    ordered = images.sort_values("confidence")
    kinds = {"false positives": ordered[~ordered["positive"]].tail(WORST),
             "false negatives": ordered[ordered["positive"]].head(WORST)}
    for kind, worst in kinds.items():
        print(f"\n{len(worst)} worst {kind}: highest probability {worst['confidence'].min():.2f} "
              f"to {worst['confidence'].max():.2f}")
        for column in ("class", "ViewPosition", "PatientSex", "true_boxes"):
            print(f"  {column}: {worst[column].value_counts().to_dict()}")
        areas = np.concatenate(worst["areas"].tolist())
        print(f"  median age {pd.to_numeric(worst['PatientAge']).median():.0f}",
              f"median area of a true box {np.median(areas):.0f} pixels" if len(areas) else "")
        if show:
            print(" ", *worst["patientId"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of train.py --folds")
    parser.add_argument("--ids", action="store_true", help="print the ids of the worst images")
    args = parser.parse_args()
    runtime = choose_runtime("auto", "auto")
    tables, candidates = zip(*(score_fold(run, runtime) for run in args.runs))
    images = pd.concat(tables, ignore_index=True)
    print_groups(images)
    print_sizes(images)
    print_froc(np.concatenate(candidates), images)
    print_calibration(images)
    print_worst(images, args.ids)


if __name__ == "__main__":
    main()
