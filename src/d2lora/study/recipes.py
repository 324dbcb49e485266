"""The settings of every run of a plan."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2lora.adapters.lora import BESIDE, PARTIAL
from d2lora.settings import (
    FRESH,
    AdaptSettings,
    BaseSettings,
    PairsSettings,
    PhaseSettings,
    WarmupSettings,
)
from d2lora.study.plan import FROM_WARM_START, ArmPlan, StudyPlan

_PATTERNS = ("rank_pattern", "alpha_pattern")
_WARM_START = "a warm start"
"""In place of its folder, which is not known before it is made."""
INHERITED = {
    **dict.fromkeys(("rank", "alpha", "targets", *PARTIAL, *BESIDE)),
    "rslora": False,
    "dora": False,
}
"""What an arm takes over from a warm start, whatever the plan says of fresh ones."""


def warm_up_settings(plan: StudyPlan, name: str, out: Path, seed: int = 0) -> WarmupSettings:
    """Return the settings of one warm-up; the plan's seeds are added to its own."""
    settings = WarmupSettings.heeded(warm_up_values(plan, name, out))
    return settings.changed(seed=settings.seed + seed)


def warm_up_values(plan: StudyPlan, name: str, out: Path) -> dict[str, Any]:
    """Return what a plan says of one warm-up, heeded or not."""
    own = listed_values({**plan.warm_up, **plan.warm_ups[name]})
    return _of_one_length({**base_values(plan), **own, "out": out, "quiet": True})


def adapt_settings(
    plan: StudyPlan, arm: ArmPlan, task: str, n: int, seed: int, out: Path, **values: Any
) -> AdaptSettings:
    """Return the settings of one cell's training, but for what `values` set.

    What the plan's arms share and has no effect in this one is left out.
    """
    settings = adapt_values(plan, arm, task, n, out, seed=seed, **values)
    return AdaptSettings.heeded(settings)


def adapt_values(
    plan: StudyPlan, arm: ArmPlan, task: str, n: int, out: Path, **values: Any
) -> dict[str, Any]:
    """Return what a plan says of an arm's training, heeded or not."""
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
        "out": out,
        "quiet": True,
        "init": init_of(arm),
        "measure_start": False,  # nothing that a study shows
        **values,
    }
    return _of_one_length(settings)


def init_of(arm: ArmPlan) -> str:
    """Return what an arm is initialized from; a warm start is not known yet."""
    return _WARM_START if arm.kind in FROM_WARM_START else arm.init or FRESH


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
        *BESIDE,
    )  # fmt: skip
    return {
        name: (value,) if name in lists and isinstance(value, str) else value
        for name, value in values.items()
    }
