"""DPO against TRL's DPOTrainer + PEFT on the same pairs: time, peak memory and losses.

    python benchmarks/preferences.py --data ../shared/data/preferences/train.jsonl

Same base, adapter, pairs in the same order, rates and precision; both compute the log-probabilities
of the reference policy before training, outside the time. Each run is a process of its own, sides
take turns, and the table has medians.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from common import head, medians, parser_of, row, taking_turns, worker

BATCH, RANK, LEARNING_RATE = 8, 16, 1e-4
SIDES = ("d2lora", "d2lora, prompts twice", "trl")


def main() -> None:
    """Measure each side and print the table."""
    parser = parser_of(__doc__, data="preferences/train.jsonl")
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measured(args)))
        return
    words = ["--data", str(args.data), "--base", args.base, "--steps", str(args.steps)]
    words += ["--threads", str(args.threads), "--worker"]
    sides = {s: partial(worker, __file__, [*words, s], args.threads) for s in SIDES}
    runs = taking_turns(sides, args.rounds)
    step_s = medians({s: [run["step_s"] for run in runs[s]] for s in SIDES})
    memory = medians({s: [run["peak"] for run in runs[s]] for s in SIDES})
    head("side", "s a step", "d2lora is", "peak memory, MB", "share", "first, last loss")
    for side in SIDES:
        losses = runs[side][0]["losses"]
        row(
            side, f"{step_s[side]:.2f}", f"{step_s[side] / step_s['d2lora']:.2f} x",
            f"{memory[side] / 1e6:.0f}", f"{memory['d2lora'] / memory[side]:.0%}",
            f"{losses[0]:.4f}, {losses[-1]:.4f}",
        )  # fmt: skip


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Train one side; the first step, which warms up, is not timed."""
    import torch

    from d2lora.adapters.base import load_base
    from d2lora.adapters.lora import LoraShape, attach_fresh
    from d2lora.data.chat_text import plain_prompt
    from d2lora.data.encode import Encoder
    from d2lora.data.encoded_sets import encode_pairs
    from d2lora.data.reading import read_task
    from d2lora.settings import AdaptSettings
    from d2lora.training.cost import peak_memory_bytes

    torch.set_num_threads(args.threads)
    settings = AdaptSettings(
        base=args.base, data=(str(args.data),), out=Path("unused"), objective="dpo", rank=RANK,
        max_steps=args.steps, batch_size=BATCH, learning_rate=LEARNING_RATE, warmup_fraction=0.0,
        quiet=True,
    )  # fmt: skip
    base = load_base(settings)
    encoder = Encoder.of(base, None)
    short = (
        example
        for example in read_task(settings.data).examples
        if encode_pairs(encoder, [example], 10_000, "error").items[0].length <= 512
    )
    examples = list(islice(short, args.steps * BATCH))
    model = attach_fresh(base.model, LoraShape.fresh(settings), 0)
    if args.worker == "trl":
        rows = [
            {
                "prompt": plain_prompt(e.prompt),
                "chosen": f" {e.completion}",
                "rejected": f" {e.rejected}",
            }
            for e in examples
        ]
        result = trl_s(model, base.tokenizer, rows, args.steps)
    else:
        pairs = encode_pairs(encoder, examples, 512, "error").items
        result = ours(base, model, pairs, settings, share=args.worker == "d2lora")
    return {**result, "peak": peak_memory_bytes(torch.device("cpu"))}


def ours(base: Any, model: Any, pairs: Any, settings: Any, *, share: bool) -> dict[str, Any]:
    """Train with d2lora's loop."""
    from d2lora import fast
    from d2lora.runtime.console import Reporter
    from d2lora.runtime.run_folder import RunFolder
    from d2lora.scoring import pairs as pair_scores
    from d2lora.training import lesson
    from d2lora.training.loop import train
    from d2lora.training.objectives import DPO
    from d2lora.training.reference import ReferencePolicy, log_probabilities_of

    if not share:
        pair_scores._can_share = lambda *_: False
    policy = ReferencePolicy("base", model, switched_off=True, fingerprint="")
    with fast.enabled(model, when=settings.fast):
        scored = log_probabilities_of(policy, pairs, base.pad_id)
    items = [replace(pair, reference=value) for pair, value in zip(pairs, scored, strict=True)]
    in_order = type("InOrder", (lesson.StepSchedule,), {"batch": _batch_in_order})
    lesson.StepSchedule = in_order  # pyright: ignore[reportPrivateImportUsage]
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        run.start("")
        with fast.enabled(model, when=settings.fast):
            learnt = lesson.Lesson(items, [], DPO(), base.pad_id)
            train(model, learnt, settings, run, Reporter(quiet=True))
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    elapsed_s = rows[-1]["elapsed_s"] - rows[0]["elapsed_s"]
    return {"step_s": elapsed_s / (len(rows) - 1), "losses": [row["loss"] for row in rows]}


def _batch_in_order(plan: Any, step: int) -> list[int]:
    return list(range(step * plan.batch_size, (step + 1) * plan.batch_size))


def trl_s(model: Any, tokenizer: Any, rows: list[dict[str, str]], steps: int) -> dict[str, Any]:
    """Train with TRL's DPOTrainer, without gradient checkpointing."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, report_to=[], use_cpu=True, bf16=False, logging_steps=1,
            disable_tqdm=True, save_strategy="no", max_steps=steps, learning_rate=LEARNING_RATE,
            per_device_train_batch_size=BATCH, lr_scheduler_type="linear",
            gradient_checkpointing=False, precompute_ref_log_probs=True,
        )  # fmt: skip
        trainer = InOrder(
            model=model, args=config, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"step_s": (ends[-1] - ends[0]) / (steps - 1), "losses": losses}


if __name__ == "__main__":
    main()
