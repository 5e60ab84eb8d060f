"""Run by torchrun from test_scale.py, which compares what it writes with one process's results.

Takes a folder with batches.pt, start.pth.tar and study.pt. Trains on the parts of the batches that
fall to this process, evaluates the start weights, and writes result.pt.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

import parallel
import train
from dataset import PneumoniaDataset
from engine import evaluate, train_one_epoch
from metrics import Grid
from model import load_checkpoint

# at the default rate 20 steps amplify the last bits of a sum in another order to 4e-4
FLAGS = ["--optimizer", "sgd", "--lr", "0.01", "--width", "4", "--rescale-factor", "16",
         "--epochs", "1"]
GRID = Grid([0.04, 0.05], [0.0, 0.1])


class Batches(list):
    """A loader of batches that are there already."""
    sampler, dataset = SimpleNamespace(batch_size=4), range(80)


def build_training(start, batches, runtime):
    """A training from the start weights on batches that are augmented already."""
    args = train.parse_args(FLAGS)
    training = train.build_training(load_checkpoint(start)[0], batches, args, runtime)
    training.augmentation = lambda images, masks: (images, masks)
    return training


def open_study(path):
    """The data set of a file of paths and labels."""
    study = torch.load(path, weights_only=False)
    return PneumoniaDataset(study["files"], study["labels"], side=64)


def main(folder):
    runtime = parallel.join("cpu", "fp32")
    dataset = parallel.once(lambda: open_study(folder / "study.pt"), runtime)
    start = folder / "start.pth.tar"
    evaluation = evaluate(load_checkpoint(start)[0], dataset, range(len(dataset)),
                          GRID, runtime=runtime, batch_size=3)
    images, masks = torch.load(folder / "batches.pt")  # (steps, parts, B, 1, S, S)
    own = Batches(zip(images[:, runtime.rank], masks[:, runtime.rank]))
    training, losses = build_training(start, own, runtime), []
    train_one_epoch(training, lambda _, values, rate: losses.extend(values))
    ids = parallel.gather([dataset.patient_ids], runtime)
    states = parallel.gather([training.model.state_dict()], runtime)
    if runtime.rank == 0:
        torch.save({"losses": losses, "states": states, "ids": ids,
                    "evaluation": tuple(evaluation)}, folder / "result.pt")
    return 0


if __name__ == "__main__":
    parallel.run(lambda: main(Path(sys.argv[1])))
