"""A GGUF file says in llama.cpp what the adapter says in transformers, token for token."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from d2lora import (
    ConvertSettings,
    D2LoraError,
    WarmStart,
    convert,
)
from d2lora.embedded import general_rows
from d2lora.tools.gguf_shape import GgufShape
from d2lora.tools.gguf_tokens import Vocabulary
from d2lora.tools.gguf_write import GgufModel
from llama_cpp import LlamaCpp
from test_gguf import write_gguf

N = 12
TEXTS = (
    "How many apples are there in 12 boxes?",
    "  two  spaces\n\n\tAnd 2024: it's Ünïcödé, 你好 🚀!!",
    "<|eos|>, don't\r\n",
)
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 16,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama, untied, with biases": {"model_type": "llama", "attention_bias": True},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama 3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama, longer": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "head_dim": 8},
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 16, "sliding_window": 64},
    "gemma3": {
        "model_type": "gemma3_text", "query_pre_attn_scalar": 16, "sliding_window": 8,
        "num_hidden_layers": 7,
    },
}  # fmt: skip


def made(folder: Path, tiny_base: str, about: dict[str, Any]) -> Path:
    """Write a random model with the tiny base's tokenizer, and an adapter with random factors."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    values = {**SHAPE, "vocab_size": len(tokenizer) + 8, **about}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(values.pop("model_type"), **values, **ids, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():  # far enough from zero for norms and biases to count
            torch.nn.init.normal_(weight, std=0.3 if weight.dim() > 1 else 0.2)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.05)
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        lora = LoraConfig(
            r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return folder


def greedy(model: PreTrainedModel | PeftModel, ids: list[int], n: int = N) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=n, do_sample=False, pad_token_id=0
        )
    return out[0, len(ids) :].tolist()


def in_peft(base: Path | str, adapter: Path) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def written(base: Path | str, adapter: Path, out: Path, **changes: Any) -> Path:
    convert(ConvertSettings(base=str(base), adapter=str(adapter), out=out, **changes))
    return out


def without_effect(adapter: Path, folder: Path) -> Path:
    """Write an adapter that changes nothing, so that its merge is the base."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    name = "adapter_model.safetensors"
    save_file({k: v * 0 for k, v in load_file(adapter / name).items()}, folder / name)
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return folder


def test_a_merged_model_is_read_back_by_transformers(
    tmp_path: Path, tiny_base: str, warm_start: WarmStart
) -> None:
    written(tiny_base, warm_start.path, tmp_path / "model", merge=True)
    written(tiny_base, warm_start.path, tmp_path / "model.gguf", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    weights = merged.state_dict()
    assert weights.keys() == read.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in read.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(tiny_base)(TEXTS[0])["input_ids"]
    assert greedy(merged, ids) == greedy(read, ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_says_the_same_of_the_merged_model_and_of_the_adapter_beside_its_base(
    tmp_path: Path, tiny_base: str, family: str
) -> None:
    folder = made(tmp_path, tiny_base, FAMILIES[family])
    base, adapter = folder / "base", folder / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(TEXTS[0])["input_ids"]
    expected = greedy(in_peft(base, adapter), ids)
    merged = LlamaCpp(written(base, adapter, tmp_path / "model.gguf", merge=True))
    assert merged.continued(ids, N) == expected
    assert [merged.encoded(text) for text in TEXTS] == [
        tokenizer(text)["input_ids"] for text in TEXTS
    ]
    zero = without_effect(adapter, tmp_path / "zero")
    alone = written(base, zero, tmp_path / "base.gguf", merge=True)
    both = LlamaCpp(alone, written(base, adapter, tmp_path / "adapter.gguf"))
    assert both.continued(ids, N) == expected
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert LlamaCpp(alone).continued(ids, N) == greedy(plain, ids) != expected


def byte_fallback_tokenizer(*, space_first: bool) -> PreTrainedTokenizerFast:
    """Return a small tokenizer of SentencePiece's kind, as those of Llama 2 and Gemma are."""
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token=special[0]))
    replace = normalizers.Replace(" ", "\u2581")
    steps = [normalizers.Prepend("\u2581"), replace] if space_first else [replace]
    backend.normalizer = normalizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))]
    )
    rows = [row["prompt"] + row["completion"] for row in general_rows("train", 60)]
    backend.train_from_iterator((row.replace("\n", " ") for row in rows), trainer)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    parts = json.loads(backend.to_str())  # bytes are no special tokens
    parts["added_tokens"] = parts["added_tokens"][: len(special)]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        **dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True)),
    )  # fmt: skip


@pytest.mark.parametrize("space_first", [True, False])
def test_llama_cpp_splits_text_as_a_sentencepiece_tokenizer_does(
    tmp_path: Path, tiny_base: str, space_first: bool
) -> None:
    tokenizer = byte_fallback_tokenizer(space_first=space_first)
    path = tmp_path / "model.gguf"
    model = LlamaForCausalLM.from_pretrained(tiny_base)
    model.resize_token_embeddings(len(tokenizer))
    GgufModel(GgufShape.of(model.config), tokenizer, None, torch.float32).write(model, path, "x")
    read = LlamaCpp(path)
    for text in (*TEXTS[:2], "", " a", "A title for this text."):
        assert read.encoded(text) == tokenizer(text)["input_ids"], text


