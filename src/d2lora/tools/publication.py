"""What is sent to the hub: the files that belong, free of paths of this machine.

adapter or warm start   weights, PEFT's configuration, manifest, digests of its training rows, a
                        tokenizer with new tokens
merged model            weights, configuration, tokenizer, manifest of what was merged, digests
both                    the card, made anew, and GGUF files that lie beside
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Self

import yaml
from huggingface_hub import EvalResult

from d2lora.adapters.card import CARD_FILE, MERGED, Form, Published, card
from d2lora.adapters.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFiles
from d2lora.adapters.fingerprints import fingerprint_of
from d2lora.adapters.manifest import MANIFESTS, Manifest, has_manifest
from d2lora.adapters.tokens import TOKENIZER_CONFIG, TOKENIZER_FILES
from d2lora.data.trained_rows import FILE as TRAINED_ROWS
from d2lora.errors import ModelError, RunError, SettingsError
from d2lora.runtime.run_folder import DONE, SETTINGS, read_json

_OF_ADAPTERS = (ADAPTER_WEIGHTS, TRAINED_ROWS, "*.gguf")
_OF_MODELS = (
    "model*.safetensors", "model.safetensors.index.json", "generation_config.json", TRAINED_ROWS,
    "*.gguf", *TOKENIZER_FILES,
)  # fmt: skip
_NAMES_OF_BASES = {ADAPTER_CONFIG: "base_model_name_or_path", "config.json": "_name_or_path"}
"""Configurations that name a base, or where the model was, and under which key."""
_NOT_FILES = ("chat_template", "labels", "lora")
"""Parts of a manifest that may look like paths."""
Content = Path | bytes


@dataclass(frozen=True)
class Finished:
    """A finished adapter or merged model, as it lies in its folder."""

    folder: Path
    form: Form
    manifest: Manifest

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read what is to be published.

        Raises:
            RunError: If the folder holds an unfinished run.
            ModelError: If it holds neither an adapter nor a merged model, or a damaged one.
        """
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such folder; give the folder of an adapter or model")
        made_here = (folder / SETTINGS).exists() or has_manifest(folder)
        if made_here and not (folder / DONE).exists():
            raise RunError(
                f"{folder} holds an unfinished run; finish it (--resume) before it is published"
            )
        if (folder / ADAPTER_CONFIG).is_file():
            AdapterFiles.read(folder)
            known = has_manifest(folder)
            manifest = Manifest.read(folder) if known else Manifest.of_foreign(folder)
            return cls(folder, "adapter", manifest)
        if (folder / MERGED).is_file():
            fingerprint_of(folder)
            return cls(folder, "merged", Manifest.read_file(folder / MERGED))
        if (inner := folder / "adapter" / ADAPTER_CONFIG).is_file():
            raise ModelError(f"{folder}: no adapter in it, but one in {inner.parent}: publish that")
        raise ModelError(
            f"{folder}: neither an adapter ({ADAPTER_CONFIG}) nor a model that `d2lora convert "
            f"--merge` wrote ({MERGED})"
        )

    def files(self, published: Published) -> dict[str, Content]:
        """Return the files to send, by name: texts as they will be, other files by their path."""
        manifest = without_paths(self.manifest, self.folder)
        patterns = _OF_ADAPTERS if self.form == "adapter" else _OF_MODELS
        patterns += TOKENIZER_FILES if manifest.lora.add_tokens else ()
        files: dict[str, Content] = {
            path.name: path
            for pattern in patterns
            for path in sorted(self.folder.glob(pattern))
            if path.is_file()
        }
        for name, key in _NAMES_OF_BASES.items():
            if (path := self.folder / name).is_file():
                named = published.base_id if self.form == "adapter" else None
                files[name] = _bytes(_with(path, key, named))
        if (path := self.folder / TOKENIZER_CONFIG).is_file():
            files[TOKENIZER_CONFIG] = _bytes(_with(path, "name_or_path", None))
        if self.form == "merged":
            files[MERGED] = _bytes(manifest.model_dump(mode="json"))
        elif has_manifest(self.folder):
            files[MANIFESTS[manifest.kind]] = _bytes(manifest.model_dump(mode="json"))
        files[CARD_FILE] = card(manifest, self.form, published).encode()
        return dict(sorted(files.items()))


def _with(path: Path, key: str, value: str | None) -> dict[str, Any]:
    """Return a configuration in which a name of a base is another, or none."""
    values = read_json(path)
    if key in values:
        values[key] = value
    return values


