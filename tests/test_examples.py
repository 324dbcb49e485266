"""The scripts in examples/ run as they are; other programs import what is there."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from d2lora import WarmStart
from d2lora.embedded import general_rows
from support import REPOSITORY, small_plan, write_rows


def run_example(name: str, *words: str) -> str:
    """Run a script of examples/; return what it prints."""
    done = subprocess.run(
        [sys.executable, REPOSITORY / "examples" / name, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_loop.py", "with_trl.py", "with_trainer.py"])
def test_an_example_trains_from_a_warm_start_to_a_plain_adapter(
    name: str, tiny_base: str, warm_start: WarmStart, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", general_rows("train", 4))
    out = tmp_path / "adapter"
    run_example(name, tiny_base, str(warm_start.path), rows, str(out))
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(out))
    before = warm_start.apply_to(AutoModelForCausalLM.from_pretrained(tiny_base)).state_dict()
    moved = [n for n, v in adapter.state_dict().items() if "lora_" in n and (v != before[n]).any()]
    assert moved


@pytest.mark.slow
def test_the_example_of_a_study_prints_a_verdict_for_each_size(
    tiny_base: str, general: str, titles: str, tmp_path: Path
) -> None:
    plan = {**small_plan(tmp_path, tiny_base, general, titles), "arms": ["fresh", "warm"]}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")
    printed = run_example("study.py", str(path), str(tmp_path / "out"))
    assert "n = 4" in printed
    assert "n = 8" in printed


PROGRAMS = [
    path
    for folder in ("benchmarks", "examples", "scripts")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_what_programs_beside_the_package_use_of_it_is_there(path: Path) -> None:
    tree, modules = ast.parse(path.read_text("utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("d2lora"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                modules[alias.asname or alias.name] = getattr(module, alias.name)
    # What a module is seen to lack would also be set there, and then changes nothing.
    used = [
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    for name, attribute in used:
        if inspect.ismodule(modules.get(name)):
            assert hasattr(modules[name], attribute), f"{name}.{attribute}"
