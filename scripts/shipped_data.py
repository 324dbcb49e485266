"""Write the rows that come with d2lora, for the demo, from public data sets.

    python scripts/shipped_data.py ../shared/data src/d2lora/shipped

    titles   the shortest abstracts of the training and of the test set, with their titles (CC0)
    gsm8k    the shortest word problems of the test set, with worked solutions (MIT)

Rows are taken as they are, in the order of their file; short ones, so that a step takes seconds on
a CPU. A title of fewer than three words is left out.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

N_TRAIN, N_TEST, N_GENERAL = 80, 48, 8
MIT = """MIT License

Copyright (c) 2021 OpenAI

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""
CC0 = "CC0 1.0 Universal, https://creativecommons.org/publicdomain/zero/1.0/\n"
TITLES = """Abstracts of arXiv with their titles: metadata of arXiv, which are CC0
(https://info.arxiv.org/help/license), as collected in
https://github.com/kanishkautag/Fine-Tuning-GPT-2-for-Research-Paper-Title-Generation and
https://github.com/gcunhase/ArXivAbsTitleDataset. Taken are the shortest {n_train} of 513 training
rows and the shortest {n_test} of 220 test rows."""
GSM8K = """Word problems with worked solutions, of https://github.com/openai/grade-school-math
(GSM8K, MIT, see LICENSE). Taken are the shortest {n_general} of the 1,319 test rows. The warm start
that comes with d2lora was trained on none of them."""


def main() -> None:
    """Write the rows, each set with its origin and licence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", type=Path, help="folder of the public data sets")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()
    counts = {"n_train": N_TRAIN, "n_test": N_TEST, "n_general": N_GENERAL}
    titles, problems = args.sets / "titles", args.sets / "gsm8k"
    parts = {
        "train": [r for r in read(titles / "train.jsonl") if len(r["title"].split()) >= 3],
        "test": [r for r in read(titles / "test.jsonl") if len(r["title"].split()) >= 3],
    }
    files = {
        "train.jsonl": shortest(parts["train"], N_TRAIN),
        "test.jsonl": shortest(parts["test"], N_TEST),
    }
    write(args.out / "titles", files, TITLES.format(**counts), CC0)
    files = {"test.jsonl": shortest(read(problems / "test.jsonl"), N_GENERAL)}
    write(args.out / "gsm8k", files, GSM8K.format(**counts), MIT)


def read(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def shortest(rows: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """Return the n rows of the fewest characters, in their order."""
    chosen = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i].values())))[:n]
    return [rows[index] for index in sorted(chosen)]


def write(folder: Path, files: dict[str, list[dict[str, Any]]], origin: str, licence: str) -> None:
    """Write files of rows with their origin, their SHA-256 and their licence."""
    folder.mkdir(parents=True, exist_ok=True)
    table = ["| file | rows | sha256 |", "|---|---|---|"]
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
        table.append(f"| {name} | {len(rows)} | {hashlib.sha256(text.encode()).hexdigest()} |")
    lines = "\n".join(table)
    (folder / "ORIGIN.md").write_text(f"{origin}\n\n{lines}\n", encoding="utf-8")
    (folder / "LICENSE").write_text(licence, encoding="utf-8")


if __name__ == "__main__":
    main()
