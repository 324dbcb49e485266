"""Adapters put on a base, folded into it, and taken off again without a trace."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from d2lora.adapters.base import n_embedded
from d2lora.adapters.files import PREFIX, AdapterFiles, check_patterns, some
from d2lora.adapters.foreign import OF_PASSES
from d2lora.adapters.quantization import is_quantized, keep_layout
from d2lora.adapters.tokens import grow, grown
from d2lora.errors import ModelError, first_line, listed
from d2lora.runtime.modes import in_evaluation

_WHOLE_LAYERS = (
    "It brings whole layers (`modules_to_save`); where they are quantized in the base, give the "
    "base as it was before quantization"
)


@contextmanager
def peft_warnings_ignored() -> Generator[None]:
    """Suppress warnings of PEFT that do not apply here."""
    with warnings.catch_warnings():
        # Conv1D keeps its weights turned; PEFT sees it and sets itself right.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # Nothing is folded into shared weights, see `shared_weights`.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")
        # Bases are known by their fingerprint, wherever they lie.
        warnings.filterwarnings("ignore", message=".*`base_model_name_or_path` was renamed")
        yield


def attach_adapter(
    model: PreTrainedModel, folder: Path, *, trainable: bool, dropout: float | None = None
) -> PeftModel:
    """Put a saved adapter on a model, with another dropout where one is given.

    The embedding grows by the rows of new tokens.

    A trainable one has its LoRA weights and whole modules, and nothing else, open to gradients:
    PEFT loads adapters frozen by default (peft#282).

    Raises:
        ModelError: If it is not a LoRA adapter or does not fit the model, then unchanged; or a
            trainable one holds what PEFT cannot switch off.
    """
    files = AdapterFiles.read(folder)
    if dropout is not None:
        files.config.lora_dropout = dropout
    undo = grow(model, files.n_rows(n_embedded(model)))
    before = _Before(model, files)
    try:
        on_base = _put_on(model, files, trainable=trainable)
        if trainable:
            check_switchable(on_base, files)
    except ModelError:
        before.restore()
        undo()
        raise
    return on_base


@contextmanager
def attached(model: PreTrainedModel, folder: Path) -> Generator[PeftModel]:
    """Put a saved adapter on a model inside the block, for inference.

    Afterwards the model's modules and weights are what they were, bit for bit, whatever came with
    the adapter: whole modules (`modules_to_save`), biases, embeddings, new tokens.

    Raises:
        ModelError: If it is not a LoRA adapter or does not fit the model.
    """
    files = AdapterFiles.read(folder)
    digest = fingerprint_in_memory(model)
    with grown(model, files.n_rows(n_embedded(model))):
        before = _Before(model, files)
        try:
            yield _put_on(model, files, trainable=False)
        finally:
            before.restore()
    assert fingerprint_in_memory(model) == digest, f"{folder}: the base was changed"


def detach_adapter(model: PeftModel) -> PreTrainedModel:
    """Take an adapter that can be switched off from a base, which is as before, bit for bit."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([])  # else PEFT leaves the copy that was trained
    return model.unload()


def originals(model: PeftModel) -> dict[nn.Parameter, Tensor]:
    """Return each weight that is trained whole, rows of tokens too, and the base's own for it."""
    pairs: dict[nn.Parameter, Tensor] = {}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            (name,) = module.active_adapters
            copies = module.modules_to_save[name].parameters()
            pairs |= zip(copies, module.original_module.parameters(), strict=True)
        elif isinstance(module, TrainableTokensLayer):
            for name in module.active_adapters:
                rows: Any = module.trainable_tokens_original[name]
                pairs[module.trainable_tokens_delta[name]] = rows
    return pairs


def check_switchable(model: PeftModel, files: AdapterFiles) -> None:
    """Check that all of an adapter can be switched off: LoRA weights, whole modules, tokens.

    Raises:
        ModelError: If biases or embeddings of the base were replaced.
    """
    places = get_peft_model_state_dict(model, save_embedding_layers=False)
    replaced = sorted(files.weights.keys() - places.keys())
    if files.config.bias != "none" or replaced:
        held = some(replaced) or f"biases (bias: {files.config.bias})"
        raise ModelError(
            f"{files.folder}: it replaces weights of the base: {held}. It can be evaluated and "
            "merged, but not trained further or compared with its base row by row"
        )


def put(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Put the layers of a configuration on a model; it is left as it is."""
    whole = list(config.modules_to_save or ())
    on_base = get_peft_model(model, config)
    assert isinstance(on_base, PeftModel)
    # Of a tied pair PEFT writes the embedding, which of some bases it does not know for one again.
    config.modules_to_save = whole or None
    return on_base


def _put_on(model: PreTrainedModel, files: AdapterFiles, *, trainable: bool) -> PeftModel:
    check_patterns(files.folder, files.config, [name for name, _ in model.named_modules()])
    files.config.inference_mode = not trainable
    files.config.base_model_name_or_path = None  # else PEFT warns of each base that was moved
    try:
        with peft_warnings_ignored():
            on_base = put(model, files.config)
            _check_names(on_base, files)
            set_peft_model_state_dict(on_base, files.weights)
            _fill(on_base, files)
            check_computes(on_base)
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, ModelError):
            raise
        reason = first_line(error)
        raise ModelError(f"{files.folder}: the adapter does not fit the base: {reason}") from None
    if not trainable:
        on_base.requires_grad_(False)
    return on_base.eval()


@torch.no_grad()
def check_computes(model: PeftModel) -> None:
    """Compute one token, since PEFT takes layers for adapters that it then cannot compute.

    Such are positions as embeddings, or DoRA on layers of 8 bits.

    Raises:
        ValueError: If it cannot.
    """
    ids_1T = torch.ones(1, 1, dtype=torch.long, device=model.device)
    keep_layout(model)
    try:
        with in_evaluation(model):
            model(input_ids=ids_1T, use_cache=False)
    except OF_PASSES as error:
        raise ValueError(f"PEFT does not compute it ({first_line(error)})") from None


def _check_names(model: nn.Module, files: AdapterFiles) -> None:
    """Check that every weight of an adapter has its place in the model, and none is missing.

    Raises:
        ModelError: If not; PEFT leaves what does not fit as it is.
    """
    state = model.state_dict()
    expected = get_peft_model_state_dict(model, state, save_embedding_layers=False)
    # PEFT saves embeddings whole where they are trained or resized.
    places = {**{name: state[name] for name in files.weights if name in state}, **expected}
    missing = sorted(expected.keys() - files.weights.keys())
    unexpected = sorted(files.weights.keys() - places.keys())
    misshapen = [
        f"{name} {tuple(weight.shape)} instead of {tuple(places[name].shape)}"
        for name, weight in sorted(files.weights.items())
        if name in places and weight.shape != places[name].shape
    ]
    faults = [
        f"{what} ({len(names)}): {some(names)}"
        for what, names in (
            ("weights without a place in the base", unexpected),
            ("missing weights", missing),
            ("weights of another shape", misshapen),
            ("`modules_to_save` without a module in the base", _unknown_modules(model, files)),
        )
        if names
    ]
    if faults:
        whole = is_quantized(model) and files.config.modules_to_save
        raise ModelError(
            f"{files.folder}: the adapter does not fit the base:\n{listed(faults)}\n"
            + (_WHOLE_LAYERS if whole else "Give the base that it was made on")
        )


@torch.no_grad()
def _fill(model: nn.Module, files: AdapterFiles) -> None:
    """Write the adapter's weights to their places once more.

    PEFT renames weights as transformers does on loading, by patterns that for some architectures
    hit new names, too (Laguna's shared experts); such weights it leaves at their initial values.
    """
    places = get_peft_model_state_dict(model, model.state_dict(), save_embedding_layers=False)
    for name, place in places.items():
        place.copy_(files.weights[name])


def _unknown_modules(model: nn.Module, files: AdapterFiles) -> list[str]:
    """Return the `modules_to_save` that name no module, by its end as in PEFT."""
    names = [name for name, _ in model.named_modules()]
    wanted = files.config.modules_to_save or []
    return [one for one in wanted if not any(name.endswith(one) for name in names)]


class _Before:
    """A model's modules, and the weights that an adapter brings its own of, to be put back."""

    def __init__(self, model: PreTrainedModel, files: AdapterFiles) -> None:
        """Remember them; the model goes on with copies of these weights."""
        self._model = model
        self._children = [(module, dict(module.named_children())) for module in model.modules()]
        brought = {n.removeprefix(PREFIX).replace(".base_layer.", ".") for n in files.weights}
        named = model.named_parameters(remove_duplicate=False)
        self._weights = {p: (p.data, p.requires_grad) for name, p in named if name in brought}
        for parameter, (weight, _) in self._weights.items():
            parameter.data = weight.clone()

    def restore(self) -> None:
        """Make the model what it was."""
        for module, children in self._children:
            for name, child in children.items():
                if module.get_submodule(name) is not child:
                    setattr(module, name, child)
        for parameter, (weight, is_open) in self._weights.items():
            parameter.data, parameter.requires_grad = weight, is_open
        vars(self._model).pop("peft_config", None)


@torch.no_grad()
def fingerprint_in_memory(model: nn.Module) -> str:
    """Return a fingerprint of weights as they are now: some 4,000 numbers of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        some_of_it = flat[:: max(1, len(flat) // 4096)].contiguous().cpu()
        digest.update(some_of_it.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def merged(model: PeftModel) -> Generator[None]:
    """Fold the adapter into copies of the base's weights inside the block, for faster scoring.

    Only layers for which that says the same are folded (see `_foldable`); the others compute the
    update beside the base's product. Afterwards the layers have the base's own weights.
    """
    layers = [*_foldable(model), *_with_rows(model)]
    weights = [_weight(layer) for layer in layers]
    kept = [weight.data for weight in weights]
    for layer, weight in zip(layers, weights, strict=True):
        weight.data = weight.data.clone()
        layer.merge()
    try:
        yield
    finally:
        for layer, weight, own in zip(layers, weights, kept, strict=True):
            layer.unmerge()
            weight.data = own


def is_folded(model: nn.Module) -> bool:
    """Say whether an adapter is folded into the base's weights, in some layer at least."""
    return any(isinstance(layer, LoraLayer) and layer.merged for layer in model.modules())


def _foldable(model: nn.Module) -> Iterator[LoraLinear | ParamWrapper]:
    """Yield the layers, and parameters, that an adapter can be folded into.

    These are plain float32 ones, where folding costs no precision that matters (so no quantized
    ones), whose weight no other layer shares (a tied embedding would change with the head), with
    an update that is a matrix (LoRA and DoRA without a bias of their own).
    """
    shared = shared_weights(model)
    for layer in model.modules():
        if not isinstance(layer, LoraLinear | ParamWrapper) or len(layer.active_adapters) != 1:
            continue
        (name,) = layer.active_adapters
        plain = type(layer) is ParamWrapper or type(layer.get_base_layer()) in {nn.Linear, Conv1D}
        if (
            type(layer) in {LoraLinear, ParamWrapper}
            and plain
            and _weight(layer).dtype == torch.float32
            and _weight(layer).data_ptr() not in shared
            and not layer.lora_bias[name]
            and all(type(variant) is DoraLinearVariant for variant in layer.lora_variant.values())
        ):
            yield layer


def _with_rows(model: PeftModel) -> list[TrainableTokensLayer]:
    """Return the embedding and the head whose rows are replaced, one matrix or not."""
    return [layer for layer in model.modules() if isinstance(layer, TrainableTokensLayer)]


def _weight(layer: LoraLinear | ParamWrapper | TrainableTokensLayer) -> nn.Parameter:
    name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    return layer.get_base_layer().get_parameter(name)


def shared_weights(model: nn.Module) -> set[int]:
    """Return the addresses of weights that several layers have in common."""
    named = model.named_parameters(remove_duplicate=False)
    owners = Counter(parameter.data_ptr() for _, parameter in named)
    return {address for address, n_owners in owners.items() if n_owners > 1 and address}
