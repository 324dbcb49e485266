"""Batched decoding, greedy or sampled.

Prompts of like length are decoded together, padded on the left; rows that have ended leave the
batch, so a long answer does not keep the others waiting. Shapes: B rows, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from d2lora import fast
from d2lora.adapters.base import Base, causal_model, n_positions
from d2lora.errors import DataError, listed
from d2lora.fast.llama import Llama, LlamaSteps
from d2lora.runtime.rounding import agree

_ROWS_BESIDE = 16
"""Batches of fewer rows are not decoded in parallel: each reads all weights."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Steps(Protocol):
    """Prompts and what was decoded of them so far, in a model's memory."""

    @property
    def slack(self) -> int:
        """How many rows have to end before leaving is cheaper than being computed on."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Compute prompts; return the logits behind each, (B, V)."""
        ...

    def step(self, next_B: Tensor) -> Tensor:
        """Take one token a row; return the logits behind it, (B, V)."""
        ...

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop the other rows; return which row is now where."""
        ...


@dataclass(frozen=True)
class Decoder:
    """A model with what it needs to decode."""

    model: nn.Module
    base: Base
    max_new_tokens: int
    batch_size: int
    sampling: Sampling = Sampling()

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
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        generator = torch.Generator().manual_seed(self.sampling.seed)
        used = fast.used_in(self.model)
        ends = [prompts[order[place]] for place in (0, -1)] if order else []
        llama = self._own_pass(ends) if ends and used.allowed else None
        if llama:
            used.take("Llama decoding")
        greedy = self.sampling.temperature == 0
        n_beside = 1
        if llama and greedy:
            n_beside = min(torch.get_num_threads(), math.ceil(len(order) / _ROWS_BESIDE))
        # As many batches for each worker, of like size.
        n_batches = n_beside * math.ceil(len(order) / (n_beside * self.batch_size))
        size = math.ceil(len(order) / max(1, n_batches)) or 1
        chunks = [order[begin : begin + size] for begin in range(0, len(order), size)]

        def decode(chunk: Sequence[int]) -> list[list[int]]:
            steps = LlamaSteps(llama) if llama else _PlainSteps(self)
            return self._decode([prompts[index] for index in chunk], steps, generator)

        with _side_by_side(n_beside) as each:
            for chunk, outputs in zip(chunks, each(decode, chunks), strict=True):
                yield from zip(chunk, outputs, strict=True)

    @torch.inference_mode()
    def _own_pass(self, ends: Sequence[Sequence[int]]) -> Llama | None:
        """Return the faster pass, if prompts and a token behind each get the model's own logits.

        Args:
            ends: The shortest and the longest prompt.
        """
        llama = Llama.of(causal_model(self.model))
        if llama is None:
            return None
        end_1 = torch.tensor([self.base.eos_id])

        def logits(steps: Steps, prompt: Sequence[int]) -> Tensor:
            return torch.stack([steps.prefill([prompt]), steps.step(end_1)])

        for prompt in ends:
            fast_logits = logits(LlamaSteps(llama), prompt)
            if not agree(fast_logits, logits(_PlainSteps(self), prompt), torch.float32):
                return None
        return llama

    @property
    def stop_ids(self) -> set[int]:
        """EOS, and whatever else the model's generation settings stop at."""
        config = getattr(causal_model(self.model), "generation_config", None)
        named = getattr(config, "eos_token_id", None)
        more = named if isinstance(named, list) else [named]
        return {self.base.eos_id, *(int(i) for i in more if i is not None)}

    @torch.inference_mode()
    def _decode(
        self, prompts: Sequence[Sequence[int]], steps: Steps, generator: torch.Generator
    ) -> list[list[int]]:
        limit, stop = n_positions(self.model), self.stop_ids
        rooms = [min(self.max_new_tokens, limit - len(prompt)) for prompt in prompts]
        outputs: list[list[int]] = [[] for _ in prompts]
        owners = list(range(len(prompts)))
        going = set(owners)
        logits_BV = steps.prefill(prompts)
        while True:
            next_B = choose(logits_BV, self.sampling, generator)
            for row, token in enumerate(next_B.tolist()):
                if row not in going:
                    continue
                output = outputs[owners[row]]
                if token not in stop:
                    output.append(token)
                if token in stop or len(output) == rooms[owners[row]]:
                    going.remove(row)
            if not going:
                return outputs
            if len(owners) - len(going) >= steps.slack:
                order = steps.keep(sorted(going))
                owners = [owners[row] for row in order]
                going = set(range(len(order)))
                next_B = next_B[order]
            logits_BV = steps.step(next_B)


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


class _PlainSteps:
    """Any causal language model, by transformers' own pass and cache."""

    slack = 1

    def __init__(self, decoder: Decoder) -> None:
        self._causal = causal_model(decoder.model)
        self._pad_id = decoder.base.pad_id
        self._cache = DynamicCache(config=self._causal.config)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        ids_BT, self._mask_BT = _left_padded(prompts, self._pad_id, self._causal.device)
        self._positions_BT = (self._mask_BT.cumsum(-1) - 1).clamp(min=0)
        return self._logits(ids_BT)

    def step(self, next_B: Tensor) -> Tensor:
        self._mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(len(next_B), 1)], dim=1)
        self._positions_BT = self._positions_BT[:, -1:] + 1
        return self._logits(next_B[:, None])

    def keep(self, rows: Sequence[int]) -> list[int]:
        kept = torch.tensor(rows, device=self._mask_BT.device)
        self._cache.batch_select_indices(kept)
        self._mask_BT, self._positions_BT = self._mask_BT[kept], self._positions_BT[kept]
        return list(rows)

    def _logits(self, ids_BT: Tensor) -> Tensor:
        output = self._causal(
            input_ids=ids_BT,
            attention_mask=self._mask_BT,
            position_ids=self._positions_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


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


def choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Return the next token of each row, shape (B,)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probabilities_BV = (logits_BV.float() / sampling.temperature).softmax(-1).cpu()
    sorted_BV, order_BV = probabilities_BV.sort(descending=True)
    # A token is kept while the mass before it is below top_p; the first always is.
    sorted_BV[sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p] = 0
    drawn_B1 = torch.multinomial(sorted_BV, 1, generator=generator)
    return order_BV.gather(1, drawn_B1)[:, 0].to(logits_BV.device)


def _left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), longest), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    return ids_BT.to(device), mask_BT.to(device)
