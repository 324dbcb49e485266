"""Task cards: how rows are read, shown and scored is data."""

import gzip
import json
import re
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AddedToken

from d2lora import (
    AdaptSettings,
    ConvertSettings,
    EvaluateSettings,
    ModelError,
    SelectSettings,
    WarmupSettings,
    adapt,
    convert,
    evaluate,
    select,
    warm_up,
)
from d2lora.adapters.base import load_base, tokenizer_of
from d2lora.data.cards import read_card, shipped_cards
from d2lora.data.choices import ChoiceQuestion
from d2lora.data.contamination import Guard, leaks_of
from d2lora.data.encode import Encoder
from d2lora.data.paths import value_at
from d2lora.data.reading import labels_of, read_task, with_references
from d2lora.data.rows import BadRowError, Example, Message
from d2lora.data.sources import read_source
from d2lora.data.tasks import answers_of, task_of
from d2lora.data.truncation import fitted
from d2lora.errors import DataError, SettingsError, WarmStartError
from d2lora.evaluation.generate import decode, encoder_of
from d2lora.evaluation.measure import questions_of
from d2lora.evaluation.outputs import without_thoughts
from d2lora.settings import BaseSettings, InspectSettings
from d2lora.tools.rows import see_rows
from support import SHARED, needs_shared_data, read_rows, write_rows


def card(folder: Path, text: str, name: str = "card.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def examples(folder: Path, text: str, *rows: dict[str, Any]) -> list[Example]:
    file = write_rows(folder / "rows.jsonl", rows)
    return list(read_task([file], card(folder, text)).examples)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("a", 1), ("b.c", [{"d": "x"}, {"d": "y"}]), ("b.c[0].d", "x"), ("b.c[-1].d", "y"),
        ("b.c[*].d", ["x", "y"]), ("e.f", "whole"), ("g[*]", []), ("h[*][*]", [1, 2, 3]),
    ],
)  # fmt: skip
def test_a_path_leads_to_a_value(path: str, value: object) -> None:
    row = {
        "a": 1,
        "b": {"c": [{"d": "x"}, {"d": "y"}]},
        "e.f": "whole",
        "g": [],
        "h": [[1, 2], [3]],
    }
    assert value_at(row, path) == value


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x", "`x` is missing; found `a`, `b`"),
        ("a.x", "`a` of `a.x` must be an object, found int"),
        ("b[3]", "`b` of `b[3]` has 1 items, none at 3"), ("a[*]", "`a` of `a[*]` must be a list"),
        ("b[0].y", "`b[0].y` is missing; found `z`"),
    ],
)  # fmt: skip
def test_a_path_that_leads_nowhere_says_where_it_ends(path: str, message: str) -> None:
    with pytest.raises(BadRowError) as error:
        value_at({"a": 1, "b": [{"z": 1}]}, path)
    assert message in str(error.value)


def test_templates_show_fields_of_every_kind(tmp_path: Path) -> None:
    [example] = examples(
        tmp_path,
        """
        columns: {facts: "contexts[*].text"}
        system: You know {topic}.
        prompt: "{{{q}}}\\n{facts}\\n{n} {x:.1f} {flag} {note?}{none?}"
        completion: '{{"a": {a:json}}}'
        """,
        {
            "topic": "maths", "q": " Why? ", "contexts": [{"text": "one"}, {"text": "two"}],
            "n": 83.0, "x": 1.25, "flag": True, "a": {"k": "é"}, "none": None,
        },
    )  # fmt: skip
    assert [(turn.role, turn.content) for turn in example.prompt] == [
        ("system", "You know maths."),
        ("user", "{Why?}\none\ntwo\n83.0 1.2 true "),
    ]
    assert example.completion == '{"a": {"k": "é"}}'


