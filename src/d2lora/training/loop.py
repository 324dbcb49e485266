"""The training loop, one for both phases.

Arms of a comparison differ only in the adapter's initialization: optimizer, schedule and step
count start from zero here. A run is a pure function of its initialization, rows and seeds, and can
be killed at any moment and resumed to the same result.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import AdamW

from d2lora import fast
from d2lora.adapters.base import causal_model
from d2lora.adapters.lora import adamw
from d2lora.data.batches import Encoded, Item, T
from d2lora.errors import TrainingError, first_line
from d2lora.runtime.claims import is_main_process
from d2lora.runtime.console import Reporter
from d2lora.runtime.run_folder import RunFolder
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import TrainSettings
from d2lora.settings.seeds import seed_of
from d2lora.training import checkpoint, loss_scale
from d2lora.training.cost import Cost, TrainingFlops, peak_memory_bytes
from d2lora.training.episodes import EpisodeSchedule
from d2lora.training.high_rank import cut_to_rank
from d2lora.training.lesson import Lesson
from d2lora.training.objectives import Objective
from d2lora.training.passes import Passes, undoing
from d2lora.training.processes import Processes
from d2lora.training.progress import Best, Progress, as_logged, held_out, judge
from d2lora.training.recomputation import can_recompute, recomputed
from d2lora.training.schedule import StepSchedule

U = TypeVar("U", bound=Item)


@dataclass(frozen=True)
class Trained:
    """The outcome of a run."""

    progress: Progress
    cost: Cost
    kept_step: int
    """Optimizer step whose weights the model ends with."""
    validation_after: float | None
    """Held-out loss of these weights."""
    energy_kept: float | None = None
    """Share of the updates' energy that is left where they were cut to a lower rank."""


