"""Rows near the end of what a base takes: each has its own room, what does not fit is reported."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken, BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

from conftest import save_tiny_base
from d2lora import (
    AdaptSettings,
    DataError,
    EvaluateSettings,
    GenerateSettings,
    ModelError,
    PairsSettings,
    SelectSettings,
    adapt,
    evaluate,
    fast,
    generate,
    make_pairs,
    select,
)
from d2lora.adapters.base import load_base, load_tokenizer, n_embedded
from d2lora.data.encode import Encoder
from d2lora.data.rows import user
from d2lora.embedded import choice_rows
from d2lora.evaluation.decoding import Decoder, check_room
from d2lora.settings import BaseSettings
from support import write_rows

LIMIT = 128


@pytest.fixture(scope="module")
def short_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of 128 positions."""
    folder = tmp_path_factory.mktemp("short")
    return save_tiny_base(folder, seed=0, max_position_embeddings=LIMIT)


@pytest.fixture(scope="module")
def learned_base(tmp_path_factory: pytest.TempPathFactory, short_base: str) -> str:
    """An OPT of 128 learned positions: a token beyond them is no number, but an error."""
    folder = tmp_path_factory.mktemp("learned")
    tokenizer = load_tokenizer(BaseSettings(base=short_base))
    tokenizer.save_pretrained(folder)
    config = OPTConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=16, ffn_dim=24,
        word_embed_proj_dim=16, vocab_size=len(tokenizer), max_position_embeddings=LIMIT,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        OPTForCausalLM(config).save_pretrained(folder)
    return str(folder)


def words(n: int) -> str:
    return "pen " * n


def row(n_words: int) -> dict[str, Any]:
    return {"question": words(n_words), "answer": "It is 3. #### 3"}


@pytest.mark.parametrize("when", [True, False])
@pytest.mark.parametrize("name", ["short_base", "learned_base"])
def test_a_long_prompt_takes_no_tokens_from_the_others_of_its_batch(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, *, when: bool
) -> None:
    base = load_base(BaseSettings(base=request.getfixturevalue(name), device="cpu"))
    monkeypatch.setattr(Decoder, "stop_ids", frozenset())
    prompts = [[7 + n, 20, 9] for n in range(6)] + [[5 + n % 50 for n in range(LIMIT - 3)]]
    with fast.enabled(base.model, when=when) as used:
        together = dict(Decoder(base.model, base, 12, 7).complete(prompts))
        alone = dict(Decoder(base.model, base, 12, 1).complete(prompts))
    assert [len(together[n]) for n in range(7)] == [12] * 6 + [3]
    assert together == alone
    assert ("Llama decoding" in used.names) == (when and name == "short_base")


