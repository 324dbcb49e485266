"""The command line: quick help, one clear error for each mistake, nothing lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from d2lora.cli import main
from d2lora.commands import COMMANDS
from d2lora.embedded import word_problem_rows
from support import read_rows, write_rows


class Case:
    """Paths that the mistakes below are made with."""

    def __init__(self, folder: Path, base: str, other_base: str, data: str, warm: str) -> None:
        self.folder, self.base, self.other, self.data, self.warm = (
            folder, base, other_base, data, warm,
        )  # fmt: skip
        self.out = str(folder / "out")

    def file(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, general: str) -> str:
    out = str(tmp_path_factory.mktemp("warm") / "start")
    words = f"warmup --base {tiny_base} --data {general} --out {out} --max-steps 2 --rank 4 --quiet"
    assert main(words.split()) == 0
    return out


@pytest.fixture
def case(tmp_path: Path, tiny_base: str, other_base: str, problems: str, warm: str) -> Case:
    return Case(tmp_path, tiny_base, other_base, problems, warm)


MISTAKES = {
    "an unknown command": ("adpt", r"unknown command `adpt`\. Did you mean `adapt`\?"),
    "an unknown option": (
        "adapt --base {base} --data {data} --out {out} --learning-rat 1", r"--learning-rate"
    ),
    "a missing option": ("adapt --base {base} --data {data}", r"out"),
    "a value out of range": (
        "adapt --base {base} --data {data} --out {out} --rank 0", r"greater than or equal to 1"
    ),
    "a value of another type": (
        "adapt --base {base} --data {data} --out {out} --n many", r"many"
    ),
    "a seed that torch does not take": (
        "adapt --base {base} --data {data} --out {out} --seed-init 99999999999999999999",
        r"`seed_init`: input should be less than 9223372036854775808",
    ),
    "more threads than any machine has": (
        "adapt --base {base} --data {data} --out {out} --threads 1000000", r"equal to 4096"
    ),
    "a decay rate of 1": (
        "adapt --base {base} --data {data} --out {out} --betas 0.9 1", r"less than 1"
    ),
    "one fold, which leaves nothing to train on": (
        "adapt --base {base} --data {data} --out {out} --fold 0 1", r"k at least 2"
    ),
    "a device number of twenty digits": (
        "adapt --base {base} --data {data} --out {out} --device cuda:99999999999999999999",
        r"expected auto, cpu",
    ),
    "a file name that is not UTF-8": (
        "adapt --base {base} --data caf\udce9.jsonl --out {out}",
        r"'caf\\udce9\.jsonl' is not UTF-8 text: rename the file",
    ),
    "a date that there is not in a settings file": ("adapt {dated_yaml}", r"month must be in"),
    "an unknown setting in a file": (
        "adapt {unknown_yaml}", r"unknown setting `learning_rte`\. Did you mean `learning_rate`\?"
    ),
    "a number to base 60": (
        "study quick --set steps={{4:8}}", r"found `4:8`, which has no space after its colon"
    ),
    "a number to base 60 in a settings file": ("adapt {colon_yaml}", r"found `1:20`"),
    "a number to base 8": (
        "study quick --set sizes=[016]", r"found `016`, which starts with a zero"
    ),
    "a settings file that is none": ("adapt {not_yaml}", r"not a YAML file"),
    "a missing settings file": ("adapt nowhere.yaml", r"cannot read the settings file"),
    "a missing data file": (
        "adapt --base {base} --data nowhere.jsonl --out {out}", r"nowhere\.jsonl: no such file"
    ),
    "an empty data file": (
        "adapt --base {base} --data {empty} --out {out}", r"the file holds no rows"
    ),
    "bad rows": (
        "adapt --base {base} --data {bad_rows} --out {out}",
        r"bad_rows\.jsonl, line 2: .*--skip-bad-rows|--skip-bad-rows(.|\n)*line 2:",
    ),
    "more rows than there are": (
        "adapt --base {base} --data {data} --out {out} --n 100000", r"the data has 40"
    ),
    "over-long examples": (
        "adapt --base {base} --data {data} --out {out} --max-length 20",
        r"longer than --max-length 20 tokens .*--overlong",
    ),
    "a base that is not there": (
        "adapt --base ./nowhere --data {data} --out {out}", r"\./nowhere: no such folder"
    ),
    "a base without safetensors": (
        "adapt --base {pickled} --data {data} --out {out}", r"no \*\.safetensors"
    ),
    "a base that is cut off": (
        "adapt --base {cut_base} --data {data} --out {out}", r"not a safetensors file, or cut off"
    ),
    "a device that is not there": (
        "adapt --base {base} --data {data} --out {out} --device cuda:7", "0 CUDA devices"
    ),
    "an unknown device": (
        "adapt --base {base} --data {data} --out {out} --device tpu", r"expected auto, cpu"
    ),
    "an unknown target": (
        "adapt --base {base} --data {data} --out {out} --targets q_prj",
        r"no module `q_prj`\. Did you mean `q_proj`\?",
    ),
    "a warm start that is not there": (
        "adapt --base {base} --data {data} --out {out} --init nowhere", r"nowhere: no such folder"
    ),
    "a folder that is no warm start": (
        "adapt --base {base} --data {data} --out {out} --init {base}", r"not a warm start"
    ),
    "a warm start of another base": (
        "adapt --base {other} --data {data} --out {out} --init {warm}", r"has other weights"
    ),
    "a rank that contradicts the warm start": (
        "adapt --base {base} --data {data} --out {out} --init {warm} --rank 8",
        r"--rank 8, but it has 4\. Leave out --rank to inherit",
    ),
    "an alpha that contradicts the warm start": (
        "adapt --base {base} --data {data} --out {out} --init {warm} --alpha 99",
        r"--alpha 99, but it has 8",
    ),
    "targets that contradict the warm start": (
        "adapt --base {base} --data {data} --out {out} --init {warm} --targets q_proj",
        r"--targets q_proj, but it has all-linear",
    ),
    "a chat format that contradicts the warm start": (
        "adapt --base {base} --data {data} --out {out} --init {warm} --chat-format template",
        r"--chat-format template contradicts",
    ),
    "a chat template where there is none": (
        "adapt --base {base} --data {data} --out {out} --chat-format template",
        r"has no chat template",
    ),
    "a run folder with other files": (
        "adapt --base {base} --data {data} --out {base}", r"holds other files"
    ),
    "an option given twice": (
        "adapt --base {base} --data {data} --out {out} --data {data}", r"--data is given 2 times"
    ),
    "nothing to resume": (
        "adapt --base {base} --data {data} --out {out} --resume", r"there is no run to resume"
    ),
    "an adapter that is none": (
        "evaluate --base {base} --adapters {base} --data {data} --out {out}", r"no adapter"
    ),
    "an evaluation of nothing": ("evaluate --base {base} --out {out}", r"nothing to evaluate on"),
    "a generation without a prompt": ("generate --base {base}", r"either --prompt TEXT"),
    "prompts that would be written over": (
        "generate --base {base} --prompts {data} --out {data}", r"is the file of prompts"
    ),
    "a name that leaves no room for temporary files": (
        "generate --base {base} --prompts {data} --out {out}" + "x" * 240, r"name too long"
    ),
    "a rank given twice": (
        "adapt --base {base} --data {data} --out {out} --rank-pattern q_proj=3 q_proj=5",
        r"`q_proj` is given twice",
    ),
    "files of no bytes": (
        "convert --base {base} --adapter {warm} --merge --shard-size 0GB --out {out}",
        r"expected a size with its unit, as in 5GB",
    ),
    "a demo over something else": ("demo --out {base}", r"not a demo"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_gives_one_clear_error_and_exit_code_2(
    mistake: str, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    words, message = MISTAKES[mistake]
    pickled, cut = case.folder / "pickled", case.folder / "cut"
    for folder in (pickled, cut):
        folder.mkdir()
        (folder / "config.json").write_text((Path(case.base) / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    (cut / "model.safetensors").write_bytes(b"\x10\x00")
    line = words.format(
        base=case.base,
        other=case.other,
        data=case.data,
        warm=case.warm,
        out=case.out,
        pickled=pickled,
        cut_base=cut,
        empty=case.file("empty.jsonl", ""),
        bad_rows=case.file("bad_rows.jsonl", '{"question": "q", "answer": "#### 1"}\n{"question"'),
        unknown_yaml=case.file("unknown.yaml", "learning_rte: 1\n"),
        not_yaml=case.file("not.yaml", "a: [\n"),
        colon_yaml=case.file("colon.yaml", "rank: 1:20\n"),
        dated_yaml=case.file("dated.yaml", "out: 2024-13-45\n"),
    )
    try:
        code: object = main(line.split())
    except SystemExit as stopped:  # tyro ends the process itself
        code = stopped.code
    printed = capsys.readouterr()
    text = re.sub(r"[│╭╮╰╯─]|\s+", " ", printed.err + printed.out)
    text = re.sub(r" +", " ", text)
    assert code == 2
    assert re.search(message, printed.err + printed.out) or re.search(message, text)
    assert "Traceback" not in text
    assert not Path(case.out).exists()


def test_bad_rows_can_be_set_aside(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    rows = word_problem_rows("train", 8)
    path = Path(write_rows(case.folder / "some.jsonl", rows))
    path.write_text(path.read_text() + "{broken\n")
    words = f"adapt --base {case.base} --data {path} --out {case.out} --max-steps 1 --skip-bad-rows"
    assert main(words.split()) == 0
    (aside,) = read_rows(Path(case.out) / "bad_rows.jsonl")
    assert (aside["line"], aside["row"]) == (9, "{broken")
    assert "skipped 1 bad row: " in capsys.readouterr().err


def test_options_win_over_the_settings_file_and_the_resolved_settings_are_kept(case: Case) -> None:
    settings = case.file(
        "run.yaml", f"base: {case.base}\ndata: [{case.data}]\nrank: 2\nmax_steps: 1\nseed: 3\n"
    )
    assert main(["adapt", settings, "--out", case.out, "--rank", "3", "--quiet"]) == 0
    saved = (Path(case.out) / "settings.yaml").read_text()
    assert "rank: 3\n" in saved
    assert "seed: 3\n" in saved
    adapter = json.loads((Path(case.out) / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (3, 6.0)


def test_a_finished_run_is_not_overwritten_and_an_unfinished_one_asks_for_resume(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"adapt --base {case.base} --data {case.data} --out {case.out} --max-steps 1 --quiet"
    assert main(words.split()) == 0
    assert main(words.split()) == 2
    assert "holds a finished run" in capsys.readouterr().err
    (Path(case.out) / "done.json").unlink()
    assert main(words.split()) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert main([*words.split(), "--resume", "--learning-rate", "1"]) == 2
    assert "started with other settings (learning_rate)" in capsys.readouterr().err
    assert main([*words.split(), "--resume"]) == 0


def test_every_command_explains_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        for field in command.kind.model_fields:
            option = field.replace("_", "-")
            assert f"--{option}" in shown or f"--no-{option}" in shown


def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    words = [sys.executable, "-m", "d2lora", "adapt", "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from d2lora.cli import main; main(['--help']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'pydantic', 'tyro')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "d2lora", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "d2lora")


def test_no_garbage_is_looked_for_while_libraries_load_and_at_the_end_of_a_process() -> None:
    code = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 0))
from d2lora.runtime.loading import loading
try:
    with loading():
        print(gc.isenabled())
        raise ImportError
except ImportError:
    print(gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]
