"""Rows of a batch end to end in one long row, without padding, each blind to the others.

Linear layers, norms and the head then meet no padding, and attention is computed row by row, by
`RowAttention` where that pays and else by torch's own causal kernel; both are exact. It plugs into
transformers' attention interface (https://huggingface.co/docs/transformers/attention_interface), so
a model's code is not touched.
Shapes: B rows, N tokens of all rows, H heads, D width of a head.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from d2lora.data.batches import Batch
from d2lora.fast.attention import RowAttention, pays

NAME = "d2lora_packed"
_SETTING = "_attn_implementation"
"""No public name reads it, and `set_attn_implementation` checks and logs at every call."""
LENGTH_STEP = 32
"""Packed rows are filled up to a multiple of this, for the reason of `batches.WIDTH_STEP`."""


class Packed(NamedTuple):
    """Ids of all rows in order, then filler tokens that no row sees."""

    ids_1N: Tensor
    positions_1N: Tensor
    bounds: Tensor
    """Where rows start, and where the last one ends: (B + 2,) with the filler as the last row."""


def pack(batch: Batch) -> Packed:
    """Lay the rows of a batch end to end."""
    lengths_B = batch.mask_BT.sum(1)
    n_filler = -int(lengths_B.sum()) % LENGTH_STEP
    real_BT = batch.mask_BT.bool()
    positions_BT = torch.arange(real_BT.shape[1], device=real_BT.device).expand_as(real_BT)
    ids_N = functional.pad(batch.ids_BT[real_BT], (0, n_filler))
    positions_N = functional.pad(positions_BT[real_BT], (0, n_filler))
    ends = torch.cat([lengths_B, lengths_B.new_tensor([n_filler])]).cumsum(0)
    return Packed(ids_N[None], positions_N[None], functional.pad(ends, (1, 0)))


def takes_packed_rows(model: PreTrainedModel) -> bool:
    """Say whether a model's attention can be taken row by row: full, causal, and torch's own.

    On a GPU rows of one width are faster than many small kernels, so packing is for a CPU.
    """
    config = model.config
    return (
        model.device.type == "cpu"
        and model.is_backend_compatible()
        and _attention_of(model) == "sdpa"
        and getattr(config, "sliding_window", None) is None
        and getattr(config, "attn_logit_softcapping", None) is None
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    )


@contextmanager
def row_by_row(model: PreTrainedModel) -> Generator[None]:
    """Let a model's attention see the rows that its call names as `cu_seq_lens_q`."""
    before = _attention_of(model)
    ALL_ATTENTION_FUNCTIONS[NAME] = _attention
    setattr(model.config, _SETTING, NAME)
    try:
        yield
    finally:
        setattr(model.config, _SETTING, before)
        del ALL_ATTENTION_FUNCTIONS[NAME]


def are_rows_packed(model: PreTrainedModel) -> bool:
    """Say whether a model is inside a block of `row_by_row`."""
    return _attention_of(model) == NAME


def _attention_of(model: PreTrainedModel) -> str | None:
    return getattr(model.config, _SETTING)


def _attention(
    module: nn.Module,
    query_1HND: Tensor,
    key_1HND: Tensor,
    value_1HND: Tensor,
    _mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention within each row, (1, N, H, D); no mask is needed.

    A model that does not pass the rows on is detected by `TokenScorer`: it sees one row.
    """
    whole = [query_1HND.shape[2]]
    lengths = whole if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    if pays(query_1HND, lengths, dropout):
        scale = query_1HND.shape[-1] ** -0.5 if scaling is None else scaling
        return RowAttention.apply(query_1HND, key_1HND, value_1HND, lengths, scale), None
    heads = (x.split(lengths, dim=2) for x in (query_1HND, key_1HND, value_1HND))
    groups: int = getattr(module, "num_key_value_groups", 1)
    rows = [
        functional.scaled_dot_product_attention(
            *row, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=groups > 1
        ).transpose(1, 2)
        for row in zip(*heads, strict=True)
        if row[0].shape[2]
    ]
    return torch.cat(rows, dim=1), None
