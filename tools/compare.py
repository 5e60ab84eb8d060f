"""Compares kinds of runs of train.py on the same folds and seeds, from their metrics.json.

    python -m tools.compare output/width-64 output/width-32     # the first is the reference

Each argument is a folder of runs; prints a line of the Markdown table in docs/experiments.md for
each. Gains are paired by fold and seed, with their standard errors.
"""

import json
import sys
from pathlib import Path

import numpy as np

FIGURES = ("image_roc_auc", "image_roc_auc_AP", "image_roc_auc_PA")


def read_runs(folder):
    """{(fold, seed): content of metrics.json}"""
    runs = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*/metrics.json"))]
    return {(run["arguments"]["fold"], run["arguments"]["seed"]): run for run in runs}


def table_line(name, runs, reference):
    scores = {key: run["rsna_mean_average_precision"] for key, run in runs.items()}
    pairs = sorted(runs.keys() & reference.keys())
    gains = [scores[key] - reference[key]["rsna_mean_average_precision"] for key in pairs]
    gain = "-"
    if runs is not reference and len(gains) > 1:
        gain = f"{np.mean(gains):+.4f} +- {np.std(gains, ddof=1) / len(gains) ** 0.5:.4f}"
    table = np.array([[run[figure] for figure in FIGURES] for run in runs.values()], float)
    aucs = [f"{auc:.3f}" for auc in table.mean(0)]  # nan if undefined (None) in a run
    epoch = np.mean([run["seconds"]["train"] / len(run["history"]) for run in runs.values()])
    each = ", ".join(f"{scores[key]:.3f}" for key in sorted(scores, key=lambda key: key[::-1]))
    cells = [name, f"{np.mean(list(scores.values())):.4f}", each, gain, *aucs, f"{epoch:.0f}"]
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
