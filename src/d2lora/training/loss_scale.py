"""Dynamic loss scaling for float16, whose small gradients would vanish (Micikevicius et al. 2018).

The loss is multiplied by a power of two, and the gradients, which stand in float32, divided by it
again. Where they overflow on the way, they are thrown away and counted, and the same batch is taken
again at half the scale: of few rows none is left out. arXiv 1710.03740; the first scale and its
growth are those of torch.amp.GradScaler.
"""

from collections.abc import Iterable

import torch
from torch import nn

from d2lora.errors import TrainingError
from d2lora.training.progress import Progress

FIRST, STEPS_TO_DOUBLE, MOST = 2.0**16, 2000, 2.0**24


def begin(progress: Progress, dtype: torch.dtype) -> None:
    """Scale the loss of a base in float16 from here on; of others it is left as it is."""
    if dtype == torch.float16 and progress.loss_scale is None:
        progress.loss_scale = FIRST


def unscale(parameters: Iterable[nn.Parameter], progress: Progress) -> None:
    """Divide gradients by the scale; powers of two change no digit."""
    if progress.loss_scale is not None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(progress.loss_scale)


def keep(progress: Progress) -> None:
    """Take note of finite gradients: after many the scale is doubled."""
    if progress.loss_scale is None:
        return
    progress.n_finite += 1
    if progress.n_finite == STEPS_TO_DOUBLE:
        progress.n_finite = 0
        progress.loss_scale = min(MOST, 2 * progress.loss_scale)


def skip(progress: Progress) -> bool:
    """Halve the scale, as gradients were not finite; say whether there is one to halve.

    Raises:
        TrainingError: If they are not even without a scale.
    """
    if progress.loss_scale is None:
        return False
    if progress.loss_scale <= 1:
        raise TrainingError(
            f"gradients overflow float16 at step {progress.step + 1}, whatever the loss is scaled "
            "by; use --dtype bfloat16 or float32"
        )
    progress.loss_scale /= 2
    progress.n_finite = 0
    progress.n_skipped += 1
    return True
