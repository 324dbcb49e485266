"""YAML in which nothing is lost or misread.

A name given twice is an error, where PyYAML keeps the last; so are numbers to other bases than ten.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

_MERGE, _NULL = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:null"


class _Loader(yaml.SafeLoader):
    """Refuses names that are given twice."""

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


def _check_decimal(node: yaml.ScalarNode) -> None:
    """Refuse what YAML 1.1 reads to base 60 or 8: `{4:8}` for `{4: 8}`, `016`."""
    if ":" in node.value:
        fault = "has no space after its colon, as in `{4: 8}`"
    elif re.match(r"[-+]?0[0-9_]", node.value):
        fault = "starts with a zero"
    else:
        return
    raise yaml.MarkedYAMLError(
        problem=f"expected a number, found `{node.value}`, which {fault}",
        problem_mark=node.start_mark,
    )


def _integer(loader: "_Loader", node: yaml.ScalarNode) -> int:
    _check_decimal(node)
    return loader.construct_yaml_int(node)


def _float(loader: "_Loader", node: yaml.ScalarNode) -> float:
    if ":" in node.value:
        _check_decimal(node)
    return loader.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


class _TextLoader(_Loader):
    """Leaves what looks like a number, a date or a boolean (`no`) as the text that it is."""


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, written) for tag, written in known if tag in (_NULL, _MERGE)]
    for first, known in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, *, texts: bool = False) -> Any:
    """Return the value of a YAML text.

    Args:
        text: What to parse.
        texts: Whether values without quotes are texts too: `no`, `1.0`, `2024-01-31`.

    Raises:
        yaml.YAMLError: If it is not YAML, a mapping gives a name twice, or a value is no number or
            date though written as one.
    """
    try:
        return yaml.load(text, _TextLoader if texts else _Loader)  # noqa: S506 - SafeLoaders
    except (ValueError, RecursionError) as error:  # a date such as 2024-13-45, or endless digits
        raise yaml.YAMLError(str(error)) from None
