"""Less memory, the same numbers: checkpointing, smaller passes, and what is estimated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adapters import losses
from d2lora import (
    Adapter,
    AdaptSettings,
    TrainingError,
    WarmupSettings,
    adapt,
    adaptation,
    fast,
    warmup,
)
from d2lora.adapters.base import Base, load_base
from d2lora.adapters.lora import LoraShape, attach_fresh
from d2lora.cli import main
from d2lora.data.batches import Encoded, collate
from d2lora.runtime.attempts import is_out_of_memory
from d2lora.runtime.console import Reporter
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import BaseSettings, TrainSettings
from d2lora.training.memory import kept_bytes, memory_of
from d2lora.training.passes import Passes
from d2lora.training.recomputation import recomputed, recomputes
from support import write_rows

ROWS = [Encoded(tuple(range(5, 5 + n)), 2) for n in (120, 9, 60, 33)]


def run(out: Path, base: str, data: str, loaded: Base | None = None, **changes: Any) -> Adapter:
    settings: dict[str, Any] = {
        "n": 16, "max_steps": 3, "batch_size": 8, "rank": 4, "learning_rate": 1e-2, "quiet": True,
        **changes,
    }  # fmt: skip
    return adapt(AdaptSettings(base=base, data=(data,), out=out, **settings), loaded)


def weights(adapter: Adapter) -> dict[str, torch.Tensor]:
    return load_file(adapter.path / "adapter_model.safetensors")


@pytest.fixture
def base(tiny_base: str) -> Base:
    return load_base(BaseSettings(base=tiny_base, device="cpu"))


def with_adapter(base: Base, dropout: float = 0.0) -> nn.Module:
    model = attach_fresh(base.model, LoraShape(4, 8, dropout, ("all-linear",)), 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.train()


class Full:
    """Raises what a full memory raises when more rows than it holds go through a model."""

    def __init__(self, model: nn.Module, holds: int, error: Callable[[], Exception]) -> None:
        self.holds, self.error, self.n_raised, self.sizes = holds, error, 0, list[int]()
        model.get_submodule("model.layers.0").register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, layer: nn.Module, args: Any, _: Any) -> None:
        if not torch.is_grad_enabled() or getattr(layer, "gradient_checkpointing", False):
            return
        self.sizes.append(n_rows := args[0].shape[0])
        if n_rows > self.holds:
            self.n_raised += 1
            raise self.error()


ERRORS: dict[str, Callable[[], Exception]] = {
    "a GPU's": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "the allocator's": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"
    ),
    "Python's": MemoryError,
}


@pytest.mark.parametrize("fast_when", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_bit_of_loss_and_gradients(
    base: Base, dropout: float, *, fast_when: bool
) -> None:
    model = with_adapter(base, dropout)
    batch, found = collate(ROWS, base.pad_id), list[list[torch.Tensor]]()
    with fast.enabled(model, when=fast_when):
        scorer = TokenScorer(model)
        for on in (False, True):
            with recomputed(model, on=on):
                torch.manual_seed(3)
                model.zero_grad()
                loss = -scorer(batch).mean()
                loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert scorer.way == ("rows end to end" if fast_when else "rows padded")
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not recomputes(model)


def test_a_run_with_checkpointing_is_the_run_without(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    with_it, without = (
        run(tmp_path / on, tiny_base, problems, checkpointing=on) for on in ("on", "off")
    )
    assert losses(with_it) == losses(without)
    kept = zip(weights(with_it).values(), weights(without).values(), strict=True)
    assert all(torch.equal(*pair) for pair in kept)


@pytest.mark.parametrize("kind", ERRORS)
def test_a_step_that_does_not_fit_is_taken_again_in_smaller_passes(
    tmp_path: Path, tiny_base: str, problems: str, base: Base, kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    expected = run(tmp_path / "1", tiny_base, problems, base, fast=False)
    full = Full(base.model, 3, ERRORS[kind])
    found = run(tmp_path / "2", tiny_base, problems, base, fast=False, quiet=False)
    assert 0 < full.n_raised <= 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("did not fit into memory: passes have at most") == full.n_raised
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    for one, other in zip(weights(found).values(), weights(expected).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


def test_a_retried_step_draws_the_same_dropout(
    tmp_path: Path, tiny_base: str, problems: str, base: Base
) -> None:
    common = {"micro_batch_size": 1, "dropout": 0.2}
    expected = run(tmp_path / "1", tiny_base, problems, base, **common)
    full = Full(base.model, 0, ERRORS["a GPU's"])
    found = run(tmp_path / "2", tiny_base, problems, base, **common)
    assert full.n_raised == 1
    assert losses(found) == losses(expected)


def test_a_single_row_that_does_not_fit_is_checkpointed(
    tmp_path: Path, tiny_base: str, problems: str, base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(tmp_path / "1", tiny_base, problems, base, fast=False)
    full = Full(base.model, 0, ERRORS["a GPU's"])
    found = run(tmp_path / "2", tiny_base, problems, base, fast=False, quiet=False)
    assert full.sizes[-1] == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("activation checkpointing is on now; the result does not depend on it") == 1
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    assert not recomputes(base.model)


def test_a_row_that_does_not_fit_in_any_way_is_an_error_that_says_what_to_try(
    tmp_path: Path, tiny_base: str, problems: str, base: Base
) -> None:
    Full(base.model, 0, ERRORS["a GPU's"])
    with pytest.raises(TrainingError, match=r"did not fit into memory; give --checkpointing on"):
        run(tmp_path / "1", tiny_base, problems, base, checkpointing="off")


def test_a_validation_that_does_not_fit_is_taken_again(
    tmp_path: Path, tiny_base: str, problems: str, base: Base
) -> None:
    common = {"validation_fraction": 0.5, "fast": False}
    expected = run(tmp_path / "1", tiny_base, problems, base, **common)
    raised: list[int] = []

    def look(_: nn.Module, args: Any) -> None:
        if len(args[0]) > 3 and not raised:
            raised.append(len(args[0]))
            raise torch.OutOfMemoryError

    base.model.get_submodule("model.layers.0").register_forward_pre_hook(look)
    found = run(tmp_path / "2", tiny_base, problems, base, **common)
    assert raised
    after = expected.manifest.validation_loss_after
    assert found.manifest.validation_loss_after == pytest.approx(after, rel=1e-4)


@pytest.mark.parametrize("error", ERRORS.values(), ids=list(ERRORS))
def test_a_command_without_enough_memory_says_so(
    error: Callable[[], Exception],
    tiny_base: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise error()

    monkeypatch.setattr("d2lora.evaluation.generate.load_base", full)
    assert main(["generate", "--base", tiny_base, "--prompt", "x"]) == 71
    assert capsys.readouterr().err.startswith("d2lora: there is not enough memory. Nothing that")

    def wrong(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("d2lora.evaluation.generate.load_base", wrong)
    with pytest.raises(RuntimeError, match="something else"):
        main(["generate", "--base", tiny_base, "--prompt", "x"])


def test_other_errors_are_not_taken_for_a_full_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert all(is_out_of_memory(error()) for error in ERRORS.values())


def test_what_is_kept_is_counted_without_being_kept(base: Base) -> None:
    """By hand: of y = w (x * x)' with a trained w, x and x * x."""
    x = torch.ones(8, 4, requires_grad=True)
    layer = nn.Linear(4, 3, bias=False)
    assert kept_bytes(layer, lambda: layer(x * x).sum(), recompute=False) == 2 * 8 * 4 * 4
    model = with_adapter(base)
    with fast.enabled(model, when=True):
        scorer = TokenScorer(model)
        counted = [
            kept_bytes(model, lambda: scorer(collate(ROWS, 0)).mean(), recompute=on)
            for on in (False, True)
        ]
    assert counted[1] < counted[0] / 2


