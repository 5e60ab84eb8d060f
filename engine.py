"""The state of a training run, and passes over its images: an epoch, an evaluation.

The processes of a run (parallel.py) share both.
"""

import math
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler

import cli
import parallel
from data_processing import read_split
from dataset import Augmentation, PneumoniaDataset
from metrics import Evaluation, Grid, Thresholds, find_candidates, image_confidence, score_mask
from model import PneumoniaUNET, Runtime, load_checkpoint

POSITIVE_WEIGHT = 2  # how much more often an image with opacities is drawn in training
CHECK_STEPS = 20  # between checks of the loss, each of which waits for the GPU
RANK_SEED = 1009  # difference between the augmentation seeds of neighbouring ranks
NETWORK_FLAGS = "width", "alpha_leaky", "bn_eps", "bn_momentum"
STATEFUL = ("optimizer", "scheduler", "scaler")  # what last.pth.tar adds to the model


class Start(NamedTuple):
    """What a run starts from: nothing, the weights of a checkpoint, or the state of a run."""
    model: PneumoniaUNET | None = None
    state: dict[str, Any] = {}  # content of the checkpoint
    path: Path | None = None  # of the checkpoint

    @classmethod
    def of_file(cls, path: str | None) -> "Start":
        """Of the file that --checkpoint names; raises InputError as load_checkpoint does."""
        if not path:
            return cls()
        path = cli.require(path, "file", flag="--checkpoint")
        return cls(*load_checkpoint(path), path)

    @property
    def continues(self) -> bool:
        """Whether the checkpoint is the last.pth.tar of a run."""
        return "optimizer" in self.state

    def split(self) -> dict[str, str]:
        """The {patient_id: part} of the run; raises InputError if its split.csv is not there."""
        path = self.path.with_name("split.csv")
        cli.refuse_if(not path.exists(), f"{path} does not exist: put the run's own there, so that "
                      "no image that it was trained on is scored")
        return read_split(path)

    def network(self) -> dict[str, Any]:
        """The flags that the network was built with."""
        config = {key: self.model.config[key] for key in NETWORK_FLAGS} if self.model else {}
        factor = self.state.get("rescale_factor")
        return config | {"rescale_factor": factor} if factor else config

    def flags(self) -> dict[str, Any]:
        """The flags that the run inherits."""
        return self.network() | (self.state["args"] if self.continues else {})


class Training:
    """State of a training run: what its steps need and change."""

    def __init__(self, model: PneumoniaUNET, optimizer: torch.optim.Optimizer,
                 scheduler: torch.optim.lr_scheduler.LRScheduler, loader: DataLoader,
                 runtime: Runtime):
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.loader, self.runtime = loader, runtime
        self.augmentation = Augmentation(torch.Generator())
        self.scaler = torch.amp.GradScaler(runtime.device.type,
                                           enabled=runtime.dtype == torch.float16)
        self.network = parallel.distribute(model, runtime)
        self.history = []  # figures of each epoch done

    def seed_epoch(self, seed: int, epoch: int) -> None:
        """Seeds an epoch, counted from 1, by its number and the run's seed alone, so that a
        continued run draws the same. Processes draw the same order of images, but augment them
        differently."""
        seed = seed * 1_000_003 + epoch - 1
        self.loader.generator.manual_seed(seed)
        self.augmentation.generator.manual_seed(seed + RANK_SEED * self.runtime.rank)

    def add_epoch(self, train_loss: float, figures: dict[str, float]) -> dict[str, float]:
        """Adds an epoch to the history, with the `figures` of Evaluation.summarize; returns it."""
        scores = {name: figures[name] for name in ("loss", "rsna", "total", "auc")}
        self.history.append({"train_loss": train_loss, **scores,
                             "learning_rate": self.scheduler.get_last_lr()[0]})
        return self.history[-1]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, besides weights and history, so that the run can continue."""
        return {name: getattr(self, name).state_dict() for name in STATEFUL}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state and the history in a last.pth.tar."""
        self.history = state["history"]
        # the optimizer's form, fused or not, changes the last bits: that of the run's beginning is
        # kept, except with a scaler, which needs the form built here
        for group in state["optimizer"]["param_groups"]:
            if group.get("fused") or self.scaler.is_enabled():
                group["fused"] = self.optimizer.defaults.get("fused")
        for name in STATEFUL:
            if state[name]:  # that of a scaler not in use is empty
                getattr(self, name).load_state_dict(state[name])
        # the number of steps in an epoch depends on the number of processes
        self.scheduler.last_epoch = len(self.history) * len(self.loader) - 1
        self.scheduler.step()


