"""The one switch of the fast paths: they are used inside its block alone, and recorded.

    with fast.enabled(model, when=settings.fast) as used:
        ...
    used.names

Scoring and decoding ask `used_in(model)`; outside a block every path is plain.
"""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from d2lora.fast.layers import passes_of
from d2lora.fast.matmul import few_shapes_kept


@dataclass
class Used:
    """Whether fast paths may be used, and those that were."""

    allowed: bool
    taken: set[str] = field(default_factory=set[str])

    @property
    def names(self) -> list[str]:
        """Names of the fast paths used, sorted."""
        return sorted(self.taken)

    def take(self, name: str) -> None:
        """Record that a fast path is used."""
        assert self.allowed
        self.taken.add(name)


_PLAIN = Used(allowed=False)
_OPEN: WeakKeyDictionary[nn.Module, Used] = WeakKeyDictionary()
"""Every module that is inside a block."""


@contextmanager
def enabled(model: nn.Module, *, when: bool) -> Generator[Used]:
    """Use fast paths of a model inside the block, where `when` allows it.

    Layers get their fast `forward`, but for those to which somebody else gave one.

    Raises:
        RuntimeError: If the model, or a part of it, is inside such a block already.
    """
    modules = list(model.modules())
    if any(module in _OPEN for module in modules):
        raise RuntimeError("the fast paths of this model are switched already: blocks do not nest")
    used = Used(allowed=when)
    passes = passes_of(model) if when else []
    for layer, name, forward in passes:
        used.take(name)
        layer.forward = forward
    _OPEN.update(dict.fromkeys(modules, used))
    try:
        with few_shapes_kept() if when else nullcontext():
            yield used
    finally:
        for module in modules:
            _OPEN.pop(module, None)
        for layer, _, forward in passes:
            if vars(layer).get("forward") is forward:
                del layer.forward


def used_in(model: nn.Module) -> Used:
    """Return the record of the block that a model is in; outside of one nothing is allowed."""
    return _OPEN.get(model, _PLAIN)
