"""Training in float16: gradients that overflow are thrown away, counted, and taken again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adapters import losses
from d2lora import Adapter, AdaptSettings, TrainingError, adapt
from d2lora.adapters.base import Base, load_base
from d2lora.settings import BaseSettings
from d2lora.training import loss_scale
from d2lora.training.progress import Progress
from support import dies_at_step, read_rows


def run(out: Path, base: str, data: str, loaded: Base | None = None, **changes: Any) -> Adapter:
    settings: dict[str, Any] = {
        "n": 16, "max_steps": 4, "batch_size": 8, "rank": 4, "learning_rate": 1e-2, "quiet": True,
        "dtype": "float16", **changes,
    }  # fmt: skip
    return adapt(AdaptSettings(base=base, data=(data,), out=out, **settings), loaded)


class _Amplified(torch.autograd.Function):
    """Leaves numbers as they are, and multiplies their gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Up to float16's limit and back: what is too large on the way is not finite.
        return (gradients[0] * ctx.factor) / ctx.factor, None


def amplify(base: Base, factor: float) -> None:
    """Let gradients of the last layer's output pass through numbers that much larger."""

    def amplified(_: nn.Module, __: Any, output: Any) -> Any:
        return _Amplified.apply(output, factor)

    base.model.get_submodule("model.layers.1").register_forward_hook(amplified)


def scales(adapter: Adapter) -> list[float]:
    return [row["loss_scale"] for row in read_rows(adapter.path / "metrics.jsonl")]


def test_float16_has_the_losses_of_float32(tmp_path: Path, tiny_base: str, problems: str) -> None:
    half = run(tmp_path / "1", tiny_base, problems)
    single = run(tmp_path / "2", tiny_base, problems, dtype="float32")
    assert losses(half) == pytest.approx(losses(single), rel=1e-2)
    assert scales(half) == [loss_scale.FIRST] * 4
    assert half.manifest.cost["n_skipped"] == 0
    written = load_file(half.path / "adapter_model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in written.values())


def test_gradients_that_overflow_are_skipped_counted_and_taken_again(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu", dtype="float16"))
    expected = run(tmp_path / "1", tiny_base, problems, base)
    amplify(base, 4096.0)
    found = run(tmp_path / "2", tiny_base, problems, base)
    n_skipped = found.manifest.cost["n_skipped"]
    assert n_skipped > 0
    assert scales(found)[-1] == loss_scale.FIRST / 2**n_skipped
    assert found.manifest.cost["n_steps"] == 4
    assert losses(found) == pytest.approx(losses(expected), rel=1e-2)


def test_gradients_that_overflow_at_any_scale_are_an_error(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu", dtype="float16"))
    amplify(base, 1e30)
    with pytest.raises(TrainingError, match=r"overflow float16 at step 1.*--dtype bfloat16"):
        run(tmp_path / "1", tiny_base, problems, base)


def test_the_scale_doubles_after_many_finite_steps_and_halves_with_an_overflow() -> None:
    progress = Progress()
    loss_scale.keep(progress)
    assert progress.loss_scale is None
    loss_scale.begin(progress, torch.float16)
    for _ in range(loss_scale.STEPS_TO_DOUBLE):
        loss_scale.keep(progress)
    assert progress.loss_scale == 2 * loss_scale.FIRST
    assert loss_scale.skip(progress)
    assert (progress.loss_scale, progress.n_skipped) == (loss_scale.FIRST, 1)


def test_a_resumed_run_goes_on_with_its_scale(
    tmp_path: Path, tiny_base: str, problems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu", dtype="float16"))
    amplify(base, 4096.0)
    whole = run(tmp_path / "1", tiny_base, problems, base)
    with monkeypatch.context() as killed, pytest.raises(dies_at_step(killed, 3)):
        run(tmp_path / "2", tiny_base, problems, base, checkpoint_every=1)
    resumed = run(tmp_path / "2", tiny_base, problems, base, checkpoint_every=1, resume=True)
    assert scales(resumed) == scales(whole)
    one, other = (load_file(a.path / "adapter_model.safetensors") for a in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
