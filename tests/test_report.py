"""The report of a study: a hand-made study of known numbers, read as people and browsers do."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import pytest

from d2lora.cli import main
from d2lora.errors import RunError
from d2lora.report import canvas, examples
from d2lora.report.analysis import read_findings
from d2lora.report.canvas import BASE_COLOUR, COLOURS, Palette
from d2lora.report.charts import charts
from d2lora.report.summary import cost_grid
from d2lora.report.words import headline
from d2lora.report.write import write_report
from support import visible, write_rows

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PLANTED = "<script>document.title = 'planted'</script>"
N_ITEMS = 40
COST = {
    "n_steps": 8,
    "n_tokens": 900,
    "n_supervised_tokens": 300,
    "flops": 2_000_000_000_000,
    "elapsed_s": 1.5,
    "peak_memory_bytes": 500_000_000,
    "n_trainable_parameters": 1234,
}


def cell(arm: str, n: int, seed: int, right: int, general_loss: float | None) -> dict[str, Any]:
    """Answer the first `right` of the items."""
    return {
        "arm": arm,
        "kind": "base" if arm == "base" else arm,
        "key": f"{arm}-{n}-{seed}",
        "task": "sums",
        "n": n,
        "seed": seed,
        "scores": {"exact_match": [float(i < right) for i in range(N_ITEMS)]},
        "general_loss": general_loss,
        "choices_right": None,
        "learning_rate": None if arm == "base" else 0.01,
        "adapter": None,
        "n_output_tokens": 80,
        "evaluation_s": 0.5,
        **({} if arm == "base" else {"cost": COST}),
    }


def study(
    folder: Path, *, fresh: int = 10, warm: int = 30, seeds: int = 2, loss: float | None = 1.5,
    curves: bool = True, more: dict[str, int] | None = None,
) -> Path:  # fmt: skip
    """Write a finished study by hand: fresh, warm and `more` arms answer so many of 40 items."""
    right_of = {"fresh": fresh, "warm": warm, **(more or {})}
    base = [cell("base", 0, 0, 0, None if loss is None else 1.0)]
    cells = base + [
        cell(arm, n, seed, right, loss)
        for arm, right in right_of.items()
        for n in (16, 64)
        for seed in range(seeds)
    ]
    path = folder / "study"
    path.mkdir(parents=True)
    write_rows(path / "results.jsonl", cells)
    for row in cells:
        place = folder / "store" / row["key"]
        place.mkdir(parents=True)
        pd.DataFrame(
            {
                "prompt": [f"How much is {i} and one? {PLANTED}" for i in range(N_ITEMS)],
                "target": [f"#### {i + 1}" for i in range(N_ITEMS)],
                "output": [f"{row['arm']} says {i} {PLANTED}" for i in range(N_ITEMS)],
                **row["scores"],
            }
        ).to_parquet(place / "records.parquet")
    place = [{"task": "sums", "arm": arm, "n": 16} for arm in ("fresh", "warm")]
    ends = {"fresh": 1.0, "warm": 0.5}
    chosen = [
        {
            **p, "seed": seed, "learning_rate": 0.01, "step": 8, "doublings": 0,
            "at_edge": True, "at_end": False, "curve": [[0, 2.0], [8, ends[p["arm"]]]],
        }
        for p in place
        for seed in range(seeds)
        if curves
    ]  # fmt: skip
    trials = [{**one, "fold": 0, "validation_loss_after": one["curve"][-1][1]} for one in chosen]
    write_rows(path / "trials.jsonl", trials)
    plan = {
        "question": f"Does it help? {PLANTED}",
        "tasks": {"sums": {"data": ["a.jsonl"], "test": ["b.jsonl"], "title": f"Sums {PLANTED}"}},
        "sizes": [16, 64],
        "seeds": seeds,
        "arms": [{"kind": "fresh", "name": "fresh"}]
        + [{"kind": "warm", "name": name, "warm_up": "general"} for name in list(right_of)[1:]],
    }  # fmt: skip
    warm_up = {"cost": COST, "validation_loss_before": 2.0, "validation_loss_after": 1.25}
    reported = {
        "plan": plan,
        "n_cells": len(cells),
        "failures": {},
        "chosen": chosen,
        "warm_ups": {"general": warm_up},
        "store": str(folder / "store"),
        "provenance": {"date": "2026-11-24T12:00:00+00:00", "versions": {"d2lora": "0.1.0"}},
    }
    (path / "study.json").write_text(json.dumps(reported), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study in which warm answers 75 % and fresh 25 %."""
    path = study(tmp_path_factory.mktemp("known"))
    assert main(["report", str(path)]) == 0
    return path / "report"


