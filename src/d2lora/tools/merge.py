"""An adapter merged into its base: a model that needs neither."""

import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from d2lora.adapters.attach import attach_adapter, shared_weights
from d2lora.adapters.base import Base, load_base, n_embedded
from d2lora.adapters.base_files import gguf_of
from d2lora.adapters.card import write_merged
from d2lora.adapters.foreign import save_tokenizer
from d2lora.adapters.manifest import Manifest, base_for, base_record, check_fit, has_manifest
from d2lora.adapters.quantization import is_quantized
from d2lora.adapters.tokens import grow
from d2lora.data.encode import Encoder
from d2lora.data.trained_rows import TrainedRows
from d2lora.errors import ModelError, first_line
from d2lora.runtime.console import Reporter
from d2lora.runtime.rounding import tolerance
from d2lora.runtime.run_folder import DONE, new_folder, write_json
from d2lora.settings import ConvertSettings

_PROBE_TOKENS = 64
_SHARD_SIZE = "50GB"
"""What transformers writes into one file."""


def merge_into_base(settings: ConvertSettings, folder: Path) -> float:
    """Write the base that settings name with an adapter merged into it, as a model of its own.

    Returns:
        The largest difference of logits on probe tokens, of the model as it was written.

    Raises:
        ModelError: If the adapter cannot be merged, or the merge changes its outputs.
    """
    base = _base_of(settings, folder)
    return merge(base, folder, settings.out, settings.seed, settings.shard_size)


def merge_into_gguf(settings: ConvertSettings, folder: Path, path: Path) -> float:
    """Write the base that settings name with an adapter merged into it, as a GGUF file.

    Returns:
        The largest difference of logits on probe tokens, before the model was written; of the file
        every weight is compared.

    Raises:
        ModelError: As `merge_into_base`, or if llama.cpp does not know such a model.
    """
    from d2lora.tools.gguf_shape import GgufShape
    from d2lora.tools.gguf_write import GgufModel

    base = _base_of(settings, folder)
    tokenizer = _encoder_of(folder, base).tokenizer
    origin = gguf_of(settings.base, settings.revision, settings.gguf_file)
    gguf = GgufModel(GgufShape.of(base.model.config), tokenizer, origin, base.model.dtype)
    gguf.check(base.model)
    merged = _merged(base, folder, settings.seed)
    gguf.write(merged.model, path, settings.out.stem)
    return merged.largest_difference


def _base_of(settings: ConvertSettings, folder: Path) -> Base:
    base = base_for(load_base(settings), folder)
    grow(base.model, base.n_rows)
    if warning := check_fit(folder, base):
        Reporter().say(warning)
    return base


class _Merged(NamedTuple):
    """A merged model, and what it is compared by."""

    model: PreTrainedModel
    ids_BT: Tensor
    apart_BTV: Tensor
    """Logits of base and adapter, not merged."""
    largest_difference: float


@torch.no_grad()
def _merged(base: Base, folder: Path, seed: int) -> _Merged:
    """Merge an adapter into a base; what is in the base's memory is no longer of use."""
    model = base.model
    if is_quantized(model):
        raise ModelError(
            f"{base.name}: its weights are quantized, and merged ones would be rounded to the "
            "same few values; merge into the base as it was before quantization (leave out "
            "--quantization)"
        )
    adapted = attach_adapter(model, folder, trainable=False)
    generator = torch.Generator().manual_seed(seed)
    n_tokens = min(len(base.tokenizer), n_embedded(model))
    ids = torch.randint(n_tokens, (4, _PROBE_TOKENS), generator=generator).to(model.device)
    apart = adapted(input_ids=ids).logits.float()
    _untie(adapted)
    try:
        with warnings.catch_warnings():
            # They are untied already, where the adapter changes one of them.
            warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer")
            merged = adapted.merge_and_unload()
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{folder}: the adapter cannot be merged: {error}") from None
    assert isinstance(merged, PreTrainedModel)
    largest = _check_same(folder, base, apart, merged(input_ids=ids).logits.float())
    return _Merged(merged, ids, apart, largest)


@torch.no_grad()
def merge(base: Base, folder: Path, out: Path, seed: int, shard_size: str | None = None) -> float:
    """Write a base with an adapter merged into it; the base in memory is no longer of use.

    Returns:
        As `merge_into_base`.

    Raises:
        ModelError: As `merge_into_base`.
    """
    encoder = _encoder_of(folder, base)
    model, ids, apart, _ = _merged(base, folder, seed)
    with new_folder(out.resolve()) as written:  # behind a symbolic link, which stays
        model.save_pretrained(written, max_shard_size=shard_size or _SHARD_SIZE)
        save_tokenizer(encoder.tokenizer, written)
        write_merged(_manifest_of(folder, base), written)
        own = TrainedRows.read(base.folder)
        (TrainedRows.read(folder) | own).write(written)
        # What was written is what counts: transformers ties weights again as it reads them.
        try:
            read = AutoModelForCausalLM.from_pretrained(
                written, dtype=model.dtype, use_safetensors=True, trust_remote_code=False
            )
        except ValueError as error:  # a part of a larger model, as of one that sees
            raise ModelError(
                f"{base.name}: transformers would not read the merged {type(model).__name__} back "
                f"({first_line(error)}); serve the adapter beside the base"
            ) from None
        nn.Module.to(read, model.device).eval()
        largest = _check_same(folder, base, apart, read(input_ids=ids).logits.float())
        write_json(written / DONE, {"kind": "model", "largest_logit_difference": largest})
    return largest


def _manifest_of(folder: Path, base: Base) -> Manifest:
    """Return an adapter's manifest, with the base that it is merged into where it has none."""
    if has_manifest(folder):
        return Manifest.read(folder)
    return Manifest.of_foreign(folder).model_copy(update={"base": base_record(base)})


def _encoder_of(folder: Path, base: Base) -> Encoder:
    """Return the encoder of an adapter's chat format, whose template the model is to keep."""
    if not has_manifest(folder):
        return Encoder.of(base, None)
    manifest = Manifest.read(folder)
    encoder = Encoder.of(base, manifest.chat_format, manifest.chat_template)
    if encoder.format == "plain" and encoder.tokenizer.chat_template is not None:
        Reporter().say(
            "warning: the adapter was trained in the plain chat format, and the model has a chat "
            "template: give --chat-format plain wherever it is used"
        )
    return encoder


def _untie(model: PeftModel) -> None:
    """Untie the weights of layers that the adapter changes and others share.

    So an embedding stays as it is beside a head that changes; PEFT then unties the configuration.
    """
    shared = shared_weights(model)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            weight = dict(base.named_parameters(recurse=False)).get("weight")
            if weight is not None and weight.data_ptr() in shared:
                base.register_parameter("weight", nn.Parameter(weight.clone(), requires_grad=False))


def _check_same(folder: Path, base: Base, apart: Tensor, together: Tensor) -> float:
    """Return the largest difference of logits.

    Raises:
        ModelError: If it is more than rounding.
    """
    largest, dtype = float((apart - together).abs().max()), base.model.dtype
    if not largest <= tolerance(dtype, rewritten=True) * max(1.0, float(apart.abs().max())):
        coarse = f"the base's dtype ({dtype}) is too coarse for it; use --dtype float32"
        why = "it cannot be merged into this base" if dtype == torch.float32 else coarse
        raise ModelError(f"{folder}: merging changes logits by up to {largest:.3g}; {why}")
    return largest
