"""`d2lora fit`: the best adapter for one task."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from d2lora.errors import did_you_mean
from d2lora.settings.core import Effect
from d2lora.settings.sections import (
    FRESH,
    NAMED_INITS,
    BaseSettings,
    FormatSettings,
    LearningRate,
    ReplaySettings,
    Seed,
    is_named_init,
)
from d2lora.settings.studies import OF_EXECUTORS

Share = Annotated[float, Field(gt=0, le=1)]
_UNITS = {"s": 1, "m": 60, "h": 3600}


class FitSettings(BaseSettings, FormatSettings, ReplaySettings):
    """`d2lora fit`: task rows + initializations -> the best adapter, and how sure that is."""

    data: tuple[str, ...]
    """The task's rows: files (JSONL, JSON, CSV, Parquet), folders or hub ids (`NAME:split`)."""
    out: Path
    """Folder to write: `adapter`, `index.html` with what was found, and the store of runs. The same
    command continues a killed run."""
    n: int | None = Field(default=None, ge=2)
    """Rows to use, a seeded subset. None: all."""
    warm_starts: tuple[str, ...] | None = None
    """Warm starts, or other LoRA adapters in PEFT's format, to try. None: those beside the base,
    and the one that comes with d2lora where the base is smollm2. Give `none` for none."""
    inits: tuple[str, ...] = (FRESH,)
    """Initializations to try beside them: `fresh` or PEFT's, as `d2lora adapt --init` takes
    them."""
    budget: str | None = None
    """Time to spend, as in `30m`, `2h` or `90s`; what does not fit is left out and named. None: no
    limit."""
    test: tuple[str, ...] = ()
    """Test rows. They decide nothing, and are scored once, when all is chosen."""
    n_test: int | None = Field(default=None, ge=1)
    """Score only the first test rows. None: all."""
    general_text: tuple[str, ...] = ()
    """Held-out general rows; forgetting is the change of loss on them."""
    choices: tuple[str, ...] = ()
    """Multiple-choice rows, and tasks `lm_eval:NAME` of lm-evaluation-harness; forgetting is the
    change of accuracy on them."""
    lm_eval_tasks: Path | None = None
    """Folder of your own tasks (YAML) of lm-evaluation-harness."""
    folds: int = Field(default=4, ge=2)
    """Folds of the cross-validation within the n rows."""
    learning_rates: tuple[LearningRate, ...] = Field(default=(3e-4, 1e-3, 3e-3), min_length=1)
    """Learning rates to try. Where the best lies at an edge, ones beyond are tried."""
    steps: int | None = Field(default=None, ge=1)
    """The longest training in optimizer steps; where the lowest validation loss is the last, twice
    the steps are tried. None: by n, from 48 at 16 rows to 512 at 1,024."""
    runs: int = Field(default=4, ge=1)
    """Runs of the winner, each in an order of its own, to average the weights of. 1: no
    averaging."""
    interpolate: tuple[Share, ...] = (0.5, 0.75)
    """Points to try on the way from the winner's initialization (0) to what was trained (1), as
    WiSE-FT does. 1: the end alone, so none."""
    shots: int = Field(default=8, ge=0)
    """Rows to show in the prompt of the base alone, as many as it has room for. 0: no few-shot
    prompt is tried."""
    batch_size: int | None = Field(default=None, ge=1)
    """Examples per optimizer step. None: 4, from 64 training rows on 8, from 256 on 16."""
    rank: int | None = Field(default=None, ge=1)
    """Rank of the adapter; warm starts of another are brought to it. None: that of the first warm
    start, else 16."""
    alpha: float | None = Field(default=None, gt=0)
    """Of adapters without a warm start: the update is scaled by alpha / rank. None: 2 x rank."""
    targets: tuple[str, ...] | None = None
    """Of adapters without a warm start: names of modules that get one, or `all-linear`
    (default)."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Maximum number of tokens of an answer."""
    keep_out_words: int = Field(default=13, ge=0)
    """Consecutive words shared with a test or multiple-choice row that make a training row
    contaminated: it is removed. 0: only the same question does."""
    seed: Seed = 0
    """Seed of the subset, the folds, the orders and the random weights."""
    executor: Literal["processes", "inline", "ray"] = "processes"
    """Where jobs run: a pool of processes, this process, or a Ray cluster."""
    workers: int = Field(default=0, ge=0)
    """Parallel jobs. 0: one per GPU, or per core without GPUs."""
    address: str | None = None
    """Ray cluster to join, as in `ray://host:10001` or `auto`. None: start one on this machine."""
    quiet: bool = False
    """No progress bar and no messages."""

    aliases: ClassVar[dict[str, str]] = {"-n": "--n"}

    @field_validator("inits")
    @classmethod
    def _named(cls, inits: tuple[str, ...]) -> tuple[str, ...]:
        for init in inits:
            if not is_named_init(init):
                raise ValueError(
                    f"expected fresh, {', '.join(NAMED_INITS)} or pissa_niter_N; a warm start is "
                    f"given as --warm-starts.{did_you_mean(init, (FRESH, *NAMED_INITS))}"
                )
        return inits

    @field_validator("budget")
    @classmethod
    def _time(cls, budget: str | None) -> str | None:
        if budget is not None and not re.fullmatch(r"\d{1,6}(\.\d{1,3})?[smh]", budget, re.ASCII):
            raise ValueError("expected a number and a unit, as in 90s, 30m or 2h")
        return budget

    @field_validator("learning_rates", "warm_starts", "inits", "interpolate")
    @classmethod
    def _different(cls, values: tuple[object, ...] | None) -> tuple[object, ...] | None:
        if values is not None and len(set(values)) < len(values):
            raise ValueError("each may be given once")
        return values

    effects: ClassVar[tuple[Effect, ...]] = (
        *OF_EXECUTORS,
        Effect(
            ("n_test",), lambda s: s.test, "is about test rows: give --test, or leave it out"
        ),
        Effect(
            ("alpha", "targets"),
            lambda s: s.inits,
            "is about adapters without a warm start, and --inits names none",
        ),
        Effect(
            ("keep_out_words",),
            lambda s: s.test or s.choices or s.general_text,
            "is about rows that overlap with test rows: give --test, --choices or --general-text",
        ),
    )  # fmt: skip

    @property
    def budget_s(self) -> float | None:
        """The time to spend."""
        return None if self.budget is None else float(self.budget[:-1]) * _UNITS[self.budget[-1]]
