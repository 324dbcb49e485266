"""Batched decoding, greedy or sampled.

Prompts of like length are decoded together, see `steps`; rows that have ended leave the batch, so
a long answer does not keep the others waiting. Shapes: B rows, T tokens, V vocabulary.
"""

import math
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from d2lora import fast
from d2lora.adapters.base import Base, causal_model, n_positions, short_factor_limit
from d2lora.errors import DataError, listed
from d2lora.evaluation.steps import Recomputed, Steps, alone, steps_of
from d2lora.fast.llama import Llama, LlamaSteps
from d2lora.runtime.attempts import succeeds
from d2lora.runtime.rounding import agree
from d2lora.settings.seeds import stream_seed

_COLD = 1e-6
"""Below this temperature the likeliest token is as good as certain, and logits over it overflow."""
_ROWS_BESIDE = 16
"""Batches of fewer rows are not decoded in parallel: each reads all weights."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < _COLD

    def draws(
        self, rows: Sequence[int], n_tokens: int, n_begun: Sequence[int] | None = None
    ) -> Tensor:
        """Return what decides each token, uniform in [0, 1), shape (B, T).

        A row has its own, so that its answer depends neither on the rows that it is decoded with
        nor on how.

        Args:
            rows: Numbers of the prompts.
            n_tokens: Tokens to draw.
            n_begun: Tokens of each answer that were drawn before; 0 if None.
        """
        if self.is_greedy:
            return torch.zeros(1, 1).expand(len(rows), n_tokens)
        streams = (stream_seed(self.seed, f"answer {row}") for row in rows)
        generators = (torch.Generator().manual_seed(stream) for stream in streams)
        drawn = [
            torch.rand(n + n_tokens, generator=generator)[n:]
            for n, generator in zip(n_begun or [0] * len(rows), generators, strict=True)
        ]
        return torch.stack(drawn)


@dataclass(frozen=True)
class Decoder:
    """A model with what it needs to decode."""

    model: nn.Module
    base: Base
    max_new_tokens: int
    batch_size: int
    sampling: Sampling = Sampling()
    say: Callable[[str], None] | None = None
    """Gets a message where decoding is slow. None: there is none."""

    def complete(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        """Yield (index of the prompt, ids of its completion without EOS), as batches end.

        On several cores greedy batches are decoded side by side, where the faster pass is taken:
        fast paths are enabled, and it gives the model's own logits. A row gets as many tokens as
        there is room for behind its own prompt, at most `max_new_tokens`.

        Raises:
            DataError: As `check_room`.
        """
        places = [f"prompt {number}" for number in range(1, len(prompts) + 1)]
        check_room(prompts, places, self.model, self.max_new_tokens)
        limit = short_factor_limit(self.model)
        short = {row: prompt for row, prompt in enumerate(prompts) if len(prompt) <= limit}
        long = {row: prompt for row, prompt in enumerate(prompts) if len(prompt) > limit}
        begun: dict[int, list[int]] = {}
        for row, output in self._continued(short, begun, limit):
            text = [*short[row], *output]
            if len(text) > limit and len(output) < self._room(short[row]):
                long[row], begun[row] = text, output  # computed anew, with the long factors
            else:
                yield row, output
        for row, output in self._continued(long, begun):
            yield row, [*begun.get(row, []), *output]

    def _continued(
        self,
        prompts: Mapping[int, Sequence[int]],
        begun: Mapping[int, Sequence[int]],
        limit: int = sys.maxsize,
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield (row, ids that follow it), as batches end.

        Args:
            prompts: By row.
            begun: What of a row's prompt is the beginning of its answer.
            limit: The tokens of a row beyond which it is left.
        """
        order = sorted(prompts, key=lambda row: len(prompts[row]))
        if not order:
            return
        ends = [prompts[order[place]] for place in (0, -1)]
        llama, new_steps = self._steps(ends, limit)
        n_beside = 1
        if llama and self.sampling.is_greedy:
            n_beside = min(torch.get_num_threads(), math.ceil(len(order) / _ROWS_BESIDE))

        def decode(chunk: Sequence[int]) -> list[list[int]]:
            rows = [prompts[row] for row in chunk]
            n_begun = [len(begun.get(row, ())) for row in chunk]
            rooms = [
                min(self._room(prompt), self.max_new_tokens - n, limit + 1 - len(prompt))
                for prompt, n in zip(rows, n_begun, strict=True)
            ]
            draws_BT = self.sampling.draws(chunk, max(rooms), n_begun)
            return self._decode(rows, rooms, new_steps(), draws_BT)

        together = [order] if new_steps().pads else _of_one_length(order, prompts)
        chunks = [chunk for rows in together for chunk in self._chunks(rows, n_beside)]
        with _side_by_side(n_beside) as each:
            for chunk, outputs in zip(chunks, each(decode, chunks), strict=True):
                yield from zip(chunk, outputs, strict=True)

    def _room(self, prompt: Sequence[int]) -> int:
        """Return how many tokens may follow a prompt."""
        return min(self.max_new_tokens, n_positions(self.model) - len(prompt))

    def _chunks(self, order: Sequence[int], n_beside: int) -> list[Sequence[int]]:
        """Cut rows into batches of like size, as many for each worker."""
        n_batches = n_beside * math.ceil(len(order) / (n_beside * self.batch_size))
        size = math.ceil(len(order) / n_batches)
        return [order[begin : begin + size] for begin in range(0, len(order), size)]

    @torch.inference_mode()
    def _steps(self, ends: Sequence[Sequence[int]], limit: int) -> tuple[bool, Callable[[], Steps]]:
        """Return whether the fast pass is taken, and what makes the steps of a batch.

        The fast one is, where it is allowed and prompts and a token behind each get the model's own
        logits.

        Args:
            ends: The shortest and the longest prompt.
            limit: The tokens of a row beyond which it is left.
        """
        causal, used, token = causal_model(self.model), fast.used_in(self.model), self.base.eos_id
        llama = Llama.of(causal) if used.allowed else None
        if llama and succeeds(partial(_equal, llama, causal, ends, token)):
            used.take("Llama decoding")
            return True, partial(LlamaSteps, llama)
        steps = steps_of(causal, self.base.pad_id, ends, token, limit)
        if steps.func is Recomputed and self.say:
            self.say(
                "warning: with its cache the model gives other numbers than alone, so each answer "
                "is computed anew at every token, which is slow"
            )
        return False, steps

    @property
    def stop_ids(self) -> set[int]:
        """EOS, and whatever else the model's generation settings stop at."""
        config = getattr(causal_model(self.model), "generation_config", None)
        named = getattr(config, "eos_token_id", None)
        more = named if isinstance(named, list) else [named]
        return {self.base.eos_id, *(int(i) for i in more if i is not None)}

    @torch.inference_mode()
    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        rooms: Sequence[int],
        steps: Steps,
        draws_BT: Tensor,
    ) -> list[list[int]]:
        stop = self.stop_ids
        outputs: list[list[int]] = [[] for _ in prompts]
        owners = list(range(len(prompts)))
        going = set(owners)
        logits_BV = steps.prefill(prompts)
        for draws_B in draws_BT.T:
            next_B = choose(logits_BV, self.sampling, draws_B[owners])
            for row, token in enumerate(next_B.tolist()):
                if row not in going:
                    continue
                output = outputs[owners[row]]
                if token not in stop:
                    output.append(token)
                if token in stop or len(output) == rooms[owners[row]]:
                    going.remove(row)
            if not going:
                break
            if len(owners) - len(going) >= steps.slack:
                order = steps.keep(sorted(going))
                owners = [owners[row] for row in order]
                going = set(range(len(order)))
                next_B = next_B[order]
            logits_BV = steps.step(next_B)
        return outputs


