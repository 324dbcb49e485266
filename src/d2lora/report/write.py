"""The report of a study: `d2lora report STUDY`.

index.html        everything, in one page that opens offline
*.png             one image per chart
summary.md        findings and tables, for a pull request or a paper
results.csv       one row per cell: scores, forgetting, cost; the same in results.parquet
items.parquet     one row per cell and test row: its scores
done.json         the marker of completion
"""

from pathlib import Path

from d2lora.errors import RunError
from d2lora.report.analysis import read_findings
from d2lora.report.examples import read_examples
from d2lora.report.files import cell_table, csv_text, item_table, summary_text
from d2lora.report.findings import Findings
from d2lora.runtime.claims import claimed
from d2lora.runtime.console import Reporter
from d2lora.runtime.extras import need_extra
from d2lora.runtime.run_folder import (
    DONE,
    new_folder,
    provenance,
    read_json,
    write_json,
    write_text,
)
from d2lora.settings import ReportSettings

KIND = "report"
PAGE = "index.html"


def write_report(findings: Findings, out: Path | None = None) -> Path:
    """Write the report of a study.

    Args:
        findings: What the study found.
        out: Folder to write; an earlier report in it is replaced. None: `report` in the study.

    Returns:
        The page.

    Raises:
        RunError: If the folder holds something else than a report.
        SettingsError: If the plotting libraries are not installed.
    """
    need_extra("report", "the report")
    out = out or findings.path / "report"
    with claimed(out, "whole folder"):
        _check(out)
        _write(findings, out)
    return out / PAGE


def _write(findings: Findings, out: Path) -> None:
    # The plotting libraries are imported here, so that a study runs without them.
    from d2lora.report.canvas import Palette, png
    from d2lora.report.charts import charts
    from d2lora.report.page import page

    palette = Palette([arm.name for arm in findings.plan.arms])
    drawn = charts(findings, palette)
    examples = read_examples(findings)
    with new_folder(out) as folder:
        for chart in (chart for own in drawn.values() for chart in own):
            (folder / f"{chart.name}.png").write_bytes(png(chart))
        cells = cell_table(findings)
        write_text(folder / "results.csv", csv_text(cells))
        cells.to_parquet(folder / "results.parquet", index=False)
        item_table(findings).to_parquet(folder / "items.parquet", index=False)
        write_text(folder / "summary.md", summary_text(findings))
        write_text(folder / PAGE, page(findings, drawn, palette, examples, provenance()))
        write_json(folder / DONE, {"kind": KIND})


def command(settings: ReportSettings) -> None:
    """Run `d2lora report`."""
    path = write_report(read_findings(Path(settings.study)), settings.out)
    Reporter().say(f"report: {path}")


def _check(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    done = read_json(out / DONE) if (out / DONE).is_file() else None
    if done is None or done.get("kind") != KIND:
        raise RunError(f"{out} holds something that is not a report; choose another --out")
