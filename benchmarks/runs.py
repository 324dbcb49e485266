"""The same training run as two commands: `d2lora adapt` and `trl sft`.

Both get the same rows, prompts, loss (completions only), base, adapter (rank, alpha, targets, no
dropout), batches, epochs, rate and its course, seed and precision. The order of rows and the
random A are each tool's own.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common import console_script, environment, ran
from sides import BATCH, LEARNING_RATE, RANK

if TYPE_CHECKING:
    from d2lora.data.rows import Example


def write_rows(data: Path, n: int, folder: Path) -> tuple[Path, Path]:
    """Write the first n rows for each tool; return d2lora's file and TRL's folder."""
    from d2lora.data.reading import read_task

    ours = folder / f"rows-{n}.jsonl"
    ours.write_text("".join(islice(data.open(encoding="utf-8"), n)), encoding="utf-8")
    return ours, write_for_sft(read_task([str(ours)]).examples, folder / f"trl-{n}")


def write_for_sft(examples: Iterable["Example"], folder: Path) -> Path:
    """Write rows as prompt and completion, in d2lora's plain chat format."""
    from d2lora.data.chat_text import plain_prompt

    rows = ({"prompt": plain_prompt(e.prompt), "completion": f" {e.completion}"} for e in examples)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    return folder


def adapt(data: Path, out: Path, threads: int, base: str = "embedded", **more: object) -> list[str]:
    """Return the command of a `d2lora adapt` run; `more` are settings of it."""
    settings = {
        "base": base, "data": data, "out": out, "rank": RANK, "batch-size": BATCH,
        "learning-rate": LEARNING_RATE, "warmup-fraction": 0.0, "epochs": 3, "device": "cpu",
        "threads": threads, **more,
    }  # fmt: skip
    return [console_script("d2lora"), "adapt", *_options(settings), "--quiet"]


def sft(data: Path, out: Path, base: str = "embedded", **more: object) -> list[str]:
    """Return the command of a `trl sft` run; `more` are settings of it."""
    from d2lora.adapters.base_files import base_folder

    settings = {
        "model_name_or_path": base_folder(base), "dataset_name": data, "output_dir": out,
        "use_peft": True, "lora_r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0,
        "lora_target_modules": "all-linear", "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": "linear", "num_train_epochs": 3,
        "dtype": "float32", "bf16": False, "use_cpu": True, "seed": 0, "eval_strategy": "no",
        "save_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": True,
        **more,
    }  # fmt: skip
    return [console_script("trl"), "sft", *_options(settings)]


def _options(settings: dict[str, object]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def losses_of_adapt(out: Path) -> list[float]:
    """Return the loss of each step of a `d2lora adapt` run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [row["loss"] for row in rows if "loss" in row]


def losses_of_sft(printed: str) -> list[float]:
    """Return the loss of each step of a `trl sft` run, from what it prints."""
    return [float(value) for value in re.findall(r"'loss': '?([0-9.e+-]+)", printed)]


class Run(NamedTuple):
    """One run of a command."""

    elapsed_s: float
    """Start-up included."""
    losses: list[float]
    """Of each optimizer step."""


def run_adapt(data: Path, out: Path, threads: int, **more: object) -> Run:
    """Run `d2lora adapt` from nothing to the written adapter."""
    shutil.rmtree(out, ignore_errors=True)
    elapsed_s, _ = ran(adapt(data, out, threads, **more), threads)
    return Run(elapsed_s, losses_of_adapt(out))


def run_sft(data: Path, out: Path, threads: int, **more: object) -> Run:
    """Run `trl sft` from nothing to the written adapter."""
    shutil.rmtree(out, ignore_errors=True)
    elapsed_s, printed = ran(sft(data, out, **more), threads)
    return Run(elapsed_s, losses_of_sft(printed))


def first_step_of_adapt(data: Path, out: Path, threads: int, base: str) -> float:
    """Return the seconds from the start of the command to the end of its first step."""
    shutil.rmtree(out, ignore_errors=True)
    log = out / "metrics.jsonl"
    command = adapt(data, out, threads, base, epochs=0.001)
    return _seconds_until(command, threads, lambda _: log.exists() and "loss" in log.read_text())


def first_step_of_sft(data: Path, out: Path, threads: int, base: str) -> float:
    """Return the seconds from the start of the command to the end of its first step."""
    shutil.rmtree(out, ignore_errors=True)
    command = sft(data, out, base, gradient_checkpointing=False, max_steps=1)
    return _seconds_until(command, threads, lambda printed: "'loss'" in printed)


def _seconds_until(command: list[str], threads: int, reached: Callable[[str], bool]) -> float:
    """Return the seconds until what a command has printed, or done, is `reached`."""
    started = time.perf_counter()
    with (
        tempfile.NamedTemporaryFile("r") as printed,
        subprocess.Popen(
            command, env=environment(threads), stdout=printed.fileno(), stderr=subprocess.DEVNULL
        ) as process,
    ):
        while not reached(Path(printed.name).read_text(encoding="utf-8")):
            if process.poll() is not None:
                sys.exit(f"ended before its first step: {' '.join(command)}")
            time.sleep(0.005)
        return time.perf_counter() - started
