"""Scores against known pairs."""

import random
import re
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from d2lora.data.answers import flexible_answer, strict_answer, target_answer
from d2lora.data.ngrams import words
from d2lora.data.reading import read_task
from d2lora.errors import DataError
from d2lora.evaluation.metrics import METRICS, Scored
from d2lora.evaluation.metrics.answers import gsm8k
from d2lora.selection.tfidf import count_bags
from support import SHARED, needs_shared_data, read_rows, write_rows

# Each equals itself alone, whatever its value: outputs are compared as they are written.
NUMBERS = [
    "1", "6", "2", "12", "1/6", "1/2", "12:30", "12:45", "12:30:15", "−42", "42", "1 000",
    "1e3", "2.5e-4", "0.5", "2 1/2", "2½", "1,250.75", "1\u202f000\u202f000", "۷۷",
    "3⁄4", "３／８", "7∶2", "9：15",
]  # fmt: skip


def rouge(output: str, *references: str) -> dict[str, float]:
    """Score one output by ROUGE."""
    scores = METRICS["rouge"].score([Scored(output, references[0], references, {})])
    return {name: values[0] for name, values in scores.items()}


def authors_answer(text: str) -> str | None:
    """Return what grade_school_math/dataset.py extracts."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found[1].strip().replace(",", "") if found else None


def harness_answer(text: str) -> str | None:
    """Return what "flexible-extract" of lm_eval/tasks/gsm8k/gsm8k.yaml extracts and compares."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    if not found:
        return None
    answer: str = next(group for group in found[-1] if group)
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        answer = re.sub(ignored, "", answer)
    return answer


@pytest.mark.parametrize(
    ("output", "strict", "flexible"),
    [
        ("4 + 3 = 7\n#### 7", 1, 1),
        ("####7", 0, 1),
        ("#### $7", 0, 1),
        ("####  7", 0, 1),
        ("#### 7.00", 0, 0),
        ("#### 7.", 0, 1),
        ("The answer is 7.", 0, 1),
        ("The answer is 7", 0, 1),
        ("The answer is $7", 0, 1),
        ("7 of 9", 0, 0),
        ("#### 7 apples, of 9", 1, 0),
        ("#### 7/2", 0, 0),
        ("#### 2/7", 0, 0),
        ("#### 7:30", 0, 0),
        ("#### 70", 0, 0),
        ("#### -7", 0, 0),
        ("#### seven", 0, 0),
        ("", 0, 0),
        ("no number", 0, 0),
        ("#### 8\n#### 7", 0, 1),
    ],
)
def test_a_solution_is_scored_strictly_and_flexibly(
    output: str, strict: float, flexible: float
) -> None:
    scores = gsm8k(output, "3 + 4 = <<3+4=7>>7\n#### 7")
    assert scores == {"exact_match": strict, "exact_match_flexible": flexible}


@needs_shared_data
def test_real_answers_score_as_by_gsm8k_s_authors_and_lm_evaluation_harness() -> None:
    chance = random.Random(0)
    rows = read_rows(SHARED / "gsm8k" / "test.jsonl")
    rows += chance.sample(read_rows(SHARED / "gsm8k" / "train.jsonl"), 700)
    wrong = 0
    for row in rows:
        gold = row["answer"]
        body, _, number = gold.partition("#### ")
        wanted = authors_answer(gold)
        assert target_answer(gold) == strict_answer(gold) == flexible_answer(gold) == wanted
        other = chance.choice(rows)["answer"]
        outputs = [
            gold, body, other, f"####{number}", f"#### ${number}", f"#### {number}.",
            f"#### {number}.00", f"so it is ${number}.", f"#### {number}1", f"#### -{number}",
            f"{gold}\n#### 1", f"{body} {number} dollars", gold[: chance.randrange(len(gold))],
        ]  # fmt: skip
        for output in outputs:
            scores = gsm8k(output, gold)
            assert scores["exact_match"] == (authors_answer(output) == wanted), output
            flexible = harness_answer(output)
            assert scores["exact_match_flexible"] == (flexible == wanted), output
            wrong += scores["exact_match"] == 0
    assert wrong > len(rows)


def test_every_kind_of_number_equals_itself_alone() -> None:
    golds = [f"Said.\n#### {number}" for number in NUMBERS if number != "2½"]
    assert [target_answer(gold) is None for gold in golds] == [False] * len(golds)
    for gold in golds:
        for output in golds:
            scores = set(gsm8k(output.replace("Said.", "I say 3."), gold).values())
            assert scores == {float(output == gold)}, (output, gold)


def test_a_number_is_the_same_in_every_way_of_writing_it() -> None:
    same = {"−1,000": "-1000", "٣٫٥": "3.5", "４２": "42", "1 000": "1,000"}
    for one, other in same.items():
        assert gsm8k(f"#### {one}", f"#### {other}")["exact_match"] == 1
        assert gsm8k(f"#### {other}", f"#### {one}")["exact_match"] == 1


