"""Token ids and the batches made of them: rows, pairs, and prompts with several endings.

Shapes: B rows, T tokens of the longest, P predicted tokens in the whole batch.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor


class Item(Protocol):
    """What the loop learns from: one or several rows of token ids that belong together."""

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        ...

    @property
    def n_rows(self) -> int:
        """Rows in a forward pass."""
        ...

    @property
    def n_tokens(self) -> int:
        """Tokens of all rows, padding not."""
        ...

    @property
    def n_supervised(self) -> int:
        """Tokens that are predicted."""
        ...


T = TypeVar("T", bound=Item)

WIDTH_STEP = 16
"""Batches are padded to a multiple of this: oneDNN makes code for every new shape, and widths that
come again spare it (measured in `benchmarks/README.md`)."""


def padded_width(n_tokens: int) -> int:
    """Return the width of a batch whose longest row has so many tokens."""
    return math.ceil(n_tokens / WIDTH_STEP) * WIDTH_STEP


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example; those from `n_prompt` on are the completion, EOS included."""

    ids: tuple[int, ...]
    n_prompt: int

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.ids)

    @property
    def n_rows(self) -> int:
        """One row."""
        return 1

    @property
    def n_tokens(self) -> int:
        """Tokens of the row."""
        return len(self.ids)

    @property
    def n_supervised(self) -> int:
        """Tokens that are predicted; a completion without any prompt lacks its first."""
        return len(self.ids) - max(1, self.n_prompt)


@dataclass(frozen=True)
class PreferencePair:
    """The chosen and the rejected completion of one prompt, whose ids are the same in both."""

    chosen: Encoded
    rejected: Encoded
    reference: tuple[float, float] | None = None
    """Log-probabilities of both completions under the reference policy, in nats."""

    @property
    def length(self) -> int:
        """Tokens of the longer row."""
        return max(self.chosen.length, self.rejected.length)

    @property
    def n_rows(self) -> int:
        """A row for each completion."""
        return 2

    @property
    def n_tokens(self) -> int:
        """Tokens of both rows, the prompt counted twice."""
        return self.chosen.n_tokens + self.rejected.n_tokens

    @property
    def n_supervised(self) -> int:
        """Tokens of both completions."""
        return self.chosen.n_supervised + self.rejected.n_supervised


class Batch(NamedTuple):
    """Right-padded ids, and where the predicted tokens stand."""

    ids_BT: Tensor
    mask_BT: Tensor
    rows_P: Tensor
    columns_P: Tensor
    targets_P: Tensor
    every_token: bool = False
    """Whether the log-probabilities of every token are wanted there, not of the targets alone."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        tensors = {
            name: value.to(device)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor)
        }
        return self._replace(**tensors)

    def trimmed(self) -> "Batch":
        """Return the batch at the width of its longest row."""
        longest = int(self.mask_BT.sum(1).max())
        return self._replace(ids_BT=self.ids_BT[:, :longest], mask_BT=self.mask_BT[:, :longest])

    def row(self, index: int) -> "Batch":
        """Return one row with its padding, as a batch of one."""
        own = self.rows_P == index
        columns_P, targets_P = self.columns_P[own], self.targets_P[own]
        one = slice(index, index + 1)
        rows_P = torch.zeros_like(columns_P)
        return Batch(self.ids_BT[one], self.mask_BT[one], rows_P, columns_P, targets_P)

    def behind_another(self) -> "Batch":
        """Return this row, one alone, behind another of its tokens in reverse; both predict."""
        length = int(self.mask_BT.sum())
        other_BT = self.ids_BT.clone()
        other_BT[:, :length] = self.ids_BT[:, :length].flip(1)
        return Batch(
            torch.cat([other_BT, self.ids_BT]),
            self.mask_BT.repeat(2, 1),
            torch.cat([self.rows_P, self.rows_P + 1]),
            self.columns_P.repeat(2),
            self.targets_P.repeat(2),
        )


@dataclass(frozen=True)
class Question:
    """A prompt and its endings, as token ids; the prompt is not empty."""

    prompt: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]

    @cached_property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.prompt) + sum(map(len, self.endings))

    @property
    def reach(self) -> int:
        """Tokens of the prompt and its longest ending."""
        return len(self.prompt) + max(map(len, self.endings))


class Branches(NamedTuple):
    """A row for each question: the prompt once, then its endings, blind to each other."""

    ids_BT: Tensor
    positions_BT: Tensor
    mask_B1TT: Tensor
    """0 where a token sees another, the dtype's lowest value where not."""
    rows_P: Tensor
    columns_P: Tensor
    targets_P: Tensor
    owners_P: Tensor
    """The ending, counted over the whole batch, that a position belongs to."""

    def to(self, device: torch.device) -> "Branches":
        """Return the batch on a device."""
        return Branches(*(tensor.to(device) for tensor in self))


