"""Tokens one after another by a model's own pass: the ways to do so, and which a model takes.

Rows are decoded together where that says what each says alone, in this order:

PaddedSteps      prompts padded on the left, with the model's cache
EqualSteps       prompts of one length, with the model's cache; for models that see padding
Recomputed       every row alone, from its beginning at every token; for models whose cache another
                 pass has to be written for

Shapes: B rows, T tokens, V vocabulary.
"""

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from d2lora.adapters.base import n_positions
from d2lora.runtime.attempts import succeeds
from d2lora.runtime.rounding import agree, distance, tolerance

_LONGER = 16
"""Tokens that a row is made longer by, to see how the model rounds."""
_OWN = 2
"""How far decoding may be from the model's own logits, in terms of the model's own rounding."""


class Steps(Protocol):
    """Prompts and what was decoded of them so far, in a model's memory."""

    @property
    def slack(self) -> int:
        """How many rows have to end before leaving is cheaper than being computed on."""
        ...

    @property
    def pads(self) -> bool:
        """Whether prompts of several lengths may be decoded together."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Compute prompts; return the logits behind each, (B, V)."""
        ...

    def step(self, next_B: Tensor) -> Tensor:
        """Take one token a row; return the logits behind it, (B, V)."""
        ...

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop the other rows; return which row is now where."""
        ...


class PaddedSteps:
    """Rows padded on the left, by transformers' own pass and cache."""

    slack = 1
    pads = True
    _given = ("attention_mask", "position_ids", "logits_to_keep")

    def __init__(self, causal: PreTrainedModel, pad_id: int) -> None:
        """Take a causal language model and a token for padding."""
        self._causal, self._pad_id = causal, pad_id
        self._cache = DynamicCache(config=causal.config)
        self._known = inspect.signature(causal.forward).parameters

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Compute prompts; return the logits behind each, (B, V)."""
        ids_BT, self._mask_BT = _left_padded(prompts, self._pad_id, self._causal.device)
        self._positions_BT = (self._mask_BT.cumsum(-1) - 1).clamp(min=0)
        return self._logits(ids_BT)

    def step(self, next_B: Tensor) -> Tensor:
        """Take one token a row; return the logits behind it, (B, V)."""
        self._mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(len(next_B), 1)], dim=1)
        self._positions_BT = self._positions_BT[:, -1:] + 1
        return self._logits(next_B[:, None])

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop the other rows; return which row is now where."""
        kept: Any = torch.tensor(rows, device=self._mask_BT.device)
        self._cache.reorder_cache(kept)  # all kinds of layers have it, recurrent ones too
        self._mask_BT, self._positions_BT = self._mask_BT[kept], self._positions_BT[kept]
        return list(rows)

    def _logits(self, ids_BT: Tensor) -> Tensor:
        cache = "past_key_values" if "past_key_values" in self._known else "cache_params"
        inputs: dict[str, Any] = {
            "attention_mask": self._mask_BT, "position_ids": self._positions_BT,
            "logits_to_keep": 1, cache: self._cache,
        }  # fmt: skip
        given = (*self._given, cache)
        taken = {k: value for k, value in inputs.items() if k in given and k in self._known}
        return self._causal(input_ids=ids_BT, use_cache=True, **taken).logits[:, -1]


class EqualSteps(PaddedSteps):
    """The same, of rows of one length, which need no mask; some models fail at one."""

    pads = False
    _given = ("position_ids", "logits_to_keep")


class Recomputed:
    """Every row from its beginning at every token; rows of one length."""

    slack = 1
    pads = False

    def __init__(self, causal: PreTrainedModel, _pad_id: int) -> None:
        """Take a causal language model."""
        self._causal = causal

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Compute prompts; return the logits behind each, (B, V)."""
        self._rows = [list(prompt) for prompt in prompts]
        return self._logits()

    def step(self, next_B: Tensor) -> Tensor:
        """Take one token a row; return the logits behind it, (B, V)."""
        for row, token in zip(self._rows, next_B.tolist(), strict=True):
            row.append(token)
        return self._logits()

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop the other rows; return which row is now where."""
        self._rows = [self._rows[row] for row in rows]
        return list(rows)

    def _logits(self) -> Tensor:
        return torch.cat([alone(self._causal, row) for row in self._rows])


