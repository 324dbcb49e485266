"""The first scarce task: grade-school word problems with worked solutions ending in `#### N`."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from d2lora.embedded.splits import Split, chance_for, distinct
from d2lora.embedded.words import HOLDERS, PEOPLE, THINGS, counted, pronoun, singular

Chance = random.Random


class Story(NamedTuple):
    """A question, the steps of its solution, and the number asked for."""

    question: str
    steps: tuple[str, ...]
    answer: int


class _Cast(NamedTuple):
    name: str
    other: str
    thing: str
    holder: str
    he: str


def _cast(chance: Chance) -> _Cast:
    name, other = chance.sample(PEOPLE, 2)
    thing = chance.choice(THINGS)
    holder = chance.choice([h for h in HOLDERS if h != thing])
    return _Cast(name, other, thing, holder, pronoun(name))


def gain(chance: Chance) -> Story:
    """Start and two gains."""
    c = _cast(chance)
    start, first, second = (chance.randint(2, 25) for _ in range(3))
    source = chance.choice(("finds", "buys", "gets", "makes"))
    question = chance.choice(
        (
            f"{c.name} has {counted(start, c.thing)}. {c.he} {source} {first} more and {c.other} "
            f"gives {'her' if c.he == 'She' else 'him'} {second} more. How many {c.thing} does "
            f"{c.name} have now?",
            f"On Monday {c.name} has {counted(start, c.thing)}. On Tuesday {c.he.lower()} {source} "
            f"{first} and on Friday {second}. How many {c.thing} does {c.he.lower()} have then?",
        )
    )
    middle = start + first
    return Story(
        question,
        (f"First there are {start} + {first} = {middle} {c.thing}.",
         f"Then there are {middle} + {second} = {middle + second} {c.thing}."),
        middle + second,
    )  # fmt: skip


def gain_and_loss(chance: Chance) -> Story:
    """Start, a gain, a loss."""
    c = _cast(chance)
    start, more = chance.randint(3, 30), chance.randint(2, 25)
    middle = start + more
    less = chance.randint(1, middle - 1)
    question = chance.choice(
        (
            f"{c.name} has {counted(start, c.thing)} and buys {more} more. Then {c.he.lower()} "
            f"gives {less} to {c.other}. How many {c.thing} are left?",
            f"There are {counted(start, c.thing)} in the shop. {c.name} brings {more} more, and "
            f"{less} are sold. How many {c.thing} does the shop have in the end?",
            f"{c.name} picks {start} {c.thing} in the morning and {more} in the evening. {less} of "
            f"them get lost. How many {c.thing} does {c.name} still have?",
        )
    )
    return Story(
        question,
        (f"There are {start} + {more} = {middle} {c.thing}.",
         f"After that {middle} - {less} = {middle - less} {c.thing} are left."),
        middle - less,
    )  # fmt: skip


def packs(chance: Chance) -> Story:
    """So many holders with so many each, plus some."""
    c = _cast(chance)
    holders, each, start = chance.randint(2, 8), chance.randint(2, 9), chance.randint(2, 25)
    gained = holders * each
    question = chance.choice(
        (
            f"{c.name} has {counted(start, c.thing)}. {c.he} buys {holders} {c.holder} with {each} "
            f"{c.thing} in each. How many {c.thing} does {c.name} have?",
            f"{c.name} fills {holders} {c.holder} with {each} {c.thing} each, and {start} "
            f"{c.thing} stay on the table. How many {c.thing} are there?",
        )
    )
    return Story(
        question,
        (f"The {c.holder} hold {holders} * {each} = {gained} {c.thing}.",
         f"Together that is {start} + {gained} = {start + gained} {c.thing}."),
        start + gained,
    )  # fmt: skip


def packs_and_loss(chance: Chance) -> Story:
    """So many holders with so many each, some taken away."""
    c = _cast(chance)
    holders, each = chance.randint(2, 9), chance.randint(3, 9)
    total = holders * each
    less = chance.randint(1, total - 1)
    verb = chance.choice(("sells", "eats", "gives away", "uses"))
    if verb == "eats":
        verb = "loses"
    question = chance.choice(
        (
            f"{c.name} buys {holders} {c.holder} of {c.thing}. There are {each} {c.thing} in each. "
            f"{c.he} {verb} {less} of them. How many {c.thing} are left?",
            f"In the yard stand {holders} {c.holder} with {each} {c.thing} each. {c.name} takes "
            f"{less} {c.thing} out. How many {c.thing} remain?",
        )
    )
    return Story(
        question,
        (f"There are {holders} * {each} = {total} {c.thing}.",
         f"Then {total} - {less} = {total - less} {c.thing} are left."),
        total - less,
    )  # fmt: skip


def sharing(chance: Chance) -> Story:
    """Two amounts put together and shared equally."""
    c = _cast(chance)
    friends, each = chance.randint(2, 8), chance.randint(2, 9)
    total = friends * each
    first = chance.randint(1, total - 1)
    second = total - first
    question = chance.choice(
        (
            f"{c.name} has {counted(first, c.thing)} and {c.other} has {counted(second, c.thing)}. "
            f"They put them together and share them equally among {friends} friends. How many "
            f"{c.thing} does each friend get?",
            f"{c.name} collects {first} {c.thing} on Sunday and {second} on Monday and puts them "
            f"into {friends} {c.holder}, the same number in each. How many {c.thing} are in one "
            f"{singular(c.holder)}?",
        )
    )
    return Story(
        question,
        (f"Together there are {first} + {second} = {total} {c.thing}.",
         f"Each part has {total} / {friends} = {each} {c.thing}."),
        each,
    )  # fmt: skip


def times_as_many(chance: Chance) -> Story:
    """One has a multiple of the other's; both together."""
    c = _cast(chance)
    start, times = chance.randint(2, 16), chance.randint(2, 4)
    word = {2: "twice", 3: "three times", 4: "four times"}[times]
    other = start * times
    together = chance.random() < 0.6
    asked = (
        f"How many {c.thing} do they have together?"
        if together
        else f"How many more {c.thing} does {c.other} have than {c.name}?"
    )
    question = (
        f"{c.name} has {counted(start, c.thing)}. {c.other} has {word} as many {c.thing}. {asked}"
    )
    result = other + start if together else other - start
    last = (
        f"Together they have {start} + {other} = {result} {c.thing}."
        if together
        else f"The difference is {other} - {start} = {result} {c.thing}."
    )
    return Story(question, (f"{c.other} has {times} * {start} = {other} {c.thing}.", last), result)


