"""Words of a text in any script, by Unicode's character classes.

A combining mark (a vowel sign of Hindi or Arabic, an accent apart from its letter) belongs to the
word that it stands in. Where a script is written without spaces, each letter is a word.
"""

import re

import regex

_UNSPACED = "".join(
    rf"\p{{scx={script}}}"
    for script in (
        "Han Hiragana Katakana Bopomofo Yi Thai Lao Khmer Myanmar Tai_Le New_Tai_Lue Tai_Tham "
        "Tai_Viet Javanese Balinese"
    ).split()
)
_JOINERS = r"[\u200c\u200d]"  # inside of Persian and Indian words
_LETTER = rf"[[\p{{L}}\p{{N}}]&&[{_UNSPACED}]]\p{{M}}*"
# Accents are marks of many scripts, Thai and Tai Le among them.
_SPACED = rf"(?:[[\p{{L}}\p{{N}}]--[{_UNSPACED}]]|\p{{M}})+"
_WORD = rf"{_LETTER}|{_SPACED}(?:{_JOINERS}+{_SPACED})*"
_WORDS = regex.compile(_WORD, regex.V1)
_PIECES = regex.compile(
    rf"{_LETTER}|(?:[[\w\p{{N}}]--[{_UNSPACED}]]|\p{{M}})+|[^\w\p{{N}}\s]+", regex.V1
)
# Equal on ASCII, and three times as fast.
_ASCII_WORDS, _ASCII_PIECES = re.compile(r"[^\W_]+"), re.compile(r"\w+|[^\w\s]+")


def words_of(text: str) -> list[str]:
    """Return the words of a text as they stand, without punctuation."""
    return (_ASCII_WORDS if text.isascii() else _WORDS).findall(text)


def pieces_of(text: str) -> list[str]:
    """Return words, `_` being a letter of them, and the runs of punctuation between."""
    return (_ASCII_PIECES if text.isascii() else _PIECES).findall(text)
