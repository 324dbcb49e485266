"""Lay out the files that the plans `real` and `selection_real` read, from public data sets.

    python scripts/real_pools.py ../shared/data runs/real
    cd runs/real && d2lora study selection_real

Files are linked where they are used as they are. New ones are

    titles/few.jsonl       the last 16 training titles, for methods that look at the task
    titles/train.jsonl     the training titles without these
    general/poor.jsonl     the general rows, each with the answer of another row
    general/narrow.jsonl   the general rows of the sources named `app_reviews`, one kind of text
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

N_FEW = 16
NARROW = "app_reviews"


def main() -> None:
    """Write and link the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", type=Path, help="folder of the public data sets")
    parser.add_argument("out", type=Path, help="folder to start studies in")
    args = parser.parse_args()
    data = args.out / "data"
    for name in ("general/train", "general/valid", "titles/test", "forgetting/test"):
        link = data / f"{name}.jsonl"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((args.sets / f"{name}.jsonl").resolve())
    titles, general = (rows_of(args.sets / f"{name}/train.jsonl") for name in ("titles", "general"))
    write(data / "titles" / "few.jsonl", titles[-N_FEW:])
    write(data / "titles" / "train.jsonl", titles[:-N_FEW])
    answers = [row["response"] for row in general]
    random.Random(0).shuffle(answers)
    poor = [{**row, "response": answer} for row, answer in zip(general, answers, strict=True)]
    write(data / "general" / "poor.jsonl", poor)
    narrow = [row for row in general if row["source"].startswith(NARROW)]
    write(data / "general" / "narrow.jsonl", narrow)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSONL."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
