"""Trains the U-Net on the table that data_processing.py wrote, and scores it on the validation images.

    python train.py --debug --optimizer adamax                        # a few minutes: does everything work?
    python train.py --optimizer adamw --epochs 10 --train-threshold   # a real run
    python train.py --checkpoint output/last.pth.tar                  # continues an interrupted run with its flags
"""

import argparse
import json
import math
import platform
import random
import shutil
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler
from torch.utils.tensorboard import SummaryWriter

from data_processing import read_labels, warn
from dataset import Augmentation, PneumoniaDataset, split_fold, split_patients
from dicom import IMAGE_SIDE, INTERNAL_ERROR, find_dicom_files
from job import (InputError, atomic_write, default_path, keep_freed_memory, make_folder, require, require_folder,
                 result_folders, run)
from metrics import (BOX_THRESHOLDS, GATE_THRESHOLDS, Evaluation, Thresholds, average_precision_image, score_lines,
                     search_thresholds, summarize)
from model import GRID, PneumoniaUNET, load_checkpoint, save_checkpoint
from predict import (BOX_THRESHOLD, GATE_THRESHOLD, RESCALE_FACTORS, SIZE_WEIGHT, Runtime, add_runtime_options, batched,
                     check_side, choose_runtime, draw_overlay, find_boxes, image_confidence, number, picture_path,
                     predict_masks, progress, save_overlays, segment, to_network, to_probabilities, write_csv,
                     write_text)

OPTIMIZERS = {  # class, and what our defaults change of its own
    "adam": (torch.optim.Adam, {"lr": 5e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 5e-4, "weight_decay": 0.01}),
    "adamax": (torch.optim.Adamax, {"lr": 1e-3}),
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
}
VALIDATION_SHARE = 0.1
POSITIVE_WEIGHT = 2  # how much more often an image with opacities is drawn in training
WARMUP = 0.1  # share of the steps in which the learning rate rises
DEBUG_EPOCHS, DEBUG_STEPS, DEBUG_VALIDATION_STEPS, DEBUG_IMAGES = 2, 50, 10, 100
SHOWN = 4  # validation images drawn for TensorBoard after every epoch
CHECK_STEPS = 20  # between looks at the loss, each of which waits for the GPU
PLACES = ("data", "labels", "save", "checkpoint", "device", "workers")  # flags a continued run does not inherit
CHANGEABLE = ("epochs", "train_threshold", "save_images", "box_threshold", "gate_threshold", "precision")
CONTINUED = ("optimizer", "scheduler", "scaler")  # parts of Training that last.pth.tar adds to the model


class Training(NamedTuple):
    """All that a training step changes or needs."""
    model: PneumoniaUNET
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    augmentation: Augmentation
    runtime: Runtime


def load_data(args):
    """Reads the labels and prepares their images: the data set and {part: indices}, the parts being training,
    validation and, with --folds, test."""
    boxes, views = read_labels(args.labels)
    files, skipped = find_dicom_files(args.data, result_folders(args.save, Path(args.data)))
    warn("files are left out", [f"{path} {reason}" for path, reason in skipped])
    warn("ids of the table have no image and are left out", sorted(boxes.keys() - files.keys()))
    labels = {patient_id: len(boxes[patient_id]) > 0 for patient_id in boxes if patient_id in files}
    positives = sum(labels.values())
    if min(positives, len(labels) - positives) < 10:
        raise InputError(f"{args.labels} and {args.data} share {positives} images with opacities and "
                         f"{len(labels) - positives} without; training needs 10 of each: check --labels and --data")
    parts = split(labels, args)
    dataset = prepare({key: files[key] for ids in parts.values() for key in ids}, boxes, views, args)
    index_of = {patient_id: index for index, patient_id in enumerate(dataset.patient_ids)}
    return dataset, {name: [index_of[key] for key in ids if key in index_of] for name, ids in parts.items()}


