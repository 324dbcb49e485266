"""The whole story on the embedded base: warm up once, adapt to two scarce tasks, compare.

Every number printed is measured in the run. Learning rates come from `embedded/recipe.yaml`, a
recorded tuning run with the same grid for both arms (`scripts/tune_demo.py`).
"""

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from d2lora.cells import Cell, CellResult, n_cores, run_cell, workers, write_results
from d2lora.console import Reporter
from d2lora.embedded.__main__ import write_world
from d2lora.errors import RunError
from d2lora.plots import Point, score_over_n
from d2lora.runs import provenance, write_json
from d2lora.settings import AdaptSettings, DemoSettings, WarmupSettings
from d2lora.stats import Difference, paired_difference

FRESH, WARM = "fresh", "warm start"
MARKER = "demo.json"


@dataclass(frozen=True)
class _Task:
    """A demo task: its file names, its main score, and how long its answers are."""

    name: str
    files: str
    title: str
    score: str
    score_name: str
    max_new_tokens: int


TASKS = (
    _Task("gsm8k", "problems", "Word problems", "exact_match", "exact match, %", 90),
    _Task("titles", "titles", "Titles", "rougeL", "ROUGE-L", 32),
)


def recipe() -> dict[str, Any]:
    """Return the demo's settings and the tuning run behind them."""
    path = resources.files("d2lora") / "embedded" / "recipe.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def warmup_settings(out: Path, data: Path) -> WarmupSettings:
    """Return the settings of the demo's warm-up."""
    return WarmupSettings(
        **recipe()["warmup"],
        data=(str(data / "general-train.jsonl"),),
        out=out,
        threads=1,
        quiet=True,
    )


def cell_of(
    arm: str, task: _Task, n: int, seed: int, learning_rate: float, data: Path, out: Path,
    warm_start: Path, *, n_test: int, split: str = "test",
) -> Cell:  # fmt: skip
    """Return one cell of the demo."""
    plan = recipe()["adapt"]
    training = AdaptSettings(
        data=(str(data / f"{task.files}-train.jsonl"),),
        out=out / f"{task.files}-{n}-{arm.replace(' ', '-')}-{seed}",
        init=FRESH if arm == FRESH else str(warm_start),
        task=task.name,  # pyright: ignore[reportArgumentType]
        n=n,
        seed=seed,
        learning_rate=learning_rate,
        epochs=plan["epochs"].get(n, 3),
        batch_size=plan["batch_size"],
        schedule=plan["schedule"],
        rank=plan["rank"] if arm == FRESH else None,
        threads=1,
        quiet=True,
    )
    return Cell(
        arm,
        task.name,
        training,
        data / f"{task.files}-{split}.jsonl",
        n_test,
        task.max_new_tokens,
        data / "text-valid.jsonl" if split == "test" else None,
        data / "choices.jsonl" if split == "test" else None,
    )


def demo(settings: DemoSettings) -> list[CellResult]:
    """Run the demo: warm-up, both tasks at every n and seed with both arms, table, pictures.

    Raises:
        RunError: If `out` holds something that is not a demo.
    """
    began = time.perf_counter()
    out, reporter = settings.out, Reporter()
    _clear(out)
    write_json(out / MARKER, provenance())
    number = settings.workers or n_cores()
    write_world(out / "data", n_task=max(settings.sizes), n_test=settings.n_test)
    n_cells = 2 * len(TASKS) * len(settings.sizes) * settings.seeds
    reporter.say(
        f"d2lora demo: one warm-up, then {n_cells} adapters ({len(TASKS)} tasks x n = "
        f"{', '.join(map(str, settings.sizes))} x {settings.seeds} seeds x 2 arms) in {number} "
        f"process(es); everything goes to {out}"
    )
    with workers(number) as pool:
        results, manifest = _run_all(pool, settings, reporter, n_cells)
    write_results(results, out / "results.jsonl")
    _show(results, manifest, settings, Console(width=110), time.perf_counter() - began)
    return results


