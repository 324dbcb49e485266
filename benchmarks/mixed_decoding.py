"""Several adapters decoded in one batch over one base: a lever that d2lora itself does not use.

    python benchmarks/mixed_decoding.py --adapters 4 --prompts 16 50 200

Every adapter completes the same GSM8K prompts. One after the other: an adapter is merged, the
weights are laid out and its prompts decoded, as `evaluate` does. In one batch: the base is laid out
once, rows of all adapters are decoded together, and each gets the low-rank products of its own.
These are two products for all adapters, the A_k below one another and the B_k side by side, with a
mask between them. Prints a Markdown table of medians, and how many completions are the same.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from common import base_of, head, parser_of, row, taking_turns
from d2lora import decoding, llama
from d2lora.attaching import merged
from d2lora.decoding import Decoder
from d2lora.encode import Encoder
from d2lora.inits import LoraShape, attach_fresh
from d2lora.lean import lean_layers
from d2lora.models import Base, load_base
from d2lora.products import packed, product
from d2lora.settings import AdaptSettings, BaseSettings, GenerationSettings
from d2lora.tasks import read_task
from sides import RANK

TEST = Path("../shared/data/gsm8k/test.jsonl")
PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The layers whose weights are one product in decoding."""
NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}


def main() -> None:
    """Measure every number of adapters and prompts and print the table."""
    parser = parser_of(__doc__, data=TEST)
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--adapters", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--prompts", nargs="+", type=int, default=[16, 50, 200])
    parser.add_argument("--new-tokens", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    head("base", "adapters", "prompts of each", "one by one, s", "one batch, s", "ratio", "same")
    with tempfile.TemporaryDirectory() as folder:
        settings = BaseSettings(
            base=base_of(args.base, Path(folder), args.data), threads=args.threads
        )
        for k in args.adapters:
            # The side that merges works on a model of its own.
            plain, adapted = load_base(settings), load_base(settings)
            model = with_adapters(adapted, k)
            encoder = Encoder.of(plain, None)
            for n in args.prompts:
                examples = islice(read_task([str(args.data)]).examples, n)
                prompts = [encoder.prompt_ids(example.prompt) for example in examples]
                sides = {
                    "one by one": partial(one_by_one, adapted, model, prompts, k, args.new_tokens),
                    "one batch": partial(one_batch, plain, model, prompts, k, args.new_tokens),
                }
                print_row(args.base, k, n, taking_turns(sides, args.rounds))


def print_row(base: str, k: int, n: int, done: dict[str, list[Any]]) -> None:
    """Print what one number of adapters and prompts took."""
    times = {side: statistics.median(elapsed_s for elapsed_s, _ in of) for side, of in done.items()}
    outputs = [of[-1][1] for of in done.values()]
    same = sum(first == second for first, second in zip(*outputs, strict=True)) / (k * n)
    one_by_one_s, one_batch_s = times.values()
    row(
        base, k, n, f"{one_by_one_s:.2f}", f"{one_batch_s:.2f}",
        f"{one_by_one_s / one_batch_s:.2f}", f"{same:.0%}",
    )  # fmt: skip


def with_adapters(base: Base, k: int) -> Any:
    """Put k adapters on a base, named by their numbers, as different as trained ones."""
    settings = AdaptSettings(data=("unused",), out=Path("unused"), rank=RANK)
    model: Any = attach_fresh(base.model, LoraShape.fresh(settings), 0)
    config = model.peft_config["default"]
    for number in range(k):
        model.add_adapter(str(number), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01, generator=generator)
    return model


def one_by_one(
    base: Base, model: Any, prompts: Sequence[Sequence[int]], k: int, new_tokens: int
) -> tuple[float, list[list[int]]]:
    """Merge, lay out and decode adapter by adapter; return the seconds and all completions."""
    began = time.perf_counter()
    outputs: list[list[int]] = []
    for number in range(k):
        model.set_adapter(str(number))
        decoder = Decoder(model, base, new_tokens, GenerationSettings().batch_size)
        with merged(model), lean_layers(model):
            completed = dict(decoder.complete(prompts))
        outputs += (completed[index] for index in range(len(prompts)))
    return time.perf_counter() - began, outputs


def one_batch(
    base: Base, model: Any, prompts: Sequence[Sequence[int]], k: int, new_tokens: int
) -> tuple[float, list[list[int]]]:
    """Decode the rows of all adapters together; return the seconds and all completions."""
    began = time.perf_counter()
    decoder = Decoder(base.model, base, new_tokens, GenerationSettings().batch_size)
    owned = [Prompt(prompt, number) for number in range(k) for prompt in prompts]
    with (
        patch.object(Decoder, "_own_pass", lambda *_: laid_out(base, model, k)),
        patch.object(decoding, "LlamaSteps", MixedSteps),
        patch.object(llama, "product", mixed_product),
    ):
        completed = dict(decoder.complete(owned))
    return time.perf_counter() - began, [completed[index] for index in range(len(owned))]


class Prompt(list[int]):
    """A prompt's token ids, and the number of the adapter that completes it."""

    def __init__(self, ids: Sequence[int], owner: int) -> None:
        """Give a prompt to an adapter."""
        super().__init__(ids)
        self.owner = owner


@dataclass(frozen=True)
class Mixed:
    """A packed weight (O, I) with K adapters of P layers: A (P K r, I), B (O, P K r), scaled."""

    weight: Tensor
    a: Tensor
    b: Tensor
    k: int


@torch.inference_mode()
def laid_out(base: Base, model: Any, k: int) -> llama.Llama:
    """Lay the base out for decoding, with the adapters beside its weights."""
    plain = llama.Llama.of(base.model)
    assert plain is not None
    layers = [
        replace(layer, **{part: mixed(getattr(layer, part), peft_layer, part, k) for part in PARTS})
        for layer, peft_layer in zip(plain.layers, model.get_base_model().model.layers, strict=True)
    ]
    return replace(plain, layers=layers)


def mixed(weight: Tensor, layer: Any, part: str, k: int) -> Mixed:
    """Put the adapters of one product's layers beside its weight."""
    linears = [layer.get_submodule(name) for name in PARTS[part]]
    names = [str(number) for number in range(k)]
    a = torch.cat([linear.lora_A[name].weight for linear in linears for name in names])
    if part in NORMS:
        a = a * layer.get_submodule(NORMS[part]).weight
    blocks = [
        torch.cat([linear.lora_B[name].weight * linear.scaling[name] for name in names], dim=1)
        for linear in linears
    ]
    if part == "qkv":
        blocks[0] = blocks[0] * layer.self_attn.scaling
    return Mixed(weight, packed(a), packed(torch.block_diag(*blocks)), k)


class MixedSteps(llama.LlamaSteps):
    """Steps of rows of which each has an adapter."""

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Compute prompts, whose owners are known from them."""
        self._owners_B = owners_of(prompts)
        return super().begin(prompts)

    def _prompts(self, prompts: Sequence[Sequence[int]], rows_B: Tensor) -> Tensor:
        longest = max(map(len, prompts))
        CURRENT.owners_N = owners_of(prompts).repeat_interleave(longest)
        return super()._prompts(prompts, rows_B)

    def step(self, next_B: Tensor) -> Tensor:
        """Take one token a row."""
        CURRENT.owners_N = self._owners_B
        return super().step(next_B)

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop the other rows."""
        order = super().keep(rows)
        self._owners_B = self._owners_B[order]
        return order


CURRENT = threading.local()
"""The adapter of each row that this thread computes: `owners_N`. Batches are decoded in threads."""


def owners_of(prompts: Sequence[Any]) -> Tensor:
    """Return the adapter of each prompt."""
    return torch.tensor([prompt.owner for prompt in prompts])


def mixed_product(x: Tensor, weight: Any) -> Tensor:
    """Return `x weight'` with each row's own update."""
    if not isinstance(weight, Mixed):
        return product(x, weight)
    mask_NK = torch.nn.functional.one_hot(CURRENT.owners_N, weight.k).to(x.dtype)
    low_NPKr = product(x, weight.a).view(len(x), -1, weight.k, RANK)
    low_NPKr.mul_(mask_NK[:, None, :, None])
    return product(x, weight.weight).add_(product(low_NPKr.flatten(1), weight.b))


if __name__ == "__main__":
    main()