def alone(causal: PreTrainedModel, ids: Sequence[int], n_behind: int = 0) -> Tensor:
    """Return the logits behind one row as the model computes it, without padding or cache.

    Args:
        causal: The model.
        ids: The row.
        n_behind: How many of its last tokens are left out of what the logits look at.
    """
    ids_1T = torch.tensor([list(ids)], device=causal.device)
    # The logits of every position of a long prompt may be gigabytes.
    known = "logits_to_keep" in inspect.signature(causal.forward).parameters
    last: dict[str, Any] = {"logits_to_keep": n_behind + 1} if known else {}
    return causal(input_ids=ids_1T, use_cache=False, **last).logits[:, -1 - n_behind]


def steps_of(
    causal: PreTrainedModel,
    pad_id: int,
    ends: Sequence[Sequence[int]],
    token: int,
    limit: int = sys.maxsize,
) -> "partial[Steps]":
    """Return what makes the steps of a batch: the first way that gives a model's own logits.

    Args:
        causal: The model.
        pad_id: A token for padding.
        ends: The shortest and the longest prompt.
        token: A token that follows them.
        limit: The tokens of a row beyond which it is left.
    """
    most = max(1, min(n_positions(causal), limit) - 2)  # two tokens follow
    fitting = [end[-most:] for end in ends]
    room = min(n_positions(causal), limit) - max(map(len, fitting)) - 1  # behind one token
    rounds = cache(partial(_own_rounding, causal, fitting, token, min(room, _LONGER)))
    for kind in (PaddedSteps, EqualSteps):
        if succeeds(partial(_says_the_same, kind, causal, pad_id, fitting, token, rounds)):
            return partial(kind, causal, pad_id)
    return partial(Recomputed, causal, pad_id)


def _own_rounding(
    causal: PreTrainedModel, ends: Sequence[Sequence[int]], token: int, n_longer: int
) -> float:
    """Return how far a model's own logits are from themselves in a pass of another length.

    Tokens that follow do not change what is before them, but for rounding, as kernels cut longer
    rows up in another way.
    """
    if causal.dtype == torch.float32:
        return 0.0  # its rounding is far below what is allowed
    rows = [*ends, *([*end, token] for end in ends)]
    found = [
        distance(alone(causal, [*row, *[token] * n_longer], n_longer)[0], alone(causal, row)[0])
        for row in rows
    ]
    return math.sqrt(sum(value**2 for value in found) / len(found))


def _says_the_same(
    kind: type[PaddedSteps],
    causal: PreTrainedModel,
    pad_id: int,
    ends: Sequence[Sequence[int]],
    token: int,
    own_rounding: Callable[[], float],
) -> bool:
    """Say whether rows side by side, of which one leaves, get the logits that they get alone.

    That is number by number, or as a whole within twice the model's own rounding.
    """
    groups = [ends] if kind.pads else [[end, end] for end in ends]
    for group in groups:
        steps, last = kind(causal, pad_id), len(group) - 1
        behind_BV = steps.prefill(group)
        next_BV = steps.step(torch.full((len(group),), token, device=causal.device))
        steps.keep([last])
        third_1V = steps.step(torch.tensor([token], device=causal.device))
        found = [*behind_BV, *next_BV, *third_1V]
        rows = [*group, *([*row, token] for row in group), [*group[last], token, token]]
        for own_V, ids in zip(found, rows, strict=True):
            known_V = alone(causal, ids)[0]
            largest = float(known_V.abs().max())
            least = max(1e-3, tolerance(causal.dtype) * largest)
            if agree(own_V, known_V, causal.dtype, least):
                continue
            if not distance(own_V, known_V) <= _OWN * own_rounding():
                return False
    return True


def _left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), longest), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    return ids_BT.to(device), mask_BT.to(device)
