"""Copies between the CPU and a GPU that neither has to wait for."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from detector.errors import UserError
from detector.structures import Batch


def copied_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device. To a GPU, each is copied on a separate stream while the one before it is in use.

    A UserError still comes in place of the batch that could not be loaded.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying, iterator = torch.cuda.Stream(device), iter(batches)
    following: Batch | None = None
    error: UserError | None = None
    while True:
        ready, following = following, None
        try:
            following = next(iterator, None)
        except UserError as raised:
            error = raised
        using = torch.cuda.current_stream(device)
        using.wait_stream(copying)  # waits for the copy of `ready` only: the next copy is not queued yet
        if following is not None:
            with torch.cuda.stream(copying):
                following = following.to(device)
        if ready is not None:
            ready.data.record_stream(using)  # its memory may be reused only after this stream is done with it
            yield ready
        if error is not None:
            raise error
        if following is None:
            return


class PendingCopy:
    """A copy of a tensor to the host that does not block; `get` waits for it."""

    def __init__(self, tensor: Tensor):
        self._tensor, self._device, self._copied = tensor, tensor.device, None
        if tensor.is_cuda:
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self._copied = _now(tensor.device)

    def get(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor

    def idle(self) -> Callable[[], float] | None:
        """A function that returns the GPU's idle seconds between this tensor and now. None without a GPU."""
        if (copied := self._copied) is None:
            return None
        now = _now(self._device)

        def seconds() -> float:
            now.synchronize()
            return copied.elapsed_time(now) / 1000

        return seconds


def _now(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
