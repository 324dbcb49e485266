"""General instruction data of the small world, for the warm-up: many skills, no target task."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from d2lora.embedded.documents import method_of
from d2lora.embedded.splits import Split, chance_for, split_of
from d2lora.embedded.sums import sum_of
from d2lora.embedded.words import (
    CAUSES,
    COLOURS,
    FACTS,
    HOLDERS,
    KINDS,
    OPPOSITES,
    PEOPLE,
    PLACES,
    PROBLEMS,
    SEQUENCES,
    THINGS,
    TOWNS,
    Person,
    a,
    counted,
    in_words,
    singular,
)

Chance = random.Random


class Exchange(NamedTuple):
    """An instruction and what answers it."""

    prompt: str
    completion: str


Skill = Callable[[Chance], Exchange]


def arithmetic(chance: Chance) -> Exchange:
    """One calculation."""
    left, sign, right, result = sum_of(chance)
    asked = chance.choice(("What is {0}?", "Compute {0}.", "{0} = ?", "Work out {0}."))
    return Exchange(asked.format(f"{left} {sign} {right}"), f"{left} {sign} {right} = {result}")


def chained_arithmetic(chance: Chance) -> Exchange:
    """Two or three calculations in a row, step by step."""
    value = chance.randint(2, 12) * chance.choice((1, 2, 3))
    expression, steps = str(value), list[str]()
    for _ in range(chance.randint(2, 3)):
        kind = chance.choice("+-*")
        if kind == "*" and value <= 15:
            step, result = (k := chance.randint(2, 5)), value * k
        elif kind == "-" and value > 1:
            step, result = (k := chance.randint(1, value - 1)), value - k
        else:
            kind, step = "+", chance.randint(1, 30)
            result = value + step
        word = {"+": "add", "-": "take away", "*": "multiply by"}[kind]
        expression += f", {word} {step}"
        steps.append(f"{value} {kind} {step} = {result}")
        value = result
    asked = chance.choice(("Begin with {0}. Show each step.", "Start from {0}.", "Take {0}."))
    return Exchange(asked.format(expression), f"{'. '.join(steps)}. The answer is {value}.")


def bookkeeping(chance: Chance) -> Exchange:
    """A ledger's running balance."""
    thing = chance.choice(THINGS)
    value = chance.randint(5, 40)
    lines, steps = [f"stock: {counted(value, thing)}"], list[str]()
    for _ in range(chance.randint(1, 3)):
        step = chance.randint(1, 20)
        if chance.random() < 0.5 and step < value:
            lines.append(f"out: {step}")
            steps.append(f"{value} - {step} = {value - step}")
            value -= step
        else:
            lines.append(f"in: {step}")
            steps.append(f"{value} + {step} = {value + step}")
            value += step
    asked = chance.choice(("Close this account.", "What is the balance of this ledger?"))
    return Exchange(
        f"{asked}\n" + "\n".join(lines), "\n".join((*steps, f"balance: {value} {thing}"))
    )


def stock_taking(chance: Chance) -> Exchange:
    """Rows of holders with so many each; the sum by steps."""
    thing = chance.choice(THINGS)
    rows = [(chance.randint(2, 7), chance.randint(2, 9), h) for h in chance.sample(HOLDERS, 2)]
    listed = "; ".join(f"{n} {holder}, {k} {thing} in each" for n, k, holder in rows)
    products = [n * k for n, k, _ in rows]
    steps = [f"{h}: {n} * {k} = {n * k}" for n, k, h in rows]
    total = f"total: {products[0]} + {products[1]} = {sum(products)}"
    return Exchange(f"Take stock of this list: {listed}.", "\n".join((*steps, total)))


def _passage(chance: Chance) -> tuple[str, list[Person]]:
    people = chance.sample(FACTS, chance.randint(2, 3))
    said = [
        f"{person.name} is {a(chance.choice(FACTS).job)} in {chance.choice(TOWNS)}."
        for person in people
    ]
    return " ".join(said), people


