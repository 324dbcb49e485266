"""Commands run one after the other in processes of torchrun: `in_processes.py CASES.json`.

A case is a list of words; those of one that begins with a number die before that step. What each
process holds of a base, and how many of its layers are whole at once, is written beside the cases.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from d2lora.adapters.sharding import is_sharded
from d2lora.cli import main
from d2lora.training import phase
from support import dies_at_step


def watch(model: nn.Module, held: dict[str, int]) -> None:
    """Write down what a process holds of a sharded base's layers, while it computes."""
    if not is_sharded(model):
        return
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    frozen: Any = [p for m in layers for p in m.parameters() if not p.requires_grad]
    held["n_own"] = sum(p.to_local().numel() for p in frozen)
    held["n_all"] = sum(p.numel() for p in frozen)
    held["n_layers"] = len(layers)
    held["n_whole_at_once"] = 0

    def count(*_: Any) -> None:
        whole = 0
        for layer in layers:
            own = [p for p in layer.parameters() if not p.requires_grad]
            whole += any(type(p) is nn.Parameter and p.untyped_storage().size() for p in own)
        held["n_whole_at_once"] = max(held["n_whole_at_once"], whole)

    for layer in layers:
        inner = next(layer.children())
        inner.register_forward_pre_hook(count)
        inner.register_full_backward_pre_hook(count)


def run(cases: Path) -> None:
    """Run the cases; leave each its exit code."""
    train = phase.train
    found: dict[str, int] = {}

    def looked_at(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watch(model, found)
        return train(model, *args, **kwargs)

    phase.train = looked_at
    for number, words in enumerate(json.loads(cases.read_text("utf-8"))):
        found.clear()
        dies = isinstance(words[0], int)
        with pytest.MonkeyPatch.context() as patch:
            killed = dies_at_step(patch, words[0]) if dies else ()
            try:
                code = main(words[1:] if dies else words)
            except killed:
                code = -9
        place = cases.parent / f"{cases.stem}-{number}-{os.environ.get('RANK', '0')}.json"
        place.write_text(json.dumps({"code": code, **found}), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
