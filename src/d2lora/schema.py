"""JSON schemas of settings, study plans and task cards, for editors: `d2lora schema adapt`."""

import json
import sys
from typing import Any, get_args

from d2lora.commands import COMMANDS
from d2lora.data.cards import Card
from d2lora.errors import SettingsError, did_you_mean
from d2lora.settings import SchemaSettings
from d2lora.study.plan import Kind, StudyPlan

PLAN, CARD = "plan", "card"


def schema_of(name: str) -> dict[str, Any]:
    """Return the JSON schema of a command's settings file, of a study's plan or of a task card.

    Args:
        name: A command's name, `plan` or `card`.

    Returns:
        A schema (draft 2020-12). Nothing is required in it: files hold only what differs.

    Raises:
        SettingsError: If there is no such command.
    """
    others = {PLAN: StudyPlan, CARD: Card}
    if name not in others and name not in COMMANDS:
        known = [*others, *COMMANDS]
        raise SettingsError(
            f"no command `{name}`.{did_you_mean(name, known)} Known: {', '.join(known)}"
        )
    found = (others[name] if name in others else COMMANDS[name].kind).model_json_schema()
    found.pop("required", None)
    for part in (found, *found.get("$defs", {}).values()):
        properties = part.get("properties", {})
        for field, about in properties.items():
            if about.get("type") == "array" and about.get("items") == {"type": "string"}:
                # In a file one text may stand for a list of one.
                properties[field] = {"anyOf": [{"type": "string"}, about]}
    if name == PLAN:
        arms = found["properties"]["arms"]
        arms["items"] = {"anyOf": [{"enum": list(get_args(Kind))}, arms["items"]]}
    return found


def command(settings: SchemaSettings) -> None:
    """Run `d2lora schema`."""
    json.dump(schema_of(settings.of), sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
