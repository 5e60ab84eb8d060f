"""The processes of `torchrun`: how they divide the work and put together what each has made.

Every process has a Runtime with its `rank`, 0 to `world` - 1. In a run of one process each of these
functions hands back what it was given.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, Sampler

from cli import InputError
from model import Runtime

PATIENCE = timedelta(hours=6)  # with the process that prepares the images or draws them


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
            raise InputError(f"{processes} processes have {gpus} GPUs: lower --nproc-per-node")
        device, backend = torch.device("cuda", _local_rank()), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=PATIENCE)
    return runtime._replace(device=device, rank=dist.get_rank(), world=world)


def leave(runtime: Runtime) -> None:
    """Waits until every process has come here, since torchrun stops all when one fails."""
    if runtime.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def once(make: Callable[[], Any], runtime: Runtime) -> Any:
    """Calls `make` in one process of each machine; returns to all of them what it returned."""
    made = make() if _local_rank() == 0 else None
    everywhere = gather([made], runtime)
    return everywhere[runtime.rank - _local_rank()] if made is None else made


def share(items: Sequence, runtime: Runtime) -> Sequence:
    """The consecutive items that fall to this process."""
    first, end = (len(items) * rank // runtime.world for rank in (runtime.rank, runtime.rank + 1))
    return items[first:end]


def gather(items: list, runtime: Runtime) -> list:
    """The items of all processes, in the order of their ranks."""
    if runtime.world == 1:
        return items
    parts = [None] * runtime.world
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


class SharedBatches(BatchSampler):
    """Batches that all processes draw alike, and of which each takes its own indices."""

    def __init__(self, order: Sampler, batch_size: int, runtime: Runtime, *, drop_last: bool):
        super().__init__(order, batch_size, drop_last)
        self.runtime = runtime

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield batch[self.runtime.rank::self.runtime.world]


def distribute(model: nn.Module, runtime: Runtime) -> nn.Module:
    """What training steps call in place of the model, to average the gradients of all processes."""
    if runtime.world == 1:
        return model
    if runtime.device.type == "cuda":  # SyncBatchNorm is for GPUs alone; weights stay the same
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model)


def share_statistics(model: nn.Module, runtime: Runtime) -> None:
    """Gives all processes the running statistics of BatchNorm of rank 0."""
    for buffer in model.buffers() if runtime.world > 1 else ():
        dist.broadcast(buffer, src=0)
