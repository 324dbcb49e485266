"""The layers of a base that get an adapter.

`all-linear` takes every linear layer that text reaches, but for the head, the routers of experts,
and layers whose weights a model multiplies by itself, so that an adapter on them would do nothing.
A pattern takes the linear layers whose whole name it matches, as PEFT's does. `experts` takes the
experts that a base keeps in one tensor, (experts, out, in) or turned: they are
parameters, not layers, and PEFT adapts them by `target_parameters`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeGuard

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from d2lora.errors import SettingsError, did_you_mean, listed
from d2lora.runtime.attempts import succeeds

ALL_LINEAR = "all-linear"
EXPERTS = "experts"
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


class Targets(NamedTuple):
    """What gets an adapter, by the names that PEFT knows it by."""

    modules: list[str]
    parameters: list[str]


class Wanted(NamedTuple):
    """What is to get an adapter, as a user says it."""

    targets: tuple[str, ...]
    """Names, patterns, `all-linear` and `experts`."""
    exclude: tuple[str, ...] = ()
    """Names and patterns that get none."""
    layers: tuple[int, ...] = ()
    """Numbers of decoder layers; empty: all."""


def targets_of(model: PreTrainedModel, wanted: Wanted) -> Targets:
    """Return what targets mean on a base.

    Of bases whose experts were layers once, PEFT takes `up_proj` and its like for the experts, be
    it the name of another layer; such layers are named by their weight.
    """
    modules: list[str] = []
    parameters: list[str] = []
    known = [name for name, _ in model.named_modules()]
    for target in wanted.targets:
        if target == ALL_LINEAR:
            modules += linear_names(model)
        elif _is_pattern(target):
            matched = (n for n, m in model.named_modules() if _is_linear(m) and _means(target, n))
            modules += _short(matched, known)
        elif target == EXPERTS:
            every = (name for name, _ in model.named_parameters())
            parameters += _short(stacks(model), every, least=2)  # not `down_proj`, as a layer is
        elif any(is_named(name, target) for name in known):
            modules.append(target)
        else:
            parameters.append(target)
    if wanted.exclude or wanted.layers:
        modules = _short(_left(model, modules, wanted), known)
    own = [name for name in modules if not _is_taken_for_experts(model, name)]
    weights = [f"{name}.weight" for name in modules if name not in own]
    return Targets(sorted(own), sorted({*parameters, *weights}))


def _left(model: PreTrainedModel, modules: list[str], wanted: Wanted) -> list[str]:
    """Return the full names of modules that are not excluded, and in the layers that are wanted."""
    return [
        name
        for name, _ in model.named_modules()
        if any(is_named(name, module) for module in modules)
        and not any(_means(target, name) for target in wanted.exclude)
        and (not wanted.layers or _number_of(name) in wanted.layers)
    ]


def _number_of(name: str) -> int | None:
    """Return the number of the layer that a module is in; None outside of them."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _is_pattern(target: str) -> bool:
    return re.search(r"[*+?|^$()\[\]{}\\]", target) is not None


def _means(target: str, name: str) -> bool:
    """Say whether a target, a name or a pattern, means a module."""
    if _is_pattern(target):
        return re.fullmatch(target, name) is not None
    return is_named(name, target)


def _is_taken_for_experts(model: PreTrainedModel, name: str) -> bool:
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of two that PEFT takes together
        return True
    return name not in (config.target_modules or ())


