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

from data_processing import BOX_COLUMNS, check_boxes, read_table, warn
from dataset import Augmentation, PneumoniaDataset, split_patients
from dicom import IMAGE_SIDE, INTERNAL_ERROR, find_dicom_files
from job import (InputError, atomic_write, default_path, keep_freed_memory, make_folder, require, require_folder,
                 result_folders, run)
from metrics import (BOX_THRESHOLDS, GATE_THRESHOLDS, average_precision_image, cross_validated_precision, gate_scores,
                     mean_average_precision, roc_auc, search_thresholds, total_average_precision)
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
COARSE_THRESHOLDS = BOX_THRESHOLDS[5::6]  # 0.1 to 0.9, for the search after every epoch
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
    """Reads train.csv and prepares its images: (data set, training indices, validation indices)."""
    table = read_table(args.labels, ["patientId", *BOX_COLUMNS, "Target"])
    check_boxes(table, args.labels)
    files, skipped = find_dicom_files(args.data, result_folders(args.save, Path(args.data)))
    warn("files are left out", [f"{path} {reason}" for path, reason in skipped])
    warn("ids of the table have no image and are left out", sorted(set(table["patientId"]) - files.keys()))
    table = table[table["patientId"].isin(files.keys())]
    labels = table.groupby("patientId")["Target"].max()
    positives = int((labels == 1).sum())
    if min(positives, len(labels) - positives) < 10:
        raise InputError(f"{args.labels} and {args.data} share {positives} images with opacities and "
                         f"{len(labels) - positives} without; training needs 10 of each: check --labels and --data")
    parts = split_patients(labels.to_dict(), validation_share=VALIDATION_SHARE, seed=args.seed)
    if args.debug:
        sizes = (DEBUG_STEPS * args.batch_size, max(DEBUG_VALIDATION_STEPS * args.batch_size, DEBUG_IMAGES))
        parts = [sorted(random.Random(args.seed).sample(ids, min(size, len(ids)))) for ids, size in zip(parts, sizes)]
    dataset = prepare(table, {patient_id: files[patient_id] for ids in parts for patient_id in ids}, args)
    place = {patient_id: index for index, patient_id in enumerate(dataset.patient_ids)}
    return dataset, *([place[patient_id] for patient_id in ids if patient_id in place] for ids in parts)


def prepare(table, files, args):
    """PneumoniaDataset of `files` with the table's boxes."""
    boxes = dict.fromkeys(files, ())
    boxes |= {key: group.to_numpy() for key, group in table[table["Target"] == 1].groupby("patientId")[BOX_COLUMNS]}
    dataset = PneumoniaDataset(
        files, boxes, rescale_factor=args.rescale_factor, workers=args.workers,
        progress=partial(progress, total=len(files), description="prepare"))
    warn("images are used in part", [f"{path} {note}" for path, note in dataset.notes])
    warn("images cannot be read and are left out", [f"{path}: {problem}" for path, problem in dataset.skipped])
    return dataset


