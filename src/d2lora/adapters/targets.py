"""The layers of a base that get an adapter.

`all-linear` takes every linear layer that text reaches, but for the head, the routers of experts,
and layers whose weights a model multiplies by itself, so that an adapter on them would do nothing.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import TypeGuard

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from d2lora.errors import SettingsError, did_you_mean, listed
from d2lora.runtime.attempts import succeeds

ALL_LINEAR = "all-linear"
_BY_ITSELF = {
    "mamba": {"out_proj", "dt_proj"},
    "falcon_mamba": {"out_proj", "dt_proj"},
    "mamba2": {"out_proj"},
    "falcon_h1": {"out_proj"},
    "nemotron_h": {"out_proj"},
}
"""Kind of model -> layers whose weights it multiplies by itself; PEFT refuses some of them."""
_INDEXER = "indexer"
_ROUTERS = {"gate", "router", "shared_expert_gate"}


def linear_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the layers that `all-linear` takes.

    Of each the last name, or as many names from the end as tell it from what is not taken.
    """
    taken = [name for name, reason in reasons(model).items() if not reason]
    others = {name for name, _ in model.named_modules()} - set(taken)
    ends = {end for name in others for end in _ends(name)}
    return sorted({next((e for e in _ends(name) if e not in ends), name) for name in taken})


def reasons(model: PreTrainedModel) -> dict[str, str]:
    """Return every linear layer by its name, and why `all-linear` leaves it out; else nothing."""
    head, reached = model.get_output_embeddings(), _reached(model)
    by_itself = _BY_ITSELF.get(str(getattr(model.config, "model_type", None)), set())
    found: dict[str, str] = {}
    for name, layer in model.named_modules():
        if not _is_linear(layer):
            continue
        last, parent = name.rpartition(".")[2], name.rpartition(".")[0]
        if layer is head:
            found[name] = "the head"
        elif last in _ROUTERS and hasattr(model.get_submodule(parent), "experts"):
            found[name] = "a router"
        elif last in by_itself:
            found[name] = "multiplied by the model itself"
        elif _INDEXER in parent.split("."):
            found[name] = "chooses what is attended to, and so has no gradient"
        else:
            found[name] = "" if _pattern(name) in reached else "not reached by text"
    return found


def coverage(model: PeftModel) -> str:
    """Return which layers have an adapter, and which linear layers and experts have none."""
    adapted: Counter[str] = Counter()
    left: Counter[str] = Counter()
    inside: tuple[str, ...] = ("\0",)
    for name, layer in model.get_base_model().named_modules():
        if name.startswith(inside):
            continue
        if isinstance(layer, BaseTunerLayer):
            adapted[_ends(name)[0]] += 1
            inside = (f"{name}.",)
        elif _is_linear(layer):
            left[_ends(name)[0]] += 1
    # Experts in one tensor are no linear layers.
    named = model.get_base_model().named_parameters()
    left.update(f"{_ends(name)[0]} of all experts" for name, p in named if p.ndim == 3)
    without = f"; none on {_listed(left)}" if left else ""
    return f"LoRA on {_listed(adapted)}{without}"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))


def _reached(model: PreTrainedModel) -> set[str]:
    """Return the linear layers that text runs through, numbers in their names left open.

    Of many experts a few tokens reach some; towers for pictures and cross-attention none.
    """
    layers = {name: layer for name, layer in model.named_modules() if _is_linear(layer)}
    called: set[str] = set()
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: called.add(_pattern(name)))
        for name, layer in layers.items()
    ]
    ids_1T = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        is_known = succeeds(lambda: model(input_ids=ids_1T, use_cache=False) is not None)
    for hook in hooks:
        hook.remove()
    return called if is_known else {_pattern(name) for name in layers}


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _ends(name: str) -> list[str]:
    """Return the ends of a module's name, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]


def _is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(layer, nn.Linear | Conv1D)


def target_layers(
    model: PreTrainedModel, targets: tuple[str, ...]
) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers, by full name, that get an adapter."""
    wanted = tuple(linear_names(model)) if targets == (ALL_LINEAR,) else targets
    for name, layer in model.named_modules():
        if _is_linear(layer) and any(_is_named(name, target) for target in wanted):
            yield name, layer


def _is_named(name: str, target: str) -> bool:
    """Say whether a target, a last name or a longer end of it, means a module, as in PEFT."""
    return name == target or name.endswith(f".{target}")


def check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Check that every target is a name of layers that LoRA can be put on.

    Raises:
        SettingsError: If one is not, with those that are.
    """
    if targets == (ALL_LINEAR,):
        return
    faults: list[str] = []
    for target in targets:
        found = [layer for name, layer in model.named_modules() if _is_named(name, target)]
        odd = [layer for layer in found if not (_is_linear(layer) or type(layer) is nn.Embedding)]
        if not found:
            hint = did_you_mean(target, linear_names(model))
            faults.append(
                f"the base has no module `{target}`.{hint} Targets are names, not patterns"
            )
        elif odd:
            faults.append(f"`{target}` is a {type(odd[0]).__name__}, not a linear layer")
    if faults:
        raise SettingsError(
            f"--targets:\n{listed(faults)}\nThe base has: {', '.join(linear_names(model))}; or use "
            "all-linear"
        )
