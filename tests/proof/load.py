"""Studies of many cells: trained, listed, resumed and reported, with time and memory.

    python tests/proof/load.py --trained 2000 --cells 50000

Those that are not trained have invented results, under the keys that the study looks for; no run
of it is left to do.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "scripts")]

N_OUTPUTS = 10
"""Test rows, so outputs of a cell."""
_COST = {
    "n_steps": 8, "n_tokens": 4000, "n_supervised_tokens": 500, "flops": 10**9, "elapsed_s": 1.0,
    "peak_memory_bytes": 10**8, "n_trainable_parameters": 10_000, "n_prepass_tokens": 0,
}  # fmt: skip


def write_plan(path: Path, **given: Any) -> Path:
    """Write a plan of two arms that tries no learning rates; return it."""
    import conftest
    from d2lora.embedded import general_rows, title_rows
    from support import small_plan, write_rows

    folder = path.parent
    base = conftest.save_tiny_base(folder / "base", 0)
    general = write_rows(folder / "pool.jsonl", general_rows("train", 40))
    titles = write_rows(folder / "titles.jsonl", title_rows("train", 20))
    values = small_plan(folder, base, general, titles) | {
        "learning_rates": [0.01], "arms": ["fresh", "warm"], "keep_out_words": 0, **given,
    }  # fmt: skip
    test = write_rows(folder / "test.jsonl", title_rows("test", N_OUTPUTS))
    values["tasks"]["titles"]["test"] = [test]
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def write_store(folder: Path, n_cells: int) -> Path:
    """Write a plan of about so many cells and the result of each; return the plan."""
    from d2lora.runtime.run_folder import provenance
    from d2lora.study.cells import BASE, cells_of
    from d2lora.study.jobs import WarmUp
    from d2lora.study.needs import Needs
    from d2lora.study.read_plan import read_plan
    from d2lora.study.steps import Missing, reached

    sizes = [4, 8, 12, 16, 20]
    path = write_plan(folder / "plan.json", sizes=sizes, seeds=n_cells // 10)
    plan = read_plan(str(path))
    needs, chance = Needs(plan, folder / "store", keep_adapters=True), np.random.default_rng(0)
    made = {"provenance": provenance(), "learning_rate": 0.01, "adapter": None}
    for cell in cells_of(plan):
        step = reached(needs.last_job(cell))
        while isinstance(step, Missing):
            for job in step.jobs:
                assert isinstance(job, WarmUp)
                losses = {"validation_loss_before": 2.0, "validation_loss_after": 1.0}
                about = {"label": job.label, "about": ["WarmUp", *job.about], "job_s": 1.0}
                _write(job.folder, {**about, **made, **losses, "cost": _COST})
            step = reached(needs.last_job(cell))
        scores = chance.random(N_OUTPUTS)
        result: dict[str, Any] = {
            "label": step.label, "about": ["Scored", *step.about], **made,
            "scores": dict.fromkeys(("rougeL", "rouge1", "rouge2"), scores.tolist()),
            "general_loss": 2.0 + float(chance.random()), "choices_right": [0, 1, 1, 0, 1, 0],
            "n_output_tokens": 60, "evaluation_s": 1.0, "job_s": 2.0, "fast_passes": [],
        }  # fmt: skip
        if cell.arm != BASE:
            result["cost"] = _COST
        _write(step.folder, result)
        outputs = [f"{cell}: a title, the {row}th" for row in range(N_OUTPUTS)]
        rows = {
            "prompt": [f"Give a title to abstract {row}" for row in range(N_OUTPUTS)],
            "target": [f"Title {row}" for row in range(N_OUTPUTS)], "output": outputs,
            "rougeL": scores,
        }  # fmt: skip
        pd.DataFrame(rows).to_parquet(step.folder / "records.parquet", index=False)
    return path


def _write(folder: Path, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".lock").touch()
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def timed(words: list[str], folder: Path) -> tuple[float, float, float]:
    """Run a command; return its seconds, those of CPU, and the most MB of any command so far."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-m", "d2lora", *words]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    took_s = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return took_s, cpu_s, after.ru_maxrss / 1024


def measure(folder: Path, commands: list[tuple[str, list[str]]]) -> None:
    """Print a table of commands."""
    sys.stdout.write("\n| command | s | s of CPU | peak MB |\n|---|---|---|---|\n")
    for what, words in commands:
        took_s, cpu_s, peak = timed(words, folder)
        sys.stdout.write(f"| {what} | {took_s:.1f} | {cpu_s:.1f} | {peak:.0f} |\n")
        sys.stdout.flush()


def trained(folder: Path, n_cells: int) -> None:
    """Train every cell of a study with two workers, resume and report it."""
    plan = str(write_plan(folder / "trained.json", sizes=[4], seeds=n_cells // 2, epochs={4: 1}))
    study = ["study", plan, "--out", "trained", "--store", "trained-store", "--no-report"]
    two = ["--executor", "processes", "--workers", "2"]
    measure(
        folder,
        [
            ("study, trained", [*study, *two]),
            ("study, which resumes", [*study, *two]),
            ("report", ["report", "trained"]),
        ],
    )
    lines = (folder / "trained" / "results.jsonl").read_text("utf-8").splitlines()
    failures = json.loads((folder / "trained" / "study.json").read_text("utf-8"))["failures"]
    sys.stdout.write(f"\n{len(lines):,} cells trained and scored, {len(failures)} failed\n")


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trained", type=int, default=2_000, help="cells that are trained")
    parser.add_argument("--cells", type=int, default=50_000, help="of another study: invented")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["D2LORA_CACHE"] = str(folder / "cache")
        if given.trained:
            trained(folder, given.trained)
        if not given.cells:
            return
        plan = str(write_store(folder, given.cells))
        n_runs = len(list(folder.glob("store/*/result.json")))
        study = ["study", plan, "--out", "study", "--store", "store", "--executor", "inline"]
        sys.stdout.write(f"\n{n_runs:,} runs, {N_OUTPUTS * n_runs:,} outputs\n")
        measure(
            folder,
            [
                ("study --dry-run", [*study, "--dry-run"]),
                ("study, which resumes", [*study, "--no-report"]),
                ("report", ["report", "study"]),
            ],
        )
        page = folder / "study" / "report" / "index.html"
        sys.stdout.write(f"\nThe page: {page.stat().st_size / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main()
