"""What a run cost: tokens, steps, operations, time, memory, trainable parameters."""

import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Cost:
    """The price of one run."""

    n_steps: int
    n_tokens: int
    """Tokens run forward and backward, prompts included, padding not; a pair's prompt counts for
    both of its completions."""
    n_supervised_tokens: int
    flops: int
    """Floating-point operations by formula: `TrainingFlops`."""
    elapsed_s: float
    peak_memory_bytes: int
    n_trainable_parameters: int
    n_prepass_tokens: int = 0
    """Tokens run before training: by a reference policy, or for a data-driven initialization."""

    def to_json(self) -> dict[str, Any]:
        """Return the cost as plain values."""
        return asdict(self)


def reset_peak_memory(device: torch.device) -> bool:
    """Reset the peak of memory to what is in use, so that it is that of one run.

    Linux resets the peak of a process where 5 is written to `clear_refs` (proc(5)). Elsewhere, and
    where that is forbidden, the peak stays that of the whole process.

    Returns:
        Whether it could be done.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used since the reset: of the GPU, or of the process on a CPU.

    A process holds its libraries and the base beside what a run takes. Where the peak cannot be
    reset it is that of all runs of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        peaks = re.findall(r"^VmHWM:\s+(\d+) kB$", status.read_text("utf-8"), re.MULTILINE)
        if peaks:
            return int(peaks[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows keeps the peak elsewhere
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _share(weights: nn.Parameter, config: Any) -> float:
    """Return the share of the experts in a tensor, (experts, out, in), that a token is sent to."""
    n_chosen = next((getattr(config, n) for n in _CHOSEN if getattr(config, n, None)), None)
    return min(1.0, n_chosen / len(weights)) if n_chosen else 1.0


_CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "num_experts_per_token")


@dataclass(frozen=True)
class TrainingFlops:
    """Floating-point operations of training a LoRA adapter, by formula.

    A sequence of T tokens, P of them supervised, costs

        4 N T + 6 R T + 12 W T^2 + 4 H P

    with N the weights of frozen linear layers (2 N T forward, 2 N T for the gradient of their
    input; frozen weights need none), R those of the adapter (2 forward, 4 backward), W the sum
    over layers of heads x head size (scores and values: 4 W T^2 forward, 8 backward; the half
    above the diagonal is counted, as in Kaplan et al. 2020 and torch's FlopCounterMode) and H
    the weights of the output head, used at supervised positions only. Padding, norms,
    activations and the optimizer are not counted. The first layer's inputs need no gradient, so
    the count is a few percent high for a model of few layers. Of experts in one tensor those count
    that a token is sent to.
    """

    n_linear: int
    n_adapter: int
    attention_width: int
    n_head: int

    @classmethod
    def of(cls, model: nn.Module, config: Any) -> "TrainingFlops":
        """Count a model's weights; the adapter's are those that require a gradient."""
        config = config.get_text_config()
        head = getattr(model, "get_output_embeddings", lambda: None)()
        n_linear = sum(
            module.weight.numel()
            for module in model.modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
            if not module.weight.requires_grad
        )
        n_experts = sum(
            weights.numel() * _share(weights, config)
            for module in model.modules()
            if not isinstance(module, nn.Conv1d)
            for weights in module.parameters(recurse=False)
            if weights.ndim == 3
        )
        n_heads = getattr(config, "num_attention_heads", None) or 0  # Mamba has none
        head_size = getattr(config, "head_dim", None) or config.hidden_size // max(1, n_heads)
        if getattr(config, "qk_nope_head_dim", None):  # scores and values of different width
            of_scores = config.qk_nope_head_dim + config.qk_rope_head_dim
            head_size = (of_scores + config.v_head_dim) / 2
        return cls(
            n_linear=n_linear + round(n_experts),
            n_adapter=sum(p.numel() for p in model.parameters() if p.requires_grad),
            attention_width=round(config.num_hidden_layers * n_heads * head_size),
            n_head=config.vocab_size * config.hidden_size,
        )

    def of_rows(self, n_rows: int, n_tokens: int, n_supervised: int) -> int:
        """Return the operations, forward and backward, of rows that share tokens evenly."""
        linear = 4 * self.n_linear + 6 * self.n_adapter
        attention = 12 * self.attention_width * n_tokens**2 // n_rows
        return linear * n_tokens + attention + 4 * self.n_head * n_supervised
