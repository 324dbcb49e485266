"""What a run would take, known before it starts: `--dry-run` of `warmup` and `adapt`.

Memory is estimated for the longest batch of the first rows, time from a few steps taken here. The
steps train an adapter that is thrown away.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from typing import Any

from rich.table import Table

from d2lora import fast
from d2lora.data.batches import PreferencePair
from d2lora.errors import counted
from d2lora.runtime.claims import is_main_process
from d2lora.runtime.console import Reporter, table_console
from d2lora.runtime.run_folder import METRICS
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import PhaseSettings, WarmupSettings
from d2lora.training.lesson import Lesson
from d2lora.training.loop import train
from d2lora.training.memory import Memory, available, gigabytes, largest, memory_of
from d2lora.training.objectives import objective_of
from d2lora.training.passes import Passes
from d2lora.training.phase import Phase, warnings_before
from d2lora.training.recomputation import can_recompute, recomputed, recomputes
from d2lora.training.replay import Replay

N_STEPS = 4
"""Optimizer steps that are measured; the first, which is slow, does not count."""
_LOOKED_AT = 1024
_VALIDATION = 1 / 3
"""Of a row's time in training, what its loss alone takes: no backward pass."""
_WORDS = {
    "weights": "weights of the base", "adapter": "weights of the adapter",
    "state": "gradients and moments", "activations": "activations", "working": "working space",
    "other": "process and libraries",
}  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """What a run would take."""

    n_rows: int
    n_valid: int
    n_steps: int
    batch_size: int
    n_tokens: int
    """Run forward and backward, all steps together."""
    longest: int
    """Tokens of the longest row looked at."""
    pass_rows: int
    """Rows of the largest forward pass."""
    pass_tokens: int
    memory: Memory
    recomputed: Memory | None
    """With activation checkpointing; None: the base's layers do not have it."""
    recomputes: bool
    """Whether the run would take that."""
    available: int
    """Bytes that are free now, beside what the process has."""
    seconds: float
    n_measured: int
    """Steps that the time rests on."""
    warnings: Sequence[str]
    """What the run would warn of before its first step."""

    @property
    def peak(self) -> int:
        """Bytes that the run would take at most."""
        return (self.recomputed if self.recomputed and self.recomputes else self.memory).peak


def forecast(phase: Phase) -> Forecast:
    """Estimate what the run of a phase would take; its adapter is not what it was afterwards."""
    settings, model, base = phase.settings, phase.adapter.model, phase.base
    rows = replace(phase.rows, train=_Scored(phase.rows.train), valid=_Scored(phase.rows.valid))
    max_tokens = settings.max_tokens if isinstance(settings, WarmupSettings) else None
    objective = objective_of(settings)
    lesson: Lesson[Any] = Lesson(
        rows.train,
        rows.valid,
        objective,
        base.pad_id,
        max_tokens,
        rows.origins,
        Replay.of(rows.replay, len(rows.train), model, settings),
    )
    schedule = lesson.schedule(settings)
    with fast.enabled(model, when=settings.fast):
        scorer, batch = TokenScorer(model), lesson.longest(settings)
        share = partial(objective.share, scorer, batch=batch, pad_id=base.pad_id)
        passes: Passes[Any] = Passes.of(model, scorer, settings, Reporter(quiet=True), 1)
        with recomputed(model, on=settings.checkpointing == "on"):
            passes.fit(batch, share)
            group, on = largest(passes.cut(batch)), recomputes(model)
        n_predicted = sum(item.n_supervised for item in group)
        of_group = partial(memory_of, model.train(), partial(share, group), n_predicted)
        memory = of_group(recompute=False)
        again = None
        if can_recompute(model):
            # The second time the holes are there already.
            again = replace(of_group(recompute=True), other=memory.other, working=memory.working)
        free = available(model.device)
        seconds, n_measured = _measured(phase, lesson)
    looked = [item.n_tokens for item in rows.train[:_LOOKED_AT]]
    of_valid = [item.n_tokens for item in rows.valid[:_LOOKED_AT]]
    n_seen = sum(len(schedule.batch(step)) for step in range(schedule.last_step))
    n_tokens = round(mean(looked) * n_seen)
    if lesson.replay is not None:
        general = mean(item.n_tokens for item in rows.replay)
        n_tokens += round(general * lesson.replay.schedule.batch_size * schedule.last_step)
    n_validations = _n_validations(settings, schedule.last_step, schedule.steps_per_epoch)
    n_validated = n_validations * len(rows.valid) * mean(of_valid or [0]) * _VALIDATION
    return Forecast(
        len(rows.train),
        len(rows.valid),
        schedule.last_step,
        schedule.batch_size,
        n_tokens,
        max(item.length for item in batch),
        sum(item.n_rows for item in group),
        sum(item.n_tokens for item in group),
        memory,
        again,
        on,
        free,
        seconds * (n_tokens + n_validated),
        n_measured,
        warnings_before(schedule.n_steps, settings, phase.rows, phase.base.model),
    )


