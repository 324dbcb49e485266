"""A decoder's passes on a GPU, recorded once for a shape and replayed.

A step on few examples launches thousands of small kernels, and a GPU has done each before Python
has launched the next. A CUDA graph launches them all at once
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs): the same kernels on the same
numbers. Recording a shape takes as long as several steps, so only one that keeps coming back is
recorded, and rows are filled up on the right, where causality hides it, to few widths.
Shapes: B rows, T tokens, D hidden.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

WIDTH_STEP = 64
"""Recorded rows are filled up to a multiple of this."""
PLAIN_PASSES = 3
"""Passes of a shape before it is recorded: they warm its kernels up, and rare shapes stay plain."""


def recorded_width(n_tokens: int) -> int:
    """Return the width to which rows of so many tokens are filled up."""
    return math.ceil(n_tokens / WIDTH_STEP) * WIDTH_STEP


@dataclass
class _Recording:
    ids_BT: Tensor
    hidden_BTD: Tensor
    slope_BTD: Tensor
    """The gradient of the loss to `hidden_BTD`."""
    gradients: Tensor
    """Of all parameters, end to end."""
    forward: Any
    backward: Any


class Replayed:
    """A decoder that is replayed where it can be, and else run plainly.

    Memory is shared by all recordings, so one that awaits its backward pass bars every other.
    """

    def __init__(
        self, decode: Callable[[Tensor], Tensor], parameters: Sequence[nn.Parameter]
    ) -> None:
        """Take what is to be recorded.

        Args:
            decode: Returns the hidden states, (B, T, D), of ids, (B, T); draws nothing at random.
            parameters: All that require a gradient, of one dtype.
        """
        self._decode = decode
        self._parameters = tuple(parameters)
        self._passes: Counter[torch.Size] = Counter()
        self._recordings: dict[torch.Size, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._awaiting = False
        self._records = True

    @property
    def has_recordings(self) -> bool:
        """Whether a shape came back often enough to be recorded."""
        return bool(self._recordings)

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Return the hidden states, at least as wide as the ids, with a gradient."""
        if not self._records or self._awaiting:
            return self._decode(ids_BT)
        n_tokens = ids_BT.shape[1]
        ids_BT = functional.pad(ids_BT, (0, recorded_width(n_tokens) - n_tokens))
        shape = ids_BT.shape
        self._passes[shape] += 1
        if shape not in self._recordings and self._passes[shape] > PLAIN_PASSES:
            self._record(ids_BT)
        if shape not in self._recordings:
            return self._decode(ids_BT)
        hidden_BTD = _Replay.apply(self, self._recordings[shape], ids_BT, *self._parameters)
        assert isinstance(hidden_BTD, Tensor)
        return hidden_BTD

    def _record(self, ids_BT: Tensor) -> None:
        """Record both passes; a model that has to look at numbers in between never is."""
        ids_BT = ids_BT.clone()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[ids_BT.get_device()]
        random = generator.clone_state()
        try:
            with torch.cuda.graph(forward, pool=self._pool):
                hidden_BTD = self._decode(ids_BT)
            slope_BTD = torch.empty_like(hidden_BTD)
            with torch.cuda.graph(backward, pool=self._pool):
                parts = torch.autograd.grad(hidden_BTD, self._parameters, slope_BTD)
                gradients = torch.cat([part.flatten() for part in parts])
        except RuntimeError:
            # A recording that failed leaves the generator waiting for its end.
            generator.graphsafe_set_state(random)
            self._records = False
            return
        self._recordings[ids_BT.shape] = _Recording(
            ids_BT, hidden_BTD.detach(), slope_BTD, gradients, forward, backward
        )


class _Replay(torch.autograd.Function):
    """Depends on the parameters, so that autograd asks for their gradients."""

    @staticmethod
    def forward(
        ctx: Any, owner: Any, recording: _Recording, ids_BT: Tensor, *parameters: Tensor
    ) -> Tensor:
        owner._awaiting = True  # noqa: SLF001
        ctx.owner, ctx.recording = owner, recording
        ctx.shapes = [parameter.shape for parameter in parameters]
        recording.ids_BT.copy_(ids_BT)
        recording.forward.replay()
        return recording.hidden_BTD.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        recording: _Recording = ctx.recording
        recording.slope_BTD.copy_(grad_outputs[0])
        recording.backward.replay()
        ctx.owner._awaiting = False  # noqa: SLF001
        # A copy: autograd may keep what it is given as a parameter's gradient.
        parts = recording.gradients.clone().split([math.prod(shape) for shape in ctx.shapes])
        gradients = (part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))
        return None, None, None, *gradients


def fits(model: nn.Module) -> bool:
    """Say whether a model's passes may be replayed: on a GPU, nothing random, one dtype."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return (
        bool(parameters)
        and parameters[0].device.type == "cuda"
        and len({(p.dtype, p.device) for p in parameters}) == 1
        and not random
    )
