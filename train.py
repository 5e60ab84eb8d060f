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

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import cli
import parallel
from dataset import PneumoniaDataset, find_labelled
from engine import Start, Training, evaluate, train_one_epoch, training_loader
from metrics import Thresholds, choose_thresholds
from model import PneumoniaUNET, Runtime
from release import image_folder
from results import Records, result_paths

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
# flags that a continued run does not inherit, and those that it may change
PATH_FLAGS = ("data", "labels", "save", "checkpoint", "device", "workers")
CHANGEABLE = ("epochs", "train_threshold", "save_images", "box_threshold", "gate_threshold",
              "precision")


# Arguments


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_path("--data", "-d", kind="folder", help="folder of DICOM files",
                    variable="TRAINML_DATA_PATH", part=image_folder())
    parser.add_path("--labels", "-l", kind="file", help="train.csv of these images",
                    variable="TRAINML_MODEL_PATH", part="train.csv",
                    written_by="python data_processing.py")
    parser.add_path("--save", kind="output", variable="TRAINML_OUTPUT_PATH",
                    help="folder for checkpoints, images, logs and metrics")
    parser.add_path("--checkpoint", kind="file",
                    help="last.pth.tar of a run to continue, or weights to start from")
    add_run_options(parser.add_argument_group("the run").add_argument)
    add_recipe_options(parser.add_argument_group("optimizer and network").add_argument)
    parser.add_runtime_options(batch_size=8, rescale_factor=4)
    parser.set_defaults(save_images=True, debug=False, train_threshold=False)
    return parser


def add_run_options(add: Callable) -> None:
    """Flags on how long a run is and what it is scored on."""
    add("--epochs", "-e", type=cli.bounded(1, math.inf, int), default=2,
        help="epochs, each of which draws as many images as there are for training "
             "(default: %(default)s)")
    add("--debug", action=argparse.BooleanOptionalAction,
        help="a short run: 2 epochs of 50 steps, 100 images scored, no search (default: off)")
    add("--seed", "-s", type=cli.bounded(0, LARGEST_SEED, int), default=42,
        help="random seed (default: %(default)s)")
    add("--folds", type=cli.bounded(2, math.inf, int),
        help="cross-validation: number of folds, one of which is left out and scored")
    add("--fold", type=cli.bounded(0, math.inf, int), help="the fold that is left out, from 0")
    add("--save-images", action=argparse.BooleanOptionalAction,
        help="write annotated images of the radiographs scored at the end (default: on)")
    add("--train-threshold", action=argparse.BooleanOptionalAction,
        help="search the two thresholds on the validation images (default: off)")
    add("--box-threshold", "--bt", type=cli.bounded(0, 1), default=Thresholds().box,
        help="mask probability above which a pixel belongs to a box, 0 to 1 (default: %(default)s)")
    add("--gate-threshold", "--gt", type=cli.bounded(0, 1), default=Thresholds().gate,
        help="highest probability below which a region is left out, 0 to 1 (default: %(default)s)")


def add_recipe_options(add: Callable) -> None:
    """The flags of optimizer and network."""
    above_0 = cli.bounded(0, math.inf, above=True)
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


def parse_args(argv: Sequence[str] | None = None, start: Start = Start()) -> argparse.Namespace:
    """The flags, checked; those that are not given are inherited from `start`, or have their
    defaults.

    Raises InputError for a flag that would have no effect, flags that do not go together or with
    `start`, and paths that cannot be used.
    """
    parser = make_parser()
    parser.set_defaults(**{key: value for key, value in start.flags().items()
                           if key not in PATH_FLAGS})
    args = parser.parse_args(argv)
    check_start(args, start)
    check_flags(args)
    if args.learning_rate is None:
        *_, defaults = OPTIMIZERS[args.optimizer]
        args.learning_rate = defaults["lr"]
    if args.debug:
        args.epochs, args.train_threshold = min(args.epochs, DEBUG_EPOCHS), False
    return args


