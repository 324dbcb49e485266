"""From examples to token ids: chat format, supervised span, length limit."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal

from transformers import PreTrainedTokenizerBase

from d2lora.batches import Encoded, Pair, T
from d2lora.errors import DataError, ModelError, SettingsError
from d2lora.models import Base, n_embedded, n_positions, unknown_token
from d2lora.rows import BadRowError, Example, Message
from d2lora.settings import Overlong

Format = Literal["template", "plain"]
_SPEAKER = {"system": "System", "user": "User", "assistant": "Assistant"}


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
    n_positions: int = sys.maxsize
    """Tokens that the base takes in one row."""
    n_embedded: int = sys.maxsize
    """Tokens that the base's embedding has rows for."""

    @classmethod
    def of(cls, base: Base, chat_format: str | None) -> "Encoder":
        """Return the encoder of a base's tokenizer."""
        form = resolve_format(base.tokenizer, chat_format)
        return cls(base.tokenizer, form, n_positions(base.model), n_embedded(base.model))

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """Return the ids that a completion follows, ready for generation.

        Raises:
            DataError: If the chat format cannot show a turn.
            ModelError: If a token is beyond the base's embedding.
        """
        if fault := self._unshown(prompt):
            raise DataError(fault)
        if self.format == "template" and prompt:
            return self._ids(self._templated(prompt, completing=True))
        ids = self.tokenizer(plain_prompt(prompt))["input_ids"]
        assert isinstance(ids, list)
        self._check(ids)
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def check(self, example: Example) -> None:
        """Check that the chat format shows every turn of an example's prompt.

        Raises:
            BadRowError: If it does not.
        """
        if fault := self._unshown(example.prompt):
            raise BadRowError(fault)

    def _unshown(self, prompt: Sequence[Message]) -> str | None:
        """Say which turn of a tool the chat format leaves out; None where it shows all."""
        for place, turn in enumerate(prompt):
            if not turn.of_tools:
                continue
            told = "is a tool's" if turn.role == "tool" else "calls a tool"
            if self.format == "plain":
                return (
                    f"turn {place + 1} {told}, which the plain chat format cannot show; use a base "
                    "whose chat template can"
                )
            shown = self._templated(prompt, completing=True)
            for other in turn.altered():
                changed = (*prompt[:place], other, *prompt[place + 1 :])
                if self._templated(changed, completing=True) == shown:
                    return (
                        f"turn {place + 1} {told}, and the base's chat template leaves that out; "
                        "use a base whose template supports tools"
                    )
        return None

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

    def encode_within(self, example: Example, max_length: int) -> Encoded:
        """Return an example's ids, cut to `max_length` tokens and to what the base takes."""
        return self.encode(example).truncated(min(max_length, self.n_positions))

    def encode_pair(self, example: Example) -> Pair:
        """Return the ids of a preference: its prompt with either completion."""
        assert example.rejected is not None
        other = replace(example, completion=example.rejected)
        return Pair(self.encode(example), self.encode(other))

    def _templated(self, messages: Sequence[Message], *, completing: bool) -> str:
        turns = [turn.to_dict() for turn in messages]
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
        self._check(ids)
        return ids

    def _check(self, ids: Sequence[int]) -> None:
        for token in ids:
            if token >= self.n_embedded:
                raise ModelError(unknown_token(token, self.tokenizer, self.n_embedded))


@dataclass(frozen=True)
class EncodedSet(Generic[T]):
    """Examples within the length limit, and what became of the others."""

    items: list[T]
    kept: list[int]
    n_dropped: int
    n_truncated: int
    longest: int
    limit: int
    """Tokens that a row may have."""

    def report(self, max_length: int) -> str | None:
        """Say what became of over-long examples; None where there were none."""
        if not self.n_dropped and not self.n_truncated:
            return None
        what = f"dropped {self.n_dropped}" if self.n_dropped else f"truncated {self.n_truncated}"
        total = len(self.items) + self.n_dropped
        return (
            f"{what} of {total} examples longer than {min(max_length, self.limit)} tokens (longest "
            f"{self.longest})"
        )


def encode_all(
    encoder: Encoder, examples: Sequence[Example], max_length: int, overlong: Overlong
) -> EncodedSet[Encoded]:
    """Encode examples and apply the length limit; of a preference the chosen completion counts.

    Raises:
        DataError: If `overlong` is `error` and an example is too long, or none is left.
    """
    encoded = [encoder.encode(example) for example in examples]
    return _limited(encoded, encoder, max_length, overlong)


def encode_pairs(
    encoder: Encoder, examples: Sequence[Example], max_length: int, overlong: Overlong
) -> EncodedSet[Pair]:
    """Encode preferences and apply the length limit, to the longer completion of each.

    Raises:
        DataError: As `encode_all`.
    """
    encoded = [encoder.encode_pair(example) for example in examples]
    return _limited(encoded, encoder, max_length, overlong)


def _limited(
    encoded: Sequence[T], encoder: Encoder, max_length: int, overlong: Overlong
) -> EncodedSet[T]:
    longest = max((item.length for item in encoded), default=0)
    limit = min(max_length, encoder.n_positions)
    too_long = [index for index, item in enumerate(encoded) if item.length > limit]
    if too_long and overlong == "error":
        own = limit < max_length
        named = f"the {limit} tokens that the base takes" if own else f"--max-length {limit} tokens"
        raise DataError(
            f"{len(too_long)} of {len(encoded)} examples are longer than {named} (the longest has "
            f"{longest}); {'' if own else 'raise it, or '}set --overlong to drop or truncate"
        )
    dropped = set(too_long) if overlong == "drop" else set[int]()
    kept = [index for index in range(len(encoded)) if index not in dropped]
    if not kept:
        raise DataError(f"no example is left within {limit} tokens (--max-length {max_length})")
    items = [encoded[index].truncated(limit) for index in kept]
    n_truncated = len(too_long) if overlong == "truncate" else 0
    return EncodedSet(items, kept, len(dropped), n_truncated, longest, limit)
