"""What an adapter was trained on is known, and reported for every row that it is measured on."""

import json
from pathlib import Path
from typing import Any

import pytest

from d2lora import (
    AdaptSettings,
    ConvertSettings,
    EvaluateSettings,
    ModelError,
    WarmStart,
    adapt,
    convert,
    evaluate,
)
from d2lora.data.contamination import Guard
from d2lora.data.reading import read_task
from d2lora.data.rows import Example, user
from d2lora.data.trained_rows import FILE, TestRow, TrainedRows
from d2lora.embedded import choice_rows, general_rows
from d2lora.evaluation.scores import Evaluation
from d2lora.tools.convert import randomise
from support import read_rows, write_rows


def evaluated(out: Path, base: str, *adapters: Path, **sets: Any) -> Evaluation:
    names = tuple(map(str, adapters))
    if "data" in sets:
        sets["max_new_tokens"] = 2
    return evaluate(EvaluateSettings(base=base, adapters=names, out=out, **sets))


def adapted_from(warm_start: WarmStart, out: Path, base: str, data: str, **changes: Any) -> Path:
    return adapt(
        AdaptSettings(
            base=base, data=(data,), init=str(warm_start.path), max_steps=1, out=out, quiet=True,
            **changes,
        )
    ).path  # fmt: skip


@pytest.fixture
def mixed_text(tmp_path: Path, general: str) -> str:
    """General text of which rows 2 and 5, with other case and spaces, were trained on."""
    seen = read_rows(Path(general))
    rows = general_rows("valid", 6)
    for number, row in ((1, seen[7]), (4, seen[0])):
        rows[number] = {**row, "prompt": f"  {row['prompt'].upper()} "}
    return write_rows(tmp_path / "mixed.jsonl", rows)


