"""Bases in 4 and 8 bits: the same laws as for whole ones, and adapters that fit both."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from adapters import losses
from conftest import save_tiny_base
from d2lora import (
    Adapter,
    AdaptSettings,
    EvaluateSettings,
    GenerateSettings,
    ModelError,
    SettingsError,
    WarmStart,
    WarmStartError,
    WarmupSettings,
    adapt,
    evaluate,
    fast,
    warm_up,
)
from d2lora.adapters.attach import attached, merged
from d2lora.adapters.base import load_base
from d2lora.adapters.lora import LoraShape, attach_fresh
from d2lora.adapters.quantization import WORDS
from d2lora.data.batches import Encoded, collate
from d2lora.embedded import text_rows
from d2lora.evaluation.generate import generate
from d2lora.scoring.scorer import TokenScorer
from d2lora.selection.select import select
from d2lora.settings import BaseSettings, InspectSettings, PairsSettings, SelectSettings
from d2lora.study.store import identity_of
from d2lora.tools.inspect import inspect
from d2lora.tools.pairs import make_pairs
from d2lora.training.cost import TrainingFlops
from support import read_rows, write_rows

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
KINDS = ["nf4", "int8"]
IDS = torch.arange(5, 45).view(2, 20)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_base(
        tmp_path_factory.mktemp("wide"), seed=4, hidden_size=64, intermediate_size=128
    )


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory: pytest.TempPathFactory, wide_base: str) -> str:
    folder = tmp_path_factory.mktemp("saved")
    model = AutoModelForCausalLM.from_pretrained(
        wide_base, quantization_config=in_plain_code("nf4"), dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(wide_base).save_pretrained(folder)
    return str(folder)


def in_plain_code(kind: str) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )


def whole(model: PreTrainedModel, base: str) -> PreTrainedModel:
    """Return a float32 model that has the rounded weights of a quantized one."""
    rounded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            eye = torch.eye(layer.in_features)
            with torch.no_grad():
                rounded.get_submodule(name).weight.copy_(layer(eye).T)
    return rounded


def with_adapter(model: PreTrainedModel) -> torch.nn.Module:
    """Put an adapter on a model that does something."""
    on_base = attach_fresh(model, LoraShape(4, 8, 0.0, ("q_proj", "down_proj")), 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in on_base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return on_base


def gradients(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    model.zero_grad()
    loss.backward()
    yield loss.detach()
    yield from (p.grad for p in model.parameters() if p.requires_grad and p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fast_when", [False, True], ids=["plain", "fast"])
def test_losses_and_gradients_are_those_of_plain_peft_and_bitsandbytes(
    wide_base: str, kind: str, *, fast_when: bool
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(
        wide_base, quantization_config=in_plain_code(kind), dtype=torch.float32
    )
    expected = [*gradients(with_adapter(plain))]
    base = load_base(BaseSettings(base=wide_base, quantization=kind, device="cpu"))
    model = with_adapter(base.model)
    with fast.enabled(model, when=fast_when) as used:
        found = [*gradients(model)]
    assert ("LoRA layers" in used.names) == (fast_when and kind == "nf4")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_after_an_evaluation_are_those_through_the_rounded_weights(
    wide_base: str, kind: str
) -> None:
    base = load_base(BaseSettings(base=wide_base, quantization=kind, device="cpu"))
    with torch.no_grad():
        base.model.eval()(input_ids=IDS)
    rounded = with_adapter(whole(base.model, wide_base))
    expected, found = ([*gradients(m)] for m in (rounded, with_adapter(base.model)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_quantized_base_do_not_see_each_other(wide_base: str, kind: str) -> None:
    base = load_base(BaseSettings(base=wide_base, quantization=kind, device="cpu"))
    items = [Encoded(tuple(range(5, 5 + n)), 2) for n in (30, 9, 17)]
    with fast.enabled(base.model, when=True), torch.no_grad():
        scorer = TokenScorer(base.model)
        together = scorer(collate(items, base.pad_id))
        alone = torch.cat([scorer(collate([item], base.pad_id)) for item in items])
    assert scorer.way == "rows end to end"
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_operations_are_counted_whatever_the_weights_are_packed_in(wide_base: str) -> None:
    counts = [
        TrainingFlops.of(
            with_adapter(load_base(BaseSettings(base=wide_base, quantization=kind)).model)
        )
        for kind in (None, *KINDS)
    ]
    assert counts[0] is not None
    assert counts[0] == counts[1] == counts[2]


@pytest.fixture(scope="module", params=KINDS)
def warm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, wide_base: str,
    general: str,
) -> WarmStart:  # fmt: skip
    return warm_up(
        WarmupSettings(
            base=wide_base, quantization=request.param, data=(general,), m=24, max_steps=4, rank=4,
            learning_rate=1e-2, out=tmp_path_factory.mktemp("warm") / request.param, quiet=True,
        )
    )  # fmt: skip


def adapted(out: Path, base: str, data: str, **changes: Any) -> Adapter:
    return adapt(
        AdaptSettings(
            base=base, data=(data,), n=16, max_steps=3, learning_rate=1e-2, out=out,
            **{"quiet": True, **changes},
        )
    )  # fmt: skip


def test_a_warm_start_made_in_few_bits_fits_the_whole_base_and_the_quantized_one(
    tmp_path: Path, wide_base: str, problems: str, warm: WarmStart,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    kind = str(warm.manifest.settings["quantization"])
    assert warm.manifest.base.quantization == WORDS[kind]
    assert WORDS[kind] in (warm.path / "README.md").read_text()
    same = {"init": str(warm.path), "quiet": False}
    inside = adapted(tmp_path / "q", wide_base, problems, quantization=kind, **same)
    assert "numbers differ" not in capsys.readouterr().err
    outside = adapted(tmp_path / "w", wide_base, problems, **same)
    notice = " ".join(capsys.readouterr().err.split())
    assert f"with {WORDS[kind]} weights" in notice
    assert "unquantized ones here: it works" in notice
    assert losses(inside) == pytest.approx(losses(outside), rel=0.05)
    assert losses(inside) != losses(outside)
    written = load_file(inside.path / "adapter_model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in written.values())


def test_every_command_takes_a_quantized_base(
    tmp_path: Path, wide_base: str, general: str, problems: str, warm: WarmStart
) -> None:
    kind: Any = warm.manifest.settings["quantization"]
    common: dict[str, Any] = {"base": wide_base, "quantization": kind}
    quiet = {**common, "quiet": True}
    text = write_rows(tmp_path / "text.jsonl", text_rows("valid", 4))
    scores = evaluate(
        EvaluateSettings(
            adapters=("base", str(warm.path)), data=(problems,), limit=4, max_new_tokens=4,
            general_text=(text,), out=tmp_path / "scores", **quiet,
        )
    )  # fmt: skip
    assert scores.forgetting[str(warm.path)].general_loss
    assert generate(
        GenerateSettings(prompt="Hello", adapter=str(warm.path), max_new_tokens=4, **common)
    )
    chosen = SelectSettings(
        data=(general,), m=4, for_task=(problems,), method="gradient", gradient_steps=2,
        gradient_width=64, cache=tmp_path / "cache", out=tmp_path / "selection", **quiet,
    )  # fmt: skip
    select(chosen)
    assert len(read_rows(tmp_path / "selection" / "data.jsonl")) == 4
    make_pairs(
        PairsSettings(
            data=(problems,), n=4, samples=2, max_new_tokens=4, adapter=str(warm.path),
            out=tmp_path / "pairs", **quiet,
        )
    )  # fmt: skip
    assert (tmp_path / "pairs" / "pairs.jsonl").is_file()
    seen = inspect(InspectSettings(adapter=str(warm.path), data=(problems,), **common))
    assert seen.start is not None
    assert seen.fits_base is True


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_never_folded_into_quantized_weights(
    tmp_path: Path, wide_base: str, problems: str, kind: Any
) -> None:
    adapter = adapted(tmp_path / "a", wide_base, problems, quantization=kind)
    base = load_base(BaseSettings(base=wide_base, quantization=kind))
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    with attached(base.model, adapter.path) as model, torch.no_grad():
        apart = model(input_ids=IDS).logits
        with merged(model):
            assert torch.equal(model(input_ids=IDS).logits, apart)
    after = base.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_adapter_fits_a_base_saved_in_4_bits_and_the_same_base_whole(
    tmp_path: Path, wide_base: str, saved_base: str, other_base: str, problems: str
) -> None:
    on_whole = adapted(tmp_path / "w", wide_base, problems)
    on_saved = adapted(tmp_path / "s", saved_base, problems)
    quantized = adapted(tmp_path / "q", wide_base, problems, quantization="nf4")
    assert on_saved.manifest.base.fingerprint != on_whole.manifest.base.fingerprint
    assert losses(on_saved) == pytest.approx(losses(quantized), rel=1e-4)
    for base, init in ((wide_base, on_saved), (saved_base, on_whole)):
        adapted(tmp_path / f"from {init.path.name}", base, problems, init=str(init.path))
    with pytest.raises((ModelError, WarmStartError), match="has other weights"):
        adapted(tmp_path / "o", other_base, problems, init=str(on_saved.path))


def test_quantized_weights_are_not_quantized_again(
    tmp_path: Path, saved_base: str, problems: str
) -> None:
    with pytest.raises(ModelError, match=r"quantized already \(bitsandbytes\); leave it out"):
        adapted(tmp_path / "a", saved_base, problems, quantization="int8")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_that_another_library_quantized_are_refused_with_its_name(
    tmp_path: Path, wide_base: str, problems: str, method: str
) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for file in Path(wide_base).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"quantized by {method}, and transformers cannot load"):
        adapted(tmp_path / "a", str(folder), problems)


def test_without_bitsandbytes_the_message_says_what_to_install(
    tmp_path: Path, wide_base: str, problems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2lora.runtime.extras.find_spec", {}.get)
    with pytest.raises(SettingsError, match=r"pip install 'd2lora\[quantization\]'"):
        adapted(tmp_path / "a", wide_base, problems, quantization="nf4")


def test_a_stored_run_is_known_by_its_quantization(wide_base: str) -> None:
    plain, *quantized = (
        identity_of(BaseSettings(base=wide_base, quantization=kind)) for kind in (None, *KINDS)
    )
    assert "quantization" not in plain
    assert [one["quantization"] for one in quantized] == KINDS
    assert all(one["bitsandbytes"] for one in quantized)


def test_loftq_does_not_quantize_a_quantized_base(
    tmp_path: Path, wide_base: str, problems: str
) -> None:
    with pytest.raises(SettingsError, match="quantized already"):
        adapted(tmp_path / "a", wide_base, problems, quantization="nf4", init="loftq")


def test_eva_looks_at_a_quantized_base(tmp_path: Path, wide_base: str, problems: str) -> None:
    adapter = adapted(tmp_path / "a", wide_base, problems, quantization="nf4", init="eva", rank=4)
    assert adapter.manifest.lora.rank == 4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_quantized_can_be_trained_whole_and_what_is_cannot(
    tmp_path: Path, wide_base: str, problems: str, kind: str
) -> None:
    common: dict[str, Any] = {
        "base": wide_base, "quantization": kind, "data": (problems,), "n": 8, "max_steps": 2,
        "rank": 4, "quiet": True,
    }  # fmt: skip
    with pytest.raises(SettingsError, match="`down_proj` is quantized in this base"):
        adapt(AdaptSettings(**common, out=tmp_path / "no", modules_to_save=("down_proj",)))
    names = ("lm_head", "norm")
    adapter = adapt(AdaptSettings(**common, out=tmp_path / "a", modules_to_save=names))
    before = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32).state_dict()
    saved = load_file(adapter.path / "adapter_model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight"):
        assert not torch.equal(saved[f"base_model.model.{name}"], before[name])
