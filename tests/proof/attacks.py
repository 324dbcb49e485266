"""Hostile folders: each is a good one with one change."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Change = Callable[[Path], None]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


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
        return (
            "elsewhere" in self.name and "index to" not in self.name
        ) or "of a link" in self.name


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
        found[min(found.keys() - {"__metadata__"})] |= values
        return found, data

    return alter


class _Executes:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


PICKLE = pickle.dumps(_Executes())
CODE = "import pathlib\npathlib.Path('executed').touch()\nraise SystemExit(0)\n"
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def _pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def _folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


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
            first = min(found.keys() - {"__metadata__"})
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
        of("a pipe", _pipe(file)),
        of("a folder", _folder(file)),
    ]  # fmt: skip


def adapters() -> list[Attack]:
    """Return attacks on an adapter's folder."""

    def of(name: str, change: Change, harmless: str = "") -> Attack:
        return Attack(f"adapter: {name}", change, harmless)

    def config(name: str, value: Any, harmless: str = "") -> Attack:
        shown = json.dumps(value)
        return of(f"`{name}` {shown[:40]}", edited(CONFIG, name, value=value), harmless)

    unused = "d2lora reads PEFT's LoRA settings alone"
    return [
        of("a deep configuration", written(CONFIG, DEEP)), of("a list", written(CONFIG, "[]")),
        of("a pickle as configuration", written(CONFIG, PICKLE)),
        of("a configuration elsewhere", linked(CONFIG, "{secret}")),
        of("an endless number", written(CONFIG, '{"r": ' + "9" * 10**5 + "}")),
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
        value("base", "fingerprint", to=5), value("lora", "rank", to=10**9), value("lora", "targets", to=["(a+)+$"], harmless="those of PEFT's configuration count"),
        value("lora", "alpha", to="x"), value("data", to=[{}]), value("data", to=[{"file": "\x1b[31m| a\n", "rows": "x", "sha256": []}]),
        value("cost", to={}, harmless="a cost that is not known"), value("cost", to={"n_steps": "x"}), value("settings", to={"beta": "x"}, harmless="not used here"),
        value("chat_format", to="x"), value("labels", to=["a"] * 10**5, harmless="an open task has none"),
        value("lineage", to=[{}]), value("lineage", to=[{"path": "../x", "data": [], "fingerprint": ""}], harmless="a name that is shown"),
        value("validation_loss_before", to="NaN", harmless="a number that is shown"), value("warnings", to="x"), value("adapter_fingerprint", to="0", harmless="a name for its descendants"),
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
        of("a format", "{{ '{0.__class__.__mro__}'.format(messages) }}" + TURNS), of("a format map", "{{ '{a.__class__}'.format_map({'a': 1}) }}" + TURNS, "undefined in the sandbox"),
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
        return of(
            f"`{name}` {json.dumps(value)[:40]}", edited("config.json", name, value=value), harmless
        )

    def tokens(name: str, value: Any, harmless: str = "") -> Attack:
        return of(
            f"tokenizer, `{name}` {json.dumps(value)[:40]}",
            edited("tokenizer.json", name, value=value),
            harmless,
        )

    def replace(content: str, n: int, pattern: dict[str, str] | None = None) -> dict[str, Any]:
        one = {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}
        return {"type": "Sequence", "normalizers": [one] * n}

    def split(pattern: str) -> dict[str, Any]:
        return {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }

    code = both(
        written("modeling_evil.py", CODE),
        written("configuration_evil.py", CODE),
        written("tokenization_evil.py", CODE),
    )
    mapped = {
        "AutoConfig": "configuration_evil.C",
        "AutoModelForCausalLM": "modeling_evil.M",
        "AutoTokenizer": ["tokenization_evil.T", None],
    }
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
        tokens("pre_tokenizer", split("(.|..)+(?!.|$)")), tokens("pre_tokenizer", split("(")), tokens("pre_tokenizer", 5),
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
        of("an adapter_config.json", written(CONFIG, json.dumps({"base_model_name_or_path": "evil/x"}))),
    ]  # fmt: skip


def everything() -> dict[str, list[tuple[str, Attack]]]:
    """Return the attacks by their kind, each with the folder that it is made on."""
    return {
        "weights of adapters": [("adapter", a) for a in weights(WEIGHTS)],
        "adapters' configurations": [("adapter", a) for a in adapters()],
        "warm starts' manifests": [("warm start", a) for a in manifests()],
        "weights of bases": [("base", a) for a in weights("model.safetensors")],
        "bases' configurations and tokenizers": [("base", a) for a in bases()],
        "chat templates": [("base", a) for a in templates()],
    }
