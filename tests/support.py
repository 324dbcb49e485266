"""What several tests share."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("D2LORA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))

# In CI the data sets have to be there: a test that cannot find them fails instead of being skipped.
needs_shared_data = pytest.mark.skipif(
    not SHARED.is_dir() and not os.environ.get("CI"),
    reason="needs the public data sets in ../shared/data",
)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows as JSONL; return the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSONL rows."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def visible(page: str) -> str:
    """Return an HTML page without its scripts."""
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def dies_at_step(monkeypatch: pytest.MonkeyPatch, last: int) -> type[BaseException]:
    """Make the training loop die before optimizer step `last`; return what it dies of."""
    from d2lora.training import loop as train

    class Killed(BaseException):
        pass

    step, taken = train._step, 0

    def dying_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == last:
            raise Killed
        return step(*args, **kwargs)

    monkeypatch.setattr(train, "_step", dying_step)
    return Killed


def small_plan(folder: Path, base: str, general: str, titles: str) -> dict[str, Any]:
    """Return the smallest study that has all: 2 arms x 1 task x 2 sizes x 2 seeds, 2 rates."""
    from d2lora.embedded import choice_rows, general_rows, title_rows

    return {
        "base": base,
        "warm_up": {"data": general, "m": 40, "rank": 4, "max_steps": 4},
        "tasks": {
            "titles": {
                "data": [titles],
                "test": [write_rows(folder / "test.jsonl", title_rows("test", 6))],
                "max_new_tokens": 6,
            }
        },
        "sizes": [4, 8],
        "seeds": 2,
        "adapt": {"rank": 4, "batch_size": 4},
        "epochs": {4: 2},
        "learning_rates": [0.003, 0.03],
        "general_text": [write_rows(folder / "general.jsonl", general_rows("valid", 6))],
        "choices": [write_rows(folder / "choices.jsonl", choice_rows(6))],
    }
