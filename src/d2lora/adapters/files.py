"""The two files of an adapter, read and checked in this one place.

adapter_config.json         PEFT's configuration
adapter_model.safetensors   its weights; the names start with `base_model.model.`
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from d2lora.adapters.factors import Factors
from d2lora.adapters.fingerprints import unreadable
from d2lora.errors import ModelError, first_line, listed
from d2lora.runtime.limits import OverTimeError, within
from d2lora.settings import changes_base

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
_FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
_MOST_SECONDS = 3
"""Of this process, to match one pattern with the names of all modules."""
_MOST_ALPHA = 1e9
"""Beyond any strength that trains, and far from where a float of 32 bits ends."""
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module"}
_TEXTS = ("base_model_name_or_path", "revision", "peft_version")
_FLAGS = ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "inference_mode")
_UNUSED = {
    "auto_mapping", "runtime_config", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config",
}  # fmt: skip
"""Settings of how an adapter is made or loaded, which say nothing of what it computes."""
_UNSUPPORTED = {
    "layer_replication": "repeats layers of the base",
    "kasa_config": "changes the base's weights",
    "alora_invocation_tokens": "works from a token of the prompt on",
    "arrow_config": "routes between several adapters",
    "megatron_config": "is for Megatron's layers",
}


@dataclass(frozen=True)
class AdapterFiles:
    """A LoRA adapter read from its folder."""

    folder: Path
    config: LoraConfig
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read an adapter.

        Raises:
            ModelError: If it is not a LoRA adapter, or one of its files is missing or damaged.
        """
        config, weights = read_adapter_config(folder), _read_weights(folder / ADAPTER_WEIGHTS)
        _check_ranks(folder, config, weights)
        check_patterns(folder, config, [name.partition(".lora_")[0] for name in weights])
        return cls(folder, config, weights)

    @property
    def layers(self) -> dict[str, Factors]:
        """The factors of each layer, by the layer's name with PEFT's prefix."""
        names = sorted(n.removesuffix(LORA_A) for n in self.weights if n.endswith(LORA_A))
        return {
            name: Factors(self.weights[name + LORA_A], self.weights[name + LORA_B])
            for name in names
            if name + LORA_B in self.weights
        }

    def n_rows(self, n_embedded: int) -> int:
        """Return how many rows the adapter's base has, as the rows of new tokens say.

        Args:
            n_embedded: Rows that there are without new tokens.

        Raises:
            ModelError: If there are to be rows that do not come with the adapter.
        """
        ids = token_ids(self.config)
        n_rows = max(n_embedded, *(i + 1 for i in ids), 0)
        if n_rows - n_embedded > len(ids - set(range(n_embedded))):
            raise ModelError(
                f"{self.folder}: it has rows of tokens up to {n_rows - 1:,}, but not of all beyond "
                f"{n_embedded - 1:,}, where the base's embedding ends: it was made on another base"
            )
        return n_rows

    @property
    def beyond_factors(self) -> list[str]:
        """Names of weights that are not factors of `layers`."""
        factors = {name + end for name in self.layers for end in (LORA_A, LORA_B)}
        return sorted(self.weights.keys() - factors)


def token_ids(config: LoraConfig) -> set[int]:
    """Return the ids of tokens whose rows an adapter brings."""
    given: Any = config.trainable_token_indices or []
    return {i for own in (given.values() if isinstance(given, dict) else [given]) for i in own}