def build_loaders(dataset, training, validation, args):
    """Loaders for training, validation after an epoch, and the final validation, and the generator of the first."""
    generator = torch.Generator()
    weights = [POSITIVE_WEIGHT if len(dataset.boxes[index]) else 1 for index in training]
    samples = min(len(training), DEBUG_STEPS * args.batch_size) if args.debug else len(training)
    sampler = WeightedRandomSampler(weights, samples, generator=generator)
    epoch_ids = validation[:DEBUG_VALIDATION_STEPS * args.batch_size] if args.debug else validation
    final_ids = validation[:DEBUG_IMAGES] if args.debug else validation
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    options = {"batch_size": args.batch_size, "collate_fn": tuple, "pin_memory": on_gpu}
    train_loader = DataLoader(Subset(dataset, training), sampler=sampler, generator=generator,
                              drop_last=samples >= args.batch_size, **options)
    val_loader, final_loader = (DataLoader(Subset(dataset, ids), **options) for ids in (epoch_ids, final_ids))
    return train_loader, val_loader, final_loader, generator


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
def evaluate(model, loader, runtime, box_thresholds, gate_thresholds):
    """Predicts the loader's images once and scores them at every pair of thresholds, boxes found as in predict.py.

    Returns the scores {"loss", "rsna", "unseen", "total", "auc"} at the best pair (see search_thresholds; "unseen" is
    cross_validated_precision), that pair as {"box_threshold", "gate_threshold"}, the table of mean average precisions
    it comes from (T, G), and the images' truths and confidences (N,), from which the AUC is: whether there is an
    opacity, and image_confidence. Raises InputError if the loss is not finite.
    """
    model.eval()
    dataset, indices = loader.dataset.dataset, iter(loader.dataset.indices)
    losses, scores, confidences, truths = [], [], [], []
    for images, masks in progress(loader, total=len(loader), description="validate"):
        logits = segment(model, to_network(images, runtime.device), runtime)
        loss = combined_loss(logits, masks.to(runtime.device).float()).item()
        if not math.isfinite(loss):
            raise InputError(f"the validation loss is {loss} after this epoch: lower --learning-rate; the best files "
                             "so far are kept")
        losses += [loss] * len(images)
        for mask in to_probabilities(logits):
            index = next(indices)
            boxes, size = dataset.boxes[index], dataset.original_sizes[index]
            found = (find_boxes(mask, size, box_threshold=box_threshold, gate_threshold=0)
                     for box_threshold in box_thresholds)
            scores.append([average_precision_image(*predicted, boxes) for predicted in found])
            confidences.append(image_confidence(mask))
            truths.append(len(boxes) > 0)
    scores, confidences, truths = np.array(scores), np.array(confidences), np.array(truths)
    table, (row, column) = search_thresholds(scores, confidences, truths, gate_thresholds)
    thresholds = {"box_threshold": float(box_thresholds[row]), "gate_threshold": float(gate_thresholds[column])}
    gated = gate_scores(scores[:, row], confidences, truths, gate_thresholds[column])
    scores = {"loss": float(np.mean(losses)), "rsna": mean_average_precision(gated),
              "unseen": cross_validated_precision(scores, confidences, truths, gate_thresholds),
              "total": total_average_precision(gated), "auc": roc_auc(confidences, truths)}
    return scores, thresholds, table, truths, confidences


def overlays(model, dataset, indices, runtime, thresholds, batch_size=16):
    """Yields for images of the data set the index and what draw_overlay takes, truth included."""
    model.eval()
    for batch in batched(indices, batch_size):
        masks = predict_masks(model, torch.from_numpy(dataset.images[batch])[:, None], runtime)
        for index, mask in zip(batch, masks):
            size = dataset.original_sizes[index]
            found = find_boxes(mask, size, **thresholds)
            yield index, (dataset.images[index].copy(), mask, (*found, size), dataset.boxes[index])


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
        model, state = load_checkpoint(require(args.checkpoint, flag="--checkpoint", variable="TRAINML_OUTPUT_PATH"))
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
    """Scores the validation images after an epoch and shows the scores and a few pictures in TensorBoard.

    With --train-threshold at thresholds of this epoch's own, so that epochs are compared as they would be used.
    """
    model, runtime, dataset = training.model, training.runtime, loader.dataset.dataset
    scores, thresholds, _, truths, confidences = evaluate(
        model, loader, runtime, *thresholds_to_try(args, COARSE_THRESHOLDS))
    for tag, name in (("loss/validation", "loss"), ("ap/rsna", "rsna"), ("ap/total", "total"), ("ap/auc", "auc")):
        writer.add_scalar(tag, scores[name], epoch)
    writer.add_pr_curve("image has opacity", truths, confidences, epoch)
    shown = [index for index in loader.dataset.indices if len(dataset.boxes[index])][:SHOWN]
    for place, (_, overlay) in enumerate(overlays(model, dataset, shown, runtime, thresholds)):
        writer.add_image(f"validation/{place}", np.asarray(draw_overlay(*overlay)), epoch, dataformats="HWC")
    return scores


def thresholds_to_try(args, box_thresholds=BOX_THRESHOLDS):
    """Mask and gate thresholds for `evaluate`: the given pair, or all of the search with --train-threshold."""
    return (box_thresholds, GATE_THRESHOLDS) if args.train_threshold else ([args.box_threshold], [args.gate_threshold])


def save_epoch(training, history, args):
    """Writes last.pth.tar, from which a run continues exactly, and the best files where this epoch is the best yet."""
    arguments = plain_args(args)
    best = {"loss.best": min(history, key=lambda scores: scores["loss"]),
            "prec.best": max(reversed(history), key=lambda scores: scores["rsna"])}
    common = {"rescale_factor": args.rescale_factor, "best_threshold": args.box_threshold,
              "gate_threshold": args.gate_threshold, "size_weight": SIZE_WEIGHT, "args": arguments, "history": history}
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


