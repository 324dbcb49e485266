"""Pictures: score over n, spectra of adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

COLOURS = ("#6b7280", "#0f766e", "#b45309", "#7c3aed", "#be123c", "#1d4ed8", "#4d7c0f")


@dataclass(frozen=True)
class Point:
    """One arm at one n: the mean over seeds and what each seed scored, in percent."""

    n: int
    mean: float
    by_seed: tuple[float, ...]


def score_over_n(arms: Mapping[str, Sequence[Point]], title: str, score: str, path: Path) -> None:
    """Draw score over n, a line for each arm with its seeds as dots, and save it as a PNG."""
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for colour, (arm, points) in zip(COLOURS, arms.items(), strict=False):
        sizes = [point.n for point in points]
        axes.plot(sizes, [p.mean for p in points], "-o", color=colour, label=arm, linewidth=2)
        for point in points:
            x = [point.n] * len(point.by_seed)
            axes.plot(x, point.by_seed, "o", color=colour, alpha=0.35, markersize=4)
    sizes = sorted({point.n for points in arms.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("task examples n (validation rows included)")
    axes.set_ylabel(score)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


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
