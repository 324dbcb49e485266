"""The rows that benchmarks run on: public ones where they are laid out, else made ones."""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from d2lora.embedded import choice_rows, general_rows, title_rows, word_problem_rows
from d2lora.embedded.skills import with_wrong_answers

REPOSITORY = Path(__file__).parent.parent
PUBLIC = Path(os.environ.get("D2LORA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
MADE = REPOSITORY / "build" / "benchmark-rows"


@cache
def data_folder() -> Path:
    """Return the folder of public rows; where there is none, one with made rows in its shape.

    Made rows are those of the embedded base's small world, shorter than public ones, so that ratios
    measured on them are others than those of the README.
    """
    if PUBLIC.is_dir():
        return PUBLIC
    print(
        f"{PUBLIC} is not there (D2LORA_SHARED_DATA names another folder): running on made rows, "
        f"which are shorter; they are in {MADE}",
        file=sys.stderr,
    )
    done = MADE / "done"
    if done.exists():
        return MADE
    answered = list(general_rows("train", 2000))
    wrong = with_wrong_answers(answered)
    files: dict[str, Iterable[Mapping[str, object]]] = {
        "gsm8k/train.jsonl": word_problem_rows("train", 2000),
        "gsm8k/test.jsonl": word_problem_rows("test", 500),
        "titles/train.jsonl": title_rows("train", 500),
        "titles/test.jsonl": title_rows("test", 200),
        "general/train.jsonl": [
            {"prompt": row["prompt"], "response": row["completion"], "source": row["source"]}
            for row in answered
        ],
        "forgetting/test.jsonl": choice_rows(200),
        "preferences/train.jsonl": [
            {
                "prompt": right["prompt"],
                "chosen": right["completion"],
                "rejected": one["completion"],
            }
            for right, one in zip(answered, wrong, strict=True)
            if right["completion"] != one["completion"]
        ],
    }
    for name, rows in files.items():
        path = MADE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(lines, encoding="utf-8")
    done.touch()
    return MADE
