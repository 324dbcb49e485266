"""A study of 24 small cells against the same cells run one after another with `trl sft`.

    python benchmarks/study_cells.py --trl-runs 24

A cell trains a fresh adapter on 16 or 32 rows of GSM8K or of titles, six seeds each, at a fixed
rate on the embedded base. `d2lora study` runs with as many workers as cores, start-up included, and
scores every cell besides on a few test rows, which `trl sft` does not. With fewer `--trl-runs` the
first cells of every kind are run and the time of all 24 is estimated from their mean. Prints a
Markdown table, and what d2lora's time went into.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import yaml

import runs
from common import console_script, head, parser_of, ran, row

TASKS, SIZES, SEEDS, EPOCHS, N_TEST = ("gsm8k", "titles"), (16, 32), 6, 3, 4


def main() -> None:
    """Run the study, then the cells, and print the table."""
    parser = parser_of(__doc__, data="")
    n_cells = len(TASKS) * len(SIZES) * SEEDS
    parser.add_argument("--trl-runs", type=int, default=n_cells)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study_s, spent = study(args.data, folder, args.threads)
        cells = list(rows_of_cells(args.data, folder))[: args.trl_runs]
        if not cells:
            sys.exit("--trl-runs: at least 1 is needed")
        sft_s = [
            runs.run_sft(
                rows, folder / "sft", args.threads, seed=seed, gradient_checkpointing=False
            ).elapsed_s
            for rows, seed in cells
        ]
    all_s = statistics.mean(sft_s) * n_cells
    head("side", "cells run", "s a cell", "24 cells, s", "d2lora is")
    row("d2lora study", n_cells, f"{study_s / n_cells:.1f}", f"{study_s:.0f}", "1.00 x")
    each = f"{all_s / n_cells:.1f}"
    row("trl sft, best", len(cells), each, f"{all_s:.0f}", f"{all_s / study_s:.1f} x")
    print()
    head("a cell of d2lora, on one core", "s")
    for what, seconds in spent.items():
        row(what, f"{seconds:.1f}")


def study(data: Path, folder: Path, workers: int) -> tuple[float, dict[str, float]]:
    """Run the study; return its seconds, and what a cell's seconds of a worker went into."""
    tasks = {
        task: {
            "data": [str((data / task / "train.jsonl").resolve())],
            "test": [str((data / task / "test.jsonl").resolve())],
            "task": task, "n_test": N_TEST, "max_new_tokens": 32,
        }
        for task in TASKS
    }  # fmt: skip
    plan = {
        "question": "How fast are small cells?", "seeds": SEEDS, "sizes": list(SIZES),
        "tasks": tasks, "arms": ["fresh"], "epochs": {16: EPOCHS},
        "general_text": [], "choices": [],
        "rates": {task: {"fresh": dict.fromkeys(SIZES, runs.LEARNING_RATE)} for task in TASKS},
        "adapt": {
            "batch_size": runs.BATCH, "rank": runs.RANK, "warmup_fraction": 0.0,
            "schedule": "linear",
        },
    }  # fmt: skip
    file = folder / "cells.yaml"
    file.write_text(yaml.safe_dump(plan), encoding="utf-8")
    command = [console_script("d2lora"), "study", "--plan", str(file), "--out", str(folder / "s")]
    elapsed_s, _ = ran([*command, "--workers", str(workers), "--no-report", "--quiet"], workers)
    results = (folder / "s" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    cells = [cell for cell in map(json.loads, results) if cell["n"]]
    training_s = statistics.mean(cell["cost"]["elapsed_s"] for cell in cells)
    scoring_s = statistics.mean(cell["evaluation_s"] for cell in cells)
    rest_s = elapsed_s * workers / len(cells) - training_s - scoring_s
    return elapsed_s, {"training": training_s, "scoring": scoring_s, "start and rest": rest_s}


def rows_of_cells(data: Path, folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the folder of each cell's rows, the same that the study trains on, and its seed."""
    from d2lora.data.reading import read_task
    from d2lora.data.sources import nested_order
    from d2lora.settings.seeds import stream_seed

    for seed, task, n in product(range(SEEDS), TASKS, SIZES):
        examples = read_task([str(data / task / "train.jsonl")]).examples
        chosen = nested_order(len(examples), stream_seed(seed, "subset"))[:n]
        name = f"{task}-{n}-{seed}"
        yield runs.write_for_sft([examples[index] for index in chosen], folder / name), seed


if __name__ == "__main__":
    main()
