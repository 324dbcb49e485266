"""How far a run is, and its held-out loss on the way: the best weights, and when to stop."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from d2lora.data.batches import T
from d2lora.runtime.console import Reporter
from d2lora.runtime.run_folder import RunFolder
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import TrainSettings
from d2lora.training.objectives import Objective
from d2lora.training.passes import Passes


@dataclass
class Progress:
    """How far a run is; together with weights and moments, all that a resumed run needs."""

    step: int = 0
    n_tokens: int = 0
    n_supervised_tokens: int = 0
    flops: int | None = 0
    elapsed_s: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    validation_before: float | None = None
    validation_last: float | None = None
    best_step: int | None = None
    best_validation: float = math.inf
    n_worse: int = 0
    stopped: bool = False
    fast_passes: list[str] = field(default_factory=list[str])
    """Those that were used before a checkpoint."""
    loss_scale: float | None = None
    """Of float16; None: the loss is not scaled."""
    n_finite: int = 0
    """Steps since the scale was changed."""
    n_skipped: int = 0
    """Gradients that were thrown away, as they were not finite at their scale."""


@dataclass
class Best:
    """The weights with the least validation loss so far; empty where the last are kept."""

    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def take(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy the present weights."""
        self.weights = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def put_back(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Write the copy into the parameters; say whether there is one."""
        for name, value in self.weights.items():
            parameters[name].copy_(value)
        return bool(self.weights)


@torch.no_grad()
def held_out(
    scorer: TokenScorer,
    items: Sequence[T],
    objective: Objective[T],
    passes: Passes[T],
    pad_id: int,
) -> dict[str, float]:
    """Return the loss and metrics of a set of items, as if it were one batch."""
    items = list(items)  # read from disk once
    total: dict[str, float] = {}
    for group in passes.cut(items):
        passes.begin(group)
        share = objective.share(scorer, group, items, pad_id)
        for name, value in {"loss": share.loss, **share.metrics}.items():
            total[name] = total.get(name, 0.0) + float(value)
    return total


def as_logged(measured: Mapping[str, float]) -> dict[str, Any]:
    """Return held-out loss and metrics under their names in the log."""
    return {f"validation_{name}": value for name, value in measured.items()}


def judge(
    measured: Mapping[str, float],
    progress: Progress,
    best: Best,
    parameters: Mapping[str, nn.Parameter],
    settings: TrainSettings,
    run: RunFolder,
    reporter: Reporter,
) -> None:
    """Take note of a held-out loss, keep the best weights, and stop after `patience` worse ones."""
    progress.validation_last = loss = measured["loss"]
    run.log(step=progress.step, **as_logged(measured))
    accuracy = measured.get("rewards/accuracies")
    reporter.say(
        f"step {progress.step}: loss {progress.last_loss:.4f}, validation loss {loss:.4f}"
        + ("" if accuracy is None else f", chosen over rejected {accuracy:.1%}")
    )
    if loss < progress.best_validation:
        progress.best_validation, progress.best_step, progress.n_worse = loss, progress.step, 0
        if settings.keep_best:
            best.take(parameters)
        return
    progress.n_worse += 1
    if settings.patience and progress.n_worse >= settings.patience:
        progress.stopped = True
        reporter.say(f"stopped early; the validation loss was lowest at step {progress.best_step}")
