"""What a stored run is known by."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest

from conftest import save_tiny_base
from d2lora import AdaptSettings, EvaluateSettings, SettingsError
from d2lora.settings import BaseSettings
from d2lora.study.store import Job, identity_of, shared_base, versions


@dataclass(frozen=True)
class Training(Job):
    """A run that is never run."""

    settings: AdaptSettings

    def identity(self) -> dict[str, Any]:
        """Return what decides the result."""
        return identity_of(self.settings)

    def run(self) -> dict[str, Any]:
        """Do it."""
        raise NotImplementedError


@pytest.fixture
def key(tmp_path: Path) -> Callable[..., str]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')

    def known_by(**values: Any) -> str:
        settings = AdaptSettings(**{"data": (str(rows),), "out": tmp_path, **values})
        return Training("x", ("", 0), tmp_path, settings).key

    return known_by


def test_a_run_is_known_by_the_device_and_dtype_that_its_settings_come_to(
    key: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert key() == key(device="auto") == key(device="cpu") == key(device="cpu", dtype="float32")
    others = [key(dtype="bfloat16"), key(device="cuda"), key(device="cuda", dtype="float32")]
    assert len({key(), *others}) == 4
    assert key(device="cuda") == key(device="cuda:1") == key(device="cuda", dtype="bfloat16")


@pytest.mark.parametrize("library", ["d2lora", "torch", "transformers", "peft"])
def test_a_run_of_other_versions_is_another(
    key: Callable[..., str], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, known = key(), metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9" if name == library else known(name))
    versions.cache_clear()
    assert key() != before
    monkeypatch.undo()
    versions.cache_clear()
    assert key() == before


def test_files_that_change_while_the_process_lives_change_the_key(
    key: Callable[..., str], tmp_path: Path
) -> None:
    rows, test = tmp_path / "rows.jsonl", tmp_path / "test.jsonl"
    test.write_text('{"question": "a?"}\n')
    first = key(keep_out=(str(test),))
    for file, old, new in ((rows, "b", "c"), (test, "a", "d")):
        status = file.stat()
        file.write_text(file.read_text().replace(old, new))  # of the same size
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert key(keep_out=(str(test),)) != first
        file.write_text(file.read_text().replace(new, old))
    assert key(keep_out=(str(test),)) == first


def test_a_base_that_changes_while_the_process_lives_is_another_and_is_loaded_again(
    key: Callable[..., str], tmp_path: Path
) -> None:
    base = save_tiny_base(tmp_path / "base", seed=0)
    first, loaded = key(base=base), shared_base(BaseSettings(base=base))
    assert shared_base(BaseSettings(base=base)) is loaded
    save_tiny_base(tmp_path / "base", seed=1)
    second = key(base=base)
    again = shared_base(BaseSettings(base=base))
    assert second != first
    assert again.fingerprint != loaded.fingerprint
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text("{{ messages }}")
    assert key(base=base) != second, "other token ids"


def test_an_adapter_is_known_by_its_files_wherever_it_lies(
    key: Callable[..., str], tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text("weights")
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "c" / "adapter_config.json").write_text('{"lora_alpha": 3}')
    keys = [key(init=str(tmp_path / name)) for name in ("a", "b", "c")]
    assert keys[0] == keys[1] != keys[2]


def test_a_task_is_known_by_its_card_and_by_the_metrics_of_its_own(tmp_path: Path) -> None:
    card, metric = tmp_path / "card.yaml", tmp_path / "mine.py"
    card.write_text("metrics: [mine.py:score]\n")
    metric.write_text("def score(prediction, row):\n    return 1.0\n")
    settings = EvaluateSettings.unchecked({"task": str(card), "out": tmp_path / "e"})
    first = identity_of(settings)["task"]
    metric.write_text("def score(prediction, row):\n    return 0.0\n")
    assert identity_of(settings)["task"] != first
    metric.unlink()
    with pytest.raises(SettingsError, match=r"mine\.py: no such file"):
        identity_of(settings)


def test_a_card_that_ships_is_known_by_what_it_holds_as_a_copy_of_it_is(tmp_path: Path) -> None:
    text = resources.files("d2lora").joinpath("tasks", "svamp.yaml").read_text("utf-8")
    copy, other = tmp_path / "copy.yaml", tmp_path / "other.yaml"
    copy.write_text(text)
    other.write_text(f"{text}\nsystem: You are good at sums.\n")

    def known_by(task: str) -> object:
        return identity_of(EvaluateSettings.unchecked({"task": task, "out": tmp_path}))["task"]

    assert known_by("svamp") == known_by(str(copy)) != known_by(str(other))
