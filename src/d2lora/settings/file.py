"""Settings from a YAML file: may be partial; every fault is reported at once."""

from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from d2lora.errors import SettingsError, did_you_mean, listed
from d2lora.settings import Settings
from d2lora.settings.yaml_text import parse_yaml


def read_settings_file(kind: type[Settings], path: Path) -> dict[str, Any]:
    """Read a YAML file with settings of `kind`, which may be partial.

    Raises:
        SettingsError: If it cannot be read, or has unknown names or wrong values; all at once.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot read the settings file: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise SettingsError(f"{path}: expected `name: value` lines, found {found}")
    named: dict[str, Any] = {str(name): value for name, value in values.items()}
    faults: list[str] = []
    for name, value in named.items():
        if name not in kind.model_fields:
            faults.append(f"unknown setting `{name}`.{did_you_mean(name, kind.model_fields)}")
            continue
        try:
            named[name] = _validated(kind, name, value)
        except ValidationError as error:
            faults.append(f"`{name}`: {error.errors()[0]['msg']}, got {value!r}")
    if faults:
        raise SettingsError(f"{path}:\n{listed(faults)}")
    return named


def _validated(kind: type[Settings], name: str, value: Any) -> Any:
    """Return a value in its field's type; one text stands for a list of one."""
    field = kind.model_fields[name]
    texts: tuple[Any, ...] = (tuple[str, ...], tuple[str, ...] | None)
    if isinstance(value, str) and field.annotation in texts:
        value = [value]
    typed = cast("Any", Annotated)[field.annotation, field]
    return TypeAdapter[Any](typed).validate_python(value)
