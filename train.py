"""Trains the U-Net on the boxes in train.csv and scores it on held-out radiographs.

    python train.py --debug --optimizer adamax                        # does everything work?
    python train.py --optimizer adamw --epochs 10 --train-threshold   # a real run
    python train.py --checkpoint output/last.pth.tar                  # continues a stopped run
    python train.py --folds 3 --fold 0                                # cross-validation

Reads DICOM files and train.csv. Writes checkpoints, report.html and curves.png, annotated images in
validation/, TensorBoard logs, split.csv and metrics.json below --save.
"""

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import cli
import parallel
from dataset import PneumoniaDataset, find_labelled, load_parts, split
from engine import Training, evaluate, train_one_epoch, training_loader
from metrics import Thresholds, choose_thresholds, summarize
from model import PneumoniaUNET, Runtime, choose_runtime, load_checkpoint
from results import CURVE_THRESHOLDS, IMAGE_SIZE, Records, check_disk, overlays

OPTIMIZERS = {  # class, devices with a fused form since PyTorch 2.6, default overrides
    "adam": (torch.optim.Adam, ("cpu", "cuda"), {"lr": 5e-4}),
    "adamw": (torch.optim.AdamW, ("cpu", "cuda"), {"lr": 5e-4, "weight_decay": 0.01}),
    "adamax": (torch.optim.Adamax, (), {"lr": 1e-3}),
    "sgd": (torch.optim.SGD, ("cpu", "cuda"), {"lr": 0.05, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, ("cpu",), {"lr": 0.05, "initial_accumulator_value": 0.1}),
}
WARMUP = 0.1  # share of the steps in which the learning rate rises
DEBUG_EPOCHS, DEBUG_STEPS, DEBUG_VALIDATION_STEPS, DEBUG_IMAGES = 2, 50, 10, 100
LARGEST_SEED = 10**9  # PyTorch takes 64 bits, of which Training.seed_epoch needs some
SHOWN, SHOWN_SIZE = 4, 512  # validation images in TensorBoard every epoch; their longest side
# flags that a continued run does not inherit, and those that it may change
PATH_FLAGS = ("data", "labels", "save", "checkpoint", "device", "workers")
CHANGEABLE = ("epochs", "train_threshold", "save_images", "box_threshold", "gate_threshold",
              "precision")


class Setup(NamedTuple):
    """What main builds before the first step."""
    training: Training
    dataset: PneumoniaDataset
    parts: dict[str, list[int]]  # indices of the images of each part
    thresholds: Thresholds  # given by flags, or the defaults
    arguments: dict[str, Any]  # as plain values

    @property
    def validation(self) -> list[int]:
        """Indices of the images that are scored after every epoch; fewer with --debug."""
        limit = DEBUG_VALIDATION_STEPS * self.arguments["batch_size"]
        return self.parts["validation"][:limit if self.arguments["debug"] else None]

    @property
    def scored(self) -> list[int]:
        """Indices of the images that are scored at the end: the fold's if there is one."""
        return self.parts.get("test", self.parts["validation"])

    @property
    def shown(self) -> list[int]:
        """Indices of the validation images with opacities that TensorBoard shows."""
        return [index for index in self.validation if len(self.dataset.boxes[index])][:SHOWN]

    @property
    def sizes(self) -> dict[str, int]:
        """Counts of images, as metrics.json names them."""
        parts = {f"{name}_images": len(part) for name, part in self.parts.items()}
        return {**parts, "skipped_images": len(self.dataset.skipped),
                "scored_images": len(self.scored)}


# Arguments


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("files").add_argument
    add("--data", "-d", default=cli.default_path("TRAINML_DATA_PATH", "stage_2_train_images"),
        help="folder of DICOM files (default: %(default)s)")
    add("--labels", "-l", default=cli.default_path("TRAINML_MODEL_PATH", "train.csv"),
        help="train.csv, as data_processing.py writes it (default: %(default)s)")
    add("--save", default=cli.default_path("TRAINML_OUTPUT_PATH"),
        help="folder for checkpoints, images, logs and metrics (default: %(default)s)")
    add("--checkpoint", help="last.pth.tar of a run to continue, or weights to start from")
    add("--save-images", default=True, action=cli.Switch,
        help="write annotated images of the radiographs scored at the end (default: on)")
    add_run_options(parser.add_argument_group("the run").add_argument)
    add_recipe_options(parser.add_argument_group("optimizer and network").add_argument)
    parser.add_runtime_options(batch_size=8, rescale_factor=4)
    return parser


def add_run_options(add: Callable) -> None:
    """Flags on how long a run is and what it is scored on."""
    add("--epochs", "-e", type=cli.bounded(1, math.inf, int), default=2,
        help="passes over the training images (default: %(default)s)")
    add("--debug", default=False, action=cli.Switch,
        help="a short run: 2 epochs of 50 steps, 100 images scored, no search (default: off)")
    add("--seed", "-s", type=cli.bounded(0, LARGEST_SEED, int), default=42,
        help="random seed (default: %(default)s)")
    add("--folds", type=cli.bounded(2, math.inf, int),
        help="cross-validation: number of folds, one of which is left out and scored")
    add("--fold", type=cli.bounded(0, math.inf, int), help="the fold that is left out, from 0")
    add("--train-threshold", default=False, action=cli.Switch,
        help="search the two thresholds on the validation images (default: off)")
    add("--box-threshold", "--bt", type=cli.bounded(0, 1), default=Thresholds().box,
        help="mask probability above which a pixel belongs to a box, 0 to 1 (default: %(default)s)")
    add("--gate-threshold", "--gt", type=cli.bounded(0, 1), default=Thresholds().gate,
        help="highest probability below which an image has no boxes, 0 to 1 (default: %(default)s)")


def add_recipe_options(add: Callable) -> None:
    """The flags of optimizer and network."""
    above_0 = cli.bounded(1e-30, math.inf)
    add("--optimizer", "-o", default="adam", choices=list(OPTIMIZERS),
        help="one of PyTorch's optimizers (default: %(default)s)")
    add("--learning-rate", "--lr", type=above_0,
        help=f"peak of the learning rate, above 0 (default: {_defaults('lr')})")
    add("--learning-rate-decay", "--lrd", type=cli.bounded(0, 1), default=0.01,
        help="share of the peak left at the end, 0 to 1 (default: %(default)s)")
    add("--momentum", "-m", type=cli.bounded(0, 1),
        help=f"SGD momentum, 0 to 1 (default: {_defaults('momentum')})")
    add("--eps", type=above_0,
        help="term in the optimizer's denominator, not for sgd (default: PyTorch's)")
    add("--weight-decay", "--wd", type=cli.bounded(0, math.inf),
        help=f"weight decay, 0 or more (default: {_defaults('weight_decay')}, else 0)")
    add("--width", type=cli.bounded(2, 512, int), default=32,
        help="channels at the U-Net's first level, 2 to 512 (default: %(default)s)")
    add("--bn-momentum", type=cli.bounded(0, 1), default=0.1,
        help="share of a batch in BatchNorm's running statistics, 0 to 1 (default: %(default)s)")
    add("--bn-eps", type=above_0, default=1e-5,
        help="term in BatchNorm's denominator, above 0 (default: %(default)s)")
    add("--alpha-leaky", "--al", type=cli.bounded(0, math.inf), default=0.03,
        help="negative slope of LeakyReLU, 0 or more (default: %(default)s)")


def _defaults(key):
    values = {name: options.get(key) for name, (*_, options) in OPTIMIZERS.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def parse_args(argv: Sequence[str] | None = None,
               ) -> tuple[argparse.Namespace, PneumoniaUNET | None, dict]:
    """Returns the arguments, the model of the --checkpoint file or None, and the rest of that file
    if it belongs to a run to continue, else {}.

    If a run continues, its flags are the defaults. Raises InputError as check_args does, and for a
    flag that the run to continue does not allow.
    """
    parser, model, state = make_parser(), None, {}
    args = parser.parse_args(argv)
    if args.checkpoint:
        path = cli.require(args.checkpoint, "file", flag="--checkpoint")
        model, checkpoint = load_checkpoint(path)
        parser.set_defaults(width=model.config["width"])
        if "optimizer" in checkpoint:
            state = checkpoint
            inherited = state["args"].keys() - PATH_FLAGS
            parser.set_defaults(**{key: state["args"][key] for key in inherited})
        args = parser.parse_args(argv)
    if state:
        check_continued(args, state)
    check_args(args)
    if args.learning_rate is None:
        *_, defaults = OPTIMIZERS[args.optimizer]
        args.learning_rate = defaults["lr"]
    if args.debug:
        args.epochs, args.train_threshold = min(args.epochs, DEBUG_EPOCHS), False
    return args, model, state


def check_continued(args: argparse.Namespace, state: dict) -> None:
    """Raises InputError for another recipe than that of the run to continue, or fewer epochs."""
    for key, value in state["args"].items():
        flag, given = f"--{key.replace('_', '-')}", getattr(args, key)
        _refuse_if(key not in PATH_FLAGS + CHANGEABLE and given != value,
                   f"{flag} {given}: the run to continue has {value}; leave the flag out")
    done = len(state["history"])
    _refuse_if(args.epochs < done, f"--epochs {args.epochs}: the run to continue has done {done}; "
               f"give {done} or more")


def check_args(args: argparse.Namespace) -> None:
    """Raises InputError for flags that would have no effect or do not go together."""
    _refuse_if(args.momentum is not None and args.optimizer != "sgd",
               "--momentum acts on --optimizer sgd alone")
    _refuse_if(args.eps is not None and args.optimizer == "sgd",
               "--eps has no effect on --optimizer sgd")
    _refuse_if((args.folds is None) != (args.fold is None),
               "--folds and --fold go together: give both or neither")
    if args.folds is not None:
        _refuse_if(args.fold >= args.folds, f"--fold {args.fold}: with --folds {args.folds} the "
                   f"last fold is {args.folds - 1}")


def _refuse_if(wrong, message):
    if wrong:
        raise cli.InputError(message)


# What a run is built from


def build_data(args: argparse.Namespace) -> tuple[PneumoniaDataset, dict[str, list[int]]]:
    """The data set and the indices of its parts, which --debug makes smaller."""
    limits = {"training": DEBUG_STEPS * args.batch_size, "validation": DEBUG_IMAGES,
              "test": DEBUG_IMAGES}
    labelled = find_labelled(Path(args.data), Path(args.labels), Path(args.save))
    ids = split(labelled.opacities, seed=args.seed, folds=args.folds, fold=args.fold,
                limits=limits if args.debug else {})
    return load_parts(labelled, ids, rescale_factor=args.rescale_factor, workers=args.workers)


def build_model(args: argparse.Namespace, model: PneumoniaUNET | None = None) -> PneumoniaUNET:
    """A new network, or the checkpoint's if the flags fit it; raises InputError if not."""
    if model is None:
        return PneumoniaUNET.for_images(
            args.rescale_factor, width=args.width, alpha_leaky=args.alpha_leaky,
            bn_eps=args.bn_eps, bn_momentum=args.bn_momentum)
    for key, value in model.config.items():
        _refuse_if(getattr(args, key, value) != value, f"the checkpoint's network has {key} "
                   f"{value}: give --{key.replace('_', '-')} {value}")
    model.check_side(args.rescale_factor, args.batch_size)
    return model


def build_optimizer(model: torch.nn.Module, args: argparse.Namespace,
                    total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer, in its fused form (one kernel for all weights) if the model's device has it,
    and its schedule: linear warm-up, then a cosine down to a share of the peak."""
    optimizer_class, fused_devices, options = OPTIMIZERS[args.optimizer]
    given = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "eps": args.eps,
             "momentum": args.momentum}
    options = options | {key: value for key, value in given.items() if value is not None}
    if next(model.parameters()).device.type in fused_devices:
        options["fused"] = True
    optimizer = optimizer_class(model.parameters(), **options)
    warmup = math.ceil(WARMUP * total_steps)

    def lr_factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min((step - warmup) / max(total_steps - warmup, 1), 1)
        cosine = (1 + math.cos(math.pi * done)) / 2
        return args.learning_rate_decay + (1 - args.learning_rate_decay) * cosine
    return optimizer, LambdaLR(optimizer, lr_factor)


def build_training(model: PneumoniaUNET, loader: DataLoader, args: argparse.Namespace,
                   runtime: Runtime) -> Training:
    """Moves the model to the device and builds all that its training needs."""
    model = model.to(runtime.device, memory_format=torch.channels_last)
    optimizer, scheduler = build_optimizer(model, args, args.epochs * len(loader))
    return Training(model, optimizer, scheduler, loader, runtime)


def build_records(setup: Setup) -> contextlib.AbstractContextManager[Records | None]:
    """The Records of the run in --save; None in all processes but the first."""
    if setup.training.runtime.rank > 0:
        return contextlib.nullcontext()
    records = Records(Path(setup.arguments["save"]), setup.arguments, setup.training)
    records.begin(setup.dataset, setup.parts)
    return records


def build_thresholds(args: argparse.Namespace) -> Thresholds:
    """The Thresholds of --box-threshold and --gate-threshold."""
    pair = args.box_threshold, args.gate_threshold
    source = "defaults" if pair == Thresholds()[:2] else "given by flags"
    return Thresholds(*pair, source)


def check_paths(args: argparse.Namespace) -> Path:
    """The folder --save, which must be writable; the other paths must exist."""
    cli.require(args.data, "folder", flag="--data", variable="TRAINML_DATA_PATH")
    cli.require(args.labels, "file", variable="TRAINML_MODEL_PATH",
                flag="--labels (python data_processing.py writes one)")
    return cli.require(args.save, "output", flag="--save", variable="TRAINML_OUTPUT_PATH")


# The story of a run


def fit(setup: Setup, records: Records | None) -> None:
    """Trains the epochs that are not in the training's history yet, and adds them to it."""
    training, thresholds, epochs = setup.training, setup.thresholds, setup.arguments["epochs"]
    log = records.log_steps if records else lambda *_: None
    for epoch in range(len(training.history) + 1, epochs + 1):
        training.seed_epoch(setup.arguments["seed"], epoch)
        started = time.monotonic()
        train_loss = train_one_epoch(training, log)
        images = min(len(training.loader) * training.loader.sampler.batch_size,
                     len(setup.parts["training"]))
        speed = images / (time.monotonic() - started)

        evaluation = evaluate(training.model, setup.dataset, setup.validation, training.runtime,
                              [thresholds.box], batch_size=setup.arguments["batch_size"])
        figures = summarize(evaluation, thresholds.gate)
        scores = {name: figures[name] for name in ("loss", "rsna", "total", "auc")}
        learning_rate = training.scheduler.get_last_lr()[0]
        training.history.append(
            {"train_loss": train_loss, **scores, "learning_rate": learning_rate})
        if records:
            records.save_epoch(thresholds)
            records.log_epoch(evaluation, speed, overlays(
                training.model, setup.dataset, setup.shown, training.runtime, thresholds,
                image_size=SHOWN_SIZE))
        print(f"epoch {epoch}/{epochs}: loss {train_loss:.4f}, validation loss "
              f"{scores['loss']:.4f}, RSNA mAP {scores['rsna']:.4f}, total AP "
              f"{scores['total']:.4f}, AUC {scores['auc']:.4f}, {speed:.1f} images/s")


def hand_over(setup: Setup, records: Records | None) -> tuple[Thresholds, dict[str, float]]:
    """Writes final.pth.tar: the last epoch's weights and the thresholds to use, searched on the
    validation images with --train-threshold. Scores and draws the images `setup.scored`; returns
    the thresholds and their figures.

    The learning rate ends near 0, so the last weights are the ones that the run was made for; the
    best epoch on a small validation set is mostly luck (docs/experiments.md).
    """
    model, runtime, arguments = setup.training.model, setup.training.runtime, setup.arguments
    score = partial(evaluate, model, setup.dataset, batch_size=arguments["batch_size"])
    thresholds = setup.thresholds
    if arguments["train_threshold"]:
        thresholds = choose_thresholds(partial(score, setup.validation, runtime), thresholds)
    evaluation = score(setup.scored, runtime, [thresholds.box, *CURVE_THRESHOLDS])
    figures = summarize(evaluation, thresholds.gate)
    if records:
        records.save_final(thresholds, figures)
        records.report(evaluation, figures, thresholds, overlays(
            model, setup.dataset, setup.scored, runtime, thresholds,
            image_size=IMAGE_SIZE if arguments["save_images"] else None,
            workers=arguments["workers"]))
    return thresholds, figures


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    args, model, state = parse_args(argv)
    runtime = parallel.join(choose_runtime(args.device, args.precision))
    save = check_paths(args)
    arguments = vars(args)  # numbers, strings and None: plain values for JSON and checkpoints
    print(*(f"{key}={value}" for key, value in arguments.items()),
          f"on {runtime.device.type} in {runtime.dtype}")

    # network and data; every image is decoded once
    torch.manual_seed(args.seed)
    model = build_model(args, model)
    check_disk(save, model)
    dataset, parts = parallel.once(partial(build_data, args), runtime)
    print(" and ".join(f"{len(part)} {name}" for name, part in parts.items()), "images")
    loader = training_loader(dataset, parts["training"], args.batch_size, runtime)
    prepared = time.monotonic()

    # optimizer; a continued run restores its states
    training = build_training(model, loader, args, runtime)
    if state:
        training.load_state_dict(state)
    setup = Setup(training, dataset, parts, build_thresholds(args), arguments)

    # epochs, final score
    with build_records(setup) as records:
        fit(setup, records)
        trained = time.monotonic()
        thresholds, figures = hand_over(setup, records)
        if records:
            seconds = {"prepare": prepared - started, "train": trained - prepared,
                       "score": time.monotonic() - trained}
            records.finish(figures, thresholds, setup.sizes, seconds)
    parallel.leave(runtime)
    # the model is good, but a bug of ours that cost images must not go unnoticed
    return 1 if dataset.internal_errors else 0


if __name__ == "__main__":
    cli.run(main)
