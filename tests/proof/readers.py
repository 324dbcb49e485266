"""What the commands read odd files with, and what has to come of it."""

import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import grammar
import yaml
from grammar import Rng
from texts import TEMPLATES, YAML

from d2lora.cli import _parse
from d2lora.commands import COMMANDS
from d2lora.data.choices import read_choice_questions
from d2lora.data.encode import Encoder
from d2lora.data.encoded_sets import answers_beyond, encode_prompts
from d2lora.data.reading import read_task
from d2lora.errors import D2LoraError
from d2lora.evaluation.test_sets import TestSets
from d2lora.runtime.console import Reporter
from d2lora.settings import AdaptSettings, BaseSettings, EvaluateSettings, Settings
from d2lora.settings.file import read_settings_file
from d2lora.study.plan import StudyPlan
from d2lora.study.read_plan import read_plan
from d2lora.training.rows import prepare_rows

CHATML = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|eos|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Mismatch(AssertionError):  # noqa: N818
    """A known row was refused, or a bad one passed."""


Outcome = tuple[int, int]
"""Rows (or files) taken and refused."""


def named(error: Exception, path: Path) -> None:
    """Check that an error names the file that it is about."""
    if path.name not in str(error):
        raise Mismatch(f"the message does not name the file: {error!r:.300}") from None


