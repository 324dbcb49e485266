"""RMS norms and gated units in fewer passes over memory than autograd's, which keep less.

Autograd keeps each step's result: four of the size of x for a norm, three for a gated unit. Here x,
or gate and up, are all that is kept, and what the backward pass needs is computed again.

    norm   y = w x r,  r = (mean(x^2) + e)^(-1/2)     dx = r w g - x r^3 mean(w g x)
    gated  y = silu(gate) up                          dup = silu(gate) g,  dgate = silu'(gate) up g

RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467; SwiGLU: Shazeer 2020, arXiv 2002.05202.
Shapes: N tokens in any number of dimensions, D hidden, F units.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import ACT2FN

from d2lora.runtime.rounding import agree, tolerance


class _Norm(torch.autograd.Function):
    """Shapes: x (N, D), weight (D,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = (length.square_() / x.shape[-1] + epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        slope = (grad_outputs[0] * weight).float()
        wide = x.float()
        along = (slope * wide).mean(-1, keepdim=True)
        slope.mul_(scale).addcmul_(wide, along.mul_(scale.pow(3)), value=-1)
        return slope.to(x.dtype), None, None


class _Gated(torch.autograd.Function):
    """Shapes: gate (N, F), up (N, F)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        g = grad_outputs[0]
        slope = g * up
        torch.ops.aten.silu_backward.grad_input(slope, gate, grad_input=slope)
        return slope, functional.silu(gate).mul_(g)


def norm_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what an RMS norm with frozen weights returns."""
    y = _Norm.apply(x, layer.weight, layer.variance_epsilon)
    assert isinstance(y, Tensor)
    return y


def gated_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a gated MLP returns."""
    modules: Any = layer
    units = _Gated.apply(modules.gate_proj(x), modules.up_proj(x))
    return modules.down_proj(units)


def norm_fits(layer: nn.Module) -> bool:
    """Say whether a layer is an RMS norm as Llama has it: a scale that nothing trains, no shift.

    It is called only where that cannot fail: one vector of scales and nothing else, one input.
    """
    own = dict(layer.named_parameters())
    epsilon = getattr(layer, "variance_epsilon", None)
    if set(own) != {"weight"} or not isinstance(epsilon, float) or not _takes_one(layer):
        return False
    weight = own["weight"]
    if weight.requires_grad or weight.ndim != 1 or next(layer.children(), None) is not None:
        return False
    x = torch.linspace(-1, 2, len(weight)).to(weight)
    return _equal(layer(x[None]), norm_forward(layer, x[None]))


def gated_fits(layer: nn.Module) -> bool:
    """Say whether a layer is a gated MLP as Llama has it, whatever its linear layers are.

    The activation is recognized by its class: near zero, all compute alike.
    """
    names = {name for name, _ in layer.named_children()}
    if names != {"gate_proj", "up_proj", "down_proj", "act_fn"} or not _takes_one(layer):
        return False
    width = getattr(layer.gate_proj, "in_features", 0)
    weight = next(layer.parameters())
    if type(layer.act_fn) not in _SILU or not width:
        return False
    # Quantized layers take any dtype.
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.linspace(-1, 2, width, device=weight.device, dtype=dtype)
    return _equal(layer(x[None]), gated_forward(layer, x[None]))


_SILU = {nn.SiLU, type(ACT2FN["silu"])}


def _takes_one(layer: nn.Module) -> bool:
    """Say whether a layer's pass has one input, and so no gate or mask beside it."""
    return len(inspect.signature(layer.forward).parameters) == 1


def _equal(one: object, other: Tensor) -> bool:
    if not isinstance(one, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return agree(one, other, one.dtype, tolerance(one.dtype) * float(other.abs().max()))
