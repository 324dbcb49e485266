"""Adapters of every kind say what unmerged PEFT says, and leave the base as it was."""

import json
import math
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from adapters import PROBE, assert_untouched, state
from conftest import save_tiny_base
from d2lora import (
    AdaptSettings,
    ConvertSettings,
    EvaluateSettings,
    InspectSettings,
    ModelError,
    SettingsError,
    WarmStart,
    adapt,
    convert,
    evaluate,
)
from d2lora.adapters.attach import attach_adapter, fingerprint_in_memory
from d2lora.adapters.base import Base, load_base
from d2lora.adapters.lora import LoraShape, attach_fresh
from d2lora.adapters.targets import linear_names
from d2lora.cli import main
from d2lora.data.encode import Encoder
from d2lora.data.rows import Example
from d2lora.embedded import text_rows
from d2lora.evaluation.decoding import Decoder
from d2lora.evaluation.generate import adapted, generate
from d2lora.settings import BaseSettings, GenerateSettings
from d2lora.tools.inspect import inspect
from d2lora.training.cost import TrainingFlops
from d2lora.training.initialization import check_init
from support import write_rows


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("tied"), seed=2, tie_word_embeddings=True)


def save_with_tokenizer(model: torch.nn.Module, folder: Path, tokenizer_of: str) -> str:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def gpt2_base(tmp_path_factory: pytest.TempPathFactory, tiny_base: str) -> str:
    size = AutoModelForCausalLM.from_pretrained(tiny_base).config.vocab_size
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = GPT2Config(
            vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    return save_with_tokenizer(model, tmp_path_factory.mktemp("gpt2"), tiny_base)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_base(
        tmp_path_factory.mktemp("wide"), seed=4, hidden_size=64, intermediate_size=128
    )


@pytest.fixture(scope="module")
def quantized_base(tmp_path_factory: pytest.TempPathFactory, wide_base: str) -> str:
    return quantize(wide_base, tmp_path_factory.mktemp("quantized"), 4)


def quantize(base: str, out: Path, bits: int) -> str:
    """Write a base as bitsandbytes has it, in 4 or 8 bits."""
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32
    )
    return save_with_tokenizer(model, out, base)


def loaded(base: str) -> Base:
    return load_base(BaseSettings(base=base, device="cpu"))


