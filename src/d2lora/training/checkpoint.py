"""The state of a run on disk: safetensors and JSON, never pickle, never half-written."""

from collections.abc import Mapping, MutableMapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW

from d2lora.errors import RunError, first_line
from d2lora.runtime.run_folder import CHECKPOINT, new_folder, read_json, restore, write_json
from d2lora.training.progress import Progress

STATE, PROGRESS = "state.safetensors", "progress.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def exists(run_path: Path) -> bool:
    """Say whether a run has a checkpoint, be it one that was being replaced."""
    restore(run_path / CHECKPOINT)
    return (run_path / CHECKPOINT / PROGRESS).is_file()


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
    with new_folder(run_path / CHECKPOINT) as folder:
        save_file(whole, folder / STATE)
        write_json(folder / PROGRESS, dict(progress))


def load(
    run_path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: AdamW,
    best: MutableMapping[str, Tensor],
) -> dict[str, Any]:
    """Restore what `save` wrote, in place; return the progress.

    Raises:
        RunError: If the checkpoint is damaged, or of another adapter shape.
    """
    tensors, progress = _tensors(run_path), read_json(run_path / CHECKPOINT / PROGRESS)
    if progress.keys() != {field.name for field in fields(Progress)}:
        raise RunError(f"{run_path / CHECKPOINT / PROGRESS}: it is damaged; {_again(run_path)}")
    shapes = {name: weight.shape for name, weight in tensors.items() if name.startswith("weight/")}
    if shapes != {f"weight/{name}": parameter.shape for name, parameter in parameters.items()}:
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
    return progress


def _tensors(run_path: Path) -> dict[str, Tensor]:
    path = run_path / CHECKPOINT / STATE
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: it is damaged ({first_line(error)}); {_again(run_path)}") from None


def _again(run_path: Path) -> str:
    return f"remove {run_path / CHECKPOINT}, and --resume starts the run from its beginning"


def moments(run_path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return Adam's two moments of each parameter in a run's checkpoint; zeros without gradient."""
    tensors = _tensors(run_path)
    weights = {n.removeprefix("weight/"): w for n, w in tensors.items() if n.startswith("weight/")}
    return {
        name: (
            tensors.get(f"exp_avg/{name}", torch.zeros_like(weight)),
            tensors.get(f"exp_avg_sq/{name}", torch.zeros_like(weight)),
        )
        for name, weight in weights.items()
    }
