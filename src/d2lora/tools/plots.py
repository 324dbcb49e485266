"""Pictures of adapters: spectra."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

COLOURS = ("#6b7280", "#0f766e", "#b45309", "#7c3aed", "#be123c", "#1d4ed8", "#4d7c0f")


def spectra(values: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw the singular values of every layer, coloured by the kind of layer; save a PNG."""
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    kinds = sorted({name.rsplit(".", 1)[-1] for name in values})
    colours = dict(zip(kinds, cycle(COLOURS), strict=False))
    named: set[str] = set()
    for name, singular in values.items():
        kind = name.rsplit(".", 1)[-1]
        label = None if kind in named else kind
        named.add(kind)
        xs = range(1, len(singular) + 1)
        axes.plot(xs, singular, color=colours[kind], alpha=0.6, linewidth=1.2, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("direction, strongest first")
    axes.set_ylabel("singular value of the update")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)
