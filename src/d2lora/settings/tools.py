"""The commands around the two phases."""

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from d2lora.settings.core import Effect, Settings
from d2lora.settings.sections import (
    BaseSettings,
    ChatFormat,
    Dtype,
    FormatSettings,
    GenerationSettings,
    HygieneSettings,
    Quantization,
    Seed,
    SelectMethod,
)

HARNESS = "lm_eval:"
"""In front of a task of lm-evaluation-harness, where a file could stand."""
EMBEDDED = ("diverse", "similar", "mixture")
"""Selection methods that use the embedding setting."""


def _runs_base(settings: Any) -> bool:
    """Say whether a selection computes something with the base, beyond its tokenizer."""
    if settings.method in EMBEDDED:
        return settings.embedding == "base"
    return settings.method in ("gradient", "perplexity")


class SelectSettings(BaseSettings, HygieneSettings):
    """`d2lora select`: pool + a few task examples -> warm-up rows, with reasons."""

    aliases: ClassVar[dict[str, str]] = {"--for": "--for-task", "-m": "--m"}
    positional: ClassVar[tuple[str, ...]] = ("data",)

    data: tuple[str, ...]
    """The pool: files (JSONL, CSV, ...), folders or hub ids; may stand before the options."""
    m: int = Field(ge=1)
    """Rows to select (short: -m)."""
    for_task: tuple[str, ...] = ()
    """Training examples of the tasks to select for, a file each (short: --for). Empty: none."""
    out: Path = Path("selection")
    """Folder to write: data.jsonl, reasons.jsonl, rejected.jsonl, the data card."""
    method: SelectMethod = "auto"
    """How to choose; docs/how-to/warm-up-rows.md explains. auto: dsir with a task, else
    stratified."""
    embedding: str = "base"
    """Embedding for diverse, similar and mixture: `base` (the base's hidden states), `words` (no
    model, for large pools) or the name of a sentence-transformers model."""
    relevance: float = Field(default=0.5, ge=0, le=1)
    """mixture: 0 covers the pool, 1 takes the rows most similar to the task."""
    feature_tokens: int = Field(default=256, ge=8)
    """Maximum number of tokens of a row used for its hidden states, loss or gradient."""
    gradient_steps: int = Field(default=100, ge=1)
    """gradient: optimizer steps, of 16 rows, of its preliminary warm-up."""
    gradient_width: int = Field(default=4096, ge=64)
    """gradient: dimensions that gradients are projected to."""
    task: str = "auto"
    """How rows of the pool are read: a task card or the name of one that ships. auto: detected
    from the fields of the first row."""
    for_card: str = "auto"
    """How the rows of for_task are read: a task card or the name of one that ships. auto: detected
    from the fields of each file's first row."""
    chat_format: ChatFormat | None = None
    """template, plain or auto, as for warmup. None: auto."""
    cache: Path | None = None
    """Cache of hidden states, losses and gradients. None: $D2LORA_CACHE or ~/.cache/d2lora."""
    seed: Seed = 0
    """Seed of the selection."""
    quiet: bool = False
    """No progress bar and no messages."""

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("for_card",),
            lambda s: s.for_task,
            "says how rows of --for are read: give these, too",
        ),
        Effect(
            ("embedding",),
            lambda s: s.method in EMBEDDED,
            f"is used by --method {', '.join(EMBEDDED[:-1])} or {EMBEDDED[-1]} alone",
        ),
        Effect(
            ("relevance",), lambda s: s.method == "mixture", "is used by --method mixture alone"
        ),
        Effect(
            ("gradient_steps", "gradient_width"),
            lambda s: s.method == "gradient",
            "is used by --method gradient alone",
        ),
        Effect(
            ("feature_tokens", "dtype", "quantization"),
            _runs_base,
            "is about what the base computes, and this selection computes nothing with it: that do "
            "--method gradient and perplexity, and by --embedding base diverse, similar, mixture",
        ),
    )  # fmt: skip


