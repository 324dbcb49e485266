"""Training against TRL's SFTTrainer + PEFT: time, peak memory and the losses of both sides.

    python benchmarks/training.py --data ../shared/data/gsm8k/train.jsonl --sizes embedded 40M

Same base, adapter, rows in the same order, steps, rates and precision on each side; each run is a
process of its own on the same cores, and sides take turns. `trl defaults` is SFTConfig as it comes
(gradient checkpointing included), `trl best` is without checkpointing; both take the loss on
completions only, as the rows are prompt and completion. Prints a Markdown table of medians.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from common import base_of, head, medians, parser_of, row, taking_turns, worker

SIDES = ("d2lora", "trl best", "trl defaults")
BATCH, RANK, RATE = 8, 16, 1e-3


def main() -> None:
    """Measure every size and print the table."""
    args = arguments()
    if args.worker:
        print(json.dumps(measured(args.worker, args.base, args.data, args.steps, args.threads)))
        return
    head("base", "side", "tokens/s", "d2lora is", "peak memory, MB", "share", "first, last loss")
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            base = base_of(size, Path(folder), args.data)
            sides = {side: partial(run_apart, side, base, args) for side in SIDES}
            runs = taking_turns(sides, args.rounds)
            print_rows(size, runs)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["embedded", "40M"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--base", default="embedded", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_apart(side: str, base: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one side in a process of its own."""
    words = ["--worker", side, "--base", base, "--data", str(args.data), "--steps", str(args.steps)]
    return worker(__file__, [*words, "--threads", str(args.threads)], args.threads)


def measured(side: str, base: str, data: Path, steps: int, threads: int) -> dict[str, Any]:
    """Train and return time, memory and losses; the first step, which warms up, is not timed."""
    import torch

    from d2lora.cost import peak_memory_bytes
    from d2lora.settings import AdaptSettings

    torch.set_num_threads(threads)
    settings = AdaptSettings(
        base=base, data=(str(data),), out=Path("unused"), max_steps=steps, batch_size=BATCH,
        rank=RANK, learning_rate=RATE, schedule="linear", warmup_fraction=0.0, threads=threads,
        quiet=True,
    )  # fmt: skip
    train = ours if side == "d2lora" else trl_s
    result = train(settings, side)
    return {**result, "peak_memory_bytes": peak_memory_bytes(torch.device("cpu"))}


def prepared(settings: Any) -> tuple[Any, Any, list[Any], Any]:
    """Return base, adapted model, the examples of every step in order, and their encoder."""
    from d2lora.encode import Encoder
    from d2lora.inits import LoraShape, attach_fresh
    from d2lora.models import load_base
    from d2lora.tasks import read_task

    base = load_base(settings)
    examples = list(islice(read_task(settings.data).examples, settings.max_steps * BATCH))
    return (
        base,
        attach_fresh(base.model, LoraShape.fresh(settings), 0),
        examples,
        Encoder.of(base, None),
    )


def ours(settings: Any, _: str) -> dict[str, Any]:
    """Train with d2lora's loop."""
    from d2lora import train as loop
    from d2lora.console import Reporter
    from d2lora.objectives import SFT
    from d2lora.runs import RunFolder

    base, model, examples, encoder = prepared(settings)
    items = [encoder.encode(example) for example in examples]
    in_order = type("InOrder", (loop.Plan,), {"batch": _batch_in_order})
    loop.Plan = in_order  # pyright: ignore[reportPrivateImportUsage]
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        run.begin("")
        loop.train(model, items, [], SFT(), settings, run, Reporter(quiet=True), pad_id=base.pad_id)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    n_tokens = rows[-1]["n_tokens"] - rows[0]["n_tokens"]
    elapsed_s = rows[-1]["elapsed_s"] - rows[0]["elapsed_s"]
    return {"tokens_per_s": n_tokens / elapsed_s, "losses": [row["loss"] for row in rows]}


def _batch_in_order(plan: Any, step: int) -> list[int]:
    begin = step * plan.batch_size
    return list(range(begin, begin + plan.batch_size))


def trl_s(settings: Any, side: str) -> dict[str, Any]:
    """Train with TRL's SFTTrainer on the same rows in the same order."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from d2lora.encode import plain_prompt

    base, model, examples, encoder = prepared(settings)
    rows = [{"prompt": plain_prompt(e.prompt), "completion": f" {e.completion}"} for e in examples]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    best = {"gradient_checkpointing": False} if side == "trl best" else {}
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, report_to=[], use_cpu=True, bf16=False, logging_steps=1,
            disable_tqdm=True, save_strategy="no", max_steps=settings.max_steps,
            per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="linear",
            **best,
        )  # fmt: skip
        trainer = InOrder(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    lengths = [len(encoder.encode(example).ids) for example in examples]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"tokens_per_s": sum(lengths[BATCH:]) / (ends[-1] - ends[0]), "losses": losses}


def print_rows(size: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print medians and ratios of one size."""
    speed = medians({s: [r["tokens_per_s"] for r in runs[s]] for s in SIDES})
    memory = medians({s: [r["peak_memory_bytes"] for r in runs[s]] for s in SIDES})
    for side in SIDES:
        losses = runs[side][0]["losses"]
        row(
            size, side, f"{speed[side]:.0f}", f"{speed['d2lora'] / speed[side]:.2f} x",
            f"{memory[side] / 1e6:.0f}", f"{memory['d2lora'] / memory[side]:.0%}",
            f"{losses[0]:.4f}, {losses[-1]:.4f}",
        )  # fmt: skip


if __name__ == "__main__":
    main()
