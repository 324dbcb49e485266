"""What the README tells a stranger to type works as written."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from d2lora.cli import main
from d2lora.commands import COMMANDS
from d2lora.embedded import general_rows, title_rows
from support import REPOSITORY, write_rows

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def shell_lines() -> list[str]:
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in joined.splitlines() if line.strip()]


@pytest.fixture
def own_files(tmp_path: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that a reader of the README is told to have."""
    (tmp_path / "my-model").symlink_to(tiny_base)
    write_rows(tmp_path / "general.jsonl", general_rows("train", 60))
    write_rows(tmp_path / "held-out.jsonl", general_rows("valid", 10))
    write_rows(tmp_path / "task.jsonl", title_rows("train", 70))
    write_rows(tmp_path / "test.jsonl", title_rows("test", 4))
    (plan,) = blocks("yaml")
    (tmp_path / "study.yaml").write_text(plan)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_d2lora_command_of_the_readme_runs(
    own_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for line in shell_lines() if line.startswith("d2lora ")]
    used = {shlex.split(line)[1] for line in lines}
    assert used - {"--help"} == COMMANDS.keys() - {"demo"}
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr().err}"
    assert (own_files / "adapter" / "adapter_model.safetensors").is_file()


def test_the_python_of_the_readme_runs(own_files: Path) -> None:
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    assert (own_files / "adapter").is_dir()


def test_make_knows_every_target_that_the_readme_names() -> None:
    targets = {line.split()[1] for line in shell_lines() if line.startswith("make ")}
    assert {"demo", "test"} <= targets
    for target in sorted(targets):
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=REPOSITORY, capture_output=True, check=False
        )
        assert done.returncode == 0


def test_files_that_the_readme_points_to_are_there() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (REPOSITORY / link).exists(), link
