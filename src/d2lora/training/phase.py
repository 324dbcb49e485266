"""What warm-up and adaptation have in common: everything but the adapter's initialization.

base, rows, adapter -> train -> folder with adapter, manifest, card and marker of completion.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate import PartialState

from d2lora import fast
from d2lora.adapters.base import Base
from d2lora.adapters.manifest import (
    FORMAT_VERSION,
    LoraRecord,
    Manifest,
    base_record,
    fingerprint_of_adapter,
    write_manifest,
)
from d2lora.data.batches import digest_of
from d2lora.data.encode import Encoder
from d2lora.data.rows import Fault
from d2lora.data.sources import BAD_ROWS, write_bad_rows
from d2lora.errors import RunError, counted
from d2lora.runtime.claims import is_main_process
from d2lora.runtime.console import Reporter
from d2lora.runtime.run_folder import RunFolder, new_folder, provenance, read_json, write_json
from d2lora.settings import AdaptSettings, PhaseSettings, Reference, WarmupSettings
from d2lora.training import checkpoint
from d2lora.training.cost import reset_peak_memory
from d2lora.training.diagnosis import Start, losses_at_start, overfitting, too_short
from d2lora.training.initialization import InitializedAdapter
from d2lora.training.loop import Trained, planned, train
from d2lora.training.objectives import objective_of
from d2lora.training.reference import ReferencePolicy, with_reference
from d2lora.training.rows import Rows


def run_phase(
    settings: WarmupSettings | AdaptSettings,
    base: Base,
    adapter: InitializedAdapter,
    rows: Rows,
    encoder: Encoder,
    run: RunFolder,
    reporter: Reporter,
) -> None:
    """Train an initialized adapter, and write it with its manifest.

    With several processes the first writes, after all have found the folder free.
    """
    resumes = settings.resume and checkpoint.exists(run.path)
    everyone = PartialState(cpu=base.model.device.type == "cpu")
    everyone.wait_for_everyone()
    inputs = {
        "base": base.fingerprint,
        "initialization": [ancestor.fingerprint for ancestor in adapter.lineage],
        "rows": digest_of([*rows.train, *rows.valid]),
    }
    if resumes:
        _check_inputs(inputs, run)
    everyone.wait_for_everyone()
    if is_main_process():
        run.start(settings.to_yaml(), log=resumes)
        write_json(run.path / "provenance.json", {**provenance(), "inputs": inputs})
        _set_aside(rows.faults, run, reporter)
    everyone.wait_for_everyone()
    reset_peak_memory(base.model.device)
    max_tokens = settings.max_tokens if isinstance(settings, WarmupSettings) else None
    with fast.enabled(adapter.model, when=settings.fast) as used:
        start = _start(settings, base, adapter, rows, reporter)
        if start is not None and not resumes:
            run.log(step=0, loss_base=start.loss_base, loss_warm_start=start.loss_warm_start)
        rows, n_scored_tokens = _scored(settings, base, adapter, rows, run, reporter, everyone)
        warnings = [] if start is None or start.warning is None else [start.warning]
        short = too_short(planned(rows.train, settings, max_tokens).n_steps)
        for warning in (short, _unheeded(settings, rows)):
            if warning is not None:
                reporter.say(f"warning: {warning}")
                warnings.append(warning)
        trained = train(
            adapter.model,
            rows.train,
            rows.valid,
            objective_of(settings),
            settings,
            run,
            reporter,
            pad_id=base.pad_id,
            resume=resumes,
            max_tokens=max_tokens,
        )
    n_before = n_scored_tokens + adapter.about.n_tokens
    trained = replace(trained, cost=replace(trained.cost, n_prepass_tokens=n_before))
    if isinstance(settings, WarmupSettings):
        warnings += _warmup_warnings(trained, settings, reporter)
    if is_main_process():
        saved = _save_weights(adapter, run)
        manifest = _manifest(settings, base, saved, rows, encoder, trained, used, run)
        before = None if start is None else start.to_json()
        manifest = manifest.model_copy(update={"before_training": before, "warnings": warnings})
        (adapter.trained | rows.trained).write(run.path)
        _finish(manifest, rows, str(base.model.device), run)
    everyone.wait_for_everyone()
    cost = trained.cost
    reporter.say(
        f"written to {run.path} ({counted(cost.n_steps, 'step')}, {cost.n_tokens:,} tokens, "
        f"{cost.elapsed_s:.0f} s)"
    )


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


def _scored(
    settings: WarmupSettings | AdaptSettings,
    base: Base,
    adapter: InitializedAdapter,
    rows: Rows,
    run: RunFolder,
    reporter: Reporter,
    everyone: PartialState,
) -> tuple[Rows, int]:
    """Add DPO's reference log-probabilities to pairs; return the rows and the tokens run for it."""
    reference = reference_name(settings, adapter)
    if reference is None:
        return rows, 0
    # Where a part of the base is in the adapter, the base is the adapter before training.
    off = reference == "base" and not adapter.changes_base
    policy = ReferencePolicy(reference, adapter.model, off, base.fingerprint)
    pairs, n_tokens = with_reference(
        policy,
        [*rows.train, *rows.valid],
        run.path,
        reporter,
        pad_id=base.pad_id,
        max_tokens=settings.micro_batch_tokens,
        process=(everyone.process_index, everyone.num_processes),
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


def _start(
    settings: PhaseSettings,
    base: Base,
    adapter: InitializedAdapter,
    rows: Rows,
    reporter: Reporter,
) -> Start | None:
    """Report the losses of the base and the warm start on the task; fresh LoRA equals the base."""
    if not adapter.lineage or settings.objective != "sft":
        return None
    start = losses_at_start(adapter.model, rows.train, base.pad_id)
    reporter.say(str(start))
    if start.warning is not None:
        reporter.say(f"warning: {start.warning}")
    return start


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


def _warmup_warnings(trained: Trained, settings: WarmupSettings, reporter: Reporter) -> list[str]:
    progress = trained.progress
    warning = overfitting(
        progress.validation_before,
        progress.best_validation,
        progress.best_step,
        progress.validation_last,
        progress.step,
        kept=settings.keep_best,
    )
    if warning is None:
        return []
    reporter.say(f"warning: {warning}")
    return [warning]


def _save_weights(adapter: InitializedAdapter, run: RunFolder) -> InitializedAdapter:
    """Write the adapter's files into the run folder, each whole."""
    with new_folder(run.path / "adapter") as folder:
        saved = adapter.save(folder)
    for file in (run.path / "adapter").iterdir():
        file.replace(run.path / file.name)
    (run.path / "adapter").rmdir()
    return saved


def _finish(manifest: Manifest, rows: Rows, device: str, run: RunFolder) -> None:
    """Write manifest and provenance, and the marker of completion last."""
    write_manifest(manifest, run.path)
    inputs = read_json(run.path / "provenance.json")["inputs"]
    origin = {**manifest.provenance, "device": device, "data": rows.sources, "inputs": inputs}
    write_json(run.path / "provenance.json", origin)
    run.finish({"kind": manifest.kind, "cost": manifest.cost})
    shutil.rmtree(run.path / checkpoint.FOLDER, ignore_errors=True)


def _manifest(
    settings: WarmupSettings | AdaptSettings,
    base: Base,
    adapter: InitializedAdapter,
    rows: Rows,
    encoder: Encoder,
    trained: Trained,
    used: fast.Used,
    run: RunFolder,
) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        kind="warm start" if isinstance(settings, WarmupSettings) else "adapter",
        base=base_record(base),
        objective=settings.objective,
        reference=reference_name(settings, adapter),
        chat_format=encoder.format,
        lora=LoraRecord.of(adapter.shape),
        data=[dict(source) for source in rows.sources],
        n_examples=len(rows.train) + (0 if settings.validation_data else len(rows.valid)),
        selection=rows.selection,
        settings=settings.model_dump(mode="json"),
        cost=trained.cost.to_json(),
        validation_loss_before=trained.progress.validation_before,
        validation_loss_after=trained.validation_after,
        kept_step=trained.kept_step,
        lineage=list(adapter.lineage),
        initialization=adapter.about.to_json(),
        adapter_fingerprint=fingerprint_of_adapter(run.path),
        provenance=provenance(),
        kept_out=rows.kept_out,
        fast_passes=used.names,
    )


def _set_aside(faults: Sequence[Fault], run: RunFolder, reporter: Reporter) -> None:
    write_bad_rows(faults, run.path)
    if faults:
        reporter.say(f"skipped {counted(len(faults), 'bad row')}: {run.path / BAD_ROWS}")
