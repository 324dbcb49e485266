"""Adapters, warm starts and bases of a hostile kind: refused, or harmless; nothing gets in.

    python tests/proof/hostile.py > hostile.md

Each is made of a good one by one change, and given to the commands that read such a folder. A
command has to end within a time, with exit code 2 and a message, or, where the change can do no
harm, as if it were not there. Meanwhile everything is watched that Python reports to its audit
hooks: no code may come from the folder, no process be started, no connection be made, nothing be
written beside the output, nothing be read that nobody named.
"""

import argparse
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "scripts")]

LIMIT_S = 40
"""Of a command; one that takes longer hangs."""
MEMORY = 6 * 2**30
"""Bytes that a command may need on top of what libraries have mapped."""
SECRET = "the-secret-of-another-folder"
Change = Callable[[Path], None]
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_FORBIDDEN = (
    "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.startfile", "pty.",
    "socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind", "urllib.Request",
    "ctypes.dlopen", "webbrowser.", "pickle.find_class", "os.remove", "os.rename", "os.symlink",
    "os.link", "os.chmod", "os.mkdir", "os.rmdir", "shutil.",
)  # fmt: skip
_MAY_WRITE = ("os.remove", "os.rename", "os.symlink", "os.link", "os.chmod", "os.mkdir", "os.rmdir",
              "shutil.")  # fmt: skip


@dataclass(frozen=True)
class Attack:
    """One change of a good folder."""

    name: str
    change: Change
    harmless: str = ""
    """Why it can do no harm, where it need not be refused."""

    @property
    def follows(self) -> bool:
        """Whether it is a link, which is read as what it stands for, as in a hub's cache."""
        return "elsewhere" in self.name and "index to" not in self.name or "of a link" in self.name