def test_columns_rename_what_any_format_reads(tmp_path: Path) -> None:
    [turns] = examples(
        tmp_path, "columns: {messages: data.dialog}",
        {"data": {"dialog": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
         "instruction": "not read", "output": "not read"},
    )  # fmt: skip
    assert (turns.prompt[0].content, turns.completion) == ("Hi", "Ho")
    [pair] = examples(
        tmp_path, "columns: {prompt: q, chosen: a.good, rejected: a.bad}\nanswers: pairs",
        {"q": "Why?", "a": {"good": "So.", "bad": "No."}},
    )  # fmt: skip
    assert (pair.completion, pair.rejected) == ("So.", "No.")
    [number] = examples(
        tmp_path, "columns: {prompt: text, completion: label}", {"text": "t", "label": 3}
    )
    assert number.completion == "3"


def test_faults_of_rows_name_the_row_the_field_and_the_line_of_the_card(tmp_path: Path) -> None:
    rows = [{"text": "a", "kind": "x"}, {"text": "a"}, {"text": "", "kind": "x"}, {"kind": "y"}]
    with pytest.raises(DataError) as error:
        examples(tmp_path, "# mine\nprompt: '{text}'\ncompletion: '{kind}'\n", *rows)
    told = str(error.value)
    assert "rows.jsonl, line 2: field `kind` is missing; found `text`" in told
    assert "card.yaml, line 3 needs it" in told
    assert "rows.jsonl, line 3: field `text` is empty; where that is right, write {text?}" in told
    assert "rows.jsonl, line 4: field `text` is missing; found `kind`" in told
    assert "card.yaml, line 2 needs it" in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metric: x", "unknown setting `metric`. Did you mean `metrics`? (line 1)"),
        ("answers: open\nprompt: '{a'", "(line 2)"),
        ("prompt: '{a..b}'", "is not a path to a field"),
        ("labels: [a]", "labels are of `answers: closed`"),
        ("prompt: ''", "needs a `completion`"),
        ("prompt: ''\ncompletion: '{x}'\nanswers: closed", "answers: closed needs a prompt"),
        ("answers: pairs\nprompt: '{x}'", "pairs have no templates"),
        ("answers: maybe", "(line 1)"),
        ("prompt: a\nprompt: b", "given twice"),
        ("[1]", "expected `name: value` lines, found list"),
        ("prompt: text", "it shows no field; write the name of one in braces: {text}"),
        ("completion: yes or no", "it shows no field"),
        (
            "values: {lable: {0: no}}\nprompt: '{text}'\ncompletion: '{label}'",
            "names `lable`, which is not among the fields that the card shows",
        ),
        ("answers: closed\nlabels: [no, yes, 'no ']", "`no` is given more than once"),
    ],
)
def test_a_card_that_is_none_says_why_and_where(tmp_path: Path, text: str, message: str) -> None:
    path = card(tmp_path, text)
    with pytest.raises(SettingsError) as error:
        read_card(path)
    assert message in str(error.value)
    assert path in str(error.value)


def test_an_unknown_task_names_the_ones_that_ship() -> None:
    with pytest.raises(SettingsError, match=r"unknown task `bankin`\. Did you mean `banking`\?"):
        task_of("bankin", {})
    with pytest.raises(DataError, match=r"none\.yaml: cannot read the task card: No such file"):
        task_of("none.yaml", {})


def test_every_card_that_ships_is_one_of_at_most_ten_lines() -> None:
    for name in shipped_cards():
        assert read_card(name).card.answers
        text = (Path(__file__).parent.parent / f"src/d2lora/tasks/{name}.yaml").read_text()
        assert len(text.splitlines()) <= 10


@needs_shared_data
@pytest.mark.parametrize(
    ("file", "n_rows", "prompt", "completion"),
    [
        ("svamp/train.json", 700, "Frank was reading through some books.", "#### 83"),
        ("banking/train.csv", 1540, "Which intent", "declined_card_payment"),
        ("restaurants/train.csv", 1200, "Describe this restaurant", "There is a coffee shop"),
        (
            "slots/train.jsonl",
            1050,
            "Give the intent",
            '{"intent": "AddToPlaylist", "slots": {"art',
        ),
        ("titles/train.jsonl", 513, "Write a title for this text.", "LHQ-SVC"),
    ],
)
def test_public_data_is_read_as_it_is_published(
    file: str, n_rows: int, prompt: str, completion: str
) -> None:
    data = read_task([str(SHARED / file)], file.partition("/")[0])
    assert len(data.examples) == n_rows
    assert data.examples[0].prompt[-1].content.startswith(prompt)
    assert data.examples[0].completion.startswith(completion)


