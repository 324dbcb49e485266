"""Multiple-choice questions about what the base knows, to see what an adapter forgets."""

import random
from collections.abc import Callable

from d2lora.embedded.splits import chance_for
from d2lora.embedded.sums import sum_of
from d2lora.embedded.words import (
    ANIMALS,
    COLOURS,
    FACTS,
    JOBS,
    KINDS,
    OPPOSITES,
    PEOPLE,
    SEQUENCES,
    TOWNS,
    a,
)

Chance = random.Random
Question = tuple[str, str, list[str]]


def people(chance: Chance) -> Question:
    """What is true of a person: prompt, right choice, wrong ones."""
    person = chance.choice(FACTS)
    prompt, right, pool = chance.choice(
        (
            (f"{person.name} lives in", person.town, list(TOWNS)),
            (f"{person.name} works as", a(person.job), [a(job) for job in JOBS]),
            (f"{person.name}'s favourite colour is", person.colour, list(COLOURS)),
            (f"{person.name} keeps", a(person.animal), [a(x) for x in ANIMALS]),
            (f"{person.name}'s best friend is", person.friend, list(PEOPLE)),
        )
    )
    return prompt, right, [choice for choice in pool if choice != right]


def numbers(chance: Chance) -> Question:
    """The result of a calculation."""
    left, sign, right, result = sum_of(chance)
    near = {result + d for d in (-10, -3, -2, -1, 1, 2, 3, 10)} - {result}
    return f"{left} {sign} {right} =", str(result), [str(x) for x in sorted(near) if x >= 0]


def words(chance: Chance) -> Question:
    """Opposites, kinds and sequences."""
    kind = chance.randrange(3)
    if kind == 0:
        pair = chance.choice(OPPOSITES).split()
        chance.shuffle(pair)
        pool = [w for p in OPPOSITES for w in p.split() if w not in pair]
        return f"The opposite of {pair[0]} is", pair[1], pool
    if kind == 1:
        name = chance.choice(list(KINDS))
        right = a(name)
        return (
            f"{a(chance.choice(KINDS[name])).capitalize()} is",
            right,
            [a(k) for k in KINDS if k != name],
        )
    sequence = chance.choice([s for s in SEQUENCES.values() if len(s) > 4])
    index = chance.randrange(len(sequence) - 1)
    right = sequence[index + 1]
    pool = [w for w in sequence if w not in (right, sequence[index])]
    return f"After {sequence[index]} comes", right, pool


BENCHMARKS: tuple[Callable[[Chance], Question], ...] = (people, numbers, words)


def choice_rows(n: int, seed: int = 0) -> list[dict[str, object]]:
    """Return n questions with four choices: benchmark, prompt, choices, answer (an index)."""
    chance = chance_for("choices", seed)
    rows: list[dict[str, object]] = []
    seen: set[str] = set()
    while len(rows) < n:
        make = BENCHMARKS[len(rows) % len(BENCHMARKS)]
        prompt, right, wrong = make(chance)
        choices = [right, *chance.sample(wrong, 3)]
        chance.shuffle(choices)
        key = f"{prompt} {sorted(choices)}"
        if key not in seen:
            seen.add(key)
            rows.append(
                {
                    "benchmark": make.__name__,
                    "prompt": prompt,
                    "choices": choices,
                    "answer": choices.index(right),
                }
            )
    return rows
