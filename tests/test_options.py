"""Closed answers of rows that bring their own choices."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from d2lora import AdaptSettings, EvaluateSettings, StudySettings, adapt, evaluate, run_study
from d2lora.adapters.base import load_base
from d2lora.adapters.manifest import Manifest
from d2lora.data.encode import Encoder
from d2lora.data.rows import Example, user
from d2lora.errors import DataError, SettingsError
from d2lora.settings import BaseSettings, InspectSettings
from d2lora.tools.rows import print_rows, see_rows
from support import small_plan, write_rows
from test_cards import card, examples

OWN = "answers: closed\nchoices: {texts: options, right: answer}\n"
NAMED = "choices: {texts: choices.text, names: choices.label, right: answerKey}"
LETTERED = "choices: {texts: [a, b, c], names: [A, B, C], right: r}"
ABC = {"q": "?", "a": "x", "b": "y", "c": "z"}


@pytest.mark.parametrize(
    ("text", "row", "choices", "right"),
    [
        (  # ARC
            f"prompt: '{{question}}'\n{NAMED}",
            {
                "question": "?", "answerKey": "2",
                "choices": {"text": ["a", "b"], "label": ["1", "2"]},
            },
            ("a", "b"), "b",
        ),
        (  # HellaSwag
            "prompt: '{ctx}'\nchoices: {texts: endings, right: label, per: character}",
            {"ctx": "A man", "endings": ["sits.", " runs."], "label": "1"},
            ("sits.", "runs."), "runs.",
        ),
        (  # CommonsenseQA
            "prompt: '{q.stem}'\n"
            "choices: {texts: 'q.choices[*].text', names: 'q.choices[*].label', right: key}",
            {
                "q": {"stem": "?", "choices": [
                    {"label": "A", "text": "sea"}, {"label": "B", "text": "moon"},
                ]},
                "key": "A",
            },
            ("sea", "moon"), "sea",
        ),
        (  # Winogrande
            "prompt: '{s}'\nchoices: {texts: [option1, option2], names: [1, 2], right: answer}",
            {"s": "_", "option1": "Ann", "option2": "Mia", "answer": 2},
            ("Ann", "Mia"), "Mia",
        ),
        (  # SciQ
            "prompt: '{q}'\ncompletion: '{right}'\nchoices: {texts: [right, d1, d2]}",
            {"q": "?", "right": "sugar", "d1": "", "d2": "salt"},
            ("sugar", "salt"), "sugar",
        ),
        (  # MMLU
            f"prompt: '{{q}}'\n{LETTERED}",
            {**ABC, "r": "C"},
            ("x", "y", "z"), "z",
        ),
        (  # the row's own form, and what may be empty
            "choices: {texts: [o1, o2, o3], right: which}",
            {"prompt": "?", "o1": "x", "o2": None, "o3": "z", "which": 2},
            ("x", "z"), "z",
        ),
        (  # names of columns, numbers
            "columns: {prompt: q, options: 'data.o', gold: data.g}\n"
            "values: {gold: {first: 0, second: 1}}\nchoices: {texts: options, right: gold}",
            {"q": "?", "data": {"o": [7, 8.5], "g": "second"}},
            ("7", "8.5"), "8.5",
        ),
    ],
)  # fmt: skip
def test_the_choices_of_a_row_are_read_as_they_are_published(
    tmp_path: Path, text: str, row: dict[str, Any], choices: tuple[str, ...], right: str
) -> None:
    [example] = examples(tmp_path, f"answers: closed\n{text}\n", row)
    assert (example.choices, example.completion) == (choices, right)


def test_a_label_that_is_false_beside_a_question_is_an_answer_where_the_card_shows_it(
    tmp_path: Path,
) -> None:
    text = "completion: '{label}'\nanswers: closed\n"
    for asked in ("question", "instruction"):
        [example] = examples(tmp_path, text, {asked: "So?", "label": False})
        assert example == Example(user("So?"), "false")


@pytest.mark.parametrize(
    ("text", "row", "message"),
    [
        (OWN, {"options": ["a", "b"], "answer": "B"}, "none of the choices 0, 1, their places; "),
        (OWN, {"options": ["a", "b"], "answer": 2}, "`answer` is '2', which is none of"),
        (OWN, {"options": ["a", "b"], "answer": True}, "`answer` is 'true'"),
        (OWN, {"options": ["a", "b"]}, "`answer` is missing"),
        (OWN, {"options": ["a"], "answer": 0}, "at least two choices are needed, found 1"),
        (OWN, {"options": ["a", "b", ""], "answer": 2}, "the right choice, '2', is empty"),
        (OWN, {"options": "ab", "answer": 0}, "`options` must be a list of texts, found str"),
        (OWN, {"options": [["a"], ["b"]], "answer": 0}, "`options` must hold texts"),
        (
            f"answers: closed\n{NAMED}",
            {"choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"},
            "`names` must name each of the 2 choices",
        ),
        (
            f"answers: closed\n{LETTERED}",
            {**ABC, "r": "D"},
            "`r` is 'D', which is none of the choices A, B, C",
        ),
        (
            "answers: closed\ncompletion: '{r}'\nchoices: {texts: [a, b]}",
            {**ABC, "r": "q"},
            "the answer 'q' is none of the 2 choices of the row",
        ),
    ],
)
def test_a_row_without_choices_or_a_right_one_says_so(
    tmp_path: Path, text: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as error:
        examples(tmp_path, text, {"prompt": "?", **row})
    assert message in str(error.value)
    assert "card.yaml, line " in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("choices: {texts: a, right: b}", "choices are of `answers: closed`"),
        (f"{OWN}labels: [a]", "`choices` are each row's own, and `labels` those of all"),
        (f"{OWN}completion: '{{x}}'", "leave one of the two out"),
        (f"{OWN}references: x", "one of the `choices` is right"),
        ("answers: closed\nchoices: {texts: a, names: b}", "give `right`, too"),
        ("answers: closed\nchoices: {texts: [a], right: b}", "those of two texts or more"),
        ("answers: closed\nchoices: {texts: [a, a], right: b}", "`a` is named more than once"),
        ("answers: closed\nchoices: {texts: '', right: b}", "an empty path names no field"),
        ("answers: closed\nchoices: options", "(line 2)"),
    ],
)
def test_choices_that_contradict_the_card_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(SettingsError) as error:
        examples(tmp_path, text, {"x": 1})
    assert message in str(error.value)


def questions(file: Path, n: int) -> str:
    """Write questions of two to four choices of many lengths."""
    words = ("red", "a blue one", "no", "seven and a half", "x")
    rows = [
        {
            "prompt": f"Which one, {number}?",
            "choices": [words[(number + i) % 5] for i in range(2 + number % 3)],
            "answer": number % 2,
        }
        for number in range(n)
    ]
    return write_rows(file, rows)


PLAIN = "answers: closed\nchoices: {{texts: choices, right: answer{per}}}\n"


@pytest.mark.parametrize("shots", [0, 1])
def test_the_likeliest_of_a_row_s_own_choices_is_chosen(
    tmp_path: Path, tiny_base: str, shots: int
) -> None:
    train, test = questions(tmp_path / "a.jsonl", 1), questions(tmp_path / "b.jsonl", 9)
    Path(train).write_text(Path(train).read_text().replace("Which", "What"))
    done = evaluate(
        EvaluateSettings(
            base=tiny_base, data=(test,), task=card(tmp_path, PLAIN.format(per="")), shots=shots,
            training_data=(train,) * shots, out=tmp_path / "e", quiet=True,
        )
    )  # fmt: skip
    base = load_base(BaseSettings(base=tiny_base))
    encoder = Encoder.of(base, None)
    rows = [json.loads(line) for line in Path(test).read_text().splitlines()]
    for row, record in zip(rows, done.records.to_dict("records"), strict=True):
        shown = (*user("What one, 0?"), Example((), "red").answer) * shots
        asked = [Example((*shown, *user(row["prompt"])), one) for one in row["choices"]]
        likely = torch.tensor([_log_probability(base.model, encoder, one) for one in asked])
        assert record["choices"] == row["choices"]
        assert record["target"] == row["choices"][row["answer"]]
        assert record["output"] == row["choices"][int(likely.argmax())]
        assert record["confidence"] == pytest.approx(float(likely.softmax(0).max()), rel=1e-4)
        assert record["accuracy"] == float(record["output"] == record["target"])


def test_one_of_77_labels_is_chosen_by_its_likelihood(tmp_path: Path, tiny_base: str) -> None:
    labels = [f"{number} {'of' * (number % 4)}" for number in range(77)]
    rows = [{"q": f"Which, {number}?", "a": labels[number].strip()} for number in (3, 40, 76)]
    text = f"prompt: '{{q}}'\ncompletion: '{{a}}'\nanswers: closed\nlabels: {json.dumps(labels)}\n"
    done = evaluate(
        EvaluateSettings(
            base=tiny_base, data=(write_rows(tmp_path / "b.jsonl", rows),),
            task=card(tmp_path, text), out=tmp_path / "e", quiet=True,
        )
    )  # fmt: skip
    base = load_base(BaseSettings(base=tiny_base))
    encoder = Encoder.of(base, None)
    gaps: list[float] = []
    for row, record in zip(rows, done.records.to_dict("records"), strict=True):
        asked = [Example(user(row["q"]), label.strip()) for label in labels]
        likely = torch.tensor([_log_probability(base.model, encoder, one) for one in asked])
        best = int(likely.argmax())
        assert record["output"] == asked[best].completion
        assert record["confidence"] == pytest.approx(float(likely.softmax(0)[best]), rel=1e-4)
        gaps.append(abs(record["confidence"] - float(record["output"] == record["target"])))
    assert done.calibration["base"] <= np.mean(gaps) + 1e-9


def _log_probability(model: Any, encoder: Encoder, example: Example) -> float:
    item = encoder.encode(example)
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([item.ids])).logits[0].log_softmax(-1)
    places = range(item.n_prompt, item.length)
    return sum(float(logits[place - 1, item.ids[place]]) for place in places)


def test_choices_compared_by_character_are_right_where_those_of_forgetting_are(
    tmp_path: Path, tiny_base: str
) -> None:
    test = questions(tmp_path / "b.jsonl", 12)
    done = evaluate(
        EvaluateSettings(
            base=tiny_base, data=(test,), choices=(test,), out=tmp_path / "e", quiet=True,
            task=card(tmp_path, PLAIN.format(per=", per: character")),
        )
    )  # fmt: skip
    accuracy = done.forgetting["base"].choice_accuracy
    assert accuracy is not None
    assert 0 < accuracy.mean < 1
    assert done.scores["base"]["accuracy"].mean == accuracy.mean
    assert "confidence" not in done.records
    assert done.calibration == {}


def test_a_study_learns_and_compares_rows_with_their_own_choices(
    tmp_path: Path, tiny_base: str, general: str, titles: str
) -> None:
    train, test = questions(tmp_path / "a.jsonl", 30), questions(tmp_path / "b.jsonl", 6)
    Path(train).write_text(Path(train).read_text().replace("Which", "What"))
    own_card = card(tmp_path, PLAIN.format(per=""))
    plan = small_plan(tmp_path, tiny_base, general, titles)
    plan |= {
        "tasks": {"mine": {"data": [train], "test": [test], "task": own_card}},
        "arms": ["fresh"], "sizes": [4], "seeds": 1, "learning_rates": [0.03], "choices": [],
    }  # fmt: skip
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    study = run_study(
        StudySettings(
            plan=(str(path),), store=tmp_path / "store", out=tmp_path / "s", executor="inline",
            quiet=True,
        )
    )  # fmt: skip
    study.check()
    cell = study.results[-1]
    assert Manifest.read(Path(cell["adapter"])).labels is None
    alone = evaluate(
        EvaluateSettings(
            base=tiny_base, adapters=(cell["adapter"],), data=(test,), task=own_card,
            out=tmp_path / "e", quiet=True,
        )
    )  # fmt: skip
    own = alone.scores[cell["adapter"]]
    assert list(own) == ["accuracy"]
    assert own["accuracy"].mean == np.mean(cell["scores"]["accuracy"])


def test_rows_are_shown_with_their_choices(
    tmp_path: Path, tiny_base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = questions(tmp_path / "a.jsonl", 1)
    seen = see_rows(
        InspectSettings(base=tiny_base, data=(file,), task=card(tmp_path, PLAIN.format(per="")))
    )
    assert seen.first[0].choices == ("red", "a blue one")
    assert (seen.labels, seen.metrics) == ((), ("accuracy",))
    print_rows(seen, None)
    assert "«" in (shown := capsys.readouterr().out)
    assert "chosen from: red | a blue one" in shown


def test_training_rows_have_no_labels_to_choose_from(tmp_path: Path, tiny_base: str) -> None:
    train, test = questions(tmp_path / "a.jsonl", 6), questions(tmp_path / "b.jsonl", 2)
    task = card(tmp_path, PLAIN.format(per=""))
    adapter = tmp_path / "adapter"
    adapt(
        AdaptSettings(
            base=tiny_base, data=(train,), task=task, max_steps=1, out=adapter, quiet=True
        )
    )
    assert Manifest.read(adapter).labels is None
    with pytest.raises(SettingsError, match="--shots and labels alone"):
        evaluate(
            EvaluateSettings(
                base=tiny_base, data=(test,), task=task, training_data=(train,),
                out=tmp_path / "e", quiet=True,
            )
        )  # fmt: skip
