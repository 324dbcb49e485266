"""General rows beside the training rows: rehearsed, or held to the base's predictions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from d2lora import AdaptSettings, StudySettings, WarmStart, adapt, evaluate
from d2lora.adapters.base import load_base
from d2lora.data.batches import Encoded
from d2lora.data.encode import Encoder
from d2lora.data.reading import read_task
from d2lora.embedded import general_rows
from d2lora.errors import DataError, SettingsError
from d2lora.settings import BaseSettings, EvaluateSettings
from d2lora.study.run import run_study
from support import dies_at_step, read_rows, small_plan, write_rows


@pytest.fixture
def few(tmp_path: Path) -> str:
    return write_rows(tmp_path / "few.jsonl", general_rows("train", 64)[60:])


def made(base: str, data: str, out: Path, **values: Any) -> tuple[list[dict[str, Any]], Any]:
    given: dict[str, Any] = {
        "batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.01,
        "quiet": True,
        **values,
    }
    adapt(AdaptSettings(base=base, data=(data,), out=out, **given))
    return read_rows(out / "metrics.jsonl"), load_file(out / "adapter_model.safetensors")


def encoded(base: str, *files: str) -> list[list[Encoded]]:
    encoder = Encoder.of(load_base(BaseSettings(base=base)), None)
    return [[encoder.encode(example) for example in read_task([f], "auto").examples] for f in files]


def log_probabilities(model: PeftModel, item: Encoded) -> Tensor:
    """Return those of every token at the supervised positions, by PEFT's own forward pass."""
    logits_TV = model(input_ids=torch.tensor([item.ids])).logits[0]
    return logits_TV[max(1, item.n_prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("loss", ["sft", "kl"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_step_has_the_gradient_of_the_weighted_sum_of_both_losses(
    tmp_path: Path, tiny_base: str, warm_start: WarmStart, few: str, loss: str, *, fast: bool
) -> None:
    task = write_rows(tmp_path / "task.jsonl", general_rows("train", 90)[86:])
    values = {"replay": (few,), "replay_loss": loss, "replay_weight": 0.5, "replay_batch_size": 4}
    log, _ = made(
        tiny_base, task, tmp_path / "out", init=str(warm_start.path), max_steps=1, fast=fast,
        max_grad_norm=0, **values,
    )  # fmt: skip
    model = PeftModel.from_pretrained(
        load_base(BaseSettings(base=tiny_base)).model, warm_start.path, is_trainable=True
    )
    items, general = encoded(tiny_base, task, few)

    def mean_over_tokens(rows: list[Encoded], kl: bool) -> Tensor:
        total = torch.zeros(())
        for row in rows:
            own_PV = log_probabilities(model, row)
            if kl:
                with torch.no_grad(), model.disable_adapter():
                    base_PV = log_probabilities(model, row)
                total = total + (base_PV.exp() * (base_PV - own_PV)).sum()
            else:
                targets_P = torch.tensor(row.ids[max(1, row.n_prompt) :])
                total = total - own_PV.gather(1, targets_P[:, None]).sum()
        return total / sum(row.n_supervised for row in rows)

    own, beside = mean_over_tokens(items, kl=False), mean_over_tokens(general, kl=loss == "kl")
    (own + 0.5 * beside).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    step = log[-1]
    assert step["loss"] == pytest.approx(own.item(), rel=1e-5)
    assert step["replay_loss"] == pytest.approx(beside.item(), rel=1e-4)
    assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert beside > 0.001


def test_a_fresh_adapter_diverges_from_the_base_in_nothing(
    tmp_path: Path, tiny_base: str, problems: str, few: str
) -> None:
    log, _ = made(tiny_base, problems, tmp_path / "out", replay=(few,), replay_loss="kl")
    assert log[0]["replay_loss"] == pytest.approx(0, abs=1e-6)
    assert log[-1]["replay_loss"] > 1e-4


def test_one_micro_batch_equals_many(
    tmp_path: Path, tiny_base: str, problems: str, few: str
) -> None:
    values = {"replay": (few,), "replay_loss": "kl", "replay_batch_size": 3}
    _, whole = made(tiny_base, problems, tmp_path / "1", **values)
    _, parts = made(tiny_base, problems, tmp_path / "2", micro_batch_size=1, **values)
    for name, weights in whole.items():
        torch.testing.assert_close(parts[name], weights, rtol=2e-4, atol=2e-4)


def test_a_killed_run_replays_the_same_rows_when_it_is_resumed(
    tmp_path: Path, tiny_base: str, problems: str, few: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"replay": (few,), "max_steps": 6, "checkpoint_every": 2}
    _, whole = made(tiny_base, problems, tmp_path / "whole", **values)
    with monkeypatch.context() as patch:
        killed = dies_at_step(patch, 4)
        with pytest.raises(killed):
            made(tiny_base, problems, tmp_path / "out", **values)
    _, again = made(tiny_base, problems, tmp_path / "out", resume=True, **values)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("loss", ["sft", "kl"])
def test_less_is_forgotten_with_general_rows_than_without(
    tmp_path: Path, problems: str, loss: str
) -> None:
    general = write_rows(tmp_path / "general.jsonl", general_rows("train", 200))
    tests = write_rows(tmp_path / "tests.jsonl", general_rows("valid", 12))
    values = {"n": 16, "max_steps": 24, "learning_rate": 0.02, "rank": 4}
    made("embedded", problems, tmp_path / "without", **values)
    made(
        "embedded", problems, tmp_path / "with", replay=(general,), replay_loss=loss,
        replay_weight=1.0, **values,
    )  # fmt: skip
    found = evaluate(
        EvaluateSettings(
            base="embedded", adapters=(str(tmp_path / "without"), str(tmp_path / "with")),
            general_text=(tests,), out=tmp_path / "scores", quiet=True,
        )
    )  # fmt: skip
    without, beside = (found.forgetting[str(tmp_path / name)] for name in ("without", "with"))
    assert without.general_loss_change is not None
    assert beside.general_loss_change is not None
    assert beside.general_loss_change < without.general_loss_change - 0.05


def test_replayed_rows_are_known_as_trained_on_and_their_tokens_are_counted(
    tmp_path: Path, tiny_base: str, problems: str, few: str
) -> None:
    log, _ = made(tiny_base, problems, tmp_path / "out", replay=(few,), replay_batch_size=4)
    alone, _ = made(tiny_base, problems, tmp_path / "alone")
    n_replayed = 3 * sum(item.n_tokens for item in encoded(tiny_base, few)[0])
    assert log[-1]["n_tokens"] == alone[-1]["n_tokens"] + n_replayed
    found = evaluate(
        EvaluateSettings(
            base=tiny_base, adapters=(str(tmp_path / "out"),), general_text=(few,),
            out=tmp_path / "scores", quiet=True,
        )
    )  # fmt: skip
    assert found.trained_on[str(tmp_path / "out")] == {"general_text": 4}


def test_replayed_rows_that_are_evaluated_on_are_kept_out(
    tmp_path: Path, tiny_base: str, problems: str, few: str
) -> None:
    with pytest.raises(DataError, match=r"every row of .*few\.jsonl overlaps"):
        made(tiny_base, problems, tmp_path / "out", replay=(few,), keep_out=(few,))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"replay_weight": 1.0}, "replay_weight is about rows of --replay"),
        ({"replay": ("x",), "replay_loss": "kl", "init": "pissa"}, "which --init pissa changes"),
    ],
)
def test_settings_that_contradict_a_replay_are_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        AdaptSettings(data=("x",), out=Path("x"), **values)


def test_an_arm_of_a_study_may_replay_rows_and_those_of_its_tests_are_removed(
    tmp_path: Path, tiny_base: str, general: str, titles: str
) -> None:
    plan = small_plan(tmp_path, tiny_base, general, titles)
    rows = [*general_rows("train", 8), *general_rows("valid", 6)]  # those forgetting is measured on
    replayed = write_rows(tmp_path / "replayed.jsonl", rows)
    arm = {"kind": "fresh", "name": "replay", "adapt": {"replay": replayed, "replay_batch_size": 2}}
    plan |= {"arms": ["fresh", arm], "sizes": [4], "seeds": 1, "learning_rates": [0.01]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    out = tmp_path / "study"
    run_study(
        StudySettings(plan=(str(path),), out=out, executor="inline", quiet=True, report=False)
    )
    checks = json.loads((out / "study.json").read_text("utf-8"))["contamination"]
    assert [c["n_removed"] for c in checks if c["use"] == "replay of arm replay"] == [6]
    tokens = {
        row["arm"]: row["cost"]["n_tokens"]
        for row in read_rows(out / "results.jsonl")
        if row["arm"] != "base"
    }
    assert tokens["replay"] > tokens["fresh"]
