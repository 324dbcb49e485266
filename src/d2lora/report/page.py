"""The page: one HTML file without any external resources.

Every text is escaped by jinja2; data travel as JSON in which `<`, `>` and `&` are escaped. The
content security policy lets run only the scripts whose hashes it names.
"""

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

from d2lora.report import tables, words
from d2lora.report.canvas import DARK, LIGHT, Chart, Palette, scripts
from d2lora.report.examples import Examples
from d2lora.report.findings import Findings
from d2lora.report.html import as_is, environment, own_file
from d2lora.report.summary import cost_grid, pooled_grid

SECTIONS = {
    "verdict": "Findings",
    "score": "Score over n",
    "difference": "Paired differences",
    "curves": "Learning curves",
    "forgetting": "Score against forgetting",
    "tables": "Scores",
    "cost": "Cost",
    "tuning": "Learning rates and lengths",
    "failures": "Failures",
    "examples": "Examples",
    "provenance": "Provenance",
}


def page(
    findings: Findings,
    drawn: Mapping[str, list[Chart]],
    palette: Palette,
    examples: Examples,
    provenance: Mapping[str, Any],
) -> str:
    """Return the page as HTML.

    Args:
        findings: Findings of the study.
        drawn: The charts of every section.
        palette: Colours of the arms.
        examples: Outputs to browse.
        provenance: Provenance of the report itself.
    """
    plan = findings.plan
    specs = {chart.name: chart.spec for charts in drawn.values() for chart in charts}
    code = {"vega": _inline(scripts()), "page": _inline(own_file("page.js"))}
    return environment("d2lora.report").get_template("index.html.j2").render(
        csp=_policy(code.values()),
        style=as_is(own_file("style.css")),
        code={name: as_is(text) for name, text in code.items()},
        sections=SECTIONS,
        title=plan.question or f"Study {findings.path.resolve().name}",
        facts=_facts(findings),
        headline=words.headline(findings),
        pooled=findings.pooled_verdicts(),
        verdicts=words.task_verdicts(findings),
        cautions=words.cautions(findings),
        charts=drawn,
        palette=palette,
        specs={"charts": specs, "themes": {"light": LIGHT, "dark": DARK}},
        examples=examples,
        scores=[tables.score_table(findings, task) for task in plan.tasks],
        pooled_effects=pooled_grid(findings),
        cost=cost_grid(findings),
        efficiency=tables.efficiency_table(findings),
        tuning=tables.tuning_table(findings),
        failures=tables.failure_table(findings),
        warm_ups=tables.warm_up_table(findings),
        keep_out_words=plan.keep_out_words,
        contamination=tables.contamination_table(findings),
        versions=tables.version_table(findings.provenance),
        fingerprints=tables.fingerprint_table(plan),
        plan=plan.to_yaml(),
        made=provenance,
    )  # fmt: skip


def _facts(findings: Findings) -> dict[str, str]:
    plan = findings.plan
    sizes = ", ".join(f"{n:,}" for n in plan.sizes)
    return {
        "base": plan.base,
        "tasks": ", ".join(findings.title(task) for task in plan.tasks),
        "sizes n": sizes,
        "seeds": str(plan.seeds),
        "cells": f"{len(findings.cells):,}",
        "run": str(findings.provenance.get("date", "")).partition("T")[0],
    }


def _inline(script: str) -> str:
    """Return a script that can stand inside an element: nothing in it ends the element."""
    return script.replace("\r", "").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(codes: Any) -> str:
    digests = (hashlib.sha256(code.encode()).digest() for code in codes)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; "
        "form-action 'none'"
    )