def some(names: list[str], shown: int = 3) -> str:
    """Return the first of many names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(n if len(n) <= 200 else f"{n[:200]}..." for n in names[:shown]) + more


def read_adapter_config(folder: Path) -> LoraConfig:
    """Read the LoRA configuration of an adapter folder.

    Raises:
        ModelError: If the folder is not a LoRA adapter, its configuration cannot be used, or its
            weights are missing.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise ModelError(f"{folder}: not an adapter: it has no {ADAPTER_CONFIG}")
    values = _json_object(path)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder}: the adapter has no {ADAPTER_WEIGHTS}")
    if values.get("peft_type") != "LORA":
        raise ModelError(
            f"{path}: expected a LoRA adapter (`peft_type` LORA), found {values.get('peft_type')!r}"
        )
    known = {field.name for field in fields(LoraConfig)}
    faults = _faults(values, known)
    if faults:
        raise ModelError(f"{path}: the adapter cannot be used:\n{listed(faults)}")
    try:
        with warnings.catch_warnings():
            # PEFT warns of settings that matter when an adapter is made, not afterwards.
            warnings.simplefilter("ignore")
            config = LoraConfig(**{k: v for k, v in values.items() if k in known - _UNUSED})
    except (TypeError, ValueError, ImportError) as error:
        raise ModelError(f"{path}: {first_line(error)}") from None
    config.init_lora_weights = True  # what is read replaces any initialization
    return config


def _json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        why = unreadable(path, f"not JSON, or cut off ({error})")
        raise ModelError(f"{path}: {why}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected an object, found {type(values).__name__}")
    return values