class DataFiles:
    """Data files, read and encoded as `adapt`, `evaluate` and `generate` do."""

    name = "rows of data files"

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer, with and without a chat template."""
        self._folder, self._out = folder, folder / "out"
        chat = folder / "chat.jinja"
        chat.write_text(CHATML, encoding="utf-8")
        given = (BaseSettings(), BaseSettings(chat_template=chat))
        self._encoders = [Encoder.of_tokenizer(settings, None) for settings in given]
        self._test = grammar.lines(Rng(0), 20, planted=True)

    def case(self, rng: Rng) -> Outcome:
        """Write a file and read it."""
        planted = rng.random() < 0.3
        n = rng.choice([1, 2, 5, 10, 20, 40])
        rows = grammar.lines(rng, n, planted=planted)
        path = grammar.write(rng, self._folder, "data", rows, planted=planted)
        try:
            n_good = self._planted(path, rows) if planted else self._read(rng, path)
            return min(n_good, n), n - min(n_good, n)
        except D2LoraError as error:
            named(error, path)
            return 0, n
        finally:
            path.unlink()

    def _settings(self, path: Path, **values: Any) -> AdaptSettings:
        return AdaptSettings(
            data=(str(path),), out=self._out, skip_bad_rows=True, quiet=True, **values
        )

    def _read(self, rng: Rng, path: Path) -> int:
        encoder, quiet = rng.choice(self._encoders), Reporter(quiet=True)
        task = rng.choice(["auto"] * 6 + ["instruct", "text", "titles", "gsm8k", "preferences"])
        limits: dict[str, Any] = {
            "max_length": rng.choice([8, 64, 1024]), "overlong": rng.choice(["drop", "truncate"]),
        }  # fmt: skip
        match rng.randrange(8):
            case 0:
                return len(read_choice_questions([str(path)], skip_bad=True).questions)
            case 1:
                settings = EvaluateSettings(
                    adapters=("base",), out=self._out, data=(str(path),), task=task,
                    general_text=(str(path),) if rng.random() < 0.1 else (), skip_bad_rows=True,
                )  # fmt: skip
                data = TestSets.read(settings).task
                assert data is not None
                encode_prompts(encoder, data.examples, **limits)
                answers_beyond(encoder, data.examples, 4)
                return len(data.rows)
            case 2:
                data = read_task([str(path)], task, skip_bad=True, prompts_only=True)
                encode_prompts(encoder, data.examples, **limits)
                return len(data.rows)
            case _:
                objective = "dpo" if task == "preferences" or rng.random() < 0.1 else "sft"
                checked: dict[str, Any] = {}
                if rng.random() < 0.2:
                    other = self._folder / "test.jsonl"
                    lines = (json.dumps(one.values) for one in self._test if one.known)
                    other.write_text("\n".join(lines), encoding="utf-8")
                    checked = {"keep_out": (str(other),), "keep_out_words": rng.choice([0, 3])}
                settings = self._settings(path, objective=objective, task=task, **limits, **checked)
                rows = prepare_rows(settings, None, encoder, quiet)
                for item in [*rows.train, *rows.valid]:
                    assert item.length >= 1
                return len(rows.train) + len(rows.valid)

    def _planted(self, path: Path, rows: list[grammar.Line]) -> int:
        """Read rows whose worth is known, skipping bad ones and not."""
        table = path.name.split(".")[1] in ("csv", "tsv")
        good = [one for one in rows if _is_good(one, table=table)]
        if table and not any("completion" in one.values and "prompt" in one.values for one in rows):
            return 0
        settings = self._settings(path, task="instruct")
        encoder, quiet = self._encoders[0], Reporter(quiet=True)
        n_bad = len(rows) - len(good)
        if n_bad:
            try:
                prepare_rows(settings.changed(skip_bad_rows=False), None, encoder, quiet)
            except D2LoraError as error:
                said = f"{n_bad:,} bad row{'s' if n_bad > 1 else ''};"
                if said not in str(error):
                    raise Mismatch(f"expected `{said}` in {str(error)[:300]!r}") from None
            else:
                raise Mismatch(f"{n_bad} bad rows were not reported")
        if not good:
            return 0
        found = prepare_rows(settings, None, encoder, quiet)
        n = len(found.train) + len(found.valid)
        if (n, len(found.faults)) != (len(good), n_bad):
            raise Mismatch(f"{n} rows of {len(good)} good ones, {len(found.faults)} faults")
        return n


def _is_good(one: grammar.Line, *, table: bool) -> bool:
    """Say whether a planted row is good; in a table numbers and lists are texts."""
    if one.known or not table:
        return bool(one.known)
    cells = [one.values.get(name) for name in ("prompt", "completion")]
    return all(cell is not None and (not isinstance(cell, str) or cell.strip()) for cell in cells)


class SettingsFiles:
    """Settings files of every command, read as the command line does."""

    name = "settings files"

    def __init__(self, folder: Path) -> None:
        """Name the file."""
        self._path = folder / "settings.yaml"

    def case(self, rng: Rng) -> Outcome:
        """Write a settings file and read it."""
        name = rng.choice(list(COMMANDS))
        kind = COMMANDS[name].kind
        chosen = rng.sample(list(kind.model_fields), rng.randint(0, min(8, len(kind.model_fields))))
        needed = [one for one, info in kind.model_fields.items() if info.is_required()]
        oddness = rng.choice([0.0, 0.0, 0.1, 0.4])
        lines = {one: setting(rng, kind, one, oddness) for one in sorted({*chosen, *needed})}
        unknown = [f"zz_unknown_{i}" for i in range(rng.choice([0] * 8 + [1, 3, 15]))]
        lines |= dict.fromkeys(unknown, "1")
        given = "".join(f"{one}: {text}\n" for one, text in lines.items())
        if not write_text(rng, self._path, given):
            unknown = []
        try:
            values = read_settings_file(kind, self._path)
        except D2LoraError as error:
            named(error, self._path)
            told = "unknown setting" not in str(error) or (
                " more" in str(error) or all(n in str(error) for n in unknown)
            )
            if not told:
                raise Mismatch(f"not all of {unknown} in {str(error)[:300]!r}") from None
            return 0, 1
        if unknown:
            raise Mismatch("unknown settings passed")
        if rng.random() < 0.1 and kind.settings_file:
            with contextlib.redirect_stderr(io.StringIO()):
                try:
                    _parse(kind, name, [str(self._path)])
                except SystemExit as stop:
                    assert stop.code == 2  # noqa: PT017
                    return 0, 1
            return 1, 0
        try:
            resolved = kind(**values).to_yaml()
        except D2LoraError:  # settings that are missing, or contradict each other
            return 0, 1
        self._path.write_text(resolved, encoding="utf-8")
        if kind(**read_settings_file(kind, self._path)).to_yaml() != resolved:
            raise Mismatch("the resolved settings are not taken back as they are")
        return 1, 0


def setting(rng: Rng, kind: type[Settings], name: str, oddness: float) -> str:
    """Return a value of a setting as YAML, mostly one that it may have."""
    info = kind.model_fields[name]
    if rng.random() < oddness:
        return rng.choice(YAML) if rng.random() < 0.4 else dumped(grammar.value(rng))
    if rng.random() < oddness:
        return dumped(rng.choice([1, 0.5, 16, "a", ["a"], True, -1, 0, {}, ["q_proj=8"], 1e400]))
    return dumped(typed(rng, info.annotation))


def typed(rng: Rng, kind: Any) -> Any:
    """Return a value of an annotation, which its other limits may refuse."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return rng.choice(inner)
    if get_origin(kind) is tuple:
        return [typed(rng, inner[0]) for _ in range(rng.randint(1, 3))]
    if inner:  # a union, or an annotated kind
        return typed(rng, inner[0])
    known: dict[Any, Callable[[], Any]] = {
        bool: lambda: rng.random() < 0.5, int: lambda: rng.choice([1, 1, 2, 16, 0]),
        float: lambda: rng.choice([0.5, 0.25, 1, 0.001]),
        str: lambda: rng.choice(["a.jsonl", "b", "fresh"]),
        Path: lambda: "a/b",
    }  # fmt: skip
    return known.get(kind, lambda: "a")()


