"""A fit as a study's plan of one task and one size, so that its runs are those of a study."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2lora.fitting.starts import names_of
from d2lora.settings import BaseSettings, FitSettings, ReplaySettings
from d2lora.study.plan import ArmPlan, StudyPlan, TaskPlan

TASK = "task"
_LONGEST = {16: 48, 64: 128, 256: 256, 1024: 512}
"""Rows -> the longest training that is tried at first, in optimizer steps."""
_FORMAT = ("max_length", "overlong", "chat_format", "skip_bad_rows")


def plan_of(settings: FitSettings, starts: Sequence[Path], rank: int, n: int) -> StudyPlan:
    """Return the plan: an arm for each initialization, all of one rank.

    Args:
        settings: The fit's settings.
        starts: The warm starts, of that rank.
        rank: Rank of new adapters.
        n: Rows to use.
    """
    names = names_of(starts)
    shape = {"rank": rank, "alpha": settings.alpha, "targets": settings.targets}
    adapt: dict[str, Any] = {
        **{name: getattr(settings, name) for name in _FORMAT},
        **{name: value for name, value in shape.items() if value is not None},
    }
    if settings.replay:
        adapt |= {name: getattr(settings, name) for name in ReplaySettings.model_fields}
    if settings.batch_size is not None:
        adapt["batch_size"] = settings.batch_size
    task = TaskPlan(
        data=settings.data,
        test=settings.test,
        task=settings.task,
        n_test=settings.n_test,
        max_new_tokens=settings.max_new_tokens,
    )
    warm = [ArmPlan(kind="warm", name=f"warm start {name}", warm_up=name) for name in names]
    new = [ArmPlan(kind="init", name=init, init=init) for init in settings.inits]
    values: dict[str, Any] = dict(
        **{name: getattr(settings, name) for name in BaseSettings.model_fields},
        warm_ups={name: {"path": str(path)} for name, path in zip(names, starts, strict=True)},
        tasks={TASK: task},
        sizes=(n,),
        seeds=1,
        arms=(*warm, *new),
        adapt=adapt,
        steps=_LONGEST if settings.steps is None else {n: settings.steps},
        learning_rates=settings.learning_rates,
        folds=settings.folds,
        general_text=settings.general_text,
        choices=settings.choices,
        lm_eval_tasks=settings.lm_eval_tasks,
        keep_out_words=settings.keep_out_words,
    )
    return StudyPlan.unchecked(values)
