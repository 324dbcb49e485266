"""The shape of an adapter, its configuration, and its weights before anything is learnt."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import EvaConfig, LoftQConfig, LoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from torch import nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from d2lora.adapters.attach import check_computes, peft_warnings_ignored, put
from d2lora.adapters.files import some
from d2lora.adapters.targets import ALL_LINEAR, Wanted, check_targets, target_layers, targets_of
from d2lora.adapters.whole import check_alike, check_rows, check_whole, rows_of, whole_of
from d2lora.errors import SettingsError, first_line
from d2lora.settings import DEFAULT_RANK, FRESH, MILORA, LoraSettings, TrainSettings

PARTIAL = ("exclude_targets", "layers", "rank_pattern", "alpha_pattern")
"""Settings by which layers differ."""
BESIDE = ("modules_to_save", "add_tokens")
"""Settings of what is trained beside LoRA's factors."""
PLAIN = (FRESH, "gaussian")
"""Initializations that PEFT has for parameters, too."""


@dataclass(frozen=True)
class LoraShape:
    """The adapter's shape, all values known.

    `targets` are names of modules, and of parameters, or `all-linear` and `experts`.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    rslora: bool = False
    dora: bool = False
    exclude_targets: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    rank_pattern: tuple[str, ...] = ()
    """Ranks of some targets, `name=rank`."""
    alpha_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole."""
    add_tokens: tuple[str, ...] = ()
    """Tokens whose rows are trained."""

    @property
    def wanted(self) -> Wanted:
        """What gets an adapter."""
        return Wanted(self.targets, self.exclude_targets, self.layers)

    @classmethod
    def fresh(cls, settings: LoraSettings) -> "LoraShape":
        """Return the shape of a fresh adapter: what is set, else the defaults."""
        rank = settings.rank or DEFAULT_RANK
        return cls(
            rank=rank,
            alpha=settings.alpha or 2.0 * rank,
            dropout=settings.dropout or 0.0,
            targets=settings.targets or (ALL_LINEAR,),
            rslora=settings.rslora,
            dora=settings.dora,
            **{name: getattr(settings, name) or () for name in (*PARTIAL, *BESIDE)},
        )

    @classmethod
    def of(cls, config: LoraConfig) -> "LoraShape":
        """Return the shape that a saved adapter has."""
        targets = config.target_modules or ()
        names = [targets] if isinstance(targets, str) else sorted(targets)
        excluded, layers = config.exclude_modules or (), config.layers_to_transform or ()
        return cls(
            config.r,
            float(config.lora_alpha),
            config.lora_dropout,
            (*names, *(config.target_parameters or ())),
            config.use_rslora,
            config.use_dora,
            tuple([excluded] if isinstance(excluded, str) else sorted(excluded)),
            tuple([layers] if isinstance(layers, int) else layers),
            _as_texts(config.rank_pattern),
            _as_texts(config.alpha_pattern),
            tuple(sorted(config.modules_to_save or ())),
        )


def attach_fresh(model: PreTrainedModel, shape: LoraShape, seed: int) -> PeftModel:
    """Put a fresh LoRA adapter on a model: Kaiming-uniform A and zero B (Hu et al. 2021).

    Args:
        model: The base; its weights stay as they are.
        shape: Rank, alpha, dropout and targets.
        seed: Seed of A.

    Raises:
        SettingsError: If a target is not a module of the model.
    """
    check_shape(model, shape)
    return attach(model, lora_config(model, shape, FRESH), seed)


def check_shape(model: PreTrainedModel, shape: LoraShape) -> None:
    """Check that what a shape names is there, and that LoRA can be put on it.

    Raises:
        SettingsError: If not, with what there is.
    """
    check_targets(model, shape.wanted)
    check_whole(model, shape.modules_to_save, shape.wanted)
    if shape.add_tokens:
        check_rows(model, shape.modules_to_save, shape.wanted)
    names = [name for name, _ in target_layers(model, shape.wanted)]
    for option, pattern in (("rank", shape.rank_pattern), ("alpha", shape.alpha_pattern)):
        for key in _numbers(pattern):
            try:
                known = any(re.match(rf"(.*\.)?({key})$", name) for name in names)
            except re.error as error:
                raise SettingsError(f"--{option}-pattern: `{key}`: {error}") from None
            if not known:
                raise SettingsError(f"--{option}-pattern: no target is called `{key}`")


