"""How a batch is cut into forward passes, and what is tried where one does not fit into memory.

What comes out does not depend on it: micro-batches add up to the same gradient, and layers that are
computed again compute the same.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from d2lora.data.batches import Item, T, micro_batches, padded_width
from d2lora.errors import TrainingError, counted
from d2lora.runtime.attempts import is_out_of_memory
from d2lora.runtime.console import Reporter
from d2lora.scoring.scorer import TokenScorer, pass_tokens
from d2lora.settings import TrainSettings
from d2lora.training.memory import at_most, available, gigabytes, largest, memory_of
from d2lora.training.recomputation import can_recompute, recompute, recomputes

R = TypeVar("R")
U = TypeVar("U", bound=Item)
_SHARE = 0.9
"""Of the free memory, what is planned with."""


def padded_tokens(group: Sequence[Any]) -> int:
    """Return the tokens of a forward pass, padding included."""
    return sum(item.n_rows for item in group) * padded_width(max(item.length for item in group))


def _words(group: Sequence[Any]) -> str:
    rows, longest = sum(item.n_rows for item in group), max(item.length for item in group)
    return f"a pass of {counted(rows, 'row')} of up to {longest} tokens"


@dataclass
class Passes(Generic[T]):
    """The size of forward passes, which falls where memory runs out."""

    model: nn.Module
    scorer: TokenScorer
    max_tokens: int
    max_size: int | None
    may_recompute: bool
    """Whether activation checkpointing may be switched on."""
    may_retry: bool
    """Whether a step may be taken again; not by one of several processes, as others would wait."""
    reporter: Reporter
    _current: Sequence[Any] = field(default_factory=list[Any])

    @classmethod
    def of(
        cls,
        model: nn.Module,
        scorer: TokenScorer,
        settings: TrainSettings,
        reporter: Reporter,
        n_processes: int,
    ) -> "Passes[T]":
        """Return the passes that the settings ask for."""
        device = next(model.parameters()).device
        return cls(
            model,
            scorer,
            pass_tokens(device, settings.micro_batch_tokens),
            settings.micro_batch_size,
            settings.checkpointing == "auto" and can_recompute(model),
            n_processes == 1,
            reporter,
        )

    def cut(self, items: Sequence[U], max_tokens: int | None = None) -> list[list[U]]:
        """Return the groups of items that are run together, of at most so many padded tokens."""
        limit = min(self.max_tokens, max_tokens or self.max_tokens)
        return micro_batches(items, limit, self.max_size)

    def begin(self, group: Sequence[Any]) -> None:
        """Take note of the group that is run now."""
        self._current = group

    def within_memory(self, attempt: Callable[[], R], undo: Callable[[], None]) -> R:
        """Return what an attempt gives; where memory runs out, try again with less at a time.

        Args:
            attempt: Runs groups, each begun here.
            undo: Removes what a failed attempt left.

        Raises:
            TrainingError: If nothing less can be tried.
        """
        while True:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler, whose traceback holds what the attempt computed.
            undo()
            what = f"{_words(self._current)} did not fit into memory"
            now = self._shrink(self._current) if self.may_retry else None
            if now is None:
                raise TrainingError(
                    f"{what}; give --checkpointing on, a lower --max-length, a smaller "
                    "--micro-batch-size, --quantization nf4 or another --device"
                )
            self.reporter.say(f"{what}: {now}; the result does not depend on it")

    def fit(
        self, batch: Sequence[T], share: Callable[[Sequence[T]], Any], room: int | None = None
    ) -> None:
        """Take passes that memory has room for, where the shapes leave that in doubt.

        Args:
            batch: A batch of rows as long as they come.
            share: Runs a pass of some of them, with a gradient.
            room: Bytes that there are. None: what is free now.
        """
        device = next(self.model.parameters()).device
        while True:
            room = int(_SHARE * available(device)) if room is None else room
            group = largest(self.cut(batch))
            if at_most(self.model, padded_tokens(group)) <= room:
                return
            self.model.train()
            n_predicted = sum(item.n_supervised for item in group)
            on = recomputes(self.model)
            need = memory_of(self.model, partial(share, group), n_predicted, recompute=on).to_come
            now = None if need <= room else self._shrink(group)
            if now is None:
                return
            self.reporter.say(
                f"{_words(group)} would take {gigabytes(need)}, and there are {gigabytes(room)}: "
                f"{now}; the result does not depend on it"
            )

    def _shrink(self, group: Sequence[T]) -> str | None:
        """Halve the passes; where one is a single row, compute layers again.

        Returns:
            What is so now; None where there is nothing less.
        """
        self._current = []
        self._free()
        if len(group) > 1:
            self.max_tokens = padded_tokens(group) // 2
            return f"passes have at most {self.max_tokens} tokens now"
        if self.may_recompute and not recomputes(self.model):
            recompute(self.model, on=True)
            return "activation checkpointing is on now"
        return None

    def _free(self) -> None:
        """Give back what is held for later passes."""
        self.scorer.stop_recording()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def undoing(optimizer: Optimizer, device: torch.device) -> Callable[[], None]:
    """Return what removes a step's gradients, and puts the random state back as it is now."""
    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def undo() -> None:
        optimizer.zero_grad()
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)

    return undo
