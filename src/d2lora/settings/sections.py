"""Sections that several commands share, and the values of their options."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from d2lora.settings.core import Effect, Settings

ChatFormat = Literal["auto", "template", "plain"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Checkpointing = Literal["auto", "on", "off"]
Quantization = Literal["nf4", "int8"]
Overlong = Literal["error", "drop", "truncate"]
Schedule = Literal["linear", "cosine", "constant"]
SelectMethod = Literal[
    "auto", "random", "stratified", "diverse", "similar", "dsir", "gradient", "perplexity",
    "mixture",
]  # fmt: skip
ObjectiveName = Literal["sft", "dpo", "orpo"]
Tracker = Literal["tensorboard", "mlflow", "wandb", "trackio"]
Reference = Literal["base", "warm_start"]
ReplayLoss = Literal["sft", "kl"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What torch's generators take."""
LayerNumber = Annotated[int, Field(ge=0, lt=100_000)]
LearningRate = Annotated[float, Field(gt=0, le=1e30)]
Epochs = Annotated[float, Field(gt=0, lt=1e9)]
Decay = Annotated[float, Field(ge=0, lt=1)]
FRESH = "fresh"
MILORA = "milora"
NAMED_INITS = (
    "gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "loftq", "lora_ga", "mica", MILORA,
)  # fmt: skip
"""Other initializations than fresh: all are PEFT's but `milora`."""
DEFAULT_RANK = 16
DATA_INITS = ("eva", "corda", "lora_ga")
"""Those that look at training rows."""


def is_named_init(name: str) -> bool:
    """Say whether an initialization makes a new adapter, instead of taking one."""
    return (
        name == FRESH or name in NAMED_INITS or re.fullmatch(r"pissa_niter_\d+", name) is not None
    )


def changes_base(name: str) -> bool:
    """Say whether an initialization folds a part of the base's weights into the adapter."""
    return name.startswith("pissa") or name in {"olora", "corda", "lora_ga", "loftq", MILORA}


class BaseSettings(Settings):
    """Which base model, and where and how it computes."""

    base: str = "embedded"
    """Base model: `embedded`, `smollm2`, a local folder, a GGUF file or a hub id."""
    revision: str | None = None
    """Revision of a hub model (branch, tag or commit). None: the hub's default."""
    gguf_file: str | None = None
    """The GGUF file to take as weights inside the base's folder or hub model."""
    chat_template: Path | None = None
    """File with the chat template to use (Jinja). None: that of the warm start or adapter, else the
    tokenizer's own."""
    template_args: tuple[str, ...] = ()
    """Values that the chat template sees, as in `enable_thinking=false`."""
    dtype: Dtype = "auto"
    """Dtype of the base. auto: bfloat16 on CUDA, float32 elsewhere."""
    quantization: Quantization | None = None
    """Quantize the base's linear layers as it is loaded, by bitsandbytes: nf4 (4 bits, double
    quantization, as QLoRA) or int8 (8 bits by rows). The adapter stays float32. None: as it is."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps."""
    threads: int = Field(default=0, ge=0, le=4096)
    """CPU threads. 0: as torch decides."""
    fast: bool = True
    """Whether to use the fast paths, where they compute the same as transformers and PEFT: layers,
    norms, gated units and the head; rows without padding and a Llama's decoding on a CPU, CUDA
    graphs on a GPU; prompts shared by completions; adapters merged for scoring."""

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", device, re.ASCII):
            raise ValueError(f"expected auto, cpu, cuda, cuda:N or mps, found {device!r}")
        return device


class FormatSettings(Settings):
    """How rows become token ids."""

    task: str = "auto"
    """How rows are read, shown and scored: a task card (a YAML file) or the name of one that ships
    (gsm8k, titles, instruct, text, preferences, ...). auto: detected from the fields of the first
    row."""
    chat_format: ChatFormat | None = None
    """template: the tokenizer's chat template; plain: `User: ...` / `Assistant: ...`; auto: the
    template where there is one. None: that of the warm start or adapter, else auto."""
    max_length: int = Field(default=1024, ge=8)
    """Maximum length of an example in tokens, prompt and completion together."""
    overlong: Overlong = "error"
    """What to do with longer examples: error, drop or truncate (cut the middle of the longest
    field, in test prompts too; instructions stay whole). How many is reported."""
    skip_bad_rows: bool = False
    """Write bad rows to `bad_rows.jsonl` in the run folder and go on, instead of stopping."""


class KeepOutSettings(Settings):
    """Evaluation data that training rows must not overlap with."""

    keep_out: tuple[str, ...] = ()
    """Evaluation files of any kind: contaminated rows, which share keep_out_words consecutive words
    with one of theirs or ask the same question, are removed and reported."""
    keep_out_words: int = Field(default=13, ge=0)
    """Consecutive words shared with a test row that make a row contaminated. 0: only the same
    question does."""

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("keep_out_words",),
            lambda s: s.keep_out,
            "is about rows that overlap with those of --keep-out: give these, too",
        ),
    )


