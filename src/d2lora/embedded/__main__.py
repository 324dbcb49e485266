"""Write the small world's data sets as JSONL: `python -m d2lora.embedded FOLDER`."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from d2lora.embedded import choice_rows, general_rows, text_rows, title_rows, word_problem_rows
from d2lora.embedded.skills import NUMBERS, WORDS, gist, with_wrong_answers


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_world(
    folder: Path,
    write: Callable[[Path, str], None] = _write,
    *,
    n_general: int = 4000,
    n_task: int = 1024,
    n_test: int = 500,
) -> dict[str, Path]:
    """Write every data set into a folder, as `write` writes a file; return their paths by name."""
    rows: dict[str, Iterable[Mapping[str, object]]] = {
        "general-train": general_rows("train", n_general),
        "general-valid": general_rows("valid", 400),
        "numbers-train": general_rows("train", n_general, skills=NUMBERS),
        "words-train": general_rows("train", n_general, skills=WORDS),
        "gist-train": general_rows("train", n_general, skills=[gist]),
        "poor-train": with_wrong_answers(general_rows("train", n_general, seed=1)),
        "text-valid": text_rows("valid", 80),
        "choices": choice_rows(90),
    }
    for name, make in (("problems", word_problem_rows), ("titles", title_rows)):
        rows[f"{name}-train"] = make("train", n_task)
        rows[f"{name}-valid"] = make("valid", 200)
        rows[f"{name}-few"] = make("valid", 16)
        rows[f"{name}-test"] = make("test", n_test)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in rows}
    for name, values in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in values)
        write(paths[name], lines)
    return paths


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(prog="python -m d2lora.embedded", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n-general", type=int, default=4000, help="warm-up rows")
    parser.add_argument("--n-task", type=int, default=1024, help="training rows of each task")
    parser.add_argument("--n-test", type=int, default=500, help="test rows of each task")
    args = parser.parse_args()
    write_world(args.folder, n_general=args.n_general, n_task=args.n_task, n_test=args.n_test)


if __name__ == "__main__":
    main()
