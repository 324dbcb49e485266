"""The whole method on real public data, through the command line, with the embedded base.

    python scripts/real_input.py --data ../shared/data --out runs/real

Warm up on general instructions, adapt to titles and GSM8K at n = 64 and 256 from fresh LoRA and
from the warm start, evaluate on the test files and on what is forgotten. Rates are chosen by
validation loss on rows out of the n, with the same grid for both arms; test files are opened after.
Finished runs are kept, so a killed start goes on. Every command is printed; the table goes to
standard output and everything behind it to benchmarks/real_input.json.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from d2lora.evaluation.stats import paired_difference
from d2lora.runtime.run_folder import provenance, read_json, write_json
from d2lora.study.executors import n_cores

RECORD = Path(__file__).parent.parent / "benchmarks" / "real_input.json"
ARMS = ("fresh", "warm start")
SCORES = {"titles": "rougeL", "gsm8k": "exact_match"}
NEW_TOKENS = {"titles": 40, "gsm8k": 160}
LENGTH = ["--max-length", "640", "--overlong", "truncate"]


def main() -> None:
    """Run what is missing, then print the table."""
    args = arguments()
    warm = warmups(args)
    best = min(warm, key=lambda row: row["general_loss_after"])["path"]
    rates = chosen_rates(args, best)
    with ThreadPoolExecutor(args.workers) as pool:
        cells = list(pool.map(lambda key: cell(args, best, rates, *key), keys(args)))
        alone = list(pool.map(lambda task: evaluated(args, task, cells), SCORES))
    write_json(
        RECORD,
        {
            **provenance(),
            "machine": args.machine,
            "warmups": [{k: v for k, v in row.items() if k != "path"} for row in warm],
            "rates": {" ".join(map(str, key)): rate for key, rate in rates.items()},
            "base": [{k: v for k, v in row.items() if k != "by_row"} for row in alone],
            "cells": [{k: v for k, v in c.items() if k not in ("by_row", "path")} for c in cells],
        },
    )
    print(table(cells, alone, args))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--m", type=int, help="warm-up rows; all without it")
    parser.add_argument("--warmup-rates", type=float, nargs="+", default=[5e-4, 2e-3])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--limit", type=int, help="test rows a task; all without it")
    parser.add_argument("--workers", type=int, default=n_cores())
    parser.add_argument("--machine", default="a CPU", help="what the record says of the machine")
    return parser.parse_args()


def keys(args: argparse.Namespace) -> list[tuple[str, str, int, int]]:
    """Return (task, arm, n, seed) of every cell, the longest first."""
    sizes = sorted(args.sizes, reverse=True)
    return [
        (task, arm, n, seed)
        for n, task, arm, seed in product(sizes, ("gsm8k", "titles"), ARMS, range(args.seeds))
    ]


def d2lora(command: str, out: Path, *words: object) -> Path:
    """Run one command as a user would, unless it was done; one thread, as workers share cores."""
    if not (out / "done.json").exists():
        line = [command, *map(str, words), "--out", str(out), "--threads", "1", "--quiet"]
        print("d2lora", *line, flush=True, file=sys.stderr)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "d2lora", *line], check=True, env=environment)
    return out


def warmups(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Warm up at every rate."""
    size = ["--m", args.m] if args.m else []

    def one(rate: float) -> dict[str, Any]:
        out = d2lora(
            "warmup", args.out / f"warm-{rate:g}", "--data", args.data / "general/train.jsonl",
            "--learning-rate", rate, "--epochs", 1, "--schedule", "cosine", *size, *LENGTH,
            "--validation-data", args.data / "general/valid.jsonl",
        )  # fmt: skip
        manifest = read_json(out / "warm_start.json")
        return {
            "learning_rate": rate,
            "n_examples": manifest["n_examples"],
            "general_loss_before": manifest["validation_loss_before"],
            "general_loss_after": manifest["validation_loss_after"],
            "n_tokens": manifest["cost"]["n_tokens"],
            "elapsed_s": manifest["cost"]["elapsed_s"],
            "path": str(out),
        }

    with ThreadPoolExecutor(args.workers) as pool:
        return list(pool.map(one, args.warmup_rates))


def adapted(
    args: argparse.Namespace, warm: str, task: str, arm: str, n: int, seed: int, rate: float
) -> Path:
    """Adapt one adapter; a quarter of the n validates."""
    name = f"{task}-{n}-{arm.replace(' ', '-')}-{seed}-{rate:g}"
    return d2lora(
        "adapt", args.out / name, "--data", args.data / task / "train.jsonl", "--n", n,
        "--init", "fresh" if arm == "fresh" else warm, "--seed", seed, "--learning-rate", rate,
        "--epochs", 5, "--batch-size", 8, "--validation-fraction", 0.25, "--patience", 2, *LENGTH,
    )  # fmt: skip


