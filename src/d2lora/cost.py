"""What a run cost: tokens, steps, time, memory, trainable parameters."""

import resource
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Cost:
    """The price of one run."""

    n_steps: int
    n_tokens: int
    """Tokens run forward and backward, prompts included, padding not; a pair's prompt counts for
    both of its completions."""
    n_supervised_tokens: int
    elapsed_s: float
    peak_memory_bytes: int
    n_trainable_parameters: int
    n_prepass_tokens: int = 0
    """Tokens run before training: by a reference policy, or for a data-driven beginning."""

    def to_json(self) -> dict[str, Any]:
        """Return the cost as plain values."""
        return asdict(self)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
