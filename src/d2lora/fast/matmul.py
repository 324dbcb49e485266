"""Matrix products of float32 on a CPU with AVX-512, by oneDNN where that is faster.

torch gives float32 products to MKL, which leaves AVX-512 unused on processors of other makers than
its own, Intel; oneDNN, which torch carries too, uses it everywhere, but on Intel's processors is
the slower one. `benchmarks/matrix_products.py` measures both.
"""

import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

LEAST_ROWS = 16
"""With fewer rows a product is bound by memory, and oneDNN costs more than it saves."""
_TYPICAL_ROWS = 64

_KEPT = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@contextmanager
def few_shapes_kept() -> Generator[None]:
    """Let oneDNN, where the block is its first use, keep the code of few shapes.

    It keeps code and memory of the last 1,024 shapes that it met. Batches rarely share a length,
    so those of old batches are dead weight: hundreds of MB on a small base.
    """
    if _KEPT in os.environ:
        yield
        return
    os.environ[_KEPT] = "64"
    try:
        yield
    finally:
        os.environ.pop(_KEPT, None)


@cache
def onednn_is_faster() -> bool:
    """Say whether oneDNN's float32 products are used on this processor.

    It depends on the vendor, not on a measurement, so that a resumed run computes the same.
    """
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return avx512 and torch.backends.mkldnn.is_available() and not _is_intel()


def _is_intel() -> bool:
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        described = platform.processor()
    return "GenuineIntel" in described


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x weight' + bias`, without a gradient of its own.

    Args:
        x: Shape (N, in).
        weight: Shape (out, in), of any strides.
        bias: Shape (out,).
    """
    taken = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and len(x) >= LEAST_ROWS
        and onednn_is_faster()
    )
    if not taken:
        return functional.linear(x, weight, bias)
    return by_onednn(x, weight, bias)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x weight' + bias` as oneDNN computes it; the weight may be a packed one."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def is_frozen_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Say whether a layer is a plain linear one that nothing trains."""
    return type(layer) is nn.Linear and not any(p.requires_grad for p in layer.parameters())


def packed(weight: Tensor) -> Tensor:
    """Return a copy of a weight, (out, in), as `product` reads it fastest.

    On the processors that oneDNN serves best it is an opaque tensor in oneDNN's own order.
    """
    weight = weight.detach().contiguous()
    if not onednn_is_faster():
        return weight
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
    return reordered


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x weight'` for a packed weight, without a gradient; x has shape (N, in)."""
    return by_onednn(x, weight) if weight.is_mkldnn else functional.linear(x, weight)