@needs_shared_data
def test_every_published_number_is_shown_whole() -> None:
    for part in ("train", "test"):
        file = SHARED / "svamp" / f"{part}.json"
        published = json.loads(file.read_text(encoding="utf-8"))
        examples = read_task([str(file)], "svamp").examples
        shown = [example.completion.removeprefix("#### ") for example in examples]
        assert [float(one) for one in shown] == [row["Answer"] for row in published]
        assert not any("e" in one for one in shown)


@needs_shared_data
def test_test_rows_of_one_prompt_are_one_with_all_their_answers() -> None:
    data = with_references(read_task([str(SHARED / "restaurants/test.csv")], "restaurants"))
    assert len(data.examples) == len(data.rows) == 200
    assert sum(1 + len(example.references) for example in data.examples) == 422
    assert max(len(example.references) for example in data.examples) == 4
    assert [example.row for example in data.examples] == list(range(200))


def test_references_come_from_a_path(tmp_path: Path) -> None:
    text = "prompt: '{q}'\ncompletion: '{a[0]}'\nreferences: a[*]\n"
    [example] = examples(tmp_path, text, {"q": "?", "a": ["x", "y"]})
    assert (example.completion, example.references) == ("x", ("x", "y"))
    with pytest.raises(DataError, match=r"field `a\[\*\]` must be a text or .* none empty"):
        examples(tmp_path, text, {"q": "?", "a": ["x", " "]})


def test_references_come_from_named_columns_and_several_fields(tmp_path: Path) -> None:
    named = (
        "columns: {all: 'a[*]'}\nprompt: '{q}'\ncompletion: '{all}'\nreferences: all\n"
        "values: {all: {1: one, 2: two}}\n"
    )
    [example] = examples(tmp_path, named, {"q": "?", "a": [1, 2]})
    assert example.references == ("one", "two")
    numbers = "prompt: '{q}'\ncompletion: '{a[0]}'\nreferences: a[*]\n"
    [example] = examples(tmp_path, numbers, {"q": "?", "a": [1998, True]})
    assert example.references == ("1998", "true")
    several = "prompt: '{q}'\ncompletion: '{r1}'\nreferences: [r2, r3]\n"
    [example] = examples(tmp_path, several, {"q": "?", "r1": "x", "r2": "y", "r3": "z"})
    assert example.references == ("y", "z")
    [example] = examples(tmp_path, several, {"q": "?", "r1": "x", "r2": "", "r3": None})
    assert example.references == ()
    with pytest.raises(DataError, match="field `r3` is missing"):
        examples(tmp_path, several, {"q": "?", "r1": "x", "r2": "y"})
    with pytest.raises(SettingsError, match="`same prompt` stands alone"):
        examples(tmp_path, several.replace("r3", "same prompt"), {"q": "?"})


def test_a_closed_answer_is_right_by_any_of_its_references_in_the_calibration_too(
    tmp_path: Path, tiny_base: str
) -> None:
    text = (
        "prompt: '{q}'\ncompletion: '{a[0]}'\nreferences: a[*]\nanswers: closed\n"
        "labels: [x, y]\nmetrics: [exact_match]\n"
    )
    rows = [{"q": f"{n}?", "a": ["x", "y"]} for n in range(4)]
    data = (write_rows(tmp_path / "rows.jsonl", rows),)
    done = evaluate(
        EvaluateSettings(
            base=tiny_base, data=data, task=card(tmp_path, text), out=tmp_path / "e", quiet=True
        )
    )
    unsure = 1 - done.records["confidence"].mean()
    assert done.scores["base"]["exact_match"].mean == 1.0
    assert done.calibration["base"] == pytest.approx(unsure)