def _faults(values: dict[str, Any], known: set[str]) -> list[str]:
    """Return what is wrong with a configuration, a sentence each."""
    faults: list[str] = []
    rank, alpha, targets = (values.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if type(rank) is not int or rank < 1:
        faults.append(f"`r` must be a whole number of at least 1, found {rank!r}")
    if alpha is None or not _is_number(alpha):
        faults.append(f"`lora_alpha` must be a number, found {alpha!r}")
    elif abs(alpha) > _MOST_ALPHA:
        faults.append(f"`lora_alpha` must be at most {_MOST_ALPHA:g}, found {alpha!r}")
    if not (_are_names(targets) or (targets is None and values.get("target_parameters"))):
        faults.append(f"`target_modules` must be names or a pattern, found {targets!r}")
    faults += _faults_of_types(values)
    faults += [
        f"`{key}` is not a pattern: {error}"
        for key in ("target_modules", "exclude_modules", "layers_pattern")
        if isinstance(values.get(key), str) and (error := _pattern_error(values[key]))
    ]
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        faults.append(f"`task_type` must be CAUSAL_LM, found {values['task_type']!r}")
    init = str(values.get("init_lora_weights"))
    if changes_base(init):
        faults.append(
            f"it was made with --init {init} and never converted: it belongs to a base whose "
            "weights were changed. Save it with PEFT's path_initial_model_for_weight_conversion, "
            "or make it again with d2lora, which does so"
        )
    faults += [f"`{key}` {why}" for key, why in _UNSUPPORTED.items() if values.get(key)]
    # A newer PEFT writes settings that this one lacks; where they are off, nothing is missed.
    faults += [
        f"`{key}`: {values[key]!r} is not known to the installed PEFT; upgrade it, or delete the "
        "key if the adapter does not need it"
        for key in sorted(values.keys() - known)
        if values[key]
    ]
    return faults


def _faults_of_types(values: dict[str, Any]) -> list[str]:
    """Return which settings are of a type that PEFT would stumble over, or take for off."""
    names = ("exclude_modules", "layers_pattern", "modules_to_save", "target_parameters")
    kinds: list[tuple[str, str, Callable[[Any], bool]]] = [
        *((name, "names", _are_names) for name in names),
        ("rank_pattern", "an object of names and ranks", lambda v: _is_pattern(v, 1)),
        ("alpha_pattern", "an object of names and numbers", lambda v: _is_pattern(v, None)),
        ("lora_dropout", "a number", _is_number),
        ("layers_to_transform", "layer numbers", _are_numbers),
        ("trainable_token_indices", "token ids", _are_ids),
        ("bias", "none, all or lora_only", lambda v: v in ("none", "all", "lora_only")),
        *((name, "a text", lambda v: isinstance(v, str)) for name in _TEXTS),
        *((name, "true or false", lambda v: isinstance(v, bool)) for name in _FLAGS),
    ]
    return [
        f"`{name}` must be {kind}, found {values[name]!r}"
        for name, kind, fits in kinds
        if values.get(name) is not None and not fits(values[name])
    ]


def check_patterns(folder: Path, config: LoraConfig, names: Sequence[str]) -> None:
    """Match an adapter's patterns with the names of modules as PEFT will, within a time.

    Raises:
        ModelError: If one of them takes forever.
    """
    whole = [p for p in (config.target_modules, config.exclude_modules) if isinstance(p, str)]
    ends = [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]
    layers = config.layers_pattern or []
    layers = [layers] if isinstance(layers, str) else layers
    for pattern in (
        *whole,
        *(rf"(.*\.)?({end})" for end in ends),
        *(rf".*\.{layer}\.(\d+)\..*" for layer in layers),
    ):
        try:
            with within(_MOST_SECONDS):
                for name in names:
                    re.fullmatch(pattern, name)
        except OverTimeError:
            raise ModelError(
                f"{folder}: matching the pattern {pattern!r:.80} with the names of modules takes "
                f"more than {_MOST_SECONDS} s; simplify it"
            ) from None


def _check_ranks(folder: Path, config: LoraConfig, weights: dict[str, Tensor]) -> None:
    """Check that ranks are not far beyond those of the weights, as PEFT makes room for them first.

    Raises:
        ModelError: If one is.
    """
    largest = max(
        (max(w.shape) for n, w in weights.items() if ".lora_" in n and w.dim()), default=1
    )
    rank = max(config.r, *(config.rank_pattern or {}).values(), 1)
    if rank > max(1024, largest):
        raise ModelError(
            f"{folder}: {ADAPTER_CONFIG} has a rank of {rank:,}, and no weight is larger than "
            f"{largest:,}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(type(number) is int for number in numbers)


def _are_ids(value: Any) -> bool:
    ids = [*value.values()] if isinstance(value, dict) else [value]
    return all(isinstance(own, list) and all(type(i) is int and i >= 0 for i in own) for own in ids)


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


def _is_pattern(value: Any, least: int | None) -> bool:
    """Say whether a value maps patterns to numbers: whole ones of at least `least`, if given."""
    return (
        isinstance(value, dict)
        and all(
            _is_number(v) and (least is None or (isinstance(v, int) and v >= least))
            for v in value.values()
        )
        and not any(map(_pattern_error, value))
    )


def _pattern_error(text: str) -> str | None:
    try:
        re.compile(text)
    except re.error as error:
        return str(error)
    return None


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        weights = load_file(path)
    except (SafetensorError, OSError):
        why = unreadable(path, "not a safetensors file, or cut off")
        raise ModelError(f"{path}: {why}") from None
    if not weights:
        raise ModelError(f"{path}: the file holds no weights")
    odd = sorted(
        name
        for name in weights
        if not name.startswith(PREFIX) or not _WRAPPERS.isdisjoint(name.split("."))
    )
    if odd:
        raise ModelError(
            f"{path}: {len(odd)} of {len(weights)} weights have names that PEFT would not find: "
            f"{some(odd)}. They were saved from a wrapped model (torch.compile, FSDP): unwrap it "
            f"before saving, or rename them; each must start with `{PREFIX}`"
        )
    whole = sorted(name for name, weight in weights.items() if weight.dtype not in _FLOATS)
    if whole:
        kind = str(weights[whole[0]].dtype).removeprefix("torch.")
        raise ModelError(
            f"{path}: {some(whole)} is of {kind}: a quantized adapter; save it in float32, "
            "bfloat16 or float16"
        )
    endless = sorted(name for name, weight in weights.items() if not torch.isfinite(weight).all())
    if endless:
        raise ModelError(f"{path}: weights that are not finite: {some(endless)}")
    return weights
