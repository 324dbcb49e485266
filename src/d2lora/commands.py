"""The commands of `d2lora`: name, what it does, its settings and where it lives.

Nothing heavy is imported before a command is known.
"""

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from d2lora.settings import Settings, StudySettings


class Command(NamedTuple):
    """One command."""

    summary: str
    """What it does, for the help."""
    settings: str
    """Name of its settings in `d2lora.settings`."""
    home: str
    """Module and function that runs it."""

    @property
    def kind(self) -> "type[Settings]":
        """The class of its settings."""
        return getattr(import_module("d2lora.settings"), self.settings)

    def load(self) -> "Callable[[Settings], None]":
        """Import the function that runs it, with all that it needs."""
        module, name = self.home.split(":")
        return getattr(import_module(f"d2lora.{module}"), name)


COMMANDS = {
    "demo": Command(
        "the whole method in minutes, on SmolLM2 or offline", "DemoSettings", "demo:command"
    ),
    "warmup": Command("base + general data -> warm start", "WarmupSettings", "warmup:command"),
    "select": Command(
        "pool + task examples -> clean warm-up rows, with reasons",
        "SelectSettings",
        "selection.select:command",
    ),
    "adapt": Command(
        "base + task data + initialization -> adapter", "AdaptSettings", "adaptation:command"
    ),
    "fit": Command(
        "task rows + initializations -> the best adapter, and how sure that is",
        "FitSettings",
        "fitting.fit:command",
    ),
    "evaluate": Command(
        "base + adapters + task -> scores, records, forgetting",
        "EvaluateSettings",
        "evaluation.evaluate:command",
    ),
    "study": Command(
        "compare initializations over tasks, sizes and seeds", "StudySettings", "commands:study"
    ),
    "report": Command(
        "a study's report: findings, charts, tables, examples; PNG and CSV",
        "ReportSettings",
        "report.write:command",
    ),
    "inspect": Command(
        "what an adapter holds: spectrum, origin, base, advice",
        "InspectSettings",
        "tools.inspect:command",
    ),
    "convert": Command(
        "change an adapter's rank, strength, dtype or format, mix or merge adapters",
        "ConvertSettings",
        "tools.convert:command",
    ),
    "publish": Command(
        "upload an adapter, a warm start or a merged model to the hub",
        "PublishSettings",
        "tools.publish:command",
    ),
    "pairs": Command(
        "task rows with gold answers -> preference pairs, by sampling",
        "PairsSettings",
        "tools.pairs:command",
    ),
    "generate": Command(
        "try an adapter on a prompt or a file of prompts",
        "GenerateSettings",
        "evaluation.generate:command",
    ),
    "schema": Command(
        "JSON schema of a settings file or study plan, for editors",
        "SchemaSettings",
        "schema:command",
    ),
}


def study(settings: "StudySettings") -> None:
    """Run `d2lora study`: the study, then its summary and report."""
    from d2lora.report.analysis import read_findings
    from d2lora.report.summary import show
    from d2lora.report.write import write_report
    from d2lora.runtime.console import Reporter, table_console
    from d2lora.runtime.extras import need_extra
    from d2lora.study.run import dry_run, run_study

    if settings.dry_run:
        dry_run(settings)
        return
    if settings.report:
        need_extra("report", "the report (--no-report leaves it out)")
    done = run_study(settings)
    reporter = Reporter(quiet=settings.quiet)
    if done.results:
        findings = read_findings(done.path)
        show(findings, table_console())
        reporter.say(f"written to {done.path}")
        if settings.report:
            reporter.say(f"report: {write_report(findings)}")
    done.check()
