"""An adapter made to fit keeps its function, and what it loses is reported."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2lora import (
    AdaptSettings,
    ConvertSettings,
    ModelError,
    SettingsError,
    WarmStart,
    adapt,
    convert,
)
from d2lora.adapters.base import load_tokenizer
from d2lora.adapters.factors import Factors, extend, singular_values, truncate
from d2lora.adapters.fingerprints import fingerprint_of
from d2lora.adapters.foreign import save_tokenizer
from d2lora.adapters.mixing import Plain
from d2lora.errors import disk_fault
from d2lora.settings import BaseSettings

PROBE = torch.arange(5, 60)[None]


def random_factors(rank: int = 6) -> Factors:
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, 20, generator=generator, dtype=torch.float64)
    return Factors(a, torch.randn(30, rank, generator=generator, dtype=torch.float64) * 0.1)


def product(factors: Factors) -> torch.Tensor:
    return factors.b @ factors.a


def logits(base: str, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(adapter)).eval()(input_ids=PROBE).logits


def test_singular_values_are_those_of_the_dense_product() -> None:
    factors = random_factors()
    dense = torch.linalg.svdvals(product(factors))[:6]
    torch.testing.assert_close(singular_values(factors), dense)


def test_truncation_is_the_best_of_its_rank_and_tells_the_energy_kept() -> None:
    factors = random_factors()
    u, s, vt = torch.linalg.svd(product(factors))
    best = (u[:, :3] * s[:3]) @ vt[:3]
    kept = truncate(factors, 3)
    torch.testing.assert_close(product(kept.factors), best)
    assert kept.energy_kept == pytest.approx(float(s[:3].square().sum() / s.square().sum()))


def test_truncation_to_the_same_rank_keeps_product_and_balance() -> None:
    factors = random_factors()
    same = truncate(factors, 6).factors
    torch.testing.assert_close(product(same), product(factors))
    ratio = [float(f.b.norm() / f.a.norm()) for f in (factors, same)]
    assert ratio[0] == pytest.approx(ratio[1])


def test_a_zero_update_can_be_truncated() -> None:
    zero = Factors(random_factors().a, torch.zeros(30, 6, dtype=torch.float64))
    kept = truncate(zero, 2)
    assert kept.energy_kept == 1.0
    assert not product(kept.factors).any()


def test_extension_keeps_the_product_and_adds_directions_that_train() -> None:
    factors = random_factors()
    more = extend(factors, 9, torch.Generator().manual_seed(0))
    torch.testing.assert_close(product(more), product(factors), rtol=0, atol=0)
    assert torch.linalg.matrix_rank(more.a) == 9
    assert not more.b[:, 6:].any()


@pytest.mark.parametrize("rank", [4, 7])
def test_a_higher_rank_says_the_same_and_is_a_warm_start(
    tmp_path: Path, tiny_base: str, problems: str, warm_start: WarmStart, rank: int
) -> None:
    done = convert(ConvertSettings(adapter=str(warm_start.path), rank=rank, out=tmp_path / "up"))
    torch.testing.assert_close(
        logits(tiny_base, done.path), logits(tiny_base, warm_start.path), rtol=0, atol=1e-9
    )
    converted = WarmStart.load(done.path)
    assert converted.manifest.lora.rank == rank
    assert converted.manifest.lora.alpha / rank == warm_start.manifest.lora.alpha / 4
    assert converted.manifest.lineage[-1].fingerprint == warm_start.manifest.adapter_fingerprint
    adapter = adapt(
        AdaptSettings(
            base=tiny_base, data=(problems,), init=str(done.path), out=tmp_path / "a", max_steps=3,
            learning_rate=1e-2, quiet=True,
        )
    )  # fmt: skip
    before = load_file(done.path / "adapter_model.safetensors")
    after = load_file(adapter.path / "adapter_model.safetensors")
    for name, value in before.items():
        if "lora_B" in name:
            assert (after[name] != value).any(dim=0).all(), "every direction trains"


def test_a_lower_rank_tells_what_each_layer_keeps(tmp_path: Path, warm_start: WarmStart) -> None:
    done = convert(ConvertSettings(adapter=str(warm_start.path), rank=2, out=tmp_path / "down"))
    weights = load_file(done.path / "adapter_model.safetensors")
    assert {len(value) for name, value in weights.items() if "lora_A" in name} == {2}
    assert len(done.energy_kept) == len(weights) // 2
    assert all(0.3 < kept <= 1 for kept in done.energy_kept.values())
    assert min(done.energy_kept.values()) < 1


def test_a_scale_multiplies_the_update(tmp_path: Path, warm_start: WarmStart) -> None:
    done = convert(ConvertSettings(adapter=str(warm_start.path), scale=0.5, out=tmp_path / "half"))
    weights = load_file(warm_start.path / "adapter_model.safetensors")
    halved = load_file(done.path / "adapter_model.safetensors")
    for name, value in weights.items():
        torch.testing.assert_close(halved[name], value * (0.5 if "lora_B" in name else 1.0))


def test_another_dtype_halves_the_file_and_is_a_warm_start(
    tmp_path: Path, tiny_base: str, problems: str, warm_start: WarmStart
) -> None:
    done = convert(
        ConvertSettings(adapter=str(warm_start.path), dtype="bfloat16", out=tmp_path / "half")
    )
    name = "adapter_model.safetensors"
    weights, halved = load_file(warm_start.path / name), load_file(done.path / name)
    for key, value in weights.items():
        assert torch.equal(halved[key], value.bfloat16())
    adapter = adapt(
        AdaptSettings(
            base=tiny_base, data=(problems,), init=str(done.path), max_steps=0,
            out=tmp_path / "a", quiet=True,
        )
    )  # fmt: skip
    for key, value in load_file(adapter.path / name).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, halved[key].float())


def test_an_init_scale_weakens_the_warm_start(
    tmp_path: Path, tiny_base: str, problems: str, warm_start: WarmStart
) -> None:
    adapter = adapt(
        AdaptSettings(
            base=tiny_base, data=(problems,), init=str(warm_start.path), init_scale=0.25,
            max_steps=0, out=tmp_path / "a", quiet=True,
        )
    )  # fmt: skip
    initial = load_file(warm_start.path / "adapter_model.safetensors")
    for name, value in load_file(adapter.path / "adapter_model.safetensors").items():
        torch.testing.assert_close(value, initial[name] * (0.25 if "lora_B" in name else 1.0))


def test_a_merged_model_loads_alone_and_says_the_same_tokens(
    tmp_path: Path, tiny_base: str, warm_start: WarmStart
) -> None:
    files = sorted(Path(tiny_base).iterdir())
    before = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    done = convert(
        ConvertSettings(
            base=tiny_base, adapter=str(warm_start.path), merge=True, out=tmp_path / "model"
        )
    )
    assert done.largest_logit_difference is not None
    assert done.largest_logit_difference < 1e-4
    ids = AutoTokenizer.from_pretrained(done.path)("How many", return_tensors="pt").input_ids
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), str(warm_start.path)
    )
    merged = AutoModelForCausalLM.from_pretrained(done.path)
    printed = [
        model.generate(input_ids=ids, max_new_tokens=20, do_sample=False).tolist()
        for model in (adapted, merged)
    ]
    assert printed[0] == printed[1]
    assert before == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_a_merged_model_is_written_in_shards(
    tmp_path: Path, tiny_base: str, warm_start: WarmStart
) -> None:
    settings = ConvertSettings(
        base=tiny_base, adapter=str(warm_start.path), merge=True, out=tmp_path / "whole"
    )
    whole = convert(settings).path
    shards = convert(settings.changed(shard_size="60KB", out=tmp_path / "shards")).path
    assert len(list(shards.glob("model-*-of-*.safetensors"))) > 1
    assert (shards / "model.safetensors.index.json").is_file()
    first, second = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (whole, shards)
    )
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert fingerprint_of(shards) == fingerprint_of(whole)


def test_an_adapter_is_not_put_on_another_base(
    tmp_path: Path, other_base: str, warm_start: WarmStart
) -> None:
    with pytest.raises(ModelError, match="has other weights"):
        convert(
            ConvertSettings(
                base=other_base, adapter=str(warm_start.path), merge=True, out=tmp_path / "model"
            )
        )


@pytest.mark.parametrize("asked", [{}, {"merge": True, "rank": 2}])
def test_a_conversion_asks_for_one_thing(
    tmp_path: Path, warm_start: WarmStart, asked: dict[str, int]
) -> None:
    with pytest.raises(SettingsError, match="--merge alone"):
        convert(ConvertSettings(adapter=str(warm_start.path), out=tmp_path / "x", **asked))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"scale": 1e300}, "would hold numbers beyond torch.float32"),
        ({"scale": 1e8, "dtype": "float16"}, "would hold numbers beyond torch.float16"),
        ({"rank": 2, "mix_weights": (0.5,)}, "mix_weights is of a mixture"),
        ({"rank": 2, "mix_method": "average"}, "mix_method is of a mixture"),
    ],
)
def test_a_conversion_that_could_not_be_what_is_asked_for_writes_nothing(
    tmp_path: Path, warm_start: WarmStart, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        convert(ConvertSettings(adapter=str(warm_start.path), out=tmp_path / "x", **asked))
    assert not (tmp_path / "x").exists()


def other_start(tmp_path: Path, tiny_base: str, problems: str, **changes: object) -> Path:
    settings = {"rank": 3, "alpha": 9.0, "max_steps": 4, "learning_rate": 1e-2, **changes}
    return adapt(
        AdaptSettings(
            base=tiny_base, data=(problems,), out=tmp_path / "other", quiet=True, **settings
        )
    ).path


def updates(folder: Path) -> dict[str, torch.Tensor]:
    adapter = Plain.read(folder)
    return {
        name: adapter.scale * (f.b.double() @ f.a.double()) for name, f in adapter.layers.items()
    }


def test_a_mixture_is_the_weighted_sum_of_the_updates_and_a_warm_start(
    tmp_path: Path, tiny_base: str, problems: str, warm_start: WarmStart
) -> None:
    other = other_start(tmp_path, tiny_base, problems)
    common = {"adapter": str(warm_start.path), "mix": (str(other),), "mix_weights": (0.7, -0.2)}
    mixed = convert(ConvertSettings(out=tmp_path / "m", **common)).path
    first, second, whole = (updates(path) for path in (warm_start.path, other, mixed))
    for name, value in whole.items():
        torch.testing.assert_close(
            value, 0.7 * first[name] - 0.2 * second[name], rtol=1e-5, atol=1e-7
        )
    loaded = WarmStart.load(mixed)
    assert loaded.manifest.lora.rank == 7
    assert [a.path for a in loaded.manifest.lineage][-2:] == [str(warm_start.path), str(other)]
    lower = convert(ConvertSettings(out=tmp_path / "l", rank=4, **common))
    assert Plain.read(lower.path).config.r == 4
    assert all(0 < kept <= 1 for kept in lower.energy_kept.values())
    assert torch.isfinite(logits(tiny_base, lower.path)).all()


def test_an_average_of_factors_needs_equal_shapes(
    tmp_path: Path, tiny_base: str, problems: str, warm_start: WarmStart
) -> None:
    path = str(warm_start.path)
    same = convert(
        ConvertSettings(adapter=path, mix=(path,), mix_method="average", out=tmp_path / "same")
    )
    before, after = updates(warm_start.path), updates(same.path)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)
    other = str(other_start(tmp_path, tiny_base, problems))
    with pytest.raises(ModelError, match="--mix-method cat"):
        convert(
            ConvertSettings(adapter=path, mix=(other,), mix_method="average", out=tmp_path / "x")
        )
    with pytest.raises(SettingsError, match=r"2 adapters are mixed, got 1 weight"):
        convert(ConvertSettings(adapter=path, mix=(other,), mix_weights=(1.0,), out=tmp_path / "x"))


def test_adapters_of_different_bases_are_not_mixed(
    tmp_path: Path, other_base: str, problems: str, warm_start: WarmStart
) -> None:
    foreign = other_start(tmp_path, other_base, problems)
    with pytest.raises(ModelError, match="has other weights"):
        convert(
            ConvertSettings(
                adapter=str(warm_start.path), mix=(str(foreign),), out=tmp_path / "x"
            )
        )  # fmt: skip


def test_a_tokenizer_that_the_disk_has_no_room_for_is_an_error_of_the_disk(
    tmp_path: Path, tiny_base: str
) -> None:
    resource = pytest.importorskip("resource")
    tokenizer = load_tokenizer(BaseSettings(base=tiny_base))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as found:
            save_tokenizer(tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written: file too large" in str(disk_fault(found.value))