def test_records_of_rows_with_and_without_references_have_the_same_fields(
    tmp_path: Path, tiny_base: str
) -> None:
    rows = [{"q": "a?", "a": "x"}, {"q": "a?", "a": "y"}, {"q": "b?", "a": "z"}]
    text = "prompt: '{q}'\ncompletion: '{a}'\nreferences: same prompt\nmetrics: [accuracy]\n"
    evaluate(
        EvaluateSettings(
            base=tiny_base, data=(write_rows(tmp_path / "rows.jsonl", rows),),
            task=card(tmp_path, text), max_new_tokens=2, out=tmp_path / "e", quiet=True,
        )
    )  # fmt: skip
    records = read_rows(tmp_path / "e" / "records.jsonl")
    assert [record["references"] for record in records] == [["y"], []]


def test_labels_are_those_of_the_card_else_of_the_rows(tmp_path: Path) -> None:
    rows = [{"t": "a", "c": "yes"}, {"t": "b", "c": "no"}, {"t": "c", "c": "yes"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    text = "prompt: '{t}'\ncompletion: '{c}'\nanswers: closed\n"
    assert labels_of(read_task([file], card(tmp_path, text))) == ("no", "yes")
    listed = card(tmp_path, f"{text}labels: [yes-and-no, 'yes']\n")
    with pytest.raises(DataError, match=r"line 2: the answer 'no' is none of the 2 labels"):
        read_task([file], listed)


def test_a_limit_cuts_what_a_row_brings_and_never_the_instruction(tmp_path: Path) -> None:
    text = "prompt: 'First {a}. Then {b}. Answer:'\ncompletion: '{c}'\n"
    [example] = examples(tmp_path, text, {"a": "x" * 40, "b": "short", "c": "z"})

    def length(e: Example) -> int:
        return len(e.prompt[0].content) + len(e.completion)

    cut = fitted(example, length, 45, lambda t: [(i, i + 1) for i in range(len(t))])
    content = cut.prompt[0].content
    assert length(cut) <= 45
    assert content.startswith("First x")
    assert content.endswith("x. Then short. Answer:")


def test_contamination_is_found_by_the_card_of_the_test_rows(tmp_path: Path) -> None:
    text = "columns: {prompt: story, completion: kind}\nprompt: 'Which kind?\\n\\n{story}'\n"
    story = " ".join(f"word{n}" for n in range(20))
    test = write_rows(tmp_path / "test.jsonl", [{"story": story, "kind": "x"}])
    [train] = examples(tmp_path, text, {"story": story, "kind": "y"})
    guard = Guard([test], 13, {test: str(tmp_path / "card.yaml")})
    assert leaks_of([guard], [train])[0].how.startswith("asks the same question")


@pytest.mark.parametrize(
    ("output", "scored"),
    [
        ("<t>hm</t> 5", "5"), ("hm</t> 5", "5"), ("<t>never ends", ""), ("5", "5"),
        ("<t>a</t>x<t>b</t> 5", "x 5"), ("5 <t>but", "5"),
    ],
)  # fmt: skip
def test_thoughts_are_left_out_of_what_is_scored(output: str, scored: str) -> None:
    assert without_thoughts(output, "<t> </t>") == scored
    assert without_thoughts(output, "") == output


def test_marks_of_thoughts_are_kept_where_they_are_special_tokens(tiny_base: str) -> None:
    base = load_base(BaseSettings(base=tiny_base))
    marks = [AddedToken(mark, special=True) for mark in ("[T]", "[/T]")]
    base.tokenizer.add_tokens(marks, special_tokens=True)
    ids = base.tokenizer.encode("[T]so[/T]5", add_special_tokens=False)
    ids.append(int(base.tokenizer.eos_token_id))
    assert decode(base, ids) == "so5"
    assert decode(base, ids, ["[T]", "[/T]"]) == "[T]so[/T]5"


def test_compressed_files_and_objects_of_objects_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": "é", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, text in {
        "a.jsonl.gz": lines, "a.json.gz": json.dumps(rows),
        "a.csv.gz": "prompt,completion\né,b\nc,d\n", "a.tsv.gz": "prompt\tcompletion\né\tb\nc\td\n",
    }.items():  # fmt: skip
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write(text)
        assert [row.values for row in read_source(str(tmp_path / name)).rows] == rows
    path = tmp_path / "objects.json"
    path.write_text(json.dumps({"p1": rows[0], "p2": {**rows[1], "key": "own"}}))
    source = read_source(str(path))
    assert [row.values for row in source.rows] == [
        {"key": "p1", **rows[0]}, {**rows[1], "key": "own"}
    ]  # fmt: skip
    path.write_text(json.dumps({"version": 1, "examples": rows}))
    assert [row.values for row in read_source(str(path)).rows] == rows


def test_a_cut_gzip_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 500)[:-20])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: the gzip file is cut or damaged"):
        read_source(str(path))


