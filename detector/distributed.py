"""The only file that imports torch.distributed. Every function is a no-op in a single process."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from detector.errors import SIGNALS, LostProcess, Stopped, UserError, listen
from detector.structures import Batch

# Messages of gloo, NCCL and torchrun's store when another process has ended.
GONE = re.compile(
    r"closed by peer|reset by peer|Broken pipe|remote process exited|Connection was likely closed|recv, got 0"
)
PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[torch.device]:
    """Join the group that torchrun announces in the environment, if any; yields this process's device.

    Raises LostProcess if another process of the group has ended.
    """
    try:
        yield setup(device)
    except (UserError, Stopped):  # most are raised by all processes together
        shutdown()
        raise
    except RuntimeError as error:
        if "RANK" in os.environ and GONE.search(str(error)):
            raise LostProcess(f"process {os.environ['RANK']} has lost another one, whose message says why") from None
        raise
    # Not after other errors, which one process may have alone: NCCL would wait for the others before the error shows.
    shutdown()


def setup(device: torch.device) -> torch.device:
    """Join the group that torchrun announces in the environment, if any; returns this process's device."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # also for libraries, and calls that name no GPU
        return device
    if device.type == "cuda":
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(
                f"process {local_rank} of this machine has no GPU, there are {gpus}: lower --nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if sys.platform == "linux":  # end with the launcher, even if it is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    before = listen(signal.SIG_DFL, *SIGNALS)  # Python runs no handler during the wait below: let signals end it
    store, rank, world_size = next(rendezvous("env://"))
    store = _unused(store, rank, world_size)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    for number, handler in before.items():
        signal.signal(number, handler)
    return device


def _unused(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """A part of `store` under a new name that all processes agree on.

    When torchrun restarts processes, its store keeps the addresses of those that have ended, and gloo would wait for
    them. Each machine counts the restarts separately, so the count cannot be the name.
    """
    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"question/{rank}", question)
        name = store.get(f"answer/{question}").decode()  # waits for process 0 of this start
        store.set(f"{name}/{rank}", "taken")
        return dist.PrefixStore(name, store)
    name = uuid.uuid4().hex
    for other in range(1, world_size):
        while not store.check([f"{name}/{other}"]):
            if store.check([f"question/{other}"]):  # perhaps from an earlier start: then nobody reads the answer
                store.set(f"answer/{store.get(f'question/{other}').decode()}", name)
            time.sleep(0.01)
    return dist.PrefixStore(name, store)


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """If one process raises UserError or Stopped in this block, all processes raise it after the block.

    Processes must not wait for each other inside the block.
    """
    error = None
    try:
        yield
    except (UserError, Stopped) as raised:
        error = raised
    for of_process in gather(error):
        if of_process is not None:
            raise of_process


def all_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all processes, a new tensor without gradient; with one process, `tensor` itself."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def all_max(tensor: Tensor) -> Tensor:
    """Elementwise maximum of `tensor` over all processes, without gradient; with one process, `tensor` itself."""
    if world_size() == 1:
        return tensor
    largest = tensor.detach().clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def all_cat(tensor: Tensor) -> Tensor:
    """The processes' 1-d `tensor`s of any length, joined, without gradient; with one process, `tensor` itself."""
    if world_size() == 1:
        return tensor
    length = torch.tensor([len(tensor)], device=tensor.device)
    lengths = [torch.zeros_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    longest = int(torch.cat(lengths).max())
    padded = torch.cat([tensor.detach(), tensor.new_zeros(longest - len(tensor))])
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths)])


def gather(value: Any) -> list[Any]:
    """`value` of every process, in rank order, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """The first process's `value`, on every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def same_everywhere(values: dict[str, Any]) -> None:
    """Raise UserError on every process, naming a difference, unless all have equal values under the same names."""
    everyone = gather(values)
    for name in dict.fromkeys(name for of_process in everyone for name in of_process):
        given = [of_process.get(name) for of_process in everyone]
        if given.count(given[0]) < len(given):
            raise UserError(f"{name} differs between processes: {_by_rank(given)}; give all of them the same")


def share_buffers(module: nn.Module) -> None:
    """Copy the first process's buffers to all: each process has BatchNorm statistics of its own images."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the model so that gradients are averaged over processes; with one process, return the model itself.

    Raises UserError for SyncBatchNorm, which shares statistics between processes, on processes without a GPU.
    """
    if world_size() == 1:
        return model
    if device.type != "cuda" and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise UserError(
            f"model.norm: sync_bn needs a GPU for each process, these {world_size()} are on {device.type}; "
            "use bn or gn, or start one process"
        )
    ids = [device.index] if device.type == "cuda" else None
    # Each process keeps its BatchNorm statistics: `share_buffers` copies the first one's before an evaluation.
    replica = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    replica.broadcast_buffers = False
    return replica


def averaging(replica: nn.Module, now: bool) -> contextlib.AbstractContextManager[None]:
    """A context for a forward and a backward pass, after which gradients are averaged over processes if `now`."""
    if now or not isinstance(replica, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return replica.no_sync()


def _by_rank(values: list[Any]) -> str:
    """The value of each process, equal ones grouped. Long values are cut to the part around the first difference."""
    texts = [str(value) for value in values]
    start = 0
    if max(map(len, texts)) > 80:
        alike = next((i for i, letters in enumerate(zip(*texts)) if len(set(letters)) > 1), min(map(len, texts)))
        start = max(0, alike - 20)
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(rank)
    parts = []
    for text, (first, *others) in ranks.items():
        more = f" and {len(others)} more" if others else ""
        parts.append(f"{text[start : start + 80]!r} on rank {first}{more}")
    return ", ".join(parts)


def padded_alike(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, padded to the largest image of all processes: padding is background, which the losses count.

    If a process cannot load its next batch (UserError, Stopped), all processes raise its error.
    """
    if world_size() == 1:
        for unpadded in batches:  # noqa: UP028 `yield from` would close the stream, which is read on later
            yield unpadded
        return
    batches = iter(batches)
    while True:
        batch = error = None
        try:
            batch = next(batches, None)
        except (UserError, Stopped) as raised:
            error = raised
        shape = batch.images.shape[-2:] if batch else (0, 0)
        # On the CPU: processes with a GPU must not wait here for the steps that it still computes.
        height, width, failed = all_max(torch.tensor([*shape, error is not None])).tolist()
        if failed:
            with together():
                if error is not None:
                    raise error
        if batch is None:
            return
        bottom, right = height - shape[0], width - shape[1]
        if bottom or right:
            images = F.pad(batch.images, (0, right, 0, bottom))
            data = torch.cat([images.flatten(), batch.data[batch.images.numel() :]])  # boxes, labels and sizes stay
            batch = batch._replace(data=data, shape=tuple(images.shape))
        yield batch
