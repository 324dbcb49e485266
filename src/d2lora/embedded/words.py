"""The words of the small world, and what is true in it."""

import random
from dataclasses import dataclass

PEOPLE = (
    "Ada Amos Anna Basil Bella Boris Carla Cedric Clara Dana David Dora Edgar Elena Emil Faye Felix "
    "Flora Gina Gus Hana Hugo Ida Igor Iris Ivan Jack Jana Jonas Julia Karl Kira Lara Leo Lena Luis "
    "Maja Marco Mila Nadia Nico Nina Olga Omar Oscar Paula Pedro Petra Quinn Rosa Ruben Sami Sara "
    "Silas Simon Tara Theo Tom Una Uri Vera Victor Wanda Willa Xenia Yara Yusuf Zoe"
).split()
SHE = set(
    "Ada Anna Bella Carla Clara Dana Dora Elena Faye Flora Gina Hana Ida Iris Jana Julia Kira Lara "
    "Lena Maja Mila Nadia Nina Olga Paula Petra Rosa Sara Tara Una Vera Wanda Willa Xenia Yara "
    "Zoe".split()
)
TOWNS = (
    "Alder Ash Brill Brook Calder Cliff Dale Dover Elm Fair Fern Glen Grove Haven Heath Holm Kell "
    "Lark Lund Marsh Mill Moss Norr Oak Pell Quarry Reed Rook Salt Stone Thorn Vale West Wick Yarrow"
).split()
REGIONS = "the northern hills,the southern plain,the eastern coast,the western valley".split(",")
JOBS = (
    "baker carpenter doctor driver farmer fisher gardener jeweller mason miller nurse painter pilot "
    "potter sailor singer smith tailor teacher weaver"
).split()
COLOURS = "red blue green yellow white black brown grey purple orange".split()
ANIMALS = "cat dog horse goat sheep cow hen duck rabbit parrot donkey goose".split()
THINGS = (
    "apples pens books cards coins eggs beads shells stamps pears plums nuts buttons cups plates "
    "candles marbles stickers ribbons keys lemons onions carrots cakes rolls letters photos stones "
    "tickets toys pencils bottles flowers seeds bricks hats scarves spoons kites boxes"
).split()
HOLDERS = "bags boxes baskets jars packs trays crates drawers shelves bowls".split()
OPPOSITES = (
    "hot cold,big small,fast slow,old new,long short,high low,early late,full empty,dark light,"
    "wet dry,hard soft,loud quiet,rich poor,strong weak,open closed,near far,clean dirty,thick thin,"
    "heavy light,deep shallow,wide narrow,sweet bitter,rough smooth,brave timid,cheap dear,"
    "first last,left right,above below,inside outside,begin end"
).split(",")
SEQUENCES = {
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "months": (
        "January February March April May June July August September October November December"
    ).split(),
    "seasons": "spring summer autumn winter".split(),
    "letters": list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
KINDS = {
    "fruit": "apple pear plum lemon cherry grape peach melon".split(),
    "tool": "hammer saw drill spade chisel wrench rake plane".split(),
    "animal": list(ANIMALS),
    "colour": list(COLOURS),
    "job": list(JOBS),
    "vegetable": "onion carrot bean cabbage leek turnip radish pea".split(),
}
METHOD_STYLES = (
    "adaptive layered robust sparse gradual guided hybrid recursive local parallel weighted smooth "
    "staged random careful"
).split()
METHOD_NOUNS = (
    "sorting,filtering,sampling,mapping,ranking,clustering,search,tracking,planning,matching,"
    "routing,pruning,voting,scaling,coding,mixing"
).split(",")
PROBLEMS = (
    "grain storage,river floods,road repair,night travel,bread prices,forest fires,school meals,"
    "bridge safety,crop disease,water supply,bird counting,fish stocks,noise at work,mail delivery,"
    "bus delays,roof leaks,soil loss,street lighting,market queues,tool theft,wool quality,"
    "honey yield,snow removal,glass breakage,well depth,ferry timing,seed choice,milk transport,"
    "coal smoke,map errors"
).split(",")
PLACES = (
    "northern valleys,small towns,coastal villages,dry plains,mountain farms,old harbours,"
    "large cities,island ports,river deltas,cold forests,border markets,southern hills,"
    "remote schools,busy stations,open mines,wet lowlands"
).split(",")
CAUSES = (
    "rain,wind,heat,frost,traffic,age,cost,noise,dust,light,height,distance,training,salt,season,"
    "crowding"
).split(",")

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()


@dataclass(frozen=True)
class Person:
    """What is true of a person."""

    name: str
    town: str
    job: str
    colour: str
    animal: str
    friend: str

    @property
    def pronoun(self) -> str:
        """She or he, as the subject of a sentence."""
        return pronoun(self.name)


def pronoun(name: str) -> str:
    """Return `She` or `He` for a person's name."""
    return "She" if name in SHE else "He"


def _people() -> tuple[Person, ...]:
    chance = random.Random("facts of the world")
    return tuple(
        Person(
            name,
            chance.choice(TOWNS),
            chance.choice(JOBS),
            chance.choice(COLOURS),
            chance.choice(ANIMALS),
            chance.choice([other for other in PEOPLE if other != name]),
        )
        for name in PEOPLE
    )


FACTS = _people()
REGION_OF = {town: REGIONS[(3 * i + i // 4) % 4] for i, town in enumerate(TOWNS)}


def in_words(number: int) -> str:
    """Return a number from 0 to 100 in words."""
    if number < 20:
        return _UNITS[number]
    if number == 100:
        return "one hundred"
    tens, unit = divmod(number, 10)
    return _TENS[tens] + (f"-{_UNITS[unit]}" if unit else "")


def singular(thing: str) -> str:
    """Return the singular of one of the world's things or holders."""
    special = {"scarves": "scarf", "shelves": "shelf", "boxes": "box"}
    return special.get(thing, thing[:-1])


def counted(number: int, thing: str) -> str:
    """Return `1 pen` or `3 pens`."""
    return f"{number} {singular(thing) if number == 1 else thing}"


def listed(words: list[str]) -> str:
    """Return words as `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def a(word: str) -> str:
    """Return a word with its article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
