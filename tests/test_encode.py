"""What is supervised: exactly the completion and EOS, in every chat format."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from d2lora.batches import Encoded, collate, micro_batches
from d2lora.encode import Encoder, resolve_format
from d2lora.encoded_sets import encode_all
from d2lora.errors import DataError, SettingsError
from d2lora.models import Base, load_base
from d2lora.objectives import SFT
from d2lora.rows import Example, Message
from d2lora.scorer import TokenScorer
from d2lora.settings import BaseSettings

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def example(prompt: str = "What is 2 + 3?", completion: str = "2 + 3 = 5") -> Example:
    return Example((Message("user", prompt),), completion)


@pytest.fixture(scope="module")
def base(tiny_base: str) -> Base:
    return load_base(BaseSettings(base=tiny_base, device="cpu"))


@pytest.fixture
def templated(tiny_base: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = CHATML
    return tokenizer


def test_the_supervised_tokens_are_the_completion_and_eos(base: Base) -> None:
    encoder = Encoder.of(base, None)
    encoded = encoder.encode(example())
    prompt, completion = encoded.ids[: encoded.n_prompt], encoded.ids[encoded.n_prompt :]
    assert base.tokenizer.decode(prompt[1:]) == "User: What is 2 + 3?\nAssistant:"
    assert prompt[0] == base.tokenizer.bos_token_id
    assert base.tokenizer.decode(completion) == " 2 + 3 = 5<|eos|>"
    assert prompt == tuple(encoder.prompt_ids(example().prompt))


def test_the_batch_predicts_exactly_the_supervised_tokens(base: Base) -> None:
    encoder = Encoder.of(base, None)
    items = [encoder.encode(example(completion=text)) for text in ("5", "2 + 3 = 5, I think")]
    batch = collate(items, base.pad_id)
    by_row = [batch.targets_P[batch.rows_P == row].tolist() for row in range(2)]
    assert by_row == [list(item.ids[item.n_prompt :]) for item in items]
    assert batch.mask_BT.sum(1).tolist() == [len(item.ids) for item in items]


def test_a_chat_template_supervises_the_answer_up_to_eos(templated: Any) -> None:
    encoded = Encoder(templated, "template").encode(example())
    completion = templated.decode(encoded.ids[encoded.n_prompt :])
    assert completion == "2 + 3 = 5<|eos|>"
    prompt = templated.decode(encoded.ids[: encoded.n_prompt])
    assert prompt == "<|im_start|>user\nWhat is 2 + 3?<|eos|>\n<|im_start|>assistant\n"


def test_a_template_that_rewrites_the_prompt_is_refused(templated: Any) -> None:
    templated.chat_template = FORGETFUL
    with pytest.raises(SettingsError, match="use --chat-format plain"):
        Encoder(templated, "template").encode(example())


def test_auto_takes_the_template_where_there_is_one(base: Base, templated: Any) -> None:
    assert resolve_format(base.tokenizer, None) == "plain"
    assert resolve_format(templated, "auto") == "template"
    assert resolve_format(templated, "plain") == "plain"
    with pytest.raises(SettingsError, match="has no chat template"):
        resolve_format(base.tokenizer, "template")


def test_earlier_turns_are_prompt_and_only_the_last_answer_is_supervised(base: Base) -> None:
    turns = (Message("system", "Be short."), Message("user", "Hi"), Message("assistant", "Hello"))
    encoded = Encoder.of(base, None).encode(Example((*turns, Message("user", "2 + 3?")), "5"))
    prompt = base.tokenizer.decode(encoded.ids[1 : encoded.n_prompt])
    assert prompt == "System: Be short.\nUser: Hi\nAssistant: Hello\nUser: 2 + 3?\nAssistant:"
    assert encoded.n_supervised == len(encoded.ids) - encoded.n_prompt


def test_a_document_supervises_every_token_after_the_first(base: Base) -> None:
    encoded = Encoder.of(base, None).encode(Example((), "Tom has 5 apples."))
    assert encoded.n_supervised == len(encoded.ids) - 1
    assert base.tokenizer.decode(encoded.ids) == "<|bos|>Tom has 5 apples.<|eos|>"


def test_the_pad_token_is_never_eos(tiny_base: str) -> None:
    loaded = load_base(BaseSettings(base=tiny_base, device="cpu"))
    loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    assert loaded.pad_id != loaded.eos_id


def test_over_long_examples_are_an_error_unless_told_otherwise(base: Base) -> None:
    encoder = Encoder.of(base, None)
    examples = [example(), example("word " * 100)]
    with pytest.raises(DataError, match="1 of 2 examples are longer than --max-length 64"):
        encode_all(encoder, examples, 64, "error")
    dropped = encode_all(encoder, examples, 64, "drop")
    assert (len(dropped.items), dropped.n_dropped) == (1, 1)
    assert "dropped 1 of 2" in str(dropped.report(64))
    cut = encode_all(encoder, examples, 64, "truncate")
    assert [len(item.ids) for item in cut.items][1] == 64
    assert "truncated 1 of 2" in str(cut.report(64))
    with pytest.raises(DataError, match="no example is left"):
        encode_all(encoder, [examples[1]], 64, "drop")


@given(st.integers(0, 60), st.integers(1, 60), st.integers(8, 50))
def test_truncation_never_eats_the_whole_completion(
    n_prompt: int, n_completion: int, limit: int
) -> None:
    item = Encoded(tuple(range(n_prompt + n_completion)), n_prompt)
    cut = item.truncated(limit)
    assert len(cut.ids) == min(limit, len(item.ids))
    kept = cut.ids[cut.n_prompt :]
    assert kept == item.ids[n_prompt : n_prompt + len(kept)]
    assert kept
    if len(item.ids) - limit <= n_prompt - max(1, limit // 4):
        assert len(kept) == n_completion
    if n_prompt:
        assert cut.ids[0] == item.ids[0]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(1, 200),
    st.one_of(st.none(), st.integers(1, 8)),
)
def test_micro_batches_hold_every_example_once_within_the_limits(
    lengths: list[int], max_tokens: int, max_size: int | None
) -> None:
    items = [Encoded(tuple(range(length)), 0) for length in lengths]
    groups = micro_batches(items, max_tokens, max_size)
    flat = [len(item.ids) for group in groups for item in group]
    assert sorted(flat) == sorted(lengths)
    for group in groups:
        longest = max(len(item.ids) for item in group)
        assert len(group) == 1 or longest * len(group) <= max_tokens
        assert max_size is None or len(group) <= max_size


def test_a_row_of_all_positions_that_a_model_has_is_scored_as_by_the_model_alone() -> None:
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 60, "n_positions": 50}
    model = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    items = [Encoded(tuple(range(1, 51)), 20), Encoded(tuple(range(5, 30)), 3)]
    with torch.no_grad():
        ours = TokenScorer(model).eval()(collate(items, 0))
        logits = model(torch.tensor([items[0].ids])).logits.log_softmax(-1)
    theirs = logits[0, range(19, 49), items[0].ids[20:]]
    torch.testing.assert_close(ours[:30], theirs)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=4))
def test_the_loss_is_the_model_s_own(tiny_base: str, completions: list[str]) -> None:
    loaded = load_base(BaseSettings(base=tiny_base, device="cpu"))
    encoder = Encoder.of(loaded, None)
    items = [encoder.encode(example(completion=text)) for text in completions]
    scorer = TokenScorer(loaded.model).eval()
    with torch.no_grad():
        ours = SFT().share(scorer, items, items, loaded.pad_id).loss
        batch = collate(items, loaded.pad_id)
        labels = torch.full_like(batch.ids_BT, -100)
        labels[batch.rows_P, batch.columns_P + 1] = batch.targets_P
        theirs = AutoModelForCausalLM.from_pretrained(tiny_base)(
            input_ids=batch.ids_BT, attention_mask=batch.mask_BT, labels=labels
        ).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_model_that_changes_its_logits_takes_its_own_forward_pass(tiny_base: str) -> None:
    loaded = load_base(BaseSettings(base=tiny_base, device="cpu"))
    own_forward = loaded.model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=torch.tanh(10 * own_forward(*args, **kwargs).logits))

    loaded.model.forward = capped
    items = [Encoder.of(loaded, None).encode(example())]
    batch = collate(items, loaded.pad_id)
    with torch.no_grad():
        ours = TokenScorer(loaded.model).eval()(batch)
        logits = capped(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
        expected = logits[batch.rows_P, batch.columns_P].log_softmax(-1)
    chosen = expected.gather(1, batch.targets_P[:, None])[:, 0]
    torch.testing.assert_close(ours, chosen)
