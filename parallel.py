"""Divides the work among the processes of `torchrun` and puts their results together.

Every process has a Runtime with its `rank`, 0 to `world` - 1. With a single process the functions
below change nothing.
"""

import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, Sampler

from cli import STOP_SIGNALS, InputError
from model import Runtime

PATIENCE = timedelta(hours=6)  # while one process prepares or draws the images


def join(runtime: Runtime) -> Runtime:
    """Connects this process to the others that torchrun started, and gives each a GPU of its own.

    Raises InputError if there are fewer GPUs than processes.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return runtime
    device, backend = runtime.device, "gloo"
    if device.type == "cuda":
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise InputError(f"processes: {processes}, GPUs: {gpus}; lower --nproc-per-node")
        device, backend = torch.device("cuda", _local_rank()), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    # while it waits for the others, a handler of Python would not be called
    handlers = {signum: signal.signal(signum, signal.SIG_DFL) for signum in STOP_SIGNALS}
    dist.init_process_group(backend, timeout=PATIENCE)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    return runtime._replace(device=device, rank=dist.get_rank(), world=world)


def leave(runtime: Runtime) -> None:
    """Waits until every process gets here, since torchrun stops the others as soon as one fails."""
    if runtime.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def once(make: Callable[[], Any], runtime: Runtime) -> Any:
    """Calls `make` in one process of each machine and returns its result in all of them."""
    if runtime.world == 1:
        return make()
    made = make() if _local_rank() == 0 else None
    pickles = gather([pickle.dumps(made)], runtime)  # those of other machines stay closed
    return pickle.loads(pickles[runtime.rank - _local_rank()]) if made is None else made


def share(items: Sequence, runtime: Runtime) -> Sequence:
    """This process's share of the items, which are consecutive."""
    first = len(items) * runtime.rank // runtime.world
    end = len(items) * (runtime.rank + 1) // runtime.world
    return items[first:end]


def gather(items: list, runtime: Runtime) -> list:
    """The items of all processes, in the order of their ranks."""
    if runtime.world == 1:
        return items
    parts = [None] * runtime.world
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


class SharedBatches(BatchSampler):
    """Draws the same batches in every process and yields this process's share of each."""

    def __init__(self, order: Sampler, batch_size: int, runtime: Runtime, *, drop_last: bool):
        super().__init__(order, batch_size, drop_last)
        self.runtime = runtime

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield batch[self.runtime.rank::self.runtime.world]


def distribute(model: nn.Module, runtime: Runtime) -> nn.Module:
    """Wraps the model for training steps, which then average the gradients of all processes."""
    if runtime.world == 1:
        return model
    if runtime.device.type == "cuda":  # SyncBatchNorm is for GPUs alone; weights stay the same
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model)


def share_statistics(model: nn.Module, runtime: Runtime) -> None:
    """Gives BatchNorm's running statistics of rank 0 to all processes."""
    if runtime.world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
