"""Say which differences of a study's cells hold for other seeds, from its results.csv.

    python scripts/over_seeds.py benchmarks/studies/scarcity.csv --against fresh

For every task, arm and n: the mean paired difference to the reference, in points, with Student's
95 % interval over seeds; and for every arm the pooled effect, the mean over tasks and sizes, with
seeds as the units that repeat. Test rows are taken as they are; `d2lora report` counts both.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from d2lora.evaluation.crossed import pooled_difference

SCORES = {"problems": "exact_match", "gsm8k": "exact_match", "titles": "rougeL"}
UNTRAINED = {"base", "few_shot", "warm_only"}


def main() -> None:
    """Print a Markdown table and how many intervals leave out zero."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--against", default="fresh")
    args = parser.parse_args()
    print("| study | task | n | arm | difference | over seeds | |\n|---|---|---|---|---|---|---|")
    for path in args.results:
        stand = compared = 0
        cells: dict[str, dict[str, list[Any]]] = {}
        for (task, n, arm), difference in differences(path, args.against):
            margin = stats.sem(difference) * stats.t.ppf(0.975, len(difference) - 1)
            mean = difference.mean()
            stands = abs(mean) > margin
            stand, compared = stand + stands, compared + 1
            interval = f"{mean - margin:+.1f} to {mean + margin:+.1f}"
            mark = "stands" if stands else ""
            print(f"| {path.stem} | {task} | {n} | {arm} | {mean:+.1f} | {interval} | {mark} |")
            cells.setdefault(arm, {}).setdefault(task, []).append(difference)
        for arm, by_task in cells.items():
            if sum(map(len, by_task.values())) > 1:
                print(f"| {path.stem} | {pooled(arm, by_task)} |")
        print(f"\n{path.stem}: {stand} of {compared} stand\n")


def pooled(arm: str, by_task: dict[str, list[Any]]) -> str:
    """Return an arm's row of the table over all tasks and sizes that have as many seeds as most."""
    most = max(len(cell) for cells in by_task.values() for cell in cells)
    whole = [[cell for cell in cells if len(cell) == most] for cells in by_task.values()]
    found = pooled_difference([np.stack(cells)[:, :, None] for cells in whole if cells])
    if found.interval is None or found.p_value is None:
        return f"pooled | {found.n_cells} cells | {arm} | {found.mean:+.1f} | one seed | "
    low, high = found.interval
    mark = "stands" if low > 0 or high < 0 else ""
    interval = f"{low:+.1f} to {high:+.1f}, p = {found.p_value:.2g}"
    return f"pooled | {found.n_cells} cells | {arm} | {found.mean:+.1f} | {interval} | {mark}"


def differences(path: Path, against: str) -> Iterator[tuple[Any, Any]]:
    """Yield (task, n, arm) and its differences to the reference, one a seed, in points."""
    cells = pd.read_csv(path)
    for (task, n, arm), own in cells.groupby(["task", "n", "arm"], sort=False):
        if arm in UNTRAINED or arm == against:
            continue
        at = (cells.task == task) & (cells.n == n) & (cells.arm == against)
        reference = cells[at].set_index("seed")[SCORES[task]]
        paired = own.set_index("seed")[SCORES[task]].sub(reference).dropna()
        if len(paired) > 1:
            yield (task, n, arm), 100 * np.asarray(paired)


if __name__ == "__main__":
    main()
