"""Training as a fraction of what the processor's matrix products allow.

    python benchmarks/floor.py --sizes embedded 40M 135M

The floor is the time of the products that LoRA training cannot do without: 4 N FLOPs a token for
the N weights of frozen linear layers and 4 H for the head at supervised positions (forward, and
the gradient of the input), at the rate measured in the same process for these very shapes, the
faster of torch's and oneDNN's product for each. Attention, norms, the adapter and padding come on
top, so 100% cannot be reached. float32, and bfloat16 where the processor has it. Each run is a
process of its own; medians of several. Prints a Markdown table.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import base_of, head, medians, parser_of, row, taking_turns, worker
from sides import ours, settings_of, wait

REPEATS, _CALLS, _LONG_S = 3, 10, 0.05


def main() -> None:
    """Measure every size and dtype, and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["embedded", "40M", "135M"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.base:
        print(json.dumps(measured(args)))
        return
    columns = ("tokens/s", "GFLOP/s of training", "GFLOP/s of products", "of the floor")
    head("base", "dtype", *columns)
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            base = base_of(size, Path(folder), args.data)
            sides = {dtype: partial(run_apart, base, dtype, args) for dtype in formats()}
            for dtype, of in taking_turns(sides, args.rounds).items():
                middle = medians({name: [run[name] for run in of] for name in of[0]})
                row(
                    size, dtype, f"{middle['tokens_per_s']:.0f}", f"{middle['achieved']:.0f}",
                    f"{middle['peak']:.0f}", f"{middle['fraction']:.0%}",
                )  # fmt: skip


def formats() -> tuple[str, ...]:
    """Return the dtypes that this processor computes in."""
    import torch

    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return ("float32", "bfloat16") if fast else ("float32",)


def run_apart(base: str, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure one dtype in a separate process."""
    words = ["--base", base, "--dtype", dtype, "--data", str(args.data)]
    words += ["--steps", str(args.steps), "--threads", str(args.threads)]
    return worker(__file__, words, args.threads)


def measured(args: argparse.Namespace) -> dict[str, float]:
    """Train, then measure the products."""
    settings = settings_of(args.base, args.data, args.steps, args.threads, dtype=args.dtype)
    return against_floor(settings, ours(settings))


def against_floor(settings: Any, trained: dict[str, Any]) -> dict[str, float]:
    """Return a run's speed beside that of its matrix products, measured now.

    Args:
        settings: The run's settings.
        trained: What `sides` measured of it.
    """
    weights, width, vocabulary = shapes_of(settings)
    n_tokens, n_predicted = trained["n_tokens"], trained["n_supervised"]
    a_step = n_tokens // trained["n_steps"]
    rows = min(1024 if settings.device == "cpu" else 8192, a_step)
    places = settings.dtype, settings.device
    floor_s = flops = 0.0
    products = [(*shape, rows, count * n_tokens) for shape, count in weights.items()]
    products.append((width, vocabulary, max(1, rows * n_predicted // n_tokens), n_predicted))
    for n_in, n_out, n_rows, n_times in products:
        work = 2 * n_in * n_out * n_times
        for shape in ((n_in, n_out), (n_out, n_in)):
            floor_s += work / rate(n_rows, *shape, *places)
            flops += work
    return {
        "tokens_per_s": trained["tokens_per_s"],
        "achieved": flops / trained["elapsed_s"] / 1e9,
        "peak": flops / floor_s / 1e9,
        "fraction": floor_s / trained["elapsed_s"],
    }


def shapes_of(settings: Any) -> tuple[Counter[tuple[int, int]], int, int]:
    """Return how often each (in, out) of the decoder's linear layers occurs, and the head's."""
    from torch import nn

    from d2lora.adapters.base import load_base

    model: Any = load_base(settings).model
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    return (
        Counter((layer.in_features, layer.out_features) for layer in layers),
        model.config.hidden_size,
        model.config.vocab_size,
    )


def rate(n_rows: int, n_in: int, n_out: int, dtype: str, device: str) -> float:
    """Return the FLOP/s of a product at its best: the median of several timings."""
    import torch
    from torch.nn import functional

    form = {"dtype": getattr(torch, dtype), "device": device}
    x, weight = torch.randn(n_rows, n_in, **form), torch.randn(n_out, n_in, **form)
    products: list[Callable[[], Any]] = [partial(functional.linear, x, weight)]
    if device == "cpu":
        onednn = torch.ops.mkldnn._linear_pointwise
        products.append(partial(onednn, x, weight, None, "none", [], ""))
    work = 2 * n_rows * n_in * n_out
    return max(work / _seconds(product, x.device) for product in products)


def _seconds(call: Callable[[], Any], device: Any) -> float:
    """Return the seconds of one call, waiting for the device only at the end of many.

    Long calls are measured one by one.
    """

    def measured(n_calls: int) -> float:
        wait(device)
        started = time.perf_counter()
        for _ in range(n_calls):
            call()
        wait(device)
        return (time.perf_counter() - started) / n_calls

    measured(1)  # warms up
    n_calls = 1 if measured(1) > _LONG_S else _CALLS
    return statistics.median(measured(n_calls) for _ in range(REPEATS))


if __name__ == "__main__":
    main()
