"""Train from a warm start with TRL's SFTTrainer.

    python examples/with_trl.py MODEL WARM_START ROWS.jsonl OUT

Rows have `prompt` and `completion`. Needs trl: pip install 'd2lora[trl]'.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from d2lora import WarmStart

name, warm_start, rows, out = sys.argv[1:5]
model = WarmStart.load(warm_start).apply_to(AutoModelForCausalLM.from_pretrained(name))
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=f"{out}-trainer",
        learning_rate=5e-4,
        num_train_epochs=3,
        per_device_train_batch_size=4,
        completion_only_loss=True,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    processing_class=AutoTokenizer.from_pretrained(name),
)
trainer.train()
model.save_pretrained(out)
