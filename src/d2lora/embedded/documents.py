"""What the base reads in pretraining: plain prose of the small world, nothing shaped as a task."""

import random
from collections.abc import Callable, Iterator

from d2lora.embedded.splits import Split, chance_for, split_of
from d2lora.embedded.sums import calculations, narrative, tally
from d2lora.embedded.words import (
    CAUSES,
    COLOURS,
    FACTS,
    KINDS,
    METHOD_NOUNS,
    METHOD_STYLES,
    OPPOSITES,
    PEOPLE,
    PLACES,
    PROBLEMS,
    REGION_OF,
    SEQUENCES,
    THINGS,
    TOWNS,
    a,
    in_words,
    singular,
)

Chance = random.Random


def portrait(chance: Chance) -> str:
    """What is true of some people and towns, said in different ways."""
    parts: list[str] = []
    for person in chance.sample(FACTS, chance.randint(1, 4)):
        said = [
            chance.choice(
                (
                    f"{person.name} lives in {person.town}.",
                    f"{person.name}'s home is {person.town}.",
                )
            ),
            chance.choice(
                (
                    f"{person.name} is {a(person.job)}.",
                    f"{person.name} works as {a(person.job)}.",
                    f"By trade {person.name} is {a(person.job)}.",
                )
            ),
            f"{person.name}'s favourite colour is {person.colour}.",
            f"{person.name} keeps {a(person.animal)}.",
            f"{person.name}'s best friend is {person.friend}.",
            f"{person.town} lies in {REGION_OF[person.town]}.",
        ]
        parts += chance.sample(said, chance.randint(2, len(said)))
    return " ".join(parts)


def dialogue(chance: Chance) -> str:
    """Questions about the world, answered in a sentence."""
    lines: list[str] = []
    for person in chance.sample(FACTS, chance.randint(2, 5)):
        town = chance.choice(TOWNS)
        lines.append(
            chance.choice(
                (
                    f"Where does {person.name} live? {person.name} lives in {person.town}.",
                    f"What is {person.name}'s work? {person.name} is {a(person.job)}.",
                    f"Which colour does {person.name} like? {person.colour.capitalize()}.",
                    f"Who is {person.name}'s best friend? It is {person.friend}.",
                    f"Which animal does {person.name} keep? {a(person.animal).capitalize()}.",
                    f"Where is {town}? {town} is in {REGION_OF[town]}.",
                )
            )
        )
    return "\n".join(lines)


def language(chance: Chance) -> str:
    """Opposites, kinds, sequences, numbers in words."""
    return " ".join(chance.choice(_SAYINGS)(chance) for _ in range(chance.randint(3, 8)))


def _opposite(chance: Chance) -> str:
    first, second = chance.choice(OPPOSITES).split()
    if chance.random() < 0.5:
        first, second = second, first
    return f"The opposite of {first} is {second}."


def _kind(chance: Chance) -> str:
    name = chance.choice(list(KINDS))
    return f"{a(chance.choice(KINDS[name])).capitalize()} is {a(name)}."


def _next(chance: Chance) -> str:
    words = chance.choice(list(SEQUENCES.values()))
    index = chance.randrange(len(words) - 1)
    return f"After {words[index]} comes {words[index + 1]}."


def _written(chance: Chance) -> str:
    number = chance.randint(0, 100)
    return f"{number} is written {in_words(number)}."


def _compared(chance: Chance) -> str:
    low, high = sorted(chance.sample(range(100), 2))
    return chance.choice(
        (f"{high} is larger than {low}.", f"{low} is less than {high}.", f"{low} < {high}.")
    )


def _counted(chance: Chance) -> str:
    thing = chance.choice(THINGS)
    return f"One {singular(thing)}, two {thing}."


def _series(chance: Chance) -> str:
    start, step = chance.randint(0, 30), chance.randint(1, 10)
    return ", ".join(str(start + step * index) for index in range(5)) + "."


_SAYINGS = (_opposite, _kind, _next, _written, _compared, _counted, _series)


