"""YAML in which nothing is lost or misread.

A name given twice is an error, where PyYAML keeps the last; so are numbers to other bases than ten.
Nothing in it can exhaust the memory or break what is written of it later, either: aliases that
multiply, endless whole numbers, and texts that no file can hold are errors.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

_MERGE, _NULL = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:null"
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_MOST_NODES = 100_000
"""Values that a text with aliases may stand for."""
_MOST_BITS = 1024
"""Of a whole number; more than a float holds."""
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """Refuses names that are given twice, and values that nothing could be done with."""

    def construct_document(self, node: yaml.Node) -> Any:
        if _n_values(node, {}) > _MOST_NODES:
            raise yaml.MarkedYAMLError(problem="its aliases (`*name`) stand for too many values")
        return super().construct_document(node)

    def construct_scalar(self, node: Any) -> str:
        text = super().construct_scalar(node)
        if found := _UNWRITABLE.search(text):
            line = node.start_mark.line + 1
            raise yaml.MarkedYAMLError(problem=f"a text in line {line} holds {found[0]!a}")
        return text

    def construct_yaml_float(self, node: Any) -> float:
        _check_decimal(node)
        return super().construct_yaml_float(node)

    def construct_yaml_int(self, node: Any) -> int:
        _check_decimal(node)
        value = super().construct_yaml_int(node)
        if value.bit_length() > _MOST_BITS:
            line = node.start_mark.line + 1
            raise yaml.MarkedYAMLError(problem=f"a whole number in line {line} is too large")
        return value

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


_Loader.add_constructor(_INT, _Loader.construct_yaml_int)
_Loader.add_constructor(_FLOAT, _Loader.construct_yaml_float)


def _check_decimal(node: yaml.ScalarNode) -> None:
    """Refuse what YAML 1.1 reads to base 60 or 8: `{4:8}` for `{4: 8}`, `016`."""
    if ":" in node.value:
        fault = "has no space after its colon, as in `{4: 8}`"
    elif node.tag == _INT and re.match(r"[-+]?0[0-9_]", node.value):
        fault = "starts with a zero"
    else:
        return
    raise yaml.MarkedYAMLError(
        problem=f"expected a number, found `{node.value}`, which {fault}",
        problem_mark=node.start_mark,
    )


def _n_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node stands for, each alias counted as what it repeats.

    Raises:
        yaml.MarkedYAMLError: If it holds itself.
    """
    if known.get(id(node)) == 0:
        raise yaml.MarkedYAMLError(problem="an alias (`*name`) stands within what it repeats")
    if id(node) not in known:
        known[id(node)] = 0
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = (part for one in inner for part in (one if isinstance(one, tuple) else (one,)))
        known[id(node)] = 1 + sum(_n_values(part, known) for part in parts)
    return known[id(node)]


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
        yaml.YAMLError: If it is not YAML, a mapping gives a name twice, a value is not what its
            form or tag says (no date, no number), or could not be kept.
    """
    try:
        return yaml.load(text, _TextLoader if texts else _Loader)  # noqa: S506 - SafeLoaders
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except ValueError as error:  # a date such as 2024-13-45, or endless digits
        raise yaml.YAMLError(str(error)) from None
    except (AttributeError, LookupError, TypeError, OverflowError) as error:  # PyYAML's own
        raise yaml.YAMLError(f"a value is not what its tag says: {error}") from None
