"""Special tokens whose strings stand in data are encoded as the text that they are.

A tokenizer finds `<|im_end|>` wherever it stands, so data could end a turn or an answer. Here data
is marked before a chat template sees it; what the template then adds is special, what data holds
is not. The ids of all other texts are the tokenizer's own.
"""

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any
from uuid import uuid4

from jinja2 import Environment, TemplateError
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from d2lora.errors import DataError, ModelError, SettingsError
from d2lora.runtime.limits import OverTimeError, within

OF_TEMPLATES = (
    TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip
"""What a template that does not take its turns may raise: Jinja's errors, and Python's within."""
_MOST_SECONDS = 3
_MOST_CHARACTERS, _MOST_GROWTH = 1_000_000, 100
"""Characters that a template may write, and for each character of a row."""
_TURNS = [{"role": role, "content": "."} for role in ("user", "assistant", "user")]


class Shield:
    """A tokenizer that separates special tokens from the same strings in data."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markers: str = "") -> None:
        """Learn the special tokens of a tokenizer.

        Args:
            tokenizer: The tokenizer.
            markers: A text of a chat template's own. Tokens that were added to the vocabulary and
                stand in it mark turns, whether the tokenizer calls them special or not.
        """
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._ids = {token.content: index for index, token in added.items() if token.special}
        self._ids |= zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        self._markers = {
            index
            for index, token in added.items()
            if token.content not in self._ids and token.content.strip() and token.content in markers
        }
        self._ids |= {added[index].content: index for index in self._markers}
        self._strings = {index: token for token, index in self._ids.items()}
        longest_first = sorted(filter(None, self._ids), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._mark = str(uuid4().int)  # no data holds it, and no template changes its case
        self._marked = re.compile(rf"{self._mark}-0-(\d+);")

    def first(self, value: Any) -> str:
        """Return the first string of a special token in data."""
        found = self._special.search(json.dumps(value, ensure_ascii=False))
        return found[0] if found else ""

    def marked(self, value: Any) -> Any:
        """Return data, a text or lists and dictionaries of them, with a mark for each string."""
        if isinstance(value, str):
            return self._special.sub(lambda m: self._sign(0, self._ids[m[0]]), value)
        if isinstance(value, dict):
            return {name: self.marked(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self.marked(inner) for inner in value]
        return value

    def ids(self, text: str, *, whole: bool = False) -> list[int]:
        """Return the ids of a text with marks.

        Args:
            text: What a template made of marked data, or marked data itself.
            whole: Add what the tokenizer puts around a whole text, such as BOS.

        Raises:
            DataError: If there are marks, and the tokenizer is one without a Rust core.
        """
        if self._mark not in text:
            ids = self._tokenizer(text, add_special_tokens=whole)["input_ids"]
            assert isinstance(ids, list)
            return ids
        shown = self._special.sub(lambda m: self._sign(1, self._ids[m[0]]), text)
        encoding = self._twin.encode(self.unmarked(shown), add_special_tokens=whole)
        ids = []
        for index, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if index in self._stands_for:
                ids.append(self._stands_for[index])
            elif index in self._strings and not added and index != self._tokenizer.unk_token_id:
                ids += self._spelled(self._strings[index])
            else:
                ids.append(index)
        return ids

    def unmarked(self, text: str) -> str:
        """Return a text with the strings in place of their marks."""
        return self._marked.sub(lambda m: self._strings[int(m[1])], text)

    def _sign(self, of_template: int, index: int) -> str:
        return f"{self._mark}-{of_template}-{index};"

    def _spelled(self, token: str) -> list[int]:
        """Return the pieces of a string that a vocabulary holds as a whole, as Unigram's may."""
        halves = (token[0], token[1:])
        return [piece.id for half in halves for piece in self._twin.model.tokenize(half)]

    @cached_property
    def _twin(self) -> Any:
        """The Rust core, blind to special tokens, with a stand-in for each."""
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            raise DataError(
                "the row holds the string of a special token, which a tokenizer without a Rust "
                "core would read as that token; remove such rows"
            )
        backend = self._tokenizer.backend_tokenizer
        core = json.loads(backend.to_str())
        for token in core["added_tokens"]:
            if token["id"] in self._markers:
                token["content"] = self._sign(2, token["id"])
        twin = type(backend).from_str(json.dumps(core))
        twin.no_padding()
        twin.no_truncation()
        twin.encode_special_tokens = True
        added = self._tokenizer.added_tokens_decoder
        twin.add_tokens(
            [
                AddedToken(
                    self._sign(1, index), lstrip=added[index].lstrip,
                    rstrip=added[index].rstrip, normalized=False, special=False,
                )
                for index in added.keys() & self._strings.keys()
            ]
        )  # fmt: skip
        return twin

    @cached_property
    def _stands_for(self) -> dict[int, int]:
        """Ids of the twin, and the tokenizer's own for them."""
        names = {index: self._sign(1, index) for index in self._strings}
        # A marker's new name may move the ids of the tokens added after it.
        added = self._tokenizer.added_tokens_decoder.items()
        names |= {index: token.content for index, token in added if index not in self._strings}
        known = {index: self._twin.token_to_id(name) for index, name in names.items()}
        return {own: index for index, own in known.items() if own is not None}


def markers_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what a chat template writes around turns; nothing where it takes no such turns.

    Raises:
        ModelError: As `rendered`.
    """
    if tokenizer.chat_template is None:
        return ""
    try:
        return rendered(tokenizer, _TURNS)
    except ModelError:  # it is a ValueError, too
        raise
    except OF_TEMPLATES:
        return ""


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a chat template has no powers, such as 9**9**9, which nothing can interrupt.

    Raises:
        SettingsError: If it has.
    """
    known: Any = tokenizer.chat_template
    for template in known.values() if isinstance(known, Mapping) else (known,):
        try:
            parts = list(Environment(autoescape=True).lex(template))
        except TemplateError:
            continue  # it says so itself, once it is used
        if powers := [line for line, kind, text in parts if (kind, text) == ("operator", "**")]:
            raise SettingsError(
                f"the chat template of {tokenizer.name_or_path or 'the base'} computes a power in "
                f"line {powers[0]}, which may take forever; use --chat-format plain, or another "
                "--chat-template"
            )


def rendered(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], *,
    tools: list[dict[str, Any]] | None = None, completing: bool = False,
) -> str:  # fmt: skip
    """Return turns as a tokenizer's chat template writes them, within limits.

    transformers runs it in Jinja's sandbox, which lets it read and write nothing.

    Args:
        tokenizer: The tokenizer.
        turns: As a chat template gets them.
        tools: That are offered.
        completing: Whether an answer is to follow.

    Raises:
        ModelError: If it takes too long for one row, or writes too much.
        Exception: One of `OF_TEMPLATES`, if it does not take the turns.
    """
    name = f"the chat template of {tokenizer.name_or_path or 'the base'}"
    try:
        with within(_MOST_SECONDS):
            text = tokenizer.apply_chat_template(
                turns, tools=[*tools] if tools else None, tokenize=False,
                add_generation_prompt=completing,
            )  # fmt: skip
    except OverTimeError:
        raise ModelError(f"{name} takes more than {_MOST_SECONDS} s for one row") from None
    except MemoryError:
        raise ModelError(f"{name} takes more memory for one row than there is") from None
    assert isinstance(text, str)
    if len(text) > _MOST_CHARACTERS:
        given = sum(len(json.dumps(part)) for part in (*turns, *(tools or ())))
        if len(text) > _MOST_CHARACTERS + _MOST_GROWTH * given:
            raise ModelError(f"{name} writes {len(text):,} characters for a row of {given:,}")
    return text
