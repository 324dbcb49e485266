"""What of a base is trained beside the adapter: whole modules, and rows of new tokens.

PEFT trains a copy of each module (`modules_to_save`), in the dtype of the base, and saves it with
the adapter. An embedding and a head that are one matrix are trained, and stay, one
(`ensure_weight_tying`). Of rows it trains copies, too (`trainable_token_indices`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from d2lora.adapters.targets import ALL_LINEAR, EXPERTS, Wanted, is_named, target_layers, targets_of
from d2lora.errors import SettingsError, did_you_mean, listed

_OPTION = "--modules-to-save"
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Whole(NamedTuple):
    """What PEFT is told of them."""

    names: list[str]
    """Ends of their names."""
    tied: bool = False
    """Whether the embedding and the head, one matrix, are among them."""


def whole_of(model: PreTrainedModel, names: Sequence[str]) -> Whole:
    """Return what PEFT is to be told of modules that `check_whole` lets pass.

    PEFT takes every module whose name ends so, `input_layernorm` for `norm`, too; a name that would
    take others is written out.
    """
    known = [name for name, _ in model.named_modules()]
    pair = tied_pair(model)
    taken: list[str] = []
    for name in names:
        own = [other for other in known if is_named(other, name)]
        alone = own == [other for other in known if other.endswith(name)]
        taken += [] if set(own) & set(pair) else [name] if alone else own
    tied = any(is_named(one, name) for one in pair for name in names)
    # PEFT keeps them one where it is told either by a name that it knows.
    of_pair = [last for one in pair if (last := _last(one)) in EMBEDDING_LAYER_NAMES][:1]
    return Whole([*taken, *(of_pair if tied else ())], tied)


def tied_pair(model: PreTrainedModel) -> list[str]:
    """Return the names of the embedding and the head where they are one matrix; else nothing."""
    embedding, head = _pair(model)
    if head is None or getattr(embedding, "weight", None) is not getattr(head, "weight", 0):
        return []
    return _names_of_pair(model)


def _pair(model: PreTrainedModel) -> tuple[Any, Any]:
    """Return the embedding and the head; None where there is none."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def _names_of_pair(model: PreTrainedModel) -> list[str]:
    pair = _pair(model)
    return [name for name, module in model.named_modules() if any(module is one for one in pair)]


def check_whole(model: PreTrainedModel, names: Sequence[str], wanted: Wanted) -> None:
    """Check that modules can be trained whole, and that no adapter is wanted on them by name.

    Raises:
        SettingsError: If not, with what there is.
    """
    if not names:
        return
    faults = [fault for name in names if (fault := _fault(model, name))]
    if not faults:
        faults = list(_faults_together(model, names, wanted))
    if faults:
        raise SettingsError(f"{_OPTION}:\n{listed(faults)}")


def _fault(model: PreTrainedModel, name: str) -> str | None:
    """Return what is wrong with a name, in a sentence; None where nothing is."""
    modules = {other: m for other, m in model.named_modules() if other and is_named(other, name)}
    if not modules:
        lasts = {_last(o) for o, m in model.named_modules() if o and _has_weights(m)}
        some = "its embedding, head and norms can be named, and what is in a layer"
        return f"the base has no module `{name}`: {some}.{did_you_mean(name, lasts)}"
    if any(isinstance(module, _LISTS) for module in modules.values()):
        return f"`{name}` is a list of modules, not one: name those in it"
    weights = [p for module in modules.values() for p in module.parameters()]
    if not weights:
        return f"`{name}` has no weights"
    if not all(weight.is_floating_point() for weight in weights):
        return (
            f"`{name}` is quantized in this base, and cannot be trained whole: give the base as it "
            "was before quantization (leave out --quantization), or adapt it with --targets"
        )
    if any(weight.dtype == torch.float16 for weight in weights):
        return f"`{name}` would be trained in float16, which AdamW cannot: use --dtype float32"
    return None