def dumped(given: Any) -> str:
    """Return a value as YAML in one line; JSON is nearly that."""
    try:
        return json.dumps(given, default=str)
    except (ValueError, RecursionError):
        return "0"


def write_text(rng: Rng, path: Path, text: str) -> bool:
    """Write a text, now and then damaged; return whether it is whole."""
    data = whole = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        data = grammar.damaged(rng, data)
    if rng.random() < 0.03:
        data = text.encode(rng.choice(["utf-16", "utf-8-sig"]), "replace")
    path.write_bytes(data)
    return data == whole


class Plans:
    """Plans of studies."""

    name = "plans"
    whole: ClassVar[dict[str, Any]] = {
        "base": "embedded", "question": "q?",
        "warm_up": {"data": ["g.jsonl"], "m": 40, "rank": 4, "max_steps": 4, "learning_rate": 0.01},
        "warm_ups": {"general": {}, "other": {"m": 20}}, "warm_up_seeds": 1,
        "tasks": {"t": {"data": ["t.jsonl"], "test": ["e.jsonl"], "n_test": 5, "task": "titles",
                        "adapt": {"batch_size": 4}}},
        "sizes": [4, 8], "seeds": 2, "adapt": {"rank": 4}, "epochs": {4: 2}, "folds": 2,
        "arms": ["fresh", "warm", {"kind": "init", "init": "pissa", "name": "p"}, "mixed",
                 "few_shot", {"kind": "fresh", "name": "dpo", "adapt": {"objective": "dpo"}}],
        "learning_rates": [0.003, 0.03], "general_text": ["g.jsonl"], "choices": ["c.jsonl"],
        "rates": {"t": {"fresh": {4: 0.1}}}, "pairs": {"temperature": 1.0},
        "shots": 2,
    }  # fmt: skip

    def __init__(self, folder: Path) -> None:
        """Name the file."""
        self._path = folder / "plan.yaml"

    def case(self, rng: Rng) -> Outcome:
        """Write a plan with changes and read it."""
        plan = copy.deepcopy(self.whole)
        for name in rng.sample(list(plan), rng.choice([0, 0, 1, 3, 8])):
            del plan[name]
        unknown = [f"zz_unknown_{i}" for i in range(rng.choice([0] * 8 + [1, 3]))]
        plan |= dict.fromkeys(unknown, 1)
        for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
            altered(rng, plan)
        written = yaml.safe_dump(plan, allow_unicode=True)
        if rng.random() < 0.15:
            written += f"{rng.choice([*StudyPlan.model_fields, 'x'])}: {rng.choice(YAML)}\n"
        good = written == yaml.safe_dump(self.whole, allow_unicode=True)
        if not write_text(rng, self._path, written):
            unknown, good = [], False
        changed = rng.choice(["seeds", "tasks.t.n_test", "a", "adapt.rank", "", ".", "self"])
        change = [f"{changed}={rng.choice(YAML)}"]
        changes = change if rng.random() < 0.1 else []
        try:
            read = read_plan(str(self._path), changes=changes)
        except D2LoraError as error:
            if not changes and "wrong settings" not in str(error):
                named(error, self._path)
            if good and not changes:
                raise Mismatch(f"a plan known to be good is refused: {error}") from None
            kept = [name for name in unknown if name in plan]
            if "unknown setting `zz" in str(error) and not all(n in str(error) for n in kept):
                raise Mismatch(f"not all of {kept} in {str(error)[:300]!r}") from None
            return 0, 1
        self._path.write_text(read.to_yaml(), encoding="utf-8")
        if read_plan(str(self._path)).to_yaml() != read.to_yaml():
            raise Mismatch("the resolved plan is not taken back as it is")
        return 1, 0


