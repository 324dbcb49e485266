"""Test rows in a pool are all found, and nothing else is taken for one."""

import json
from pathlib import Path

import numpy as np
import pytest

from d2lora import AdaptSettings, DataError, adapt
from d2lora.data.contamination import Guard, Leak
from d2lora.data.reading import read_task
from support import SHARED, needs_shared_data, read_rows, write_rows

LONG = (
    "Natalia sold clips to forty eight of her friends in April, and then she sold half as many "
    "clips in May."
)


def pool(folder: Path, *rows: dict[str, str]) -> list[str]:
    return [write_rows(folder / "pool.jsonl", rows)]


def evaluation(folder: Path, *rows: dict[str, str]) -> list[str]:
    return [write_rows(folder / "test.jsonl", rows)]


@needs_shared_data
def test_a_planted_leak_of_gsm8k_is_found_whole_and_nothing_else_is(tmp_path: Path) -> None:
    test_rows = read_rows(SHARED / "gsm8k" / "test.jsonl")
    general = read_rows(SHARED / "general" / "train.jsonl")
    rng = np.random.default_rng(0)
    leaked = [test_rows[i] for i in rng.choice(len(test_rows), len(test_rows) // 100, False)]
    planted = [
        {"prompt": row["question"].upper().replace(",", " ,"), "response": row["answer"]}
        for row in leaked
    ]
    places = set(rng.choice(len(general) + len(planted), len(planted), replace=False).tolist())
    clean, dirty = iter(general), iter(planted)
    mixed = [next(dirty if i in places else clean) for i in range(len(general) + len(planted))]
    found = contaminated_rows(
        pool(tmp_path, *mixed), [str(SHARED / "gsm8k" / "test.jsonl")], task="instruct"
    )
    indices = {leak.index for leak in found}
    assert len(places) == 13
    assert places <= indices
    assert len(indices - places) < 0.001 * len(general)


def contaminated_rows(
    sources: list[str], evaluation_files: list[str], task: str = "auto"
) -> list[Leak]:
    examples = read_task(sources, task, skip_bad=True).examples
    return list(Guard(evaluation_files).leaks(examples))


def test_thirteen_words_in_a_row_are_a_leak_and_twelve_are_not(tmp_path: Path) -> None:
    test = evaluation(tmp_path, {"prompt": LONG, "response": "72"})
    words = LONG.split()
    for n_shared, expected in ((13, 1), (12, 0)):
        text = "Here is something: " + " ".join(words[4 : 4 + n_shared]) + " and so on"
        found = contaminated_rows(pool(tmp_path, {"prompt": text, "response": "a"}), test)
        assert len(found) == expected


def test_a_short_question_is_found_alone_in_a_prompt_or_inside_a_text(tmp_path: Path) -> None:
    question = "What is the capital city of the northern province of Zambia?"
    test = evaluation(
        tmp_path, {"prompt": question, "response": "Kasama"}, {"prompt": "Who?", "response": "Me"}
    )
    rows = pool(
        tmp_path,
        {"prompt": "what is THE capital city of the Northern Province of Zambia", "response": "x"},
        {"prompt": f"Answer: {question} Be brief.", "response": "y"},
        {"prompt": "who", "response": "z"},
        {"prompt": "Who are you, and who is that?", "response": "z"},
    )
    found = contaminated_rows(rows, test)
    assert [(leak.index, leak.line) for leak in found] == [(0, 1), (1, 1), (2, 2)]
    assert found[1].how == "shares 11 consecutive words with"


def test_a_sign_between_numbers_makes_another_question(tmp_path: Path) -> None:
    test = evaluation(tmp_path, {"prompt": "6 / 1 =", "response": "6"})
    rows = pool(
        tmp_path, {"prompt": "6 * 1 = ?", "response": "6"}, {"prompt": "6/1?", "response": "6"}
    )
    assert [leak.index for leak in contaminated_rows(rows, test)] == [1]


def test_the_wording_of_a_template_is_no_leak(tmp_path: Path) -> None:
    template = "Read the following short text with care and then say in one word what it is about:"
    test = evaluation(
        tmp_path, *({"prompt": f"{template} {n} {n} tea", "response": "x"} for n in range(11))
    )
    rows = pool(tmp_path, {"prompt": f"{template} quite another text", "response": "x"})
    assert not contaminated_rows(rows, test)
    assert len(contaminated_rows(rows, evaluation(tmp_path, *read_rows(Path(test[0]))[:10]))) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"question": LONG, "answer": "#### 72"},
        {"prompt": LONG, "chosen": "a", "rejected": "b"},
        {"prompt": LONG, "choices": ["a", "b"], "answer": 0},
        {"text": LONG},
        {"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "a"}]},
    ],
)
def test_evaluation_files_of_every_kind_are_read(tmp_path: Path, row: dict[str, object]) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    rows = pool(tmp_path, {"prompt": f"Solve. {LONG}", "response": "72"})
    assert len(contaminated_rows(rows, [str(tmp_path / "test.jsonl")])) == 1


