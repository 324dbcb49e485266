"""What warm-up and adaptation have in common: everything but how the adapter begins.

base, rows, adapter -> train -> folder with adapter, manifest, card and marker of completion.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

from accelerate import PartialState
from peft import PeftModel

from d2lora import checkpoint
from d2lora.artifacts import (
    FORMAT_VERSION,
    Ancestor,
    LoraRecord,
    Manifest,
    base_record,
    fingerprint_of_adapter,
    save_adapter,
    write_manifest,
)
from d2lora.console import Reporter
from d2lora.contamination import Guard
from d2lora.data import Fault, nested_order, split_validation
from d2lora.diagnosis import Start, losses_at_start, overfitting
from d2lora.encode import Encoded, Encoder, encode_all
from d2lora.errors import DataError
from d2lora.inits import LoraShape
from d2lora.models import Base, detach_adapter
from d2lora.objectives import SFT
from d2lora.runs import (
    RunFolder,
    is_main_process,
    new_folder,
    provenance,
    write_json,
    write_text,
)
from d2lora.selection import selection_behind
from d2lora.settings import AdaptSettings, PhaseSettings, WarmupSettings
from d2lora.tasks import TaskData, read_task
from d2lora.train import Trained, seed_of, train


@dataclass(frozen=True)
class Rows:
    """Encoded training and validation rows, and where they come from."""

    train: list[Encoded]
    valid: list[Encoded]
    sources: list[dict[str, object]]
    selection: str
    faults: list[Fault]
    kept_out: dict[str, object] | None = None
    """Evaluation files that were checked, and how many rows were taken out."""


def prepare_rows(
    settings: PhaseSettings, n: int | None, encoder: Encoder, reporter: Reporter
) -> Rows:
    """Read, choose, encode and split the rows of a phase.

    Rows that give an evaluation file away are taken out first. Subsets of one seed nest, and the
    validation rows are part of the n.

    Raises:
        DataError: If there are fewer than n rows, or rows are bad or too long.
    """
    data = read_task(settings.data, settings.task, skip_bad=settings.skip_bad_rows)
    data, kept_out = _without_leaks(settings, data, reporter)
    if n is not None and n > len(data.examples):
        raise DataError(f"{n} rows are asked for, but the data has {len(data.examples)}")
    chosen = nested_order(len(data.examples), seed_of(settings, "subset"))[:n]
    examples = [data.examples[index] for index in chosen]
    encoded = encode_all(encoder, examples, settings.max_length, settings.overlong)
    _report(encoded.report(settings.max_length), reporter)
    fraction = 0.0 if settings.validation_data else settings.validation_fraction
    train_rows, valid_rows = split_validation(range(len(encoded.items)), fraction)
    items = encoded.items
    valid = [items[index] for index in valid_rows]
    if settings.validation_data:
        held_out = read_task(settings.validation_data, data.task.name)
        more = encode_all(encoder, held_out.examples, settings.max_length, settings.overlong)
        _report(more.report(settings.max_length), reporter)
        valid = more.items
    total = len(data.examples)
    selection = "all rows" if len(chosen) == total else f"a seeded choice of {total:,}"
    origins = [origin for name in settings.data if (origin := selection_behind(name))]
    selection = "; ".join([selection, *origins])
    reporter.say(
        f"rows: {len(train_rows):,} for training, {len(valid):,} for validation ({selection}; "
        f"task {data.task.name}, chat format {encoder.format})"
    )
    train_items = [items[index] for index in train_rows]
    return Rows(train_items, valid, data.sources, selection, data.faults, kept_out)


def _without_leaks(
    settings: PhaseSettings, data: TaskData, reporter: Reporter
) -> tuple[TaskData, dict[str, object] | None]:
    """Take out the rows that give an evaluation file away; say how many, and which.

    Validation rows mostly share the wording of training rows, so there only the same question
    counts.

    Raises:
        DataError: If a file cannot be read, or no row is left.
    """
    guards = [Guard(settings.keep_out, settings.keep_out_words)] if settings.keep_out else []
    guards += [Guard(settings.validation_data, 0)] if settings.validation_data else []
    if not guards:
        return data, None
    leaks = {leak.index: leak for guard in guards for leak in guard.leaks(data.examples)}
    kept = [index for index in range(len(data.examples)) if index not in leaks]
    files = [name for guard in guards for name in guard.files]
    n = len(data.rows)
    record: dict[str, object] = {"files": files, "n_checked": n, "n_removed": len(leaks)}
    if not leaks:
        reporter.say(f"contamination: none of {n:,} rows is in {' '.join(files)}")
        return data, record
    found = [leaks[index] for index in sorted(leaks)]
    reporter.say(
        f"contamination: took out {len(leaks):,} of {n:,} rows, the first as it "
        f"{found[0].how} {found[0].file}, line {found[0].line}"
    )
    if not kept:
        raise DataError(
            f"every row of {' '.join(settings.data)} is in {' '.join(files)}; train on other "
            "rows. Where only the wording of a template is the same, set --keep-out-words 0"
        )
    faults = [
        Fault(row.file, row.line, leak.reason, json.dumps(row.values, default=str))
        for leak in found
        for row in [data.rows[leak.index]]
    ]
    left = replace(
        data,
        examples=[data.examples[index] for index in kept],
        rows=[data.rows[index] for index in kept],
        faults=[*data.faults, *faults],
    )
    return left, record


def run_phase(
    settings: WarmupSettings | AdaptSettings,
    base: Base,
    model: PeftModel,
    shape: LoraShape,
    rows: Rows,
    encoder: Encoder,
    lineage: Sequence[Ancestor],
    run: RunFolder,
    reporter: Reporter,
) -> None:
    """Train the adapter on `model`, write it with its manifest, and take it off the base.

    With several processes the first writes, after all have found the folder free.
    """
    everyone = PartialState(cpu=base.model.device.type == "cpu")
    everyone.wait_for_everyone()
    if is_main_process():
        run.begin(settings.to_yaml())
        _set_aside(rows.faults, run, reporter)
    everyone.wait_for_everyone()
    start = _start(settings, base, model, rows, lineage, run, reporter)
    trained = train(
        model,
        rows.train,
        rows.valid,
        SFT(),
        settings,
        run,
        reporter,
        pad_id=base.pad_id,
        resume=settings.resume,
    )
    warnings = [] if start is None or start.warning is None else [start.warning]
    if isinstance(settings, WarmupSettings):
        warnings += _warmup_warnings(trained, reporter)
    if is_main_process():
        _save_weights(model, run)
        manifest = _manifest(settings, base, shape, rows, encoder, lineage, trained, run)
        told = None if start is None else start.to_json()
        manifest = manifest.model_copy(update={"before_training": told, "warnings": warnings})
        _finish(manifest, rows, str(base.model.device), run)
    everyone.wait_for_everyone()
    detach_adapter(model)
    cost = trained.cost
    reporter.say(
        f"written to {run.path} ({cost.n_steps:,} steps, {cost.n_tokens:,} tokens, "
        f"{cost.elapsed_s:.0f} s)"
    )


def _start(
    settings: PhaseSettings,
    base: Base,
    model: PeftModel,
    rows: Rows,
    lineage: Sequence[Ancestor],
    run: RunFolder,
    reporter: Reporter,
) -> Start | None:
    """Tell how the base and the warm start do on the task; a fresh adapter is the base itself."""
    if not lineage:
        return None
    start = losses_at_start(model, rows.train, base.pad_id)
    reporter.say(str(start))
    if start.warning is not None:
        reporter.say(f"warning: {start.warning}")
    if not settings.resume:
        run.log(step=0, loss_base=start.loss_base, loss_warm_start=start.loss_warm_start)
    return start


def _warmup_warnings(trained: Trained, reporter: Reporter) -> list[str]:
    progress = trained.progress
    warning = overfitting(
        progress.validation_before,
        progress.best_validation,
        progress.best_step,
        progress.validation_after,
        progress.step,
    )
    if warning is None:
        return []
    reporter.say(f"warning: {warning}")
    return [warning]


def _save_weights(model: PeftModel, run: RunFolder) -> None:
    """Write the adapter's files into the run folder, each whole."""
    with new_folder(run.path / "adapter") as folder:
        save_adapter(model, folder)
    for file in (run.path / "adapter").iterdir():
        file.replace(run.path / file.name)
    (run.path / "adapter").rmdir()


