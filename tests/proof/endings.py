"""Commands that are asked to end while they run, and several that run at once.

    python tests/proof/endings.py --times 10

SIGTERM, SIGINT or SIGKILL goes to the command alone, as a batch system sends it, at a random time;
every process that it started has to be gone within five seconds (Ray's own, after SIGKILL, later),
the exit code is 128 and the signal's number, and the second try ends as a run that was left alone.

Workers: SIGKILL goes to random workers of a study at random times, until it ends, which it has to
do as one that was left alone.

At once: two studies of one plan on one store, two that share half of their runs, two runs in one
folder, and reports while a study writes. Each leaves what it leaves alone.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from crashes import Command, contents, differing, progress

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "scripts")]

LIMIT_S = 5.0
"""Within which everything has to be gone that a command started."""
_HANGS_S = 600


@dataclass
class Record:
    """What came of the ends of one command by one signal."""

    n_tried: int = 0
    n_clean: int = 0
    """Ends in time, by the right code, with a second try as a run that was left alone."""
    longest_s: float = 0.0
    faults: list[str] = field(default_factory=list[str])


def started(words: Sequence[str], folder: Path, name: str = "said") -> "subprocess.Popen[bytes]":
    """Start a command as a user does, in a session of its own."""
    with (folder.parent / name).open("wb") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "d2lora", *words], cwd=folder, stdout=said, stderr=said,
            start_new_session=True,
        )  # fmt: skip


def again(command: Command, folder: Path) -> tuple[int, str]:
    """Run a command to its end, with `--resume` where it says so."""
    said = folder.parent / "said"
    code = started(command.words, folder).wait(_HANGS_S)
    if code == 2 and "with --resume" in said.read_text("utf-8", "replace"):
        code = started((*command.words, "--resume"), folder).wait(_HANGS_S)
    return code, said.read_text("utf-8", "replace")


def left_alone(command: Command, place: Path) -> tuple[dict[str, str], float]:
    """Run a command undisturbed; return what it leaves, and how long it took."""
    _fresh(place)
    began = time.monotonic()
    code, said = again(command, place)
    assert code == 0, f"{command.name}: {said}"
    return contents(place), time.monotonic() - began


def ended(command: Command, number: int, n_times: int, folder: Path, seed: int) -> Record:
    """End a command by a signal at random times."""
    place, record, chance = folder / "run", Record(), random.Random(seed)
    expected, whole_s = left_alone(command, place)
    while record.n_tried < n_times:
        _fresh(place)
        process = started(command.words, place)
        time.sleep(chance.uniform(0.1, 0.95) * whole_s)
        if process.poll() is not None:
            continue  # it was done before
        family = psutil.Process(process.pid).children(recursive=True)
        at_s = time.monotonic()
        process.send_signal(number)
        code = process.wait(_HANGS_S)
        # Ray's own processes outlive what was killed by a minute. The second try comes at once, as
        # a user's would: what still runs has to leave it alone.
        outlived = number == signal.SIGKILL and command.name == "study, ray"
        _, alive = psutil.wait_procs(family, timeout=0 if outlived else _HANGS_S)
        took_s = time.monotonic() - at_s
        said = (folder / "said").read_text("utf-8", "replace")
        record.n_tried += 1
        record.longest_s = max(record.longest_s, took_s)
        # Before Python is up, or after the work is done, the signal ends it by itself.
        codes = {128 + number, -number, 0}
        wrong = ""
        # What is killed cannot tidy up; Python's own tracker of semaphores does, and says so.
        leaked = number != signal.SIGKILL and "leaked" in said
        if code not in codes or "Traceback" in said or leaked:
            wrong = f"exit code {code}: {said.strip()[-300:]}"
        elif not outlived and (alive or took_s > LIMIT_S):
            wrong = f"{took_s:.1f} s until all was gone"
        else:
            second, said = again(command, place)
            psutil.wait_procs(family, timeout=_HANGS_S)
            wrong = differing(contents(place), expected)
            if second != 0 and "holds a finished run" not in said:
                wrong = f"the second try ends with {second}: {said.strip()[-300:]}"
        if wrong:
            record.faults.append(f"{command.name}, {signal.Signals(number).name}: {wrong}")
            sys.stderr.write(f"{record.faults[-1]}\n")
        else:
            record.n_clean += 1
        what = f"{command.name}, {signal.Signals(number).name}, up to {record.longest_s:.1f} s"
        progress(what, record.n_clean, record.n_tried)
    return record


def bereft(study: Command, n_times: int, folder: Path, seed: int) -> tuple[Record, int]:
    """Run a study of which random workers are killed; return what came of it, and how many."""
    place, record, chance, n_killed = folder / "run", Record(), random.Random(seed), 0
    expected, whole_s = left_alone(study, place)
    while record.n_tried < n_times:
        _fresh(place)
        process, n_before = started(study.words, place), n_killed
        at_s = time.monotonic()
        while process.poll() is None and time.monotonic() - at_s < _HANGS_S:
            time.sleep(chance.expovariate(2 / whole_s))
            if workers := _workers(process.pid):
                with suppress(psutil.NoSuchProcess):  # it has ended by itself
                    chance.choice(workers).kill()
                    n_killed += 1
        if n_killed == n_before and process.poll() == 0:
            continue  # it was done before
        said = (folder / "said").read_text("utf-8", "replace")
        record.n_tried += 1
        record.longest_s = max(record.longest_s, time.monotonic() - at_s)
        code = process.poll()
        wrong = f"exit code {code}: {said.strip()[-300:]}" if code != 0 else ""
        if wrong := wrong or differing(contents(place), expected):
            record.faults.append(f"{study.name}, workers killed: {wrong}")
            sys.stderr.write(f"{record.faults[-1]}\n")
            process.kill()
        else:
            record.n_clean += 1
        progress(f"{study.name}, {n_killed} workers killed", record.n_clean, record.n_tried)
    return record, n_killed


def _workers(pid: int) -> list[psutil.Process]:
    """Return the processes in which jobs of a study run, or will."""
    try:
        family = psutil.Process(pid).children(recursive=True)
        lines = [" ".join(one.cmdline()) for one in family]
    except psutil.NoSuchProcess:
        return []
    marks = ("spawn_main", "ray::")
    pairs = zip(family, lines, strict=True)
    return [one for one, line in pairs if any(mark in line for mark in marks)]


def _fresh(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()


def commands(inputs: Path) -> Iterator[Command]:
    """Write small inputs; yield what is ended."""
    import conftest
    from d2lora.embedded import general_rows, title_rows
    from support import small_plan, write_rows

    base = conftest.save_tiny_base(inputs / "base", 0)
    general = write_rows(inputs / "pool.jsonl", general_rows("train", 40))
    titles = write_rows(inputs / "titles.jsonl", title_rows("train", 20))
    plan = small_plan(inputs, base, general, titles) | {"sizes": [8], "learning_rates": [0.01]}
    path = inputs / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    half = inputs / "half.json"
    half.write_text(json.dumps({**plan, "sizes": [8, 12]}), encoding="utf-8")
    run = ("--base", base, "--rank", "4", "--batch-size", "4", "--checkpoint-every", "2")
    yield Command("adapt", ("adapt", *run, "--data", titles, "--max-steps", "300", "--out", "out"))
    for executor in ("inline", "processes", "ray"):
        workers = () if executor == "inline" else ("--workers", "2")
        words = ("study", str(path), "--executor", executor, *workers)
        yield Command(f"study, {executor}", (*words, "--store", "store", "--out", "study"))


def at_once(study: Command, folder: Path) -> Iterator[tuple[str, str]]:
    """Run several commands at once; yield what, and what is wrong with it (empty: nothing)."""
    place = folder / "run"
    _fresh(place)
    code, said = again(study, place)
    assert code == 0, said
    expected = contents(place)
    results = contents(place / "study")["results.jsonl"]

    _fresh(place)
    other = [word if word != "study" else "other" for word in study.words[1:]]
    both = [started(study.words, place), started(("study", *other), place, "said-2")]
    codes = [one.wait(_HANGS_S) for one in both]
    wrong = "" if codes == [0, 0] else f"exit codes {codes}"
    found = contents(place)
    wrong = wrong or ("" if found.get("other/results.jsonl") == results else "other results")
    mine = {name: value for name, value in found.items() if not name.startswith("other/")}
    wrong = wrong or differing(mine, expected)
    yield "two studies on one store", wrong

    half = [word.replace("plan.json", "half.json") for word in other]
    _fresh(place)
    for words in (study.words, ("study", *half)):
        code, said = again(Command("", tuple(words)), place)
        assert code == 0, said
    both_alone = contents(place)
    _fresh(place)
    both = [started(study.words, place), started(("study", *half), place, "said-2")]
    codes = [one.wait(_HANGS_S) for one in both]
    wrong = "" if codes == [0, 0] else f"exit codes {codes}"
    yield "two that share half of their runs", wrong or differing(contents(place), both_alone)

    _fresh(place)
    both = [started(study.words, place), started(study.words, place, "said-2")]
    codes = sorted(one.wait(_HANGS_S) for one in both)
    wrong = "" if codes == [0, 2] else f"exit codes {codes}"
    yield "two studies in one folder", wrong or differing(contents(place), expected)

    _fresh(place)
    process, n_reports, wrong = started(study.words, place), 0, ""
    while process.poll() is None:
        code = started(("report", "study"), place, "said-2").wait(_HANGS_S)
        said = (folder / "said-2").read_text("utf-8", "replace")
        n_reports += 1
        if "Traceback" in said or code not in {0, 2}:
            wrong = said[-300:]
    wrong = wrong or ("" if process.returncode == 0 else f"exit code {process.returncode}")
    yield f"{n_reports} reports while a study writes", wrong or differing(contents(place), expected)


def main() -> None:
    """Print the tables, then every fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10, help="ends by each signal")
    parser.add_argument("--only", nargs="*", help="of commands, `workers`, `at once`")
    known_signals = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
    parser.add_argument(
        "--signals", nargs="*", default=known_signals, choices=known_signals,
        type=signal.Signals.__getitem__,
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    # Where this runs in a shell's background, commands would be started to ignore an interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faults: list[str] = []
    say = sys.stdout.write
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["D2LORA_CACHE"] = str(folder / "cache")
        (folder / "inputs").mkdir()
        known = list(commands(folder / "inputs"))
        say("| command | signal | tried | as if left alone | longest until all was gone, s |\n")
        say("|---|---|---|---|---|\n")
        for command in known:
            if given.only and command.name not in given.only:
                continue
            for number in given.signals:
                record = ended(command, number, given.times, folder, given.seed)
                faults += record.faults
                say(
                    f"| {command.name} | {number.name} | {record.n_tried} | {record.n_clean} | "
                    f"{record.longest_s:.1f} |\n"
                )
                sys.stdout.flush()
        if not given.only or "workers" in given.only:
            say("\n| workers killed in | tried | killed | as if left alone | longest, s |\n")
            say("|---|---|---|---|---|\n")
            for study in known:
                if study.name in {"study, processes", "study, ray"}:
                    record, n_killed = bereft(study, given.times, folder, given.seed)
                    faults += record.faults
                    say(
                        f"| {study.name} | {record.n_tried} | {n_killed} | {record.n_clean} | "
                        f"{record.longest_s:.1f} |\n"
                    )
                    sys.stdout.flush()
        if not given.only or "at once" in given.only:
            say("\n| at once | as alone |\n|---|---|\n")
            study = next(one for one in known if one.name == "study, processes")
            for what, wrong in at_once(study, folder):
                say(f"| {what} | {'no' if wrong else 'yes'} |\n")
                faults += [f"{what}: {wrong}"] if wrong else []
        for fault in faults:
            say(f"\n- {fault}\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
