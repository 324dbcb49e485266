"""The rows of a phase: read, decontaminated, subsampled, encoded and split."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from d2lora.data.batches import Encoded
from d2lora.data.contamination import Guard, leaks_of
from d2lora.data.encode import Encoder
from d2lora.data.encoded_sets import EncodedSet, encode_all, encode_pairs
from d2lora.data.reading import TaskData, labels_of, read_pool
from d2lora.data.rows import Example, Fault, place
from d2lora.data.sources import nested_order, selection_behind, split_validation
from d2lora.data.spool import Lazy, Spool
from d2lora.data.tasks import AUTO, answers_of
from d2lora.data.trained_rows import TrainedRows
from d2lora.errors import DataError, counted
from d2lora.runtime.console import Reporter
from d2lora.settings import PhaseSettings, WarmupSettings
from d2lora.settings.seeds import seed_of
from d2lora.training.task_shaped import Shaper


@dataclass(frozen=True)
class Rows:
    """Encoded training and validation rows, and where they come from."""

    train: Sequence[Any]
    """`Encoded` to learn, or `PreferencePair` where an objective learns preferences."""
    valid: Sequence[Any]
    sources: list[dict[str, object]]
    selection: str
    faults: list[Fault]
    kept_out: dict[str, object] | None = None
    """Evaluation files that were checked, and how many rows were removed."""
    trained: TrainedRows = field(default_factory=TrainedRows)
    """The training rows' digests."""
    labels: tuple[str, ...] = ()
    """The labels of closed answers, those of all rows read."""
    origins: Sequence[str] = ()
    """The source of each training row, a name or its file, where a warm-up looks at it."""
    replay: Sequence[Encoded] = ()
    """General rows that are learnt beside them."""


def prepare_rows(
    settings: PhaseSettings, n: int | None, encoder: Encoder, reporter: Reporter
) -> Rows:
    """Read, subsample, encode and split the rows of a phase.

    They stay on disk, and so do their token ids. Rows that overlap with an evaluation file are
    removed first. Subsets of one seed nest, and the validation rows are part of the n.

    Raises:
        DataError: If there are fewer than n rows, or rows are bad or too long.
    """
    data = read_pool(
        settings.data,
        settings.task,
        skip_bad=settings.skip_bad_rows,
        say=reporter.say,
        check=encoder.check,
    )
    _check_objective(settings, data, reporter)
    data, kept_out = _without_leaks(settings, settings.data, data, reporter)
    replay = _replayed(settings, encoder, reporter) if settings.replay else None
    if n is not None and n > len(data.examples):
        raise DataError(f"{n} rows are requested, but the data has {len(data.examples)}")
    chosen = nested_order(len(data.examples), seed_of(settings, "subset"))[:n]
    examples = Lazy(data.examples.__getitem__, chosen)
    encoded = _encoded(settings, encoder, examples)
    _report(encoded.report(settings.max_length), reporter)
    parts = (
        (0.0, None) if settings.validation_data else (settings.validation_fraction, settings.fold)
    )
    train_rows, valid_rows = split_validation(range(len(encoded.items)), *parts)
    items = encoded.items
    valid: Sequence[Any] = Lazy(items.__getitem__, valid_rows)
    if settings.validation_data:
        valid = _validation_rows(settings, data, encoder, reporter)
    total = len(data.examples)
    selection = "all rows" if len(chosen) == total else f"a seeded subset of {total:,}"
    origins = [origin for name in settings.data if (origin := selection_behind(name))]
    selection = "; ".join([selection, *origins])
    reporter.say(
        f"rows: {len(train_rows):,} for training, {len(valid):,} for validation ({selection}; "
        f"task {data.task.name}, chat format {encoder.format})"
    )
    learnt: Sequence[Example] = Lazy(
        examples.__getitem__, (encoded.kept[index] for index in train_rows)
    )
    train_items: Sequence[Any] = Lazy(items.__getitem__, train_rows)
    looks_at_sources = isinstance(settings, WarmupSettings) and (
        settings.meta_steps is not None or settings.shots > 0
    )
    origins = _origins(data, chosen, encoded, train_rows) if looks_at_sources else []
    if data.task.card.turns == "every":
        n_answers = array("q")
        learnt = Spool(_answers(data, learnt, n_answers)).all()
        origins = [one for one, n in zip(origins, n_answers, strict=False) for _ in range(n)]
        train_items = _encoded(settings, encoder, learnt).items
        reporter.say(f"{counted(len(train_items), 'answer')} of these rows are learnt")
    trained = TrainedRows.of(learnt)
    labels = labels_of(data)
    if isinstance(settings, WarmupSettings) and settings.shots:
        shaper = Shaper(encoder, learnt, origins, settings)
        train_items = _encoded(settings, encoder, shaper.every(learnt, origins, 0)).items
        if valid_rows:
            held_out = Lazy(examples.__getitem__, (encoded.kept[index] for index in valid_rows))
            beside = _origins(data, chosen, encoded, valid_rows)
            valid = _encoded(settings, encoder, shaper.every(held_out, beside, 1)).items
        reporter.say(shaper.report())
    sources, faults = data.sources, data.faults
    general: Sequence[Encoded] = ()
    if replay is not None:
        general, trained = replay.train, trained | replay.trained
        sources, faults = [*sources, *replay.sources], [*faults, *replay.faults]
    return Rows(
        train_items, valid, sources, selection, faults, kept_out, trained, labels, origins,
        general,
    )  # fmt: skip