def _bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def without_paths(manifest: Manifest, folder: Path) -> Manifest:
    """Return a manifest in which paths of this machine are the names of their files alone.

    Relative paths stay: they say what was given, and nothing of this machine.

    Args:
        manifest: The manifest.
        folder: Where it is; this and the folders around it are replaced within texts, too.
    """
    values = manifest.model_dump(mode="json")
    kept = {name: values.pop(name) for name in _NOT_FILES}
    around = (folder.resolve(), Path.cwd(), Path.home())
    alone = {name: value for name, value in values.items() if name != "warnings"}
    known = {text for text in _texts(alone) if _is_absolute(text)} - {*manifest.lora.add_tokens}
    known |= {str(place) for place in around if place != Path(place.anchor)}
    longest_first = "|".join(re.escape(path) for path in sorted(known, key=len, reverse=True))
    paths = re.compile(rf"(?:{longest_first})(?:[\\/][^\s`'\",;:]*)?")
    return Manifest.model_validate(_replaced(values, paths) | kept)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _is_absolute(text: str) -> bool:
    if "\n" in text:
        return False
    return text.startswith(("~/", "file:")) or (
        (PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()) and len(text) > 1
    )


def _last(text: str) -> str:
    return PureWindowsPath(text).name  # it knows both separators


def _replaced(value: Any, paths: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return paths.sub(lambda match: _last(match[0]), value)
    if isinstance(value, dict):
        return {_replaced(key, paths): _replaced(inner, paths) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, paths) for inner in value]
    return value


def read_scores(places: Iterable[Path], model: Finished) -> tuple[EvalResult, ...]:
    """Read a model's scores from what `d2lora evaluate` wrote.

    Args:
        places: Folders of evaluations, or their summary.json.
        model: The model; as an adapter it is found by its folder, else by the folder's name.

    Raises:
        RunError: If a place holds no evaluation.
        SettingsError: If the model is not among what was evaluated there, or has no scores.
    """
    return tuple(score for place in places for score in _scores_of(place, model))


def _scores_of(place: Path, model: Finished) -> Iterator[EvalResult]:
    folder = place.parent if place.name == "summary.json" else place
    if not (folder / DONE).is_file() or not (folder / "summary.json").is_file():
        raise RunError(f"{place}: no finished evaluation; give a folder that `evaluate` wrote")
    summary = read_json(folder / "summary.json")
    settings = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    name = _name_in(summary["scores"], settings["base"], model, place)
    rows = " + ".join(_last(source) for source in settings["data"])
    trained_on = summary["trained_on"].get(name, {}).get("task", 0)
    if trained_on:
        raise SettingsError(
            f"{place}: {name} was trained on {trained_on:,} of these test rows, so its scores say "
            "nothing about new text; evaluate it on other rows"
        )
    for score, found in summary["scores"][name].items():
        yield EvalResult(
            task_type="text-generation",
            task_name=None if settings["task"] == "auto" else _last(settings["task"]),
            dataset_type=rows,
            dataset_name=rows,
            metric_type=score,
            metric_name=score,
            metric_value=found["mean"],
            metric_args={"rows": found["n_items"], "low": found["low"], "high": found["high"]},
        )


def _name_in(scores: dict[str, Any], base: str, model: Finished, place: Path) -> str:
    """Return the name under which a model was evaluated."""
    if not scores:
        raise SettingsError(f"{place}: it has no scores on a task, only of forgetting")
    own = model.folder.resolve()
    paths = {"base": base} if model.form == "merged" else {n: n for n in scores if n != "base"}
    same = [name for name, path in paths.items() if name in scores and Path(path).resolve() == own]
    alike = [name for name, path in paths.items() if name in scores and _last(path) == own.name]
    if found := same or alike:
        return found[0]
    raise SettingsError(
        f"{place}: {model.folder} is not among what was evaluated there ({', '.join(scores)})"
    )


def with_about(published: Published, file: Path | None) -> Published:
    """Add the author's Markdown to what the card says.

    Raises:
        SettingsError: If it cannot be read, or has metadata of its own.
    """
    if file is None:
        return published
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--about {file}: cannot be read: {error}") from None
    if text.lstrip().startswith("---"):
        raise SettingsError(
            f"--about {file}: it starts with metadata (---), and the card has its own; give the "
            "text alone"
        )
    return replace(published, about=text)
