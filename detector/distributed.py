"""The only file that imports torch.distributed. Every function is a no-op in a single process."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


def setup(device: torch.device) -> torch.device:
    """Join the group that torchrun announces in the environment, if any; returns this process's device."""
    if "WORLD_SIZE" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
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


def gather(value: Any) -> list[Any]:
    """`value` of every process, in rank order, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """The model whose gradients are averaged over processes; the model itself alone."""
    if world_size() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)
