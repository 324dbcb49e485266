"""Memory that a training step takes, known in advance.

weights, adapter     what is loaded
state                gradients, and AdamW's two moments
activations          what a forward pass keeps for its gradient, measured: the pass is run, and what
                     it would keep is counted and thrown away
working              what comes and goes beside it: the gradients within a layer, logits; on a CPU
                     the holes, too, that it leaves in the process's memory

Measured, not derived, so that it is that of the passes that are taken, whatever the architecture.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.modeling_layers import GradientCheckpointingLayer

from d2lora.adapters.base import causal_model, n_embedded
from d2lora.data.batches import T
from d2lora.fast.head import GPU_ROWS, ROWS
from d2lora.training.recomputation import recomputed

_CGROUP = Path("/sys/fs/cgroup")
_ADAM = 2
"""Moments of each parameter, in its dtype."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step takes."""

    weights: int
    """Of the base, as it is loaded."""
    adapter: int
    state: int
    activations: int
    working: int
    other: int
    """In use beside it: the process, its libraries and its data."""

    @property
    def peak(self) -> int:
        """The most at one time."""
        return sum(asdict(self).values())

    @property
    def to_come(self) -> int:
        """What is not in use before the first step."""
        return self.state + self.activations + self.working


class _Kept(saved_tensors_hooks):
    """Counts the bytes that are kept for the backward pass, and keeps none of them."""

    def __init__(self, model: nn.Module) -> None:
        """Count what is not the model's own."""
        own = [*model.parameters(), *model.buffers()]
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._known: dict[int, StorageWeakRef] = {}
        self.n_bytes = 0
        super().__init__(self._pack, _never)

    def _pack(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._known.get(storage.data_ptr())
        if storage.data_ptr() in self._own or (known is not None and not known.expired()):
            return
        self._known[storage.data_ptr()] = StorageWeakRef(storage)
        self.n_bytes += storage.nbytes()


def _never(_: Any) -> Tensor:
    raise AssertionError("nothing was kept")


def kept_bytes(model: nn.Module, forward: Callable[[], Any], *, recompute: bool) -> int:
    """Return the bytes that a forward pass keeps for its gradient; the pass holds none of them."""
    kept = _Kept(model)
    with recomputed(model, on=recompute), torch.random.fork_rng(), kept:
        forward()
    return kept.n_bytes


def memory_of(
    model: nn.Module, forward: Callable[[], Any], n_predicted: int, *, recompute: bool
) -> Memory:
    """Return the memory that a step takes whose largest pass is `forward`.

    Args:
        model: The model with its adapter, in training mode.
        forward: Runs the pass.
        n_predicted: Tokens that it predicts.
        recompute: Whether with activation checkpointing.
    """
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    adapter = sum(map(_bytes_of, trained))
    frozen = {p.untyped_storage().data_ptr(): _bytes_of(p) for p in model.parameters()}
    weights = sum(frozen.values()) - adapter
    before = in_use(device)
    kept = kept_bytes(model, forward, recompute=recompute)
    a_layer = _layer_bytes(model, forward, kept, recompute=recompute)
    left = in_use(device) - before
    return Memory(
        weights,
        adapter,
        (1 + _ADAM) * adapter,
        kept + (a_layer if recompute else 0),
        max(a_layer // 2, _head_bytes(model, n_predicted), left),
        max(0, before - weights - adapter),
    )


def _layer_bytes(
    model: nn.Module, forward: Callable[[], Any], kept: int, *, recompute: bool
) -> int:
    """Return what one layer keeps: the difference that checkpointing makes, by layer."""
    n_layers = sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    if n_layers == 0:
        return 0
    other = kept_bytes(model, forward, recompute=not recompute)
    return abs(other - kept) // n_layers


def _head_bytes(model: nn.Module, n_predicted: int) -> int:
    """Return what logits and their gradients take, of as many positions as are held at once.

    Of a head that is trained beside the adapter those of all are.
    """
    head = causal_model(model).get_output_embeddings()
    n_words = n_embedded(model) if head is None else getattr(head, "out_features", 0)
    if isinstance(head, AuxiliaryTrainingWrapper):
        return 3 * 4 * n_embedded(model) * n_predicted
    on_cpu = next(model.parameters()).device.type == "cpu"
    return 3 * 4 * n_words * min(n_predicted, ROWS if on_cpu else GPU_ROWS)


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def in_use(device: torch.device) -> int:
    """Return the bytes in use: of the GPU by this process, or of the machine's memory by it."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def available(device: torch.device) -> int:
    """Return the bytes that this process can still take."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return min(int(psutil.virtual_memory().available), _left_in_group())


def _left_in_group() -> int:
    """Return what the limit of a container leaves; files in its cache count as free."""
    try:
        limit = int((_CGROUP / "memory.max").read_text("ascii"))
        used = int((_CGROUP / "memory.current").read_text("ascii"))
        lines = (_CGROUP / "memory.stat").read_text("ascii").splitlines()
    except (OSError, ValueError):  # no container, or no limit: "max"
        return 2**63
    cached = sum(int(n) for name, n in map(str.split, lines) if name.endswith("active_file"))
    return max(0, limit - used + cached)


def at_most(model: nn.Module, n_tokens: int) -> int:
    """Return bytes that a pass of so many tokens hardly keeps, from the shapes of layers alone.

    Every linear layer's input and output, three times over, in float32.
    """
    widths = [
        module.in_features + module.out_features
        for name, module in causal_model(model).named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    ]
    return 3 * 4 * n_tokens * sum(widths)


def gigabytes(n_bytes: float) -> str:
    """Return bytes in words."""
    return f"{n_bytes / 1e9:.3g} GB"


def largest(groups: Sequence[list[T]]) -> list[T]:
    """Return the group that takes the most memory: of the most tokens, then the longest rows."""
    return max(groups, key=lambda group: (sum(i.n_tokens for i in group), group[0].length))
