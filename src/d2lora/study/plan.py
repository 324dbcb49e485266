"""The plan of a study: tasks, sizes, seeds and arms.

A plan spans cells (arm x task x n x seed).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, PositiveInt, field_validator, model_validator

from d2lora.settings import BaseSettings, Epochs, LearningRate, Settings
from d2lora.settings.core import Effect, check_names

V = TypeVar("V")

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
    "init": "one of PEFT's initializations, or MiLoRA",
}
NEEDS_WARM_UP = frozenset({"warm", "longer", "mixed", "merged", "warm_a", "norms", "warm_only"})
FROM_WARM_START = frozenset({"warm", "warm_a", "norms", "warm_only"})
"""Kinds that are initialized from the warm start, or one made of it."""
UNTRAINED = frozenset({"warm_only", "few_shot"})
WORLD = "world:"
"""Data of the embedded base's small world: `world:problems-train`, as `python -m d2lora.embedded`
writes them."""
SHIPPED = "shipped:"
"""Files that come with d2lora: `shipped:titles/train.jsonl`."""


class TaskPlan(Settings):
    """A scarce task: its rows, and the test rows, which are scored once, at the end."""

    data: tuple[str, ...]
    """Training rows, of which n are used."""
    test: tuple[str, ...]
    """Test rows."""
    title: str = ""
    """Name in tables and charts. Empty: the task's key."""
    task: str = "auto"
    """How rows are read, shown and scored: a task card, or the name of one that ships."""
    n_test: int | None = Field(default=None, ge=1)
    """Score only the first test rows. None: all."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Maximum number of tokens of an answer."""
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
    average_of: int = Field(default=1, ge=1)
    """Runs of every cell, each in an order of its own, that are averaged in A and B; they share
    initialization, rows, learning rate and length. 1: no averaging."""
    interpolate: float = Field(default=1.0, gt=0, le=1)
    """How much of the way from its initialization to what was trained an adapter goes (WiSE-FT);
    the initialization, learning rate and length are those of the whole way. 1: all of it."""
    against: str | None = None
    """Name of the arm that it is compared with. None: the first arm."""

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("warm_up",),
            lambda arm: arm.kind in NEEDS_WARM_UP,
            f"is of arms that have one: {', '.join(sorted(NEEDS_WARM_UP))}",
        ),
        Effect(
            ("adapt",), lambda arm: arm.kind not in UNTRAINED, "is of arms that are trained"
        ),
    )  # fmt: skip


