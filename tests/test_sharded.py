"""A base divided among processes: what is learnt is what one process learns."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import save_tiny_base
from d2lora import AdaptSettings, SettingsError, adapt
from d2lora.cli import main
from d2lora.embedded import word_problem_rows
from support import dies_at_step, read_rows, write_rows

HERE = Path(__file__).parent
SMALL = [
    "--device", "cpu", "--threads", "1", "--rank", "4", "--batch-size", "5", "--max-steps", "4",
    "--no-fast", "--quiet",
]  # fmt: skip
REFUSED = 2


def in_processes(
    folder: Path, name: str, n: int, cases: list[list[Any]]
) -> list[list[dict[str, int]]]:
    """Run commands in so many processes; return of each what its processes left."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(cases), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*launch, str(n), str(HERE / "in_processes.py"), str(path)],
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [
        [json.loads((folder / f"{name}-{case}-{rank}.json").read_text()) for rank in range(n)]
        for case in range(len(cases))
    ]


def assert_alike(one: Path, other: Path) -> None:
    first, second = (load_file(run / "adapter_model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    assert any(weight.abs().max() > 0 for name, weight in first.items() if "lora_B" in name)
    for name, weight in first.items():
        assert torch.allclose(weight, second[name], rtol=1e-3, atol=1e-5), name
    logs = [read_rows(run / "metrics.jsonl") for run in (one, other)]
    for ours, theirs in zip(*logs, strict=True):
        names = {name for name in ours if "loss" in name or name == "grad_norm"}
        assert names <= theirs.keys()
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (
                ours["step"],
                name,
            )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a Llama, one whose head is its embedding, and bases of other kinds."""
    folder = tmp_path_factory.mktemp("bases")
    llama = save_tiny_base(folder / "llama", 0, num_hidden_layers=4)
    tied = save_tiny_base(folder / "tied", 1, tie_word_embeddings=True)
    found = {"llama": llama, "tied": tied}
    small = {"hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for name, shape in {
        # Its own dropout would be drawn otherwise by other processes.
        "gpt2": {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "resid_pdrop": 0,
            "embd_pdrop": 0,
            "attn_pdrop": 0,
        },
        "mamba": small,
        "mixtral": {**small, **heads, "intermediate_size": 48, "num_local_experts": 4},
    }.items():
        found[name] = save_tiny_base(folder / name, 0)
        vocabulary = json.loads((folder / name / "config.json").read_text())
        kept = {k: vocabulary[k] for k in ("vocab_size", "bos_token_id", "eos_token_id")}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = AutoConfig.for_model(name, **kept, **shape)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    found["olmo_hybrid"] = save_tiny_base(folder / "olmo_hybrid", 0)
    tiny("olmo_hybrid").save_pretrained(folder / "olmo_hybrid")
    return found


REFUSED_WITH = {
    "llama": (
        ["--dora"], ["--init", "pissa"], ["--modules-to-save", "lm_head"],
        ["--add-tokens", "<new>"],
    ),
    "mixtral": (["--targets", "experts"],),
    # transformers would join rows of the queries', keys' and values' filters in a wrong order.
    "olmo_hybrid": (["--init", "fresh"],),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def commands(
    place: Path, bases: dict[str, str], general: str, problems: str
) -> dict[str, list[str]]:
    """Return commands by name, but for where they write."""
    pairs = [
        {"prompt": row["question"], "chosen": row["answer"], "rejected": other["answer"]}
        for row, other in pairwise(word_problem_rows("train", 14))
        if row["answer"] != other["answer"]
    ]
    preferences = write_rows(place / "pairs.jsonl", pairs)
    llama, warm = bases["llama"], str(place / "warm-whole")
    task = ["adapt", "--data", problems, "--n", "13"]
    learning = {
        # Passes of one row: of five rows one process makes three, the other two.
        "warm": ["warmup", "--base", llama, "--data", general, "--m", "20", "--train-rank", "8",
                 "--micro-batch-size", "1", "--validation-fraction", "0.2"],
        "again": [*task, "--base", llama, "--checkpointing", "on", "--micro-batch-size", "1",
                  "--checkpoint-every", "1"],
        "replay": [*task, "--base", llama, "--init", warm, "--replay", general,
                   "--replay-loss", "kl"],
        "dpo": ["adapt", "--base", llama, "--data", preferences, "--objective", "dpo",
                "--init", warm, "--micro-batch-size", "2"],
        **{name: [*task, "--base", bases[name]] for name in ("tied", "gpt2", "mamba", "mixtral")},
    }  # fmt: skip
    return {name: [*words, *SMALL] for name, words in learning.items()}


@pytest.fixture(scope="module")
def left(
    place: Path, bases: dict[str, str], commands: dict[str, list[str]], problems: str
) -> dict[str, list[dict[str, int]]]:
    """Return what two processes left of each command: that learns, dies or is refused."""
    for name, words in commands.items():
        assert main([*words, "--out", str(place / f"{name}-whole")]) == 0
    cases: dict[str, list[Any]] = {
        name: [*words, "--shard-base", "--out", str(place / f"{name}-sharded")]
        for name, words in commands.items()
    }
    again = [*commands["again"], "--shard-base", "--out"]
    cases["dies"] = [3, *again, str(place / "dies")]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(dies_at_step(patch, 3)):
        main([*again, str(place / "goes on")])
    cases["goes on"] = [*again, str(place / "goes on"), "--resume"]
    task = ["adapt", "--data", problems, "--n", "13", *SMALL, "--shard-base"]
    for base, settings in REFUSED_WITH.items():
        for more in settings:
            out = str(place / f"refused-{len(cases)}")
            cases[f"{base} {more[0]}"] = [*task, "--base", bases[base], *more, "--out", out]
    by_svd = [*commands["again"], "--init", "pissa", "--out"]
    assert main([*by_svd, str(place / "pissa-whole")]) == 0
    cases["pissa"] = [*by_svd, str(place / "pissa-copied")]
    return dict(zip(cases, in_processes(place, "two", 2, [*cases.values()]), strict=True))


@pytest.mark.slow
def test_a_sharded_base_learns_what_a_whole_one_does(
    place: Path, commands: dict[str, list[str]], left: dict[str, list[dict[str, int]]]
) -> None:
    for name in commands:
        assert [process["code"] for process in left[name]] == [0, 0]
        assert_alike(place / f"{name}-whole", place / f"{name}-sharded")


@pytest.mark.slow
def test_copies_of_a_base_that_an_initialization_changed_learn_the_same(
    place: Path, left: dict[str, list[dict[str, int]]]
) -> None:
    assert [process["code"] for process in left["pissa"]] == [0, 0]
    assert_alike(place / "pissa-whole", place / "pissa-copied")


@pytest.mark.slow
def test_layers_of_a_sharded_base_are_never_whole_together(
    commands: dict[str, list[str]], left: dict[str, list[dict[str, int]]]
) -> None:
    for name in commands:
        held = left[name][0]
        assert sum(process["n_own"] for process in left[name]) == held["n_all"]
        assert held["n_own"] < 0.6 * held["n_all"]
    assert left["warm"][0]["n_layers"] == 4
    # The next one may come while one computes.
    assert 1 <= left["warm"][0]["n_whole_at_once"] <= 2


@pytest.mark.slow
def test_a_sharded_run_is_resumed_by_another_number_of_processes(
    place: Path, commands: dict[str, list[str]], left: dict[str, list[dict[str, int]]]
) -> None:
    # Of one process the base is whole.
    assert [process["code"] for process in left["goes on"]] == [0, 0]
    assert_alike(place / "again-whole", place / "goes on")
    assert [process["code"] for process in left["dies"]] == [-9, -9]
    assert not (place / "dies" / "done.json").exists()
    again = [*commands["again"], "--shard-base", "--out", str(place / "dies"), "--resume"]
    assert main(again) == 0
    assert_alike(place / "again-whole", place / "dies")


@pytest.mark.slow
def test_what_needs_whole_weights_is_refused_by_every_process(
    left: dict[str, list[dict[str, int]]],
) -> None:
    for base, settings in REFUSED_WITH.items():
        for more in settings:
            codes = [process["code"] for process in left[f"{base} {more[0]}"]]
            assert codes == [REFUSED, REFUSED], more


def test_a_launch_that_would_shard_the_adapter_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_base: str, problems: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    settings = AdaptSettings(base=tiny_base, data=(problems,), out=tmp_path / "out", quiet=True)
    with pytest.raises(SettingsError, match="give --shard-base"):
        adapt(settings)


@pytest.mark.parametrize("other", [{"quantization": "nf4"}, {"dry_run": True}])
def test_settings_that_a_sharded_base_has_no_use_for_are_refused(
    tmp_path: Path, tiny_base: str, problems: str, other: dict[str, Any]
) -> None:
    with pytest.raises(SettingsError, match="--shard-base"):
        AdaptSettings(base=tiny_base, data=(problems,), out=tmp_path, shard_base=True, **other)
