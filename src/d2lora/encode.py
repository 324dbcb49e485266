"""From examples to token ids: chat format, supervised span, length limit, micro-batches.

Shapes: B examples, T tokens of the longest, P supervised tokens in the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from d2lora.errors import DataError, SettingsError
from d2lora.models import Base
from d2lora.settings import Overlong
from d2lora.tasks import Example, Message

Format = Literal["template", "plain"]
_SPEAKER = {"system": "System", "user": "User", "assistant": "Assistant"}


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example; those from `n_prompt` on are the completion, EOS included."""

    ids: tuple[int, ...]
    n_prompt: int

    @property
    def n_supervised(self) -> int:
        """Tokens that are predicted; a completion without any prompt lacks its first."""
        return len(self.ids) - max(1, self.n_prompt)


class Batch(NamedTuple):
    """Right-padded ids, and where the predicted tokens stand."""

    ids_BT: Tensor
    mask_BT: Tensor
    rows_P: Tensor
    columns_P: Tensor
    targets_P: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(*(tensor.to(device) for tensor in self))

    def row(self, index: int) -> "Batch":
        """Return one row with its padding, as a batch of one."""
        own = self.rows_P == index
        columns_P, targets_P = self.columns_P[own], self.targets_P[own]
        one = slice(index, index + 1)
        rows_P = torch.zeros_like(columns_P)
        return Batch(self.ids_BT[one], self.mask_BT[one], rows_P, columns_P, targets_P)


def resolve_format(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> Format:
    """Return the chat format to use; None and `auto` take the template where there is one.

    Raises:
        SettingsError: If a template is wanted and the tokenizer has none.
    """
    has_template = tokenizer.chat_template is not None
    if wanted == "template" and not has_template:
        raise SettingsError(
            "--chat-format template: the base's tokenizer has no chat template; use plain or auto"
        )
    if wanted in (None, "auto"):
        return "template" if has_template else "plain"
    return "plain" if wanted == "plain" else "template"


def plain_prompt(messages: Sequence[Message]) -> str:
    r"""Return the plain chat format of the given turns: `User: ...\nAssistant:`.

    The completion follows after a space and ends in EOS. No turns give an empty prompt.
    """
    turns = [f"{_SPEAKER[turn.role]}: {turn.content}\n" for turn in messages]
    return "".join(turns) + "Assistant:" if turns else ""


@dataclass(frozen=True)
class Encoder:
    """Turns examples into token ids in one chat format."""

    tokenizer: PreTrainedTokenizerBase
    format: Format

    @classmethod
    def of(cls, base: Base, chat_format: str | None) -> "Encoder":
        """Return the encoder of a base's tokenizer."""
        return cls(base.tokenizer, resolve_format(base.tokenizer, chat_format))

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """Return the ids that a completion follows, ready for generation."""
        if self.format == "template" and prompt:
            return self._ids(self._templated(prompt, completing=True))
        ids = self.tokenizer(plain_prompt(prompt))["input_ids"]
        assert isinstance(ids, list)
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def encode(self, example: Example) -> Encoded:
        """Return an example's ids; the prompt and the completion are tokenized apart.

        So the prompt's ids are the same in training and in generation, and the supervised span
        is exactly the completion and EOS.
        """
        prompt = self.prompt_ids(example.prompt)
        if self.format == "template" and example.prompt:
            completion = self._templated_completion(example)
        else:
            completion = self._ids((" " if example.prompt else "") + example.completion)
        eos_id = self.tokenizer.eos_token_id
        assert isinstance(eos_id, int)
        if completion[-1] != eos_id:
            completion.append(eos_id)
        return Encoded((*prompt, *completion), len(prompt))

    def _templated(self, messages: Sequence[Message], *, completing: bool) -> str:
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        text = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=completing
        )
        assert isinstance(text, str)
        return text

    def _templated_completion(self, example: Example) -> list[int]:
        prompt = self._templated(example.prompt, completing=True)
        answered = (*example.prompt, Message("assistant", example.completion))
        whole = self._templated(answered, completing=False)
        if not whole.startswith(prompt):
            raise SettingsError(
                "the chat template renders a prompt in another way once it is answered, so the "
                "completion cannot be told apart; use --chat-format plain"
            )
        ids = self._ids(whole[len(prompt) :])
        eos_id = self.tokenizer.eos_token_id
        # Templates end a turn with EOS and often a newline, which no one generates.
        return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert isinstance(ids, list)
        return ids


