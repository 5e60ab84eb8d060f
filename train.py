"""Trains the U-Net on the table of data_processing.py and scores it on held-out radiographs.

    python train.py --debug --optimizer adamax                        # does everything work?
    python train.py --optimizer adamw --epochs 10 --train-threshold   # a real run
    python train.py --checkpoint output/last.pth.tar                  # continues a stopped run
    python train.py --folds 3 --fold 0                                # cross-validation

Reads DICOM files and train.csv. Writes checkpoints, report.html and curves.png, annotated images in
validation/, TensorBoard logs, split.csv and metrics.json below --save.
"""

import argparse
import contextlib
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler
from torch.utils.tensorboard import SummaryWriter

import cli
import parallel
from curves import CURVE_THRESHOLDS, draw_history, draw_scores
from dataset import Augmentation, PneumoniaDataset, find_labelled, load_parts, split
from drawing import IMAGE_SIZE, draw_overlay, save_overlays
from metrics import Evaluation, Thresholds, choose_thresholds, score_lines, score_mask, summarize
from model import PneumoniaUNET, Runtime, choose_runtime, load_checkpoint, save_checkpoint
from predict import overlays
from report import collect, write_report

OPTIMIZERS = {  # class, default overrides
    "adam": (torch.optim.Adam, {"lr": 5e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 5e-4, "weight_decay": 0.01}),
    "adamax": (torch.optim.Adamax, {"lr": 1e-3}),
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
}
FUSED = {"adam": ("cpu", "cuda"), "adamw": ("cpu", "cuda"), "sgd": ("cpu", "cuda"),
         "adagrad": ("cpu",)}  # devices with a fused form in all versions of PyTorch from 2.6
POSITIVE_WEIGHT = 2  # how much more often an image with opacities is drawn in training
WARMUP = 0.1  # share of the steps in which the learning rate rises
DEBUG_EPOCHS, DEBUG_STEPS, DEBUG_VALIDATION_STEPS, DEBUG_IMAGES = 2, 50, 10, 100
RANK_SEED = 1009  # between the seeds of the processes' augmentation
SHOWN, SHOWN_SIZE = 4, 512  # validation images in TensorBoard after every epoch; their pixels
CHECK_STEPS = 20  # between looks at the loss, each of which waits for the GPU
# flags that a continued run does not inherit, and those that it may change
PATH_FLAGS = ("data", "labels", "save", "checkpoint", "device", "workers")
CHANGEABLE = ("epochs", "train_threshold", "save_images", "box_threshold", "gate_threshold",
              "precision")
STATEFUL = ("optimizer", "scheduler", "scaler")  # what last.pth.tar adds to the model
METRIC_NAMES = {  # in metrics.json and final.pth.tar, of what metrics.summarize returns
    "rsna": "rsna_mean_average_precision", "rsna_standard_error": "rsna_standard_error",
    "total": "total_average_precision", "auc": "image_roc_auc", "auc_AP": "image_roc_auc_AP",
    "auc_PA": "image_roc_auc_PA", "loss": "validation_loss"}


class Training(NamedTuple):
    """State of a training run."""
    model: PneumoniaUNET
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    augmentation: Augmentation
    runtime: Runtime
    network: nn.Module  # the model, or what wraps it in a run of several processes


class Setup(NamedTuple):
    """What main builds before the first step."""
    training: Training
    loader: DataLoader
    order: torch.Generator  # of the loader
    dataset: PneumoniaDataset
    parts: dict[str, list[int]]  # indices of the images of each part
    thresholds: Thresholds  # of the flags
    save: Path
    arguments: dict[str, Any]  # as every checkpoint stores them

    @property
    def validation(self) -> list[int]:
        """Indices of the images that are scored after every epoch; with --debug fewer."""
        limit = DEBUG_VALIDATION_STEPS * self.arguments["batch_size"]
        return self.parts["validation"][:limit if self.arguments["debug"] else None]

    @property
    def scored(self) -> list[int]:
        """Indices of the images that are scored at the end: with folds, the fold's."""
        return self.parts.get("test", self.parts["validation"])