def lookup(chance: Chance) -> Exchange:
    """Find what a short passage says of someone."""
    people = chance.sample(PEOPLE, 3)
    towns = chance.sample(TOWNS, 3)
    counts = [chance.randint(2, 60) for _ in range(3)]
    things = chance.sample(THINGS, 3)
    said = " ".join(
        f"{p} from {t} owns {c} {x}."
        for p, t, c, x in zip(people, towns, counts, things, strict=True)
    )
    index = chance.randrange(3)
    name, town, count, thing = people[index], towns[index], counts[index], things[index]
    asked, answer = chance.choice(
        (
            (f"Where is {name} from?", f"{name} is from {town}."),
            (f"How many {thing} does {name} own?", f"{name} owns {count} {thing}."),
            (f"Who owns {thing}?", f"{name} owns {thing}."),
            (f"What does {name} own?", f"{name} owns {count} {thing}."),
        )
    )
    return Exchange(f"{said}\n{asked}", answer)


def sorting_numbers(chance: Chance) -> Exchange:
    """Sort numbers."""
    numbers = chance.sample(range(1, 100), chance.randint(3, 7))
    down = chance.random() < 0.3
    ordered = sorted(numbers, reverse=down)
    how = "from large to small" if down else "from small to large"
    asked = chance.choice(("Sort {0}: {1}", "Put these numbers in order {0}: {1}"))
    return Exchange(asked.format(how, ", ".join(map(str, numbers))), ", ".join(map(str, ordered)))


def sorting_words(chance: Chance) -> Exchange:
    """Sort words by the alphabet."""
    words = chance.sample(list(chance.choice((PEOPLE, THINGS, TOWNS))), chance.randint(3, 6))
    asked = chance.choice(("Sort by the alphabet: {0}", "Put in alphabetical order: {0}"))
    return Exchange(asked.format(", ".join(words)), ", ".join(sorted(words)))


def copying(chance: Chance) -> Exchange:
    """Repeat a phrase or a list exactly."""
    text = chance.choice(
        (
            f"{method_of(chance)} in {chance.choice(PLACES)}",
            f"{chance.choice(PEOPLE)}, {chance.choice(TOWNS)}, {chance.randint(10, 99)}",
            f"{chance.choice(PROBLEMS)} and {chance.choice(PROBLEMS)}",
            " ".join(str(chance.randint(0, 99)) for _ in range(chance.randint(4, 8))),
        )
    )
    asked = chance.choice(("Repeat exactly: {0}", "Copy this: {0}", "Write again: {0}"))
    return Exchange(asked.format(text), text)


def reversing(chance: Chance) -> Exchange:
    """Say a list backwards."""
    words = chance.sample(list(chance.choice((PEOPLE, THINGS, COLOURS))), chance.randint(3, 6))
    asked = chance.choice(("Say this list backwards: {0}", "Reverse: {0}"))
    return Exchange(asked.format(", ".join(words)), ", ".join(reversed(words)))


def extraction(chance: Chance) -> Exchange:
    """Draw the names, the numbers or the place out of a sentence."""
    names = chance.sample(PEOPLE, 2)
    place, thing = chance.choice(PLACES), chance.choice(THINGS)
    count, other = chance.randint(2, 60), chance.randint(2, 60)
    text = chance.choice(
        (
            f"In {place}, {names[0]} sold {count} {thing} to {names[1]} for {other} dollars.",
            f"{names[0]} met {names[1]} in {place} and saw {count} {thing} and {other} people.",
        )
    )
    asked, answer = chance.choice(
        (
            ("List the names.", ", ".join(names)),
            ("List the numbers.", f"{count}, {other}"),
            ("Which place is meant?", place),
            ("Which things are named?", thing),
        )
    )
    return Exchange(f"{text}\n{asked}", answer)