class EvaluateSettings(BaseSettings, FormatSettings, GenerationSettings):
    """`d2lora evaluate`: base + adapters + task -> records, scores, forgetting."""

    out: Path
    """Folder to write."""
    adapters: tuple[str, ...] = ()
    """Adapter folders; `base` is the base alone. Empty: the base alone."""
    data: tuple[str, ...] = ()
    """Test rows of the task, or `lm_eval:NAME`, a task of lm-evaluation-harness."""
    limit: int | None = Field(default=None, ge=1)
    """Score only the first rows of the task. None: all."""
    training_data: tuple[str, ...] = ()
    """Training rows of the task. Closed answers are chosen from theirs, where the card lists no
    labels; without these rows from the labels that the adapters were trained with, else from those
    of the test rows."""
    shots: int = Field(default=0, ge=0)
    """Rows of training_data to show, question and answer, before each prompt; as many of them as
    the base has room for."""
    shots_seed: int = Field(default=0, ge=0)
    """Seed of the choice of these rows."""
    general_text: tuple[str, ...] = ()
    """Held-out general rows; forgetting is the change of loss on them."""
    choices: tuple[str, ...] = ()
    """Multiple-choice rows (prompt, choices, answer) and tasks `lm_eval:NAME` of
    lm-evaluation-harness; forgetting is the change of accuracy."""
    lm_eval_tasks: Path | None = None
    """Folder of your own tasks (YAML) of lm-evaluation-harness, its `--include_path`."""
    quiet: bool = False
    """No progress bar and no messages."""

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("limit", "task"),
            lambda s: s.data,
            "is about the task's rows: give --data, or leave it out",
        ),
        Effect(
            ("max_new_tokens",),
            lambda s: any(not name.startswith(HARNESS) for name in s.data),
            "is about answers to rows of --data, and there are none; tasks of "
            "lm-evaluation-harness have their own",
        ),
        Effect(
            ("chat_format", "chat_template", "template_args"),
            lambda s: any(
                not name.startswith(HARNESS) for name in (*s.data, *s.general_text, *s.choices)
            ),
            "is about rows, and tasks of lm-evaluation-harness are asked as they stand",
        ),
        Effect(
            ("shots_seed",), lambda s: s.shots, "is about rows to show: give --shots, too"
        ),
    )  # fmt: skip


class GenerateSettings(BaseSettings, GenerationSettings):
    """`d2lora generate`: try an adapter on a prompt or a file of prompts."""

    prompt: str | None = None
    """One prompt."""
    prompts: str | None = None
    """File with one prompt per row (`prompt`, or the fields of any task), or per line (.txt)."""
    task: str = "auto"
    """How rows of the file become prompts: a task card or the name of one that ships. auto:
    detected from the fields of the first row."""
    adapter: str | None = None
    """Adapter folder. None: the base alone."""
    chat_format: ChatFormat | None = None
    """template, plain or auto. None: the adapter's, else auto."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature. 0: greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: the likeliest tokens with this total probability."""
    seed: Seed = 0
    """Seed of sampling."""
    out: Path | None = None
    """JSONL file to write. None: print."""

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("top_p", "seed"),
            lambda s: s.temperature > 0,
            "is about sampling, and nothing is sampled: give --temperature",
        ),
    )


class PairsSettings(BaseSettings, FormatSettings, GenerationSettings):
    """`d2lora pairs`: task rows with gold answers -> preference pairs, by sampling."""

    data: tuple[str, ...]
    """Rows of a task that has gold answers."""
    out: Path
    """Folder to write: `pairs.jsonl`, settings and provenance."""
    adapter: str | None = None
    """Adapter to sample from. None: the base alone."""
    n: int | None = Field(default=None, ge=1)
    """Prompts to use, a seeded random subset. None: all."""
    samples: int = Field(default=4, ge=1)
    """Samples per prompt; exact duplicates count once."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: the likeliest tokens with this total probability."""
    chosen: Literal["gold", "sample"] = "gold"
    """The chosen completion: the gold answer, or a sample that scores as well, if there is one."""
    seed: Seed = 0
    """Seed of the subset of prompts and of sampling."""
    quiet: bool = False
    """No progress bar and no messages."""


class ConvertSettings(BaseSettings):
    """`d2lora convert`: change an adapter's rank, strength, dtype or format, mix or merge them."""

    adapter: str
    """Adapter or warm start to convert; it is not changed."""
    out: Path
    """Folder to write, or a file that ends in `.gguf`, for llama.cpp and Ollama: the adapter alone,
    or the merged model."""
    rank: int | None = Field(default=None, ge=1)
    """New rank: a higher one keeps the function, a lower one approximates it best (SVD)."""
    scale: float | None = Field(default=None, gt=0)
    """Multiply the update by this."""
    mix: tuple[str, ...] = ()
    """Further adapters of the same base to mix with this one."""
    mix_weights: tuple[float, ...] = ()
    """Weight of each adapter, this one first. Empty: equal weights that sum to 1."""
    mix_method: Literal["cat", "average"] = "cat"
    """cat: exact, the ranks add up (--rank R truncates them); average: averages A and B, of equal
    shapes, which is not the average of the updates."""
    dtype: Dtype = "auto"
    """Dtype to write. auto: the adapter's own, in GGUF float32; of a merged model bfloat16 on CUDA,
    else float32."""
    merge: bool = False
    """Merge the adapter into the base and write a plain model."""
    shard_size: str | None = None
    """Largest file of a merged model's weights, as in `5GB`. None: as transformers does."""
    seed: Seed = 0
    """Seed of A in new directions, and of the tokens that a merge is checked on."""

    @field_validator("shard_size")
    @classmethod
    def _size(cls, size: str | None) -> str | None:
        if size is not None and not re.fullmatch(
            r"(?=.*[1-9])\d+(\.\d+)?[KMGT]i?B", size, re.ASCII
        ):
            raise ValueError("expected a size with its unit, as in 5GB or 500MB")
        return size

    @property
    def gguf(self) -> bool:
        """Whether a GGUF file is written."""
        return self.out.suffix.lower() == ".gguf"

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("mix_weights", "mix_method"), lambda s: s.mix, "is of a mixture: give --mix, too"
        ),
        Effect(
            ("shard_size",),
            lambda s: s.merge and not s.gguf,
            "is of a merged model's folder: give --merge and an --out that is a folder",
        ),
        Effect(
            ("base", "revision", "gguf_file"),
            lambda s: s.merge or s.gguf,
            "is about a merge and about GGUF files: an adapter alone is converted without its base",
        ),
        Effect(
            ("quantization", "chat_template", "template_args"),
            lambda s: s.merge,
            "is about the model that --merge writes",
        ),
        Effect(
            ("seed",),
            lambda s: s.merge or s.rank is not None,
            "is about --rank and --merge, and nothing is random here",
        ),
    )  # fmt: skip


