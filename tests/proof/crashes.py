"""Commands that are killed, lose power or find the disk full, at many points; and what is left.

    python tests/proof/crashes.py --points 100 > crashes.md

`faults.c` counts what a command changes below its folder. Each command is run once to the end, and
then again and again with a fault at one of these points. Its second try, as a user would make it,
has to end as the run without a fault: files equal byte for byte, but for times.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "scripts")]

KINDS = ("kill", "power", "nospace", "io", "readonly")
LIMIT_S = 120
"""Longer than any of these commands takes; one that is not done by then hangs."""
_TIMES = {"elapsed_s", "job_s", "peak_memory_bytes", "date", "evaluation_s", "resume"}
"""What differs between two runs alike: times, and whether one was resumed."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; minus the signal's number where it died of one; 999: it hung."""
    errors: str


@dataclass(frozen=True)
class Command:
    """A command with all that it needs, run in a folder of its own."""

    name: str
    words: tuple[str, ...]


@dataclass
class Record:
    """What came of the faults of one kind in one command."""

    n_points: int = 0
    """Points at which it can fail."""
    n_tried: int = 0
    n_as_before: int = 0
    """Second tries that ended as a run without a fault."""
    faults: list[str] = field(default_factory=list[str])


def build(folder: Path) -> Path:
    """Compile the faults; return the library to preload."""
    library = folder / "faults.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "faults.c", "-ldl"], check=True
    )
    return library


def preload() -> None:
    """Import what commands need, once for all of them."""
    import torch

    import d2lora.commands
    from d2lora.runtime.console import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    for command in d2lora.commands.COMMANDS.values():
        command.load()


def run(words: Sequence[str], folder: Path, **fault: str) -> Ended:
    """Run a command in a process of its own, with a fault."""
    said = folder.parent / "said"
    pid = os.fork()
    if pid == 0:
        os.environ.update({"FAULT_ROOT": str(folder), **fault} if fault else {})
        os.chdir(folder)
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from d2lora.cli import main

        code = 1
        try:
            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if sys.exc_info()[0] is not None:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
    deadline = time.monotonic() + LIMIT_S
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            code = 999
            break
        time.sleep(0.005)
    return Ended(code, said.read_text("utf-8", "replace"))


