"""`d2lora warmup` and `d2lora adapt`."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from d2lora.errors import did_you_mean
from d2lora.settings.sections import (
    FRESH,
    PEFT_INITS,
    BaseSettings,
    FormatSettings,
    KeepOutSettings,
    LoraSettings,
    ObjectiveSettings,
    Reference,
    SelectMethod,
    TrainSettings,
    is_named_init,
)


class PhaseSettings(
    BaseSettings, FormatSettings, KeepOutSettings, LoraSettings, ObjectiveSettings, TrainSettings
):
    """What warm-up and adaptation share."""

    data: tuple[str, ...]
    """Training data: files (JSONL, JSON, CSV, Parquet) or hub ids (`owner/name:split`)."""
    out: Path
    """Run folder to write."""
    init: str = FRESH
    """How the adapter begins: `fresh` (random A, zero B) or one of PEFT's initializations:
    gaussian, orthogonal, pissa, pissa_niter_N, olora, eva, corda, loftq, lora_ga. Those that
    change the base are converted when saved, to an ordinary adapter of twice the rank."""
    init_samples: int = Field(default=64, ge=1)
    """Training rows that eva, corda and lora_ga look at, at most."""
    validation_data: tuple[str, ...] = ()
    """Held-out rows for validation loss, instead of validation_fraction."""
    resume: bool = False
    """Continue a killed run in `out`."""
    quiet: bool = False
    """No progress bar and no messages."""


class WarmupSettings(PhaseSettings):
    """`d2lora warmup`: base + general data -> warm start."""

    aliases: ClassVar[dict[str, str]] = {"--for": "--for-task", "-m": "--m"}

    m: int | None = Field(default=None, ge=1)
    """Rows to use, a seeded choice unless `select` says how. None: all."""
    select: SelectMethod | None = None
    """Clean the data and choose the m rows of it as `d2lora select` does, with its defaults; the
    choice is written to `selection` in the run folder. None: use the data as they are."""
    for_task: tuple[str, ...] = ()
    """Examples of the tasks that select chooses for (short: --for)."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Train until so many tokens were seen, in place of epochs: warm-ups on rows of other lengths
    and numbers then cost the same."""
    validation_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the rows kept for the general loss before and after, in the manifest."""

    @field_validator("init")
    @classmethod
    def _new(cls, init: str) -> str:
        if not is_named_init(init):
            hint = did_you_mean(init, (FRESH, *PEFT_INITS))
            raise ValueError(
                f"a warm-up begins anew: expected fresh, {', '.join(PEFT_INITS)} or "
                f"pissa_niter_N.{hint}"
            )
        return init

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        for name in ("epochs", "max_steps"):
            if self.max_tokens is not None and getattr(self, name) is not None:
                raise ValueError(f"{name} and max_tokens both say how long to train: give one")
        return self

    @field_validator("reference")
    @classmethod
    def _no_warm_start_yet(cls, reference: Reference | None) -> Reference | None:
        if reference == "warm_start":
            raise ValueError("a warm-up begins from no warm start; use base")
        return reference


class AdaptSettings(PhaseSettings):
    """`d2lora adapt`: base + scarce task data + init -> adapter."""

    init: str = FRESH
    """How the adapter begins: the folder of a warm start, `fresh` (random A, zero B) or one of
    PEFT's initializations: gaussian, orthogonal, pissa, pissa_niter_N, olora, eva, corda, loftq,
    lora_ga. Those that change the base are converted when saved, to an ordinary adapter of twice
    the rank."""
    init_scale: float = Field(default=1.0, ge=0, le=1)
    """Strength of the warm start: its B is multiplied by this. 0: its A with zero B."""
    n: int | None = Field(default=None, ge=1)
    """Rows to use, validation rows included; subsets nest. None: all."""

    @model_validator(mode="after")
    def _reference_is_there(self) -> Self:
        if self.reference == "warm_start" and is_named_init(self.init):
            raise ValueError(
                "--reference warm_start, but the run begins from no warm start; give --init its "
                "folder, or use --reference base"
            )
        return self