@dataclass
class _Loop(Generic[T]):
    """What a run is made of; steps change the weights, the optimizer and the progress."""

    model: nn.Module
    lesson: Lesson[T]
    settings: TrainSettings
    schedule: StepSchedule
    processes: Processes
    scorer: TokenScorer
    parameters: Mapping[str, nn.Parameter]
    optimizer: AdamW
    passes: Passes[T]
    flops: TrainingFlops | None
    """None: not known."""
    progress: Progress = field(default_factory=Progress)
    best: Best = field(default_factory=Best)
    anchor: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Of a meta warm-up: the weights that the present episode began with."""

    @classmethod
    def of(
        cls, model: nn.Module, lesson: Lesson[T], settings: TrainSettings, reporter: Reporter
    ) -> "_Loop[T]":
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise TrainingError(
                "nothing is trainable: the adapter was loaded frozen, as PEFT does by default; "
                "load it with is_trainable=True"
            )
        processes = Processes.of(model)
        processes.agree(parameters.values())
        # What is recorded keeps every activation.
        replays = processes.n == 1 and settings.checkpointing != "on"
        scorer = TokenScorer(model, replays=replays)
        return cls(
            model,
            lesson,
            settings,
            lesson.schedule(settings),
            processes,
            scorer,
            parameters,
            adamw(model, settings),
            Passes.of(model, scorer, settings, reporter, processes.n),
            TrainingFlops.of(model),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.parameters.values())).device

    def is_due(self, every: int) -> bool:
        """Say whether something that comes every so many steps, and at the end, is due."""
        return self.has_come(every) or self.progress.step == self.schedule.last_step

    def has_come(self, every: int) -> bool:
        """Say whether so many steps have passed again.

        In a meta warm-up at the end of an episode: within it the weights are those of its task.
        """
        step, length = self.progress.step, self.schedule.steps_per_episode
        return step % length == 0 and step // every > (step - length) // every

    def fit_passes(self) -> None:
        """Take passes that memory has room for, by the longest of the first rows.

        Not of a sharded base, whose layers are whole while they compute.
        """
        if self.processes.in_step:
            return
        lesson, scorer = self.lesson, TokenScorer(self.model)
        batch = lesson.longest(self.settings)
        if batch:
            self.passes.fit(
                batch, lambda part: lesson.objective.share(scorer, part, batch, lesson.pad_id)
            )

    def validate(self) -> dict[str, float]:
        """Return the held-out loss and metrics."""
        self.model.eval()
        lesson, passes = self.lesson, self.passes
        return passes.within_memory(
            lambda: held_out(self.scorer, lesson.valid, lesson.objective, passes, lesson.pad_id),
            undo=lambda: None,
        )


def train(
    model: nn.Module,
    lesson: Lesson[T],
    settings: TrainSettings,
    run: RunFolder,
    reporter: Reporter,
    *,
    resume: bool = False,
    rank: int | None = None,
) -> Trained:
    """Train the parameters of `model` that require a gradient.

    Args:
        model: A causal language model with an adapter; changed in place.
        lesson: What to learn.
        settings: The loop's settings.
        run: Where metrics and checkpoints go.
        reporter: Where progress is shown.
        resume: Continue from the folder's checkpoint where it has one.
        rank: Cut what was learnt to this rank at the end. None: leave it.

    Raises:
        TrainingError: If nothing is trainable, or the loss or its gradient is not finite.
    """
    if settings.checkpointing == "on" and not can_recompute(model):
        raise TrainingError(
            f"--checkpointing on: {type(causal_model(model)).__name__} has no layers that "
            "transformers computes again; leave it out"
        )
    loop = _Loop.of(model, lesson, settings, reporter)
    schedule = loop.schedule
    started = time.perf_counter()
    with torch.random.fork_rng(), recomputed(model, on=settings.checkpointing == "on"):
        torch.manual_seed(seed_of(settings, "dropout"))
        loop.fit_passes()
        _begin(loop, run, reporter, resume=resume)
        progress, parameters, best = loop.progress, loop.parameters, loop.best
        started -= progress.elapsed_s
        tokens_before, resumed_at = progress.n_tokens, time.perf_counter()
        with reporter.bar("training", schedule.last_step, progress.step) as bar:
            while progress.step < schedule.last_step and not progress.stopped:
                measured = _step(loop)
                progress.elapsed_s = time.perf_counter() - started
                run.log(
                    step=progress.step,
                    epoch=round(progress.step / schedule.steps_per_epoch, 4),
                    **measured,
                    n_tokens=progress.n_tokens,
                    elapsed_s=round(progress.elapsed_s, 3),
                )
                speed = (progress.n_tokens - tokens_before) / (time.perf_counter() - resumed_at)
                bar.update(progress.step, f"loss {measured['loss']:.3f}  {speed:,.0f} tokens/s")
                if lesson.valid and loop.is_due(settings.eval_every or schedule.steps_per_epoch):
                    judge(loop.validate(), progress, best, parameters, settings, run, reporter)
                every = settings.checkpoint_every
                if every and loop.has_come(every) and is_main_process():
                    run.flush_log()
                    progress.fast_passes = fast.used_in(model).names
                    checkpoint.save(
                        run.path, asdict(progress), parameters, loop.optimizer, best.weights
                    )
    return _trained(loop, rank)


def _begin(loop: _Loop[T], run: RunFolder, reporter: Reporter, *, resume: bool) -> None:
    """Go on from a checkpoint, or measure the held-out loss before training."""
    if resume and checkpoint.exists(run.path):
        state = checkpoint.load(run.path, loop.parameters, loop.optimizer, loop.best.weights)
        loop.progress = Progress(**state)
        for name in loop.progress.fast_passes:
            fast.used_in(loop.model).take(name)
        run.cut_log(loop.progress.step)
        reporter.say(f"resumed at step {loop.progress.step} of {loop.schedule.last_step}")
    elif loop.lesson.valid:
        before = loop.validate()
        loop.progress.validation_before = loop.progress.validation_last = before["loss"]
        run.log(step=0, **as_logged(before))
    loss_scale.begin(loop.progress, causal_model(loop.model).dtype)
    if isinstance(loop.schedule, EpisodeSchedule):
        loop.anchor = {name: p.detach().clone() for name, p in loop.parameters.items()}


def _step(loop: _Loop[T]) -> dict[str, float]:
    """Take one optimizer step.

    Returns:
        The batch's loss and metrics, the learning rate, and the gradient's norm.
    """
    settings, progress, replay = loop.settings, loop.progress, loop.lesson.replay
    items = [loop.lesson.train[index] for index in loop.schedule.batch(progress.step)]
    learning_rate = loop.schedule.learning_rate(progress.step, settings)
    loop.model.train()
    general = [] if replay is None else replay.batch(progress.step)
    measured, norm = _gradient(loop, items, general)
    loss = measured["loss"]
    if replay is not None:
        loss += replay.weight * measured["replay_loss"]
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise TrainingError(
            f"the loss became {loss} and its gradient {norm} at step {progress.step + 1}; lower "
            f"--learning-rate (now {settings.learning_rate:g}), or use --dtype float32"
        )
    for group in loop.optimizer.param_groups:
        group["lr"] = learning_rate * group.get("factor", 1.0)
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    progress.step += 1
    _end_episode(loop)
    counted: list[tuple[Sequence[Item], float]] = [(items, 1.0)]
    if replay is not None:
        counted.append((general, replay.passes_per_row))
    _count(loop, counted)
    if progress.first_loss is None:
        progress.first_loss = measured["loss"]
    progress.last_loss = measured["loss"]
    scaled = {} if progress.loss_scale is None else {"loss_scale": progress.loss_scale}
    return {**measured, "learning_rate": learning_rate, "grad_norm": norm, **scaled}


def _gradient(
    loop: _Loop[T], items: Sequence[T], general: Sequence[Encoded]
) -> tuple[dict[str, float], float]:
    """Compute a batch's gradient, clipped, in a way that memory and dtype hold.

    Args:
        loop: The run.
        items: The batch.
        general: The general rows beside it.

    Returns:
        What `_backward` gives, with `replay_loss` where there are general rows, and the norm before
        clipping.
    """
    parameters, progress = list(loop.parameters.values()), loop.progress
    replay = loop.lesson.replay
    largest = loop.settings.max_grad_norm or math.inf
    undo = undoing(loop.optimizer, loop.device)

    def attempt() -> dict[str, float]:
        measured = _backward(loop, items, loop.lesson.objective)
        if replay is not None:
            beside = _backward(loop, general, replay.objective, replay.weight, replay.pass_tokens)
            measured["replay_loss"] = beside["loss"]
        loop.processes.add_gradients(parameters)
        return measured

    while True:
        measured = loop.passes.within_memory(attempt, undo)
        loss_scale.unscale(parameters, progress)
        norm = float(nn.utils.clip_grad_norm_(parameters, largest))
        if math.isfinite(norm):
            loss_scale.keep(progress)
            return measured, norm
        if not math.isfinite(measured["loss"]) or not loss_scale.skip(progress):
            return measured, norm
        undo()


def _count(loop: _Loop[T], counted: Iterable[tuple[Sequence[Item], float]]) -> None:
    """Add to the bill of a run the rows of a step, each with the passes that it took."""
    progress = loop.progress
    for items, n_passes in counted:
        progress.n_tokens += sum(item.n_tokens for item in items)
        progress.n_supervised_tokens += sum(item.n_supervised for item in items)
        if loop.flops is None or progress.flops is None:
            progress.flops = None
            continue
        rows = (loop.flops.of_rows(i.n_rows, i.n_tokens, i.n_supervised) for i in items)
        progress.flops += round(n_passes * sum(rows))


def _end_episode(loop: _Loop[T]) -> None:
    """Move the weights of a meta warm-up, where an episode ends, and start the next one."""
    if not isinstance(loop.schedule, EpisodeSchedule):
        return
    share = loop.schedule.moves_after(loop.progress.step)
    if share is None:
        return
    with torch.no_grad():
        for name, parameter in loop.parameters.items():
            loop.anchor[name].lerp_(parameter, share)
            parameter.copy_(loop.anchor[name])
    loop.optimizer.state.clear()


def _backward(
    loop: _Loop[Any],
    items: Sequence[U],
    objective: Objective[U],
    weight: float = 1.0,
    max_tokens: int | None = None,
) -> dict[str, float]:
    """Add up the gradient of this process's share of a batch over its micro-batches.

    Args:
        loop: The run.
        items: The batch.
        objective: Its loss.
        weight: Weight of the gradient.
        max_tokens: Padded tokens of one pass, at most; None: the run's.

    Returns:
        The whole batch's loss and metrics, unweighted.
    """
    scorer, lesson, scale = loop.scorer, loop.lesson, loop.progress.loss_scale or 1
    total: dict[str, Tensor] = {}
    for group, part in loop.processes.shares(
        items, partial(loop.passes.cut, max_tokens=max_tokens)
    ):
        loop.passes.begin(group)
        share = objective.share(scorer, group, items, lesson.pad_id)
        loss: Tensor = share.loss * (part * weight * scale)
        try:
            loss.backward()
        except RuntimeError as error:
            if not any(fault in str(error) for fault in _NO_GRADIENT):
                raise
            kind = type(causal_model(loop.model)).__name__
            raise TrainingError(
                f"{kind} cannot be trained: its own forward pass does not keep what its "
                f"gradient needs ({first_line(error)})"
            ) from None
        for name, value in {"loss": share.loss.detach(), **share.metrics}.items():
            total[name] = total[name] + value * part if name in total else value * part
    measured = loop.processes.total(torch.stack([value.float() for value in total.values()]))
    return dict(zip(total, measured.tolist(), strict=True))


_NO_GRADIENT = ("inplace operation", "does not require grad")
"""What torch says of models that overwrite what they computed, or leave no trace of it."""


def _trained(loop: _Loop[T], rank: int | None) -> Trained:
    """Put the best weights back, where they are kept, and cut them; return the outcome."""
    loop.model.eval()
    progress = loop.progress
    kept, loss = progress.step, progress.validation_last
    if loop.best.put_back(loop.parameters) and progress.best_step is not None:
        kept, loss = progress.best_step, progress.best_validation
    energy = None
    if rank is not None:
        assert isinstance(loop.model, PeftModel)
        energy = cut_to_rank(loop.model, rank)
        loss = loop.validate()["loss"] if loop.lesson.valid else None
    cost = Cost(
        n_steps=progress.step,
        n_tokens=progress.n_tokens,
        n_supervised_tokens=progress.n_supervised_tokens,
        flops=progress.flops,
        elapsed_s=round(progress.elapsed_s, 3),
        peak_memory_bytes=peak_memory_bytes(loop.device),
        n_trainable_parameters=sum(p.numel() for p in loop.parameters.values()),
        n_skipped=progress.n_skipped,
    )
    return Trained(progress, cost, kept, loss, energy)
