"""A grammar of odd data: texts, values, rows and files, drawn from a seeded generator."""

import csv
import gzip
import io
import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from texts import ODD

Rng = random.Random
Values = dict[str, Any]

FORMATS: tuple[tuple[str, ...], ...] = (
    ("prompt", "completion"), ("instruction", "input", "output"), ("question", "answer"),
    ("instruction", "context", "response"), ("text",), ("text", "title"), ("messages",),
    ("conversations",), ("prompt", "chosen", "rejected"), ("chosen", "rejected"),
    ("prompt", "response"), ("prompt", "choices", "answer"), ("text", "label"),
)  # fmt: skip
BESIDE = ("system", "history", "context", "tools", "source", "label", "benchmark", "x", "", "a.b")


def text(rng: Rng) -> str:
    """Return a text: mostly words, else something odd, or both."""
    if rng.random() < 0.5:
        return words(rng)
    odd = rng.choice(ODD)
    if rng.random() < 0.1:
        odd = "".join(_character(rng) for _ in range(rng.randint(1, 60)))
    return odd if rng.random() < 0.5 else f"{words(rng)} {odd} {words(rng)}"


def words(rng: Rng) -> str:
    """Return some words."""
    letters = string.ascii_lowercase
    return " ".join(
        "".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(rng.randint(1, 12))
    )


def _character(rng: Rng) -> str:
    while 0xD800 <= (code := rng.choice([rng.randrange(0x110000), rng.randrange(0x300)])) < 0xE000:
        pass
    return chr(code)


def deep(rng: Rng, leaf: Any = 1) -> Any:
    """Return a value that is nested up to a few hundred times."""
    for _ in range(rng.choice([5, 30, 90, 99, 101, 150, 300])):
        leaf = [leaf] if rng.random() < 0.5 else {"a": leaf}
    return leaf