def test_dialogues_of_hh_rlhf_are_read_as_published(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    file = write_rows(
        tmp_path / "hh.jsonl", [{"chosen": f"{start} So.", "rejected": f"{start} No."}]
    )
    [pair] = read_task([file]).examples
    assert pair.prompt == (
        Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Why?")
    )  # fmt: skip
    assert (pair.completion, pair.rejected) == ("So.", "No.")


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if thinking %}<think>{% endif %}{% endif %}"
)


def test_another_chat_template_and_its_arguments_are_learnt_and_inherited(
    tmp_path: Path, tiny_base: str, titles: str
) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    base: dict[str, Any] = {"base": tiny_base, "device": "cpu"}
    own: dict[str, Any] = {
        **base, "chat_template": tmp_path / "chat.jinja", "template_args": ("thinking=true",)
    }  # fmt: skip
    with pytest.raises(SettingsError, match="renders a prompt differently once it is answered"):
        adapt(AdaptSettings(**own, data=(titles,), out=tmp_path / "x", max_steps=0, quiet=True))
    own["template_args"] = ("thinking=false",)
    warm = tmp_path / "warm"
    warm_up(WarmupSettings(**own, data=(titles,), out=warm, max_steps=1, quiet=True))
    adapter = adapt(
        AdaptSettings(
            **base, init=str(warm), data=(titles,), out=tmp_path / "a", max_steps=1, quiet=True
        )
    )
    assert adapter.manifest.chat_template == "{% set thinking = false %}" + TEMPLATE
    loaded = load_base(BaseSettings(**base))
    encoder = encoder_of(adapter.path, loaded, None)
    ids = encoder.prompt_ids((Message("user", "Hi"),))
    assert loaded.tokenizer.decode(ids).endswith("user: Hi\nassistant: ")
    assert loaded.tokenizer.chat_template is None
    own["template_args"] = ("thinking=0",)
    with pytest.raises(WarmStartError, match=r"contradict the warm start .* another template"):
        adapt(AdaptSettings(**own, init=str(warm), data=(titles,), out=tmp_path / "b"))
    alone = {"adapter": str(adapter.path)}
    other = adapt(AdaptSettings(**own, data=(titles,), out=tmp_path / "c", max_steps=1, quiet=True))
    with pytest.raises(ModelError, match=r"another chat template than .* cannot be mixed"):
        convert(ConvertSettings(**alone, mix=(str(other.path),), out=tmp_path / "mixed"))
    convert(ConvertSettings(**base, **alone, merge=True, out=tmp_path / "merged"))
    merged = BaseSettings(base=str(tmp_path / "merged"))
    assert tokenizer_of(merged).chat_template == adapter.manifest.chat_template


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("thinking",), "expected name=value"), (("a b=1",), "expected name=value"),
        (("x=[1]",), "expected name=value"), (("=1",), "expected name=value"),
        (("thinkin=1",), "`thinkin` is no name in the chat template. Did you mean `thinking`?"),
        (("thinking=1", "thinking=0"), "`thinking` is given twice"),
        (("add_generation_prompt=false",), "`add_generation_prompt` is not to be set"),
    ],
)  # fmt: skip
def test_an_argument_that_a_template_does_not_take_is_refused(
    tmp_path: Path, tiny_base: str, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    base = BaseSettings(
        base=tiny_base, template_args=arguments, chat_template=tmp_path / "chat.jinja"
    )
    with pytest.raises(SettingsError) as error:
        tokenizer_of(base)
    assert message in str(error.value)


def test_a_template_file_may_have_a_byte_order_mark_and_is_refused_in_the_plain_format(
    tmp_path: Path, tiny_base: str
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE, encoding="utf-8-sig")
    base = BaseSettings(base=tiny_base, chat_template=file, template_args=("thinking=2024-01-31",))
    given = tokenizer_of(base).chat_template
    assert given == '{% set thinking = "2024-01-31" %}' + TEMPLATE
    with pytest.raises(SettingsError, match="the chat format is plain, and --chat-template"):
        Encoder.of_tokenizer(base, "plain")
    with pytest.raises(SettingsError, match="the chat format is plain, and --chat-template"):
        Encoder.of(load_base(base), "plain")


def test_every_answer_of_a_conversation_is_learnt_where_the_card_says_so(tmp_path: Path) -> None:
    said = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]  # fmt: skip
    for turns, learnt in {"last": ["d"], "every": ["b", "d"]}.items():
        path = card(tmp_path, f"turns: {turns}")
        [example] = examples(tmp_path, f"turns: {turns}", {"messages": said})
        answers = answers_of(task_of(path, {}), example)
        assert [answer.completion for answer in answers] == learnt
        before = [turn.content for turn in answers[0].prompt]
        assert before == (["s", "a", "b", "c"] if turns == "last" else ["s", "a"])


