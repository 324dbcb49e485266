"""The second scarce task: a short title for an abstract."""

import random
from collections.abc import Callable
from typing import NamedTuple

from d2lora.embedded.documents import method_of
from d2lora.embedded.splits import Split, chance_for, distinct
from d2lora.embedded.words import CAUSES, PLACES, PROBLEMS

Chance = random.Random


class Abstract(NamedTuple):
    """An abstract and its title."""

    text: str
    title: str


def new_method(chance: Chance) -> Abstract:
    """A method is proposed: `Adaptive sorting for grain storage in northern valleys`."""
    method, old = method_of(chance), method_of(chance)
    problem, place, share = chance.choice(PROBLEMS), chance.choice(PLACES), chance.randint(5, 60)
    opening = chance.choice(
        (
            f"In {place}, {problem} is a matter of daily life.",
            f"{problem.capitalize()} has long been studied in {place}.",
            f"Few towns have solved {problem}, least of all in {place}.",
        )
    )
    middle = chance.choice(
        (
            f"We present {method}, which needs no change of habits.",
            f"This paper proposes {method} as a simple answer.",
            f"Our answer is {method}, tried over two years.",
        )
    )
    end = chance.choice(
        (
            f"Compared with {old}, errors fall by {share} percent.",
            f"It does better than {old} by {share} percent.",
        )
    )
    return _abstract(
        chance, opening, middle, end, f"{method.capitalize()} for {problem} in {place}"
    )


def comparison(chance: Chance) -> Abstract:
    """Two methods are compared: `Comparing guided search and robust voting for road repair`."""
    first, second = method_of(chance), method_of(chance)
    problem, place, share = chance.choice(PROBLEMS), chance.choice(PLACES), chance.randint(5, 60)
    opening = chance.choice(
        (
            f"Which of two methods suits {problem} better?",
            f"Two methods are in use against {problem}, and few know which is better.",
        )
    )
    middle = f"We set {first} beside {second} in {chance.randint(3, 40)} trials in {place}."
    end = chance.choice(
        (
            f"The first wins by {share} percent, at a higher cost.",
            f"They differ by {share} percent, less than was thought.",
        )
    )
    return _abstract(chance, opening, middle, end, f"Comparing {first} and {second} for {problem}")


def effect(chance: Chance) -> Abstract:
    """A cause is studied: `The effect of frost on bridge safety in old harbours`."""
    cause, problem, place = chance.choice(CAUSES), chance.choice(PROBLEMS), chance.choice(PLACES)
    method, share = method_of(chance), chance.randint(5, 60)
    opening = chance.choice(
        (
            f"How far {problem} depends on {cause} is an open question.",
            f"It is often said that {cause} changes {problem}.",
        )
    )
    middle = f"We measured both in {place}, using {method} to clean the records."
    end = chance.choice(
        (
            f"Where {cause} doubled, we saw a change of {share} percent.",
            f"A clear link of {share} percent is found, and it holds in every season.",
        )
    )
    return _abstract(chance, opening, middle, end, f"The effect of {cause} on {problem} in {place}")


def survey(chance: Chance) -> Abstract:
    """Work is surveyed: `A survey of layered coding for mail delivery`."""
    method, problem, place = method_of(chance), chance.choice(PROBLEMS), chance.choice(PLACES)
    opening = chance.choice(
        (
            f"Much has been written on {problem} and {method}.",
            f"Over the years {method} came to be used for {problem} everywhere.",
        )
    )
    middle = f"We read {chance.randint(20, 90)} reports, most of them from {place}, and sort them."
    end = chance.choice(
        ("Open questions are listed at the end.", "We say what is known and what is not.")
    )
    return _abstract(chance, opening, middle, end, f"A survey of {method} for {problem}")


def _abstract(chance: Chance, opening: str, middle: str, end: str, title: str) -> Abstract:
    idle = chance.choice(
        (
            f"Earlier work blamed {chance.choice(CAUSES)}.",
            f"The same was seen for {chance.choice(PROBLEMS)}.",
            "The data are open to all.",
            f"Help came from {chance.choice(PLACES)}.",
        )
    )
    parts = [opening, middle, end]
    if chance.random() < 0.7:
        parts.insert(chance.choice((1, 3)), idle)
    return Abstract(" ".join(parts), title)


ABSTRACTS: tuple[Callable[[Chance], Abstract], ...] = (new_method, comparison, effect, survey)


def title_rows(split: Split, n: int, seed: int = 0) -> list[dict[str, str]]:
    """Return n abstracts of a split with their titles, fields `text` and `title`.

    Fewer rows of the same seed are a prefix of more; no text stands in two splits.
    """
    chance = chance_for("titles", split, seed)
    rows: list[dict[str, str]] = []
    for item in distinct(lambda: chance.choice(ABSTRACTS)(chance), lambda row: row.text, split):
        if len(rows) == n:
            break
        rows.append({"text": item.text, "title": item.title})
    return rows