# Arguments


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("files").add_argument
    add("--data", "-d", default=cli.default_path("TRAINML_DATA_PATH", "stage_2_train_images"),
        help="folder of DICOM files (default: %(default)s)")
    add("--labels", "-l", default=cli.default_path("TRAINML_MODEL_PATH", "train.csv"),
        help="table of data_processing.py (default: %(default)s)")
    add("--save", default=cli.default_path("TRAINML_OUTPUT_PATH"),
        help="folder for checkpoints, images, logs and metrics (default: %(default)s)")
    add("--checkpoint", help="last.pth.tar of a run to continue, or weights to start from")
    add("--save-images", default=True, action=cli.Switch,
        help="write annotated images of those that are scored (default: on)")
    add_run_options(parser.add_argument_group("the run").add_argument)
    add_recipe_options(parser.add_argument_group("optimizer and network").add_argument)
    parser.add_runtime_options(batch_size=8, rescale_factor=4)
    return parser


def add_run_options(add: Callable) -> None:
    """The flags on how long a run is and what it is scored on."""
    add("--epochs", "-e", type=cli.bounded(1, math.inf, int), default=2,
        help="passes over the training images (default: %(default)s)")
    add("--debug", default=False, action=cli.Switch,
        help="a short run: 2 epochs of 50 steps, 100 images scored, no search (default: off)")
    add("--seed", "-s", type=int, default=42, help="random seed (default: %(default)s)")
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
        help="(default: %(default)s)")
    add("--learning-rate", "--lr", type=above_0,
        help=f"its peak, above 0 (default: {_defaults('lr')})")
    add("--learning-rate-decay", "--lrd", type=cli.bounded(0, 1), default=0.01,
        help="share of the peak left at the end, 0 to 1 (default: %(default)s)")
    add("--momentum", "-m", type=cli.bounded(0, 1),
        help=f"SGD momentum, 0 to 1 (default: {_defaults('momentum')})")
    add("--eps", type=above_0,
        help="term in the optimizer's denominator, not for sgd (default: PyTorch's)")
    add("--weight-decay", "--wd", type=cli.bounded(0, math.inf),
        help=f"0 or more (default: {_defaults('weight_decay')}, else 0)")
    add("--width", type=cli.bounded(2, 512, int), default=32,
        help="channels at the U-Net's first level, 2 to 512 (default: %(default)s)")
    add("--bn-momentum", type=cli.bounded(0, 1), default=0.1,
        help="share of a batch in BatchNorm's running statistics, 0 to 1 (default: %(default)s)")
    add("--bn-eps", type=above_0, default=1e-5,
        help="term in BatchNorm's denominator, above 0 (default: %(default)s)")
    add("--alpha-leaky", "--al", type=cli.bounded(0, math.inf), default=0.03,
        help="slope of LeakyReLU below 0, 0 or more (default: %(default)s)")


def _defaults(key):
    values = {name: options.get(key) for name, (_, options) in OPTIMIZERS.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Any, dict]:
    """Returns the arguments, and the model and the rest of the --checkpoint file or (None, {}).

    To continue a run, its own flags take the place of the defaults. Raises InputError for a flag
    that could not act.
    """
    parser, model, state = make_parser(), None, {}
    args = parser.parse_args(argv)
    if args.checkpoint:
        model, state = load_checkpoint(cli.require(args.checkpoint, "file", flag="--checkpoint"))
        parser.set_defaults(width=model.config["width"])
        args = parser.parse_args(argv)
    if "optimizer" in state:
        stored = {key: value for key, value in state["args"].items() if key not in PATH_FLAGS}
        parser.set_defaults(**stored)
        args = parser.parse_args(argv)
        for key in stored.keys() - CHANGEABLE:
            flag = f"--{key.replace('_', '-')} {getattr(args, key)}"
            _refuse_if(getattr(args, key) != stored[key],
                       f"{flag}: the run to continue has {stored[key]}; leave the flag out")
    check_args(args)
    if args.learning_rate is None:
        args.learning_rate = OPTIMIZERS[args.optimizer][1]["lr"]
    if args.debug:
        args.epochs, args.train_threshold = min(args.epochs, DEBUG_EPOCHS), False
    return args, model, state