def more_than(chance: Chance) -> Story:
    """One has some more or fewer than the other; both together."""
    c = _cast(chance)
    start, step = chance.randint(5, 35), chance.randint(1, 15)
    fewer = chance.random() < 0.5 and step < start
    other = start - step if fewer else start + step
    sign = "-" if fewer else "+"
    word = "fewer" if fewer else "more"
    question = (
        f"{c.name} has {counted(start, c.thing)}. {c.other} has {step} {word} {c.thing} than "
        f"{c.name}. How many {c.thing} do {c.name} and {c.other} have together?"
    )
    return Story(
        question,
        (f"{c.other} has {start} {sign} {step} = {other} {c.thing}.",
         f"Together they have {start} + {other} = {start + other} {c.thing}."),
        start + other,
    )  # fmt: skip


def change(chance: Chance) -> Story:
    """Money: a price times a number, and the change."""
    c = _cast(chance)
    number, price = chance.randint(2, 9), chance.randint(2, 9)
    cost = number * price
    money = cost + chance.randint(1, 30)
    question = chance.choice(
        (
            f"{c.name} has {money} dollars. {c.he} buys {number} {c.thing} for {price} dollars "
            f"each. How many dollars does {c.name} have left?",
            f"One {singular(c.thing)} costs {price} dollars. {c.name} buys {number} {c.thing} and "
            f"pays with {money} dollars. How many dollars does {c.name} get back?",
        )
    )
    return Story(
        question,
        (f"The {c.thing} cost {number} * {price} = {cost} dollars.",
         f"That leaves {money} - {cost} = {money - cost} dollars."),
        money - cost,
    )  # fmt: skip


def earnings(chance: Chance) -> Story:
    """Sales at a price, plus money there was."""
    c = _cast(chance)
    number, price, start = chance.randint(2, 9), chance.randint(2, 9), chance.randint(1, 20)
    gained = number * price
    question = (
        f"{c.name} sells {number} {c.thing} for {price} dollars each. Before that "
        f"{c.he.lower()} had {start} dollars. How many dollars does {c.name} have now?"
    )
    return Story(
        question,
        (f"The {c.thing} bring {number} * {price} = {gained} dollars.",
         f"Now {c.name} has {start} + {gained} = {start + gained} dollars."),
        start + gained,
    )  # fmt: skip


def two_kinds_of_packs(chance: Chance) -> Story:
    """Two kinds of holders, three steps."""
    c = _cast(chance)
    holder = chance.choice([h for h in HOLDERS if h not in (c.holder, c.thing)])
    n1, k1, n2, k2 = (chance.randint(2, 6) for _ in range(4))
    first, second = n1 * k1, n2 * k2
    question = (
        f"{c.name} has {n1} {c.holder} with {k1} {c.thing} each and {n2} {holder} with {k2} "
        f"{c.thing} each. How many {c.thing} does {c.name} have?"
    )
    return Story(
        question,
        (f"The {c.holder} hold {n1} * {k1} = {first} {c.thing}.",
         f"The {holder} hold {n2} * {k2} = {second} {c.thing}.",
         f"Together that is {first} + {second} = {first + second} {c.thing}."),
        first + second,
    )  # fmt: skip


