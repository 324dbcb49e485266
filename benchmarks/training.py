"""Training against TRL's SFTTrainer + PEFT: time, peak memory and the losses of both sides.

    python benchmarks/training.py --data ../shared/data/gsm8k/train.jsonl --sizes embedded 40M

Same base, adapter, rows in the same order, steps, rates and precision on each side; each run is a
process of its own on the same cores, and sides take turns. `trl defaults` is SFTConfig as it comes
(gradient checkpointing included), `trl best` is without checkpointing; both take the loss on
completions only, as the rows are prompt and completion. Prints a Markdown table of medians.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import base_of, head, medians, parser_of, row, taking_turns, worker
from sides import ours, settings_of, trl_s

SIDES = ("d2lora", "trl best", "trl defaults")


def main() -> None:
    """Measure every size and print the table."""
    args = arguments()
    if args.worker:
        print(json.dumps(measured(args.worker, args.base, args.data, args.steps, args.threads)))
        return
    head("base", "side", "tokens/s", "d2lora is", "peak memory, MB", "share", "first, last loss")
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            base = base_of(size, Path(folder), args.data)
            sides = {side: partial(run_apart, side, base, args) for side in SIDES}
            runs = taking_turns(sides, args.rounds)
            print_rows(size, runs)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["embedded", "40M"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--base", default="embedded", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_apart(side: str, base: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one side in a process of its own."""
    words = ["--worker", side, "--base", base, "--data", str(args.data), "--steps", str(args.steps)]
    return worker(__file__, [*words, "--threads", str(args.threads)], args.threads)


def measured(side: str, base: str, data: Path, steps: int, threads: int) -> dict[str, Any]:
    """Train and return time, memory and losses."""
    import torch

    from d2lora.training.cost import peak_memory_bytes

    settings = settings_of(base, data, steps, threads)
    if side == "d2lora":
        result = ours(settings)
    else:
        result = trl_s(settings, **({"gradient_checkpointing": False} if "best" in side else {}))
    return {**result, "peak_memory_bytes": peak_memory_bytes(torch.device("cpu"))}


def print_rows(size: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print medians and ratios of one size."""
    speed = medians({s: [r["tokens_per_s"] for r in runs[s]] for s in SIDES})
    memory = medians({s: [r["peak_memory_bytes"] for r in runs[s]] for s in SIDES})
    for side in SIDES:
        losses = runs[side][0]["losses"]
        row(
            size, side, f"{speed[side]:.0f}", f"{speed['d2lora'] / speed[side]:.2f} x",
            f"{memory[side] / 1e6:.0f}", f"{memory['d2lora'] / memory[side]:.0%}",
            f"{losses[0]:.4f}, {losses[-1]:.4f}",
        )  # fmt: skip


if __name__ == "__main__":
    main()
