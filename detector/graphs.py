"""Training passes as CUDA graphs.

In plain PyTorch a GPU waits for Python, which starts 1,700 kernels one by one. A graph is recorded for each size of
images, and starts all kernels of a forward or backward pass at once.
"""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from detector.model import RetinaNet

MAX_PIXELS = 2**25  # of a batch: 31 images of 800 x 1344. Larger batches keep a GPU busy without graphs
MAX_SIZES = 64  # image sizes that are recorded
SEEN = 3  # a graph is recorded at the third batch of its size: by then its kernels are chosen and compiled


def speed_up(model: RetinaNet) -> None:
    """Call before training: on a GPU, the model's training passes then run as CUDA graphs.

    The environment variable DETECTOR_CUDA_GRAPHS=0 prevents it, for failures that `Graphs` does not catch.
    """
    waits = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())  # for other processes
    wanted = os.environ.get("DETECTOR_CUDA_GRAPHS") != "0"
    model.graphs = Graphs(model) if model.mean.device.type == "cuda" and wanted and not waits else None


class Graphs:
    """Calls the model's `outputs` in training as CUDA graphs: images (B, 3, H, W), sizes (B, 2) -> tensors.

    A call's outputs are valid until the next call, since all sizes share their memory. Trains the parameters that
    required a gradient when this object was made.
    """

    def __init__(self, model: RetinaNet):
        self.module = _Outputs(model)
        self.names, parameters = zip(*((n, p) for n, p in self.module.named_parameters() if p.requires_grad))
        self.parameters: tuple[Tensor, ...] = parameters
        self.works, self.warned = True, False
        self.pool: Any = None
        self.stream: Any = None  # of all recordings: memory is shared only within one stream
        self.kept: dict[tuple, Tensor] = {}  # inputs, outputs and gradients, of all sizes
        self.seen: dict[tuple, int] = {}
        self.recorded: dict[tuple, _Recorded] = {}

    def take(self, images: Tensor) -> bool:
        """Whether to use `__call__` for a batch of this size. Also counts the batch, so call it once for each."""
        key = self._key(images)
        if not self.works or not torch.is_grad_enabled():
            return False
        if key in self.recorded:
            return True
        if images.numel() > 3 * MAX_PIXELS:
            return False
        if len(self.recorded) >= MAX_SIZES:
            if not self.warned:
                self.warned = True
                advice = "data.pad_to=128 makes fewer sizes"
                warnings.warn(f"only {MAX_SIZES} sizes run as CUDA graphs, others are slower: {advice}", stacklevel=2)
            return False
        self.seen[key] = self.seen.get(key, 0) + 1
        return self.seen[key] == SEEN and _has_room(images.device)  # asked once: the answer takes time

    def __call__(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        key = self._key(images)
        if key not in self.recorded:
            buffers = [buffer.clone() for buffer in self.module.buffers()]
            try:
                self.stream = self.stream or torch.cuda.Stream(images.device)
                # A failure must not leave training on another stream.
                with torch.cuda.stream(torch.cuda.current_stream(images.device)):
                    self.recorded[key] = _Recorded(self, images, sizes)
            except RuntimeError as error:
                self.works = False
                reason = str(error).strip().partition("\n")[0]
                advice = "if training fails after this, set DETECTOR_CUDA_GRAPHS=0 in the environment"
                warnings.warn(f"training passes run without CUDA graphs, slower: {reason}; {advice}", stacklevel=2)
            with torch.no_grad():
                for buffer, before in zip(self.module.buffers(), buffers):  # BatchNorm must not count the images again
                    buffer.copy_(before)
        if not self.works:
            self.recorded.clear()
            self.kept.clear()
            torch.cuda.empty_cache()
            return self.module(images, sizes)
        return _Replay.apply(self.recorded[key], images, sizes, *self.parameters)

    def leaves(self) -> list[Tensor]:
        """New tensors with the parameters' memory, because a graph must not contain tensors of the default stream."""
        # .data, because .detach() makes a view, which autocast would cast again at each use.
        return [parameter.data.requires_grad_() for parameter in self.parameters]

    def run(self, leaves: list[Tensor], *given: Tensor) -> tuple[Tensor, ...]:
        return functional_call(self.module, dict(zip(self.names, leaves)), given)

    @staticmethod
    def _key(images: Tensor) -> tuple:
        return tuple(images.shape), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

    def shared(self, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Memory for tensors of these shapes, the same in all graphs."""
        views = []
        for number, like in enumerate(tensors):
            key = name, number, like.dtype
            if key not in self.kept or self.kept[key].numel() < like.numel():  # older graphs keep the smaller one
                self.kept[key] = torch.empty_like(like).as_strided((like.numel(),), (1,))
            views.append(self.kept[key][: like.numel()].as_strided(like.shape, like.stride()))
        return views


def _has_room(device: torch.device) -> bool:
    """Whether three steps fit: activations of graphs, those of a size without a graph, and outputs of graphs."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) > 3 * torch.cuda.max_memory_allocated(device)


class _Outputs(nn.Module):
    def __init__(self, model: RetinaNet):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        return self.model.outputs(images, sizes)


class _Recorded:
    def __init__(self, owner: Graphs, images: Tensor, sizes: Tensor):
        self.parameters = owner.parameters
        self.images, self.sizes = owner.shared("inputs", [images, sizes])
        self.images.copy_(images)
        self.sizes.copy_(sizes)
        stream = owner.stream
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):  # a first run, in which the libraries allocate their own memory
            leaves = owner.leaves()
            outputs = owner.run(leaves, self.images, self.sizes)
            _gradients(outputs, leaves, [torch.zeros_like(output) for output in outputs])
        torch.cuda.current_stream(images.device).wait_stream(stream)
        self.outputs = owner.shared("outputs", outputs)
        self.gradients = owner.shared("gradients", outputs)
        self.to_parameters = owner.shared("to parameters", self.parameters)
        del outputs, leaves
        torch.clear_autocast_cache()  # the casts of the weights belong in the graph

        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: those that pin memory for the next batches.
        options = {"pool": owner.pool, "stream": stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward, **options):
            leaves = owner.leaves()
            outputs = owner.run(leaves, self.images, self.sizes)
            torch._foreach_copy_(self.outputs, [output.detach() for output in outputs])
        owner.pool = options["pool"] = self.forward.pool()
        with torch.cuda.graph(self.backward, **options):
            of_leaves = _gradients(outputs, leaves, self.gradients)
            self.used = [gradient is not None for gradient in of_leaves]
            kept = [to_parameter for to_parameter, used in zip(self.to_parameters, self.used) if used]
            torch._foreach_copy_(kept, [gradient for gradient in of_leaves if gradient is not None])
        torch.clear_autocast_cache()


def _gradients(
    outputs: tuple[Tensor, ...], leaves: list[Tensor], of_outputs: list[Tensor]
) -> tuple[Tensor | None, ...]:
    with torch.autocast("cuda", enabled=False):  # as in any backward pass: autocast would change the dtype of some sums
        return torch.autograd.grad(outputs, leaves, of_outputs, allow_unused=True)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recorded: _Recorded, images: Tensor, sizes: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.recorded = recorded
        recorded.images.copy_(images)
        recorded.sizes.copy_(sizes)
        recorded.forward.replay()
        return tuple(output.detach() for output in recorded.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        recorded = ctx.recorded
        for parameter in recorded.parameters:  # from an earlier part of the batch, in memory that this replay reuses
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        torch._foreach_copy_(recorded.gradients, list(gradients))
        recorded.backward.replay()
        pairs = zip(recorded.to_parameters, recorded.used)
        return None, None, None, *(gradient.detach() if used else None for gradient, used in pairs)