def test_the_page_says_the_known_numbers(known: Path) -> None:
    text = visible((known / "index.html").read_text("utf-8"))
    assert "Compared with fresh, warm helps" in text
    assert "+50.0 points" in text
    assert ">75.0<" in text
    assert ">25.0<" in text
    assert "with 80 % power" in text
    assert "with 2 seeds" in text
    assert "with 40 test rows" in text
    assert "4 of 4 tuned learning rates are at the edge of the search" in text
    assert "learning rate (2)" in text
    assert "0.01 (2)" in text
    assert "Pooled over 1 task and 2 sizes: warm helps compared with fresh (+50.0 points" in text
    assert '<td class="num">0.67</td>' in text, "warm has fresh's lowest loss at 5.3 of 8 steps"
    assert "1.250" in text


def test_no_text_of_plan_or_model_can_become_markup(known: Path) -> None:
    page = (known / "index.html").read_text("utf-8")
    assert "<script>document" not in page
    assert page.count("<script") == page.count("</script>") == 4
    assert "&lt;script&gt;document" in page
    assert "\\u003cscript\\u003edocument" in page


def test_the_tables_hold_a_row_a_cell_and_a_row_an_item(known: Path) -> None:
    cells = pd.read_csv(known / "results.csv")
    assert len(cells) == len(pd.read_parquet(known / "results.parquet")) == 9
    assert cells.loc[cells.arm == "warm", "exact_match"].tolist() == [0.75] * 4
    items = pd.read_parquet(known / "items.parquet")
    assert len(items) == 9 * N_ITEMS
    assert items[items.arm == "fresh"].exact_match.mean() == 0.25


def test_every_chart_is_a_picture_too(known: Path) -> None:
    names = {path.stem for path in known.glob("*.png")}
    assert names == {"score-sums", "difference-sums", "curves-sums-16", "forgetting-sums"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in known.glob("*.png"))


def test_every_chart_is_valid_vega_lite(tmp_path: Path) -> None:
    findings = read_findings(study(tmp_path))
    drawn = charts(findings, Palette([arm.name for arm in findings.plan.arms]))
    assert all(drawn.values())
    for chart in (chart for section in drawn.values() for chart in section):
        alt.Chart.from_dict(chart.spec, validate=True)


def test_a_page_of_many_seeds_shows_the_outputs_of_the_first_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canvas, "MAX_DOTS", 3)
    monkeypatch.setattr(examples, "MAX_CELLS", 5)
    text = write_report(read_findings(study(tmp_path, seeds=3))).read_text("utf-8")
    assert "Of 13 cells the 5 of the first seeds are shown." in visible(text)


def test_many_arms_stand_in_rows_a_chart_for_each_n(tmp_path: Path) -> None:
    names = [f"start {number}" for number in range(8)]
    path = study(tmp_path, more={name: 8 + 2 * i for i, name in enumerate(names)})
    assert main(["report", str(path)]) == 0
    drawn = {file.stem for file in (path / "report").glob("*.png")}
    compared = {f"{kind}-sums-{n}" for kind in ("score", "difference") for n in (16, 64)}
    assert drawn == compared | {"curves-sums-16", "forgetting-sums"}
    page = (path / "report" / "index.html").read_text("utf-8")
    data = page.partition('id="chart-data">')[2].partition("</script>")[0]
    shown = json.loads(data)["charts"]
    for name in compared:
        axes = [
            layer["encoding"]["y"] for layer in shown[name]["layer"] if "y" in layer["encoding"]
        ]
        rows = next(axis["sort"] for axis in axes if axis.get("sort"))
        ends = [f"start {i} - fresh" if "diff" in name else f"start {i}" for i in range(8)]
        assert [row for row in rows if row.startswith("start")] == ends


