"""The warm start: the one thing that passes from the warm-up to the tasks.

D2LoRA (Seraj, Mohajeri, Dousti, arXiv 2503.18089) trains an adapter once on general data and
initializes every scarce task from its weights. A `WarmStart` is that adapter with its manifest. It
can be put on a model by hand, too:

    model = WarmStart.load("warm").apply_to(AutoModelForCausalLM.from_pretrained(base))
"""

from dataclasses import replace
from pathlib import Path
from typing import Self
from warnings import warn

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from d2lora.adapters.attach import attach_adapter, originals
from d2lora.adapters.base import identity_of_model
from d2lora.adapters.files import ADAPTER_CONFIG, read_adapter_config
from d2lora.adapters.lora import LoraShape
from d2lora.adapters.manifest import Adapter, Manifest, differences, has_manifest
from d2lora.adapters.targets import ALL_LINEAR
from d2lora.errors import ModelError, WarmStartError, did_you_mean
from d2lora.runtime.run_folder import DONE
from d2lora.settings import FRESH, NAMED_INITS, LoraSettings


class WarmStart(Adapter):
    """An adapter warmed up on general data, from which tasks are initialized."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open a warm start's folder; any LoRA adapter in PEFT's format can be started from.

        Raises:
            WarmStartError: If it is none, or not finished.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise WarmStartError(
                f"{folder}: no such folder; make a warm start with d2lora warmup."
                f"{did_you_mean(str(path), (FRESH, *NAMED_INITS))}"
            )
        if not has_manifest(folder):
            if (folder / "settings.yaml").is_file() and not (folder / DONE).is_file():
                raise WarmStartError(f"{folder}: the run is unfinished; continue it with --resume")
            if not (folder / ADAPTER_CONFIG).is_file():
                raise WarmStartError(
                    f"{folder}: not a warm start: it has no warm_start.json, and no "
                    f"{ADAPTER_CONFIG} of a PEFT adapter"
                )
        try:
            read_adapter_config(folder)
            known = has_manifest(folder)
            return cls(folder, Manifest.read(folder) if known else Manifest.of_foreign(folder))
        except ModelError as error:
            raise WarmStartError(str(error)) from None

    def apply_to(
        self, model: PreTrainedModel, *, dropout: float | None = None, scale: float = 1.0
    ) -> PeftModel:
        """Put the warm start on a model, ready to train.

        The model's own weights stay as they are and frozen; the LoRA weights and whole modules,
        and nothing else, require a gradient (PEFT loads an adapter frozen by default, peft#282).

        Args:
            model: The warm start's base, loaded in any dtype.
            dropout: Dropout on the adapter's input. None: the warm start's own.
            scale: Strength of the warm start; B is multiplied by it, and what is trained whole goes
                so far from the base. 0 leaves A alone.

        Raises:
            WarmStartError: If the model was loaded from other weights than the warm start's base.
        """
        found = identity_of_model(model)
        if found is None:
            warn(
                "the model was not loaded from local files, so its weights were not checked",
                stacklevel=2,
            )
        else:
            self.manifest.check_base(found, str(model.config.name_or_path), self.path)
        attached = attach_adapter(model, self.path, trainable=True, dropout=dropout)
        if scale != 1:
            _weaken(attached, scale)
        return attached

    def inherited_shape(self, settings: LoraSettings) -> LoraShape:
        """Return the warm start's shape; the settings must agree with it.

        Raises:
            WarmStartError: If they do not, with the fix.
        """
        shape = self.manifest.shape
        config = read_adapter_config(self.path)
        wanted = dict(settings)
        if wanted["targets"] in ((ALL_LINEAR,), None) and shape.targets == (ALL_LINEAR,):
            wanted["targets"] = None
        elif wanted["targets"] is not None:
            wanted["targets"] = tuple(sorted(wanted["targets"]))
            shape = replace(shape, targets=tuple(sorted(shape.targets)))
        clashes = differences(wanted, shape)
        if clashes:
            contradictions = "; ".join(
                f"--{name.replace('_', '-')} {_shown(asked)}, but it has {_shown(have)}"
                for name, (asked, have) in clashes.items()
            )
            options = " ".join(f"--{name.replace('_', '-')}" for name in clashes)
            raise WarmStartError(
                f"the settings contradict the warm start {self.path}: {contradictions}. Leave out "
                f"{options} to inherit, or warm up again with these values"
            )
        if (config.r, float(config.lora_alpha)) != (shape.rank, shape.alpha):
            raise WarmStartError(
                f"{self.path}: adapter_config.json (rank {config.r}, alpha {config.lora_alpha}) "
                f"and warm_start.json (rank {shape.rank}, alpha {shape.alpha:g}) disagree; one "
                "of them was edited. Restore it, or warm up again"
            )
        return shape if settings.dropout is None else replace(shape, dropout=settings.dropout)


@torch.no_grad()
def _weaken(model: PeftModel, scale: float) -> None:
    """Multiply the difference to the base that an adapter makes."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(scale)
    for parameter, own in originals(model).items():
        parameter.lerp_(own.to(parameter), 1 - scale)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return f"{value:g}"