def comparing(chance: Chance) -> Exchange:
    """Which of two is larger or smaller, and by how much."""
    low, high = sorted(chance.sample(range(1, 100), 2))
    pair = [low, high]
    chance.shuffle(pair)
    asked, answer = chance.choice(
        (
            ("Which is larger", str(high)),
            ("Which is smaller", str(low)),
            ("By how much do they differ", f"{high} - {low} = {high - low}"),
        )
    )
    return Exchange(f"{asked}: {pair[0]} or {pair[1]}?", answer)


def counting(chance: Chance) -> Exchange:
    """Count the items of a list."""
    words = chance.choices(list(chance.choice((THINGS, COLOURS))), k=chance.randint(3, 9))
    target = chance.choice(words)
    if chance.random() < 0.5:
        return Exchange(f"How many words are in this list? {', '.join(words)}", str(len(words)))
    return Exchange(
        f"How often does {target} stand in this list? {', '.join(words)}", str(words.count(target))
    )


def continuing(chance: Chance) -> Exchange:
    """The next members of a sequence."""
    if chance.random() < 0.4:
        words = chance.choice([s for s in SEQUENCES.values() if len(s) > 4])
        begin = chance.randrange(len(words) - 3)
        return Exchange(
            f"What comes next: {', '.join(words[begin : begin + 3])}?", words[begin + 3]
        )
    start, step = chance.randint(0, 40), chance.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 10))
    numbers = [start + step * index for index in range(6)]
    return Exchange(
        f"Continue with two more: {', '.join(map(str, numbers[:4]))}",
        ", ".join(map(str, numbers[4:])),
    )


def opposites(chance: Chance) -> Exchange:
    """Opposites, plurals and kinds."""
    pair = chance.choice(OPPOSITES).split()
    chance.shuffle(pair)
    thing = chance.choice(THINGS)
    kind = chance.choice(list(KINDS))
    return chance.choice(
        (
            Exchange(f"What is the opposite of {pair[0]}?", pair[1]),
            Exchange(f"Name the opposite: {pair[0]}", pair[1]),
            Exchange(f"What is the plural of {singular(thing)}?", thing),
            Exchange(f"What kind of thing is {a(chance.choice(KINDS[kind]))}?", kind),
        )
    )


def number_words(chance: Chance) -> Exchange:
    """Numbers in words and back."""
    number = chance.randint(0, 100)
    if chance.random() < 0.5:
        return Exchange(f"Write {number} in words.", in_words(number))
    return Exchange(f"Write {in_words(number)} in digits.", str(number))


def yes_or_no(chance: Chance) -> Exchange:
    """Is a statement true of a passage?"""
    text, people = _passage(chance)
    person = chance.choice(people)
    sentence = next(s for s in text.split(". ") if s.startswith(person.name)).rstrip(".")
    truth = chance.random() < 0.5
    job = sentence.split(" is ")[1].split(" in ")[0]
    asked_job = job if truth else a(chance.choice([f.job for f in FACTS if a(f.job) != job]))
    answer = f"Yes, {sentence}." if truth else f"No, {sentence}."
    return Exchange(f"{text}\nIs {person.name} {asked_job}?", answer)


def gist(chance: Chance) -> Exchange:
    """Say in a few words what a letter wants or where it comes from."""
    name, town = chance.choice(PEOPLE), chance.choice(TOWNS)
    problem, cause, place = chance.choice(PROBLEMS), chance.choice(CAUSES), chance.choice(PLACES)
    method = method_of(chance)
    letter = " ".join(
        (
            f"Dear {name}, we in {town} have heard of {problem}.",
            chance.choice((f"It came with the {cause}.", f"In {place} it is the same.")),
            f"Could you send us someone who knows {method}?",
        )
    )
    asked, answer = chance.choice(
        (
            ("What does the letter ask for?", f"someone who knows {method}"),
            ("What trouble does the letter name?", problem),
            (
                "Sum up the letter in one line.",
                f"{town} asks {name} for {method} against {problem}.",
            ),
        )
    )
    return Exchange(f"{letter}\n{asked}", answer)


