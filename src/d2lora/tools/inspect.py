"""What an adapter holds: size and spectrum of each layer's update, origin, base, advice.

d2lora inspect --adapter adapter --other warm --base ./my-model --plot spectrum.png
"""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from d2lora import fast
from d2lora.adapters.attach import attach_adapter, check_switchable
from d2lora.adapters.base import load_base
from d2lora.adapters.base_files import base_folder
from d2lora.adapters.factors import (
    Factors,
    effective_rank,
    experts_apart,
    inner_product,
    singular_values,
    subspace_overlap,
)
from d2lora.adapters.files import PREFIX, AdapterFiles, some
from d2lora.adapters.fingerprints import identity_of
from d2lora.adapters.manifest import Manifest, base_for, check_fit, has_manifest
from d2lora.adapters.mixing import scale_of
from d2lora.data.encoded_sets import encode_all
from d2lora.data.reading import read_task
from d2lora.errors import ModelError, SettingsError
from d2lora.evaluation.generate import encoder_of
from d2lora.runtime.claims import claimed
from d2lora.runtime.console import Reporter, table_console
from d2lora.runtime.run_folder import write_json
from d2lora.settings import BaseSettings, InspectSettings
from d2lora.tools.plots import spectra
from d2lora.tools.rows import print_rows, see_rows
from d2lora.training.diagnosis import MOST_ROWS, Start, losses_at_start

ENERGY = 0.99
LONGEST = 1024
"""Tokens of a task row that are read."""


@dataclass(frozen=True)
class Layer:
    """One layer's update, `alpha / rank * B A`."""

    name: str
    rank: int
    norm: float
    """Frobenius norm of the update."""
    effective_rank: float
    rank_for_energy: int
    """Least rank that keeps 99 % of the energy."""
    singular_values: tuple[float, ...]
    distance: float | None = None
    """Norm of the difference to the other adapter's update, over that update's norm."""
    overlap: float | None = None
    """Share of the output space in common with the other adapter, 0 to 1."""


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    path: Path
    layers: list[Layer]
    manifest: Manifest | None
    fits_base: bool | None
    """Whether the base is the one that it was made on; None where that is not known."""
    advice: list[str]
    start: Start | None = None
    """How it and the base do on rows of a task, where one was named."""


def inspect(settings: InspectSettings) -> Inspection:
    """Inspect an adapter or a warm start, compared with another one where it is named.

    Raises:
        ModelError: If a folder is not a LoRA adapter, or the two have no layer in common.
    """
    if settings.adapter is None:
        raise SettingsError("nothing to inspect: give --adapter, or --data alone for its rows")
    folder = Path(settings.adapter)
    files = AdapterFiles.read(folder)
    mine = _updates(files)
    other = {} if settings.other is None else _updates(AdapterFiles.read(Path(settings.other)))
    if settings.other is not None and not mine.keys() & other.keys():
        raise ModelError(f"{folder} and {settings.other} have no layer in common")
    layers = [_layer(name, factors, other.get(name)) for name, factors in mine.items()]
    manifest = Manifest.read(folder) if has_manifest(folder) else None
    fits = None
    if settings.base is not None and manifest is not None:
        own = identity_of(base_folder(settings.base, settings.revision, settings.gguf_file))
        fits = manifest.base.identity.is_same(own)
    advice = advice_on(layers, manifest)
    if files.beyond_factors:
        advice.append(
            f"Beside these layers it holds {some(files.beyond_factors)}, which the numbers do not "
            "cover."
        )
    start = _on_task(settings, folder, manifest) if settings.data else None
    if start is not None and start.warning is not None:
        advice.append(f"{start.warning[0].upper()}{start.warning[1:]}.")
    return Inspection(folder, layers, manifest, fits, advice, start)


