"""How a fresh adapter begins."""

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from d2lora.errors import SettingsError, did_you_mean
from d2lora.models import linear_names
from d2lora.settings import LoraSettings

ALL_LINEAR = "all-linear"
DEFAULT_RANK = 16


@dataclass(frozen=True)
class LoraShape:
    """The adapter's shape, all values known. `targets` is (`all-linear`,) or module names."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @classmethod
    def fresh(cls, settings: LoraSettings) -> "LoraShape":
        """Return the shape of a fresh adapter: what is set, else the defaults."""
        rank = settings.rank or DEFAULT_RANK
        return cls(
            rank=rank,
            alpha=settings.alpha or 2.0 * rank,
            dropout=settings.dropout or 0.0,
            targets=settings.targets or (ALL_LINEAR,),
        )

    @classmethod
    def of(cls, config: LoraConfig) -> "LoraShape":
        """Return the shape that a saved adapter has."""
        targets = config.target_modules or ()
        names = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
        return cls(config.r, float(config.lora_alpha), config.lora_dropout, names)


def attach_fresh(model: PreTrainedModel, shape: LoraShape, seed: int) -> PeftModel:
    """Put a fresh LoRA adapter on a model: Kaiming-uniform A and zero B (Hu et al. 2021).

    Args:
        model: The base; its weights stay as they are.
        shape: Rank, alpha, dropout and targets.
        seed: Seed of A.

    Raises:
        SettingsError: If a target is not a module of the model.
    """
    _check_targets(model, shape.targets)
    every = shape.targets == (ALL_LINEAR,)
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # pyright: ignore[reportArgumentType]  # PEFT scales by floats too
        lora_dropout=shape.dropout,
        target_modules=ALL_LINEAR if every else list(shape.targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        attached = get_peft_model(model, config)
    assert isinstance(attached, PeftModel)
    return attached


def _check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    if targets == (ALL_LINEAR,):
        return
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    missing = [target for target in targets if target.rsplit(".", 1)[-1] not in present]
    if missing:
        names = ", ".join(linear_names(model))
        raise SettingsError(
            f"--targets: the base has no module `{missing[0]}`."
            f"{did_you_mean(missing[0], linear_names(model))} It has: {names}; or use all-linear"
        )