def split(labels, args):
    """Patient ids of each part, from labels {patient_id: has_opacity}."""
    outside, fold = split_fold(labels, folds=args.folds, fold=args.fold) if args.folds else (labels, [])
    training, validation = split_patients({patient_id: labels[patient_id] for patient_id in outside},
                                          validation_share=VALIDATION_SHARE, seed=args.seed)
    parts = {"training": training, "validation": validation, **({"test": fold} if args.folds else {})}
    if args.debug:
        images = DEBUG_STEPS * args.batch_size
        validation_images = max(DEBUG_VALIDATION_STEPS * args.batch_size, DEBUG_IMAGES)
        limits = {"training": images, "validation": validation_images, "test": validation_images}
        for name, ids in parts.items():
            parts[name] = sorted(random.Random(args.seed).sample(ids, min(limits[name], len(ids))))
    return parts


def prepare(files, boxes, views, args):
    """PneumoniaDataset of `files` with the table's boxes."""
    dataset = PneumoniaDataset(
        files, boxes, views=views, rescale_factor=args.rescale_factor, workers=args.workers,
        progress=partial(progress, total=len(files), description="prepare"))
    warn("images are read with a remark", [f"{path} {note}" for path, note in dataset.notes])
    warn("images cannot be read and are left out", [f"{path}: {problem}" for path, problem in dataset.skipped])
    return dataset


def build_loaders(dataset, parts, args):
    """Loaders for training, for validation after an epoch, and of {part: indices} for the final scores, and the
    generator of the first."""
    training, validation = parts["training"], parts["validation"]
    generator = torch.Generator()
    weights = [POSITIVE_WEIGHT if len(dataset.boxes[index]) else 1 for index in training]
    samples = min(len(training), DEBUG_STEPS * args.batch_size) if args.debug else len(training)
    sampler = WeightedRandomSampler(weights, samples, generator=generator)
    epoch_ids = validation[:DEBUG_VALIDATION_STEPS * args.batch_size] if args.debug else validation
    final_ids = [ids[:DEBUG_IMAGES] if args.debug else ids for name, ids in parts.items() if name != "training"]
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    options = {"batch_size": args.batch_size, "collate_fn": tuple, "pin_memory": on_gpu}
    train_loader = DataLoader(Subset(dataset, training), sampler=sampler, generator=generator,
                              drop_last=samples >= args.batch_size, **options)
    val_loader, *final_loaders = (DataLoader(Subset(dataset, ids), **options) for ids in (epoch_ids, *final_ids))
    return train_loader, val_loader, final_loaders, generator


def build_model(args):
    """The network for the images of --rescale-factor, seen in at most GRID x GRID squares."""
    return PneumoniaUNET(patch_size=max(1, IMAGE_SIDE // args.rescale_factor // GRID), alpha_leaky=args.alpha_leaky,
                         bn_eps=args.bn_eps, bn_momentum=args.bn_momentum)


def build_optimizer(model, args, total_steps):
    """The optimizer, and its schedule: linear warm-up, then a cosine down to the share --learning-rate-decay."""
    kind, options = OPTIMIZERS[args.optimizer]
    given = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "eps": args.eps, "momentum": args.momentum}
    optimizer = kind(model.parameters(), **options | {key: value for key, value in given.items() if value is not None})

    def share(step):
        warmup = math.ceil(WARMUP * total_steps)
        if step < warmup:
            return (step + 1) / warmup
        cosine = (1 + math.cos(math.pi * min((step - warmup) / max(total_steps - warmup, 1), 1))) / 2
        return args.learning_rate_decay + (1 - args.learning_rate_decay) * cosine
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def build_training(model, args, total_steps, runtime):
    """Puts the model on the device with all that its training needs."""
    if runtime.device.type == "cpu":
        keep_freed_memory()
    model = model.to(runtime.device, memory_format=torch.channels_last)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    augmentation = Augmentation(torch.Generator())
    return Training(model, *build_optimizer(model, args, total_steps), scaler, augmentation, runtime)