def test_an_adapter_of_another_scale_keeps_it(tmp_path: Path, tiny_base: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    lora = LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "down_proj"],
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    path = written(tiny_base, tmp_path / "adapter", tmp_path / "adapter.gguf")
    reader = GGUFReader(path)
    assert reader.fields["adapter.lora.alpha"].contents() == 3
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    a, b = (tensors[f"blk.1.ffn_down.weight.lora_{side}"] for side in "ab")
    adapter = in_peft(tiny_base, tmp_path / "adapter")
    delta = adapter.base_model.model.model.layers[1].mlp.down_proj.get_delta_weight("default")
    torch.testing.assert_close(3 / 4 * b @ a, delta)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_take_the_dtype_that_is_asked_for(
    tmp_path: Path, tiny_base: str, warm_start: WarmStart, dtype: str
) -> None:
    adapter = written(tiny_base, warm_start.path, tmp_path / "adapter.gguf", dtype=dtype)
    model = written(tiny_base, warm_start.path, tmp_path / "model.gguf", merge=True, dtype=dtype)
    short = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert {t.tensor_type.name for t in GGUFReader(adapter).tensors} == {short}
    kinds = {t.tensor_type.name for t in GGUFReader(model).tensors if len(t.shape) > 1}
    assert kinds == {short}


def test_a_base_from_a_gguf_file_keeps_that_files_tokenizer(tmp_path: Path, tiny_base: str) -> None:
    source = write_gguf(tiny_base, tmp_path / "source.gguf")
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    lora = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    out = written(source, tmp_path / "adapter", tmp_path / "out.gguf", merge=True)
    old, new = (
        {k: f.contents() for k, f in GGUFReader(path).fields.items() if "tokenizer" in k}
        for path in (source, out)
    )
    assert new == old


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2}, "convert it into a folder first"),
        ({"scale": 0.5}, "convert it into a folder first"),
        ({"merge": True, "shard_size": "1GB"}, "shard_size is of a merged model's folder"),
        ({"merge": True, "shard_size": "many"}, "shard_size"),
        ({"base": "other"}, "has other weights"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(
    tmp_path: Path, tiny_base: str, other_base: str, warm_start: WarmStart,
    changes: dict[str, Any], message: str,
) -> None:  # fmt: skip
    base = other_base if "base" in changes else tiny_base
    settings = {**changes, "base": base}
    with pytest.raises(D2LoraError, match=message):
        convert(ConvertSettings(adapter=str(warm_start.path), out=tmp_path / "x.gguf", **settings))
    assert not list(tmp_path.iterdir())


def refused(tmp_path: Path, message: str, lora: LoraConfig, base: Path, **changes: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(D2LoraError, match=message):
        written(base, tmp_path / "adapter", tmp_path / "x.gguf", **changes)
    assert not list(tmp_path.glob("*x.gguf*"))


def test_other_families_are_refused(tmp_path: Path, tiny_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=400)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)
    refused(tmp_path, "this base is gpt2", lora, tmp_path / "base")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"model_type": "llama", "hidden_act": "gelu"}, "here they are gelu"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention has biases"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 99}, "the width of a head"),
        (
            {
                "model_type": "llama",
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            },
            "of the type `dynamic`",
        ),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(
    about: dict[str, Any], message: str
) -> None:
    values = {**SHAPE, **about}
    with pytest.raises(D2LoraError, match=message):
        GgufShape.of(AutoConfig.for_model(values.pop("model_type"), **values))


def test_an_adapter_of_a_shared_head_is_merged_or_refused(tmp_path: Path, tiny_base: str) -> None:
    folder = made(tmp_path / "made", tiny_base, FAMILIES["llama, tied"])
    lora = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a tied head
        refused(tmp_path, "shares with its embedding", lora, folder / "base")
        ids = AutoTokenizer.from_pretrained(tiny_base)(TEXTS[0])["input_ids"]
        path = written(folder / "base", tmp_path / "adapter", tmp_path / "m.gguf", merge=True)
        expected = greedy(in_peft(folder / "base", tmp_path / "adapter"), ids)
    assert LlamaCpp(path).continued(ids, N) == expected


def test_dora_is_refused(tmp_path: Path, tiny_base: str) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    refused(tmp_path, "only plain LoRA", lora, Path(tiny_base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pre_tokenizers.Whitespace(), "no name for how this tokenizer splits text .Whitespace"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "ByteLevel"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(
    tiny_base: str, change: Any, message: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.backend_tokenizer.pre_tokenizer = change
    with pytest.raises(D2LoraError, match=message):
        Vocabulary.of(tokenizer, len(tokenizer))


def test_a_tokenizer_of_more_tokens_than_the_embedding_has_rows_is_refused(tiny_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    with pytest.raises(D2LoraError, match="399 rows"):
        Vocabulary.of(tokenizer, len(tokenizer) - 1)


def test_a_file_that_is_there_stays(tmp_path: Path, tiny_base: str, warm_start: WarmStart) -> None:
    (tmp_path / "mine.gguf").write_text("mine")
    with pytest.raises(D2LoraError, match="is there already"):
        written(tiny_base, warm_start.path, tmp_path / "mine.gguf")
    assert (tmp_path / "mine.gguf").read_text() == "mine"
