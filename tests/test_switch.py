"""One door to the fast paths: what is behind it, what it leaves as it was, what is recorded."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from d2lora import (
    AdaptSettings,
    EvaluateSettings,
    GenerateSettings,
    InspectSettings,
    PairsSettings,
    SelectSettings,
    WarmStart,
    adapt,
    evaluate,
    fast,
    generate,
    inspect,
    make_pairs,
    select,
)
from d2lora.adapters.base import load_base
from d2lora.adapters.manifest import Manifest
from d2lora.data.batches import Batch, Encoded, collate
from d2lora.embedded import choice_rows, word_problem_rows
from d2lora.fast import head, layers, llama, matmul
from d2lora.fast.elementwise import gated_fits, norm_fits
from d2lora.scoring import multiple_choice as continuations
from d2lora.scoring import pairs as pair_scores
from d2lora.scoring import scorer
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import BaseSettings
from d2lora.study.plan import StudyPlan
from d2lora.study.recipes import adapt_settings, pairs_settings, warm_up_settings
from support import small_plan, write_rows


@pytest.fixture
def preferences(tmp_path: Path) -> str:
    rows = [
        {"prompt": row["question"], "chosen": row["answer"], "rejected": "No idea."}
        for row in word_problem_rows("train", 6)
    ]
    return write_rows(tmp_path / "preferences.jsonl", rows)


@pytest.fixture
def no_fast_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every fast pass fail."""

    def taken(*_: Any, **__: Any) -> None:
        pytest.fail("a fast pass is taken")

    for place, name in (
        (layers, "passes_of"), (fast.switch, "passes_of"), (head, "log_probabilities"),
        (scorer, "pack"), (llama.Llama, "of"), (pair_scores, "_together"),
        (continuations, "_together"), (matmul, "by_onednn"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, taken)


@pytest.mark.usefixtures("no_fast_pass")
def test_without_fast_passes_none_is_taken_by_any_command(
    tmp_path: Path, tiny_base: str, problems: str, preferences: str, warm_start: WarmStart,
    general: str,
) -> None:  # fmt: skip
    common: dict[str, Any] = {"base": tiny_base, "device": "cpu", "fast": False}
    train = {**common, "max_steps": 1, "rank": 4, "validation_fraction": 0.2, "quiet": True}
    warm = str(warm_start.path)
    made = adapt(
        AdaptSettings(**{**train, "rank": None}, data=(problems,), init=warm, out=tmp_path / "sft")
    )
    assert made.manifest.before_training is not None
    dpo = adapt(AdaptSettings(**train, data=(preferences,), objective="dpo", out=tmp_path / "dpo"))
    ga = adapt(AdaptSettings(**train, data=(problems,), init="lora_ga", out=tmp_path / "ga"))
    for adapter in (made, dpo, ga):
        assert adapter.manifest.fast_passes == []
    choices = write_rows(tmp_path / "choices.jsonl", choice_rows(3))
    for data in (problems, preferences):
        evaluation = evaluate(
            EvaluateSettings(
                **common, adapters=("base", str(made.path)), data=(data,), limit=2,
                max_new_tokens=3, general_text=(general,), choices=(choices,),
                out=tmp_path / Path(data).stem, quiet=True,
            )
        )  # fmt: skip
        assert evaluation.fast_passes == {"base": [], str(made.path): []}
    generate(GenerateSettings(**common, prompt="How many?", max_new_tokens=3))
    pairs = make_pairs(
        PairsSettings(
            **common, data=(problems,), n=3, samples=1, max_new_tokens=3, out=tmp_path / "pairs",
            quiet=True,
        )
    )  # fmt: skip
    assert pairs.fast_passes == []
    inspect(InspectSettings(adapter=warm, data=(problems,), fast=False))
    for method in ("gradient", "perplexity", "similar"):
        select(
            SelectSettings(
                **common, data=(general,), for_task=(problems,), m=4, method=method,
                feature_tokens=32, out=tmp_path / method, cache=tmp_path / "cache", quiet=True,
                **({"gradient_steps": 1} if method == "gradient" else {}),
            )
        )  # fmt: skip


def test_what_was_taken_is_in_the_manifest_and_in_the_summary(
    tmp_path: Path, tiny_base: str, problems: str, general: str, warm_start: WarmStart
) -> None:
    assert {"LoRA layers", "norms", "rows end to end", "head without logits"} <= set(
        warm_start.manifest.fast_passes or ()
    )
    name = str(warm_start.path)
    evaluate(
        EvaluateSettings(
            base=tiny_base, adapters=(name,), data=(problems,), limit=2, max_new_tokens=3,
            general_text=(general,), out=tmp_path / "e", device="cpu", quiet=True,
        )
    )  # fmt: skip
    reported = json.loads((tmp_path / "e" / "summary.json").read_text())["fast_passes"]
    assert reported.keys() == {"base", name}
    assert "Llama decoding" in reported[name]
    assert set(reported[name]) - set(reported["base"]) == {"folded adapter", "Llama decoding"}


def test_a_manifest_of_before_is_read(tmp_path: Path, warm_start: WarmStart) -> None:
    values = json.loads((warm_start.path / "warm_start.json").read_text())
    del values["fast_passes"]
    (tmp_path / "warm_start.json").write_text(json.dumps(values))
    assert Manifest.read(tmp_path).fast_passes is None


def test_importing_everything_changes_nothing_of_the_process() -> None:
    code = """
import os, pkgutil, importlib, torch, transformers, peft
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
def state():
    return dict(os.environ), set(ALL_ATTENTION_FUNCTIONS), torch.get_num_threads()
before = state()
import d2lora.fast
for module in pkgutil.walk_packages(d2lora.__path__, "d2lora."):
    if not module.name.endswith("__main__") and not module.name.startswith("d2lora.cli"):
        importlib.import_module(module.name)
after = state()
assert before == after, set(before[0].items()) ^ set(after[0].items())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_forward_that_somebody_gave_one_layer_is_called_and_survives(tiny_base: str) -> None:
    model = load_base(BaseSettings(base=tiny_base, device="cpu")).model
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp", "model.norm", "lm_head")
    called: list[str] = []
    own: dict[str, Any] = {}
    for name in names:
        layer = model.get_submodule(name)

        def hooked(*args: Any, name: str = name, before: Any = layer.forward) -> Any:
            called.append(name)
            return before(*args)

        own[name] = layer.forward = hooked
    with fast.enabled(model, when=True) as used, torch.no_grad():
        TokenScorer(model)(collated())
        assert "head without logits" not in used.names
        assert llama.Llama.of(model) is None
    assert set(called) == set(names)
    for name, forward in own.items():
        assert vars(model.get_submodule(name))["forward"] is forward


def collated() -> Batch:
    return collate([Encoded(tuple(range(5, 20)), 6), Encoded(tuple(range(9, 40)), 12)], 0)


def test_a_forward_given_inside_the_block_survives_it() -> None:
    layer = nn.Linear(4, 4).requires_grad_(requires_grad=False)
    with fast.enabled(layer, when=True):
        inner = layer.forward
        layer.forward = outer = lambda x: inner(x) + 1
    assert vars(layer)["forward"] is outer


def test_blocks_do_not_nest(tiny_base: str) -> None:
    model = load_base(BaseSettings(base=tiny_base, device="cpu")).model
    for outer in (True, False):
        for part in (model, model.model.layers[0]):
            with (
                fast.enabled(model, when=outer),
                pytest.raises(RuntimeError, match="do not nest"),
                fast.enabled(part, when=not outer),
            ):
                pass
    with fast.enabled(model, when=True) as used:
        assert used.allowed


def test_outside_of_the_block_every_pass_is_plain(tiny_base: str) -> None:
    model = load_base(BaseSettings(base=tiny_base, device="cpu")).model
    scorer = TokenScorer(model)
    batch = collated()
    with fast.enabled(model, when=True) as used, torch.no_grad():
        inside = scorer(batch)
    assert "rows end to end" in used.names
    before = used.names
    with torch.no_grad():
        outside = scorer(batch)
    assert scorer._ways[0] == scorer._padded
    assert used.names == before
    torch.testing.assert_close(inside, outside, rtol=1e-4, atol=1e-4)


def test_every_layer_is_in_the_mode_that_it_was_in(tiny_base: str) -> None:
    model: LlamaForCausalLM = load_base(BaseSettings(base=tiny_base, device="cpu")).model
    model.train()
    model.lm_head.eval()
    with fast.enabled(model, when=True), torch.no_grad():
        TokenScorer(model)(collated())
        assert model.training
        assert not model.lm_head.training


def test_a_norm_with_a_gate_and_other_likenesses_are_left_alone() -> None:
    class Norm(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(shape), requires_grad=False)
            self.variance_epsilon = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    class Gated(Norm):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return super().forward(x if gate is None else x * gate)

    class Wordy(Norm):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(x=x)

    assert norm_fits(Norm(8))
    assert not norm_fits(Gated(8))
    assert not norm_fits(Norm(4, 8))
    assert not norm_fits(Wordy(8))


def test_a_gelu_is_no_silu_however_small_the_weights() -> None:
    for act, fits in (("silu", True), ("swish", True), ("gelu", False), ("relu", False)):
        config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=48, hidden_act=act)
        layer = LlamaMLP(config).requires_grad_(requires_grad=False)
        for parameter in layer.parameters():
            parameter.data.mul_(1e-3)
        assert gated_fits(layer) == fits


def test_the_one_switch_is_in_a_study_s_plan(
    tmp_path: Path, tiny_base: str, general: str, titles: str
) -> None:
    values = {**small_plan(tmp_path, tiny_base, general, titles), "fast": False}
    plan = StudyPlan(**{"arms": ("fresh", "warm"), **values})
    adapting = adapt_settings(plan, plan.arms[0], "titles", 4, 0, tmp_path)
    assert not adapting.fast
    assert not warm_up_settings(plan, "general", tmp_path).fast
    assert not pairs_settings(plan, adapting, 4, None).fast