def combined_loss(logits, masks):
    """Binary cross-entropy + 0.5 Dice over the batch's pixels; logits and masks (B, 1, S, S)."""
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * masks).sum() + 1
    dice = 1 - overlap / (probabilities.sum() + masks.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + 0.5 * dice


def train_one_epoch(training, loader, log):
    """One pass over the loader; calls log(losses, learning_rate) every CHECK_STEPS steps. Returns the mean loss."""
    model, optimizer, scheduler, scaler, augmentation, runtime = training
    model.train()
    pending, total = [], 0.0
    for step, (images, masks) in enumerate(progress(loader, total=len(loader), description="train"), 1):
        masks = masks.to(runtime.device, non_blocking=True).float()
        images, masks = augmentation(to_network(images, runtime.device), masks)
        loss = combined_loss(segment(model, images, runtime), masks)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        pending.append(loss.detach())
        if step % CHECK_STEPS == 0 or step == len(loader):
            losses = torch.stack(pending).tolist()
            check_losses(losses, step, math.ceil(scheduler.last_epoch / len(loader)), scheduler)
            log(losses, scheduler.get_last_lr()[0])
            total, pending = total + sum(losses), []
    return total / len(loader)


def check_losses(losses, last_step, epoch, scheduler):
    """Raises InputError for a loss that is not finite; `losses` are those of the epoch's steps up to `last_step`."""
    for step, loss in enumerate(losses, last_step - len(losses) + 1):
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} at step {step} of epoch {epoch}, learning rate "
                             f"{scheduler.get_last_lr()[0]:.2g}: lower --learning-rate; the best files so far are kept")


@torch.inference_mode()
def evaluate(model, loader, runtime, box_thresholds):
    """One pass over the loader's images, as an Evaluation at the box thresholds, boxes found as in predict.py.

    Raises InputError if the loss is not finite.
    """
    model.eval()
    dataset, indices = loader.dataset.dataset, iter(loader.dataset.indices)
    losses, confidences, scores = [], [], []
    for images, masks in progress(loader, total=len(loader), description="validate"):
        logits = segment(model, to_network(images, runtime.device), runtime)
        loss = combined_loss(logits, masks.to(runtime.device).float()).item()
        if not math.isfinite(loss):
            raise InputError(f"the validation loss is {loss} after this epoch: lower --learning-rate; the best files "
                             "so far are kept")
        losses += [loss] * len(images)
        for mask in to_probabilities(logits):
            index = next(indices)
            found = (find_boxes(mask, dataset.original_sizes[index], box_threshold=threshold, gate_threshold=0)
                     for threshold in box_thresholds)
            scores.append([average_precision_image(*predicted, dataset.boxes[index]) for predicted in found])
            confidences.append(image_confidence(mask))
    positive = np.array([len(dataset.boxes[index]) > 0 for index in loader.dataset.indices])
    views = np.array([dataset.views[index] for index in loader.dataset.indices])
    return Evaluation(float(np.mean(losses)), np.array(confidences), positive, views, np.array(scores))


