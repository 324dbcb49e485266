"""Adapters without us, and warm starts in other people's trainers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2lora import AdaptSettings, WarmStart, WarmStartError, adapt
from d2lora.adapters.attach import attach_adapter
from d2lora.adapters.base import load_base
from d2lora.data.batches import collate
from d2lora.data.encode import Encoder
from d2lora.data.reading import read_task
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import BaseSettings
from d2lora.training import rows as phase_rows
from d2lora.training.objectives import SFT
from d2lora.training.schedule import StepSchedule

ALONE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(model, sys.argv[2])
with torch.no_grad():
    logits = model(input_ids=torch.arange(5, 40)[None]).logits
torch.save(logits, sys.argv[3])
assert not any(name.startswith("d2lora") for name in sys.modules)
"""


def test_peft_alone_loads_an_adapter_and_gives_the_same_logits(
    tmp_path: Path, tiny_base: str, problems: str, warm_start: WarmStart
) -> None:
    adapter = adapt(
        AdaptSettings(
            base=tiny_base, data=(problems,), init=str(warm_start.path), out=tmp_path / "a",
            max_steps=5, learning_rate=1e-2, quiet=True,
        )
    )  # fmt: skip
    out = tmp_path / "logits.pt"
    command = [sys.executable, "-c", ALONE, tiny_base, str(adapter.path), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    alone = torch.load(out, weights_only=True)
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    with torch.no_grad():
        before = base.model(input_ids=torch.arange(5, 40)[None]).logits
        model = attach_adapter(base.model, adapter.path, trainable=False)
        ours = model(input_ids=torch.arange(5, 40)[None]).logits
    torch.testing.assert_close(ours, alone)
    assert not torch.allclose(ours, before, atol=1e-3)


def test_a_warm_start_applied_by_hand_is_trainable_and_only_in_its_lora_weights(
    tiny_base: str, warm_start: WarmStart
) -> None:
    model = warm_start.apply_to(AutoModelForCausalLM.from_pretrained(tiny_base))
    assert isinstance(model, PeftModel)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    saved = load_file(warm_start.path / "adapter_model.safetensors")
    assert len(trainable) == len(saved)


def test_a_warm_start_refuses_a_model_of_other_weights(
    other_base: str, warm_start: WarmStart
) -> None:
    with pytest.raises(WarmStartError, match="has other weights"):
        warm_start.apply_to(AutoModelForCausalLM.from_pretrained(other_base))


def test_a_model_without_files_at_hand_is_taken_with_a_warning(
    tiny_base: str, warm_start: WarmStart
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.config.name_or_path = ""
    with pytest.warns(UserWarning, match="weights were not checked"):
        warm_start.apply_to(model)


def test_an_edited_adapter_config_is_refused(
    tmp_path: Path, tiny_base: str, problems: str, warm_start: WarmStart
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(warm_start.path, copy)
    config = copy / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8.0', '"lora_alpha": 80.0'))
    with pytest.raises(WarmStartError, match="disagree"):
        adapt(
            AdaptSettings(
                base=tiny_base, data=(problems,), init=str(copy), out=tmp_path / "a", quiet=True
            )
        )


def trl_trainer(model: Any, tiny_base: str, rows: list[dict[str, str]], folder: Path, **more: Any):
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    config = SFTConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, logging_steps=1,
        disable_tqdm=True, save_strategy="no", gradient_checkpointing=False, **more,
    )  # fmt: skip
    return SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_warm_start_trains_in_trl_s_sft_trainer(
    tmp_path: Path, tiny_base: str, problems: str, warm_start: WarmStart
) -> None:
    model = warm_start.apply_to(AutoModelForCausalLM.from_pretrained(tiny_base))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [
        {"prompt": f"User: {e.prompt[0].content}\nAssistant:", "completion": f" {e.completion}"}
        for e in read_task([problems]).examples
    ]
    trainer = trl_trainer(model, tiny_base, rows, tmp_path, max_steps=3, learning_rate=1e-2)
    trainer.train()
    moved = {
        n for n, p in trainer.model.named_parameters() if not torch.equal(p.detach(), before[n])
    }
    assert moved == {n for n in before if "lora_" in n}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_trl_s_on_the_same_batch(
    tmp_path: Path, tiny_base: str, problems: str, warm_start: WarmStart
) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    encoder = Encoder.of(base, None)
    examples = read_task([problems]).examples[:8]
    items = [encoder.encode(example) for example in examples]
    rows = [
        {"prompt": f"User: {e.prompt[0].content}\nAssistant:", "completion": f" {e.completion}"}
        for e in examples
    ]
    model = warm_start.apply_to(AutoModelForCausalLM.from_pretrained(tiny_base))
    trainer = trl_trainer(
        model, tiny_base, rows, tmp_path, max_steps=1, per_device_train_batch_size=8,
        learning_rate=1e-9,
    )  # fmt: skip
    (batch,) = trainer.get_train_dataloader()
    ours = collate(items, base.pad_id)
    supervised = {tuple(row[row != -100].tolist()) for row in batch["labels"]}
    assert supervised == {item.ids[item.n_prompt :] for item in items}
    assert {
        tuple(i[m.bool()].tolist())
        for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    } == {item.ids for item in items}
    trainer.train()
    logged = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    attached = attach_adapter(base.model, warm_start.path, trainable=False)
    with torch.no_grad():
        loss = SFT().share(TokenScorer(attached), items, items, base.pad_id).loss
    assert ours.targets_P.numel() == sum(len(row) for row in supervised)
    assert float(loss) == pytest.approx(logged, rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_losses_and_the_adapter_after_several_steps_are_trl_s_in_the_same_order(
    tmp_path: Path, tiny_base: str, problems: str, warm_start: WarmStart,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    n_steps, size, rate = 6, 4, 1e-2
    rows = [
        {"prompt": f"User: {e.prompt[0].content}\nAssistant:", "completion": f" {e.completion}"}
        for e in read_task([problems]).examples[: n_steps * size]
    ]
    model = warm_start.apply_to(AutoModelForCausalLM.from_pretrained(tiny_base))
    trainer = trl_trainer(
        model, tiny_base, rows, tmp_path / "trl", max_steps=n_steps, learning_rate=rate,
        per_device_train_batch_size=size, lr_scheduler_type="linear",
        train_sampling_strategy="sequential", shuffle_dataset=False,
    )  # fmt: skip
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]

    monkeypatch.setattr(
        StepSchedule, "batch", lambda _, step: list(range(step * size, (step + 1) * size))
    )
    monkeypatch.setattr(phase_rows, "nested_order", lambda n, _: list(range(n)))
    ours = adapt(
        AdaptSettings(
            base=tiny_base, data=(problems,), out=tmp_path / "ours", init=str(warm_start.path),
            max_steps=n_steps, batch_size=size, learning_rate=rate, warmup_fraction=0.0,
            device="cpu", quiet=True,
        )
    )  # fmt: skip
    log = [json.loads(line) for line in (ours.path / "metrics.jsonl").open()]
    own = [row["loss"] for row in log if "learning_rate" in row]
    assert len(own) == len(theirs) == n_steps
    assert own == pytest.approx(theirs, rel=1e-3)
    tuned = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    for name, value in load_file(ours.path / "adapter_model.safetensors").items():
        torch.testing.assert_close(
            value, tuned[name.replace(".weight", ".default.weight")], rtol=1e-2, atol=1e-3
        )


@pytest.mark.slow
def test_the_gpu_benchmark_runs_at_a_small_size_on_a_cpu_with_equal_losses(problems: str) -> None:
    script = Path(__file__).parents[1] / "scripts" / "gpu_bench"
    words = "--size small --device cpu --dtype float32 --rounds 1 --threads 1".split()
    sides = ["d2lora", "d2lora, not recorded", "trl defaults"]
    words += ["--steps", "3", "--warm-steps", "2", "--sides", *sides]
    done = subprocess.run(
        [script, *words, "--data", problems], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert "of the floor" in done.stdout
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in table] == ["side", *sides]
    # Passes sum in another order, and Adam turns that into the fifth digit after some steps.
    losses = [[float(loss) for loss in row[-1].strip(" |").split(", ")] for row in table[1:]]
    assert all(own == pytest.approx(losses[0], rel=1e-4) for own in losses)
    assert losses[0][1] < losses[0][0]
