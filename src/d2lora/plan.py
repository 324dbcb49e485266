"""The plan of a study: a YAML file that holds only what differs from the defaults.

A plan spans cells (arm x task x n x seed). It is checked whole before anything runs, down to the
settings of every warm-up and every arm.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, field_validator

from d2lora.errors import SettingsError, did_you_mean, listed
from d2lora.settings import (
    AdaptSettings,
    BaseSettings,
    PairsSettings,
    PhaseSettings,
    Settings,
    TaskName,
    WarmupSettings,
)

Kind = Literal[
    "fresh", "warm", "longer", "mixed", "merged", "warm_a", "norms", "warm_only", "few_shot", "init"
]
KINDS: dict[str, str] = {
    "fresh": "fresh LoRA on the task alone",
    "warm": "the warm start, then the task",
    "longer": "fresh LoRA on the task, with the warm-up's optimizer steps on top",
    "mixed": "fresh LoRA on general and task rows mixed in one run, each as often as in two phases",
    "merged": "the warm-up merged into the base, then fresh LoRA",
    "warm_a": "the warm start's A with zero B",
    "norms": "random A and B with the warm start's norms, layer by layer",
    "warm_only": "the warm start as it is, no task rows",
    "few_shot": "the base, prompted with some of the n rows",
    "init": "one of PEFT's initializations",
}
NEEDS_WARM_UP = frozenset({"warm", "longer", "mixed", "merged", "warm_a", "norms", "warm_only"})
UNTRAINED = frozenset({"warm_only", "few_shot"})
WORLD = "world:"
"""Data of the embedded base's small world: `world:problems-train`, as `python -m d2lora.embedded`
writes them."""

_FIXED = {"base", "revision", "dtype", "device", "threads", "out", "resume", "quiet"}
_FIXED_PAIRS = _FIXED | {"data", "adapter", "n", "seed", "task"}
_FIXED_ADAPT = _FIXED | {
    "data", "init", "n", "seed", "validation_data", "validation_fraction", "task",
}  # fmt: skip


class TaskPlan(Settings):
    """A scarce task: its rows, and the test rows that are opened once, at the end."""

    data: tuple[str, ...]
    """Training rows, of which n are used."""
    test: tuple[str, ...]
    """Test rows."""
    title: str = ""
    """Name in tables and pictures. Empty: the task's key."""
    task: TaskName = "auto"
    """How rows are read and scored."""
    n_test: int | None = Field(default=None, ge=1)
    """Score only the first test rows. None: all."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Most tokens of an answer."""
    adapt: dict[str, Any] = Field(default_factory=dict)
    """Settings of `adapt` for this task alone."""


class ArmPlan(Settings):
    """One way to get an adapter. In YAML a kind's name alone stands for its defaults."""

    kind: Kind
    """What the arm is."""
    name: str = ""
    """Name in tables. Empty: the kind, and the warm-up where there are several."""
    warm_up: str | None = None
    """Which warm-up. None: every one, an arm each."""
    init: str = ""
    """Kind `init`: the initialization, as `d2lora adapt --init` takes it."""
    adapt: dict[str, Any] = Field(default_factory=dict)
    """Settings of `adapt` for this arm alone."""
    against: str | None = None
    """Name of the arm that it is compared with. None: the first arm."""


