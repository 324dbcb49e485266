"""Plain arithmetic in prose: equations in many surfaces, stories in which things are counted."""

import random

from d2lora.embedded.words import HOLDERS, PEOPLE, THINGS, counted, in_words, pronoun

Chance = random.Random
SIGNS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


def sum_of(chance: Chance) -> tuple[int, str, int, int]:
    """Return a calculation (left, sign, right, result) with whole numbers up to 150."""
    sign = chance.choice("++--**/")
    if sign == "+":
        high = chance.choice((12, 30, 100))
        left, right = chance.randint(0, high), chance.randint(0, min(high, 50))
        return left, sign, right, left + right
    if sign == "-":
        left = chance.randint(1, chance.choice((20, 50, 120)))
        right = chance.randint(0, left)
        return left, sign, right, left - right
    left, right = chance.randint(1, 12), chance.randint(1, 12)
    if chance.random() < 0.25:
        left, right = chance.randint(10, 30), chance.randint(2, 5)
    if sign == "*":
        return left, sign, right, left * right
    return left * right, sign, right, left


def calculations(chance: Chance) -> str:
    """Equations in many surfaces, some chained."""
    lines = [_calculation(chance) for _ in range(chance.randint(4, 14))]
    return chance.choice((" ", "\n", "\n", ", ")).join(lines)


def _calculation(chance: Chance) -> str:
    left, sign, right, result = sum_of(chance)
    style = chance.random()
    if style < 0.6:
        return f"{left} {sign} {right} = {result}"
    if style < 0.7:
        return f"{left} {SIGNS[sign]} {right} is {result}."
    if style < 0.76 and max(left, right, result) <= 100:
        words = [in_words(number) for number in (left, right, result)]
        return f"{words[0].capitalize()} {SIGNS[sign]} {words[1]} is {words[2]}."
    if style < 0.88:
        numbers = [chance.randint(1, 25) for _ in range(chance.randint(3, 4))]
        return f"{' + '.join(map(str, numbers))} = {sum(numbers)}"
    start = chance.randint(5, 60)
    parts: list[str] = []
    for _ in range(chance.randint(2, 4)):
        step = chance.randint(1, 15)
        if step < start and chance.random() < 0.5:
            parts.append(f"{start} - {step} = {start - step}")
            start -= step
        else:
            parts.append(f"{start} + {step} = {start + step}")
            start += step
    return "; ".join(parts)


_GAIN = (
    "{p} finds {k} more", "{p} buys {k} more", "{q} gives {h} {k} more", "{p} gets {k} from {q}",
    "{p} picks up another {k}", "then {k} more are added", "{q} brings {k}", "{p} wins {k}",
)  # fmt: skip
_LOSS = (
    "{p} gives {k} to {q}", "{p} loses {k}", "{p} sells {k}", "{k} are taken away", "{k} break",
    "{p} hands {k} over to {q}", "{q} borrows {k}", "{p} uses {k}", "{k} get lost",
)  # fmt: skip


def narrative(chance: Chance) -> str:
    """A short story in which things are counted, each calculation written out."""
    name, other = chance.sample(PEOPLE, 2)
    thing = chance.choice(THINGS)
    he = pronoun(name)
    him = "her" if he == "She" else "him"
    count = chance.randint(2, 30)
    parts = [
        chance.choice(
            (
                f"{name} has {counted(count, thing)}.",
                f"There are {counted(count, thing)} on {name}'s table.",
                f"{name} begins the day with {counted(count, thing)}.",
                f"In the morning {name} counts {counted(count, thing)}.",
            )
        )
    ]
    for _ in range(chance.randint(1, 4)):
        sentence, count = _event(chance, name, other, him, he, thing, count)
        parts.append(sentence)
        if count == 0:
            break
    if chance.random() < 0.5:
        end = (f"In the end {name} has {counted(count, thing)}.", f"That leaves {count} in all.")
        parts.append(chance.choice(end))
    return " ".join(parts)


