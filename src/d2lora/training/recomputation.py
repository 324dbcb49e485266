"""Activation checkpointing: a layer keeps its input, and is computed again for its gradient.

It costs a forward pass more, and memory is that of one layer instead of all (Chen et al. 2016,
arXiv 1604.06174). The numbers are the same bit for bit where a pass computes the same twice, as on
a CPU.
"""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from d2lora.adapters.base import causal_model
from d2lora.fast.packing import are_rows_packed, row_by_row

_ON, _HOW = "gradient_checkpointing", "_gradient_checkpointing_func"


def can_recompute(model: nn.Module) -> bool:
    """Say whether a model has layers that transformers computes again where that is asked for."""
    return any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())


def recompute(model: nn.Module, *, on: bool) -> None:
    """Switch activation checkpointing on or off; it is for passes while a model trains."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # The second pass comes when the block that packs rows is over.
        causal = causal_model(model)
        return nullcontext(), row_by_row(causal) if are_rows_packed(causal) else nullcontext()

    how: Any = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for name, value in {_ON: True, _HOW: how}.items():
                if on:
                    setattr(layer, name, value)
                else:
                    vars(layer).pop(name, None)


def recomputes(model: nn.Module) -> bool:
    """Say whether activation checkpointing is on."""
    return any(vars(layer).get(_ON, False) for layer in model.modules())


@contextmanager
def recomputed(model: nn.Module, *, on: bool) -> Generator[None]:
    """Switch it inside the block."""
    before = recomputes(model)
    recompute(model, on=on)
    try:
        yield
    finally:
        recompute(model, on=before)
