"""Log-probabilities under a language model's head, without its logits in memory.

The head of a small model is its largest product: 50,000 logits a position, and autograd keeps them
twice. Shapes: P positions, D hidden, V vocabulary.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from d2lora.fast.matmul import is_frozen_linear, linear
from d2lora.fast.probing import is_hooked

ROWS, GPU_ROWS = 64, 1024
"""Positions whose logits are held at a time: on a CPU few, to stay in its cache."""


class _Scores(torch.autograd.Function):
    """Shapes: hidden (P, D), weight (V, D), bias (V,) or None, targets (P,)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_PD: Tensor, weight: Tensor, bias: Tensor | None, targets_P: Tensor
    ) -> Tensor:
        scores: list[Tensor] = []
        slopes: list[Tensor] = []
        rows = ROWS if hidden_PD.device.type == "cpu" else GPU_ROWS
        for x, targets in zip(hidden_PD.split(rows), targets_P.split(rows), strict=True):
            logits = linear(x, weight, bias).float()
            chosen = logits.gather(1, targets[:, None])
            largest = logits.amax(1, keepdim=True)
            masses = logits.sub_(largest).exp_()
            total = masses.sum(1, keepdim=True)
            scores.append((chosen - largest - total.log())[:, 0])
            if ctx.needs_input_grad[0]:
                expected = linear(masses.to(x.dtype), weight.T) / total.to(x.dtype)
                slopes.append(weight[targets] - expected)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(scores)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (slope_PD,) = ctx.saved_tensors
        return slope_PD * grad_outputs[0][:, None].to(slope_PD.dtype), None, None, None


def fits(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Say whether a head is a plain linear layer that nothing trains and nothing hooks into."""
    return is_frozen_linear(head) and not is_hooked(head)


def log_probabilities(hidden_PD: Tensor, head: nn.Linear, targets_P: Tensor) -> Tensor:
    """Return the log-probabilities of `targets_P` under a frozen head, float32, shape (P,).

    Logits live for some positions at a time, in the processor's cache. The gradient of a score to
    its hidden state, the target's row of W less the row expected, is found in the same pass:

        d log p(t) / dh = W_t - softmax(W h + b)' W
    """
    scores = _Scores.apply(hidden_PD, head.weight, head.bias, targets_P)
    assert isinstance(scores, Tensor)
    return scores