def check_args(args: argparse.Namespace) -> None:
    """Raises InputError for flags that could not act together."""
    _refuse_if(args.momentum is not None and args.optimizer != "sgd",
               "--momentum acts on --optimizer sgd alone")
    _refuse_if(args.eps is not None and args.optimizer == "sgd",
               "--eps has no part in --optimizer sgd")
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
    """The data set and the indices of its parts, which split.csv lists; --debug cuts them."""
    limits = {"training": DEBUG_STEPS * args.batch_size, "validation": DEBUG_IMAGES,
              "test": DEBUG_IMAGES}
    labelled = find_labelled(Path(args.data), Path(args.labels), Path(args.save))
    ids = split(labelled.opacities, seed=args.seed, folds=args.folds, fold=args.fold,
                limits=limits if args.debug else {})
    dataset, parts = load_parts(labelled, ids, rescale_factor=args.rescale_factor,
                                workers=args.workers)
    cli.write_csv(Path(args.save) / "split.csv", split_rows(dataset, parts))
    return dataset, parts


def build_loader(dataset: PneumoniaDataset, training: Sequence[int], args: argparse.Namespace,
                 runtime: Runtime) -> tuple[DataLoader, torch.Generator]:
    """The loader of training batches, and the generator of its order.

    The sampler deals out whole batches of indices and the data set makes a batch of each, so the
    loader itself does not batch: batch_size=None.
    """
    generator = torch.Generator()
    weights = [POSITIVE_WEIGHT if len(dataset.boxes[index]) else 1 for index in training]
    order = WeightedRandomSampler(weights, len(training), generator=generator)
    size = args.batch_size * runtime.world  # of all processes together
    batches = parallel.SharedBatches(order, size, runtime, drop_last=len(training) >= size)
    loader = DataLoader(Subset(dataset, training), batch_size=None, sampler=batches,
                        generator=generator, pin_memory=runtime.device.type == "cuda")
    return loader, generator


def build_model(args: argparse.Namespace, model: PneumoniaUNET | None = None) -> PneumoniaUNET:
    """A new network, or the checkpoint's if the flags fit it; raises InputError if not."""
    if model is None:
        return PneumoniaUNET.for_images(
            args.rescale_factor, width=args.width, alpha_leaky=args.alpha_leaky,
            bn_eps=args.bn_eps, bn_momentum=args.bn_momentum)
    for key, value in model.config.items():
        _refuse_if(getattr(args, key, value) != value, f"the checkpoint's network has {key} "
                   f"{value}: give --{key.replace('_', '-')} {value}")
    model.check_side(args.rescale_factor)
    return model


def build_optimizer(model: torch.nn.Module, args: argparse.Namespace, total_steps: int,
                    stored: dict | None = None) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer and its schedule: linear warm-up, then a cosine down to a share of the peak.
    `stored` is the optimizer's state in a run to continue."""
    optimizer_class, options = OPTIMIZERS[args.optimizer]
    given = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "eps": args.eps,
             "momentum": args.momentum}
    options = options | {key: value for key, value in given.items() if value is not None}
    device = next(model.parameters()).device.type
    options = options | fused_form(args.optimizer, device, stored)
    optimizer = optimizer_class(model.parameters(), **options)
    warmup = math.ceil(WARMUP * total_steps)

    def lr_factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min((step - warmup) / max(total_steps - warmup, 1), 1)
        cosine = (1 + math.cos(math.pi * done)) / 2
        return args.learning_rate_decay + (1 - args.learning_rate_decay) * cosine
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)


def fused_form(optimizer: str, device: str, stored: dict | None) -> dict[str, bool]:
    """The option for one kernel over all weights, where PyTorch has it; a run to continue keeps the
    form that it began with, if the device has it, since their results differ in the last bits."""
    is_fused = device in FUSED.get(optimizer, ())
    if stored:
        is_fused = is_fused and stored["param_groups"][0].get("fused")
    return {"fused": True} if is_fused else {}


def build_training(model: PneumoniaUNET, args: argparse.Namespace, total_steps: int,
                   runtime: Runtime, stored: dict | None = None) -> Training:
    """Puts the model on the device with all that its training needs."""
    model = model.to(runtime.device, memory_format=torch.channels_last)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    optimizer, scheduler = build_optimizer(model, args, total_steps, stored)
    return Training(model, optimizer, scheduler, scaler, Augmentation(torch.Generator()), runtime,
                    parallel.distribute(model, runtime))


def build_thresholds(args: argparse.Namespace) -> Thresholds:
    """The pair of --box-threshold and --gate-threshold."""
    pair = args.box_threshold, args.gate_threshold
    source = "defaults" if pair == Thresholds()[:2] else "given by flags"
    return Thresholds(*pair, source)


