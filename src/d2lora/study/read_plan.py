"""Reading a plan: a YAML file that holds only what differs from the defaults.

It is checked whole before anything runs, down to the settings of every warm-up and every arm.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import yaml

from d2lora.adapters.files import ADAPTER_CONFIG
from d2lora.adapters.manifest import has_manifest
from d2lora.errors import SettingsError, did_you_mean, listed
from d2lora.settings import AdaptSettings, PairsSettings
from d2lora.settings.core import check_names
from d2lora.settings.yaml_text import parse_yaml
from d2lora.study.heeded import faults_of_own, faults_of_shared
from d2lora.study.plan import KINDS, NEEDS_WARM_UP, UNTRAINED, ArmPlan, Kind, StudyPlan
from d2lora.study.recipes import listed_values, warm_up_settings

_FIXED = {
    "base", "revision", "gguf_file", "dtype", "quantization", "device", "threads", "out", "resume",
    "dry_run", "quiet",
}  # fmt: skip
_FIXED_PAIRS = _FIXED | {"data", "adapter", "n", "seed", "task"}
_FIXED_ADAPT = _FIXED | {
    "data", "init", "n", "seed", "validation_data", "validation_fraction", "fold", "task",
    "stop_step", "eval_every", "measure_start", "learning_rate", "keep_best",
}  # fmt: skip
_LENGTHS = {"steps", "epochs"}
_NOT_MIXED = {
    "max_tokens": "ends by max_tokens",
    "meta_steps": "learns small tasks (meta_steps)",
    "shots": "shows rows before others (shots)",
    "train_rank": "trains at a higher rank (train_rank)",
}
"""Settings of a warm-up whose rows, mixed with a task's, would not be learnt as in the warm-up."""


def shipped() -> list[str]:
    """Return the names of the plans that come with d2lora."""
    folder = resources.files("d2lora") / "plans"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_plan(*sources: str, changes: Sequence[str] = ()) -> StudyPlan:
    """Read a plan and check it whole.

    Args:
        sources: YAML files or names of shipped plans; each is laid over those before it, so that
            `rank real` asks the question of one on the tasks of the other.
        changes: `name=value` texts that replace values of the file; values are YAML, and a dot
            leads into a mapping (`tasks.titles.n_test=50`).

    Raises:
        SettingsError: With every fault at once.
    """
    read = [_read(source) for source in sources]
    values = _filled(read)
    changed = {change.partition("=")[0].partition(".")[0]: None for change in changes}
    values = _without_other_length(values, changed)
    for change in changes:
        _change(values, change)
    plan = StudyPlan.unchecked(values)
    # A plan may say what the arms of another, or those of --set, have no use for.
    whole = len(read) == 1 and "arms" not in changed
    idle = plan.without_effect({*changed, *(_unusual(plan, read[0]) if whole else ())}).values()
    faults = [*idle, *_faults_of_settings(plan), *_faults_of_names(plan)]
    named = plan.changed(arms=_named(plan))
    if not faults:
        faults = [*faults_of_own(named), *(faults_of_shared(named) if whole else ())]
    if faults:
        raise SettingsError(f"{' + '.join(sources)}:\n{listed(faults)}")
    return named


def _unusual(plan: StudyPlan, names: Iterable[str]) -> list[str]:
    """Return those names whose values are not the defaults, which a resolved plan gives, too."""
    fields = StudyPlan.model_fields
    needed = {name: getattr(plan, name) for name in fields if fields[name].is_required()}
    usual = StudyPlan.unchecked({**_filled([]), **needed})
    return [name for name in names if getattr(plan, name) != getattr(usual, name)]


