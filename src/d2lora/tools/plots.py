"""Plots of adapters: spectra."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from d2lora.errors import SettingsError
from d2lora.runtime.extras import need_extra


def spectra(values: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw the singular values of every layer, coloured by the kind of layer; save a PNG.

    Raises:
        SettingsError: If the plotting library is not installed, or there is nothing to draw.
    """
    need_extra("report", "--plot")
    import altair as alt

    rows = [
        {"layer": name, "kind": name.rsplit(".", 1)[-1], "direction": place, "value": value}
        for name, singular in values.items()
        for place, value in enumerate(singular, 1)
        if value > 0  # the axis is logarithmic
    ]
    if not rows:
        raise SettingsError("--plot: every update is zero, so there is no spectrum to draw")
    chart = (
        alt.Chart(alt.Data(values=rows), title=alt.Title(title, anchor="start"))
        .mark_line(opacity=0.6, strokeWidth=1.2)
        .encode(
            x=alt.X("direction:Q", title="direction, strongest first"),
            y=alt.Y("value:Q", title="singular value of the update").scale(type="log"),
            color=alt.Color("kind:N", title=None),
            detail="layer:N",
        )
        .properties(width=520, height=320)
    )
    chart.save(str(path), format="png", ppi=150)