def _clear(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise RunError(f"{out} holds something that is not a demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)


def run_warmup(settings: WarmupSettings) -> dict[str, Any]:
    """Warm up in a worker; return the manifest."""
    from d2lora.warmup import warm_up

    return warm_up(settings).manifest.model_dump(mode="json")


def _run_all(
    pool: ProcessPoolExecutor, settings: DemoSettings, reporter: Reporter, n_cells: int
) -> tuple[list[CellResult], dict[str, Any]]:
    """Warm up in one process while the fresh arm's cells begin in the others."""
    warming = pool.submit(
        run_warmup, warmup_settings(settings.out / "warm-start", settings.out / "data")
    )
    futures: list[Future[CellResult]] = _submit(pool, FRESH, settings)
    results: list[CellResult] = []
    with reporter.bar("adapters", n_cells) as bar:
        manifest = warming.result()
        reporter.say(
            f"warm start ready after {manifest['cost']['elapsed_s']:.0f} s: general loss "
            f"{manifest['validation_loss_before']:.3f} -> {manifest['validation_loss_after']:.3f}"
        )
        futures += _submit(pool, WARM, settings)
        for future in as_completed(futures):
            results.append(future.result())
            bar.update(len(results))
    return results, manifest


def _submit(
    pool: ProcessPoolExecutor, arm: str, settings: DemoSettings
) -> list[Future[CellResult]]:
    """Submit an arm's cells, the longest first."""
    out = settings.out
    rates = recipe()["adapt"]["learning_rates"]
    return [
        pool.submit(
            run_cell,
            cell_of(
                arm,
                task,
                n,
                seed,
                rate_for(rates[task.files][arm], n),
                out / "data",
                out / "adapters",
                out / "warm-start",
                n_test=settings.n_test,
            ),
        )
        for n in sorted(settings.sizes, reverse=True)
        for task in TASKS
        for seed in range(settings.seeds)
    ]


def rate_for(rates: dict[int, float], n: int) -> float:
    """Return the tuned rate of the nearest size."""
    return rates[min(rates, key=lambda size: abs(np.log(size / n)))]


def table_of(results: Sequence[CellResult], arm: str, task: str, n: int, score: str) -> np.ndarray:
    """Return scores of one arm, shape (seeds, test rows)."""
    chosen = [r for r in results if (r.arm, r.task, r.n) == (arm, task, n)]
    return np.array([r.scores[score] for r in sorted(chosen, key=lambda r: r.seed)])


def _mean(results: Sequence[CellResult], arm: str, task: str, n: int, field: str) -> float:
    chosen = [r for r in results if (r.arm, r.task, r.n) == (arm, task, n)]
    return float(np.mean([getattr(r, field) for r in chosen]))


def _show(
    results: list[CellResult], manifest: dict[str, Any], settings: DemoSettings,
    console: Console, elapsed_s: float,
) -> None:  # fmt: skip
    verdicts: list[str] = []
    for task in TASKS:
        table = Table(title=f"{task.title}: {task.score_name}, mean of {settings.seeds} seeds")
        for column in (
            "n", "fresh", "warm start", "difference (95 % interval)", "forgetting fresh", "warm",
            "seconds fresh", "warm",
        ):  # fmt: skip
            table.add_column(column, justify="right")
        for n in sorted(settings.sizes):
            row, difference = _row(results, task, n)
            table.add_row(*row)
            verdicts.append(f"{task.title.lower()}, n = {n}: {_said(difference)}")
        console.print(table)
        _picture(results, task, settings)
    cost = manifest["cost"]
    console.print(
        "forgetting: change of loss on held-out text of the base's own kind, in nats per token, "
        "against the base with adapters off.\n"
        f"The warm-up took {cost['elapsed_s']:.0f} s and {cost['n_tokens']:,} tokens, once for all "
        f"tasks. Whole demo: {elapsed_s:.0f} s.",
        highlight=False,
    )
    console.print("What was seen, from a fresh adapter to the warm start:", style="bold")
    for verdict in verdicts:
        console.print(f"  {verdict}", highlight=False)
    console.print(
        f"Adapters: {settings.out / 'adapters'}; warm start: {settings.out / 'warm-start'}; "
        f"pictures: {', '.join(str(_png(task, settings)) for task in TASKS)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _row(results: list[CellResult], task: _Task, n: int) -> tuple[list[str], Difference]:
    fresh = table_of(results, FRESH, task.name, n, task.score)
    warm = table_of(results, WARM, task.name, n, task.score)
    difference = paired_difference(fresh, warm)
    low, mean, high = (100 * v for v in (difference.low, difference.mean, difference.high))
    forgotten = [_mean(results, arm, task.name, n, "general_loss_change") for arm in (FRESH, WARM)]
    seconds = [_mean(results, arm, task.name, n, "training_s") for arm in (FRESH, WARM)]
    return [
        str(n),
        f"{100 * fresh.mean():.1f}",
        f"{100 * warm.mean():.1f}",
        f"{mean:+.1f} ({low:+.1f} to {high:+.1f})",
        *(f"{value:+.2f}" for value in forgotten),
        *(f"{value:.1f}" for value in seconds),
    ], difference


def _said(d: Difference) -> str:
    interval = f"95 % interval {100 * d.low:+.1f} to {100 * d.high:+.1f}"
    if d.verdict == "no difference seen":
        return f"no difference seen ({100 * d.mean:+.1f} points, {interval})"
    return f"the warm start {d.verdict}: {100 * d.mean:+.1f} points ({interval})"


def _png(task: _Task, settings: DemoSettings) -> Path:
    return settings.out / f"{task.files}.png"


def _picture(results: list[CellResult], task: _Task, settings: DemoSettings) -> None:
    arms = {
        arm: [
            Point(n, 100 * float(scores.mean()), tuple(100 * scores.mean(axis=1)))
            for n in sorted(settings.sizes)
            for scores in (table_of(results, arm, task.name, n, task.score),)
        ]
        for arm in (FRESH, WARM)
    }
    score_over_n(arms, f"{task.title} on the embedded base", task.score_name, _png(task, settings))


def command(settings: DemoSettings) -> None:
    """Run `d2lora demo`."""
    demo(settings)
