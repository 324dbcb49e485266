"""Greedy generation for 200 GSM8K prompts against transformers' `generate` and `generate_batch`.

    python benchmarks/generation.py --data ../shared/data/gsm8k/test.jsonl --sizes embedded

`generate` gets left-padded batches of prompts sorted by length, at each of several batch sizes, of
which the best counts; `generate_batch`, continuous batching, gets pages for all prompts at once and
the best of several numbers of tokens a step; d2lora decodes with its default settings. Sides take
turns; medians of several rounds. Also prints the share of completions that are the same to the
token in d2lora as in `generate`.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from common import base_of
from d2lora import fast
from d2lora.adapters.base import Base, load_base
from d2lora.data.encode import Encoder
from d2lora.data.reading import read_task
from d2lora.evaluation.decoding import Decoder
from d2lora.settings import BaseSettings, GenerationSettings
from rows import data_folder

BATCH_SIZES = (16, 32, 64, 128)
PAGE_TOKENS = 256


def main() -> None:
    """Measure every size and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=data_folder() / "gsm8k/test.jsonl")
    parser.add_argument("--sizes", nargs="+", default=["embedded"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--step-tokens", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        "| base | generate, s (batch size) | continuous batching, s (tokens a step) | d2lora, s "
        "| ratio to generate | same completions |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            name = base_of(size, Path(folder), args.data, args.dtype)
            base = load_base(BaseSettings(base=name, dtype=args.dtype, threads=args.threads))
            print(f"| {size} | {' | '.join(compared(base, args))} |", flush=True)


def compared(base: Base, args: argparse.Namespace) -> tuple[str, ...]:
    """Return the cells of a base's row."""
    encoder = Encoder.of(base, None)
    examples = islice(read_task([str(args.data)]).examples, args.prompts)
    prompts = [encoder.prompt_ids(example.prompt) for example in examples]
    sides: dict[tuple[str, int], Callable[[], list[list[int]]]] = {
        **{
            ("generate", n): partial(generated, base, prompts, n, args.new_tokens)
            for n in BATCH_SIZES
        },
        **{
            ("continuous", n): partial(continuous, base, prompts, n, args.new_tokens)
            for n in args.step_tokens
        },
        ("d2lora", 0): partial(decoded, base, prompts, args.new_tokens),
    }
    times: dict[tuple[str, int], list[float]] = {side: [] for side in sides}
    outputs: dict[str, list[list[int]]] = {}
    for _ in range(args.rounds):
        for side, complete in sides.items():
            started = time.perf_counter()
            outputs[side[0]] = complete()
            times[side].append(time.perf_counter() - started)
    medians = {side: statistics.median(of) for side, of in times.items()}
    best = {
        name: min((median, size) for (of, size), median in medians.items() if of == name)
        for name in outputs
    }
    fastest = (f"{best[name][0]:.1f} ({best[name][1]})" for name in ("generate", "continuous"))
    own = best["d2lora"][0]
    pairs = zip(outputs["generate"], outputs["d2lora"], strict=True)
    same = sum(first == second for first, second in pairs) / len(prompts)
    return (*fastest, f"{own:.1f}", f"{best['generate'][0] / own:.2f}", f"{same:.0%}")


def decoded(base: Base, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Complete with d2lora, as `evaluate` does."""
    decoder = Decoder(base.model, base, new_tokens, GenerationSettings().batch_size)
    with fast.enabled(base.model, when=True):
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
            completed[index] = before_end(row, base)
    return [completed[index] for index in range(len(prompts))]


def continuous(base: Base, prompts: list[list[int]], size: int, new_tokens: int) -> list[list[int]]:
    """Complete with `generate_batch`; a step takes at most `size` tokens."""
    model: Any = base.model
    pages = sum(math.ceil((len(prompt) + new_tokens) / PAGE_TOKENS) for prompt in prompts)
    completed = model.generate_batch(
        prompts,
        GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False,
            eos_token_id=base.eos_id, pad_token_id=base.pad_id,
        ),
        ContinuousBatchingConfig(num_blocks=pages, page_size=PAGE_TOKENS, max_batch_tokens=size),
    )  # fmt: skip
    in_order = sorted(completed, key=lambda name: int(name.rsplit("_", 1)[-1]))
    return [before_end(completed[name].generated_tokens, base) for name in in_order]


def before_end(ids: list[int], base: Base) -> list[int]:
    """Return the ids before EOS."""
    return ids[: ids.index(base.eos_id)] if base.eos_id in ids else ids


if __name__ == "__main__":
    main()
