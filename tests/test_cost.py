"""What a run costs is counted as torch counts it."""

import subprocess
import sys

import pytest
import torch
from architectures import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2lora.adapters.base import load_base
from d2lora.adapters.lora import LoraShape, attach_fresh
from d2lora.settings import BaseSettings
from d2lora.training.cost import TrainingFlops


def test_the_formula_is_within_five_percent_of_torch_s_counter() -> None:
    base = load_base(BaseSettings(base="embedded", threads=1))
    shape = LoraShape(rank=8, alpha=16.0, dropout=0.0, targets=("all-linear",))
    model = attach_fresh(base.model, shape, 0)
    formula = TrainingFlops.of(model)
    assert formula is not None
    for n_rows, length in ((1, 64), (3, 192)):
        ids = torch.randint(100, (n_rows, length))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        n_tokens = n_rows * length
        ratio = formula.of_rows(n_rows, n_tokens, n_tokens) / counter.get_total_flops()
        assert ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("kind", ["gpt2", "bart", "llama4_text", "mixtral"])
def test_operations_of_other_layers_are_torch_s_or_not_known(kind: str) -> None:
    base = tiny(kind)
    model = attach_fresh(base, LoraShape(4, 8.0, 0.0, ("all-linear",)), 0)
    formula = TrainingFlops.of(model)
    base.set_experts_implementation("eager")  # torch does not count grouped products
    assert formula is not None
    ids = torch.randint(3, 90, (3, 96))  # beyond all windows
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    ratio = formula.of_rows(3, ids.numel(), ids.numel()) / counter.get_total_flops()
    assert ratio == pytest.approx(1, abs=0.05)


def test_operations_that_do_not_grow_with_tokens_as_attention_s_do_are_not_known() -> None:
    model = attach_fresh(tiny("qwen3_next"), LoraShape(4, 8.0, 0.0, ("all-linear",)), 0)
    assert TrainingFlops.of(model) is None
    experts = attach_fresh(tiny("mixtral"), LoraShape(4, 8.0, 0.0, ("experts",)), 0)
    assert TrainingFlops.of(experts) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak of a process")
def test_the_peak_of_memory_is_that_of_one_run() -> None:
    code = """
import torch
from d2lora.training.cost import peak_memory_bytes, reset_peak_memory
cpu = torch.device("cpu")
torch.ones(600_000_000, dtype=torch.uint8)  # touched, and free again
print(peak_memory_bytes(cpu), int(reset_peak_memory(cpu)), peak_memory_bytes(cpu))
small = torch.ones(300_000_000, dtype=torch.uint8)
print(peak_memory_bytes(cpu))
"""
    # In a process of its own: the tests before it leave free memory that is touched already.
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after_much, is_reset, begun, after_little = map(int, said.stdout.split())
    if not is_reset:
        pytest.skip("this system does not let a process reset its peak")
    assert begun < after_much - 400_000_000
    assert 200_000_000 < after_little - begun < 310_000_000