def _numbers(texts: tuple[str, ...]) -> dict[str, float]:
    """Return what PEFT takes: name or pattern of an end -> number."""
    pairs = (text.rpartition("=") for text in texts)
    return {name: int(n) if n.isdigit() else float(n) for name, _, n in pairs}


def _as_texts(numbers: dict[str, Any] | None) -> tuple[str, ...]:
    return tuple(f"{name}={number:g}" for name, number in (numbers or {}).items())


def lora_config(
    model: PreTrainedModel, shape: LoraShape, init: str, new_ids: Sequence[int] = ()
) -> LoraConfig:
    """Return PEFT's configuration of an adapter and of its initialization.

    Args:
        model: The base, with rows for new tokens.
        shape: The adapter's.
        init: The initialization.
        new_ids: Ids of the new tokens.

    Raises:
        SettingsError: If it names parameters and a setting that PEFT has for layers alone.
    """
    # LoRA-GA and CorDA need the layers before PEFT resolves `all-linear`.
    targets = targets_of(model, shape.wanted)
    patterns = {f"--{n.replace('_', '-')}": getattr(shape, n) for n in PARTIAL}
    odd = {"--dropout": shape.dropout, "--dora": shape.dora, f"--init {init}": init not in PLAIN}
    clashes = " and ".join(name for name, given in {**odd, **patterns}.items() if given)
    if targets.parameters and clashes:
        raise SettingsError(
            f"PEFT adapts {some(targets.parameters)} as parameters, which it does not do with "
            f"{clashes}: leave that out, or these out of --targets"
        )
    whole = whole_of(model, shape.modules_to_save)
    return LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # pyright: ignore[reportArgumentType]  # PEFT scales by floats too
        lora_dropout=shape.dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        rank_pattern=cast("Any", _numbers(shape.rank_pattern)),
        alpha_pattern=cast("Any", _numbers(shape.alpha_pattern)),
        use_rslora=shape.rslora,
        use_dora=shape.dora,
        modules_to_save=whole.names or None,
        ensure_weight_tying=whole.tied,
        trainable_token_indices=rows_of(model, new_ids),
        init_lora_weights=True if init in {FRESH, MILORA} else cast("Any", init),
        task_type="CAUSAL_LM",
        loftq_config=LoftQConfig() if init == "loftq" else {},
        # rho 1: every layer keeps the rank asked for.
        eva_config=EvaConfig(rho=1.0) if init == "eva" else None,
        corda_config=CordaConfig(corda_method="ipm") if init == "corda" else None,
        lora_ga_config=LoraGAConfig() if init == "lora_ga" else None,
    )


def attach(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Put the adapter of a configuration on a model; what is random comes from `seed`."""
    with torch.random.fork_rng(), peft_warnings_ignored(), warnings.catch_warnings():
        # PEFT explains how to convert such an adapter, which is done when it is saved.
        warnings.filterwarnings("ignore", message=".*path_initial_model_for_weight_conversion")
        # The adapter's weights are small beside the base, which is loaded already.
        warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage=False")
        # Of models with experts PEFT sets ranks for names that not all of them have.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not")
        torch.manual_seed(seed)
        try:
            attached = put(model, config)
            check_computes(attached)
            check_alike(attached)
        except (ValueError, NotImplementedError, AttributeError) as error:  # of heads it lacks
            raise SettingsError(f"PEFT puts no adapter on this base: {first_line(error)}") from None
    return attached


def adamw(model: nn.Module, settings: TrainSettings) -> AdamW:
    """Return the optimizer; each parameter group's `factor` scales its learning rate.

    With LoRA+ (Hayou, Ghosh, Yu 2024) B learns `lora_plus_ratio` times as fast as A; the groups
    are PEFT's.
    """
    if settings.lora_plus_ratio == 1:
        parameters = [p for p in model.parameters() if p.requires_grad]
        decay, fused = settings.weight_decay, parameters[0].device.type == "cuda"
        return AdamW(parameters, lr=0.0, betas=settings.betas, weight_decay=decay, fused=fused)
    optimizer = create_loraplus_optimizer(
        cast("PeftModel", model),
        AdamW,
        lr=1.0,
        loraplus_lr_ratio=settings.lora_plus_ratio,
        loraplus_lr_embedding=1.0,
        loraplus_weight_decay=settings.weight_decay,
        betas=settings.betas,
    )
    assert isinstance(optimizer, AdamW)
    for group in optimizer.param_groups:
        group["factor"] = group["lr"]
    return optimizer
