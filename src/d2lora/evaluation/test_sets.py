"""What adapters are measured on: the test rows of a task, general text, multiple choice."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from d2lora.adapters.manifest import Manifest, has_manifest
from d2lora.data.choices import ChoiceData, ChoiceQuestion, read_choice_questions
from d2lora.data.reading import Say, TaskData, labels_of, read_task, with_references
from d2lora.data.rows import Example, Fault
from d2lora.data.shots import chosen_shots, unasked
from d2lora.data.trained_rows import TestRow
from d2lora.errors import DataError, SettingsError, counted
from d2lora.evaluation.harness import HarnessTask, read_harness_tasks, split_names
from d2lora.evaluation.outputs import columns_of_outputs
from d2lora.settings import EvaluateSettings


@dataclass(frozen=True)
class TestSets:
    """What adapters are measured on; each may be empty."""

    __test__ = False  # not a class of tests

    task: TaskData | None
    general: list[Example]
    choices: list[ChoiceQuestion]
    labels: tuple[str, ...] = ()
    """What closed answers are chosen from; empty: not known from the data."""
    shots: Sequence[Example] = ()
    """Worked examples to show before each prompt, whole whatever the length limit."""
    rows: list[TestRow] = field(default_factory=list[TestRow])
    """All of them with their places, as they are in the files."""
    faults: list[Fault] = field(default_factory=list[Fault])
    """Bad rows that were skipped."""
    harness_task: HarnessTask | None = None
    """The task, where it is one of lm-evaluation-harness."""
    harness_choices: Sequence[HarnessTask] = ()
    """Multiple choice as lm-evaluation-harness has it."""

    @property
    def of_forgetting(self) -> bool:
        """Whether there is something that adapters may forget."""
        return bool(self.general or self.choices or self.harness_choices)

    def without_task(self) -> "TestSets":
        """Return what forgetting is measured on, alone."""
        return replace(self, task=None, harness_task=None)

    @classmethod
    def read(cls, settings: EvaluateSettings, say: Say | None = None) -> "TestSets":
        """Read the test rows that the settings name; `say` gets the formats of their rows.

        Raises:
            DataError: If rows are bad, or the task has no scored output.
        """
        skip_bad = settings.skip_bad_rows
        task = general = choices = None
        training = None
        harness_task, harness_choices = _of_the_harness(settings)
        if settings.data and harness_task is None:
            task = read_task(settings.data, settings.task, skip_bad=skip_bad, say=say)
            task = with_references(task)
        if settings.training_data or settings.shots:
            _check_training_data(settings, task)
            training = read_task(settings.training_data, settings.task, skip_bad=skip_bad)
        if task is not None and task.task.metrics:
            # The gold answers are scored first: what a metric refuses it refuses before the time
            # that outputs may take.
            columns_of_outputs(
                task, [example.completion for example in task.examples[: settings.limit]]
            )
        if task is not None and task.task.answers == "none":
            raise DataError(
                f"{' '.join(settings.data)}: task {task.task.name} has no answers to score; give "
                "the rows as --general-text"
            )
        if settings.general_text:
            general = read_task(settings.general_text, skip_bad=skip_bad, say=say)
        files, _ = split_names(settings.choices)
        if files:
            choices = read_choice_questions(files, skip_bad=skip_bad, say=say)
        rows = [
            *_placed("task", task, settings.limit),
            *_placed("general_text", general, None),
            *_placed_choices(choices),
        ]
        return cls(
            task,
            list(general.examples) if general else [],
            choices.questions if choices else [],
            _labels(task, training),
            _shots(settings, task, training, say) if task and training else (),
            rows=rows,
            faults=[fault for data in (task, general, choices) if data for fault in data.faults],
            harness_task=harness_task,
            harness_choices=harness_choices,
        )


def _check_training_data(settings: EvaluateSettings, task: TaskData | None) -> None:
    """Check that training rows are there where they are needed, and used where they are there.

    Raises:
        SettingsError: If not.
    """
    if not settings.training_data:
        raise SettingsError("--shots needs the rows to show: give --training-data")
    if settings.shots and task is not None and task.task.answers == "pairs":
        raise SettingsError("--shots: preferences are scored without answers to show before them")
    if task is None or not (settings.shots or task.task.has_labels):
        raise SettingsError(
            "--training-data is of use for a task's --shots and labels alone; leave it out"
        )


def _shots(
    settings: EvaluateSettings, task: TaskData, training: TaskData, say: Say | None
) -> list[Example]:
    """Choose the training rows to show; one that is a test row, too, would show its answer."""
    if not settings.shots:
        return []
    examples = unasked(training.examples, task.examples)
    n_left = len(training.examples) - len(examples)
    if n_left and say is not None:
        say(f"warning: {counted(n_left, 'training row')} not shown, as test rows ask the same")
    return chosen_shots(examples, settings.shots, settings.shots_seed)


def _of_the_harness(
    settings: EvaluateSettings,
) -> tuple[HarnessTask | None, list[HarnessTask]]:
    """Return the tasks of lm-evaluation-harness: that of --data and those of --choices."""
    files, data = split_names(settings.data)
    _, choices = split_names(settings.choices)
    if data and (files or len(data) > 1):
        raise SettingsError("--data takes one task of lm-evaluation-harness, and no files with it")
    if data and (settings.task != "auto" or settings.training_data or settings.shots):
        raise SettingsError(
            "a task of lm-evaluation-harness has its own prompts and shots: leave out --task, "
            "--shots and --training-data"
        )
    if len(set(choices)) < len(choices):
        raise SettingsError("--choices: each task of lm-evaluation-harness may be given once")
    named = list(dict.fromkeys([*data, *choices]))
    tasks = read_harness_tasks(named, settings.lm_eval_tasks, quiet=settings.quiet)
    for name in choices:
        tasks[name].check_choices()
    return tasks[data[0]] if data else None, [tasks[name] for name in choices]


def _labels(task: TaskData | None, training: TaskData | None) -> tuple[str, ...]:
    """Return the labels that the card lists or that training rows have."""
    if task is None or not task.task.has_labels:
        return ()
    return labels_of(training) if training else task.task.card.labels


def labels_known(sets: TestSets, adapters: Sequence[Path], say: Say) -> tuple[str, ...]:
    """Return the labels to choose from: the data's, else the adapters', else the test rows'."""
    task = sets.task
    if task is None or not task.task.has_labels:
        return ()
    labels = sets.labels or _labels_of_others(task, adapters, say)
    if unknown := never_chosen(task, labels):
        say(f"warning: {unknown}")
    return labels


