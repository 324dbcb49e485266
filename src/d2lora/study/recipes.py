"""The settings of every run of a plan."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2lora.settings import (
    AdaptSettings,
    BaseSettings,
    PairsSettings,
    PhaseSettings,
    WarmupSettings,
)
from d2lora.study.plan import ArmPlan, StudyPlan

_PATTERNS = ("rank_pattern", "alpha_pattern")


def warm_up_settings(plan: StudyPlan, name: str, out: Path, seed: int = 0) -> WarmupSettings:
    """Return the settings of one warm-up; the plan's seeds are added to its own."""
    own = listed_values({**plan.warm_up, **plan.warm_ups[name]})
    values: dict[str, Any] = {**base_values(plan), **own, "out": out, "quiet": True}
    settings = WarmupSettings(**_of_one_length(values))
    return settings.changed(seed=settings.seed + seed)


def adapt_settings(
    plan: StudyPlan, arm: ArmPlan, task: str, n: int, seed: int, out: Path, **values: Any
) -> AdaptSettings:
    """Return the settings of one cell's training, but for what `values` set."""
    own = plan.tasks[task]
    epochs, steps = plan.epochs_of(n), plan.steps_of(n)
    settings: dict[str, Any] = {
        **base_values(plan),
        **({} if epochs is None else {"epochs": epochs}),
        **({} if steps is None else {"max_steps": steps}),
        **listed_values({**plan.adapt, **own.adapt, **arm.adapt}),
        "data": own.data,
        "task": own.task,
        "n": n,
        "seed": seed,
        "out": out,
        "quiet": True,
        "measure_start": False,  # nothing that a study shows
        **values,
    }
    return AdaptSettings(**_of_one_length(settings))


def _of_one_length(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the epochs, which defaults give, where a plan has a length in steps or tokens."""
    own = any(values.get(name) is not None for name in ("max_steps", "max_tokens"))
    return {name: value for name, value in values.items() if not (own and name == "epochs")}


def pairs_settings(
    plan: StudyPlan, rows: PhaseSettings, n: int | None, adapter: Path | None, **values: Any
) -> PairsSettings:
    """Return the settings that make preference pairs of the rows of a run."""
    settings: dict[str, Any] = {
        **base_values(plan),
        "data": rows.data,
        "n": n,
        "seed": rows.seed,
        "task": rows.task,
        "adapter": None if adapter is None else str(adapter),
        "out": Path(),
        "quiet": True,
        **values,
        **plan.pairs,
    }
    return PairsSettings(**settings)


def base_values(plan: StudyPlan) -> dict[str, Any]:
    """Return the settings of the base."""
    return {name: getattr(plan, name) for name in BaseSettings.model_fields}


def listed_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which one text stands for a list of one, as in settings files."""
    lists = (
        "data", "validation_data", "targets", "replay", "exclude_targets", "layers", *_PATTERNS,
    )  # fmt: skip
    return {
        name: (value,) if name in lists and isinstance(value, str) else value
        for name, value in values.items()
    }
