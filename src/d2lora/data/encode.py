"""From an example to token ids: chat format, supervised span, length limit."""

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from d2lora.adapters.base import Base, n_embedded, n_positions, unknown_token
from d2lora.adapters.chat_template import with_template
from d2lora.data.batches import Encoded, PreferencePair
from d2lora.data.rows import BadRowError, Example, Message
from d2lora.data.special_tokens import OF_TEMPLATES, Shield, markers_of
from d2lora.data.truncation import Span, fitted
from d2lora.errors import DataError, ModelError, SettingsError

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
        return cls(tokenizer, form, n_positions(base.model), n_embedded(base.model))

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
            ids = self.prompt_ids(example.prompt)
            if max_length is None or len(ids) <= max_length:
                return ids
            alone = replace(example, completion="", rejected=None)
            cut = fitted(alone, lambda e: len(self.prompt_ids(e.prompt)), max_length, self._spans)
            return self.prompt_ids(cut.prompt)

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """Return the ids that a completion follows, ready for generation.

        Raises:
            DataError: If the chat template refuses the turns, or does not show one.
            ModelError: If a token is beyond the base's embedding.
        """
        text = self._prompt_text(prompt)
        if self.format == "template" and prompt:
            return self._ids(text)
        ids = self._ids(text, whole=True)
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def answer_ids(self, example: Example) -> tuple[int, ...]:
        """Return the ids of a completion alone, without what the chat format ends a turn with."""
        with _placed(example):
            marked = self._shield.marked(example.completion)
            if self.format == "plain" or not example.prompt:
                return tuple(self._ids((" " if example.prompt else "") + marked))
            text, found, _ = self._answered(example).rpartition(marked.strip())
            return tuple(self._ids(text + found))

    def check(self, example: Example) -> None:
        """Check that the chat format takes an example, and shows every turn of its prompt.

        Raises:
            BadRowError: If it does not.
        """
        try:
            self._prompt_text(example.prompt)
            for completion in (example.completion, example.rejected):
                if self.format == "template" and example.prompt and completion:
                    self._answered(replace(example, completion=completion))
        except DataError as error:
            raise BadRowError(str(error)) from None

    def _prompt_text(self, prompt: Sequence[Message]) -> str:
        """Return a prompt as the chat format writes it, special tokens of data marked.

        Raises:
            DataError: If the chat template refuses the turns, or does not show one.
        """
        if fault := self._unshown_tool(prompt) or self._unshown(prompt):
            raise DataError(fault)
        if self.format == "template" and prompt:
            return self._templated(prompt, completing=True)
        return self._shield.marked(plain_prompt(prompt))

    def _unshown(self, prompt: Sequence[Message]) -> str | None:
        """Return a message on a turn that the template leaves out; else None.

        That depends on the roles, so it is looked at once for each order of them.
        """
        roles = tuple(turn.role for turn in prompt)
        if self.format == "plain" or not prompt or roles in self._shown:
            return None
        shown = self._templated(prompt, completing=True)
        for place, turn in enumerate(prompt):
            other = replace(turn, content=f"{turn.content} and more")
            changed = (*prompt[:place], other, *prompt[place + 1 :])
            if not turn.of_tools and self._templated(changed, completing=True) == shown:
                return (
                    f"turn {place + 1}, the {turn.role}'s, is left out by {self._template}; put "
                    "its text into a turn that the template shows, or use --chat-format plain"
                )
        self._shown.add(roles)
        return None

    def _unshown_tool(self, prompt: Sequence[Message]) -> str | None:
        """Return a message on a tool's turn that the chat format leaves out; else None."""
        for place, turn in enumerate(prompt):
            if not turn.of_tools:
                continue
            kind = "is a tool's" if turn.role == "tool" else "calls a tool"
            if self.format == "plain":
                return (
                    f"turn {place + 1} {kind}, which the plain chat format cannot express; use a "
                    "base whose chat template can"
                )
            shown = self._templated(prompt, completing=True)
            for other in turn.altered():
                changed = (*prompt[:place], other, *prompt[place + 1 :])
                if self._templated(changed, completing=True) == shown:
                    return (
                        f"turn {place + 1} {kind}, and the base's chat template leaves that out; "
                        "use a base whose template supports tools"
                    )
        return None

    def _encode(self, example: Example) -> Encoded:
        prompt = self.prompt_ids(example.prompt)
        if self.format == "template" and example.prompt:
            completion = self._templated_completion(example)
        else:
            text = (" " if example.prompt else "") + example.completion
            completion = self._ids(self._shield.marked(text))
        eos_id = self.tokenizer.eos_token_id
        assert isinstance(eos_id, int)
        if not completion or completion[-1] != eos_id:
            completion.append(eos_id)
        return Encoded((*prompt, *completion), len(prompt))

    def _encode_pair(self, example: Example) -> PreferencePair:
        assert example.rejected is not None
        other = replace(example, completion=example.rejected)
        return PreferencePair(self._encode(example), self._encode(other))

    def _templated(self, messages: Sequence[Message], *, completing: bool = False) -> str:
        """Return turns as the template writes them, special tokens of data marked.

        Raises:
            DataError: If it refuses them, or does more with a text than to copy it, so that the
                marks in it are lost.
        """
        turns = [turn.to_dict() for turn in messages]
        marked = self._shield.marked(turns)
        text = self._rendered(marked, completing=completing)
        if marked != turns and (
            self._shield.unmarked(text) != self._rendered(turns, completing=completing)
        ):
            raise DataError(
                f"the row holds the string of a special token ({self._shield.first(turns)}), and "
                f"{self._template} rewrites texts, so the string cannot be kept as text; "
                "remove it, or use --chat-format plain"
            )
        return text

    def _rendered(self, turns: Sequence[dict[str, Any]], *, completing: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=completing
            )
        except OF_TEMPLATES as error:
            reason = self._shield.unmarked(str(error)) or type(error).__name__
            raise DataError(f"{self._template} refuses the turns: {reason}") from None
        assert isinstance(text, str)
        return text

    @property
    def _template(self) -> str:
        return f"the chat template of {self.tokenizer.name_or_path or 'the base'}"

    def _templated_completion(self, example: Example) -> list[int]:
        ids = self._ids(self._answered(example))
        eos_id = self.tokenizer.eos_token_id
        # Templates end a turn with EOS and often a newline, which is never generated.
        return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids

    def _answered(self, example: Example) -> str:
        """Return an answer, with its end, as the template writes it behind the prompt.

        Raises:
            DataError: If it leaves a part of the answer out.
            SettingsError: If the answer cannot be separated from the prompt.
        """
        prompt = self._templated(example.prompt, completing=True)
        whole = self._templated((*example.prompt, Message("assistant", example.completion)))
        answer = whole.removeprefix(prompt)
        if _unspaced(example.completion) not in _unspaced(self._shield.unmarked(answer)):
            raise DataError(
                f"the answer is left out, or not shown as it is, by {self._template}, as some do "
                "with thoughts; take that part out of it, or use --chat-format plain"
            )
        if not whole.startswith(prompt):
            where = f"{example.place}: " if example.place else ""
            raise SettingsError(
                f"{where}the chat template renders a prompt differently once it is answered, so "
                "the completion cannot be separated; use --chat-format plain"
            )
        return answer

    def _ids(self, text: str, *, whole: bool = False) -> list[int]:
        ids = self._shield.ids(text, whole=whole)
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
    def _shown(self) -> set[tuple[str, ...]]:
        """Orders of roles of which the template shows every turn."""
        return set()

    @cached_property
    def _shield(self) -> Shield:
        return Shield(self.tokenizer, markers_of(self.tokenizer))


def _unspaced(text: str) -> str:
    """Return a text without the white space that a template may strip."""
    return "".join(text.split())


@contextmanager
def _placed(example: Example) -> Generator[None]:
    """Name the row in what goes wrong."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{example.place}: {error}" if example.place else str(error)) from None
