"""Bases come from where they should, with their reasons where they do not."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from d2lora import ModelError
from d2lora.adapters.base import load_base
from d2lora.adapters.base_files import base_folder
from d2lora.adapters.fingerprints import fingerprint_of, identity_of
from d2lora.cli import main
from d2lora.runtime.devices import device_of, dtype_of, slow_dtype
from d2lora.settings import BaseSettings
from d2lora.study.read_plan import read_plan
from d2lora.study.readiness import warnings_of
from support import small_plan, write_rows

EMBEDDED = "8e7dcdb90a70d2828b15ec8cc6278c25d539939df5009a19620c8acd6941ccd7"
"""What stored warm starts on the embedded base say of it."""


def test_a_hub_id_is_fetched_without_code_or_pickles(
    tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def fetched(
        name: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        assert not local_files_only
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return tiny_base

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    base = load_base(BaseSettings(base="owner/name", revision="v1", device="cpu"))
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert not [p for p in asked["patterns"] if p.endswith((".py", ".bin", ".pt", ".pth"))]
    assert base.fingerprint == fingerprint_of(Path(tiny_base))


def test_a_hub_that_cannot_be_reached_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("the hub cannot be reached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match="no such local folder, and the hub has no such model"):
        base_folder("owner/name")


def test_a_fingerprint_tells_weights_and_not_their_files(
    tmp_path: Path, tiny_base: str, other_base: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert fingerprint_of(tmp_path) == fingerprint_of(Path(tiny_base))
    assert fingerprint_of(tmp_path) != fingerprint_of(Path(other_base))


def test_files_that_are_not_loaded_do_not_change_a_fingerprint(
    tmp_path: Path, tiny_base: str, other_base: str
) -> None:
    from transformers import AutoModelForCausalLM

    own, other = fingerprint_of(Path(tiny_base)), Path(other_base) / "model.safetensors"
    whole, sharded = Path(shutil.copytree(tiny_base, tmp_path / "whole")), tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.save_pretrained(sharded, max_shard_size="20KB")
    for folder in (whole, sharded):
        for name in ("consolidated.safetensors", "model.fp16.safetensors", "adapter.safetensors"):
            shutil.copy(other, folder / name)
        assert fingerprint_of(folder) == own
        assert identity_of(folder) == identity_of(Path(tiny_base))  # quantized or not, too
    next(sharded.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match="1 file of weights missing: model-00002"):
        fingerprint_of(sharded)
    shutil.copy(other, sharded / "model.safetensors")  # which transformers takes first
    assert fingerprint_of(sharded) == fingerprint_of(Path(other_base))
    loaded = AutoModelForCausalLM.from_pretrained(sharded)
    expected = AutoModelForCausalLM.from_pretrained(other_base)
    for name, weight in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


def test_the_fingerprint_of_the_embedded_base_stays_what_it_is() -> None:
    assert fingerprint_of(base_folder("embedded")) == EMBEDDED


@pytest.mark.parametrize("option", ["revision", "gguf_file"])
def test_an_option_that_chooses_nothing_of_a_base_is_an_error(option: str, tiny_base: str) -> None:
    with pytest.raises(ModelError, match=f"--{option.replace('_', '-')} is of a"):
        base_folder("embedded", **{option: "main"})
    with pytest.raises(ModelError, match=f"--{option.replace('_', '-')}"):
        base_folder(tiny_base, **{option: "main"})


def test_a_base_whose_logits_are_no_numbers_is_refused(tmp_path: Path, tiny_base: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny_base, tmp_path / "damaged"))
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.get_parameter("model.norm.weight").data[3] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"damaged: its logits are NaN in torch\.float32"):
        load_base(BaseSettings(base=str(folder), device="cpu"))


def test_the_number_format_follows_the_device() -> None:
    assert dtype_of("auto", torch.device("cpu")) == torch.float32
    assert dtype_of("auto", torch.device("cuda")) == torch.bfloat16
    assert dtype_of("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_a_dtype_that_the_processor_emulates_is_warned_of_before_anything_is_computed(
    tmp_path: Path,
    tiny_base: str,
    titles: str,
    general: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(words: str, *, has_products: bool) -> str:
        monkeypatch.setattr("d2lora.runtime.devices._multiplies", lambda _: has_products)
        assert main([*words.split(), "--device", "cpu"]) == 0
        shown = capsys.readouterr()
        return shown.out + shown.err

    warning = "warning: this processor has no products in bfloat16, and takes many times as long"
    for n, words in enumerate((
        f"adapt --data {titles} --n 4 --max-steps 1 --dry-run",
        f"evaluate --data {titles} --limit 1 --max-new-tokens 1",
        "generate --prompt x --max-new-tokens 1",
    )):  # fmt: skip
        out = "" if "--prompt" in words else f" --out {tmp_path / str(n)}"
        again = f"{out}-2" if out else ""
        whole = f"{words} --base {tiny_base} --dtype bfloat16"
        assert warning in said(whole + out, has_products=False)
        assert warning not in said(whole + again, has_products=True)
    cpu = torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float16):
        monkeypatch.setattr("d2lora.runtime.devices._multiplies", lambda _: False)
        assert slow_dtype(dtype, cpu)
        assert slow_dtype(dtype, torch.device("cuda")) is None
    assert slow_dtype(torch.float32, cpu) is None
    values = small_plan(tmp_path, tiny_base, general, titles) | {"dtype": "bfloat16"}
    path = write_rows(tmp_path / "plan.json", [values])
    plan = read_plan(path)
    assert [line for line in warnings_of(plan) if "--dtype float32" in line]


def test_each_of_several_processes_takes_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_of("auto") == torch.device("cuda", 3)
    assert device_of("cuda:1") == torch.device("cuda", 1)
    assert device_of("cpu") == torch.device("cpu")
