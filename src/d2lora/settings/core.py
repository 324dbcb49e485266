"""What all settings share: frozen, validated, with readable errors."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from d2lora.errors import SettingsError, did_you_mean, listed

_MOST_SHOWN = 200
"""Characters of a value in a message."""


class Settings(BaseModel):
    """A frozen set of settings; an unknown name is an error with the nearest known one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
    aliases: ClassVar[dict[str, str]] = {}
    """Short forms of options on the command line."""
    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that words before the options belong to, where they are not a settings file: one field
    takes them all, several take a word each."""
    settings_file: ClassVar[bool] = True
    """Whether the first word may be a settings file."""

    def __init__(self, /, **values: Any) -> None:
        """Validate `values`.

        Raises:
            SettingsError: With every fault at once.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            faults = listed(_explained(type(self), error.errors()))
            raise SettingsError(f"wrong settings:\n{faults}") from None

    @classmethod
    def faults_of(cls, values: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with single settings, all of it.

        What is missing and what contradicts another setting is left out: more may be given.
        """
        try:
            cls.__pydantic_validator__.validate_python(values, self_instance=cls.__new__(cls))
        except ValidationError as error:
            errors = error.errors()
            whole = [e for e in errors if e["loc"] and (e["type"], len(e["loc"])) != ("missing", 1)]
            return _explained(cls, whole)
        return []

    def changed(self, /, **values: Any) -> Self:
        """Return a validated copy in which `values` replace the present ones."""
        return type(self)(**{**dict(self), **values})

    def to_yaml(self) -> str:
        """Return the resolved settings as YAML, in the order of their definition."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _shown(value: Any) -> str:
    """Return a value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def check_names(values: Mapping[Any, Any]) -> None:
    """Check that the names of settings are texts, as YAML has numbers and dates for names, too.

    Raises:
        ValueError: With the first that is none.
    """
    if wrong := [name for name in values if not isinstance(name, str)]:
        raise ValueError(f"the name of a setting must be a text, found {wrong[0]!r:.60}")


def _explained(kind: type[Settings], errors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with settings, a sentence for each of pydantic's errors."""
    faults: list[str] = []
    for fault in errors:
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            faults.append(f"unknown setting `{name}`.{did_you_mean(name, kind.model_fields)}")
        elif fault["type"] == "missing" and "." not in name:
            faults.append(f"`{name}` is needed: give it as --{name} or in the settings file")
        else:
            reason = fault["msg"].removeprefix("Value error, ")
            if not name:  # two settings contradict each other
                faults.append(reason)
                continue
            faults.append(
                f"`{name}`: {reason[0].lower()}{reason[1:]}, got {_shown(fault['input'])}"
            )
    return faults
