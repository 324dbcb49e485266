"""The state of a run on disk: safetensors and JSON, never pickle, never half-written."""

import json
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW

from d2lora.errors import RunError
from d2lora.runtime.run_folder import new_folder, restore, write_json

FOLDER = "checkpoint"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def exists(run_path: Path) -> bool:
    """Say whether a run has a checkpoint, be it one that was being replaced."""
    restore(run_path / FOLDER)
    return (run_path / FOLDER / "progress.json").is_file()


def save(
    run_path: Path,
    progress: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: AdamW,
    best: Mapping[str, Tensor],
) -> None:
    """Write weights, moments, the best weights so far and the random state."""
    tensors: dict[str, Tensor] = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    for name, parameter in parameters.items():
        tensors[f"weight/{name}"] = parameter.detach()
        # A parameter without a gradient so far, as of an expert never routed to, has none.
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = value
    tensors |= {f"best/{name}": value for name, value in best.items()}
    whole = {name: value.cpu().contiguous() for name, value in tensors.items()}
    with new_folder(run_path / FOLDER) as folder:
        save_file(whole, folder / "state.safetensors")
        write_json(folder / "progress.json", dict(progress))


def load(
    run_path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: AdamW,
    best: MutableMapping[str, Tensor],
) -> dict[str, Any]:
    """Restore what `save` wrote, in place; return the progress.

    Raises:
        RunError: If the checkpoint is of another adapter shape.
    """
    tensors = load_file(run_path / FOLDER / "state.safetensors")
    if {name for name in tensors if name.startswith("weight/")} != {
        f"weight/{name}" for name in parameters
    }:
        raise RunError(
            f"{run_path}: the checkpoint has another adapter shape; remove the run and start again"
        )
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"weight/{name}"])
        places = dict.fromkeys(_MOMENTS, parameter.device)
        if not optimizer.defaults["fused"]:
            places["step"] = torch.device("cpu")
        if f"step/{name}" in tensors:
            optimizer.state[parameter] = {
                moment: tensors[f"{moment}/{name}"].to(place) for moment, place in places.items()
            }
    for name, value in tensors.items():
        if name.startswith("best/"):
            own = name.removeprefix("best/")
            best[own] = value.to(parameters[own].device)
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    return json.loads((run_path / FOLDER / "progress.json").read_text(encoding="utf-8"))


def moments(run_path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return Adam's two moments of each parameter in a run's checkpoint; zeros without gradient."""
    tensors = load_file(run_path / FOLDER / "state.safetensors")
    weights = {n.removeprefix("weight/"): w for n, w in tensors.items() if n.startswith("weight/")}
    return {
        name: (
            tensors.get(f"exp_avg/{name}", torch.zeros_like(weight)),
            tensors.get(f"exp_avg_sq/{name}", torch.zeros_like(weight)),
        )
        for name, weight in weights.items()
    }
