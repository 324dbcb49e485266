"""A warm-up at a higher rank than that of the warm start it makes.

Chen et al., "HRP: High-Rank Preheating for Superior LoRA Initialization" (2025, arXiv 2502.07739):
a low rank finds directions that depend on its random ones, a high rank finds better ones, and its
main singular directions are what a low rank should start from. The paper preheats on the task
itself; here it is the warm-up, and what is kept is the best approximation of what was learnt, not
its directions alone.
"""

import json
import math
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors.torch import load_file, save_file

from d2lora.adapters.factors import Factors, inner_product, truncate
from d2lora.adapters.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LORA_A, LORA_B
from d2lora.errors import SettingsError
from d2lora.runtime.run_folder import write_text


def check_can_be_cut(model: PeftModel) -> None:
    """Check that an adapter is one of layers alone.

    Raises:
        SettingsError: If it adapts experts in one tensor, or an embedding.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and (
            isinstance(layer, ParamWrapper) or layer.lora_embedding_A
        ):
            raise SettingsError(
                f"--train-rank cuts LoRA of layers, and {name} is none: leave it out of --targets, "
                "or leave out --train-rank"
            )


@torch.no_grad()
def cut_to_rank(model: PeftModel, rank: int) -> float:
    """Replace what each layer learnt by its best approximation of a lower rank.

    The factors keep their shapes; what lies beyond the rank is zero.

    Args:
        model: With an adapter of plain LoRA layers of a higher rank.
        rank: The rank that is left.

    Returns:
        The share of all updates' energy, their squared Frobenius norms, that is kept.
    """
    kept = total = 0.0
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or "default" not in layer.lora_A:
            continue
        a = layer.lora_A["default"].get_parameter("weight")
        b = layer.lora_B["default"].get_parameter("weight")
        factors = Factors(a.detach(), b.detach())
        lower, share = truncate(factors, rank)
        energy = layer.scaling["default"] ** 2 * inner_product(factors, factors)
        kept, total = kept + share * energy, total + energy
        a.zero_()[:rank] = lower.a
        b.zero_()[:, :rank] = lower.b
    return kept / total if total > 0 else 1.0


def save_cut(folder: Path, rank: int) -> None:
    """Bring a saved adapter, whose factors were cut, to its rank; its function stays.

    Args:
        folder: Of the adapter, as PEFT saves it; its files are written again.
        rank: That it was cut to.
    """
    weights = load_file(folder / ADAPTER_WEIGHTS)
    for name, weight in weights.items():
        if name.endswith(LORA_A):
            weights[name] = weight[:rank].contiguous()
        elif name.endswith(LORA_B):
            weights[name] = weight[:, :rank].contiguous()
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    alpha = config["lora_alpha"] / alpha_ratio(rank, config["r"], rslora=config["use_rslora"])
    config |= {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
    write_text(path, json.dumps(config, indent=2))


def alpha_ratio(rank: int, train_rank: int, *, rslora: bool) -> float:
    """Return by how much alpha is higher at the higher rank, so that updates are scaled alike."""
    return math.sqrt(train_rank / rank) if rslora else train_rank / rank