def test_prompts_without_room_are_reported_all_at_once_with_their_rows(
    tmp_path: Path, short_base: str
) -> None:
    rows = [row(2), row(400), row(3), row(500)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    common: dict[str, Any] = {"base": short_base, "device": "cpu", "max_new_tokens": 4}
    calls = (
        lambda: evaluate(EvaluateSettings(**common, data=(data,), out=tmp_path / "e", quiet=True)),
        lambda: generate(GenerateSettings(**common, prompts=data)),
        lambda: make_pairs(
            PairsSettings(**common, data=(data,), samples=2, out=tmp_path / "p", quiet=True)
        ),
    )
    for call in calls:
        with pytest.raises(DataError) as caught:
            call()
        text = str(caught.value)
        assert "2 of 4 prompts leave no room" in text
        assert f"the base takes {LIMIT} tokens" in text
        assert f"{data}, line 2: " in text
        assert f"{data}, line 4: " in text
    lines = tmp_path / "prompts.txt"
    lines.write_text(f"short\n\n{words(400)}\n")
    with pytest.raises(DataError, match=r"prompts\.txt, line 3: "):
        generate(GenerateSettings(**common, prompts=str(lines)))


def test_prompts_with_little_room_are_reported(tiny_base: str) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    prompts = [[5] * 3, [5] * 500]
    assert check_room(prompts, ["a", "b"], base.model, 12) is None
    reported = check_room(prompts, ["a", "b"], base.model, 13)
    assert reported is not None
    assert "1 of 2 prompts leave room for fewer than 13" in reported


@pytest.mark.parametrize("name", ["short_base", "learned_base"])
def test_training_and_scoring_rows_are_held_to_what_the_base_takes(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(name)
    data = write_rows(tmp_path / "rows.jsonl", [row(2), row(400), row(3)])
    common: dict[str, Any] = {"base": base, "device": "cpu", "quiet": True}
    train = {**common, "data": (data,), "max_steps": 1, "rank": 2}
    with pytest.raises(DataError, match=f"longer than the {LIMIT} tokens that the base takes"):
        adapt(AdaptSettings(**train, out=tmp_path / "error"))
    adapter = adapt(AdaptSettings(**train, out=tmp_path / "cut", overlong="truncate"))
    assert adapter.manifest.n_examples == 3
    evaluation = evaluate(
        EvaluateSettings(
            **common, general_text=(data,), overlong="drop", out=tmp_path / "e",
        )
    )  # fmt: skip
    assert evaluation.forgetting["base"].general_loss is not None
    for method in ("perplexity", "similar"):
        select(
            SelectSettings(
                **common, data=(data,), for_task=(data,), m=2, method=method, max_length=4096,
                feature_tokens=1000, out=tmp_path / method, cache=tmp_path / "cache",
            )
        )  # fmt: skip


def test_choices_beyond_the_last_position_are_reported_all_at_once(
    tmp_path: Path, short_base: str
) -> None:
    rows = [*choice_rows(2), {"prompt": words(400), "choices": ["a", "b"], "answer": 0}]
    choices = write_rows(tmp_path / "choices.jsonl", rows)
    with pytest.raises(DataError, match="1 of 3 multiple-choice questions") as caught:
        evaluate(
            EvaluateSettings(base=short_base, choices=(choices,), out=tmp_path / "e", quiet=True)
        )
    assert "question 3: " in str(caught.value)


def test_a_model_that_names_no_limit_has_none() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=16, n_layer=1, n_head=2))
    assert check_room([[5] * 5000], ["a"], model, 100) is None


def extended(base: str, folder: Path, kind: str, token: str) -> str:
    """Copy a base, its tokenizer extended by a token that its embedding has no row for."""
    shutil.copytree(base, folder)
    tokenizer = load_tokenizer(BaseSettings(base=base))
    tokenizer.add_special_tokens({kind: AddedToken(token)})
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("when", [True, False])
def test_a_pad_token_beyond_the_embedding_is_never_fed(
    tmp_path: Path, tiny_base: str, problems: str, *, when: bool
) -> None:
    padded = extended(tiny_base, tmp_path / "padded", "pad_token", "<|fill|>")
    base = load_base(BaseSettings(base=padded, device="cpu"))
    assert base.tokenizer.pad_token_id >= n_embedded(base.model)
    assert base.pad_id < n_embedded(base.model)
    common: dict[str, Any] = {
        "data": (problems,), "device": "cpu", "quiet": True, "rank": 2, "max_steps": 2,
        "batch_size": 8, "fast": when,
    }  # fmt: skip
    own, other = (
        adapt(AdaptSettings(base=name, **common, out=tmp_path / Path(name).name / "run"))
        for name in (padded, tiny_base)
    )
    assert own.manifest.cost["n_tokens"] == other.manifest.cost["n_tokens"]
    evaluation = evaluate(
        EvaluateSettings(
            base=padded, data=(problems,), limit=5, max_new_tokens=3, out=tmp_path / "e",
            fast=when, device="cpu", quiet=True,
        )
    )  # fmt: skip
    assert len(evaluation.records) == 5


def test_an_end_token_beyond_the_embedding_is_reported_when_the_base_is_loaded(
    tmp_path: Path, tiny_base: str
) -> None:
    name = extended(tiny_base, tmp_path / "ended", "eos_token", "<|over|>")
    with pytest.raises(ModelError, match=r"'<\|over\|>'.*resize the embedding"):
        load_base(BaseSettings(base=name, device="cpu"))


def test_a_token_beyond_the_embedding_is_reported_where_it_is_fed_and_else_harmless(
    tmp_path: Path, tiny_base: str
) -> None:
    name = extended(tiny_base, tmp_path / "begun", "bos_token", "<|begin|>")
    base = load_base(BaseSettings(base=name, device="cpu"))
    asked = user("How many?")
    plain = Encoder.of(base, "plain").prompt_ids(asked)
    assert all(token < n_embedded(base.model) for token in plain)
    base.tokenizer.chat_template = "<|begin|>{{ messages[0]['content'] }}"
    with pytest.raises(ModelError, match=f"token {base.tokenizer.bos_token_id} "):
        Encoder.of(base, "template").prompt_ids(asked)