class StudyPlan(BaseSettings):
    """What a study compares."""

    question: str = ""
    """The study's question; the title of its report."""
    warm_up: dict[str, Any] = Field(default_factory=dict)
    """Settings of `warmup` that all warm-ups share."""
    warm_ups: dict[str, dict[str, Any]] = Field(default_factory=lambda: {"general": {}})
    """Name -> settings of `warmup` for this one alone; or `path`, the folder of a warm start made
    before, which is used as it is."""
    warm_up_seeds: int = Field(default=1, ge=1)
    """Warm-ups of each name: seed s of a cell is initialized from the one made with seed s mod
    this, with its own rows, order and random weights."""
    tasks: dict[Annotated[str, Field(pattern=r"^\w[\w .-]*$")], TaskPlan]
    """Name, in letters, digits, spaces and `_.-`, as charts are named after it -> task."""
    sizes: tuple[int, ...] = Field(default=(16, 64, 256), min_length=1)
    """Task sizes n."""
    seeds: int = Field(default=5, ge=1)
    """Seeds of every cell, from 0: each its own n rows, order and random weights."""
    arms: tuple[ArmPlan, ...] = Field(min_length=1)
    """Arms; the first is what the others are compared with."""
    adapt: dict[str, Any] = Field(default_factory=dict)
    """Settings of `adapt` that all arms share."""
    steps: dict[PositiveInt, PositiveInt] = Field(default_factory=dict)
    """n -> the longest training in optimizer steps; a size takes the nearest one's. A cell stops at
    its lowest validation loss; where that is the end, twice the steps are tried. Give these or
    `epochs`."""
    epochs: dict[PositiveInt, Epochs] = Field(default_factory=dict)
    """n -> passes over the task's rows, a fixed length; a size takes the nearest
    one's. Both empty: `adapt`'s length."""
    learning_rates: tuple[LearningRate, ...] = Field(default=(1e-3, 3e-3, 1e-2), min_length=1)
    """Learning rates tried for every cell on rows held out of its n; each seed takes that of the
    lowest validation loss. Where that lies at an edge, ones beyond are tried."""
    validation_fraction: float = Field(default=0.25, gt=0, lt=1)
    """Share of the n held out for tuning; the final training then uses all n."""
    folds: int = Field(default=1, ge=1)
    """k > 1: tune by k-fold cross-validation within the n rows."""
    rates: dict[str, dict[str, dict[PositiveInt, LearningRate]]] = Field(default_factory=dict)
    """Task -> arm -> n -> a learning rate tuned before; no other is then tried."""
    pairs: dict[str, Any] = Field(default_factory=dict)
    """Settings of `pairs`: where an objective learns preferences and the rows hold none, they are
    made of the same rows, the rejected completions sampled from the model before training."""
    shots: int = Field(default=4, ge=1)
    """Rows in the prompt of the arm `few_shot`, at most n."""
    general_text: tuple[str, ...] = ()
    """Held-out general rows; forgetting is the change of loss on them."""
    choices: tuple[str, ...] = ()
    """Multiple-choice rows, and tasks `lm_eval:NAME` of lm-evaluation-harness; forgetting is the
    change of accuracy on them."""
    lm_eval_tasks: Path | None = None
    """Folder of your own tasks (YAML) of lm-evaluation-harness."""
    keep_out_words: int = Field(default=13, ge=0)
    """Consecutive words shared with a test or multiple-choice row that make a training row
    contaminated: it is removed. 0: only the same question does."""

    @property
    def tunes(self) -> bool:
        """Whether learning rates or lengths are chosen on rows held out."""
        return len(self.learning_rates) > 1 or bool(self.steps)

    @property
    def objectives(self) -> set[str]:
        """The objectives of its warm-ups and arms."""
        parts = (self.warm_up, *self.warm_ups.values(), self.adapt)
        own = (*(task.adapt for task in self.tasks.values()), *(arm.adapt for arm in self.arms))
        return {part.get("objective", "sft") for part in (*parts, *own)}

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("warm_up_seeds",),
            lambda plan: any(arm.kind in NEEDS_WARM_UP for arm in plan.arms),
            "is about warm-ups, and no arm has one: leave it out, or add an arm such as `warm`",
        ),
        Effect(
            ("warm_up_seeds",),
            lambda plan: any("path" not in own for own in plan.warm_ups.values()),
            "is about warm-ups that the study makes, and all are made already (`path`)",
        ),
        Effect(
            ("shots",),
            lambda plan: any(arm.kind == "few_shot" for arm in plan.arms),
            "is about the arm `few_shot`, which there is not",
        ),
        Effect(
            ("pairs",),
            lambda plan: plan.objectives - {"sft"},
            "is about preferences, and every objective here is sft",
        ),
        Effect(
            ("folds", "validation_fraction"),
            lambda plan: plan.tunes,
            "is about rows held out to choose by, and nothing is chosen: give several "
            "learning_rates, or steps",
        ),
        Effect(
            ("validation_fraction",),
            lambda plan: plan.folds == 1,
            "is not heeded beside folds, which hold other rows out: give one",
        ),
    )

    @field_validator("arms", mode="before")
    @classmethod
    def _kind_alone(cls, arms: Any) -> Any:
        if not isinstance(arms, Sequence) or isinstance(arms, str):
            return arms
        return [{"kind": arm} if isinstance(arm, str) else arm for arm in arms]

    @field_validator("tasks", "arms", mode="before")
    @classmethod
    def _names_are_texts(cls, parts: Any) -> Any:
        for part in (
            parts.values()
            if isinstance(parts, Mapping)
            else parts
            if isinstance(parts, list | tuple)
            else ()
        ):
            if isinstance(part, Mapping):
                check_names(part)
        return parts

    @field_validator("general_text", "choices", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("sizes", "learning_rates")
    @classmethod
    def _different(cls, values: tuple[V, ...]) -> tuple[V, ...]:
        if len(set(values)) < len(values):
            raise ValueError("each may be given once: a copy would count as a finding of its own")
        return values

    @field_validator("sizes")
    @classmethod
    def _positive(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if min(sizes) < 1:
            raise ValueError("sizes must be at least 1")
        return sizes

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps and self.epochs:
            raise ValueError("steps and epochs both set the length of training: give one")
        return self

    def epochs_of(self, n: int) -> float | None:
        """Return the passes over n rows: those of the nearest size, by ratio."""
        return _of_nearest(self.epochs, n)

    def steps_of(self, n: int) -> int | None:
        """Return the longest training on n rows in steps: that of the nearest size, by ratio."""
        return _of_nearest(self.steps, n)

    def learning_rate_of(self, task: str, arm: str, n: int) -> float | None:
        """Return the learning rate tuned before for the nearest size, by ratio."""
        return _of_nearest(self.rates.get(task, {}).get(arm, {}), n)

    def ready(self, warm_up: str) -> Path | None:
        """Return the folder of a warm start that was made before; None where it is to be made."""
        path = self.warm_ups[warm_up].get("path")
        return None if path is None else Path(path)

    def warm_up_seeds_of(self, warm_up: str) -> int:
        """Return how many warm-ups of a name there are."""
        return 1 if self.ready(warm_up) else min(self.warm_up_seeds, self.seeds)


def _of_nearest(by_size: Mapping[int, V], n: int) -> V | None:
    if not by_size:
        return None
    return by_size[min(by_size, key=lambda size: max(size / max(n, 1), n / size))]
