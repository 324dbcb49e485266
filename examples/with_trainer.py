"""Train from a warm start with the Trainer of transformers.

    python examples/with_trainer.py MODEL WARM_START ROWS.jsonl OUT

Rows have `prompt` and `completion`.
"""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from d2lora import WarmStart

name, warm_start, rows, out = sys.argv[1:5]
tokenizer = AutoTokenizer.from_pretrained(name)


def encoded(row: dict[str, str]) -> dict[str, list[int]]:
    """Return a row's token ids, with the loss on the answer alone."""
    prompt = tokenizer(f"User: {row['prompt']}\nAssistant:")["input_ids"]
    answer = tokenizer(f" {row['completion']}", add_special_tokens=False)["input_ids"]
    answer.append(tokenizer.eos_token_id)
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


data = load_dataset("json", data_files=rows, split="train")
data = data.map(encoded, remove_columns=data.column_names)
model = WarmStart.load(warm_start).apply_to(AutoModelForCausalLM.from_pretrained(name))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=f"{out}-trainer",
        learning_rate=5e-4,
        num_train_epochs=3,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=data,
    data_collator=DataCollatorForSeq2Seq(tokenizer),
)
trainer.train()
model.save_pretrained(out)