def test_scripts_without_spaces_count_signs(tmp_path: Path) -> None:
    text = "今天天气很好我们一起去公园散步吧"
    test = evaluation(tmp_path, {"prompt": text, "response": "好"})
    assert contaminated_rows(pool(tmp_path, {"prompt": f"请说:{text}", "response": "a"}), test)


def test_rows_of_an_unknown_kind_are_compared_by_all_their_texts(tmp_path: Path) -> None:
    test = evaluation(tmp_path, {"label": "x", "story": [{"body": LONG}, {"n": 1}]})
    assert contaminated_rows(pool(tmp_path, {"prompt": f"Solve. {LONG}", "response": "72"}), test)
    assert not contaminated_rows(pool(tmp_path, {"prompt": "Solve.", "response": "x"}), test)


def test_adapt_takes_test_rows_out_and_says_so(
    tmp_path: Path, tiny_base: str, titles: str, capsys: pytest.CaptureFixture[str]
) -> None:
    test = write_rows(tmp_path / "test.jsonl", read_rows(Path(titles))[:3])
    settings = AdaptSettings(
        base=tiny_base, data=(titles,), keep_out=(test,), keep_out_words=0, max_steps=0,
        out=tmp_path / "a",
    )  # fmt: skip
    adapter = adapt(settings)
    assert adapter.manifest.kept_out == {"files": [test], "n_checked": 40, "n_removed": 3}
    assert adapter.manifest.n_examples == 37
    aside = read_rows(tmp_path / "a" / "bad_rows.jsonl")
    assert [row["line"] for row in aside] == [1, 2, 3]
    assert "asks the same question as" in aside[0]["reason"]
    assert "removed 3 of 40 rows" in capsys.readouterr().err


def test_training_only_on_test_rows_is_refused(tmp_path: Path, tiny_base: str, titles: str) -> None:
    settings = AdaptSettings(
        base=tiny_base, data=(titles,), keep_out=(titles,), out=tmp_path / "a", quiet=True
    )
    with pytest.raises(DataError, match="every row of"):
        adapt(settings)


def test_rows_of_the_validation_data_are_not_trained_on(
    tmp_path: Path, tiny_base: str, titles: str
) -> None:
    valid = write_rows(tmp_path / "valid.jsonl", read_rows(Path(titles))[:5])
    settings = AdaptSettings(
        base=tiny_base, data=(titles,), validation_data=(valid,), max_steps=0, out=tmp_path / "a",
        quiet=True,
    )  # fmt: skip
    assert adapt(settings).manifest.n_examples == 35
    assert len(read_task([titles]).examples) == 40


def test_the_words_of_an_instruction_do_not_make_short_rows_alike(tmp_path: Path) -> None:
    asked = "Which of the intents does this message to our bank have?"
    messages = [
        f"{start} my {thing} {end}"
        for start in ("where is", "i lost", "please block")
        for thing in ("card", "pin", "cheque book", "last transfer")
        for end in ("now", "since monday", "again")
    ]
    rows = [{"prompt": f"{asked}\n\n{text}", "completion": text.split()[-1]} for text in messages]
    own = "i want to know why the machine in your branch on main street kept it"
    planted = {"prompt": f"{asked}\n\n{own}", "completion": "atm"}
    guard = Guard([write_rows(tmp_path / "test.jsonl", [*rows[::2], planted])])
    train = read_task([write_rows(tmp_path / "train.jsonl", [*rows[1::2], rows[2]])]).examples
    (leak,) = guard.leaks(train)
    assert (leak.index, leak.how) == (len(train) - 1, "asks the same question as")
    other = {"prompt": f"So {own}, tell me", "completion": "atm"}
    (leak,) = guard.leaks(read_task([write_rows(tmp_path / "more.jsonl", [other])]).examples)
    assert leak.how == "shares 13 consecutive words with"
