"""A tokenizer written as llama.cpp reads it: from a GGUF file that has it, or from its own parts.

llama.cpp knows ways of splitting text by name; what it has no name for cannot be written.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGUFReader, GGUFValueType, GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from d2lora.errors import ModelError, counted

_TEMPLATE = "tokenizer.chat_template"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER, _UPPER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[tuple[str, ...], str] = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (rf"{_WORDS}\p{{N}}{{1,3}}{_REST}", "bytes"): "llama-bpe",
    (rf"{_WORDS}\p{{N}}{_REST}", "bytes"): "qwen2",
    (_TEKKEN, "bytes"): "tekken",
}
"""Steps of a splitter of text -> llama.cpp's name of it."""
_WHOLE_FIRST = {"llama-bpe", "tekken"}
"""Those with which llama.cpp takes a piece that is a token as it is, before any merge."""
_BOUNDARY = "\u2581"
"""Stands for a space in SentencePiece's tokens."""


class Vocabulary(NamedTuple):
    """A tokenizer's parts under GGUF's names."""

    model: str
    """`gpt2`: bytes and merges; `llama`: SentencePiece's, with scores instead of merges."""
    splits: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    space_first: bool
    """Whether a text is read as if a space stood before it."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, n_rows: int) -> "Vocabulary":
        """Return a tokenizer's parts.

        Args:
            tokenizer: The tokenizer.
            n_rows: Rows of the model's embedding; unused ones get names.

        Raises:
            ModelError: If llama.cpp could not split text as it does.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
        model = parts.get("model") or {}
        if model.get("type") != "BPE":
            kind = model.get("type", "of code of its own")
            raise ModelError(f"llama.cpp reads tokenizers of merges (BPE); this one is {kind}")
        if len(tokenizer) > n_rows:
            raise ModelError(
                f"the tokenizer has {counted(len(tokenizer), 'token')}, the embedding {n_rows:,} "
                "rows; resize it (resize_token_embeddings of transformers)"
            )
        tokens, types = _tokens(parts, n_rows)
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        if model["byte_fallback"]:
            space_first = _space_first(parts)
            return cls("llama", "default", tokens, types, [], _scores(tokens, pairs), space_first)
        splits = _splits_of(parts, ignores_merges=bool(model.get("ignore_merges")))
        return cls("gpt2", splits, tokens, types, [" ".join(p) for p in pairs], [], False)

    def write(self, writer: GGUFWriter) -> None:
        """Write it."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.splits)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_add_space_prefix(self.space_first)


def write_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, n_rows: int, origin: Path | None
) -> None:
    """Write a tokenizer.

    Args:
        writer: What it is written to.
        tokenizer: The tokenizer, whose chat template is written in any case.
        n_rows: Rows of the model's embedding.
        origin: The GGUF file that the base was read from, whose tokenizer is taken as it is.

    Raises:
        ModelError: If llama.cpp could not read it.
    """
    if origin is None:
        Vocabulary.of(tokenizer, n_rows).write(writer)
        _write_special(writer, tokenizer)
    else:
        _copy(origin, writer)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _copy(origin: Path, writer: GGUFWriter) -> None:
    for name, field in GGUFReader(origin).fields.items():
        if name.startswith("tokenizer.") and name != _TEMPLATE:
            kind = field.types[0]
            inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inner)


def _write_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write which tokens are special, and which are put around a text."""
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    for value, add in (
        (first, writer.add_bos_token_id),
        (last, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if isinstance(value, int):
            add(value)
    ids = list(tokenizer("a")["input_ids"])
    writer.add_add_bos_token(first is not None and ids[:1] == [first])
    writer.add_add_eos_token(last is not None and ids[-1:] == [last])


def _tokens(parts: dict[str, Any], n_rows: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of each token."""
    model, kinds = parts["model"], TokenType
    tokens, types = [f"[PAD{i}]" for i in range(n_rows)], [int(kinds.UNUSED)] * n_rows
    for token, i in model["vocab"].items():
        byte = model["byte_fallback"] and len(token) == 6 and token.startswith("<0x")
        tokens[i], types[i] = token, int(kinds.BYTE if byte else kinds.NORMAL)
    for added in parts["added_tokens"]:
        kind = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    if (unknown := model.get("unk_token")) in model["vocab"]:
        types[model["vocab"][unknown]] = int(kinds.UNKNOWN)
    return tokens, types


def _scores(tokens: Sequence[str], pairs: Sequence[Sequence[str]]) -> list[float]:
    """Return scores by which SentencePiece joins what the merges join, in their order."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    return [float(-ranks.get(token, 0)) for token in tokens]


def _space_first(parts: dict[str, Any]) -> bool:
    """Say whether a SentencePiece tokenizer reads a space before a text.

    Raises:
        ModelError: If it does something else to spaces than SentencePiece.
    """
    steps = [*_steps(parts["normalizer"]), *_steps(parts["pre_tokenizer"])]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _BOUNDARY}
    kinds = [step["type"] for step in steps]
    metaspace = [step for step in steps if step["type"] == "Metaspace"]
    known = all(
        step == replaces or step["type"] in {"Prepend", "Metaspace"} or _splits_nothing(step)
        for step in steps
    )
    if not known or not (metaspace or replaces in steps):
        raise ModelError(f"llama.cpp does not know how this tokenizer splits text ({kinds})")
    return "Prepend" in kinds or any(s.get("prepend_scheme") != "never" for s in metaspace)


def _splits_nothing(step: dict[str, Any]) -> bool:
    """Say whether a step looks for spaces, of which the step before has left none."""
    return step["type"] == "Split" and step["pattern"] == {"String": " "}


def _splits_of(parts: dict[str, Any], *, ignores_merges: bool) -> str:
    """Return llama.cpp's name of how a tokenizer of bytes splits text.

    Raises:
        ModelError: If it has none.
    """
    steps = tuple(_step(step) for step in _steps(parts["pre_tokenizer"]))
    normalizers = {step["type"] for step in _steps(parts["normalizer"])}
    name = _SPLITS.get(steps)
    if name is None or normalizers - {"NFC"} or ignores_merges != (name in _WHOLE_FIRST):
        known = ", ".join(_SPLITS.values())
        shown = [*sorted(normalizers), *steps, *(["whole first"] if ignores_merges else [])]
        raise ModelError(
            f"llama.cpp has no name for how this tokenizer splits text ({' '.join(shown)}); known "
            f"here: {known}"
        )
    return name


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part of a tokenizer, sequences taken apart."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for inner in part.get("pretokenizers") or part.get("normalizers") or []:
        yield from _steps(inner)


def _step(step: dict[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return "words" if regex else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "invert": False}:
            return str(pattern)
        case _:
            return str(step["type"])
