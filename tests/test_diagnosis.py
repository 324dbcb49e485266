"""Each warning comes in a case that must raise it, and stays away in one that must not."""

from pathlib import Path
from typing import Any

import pytest

from d2lora import AdaptSettings, InspectSettings, WarmupSettings, adapt, inspect, warm_up
from d2lora.adapters.manifest import Manifest
from d2lora.cli import main
from d2lora.embedded import general_rows
from d2lora.training.diagnosis import Start, overfitting, too_short
from support import read_rows, write_rows


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((2.0, 1.5, 4, 1.9, 12, True), "so the weights of that step are kept"),
        ((2.0, 1.5, 4, 1.9, 12, False), "leave out --no-keep-best"),
        ((2.0, 1.5, 12, 1.5, 12, True), None),
        ((2.0, 1.5, 8, 1.51, 12, True), None),
        ((2.0, 2.1, 4, 2.3, 12, True), "did not lower"),
        ((2.0, 1.5, 4, 2.3, 12, True), "overfits"),
        ((2.0, 1.5, 4, 2.3, 12, False), "did not lower"),
        ((None, float("inf"), None, None, 12, True), None),
    ],
)
def test_overfitting_is_a_rise_of_the_held_out_loss(losses: Any, expected: str | None) -> None:
    *losses, kept = losses
    found = overfitting(*losses, kept=kept)
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


def test_a_warm_up_on_few_rows_for_many_epochs_is_warned_of_overfitting(
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
    assert sum("overfits its data" in text for text in start.manifest.warnings) == 1
    assert "warning: the warm-up overfits its data" in capsys.readouterr().err
    assert start.manifest.kept_step is not None
    assert start.manifest.kept_step < start.manifest.cost["n_steps"]
    sound = warm_up(
        warm(tmp_path, tiny_base, general, learning_rate=2e-3, epochs=7, out=tmp_path / "sound")
    )
    assert sound.manifest.warnings == []


@pytest.mark.parametrize(("n_steps", "warned"), [(0, False), (1, True), (49, True), (50, False)])
def test_a_run_of_fewer_than_fifty_steps_is_called_short(n_steps: int, *, warned: bool) -> None:
    assert (too_short(n_steps) is not None) is warned


def test_a_short_run_warns_before_it_trains_and_in_its_manifest(
    tmp_path: Path, tiny_base: str, titles: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = AdaptSettings(
        base=tiny_base,
        data=(titles,),
        out=tmp_path / "a",
        epochs=1,
        rank=4,
        validation_fraction=0.2,
    )
    (reported,) = adapt(settings).manifest.warnings
    assert reported.startswith("only 8 optimizer steps, too few to train an adapter: give --max-")
    printed = capsys.readouterr().err
    assert printed.index(f"warning: {reported}") < printed.index("step 8:")


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
    reported = capsys.readouterr().err
    assert "before training, on 20 task rows" in reported
    assert "the warm start is worse than the base" in reported
    measured = adapter.manifest.before_training
    assert measured is not None
    assert measured["loss_warm_start"] > measured["loss_base"]
    first = read_rows(tmp_path / "a" / "metrics.jsonl")[0]
    assert first["loss_warm_start"] == measured["loss_warm_start"]
    advice = inspect(InspectSettings(adapter=str(adapter.path))).advice
    assert sum("worse than the base" in text for text in advice) == 1
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
        base=tiny_base, data=(titles,), init=str(good.path), max_steps=50, out=tmp_path / "a"
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
        base=tiny_base, data=(titles,), max_steps=50, out=tmp_path / "a", quiet=True
    )
    adapter = adapt(settings)
    assert adapter.manifest.before_training is None
    assert Manifest.read(adapter.path).warnings == []
