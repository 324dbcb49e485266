"""Training at Llama-3.2-1B's shape in bfloat16 on a GPU against TRL + PEFT, and against the GPU.

    scripts/gpu_bench

Random weights, rows of GSM8K, batches of 8, rank 16, the same rows in the same order on both sides,
which take turns as processes of their own. TRL is measured at its defaults, without gradient
checkpointing, and, where liger-kernel is installed, with its kernels besides; packing, which
changes what a batch is and needs another attention to keep rows apart, is left out. d2lora is
measured without recorded passes (`d2lora.fast.cuda_graphs`) as well. The first steps, in which
libraries load their kernels, are reported apart, in a column of their own. Fraction of the floor
as in floor.py: 4 N FLOPs a token, the head at supervised positions, over the matrix
products' rate at these shapes. Takes less than 10 minutes; prints its table last.
`--device cpu --size small` tries it out without a GPU.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import SHAPES, base_of, head, medians, parser_of, row, taking_turns, worker
from floor import against_floor
from sides import ours, settings_of, trl_s


def not_recorded(settings: Any, n_warm: int) -> dict[str, Any]:
    """Train with d2lora's loop, every kernel launched by itself."""
    from d2lora.fast import cuda_graphs

    cuda_graphs.fits = lambda _model: False
    return ours(settings, n_warm)


SIDES: dict[str, Callable[..., dict[str, Any]]] = {
    "d2lora": ours,
    "d2lora, not recorded": not_recorded,
    "trl, no checkpointing": partial(trl_s, gradient_checkpointing=False),
    "trl, no checkpointing, liger": partial(
        trl_s, gradient_checkpointing=False, use_liger_kernel=True
    ),
    "trl defaults": trl_s,
}


def main() -> None:
    """Measure every side and print the table."""
    parser = parser_of(__doc__, rounds=1)
    parser.add_argument("--size", choices=tuple(SHAPES), default="1B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--warm-steps", type=int, default=40)
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=possible())
    parser.add_argument("--worker", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.warm_steps >= args.steps:
        parser.error(f"--warm-steps {args.warm_steps} leaves none of --steps {args.steps} to time")
    if args.worker:
        print(json.dumps(measured(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = args.base or base_of(args.size, Path(folder), args.data, args.dtype)
        words = [*sys.argv[1:], "--base", base, "--worker"]
        sides = {
            side: partial(worker, __file__, [*words, side], args.threads) for side in args.sides
        }
        runs = taking_turns(sides, args.rounds)
    speed = medians({side: [run["tokens_per_s"] for run in of] for side, of in runs.items()})
    floor = runs["d2lora"][-1]
    print(
        f"{floor['where']}, base {args.size}, {args.dtype}: {floor['achieved']:.0f} GFLOP/s of "
        f"{floor['peak']:.0f} GFLOP/s of products, {floor['fraction']:.0%} of the floor\n"
    )
    columns = ("tokens/s", "d2lora is", f"first {args.warm_steps} steps, s", "peak memory, MB")
    head("side", *columns, "first, last loss")
    for side, of in runs.items():
        losses, memory = of[-1]["losses"], of[-1]["peak_memory_bytes"] / 1e6
        row(
            side, f"{speed[side]:.0f}", f"{speed['d2lora'] / speed[side]:.2f} x",
            f"{of[-1]['warm_up_s']:.1f}", f"{memory:.0f}", f"{losses[0]:.4f}, {losses[-1]:.4f}",
        )  # fmt: skip


def possible() -> list[str]:
    """Return the sides that can be measured with what is installed."""
    liger = importlib.util.find_spec("liger_kernel")
    return [side for side in SIDES if liger or "liger" not in side]


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Train one side; d2lora's is held against the floor."""
    import torch

    from d2lora.training.cost import peak_memory_bytes

    device = torch.device(args.device)
    more = {"dtype": args.dtype, "device": args.device}
    settings = settings_of(args.base, args.data, args.steps, args.threads, **more)
    result = SIDES[args.worker](settings, n_warm=args.warm_steps)
    result["peak_memory_bytes"] = peak_memory_bytes(device)
    if args.worker == "d2lora":
        result |= against_floor(settings, result)
        cuda = device.type == "cuda"
        result["where"] = torch.cuda.get_device_name(device) if cuda else "CPU"
    return result


if __name__ == "__main__":
    main()
