"""Scores against known pairs."""

import random
from decimal import Decimal

import pytest

from d2lora.metrics import as_number, exact_match, flexible_answer, rouge, strict_answer
from support import SHARED, needs_shared_data, read_rows


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,000", 1000), ("$1000", 1000), ("1000.0", 1000), ("-5", -5), ("-$5", -5), ("$-5", -5),
        ("12.", 12), ("0.50", Decimal("0.5")), ("1,234,567.25", Decimal("1234567.25")),
    ],
)  # fmt: skip
def test_numbers_are_compared_as_numbers(text: str, number: Decimal) -> None:
    assert as_number(text) == number
    assert strict_answer(f"so it is. #### {text}") == number


@pytest.mark.parametrize(
    ("output", "strict", "flexible"),
    [
        ("4 + 3 = 7\n#### 7", 1, 1),
        ("####7", 1, 1),
        ("#### $7.00", 1, 1),
        ("The answer is 7.", 0, 1),
        ("The answer is 7", 0, 1),
        ("7 of 9", 0, 0),
        ("#### 7 apples, of 9", 1, 0),
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
    scores = exact_match(output, "3 + 4 = <<3+4=7>>7\n#### 7")
    assert scores == {"exact_match": strict, "exact_match_flexible": flexible}


@needs_shared_data
def test_real_answers_score_right_and_perturbed_ones_wrong() -> None:
    chance = random.Random(0)
    rows = read_rows(SHARED / "gsm8k" / "train.jsonl")
    for row in chance.sample(rows, 1000):
        answer = row["answer"]
        right = strict_answer(answer)
        assert right is not None
        assert exact_match(answer, answer) == {"exact_match": 1, "exact_match_flexible": 1}
        thousands = f"reworded, the result is ${right:,}"
        assert exact_match(thousands, answer)["exact_match_flexible"] == 1
        assert exact_match(f"#### {right:,}.00", answer)["exact_match"] == 1
        for wrong in (right + 1, right * 10 + 1, -right - 1):
            changed = answer[: answer.rindex("####")] + f"#### {wrong}"
            assert exact_match(changed, answer) == {"exact_match": 0, "exact_match_flexible": 0}


def test_flexible_takes_the_last_number() -> None:
    assert flexible_answer("I had 12, then 1,000.") == 1000


def test_rouge_agrees_with_known_values() -> None:
    assert rouge("the cat sat", "the cat sat") == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert rouge("", "the cat sat")["rougeL"] == 0
    scores = rouge("the cat sat on the mat", "the cat lay on the mat")
    assert scores["rouge1"] == pytest.approx(5 / 6)
    assert scores["rouge2"] == pytest.approx(3 / 5)
    assert scores["rougeL"] == pytest.approx(5 / 6)
    assert rouge("sorting apples", "sorted apple")["rouge1"] == 1  # stemmed
