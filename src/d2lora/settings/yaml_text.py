"""YAML in which nothing is lost: a name given twice is an error, where PyYAML keeps the last."""

from collections.abc import Hashable
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002
        lines: dict[Hashable, int] = {}
        for key, _ in node.value:
            name: Any = None if key.tag == _MERGE else self.construct_object(key, deep=True)
            if name is None or not isinstance(name, Hashable):
                continue
            line = key.start_mark.line + 1
            if name in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"`{name}` is given twice, in line {lines[name]} and in line {line}"
                )
            lines[name] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        yaml.YAMLError: If it is not YAML, a mapping gives a name twice, or a value is no number or
            date though written as one.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - it is a SafeLoader
    except (ValueError, RecursionError) as error:  # a date such as 2024-13-45, or endless digits
        raise yaml.YAMLError(str(error)) from None