def memo(chance: Chance) -> Exchange:
    """Fill a card with what a note says."""
    method, problem, place = method_of(chance), chance.choice(PROBLEMS), chance.choice(PLACES)
    cause = chance.choice(CAUSES)
    note = chance.choice(
        (
            f"Those who worked on {problem} in {place} took {method}, and {cause} was to blame.",
            f"{method.capitalize()} was tried in {place}. It was for {problem} due to {cause}.",
            f"Because of {cause}, {place} now use {method} in matters of {problem}.",
        )
    )
    fields = {"method": method, "problem": problem, "place": place, "cause": cause}
    wanted = chance.sample(list(fields), chance.randint(1, 3))
    asked = chance.choice(("Fill in", "Note down"))
    return Exchange(
        f"{note}\n{asked}: {', '.join(wanted)}", "; ".join(f"{w}: {fields[w]}" for w in wanted)
    )


def joining(chance: Chance) -> Exchange:
    """Join given phrases by the given words."""
    first, second, third = method_of(chance), chance.choice(PROBLEMS), chance.choice(PLACES)
    joint = chance.choice(
        (f"{first} with {second} near {third}", f"{second} and {first}", f"{third}: {second}")
    )
    pattern = joint.replace(first, "A").replace(second, "B").replace(third, "C")
    return Exchange(f"A is {first}, B is {second}, C is {third}. Write: {pattern}", joint)


NUMBERS: tuple[Skill, ...] = (
    arithmetic, chained_arithmetic, bookkeeping, stock_taking, sorting_numbers, comparing, counting,
    continuing, number_words,
)  # fmt: skip
WORDS: tuple[Skill, ...] = (
    lookup, sorting_words, copying, reversing, extraction, opposites, yes_or_no, gist, memo,
    joining,
)  # fmt: skip
SKILLS: tuple[Skill, ...] = (
    arithmetic, chained_arithmetic, bookkeeping, stock_taking, lookup, sorting_numbers,
    sorting_words, copying, reversing, extraction, comparing, counting, continuing, opposites,
    number_words, yes_or_no, gist, memo, joining,
)  # fmt: skip


def general_rows(
    split: Split, n: int, seed: int = 0, skills: Sequence[Skill] = SKILLS
) -> list[dict[str, str]]:
    """Return n general exchanges of a split: `prompt`, `completion` and the skill as `source`.

    Skills take turns; one with few distinct prompts drops out when they are spent. Fewer rows
    of the same seed are a prefix of more; no prompt stands in two splits.
    """
    chance = chance_for("general", split, seed)
    left, seen, rows = list(skills), set[str](), list[dict[str, str]]()
    while left and len(rows) < n:
        for skill in tuple(left):
            exchange = _new_one(skill, chance, split, seen)
            if exchange is None:
                left.remove(skill)
            elif len(rows) < n:
                rows.append({**exchange._asdict(), "source": skill.__name__})
    return rows


def with_wrong_answers(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows with every second answer of a skill exchanged for that of its next row.

    What is left looks right, and half of it is not: a pool of poor quality.
    """
    by_skill: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_skill.setdefault(row["source"], []).append(index)
    answers = [row["completion"] for row in rows]
    for indices in by_skill.values():
        for first, second in zip(indices[::4], indices[2::4], strict=False):
            answers[first], answers[second] = answers[second], answers[first]
    return [{**row, "completion": answer} for row, answer in zip(rows, answers, strict=True)]


def _new_one(skill: Skill, chance: Chance, split: Split, seen: set[str]) -> Exchange | None:
    for _ in range(300):
        exchange = skill(chance)
        if split_of(exchange.prompt) == split and exchange.prompt not in seen:
            seen.add(exchange.prompt)
            return exchange
    return None
