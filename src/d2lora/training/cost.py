"""What a run cost: tokens, steps, operations, time, memory, trainable parameters."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from d2lora.adapters.base import causal_model, head_weights, n_embedded
from d2lora.fast.probing import without_passes
from d2lora.runtime.attempts import succeeds
from d2lora.runtime.modes import in_evaluation


@dataclass(frozen=True)
class Cost:
    """The price of one run."""

    n_steps: int
    n_tokens: int
    """Tokens run forward and backward, prompts included, padding not; a pair's prompt counts for
    both of its completions."""
    n_supervised_tokens: int
    flops: int | None
    """Floating-point operations, `TrainingFlops`; None: not known."""
    elapsed_s: float
    peak_memory_bytes: int
    n_trainable_parameters: int
    n_prepass_tokens: int = 0
    """Tokens run before training: by a reference policy, or for a data-driven initialization."""
    n_skipped: int = 0
    """Gradients in float16 that overflowed, so that their batch was taken again at another scale
    of the loss."""

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


@dataclass(frozen=True)
class TrainingFlops:
    """Floating-point operations of training a LoRA adapter, forward and backward.

    A sequence of T tokens, P of them supervised, costs

        a T + b T^2 + h P

    For a model of linear layers and attention a is 4 N + 6 R, with N the weights of the frozen
    layers (2 forward, 2 for the gradient of their input; frozen weights need none) and R those of
    the adapter (2 forward, 4 backward); b is 12 W, with W the sum over layers of heads x head size
    (scores and values: 4 forward, 8 backward; what a causal mask or a window hides is counted, as
    in Kaplan et al. 2020 and torch's FlopCounterMode); h is 4 H, with H the weights of the output
    head, used at supervised positions only, and 6 H where it is trained. Padding, norms,
    activations and the optimizer are not counted.

    a and b are measured, with torch's counter on three short rows, so that they are those of any
    architecture: experts of which a token meets some, layers that text does not reach, heads
    narrower than usual. Three rows say, too, whether the operations are such a sum at all.
    """

    per_token: float
    per_square: float
    per_supervised: int

    @classmethod
    def of(cls, model: nn.Module) -> "TrainingFlops | None":
        """Measure a causal language model with what requires a gradient in it.

        Models of one configuration with one adapter's shape are measured once.

        Returns:
            None where the operations do not grow as the formula says, so that they are not known,
            such as those of linear attention in chunks.
        """
        trained = ((n, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad)
        key = causal_model(model).config.to_json_string(), *trained
        if key not in _MEASURED:
            _MEASURED[key] = cls._measured(model)
        return _MEASURED[key]

    @classmethod
    def _measured(cls, model: nn.Module) -> "TrainingFlops | None":
        counts: list[int] = []
        if not succeeds(lambda: counts.extend(_counted(model, n) for n in _LENGTHS) is None):
            return None
        one, two, three = counts
        per_square = (three - 2 * two + one) / (2 * _STEP**2)
        per_token = (two - one) / _STEP - 3 * per_square * _STEP
        left = one - per_token * _STEP - per_square * _STEP**2
        if per_square < 0 or abs(left) > _NEGLIGIBLE * one:
            return None
        # One more product where it is trained: for the gradient of the weight itself.
        per_supervised = sum(
            (6 if weight.requires_grad else 4) * weight.numel() for weight in head_weights(model)
        )
        return cls(per_token - per_supervised, per_square, per_supervised)

    def of_rows(self, n_rows: int, n_tokens: int, n_supervised: int) -> int:
        """Return the operations, forward and backward, of rows that share tokens evenly."""
        of_tokens = self.per_token * n_tokens + self.per_square * n_tokens**2 / n_rows
        return round(of_tokens) + self.per_supervised * n_supervised


_MEASURED: dict[tuple[Any, ...], TrainingFlops | None] = {}
_STEP = 8
_LENGTHS = _STEP, 2 * _STEP, 3 * _STEP
_NEGLIGIBLE = 0.01
"""Share of a row's operations that may not depend on its length, as at the edges of convolutions.
That of chunks, and of adapters on parameters, is more."""


def _counted(model: nn.Module, n_tokens: int) -> int:
    """Count the operations of one row, forward and backward, on the plain path."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids_1T = torch.arange(n_tokens, device=parameters[0].device)[None] % n_embedded(model)
    with (
        without_passes(model),
        in_evaluation(model),
        sdpa_kernel(SDPBackend.MATH),
        _Operations() as counted,
    ):
        loss = model(input_ids=ids_1T, use_cache=False).logits.sum()
        torch.autograd.grad(loss, parameters, allow_unused=True)
    return counted.total


class _Operations(TorchDispatchMode):
    """Counts operations inside its block as torch's FlopCounterMode does, in a tenth of its time.

    Products of groups of rows, each with its own expert's matrix, and products with quantized
    weights are counted, too.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute one operation, and count it."""
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        formula = _FORMULAS.get(packet) or _OF_BITSANDBYTES.get(str(packet))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _of_groups(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _four_bit(x: Tensor, _: Tensor, shape: Sequence[int], *__: Any, **___: Any) -> int:
    return 2 * x.numel() * shape[0]


_OF_BITSANDBYTES: dict[str, Callable[..., int]] = {"bitsandbytes.gemm_4bit": _four_bit}
"""By name, as bitsandbytes is not imported for it; to torch it is one operation."""
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._grouped_mm: _of_groups,  # noqa: SLF001  # it has no other name
}
"""Operation -> how many floating-point operations it takes."""
