"""Lay out rows to choose defaults on, so that no test file is opened for it.

    python scripts/dev_rows.py data --rows 48 --out dev

The last rows of each public training file go to `dev/NAME-dev`, those before them to `dev/NAME`,
for the plan `lengths`.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILES = ("restaurants/train.csv", "svamp/train.json", "slots/train.jsonl")


def main() -> None:
    """Write two files for each training file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("dev"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        path = args.data / name
        rows = read(path)
        task = path.parent.name
        write(args.out / f"{task}-dev{path.suffix}", rows[-args.rows :])
        write(args.out / f"{task}{path.suffix}", rows[: -args.rows])


def read(path: Path) -> list[Any]:
    """Return the rows of a file, as its publisher shapes it."""
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file))
        return json.load(file) if path.suffix == ".json" else [json.loads(line) for line in file]


def write(path: Path, rows: Sequence[Any]) -> None:
    """Write rows in the same shape."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            table.writerows(rows)
        elif path.suffix == ".json":
            json.dump(rows, file, ensure_ascii=False)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main()
