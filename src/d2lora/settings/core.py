"""What all settings share: frozen, validated, with readable errors."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from d2lora.errors import SettingsError, did_you_mean, listed

_MOST_SHOWN = 200
"""Characters of a value in a message."""


class Effect(NamedTuple):
    """Where some settings have an effect; given elsewhere they are an error.

    Limits that are not reached, and switches that turn off what would not happen, are heeded.
    """

    names: tuple[str, ...]
    where: Callable[[Any], object]
    """Whether they have one with these settings."""
    why: str
    """What a user is told who gives them elsewhere, behind their names."""


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
    effects: ClassVar[tuple[Effect, ...]] = ()
    """Where those of this class have an effect that do not always have one."""

    def __init__(self, /, **values: Any) -> None:
        """Validate `values`.

        Raises:
            SettingsError: With every fault at once, settings without effect among them. What is at
                its default, as in a file of resolved settings, counts as not given.
        """
        _validate(self, values)
        fields = type(self).model_fields
        defaults = {name: fields[name].get_default(call_default_factory=True) for name in values}
        self.check_effect([n for n, default in defaults.items() if getattr(self, n) != default])

    def check_effect(self, given: Collection[str]) -> None:
        """Check that settings have an effect.

        Raises:
            SettingsError: With those that have none.
        """
        if faults := self.without_effect(given):
            raise SettingsError(f"wrong settings:\n{listed(list(faults.values()))}")

    def without_effect(self, given: Collection[str]) -> dict[str, str]:
        """Return those of the given settings that have no effect, and why."""
        return {
            name: f"{name} {effect.why}"
            for effect in self._effects()
            if not effect.where(self)
            for name in effect.names
            if name in given
        }

    @classmethod
    def _effects(cls) -> Iterator[Effect]:
        for kind in reversed(cls.__mro__):
            yield from vars(kind).get("effects", ())

    @classmethod
    def unchecked(cls, values: Mapping[str, Any]) -> Self:
        """Return validated settings, some of which may have no effect.

        Raises:
            SettingsError: With every other fault.
        """
        settings = cls.__new__(cls)
        _validate(settings, values)
        return settings

    @classmethod
    def heeded(cls, values: Mapping[str, Any]) -> Self:
        """Return validated settings without those that have no effect, as where several share some.

        Raises:
            SettingsError: With every other fault.
        """
        whole = cls.unchecked(values)
        idle = whole.without_effect(values)
        if not idle:
            return whole
        return cls(**{name: value for name, value in values.items() if name not in idle})

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
        return self.unchecked({**dict(self), **values})

    def to_yaml(self) -> str:
        """Return the resolved settings as YAML, in the order of their definition."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _validate(settings: Settings, values: Mapping[str, Any]) -> None:
    """Fill settings with values."""
    try:
        type(settings).__pydantic_validator__.validate_python(values, self_instance=settings)
    except ValidationError as error:
        faults = listed(_explained(type(settings), error.errors()))
        raise SettingsError(f"wrong settings:\n{faults}") from None


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