class HygieneSettings(KeepOutSettings):
    """What is removed from a pool before rows are selected from it."""

    max_length: int = Field(default=1024, ge=8)
    """Maximum length of a row in the base's tokens, prompt and answer together."""
    near_duplicates: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of 5-word shingles from which rows with the same answer are duplicates.
    1: only exact duplicates are."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes to keep, as in `en de`. Empty: all. Short texts are often misdetected."""
    source_cap: int | None = Field(default=None, ge=1)
    """Maximum number of rows from one source (field `source`, else the file), a seeded random
    subset. None: no limit."""


class LoraSettings(Settings):
    """Shape of the adapter. None: the warm start's value, else the default named."""

    rank: int | None = Field(default=None, ge=1)
    """Rank r of the update B A. Default 16."""
    alpha: float | None = Field(default=None, gt=0)
    """The update is scaled by alpha / rank. Default 2 x rank."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on the adapter's input, probability. Default 0."""
    targets: tuple[str, ...] | None = None
    """What gets an adapter: names of modules, as in `q_proj v_proj`, or of parameters, as in
    `gate.weight`; patterns of whole names, as in `.*self_attn.*`; `all-linear` (default): every
    linear layer but routers and the head; `experts`: experts that the base keeps in one tensor, as
    in `all-linear experts`."""
    exclude_targets: tuple[str, ...] | None = None
    """Of these, what gets none after all: names or patterns. Default: nothing."""
    layers: tuple[LayerNumber, ...] | None = None
    """Numbers of the decoder layers that get an adapter, from 0. Default: all."""
    rank_pattern: tuple[str, ...] | None = None
    """Ranks of some targets, as in `q_proj=8 layers.0.mlp.*=32`: a name, or pattern of its end, and
    the rank. Default: none has a rank of its own."""
    alpha_pattern: tuple[str, ...] | None = None
    """Their alphas, in the same form. Default: none has an alpha of its own."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank): rank-stabilized LoRA. A warm start sets its own."""
    dora: bool = False
    """Learn the weights' magnitudes apart from their directions (DoRA); slower. A warm start
    sets its own."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules of the base that are trained whole beside the adapter and saved with it, by name, as
    in `lm_head norm`, in the base's dtype. Default: none."""
    add_tokens: tuple[str, ...] | None = None
    """Tokens to add to the tokenizer, found wherever they stand in a text; the embedding gets a row
    for each, and the head, and these rows alone are trained, beside the adapter. Default: none."""

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _of_numbers(
        cls, values: tuple[str, ...] | None, info: ValidationInfo
    ) -> tuple[str, ...] | None:
        whole = info.field_name == "rank_pattern"
        number = r"[1-9]\d{0,5}" if whole else r"\d{1,6}(\.\d{1,6})?"
        for value in values or ():
            name, _, given = value.rpartition("=")
            if not name or not re.fullmatch(number, given, re.ASCII) or float(given) == 0:
                example = "q_proj=8" if whole else "q_proj=16"
                raise ValueError(f"expected a name and a positive number, as in {example}")
        names = [value.rpartition("=")[0] for value in values or ()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"`{twice[0]}` is given twice")
        return values

    @field_validator("modules_to_save")
    @classmethod
    def _sorted(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if names is None else tuple(sorted(set(names)))

    @field_validator("add_tokens")
    @classmethod
    def _different(cls, tokens: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for token in tokens or ():
            if not token.strip():
                raise ValueError("a token must hold more than space")
            if (tokens or ()).count(token) > 1:
                raise ValueError(f"`{token}` is given twice")
        return tokens


class TrainSettings(Settings):
    """The training loop, the same in both phases."""

    learning_rate: LearningRate = 5e-4
    """Peak learning rate of AdamW."""
    epochs: Epochs | None = None
    """Passes over the training rows. None: as max_steps sets, else 3, but at least 100 steps."""
    max_steps: int | None = Field(default=None, ge=0)
    """Optimizer steps. None: from epochs. 0: save the untrained adapter."""
    stop_step: int | None = Field(default=None, ge=1)
    """Stop after this optimizer step; the learning-rate schedule keeps the length of max_steps or
    epochs. None: at the schedule's end."""
    batch_size: int | None = Field(default=None, ge=1)
    """Examples per optimizer step, over all devices. None: 4, from 64 training rows on 8, from 256
    on 16."""
    micro_batch_tokens: int = Field(default=0, ge=0)
    """Maximum number of tokens, padding included, of a forward pass; a batch is split into as many
    passes as needed (gradient accumulation). The result does not depend on it. 0: 1024 on a CPU,
    8192 elsewhere."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Maximum number of examples in one forward pass. None: micro_batch_tokens is the limit."""
    checkpointing: Checkpointing = "auto"
    """Activation checkpointing: layers keep their inputs alone and are computed again for their
    gradients, so that longer rows fit at a quarter to a third more time. auto: where memory would
    not hold a row without. The result does not depend on it."""
    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """LoRA+: learning rate of B as a multiple of A's."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up steps: linear or cosine to zero, or constant."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm. 0: off."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rows held out for validation loss. They count towards n."""
    fold: tuple[int, int] | None = None
    """(i, k): hold out the i-th of k equal folds, from 0, instead of validation_fraction (k-fold
    cross-validation). None: hold out the last validation_fraction."""
    eval_every: int = Field(default=0, ge=0)
    """Optimizer steps between validations. 0: once per epoch."""
    patience: int = Field(default=0, ge=0)
    """Early stopping after so many validations without a lower loss. 0: off."""
    keep_best: bool = True
    """Whether to keep the weights of the lowest validation loss, where there are validation rows,
    instead of the last."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Optimizer steps between checkpoints that a killed run resumes from. 0: off."""
    seed: Seed = 0
    """Root seed; the seeds below are derived from it."""
    seed_subset: Seed | None = None
    """Seed of the subset of n rows and of the validation split. None: from seed."""
    seed_order: Seed | None = None
    """Seed of the order of rows. None: from seed."""
    seed_init: Seed | None = None
    """Seed of a fresh adapter's random weights. None: from seed."""
    seed_dropout: Seed | None = None
    """Seed of dropout. None: from seed."""

    @field_validator("fold")
    @classmethod
    def _one_of_several(cls, fold: tuple[int, int] | None) -> tuple[int, int] | None:
        if fold is not None and not (0 <= fold[0] < fold[1] > 1):
            raise ValueError("expected i and k, with k at least 2 and i from 0 to k - 1")
        return fold

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps both set the length of training: give one")
        return self

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("stop_step",),
            lambda s: s.stop_step is None or s.max_steps is None or s.stop_step <= s.max_steps,
            "is beyond --max-steps, where training ends in any case",
        ),
    )


