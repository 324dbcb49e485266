"""Metrics that cards name, against their reference implementations."""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from d2lora import EvaluateSettings
from d2lora.errors import D2LoraError, DataError, SettingsError
from d2lora.evaluation.counts import Column, Counts, per_row
from d2lora.evaluation.metrics import (
    METRICS,
    Scored,
    main_column,
    measure_all,
    metric_named,
    metrics_named,
    title_of,
)
from d2lora.evaluation.stats import difference_of, interval_of, mean_interval, paired_difference
from d2lora.evaluation.test_sets import TestSets
from support import SHARED, needs_shared_data, write_rows

WORDS = st.lists(
    st.sampled_from(["Red", "red", "cat's", "cats", "a", "The", "an", "x-y", "xy", "!", "７"]),
    max_size=6,
).map(lambda words: " ".join([*words, "end"]))


def scored(output: str, *references: str, **row: Any) -> Scored:
    return Scored(output, references[0], references, row)


def score(name: str, output: str, *references: str) -> float:
    """Return the main score of one row."""
    return next(iter(metric_named(name).score([scored(output, *references)]).values()))[0]


def mean(name: str, rows: Sequence[Scored]) -> float:
    """Return the main score of several rows, as the mean that every report takes."""
    return float(np.mean(next(iter(metric_named(name).score(rows).values()))))


def labelled(generator: np.random.Generator, n: int, labels: Sequence[str]) -> list[Scored]:
    """Rows of labels of unequal frequency, of which some are mistaken."""
    weights = np.arange(1, len(labels) + 1) / sum(range(1, len(labels) + 1))
    targets = generator.choice(labels, n, p=weights)
    outputs = np.where(generator.random(n) < 0.7, targets, generator.choice(labels, n))
    return [scored(str(o), str(t)) for o, t in zip(outputs, targets, strict=True)]


def sentences(generator: np.random.Generator, n: int) -> list[Scored]:
    """Rows of sentences with one to three references, and outputs that share words with them."""
    words = "the a cat dog sat lay on under mat table red old and then slept".split()
    rows = []
    for _ in range(n):
        reference = generator.choice(words, generator.integers(5, 12))
        others = [generator.choice(words, 6) for _ in range(generator.integers(0, 3))]
        kept = generator.random(len(reference)) < 0.8
        output = np.where(kept, reference, generator.choice(words, len(reference)))
        rows.append(scored(*(" ".join(text) for text in (output, reference, *others))))
    return rows


def test_every_metric_has_its_main_score_first_and_gives_1_to_the_gold_answer() -> None:
    gold = '{"a": [1, "x y z w"]}\n#### 7'
    for name, metric in METRICS.items():
        answer = gold if name == "gsm8k" else gold.partition("\n")[0]
        scores = metric.score([scored(answer, answer)] * 3)
        assert tuple(scores) == metric.columns
        for values in scores.values():
            assert values == pytest.approx([1, 1, 1]), name
        assert title_of(metric.columns[0]) == metric.title


def squad_words(text: str) -> list[str]:
    """Return the words of what `normalize_answer` of SQuAD's evaluate-v1.1.py gives."""
    lower = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", lower).split()


