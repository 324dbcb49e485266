"""Meta warm-up: small tasks of one source each, and weights that move towards where they end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from d2lora import WarmupSettings, warm_up
from d2lora.embedded import general_rows
from d2lora.errors import DataError, SettingsError
from d2lora.training.episodes import EpisodeSchedule
from d2lora.training.schedule import StepSchedule
from support import dies_at_step, write_rows

SOURCES = ["a"] * 6 + ["b"] * 5 + ["alone"]


def episodes(max_steps: int = 12, **values: Any) -> EpisodeSchedule:
    given: dict[str, Any] = {"meta_steps": 4, "meta_rows": 4, "batch_size": 2, **values}
    settings = WarmupSettings(data=("x",), out=Path("x"), max_steps=max_steps, **given)
    plain = StepSchedule.of(len(SOURCES), settings, 7)
    return EpisodeSchedule.of_sources(plain, SOURCES, settings)


def test_an_episode_shows_a_few_rows_of_one_source() -> None:
    schedule = episodes(max_steps=80)
    seen: set[str] = set()
    for episode in range(20):
        rows = {row for step in range(4) for row in schedule.batch(4 * episode + step)}
        (source,) = {SOURCES[row] for row in rows}
        assert len(rows) == 4
        seen.add(source)
    assert seen == {"a", "b"}


def test_the_last_episode_is_whole() -> None:
    assert episodes(max_steps=9).n_steps == 12
    assert episodes().until(17, [1] * 12).n_steps == 12


def test_each_episode_has_the_learning_rates_of_a_run_of_its_own() -> None:
    schedule = episodes()
    settings = WarmupSettings(data=("x",), out=Path("x"))
    own = StepSchedule.of(4, settings.changed(max_steps=4), 0)
    rates = [own.learning_rate(step, settings) for step in range(4)]
    assert [schedule.learning_rate(step, settings) for step in range(12)] == rates * 3


def test_the_way_that_weights_move_gets_shorter() -> None:
    schedule = episodes(meta_rate=0.9)
    moves = [schedule.moves_after(step) for step in range(1, 13)]
    assert [move for move in moves if move is not None] == pytest.approx([0.9, 0.6, 0.3])
    assert [step for step, move in enumerate(moves, 1) if move is not None] == [4, 8, 12]


def made(base: str, data: str, out: Path, **values: Any) -> dict[str, Tensor]:
    given: dict[str, Any] = {
        "meta_steps": 3, "meta_rows": 4, "max_steps": 3, "batch_size": 2, "learning_rate": 0.01,
        "validation_fraction": 0.0, **values,
    }  # fmt: skip
    warm_up(WarmupSettings(base=base, data=(data,), out=out, rank=4, quiet=True, **given))
    return load_file(out / "adapter_model.safetensors")


@pytest.fixture
def sourced(tmp_path: Path) -> str:
    rows = [{**row, "source": f"s{n % 3}"} for n, row in enumerate(general_rows("train", 24))]
    return write_rows(tmp_path / "general.jsonl", rows)


def test_weights_move_a_share_of_the_way_to_where_an_episode_ends(
    tmp_path: Path, tiny_base: str, sourced: str
) -> None:
    before = made(tiny_base, sourced, tmp_path / "before", max_steps=0)
    whole = made(tiny_base, sourced, tmp_path / "whole")
    half = made(tiny_base, sourced, tmp_path / "half", meta_rate=0.5)
    assert any(not torch.equal(before[name], whole[name]) for name in whole)
    for name, weights in half.items():
        torch.testing.assert_close(weights, (before[name] + whole[name]) / 2)


def test_a_killed_meta_warm_up_resumes_to_the_same_weights(
    tmp_path: Path, tiny_base: str, sourced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(tiny_base, sourced, tmp_path / "whole", max_steps=9)
    with monkeypatch.context() as patch:
        killed = dies_at_step(patch, 8)
        with pytest.raises(killed):
            made(tiny_base, sourced, tmp_path / "out", max_steps=9, checkpoint_every=2)
    again = made(tiny_base, sourced, tmp_path / "out", max_steps=9, checkpoint_every=2, resume=True)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_rows_without_two_of_a_source_are_refused(tmp_path: Path, tiny_base: str) -> None:
    rows = [{**row, "source": str(n)} for n, row in enumerate(general_rows("train", 6))]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="none of 6 sources has two rows"):
        made(tiny_base, data, tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"meta_rate": 0.5}, "meta_rate is a setting of a meta warm-up"),
        ({"meta_steps": 4, "stop_step": 2}, "within a task"),
    ],
)
def test_settings_that_contradict_a_meta_warm_up_are_refused(
    values: dict[str, Any], text: str
) -> None:
    with pytest.raises(SettingsError, match=text):
        WarmupSettings(data=("x",), out=Path("x"), **values)
