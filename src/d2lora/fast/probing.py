"""Checks before a fast path replaces a plain one."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Pass(partial):
    """A fast replacement of a module's `forward`."""


def has_own_forward(module: nn.Module) -> bool:
    """Say whether somebody else gave this one module a `forward`, as accelerate's hooks do."""
    own = vars(module).get("forward")
    return own is not None and not isinstance(own, Pass)


def is_hooked(module: nn.Module) -> bool:
    """Say whether a call of a module does more than its class says, so that it must be called."""
    return has_own_forward(module) or any(vars(module).get(name) for name in _HOOKS)


@contextmanager
def without_passes(model: nn.Module) -> Generator[None]:
    """Compute on the plain path inside the block, whatever fast passes the layers have."""
    passes = [(m, vars(m)["forward"]) for m in model.modules() if "forward" in vars(m)]
    replaced = [(m, forward) for m, forward in passes if isinstance(forward, Pass)]
    for module, _ in replaced:
        del module.forward
    try:
        yield
    finally:
        for module, forward in replaced:
            module.forward = forward


class Probed:
    """The lengths of the inputs on which a fast path was compared with the plain one."""

    def __init__(self) -> None:
        """Start with none."""
        self._least, self._most = math.inf, 0

    def lacks(self, shortest: int, longest: int) -> tuple[bool, bool]:
        """Say whether the shortest and the longest of more inputs are to be compared as well.

        Windows of attention and limits of positions show in long inputs alone, so whatever is
        longer than all before is; of shorter ones, those of half the length.
        """
        is_short, is_long = 2 * shortest <= self._least, longest > self._most
        if is_short:
            self._least = shortest
        self._most = max(self._most, longest)
        return is_short, is_long
