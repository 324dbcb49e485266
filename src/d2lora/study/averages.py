"""Adapters between others: the average of runs, and points on the way from where one began.

The average is of runs that share an initialization, each of which saw the rows in another order.
Runs from one initialization stay near each other, so that the average of A and of B is close to the
average of the updates, at the same rank (model soups, Wortsman et al. 2022, arXiv 2203.05482). For
LoRA from a random A this takes the same A in every run.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2lora.runtime.run_folder import DONE
from d2lora.settings import ConvertSettings
from d2lora.settings.sections import is_named_init

_SIZES = ("peak_memory_bytes", "n_trainable_parameters")


def averaging(paths: Sequence[Path], out: Path) -> ConvertSettings:
    """Return the settings that average adapters in A and B."""
    first, *others = map(str, paths)
    mixed: Mapping[str, Any] = {"mix": tuple(others), "mix_method": "average"}
    return ConvertSettings(adapter=first, out=out, **mixed)


def average(paths: Sequence[Path], out: Path) -> None:
    """Write the average of adapters that share an initialization, of their rank; once."""
    _once(averaging(paths, out))


def interpolating(init: str, path: Path, share: float, out: Path) -> ConvertSettings:
    """Return the settings that go a share of the way from an initialization to a trained adapter.

    That is WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903, equation 1), from a warm start in A
    and in B; from a new adapter, which leaves the base as it is, it is the update times the share.

    Args:
        init: The run's initialization: a name or a folder.
        path: The adapter that came of it.
        share: 0 is the initialization, 1 the trained adapter.
        out: Folder to write.
    """
    if is_named_init(init):
        return ConvertSettings(adapter=str(path), out=out, scale=share)
    mixed: Mapping[str, Any] = {
        "mix": (init,), "mix_method": "average", "mix_weights": (share, 1 - share),
    }  # fmt: skip
    return ConvertSettings(adapter=str(path), out=out, **mixed)


def interpolate(init: str, path: Path, share: float, out: Path) -> None:
    """Write the adapter a share of the way from an initialization to a trained one; once."""
    _once(interpolating(init, path, share, out))


def _once(settings: ConvertSettings) -> None:
    from d2lora.tools.convert import convert

    if not (settings.out / DONE).is_file():
        shutil.rmtree(settings.out, ignore_errors=True)
        convert(settings)


def total_cost(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the cost of runs one after the other: all but sizes add up; None: not known."""
    total: dict[str, Any] = {}
    for name in costs[0]:
        values = [cost[name] for cost in costs]
        joined = max if name in _SIZES else sum
        total[name] = None if None in values else joined(values)
    return total
