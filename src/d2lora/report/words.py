"""What was found, in plain sentences. A difference that was not seen is said as such."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from d2lora.evaluation.crossed import NO_VERDICT, NOTHING_SEEN
from d2lora.report.findings import Comparison, Findings
from d2lora.study.decontamination import contamination_said


@dataclass(frozen=True)
class Claim:
    """What one comparison says."""

    n: int
    verdict: str
    """`helps`, `hurts`, `no difference seen`, or that one seed gives no verdict."""
    numbers: str
    seeds: str
    """Said where not all seeds say the same, or where there is one alone; else empty."""


@dataclass(frozen=True)
class Pair:
    """An arm and what it is compared with, on one task."""

    arm: str
    against: str
    claims: list[Claim]


@dataclass(frozen=True)
class TaskVerdict:
    """All that is said of one task."""

    task: str
    title: str
    score: str
    pairs: list[Pair]
    power: str


def headline(findings: Findings) -> list[str]:
    """Return one sentence for each pair of arms, over all tasks and sizes."""
    if not findings.comparisons:
        return ["No two arms could be compared: too few cells are finished."]
    sentences: list[str] = []
    for arm, against in dict.fromkeys((c.arm, c.against) for c in findings.comparisons):
        own = [c for c in findings.comparisons if (c.arm, c.against) == (arm, against)]
        said = sorted({c.verdict for c in own} - {NOTHING_SEEN, NO_VERDICT})
        parts = [
            f"{verdict} {_places(findings, [c for c in own if c.verdict == verdict])}"
            for verdict in said
        ]
        unseen = [c for c in own if c.verdict == NOTHING_SEEN]
        subject = f"Compared with {against}, {arm}"
        if all(c.verdict == NO_VERDICT for c in own):
            sentences.append(f"{subject} was run with one seed, which gives no verdict.")
            continue
        if not parts:
            where = "" if len(own) == 1 else f" in any of {len(own)} comparisons"
            sentences.append(f"{subject} makes no difference that could be seen{where}.")
            continue
        rest = ""
        if unseen:
            rest = f"; no difference was seen {_places(findings, unseen)}"
        sentences.append(f"{subject} {' and '.join(parts)}{rest}.")
    return sentences


def task_verdicts(findings: Findings) -> list[TaskVerdict]:
    """Return what is said of every task, in the plan's order."""
    found: list[TaskVerdict] = []
    for task in findings.plan.tasks:
        own = [c for c in findings.comparisons if c.task == task]
        pairs = [
            Pair(arm, against, [_claim(c) for c in own if (c.arm, c.against) == (arm, against)])
            for arm, against in dict.fromkeys((c.arm, c.against) for c in own)
        ]
        name = findings.score_name(task)
        found.append(TaskVerdict(task, findings.title(task), name, pairs, power_line(own)))
    return found


def power_line(comparisons: Sequence[Comparison]) -> str:
    """Say what it would take to see one point, at worst and at best over some comparisons."""
    if not comparisons:
        return "No arm of this task could be compared."
    known = [(c.difference, c.power) for c in comparisons if c.power is not None]
    if not known:
        return (
            "What it would take to see a difference of 1 point cannot be estimated: the arms "
            "answer alike, row by row."
        )
    rows = _needed([power.n_items for _, power in known], "test rows")
    seeds = _needed([power.n_seeds for _, power in known], "seeds")
    n_items, n_seeds = known[0][0].n_items, known[0][0].n_seeds
    return (
        f"To see a difference of 1 point four times out of five takes, with "
        f"{_count(n_seeds, 'seed')}, {rows}; or, with {n_items:,} test rows, {seeds}."
    )


def cautions(findings: Findings) -> list[str]:
    """Return what a reader should know before believing a number."""
    said: list[str] = []
    if findings.failures:
        said.append(f"{_count(len(findings.failures), 'cell')} failed and is missing here.")
        if len(findings.failures) > 1:
            said[-1] = f"{len(findings.failures)} cells failed and are missing here."
    if findings.plan.seeds == 1:
        said.append(
            "Every number rests on one seed: how much another seed would change it is not known."
        )
    said += [
        f"{findings.title(task)}: {arm} and {other} are not compared at n = {n}, as they do not "
        "have the same seeds."
        for task, arm, other, n in findings.not_compared()
    ]
    said += [
        f"{sentence[0].upper()}{sentence[1:]}."
        for sentence in contamination_said(c for c in findings.contamination if c["n_removed"])
    ]
    ends = (("at_edge", "learning rates", "one beyond"), ("at_end", "lengths", "a longer one"))
    for name, word, more in ends:
        n_ends = sum(one[name] for one in findings.chosen)
        if n_ends:
            said.append(
                f"{n_ends} of {len(findings.chosen)} chosen {word} are the last that may be tried; "
                f"{more} may be better. They are marked in the table of learning rates and lengths."
            )
    return said


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


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _needed(numbers: Sequence[float], what: str) -> str:
    enough = [int(value) for value in numbers if math.isfinite(value)]
    if not enough:
        return f"more than any number of {what}"
    if len(enough) == len(numbers):
        return f"{_range(enough)} {what}"
    return f"{_range(enough)} {what} at some sizes and more than any number at others"
