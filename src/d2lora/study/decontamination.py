"""Training rows of a study that overlap with one of its evaluation rows are removed.

Every row that a warm-up or a task may train on is compared with every evaluation file of the plan.
Files that lose rows are written again without them, and the plan names those; files that lose none
stay as they are, and with them the keys of their runs.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from d2lora.data.contamination import Guard, Leak, leaks_of
from d2lora.data.reading import Say, read_task
from d2lora.data.rows import place
from d2lora.data.sources import Row, is_remote, read_source
from d2lora.data.tasks import AUTO, layout_of
from d2lora.errors import DataError, listed
from d2lora.evaluation.harness import split_names
from d2lora.runtime.run_folder import write_shared
from d2lora.study.plan import StudyPlan
from d2lora.study.recipes import listed_values, warm_up_settings

FOLDER = "cleaned"


@dataclass(frozen=True)
class Removed:
    """A training row that was removed."""

    row: Row
    leak: Leak


@dataclass(frozen=True)
class Check:
    """The contamination check of a warm-up's or a task's training rows."""

    use: str
    """`warm-up NAME` or `task NAME`."""
    n_rows: int | None
    """Rows that were checked. None: they are not here, as in a dry run or of a warm start that was
    made before."""
    removed: tuple[Removed, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as plain values."""
        n_removed, first = len(self.removed), self.removed[0].leak if self.removed else None
        leak = None if first is None else f"{first.how} {place(first.file, first.line)}"
        return {"use": self.use, "n_rows": self.n_rows, "n_removed": n_removed, "first": leak}


def decontaminated(
    plan: StudyPlan, store: Path, world: Path, say: Say | None = None, *, fetch: bool = True
) -> tuple[StudyPlan, list[Check]]:
    """Remove the training rows that overlap with an evaluation row.

    Test rows and multiple-choice rows are compared by `keep_out_words` consecutive words and whole
    questions. Rows of held-out general text mostly share the wording of the warm-up's, and rows of
    the small world are made of the same templates and kept apart by the hash of their text; so
    there only the same question counts.

    Args:
        plan: The plan; its data are named by paths.
        store: Folder of the study's runs; what is left of a file is written to `cleaned/` in it.
        world: Folder of the small world's files.
        say: Gets the formats of training rows.
        fetch: Read hub data sets, too. False: what is not a file here goes unchecked.

    Returns:
        The plan with the cleaned files in place, and what was checked.

    Raises:
        DataError: If a file cannot be read, or fewer rows are left than the plan asks for.
    """
    cleaner = _Cleaner(plan, store / FOLDER, world, say, fetch=fetch)
    values = plan.model_dump(mode="json")
    checks: list[Check] = []
    faults: list[str] = []
    for where, own in _places(values).items():
        replayed = listed_values(own).get("replay")
        if not replayed:
            continue
        card = own.get("replay_task", AUTO)
        kept, check = cleaner.cleaned(f"replay of {where}", tuple(replayed), card)
        own["replay"] = list(kept)
        checks.append(check)
        if check.n_rows is not None and not own["replay"]:
            faults.append(f"{check.use}: every row overlaps with an evaluation row")
    for name in plan.warm_ups:
        if plan.ready(name):
            checks.append(Check(f"warm-up {name}", None, ()))
            continue
        settings = warm_up_settings(plan, name, Path())
        data, check = cleaner.cleaned(f"warm-up {name}", settings.data, settings.task)
        if data != settings.data:
            values["warm_ups"][name]["data"] = list(data)
        checks.append(check)
        faults += _too_few(check, settings.m or 1)
    for name, task in plan.tasks.items():
        data, check = cleaner.cleaned(f"task {name}", task.data, task.task)
        values["tasks"][name]["data"] = list(data)
        checks.append(check)
        faults += _too_few(check, max(plan.sizes))
    if faults:
        raise DataError(f"the study cannot run:\n{listed(faults)}")
    return StudyPlan.unchecked(values), checks