def check_room(
    prompts: Sequence[Sequence[int]], places: Sequence[str], model: nn.Module, max_new_tokens: int
) -> str | None:
    """Check that every prompt leaves room for an answer.

    Args:
        prompts: Their token ids.
        places: Where each comes from, for messages.
        model: The model that is to answer.
        max_new_tokens: The tokens that an answer may have.

    Returns:
        A message on prompts that leave room for a shorter answer only; None without any.

    Raises:
        DataError: If prompts leave no room at all; it names all of them.
    """
    limit = n_positions(model)
    full = [
        f"{place}: {len(prompt):,} tokens"
        for place, prompt in zip(places, prompts, strict=True)
        if len(prompt) >= limit
    ]
    if full:
        raise DataError(
            f"{len(full)} of {len(prompts)} prompts leave no room for an answer: the base takes "
            f"{limit:,} tokens, prompt and answer together; shorten them or leave them out:\n"
            f"{listed(full)}"
        )
    n_short = sum(len(prompt) + max_new_tokens > limit for prompt in prompts)
    if not n_short:
        return None
    return (
        f"{n_short} of {len(prompts)} prompts leave room for fewer than {max_new_tokens} new "
        f"tokens: the base takes {limit:,}, prompt and answer together"
    )


def _equal(
    llama: Llama, causal: PreTrainedModel, ends: Sequence[Sequence[int]], token: int
) -> bool:
    for prompt in ends:
        steps = LlamaSteps(llama)
        found_2V = torch.cat([steps.prefill([prompt]), steps.step(torch.tensor([token]))])
        known_2V = torch.cat([alone(causal, ids) for ids in (prompt, [*prompt, token])])
        if not agree(found_2V, known_2V, torch.float32):
            return False
    return True


def _of_one_length(
    order: Sequence[int], prompts: Mapping[int, Sequence[int]]
) -> Iterator[list[int]]:
    for _, rows in groupby(order, key=lambda row: len(prompts[row])):
        yield list(rows)


@contextmanager
def _side_by_side(n_workers: int) -> Generator[Callable[..., Iterator[Any]]]:
    """Yield a `map` over Python threads that share torch's threads among them.

    Operations on a few rows do not fill several cores; batches of their own do.
    """
    if n_workers == 1:
        yield map
        return
    n_threads = torch.get_num_threads()
    share = (max(1, n_threads // n_workers),)
    pool = ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=share)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n_threads)  # a worker's number is that of later threads, too


def choose(logits_BV: Tensor, sampling: Sampling, draws_B: Tensor) -> Tensor:
    """Return the next token of each row, shape (B,).

    Args:
        logits_BV: Logits.
        sampling: How to choose.
        draws_B: Of `Sampling.draws`: the share of the probability before the token to take.
    """
    if sampling.is_greedy:
        return logits_BV.argmax(-1)
    probabilities_BV = (logits_BV.float() / sampling.temperature).softmax(-1).cpu()
    sorted_BV, order_BV = probabilities_BV.sort(descending=True, stable=True)
    # A token is kept while the mass before it is below top_p; the first always is.
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    sorted_BV[:, 1:][before_BV[:, 1:] >= sampling.top_p] = 0
    reached_BV = sorted_BV.double().cumsum(-1)
    wanted_B1 = draws_B.double()[:, None] * reached_BV[:, -1:]
    last_B1 = (sorted_BV > 0).sum(-1, keepdim=True) - 1
    drawn_B1 = (reached_BV <= wanted_B1).sum(-1, keepdim=True).minimum(last_B1)
    return order_BV.gather(1, drawn_B1)[:, 0].to(logits_BV.device)
