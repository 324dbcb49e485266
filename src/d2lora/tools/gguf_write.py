"""A merged model, or an adapter alone, as a GGUF file: what llama.cpp and Ollama serve.

A model is read back by transformers, whose way from GGUF is not ours, and every weight compared.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from d2lora.adapters.base import n_embedded
from d2lora.adapters.files import PREFIX
from d2lora.adapters.mixing import Plain
from d2lora.errors import ModelError
from d2lora.tools.gguf_shape import GgufShape
from d2lora.tools.gguf_tokens import Vocabulary, write_tokenizer

HEAD = "lm_head.weight"
_FILE_TYPES = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}


class _Weight(NamedTuple):
    """A weight of a file; it is computed as it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], Tensor]


class GgufModel(NamedTuple):
    """A model that can be written as a GGUF file: checked before anything is."""

    shape: GgufShape
    tokenizer: PreTrainedTokenizerBase
    origin: Path | None
    """The GGUF file that the base was read from, if any."""
    dtype: torch.dtype
    """Of matrices; norms and biases are float32 (llama.cpp computes with no other)."""

    def check(self, model: PreTrainedModel) -> None:
        """Check, before the merge, that the file can be written.

        Raises:
            ModelError: If llama.cpp has no place for a weight, or does not know the tokenizer.
        """
        list(self._weights(model))
        if self.origin is None:
            Vocabulary.of(self.tokenizer, n_embedded(model))

    def write(self, model: PreTrainedModel, path: Path, name: str) -> None:
        """Write a model, and compare what transformers reads of it.

        Raises:
            ModelError: If it is not what was written.
        """
        writer = GGUFWriter(path, self.shape.architecture)
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(_FILE_TYPES[self.dtype][1])
        self.shape.describe(writer)
        write_tokenizer(writer, self.tokenizer, n_embedded(model), self.origin)
        _write(writer, self._weights(model))
        self._compare(model, path)

    def _weights(self, model: PreTrainedModel) -> Iterator[_Weight]:
        for name, value in self.shape.extra_tensors():
            yield _Weight(name, tuple(value.shape), torch.float32, lambda value=value: value)
        for name, value in _own_weights(model, self.shape).items():
            yield _Weight(
                self.shape.name_of(name),
                tuple(value.shape),
                self.dtype if value.dim() > 1 else torch.float32,
                lambda name=name, value=value: self.shape.ordered(name, value.float()),
            )

    @torch.no_grad()
    def _compare(self, model: PreTrainedModel, path: Path) -> None:
        read: Mapping[str, Tensor] = load_gguf_checkpoint(
            str(path), return_tensors=True, model_to_load=_as_read(model)
        )["tensors"]
        for name, value in _own_weights(model, self.shape).items():
            dtype = self.dtype if value.dim() > 1 else torch.float32
            # A norm's weight goes through one more and one less.
            rounding = 1e-6 if self.shape.kind.shifted_norms and value.dim() == 1 else 0.0
            kept = value.float().to(dtype).float().cpu()
            if name not in read or not torch.allclose(read[name], kept, rtol=0, atol=rounding):
                raise ModelError(f"{path.name}: {name} is not read back as it was written")


def _as_read(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the kind that the file says: a Mistral without a window is a Llama."""
    if model.config.model_type != "mistral":
        return model
    values = model.config.to_dict() | {"model_type": "llama"}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig.from_dict(values))


def _own_weights(model: PreTrainedModel, shape: GgufShape) -> dict[str, Tensor]:
    """Return a model's weights; a tied head is the embedding."""
    weights = model.state_dict()
    return {name: w for name, w in weights.items() if not (shape.tied and name == HEAD)}


def write_adapter(
    folder: Path, config: PreTrainedConfig, path: Path, dtype: torch.dtype, name: str
) -> None:
    """Write an adapter as the GGUF file that llama.cpp puts on a base (`--lora`).

    llama.cpp multiplies by alpha / rank; other factors (rsLoRA) go into B.

    Args:
        folder: The adapter.
        config: The base's configuration.
        path: The file to write.
        dtype: Of its factors.
        name: Its name within the file.

    Raises:
        ModelError: If the adapter is not plain LoRA of one rank, or llama.cpp has no place for it.
    """
    adapter, shape = Plain.read(folder), GgufShape.of(config)
    adapter.check_factors_alone()
    ratio = adapter.scale / (adapter.config.lora_alpha / adapter.config.r)
    weights: list[_Weight] = []
    for layer, (a, b) in adapter.layers.items():
        own = f"{layer.removeprefix(PREFIX)}.weight"
        if shape.tied and own == HEAD:
            raise ModelError(
                f"{folder}: it adapts the head, which this base shares with its embedding: "
                "llama.cpp has none of its own. Write the merged model instead (--merge)"
            )
        place = shape.name_of(own)
        weights += [
            _Weight(f"{place}.lora_a", tuple(a.shape), dtype, a.float),
            _Weight(
                f"{place}.lora_b",
                tuple(b.shape),
                dtype,
                lambda own=own, b=b: shape.ordered(own, b.float() * ratio),
            ),
        ]
    writer = GGUFWriter(path, shape.architecture)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", adapter.config.lora_alpha)
    writer.add_file_type(_FILE_TYPES[dtype][1])
    _write(writer, weights)


def _write(writer: GGUFWriter, weights: Iterable[_Weight]) -> None:
    """Write a file, its weights one after the other, so that none is in memory twice."""
    weights = list(weights)
    for weight in weights:
        kind = _FILE_TYPES[weight.dtype][0]
        width = weight.dtype.itemsize
        plain = np.float32 if width == 4 else np.float16
        n_bytes = int(np.prod(weight.shape)) * width
        writer.add_tensor_info(weight.name, weight.shape, np.dtype(plain), n_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for weight in weights:
        writer.write_tensor_data(_bytes(weight.compute().to(weight.dtype)))
    writer.close()


def _bytes(value: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor; numpy has no bfloat16."""
    return value.detach().cpu().contiguous().view(torch.uint8).numpy()