def weeks(chance: Chance) -> Story:
    """So many a day for some days, then some are lost."""
    c = _cast(chance)
    each, days = chance.randint(2, 9), chance.randint(2, 8)
    total = each * days
    less = chance.randint(1, total - 1)
    verb = chance.choice(("makes", "collects", "paints", "gathers"))
    question = (
        f"{c.name} {verb} {each} {c.thing} a day for {days} days. {c.he} gives {less} of them to "
        f"{c.other}. How many {c.thing} does {c.name} keep?"
    )
    return Story(
        question,
        (f"In {days} days that is {days} * {each} = {total} {c.thing}.",
         f"{c.name} keeps {total} - {less} = {total - less} {c.thing}."),
        total - less,
    )  # fmt: skip


def three_people(chance: Chance) -> Story:
    """Three people's amounts, the second and third told from the first."""
    c = _cast(chance)
    third = chance.choice([p for p in PEOPLE if p not in (c.name, c.other)])
    start, step, less = chance.randint(5, 15), chance.randint(1, 12), chance.randint(1, 4)
    second, last = start + step, start - less
    total = start + second
    question = (
        f"{c.name} has {counted(start, c.thing)}. {c.other} has {step} more than {c.name}, and "
        f"{third} has {less} fewer than {c.name}. How many {c.thing} do the three have together?"
    )
    return Story(
        question,
        (f"{c.other} has {start} + {step} = {second} {c.thing}.",
         f"{third} has {start} - {less} = {last} {c.thing}.",
         f"{c.name} and {c.other} have {start} + {second} = {total} {c.thing}.",
         f"All three have {total} + {last} = {total + last} {c.thing}."),
        total + last,
    )  # fmt: skip


def half_away(chance: Chance) -> Story:
    """Half is given away, then more come."""
    c = _cast(chance)
    half, more = chance.randint(2, 30), chance.randint(2, 20)
    question = (
        f"{c.name} has {2 * half} {c.thing} and gives half of them to {c.other}. Then "
        f"{c.he.lower()} gets {more} new ones. How many {c.thing} does {c.name} have now?"
    )
    return Story(
        question,
        (f"After giving half away there are {2 * half} / 2 = {half} {c.thing}.",
         f"Now there are {half} + {more} = {half + more} {c.thing}."),
        half + more,
    )  # fmt: skip


def missing(chance: Chance) -> Story:
    """How many more are needed to fill holders."""
    c = _cast(chance)
    holders, each = chance.randint(2, 9), chance.randint(3, 9)
    total = holders * each
    have = chance.randint(1, total - 1)
    question = (
        f"{c.name} wants to fill {holders} {c.holder} with {each} {c.thing} each. {c.he} has "
        f"{counted(have, c.thing)}. How many more {c.thing} does {c.name} need?"
    )
    return Story(
        question,
        (f"The {c.holder} take {holders} * {each} = {total} {c.thing}.",
         f"{c.name} needs {total} - {have} = {total - have} more {c.thing}."),
        total - have,
    )  # fmt: skip


STORIES: tuple[Callable[[Chance], Story], ...] = (
    gain, gain_and_loss, packs, packs_and_loss, sharing, times_as_many, more_than, change,
    earnings, two_kinds_of_packs, weeks, three_people, half_away, missing,
)  # fmt: skip


def _distracted(chance: Chance, story: Story) -> Story:
    """Put a number that does not matter before the question of one story in ten."""
    if chance.random() >= 0.1:
        return story
    who = chance.choice(PEOPLE)
    idle = chance.choice(
        (
            f"{who} is {chance.randint(6, 60)} years old.",
            f"{who} lives at number {chance.randint(2, 99)}.",
        )
    )
    return story._replace(question=f"{idle} {story.question}")


def word_problem_rows(split: Split, n: int, seed: int = 0) -> list[dict[str, str]]:
    """Return n word problems of a split, fields `question` and `answer` as in GSM8K.

    Fewer rows of the same seed are a prefix of more; no question stands in two splits.
    """
    chance = chance_for("word problems", split, seed)

    def make() -> Story:
        return _distracted(chance, chance.choice(STORIES)(chance))

    stories: Iterator[Story] = distinct(make, lambda story: story.question, split)
    rows: list[dict[str, str]] = []
    for story in stories:
        if len(rows) == n:
            break
        solution = "\n".join((*story.steps, f"#### {story.answer}"))
        rows.append({"question": story.question, "answer": solution})
    return rows