def _finish(manifest: Manifest, rows: Rows, device: str, run: RunFolder) -> None:
    """Write what says how the adapter came about, the marker of completion last."""
    write_manifest(manifest, run.path)
    origin = {**manifest.provenance, "device": device, "data": rows.sources}
    write_json(run.path / "provenance.json", origin)
    run.finish({"kind": manifest.kind, "cost": manifest.cost})
    shutil.rmtree(run.path / checkpoint.FOLDER, ignore_errors=True)


def _manifest(
    settings: WarmupSettings | AdaptSettings,
    base: Base,
    shape: LoraShape,
    rows: Rows,
    encoder: Encoder,
    lineage: Sequence[Ancestor],
    trained: Trained,
    run: RunFolder,
) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        kind="warm start" if isinstance(settings, WarmupSettings) else "adapter",
        base=base_record(base),
        objective="sft",
        chat_format=encoder.format,
        lora=LoraRecord(
            rank=shape.rank, alpha=shape.alpha, dropout=shape.dropout, targets=shape.targets
        ),
        data=[dict(source) for source in rows.sources],
        n_examples=len(rows.train) + (0 if settings.validation_data else len(rows.valid)),
        selection=rows.selection,
        settings=settings.model_dump(mode="json"),
        cost=trained.cost.to_json(),
        validation_loss_before=trained.progress.validation_before,
        validation_loss_after=trained.progress.validation_after,
        lineage=list(lineage),
        adapter_fingerprint=fingerprint_of_adapter(run.path),
        provenance=provenance(),
        kept_out=rows.kept_out,
    )


def _set_aside(faults: Sequence[Fault], run: RunFolder, reporter: Reporter) -> None:
    if faults:
        lines = [
            json.dumps({"file": f.file, "line": f.line, "reason": f.reason, "row": f.text})
            for f in faults
        ]
        write_text(run.path / "bad_rows.jsonl", "\n".join(lines) + "\n")
        reporter.say(f"set aside {len(faults)} bad row(s) in {run.path / 'bad_rows.jsonl'}")


def _report(text: str | None, reporter: Reporter) -> None:
    if text is not None:
        reporter.say(text)
