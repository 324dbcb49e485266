"""Data files, settings files, plans and task cards of every odd kind: taken, or refused in words.

    python tests/proof/inputs.py --rows 100000 --files 10000 > inputs.md

Each is given to what the commands read it with, the embedded base's tokenizer included. It has to
be taken, or to be refused by an error of d2lora's that names the file, within a second a row; of
rows that are known to be bad none may go unreported, of rows known to be good none be refused.
Whatever else happens is printed with the words that repeat it.
"""

import argparse
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from grammar import Rng
from readers import KINDS

from d2lora.runtime.console import quiet_libraries

LIMIT_S = 60
"""After so long without an end, a case hangs."""
MEMORY = 6 * 2**30
"""Bytes that a case may need on top of what libraries have mapped."""


class HangError(BaseException):
    """A case took longer than any may."""


@dataclass
class Tally:
    """What came of the cases of one kind."""

    tried: int = 0
    accepted: int = 0
    refused: int = 0
    found: dict[str, str] = field(default_factory=dict[str, str])
    """What should not be -> the first case that shows it."""
    times: Counter[str] = field(default_factory=Counter[str])


def cases(kind: str, n: int, seed: int, folder: Path, first: int = 0) -> Tally:
    """Try cases of a kind until so many rows, or files, have been tried."""
    maker, tally = KINDS[kind](folder), Tally()
    number = first
    while tally.tried < n:
        words = f"--kind {kind} --seed {seed} --case {number}"
        began = time.process_time()
        signal.alarm(LIMIT_S)
        try:
            taken, refused = maker.case(Rng(f"{seed} {kind} {number}"))
        except (Exception, HangError) as error:  # noqa: BLE001  # whatever it is, it is found
            taken, refused = 0, 1
            tally.found.setdefault(where(error), f"{words}: {type(error).__name__}: {error!s:.300}")
            tally.times[where(error)] += 1
        finally:
            signal.alarm(0)
        took = time.process_time() - began
        if took > 1 + taken + refused:
            tally.found.setdefault("slow", f"{words}: {took:.1f} s for {taken + refused} rows")
        tally.tried += taken + refused
        tally.accepted += taken
        tally.refused += refused
        number += 1
    return tally


def where(error: BaseException) -> str:
    """Return the kind of an error and the line of d2lora that it left last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/d2lora/" in f.filename] or frames
    return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"


def _hang(*_: object) -> None:
    raise HangError(f"no end after {LIMIT_S} s")


def limited() -> None:
    """Limit the memory of this process, and let what hangs be found."""
    quiet_libraries()
    signal.signal(signal.SIGALRM, _hang)
    mapped = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))


def say(line: object) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Print the table, then what should not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=10_000, help="settings, plans and cards, all")
    parser.add_argument("--kind", choices=KINDS, help="this kind alone")
    parser.add_argument("--case", type=int, help="this case alone, with its traceback")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    limited()
    found: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.case is not None:
            say(KINDS[given.kind](folder).case(Rng(f"{given.seed} {given.kind} {given.case}")))
            return
        say("| what | tried | accepted | refused | lost |\n|---|---|---|---|---|")
        for kind in [given.kind] if given.kind else KINDS:
            n = given.rows if kind == "rows" else given.files // (len(KINDS) - 1)
            tally = cases(kind, n, given.seed, folder)
            n_lost = sum(tally.times.values())
            numbers = f"{tally.tried:,} | {tally.accepted:,} | {tally.refused:,} | {n_lost}"
            say(f"| {KINDS[kind].name} | {numbers} |")
            found += [
                f"{place} ({tally.times[place]}): {what}" for place, what in tally.found.items()
            ]
    for one in found:
        say(f"\n- {one}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
