"""Bases in 8 or 4 bits: quantized as they are loaded, by bitsandbytes, or saved so.

Weights in NF4 with double quantization, as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314), or in
int8 by rows (Dettmers et al. 2022, arXiv 2208.07339). An adapter trained on them is an ordinary
one.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from d2lora.errors import ModelError
from d2lora.runtime.extras import need_extra
from d2lora.settings import BaseSettings

WORDS = {
    "nf4": "NF4 (bitsandbytes, double quantization)",
    "int8": "int8 by rows (bitsandbytes)",
}
_BITSANDBYTES = "bitsandbytes"


def saved_quantization(folder: Path) -> dict[str, Any] | None:
    """Return how a model folder's weights are quantized, as its config.json says; None: not."""
    try:
        found = json.loads((folder / "config.json").read_bytes())["quantization_config"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def in_words(settings: BaseSettings, folder: Path) -> str | None:
    """Return the quantization in which a base computes; None: none."""
    if settings.quantization is not None:
        return WORDS[settings.quantization]
    saved = saved_quantization(folder)
    if saved is None:
        return None
    if saved.get("load_in_8bit"):
        return WORDS["int8"]
    kind = str(saved.get("bnb_4bit_quant_type", "")).upper()
    if kind == "NF4" and saved.get("bnb_4bit_use_double_quant"):
        return WORDS["nf4"]
    return f"{kind} ({_BITSANDBYTES})" if kind else _method(saved)


def loading(
    settings: BaseSettings, folder: Path, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return what `from_pretrained` needs to load a base as quantized as settings or files say.

    Raises:
        ModelError: If weights that are quantized already would be quantized again.
        SettingsError: If bitsandbytes is needed and not installed.
    """
    saved = saved_quantization(folder)
    if saved is not None and settings.quantization is not None:
        raise ModelError(
            f"--quantization {settings.quantization}: the weights of {settings.base} are quantized "
            f"already ({_method(saved)}); leave it out"
        )
    if saved is None and settings.quantization is None:
        return {}
    what = f"--quantization {settings.quantization}" if saved is None else settings.base
    if saved is None or _method(saved) == _BITSANDBYTES:
        need_extra("quantization", what)
    where = {"device_map": {"": device}}
    if saved is not None:
        return where
    from transformers import BitsAndBytesConfig

    if settings.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), **where}
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": four_bits, **where}


def prepare(model: nn.Module, dtype: torch.dtype) -> None:
    """Make quantized layers of bitsandbytes compute in the model's dtype, row by row.

    LLM.int8 rounds activations to 8 bits but for columns with an outlier in any row of a batch, so
    that tokens see those behind them and rows each other; here weights alone are rounded.
    """
    keep_layout(model)
    layers: Any = [*model.modules()]
    for layer in layers:
        if is_four_bit(layer):
            layer.compute_dtype = dtype
        elif _is_of_bitsandbytes(layer, "Linear8bitLt"):
            if layer.state.CB is None:
                layer.init_8bit_state()
            layer.forward = partial(_eight_bit_forward, layer)


def keep_layout(model: nn.Module) -> None:
    """Keep 4-bit weights as they lie.

    On CPUs with AVX512-BF16 bitsandbytes lays them out anew in the first pass without a gradient,
    for products in bfloat16 alone that have none: training would go wrong silently.
    """
    layers: Any = [*model.modules()]
    for layer in layers:
        if is_four_bit(layer):
            layer.support_avx512bf16_for_cpu = False


def _eight_bit_forward(layer: Any, x: Tensor) -> Tensor:
    y = _EightBit.apply(x.reshape(-1, x.shape[-1]), layer)
    assert isinstance(y, Tensor)
    return y.view(*x.shape[:-1], y.shape[-1])


class _EightBit(torch.autograd.Function):
    """Shapes: x (N, in); the layer's weight (out, in) is dequantized in each pass, and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        bias = layer.bias if layer.bias is None else layer.bias.to(x.dtype)
        return functional.linear(x, _dequantized(layer, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        g = grad_outputs[0]
        return g @ _dequantized(ctx.layer, g.dtype), None


def _dequantized(layer: Any, dtype: torch.dtype) -> Tensor:
    return layer.state.CB.to(dtype) * (layer.state.SCB[:, None] / 127).to(dtype)


def is_four_bit(layer: nn.Module) -> bool:
    """Say whether a layer is a 4-bit one of bitsandbytes, which need not be imported for that."""
    return _is_of_bitsandbytes(layer, "Linear4bit")


def unpacked(weight: Tensor, packing: Any, dtype: torch.dtype) -> Tensor:
    """Return a layer's weight, dequantized where its `quant_state`, the packing, is not None."""
    if packing is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, packing).to(dtype)


def _is_of_bitsandbytes(layer: nn.Module, name: str) -> bool:
    kind = type(layer)
    return kind.__name__ == name and kind.__module__.startswith(f"{_BITSANDBYTES}.")


def is_quantized(model: nn.Module) -> bool:
    """Say whether a model's weights are quantized."""
    return bool(getattr(model, "is_quantized", False))


def why_not_loaded(settings: BaseSettings, folder: Path, reason: str) -> str | None:
    """Return why a base cannot be loaded in few bits; None where it was not to be."""
    saved = saved_quantization(folder)
    if saved is None and settings.quantization is not None:
        return f"--quantization {settings.quantization} does not work here ({reason}); leave it out"
    if saved is None:
        return None
    return (
        f"its weights are quantized by {_method(saved)}, and transformers cannot load them here "
        f"({reason}); install what it asks for, or take the base as it was before quantization"
    )


def _method(saved: dict[str, Any]) -> str:
    """Return the name of the method; bitsandbytes wrote none at first."""
    return str(saved.get("quant_method") or _BITSANDBYTES)
