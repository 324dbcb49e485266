"""Phase 1: base + general data -> warm start."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from d2lora.adapters.base import Base, load_base
from d2lora.adapters.lora import LoraShape
from d2lora.adapters.tokens import grown
from d2lora.data.encode import Encoder
from d2lora.data.sources import SELECTED
from d2lora.errors import SettingsError
from d2lora.runtime.console import Reporter
from d2lora.runtime.extras import need_trackers
from d2lora.runtime.run_folder import DONE, RunFolder
from d2lora.selection.select import select
from d2lora.settings import SelectSettings, WarmupSettings
from d2lora.settings.seeds import seed_of
from d2lora.training.forecast import Forecast, forecast, show
from d2lora.training.high_rank import alpha_ratio, check_can_be_cut
from d2lora.training.initialization import initialized
from d2lora.training.phase import Phase, run_phase
from d2lora.training.rows import prepare_rows
from d2lora.warmstart import WarmStart

R = TypeVar("R")


def warm_up(settings: WarmupSettings, base: Base | None = None) -> WarmStart:
    """Warm an adapter up on general data (D2LoRA, arXiv 2503.18089, phase 1).

    Args:
        settings: The run's settings.
        base: The base already loaded as the settings say, when many runs share it.

    Raises:
        D2LoraError: One of its kinds, for settings, data or a base that cannot be used.
    """
    if settings.dry_run:
        raise SettingsError(
            "--dry-run makes no warm start; in Python d2lora.warmup.dry_run does it"
        )
    _prepared(settings, base, run_phase)
    return WarmStart.load(settings.out)


def dry_run(settings: WarmupSettings, base: Base | None = None) -> Forecast:
    """Return what a run would take; nothing is left of it.

    Raises:
        D2LoraError: As `warm_up`.
    """
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        return _prepared(settings.changed(out=out, dry_run=False, resume=False), base, forecast)


def _prepared(settings: WarmupSettings, base: Base | None, act: Callable[[Phase], R]) -> R:
    """Do something with the phase that the settings describe, ready to train."""
    need_trackers(settings.track)
    reporter = Reporter(quiet=settings.quiet)
    with RunFolder.open(settings.out, settings.to_yaml(), resume=settings.resume) as run:
        chosen = _chosen(settings, run)
        shape = _trained_shape(settings)
        base = (base or load_base(settings)).with_tokens(shape.add_tokens)
        encoder = Encoder.of(base, settings.chat_format)
        rows = prepare_rows(chosen, chosen.m, encoder, reporter)
        seed = seed_of(settings, "init")
        with (
            grown(base.model, base.n_rows),
            initialized(settings, base, shape, seed, rows.train, reporter) as adapter,
        ):
            if settings.train_rank is not None:
                check_can_be_cut(adapter.model)
            return act(Phase(settings, base, adapter, rows, encoder, run, reporter))


def _trained_shape(settings: WarmupSettings) -> LoraShape:
    """Return the shape that is trained: the warm start's, at a higher rank where one is set."""
    shape = LoraShape.fresh(settings)
    if settings.train_rank is None:
        return shape
    ratio = alpha_ratio(shape.rank, settings.train_rank, rslora=shape.rslora)
    return replace(shape, rank=settings.train_rank, alpha=shape.alpha * ratio)


def _chosen(settings: WarmupSettings, run: RunFolder) -> WarmupSettings:
    """Return the settings with the rows that `select` selects as data, where one is set.

    A resumed run finds its rows already selected.

    Raises:
        SettingsError: If the selection lacks its size.
    """
    if settings.select is None:
        return settings
    if settings.m is None:
        raise SettingsError(f"--select {settings.select} needs -m, the number of rows to select")
    folder = settings.out / "selection"
    if not (folder / DONE).is_file():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise SettingsError(
                "--select runs in one process: run d2lora select first, and give its data.jsonl"
            )
        run.start(settings.to_yaml())
        shared = SelectSettings.model_fields.keys() & WarmupSettings.model_fields.keys()
        common = {name: getattr(settings, name) for name in shared - {"out"}}
        common |= {"out": folder, "method": settings.select}
        select(SelectSettings.heeded(common))
    return settings.changed(data=(str(folder / SELECTED),))


def command(settings: WarmupSettings) -> None:
    """Run `d2lora warmup`."""
    if settings.dry_run:
        show(dry_run(settings))
    else:
        warm_up(settings)
