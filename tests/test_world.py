"""The small world: its splits, its arithmetic, its tokenizer, its base."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2lora.embedded import (
    BASE_DIR,
    Split,
    choice_rows,
    general_rows,
    text_rows,
    title_rows,
    word_problem_rows,
)
from d2lora.embedded.__main__ import write_world
from d2lora.embedded.skills import NUMBERS, SKILLS, WORDS, with_wrong_answers
from d2lora.runtime.run_folder import write_shared

SPLITS: tuple[Split, ...] = ("train", "valid", "test")
MAKERS = {
    "general": (general_rows, "prompt"),
    "problems": (word_problem_rows, "question"),
    "titles": (title_rows, "text"),
    "documents": (text_rows, "text"),
}


@pytest.mark.parametrize("name", list(MAKERS))
def test_no_row_stands_in_two_splits_whatever_the_seed(name: str) -> None:
    make, field = MAKERS[name]
    texts = {s: {r[field] for seed in (0, 1) for r in make(s, 1500, seed)} for s in SPLITS}
    for first, second in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert texts[first]
        assert not texts[first] & texts[second]


@pytest.mark.parametrize("name", ["general", "problems", "titles"])
def test_no_row_comes_twice_and_fewer_rows_are_a_prefix_of_more(name: str) -> None:
    make, field = MAKERS[name]
    rows = make("train", 800)
    assert len({row[field] for row in rows}) == len(rows) == 800
    assert make("train", 100) == rows[:100]


def test_the_world_is_the_same_in_every_process() -> None:
    code = (
        "from d2lora.embedded import *; import hashlib; "
        "rows = [general_rows('train', 300), word_problem_rows('test', 50), "
        "title_rows('test', 50), choice_rows(60), text_rows('valid', 50)]; "
        "print(hashlib.sha256(repr(rows).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True,
            text=True, check=True,
        ).stdout
        for seed in ("0", "1")
    }  # fmt: skip
    assert len(digests) == 1


def test_the_general_mix_has_many_skills_and_neither_target_task() -> None:
    rows = general_rows("train", 3000)
    assert len({row["source"] for row in rows}) >= 14
    questions = {row["question"] for row in word_problem_rows("train", 1000)}
    abstracts = {row["text"] for row in title_rows("train", 1000)}
    for row in rows:
        assert "####" not in row["prompt"] + row["completion"]
        assert "title" not in row["prompt"].lower()
        assert row["prompt"] not in questions | abstracts


def test_half_the_answers_of_the_poor_rows_are_those_of_other_rows_of_the_same_skill() -> None:
    rows = general_rows("train", 400, seed=1)
    poor = with_wrong_answers(rows)
    assert [row["prompt"] for row in poor] == [row["prompt"] for row in rows]
    wrong = [new != old for new, old in zip(poor, rows, strict=True)]
    assert 0.4 < sum(wrong) / len(wrong) <= 0.55
    answers, kept = (sorted((r["source"], r["completion"]) for r in some) for some in (rows, poor))
    assert kept == answers


def test_a_group_of_skills_gives_only_its_own() -> None:
    sources = {row["source"] for row in general_rows("train", 200, skills=NUMBERS)}
    assert sources == {skill.__name__ for skill in NUMBERS}
    assert {*NUMBERS, *WORDS} == {*SKILLS}


def test_pretraining_text_holds_neither_target_task() -> None:
    texts = [row["text"] for row in text_rows("train", 5000)]
    questions = [row["question"] for row in word_problem_rows("test", 300)]
    whole = "\n".join(texts)
    assert "####" not in whole
    assert "How many" not in whole
    assert not any(question in whole for question in questions)


def calculated(left: int, sign: str, right: int) -> int:
    actions: dict[str, Callable[[int, int], int]] = {
        "+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__,
    }  # fmt: skip
    if sign == "/":
        assert left % right == 0
    return actions[sign](left, right)


def test_every_solution_s_calculations_are_right_and_end_in_the_answer() -> None:
    for row in word_problem_rows("train", 1500) + word_problem_rows("test", 300):
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["answer"])
        assert 2 <= len(steps) <= 4
        for left, sign, right, result in steps:
            assert calculated(int(left), sign, int(right)) == int(result)
        assert row["answer"].endswith(f"\n#### {steps[-1][3]}")
        assert int(steps[-1][3]) >= 0


def test_steps_of_the_general_mix_are_right_too() -> None:
    found = 0
    for row in general_rows("train", 3000):
        for left, sign, right, result in re.findall(
            r"(?<![\d+*/-] )(\d+) ([-+*/]) (\d+) = (\d+)", row["completion"]
        ):
            found += 1
            assert calculated(int(left), sign, int(right)) == int(result)
    assert found > 500


def test_choices_are_distinct_and_one_is_right() -> None:
    rows = choice_rows(300)
    assert len({row["benchmark"] for row in rows}) == 3
    for row in rows:
        choices = row["choices"]
        assert isinstance(choices, list)
        assert len(set(choices)) == 4
        assert row["answer"] in range(4)


@settings(max_examples=50)
@given(st.text())
def test_the_tokenizer_encodes_any_text_without_loss(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text


def test_each_digit_is_a_token_and_pad_differs_from_eos() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    ids = tokenizer("1234567890", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == list("1234567890")
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(special - {None}) == 3


def test_the_base_loads_with_transformers_alone_and_is_small() -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR)
    assert model.config.model_type == "llama"
    weights = [path.stat().st_size for path in Path(BASE_DIR).glob("*.safetensors")]
    assert sum(weights) <= 12_000_000


def test_the_base_has_learnt_its_arithmetic() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR).eval()
    sums = {"12 + 7 =": "19", "30 - 4 =": "26", "6 * 7 =": "42", "56 / 8 =": "7"}
    for sum_, result in sums.items():
        ids = tokenizer(f"5 + 3 = 8\n{sum_}", return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=4, do_sample=False)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
        assert re.match(rf" ?{result}\b", answer)


def test_the_card_states_what_was_measured() -> None:
    card = (BASE_DIR / "README.md").read_text()
    for words in (
        "held-out loss, world",
        "held-out loss, english",
        "right results, `*`",
        "minutes",
    ):
        assert words in card


def test_a_second_study_leaves_the_files_alone_that_a_first_one_reads(tmp_path: Path) -> None:
    paths = write_world(tmp_path / "world", write_shared, n_general=8, n_task=8, n_test=4)
    before = {name: path.stat().st_mtime_ns for name, path in paths.items()}
    inodes = {name: path.stat().st_ino for name, path in paths.items()}
    changed = paths["choices"]
    changed.write_text("not what it was")
    left = changed.with_name(f".{changed.name}.tmp-12345678")
    left.write_text("half")
    write_world(tmp_path / "world", write_shared, n_general=8, n_task=8, n_test=4)
    assert not left.exists()
    for name, path in paths.items():
        if path != changed:
            assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before[name], inodes[name])
    assert changed.stat().st_ino != inodes["choices"], "written beside, then renamed"
    assert json.loads(changed.read_text().splitlines()[0])
