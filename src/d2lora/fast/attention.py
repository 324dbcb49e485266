"""Causal attention of rows laid end to end, for training on a CPU.

Torch's kernel for CPUs goes through a row in small tiles. A row of a few hundred tokens is a
handful of matrix products instead, at the speed of those: a fifth to a third less time in float32,
half of it in bfloat16, in which scores, their softmax and all sums stay float32. The
probabilities are kept for the backward pass, so memory grows with the square of a row's length.
Shapes: N tokens of all rows, H heads of queries in G groups of R, D width of a head.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

softmax_backward = torch.ops.aten._softmax_backward_data  # noqa: SLF001  # it has no other name
BLOCK = 64
"""Queries taken at once: few enough that little is computed above the diagonal."""
SHORTEST_MEAN, LONGEST = 96, 768
"""Shorter rows are mostly overhead; longer ones would keep too many probabilities."""
WIDTH_A_THREAD = 32
"""Products of narrow heads are too small to be shared among threads."""


def pays(query: Tensor, lengths: Sequence[int], dropout: float) -> bool:
    """Say whether rows of these lengths are trained faster, and as well, by `RowAttention`."""
    return (
        query.requires_grad
        and not dropout
        and query.dtype in (torch.float32, torch.bfloat16)
        and sum(lengths) >= SHORTEST_MEAN * len(lengths)
        and max(lengths) <= LONGEST
        and query.shape[-1] >= WIDTH_A_THREAD * torch.get_num_threads()
    )


class RowAttention(torch.autograd.Function):
    """Softmax attention within each row.

    `RowAttention.apply(query, key, value, lengths, scale)` takes (1, H, N, D), twice (1, G, N, D),
    the lengths of the rows and the factor of the products, and returns (1, N, H, D).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float
    ) -> Tensor:
        """Attend block by block, and keep the probabilities."""
        n_heads, n_tokens, width = query.shape[1:]
        k_GND, v_GND = key[0], value[0]
        q_GRND = query[0].unflatten(0, (len(k_GND), -1))
        wide_GND = k_GND.float()
        above = wide_GND.new_full((BLOCK, BLOCK), -math.inf).triu_(1)
        out_1NHD = query.new_empty(1, n_tokens, n_heads, width)
        out_GRND = _grouped(out_1NHD, len(k_GND))
        kept: list[Tensor] = []
        for first, begin, end in _blocks(lengths):
            shape = (-1, end - begin)
            q = (q_GRND[:, :, begin:end].float() * scale).flatten(1, 2)
            products = q @ wide_GND[:, first:end].transpose(1, 2)
            own = products.unflatten(1, shape)[..., begin - first :]
            own += above[: end - begin, : end - begin]
            p = products.softmax(-1).to(value.dtype)
            out_GRND[:, :, begin:end] = (p @ v_GND[:, first:end]).unflatten(1, shape)
            kept.append(p)
        ctx.save_for_backward(q_GRND, k_GND, v_GND, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return out_1NHD

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Return the gradients of queries, keys and values."""
        grad_1NHD = grad_outputs[0]
        q_GRND, k_GND, v_GND, *kept = ctx.saved_tensors
        g_GRND = _grouped(grad_1NHD, len(k_GND))
        dq_1NHD = torch.empty_like(grad_1NHD)
        dq_GRND = _grouped(dq_1NHD, len(k_GND))
        dk_GND, dv_GND = (torch.zeros_like(x, dtype=torch.float32) for x in (k_GND, v_GND))
        for (first, begin, end), p in zip(_blocks(ctx.lengths), kept, strict=True):
            g, q = (x[:, :, begin:end].flatten(1, 2) for x in (g_GRND, q_GRND))
            dv_GND[:, first:end] += p.transpose(1, 2) @ g
            dp = g @ v_GND[:, first:end].transpose(1, 2)
            ds = softmax_backward(dp, p, -1, p.dtype)
            dq = ds @ k_GND[:, first:end]
            dq_GRND[:, :, begin:end] = dq.unflatten(1, (-1, end - begin))
            dk_GND[:, first:end] += ds.transpose(1, 2) @ q
        dq_1NHD *= ctx.scale
        dk_GND *= ctx.scale
        dk_GND, dv_GND = dk_GND.to(k_GND.dtype), dv_GND.to(v_GND.dtype)
        return dq_1NHD.transpose(1, 2), dk_GND[None], dv_GND[None], None, None


def _blocks(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield where a block's row starts, and where the block starts and ends."""
    first = 0
    for length in lengths:
        for begin in range(first, first + length, BLOCK):
            yield first, begin, min(begin + BLOCK, first + length)
        first += length


def _grouped(x_1NHD: Tensor, n_groups: int) -> Tensor:
    """Return (1, N, H, D) seen as (G, R, N, D)."""
    return x_1NHD[0].unflatten(1, (n_groups, -1)).permute(1, 2, 0, 3)