def _faults_together(model: PreTrainedModel, names: Sequence[str], wanted: Wanted) -> Iterator[str]:
    """Yield what is wrong with modules beside each other, beside the rest, and beside targets."""
    known = [name for name, _ in model.named_modules() if name]
    pair = tied_pair(model)
    own = {one for one in known for name in names if is_named(one, name)}
    own |= set(pair) if own & set(pair) else set()
    for one in sorted(own):
        if outer := next((other for other in own if one.startswith(f"{other}.")), None):
            yield f"`{one}` is a part of `{outer}`: give one of them"
            return
    if shared := _shared(model, own):
        yield f"{shared[0]} has weights that {shared[1]} has, too: they cannot be trained apart"
    if own & set(pair) and not any(_last(one) in EMBEDDING_LAYER_NAMES for one in pair):
        yield (
            f"{' and '.join(pair)} are one matrix in this base, and PEFT keeps them one only where "
            f"one is called {' or '.join(EMBEDDING_LAYER_NAMES)}: adapt it with --targets"
        )
    for target in wanted.targets:
        adapted = [] if target in (ALL_LINEAR, EXPERTS) else _adapted(model, target, wanted)
        if twice := [name for name in adapted if _is_within(name, own)]:
            yield f"`{twice[0]}` is trained whole, and adapted by --targets {target}: give one"
    stacks = targets_of(model, wanted).parameters
    every = [name for name, _ in model.named_parameters()]
    if twice := [n for n in every if _is_within(n, own) and any(is_named(n, s) for s in stacks)]:
        yield f"`{twice[0]}` is trained whole, and adapted by --targets: give one"


def _adapted(model: PreTrainedModel, target: str, wanted: Wanted) -> list[str]:
    alone = wanted._replace(targets=(target,))
    return [name for name, _ in target_layers(model, alone)]


def _is_within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _shared(model: PreTrainedModel, own: set[str]) -> tuple[str, str] | None:
    """Return a module and another one, not trained whole, that has one of its weights, too."""
    inside: dict[int, str] = {}
    outside: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        (inside if _is_within(name, own) else outside)[parameter.data_ptr()] = name
    both = sorted(inside.keys() & outside.keys())
    return (inside[both[0]], outside[both[0]]) if both else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def rows_of(
    model: PreTrainedModel, new_ids: Sequence[int]
) -> list[int] | dict[str, list[int]] | None:
    """Return what PEFT is to be told of rows of the embedding and the head; None of no rows.

    Of the two as one matrix it finds the head by itself.

    Raises:
        SettingsError: If the head has no rows for them.
    """
    if not new_ids:
        return None
    if tied_pair(model):
        return list(new_ids)
    _, head = _pair(model)
    if head is not None and len(head.weight) <= max(new_ids):
        raise SettingsError(
            f"--add-tokens: the base's head has {len(head.weight):,} rows, fewer than its "
            "embedding, and none for new tokens"
        )
    return {name: list(new_ids) for name in _names_of_pair(model)}


def check_rows(model: PreTrainedModel, whole: Sequence[str], wanted: Wanted) -> None:
    """Check that rows of the embedding and the head can be trained, and no adapter is on them.

    Raises:
        SettingsError: If not.
    """
    targets = targets_of(model, wanted)
    for name in _names_of_pair(model):
        if any(is_named(name, one) for one in whole):
            raise SettingsError(
                f"--add-tokens trains the rows of new tokens alone, and `{name}` is to be trained "
                "whole: leave it out of --modules-to-save, or leave out --add-tokens"
            )
        if any(is_named(name, one) for one in targets.modules) or any(
            is_named(f"{name}.weight", one) for one in targets.parameters
        ):
            raise SettingsError(
                f"--add-tokens trains rows of `{name}`, which --targets adapts: leave it out there"
            )


@torch.no_grad()
def check_alike(model: nn.Module) -> None:
    """Check that an embedding and a head of which rows are trained compute what they did.

    PEFT computes them by itself, and knows of no bias.

    Raises:
        ValueError: If they do not; before training.
    """
    for name, module in model.named_modules():
        if not isinstance(module, TrainableTokensWrapper):
            continue
        layer: Any = module.original_module
        x = torch.arange(8, device=layer.weight.device)
        if not isinstance(layer, nn.Embedding):
            shape = (1, layer.weight.shape[1])
            x = torch.linspace(-1, 2, shape[1]).to(layer.weight).view(shape)
        if not torch.allclose(module(x), layer(x)):
            raise ValueError(
                f"it trains no rows of {name} alone, which has a bias or a pass of its own"
            )


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