@dataclass(frozen=True)
class EncodedSet:
    """Examples within the length limit, and what became of the others."""

    items: list[Encoded]
    kept: list[int]
    n_dropped: int
    n_truncated: int
    longest: int

    def report(self, max_length: int) -> str | None:
        """Say what became of over-long examples; None where there were none."""
        if not self.n_dropped and not self.n_truncated:
            return None
        what = f"dropped {self.n_dropped}" if self.n_dropped else f"truncated {self.n_truncated}"
        total = len(self.items) + self.n_dropped
        return (
            f"{what} of {total} examples longer than {max_length} tokens (longest {self.longest})"
        )


def encode_all(
    encoder: Encoder, examples: Sequence[Example], max_length: int, overlong: Overlong
) -> EncodedSet:
    """Encode examples and apply the length limit.

    Raises:
        DataError: If `overlong` is `error` and an example is too long, or none is left.
    """
    encoded = [encoder.encode(example) for example in examples]
    longest = max((len(item.ids) for item in encoded), default=0)
    too_long = [index for index, item in enumerate(encoded) if len(item.ids) > max_length]
    if too_long and overlong == "error":
        raise DataError(
            f"{len(too_long)} of {len(encoded)} examples are longer than --max-length "
            f"{max_length} tokens (the longest has {longest}); raise it, or set --overlong to "
            "drop or truncate"
        )
    dropped = set(too_long) if overlong == "drop" else set[int]()
    kept = [index for index in range(len(encoded)) if index not in dropped]
    if not kept:
        raise DataError(f"no example is left within --max-length {max_length} tokens")
    items = [truncate(encoded[index], max_length) for index in kept]
    n_truncated = len(too_long) if overlong == "truncate" else 0
    return EncodedSet(items, kept, len(dropped), n_truncated, longest)


def truncate(item: Encoded, max_length: int) -> Encoded:
    """Cut an example to `max_length`: the prompt's start first, then the completion's end.

    The prompt keeps its first token (BOS) and its end, a quarter of the length where it has so
    much, so neither part is ever cut away whole.
    """
    excess = len(item.ids) - max_length
    if excess <= 0:
        return item
    least = min(item.n_prompt, max(1, max_length // 4))
    n_cut = min(excess, item.n_prompt - least)
    ids = item.ids[:1] + item.ids[1 + n_cut :] if n_cut else item.ids
    return replace(item, ids=ids[:max_length], n_prompt=item.n_prompt - n_cut)


def collate(items: Sequence[Encoded], pad_id: int) -> Batch:
    """Pad examples on the right and list the positions whose next token is supervised."""
    longest = max(len(item.ids) for item in items)
    ids_BT = torch.full((len(items), longest), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(items), longest), dtype=torch.long)
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
    items: Sequence[Encoded], max_tokens: int, max_size: int | None = None
) -> list[list[Encoded]]:
    """Cut a batch into forward passes of like length, longest first, with little padding.

    Each holds at most `max_tokens` padded tokens and `max_size` examples, at least one example.
    """
    ordered = sorted(items, key=lambda item: -len(item.ids))
    groups: list[list[Encoded]] = []
    for item in ordered:
        group = groups[-1] if groups else []
        full = len(group) == max_size
        if not group or full or (len(group) + 1) * len(group[0].ids) > max_tokens:
            groups.append([item])
        else:
            group.append(item)
    return groups