def linear_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the layers that `all-linear` takes.

    Of each the last name, or as many names from the end as tell it from what is not taken.
    """
    taken = [name for name, reason in reasons(model).items() if not reason]
    return _short(taken, (name for name, _ in model.named_modules()))


def _short(taken: Iterable[str], every: Iterable[str], least: int = 1) -> list[str]:
    """Return of each name as many parts from its end as no other has; `least` of them at least."""
    names = list(taken)
    ends = {end for name in set(every) - set(names) for end in _ends(name)}
    short = (next((e for e in _ends(n)[least - 1 :] if e not in ends), n) for n in names)
    return sorted(set(short))


def stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the tensors that hold several experts each, by their names without adapters."""
    return {
        _plain(f"{name}.{own}"): parameter
        for name, module in model.named_modules()
        if "experts" in name.split(".") or "Experts" in type(module).__name__
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


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
        elif _is_router(model, name):
            found[name] = "a router"
        elif last in by_itself:
            found[name] = "multiplied by the model itself"
        elif _INDEXER in parent.split("."):
            found[name] = "chooses what is attended to, and so has no gradient"
        else:
            found[name] = "" if _pattern(name) in reached else "not reached by text"
    return found


def _is_router(model: PreTrainedModel, name: str) -> bool:
    """Say whether a layer is, or is part of, what chooses between experts beside it."""
    parts = name.split(".")
    return any(
        part in _ROUTERS and hasattr(model.get_submodule(".".join(parts[:n])), "experts")
        for n, part in enumerate(parts)
    )


def coverage(model: PeftModel) -> str:
    """Return which layers have an adapter or are trained whole, and which have none.

    The rest are linear layers and experts.
    """
    adapted: Counter[str] = Counter()
    left: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    base = model.get_base_model()
    experts = stacks(base)
    inside = set[str]()
    for name, layer in base.named_modules():
        plain, last = _plain(name), _ends(name)[0]
        if isinstance(layer, AuxiliaryTrainingWrapper):
            (whole if isinstance(layer, ModulesToSaveWrapper) else rows)[last] += 1
            inside.add(f"{name}.")
        elif name.startswith(tuple(inside)):
            continue
        elif isinstance(layer, ParamWrapper):
            stack = f"{plain}.{layer.parameter_name}"
            adapted[_label(stack) if experts.pop(stack, None) is not None else _ends(plain)[0]] += 1
        elif isinstance(layer, BaseTunerLayer):
            adapted[last] += 1
        elif _is_linear(layer) and plain == name and ".lora_" not in name:
            left[last] += 1
    left.update(map(_label, experts))
    beside = f"; whole: {_listed(whole)}" if whole else ""
    beside += f"; rows of new tokens in {_listed(rows)}" if rows else ""
    without = f"; none on {_listed(left)}" if left else ""
    return f"LoRA on {_listed(adapted)}{beside}{without}"


def _label(stack: str) -> str:
    return f"{_ends(stack)[0]} of all experts"


def _plain(name: str) -> str:
    """Return a name as it is without adapters."""
    return name.replace(".base_layer", "")


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


def narrowest(layer: nn.Linear | Conv1D) -> int:
    """Return the least dimension of a linear layer, whatever its weight is packed in."""
    sides = (
        layer.weight.shape if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
    )
    return min(sides)


def target_layers(model: PreTrainedModel, wanted: Wanted) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers, by full name, that get an adapter."""
    found = targets_of(model, wanted)
    names = [*found.modules, *(name.removesuffix(".weight") for name in found.parameters)]
    for name, layer in model.named_modules():
        if _is_linear(layer) and any(is_named(name, target) for target in names):
            yield name, layer


def is_named(name: str, target: str) -> bool:
    """Say whether a target, a last name or a longer end of it, means a module, as in PEFT."""
    return name == target or name.endswith(f".{target}")


def check_targets(model: PreTrainedModel, wanted: Wanted) -> None:
    """Check that every target means layers, or parameters, that LoRA can be put on, and some stay.

    Raises:
        SettingsError: If one is not, with those that are.
    """
    faults = [fault for target in wanted.targets if (fault := _fault(model, target))]
    if faults:
        experts = f"; for experts in one tensor: {EXPERTS}" if stacks(model) else ""
        raise SettingsError(
            f"--targets:\n{listed(faults)}\nThe base has: {', '.join(linear_names(model))}; or use "
            f"{ALL_LINEAR}{experts}"
        )
    names = [name for name, _ in model.named_modules()]
    if faults := list(_faults_of_exclusion(names, wanted)):
        raise SettingsError(f"--exclude-targets and --layers:\n{listed(faults)}")
    found = targets_of(model, wanted)
    if not (found.modules or found.parameters):
        raise SettingsError("--exclude-targets and --layers leave no layer to adapt")


def _faults_of_exclusion(names: list[str], wanted: Wanted) -> Iterator[str]:
    for target in wanted.exclude:
        if error := _error_in(target):
            yield error
        elif not any(_means(target, name) for name in names):
            yield f"the base has no module `{target}`"
    there = sorted({n for name in names if (n := _number_of(name)) is not None})
    for number in wanted.layers:
        if number not in there:
            last = f"its layers are 0 to {there[-1]}" if there else "it has none with a number"
            yield f"the base has no layer {number}: {last}"


def _error_in(target: str) -> str | None:
    """Return what is wrong with a pattern; None where nothing is, or it is a name."""
    try:
        re.compile(target if _is_pattern(target) else "")
    except re.error as error:
        return f"`{target}` is not a pattern: {error}"
    return None


def _fault(model: PreTrainedModel, target: str) -> str | None:
    """Return what is wrong with a target, in a sentence; None where nothing is."""
    if target == ALL_LINEAR:
        return None
    if _is_pattern(target):
        error = _error_in(target)
        layers = (n for n, m in model.named_modules() if _is_linear(m))
        if error is None and not any(_means(target, name) for name in layers):
            error = f"no linear layer's whole name matches `{target}`"
        return error
    if target == EXPERTS:
        return None if stacks(model) else f"`{EXPERTS}`: the base has no experts in one tensor"
    found = [layer for name, layer in model.named_modules() if is_named(name, target)]
    odd = [layer for layer in found if not (_is_linear(layer) or type(layer) is nn.Embedding)]
    if odd:
        own = [name for name, p in odd[0].named_parameters(recurse=False) if p.ndim > 1]
        hint = f"; give its parameter, `{target}.{own[0]}`" if own else ""
        return f"`{target}` is a {type(odd[0]).__name__}, not a linear layer{hint}"
    named = [p for name, p in model.named_parameters() if is_named(name, target)]
    if found or (named and all(parameter.ndim in {2, 3} for parameter in named)):
        return None
    hint = did_you_mean(target, linear_names(model))
    return f"the base has no module `{target}`.{hint}"
