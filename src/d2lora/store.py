"""The store of a study: runs known by the hash of all that decides their result.

A finished run is never run again, and a changed setting runs anew only what it touches. A run's
folder in the store is `KEY/`, its marker of completion `KEY/result.json`, written last.
"""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from d2lora.errors import ModelError
from d2lora.runs import read_json, sha256_of, write_json
from d2lora.settings import BaseSettings, Settings

FORMAT = 1
"""Changes when results of earlier versions of the code no longer count."""
RESULT = "result.json"
LOCK = ".lock"
_KEY_LENGTH = 20
_FREE = {"out", "quiet", "resume", "threads", "checkpoint_every"}
_FILES = {"data", "validation_data", "general_text", "choices", "for_task"}


@dataclass(frozen=True)
class Job(ABC):
    """Something to run once; heavy imports happen in `run`, in the worker."""

    label: str
    """What it is, for people."""
    about: tuple[str, int]
    """Task and n, or an empty name and the number of rows; by it times are foretold."""
    store: Path
    """Folder of all jobs."""

    @cached_property
    def key(self) -> str:
        """The hash of what decides the result; names the folder."""
        identity = {"format": FORMAT, "kind": type(self).__name__, **self.identity()}
        text = json.dumps(identity, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.store / self.key

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what decides the result."""

    @abstractmethod
    def run(self) -> dict[str, Any]:
        """Do it; return the result as plain values."""

    def result(self) -> dict[str, Any] | None:
        """Return the result of an earlier run, or None."""
        path = self.folder / RESULT
        return read_json(path) if path.is_file() else None


def perform(job: Job) -> dict[str, Any]:
    """Run a job unless it is done; two processes never run the same one at once."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(job.folder / LOCK):
        done = job.result()
        if done is not None:
            return done
        began = time.perf_counter()
        result = {"label": job.label, "about": [type(job).__name__, *job.about], **job.run()}
        result["job_s"] = round(time.perf_counter() - began, 3)
        write_json(job.folder / RESULT, result)
        return result


def _base_of(settings: BaseSettings) -> BaseSettings:
    return BaseSettings(**{name: getattr(settings, name) for name in BaseSettings.model_fields})


def shared_base(settings: BaseSettings) -> Any:
    """Load a base once in a process, however its passes are taken."""
    return _loaded(_base_of(settings).changed(fast=True).to_yaml())


@cache
def _loaded(settings_yaml: str) -> Any:
    from d2lora.models import load_base

    return load_base(BaseSettings(**yaml.safe_load(settings_yaml)))


def identity_of(settings: Settings) -> dict[str, Any]:
    """Return settings with contents in place of paths and without what decides nothing.

    Values at their defaults are left out, so that a new setting leaves earlier results valid.
    """
    told = settings.model_dump(mode="json", exclude_defaults=True)
    values = {k: v for k, v in told.items() if k not in _FREE}
    for name in _FILES & values.keys():
        values[name] = [_content(path) for path in values[name] or ()]
    if isinstance(settings, BaseSettings):
        values["base"] = _base_content(settings.base, settings.revision, settings.gguf_file)
    for name in {"init", "adapter"} & values.keys():
        folder = Path(values[name])
        if folder.is_dir():
            values[name] = _of_job(folder) or sha256_of(folder / "adapter_model.safetensors")
    return values


def _of_job(path: Path) -> str | None:
    """Return the key of the job that makes a path, done or not: what it makes follows from it."""
    key = path.parent.name
    return key if len(key) == _KEY_LENGTH and (path.parent / LOCK).is_file() else None


@cache
def _content(name: str) -> str:
    path = Path(name)
    return sha256_of(path) if path.is_file() else name


@cache
def _base_content(name: str, revision: str | None, gguf_file: str | None) -> str:
    made = _of_job(Path(name))
    if made is not None:
        return made
    from d2lora.base_files import base_folder
    from d2lora.fingerprints import fingerprint_of

    try:
        return fingerprint_of(base_folder(name, revision, gguf_file, fetch=False))
    except ModelError:  # a hub model not fetched yet: a dry run may name it
        return f"{name}@{revision}"
