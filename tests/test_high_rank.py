"""A warm-up at a higher rank: what is kept is the best approximation of what was learnt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from d2lora import AdaptSettings, WarmStart, WarmupSettings, adapt, warm_up
from d2lora.adapters.factors import Factors, truncate
from d2lora.adapters.files import AdapterFiles
from d2lora.adapters.mixing import Plain
from d2lora.embedded import general_rows
from d2lora.errors import SettingsError
from d2lora.settings import ConvertSettings
from d2lora.tools.convert import convert
from support import dies_at_step, write_rows


def settings(base: str, data: str, out: Path, **values: Any) -> WarmupSettings:
    given: dict[str, Any] = {
        "rank": 4, "train_rank": 12, "max_steps": 4, "batch_size": 4, "learning_rate": 0.01,
        "quiet": True, **values,
    }  # fmt: skip
    return WarmupSettings(base=base, data=(data,), out=out, **given)


def updates(folder: Path) -> dict[str, Tensor]:
    """Return what each layer's adapter adds to its weight."""
    plain = Plain.read(folder)
    return {name: plain.scale * (f.b @ f.a).double() for name, f in plain.layers.items()}


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_kept_is_the_best_approximation_of_a_warm_up_at_the_higher_rank(
    tmp_path: Path, tiny_base: str, general: str, rslora: bool
) -> None:
    warm_up(settings(tiny_base, general, tmp_path / "cut", rslora=rslora))
    ratio = 3**0.5 if rslora else 3
    high = {"rank": 12, "train_rank": None, "alpha": 8 * ratio, "rslora": rslora}
    warm_up(settings(tiny_base, general, tmp_path / "whole", **high))
    convert(ConvertSettings(adapter=str(tmp_path / "whole"), rank=4, out=tmp_path / "by-hand"))
    cut, by_hand = updates(tmp_path / "cut"), updates(tmp_path / "by-hand")
    assert cut.keys() == by_hand.keys()
    for name, update in cut.items():
        torch.testing.assert_close(update, by_hand[name], rtol=1e-4, atol=1e-6)
    manifest = WarmStart.load(tmp_path / "cut").manifest
    assert (manifest.lora.rank, manifest.lora.alpha) == (4, 8.0)
    whole = AdapterFiles.read(tmp_path / "whole").layers.values()
    energies = [
        (share, float((f.b @ f.a).square().sum()))
        for f in whole
        for share in [truncate(Factors(f.a, f.b), 4).energy_kept]
    ]
    kept = sum(share * energy for share, energy in energies) / sum(e for _, e in energies)
    about = manifest.initialization
    assert about is not None
    assert about["converted_from_rank"] == 12
    assert about["energy_kept"] == pytest.approx(kept, rel=1e-5)
    assert 0.5 < kept < 1
    card = (tmp_path / "cut" / "README.md").read_text()
    assert f"fresh LoRA of rank 12, cut at the end: {kept:.1%} of what was learnt is kept" in card


def test_the_held_out_loss_is_that_of_what_is_kept(
    tmp_path: Path, tiny_base: str, general: str
) -> None:
    held_out = write_rows(tmp_path / "held-out.jsonl", general_rows("valid", 6))
    warm_up(settings(tiny_base, general, tmp_path / "cut", validation_data=(held_out,)))
    said = WarmStart.load(tmp_path / "cut").manifest.validation_loss_after
    # The loss before a run that begins at the warm start is its own.
    adapt(
        AdaptSettings(
            base=tiny_base, data=(general,), init=str(tmp_path / "cut"), out=tmp_path / "again",
            validation_data=(held_out,), max_steps=1, learning_rate=1e-9, quiet=True,
        )
    )  # fmt: skip
    again = WarmStart.load(tmp_path / "again").manifest.validation_loss_before
    assert said == pytest.approx(again, rel=1e-5)


def test_peft_loads_what_was_cut_as_a_plain_adapter(
    tmp_path: Path, tiny_base: str, general: str
) -> None:
    warm_up(settings(tiny_base, general, tmp_path / "cut"))
    weights = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    assert {min(weight.shape) for weight in weights.values()} == {4}
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        base = model(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(model, str(tmp_path / "cut"))(input_ids=ids).logits
    assert float((base - adapted).abs().max()) > 1e-3


def test_a_killed_warm_up_at_a_higher_rank_resumes_to_the_same_warm_start(
    tmp_path: Path, tiny_base: str, general: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_up(settings(tiny_base, general, tmp_path / "whole"))
    killed = settings(tiny_base, general, tmp_path / "killed", checkpoint_every=1)
    with monkeypatch.context() as patch, pytest.raises(dies_at_step(patch, 3)):
        warm_up(killed)
    warm_up(killed.changed(resume=True))
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train_rank": 4}, "train_rank 4 is not higher than the rank, 4"),
        ({"dora": True}, "which dora is not"),
        ({"init": "pissa", "rank_pattern": ("q_proj=2",)}, "init pissa, which changes the base"),
    ],
)
def test_what_cannot_be_cut_is_refused(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        settings("base", "data.jsonl", tmp_path / "out", **values)


def test_an_embedding_with_lora_is_not_cut(tmp_path: Path, tiny_base: str, general: str) -> None:
    asked = settings(tiny_base, general, tmp_path / "out", targets=("embed_tokens", "q_proj"))
    with pytest.raises(SettingsError, match="embed_tokens is none"):
        warm_up(asked)
