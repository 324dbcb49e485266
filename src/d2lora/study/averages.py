"""The average of runs that share an initialization, each of which saw the rows in another order.

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

_SIZES = ("peak_memory_bytes", "n_trainable_parameters")


def averaging(paths: Sequence[Path], out: Path) -> ConvertSettings:
    """Return the settings that average adapters in A and B."""
    first, *others = map(str, paths)
    mixed: Mapping[str, Any] = {"mix": tuple(others), "mix_method": "average"}
    return ConvertSettings(adapter=first, out=out, **mixed)


def average(paths: Sequence[Path], out: Path) -> None:
    """Write the average of adapters that share an initialization, of their rank; once."""
    from d2lora.tools.convert import convert

    if not (out / DONE).is_file():
        shutil.rmtree(out, ignore_errors=True)
        convert(averaging(paths, out))


def total_cost(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the cost of runs one after the other: all but sizes add up; None: not known."""
    total: dict[str, Any] = {}
    for name in costs[0]:
        values = [cost[name] for cost in costs]
        joined = max if name in _SIZES else sum
        total[name] = None if None in values else joined(values)
    return total