def overlays(model, dataset, indices, runtime, thresholds, batch_size=16):
    """Yields for images of the data set the index and what draw_overlay takes, truth included."""
    model.eval()
    for batch in batched(indices, batch_size):
        masks = predict_masks(model, torch.from_numpy(dataset.images[batch])[:, None], runtime)
        for index, mask in zip(batch, masks):
            size = dataset.original_sizes[index]
            found = find_boxes(mask, size, box_threshold=thresholds.box, gate_threshold=thresholds.gate)
            picture = dataset.images[index].copy(), mask, (*found, size), dataset.boxes[index], str(thresholds)
            yield index, picture


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", "-d", default=default_path("TRAINML_DATA_PATH", "stage_2_train_images"), help="folder of DICOM files")
    add("--labels", "-l", default=default_path("TRAINML_MODEL_PATH", "train.csv"), help="table of data_processing.py")
    add("--save", default=default_path("TRAINML_OUTPUT_PATH"), help="folder for checkpoints, images, logs and metrics")
    add("--checkpoint", help="last.pth.tar of a run to continue, or weights to start from")
    add("--epochs", "-e", type=number(1, math.inf, int), default=2, help="passes over the training images")
    add("--debug", default=False, action=switch, help="a short run: 2 epochs of 50 steps, 100 images scored, no search")
    add("--seed", "-s", type=int, default=42, help="of the split, the order, the augmentation and the weights")
    add("--train-threshold", default=False, action=switch, help="search the two thresholds on the validation images")
    add("--save-images", default=True, action=switch, help="write annotated validation images")
    add("--folds", type=number(2, math.inf, int), help="cross-validation: leave out one of so many folds and score on it")
    add("--fold", type=number(0, math.inf, int), help="the fold that --folds leaves out, from 0")
    add("--optimizer", "-o", default="adam", choices=list(OPTIMIZERS), help="optimizer")
    add("--learning-rate", "--lr", type=number(1e-30, math.inf), help=f"its peak ({_defaults('lr')})")
    add("--learning-rate-decay", "--lrd", type=number(0, 1), default=0.01, help="share of the peak left at the end")
    add("--momentum", "-m", type=number(0, 1), help=f"of sgd ({_defaults('momentum')})")
    add("--eps", type=number(1e-30, math.inf), help="term in the optimizer's denominator (PyTorch's); not for sgd")
    add("--weight-decay", "--wd", type=number(0, math.inf), help=f"({_defaults('weight_decay')}, else 0)")
    add("--bn-momentum", type=number(0, 1), default=0.1, help="share of a batch in BatchNorm's running statistics")
    add("--bn-eps", type=number(1e-30, math.inf), default=1e-5, help="term in BatchNorm's denominator")
    add("--alpha-leaky", "--al", type=number(0, math.inf), default=0.03, help="slope of LeakyReLU below 0")
    add("--rescale-factor", "--rf", type=int, choices=RESCALE_FACTORS, default=4, help="1024 / side of network's image")
    add("--box-threshold", "--bt", type=number(0, 1), default=BOX_THRESHOLD, help="mask probability that makes a box")
    add("--gate-threshold", "--gt", type=number(0, 1), default=GATE_THRESHOLD,
        help="image confidence below which an image has no boxes")
    add_runtime_options(parser, batch_size=8)
    return parser


def _defaults(key):
    return ", ".join(f"{name} {options[key]}" for name, (_, options) in OPTIMIZERS.items() if key in options)


def parse_args(argv=None):
    """Returns arguments, and the model and the rest of the --checkpoint file if there is one.

    To continue a run, its own flags take the place of the defaults. Raises InputError for a flag that could not act.
    """
    parser, model, state = make_parser(), None, {}
    args = parser.parse_args(argv)
    if args.checkpoint:
        model, state = load_checkpoint(require(args.checkpoint, flag="--checkpoint"))
    if "optimizer" in state:
        stored = {key: value for key, value in state["args"].items() if key not in PLACES}
        parser.set_defaults(**stored)
        args = parser.parse_args(argv)
        for key in stored.keys() - CHANGEABLE:
            _refuse_if(getattr(args, key) != stored[key], f"--{key.replace('_', '-')} {getattr(args, key)}: the run to "
                       f"continue has {stored[key]}; leave the flag out")
    elif model is not None:
        for key, value in model.config.items():
            _refuse_if(getattr(args, key, value) != value, f"the checkpoint's network has {key} {value}: give "
                       f"--{key.replace('_', '-')} {value}")
        check_side(model, args.rescale_factor)
    _refuse_if(args.momentum is not None and args.optimizer != "sgd", "--momentum acts on --optimizer sgd alone")
    _refuse_if(args.eps is not None and args.optimizer == "sgd", "--eps has no part in --optimizer sgd")
    _refuse_if((args.folds is None) != (args.fold is None), "--folds and --fold go together: give both or neither")
    _refuse_if(args.folds is not None and args.fold >= args.folds, f"--fold {args.fold}: with --folds {args.folds} the "
               f"last fold is {(args.folds or 0) - 1}")
    if args.learning_rate is None:
        args.learning_rate = OPTIMIZERS[args.optimizer][1]["lr"]
    if args.debug:
        args.epochs, args.train_threshold = min(args.epochs, DEBUG_EPOCHS), False
    return args, model, state


