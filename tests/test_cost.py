"""What a run costs is counted as torch counts it."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2lora.cost import TrainingFlops
from d2lora.inits import LoraShape, attach_fresh
from d2lora.models import causal_model, load_base
from d2lora.settings import BaseSettings


def test_the_formula_is_within_five_percent_of_torch_s_counter() -> None:
    base = load_base(BaseSettings(base="embedded", threads=1))
    shape = LoraShape(rank=8, alpha=16.0, dropout=0.0, targets=("all-linear",))
    model = attach_fresh(base.model, shape, 0)
    causal = causal_model(model)
    formula = TrainingFlops.of(causal, causal.config)
    for n_rows, length in ((1, 64), (3, 192)):
        ids = torch.randint(100, (n_rows, length))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        n_tokens = n_rows * length
        ratio = formula.of_rows(n_rows, n_tokens, n_tokens) / counter.get_total_flops()
        assert 1.0 <= ratio <= 1.05