def make_adapter(base: str, out: Path, **config: Any) -> Path:
    """Write an adapter of PEFT's own making, everything that it may train moved at random."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config),
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(str(out), save_embedding_layers=False)
    return out


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=PROBE).logits


def logits_in_peft(base: str, adapter: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        for layer in model.modules():  # else bitsandbytes computes in bfloat16 on some CPUs
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
        return logits_of(PeftModel.from_pretrained(model, str(adapter)).eval())


LLAMA_ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*\.1\..*_proj"},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rank-stabilised": {"target_modules": ["v_proj"], "use_rslora": True},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "the embedding": {"target_modules": ["embed_tokens"]},
    "a whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 9, 11]},
    "a bias of B": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    "a parameter": {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]},
}
GPT2_ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "biases of its layers": {"target_modules": ["c_attn"], "bias": "lora_only"},
    "all biases": {"target_modules": ["c_attn"], "bias": "all"},
    "a bias of B": {"target_modules": ["c_attn"], "lora_bias": True},
}


@pytest.mark.parametrize("kind", LLAMA_ADAPTERS)
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_an_adapter_says_what_unmerged_peft_says_and_leaves_no_trace(
    tmp_path: Path, tiny_base: str, tied_base: str, kind: str, *, tied: bool
) -> None:
    name = tied_base if tied else tiny_base
    adapter = make_adapter(name, tmp_path / "a", **LLAMA_ADAPTERS[kind])
    check_says_the_same_and_leaves_no_trace(name, adapter)


@pytest.mark.parametrize("kind", GPT2_ADAPTERS)
def test_an_adapter_with_biases_says_what_peft_says_and_leaves_no_trace(
    tmp_path: Path, gpt2_base: str, kind: str
) -> None:
    adapter = make_adapter(gpt2_base, tmp_path / "a", **GPT2_ADAPTERS[kind])
    check_says_the_same_and_leaves_no_trace(gpt2_base, adapter)


def check_says_the_same_and_leaves_no_trace(name: str, adapter: Path) -> None:
    base = loaded(name)
    before, digest, plain = state(base), fingerprint_in_memory(base.model), logits_of(base.model)
    modules = dict(base.model.named_modules())
    expected = logits_in_peft(name, adapter)
    assert not torch.allclose(expected, plain, atol=1e-2)
    for _ in range(2):
        with adapted(base, adapter, fast_when=True) as (model, _):
            torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits_of(base.model), plain)
    assert_untouched(base, before)
    assert fingerprint_in_memory(base.model) == digest
    assert dict(base.model.named_modules()) == modules


@pytest.mark.parametrize("kind", ["the head", "the embedding", "whole norms", "DoRA"])
def test_tokens_are_those_of_unmerged_peft_where_not_all_can_be_folded(
    tmp_path: Path, tied_base: str, kind: str
) -> None:
    adapter = make_adapter(tied_base, tmp_path / "a", **LLAMA_ADAPTERS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(tied_base, dtype=torch.float32)
        peft = PeftModel.from_pretrained(model, str(adapter)).eval()
    base, ids = loaded(tied_base), PROBE[:, :12]
    printed = peft.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    expected = [token for token in printed[0, 12:].tolist() if token != base.eos_id]
    with adapted(base, adapter, fast_when=True) as (on_base, _):
        assert dict(Decoder(on_base, base, 12, 1).complete([ids[0].tolist()])) == {0: expected}


def test_the_next_adapter_is_measured_on_the_base_as_it_was(tmp_path: Path, gpt2_base: str) -> None:
    whole = make_adapter(gpt2_base, tmp_path / "w", **GPT2_ADAPTERS["all biases"])
    plain = make_adapter(gpt2_base, tmp_path / "p", **GPT2_ADAPTERS["plain"])
    text = write_rows(tmp_path / "text.jsonl", text_rows("valid", 6))
    losses: list[dict[str, float | None]] = []
    for number, order in enumerate(((whole, plain), (plain, whole))):
        names = tuple(map(str, order))
        found = evaluate(
            EvaluateSettings(
                base=gpt2_base, adapters=(*names, "base"), general_text=(text,),
                out=tmp_path / str(number), quiet=True,
            )
        )  # fmt: skip
        losses.append({name: f.general_loss for name, f in found.forgetting.items()})
    assert losses[0] == losses[1]
    assert len(set(losses[0].values())) == 3


def test_the_last_adapter_is_known_not_to_fit_before_the_first_is_measured(
    tmp_path: Path, gpt2_base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fits, cut = (make_adapter(gpt2_base, tmp_path / name) for name in ("fits", "cut"))
    file = cut / "adapter_model.safetensors"
    weights_of_it = load_file(file)
    missing = weights_of_it.popitem()[0]
    save_file(weights_of_it, file)
    text = write_rows(tmp_path / "text.jsonl", text_rows("valid", 2))
    with pytest.raises(ModelError, match=re.escape(missing)):
        evaluate(
            EvaluateSettings(
                base=gpt2_base, adapters=(str(fits), str(cut)), general_text=(text,),
                out=tmp_path / "out",
            )
        )  # fmt: skip
    assert "evaluating" not in capsys.readouterr().err


def test_whole_layers_for_a_quantized_base_are_refused_with_the_way_out(
    tmp_path: Path, tiny_base: str, quantized_base: str
) -> None:
    whole = make_adapter(
        tiny_base, tmp_path / "w", target_modules=["q_proj"], modules_to_save=["down_proj"]
    )
    base = loaded(quantized_base)
    with pytest.raises(ModelError, match="as it was before quantization"):
        attach_adapter(base.model, whole, trainable=False)


def test_adapters_on_a_quantized_base_are_measured_unfolded_in_any_order(
    tmp_path: Path, quantized_base: str
) -> None:
    layers = ["q_proj", "down_proj"]
    adapters = [
        make_adapter(quantized_base, tmp_path / name, target_modules=layers, use_dora=dora)
        for name, dora in (("plain", False), ("dora", True))
    ]
    base = loaded(quantized_base)
    before, plain = state(base), logits_of(base.model)
    for adapter in (*adapters, *reversed(adapters)):
        with adapted(base, adapter, fast_when=True) as (model, _):
            expected = logits_in_peft(quantized_base, adapter)
            torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits_of(base.model), plain)
    assert_untouched(base, before)


def test_an_adapter_trained_on_a_quantized_base_is_measured_as_in_peft(
    tmp_path: Path, quantized_base: str, problems: str
) -> None:
    base = loaded(quantized_base)
    before = state(base)
    adapter = adapt(
        AdaptSettings(
            base=quantized_base, data=(problems,), rank=4, max_steps=3, learning_rate=1e-1,
            out=tmp_path / "a", quiet=True,
        ),
        base,
    )  # fmt: skip
    assert_untouched(base, before)
    check_says_the_same_and_leaves_no_trace(quantized_base, adapter.path)


def test_every_layer_of_a_quantized_base_learns_after_passes_without_gradients(
    quantized_base: str,
) -> None:
    base = loaded(quantized_base)
    shape = LoraShape(4, 8.0, 0.0, ("all-linear",))
    model = attach_fresh(base.model, shape, 0)
    logits_of(model)
    model(input_ids=PROBE).logits.square().mean().backward()
    moved = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
    assert moved
    assert all(grad is not None and grad.abs().max() > 0 for grad in moved.values())


def test_a_fresh_adapter_leaves_the_dropout_of_the_base_off(gpt2_base: str) -> None:
    base = loaded(gpt2_base)
    attach_fresh(base.model, LoraShape(4, 8.0, 0.0, ("c_attn",)), 0)
    dropouts = [m for m in base.model.modules() if type(m) is torch.nn.Dropout]
    assert dropouts
    assert not any(dropout.training for dropout in dropouts)


@pytest.mark.parametrize("bits", [4, 8])
def test_operations_of_a_quantized_base_are_those_of_the_base_before(
    tmp_path: Path, wide_base: str, bits: int
) -> None:
    quantized = quantize(wide_base, tmp_path / "q", bits)
    shape = LoraShape(4, 8.0, 0.0, ("all-linear",))
    one, other = (
        TrainingFlops.of(attach_fresh(loaded(base).model, shape, 0))
        for base in (wide_base, quantized)
    )
    assert one is not None
    assert one == other


def test_an_initialization_that_peft_cannot_compute_is_refused_by_name(
    tmp_path: Path, wide_base: str, problems: str, capsys: pytest.CaptureFixture[str]
) -> None:
    eight = quantize(wide_base, tmp_path / "eight", 8)
    given = ["adapt", "--base", eight, "--data", problems, "--out", str(tmp_path / "o")]
    assert main([*given, "--init", "orthogonal"]) == 2
    assert "those of this base are quantized" in capsys.readouterr().err


def test_ranks_of_initializations_on_a_quantized_base_are_those_of_its_layers(
    quantized_base: str,
) -> None:
    model = loaded(quantized_base).model
    check_init("eva", LoraShape(16, 32.0, 0.0, ("q_proj",)), model)
    with pytest.raises(SettingsError, match="supports ranks up to 64"):
        check_init("eva", LoraShape(65, 32.0, 0.0, ("q_proj",)), model)


def test_what_would_change_quantized_weights_is_refused(
    tmp_path: Path, quantized_base: str, problems: str
) -> None:
    adapter = make_adapter(quantized_base, tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(ModelError, match="its weights are quantized"):
        convert(
            ConvertSettings(
                base=quantized_base, adapter=str(adapter), merge=True, out=tmp_path / "m"
            )
        )
    with pytest.raises(SettingsError, match="those of this base are quantized"):
        adapt(
            AdaptSettings(
                base=quantized_base, data=(problems,), init="pissa", out=tmp_path / "p", quiet=True
            )
        )


@pytest.mark.parametrize(
    "kind", ["plain", "DoRA", "the head", "the embedding", "a whole head", "tokens"]
)
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_merged_model_read_from_its_folder_says_what_the_adapter_says(
    tmp_path: Path, tiny_base: str, tied_base: str, kind: str, *, tied: bool
) -> None:
    name = tied_base if tied else tiny_base
    adapter = make_adapter(name, tmp_path / "a", **LLAMA_ADAPTERS[kind])
    done = convert(ConvertSettings(base=name, adapter=str(adapter), merge=True, out=tmp_path / "m"))
    merged = AutoModelForCausalLM.from_pretrained(done.path)
    torch.testing.assert_close(
        logits_of(merged), logits_in_peft(name, adapter), rtol=1e-4, atol=1e-4
    )


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path: Path, tiny_base: str) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "a", **LLAMA_ADAPTERS["a bias of B"])
    with pytest.raises(ModelError, match="cannot be merged"):
        convert(
            ConvertSettings(base=tiny_base, adapter=str(adapter), merge=True, out=tmp_path / "m")
        )
    assert not (tmp_path / "m").exists()


def test_a_converted_adapter_and_a_merged_model_take_the_place_behind_a_link(
    tmp_path: Path, tiny_base: str, warm_start: WarmStart
) -> None:
    for asked in ({"rank": 2}, {"merge": True, "base": tiny_base}):
        target, link = tmp_path / f"target-{len(asked)}", tmp_path / f"link-{len(asked)}"
        target.mkdir()
        link.symlink_to(target)
        convert(ConvertSettings(adapter=str(warm_start.path), out=link, **asked))
        assert link.is_symlink()
        assert (target / "done.json").is_file()


def rewritten(adapter: Path, out: Path, rename: Any) -> Path:
    """Copy an adapter, each weight renamed, reshaped or (None) left out."""
    shutil.copytree(adapter, out)
    path = out / "adapter_model.safetensors"
    items = (rename(name, value) for name, value in load_file(path).items())
    save_file({name: value for item in items if item for name, value in [item]}, path)
    return out


UNFIT: dict[str, tuple[Any, str]] = {
    "compiled": (
        lambda n, v: (n.replace("model.model.", "model._orig_mod.model."), v),
        r"28 of 28 weights have names .*base_model\._orig_mod\.model\.model\.layers\.0",
    ),
    "deeper": (
        lambda n, v: (n.replace("layers.1.", "layers.7."), v),
        r"(?s)weights without a place in the base \(14\): .*layers\.7\.mlp.* and 11 more.*"
        r"missing weights \(14\): .*layers\.1\.mlp",
    ),
    "missing": (
        lambda n, v: None if "1.mlp.up_proj.lora_B" in n else (n, v),
        r"missing weights \(1\): \S+layers\.1\.mlp\.up_proj\.lora_B\.weight",
    ),
    "unknown": (
        lambda n, v: (n.replace("0.mlp.up_proj.lora_B.weight", "0.mlp.up_proj.extra"), v),
        r"weights without a place in the base \(1\): \S+layers\.0\.mlp\.up_proj\.extra",
    ),
    "misshapen": (
        lambda n, v: (n, v[:, :-1].contiguous() if "0.mlp.up_proj.lora_A" in n else v),
        r"of another shape \(1\): \S+up_proj\.lora_A\.weight \(4, 31\) instead of \(4, 32\)",
    ),
    "rounded to 8 bits": (
        lambda n, v: (n, (100 * v).to(torch.int8) if "0.mlp.up_proj.lora_A" in n else v),
        r"up_proj\.lora_A\.weight is of int8: a quantized adapter",
    ),
    "infinite": (
        lambda n, v: (n, v * torch.inf if "0.mlp.up_proj.lora_A" in n else v),
        r"weights that are not finite: \S+up_proj\.lora_A\.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_an_adapter_whose_weights_do_not_fit_is_refused_with_their_names_and_leaves_no_trace(
    tmp_path: Path, tiny_base: str, kind: str
) -> None:
    rename, message = UNFIT[kind]
    whole = make_adapter(tiny_base, tmp_path / "whole", target_modules="all-linear")
    unfit = rewritten(whole, tmp_path / "unfit", rename)
    base = loaded(tiny_base)
    before, plain = state(base), logits_of(base.model)
    for trainable in (False, True):
        with pytest.raises(ModelError, match=message):
            attach_adapter(base.model, unfit, trainable=trainable)
        with pytest.raises(ModelError, match=message), adapted(base, unfit, fast_when=True):
            pass
    assert_untouched(base, before)
    assert torch.equal(logits_of(base.model), plain)


@pytest.mark.parametrize("command", ["evaluate", "generate", "inspect", "convert", "mix", "merge"])
def test_every_command_reads_an_adapter_by_the_same_reader(
    tmp_path: Path, tiny_base: str, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    whole = make_adapter(tiny_base, tmp_path / "whole", target_modules=["q_proj"])
    unfit = str(rewritten(whole, tmp_path / "unfit", UNFIT["compiled"][0]))
    text = write_rows(tmp_path / "text.jsonl", text_rows("valid", 2))
    out = ["--out", str(tmp_path / "out")]
    lines = {
        "evaluate": ["evaluate", "--base", tiny_base, "--adapters", unfit, "--general-text", text],
        "generate": ["generate", "--base", tiny_base, "--adapter", unfit, "--prompt", "x"],
        "inspect": ["inspect", "--adapter", unfit],
        "convert": ["convert", "--adapter", unfit, "--rank", "2"],
        "mix": ["convert", "--adapter", str(whole), "--mix", unfit],
        "merge": ["convert", "--base", tiny_base, "--adapter", unfit, "--merge"],
    }
    assert main([*lines[command], *([] if command == "generate" else out)]) == 2
    assert "4 of 4 weights have names that PEFT would not find" in capsys.readouterr().err


def test_weights_that_were_resized_with_the_vocabulary_are_refused(
    tmp_path: Path, tiny_base: str
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "a", target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.weight"
    save_file({**load_file(path), name: torch.zeros(9, 32)}, path)
    with pytest.raises(ModelError, match=r"another shape \(1\): \S+embed_tokens\.weight \(9, 32\)"):
        attach_adapter(loaded(tiny_base).model, adapter, trainable=False)


def test_embeddings_saved_whole_beside_an_adapter_are_used_and_taken_off_again(
    tmp_path: Path, tiny_base: str
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "a", target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    size = AutoModelForCausalLM.from_pretrained(tiny_base).config.vocab_size
    embedding = torch.randn(size, 32, generator=torch.Generator().manual_seed(0))
    name = "base_model.model.model.embed_tokens.weight"
    save_file({**load_file(path), name: embedding}, path)
    check_says_the_same_and_leaves_no_trace(tiny_base, adapter)


def test_an_adapter_that_cannot_be_switched_off_is_no_warm_start(
    tmp_path: Path, gpt2_base: str, problems: str
) -> None:
    folder = make_adapter(gpt2_base, tmp_path / "a", **GPT2_ADAPTERS["all biases"])
    with pytest.raises(ModelError, match=r"replaces weights of the base: biases"):
        inspect(InspectSettings(adapter=str(folder), base=gpt2_base, data=(problems,)))
    base = loaded(gpt2_base)
    before = state(base)
    with pytest.raises(ModelError, match="not trained further"):
        WarmStart.load(folder).apply_to(base.model)
    assert_untouched(base, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "expected a LoRA adapter .* found 'IA3'"),
        ({"peft_type": "NEW"}, "expected a LoRA adapter .* found 'NEW'"),
        ({"r": "four"}, "`r` must be a whole number of at least 1, found 'four'"),
        ({"lora_alpha": None}, "`lora_alpha` must be a number, found None"),
        ({"target_modules": None}, "`target_modules` must be names or a pattern, found None"),
        ({"task_type": "SEQ_CLS"}, "`task_type` must be CAUSAL_LM, found 'SEQ_CLS'"),
        ({"init_lora_weights": "pissa"}, "made with --init pissa and never converted"),
        ({"layer_replication": [[0, 1]]}, "`layer_replication` repeats layers of the base"),
        ({"use_newest": True}, "`use_newest`: True is not known to the installed PEFT"),
        ({"target_modules": ["nowhere"]}, "does not fit the base: Target modules .*nowhere"),
        ({"target_modules": ["norm"]}, "does not fit the base: Target module .*Norm"),
        ({"target_modules": "("}, "`target_modules` is not a pattern: missing \\)"),
        ({"exclude_modules": "("}, "`exclude_modules` is not a pattern"),
        ({"rank_pattern": 5}, "`rank_pattern` must be an object of names and ranks, found 5"),
        ({"rank_pattern": {"q_proj": 0}}, "`rank_pattern` must be an object"),
        ({"alpha_pattern": {"(": 2}}, "`alpha_pattern` must be an object"),
        ({"lora_alpha": math.nan}, "`lora_alpha` must be a number, found nan"),
        ({"lora_dropout": "x"}, "`lora_dropout` must be a number"),
        ({"layers_to_transform": "x"}, "`layers_to_transform` must be layer numbers, found 'x'"),
        ({"modules_to_save": ["nope"]}, "`modules_to_save` without a module .*: nope"),
        ({"modules_to_save": 3}, "`modules_to_save` must be names, found 3"),
        ({"bias": "some"}, "`bias` must be none, all or lora_only, found 'some'"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_used_is_refused_with_the_reason(
    tmp_path: Path, tiny_base: str, changes: dict[str, Any], message: str
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "a", target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    base = loaded(tiny_base)
    before = state(base)
    with pytest.raises(ModelError, match=message):
        attach_adapter(base.model, adapter, trainable=False)
    assert_untouched(base, before)


def test_settings_of_a_newer_peft_that_are_off_are_not_in_the_way(
    tmp_path: Path, tiny_base: str
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "a", target_modules=["q_proj"])
    expected = logits_in_peft(tiny_base, adapter)
    path = adapter / "adapter_config.json"
    new = {"newest_config": None, "use_newest": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), **new}))
    with adapted(loaded(tiny_base), adapter, fast_when=True) as (model, _):
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345678\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_model.safetensors", POINTER, "safetensors: a Git LFS pointer"),
        ("adapter_config.json", POINTER, "config.json: a Git LFS pointer"),
        ("adapter_model.safetensors", "\x08\0\0\0\0\0\0\0{", "not a safetensors file, or cut off"),
        ("adapter_model.safetensors", "", "not a safetensors file, or cut off"),
        ("adapter_config.json", '{"peft_type": "LORA", "r": 4, "lora', "not JSON, or cut off"),
        ("adapter_config.json", "[]", "expected an object, found list"),
    ],
)
def test_a_damaged_file_of_an_adapter_is_named_with_what_it_is(
    tmp_path: Path, tiny_base: str, file: str, content: str, message: str
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "a", target_modules=["q_proj"])
    (adapter / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        attach_adapter(loaded(tiny_base).model, adapter, trainable=False)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_model.safetensors", POINTER, "adapter_model.safetensors: a Git LFS pointer"),
        ("adapter_config.json", '{"r": 4, "lora', "adapter_config.json: not JSON, or cut off"),
    ],
)
def test_a_damaged_adapter_is_refused_before_the_first_is_measured(
    tmp_path: Path, tiny_base: str, capsys: pytest.CaptureFixture[str], file: str, content: str,
    message: str,
) -> None:  # fmt: skip
    damaged = make_adapter(tiny_base, tmp_path / "a", target_modules=["q_proj"])
    (damaged / "adapter_model.safetensors").unlink()
    (damaged / file).write_text(content)
    text = write_rows(tmp_path / "text.jsonl", text_rows("valid", 2))
    line = ["evaluate", "--base", tiny_base, "--adapters", "base", str(damaged)]
    assert main([*line, "--general-text", text, "--out", str(tmp_path / "e")]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "evaluating" not in printed


def test_a_damaged_base_is_named_with_what_it_is(tmp_path: Path, tiny_base: str) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="not a safetensors file, or cut off"):
        loaded(str(base))
    weights.write_text(POINTER)
    with pytest.raises(ModelError, match="a Git LFS pointer"):
        loaded(str(base))
    weights.write_bytes(whole)
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(ModelError, match="holds an adapter"):
        loaded(str(base))


def test_all_linear_leaves_out_the_head_whatever_its_name() -> None:
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    names = linear_names(GPTNeoXForCausalLM(config))
    assert names == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]


def test_all_linear_takes_the_layers_of_gpt2_and_trains_them(
    tmp_path: Path, gpt2_base: str, problems: str
) -> None:
    base = loaded(gpt2_base)
    assert linear_names(base.model) == ["c_attn", "c_fc", "c_proj"]
    before = state(base)
    for init in ("fresh", "pissa"):
        adapter = adapt(
            AdaptSettings(
                base=gpt2_base, data=(problems,), init=init, rank=4, max_steps=3,
                learning_rate=1e-2, max_length=256, overlong="truncate", out=tmp_path / init,
                quiet=True,
            ),
            base,
        )  # fmt: skip
        assert_untouched(base, before)
        check_says_the_same_and_leaves_no_trace(gpt2_base, adapter.path)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (r".*\.z_proj", r"no linear layer's whole name matches `\.\*\\\.z_proj`"),
        ("q_.*", r"no linear layer's whole name matches `q_\.\*`"),
        ("self_attn", "`self_attn` is a LlamaAttention, not a linear layer"),
        ("norm", "`norm` is a LlamaRMSNorm, not a linear layer"),
    ],
)
def test_a_target_that_is_no_name_of_layers_is_refused(
    tmp_path: Path, tiny_base: str, problems: str, target: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        adapt(
            AdaptSettings(
                base=tiny_base, data=(problems,), targets=(target,), out=tmp_path / "a", quiet=True
            )
        )


def test_an_adapter_trained_on_a_tied_head_scores_as_in_peft(
    tmp_path: Path, tied_base: str, problems: str
) -> None:
    base = loaded(tied_base)
    before = state(base)
    adapter = adapt(
        AdaptSettings(
            base=tied_base, data=(problems,), targets=("lm_head",), rank=4, max_steps=4,
            learning_rate=1e-1, out=tmp_path / "a", quiet=True,
        ),
        base,
    )  # fmt: skip
    assert_untouched(base, before)
    check_says_the_same_and_leaves_no_trace(tied_base, adapter.path)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_an_adapter_of_new_tokens_is_evaluated_as_peft_has_it(
    tmp_path: Path, tiny_base: str, tied_base: str, *, tied: bool
) -> None:
    name = tied_base if tied else tiny_base
    adapter = make_adapter(name, tmp_path / "a", **LLAMA_ADAPTERS["tokens"])
    base, text = loaded(name), text_rows("valid", 4)
    found = evaluate(
        EvaluateSettings(
            base=name, adapters=(str(adapter),), out=tmp_path / "e", quiet=True,
            general_text=(write_rows(tmp_path / "t.jsonl", text),),
        )
    )  # fmt: skip
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), str(adapter))
    total, n_tokens = 0.0, 0
    for row in text:
        ids = torch.tensor([Encoder.of(base, None).encode(Example((), row["text"])).ids])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        total += float(loss) * (ids.shape[1] - 1)
        n_tokens += ids.shape[1] - 1
    loss = found.forgetting[str(adapter)].general_loss
    assert loss == pytest.approx(total / n_tokens, rel=1e-4)
    (row,) = generate(
        GenerateSettings(base=name, adapter=str(adapter), prompt="Hi", max_new_tokens=4)
    )
    assert isinstance(row["output"], str)


def test_an_adapter_that_names_another_base_is_warned_of(
    tmp_path: Path, tiny_base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "a", target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    words = ["generate", "--base", tiny_base, "--adapter", str(adapter), "--prompt", "x"]
    words += ["--max-new-tokens", "1"]
    for named, warned in ((tiny_base, False), ("owner/another-model", True), (None, False)):
        path.write_text(json.dumps({**config, "base_model_name_or_path": named}))
        assert main(words) == 0
        assert (f"was made on {named}" in capsys.readouterr().err) == warned


def test_names_in_an_adapters_settings_have_one_order_in_every_process(
    warm_start: WarmStart,
) -> None:
    config = json.loads((warm_start.path / "adapter_config.json").read_text())
    assert len(config["target_modules"]) > 3
    assert config["target_modules"] == sorted(config["target_modules"])


def test_an_embedding_that_peft_does_not_know_by_name_is_trained_whole_with_its_head(
    tmp_path: Path, gpt2_base: str, problems: str
) -> None:
    adapter = adapt(
        AdaptSettings(
            base=gpt2_base, data=(problems,), n=8, rank=4, max_steps=2, learning_rate=1e-2,
            max_length=200, overlong="truncate", modules_to_save=("wte",), out=tmp_path / "a",
            quiet=True,
        )
    )  # fmt: skip
    check_says_the_same_and_leaves_no_trace(gpt2_base, adapter.path)
    whole = [
        w
        for name, w in load_file(adapter.path / "adapter_model.safetensors").items()
        if ".lora_" not in name
    ]
    assert len(whole) == 2
    assert torch.equal(*whole)
