"""pool + a few task examples -> warm-up set: cleaned, selected, explained.

data.jsonl       the selected rows as they stand in the pool, for `d2lora warmup --data`
reasons.jsonl    where each selected row stands in the pool, and why it was selected
rejected.jsonl   what hygiene removed: step, reason and row
README.md        the data card; card.json has its numbers
provenance.json  versions, commit and date
done.json        the marker of completion
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2lora.data.encode import Encoder
from d2lora.data.reading import TaskData, read_pool, read_task
from d2lora.data.sources import SELECTED, SELECTION_CARD
from d2lora.data.spool import Lazy
from d2lora.errors import DataError, counted
from d2lora.runtime.console import Reporter
from d2lora.runtime.extras import need_extra
from d2lora.runtime.run_folder import DONE, SETTINGS, RunFolder, new_folder, provenance, write_json
from d2lora.selection import datacard
from d2lora.selection.features import PoolFeatures
from d2lora.selection.hygiene import Cleaned, clean
from d2lora.selection.methods import OF_TASK, Pick, Request, choose, need_task
from d2lora.settings import SelectSettings
from d2lora.settings.seeds import stream_seed

REASONS, REJECTED = "reasons.jsonl", "rejected.jsonl"


@dataclass(frozen=True)
class Selection:
    """A selected warm-up set on disk."""

    path: Path
    card: dict[str, Any]

    @property
    def data(self) -> Path:
        """The file of the selected rows."""
        return self.path / SELECTED


def select(settings: SelectSettings) -> Selection:
    """Clean a pool and select a warm-up set of m rows from it.

    Raises:
        D2LoraError: One of its kinds, for settings, data or a base that cannot be used, and where
            fewer than m rows are left.
    """
    method = _method(settings)
    need_extra("select", "selecting warm-up rows")
    with RunFolder.open(settings.out, settings.to_yaml(), whole=True):
        return _select(settings, method)


def _select(settings: SelectSettings, method: str) -> Selection:
    reporter = Reporter(quiet=settings.quiet)
    encoder = Encoder.of_tokenizer(settings, settings.chat_format)
    pool = read_pool(settings.data, settings.task, say=reporter.say)
    tasks = [
        read_task([name], settings.for_card, say=reporter.say).examples
        for name in settings.for_task
    ]
    seed = stream_seed(settings.seed, "source_cap")
    cleaned = clean(pool, settings, encoder, seed, reporter)
    reporter.say(cleaned.report())
    if not cleaned.kept:
        raise DataError(f"no row of the pool is left; {cleaned.report()}")
    features = PoolFeatures(settings, pool, cleaned.kept, tasks, reporter)
    request = Request(settings.m, stream_seed(settings.seed, "select"), settings.relevance)
    picks = choose(method, features, request)
    chosen = [cleaned.kept[pick.index] for pick in picks]
    task = [example for examples in tasks for example in examples]
    card = datacard.measure(settings, method, pool, task, cleaned, chosen, encoder)
    _write(settings, pool, cleaned, picks, card)
    reporter.say(
        f"{method}: {counted(len(picks), 'row')} written to {settings.out / SELECTED}; "
        f"{_measures(card)}"
    )
    return Selection(settings.out, card)


def _method(settings: SelectSettings) -> str:
    method: str = settings.method
    if method == "auto":
        method = "dsir" if settings.for_task else "stratified"
    if method in OF_TASK:
        need_task(settings.for_task, method)
    return method


def _write(
    settings: SelectSettings, pool: TaskData, cleaned: Cleaned, picks: Sequence[Pick],
    card: dict[str, Any],
) -> None:  # fmt: skip
    """Write the folder whole, or not at all."""
    chosen = [cleaned.kept[pick.index] for pick in picks]
    examples = Lazy(pool.examples.__getitem__, chosen)
    rows = Lazy(pool.rows.__getitem__, chosen)
    reasons = (
        {"file": row.file, "line": row.line, "reason": pick.reason, "score": pick.score}
        for row, pick in zip(rows, picks, strict=True)
    )
    with new_folder(settings.out) as folder:
        (folder / SETTINGS).write_text(settings.to_yaml(), encoding="utf-8")
        _lines(folder / SELECTED, (row.values for row in rows))
        _lines(folder / REASONS, reasons)
        _lines(folder / REJECTED, _aside(pool, cleaned))
        (folder / "README.md").write_text(datacard.page(card, examples), encoding="utf-8")
        write_json(folder / SELECTION_CARD, card)
        write_json(folder / "provenance.json", {**provenance(), "data": pool.sources})
        write_json(folder / DONE, {"kind": "selection", "m": len(rows)})


def _lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


def _aside(pool: TaskData, cleaned: Cleaned) -> Iterator[dict[str, Any]]:
    for fault in pool.faults:
        yield {
            "file": fault.file, "line": fault.line, "step": "unreadable", "reason": fault.reason,
            "row": {"text": fault.text},
        }  # fmt: skip
    for item in cleaned.rejected:
        row = pool.rows[item.index]
        yield {
            "file": row.file, "line": row.line, "step": item.step, "reason": item.reason,
            "row": row.values,
        }  # fmt: skip


def _measures(card: dict[str, Any]) -> str:
    vendi, likeness = card["vendi_score"], card["similarity_to_task"]
    text = f"Vendi score {vendi['chosen']:.1f} (random subset {vendi['random']:.1f})"
    if likeness is not None:
        text += (
            f", similarity to the task {likeness['chosen']:.3f} (random subset "
            f"{likeness['random']:.3f})"
        )
    return text


def command(settings: SelectSettings) -> None:
    """Run `d2lora select`."""
    select(settings)