@pytest.mark.parametrize(
    "end",
    [
        "#### blue", "####", "####18", "#### $18", "#### 18 apples", "#### 1,5", "#### 3-4",
        "#### 1.2.3", "#### 18\n#### 19", "#### 50%", "#### 18\nDone.", "#### 18.",
        "#### 5 million",
    ],
)  # fmt: skip
def test_a_target_without_a_number_alone_is_a_bad_row(end: str, tmp_path: Path) -> None:
    good = {"question": "How many?", "answer": "She had 3 cats.\n#### 3"}
    data = write_rows(tmp_path / "d.jsonl", [good, {**good, "answer": f"She had 3 cats.\n{end}"}])
    with pytest.raises(DataError, match=r"d.jsonl, line 2: the answer must end in `#### N`"):
        read_task([data])


@given(st.text())
def test_reading_an_output_never_fails(text: str) -> None:
    gsm8k(text, "#### 1/2")
    gsm8k(f"#### {text}", "#### 7")
    rouge(text, text)


def test_flexible_takes_the_last_number() -> None:
    assert flexible_answer("I had 12, then 1,000.") == "1000"
    assert gsm8k("half past, so 12:30.", "#### 12:30")["exact_match_flexible"] == 1


@needs_shared_data
def test_english_titles_score_as_by_rouge_score() -> None:
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rows = read_rows(SHARED / "titles" / "test.jsonl") + read_rows(
        SHARED / "titles" / "train.jsonl"
    )
    english = [row for row in rows if (row["title"] + row["text"]).isascii()]
    assert len(english) > 200
    for row, other in pairwise(english):
        for output in (row["text"][:300], other["title"], f"“{row['title']}” — {other['title']}"):
            known = theirs.score(row["title"], output)
            assert rouge(output, row["title"]) == {k: s.fmeasure for k, s in known.items()}


SCRIPTS = {
    "Russian": ("Обучение на малых данных", "обучение на других данных", 3 / 4),
    "Persian": ("یادگیری با داده‌های کم", "یادگیری با داده‌های زیاد", 3 / 4),
    "Arabic with vowel signs": ("اللُّغَةُ العَرَبِيَّةُ", "اللُّغَةُ الفَارِسِيَّةُ", 1 / 2),
    "Hindi": ("हिन्दी में सीखना", "हिन्दी में पढ़ना", 2 / 3),
    "Japanese": ("学習する", "学習した", 1 / 2),
    "Katakana": ("データ", "データ", 1),
    "Chinese": ("小模型", "大模型", 2 / 3),
    "Thai": ("ดีมาก", "ดีใจ", 2 / 7),
    "Korean": ("작은 모델", "큰 모델", 1 / 2),
    "composed or not": ("café", unicodedata.normalize("NFD", "café"), 1),
    "Turkish": ("İzmir güzel", "İstanbul güzel", 1 / 2),
    "Yoruba, accents that are of no letter": ("ọ̀rọ̀ kan", "ọ́rọ́ kan", 1 / 2),
    "Russian with stress": ("за́мок у моря", "замо́к у моря", 2 / 3),
    "German": ("Größe der Häuser", "GRÖSSE der Häuser", 1),
    "emoji": ("🙂", "🙂", 1),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_rouge_tells_words_in_every_script(name: str) -> None:
    text, other, score = SCRIPTS[name]
    assert rouge(text, text)["rougeL"] == 1
    assert rouge(other, text)["rouge1"] == pytest.approx(score)
    assert rouge("другое слово", text)["rouge1"] == 0


def test_words_for_finding_repeats_hold_their_marks_in_every_script() -> None:
    assert words("हिन्दी में") == ["हिन्दी", "में"]
    assert words("العَرَبِيَّة!") == ["العَرَبِيَّة"]
    assert words("İstanbul'da за́мок") == ["i\u0307stanbul", "da", "за́мок"]
    assert words("学習 of Größe") == ["学", "習", "of", "grösse"]


def test_bags_of_words_tell_what_unspaced_and_accented_texts_share() -> None:
    bags = count_bags(["小模型", "大模型", "café", unicodedata.normalize("NFD", "café"), "हिन्दी"])
    assert (bags[0] @ bags[1].T).sum() == 2
    assert (bags[2] != bags[3]).nnz == 0
    assert bags[4].sum() == 1


def test_rouge_agrees_with_known_values() -> None:
    assert rouge("the cat sat", "the cat sat") == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert rouge("", "the cat sat")["rougeL"] == 0
    scores = rouge("the cat sat on the mat", "the cat lay on the mat")
    assert scores["rouge1"] == pytest.approx(5 / 6)
    assert scores["rouge2"] == pytest.approx(3 / 5)
    assert scores["rougeL"] == pytest.approx(5 / 6)
    assert rouge("sorting apples", "sorted apple")["rouge1"] == 1  # stemmed


@pytest.mark.parametrize("gap", [" ", "\u00a0", "\u2009", "\u202f"])
def test_a_target_in_groups_is_looked_for_in_groups(gap: str) -> None:
    scores = gsm8k(f"He has 1{gap}000.", "#### 1 000")
    assert scores == {"exact_match": 0.0, "exact_match_flexible": 1.0}
    assert gsm8k(f"He has 2{gap}000.", "#### 1 000")["exact_match_flexible"] == 0
