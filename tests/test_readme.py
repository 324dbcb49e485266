"""What the README and the documentation tell a stranger to type works as written."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from d2lora.cli import main
from d2lora.commands import COMMANDS
from d2lora.embedded import general_rows, title_rows
from support import REPOSITORY, write_rows

README, QUICKSTART = (REPOSITORY / name for name in ("README.md", "docs/quickstart.md"))
HOW_TO = REPOSITORY / "docs" / "how-to"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


def shell_lines(page: Path) -> list[str]:
    joined = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = (line.split("  #")[0].split("   #")[0] for line in joined.splitlines())
    return [line.strip() for line in lines if line.strip()]


def commands(page: Path) -> list[list[str]]:
    """The commands of d2lora on a page but for the demo, without what the shell does with them."""
    words = [shlex.split(line.split(" > ")[0]) for line in shell_lines(page)]
    return [line[1:] for line in words if line[0] == "d2lora" and line[1] != "demo"]


@pytest.fixture
def own_files(tmp_path: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that a reader is told to have."""
    (tmp_path / "my-model").symlink_to(tiny_base)
    write_rows(tmp_path / "general.jsonl", general_rows("train", 60))
    write_rows(tmp_path / "held-out.jsonl", general_rows("valid", 10))
    write_rows(tmp_path / "task.jsonl", title_rows("train", 70))
    write_rows(tmp_path / "test.jsonl", title_rows("test", 4))
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = ("--set", "sizes=[16]", "seeds=1", "learning_rates=[0.001]")
"""Added to studies, which take minutes as they are written."""

SMALL_FIT = shlex.split(
    "--folds 2 --runs 1 --shots 0 --steps 2 --learning-rates 0.001 --max-new-tokens 8 "
    "--executor inline"
)


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "study" and "--dry-run" not in words:
        words = [*words, *SMALL]
    if words[0] == "fit":
        words = [*words, *SMALL_FIT]
    try:
        code = main(words)
    except SystemExit as done:  # as completions end
        code = done.code or 0
    assert code == 0, f"{words}\n{capsys.readouterr().err}"


def run_python(page: Path) -> None:
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), {})  # noqa: S102


@pytest.mark.slow
def test_every_command_of_the_readme_and_the_quickstart_runs(
    own_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (plan,), plans = blocks(README, "yaml"), blocks(QUICKSTART, "yaml")
    assert plan == plans[0]
    (own_files / "study.yaml").write_text(plan, encoding="utf-8")
    lines = [*commands(QUICKSTART), *commands(HOW_TO / "serving.md")]
    for words in lines:
        run(words, capsys)
    run_python(HOW_TO / "metric.md")
    run_python(HOW_TO / "serving.md")
    (own_files / "scores").rename(own_files / "scores-of-the-quickstart")
    for words in commands(README):
        if words not in lines:
            run(words, capsys)
    assert (own_files / "adapter" / "adapter_model.safetensors").is_file()


def test_the_python_of_the_readme_is_that_of_the_quickstart_and_runs(own_files: Path) -> None:
    (short,), (code,) = blocks(README, "python"), blocks(QUICKSTART, "python")
    assert ast.dump(ast.parse(short)) == ast.dump(ast.parse(code))
    run_python(README)
    assert (own_files / "adapter" / "adapter_model.safetensors").is_file()


def test_every_command_is_shown() -> None:
    shown = {words[0] for page in (README, QUICKSTART) for words in commands(page)}
    assert shown == COMMANDS.keys() - {"demo"}


def test_the_readme_is_read_in_a_minute() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 120


def test_make_knows_every_target_that_the_readme_names() -> None:
    targets = {line.split()[1] for line in shell_lines(README) if line.startswith("make ")}
    assert {"demo", "test"} <= targets
    for target in sorted(targets):
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=REPOSITORY, capture_output=True, check=False
        )
        assert done.returncode == 0


def test_files_that_pages_point_to_are_there() -> None:
    for page in (README, *sorted((REPOSITORY / "docs").rglob("*.md"))):
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert link.startswith("http") or (page.parent / link).exists() or link in MADE, link


MADE = {"reference/cli.md"}
"""Pages that exist in the site alone."""
