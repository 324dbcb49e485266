"""GGUF bases: the model's own numbers, converted once; damaged files are errors."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from d2lora import AdaptSettings, ModelError, adapt
from d2lora.adapters.base import load_base
from d2lora.adapters.base_files import base_folder
from d2lora.adapters.gguf import converted_gguf
from d2lora.adapters.gguf_header import read_header
from d2lora.adapters.manifest import Adapter
from d2lora.settings import BaseSettings

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_ENDS = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}


def _interleaved(weight: NDArray[np.float32], n_heads: int) -> NDArray[np.float32]:
    """Order rows as llama.cpp's rotary embedding wants them."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(base: str, path: Path) -> Path:
    """Write a Llama with a byte-level tokenizer as a GGUF file in float32."""
    model = LlamaForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    parts = tokenizer.backend_tokenizer.model
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    merges = json.loads(parts.__getstate__())["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        value = tensor.float().numpy()
        own = name.removeprefix("model.")
        if own.startswith("layers."):
            _, number, rest = own.split(".", 2)
            layer = rest.removesuffix(".weight")
            n_heads = heads.get(layer.rsplit(".", 1)[-1])
            value = _interleaved(value, n_heads) if n_heads else value
            own = f"blk.{number}.{_NAMES[layer]}.weight"
        else:
            own = _ENDS.get(own, "output.weight")
        writer.add_tensor(own, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, tiny_base: str) -> Path:
    return write_gguf(tiny_base, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_base_computes_what_the_model_computes(gguf_file: Path, tiny_base: str) -> None:
    base = load_base(BaseSettings(base=str(gguf_file)))
    model = AutoModelForCausalLM.from_pretrained(tiny_base).to(torch.bfloat16).float()
    text = "A title for this text."
    ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
    assert base.tokenizer.eos_token == AutoTokenizer.from_pretrained(tiny_base).eos_token
    with torch.no_grad():
        expected, found = model(ids).logits, base.model(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert base.model.dtype == torch.float32
    assert base.quantization == "F32 (100.0%)"


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(
    gguf_file: Path, other_base: str, tmp_path: Path
) -> None:
    folder = converted_gguf(gguf_file)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert converted_gguf(gguf_file) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert base_folder(str(gguf_file.parent), None, gguf_file.name) == folder
    assert converted_gguf(write_gguf(other_base, tmp_path / gguf_file.name)) != folder


def test_what_a_killed_conversion_left_is_cleared_away(other_base: str, tmp_path: Path) -> None:
    file = write_gguf(other_base, tmp_path / "killed.gguf")
    folder = converted_gguf(file)
    shutil.rmtree(folder)
    left = folder.with_name(f".{folder.name}.tmp-12345678")
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert converted_gguf(file) == folder
    assert not left.exists()


def test_an_adapter_on_a_gguf_base_says_how_its_weights_were_quantized(
    gguf_file: Path, titles: str, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    adapt(
        AdaptSettings(
            base=str(gguf_file), data=(titles,), n=4, out=out, max_steps=1, rank=2, quiet=True
        )
    )
    manifest = Adapter.load(out).manifest
    assert manifest.base.quantization == "F32 (100.0%)"
    assert "F32 (100.0%)" in (out / "README.md").read_text(encoding="utf-8")


def test_a_folder_of_gguf_files_asks_for_the_name_of_one(gguf_file: Path) -> None:
    with pytest.raises(ModelError, match=f"--gguf-file {gguf_file.name}"):
        base_folder(str(gguf_file.parent))
    with pytest.raises(ModelError, match=r"no such file: other\.gguf"):
        base_folder(str(gguf_file.parent), None, "other.gguf")


def _cut(raw: bytes) -> bytes:
    return raw[: len(raw) - 100]


def _cut_in_the_header(raw: bytes) -> bytes:
    return raw[:200]


def _many_values(raw: bytes) -> bytes:
    return raw[:16] + struct.pack("<Q", 2**62) + raw[24:]


def _many_tensors(raw: bytes) -> bytes:
    return raw[:8] + struct.pack("<Q", 2**40) + raw[16:]


def _long_name(raw: bytes) -> bytes:
    return raw[:24] + struct.pack("<Q", 2**63) + raw[32:]


def _other_version(raw: bytes) -> bytes:
    return raw[:4] + struct.pack("<I", 9) + raw[8:]


def _endless_list(raw: bytes) -> bytes:
    key = b"tokenizer.ggml.tokens"
    place = raw.index(key) + len(key)
    return raw[: place + 8] + struct.pack("<Q", 2**61) + raw[place + 16 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "cut off: tensor"),
        (_cut_in_the_header, "cannot hold"),
        (_many_values, "cannot hold"),
        (_many_tensors, "cannot hold"),
        (_long_name, "cannot hold"),
        (_other_version, "version 2 or 3, found 9"),
        (_endless_list, "cannot hold"),
        (lambda raw: b"PK" + raw, "not a GGUF file"),
        (lambda _: b"", "not a GGUF file"),
    ],
)
def test_a_damaged_gguf_file_is_an_error_that_names_it(
    gguf_file: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(damage(gguf_file.read_bytes()))
    with pytest.raises(ModelError, match=message) as error:
        base_folder(str(path))
    assert "bad.gguf" in str(error.value)


def test_a_header_is_read_once_for_as_long_as_the_file_stays(
    gguf_file: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(gguf_file, tmp_path / "a.gguf"))
    first = read_header(path)
    assert read_header(path) is first
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1  # of a weight
    path.write_bytes(raw)
    os.utime(path, ns=(0, 0))
    assert read_header(path).fingerprint != first.fingerprint


def test_every_shortened_header_is_an_error(gguf_file: Path, tmp_path: Path) -> None:
    raw = gguf_file.read_bytes()
    path = tmp_path / "short.gguf"
    for length in range(0, 3000, 37):
        path.write_bytes(raw[:length])
        with pytest.raises(ModelError):
            read_header(path)


def test_an_architecture_that_transformers_does_not_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(path, "perceptron")
    writer.add_tensor("weight", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"architecture\s+`perceptron`"):
        base_folder(str(path))
