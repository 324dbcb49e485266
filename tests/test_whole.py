"""Modules that are trained whole beside the adapter are saved, resumed, merged, and PEFT's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapters import assert_untouched, logits, losses, run, state, weights
from conftest import save_tiny_base
from d2lora import (
    Adapter,
    ConvertSettings,
    EvaluateSettings,
    ModelError,
    SettingsError,
    WarmStart,
    WarmStartError,
    convert,
    evaluate,
    fast,
)
from d2lora.adapters.base import Base, load_base
from d2lora.data.batches import Encoded, collate
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import BaseSettings, InspectSettings
from d2lora.tools.inspect import inspect
from support import dies_at_step

HEAD = {"modules_to_save": ("lm_head", "norm")}


def loaded(name: str) -> Base:
    return load_base(BaseSettings(base=name, dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("tied"), seed=0, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, problems: str) -> Adapter:
    return run(tmp_path_factory.mktemp("whole") / "a", tiny_base, problems, **HEAD)


def test_whole_modules_and_no_others_are_trained_and_saved(tiny_base: str, whole: Adapter) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    own = {
        name.removeprefix("base_model.model."): value
        for name, value in weights(whole).items()
        if ".lora_" not in name
    }
    assert own.keys() == {"lm_head.weight", "model.norm.weight"}
    for name, value in own.items():
        assert not torch.equal(value, base[name]), name
    assert whole.manifest.lora.modules_to_save == ("lm_head", "norm")
    assert "whole: 1 lm_head, 1 norm" in (whole.manifest.adapted or "")
    n_lora = sum(value.numel() for name, value in weights(whole).items() if ".lora_" in name)
    expected = n_lora + sum(value.numel() for value in own.values())
    assert whole.manifest.cost["n_trainable_parameters"] == expected


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("names", [("lm_head",), ("embed_tokens",), ("embed_tokens", "lm_head")])
def test_training_is_the_same_on_fast_paths_and_leaves_the_base_as_it_was(
    tmp_path: Path, tiny_base: str, tied_base: str, problems: str, names: tuple[str, ...], *,
    tied: bool,
) -> None:  # fmt: skip
    base = loaded(tied_base if tied else tiny_base)
    before = state(base)
    fast, plain = (
        run(tmp_path / str(on), base.name, problems, base, modules_to_save=names, fast=on)
        for on in (True, False)
    )
    assert_untouched(base, before)
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-5)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(fast)[name], value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        logits(base.name, fast.path), logits(base.name, plain.path), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_embedding_and_a_head_that_are_one_matrix_stay_one(
    tmp_path: Path, tied_base: str, problems: str, name: str
) -> None:
    adapter = run(tmp_path / "a", tied_base, problems, modules_to_save=(name,))
    both = [value for n, value in weights(adapter).items() if ".lora_" not in n]
    assert len(both) == 2
    assert torch.equal(*both)
    convert(
        ConvertSettings(
            base=tied_base, adapter=str(adapter.path), merge=True, out=tmp_path / "merged"
        )
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(
        logits(str(tmp_path / "merged")), logits(tied_base, adapter.path), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_losses_and_gradients_are_those_of_peft_itself(
    tmp_path: Path, tiny_base: str, tied_base: str, problems: str, *, tied: bool
) -> None:
    name = tied_base if tied else tiny_base
    adapter = run(tmp_path / "a", name, problems, **HEAD)
    own = WarmStart.load(adapter.path).apply_to(AutoModelForCausalLM.from_pretrained(name))
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(name), str(adapter.path), is_trainable=True
    ).eval()
    batch = collate([Encoded(tuple(range(5, 30)), 8), Encoded(tuple(range(40, 55)), 3)], 0)
    with fast.enabled(own, when=True) as used:
        (-TokenScorer(own)(batch).mean()).backward()
        assert "LoRA layers" in used.names
        assert "head without logits" not in used.names
    labels = batch.ids_BT.masked_fill(batch.mask_BT == 0, -100)
    labels[0, :8] = labels[1, :3] = -100
    plain(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, labels=labels).loss.backward()
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in own.named_parameters() if p.requires_grad}
    assert found.keys() == gradients.keys()
    for one, gradient in gradients.items():
        torch.testing.assert_close(found[one], gradient, rtol=1e-3, atol=1e-6)


def test_a_killed_run_is_resumed_to_the_same_bits(
    tmp_path: Path, tiny_base: str, problems: str, whole: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {**HEAD, "checkpoint_every": 1}
    with monkeypatch.context() as killed, pytest.raises(dies_at_step(killed, 2)):
        run(tmp_path / "r", tiny_base, problems, **common)
    resumed = run(tmp_path / "r", tiny_base, problems, **common, resume=True)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_a_run_from_it_inherits_and_starts_where_it_ended(
    tmp_path: Path, tiny_base: str, problems: str, whole: Adapter
) -> None:
    init = {"init": str(whole.path), "rank": None}
    same = run(tmp_path / "0", tiny_base, problems, **init, max_steps=0)
    for name, value in weights(whole).items():
        assert torch.equal(weights(same)[name], value), name
    more = run(tmp_path / "m", tiny_base, problems, **init)
    assert more.manifest.lora == whole.manifest.lora
    changed = weights(more)["base_model.model.lm_head.weight"]
    assert not torch.equal(changed, weights(whole)["base_model.model.lm_head.weight"])
    with pytest.raises(WarmStartError, match="--modules-to-save norm, but it has lm_head norm"):
        run(tmp_path / "c", tiny_base, problems, **init, modules_to_save=("norm",))


def test_half_the_strength_is_half_the_way_from_the_base(
    tmp_path: Path, tiny_base: str, problems: str, whole: Adapter
) -> None:
    own = AutoModelForCausalLM.from_pretrained(tiny_base).lm_head.weight
    name = "base_model.model.lm_head.weight"
    for scale in (0.5, 0.0):
        init = {"init": str(whole.path), "rank": None, "init_scale": scale, "max_steps": 0}
        found = weights(run(tmp_path / str(scale), tiny_base, problems, **init))[name]
        expected = own + scale * (weights(whole)[name] - own)
        torch.testing.assert_close(found, expected)


def test_it_is_applied_to_a_model_trainable(tiny_base: str, whole: Adapter) -> None:
    model = WarmStart.load(whole.path).apply_to(AutoModelForCausalLM.from_pretrained(tiny_base))
    open_ones = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "modules_to_save.default" in n for n in open_ones)
    assert any("lm_head" in n for n in open_ones)


def test_it_is_measured_inspected_and_merged(
    tmp_path: Path, tiny_base: str, problems: str, whole: Adapter
) -> None:
    scores = [
        evaluate(
            EvaluateSettings(
                base=tiny_base, adapters=(str(whole.path),), data=(problems,), limit=4, fast=on,
                max_new_tokens=4, general_text=(problems,), out=tmp_path / f"s{on}", quiet=True,
            )
        )
        for on in (True, False)
    ]  # fmt: skip
    one, other = (s.forgetting[str(whole.path)].general_loss for s in scores)
    assert one == pytest.approx(other, rel=1e-5)
    first, second = (s.records["output"].tolist() for s in scores)
    assert first == second
    found = inspect(InspectSettings(adapter=str(whole.path), base=tiny_base, data=(problems,)))
    assert found.start is not None
    assert found.start.loss_warm_start < found.start.loss_base
    out = tmp_path / "merged"
    convert(ConvertSettings(base=tiny_base, adapter=str(whole.path), merge=True, out=out))
    torch.testing.assert_close(
        logits(str(out)), logits(tiny_base, whole.path), rtol=1e-4, atol=1e-4
    )


def test_at_another_rank_and_in_mixtures_it_keeps_them(
    tmp_path: Path, tiny_base: str, problems: str, whole: Adapter
) -> None:
    name = "base_model.model.lm_head.weight"
    one = {"adapter": str(whole.path)}
    convert(ConvertSettings(**one, rank=8, out=tmp_path / "rank"))
    torch.testing.assert_close(
        logits(tiny_base, tmp_path / "rank"), logits(tiny_base, whole.path), rtol=1e-4, atol=1e-4
    )
    other = run(tmp_path / "o", tiny_base, problems, **HEAD, seed_order=1)
    for method in ("cat", "average"):
        out = tmp_path / method
        mixed: dict[str, Any] = {"mix": (str(other.path),), "mix_method": method}
        convert(ConvertSettings(**one, **mixed, out=out))
        found = weights(Adapter.load(out))[name]
        torch.testing.assert_close(found, (weights(whole)[name] + weights(other)[name]) / 2)
    with pytest.raises(ModelError, match="add up to 1, not to 2"):
        convert(ConvertSettings(**one, **mixed, mix_weights=(1.0, 1.0), out=tmp_path / "n"))
    plain = run(tmp_path / "p", tiny_base, problems)
    with pytest.raises(ModelError, match="different whole modules"):
        convert(ConvertSettings(**one, mix=(str(plain.path),), out=tmp_path / "n"))
    with pytest.raises(SettingsError, match="--scale scales LoRA's update"):
        convert(ConvertSettings(**one, scale=0.5, out=tmp_path / "n"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ("lm_heat",)}, "no module `lm_heat`.*Did you mean `lm_head`"),
        ({"modules_to_save": ("layers",)}, "`layers` is a list of modules"),
        ({"modules_to_save": ("act_fn",)}, "`act_fn` has no weights"),
        ({"modules_to_save": ("",)}, "no module ``"),
        ({"modules_to_save": ("mlp", "down_proj")}, "a part of `model.layers.0.mlp`"),
        ({"modules_to_save": ("q_proj",), "targets": ("q_proj", "v_proj")}, "trained whole, and"),
        ({"modules_to_save": ("mlp",), "targets": (r".*proj",)}, "trained whole, and"),
        ({"modules_to_save": ("norm",), "init": "pissa"}, "PEFT drops whole modules"),
        ({"modules_to_save": ("norm",), "dtype": "float16"}, "which AdamW cannot"),
    ],
)
def test_what_cannot_be_trained_whole_is_an_error(
    tmp_path: Path, tiny_base: str, problems: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        run(tmp_path / "a", tiny_base, problems, **settings)


def test_a_name_takes_the_modules_of_that_name_alone(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    adapter = run(tmp_path / "a", tiny_base, problems, modules_to_save=("norm",), max_steps=0)
    assert [n for n in weights(adapter) if ".lora_" not in n] == [
        "base_model.model.model.norm.weight"
    ]