def check_paths(args: argparse.Namespace) -> Path:
    """The folder --save, once it can be written to and the other paths exist."""
    cli.require(args.data, "folder", flag="--data", variable="TRAINML_DATA_PATH")
    cli.require(args.labels, "file", flag="--labels", variable="TRAINML_MODEL_PATH")
    return cli.require(args.save, "output", flag="--save", variable="TRAINML_OUTPUT_PATH")


def check_disk(folder: Path, model: torch.nn.Module) -> None:
    """Raises InputError if a run's checkpoints will not fit: 9 times the weights, with Adam and one
    file being written."""
    needed = 9 * sum(value.nbytes for value in model.state_dict().values())
    free = shutil.disk_usage(folder).free
    _refuse_if(free < needed, f"{folder} has {free / 1e6:.0f} MB left, a run needs "
               f"{needed / 1e6:.0f}: free some, or give another folder with --save")


# Training


def combined_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy + 0.5 Dice over the batch's pixels; logits and masks (B, 1, S, S)."""
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * masks).sum() + 1
    dice = 1 - overlap / (probabilities.sum() + masks.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + 0.5 * dice


def train_one_epoch(training: Training, loader: DataLoader,
                    log: Callable[[list[float], float], None]) -> float:
    """One pass over the loader; calls log(losses, learning_rate) every CHECK_STEPS steps. Returns
    the mean loss."""
    model, optimizer, scheduler, scaler, augmentation, runtime, network = training
    model.train()
    pending, total = [], 0.0
    epoch = scheduler.last_epoch // len(loader) + 1
    batches = cli.progress(loader, total=len(loader), description=f"epoch {epoch}",
                           scale=loader.sampler.batch_size)
    for step, (images, masks) in enumerate(batches, 1):
        # forward, on the device
        masks = masks.to(runtime.device, non_blocking=True).float()
        images, masks = augmentation(runtime.load(images), masks)
        loss = combined_loss(runtime.segment(network, images), masks)
        # backward, update
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        # log; tolist waits for the GPU
        pending.append(loss.detach())
        if step % CHECK_STEPS == 0 or step == len(loader):
            losses = parallel.gather([torch.stack(pending).tolist()], runtime)
            losses = np.mean(losses, axis=0).tolist()  # over the processes
            check_losses(losses, step, epoch, scheduler.get_last_lr()[0])
            batches.set_postfix_str(f"step {step}, loss {losses[-1]:.4f}", refresh=False)
            log(losses, scheduler.get_last_lr()[0])
            total, pending = total + sum(losses), []
    parallel.share_statistics(model, runtime)
    return total / len(loader)


def check_losses(losses: Sequence[float], last_step: int, epoch: int,
                 learning_rate: float) -> None:
    """Raises InputError for a loss that is not finite, of the steps up to `last_step`."""
    for step, loss in enumerate(losses, last_step - len(losses) + 1):
        _refuse_if(not math.isfinite(loss), f"the loss is {loss} at step {step} of epoch {epoch}, "
                   f"learning rate {learning_rate:.2g}: lower --learning-rate; the best files so "
                   "far are kept")


@torch.inference_mode()
def evaluate(model: torch.nn.Module, dataset: PneumoniaDataset, indices: Sequence[int],
             runtime: Runtime, box_thresholds: Sequence[float], *,
             batch_size: int = 8) -> Evaluation:
    """One pass over images of the data set, scored at box thresholds as predict.py finds boxes.
    Processes share the batches, and each returns the whole.

    Raises InputError if the loss is not finite.
    """
    model.eval()
    batches = parallel.share(torch.as_tensor(indices).split(batch_size), runtime)
    losses, confidences, scores = [], [], []
    for batch in cli.progress(batches, total=len(batches), description="validate",
                              scale=batch_size):
        images, masks = dataset[batch.tolist()]
        logits = runtime.segment(model, runtime.load(images))
        loss = combined_loss(logits, masks.to(runtime.device).float()).item()
        _refuse_if(not math.isfinite(loss), f"the validation loss is {loss} after this epoch: "
                   "lower --learning-rate; the best files so far are kept")
        losses += [loss] * len(batch)
        for index, mask in zip(batch.tolist(), logits.sigmoid()[:, 0].cpu().numpy()):
            size, boxes = dataset.original_sizes[index], dataset.boxes[index]
            confidences.append(float(mask.max()))
            scores.append(score_mask(mask, size, boxes, box_thresholds))
    rows = parallel.gather(list(zip(losses, confidences, scores)), runtime)
    losses, confidences, scores = zip(*rows)
    positive = np.array([len(dataset.boxes[index]) > 0 for index in indices])
    views = np.array([dataset.views[index] for index in indices])
    return Evaluation(float(np.mean(losses)), np.array(confidences), positive, views,
                      np.array(scores))


# Files and logs


def log_steps(writer: SummaryWriter, scheduler: Any) -> Callable[[list[float], float], None]:
    """A `log` of train_one_epoch that writes to TensorBoard, and the chart of both losses."""
    writer.add_custom_scalars_multilinechart(["loss/train", "loss/validation"], "loss", "both")

    def log(losses: list[float], learning_rate: float) -> None:
        first = scheduler.last_epoch - len(losses)
        for step, loss in enumerate(losses, first + 1):
            writer.add_scalar("steps/loss", loss, step)
        writer.add_scalar("steps/learning_rate", learning_rate, scheduler.last_epoch)
    return log


def log_epoch(writer: SummaryWriter, evaluation: Evaluation, scores: dict[str, float],
              speed: float, epoch: int) -> None:
    """Shows the figures of an epoch, counted from 1, in TensorBoard: both losses over the same
    axis, and the decision on the image."""
    tags = {"loss/train": scores["train_loss"], "loss/validation": scores["loss"],
            "precision/rsna": scores["rsna"], "precision/total": scores["total"],
            "auc/validation": scores["auc"], "speed/images_per_second": speed}
    for tag, value in tags.items():
        writer.add_scalar(tag, value, epoch)
    writer.add_pr_curve("image has opacity", evaluation.positive, evaluation.confidences, epoch)


def log_comparison(writer: SummaryWriter, arguments: dict, figures: dict) -> None:
    """A row of TensorBoard's HParams table: the flags usually compared, and the scores."""
    compared = ("batch_size", "epochs", "optimizer", "rescale_factor", "learning_rate")
    scores = {f"final/{name}": figures[name] for name in ("rsna", "total", "auc")}
    writer.add_hparams({key: str(arguments[key]) for key in compared}, scores, run_name=".")


def save_epoch(training: Training, save: Path, common: dict[str, Any]) -> None:
    """Writes last.pth.tar, from which a run continues exactly, and the best files where the last
    epoch of the history is the best yet."""
    history = common["history"]
    best = {"loss.best": min(history, key=lambda scores: scores["loss"]),
            "prec.best": max(reversed(history), key=lambda scores: scores["rsna"])}
    for name, scores in best.items():
        path = save / f"{name}.pth.tar"
        if scores is history[-1] or not path.exists():
            save_checkpoint(path, training.model, **common)
    states = {name: getattr(training, name).state_dict() for name in STATEFUL}
    save_checkpoint(save / "last.pth.tar", training.model, **states, **common)


def resume(training: Training, state: dict, source: Path, save: Path, epoch_steps: int) -> None:
    """Takes up the states of a run to continue, and its best files if it saves elsewhere now."""
    for name in STATEFUL:
        if state[name]:  # that of a scaler not in use is empty
            getattr(training, name).load_state_dict(state[name])
    for group in training.optimizer.param_groups:  # this device may lack the stored form
        group["fused"] = training.optimizer.defaults.get("fused")
    # other numbers of processes take other numbers of steps
    training.scheduler.last_epoch = len(state["history"]) * epoch_steps - 1
    training.scheduler.step()
    if training.runtime.rank > 0:
        return
    for name in ("loss.best.pth.tar", "prec.best.pth.tar"):
        if (source / name).exists() and not (save / name).exists():
            model, best = load_checkpoint(source / name)
            save_checkpoint(save / name, model, **best)


def checkpoint_state(setup: Setup, thresholds: Thresholds, history: list[dict]) -> dict[str, Any]:
    """What every checkpoint holds beside the weights: all that predict.py needs, and how they came
    about."""
    return {"rescale_factor": setup.arguments["rescale_factor"], "args": setup.arguments,
            "history": history, **threshold_state(thresholds)}


def threshold_state(thresholds: Thresholds) -> dict[str, Any]:
    """Thresholds under their names in checkpoints and metrics.json."""
    return {"best_threshold": thresholds.box, "gate_threshold": thresholds.gate,
            "threshold_source": thresholds.source, "size_weight": thresholds.size_weight}


def rename(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures under their names in metrics.json, where JSON has no NaN."""
    return {METRIC_NAMES[name]: value if math.isfinite(value) else None
            for name, value in figures.items()}


def split_rows(dataset: PneumoniaDataset, parts: dict[str, list[int]]) -> list[tuple[str, str]]:
    """The lines of split.csv: the part that each image belongs to."""
    rows = [(dataset.patient_ids[index], name) for name, part in parts.items() for index in part]
    return [("patientId", "split"), *rows]


def run_record(setup: Setup, history: list[dict], thresholds: Thresholds,
               figures: dict[str, float], seconds: dict[str, float]) -> dict[str, Any]:
    """The content of metrics.json."""
    sizes = {f"{name}_images": len(part) for name, part in setup.parts.items()}
    return {**rename(figures), **threshold_state(thresholds), **sizes,
            "skipped_images": len(setup.dataset.skipped), "scored_images": len(setup.scored),
            "history": history, "arguments": setup.arguments, "versions": versions(),
            "seconds": seconds}


@contextlib.contextmanager
def hint_to_continue(save: Path, history: list) -> Iterator[None]:
    """Tells a run that is stopped how it goes on."""
    try:
        yield
    except (KeyboardInterrupt, RuntimeError):
        last = save / "last.pth.tar"
        if history and last.exists():
            print(f"continue with: python train.py --checkpoint {last} --save {save}")
        raise


def plain_args(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments as plain values, for JSON and for checkpoints that load without executing code."""
    plain = (int, float, type(None))
    return {key: value if isinstance(value, plain) else str(value)
            for key, value in vars(args).items()}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__}


# The story of a run


def seed_epoch(setup: Setup, epoch: int) -> None:
    """Makes the draws of an epoch, counted from 1, depend on its number and --seed alone, so that a
    continued run repeats them. Processes draw the same order, and augment each in its own way."""
    seed, rank = setup.arguments["seed"] * 1_000_003 + epoch - 1, setup.training.runtime.rank
    setup.order.manual_seed(seed)
    setup.training.augmentation.generator.manual_seed(seed + RANK_SEED * rank)


def fit(setup: Setup, history: list[dict], writer: SummaryWriter | None) -> None:
    """Trains the epochs that the history lacks and adds their scores to it. The process that has
    the writer keeps the files."""
    training, thresholds, epochs = setup.training, setup.thresholds, setup.arguments["epochs"]
    log = log_steps(writer, training.scheduler) if writer else lambda *_: None
    for epoch in range(len(history) + 1, epochs + 1):
        seed_epoch(setup, epoch)
        started = time.monotonic()
        train_loss = train_one_epoch(training, setup.loader, log)
        images = len(setup.loader) * setup.loader.sampler.batch_size
        speed = images / (time.monotonic() - started)

        evaluation = evaluate(training.model, setup.dataset, setup.validation, training.runtime,
                              [thresholds.box], batch_size=setup.arguments["batch_size"])
        figures = summarize(evaluation, thresholds.gate)
        scores = {name: figures[name] for name in ("loss", "rsna", "total", "auc")}
        learning_rate = training.scheduler.get_last_lr()[0]
        history.append({"train_loss": train_loss, **scores, "learning_rate": learning_rate})
        if writer:
            save_epoch(training, setup.save, checkpoint_state(setup, thresholds, history))
            draw_history(setup.save, history)
            log_epoch(writer, evaluation, history[-1], speed, epoch)
            log_pictures(writer, setup, epoch)
        print(f"epoch {epoch}/{epochs}: loss {train_loss:.4f}, validation loss "
              f"{scores['loss']:.4f}, RSNA mAP {scores['rsna']:.4f}, total AP "
              f"{scores['total']:.4f}, AUC {scores['auc']:.4f}, {speed:.1f} images/s", flush=True)


def log_pictures(writer: SummaryWriter, setup: Setup, epoch: int) -> None:
    """Shows the first few validation images with opacities in TensorBoard."""
    shown = [index for index in setup.validation if len(setup.dataset.boxes[index])][:SHOWN]
    pictures = overlays(setup.training.model, setup.dataset, shown, setup.training.runtime,
                        setup.thresholds, image_size=SHOWN_SIZE)
    for patient_id, overlay in pictures:
        picture = np.asarray(draw_overlay(overlay, legend=False).convert("RGB"))
        writer.add_image(f"validation/{patient_id}", picture, epoch, dataformats="HWC")


def hand_over(setup: Setup, history: list[dict]) -> tuple[Thresholds, dict[str, float]]:
    """Writes final.pth.tar: the last epoch's weights with the thresholds to use them at, searched
    on the validation images if that was asked for. Returns those and the scores of the images
    `setup.scored`, and draws these.

    The learning rate ends near 0, so the last weights are the ones that the run was made for; the
    best epoch of a small validation set is mostly luck (docs/experiments.md).
    """
    model, runtime, thresholds = setup.training.model, setup.training.runtime, setup.thresholds
    score = partial(evaluate, model, setup.dataset, batch_size=setup.arguments["batch_size"])
    if setup.arguments["train_threshold"]:
        thresholds = choose_thresholds(partial(score, setup.validation, runtime), thresholds)
    evaluation = score(setup.scored, runtime, [thresholds.box, *CURVE_THRESHOLDS])
    figures = summarize(evaluation, thresholds.gate)
    if runtime.rank == 0:
        state = checkpoint_state(setup, thresholds, history)
        save_checkpoint(setup.save / "final.pth.tar", model, **state, **rename(figures))
        draw_scores(setup.save, evaluation, thresholds)
        write_pages(setup, thresholds, score_lines(figures, len(setup.scored)))
    return thresholds, figures


def write_pages(setup: Setup, thresholds: Thresholds, lines: list[str]) -> None:
    """Writes report.html with the rows of the scored images and, if asked for, their pictures."""
    save_images, rows = setup.arguments["save_images"], []
    pictures = overlays(setup.training.model, setup.dataset, setup.scored, setup.training.runtime,
                        thresholds, image_size=IMAGE_SIZE if save_images else None,
                        workers=setup.arguments["workers"])
    pictures = cli.progress(collect(pictures, rows), total=len(setup.scored),
                            description="draw")
    if save_images:
        save_overlays(setup.save / "validation", pictures)
    else:
        for _ in pictures:
            pass
    write_report(setup.save, rows, lines=[str(thresholds), *lines],
                 pictures="validation" if save_images else None,
                 figures=["curves.png", "scores.png"])


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    args, model, state = parse_args(argv)
    runtime = parallel.join(choose_runtime(args.device, args.precision))
    save = check_paths(args)
    arguments = plain_args(args)
    print(*(f"{key}={value}" for key, value in arguments.items()),
          f"on {runtime.device.type} in {runtime.dtype}")

    # network and data; every image is decoded once
    torch.manual_seed(args.seed)
    model = build_model(args, model)
    check_disk(save, model)
    dataset, parts = parallel.once(partial(build_data, args), runtime)
    print(" and ".join(f"{len(part)} {name}" for name, part in parts.items()), "images", flush=True)
    loader, order = build_loader(dataset, parts["training"], args, runtime)
    prepared = time.monotonic()

    # optimizer; a continued run takes up its states
    total_steps = args.epochs * len(loader)
    training = build_training(model, args, total_steps, runtime, state.get("optimizer"))
    if "optimizer" in state:
        resume(training, state, Path(args.checkpoint).parent, save, len(loader))
    history = list(state.get("history", []))
    setup = Setup(training, loader, order, dataset, parts, build_thresholds(args), save, arguments)

    # epochs, final score
    logs = partial(SummaryWriter, save / "logs", purge_step=training.scheduler.last_epoch or None)
    with logs() if runtime.rank == 0 else contextlib.nullcontext() as writer:
        with hint_to_continue(save, history):
            fit(setup, history, writer)
        trained = time.monotonic()
        thresholds, figures = hand_over(setup, history)
        seconds = {"prepare": prepared - started, "train": trained - prepared,
                   "score": time.monotonic() - trained}
        if writer:
            log_comparison(writer, arguments, figures)
            record = run_record(setup, history, thresholds, figures, seconds)
            cli.write_text(save / "metrics.json", json.dumps(record, indent=1))
    parallel.leave(runtime)
    print(f"see {save / 'report.html'}", thresholds, *score_lines(figures, len(setup.scored)),
          sep="\n")
    # the other images make a good model, but nobody may miss that some were lost by our fault
    return 1 if dataset.internal_errors else 0


if __name__ == "__main__":
    cli.run(main)