def _event(
    chance: Chance, name: str, other: str, him: str, he: str, thing: str, count: int
) -> tuple[str, int]:
    kind = chance.choice("ggllmmdt")
    fields = {"p": chance.choice((name, he)), "q": other, "h": him}
    if kind == "l" and count >= 2:
        step = chance.randint(1, count - 1)
        said = chance.choice(_LOSS).format(k=step, **fields)
        return _concluded(chance, said, f"{count} - {step}", count - step, thing), count - step
    if kind == "m" and count <= 60:
        each, holders = chance.randint(2, 9), chance.randint(2, 6)
        holder = chance.choice(HOLDERS)
        gained = each * holders
        said = chance.choice(
            (
                f"{he} buys {holders} {holder} with {each} in each",
                f"{holders} {holder} of {each} {thing} arrive",
                f"{other} brings {holders} {holder}, each with {each} {thing}",
            )
        )
        total = count + gained
        tail = f"that is {holders} * {each} = {gained} {thing}, and {count} + {gained} = {total}."
        return f"{said}; {tail}"[:1].upper() + f"{said}; {tail}"[1:], total
    divisors = [d for d in range(2, 10) if count % d == 0 and count > d]
    if kind == "d" and divisors:
        share = chance.choice(divisors)
        each = count // share
        said = chance.choice(
            (
                f"{he} shares them equally among {share} friends",
                f"{he} puts them into {share} {chance.choice(HOLDERS)} in equal parts",
                f"They are divided by {share}",
            )
        )
        return f"{said}: {count} / {share} = {each}, so each part is {each}. {he} keeps one.", each
    if kind == "t" and count <= 25:
        times = chance.randint(2, 4)
        word = {2: "twice", 3: "three times", 4: "four times"}[times]
        total = count * times
        said = f"{other} has {word} as many, {times} * {count} = {total} {thing}"
        both = count + total
        return f"{said}. Together they have {count} + {total} = {both}.", both
    step = chance.randint(1, 25)
    said = chance.choice(_GAIN).format(k=step, **fields)
    return _concluded(chance, said, f"{count} + {step}", count + step, thing), count + step


def _concluded(chance: Chance, said: str, sum_: str, result: int, thing: str) -> str:
    end = chance.choice(
        (
            f", so now there are {sum_} = {result}.",
            f". That makes {sum_} = {counted(result, thing)}.",
            f". Now it is {sum_} = {result}.",
            f", and {sum_} = {result}.",
            f". {sum_} = {counted(result, thing)}.",
        )
    )
    return said[:1].upper() + said[1:] + end


def tally(chance: Chance) -> str:
    """What happened to some things is told first, and counted up afterwards."""
    name, other = chance.sample(PEOPLE, 2)
    thing = chance.choice(THINGS)
    he = pronoun(name)
    fields = {"p": he, "q": other, "h": "her" if he == "She" else "him"}
    count = chance.randint(2, 30)
    told = [chance.choice((f"{name} had {counted(count, thing)}", f"{count} {thing} lay there"))]
    sums: list[str] = []
    for _ in range(chance.randint(1, 3)):
        said, steps, count = _told_event(chance, fields, he, count)
        told.append(said)
        sums += steps
    opening = f"{told[0]}. " + ". ".join(said[:1].upper() + said[1:] for said in told[1:])
    said = chance.choice(("Counted up", "The tally", "So it went", f"{other} counts"))
    return f"{opening}. {said}: {', then '.join(sums)}. That is {counted(count, thing)}."


def _told_event(
    chance: Chance, fields: dict[str, str], he: str, count: int
) -> tuple[str, list[str], int]:
    kind = chance.choice("gglmd")
    if kind == "l" and count >= 2:
        step = chance.randint(1, count - 1)
        said = chance.choice(_LOSS).format(k=step, **fields)
        return said, [f"{count} - {step} = {count - step}"], count - step
    if kind == "m" and count <= 60:
        each, holders = chance.randint(2, 9), chance.randint(2, 9)
        gained = each * holders
        said = chance.choice(
            (
                f"{he} bought {holders} {chance.choice(HOLDERS)} with {each} in each",
                f"{holders} {chance.choice(HOLDERS)} of {each} came",
                f"for {holders} days {he.lower()} made {each} a day",
            )
        )
        sums = [f"{holders} * {each} = {gained}", f"{count} + {gained} = {count + gained}"]
        return said, sums, count + gained
    divisors = [d for d in range(2, 10) if count % d == 0 and count > d]
    if kind == "d" and divisors:
        share = chance.choice(divisors)
        said = chance.choice(
            (
                f"{he} split them among {share} friends and looked at one part",
                f"{he} put them into {share} {chance.choice(HOLDERS)} and kept one",
            )
        )
        return said, [f"{count} / {share} = {count // share}"], count // share
    step = chance.randint(1, 25)
    said = chance.choice(_GAIN).format(k=step, **fields)
    return said, [f"{count} + {step} = {count + step}"], count + step
