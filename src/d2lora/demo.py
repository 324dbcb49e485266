"""The whole method on the embedded base: warm up once, adapt to two scarce tasks, compare.

It is the study `plans/quick.yaml`; every number printed is measured in the run.
"""

import shutil
import time
from pathlib import Path

from rich.console import Console

from d2lora.errors import RunError, counted
from d2lora.report.analysis import read_findings
from d2lora.report.findings import Findings
from d2lora.report.summary import show
from d2lora.report.write import write_report
from d2lora.runtime.claims import claimed, target_of
from d2lora.runtime.console import WIDTH, Reporter
from d2lora.runtime.run_folder import provenance, write_json
from d2lora.settings import DemoSettings, StudySettings
from d2lora.study.run import run_study

MARKER = "demo.json"


def demo(settings: DemoSettings) -> Findings:
    """Run the demo: warm-up, both tasks at every n and seed with both arms, tables, report.

    Raises:
        RunError: If `out` holds something that is not a demo.
    """
    with claimed(settings.out, "folder"):
        return _demo(settings, target_of(settings.out))


def _demo(settings: DemoSettings, out: Path) -> Findings:
    started, reporter = time.perf_counter(), Reporter()
    _clear(out)
    write_json(out / MARKER, provenance())
    reporter.say(
        "d2lora demo: one warm-up on general data, then every task from it and from fresh LoRA "
        f"at n = {', '.join(map(str, settings.sizes))}, {counted(settings.seeds, 'seed')} each; "
        f"written to {out}"
    )
    study = run_study(
        StudySettings(
            plan=("quick",),
            out=out / "study",
            store=out / "store",
            set=(
                f"sizes={list(settings.sizes)}",
                f"seeds={settings.seeds}",
                *(f"tasks.{task}.n_test={settings.n_test}" for task in ("problems", "titles")),
            ),
            workers=settings.workers,
        )
    )
    study.check()
    findings = read_findings(study.path)
    console = Console(width=WIDTH)
    show(findings, console)
    page = write_report(findings)
    console.print(f"Whole demo: {time.perf_counter() - started:.0f} s.", highlight=False)
    console.print(f"Report: {page}", highlight=False, markup=False)
    return findings


def _clear(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise RunError(f"{out} holds something that is not a demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)


def command(settings: DemoSettings) -> None:
    """Run `d2lora demo`."""
    demo(settings)