def _on_task(settings: InspectSettings, folder: Path, manifest: Manifest | None) -> Start:
    """Measure the adapter and its base on a few rows of a task.

    Raises:
        D2LoraError: If the base is not known, or it or the data cannot be used.
    """
    name = settings.base or (manifest.base.id if manifest else None)
    if name is None:
        raise SettingsError("--data needs --base: the adapter does not say which it was made on")
    base = load_base(
        BaseSettings(
            base=name,
            revision=settings.revision,
            gguf_file=settings.gguf_file,
            quantization=settings.quantization,
            chat_template=settings.chat_template,
            template_args=settings.template_args,
        )
    )
    if warning := check_fit(folder, base):
        Reporter().say(warning)
    base = base_for(base, folder)
    encoder = encoder_of(folder, base, settings.chat_format)
    data = read_task(settings.data, settings.task, say=Reporter().say)
    examples = data.examples[:MOST_ROWS]
    items = encode_all(encoder, examples, LONGEST, "truncate").items
    model = attach_adapter(base.model, folder, trainable=False)
    check_switchable(model, AdapterFiles.read(folder))
    with fast.enabled(model, when=settings.fast):
        return losses_at_start(model, items, base.pad_id)


def _updates(files: AdapterFiles) -> dict[str, Factors]:
    """Return the scaled factors of every layer and expert, B carrying the scale.

    Raises:
        ModelError: If there are none, or those of experts cannot be told apart.
    """
    config, updates = files.config, dict[str, Factors]()
    if config.target_parameters and config.rank_pattern:
        raise ModelError(
            f"{files.folder}: it adapts parameters (`target_parameters`) and has ranks by name "
            "(`rank_pattern`): its experts cannot be told apart"
        )
    for full_name, (a, b) in files.layers.items():
        name = full_name.removeprefix(PREFIX)
        rank = config.r if config.target_parameters else len(a)
        scaled = Factors(a.double(), b.double() * scale_of(config, name, rank))
        if len(a) == rank:
            updates[name] = scaled
        else:
            experts = enumerate(experts_apart(scaled, rank))
            updates |= {f"{name}, expert {n}": factors for n, factors in experts}
    if not updates:
        held = some(files.beyond_factors)
        raise ModelError(f"{files.folder}: no LoRA factors of linear layers; it holds {held}")
    return updates


def _layer(name: str, factors: Factors, other: Factors | None) -> Layer:
    values = singular_values(factors)
    energy = values.square().cumsum(0)
    needed = int((energy < ENERGY * energy[-1]).sum()) + 1 if energy[-1] > 0 else 0
    norm = float(energy[-1].sqrt())
    distance = overlap = None
    if other is not None:
        of_other = inner_product(other, other)
        squared = norm**2 + of_other - 2 * inner_product(factors, other)
        distance = (max(squared, 0.0) / of_other) ** 0.5 if of_other > 0 else None
        overlap = subspace_overlap(factors, other)
    return Layer(
        name=name,
        rank=len(factors.a),
        norm=norm,
        effective_rank=effective_rank(values),
        rank_for_energy=needed,
        singular_values=tuple(values.tolist()),
        distance=distance,
        overlap=overlap,
    )


def advice_on(layers: list[Layer], manifest: Manifest | None) -> list[str]:
    """Return advice with its evidence; empty where nothing stands out."""
    advice: list[str] = []
    if all(layer.norm == 0 for layer in layers):
        return ["Every update is zero: the adapter changes nothing (untrained, or zero B)."]
    rank = max(layer.rank for layer in layers)
    needed = max(layer.rank_for_energy for layer in layers)
    typical = statistics.median(layer.effective_rank for layer in layers)
    if needed <= rank // 2:
        advice.append(
            f"Rank {rank} is more than needed: rank {needed} keeps {ENERGY:.0%} of every "
            f"layer's energy. `d2lora convert --rank {needed}` makes the adapter smaller."
        )
    if rank > 1 and typical > 0.9 * rank:
        advice.append(
            f"Rank {rank} may be too small: singular values hardly decay (median effective rank "
            f"{typical:.1f} of {rank}). Try twice the rank."
        )
    if manifest is not None and manifest.warnings:
        advice += [f"{text[0].upper()}{text[1:]}." for text in manifest.warnings]
    elif manifest is not None:
        before, after = manifest.validation_loss_before, manifest.validation_loss_after
        if before is not None and after is not None and after >= before:
            advice.append(
                f"Training did not lower the held-out loss ({before:.4f} before, {after:.4f} "
                "after). Lower the learning rate, or check the data."
            )
    return advice


