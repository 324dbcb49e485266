"""What the site is made of beside the pages in docs/: command line, files that lie elsewhere."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from d2lora.commands import COMMANDS
from d2lora.settings import Settings

ROOT = Path(__file__).parent.parent
ELSEWHERE = ("benchmarks/README.md", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of code or lie elsewhere."""
    for name in ELSEWHERE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text("utf-8")))
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links out of docs/, and those into it, to where the files are in the site."""
    names = "|".join(map(re.escape, ELSEWHERE))
    markdown = re.sub(rf"\]\(\.\./((?:\.\./)*)({names})", r"](\1\2", markdown)
    return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)


def command_line() -> str:
    """Return the reference of every command, from its settings."""
    parts = [
        "# Command line\n\n"
        "`d2lora COMMAND [SETTINGS.yaml] [--setting value ...]`. Settings come from a YAML file, "
        "from options, or both; options win. `d2lora schema COMMAND` prints the JSON schema of a "
        "settings file, `d2lora COMMAND --tyro-print-completion bash` completion for a shell "
        "(bash, zsh or tcsh).\n"
    ]
    for name, command in COMMANDS.items():
        kind = command.kind
        parts.append(f"\n## d2lora {name}\n\n{command.summary[0].upper()}{command.summary[1:]}.\n")
        parts.append("\n| setting | values | default | meaning |\n|---|---|---|---|\n")
        parts += [f"| {' | '.join(row)} |\n" for row in settings_of(kind)]
    return "".join(parts)


def settings_of(kind: type[Settings]) -> list[list[str]]:
    """Return name, values, default and meaning of each setting, for a table."""
    rows: list[list[str]] = []
    for field, info in kind.model_fields.items():
        option = f"--{'no-' * (info.default is True)}{field.replace('_', '-')}"
        first = f"`{field.upper()}` or " if field in kind.positional else ""
        default = "needed" if info.is_required() else shown(info.default)
        meaning = " ".join((info.description or "").split())
        cells = [f"{first}`{option}`", values_of(info.annotation), default]
        rows.append([cell.replace("|", "\\|") for cell in (*cells, meaning)])
    return rows


def values_of(annotation: Any) -> str:
    """Return a type as a user thinks of it."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"\b(?:typing|pathlib|collections\.abc)\.", "", text)
    text = re.sub(r"Literal\[([^\]]*)\]", lambda m: m[1].replace("'", ""), text)
    for old, new in {
        "tuple[str, ...]": "texts", "tuple[int, ...]": "whole numbers",
        "tuple[float, ...]": "numbers", "tuple[float, float]": "two numbers",
        "tuple[int, int]": "two whole numbers", " | None": "", "Path": "path", "str": "text",
        "bool": "flag", "int": "whole number", "float": "number",
    }.items():  # fmt: skip
        text = text.replace(old, new)
    return text


def shown(value: object) -> str:
    """Return a default as a user would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"`{value}`" if value not in ("", None) else "none"
