"""Causal language models of transformers: their own numbers, or refused by name."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    FUSED,
    KINDS,
    NOT_TINY,
    ROPES,
    Outcome,
    held_against_itself,
    otherwise,
    tiny,
)
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoTokenizer

from d2lora import (
    AdaptSettings,
    ConvertSettings,
    InspectSettings,
    ModelError,
    SettingsError,
    WarmupSettings,
    adapt,
    convert,
    inspect,
    warm_up,
)
from d2lora.adapters.base import check_causal
from d2lora.adapters.lora import LoraShape, attach_fresh
from d2lora.adapters.manifest import save_adapter
from d2lora.adapters.targets import coverage, linear_names
from d2lora.embedded import BASE_DIR

IN_CI = set(
    "bart bloom biogpt cohere ctrl deepseek_v3 falcon_h1 gemma2 gpt_neox granitemoehybrid lfm2 "
    "llama4_text mamba minimax nanochat openai-gpt opt qwen2_moe qwen3_5_text qwen3_next rembert "
    "roberta xlnet".split()
)
"""Of each way to be unlike a Llama one; CI tries these in more ways, `make test-all` all kinds."""
COMMON = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2", "olmo3", "mixtral")
LESS_THAN_ROUNDING = {"prophetnet"}
"""Kinds that see padding, by less than what may be rounding in 16 bits."""
CI = os.environ.get("CI")
EVERY = [kind for kind in KINDS if kind not in NOT_TINY]
WALKED = [kind for kind in EVERY if kind in IN_CI or not CI]


def held(kind: str, *given: Any, **more: Any) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, on models of other days
        return held_against_itself(kind, *given, **more)


def assert_the_same(found: Outcome) -> None:
    for what, off in found.off.items():
        kind_of_number = what.split(",")[0]
        most = {
            "loss": 1e-5, "gradient": 2e-4, "completions": 0, "weights": 0, "operations": 0.05,
        }  # fmt: skip
        assert off <= most.get(kind_of_number, 1e-3), (what, off)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_an_architecture_gives_its_own_numbers_or_is_refused(kind: str) -> None:
    found = held(kind)
    if found.refused:
        assert "not supported" in found.refused
    if found.not_merged:
        assert "would not read the merged" in found.not_merged
    assert_the_same(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*COMMON, *(kind for kind in WALKED if kind not in COMMON)])
def test_it_does_so_with_tied_embeddings_biases_and_rope_turned_otherwise(kind: str) -> None:
    assert_the_same(held(kind, settings=otherwise(kind)))


@pytest.mark.parametrize("rope", ROPES)
def test_each_kind_of_rope_gives_its_own_numbers(rope: str) -> None:
    found = held("llama", settings=otherwise("llama", rope))
    assert_the_same(found)
    assert found.training == "rows end to end"
    assert found.decoding == "rows padded"


@pytest.mark.parametrize("kind", COMMON)
def test_common_architectures_are_trained_decoded_and_scored_together(kind: str) -> None:
    found = held(kind)
    assert found.training.startswith("rows")
    assert found.decoding == "rows padded"
    assert not found.refused
    assert not found.not_merged


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [kind for kind in (*COMMON, *WALKED) if kind not in LESS_THAN_ROUNDING]
)
def test_in_bfloat16_numbers_are_about_as_exact_as_the_models_own(kind: str) -> None:
    found = held(kind, torch.bfloat16)
    # Rounding sends some tokens to another expert, which is no rounding any more.
    most = 10 if "expert" in found.adapted else 4
    for what, off in found.off.items():
        if not what.startswith("logits"):  # what a merge may change, it checks itself
            assert off <= (0 if what.startswith("weights") else most), (what, off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["big_bird", "camembert", "ernie", "roformer", "xlm"])
def test_encoders_are_refused_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match="its tokens see those behind them"):
        check_causal(tiny(kind, dtype), kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["deepseek_v3", "gpt_oss", "jetmoe", "mixtral"] if CI else sorted(FUSED)
)
def test_experts_in_one_tensor_give_their_own_numbers_where_they_are_adapted(kind: str) -> None:
    found = held(kind, targets=("all-linear", "experts"))
    assert "of all experts" in found.adapted.partition("none on")[0]
    assert_the_same(found)


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
    assert "gate_up_proj of all experts" in coverage(peft).partition("none on")[2]
    assert "shared_expert_gate" in coverage(peft).partition("none on")[2]


@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v3", "afmoe"])
def test_experts_that_every_token_meets_are_linear_layers_like_others(kind: str) -> None:
    """Of some of these kinds PEFT itself takes their names for those of experts in one tensor."""
    peft = attach_fresh(tiny(kind), LoraShape(4, 8.0, 0.0, ("all-linear",)), 0)
    adapted, _, left = coverage(peft).partition("none on")
    assert all(name in adapted for name in ("2 down_proj", "2 up_proj"))
    assert "gate_up_proj of all experts" in left


def test_experts_and_routers_are_adapted_where_it_is_asked_for() -> None:
    targets = ("all-linear", "experts", "gate.weight")
    peft = attach_fresh(tiny("mixtral"), LoraShape(4, 8.0, 0.0, targets), 0)
    adapted = coverage(peft).partition("none on")[0]
    assert "2 down_proj of all experts, 2 gate, 2 gate_up_proj of all experts" in adapted


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (LoraShape(4, 8.0, 0.1, ("experts",)), "does not do with --dropout"),
        (LoraShape(4, 8.0, 0.0, ("experts",), dora=True), "does not do with --dora"),
        (LoraShape(4, 8.0, 0.0, ("gate",)), "give its parameter, `gate.weight`"),
        (LoraShape(4, 8.0, 0.0, ("expert",)), "for experts in one tensor: experts"),
    ],
)
def test_what_peft_cannot_do_with_experts_is_refused_by_name(
    shape: LoraShape, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        attach_fresh(tiny("mixtral"), shape, 0)


def test_an_adapter_of_experts_is_inspected_expert_by_expert_and_not_converted(
    tmp_path: Path,
) -> None:
    peft = attach_fresh(tiny("mixtral"), LoraShape(4, 8.0, 0.0, ("experts",)), 0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_adapter(peft, tmp_path / "adapter")
    layers = inspect(InspectSettings(adapter=str(tmp_path / "adapter"))).layers
    norms = [
        float(update.detach().norm())
        for layer in peft.modules()
        if isinstance(layer, ParamWrapper)
        for update in layer.get_delta_weight("default")
    ]
    assert sorted(layer.norm for layer in layers) == pytest.approx(sorted(norms))
    assert all(layer.rank == 4 for layer in layers)
    with pytest.raises(ModelError, match="experts in one tensor"):
        convert(ConvertSettings(adapter=str(tmp_path / "adapter"), out=tmp_path / "b", rank=2))


def test_a_warm_start_of_experts_is_made_and_adapted_further(
    tmp_path: Path, general: str, problems: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    for part in (tiny("mixtral", vocab_size=len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "base")
    shared = {"base": str(tmp_path / "base"), "max_steps": 1, "batch_size": 2, "quiet": True}
    targets = ("all-linear", "experts")
    start = warm_up(
        WarmupSettings(data=(general,), out=tmp_path / "w", targets=targets, rank=4, **shared)
    )
    adapter = adapt(
        AdaptSettings(data=(problems,), out=tmp_path / "a", init=str(start.path), **shared)
    )
    manifest = adapter.manifest
    assert manifest.lora.targets == targets
    assert manifest.adapted is not None
    assert "gate_up_proj of all experts" in manifest.adapted.partition("none on")[0]
    assert manifest.cost["flops"] is None, "each pass computes all experts' updates"
