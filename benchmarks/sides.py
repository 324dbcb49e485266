"""Training on the same rows in the same order with d2lora's loop and with TRL's SFTTrainer + PEFT.

The first optimizer steps, which warm up, are not part of a time: one, or as many as asked.
"""

import json
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

BATCH, RANK, LEARNING_RATE = 8, 16, 1e-3


def settings_of(base: str, data: Path, steps: int, threads: int, **more: Any) -> Any:
    """Return the settings of a run; `more` are further ones of `adapt`."""
    import torch

    from d2lora.settings import AdaptSettings

    torch.set_num_threads(threads)
    values: dict[str, Any] = {
        "base": base, "data": (str(data),), "out": Path("unused"), "max_steps": steps,
        "batch_size": BATCH, "rank": RANK, "learning_rate": LEARNING_RATE, "schedule": "linear",
        "warmup_fraction": 0.0, "threads": threads, "device": "cpu", "quiet": True, **more,
    }  # fmt: skip
    return AdaptSettings(**values)


def prepared(settings: Any) -> tuple[Any, Any, list[Any], Any]:
    """Return base, adapted model, the examples of every step in order, and their encoder."""
    from d2lora.adapters.base import load_base
    from d2lora.adapters.lora import LoraShape, attach_fresh
    from d2lora.data.encode import Encoder
    from d2lora.data.reading import read_task

    base = load_base(settings)
    n_rows = settings.max_steps * settings.batch_size
    examples = list(islice(read_task(settings.data).examples, n_rows))
    model = attach_fresh(base.model, LoraShape.fresh(settings), 0)
    return base, model, examples, Encoder.of(base, None)


def ours(settings: Any, n_warm: int = 1) -> dict[str, Any]:
    """Train with d2lora's loop; the first `n_warm` steps are not timed."""
    from d2lora import fast
    from d2lora.runtime.console import Reporter
    from d2lora.runtime.run_folder import RunFolder
    from d2lora.training import lesson
    from d2lora.training.loop import train
    from d2lora.training.objectives import SFT

    base, model, examples, encoder = prepared(settings)
    items = [encoder.encode(example) for example in examples]
    in_order = type("InOrder", (lesson.StepSchedule,), {"batch": _batch_in_order})
    lesson.StepSchedule = in_order  # pyright: ignore[reportPrivateImportUsage]
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        run.start("")
        say = Reporter(quiet=True)
        with fast.enabled(model, when=settings.fast):
            train(model, lesson.Lesson(items, [], SFT(), base.pad_id), settings, run, say)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    ends = [row["elapsed_s"] for row in rows]
    return _result(settings, items, ends, [row["loss"] for row in rows], n_warm)


def _batch_in_order(plan: Any, step: int) -> list[int]:
    begin = step * plan.batch_size
    return [index % plan.n_rows for index in range(begin, begin + plan.batch_size)]


def trl_s(settings: Any, n_warm: int = 1, **best: Any) -> dict[str, Any]:
    """Train with TRL's SFTTrainer; `best` are settings beside its defaults."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from d2lora.data.chat_text import plain_prompt

    base, model, examples, encoder = prepared(settings)
    rows = [{"prompt": plain_prompt(e.prompt), "completion": f" {e.completion}"} for e in examples]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(base.model.device)
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, report_to=[], use_cpu=base.model.device.type == "cpu",
            bf16=settings.dtype == "bfloat16", logging_steps=1, disable_tqdm=True,
            save_strategy="no", max_steps=settings.max_steps,
            per_device_train_batch_size=settings.batch_size, learning_rate=settings.learning_rate,
            lr_scheduler_type="linear", train_sampling_strategy="sequential", shuffle_dataset=False,
            **best,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    items = [encoder.encode(example) for example in examples]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return _result(settings, items, ends, losses, n_warm)


def wait(device: Any) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _result(
    settings: Any, items: list[Any], ends: list[float], losses: list[float], n_warm: int
) -> dict[str, Any]:
    timed = items[n_warm * settings.batch_size :]
    n_tokens, elapsed_s = sum(item.n_tokens for item in timed), ends[-1] - ends[n_warm - 1]
    return {
        "tokens_per_s": n_tokens / elapsed_s,
        "n_tokens": n_tokens,
        "n_supervised": sum(item.n_supervised for item in timed),
        "n_steps": len(ends) - n_warm,
        "elapsed_s": elapsed_s,
        "warm_up_s": ends[n_warm - 1] - ends[0],
        "losses": losses,
    }
