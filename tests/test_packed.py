"""Rows end to end score as rows padded; the fast head, norm and gated unit equal the plain ones."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from d2lora import fast
from d2lora.data.batches import Batch, Encoded, collate
from d2lora.fast import head
from d2lora.fast.attention import LONGEST, WIDTH_A_THREAD, RowAttention, pays
from d2lora.fast.packing import LENGTH_STEP, NAME, pack
from d2lora.scoring.scorer import TokenScorer

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Mapping[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "phi3": {"num_key_value_heads": 4},
    "olmo2": {"num_key_value_heads": 2},
    "gpt_neox": {},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "granite": {"num_key_value_heads": 2},
}
PACKED = {"llama", "qwen2", "qwen3", "mistral", "phi3", "olmo2", "gpt_neox", "gpt2"}
"""Families whose rows can be packed, so that a change of transformers that ends it is seen."""


def small_model(family: str, **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # a fresh model's attention is all but uniform
            if parameter.ndim == 2:
                parameter.data.mul_(6)
    return model.requires_grad_(requires_grad=False).eval()


def batch_of(*lengths: int) -> Batch:
    items = [
        Encoded(tuple((7 * place + 11 * row) % 50 + 5 for place in range(length)), length // 3)
        for row, length in enumerate(lengths)
    ]
    return collate(items, 0)


def own_scores(model: PreTrainedModel, batch: Batch) -> Tensor:
    logits = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
    logits_PV = logits[batch.rows_P, batch.columns_P]
    return -functional.cross_entropy(logits_PV, batch.targets_P, reduction="none")


def way_of(scorer: TokenScorer) -> str:
    return scorer._ways[0].__name__


def scores_of(model: PreTrainedModel, *batches: Batch, when: bool = True) -> tuple[str, Tensor]:
    """Score with fast passes, or plain ones; return the way taken and the last batch's scores."""
    with fast.enabled(model, when=when):
        scorer = TokenScorer(model)
        *_, scores = map(scorer, batches)
        return way_of(scorer), scores


def test_rows_lie_end_to_end_each_at_its_own_positions() -> None:
    rows = pack(batch_of(9, 4, 20))
    assert rows.bounds.tolist() == [0, 9, 13, 33, 2 * LENGTH_STEP]
    assert rows.ids_1N.shape == rows.positions_1N.shape == (1, 2 * LENGTH_STEP)
    assert rows.positions_1N[0, :14].tolist() == [*range(9), *range(4), 0]
    assert rows.ids_1N[0, 9:13].tolist() == batch_of(9, 4, 20).ids_BT[1, :4].tolist()


def test_rows_that_fill_the_width_need_no_filler() -> None:
    rows = pack(batch_of(LENGTH_STEP))
    assert rows.bounds.tolist() == [0, LENGTH_STEP, LENGTH_STEP]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_model_s_own(family: str) -> None:
    model = small_model(family)
    batch = batch_of(9, 4, 20, 32)
    way, scores = scores_of(model, batch)
    torch.testing.assert_close(scores, own_scores(model, batch), rtol=1e-4, atol=1e-4)
    if family in PACKED:
        assert way == "_packed"


