"""What all settings share: frozen, validated, with readable errors."""

from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from d2lora.errors import SettingsError, did_you_mean, listed


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

    def __init__(self, **values: Any) -> None:
        """Validate `values`.

        Raises:
            SettingsError: With every fault at once.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(_explained(type(self), error)) from None

    def changed(self, **values: Any) -> Self:
        """Return a validated copy in which `values` replace the present ones."""
        return type(self)(**{**dict(self), **values})

    def to_yaml(self) -> str:
        """Return the resolved settings as YAML, in the order of their definition."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _explained(kind: type[Settings], error: ValidationError) -> str:
    faults: list[str] = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            faults.append(f"unknown setting `{name}`.{did_you_mean(name, kind.model_fields)}")
        elif fault["type"] == "missing":
            faults.append(f"`{name}` is needed: give it as --{name} or in the settings file")
        else:
            reason = fault["msg"].removeprefix("Value error, ")
            if not name:  # two settings contradict each other
                faults.append(reason)
                continue
            faults.append(f"`{name}`: {reason[0].lower()}{reason[1:]}, got {fault['input']!r}")
    return f"wrong settings:\n{listed(faults)}"