def never_chosen(task: TaskData, labels: Sequence[str]) -> str | None:
    """Return a message on answers that are none of the labels; None where all are."""
    answers = [{example.completion, *example.references} for example in task.examples]
    unknown = [own for own in answers if own.isdisjoint(labels)]
    if not unknown:
        return None
    return (
        f"{counted(len(unknown), 'test row')} with an answer that is none of the {len(labels)} "
        f"labels, so it is never chosen: {min(unknown[0])!r:.60}"
    )


def _labels_of_others(task: TaskData, adapters: Sequence[Path], say: Say) -> tuple[str, ...]:
    manifests = [Manifest.read(folder) for folder in adapters if has_manifest(folder)]
    trained = {tuple(manifest.labels) for manifest in manifests if manifest.labels}
    if trained:
        labels = tuple(sorted({label for own in trained for label in own}))
        if len(trained) > 1:
            say(
                f"warning: the adapters were trained with different labels, and all {len(labels)} "
                "are chosen from; give the task's training rows as --training-data"
            )
        return labels
    labels = labels_of(task)
    say(
        f"warning: the {len(labels)} labels to choose from are those of the test rows, and others "
        "may exist; give training rows as --training-data, or `labels` in the task card"
    )
    return labels


def _placed(use: str, data: TaskData | None, limit: int | None) -> list[TestRow]:
    if data is None:
        return []
    digests = _digests(data)
    pairs = zip(data.rows[:limit], data.examples[:limit], strict=True)
    return [TestRow(use, r.file, r.line, e.texts, digests[r.file]) for r, e in pairs]


def _placed_choices(data: ChoiceData | None) -> list[TestRow]:
    """Return the test rows of questions, each with its right answer."""
    if data is None:
        return []
    digests = _digests(data)
    return [
        TestRow("choices", r.file, r.line, (f"{q.prompt}\n{q.choices[q.answer]}",), digests[r.file])
        for r, q in zip(data.rows, data.questions, strict=True)
    ]


def _digests(data: TaskData | ChoiceData) -> dict[str, str]:
    return {str(source["file"]): str(source["sha256"]) for source in data.sources}