def test_rows_shown_have_every_answer_that_is_learnt(tmp_path: Path, tiny_base: str) -> None:
    said = [{"role": "user" if n % 2 == 0 else "assistant", "content": f"t{n}"} for n in range(4)]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": said}])
    seen = see_rows(
        InspectSettings(base=tiny_base, data=(data,), task=card(tmp_path, "turns: every"))
    )
    with pytest.raises(SettingsError, match="unknown metric `acuracy`"):
        see_rows(
            InspectSettings(base=tiny_base, data=(data,), task=card(tmp_path, "metrics: acuracy"))
        )
    assert (seen.n_rows, seen.n_answers) == (1, 2)
    assert seen.n_supervised == sum(row.n_supervised for row in seen.first)


def test_every_answer_counts_in_training(
    tmp_path: Path, tiny_base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [{"role": "user" if n % 2 == 0 else "assistant", "content": f"t{n}"} for n in range(6)]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": said}] * 4)
    path = card(tmp_path, "turns: every")
    adapter = adapt(
        AdaptSettings(base=tiny_base, data=(data,), task=path, n=2, max_steps=1, out=tmp_path / "a")
    )
    assert "6 answers of these rows are learnt" in capsys.readouterr().err
    assert adapter.manifest.settings["task"] == path


def test_a_choice_is_scored_without_what_a_template_ends_a_turn_with(tiny_base: str) -> None:
    base = load_base(BaseSettings(base=tiny_base))
    template = TEMPLATE.replace("\n{% endfor", "</turn>\n{% endfor")
    encoder = Encoder.of(base, None, template)
    [question] = questions_of(encoder, [ChoiceQuestion("Which?", (" one ", "two"), 1)])
    shown = [base.tokenizer.decode(list(ids)) for ids in question.endings]
    assert [text.strip() for text in shown] == ["one", "two"]
    assert base.tokenizer.decode(list(question.prompt)).endswith("assistant: ")


def test_a_list_in_a_template_says_how_to_show_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"`a` is a list.*write \{a:json\}.*\{a\[\*\]\} for an item"
    ):
        examples(tmp_path, "prompt: '{a}'", {"a": ["x"], "completion": "y"})
    [example] = examples(tmp_path, "prompt: '{a[*]} {a:json}'", {"a": ["x"], "completion": "y"})
    assert example.prompt[0].content == 'x ["x"]'


def test_values_have_names_and_files_without_a_header_have_columns(tmp_path: Path) -> None:
    text = """
    header: [label, text]
    values: {label: {0: no, 1: yes}}
    prompt: "{text}"
    completion: "{label}"
    answers: closed
    """
    file = tmp_path / "rows.tsv"
    file.write_text("0\tfirst\n1\tsecond\n", encoding="utf-8")
    path = card(tmp_path, text)
    data = read_task([str(file)], path)
    assert [e.completion for e in data.examples] == ["no", "yes"]
    assert labels_of(data) == ("no", "yes")
    assert Guard([str(file)], 0, {str(file): path}).n_rows == 2
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"label": 1, "text": "a"}, {"label": 2, "text": "b"}]
    )
    with pytest.raises(DataError, match=r"line 2: field `label` is '2', which is none of 0, 1;"):
        read_task([rows], path)


