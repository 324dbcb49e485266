"""Where a measured curve first reaches a value: convergence over steps, efficiency over sizes."""

import math
from collections.abc import Sequence

import numpy as np


def steps_to_reach(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return where a falling curve first reaches `target`, between points by straight lines.

    Args:
        curve: (step, loss) in order of steps.
        target: Loss to reach.

    Returns:
        The step; None if the curve never gets there.
    """
    before: tuple[float, float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None or before[1] == loss:
                return step
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None


def mean_of(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the mean of curves at all their steps, as far as the shortest goes."""
    end = min(curve[-1][0] for curve in curves)
    steps = sorted({step for curve in curves for step, _ in curve if step <= end})
    losses = [
        np.interp(steps, [step for step, _ in curve], [loss for _, loss in curve])
        for curve in curves
    ]
    return [(float(s), float(v)) for s, v in zip(steps, np.mean(losses, axis=0), strict=True)]


def size_that_scores(sizes: Sequence[int], scores: Sequence[float], target: float) -> float | None:
    """Return the size at which a score curve first reaches `target`, on a logarithmic scale.

    The curve is made non-decreasing first (running best), as more data is taken not to hurt.

    Returns:
        The size; `sizes[0]` if that one is enough, None if the largest is not.
    """
    best = np.maximum.accumulate(scores)
    if best[0] >= target:
        return float(sizes[0])
    for place in range(1, len(sizes)):
        if best[place] >= target:
            share = (target - best[place - 1]) / (best[place] - best[place - 1])
            low, high = math.log(sizes[place - 1]), math.log(sizes[place])
            return math.exp(low + share * (high - low))
    return None
