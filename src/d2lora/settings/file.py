"""Settings from a YAML file: may be partial; every fault is reported at once."""

from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import TypeAdapter

from d2lora.errors import SettingsError, listed
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
    named: dict[str, Any] = {
        str(name): _listed(kind, str(name), value) for name, value in values.items()
    }
    if faults := kind.faults_of(named):
        raise SettingsError(f"{path}:\n{listed(faults)}")
    return {name: _typed(kind, name, value) for name, value in named.items()}


def _listed(kind: type[Settings], name: str, value: Any) -> Any:
    """Return a value, one text as a list of one where a setting takes texts."""
    texts: tuple[Any, ...] = (tuple[str, ...], tuple[str, ...] | None)
    known = kind.model_fields.get(name)
    return [value] if known and isinstance(value, str) and known.annotation in texts else value


def _typed(kind: type[Settings], name: str, value: Any) -> Any:
    """Return a value in its field's type."""
    field = kind.model_fields[name]
    typed = cast("Any", Annotated)[field.annotation, field]
    return TypeAdapter[Any](typed).validate_python(value)
