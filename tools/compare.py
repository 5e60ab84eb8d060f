"""Compares kinds of runs of train.py on the same folds and seeds, from their metrics.json.

    python -m tools.compare output/width-64 output/width-32     # the first is the reference

Each argument is a folder of runs; prints a line of the Markdown table in docs/experiments.md for
each. Gains are paired by fold and seed, with their standard errors.
"""

import json
import sys
from pathlib import Path

import pandas as pd

SCORE = "rsna_mean_average_precision"
AUCS = ["image_roc_auc", "image_roc_auc_AP", "image_roc_auc_PA"]


def read_runs(folder):
    """A row of figures for each run in a folder, indexed by seed and fold."""
    runs = [json.loads(path.read_text()) for path in Path(folder).glob("*/metrics.json")]
    table = pd.json_normalize(runs).set_index(["arguments.seed", "arguments.fold"]).sort_index()
    table["epoch"] = table["seconds.train"] / table["history"].str.len()
    return table


def table_line(name, runs, reference):
    gains = (runs[SCORE] - reference[SCORE]).dropna()  # of the seeds and folds that both have
    gain = "-"
    if runs is not reference and len(gains) > 1:
        gain = f"{gains.mean():+.4f} +- {gains.sem():.4f}"
    each = ", ".join(f"{score:.3f}" for score in runs[SCORE])
    # nan if undefined (None) in a run
    aucs = [f"{auc:.3f}" for auc in runs[AUCS].astype(float).mean(skipna=False)]
    cells = [name, f"{runs[SCORE].mean():.4f}", each, gain, *aucs, f"{runs['epoch'].mean():.0f}"]
    return "| " + " | ".join(cells) + " |"


def main():
    folders = sys.argv[1:]
    reference = read_runs(folders[0])
    print("| runs | mean RSNA mAP | each | gain | AUC | AUC, AP | AUC, PA | seconds an epoch |")
    print("|---|---|---|---|---|---|---|---|")
    for folder in folders:
        runs = reference if folder == folders[0] else read_runs(folder)
        print(table_line(Path(folder).name, runs, reference))


if __name__ == "__main__":
    main()
