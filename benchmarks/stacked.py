"""Several adapters trained in one batch over one base: a lever that d2lora itself does not use.

    python benchmarks/stacked.py --sizes embedded --adapters 1 2 4 8

Adapter k has a seed of its own and sees the rows of every step that d2lora's loop sees; its rows
are a part of one batch, the frozen layers' products are shared, and the low-rank ones are batched
over adapters. Gradients are clipped and losses averaged for each adapter alone, so the first one
learns as d2lora's loop, which is the other side, teaches it: the table tells both last losses.
Tokens of all adapters count. On a GPU: `scripts/gpu_bench`.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import base_of, head, medians, parser_of, row, taking_turns, worker
from sides import ours, prepared, settings_of, wait

CLIP = 1.0


def main() -> None:
    """Measure every size and number of adapters, and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["embedded", "40M"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.base:
        settings = settings_of(args.base, args.data, args.steps, args.threads)
        print(json.dumps(stacked(settings, args.worker) if args.worker else ours(settings)))
        return
    head("base", "adapters in a batch", "tokens/s of all", "against one by one", "last loss of one")
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            base = base_of(size, Path(folder), args.data)
            words = ["--base", base, "--data", str(args.data), "--steps", str(args.steps)]
            words += ["--threads", str(args.threads), "--worker"]
            sides = {
                k: partial(worker, __file__, [*words, str(k)], args.threads)
                for k in (0, *args.adapters)
            }
            print_rows(size, taking_turns(sides, args.rounds))


def print_rows(size: str, runs: dict[int, list[dict[str, Any]]]) -> None:
    """Print medians and ratios of one size; 0 adapters stands for d2lora's loop."""
    speed = medians({k: [run["tokens_per_s"] for run in of] for k, of in runs.items()})
    for k, of in runs.items():
        row(
            size, k or "d2lora", f"{speed[k]:.0f}", f"{speed[k] / speed[0]:.2f} x",
            f"{of[0]['losses'][-1]:.4f}",
        )  # fmt: skip


class StackedLora(torch.autograd.Function):
    """Shapes: x (K, N, in), weight (out, in), A (K, r, in), B (K, out, r), bias (out,) or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """Return `x weight' + bias + scale (x A') B'`, each adapter on its own rows."""
        from d2lora.fast.matmul import linear

        ctx.dtype, ctx.scale = a.dtype, scale
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = x @ a.mT
        y = linear(x.flatten(0, 1), weight, bias).view(*x.shape[:2], -1)
        y.baddbmm_(low, b.mT, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B."""
        from d2lora.fast.matmul import linear

        x, weight, a, b, low = ctx.saved_tensors
        (g,) = grad_outputs
        low_gradient = (g @ b).mul_(ctx.scale)
        dx = linear(g.flatten(0, 1), weight.T).view(*g.shape[:2], -1)
        dx.baddbmm_(low_gradient, a)
        da, db = low_gradient.mT @ x, (g.mT @ low).mul_(ctx.scale)
        return dx, None, None, da.to(ctx.dtype), db.to(ctx.dtype), None


def stack(model: Any, k: int) -> list[nn.Parameter]:
    """Give every LoRA layer k adapters, the first the model's own; return their stacked weights."""
    from peft.tuners.lora import Linear as LoraLinear

    generator = torch.Generator(device=model.device).manual_seed(0)
    parameters: list[nn.Parameter] = []
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            own = layer.lora_A["default"].weight.detach()
            bound = own.shape[1] ** -0.5
            a = own.repeat(k, 1, 1)
            a[1:].uniform_(-bound, bound, generator=generator)
            b = layer.lora_B["default"].weight.detach().repeat(k, 1, 1)
            pair = nn.Parameter(a), nn.Parameter(b)
            layer.forward = partial(_forward, layer, *pair)
            parameters += pair
    return parameters


def _forward(layer: Any, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    base = layer.base_layer
    rows = x.reshape(len(a), -1, x.shape[-1])
    y = StackedLora.apply(rows, base.weight, base.bias, a, b, layer.scaling["default"])
    assert isinstance(y, Tensor)
    return y.view(*x.shape[:-1], -1)


def stacked(settings: Any, k: int, n_warm: int = 1) -> dict[str, Any]:
    """Train k adapters in one batch; the first `n_warm` steps are not timed."""
    from d2lora import fast

    base, model, examples, encoder = prepared(settings)
    items = [encoder.encode(example) for example in examples]
    with fast.enabled(model, when=True):
        return _trained(settings, k, n_warm, base, model, items)


def _trained(
    settings: Any, k: int, n_warm: int, base: Any, model: Any, items: list[Any]
) -> dict[str, Any]:
    from torch.optim import AdamW

    from d2lora.schedule import learning_rate
    from d2lora.scorer import TokenScorer, pass_tokens

    # The scorer compares ways on its longest and shortest batches, with one adapter.
    scorer = TokenScorer(model)
    ends = (max, min)
    with torch.no_grad():
        for end in ends:
            scorer(_batch([end(items, key=lambda item: item.length)], 1, base))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = stack(model, k)
    optimizer = AdamW(parameters, lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay)
    limit, size = pass_tokens(base.model.device) // k, settings.batch_size
    losses: list[float] = []
    marks: list[float] = []
    for step in range(settings.max_steps):
        if step in (1, n_warm):
            wait(base.model.device)
            marks.append(time.perf_counter())
        losses.append(_step(scorer, items[step * size :][:size], k, base, parameters, limit))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.max_steps, settings)
        optimizer.step()
        optimizer.zero_grad()
    wait(base.model.device)
    n_tokens = k * sum(item.n_tokens for item in items[n_warm * size :])
    return {
        "tokens_per_s": n_tokens / (time.perf_counter() - marks[-1]),
        "warm_up_s": marks[-1] - marks[0],
        "losses": losses,
    }


def _step(
    scorer: Any, items: list[Any], k: int, base: Any, parameters: list[nn.Parameter], limit: int
) -> float:
    """Add up the clipped gradients of one step; return the first adapter's loss."""
    from d2lora.batches import micro_batches

    n_supervised, first = sum(item.n_supervised for item in items), 0.0
    for group in micro_batches(items, limit):
        batch = _batch(group, k, base)
        losses_P = -scorer(batch) / n_supervised
        losses_P.sum().backward()
        first += float(losses_P.detach()[batch.rows_P < len(group)].sum())
    gradients = [parameter.grad for parameter in parameters]
    norms_K = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    factors_K = (CLIP / (norms_K + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors_K[:, None, None])
    return first


def _batch(items: list[Any], k: int, base: Any) -> Any:
    """Return the rows of k adapters, one adapter's after the other's."""
    from d2lora.batches import collate

    return collate(items * k, base.pad_id).to(base.model.device)


if __name__ == "__main__":
    main()
