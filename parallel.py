"""Divides the work among the processes of `torchrun`.

Every process has a Runtime with its `rank`, 0 to `world` - 1. With a single process the functions
below change nothing.
"""

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, Sampler

import cli
from model import Runtime, choose_runtime

PATIENCE = timedelta(hours=1)  # of the others while one process prepares or draws the images
FIRST_SECONDS = 10  # for the first process to report an error that all have


class Launch(NamedTuple):
    """What a launcher says of this process in its variables."""
    world: int = 1  # number of processes
    local_rank: int = 0  # of this process among those on its machine
    local_world: int = 1  # number of processes on this machine


def find_launch() -> Launch:
    """The Launch of torchrun or a launcher like it. Variables that are left over from another
    program count as those of a single process."""
    def number(name: str, default: int) -> int:
        text = os.environ.get(name, "").strip()
        return int(text) if text.isdigit() else default

    if number("WORLD_SIZE", 1) < 2 or number("RANK", -1) < 0:
        return Launch()
    return Launch(number("WORLD_SIZE", 1), number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1))


def run(main: Callable[[], int]) -> None:
    """Runs a script's `main` like cli.run. Only the first process on a machine prints, and only it
    reports an error that all of them have."""
    is_first = find_launch().local_rank == 0
    if not is_first:
        sys.stdout = sys.stderr = open(os.devnull, "w")

    def run_in_turn() -> int:
        try:
            status = main()
            if dist.is_initialized():  # torchrun stops all processes as soon as one fails
                dist.barrier()
                dist.destroy_process_group()
            return status
        except Exception as error:
            if not is_first:  # torchrun stops this process if the first one fails, too
                cli.on_stop(signal.SIG_DFL)
                time.sleep(FIRST_SECONDS)
                sys.stderr = sys.__stderr__
            if isinstance(error, RuntimeError) and "gloo/" in str(error):
                raise cli.Failure("another process of this run has ended") from None
            raise
    cli.run(run_in_turn)


def join(device: str, precision: str) -> Runtime:
    """The Runtime of choose_runtime. Connects this process to the others that torchrun started, and
    gives each a GPU of its own.

    Raises InputError as choose_runtime does, if there are fewer GPUs than processes, and if a
    variable is missing.
    """
    runtime, launch = choose_runtime(device, precision), find_launch()
    if launch.world == 1:
        return runtime
    backend = "gloo"
    if runtime.device.type == "cuda":
        gpus = torch.cuda.device_count()
        cli.refuse_if(launch.local_world > gpus, f"processes: {launch.local_world}, GPUs: {gpus}; "
                      "lower --nproc-per-node")
        runtime = runtime._replace(device=torch.device("cuda", launch.local_rank))
        torch.cuda.set_device(runtime.device)
        backend = "cpu:gloo,cuda:nccl"
    cli.on_stop(signal.SIG_DFL)  # no handler would be called while this waits for the others
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except ValueError as error:  # a launcher's variable is missing
        raise cli.InputError(f"{launch.world} processes cannot be connected ({error}): start them "
                             "with torchrun, or unset WORLD_SIZE") from None
    cli.on_stop(cli.stop)
    return runtime._replace(rank=dist.get_rank(), world=launch.world)


def once(make: Callable[[], Any], runtime: Runtime) -> Any:
    """Calls `make` in one process of each machine and returns its result in all of them."""
    if runtime.world == 1:
        return make()
    local_rank = find_launch().local_rank
    made = make() if local_rank == 0 else None
    pickles = gather([pickle.dumps(made)], runtime)  # those of other machines stay closed
    return pickle.loads(pickles[runtime.rank - local_rank]) if local_rank else made


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
