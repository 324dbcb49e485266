r"""The number that a worked solution ends in.

A target ends in `#### N`. Outputs are read in two ways and compared as text:

strict    the number behind the first `#### `, as GSM8K's authors do (github.com/openai/
          grade-school-math, grade_school_math/dataset.py: `#### (\-?[0-9\.\,]+)`, commas removed)
flexible  the last number, as "flexible-extract" of lm-evaluation-harness (lm_eval/tasks/gsm8k/
          gsm8k.yaml: `(-?[$0-9.,]{2,})|(-?[0-9]+)`; commas, dollars and a last period removed)

Behind `#### ` a number is read to its end, where these would stop inside of it: 1/3 is not 1,
12:30 is not 12, and 1e3, 2 1/2, 1 000 and −42 (any minus, fraction slash, ratio sign and digits of
Unicode) are numbers, too. Where the target is written as such a number, an output's last number is
read to its end as well.
"""

import re
import unicodedata

_GROUPS = r"[0-9]{1,3}(?:[ \u00a0\u2009\u202f][0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
_REST = r"(?P<rest>(?:[/:][0-9]+)+|[eE][+-]?[0-9]+|[¼-¾⅐-⅞]| [0-9]+/[0-9]+)?"
_STRICT = re.compile(rf"#### (?P<head>-?(?:{_GROUPS}|[0-9.,]+)){_REST}")
_LAST = r"[$0-9.,]{2,}|[0-9]+"
_FLEXIBLE = re.compile(rf"(?P<head>-?(?:{_LAST}))(?P<rest>)")
_FLEXIBLE_WHOLE = re.compile(rf"(?P<head>-?(?:{_GROUPS}|{_LAST})){_REST}")
_PLAIN = re.compile(r"-?[0-9.,]+")
_COMMAS = r"[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}"
_TARGET = re.compile(
    rf"#### (?P<head>-?(?:{_GROUPS}|(?:{_COMMAS}|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)){_REST}\s*\Z"
)
_SEPARATORS = re.compile(r"[,$ \u00a0\u2009\u202f]")
_SIGNS = str.maketrans("−－﹣٫٬⁄／∶：", "---.,//::")


def target_answer(text: str) -> str | None:
    """Return the number that a target ends in; None where there is none, or more than a number.

    The one `####` is the last but the number. A comma has to stand between thousands: 1,5 is 1.5
    to some and 15 to others.
    """
    plain = _plain(text)
    found = _TARGET.search(plain) if plain.count("####") == 1 else None
    return _value(found) if found else None


def target_fault(answer: str) -> str | None:
    """Return what is wrong with a target that must end in a number; None where nothing is."""
    if "####" not in answer:
        return "the answer must end in `#### N`; without it use --task instruct"
    if target_answer(answer) is not None:
        return None
    return (
        "the answer must end in `#### N`, one space and a number alone such as 42, 1,250, 0.5 or "
        f"1/6; found {answer[answer.index('####') :].strip()!r:.60}"
    )


def strict_answer(text: str) -> str | None:
    """Return the number behind the first `#### ` that a number follows; None without one."""
    found = _STRICT.search(_plain(text))
    return _value(found) if found else None


def flexible_answer(text: str, target: str = "") -> str | None:
    """Return the last number of a text; None where there is none.

    Args:
        text: An output.
        target: What it is compared with. Where it ends in a number of a kind that
            lm-evaluation-harness does not read, such numbers are looked for whole.
    """
    plain, wanted = _plain(text), _TARGET.search(_plain(target))
    is_plain = wanted is None or _PLAIN.fullmatch(wanted["head"] + (wanted["rest"] or ""))
    pattern = _FLEXIBLE if is_plain else _FLEXIBLE_WHOLE
    numbers = list(pattern.finditer(plain))
    if not numbers:
        return None
    last, marked = numbers[-1], _STRICT.search(plain)
    inside = marked and marked.start() < last.start() and last.end() <= marked.end()
    return _value(marked if marked and inside else last).removesuffix(".")


def _value(found: re.Match[str]) -> str:
    return _SEPARATORS.sub("", found["head"]) + (found["rest"] or "").lower()


def _plain(text: str) -> str:
    """Return a text with ASCII digits and signs in its numbers."""
    if text.isascii():
        return text
    plain = text.translate(_SIGNS)
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in plain)
