"""The shape of an adapter, its configuration, and its weights before anything is learnt."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from peft import EvaConfig, LoftQConfig, LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from torch import nn
from torch.optim import AdamW
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from d2lora.adapters.attach import peft_warnings_ignored
from d2lora.errors import SettingsError, did_you_mean, listed
from d2lora.settings import FRESH, LoraSettings, TrainSettings

ALL_LINEAR = "all-linear"
DEFAULT_RANK = 16


@dataclass(frozen=True)
class LoraShape:
    """The adapter's shape, all values known. `targets` is (`all-linear`,) or module names."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    rslora: bool = False
    dora: bool = False

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
        )

    @classmethod
    def of(cls, config: LoraConfig) -> "LoraShape":
        """Return the shape that a saved adapter has."""
        targets = config.target_modules or ()
        names = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
        return cls(
            config.r,
            float(config.lora_alpha),
            config.lora_dropout,
            names,
            config.use_rslora,
            config.use_dora,
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
    check_targets(model, shape.targets)
    return attach(model, lora_config(model, shape, FRESH), seed)


def lora_config(model: PreTrainedModel, shape: LoraShape, init: str) -> LoraConfig:
    """Return PEFT's configuration of an adapter and of its initialization."""
    every = shape.targets == (ALL_LINEAR,)
    return LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # pyright: ignore[reportArgumentType]  # PEFT scales by floats too
        lora_dropout=shape.dropout,
        # LoRA-GA and CorDA need the layers before PEFT resolves `all-linear`.
        target_modules=linear_names(model) if every else list(shape.targets),
        use_rslora=shape.rslora,
        use_dora=shape.dora,
        init_lora_weights=True if init == FRESH else cast("Any", init),
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
        torch.manual_seed(seed)
        attached = get_peft_model(model, config)
    assert isinstance(attached, PeftModel)
    return attached


def linear_names(model: PreTrainedModel) -> list[str]:
    """Return the last names of the layers that `all-linear` takes: all but the head."""
    head = model.get_output_embeddings()
    linear = [(name, layer) for name, layer in model.named_modules() if _is_linear(layer)]
    heads = {name.rsplit(".", 1)[-1] for name, layer in linear if layer is head}
    return sorted({name.rsplit(".", 1)[-1] for name, _ in linear} - heads)


def _is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(layer, nn.Linear | Conv1D)


def target_layers(
    model: PreTrainedModel, targets: tuple[str, ...]
) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers, by full name, that get an adapter."""
    wanted = tuple(linear_names(model)) if targets == (ALL_LINEAR,) else targets
    for name, layer in model.named_modules():
        if _is_linear(layer) and any(_is_named(name, target) for target in wanted):
            yield name, layer


def _is_named(name: str, target: str) -> bool:
    """Say whether a target, a last name or a longer end of it, means a module, as in PEFT."""
    return name == target or name.endswith(f".{target}")


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


def check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Check that every target is a name of layers that LoRA can be put on.

    Raises:
        SettingsError: If one is not, with those that are.
    """
    if targets == (ALL_LINEAR,):
        return
    faults: list[str] = []
    for target in targets:
        found = [layer for name, layer in model.named_modules() if _is_named(name, target)]
        odd = [layer for layer in found if not (_is_linear(layer) or type(layer) is nn.Embedding)]
        if not found:
            hint = did_you_mean(target, linear_names(model))
            faults.append(
                f"the base has no module `{target}`.{hint} Targets are names, not patterns"
            )
        elif odd:
            faults.append(f"`{target}` is a {type(odd[0]).__name__}, not a linear layer")
    if faults:
        raise SettingsError(
            f"--targets:\n{listed(faults)}\nThe base has: {', '.join(linear_names(model))}; or use "
            "all-linear"
        )
