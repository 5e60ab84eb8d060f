"""Trains the networks of weights/pneumonia.pth.tar, and puts them into that one file.

    python -m tools.ship data/stage_2_train_images data/train.csv output/shipped

Each network is a run of train.py on one core, so a machine with other cores makes the same file;
runs that are complete in the folder are not repeated. The file holds weights in half precision, the
configuration of the networks and the thresholds; no path, id or image. Prints its size and its
SHA-256, which docs/model-card.md names.
"""

import argparse
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cli import SHIPPED, batched, usable_cores
from metrics import Thresholds
from model import Ensemble, load_checkpoint, save_checkpoint

SEEDS = 1, 2
RECIPE = "--optimizer adamw --epochs 20 --width 16 --no-save-images --workers 1"
THRESHOLDS = Thresholds()  # docs/experiments.md: no others were proven better


def train(data: str, labels: str, folder: Path) -> list[Path]:
    """Trains one network for each of SEEDS; returns the paths of their checkpoints."""
    runs = {folder / f"seed-{seed}" / "final.pth.tar":
            [sys.executable, "train.py", "--data", data, "--labels", labels, *RECIPE.split(),
             "--seed", str(seed), "--save", str(folder / f"seed-{seed}")] for seed in SEEDS}
    missing = [command for path, command in runs.items() if not path.exists()]
    for commands in batched(missing, usable_cores()):
        processes = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
                     for command in commands]
        if any([process.wait() for process in processes]):
            raise SystemExit("a run failed; its lines are above")
    return list(runs)


def ship(checkpoints: Sequence[Path], path: Path) -> str:
    """Writes the file of these checkpoints' networks; returns a line on it."""
    networks, states = zip(*map(load_checkpoint, checkpoints))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, Ensemble(networks).half(), rescale_factor=states[0]["rescale_factor"],
                    **THRESHOLDS.stored())
    content = path.read_bytes()
    return (f"{path}: {len(content) / 1e6:.2f} MB, SHA-256 {hashlib.sha256(content).hexdigest()}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of the radiographs")
    parser.add_argument("labels", help="their train.csv")
    parser.add_argument("folder", type=Path, help="for the runs")
    args = parser.parse_args(argv)
    print(ship(train(args.data, args.labels, args.folder), SHIPPED))


if __name__ == "__main__":
    main()