def squad_f1(prediction: str, truth: str) -> float:
    """Return what `f1_score` of SQuAD's evaluate-v1.1.py gives."""
    found, wanted = squad_words(prediction), squad_words(truth)
    n_same = sum((Counter(found) & Counter(wanted)).values())
    if n_same == 0:
        return 0
    precision, recall = n_same / len(found), n_same / len(wanted)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("output", "references", "exact", "f1"),
    [
        ("Denver Broncos", ("Denver Broncos", "the Broncos"), 1, 1),
        ("The Denver Broncos!", ("Denver Broncos",), 1, 1),
        ("Broncos", ("Denver Broncos",), 0, 2 / 3),
        ("the Carolina Panthers", ("Denver Broncos",), 0, 0),
        ("Santa Clara, California", ("Levi's Stadium", "Santa  Clara"), 0, 4 / 5),
        ("Levis Stadium", ("Levi's Stadium",), 1, 1),
        ("", ("Denver Broncos",), 0, 0),
        ("a cat a cat", ("cat",), 0, 2 / 3),
        ("a theory", ("theory",), 1, 1),
    ],
)
def test_answers_are_compared_as_in_squad(
    output: str, references: tuple[str, ...], exact: float, f1: float
) -> None:
    assert score("exact_match", output, *references) == exact
    assert score("token_f1", output, *references) == pytest.approx(f1)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_any_answers_are_compared_as_by_squad_s_script(output: str, references: list[str]) -> None:
    best = max(squad_f1(output, reference) for reference in references)
    same = squad_words(output) in map(squad_words, references)
    assert score("token_f1", output, *references) == pytest.approx(best)
    assert score("exact_match", output, *references) == same


@pytest.mark.parametrize(("output", "right"), [("A", 1), ("a.", 1), ("", 0), ("the", 0), ("B", 0)])
def test_an_answer_that_is_an_article_is_not_equal_to_nothing(output: str, right: float) -> None:
    assert score("exact_match", output, "A") == right
    assert score("token_f1", output, "A") == right


def test_accuracy_compares_texts_as_they_are() -> None:
    assert score("accuracy", " card_arrival\n", "card_arrival") == 1
    assert score("accuracy", "Card_arrival", "card_arrival") == 0
    assert score("accuracy", "b", "a", "b") == 1


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_f1_of_labels_is_scikit_learn_s(average: str) -> None:
    generator = np.random.default_rng(0)
    rows = labelled(generator, 300, list("abcdefgh"))
    rows += [scored("no label", "a"), scored("never a target", "b")]
    outputs, targets = [r.output for r in rows], [r.target for r in rows]
    assert mean(f"{average}_f1", rows) == pytest.approx(f1_score(targets, outputs, average=average))
    assert mean("micro_f1", rows) == pytest.approx(accuracy_score(targets, outputs))


@pytest.mark.parametrize("average", ["macro", "micro"])
@pytest.mark.parametrize("labels", [list("abcde"), list(range(5))])
def test_a_row_may_have_several_labels(average: str, labels: list[Any]) -> None:
    generator = np.random.default_rng(1)
    sets = [
        [[label for label in labels if generator.random() < 0.4] for _ in range(100)]
        for _ in range(2)
    ]
    targets, outputs = map(MultiLabelBinarizer(classes=labels).fit_transform, sets)
    rows = [scored(json.dumps(o), json.dumps(t)) for t, o in zip(*sets, strict=True)]
    assert mean(f"{average}_f1", rows) == pytest.approx(f1_score(targets, outputs, average=average))


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_bleu_and_chrf_are_sacrebleu_s(name: str) -> None:
    rows = sentences(np.random.default_rng(2), 60)
    rows.append(scored("", "an empty output"))
    outputs = [row.output for row in rows]
    streams = list(zip_longest(*(row.references for row in rows)))
    theirs = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name]
    assert mean(name, rows) == pytest.approx(theirs(outputs, streams).score / 100)
    assert mean(name, [scored("a text", "")]) == 0


def test_rouge_takes_the_best_reference_as_rouge_score_does() -> None:
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    for one in sentences(np.random.default_rng(3), 30):
        row = one._replace(output=one.output.replace("and", "\n"))
        known = theirs.score_multi(row.references, row.output)
        scores = measure_all(metrics_named(["rouge", "rougeLsum"]), [row])
        assert {name: column[0] for name, column in scores.items()} == {
            name: known[name].fmeasure for name in scores
        }


