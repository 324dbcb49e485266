"""Gradients of rows in few numbers: how training on a row moves an adapter.

LESS (Xia et al. 2024, arXiv 2402.04333): after a short warm-up, the step that Adam would take on a
pool row is compared with the plain gradient of a task row. Ours differ from the paper's in two
ways, both for cost: one checkpoint, at the warm-up's end, instead of one per epoch; and a count
sketch (Charikar et al. 2002; Weinberger et al. 2009, arXiv 0902.2206) in place of a dense random
projection. Either gives inner products without bias; the sketch costs one addition an entry.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from d2lora import fast
from d2lora.adapters.attach import detach_adapter
from d2lora.adapters.base import Base
from d2lora.adapters.lora import LoraShape, attach_fresh
from d2lora.data.batches import Encoded, collate
from d2lora.data.encode import Encoder
from d2lora.data.rows import Example
from d2lora.runtime.console import Reporter
from d2lora.runtime.run_folder import RunFolder
from d2lora.scoring.scorer import TokenScorer
from d2lora.selection.cache import Array
from d2lora.settings import TrainSettings
from d2lora.training import checkpoint
from d2lora.training.lesson import Lesson
from d2lora.training.loop import train
from d2lora.training.objectives import SFT

RANK = 8
LEARNING_RATE = 1e-3
_EPSILON = 1e-8


@dataclass(frozen=True)
class Sketch:
    """A seeded linear map from n numbers to few that keeps inner products on average."""

    bucket: Tensor
    sign: Tensor
    width: int

    @classmethod
    def of(cls, n: int, width: int, seed: int) -> Self:
        """Draw the map."""
        generator = torch.Generator().manual_seed(seed)
        bucket = torch.randint(width, (n,), generator=generator)
        sign = torch.randint(2, (n,), generator=generator) * 2.0 - 1.0
        return cls(bucket, sign, width)

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the image of a vector of shape (n,), shape (width,)."""
        bucket, sign = self.bucket.to(vector.device), self.sign.to(vector.device)
        zeros = torch.zeros(self.width, device=vector.device)
        return zeros.index_add(0, bucket, vector * sign)


@dataclass(frozen=True)
class Moments:
    """Adam's moments over all trainable numbers, shape (n,), after `step` steps."""

    first: Tensor
    second: Tensor
    step: int
    betas: tuple[float, float]

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the direction of the step that Adam would take on a gradient (LESS, eq. 2)."""
        beta1, beta2 = self.betas
        first = beta1 * self.first + (1 - beta1) * gradient
        second = beta2 * self.second + (1 - beta2) * gradient.square()
        unbiased1 = first / (1 - beta1 ** (self.step + 1))
        unbiased2 = second / (1 - beta2 ** (self.step + 1))
        return unbiased1 / (unbiased2.sqrt() + _EPSILON)


class GradientFeatures:
    """A warmed-up adapter on a base, and the sketched gradients of rows at it."""

    def __init__(
        self, base: Base, encoder: Encoder, sample: Sequence[Example], *, n_steps: int,
        width: int, max_tokens: int, seed: int, reporter: Reporter, fast_when: bool,
    ) -> None:  # fmt: skip
        """Warm up for a few steps on a sample of the pool.

        Args:
            base: The base; its adapter is taken off by `close`.
            encoder: Makes token ids.
            sample: Pool rows to warm up on.
            n_steps: Optimizer steps of 16 rows.
            width: Numbers of a sketched gradient.
            max_tokens: Longer rows are truncated.
            seed: Seed of the adapter, the order of rows and the sketch.
            reporter: Where progress is shown.
            fast_when: Whether fast paths may be used.
        """
        self._base, self._encoder, self._max_tokens = base, encoder, max_tokens
        self._fast = fast_when
        self.width = width
        shape = LoraShape(RANK, 2.0 * RANK, 0.0, ("all-linear",))
        self.model: PeftModel = attach_fresh(base.model, shape, seed)
        settings = TrainSettings(
            max_steps=n_steps, batch_size=16, learning_rate=LEARNING_RATE, seed=seed,
            checkpoint_every=n_steps, schedule="constant",
        )  # fmt: skip
        items = [self._item(example) for example in sample]
        lesson = Lesson(items, [], SFT(), base.pad_id)
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder(Path(folder))
            with fast.enabled(self.model, when=fast_when):
                train(self.model, lesson, settings, run, reporter)
            moments = checkpoint.moments(run.path)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        device = base.model.device
        first = torch.cat([moments[name][0].flatten() for name in names]).to(device)
        second = torch.cat([moments[name][1].flatten() for name in names]).to(device)
        self.moments = Moments(first, second, n_steps, settings.betas)
        self.sketch = Sketch.of(len(first), width, seed)
        self._scorer = TokenScorer(self.model)

    def close(self) -> None:
        """Take the adapter off the base."""
        detach_adapter(self.model)

    def gradient(self, example: Example) -> Tensor:
        """Return the gradient of a row's mean loss over all trainable numbers, shape (n,)."""
        return self._gradient(self._item(example))

    def _gradient(self, item: Encoded) -> Tensor:
        batch = collate([item], self._base.pad_id).to(self._base.model.device)
        for parameter in self._parameters:
            parameter.grad = None
        (-self._scorer(batch).mean()).backward()
        return torch.cat(
            [
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                for p in self._parameters
            ]
        ).float()

    def of_pool(self, examples: Sequence[Example]) -> Array:
        """Return the sketched Adam directions of pool rows, shape (rows, width)."""
        return self._sketched(examples, adam=True)

    def of_task(self, examples: Sequence[Example]) -> Array:
        """Return the sketched gradients of task rows, shape (rows, width)."""
        return self._sketched(examples, adam=False)

    def _sketched(self, examples: Sequence[Example], *, adam: bool) -> Array:
        found = np.empty((len(examples), self.width), dtype=np.float32)
        items = [self._item(example) for example in examples]
        with fast.enabled(self.model, when=self._fast):
            # By length: passes of one shape follow each other, see `batches.WIDTH_STEP`.
            for row in sorted(range(len(items)), key=lambda row: items[row].length):
                gradient = self._gradient(items[row])
                if adam:
                    gradient = self.moments.direction(gradient)
                found[row] = self.sketch(gradient).cpu().numpy()
        return found

    def _item(self, example: Example) -> Encoded:
        return self._encoder.encode(example, self._max_tokens)


def warmup_rows(n_pool: int, n_steps: int) -> int:
    """Return how many pool rows the short warm-up takes: 5 % as in LESS, at least 16 batches."""
    return min(n_pool, max(math.ceil(0.05 * n_pool), 16 * min(n_steps, 16)))
