"""The short form of `make proof`: it ends as it should, and it can fail."""

import shutil
import subprocess
import sys

import pytest

from support import REPOSITORY

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
PROOF = REPOSITORY / "tests" / "proof"


def proven(*words: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, str(PROOF / "crashes.py"), *words]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.slow
@needs_compiler
def test_commands_that_are_killed_lose_power_or_find_no_disk_end_as_if_nothing_had_been() -> None:
    done = proven("--points", "2", "--only", "adapt", "convert", "evaluate")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| adapt")]
    assert [row.split("|")[4:6] for row in rows] == [[" 2 ", " 2 "]] * 5


@pytest.mark.slow
def test_a_study_without_an_effect_says_so_nearly_always() -> None:
    sys.path.insert(0, str(PROOF))
    try:
        import verdicts
    finally:
        sys.path.remove(str(PROOF))
    world = verdicts.WORLDS[0]
    either, pooled = verdicts.study_errors(world, 5, 40, 2, 2, 40)
    assert pooled <= either <= 0.15
    found = verdicts.tally(world, 10, 100, 20)
    assert found.wrong <= 3
    assert found.seen >= 5
