"""Where a base is computed, and in which numbers."""

import os

import torch

from d2lora.errors import ModelError, counted


def device_of(name: str) -> torch.device:
    """Return the device named; `auto` is CUDA, then MPS, then the CPU.

    With several processes on one machine each takes the CUDA device of its local rank.

    Raises:
        ModelError: If it is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return device_of("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
    n_cuda = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= n_cuda:
        raise ModelError(
            f"--device {name}: torch sees {counted(n_cuda, 'CUDA device')}; use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("--device mps: torch sees no MPS device; use --device cpu")
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype named; `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def slow_dtype(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return a warning where a processor has no products in a dtype, so that torch emulates them.

    On x86 without AVX-512 products take 6 to 20 times as long in bfloat16 as in float32
    (benchmarks/matrix_products.py).
    """
    if device.type != "cpu" or dtype == torch.float32 or _multiplies(dtype):
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"this processor has no products in {name}, and takes many times as long for them: use "
        "float32 (--dtype float32)"
    )


def _multiplies(dtype: torch.dtype) -> bool:
    """Say whether oneDNN, which multiplies matrices for torch, is quick in a dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    known = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return bool(known._is_mkldnn_bf16_supported())  # noqa: SLF001 - torch has no public name
    return bool(known._is_mkldnn_fp16_supported())  # noqa: SLF001
