"""What the benchmarks share: bases of each size, runs as processes of their own, tables."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rows import data_folder

R = TypeVar("R")
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "40M": {
        "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
    },
    "135M": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "1B": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
}  # fmt: skip
"""Shapes of bases with random weights: SmolLM-135M's and Llama-3.2-1B's among them."""


def parser_of(
    doc: str | None, *, rounds: int = 3, data: str = "gsm8k/train.jsonl"
) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--data", type=Path, default=data_folder() / data)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def base_of(size: str, folder: Path, data: Path, dtype: str = "float32") -> str:
    """Return a base of a size: one that has weights, or random ones with its own tokenizer."""
    if size in {"embedded", "smollm2"}:
        return size
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.append(str(Path(__file__).parent.parent / "scripts"))
    from train_tokenizer import train_tokenizer

    shape = SHAPES[size]
    lines = data.read_text(encoding="utf-8").strip().split("\n")
    texts = (" ".join(map(str, json.loads(line).values())) for line in lines)
    path = folder / size
    tokenizer = train_tokenizer(texts, shape["vocab_size"])
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        **shape,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)
    return str(path)


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a process on so many cores, without a network."""
    return {
        **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip


def worker(file: str, words: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a benchmark's own file as a process and return what its last line says, as JSON."""
    out = ran([sys.executable, file, *words], threads)[1]
    return json.loads(out.splitlines()[-1])


def ran(command: Sequence[str], threads: int) -> tuple[float, str]:
    """Run a command to its end; return the seconds it took and what it printed.

    Where it fails, so does the benchmark, with its messages.
    """
    started = time.perf_counter()
    done = subprocess.run(
        command, env=environment(threads), capture_output=True, text=True, check=False
    )
    elapsed_s = time.perf_counter() - started
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return elapsed_s, done.stdout


def taking_turns(sides: Mapping[str, Callable[[], R]], rounds: int) -> dict[str, list[R]]:
    """Call every side once a round, so that what else the machine does meets them alike."""
    results: dict[str, list[R]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            results[name].append(call())
    return results


def medians(results: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return each side's median."""
    return {name: statistics.median(values) for name, values in results.items()}


def head(*columns: str) -> None:
    """Print a Markdown table's head."""
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def row(*cells: object) -> None:
    """Print a Markdown table's row."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def console_script(name: str) -> str:
    """Return the path of a command that is installed beside this Python."""
    return str(Path(sys.executable).parent / name)