@pytest.mark.parametrize(
    ("output", "target", "valid", "match"),
    [
        ('{"a": 1, "b": [true, null]}', '{"b": [true, null], "a": 1.0}', 1, 1),
        ('{"a": 1}', '{"a": true}', 1, 0),
        ("[1, 2]", "[2, 1]", 1, 0),
        ("[0]", "[false]", 1, 0),
        ("1e2", "100", 1, 1),
        ("9007199254740993", "9007199254740992", 1, 0),
        ('"\\u00e9"', '"é"', 1, 1),
        (' {"a": 1}\n', '{"a": 1}', 1, 1),
        ('{"a": 1', '{"a": 1}', 0, 0),
        ('Here: {"a": 1}', '{"a": 1}', 0, 0),
        ("NaN", "1", 0, 0),
        ("", "1", 0, 0),
        ("[" * 100_000, "[]", 0, 0),
        ("1" * 5_000, "1", 0, 0),
    ],
)
def test_json_is_compared_by_what_it_says(
    output: str, target: str, valid: float, match: float
) -> None:
    assert score("json_valid", output, target) == valid
    assert score("json_match", output, target) == match
    assert score("json_match", output, '"another"', target) == match


def test_slots_are_scored_by_name_and_value_over_all_rows() -> None:
    rows = [
        scored('{"city": "Inman", "size": 5}', '{"size": 5.0, "city": "Inman"}'),
        scored('{"city": "Oslo", "sort": "best"}', '{"city": "Inman"}'),
        scored("no JSON", '{"a": {"b": [1]}, "c": 2}'),
        scored("{}", "{}"),
        scored('{"x": 1}', '{"y": 1}', '{"x": 1}'),
        scored('{"a": {"b": 1, "c": 2}}', '{"a": {"c": 3, "b": 1}}'),
    ]
    right, found, wanted = 2 + 0 + 0 + 0 + 1 + 1, 2 + 2 + 0 + 0 + 1 + 2, 2 + 1 + 2 + 0 + 1 + 2
    assert mean("slot_f1", rows) == pytest.approx(2 * right / (found + wanted))


def test_right_answers_that_are_not_json_are_refused_by_row() -> None:
    rows = [scored("1", "1"), scored("1", "one")]
    with pytest.raises(DataError, match=r"json_match: every .* JSON:\n  - test row 2: 'one'"):
        metric_named("json_match").score(rows)
    with pytest.raises(DataError, match=r"slot_f1: every .* JSON object:\n  - test row 1: '1'"):
        metric_named("slot_f1").score(rows[:1])


MAKERS = {
    "macro_f1": lambda g, n: labelled(g, n, list("abcde")),
    "micro_f1": lambda g, n: [
        scored(json.dumps([*r.output, "z"][: g.integers(1, 3)]), json.dumps([r.target, "z"]))
        for r in labelled(g, n, list("abcde"))
    ],
    "slot_f1": lambda g, n: [
        scored(*(json.dumps({k: 1 for k in "abc" if g.random() < 0.6}) for _ in range(2)))
        for _ in range(n)
    ],
    "bleu": sentences,
    "chrf": sentences,
}
"""Each metric that is no mean of rows, with random rows for it."""


def column_of(name: str, rows: Sequence[Scored]) -> Column:
    return metric_named(name).measure(rows)[name]


@pytest.mark.parametrize("name", MAKERS)
def test_shares_have_the_score_as_their_mean_and_the_bootstrap_s_variance(name: str) -> None:
    rows = MAKERS[name](np.random.default_rng(4), 400)
    column = column_of(name, rows)
    assert isinstance(column, Counts)
    shares = column.shares()
    assert shares.mean() == pytest.approx(column.score, abs=1e-12)
    generator = np.random.default_rng(5)
    times = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=4000)
    resampled = column.of_sums(times @ column.rows)
    assert shares.var(ddof=1) / len(rows) == pytest.approx(resampled.var(), rel=0.05)


@pytest.mark.parametrize("name", MAKERS)
def test_a_resample_scores_as_its_rows_do(name: str) -> None:
    rows = MAKERS[name](np.random.default_rng(6), 30)
    column = column_of(name, rows)
    assert isinstance(column, Counts)
    drawn = np.random.default_rng(7).integers(0, 30, 30)
    sums = column.rows[drawn].sum(axis=0)[None]
    own = column_of(name, [rows[index] for index in drawn])
    assert isinstance(own, Counts)
    assert column.of_sums(sums)[0] == pytest.approx(own.score)


