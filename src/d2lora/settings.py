"""Settings of every command: frozen, validated, flat in YAML and on the command line.

Each command has one class; what both phases share is inherited, so a function asks for the
section that it needs (`train(settings: TrainSettings)`) and is handed the whole. Defaults live
here and nowhere else.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from d2lora.errors import SettingsError, did_you_mean, listed

ChatFormat = Literal["auto", "template", "plain"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Overlong = Literal["error", "drop", "truncate"]
Schedule = Literal["linear", "cosine", "constant"]
TaskName = Literal["auto", "gsm8k", "titles", "instruct", "text"]


class Settings(BaseModel):
    """A frozen set of settings; an unknown name is an error with the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    subject: ClassVar[str] = ""
    """The setting that the first word of a command line gives; empty: a settings file."""

    def __init__(self, **values: Any) -> None:
        """Validate `values`.

        Raises:
            SettingsError: With every fault at once.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(_explained(type(self), error)) from None

    def changed(self, **values: Any) -> Self:
        """Return a validated copy in which `values` replace the present ones."""
        return type(self)(**{**dict(self), **values})

    def to_yaml(self) -> str:
        """Return the resolved settings as YAML, in the order of their definition."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class BaseSettings(Settings):
    """Which base model, and where and how it computes."""

    base: str = "embedded"
    """Base model: `embedded`, a local folder or a hub id."""
    revision: str | None = None
    """Revision of a hub model (branch, tag or commit). None: the hub's default."""
    dtype: Dtype = "auto"
    """Number format of the base. auto: bfloat16 on CUDA, float32 elsewhere."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps."""
    threads: int = Field(default=0, ge=0)
    """CPU threads. 0: as torch decides."""

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        kind = device.split(":", maxsplit=1)[0]
        if kind not in {"auto", "cpu", "cuda", "mps"}:
            raise ValueError(f"expected auto, cpu, cuda, cuda:N or mps, found {device!r}")
        return device


class FormatSettings(Settings):
    """How rows become token ids."""

    task: TaskName = "auto"
    """How rows are read and scored. auto: told from the fields of the first row."""
    chat_format: ChatFormat | None = None
    """template: the tokenizer's chat template; plain: `User: ...` / `Assistant: ...`; auto: the
    template where there is one. None: as the warm start or adapter says, else auto."""
    max_length: int = Field(default=1024, ge=8)
    """Longest example, in tokens, prompt and completion together."""
    overlong: Overlong = "error"
    """What becomes of longer examples: error, drop (reported) or truncate (reported; cuts the
    prompt's start first and never the whole completion)."""
    skip_bad_rows: bool = False
    """Set bad rows aside in `bad_rows.jsonl` of the run folder instead of stopping."""


class LoraSettings(Settings):
    """Shape of the adapter. None: the warm start's value, else the default named."""

    rank: int | None = Field(default=None, ge=1)
    """Rank r of the update B A. Default 16."""
    alpha: float | None = Field(default=None, gt=0)
    """The update is scaled by alpha / rank. Default 2 x rank."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on the adapter's input, probability. Default 0."""
    targets: tuple[str, ...] | None = None
    """Module names that get an adapter, as in `q_proj v_proj`, or `all-linear` (default)."""


class TrainSettings(Settings):
    """The training loop, the same in both phases."""

    learning_rate: float = Field(default=5e-4, gt=0)
    """Peak learning rate of AdamW."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows; ignored where max_steps is set."""
    max_steps: int | None = Field(default=None, ge=0)
    """Optimizer steps. None: from epochs. 0: save the beginning untrained."""
    batch_size: int = Field(default=16, ge=1)
    """Examples per optimizer step, over all devices."""
    micro_batch_tokens: int = Field(default=0, ge=0)
    """Most tokens, padding included, in one forward pass; a batch is cut into as many as needed
    (gradient accumulation). The result does not depend on it. 0: 1024 on a CPU, 8192 elsewhere."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Most examples in one forward pass. None: only micro_batch_tokens counts."""
    lean: bool = True
    """Use the faster pass through LoRA layers where it is equal to PEFT's."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up steps: linear or cosine to zero, or constant."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm. 0: off."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rows kept for validation loss. They count towards n."""
    eval_every: int = Field(default=0, ge=0)
    """Optimizer steps between validation losses. 0: once an epoch."""
    patience: int = Field(default=0, ge=0)
    """Stop after so many validations without a better loss, keep the best. 0: off."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Optimizer steps between checkpoints that a killed run resumes from. 0: off."""
    seed: int = Field(default=0, ge=0)
    """Root seed; each source of randomness below gets its own stream of it."""
    seed_subset: int | None = Field(default=None, ge=0)
    """Seed of the choice of n rows and the validation split. None: from seed."""
    seed_order: int | None = Field(default=None, ge=0)
    """Seed of the order of rows. None: from seed."""
    seed_init: int | None = Field(default=None, ge=0)
    """Seed of a fresh adapter's random weights. None: from seed."""
    seed_dropout: int | None = Field(default=None, ge=0)
    """Seed of dropout. None: from seed."""