def _places(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of `warmup` and `adapt` in a plan, by where they stand; not copies."""
    return {
        "warm_up": values["warm_up"],
        **{f"warm_ups.{name}": own for name, own in values["warm_ups"].items()},
        "adapt": values["adapt"],
        **{f"tasks.{name}": task["adapt"] for name, task in values["tasks"].items()},
        **{f"arm {arm['name']}": arm["adapt"] for arm in values["arms"]},
    }


def contamination_lines(checks: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each use, as given by `Check.to_json`: how many rows were removed."""
    uses_by_fate: dict[str, list[str]] = {}
    for check in checks:
        n_rows, n_removed = check["n_rows"], check["n_removed"]
        if n_rows is None:
            fate = "not checked against the evaluation files, as not all are here"
        elif n_removed:
            fate = (
                f"{n_removed:,} of {n_rows:,} training rows overlap with an evaluation row and "
                f"were removed; the first {check['first']}"
            )
        else:
            fate = f"none of {n_rows:,} training rows overlaps with an evaluation row"
        uses_by_fate.setdefault(fate, []).append(check["use"])
    return [f"{_together(uses)}: {fate}" for fate, uses in uses_by_fate.items()]


def _together(uses: Sequence[str]) -> str:
    """Return `warm-ups a, b; task c` for `warm-up a`, `warm-up b` and `task c`."""
    names: dict[str, list[str]] = {}
    for use in uses:
        kind, _, name = use.partition(" ")
        names.setdefault(kind, []).append(name)
    return "; ".join(
        f"{kind}{'s' if len(of) > 1 else ''} {', '.join(of)}" for kind, of in names.items()
    )


class _Cleaner:
    def __init__(
        self, plan: StudyPlan, folder: Path, world: Path, say: Say | None, *, fetch: bool
    ) -> None:
        self._folder, self._world, self._say, self._fetch = folder, world, say, fetch
        self._n_words = plan.keep_out_words
        # Rows of the harness's tasks are not at hand.
        choices, _ = split_names(plan.choices)
        self._tests = tuple(
            dict.fromkeys([*(f for task in plan.tasks.values() for f in task.test), *choices])
        )
        self._general = plan.general_text
        self._tasks = {file: task.task for task in plan.tasks.values() for file in task.test}
        self._guard = cache(partial(Guard, tasks=self._tasks))
        self._cleaned = cache(self._clean)

    def cleaned(self, use: str, data: tuple[str, ...], task: str) -> tuple[tuple[str, ...], Check]:
        """Return the files to train on, and what was found in them."""
        files = (*data, *self._tests, *self._general)
        if not self._fetch and any(map(is_remote, files)):
            return data, Check(use, None, ())
        found = [self._cleaned(name, task) for name in data]
        kept = tuple(name for name, _, _ in found if name is not None)
        removed = tuple(one for _, _, own in found for one in own)
        return kept, Check(use, sum(n for _, n, _ in found), removed)

    def _clean(self, name: str, task: str) -> tuple[str | None, int, list[Removed]]:
        """Return a file without its leaks (None: no row is left), its rows, and what is gone."""
        data = read_task([name], task, skip_bad=True, say=self._say)
        leaks = leaks_of(self._guards(name), data.examples)
        removed = [Removed(data.rows[index], leaks[index]) for index in sorted(leaks)]
        if not removed:
            return name, len(data.rows), removed
        if len(removed) == len(data.rows):
            return None, len(data.rows), removed
        gone = {one.row.line for one in removed}
        rows = [
            row.values for row in read_source(name, layout_of(task)).rows if row.line not in gone
        ]
        text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        path = self._folder / f"{Path(name).stem}-{digest}.jsonl"
        write_shared(path, text)
        return str(path), len(data.rows), removed

    def _guards(self, name: str) -> list[Guard]:
        of_world = Path(name).parent == self._world
        alike = [f for f in self._tests if of_world and Path(f).parent == self._world]
        words = tuple(f for f in self._tests if f not in alike)
        guards = [self._guard(words, self._n_words)] if words else []
        questions = (*alike, *self._general)
        return guards + ([self._guard(questions, 0)] if questions else [])


def _too_few(check: Check, wanted: int) -> list[str]:
    if check.n_rows is None or not check.removed:
        return []
    left = check.n_rows - len(check.removed)
    if left >= wanted:
        return []
    leak = check.removed[0].leak
    first = f"{leak.how} {place(leak.file, leak.line)}"
    return [
        f"{check.use}: {wanted:,} rows are requested, but {left:,} of {check.n_rows:,} are left: "
        f"the others overlap with an evaluation row (the first {first}). Where only the wording "
        "of a template is the same, set keep_out_words: 0"
    ]
