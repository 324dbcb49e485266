"""Preference pairs by sampling: gold against what the model gets wrong."""

from pathlib import Path
from typing import Any

import pytest

from d2lora import AdaptSettings, DataError, PairsSettings, WarmStart, adapt, make_pairs
from d2lora.data.reading import read_task
from d2lora.data.rows import Example, user
from d2lora.evaluation.metrics.answers import gsm8k
from d2lora.tools.pairs import _pair, _Sample
from support import read_rows, write_rows

RIGHT, OTHER, WRONG, WORSE = "4 #### 4", "2 + 2 = 4 #### 4", "5 #### 5", "#### 6"


def made(out: Path, base: str, data: str, **changes: Any):
    settings = {"samples": 3, "n": 6, "max_new_tokens": 12, "quiet": True, **changes}
    return make_pairs(PairsSettings(base=base, data=(data,), out=out, **settings))


def pair(*samples: str, best_sample: bool = False) -> dict[str, Any] | None:
    def score(text: str, example: Example) -> float:
        return gsm8k(text, example.completion)["exact_match"]

    example = Example(user("2 + 2?"), RIGHT)
    scored = [_Sample(text, score(text, example)) for text in samples]
    return _pair(example, scored, score, best_sample=best_sample)


def test_the_worst_sample_is_rejected_and_gold_is_chosen() -> None:
    row = pair(RIGHT, WRONG, WORSE)
    assert row is not None
    assert row["chosen"][0]["content"] == RIGHT
    assert row["rejected"][0]["content"] in (WRONG, WORSE)
    assert (row["score_chosen"], row["score_rejected"], row["chosen_is"]) == (1, 0, "gold")


def test_a_right_sample_is_chosen_where_asked() -> None:
    row = pair(OTHER, WRONG, best_sample=True)
    assert row is not None
    assert (row["chosen"][0]["content"], row["chosen_is"]) == (OTHER, "sample")
    fallen_back = pair(WRONG, best_sample=True)
    assert fallen_back is not None
    assert fallen_back["chosen_is"] == "gold"


@pytest.mark.parametrize("samples", [(RIGHT, OTHER), ("", "  "), ()])
def test_a_prompt_without_a_worse_sample_gives_no_pair(samples: tuple[str, ...]) -> None:
    assert pair(*samples) is None


def test_pairs_are_made_again_alike_and_train(
    tmp_path: Path, tiny_base: str, problems: str, warm_start: WarmStart
) -> None:
    adapter = str(warm_start.path)
    first = made(tmp_path / "1", tiny_base, problems, adapter=adapter)
    second = made(tmp_path / "2", tiny_base, problems, adapter=adapter)
    other = made(tmp_path / "3", tiny_base, problems, adapter=adapter, seed=5)
    texts = [m.path.read_text(encoding="utf-8") for m in (first, second, other)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    data = read_task([str(first.path)])
    gold = {e.prompt: e.completion for e in read_task([problems]).examples}
    assert len(data.examples) == first.n_pairs > 0
    for example in data.examples:
        assert gold[example.prompt] == example.completion
        assert example.rejected
        assert gsm8k(example.rejected, example.completion)["exact_match"] == 0
    trained = adapt(
        AdaptSettings(
            base=tiny_base, data=(str(first.path),), init=adapter, objective="dpo", max_steps=2,
            out=tmp_path / "a", quiet=True,
        )
    )  # fmt: skip
    assert trained.manifest.reference == "warm_start"


def test_titles_give_pairs_whose_rejected_title_is_worse(
    tmp_path: Path, tiny_base: str, titles: str
) -> None:
    rows = read_rows(made(tmp_path / "1", tiny_base, titles).path)
    assert rows
    assert all(row["score_rejected"] < row["score_chosen"] == 1 for row in rows)


def test_rows_without_gold_answers_are_refused(tmp_path: Path, tiny_base: str) -> None:
    data = write_rows(tmp_path / "text.jsonl", [{"text": "Once upon a time."}])
    with pytest.raises(DataError, match="no open answers"):
        made(tmp_path / "1", tiny_base, data, n=None)
