"""Outputs: one writer at a time, known to be writable, written whole, found after any death."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from d2lora import Adapter, AdaptSettings, ConvertSettings, RunError, WarmStart, adapt, convert
from d2lora.adapters.base import load_base
from d2lora.adapters.lora import adamw
from d2lora.cli import main
from d2lora.runtime.claims import claimed
from d2lora.runtime.run_folder import (
    CHECKPOINT,
    METRICS,
    RunFolder,
    new_folder,
    read_json,
    write_json,
    write_text,
)
from d2lora.settings import BaseSettings, TrainSettings
from d2lora.training import checkpoint
from d2lora.training.progress import Progress
from support import dies_at_step, read_rows, write_rows

FOLDERS = {
    "warmup": "--base nowhere --data {general}",
    "adapt": "--base nowhere --data {problems}",
    "evaluate": "--base nowhere --data {problems}",
    "select": "--base nowhere --data {general} -m 4",
    "pairs": "--base nowhere --data {problems}",
    "convert": "--adapter nowhere --rank 2",
    "study": "{plan}",
    "demo": "",
}
FILES = {"generate": "--base nowhere --prompt hello", "inspect": "--adapter nowhere"}


@pytest.fixture
def refusal(tmp_path: Path, general: str, problems: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command whose base is nowhere, so that it has to be refused before one is loaded."""
    task = {"data": [problems], "test": [problems]}
    plan = {"base": "nowhere", "warm_up": {"data": general}, "tasks": {"own": task}, "sizes": [4]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))

    def refused(command: str, out: Path) -> str:
        words = {**FOLDERS, **FILES}[command].format(
            general=general, problems=problems, plan=tmp_path / "plan.yaml"
        )
        extra = ["--store", str(tmp_path / "store")] if command == "study" else []
        assert main([command, *words.split(), "--out", str(out), *extra]) == 2
        return capsys.readouterr().err

    return refused


@pytest.mark.parametrize("command", [*FOLDERS, *FILES])
def test_a_second_process_is_refused_by_every_command(
    tmp_path: Path, refusal: Any, command: str
) -> None:
    with claimed(tmp_path / "out", "folder"):
        reported = refusal(command, tmp_path / "out")
    assert f"is being written by process {os.getpid()} on {socket.gethostname()}" in reported
    assert "nowhere" not in reported