def value(rng: Rng, depth: int = 0) -> Any:
    """Return any value of JSON."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.choice([0, 1, -1, 2**31, 2**63, -(2**64), 10**30, 10**4000]),
        lambda: rng.choice([0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), 1 / 3]),
        lambda: text(rng),
    ]
    if depth < 4:
        kinds += [
            lambda: [value(rng, depth + 1) for _ in range(rng.randint(0, 4))],
            lambda: {text(rng): value(rng, depth + 1) for _ in range(rng.randint(0, 4))},
        ]
    if rng.random() < 0.02:
        return deep(rng)
    return rng.choice(kinds)()


def turn(rng: Rng, role: str) -> Any:
    """Return a turn of a conversation, now and then a wrong one."""
    who, what = rng.choice([("role", "content"), ("from", "value")])
    content: Any = text(rng)
    if rng.random() < 0.1:
        content = [{"type": rng.choice(["text", "image"]), "text": text(rng)}]
    made: Values = {who: role, what: content}
    if role == "assistant" and rng.random() < 0.1:
        arguments: Any = rng.choice([value(rng), json.dumps(value(rng)), "{", '"\\ud800"'])
        call = {
            "id": "1",
            "function": {"name": rng.choice(["f", text(rng)]), "arguments": arguments},
        }
        made["tool_calls"] = rng.choice([[call], [call, call], call, json.dumps(call)])
    if rng.random() < 0.05:
        made[rng.choice(list(made))] = value(rng)
    return made if rng.random() < 0.98 else value(rng)


def turns(rng: Rng) -> Any:
    """Return a conversation."""
    roles = ["system"] * (rng.random() < 0.3)
    for _ in range(rng.randint(1, 4)):
        roles += ["user", "assistant"]
    if rng.random() < 0.1:
        roles.insert(rng.randint(0, len(roles)), rng.choice(["tool", "nobody", "", "human"]))
    return [turn(rng, role) for role in roles]


def row(rng: Rng, known: tuple[str, ...] | None = None, oddness: float = 1.0) -> Values:
    """Return a row of a format, of any where none is named, with faults of many kinds or none."""
    made: Values = {}
    for name in known or rng.choice(FORMATS):
        if name in ("messages", "conversations"):
            made[name] = turns(rng)
        elif name == "choices":
            made[name] = [text(rng) for _ in range(rng.randint(0, 5))]
        elif name in ("chosen", "rejected", "prompt") and rng.random() < 0.2:
            made[name] = turns(rng)
        else:
            made[name] = text(rng)
    if "choices" in made:
        made["answer"] = rng.choice([0, 1, 1.0, True, -1, 99, "0"])
    for _ in range(rng.choice([0, 1, 3])):
        if rng.random() < oddness:
            change(rng, made)
    return made


def change(rng: Rng, made: Values) -> None:
    """Make something in a row odd."""
    name = rng.choice(list(made) or [""])
    match rng.randrange(6):
        case 0:
            made.pop(name, None)
        case 1:
            made[name] = None
        case 2:
            made[name] = value(rng)
        case 3:
            made[rng.choice(BESIDE)] = rng.choice([text, value, turns, tools])(rng)
        case 4:
            made[text(rng)] = value(rng)
        case _:
            made[name] = deep(rng, made.get(name))


def tools(rng: Rng) -> Any:
    """Return tools as a row may offer them."""
    function = {"name": "f", "description": text(rng), "parameters": value(rng)}
    found = [{"type": "function", "function": function}]
    return rng.choice([found, json.dumps(found), deep(rng), "[]", "", '[{"a": "\\udc00"}]'])


@dataclass(frozen=True)
class Line:
    """A row as it stands in a file."""

    values: Any
    known: bool | None
    """Whether it is good; None: not known."""


def lines(rng: Rng, n: int, *, planted: bool) -> list[Line]:
    """Return rows; planted ones are questions and answers known to be good or bad."""
    if not planted:
        known, oddness = rng.choice([None, *FORMATS]), rng.choice([0.0, 0.2, 1.0])
        return [Line(row(rng, known, oddness), None) for _ in range(n)]
    made: list[Line] = []
    for _ in range(n):
        good = {"prompt": f"What? {words(rng)}", "completion": words(rng)}
        if rng.random() < 0.6:
            good["completion"] += " " + rng.choice(["<|eos|>", "中文", "{x}", "=1", "\u202e", "½"])
            made.append(Line(good, known=True))
            continue
        name = rng.choice(list(good))
        bad = rng.choice(["", " \n", None, 5, {"a": 1}, [], [1]])
        wrong = {**good, name: bad}
        if rng.random() < 0.3:
            del wrong[name]
        made.append(Line(wrong, known=False))
    return made


def write(rng: Rng, folder: Path, name: str, rows: list[Line], *, planted: bool) -> Path:
    """Write rows into a file of some kind; of planted ones nothing but their form is odd."""
    kind = rng.choice([".jsonl"] * 5 + [".json", ".csv", ".tsv"] + [".parquet"] * 2 * (not planted))
    path = folder / f"{name}{kind}"
    if kind == ".parquet":
        write_parquet(rng, path, rows)
        return path
    data = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv}[kind](rng, rows, planted)
    if planted:
        encoded = data.encode()
    else:
        form = rng.choice(["utf-8"] * 30 + ["utf-8-sig", "utf-16", "latin-1"])
        encoded = data.encode(form, "replace")
        if rng.random() < 0.05:
            encoded = damaged(rng, encoded)
    if rng.random() < 0.1:
        encoded = gzip.compress(encoded, 1)
        if not planted and rng.random() < 0.3:
            encoded = damaged(rng, encoded)
        path = path.with_name(path.name + rng.choice([".gz", ".GZ"]))
    path.write_bytes(encoded)
    return path


def damaged(rng: Rng, data: bytes) -> bytes:
    """Return bytes that are cut, or of which some are others."""
    if not data or rng.random() < 0.3:
        return data[: rng.randint(0, len(data))]
    place = rng.randrange(len(data))
    return data[:place] + rng.randbytes(rng.randint(0, 4)) + data[place + rng.randint(0, 3) :]


def _jsonl(rng: Rng, rows: list[Line], planted: bool) -> str:
    made: list[str] = []
    for one in rows:
        written = json.dumps(one.values, ensure_ascii=rng.random() < 0.5)
        if not planted and rng.random() < 0.05:
            written = rng.choice(
                ["", "{", "[]", "1", "null", '{"a": 1, "a": 2}', '{"prompt": "\\ud800"}', "\x00",
                 '{"prompt": NaN}', "[" * 2000, '{"a":' * 990 + "1" + "}" * 990, written + ",",
                 '{"prompt": ' + "9" * 6000 + "}", '{"prompt": "x", "completion": -Infinity}',
                 written[: rng.randint(0, len(written))]]
            )  # fmt: skip
        made.append(written)
    return rng.choice(["\n", "\n", "\r\n"]).join(made) + "\n" * rng.randint(0, 1)


def _json(rng: Rng, rows: list[Line], planted: bool) -> str:
    values = [one.values for one in rows]
    forms: list[Any] = [values, {"data": values}, {"version": 1, "rows": values}]
    if not planted:
        forms += [{str(i): one for i, one in enumerate(values)}, {"a": values, "b": values}, 5,
                  {}, [], [values], deep(rng), value(rng)]  # fmt: skip
    return json.dumps(rng.choice(forms), indent=rng.choice([None, 1]))


def _columns(rows: list[Line]) -> list[str]:
    return list(dict.fromkeys(name for one in rows for name in one.values))


def _csv(rng: Rng, rows: list[Line], planted: bool) -> str:
    names, file = _columns(rows), io.StringIO(newline="")
    writer = csv.writer(file, quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    writer.writerow(names)
    for one in rows:
        cells = [_cell(one.values.get(name)) for name in names]
        if not planted and rng.random() < 0.05:
            cells = cells[: rng.randint(0, len(cells))] + [text(rng)] * rng.randint(0, 2)
        writer.writerow(cells)
    made = file.getvalue()
    return made if planted or rng.random() < 0.95 else made + '"never closed\n'


def _tsv(_: Rng, rows: list[Line], planted: bool) -> str:
    names = _columns(rows)
    made = ["\t".join(names)]
    for one in rows:
        cells = [_cell(one.values.get(name)) for name in names]
        if planted:
            cells = [cell.replace("\n", " ").replace("\t", " ") for cell in cells]
        made.append("\t".join(cells))
    return "\n".join(made) + "\n"


def _cell(given: Any) -> str:
    if given is None:
        return ""
    return given if isinstance(given, str) else json.dumps(given)


_TYPED: tuple[tuple[pa.DataType, Callable[[Rng], Any]], ...] = (
    (pa.string(), text), (pa.large_string(), text), (pa.binary(), lambda r: r.randbytes(5)),
    (pa.int8(), lambda r: r.randint(-128, 127)), (pa.uint64(), lambda _: 2**64 - 1),
    (pa.float64(), lambda r: r.choice([0.5, float("nan"), float("inf")])), (pa.bool_(), lambda _: True),
    (pa.decimal128(38, 5), lambda _: Decimal("1.5")), (pa.date32(), lambda _: date(2024, 2, 29)),
    (pa.timestamp("ns"), lambda r: r.choice([1, 1700000000000000001, 2**62, -(2**62)])),
    (pa.timestamp("us", tz="Asia/Kolkata"), lambda _: datetime(2024, 1, 1, tzinfo=UTC)),
    (pa.timestamp("s"), lambda r: r.choice([2**40, -(2**40), 2**62])), (pa.time64("ns"), lambda _: 1),
    (pa.timestamp("ms", tz="Nowhere/Land"), lambda _: 5), (pa.time32("s"), lambda _: time(1, 2)),
    (pa.duration("us"), lambda _: timedelta(1)), (pa.duration("s"), lambda r: r.choice([1, 2**62])),
    (pa.list_(pa.string()), lambda r: [text(r), None]), (pa.null(), lambda _: None),
    (pa.map_(pa.string(), pa.int64()), lambda r: [(text(r), 1)]), (pa.date64(), lambda _: 2**60),
    (pa.struct([("a", pa.list_(pa.binary()))]), lambda _: {"a": [b"\xff", None]}),
    (pa.struct([("a", pa.int8()), ("a", pa.int8())]), lambda _: None),
    (pa.dictionary(pa.int8(), pa.string()), text), (pa.binary(3), lambda _: b"abc"),
    (pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
     lambda r: [{"role": "user", "content": text(r)}, {"role": "assistant", "content": text(r)}]),
)  # fmt: skip


def write_parquet(rng: Rng, path: Path, rows: list[Line]) -> None:
    """Write a Parquet file with columns of odd types, in pages of odd sizes."""
    names = [*rng.choice(FORMATS), *rng.sample(BESIDE, rng.randint(0, 2))]
    columns: list[pa.Array] = []
    for _ in names:
        kind, make = rng.choice(_TYPED) if rng.random() < 0.4 else (pa.string(), text)
        values = [None if rng.random() < 0.1 else make(rng) for _ in rows]
        if rng.random() < 0.03:  # a text that is not UTF-8
            kind, values = pa.string(), []
            raw = pa.array([b"\xff\xfe"] * len(rows), pa.binary())
            columns.append(pa.Array.from_buffers(kind, len(raw), raw.buffers()))
            continue
        columns.append(pa.array(values, kind))
    table = pa.Table.from_arrays(columns, names=names)
    try:
        parquet.write_table(
            table, path, row_group_size=rng.choice([1, 3, 1000]), version=rng.choice(["1.0", "2.6"]),
            data_page_size=rng.choice([1, 64, 2**20]), data_page_version=rng.choice(["1.0", "2.0"]),
            compression=rng.choice(["none", "snappy", "gzip", "zstd"]), use_dictionary=rng.random() < 0.5,
        )  # fmt: skip
    except (pa.ArrowException, ValueError):  # not every type can be written
        parquet.write_table(pa.table({"text": [text(rng)]}), path)
    if rng.random() < 0.08:
        path.write_bytes(damaged(rng, path.read_bytes()))
