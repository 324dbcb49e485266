"""The faster passes equal the plain ones."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional

from d2lora import fast
from d2lora.adapters.base import load_base
from d2lora.data.batches import Question
from d2lora.fast import matmul
from d2lora.scoring.multiple_choice import _apart, _together, continuation_scores
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import BaseSettings

ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")


@pytest.mark.parametrize("n_rows", [1, 15, 16, 100])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("product", [matmul.linear, pytest.param(matmul.by_onednn, marks=ONEDNN)])
def test_a_product_equals_torch_s(
    product: Callable[..., Tensor], n_rows: int, biased: bool, turned: bool
) -> None:
    torch.manual_seed(n_rows)
    x = torch.randn(n_rows, 24)
    weight = torch.randn(24, 40).T if turned else torch.randn(40, 24)
    bias = torch.randn(40) if biased else None
    torch.testing.assert_close(product(x, weight, bias), functional.linear(x, weight, bias))


@pytest.mark.parametrize("by_onednn", [False, pytest.param(True, marks=ONEDNN)])
def test_a_packed_weight_gives_torch_s_product_on_every_maker_s_processor(
    monkeypatch: pytest.MonkeyPatch, *, by_onednn: bool
) -> None:
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: by_onednn)
    torch.manual_seed(0)
    weight = torch.randn(40, 24)
    packed = matmul.packed(weight)
    assert packed.is_mkldnn == by_onednn
    for n_rows in (1, 16, 100):
        x = torch.randn(n_rows, 24)
        torch.testing.assert_close(matmul.product(x, packed), functional.linear(x, weight))


def test_other_number_formats_keep_torch_s_own_product() -> None:
    x, weight = torch.randn(20, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    assert torch.equal(matmul.linear(x, weight), functional.linear(x, weight))


def test_a_frozen_layer_passes_the_same_gradient_and_gets_none() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40)
    layer.requires_grad_(False)
    x = torch.randn(2, 9, 24, requires_grad=True)
    wanted = layer(x)
    (plain,) = torch.autograd.grad(wanted.square().sum(), x)
    with fast.enabled(layer, when=True):
        got = layer(x)
        (quick,) = torch.autograd.grad(got.square().sum(), x)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(quick, plain)
    assert layer.weight.grad is None


def test_a_layer_that_trains_keeps_torch_s_pass_and_nothing_is_left_behind() -> None:
    layer = nn.Sequential(nn.Linear(24, 24))
    with fast.enabled(layer, when=True):
        layer(torch.randn(20, 24)).sum().backward()
    assert layer[0].weight.grad is not None
    frozen = layer.requires_grad_(False)
    with fast.enabled(frozen, when=True):
        assert "forward" in vars(frozen[0])
    assert "forward" not in vars(frozen[0])


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_on_a_bfloat16_base_an_adapter_is_trained_as_under_autocast(
    adapter_dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(48, 40)))
    model.to(torch.bfloat16)
    adapter = [p for p in model.parameters() if p.requires_grad]
    for parameter in adapter:
        parameter.data = parameter.data.to(adapter_dtype)
    x = torch.randn(2, 30, 48, dtype=torch.bfloat16, requires_grad=True)
    slope = torch.randn(2, 30, 40, dtype=torch.bfloat16)

    def passed() -> list[Tensor]:
        y = model(x)
        return [y, *torch.autograd.grad(y, [x, *adapter], slope)]

    with torch.autocast("cpu", torch.bfloat16):
        wanted = passed()
    with fast.enabled(model, when=True) as used:
        got = passed()
    assert "LoRA layers" in used.names
    for own, plain in zip(got, wanted, strict=True):
        assert own.dtype == plain.dtype
        assert (own - plain).norm() < 2**-7 * plain.norm()


def questions() -> list[Question]:
    return [
        Question((1, 9, 8, 7), ((10, 11), (12,), (13, 14, 15))),
        Question((1, 20), ((21, 22, 23, 24), (10, 11))),
        Question((1, 30, 31, 32, 33, 34), ((5,), (6,), (7,), (8,))),
    ]


def test_choices_scored_together_are_the_choices_scored_apart(tiny_base: str) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    scorer = TokenScorer(base.model).eval()
    with torch.no_grad():
        apart = _apart(scorer, questions(), base.pad_id)
        together = _together(scorer, questions(), base.pad_id)
    for one, other in zip(together, apart, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    with fast.enabled(base.model, when=True) as used:
        in_chunks = continuation_scores(scorer, questions() * 80, base.pad_id)
    assert "shared prompts" in used.names
    assert in_chunks[-1] == pytest.approx(apart[-1], abs=1e-4)
    assert in_chunks[3] == pytest.approx(apart[0], abs=1e-4)


def test_choices_of_a_token_each_share_their_prompt_whichever_order_they_have(
    tiny_base: str,
) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    scorer = TokenScorer(base.model).eval()
    letters = Question((1, 9, 8, 7), ((10,), (11,), (12,)))
    mixed = Question((1, 20), ((21, 22, 23, 24), (10,)))
    for rows in ([letters], [mixed], [letters, mixed]):
        apart = _apart(scorer, rows, base.pad_id)
        with fast.enabled(base.model, when=True) as used:
            scores = continuation_scores(scorer, rows, base.pad_id)
        assert "shared prompts" in used.names
        for one, other in zip(scores, apart, strict=True):
            assert one == pytest.approx(other, abs=1e-4)


def test_a_model_that_ignores_the_mask_scores_each_choice_by_itself(
    tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    decoder = base.model.base_model
    own = decoder.forward

    def without_mask(**values: object) -> object:
        mask = values.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            values["attention_mask"] = None
        return own(**values)

    monkeypatch.setattr(decoder, "forward", without_mask)
    scorer = TokenScorer(base.model).eval()
    with torch.no_grad():
        apart = _apart(scorer, questions(), base.pad_id)
    with fast.enabled(base.model, when=True) as used:
        scores = continuation_scores(scorer, questions(), base.pad_id)
    assert "shared prompts" not in used.names
    for one, other in zip(scores, apart, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
