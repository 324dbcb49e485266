"""The chat template of a base's tokenizer: its own, or one that the settings give."""

import copy
import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from d2lora.errors import SettingsError, did_you_mean
from d2lora.settings import BaseSettings
from d2lora.settings.yaml_text import parse_yaml

_GIVEN = {"messages", "add_generation_prompt"}
"""What a template gets with every row."""


def chosen_template(settings: BaseSettings, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that the settings give, in a file or by arguments; None for the base's.

    Raises:
        SettingsError: If the file cannot be read, an argument is not `name=value`, or there is no
            template for it.
    """
    if settings.chat_template is None and not settings.template_args:
        return None
    template = own_template(tokenizer)
    if settings.chat_template is not None:
        template = _read(settings.chat_template)
    if template is None:
        raise SettingsError(
            f"--template-args: {settings.base} has no chat template; give one as --chat-template"
        )
    return _assigned(settings.template_args, template) + template


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that a tokenizer brings; of several the one named `default`."""
    template: Any = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return template


def with_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None
) -> PreTrainedTokenizerBase:
    """Return a tokenizer that uses another template; the same one for None."""
    if template is None:
        return tokenizer
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SettingsError(f"--chat-template {path}: not UTF-8 text") from None
    except OSError as error:
        raise SettingsError(
            f"--chat-template {path}: cannot be read: {error.strerror or error}"
        ) from None


def _assigned(arguments: tuple[str, ...], template: str) -> str:
    """Return Jinja that gives names their values: what templates see as arguments.

    Raises:
        SettingsError: If one is not `name=value`, is given twice, or the template does not use it.
    """
    assigned: dict[str, str] = {}
    used = set(re.findall(r"\w+", template)) - _GIVEN
    for argument in arguments:
        name, equals, text = argument.partition("=")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            value = text
        value = text if isinstance(value, date) else value
        if not equals or not name.isidentifier() or not isinstance(value, str | int | float | bool):
            raise SettingsError(
                "--template-args: expected name=value, a text, a number, true or false, as in "
                f"enable_thinking=false, found {argument!r:.60}"
            )
        if name not in used:
            why = "is not to be set" if name in _GIVEN else "is no name in the chat template"
            raise SettingsError(f"--template-args: `{name}` {why}.{did_you_mean(name, used)}")
        if name in assigned:
            raise SettingsError(f"--template-args: `{name}` is given twice")
        assigned[name] = f"{{% set {name} = {json.dumps(value)} %}}"
    return "".join(assigned.values())
