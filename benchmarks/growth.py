"""How time grows: over the tokens of one training run, and over K runs in one process.

    python benchmarks/growth.py --tokens 10000 30000 100000 300000 1000000 --runs 1 2 4 8

The first table is K times `adapt` on 16 rows, the base loaded once; the second is one long `adapt`,
read off where it passes each count of tokens. On the embedded base, or one of another `--base`
size. Memory is the most that the process used so far. Prints two Markdown tables.
"""

import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import base_of, head, parser_of, row

SMALL = 16


def main() -> None:
    """Measure both and print the tables."""
    parser = parser_of(__doc__)
    counts = [10_000, 30_000, 100_000, 300_000, 1_000_000]
    parser.add_argument("--tokens", nargs="+", type=int, default=counts)
    parser.add_argument("--runs", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--base", default="embedded")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        args.base = base_of(args.base, Path(name), args.data)
        over_runs(args, Path(name))
        print()
        over_tokens(args, Path(name))


def adapt(args: Any, out: Path, base: Any, **more: Any) -> Any:
    """Run `adapt` as the command does."""
    from d2lora import adaptation
    from sides import settings_of

    settings = settings_of(args.base, args.data, 1, args.threads)
    return adaptation.adapt(settings.changed(out=out, **more), base)


def over_runs(args: Any, folder: Path) -> None:
    """Print the table of K runs."""
    import torch

    from d2lora.adapters.base import load_base
    from d2lora.training.cost import peak_memory_bytes
    from sides import settings_of

    base = load_base(settings_of(args.base, args.data, 1, args.threads))
    adapt(args, folder / "first", base, n=SMALL, max_steps=1)  # warms up
    head("runs in one process", "s", "s a run", "peak memory, MB")
    for k in args.runs:
        started = time.perf_counter()
        for number in range(k):
            out = folder / f"{k}-{number}"
            adapt(args, out, base, n=SMALL, max_steps=None, epochs=2.0, seed=number)
        elapsed_s = time.perf_counter() - started
        memory = peak_memory_bytes(torch.device("cpu")) / 1e6
        row(k, f"{elapsed_s:.2f}", f"{elapsed_s / k:.2f}", f"{memory:.0f}")


def over_tokens(args: Any, folder: Path) -> None:
    """Print the table of one long run."""
    import torch

    from d2lora.training.cost import peak_memory_bytes
    from sides import BATCH, prepared, settings_of

    _, _, examples, encoder = prepared(settings_of(args.base, args.data, 100, args.threads))
    a_row = statistics.mean(encoder.encode(example).n_tokens for example in examples)
    out = folder / "long"
    adapt(args, out, None, max_steps=math.ceil(1.05 * max(args.tokens) / (BATCH * a_row)))
    log = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    head("tokens", "steps", "s", "tokens/s")
    for count in sorted(args.tokens):
        passed = next(line for line in log if line["n_tokens"] >= count)
        speed = passed["n_tokens"] / passed["elapsed_s"]
        row(f"{count:,}", passed["step"], f"{passed['elapsed_s']:.1f}", f"{speed:.0f}")
    print(f"\nPeak memory {peak_memory_bytes(torch.device('cpu')) / 1e6:.0f} MB.")


if __name__ == "__main__":
    main()
