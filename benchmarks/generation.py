"""Greedy generation for 200 GSM8K prompts against transformers' `generate`.

    python benchmarks/generation.py --data ../shared/data/gsm8k/test.jsonl --sizes embedded

`generate` gets left-padded batches of prompts sorted by length, at each of several batch sizes, of
which the best counts; d2lora decodes with its default settings. Sides take turns; medians of
several rounds. Also prints the share of completions that are the same to the token.
"""

import argparse
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from common import base_of
from d2lora.decoding import Decoder
from d2lora.encode import Encoder
from d2lora.lean import lean_layers
from d2lora.models import Base, load_base
from d2lora.settings import BaseSettings, GenerationSettings
from d2lora.tasks import read_task

BATCH_SIZES = (16, 32, 64, 128)


def main() -> None:
    """Measure every size and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k/test.jsonl"))
    parser.add_argument("--sizes", nargs="+", default=["embedded"])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| base | generate, s (batch size) | d2lora, s | ratio | same completions |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            name = base_of(size, Path(folder), args.data)
            base = load_base(BaseSettings(base=name, threads=args.threads))
            print(f"| {size} | {' | '.join(compared(base, args))} |", flush=True)


def compared(base: Base, args: argparse.Namespace) -> tuple[str, ...]:
    """Return the cells of a base's row."""
    encoder = Encoder.of(base, None)
    examples = islice(read_task([str(args.data)]).examples, args.prompts)
    prompts = [encoder.prompt_ids(example.prompt) for example in examples]
    theirs: dict[int, list[float]] = {size: [] for size in BATCH_SIZES}
    ours: list[float] = []
    outputs: dict[str, list[list[int]]] = {}
    for _ in range(args.rounds):
        for size, times in theirs.items():
            began = time.perf_counter()
            outputs["theirs"] = generated(base, prompts, size, args.new_tokens)
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        outputs["ours"] = decoded(base, prompts, args.new_tokens)
        ours.append(time.perf_counter() - began)
    medians = {size: statistics.median(times) for size, times in theirs.items()}
    best = min(medians, key=lambda size: medians[size])
    own = statistics.median(ours)
    pairs = zip(outputs["theirs"], outputs["ours"], strict=True)
    same = sum(first == second for first, second in pairs) / len(prompts)
    ratio = medians[best] / own
    return (f"{medians[best]:.1f} ({best})", f"{own:.1f}", f"{ratio:.2f}", f"{same:.0%}")


def decoded(base: Base, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Complete with d2lora, as `evaluate` does."""
    decoder = Decoder(base.model, base, new_tokens, GenerationSettings().batch_size)
    with lean_layers(base.model):
        completed = dict(decoder.complete(prompts))
    return [completed[index] for index in range(len(prompts))]


@torch.inference_mode()
def generated(base: Base, prompts: list[list[int]], size: int, new_tokens: int) -> list[list[int]]:
    """Complete with `generate`, shortest prompts first."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    model: Any = base.model
    completed: dict[int, list[int]] = {}
    for begin in range(0, len(order), size):
        chunk = order[begin : begin + size]
        longest = max(len(prompts[index]) for index in chunk)
        rows = [[base.pad_id] * (longest - len(prompts[i])) + prompts[i] for i in chunk]
        ids = torch.tensor(rows)
        mask = torch.tensor(
            [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chunk]
        )
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
            pad_token_id=base.pad_id,
        )  # fmt: skip
        for index, row in zip(chunk, out[:, longest:].tolist(), strict=True):
            end = row.index(base.eos_id) if base.eos_id in row else len(row)
            completed[index] = row[:end]
    return [completed[index] for index in range(len(prompts))]


if __name__ == "__main__":
    main()