def test_shares_of_a_mean_are_the_values() -> None:
    values = np.random.default_rng(8).random(50)
    of_mean = Counts(np.stack([values, np.ones(50)], axis=1), lambda sums: sums[:, 0] / sums[:, 1])
    assert of_mean.shares() == pytest.approx(values)
    assert interval_of(of_mean).mean == pytest.approx(values.mean())
    assert interval_of(of_mean).low == pytest.approx(mean_interval(values).low)


def test_one_row_has_the_score_of_all() -> None:
    assert metric_named("macro_f1").score([scored("a", "b")]) == {"macro_f1": [0]}
    assert metric_named("slot_f1").score([scored('{"a": 1}', '{"a": 1}')]) == {"slot_f1": [1]}


def test_shares_have_the_variance_of_the_score_over_other_test_sets() -> None:
    generator = np.random.default_rng(9)
    sets = [column_of("macro_f1", labelled(generator, 100, list("abc"))) for _ in range(400)]
    shares = np.array([per_row(column) for column in sets])
    foreseen = (shares.var(axis=1, ddof=1) / 100).mean()
    assert foreseen == pytest.approx(shares.mean(axis=1).var(ddof=1), rel=0.2)


def test_a_paired_difference_of_macro_f1_is_bootstrapped_over_rows() -> None:
    generator = np.random.default_rng(10)
    rows = labelled(generator, 400, list("abcde"))
    better = [row._replace(output=row.target) if generator.random() < 0.3 else row for row in rows]
    first, second = column_of("macro_f1", rows), column_of("macro_f1", better)
    difference = difference_of(first, second)
    assert isinstance(first, Counts)
    assert isinstance(second, Counts)
    assert difference.mean == pytest.approx(second.score - first.score)
    assert 0 < difference.low < difference.mean < difference.high
    shares = paired_difference(first.shares()[None], second.shares()[None])
    assert difference.low == pytest.approx(shares.low, abs=0.01)
    assert difference.high == pytest.approx(shares.high, abs=0.01)
    same = difference_of(first, first)
    assert (same.mean, same.low, same.high) == (0, -3 / 400, 3 / 400)


def test_all_right_is_not_certainty_for_macro_f1_either() -> None:
    column = column_of("macro_f1", [scored(label, label) for label in "abcab" * 10])
    interval = interval_of(column)
    assert interval.mean == 1
    assert interval.low < 0.95