def _refuse_if(wrong, message):
    if wrong:
        raise InputError(message)


def check_disk(folder, model):
    """Raises InputError if a run's checkpoints will not fit: 9 times the weights with Adam and one being written."""
    needed = 9 * sum(value.nbytes for value in model.state_dict().values())
    free = shutil.disk_usage(folder).free
    _refuse_if(free < needed, f"{folder} has {free / 1e6:.0f} MB left, a run needs {needed / 1e6:.0f}: free some, or "
               "give another folder with --save")


def fit(training, loaders, generators, history, args, writer):
    """Trains the epochs that `history` lacks, adds their scores to it and keeps last, loss.best and prec.best."""
    train_loader, val_loader = loaders

    def log(losses, learning_rate):
        step = training.scheduler.last_epoch
        for place, loss in enumerate(losses, step - len(losses)):
            writer.add_scalar("loss/train", loss, place)
        writer.add_scalar("learning_rate", learning_rate, step)

    for epoch in range(len(history), args.epochs):
        for generator in generators:
            generator.manual_seed(args.seed * 1_000_003 + epoch)
        started = time.monotonic()
        train_loss = train_one_epoch(training, train_loader, log)
        speed = len(train_loader.sampler) / (time.monotonic() - started)
        scores = validate(training, val_loader, args, writer, epoch)
        writer.add_scalar("speed/images_per_second", speed, epoch)
        history.append({"train_loss": train_loss, **scores})
        save_epoch(training, history, args)
        print(f"epoch {epoch + 1}/{args.epochs}: loss {train_loss:.4f}, validation loss {scores['loss']:.4f}, "
              f"RSNA mAP {scores['rsna']:.4f}, total AP {scores['total']:.4f}, AUC {scores['auc']:.4f}, "
              f"{speed:.1f} images/s", flush=True)


def validate(training, loader, args, writer, epoch):
    """Scores the validation images after an epoch, at the given thresholds, and shows the scores and a few pictures in
    TensorBoard."""
    model, runtime, dataset = training.model, training.runtime, loader.dataset.dataset
    thresholds = given_thresholds(args)
    evaluation = evaluate(model, loader, runtime, [thresholds.box])
    figures = summarize(evaluation, thresholds.gate)
    scores = {name: figures[name] for name in ("loss", "rsna", "total", "auc")}
    for tag, name in (("loss/validation", "loss"), ("ap/rsna", "rsna"), ("ap/total", "total"), ("ap/auc", "auc")):
        writer.add_scalar(tag, scores[name], epoch)
    writer.add_pr_curve("image has opacity", evaluation.positive, evaluation.confidences, epoch)
    shown = [index for index in loader.dataset.indices if len(dataset.boxes[index])][:SHOWN]
    for place, (_, overlay) in enumerate(overlays(model, dataset, shown, runtime, thresholds)):
        writer.add_image(f"validation/{place}", np.asarray(draw_overlay(*overlay)), epoch, dataformats="HWC")
    return scores


def given_thresholds(args):
    """The pair of --box-threshold and --gate-threshold."""
    default = (args.box_threshold, args.gate_threshold) == (BOX_THRESHOLD, GATE_THRESHOLD)
    return Thresholds(args.box_threshold, args.gate_threshold, "defaults" if default else "given by flags")


