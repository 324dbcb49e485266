"""Worked examples before prompts, the training rows they come from, and the labels of these."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d2lora import AdaptSettings, EvaluateSettings, SettingsError, adapt
from d2lora.adapters.base import load_tokenizer
from d2lora.data.encode import Encoder
from d2lora.data.reading import read_task
from d2lora.data.rows import Example, user
from d2lora.evaluation.counts import per_row
from d2lora.evaluation.measure import prompts_of
from d2lora.evaluation.outputs import columns_of_outputs
from d2lora.evaluation.test_sets import TestSets, labels_known
from d2lora.settings import BaseSettings
from support import write_rows


def rows(folder: Path, name: str, *pairs: tuple[str, str]) -> tuple[str, ...]:
    values = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    return (write_rows(folder / f"{name}.jsonl", values),)


def settings(folder: Path, **values: Any) -> EvaluateSettings:
    data = rows(folder, "test", ("one", "1"), ("two", "2"))
    given: dict[str, Any] = {"data": data, "out": folder / "out", "quiet": True, **values}
    return EvaluateSettings(**given)


@pytest.fixture
def encoder(tiny_base: str) -> Encoder:
    return Encoder(load_tokenizer(BaseSettings(base=tiny_base)), "plain", n_positions=128)


def shown(encoder: Encoder, sets: TestSets, asked: EvaluateSettings) -> list[str]:
    return [encoder.tokenizer.decode(ids) for ids in prompts_of(encoder, sets, asked).ids]


def test_worked_examples_stand_before_a_prompt_but_never_a_test_row(
    tmp_path: Path, encoder: Encoder
) -> None:
    training = rows(tmp_path, "train", ("one", "1"), ("three", "3"), ("two", "2"))
    said: list[str] = []
    asked = settings(tmp_path, training_data=training, shots=1, max_new_tokens=4)
    sets = TestSets.read(asked, said.append)
    assert shown(encoder, sets, asked)[1].endswith(
        "User: three\nAssistant: 3\nUser: two\nAssistant:"
    )
    assert "warning: 2 training rows not shown, as test rows ask the same" in said


def test_a_prompt_that_has_room_for_fewer_examples_is_counted(
    tmp_path: Path, encoder: Encoder
) -> None:
    training = rows(tmp_path, "train", ("a" * 80, "3"), ("b" * 80, "4"))
    asked = settings(tmp_path, training_data=training, shots=2, max_new_tokens=4)
    sets = TestSets.read(asked)
    few = prompts_of(replace(encoder, n_positions=64), sets, asked)
    assert str(few.report(1024)).startswith("warning: 2 of 2 prompts show fewer worked examples")
    assert prompts_of(replace(encoder, n_positions=1024), sets, asked).report(8) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shots": 1}, "give --training-data"),
        ({"training_data": True}, "--training-data is of use for"),
        ({"training_data": True, "data": (), "general_text": True}, "--training-data is of use"),
        ({"training_data": True, "shots": 1, "data": "pairs"}, "preferences are scored without"),
    ],
)
def test_training_rows_that_would_not_be_used_are_refused(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    files: dict[Any, tuple[str, ...]] = {True: rows(tmp_path, "train", ("three", "3"))}
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    files["pairs"] = (write_rows(tmp_path / "pairs.jsonl", [pair]),)
    named = ("training_data", "general_text", "data")
    placed = {k: files.get(v, v) if k in named else v for k, v in values.items()}
    with pytest.raises(SettingsError, match=message):
        TestSets.read(settings(tmp_path, **placed))


def test_test_rows_whose_answer_is_no_label_are_warned_of(tmp_path: Path) -> None:
    card = tmp_path / "card.yaml"
    card.write_text("answers: closed\n", encoding="utf-8")
    training = rows(tmp_path, "train", ("three", "3"), ("uno", "1"))
    said: list[str] = []
    sets = TestSets.read(settings(tmp_path, task=str(card), training_data=training))
    assert labels_known(sets, [], said.append) == ("1", "3")
    assert said == [
        "warning: 1 test row with an answer that is none of the 2 labels, so it is never chosen: "
        "'2'"
    ]


def test_adapters_of_different_labels_are_warned_of(tmp_path: Path, tiny_base: str) -> None:
    card = tmp_path / "card.yaml"
    card.write_text("answers: closed\n", encoding="utf-8")
    folders = [tmp_path / "a", tmp_path / "b"]
    for out, answers in zip(folders, ("12", "23"), strict=True):
        data = rows(tmp_path, f"train-{out.name}", *((f"say {n}", n) for n in answers))
        adapt(
            AdaptSettings(
                base=tiny_base, data=data, task=str(card), max_steps=1, out=out, quiet=True
            )
        )
    said: list[str] = []
    sets = TestSets.read(settings(tmp_path, task=str(card)))
    assert labels_known(sets, folders, said.append) == ("1", "2", "3")
    assert "different labels, and all 3 are chosen from" in said[0]
    assert labels_known(sets, folders[:1], said.append) == ("1", "2")
    assert len(said) == 1


def test_thoughts_of_right_answers_are_not_compared_either(tmp_path: Path) -> None:
    card = tmp_path / "card.yaml"
    card.write_text("thoughts: <t> </t>\nmetrics: [accuracy]\n", encoding="utf-8")
    data = read_task(rows(tmp_path, "test", ("2 + 3", "<t>it is</t>5")), str(card))
    assert per_row(columns_of_outputs(data, ["<t>hm</t> 5"])["accuracy"]).tolist() == [1.0]
    assert data.examples == [Example(user("2 + 3"), "<t>it is</t>5")]


def test_prompts_that_are_cut_leave_room_for_the_answer(tmp_path: Path, encoder: Encoder) -> None:
    card = tmp_path / "card.yaml"
    card.write_text("answers: closed\nlabels: [a much longer label, b]\n", encoding="utf-8")
    data = rows(tmp_path, "long", ("word " * 200, "b"))
    for values, room in (({"max_new_tokens": 20}, 20), ({"task": str(card)}, 5)):
        asked = settings(tmp_path, data=data, overlong="truncate", **values)
        sets = TestSets.read(asked)
        cut = prompts_of(encoder, replace(sets, labels=labels_known(sets, [], print)), asked)
        assert 64 < len(cut.ids[0]) <= 128 - room
        assert "prompts longer than 1" in str(cut.report(1024))
