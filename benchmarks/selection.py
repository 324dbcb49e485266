"""Time and peak memory of `d2lora select` over pools of growing size.

    python benchmarks/selection.py --data ../shared/data --sizes 1000 10000 100000

A pool of real length is made from the shared general rows: each row is drawn again with a tenth of
its words replaced by others of the pool, so it is no near duplicate of its origin. Hygiene (with
contamination against GSM8K's test set) and choice run as one command in a process of its own, with
an empty cache. Prints a Markdown table; a run that fails or takes too long is a row, too.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import data_folder

METHODS = (("dsir", "base"), ("similar", "words"), ("similar", "base"))
REPLACED = 0.1


def main() -> None:
    """Measure every size and method, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=data_folder())
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--methods", nargs="+", default=[f"{m}/{e}" for m, e in METHODS])
    parser.add_argument("--limit-s", type=float, default=1800)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print("| rows | method | embedding | clean rows | seconds | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    for size in args.sizes:
        for named in args.methods:
            method, embedding = named.split("/")
            with tempfile.TemporaryDirectory() as folder:
                pool = Path(folder) / "pool.jsonl"
                write_pool(args.data / "general" / "train.jsonl", pool, size)
                row = measured(args, Path(folder), pool, size, method, embedding)
            print(f"| {size:,} | {method} | {embedding} | {row} |", flush=True)


def write_pool(source: Path, target: Path, size: int) -> None:
    """Write `size` rows of real length; rows beyond the source's are perturbed copies."""
    with source.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    words = [word for row in rows for word in row["prompt"].split()]
    rng = random.Random(0)
    with target.open("w", encoding="utf-8") as file:
        for number in range(size):
            row = dict(rows[number % len(rows)])
            if number >= len(rows):
                for field in ("prompt", "response"):
                    mixed = [
                        rng.choice(words) if rng.random() < REPLACED else word
                        for word in row[field].split(" ")
                    ]
                    row[field] = " ".join(mixed)
            file.write(json.dumps(row) + "\n")


def measured(
    args: argparse.Namespace, folder: Path, pool: Path, size: int, method: str, embedding: str
) -> str:
    """Run one selection apart; return clean rows, seconds and memory as table cells."""
    out = folder / "chosen"
    line = [
        sys.executable, "-m", "d2lora", "select", str(pool), "--for",
        str(args.data / "titles" / "train.jsonl"), "-m", str(min(2000, size // 4)),
        "--keep-out", str(args.data / "gsm8k" / "test.jsonl"), "--method", method,
        "--embedding", embedding, "--out", str(out), "--cache", str(folder / "cache"),
        "--threads", str(args.threads), "--quiet",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    started = time.perf_counter()
    process = subprocess.Popen(line, env=environment)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if time.perf_counter() - started > args.limit_s:
            process.kill()
            process.wait()
            return f"- | stopped after {args.limit_s:.0f} | -"
        time.sleep(0.2)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        return f"- | failed ({process.returncode}) | -"
    card: dict[str, Any] = json.loads((out / "card.json").read_text(encoding="utf-8"))
    peak = usage.ru_maxrss / 1024
    return f"{card['n_clean']:,} | {seconds:.0f} | {peak:.0f}"


if __name__ == "__main__":
    main()
