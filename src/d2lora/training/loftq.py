"""LoftQ on a CPU: PEFT's own code names CUDA, which bitsandbytes no longer needs."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from peft.tuners.lora import layer
from torch import Tensor


@torch.no_grad()
def quantized(
    weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight in 4-bit NormalFloat and the factors that make up for what it lost.

    In turn, the weight less the factors' product is quantized, and the factors are the best of
    their rank for what is left (Li et al. 2023, arXiv 2310.08659, Algorithm 1; the arguments are
    those of PEFT's `loftq_init`).

    Args:
        weight: Shape (out, in).
        num_bits: 4.
        reduced_rank: Rank r of the factors.
        num_iter: How often.

    Returns:
        The weight as it is after quantization, (out, in), A, (r, in), and B, (out, r).
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    assert num_bits == 4
    base = whole = weight.float()
    a = whole.new_zeros(reduced_rank, whole.shape[1])
    b = whole.new_zeros(whole.shape[0], reduced_rank)
    for _ in range(num_iter):
        codes, scales = quantize_4bit(whole - b @ a, quant_type="nf4", compress_statistics=False)
        base = dequantize_4bit(codes, scales)
        u, s, v = torch.linalg.svd(whole - base, full_matrices=False)
        root = s[:reduced_rank].sqrt()
        b, a = u[:, :reduced_rank] * root, root[:, None] * v[:reduced_rank]
    return base.to(weight.dtype), a, b


@contextmanager
def on_cpu() -> Generator[None]:
    """Let PEFT's layers use `quantized` for LoftQ inside the block."""
    theirs = layer.loftq_init
    layer.loftq_init = quantized
    try:
        yield
    finally:
        layer.loftq_init = theirs
