"""Which settings of a plan's warm-ups and arms have an effect.

What several share may be of use to some of them alone; what is of use to none is an error.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2lora.settings import AdaptSettings, WarmupSettings
from d2lora.study.plan import FROM_WARM_START, UNTRAINED, ArmPlan, StudyPlan
from d2lora.study.recipes import INHERITED, adapt_values, warm_up_values


def faults_of_own(plan: StudyPlan) -> list[str]:
    """Return what is wrong with settings of one warm-up or arm that it does not heed.

    Args:
        plan: A plan whose arms have names.
    """
    tasks = list(plan.tasks)
    faults: list[str] = []
    for name, settings in _made(plan).items():
        own = plan.warm_ups[name]
        faults += _faults(f"warm_ups.{name}", own, [settings.without_effect(own)])
    for arm in _trained(plan):
        found = _of_arms(plan, [arm], tasks, arm.adapt)
        faults += _faults(f"arms, {arm.name}: adapt", arm.adapt, found)
    return faults


def faults_of_shared(plan: StudyPlan) -> list[str]:
    """Return what is wrong with settings that no warm-up or arm of those that share them heeds.

    Args:
        plan: A plan whose arms have names.
    """
    arms, shared = _trained(plan), plan.warm_up
    faults = _faults("warm_up", shared, [w.without_effect(shared) for w in _made(plan).values()])
    faults += _faults("adapt", plan.adapt, _of_arms(plan, arms, list(plan.tasks), plan.adapt))
    for name, task in plan.tasks.items():
        found = _of_arms(plan, arms, [name], task.adapt)
        faults += _faults(f"tasks.{name}.adapt", task.adapt, found)
    return faults


def _made(plan: StudyPlan) -> dict[str, WarmupSettings]:
    """Return the settings of the warm-ups that a study makes itself."""
    return {
        name: WarmupSettings.unchecked(warm_up_values(plan, name, Path()))
        for name, values in plan.warm_ups.items()
        if "path" not in values
    }


def _trained(plan: StudyPlan) -> list[ArmPlan]:
    return [arm for arm in plan.arms if arm.kind not in UNTRAINED]


def _faults(place: str, names: Mapping[str, Any], idle: Sequence[Mapping[str, str]]) -> list[str]:
    """Return what is to say of names that are without effect in every run that they are of."""
    return [f"{place}: {idle[0][n]}" for n in names if idle and all(n in run for run in idle)]


def _of_arms(
    plan: StudyPlan, arms: Sequence[ArmPlan], tasks: Sequence[str], names: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Return what of some settings each arm does not heed on each task, and why."""
    return [_of_arm(plan, arm, task, names) for arm in arms for task in tasks]


def _of_arm(plan: StudyPlan, arm: ArmPlan, task: str, names: Mapping[str, Any]) -> dict[str, str]:
    held_out = {"validation_fraction": plan.validation_fraction} if plan.tunes else {}
    values = adapt_values(plan, arm, task, min(plan.sizes), Path(), seed=0, **held_out)
    idle = AdaptSettings.unchecked(values).without_effect(names)
    if arm.kind in FROM_WARM_START:
        idle |= {
            name: f"{name} is the warm start's, whatever the arm says: set it in `warm_up`"
            for name in INHERITED.keys() & names.keys()
        }
    if arm.kind == "warm_a" and "init_scale" in names:
        idle["init_scale"] = "init_scale is 0 in an arm of kind warm_a"
    if arm.average_of > 1 and "seed_order" in names:
        idle["seed_order"] = "seed_order is another for each of the runs that are averaged"
    return idle