def training_loader(dataset: PneumoniaDataset, indices: Sequence[int], batch_size: int,
                    runtime: Runtime) -> DataLoader:
    """Loads this process's share of training batches; its generator decides the order of images.

    The sampler yields whole batches of indices, each of which the data set turns into a batch of
    images, so the loader itself does not batch: batch_size=None.
    """
    generator = torch.Generator()
    weights = [POSITIVE_WEIGHT if len(dataset.boxes[index]) else 1 for index in indices]
    order = WeightedRandomSampler(weights, len(indices), generator=generator)
    size = batch_size * runtime.world  # of all processes together
    batches = parallel.SharedBatches(order, size, runtime, drop_last=len(indices) >= size)
    return DataLoader(Subset(dataset, indices), batch_size=None, sampler=batches,
                      generator=generator, pin_memory=runtime.device.type == "cuda")


def combined_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy + 0.5 Dice over the batch's pixels; logits and masks (B, 1, S, S)."""
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * masks).sum() + 1
    dice = 1 - overlap / (probabilities.sum() + masks.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + 0.5 * dice


def train_one_epoch(training: Training, log: Callable[[int, list[float], float], None],
                    ) -> tuple[float, float]:
    """One pass over the loader; returns the mean loss and the images per second.

    Calls log(last step, losses, learning rate) every CHECK_STEPS steps; its step counts over all
    epochs. Raises InputError as check_losses does.
    """
    loader, runtime = training.loader, training.runtime
    optimizer, scheduler, scaler = training.optimizer, training.scheduler, training.scaler
    training.model.train()
    started, pending, total = time.monotonic(), [], 0.0
    epoch = len(training.history) + 1
    batches = cli.progress(loader, total=len(loader), description=f"epoch {epoch}",
                           scale=loader.sampler.batch_size)
    for step, (images, masks) in enumerate(batches, 1):
        # forward, on the device
        masks = masks.to(runtime.device, non_blocking=True).float()
        images, masks = training.augmentation(runtime.load(images), masks)
        loss = combined_loss(runtime.segment(training.network, images), masks)
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
            log(scheduler.last_epoch, losses, scheduler.get_last_lr()[0])
            total += sum(losses)
            pending.clear()
    parallel.share_statistics(training.model, runtime)
    images = min(len(loader) * loader.sampler.batch_size, len(loader.dataset))
    return total / len(loader), images / (time.monotonic() - started)


def check_losses(losses: Sequence[float], last_step: int, epoch: int,
                 learning_rate: float) -> None:
    """Raises InputError if one of the losses of the steps up to `last_step` is not finite."""
    for step, loss in enumerate(losses, last_step - len(losses) + 1):
        if not math.isfinite(loss):
            raise cli.InputError(
                f"the loss is {loss} at step {step} of epoch {epoch}, learning rate "
                f"{learning_rate:.2g}: lower --learning-rate; the best files so far are kept")


@torch.inference_mode()
def evaluate(model: nn.Module, dataset: PneumoniaDataset, indices: Sequence[int],
             grid: Grid, *, runtime: Runtime, batch_size: int = 8) -> Evaluation:
    """One pass over images of the data set, with boxes found as in predict.py and scored at the
    thresholds of the grid, of which the first are those in use. Processes share the batches; each
    returns the whole Evaluation.

    Raises InputError if the loss is not finite.
    """
    model.eval()
    batches = parallel.share(list(cli.batched(indices, batch_size)), runtime)
    rows = []
    for batch in cli.progress(batches, total=len(batches), description="validate",
                              scale=batch_size):
        images, masks = dataset[batch]
        logits = runtime.segment(model, runtime.load(images))
        loss = combined_loss(logits, masks.to(runtime.device).float()).item()
        if not math.isfinite(loss):
            raise cli.InputError(f"the validation loss is {loss} after this epoch: lower "
                                 "--learning-rate; the best files so far are kept")
        for index, mask in zip(batch, logits.sigmoid()[:, 0].cpu().numpy()):
            size, boxes = dataset.original_sizes[index], dataset.boxes[index]
            scores = score_mask(mask, size, boxes, grid)
            candidates = find_candidates(mask, size, boxes, Thresholds(grid.boxes[0]))
            rows.append((loss, image_confidence(mask), scores, candidates))
    losses, confidences, scores, candidates = zip(*parallel.gather(rows, runtime))
    true_boxes = np.array([len(dataset.boxes[index]) for index in indices])
    views = np.array([dataset.views[index] for index in indices])
    return Evaluation(float(np.mean(losses)), grid, np.array(confidences), true_boxes,
                      views, np.array(scores), np.array([*chain(*candidates)]).reshape(-1, 2))
