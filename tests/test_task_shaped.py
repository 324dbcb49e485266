"""Task-shaped warm-up: rows of a source before the prompts of others, as worked examples."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import equal

from d2lora import WarmupSettings, warm_up
from d2lora.adapters.base import load_tokenizer
from d2lora.data.encode import Encoder
from d2lora.errors import DataError
from d2lora.runtime.console import Reporter
from d2lora.settings import BaseSettings
from d2lora.training.rows import Rows, prepare_rows
from support import dies_at_step, write_rows

N_ROWS = 24


@pytest.fixture
def encoder(tiny_base: str) -> Encoder:
    return Encoder(load_tokenizer(BaseSettings(base=tiny_base)), "plain", n_positions=256)


@pytest.fixture
def sourced(tmp_path: Path) -> str:
    """Rows of three sources; their answers are their numbers."""
    rows = [
        {"prompt": f"s{n % 3} asks {n}", "completion": f"answer {n}", "source": f"s{n % 3}"}
        for n in range(N_ROWS)
    ]
    return write_rows(tmp_path / "rows.jsonl", rows)


def prepared(encoder: Encoder, data: str, **values: Any) -> Rows:
    given: dict[str, Any] = {"shots": 3, "validation_fraction": 0.25, **values}
    settings = WarmupSettings(data=(data,), out=Path("unused"), **given)
    return prepare_rows(settings, None, encoder, Reporter(quiet=True))


def texts(encoder: Encoder, items: Any) -> list[tuple[str, str]]:
    """Return what is shown and what is learnt of each row."""
    decode = encoder.tokenizer.decode
    return [
        (
            str(decode(item.ids[: item.n_prompt])),
            str(decode(item.ids[item.n_prompt :], skip_special_tokens=True)).strip(),
        )
        for item in items
    ]


def test_rows_of_its_source_stand_before_a_prompt(encoder: Encoder, sourced: str) -> None:
    rows = prepared(encoder, sourced)
    shown = [len(prompt.split("asks")) - 2 for prompt, _ in texts(encoder, rows.train)]
    assert set(shown) == {0, 1, 2, 3}
    for prompt, answer in texts(encoder, rows.train):
        number = int(answer.removeprefix("answer "))
        assert prompt.count(f"asks {number}\n") == 1, "asked once, at the end"
        assert f"answer {number}\n" not in prompt
        others = {word for word in prompt.split() if word in {"s0", "s1", "s2"}}
        assert others == {f"s{number % 3}"}


def test_one_answer_of_a_row_is_learnt_the_shown_ones_are_not(
    encoder: Encoder, sourced: str
) -> None:
    plain = prepared(encoder, sourced, shots=0)
    shaped = prepared(encoder, sourced)
    learnt = [item.ids[item.n_prompt :] for item in plain.train]
    assert [item.ids[item.n_prompt :] for item in shaped.train] == learnt
    assert any(a.n_prompt < b.n_prompt for a, b in zip(plain.train, shaped.train, strict=True))


def test_rows_held_out_are_never_shown(encoder: Encoder, sourced: str) -> None:
    rows = prepared(encoder, sourced)
    held_out = {answer for _, answer in texts(encoder, rows.valid)}
    assert len(held_out) == N_ROWS // 4
    for part in (rows.train, rows.valid):
        for prompt, _ in texts(encoder, part):
            assert not any(f"{answer}\n" in prompt for answer in held_out)
    assert any("answer" in prompt for prompt, _ in texts(encoder, rows.valid))


def test_fewer_are_shown_where_the_length_has_no_room(encoder: Encoder, sourced: str) -> None:
    whole = prepared(encoder, sourced, shots=8)
    longest = max(item.length for item in prepared(encoder, sourced, shots=0).train)
    cut = prepared(encoder, sourced, shots=8, max_length=2 * longest)
    assert max(item.length for item in whole.train) > 2 * longest
    assert max(item.length for item in cut.train) <= 2 * longest
    assert any("answer" in prompt for prompt, _ in texts(encoder, cut.train))


def test_a_killed_task_shaped_warm_up_resumes_to_the_same_weights(
    tmp_path: Path, tiny_base: str, sourced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(out: Path, **values: Any) -> Any:
        given: dict[str, Any] = {
            "shots": 2, "max_steps": 6, "batch_size": 4, "learning_rate": 0.01, "rank": 4,
            "checkpoint_every": 2, **values,
        }  # fmt: skip
        warm_up(WarmupSettings(base=tiny_base, data=(sourced,), out=out, quiet=True, **given))
        return load_file(out / "adapter_model.safetensors")

    whole = made(tmp_path / "whole")
    plain = made(tmp_path / "plain", shots=0)
    assert any(not equal(whole[name], plain[name]) for name in whole)
    with monkeypatch.context() as patch:
        killed = dies_at_step(patch, 5)
        with pytest.raises(killed):
            made(tmp_path / "out")
    again = made(tmp_path / "out", resume=True)
    assert all(equal(again[name], whole[name]) for name in whole)


def test_documents_have_no_prompts_to_show_rows_before(tmp_path: Path, encoder: Encoder) -> None:
    data = write_rows(tmp_path / "texts.jsonl", [{"text": f"document {n}"} for n in range(8)])
    with pytest.raises(DataError, match="without prompts"):
        prepared(encoder, data)
