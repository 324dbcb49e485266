"""Matrix products on one CPU thread: torch's own (MKL) against oneDNN, interleaved; and bfloat16.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/matrix_products.py

Shapes are those of one forward pass through the embedded base and through a 135M-parameter one. The
last lines are a product of the latter in float32 and in bfloat16, which some processors emulate.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from d2lora.fast import matmul

SHAPES = ((704, 192, 512), (704, 512, 192), (704, 192, 16), (64, 192, 512), (1000, 576, 1536))
ROUNDS, REPEATS = 9, 50


def seconds(call: Callable[[], Tensor], repeats: int = REPEATS) -> float:
    """Return the time of one call, a mean of many."""
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def main() -> None:
    """Measure and print a Markdown table of medians."""
    torch.set_num_threads(1)
    print("| rows, in, out | torch, GFLOP/s | oneDNN, GFLOP/s | ratio |\n|---|---|---|---|")
    for n_rows, n_in, n_out in SHAPES:
        x, weight = torch.randn(n_rows, n_in), torch.randn(n_out, n_in)
        calls = (partial(functional.linear, x, weight), partial(matmul.by_onednn, x, weight))
        times: tuple[list[float], ...] = ([], [])
        for _ in range(ROUNDS):
            for call, kept in zip(calls, times, strict=True):
                kept.append(seconds(call))
        rates = [2 * n_rows * n_in * n_out / statistics.median(kept) / 1e9 for kept in times]
        name = f"{n_rows}, {n_in}, {n_out}"
        print(f"| {name} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f} |")
    n_rows, n_in, n_out = SHAPES[-1]
    x, weight = torch.randn(n_rows, n_in), torch.randn(n_out, n_in)
    passes = (
        ("forward", functional.linear, x),
        ("backward", torch.mm, torch.randn(n_rows, n_out)),
    )
    for what, product, left in passes:
        kinds = (torch.float32, torch.bfloat16)
        calls = [partial(product, left.to(kind), weight.to(kind)) for kind in kinds]
        for call in calls:
            call()
        taken = [[seconds(call, 1) for call in calls] for _ in range(ROUNDS)]
        float32_s, bfloat16_s = (statistics.median(times) for times in zip(*taken, strict=True))
        name = f"bfloat16, {n_rows}, {n_in}, {n_out}, {what}"
        print(f"\n{name}: {bfloat16_s / float32_s:.1f} times as long as float32")


if __name__ == "__main__":
    main()
