"""Generation against transformers' own, and evaluation against sums done by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters import run
from d2lora import (
    Adapter,
    AdaptSettings,
    DataError,
    EvaluateSettings,
    GenerateSettings,
    ModelError,
    SettingsError,
    adapt,
    evaluate,
    fast,
    generate,
)
from d2lora.adapters.attach import attach_adapter, detach_adapter, merged
from d2lora.adapters.base import identity_of_model, load_base
from d2lora.data.encode import Encoder
from d2lora.data.rows import Message
from d2lora.embedded import choice_rows, general_rows, text_rows
from d2lora.evaluation.decoding import Decoder, Sampling, choose
from d2lora.evaluation.generate import adapted
from d2lora.fast.llama import Llama, LlamaSteps
from d2lora.settings import BaseSettings
from support import read_rows, write_rows


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, problems: str) -> Adapter:
    out = tmp_path_factory.mktemp("adapted") / "a"
    return adapt(
        AdaptSettings(
            base=tiny_base, data=(problems,), out=out, rank=4, epochs=8, learning_rate=2e-2,
            quiet=True,
        )
    )  # fmt: skip


def test_greedy_generation_equals_transformers_whatever_the_batch(
    tiny_base: str, adapter: Adapter
) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    model = attach_adapter(base.model, adapter.path, trainable=False)
    encoder = Encoder.of(base, None)
    texts = ("Tom has 5 pens.", "How many?", "A long prompt of many words, " * 5, "x")
    prompts = [encoder.prompt_ids([Message("user", text)]) for text in texts]
    for batch_size in (1, 3, 4):
        ours = dict(Decoder(model, base, 30, batch_size).complete(prompts))
        for index, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            theirs = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=30,
                do_sample=False,
            )  # fmt: skip
            expected = [t for t in theirs[0, len(prompt) :].tolist() if t != base.eos_id]
            assert ours[index] == expected


def test_the_faster_decoding_says_what_the_plain_one_says_for_the_base_and_a_merged_adapter(
    tiny_base: str, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    encoder = Encoder.of(base, None)
    texts = [f"Tom has {n} pens. " * (1 + n % 7) + "How many?" for n in range(30)]
    prompts = [encoder.prompt_ids([Message("user", text)]) for text in texts]

    def printed(folder: Path | None, batch_size: int, *, fast_when: bool) -> dict[int, list[int]]:
        with adapted(base, folder, fast_when=fast_when) as (model, used):
            outputs = dict(Decoder(model, base, 80, batch_size).complete(prompts))
        assert ("Llama decoding" in used.names) == fast_when
        assert ("folded adapter" in used.names) == (fast_when and folder is not None)
        return outputs

    for folder in (None, adapter.path):
        monkeypatch.setattr(base.model.generation_config, "eos_token_id", None)
        rows = list(printed(folder, 30, fast_when=False).values())
        # Ended by the token that comes first at the most different places, rows leave one by one.
        places: dict[int, set[int]] = {}
        for ids in rows:
            for token in set(ids):
                places.setdefault(token, set()).add(ids.index(token))
        end = max(places, key=lambda token: len(places[token]))
        monkeypatch.setattr(base.model.generation_config, "eos_token_id", [end])
        for batch_size in (1, 7, 30):
            quick, plain = (printed(folder, batch_size, fast_when=when) for when in (True, False))
            assert quick == plain
            assert len({len(ids) for ids in quick.values()}) > 1


def test_batches_decoded_side_by_side_are_those_decoded_in_turn(
    tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    prompts = [[7, 8 + n % 9, *range(20, 21 + n % 5)] for n in range(50)]

    def completed() -> dict[int, list[int]]:
        with fast.enabled(base.model, when=True):
            return dict(Decoder(base.model, base, 20, 50).complete(prompts))

    in_turn = completed()
    batches: list[tuple[int, int]] = []
    own = Decoder._decode

    def watched(decoder: Decoder, rows: Any, *rest: Any) -> list[list[int]]:
        batches.append((len(rows), torch.get_num_threads()))
        return own(decoder, rows, *rest)

    monkeypatch.setattr(Decoder, "_decode", watched)
    try:
        torch.set_num_threads(2)
        beside = completed()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert beside == in_turn
    assert batches == [(25, 1), (25, 1)]


def test_rows_may_leave_the_faster_decoding_in_any_order(tiny_base: str) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    llama = Llama.of(base.model)
    assert llama is not None
    prompts = [[5 + n] * (3 + n) for n in range(6)]
    tokens = torch.tensor([[30 + n, 40 + n] for n in range(6)])
    with torch.inference_mode():
        whole = LlamaSteps(llama)
        whole.prefill(prompts)
        whole.step(tokens[:, 0])
        expected = whole.step(tokens[:, 1])
        for kept in ([1, 3, 4], [0, 5], [5], [0, 1, 2], [3, 4, 5]):
            steps = LlamaSteps(llama)
            steps.prefill(prompts)
            steps.step(tokens[:, 0])
            order = steps.keep(kept)
            assert sorted(order) == kept
            torch.testing.assert_close(steps.step(tokens[order, 1]), expected[order])


def test_models_that_the_faster_decoding_does_not_compute_keep_their_own_pass(
    tiny_base: str, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    prompts = [[5, 6, 7]]
    expected = dict(Decoder(base.model, base, 5, 1).complete(prompts))
    attached = attach_adapter(base.model, adapter.path, trainable=False)
    assert Llama.of(attached.get_base_model()) is None  # the adapter is not merged
    detach_adapter(attached)
    wide = load_base(BaseSettings(base=tiny_base, device="cpu", dtype="bfloat16"))
    assert Llama.of(wide.model) is None
    # A difference that is not in the configuration is found out by the first prompt.
    monkeypatch.setattr(
        LlamaSteps, "prefill", lambda _, prompts: torch.zeros(len(prompts), base.model.vocab_size)
    )
    monkeypatch.setattr(
        LlamaSteps, "step", lambda _, next_B: torch.zeros(len(next_B), base.model.vocab_size)
    )
    with fast.enabled(base.model, when=True) as used:
        assert dict(Decoder(base.model, base, 5, 1).complete(prompts)) == expected
    assert "Llama decoding" not in used.names


def test_folding_the_adapter_gives_the_same_outputs_and_leaves_no_trace(
    tiny_base: str, adapter: Adapter
) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    model = attach_adapter(base.model, adapter.path, trainable=False)
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        apart = model(input_ids=ids).logits
        with merged(model):
            folded = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    torch.testing.assert_close(folded, apart, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, apart)
    detach_adapter(model)
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_sampling_is_seeded_and_top_p_cuts_the_tail() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    sampling = Sampling(1.0, 0.75)
    drawn = choose(logits, sampling, sampling.draws(range(4000), 1)[:, 0])
    share = drawn.bincount(minlength=4) / 4000
    assert share[2:].sum() == 0
    assert share[0] == pytest.approx(0.5 / 0.8, abs=0.03)
    again = choose(logits, sampling, sampling.draws(range(4000), 1)[:, 0])
    assert torch.equal(drawn, again)
    other = Sampling(1.0, 0.75, 1).draws(range(4000), 1)[:, 0]
    assert not torch.equal(drawn, choose(logits, sampling, other))
    most = torch.full((4000,), 1 - 2**-24)  # the last token that is kept, not one behind it
    assert set(choose(logits, sampling, most).tolist()) == {1}


@pytest.mark.parametrize("fast", [True, False])
def test_a_sampled_answer_does_not_depend_on_the_rows_beside_it(
    tiny_base: str, *, fast: bool
) -> None:
    base = load_base(BaseSettings(base=tiny_base))
    prompts = [list(range(5, 5 + n)) for n in (9, 4, 9, 7, 4, 12)]

    def answers(batch_size: int, *, fast: bool) -> dict[int, list[int]]:
        with adapted(base, None, fast_when=fast) as (model, _):
            decoder = Decoder(model, base, 10, batch_size, Sampling(1.0, 0.9, 3))
            return dict(decoder.complete(prompts))

    expected = answers(1, fast=False)
    assert answers(4, fast=fast) == answers(6, fast=fast) == expected
    assert expected[0] != expected[2]  # the same prompt, another draw


def test_answers_beyond_the_limit_of_short_factors_are_drawn_as_within_it(
    tmp_path: Path, tiny_base: str
) -> None:
    """LongRoPE whose long and short factors are 1 is the plain one, begun anew at its limit."""
    shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    ones = [1.0] * 4
    config["rope_parameters"] |= {
        "rope_type": "longrope", "short_factor": ones, "long_factor": ones,
        "attention_factor": 1.0, "original_max_position_embeddings": 12,
    }  # fmt: skip
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    prompts = [list(range(5, 5 + n)) for n in (9, 4, 12, 7, 4, 15)]
    answers = []
    for folder in (tiny_base, str(tmp_path / "base")):
        base = load_base(BaseSettings(base=folder))
        decoder = Decoder(base.model, base, 10, 4, Sampling(1.0, 0.9, 3))
        answers.append(dict(decoder.complete(prompts)))
    assert answers[0] == answers[1]
    assert max(len(answer) for answer in answers[0].values()) == 10


def test_rows_that_only_an_adapters_template_shows_are_scored_in_it(
    tmp_path: Path, tiny_base: str
) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
        "{{ m.content }}<|eos|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tool = {"type": "function", "function": {"name": "sky", "parameters": {}}}
    turns = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Dry."}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": turns, "tools": [tool]}] * 2)
    text = write_rows(tmp_path / "text.jsonl", text_rows("valid", 2))
    run(tmp_path / "own", tiny_base, rows, chat_template=template, max_steps=0, rank=2)
    settings = EvaluateSettings(
        base=tiny_base, adapters=(str(tmp_path / "own"),), data=(rows,), general_text=(text,),
        max_new_tokens=2, out=tmp_path / "scores", quiet=True,
    )  # fmt: skip
    assert len(evaluate(settings).records) == 2
    with pytest.raises(DataError, match="cannot be expressed in the plain chat format"):
        evaluate(settings.changed(adapters=("base", *settings.adapters), out=tmp_path / "more"))


@pytest.mark.parametrize(
    "cold", [Sampling(1e-300), Sampling(1e-40), Sampling(1e-6), Sampling(1.0, 1e-300)]
)
def test_sampling_near_zero_takes_the_likeliest_token(cold: Sampling) -> None:
    logits = 100 * torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 4.0]])
    assert choose(logits, cold, cold.draws(range(2), 1)[:, 0]).tolist() == [1, 0]


def test_evaluation_writes_a_record_of_every_row_and_adapter(
    tmp_path: Path, tiny_base: str, problems: str, adapter: Adapter
) -> None:
    name = str(adapter.path)
    evaluation = evaluate(
        EvaluateSettings(
            base=tiny_base, adapters=("base", name), data=(problems,), limit=10,
            max_new_tokens=40, out=tmp_path / "e", quiet=True,
        )
    )  # fmt: skip
    records = pd.read_parquet(tmp_path / "e" / "records.parquet")
    assert records.groupby("adapter").size().to_dict() == {"base": 10, name: 10}
    assert read_rows(tmp_path / "e" / "records.jsonl") == records.to_dict(orient="records")
    assert list(records[records.adapter == name]["target"]) == [
        row["answer"] for row in read_rows(Path(problems))[:10]
    ]
    for who in ("base", name):
        mean = records[records.adapter == who]["exact_match"].mean()
        assert evaluation.scores[who]["exact_match"].mean == mean
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert summary["differences_to_first"][name]["exact_match"]["n_items"] == 10
    assert (tmp_path / "e" / "done.json").exists()


def test_forgetting_is_measured_against_the_base_with_adapters_off(
    tmp_path: Path, tiny_base: str, adapter: Adapter
) -> None:
    text = write_rows(tmp_path / "text.jsonl", text_rows("valid", 20))
    choices = write_rows(tmp_path / "choices.jsonl", choice_rows(30))
    name = str(adapter.path)
    evaluation = evaluate(
        EvaluateSettings(
            base=tiny_base, adapters=(name,), general_text=(text,), choices=(choices,),
            out=tmp_path / "e", quiet=True,
        )
    )  # fmt: skip
    forgetting = evaluation.forgetting[name]
    base = evaluation.forgetting["base"]
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    loaded = load_base(BaseSettings(base=tiny_base, device="cpu"))
    total, count = 0.0, 0
    for row in read_rows(Path(text)):
        ids = loaded.tokenizer(row["text"])["input_ids"] + [loaded.eos_id]
        batch = torch.tensor([ids])
        with torch.no_grad():
            total += float(model(input_ids=batch, labels=batch).loss) * (len(ids) - 1)
        count += len(ids) - 1
    assert base.general_loss == pytest.approx(total / count, rel=1e-5)
    assert base.general_loss_change is None
    assert forgetting.general_loss is not None
    assert forgetting.general_loss_change == pytest.approx(
        forgetting.general_loss - total / count, abs=1e-5
    )
    assert forgetting.choice_accuracy_change is not None
    assert base.choice_accuracy is not None


@pytest.fixture(scope="module")
def formats(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: str, problems: str
) -> tuple[str, ...]:
    """A base with a chat template, and untrained adapters: plain, in it, and in one of its own."""
    folder = tmp_path_factory.mktemp("formats")
    base = str(shutil.copytree(tiny_base, folder / "base"))
    (folder / "base" / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    adapters = [folder / form for form in ("plain", "template")]
    for out in adapters:
        run(out, base, problems, chat_format=out.name, max_steps=0, rank=2)
    other = folder / "other.jinja"
    other.write_text("{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}")
    run(folder / "own", base, problems, chat_template=other, max_steps=0, rank=2)
    return base, *map(str, adapters), str(folder / "own")


def test_an_adapter_that_does_nothing_forgets_nothing_in_whatever_chat_format(
    tmp_path: Path, formats: tuple[str, ...]
) -> None:
    base, plain, template, own = formats
    text = write_rows(tmp_path / "text.jsonl", general_rows("valid", 4))
    choices = write_rows(tmp_path / "choices.jsonl", choice_rows(4))
    found = evaluate(
        EvaluateSettings(
            base=base, adapters=(plain, template, own), general_text=(text,), choices=(choices,),
            out=tmp_path / "e", quiet=True,
        )
    ).forgetting  # fmt: skip
    for name in (plain, template, own):
        assert found[name].general_loss_change == 0
        change = found[name].choice_accuracy_change
        assert change is not None
        assert change.mean == 0
    assert found[f"base, prompted as {plain}"].general_loss == found[plain].general_loss
    assert found["base"].general_loss == found[template].general_loss != found[plain].general_loss


def test_rows_that_one_chat_format_alone_drops_are_not_compared(
    tmp_path: Path, formats: tuple[str, ...]
) -> None:
    base, plain, template, _ = formats
    rows = [{"prompt": "7" * n, "chosen": "yes", "rejected": "no"} for n in range(1, 40)]
    with pytest.raises(DataError, match="different chat formats, in which --overlong drop"):
        evaluate(
            EvaluateSettings(
                base=base, adapters=(plain, template), max_length=40, overlong="drop",
                data=(write_rows(tmp_path / "pairs.jsonl", rows),), out=tmp_path / "e", quiet=True,
            )
        )  # fmt: skip


def test_choices_are_ranked_by_log_probability_over_length(tmp_path: Path, tiny_base: str) -> None:
    rows = [row for row in choice_rows(12) if row["benchmark"] == "words"]
    rows.append({"prompt": "Which?", "choices": ["a", "a"], "answer": 1})  # as some public ones are
    path = write_rows(tmp_path / "choices.jsonl", rows)
    evaluation = evaluate(
        EvaluateSettings(base=tiny_base, choices=(path,), out=tmp_path / "e", quiet=True)
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    loaded = load_base(BaseSettings(base=tiny_base, device="cpu"))
    right: list[bool] = []
    for row in rows:
        scores: list[float] = []
        for choice in row["choices"]:
            prompt = loaded.tokenizer(f"User: {row['prompt']}\nAssistant:")["input_ids"]
            answer = loaded.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, ids.shape[1] - 1)
            total = sum(float(logits[t, ids[0, t + 1]]) for t in places)
            scores.append(total / len(choice))
        right.append(row["choices"][int(np.argmax(scores))] == row["choices"][row["answer"]])
    assert right[-1]
    accuracy = evaluation.forgetting["base"].choice_accuracy
    assert accuracy is not None
    assert accuracy.mean == pytest.approx(np.mean(right))


def test_generate_answers_one_prompt_or_a_file(
    tmp_path: Path, tiny_base: str, problems: str, adapter: Adapter
) -> None:
    common = {"base": tiny_base, "adapter": str(adapter.path), "max_new_tokens": 20}
    question = read_rows(Path(problems))[0]["question"]
    (one,) = generate(GenerateSettings(prompt=question, **common))
    many = generate(GenerateSettings(prompts=problems, **common))
    assert len(many) == 40
    assert many[0] == one
    lines = tmp_path / "prompts.txt"
    lines.write_text(f"{question}\n\nSecond\n")
    assert generate(GenerateSettings(prompts=str(lines), **common))[0] == one
    lines.write_bytes(f"\ufeff{question}\r\nA\u2028b\n \nC\x0cd\x85e\x0bf".encode())
    reported = generate(GenerateSettings(prompts=str(lines), **common))
    assert [row["prompt"] for row in reported] == [question, "A\u2028b", "C\x0cd\x85e\x0bf"]
    assert reported[0] == one
    lines.write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"prompts\.txt, line 1: not UTF-8 text"):
        generate(GenerateSettings(prompts=str(lines), **common))
    with pytest.raises(SettingsError, match="--prompt is not UTF-8 text"):
        generate(GenerateSettings(prompt="x\udce9", **common))
    lines.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DataError, match="Git LFS pointer"):
        generate(GenerateSettings(prompts=str(lines), **common))
    with pytest.raises(ModelError, match="not an adapter"):  # and not the base alone
        generate(GenerateSettings(prompt="a", **{**common, "adapter": ""}))
    for wrong in ({}, {"prompt": "a", "prompts": "b"}):
        with pytest.raises(SettingsError, match="either --prompt"):
            generate(GenerateSettings(**common, **wrong))


def test_an_evaluation_without_anything_to_evaluate_on_is_refused(
    tmp_path: Path, tiny_base: str
) -> None:
    with pytest.raises(SettingsError, match="nothing to evaluate on"):
        evaluate(EvaluateSettings(base=tiny_base, out=tmp_path / "e"))


def test_a_loaded_model_knows_its_fingerprint(tiny_base: str) -> None:
    base = load_base(BaseSettings(base=tiny_base, device="cpu"))
    found = identity_of_model(base.model)
    assert found == base.identity
    assert found.fingerprint == base.fingerprint


def test_bad_test_rows_are_skipped_where_that_is_asked_for_and_kept_aside(
    tmp_path: Path, tiny_base: str, problems: str
) -> None:
    (tmp_path / "d.jsonl").write_text(Path(problems).read_text() + '{"question": 1}\nno row\n')
    text = write_rows(tmp_path / "t.jsonl", [*text_rows("valid", 2), {"text": [3]}])
    choice = write_rows(tmp_path / "c.jsonl", [*choice_rows(2), {"prompt": "p"}])
    given: dict[str, Any] = {
        "base": tiny_base, "data": (str(tmp_path / "d.jsonl"),), "general_text": (text,),
        "choices": (choice,), "limit": 4, "max_new_tokens": 2, "quiet": True,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"2 bad row.*--skip-bad-rows"):
        evaluate(EvaluateSettings(**given, out=tmp_path / "e"))
    found = evaluate(EvaluateSettings(**given, out=tmp_path / "e", skip_bad_rows=True))
    assert len(found.records) == 4
    aside = [row["file"] for row in read_rows(tmp_path / "e" / "bad_rows.jsonl")]
    assert [Path(name).name for name in aside] == ["d.jsonl", "d.jsonl", "t.jsonl", "c.jsonl"]
