"""Embeddings of rows.

`base`: the base's own hidden states, as RDS+ takes them (Ivison et al. 2025, arXiv 2503.01807):
the mean of the last layer's states, later positions weighing more. Nothing is downloaded.
`words`: latent semantic analysis of hashed words (`bags`), without any model: the one for large
pools. Any other name is a sentence-transformers model.

All are centred on the pool's mean and scaled to length 1: hidden states of language models share
a direction that has nothing to do with their text (Mu and Viswanath 2018, arXiv 1702.01417).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2lora.adapters.base import Base, causal_model
from d2lora.data.batches import collate, micro_batches
from d2lora.data.encode import Encoder
from d2lora.data.rows import Example
from d2lora.errors import SettingsError, first_line
from d2lora.runtime.extras import need_extra
from d2lora.scoring.scorer import pass_tokens, within_positions
from d2lora.selection.cache import Array, unit_rows

WIDEST = 1024
"""Wider hidden states are projected to this by a seeded Gaussian matrix (Johnson-Lindenstrauss)."""
_SEED = 0


def centred(pool: Array, task: Array) -> tuple[Array, Array]:
    """Subtract the pool's mean from both and scale each row to length 1."""
    mean = pool.mean(axis=0, keepdims=True)
    return unit_rows(pool - mean), unit_rows(task - mean)


def base_width(base: Base) -> int:
    """Return the width of the vectors that `base_states` gives."""
    return min(WIDEST, _hidden_size(base))


def base_states(
    base: Base, encoder: Encoder, examples: Sequence[Example], max_tokens: int
) -> Array:
    """Return the position-weighted mean of each row's last hidden states, shape (rows, width).

    Args:
        base: The base; no adapter is on it.
        encoder: Makes token ids.
        examples: The rows.
        max_tokens: Longer rows lose the middle of their longest field.
    """
    model = causal_model(base.model)
    decoder = getattr(model, model.base_model_prefix)
    device = base.model.device
    items = [encoder.encode(example, max_tokens) for example in examples]
    order = sorted(range(len(items)), key=lambda index: -len(items[index].ids))
    found = torch.empty(len(items), _hidden_size(base))
    done = 0
    with torch.inference_mode():
        for group in micro_batches([items[index] for index in order], pass_tokens(device)):
            batch = within_positions(collate(group, base.pad_id), model).to(device)
            hidden_BTD: Tensor = decoder(
                input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False
            ).last_hidden_state
            weight_BT = batch.mask_BT.cumsum(1) * batch.mask_BT
            mean_BD = torch.einsum(
                "btd,bt->bd", hidden_BTD.float(), weight_BT / weight_BT.sum(1, keepdim=True)
            )
            found[order[done : done + len(group)]] = mean_BD.cpu()
            done += len(group)
    return _narrowed(found).numpy()


def _hidden_size(base: Base) -> int:
    return base.model.get_input_embeddings().get_parameter("weight").shape[1]


def _narrowed(states: Tensor) -> Tensor:
    width = states.shape[1]
    if width <= WIDEST:
        return states
    generator = torch.Generator().manual_seed(_SEED)
    return states @ (torch.randn(width, WIDEST, generator=generator) / WIDEST**0.5)


class SentenceEncoder:
    """A sentence-transformers model."""

    def __init__(self, name: str, device: torch.device) -> None:
        """Load the model; no code of its repository is run.

        Raises:
            SettingsError: If sentence-transformers is not installed or knows no such model.
        """
        need_extra("embeddings", f"--embedding {name}, which is neither `base` nor `words`,")
        from sentence_transformers import (  # pyright: ignore[reportMissingImports]
            SentenceTransformer,
        )

        try:
            self._model: Any = SentenceTransformer(
                name, device=str(device), trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )  # fmt: skip
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise SettingsError(
                f"--embedding {name}: no such sentence-transformers model: {reason}; or use "
                "`base` or `words`"
            ) from None
        self.width = int(self._model.get_sentence_embedding_dimension())

    def vectors(self, examples: Sequence[Example]) -> Array:
        """Return vectors, shape (rows, width)."""
        texts = [example.text for example in examples]
        return self._model.encode(texts, show_progress_bar=False, convert_to_numpy=True)
