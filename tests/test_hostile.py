"""Files of others get nothing in: no code, no endless work, no command to a terminal."""

import csv
import gzip
import io
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import AutoTokenizer

from d2lora.adapters.base import load_base, load_tokenizer
from d2lora.adapters.files import AdapterFiles
from d2lora.cli import main
from d2lora.data import opening
from d2lora.data.encode import Encoder
from d2lora.data.opening import LONGEST_LINE
from d2lora.data.reading import read_task
from d2lora.data.rows import TOO_DEEP, Example, user
from d2lora.data.sources import read_source
from d2lora.errors import DataError, ModelError, SettingsError, printable
from d2lora.report.files import csv_text
from d2lora.runtime.console import plain_console
from d2lora.runtime.grids import Grid, as_table, code, inline
from d2lora.runtime.limits import OverTimeError, within
from d2lora.settings import AdaptSettings, BaseSettings
from d2lora.settings.file import read_settings_file
from d2lora.settings.yaml_text import parse_yaml
from d2lora.study.read_plan import read_plan
from support import write_rows

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.fixture
def base_copy(tiny_base: str, tmp_path: Path) -> Path:
    """A base of which every file may be changed."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in Path(tiny_base).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# Settings, plans and rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases .* stand for too many values"),
        ("a: &a [*a]", "stands within what it repeats"),
        ("a: 0x" + "f" * 6000, "a whole number in line 1 is too large"),
        ('a: "\\0"', "a text in line 1 holds"),
        ('a: "\\ud800"', "a text in line 1 holds"),
        ("a: !!bool x", "not what its tag says"),
        ("a: !!timestamp x", "not what its tag says"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_yaml_that_could_not_be_used_is_refused_in_words(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        read_settings_file(AdaptSettings, path)
    with pytest.raises(SettingsError, match=message):
        read_plan(str(path))


def test_aliases_of_an_ordinary_number_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a")["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    "text", ["1: 2", "null: 1", "self: 1", "tasks: {t: {1.5: 1}}", "arms: [{self: 1}]"]
)
def test_names_of_settings_that_are_no_texts_are_faults_of_a_plan(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(SettingsError, match=r"must be a text|unknown setting `(\w+\.)*self`"):
        read_plan(str(tmp_path / "plan.yaml"))


def test_a_settings_file_tells_all_its_faults_at_once(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("device: tpu\nrank: -1\nlerning_rate: 1\nrank_pattern: [q_proj]\n")
    with pytest.raises(SettingsError) as error:
        read_settings_file(AdaptSettings, path)
    for name in ("device", "rank", "lerning_rate", "rank_pattern"):
        assert f"`{name}`" in str(error.value)


def test_json_inside_of_a_row_is_as_strict_as_around_it(tmp_path: Path) -> None:
    good: dict[str, Any] = {"prompt": "p", "completion": "c"}
    deep = json.loads("[" * 80 + "]" * 80)
    rows = [
        {**good, "x": deep}, {**good, "tools": json.dumps(deep)},
        {**good, "tools": '[{"a": "\\ud800"}]'}, good,
    ]  # fmt: skip
    read = read_task([write_rows(tmp_path / "rows.jsonl", rows)], "instruct", skip_bad=True)
    reasons = [fault.reason for fault in read.faults]
    assert reasons[0] == TOO_DEEP
    assert all("not JSON" in reason for reason in reasons[1:])
    assert len(read.examples) == 1


def test_parquet_with_a_time_zone_that_there_is_not_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    nowhere = pa.array([5], pa.timestamp("ms", tz="Nowhere/Land"))
    parquet.write_table(pa.table({"text": nowhere}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a time zone in it is not known"):
        read_source(str(tmp_path / "a.parquet"))


# Bases and adapters


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_base_is_not_run_whatever_is_typed(
    base_copy: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = base_copy / "executed"
    (base_copy / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    mapped = {
        "AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None],
    }  # fmt: skip
    edit(base_copy / "config.json", model_type="evil")
    edit(base_copy / name, auto_map=mapped, tokenizer_class="EvilTokenizer")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ModelError):
        load_base(BaseSettings(base=str(base_copy), device="cpu"))
    assert not marker.exists()


def test_weights_that_a_base_lacks_are_not_made_up(base_copy: Path) -> None:
    edit(base_copy / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"9 weights .* would be random: model\.layers\.2"):
        load_base(BaseSettings(base=str(base_copy), device="cpu"))


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "/etc/passwd"])
def test_an_index_names_files_of_its_folder_alone(base_copy: Path, shard: str) -> None:
    (base_copy / "model.safetensors").unlink()
    index = {"weight_map": {"x": shard}}
    (base_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names a file outside of the folder"):
        load_base(BaseSettings(base=str(base_copy), device="cpu"))


def test_a_tokenizer_that_multiplies_texts_is_refused(base_copy: Path) -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    whole = {"type": "Sequence", "normalizers": [step] * 9}
    edit(base_copy / "tokenizer.json", normalizer=whole)
    with pytest.raises(ModelError, match=r"normalizer .* 1e\+09 characters of one"):
        load_tokenizer(BaseSettings(base=str(base_copy)))
    edit(base_copy / "tokenizer.json", normalizer={"type": "evil"})
    with pytest.raises(ModelError, match="not a causal language model"):
        load_tokenizer(BaseSettings(base=str(base_copy)))


def test_a_row_that_a_tokenizer_gives_up_on_is_named(base_copy: Path) -> None:
    endless = {
        "type": "Split", "pattern": {"Regex": "(.|..)+(?!.|$)"}, "behavior": "Isolated",
        "invert": False,
    }  # fmt: skip
    edit(base_copy / "tokenizer.json", pre_tokenizer=endless)
    encoder = Encoder(AutoTokenizer.from_pretrained(base_copy), "plain")
    with pytest.raises(DataError, match="rows, row 3: the base's tokenizer gives up on it"):
        encoder.encode(Example(user("a" * 60), "b", place="rows, row 3"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 9**9**9 }}", "computes a power in line 1"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "3 s"),
        ("{{ 'a' * 2000000 }}", "writes 2,000,0.. characters"),
        ("{{ 'a' * 99999999999999 }}", "more memory"),
    ],
)
def test_a_chat_template_without_end_is_refused(
    tiny_base: str, tmp_path: Path, template: str, message: str
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(template + "{% for m in messages %}{{ m.content }}{% endfor %}")
    base = BaseSettings(base=tiny_base, chat_template=file)
    with pytest.raises((ModelError, SettingsError), match=message):
        Encoder.of_tokenizer(base, None).encode(Example(user("a"), "b"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 10**7}, "a rank of 10,000,000, and no weight is larger"),
        ({"target_modules": "(([a-z_.0-9]+)+)+X"}, "takes more than 3 s"),
        ({"alpha_pattern": {"(([a-z_.0-9]+)+)+X": 4}}, "takes more than 3 s"),
        ({"lora_alpha": 1e308}, "`lora_alpha` must be at most"),
        ({"revision": ["x"]}, "`revision` must be a text"),
    ],
)
def test_an_adapter_s_configuration_cannot_exhaust_the_machine(
    warm_start: Any, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((warm_start.path / name).read_bytes())
    edit(tmp_path / "adapter_config.json", **values)
    with pytest.raises(ModelError, match=message):
        AdapterFiles.read(tmp_path)


def test_time_is_limited_inside_of_the_block_alone() -> None:
    def work(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    with pytest.raises(OverTimeError), within(0.05):
        work(60)
    with within(0.05):
        pass
    work(0.1)


# What is shown


def test_names_do_not_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b]0;title\x07\x9b31m\u202e[/red] :smile:"
    out = io.StringIO()
    console = plain_console(file=out, force_terminal=True, width=200)
    console.print(hostile)
    console.print(as_table(Grid(hostile, (hostile,), [(hostile,)])))
    assert main(["adapt", "--data", str(tmp_path / f"{hostile}.jsonl"), "--out", "x"]) == 2
    for text in (out.getvalue(), capsys.readouterr().err):
        assert "\x1b]" not in text
        assert not set(text) & set("\x07\x9b\u202e")
        assert "\\x1b]0;title" in text
        assert "[/red]" in text
        assert ":smile:" in text
    assert printable("a\tb\n\u00e9\u200d") == "a\tb\n\u00e9\u200d"


def test_no_cell_of_a_table_is_a_formula() -> None:
    table = pd.DataFrame([{"arm": "=1+1", "@x": -1.5}, {"arm": "fresh", "@x": 2.0}])
    rows = list(csv.reader(io.StringIO(csv_text(table))))
    assert rows == [["arm", "'@x"], ["'=1+1", "-1.5"], ["fresh", "2.0"]]


def test_names_are_no_markdown() -> None:
    assert inline("a | <b>\n# `c` exact_match") == "a \\| &lt;b> # \\`c\\` exact_match"
    assert code("a`|\n\x1bb") == "`a'¦ \\x1bb`"


def test_a_json_file_that_there_is_no_memory_for_is_refused() -> None:
    class Endless(io.StringIO):
        def read(self, *_: object) -> str:
            raise MemoryError

    with pytest.raises(DataError, match=r"rows\.json: more than there is memory for, and a JSON"):
        opening.whole_text(Endless(), Path("rows.json"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv", "rows.json"])
def test_a_line_without_end_is_read_no_further_than_any_row_goes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "MOST_AT_ONCE", LONGEST_LINE)
    path = tmp_path / f"{name}.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"prompt": "' if "json" in name else b"prompt,completion\n")
        for _ in range(LONGEST_LINE // 2**20 + 4):
            file.write(b"a" * 2**20)
    tracemalloc.start()
    with pytest.raises(DataError, match="characters"):
        read_task([str(path)])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 * LONGEST_LINE