class StudyPlan(BaseSettings):
    """What a study compares."""

    question: str = ""
    """What the study asks, in words; the head of its report."""
    warm_up: dict[str, Any] = Field(default_factory=dict)
    """Settings of `warmup` that all warm-ups share."""
    warm_ups: dict[str, dict[str, Any]] = Field(default_factory=lambda: {"general": {}})
    """Name -> settings of `warmup` for this one alone."""
    tasks: dict[str, TaskPlan]
    """Name -> task."""
    sizes: tuple[int, ...] = Field(default=(16, 64, 256), min_length=1)
    """Task sizes n."""
    seeds: int = Field(default=5, ge=1)
    """Seeds of every cell, from 0: each its own n rows, order and random weights."""
    arms: tuple[ArmPlan, ...] = Field(min_length=1)
    """Arms; the first is what the others are compared with."""
    adapt: dict[str, Any] = Field(default_factory=dict)
    """Settings of `adapt` that all arms share."""
    epochs: dict[int, float] = Field(default_factory=dict)
    """n -> passes over the task's rows; a size takes the nearest one's. Empty: `adapt`'s."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Rates tried for every arm, task and n; the one with the lowest validation loss is used."""
    tuning_seeds: int = Field(default=2, ge=1)
    """Seeds that every rate is tried with: the first of the study's own."""
    validation_fraction: float = Field(default=0.25, gt=0, lt=1)
    """Share of the n held out while rates are tried; the chosen rate then trains on all n."""
    rates: dict[str, dict[str, dict[int, float]]] = Field(default_factory=dict)
    """Task -> arm -> n -> a rate chosen before, which is then not tried again."""
    pairs: dict[str, Any] = Field(default_factory=dict)
    """Settings of `pairs`: where an objective learns preferences and the rows hold none, they are
    made of the same rows, the worse completions sampled from what the training begins from."""
    shots: int = Field(default=4, ge=1)
    """Rows shown to the base in the arm `few_shot`, at most n."""
    general_text: tuple[str, ...] = ()
    """Held-out general rows: the change of loss on them is forgetting."""
    choices: tuple[str, ...] = ()
    """Multiple-choice rows: the change of accuracy on them is forgetting."""
    keep_out_words: int = Field(default=13, ge=0)
    """Words in a row by which a training row gives a test or multiple-choice row away and is taken
    out. 0: only the same question does."""

    @field_validator("arms", mode="before")
    @classmethod
    def _kind_alone(cls, arms: Any) -> Any:
        if not isinstance(arms, Sequence) or isinstance(arms, str):
            return arms
        return [{"kind": arm} if isinstance(arm, str) else arm for arm in arms]

    @field_validator("general_text", "choices", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def epochs_of(self, n: int) -> float | None:
        """Return the passes over n rows: those of the nearest size, by ratio."""
        if not self.epochs:
            return None
        return self.epochs[min(self.epochs, key=lambda size: max(size / n, n / size))]


def shipped() -> list[str]:
    """Return the names of the plans that come with d2lora."""
    folder = resources.files("d2lora") / "plans"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_plan(source: str, changes: Sequence[str] = ()) -> StudyPlan:
    """Read a plan and check it whole.

    Args:
        source: A YAML file, or the name of a shipped plan.
        changes: `name=value` texts that replace values of the file; values are YAML, and a dot
            leads into a mapping (`tasks.titles.n_test=50`).

    Raises:
        SettingsError: With every fault at once.
    """
    values = _filled(_read(source))
    for change in changes:
        _change(values, change)
    plan = StudyPlan(**values)
    faults = [*_faults_of_settings(plan), *_faults_of_names(plan)]
    if faults:
        raise SettingsError(f"{source}:\n{listed(faults)}")
    return plan.changed(arms=_named(plan))


def warm_up_settings(plan: StudyPlan, name: str, out: Path) -> WarmupSettings:
    """Return the settings of one warm-up."""
    own = _tuples({**plan.warm_up, **plan.warm_ups[name]})
    values: dict[str, Any] = {**_of_base(plan), **own, "out": out, "quiet": True}
    return WarmupSettings(**values)


def adapt_settings(
    plan: StudyPlan, arm: ArmPlan, task: str, n: int, seed: int, out: Path, **values: Any
) -> AdaptSettings:
    """Return the settings of one cell's training, but for what `values` set."""
    own = plan.tasks[task]
    epochs = plan.epochs_of(n)
    settings: dict[str, Any] = {
        **_of_base(plan),
        **({} if epochs is None else {"epochs": epochs}),
        **_tuples({**plan.adapt, **own.adapt, **arm.adapt}),
        "data": own.data,
        "task": own.task,
        "n": n,
        "seed": seed,
        "out": out,
        "quiet": True,
        **values,
    }
    return AdaptSettings(**settings)


def pairs_settings(
    plan: StudyPlan, rows: PhaseSettings, n: int | None, adapter: Path | None, **values: Any
) -> PairsSettings:
    """Return the settings that make preference pairs of the rows of a run."""
    settings: dict[str, Any] = {
        **_of_base(plan),
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


def _of_base(plan: StudyPlan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in BaseSettings.model_fields}


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """One text stands for a list of one, as in settings files."""
    lists = ("data", "validation_data", "targets")
    return {
        name: (value,) if name in lists and isinstance(value, str) else value
        for name, value in values.items()
    }


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults with a plan's values in their place; `warm_up` and `adapt` join."""
    text = (resources.files("d2lora") / "plans" / "defaults.yml").read_text("utf-8")
    filled: dict[str, Any] = {**yaml.safe_load(text), **values}
    for name in ("warm_up", "adapt"):
        own = values.get(name, {})
        if isinstance(own, dict):
            filled[name] = {**yaml.safe_load(text)[name], **own}
    return filled


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
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{source}: not a YAML file: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{source}: expected `name: value` lines")
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
        inner[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {change}: not a YAML value: {error}") from None


def _faults_of_settings(plan: StudyPlan) -> list[str]:
    """Try the settings of every warm-up and arm, so that none fails hours later."""
    faults: list[str] = []
    nowhere = Path("unused")
    faults += _forbidden("warm_up", plan.warm_up, _FIXED)
    for name, values in plan.warm_ups.items():
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
        whole: dict[str, Any] = {"data": ("unused",), "out": nowhere, **_tuples(values)}
        try:
            AdaptSettings(**whole)
        except SettingsError as error:
            faults.append(f"{place}: {error}")
    return faults


def _forbidden(place: str, values: Mapping[str, Any], fixed: set[str]) -> list[str]:
    return [f"{place}: `{name}` is the study's own business" for name in values if name in fixed]


def _faults_of_names(plan: StudyPlan) -> list[str]:
    faults: list[str] = []
    arms = _named(plan)
    names = [arm.name for arm in arms]
    for arm in plan.arms:
        if arm.warm_up is not None and arm.warm_up not in plan.warm_ups:
            faults.append(
                f"arm {arm.name or arm.kind}: no warm-up `{arm.warm_up}`."
                f"{did_you_mean(arm.warm_up, plan.warm_ups)}"
            )
        if (arm.kind == "init") != bool(arm.init):
            faults.append(f"arm {arm.name or arm.kind}: kind `init`, and it alone, needs `init`")
        if arm.against is not None and arm.against not in names:
            faults.append(
                f"arm {arm.name or arm.kind}: no arm `{arm.against}`."
                f"{did_you_mean(arm.against, names)}"
            )
    faults += [
        f"two arms are called `{name}`; give each a `name`"
        for name in sorted({name for name in [*names, "base"] if [*names, "base"].count(name) > 1})
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
            arms.append(arm.changed(name=arm.name or arm.init or arm.kind))
            continue
        for warm_up in [arm.warm_up] if arm.warm_up else list(plan.warm_ups):
            stem = arm.name or arm.kind
            alone = len(plan.warm_ups) == 1 or (arm.name and arm.warm_up)
            name = stem if alone else f"{stem} ({warm_up})"
            arms.append(arm.changed(name=name, warm_up=warm_up))
    return tuple(arms)
