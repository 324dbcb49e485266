"""The base: a frozen causal language model with its tokenizer, known by a fingerprint.

Weights come from safetensors only and no code of a model repository is ever run.
"""

import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from d2lora.errors import ModelError
from d2lora.fingerprints import fingerprint_of
from d2lora.settings import BaseSettings

EMBEDDED = "embedded"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Base:
    """A base model, ready to compute."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    fingerprint: str

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
    folder = base_folder(settings.base, settings.revision)
    fingerprint = fingerprint_of(folder)
    tokenizer = load_tokenizer(settings)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype_of(settings.dtype, device), use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{settings.base}: not a causal language model: {reason}") from None
    model.requires_grad_(False)
    nn.Module.to(model, device).eval()
    base = Base(model, tokenizer, settings.base, settings.revision, fingerprint)
    if base.eos_id >= (n_rows := n_embedded(model)):
        raise ModelError(f"{settings.base}: {unknown_token(base.eos_id, tokenizer, n_rows)}")
    return base


def load_tokenizer(settings: BaseSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the base alone.

    Raises:
        ModelError: If there is none, or it has no EOS token.
    """
    folder = base_folder(settings.base, settings.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{settings.base}: not a causal language model: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{settings.base}: the tokenizer has no EOS token, so completions could not end; set "
            "`eos_token` in its tokenizer_config.json"
        )
    return tokenizer


def base_folder(name: str, revision: str | None = None, *, fetch: bool = True) -> Path:
    """Return the local folder of a base, fetching a hub model's files where needed and allowed.

    Raises:
        ModelError: If there is none.
    """
    if name == EMBEDDED:
        return Path(str(resources.files("d2lora") / "embedded" / "base"))
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: no model folder: it has no config.json")
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"{name}: no such folder; a base is `embedded`, a local folder or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(_FILES), local_files_only=not fetch
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{name}: no local folder of this name, and the hub gave none: {reason}"
        ) from None


def fingerprint_of_model(model: PreTrainedModel) -> str | None:
    """Return the fingerprint of the files that a model was loaded from; None where unknown."""
    folder = Path(str(model.config.name_or_path))
    return fingerprint_of(folder) if (folder / "config.json").is_file() else None


def device_of(name: str) -> torch.device:
    """Return the device named; `auto` is CUDA, then MPS, then the CPU.

    With several processes on one machine each takes the CUDA device of its local rank.

    Raises:
        ModelError: If it is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return device_of("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
    n_cuda = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= n_cuda:
        raise ModelError(f"--device {name}: torch sees {n_cuda} CUDA device(s); use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("--device mps: torch sees no MPS device; use --device cpu")
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the number format named; `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def read_adapter_config(folder: Path) -> LoraConfig:
    """Read the LoRA configuration of an adapter folder.

    Raises:
        ModelError: If the folder is no LoRA adapter, or its weights are missing.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{folder}: no adapter: it has no {ADAPTER_CONFIG}")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder}: the adapter has no {ADAPTER_WEIGHTS}")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder}: expected a LoRA adapter, found {config.peft_type}")
    init = str(config.init_lora_weights)
    if init.startswith("pissa") or init in {"olora", "corda", "lora_ga", "loftq"}:
        raise ModelError(
            f"{folder}: an adapter of --init {init} that was never converted: it belongs to a base "
            "whose weights were changed. Save it with PEFT's "
            "path_initial_model_for_weight_conversion, or make it anew with d2lora, which does so"
        )
    return config


def attach_adapter(
    model: PreTrainedModel, folder: Path, *, trainable: bool, dropout: float | None = None
) -> PeftModel:
    """Put a saved adapter on a model, with another dropout where one is given.

    A trainable one has its LoRA weights, and nothing else, open to gradients: PEFT loads
    adapters frozen by default (peft#282).

    Raises:
        ModelError: If it is no LoRA adapter or does not fit the model.
    """
    config = read_adapter_config(folder)
    config.inference_mode = not trainable
    if dropout is not None:
        config.lora_dropout = dropout
    try:
        attached = PeftModel.from_pretrained(
            model, str(folder), is_trainable=trainable, config=config
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder}: the adapter does not fit the base: {reason}") from None
    if not trainable:
        attached.requires_grad_(False)
    return attached.eval()


def detach_adapter(model: PeftModel) -> PreTrainedModel:
    """Take the adapter off again; the base is as it was before, bit for bit."""
    return model.unload()


@contextmanager
def merged(model: PeftModel) -> Generator[None]:
    """Fold the adapter into the base's weights inside the block, for faster scoring.

    Only for float32 bases, where folding costs no precision that matters; for others the block
    runs unfolded. Leaving it restores the base's weights bit for bit.
    """
    if next(model.parameters()).dtype != torch.float32:
        yield
        return
    layers = [m.get_base_layer() for m in model.modules() if isinstance(m, LoraLayer)]
    weights = [layer.get_parameter("weight") for layer in layers]
    kept = [weight.detach().clone() for weight in weights]
    tuner = model.base_model
    assert isinstance(tuner, LoraModel)
    tuner.merge_adapter()
    try:
        yield
    finally:
        tuner.unmerge_adapter()
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


def is_folded(model: nn.Module) -> bool:
    """Say whether an adapter is folded into the base's weights, in some layer at least."""
    return any(isinstance(layer, LoraLayer) and layer.merged for layer in model.modules())


def weight_of(layer: nn.Module) -> Any:
    """Return the one matrix that a linear layer multiplies with; None where there is none.

    An adapter has to be merged.
    """
    if isinstance(layer, LoraLayer):
        return weight_of(layer.get_base_layer()) if layer.merged else None
    return layer.weight if type(layer) is nn.Linear else None


def causal_model(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model inside a PEFT model, adapters in place."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def n_embedded(model: nn.Module) -> int:
    """Return how many tokens a model's embedding has rows for."""
    return len(causal_model(model).get_input_embeddings().get_parameter("weight"))


def unknown_token(token: int, tokenizer: PreTrainedTokenizerBase, n_rows: int) -> str:
    """Say that a tokenizer makes a token for which an embedding has no row."""
    return (
        f"the tokenizer makes token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), but the "
        f"base's embedding ends with {n_rows - 1}: the tokenizer is another model's, or "
        "tokens were added to it alone; take the base's own, or resize the embedding "
        "(resize_token_embeddings of transformers) and save both"
    )


def n_positions(model: nn.Module) -> int:
    """Return how many tokens a model takes in one row; `sys.maxsize` where it names no limit."""
    config = causal_model(model).config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def n_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Count parameters, each shared one once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def linear_names(model: nn.Module) -> Sequence[str]:
    """Return the distinct last names of a model's linear layers, for messages."""
    names = {
        name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    return sorted(names - {"lm_head"})
