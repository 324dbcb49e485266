"""DPO and ORPO: what a preference row is, and that the losses are the papers' and TRL's."""

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2lora import (
    Adapter,
    AdaptSettings,
    DataError,
    EvaluateSettings,
    SettingsError,
    WarmStart,
    WarmupSettings,
    adapt,
    evaluate,
    fast,
    warm_up,
)
from d2lora.adapters.base import load_base
from d2lora.data.batches import PreferencePair
from d2lora.data.encode import Encoder
from d2lora.data.encoded_sets import encode_pairs
from d2lora.data.preferences import dialogue
from d2lora.data.reading import read_task
from d2lora.data.rows import Example, Message, user
from d2lora.embedded import word_problem_rows
from d2lora.scoring.pairs import PairScorer
from d2lora.scoring.scorer import TokenScorer, log_probabilities
from d2lora.settings import BaseSettings
from d2lora.training import rows as phase_rows
from d2lora.training.objectives import DPO, ORPO
from d2lora.training.schedule import StepSchedule
from support import SHARED, dies_at_step, needs_shared_data, read_rows, write_rows

TURN = {"role": "user", "content": "2 + 2?"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The right worked solution against that of another question."""
    rows = list(word_problem_rows("train", 25))
    pairs = [
        {"prompt": row["question"], "chosen": row["answer"], "rejected": other["answer"]}
        for row, other in pairwise(rows)
        if row["answer"] != other["answer"]
    ]
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs)


def run(out: Path, base: str, data: str, **changes: Any) -> Adapter:
    settings = {
        "objective": "dpo", "epochs": None if "max_steps" in changes else 2, "batch_size": 8,
        "rank": 4, "learning_rate": 5e-3, "quiet": True, **changes,
    }  # fmt: skip
    return adapt(AdaptSettings(base=base, data=(data,), out=out, **settings))


def weights(adapter: Adapter) -> dict[str, torch.Tensor]:
    return load_file(adapter.path / "adapter_model.safetensors")


def losses(adapter: Adapter, name: str = "loss") -> list[float]:
    return [row[name] for row in read_rows(adapter.path / "metrics.jsonl") if name in row]


@pytest.fixture
def pairs(tiny_base: str, preferences: str) -> tuple[TokenScorer, list[PreferencePair], int]:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    data = read_task([preferences])
    encoded = encode_pairs(Encoder.of(base, None), data.examples, 512, "error")
    return TokenScorer(base.model).eval(), encoded.items, base.pad_id


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [TURN], "chosen": [answer("4")], "rejected": [answer("5")]},
        {"chosen": [TURN, answer("4")], "rejected": [TURN, answer("5")]},
        {"prompt": [TURN], "chosen": [TURN, answer("4")], "rejected": [TURN, answer("5")]},
        {"prompt": "2 + 2?", "chosen": [answer("4")], "rejected": [answer("5")]},
        {"prompt": None, "chosen": [TURN, answer("4")], "rejected": [TURN, answer("5")]},
    ],
)
def test_every_form_of_a_preference_reads_the_same(tmp_path: Path, row: dict[str, Any]) -> None:
    data = read_task([write_rows(tmp_path / "pairs.jsonl", [row])])
    (example,) = data.examples
    assert data.task.name == "preferences"
    assert example.prompt == (Message("user", "2 + 2?"),)
    assert (example.completion, example.rejected) == ("4", "5")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "a", "chosen": "4", "rejected": " 4"}, "are the same"),
        ({"prompt": "a", "chosen": "4", "rejected": ""}, "`rejected` is empty"),
        ({"prompt": "a", "chosen": "4"}, "`rejected` is missing"),
        ({"prompt": "a", "chosen": "4", "rejected": None}, "`rejected` is missing"),
        ({"chosen": "4", "rejected": "5"}, "`prompt` is missing"),
        (
            {"chosen": [TURN, answer("4")], "rejected": [{**TURN, "content": "b"}, answer("5")]},
            "different prompts",
        ),
        (
            {"prompt": "a", "chosen": [TURN, answer("4")], "rejected": [answer("5")]},
            "not the one in `prompt`",
        ),
        ({"chosen": [TURN, answer("4")], "rejected": [TURN]}, "must be the assistant's"),
        ({"chosen": [TURN, answer("4")], "rejected": "5"}, "must be one too"),
        ({"prompt": [answer("a")], "chosen": "4", "rejected": "5"}, "must be the user's"),
        ({"chosen": [answer("4")], "rejected": [answer("5")]}, "hold the turns that come before"),
    ],
)
def test_a_wrong_pair_names_its_line_and_fault(
    tmp_path: Path, row: dict[str, Any], fault: str
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(DataError, match=rf"pairs\.jsonl.*1.*{fault}"):
        read_task([data], "preferences")


def test_a_dialogue_of_hh_rlhf_is_read_as_turns() -> None:
    turns = dialogue("Human: Hi\n\nAssistant: Hello\n\nHuman: Who\n\nare you?\n\nAssistant:")
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert turns[2].content == "Who\n\nare you?"
    assert dialogue("Human: unfinished") == (Message("user", "Human: unfinished"),)


@needs_shared_data
def test_every_public_preference_reads() -> None:
    data = read_task([str(SHARED / "preferences" / "test.jsonl")])
    assert len(data.examples) == 300
    assert all(example.prompt[-1].role == "user" for example in data.examples)


def test_both_completions_end_in_eos_and_share_the_prompt(
    tiny_base: str, pairs: tuple[TokenScorer, list[PreferencePair], int]
) -> None:
    eos = AutoTokenizer.from_pretrained(tiny_base).eos_token_id
    for pair in pairs[1]:
        assert pair.chosen.ids[-1] == pair.rejected.ids[-1] == eos
        n_prompt = pair.chosen.n_prompt
        assert pair.chosen.ids[:n_prompt] == pair.rejected.ids[:n_prompt]


def test_a_long_pair_is_cut_alike(tiny_base: str) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    asked = user(" ".join(f"word{i}" for i in range(40)))
    example = Example(asked, "good " * 30, rejected="bad " * 60)
    for length in (48, 96):
        cut = Encoder.of(base, None).encode_pair(example, length)
        assert length - 4 <= cut.length <= length
        assert cut.chosen.n_prompt == cut.rejected.n_prompt
        assert cut.chosen.ids[: cut.chosen.n_prompt] == cut.rejected.ids[: cut.chosen.n_prompt]


def test_a_prompt_computed_once_gives_the_scores_and_gradients_of_two_rows(
    pairs: tuple[TokenScorer, list[PreferencePair], int],
) -> None:
    scorer, items, pad_id = pairs
    scorer.double().requires_grad_(requires_grad=True)
    gradients: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    for share in (True, False):
        with fast.enabled(scorer.model, when=share) as used:
            chosen, rejected = PairScorer()(scorer, items[:5], pad_id)
        assert ("shared prompts" in used.names) == share
        scorer.zero_grad()
        (chosen - 2 * rejected).sum().backward()
        layer = scorer.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
        assert layer.grad is not None
        gradients.append(layer.grad.clone())
        sums.append(torch.stack([chosen, rejected]).detach())
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_dpo_is_its_formula(pairs: tuple[TokenScorer, list[PreferencePair], int]) -> None:
    from dataclasses import replace

    scorer, items, pad_id = pairs
    items = [replace(pair, reference=(-90.0, -80.0)) for pair in items[:4]]
    share = DPO(0.2, 0.1).share(scorer, items, items, pad_id)
    expected = 0.0
    for pair in items:
        ratio = []
        for item, reference in zip((pair.chosen, pair.rejected), (-90.0, -80.0), strict=True):
            with torch.no_grad():
                logits = scorer.model(input_ids=torch.tensor([item.ids])).logits[0].log_softmax(-1)
            at = range(item.n_prompt, len(item.ids))
            total = sum(float(logits[i - 1, item.ids[i]]) for i in at) - reference
            ratio.append(total)
        z = 0.2 * (ratio[0] - ratio[1])
        right, wrong = math.log1p(math.exp(-z)), math.log1p(math.exp(z))
        expected += 0.9 * right + 0.1 * wrong
    assert float(share.loss) == pytest.approx(expected / 4, rel=1e-4)


def test_orpo_stays_finite_where_a_completion_is_certain() -> None:
    from d2lora.training.objectives import _log_complement

    log_p = torch.tensor([-1e-12, 0.0, -0.5, -1.0, -50.0], requires_grad=True)
    values = _log_complement(log_p)
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert log_p.grad is not None
    assert torch.isfinite(log_p.grad).all()
    expected = [math.log(-math.expm1(x)) for x in (-0.5, -1.0, -50.0)]
    assert values[2:].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_one_micro_batch_equals_many(
    tmp_path: Path, tiny_base: str, preferences: str, objective: str
) -> None:
    common = {"objective": objective, "max_steps": 3, "validation_fraction": 0.2}
    whole = run(tmp_path / "1", tiny_base, preferences, micro_batch_tokens=100_000, **common)
    parts = run(tmp_path / "2", tiny_base, preferences, micro_batch_size=1, **common)
    for name in ("loss", "rewards/margins", "validation_loss", "validation_rewards/accuracies"):
        assert losses(whole, name) == pytest.approx(losses(parts, name), rel=1e-3, abs=1e-5)


def test_a_fresh_adapter_begins_at_log_two_and_learns_the_preference(
    tmp_path: Path, tiny_base: str, preferences: str
) -> None:
    rows = [{**row, "rejected": "I cannot tell."} for row in read_rows(Path(preferences))]
    data = write_rows(tmp_path / "clear.jsonl", rows)
    adapter = run(tmp_path / "1", tiny_base, data, max_steps=12, learning_rate=2e-2)
    assert losses(adapter)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(adapter, "rewards/margins")[0] == pytest.approx(0, abs=1e-3)
    assert losses(adapter, "rewards/accuracies")[-1] == 1
    assert losses(adapter)[-1] < 0.5
    manifest = adapter.manifest
    assert (manifest.objective, manifest.reference) == ("dpo", "base")
    assert manifest.cost["n_prepass_tokens"] > 0
    assert "DPO, beta 0.1, reference base" in (adapter.path / "README.md").read_text()


def test_the_reference_is_the_warm_start_or_the_base_as_asked(
    tmp_path: Path, tiny_base: str, preferences: str, warm_start: WarmStart
) -> None:
    common = {"init": str(warm_start.path), "rank": None, "max_steps": 1}
    own = run(tmp_path / "1", tiny_base, preferences, **common)
    base = run(tmp_path / "2", tiny_base, preferences, reference="base", **common)
    assert (own.manifest.reference, base.manifest.reference) == ("warm_start", "base")
    assert losses(own)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(base)[0] != pytest.approx(math.log(2), abs=1e-3)
    fresh = run(tmp_path / "3", tiny_base, preferences, max_steps=1)
    kept = [json.loads((a.path / "reference.json").read_text()) for a in (base, fresh)]
    for ours, theirs in zip(*(k["log_probabilities"] for k in kept), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_a_killed_run_resumes_and_scores_the_reference_once(
    tmp_path: Path, tiny_base: str, preferences: str, objective: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    common = {"objective": objective, "checkpoint_every": 2, "max_steps": 5}
    whole = run(tmp_path / "whole", tiny_base, preferences, **common)
    from d2lora.training import reference

    with monkeypatch.context() as patch, pytest.raises(dies_at_step(patch, 4)):
        run(tmp_path / "killed", tiny_base, preferences, **common)

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("the reference was scored again")

    monkeypatch.setattr(reference, "log_probabilities_of", again)
    resumed = run(tmp_path / "killed", tiny_base, preferences, resume=True, **common)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name])
    assert whole.manifest.cost["n_prepass_tokens"] == resumed.manifest.cost["n_prepass_tokens"]


def test_a_warm_up_on_preferences_serves_a_supervised_task(
    tmp_path: Path, tiny_base: str, preferences: str, problems: str
) -> None:
    warm = warm_up(
        WarmupSettings(
            base=tiny_base, data=(preferences,), out=tmp_path / "w", objective="orpo", rank=4,
            max_steps=3, quiet=True,
        )
    )  # fmt: skip
    assert warm.manifest.objective == "orpo"
    adapter = run(
        tmp_path / "a", tiny_base, problems, objective="sft", init=str(warm.path), rank=None,
        max_steps=2,
    )  # fmt: skip
    assert adapter.manifest.lineage[-1].fingerprint == warm.manifest.adapter_fingerprint


def test_contradictions_of_objective_and_rows_name_the_fix(
    tmp_path: Path, tiny_base: str, preferences: str, problems: str
) -> None:
    with pytest.raises(DataError, match=r"d2lora pairs.*--objective sft"):
        run(tmp_path / "1", tiny_base, problems)
    with pytest.raises(SettingsError, match="label_smoothing is a setting of --objective dpo"):
        run(tmp_path / "2", tiny_base, preferences, objective="orpo", label_smoothing=0.1)
    with pytest.raises(SettingsError, match=r"not initialized from a warm start"):
        run(tmp_path / "3", tiny_base, preferences, reference="warm_start")
    with pytest.raises(SettingsError, match="has no warm start as reference; use base"):
        WarmupSettings(
            data=(preferences,), out=tmp_path, objective="dpo", reference="warm_start"
        )  # fmt: skip
    assert not (tmp_path / "3").exists()


def test_supervised_learning_of_preferences_is_that_of_the_chosen_completions(
    tmp_path: Path, tiny_base: str, preferences: str
) -> None:
    chosen = [
        {"prompt": r["prompt"], "completion": r["chosen"]} for r in read_rows(Path(preferences))
    ]
    data = write_rows(tmp_path / "chosen.jsonl", chosen)
    first = run(tmp_path / "1", tiny_base, preferences, objective="sft", max_steps=3)
    second = run(tmp_path / "2", tiny_base, data, objective="sft", max_steps=3)
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name])


def keep_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take rows as they stand in the file, as TRL is made to."""

    def batch(plan: StepSchedule, step: int) -> list[int]:
        return list(range(step * plan.batch_size, (step + 1) * plan.batch_size))

    monkeypatch.setattr(StepSchedule, "batch", batch)
    monkeypatch.setattr(phase_rows, "nested_order", lambda n, _: list(range(n)))


def trl_losses(
    trainer_class: Any, config_class: Any, model: Any, tiny_base: str, data: str, folder: Path,
    **more: Any,
) -> dict[str, list[float]]:  # fmt: skip
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    class InOrder(trainer_class):
        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    rows = [
        {
            "prompt": f"User: {row['prompt']}\nAssistant:",
            "chosen": f" {row['chosen']}",
            "rejected": f" {row['rejected']}",
        }
        for row in read_rows(Path(data))
    ]
    config = config_class(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, logging_steps=1,
        disable_tqdm=True, save_strategy="no", gradient_checkpointing=False, max_steps=4,
        per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="linear", **more,
    )  # fmt: skip
    trainer = InOrder(
        model=model, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )  # fmt: skip
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    return {name: [row[name] for row in log] for name in log[0]}


def assert_trl_agrees(ours: Adapter, theirs: dict[str, list[float]], names: list[str]) -> None:
    for name in names:
        assert losses(ours, name) == pytest.approx(theirs[name], rel=2e-3, abs=2e-4), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_dpo_trains_as_trl_s_dpo_trainer_on_the_same_rows(
    tmp_path: Path, tiny_base: str, preferences: str, warm_start: WarmStart,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from trl import DPOConfig, DPOTrainer

    model = warm_start.apply_to(AutoModelForCausalLM.from_pretrained(tiny_base))
    theirs = trl_losses(DPOTrainer, DPOConfig, model, tiny_base, preferences, tmp_path / "trl")
    keep_order(monkeypatch)
    ours = run(
        tmp_path / "ours", tiny_base, preferences, init=str(warm_start.path), rank=None,
        batch_size=4, max_steps=4, learning_rate=1e-2, warmup_fraction=0.0,
    )  # fmt: skip
    names = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    assert_trl_agrees(ours, theirs, ["loss", *names, "logps/chosen", "logps/rejected"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_orpo_trains_as_trl_s_orpo_trainer_on_the_same_rows(
    tmp_path: Path, tiny_base: str, preferences: str, warm_start: WarmStart,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model = warm_start.apply_to(AutoModelForCausalLM.from_pretrained(tiny_base))
    theirs = trl_losses(ORPOTrainer, ORPOConfig, model, tiny_base, preferences, tmp_path / "trl")
    keep_order(monkeypatch)
    ours = run(
        tmp_path / "ours", tiny_base, preferences, objective="orpo", orpo_prompt_loss=True,
        init=str(warm_start.path), rank=None, batch_size=4, max_steps=4, learning_rate=1e-2,
        warmup_fraction=0.0,
    )  # fmt: skip
    names = ["rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"]
    assert_trl_agrees(
        ours, theirs, ["loss", *names, "nll_loss", "log_odds_ratio", "log_odds_chosen"]
    )


def test_orpo_with_and_without_the_prompt_differ_in_the_cross_entropy_alone(
    pairs: tuple[TokenScorer, list[PreferencePair], int],
) -> None:
    scorer, items, pad_id = pairs
    whole, completion = (
        ORPO(0.1, prompt_loss=prompt).share(scorer, items, items, pad_id)
        for prompt in (True, False)
    )
    assert float(whole.metrics["nll_loss"]) != pytest.approx(float(completion.metrics["nll_loss"]))
    for name in ("log_odds_ratio", "rewards/margins"):
        assert float(whole.metrics[name]) == pytest.approx(float(completion.metrics[name]))


def test_evaluate_says_how_often_the_chosen_completion_is_likelier(
    tmp_path: Path,
    tiny_base: str,
    preferences: str,
    pairs: tuple[TokenScorer, list[PreferencePair], int],
) -> None:
    adapter = run(tmp_path / "a", tiny_base, preferences, max_steps=4)
    names = (str(adapter.path), "base")
    evaluation = evaluate(
        EvaluateSettings(
            base=tiny_base, adapters=names, data=(preferences,), out=tmp_path / "e", quiet=True
        )
    )
    records = evaluation.records[evaluation.records["adapter"] == "base"]
    scorer, items, pad_id = pairs
    apart = [
        log_probabilities(scorer, [getattr(pair, side) for pair in items], pad_id)
        for side in ("chosen", "rejected")
    ]
    assert records["log_probability_chosen"].tolist() == pytest.approx(apart[0], rel=1e-4)
    assert records["log_probability_rejected"].tolist() == pytest.approx(apart[1], rel=1e-4)
    right = [chosen > rejected for chosen, rejected in zip(*apart, strict=True)]
    interval = evaluation.scores["base"]["preference_accuracy"]
    assert interval.mean == pytest.approx(sum(right) / len(right))
    assert interval.low <= interval.mean <= interval.high
    assert "preference_accuracy" in evaluation.differences["base"]


@pytest.mark.slow
def test_two_processes_score_the_reference_and_train_as_one(
    tmp_path: Path, tiny_base: str, preferences: str
) -> None:
    words = [
        "adapt", "--base", tiny_base, "--data", preferences, "--objective", "dpo", "--rank", "4",
        "--batch-size", "6", "--max-steps", "3", "--device", "cpu", "--threads", "1", "--quiet",
    ]  # fmt: skip
    alone = [sys.executable, "-m", "d2lora", *words, "--out", str(tmp_path / "alone")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    both = [*launch, "--standalone", "-m", "d2lora", "--", *words, "--out", str(tmp_path / "both")]
    for command in (alone, both):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
    adapters = [Adapter.load(tmp_path / name) for name in ("alone", "both")]
    kept = [json.loads((a.path / "reference.json").read_text()) for a in adapters]
    for ours, theirs in zip(*(k["log_probabilities"] for k in kept), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for name in ("loss", "rewards/margins", "rewards/accuracies"):
        first, second = (losses(adapter, name) for adapter in adapters)
        assert first == pytest.approx(second, rel=1e-3, abs=1e-4)
