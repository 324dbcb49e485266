"""Outputs and names of a hostile kind in pages, cards, tables and on the terminal: texts, no more.

    python tests/proof/pages.py > pages.md

A study is written by hand, with each hostile text in the place of its question, titles, arms,
metrics, warm-ups, files, failures, prompts, targets and outputs. Its page and summary have to have
the elements and attributes of a harmless study's, nothing else; a table no formula; the terminal no
control character. Where there is a Chromium, it opens the page with its content security policy.
"""

import argparse
import csv
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
from markdown_it import MarkdownIt

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from d2lora.runtime.console import quiet_libraries  # noqa: E402

quiet_libraries()
from texts import HOSTILE  # noqa: E402

import test_report  # noqa: E402
from d2lora.adapters.card import card  # noqa: E402
from d2lora.adapters.manifest import Manifest  # noqa: E402
from d2lora.cli import main as command_line  # noqa: E402
from d2lora.errors import printable  # noqa: E402
from d2lora.report.analysis import read_findings  # noqa: E402
from d2lora.report.html import as_is, environment, own_file  # noqa: E402
from d2lora.report.summary import show, show_answers  # noqa: E402
from d2lora.report.write import write_report  # noqa: E402
from d2lora.runtime.console import plain_console  # noqa: E402
from d2lora.runtime.grids import Grid  # noqa: E402
from d2lora.selection import datacard  # noqa: E402

