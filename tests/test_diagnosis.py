"""Each warning comes in a case that must raise it, and stays away in one that must not."""

from pathlib import Path
from typing import Any

import pytest

from d2lora import AdaptSettings, InspectSettings, WarmupSettings, adapt, inspect, warm_up
from d2lora.artifacts import Manifest
from d2lora.cli import main
from d2lora.diagnosis import Start, overfitting
from d2lora.embedded import general_rows
from support import read_rows, write_rows


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((2.0, 1.5, 4, 1.9, 12), "overfits"),
        ((2.0, 1.5, 12, 1.5, 12), None),
        ((2.0, 1.5, 8, 1.51, 12), None),
        ((2.0, 2.1, 4, 2.3, 12), "did not lower"),
        ((None, float("inf"), None, None, 12), None),
    ],
)
def test_overfitting_is_a_rise_of_the_held_out_loss(losses: Any, expected: str | None) -> None:
    found = overfitting(*losses)
    assert (found is None) == (expected is None)
    assert expected is None or (found is not None and expected in found)


@pytest.mark.parametrize(
    ("start", "warned"),
    [
        (Start(2.0, 2.5, 0.3, 0.7, 16), True),
        (Start(2.0, 2.1, -0.1, 0.3, 16), False),
        (Start(2.0, 1.5, -0.7, -0.3, 16), False),
        (Start(2.0, 2.5, 0.3, 0.7, 2), False),
    ],
)
def test_a_bad_warm_start_is_one_that_rows_show_to_be_worse(start: Start, warned: bool) -> None:
    assert (start.warning is not None) is warned


def warm(folder: Path, base: str, data: str, **values: Any) -> WarmupSettings:
    own: dict[str, Any] = {"rank": 8, "batch_size": 8, "quiet": True, "out": folder / "warm"}
    return WarmupSettings(**{**own, "base": base, "data": (data,), **values})


def test_a_warm_up_on_few_rows_for_many_epochs_is_told_to_overfit(
    tmp_path: Path, tiny_base: str, general: str, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_rows(tmp_path / "few.jsonl", general_rows("train", 8))
    other = write_rows(tmp_path / "other.jsonl", general_rows("test", 8))
    start = warm_up(
        warm(
            tmp_path, "embedded", few, validation_data=(other,), epochs=20, eval_every=4,
            learning_rate=1e-2, schedule="constant", quiet=False,
        )
    )  # fmt: skip
    assert len(start.manifest.warnings) == 1
    assert "warning: the warm-up overfits its data" in capsys.readouterr().err
    sound = warm_up(
        warm(tmp_path, tiny_base, general, learning_rate=3e-3, epochs=3, out=tmp_path / "sound")
    )
    assert sound.manifest.warnings == []


@pytest.fixture
def shuffled(tmp_path: Path, titles: str) -> str:
    """Rows that teach what is wrong for the task: each text with the words of its title undone."""
    rows = read_rows(Path(titles))
    return write_rows(tmp_path / "bad.jsonl", [{**row, "title": "zq 9 " * 8} for row in rows])


def test_adapt_and_inspect_warn_of_a_warm_start_that_hurts(
    tmp_path: Path, titles: str, shuffled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = warm_up(
        warm(tmp_path, "embedded", shuffled, max_steps=8, learning_rate=1e-2, out=tmp_path / "bad")
    )
    settings = AdaptSettings(
        data=(titles,), init=str(bad.path), max_steps=1, n=20, out=tmp_path / "a"
    )
    adapter = adapt(settings)
    told = capsys.readouterr().err
    assert "before training, on 20 task rows" in told
    assert "the warm start is worse than the base" in told
    measured = adapter.manifest.before_training
    assert measured is not None
    assert measured["loss_warm_start"] > measured["loss_base"]
    first = read_rows(tmp_path / "a" / "metrics.jsonl")[0]
    assert first["loss_warm_start"] == measured["loss_warm_start"]
    assert "worse than the base" in inspect(InspectSettings(adapter=str(adapter.path))).advice[-1]
    found = inspect(InspectSettings(adapter=str(bad.path), base="embedded", data=(titles,)))
    assert found.start is not None
    assert "worse than the base" in found.advice[-1]


def test_adapt_and_inspect_are_content_with_a_warm_start_that_helps(
    tmp_path: Path, tiny_base: str, titles: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = warm_up(
        warm(tmp_path, tiny_base, titles, epochs=5, learning_rate=5e-3, out=tmp_path / "good")
    )
    settings = AdaptSettings(
        base=tiny_base, data=(titles,), init=str(good.path), max_steps=1, out=tmp_path / "a"
    )
    adapter = adapt(settings)
    assert "warning" not in capsys.readouterr().err
    assert adapter.manifest.warnings == []
    measured = adapter.manifest.before_training
    assert measured is not None
    assert measured["n_rows"] == 32
    assert measured["loss_warm_start"] < measured["loss_base"]
    line = ["inspect", "--adapter", str(good.path), "--base", tiny_base, "--data", titles]
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "before training, on 32 task rows" in shown
    assert "worse than the base" not in shown


def test_a_fresh_adapter_costs_no_look_at_the_task(
    tmp_path: Path, tiny_base: str, titles: str
) -> None:
    settings = AdaptSettings(
        base=tiny_base, data=(titles,), max_steps=1, out=tmp_path / "a", quiet=True
    )
    adapter = adapt(settings)
    assert adapter.manifest.before_training is None
    assert Manifest.read(adapter.path).warnings == []