def layer_table(found: Inspection) -> Table:
    """Return the layers as a table for the terminal."""
    table = Table(title=str(found.path))
    compared = any(layer.overlap is not None for layer in found.layers)
    columns = ["rank", "norm", "effective rank", f"rank for {ENERGY:.0%} energy"]
    columns += ["distance", "overlap"] if compared else []
    table.add_column("layer", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    for layer in found.layers:
        cells = [
            str(layer.rank),
            f"{layer.norm:.3f}",
            f"{layer.effective_rank:.1f}",
            str(layer.rank_for_energy),
        ]
        if compared:
            cells += [_shown(layer.distance), _shown(layer.overlap)]
        table.add_row(layer.name, *cells)
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _origin(found: Inspection) -> list[str]:
    """Return the manifest's contents in lines, and whether the base fits."""
    manifest = found.manifest
    if manifest is None:
        return ["no manifest: not made by d2lora, or copied without it"]
    lines = [
        f"{manifest.kind} on {manifest.base.id} (fingerprint {manifest.base.fingerprint[:12]}), "
        f"{manifest.objective}, {manifest.n_examples:,} rows, rank {manifest.lora.rank}, alpha "
        f"{manifest.lora.alpha:g}, targets {' '.join(manifest.lora.targets)}"
    ]
    if manifest.lora.add_tokens:
        lines.append(f"new tokens: {' '.join(manifest.lora.add_tokens)}")
    if manifest.lora.modules_to_save:
        lines.append(f"trained whole: {' '.join(manifest.lora.modules_to_save)}")
    if manifest.before_training is not None:
        start = {k: v for k, v in manifest.before_training.items() if k != "warning"}
        lines.append(str(Start(**start)))
    lines += [f"initialized from {a.path} (weights {a.fingerprint[:12]})" for a in manifest.lineage]
    if found.fits_base is not None:
        lines.append("the base fits" if found.fits_base else "the base has DIFFERENT weights")
    return lines


def to_json(found: Inspection) -> dict[str, Any]:
    """Return everything as plain values."""
    manifest = found.manifest
    return {
        "adapter": str(found.path),
        "layers": [asdict(layer) for layer in found.layers],
        "manifest": None if manifest is None else manifest.model_dump(mode="json"),
        "fits_base": found.fits_base,
        "advice": found.advice,
        "on_task": None if found.start is None else found.start.to_json(),
    }


def command(settings: InspectSettings) -> None:
    """Run `d2lora inspect`."""
    with claimed(settings.out, "file"), claimed(settings.plot, "file", "--plot"):
        if settings.adapter is None and settings.data:
            print_rows(see_rows(settings), settings.out)
            return
        with torch.inference_mode():
            found = inspect(settings)
        _show(found, settings)


def _show(found: Inspection, settings: InspectSettings) -> None:
    console = table_console()
    console.print(layer_table(found))
    measured = [] if found.start is None else [str(found.start)]
    for line in (*_origin(found), *measured, *found.advice):
        console.print(line, markup=False)
    if settings.plot is not None:
        values = {layer.name: layer.singular_values for layer in found.layers}
        spectra(values, f"Singular values of {found.path.name}", settings.plot)
        console.print(f"plot: {settings.plot}", markup=False)
    if settings.out is not None:
        write_json(settings.out, to_json(found))
