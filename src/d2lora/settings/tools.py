"""The commands around the two phases."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from d2lora.settings.core import Settings
from d2lora.settings.sections import (
    BaseSettings,
    ChatFormat,
    FormatSettings,
    GenerationSettings,
    HygieneSettings,
    SelectMethod,
    TaskName,
)


class SelectSettings(BaseSettings, HygieneSettings):
    """`d2lora select`: pool + a few task examples -> warm-up set, with reasons."""

    aliases: ClassVar[dict[str, str]] = {"--for": "--for-task", "-m": "--m"}
    positional: ClassVar[str | None] = "data"

    data: tuple[str, ...]
    """The pool: files (JSONL, JSON, CSV, Parquet) or hub ids; may stand before the options."""
    m: int = Field(ge=1)
    """Rows to choose (short: -m)."""
    for_task: tuple[str, ...] = ()
    """Training examples of the tasks to choose for, a file each (short: --for). Empty: none."""
    out: Path = Path("selection")
    """Folder to write: data.jsonl, reasons.jsonl, rejected.jsonl, the data card."""
    method: SelectMethod = "auto"
    """How to choose; docs/how-to/warm-up-rows.md explains. auto: dsir with a task, else
    stratified."""
    embedding: str = "base"
    """What diverse, similar and mixture compare rows by: `base` (the base's hidden states), `words`
    (no model, for large pools) or the name of a sentence-transformers model."""
    relevance: float = Field(default=0.5, ge=0, le=1)
    """For mixture: 0 covers the pool, 1 takes what is most like the task."""
    feature_tokens: int = Field(default=256, ge=8)
    """Most tokens of a row that are read for its hidden states, loss or gradient."""
    gradient_steps: int = Field(default=100, ge=1)
    """Optimizer steps, of 16 rows, of the short warm-up that gradient begins with."""
    gradient_width: int = Field(default=4096, ge=64)
    """Numbers that a gradient is reduced to."""
    task: TaskName = "auto"
    """How pool rows are read. auto: told from the fields of the first row."""
    chat_format: ChatFormat | None = None
    """template, plain or auto, as for warmup. None: auto."""
    cache: Path | None = None
    """Where hidden states, losses and gradients are kept. None: $D2LORA_CACHE or
    ~/.cache/d2lora."""
    seed: int = Field(default=0, ge=0)
    """Seed of every choice."""
    quiet: bool = False
    """No progress bar and no messages."""


class EvaluateSettings(BaseSettings, FormatSettings, GenerationSettings):
    """`d2lora evaluate`: base + adapters + task -> records, scores, forgetting."""

    out: Path
    """Folder to write."""
    adapters: tuple[str, ...] = ()
    """Adapter folders; `base` is the base alone. Empty: the base alone."""
    data: tuple[str, ...] = ()
    """Test rows of the task."""
    limit: int | None = Field(default=None, ge=1)
    """Score only the first rows of the task. None: all."""
    general_text: tuple[str, ...] = ()
    """Held-out general rows: the change of loss on them is forgetting."""
    choices: tuple[str, ...] = ()
    """Multiple-choice rows (prompt, choices, answer): the change of accuracy is forgetting."""
    quiet: bool = False
    """No progress bar and no messages."""


class GenerateSettings(BaseSettings, GenerationSettings):
    """`d2lora generate`: try an adapter on a prompt or a file of prompts."""

    prompt: str | None = None
    """One prompt."""
    prompts: str | None = None
    """File with one prompt a row (`prompt`, or any fields that a task has), or plain text lines
    (.txt)."""
    adapter: str | None = None
    """Adapter folder. None: the base alone."""
    chat_format: ChatFormat | None = None
    """None: as the adapter's folder says, else auto."""
    temperature: float = Field(default=0.0, ge=0)
    """0: greedy. Above: sampling."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sampling: only the likeliest tokens with this total probability."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling."""
    out: Path | None = None
    """JSONL file to write. None: print."""


class PairsSettings(BaseSettings, FormatSettings, GenerationSettings):
    """`d2lora pairs`: task rows with gold answers -> preference rows, by sampling."""

    data: tuple[str, ...]
    """Rows of a task that has gold answers."""
    out: Path
    """Folder to write: `pairs.jsonl` and how it came about."""
    adapter: str | None = None
    """Adapter to sample from. None: the base alone."""
    n: int | None = Field(default=None, ge=1)
    """Prompts to sample, a seeded choice. None: all."""
    samples: int = Field(default=4, ge=1)
    """Samples of each prompt; exact duplicates count once."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of sampling."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Only the likeliest tokens with this total probability."""
    chosen: Literal["gold", "sample"] = "gold"
    """The better completion: the gold answer, or a sample as good as it where there is one."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of prompts and of sampling."""
    quiet: bool = False
    """No progress bar and no messages."""


class ConvertSettings(BaseSettings):
    """`d2lora convert`: another rank or strength, a mixture, a part, or a merge into the base."""

    adapter: str
    """Adapter or warm start to convert; it stays as it is."""
    out: Path
    """Folder to write."""
    rank: int | None = Field(default=None, ge=1)
    """New rank: a higher one keeps the function, a lower one the best part of it."""
    scale: float | None = Field(default=None, gt=0)
    """Multiply the update by this."""
    mix: tuple[str, ...] = ()
    """Further adapters of the same base to mix with this one."""
    mix_weights: tuple[float, ...] = ()
    """Weight of each adapter, this one first. Empty: equal, with sum 1."""
    mix_method: Literal["cat", "average"] = "cat"
    """cat: exact, the ranks add up (--rank R brings them down); average: of A and of B, where
    shapes agree, which is not the average of the updates."""
    targets: tuple[str, ...] | None = None
    """Keep these modules only, as in `q_proj v_proj`."""
    layers: tuple[int, ...] | None = None
    """Keep these layers only, by number."""
    merge: bool = False
    """Fold the adapter into the base and write a plain model folder."""
    seed: int = Field(default=0, ge=0)
    """Seed of new directions' A, and of the tokens that a merge is checked on."""


class SchemaSettings(Settings):
    """`d2lora schema COMMAND`: the JSON schema of a command's settings file."""

    positional: ClassVar[str | None] = "of"
    settings_file: ClassVar[bool] = False

    of: str
    """A command's name, or `plan` for the plan of a study."""


class InspectSettings(Settings):
    """`d2lora inspect`: what is in an adapter or a warm start."""

    adapter: str
    """Adapter or warm start to look into."""
    other: str | None = None
    """Adapter to compare it with, such as the warm start that it began from."""
    base: str | None = None
    """Base to check the fingerprint of: `embedded`, a local folder or a hub id."""
    revision: str | None = None
    """Revision of a hub model. None: the hub's default."""
    gguf_file: str | None = None
    """The GGUF file to take as weights inside the base's folder or hub model."""
    data: tuple[str, ...] = ()
    """Rows of a task: the loss of the base and of the adapter on the first 32 are told."""
    fast: bool = True
    """Take fast passes for it where they are equal to the plain ones."""
    plot: Path | None = None
    """PNG to write: the spectrum of every layer."""
    out: Path | None = None
    """JSON file to write with everything."""
