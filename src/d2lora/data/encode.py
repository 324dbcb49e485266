"""From an example to token ids: chat format, supervised span, length limit."""

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from d2lora.adapters.base import Base, n_positions, tokenizer_of, unknown_token
from d2lora.adapters.chat_template import with_template
from d2lora.adapters.foreign import is_panic
from d2lora.data.batches import Encoded, PreferencePair
from d2lora.data.chat_text import ChatText, Format
from d2lora.data.rows import BadRowError, Example, Message
from d2lora.data.special_tokens import check_template
from d2lora.data.truncation import Span, fitted
from d2lora.errors import DataError, ModelError, SettingsError, first_line
from d2lora.settings import BaseSettings


def resolve_format(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> Format:
    """Return the chat format to use; None and `auto` take the template where there is one.

    Raises:
        SettingsError: If a template is wanted and the tokenizer has none, or one that no time
            limit could stop.
    """
    has_template = tokenizer.chat_template is not None
    if wanted == "template" and not has_template:
        raise SettingsError(
            "--chat-format template: the base's tokenizer has no chat template; use plain or auto"
        )
    if wanted == "plain" or not has_template:
        return "plain"
    check_template(tokenizer)
    return "template"


@dataclass(frozen=True)
class Encoder:
    """Turns examples into token ids in one chat format.

    Special tokens come from the format alone: their strings in data are text. What a chat template
    does to a text, such as stripping it, is done in training as in generation.
    """

    tokenizer: PreTrainedTokenizerBase
    format: Format
    n_positions: int = sys.maxsize
    """Tokens that the base takes in one row."""
    n_embedded: int = sys.maxsize
    """Tokens that the base's embedding has rows for."""

    @classmethod
    def of(cls, base: Base, chat_format: str | None, template: str | None = None) -> "Encoder":
        """Return the encoder of a base's tokenizer.

        Args:
            base: The base.
            chat_format: As for `resolve_format`.
            template: The chat template of what is trained or measured, where the settings give no
                other. None: the base's.
        """
        tokenizer = base.tokenizer
        if base.chat_template is None:
            tokenizer = with_template(tokenizer, template)
        form = resolve_format(tokenizer, chat_format)
        _check_used(form, template_given=base.chat_template is not None)
        return cls(tokenizer, form, n_positions(base.model), base.n_rows)

    @classmethod
    def of_tokenizer(cls, settings: BaseSettings, chat_format: str | None) -> "Encoder":
        """Return the encoder of a base that is not loaded, which knows no limits."""
        tokenizer = tokenizer_of(settings)
        form = resolve_format(tokenizer, chat_format)
        given = bool(settings.chat_template or settings.template_args)
        _check_used(form, template_given=given)
        return cls(tokenizer, form)

    def encode(self, example: Example, max_length: int | None = None) -> Encoded:
        """Return an example's ids; the prompt and the completion are tokenized apart.

        So the prompt's ids are the same in training and in generation, and the supervised span
        is exactly the completion and EOS.

        Args:
            example: The row.
            max_length: Most tokens, and no more than the base takes. A longer row loses the middle
                of its longest field, a document its end.

        Raises:
            DataError: If the chat template refuses the turns, or nothing is left to cut.
        """
        with _placed(example):
            encoded, limit = self._encode(example), self._limit(max_length)
            if limit is None or encoded.length <= limit:
                return encoded
            if not example.prompt:
                return replace(encoded, ids=encoded.ids[:limit])
            return self._encode(
                fitted(example, lambda e: self._encode(e).length, limit, self._spans)
            )

    def encode_pair(self, example: Example, max_length: int | None = None) -> PreferencePair:
        """Return the ids of a preference: its prompt with either completion; as `encode`."""
        with _placed(example):
            pair, limit = self._encode_pair(example), self._limit(max_length)
            if limit is None or pair.length <= limit:
                return pair
            return self._encode_pair(
                fitted(example, lambda e: self._encode_pair(e).length, limit, self._spans)
            )

    def _limit(self, max_length: int | None) -> int | None:
        return None if max_length is None else min(max_length, self.n_positions)

    def prompt_of(self, example: Example, max_length: int | None = None) -> list[int]:
        """Return the ids of an example's prompt alone, cut as `encode` cuts."""
        with _placed(example):
            ids = self._prompt_ids(example)
            if max_length is None or len(ids) <= max_length:
                return ids
            alone = replace(example, completion="", rejected=None)
            cut = fitted(alone, lambda e: len(self._prompt_ids(e)), max_length, self._spans)
            return self._prompt_ids(cut)

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """Return the ids that a completion follows, ready for generation.

        Raises:
            DataError: If the chat template refuses the turns, or does not show one.
            ModelError: If a token is beyond the base's embedding.
        """
        return self._prompt_ids(Example(tuple(prompt), ""))

    def _prompt_ids(self, asked: Example) -> list[int]:
        text = self._text.prompt(asked)
        if self.format == "template" and asked.prompt:
            return self._ids(text)
        ids = self._ids(text, whole=True)
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def answer_ids(self, example: Example) -> tuple[int, ...]:
        """Return the ids of a completion alone, without what the chat format ends a turn with."""
        with _placed(example):
            answer = self._text.answer(example)
            if self.format == "template" and example.prompt:
                text, found, _ = answer.rpartition(
                    self._text.shield.marked(example.completion).strip()
                )
                answer = text + found
            return tuple(self._ids(answer))

    def check(self, example: Example) -> None:
        """Check that the chat format takes an example, and shows every turn of its prompt.

        Raises:
            BadRowError: If it does not.
        """
        try:
            self._text.prompt(example)
            if example.completion:
                self._text.answer(example)
            if example.rejected:
                self._text.answer(replace(example, completion=example.rejected))
        except DataError as error:
            raise BadRowError(str(error)) from None

    def as_written(self, example: Example) -> Example:
        """Return an example whose completion is the text that the model would generate for it.

        That is another one where the answer calls tools, which each template writes in its way.
        """
        if not example.more or self.format == "plain":
            return example
        with _placed(example):
            ids = self._completion_ids(example)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return replace(example, completion=text.strip())

    def _encode(self, example: Example) -> Encoded:
        prompt, completion = self._prompt_ids(example), self._completion_ids(example)
        eos_id = self.tokenizer.eos_token_id
        assert isinstance(eos_id, int)
        if not completion or completion[-1] != eos_id:
            completion.append(eos_id)
        return Encoded((*prompt, *completion), len(prompt))

    def _encode_pair(self, example: Example) -> PreferencePair:
        assert example.rejected is not None
        other = replace(example, completion=example.rejected)
        return PreferencePair(self._encode(example), self._encode(other))

    def _completion_ids(self, example: Example) -> list[int]:
        ids = self._ids(self._text.answer(example))
        eos_id = self.tokenizer.eos_token_id
        # Templates end a turn with EOS and often a newline, which is never generated.
        return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids

    def _ids(self, text: str, *, whole: bool = False) -> list[int]:
        ids = self._text.shield.ids(text, whole=whole)
        self._check(ids)
        return ids

    def _check(self, ids: Sequence[int]) -> None:
        for token in ids:
            if token >= self.n_embedded:
                raise ModelError(unknown_token(token, self.tokenizer, self.n_embedded))

    def _spans(self, text: str) -> Sequence[Span]:
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            return [(place, place + 1) for place in range(len(text))]
        encoding = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        return encoding["offset_mapping"]

    @cached_property
    def _text(self) -> ChatText:
        return ChatText(self.tokenizer, self.format)


def _check_used(form: Format, *, template_given: bool) -> None:
    if form == "plain" and template_given:
        raise SettingsError(
            "the chat format is plain, and --chat-template and --template-args are about chat "
            "templates; leave them out, or set --chat-format template"
        )


@contextmanager
def _placed(example: Example) -> Generator[None]:
    """Name the row in what goes wrong."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{example.place}: {error}" if example.place else str(error)) from None
    except BaseException as error:
        if not is_panic(error):
            raise
        reason = f"the base's tokenizer gives up on it: {first_line(error)}"
        raise DataError(f"{example.place}: {reason}" if example.place else reason) from None
