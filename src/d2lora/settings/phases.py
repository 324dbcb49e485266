"""`d2lora warmup` and `d2lora adapt`."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from d2lora.errors import did_you_mean
from d2lora.settings.core import Effect
from d2lora.settings.sections import (
    DATA_INITS,
    DEFAULT_RANK,
    FRESH,
    NAMED_INITS,
    BaseSettings,
    FormatSettings,
    KeepOutSettings,
    LoraSettings,
    ObjectiveSettings,
    Reference,
    ReplaySettings,
    SelectMethod,
    Tracker,
    TrainSettings,
    changes_base,
    is_named_init,
)


class PhaseSettings(
    BaseSettings,
    FormatSettings,
    KeepOutSettings,
    LoraSettings,
    ObjectiveSettings,
    ReplaySettings,
    TrainSettings,
):
    """What warm-up and adaptation share."""

    data: tuple[str, ...]
    """Training data: files (JSONL, JSON, CSV, Parquet), folders or hub ids (`NAME:split`)."""
    out: Path
    """Run folder to write."""
    init: str = FRESH
    """Initialization of the adapter: `fresh` (random A, zero B), one of PEFT's (gaussian,
    orthogonal, pissa, pissa_niter_N, olora, eva, corda, loftq, lora_ga, mica) or milora. Those that
    change the base are converted when saved, to an ordinary adapter of twice the rank."""
    init_samples: int = Field(default=64, ge=1)
    """Maximum number of training rows that eva, corda and lora_ga use."""
    validation_data: tuple[str, ...] = ()
    """Held-out rows for validation loss, instead of validation_fraction."""
    measure_start: bool = True
    """Whether to measure the base and the warm start on rows of the task before training."""
    shard_base: bool = False
    """Divide the base's weights among the processes of the run (FSDP2), instead of a copy in each.
    Without the fast paths."""
    resume: bool = False
    """Continue a killed run in `out`."""
    dry_run: bool = False
    """Report rows, steps, tokens, and the memory and time that the run would take; train nothing
    and write nothing."""
    track: tuple[Tracker, ...] = ()
    """Trackers to show the log in, too: tensorboard, mlflow, wandb (offline unless WANDB_MODE says
    otherwise), trackio. Empty: none; `metrics.jsonl` has all in any case."""
    track_project: str = "d2lora"
    """Name of the project or experiment in these trackers."""
    quiet: bool = False
    """No progress bar and no messages."""

    @model_validator(mode="after")
    def _base_is_there(self) -> Self:
        if self.shard_base and self.quantization:
            raise ValueError(
                "--shard-base divides weights of 16 or 32 bits: leave out one of "
                "--shard-base and --quantization"
            )
        if self.shard_base and self.dry_run:
            raise ValueError("--dry-run measures a base that is whole: leave out --shard-base")
        if self.replay and self.replay_loss == "kl" and changes_base(self.init):
            raise ValueError(
                f"--replay-loss kl compares with the base, which --init {self.init} changes: use "
                "--replay-loss sft, or another initialization"
            )
        return self

    @property
    def holds_rows_out(self) -> bool:
        """Whether there is to be a validation loss."""
        return bool(self.validation_data or self.fold or self.validation_fraction)

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("validation_fraction",),
            lambda s: not s.fold and not s.validation_data,
            "is not heeded beside --fold or --validation-data, which hold other rows out: give one",
        ),
        Effect(
            ("fold",),
            lambda s: not s.validation_data,
            "is not heeded beside --validation-data, which are held out instead: give one",
        ),
        Effect(
            ("eval_every", "patience"),
            lambda s: s.holds_rows_out or not (s.eval_every or s.patience),
            "is about the validation loss, and no rows are held out: give --validation-fraction, "
            "--fold or --validation-data, too",
        ),
        Effect(
            ("init_samples",),
            lambda s: s.init in DATA_INITS,
            f"is about initializations that look at rows: --init {' or '.join(DATA_INITS)}",
        ),
        Effect(
            ("seed_dropout",),
            lambda s: not is_named_init(s.init) if s.dropout is None else s.dropout,
            "is about dropout, and there is none: give --dropout, too",
        ),
        Effect(
            ("seed_init",),
            lambda s: is_named_init(s.init),
            "is about random weights, and the run is initialized from an adapter's: leave it out",
        ),
        Effect(
            ("track_project",), lambda s: s.track, "is about trackers: give --track, too"
        ),
    )  # fmt: skip


class WarmupSettings(PhaseSettings):
    """`d2lora warmup`: base + general data -> warm start."""

    aliases: ClassVar[dict[str, str]] = {"--for": "--for-task", "-m": "--m"}

    m: int | None = Field(default=None, ge=1)
    """Rows to use: a seeded random subset unless `select` is set. None: all."""
    select: SelectMethod | None = None
    """Selection method: clean the data and select m rows as `d2lora select` does, with its
    defaults; they are written to `selection` in the run folder. None: use the data as they are."""
    for_task: tuple[str, ...] = ()
    """Examples of the tasks to select rows for (short: --for)."""
    for_card: str = "auto"
    """How these are read: a task card or the name of one that ships. auto: detected from the fields
    of each file's first row."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Train on so many tokens, instead of epochs: warm-ups on other rows then cost the same."""
    meta_steps: int | None = Field(default=None, ge=1)
    """Meta warm-up (Reptile): the warm-up is cut into small tasks of so many optimizer steps, each
    on a few rows of one source (field `source`, else the file), and the weights move towards where
    each ends; the length is rounded up to whole ones. None: plain warm-up."""
    meta_rows: int = Field(default=16, ge=2)
    """Rows of such a task."""
    meta_rate: float = Field(default=1.0, gt=0, le=1)
    """Share of the way that the weights move after the first of them; it falls to zero."""
    shots: int = Field(default=0, ge=0)
    """Task-shaped warm-up (as MetaICL): up to so many other training rows of the same source (field
    `source`, else the file) stand as worked examples before a row's prompt, the number drawn for
    each row. 0: none."""
    train_rank: int | None = Field(default=None, ge=2)
    """Train at this rank, higher than --rank, and keep the best approximation of --rank of what was
    learnt (after High-Rank Preheating). None: train at --rank."""
    validation_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the rows held out: the manifest reports the loss on them before and after."""

    @field_validator("init")
    @classmethod
    def _new(cls, init: str) -> str:
        if not is_named_init(init):
            hint = did_you_mean(init, (FRESH, *NAMED_INITS))
            raise ValueError(
                f"a warm-up starts from a new adapter: expected fresh, {', '.join(NAMED_INITS)} or "
                f"pissa_niter_N.{hint}"
            )
        return init

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        for name in ("epochs", "max_steps"):
            if self.max_tokens is not None and getattr(self, name) is not None:
                raise ValueError(f"{name} and max_tokens both set the length of training: give one")
        return self

    @model_validator(mode="after")
    def _plain_when_cut(self) -> Self:
        if self.train_rank is None:
            return self
        rank = self.rank or DEFAULT_RANK
        if self.train_rank <= rank:
            raise ValueError(f"train_rank {self.train_rank} is not higher than the rank, {rank}")
        odd = {
            "dora": self.dora,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            f"init {self.init}, which changes the base": changes_base(self.init),
        }
        if given := [name for name, value in odd.items() if value]:
            raise ValueError(
                f"train_rank cuts plain LoRA of one rank, which {' and '.join(given)} "
                f"{'is' if len(given) == 1 else 'are'} not: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _whole_tasks(self) -> Self:
        if self.meta_steps is not None and self.stop_step is not None:
            raise ValueError("stop_step would end a meta warm-up within a task: give max_steps")
        return self

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("meta_rows", "meta_rate"),
            lambda s: s.meta_steps is not None,
            "is a setting of a meta warm-up: give meta_steps, too",
        ),
        Effect(
            ("shots",),
            lambda s: s.objective == "sft",
            "shows rows of --objective sft, not of preferences",
        ),
        Effect(
            ("for_task",),
            lambda s: s.select is not None,
            "(--for) needs a selection method; add one, as in --select similar",
        ),
        Effect(
            ("for_card",),
            lambda s: s.for_task,
            "says how rows of --for are read: give these, too",
        ),
    )

    @field_validator("reference")
    @classmethod
    def _no_warm_start_yet(cls, reference: Reference | None) -> Reference | None:
        if reference == "warm_start":
            raise ValueError("a warm-up has no warm start as reference; use base")
        return reference


class AdaptSettings(PhaseSettings):
    """`d2lora adapt`: base + scarce task data + initialization -> adapter."""

    init: str = FRESH
    """Initialization of the adapter: the folder of a warm start or of any LoRA adapter in PEFT's
    format, `fresh` (random A, zero B), one of PEFT's (gaussian, orthogonal, pissa, pissa_niter_N,
    olora, eva, corda, loftq, lora_ga, mica) or milora. Those that change the base are converted
    when saved, to an ordinary adapter of twice the rank."""
    init_scale: float = Field(default=1.0, ge=0, le=1)
    """Strength of the warm start: its B is multiplied by this. 0: its A with zero B."""
    n: int | None = Field(default=None, ge=1)
    """Rows to use, validation rows included; subsets nest. None: all."""

    @model_validator(mode="after")
    def _reference_is_there(self) -> Self:
        if self.reference == "warm_start" and is_named_init(self.init):
            raise ValueError(
                "--reference warm_start, but the run is not initialized from a warm start; give "
                "its folder as --init, or use --reference base"
            )
        return self

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("init_scale",),
            lambda s: not is_named_init(s.init),
            "scales a warm start, and the run is not initialized from one: give it as --init",
        ),
    )
