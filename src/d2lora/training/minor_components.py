"""MiLoRA: an adapter made of the least important directions of the weights it adapts.

Wang, Li, Wang, Chen, Chen: "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient
LLM Finetuning" (2024, arXiv 2406.09044). Where PiSSA takes the largest singular components of a
weight into the adapter, MiLoRA takes the smallest, so that what the base knows stays in the part
that is frozen. PEFT has PiSSA; this is its counterpart.
"""

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@torch.no_grad()
def take_minor_components(model: PeftModel) -> None:
    """Move the r smallest singular components of each adapted weight into its adapter.

    The model computes what it did, to rounding: `W = W' + scale * B A`.

    Args:
        model: A base with a fresh adapter; its adapted weights are changed.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or "default" not in layer.lora_A:
            continue
        base, scale = layer.get_base_layer(), layer.scaling["default"]
        weight = base.get_parameter("weight")
        turned = getattr(layer, "fan_in_fan_out", False)
        whole = weight.data.float().T if turned else weight.data.float()
        a, b = _minor(whole, layer.r["default"], scale)
        for factors, value in ((layer.lora_A, a), (layer.lora_B, b)):
            linear = factors["default"]
            assert isinstance(linear, nn.Linear)
            linear.weight.data = value.to(linear.weight)
        rest = whole - scale * b @ a
        weight.data = (rest.T if turned else rest).to(weight.dtype).contiguous()


def _minor(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r), `scale * B A` the smallest components of (out, in)."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (s[-rank:] / scale).sqrt()
    return root[:, None] * vt[-rank:], u[:, -rank:] * root
