"""What llama.cpp calls an architecture, its parameters and its weights, and how it orders them.

It follows llama.cpp's own conversion: https://github.com/ggml-org/llama.cpp/tree/master/conversion
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedConfig

from d2lora.errors import ModelError


@dataclass(frozen=True)
class _Kind:
    """How llama.cpp computes one family of models."""

    architecture: MODEL_ARCH
    activation: str = "silu"
    interleaved: bool = False
    """Whether rows of queries and keys alternate between the halves that rotate together."""
    shifted_norms: bool = False
    """Whether norms multiply by one more than their weights, which llama.cpp adds beforehand."""
    biases: bool = False
    """Whether attention may have them, beyond those that the family always has."""


_KINDS = {
    "llama": _Kind(MODEL_ARCH.LLAMA, interleaved=True, biases=True),
    "mistral": _Kind(MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": _Kind(MODEL_ARCH.QWEN2),
    "qwen3": _Kind(MODEL_ARCH.QWEN3),
    "gemma2": _Kind(MODEL_ARCH.GEMMA2, "gelu_pytorch_tanh", shifted_norms=True),
    "gemma3_text": _Kind(MODEL_ARCH.GEMMA3, "gelu_pytorch_tanh", shifted_norms=True),
}
"""`model_type` of transformers -> what it is to llama.cpp."""
_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6}
"""One layer in so many sees everything, by llama.cpp's own rule."""


@dataclass(frozen=True)
class GgufShape:
    """A model as llama.cpp sees it."""

    config: PreTrainedConfig
    kind: _Kind

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        """Return the shape of a configuration.

        Raises:
            ModelError: If llama.cpp would compute something else, with what it is.
        """
        name = config.model_type
        if name not in _KINDS:
            raise ModelError(
                f"a GGUF file can be written of {', '.join(_KINDS)}; this base is {name}: serve "
                "the adapter beside the base, or convert it with llama.cpp's own scripts"
            )
        kind = _KINDS[name]
        if odd := [fault for fault in _oddities(config, kind) if fault]:
            raise ModelError(f"llama.cpp would compute another {name}: {odd[0]}")
        return cls(config, kind)

    @property
    def architecture(self) -> str:
        """Its name in GGUF files."""
        return MODEL_ARCH_NAMES[self.kind.architecture]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding, which then stands in the file alone."""
        return bool(self.config.tie_word_embeddings)

    def name_of(self, name: str) -> str:
        """Return the name of a weight in GGUF files.

        Args:
            name: As in transformers, with `.weight` or `.bias`.

        Raises:
            ModelError: If llama.cpp has no such weight.
        """
        names = get_tensor_name_map(self.kind.architecture, self.config.num_hidden_layers)
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"llama.cpp has no place for {name} in a {self.architecture} model")
        return found

    def ordered(self, name: str, value: Tensor) -> Tensor:
        """Return a weight as llama.cpp wants it, or the B of a layer's adapter.

        Args:
            name: As in transformers, with `.weight` or `.bias`.
            value: Its rows are the layer's outputs.
        """
        layer = name.rpartition(".")[0].rpartition(".")[2]
        if self.kind.interleaved and layer in {"q_proj", "k_proj"}:
            config = self.config
            n = config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads
            halves = value.reshape(n, 2, len(value) // n // 2, *value.shape[1:])
            return halves.swapaxes(1, 2).reshape(value.shape)
        if self.kind.shifted_norms and name.endswith("norm.weight"):
            return value + 1
        return value

    def extra_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what is in GGUF files and in no checkpoint: factors of Llama 3's rotary angles."""
        rope = _rope(self.config)
        if rope.get("rope_type") == "llama3":
            yield "rope_freqs.weight", _llama3_factors(rope, _head_dim(self.config))

    def describe(self, writer: GGUFWriter) -> None:
        """Write the architecture's parameters."""
        config, head_dim = self.config, _head_dim(self.config)
        window: int = getattr(config, "sliding_window", None) or 0
        context = config.max_position_embeddings
        if config.model_type == "mistral" and window:
            context = min(context, window)  # llama.cpp's Llama has no window; within it both agree
        writer.add_context_length(context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_vocab_size(config.vocab_size)
        rope = _rope(config)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        if config.model_type in {"llama", "mistral"}:
            writer.add_rope_dimension_count(head_dim)
        if config.model_type in _FULL_EVERY:
            writer.add_sliding_window(window)
        if config.model_type == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if config.model_type == "gemma3_text":
            local = config.rope_parameters["sliding_attention"]["rope_theta"]
            writer.add_rope_freq_base_swa(local)


def _oddities(config: PreTrainedConfig, kind: _Kind) -> Iterator[str]:
    """Yield what llama.cpp takes no notice of, as it has one way for the whole family."""

    def told(name: str, default: Any = None) -> Any:
        return getattr(config, name, default)

    activation = told("hidden_activation") or told("hidden_act")
    if activation != kind.activation:
        yield f"its units are {kind.activation}, here they are {activation}"
    rope_type = _rope(config).get("rope_type", "default")
    known = {"default", "linear"} | ({"llama3"} if config.model_type == "llama" else set())
    if rope_type not in known:
        yield f"rotary angles of the type `{rope_type}` are not written"
    if told("attention_bias") and not kind.biases:
        yield "attention has biases"
    if told("use_sliding_window"):
        yield "attention has a sliding window"
    if told("query_pre_attn_scalar", _head_dim(config)) != _head_dim(config):
        yield "attention is scaled by something else than the width of a head"
    every = _FULL_EVERY.get(config.model_type)
    full = [i % every == every - 1 for i in range(config.num_hidden_layers)] if every else []
    if every and full != [kind == "full_attention" for kind in told("layer_types")]:
        yield f"one layer in {every} sees everything, here others do"
    if config.model_type == "gemma3_text" and told("final_logit_softcapping"):
        yield "logits are capped"


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the parameters of the rotary angles, of layers that see everything."""
    rope: dict[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Return what llama.cpp divides each rotary frequency by.

    As `_compute_llama3_parameters` of transformers has them.
    """
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    places = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = rope["rope_theta"] ** -places
    turns = original * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
