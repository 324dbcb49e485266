"""Rows that say which of two completions is better.

The formats of TRL: `prompt`, `chosen` and `rejected` as text; the same as lists of turns; or whole
conversations in `chosen` and `rejected` that differ in the last answer, as turns or as texts in the
form of hh-rlhf (`Human: ... Assistant: ...`). A text prompt in that form is read as turns.
`system`, `history` and `context` are read as beside any question.
"""

import re
from collections.abc import Mapping
from typing import Any

from d2lora.data.formats import BESIDE, Format, beside
from d2lora.data.rows import BadRowError, Example, Message, Role, fields_of, text_field, user
from d2lora.data.turns import turns_of

PREFERENCES = Format("preferences", ("chosen", "rejected"), ("prompt", *BESIDE))
_SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def read_preference(row: Mapping[str, Any]) -> Example:
    """Read `chosen`, `rejected` and their prompt; `completion` is the chosen one.

    Raises:
        BadRowError: If a field is missing or empty, the two are the same, or their prompts differ.
    """
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise BadRowError(
                f"a preference row has `prompt`, `chosen` and `rejected`; `{name}` is missing; "
                f"found {fields_of(row)}"
            )
    row = _as_turns(row)
    prompt = _prompt(row)
    chosen, rejected = (_answer(row, name, prompt) for name in ("chosen", "rejected"))
    if prompt is None:
        prompt, other = _common_prompt(row)
        if prompt != other:
            raise BadRowError("`chosen` and `rejected` answer different prompts")
    if chosen.strip() == rejected.strip():
        raise BadRowError("`chosen` and `rejected` are the same, so nothing can be learnt")
    return Example(beside(row, prompt), chosen, rejected=rejected)


def _as_turns(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row whose two texts are whole dialogues with these as turns."""
    names = ("chosen", "rejected")
    if "prompt" in row or not all(isinstance(row[name], str) for name in names):
        return row
    turns = {name: _dialogue_turns(row[name]) for name in names}
    if not all(own and own[-1].role == "assistant" for own in turns.values()):
        return row
    return {**row, **{name: [turn.to_dict() for turn in own] for name, own in turns.items()}}


def _prompt(row: Mapping[str, Any]) -> tuple[Message, ...] | None:
    """Return the prompt; None where the conversations in `chosen` and `rejected` hold it."""
    if row.get("prompt") is None:
        if isinstance(row["chosen"], str):
            raise BadRowError(
                "field `prompt` is missing; only lists of turns, or dialogues "
                "`Human: ... Assistant: ...`, hold their own prompt; "
                f"found {fields_of(row)}"
            )
        return None
    if not isinstance(row["prompt"], str):
        turns = turns_of(row, "prompt")
        if turns[-1].role == "assistant":
            raise BadRowError("the last turn of `prompt` must be the user's")
        return tuple(turns)
    return dialogue(text_field(row, "prompt"))


def _answer(row: Mapping[str, Any], name: str, prompt: tuple[Message, ...] | None) -> str:
    if isinstance(row[name], str):
        if prompt is None:
            raise BadRowError(f"`chosen` is a list of turns, so `{name}` must be one too")
        return text_field(row, name).strip()
    turns = turns_of(row, name)
    if turns[-1].role != "assistant":
        raise BadRowError(f"the last turn of `{name}` must be the assistant's")
    if prompt is not None and len(turns) > 1 and tuple(turns[:-1]) != prompt:
        raise BadRowError(f"`{name}` repeats a prompt, but not the one in `prompt`")
    if turns[-1].of_tools:
        raise BadRowError(f"the last turn of `{name}` calls a tool; preferences are between texts")
    return turns[-1].content


def _common_prompt(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    prompts = [tuple(turns_of(row, name)[:-1]) for name in ("chosen", "rejected")]
    if not all(prompts):
        raise BadRowError(
            "without `prompt`, `chosen` and `rejected` must hold the turns that come before"
        )
    return prompts[0], prompts[1]


def dialogue(text: str) -> tuple[Message, ...]:
    """Return a text prompt as turns: those of hh-rlhf's dialogues, else one user's turn."""
    turns = _dialogue_turns(text)
    is_prompt = len(turns) > 1 and turns[-1].role == "assistant" and not turns[-1].content
    return tuple(turns[:-1]) if is_prompt else user(text)


def _dialogue_turns(text: str) -> list[Message]:
    """Return the turns of a dialogue of hh-rlhf; none where it is not one."""
    pieces = _TURN.split(text.strip())
    names, contents = pieces[1::2], [piece.strip() for piece in pieces[2::2]]
    if pieces[0] != "" or not names or names[0] != "Human" or not all(contents[:-1]):
        return []
    turns = zip(names, contents, strict=True)
    return [Message(_SPEAKERS[name], content) for name, content in turns]
