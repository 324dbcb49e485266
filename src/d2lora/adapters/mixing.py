"""Several adapters made one: on files, without a base.

By concatenation of ranks a mixture of updates is exact: sum of w_i s_i B_i A_i is one product of
the stacked A_i with the B_i side by side (PEFT's `cat`). The average of the factors themselves
keeps the rank; its product is not the mixture of the products (PEFT's `linear` is of that kind).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from d2lora.adapters.factors import Factors, extend
from d2lora.adapters.files import LORA_A, LORA_B, AdapterFiles, some
from d2lora.errors import ModelError

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Plain:
    """A plain LoRA adapter, read from its folder and brought to one rank and scale."""

    folder: Path
    config: LoraConfig
    layers: dict[str, Factors]
    beside: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """What is trained whole: modules, and rows of new tokens."""

    @classmethod
    def read(cls, folder: Path) -> "Plain":
        """Read an adapter.

        Raises:
            ModelError: If its layers have different ranks, or are not plain LoRA.
        """
        files = AdapterFiles.read(folder)
        config, layers = files.config, files.layers
        ranks = {rank for pair in layers.values() for rank in (len(pair.a), pair.b.shape[1])}
        if config.target_parameters and ranks != {config.r}:
            raise ModelError(
                f"{folder}: it adapts experts in one tensor (`target_parameters`); only plain LoRA "
                "of layers can be converted. `d2lora convert --merge` writes it into its base"
            )
        beside = {name: files.weights[name] for name in files.beyond_factors if _is_whole(name)}
        others = sorted({*files.beyond_factors} - beside.keys())
        patterns = config.rank_pattern or config.alpha_pattern
        odd = config.use_dora or config.bias != "none" or others
        if odd or (ranks != {config.r} and not patterns):
            held = f" (beside the factors it holds {some(others)})" if others else ""
            raise ModelError(
                f"{folder}: DoRA, biases, or layers of ranks that its configuration does not name"
                f"{held}; only plain LoRA can be converted"
            )
        plain = cls(folder, config, layers, beside)
        return plain._even() if patterns else plain

    def check_factors_alone(self) -> None:
        """Check that nothing is trained whole.

        Raises:
            ModelError: If something is.
        """
        if self.beside:
            raise ModelError(
                f"{self.folder}: it holds more than LoRA's factors ({some(sorted(self.beside))}); "
                "only plain LoRA can be converted so. `d2lora convert --merge` writes it into its "
                "base"
            )

    def _even(self) -> "Plain":
        """Return an adapter whose layers differ in rank and scale with the same of both.

        New directions have B zero, so every layer's update is what it was.
        """
        config, layers = self.config, self.layers
        rank = max(len(pair.a) for pair in layers.values())
        scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        generator = torch.Generator().manual_seed(0)
        even = {
            name: extend(Factors(a, b * (scale_of(config, name, len(a)) / scale)), rank, generator)
            for name, (a, b) in layers.items()
        }
        alpha = scale * (rank**0.5 if config.use_rslora else rank)
        one: Any = {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}
        return replace(self, config=replace(config, **one), layers=even)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        config = self.config
        return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)


def _is_whole(name: str) -> bool:
    return ".lora_" not in name


def scale_of(config: LoraConfig, layer: str, rank: int) -> float:
    """Return what the product of a layer's factors is multiplied by.

    Args:
        config: The adapter's.
        layer: The layer's name.
        rank: The layer's own.
    """
    alphas = config.alpha_pattern or {}
    alpha = float(alphas.get(get_pattern_key(list(alphas), layer), config.lora_alpha))
    return alpha / (rank**0.5 if config.use_rslora else rank)


def tensors_of(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return the factors under the names of PEFT's file."""
    named = {f"{name}{LORA_A}": factors.a.contiguous() for name, factors in layers.items()}
    return named | {f"{name}{LORA_B}": factors.b.contiguous() for name, factors in layers.items()}


def concatenated(adapters: Sequence[Plain], weights: Sequence[float]) -> dict[str, Factors]:
    """Return the exact mixture, at the first adapter's scale; its rank is the sum of ranks.

    Raises:
        ModelError: If the adapters have different layers.
    """
    _check_layers(adapters)
    strengths = [
        weight * adapter.scale / adapters[0].scale
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    return {
        name: Factors(
            torch.cat([adapter.layers[name].a for adapter in adapters]),
            torch.cat(
                [a.layers[name].b * s for a, s in zip(adapters, strengths, strict=True)], dim=1
            ),
        )
        for name in adapters[0].layers
    }


def averaged(adapters: Sequence[Plain], weights: Sequence[float]) -> dict[str, Factors]:
    """Return the weighted sum of the A and of the B, where all shapes and scales agree.

    Raises:
        ModelError: If they do not.
    """
    _check_layers(adapters)
    first = adapters[0]
    for other in adapters[1:]:
        if (other.config.r, other.scale) != (first.config.r, first.scale):
            raise ModelError(
                f"{other.folder} has rank {other.config.r} and scale {other.scale:g}, "
                f"{first.folder} rank {first.config.r} and scale {first.scale:g}; their factors "
                "cannot be averaged; use --mix-method cat"
            )
    both = list(zip(adapters, weights, strict=True))
    return {
        name: Factors(
            torch.stack([a.layers[name].a * w for a, w in both]).sum(0),
            torch.stack([a.layers[name].b * w for a, w in both]).sum(0),
        )
        for name in first.layers
    }


def averaged_beside(adapters: Sequence[Plain], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of what is trained whole.

    It is that of the differences to the base, as the weights add up to 1.

    Raises:
        ModelError: If they do not, or adapters have different modules.
    """
    first = adapters[0]
    shapes = {name: weight.shape for name, weight in first.beside.items()}
    for other in adapters[1:]:
        if {name: weight.shape for name, weight in other.beside.items()} != shapes:
            odd = sorted(first.beside.keys() ^ other.beside.keys()) or sorted(shapes)
            raise ModelError(
                f"{first.folder} and {other.folder} have different whole modules or new tokens, "
                f"such as {odd[0]}"
            )
    if shapes and abs(sum(weights) - 1) > _ROUNDING:
        raise ModelError(
            f"{first.folder} holds whole modules, of which a mean can be taken: --mix-weights must "
            f"add up to 1, not to {sum(weights):g}"
        )
    both = list(zip(adapters, weights, strict=True))
    return {
        name: torch.stack([a.beside[name].double() * w for a, w in both]).sum(0).to(own.dtype)
        for name, own in first.beside.items()
    }


def _check_layers(adapters: Sequence[Plain]) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        odd = sorted(first.layers.keys() ^ other.layers.keys())
        if odd:
            raise ModelError(
                f"{first.folder} and {other.folder} have different layers, such as {odd[0]}"
            )
