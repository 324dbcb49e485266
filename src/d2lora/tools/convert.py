"""Converting an adapter: another rank, strength or dtype, mixed, or merged into the base.

    d2lora convert --adapter warm --rank 32 --out warm-32
    d2lora convert --adapter warm --mix warm2 warm3 --mix-weights 0.5 0.25 0.25 --out mixed
    d2lora convert --adapter warm --dtype bfloat16 --out half-the-size
    d2lora convert --adapter adapter --merge --out model
    d2lora convert --adapter adapter --merge --out model.gguf
    d2lora convert --adapter adapter --out adapter.gguf

A higher rank leaves the function as it is, and the new directions train; a lower one is the best
approximation, and the share of each layer's energy that it keeps is reported. Alpha moves with the
rank, so that the factor alpha / rank stays. Whole modules and new tokens stay as they are; of mixed
adapters they are the mean.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from d2lora.adapters.base_files import base_folder
from d2lora.adapters.card import write_manifest
from d2lora.adapters.factors import Factors, extend, truncate
from d2lora.adapters.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFiles
from d2lora.adapters.fingerprints import identity_of
from d2lora.adapters.foreign import foreign
from d2lora.adapters.manifest import (
    Manifest,
    ancestor_of,
    fingerprint_of_adapter,
    has_manifest,
)
from d2lora.adapters.mixing import Plain, averaged, averaged_beside, concatenated, tensors_of
from d2lora.adapters.tokens import copy_tokenizer
from d2lora.data.trained_rows import TrainedRows
from d2lora.errors import ModelError, RunError, SettingsError, counted
from d2lora.runtime.claims import claimed
from d2lora.runtime.console import Reporter
from d2lora.runtime.devices import dtype_of
from d2lora.runtime.extras import need_extra
from d2lora.runtime.run_folder import (
    DONE,
    RunFolder,
    new_file,
    new_folder,
    provenance,
    write_json,
    write_text,
)
from d2lora.settings import ConvertSettings
from d2lora.tools.merge import merge_into_base, merge_into_gguf

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Conversion:
    """What was done."""

    path: Path
    energy_kept: dict[str, float]
    """Layer -> share of the update's energy that is kept; 1 where the rank did not fall."""
    largest_logit_difference: float | None
    """Between the adapted base and the merged model, on probe tokens; None without a merge."""


def convert(settings: ConvertSettings) -> Conversion:
    """Change an adapter's rank, strength, dtype or format, or merge it into its base.

    Raises:
        SettingsError: If no conversion is asked for, or conflicting ones.
        ModelError: If the adapter cannot be converted, or the merge changes its outputs.
        RunError: If `out` is taken.
    """
    folder = Path(settings.adapter)
    _check_asked(settings)
    if settings.gguf:
        return Conversion(settings.out, {}, _to_gguf(settings, folder))
    with RunFolder.open(settings.out, "", whole=True):
        if settings.merge:
            return Conversion(settings.out, {}, merge_into_base(settings, folder))
        return _reshape(settings, folder)


def _check_asked(settings: ConvertSettings) -> None:
    """Check that one conversion is asked for.

    Raises:
        SettingsError: If none is, or conflicting ones.
    """
    recast = settings.dtype != "auto" and not settings.merge
    reshaped = bool(settings.rank or settings.scale or settings.mix)
    if settings.gguf and reshaped:
        raise SettingsError(
            "an adapter is written to a GGUF file as it is: convert it into a folder first"
        )
    if not settings.gguf and settings.merge == (reshaped or recast):
        raise SettingsError(
            "give --rank, --scale, --mix or --dtype to convert, --merge alone, or an --out that "
            "ends in .gguf"
        )


def _to_gguf(settings: ConvertSettings, folder: Path) -> float | None:
    """Write the adapter, or the merged model, as a GGUF file; return as `merge_into_base`."""
    need_extra("gguf", "a GGUF file")
    if settings.out.exists():
        raise RunError(f"{settings.out} is there already; choose another --out or remove it")
    with claimed(settings.out, "file"), new_file(settings.out) as path:
        if settings.merge:
            return merge_into_gguf(settings, folder, path)
        from d2lora.tools.gguf_write import write_adapter

        place = base_folder(settings.base, settings.revision, settings.gguf_file)
        if has_manifest(folder):
            Manifest.read(folder).check_base(identity_of(place), settings.base, folder)
        with foreign(f"{settings.base}: not a causal language model"):
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        dtype = torch.float32 if settings.dtype == "auto" else dtype_of(settings.dtype, _CPU)
        write_adapter(folder, config, path, dtype, settings.out.stem)
    return None