class PhaseSettings(BaseSettings, FormatSettings, LoraSettings, TrainSettings):
    """What warm-up and adaptation share."""

    data: tuple[str, ...]
    """Training data: files (JSONL, JSON, CSV, Parquet) or hub ids (`owner/name:split`)."""
    out: Path
    """Run folder to write."""
    validation_data: tuple[str, ...] = ()
    """Held-out rows for validation loss, instead of validation_fraction."""
    resume: bool = False
    """Continue a killed run in `out`."""
    quiet: bool = False
    """No progress bar and no messages."""


class WarmupSettings(PhaseSettings):
    """`d2lora warmup`: base + general data -> warm start."""

    m: int | None = Field(default=None, ge=1)
    """Rows to use, a seeded choice. None: all."""
    validation_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the rows kept for the general loss before and after, in the manifest."""


class AdaptSettings(PhaseSettings):
    """`d2lora adapt`: base + scarce task data + init -> adapter."""

    init: str = "fresh"
    """How the adapter begins: `fresh` (random A, zero B) or the folder of a warm start."""
    init_scale: float = Field(default=1.0, ge=0, le=1)
    """Strength of the warm start: its B is multiplied by this. 0: its A with zero B."""
    n: int | None = Field(default=None, ge=1)
    """Rows to use, validation rows included; subsets nest. None: all."""


class GenerationSettings(Settings):
    """Greedy or sampled decoding."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Most tokens to generate for one prompt."""
    batch_size: int = Field(default=64, ge=1)
    """Prompts decoded together."""


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


class ConvertSettings(BaseSettings):
    """`d2lora convert`: another rank, another strength, or a merge into the base."""

    adapter: str
    """Adapter or warm start to convert; it stays as it is."""
    out: Path
    """Folder to write."""
    rank: int | None = Field(default=None, ge=1)
    """New rank: a higher one keeps the function, a lower one the best part of it."""
    scale: float | None = Field(default=None, gt=0)
    """Multiply the update by this."""
    merge: bool = False
    """Fold the adapter into the base and write a plain model folder."""
    seed: int = Field(default=0, ge=0)
    """Seed of new directions' A, and of the tokens that a merge is checked on."""


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
    plot: Path | None = None
    """PNG to write: the spectrum of every layer."""
    out: Path | None = None
    """JSON file to write with everything."""


class StudySettings(Settings):
    """`d2lora study PLAN`: run what is missing of a study."""

    subject: ClassVar[str] = "plan"
    plan: str
    """Plan: a YAML file, or the name of a shipped one."""
    out: Path | None = None
    """Folder of the study. None: studies/NAME, after the plan."""
    store: Path | None = None
    """Folder of finished runs, which studies may share. None: `store` beside the study."""
    set: tuple[str, ...] = ()
    """Changes of the plan, `name=value`, as in `seeds=3 tasks.titles.n_test=50`."""
    executor: Literal["processes", "inline", "ray"] = "processes"
    """Where runs happen: a pool of processes, this process, or a Ray cluster."""
    workers: int = Field(default=0, ge=0)
    """Runs at a time. 0: one per GPU, or per core where there is none."""
    address: str | None = None
    """Ray cluster to join, as in `ray://host:10001` or `auto`. None: this machine alone."""
    keep_adapters: bool = True
    """Keep the adapters of all cells."""
    dry_run: bool = False
    """List the cells, what is there already and the time left; run nothing."""
    report: bool = True
    """Write the report at the end."""
    quiet: bool = False
    """No progress bar and no messages."""


class ReportSettings(Settings):
    """`d2lora report STUDY`: one page, and files, of what a study found."""

    subject: ClassVar[str] = "study"
    study: str
    """Folder of a study."""
    out: Path | None = None
    """Folder to write; an earlier report in it is replaced. None: `report` in the study."""


class DemoSettings(Settings):
    """`d2lora demo`: the whole story on the embedded base."""

    out: Path = Path("demo-out")
    """Folder to write; an earlier demo in it is replaced."""
    sizes: tuple[int, ...] = (16, 64, 256)
    """Task sizes n."""
    seeds: int = Field(default=3, ge=1)
    """Seeds per cell."""
    n_test: int = Field(default=200, ge=1)
    """Test rows per task."""
    workers: int = Field(default=0, ge=0)
    """Processes of one thread each. 0: one per core."""


def _explained(kind: type[Settings], error: ValidationError) -> str:
    faults: list[str] = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            faults.append(f"unknown setting `{name}`.{did_you_mean(name, kind.model_fields)}")
        elif fault["type"] == "missing":
            faults.append(f"`{name}` is needed: give it as --{name} or in the settings file")
        else:
            reason = fault["msg"].removeprefix("Value error, ")
            faults.append(f"`{name}`: {reason[0].lower()}{reason[1:]}, got {fault['input']!r}")
    return f"wrong settings:\n{listed(faults)}"
