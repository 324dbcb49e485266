"""The store of a study: runs known by the hash of all that decides their result.

That is the settings, the contents of data, base and adapters, the kind of device, the dtype, and
the versions of d2lora, torch, transformers and peft. A finished run is never run again, and a
changed setting runs only what it touches. A run's folder in the store is `KEY/`, its marker of
completion `KEY/result.json`, written last.
"""

import hashlib
import json
import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from d2lora.data.sets import folder_of
from d2lora.errors import ModelError
from d2lora.runtime.claims import clear_leftovers
from d2lora.runtime.run_folder import Stamp, provenance, read_json, sha256_of, stamp_of, write_json
from d2lora.settings import BaseSettings, Settings

FORMAT = 2
"""Changes when results of earlier versions of the code no longer count."""
RESULT = "result.json"
LOCK = ".lock"
_KEY_LENGTH = 20
_FREE = {
    "out", "quiet", "resume", "threads", "checkpoint_every", "checkpointing", "track",
    "track_project",
}  # fmt: skip
_FILES = {
    "data", "validation_data", "general_text", "choices", "for_task", "keep_out", "training_data",
    "replay",
}  # fmt: skip
_BASE_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Endings of a base's files that count."""


@dataclass(frozen=True)
class Job(ABC):
    """Something to run once; heavy imports happen in `run`, in the worker."""

    label: str
    """Name for messages."""
    about: tuple[str, int]
    """Task and n, or an empty name and the number of rows; times are estimated by it."""
    store: Path
    """Folder of all jobs."""

    @cached_property
    def key(self) -> str:
        """The hash of all that determines the result; names the folder."""
        kind = type(self).__name__
        identity = {"format": FORMAT, "kind": kind, "versions": versions(), **self.identity()}
        text = json.dumps(identity, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]

    @property
    def folder(self) -> Path:
        """Folder of its files."""
        return self.store / self.key

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return all that determines the result; it is hashed into the key."""

    @abstractmethod
    def run(self) -> dict[str, Any]:
        """Run the job; return the result as plain values."""

    def result(self) -> dict[str, Any] | None:
        """Return the result of an earlier run, or None."""
        path = self.folder / RESULT
        return read_json(path) if path.is_file() else None


class TakenError(Exception):
    """Another process is running the job."""


def perform(job: Job, *, patient: bool = False) -> dict[str, Any]:
    """Run a job unless it is done; two processes never run the same one at once.

    Args:
        job: What to run.
        patient: Wait for another process that runs it.

    Raises:
        TakenError: If another process runs it, and is not waited for.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(job.folder / LOCK)
    try:
        lock.acquire(timeout=-1 if patient else 0)
    except Timeout:
        raise TakenError(job.key) from None
    try:
        done = job.result()
        if done is not None:
            return done
        clear_leftovers(job.folder)
        started = time.perf_counter()
        result = {"label": job.label, "about": [type(job).__name__, *job.about], **job.run()}
        result["job_s"] = round(time.perf_counter() - started, 3)
        write_json(job.folder / RESULT, result)
        return result
    finally:
        lock.release()


def shared_base(settings: BaseSettings) -> Any:
    """Load a base once in a process, and again where its files have changed."""
    of_base = {name: getattr(settings, name) for name in BaseSettings.model_fields}
    # One base serves fast and plain passes.
    yaml_text = BaseSettings(**of_base).changed(fast=True).to_yaml()
    return _loaded(yaml_text, _base_stamp(settings, fetch=True))


@lru_cache(maxsize=4)
def _loaded(settings_yaml: str, stamp: tuple[Stamp, ...]) -> Any:
    from d2lora.adapters.base import load_base

    assert stamp
    return load_base(BaseSettings(**yaml.safe_load(settings_yaml)))


def identity_of(settings: Settings) -> dict[str, Any]:
    """Return settings with contents in place of paths, without those that change no result.

    Defaults are left out, so that a new setting leaves earlier results valid. Device and
    dtype are resolved first: `device: auto` on a machine without a GPU is `device: cpu`.
    """
    own = settings.model_dump(mode="json", exclude_defaults=True)
    values = {k: v for k, v in own.items() if k not in _FREE}
    for name in _FILES & values.keys():
        values[name] = [content_of(path) for path in values[name] or ()]
    if values.get("lm_eval_tasks"):
        values["lm_eval_tasks"] = _folder_content(str(values["lm_eval_tasks"]))
    if any(name.startswith("lm_eval:") for name in own.get("choices", ())):
        values["lm_eval"] = provenance()["versions"].get("lm_eval")
    if values.get("chat_template"):
        values["chat_template"] = content_of(str(values["chat_template"]))
    for name in {"task", "for_card", "replay_task"} & values.keys():
        values[name] = _task_content(values[name])
    if isinstance(settings, BaseSettings):
        values["base"] = _base_content(settings)
        values.pop("gguf_file", None)
        if settings.quantization is not None:
            values["bitsandbytes"] = provenance()["versions"].get("bitsandbytes")
        values["device"], values["dtype"] = _where(settings.device, settings.dtype)
    for name in {"init", "adapter"} & values.keys():
        if values[name] is not None and Path(values[name]).is_dir():
            values[name] = adapter_content(Path(values[name]))
    return values


