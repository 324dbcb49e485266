"""Train the embedded base from scratch and write it with its card.

    python scripts/pretrain_base.py --english ../shared/data/general --work-dir pretraining

Text comes from the world's generator; real English is mixed in where `--english` names a folder
with train.jsonl and valid.jsonl (fields prompt, response). A killed run goes on where its last
checkpoint stands.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon
from train_tokenizer import train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from d2lora.embedded.documents import documents
from d2lora.embedded.splits import chance_for
from d2lora.embedded.sums import sum_of

VOCABULARY = 2048
SEQUENCE, LONG_SEQUENCE = 256, 512  # the second while the rate falls
BATCH_TOKENS = 4096
HELD_OUT_ROWS = 400
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Prepare the text, train, write the base."""
    args = arguments()
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = prepared_tokenizer(args)
    train_tokens = prepared_tokens(args, tokenizer, "train")
    held_out = {
        "world": encode_documents(tokenizer, islice(documents("valid"), HELD_OUT_ROWS * 4)),
        "english": encode_documents(tokenizer, english_texts(args.english, "valid")),
    }
    model = new_model(tokenizer)
    record = train(model, train_tokens, held_out, args)
    model.float().cpu().eval()
    record["arithmetic_accuracy"] = arithmetic_accuracy(model, tokenizer)
    write_base(model, tokenizer, record, args)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("src/d2lora/embedded/base"))
    parser.add_argument("--work-dir", type=Path, default=Path("pretraining"))
    parser.add_argument("--english", type=Path, help="folder with train.jsonl and valid.jsonl")
    parser.add_argument("--english-share", type=float, default=0.2, help="share of the characters")
    parser.add_argument("--steps", type=int, default=7300)
    parser.add_argument("--million-tokens", type=float, default=40.0, help="distinct text to make")
    parser.add_argument("--decay-share", type=float, default=0.4, help="steps of falling rate")
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--machine", default="a CPU", help="what the card says of the machine")
    parser.add_argument("--evaluate-every", type=int, default=250)
    return parser.parse_args()


def english_texts(folder: Path | None, split: str) -> list[str]:
    """Return real English as plain text; none without a folder."""
    if folder is None:
        return []
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [f"{row['prompt']}\n{row['response']}" for row in rows]


def mixed(args: argparse.Namespace) -> Iterator[str]:
    """Yield training documents, real English among them by its share of the characters."""
    world = documents("train")
    english = english_texts(args.english, "train")
    chance = random.Random("english")
    n_english, n_total = 0, 1
    while True:
        if english and n_english < args.english_share * n_total:
            text = chance.choice(english)[:2000]
            n_english += len(text)
        else:
            text = next(world)
        n_total += len(text)
        yield text


def prepared_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerFast:
    """Train the tokenizer, or load the one of an earlier start."""
    folder = args.work_dir / "tokenizer"
    if not folder.exists():
        train_tokenizer(islice(mixed(args), 30_000), VOCABULARY).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, texts: Iterator[str] | list[str]
) -> Tensor:
    """Return documents as one stream of ids, each ending in EOS."""
    ids: list[int] = []
    batch = list(texts)
    for begin in range(0, len(batch), 5000):
        for row in tokenizer(batch[begin : begin + 5000])["input_ids"]:
            ids += [*row, tokenizer.eos_token_id]
    return torch.tensor(ids, dtype=torch.long)


def prepared_tokens(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, name: str
) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """Generate and encode the training text once; it is kept in the work folder."""
    path = args.work_dir / f"{name}.npy"
    if not path.exists():
        texts, parts, total = mixed(args), list[np.ndarray](), 0
        while total < args.million_tokens * 1e6:
            parts.append(
                encode_documents(tokenizer, islice(texts, 20_000)).numpy().astype("uint16")
            )
            total += len(parts[-1])
        np.save(path, np.concatenate(parts))
    return np.load(path, mmap_mode="r")


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPE,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def rate_at(step: int, args: argparse.Namespace) -> float:
    """Return the share of the peak rate: short rise, long plateau, fall to zero."""
    rise, fall = 200, max(1, int(args.steps * args.decay_share))
    return min(1.0, (step + 1) / rise, (args.steps - step) / fall)


def length_at(step: int, args: argparse.Namespace) -> int:
    """Return the sequence length of a step: longer ones come last, when they cost less."""
    falling = step >= args.steps * (1 - args.decay_share)
    return LONG_SEQUENCE if falling else SEQUENCE