def lists(chance: Chance) -> str:
    """Lists named, then repeated, sorted, reversed or searched: what was read comes again."""
    if chance.random() < 0.5:
        items = [str(n) for n in chance.sample(range(1, 100), chance.randint(3, 7))]
        ordered = sorted(items, key=int)
        order = "from small to large"
    else:
        pool = chance.choice((PEOPLE, THINGS, TOWNS, COLOURS))
        items = chance.sample(list(pool), chance.randint(3, 6))
        ordered = sorted(items)
        order = "in the order of the alphabet"
    said = ", ".join(items)
    follow = [
        f"Again: {said}.",
        f"Sorted {order}: {', '.join(ordered)}.",
        f"Backwards: {', '.join(reversed(items))}.",
        f"The first is {items[0]} and the last is {items[-1]}.",
        f"There are {len(items)} of them.",
        f"Without {items[1]}: {', '.join(i for i in items if i != items[1])}.",
    ]
    return " ".join([f"The list is {said}.", *chance.sample(follow, chance.randint(1, 4))])


def method_of(chance: Chance) -> str:
    """Return the name of a method."""
    return f"{chance.choice(METHOD_STYLES)} {chance.choice(METHOD_NOUNS)}"


def report(chance: Chance) -> str:
    """Notes on a method, a problem and a place; phrases of the first line come again later."""
    method, other = method_of(chance), method_of(chance)
    problem, place, cause = chance.choice(PROBLEMS), chance.choice(PLACES), chance.choice(CAUSES)
    share = chance.randint(5, 60)
    body = [
        f"The people of {place} speak a lot of {problem}.",
        f"Some blame {cause}, others say that {problem} was always there.",
        f"Now {method} is used, where {other} was used before.",
        f"With {method} the losses fell by {share} percent.",
        f"A change of {share} percent matters in {place}.",
        f"{method.capitalize()} costs more than {other}, but it is easy to learn.",
        f"Those who know {problem} from {place} ask for more {method}.",
    ]
    chosen = [body[i] for i in sorted(chance.sample(range(len(body)), chance.randint(3, 5)))]
    opening = chance.choice(
        (
            f"Notes on {problem}.",
            f"From {place}: {problem}.",
            f"A letter about {method}.",
            f"About {problem} and {cause}.",
        )
    )
    closing = chance.choice(
        (
            f"So much for {problem} in {place}.",
            f"In short, {method} helps with {problem}.",
            f"The question of {cause} and {problem} stays open.",
            "",
        )
    )
    return " ".join(part for part in (opening, *chosen, closing) if part)


def quotation(chance: Chance) -> str:
    """People say things, and what they said is told again."""
    name, other = chance.sample(PEOPLE, 2)
    colour, thing, town = chance.choice(COLOURS), chance.choice(THINGS), chance.choice(TOWNS)
    said = chance.choice(
        (
            f"the {colour} {singular(thing)} is in {town}",
            f"{chance.choice(PROBLEMS)} comes from {chance.choice(CAUSES)}",
            f"{chance.choice(PEOPLE)} has {chance.randint(2, 60)} {chance.choice(THINGS)}",
            f"{method_of(chance)} works in {chance.choice(PLACES)}",
        )
    )
    return chance.choice(
        (
            f'{name} said: "{said}." {other} asked what {name} had said. It was this: "{said}."',
            f"{name} wrote that {said}. {other} read that {said}, and told the others that {said}.",
            f"{said[0].upper()}{said[1:]}. Yes, {said}, says {name}.",
        )
    )


KINDS_OF_DOCUMENT: dict[Callable[[Chance], str], int] = {
    calculations: 26,
    narrative: 20,
    tally: 12,
    portrait: 10,
    dialogue: 7,
    language: 8,
    lists: 10,
    report: 13,
    quotation: 8,
}


def documents(split: Split, seed: int = 0) -> Iterator[str]:
    """Yield pretraining documents of a split without end."""
    chance = chance_for("documents", split, seed)
    makers, weights = list(KINDS_OF_DOCUMENT), list(KINDS_OF_DOCUMENT.values())
    while True:
        text = chance.choices(makers, weights)[0](chance)
        if split_of(text) == split:
            yield text
