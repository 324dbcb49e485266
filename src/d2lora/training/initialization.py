"""Initialization of an adapter: fresh, by one of PEFT's methods or MiLoRA, or from a warm start.

PEFT's own code makes every initialization but MiLoRA. Some fold a part of the base's weights into
the adapter (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ, MiLoRA); while such a run lasts the base is
changed, afterwards its weights are what they were, bit for bit, and the adapter that is saved is
the difference to its initial weights, an ordinary adapter of twice the rank on the base as it was
(PEFT's `path_initial_model_for_weight_conversion`). EVA, CorDA and LoRA-GA use training rows.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from d2lora.adapters.attach import detach_adapter
from d2lora.adapters.base import Base, causal_model, n_embedded
from d2lora.adapters.files import read_adapter_config
from d2lora.adapters.lora import PLAIN, LoraShape, attach, check_shape, lora_config
from d2lora.adapters.manifest import Ancestor, save_adapter
from d2lora.adapters.quantization import is_quantized
from d2lora.adapters.sharding import is_sharded
from d2lora.adapters.targets import narrowest, target_layers, targets_of
from d2lora.data.batches import Encoded, Item, PreferencePair, collate, micro_batches
from d2lora.data.trained_rows import TrainedRows
from d2lora.errors import ModelError, SettingsError
from d2lora.runtime.console import Reporter
from d2lora.runtime.extras import need_extra
from d2lora.runtime.rounding import tolerance
from d2lora.scoring.scorer import pass_tokens
from d2lora.settings import FRESH, MILORA, PhaseSettings, changes_base
from d2lora.training.data_initialization import DATA_DRIVEN
from d2lora.training.high_rank import save_cut
from d2lora.training.minor_components import take_minor_components

_INITIAL = "initial"
_INEXACT = "loftq"
"""Its base is quantized, so its adapter is not exact on the base as it was."""


@dataclass(frozen=True)
class Initialization:
    """What the manifest says of an initialization."""

    name: str
    """`fresh`, `warm start` or a name of PEFT's."""
    n_samples: int = 0
    """Training rows that it used."""
    n_tokens: int = 0
    """Their tokens, run before training."""
    elapsed_s: float = 0.0
    converted_from_rank: int | None = None
    """The rank that was trained, where the adapter was converted when saved."""
    energy_kept: float | None = None
    """Share of the energy of what was trained that is left, where it was cut to a lower rank."""
    largest_logit_difference: float | None = None
    """Of the converted adapter on the base as it was from what was trained, on probe tokens."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class InitializedAdapter:
    """An adapter on its base, ready to train."""

    model: PeftModel
    shape: LoraShape
    about: Initialization
    lineage: tuple[Ancestor, ...] = ()
    initial: Path | None = None
    """The adapter as it was initialized, where the base was changed."""
    weights: Mapping[str, Tensor] | None = None
    """The base's own weights, where it was changed."""
    trained: TrainedRows = field(default_factory=TrainedRows)
    """What its ancestors were trained on."""

    @property
    def changes_base(self) -> bool:
        """Whether a part of the base's weights is in the adapter while it trains."""
        return self.weights is not None

    def save(
        self, folder: Path, rank: int | None = None, energy_kept: float | None = None
    ) -> "InitializedAdapter":
        """Write the trained adapter, converted where the base was changed.

        Args:
            folder: Where to.
            rank: That it was cut to; None: it was not.
            energy_kept: What was left then.

        Returns:
            It with the shape that was written, and what the conversion changed.

        Raises:
            ModelError: If a conversion that should be exact changes the model's outputs.
        """
        save_adapter(self.model, folder, initial=self.initial)
        if rank is not None:
            save_cut(folder, rank)
        if rank is None and self.weights is None:
            return self
        config = read_adapter_config(folder)
        shape = replace(self.shape, rank=config.r, alpha=float(config.lora_alpha))
        about = replace(
            self.about,
            converted_from_rank=self.shape.rank,
            energy_kept=energy_kept,
            largest_logit_difference=(
                None if self.weights is None else self._difference(folder, self.weights)
            ),
        )
        return replace(self, shape=shape, about=about)

    @torch.no_grad()
    def _difference(self, folder: Path, weights: Mapping[str, Tensor]) -> float:
        """Compare the trained model with the converted adapter on the base's own weights."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(n_embedded(self.model), (2, 48), generator=generator)
        ids = ids.to(self.model.device)
        trained = self.model(input_ids=ids).logits.float()
        self.model.load_adapter(str(folder), adapter_name="converted")
        self.model.set_adapter("converted")
        changed = _swap(self.model, weights)
        try:
            converted = self.model(input_ids=ids).logits.float()
        finally:
            _swap(self.model, changed)
            self.model.set_adapter("default")
            self.model.delete_adapter("converted")
        largest = float((trained - converted).abs().max())
        allowed = tolerance(self.model.dtype, rewritten=True) * max(1.0, float(trained.abs().max()))
        if not largest <= allowed and self.about.name != _INEXACT:
            raise ModelError(
                f"--init {self.about.name}: the adapter, made to fit the base as it was, changes "
                f"logits by up to {largest:.3g}; the base's dtype ({self.model.dtype}) is too "
                "coarse for it; use --dtype float32"
            )
        return largest


@contextmanager
def initialized(
    settings: PhaseSettings,
    base: Base,
    shape: LoraShape,
    seed: int,
    rows: Sequence[Item],
    reporter: Reporter,
) -> Generator[InitializedAdapter]:
    """Put a new adapter on a base for the length of the block.

    Args:
        settings: Which initialization, and how many rows it uses.
        base: The base; afterwards it is as it was before, bit for bit, whatever happens.
        shape: Rank, alpha, dropout, targets.
        seed: Seed of what is random.
        rows: The training rows.
        reporter: Where messages go.

    Raises:
        SettingsError: If the initialization does not work with these settings.
    """
    name, model = settings.init, base.model
    check_shape(model, shape)
    check_sharded(model, shape, name)
    check_init(name, shape, model)
    kept = _take_weights(model, shape) if changes_base(name) else None
    attached: PeftModel | None = None
    try:
        with TemporaryDirectory() as folder:
            attached, about = _attach(settings, base, shape, seed, rows)
            initial = Path(folder) / _INITIAL if kept else None
            if initial is not None:
                save_adapter(attached, initial)
            sampled = f", from {about.n_samples} training rows" if about.n_samples else ""
            reporter.say(
                f"initialized as {'fresh' if name == FRESH else name} LoRA: rank {shape.rank}, "
                f"alpha {shape.alpha:g}{sampled}"
            )
            own = None if kept is None else dict(kept)
            yield InitializedAdapter(attached, shape, about, initial=initial, weights=own)
    finally:
        if attached is not None:
            detach_adapter(attached)
        if kept is not None:
            _swap(model, kept)


def check_sharded(model: PreTrainedModel, shape: LoraShape, name: str = FRESH) -> None:
    """Check that an adapter can be trained on a base, be it sharded.

    Raises:
        SettingsError: If it, or its initialization, needs whole weights of a sharded base.
    """
    if not is_sharded(model):
        return
    needs = {
        f"--init {name}": name not in PLAIN,
        "--dora": shape.dora,
        "--modules-to-save": bool(shape.modules_to_save),
        "--add-tokens": bool(shape.add_tokens),
        "experts among the --targets": bool(targets_of(model, shape.wanted).parameters),
    }
    if found := [what for what, needed in needs.items() if needed]:
        raise SettingsError(
            f"--shard-base: {' and '.join(found)} would need whole weights of the base; leave out "
            "one of the two"
        )


def check_init(name: str, shape: LoraShape, model: PreTrainedModel) -> None:
    """Check that an initialization works on a base.

    Raises:
        SettingsError: If not, with the reason.
    """
    if name == FRESH:
        return
    if shape.dora and changes_base(name):
        raise SettingsError(
            f"--init {name} changes the base, and a DoRA adapter cannot be converted back; use "
            "--init fresh, gaussian, orthogonal or eva with --dora"
        )
    if (shape.modules_to_save or shape.add_tokens) and changes_base(name):
        raise SettingsError(
            f"--init {name} changes the base, and PEFT drops whole modules and new tokens as it "
            "converts the adapter back; use --init fresh, gaussian or orthogonal with "
            "--modules-to-save and --add-tokens"
        )
    if shape.add_tokens and name == "eva":
        raise SettingsError(
            "PEFT's eva takes rows of new tokens for a layer of the adapter; use --init fresh, "
            "gaussian or orthogonal with --add-tokens"
        )
    quantized = is_quantized(model)
    if changes_base(name) and quantized:
        if name == "loftq":
            raise SettingsError(
                "--init loftq quantizes the base by itself, and this one is quantized already; "
                "leave out --quantization, or use --init fresh"
            )
        raise SettingsError(
            f"--init {name} changes the base's weights, and those of this base are quantized; use "
            "--init fresh, gaussian or eva"
        )
    if quantized and name == "orthogonal":
        raise SettingsError(
            "PEFT makes orthogonal factors in the dtype of the base's weights, and those of this "
            "base are quantized; use --init fresh, gaussian or eva"
        )
    if (shape.rank_pattern or shape.alpha_pattern) and name != "gaussian":
        raise SettingsError(
            f"--init {name} gives every layer one rank and alpha; leave out --rank-pattern and "
            "--alpha-pattern, or use --init fresh or gaussian"
        )
    _check_rank(name, shape, model)


def _check_rank(name: str, shape: LoraShape, model: PreTrainedModel) -> None:
    if name == "orthogonal" and shape.rank % 2:
        raise SettingsError(f"--init orthogonal needs an even rank, got {shape.rank}")
    if name == "loftq":
        need_extra("quantization", "--init loftq")
    if name == "loftq" and model.device.type != "cuda":
        raise SettingsError(f"--init loftq needs CUDA, and the base is on {model.device.type}")
    if name not in {"gaussian", "orthogonal"}:
        least = min(narrowest(layer) for _, layer in target_layers(model, shape.wanted))
        most = least // 2 if name == "lora_ga" else least
        if shape.rank > most:
            raise SettingsError(
                f"--init {name} supports ranks up to {most} on this base, got {shape.rank}"
            )


def _attach(
    settings: PhaseSettings, base: Base, shape: LoraShape, seed: int, rows: Sequence[Item]
) -> tuple[PeftModel, Initialization]:
    name, model = settings.init, base.model
    config = lora_config(model, shape, name, base.new_ids)
    if name not in DATA_DRIVEN:
        attached = attach(model, config, seed)
        if name == MILORA:
            take_minor_components(attached)
        return attached, Initialization(name)
    chosen = [_supervised(item) for item in rows[: settings.init_samples]]
    limit = pass_tokens(model.device, settings.micro_batch_tokens)
    # PEFT's CorDA takes one row, without padding, at a time.
    groups = micro_batches(chosen, limit, 1 if name == "corda" else None)
    batches = [collate(group, base.pad_id).trimmed().to(model.device) for group in groups]
    started = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        attached = DATA_DRIVEN[name](model, config, batches, seed)
    n_tokens = sum(item.n_tokens for item in chosen)
    elapsed_s = round(time.perf_counter() - started, 3)
    return attached, Initialization(name, len(chosen), n_tokens, elapsed_s)


def _supervised(item: Item) -> Encoded:
    """Return the row to use; of a pair, the chosen completion's."""
    if isinstance(item, PreferencePair):
        return item.chosen
    assert isinstance(item, Encoded)
    return item


def _take_weights(model: PreTrainedModel, shape: LoraShape) -> dict[str, Tensor]:
    """Put copies in place of the weights that an initialization changes; return the weights."""
    kept = {name: layer.weight.data for name, layer in target_layers(model, shape.wanted)}
    _swap(model, {name: weight.clone() for name, weight in kept.items()})
    return kept


def _swap(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Set layers' weights, with or without adapters; return those that they had."""
    inner = causal_model(model)
    had: dict[str, Tensor] = {}
    for name, weight in weights.items():
        layer = inner.get_submodule(name)
        parameter = getattr(layer, "base_layer", layer).get_parameter("weight")
        had[name] = parameter.data
        parameter.data = weight
    return had
