"""Short runs of `adapt` and what may be asked of them."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from d2lora import Adapter, AdaptSettings, adapt
from d2lora.adapters.base import Base
from support import read_rows

PROBE = torch.arange(5, 60)[None]


def run(out: Path, base: str, data: str, loaded: Base | None = None, **changes: Any) -> Adapter:
    settings = {
        "max_steps": 3, "batch_size": 8, "rank": 4, "learning_rate": 1e-2, "quiet": True, **changes,
    }  # fmt: skip
    return adapt(AdaptSettings(base=base, data=(data,), out=out, **settings), loaded)


def weights(adapter: Adapter) -> dict[str, torch.Tensor]:
    return load_file(adapter.path / "adapter_model.safetensors")


def logits(base: str, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        return (PeftModel.from_pretrained(model, str(adapter)) if adapter else model)(
            input_ids=PROBE
        ).logits


def losses(adapter: Adapter) -> list[float]:
    return [row["loss"] for row in read_rows(adapter.path / "metrics.jsonl") if "loss" in row]


def state(base: Base) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in base.model.state_dict().items()}


def assert_untouched(base: Base, before: dict[str, torch.Tensor]) -> None:
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    for name, module in base.model.named_modules():
        left = {"eigens", "covariance_matrix", "_peft_loraga_grad", "corda_method"} & set(
            vars(module)
        )
        assert not left, name
        assert not module._forward_hooks, name
        assert not module._backward_hooks, name
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