class PublishSettings(Settings):
    """`d2lora publish FOLDER OWNER/NAME`: upload an adapter, a warm start or a merged model."""

    positional: ClassVar[tuple[str, ...]] = ("folder", "to")

    folder: Path
    """Folder of an adapter, a warm start, a merged model or a GGUF file made by d2lora, or of any
    adapter in PEFT's format; it is not changed."""
    to: str
    """Model repository on the hub, `owner/name`; made where it is not there."""
    scores: tuple[Path, ...] = ()
    """What `d2lora evaluate` wrote (folders, or their summary.json): the scores for the card."""
    base_id: str | None = None
    """The base's hub id, where it was trained on a local copy. None: the name it was trained with,
    where the hub has such a model."""
    license: str | None = None
    """License identifier of the hub, such as `apache-2.0`. None: the card names none."""
    about: Path | None = None
    """Markdown file to add to the card: what it is for, and what not. None: nothing."""
    private: bool = False
    """Make a private repository."""
    dry_run: bool = False
    """Check everything and show the card and the files; nothing is sent."""


class SchemaSettings(Settings):
    """`d2lora schema COMMAND`: the JSON schema of a command's settings file."""

    positional: ClassVar[tuple[str, ...]] = ("of",)
    settings_file: ClassVar[bool] = False

    of: str
    """A command's name, `plan` for the plan of a study, or `card` for a task card."""


class InspectSettings(Settings):
    """`d2lora inspect`: what an adapter or a warm start holds, or how rows are read."""

    adapter: str | None = None
    """Adapter or warm start to inspect. None: the rows of `data` alone."""
    other: str | None = None
    """Adapter to compare it with, such as the warm start that it was initialized from."""
    base: str | None = None
    """Base to compare the fingerprint with, or whose tokens to show: `embedded`, `smollm2`, a
    local folder or a hub id."""
    revision: str | None = None
    """Revision of a hub model. None: the hub's default."""
    gguf_file: str | None = None
    """The GGUF file to take as weights inside the base's folder or hub model."""
    quantization: Quantization | None = None
    """Quantize the base as it is loaded, as for adapt: nf4 or int8. None: as it is."""
    data: tuple[str, ...] = ()
    """Rows of a task: report the loss of the base and of the adapter on the first 32. Without an
    adapter: show the first three as the model will see them."""
    task: str = "auto"
    """How these rows are read and shown: a task card or the name of one that ships. auto: detected
    from the fields of the first row."""
    chat_format: ChatFormat | None = None
    """template, plain or auto. None: the adapter's, else auto."""
    chat_template: Path | None = None
    """File with the chat template to use (Jinja). None: the adapter's, else the tokenizer's own."""
    template_args: tuple[str, ...] = ()
    """Values that the chat template sees, as in `enable_thinking=false`."""
    fast: bool = True
    """Whether to use the fast paths for it, where they compute the same."""
    plot: Path | None = None
    """PNG file to write: the spectrum of every layer."""
    out: Path | None = None
    """JSON file to write, with all numbers."""

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("other", "plot", "quantization"),
            lambda s: s.adapter is not None,
            "is about an adapter: give --adapter, too",
        ),
        Effect(
            ("task", "chat_format", "chat_template", "template_args", "quantization"),
            lambda s: s.data,
            "is about rows: give --data, too",
        ),
        Effect(
            ("revision", "gguf_file"),
            lambda s: s.base is not None or s.data,
            "is about the base: give --base, too",
        ),
    )
