"""Choose the demo's learning rates on validation data, the same grid for both arms.

    python scripts/tune_demo.py --out tuning

The warm-up's rate is the one with the lowest sum of held-out general loss and forgetting (the rise
of the loss on the base's own text), so gain and forgetting count together. Then every rate of the
grid is tried for every arm, task and n, with seeds that the demo does not use, and scored on
validation rows; the test rows are not touched. Results are kept, so a killed run goes on. Writes
the choice to src/d2lora/embedded/recipe.yaml and every number behind it to
benchmarks/demo_tuning.json.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from d2lora.cells import Cell, CellResult, n_cores, run_cell, workers
from d2lora.demo import FRESH, TASKS, WARM, cell_of, recipe, warmup_settings
from d2lora.embedded.__main__ import write_world
from d2lora.runs import provenance, write_json, write_text

REPOSITORY = Path(__file__).parent.parent
RECIPE = REPOSITORY / "src" / "d2lora" / "embedded" / "recipe.yaml"
RECORD = REPOSITORY / "benchmarks" / "demo_tuning.json"
FIRST_SEED = 100  # the demo's seeds begin at 0
SIZES = (16, 64, 256)


def main() -> None:
    """Tune the warm-up, then the arms; write the recipe and the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tuning"))
    parser.add_argument("--warmup-rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--n-valid", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--machine", default="a CPU", help="what the record says of the machine")
    args = parser.parse_args()
    data = args.out / "data"
    write_world(data, n_task=max(SIZES))
    with workers(args.workers or n_cores()) as pool:
        warmups = tune_warmup(pool, args, data)
        best = min(warmups, key=lambda row: row["general_loss_after"] + row["text_loss_change"])
        results = tune_arms(pool, args, data, Path(best["path"]))
    table = summary_of(results, args.rates)
    chosen = recipe()
    chosen["warmup"]["learning_rate"] = best["learning_rate"]
    chosen["adapt"]["learning_rates"] = rates_of(table)
    write_text(RECIPE, yaml.safe_dump(chosen, sort_keys=False))
    record = {
        **provenance(),
        "machine": args.machine,
        "seeds": args.seeds,
        "validation_rows": args.n_valid,
        "recipe": chosen,
        "warmup": [{k: v for k, v in row.items() if k != "path"} for row in warmups],
        "arms": table,
    }
    write_json(RECORD, record)
    print(yaml.safe_dump(chosen, sort_keys=False))


def tune_warmup(
    pool: ProcessPoolExecutor, args: argparse.Namespace, data: Path
) -> list[dict[str, Any]]:
    """Warm up at every rate; return held-out loss and forgetting of each."""
    futures = [pool.submit(one_warmup, args.out, data, rate) for rate in args.warmup_rates]
    rows = [future.result() for future in futures]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def one_warmup(out: Path, data: Path, rate: float) -> dict[str, Any]:
    """Warm up at one rate, unless it was done, and measure what it forgets."""
    from d2lora import EvaluateSettings, WarmStart, evaluate, warm_up

    path = out / f"warm-{rate:g}"
    if (path / "done.json").exists():
        start = WarmStart.load(path)
    else:
        start = warm_up(warmup_settings(path, data).changed(learning_rate=rate))
    evaluation = evaluate(
        EvaluateSettings(
            adapters=(str(path),),
            general_text=(str(data / "text-valid.jsonl"),),
            out=out / f"warm-{rate:g}-forgetting-{time.time_ns()}",
            threads=1,
            quiet=True,
        )
    )
    return {
        "learning_rate": rate,
        "general_loss_before": start.manifest.validation_loss_before,
        "general_loss_after": start.manifest.validation_loss_after,
        "text_loss_change": evaluation.forgetting[str(path)].general_loss_change,
        "elapsed_s": start.manifest.cost["elapsed_s"],
        "path": str(path),
    }


def tune_arms(
    pool: ProcessPoolExecutor, args: argparse.Namespace, data: Path, warm_start: Path
) -> list[CellResult]:
    """Run every cell of the grid, the longest first."""
    cells = [
        cell_of(
            arm, task, n, FIRST_SEED + seed, rate, data, args.out / f"cells-{rate:g}", warm_start,
            n_test=args.n_valid, split="valid",
        )
        for n, task, arm, rate, seed in product(
            sorted(SIZES, reverse=True), TASKS, (FRESH, WARM), args.rates, range(args.seeds)
        )
    ]  # fmt: skip
    futures = [pool.submit(kept_cell, cell) for cell in cells]
    results: list[CellResult] = []
    for future in as_completed(futures):
        results.append(future.result())
        print(f"{len(results)} of {len(cells)}", flush=True)
    return results


def kept_cell(cell: Cell) -> CellResult:
    """Run a cell, or read the result of an earlier start."""
    path = cell.training.out.with_suffix(".json")
    if path.exists():
        return CellResult(**json.loads(path.read_text()))
    result = run_cell(cell)
    write_json(path, asdict(result))
    return result


def summary_of(results: list[CellResult], rates: list[float]) -> list[dict[str, Any]]:
    """Return the mean validation score of every task, arm, n and rate."""
    rows: list[dict[str, Any]] = []
    for task, arm, n, rate in product(TASKS, (FRESH, WARM), SIZES, rates):
        key = (task.name, arm, n, rate)
        own = [r for r in results if (r.task, r.arm, r.n, r.learning_rate) == key]
        scores = [float(np.mean(r.scores[task.score])) for r in own]
        rows.append(
            {
                "task": task.files,
                "arm": arm,
                "n": n,
                "learning_rate": rate,
                task.score: round(float(np.mean(scores)), 4),
                "by_seed": [round(score, 4) for score in scores],
                "training_s": round(float(np.mean([r.training_s for r in own])), 1),
            }
        )
        print(json.dumps(rows[-1]))
    return rows


def rates_of(table: list[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """Return the rate with the best validation score: task -> arm -> n -> rate."""
    chosen: dict[str, dict[str, dict[int, float]]] = {}
    for task, arm, n in product(TASKS, (FRESH, WARM), SIZES):
        own = [r for r in table if (r["task"], r["arm"], r["n"]) == (task.files, arm, n)]
        best = max(own, key=lambda row: row[task.score])
        chosen.setdefault(task.files, {}).setdefault(arm, {})[n] = best["learning_rate"]
    return chosen


if __name__ == "__main__":
    main()
