"""The short form of `make proof`: it ends as it should, and it can fail."""

import shutil
import subprocess
import sys

import pytest

from support import REPOSITORY

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
PROOF = REPOSITORY / "tests" / "proof"


def proven(program: str, *words: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, str(PROOF / f"{program}.py"), *words]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.slow
@needs_compiler
def test_commands_that_are_killed_lose_power_or_find_no_disk_end_as_if_nothing_had_been() -> None:
    done = proven("crashes", "--points", "2", "--only", "adapt", "convert", "evaluate")
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


def lost(printed: str) -> dict[str, str]:
    """Return what a table's last column says of each line."""
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("| ")][1:]
    return {row[1].strip(): row[-2].strip() for row in rows}


@pytest.mark.slow
def test_odd_files_are_taken_or_refused_in_words() -> None:
    done = proven("inputs", "--rows", "1000", "--files", "150", "--seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert set(lost(done.stdout).values()) == {"0"}
    assert len(lost(done.stdout)) == 4


@pytest.mark.slow
def test_hostile_folders_are_refused_or_harmless_and_a_trap_is_seen() -> None:
    done = proven("hostile", "--only", "auto_map")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert set(lost(done.stdout).values()) == {"0"}
    assert len(lost(done.stdout)) == 2
    for place in (str(PROOF), str(PROOF.parent)):
        sys.path.insert(0, place)
    import hostile

    watch = hostile.Watch(PROOF, ("/usr",), ("/elsewhere",))
    watch("open", ("/etc/passwd", "r", 0))
    watch("open", ("/usr/x", "w", 1))
    watch("socket.connect", (None, ("127.0.0.1", 1)))
    watch("import", ("evil", str(PROOF / "evil.py"), None, None, None))
    assert [text.split()[-1] for text in watch.seen[:2]] == ["read", "written"]
    assert len(watch.seen) == 4


@pytest.mark.slow
def test_hostile_names_are_texts_wherever_they_stand() -> None:
    done = proven("pages", "--texts", "3")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert set(lost(done.stdout).values()) == {"0"}
