"""Phase 2: base + scarce task data + initialization -> adapter."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from d2lora.adapters.attach import detach_adapter
from d2lora.adapters.base import Base, load_base, load_tokenizer
from d2lora.adapters.chat_template import own_template
from d2lora.adapters.lora import LoraShape
from d2lora.adapters.manifest import Adapter, ancestor_of, base_for, check_fit
from d2lora.adapters.tokens import grown
from d2lora.data.batches import Item
from d2lora.data.encode import Encoder
from d2lora.data.trained_rows import TrainedRows
from d2lora.errors import SettingsError, WarmStartError
from d2lora.runtime.console import Reporter
from d2lora.runtime.extras import need_trackers
from d2lora.runtime.run_folder import RunFolder
from d2lora.settings import AdaptSettings, is_named_init
from d2lora.settings.seeds import seed_of
from d2lora.training.forecast import Forecast, forecast, show
from d2lora.training.initialization import (
    Initialization,
    InitializedAdapter,
    check_sharded,
    initialized,
)
from d2lora.training.phase import Phase, run_phase
from d2lora.training.rows import prepare_rows
from d2lora.warmstart import WarmStart

R = TypeVar("R")


def adapt(settings: AdaptSettings, base: Base | None = None) -> Adapter:
    """Fine-tune an adapter on a scarce task, from fresh LoRA or from a warm start.

    Optimizer, schedule and step count start from zero: only weights, shape and chat format are
    inherited (D2LoRA, arXiv 2503.18089, phase 2).

    Args:
        settings: The run's settings.
        base: The base already loaded as the settings say, when many runs share it.

    Raises:
        D2LoraError: One of its kinds, for settings, data, a base or a warm start that cannot be
            used.
    """
    if settings.dry_run:
        raise SettingsError(
            "--dry-run makes no adapter; in Python d2lora.adaptation.dry_run does it"
        )
    _prepared(settings, base, run_phase)
    return Adapter.load(settings.out)


def dry_run(settings: AdaptSettings, base: Base | None = None) -> Forecast:
    """Return what a run would take; nothing is left of it.

    Raises:
        D2LoraError: As `adapt`.
    """
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        return _prepared(settings.changed(out=out, dry_run=False, resume=False), base, forecast)


def _prepared(settings: AdaptSettings, base: Base | None, act: Callable[[Phase], R]) -> R:
    """Do something with the phase that the settings describe, ready to train."""
    need_trackers(settings.track)
    reporter = Reporter(quiet=settings.quiet)
    warm_start = None if is_named_init(settings.init) else WarmStart.load(settings.init)
    chat_format = _inherited_format(settings, warm_start)
    with RunFolder.open(settings.out, settings.to_yaml(), resume=settings.resume) as run:
        shape = _shape(settings, warm_start)
        base = base or load_base(settings)
        if warm_start is None:
            base = base.with_tokens(shape.add_tokens)
        else:
            base = base_for(base, warm_start.path)
        template = _inherited_template(settings, base, warm_start)
        encoder = Encoder.of(base, chat_format, template)
        rows = prepare_rows(settings, settings.n, encoder, reporter)
        with (
            grown(base.model, base.n_rows),
            _initialized(settings, warm_start, base, shape, rows.train, reporter) as adapter,
        ):
            return act(Phase(settings, base, adapter, rows, encoder, run, reporter))


def _shape(settings: AdaptSettings, warm_start: WarmStart | None) -> LoraShape:
    """Return the shape that the adapter gets: the warm start's, or that of the settings."""
    if warm_start is None:
        return LoraShape.fresh(settings)
    return warm_start.inherited_shape(settings)


@contextmanager
def _initialized(
    settings: AdaptSettings,
    warm_start: WarmStart | None,
    base: Base,
    shape: LoraShape,
    rows: Sequence[Item],
    reporter: Reporter,
) -> Generator[InitializedAdapter]:
    if warm_start is None:
        seed = seed_of(settings, "init")
        with initialized(settings, base, shape, seed, rows, reporter) as adapter:
            yield adapter
        return
    check_sharded(base.model, shape)
    if warning := check_fit(warm_start.path, base):
        reporter.say(warning)
    model = warm_start.apply_to(base.model, dropout=settings.dropout, scale=settings.init_scale)
    manifest = warm_start.manifest
    reporter.say(
        f"initialized from the {manifest.kind} {warm_start.path}; inherited: rank {shape.rank}, "
        f"alpha {shape.alpha:g}, targets {' '.join(shape.targets)}, chat format "
        f"{manifest.chat_format}"
        + (f"; strength {settings.init_scale:g}" if settings.init_scale != 1 else "")
    )
    lineage = (*manifest.lineage, ancestor_of(warm_start.path, manifest))
    try:
        about, trained = Initialization(manifest.kind), TrainedRows.read(warm_start.path)
        yield InitializedAdapter(model, shape, about, lineage, trained=trained)
    finally:
        detach_adapter(model)


def _inherited_format(settings: AdaptSettings, warm_start: WarmStart | None) -> str | None:
    """Return the chat format to use; a warm start's own cannot be contradicted."""
    wanted = settings.chat_format
    if warm_start is None:
        return wanted
    own = warm_start.manifest.chat_format
    if own == "auto":  # not known
        return wanted
    if wanted not in (None, "auto", own):
        raise WarmStartError(
            f"--chat-format {wanted} contradicts the warm start {warm_start.path}, made with "
            f"{own}; leave it out to inherit"
        )
    return own


def _inherited_template(
    settings: AdaptSettings, base: Base, warm_start: WarmStart | None
) -> str | None:
    """Return the chat template to use, None for the base's; as for the format."""
    if warm_start is None or warm_start.manifest.chat_format != "template":
        return None
    own = warm_start.manifest.chat_template
    if base.chat_template not in (None, own or own_template(load_tokenizer(settings))):
        raise WarmStartError(
            f"--chat-template and --template-args contradict the warm start {warm_start.path}, "
            "made with another template; leave them out to inherit"
        )
    return own


def command(settings: AdaptSettings) -> None:
    """Run `d2lora adapt`."""
    if settings.dry_run:
        show(dry_run(settings))
    else:
        adapt(settings)
