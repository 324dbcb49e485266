"""The base: a frozen causal language model with its tokenizer, known by a fingerprint.

Weights come from safetensors only and no code of a model repository is ever run.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from d2lora.adapters import quantization, sharding
from d2lora.adapters.base_files import base_folder
from d2lora.adapters.chat_template import chosen_template, with_template
from d2lora.adapters.files import ADAPTER_CONFIG, some
from d2lora.adapters.fingerprints import Identity, fingerprint_of, identity_of
from d2lora.adapters.foreign import OF_PASSES, check_config, check_growth, foreign
from d2lora.adapters.gguf import quantization_of
from d2lora.adapters.tokens import with_tokens
from d2lora.errors import ModelError, counted, first_line
from d2lora.runtime.devices import device_of, dtype_of
from d2lora.runtime.rounding import tolerance
from d2lora.settings import BaseSettings

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Base:
    """A base model, ready to compute."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    fingerprint: str
    folder: Path
    """Where its files are."""
    quantization: str | None = None
    """How the weights are quantized, or were where they come from, such as GGUF; None: not."""
    chat_template: str | None = None
    """The chat template, where the settings give another than the tokenizer's own."""
    new_tokens: tuple[str, ...] = ()
    """Those that were added to the tokenizer, `with_tokens`."""

    def with_tokens(self, tokens: Sequence[str]) -> "Base":
        """Return the base with a tokenizer that knows more tokens.

        The model gets rows for them where an adapter that has them is put on it.

        Raises:
            SettingsError: If it has one of them already.
        """
        if tuple(tokens) == self.new_tokens:
            return self
        tokenizer = with_tokens(self.tokenizer, tokens)
        return replace(self, tokenizer=tokenizer, new_tokens=tuple(tokens))

    @property
    def new_ids(self) -> tuple[int, ...]:
        """The ids of the new tokens."""
        return tuple(_token_id(self.tokenizer.convert_tokens_to_ids(t)) for t in self.new_tokens)

    @property
    def n_rows(self) -> int:
        """How many rows the embedding has, or is to get for new tokens."""
        return max(n_embedded(self.model), *(token + 1 for token in self.new_ids), 0)

    @property
    def identity(self) -> Identity:
        """What other bases are compared with."""
        return identity_of(self.folder)

    @property
    def eos_id(self) -> int:
        """The token that ends a completion."""
        return _token_id(self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """A token for padding that is not EOS, so that EOS stays supervised (trl#1623).

        Tokenizers have pad tokens that the embedding has no row for; any other does as well.
        """
        tokenizer, n_rows = self.tokenizer, n_embedded(self.model)
        named = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
        for candidate in (_token_id(token) for token in named if token is not None):
            if candidate != self.eos_id and candidate < n_rows:
                return candidate
        return 0 if self.eos_id != 0 else 1


def _token_id(value: object) -> int:
    assert isinstance(value, int)
    return value


def load_base(settings: BaseSettings) -> Base:
    """Load the base that the settings name, in evaluation mode and frozen.

    Raises:
        ModelError: If it cannot be found, is not a causal language model, has no safetensors or
            no EOS token that it knows, or the device is not there.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = device_of(settings.device)
    folder = base_folder(settings.base, settings.revision, settings.gguf_file)
    if (folder / ADAPTER_CONFIG).is_file():
        # transformers would load the base that is named there, wherever that is.
        raise ModelError(
            f"{settings.base}: it holds an adapter ({ADAPTER_CONFIG}), not a base; give --base "
            "the model that the adapter was made on, or remove that file"
        )
    check_config(folder)
    fingerprint = fingerprint_of(folder)
    tokenizer = load_tokenizer(settings)
    template = chosen_template(settings, tokenizer)
    dtype = dtype_of(settings.dtype, device)
    loading = quantization.loading(settings, folder, dtype, device)
    loading |= sharding.loading(settings, folder, device)
    try:
        with foreign("not a causal language model"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True, **loading,
            )  # fmt: skip
    except ModelError as error:
        reason = quantization.why_not_loaded(settings, folder, str(error)) or str(error)
        raise ModelError(f"{settings.base}: {reason}") from None
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{settings.base}: {counted(len(missing), 'weight')} that config.json asks for "
            f"are not in its files, and would be random: {some(missing)}"
        )
    model.requires_grad_(False)
    remove_hook_from_module(model, recurse=True)  # accelerate's, of a model that is on one device
    quantization.prepare(model, dtype)
    sharding.prepare(model)
    nn.Module.to(model, device).eval()
    base = Base(
        model,
        with_template(tokenizer, template),
        settings.base,
        settings.revision,
        fingerprint,
        folder,
        " -> ".join(
            filter(None, (quantization_of(folder), quantization.in_words(settings, folder)))
        )
        or None,
        template,
    )
    check_causal(model, settings.base)
    sharding.check_length(model, settings, short_factor_limit(model))
    if base.eos_id >= (n_rows := n_embedded(model)):
        raise ModelError(f"{settings.base}: {unknown_token(base.eos_id, tokenizer, n_rows)}")
    return base


@torch.no_grad()
def check_causal(model: PreTrainedModel, name: str) -> None:
    """Check that a model computes token ids alone, and that no token sees those behind it.

    Raises:
        ModelError: If not: what it says of a token would be of no use, or no forecast.
    """
    n_rows = n_embedded(model)
    ids_1T = torch.arange(1, _PROBE_TOKENS + 1, device=model.device)[None] % n_rows
    half = _PROBE_TOKENS // 2
    other_1T = ids_1T.clone()
    other_1T[0, half:] = ids_1T[0, half:].flip(0)
    try:
        one, other = (model(input_ids=i, use_cache=False).logits for i in (ids_1T, other_1T))
    except OF_PASSES as error:
        raise ModelError(
            f"{name}: {type(model).__name__} is not supported: it does not compute token ids alone "
            f"({first_line(error)})"
        ) from None
    largest = float(one.abs().max())
    if math.isnan(largest):
        raise ModelError(
            f"{name}: its logits are NaN in {model.dtype}: its weights are damaged, or too "
            "large for this dtype; try --dtype float32"
        )
    off = (one[:, :half].float() - other[:, :half].float()).abs()
    if off.max() > _may_differ(model) * largest:
        raise ModelError(
            f"{name}: {type(model).__name__} is not supported as it is: its tokens see those "
            "behind them, so that they cannot be predicted (`is_decoder: true` in config.json "
            "makes some such models causal)"
        )


def _may_differ(model: PreTrainedModel) -> float:
    """Return by how much other tokens behind may change logits, of the largest.

    Only by how the work is cut up: tokens are sent to experts together, and layers of 8 bits round
    a batch together. Others compute each token by the same operations, so that not even the last
    bit changes; in 16 bits what an encoder sees behind a token may be no more than that.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(model, "is_quantized", False):
        return tolerance(torch.float16)
    if model.dtype == torch.float32 or any("expert" in name for name in config.to_dict()):
        return tolerance(model.dtype)
    return torch.finfo(model.dtype).eps


def load_tokenizer(settings: BaseSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the base alone.

    Raises:
        ModelError: If there is none, or it has no EOS token.
    """
    folder = base_folder(settings.base, settings.revision, settings.gguf_file)
    with foreign(f"{settings.base}: not a causal language model"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        check_growth(tokenizer.backend_tokenizer, settings.base)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ModelError(
            f"{settings.base}: `model_max_length` of its tokenizer_config.json must be a number, "
            f"found {tokenizer.model_max_length!r:.60}"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{settings.base}: the tokenizer has no EOS token, so completions could not end; set "
            "`eos_token` in its tokenizer_config.json"
        )
    return tokenizer


def tokenizer_of(settings: BaseSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the base alone, with the chat template that the settings give.

    Raises:
        D2LoraError: As `load_tokenizer` and `chosen_template`.
    """
    tokenizer = load_tokenizer(settings)
    return with_template(tokenizer, chosen_template(settings, tokenizer))


def identity_of_model(model: PreTrainedModel) -> Identity | None:
    """Return the identity of the files that a model was loaded from; None where unknown."""
    folder = Path(str(model.config.name_or_path))
    return identity_of(folder) if (folder / "config.json").is_file() else None


def weight_of(layer: nn.Module) -> Any:
    """Return the one matrix that a linear layer multiplies with; None where there is none.

    An adapter has to be merged.
    """
    if isinstance(layer, LoraLayer):
        return weight_of(layer.get_base_layer()) if layer.merged else None
    return layer.weight if type(layer) is nn.Linear else None


def is_plain(model: nn.Module) -> bool:
    """Say whether a model computes with plain weights alone: without adapters, or all merged.

    Modules that are trained whole, and rows of tokens, are in the weights that they show.
    """
    return all(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer))


def causal_model(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model inside a PEFT model, adapters in place."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def n_embedded(model: nn.Module) -> int:
    """Return how many tokens a model's embedding has rows for."""
    embedding: Any = causal_model(model).get_input_embeddings()
    while isinstance(embedding, BaseTunerLayer | AuxiliaryTrainingWrapper):
        if isinstance(embedding, BaseTunerLayer):
            embedding = embedding.get_base_layer()
        else:
            embedding = embedding.original_module
    return len(embedding.weight)


def head_weights(model: nn.Module) -> list[Tensor]:
    """Return the matrices that a model's head multiplies with, be they trained beside an adapter.

    Their rows are the words.
    """
    head: Any = causal_model(model).get_output_embeddings()
    if isinstance(head, AuxiliaryTrainingWrapper):
        weight: Any = head.weight
        return [weight]
    return [p for p in head.parameters(recurse=False) if p.ndim > 1]


def unknown_token(token: int, tokenizer: PreTrainedTokenizerBase, n_rows: int) -> str:
    """Return a message on a token for which an embedding has no row."""
    return (
        f"the tokenizer makes token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), but the "
        f"base's embedding ends with {n_rows - 1}: the tokenizer is another model's, or "
        "tokens were added to it alone; use the base's own, or resize the embedding "
        "(resize_token_embeddings of transformers) and save both"
    )


def n_positions(model: nn.Module) -> int:
    """Return how many tokens a model takes in one row; `sys.maxsize` where it names no limit."""
    config = causal_model(model).config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or 0
    return limit if limit > 0 else sys.maxsize  # XLNet's -1 means none


def short_factor_limit(model: nn.Module) -> int:
    """Return up to how many tokens a row's positions are turned by LongRoPE's short factors.

    The longest row of a pass decides for all, and a cache keeps keys as they were turned, so that
    rows on either side of the limit are computed apart. `sys.maxsize` for other kinds of RoPE:
    "dynamic" ones change beyond `n_positions` only.

    Source: Ding et al. 2024, LongRoPE, arXiv 2402.13753.
    """
    config = causal_model(model).config.get_text_config(decoder=True)
    ropes: Any = getattr(config, "rope_parameters", None) or {}
    of_layers = [ropes] if "rope_type" in ropes else ropes.values()
    limits = [
        rope["original_max_position_embeddings"]
        for rope in of_layers
        if rope and rope.get("rope_type") == "longrope"
    ]
    return min(limits, default=sys.maxsize)