def chosen_rates(args: argparse.Namespace, warm: str) -> dict[tuple[str, str, int], float]:
    """Return the rate with the lowest validation loss for each task, arm and n, from seed 0."""
    grid = [
        (task, arm, n, rate)
        for n, task, arm, rate in product(
            sorted(args.sizes, reverse=True), ("gsm8k", "titles"), ARMS, args.rates
        )
    ]
    with ThreadPoolExecutor(args.workers) as pool:
        folders = list(pool.map(lambda k: adapted(args, warm, k[0], k[1], k[2], 0, k[3]), grid))
    losses = {
        key: read_json(folder / "adapter.json")["validation_loss_after"]
        for key, folder in zip(grid, folders, strict=True)
    }
    return {
        (task, arm, n): min(args.rates, key=lambda rate: losses[task, arm, n, rate])
        for task, arm, n in product(SCORES, ARMS, args.sizes)
    }


def cell(
    args: argparse.Namespace,
    warm: str,
    rates: dict[tuple[str, str, int], float],
    task: str,
    arm: str,
    n: int,
    seed: int,
) -> dict[str, Any]:
    """Adapt at the chosen rate."""
    rate = rates[task, arm, n]
    folder = adapted(args, warm, task, arm, n, seed, rate)
    manifest = read_json(folder / "adapter.json")
    return {
        "task": task,
        "arm": arm,
        "n": n,
        "seed": seed,
        "learning_rate": rate,
        "validation_loss": manifest["validation_loss_after"],
        "training_s": manifest["cost"]["elapsed_s"],
        "path": str(folder),
    }


def evaluated(args: argparse.Namespace, task: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Evaluate a task's adapters in one call, and write what was found into them.

    Returns:
        What was found of the base alone.
    """
    limit = ["--limit", args.limit] if args.limit else []
    own = [c for c in cells if c["task"] == task]
    paths = [c["path"] for c in own]
    out = d2lora(
        "evaluate", args.out / f"evaluation-{task}-{len(own)}", "--adapters", "base", *paths,
        "--data", args.data / task / "test.jsonl", "--max-new-tokens", NEW_TOKENS[task], *limit,
        "--general-text", args.data / "general/valid.jsonl", *LENGTH,
        "--choices", args.data / "forgetting/test.jsonl",
    )  # fmt: skip
    summary = read_json(out / "summary.json")
    by_row: dict[str, list[float]] = {}
    with (out / "records.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            by_row.setdefault(row["adapter"], []).append(row[SCORES[task]])

    def found(name: str) -> dict[str, Any]:
        forgetting = summary["forgetting"][name]
        change = forgetting["choice_accuracy_change"]
        return {
            "scores": {key: value["mean"] for key, value in summary["scores"][name].items()},
            "general_loss": forgetting["general_loss"],
            "general_loss_change": forgetting["general_loss_change"],
            "choice_accuracy": forgetting["choice_accuracy"]["mean"],
            "choice_accuracy_change": None if change is None else change["mean"],
            "by_row": by_row[name],
        }

    for row in own:
        row.update(found(row["path"]))
    return {"task": task, **found("base")}


def table(
    cells: list[dict[str, Any]], alone: list[dict[str, Any]], args: argparse.Namespace
) -> str:
    """Return the results as a Markdown table; pairs are fresh / warm start."""
    lines = [
        "| task | n | fresh | warm start | difference (95 % interval) | validation loss | "
        "general loss, change | choices, change in points |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, score), base in zip(SCORES.items(), alone, strict=True):
        lines.append(f"| {task}, {score} | base | {100 * base['scores'][score]:.1f} | | | | | |")
        lines += [f"| {task}, {score} | {_row(cells, task, n)} |" for n in sorted(args.sizes)]
    return "\n".join(lines)


def _row(cells: list[dict[str, Any]], task: str, n: int) -> str:
    chosen = [c for c in cells if (c["task"], c["n"]) == (task, n)]
    arms = [[c for c in chosen if c["arm"] == arm] for arm in ARMS]
    fresh, warm = (np.array([c["by_row"] for c in arm]) for arm in arms)
    d = paired_difference(fresh, warm)
    parts = [
        str(n),
        f"{100 * fresh.mean():.1f}",
        f"{100 * warm.mean():.1f}",
        f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})",
        " / ".join(f"{_mean(arm, 'validation_loss'):.2f}" for arm in arms),
        " / ".join(f"{_mean(arm, 'general_loss_change'):+.2f}" for arm in arms),
        " / ".join(f"{100 * _mean(arm, 'choice_accuracy_change'):+.1f}" for arm in arms),
    ]
    return " | ".join(parts)


def _mean(cells: list[dict[str, Any]], field: str) -> float:
    return float(np.mean([c[field] for c in cells]))


if __name__ == "__main__":
    main()
