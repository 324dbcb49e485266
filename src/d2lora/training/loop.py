"""The training loop, one for both phases.

Arms of a comparison differ only in the adapter's initialization: optimizer, schedule and step
count start from zero here. A run is a pure function of its initialization, rows and seeds, and can
be killed at any moment and resumed to the same result.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW

from d2lora.adapters.base import causal_model
from d2lora.adapters.lora import adamw
from d2lora.data.batches import Item, T, micro_batches
from d2lora.errors import TrainingError
from d2lora.runtime.claims import is_main_process
from d2lora.runtime.console import Reporter
from d2lora.runtime.run_folder import RunFolder
from d2lora.scoring.scorer import TokenScorer, pass_tokens
from d2lora.settings import TrainSettings
from d2lora.settings.seeds import seed_of
from d2lora.training import checkpoint
from d2lora.training.cost import Cost, TrainingFlops, peak_memory_bytes
from d2lora.training.objectives import Objective
from d2lora.training.progress import Best, Progress, as_logged, held_out, judge
from d2lora.training.schedule import StepSchedule, learning_rate_at


@dataclass(frozen=True)
class Trained:
    """The outcome of a run."""

    progress: Progress
    cost: Cost
    kept_step: int
    """Optimizer step whose weights the model ends with."""
    validation_after: float | None
    """Held-out loss of these weights."""


@dataclass
class _State:
    """What a step changes."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: AdamW
    flops: TrainingFlops
    progress: Progress = field(default_factory=Progress)
    best: Best = field(default_factory=Best)


