"""What all charts share: a colour and shape for every arm, themes, PNG export.

Colours of axes and text are left to the page's or the PNG's theme; those of arms are fixed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import altair as alt
import vl_convert
from altair.utils.schemapi import debug_mode

from d2lora.runtime.grids import Grid
from d2lora.study.cells import BASE

BASE_COLOUR = "#7a828e"
COLOURS = (
    "#c2570c",
    "#1f78b8",
    "#0f8f6e",
    "#b1559b",
    "#8a7a12",
    "#6a63c9",
    "#a5544a",
    "#4d8a3a",
    "#4a8a99",
)
"""Of arms, in the plan's order; distinct with any colour vision together with the shapes."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
FONT = "sans-serif"
Rows = list[dict[str, Any]]
PNG_WIDTH, HEIGHT = 560, 300
MAX_DOTS = 3_000
"""Seeds, over all that a chart shows, that are drawn as a dot each."""


@dataclass(frozen=True)
class Chart:
    """A chart, its description in words, and its numbers."""

    name: str
    """Name of its file, without the ending."""
    title: str
    alt: str
    spec: dict[str, Any]
    """Vega-Lite, as wide as its container."""
    data: Grid


class Palette:
    """The colour and shape of each arm, the same in every chart."""

    def __init__(self, arms: Sequence[str]) -> None:
        """Deal colours out to arms, in order."""
        self.arms = [*arms, BASE]
        own = {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(arms)}
        self.colours = {**own, BASE: BASE_COLOUR}
        self.shapes = {arm: SHAPES[i % len(SHAPES)] for i, arm in enumerate(self.arms)}

    def colour(self, shown: Sequence[str]) -> alt.Color:
        """Return the encoding of the arms that a chart shows."""
        return alt.Color("arm:N", scale=self._scale(self.colours, shown))

    def shape(self, shown: Sequence[str]) -> alt.Shape:
        """Return the encoding of the arms that a chart shows."""
        return alt.Shape("arm:N", scale=self._scale(self.shapes, shown))

    def ordered(self, arms: Sequence[str]) -> list[str]:
        """Return arms in the plan's order, once each."""
        return [arm for arm in self.arms if arm in set(arms)]

    @staticmethod
    def _scale(values: Mapping[str, str], shown: Sequence[str]) -> alt.Scale:
        return alt.Scale(domain=list(shown), range=[values[arm] for arm in shown])


def png(chart: Chart) -> bytes:
    """Draw a chart on white, with its title and legend."""
    spec = {
        **chart.spec,
        "width": PNG_WIDTH,
        "title": {"text": _without_escapes(chart.title), "anchor": "start"},
    }
    return vl_convert.vegalite_to_png(
        spec, vl_version=_version(), scale=2, config={**LIGHT, "background": "#ffffff"}
    )


@cache
def scripts() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, to be put into a page."""
    version = _version()
    return vl_convert.javascript_bundle(vl_version=version)  # pyright: ignore[reportCallIssue]


def theme(text: str, faint: str, line: str) -> dict[str, Any]:
    """Return a Vega-Lite configuration of the given colours."""
    return {
        "background": "transparent",
        "font": FONT,
        "padding": 4,
        "view": {"stroke": None},
        "axis": {
            "labelColor": faint,
            "titleColor": faint,
            "titleFontWeight": "normal",
            "titlePadding": 10,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "gridColor": line,
            "domainColor": line,
            "tickColor": line,
            "labelPadding": 6,
            "tickSize": 4,
        },
        "axisY": {"domain": False, "ticks": False, "tickCount": 5},
        "axisX": {"grid": False, "tickCount": 6},
        "legend": {
            "orient": "bottom",
            "title": None,
            "labelColor": text,
            "labelFontSize": 12,
            "columns": 4,
            "symbolOpacity": 1,
        },
        "title": {"color": text, "fontSize": 15, "offset": 14},
        "rule": {"color": faint},
        "text": {"color": faint, "fontSize": 11},
    }


LIGHT = theme("#1b1f24", "#57606a", "#dfe3e8")
DARK = theme("#e8ebef", "#a3adb8", "#323a44")


def rows_of(rows: Rows) -> alt.Chart:
    """Return a layer to be, of values that stand in the page itself."""
    with debug_mode(False):  # each value would be checked
        return alt.Chart(alt.Data(values=rows))


def dots(rows: Rows) -> Rows:
    """Return rows that are drawn as a dot each; none of too many, which would be a cloud."""
    return rows if len(rows) <= MAX_DOTS else []


def chart_of(
    name: str, title: str, words: str, layers: Sequence[Any], data: Grid, height: int = HEIGHT
) -> Chart:
    """Return a chart of layers, as wide as its container and `height` pixels high."""
    whole = alt.layer(*layers).properties(width="container", height=height)
    spec = whole.to_dict(validate=False)  # each value would be checked
    del spec["config"]
    return Chart(name, title, words, _without_escapes(spec), data)


_MOST_CHARACTERS = 200
"""Of a text; a picture is as wide as its longest line."""
_NOT_IN_TEXTS = str.maketrans("\\\n\t", "\u29f5  ")
"""What ends the texts of Vega's expressions, or is an escape there."""


def _without_escapes(value: Any) -> Any:
    """Return a specification whose texts are no more than texts in Vega's expressions."""
    if isinstance(value, str):
        text = value.translate(_NOT_IN_TEXTS)
        return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
    if isinstance(value, dict):
        return {_without_escapes(name): _without_escapes(inner) for name, inner in value.items()}
    return [_without_escapes(inner) for inner in value] if isinstance(value, list) else value


def _version() -> str:
    """Return the version of Vega-Lite that altair writes for, as `6.1`."""
    return alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]
