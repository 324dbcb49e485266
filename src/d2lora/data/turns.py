"""Lists of turns, as OpenAI's API, ShareGPT and what came of them write them down.

A turn has `role` and `content`, or ShareGPT's `from` and `value`. Content is text, or a list of
parts that are text. An assistant's turn may call tools, and turns of a tool answer.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from d2lora.data.rows import BadRowError, Message, Role, from_json

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
    "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
"""The names that roles go by."""
_CALLING = ("function_call", "tool_call")
"""Roles whose content is a call, written as JSON."""
_READ = {"role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id"}
WEIGHT = "weight"
"""Of an assistant's turn of a conversation: 0 where it is not learnt, else 1 (OpenAI, fine-tuning:
https://platform.openai.com/docs/api-reference/fine-tuning/chat-input)."""
_TEXT_PARTS = ("text", "input_text", "output_text")


def turns_of(row: Mapping[str, Any], field: str) -> list[Message]:
    """Return a field that must be a list of turns.

    Raises:
        BadRowError: If it is not, naming the turn.
    """
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else type(turns).__name__
        raise BadRowError(f"field `{field}` must be a list of turns, found {found}")
    return [_turn(turn, f"turn {number} of `{field}`") for number, turn in enumerate(turns, 1)]


def conversation_of(row: Mapping[str, Any], field: str) -> list[Message]:
    """Return a field of turns up to the last answer that is learnt; each knows whether it is.

    Raises:
        BadRowError: If it is none, or nothing of it is learnt.
    """
    turns = turns_of(row, field)
    weights = [turn.get(WEIGHT) for turn in row[field]]
    if all(weight is None for weight in weights):
        return turns
    for number, (turn, weight) in enumerate(zip(turns, weights, strict=True), 1):
        if turn.role == "assistant" and (isinstance(weight, bool) or weight not in (None, 0, 1)):
            raise BadRowError(
                f"turn {number} of `{field}`: `weight` must be 0, for an answer that is not "
                f"learnt, or 1, found {weight!r:.60}"
            )
    known = [
        replace(turn, learnt=turn.role != "assistant" or weight != 0)
        for turn, weight in zip(turns, weights, strict=True)
    ]
    if known[-1].role != "assistant":  # a prompt, or the row is at fault for that
        return known
    ends = [n for n, turn in enumerate(known, 1) if turn.role == "assistant" and turn.learnt]
    if not ends:
        raise BadRowError(f"every answer of `{field}` has `weight` 0: there is nothing to learn")
    return known[: ends[-1]]


def unread_of(turns: Any, read: Collection[str] = ()) -> set[str]:
    """Return the names that turns hold and that are not read; an assistant's own may be `read`."""
    if not isinstance(turns, list):
        return set()
    names: set[str] = set()
    for turn in turns:
        if isinstance(turn, dict):
            own = {name for name, value in turn.items() if value is not None}
            role = ROLES.get(str(turn.get("role", turn.get("from"))))
            named = {"tool": {"name"}, "assistant": set(read)}.get(role or "", set[str]())
            names |= own - _READ - named
    return names


def _turn(turn: Any, place: str) -> Message:
    held: dict[str, Any] = {}
    if isinstance(turn, dict):
        held = {name: value for name, value in turn.items() if value is not None}
    who, what = ("from", "value") if "from" in held else ("role", "content")
    calls = held.get("tool_calls") or [held["function_call"]] if _calls_tools(held) else []
    if who not in held or (what not in held and not calls):
        raise BadRowError(f"{place} must have `role` and `content` (or `from` and `value`)")
    name = held[who]
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRowError(
            f"{place}: role must be system, user, assistant or tool, or a name that these go by "
            f"(human, gpt, observation, ...), found {name!r:.60}"
        )
    content = _text(held.get(what, ""), place)
    if name.lower() in _CALLING:
        calls, content = [content], ""
    if not content.strip() and not calls and role != "tool":
        raise BadRowError(f"{place}: `{what}` must be text that is not empty")
    if role == "tool":
        return Message(role, content, {k: held[k] for k in ("name", "tool_call_id") if k in held})
    if not calls:
        return Message(role, content)
    if role != "assistant" or not isinstance(calls, list):
        raise BadRowError(f"{place}: `tool_calls` must be a list, of an assistant's turn")
    return Message(role, content, {"tool_calls": [_call(call, place) for call in calls]})


def _calls_tools(turn: Mapping[str, Any]) -> bool:
    return bool(turn.get("tool_calls") or turn.get("function_call"))


def _text(content: Any, place: str) -> str:
    """Return the text of a content, which may come in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        kind = type(content).__name__
        raise BadRowError(f"{place}: content must be text or a list of parts, found {kind}")
    texts: list[str] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise BadRowError(f"{place}: only text parts are supported, found one of {kind!r:.60}")
        texts.append(text)
    return "".join(texts)


def _call(call: Any, place: str) -> dict[str, Any]:
    """Return a call as chat templates expect it, its arguments as an object."""
    call = _parsed(call)
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise BadRowError(f"{place}: a tool call must have a `name` and `arguments`")
    assert isinstance(function, dict)
    arguments = _parsed(function.get("arguments", {}))
    id_ = {"id": call["id"]} if call.get("id") is not None else {}
    return {"type": "function", **id_, "function": {"name": name, "arguments": arguments}}


def _parsed(value: Any) -> Any:
    """Return what a text says where it is JSON, else the value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return from_json(value)
    except ValueError:
        return value
