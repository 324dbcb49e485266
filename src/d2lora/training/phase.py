"""What warm-up and adaptation have in common: everything but the adapter's initialization.

base, rows, adapter -> train -> folder with adapter, manifest, card and marker of completion.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from d2lora import fast
from d2lora.adapters.base import Base
from d2lora.adapters.card import write_manifest
from d2lora.adapters.chat_template import own_template
from d2lora.adapters.foreign import save_tokenizer
from d2lora.adapters.manifest import (
    FORMAT_VERSION,
    LoraRecord,
    Manifest,
    base_record,
    fingerprint_of_adapter,
)
from d2lora.adapters.sharding import is_sharded
from d2lora.adapters.targets import coverage
from d2lora.data.batches import digest_of
from d2lora.data.encode import Encoder
from d2lora.data.rows import Fault
from d2lora.data.sources import BAD_ROWS, write_bad_rows
from d2lora.errors import RunError, counted
from d2lora.runtime.claims import is_main_process
from d2lora.runtime.console import Reporter
from d2lora.runtime.devices import slow_dtype
from d2lora.runtime.run_folder import RunFolder, new_folder, provenance, read_json, write_json
from d2lora.settings import (
    DEFAULT_RANK,
    AdaptSettings,
    PhaseSettings,
    Reference,
    WarmupSettings,
)
from d2lora.training import checkpoint
from d2lora.training.cost import reset_peak_memory
from d2lora.training.diagnosis import Start, losses_at_start, overfitting, too_short
from d2lora.training.initialization import InitializedAdapter
from d2lora.training.lesson import Lesson
from d2lora.training.loop import Trained, train
from d2lora.training.objectives import objective_of
from d2lora.training.reference import ReferencePolicy, with_reference
from d2lora.training.replay import Replay
from d2lora.training.rows import Rows


@dataclass(frozen=True)
class Phase:
    """One of the two phases, ready to train."""

    settings: WarmupSettings | AdaptSettings
    base: Base
    adapter: InitializedAdapter
    rows: Rows
    encoder: Encoder
    run: RunFolder
    reporter: Reporter


def run_phase(phase: Phase) -> None:
    """Train an initialized adapter, and write it with its manifest.

    With several processes the first writes, after all have found the folder free.
    """
    settings, run, device = phase.settings, phase.run, phase.base.model.device
    resumes = settings.resume and checkpoint.exists(run.path)
    everyone = PartialState(cpu=device.type == "cpu")
    _open(phase, everyone, resumes=resumes)
    adapted = coverage(phase.adapter.model)
    phase.reporter.say(adapted)
    reset_peak_memory(device)
    sharded = is_sharded(phase.adapter.model)
    with (
        _trackers(phase),
        fast.enabled(phase.adapter.model, when=settings.fast and not sharded) as used,
    ):
        start = _start(phase)
        if start is not None and not resumes:
            run.log(step=0, loss_base=start.loss_base, loss_warm_start=start.loss_warm_start)
        rows, n_scored_tokens = _scored(phase, everyone)
        phase = replace(phase, rows=rows)
        max_tokens = settings.max_tokens if isinstance(settings, WarmupSettings) else None
        objective = objective_of(settings)
        lesson = Lesson(
            rows.train,
            rows.valid,
            objective,
            phase.base.pad_id,
            max_tokens,
            rows.origins,
            Replay.of(rows.replay, len(rows.train), phase.adapter.model, settings),
        )
        warnings = [] if start is None or start.warning is None else [start.warning]
        warnings += _warned(
            warnings_before(lesson.schedule(settings).n_steps, settings, rows, phase.base.model),
            phase.reporter,
        )
        rank = cut_to(settings)
        trained = train(
            phase.adapter.model, lesson, settings, run, phase.reporter, resume=resumes, rank=rank
        )
    n_before = n_scored_tokens + phase.adapter.about.n_tokens
    trained = replace(trained, cost=replace(trained.cost, n_prepass_tokens=n_before))
    if trained.energy_kept is not None:
        phase.reporter.say(
            f"cut to rank {rank}: {trained.energy_kept:.1%} of what was learnt is kept"
        )
    if isinstance(settings, WarmupSettings):
        warnings += _warned((_overfitting(trained, settings),), phase.reporter)
    if is_main_process():
        manifest = _manifest(phase, _save_weights(phase, trained), trained)
        found = {
            "before_training": None if start is None else start.to_json(),
            "warnings": warnings,
            "adapted": adapted,
            "fast_passes": used.names,
        }
        _finish(manifest.model_copy(update=found), phase)
    everyone.wait_for_everyone()
    cost = trained.cost
    phase.reporter.say(
        f"written to {run.path} ({counted(cost.n_steps, 'step')}, {cost.n_tokens:,} tokens, "
        f"{cost.elapsed_s:.0f} s)"
    )


def _trackers(phase: Phase) -> AbstractContextManager[None]:
    if not phase.settings.track:
        return nullcontext()
    from d2lora.runtime.trackers import tracked

    return tracked(phase.settings, phase.run, phase.reporter)


def _open(phase: Phase, everyone: PartialState, *, resumes: bool) -> None:
    """Start the run's folder, or check that it may be resumed."""
    run, rows = phase.run, phase.rows
    inputs = {
        "base": phase.base.fingerprint,
        "initialization": [ancestor.fingerprint for ancestor in phase.adapter.lineage],
        "rows": digest_of(chain(rows.train, rows.valid, rows.replay)),
    }
    everyone.wait_for_everyone()
    if resumes:
        _check_inputs(inputs, run)
    everyone.wait_for_everyone()
    if is_main_process():
        run.start(phase.settings.to_yaml(), log=resumes)
        write_json(run.path / "provenance.json", {**provenance(), "inputs": inputs})
        _set_aside(rows.faults, run, phase.reporter)
    everyone.wait_for_everyone()


