"""Sections that several commands share, and the names of their choices."""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from d2lora.settings.core import Settings

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


def is_named_init(name: str) -> bool:
    """Say whether a beginning is a new adapter: fresh, or by an initialization of PEFT's."""
    return name == FRESH or name in PEFT_INITS or re.fullmatch(r"pissa_niter_\d+", name) is not None


class BaseSettings(Settings):
    """Which base model, and where and how it computes."""

    base: str = "embedded"
    """Base model: `embedded`, `smollm2`, a local folder, a GGUF file or a hub id."""
    revision: str | None = None
    """Revision of a hub model (branch, tag or commit). None: the hub's default."""
    gguf_file: str | None = None
    """The GGUF file to take as weights inside the base's folder or hub model."""
    dtype: Dtype = "auto"
    """Number format of the base. auto: bfloat16 on CUDA, float32 elsewhere."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps."""
    threads: int = Field(default=0, ge=0)
    """CPU threads. 0: as torch decides."""
    fast: bool = True
    """Take fast passes where they are equal to the plain ones: in layers, norms, gated units and
    the head; rows without padding and a Llama's decoding on a CPU, recorded passes on a GPU;
    prompts shared by completions; adapters folded for scoring."""

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
    middle of the longest field, of test prompts too; instructions stay whole)."""
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
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows. None: as max_steps says, else 3, but at least 100 steps."""
    max_steps: int | None = Field(default=None, ge=0)
    """Optimizer steps. None: from epochs. 0: save the beginning untrained."""
    stop_step: int | None = Field(default=None, ge=1)
    """End after this optimizer step of the schedule, whose length stays that of max_steps or
    epochs: as a longer run was at this step. None: at the schedule's end."""
    batch_size: int | None = Field(default=None, ge=1)
    """Examples per optimizer step, over all devices. None: 4, from 64 training rows on 8, from 256
    on 16."""
    micro_batch_tokens: int = Field(default=0, ge=0)
    """Most tokens, padding included, in one forward pass; a batch is cut into as many as needed
    (gradient accumulation). The result does not depend on it. 0: 1024 on a CPU, 8192 elsewhere."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Most examples in one forward pass. None: only micro_batch_tokens counts."""
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
    fold: tuple[int, int] | None = None
    """(i, k): keep the i-th of k equal parts of the rows, from 0, in place of validation_fraction,
    so that k runs validate on every row once. None: the last validation_fraction."""
    eval_every: int = Field(default=0, ge=0)
    """Optimizer steps between validation losses. 0: once an epoch."""
    patience: int = Field(default=0, ge=0)
    """Stop after so many validations without a better loss. 0: off."""
    keep_best: bool = True
    """Where there are validation rows, end with the weights of the least validation loss instead of
    the last."""
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

    @field_validator("fold")
    @classmethod
    def _one_of_several(cls, fold: tuple[int, int] | None) -> tuple[int, int] | None:
        if fold is not None and not 0 <= fold[0] < fold[1]:
            raise ValueError("expected i and k, with i from 0 to k - 1")
        return fold

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps both say how long to train: give one")
        return self


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


class GenerationSettings(Settings):
    """Greedy or sampled decoding."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Most tokens to generate for one prompt."""
    batch_size: int = Field(default=64, ge=1)
    """Prompts decoded together."""
