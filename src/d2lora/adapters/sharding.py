"""A base whose weights are divided among the processes of a run (FSDP2), whole in none of them.

transformers loads each process's part alone; a layer's weights come together while it computes. An
adapter's weights stay whole in every process: they are small, and trained as without sharding.

Source: Zhao et al. 2023, PyTorch FSDP, arXiv 2304.11277; `torch.distributed.fsdp.fully_shard`.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    WeightConverter,
)
from transformers.distributed import DistributedConfig
from transformers.distributed.utils import is_dtensor
from transformers.modeling_layers import GradientCheckpointingLayer

from d2lora.adapters.files import some
from d2lora.adapters.foreign import foreign
from d2lora.errors import ModelError, SettingsError
from d2lora.settings import BaseSettings, PhaseSettings


def loading(settings: BaseSettings, folder: Path, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` needs to load this process's part of a base.

    Empty where the settings do not ask for it, or where there is one process.

    Raises:
        ModelError: If the base has no layers that could be divided, or would be loaded wrongly.
        SettingsError: If the device is not the one that processes would divide it over, or
            accelerate was asked to shard the model.
    """
    if not isinstance(settings, PhaseSettings):
        return {}
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in {"1", "true", "yes"}:
        raise SettingsError(
            "accelerate launch --use-fsdp would shard the adapter, too: leave it out, and give "
            "--shard-base to d2lora"
        )
    if not settings.shard_base:
        return {}
    n_processes = PartialState(cpu=device.type == "cpu").num_processes
    if n_processes == 1:
        return {}
    own = torch.accelerator.current_accelerator() or torch.device("cpu")
    if own.type != device.type:
        raise SettingsError(
            f"--shard-base divides the base over this machine's {own.type} devices, and --device "
            f"is {device.type}: leave --device out"
        )
    with foreign("not a causal language model"), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if mixed := _mixed(empty):
        raise ModelError(
            f"--shard-base: transformers would load {type(empty).__name__} wrongly in parts, as it "
            f"makes {some(mixed)} of rows that other processes read; leave it out"
        )
    layers = {
        re.sub(r"\.\d+(?=\.|$)", ".*", name): "free_full_weight"
        for name, module in empty.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
    }
    if not layers:
        raise ModelError(
            f"--shard-base: {type(empty).__name__} has no layers that transformers knows by name, "
            "so that its weights would come together at once; leave it out"
        )
    return {"distributed_config": DistributedConfig(fsdp_size=n_processes, fsdp_plan=layers)}


def _mixed(model: PreTrainedModel) -> list[str]:
    """Return weights that are made of others, row by row along what is divided.

    transformers 5.23 takes each process's rows of what is in the files, and joins or cuts these.
    That is right for what is stacked, such as experts, and along other dimensions.
    """
    found = list[str]()
    for conversion in get_model_conversion_mapping(model):
        if not isinstance(conversion, WeightConverter):
            continue
        first, *rest = operations = list(conversion.operations)
        stacks = isinstance(first, MergeModulelist) and first.dim == 0
        for operation in rest if stacks else operations:
            kept = isinstance(operation, Concatenate | Chunk | Interleave) and operation.dim != 0
            if not kept:
                found += conversion.target_patterns
    return sorted(set(found))


def prepare(model: Any) -> None:
    """Let PEFT see that a sharded base has no tensor parallelism.

    It takes a size of 1 for some, and would bring whole weights together to save an adapter.
    """
    if is_sharded(model):
        model._tp_size = None  # noqa: SLF001


def is_sharded(model: nn.Module) -> bool:
    """Say whether a process holds parts of a model's weights only.

    Then a forward pass takes all processes, each as many of them as the others.
    """
    return any(is_dtensor(parameter) for parameter in model.parameters())


def check_length(model: nn.Module, settings: BaseSettings, limit: int) -> None:
    """Check that all rows of a sharded base are computed in one pass.

    Args:
        model: The base.
        settings: Those of the run.
        limit: Tokens beyond which a row is turned by LongRoPE's long factors.

    Raises:
        SettingsError: If some would be computed apart, in some processes and not in others.
    """
    if is_sharded(model) and isinstance(settings, PhaseSettings) and settings.max_length > limit:
        raise SettingsError(
            f"--shard-base: rows of more than {limit} tokens are computed apart (LongRoPE), and "
            f"--max-length is {settings.max_length}: give --max-length {limit}, or leave it out"
        )
