"""Phase 1: base + general data -> warm start."""

from d2lora.console import Reporter
from d2lora.encode import Encoder
from d2lora.initialization import begin
from d2lora.inits import LoraShape
from d2lora.models import Base, load_base
from d2lora.phase import prepare_rows, run_phase
from d2lora.runs import RunFolder
from d2lora.settings import WarmupSettings
from d2lora.train import seed_of
from d2lora.warmstart import WarmStart


def warm_up(settings: WarmupSettings, base: Base | None = None) -> WarmStart:
    """Warm an adapter up on general data (D2LoRA, arXiv 2503.18089, phase 1).

    Args:
        settings: The run's settings.
        base: The base already loaded as the settings say, when many runs share it.

    Raises:
        D2LoraError: One of its kinds, for settings, data or a base that cannot be used.
    """
    reporter = Reporter(quiet=settings.quiet)
    run = RunFolder.open(settings.out, settings.to_yaml(), resume=settings.resume)
    base = base or load_base(settings)
    encoder = Encoder.of(base, settings.chat_format)
    rows = prepare_rows(settings, settings.m, encoder, reporter)
    shape = LoraShape.fresh(settings)
    seed = seed_of(settings, "init")
    with begin(settings, base, shape, seed, rows.train, reporter) as beginning:
        run_phase(settings, base, beginning, rows, encoder, run, reporter)
    return WarmStart.load(settings.out)


def command(settings: WarmupSettings) -> None:
    """Run `d2lora warmup`."""
    warm_up(settings)