def train(
    model: nn.Module,
    train_set: Sequence[T],
    valid_set: Sequence[T],
    objective: Objective[T],
    settings: TrainSettings,
    run: RunFolder,
    reporter: Reporter,
    *,
    pad_id: int,
    resume: bool = False,
    max_tokens: int | None = None,
) -> Trained:
    """Train the parameters of `model` that require a gradient.

    Args:
        model: A causal language model with an adapter; changed in place.
        train_set: Examples to learn.
        valid_set: Examples for validation loss; may be empty.
        objective: The loss.
        settings: The loop's settings.
        run: Where metrics and checkpoints go.
        reporter: Where progress is shown.
        pad_id: Token id for padding.
        resume: Continue from the folder's checkpoint where it has one.
        max_tokens: End with the step that sees so many tokens, in place of the settings' end.

    Raises:
        TrainingError: If nothing is trainable, or the loss or its gradient is not finite.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise TrainingError(
            "nothing is trainable: the adapter was loaded frozen, as PEFT does by default; load "
            "it with is_trainable=True"
        )
    device = next(iter(parameters.values())).device
    accelerator = Accelerator(cpu=device.type == "cpu")
    alone = accelerator.num_processes == 1
    scorer = accelerator.prepare(TokenScorer(model, replays=alone))
    optimizer = adamw(model, settings)
    schedule = planned(train_set, settings, max_tokens)
    causal = causal_model(model)
    state = _State(parameters, optimizer, TrainingFlops.of(causal, causal.config))

    def validate() -> dict[str, float]:
        model.eval()
        limit = pass_tokens(device, settings.micro_batch_tokens)
        return held_out(scorer, valid_set, objective, limit, pad_id)

    started = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(settings, "dropout"))
        if resume and checkpoint.exists(run.path):
            state.progress = Progress(
                **checkpoint.load(run.path, parameters, optimizer, state.best.weights)
            )
            run.cut_log(state.progress.step)
            reporter.say(f"resumed at step {state.progress.step} of {schedule.last_step}")
        elif valid_set:
            before = validate()
            state.progress.validation_before = state.progress.validation_last = before["loss"]
            run.log(step=0, **as_logged(before))
        started -= state.progress.elapsed_s
        progress = state.progress
        tokens_before, resumed_at = progress.n_tokens, time.perf_counter()
        with reporter.bar("training", schedule.last_step, progress.step) as bar:
            while progress.step < schedule.last_step and not progress.stopped:
                items = [train_set[index] for index in schedule.batch(progress.step)]
                lr = learning_rate_at(progress.step, schedule.n_steps, settings)
                model.train()
                measured, norm = _step(
                    accelerator, scorer, items, objective, settings, state, lr, pad_id
                )
                progress.elapsed_s = time.perf_counter() - started
                run.log(
                    step=progress.step,
                    epoch=round(progress.step / schedule.steps_per_epoch, 4),
                    **measured,
                    learning_rate=lr,
                    grad_norm=norm,
                    n_tokens=progress.n_tokens,
                    elapsed_s=round(progress.elapsed_s, 3),
                )
                speed = (progress.n_tokens - tokens_before) / (time.perf_counter() - resumed_at)
                bar.update(progress.step, f"loss {measured['loss']:.3f}  {speed:,.0f} tokens/s")
                if valid_set and _due(
                    progress.step, settings.eval_every or schedule.steps_per_epoch, schedule
                ):
                    judge(validate(), progress, state.best, parameters, settings, run, reporter)
                every = settings.checkpoint_every
                if every and progress.step % every == 0 and is_main_process():
                    best = state.best.weights
                    checkpoint.save(run.path, asdict(progress), parameters, optimizer, best)
    model.eval()
    kept, loss = progress.step, progress.validation_last
    if state.best.put_back(parameters) and progress.best_step is not None:
        kept, loss = progress.best_step, progress.best_validation
    return Trained(progress, _cost(progress, parameters, device), kept, loss)


def planned(
    train_set: Sequence[Item], settings: TrainSettings, max_tokens: int | None
) -> StepSchedule:
    """Return the steps of a run, which ends as the settings say or with so many tokens."""
    schedule = StepSchedule.of(len(train_set), settings, seed_of(settings, "order"))
    if max_tokens is None:
        return schedule
    return schedule.until(max_tokens, [item.n_tokens for item in train_set])


def _step(
    accelerator: Accelerator,
    scorer: nn.Module,
    items: Sequence[T],
    objective: Objective[T],
    settings: TrainSettings,
    state: _State,
    lr: float,
    pad_id: int,
) -> tuple[dict[str, float], float]:
    """Take one optimizer step; return the batch's loss and metrics, and its gradient's norm."""
    world = accelerator.num_processes
    # A process without a share still has to take part in the synchronisation: with weight 0.
    mine = items[accelerator.process_index :: world] or items[:1]
    weight = world if len(items) > accelerator.process_index else 0
    limit = pass_tokens(accelerator.device, settings.micro_batch_tokens)
    groups = micro_batches(mine, limit, settings.micro_batch_size)
    total: dict[str, Tensor] = {}
    for number, group in enumerate(groups, 1):
        with (
            accelerator.accumulate(scorer) if number == len(groups) else accelerator.no_sync(scorer)
        ):
            share = objective.share(scorer, group, items, pad_id)
            accelerator.backward(share.loss * weight)
        for name, value in {"loss": share.loss.detach(), **share.metrics}.items():
            total[name] = total[name] + value * weight if name in total else value * weight
    reduced = accelerator.reduce(torch.stack([total[name].float() for name in total]), "mean")
    assert isinstance(reduced, Tensor)
    measured = dict(zip(total, reduced.tolist(), strict=True))
    mean = measured["loss"]
    progress = state.progress
    largest = settings.max_grad_norm or math.inf
    norm = float(nn.utils.clip_grad_norm_(list(state.parameters.values()), largest))
    if not math.isfinite(mean) or not math.isfinite(norm):
        raise TrainingError(
            f"the loss became {mean} and its gradient {norm} at step {progress.step + 1}; lower "
            f"--learning-rate (now {settings.learning_rate:g}), or use --dtype float32"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)
    state.optimizer.step()
    state.optimizer.zero_grad()
    progress.step += 1
    progress.n_tokens += sum(item.n_tokens for item in items)
    progress.n_supervised_tokens += sum(item.n_supervised for item in items)
    progress.flops += sum(state.flops.of_rows(i.n_rows, i.n_tokens, i.n_supervised) for i in items)
    progress.first_loss = mean if progress.first_loss is None else progress.first_loss
    progress.last_loss = mean
    return measured, norm


def _due(step: int, every: int, schedule: StepSchedule) -> bool:
    return step % every == 0 or step == schedule.last_step


def _cost(progress: Progress, parameters: Mapping[str, nn.Parameter], device: torch.device) -> Cost:
    return Cost(
        n_steps=progress.step,
        n_tokens=progress.n_tokens,
        n_supervised_tokens=progress.n_supervised_tokens,
        flops=progress.flops,
        elapsed_s=round(progress.elapsed_s, 3),
        peak_memory_bytes=peak_memory_bytes(device),
        n_trainable_parameters=sum(p.numel() for p in parameters.values()),
    )
