"""Which formats of conversations are known, what is read of them, and what is reported beside."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from d2lora import (
    AdaptSettings,
    EvaluateSettings,
    GenerateSettings,
    WarmupSettings,
    adapt,
    evaluate,
    generate,
)
from d2lora.data.cards import shipped_cards
from d2lora.data.choices import read_choice_questions
from d2lora.data.contamination import Guard
from d2lora.data.encode import Encoder
from d2lora.data.formats import FORMATS
from d2lora.data.reading import read_pool, read_task
from d2lora.data.rows import Message
from d2lora.data.tasks import answers_of, task_of
from d2lora.errors import DataError
from d2lora.study.mixture import write_mixture
from support import write_rows

SYSTEM, USER = ("system", "You answer briefly."), ("user", "Which month follows May?")
FIRST, NEXT = ("assistant", "June."), ("user", "And the one after?")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lund"}}}
ASKS = {"role": "user", "content": "Is it raining in Lund?"}
TOOL_TURNS: list[dict[str, Any]] = [
    ASKS,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "rain"},
    {"role": "assistant", "content": "Yes, it is raining in Lund."},
]
TOOLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}"
    "<|eos|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_CALLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_TOOL = TOOLS.replace("{{ m.content }}", "{{ '' if m.role == 'tool' else m.content }}")


def turns(*pairs: tuple[str, str], who: str = "role", what: str = "content") -> list[Any]:
    return [{who: role, what: text} for role, text in pairs]


def read(
    folder: Path, *rows: dict[str, Any], task: str = "auto", prompts_only: bool = False
) -> tuple[Any, list[str]]:
    messages: list[str] = []
    file = write_rows(folder / "rows.jsonl", rows)
    data = read_task([file], task, say=messages.append, prompts_only=prompts_only)
    return data, [line.removeprefix(f"{folder / 'rows.jsonl'}: ") for line in messages]


def shown(prompt: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in prompt]


SHAREGPT = turns(
    SYSTEM, ("human", USER[1]), ("gpt", FIRST[1]), ("human", NEXT[1]), ("gpt", "July."),
    who="from", what="value",
)  # fmt: skip
BOTH = turns(SYSTEM, USER, FIRST, NEXT, ("assistant", "July."))
PARTS = [{"type": "text", "text": "And the "}, {"type": "text", "text": "one after?"}]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"conversations": SHAREGPT}, "ShareGPT"),
        ({"conversations": BOTH}, "ShareGPT"),
        ({"messages": SHAREGPT}, "messages"),
        ({"messages": BOTH}, "messages"),
        ({"messages": BOTH[1:], "system": SYSTEM[1]}, "messages with `system`"),
        ({"messages": BOTH, "system": SYSTEM[1]}, "messages with `system`"),
        (
            {"messages": [*BOTH[:3], {"role": "user", "content": PARTS}, BOTH[4]]},
            "messages",
        ),
        (
            {
                "instruction": NEXT[1], "input": "", "output": "July.", "system": SYSTEM[1],
                "history": [[USER[1], FIRST[1]]],
            },
            "Alpaca with `system`, `history`",
        ),
        (
            {
                "system_prompt": SYSTEM[1], "history": BOTH[1:3], "question": NEXT[1],
                "response": "July.",
            },
            "question/response with `system_prompt`, `history`",
        ),
        ({"prompt": BOTH[:4], "completion": BOTH[4:]}, "prompt/completion"),
        ({"prompt": BOTH[:4], "completion": "July."}, "prompt/completion"),
        ({"prompt": BOTH[:4], "response": "July.", "messages": None}, "prompt/response"),
    ],
)  # fmt: skip
def test_every_format_of_a_conversation_reads_the_same_and_is_reported_once(
    tmp_path: Path, row: dict[str, Any], name: str
) -> None:
    data, messages = read(tmp_path, row, row)
    for example in data.examples:
        assert shown(example.prompt) == [SYSTEM, USER, FIRST, NEXT]
        assert example.completion == "July."
    assert messages == [f"rows by format: 2 {name}"]
    assert list(read_pool([str(tmp_path / "rows.jsonl")]).examples) == data.examples


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"instruction": "Who?", "context": "The town's masons.", "response": "c"}, "instruct"),
        ({"prompt": "Who?", "context": "The town's masons.", "completion": "c"}, "instruct"),
        ({"instruction": "Who?", "input": "The town's masons.", "output": "c"}, "instruct"),
        ({"question": "Who?", "context": "The town's masons.", "answer": "#### 1"}, "gsm8k"),
        (
            {"prompt": "Who?", "context": "The town's masons.", "chosen": "a", "rejected": "b"},
            "preferences",
        ),
    ],
)
def test_a_context_follows_the_question_after_an_empty_line(
    tmp_path: Path, row: dict[str, Any], task: str
) -> None:
    data, _ = read(tmp_path, row)
    assert data.task.name == task
    assert shown(data.examples[0].prompt) == [("user", "Who?\n\nThe town's masons.")]


def test_answers_of_weight_0_are_shown_and_not_learnt(tmp_path: Path) -> None:
    def weighed(*weights: float | None) -> dict[str, Any]:
        asked = turns(USER, FIRST, NEXT, ("assistant", "July."), NEXT, ("assistant", "August."))
        answers = iter(weights)
        return {
            "messages": [
                {**turn, "weight": next(answers)} if turn["role"] == "assistant" else turn
                for turn in asked
            ]
        }

    every = tmp_path / "every.yaml"
    every.write_text("turns: every", encoding="utf-8")
    for weights, last, learnt in (
        ((None, None, None), "August.", ["June.", "July.", "August."]),
        ((0, 1, 1.0), "August.", ["July.", "August."]),
        ((1, 0, None), "August.", ["June.", "August."]),
        ((1, None, 0), "July.", ["June.", "July."]),
        ((1, 0, 0), "June.", ["June."]),
    ):
        data, messages = read(tmp_path, weighed(*weights))
        assert [row.completion for row in data.examples] == [last]
        assert messages == ["rows by format: 1 messages"]
        data, _ = read(tmp_path, weighed(*weights), task=str(every))
        answers = answers_of(data.task, data.examples[0])
        assert [row.completion for row in answers] == learnt
        # What is not learnt is still what came before.
        before = ["".join(turn.content for turn in row.prompt) for row in answers]
        assert all(FIRST[1] in text for text in before[1:])
    for weight in (2, 0.5, "0", True):
        with pytest.raises(DataError, match=r"turn 4 of `messages`: `weight` must be 0"):
            read(tmp_path, weighed(1, weight, 1))
    with pytest.raises(DataError, match="every answer of `messages` has `weight` 0"):
        read(tmp_path, weighed(0, 0, 0))
    asked = {"messages": [*turns(USER), {**turns(FIRST)[0], "weight": 0}, *turns(NEXT)]}
    data, _ = read(tmp_path, asked, prompts_only=True)
    assert shown(data.examples[0].prompt) == [USER, FIRST, NEXT]


def test_fields_that_are_not_used_are_named_once_a_source(tmp_path: Path) -> None:
    weighed = [{**turns(USER)[0], "weight": 0}, *turns(FIRST)]
    rows = [
        {"instruction": "i", "response": "r", "category": "c", "note": None},
        {"instruction": "i", "response": "r", "category": "c", "id": 1},
        {"messages": weighed},
    ]
    _, messages = read(tmp_path, *rows)
    unused = "`category`, `id`, `messages[].weight`"
    assert messages == [f"rows by format: 2 Dolly, 1 messages; not used: {unused}"]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    _, messages = read(tmp_path, {"messages": turns(USER, FIRST), "tools": [tool]})
    assert messages == ["rows by format: 1 messages with `tools`"]
    _, messages = read(tmp_path, {"text": "t", "title": "T", "label": 1})
    assert messages == ["rows by format: 1 titles; not used: `label`"]
    _, messages = read(tmp_path, {"text": "t", "url": "u"})
    assert messages == ["rows by format: 1 text; not used: `url`"]
    choice = {"prompt": "p", "choices": ["a", "b"], "answer": 0, "subject": "s"}
    messages: list[str] = []
    read_choice_questions([write_rows(tmp_path / "c.jsonl", [choice, choice])], say=messages.append)
    assert [line.partition("rows by format: ")[2] for line in messages] == [
        "2 multiple choice; not used: `subject`"
    ]


def test_commands_say_what_they_read(
    tmp_path: Path, tiny_base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": n, "conversations": SHAREGPT} for n in range(4)]
    data = write_rows(tmp_path / "sharegpt.jsonl", rows)
    common: dict[str, Any] = {"base": tiny_base, "device": "cpu"}
    adapt(AdaptSettings(**common, data=(data,), out=tmp_path / "a", max_steps=1, rank=2))
    evaluate(EvaluateSettings(**common, data=(data,), out=tmp_path / "e", max_new_tokens=2))
    generate(GenerateSettings(**common, prompts=data, max_new_tokens=2))
    messages = capsys.readouterr().err.split("\n")
    read_as = f"{data}: rows by format: 4 ShareGPT; not used: `id`"
    prompts = f"{data}: rows by format: 4 prompts in `conversations`; not used: `id`"
    assert [line for line in messages if "rows by format" in line] == [read_as, read_as, prompts]


@pytest.mark.parametrize("label", ["label", "Label", "summary", "answer", "output"])
def test_text_beside_a_label_is_no_document_unless_that_is_asked_for(
    tmp_path: Path, label: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"text,{label}\nThe soup was cold.,negative\nA lovely evening.,positive\n")
    with pytest.raises(DataError, match=f"`text` with `{label}`.*rename.*drop `{label}`"):
        read_task([str(path)])
    assert [e.completion for e in read_task([str(path)], "text").examples] == [
        "The soup was cold.", "A lovely evening.",
    ]  # fmt: skip
    rows = [{"text": "The soup was cold."}, {"text": "A lovely evening.", label: "positive"}]
    with pytest.raises(DataError, match=f"`text` with `{label}`"):
        read(tmp_path, *rows)
    assert Guard([str(path)]).n_rows == 2


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"conversations": []}, "must be a list of turns, found an empty list"),
        ({"conversations": "x"}, "must be a list of turns, found str"),
        ({"conversations": turns(("gpt", "a"), who="from", what="value")}, "must come before"),
        ({"conversations": turns(("human", "a"), who="from", what="value")}, "assistant's, found"),
        ({"messages": turns(("alien", "a"))}, "role must be .* found 'alien'"),
        ({"messages": [{"role": ["x"], "content": "a"}]}, "role must be"),
        ({"messages": [{"role": "user"}]}, "must have `role` and `content`"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "found dict"),
        ({"messages": [{"role": "user", "content": []}]}, "not empty"),
        ({"messages": BOTH, "system": "Another."}, "differs from `system`"),
        ({"messages": BOTH, "tools": "weather("}, "`tools` is a text that is not JSON"),
        ({"messages": BOTH, "tools": ["weather"]}, "`tools` must be a list of objects"),
        (
            {"prompt": "p", "chosen": TOOL_TURNS[1:2], "rejected": TOOL_TURNS[3:]},
            "calls a tool; preferences are between texts",
        ),
        ({"messages": [{**ASKS, "tool_calls": [CALL]}]}, "of an assistant's turn"),
        ({"messages": [ASKS, {"role": "assistant", "tool_calls": [3]}]}, "must have a `name`"),
        ({"instruction": "i", "output": "o", "history": "h"}, "list of pairs"),
        ({"instruction": "i", "output": "o", "history": [["q", "a"], ["q"]]}, "as number 2"),
        ({"instruction": "i", "output": "o", "history": [["q", 3]]}, "list of pairs"),
        ({"instruction": "i", "output": "o", "system": 3}, "`system` must be text, found int"),
        ({"question": "q", "answer": "a", "context": {"a": 1}}, "`context` must be text"),
        ({"prompt": BOTH[:3], "completion": "c"}, "must be the user's"),
        ({"prompt": "p", "completion": BOTH[:1]}, "one turn, the assistant's, found system"),
        ({"prompt": "p", "completion": [*BOTH[2:3], *BOTH[4:]]}, "assistant, assistant"),
        ({"instruction": "i"}, r"`output` \(or `response`\) is missing beside `instruction`"),
        ({"question": "q"}, r"`answer` \(or `response`\) is missing beside `question`"),
    ],
)
def test_what_is_of_no_format_is_a_bad_row_that_says_why(
    tmp_path: Path, row: dict[str, Any], fault: str
) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 1: .*{fault}"):
        read(tmp_path, row)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TOOL_TURNS},
        {
            "conversations": turns(
                ("human", "Is it raining in Lund?"),
                ("function_call", '{"name": "weather", "arguments": {"city": "Lund"}}'),
                ("observation", "rain"), ("gpt", "Yes, it is raining in Lund."),
                who="from", what="value",
            )
        },
        {
            "messages": [
                ASKS,
                {
                    "role": "assistant",
                    "function_call": {"name": "weather", "arguments": '{"city": "Lund"}'},
                },
                {"role": "function", "content": "rain"},
                TOOL_TURNS[3],
            ]
        },
    ],
)  # fmt: skip
def test_tool_calls_reach_a_template_that_shows_them(
    tmp_path: Path, tiny_base: str, row: dict[str, Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = TOOLS
    encoder = Encoder(tokenizer, "template")
    data = write_rows(tmp_path / "rows.jsonl", [row])
    (example,) = read_task([data], check=encoder.check).examples
    encoded = encoder.encode(example)
    assert tokenizer.decode(encoded.ids[: encoded.n_prompt]) == (
        "<user>Is it raining in Lund?<|eos|><assistant>weather(Lund)<|eos|><tool>rain<|eos|>"
        "<assistant>"
    )
    assert tokenizer.decode(encoded.ids[encoded.n_prompt :]) == "Yes, it is raining in Lund.<|eos|>"


OFFERS = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + TOOLS
OFFERED = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


@pytest.mark.parametrize("offered", [OFFERED, json.dumps(OFFERED)])
def test_an_answer_that_calls_a_tool_is_learnt_as_the_template_writes_it(
    tmp_path: Path, tiny_base: str, offered: object
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = OFFERS
    encoder = Encoder(tokenizer, "template")
    row = {"messages": TOOL_TURNS[:2], "tools": offered}
    data = write_rows(tmp_path / "rows.jsonl", [row])
    (example,) = read_task([data], check=encoder.check).examples
    encoded = encoder.encode(example)
    prompt, answer = encoded.ids[: encoded.n_prompt], encoded.ids[encoded.n_prompt :]
    assert tokenizer.decode(prompt) == ("[weather]<user>Is it raining in Lund?<|eos|><assistant>")
    assert tokenizer.decode(answer) == "weather(Lund)<|eos|>"
    assert json.loads(example.completion) == CALL["function"]
    assert encoder.as_written(example).completion == "weather(Lund)"
    assert list(prompt) == encoder.prompt_of(example)


def test_an_answer_of_text_and_calls_shows_both(tmp_path: Path, tiny_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = TOOLS
    says = {**TOOL_TURNS[1], "content": "Let me see."}
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": [ASKS, says]}])
    (example,) = read_task([data]).examples
    encoded = Encoder(tokenizer, "template").encode(example)
    assert tokenizer.decode(encoded.ids[encoded.n_prompt :]) == "Let me see.weather(Lund)<|eos|>"


def test_calls_are_among_the_turns_that_are_learnt_where_every_one_is(tmp_path: Path) -> None:
    card = tmp_path / "card.yaml"
    card.write_text("turns: every\n")
    data = read_task([write_rows(tmp_path / "rows.jsonl", [{"messages": TOOL_TURNS}])], str(card))
    call, answer = answers_of(data.task, data.examples[0])
    assert call.more["tool_calls"] == [CALL]
    assert (answer.completion, answer.more) == ("Yes, it is raining in Lund.", {})


@pytest.mark.parametrize(
    ("template", "row", "fault"),
    [
        (NO_CALLS, {"messages": TOOL_TURNS[:2]}, "the answer calls a tool, and .* leaves that out"),
        (None, {"messages": TOOL_TURNS[:2]}, "the answer calls a tool, which the plain chat"),
        (TOOLS, {"messages": BOTH, "tools": OFFERED}, "`tools` are left out by"),
        (None, {"messages": BOTH, "tools": OFFERED}, "`tools` cannot be expressed in the plain"),
    ],
)
def test_what_a_format_cannot_show_of_tools_makes_a_bad_row(
    tmp_path: Path, tiny_base: str, template: str | None, row: dict[str, Any], fault: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, "template" if template else "plain")
    data = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=rf"line 1: .*{fault}"):
        read_task([data], check=encoder.check)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (NO_CALLS, "turn 2 calls a tool, and the base's chat template leaves that out"),
        (NO_TOOL, "turn 3 is a tool's, and the base's chat template leaves that out"),
        (None, "turn 2 calls a tool, which the plain chat format cannot express"),
    ],
)
def test_a_format_without_tools_makes_a_row_with_tools_a_bad_one(
    tmp_path: Path, tiny_base: str, template: str | None, fault: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, "template" if template else "plain")
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": BOTH}, {"messages": TOOL_TURNS}])
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: {fault}"):
        read_task([data], check=encoder.check)
    kept = read_task([data], skip_bad=True, check=encoder.check)
    assert (len(kept.examples), len(kept.faults)) == (1, 1)
    whole = read_task([data]).examples[1]
    with pytest.raises(DataError, match=fault):
        encoder.prompt_ids(whole.prompt)


def test_adapt_sets_rows_with_tools_aside_with_the_other_bad_ones(
    tmp_path: Path, tiny_base: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": BOTH}, {"messages": TOOL_TURNS}])
    settings = AdaptSettings(
        base=tiny_base, data=(data,), out=tmp_path / "a", max_steps=1, rank=2, quiet=True,
        skip_bad_rows=True,
    )  # fmt: skip
    adapt(settings)
    (aside,) = (tmp_path / "a" / "bad_rows.jsonl").read_text().strip().split("\n")
    assert json.loads(aside)["line"] == 2
    with pytest.raises(DataError, match=r"line 2: turn 2 calls a tool"):
        adapt(settings.changed(skip_bad_rows=False, out=tmp_path / "b"))


def test_a_mixture_keeps_the_turns_of_tools(tmp_path: Path) -> None:
    data = (write_rows(tmp_path / "rows.jsonl", [{"messages": TOOL_TURNS}]),)
    general = WarmupSettings(data=data, out=tmp_path, epochs=1)
    task = AdaptSettings(data=data, out=tmp_path, epochs=1)
    write_mixture(general, task, tmp_path / "mixed.jsonl", tmp_path / "held.jsonl")
    (example,) = read_task(data).examples
    mixed = read_task([str(tmp_path / "mixed.jsonl")]).examples
    assert [(e.prompt, e.completion) for e in mixed] == [(example.prompt, example.completion)] * 2


def test_only_the_prompt_is_asked_of_prompts_in_every_format(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"conversations": SHAREGPT[:4]}, {"conversations": SHAREGPT}, {"messages": BOTH[:4]},
        {"instruction": NEXT[1], "history": [[USER[1], FIRST[1]]], "system": SYSTEM[1]},
        {"prompt": BOTH[:4]}, {"question": NEXT[1], "history": BOTH[:3], "response": "July."},
        {"prompt": BOTH[:4], "chosen": None, "rejected": None},
    ]  # fmt: skip
    data, messages = read(tmp_path, *rows, prompts_only=True)
    assert all(shown(e.prompt) == [SYSTEM, USER, FIRST, NEXT] for e in data.examples)
    assert {e.completion for e in data.examples} == {""}
    assert "not used" not in messages[0]


def test_every_format_is_recognized_by_the_fields_that_it_needs() -> None:
    for known in FORMATS:
        row = dict.fromkeys(known.needs, "x")
        detected = next(other for other in FORMATS if row.keys() >= set(other.needs))
        assert detected is known
    assert all(task_of(name, {}).formats for name in shipped_cards())
