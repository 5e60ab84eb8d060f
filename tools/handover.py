"""Prints the tables of docs/experiments.md on which weights and thresholds a run hands over.

    for seed in 42 7; do for fold in 0 1 2; do
      python train.py --optimizer adamw --epochs 10 --train-threshold --no-save-images \
        --folds 3 --fold $fold --seed $seed --save output/seed-$seed-fold-$fold
    done; done
    python -m tools.handover output/seed-*-fold-*

    python sample_data.py --train 2000 --test 0 --seed 1000 --output data/phantoms
    python data_processing.py --images data/phantoms/stage_2_train_images \
      --labels data/phantoms --output data/phantoms
    python -m tools.handover --data data/phantoms/stage_2_train_images \
      --labels data/phantoms/train.csv --model output/last.pth.tar

Reads prec.best.pth.tar and last.pth.tar of each run, or one model and a labelled folder that it was
not trained on. Every rule chooses on some images and is scored on others.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

import metrics
from cli import IMAGE_SIDE
from data_processing import read_labels
from dataset import PneumoniaDataset
from model import choose_runtime, load_checkpoint
from radiographs import find_dicom_files

GATES, DEFAULT = metrics.GATE_THRESHOLDS.tolist(), (29, 16)  # indices of the default thresholds
DRAWS = 100  # random sets that thresholds are searched on


class Scored(NamedTuple):
    """One network's masks on one part of the images, as they are and multiplied by 0.5."""
    plain: metrics.Evaluation
    halved: metrics.Evaluation


def masks_of(model, dataset, runtime):
    batches = torch.arange(len(dataset)).split(16)
    return np.concatenate([runtime.predict_masks(model, dataset[batch.tolist()][0])
                           for batch in batches])


def score(masks, dataset):
    """Evaluation of masks (N, S, S) of probabilities at all box thresholds."""
    scores = [metrics.score_mask(mask, size, boxes, metrics.BOX_THRESHOLDS)
              for mask, size, boxes in zip(masks, dataset.original_sizes, dataset.boxes)]
    positive = np.array([len(boxes) > 0 for boxes in dataset.boxes])
    confidences = np.array([metrics.image_confidence(mask) for mask in masks])
    views = np.array(dataset.views)
    return metrics.Evaluation(float("nan"), metrics.BOX_THRESHOLDS, confidences, positive, views,
                              np.array(scores))


def score_model(path, ids, data, labels, runtime):
    """Scored of a checkpoint on images of a folder; all that the labels name if ids is None."""
    model, state = load_checkpoint(path, runtime.device)
    files, truth = find_dicom_files(data)[0], read_labels(labels)
    files = {key: files[key] for key in ids or sorted(truth.boxes)}
    side = IMAGE_SIDE // state["rescale_factor"]
    dataset = PneumoniaDataset(files, truth, side=side, workers=2)
    masks = masks_of(model, dataset, runtime)
    return Scored(score(masks, dataset), score(masks * np.float32(0.5), dataset))


def score_run(run, runtime):
    """{(checkpoint, part): Scored} of a run with --folds: both checkpoints on the validation and
    test images."""
    arguments = json.loads(Path(run, "metrics.json").read_text())["arguments"]
    with open(Path(run, "split.csv"), newline="") as file:
        split = {row["patientId"]: row["split"] for row in csv.DictReader(file)}
    results = {}
    for part in ("validation", "test"):
        ids = sorted(key for key, value in split.items() if value == part)
        for name in ("prec.best", "last"):
            path = Path(run, f"{name}.pth.tar")
            results[name, part] = score_model(path, ids, arguments["data"], arguments["labels"],
                                              runtime)
    return results


def rsna(evaluation, pair):
    scores = metrics.gate_scores(evaluation, GATES[pair[1]])[:, pair[0]]
    return metrics.mean_average_precision(scores)


def part_of(evaluation, images):
    return metrics.Evaluation(*evaluation[:2], *(values[images] for values in evaluation[2:]))