class ObjectiveSettings(Settings):
    """The training objective; names and defaults are TRL's."""

    objective: ObjectiveName = "sft"
    """sft: learn completions; dpo, orpo: learn preferences from rows with `prompt`, `chosen` and
    `rejected`. sft on such rows learns the chosen completions. dpo needs a lower learning rate
    than sft."""
    beta: float = Field(default=0.1, gt=0)
    """dpo: strength of the pull towards the reference policy. orpo: weight of the odds ratio."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """dpo: probability that a label is flipped (conservative DPO)."""
    reference: Reference | None = None
    """dpo: the reference policy: base, or warm_start (the adapter before training). None:
    warm_start where the run is initialized from one, else base."""
    orpo_prompt_loss: bool = False
    """orpo: include the prompt in the cross-entropy, as TRL does; the paper's eq. 2 does not."""

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("beta",),
            lambda s: s.objective != "sft",
            "is a setting of --objective dpo and orpo, not of sft",
        ),
        Effect(
            ("label_smoothing", "reference"),
            lambda s: s.objective == "dpo",
            "is a setting of --objective dpo alone",
        ),
        Effect(
            ("orpo_prompt_loss",),
            lambda s: s.objective == "orpo",
            "is a setting of --objective orpo alone",
        ),
    )


class ReplaySettings(Settings):
    """General rows beside the training rows, so that less is forgotten."""

    replay: tuple[str, ...] = ()
    """General rows (files or hub ids), some of which are in every optimizer step beside the
    training rows, so that less is forgotten."""
    replay_task: str = "auto"
    """How these are read: a task card or the name of one that ships. auto: detected from the fields
    of each file's first row."""
    replay_n: int = Field(default=1000, ge=1)
    """Maximum number of them to use, a seeded random subset."""
    replay_batch_size: int | None = Field(default=None, ge=1)
    """Of these in an optimizer step. None: a quarter of batch_size, rounded up."""
    replay_loss: ReplayLoss = "sft"
    """sft: learn their completions again (rehearsal); kl: stay near the base on them, by the
    Kullback-Leibler divergence of the next token from the base's (learning without forgetting)."""
    replay_weight: float = Field(default=0.25, gt=0)
    """Weight of their mean loss per token, which is added to that of the training rows."""

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            (
                "replay_task", "replay_n", "replay_batch_size", "replay_loss", "replay_weight",
            ),
            lambda s: s.replay,
            "is about rows of --replay: give these, too",
        ),
    )  # fmt: skip


class GenerationSettings(Settings):
    """Greedy or sampled decoding."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Maximum number of tokens to generate per prompt."""
    batch_size: int = Field(default=64, ge=1)
    """Prompts decoded together."""
