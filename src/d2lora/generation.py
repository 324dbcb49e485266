"""Batched decoding, greedy or sampled, and the `generate` command.

Prompts of like length are decoded together, padded on the left; rows that have ended leave the
batch, so a long answer does not keep the others waiting. Shapes: B rows, T tokens, V vocabulary.
"""

import json
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from d2lora.artifacts import Manifest, check_fit, has_manifest
from d2lora.encode import Encoder
from d2lora.errors import DataError, SettingsError
from d2lora.lean import lean_layers
from d2lora.models import Base, attach_adapter, causal_model, detach_adapter, load_base, merged
from d2lora.rows import Message
from d2lora.runs import write_text
from d2lora.settings import GenerateSettings
from d2lora.tasks import read_task


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Decoder:
    """A model with what it needs to decode."""

    model: nn.Module
    base: Base
    max_new_tokens: int
    batch_size: int
    sampling: Sampling = Sampling()

    def complete(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        """Yield (index of the prompt, ids of its completion without EOS), as batches end."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        generator = torch.Generator().manual_seed(self.sampling.seed)
        for begin in range(0, len(order), self.batch_size):
            chunk = order[begin : begin + self.batch_size]
            outputs = self._decode([prompts[index] for index in chunk], generator)
            yield from zip(chunk, outputs, strict=True)

    @property
    def stop_ids(self) -> set[int]:
        """EOS, and whatever else the model's generation settings stop at."""
        config = getattr(causal_model(self.model), "generation_config", None)
        named = getattr(config, "eos_token_id", None)
        more = named if isinstance(named, list) else [named]
        return {self.base.eos_id, *(int(i) for i in more if i is not None)}

    @torch.inference_mode()
    def _decode(
        self, prompts: Sequence[Sequence[int]], generator: torch.Generator
    ) -> list[list[int]]:
        causal = causal_model(self.model)
        device = causal.device
        ids_BT, mask_BT = _left_padded(prompts, self.base.pad_id, device)
        limit = getattr(causal.config, "max_position_embeddings", None) or sys.maxsize
        n_steps = min(self.max_new_tokens, limit - ids_BT.shape[1])
        if n_steps < 1:
            raise DataError(f"a prompt has {ids_BT.shape[1]} tokens; the base takes {limit}")
        stop = torch.tensor(sorted(self.stop_ids), device=device)
        cache = DynamicCache(config=causal.config)
        outputs: list[list[int]] = [[] for _ in prompts]
        alive = list(range(len(prompts)))
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        for _ in range(n_steps):
            logits_BV = causal(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            next_B = choose(logits_BV, self.sampling, generator)
            ended_B = torch.isin(next_B, stop)
            for row, token, ended in zip(alive, next_B.tolist(), ended_B.tolist(), strict=True):
                if not ended:
                    outputs[row].append(token)
            going = (~ended_B).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(alive):
                cache.batch_select_indices(going)
                kept = going.tolist()
                alive = [alive[index] for index in kept]
                next_B, mask_BT, positions_BT = next_B[going], mask_BT[going], positions_BT[going]
            ids_BT = next_B[:, None]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(alive), 1)], dim=1)
            positions_BT = positions_BT[:, -1:] + 1
        return outputs


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


@contextmanager
def adapted(base: Base, adapter: Path | None) -> Generator[nn.Module]:
    """Give the base with an adapter on it, or alone, ready to score and decode fast.

    Raises:
        ModelError: If the adapter was made on another base.
    """
    if adapter is None:
        with lean_layers(base.model):
            yield base.model
        return
    check_fit(adapter, base)
    model = attach_adapter(base.model, adapter, trainable=False)
    try:
        with merged(model), lean_layers(model):
            yield model
    finally:
        detach_adapter(model)


def chat_format_of(adapter: Path | None, wanted: str | None) -> str | None:
    """Return the chat format to prompt an adapter in: as set, else as it was trained."""
    if wanted is not None or adapter is None:
        return wanted
    if has_manifest(adapter):
        return Manifest.read(adapter).chat_format
    return None


def generate(settings: GenerateSettings) -> list[dict[str, Any]]:
    """Complete one prompt or a file of prompts.

    Returns:
        One row per prompt: `prompt` and `output`.

    Raises:
        SettingsError: If not exactly one of `prompt` and `prompts` is given.
        D2LoraError: For a base, an adapter or a file that cannot be used.
    """
    if (settings.prompt is None) == (settings.prompts is None):
        raise SettingsError("give either --prompt TEXT or --prompts FILE")
    conversations = _conversations(settings)
    adapter = Path(settings.adapter) if settings.adapter else None
    base = load_base(settings)
    if adapter:
        check_fit(adapter, base)
    encoder = Encoder.of(base, chat_format_of(adapter, settings.chat_format))
    model = attach_adapter(base.model, adapter, trainable=False) if adapter else base.model
    sampling = Sampling(settings.temperature, settings.top_p, settings.seed)
    decoder = Decoder(model, base, settings.max_new_tokens, settings.batch_size, sampling)
    prompts = [encoder.prompt_ids(conversation) for conversation in conversations]
    outputs = dict(decoder.complete(prompts))
    return [
        {"prompt": conversation[-1].content, "output": decode(base, outputs[index])}
        for index, conversation in enumerate(conversations)
    ]


def decode(base: Base, ids: Sequence[int]) -> str:
    """Return a completion as text."""
    text = base.tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


def _conversations(settings: GenerateSettings) -> list[tuple[Message, ...]]:
    if settings.prompt is not None:
        if not settings.prompt.strip():
            raise SettingsError("--prompt is empty")
        return [(Message("user", settings.prompt),)]
    assert settings.prompts is not None
    path = Path(settings.prompts)
    if path.suffix == ".txt":
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [(Message("user", line),) for line in lines if line.strip()]
    else:
        prompts = [example.prompt for example in read_task([settings.prompts], "prompts").examples]
    if not prompts:
        raise DataError(f"{path}: the file holds no prompts")
    return prompts


def command(settings: GenerateSettings) -> None:
    """Run `d2lora generate`."""
    rows = generate(settings)
    if settings.out:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(settings.out, lines)
    elif len(rows) == 1:
        sys.stdout.write(rows[0]["output"] + "\n")
    else:
        for row in rows:
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
