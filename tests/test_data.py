"""Reading rows of every kind; bad ones are named with file and line, all at once."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from d2lora.data.choices import read_choice_questions
from d2lora.data.files import text_lines
from d2lora.data.reading import read_pool, read_task
from d2lora.data.rows import TOO_DEEP, Message, Row
from d2lora.data.sources import nested_order, read_source, split_validation
from d2lora.errors import DataError
from d2lora.settings.seeds import stream_seed
from d2lora.study.store import content_of
from support import SHARED, needs_shared_data, write_rows

ROWS = [{"prompt": f"Say {word}", "completion": word} for word in ("one", "two", "drei, vier")]


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_every_file_kind_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    path, frame = tmp_path / f"rows.{suffix}", pd.DataFrame(ROWS)
    if suffix in ("jsonl", "ndjson"):
        write_rows(path, ROWS)
    elif suffix == "json":
        path.write_text(json.dumps({"data": ROWS}))
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    examples = read_task([str(path)]).examples
    assert [e.completion for e in examples] == ["one", "two", "drei, vier"]
    assert examples[0].prompt == (Message("user", "Say one"),)
    assert list(read_pool([str(path)]).examples) == examples


def test_a_pool_on_disk_holds_what_its_rows_say_wherever_one_looks(tmp_path: Path) -> None:
    first = write_rows(
        tmp_path / "a.jsonl",
        [{"prompt": "é\u2028\ud83d\ude00", "response": "x\ny", "n": n} for n in range(5)]
        + [{"n": 1}],
    )
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "response": "r"}\nnot JSON\n')
    names = [first, str(tmp_path / "b.jsonl")]
    data, pool = read_task(names, skip_bad=True), read_pool(names)
    assert list(pool.rows) == data.rows
    assert list(pool.examples) == data.examples
    assert pool.examples[1:3] == data.examples[1:3]
    assert pool.examples[-1] == data.examples[-1]
    assert pool.sources == data.sources
    assert sorted(map(str, pool.faults)) == sorted(map(str, data.faults))
    assert len(pool.faults) == 2


def test_a_pool_without_a_good_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none is good"):
        read_pool([write_rows(tmp_path / "a.jsonl", [{"n": 1}])])


@pytest.mark.parametrize(
    ("row", "task", "prompt", "completion"),
    [
        ({"prompt": "p", "completion": "c"}, "instruct", "p", "c"),
        ({"prompt": "p", "response": "c", "source": "s"}, "instruct", "p", "c"),
        ({"instruction": "i", "input": "x", "output": "c"}, "instruct", "i\n\nx", "c"),
        ({"instruction": "i", "input": "", "output": "c"}, "instruct", "i", "c"),
        ({"question": "q", "answer": "a"}, "instruct", "q", "a"),
        ({"question": "q", "answer": "a #### 1"}, "gsm8k", "q", "a #### 1"),
        ({"text": "t", "title": "T"}, "titles", "Write a title for this text.\n\nt", "T"),
    ],
)
def test_the_fields_tell_the_task(
    tmp_path: Path, row: dict[str, str], task: str, prompt: str, completion: str
) -> None:
    data = read_task([write_rows(tmp_path / "rows.jsonl", [row])])
    assert data.task.name == task
    assert data.examples[0].prompt[-1].content == prompt
    assert data.examples[0].completion == completion


def test_plain_text_is_a_document_without_a_prompt(tmp_path: Path) -> None:
    data = read_task([write_rows(tmp_path / "rows.jsonl", [{"text": "t"}])])
    assert (data.task.name, data.examples[0].prompt) == ("text", ())


def test_messages_keep_every_turn(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"},
        {"role": "assistant", "content": "b"},
    ]  # fmt: skip
    (example,) = read_task([write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])]).examples
    assert [turn.role for turn in example.prompt] == ["system", "user", "assistant", "user"]
    assert example.completion == "b"


def test_all_bad_rows_are_named_at_once_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "p", "completion": "c"}\n'
        "{not json\n"
        "[1]\n"
        "\n"
        '{"prompt": "p"}\n'
        '{"prompt": "", "completion": "c"}\n'
        '{"prompt": "p", "completion": 3}\n'
        '{"messages": [{"role": "user", "content": "u"}]}\n'
        '{"messages": [{"role": "robot", "content": "u"}]}\n'
        '{"other": 1}\n'
    )
    with pytest.raises(DataError) as caught:
        read_task([str(path)])
    message = str(caught.value)
    assert "8 bad rows" in message
    for line in (2, 3, 5, 6, 7, 8, 9, 10):
        assert f"rows.jsonl, line {line}:" in message
    assert "column 2" in message
    assert "`completion` (or `response`) is missing beside `prompt`" in message
    assert "`completion` must be text, found int" in message
    kept = read_task([str(path)], skip_bad=True)
    assert (len(kept.examples), len(kept.faults)) == (1, 8)


def test_a_line_separator_inside_a_text_is_no_new_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "a\u2028b", "completion": "c"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_task([str(path)]).examples[0].prompt[0].content == "a\u2028b"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "the file holds no rows"),
        ("a.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b"3", "expected a list of rows, found int"),
        (
            "a.json",
            b'{"a": {"prompt": "p"}, "b": 1}',
            "expected a list of rows, found an object with `a`",
        ),
        (
            "a.json",
            b'{"prompt": "p",\n"completion": "c"}\n{"prompt": "q"}\n',
            "Extra data at line 3",
        ),
        ("a.csv", b"prompt;completion\np;c\n", "between semicolons; write it with commas"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'{"data": [{}], "test": [{}]}', "holds rows in `data` and in `test`"),
        ("a.json", b'{"data": [{}], "data": [{}]}', "`data` appears more than once"),
        ("a.csv", b"prompt,completion\na,b,c\n", "expected 2 fields .*, found 3"),
        ("a.csv", b"prompt,completion,completion\na,b,c\n", "names `completion` more than once"),
        ("a.tsv", b"prompt\tcompletion\tprompt\n1\t2\t3\n", "names `prompt` more than once"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("a.parquet", b"nothing", "not a Parquet file"),
        ("a.txt", b"hello", r"expected a file of kind \.jsonl"),
    ],
)
def test_unreadable_files_say_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_task([str(path)])


def test_a_folder_named_like_a_file_of_rows_is_called_a_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(DataError, match=r"rows\.jsonl: a folder, not a file"):
        read_source(str(tmp_path / "rows.jsonl"))


def test_a_date_beyond_python_s_calendar_is_reported(tmp_path: Path) -> None:
    when = pa.array([2**62], pa.timestamp("us"))
    table = pa.table({"prompt": ["p"], "completion": ["c"], "when": when})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: a date in it is out of Python's range"):
        read_source(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_a_file_that_is_not_utf8_says_where_and_what_to_do(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b"prompt,completion\n" * 2_000 + "café,b\n".encode("latin-1"))
    place = rf"rows\.{suffix}, line 2001: .*byte 36,004 of the file is 0xe9.*iconv -f WINDOWS-1252"
    with pytest.raises(DataError, match=place):
        read_source(str(path))
    path.write_text("prompt,completion\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"line 1: not UTF-8 .*iconv -f UTF-16"):
        read_source(str(path))


DIGITS = "9" * 5_000
ODD_ROWS = (
    ('{"prompt": "p", "completion": "hi \\ud83d"}', r"`completion` holds \\ud83d, half of a"),
    ('{"messages": [{"role": "user", "content": "\\udc00"}]}', r"`messages` holds \\udc00"),
    ('{"prompt": "p", "completion": "c", "\\ud800": 1}', r"`\\ud800` holds"),
    (f'{{"prompt": "p", "completion": "c", "id": {DIGITS}}}', "integer of thousands of digits"),
    (f'{{"prompt": "p", "completion": "c", "ids": [[-{DIGITS}]]}}', "thousands of digits"),
    ('{"prompt": "p", "completion": "c", "prompt": "q"}', "`prompt` appears more than once"),
    ('{"messages": [{"role": "user", "role": "x"}]}', "`role` appears more than once"),
    ('{"prompt": "p", "completion": "c", "score": -Infinity}', "-Infinity is not JSON"),
)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_that_would_not_be_read_as_it_stands_is_a_bad_row(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    rows = [text for text, _ in ODD_ROWS] + ['{"prompt": "p, [", "completion": "\\ud83d\\ude00"}']
    listed = '{"about": {"data": []}, "data": [' + ",\n".join(rows) + '], "n": 2}'
    path.write_text("\n".join(rows) if suffix == "jsonl" else listed)
    with pytest.raises(DataError) as caught:
        read_task([str(path)])
    place = "line" if suffix == "jsonl" else "row"
    for number, (_, reason) in enumerate(ODD_ROWS, 1):
        assert re.search(rf"rows\.{suffix}, {place} {number}: .*{reason}", str(caught.value))
    (kept,) = read_task([str(path)], skip_bad=True).examples
    assert kept.completion == "\U0001f600"


def test_deep_nesting_is_a_bad_row_and_nan_a_missing_value(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    deep = "[" * 100_000 + "]" * 100_000
    path.write_text(
        f'{{"prompt": "p", "completion": "c", "x": {deep}}}\n'
        '{"instruction": "i", "input": NaN, "output": "o"}\n'
    )
    data = read_task([str(path)], skip_bad=True)
    assert [str(fault) for fault in data.faults] == [f"{path}, line 1: {TOO_DEEP}"]
    assert data.examples[0].prompt[0].content == "i"


def test_a_quote_in_tsv_is_a_sign_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    long = "x" * 200_000
    path.write_bytes(
        b'\xef\xbb\xbfprompt\tcompletion\r\nQuote the first word\t"Call me" he said\r\n'
        b'Quote the second\t"me" is the word\n\nAnd the third\the "said\xe2\x80\xa8so\r\x0c\n'
        + f"Long\t{long}\n".encode()
    )
    data = read_task([str(path)])
    assert [row.line for row in data.rows] == [2, 3, 5, 6]
    assert [example.completion for example in data.examples] == [
        '"Call me" he said', '"me" is the word', 'he "said\u2028so\r\x0c', long,
    ]  # fmt: skip
    path.write_text("prompt\tcompletion\na\tb\n\tb\na\nb\tc\td\n")
    with pytest.raises(DataError) as caught:
        read_task([str(path)])
    for line in ("line 3: field `prompt` is empty", "line 4: .* found 1", "line 5: .* found 3"):
        assert re.search(rf"rows\.tsv, {line}", str(caught.value))


def test_csv_is_read_with_its_quotes_and_its_faults_where_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = "x" * 200_000
    text = f'prompt,completion\r\n"a\r\n""b"", c",d\r\n\r\nsay "hi",{long}\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_task([str(path)]).rows == [
        Row({"prompt": 'a\r\n"b", c', "completion": "d"}, str(path), 2),
        Row({"prompt": 'say "hi"', "completion": long}, str(path), 5),
    ]
    path.write_text('prompt,completion\na,"b" c\nd\n"e\n",f\ng,"h\ni,j\n')
    with pytest.raises(DataError) as caught:
        read_task([str(path)])
    assert "3 bad rows; fix them" in str(caught.value)
    for line in ("line 2: not CSV", "line 3: expected 2 .* found 1", "line 6: a quote that opens"):
        assert re.search(rf"rows\.csv, {line}", str(caught.value))


def test_columns_without_a_name_are_named_by_their_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    pd.DataFrame(ROWS).to_csv(path)
    messages: list[str] = []
    read_task([str(path)], say=messages.append)
    assert messages == [f"{path}: rows by format: 3 prompt/completion; not used: `column 1`"]


def test_a_parquet_column_named_twice_is_refused(tmp_path: Path) -> None:
    columns = [pa.array(["p"]), pa.array(["c"]), pa.array(["q"])]
    table = pa.table(columns, names=["prompt", "completion", "prompt"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="`prompt` names more than one column"):
        read_task([str(tmp_path / "rows.parquet")])


def test_a_json_file_of_an_object_a_line_is_read_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    write_rows(path, [*ROWS, {"prompt": "p"}])
    with pytest.raises(DataError, match=r"rows\.json, row 4: field `completion`"):
        read_task([str(path)])
    assert len(read_task([str(path)], skip_bad=True).examples) == 3


def test_folders_of_data_sets_are_read_as_they_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows, other = Dataset.from_list(ROWS), Dataset.from_list(ROWS[:1])
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": rows, "test": other}).save_to_disk(tmp_path / "splits")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for name, part in (("train-0", rows), ("train-1", rows), ("test-0", other)):
        part.to_parquet(tmp_path / "hub" / "data" / f"{name}000-of-00002.parquet")

    def count(name: str) -> int:
        return len(read_task([str(tmp_path / name)]).examples)

    assert (count("saved"), count("splits"), count("hub")) == (3, 3, 6)
    assert (count("splits:test"), count("hub:test")) == (1, 1)
    before = content_of(str(tmp_path / "hub:test"))
    assert before != content_of(str(tmp_path / "hub"))
    (tmp_path / "hub" / "more.txt").write_text("more")
    assert before != content_of(str(tmp_path / "hub:test"))
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("splits:tset", "no split 'tset'. Did you mean `test`? It has train, test"),
        ("saved:test", "saved without splits, and 'test' is asked for"),
        ("hub:valid", "the folder cannot be loaded: "), ("empty", "the folder cannot be loaded: "),
    ):  # fmt: skip
        with pytest.raises(DataError, match=re.escape(message)):
            count(name)
    with pytest.raises(DataError, match="given more than once"):
        read_task([str(tmp_path / "hub"), str(tmp_path / "hub:train")])


def test_a_hub_data_set_with_a_script_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "owner" / "name" / "name.py"
    script.parent.mkdir(parents=True)
    script.write_text("raise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"owner/name:train: .*d2lora runs no code from the hub"):
        read_task(["owner/name:train"])


def test_a_missing_file_is_not_taken_for_a_hub_name() -> None:
    with pytest.raises(DataError, match="no such file"):
        read_source("nowhere.jsonl")
    with pytest.raises(DataError, match="no such file, and not a hub data set"):
        read_source("nowhere")


def test_choices_are_checked(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "choices": ["a", "b"], "answer": 1},
        {"prompt": "p", "choices": ["a", "b"], "answer": 2},
        {"prompt": "p", "choices": ["a"], "answer": 0},
        {"prompt": "p", "choices": ["a", " "], "answer": 0},
        {"prompt": "p", "choices": ["a", ""], "answer": True},
    ]
    with pytest.raises(DataError, match="4 bad row"):
        read_choice_questions([write_rows(tmp_path / "c.jsonl", rows)])
    data = read_choice_questions([write_rows(tmp_path / "c.jsonl", rows[:1])])
    assert data.questions[0].choices == ("a", "b")


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 2**32))
def test_subsets_of_one_seed_nest(n_rows: int, n: int, seed: int) -> None:
    order = nested_order(n_rows, seed)
    assert sorted(order) == list(range(n_rows))
    assert order[: n // 2] == nested_order(n_rows, seed)[:n][: n // 2]


@given(st.integers(1, 200), st.floats(0, 0.99))
def test_validation_rows_are_part_of_the_n(n: int, fraction: float) -> None:
    train, valid = split_validation(range(n), fraction)
    assert sorted(train + valid) == list(range(n))
    assert train
    assert bool(valid) == (fraction > 0 and n > 1)


def test_streams_of_one_seed_differ_and_stay() -> None:
    assert stream_seed(0, "order") == stream_seed(0, "order")
    assert len({stream_seed(seed, name) for seed in range(9) for name in ("order", "init")}) == 18


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "rows", "task"),
    [
        ("general/train", 11978, "instruct"), ("general/valid", 600, "instruct"),
        ("gsm8k/train", 7473, "gsm8k"), ("gsm8k/test", 1319, "gsm8k"),
        ("titles/train", 513, "titles"), ("titles/test", 220, "titles"),
    ],
)  # fmt: skip
def test_the_public_data_sets_are_read_whole(name: str, rows: int, task: str) -> None:
    data = read_task([str(SHARED / f"{name}.jsonl")])
    assert (len(data.examples), data.task.name) == (rows, task)


@needs_shared_data
def test_the_public_choices_are_read_whole() -> None:
    data = read_choice_questions([str(SHARED / "forgetting" / "test.jsonl")])
    assert len(data.questions) == 573


def test_a_suffix_in_capitals_is_the_same_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "ROWS.JSONL"
    write_rows(path, [*ROWS, {"prompt": "p"}])
    with pytest.raises(DataError, match=r"ROWS\.JSONL, line 4: field `completion`"):
        read_task([str(path)])


def test_a_file_given_twice_is_refused_whatever_its_path(tmp_path: Path) -> None:
    name = write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").symlink_to(name)
    for again in (name, str(tmp_path / "b.jsonl")):
        with pytest.raises(DataError, match="given more than once"):
            read_task([name, again])
        with pytest.raises(DataError, match="given more than once"):
            read_choice_questions([name, again])


@pytest.mark.parametrize("suffix", ["tsv", "txt"])
def test_line_ends_of_carriage_returns_alone_are_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b"prompt\tcompletion\ra\tb\rc\td\r")
    with pytest.raises(DataError, match="line 1: a carriage return without a newline"):
        list(text_lines(path))


def test_an_answer_that_is_labelled_as_bad_is_not_learnt(tmp_path: Path) -> None:
    rows = [{**row, "label": index != 1} for index, row in enumerate(ROWS)]
    with pytest.raises(DataError, match="line 2: `label` is false: as in KTO"):
        read_task([write_rows(tmp_path / "d.jsonl", rows)])


@pytest.mark.parametrize("field", ["stars", "category", "score", "label"])
def test_texts_with_labels_are_not_documents_unless_named_so(tmp_path: Path, field: str) -> None:
    name = write_rows(tmp_path / "d.jsonl", [{"text": "Fine food.", field: 5}])
    with pytest.raises(DataError, match=f"`text` with `{field}` looks like labelled data"):
        read_task([name])
    assert len(read_task([name], "text").examples) == 1
