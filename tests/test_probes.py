"""What is found out about a model is found out on short and on long inputs."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from d2lora import fast
from d2lora.adapters.base import Base, load_base
from d2lora.data.batches import Batch, Encoded, PreferencePair, Question, collate
from d2lora.evaluation import steps
from d2lora.evaluation.decoding import Decoder
from d2lora.evaluation.steps import PaddedSteps
from d2lora.fast.llama import LlamaSteps
from d2lora.runtime.rounding import distance
from d2lora.scoring.multiple_choice import continuation_scores
from d2lora.scoring.pairs import PairScorer
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import BaseSettings

LONG = 40


@pytest.fixture
def base(tiny_base: str) -> Base:
    return load_base(BaseSettings(base=tiny_base, device="cpu"))


def spoil(base: Base, monkeypatch: pytest.MonkeyPatch, *names: str, width: int) -> None:
    """Make the decoder deaf to some inputs where a row is longer than `width`."""
    decoder = base.model.base_model
    own = decoder.forward

    def forgetful(**values: Any) -> Any:
        if values["input_ids"].shape[1] > width:
            for name in names:
                values.pop(name, None)
        return own(**values)

    monkeypatch.setattr(decoder, "forward", forgetful)


def row_of(length: int, start: int = 5) -> Encoded:
    ids = tuple((7 * place + start) % 90 + 5 for place in range(length))
    return Encoded(ids, length // 3)


def batch_of(*lengths: int) -> Batch:
    return collate([row_of(length, row) for row, length in enumerate(lengths)], 0)


@pytest.mark.parametrize("batches", [[(4, 60, 9)], [(4, 9), (9, 60)], [(60,), (9, 4)]])
@torch.no_grad()
def test_a_scorer_compares_ways_on_the_shortest_and_the_longest_row_it_meets(
    base: Base, monkeypatch: pytest.MonkeyPatch, batches: list[tuple[int, ...]]
) -> None:
    spoil(base, monkeypatch, "cu_seq_lens_q", "position_ids", width=LONG)
    plain = [TokenScorer(base.model)(batch_of(*lengths)) for lengths in batches]
    with fast.enabled(base.model, when=True):
        scorer = TokenScorer(base.model)
        for lengths, expected in zip(batches, plain, strict=True):
            torch.testing.assert_close(scorer(batch_of(*lengths)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_choices_are_compared_on_the_shortest_and_the_longest_question(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(base, monkeypatch, "attention_mask", width=LONG)
    questions = [
        Question((1, 9, 8, 7), ((10, 11), (12,))),
        Question(row_of(30).ids, (row_of(10).ids, row_of(12, 9).ids)),
        Question((1, 20), ((21, 22), (10, 11))),
    ]
    plain = continuation_scores(TokenScorer(base.model), questions, base.pad_id)
    with fast.enabled(base.model, when=True):
        scores = continuation_scores(TokenScorer(base.model), questions, base.pad_id)
    for ours, expected in zip(scores, plain, strict=True):
        assert ours == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_pairs_are_compared_on_the_shortest_and_the_longest_pair(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(base, monkeypatch, "attention_mask", width=LONG)

    def pair_of(length: int) -> PreferencePair:
        prompt = row_of(length).ids
        return PreferencePair(
            Encoded((*prompt, 11, 12), length), Encoded((*prompt, 30, 31, 32), length)
        )

    groups = [[pair_of(9), pair_of(4)], [pair_of(12), pair_of(44)]]
    plain = [PairScorer()(TokenScorer(base.model), group, base.pad_id) for group in groups]
    with fast.enabled(base.model, when=True) as used:
        scorer, pair_scorer = TokenScorer(base.model), PairScorer()
        for group, expected in zip(groups, plain, strict=True):
            ours = pair_scorer(scorer, group, base.pad_id)
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
            assert "shared prompts" in used.names


def test_faster_decoding_is_compared_on_the_shortest_and_the_longest_prompt(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LlamaSteps.prefill

    def prefill(steps: LlamaSteps, prompts: Any) -> Tensor:
        logits_BV = own(steps, prompts)
        return logits_BV.flip(1) if max(map(len, prompts)) > LONG else logits_BV

    monkeypatch.setattr(LlamaSteps, "prefill", prefill)
    prompts = [list(row_of(length).ids) for length in (9, 60, 5)]
    expected = dict(Decoder(base.model, base, 6, 1).complete(prompts))
    with fast.enabled(base.model, when=True) as used:
        assert dict(Decoder(base.model, base, 6, 1).complete(prompts)) == expected
    assert "Llama decoding" not in used.names


def test_a_cache_that_says_other_things_is_not_used_which_is_said(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [list(row_of(length).ids) for length in (9, 5)]
    said: list[str] = []
    expected = dict(Decoder(base.model, base, 6, 2, say=said.append).complete(prompts))
    assert not said
    own = PaddedSteps.step
    monkeypatch.setattr(PaddedSteps, "step", lambda steps, next_B: own(steps, next_B).flip(1))
    decoder = Decoder(base.model, base, 6, 2, say=said.append)
    assert dict(decoder.complete(prompts)) == expected
    (message,) = said
    assert "computed anew at every token" in message


def test_what_all_logits_share_is_no_distance() -> None:
    logits_V = torch.tensor([1.0, 5.0, -3.0, 2.0])
    assert distance(logits_V + 7, logits_V) == pytest.approx(0, abs=1e-6)
    assert distance(2 * logits_V, logits_V) == pytest.approx(1)
    assert distance(torch.full((4,), math.nan), logits_V) != 0


@pytest.mark.parametrize("n_left", [1, 2, 3, 12])
def test_in_16_bits_a_prompt_near_the_base_s_limit_is_decoded_with_the_cache(
    n_left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=64)
    model = GPT2LMHeadModel(config).to(torch.bfloat16).eval()
    long = list(row_of(64 - n_left).ids)
    # Where single logits do not agree the model's own rounding is looked at, within its positions.
    monkeypatch.setattr(steps, "agree", lambda *_: False)
    monkeypatch.setattr(steps, "distance", lambda *_: 1e-3)
    with torch.inference_mode():
        assert steps.steps_of(model, 0, [long[:5], long], 1)().pads
