"""The embedded base and the small world that it knows: everything the demo needs, offline.

Nothing here imports the rest of d2lora. `python -m d2lora.embedded FOLDER` writes the world's data
sets as JSONL.
"""

from itertools import islice
from pathlib import Path

from d2lora.embedded.choices import choice_rows
from d2lora.embedded.documents import documents
from d2lora.embedded.problems import word_problem_rows
from d2lora.embedded.skills import general_rows
from d2lora.embedded.splits import Split
from d2lora.embedded.titles import title_rows

BASE_DIR = Path(__file__).parent / "base"


def text_rows(split: Split, n: int, seed: int = 0) -> list[dict[str, str]]:
    """Return n documents of the kind that the base was trained on, field `text`."""
    return [{"text": text} for text in islice(documents(split, seed), n)]


__all__ = [
    "BASE_DIR",
    "Split",
    "choice_rows",
    "documents",
    "general_rows",
    "text_rows",
    "title_rows",
    "word_problem_rows",
]
