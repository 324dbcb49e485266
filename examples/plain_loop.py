"""Train from a warm start in a loop of your own.

    python examples/plain_loop.py MODEL WARM_START ROWS.jsonl OUT

Rows have `prompt` and `completion`. What is written is a plain PEFT adapter.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2lora import WarmStart

EPOCHS, LEARNING_RATE = 3, 5e-4

name, warm_start, rows, out = sys.argv[1:5]
tokenizer = AutoTokenizer.from_pretrained(name)
model = WarmStart.load(warm_start).apply_to(AutoModelForCausalLM.from_pretrained(name))
model.train()
weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)

for epoch in range(EPOCHS):
    total = 0.0
    lines = Path(rows).read_text(encoding="utf-8").strip().split("\n")
    for line in lines:
        row = json.loads(line)
        prompt = tokenizer(f"User: {row['prompt']}\nAssistant:")["input_ids"]
        answer = tokenizer(f" {row['completion']}", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100  # the loss is on the answer alone
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    print(f"epoch {epoch + 1}: mean loss {total / len(lines):.4f}")

model.save_pretrained(out)
