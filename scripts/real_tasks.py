"""Lay out the six tasks that the plan `real_tasks` reads, from public data sets.

    python scripts/real_tasks.py ../shared/data runs/real
    cd runs/real && d2lora study scarcity real_tasks smollm2

Titles, GSM8K, general rows and multiple choice are linked as they are. Written are, each with
train.jsonl and test.jsonl,

    svamp          question and answer, which ends in `#### N`
    banking        a customer's message and its intent
    restaurants    a meaning and a sentence that says it; of the test meanings the first reference
    slots          an utterance, and its intent and slots as JSON
"""

import argparse
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LINKED = ("titles", "gsm8k", "general", "forgetting")


def main() -> None:
    """Write and link the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", type=Path, help="folder of the public data sets")
    parser.add_argument("out", type=Path, help="folder to start studies in")
    args = parser.parse_args()
    data = args.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        link = data / name
        link.unlink(missing_ok=True)
        link.symlink_to((args.sets / name).resolve())
    for name, (kind, shown) in TASKS.items():
        for part in ("train", "test"):
            rows = list(shown(read(args.sets / name / f"{part}.{kind}")))
            path = data / name / f"{part}.jsonl"
            path.parent.mkdir(exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path.write_text("".join(lines), encoding="utf-8")
            print(f"{path}: {len(rows):,} rows")


def read(path: Path) -> list[Row]:
    """Read the rows of a published file."""
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file))
        if path.suffix == ".json":
            return json.load(file)
        return [json.loads(line) for line in file]


def svamp(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield word problems, their answers in the form of GSM8K."""
    for row in rows:
        question = f"{row['Body'].strip()} {row['Question'].strip()}"
        yield {"question": question, "answer": f"#### {row['Answer']:g}"}


def banking(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield messages with their intents."""
    for row in rows:
        prompt = f"Which intent does this message to a bank have?\n\n{row['text'].strip()}"
        yield {"prompt": prompt, "completion": row["category"].replace("_", " ")}


def restaurants(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield meanings with a sentence, each meaning once."""
    seen: set[str] = set()
    for row in rows:
        if row["mr"] not in seen:
            seen.add(row["mr"])
            prompt = f"Describe this restaurant in a sentence or two.\n\n{row['mr']}"
            yield {"prompt": prompt, "completion": row["ref"]}


def slots(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield utterances with their intent and slots as JSON."""
    for row in rows:
        answer = json.dumps({"intent": row["intent"], **row["slots"]}, ensure_ascii=False)
        prompt = f"Give the intent and the slots of this request as JSON.\n\n{row['utterance']}"
        yield {"prompt": prompt, "completion": answer}


TASKS: dict[str, tuple[str, Callable[[Iterable[Row]], Iterator[Row]]]] = {
    "svamp": ("json", svamp),
    "banking": ("csv", banking),
    "restaurants": ("csv", restaurants),
    "slots": ("jsonl", slots),
}


if __name__ == "__main__":
    main()
