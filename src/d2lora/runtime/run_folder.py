"""The run folder: what a run writes, and the promise that nothing in it is half-written.

settings.yaml      the resolved settings
provenance.json    versions, device, data fingerprints, commit
metrics.jsonl      one line per logged step
checkpoint/        only while training; a killed run resumes from it
done.json          the marker of completion, written last, with the run's summary
"""

import functools
import glob
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from d2lora.errors import RunError
from d2lora.runtime.claims import claimed, clear_leftovers, is_main_process, target_of
from d2lora.settings.yaml_text import parse_yaml

DONE = "done.json"
SETTINGS = "settings.yaml"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint"
_FREE = {
    "out", "resume", "quiet", "threads", "checkpoint_every", "checkpointing", "track",
    "track_project",
}  # fmt: skip
"""Settings that a resumed run may change: how it is shown or reached, not what comes out."""
Stamp = tuple[str, int, int, int]
IN_EXTRAS = ("bitsandbytes", "lm_eval")
"""Libraries whose versions are named where they are there: they compute, or score."""
LIBRARIES = ("d2lora", "torch", "transformers", "peft", "accelerate", "tokenizers", "datasets")


def cache_folder() -> Path:
    """Return where what can be made again is kept: `$D2LORA_CACHE`, else `~/.cache/d2lora`."""
    return Path(os.environ.get("D2LORA_CACHE", Path.home() / ".cache" / "d2lora"))


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_shared(path: Path, text: str) -> None:
    """Write a text that several processes write alike and others read, unless it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):
        clear_leftovers(path.parent, glob.escape(path.name))
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that d2lora wrote, which is an object.

    Raises:
        RunError: If it is missing, or something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: not a JSON file ({error}); was it edited or cut off?") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not isinstance(values, dict):
        raise RunError(f"{path}: expected an object, found {type(values).__name__}")
    return values


@contextmanager
def new_file(path: Path) -> Generator[Path]:
    """Yield a temporary file that is flushed and takes the place of `path` when the block succeeds.

    A symbolic link stays, and what it stands for is replaced.
    """
    path = target_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_temporary(path))
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
        _flush_names(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """Yield a temporary folder that takes the place of `path` when the block succeeds.

    The folder that was there is moved aside first, and `restore` finds it again where the process
    dies between the two renames. A symbolic link stays, and what it stands for is replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    restore(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_temporary(path)))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        temporary.chmod(0o755)
        if path.exists():
            path.rename(_aside(path))
        temporary.rename(path)
        _flush_names(path.parent)
        shutil.rmtree(_aside(path), ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def restore(path: Path) -> None:
    """Put a folder back that was moved aside by a process that then died."""
    if path.exists():
        shutil.rmtree(_aside(path), ignore_errors=True)
    else:
        with suppress(FileNotFoundError):  # there is none, or another process was faster
            _aside(path).rename(path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _temporary(path: Path) -> str:
    return f".{path.name}.tmp-"


class RunFolder:
    """A run's folder, opened for writing."""

    def __init__(self, path: Path) -> None:
        """Wrap a folder; `open` claims and checks it first."""
        self.path = path
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []
        """What is told each line of the log, once it is written."""

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, settings_yaml: str, *, resume: bool = False, whole: bool = False
    ) -> Generator["RunFolder"]:
        """Claim a folder inside the block that can take a run, or holds the one to resume.

        Nothing is written yet.

        Args:
            path: The folder.
            settings_yaml: The run's settings.
            resume: Whether it is to hold the run already.
            whole: Whether it will be written by `new_folder`.

        Raises:
            RunError: If it cannot be written or another process is writing it; if it holds a
                finished run, one of other settings, an unfinished one that was not asked to be
                resumed, or files of something else.
        """
        with claimed(path, "whole folder" if whole else "folder"):
            run = cls(target_of(path))
            run._check(settings_yaml, resume=resume)
            yield run

    def _check(self, settings_yaml: str, *, resume: bool) -> None:
        path = self.path
        if (path / DONE).exists():
            self._drop_checkpoint()  # of a process that died behind the marker
            raise RunError(f"{path} holds a finished run; choose another --out or remove it")
        names = present(path)
        if resume and not names:
            raise RunError(f"{path}: there is no run to resume; leave out --resume")
        if names and SETTINGS not in names:
            raise RunError(f"{path} holds other files ({names[0]}, ...); choose another --out")
        if names and not resume:
            raise RunError(
                f"{path} holds an unfinished run; continue it with --resume, or remove it"
            )
        if resume:
            self._check_same(settings_yaml)

    def start(self, settings_yaml: str, *, log: bool = False) -> None:
        """Write the settings; from here on the folder holds a run, until then nothing.

        Args:
            settings_yaml: The settings.
            log: Whether the run continues its log; else the log starts empty.
        """
        if not log:
            (self.path / METRICS).unlink(missing_ok=True)
        write_text(self.path / SETTINGS, settings_yaml)

    def _check_same(self, settings_yaml: str) -> None:
        old, new = _settings_of(self.path / SETTINGS), yaml.safe_load(settings_yaml)
        if lacking := sorted(new.keys() - old.keys()):
            raise RunError(
                f"{self.path / SETTINGS}: it lacks {', '.join(lacking)}: it was edited or cut off, "
                "or written by another version of d2lora. Start again in another --out"
            )
        names = sorted((new.keys() | old.keys()) - _FREE)
        if changed := [name for name in names if old.get(name) != new.get(name)]:
            raise RunError(
                f"{self.path} was started with other settings ({', '.join(changed)}); a resumed "
                "run keeps them. Restore them, or start again in another --out"
            )

    def log(self, **values: Any) -> None:
        """Append a line to metrics.jsonl, from the main process."""
        if not is_main_process():
            return
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        for listener in self.listeners:
            listener(values)

    def cut_log(self, step: int) -> None:
        """Drop the logged lines after `step`, as a run resumed there will write them again."""
        path = self.path / METRICS
        if path.exists() and is_main_process():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            write_text(path, "".join(f"{line}\n" for line in kept))

    def flush_log(self) -> None:
        """Flush the log to the disk, so that a checkpoint never outlives the lines before it."""
        path = self.path / METRICS
        if path.exists() and is_main_process():
            _flush(path)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the marker of completion, with the run's summary; no checkpoint is needed then."""
        self.flush_log()
        write_json(self.path / DONE, summary)
        self._drop_checkpoint()

    def _drop_checkpoint(self) -> None:
        shutil.rmtree(self.path / CHECKPOINT, ignore_errors=True)


def provenance() -> dict[str, Any]:
    """Return what a number must be traced to: versions, platform, date."""
    versions: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    for name in IN_EXTRAS:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "commit": _own_commit(),
        "versions": versions,
    }


@functools.cache
def _own_commit() -> str | None:
    """Return the commit of the checkout that d2lora runs from; None where it is installed.

    Asked once: a checkout may change below a process that runs for hours.
    """
    checkout = Path(__file__).parents[3]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    line = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() or None


def stamp_of(path: "Path | os.DirEntry[str]") -> Stamp:
    """Return what changes when a file does: its path, inode, size and time of change."""
    status = path.stat()
    return os.fspath(path), status.st_ino, status.st_size, status.st_mtime_ns


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_of(line: str) -> float:
    """Return the step of a logged line; infinity for one that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _settings_of(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise RunError(
            f"{path}: it is damaged, so the run cannot be resumed; start again elsewhere"
        )
    return values


def present(folder: Path) -> list[str]:
    """Return the names in a folder, but for the lock and what a dead process left."""
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return [n for n in names if not (n[0] == "." and (n.endswith(".lock") or ".tmp-" in n))]


def _flush_names(folder: Path) -> None:
    """Flush which files a folder holds, so that a name outlives a loss of power, too."""
    if os.name == "nt":  # it has no such call
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system may refuse it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())
