"""What is in an adapter is reported right, and advice comes where it should and only there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2lora import (
    AdaptSettings,
    InspectSettings,
    ModelError,
    SettingsError,
    WarmStart,
    WarmupSettings,
    adapt,
    inspect,
    warm_up,
)
from d2lora.adapters.factors import Factors, effective_rank, inner_product, subspace_overlap
from d2lora.cli import main
from d2lora.tools.inspect import Layer, advice_on
from d2lora.tools.plots import spectra


def factors(rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, 20, generator=generator, dtype=torch.float64)
    return Factors(a, torch.randn(30, rank, generator=generator, dtype=torch.float64))


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def test_the_inner_product_is_that_of_the_dense_products() -> None:
    first, second = factors(3, 0), factors(5, 1)
    dense = ((first.b @ first.a) * (second.b @ second.a)).sum()
    assert inner_product(first, second) == pytest.approx(float(dense))


def test_a_space_overlaps_itself_and_not_its_complement() -> None:
    first = factors(4, 0)
    assert subspace_overlap(first, first) == pytest.approx(1)
    q, _ = torch.linalg.qr(torch.cat([first.b, factors(4, 1).b], dim=1))
    apart = Factors(first.a, q[:, 4:])
    assert subspace_overlap(first, apart) == pytest.approx(0, abs=1e-12)
    assert subspace_overlap(first, Factors(first.a, torch.zeros(30, 4).double())) == 0


def test_an_adapter_is_compared_with_the_warm_start_it_was_initialized_from(
    tmp_path: Path, tiny_base: str, other_base: str, problems: str, warm_start: WarmStart
) -> None:
    adapter = adapt(
        AdaptSettings(
            base=tiny_base, data=(problems,), init=str(warm_start.path), out=tmp_path / "a",
            max_steps=2, learning_rate=1e-4, quiet=True,
        )
    )  # fmt: skip
    found = inspect(
        InspectSettings(adapter=str(adapter.path), other=str(warm_start.path), base=tiny_base)
    )
    assert found.fits_base
    assert all(0 < (layer.distance or 0) < 0.2 for layer in found.layers)
    assert all((layer.overlap or 0) > 0.9 for layer in found.layers)
    assert not inspect(InspectSettings(adapter=str(warm_start.path), base=other_base)).fits_base


def test_the_command_prints_draws_and_writes(
    tmp_path: Path, warm_start: WarmStart, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"inspect --adapter {warm_start.path} --plot {tmp_path}/s.png --out {tmp_path}/s.json"
    assert main(words.split()) == 0
    assert "effective rank" in capsys.readouterr().out
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "s.json").is_file()


def test_adapters_of_different_models_cannot_be_compared(
    tmp_path: Path, tiny_base: str, general: str
) -> None:
    other = warm_up(
        WarmupSettings(
            base=tiny_base, data=(general,), out=tmp_path / "o", max_steps=1, quiet=True,
            targets=("q_proj",),
        )
    )  # fmt: skip
    only_mlp = warm_up(
        WarmupSettings(
            base=tiny_base, data=(general,), out=tmp_path / "p", max_steps=1, quiet=True,
            targets=("up_proj",),
        )
    )  # fmt: skip
    with pytest.raises(ModelError, match="no layer in common"):
        inspect(InspectSettings(adapter=str(other.path), other=str(only_mlp.path)))


def test_an_update_of_zeros_has_no_spectrum_to_draw(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="every update is zero"):
        spectra({"q_proj": (0.0, 0.0)}, "Nothing", tmp_path / "plot.png")


LAYER = Layer("l", rank=16, norm=1.0, effective_rank=8.0, rank_for_energy=12, singular_values=())


def test_advice_comes_where_it_should_and_only_there(warm_start: WarmStart) -> None:
    assert advice_on([LAYER], None) == []
    assert "convert --rank 3" in advice_on([replace(LAYER, rank_for_energy=3)], None)[0]
    assert "too small" in advice_on([replace(LAYER, effective_rank=15.5)], None)[0]
    assert "changes nothing" in advice_on([replace(LAYER, norm=0.0)], None)[0]
    sound = warm_start.manifest.model_copy(update={"warnings": []})
    worse = sound.model_copy(update={"validation_loss_before": 1.0, "validation_loss_after": 1.2})
    assert "did not lower" in advice_on([LAYER], worse)[0]
    assert advice_on([LAYER], sound) == []