def test_rows_that_a_warm_start_was_trained_on_are_reported_by_file_and_number(
    tmp_path: Path, tiny_base: str, warm_start: WarmStart, problems: str, mixed_text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    adapter = adapted_from(warm_start, tmp_path / "a", tiny_base, problems)
    found = evaluated(
        tmp_path / "e", tiny_base, warm_start.path, adapter, general_text=(mixed_text,)
    )
    printed = capsys.readouterr().err
    for folder in (warm_start.path, adapter):
        assert f"{folder} was trained on 2 rows of {mixed_text} (2, 5)" in printed
        assert found.trained_on[str(folder)] == {"general_text": 2}
    assert found.trained_on["base"] == {"general_text": 0}
    assert json.loads((tmp_path / "e" / "summary.json").read_text())["trained_on"] == (
        found.trained_on
    )


def test_test_rows_that_a_task_was_trained_on_are_reported_and_those_of_validation_are_not(
    tmp_path: Path, tiny_base: str, warm_start: WarmStart, problems: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    adapter = adapted_from(
        warm_start, tmp_path / "a", tiny_base, problems, n=10, validation_fraction=0.2
    )
    found = evaluated(tmp_path / "e", tiny_base, adapter, data=(problems,))
    assert found.trained_on == {str(adapter): {"task": 8}}
    assert f"8 rows of {problems} (" in capsys.readouterr().err
    few = evaluated(tmp_path / "few", tiny_base, adapter, data=(problems,), limit=12)
    trained = TrainedRows.read(adapter).among(
        [row for row in rows_of(tmp_path, problems) if row.line <= 12]
    )
    assert few.trained_on == {str(adapter): {"task": len(trained)}}


def rows_of(tmp_path: Path, data: str) -> list[Any]:
    from d2lora.evaluation.test_sets import TestSets

    return TestSets.read(EvaluateSettings(data=(data,), out=tmp_path / "unused")).rows


def test_questions_whose_right_choice_was_trained_on_are_reported(
    tmp_path: Path, tiny_base: str, warm_start: WarmStart
) -> None:
    questions = choice_rows(6)
    learnt = [
        {"prompt": row["prompt"], "completion": row["choices"][row["answer"]]}
        for row in questions[2:4]
    ]
    data = write_rows(tmp_path / "learnt.jsonl", learnt)
    choices = write_rows(tmp_path / "choices.jsonl", questions)
    adapter = adapted_from(
        warm_start, tmp_path / "a", tiny_base, data, validation_fraction=0, batch_size=2
    )
    found = evaluated(tmp_path / "e", tiny_base, adapter, choices=(choices,), quiet=True)
    assert found.trained_on == {"base": {"choices": 0}, str(adapter): {"choices": 2}}


def test_an_adapter_without_the_record_falls_back_on_the_files_of_its_manifest(
    tmp_path: Path, tiny_base: str, warm_start: WarmStart, problems: str, general: str
) -> None:
    adapter = adapted_from(warm_start, tmp_path / "a", tiny_base, problems, n=8)
    (adapter / FILE).unlink()
    sets = {"data": (problems,), "general_text": (general,), "limit": 5, "quiet": True}
    found = evaluated(tmp_path / "e", tiny_base, adapter, **sets)
    assert found.trained_on[str(adapter)] == {"task": 5, "general_text": 60}


def test_conversions_know_what_their_adapters_were_trained_on_and_random_weights_nothing(
    tmp_path: Path, tiny_base: str, warm_start: WarmStart, problems: str
) -> None:
    adapter = adapted_from(warm_start, tmp_path / "a", tiny_base, problems)
    own, whole = TrainedRows.read(warm_start.path), TrainedRows.read(adapter)
    assert len(own.rows) == 59  # of 60, one held out
    assert own.rows < whole.rows
    mixed = convert(
        ConvertSettings(adapter=str(warm_start.path), mix=(str(adapter),), out=tmp_path / "m")
    )
    assert TrainedRows.read(mixed.path) == whole
    randomise(warm_start.path, tmp_path / "r", 0)
    assert TrainedRows.read(tmp_path / "r") == TrainedRows()


def test_a_base_that_a_warm_start_was_merged_into_knows_its_rows(
    tmp_path: Path, tiny_base: str, warm_start: WarmStart, mixed_text: str
) -> None:
    merged = convert(
        ConvertSettings(
            base=tiny_base, adapter=str(warm_start.path), merge=True, out=tmp_path / "m"
        )
    )
    found = evaluated(tmp_path / "e", str(merged.path), general_text=(mixed_text,), quiet=True)
    assert found.trained_on == {"base": {"general_text": 2}}


def test_rows_are_the_same_by_their_words_and_the_signs_between_numbers() -> None:
    record = TrainedRows.of([Example(user("What is 7 - 5?"), "2"), Example((), "\u2603 \u2602")])
    for text, known in (
        ("what is 7-5\n2", True),
        ("What is 7 + 5?\n2", False),
        ("\u2603 \u2602", True),
        ("\u2604 \u2602", False),
    ):
        assert bool(TrainedRows.of([Example((), text)]).rows & record.rows) == known


def test_a_damaged_record_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"rows": ["12')
    with pytest.raises(ModelError, match=r"trained_rows\.json: Invalid JSON"):
        TrainedRows.read(tmp_path)


def test_rows_are_known_by_every_right_answer_and_every_answer_that_was_learnt() -> None:
    trained = TrainedRows.of([Example(user("name A"), "Place A.")])
    row = Example(user("name A"), "A is here.", references=("place a",))
    tests = [TestRow("task", "f", 1, one.texts, "") for one in (row, Example(user("name A"), "x"))]
    assert trained.among(tests) == tests[:1]


def test_every_turn_of_a_conversation_that_is_learnt_counts_as_trained_on(
    tmp_path: Path, tiny_base: str
) -> None:
    said = [
        {"role": "user" if n % 2 == 0 else "assistant", "content": f"say {n}"} for n in (0, 1, 2, 3)
    ]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": said}] * 2)
    card = tmp_path / "card.yaml"
    card.write_text("turns: every", encoding="utf-8")
    adapter = adapt(
        AdaptSettings(
            base=tiny_base,
            data=(data,),
            task=str(card),
            max_steps=1,
            out=tmp_path / "a",
            quiet=True,
        )
    )
    trained = TrainedRows.read(adapter.path)
    assert trained.among([TestRow("task", "f", 1, Example(user("say 0"), "say 1").texts, "")])
    asked = write_rows(tmp_path / "test.jsonl", [{"prompt": "say 0", "completion": "x"}])
    [leak] = Guard([asked]).leaks(read_task([data], str(card)).examples[:1])
    assert leak.how == "asks the same question as"