def test_the_summary_is_markdown_with_verdict_and_tables(known: Path) -> None:
    text = (known / "summary.md").read_text("utf-8")
    assert "+50.0 points" in text
    assert "| n | arm |" in text


@pytest.mark.parametrize(("fresh", "warm"), [(N_ITEMS, N_ITEMS), (0, 0)])
def test_arms_that_answer_alike_are_not_made_to_differ(
    tmp_path: Path, fresh: int, warm: int
) -> None:
    two = study(tmp_path / "two", fresh=fresh, warm=warm, loss=None, curves=False)
    assert headline(read_findings(two)) == [
        "Compared with fresh, warm shows no significant difference in any of 2 comparisons."
    ]
    path = study(tmp_path, fresh=fresh, warm=warm, seeds=1, loss=None, curves=False)
    text = visible(write_report(read_findings(path)).read_text("utf-8"))
    assert "warm was run with one seed, which allows no verdict" in text
    assert "cannot be estimated" in text
    assert "Forgetting was not measured" in text
    assert "There are no learning curves" in text
    assert "No cell failed." in text
    assert not re.search(r"\b(nan|None|inf)\b", text.split("The plan, with all defaults")[0])


def test_an_arm_that_loses_is_said_to_hurt(tmp_path: Path) -> None:
    findings = read_findings(study(tmp_path, fresh=30, warm=10))
    assert "warm hurts" in headline(findings)[0]


def test_seeds_without_a_difference_are_not_said_to_disagree(tmp_path: Path) -> None:
    path = study(tmp_path, fresh=10, warm=30, seeds=3)
    cells = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    for row in cells:
        if row["arm"] == "warm" and row["seed"] == 2:
            row["scores"] = cells[1]["scores"]  # fresh, seed 0: 10 of 40
    write_rows(path / "results.jsonl", cells)
    findings = read_findings(path)
    assert all(c.seeds == "of 3 seeds 2 above zero, 1 equal" for c in findings.comparisons)
    assert findings.verdicts()[1].endswith("; of 3 seeds 2 above zero, 1 equal)")
    assert "of 3 seeds 2 above zero, 1 equal" in visible(write_report(findings).read_text("utf-8"))


def curve_of(path: Path, arm: str, curve: list[list[float]]) -> None:
    """Give an arm this curve of trials, in a study that is written already."""
    study = json.loads((path / "study.json").read_text())
    for one in study["chosen"]:
        if one["arm"] == arm:
            one["curve"] = curve
    (path / "study.json").write_text(json.dumps(study))


OVERFITS: list[list[float]] = [[0, 3.0], [2, 1.0], [8, 2.5]]


@pytest.mark.parametrize("curve", [OVERFITS, [[0, 3.0], [4, 1.2], [6, 1.3], [8, 1.1]]])
def test_an_arm_that_learns_as_the_reference_does_saves_nothing(
    tmp_path: Path, curve: list[list[float]]
) -> None:
    path = study(tmp_path)
    curve_of(path, "fresh", curve)
    curve_of(path, "warm", curve)
    findings = read_findings(path)
    cost = next(c for c in findings.costs if c.arm == "warm" and c.n == 16)
    assert cost.flops_saved_per_task == 0
    assert cost.break_even_tasks == math.inf
    assert [c.ratio for c in findings.convergence] == [1.0]


def test_a_cost_in_operations_that_is_not_known_is_called_so(tmp_path: Path) -> None:
    path = study(tmp_path)
    for name in path.glob("**/*.json*"):
        name.write_text(name.read_text().replace(f'"flops": {COST["flops"]}', '"flops": null'))
    findings = read_findings(path)
    assert all(math.isnan(cost.flops_per_task) for cost in findings.costs)
    cost_rows = cost_grid(findings).rows
    assert {row[2] for row in cost_rows} == {"not known"}
    assert "not known" in {row[-1] for row in cost_rows}


