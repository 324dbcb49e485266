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
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent / "scripts")]

from attacks import CONFIG, WEIGHTS, Attack, everything  # noqa: E402

HUNG = 999
LIMIT_S = 120
"""Of a command; one that takes longer hangs."""
MEMORY = 6 * 2**30
"""Bytes that a command may need on top of what libraries have mapped."""
CONTENT = "the-secret-of-another-folder"
_WEIGHTS_ALONE = ("inspect", "convert")
"""Commands that compute with an adapter's weights, whatever else is said of them."""
_FORBIDDEN = (
    "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.startfile", "pty.",
    "socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind", "urllib.Request",
    "ctypes.dlopen", "webbrowser.", "pickle.find_class", "os.remove", "os.rename", "os.symlink",
    "os.link", "os.chmod", "os.mkdir", "os.rmdir", "shutil.",
)  # fmt: skip
_MAY_WRITE = ("os.remove", "os.rename", "os.symlink", "os.link", "os.chmod", "os.mkdir", "os.rmdir",
              "shutil.")  # fmt: skip


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
        elif event.startswith(_FORBIDDEN) and not _is_own(event, given):
            named = [os.fsdecode(one) for one in given if isinstance(one, str | bytes)]
            paths = [str(Path(one).absolute()) for one in named]
            inside = paths and all(path.startswith(self.written) for path in paths)
            if not (event.startswith(_MAY_WRITE) and (inside or not paths)):
                self.seen.append(f"{event} {str(given)[:120]}")

    def _opened(self, path: Any, mode: Any, flags: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor
        place = os.path.realpath(os.fsdecode(path))
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else mode
        if writes and (isinstance(flags, int) or set(str(mode)) & set("wax+")):
            own = place == f"/proc/{os.getpid()}/clear_refs"  # to measure its peak memory
            if not place.startswith((*self.written, "/dev/")) and not own:
                self.seen.append(f"{place} written")
        elif not place.startswith((*self.read, *self.written)):
            self.seen.append(f"{place} read")


def _is_own(event: str, given: tuple[Any, ...]) -> bool:
    """Say whether d2lora does it by itself: it asks for its commit, and reads back its own rows."""
    if event == "subprocess.Popen":
        return list(given[1]) == ["git", "-C", str(HERE.parent.parent), "rev-parse", "HEAD"]
    return event == "pickle.find_class" and given == ("d2lora.data.batches", "Encoded")


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
    for name in (CONFIG, WEIGHTS):
        shutil.copy(folder / "warm" / name, adapter / name)
    return Good(base, adapter, folder / "warm", data)


# Trying


def commands(kind: str, folder: Path, good: Good, out: Path) -> dict[str, Sequence[str]]:
    """Return the command lines that read a folder of a kind."""
    base, data = str(good.base), good.data
    few = ("--max-new-tokens", "2", "--limit", "2", "--out", str(out))
    step = (
        "--rank",
        "4",
        "--batch-size",
        "4",
        "--max-steps",
        "1",
        "--n",
        "4",
        "--quiet",
        "--out",
        str(out),
    )
    scored = ("--data", data, *few)
    if kind == "base":
        own = ("--base", str(folder))
        return {"evaluate": ("evaluate", *own, "--adapters", "base", *scored)}
    weights_alone: dict[str, Sequence[str]] = {
        "inspect": ("inspect", "--adapter", str(folder)),
        "convert": ("convert", "--adapter", str(folder), "--rank", "8", "--out", str(out)),
    }
    if kind == "adapter":
        return {
            **weights_alone,
            "evaluate": ("evaluate", "--base", base, "--adapters", str(folder), *scored),
        }
    given = ("--base", base, "--init", str(folder), "--data", data, *step[2:])
    return {**weights_alone, "adapt": ("adapt", *given)}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; minus a signal's number; `HUNG`."""
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
            code = HUNG
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


def fault_of(attack: Attack, name: str, ended: Ended, place: Path) -> str | None:
    """Say what is wrong with how a command ended; None: nothing."""
    may_be_taken = attack.harmless or name in _WEIGHTS_ALONE
    wrong = {
        "code of the folder was run": (place / "run" / "executed").exists(),
        f"seen: {'; '.join(ended.seen[:3])[:300]}": bool(ended.seen),
        f"no end after {LIMIT_S} s": ended.code == HUNG,
        f"exit code {ended.code}: {ended.said.strip()[-400:]}": ended.code not in (0, 2, HUNG)
        or "Traceback" in ended.said,
        "refused without a word": ended.code == 2 and not ended.said.strip(),
        "taken": ended.code == 0 and not may_be_taken,
        "a file elsewhere is shown": CONTENT in ended.said,
    }
    return next((fault for fault, is_so in wrong.items() if is_so), None)


def tried(attack: Attack, kind: str, good: Good, place: Path, record: Record, only: str) -> None:
    """Make an attack on a copy of a good folder with every command that reads it."""
    source = {"base": good.base, "adapter": good.adapter, "warm start": good.warm}[kind]
    for name in commands(kind, source, good, place / "run" / "out"):
        if only and name != only:
            continue
        shutil.rmtree(place, ignore_errors=True)
        (place / "other").mkdir(parents=True)
        (place / "run").mkdir()
        (place / "other" / "secret.json").write_text(json.dumps({"a": CONTENT}), encoding="utf-8")
        folder = Path(shutil.copytree(source, place / "folder"))
        attack.change(folder)
        elsewhere = str(place / "other" / "secret.json").encode()
        for file in folder.glob("*.json"):
            if file.is_file() and not file.is_symlink():
                file.write_bytes(file.read_bytes().replace(b"{other}", elsewhere))
        words = commands(kind, folder, good, place / "run" / "out")[name]
        linked_to = (str(place / "other"),) if attack.follows else ()
        own = (str(folder), str(good.base), good.data, *linked_to, *_libraries())
        written = (str(place / "run"), os.environ["D2LORA_CACHE"], os.environ["TMPDIR"])
        ended = run(words, place, Watch(folder, own, written))
        said = ended.said.strip()[-150:]
        sys.stderr.write(f"{attack.name}, {name}: {ended.code} {ended.elapsed_s:.1f} s: {said!r}\n")
        record.tried += 1
        if wrong := fault_of(attack, name, ended, place):
            record.lost.append(f"{attack.name}, {name}: {wrong}")
        elif ended.code == 2:
            record.refused += 1
        else:
            record.harmless += 1


def _libraries() -> tuple[str, ...]:
    source = str(HERE.parent.parent)
    roots = {
        sys.prefix,
        sys.base_prefix,
        os.path.realpath(sys.prefix),
        *map(os.path.realpath, sys.path),
    }
    return (
        *roots,
        source,
        "/usr",
        "/lib",
        "/proc",
        "/sys",
        "/dev",
        "/etc/mime.types",
        "/etc/localtime",
    )


def say(line: object) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


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
        say("| what | commands run | refused | harmless | lost |\n|---|---|---|---|---|")
        lost: list[str] = []
        for kind, attacks in everything().items():
            chosen = [(of, attack) for of, attack in attacks if given.only in attack.name]
            record = Record()
            for of, attack in chosen:
                tried(attack, of, good, top / "try", record, given.command)
            if chosen:
                numbers = (record.tried, record.refused, record.harmless, len(record.lost))
                say(f"| {kind} | {' | '.join(map(str, numbers))} |")
            lost += record.lost
    for one in lost:
        say(f"\n- {one}")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
