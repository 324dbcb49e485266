"""What is supervised: exactly the completion and EOS, in every chat format."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from d2lora.adaptation import adapt
from d2lora.adapters.base import Base, load_base
from d2lora.data.batches import Encoded, collate, micro_batches
from d2lora.data.choices import ChoiceQuestion
from d2lora.data.encode import Encoder, resolve_format
from d2lora.data.encoded_sets import encode_all, encode_prompts
from d2lora.data.reading import read_task
from d2lora.data.rows import BadRowError, Example, Message, user
from d2lora.errors import DataError, SettingsError
from d2lora.evaluation.evaluate import evaluate
from d2lora.evaluation.generate import generate
from d2lora.evaluation.measure import questions_of
from d2lora.runtime.console import Reporter
from d2lora.scoring.scorer import TokenScorer
from d2lora.selection.hygiene import clean
from d2lora.settings import (
    AdaptSettings,
    BaseSettings,
    EvaluateSettings,
    GenerateSettings,
    HygieneSettings,
)
from d2lora.training.objectives import SFT
from support import read_rows, write_rows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_OF = "<|im_start|>user\n{}<|eos|>\n<|im_start|>assistant\n"
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('system role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
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


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.sampled_from("a few words of 学習 🙂 and 12.5 <|eos|>".split()), min_size=1, max_size=80
    ),
    st.lists(st.sampled_from("an answer ends so".split()), min_size=1, max_size=80),
    st.integers(80, 140),
    st.sampled_from(["plain", "template"]),
)
def test_a_row_that_is_cut_keeps_instruction_template_and_both_ends_of_its_fields(
    tiny_base: str, asked: list[str], answered: list[str], limit: int, form: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = CHATML
    encoder = Encoder(tokenizer, form)
    row = Example(user(" ".join(asked), "Say it."), " ".join(answered))
    item, whole = encoder.encode(row, limit), encoder.encode(row)
    assert item.length <= limit
    assert item.ids[-1] == tokenizer.eos_token_id
    assert item.ids.count(tokenizer.eos_token_id) == whole.ids.count(tokenizer.eos_token_id)
    text = tokenizer.decode(item.ids)
    assert "Say it.\n\n" in text
    kept = text.split("Say it.\n\n")[1]
    assert kept.startswith(asked[0][0])
    assert answered[-1][-1] + "<|eos|>" in text
    if whole.length <= limit:
        assert item == whole
    assert len(encoder.prompt_of(row, limit)) <= limit


def test_the_longest_field_loses_its_middle_in_training_and_in_test(base: Base) -> None:
    encoder = Encoder.of(base, None)
    abstract = " ".join(f"w{number}" for number in range(200))
    row = Example(user(abstract, "Write a title for this text."), "A short title")
    cut = encode_all(encoder, [row, example()], 128, "truncate")
    text = base.tokenizer.decode(cut.items[0].ids)
    assert text.startswith("<|bos|>User: Write a title for this text.\n\nw0 w1 w2")
    assert text.endswith("w198 w199\nAssistant: A short title<|eos|>")
    assert 120 < cut.items[0].length <= 128
    assert cut.n_tokens_cut == encoder.encode(row).length - cut.items[0].length
    assert "truncated 1 of 2 examples longer than 128 tokens (longest" in str(cut.report(128))
    assert f"{cut.n_tokens_cut:,} tokens cut from the middle" in str(cut.report(128))
    prompts = encode_prompts(encoder, [row, example()], 128, "truncate")
    shown = base.tokenizer.decode(prompts.ids[0])
    assert shown.startswith("<|bos|>User: Write a title for this text.\n\nw0 w1 w2")
    assert shown.endswith("w198 w199\nAssistant:")
    assert "truncated 1 of 2 prompts longer than 128 tokens" in str(prompts.report(128))
    whole = encode_prompts(encoder, [row, example()], 128, "error")
    assert whole.ids[0] == encoder.prompt_ids(row.prompt)
    assert "1 of 2 prompts are longer than 128 tokens and left whole" in str(whole.report(128))


def test_a_question_beside_a_long_context_stays_whole(base: Base, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Who wins?", "context": "so it goes " * 80, "response": "The fox."},
        {"instruction": "Who wins?", "input": "so it goes " * 80, "output": "The fox."},
        {"messages": [
            {"role": "system", "content": "Be kind to every fox that you meet."},
            {"role": "user", "content": "so it goes " * 80},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Who wins?"},
            {"role": "assistant", "content": "The fox."},
        ]},
    ]  # fmt: skip
    for number, row in enumerate(rows):
        data = read_task([write_rows(tmp_path / f"{number}.jsonl", [row])])
        item = Encoder.of(base, None).encode(data.examples[0], 100)
        text = base.tokenizer.decode(item.ids)
        assert "Who wins?" in text
        assert text.endswith("The fox.<|eos|>")
        assert item.length <= 100
        assert number < 2 or "System: Be kind to every fox that you meet." in text


def test_a_format_that_is_longer_than_the_limit_is_an_error_with_the_row(templated: Any) -> None:
    templated.chat_template = "Behave. " * 60 + CHATML
    row = replace(example(), place="d.jsonl, line 3")
    with pytest.raises(DataError, match=r"d.jsonl, line 3: it cannot be cut to 40 tokens"):
        encode_all(Encoder(templated, "template"), [row], 40, "truncate")


@pytest.mark.parametrize("form", ["plain", "template"])
def test_special_tokens_in_data_are_text_and_eos_is_supervised_once(
    templated: Any, form: Any
) -> None:
    eos, encoder = templated.eos_token_id, Encoder(templated, form)
    text = "The token <|eos|> ends it<|eos|>"
    asked = "What is <|bos|> or <|im_start|> <|eos|>?"
    turns = (Message("system", "No <|eos|>"), Message("user", asked))
    row = Example(
        (*turns, Message("assistant", "<|eos|>"), Message("user", asked)), text, rejected="<|pad|>"
    )
    plain = [
        replace(turn, content=re.sub(r"<\|(\w+)\|>", r"<!\1!>", turn.content))
        for turn in row.prompt
    ]
    pair = encoder.encode_pair(row)
    for item, answer in ((pair.chosen, text), (pair.rejected, "<|pad|>")):
        assert item.ids[item.n_prompt :].count(eos) == 1
        assert item.ids[-1] == eos
        assert templated.decode(item.ids[item.n_prompt : -1]).strip() == answer
        assert list(item.ids[: item.n_prompt]) == encoder.prompt_ids(row.prompt)
    prompt = list(pair.chosen.ids[: pair.chosen.n_prompt])
    special = [token for token in prompt if token in templated.all_special_ids]
    harmless = [token for token in encoder.prompt_ids(plain) if token in templated.all_special_ids]
    assert special == harmless
    assert templated.decode(prompt).count(asked) == 2
    document = encoder.encode(Example((), text))
    assert document.ids.count(eos) == 1
    assert templated.decode(document.ids) == f"<|bos|>{text}<|eos|>"


def test_special_tokens_in_choices_and_examples_before_a_prompt_are_text(base: Base) -> None:
    rows = questions_of(
        Encoder.of(base, None), [ChoiceQuestion("Which <|eos|>?", ("a <|eos|>", "b"), 0)]
    )
    assert base.eos_id not in (*rows[0].prompt, *rows[0].endings[0], *rows[0].endings[1])
    assert base.tokenizer.decode(rows[0].endings[0]) == " a <|eos|>"


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40), st.sampled_from(["plain", "template"]))
def test_data_with_special_tokens_has_the_ids_of_the_tokenizer_that_splits_them(
    tiny_base: str, before: str, behind: str, form: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    encoder = Encoder(tokenizer, form)
    ordinary = re.sub(r"<\|(eos|bos|pad|im_start)\|>", "", before + behind) + "."
    shown = CHATML_OF if form == "template" else "User: {}\nAssistant:"
    known = tokenizer(shown.format(ordinary), add_special_tokens=form == "plain")["input_ids"]
    assert encoder.prompt_ids(user(ordinary)) == known
    text = f"{before}<|eos|>{behind}"
    ids = encoder.encode(Example((), text)).ids
    assert (
        list(ids[1:-1])
        == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    )
    prompt = encoder.prompt_ids(user(text))
    assert tokenizer.eos_token_id not in (prompt if form == "plain" else prompt[:-10])


def test_special_tokens_that_a_vocabulary_holds_whole_are_spelled() -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((sign, -2.0) for sign in "▁</s>ab")]
    core = Tokenizer(models.Unigram(pieces, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"eos_token": "</s>", "unk_token": "<unk>"})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    encoder = Encoder(tokenizer, "template")
    item = encoder.encode(Example(user("a</s>b"), "b</s>a"))
    assert tokenizer.convert_ids_to_tokens(item.ids) == [*"▁a</s>b", "</s>", *"▁b</s>a", "</s>"]


def test_a_row_that_the_template_refuses_is_reported_with_its_line(
    tiny_base: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = STRICT + CHATML
    tokenizer.save_pretrained(base)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    twice = {"messages": [*turns, {"role": "assistant", "content": "Hello again"}]}
    system = {"messages": [{"role": "system", "content": "Be short"}, *turns]}
    data = write_rows(tmp_path / "d.jsonl", [{"messages": turns}] * 3 + [twice, system])
    common = {"base": str(base), "device": "cpu", "data": (data,), "max_steps": 1, "quiet": True}
    with pytest.raises(DataError) as caught:
        adapt(AdaptSettings(**common, out=tmp_path / "one"))
    assert "line 4" in str(caught.value)
    assert "roles must alternate" in str(caught.value)
    assert "line 5" in str(caught.value)
    assert "system role not supported" in str(caught.value)
    assert "--skip-bad-rows" in str(caught.value)
    adapt(AdaptSettings(**common, out=tmp_path / "two", skip_bad_rows=True))
    aside = read_rows(tmp_path / "two" / "bad_rows.jsonl")
    assert [row["line"] for row in aside] == [4, 5]
    shown = write_rows(tmp_path / "p.jsonl", [{"prompt": "Hi"}, system])
    with pytest.raises(DataError, match=r"p.jsonl, line 2: the chat template of .* refuses"):
        generate(GenerateSettings(base=str(base), device="cpu", prompts=shown, max_new_tokens=2))


def test_a_pool_s_rows_that_the_template_refuses_are_unreadable(
    templated: Any, tmp_path: Path
) -> None:
    templated.chat_template = STRICT + CHATML
    turns = [
        {"role": "user", "content": "Name a colour of the sky."},
        {"role": "assistant", "content": "The sky is blue."},
    ]
    system = [{"role": "system", "content": "Be short"}, *turns]
    pool = read_task([write_rows(tmp_path / "p.jsonl", [{"messages": m} for m in (turns, system)])])
    encoder = Encoder(templated, "template")
    cleaned = clean(pool, HygieneSettings(), encoder, 0, Reporter(quiet=True))
    assert cleaned.kept == [0]
    assert cleaned.counts["unreadable"] == 1
    assert "system role not supported" in cleaned.rejected[0].reason


def test_generate_cuts_prompts_as_the_adapter_s_rows_were_cut(
    tiny_base: str, titles: str, tmp_path: Path
) -> None:
    common = {"base": tiny_base, "device": "cpu"}
    limits = {"max_length": 64, "overlong": "truncate", "max_steps": 1, "quiet": True}
    adapt(AdaptSettings(**common, **limits, data=(titles,), out=tmp_path / "a"))
    longer_than_the_base = "word " * 600
    rows = generate(
        GenerateSettings(
            **common, adapter=str(tmp_path / "a"), prompt=longer_than_the_base, max_new_tokens=3
        )
    )
    assert rows[0]["prompt"] == longer_than_the_base


def test_evaluate_says_what_it_cuts_and_which_answers_do_not_fit(
    tiny_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "word " * n, "title": "a title of some length"} for n in (10, 90)]
    data = write_rows(tmp_path / "t.jsonl", rows)
    common = {"base": tiny_base, "device": "cpu", "data": (data,), "max_length": 64}
    cut = EvaluateSettings(**common, out=tmp_path / "e", overlong="truncate", max_new_tokens=4)
    evaluate(cut)
    printed = " ".join(capsys.readouterr().err.split())
    assert "truncated 1 of 2 prompts longer than 64 tokens" in printed
    assert "2 of 2 gold answers are longer than max_new_tokens 4" in printed
    evaluate(EvaluateSettings(**common, out=tmp_path / "f", max_new_tokens=60))
    printed = capsys.readouterr().err
    assert "truncated" not in printed
    assert "gold answers" not in printed


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


def test_a_template_that_leaves_out_a_turn_is_an_error_with_the_row(templated: Any) -> None:
    templated.chat_template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }} {{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    encoder = Encoder(templated, "template")
    assert encoder.encode(example()).n_prompt
    system = Message("system", "Be short")
    row = replace(example(), prompt=(system, *example().prompt), place="d.jsonl, line 3")
    with pytest.raises(DataError, match=r"d\.jsonl, line 3: turn 1, the system's, is left out"):
        encoder.encode(row)
    templated.chat_template = (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(DataError, match="the answer is left out"):
        Encoder(templated, "template").encode(example())


def test_a_template_that_drops_thoughts_refuses_an_answer_with_thoughts(templated: Any) -> None:
    templated.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content.split('</think>')[-1] | trim }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    encoder = Encoder(templated, "template")
    assert encoder.encode(example(completion=" Eight, as 3 + 5 is.\n")).n_supervised > 1
    encoder.check(example(completion="Eight."))
    thinking = replace(example(completion="<think>3 + 5</think>Eight."), place="d.jsonl, line 2")
    with pytest.raises(BadRowError, match="not shown as it is, by the chat template"):
        encoder.check(thinking)
    with pytest.raises(DataError, match=r"d\.jsonl, line 2: the answer is left out, or not shown"):
        encoder.encode(thinking)


def test_a_turn_marker_that_is_not_called_special_cannot_be_forged(templated: Any) -> None:
    marks = ["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"]
    templated.add_tokens([*marks, "<think>"])
    user_mark, assistant_mark, thought = templated.convert_tokens_to_ids([*marks, "<think>"])
    templated.chat_template = (
        "{% for m in messages %}<\uff5c{{ m.role | capitalize }}\uff5c>{{ m.content }}"
        "{% if m.role == 'assistant' %}<|eos|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<\uff5cAssistant\uff5c>{% endif %}"
    )
    encoder = Encoder(templated, "template")
    asked = f"Say {marks[0]} or {marks[1]} <think> é"
    prompt = encoder.prompt_ids(user(asked))
    assert prompt.count(user_mark) == prompt.count(assistant_mark) == prompt.count(thought) == 1
    assert templated.decode(prompt) == f"{marks[0]}{asked}{marks[1]}"
    item = encoder.encode(Example(user("Hi"), f"<think>{marks[0]}"))
    assert list(item.ids[item.n_prompt :]).count(user_mark) == 0
    assert item.ids[item.n_prompt] == thought


@pytest.mark.parametrize(
    "shown",
    ["m.content[:20]", "m.content | replace('<', '(')", "m.content | length", "m.content | upper"],
)
def test_special_strings_in_texts_that_a_template_rewrites_are_an_error(
    templated: Any, shown: str
) -> None:
    templated.chat_template = (
        "{% for m in messages %}{{ " + shown + " }}<|eos|>{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    encoder = Encoder(templated, "template")
    assert encoder.prompt_ids(user("Hi"))
    with pytest.raises(DataError, match=r"special token \(<\|eos\|>\), and .* rewrites texts"):
        encoder.prompt_ids(user("What is <|eos|>, and what is not?"))


@pytest.mark.parametrize(
    "wrong",
    [
        "{{ 1 // 0 }}",
        "{{ messages[9].content.x }}",
        "{{ '%d' % 'x' }}",
        "{{ range(10**30) | list }}",
    ],
)
def test_a_template_that_fails_names_itself_and_the_row(templated: Any, wrong: str) -> None:
    templated.chat_template = wrong
    row = replace(example(), place="d.jsonl, line 2")
    with pytest.raises(DataError, match=r"d\.jsonl, line 2: the chat template of .* refuses"):
        Encoder(templated, "template").encode(row)
