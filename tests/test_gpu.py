"""What runs on a GPU alone: recorded passes equal plain ones. Skipped where there is none."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adapters import assert_untouched, losses, run, state
from d2lora import AdaptSettings, adapt, fast
from d2lora.adapters.base import load_base
from d2lora.adapters.lora import LoraShape, attach_fresh
from d2lora.data.batches import Batch, Encoded, collate
from d2lora.fast.cuda_graphs import PLAIN_PASSES, WIDTH_STEP, Replayed, fits
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import BaseSettings
from support import dies_at_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
N_PASSES = PLAIN_PASSES + 3


def adapted(base: str, dtype: str) -> nn.Module:
    """Return a base on the GPU with an adapter whose B is not zero."""
    loaded = load_base(BaseSettings(base=base, device="cuda", dtype=dtype))
    shape = LoraShape(4, 8.0, 0.0, ("all-linear",))
    model = attach_fresh(loaded.model, shape, seed=0).train()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    return model


def batch_of(*lengths: int) -> Batch:
    rows = [Encoded(tuple(torch.randint(3, 300, (n,)).tolist()), n // 3) for n in lengths]
    return collate(rows, pad_id=0).to(torch.device("cuda"))


def gradients_of(scorer: TokenScorer, *batches: Batch, together: bool = False) -> list[Tensor]:
    """Return the gradients that add up over batches, passed through one by one or at once."""
    parameters = [p for p in scorer.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    if together:
        torch.stack([(scorer(batch) ** 2).sum() for batch in batches]).sum().backward()
    else:
        for batch in batches:
            (scorer(batch) ** 2).sum().backward()
    return [p.grad.clone() for p in parameters if p.grad is not None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("together", [False, True])
def test_recorded_passes_give_the_gradients_of_plain_ones(
    tiny_base: str, dtype: str, *, together: bool
) -> None:
    model = adapted(tiny_base, dtype)
    torch.manual_seed(1)
    with fast.enabled(model, when=True) as used:
        plain, recorded = TokenScorer(model), TokenScorer(model, replays=True)
        for _ in range(N_PASSES):
            batches = batch_of(40, 9, 25), batch_of(100, 31, 64), batch_of(50, 60, 17)
            ours = gradients_of(recorded, *batches, together=together)
            theirs = gradients_of(plain, *batches, together=together)
            off = 1e-5 if dtype == "float32" else 2e-2
            for one, other in zip(ours, theirs, strict=True):
                assert float((one - other).norm()) <= off * float(other.norm())
            scores = [scorer(batches[0]).detach() for scorer in (recorded, plain)]
            torch.testing.assert_close(*scores, rtol=off, atol=off)
            gradients_of(recorded, batches[0])
        replayed = recorded._replayed
        assert replayed is not None
        assert "recorded passes" in used.names
        assert replayed._recordings.keys() >= {(3, WIDTH_STEP)}


def test_a_model_that_looks_at_its_numbers_is_never_recorded() -> None:
    weight = nn.Parameter(torch.ones(4, device="cuda"))

    def decode(ids_BT: Tensor) -> Tensor:
        factor = 2.0 if float(weight.detach().sum()) > 0 else 1.0
        return ids_BT[..., None] * weight * factor

    replayed = Replayed(decode, [weight])
    for _ in range(N_PASSES):
        ids_BT = torch.ones(2, WIDTH_STEP, device="cuda", dtype=torch.long)
        (gradient,) = torch.autograd.grad(replayed(ids_BT).sum(), weight)
        assert gradient.tolist() == [4.0 * WIDTH_STEP] * 4
    assert not replayed._recordings
    assert torch.randn(3, device="cuda").isfinite().all()


def test_dropout_and_a_cpu_are_not_for_recordings(tiny_base: str) -> None:
    model = adapted(tiny_base, "float32")
    assert fits(model)
    assert not fits(nn.Sequential(model, nn.Dropout(0.1)))
    assert not fits(model.cpu())


def test_an_adapter_trained_with_recordings_is_the_plain_one_killed_or_not(
    tiny_base: str, problems: str, tmp_path: Path
) -> None:
    common = {
        "base": tiny_base, "data": (problems,), "device": "cuda", "dtype": "float32",
        "max_steps": 14, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2,
        "quiet": True,
    }  # fmt: skip
    adapt(AdaptSettings(out=tmp_path / "plain", fast=False, **common))
    adapt(AdaptSettings(out=tmp_path / "whole", **common))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(dies_at_step(patch, 9)):
        adapt(AdaptSettings(out=tmp_path / "killed", **common))
    adapt(AdaptSettings(out=tmp_path / "killed", resume=True, **common))
    names = ("plain", "whole", "killed")
    plain, whole, resumed = (
        load_file(next((tmp_path / name).rglob("adapter_model.safetensors"))) for name in names
    )
    for name, weight in plain.items():
        torch.testing.assert_close(whole[name], weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(resumed[name], whole[name], rtol=1e-3, atol=1e-4)


def test_an_adapter_initialized_by_loftq_learns_and_leaves_the_base_as_it_was(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    loaded = load_base(BaseSettings(base=tiny_base, device="cuda", dtype="float32"))
    before = state(loaded)
    adapter = run(tmp_path / "a", tiny_base, problems, loaded, init="loftq", max_steps=12)
    assert_untouched(loaded, before)
    assert losses(adapter)[-1] < losses(adapter)[0]
    about = adapter.manifest.initialization
    assert about is not None
    assert (about["name"], about["converted_from_rank"]) == ("loftq", 4)
    assert about["largest_logit_difference"] > 0