def choose_thresholds(model, loader, runtime, args, writer):
    """The pair of thresholds that the run hands over: the given one, or with --train-threshold what a search on the
    loader's images proves better."""
    given = given_thresholds(args)
    if not args.train_threshold:
        return given
    box_thresholds = np.union1d(BOX_THRESHOLDS, given.box).tolist()
    gate_thresholds = np.union1d(GATE_THRESHOLDS, given.gate).tolist()
    default = box_thresholds.index(given.box), gate_thresholds.index(given.gate)
    evaluation = evaluate(model, loader, runtime, box_thresholds)
    (row, column), table = search_thresholds(evaluation, gate_thresholds, default)
    for threshold, rsna in zip(box_thresholds, table[:, column]):
        writer.add_scalar("ap/rsna at threshold in percent", rsna, round(100 * threshold))
    images = len(evaluation.scores)
    if (row, column) == default:
        return given._replace(source=f"{given.source}; a search on {images} images proved nothing better")
    return Thresholds(box_thresholds[row], gate_thresholds[column], f"searched on {images} images")


def checkpoint_state(history, args):
    """What every checkpoint holds beside the weights: all that predict.py needs, and how they came about."""
    thresholds = given_thresholds(args)
    return {"rescale_factor": args.rescale_factor, "best_threshold": thresholds.box, "gate_threshold": thresholds.gate,
            "threshold_source": thresholds.source, "size_weight": SIZE_WEIGHT, "args": plain_args(args),
            "history": history}


def save_epoch(training, history, args):
    """Writes last.pth.tar, from which a run continues exactly, and the best files where this epoch is the best yet."""
    best = {"loss.best": min(history, key=lambda scores: scores["loss"]),
            "prec.best": max(reversed(history), key=lambda scores: scores["rsna"])}
    common = checkpoint_state(history, args)
    for name, scores in best.items():
        path = args.save / f"{name}.pth.tar"
        if scores is history[-1] or not path.exists():
            save_checkpoint(path, training.model, **common)
    states = {name: getattr(training, name).state_dict() for name in CONTINUED}
    save_checkpoint(args.save / "last.pth.tar", training.model, **states, **common)


def copy_best(source, save):
    """Takes the best files along where a continued run writes to another folder."""
    for name in ("loss.best.pth.tar", "prec.best.pth.tar"):
        if not (save / name).exists() and (source / name).exists():
            with atomic_write(save / name) as file:
                file.write((source / name).read_bytes())


def plain_args(args):
    plain = (int, float, type(None))
    return {key: value if isinstance(value, plain) else str(value) for key, value in vars(args).items()}


def finish(training, loaders, history, args, writer):
    """Scores the last epoch's weights as predict.py will use them and writes final.pth.tar; returns the final figures.

    The learning rate ends near 0, so the last weights are the ones that the run was made for; the best epoch of a small
    validation set is mostly luck (docs/experiments.md). `loaders` are those of the validation images and, with --folds,
    of the fold, which is then what is scored.
    """
    model, runtime = training.model, training.runtime
    thresholds = choose_thresholds(model, loaders[0], runtime, args, writer)
    scored = loaders[-1]
    scores = summarize(evaluate(model, scored, runtime, [thresholds.box]), thresholds.gate)
    if args.save_images:
        folder = make_folder(args.save / "images", flag="--save", variable="TRAINML_OUTPUT_PATH")
        dataset, indices = scored.dataset.dataset, scored.dataset.indices
        pictures = overlays(model, dataset, indices, runtime, thresholds)
        pictures = progress(pictures, total=len(indices), description="draw")
        save_overlays((picture_path(folder, dataset.patient_ids[index]), overlay) for index, overlay in pictures)
    figures = {"rsna_mean_average_precision": scores["rsna"], "rsna_standard_error": scores["rsna_standard_error"],
               "total_average_precision": scores["total"], "image_roc_auc": scores["auc"],
               "image_roc_auc_AP": scores["auc_AP"], "image_roc_auc_PA": scores["auc_PA"],
               "validation_loss": scores["loss"], "scored_images": len(scored.dataset),
               "best_threshold": thresholds.box, "gate_threshold": thresholds.gate,
               "threshold_source": thresholds.source, "size_weight": SIZE_WEIGHT}
    save_checkpoint(args.save / "final.pth.tar", model, **checkpoint_state(history, args) | figures)
    log_comparison(writer, args, figures)
    return thresholds, scores, figures


