"""Laws of the loop: equal work gives equal adapters, whatever the way."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from d2lora import (
    Adapter,
    AdaptSettings,
    SettingsError,
    TrainingError,
    WarmStart,
    WarmupSettings,
    adapt,
    warm_up,
)
from d2lora.adapters.fingerprints import fingerprint_of
from d2lora.embedded import title_rows
from d2lora.settings import TrainSettings
from d2lora.training.schedule import StepSchedule, passes
from support import REPOSITORY, dies_at_step, read_rows, write_rows

Weights = dict[str, torch.Tensor]


def run(out: Path, base: str, data: str, **changes: Any) -> Adapter:
    length = {} if "max_steps" in changes else {"epochs": 2}
    settings = {**length, "batch_size": 8, "rank": 4, "quiet": True, **changes}
    return adapt(AdaptSettings(base=base, data=(data,), out=out, **settings))


def weights(adapter: Adapter) -> Weights:
    return load_file(adapter.path / "adapter_model.safetensors")


def assert_same(first: Weights, second: Weights, *, tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance)


def test_the_same_seed_gives_the_same_adapter_bit_for_bit(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    first = run(tmp_path / "1", tiny_base, problems, seed=7, dropout=0.1)
    second = run(tmp_path / "2", tiny_base, problems, seed=7, dropout=0.1)
    assert_same(weights(first), weights(second))


@pytest.mark.parametrize("stream", ["subset", "order", "init", "dropout"])
def test_each_seed_moves_the_result_by_itself(
    tmp_path: Path, tiny_base: str, problems: str, stream: str
) -> None:
    common = {"n": 24, "dropout": 0.1, "max_steps": 4}
    first = run(tmp_path / "1", tiny_base, problems, **common)
    second = run(tmp_path / "2", tiny_base, problems, **common, **{f"seed_{stream}": 99})
    pairs = zip(weights(first).values(), weights(second).values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_one_micro_batch_of_eight_equals_eight_of_one(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    whole = run(tmp_path / "1", tiny_base, problems, micro_batch_tokens=100_000)
    parts = run(tmp_path / "2", tiny_base, problems, micro_batch_size=1)
    # Adam divides by tiny second moments early on, so rounding shows in the last digits.
    assert_same(weights(whole), weights(parts), tolerance=2e-4)
    losses = [[row["loss"] for row in read_rows(a.path / "metrics.jsonl")] for a in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_fast_passes_train_the_same_adapter_as_peft_s_own(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    fast = run(tmp_path / "1", tiny_base, problems, fast=True)
    plain = run(tmp_path / "2", tiny_base, problems, fast=False)
    assert_same(weights(fast), weights(plain), tolerance=2e-4)


def test_the_fast_passes_on_a_bfloat16_base_have_the_losses_of_peft_s_own(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    fast, plain = (
        [row["loss"] for row in read_rows(adapter.path / "metrics.jsonl")]
        for adapter in (
            run(
                tmp_path / str(fast),
                tiny_base,
                problems,
                dtype="bfloat16",
                fast=fast,
                learning_rate=0.02,
            )
            for fast in (True, False)
        )
    )
    assert fast[-1] < fast[0] - 0.1
    assert fast == pytest.approx(plain, rel=2e-3)


def test_a_warm_up_ends_with_the_step_that_sees_its_tokens(
    tmp_path: Path, tiny_base: str, general: str
) -> None:
    settings = WarmupSettings(
        base=tiny_base, data=(general,), rank=4, m=20, batch_size=8, validation_fraction=0,
        max_tokens=2000, quiet=True, out=tmp_path / "w",
    )  # fmt: skip
    warm_up(settings)
    seen = [row["n_tokens"] for row in read_rows(tmp_path / "w" / "metrics.jsonl")]
    assert seen[-2] < 2000 <= seen[-1]
    assert len(seen) > 3, "more than one pass over the rows"
    by_steps = settings.changed(max_tokens=None, max_steps=len(seen), out=tmp_path / "s")
    warm_up(by_steps)
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("w", "s")
    )
    assert_same(first, second)


def test_a_run_that_stops_at_a_step_is_the_longer_run_at_that_step(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    whole = run(tmp_path / "whole", tiny_base, problems, max_steps=9)
    stopped = run(tmp_path / "stopped", tiny_base, problems, max_steps=9, stop_step=5)
    lines = [read_rows(a.path / "metrics.jsonl") for a in (whole, stopped)]
    course = [[(row["loss"], row["learning_rate"]) for row in rows] for rows in lines]
    assert len(course[0]) == 9
    assert course[1] == course[0][:5]
    assert stopped.manifest.cost["n_steps"] == 5
    short = run(tmp_path / "short", tiny_base, problems, max_steps=5)
    assert not torch.equal(*(next(iter(weights(a).values())) for a in (short, stopped)))


def test_a_run_cannot_stop_beyond_its_schedule(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    with pytest.raises(SettingsError, match="beyond the schedule's 10 steps"):
        run(tmp_path / "1", tiny_base, problems, epochs=2, stop_step=11)


@pytest.mark.parametrize(
    "lengths",
    [
        {"max_tokens": 9, "max_steps": 1},
        {"max_tokens": 9, "epochs": 1},
        {"epochs": 1, "max_steps": 1},
    ],
)
def test_a_run_has_one_length(lengths: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match="both set the length of training: give one"):
        WarmupSettings(data=("a",), out=Path("w"), **lengths)


def test_zero_warm_up_steps_equal_a_fresh_adapter(
    tmp_path: Path, tiny_base: str, general: str, problems: str
) -> None:
    common = {"base": tiny_base, "rank": 4, "seed_init": 5, "quiet": True}
    unwarmed = warm_up(WarmupSettings(data=(general,), out=tmp_path / "w", max_steps=0, **common))
    fresh = adapt(AdaptSettings(data=(problems,), out=tmp_path / "f", max_steps=0, **common))
    assert_same(weights(unwarmed), weights(fresh))
    assert all(not value.any() for name, value in weights(fresh).items() if "lora_B" in name)
    from_unwarmed = run(tmp_path / "1", tiny_base, problems, init=str(tmp_path / "w"), rank=None)
    from_fresh = run(tmp_path / "2", tiny_base, problems, seed_init=5)
    assert_same(weights(from_unwarmed), weights(from_fresh))


def test_only_lora_weights_move_and_the_base_keeps_every_bit(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    before = fingerprint_of(Path(tiny_base))
    adapter = run(tmp_path / "1", tiny_base, problems)
    assert fingerprint_of(Path(tiny_base)) == before
    trained = weights(adapter)
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    layers = AutoModelForCausalLM.from_pretrained(tiny_base).config.num_hidden_layers
    assert len(trained) == layers * 7 * 2


def test_adaptation_starts_at_the_warm_start_s_weights(
    tmp_path: Path, tiny_base: str, problems: str, warm_start: WarmStart
) -> None:
    untrained = run(
        tmp_path / "1", tiny_base, problems, init=str(warm_start.path), rank=None, max_steps=0
    )
    assert_same(weights(untrained), weights(warm_start))
    assert untrained.manifest.chat_format == warm_start.manifest.chat_format
    assert untrained.manifest.lineage[-1].fingerprint == warm_start.manifest.adapter_fingerprint


def test_a_killed_run_resumes_to_the_same_adapter(
    tmp_path: Path, tiny_base: str, problems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {
        "dropout": 0.1, "validation_fraction": 0.2, "eval_every": 2, "patience": 3,
        "checkpoint_every": 3, "epochs": 3,
    }  # fmt: skip
    whole = run(tmp_path / "whole", tiny_base, problems, **common)
    taken = 0

    class Killed(BaseException):
        pass

    def dying_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 6:
            raise Killed
        return step(*args, **kwargs)

    from d2lora.training import loop as train

    step = train._step
    with monkeypatch.context() as patch:
        patch.setattr(train, "_step", dying_step)
        with pytest.raises(Killed):
            run(tmp_path / "killed", tiny_base, problems, **common)
    assert not (tmp_path / "killed" / "done.json").exists()
    resumed = run(tmp_path / "killed", tiny_base, problems, **common, resume=True)
    assert_same(weights(whole), weights(resumed))
    timeless = [
        [{k: v for k, v in row.items() if k != "elapsed_s"} for row in read_rows(path)]
        for path in (whole.path / "metrics.jsonl", resumed.path / "metrics.jsonl")
    ]
    assert timeless[0] == timeless[1]
    assert not (resumed.path / "checkpoint").exists()


def test_early_stopping_keeps_the_adapter_of_the_best_validation_loss(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    common = {
        "learning_rate": 0.3, "validation_fraction": 0.5, "eval_every": 1, "epochs": 20,
    }  # fmt: skip
    stopped = run(tmp_path / "1", tiny_base, problems, patience=2, **common)
    losses = validation_losses(stopped)
    best = min(range(1, len(losses)), key=losses.__getitem__)
    assert best + 2 == len(losses) - 1 < 20 * 3
    assert stopped.manifest.validation_loss_after == losses[best]
    assert stopped.manifest.kept_step == best
    at_best = run(tmp_path / "2", tiny_base, problems, stop_step=best, keep_best=False, **common)
    at_end = run(tmp_path / "3", tiny_base, problems, stop_step=best + 2, keep_best=False, **common)
    assert_same(weights(stopped), weights(at_best))
    assert not torch.equal(*(next(iter(weights(a).values())) for a in (stopped, at_end)))


def test_a_run_with_validation_rows_ends_with_its_best_weights_unless_told_otherwise(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    common = {
        "learning_rate": 1.0, "schedule": "constant", "validation_fraction": 0.5, "eval_every": 1,
        "max_steps": 3,
    }  # fmt: skip
    kept = run(tmp_path / "1", tiny_base, problems, **common)
    losses = validation_losses(kept)
    best = min(range(1, 4), key=losses.__getitem__)
    assert best < 3
    assert kept.manifest.cost["n_steps"] == 3
    assert (kept.manifest.kept_step, kept.manifest.validation_loss_after) == (best, losses[best])
    last = run(tmp_path / "2", tiny_base, problems, keep_best=False, **common)
    assert (last.manifest.kept_step, last.manifest.validation_loss_after) == (3, losses[3])
    at_best = run(tmp_path / "3", tiny_base, problems, keep_best=False, stop_step=best, **common)
    assert_same(weights(kept), weights(at_best))


def test_a_resumed_run_still_ends_with_the_best_weights_from_before_it_was_killed(
    tmp_path: Path, tiny_base: str, problems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {
        "learning_rate": 1.0, "schedule": "constant", "validation_fraction": 0.5, "eval_every": 1,
        "max_steps": 3, "checkpoint_every": 2,
    }  # fmt: skip
    whole = run(tmp_path / "whole", tiny_base, problems, **common)
    assert whole.manifest.kept_step is not None
    assert whole.manifest.kept_step < 3
    with monkeypatch.context() as patch, pytest.raises(dies_at_step(patch, 3)):
        run(tmp_path / "killed", tiny_base, problems, **common)
    resumed = run(tmp_path / "killed", tiny_base, problems, **common, resume=True)
    assert resumed.manifest.kept_step == whole.manifest.kept_step
    assert_same(weights(whole), weights(resumed))


def validation_losses(adapter: Adapter) -> list[float]:
    """Return the losses of a run that validates after every step, the one before it first."""
    rows = [r for r in read_rows(adapter.path / "metrics.jsonl") if "validation_loss" in r]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["validation_loss"] for row in rows]


@pytest.mark.parametrize(
    ("n_rows", "given", "course"),
    [
        (16, {}, (4, 100)),
        (63, {}, (4, 100)),
        (64, {}, (8, 100)),
        (255, {}, (8, 100)),
        (256, {}, (16, 100)),
        (1000, {}, (16, 3 * 63)),
        (2, {}, (2, 100)),
        (16, {"epochs": 3}, (4, 12)),
        (16, {"epochs": 3, "batch_size": 16}, (16, 3)),
        (1000, {"max_steps": 5}, (16, 5)),
        (16, {"batch_size": 8}, (8, 100)),
    ],
)
def test_a_run_is_long_enough_for_few_rows_unless_its_length_is_given(
    n_rows: int, given: dict[str, Any], course: tuple[int, int]
) -> None:
    plan = StepSchedule.of(n_rows, TrainSettings(**given), 0)
    assert (plan.batch_size, plan.n_steps) == course
    assert plan.last_step == plan.n_steps
    shown = sum(len(plan.batch(step)) for step in range(plan.last_step))
    assert passes(n_rows, TrainSettings(**given)) == pytest.approx(shown / n_rows)


@pytest.mark.slow
def test_the_defaults_train_an_adapter_on_sixteen_rows(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "task.jsonl", title_rows("train", 16))
    held_out = write_rows(tmp_path / "valid.jsonl", title_rows("valid", 20))
    settings = AdaptSettings(
        data=(data,), out=tmp_path / "a", validation_data=(held_out,), quiet=True
    )
    manifest = adapt(settings).manifest
    assert manifest.validation_loss_before is not None
    assert manifest.validation_loss_after is not None
    assert manifest.validation_loss_before > 5
    assert manifest.validation_loss_after < 1
    assert manifest.warnings == []


def test_a_loss_that_is_not_a_number_stops_the_run_with_advice(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    with pytest.raises(TrainingError, match=r"lower --learning-rate"):
        run(
            tmp_path / "1", tiny_base, problems, learning_rate=1e30, warmup_fraction=0,
            max_grad_norm=0, epochs=5,
        )  # fmt: skip


def test_a_frozen_adapter_is_an_error_before_the_first_step(tmp_path: Path, tiny_base: str) -> None:
    from d2lora.runtime.console import Reporter
    from d2lora.runtime.run_folder import RunFolder
    from d2lora.settings import TrainSettings
    from d2lora.training.lesson import Lesson
    from d2lora.training.loop import train
    from d2lora.training.objectives import SFT

    model = AutoModelForCausalLM.from_pretrained(tiny_base).requires_grad_(requires_grad=False)
    with pytest.raises(TrainingError, match="nothing is trainable"):
        train(
            model, Lesson([], [], SFT(), 0), TrainSettings(), RunFolder(tmp_path),
            Reporter(quiet=True),
        )  # fmt: skip


def test_the_manifest_records_what_was_done(warm_start: WarmStart, general: str) -> None:
    manifest = json.loads((warm_start.path / "warm_start.json").read_text())
    assert manifest["data"][0]["file"] == general
    assert manifest["data"][0]["rows"] == 60
    assert manifest["cost"]["n_steps"] == 6
    assert manifest["validation_loss_after"] < manifest["validation_loss_before"]
    assert manifest["settings"]["learning_rate"] == 1e-2
    assert "fingerprint" in manifest["base"]
    assert manifest["base"]["fingerprint"] in (warm_start.path / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one_and_write_it_once(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    settings = {"n": 24, "epochs": 2, "validation_fraction": 0.25, "checkpoint_every": 2}
    alone = run(tmp_path / "alone", tiny_base, problems, **settings)
    words = [
        "adapt", "--base", tiny_base, "--data", problems, "--out", str(tmp_path / "both"),
        "--device", "cpu", "--threads", "1",
    ]  # fmt: skip
    for name, value in {"batch_size": 8, "rank": 4, **settings}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "--standalone", "-m", "d2lora", "--", *words],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    both = Adapter.load(tmp_path / "both")
    assert_same(weights(alone), weights(both), tolerance=1e-4)
    lines = [read_rows(a.path / "metrics.jsonl") for a in (alone, both)]
    assert [row["step"] for row in lines[0]] == [row["step"] for row in lines[1]]
    assert done.stderr.count("initialized as fresh LoRA") == 1


def test_a_run_says_where_it_comes_from(warm_start: WarmStart, general: str) -> None:
    origin = json.loads((warm_start.path / "provenance.json").read_text())
    assert origin["device"] == "cpu"
    assert origin["data"][0]["file"] == general
    assert {"torch", "peft", "d2lora"} <= origin["versions"].keys()
    head = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert origin["commit"] == (head.stdout.strip() or None)
