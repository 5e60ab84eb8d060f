"""Trains the network of weights/pneumonia.pth.tar and writes that file.

    python -m tools.ship data/stage_2_train_images data/train.csv output/shipped

The training runs on one core, so a machine with more of them makes the same file; a run that is
complete in the folder is not repeated. The file holds the weights, what rebuilds the network, and
the thresholds: no path, id or image. Prints its size and its SHA-256, which docs/model-card.md
names.
"""

import argparse
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cli import SHIPPED
from metrics import Thresholds
from model import load_checkpoint, save_checkpoint

RECIPE = "--optimizer adamw --epochs 40 --width 16 --seed 1 --no-save-images --workers 1"


def ship(checkpoint: Path, path: Path) -> str:
    """Writes the file of a checkpoint's network; returns a line on it."""
    model, state = load_checkpoint(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, model, rescale_factor=state["rescale_factor"],
                    **Thresholds.of_checkpoint(state).stored())
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return f"{path.name}: {len(content) / 1e6:.2f} MB, SHA-256 {digest}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of the radiographs")
    parser.add_argument("labels", help="their train.csv")
    parser.add_argument("folder", type=Path, help="for the run")
    args = parser.parse_args(argv)
    checkpoint = args.folder / "final.pth.tar"
    if not checkpoint.exists():
        subprocess.run([sys.executable, "train.py", "--data", args.data, "--labels", args.labels,
                        "--save", args.folder, *RECIPE.split()], check=True,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(ship(checkpoint, SHIPPED))


if __name__ == "__main__":
    main()