def joined(evaluations):
    columns = list(zip(*evaluations))[2:]
    return metrics.Evaluation(*evaluations[0][:2], *(np.concatenate(values) for values in columns))


def best_pair(evaluation):
    """The earlier rule: the best pair of the smoothed table, whatever it gains."""
    gated = [metrics.gate_scores(evaluation, gate) for gate in GATES]
    table = np.stack([metrics.mean_average_precision(scores) for scores in gated], axis=-1)
    smooth = ndimage.uniform_filter(table, 3, mode="nearest")
    return np.unravel_index(smooth.argmax(), table.shape)


RULES = {
    "defaults": lambda evaluation: DEFAULT,
    "best pair": best_pair,
    "proven pair": lambda evaluation: metrics.search_thresholds(evaluation, GATES, DEFAULT),
}


def random_sets(evaluation, size, rng):
    """Mean score of each rule, chosen on DRAWS random sets of `size` images and scored on the
    others."""
    scores = {name: [] for name in RULES}
    for _ in range(DRAWS):
        order = rng.permutation(len(evaluation.positive))
        chosen, others = part_of(evaluation, order[:size]), part_of(evaluation, order[size:])
        for name, rule in RULES.items():
            scores[name].append(rsna(others, rule(chosen)))
    return {name: float(np.mean(values)) for name, values in scores.items()}


def print_random_sets(title, evaluations, size):
    """One line: the rules' mean scores over several networks."""
    rng = np.random.default_rng(0)
    scores = [random_sets(evaluation, size, rng) for evaluation in evaluations]
    means = [f"{np.mean([score[name] for score in scores]):.4f}" for name in RULES]
    print(f"| {title} | {size} | {' | '.join(means)} |", flush=True)


def print_weights(runs):
    """Each run on its fold: both checkpoints, thresholds by each rule on its validation images."""
    table = {}
    for weights in ("prec.best", "last"):
        for rule, choose in RULES.items():
            table[weights, rule] = np.array([
                rsna(run[weights, "test"].plain, choose(run[weights, "validation"].plain))
                for run in runs])
    before = table["prec.best", "best pair"]
    print("| weights | thresholds | mean | each run | gain over the earlier rule |")
    print("|---|---|---|---|---|")
    for (weights, rule), scores in table.items():
        gains = scores - before
        error = gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        each = ", ".join(f"{score:.3f}" for score in scores)
        print(f"| {weights} | {rule} | {scores.mean():.4f} | {each} | "
              f"{gains.mean():+.4f} +- {error:.4f} |")


def print_thresholds(runs):
    """The rules for thresholds on the last weights' masks of the folds."""
    tests = [run["last", "test"] for run in runs]
    for size in (100, 250):
        print_random_sets("of each fold", [test.plain for test in tests], size)
    for size in (100, 250):
        print_random_sets("of each fold, times 0.5", [test.halved for test in tests], size)
    if len(runs) % 3 == 0:
        seeds = [joined([test.plain for test in tests[i:i + 3]]) for i in range(0, len(tests), 3)]
        print_random_sets("of three folds together", seeds, 700)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help="folders of train.py --folds")
    for flag in ("--model", "--data", "--labels"):
        parser.add_argument(flag, help="instead of runs, one checkpoint and a labelled folder")
    args = parser.parse_args()
    runtime = choose_runtime("auto", "auto")
    runs = [score_run(folder, runtime) for folder in args.runs]
    if runs:
        print_weights(runs)
    print(f"\n| masks | images searched | {' | '.join(RULES)} |\n|---|---|{'---|' * len(RULES)}")
    if runs:
        print_thresholds(runs)
    if args.model:
        scored = score_model(args.model, None, args.data, args.labels, runtime)
        images = len(scored.plain.positive)
        print_random_sets("of the labelled folder", [scored.plain], images // 2)


if __name__ == "__main__":
    main()
