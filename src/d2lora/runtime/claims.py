"""An output path claimed by one process: it can be written, and nobody else writes it.

Both are known before a base is loaded, so that no run ends with nowhere to go.
"""

import errno
import glob
import os
import shutil
import socket
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from d2lora.errors import RunError

Kind = Literal["folder", "whole folder", "file"]
"""A folder written in place, a folder that takes its place at the end, or a file."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def is_main_process() -> bool:
    """Say whether this process writes and speaks: the only one, or the first of several.

    torchrun and accelerate launch set each process's rank.
    """
    return os.environ.get("RANK", "0") == "0"


def target_of(path: Path) -> Path:
    """Return what a symbolic link stands for, so that the link stays; other paths as they are."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextmanager
def claimed(out: Path | None, kind: Kind, option: str = "--out") -> Generator[None]:
    """Keep an output for this process inside the block; of one job's processes the first does.

    The lock is the operating system's and ends with its process, however that dies. It lies beside
    the output, or in it where the folder around it cannot be written. None: nothing is written.

    Raises:
        RunError: If it cannot be written, or another process is writing it.
    """
    if out is None or not is_main_process():
        yield
        return
    place = Path(os.path.realpath(out))
    made = [folder for folder in place.parents if not os.path.lexists(folder)]
    try:
        try:
            _check_place(out, place, kind, option)
            lock = _locked(place, kind)
        except Timeout as taken:
            raise RunError(
                f"{out} is being written by {_holder(Path(taken.lock_file))}; wait for it, or "
                f"choose another {option}"
            ) from None
        except OSError as error:
            raise _cannot_be_written(out, option, error) from None
        file, is_native = Path(lock.lock_file), not isinstance(lock, SoftFileLock)
        try:
            if is_native:  # the other kind's file names its process by itself
                with suppress(OSError):  # Windows lets nobody write a locked file
                    file.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
            clear_leftovers(place.parent, glob.escape(place.name))
            if kind == "folder":
                clear_leftovers(place)
            yield
        finally:
            if is_native:
                with suppress(OSError):
                    file.unlink()
            lock.release()
    finally:
        for folder in made:
            with suppress(OSError):  # it holds what was written
                folder.rmdir()


def clear_leftovers(folder: Path, names: str = "*") -> None:
    """Remove what a process left that died while it wrote; what it wrote is this process's now."""
    for left in folder.glob(f".{names}.tmp-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):
                left.unlink(missing_ok=True)


def check_writable(folder: Path, option: str) -> None:
    """Make a folder that many processes may write, where it is not there yet.

    Raises:
        RunError: If it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try_writing(folder)
    except OSError as error:
        raise _cannot_be_written(folder, option, error) from None


def _check_place(out: Path, place: Path, kind: Kind, option: str) -> None:
    if kind == "file":
        if place.is_dir():
            raise RunError(f"{out} is a folder; give {option} a file")
    elif place.exists() and not place.is_dir():
        raise RunError(f"{out} is a file; give {option} a folder")
    # It is replaced by renaming, which a mount forbids and a shell that stands in it loses.
    kept = place.is_dir() and (os.path.ismount(place) or Path.cwd().is_relative_to(place))
    if kind == "whole folder" and kept:
        raise RunError(f"{out} cannot be replaced; give {option} a folder inside it")
    place.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):  # the longest name beside it, which may be too long
        place.with_name(f".{place.name}.tmp-12345678").lstat()
    if kind == "folder" and place.is_dir():
        _try_writing(place)


def _locked(place: Path, kind: Kind) -> BaseFileLock:
    beside = place.parent
    try:
        _try_writing(beside)
    except OSError:
        if kind != "folder" or not place.is_dir():
            raise
        beside = place
    name = beside / f".{place.name}.lock"
    try:
        lock: BaseFileLock = FileLock(name, blocking=False)
        lock.acquire()
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in _NO_LOCKS:
            raise
        lock = SoftFileLock(name, blocking=False)  # a file system without locks
        lock.acquire()
    return lock


def _try_writing(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass


def _holder(lock: Path) -> str:
    try:
        process, host = lock.read_text(encoding="utf-8").split()[:2]
    except (OSError, ValueError):
        return "another process"
    return f"process {process} on {host}"


def _cannot_be_written(out: Path, option: str, error: OSError) -> RunError:
    place = Path(os.path.realpath(out))
    around = (place, *place.parents)
    in_the_way = [path for path in around if os.path.lexists(path) and not path.is_dir()]
    reason = (error.strerror or str(error)).lower()
    if in_the_way:
        reason = f"{in_the_way[0]} is not a folder"
    return RunError(f"{option} {out} cannot be written: {reason}; choose another")