def contents(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder, without times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(_without_times(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def _without_times(path: Path) -> bytes:
    data = path.read_bytes()
    if not data:  # a loss of power left it empty
        return data
    match path.suffix:
        case ".json":
            rest = json.dumps(_plain(json.loads(data)), sort_keys=True)
        case ".jsonl":
            rows = [_plain(json.loads(line)) for line in data.splitlines()]
            rest = json.dumps(rows, sort_keys=True)
        case ".yaml":
            rest = re.sub(r"resume: \w+", "", data.decode())
        case ".csv" | ".parquet":
            table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
            names = [name for name in table if name.removeprefix("cost_") not in _TIMES]
            rest = table[names].to_csv()
        case ".html" | ".md":
            of_cost = r"Cost of training.*?(</table>|\n\n(?!\|)|$)|>seconds<.*?</table>"
            text = re.sub(of_cost, "", data.decode(), flags=re.DOTALL)
            rest = re.sub(r"\b[\d.,]+ (s|min|h|ms|MB|GB)\b|\d{4}-\d\d-\d\d[ T][\d:]+", "", text)
        case _:
            return data
    return rest.encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items() if name not in _TIMES}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def lose_power(folder: Path, log: Path) -> None:
    """Cut the files that were written to what was flushed to the disk."""
    flushed: dict[int, int] = {}
    for line in log.read_text("ascii").splitlines() if log.is_file() else ():
        what, inode, size = line.split()
        if what == "s":
            flushed[int(inode)] = int(size)
        elif int(size) == 0 or int(inode) not in flushed:  # a new file, be it of a known inode
            flushed[int(inode)] = 0
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            os.truncate(path, min(status.st_size, flushed.get(status.st_ino, status.st_size)))


def again(command: Command, folder: Path) -> Ended:
    """Run a command a second time, as what it says tells a user to."""
    ended = run(command.words, folder)
    if ended.code == 2 and "with --resume" in ended.errors:
        ended = run((*command.words, "--resume"), folder)
    return ended


def tried(command: Command, kind: str, n_points: int, folder: Path, seed: int) -> Record:
    """Put faults of a kind into a command, at up to `n_points` of its points."""
    place, log, counter = folder / "run", folder / "log", folder / "count"
    record = Record()

    def fresh() -> None:
        for path in (place, log, counter):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        place.mkdir()

    fresh()
    whole = run(command.words, place, FAULT_COUNT=str(counter))
    assert whole.code == 0, f"{command.name}: {whole.errors}"
    record.n_points = int(counter.read_text("ascii"))
    expected = contents(place)
    every = range(1, record.n_points + 1)
    for point in sorted(random.Random(seed).sample(every, min(n_points, record.n_points))):
        fresh()
        fault = {"FAULT_KIND": "kill" if kind == "power" else kind, "FAULT_AT": str(point)}
        if kind == "power":
            fault["FAULT_LOG"] = str(log)
        ended = run(command.words, place, **fault)
        if kind == "power":
            lose_power(place, log)
        second = again(command, place)
        record.n_tried += 1
        if wrong := _fault(kind, ended, second, expected, place):
            record.faults.append(f"{command.name}, {kind} at {point} of {record.n_points}: {wrong}")
            sys.stderr.write(f"{record.faults[-1]}\n")
        else:
            record.n_as_before += 1
        progress(f"{command.name}, {kind}", record.n_as_before, record.n_tried)
    return record


def progress(what: str, n_good: int, n_tried: int) -> None:
    """Say how far it is, so that a stop by hand does not lose the count."""
    if n_tried % 10 == 0:
        sys.stderr.write(f"{what}: {n_good} of {n_tried}\n")
        sys.stderr.flush()


def _fault(
    kind: str, ended: Ended, second: Ended, expected: dict[str, str], place: Path
) -> str | None:
    """Say what is wrong with how a command ended; None: nothing."""
    if kind not in {"kill", "power"}:
        if ended.code not in {0, 2, 74}:
            return f"exit code {ended.code}: {ended.errors.strip()[-300:]}"
        if "Traceback" in ended.errors:
            return "a traceback"
    elif ended.code not in {0, -signal.SIGKILL}:
        return f"exit code {ended.code}"
    if second.code != 0 and "holds a finished run" not in second.errors:
        return f"the second try ends with {second.code}: {second.errors.strip()[-300:]}"
    return differing(contents(place), expected) or None


def differing(found: dict[str, str], expected: dict[str, str]) -> str:
    """Say which files differ; empty: none."""
    names = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    return f"other files: {', '.join(names[:4])}" if names else ""


def commands(inputs: Path) -> Iterator[Command]:
    """Write small inputs; yield the commands, smallest that has all."""
    import conftest
    from d2lora.embedded import general_rows, title_rows
    from support import small_plan, write_rows

    base = conftest.save_tiny_base(inputs / "base", 0)
    general = write_rows(inputs / "pool.jsonl", general_rows("train", 40))
    titles = write_rows(inputs / "titles.jsonl", title_rows("train", 20))
    test = write_rows(inputs / "test.jsonl", title_rows("test", 4))
    of_base = ("--base", base)
    quick = ("--rank", "4", "--batch-size", "4", "--max-steps", "6")
    saved = ("--checkpoint-every", "2")
    warm = ("warmup", *of_base, "--data", general, "--m", "16", *quick)
    adapter = ("adapt", *of_base, "--data", titles, "--n", "8", *quick)
    for words in ((*warm, "--out", "warm"), (*adapter, "--out", "adapter")):
        assert run(words, inputs).code == 0
    warm_start, done = str(inputs / "warm"), str(inputs / "adapter")
    plan = small_plan(inputs, base, general, titles) | {
        "sizes": [4], "seeds": 1, "arms": ["fresh", "warm"], "learning_rates": [0.01],
    }  # fmt: skip
    path = inputs / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    study = ("study", str(path), "--executor", "inline", "--store", "store", "--out", "study")
    study = (*study, "--no-report")  # a command of its own
    yield Command("warmup", (*warm, *saved, "--out", "out"))
    yield Command("adapt", (*adapter, *saved, "--init", warm_start, "--out", "out"))
    yield Command(
        "evaluate",
        ("evaluate", *of_base, "--adapters", "base", done, "--data", test, "--max-new-tokens", "4",
         "--general-text", general, "--out", "out"),
    )  # fmt: skip
    yield Command("select", ("select", general, *of_base, "-m", "8", "--out", "out"))
    yield Command("convert", ("convert", "--adapter", warm_start, "--rank", "8", "--out", "out"))
    yield Command(
        "convert --merge", ("convert", *of_base, "--adapter", done, "--merge", "--out", "out")
    )
    yield Command(
        "pairs",
        ("pairs", *of_base, "--data", titles, "--n", "4", "--max-new-tokens", "4", "--out", "out"),
    )
    yield Command("study", study)
    assert run(study, inputs).code == 0
    yield Command("report", ("report", str(inputs / "study"), "--out", "report"))


def main() -> None:
    """Print the table, then every fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=100, help="faults of each kind and command")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--only", nargs="*", help="names of commands")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "FAULTS" not in os.environ:
            library = build(folder)
            environment = {**os.environ, "LD_PRELOAD": str(library), "FAULTS": "1"}
            again = subprocess.run([sys.executable, *sys.argv], env=environment, check=False)
            sys.exit(again.returncode)
        os.environ["D2LORA_CACHE"] = str(folder / "cache")
        preload()
        (folder / "inputs").mkdir()
        faults: list[str] = []
        sys.stdout.write(
            "| command | fault | points | tried | as without a fault |\n|---|---|---|---|---|\n"
        )
        for command in commands(folder / "inputs"):
            if given.only and command.name not in given.only:
                continue
            for kind in given.kinds:
                record = tried(command, kind, given.points, folder, given.seed)
                faults += record.faults
                sys.stdout.write(
                    f"| {command.name} | {kind} | {record.n_points} | {record.n_tried} | "
                    f"{record.n_as_before} |\n"
                )
                sys.stdout.flush()
        for fault in faults:
            sys.stdout.write(f"\n- {fault}\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