def digest_of(items: Iterable[Encoded | PreferencePair]) -> str:
    """Return a fingerprint of rows in their order: SHA-256 of their ids and prompts' lengths."""
    digest = hashlib.sha256()
    for item in items:
        rows = (item.chosen, item.rejected) if isinstance(item, PreferencePair) else (item,)
        for row in rows:
            digest.update(np.array((row.n_prompt, len(row.ids), *row.ids)).tobytes())
    return digest.hexdigest()


def collate(items: Sequence[Encoded], pad_id: int) -> Batch:
    """Pad examples on the right and list the positions whose next token is supervised."""
    width = padded_width(max(len(item.ids) for item in items))
    ids_BT = torch.full((len(items), width), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(items), width), dtype=torch.long)
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for row, item in enumerate(items):
        length = len(item.ids)
        ids_BT[row, :length] = torch.tensor(item.ids)
        mask_BT[row, :length] = 1
        column = torch.arange(max(1, item.n_prompt) - 1, length - 1)
        columns.append(column)
        rows.append(torch.full_like(column, row))
    rows_P, columns_P = torch.cat(rows), torch.cat(columns)
    return Batch(ids_BT, mask_BT, rows_P, columns_P, ids_BT[rows_P, columns_P + 1])


def micro_batches(
    items: Sequence[T], max_tokens: int, max_size: int | None = None
) -> list[list[T]]:
    """Cut a batch into forward passes of like length, longest first, with little padding.

    Each holds at most `max_tokens` padded tokens and `max_size` examples, at least one example.
    """
    ordered = sorted(items, key=lambda item: -item.length)
    groups: list[list[T]] = []
    for item in ordered:
        group = groups[-1] if groups else []
        full = len(group) == max_size
        a_row = padded_width(group[0].length) if group else 0
        if not group or full or (len(group) + 1) * item.n_rows * a_row > max_tokens:
            groups.append([item])
        else:
            group.append(item)
    return groups


def branch(questions: Sequence[Question], pad_id: int, dtype: torch.dtype) -> Branches:
    """Lay out a row for each question, every ending right behind the prompt by its positions.

    Args:
        questions: The prompts and their endings.
        pad_id: Token id for padding.
        dtype: The model's dtype, of the mask.
    """
    width = padded_width(max(question.length for question in questions))
    ids_BT = torch.full((len(questions), width), pad_id)
    positions_BT = torch.zeros_like(ids_BT)
    sees_BTT = torch.eye(width, dtype=torch.bool).repeat(len(questions), 1, 1)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    owner = 0
    for row, question in enumerate(questions):
        n_prompt = len(question.prompt)
        ids_BT[row, :n_prompt] = torch.tensor(question.prompt)
        positions_BT[row, :n_prompt] = torch.arange(n_prompt)
        sees_BTT[row, :n_prompt, :n_prompt] = torch.ones(n_prompt, n_prompt).tril().bool()
        begin = n_prompt
        for ending in question.endings:
            end = begin + len(ending)
            ids_BT[row, begin:end] = torch.tensor(ending)
            positions_BT[row, begin:end] = torch.arange(n_prompt, n_prompt + len(ending))
            sees_BTT[row, begin:end, :n_prompt] = True
            own = torch.ones(len(ending), len(ending)).tril().bool()
            sees_BTT[row, begin:end, begin:end] = own
            columns += [n_prompt - 1, *range(begin, end - 1)]
            rows += [row] * len(ending)
            targets += ending
            owners += [owner] * len(ending)
            owner, begin = owner + 1, end
    hidden = torch.zeros(sees_BTT.shape, dtype=dtype)
    hidden.masked_fill_(~sees_BTT, torch.finfo(dtype).min)
    where = (torch.tensor(values) for values in (rows, columns, targets, owners))
    return Branches(ids_BT, positions_BT, hidden[:, None], *where)