def altered(rng: Rng, values: Any) -> None:
    """Change something somewhere inside of a value."""
    inner = values
    while isinstance(inner, dict | list) and inner:
        key = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
        if not isinstance(inner[key], dict | list) or not inner[key] or rng.random() < 0.3:
            odd: list[Callable[[], Any]] = [
                lambda: grammar.value(rng), lambda: grammar.text(rng),
                lambda: rng.choice([None, 0, -1, 1e400, {}, [], "", 2**70, {1: 2}, b"x"]),
            ]  # fmt: skip
            if isinstance(inner, dict) and rng.random() < 0.2:
                inner[rng.choice([grammar.text(rng), 1, None, 1.5, "self", "kind"])] = 1
            else:
                inner[key] = rng.choice(odd)()
            return
        inner = inner[key]


def path(rng: Rng) -> str:
    """Return a path to a field, or what is none."""
    return rng.choice(["text", "label", "x", "a.b[0]", "x[*]", "..", "", grammar.text(rng)])


class Cards:
    """Task cards, and rows read with them."""

    name = "task cards"

    def __init__(self, folder: Path) -> None:
        """Name the files."""
        self._folder, self._path = folder, folder / "card.yaml"
        self._encoder = Encoder.of_tokenizer(BaseSettings(), None)

    def case(self, rng: Rng) -> Outcome:
        """Write a card and read rows with it."""
        options: dict[str, Callable[[], Any]] = {
            "prompt": lambda: rng.choice(TEMPLATES), "completion": lambda: rng.choice(TEMPLATES),
            "system": lambda: rng.choice(TEMPLATES),
            "columns": lambda: {rng.choice(["prompt", "completion", "x"]): path(rng)},
            "values": lambda: {path(rng): {grammar.text(rng): grammar.text(rng)}},
            "header": lambda: [path(rng) for _ in range(rng.randint(0, 3))],
            "references": lambda: path(rng),
            "labels": lambda: [grammar.text(rng) for _ in range(3)],
            "answers": lambda: rng.choice(["open", "closed", "pairs", "x"]),
            "metrics": lambda: [rng.choice(["rouge", "gsm8k", "f.py:g", grammar.text(rng)])],
            "turns": lambda: rng.choice(["last", "every", 5]),
            "thoughts": lambda: rng.choice(["<t> </t>", "x", grammar.text(rng)]),
            "detect": lambda: {path(rng): ""}, "zz_unknown": lambda: rng.choice([0, 0, 0, 1]),
        }  # fmt: skip
        chosen = rng.sample(list(options), rng.randint(0, 4))
        card = {name: made for name in chosen if (made := options[name]())}
        if rng.random() < 0.2:
            altered(rng, card)
        written = yaml.safe_dump(card, allow_unicode=True)
        if rng.random() < 0.1:
            written += f"{rng.choice(list(options))}: {rng.choice(YAML)}\n"
        write_text(rng, self._path, written)
        rows = grammar.lines(rng, 5, planted=False)
        data = grammar.write(rng, self._folder, "rows", rows, planted=False)
        settings = AdaptSettings(
            data=(str(data),), out=self._folder / "out", task=str(self._path), skip_bad_rows=True,
            quiet=True, overlong="truncate",
        )  # fmt: skip
        try:
            prepare_rows(settings, None, self._encoder, Reporter(quiet=True))
        except D2LoraError as error:
            if data.name not in str(error):
                named(error, self._path)
            return 0, 1
        finally:
            data.unlink()
        return 1, 0


KINDS = {"rows": DataFiles, "settings": SettingsFiles, "plans": Plans, "cards": Cards}