def finish(loader, runtime, args, writer):
    """Scores the best weights as predict.py will use them and writes final.pth.tar; returns the final figures."""
    model, state = load_checkpoint(args.save / "prec.best.pth.tar", runtime.device)
    box_thresholds, gate_thresholds = thresholds_to_try(args)
    scores, thresholds, table, *_ = evaluate(model, loader, runtime, box_thresholds, gate_thresholds)
    column = list(gate_thresholds).index(thresholds["gate_threshold"])
    for threshold, score in zip(box_thresholds, table[:, column]):
        writer.add_scalar("ap/rsna at threshold in percent", score, round(100 * threshold))
    if args.save_images:
        folder = make_folder(args.save / "images", flag="--save", variable="TRAINML_OUTPUT_PATH")
        dataset, indices = loader.dataset.dataset, loader.dataset.indices
        pictures = overlays(model, dataset, indices, runtime, thresholds)
        pictures = progress(pictures, total=len(indices), description="draw")
        save_overlays((picture_path(folder, dataset.patient_ids[index]), overlay) for index, overlay in pictures)
    figures = {"rsna_mean_average_precision": scores["rsna"], "total_average_precision": scores["total"],
               "image_roc_auc": scores["auc"], "validation_loss": scores["loss"],
               "best_threshold": thresholds["box_threshold"], "gate_threshold": thresholds["gate_threshold"],
               "size_weight": SIZE_WEIGHT}
    if args.train_threshold:
        figures["rsna_at_thresholds_of_other_images"] = scores["unseen"]
    state = {key: value for key, value in state.items() if key not in ("state_dict", "config")}
    save_checkpoint(args.save / "final.pth.tar", model, **state | figures)
    log_comparison(writer, args, figures)
    return figures


def log_comparison(writer, args, figures):
    """A row of TensorBoard's HParams table: the flags that are usually compared, and the scores."""
    compared = {key: str(getattr(args, key)) for key in ("batch_size", "epochs", "optimizer", "rescale_factor")}
    rate = args.learning_rate or OPTIMIZERS[args.optimizer][1]["lr"]
    names = {"rsna": "rsna_mean_average_precision", "total": "total_average_precision", "auc": "image_roc_auc"}
    writer.add_hparams({**compared, "learning_rate": str(rate)},
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

    dataset, *parts = load_data(args)
    write_csv(args.save / "split.csv", [("patientId", "split"), *(
        (dataset.patient_ids[index], name) for name, part in zip(("training", "validation"), parts) for index in part)])
    *loaders, final_loader, generator = build_loaders(dataset, *parts, args)
    print(f"{len(parts[0])} training and {len(parts[1])} validation images", flush=True)
    prepared = time.monotonic()

    training = build_training(model, args, args.epochs * len(loaders[0]), runtime)
    if "optimizer" in state:
        copy_best(Path(args.checkpoint).parent, args.save)
        for name in CONTINUED:
            getattr(training, name).load_state_dict(state[name])
    history = list(state.get("history", []))
    with SummaryWriter(args.save / "logs", purge_step=training.scheduler.last_epoch or None) as writer:
        try:
            fit(training, loaders, (generator, training.augmentation.generator), history, args, writer)
        except KeyboardInterrupt:
            if history and (args.save / "last.pth.tar").exists():
                print(f"continue with: python train.py --checkpoint {args.save / 'last.pth.tar'} --save {args.save}")
            raise
        trained = time.monotonic()
        figures = finish(final_loader, runtime, args, writer)
    write_text(args.save / "metrics.json", json.dumps({
        **figures, "history": history, "training_images": len(parts[0]), "validation_images": len(parts[1]),
        "skipped_images": len(dataset.skipped), "arguments": plain_args(args), "versions": versions(),
        "seconds": {"prepare": prepared - started, "train": trained - prepared, "score": time.monotonic() - trained}},
        indent=1))
    if args.train_threshold:
        print(f"RSNA mAP at thresholds of other images: {figures['rsna_at_thresholds_of_other_images']:.4f}")
    print(f"Image ROC AUC: {figures['image_roc_auc']:.4f}")
    print(f"RSNA Mean Average Precision: {figures['rsna_mean_average_precision']:.4f}")
    print(f"Total Average Precision: {figures['total_average_precision']:.4f}")
    # the other images make a good model, but nobody may miss that some were lost by our own fault
    return 1 if INTERNAL_ERROR in dict(dataset.skipped).values() else 0


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


if __name__ == "__main__":
    run(main)