def test_a_saving_is_against_when_the_reference_itself_had_its_lowest_loss(tmp_path: Path) -> None:
    path = study(tmp_path)
    curve_of(path, "fresh", [[0, 3.0], [4, 1.0], [8, 2.5]])
    curve_of(path, "warm", [[0, 2.0], [1, 1.0], [8, 0.5]])
    findings = read_findings(path)
    cost = next(c for c in findings.costs if c.arm == "warm" and c.n == 16)
    per_step = COST["flops"] / COST["n_steps"]
    assert cost.flops_saved_per_task == pytest.approx(3 * per_step)
    assert cost.break_even_tasks == pytest.approx(COST["flops"] / (3 * per_step))
    curve_of(path, "warm", [[0, 2.0], [8, 1.5]])
    findings = read_findings(path)
    cost = next(c for c in findings.costs if c.arm == "warm" and c.n == 16)
    assert cost.flops_saved_per_task == pytest.approx(-4 * per_step), "it never gets there"


def test_ratios_of_steps_are_averaged_and_not_the_steps(tmp_path: Path) -> None:
    path = study(tmp_path)
    reported = json.loads((path / "study.json").read_text())
    ends = {("fresh", 0): 2, ("fresh", 1): 8, ("warm", 0): 1, ("warm", 1): 8}
    for one in reported["chosen"]:
        one["curve"] = [[0, 2.0], [ends[one["arm"], one["seed"]], 1.0]]
    (path / "study.json").write_text(json.dumps(reported))
    (found,) = read_findings(path).convergence
    assert found.ratio == pytest.approx((1 / 2 + 8 / 8) / 2)


def test_outputs_that_are_gone_are_reported_as_gone(tmp_path: Path) -> None:
    path = study(tmp_path)
    first, *others = (tmp_path / "store").iterdir()
    for folder in others:
        shutil.rmtree(folder)
    (first / "records.parquet").write_bytes(b"PAR1")  # cut off
    text = visible(write_report(read_findings(path)).read_text("utf-8"))
    assert "The outputs of 9 of 9 cells are not in the study&#39;s store" in text


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = study(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not a report"):
        write_report(read_findings(path), other)
    assert (other / "thesis.txt").read_text() == "mine"
    write_report(read_findings(path))
    write_report(read_findings(path))  # a report is replaced


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.jsonl", None, "results.jsonl: missing or cut off"),
        ("results.jsonl", '{"arm": "fre', "results.jsonl: missing or cut off"),
        ("trials.jsonl", None, "trials.jsonl: missing or cut off"),
        ("study.json", '{"plan": {}}', "study.json: it lacks chosen, failures, provenance"),
    ],
)
def test_a_damaged_study_says_which_file_and_what_to_do(
    tmp_path: Path, known: Path, name: str, text: str | None, message: str
) -> None:
    study = shutil.copytree(known.parent, tmp_path / "study")
    (study / name).unlink()
    if text is not None:
        (study / name).write_text(text)
    with pytest.raises(RunError, match=f"{message}.*run d2lora study again"):
        read_findings(study)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    lights = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * lights[0] + 0.7152 * lights[1] + 0.0722 * lights[2]


@pytest.mark.parametrize("colour", [*COLOURS, BASE_COLOUR])
@pytest.mark.parametrize("page", ["#ffffff", "#12161b"])
def test_arms_stand_out_from_light_and_dark_pages(colour: str, page: str) -> None:
    """WCAG 2.2, 1.4.11: graphics have a contrast of 3 to 1."""
    assert contrast(colour, page) >= 3


needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="needs Chromium on the path"
)
SCHEMES = (("light", 1200), ("dark", 360))
# Of every text that is shown, in the page and in its pictures: its colour, what is behind it, and
# whether it is large (WCAG 2.2: 24 px, or 18.66 px and bold).
TEXTS = """
() => {
  const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c.slice(0, 3);
      if (c[3] !== 0) throw new Error(`half transparent: ${e.outerHTML.slice(0, 80)}`);
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    const style = getComputedStyle(e);
    const size = parseFloat(style.fontSize);
    const colour = rgb(e.closest("svg") ? style.fill : style.color);
    const opacity = (colour[3] ?? 1) * style.opacity;
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    found.push([e.textContent.trim().slice(0, 40), colour.slice(0, 3), opacity, behind(e), large]);
  }
  return found;
}
"""


def hexadecimal(colour: list[float]) -> str:
    return "#" + "".join(f"{round(part):02x}" for part in colour)


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@needs_chromium
def test_every_text_stands_out_and_the_page_is_accessible(known: Path) -> None:
    """WCAG 2.2 AA: a contrast of 4.5 to 1 (3 to 1 where large), and the rules of axe-core."""
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "CI installs Chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme, width in SCHEMES:
            page = browser.new_page(
                viewport={"width": width, "height": 800},
                color_scheme=scheme,  # pyright: ignore[reportArgumentType]
            )
            page.goto((known / "index.html").resolve().as_uri())
            page.wait_for_selector("html[data-drawn]")
            page.locator("details").evaluate_all("all => all.forEach((one) => (one.open = true))")
            texts = page.evaluate(TEXTS)
            assert len(texts) > 200
            too_faint = [
                (scheme, text, hexadecimal(colour), hexadecimal(behind), opacity)
                for text, colour, opacity, behind, large in texts
                if opacity < 1
                or contrast(hexadecimal(colour), hexadecimal(behind)) < (3 if large else 4.5)
            ]
            assert too_faint == []
            found = Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
            page.close()
        browser.close()


@needs_chromium
def test_a_browser_opens_searches_and_filters_the_page(known: Path) -> None:
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "CI installs Chromium"
    url = (known / "index.html").resolve().as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme, width in SCHEMES:
            page = browser.new_page(
                viewport={"width": width, "height": 800},
                color_scheme=scheme,  # pyright: ignore[reportArgumentType]
            )
            printed: list[str] = []
            asked: list[str] = []
            page.on("console", lambda message, printed=printed: printed.append(message.text))
            page.on("pageerror", lambda error, printed=printed: printed.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(url)
            page.wait_for_selector("html[data-drawn]")
            assert page.locator(".chart svg").count() == 4
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert page.locator("#count").text_content() == "40 of 40 rows, 10 shown"
            page.select_option("[name=filter]", "b")
            assert page.locator("#count").text_content() == "20 of 40 rows, 10 shown"
            page.fill("[name=search]", "How much is 17")
            assert page.locator("#count").text_content() == "2 of 40 rows"  # target of 16
            assert PLANTED in (page.locator(".example").first.text_content() or "")
            assert page.locator(".example script").count() == 0
            assert "planted" not in page.title().replace(PLANTED, "")
            assert printed == []
            assert asked == [url]
            page.close()
        browser.close()


def test_an_arm_that_stops_early_without_getting_there_has_saved_nothing(tmp_path: Path) -> None:
    path = study(tmp_path)
    curve_of(path, "fresh", [[0, 3.0], [100, 1.0]])
    curve_of(path, "warm", [[0, 2.0], [5, 1.5]])
    cost = next(c for c in read_findings(path).costs if c.arm == "warm" and c.n == 16)
    assert cost.flops_saved_per_task == 0
    assert cost.break_even_tasks == math.inf


def test_points_of_a_curve_that_are_not_numbers_are_left_out(tmp_path: Path) -> None:
    path = study(tmp_path)
    curve_of(path, "fresh", [[0, math.nan], [4, 1.0], [8, math.inf]])
    curve_of(path, "warm", [[0, 2.0], [2, 1.0], [8, math.nan]])
    findings = read_findings(path)
    cost = next(c for c in findings.costs if c.arm == "warm" and c.n == 16)
    assert cost.flops_saved_per_task == pytest.approx(2 * COST["flops"] / COST["n_steps"])
    assert [c.ratio for c in findings.convergence] == [0.5]
