"""The only file that imports torch.distributed. Every function is a no-op in a single process."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from detector.errors import UserError


def setup(device: torch.device) -> torch.device:
    """Join the group that torchrun announces in the environment, if any; returns this process's device."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        return device
    if device.type == "cuda":
        local_rank, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= found:
            raise UserError(
                f"process {local_rank} of this machine has no GPU, there are {found}: lower --nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all processes, a new tensor; `tensor` itself alone. Carries no gradient."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


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


def share_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers: each has counted BatchNorm statistics of its own images."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """The model whose gradients are averaged over processes; the model itself alone."""
    if world_size() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)