def test_values_are_named_by_column_name_or_path_and_in_lists(tmp_path: Path) -> None:
    row = {"id": 1, "data": {"kind": 0, "tags": [True, False]}, "label": 1}
    for field, template in {"l": "{l}", "label": "{l}", "data.kind": "{data.kind}"}.items():
        text = f"columns: {{l: label}}\nvalues: {{{field}: {{0: no, 1: yes}}}}\nprompt: '{{id}}'\n"
        [example] = examples(tmp_path, f"{text}completion: '{template}'", row)
        assert example.completion == ("no" if "kind" in field else "yes")
    text = "columns: {t: 'data.tags[*]'}\nvalues: {t: {true: on, false: off}}\nprompt: '{t}'"
    [example] = examples(tmp_path, f"{text}\ncompletion: '{{t:json}}'", row)
    assert (example.prompt[0].content, example.completion) == ("on\noff", '["on", "off"]')


def test_a_column_with_a_name_keeps_its_kind_of_value(tmp_path: Path) -> None:
    [example] = examples(
        tmp_path,
        "columns: {n: a.n, ok: a.ok, tags: 'a.tags[*]'}\n"
        "prompt: '{n:.2f} {tags}'\ncompletion: '{n:json} {ok:json} {tags:json}'",
        {"a": {"n": 5, "ok": True, "tags": ["x", "y"]}},
    )
    assert example.prompt[0].content == "5.00 x\ny"
    assert example.completion == '5 true ["x", "y"]'


def test_a_field_that_may_be_missing_has_a_name_too_and_is_reported_where_no_row_has_it(
    tmp_path: Path,
) -> None:
    text = "columns: {note: meta.note}\nprompt: '{t} {note?}{nte?}'"
    rows = [{"t": "a", "completion": "x", "meta": {"note": "b"}}, {"t": "a", "completion": "x"}]
    found = examples(tmp_path, text, *rows)
    assert [example.prompt[0].content for example in found] == ["a b", "a "]
    said: list[str] = []
    read_task([str(tmp_path / "rows.jsonl")], str(tmp_path / "card.yaml"), say=said.append)
    assert said[0].endswith("rows by format: 2 card; in no row: `nte`")


def test_labels_with_white_space_around_them_are_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,kind\na,card\nb,card \nc,rate\n", encoding="utf-8")
    text = "columns: {prompt: text, completion: kind}\nanswers: closed"
    assert labels_of(read_task([str(file)], card(tmp_path, text))) == ("card", "rate")


def test_a_header_that_the_card_gives_too_is_no_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,kind\na,card\n", encoding="utf-8")
    text = "header: [text, kind]\nprompt: '{text}'\ncompletion: '{kind}'"
    with pytest.raises(DataError, match="line 1: a header, as the task card's `header` has it"):
        read_task([str(file)], card(tmp_path, text))


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        ("{x:g}", {"x": 10**400}, "int too large to convert to float"),
        ("{x:g}", {"x": 1054997.0}, "{x:g} rounds 1054997.0 to 1.055e+06; write {x:.15g}"),
        ("{x?}", {"x?": "Why"}, "called `x?`; give it another name in `columns`"),
    ],
)
def test_a_field_that_cannot_be_shown_as_written_is_a_bad_row(
    tmp_path: Path, template: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as error:
        examples(tmp_path, f"prompt: '{template}'", {**row, "completion": "y"})
    assert message in str(error.value)


def test_dates_and_decimals_of_parquet_are_text_and_nan_is_null(tmp_path: Path) -> None:
    columns = {
        "day": [date(2024, 1, 31)], "price": [Decimal("1.50")], "x": [float("nan")], "b": [b"1"],
    }  # fmt: skip
    file = tmp_path / "rows.parquet"
    parquet.write_table(pa.table(columns), file)
    text = "prompt: '{day} {x?}'\ncompletion: '{price} {price:.1f}'"
    [example] = read_task([str(file)], card(tmp_path, text)).examples
    assert (example.prompt[0].content, example.completion) == ("2024-01-31 ", "1.50 1.5")
    with pytest.raises(DataError, match="field `b` holds bytes"):
        read_task([str(file)], card(tmp_path, "prompt: '{b}'\ncompletion: '{day}'"))


def test_parts_of_fields_that_a_card_shows_count_as_used(tmp_path: Path) -> None:
    said: list[str] = []
    rows = [{"a.b": "x", "c": [{"q": "y", "r": 1}], "d": 2}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    text = "prompt: '{a.b}'\ncompletion: '{c[0].q}'"
    read_task([file], card(tmp_path, text), say=said.append)
    assert said == [f"{file}: rows by format: 1 card; not used: `d`"]
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"q": "a", "b": "c", "r": [{"t": "d", "s": 1}]}])
    text = "answers: pairs\ncolumns: {prompt: q, chosen: b, rejected: 'r[0].t'}"
    read_task([pairs], card(tmp_path, text), say=said.append)
    assert said[-1] == f"{pairs}: rows by format: 1 card"


