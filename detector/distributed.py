"""The only file that imports torch.distributed. Every function is a no-op in a single process."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from detector.errors import SIGNALS, LostProcess, Stopped, UserError, listen

# What gloo, NCCL and torchrun's store say when another process is gone.
GONE = re.compile(
    r"closed by peer|reset by peer|Broken pipe|remote process exited|Connection was likely closed|recv, got 0"
)
PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[torch.device]:
    """Join the group that torchrun announces in the environment, if any; gives this process's device.

    LostProcess where another process of the group has ended.
    """
    try:
        yield setup(device)
    except RuntimeError as error:
        if "RANK" in os.environ and GONE.search(str(error)):
            raise LostProcess(f"process {os.environ['RANK']} has lost another one, whose message says why") from None
        raise
    finally:
        shutdown()


def setup(device: torch.device) -> torch.device:
    """Join the group that torchrun announces in the environment, if any; returns this process's device."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        return device
    if device.type == "cuda":
        local_rank, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= found:
            raise UserError(
                f"process {local_rank} of this machine has no GPU, there are {found}: lower --nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if sys.platform == "linux":  # a launcher that is killed would leave us behind, training on
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    before = listen(signal.SIG_DFL, *SIGNALS)  # Python hears no signal while it waits for the others: end by it
    store, rank, world_size = next(rendezvous("env://"))
    store = _unused(store, rank, world_size)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    for number, handler in before.items():
        signal.signal(number, handler)
    return device


def _unused(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """The part of `store` under a name that these processes, and none before them, agree on.

    torchrun keeps its store when it starts the processes again. The addresses of those that are gone are still in it,
    and gloo would wait for them. How often it did so, each machine counts for itself, so that cannot be the name.
    """
    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"question/{rank}", question)
        name = store.get(f"answer/{question}").decode()  # waits for process 0, of this start
        store.set(f"{name}/{rank}", "taken")
        return dist.PrefixStore(name, store)
    name = uuid.uuid4().hex
    for other in range(1, world_size):
        while not store.check([f"{name}/{other}"]):
            if store.check([f"question/{other}"]):  # it may be an old one, whose answer nobody reads
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
    """A block after which all processes raise the UserError or Stopped that one of them met in it.

    In the block they must not wait for each other.
    """
    error = None
    try:
        yield
    except (UserError, Stopped) as own:
        error = own
    for one in gather(error):
        if one is not None:
            raise one


def all_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all processes, a new tensor; `tensor` itself alone. Carries no gradient."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def all_max(tensor: Tensor) -> Tensor:
    """Elementwise maximum of `tensor` over all processes; `tensor` itself alone. Carries no gradient."""
    if world_size() == 1:
        return tensor
    largest = tensor.detach().clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def all_cat(tensor: Tensor) -> Tensor:
    """The 1-d `tensor`s of all processes, of any lengths, one after the other; `tensor` itself alone. No gradient."""
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
    """UserError on every process, naming what differs, unless all have equal values under the same names."""
    everyone = gather(values)
    for name in dict.fromkeys(name for one in everyone for name in one):
        found = [one.get(name) for one in everyone]
        if found.count(found[0]) < len(found):
            raise UserError(f"{name} differs between processes: {_by_rank(found)}; give all of them the same")


def share_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers: each has counted BatchNorm statistics of its own images."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """The model whose gradients are averaged over processes; the model itself alone.

    UserError where it has a SyncBatchNorm, which counts all processes' images, and the processes have no GPU.
    """
    if world_size() == 1:
        return model
    if device.type != "cuda" and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise UserError(
            f"model.norm: sync_bn needs a GPU for each process, these {world_size()} are on {device.type}; "
            "use bn or gn, or start one process"
        )
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def _by_rank(values: list[Any]) -> str:
    """What each process has, equal values together; of long ones the stretch where they part."""
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
