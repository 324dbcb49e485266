"""Which layers get an adapter, and of which rank, is what was asked for, and stays so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from d2lora import (
    Adapter,
    AdaptSettings,
    ConvertSettings,
    EvaluateSettings,
    SettingsError,
    WarmStartError,
    adapt,
    convert,
    evaluate,
)
from d2lora.settings import InspectSettings
from d2lora.tools.inspect import inspect
from support import dies_at_step

PROBE = torch.arange(5, 45)[None]
PARTIAL: dict[str, Any] = {
    "targets": ("all-linear",), "exclude_targets": ("down_proj", r".*k_proj"), "layers": (1,),
    "rank_pattern": ("q_proj=2", "mlp.*=6"), "alpha_pattern": ("up_proj=3",),
}  # fmt: skip


def run(out: Path, base: str, data: str, **changes: Any) -> Adapter:
    settings: dict[str, Any] = {
        "n": 16, "max_steps": 3, "batch_size": 8, "rank": 4, "learning_rate": 1e-2, "quiet": True,
        **changes,
    }  # fmt: skip
    return adapt(AdaptSettings(base=base, data=(data,), out=out, **settings))


def ranks(folder: Path) -> dict[str, int]:
    weights = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.model.layers.").removesuffix(".lora_A.weight"): len(a)
        for name, a in weights.items()
        if "lora_A" in name
    }


@torch.no_grad()
def logits(base: str, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()(input_ids=PROBE).logits


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, problems: str) -> Adapter:
    return run(tmp_path_factory.mktemp("partial") / "a", tiny_base, problems, **PARTIAL)


def test_exclusions_layers_and_ranks_are_those_of_the_saved_adapter(partial: Adapter) -> None:
    assert ranks(partial.path) == {
        "1.self_attn.q_proj": 2, "1.self_attn.v_proj": 4, "1.self_attn.o_proj": 4,
        "1.mlp.gate_proj": 6, "1.mlp.up_proj": 6,
    }  # fmt: skip
    recorded = partial.manifest.lora.model_dump(mode="json")
    assert {name: tuple(recorded[name]) for name in PARTIAL} == PARTIAL
    config = json.loads((partial.path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"q_proj": 2, "mlp.*": 6}
    assert config["alpha_pattern"] == {"up_proj": 3}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ((r".*\.0\..*[qv]_proj",), {"0.self_attn.q_proj", "0.self_attn.v_proj"}),
        (
            ("down_proj", r"model\.layers\.1\.self_attn\.o_proj"),
            {"0.mlp.down_proj", "1.mlp.down_proj", "1.self_attn.o_proj"},
        ),
    ],
)
def test_patterns_mean_the_layers_whose_whole_name_they_match(
    tmp_path: Path, tiny_base: str, problems: str, targets: tuple[str, ...], expected: set[str]
) -> None:
    adapter = run(tmp_path / "a", tiny_base, problems, targets=targets, max_steps=0)
    assert ranks(adapter.path).keys() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": (r".*\.z_proj",)}, r"no linear layer's whole name matches"),
        ({"targets": ("(q_proj",)}, "is not a pattern"),
        ({"exclude_targets": ("nope",)}, "the base has no module `nope`"),
        ({"layers": (7,)}, "the base has no layer 7: its layers are 0 to 1"),
        ({"targets": ("q_proj",), "exclude_targets": ("q_proj",)}, "leave no layer to adapt"),
        ({"rank_pattern": ("z_proj=3",)}, "--rank-pattern: no target is called `z_proj`"),
        ({"rank_pattern": ("q_proj",)}, "expected a name and a positive number"),
        ({"rank_pattern": ("q_proj=0",)}, "expected a name and a positive number"),
        ({"rank_pattern": ("q_proj=8",), "init": "pissa"}, "gives every layer one rank and alpha"),
    ],
)
def test_what_a_base_does_not_have_is_an_error(
    tmp_path: Path, tiny_base: str, problems: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        run(tmp_path / "a", tiny_base, problems, **settings)


def test_such_an_adapter_is_resumed_and_continued(
    tmp_path: Path, tiny_base: str, problems: str, partial: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {**PARTIAL, "checkpoint_every": 1}
    with monkeypatch.context() as killed, pytest.raises(dies_at_step(killed, 2)):
        run(tmp_path / "r", tiny_base, problems, **common)
    resumed = run(tmp_path / "r", tiny_base, problems, **common, resume=True)
    one, other = (load_file(a.path / "adapter_model.safetensors") for a in (resumed, partial))
    assert all(torch.equal(one[name], other[name]) for name in other)
    init = {"init": str(partial.path), "rank": None}
    more = run(tmp_path / "m", tiny_base, problems, **init)
    assert ranks(more.path) == ranks(partial.path)
    assert more.manifest.lora == partial.manifest.lora
    with pytest.raises(WarmStartError, match=r"--layers 0, but it has 1"):
        run(tmp_path / "c", tiny_base, problems, **init, layers=(0,))


def test_such_an_adapter_is_evaluated_inspected_and_converted(
    tmp_path: Path, tiny_base: str, problems: str, partial: Adapter
) -> None:
    scores = evaluate(
        EvaluateSettings(
            base=tiny_base, adapters=(str(partial.path),), data=(problems,), limit=4,
            max_new_tokens=4, out=tmp_path / "scores", quiet=True,
        )
    )  # fmt: skip
    assert scores.scores
    assert len(inspect(InspectSettings(adapter=str(partial.path))).layers) == 5
    expected = logits(tiny_base, partial.path)
    for number, changes in enumerate(({"rank": 8}, {"dtype": "float32"}, {"merge": True})):
        out = tmp_path / str(number)
        base = {"base": tiny_base} if "merge" in changes else {}
        convert(ConvertSettings(adapter=str(partial.path), out=out, **base, **changes))
        if "merge" in changes:
            model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
            with torch.no_grad():
                found = model(input_ids=PROBE).logits
        else:
            found = logits(tiny_base, out)
            assert set(ranks(out).values()) == {changes.get("rank", 6)}
            assert Adapter.load(out).manifest.lora.rank_pattern == ()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
