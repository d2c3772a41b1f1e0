"""Several processes that train one model, as torchrun starts them; a single process is the case of one.

    torchrun --nproc_per_node=2 code/train.py configs/mnist.yaml

Every process computes its share of each batch, and gradients are averaged. What the global batch is, its noise and
its noise levels do not depend on how many processes share it.
"""

import math
import os
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from ..common.errors import RunError, UsageError, shown


class World:
    """This process among those of the run: `rank` of `size`; `first` is the one that speaks and writes."""

    TIMEOUT = timedelta(minutes=30)  # after which a process that says nothing is given up
    SETUP_TIMEOUT = timedelta(hours=24)  # while the first downloads, encodes or draws

    def __init__(self):
        given = [os.environ.get(*pair) for pair in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))]
        if not all(text.isdecimal() and len(text) < 9 for text in given) or int(given[1]) >= int(given[0]):
            raise UsageError(f"WORLD_SIZE, RANK, LOCAL_RANK: {shown(given)}; torchrun sets numbers, RANK < WORLD_SIZE")
        self.size, self.rank, self.local_rank = map(int, given)
        self.first = self.rank == 0

    def device_name(self, names):
        """The config's device for this process: the one given to it, or the GPU of its own number.

        Raises UsageError where there are GPUs, but not that one: two processes would share another.
        """
        if self.size == 1 or not names[0].startswith("cuda"):
            return names[0]
        name = names[self.local_rank] if self.local_rank < len(names) else f"cuda:{self.local_rank}"
        gpus, index = torch.cuda.device_count(), torch.device(name).index or 0
        if 0 < gpus <= index:
            raise UsageError(f"devices: {name}, for process {self.local_rank} of this machine, is not among its {gpus} "
                             f"GPU{'s' * (gpus > 1)}; start that many processes at most (--nproc_per_node)")
        return name

    def connect(self, device):
        """Meet the other processes. Raises RunError where they do not come."""
        if self.size == 1:
            return
        backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # else NCCL takes some of every process's memory on the first
        try:
            dist.init_process_group(backend, timeout=self.TIMEOUT)
            self.setup = dist.new_group(backend="gloo", timeout=self.SETUP_TIMEOUT)
        except (RuntimeError, ValueError) as e:
            raise RunError(f"process {self.rank} of {self.size} cannot meet the others ({e})") from None

    def one_after_the_other(self, done=False):
        """Called before a piece of work, and after it with `done`: the first process does it alone, then the others."""
        if self.size > 1 and self.first == done:
            dist.barrier(self.setup)

    def meet(self):
        """Wait for the first process, which may spend long on its sample grids."""
        if self.size > 1:
            dist.barrier(self.setup)

    def share(self, batch_size, images=math.inf):
        """The slice of a batch that is this process's. Raises UsageError where it cannot be divided.

        images: how many the data set has, which are a batch where they are fewer.
        """
        n = min(batch_size, images)
        if n % self.size:
            what = f"{n} images" if n == batch_size else f"{batch_size} is more than the data set's {n} images, which"
            raise UsageError(f"loader.batch_size: {what} cannot be divided among {self.size} processes")
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def wrap(self, model, device):
        """`model.compute_loss`, such that gradients are averaged over the processes."""
        if self.size == 1:
            return model.compute_loss
        return torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False,
            find_unused_parameters=True)  # see TransformerBlock: one context token needs no query

    def total(self, *tensors):
        """The sums of tensors over all processes, each a new tensor."""
        if self.size == 1:
            return tensors
        tensors = [torch.as_tensor(t).clone() for t in tensors]
        for t in tensors:
            dist.all_reduce(t)
        return tensors

    def agree(self, number):
        """The largest of the processes' numbers; on the CPU, so that no GPU is waited for."""
        if self.size == 1:
            return number
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()


def averaged(compute_loss, last):
    """The context of one part of a batch: processes average their gradients once, after its last part."""
    return nullcontext() if last or not hasattr(compute_loss, "no_sync") else compute_loss.no_sync()