class _Scored(Sequence[Any]):
    """Rows as they are; pairs with a reference's log-probabilities, which no memory hangs on."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        found = self._rows[index]
        return [_scored(row) for row in found] if isinstance(index, slice) else _scored(found)


def _scored(row: Any) -> Any:
    return replace(row, reference=(0.0, 0.0)) if isinstance(row, PreferencePair) else row


def _n_validations(settings: PhaseSettings, last_step: int, steps_per_epoch: int) -> int:
    """Return how often the validation loss is computed, from before the first step on."""
    return 1 + -(-last_step // (settings.eval_every or steps_per_epoch))


def _measured(phase: Phase, lesson: Lesson[Any]) -> tuple[float, int]:
    """Take a few steps; return the seconds of a token, and the steps."""
    settings, run, model = phase.settings, phase.run, phase.adapter.model
    n_steps = min(N_STEPS, lesson.schedule(settings).last_step)
    if n_steps == 0:
        return 0.0, 0
    meta = {n: f.default for n, f in type(settings).model_fields.items() if n.startswith("meta_")}
    few = settings.changed(stop_step=n_steps, checkpoint_every=0, **meta)
    run.path.mkdir(parents=True, exist_ok=True)
    train(model, replace(lesson, valid=[]), few, run, Reporter(quiet=True))
    lines = (run.path / METRICS).read_text(encoding="utf-8").splitlines()
    steps = [(row["elapsed_s"], row["n_tokens"]) for row in map(json.loads, lines)]
    (begin, before), (end, after) = ((0.0, 0) if len(steps) == 1 else steps[0]), steps[-1]
    return (end - begin) / max(1, after - before), n_steps


def show(found: Forecast) -> None:
    """Print a forecast on standard output."""
    if not is_main_process():
        return
    console = table_console()
    epochs = found.n_steps * found.batch_size / max(1, found.n_rows)
    held_out = f", {found.n_valid} held out" if found.n_valid else ""
    console.print(
        f"rows: {found.n_rows:,} to learn from{held_out}; the longest of {found.longest:,} tokens\n"
        f"steps: {found.n_steps:,} of {counted(found.batch_size, 'row')}, {epochs:.3g} passes over "
        f"the rows, {found.n_tokens:,} tokens\n"
        f"time: about {_duration(found.seconds)}, from {counted(found.n_measured, 'step')} here\n"
        f"largest pass: {counted(found.pass_rows, 'row')}, {found.pass_tokens:,} tokens"
    )
    columns = [found.memory, *([found.recomputed] if found.recomputed else [])]
    table = Table("memory", box=None)
    table.add_column("without checkpointing", justify="right")
    if found.recomputed:
        table.add_column("with it", justify="right")
    for name, words in _WORDS.items():
        table.add_row(words, *(gigabytes(getattr(one, name)) for one in columns))
    table.add_row("peak", *(gigabytes(one.peak) for one in columns))
    console.print(table)
    chosen = "with" if found.recomputes else "without"
    console.print(
        f"{gigabytes(found.available)} are free beside what the process has; the run would go "
        f"{chosen} checkpointing. Nothing was trained or written"
    )
    for warning in found.warnings:
        console.print(f"warning: {warning}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