def adapter_content(folder: Path) -> str:
    """Return what an adapter's folder is known by: the job that makes it, else its files."""
    made = _of_job(folder)
    if made is not None:
        return made
    names = ("adapter_config.json", "adapter_model.safetensors")
    parts = [content_of(str(folder / name)) for name in names]
    manifest = folder / "warm_start.json"
    if manifest.is_file():
        parts.append(str(read_json(manifest).get("chat_format")))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def content_of(name: str) -> str:
    """Return the SHA-256 of a file or folder; of what is not here, as a hub data set, the name."""
    path = Path(name)
    if folder := folder_of(name):
        return f"{_folder_content(str(folder.path))}:{folder.split}"
    return _sha256(stamp_of(path)) if path.is_file() else name


def _folder_content(name: str) -> str:
    """Return what a folder is known by: the contents of its files, by their places in it."""
    folder = Path(name)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [f"{path.relative_to(folder)} {content_of(str(path))}" for path in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _task_content(name: str) -> str:
    """Return what a task is known by: what its card and its own metrics hold."""
    from d2lora.data.cards import read_card
    from d2lora.data.tasks import AUTO
    from d2lora.evaluation.metrics.own import file_of

    if name == AUTO:
        return name
    named = read_card(name)
    files = [file_of(metric, named.folder) for metric in named.card.metrics if ".py" in metric]
    parts = [
        named.card.model_dump_json(exclude_defaults=True),
        *(content_of(str(file)) for file in files),
    ]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


@cache
def _sha256(stamp: Stamp) -> str:
    return sha256_of(Path(stamp[0]))


def _where(device: str, dtype: str) -> tuple[str, str]:
    """Return the kind of device and the dtype that settings come to here."""
    if device == "auto" or dtype == "auto":
        import torch

        from d2lora.runtime.devices import device_of, dtype_of

        kind = device_of(device).type if device == "auto" else device.partition(":")[0]
        return kind, str(dtype_of(dtype, torch.device(kind))).removeprefix("torch.")
    return device.partition(":")[0], dtype


@cache
def versions() -> dict[str, str]:
    """Return the versions of what computes; another one may give other numbers."""
    known = provenance()["versions"]
    return {name: known[name] for name in ("d2lora", "torch", "transformers", "peft")}


def _of_job(path: Path) -> str | None:
    """Return the key of the job that makes a path, done or not: what it makes follows from it."""
    key = path.parent.name
    return key if len(key) == _KEY_LENGTH and (path.parent / LOCK).is_file() else None


def _base_content(settings: BaseSettings) -> str:
    made = _of_job(Path(settings.base))
    if made is not None:
        return made
    stamp = _base_stamp(settings, fetch=False)
    # A hub model may not be fetched yet: a dry run can name it.
    return _base_sha256(stamp) if stamp else f"{settings.base}@{settings.revision}"


def _base_stamp(settings: BaseSettings, *, fetch: bool) -> tuple[Stamp, ...]:
    """Return the stamps of a base's files; none where it is not on this machine."""
    from d2lora.adapters.base_files import base_folder

    try:
        folder = base_folder(settings.base, settings.revision, settings.gguf_file, fetch=fetch)
    except ModelError:
        if fetch:
            raise
        return ()
    # A study asks this for every cell, and a path object costs more than the system's answer.
    with os.scandir(folder) as entries:
        files = [entry for entry in entries if entry.name.endswith(_BASE_FILES)]
    return tuple(sorted(map(stamp_of, files)))


@lru_cache(maxsize=64)
def _base_sha256(stamp: tuple[Stamp, ...]) -> str:
    """Return what a base is known by: its weights, and what shapes it and makes its token ids."""
    from d2lora.adapters.fingerprints import fingerprint_of

    files = [Path(name) for name, *_ in stamp]
    parts = [fingerprint_of(files[0].parent)]
    parts += [f"{f.name} {sha256_of(f)}" for f in files if f.suffix != ".safetensors"]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