@dataclass
class Watch:
    """What Python reports to its audit hooks, as far as it should not be."""

    folder: Path
    """What is attacked: code from it is never run."""
    read: tuple[str, ...]
    """Where files may be read."""
    written: tuple[str, ...]
    """Where files may be written."""
    seen: list[str] = field(default_factory=list[str])

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        """Note what should not be."""
        if event == "open":
            self._opened(*given)
        elif event == "import" and given[1] and str(given[1]).startswith(str(self.folder)):
            self.seen.append(f"import of {given[1]}")
        elif event == "exec" and getattr(given[0], "co_filename", "").startswith(str(self.folder)):
            self.seen.append(f"code of {given[0].co_filename} run")
        elif event.startswith(_FORBIDDEN):
            paths = [os.path.abspath(os.fsdecode(p)) for p in given if isinstance(p, str | bytes)]
            inside = paths and all(path.startswith(self.written) for path in paths)
            if not (event.startswith(_MAY_WRITE) and (inside or not paths)):
                self.seen.append(f"{event} {str(given)[:120]}")

    def _opened(self, path: Any, mode: Any, flags: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor
        place = os.path.realpath(os.fsdecode(path))
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else mode
        if writes and (isinstance(flags, int) or set(str(mode)) & set("wax+")):
            if not place.startswith((*self.written, "/dev/")):
                self.seen.append(f"{place} written")
        elif not place.startswith((*self.read, *self.written)):
            self.seen.append(f"{place} read")


# The good ones


@dataclass(frozen=True)
class Good:
    """What is attacked, and what the commands need beside it."""

    base: Path
    adapter: Path
    warm: Path
    data: str


def make(folder: Path) -> Good:
    """Write a base, a warm start, an adapter without a manifest, and rows."""
    import conftest
    from d2lora.cli import main
    from d2lora.embedded import general_rows
    from support import write_rows

    base = Path(conftest.save_tiny_base(folder / "base", 0))
    data = write_rows(folder / "rows.jsonl", general_rows("train", 12))
    quick = ("--rank", "4", "--batch-size", "4", "--max-steps", "1", "--quiet")
    words = ("warmup", "--base", str(base), "--data", data, *quick, "--out", str(folder / "warm"))
    assert main(words) == 0
    adapter = folder / "adapter"
    adapter.mkdir()
    for name in (_CONFIG, _WEIGHTS):
        shutil.copy(folder / "warm" / name, adapter / name)
    return Good(base, adapter, folder / "warm", data)


# Changes


def edited(name: str, *path: str | int, value: Any) -> Change:
    """Set a value inside a JSON file."""

    def change(folder: Path) -> None:
        file = folder / name
        whole = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        inner = whole
        for step in path[:-1]:
            inner = inner[step] if isinstance(step, int) else inner.setdefault(step, {})
        inner[path[-1]] = value
        file.write_text(json.dumps(whole), encoding="utf-8")

    return change


def written(name: str, data: bytes | str) -> Change:
    """Write a file."""

    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return change


def linked(name: str, target: str) -> Change:
    """Put a symbolic link in the place of a file; `{secret}` is a file of another folder."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target.format(secret=folder.parent / "other" / "secret.json"))

    return change


def both(*changes: Change) -> Change:
    """Make several changes."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def header(name: str, alter: Callable[[dict[str, Any], bytes], tuple[Any, bytes]]) -> Change:
    """Alter the header and the bytes of a safetensors file."""

    def change(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (n,) = struct.unpack("<Q", raw[:8])
        values, data = alter(json.loads(raw[8 : 8 + n]), raw[8 + n :])
        text = values if isinstance(values, bytes) else json.dumps(values).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return change


def tensor(**values: Any) -> Callable[[dict[str, Any], bytes], tuple[Any, bytes]]:
    """Alter what a header says of its first tensor."""

    def alter(found: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        found[sorted(found.keys() - {"__metadata__"})[0]] |= values
        return found, data

    return alter


class _Executes:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


PICKLE = pickle.dumps(_Executes())
CODE = "import pathlib\npathlib.Path('executed').touch()\nraise SystemExit(0)\n"
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def _n_bytes(n: int) -> Change:
    return lambda folder: (folder / _WEIGHTS).write_bytes(struct.pack("<Q", n) + b"{}") and None


def weights(file: str) -> list[Attack]:
    """Return attacks on a safetensors file."""

    def of(name: str, change: Change, harmless: str = "") -> Attack:
        return Attack(f"safetensors: {name}", change, harmless)

    def size(n: int) -> Change:
        return written(file, struct.pack("<Q", n) + b"{}")

    def twice(found: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        names = sorted(found.keys() - {"__metadata__"})
        found[names[1]]["data_offsets"] = found[names[0]]["data_offsets"]
        return found, data

    def renamed(to: str) -> Callable[[dict[str, Any], bytes], tuple[Any, bytes]]:
        def alter(found: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
            first = sorted(found.keys() - {"__metadata__"})[0]
            return {to if name == first else name: one for name, one in found.items()}, data

        return alter

    return [
        of("a header of 2^63 bytes", size(2**63)), of("of 2^64 - 1", size(2**64 - 1)),
        of("of 2^40", size(2**40)), of("of 100 MB + 1", size(10**8 + 1)),
        of("empty", written(file, b"")), of("cut", lambda f: os.truncate(f / file, 100)),
        of("overlapping tensors", header(file, twice)),
        of("offsets beyond the end", header(file, tensor(data_offsets=[0, 2**40]))),
        of("offsets that go back", header(file, tensor(data_offsets=[64, 0]))),
        of("negative offsets", header(file, tensor(data_offsets=[-64, 64]))),
        of("offsets of 2^64", header(file, tensor(data_offsets=[2**64, 2**65]))),
        of("a shape that overflows", header(file, tensor(shape=[2**40, 2**40]))),
        of("a negative shape", header(file, tensor(shape=[-1, 4]))),
        of("a shape of another rank", header(file, tensor(shape=[1]))),
        of("an unknown type", header(file, tensor(dtype="PICKLE"))),
        of("another type", header(file, tensor(dtype="I64"))),
        of("a header that is a list", header(file, lambda _, d: ([], d))),
        of("a deep header", header(file, lambda _, d: (DEEP.encode(), d))),
        of("a header that is not UTF-8", header(file, lambda _, d: (b'{"\xff": 1}', d))),
        of("metadata that are no texts", header(file, lambda h, d: ({**h, "__metadata__": 5}, d))),
        of("a name that is a path", header(file, renamed("../../x"))),
        of("a name that is code", header(file, renamed("base_model.model.__class__.__init__"))),
        of("a name without end", header(file, renamed("base_model.model." + "a" * 10**6))),
        of("not finite", header(file, lambda h, d: (h, b"\xff" * len(d)))),
        of("a pickle", written(file, PICKLE)), of("a zip", written(file, b"PK\x03\x04" + PICKLE)),
        of("a link to a file elsewhere", linked(file, "{secret}")),
        of("a link to itself", linked(file, file)),
        of("a link to /dev/zero", linked(file, "/dev/zero")),
        of("a pipe", lambda f: ((f / file).unlink(), os.mkfifo(f / file)) and None),
        of("a folder", lambda f: ((f / file).unlink(), (f / file).mkdir()) and None),
    ]  # fmt: skip


def adapters() -> list[Attack]:
    """Return attacks on an adapter's folder."""

    def of(name: str, change: Change, harmless: str = "") -> Attack:
        return Attack(f"adapter: {name}", change, harmless)

    def config(name: str, value: Any, harmless: str = "") -> Attack:
        shown = json.dumps(value)
        return of(f"`{name}` {shown[:40]}", edited(_CONFIG, name, value=value), harmless)

    unused = "d2lora reads PEFT's LoRA settings alone"
    return [
        of("a deep configuration", written(_CONFIG, DEEP)), of("a list", written(_CONFIG, "[]")),
        of("a pickle as configuration", written(_CONFIG, PICKLE)),
        of("a configuration elsewhere", linked(_CONFIG, "{secret}")),
        of("an endless number", written(_CONFIG, '{"r": ' + "9" * 10**5 + "}")),
        config("r", 10**7), config("r", 10**12), config("r", -1), config("r", "4"), config("r", True),
        config("rank_pattern", {"q_proj": 10**7}), config("rank_pattern", {"(a+)+$": 4}, "no name is long enough"),
        config("rank_pattern", {"(([a-z_.0-9]+)+)+X": 4}), config("alpha_pattern", {"(([a-z_.0-9]+)+)+X": 4}),
        config("target_modules", "(([a-z_.0-9]+)+)+X"), config("target_modules", "("), config("target_modules", 5),
        config("target_modules", ["x" * 10**6]), config("exclude_modules", "(([a-z_.0-9]+)+)+X"),
        config("modules_to_save", ["lm_head"]), config("modules_to_save", ["__class__"]),
        config("layers_to_transform", [10**12]), config("layers_pattern", "(([a-z_.0-9]+)+)+X"),
        config("target_parameters", ["__init__.__globals__"], "no parameter is called so"), config("lora_alpha", 1e308, "a strength, if an odd one"), config("lora_alpha", "x"),
        config("auto_mapping", {"base_model_class": "os", "parent_library": "os"}, unused),
        config("init_lora_weights", "pissa"), config("init_lora_weights", "eva", "what is read replaces it"), config("loftq_config", {"loftq_bits": "x"}, unused),
        config("eva_config", {"rho": "x"}, unused), config("runtime_config", {"x": 1}, unused), config("peft_type", "ADALORA"),
        config("peft_type", ["LORA"]), config("task_type", "os.system"), config("base_model_name_or_path", "{other}", "only compared, see below"),
        config("base_model_name_or_path", ["x"]), config("base_model_name_or_path", "http://127.0.0.1:9/x", "a name is compared, never asked for"),
        config("revision", ["x"]), config("use_dora", "x"), config("bias", "all", "the base has no biases"), config("unknown", CODE), config("lora_bias", "x"),
        of("pickles beside", both(*(written(n, PICKLE) for n in ("adapter_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"))), "never read"),
        of("code beside", both(*(written(n, CODE) for n in ("torch.py", "__init__.py", "modeling.py", "sitecustomize.py"))), "never run"),
    ]  # fmt: skip


def manifests() -> list[Attack]:
    """Return attacks on what d2lora itself writes beside a warm start."""
    name = "warm_start.json"

    def of(what: str, change: Change, harmless: str = "") -> Attack:
        return Attack(f"warm start: {what}", change, harmless)

    def value(*path: str | int, to: Any, harmless: str = "") -> Attack:
        shown = f"`{'.'.join(map(str, path))}` {json.dumps(to)[:40]}"
        return of(shown, edited(name, *path, value=to), harmless)

    text = "a text that is shown, its control characters by their codes"
    return [
        of("a deep manifest", written(name, DEEP)), of("a list", written(name, "[]")),
        of("a pickle", written(name, PICKLE)), of("a manifest elsewhere", linked(name, "{secret}")),
        value("format_version", to=10**30), value("format_version", to=None), value("kind", to="x"),
        value("base", to=[]), value("base", "id", to="\x1b]0;x\x07\n# x", harmless=text), value("base", "fingerprint", to="0" * 64),
        value("base", "fingerprint", to=5), value("lora", "rank", to=10**9), value("lora", "targets", to=["(a+)+$"]),
        value("lora", "alpha", to="x"), value("data", to=[{}]), value("data", to=[{"file": "\x1b[31m| a\n", "rows": "x", "sha256": []}]),
        value("cost", to={}), value("cost", to={"n_steps": "x"}), value("settings", to={"beta": "x"}, harmless="not used here"),
        value("chat_format", to="x"), value("labels", to=["a"] * 10**5, harmless="an open task has none"),
        value("lineage", to=[{}]), value("lineage", to=[{"path": "../x", "data": [], "fingerprint": ""}], harmless="a name that is shown"),
        value("validation_loss_before", to="NaN"), value("warnings", to="x"), value("adapter_fingerprint", to="0"),
        value("chat_template", to="{{ 9**9**9 }}", harmless="it was trained in the plain format"),
        of("a template that loops", both(edited(name, "chat_template", value="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + TURNS), edited(name, "chat_format", value="template"))),
        of("rows that are none", written("trained_rows.json", "[]")), of("deep rows", written("trained_rows.json", DEEP)),
        of("rows of another kind", written("trained_rows.json", '{"format_version": 1, "questions": 5}')),
    ]  # fmt: skip


def templates() -> list[Attack]:
    """Return attacks by a chat template."""

    def of(name: str, text: str, harmless: str = "") -> Attack:
        return Attack(f"template: {name}", written("chat_template.jinja", text), harmless)

    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9999) %}"
    ends = "{% endfor %}" * 3
    dunder = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    return [
        of("loops", loop + ends + TURNS), of("a range of 10^18", "{% for a in range(10**18) %}{% endfor %}"),
        of("a long range", "{% for a in range(999999999) %}{% endfor %}" + TURNS),
        of("a power", "{{ 9**9**9**9 }}" + TURNS), of("a long text", "{{ 'a' * 99999999999999 }}" + TURNS),
        of("a text of 2 GB", "{{ 'a' * 2000000000 }}" + TURNS), of("a wide format", "{{ '%999999999999d' % 1 }}" + TURNS),
        of("a wide centre", "{{ 'a'|center(99999999999999) }}" + TURNS), of("an endless macro", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
        of("a text doubled", "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}" + TURNS),
        of("classes", dunder + TURNS), of("globals", "{{ cycler.__init__.__globals__.os.system('touch executed') }}" + TURNS),
        of("a format", "{{ '{0.__class__.__mro__}'.format(messages) }}" + TURNS), of("a format map", "{{ '{a.__class__}'.format_map({'a': 1}) }}" + TURNS),
        of("an attribute by name", "{{ ''|attr('__class__')|attr('__mro__') }}" + TURNS, "undefined in the sandbox"),
        of("an include", "{% include '/etc/passwd' %}" + TURNS), of("an import", "{% import 'os' as os %}" + TURNS),
        of("a namespace", "{{ namespace(__init__=1) }}" + TURNS), of("changed turns", "{{ messages.clear() }}" + TURNS),
        of("a clock", "{{ strftime_now('%Y' * 9999999) }}" + TURNS), of("not a template", "{% for"), of("bytes", "\udcff".encode("utf-8", "surrogatepass").decode("latin-1")),
        of("deep", "{% if true %}" * 3000 + "{% endif %}" * 3000), of("deep brackets", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"),
        Attack("template: a link to a file elsewhere", linked("chat_template.jinja", "{secret}")),
        Attack("template: not UTF-8", written("chat_template.jinja", b"\xff\xfe" + TURNS.encode())),
    ]  # fmt: skip


def bases() -> list[Attack]:
    """Return attacks on a base's folder."""

    def of(name: str, change: Change, harmless: str = "") -> Attack:
        return Attack(f"base: {name}", change, harmless)

    def config(name: str, value: Any, harmless: str = "") -> Attack:
        return of(f"`{name}` {json.dumps(value)[:40]}", edited("config.json", name, value=value), harmless)

    def tokens(name: str, value: Any, harmless: str = "") -> Attack:
        return of(f"tokenizer, `{name}` {json.dumps(value)[:40]}", edited("tokenizer.json", name, value=value), harmless)

    def replace(content: str, n: int, pattern: dict[str, str] | None = None) -> dict[str, Any]:
        one = {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}
        return {"type": "Sequence", "normalizers": [one] * n}

    def split(pattern: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    code = both(written("modeling_evil.py", CODE), written("configuration_evil.py", CODE), written("tokenization_evil.py", CODE))
    mapped = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M", "AutoTokenizer": ["tokenization_evil.T", None]}
    trap = "transformers has the model itself, and runs its own code"
    index = "model.safetensors.index.json"

    def indexed(value: Any) -> Change:
        gone = lambda folder: (folder / "model.safetensors").unlink()  # noqa: E731
        return both(gone, written(index, json.dumps(value)))

    ignored = "a setting that transformers does not have"
    return [
        of("auto_map", both(code, edited("config.json", "auto_map", value=mapped)), trap),
        of("auto_map of an unknown model", both(code, edited("config.json", "auto_map", value=mapped), edited("config.json", "model_type", value="evil"))),
        of("auto_map of the tokenizer", both(code, edited("tokenizer_config.json", "auto_map", value=mapped), edited("tokenizer_config.json", "tokenizer_class", value="EvilTokenizer")), trap),
        of("auto_map and trust_remote_code", both(code, edited("config.json", "auto_map", value=mapped), edited("config.json", "trust_remote_code", value=True), edited("config.json", "model_type", value="evil"))),
        of("auto_map of another repository", both(edited("config.json", "auto_map", value={"AutoConfig": "evil/x--configuration.C"}), edited("config.json", "model_type", value="evil"))),
        of("custom_generate", both(written("custom_generate/generate.py", CODE), written("custom_generate/requirements.txt", "evil")), "never run"),
        of("code beside", both(*(written(n, CODE) for n in ("torch.py", "transformers.py", "__init__.py", "conftest.py"))), "never run"),
        of("pickles beside", both(*(written(n, PICKLE) for n in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl"))), "never read"),
        of("a pickle alone", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin") and None),
        of("a deep configuration", written("config.json", DEEP)), of("a list", written("config.json", "[]")), of("not JSON", written("config.json", PICKLE)),
        config("num_hidden_layers", 10**9), config("num_hidden_layers", -1), config("num_hidden_layers", "2"), config("num_hidden_layers", 3), config("hidden_size", 10**9),
        config("hidden_size", 0), config("hidden_size", "x"), config("vocab_size", 10**10), config("vocab_size", 5), config("num_attention_heads", 0), config("hidden_act", "__import__('os')"),
        config("hidden_act", ["x"]), config("rope_parameters", {"rope_type": "x"}), config("rope_scaling", {"type": "dynamic", "factor": "x"}), config("model_type", "os"), config("model_type", ["llama"]),
        config("model_type", "../x"), config("architectures", ["os.system"], "the class follows from the type"), config("architectures", 5, "the class follows from the type"), config("dtype", "os.system"), config("torch_dtype", {"a": 1}, "d2lora sets it"),
        config("_attn_implementation", "evil/kernel", ignored), config("attn_implementation", "evil/kernel", "code of a hub is asked for by an argument alone"), config("transformers_weights", "../other/secret.json"),
        config("transformers_weights", "/etc/passwd"), config("quantization_config", {"quant_method": "gptq"}), config("quantization_config", {"quant_method": "evil"}, "transformers leaves it out"), config("quantization_config", 5),
        config("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}), config("quantization_config", {"quant_method": "torchao", "quant_type": "os.system"}),
        config("rms_norm_eps", "x"), config("max_position_embeddings", 10**15, "a limit on lengths alone"), config("max_position_embeddings", "x"), config("pad_token_id", 10**12), config("eos_token_id", [10**12], "the tokenizer's counts"),
        config("tie_word_embeddings", "x", "as true"), config("_name_or_path", "/etc", "d2lora names the folder that it was given"), config("id2label", {str(i): "x" for i in range(10**5)}, "of classifiers alone"),
        of("generation, `custom_generate`", edited("generation_config.json", "custom_generate", value="evil/x"), "d2lora decodes by its own settings"),
        of("generation, endless", edited("generation_config.json", "max_new_tokens", value=10**12), "d2lora decodes by its own settings"),
        of("generation, deep", written("generation_config.json", DEEP)), of("generation, odd", edited("generation_config.json", "temperature", value={"a": 1}), "d2lora decodes by its own settings"),
        of("an index to a file elsewhere", indexed({"weight_map": {"x": "../other/secret.json"}})), of("to an absolute path", indexed({"weight_map": {"x": "/etc/passwd"}})),
        of("an index of numbers", indexed({"weight_map": {"x": 5}})), of("a deep index", both(indexed({}), written(index, DEEP))), of("an index that is a list", indexed([])),
        of("an index of a folder", indexed({"weight_map": {"x": "."}})), of("an index of a link", both(indexed({"weight_map": {"x": "l.safetensors"}}), linked("l.safetensors", "{secret}"))),
        tokens("normalizer", replace("a" * 10, 12)), tokens("normalizer", replace("ab", 60)), tokens("normalizer", replace("x" * 5000, 2, {"Regex": ""})),
        tokens("normalizer", replace("b", 1, {"Regex": "(a|aa)+$"}), "no text here is long enough"), tokens("normalizer", {"type": "Prepend", "prepend": "a" * 10**6}),
        tokens("normalizer", {"type": "evil"}), tokens("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        tokens("pre_tokenizer", split("(.|..|...)+#$")), tokens("pre_tokenizer", split("(")), tokens("pre_tokenizer", 5),
        tokens("padding", {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}, "switched off before a text is encoded"),
        tokens("truncation", {"max_length": 1, "stride": 10**9, "strategy": "LongestFirst", "direction": "Right"}), tokens("model", {"type": "BPE", "vocab": {}, "merges": []}, "texts without tokens"),
        tokens("model", {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}), tokens("model", {"type": "Unigram", "vocab": [], "unk_id": 5}), tokens("added_tokens", [{"id": 10**12}]),
        tokens("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [], "special_tokens": {}}),
        tokens("version", "99"), of("a deep tokenizer", written("tokenizer.json", DEEP)), of("a tokenizer that is a pickle", written("tokenizer.json", PICKLE)),
        of("a tokenizer elsewhere", linked("tokenizer.json", "{secret}")), of("tokenizer_file elsewhere", edited("tokenizer_config.json", "tokenizer_file", value="{other}"), "the folder's own is taken"),
        of("vocab_file elsewhere", edited("tokenizer_config.json", "vocab_file", value="/etc/passwd"), "the folder's own is taken"), of("fast_tokenizer_files", edited("tokenizer_config.json", "fast_tokenizer_files", value=["../other/tokenizer.1.json"])),
        of("tokenizer_class", edited("tokenizer_config.json", "tokenizer_class", value="os.system"), "an unknown class is read as the library's own"), of("tokenizer_class that is a list", edited("tokenizer_config.json", "tokenizer_class", value=[1])),
        of("eos_token", edited("tokenizer_config.json", "eos_token", value={"content": 5})), of("eos_token beyond", edited("tokenizer_config.json", "eos_token", value="never seen")), of("model_max_length", edited("tokenizer_config.json", "model_max_length", value="x"), "the base's own limit is taken"),
        of("extra_special_tokens", edited("tokenizer_config.json", "extra_special_tokens", value={"__class__": "x"}), "a name of a token"), of("added_tokens_decoder", edited("tokenizer_config.json", "added_tokens_decoder", value={"x": 5})),
        of("a deep tokenizer_config", written("tokenizer_config.json", DEEP)), of("chat_template that is a number", edited("tokenizer_config.json", "chat_template", value=5)),
        of("an adapter_config.json", written(_CONFIG, json.dumps({"base_model_name_or_path": "evil/x"}))),
    ]  # fmt: skip


# Trying


def commands(kind: str, folder: Path, good: Good, out: Path) -> dict[str, Sequence[str]]:
    """Return the command lines that read a folder of a kind."""
    base, data = str(good.base), good.data
    few = ("--max-new-tokens", "2", "--limit", "2", "--out", str(out))
    step = ("--rank", "4", "--batch-size", "4", "--max-steps", "1", "--n", "4", "--quiet", "--out", str(out))
    scored = ("--data", data, *few)
    if kind == "base":
        own = ("--base", str(folder))
        return {
            "evaluate": ("evaluate", *own, "--adapters", "base", *scored),
            "adapt": ("adapt", *own, "--data", data, *step),
        }
    trained = [word for word in step if word not in ("--rank",)]
    trained.remove("4")
    return {
        "inspect": ("inspect", "--adapter", str(folder)),
        "convert": ("convert", "--adapter", str(folder), "--rank", "8", "--out", str(out)),
        "evaluate": ("evaluate", "--base", base, "--adapters", str(folder), *scored),
        "adapt": ("adapt", "--base", base, "--init", str(folder), "--data", data, *trained),
    }


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; minus a signal's number; 999: it hung."""
    said: str
    seen: list[str]
    """What the watch saw."""
    elapsed_s: float


def run(words: Sequence[str], place: Path, watch: Watch) -> Ended:
    """Run a command in a process of its own, watched, `y` being typed to any question."""
    said, seen, began = place / "said", place / "seen.json", time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(words, place, watch, said, seen)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() - began > LIMIT_S:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            code = 999
            break
        time.sleep(0.01)
    found = json.loads(seen.read_text("utf-8")) if seen.is_file() else []
    return Ended(code, said.read_text("utf-8", "replace"), found, time.monotonic() - began)


def _child(words: Sequence[str], place: Path, watch: Watch, said: Path, seen: Path) -> None:
    code = 1
    try:
        os.chdir(place / "run")
        typed, answers = os.pipe()
        os.write(answers, b"y\n" * 9)
        os.close(answers)
        os.dup2(typed, 0)
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        mapped = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        most = mapped * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        from d2lora.cli import main

        sys.addaudithook(watch)
        try:
            code = main(words)
        except SystemExit as stop:
            code = 3 if stop.code in (0, None) else int(stop.code)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        if sys.exc_info()[0] is not None:
            sys.excepthook(*sys.exc_info())
        watch.seen, found = [], watch.seen
        seen.write_text(json.dumps(found), encoding="utf-8")
        os._exit(code)


@dataclass
class Record:
    """What came of the attacks of one kind."""

    tried: int = 0
    refused: int = 0
    harmless: int = 0
    lost: list[str] = field(default_factory=list[str])


def fault_of(attack: Attack, ended: Ended, place: Path) -> str | None:
    """Say what is wrong with how a command ended; None: nothing."""
    if (place / "run" / "executed").exists():
        return "code of the folder was run"
    if ended.seen:
        return f"seen: {'; '.join(ended.seen[:3])[:300]}"
    if ended.code == 999:
        return f"no end after {LIMIT_S} s"
    if ended.code not in (0, 2) or "Traceback" in ended.said:
        return f"exit code {ended.code}: {ended.said.strip()[-400:]}"
    if ended.code == 2 and not ended.said.strip():
        return "refused without a word"
    if ended.code == 0 and not attack.harmless:
        return "taken"
    if SECRET in ended.said:
        return "a file elsewhere is shown"
    return None


def tried(attack: Attack, kind: str, good: Good, place: Path, record: Record, only: str) -> None:
    """Make an attack on a copy of a good folder with every command that reads it."""
    source = {"base": good.base, "adapter": good.adapter, "warm start": good.warm}[kind]
    for name in commands(kind, source, good, place / "run" / "out"):
        if only and name != only:
            continue
        shutil.rmtree(place, ignore_errors=True)
        (place / "other").mkdir(parents=True)
        (place / "run").mkdir()
        (place / "other" / "secret.json").write_text(json.dumps({"a": SECRET}), encoding="utf-8")
        folder = Path(shutil.copytree(source, place / "folder"))
        attack.change(folder)
        for file in folder.glob("*.json"):
            if file.is_file() and not file.is_symlink() and b"{other}" in (raw := file.read_bytes()):
                file.write_bytes(raw.replace(b"{other}", str(place / "other" / "secret.json").encode()))
        words = commands(kind, folder, good, place / "run" / "out")[name]
        linked_to = (str(place / "other"),) if attack.follows else ()
        own = (str(folder), str(good.base), good.data, *linked_to, *_libraries())
        written = (str(place / "run"), os.environ["D2LORA_CACHE"], os.environ["TMPDIR"])
        ended = run(words, place, Watch(folder, own, written))
        sys.stderr.write(f"{attack.name}, {name}: {ended.code} {ended.elapsed_s:.1f} s: {ended.said.strip()[-150:]!r}\n")
        record.tried += 1
        if wrong := fault_of(attack, ended, place):
            record.lost.append(f"{attack.name}, {name}: {wrong}")
        elif ended.code == 2:
            record.refused += 1
        else:
            record.harmless += 1


def _libraries() -> tuple[str, ...]:
    source = str(HERE.parent.parent)
    roots = {sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), *map(os.path.realpath, sys.path)}
    return (*roots, source, "/usr", "/lib", "/proc", "/sys", "/dev", "/etc/mime.types", "/etc/localtime")


def everything() -> dict[str, list[tuple[str, Attack]]]:
    """Return the attacks by their kind, each with the folder that it is made on."""
    return {
        "weights of adapters": [("adapter", a) for a in weights(_WEIGHTS)],
        "adapters' configurations": [("adapter", a) for a in adapters()],
        "warm starts' manifests": [("warm start", a) for a in manifests()],
        "weights of bases": [("base", a) for a in weights("model.safetensors")],
        "bases' configurations and tokenizers": [("base", a) for a in bases()],
        "chat templates": [("base", a) for a in templates()],
    }


def main() -> None:
    """Print the table, then what got in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="attacks whose name holds this")
    parser.add_argument("--command", default="", help="this command alone")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        top = Path(os.path.realpath(name))
        for variable, folder in (("D2LORA_CACHE", "cache"), ("TMPDIR", "tmp"), ("HF_HOME", "hub")):
            (top / folder).mkdir()
            os.environ[variable] = str(top / folder)
        os.environ["HF_HUB_OFFLINE"] = "0"
        tempfile.tempdir = str(top / "tmp")
        import crashes

        crashes.preload()
        (top / "good").mkdir()
        good = make(top / "good")
        print("| what | commands run | refused | harmless | lost |\n|---|---|---|---|---|", flush=True)
        lost: list[str] = []
        for kind, attacks in everything().items():
            chosen = [(of, attack) for of, attack in attacks if given.only in attack.name]
            record = Record()
            for of, attack in chosen:
                tried(attack, of, good, top / "try", record, given.command)
            if chosen:
                numbers = (record.tried, record.refused, record.harmless, len(record.lost))
                print(f"| {kind} | {' | '.join(map(str, numbers))} |", flush=True)
            lost += record.lost
    for one in lost:
        print(f"\n- {one}")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