def test_rows_are_selected_for_a_task_that_a_card_describes(tmp_path: Path, general: str) -> None:
    text = "prompt: '{story}'\ncompletion: '{kind}'\n"
    rows = [{"story": f"Tom has {n} apples.", "kind": "fruit"} for n in range(4)]
    settings = SelectSettings(
        data=(general,), m=3, for_task=(write_rows(tmp_path / "task.jsonl", rows),),
        for_card=card(tmp_path, text), out=tmp_path / "selection", quiet=True,
    )  # fmt: skip
    assert len(read_rows(select(settings).data)) == 3


NESTED = """\
rows: paragraphs[*].qas[*]
columns: {answer: "answers[0].text"}
prompt: "{title}: {context} {question}"
completion: "{answer}"
references: answers[*].text
"""


def article(title: str, *contexts: str) -> dict[str, Any]:
    """An article with two questions to each context, as SQuAD has them."""
    return {
        "title": title,
        "paragraphs": [
            {
                "context": context,
                "qas": [
                    {"question": f"{what}?", "answers": [{"text": what}, {"text": f"the {what}"}]}
                    for what in (f"who {context}", f"where {context}")
                ],
            }
            for context in contexts
        ],
    }


def test_rows_within_what_a_file_holds_get_the_fields_around_them(tmp_path: Path) -> None:
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"version": "1.1", "data": [article("a", "x", "y"), article("b")]}))
    data = read_task([str(file)], card(tmp_path, NESTED))
    assert [example.prompt[0].content for example in data.examples] == [
        f"a: {context} {what} {context}?" for context in "xy" for what in ("who", "where")
    ]
    assert data.examples[0].references == ("who x", "the who x")
    assert [row.place for row in data.rows] == [f"{file}, row {n}" for n in (1, 2, 3, 4)]
    flat = write_rows(tmp_path / "left.jsonl", [row.values for row in data.rows[:2]])
    left = read_task([flat], card(tmp_path, NESTED)).examples
    assert [one.prompt for one in left] == [one.prompt for one in data.examples[:2]]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("a.json", [{"paragraphs": "x"}], "`paragraphs` must be a list of rows, found str"),
        ("a.json", [{"paragraphs": [{"qas": ["x"]}]}], "must hold objects, found str"),
        ("a.json", [{"paragraphs": [{"qa": []}]}], "`paragraphs[*].qas[*]` is missing"),
        ("a.jsonl", [article("a", "x")], "a line holds one row: write the file as a JSON list"),
    ],
)
def test_a_row_in_which_there_are_no_rows_says_so(
    tmp_path: Path, name: str, rows: list[Any], message: str
) -> None:
    file = tmp_path / name
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    file.write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        read_task([str(file)], card(tmp_path, NESTED))


@pytest.mark.parametrize("path", ["qas", "qas[0]", "qas[*].answers", "[*]"])
def test_a_path_that_leads_to_no_rows_is_a_fault_of_the_card(tmp_path: Path, path: str) -> None:
    with pytest.raises(SettingsError, match=r"rows|path"):
        read_card(card(tmp_path, f"rows: '{path}'\nprompt: '{{a}}'\ncompletion: '{{b}}'\n"))