@pytest.mark.parametrize("lengths", [(9, 4, 20, 32), (170, 90, 130)])
def test_gradients_are_those_of_padded_rows(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2lora.fast.attention.WIDTH_A_THREAD", 0)
    model = small_model("llama", max_position_embeddings=256)
    embedding = model.get_input_embeddings().weight.requires_grad_()
    batch = batch_of(*lengths)
    weights_P = torch.linspace(-1, 1, len(batch.targets_P))
    gradients: list[Tensor] = []
    for when in (True, False):
        way, scores = scores_of(model, batch, when=when)
        (gradient,) = torch.autograd.grad((scores * weights_P).sum(), embedding)
        gradients.append(gradient)
        assert way == ("_packed" if when else "_padded")
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def torch_s_attention(given: list[Tensor], lengths: tuple[int, ...], scale: float) -> Tensor:
    rows = zip(*(x.split(list(lengths), dim=2) for x in given), strict=True)
    return torch.cat(
        [
            functional.scaled_dot_product_attention(
                *row, is_causal=True, scale=scale, enable_gqa=True
            )
            for row in rows
            if row[0].shape[2]
        ],
        dim=2,
    ).transpose(1, 2)


@pytest.mark.parametrize(("n_heads", "n_groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [(1,), (64,), (130, 0, 65, 7)])
def test_attention_by_products_is_torch_s_own_row_by_row(
    n_heads: int, n_groups: int, lengths: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    n_tokens = sum(lengths)
    given = [
        torch.randn(1, n_tokens, heads, 8).transpose(1, 2).requires_grad_()
        for heads in (n_heads, n_groups, n_groups)
    ]
    wanted = torch_s_attention(given, lengths, 0.3)
    got = RowAttention.apply(*given, lengths, 0.3)
    torch.testing.assert_close(got, wanted)
    slope = torch.randn_like(wanted)
    for own, plain in zip(
        torch.autograd.grad(got, given, slope),
        torch.autograd.grad(wanted, given, slope),
        strict=True,
    ):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)


def test_attention_by_products_in_bfloat16_is_as_near_to_the_exact_one_as_torch_s() -> None:
    torch.manual_seed(0)
    lengths = (70, 130)
    exact = [
        torch.randn(1, 200, heads, 16).mul(2).bfloat16().double().transpose(1, 2)
        for heads in (4, 2, 2)
    ]
    slope = torch.randn(1, 200, 4, 16).bfloat16().double()

    def passed(dtype: torch.dtype, *, by_products: bool) -> list[Tensor]:
        given = [x.to(dtype).requires_grad_() for x in exact]
        if by_products:
            out = RowAttention.apply(*given, lengths, 0.25)
        else:
            out = torch_s_attention(given, lengths, 0.25)
        assert isinstance(out, Tensor)
        return [out, *torch.autograd.grad(out, given, slope.to(dtype))]

    wanted = passed(torch.float64, by_products=False)
    torch_s = passed(torch.bfloat16, by_products=False)
    for own, theirs, true in zip(
        passed(torch.bfloat16, by_products=True), torch_s, wanted, strict=True
    ):
        assert own.dtype == torch.bfloat16
        assert (own - true).norm() < 1.5 * (theirs - true).norm()


def test_attention_by_products_is_taken_where_it_is_faster_and_as_good() -> None:
    threads = torch.get_num_threads()
    wide = torch.zeros(1, 1, 1, WIDTH_A_THREAD * threads, requires_grad=True)
    narrow = torch.zeros(1, 1, 1, WIDTH_A_THREAD * threads - 1, requires_grad=True)
    assert pays(wide, [200, 300], 0.0)
    assert not pays(narrow, [200, 300], 0.0)
    assert not pays(wide.detach(), [200, 300], 0.0)
    assert pays(wide.bfloat16(), [200, 300], 0.0)
    assert not pays(wide.half(), [200, 300], 0.0)
    assert not pays(wide, [200, 300], 0.1)
    assert not pays(wide, [200, LONGEST + 1], 0.0)
    assert not pays(wide, [20] * 10, 0.0)


@pytest.mark.parametrize("window", [4, 48])
def test_a_model_with_a_sliding_window_is_not_packed(window: int) -> None:
    model = small_model("mistral", sliding_window=window)
    batch = batch_of(9, 4, 20)
    way, scores = scores_of(model, batch)
    torch.testing.assert_close(scores, own_scores(model, batch), rtol=1e-4, atol=1e-4)
    assert way != "_packed"


def test_a_model_that_keeps_the_rows_from_its_attention_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model("llama")
    own = model.base_model.forward

    def forgetful(**values: object) -> object:
        values.pop("cu_seq_lens_q", None)
        return own(**values)

    monkeypatch.setattr(model.base_model, "forward", forgetful)
    batch = batch_of(9, 4, 20)
    way, scores = scores_of(model, batch)
    torch.testing.assert_close(scores, own_scores(model, batch), rtol=1e-4, atol=1e-4)
    assert way == "_padded"


def test_attention_is_the_model_s_own_again_after_a_pass() -> None:
    model = small_model("llama")
    way, _ = scores_of(model, batch_of(9, 4))
    assert way == "_packed"
    assert model.config._attn_implementation == "sdpa"
    assert NAME not in ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("n_positions", [1, head.ROWS, 2 * head.ROWS + 3])
@pytest.mark.parametrize("biased", [False, True])
def test_the_head_s_scores_and_gradients_are_those_of_cross_entropy(
    n_positions: int, biased: bool
) -> None:
    torch.manual_seed(n_positions)
    layer = nn.Linear(16, 300, bias=biased).requires_grad_(requires_grad=False)
    hidden_PD = torch.randn(n_positions, 16, requires_grad=True)
    targets_P = torch.randint(0, 300, (n_positions,))
    weights_P = torch.randn(n_positions)
    wanted = -functional.cross_entropy(layer(hidden_PD), targets_P, reduction="none")
    got = head.log_probabilities(hidden_PD, layer, targets_P)
    torch.testing.assert_close(got, wanted)
    gradients = [
        torch.autograd.grad((scores * weights_P).sum(), hidden_PD)[0] for scores in (got, wanted)
    ]
    torch.testing.assert_close(*gradients)


def test_a_token_of_no_probability_has_a_finite_score() -> None:
    layer = nn.Linear(1, 3, bias=False).requires_grad_(requires_grad=False)
    layer.weight.copy_(torch.tensor([[0.0], [500.0], [-500.0]]))
    scores = head.log_probabilities(torch.ones(1, 1), layer, torch.tensor([2]))
    assert scores.tolist() == [-1000.0]


def test_a_head_that_trains_keeps_its_own_pass() -> None:
    layer = nn.Linear(4, 9)
    assert not head.fits(layer)
    assert head.fits(layer.requires_grad_(requires_grad=False))


def llama_config() -> Any:
    return AutoConfig.for_model("llama", **SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [LlamaRMSNorm(32), LlamaMLP(llama_config())])
def test_a_norm_and_a_gated_unit_equal_the_plain_ones(layer: nn.Module, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = layer.to(dtype).requires_grad_(requires_grad=False)
    x = torch.randn(3, 5, 32, dtype=dtype, requires_grad=True)
    slope = torch.randn(3, 5, 32, dtype=dtype)
    wanted = layer(x)
    (plain,) = torch.autograd.grad(wanted, x, slope)
    with fast.enabled(layer, when=True):
        assert "forward" in vars(layer)
        got = layer(x)
        (quick,) = torch.autograd.grad(got, x, slope)
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    )
    torch.testing.assert_close(got, wanted, **tolerance)
    torch.testing.assert_close(quick, plain, **tolerance)


def test_a_norm_that_trains_or_shifts_keeps_its_own_pass() -> None:
    class Shifted(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 1

    trained, shifted = LlamaRMSNorm(8), Shifted(8).requires_grad_(requires_grad=False)
    with fast.enabled(nn.ModuleList([trained, shifted]), when=True):
        assert "forward" not in vars(trained)
        assert "forward" not in vars(shifted)


def test_a_gated_unit_of_another_activation_keeps_its_own_pass() -> None:
    config = llama_config()
    config.hidden_act = "gelu"
    layer = LlamaMLP(config).requires_grad_(requires_grad=False)
    with fast.enabled(layer, when=True):
        assert "forward" not in vars(layer)