def _check_inputs(inputs: Mapping[str, Any], run: RunFolder) -> None:
    """Check that a run is resumed on what it was started on.

    Raises:
        RunError: If not: half of it would be learnt from other rows, or on another base.
    """
    before = read_json(run.path / "provenance.json").get("inputs", {})
    if changed := [name for name, value in inputs.items() if before.get(name) != value]:
        raise RunError(
            f"{run.path}: {' and '.join(changed)} changed since the run was started (files that "
            "were edited, or another tokenizer or chat template). Restore what was there, or start "
            "again in another --out"
        )


def _scored(phase: Phase, everyone: PartialState) -> tuple[Rows, int]:
    """Add DPO's reference log-probabilities to pairs; return the rows and the tokens run for it."""
    base, adapter, rows = phase.base, phase.adapter, phase.rows
    reference = reference_name(phase.settings, adapter)
    if reference is None:
        return rows, 0
    # Where a part of the base is in the adapter, the base is the adapter before training.
    off = reference == "base" and not adapter.changes_base
    mine = everyone.process_index, everyone.num_processes
    policy = ReferencePolicy(reference, adapter.model, off, base.fingerprint)
    pairs, n_tokens = with_reference(
        policy,
        [*rows.train, *rows.valid],
        phase.run.path,
        phase.reporter,
        pad_id=base.pad_id,
        max_tokens=phase.settings.micro_batch_tokens,
        # All processes take part in a pass of a sharded base, so each makes all of them.
        process=(0, 1) if is_sharded(adapter.model) else mine,
    )
    everyone.wait_for_everyone()
    n_train = len(rows.train)
    return replace(rows, train=pairs[:n_train], valid=pairs[n_train:]), n_tokens


def reference_name(
    settings: WarmupSettings | AdaptSettings, adapter: InitializedAdapter
) -> Reference | None:
    """Return the reference policy that DPO is held to; None for other objectives."""
    if settings.objective != "dpo":
        return None
    return settings.reference or ("warm_start" if adapter.lineage else "base")


def _start(phase: Phase) -> Start | None:
    """Report the losses of the base and the warm start on the task; fresh LoRA equals the base."""
    wanted = phase.settings.measure_start and phase.settings.objective == "sft"
    if not wanted or not phase.adapter.lineage:
        return None
    start = losses_at_start(phase.adapter.model, phase.rows.train, phase.base.pad_id)
    phase.reporter.say(str(start))
    _warned((start.warning,), phase.reporter)
    return start


def _warned(warnings: Iterable[str | None], reporter: Reporter) -> list[str]:
    """Report the warnings that there are; return them."""
    found = [warning for warning in warnings if warning is not None]
    for warning in found:
        reporter.say(f"warning: {warning}")
    return found


