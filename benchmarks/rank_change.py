"""Changing an adapter's rank: d2lora's QR and small SVD against PEFT's `convert_to_lora`.

    python benchmarks/rank_change.py --sizes 1024 2048 4096

Each size is one square linear layer with LoRA of rank 16, brought down to rank 8 (4096 is a layer
of a 7B model). Sides take turns; medians count. Prints a Markdown table with the largest relative
difference of the two products.
"""

import argparse
import statistics
import time
import warnings

import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from torch import Tensor, nn

from d2lora.adapters.factors import Factors, truncate

RANK, LOWER = 16, 8


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| layer | PEFT, s | d2lora, s | ratio | largest relative difference |")
    print("|---|---|---|---|---|")
    for size in args.sizes:
        model, factors, scale = adapter_of(size)
        theirs_s: list[float] = []
        ours_s: list[float] = []
        for _ in range(args.rounds):
            started = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says that the adapter is LoRA already
                _, tensors = convert_to_lora(model, rank=LOWER, progressbar=False)
            theirs_s.append(time.perf_counter() - started)
            started = time.perf_counter()
            ours = truncate(factors, LOWER).factors
            ours_s.append(time.perf_counter() - started)
        theirs = product(tensors)
        mine = scale * (ours.b @ ours.a)
        difference = float((theirs - mine).abs().max() / mine.abs().max())
        first, second = statistics.median(theirs_s), statistics.median(ours_s)
        print(
            f"| {size} x {size} | {first:.2f} | {second:.4f} | {first / second:.0f} | "
            f"{difference:.1e} |",
            flush=True,
        )


def adapter_of(size: int) -> tuple[PeftModel, Factors, float]:
    """Return a model of one adapted layer, its factors, and what their product is scaled by."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["layer"])
    model = get_peft_model(nn.ModuleDict({"layer": nn.Linear(size, size, bias=False)}), config)
    layer = model.base_model.model["layer"]
    b = layer.lora_B["default"].weight
    nn.init.normal_(b, std=0.02)
    factors = Factors(layer.lora_A["default"].weight.detach(), b.detach())
    return model, factors, layer.scaling["default"]


def product(tensors: dict[str, Tensor]) -> Tensor:
    """Return B A of PEFT's tensors; its scale is in the factors."""
    (a,) = (value for name, value in tensors.items() if "lora_A" in name)
    (b,) = (value for name, value in tensors.items() if "lora_B" in name)
    return b @ a


if __name__ == "__main__":
    main()