def log_comparison(writer, args, figures):
    """A row of TensorBoard's HParams table: the flags that are usually compared, and the scores."""
    compared = {key: str(getattr(args, key)) for key in ("batch_size", "epochs", "optimizer", "rescale_factor")}
    names = {"rsna": "rsna_mean_average_precision", "total": "total_average_precision", "auc": "image_roc_auc"}
    writer.add_hparams({**compared, "learning_rate": str(args.learning_rate)},
                       {f"final/{name}": figures[key] for name, key in names.items()}, run_name=".")


def main(argv=None):
    started = time.monotonic()
    args, model, state = parse_args(argv)
    runtime = choose_runtime(args.device, args.precision)
    require_folder(args.data, flag="--data", variable="TRAINML_DATA_PATH")
    require(args.labels, flag="--labels", variable="TRAINML_MODEL_PATH")
    args.save = make_folder(args.save, flag="--save", variable="TRAINML_OUTPUT_PATH")
    print(*(f"{key}={value}" for key, value in vars(args).items()), f"on {runtime.device.type} in {runtime.dtype}")
    torch.manual_seed(args.seed)
    if model is None:
        model = build_model(args)
    check_disk(args.save, model)

    dataset, parts = load_data(args)
    write_csv(args.save / "split.csv", [("patientId", "split"), *(
        (dataset.patient_ids[index], name) for name, part in parts.items() for index in part)])
    train_loader, val_loader, final_loaders, generator = build_loaders(dataset, parts, args)
    print(" and ".join(f"{len(indices)} {name}" for name, indices in parts.items()), "images", flush=True)
    prepared = time.monotonic()

    training = build_training(model, args, args.epochs * len(train_loader), runtime)
    if "optimizer" in state:
        copy_best(Path(args.checkpoint).parent, args.save)
        for name in CONTINUED:
            getattr(training, name).load_state_dict(state[name])
    history = list(state.get("history", []))
    with SummaryWriter(args.save / "logs", purge_step=training.scheduler.last_epoch or None) as writer:
        try:
            fit(training, (train_loader, val_loader), (generator, training.augmentation.generator), history, args, writer)
        except KeyboardInterrupt:
            if history and (args.save / "last.pth.tar").exists():
                print(f"continue with: python train.py --checkpoint {args.save / 'last.pth.tar'} --save {args.save}")
            raise
        trained = time.monotonic()
        thresholds, scores, figures = finish(training, final_loaders, history, args, writer)
    figures = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in figures.items()}
    write_text(args.save / "metrics.json", json.dumps({
        **figures, "history": history, **{f"{name}_images": len(indices) for name, indices in parts.items()},
        "skipped_images": len(dataset.skipped), "arguments": plain_args(args), "versions": versions(),
        "seconds": {"prepare": prepared - started, "train": trained - prepared, "score": time.monotonic() - trained}},
        indent=1))
    print(thresholds)
    print(*score_lines(scores, len(final_loaders[-1].dataset)), sep="\n")
    # the other images make a good model, but nobody may miss that some were lost by our own fault
    return 1 if INTERNAL_ERROR in dict(dataset.skipped).values() else 0


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


if __name__ == "__main__":
    run(main)
