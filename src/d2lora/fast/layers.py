"""Fast forward and backward passes of layers, equal to PEFT's and transformers' and faster.

PEFT computes `W x + s * B(A(dropout(x)))` as separate operations of which autograd keeps every
result. Without dropout the update can be added in place and only x and A x have to be kept; the
frozen W gets no gradient. A 4-bit W is dequantized in each of both passes, and kept in neither.
Layers of another kind (DoRA, dropout, 8 bits, several adapters) keep PEFT's own pass. Frozen linear
layers take the same matrix products, and norms and gated units the passes of `elementwise`. On a
bfloat16 base a float32 adapter is multiplied in bfloat16, as under `torch.autocast`, where PEFT's
pass alone would widen every activation; its weights stay float32.

    y  = x W' + s (x A') B'          dA = (s g B)' x
    dx = g W + (s g B) A             dB = s g' (x A')
"""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from d2lora.adapters.quantization import is_four_bit, unpacked
from d2lora.fast.elementwise import gated_fits, gated_forward, norm_fits, norm_forward
from d2lora.fast.matmul import is_frozen_linear, linear
from d2lora.fast.probing import Pass, has_own_forward, is_hooked
from d2lora.runtime.modes import in_evaluation

_DTYPES = {
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
}
"""Of the frozen weight, and x with it, and of the adapter."""


class _Lora(torch.autograd.Function):
    """Shapes: x (N, in), weight (out, in), A (r, in), B (out, r), bias (out,) or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.dtype, ctx.scale = a.dtype, scale
        ctx.packing = getattr(weight, "quant_state", None)
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = linear(x, a)
        y = linear(x, unpacked(weight, ctx.packing, x.dtype), bias)
        y.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        g = grad_outputs[0]
        low_gradient = linear(g, b.T).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = linear(g, unpacked(weight, ctx.packing, g.dtype).T)
            dx.addmm_(low_gradient, a)
        da = low_gradient.T @ x
        db = (g.T @ low).mul_(ctx.scale)
        return dx, None, None, da.to(ctx.dtype), db.to(ctx.dtype), None


class _Frozen(torch.autograd.Function):
    """Shapes: x (N, in), weight (out, in), bias (out,) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return linear(grad_outputs[0], weight.T), None, None


def _lora_forward(layer: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    base = layer.base_layer
    dtype = base.compute_dtype if is_four_bit(base) else base.weight.dtype
    if layer.disable_adapters or layer.merged or x.dtype != dtype:
        return type(layer).forward(layer, x, *args, **kwargs)
    flat = x.reshape(-1, x.shape[-1])
    y = _Lora.apply(flat, base.weight, base.bias, a, b, layer.scaling[name])
    assert isinstance(y, Tensor)
    return y.view(*x.shape[:-1], y.shape[-1])


def _frozen_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    y = _Frozen.apply(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias)
    assert isinstance(y, Tensor)
    return y.view(*x.shape[:-1], y.shape[-1])


def _lora_fits(layer: nn.Module) -> bool:
    """Say whether a layer is plain LoRA without dropout on a plain or 4-bit linear layer."""
    kind: type = type(layer)
    if not isinstance(layer, LoraLayer):
        return False
    base: Any = layer.get_base_layer()
    quantized = is_four_bit(base)
    if not quantized and not (kind is LoraLinear and type(base) is nn.Linear):
        return False
    names = layer.active_adapters
    if len(names) != 1 or layer.lora_variant or getattr(layer, "fan_in_fan_out", False):
        return False
    parts = (module for module in layer.modules() if module is not layer)
    if layer.disable_adapters or layer.merged or any(map(is_hooked, parts)):
        return False
    dropout, b = layer.lora_dropout[names[0]], layer.lora_B[names[0]]
    plain = isinstance(b, nn.Linear) and b.state_dict().keys() == {"weight"}
    dtypes = base.compute_dtype if quantized else base.weight.dtype, b.weight.dtype
    return plain and isinstance(dropout, nn.Identity) and dtypes in _DTYPES


def passes_of(model: nn.Module) -> list[tuple[nn.Module, str, Pass]]:
    """Return the layers that a fast path computes equally, each with its name and the path.

    A layer that somebody else gave a `forward` keeps it, and one whose weight PEFT adapts as a
    parameter, for which that weight has a gradient.
    """
    adapted = {m.get_base_layer() for m in model.modules() if isinstance(m, ParamWrapper)}
    layers = [m for m in model.modules() if not has_own_forward(m) and m not in adapted]
    with in_evaluation(model), torch.no_grad():
        return [
            (layer, name, Pass(forward, layer))
            for name, fits, forward in _PASSES
            for layer in layers
            if fits(layer)
        ]


_PASSES: tuple[tuple[str, Callable[[nn.Module], bool], Callable[..., Tensor]], ...] = (
    ("LoRA layers", _lora_fits, _lora_forward),
    ("frozen linear layers", is_frozen_linear, _frozen_forward),
    ("norms", norm_fits, norm_forward),
    ("gated units", gated_fits, gated_forward),
)
