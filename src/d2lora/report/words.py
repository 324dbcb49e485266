"""Findings in plain sentences. A difference that was not seen is reported as such."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from d2lora.errors import counted
from d2lora.evaluation.crossed import NO_VERDICT, NOTHING_SEEN
from d2lora.report.findings import Comparison, Findings
from d2lora.study.decontamination import contamination_lines


@dataclass(frozen=True)
class Claim:
    """The finding of one comparison."""

    n: int
    verdict: str
    """`helps`, `hurts`, `no difference seen`, or that one seed gives no verdict."""
    numbers: str
    seeds: str
    """Directions of the seeds where they differ, or that there is one; else empty."""


@dataclass(frozen=True)
class ArmVerdict:
    """An arm and what it is compared with, on one task."""

    arm: str
    against: str
    claims: list[Claim]


@dataclass(frozen=True)
class TaskVerdict:
    """All findings on one task."""

    task: str
    title: str
    score: str
    arms: list[ArmVerdict]
    power: str


def headline(findings: Findings) -> list[str]:
    """Return one sentence for each pair of arms, over all tasks and sizes."""
    if not findings.comparisons:
        return ["No two arms could be compared: too few cells are finished."]
    sentences: list[str] = []
    for arm, against in dict.fromkeys((c.arm, c.against) for c in findings.comparisons):
        own = [c for c in findings.comparisons if (c.arm, c.against) == (arm, against)]
        seen = sorted({c.verdict for c in own} - {NOTHING_SEEN, NO_VERDICT})
        parts = [
            f"{verdict} {_places(findings, [c for c in own if c.verdict == verdict])}"
            for verdict in seen
        ]
        unseen = [c for c in own if c.verdict == NOTHING_SEEN]
        subject = f"Compared with {against}, {arm}"
        if all(c.verdict == NO_VERDICT for c in own):
            sentences.append(f"{subject} was run with one seed, which allows no verdict.")
            continue
        if not parts:
            where = "" if len(own) == 1 else f" in any of {len(own)} comparisons"
            sentences.append(f"{subject} shows no significant difference{where}.")
            continue
        rest = ""
        if unseen:
            rest = f"; no significant difference {_places(findings, unseen)}"
        sentences.append(f"{subject} {' and '.join(parts)}{rest}.")
    return sentences


def task_verdicts(findings: Findings) -> list[TaskVerdict]:
    """Return the findings on every task, in the plan's order."""
    found: list[TaskVerdict] = []
    for task in findings.plan.tasks:
        own = [c for c in findings.comparisons if c.task == task]
        arms = [
            ArmVerdict(
                arm, against, [_claim(c) for c in own if (c.arm, c.against) == (arm, against)]
            )
            for arm, against in dict.fromkeys((c.arm, c.against) for c in own)
        ]
        name = findings.score_name(task)
        found.append(TaskVerdict(task, findings.title(task), name, arms, power_line(own)))
    return found


def power_line(comparisons: Sequence[Comparison]) -> str:
    """Return what it would take to detect one point, at worst and at best over comparisons."""
    if not comparisons:
        return "No arm of this task could be compared."
    known = [(c.difference, c.power) for c in comparisons if c.power is not None]
    if not known:
        return (
            "What it would take to detect a difference of 1 point cannot be estimated: the arms "
            "score alike on every row."
        )
    rows = _needed([power.n_items for _, power in known], "test rows")
    seeds = _needed([power.n_seeds for _, power in known], "seeds")
    n_items, n_seeds = known[0][0].n_items, known[0][0].n_seeds
    return (
        "To detect a difference of 1 point with 80 % power: with "
        f"{counted(n_seeds, 'seed')}, {rows}; with {n_items:,} test rows, {seeds}."
    )


def cautions(findings: Findings) -> list[str]:
    """Return what a reader should know before believing a number."""
    found_cautions: list[str] = []
    if findings.n_unfinished:
        found_cautions.append(
            f"The study is not finished, {counted(findings.n_unfinished, 'cell')} to go: here are "
            "the seeds that every arm has finished. Verdicts that are looked at again and again "
            "find differences by chance; that of the whole study counts."
        )
    if findings.failures:
        found_cautions.append(
            f"{counted(len(findings.failures), 'cell')} failed and is missing here."
        )
        if len(findings.failures) > 1:
            found_cautions[-1] = f"{len(findings.failures)} cells failed and are missing here."
    if findings.plan.seeds == 1:
        found_cautions.append(
            "Every number is from one seed: how much it would vary with the seed is not known."
        )
    found_cautions += [
        f"{findings.title(task)}: {arm} and {other} are not compared at n = {n}, as their "
        "seeds differ."
        for task, arm, other, n in findings.not_compared()
    ]
    found_cautions += [
        f"{sentence[0].upper()}{sentence[1:]}."
        for sentence in contamination_lines(c for c in findings.contamination if c["n_removed"])
    ]
    ends = (("at_edge", "learning rates", "one beyond"), ("at_end", "lengths", "a longer one"))
    for name, word, more in ends:
        n_ends = sum(one[name] for one in findings.chosen)
        if n_ends:
            found_cautions.append(
                f"{n_ends} of {len(findings.chosen)} tuned {word} are at the edge of the search; "
                f"{more} may be better. They are marked in the table of learning rates and lengths."
            )
    return found_cautions


def _claim(c: Comparison) -> Claim:
    return Claim(c.n, c.verdict, c.numbers, c.seeds)


def _places(findings: Findings, comparisons: Sequence[Comparison]) -> str:
    """Return where: `on Titles at n = 16, 64 and on Word problems at n = 64`."""
    by_task: dict[str, list[int]] = {}
    for c in comparisons:
        by_task.setdefault(c.task, []).append(c.n)
    return " and ".join(
        f"on {findings.title(task)} at n = {_joined(sizes)}" for task, sizes in by_task.items()
    )


def _joined(sizes: Sequence[int]) -> str:
    return ", ".join(f"{n:,}" for n in sorted(sizes))


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _needed(numbers: Sequence[float], what: str) -> str:
    enough = [int(value) for value in numbers if math.isfinite(value)]
    if not enough:
        return f"no number of {what} is enough"
    if len(enough) == len(numbers):
        return f"{_range(enough)} {what}"
    return f"{_range(enough)} {what} at some sizes, and no number is enough at others"
