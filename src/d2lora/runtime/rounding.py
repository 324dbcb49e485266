"""How far two computations of the same numbers may differ: the one place that says so."""

import math

import torch
from torch import Tensor


def tolerance(dtype: torch.dtype, *, rewritten: bool = False) -> float:
    """Return the relative difference up to which two computations count as equal.

    The same sums in another order differ by about 1e-5 in float32 once they have gone through all
    layers, and by about a percent in 16-bit dtypes, which have 8 to 11 significant bits. What must
    be found, such as a mask that a model ignores or another activation, changes numbers by their
    own size. The bounds lie between.

    Args:
        dtype: That of the weights.
        rewritten: Whether the weights themselves were computed again, as a merge does: each is
            rounded, and what that changes adds up over the layers.
    """
    single = dtype == torch.float32
    if rewritten:
        return 1e-3 if single else 0.5
    return 1e-4 if single else 2e-2


def agree_closely(one: Tensor, other: Tensor) -> bool:
    """Say whether the same operations gave the same numbers, but for their order in a kernel.

    In 16 bits that is each bit: a soft cap of small logits changes no more than the last one.

    Args:
        one: Numbers.
        other: The same, computed again.
    """
    allowed = 1e-5 * float(other.abs().max())
    return math.isfinite(allowed) and torch.allclose(one, other, rtol=0, atol=allowed)


def agree(one: Tensor, other: Tensor, dtype: torch.dtype, least: float = 1e-3) -> bool:
    """Say whether two results of one computation are equal up to rounding, number by number.

    Args:
        one: What a faster path gives.
        other: What the plain path gives.
        dtype: That of the weights.
        least: Absolute difference that is always allowed: a number near zero carries the rounding
            of the larger ones that it is the sum of.
    """
    # NaN in weights or logits is no number to compare, and torch refuses it as a bound.
    return math.isfinite(least) and torch.allclose(one, other, rtol=tolerance(dtype), atol=least)


def distance(one_V: Tensor, other_V: Tensor) -> float:
    """Return how far logits are from others, as a share of these: the Euclidean norms' ratio.

    What is common to all logits of a position is left out, as no probability depends on it. In a
    deep model in 16 bits single logits may be off by several percent of the largest from rounding
    alone, their distance as a whole by 1 to 4 percent; a visible padding token makes 9 percent and
    more (SmolLM2-135M in bfloat16 on a CPU).

    Args:
        one_V: Logits of one position.
        other_V: The same, computed in another way.
    """
    one_V, other_V = (x_V.float() - x_V.float().mean() for x_V in (one_V, other_V))
    return float((one_V - other_V).norm() / other_V.norm())
