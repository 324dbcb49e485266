"""What a warm-up on many rows takes: time, memory and disk of `d2lora warmup` by rows.

    python benchmarks/large.py --rows 100000 1000000

Rows are those of a file of general data again and again, cut to some 100 tokens and numbered, so
that no two are the same; of a million, 5 optimizer steps. With `--keep-out` their contamination is
checked, too. Memory is the most that one process had resident. Prints a Markdown table.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

from common import environment, head, parser_of, row

PROMPT, RESPONSE = 240, 80
"""Characters of each at most."""


def main() -> None:
    """Run a warm-up for each count of rows and print the table."""
    parser = parser_of(__doc__, data="general/train.jsonl")
    parser.add_argument("--rows", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--keep-out", nargs="*", default=[])
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--validation-fraction", type=float, default=0.0)
    args = parser.parse_args()
    head("rows", "file, MB", "tokens a row", "s", "training, s", "memory, MB", "record, MB")
    for n in args.rows:
        with tempfile.TemporaryDirectory() as name:
            data, out = Path(name) / "rows.jsonl", Path(name) / "out"
            write(args.data, n, data)
            words = [
                "--base", args.base, "--data", data, "--out", out, "--max-steps", 5, "--device",
                "cpu", "--threads", args.threads, "--validation-fraction",
                args.validation_fraction, "--quiet",
            ]  # fmt: skip
            words += ["--keep-out", *args.keep_out] if args.keep_out else []
            elapsed_s, memory = measured(["warmup", *map(str, words)], args.threads)
            cost = json.loads((out / "done.json").read_text())["cost"]
            a_row = cost["n_tokens"] / (5 * 16)
            sizes = [file.stat().st_size / 1e6 for file in (data, out / "trained_rows.json")]
            row(
                f"{n:,}", f"{sizes[0]:.0f}", f"{a_row:.0f}", f"{elapsed_s:.0f}",
                f"{cost['elapsed_s']:.1f}", f"{memory / 1e6:.0f}", f"{sizes[1]:.1f}",
            )  # fmt: skip


def write(general: Path, n: int, path: Path) -> None:
    """Write n numbered rows."""
    rows = [json.loads(line) for line in general.open(encoding="utf-8")]
    with path.open("w", encoding="utf-8") as file:
        for number, values in enumerate(islice(cycle(rows), n)):
            prompt = f"{number}. {values['prompt'][:PROMPT]}"
            text = {"prompt": prompt, "response": values["response"][:RESPONSE]}
            file.write(json.dumps(text) + "\n")


def measured(words: list[str], threads: int) -> tuple[float, int]:
    """Run a command of d2lora; return the seconds and the bytes that it took."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "d2lora", *words], env=environment(threads))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"d2lora {' '.join(words)} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - started, usage.ru_maxrss * unit


if __name__ == "__main__":
    main()
