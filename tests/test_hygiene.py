"""What should not be learnt from is taken out, with the reason; what is sound stays."""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2lora import SettingsError
from d2lora.adapters.base import load_base
from d2lora.data.encode import Encoder
from d2lora.data.ngrams import overlap, shingles
from d2lora.data.reading import read_pool, read_task
from d2lora.data.rows import Example, Message
from d2lora.runtime.console import Reporter
from d2lora.selection.duplicates import duplicates
from d2lora.selection.hygiene import STEPS, Cleaned, answer_fault, clean
from d2lora.settings import BaseSettings, HygieneSettings
from support import SHARED, needs_shared_data, write_rows

FABLE = (
    "A fox saw ripe grapes that hung from a high vine. He jumped for them again and again, and "
    "could not reach even one. At last he went away and said that they were surely sour."
)


def example(answer: str, prompt: str = "Tell me a fable.") -> Example:
    return Example((Message("user", prompt),), answer)


def cleaned(folder: Path, *rows: dict[str, str], **settings: Any) -> Cleaned:
    data = read_pool([write_rows(folder / "pool.jsonl", rows)], "instruct")
    return clean(data, HygieneSettings(**settings), None, 0, Reporter(quiet=True))


@pytest.mark.parametrize(
    ("answer", "step"),
    [
        ("...", "empty"),
        ("I'm sorry, but I cannot help with that request.", "refusal"),
        ("As an AI language model, I do not have feelings.", "refusal"),
        ("I am unable to provide legal advice.", "refusal"),
        ("Lorem ipsum dolor sit amet.", "boilerplate"),
        ("Dear [Insert name here], welcome!", "boilerplate"),
        (f"{FABLE} Then the fox went on and", "truncated"),
        ("Here is the code:\n```python\nprint(1)", "truncated"),
        (" ".join(["round and round it goes"] * 12), "repetitive"),
    ],
)
def test_poor_answers_are_known(answer: str, step: str) -> None:
    found = answer_fault(example(answer))
    assert found is not None
    assert found[0] == step


@pytest.mark.parametrize(
    "answer",
    [
        "yes", "7", "😀", FABLE, "```python\nprint(1)\n```", "I'm sorry to hear that you are ill.",
        "I cannot recommend this film highly enough.", "The model apologised, but could not help.",
        "我不知道", "A title without a full stop, and with the",
    ],
)  # fmt: skip
def test_sound_answers_stay(answer: str) -> None:
    assert answer_fault(example(answer)) is None


def test_an_answer_that_begins_with_its_prompt_is_an_echo() -> None:
    prompt = "Say in a few words why the sky is blue in the day."
    found = answer_fault(example(f"{prompt} Because of scattering.", prompt))
    assert found is not None
    assert found[0] == "echo"
    assert answer_fault(example("The sky is blue because of scattering.", prompt)) is None


def test_every_step_is_counted_and_every_row_is_kept_or_reported(tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", [{"prompt": "Which fox was it?", "response": "a"}])
    rows = [
        {"prompt": "Tell me a fable.", "response": FABLE, "source": "a"},
        {"prompt": "tell me a FABLE", "response": FABLE, "source": "a"},
        {"prompt": "Please tell me a fable.", "response": FABLE, "source": "a"},
        {"prompt": "Which fox was it?", "response": "A red one.", "source": "a"},
        {"prompt": "Hm", "response": "", "source": "a"},
        {"prompt": "How are you?", "response": "I am well.", "source": "b"},
        {"prompt": "Where are you?", "response": "Here.", "source": "b"},
    ]
    found = cleaned(tmp_path, *rows, keep_out=(test,), source_cap=1)
    assert {step: n for step, n in found.counts.items() if n} == {
        "unreadable": 1, "contaminated": 1, "duplicate": 1, "near_duplicate": 1, "source_cap": 1,
    }  # fmt: skip
    assert set(found.counts) == {"unreadable", *STEPS}
    assert len(found.kept) + sum(found.counts.values()) == len(rows)
    reasons = {item.step: item.reason for item in found.rejected}
    assert reasons["duplicate"].endswith("pool.jsonl, line 1")
    assert reasons["near_duplicate"].startswith("9")


def test_length_is_counted_in_the_tokens_of_the_base(tmp_path: Path, tiny_base: str) -> None:
    encoder = Encoder.of(load_base(BaseSettings(base=tiny_base)), None)
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": FABLE}]
    data = read_task([write_rows(tmp_path / "pool.jsonl", rows)])
    settings = HygieneSettings(max_length=30)
    found = clean(data, settings, encoder, 0, Reporter(quiet=True))
    assert found.kept == [0]
    assert found.rejected[0].step == "length"


def test_rows_of_other_languages_go_where_languages_are_named(tmp_path: Path) -> None:
    german = "Der Fuchs sah reife Trauben an einer hohen Rebe hängen und sprang nach ihnen."
    rows = [{"prompt": "Tell", "response": FABLE}, {"prompt": "Erzähle", "response": german}]
    assert cleaned(tmp_path, *rows, languages=("en",)).kept == [0]
    assert cleaned(tmp_path, *rows, languages=("de",)).kept == [1]
    assert cleaned(tmp_path, *rows).kept == [0, 1]
    with pytest.raises(SettingsError, match="`english` is not a known"):
        cleaned(tmp_path, *rows, languages=("english",))


def text_of(rng: random.Random, n_words: int) -> list[str]:
    return [f"w{rng.randrange(5000)}" for _ in range(n_words)]


def test_near_duplicates_are_those_of_the_exact_similarity() -> None:
    rng = random.Random(0)
    examples = []
    for _ in range(150):
        words = text_of(rng, 60)
        examples.append(example("same", " ".join(words)))
        for place in rng.sample(range(60), rng.randrange(5)):
            words[place] = "changed"
        examples.append(example("same", " ".join(words)))
    found = {item.index: item for item in duplicates(examples, 0.7)}
    sets = [shingles(f"{item.prompt[0].content} same", 5) for item in examples]
    exact = {
        second
        for first, second in zip(range(0, 300, 2), range(1, 300, 2), strict=True)
        if overlap(sets[first], sets[second]) >= 0.7
    }
    assert found.keys() == exact
    assert 50 < len(exact) < 150
    assert all(item.of == index - 1 for index, item in found.items())


def test_one_text_with_two_answers_is_two_rows() -> None:
    text = f"{FABLE} Who is it about, and what is the lesson of it?"
    rows = [example("A fox and grapes", text), example("Do not despise what you lack", text)]
    assert not list(duplicates(rows, 0.8))


@given(st.lists(st.sampled_from("abcdef"), max_size=30), st.lists(st.sampled_from("abcdef")))
def test_overlap_is_the_jaccard_similarity(first: list[str], second: list[str]) -> None:
    one = {tuple(first[i : i + 2]) for i in range(max(1, len(first) - 1))}
    two = {tuple(second[i : i + 2]) for i in range(max(1, len(second) - 1))}
    found = overlap(shingles(" ".join(first), 2), shingles(" ".join(second), 2))
    if first and second:
        assert found == pytest.approx(len(one & two) / len(one | two))


@needs_shared_data
def test_little_of_a_sound_pool_is_called_poor() -> None:
    examples = read_task([str(SHARED / "general" / "valid.jsonl")]).examples
    assert sum(answer_fault(item) is not None for item in examples) <= 1
