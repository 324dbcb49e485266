"""The door of jinja2: pages in which every text is escaped."""

from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def environment(package: str) -> Environment:
    """Return an environment for the templates in `template/` of a package."""
    made = Environment(
        loader=PackageLoader(package, "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tests: dict[str, Any] = made.tests
    tests["numeric"] = _is_number
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return made


def _is_number(text: Any) -> bool:
    return str(text)[:1] in tuple("+−0123456789")


def own_file(name: str) -> str:
    """Return a file that stands beside the templates."""
    return (resources.files("d2lora.report") / "template" / name).read_text("utf-8")


def as_is(text: str) -> Markup:
    """Return text of ours that is not to be escaped: a style sheet, a script."""
    return Markup(text)  # noqa: S704  # never a user's
