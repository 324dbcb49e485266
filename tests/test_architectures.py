"""Causal language models of transformers: their own numbers, or refused by name."""

import os
import warnings

import pytest
import torch
from architectures import KINDS, NOT_TINY, held_against_itself, tiny

from d2lora.adapters.lora import LoraShape, attach_fresh
from d2lora.adapters.targets import coverage, linear_names

IN_CI = set(
    "bart bloom biogpt cohere ctrl deepseek_v3 falcon_h1 gemma2 gpt_neox granitemoehybrid lfm2 "
    "llama4_text mamba minimax nanochat openai-gpt opt qwen2_moe qwen3_5_text qwen3_next rembert "
    "roberta xlnet".split()
)
"""Of each way to be unlike a Llama one; `make test-all` walks through every kind."""
COMMON = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2", "olmo3", "mixtral")
WALKED = [
    kind for kind in KINDS if kind not in NOT_TINY and (kind in IN_CI or not os.environ.get("CI"))
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", WALKED)
def test_an_architecture_gives_its_own_numbers_or_is_refused(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, on models of other days
        found = held_against_itself(kind)
    if found.refused:
        assert "not supported" in found.refused
        return
    for what, off in found.off.items():
        most = {"loss": 1e-5, "gradient": 2e-4, "completions": 0}.get(what.split(",")[0], 1e-3)
        assert off <= most, (what, off)


@pytest.mark.parametrize("kind", COMMON)
def test_common_architectures_are_trained_decoded_and_scored_together(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = held_against_itself(kind)
    assert found.training.startswith("rows")
    assert found.decoding == "rows padded"
    assert not found.refused


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMON)
def test_common_architectures_give_their_own_numbers_in_bfloat16(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = held_against_itself(kind, torch.bfloat16)
    assert found.off["loss, fast"] <= 2e-2
    assert found.off["loss, plain"] <= 2e-2


def test_an_adapter_is_put_where_text_comes_through_and_nowhere_else() -> None:
    model = tiny("bart")  # a decoder with cross-attention, to which no text comes
    assert not any("encoder_attn" in name for name in linear_names(model))
    peft = attach_fresh(model, LoraShape(4, 8.0, 0.0, ("all-linear",)), 0)
    names = [name for name, parameter in peft.named_parameters() if parameter.requires_grad]
    assert names
    assert not any("encoder_attn" in name for name in names)
    assert "none on 2 k_proj, 1 lm_head" in coverage(peft)


def test_routers_get_no_adapter_and_experts_in_one_tensor_are_reported() -> None:
    peft = attach_fresh(tiny("qwen2_moe"), LoraShape(4, 8.0, 0.0, ("all-linear",)), 0)
    assert "gate_up_proj of all experts" in coverage(peft)
    assert "shared_expert_gate" in coverage(peft).partition("none on")[2]
