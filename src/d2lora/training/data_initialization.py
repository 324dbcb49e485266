"""PEFT's data-driven initializations: EVA, CorDA, LoRA-GA."""

import warnings
from collections.abc import Callable, Sequence

from peft import LoraConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import PreTrainedModel

from d2lora.adapters.lora import attach
from d2lora.data.batches import Batch
from d2lora.errors import SettingsError
from d2lora.scoring.scorer import TokenScorer


def _eva(
    model: PreTrainedModel, config: LoraConfig, batches: Sequence[Batch], seed: int
) -> PeftModel:
    """A from the principal directions of the layers' inputs (Paischer et al. 2024)."""
    if max(int(batch.mask_BT.sum()) for batch in batches) < config.r:
        raise SettingsError(
            f"--init eva needs more tokens than the rank {config.r} in one pass; raise "
            "--init-samples"
        )
    attached = attach(model, config, seed)
    inputs = [{"input_ids": b.ids_BT, "attention_mask": b.mask_BT} for b in batches]
    initialize_lora_eva_weights(
        attached, dataloader=inputs, gather_distributed_inputs=False, show_progress_bar=False
    )
    return attached


def _corda(
    model: PreTrainedModel, config: LoraConfig, batches: Sequence[Batch], seed: int
) -> PeftModel:
    """Directions of the weights under the inputs' covariance (Yang et al. 2024), mode ipm."""

    def run_model() -> None:
        for batch in batches:
            model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False)

    preprocess_corda(model, config, run_model=run_model)
    return attach(model, config, seed)


def _lora_ga(
    model: PreTrainedModel, config: LoraConfig, batches: Sequence[Batch], seed: int
) -> PeftModel:
    """Directions of the full weights' gradient on the supervised tokens (Wang et al. 2024)."""
    scorer = TokenScorer(model)

    def train_step() -> None:
        for batch in batches:
            (-scorer(batch).mean()).backward()

    with warnings.catch_warnings():
        # Hooks count layers whose inputs need no gradient, as the first layer's do not.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(model, config, train_step)
    return attach(model, config, seed)


DATA_DRIVEN: dict[str, Callable[[PreTrainedModel, LoraConfig, Sequence[Batch], int], PeftModel]] = {
    "eva": _eva,
    "corda": _corda,
    "lora_ga": _lora_ga,
}
"""Each puts its adapter on a base, after running it on the batches."""