def check_start(args: argparse.Namespace, start: Start) -> None:
    """Refuses another network than that of `start` and, for a run that continues, another recipe
    or fewer epochs than it has done."""
    for key, value in start.network().items():
        cli.refuse_if(getattr(args, key) != value, f"the checkpoint's network has {key} {value}: "
                      f"give --{key.replace('_', '-')} {value}")
    if start.model:
        start.model.check_side(args.rescale_factor, args.batch_size)
    before = start.state if start.continues else {}
    for key, value in before.get("args", {}).items():
        flag, given = f"--{key.replace('_', '-')}", getattr(args, key)
        cli.refuse_if(key not in PATH_FLAGS + CHANGEABLE and given != value,
                      f"{flag} {given}: the run to continue has {value}; leave the flag out")
    done = len(before.get("history", ()))
    cli.refuse_if(args.epochs < done, f"--epochs {args.epochs}: the run to continue has done "
                  f"{done}; give {done} or more")


def tell_jump(epochs: int, state: dict) -> None:
    """Says how the learning rate changes if a run continues with another number of epochs."""
    planned, done = state["args"]["epochs"], len(state["history"])
    if epochs != planned:
        print(f"--epochs {epochs}: the run was planned for {planned}, so after its {done} epochs "
              "the learning rate does not go on where it stood, but where a run of "
              f"{epochs} epochs would be")


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags that would have no effect or do not go together."""
    cli.refuse_if(args.momentum is not None and args.optimizer != "sgd",
                  "--momentum acts on --optimizer sgd alone")
    cli.refuse_if(args.eps is not None and args.optimizer == "sgd",
                  "--eps has no effect on --optimizer sgd")
    cli.refuse_if((args.folds is None) != (args.fold is None),
                  "--folds and --fold go together: give both or neither")
    cli.refuse_if(args.folds is not None and args.fold >= args.folds,
                  f"--fold {args.fold}: with --folds {args.folds} the last fold is "
                  f"{(args.folds or 0) - 1}")


# What a run is built from


def build_data(args: argparse.Namespace,
               start: Start = Start()) -> tuple[PneumoniaDataset, dict[str, list[int]]]:
    """The data set and the indices of its parts, which --debug makes smaller. A run that continues
    keeps the parts that it began with."""
    limits = {"training": DEBUG_STEPS * args.batch_size, "validation": DEBUG_IMAGES,
              "test": DEBUG_IMAGES}
    labelled = find_labelled(Path(args.data), Path(args.labels),
                             result_paths(Path(args.save), Path(args.data)))
    if start.continues:
        parts = labelled.split_as(start.split())
    else:
        parts = labelled.split(seed=args.seed, folds=args.folds, fold=args.fold,
                               limits=limits if args.debug else {})
    return labelled.load(parts, rescale_factor=args.rescale_factor, workers=args.workers)


def build_model(args: argparse.Namespace) -> PneumoniaUNET:
    """A new network, with random weights."""
    return PneumoniaUNET.for_images(
        args.rescale_factor, width=args.width, alpha_leaky=args.alpha_leaky, bn_eps=args.bn_eps,
        bn_momentum=args.bn_momentum)


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


def build_training(model: PneumoniaUNET, train_loader: DataLoader, args: argparse.Namespace,
                   runtime: Runtime) -> Training:
    """Moves the model to the device and builds all that its training needs."""
    model = model.to(runtime.device, memory_format=torch.channels_last)
    optimizer, scheduler = build_optimizer(model, args, args.epochs * len(train_loader))
    return Training(model, optimizer, scheduler, train_loader, runtime)


def build_records(args: argparse.Namespace, training: Training, dataset: PneumoniaDataset,
                  parts: dict[str, list[int]]) -> contextlib.AbstractContextManager[Records | None]:
    """The Records of the run in --save; None in all processes but the first."""
    if training.runtime.rank > 0:
        return contextlib.nullcontext()
    return Records(Path(args.save), vars(args), training, dataset, parts)


def build_thresholds(args: argparse.Namespace) -> Thresholds:
    """The Thresholds of --box-threshold and --gate-threshold."""
    thresholds = Thresholds(args.box_threshold, args.gate_threshold)
    return thresholds if thresholds == Thresholds() else thresholds._replace(
        source="given by flags")


# The story of a run


def main(argv: Sequence[str] | None = None) -> int:
    laps = [time.monotonic()]
    start = Start.of_file(make_parser().parse_args(argv).checkpoint)
    args = parse_args(argv, start)
    make_parser().check_paths(args)
    runtime = parallel.join(args.device, args.precision)
    print(*(f"{key}={value}" for key, value in vars(args).items()),
          f"on {runtime.device.type} in {runtime.dtype}")

    # 1. network and data; every image is decoded once
    torch.manual_seed(args.seed)
    model = start.model or build_model(args)
    Records.check_disk(Path(args.save), model)
    dataset, parts = parallel.once(partial(build_data, args, start), runtime)
    print(" and ".join(f"{len(part)} {name}" for name, part in parts.items()), "images")
    train_loader = training_loader(dataset, parts["training"], args.batch_size, runtime)
    laps.append(time.monotonic())

    # 2. optimizer and schedule; a run that continues restores their states
    training = build_training(model, train_loader, args, runtime)
    if start.continues:
        training.load_state_dict(start.state)
        tell_jump(args.epochs, start.state)

    # 3. epochs
    thresholds = build_thresholds(args)
    score = partial(evaluate, model, dataset, runtime=runtime, batch_size=args.batch_size)
    with build_records(args, training, dataset, parts) as records:
        fit(training, partial(score, watched_images(parts, args)), thresholds, args, records)
        laps.append(time.monotonic())

        # 4. final score; the learning rate ended near 0, so the last weights are those that the run
        # was made for, and the best epoch is mostly luck (docs/experiments.md)
        if args.train_threshold:
            thresholds = choose_thresholds(partial(score, parts["validation"]), thresholds)
        scored = parts.get("test", parts["validation"])  # the fold, if one was left out
        evaluation = score(scored, thresholds.and_curves())
        if records:
            records.finish(evaluation, thresholds, scored, laps)
    # the model is good, but a fault of these scripts that cost images must not go unnoticed
    return 1 if dataset.internal_errors else 0


def fit(training: Training, score: Callable, thresholds: Thresholds, args: argparse.Namespace,
        records: Records | None) -> None:
    """Trains the epochs that are not in the training's history yet; `score` evaluates each on
    validation images at given box thresholds."""
    log = records.log_steps if records else lambda *_: None
    for epoch in range(len(training.history) + 1, args.epochs + 1):
        training.seed_epoch(args.seed, epoch)
        train_loss, speed = train_one_epoch(training, log)
        evaluation = score(thresholds.alone())
        scores = training.add_epoch(train_loss, evaluation.summarize(thresholds))
        if records:
            records.log_epoch(evaluation, thresholds, speed)
            records.save_epoch(thresholds)
        print(f"epoch {epoch}/{args.epochs}: loss {train_loss:.4f}, validation loss "
              f"{scores['loss']:.4f}, RSNA mAP {scores['rsna']:.4f}, total AP "
              f"{scores['total']:.4f}, AUC {scores['auc']:.4f}, {speed:.1f} images/s")


def watched_images(parts: dict[str, list[int]], args: argparse.Namespace) -> list[int]:
    """Indices of the validation images that are scored after every epoch; fewer with --debug."""
    limit = DEBUG_VALIDATION_STEPS * args.batch_size if args.debug else None
    return parts["validation"][:limit]


if __name__ == "__main__":
    parallel.run(main)
