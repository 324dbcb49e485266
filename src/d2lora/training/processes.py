"""Several processes that take every step together: each a share of the rows, all one gradient.

An adapter is small, so gradients are added up once, when a batch is done. With one process nothing
is sent.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn

from d2lora.adapters.sharding import is_sharded
from d2lora.data.batches import Item

U = TypeVar("U", bound=Item)


@dataclass(frozen=True)
class Processes:
    """This process among those of a run."""

    rank: int
    n: int
    in_step: bool
    """Whether all have to make as many passes, as those of a sharded base take all of them."""

    @classmethod
    def of(cls, model: nn.Module) -> "Processes":
        """Return the processes that torchrun or accelerate started; one without them."""
        device = next(model.parameters()).device
        state = PartialState(cpu=device.type == "cpu")
        return cls(state.process_index, state.num_processes, is_sharded(model))

    def agree(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give all processes the weights of the first."""
        if self.n == 1:
            return
        for parameter in parameters:
            sent = parameter.detach().contiguous()
            broadcast(sent)
            parameter.data.copy_(sent)

    def shares(
        self, items: Sequence[U], cut: Callable[[Sequence[U]], list[list[U]]]
    ) -> list[tuple[list[U], int]]:
        """Return the passes that this process makes of a batch, each with its weight, 1 or 0.

        One of weight 0 is made as others make one then: of a sharded base they would wait for it.
        A process without rows makes one, too, as what is measured has the same names everywhere.

        Args:
            items: The batch, the same in all processes.
            cut: Cuts rows into passes.
        """
        mine = [(group, 1) for group in cut(items[self.rank :: self.n])]
        most = 1
        if self.in_step:
            most = max(len(cut(items[rank :: self.n])) for rank in range(self.n))
        return mine + [(list(items[:1]), 0)] * (most - len(mine))

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in each of them.

        A parameter that has none in any, as of an expert that no token was sent to, has none then.
        """
        if self.n == 1:
            return
        parameters = list(parameters)
        has = [parameter.grad is not None for parameter in parameters]
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        sent = torch.cat([*(g.flatten().float() for g in flat), flat[0].new_tensor(has).float()])
        *gradients, anywhere = self.total(sent).split([*(p.numel() for p in parameters), len(has)])
        for parameter, gradient, some in zip(parameters, gradients, anywhere, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if some else None

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.n == 1:
            return values
        summed = reduce(values, "sum")
        assert isinstance(summed, Tensor)
        return summed
