"""PEFT's initializations: the function at the start, the base afterwards, the adapter on disk."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapters import PROBE, assert_untouched, logits, losses, run, state, weights
from d2lora import SettingsError, TrainingError, WarmStart, WarmStartError, WarmupSettings, warm_up
from d2lora.adapters.base import Base, load_base
from d2lora.adapters.lora import attach
from d2lora.data.trained_rows import TrainedRows
from d2lora.settings import BaseSettings
from d2lora.study.read_plan import read_plan
from d2lora.training import phase
from d2lora.training.data_initialization import DATA_DRIVEN
from d2lora.training.minor_components import take_minor_components
from d2lora.training.phase import Phase
from support import dies_at_step, read_rows, write_rows

CHANGING = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "milora"]
KEEPING = ["gaussian", "orthogonal", "eva", "mica"]


@pytest.fixture
def loaded(tiny_base: str) -> Base:
    return load_base(BaseSettings(base=tiny_base, device="cpu"))


@pytest.mark.parametrize("init", CHANGING + KEEPING)
def test_an_adapter_says_on_a_fresh_base_what_was_trained_and_the_shared_base_is_untouched(
    tmp_path: Path, tiny_base: str, problems: str, loaded: Base, init: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before = state(loaded)
    trained: list[torch.Tensor] = []
    save = phase._save_weights

    def listening(whole: Phase, *args: Any) -> Any:
        with torch.no_grad():
            trained.append(whole.adapter.model(input_ids=PROBE).logits)
        return save(whole, *args)

    monkeypatch.setattr(phase, "_save_weights", listening)
    adapter = run(tmp_path / "a", tiny_base, problems, loaded, init=init)
    assert_untouched(loaded, before)
    torch.testing.assert_close(logits(tiny_base, adapter.path), trained[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(trained[0], logits(tiny_base), atol=1e-3)
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    rank = 8 if init in CHANGING else 4
    assert (config["r"], config["init_lora_weights"]) == (rank, True)
    assert (adapter.manifest.lora.rank, adapter.manifest.lora.alpha) == (rank, 2.0 * rank)
    about = adapter.manifest.initialization
    assert about is not None
    assert about["name"] == init
    if init in CHANGING:
        assert about["converted_from_rank"] == 4
        assert about["largest_logit_difference"] < 1e-3
    data_driven = init in {"eva", "corda", "lora_ga"}
    assert about["n_samples"] == (40 if data_driven else 0)
    assert (adapter.manifest.cost["n_prepass_tokens"] > 0) == data_driven


@pytest.mark.parametrize("init", CHANGING + KEEPING)
def test_every_initialization_computes_what_the_base_does(
    tmp_path: Path, tiny_base: str, problems: str, init: str
) -> None:
    fresh = run(tmp_path / "f", tiny_base, problems, max_steps=1)
    adapter = run(tmp_path / "a", tiny_base, problems, init=init, max_steps=1)
    assert losses(adapter)[0] == pytest.approx(losses(fresh)[0], rel=1e-4)
    untrained = run(tmp_path / "u", tiny_base, problems, init=init, max_steps=0)
    torch.testing.assert_close(logits(tiny_base, untrained.path), logits(tiny_base))


@pytest.mark.parametrize("init", [*CHANGING, "eva", "gaussian", "mica"])
def test_initializations_differ_and_repeat(
    tmp_path: Path, tiny_base: str, problems: str, init: str
) -> None:
    first = run(tmp_path / "1", tiny_base, problems, init=init)
    second = run(tmp_path / "2", tiny_base, problems, init=init)
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name])
    fresh = run(tmp_path / "3", tiny_base, problems)
    assert losses(fresh)[-1] != losses(first)[-1]


def test_milora_takes_the_smallest_singular_components_of_a_weight(loaded: Base) -> None:
    before = {name: value.clone() for name, value in loaded.model.named_parameters()}
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["down_proj"])
    model = attach(loaded.model, config, seed=0)
    take_minor_components(model)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert layers
    whole = [value for name, value in before.items() if "down_proj" in name]
    for layer, weight in zip(layers, whole, strict=True):
        values = torch.linalg.svdvals(weight)
        taken = layer.get_delta_weight("default")
        torch.testing.assert_close(torch.linalg.svdvals(taken)[:3], values[-3:])
        rest = layer.get_base_layer().weight
        torch.testing.assert_close(torch.linalg.svdvals(rest)[:-3], values[:-3])
        torch.testing.assert_close(rest + taken, weight)


def test_mica_trains_a_alone(tmp_path: Path, tiny_base: str, problems: str) -> None:
    untrained = weights(run(tmp_path / "u", tiny_base, problems, init="mica", max_steps=0))
    trained = weights(run(tmp_path / "t", tiny_base, problems, init="mica"))
    for name, value in untrained.items():
        assert torch.equal(value, trained[name]) == ("lora_B" in name)


@pytest.mark.parametrize("init", ["pissa", "corda", "lora_ga", "eva", "mica", "milora"])
def test_a_killed_run_resumes_to_the_same_adapter(
    tmp_path: Path, tiny_base: str, problems: str, init: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"init": init, "checkpoint_every": 2, "max_steps": 5}
    whole = run(tmp_path / "whole", tiny_base, problems, **common)
    with monkeypatch.context() as patch, pytest.raises(dies_at_step(patch, 4)):
        run(tmp_path / "killed", tiny_base, problems, **common)
    resumed = run(tmp_path / "killed", tiny_base, problems, resume=True, **common)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name])


def test_a_run_that_fails_leaves_the_base_as_it_was(
    tmp_path: Path, tiny_base: str, problems: str, loaded: Base
) -> None:
    before = state(loaded)
    for init in ("pissa", "fresh"):
        with pytest.raises(TrainingError, match="learning-rate"):
            run(
                tmp_path / init, tiny_base, problems, loaded, init=init, learning_rate=1e30,
                warmup_fraction=0, max_grad_norm=0, max_steps=20,
            )  # fmt: skip
        assert_untouched(loaded, before)


def test_a_warm_up_takes_an_initialization_and_serves_a_task(
    tmp_path: Path, tiny_base: str, general: str, problems: str
) -> None:
    warm = warm_up(
        WarmupSettings(
            base=tiny_base, data=(general,), out=tmp_path / "w", init="pissa", rank=4, max_steps=3,
            quiet=True,
        )
    )  # fmt: skip
    assert warm.manifest.lora.rank == 8
    adapter = run(
        tmp_path / "a", tiny_base, problems, init=str(warm.path), rank=None, max_steps=0
    )  # fmt: skip
    torch.testing.assert_close(logits(tiny_base, adapter.path), logits(tiny_base, warm.path))


def test_an_adapter_that_was_never_converted_is_refused(
    tmp_path: Path, tiny_base: str, problems: str, warm_start: WarmStart
) -> None:
    shutil.copytree(warm_start.path, tmp_path / "w")
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa")
    get_peft_model(model, config).save_pretrained(tmp_path / "w")
    with pytest.raises(WarmStartError, match="never converted"):
        run(tmp_path / "a", tiny_base, problems, init=str(tmp_path / "w"), rank=None)


def test_dpo_from_pissa_is_held_to_the_base_as_it_was(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    rows = [
        {"prompt": row["question"], "chosen": row["answer"], "rejected": "I cannot tell."}
        for row in read_rows(Path(problems))
    ]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    common = {"objective": "dpo", "max_steps": 1}
    runs = [
        run(tmp_path / init, tiny_base, data, init=init, **common) for init in ("fresh", "pissa")
    ]
    kept = [json.loads((a.path / "reference.json").read_text()) for a in runs]
    for ours, theirs in zip(*(k["log_probabilities"] for k in kept), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert losses(runs[1])[0] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"init": "orthogonal", "rank": 3}, "even rank, got 3"),
        ({"init": "pissa", "rank": 33}, "ranks up to 16"),
        ({"init": "lora_ga", "rank": 9}, "ranks up to 8"),
        ({"init": "pissa", "dora": True}, "cannot be converted back"),
        ({"init": "pissa", "init_scale": 0.5}, "init_scale scales a warm start"),
        ({"init": "pissa", "objective": "dpo", "reference": "warm_start"}, "not initialized from"),
        ({"init": "pisa"}, "Did you mean `pissa`"),
    ],
)
def test_what_an_initialization_cannot_do_is_reported(
    tmp_path: Path, tiny_base: str, problems: str, changes: dict[str, Any], fault: str
) -> None:
    with pytest.raises((SettingsError, WarmStartError), match=fault):
        run(tmp_path / "a", tiny_base, problems, **changes)
    assert not (tmp_path / "a").exists()


def test_corda_sees_no_padding(
    tmp_path: Path, tiny_base: str, problems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    look = DATA_DRIVEN["corda"]

    def listening(model: Any, config: Any, batches: Any, seed: int) -> Any:
        seen.extend(batch.mask_BT for batch in batches)
        return look(model, config, batches, seed)

    monkeypatch.setitem(DATA_DRIVEN, "corda", listening)
    run(tmp_path / "a", tiny_base, problems, init="corda")
    assert len({mask.shape[1] for mask in seen}) > 1
    assert all(mask.all() for mask in seen)


def test_loftq_without_bitsandbytes_says_what_to_install(
    tmp_path: Path, tiny_base: str, problems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2lora.runtime.extras.find_spec", {}.get)
    with pytest.raises(SettingsError, match=r"pip install 'd2lora\[quantization\]'"):
        run(tmp_path / "a", tiny_base, problems, init="loftq")


def test_loftq_on_a_cpu_is_an_error_that_says_what_it_needs(
    tmp_path: Path, tiny_base: str, problems: str, loaded: Base
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(SettingsError, match="needs CUDA"):
        run(tmp_path / "a", tiny_base, problems, loaded, init="loftq")


def test_a_warm_up_takes_no_folder_as_its_initialization(general: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="a warm-up starts from a new adapter"):
        WarmupSettings(data=(general,), out=tmp_path, init="warm")


def test_b_learns_faster_by_the_ratio_of_lora_plus(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    common = {"max_steps": 1, "warmup_fraction": 0.0, "seed_init": 1}
    plain = weights(run(tmp_path / "1", tiny_base, problems, **common))
    plus = weights(run(tmp_path / "2", tiny_base, problems, lora_plus_ratio=4.0, **common))
    for name, value in plain.items():
        factor = 4.0 if "lora_B" in name else 1.0
        torch.testing.assert_close(plus[name], value * factor, rtol=1e-5, atol=1e-7)


def test_rslora_scales_by_the_root_of_the_rank(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    # alpha 8 over sqrt(4) is alpha 16 over 4.
    rslora = run(tmp_path / "1", tiny_base, problems, rslora=True, alpha=8)
    plain = run(tmp_path / "2", tiny_base, problems, alpha=16)
    for name, value in weights(plain).items():
        assert torch.equal(weights(rslora)[name], value)
    torch.testing.assert_close(logits(tiny_base, rslora.path), logits(tiny_base, plain.path))
    converted = run(tmp_path / "3", tiny_base, problems, rslora=True, alpha=8, init="pissa")
    assert converted.manifest.initialization is not None
    assert converted.manifest.initialization["largest_logit_difference"] < 1e-3


def test_dora_trains_magnitudes_and_a_warm_start_hands_it_on(
    tmp_path: Path, tiny_base: str, general: str, problems: str, warm_start: WarmStart
) -> None:
    warm = warm_up(
        WarmupSettings(
            base=tiny_base, data=(general,), out=tmp_path / "w", rank=4, dora=True, max_steps=3,
            learning_rate=1e-2, quiet=True,
        )
    )  # fmt: skip
    magnitudes = {n for n in load_file(warm.path / "adapter_model.safetensors") if "magnitude" in n}
    assert magnitudes
    adapter = run(tmp_path / "a", tiny_base, problems, init=str(warm.path), rank=None)
    moved = weights(adapter)
    before = load_file(warm.path / "adapter_model.safetensors")
    assert all((moved[name] != before[name]).any() for name in magnitudes)
    assert adapter.manifest.lora.dora
    with pytest.raises(WarmStartError, match="--dora on, but it has off"):
        run(
            tmp_path / "b", tiny_base, problems, init=str(warm_start.path), rank=None, dora=True
        )  # fmt: skip


def test_an_adapter_of_a_task_is_a_warm_start_for_another(
    tmp_path: Path, tiny_base: str, problems: str, titles: str, loaded: Base
) -> None:
    first = run(tmp_path / "first", tiny_base, problems, loaded)
    same = run(tmp_path / "same", tiny_base, titles, loaded, init=str(first.path), max_steps=0)
    own, copy = (load_file(a.path / "adapter_model.safetensors") for a in (first, same))
    assert all(torch.equal(own[name], copy[name]) for name in own)
    assert same.manifest.lineage[-1].fingerprint == first.manifest.adapter_fingerprint
    assert same.manifest.initialization is not None
    assert same.manifest.initialization["name"] == "adapter"
    trained = [TrainedRows.read(a.path) for a in (first, same)]
    assert (trained[0] | trained[1]) == trained[1]


def test_an_adapter_made_by_peft_alone_is_a_start(
    tmp_path: Path, tiny_base: str, titles: str, loaded: Base
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    config.init_lora_weights = False
    get_peft_model(model, config).save_pretrained(str(tmp_path / "peft"))
    same = run(
        tmp_path / "same", tiny_base, titles, loaded, init=str(tmp_path / "peft"), max_steps=0,
        rank=None,
    )  # fmt: skip
    own = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    copy = load_file(same.path / "adapter_model.safetensors")
    assert own.keys() == copy.keys()
    assert all(torch.equal(own[name], copy[name]) for name in own)
    lora = same.manifest.lora
    assert (lora.rank, lora.alpha, lora.targets) == (3, 5.0, ("down_proj", "q_proj"))
    plan = {"warm_ups": {"theirs": {"path": str(tmp_path / "peft")}}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(SettingsError, match="what it cost, which a study reports, is not known"):
        read_plan(str(tmp_path / "plan.yaml"))