def _validation_rows(
    settings: PhaseSettings, data: TaskData, encoder: Encoder, reporter: Reporter
) -> Sequence[Any]:
    """Read and encode the rows of --validation-data, as those of a task."""
    task = data.task.name if settings.task == AUTO else settings.task
    held_out = read_pool(
        settings.validation_data, task, skip_bad=False, say=reporter.say, check=encoder.check
    )
    encoded = _encoded(settings, encoder, held_out.examples)
    _report(encoded.report(settings.max_length), reporter)
    return encoded.items


def _replayed(settings: PhaseSettings, encoder: Encoder, reporter: Reporter) -> Rows:
    """Read and encode the general rows that are learnt beside the others.

    Raises:
        DataError: If rows are bad or too long, or all overlap with an evaluation file.
    """
    data = read_pool(
        settings.replay,
        settings.replay_task,
        skip_bad=settings.skip_bad_rows,
        say=reporter.say,
        check=encoder.check,
    )
    data, kept_out = _without_leaks(settings, settings.replay, data, reporter)
    order = nested_order(len(data.examples), seed_of(settings, "subset"))[: settings.replay_n]
    examples = Lazy(data.examples.__getitem__, order)
    encoded = encode_all(encoder, examples, settings.max_length, settings.overlong)
    _report(encoded.report(settings.max_length), reporter)
    kept = Lazy(examples.__getitem__, encoded.kept)
    reporter.say(
        f"replay: {counted(len(encoded.items), 'general row')} beside the training rows, loss "
        f"{settings.replay_loss}, weight {settings.replay_weight:g}"
    )
    return Rows(encoded.items, (), data.sources, "", data.faults, kept_out, TrainedRows.of(kept))


def _without_leaks(
    settings: PhaseSettings, names: Sequence[str], data: TaskData, reporter: Reporter
) -> tuple[TaskData, dict[str, object] | None]:
    """Remove the rows that overlap with an evaluation file; report how many, and the first.

    Validation rows mostly share the wording of training rows, so there only the same question
    counts.

    Raises:
        DataError: If a file cannot be read, or no row is left.
    """
    tasks = dict.fromkeys((*settings.keep_out, *settings.validation_data), settings.task)
    guards: list[Guard] = []
    if settings.keep_out:
        guards.append(Guard(settings.keep_out, settings.keep_out_words, tasks))
    if settings.validation_data:
        guards.append(Guard(settings.validation_data, 0, tasks))
    if not guards:
        return data, None
    leaks = leaks_of(guards, data.examples)
    kept = [index for index in range(len(data.examples)) if index not in leaks]
    files = list(dict.fromkeys(name for guard in guards for name in guard.files))
    n = len(data.rows)
    record: dict[str, object] = {"files": files, "n_checked": n, "n_removed": len(leaks)}
    if not leaks:
        reporter.say(f"contamination: none of {n:,} rows overlaps with {' '.join(files)}")
        return data, record
    found = [leaks[index] for index in sorted(leaks)]
    reporter.say(
        f"contamination: removed {len(leaks):,} of {n:,} rows; the first "
        f"{found[0].how} {place(found[0].file, found[0].line)}"
    )
    if not kept:
        raise DataError(
            f"every row of {' '.join(names)} overlaps with {' '.join(files)}; train on "
            "other rows. Where only the wording of a template is the same, set --keep-out-words 0"
        )
    faults = [leak.as_fault(data.rows[leak.index]) for leak in found]
    left = replace(
        data,
        examples=Lazy(data.examples.__getitem__, kept),
        rows=Lazy(data.rows.__getitem__, kept),
        faults=[*data.faults, *faults],
    )
    return left, record


def _answers(data: TaskData, rows: Sequence[Example], counts: "array[int]") -> Iterator[Example]:
    """Yield every answer of conversations as an example; note how many each has."""
    for row in rows:
        answers = answers_of(data.task, row)
        counts.append(len(answers))
        yield from answers


def _origins(
    data: TaskData, chosen: Sequence[int], encoded: EncodedSet[Any], rows: Sequence[int]
) -> list[str]:
    """Return the source of some of the encoded rows: the one they name, else their file."""
    places = [chosen[encoded.kept[index]] for index in rows]
    return [data.examples[place].source or data.rows[place].file for place in places]


def _encoded(
    settings: PhaseSettings, encoder: Encoder, examples: Sequence[Example]
) -> EncodedSet[Any]:
    encode = encode_all if settings.objective == "sft" else encode_pairs
    return encode(encoder, examples, settings.max_length, settings.overlong)


def _check_objective(settings: PhaseSettings, data: TaskData, reporter: Reporter) -> None:
    """Check that the rows are what the objective learns from.

    Raises:
        DataError: If preferences are wanted and the rows hold none.
    """
    preferences = data.task.answers == "pairs"
    if settings.objective != "sft" and not preferences:
        raise DataError(
            f"--objective {settings.objective} learns from rows with `prompt`, `chosen` and "
            f"`rejected`, but {', '.join(settings.data)} holds rows of task {data.task.name}; make "
            "pairs of them with `d2lora pairs`, or use --objective sft"
        )
    if settings.objective == "sft" and preferences:
        reporter.say("sft learns the chosen completions; the rejected ones are not used")


def _report(text: str | None, reporter: Reporter) -> None:
    if text is not None:
        reporter.say(text)