def warnings_before(
    n_steps: int, settings: PhaseSettings, rows: Rows, model: PreTrainedModel
) -> list[str]:
    """Return what is to be warned of before the first of `n_steps` optimizer steps."""
    slow = slow_dtype(model.dtype, model.device)
    found = (too_short(n_steps), _unheeded(settings, rows), slow)
    return [warning for warning in found if warning is not None]


def _unheeded(settings: PhaseSettings, rows: Rows) -> str | None:
    """Return a warning on settings that do nothing without validation rows."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("patience", "eval_every")
        if getattr(settings, name)
    ]
    if rows.valid or not given:
        return None
    return (
        f"{' and '.join(given)} without effect: there are no validation rows; give "
        "--validation-fraction or --validation-data"
    )


def _overfitting(trained: Trained, settings: WarmupSettings) -> str | None:
    progress = trained.progress
    return overfitting(
        progress.validation_before,
        progress.best_validation,
        progress.best_step,
        progress.validation_last,
        progress.step,
        kept=settings.keep_best,
    )


def cut_to(settings: WarmupSettings | AdaptSettings) -> int | None:
    """Return the rank that a warm-up at a higher one is cut to at its end; None: it is not."""
    if isinstance(settings, AdaptSettings) or settings.train_rank is None:
        return None
    return settings.rank or DEFAULT_RANK


def _save_weights(phase: Phase, trained: Trained) -> InitializedAdapter:
    """Write the adapter into the run folder, and a tokenizer with new tokens, each file whole."""
    run = phase.run
    with new_folder(run.path / "adapter") as folder:
        saved = phase.adapter.save(folder, cut_to(phase.settings), trained.energy_kept)
        if saved.shape.add_tokens:
            save_tokenizer(phase.encoder.tokenizer, folder)
    for file in (run.path / "adapter").iterdir():
        file.replace(run.path / file.name)
    (run.path / "adapter").rmdir()
    return saved


def _finish(manifest: Manifest, phase: Phase) -> None:
    """Write what the adapter was trained on, manifest and provenance; the marker comes last."""
    run, rows = phase.run, phase.rows
    (phase.adapter.trained | rows.trained).write(run.path)
    write_manifest(manifest, run.path)
    inputs = read_json(run.path / "provenance.json")["inputs"]
    device = str(phase.base.model.device)
    origin = {**manifest.provenance, "device": device, "data": rows.sources, "inputs": inputs}
    write_json(run.path / "provenance.json", origin)
    run.finish({"kind": manifest.kind, "cost": manifest.cost})


def _manifest(phase: Phase, saved: InitializedAdapter, trained: Trained) -> Manifest:
    settings, rows = phase.settings, phase.rows
    return Manifest(
        format_version=FORMAT_VERSION,
        kind="warm start" if isinstance(settings, WarmupSettings) else "adapter",
        base=base_record(phase.base),
        objective=settings.objective,
        reference=reference_name(settings, saved),
        chat_format=phase.encoder.format,
        lora=LoraRecord.of(saved.shape),
        data=[dict(source) for source in rows.sources],
        n_examples=len(rows.train) + (0 if settings.validation_data else len(rows.valid)),
        selection=rows.selection,
        settings=settings.model_dump(mode="json"),
        cost=trained.cost.to_json(),
        validation_loss_before=trained.progress.validation_before,
        validation_loss_after=trained.validation_after,
        kept_step=trained.kept_step,
        lineage=list(saved.lineage),
        initialization=saved.about.to_json(),
        adapter_fingerprint=fingerprint_of_adapter(phase.run.path),
        provenance=provenance(),
        kept_out=rows.kept_out,
        chat_template=_template_of(phase),
        labels=rows.labels or None,
    )


def _template_of(phase: Phase) -> str | None:
    """Return the chat template, where it is not the tokenizer's own."""
    template = own_template(phase.encoder.tokenizer)
    plain = phase.encoder.format == "plain"
    changed = phase.base.chat_template is not None or template != own_template(phase.base.tokenizer)
    return template if changed and not plain else None


def _set_aside(faults: Sequence[Fault], run: RunFolder, reporter: Reporter) -> None:
    write_bad_rows(faults, run.path)
    if faults:
        reporter.say(f"skipped {counted(len(faults), 'bad row')}: {run.path / BAD_ROWS}")
