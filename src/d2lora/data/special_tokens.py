"""Special tokens whose strings stand in data are encoded as the text that they are.

A tokenizer finds `<|im_end|>` wherever it stands, so data could end a turn or an answer. Here data
is marked before a chat template sees it; what the template then adds is special, what data holds
is not. The ids of all other texts are the tokenizer's own.
"""

import copy
import re
from functools import cached_property
from typing import Any
from uuid import uuid4

from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from d2lora.errors import DataError


class Shield:
    """A tokenizer that separates special tokens from the same strings in data."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Learn the special tokens of a tokenizer."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._ids = {token.content: index for index, token in added.items() if token.special}
        self._ids |= zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        self._strings = {index: token for token, index in self._ids.items()}
        longest_first = sorted(filter(None, self._ids), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._mark = str(uuid4().int)  # no data holds it, and no template changes its case
        self._marked = re.compile(rf"{self._mark}-0-(\d+);")

    def holds_special(self, text: str) -> bool:
        """Say whether a text holds the string of a special token."""
        return self._special.search(text) is not None

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
        twin = copy.deepcopy(self._tokenizer.backend_tokenizer)
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
        known = {index: self._twin.token_to_id(self._sign(1, index)) for index in self._strings}
        return {own: index for index, own in known.items() if own is not None}