def _filled(plans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the defaults with the plans' values in their place; `warm_up` and `adapt` join."""
    text = (resources.files("d2lora") / "plans" / "defaults.yml").read_text("utf-8")
    filled: dict[str, Any] = yaml.safe_load(text)
    for values in plans:
        joined = {
            name: {**filled[name], **values[name]}
            for name in ("warm_up", "adapt")
            if isinstance(filled[name], dict) and isinstance(values.get(name), dict)
        }
        filled = {**_without_other_length(filled, values), **values, **joined}
    return filled


def _without_other_length(values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Drop a length that the given values state in another way."""
    if not _LENGTHS & given.keys():
        return values
    return {name: value for name, value in values.items() if name not in _LENGTHS - given.keys()}


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    if source in shipped():
        text = (resources.files("d2lora") / "plans" / f"{source}.yaml").read_text("utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise SettingsError(
                f"{source}: cannot read the plan: {error.strerror}."
                f"{did_you_mean(source, shipped())} Shipped plans: {', '.join(shipped())}"
            ) from None
        except UnicodeDecodeError as error:
            raise SettingsError(f"{source}: not UTF-8 text: {error}") from None
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{source}: not a YAML file: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{source}: expected `name: value` lines")
    try:
        check_names(values)
    except ValueError as error:
        raise SettingsError(f"{source}: {error}") from None
    return values


def _change(values: dict[str, Any], change: str) -> None:
    name, sign, text = change.partition("=")
    if not sign:
        raise SettingsError(f"--set {change}: expected name=value, as in seeds=3")
    *path, last = name.split(".")
    inner = values
    for part in path:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"--set {change}: `{part}` is not a mapping")
    try:
        inner[last] = parse_yaml(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {change}: not a YAML value: {error}") from None


def _faults_of_settings(plan: StudyPlan) -> list[str]:
    """Try the settings of every warm-up and arm, so that none fails hours later."""
    faults: list[str] = []
    nowhere = Path("unused")
    faults += _forbidden("warm_up", plan.warm_up, _FIXED)
    for name, values in plan.warm_ups.items():
        if "path" in values:
            faults += _faults_of_path(name, values)
            continue
        faults += _forbidden(f"warm_ups.{name}", values, _FIXED)
        try:
            warm_up_settings(plan, name, nowhere)
        except SettingsError as error:
            faults.append(f"warm_ups.{name}: {error}")
    faults += _forbidden("pairs", plan.pairs, _FIXED_PAIRS)
    try:
        pairs: dict[str, Any] = {"data": ("unused",), "out": nowhere, **plan.pairs}
        PairsSettings(**pairs)
    except SettingsError as error:
        faults.append(f"pairs: {error}")
    places = {
        "adapt": plan.adapt,
        **{f"tasks.{name}.adapt": task.adapt for name, task in plan.tasks.items()},
        **{f"arms, {arm.name or arm.kind}: adapt": arm.adapt for arm in plan.arms},
    }
    for place, values in places.items():
        faults += _forbidden(place, values, _FIXED_ADAPT)
        faults += [
            f"{place}: `{name}` and the plan's `{length}` both set the length of training; give "
            f"one (`{length}: {{}}` for none)"
            for name in ("epochs", "max_steps")
            for length in sorted(_LENGTHS)
            if getattr(plan, length) and name in values
        ]
        whole: dict[str, Any] = {"data": ("unused",), "out": nowhere, **listed_values(values)}
        try:
            AdaptSettings.unchecked(whole)
        except SettingsError as error:
            faults.append(f"{place}: {error}")
    return faults


def _sets(plan: StudyPlan, arm: ArmPlan, setting: str) -> bool:
    """Say whether a warm-up of an arm has a setting."""
    warm_ups = [plan.warm_ups.get(name, {}) for name in _warm_ups(plan, arm)]
    return any({**plan.warm_up, **own}.get(setting) for own in warm_ups)


def _faults_of_path(name: str, values: Mapping[str, Any]) -> list[str]:
    faults = [
        f"warm_ups.{name}: leave out `{other}`, as `path` names a finished warm start"
        for other in values
        if other != "path"
    ]
    path = values["path"]
    if not isinstance(path, str):
        faults.append(f"warm_ups.{name}.path: expected a folder, got {path!r}")
    elif (Path(path) / ADAPTER_CONFIG).is_file() and not has_manifest(Path(path)):
        faults.append(
            f"warm_ups.{name}.path: {path} was not made by d2lora, and what it cost, which a study "
            "reports, is not known; d2lora adapt and fit take it"
        )
    return faults


def _forbidden(place: str, values: Mapping[str, Any], fixed: set[str]) -> list[str]:
    return [
        f"{place}: `{name}` is set by the study itself; leave it out"
        for name in values
        if name in fixed
    ]


def _faults_of_names(plan: StudyPlan) -> list[str]:
    faults = [
        f"tasks.{name}: give test rows as `test`" for name, t in plan.tasks.items() if not t.test
    ]
    arms = _named(plan)
    names = [arm.name for arm in arms]
    for arm in plan.arms:
        if arm.warm_up is not None and arm.warm_up not in plan.warm_ups:
            faults.append(
                f"arm {arm.name or arm.kind}: no warm-up `{arm.warm_up}`."
                f"{did_you_mean(arm.warm_up, plan.warm_ups)}"
            )
        if arm.kind == "mixed" and any(
            "path" in plan.warm_ups.get(w, {}) for w in _warm_ups(plan, arm)
        ):
            faults.append(
                f"arm {arm.name or arm.kind}: rows cannot be mixed with those of a warm start that "
                "was made before; name a warm-up with its data"
            )
        faults += [
            f"arm {arm.name or arm.kind}: a warm-up that {what} cannot be mixed with a task's "
            "rows; give it epochs or max_steps"
            for name, what in _NOT_MIXED.items()
            if arm.kind == "mixed" and _sets(plan, arm, name)
        ]
        if (arm.kind == "init") != bool(arm.init):
            faults.append(f"arm {arm.name or arm.kind}: kind `init`, and it alone, needs `init`")
        if arm.average_of > 1 and arm.kind in UNTRAINED:
            faults.append(f"arm {arm.name or arm.kind}: `average_of` is of arms that are trained")
        given = (arm.adapt, plan.adapt, *(task.adapt for task in plan.tasks.values()))
        weakened = arm.kind == "warm_a" or any("init_scale" in values for values in given)
        if arm.interpolate < 1 and (arm.kind in UNTRAINED or weakened):
            faults.append(
                f"arm {arm.name or arm.kind}: `interpolate` is of arms that are trained, from a "
                "warm start of full strength (no init_scale)"
            )
        if arm.against is not None and arm.against not in names:
            faults.append(
                f"arm {arm.name or arm.kind}: no arm `{arm.against}`."
                f"{did_you_mean(arm.against, names)}"
            )
    faults += [
        f"two arms are called `{name}`; give each a `name`"
        for name in sorted({name for name in [*names, "base"] if [*names, "base"].count(name) > 1})
    ]
    faults += [
        f"tasks {first} and {second} are the same, so one would count twice; remove one"
        for (first, one), (second, other) in combinations(plan.tasks.items(), 2)
        if one.changed(title="") == other.changed(title="")
    ]
    for task, by_arm in plan.rates.items():
        if task not in plan.tasks:
            faults.append(f"rates: no task `{task}`.{did_you_mean(task, plan.tasks)}")
        faults += [
            f"rates.{task}: no arm `{arm}`.{did_you_mean(arm, names)}"
            for arm in by_arm
            if arm not in names
        ]
    return faults


def _named(plan: StudyPlan) -> tuple[ArmPlan, ...]:
    """Return the arms with names, those of a warm-up once for each."""
    assert set(get_args(Kind)) == KINDS.keys()
    arms: list[ArmPlan] = []
    for arm in plan.arms:
        if arm.kind not in NEEDS_WARM_UP:
            arms.append(arm.changed(name=arm.name or _default_name(arm)))
            continue
        for warm_up in _warm_ups(plan, arm):
            stem = arm.name or _default_name(arm)
            alone = len(plan.warm_ups) == 1 or (arm.name and arm.warm_up)
            name = stem if alone else f"{stem} ({warm_up})"
            arms.append(arm.changed(name=name, warm_up=warm_up))
    return tuple(arms)


def _default_name(arm: ArmPlan) -> str:
    averaged = f" (average of {arm.average_of})" if arm.average_of > 1 else ""
    between = f" ({arm.interpolate:g} of the way)" if arm.interpolate < 1 else ""
    return f"{arm.init or arm.kind}{averaged}{between}"


def _warm_ups(plan: StudyPlan, arm: ArmPlan) -> list[str]:
    """Return the names of an arm's warm-ups: its own, else every one."""
    return list(plan.warm_ups) if arm.warm_up is None else [arm.warm_up]