HARMLESS = "plain"
_CONTROLS = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]"
)
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes; scripts with their text."""

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()
        self.found: list[Any] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.found.append((tag, tuple(sorted(name for name, _ in attrs))))

    def handle_endtag(self, tag: str) -> None:
        """Note its end."""
        self.found.append(tag)

    def handle_comment(self, data: str) -> None:
        """Note a comment; there is none in a page of ours."""
        self.found.append(("comment", data))


def elements(page: str) -> list[Any]:
    """Return the elements of a page; whether a cell is set as a number depends on its text."""
    parser = Elements()
    parser.feed(page)
    parser.close()
    return [
        (one[0], tuple(n for n in one[1] if n != "class")) if one[0] in ("td", "th") else one
        for one in parser.found
    ]


def study(folder: Path, text: str) -> Path:
    """Write a study in which a text stands wherever one can."""
    path = test_report.study(folder)
    own = json.loads((path / "study.json").read_text("utf-8"))
    arm = {"fresh": f"{text}", "warm": f"{text} 2"}

    def named(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "arm": arm.get(values["arm"], values["arm"])}

    plan = own["plan"]
    plan |= {"question": text, "base": text, "general_text": [text], "choices": [text]}
    plan["tasks"]["sums"] |= {"title": text, "data": [f"{text}.jsonl"], "test": [f"{text}.csv"]}
    plan["warm_ups"] = {text: {"data": [text]}}
    plan["arms"] = [
        {"kind": "fresh", "name": arm["fresh"]},
        {"kind": "warm", "name": arm["warm"], "warm_up": text},
    ]
    own["warm_ups"] = {text: own["warm_ups"]["general"]}
    own["chosen"] = [named(one) for one in own["chosen"]]
    own["failures"] = {text: text}
    own["provenance"]["versions"] |= {"d2lora": text, "odd": text}
    (path / "study.json").write_text(json.dumps(own), encoding="utf-8")
    for name in ("results.jsonl", "trials.jsonl"):
        rows = [json.loads(line) for line in (path / name).read_text("utf-8").splitlines()]
        rows = [named(row) for row in rows]
        for row in rows:
            if "scores" in row:
                row["scores"] = {text: row["scores"]["exact_match"]}
        (path / name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    held = text.encode("utf-8", "replace").decode()  # Parquet holds no half characters
    score = printable(text)
    for file in (folder / "store").rglob("records.parquet"):
        records = pd.read_parquet(file)
        records = records.assign(prompt=held, target=held, output=held)
        records.rename(columns={"exact_match": score}).to_parquet(file)
    return path


def faults(text: str, folder: Path, harmless: Sequence[list[Any]]) -> Iterator[str]:
    """Yield what is wrong with what is made of a hostile text."""
    path = study(folder, text)
    findings = read_findings(path)
    try:
        page = write_report(findings)
    except ValueError as error:
        yield f"no page: {error!s:.200}"
        return
    if elements(html := page.read_text("utf-8")) != harmless[0]:
        yield "the page has other elements"
    for name in ("chart-data", "example-data"):
        json.loads(html.partition(f'id="{name}">')[2].partition("</script>")[0])
    if elements(fit_page(text)) != elements(fit_page(HARMLESS)):
        yield "the page of a fit has other elements"
    yield from _tables(page.parent)
    summary = (page.parent / "summary.md").read_text("utf-8")
    for made, expected in zip((summary, *cards(text)), harmless[1:], strict=True):
        if markdown(made) != expected:
            yield f"the summary or a card has other markup: {made[:60]!r}"
        if found := _CONTROLS.search(made):
            yield f"the summary or a card holds {found[0]!a}"
    yield from _terminal(text, findings, path)


def _tables(report: Path) -> Iterator[str]:
    pd.read_parquet(report / "results.parquet")
    for row in csv.reader(io.StringIO((report / "results.csv").read_text("utf-8"))):
        for cell in row:
            if cell[:1] in tuple("=+-@\t\r") and not re.fullmatch(r"-?[\d.e+-]+", cell):
                yield f"a formula in results.csv: {cell[:40]!r}"


def _terminal(text: str, findings: Any, path: Path) -> Iterator[str]:
    out = io.StringIO()
    console = plain_console(file=out, force_terminal=True, width=400)
    show(findings, console)
    show_answers(findings, 2, console)
    with redirect_stdout(out), redirect_stderr(out):
        if "\0" not in text:
            command_line(["adapt", "--data", text, "--out", str(path / "out")])
            command_line(["inspect", "--adapter", text])
        settings = path / "settings.yaml"
        settings.write_text(json.dumps({text: text, "base": [text]}), encoding="utf-8")
        command_line(["adapt", str(settings)])
        rows = path / "rows.jsonl"
        rows.write_text(json.dumps({text: text, "prompt": [text]}) + "\n", encoding="utf-8")
        command_line(["inspect", "--data", str(rows)])
    shown = _COLOUR.sub("", out.getvalue())
    if found := _CONTROLS.search(shown):
        near = shown[max(0, found.start() - 30) : found.end() + 30]
        yield f"the terminal gets {found[0]!a}: {near!a}"


def markdown(text: str) -> list[Any]:
    """Return the elements of a Markdown text, HTML in it taken as such, as some viewers do."""
    whole = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return elements(MarkdownIt("commonmark", {"html": True}).enable("table").render(whole))


def cards(text: str) -> Iterator[str]:
    """Yield the card of an adapter, and that of a selected set."""
    row = {"file": text, "rows": 5, "sha256": text}
    values: dict[str, Any] = {
        "format_version": 1, "kind": "adapter", "objective": text, "chat_format": "auto",
        "base": {"id": text, "revision": text, "fingerprint": text, "quantization": text},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0, "targets": [text]}, "data": [row],
        "n_examples": 5, "selection": text, "settings": {"beta": 0.1}, "reference": text,
        "cost": {"n_steps": 1, "n_tokens": 2, "elapsed_s": 1.0}, "validation_loss_before": None,
        "validation_loss_after": None, "adapter_fingerprint": text, "provenance": {},
        "lineage": [{"path": text, "data": [row], "fingerprint": text}],
    }  # fmt: skip
    yield card(Manifest.model_validate(values))
    about = {
        "m": 1, "n_clean": 1, "n_pool": 1, "method": "random", "for_task": [text], "pool": [row],
        "tokens": {"prompt": [1] * 5, "answer": [1] * 5},
        "vendi_score": {"chosen": 1.0, "random": 1.0},
        "vendi_rows": 1, "distinct_grams": {"1": 1.0}, "similarity_to_task": None,
        "keep_out": [text],
        "rejected": {"duplicate": 0, "near_duplicate": 0, "contaminated": 0},
        "sources": {text: {"chosen": 1, "pool": 1}}, "prompts_with_several_answers": 0,
    }  # fmt: skip
    yield datacard.page(about, [datacard.Example((), text)])


def fit_page(text: str) -> str:
    """Return the page of a fit with a text wherever one can stand."""
    grid = Grid(text, (text, text), [(text, text)])
    made = {
        "versions": dict.fromkeys(("d2lora", "torch", "transformers", "peft"), text),
        "python": text,
        "platform": text,
    }
    return environment("d2lora.fitting").get_template("page.html.j2").render(
        title=text, style=as_is(own_file("style.css")), facts={text: text}, verdict=[text],
        cautions=[text],
        tables=[grid], examples=grid, commands=text, bill=text, settings=text, made=made,
    )  # fmt: skip


def opened(pages: Sequence[tuple[str, Path]], chromium: str) -> Iterator[str]:
    """Open pages in a browser; yield what they did beside showing texts."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for text, path in pages:
            page, seen = browser.new_page(), list[str]()
            page.on("console", lambda message, seen=seen: seen.append(message.text))
            page.on("pageerror", lambda error, seen=seen: seen.append(str(error)))
            page.on("dialog", lambda dialog, seen=seen: seen.append(dialog.message))
            page.on("request", lambda request, seen=seen: seen.append(request.url))
            page.goto(path.resolve().as_uri())
            page.wait_for_selector("html[data-drawn]", timeout=20_000)
            if seen != [path.resolve().as_uri()]:
                yield f"{text[:40]!a}: {seen[-1][:200]}"
            if page.evaluate("window.planted !== undefined"):
                yield f"{text[:40]!a}: its script ran"
            if page.locator("#list script, #list img, #list a, #list iframe, main iframe").count():
                yield f"{text[:40]!a}: elements of its own"
            page.close()
        browser.close()


def say(line: object) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Print the table, then what got through."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=len(HOSTILE), help="so many of the texts")
    given = parser.parse_args()
    texts, found, pages = HOSTILE[:: -(-len(HOSTILE) // given.texts)], list[str](), []
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        plain = study(top / "plain", HARMLESS)
        report = write_report(read_findings(plain)).parent
        harmless = [
            elements((report / "index.html").read_text("utf-8")),
            markdown((report / "summary.md").read_text("utf-8")),
            *map(markdown, cards(HARMLESS)),
        ]
        for number, text in enumerate(texts):
            folder = top / str(number)
            found += [f"{text[:40]!a}: {fault}" for fault in faults(text, folder, harmless)]
            page = folder / "study" / "report" / "index.html"
            pages += [(text, page)] if page.is_file() else []
        say("| what | tried | lost |\n|---|---|---|")
        say(f"| texts, in page, summary, table, cards and terminal | {len(texts)} | {len(found)} |")
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        if chromium is not None:
            seen = list(opened(pages, chromium))
            say(f"| pages in Chromium | {len(pages)} | {len(seen)} |")
            found += seen
        elif os.environ.get("CI"):
            found.append("CI installs Chromium")
    for one in found:
        say(f"\n- {one}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
