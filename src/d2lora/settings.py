"""Settings of every command: frozen, validated, flat in YAML and on the command line.

Each command has one class; what both phases share is inherited, so a function asks for the
section that it needs (`train(settings: TrainSettings)`) and is handed the whole. Defaults live
here and nowhere else.
"""

import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from d2lora.errors import SettingsError, did_you_mean, listed

ChatFormat = Literal["auto", "template", "plain"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Overlong = Literal["error", "drop", "truncate"]
Schedule = Literal["linear", "cosine", "constant"]
TaskName = Literal["auto", "gsm8k", "titles", "instruct", "text", "preferences"]
SelectMethod = Literal[
    "auto", "random", "stratified", "diverse", "similar", "dsir", "representation", "gradient",
    "perplexity", "mixture",
]  # fmt: skip
ObjectiveName = Literal["sft", "dpo", "orpo"]
DPOLoss = Literal["sigmoid", "robust", "sigmoid_norm"]
Reference = Literal["base", "warm_start"]
FRESH = "fresh"
PEFT_INITS = ("gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "loftq", "lora_ga")
DATA_DRIVEN = ("eva", "corda", "lora_ga")


def is_named_init(name: str) -> bool:
    """Say whether a beginning is a new adapter: fresh, or by an initialization of PEFT's."""
    return name == FRESH or name in PEFT_INITS or re.fullmatch(r"pissa_niter_\d+", name) is not None


class Settings(BaseModel):
    """A frozen set of settings; an unknown name is an error with the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    aliases: ClassVar[dict[str, str]] = {}
    """Short forms of options on the command line."""
    positional: ClassVar[str | None] = None
    """Field that words before the options belong to, where they are no settings file."""
    settings_file: ClassVar[bool] = True
    """Whether the first word may be a settings file."""

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


class KeepOutSettings(Settings):
    """What must not be learnt from, because it is tested on."""

    keep_out: tuple[str, ...] = ()
    """Evaluation files of any kind: rows that share keep_out_words words in a row with one of
    theirs, or ask the same question, are taken out and told."""
    keep_out_words: int = Field(default=13, ge=0)
    """Words in a row that give a test row away. 0: only the same question does."""


class HygieneSettings(KeepOutSettings):
    """What is taken out of a pool before anything is chosen from it."""

    max_length: int = Field(default=1024, ge=8)
    """Longest row, in the base's tokens, prompt and answer together."""
    near_duplicates: float = Field(default=0.8, gt=0, le=1)
    """Rows that share so much of their 5-word shingles (Jaccard), and answer the same, are one.
    1: only exact duplicates are."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes to keep, as in `en de`. Empty: any; short texts are easily mistaken."""
    source_cap: int | None = Field(default=None, ge=1)
    """Most rows of one source (field `source`, else the file), a seeded choice. None: any."""


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
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank): rank-stabilized LoRA. A warm start brings its own."""
    dora: bool = False
    """Learn the weights' magnitudes apart from their directions (DoRA); slower. A warm start
    brings its own."""


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
    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """LoRA+: B learns at this many times the learning rate. 1: as A does."""
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


class ObjectiveSettings(Settings):
    """What is minimised; names and defaults are TRL's."""

    objective: ObjectiveName = "sft"
    """sft: learn completions; dpo, orpo: learn which of two is better, from rows with `prompt`,
    `chosen` and `rejected`. sft on such rows learns the chosen completions. dpo wants a lower
    learning rate than sft."""
    beta: float = Field(default=0.1, gt=0)
    """dpo: how strongly the policy is held to the reference. orpo: weight of the odds ratio."""
    loss_type: DPOLoss = "sigmoid"
    """dpo: sigmoid, robust (to flipped labels) or sigmoid_norm (log ratios per token)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """dpo: probability that a label is flipped."""
    reference: Reference | None = None
    """dpo: the reference policy: base, or warm_start (the adapter as it begins). None:
    warm_start where the run begins from one, else base."""
    orpo_prompt_loss: bool = False
    """orpo: take the cross-entropy over the prompt too, as TRL does; the paper's eq. 2 does
    not."""

    @model_validator(mode="after")
    def _of_the_objective(self) -> Self:
        own = {
            "dpo": {"loss_type", "label_smoothing", "reference"},
            "orpo": {"orpo_prompt_loss"},
        }
        for objective, names in own.items():
            for name in sorted(names):
                default = type(self).model_fields[name].default
                if objective != self.objective and getattr(self, name) != default:
                    raise ValueError(
                        f"{name} is a setting of --objective {objective}, not of {self.objective}"
                    )
        return self


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
    """How to choose; docs/selection.md explains. auto: similar with a task, else stratified."""
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


class GenerationSettings(Settings):
    """Greedy or sampled decoding."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Most tokens to generate for one prompt."""
    batch_size: int = Field(default=64, ge=1)
    """Prompts decoded together."""
    lean: bool = True
    """Decode with the faster pass where the model is one that it computes (Llama on a CPU)."""


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
    data: tuple[str, ...] = ()
    """Rows of a task: the loss of the base and of the adapter on the first 32 are told."""
    plot: Path | None = None
    """PNG to write: the spectrum of every layer."""
    out: Path | None = None
    """JSON file to write with everything."""


class StudySettings(Settings):
    """`d2lora study PLAN`: run what is missing of a study."""

    positional: ClassVar[str | None] = "plan"
    settings_file: ClassVar[bool] = False
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

    positional: ClassVar[str | None] = "study"
    settings_file: ClassVar[bool] = False
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
            if not name:  # two settings contradict each other
                faults.append(reason)
                continue
            faults.append(f"`{name}`: {reason[0].lower()}{reason[1:]}, got {fault['input']!r}")
    return f"wrong settings:\n{listed(faults)}"
