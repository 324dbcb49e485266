"""Many rows: those of a phase stay on disk and are what they would be in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from d2lora.adapters.base import load_base
from d2lora.data import processes
from d2lora.data.contamination import Guard, leaks_of
from d2lora.data.encode import Encoder
from d2lora.data.reading import read_task
from d2lora.data.sources import nested_order, split_validation
from d2lora.data.trained_rows import TrainedRows
from d2lora.embedded import general_rows
from d2lora.errors import DataError, ModelError
from d2lora.runtime.console import Reporter
from d2lora.settings import WarmupSettings
from d2lora.settings.seeds import seed_of
from d2lora.training.rows import prepare_rows
from support import write_rows

forked = pytest.mark.filterwarnings(
    "ignore:.*use of fork:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)


@pytest.fixture
def encoder(tiny_base: str) -> Encoder:
    settings = WarmupSettings(base=tiny_base, data=("-",), out=Path("-"), device="cpu")
    return Encoder.of(load_base(settings), None)


@pytest.fixture
def settings(tmp_path: Path, tiny_base: str) -> WarmupSettings:
    """Settings of a warm-up on rows of which one is bad, one a test row and some too long."""
    rows = list(general_rows("train", 40))
    test = write_rows(tmp_path / "test.jsonl", rows[7:8])
    data = write_rows(tmp_path / "rows.jsonl", [*rows[:20], {"prompt": 1}, *rows[20:]])
    return WarmupSettings(
        base=tiny_base, data=(data,), out=tmp_path, keep_out=(test,), skip_bad_rows=True,
        max_length=60, overlong="truncate", validation_fraction=0.2, device="cpu", quiet=True,
    )  # fmt: skip


@forked
@pytest.mark.parametrize("n_processes", [1, 2])
@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_rows_on_disk_are_those_that_memory_would_hold(
    settings: WarmupSettings, encoder: Encoder, overlong: str, n_processes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = read_task(settings.data, skip_bad=True, check=encoder.check)
    leaks = leaks_of([Guard(settings.keep_out)], data.examples)
    clean = [e for index, e in enumerate(data.examples) if index not in leaks]
    chosen = [clean[index] for index in nested_order(len(clean), seed_of(settings, "subset"))[:30]]
    fitting = [encoder.encode(e).length <= 60 for e in chosen]
    if overlong == "drop":
        chosen = [e for e, fits in zip(chosen, fitting, strict=True) if fits]
    items = [encoder.encode(e, 60) for e in chosen]
    train, valid = split_validation(range(len(items)), 0.2)
    assert len(leaks) == 1
    assert 0 < sum(fitting) < 30

    monkeypatch.setattr(processes, "n_processes", lambda _: n_processes)
    rows = prepare_rows(settings.changed(overlong=overlong), 30, encoder, Reporter(quiet=True))
    assert list(rows.train) == [items[index] for index in train]
    assert list(rows.valid) == [items[index] for index in valid]
    assert rows.train[0] is not rows.train[0], "read from disk again"
    assert rows.trained == TrainedRows.of([chosen[index] for index in train])
    assert [str(fault) for fault in rows.faults[:1]] == [str(fault) for fault in data.faults]
    assert rows.faults[1:] == [leak.as_fault(data.rows[index]) for index, leak in leaks.items()]


@forked
@pytest.mark.parametrize("n_processes", [1, 2])
def test_errors_are_those_of_one_process_and_no_random_number_is_drawn(
    n_processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "n_processes", lambda _: n_processes)
    state = torch.random.get_rng_state()

    def halved(number: int) -> Any:
        if number == 150:
            raise ModelError("150 is too much")
        return number / 2

    assert list(processes.mapped(halved, range(140))) == [number / 2 for number in range(140)]
    with pytest.raises(ModelError, match=r"^150 is too much$"):
        list(processes.mapped(halved, range(200)))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_rows_that_cannot_be_encoded_are_named_all_at_once(
    settings: WarmupSettings, encoder: Encoder
) -> None:
    tight = settings.changed(max_length=8)
    with pytest.raises(DataError, match="39 of 39 rows cannot be encoded"):
        prepare_rows(tight, None, encoder, Reporter(quiet=True))