def batch_at(tokens: np.ndarray, step: int, length: int) -> Tensor:
    """Return the ids of a step, shape (rows, length + 1), at seeded places of the stream."""
    n_rows = BATCH_TOKENS // length
    places = np.random.default_rng((1, step)).integers(0, len(tokens) - length - 1, n_rows)
    rows = [tokens[place : place + length + 1].astype("int64") for place in places]
    return torch.from_numpy(np.stack(rows))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean next-token loss of rows of ids."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, stream: Tensor, device: str) -> float | None:
    """Return the mean loss over a held-out stream; None where there is none."""
    n_rows = len(stream) // (LONG_SEQUENCE + 1)
    if n_rows == 0:
        return None
    rows = stream[: n_rows * (LONG_SEQUENCE + 1)].view(n_rows, LONG_SEQUENCE + 1).to(device)
    return float(np.mean([float(loss_of(model, row[None])) for row in rows]))


def train(
    model: LlamaForCausalLM,
    tokens: np.ndarray,
    held_out: dict[str, Tensor],
    args: argparse.Namespace,
) -> dict[str, object]:
    """Train with Muon on the hidden matrices and AdamW on the rest; return what was measured."""
    model.to(args.device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=args.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    checkpoint = args.work_dir / "checkpoint.pt"
    begin, elapsed = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        begin, elapsed = state["step"], state["elapsed_s"]
    compiled = torch.compile(model, dynamic=False)
    started, losses = time.perf_counter() - elapsed, dict[str, float | None]()
    for step in range(begin, args.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * rate_at(step, args)
        loss = loss_of(compiled, batch_at(tokens, step, length_at(step, args)).to(args.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        done = step + 1
        if done % args.evaluate_every == 0 or done == args.steps:
            elapsed = time.perf_counter() - started
            losses = {name: held_out_loss(model, s, args.device) for name, s in held_out.items()}
            line = {"step": done, "loss": float(loss), "elapsed_s": round(elapsed), **losses}
            print(json.dumps(line), flush=True)
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": done,
                "elapsed_s": elapsed,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    return {
        "steps": args.steps,
        "n_tokens": args.steps * BATCH_TOKENS,
        "elapsed_s": round(elapsed),
        "held_out_loss": losses,
    }


@torch.no_grad()
def arithmetic_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Return, by sign, how many of 200 calculations each the base completes rightly."""
    right: dict[str, list[bool]] = {sign: [] for sign in "+-*/"}
    chance = chance_for("arithmetic probe")
    while min(len(results) for results in right.values()) < 200:
        left, sign, number, result = sum_of(chance)
        if len(right[sign]) >= 200:
            continue
        ids = torch.tensor([tokenizer(f"5 + 3 = 8\n{left} {sign} {number} =")["input_ids"]])
        out = model.generate(
            ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids)
        )
        answer = tokenizer.decode(out[0, ids.shape[1] :]).strip()
        digits = "".join(c if c.isdigit() else " " for c in answer).split()
        right[sign].append(bool(digits) and digits[0] == str(result))
    return {sign: float(np.mean(results)) for sign, results in right.items()}


def write_base(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    record: dict[str, object],
    args: argparse.Namespace,
) -> None:
    """Write weights, tokenizer, the measured record and the card made of it."""
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record |= {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": args.machine,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "english_share": args.english_share if args.english else 0.0,
        "vocabulary": VOCABULARY,
        "learning_rate": args.learning_rate,
    }
    (args.out / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    template = (Path(__file__).parent / "base_card.md").read_text(encoding="utf-8")
    (args.out / "README.md").write_text(card_text(template, record), encoding="utf-8")


def card_text(template: str, record: dict[str, object]) -> str:
    """Fill the card's template with measured values."""
    losses = record["held_out_loss"]
    accuracy = record["arithmetic_accuracy"]
    assert isinstance(losses, dict)
    assert isinstance(accuracy, dict)
    rows = [
        f"| held-out loss, {name}, nats per token | {loss:.3f} (perplexity {math.exp(loss):.2f}) |"
        for name, loss in losses.items()
        if loss is not None
    ]
    rows += [f"| right results, `{sign}` | {share:.1%} |" for sign, share in accuracy.items()]
    elapsed = record["elapsed_s"]
    assert isinstance(elapsed, int)
    return template.format(**record, results="\n".join(rows), minutes=round(elapsed / 60))


if __name__ == "__main__":
    main()