@pytest.mark.parametrize("command", [*FOLDERS, *FILES])
def test_an_output_that_cannot_be_written_is_reported_before_a_base_is_loaded(
    tmp_path: Path, refusal: Any, command: str
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    reported = refusal(command, taken / "below" / "out")
    assert f"cannot be written: {taken} is not a folder" in reported
    if command in FILES:
        assert "is a folder; give --out a file" in refusal(command, tmp_path)
    else:
        assert "is a file; give --out a folder" in refusal(command, taken)
    assert "cannot be written: file name too long" in refusal(command, tmp_path / ("x" * 300))
    assert taken.read_text() == "a file"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_command_that_fails_leaves_no_folder_behind(tmp_path: Path, refusal: Any) -> None:
    refusal("adapt", tmp_path / "new" / "folders" / "out")
    assert not (tmp_path / "new").exists()


def test_a_folder_to_be_replaced_cannot_be_the_one_that_the_shell_is_in(
    tmp_path: Path, refusal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "give --out a folder inside it" in refusal("evaluate", Path())


def run(out: Path, base: str, data: str, **changes: Any) -> Adapter:
    settings = {"max_steps": 6, "batch_size": 8, "rank": 4, "quiet": True, **changes}
    return adapt(AdaptSettings(base=base, data=(data,), out=out, **settings))


def weights(adapter: Adapter) -> dict[str, torch.Tensor]:
    return load_file(adapter.path / "adapter_model.safetensors")


def assert_same(first: Adapter, second: Adapter) -> None:
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name])
    logs = [
        [{k: v for k, v in row.items() if k != "elapsed_s"} for row in read_rows(a.path / METRICS)]
        for a in (first, second)
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_a_run_that_is_killed_frees_its_folder_and_resumes_with_each_step_logged_once(
    tmp_path: Path, tiny_base: str, problems: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, log = tmp_path / "out", tmp_path / "out" / METRICS
    words = ["adapt", "--base", tiny_base, "--data", problems, "--out", str(out), "--rank", "4"]
    words += ["--max-steps", "400", "--device", "cpu", "--threads", "1", "--quiet"]
    with subprocess.Popen([sys.executable, "-m", "d2lora", *words]) as first:
        while not log.exists() or len(log.read_text().splitlines()) < 5:
            assert first.poll() is None
            time.sleep(0.02)
        for again in (words, [*words, "--resume"]):
            assert main(again) == 2
            assert f"written by process {first.pid} on" in capsys.readouterr().err
        first.kill()
    assert main(words) == 2
    assert "holds an unfinished run; continue it with --resume" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert [row["step"] for row in read_rows(log)] == list(range(1, 401))


def test_of_the_processes_of_one_job_the_first_claims_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with claimed(tmp_path / "out", "folder"):
        monkeypatch.setenv("RANK", "1")
        with claimed(tmp_path / "out", "folder"):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(RunError, match="is being written"), claimed(tmp_path / "out", "folder"):
            pass


def test_two_names_of_one_folder_are_one_claim(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with (
        claimed(tmp_path / "link", "folder"),
        pytest.raises(RunError, match="is being written"),
        claimed(tmp_path / "out", "whole folder"),
    ):
        pass


def test_a_run_killed_before_its_first_checkpoint_logs_each_line_once(
    tmp_path: Path, tiny_base: str, problems: str, warm_start: WarmStart,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    common = {"init": str(warm_start.path), "rank": None, "checkpoint_every": 4}
    whole = run(tmp_path / "whole", tiny_base, problems, **common)
    with monkeypatch.context() as patch, pytest.raises(dies_at_step(patch, 3)):
        run(tmp_path / "killed", tiny_base, problems, **common)
    assert len(read_rows(tmp_path / "killed" / METRICS)) == 3
    assert_same(whole, run(tmp_path / "killed", tiny_base, problems, **common, resume=True))


class Killed(BaseException):
    """What a process dies of."""


@contextmanager
def dying_between_renames(monkeypatch: pytest.MonkeyPatch, nth: int) -> Iterator[None]:
    """Die at the n-th time that a new folder takes its place, the old one moved aside."""
    rename, taken = Path.rename, 0

    def dying(self: Path, target: Path) -> Path:
        nonlocal taken
        taken += ".tmp-" in self.name
        if ".tmp-" in self.name and taken == nth:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        yield


def test_a_run_that_dies_while_a_checkpoint_is_replaced_resumes_from_the_one_before(
    tmp_path: Path, tiny_base: str, problems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"checkpoint_every": 2, "max_steps": 7, "dropout": 0.1}
    whole = run(tmp_path / "whole", tiny_base, problems, **common)
    with dying_between_renames(monkeypatch, 2), pytest.raises(Killed):
        run(tmp_path / "killed", tiny_base, problems, **common)
    assert not (tmp_path / "killed" / CHECKPOINT).exists()
    assert checkpoint.exists(tmp_path / "killed")
    progress = read_json(tmp_path / "killed" / CHECKPOINT / "progress.json")
    assert progress["step"] == 2
    resumed = run(tmp_path / "killed", tiny_base, problems, **common, resume=True)
    assert_same(whole, resumed)
    assert not [path for path in resumed.path.iterdir() if path.name.startswith(".")]


def test_a_folder_is_never_lost_while_another_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_folder(tmp_path / "out") as folder:
        write_text(folder / "text", "first")
    with (
        dying_between_renames(monkeypatch, 1),
        pytest.raises(Killed),
        new_folder(tmp_path / "out") as folder,
    ):
        write_text(folder / "text", "second")
    assert not (tmp_path / "out").exists()
    with pytest.raises(Killed), new_folder(tmp_path / "out"):
        raise Killed
    assert (tmp_path / "out" / "text").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_dead_process_left_half_written_is_cleared_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for left in (tmp_path / ".out.tmp-abc", out / ".checkpoint.tmp-abc"):
        left.mkdir(parents=True)
        (left / "part").touch()
    write_text(out / "settings.yaml", "rank: 4\n")
    with RunFolder.open(out, "rank: 4\n", resume=True):
        assert [path.name for path in out.iterdir()] == ["settings.yaml"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_that_outlived_its_finished_run_goes_with_the_next_try(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "run", "{}\n") as run:
        run.start("{}\n")
        (run.path / "checkpoint").mkdir()
        run.finish({"kind": "adapter"})
        assert not (run.path / "checkpoint").exists()
    (run.path / "checkpoint").mkdir()  # as of a process that died behind the marker
    with (
        pytest.raises(RunError, match="holds a finished run"),
        RunFolder.open(run.path, "{}\n", resume=True),
    ):
        pass
    assert not (run.path / "checkpoint").exists()


@pytest.mark.parametrize("present", [True, False])
def test_a_symbolic_link_stays_and_its_target_is_written(
    tmp_path: Path, tiny_base: str, problems: str, *, present: bool
) -> None:
    names = ("trained", "converted")
    for name in names:
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        if present:
            (tmp_path / "disk" / name).mkdir(parents=True)
    adapter = run(tmp_path / "trained", tiny_base, problems, max_steps=1)
    convert(ConvertSettings(adapter=str(adapter.path), rank=2, out=tmp_path / "converted"))
    for name in names:
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "disk" / name / "adapter_model.safetensors").is_file()
    (tmp_path / "found.json").symlink_to(tmp_path / "disk" / "found.json")
    line = ["inspect", "--adapter", str(adapter.path), "--out", str(tmp_path / "found.json")]
    assert main(line) == 0
    assert (tmp_path / "found.json").is_symlink()
    assert read_json(tmp_path / "disk" / "found.json")["layers"]


def test_a_run_with_experts_that_no_row_reaches_has_checkpoints_and_resumes(
    tmp_path: Path, tiny_base: str, problems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(BaseSettings(base=tiny_base))
    base.model.get_submodule("model.layers.0").add_module("expert", nn.Linear(32, 32))

    def trained(name: str, **more: Any) -> Adapter:
        settings = AdaptSettings(
            base=tiny_base, data=(problems,), out=tmp_path / name, rank=4, max_steps=4,
            targets=("q_proj", "expert"), checkpoint_every=2, quiet=True, **more,
        )  # fmt: skip
        return adapt(settings, base)

    whole = trained("whole")
    with monkeypatch.context() as patch, pytest.raises(dies_at_step(patch, 3)):
        trained("killed")
    kept = checkpoint.moments(tmp_path / "killed")
    reached = {name: bool(first.any()) for name, (first, _) in kept.items()}
    assert {name for name, has in reached.items() if not has} == {
        name for name in reached if "expert" in name
    }
    assert_same(whole, trained("killed", resume=True))


def test_the_moments_of_a_parameter_without_gradient_are_zero(tmp_path: Path) -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    optimizer = adamw(model, TrainSettings())
    model["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    parameters = dict(model.named_parameters())
    progress = {field.name: 1 for field in fields(Progress)}
    checkpoint.save(tmp_path, progress, parameters, optimizer, {})
    moments = checkpoint.moments(tmp_path)
    assert moments.keys() == parameters.keys()
    assert moments["used.weight"][0].any()
    assert not moments["idle.weight"][0].any()
    fresh = adamw(model, TrainSettings())
    assert checkpoint.load(tmp_path, parameters, fresh, {}) == progress
    assert {name for name, p in parameters.items() if p in fresh.state} == {
        "used.weight", "used.bias",
    }  # fmt: skip


def test_a_log_line_that_was_cut_off_is_dropped_when_the_log_goes_on(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        run.log(step=step, loss=1.0)
    with (tmp_path / METRICS).open("a") as file:
        file.write('\0\0}\n{"step": 2, "lo')
    run.cut_log(2)
    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == [1, 2]


WINDOWS = """
import os, sys
import accelerate, datasets, filelock, peft, psutil, torch, transformers.models.llama
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("pread", "fork", "sched_getaffinity", "getuid", "geteuid"):
    if hasattr(os, name):
        delattr(os, name)
from pathlib import Path
is_file = Path.is_file
Path.is_file = lambda self: not str(self).startswith("/proc/") and is_file(self)
from d2lora.cli import main
from d2lora.data.reading import read_pool
assert read_pool(sys.argv[1:2]).rows[3].values["prompt"]
sys.exit(main(sys.argv[2:]))
"""


def test_training_and_pools_need_nothing_that_only_unix_has(
    tmp_path: Path, tiny_base: str, general: str
) -> None:
    words = ["adapt", "--base", tiny_base, "--data", general, "--out", str(tmp_path / "out")]
    words += ["--max-steps", "1", "--device", "cpu", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WINDOWS, general, *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cost = read_json(tmp_path / "out" / "done.json")["cost"]
    assert cost["peak_memory_bytes"] > 10_000_000


def test_files_have_the_same_bytes_everywhere(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"text": "é"})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "text": "é"\n}\n'.encode()


def test_a_run_is_resumed_on_the_rows_and_the_warm_start_that_it_began_with(
    tmp_path: Path, tiny_base: str, problems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_rows(Path(problems))
    data, out = write_rows(tmp_path / "d.jsonl", rows), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(dies_at_step(patch, 3)):
        run(out, tiny_base, data, checkpoint_every=2)
    edited = [{**rows[0], "answer": rows[0]["answer"].replace("#### ", "#### 1")}, *rows[1:]]
    write_rows(tmp_path / "d.jsonl", edited)
    with pytest.raises(RunError, match="rows changed since the run was started"):
        run(out, tiny_base, data, checkpoint_every=2, resume=True)
    write_rows(tmp_path / "d.jsonl", rows)
    assert_same(run(tmp_path / "whole", tiny_base, data), run(out, tiny_base, data, resume=True))


@pytest.mark.parametrize(
    ("file", "left"),
    [("state.safetensors", None), ("progress.json", None), ("progress.json", b"{}")],
)
def test_a_damaged_checkpoint_is_an_error_that_says_how_to_go_on(
    tmp_path: Path, tiny_base: str, problems: str, monkeypatch: pytest.MonkeyPatch, file: str,
    left: bytes | None,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(dies_at_step(patch, 3)):
        run(out, tiny_base, problems, checkpoint_every=2)
    path = out / CHECKPOINT / file
    path.write_bytes(path.read_bytes()[:40] if left is None else left)
    with pytest.raises(RunError, match=file):
        run(out, tiny_base, problems, resume=True)
    shutil.rmtree(out / CHECKPOINT)
    assert_same(
        run(tmp_path / "whole", tiny_base, problems), run(out, tiny_base, problems, resume=True)
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda text: "".join(text.splitlines(keepends=True)[:9]),
            "it lacks .*: it was edited or cut off",
        ),
        (lambda _: "", "it is damaged"),
        (lambda _: "\x00[", "it is damaged"),
        (lambda text: text.replace("rank: 4", "rank: 5"), r"other settings \(rank\)"),
    ],
)
def test_settings_that_are_damaged_are_not_called_others(
    tmp_path: Path, tiny_base: str, problems: str, monkeypatch: pytest.MonkeyPatch,
    damage: Any, message: str,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(dies_at_step(patch, 1)):
        run(out, tiny_base, problems)
    path = out / "settings.yaml"
    path.write_text(damage(path.read_text()))
    with pytest.raises(RunError, match=message):
        run(out, tiny_base, problems, resume=True)


def test_settings_of_validation_without_validation_rows_are_warned_of(
    tmp_path: Path, tiny_base: str, problems: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {"validation_fraction": 0.2, "patience": 2, "eval_every": 3}
    done = run(tmp_path / "a", tiny_base, problems, n=1, **asked, quiet=False)
    (warning,) = [w for w in done.manifest.warnings if "without effect" in w]
    assert warning.startswith("--patience and --eval-every")
    assert warning in " ".join(capsys.readouterr().err.split())
    held = run(tmp_path / "b", tiny_base, problems, **asked)
    assert not [w for w in held.manifest.warnings if "without effect" in w]
