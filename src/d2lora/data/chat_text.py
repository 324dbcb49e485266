"""From turns to text: what a chat format writes, and what it leaves out.

Texts hold marks where data hold the string of a special token, so that it stays text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from d2lora.data.rows import Example, Message
from d2lora.data.special_tokens import OF_TEMPLATES, Shield, markers_of, rendered
from d2lora.errors import DataError, ModelError, SettingsError

Format = Literal["template", "plain"]
Tools = Sequence[Mapping[str, Any]]
_OTHER_BASE = "use a base whose chat template supports tools, or give one as --chat-template"
_SPEAKER = {"system": "System", "user": "User", "assistant": "Assistant"}


def plain_prompt(messages: Sequence[Message]) -> str:
    r"""Return the plain chat format of the given turns: `User: ...\nAssistant:`.

    The completion follows after a space and ends in EOS. No turns give an empty prompt.
    """
    turns = [f"{_SPEAKER[turn.role]}: {turn.content}\n" for turn in messages]
    return "".join(turns) + "Assistant:" if turns else ""


@dataclass(frozen=True)
class ChatText:
    """Writes prompts and answers in one chat format."""

    tokenizer: PreTrainedTokenizerBase
    format: Format

    def prompt(self, asked: Example) -> str:
        """Return a prompt as the chat format writes it, special tokens of data marked.

        Raises:
            DataError: If the chat template refuses the turns, or does not show one.
        """
        if fault := self._unshown_tool(asked) or self._unshown(asked):
            raise DataError(fault)
        if self.format == "template" and asked.prompt:
            return self._asked(asked)
        return self.shield.marked(plain_prompt(asked.prompt))

    def _asked(self, example: Example, prompt: Sequence[Message] | None = None) -> str:
        """Return an example's prompt, or another with its tools, as the template writes it."""
        turns = example.prompt if prompt is None else prompt
        return self._templated(turns, example.tools, completing=True)

    def _unshown(self, asked: Example) -> str | None:
        """Return a message on a turn that the template leaves out; else None.

        That depends on the roles, so it is looked at once for each order of them.
        """
        prompt = asked.prompt
        roles = tuple(turn.role for turn in prompt)
        if self.format == "plain" or not prompt or roles in self._shown:
            return None
        shown = self._asked(asked)
        for place, turn in enumerate(prompt):
            other = replace(turn, content=f"{turn.content} and more")
            changed = (*prompt[:place], other, *prompt[place + 1 :])
            if not turn.of_tools and self._asked(asked, changed) == shown:
                return (
                    f"turn {place + 1}, the {turn.role}'s, is left out by {self._template}; put "
                    "its text into a turn that the template shows, or use --chat-format plain"
                )
        self._shown.add(roles)
        return None

    def _unshown_tool(self, asked: Example) -> str | None:
        """Return a message on tools, or a tool's turn, that the chat format leaves out."""
        prompt = asked.prompt
        if asked.tools and self.format == "plain":
            return f"`tools` cannot be expressed in the plain chat format; {_OTHER_BASE}"
        if asked.tools and self._asked(asked) == self._asked(replace(asked, tools=())):
            return f"`tools` are left out by {self._template}; {_OTHER_BASE}, or drop them"
        for place, turn in enumerate(prompt):
            if not turn.of_tools:
                continue
            kind = "is a tool's" if turn.role == "tool" else "calls a tool"
            if self.format == "plain":
                return (
                    f"turn {place + 1} {kind}, which the plain chat format cannot express; "
                    f"{_OTHER_BASE}"
                )
            shown = self._asked(asked)
            for other in turn.altered():
                changed = (*prompt[:place], other, *prompt[place + 1 :])
                if self._asked(asked, changed) == shown:
                    return (
                        f"turn {place + 1} {kind}, and the base's chat template leaves that out; "
                        f"{_OTHER_BASE}"
                    )
        return None

    def _templated(
        self, messages: Sequence[Message], tools: Tools = (), *, completing: bool = False
    ) -> str:
        """Return turns as the template writes them, special tokens of data marked.

        Raises:
            DataError: If it refuses them, or does more with a text than to copy it, so that the
                marks in it are lost.
        """
        shown = [turn.to_dict() for turn in messages], [dict(tool) for tool in tools]
        marked = self.shield.marked(shown[0]), self.shield.marked(shown[1])
        text = self._rendered(*marked, completing=completing)
        if marked != shown and (
            self.shield.unmarked(text) != self._rendered(*shown, completing=completing)
        ):
            held = self.shield.first(list(shown))
            raise DataError(
                f"the row holds the string of a special token ({held}), and "
                f"{self._template} rewrites texts, so the string cannot be kept as text; "
                "remove it, or use --chat-format plain"
            )
        return text

    def _rendered(
        self, turns: list[dict[str, Any]], tools: list[dict[str, Any]], *, completing: bool
    ) -> str:
        try:
            return rendered(self.tokenizer, turns, tools=tools, completing=completing)
        except ModelError:  # it is a ValueError, too
            raise
        except OF_TEMPLATES as error:
            reason = self.shield.unmarked(str(error)) or type(error).__name__
            raise DataError(f"{self._template} refuses the turns: {reason}") from None

    @property
    def _template(self) -> str:
        return f"the chat template of {self.tokenizer.name_or_path or 'the base'}"

    def answer(self, example: Example) -> str:
        """Return an answer as the chat format writes it behind the prompt; a template with its end.

        Raises:
            DataError: If it leaves a part of the answer out.
            SettingsError: If the answer cannot be separated from the prompt.
        """
        if self.format == "plain" or not example.prompt:
            if example.more:
                raise DataError(
                    "the answer calls a tool, which the plain chat format cannot express; "
                    f"{_OTHER_BASE}"
                )
            return self.shield.marked((" " if example.prompt else "") + example.completion)
        prompt, turn = self._asked(example), example.answer
        whole = self._templated((*example.prompt, turn), example.tools)
        answer = whole.removeprefix(prompt)
        if any(
            self._templated((*example.prompt, other), example.tools) == whole
            for other in turn.altered()
            if turn.of_tools
        ):
            raise DataError(
                f"the answer calls a tool, and {self._template} leaves that out; {_OTHER_BASE}"
            )
        if _unspaced(turn.content) not in _unspaced(self.shield.unmarked(answer)):
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

    @cached_property
    def _shown(self) -> set[tuple[str, ...]]:
        """Orders of roles of which the template shows every turn."""
        return set()

    @cached_property
    def shield(self) -> Shield:
        """What keeps strings of special tokens in data apart from the format's own."""
        return Shield(self.tokenizer, markers_of(self.tokenizer))


def _unspaced(text: str) -> str:
    """Return a text without the white space that a template may strip."""
    return "".join(text.split())