def test_passes_are_cut_to_the_room_that_there_is_and_then_checkpointed(base: Base) -> None:
    model = with_adapter(base)
    scorer = TokenScorer(model)

    def share(items: Any) -> torch.Tensor:
        return scorer(collate(items, base.pad_id)).mean()

    def bytes_of(items: Any, *, recompute: bool) -> int:
        memory = memory_of(model, lambda: share(items), 100, recompute=recompute)
        return memory.to_come

    def fitted(room: int, checkpointing: str = "auto") -> tuple[int, bool]:
        settings = TrainSettings(checkpointing=checkpointing)
        with recomputed(model, on=False):
            passes: Passes[Encoded] = Passes.of(
                model, scorer, settings, Reporter(quiet=True), n_processes=1
            )
            passes.fit(ROWS, share, room)
            return max(len(group) for group in passes.cut(ROWS)), recomputes(model)

    whole, one = bytes_of(ROWS, recompute=False), bytes_of(ROWS[:1], recompute=False)
    least = bytes_of(ROWS[:1], recompute=True)
    assert least < one < whole
    assert fitted(2 * whole) == (4, False)
    assert fitted(one)[1] is False
    assert fitted((least + one) // 2)[1] is True
    assert fitted((least + one) // 2, "off")[1] is False


def test_a_dry_run_says_what_a_run_takes_and_leaves_nothing(
    tmp_path: Path, tiny_base: str, problems: str, base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = AdaptSettings(
        base=tiny_base, data=(problems,), n=16, max_steps=6, batch_size=8, rank=4, quiet=True,
        validation_fraction=0.25, out=tmp_path / "a",
    )  # fmt: skip
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    found = adaptation.dry_run(settings, base)
    adaptation.command(settings.changed(dry_run=True))
    printed = capsys.readouterr().out
    assert "rows: 12 to learn from, 4 held out" in printed
    assert "steps: 6 of 8 rows" in printed
    assert "Nothing was trained or written" in printed
    assert "warning: only 6 optimizer steps" in printed
    assert not [*tmp_path.iterdir()]
    assert all(torch.equal(base.model.state_dict()[n], value) for n, value in before.items())
    made = adapt(settings, base).manifest
    assert [*found.warnings] == made.warnings
    done = made.cost
    assert (found.n_steps, found.n_rows, found.n_valid) == (done["n_steps"], 12, 4)
    assert found.n_tokens == pytest.approx(done["n_tokens"], rel=0.2)
    assert found.seconds > 0
    assert found.memory.adapter == 4 * done["n_trainable_parameters"]
    assert found.memory.state == 3 * found.memory.adapter
    assert found.recomputed is not None
    assert found.recomputed.activations < found.memory.activations
    assert found.peak == found.memory.peak


@pytest.mark.parametrize("changes", [{"max_tokens": 2000}, {"meta_steps": 2, "meta_rows": 8}])
def test_a_dry_run_of_a_warm_up_counts_its_own_length(
    tmp_path: Path, tiny_base: str, general: str, base: Base, changes: dict[str, Any]
) -> None:
    length = {} if "max_tokens" in changes else {"max_steps": 6}
    settings = WarmupSettings(
        base=tiny_base, data=(general,), m=20, batch_size=4, rank=4, quiet=True,
        out=tmp_path / "w", **length, **changes,
    )  # fmt: skip
    found = warmup.dry_run(settings, base)
    assert not [*tmp_path.iterdir()]
    made = warmup.warm_up(settings, base).manifest.cost
    assert found.n_steps == made["n_steps"]
    assert found.n_tokens == pytest.approx(made["n_tokens"], rel=0.2)


def test_a_dry_run_of_preferences_needs_no_reference(
    tmp_path: Path, tiny_base: str, base: Base
) -> None:
    rows = [{"prompt": f"Say {n}", "chosen": f"{n}", "rejected": f"not {n}"} for n in range(8)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    settings = AdaptSettings(
        base=tiny_base, data=(data,), objective="dpo", max_steps=2, rank=4, quiet=True,
        learning_rate=1e-4, out=tmp_path / "a",
    )  # fmt: skip
    found = adaptation.dry_run(settings, base)
    assert found.pass_rows == 2 * found.batch_size
    assert not (tmp_path / "a").exists()