class _Reshaped(NamedTuple):
    """An adapter's factors at another rank, strength or dtype."""

    layers: dict[str, Factors]
    rank: int
    energy_kept: dict[str, float]


def _reshape(settings: ConvertSettings, folder: Path) -> Conversion:
    adapters = [Plain.read(path) for path in (folder, *map(Path, settings.mix))]
    weights = settings.mix_weights or tuple(1 / len(adapters) for _ in adapters)
    if len(weights) != len(adapters):
        raise SettingsError(
            f"--mix-weights: {len(adapters)} adapters are mixed, got "
            f"{counted(len(weights), 'weight')}"
        )
    _check_same_base(adapters)
    layers, beside = adapters[0].layers, adapters[0].beside
    if settings.mix:
        mixed = concatenated if settings.mix_method == "cat" else averaged
        layers, beside = mixed(adapters, weights), averaged_beside(adapters, weights)
    beside = _cast(beside, settings)
    new = _reshaped(layers, settings)
    config = adapters[0].config
    ratio = math.sqrt(new.rank / config.r) if config.use_rslora else new.rank / config.r
    alpha = config.lora_alpha * ratio
    with new_folder(settings.out.resolve()) as out:  # behind a symbolic link, which stays
        every = {**tensors_of(new.layers), **beside}
        save_file(every, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        raw = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        raw |= {"r": new.rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
        raw |= {"rank_pattern": {}, "alpha_pattern": {}}
        write_text(out / ADAPTER_CONFIG, json.dumps(raw, indent=2))
        done: dict[str, Any] = {"kind": "adapter"}
        if has_manifest(folder):
            copy_tokenizer(folder, out)
            about = {
                "from_rank": config.r,
                "scale": _strength(settings),
                "energy_kept": new.energy_kept,
                "mixed": dict(zip((str(folder), *settings.mix), weights, strict=True))
                if settings.mix
                else None,
                "mix_method": settings.mix_method if settings.mix else None,
            }
            parents = [folder, *map(Path, settings.mix)]
            shape = {"rank": new.rank, "alpha": alpha, "rank_pattern": (), "alpha_pattern": ()}
            manifest = _write_manifest(parents, out, shape, about)
            done = {"kind": manifest.kind, "cost": manifest.cost}
        write_json(out / DONE, done)
    return Conversion(settings.out, new.energy_kept, None)


def _cast(beside: Mapping[str, Tensor], settings: ConvertSettings) -> dict[str, Tensor]:
    """Return what is trained whole in the dtype that is asked for."""
    if beside and _strength(settings) != 1:
        raise SettingsError(
            "--scale scales LoRA's update, and the adapter holds whole modules or new tokens, of "
            "which it is not known here how far they are from the base: leave it out, or give it "
            "as --init-scale to `d2lora adapt`"
        )
    if settings.dtype == "auto":
        return dict(beside)
    dtype = dtype_of(settings.dtype, _CPU)
    cast = {name: weight.to(dtype) for name, weight in beside.items()}
    if endless := [name for name, weight in cast.items() if not torch.isfinite(weight).all()]:
        raise SettingsError(f"{endless[0]} would hold numbers beyond {dtype}; use --dtype float32")
    return cast


def _strength(settings: ConvertSettings) -> float:
    return 1.0 if settings.scale is None else settings.scale


def _reshaped(layers: Mapping[str, Factors], settings: ConvertSettings) -> _Reshaped:
    """Bring all layers to the rank, strength and dtype that are asked for."""
    before = len(next(iter(layers.values())).a)
    rank = settings.rank or before
    generator = torch.Generator().manual_seed(settings.seed)
    energy: dict[str, float] = {}
    converted: dict[str, Factors] = {}
    for name, old in layers.items():
        energy[name] = 1.0
        if rank < before:
            new, energy[name] = truncate(old, rank)
        else:
            new = extend(old, rank, generator)
        dtype = old.a.dtype if settings.dtype == "auto" else dtype_of(settings.dtype, _CPU)
        converted[name] = Factors(new.a.to(dtype), (new.b * _strength(settings)).to(dtype))
        if not all(torch.isfinite(factor).all() for factor in converted[name]):
            raise SettingsError(
                f"{name} would hold numbers beyond {dtype}; use a smaller --scale or smaller "
                "--mix-weights, or --dtype float32"
            )
    return _Reshaped(converted, rank, energy)


def _write_manifest(
    parents: Sequence[Path], out: Path, shape: Mapping[str, Any], about: Mapping[str, Any]
) -> Manifest:
    """Write the first parent's manifest with what changed, and the rows of all parents."""
    first = Manifest.read(parents[0])
    known = [path for path in parents if has_manifest(path)]
    manifest = first.model_copy(
        update={
            "lora": first.lora.model_copy(update=shape),
            "lineage": [*first.lineage, *(ancestor_of(p, Manifest.read(p)) for p in known)],
            "adapter_fingerprint": fingerprint_of_adapter(out),
            "conversion": about,
            "provenance": provenance(),
        }
    )
    write_manifest(manifest, out)
    reduce(or_, map(TrainedRows.read, parents)).write(out)
    return manifest


def randomise(folder: Path, out: Path, seed: int) -> None:
    """Write an adapter of random weights with an adapter's shape and norms.

    Each layer's A and B are Gaussian, with the Frobenius norms of the given adapter's: a control
    that separates what a warm start learnt from its size.
    """
    generator = torch.Generator().manual_seed(seed)
    Plain.read(folder).check_factors_alone()
    converted = tensors_of(AdapterFiles.read(folder).layers)
    for name, old in sorted(converted.items()):
        new = torch.randn(old.shape, generator=generator)
        converted[name] = (new * (old.float().norm() / new.norm())).to(old.dtype)
    old_manifest = Manifest.read(folder)
    with new_folder(out) as temporary:
        save_file(converted, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        text = (folder / ADAPTER_CONFIG).read_text(encoding="utf-8")
        write_text(temporary / ADAPTER_CONFIG, text)
        update: dict[str, Any] = {
            "lineage": [*old_manifest.lineage, ancestor_of(folder, old_manifest)],
            "adapter_fingerprint": fingerprint_of_adapter(temporary),
            "conversion": {"random_weights_seed": seed},
            "provenance": provenance(),
        }
        write_manifest(old_manifest.model_copy(update=update), temporary)
        TrainedRows().write(temporary)  # random weights were trained on no row
        write_json(temporary / DONE, {"kind": old_manifest.kind, "cost": old_manifest.cost})


def _check_same_base(adapters: Sequence[Plain]) -> None:
    """Check that adapters to be mixed, where they say so, were made on one base and format.

    Raises:
        ModelError: If they were not.
    """
    known = [a.folder for a in adapters if has_manifest(a.folder)]
    manifests = [Manifest.read(folder) for folder in known]
    for folder, manifest in zip(known[1:], manifests[1:], strict=True):
        manifest.check_base(manifests[0].base.identity, manifests[0].base.id, folder)
        if manifest.chat_format != manifests[0].chat_format:
            raise ModelError(
                f"{folder} was made with chat format {manifest.chat_format}, {known[0]} with "
                f"{manifests[0].chat_format}; they cannot be mixed"
            )
        if manifest.lora.add_tokens != manifests[0].lora.add_tokens:
            raise ModelError(
                f"{folder} was made with other new tokens than {known[0]}; they cannot be mixed"
            )
        if manifest.chat_template != manifests[0].chat_template:
            raise ModelError(
                f"{folder} was made with another chat template than {known[0]}; they cannot be "
                "mixed"
            )


def command(settings: ConvertSettings) -> None:
    """Run `d2lora convert`."""
    done = convert(settings)
    reporter = Reporter()
    if done.largest_logit_difference is not None:
        reporter.say(
            f"merged; the largest difference of logits is {done.largest_logit_difference:.2g}"
        )
    for name, energy in sorted(done.energy_kept.items(), key=lambda item: item[1]):
        if energy < 1:
            reporter.say(f"{energy:7.2%} of the energy kept: {name}")
    reporter.say(f"written to {done.path}")