OWN = """
from dataclasses import dataclass

@dataclass
class Length:
    words: int

def short(prediction, row):
    return len(prediction) <= row["most"]

def both(prediction, row):
    return {"words": Length(len(prediction.split())).words / 10, "short": short(prediction, row)}

def divided(prediction, row):
    return 1 / len(prediction)  # an empty output

def odd(prediction, row):
    return float("nan") if prediction == "b" else 0.5

def text(prediction, row):
    return "good"

def changing(prediction, row):
    return {prediction: 1}

def output(prediction, row):
    return 1

def alone(prediction):
    return 1

def big(prediction, row):
    return 10**400

def leaving(prediction, row):
    raise SystemExit
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_metric.py").write_text(OWN, encoding="utf-8")
    return tmp_path


def test_a_function_of_a_file_is_a_metric(own: Path) -> None:
    rows = [scored("ab", "", most=2), scored("a b c", "", most=2)]
    name = "mine/my_metric.py:short"
    assert metric_named(name, own).score(rows) == {"short": [1, 0]}
    assert metric_named(f"{own}/{name}").columns == ("short",)
    scores = measure_all(metrics_named(["accuracy", "mine/my_metric.py:both"], own), rows)
    assert {column: list(values) for column, values in scores.items()} == {
        "accuracy": [0, 0],
        "words": [0.1, 0.3],
        "short": [1, 0],
    }
    assert main_column(["rouge1", "short"]) == title_of("rouge1") == "rouge1"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("divided", r"test row 2: ZeroDivisionError: .*\n  .*my_metric.py, line 15, in divided\n"
                    r"    return 1 / len\(prediction\)"),
        ("odd", r"finite number for odd of test row 3, found nan"),
        ("text", r"finite number for text of test row 1, found 'good'"),
        ("changing", r"same scores of every row, found a of test row 1 and  of test row 2"),
        ("alone", r"expected a function of the prediction and the row, found alone\(prediction\)"),
        ("shorts", r"has no function `shorts`. Did you mean `short`\?"),
        ("output", r"a score cannot be named `output`"),
        ("big", r"expected a finite number for big of test row 1, found 10000"),
        ("leaving", r"failed on test row 1: SystemExit"),
    ],
)  # fmt: skip
def test_what_a_function_does_wrong_is_said_with_its_row_and_line(
    own: Path, function: str, message: str
) -> None:
    rows = [scored(output, "") for output in ("a", "", "b")]
    with pytest.raises(SettingsError, match=message):
        measure_all(metrics_named([f"mine/my_metric.py:{function}"], own), rows)


def test_what_a_metric_refuses_is_refused_before_anything_is_generated(own: Path) -> None:
    data = write_rows(own / "d.jsonl", [{"prompt": "a", "completion": text} for text in "ab"])
    for metric, message in (
        ("mine/my_metric.py:short", r"failed on test row 1: KeyError: 'most'"),
        ("json_match", r"test row 2: 'b'"),
    ):
        card = own / "card.yaml"
        card.write_text(f"metrics: [{metric}]\n", encoding="utf-8")
        settings = EvaluateSettings(data=(data,), task=str(card), out=own / "out", quiet=True)
        with pytest.raises(D2LoraError, match=message):
            TestSets.read(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def score(prediction, row)\n", r"SyntaxError: .*\n  .*bad.py, line 1\n    def score"),
        ("import no_such\n", r"ModuleNotFoundError: .*\n  .*bad.py, line 1, in <module>\n    imp"),
    ],
)
def test_a_file_that_cannot_be_run_is_shown_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "bad.py").write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=message):
        metric_named("bad.py:score", tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["macrof1"], r"unknown metric `macrof1`. Did you mean `macro_f1`\?"),
        (["gsm8k", "exact_match"], r"`gsm8k` and `exact_match` both give `exact_match`"),
        (["accuracy", "accuracy"], r"`accuracy` and `accuracy` both give `accuracy`"),
        (["my_metric.py"], r"expected a file and its function, as in `my_metric.py:score`"),
        (["nowhere.py:score"], r"nowhere.py: no such file"),
    ],
)
def test_metrics_that_cannot_be_used_are_refused_by_name(names: list[str], message: str) -> None:
    with pytest.raises(D2LoraError, match=message):
        metrics_named(names)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_what_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2lora.runtime.extras.find_spec", {}.get)
    with pytest.raises(SettingsError, match=rf"metric `{name}` needs .* 'd2lora\[metrics\]'"):
        metric_named(name)


def test_scores_are_finite_numbers_for_any_output() -> None:
    odd = ["", " ", "[", "null", "\ud800", "🙂", "the", "####", "\x00", '[1, "a"]', "[]"]
    for name, metric in METRICS.items():
        target = '{"a": 1}' if name != "gsm8k" else "#### 1"
        scores = metric.score([scored(output, target) for output in odd])
        assert all(math.isfinite(v) for values in scores.values() for v in values), name


@needs_shared_data
def test_published_slots_are_right_as_they_are_and_wrong_as_each_other() -> None:
    lines = (SHARED / "slots" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    slots = [json.dumps(json.loads(line)["slots"]) for line in lines]
    assert mean("slot_f1", [scored(one, one) for one in slots]) == 1
    other = mean("slot_f1", [scored(a, b) for a, b in pairwise(slots)])
    assert 0 < other < 0.5
