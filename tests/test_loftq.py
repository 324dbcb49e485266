"""LoftQ on a CPU, where bitsandbytes is installed."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from adapters import assert_untouched, logits, losses, run, state, weights
from d2lora.adapters.base import Base, load_base
from d2lora.adapters.lora import LoraShape, attach, lora_config
from d2lora.settings import BaseSettings
from d2lora.training.loftq import on_cpu, quantized

WEIGHT = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)) / 8


def lost(rank: int, n_times: int = 1) -> float:
    base, a, b = quantized(WEIGHT, 4, rank, n_times)
    return float((WEIGHT - base - b @ a).norm())


def test_factors_make_up_for_what_quantization_lost_and_all_of_it_at_full_rank() -> None:
    base, _, _ = quantized(WEIGHT, 4, 8)
    assert float((WEIGHT - base).norm()) > lost(4) > lost(8) > lost(16) > 0
    assert lost(32) == pytest.approx(0, abs=1e-5)


def test_more_turns_lose_no_more() -> None:
    assert lost(8, 5) < lost(8)


def test_a_quantized_weight_has_at_most_sixteen_levels_a_block() -> None:
    base, _, _ = quantized(WEIGHT, 4, 8)
    for block in base.flatten().split(64):
        assert len((block / block.abs().max()).mul(1e4).round().unique()) <= 16


def test_peft_s_layers_begin_with_it(tiny_base: str) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    layer = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    before = layer.weight.detach().clone()
    with on_cpu():
        model = attach(
            base.model, lora_config(base.model, LoraShape(4, 8.0, 0.0, ("q_proj",)), "loftq"), 0
        )
    attached = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    for found, wanted in zip(
        (
            attached.base_layer.weight,
            attached.lora_A["default"].weight,
            attached.lora_B["default"].weight,
        ),
        quantized(before, 4, 4),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_an_adapter_initialized_by_loftq_learns_and_leaves_the_base_as_it_was(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    loaded: Base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    before = state(loaded)
    adapter = run(tmp_path / "a", tiny_base, problems, loaded, init="loftq", max_steps=12)
    assert_untouched(loaded, before)
    assert losses(adapter)[-1] < losses(adapter)[0]
    about = adapter.manifest.initialization
    assert about is not None
    assert (about["name"], about["converted_from_rank"]) == ("loftq", 4)
    assert about["largest_logit_difference"] > 0
    untrained = run(tmp_path / "u", tiny_base, problems, init="loftq", max_steps=0)
    torch.testing.assert_close(logits(tiny_base, untrained.path), logits(tiny_base))
    again = run(tmp_path / "b", tiny_base, problems, init="loftq", max_steps=12)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(adapter).items())
