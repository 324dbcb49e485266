"""JSON schemas tell an editor what a settings file or a plan may hold."""

import json
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import yaml

from d2lora.cli import main
from d2lora.commands import COMMANDS
from d2lora.errors import SettingsError
from d2lora.schema import schema_of
from d2lora.settings import AdaptSettings, BaseSettings
from d2lora.settings.file import read_settings_file
from d2lora.study.read_plan import read_plan


@pytest.mark.parametrize("name", ["plan", *COMMANDS])
def test_every_schema_is_one_and_describes_each_setting(name: str) -> None:
    schema = schema_of(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    properties = schema["properties"].values()
    parts = [part for p in properties for part in (p, *p.get("anyOf", ()))]
    assert sum("description" in part for part in parts) >= len(schema["properties"])


def test_shipped_plans_keep_to_the_schema_and_a_misspelt_key_does_not() -> None:
    validator = jsonschema.Draft202012Validator(schema_of("plan"))
    plans = [p for p in (resources.files("d2lora") / "plans").iterdir() if ".y" in p.name]
    assert len(plans) > 10
    for plan in plans:
        validator.validate(yaml.safe_load(plan.read_text("utf-8")))
    assert not validator.is_valid({"sizs": [16]})
    assert not validator.is_valid({"arms": ["wram"]})


def test_a_settings_file_may_hold_one_text_for_a_list_of_one() -> None:
    validator = jsonschema.Draft202012Validator(schema_of("adapt"))
    validator.validate({"base": "smollm2", "data": "task.jsonl", "n": 16})
    assert not validator.is_valid({"n": "many"})


def test_the_command_prints_a_schema_and_names_what_it_does_not_know(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["schema", "adapt"]) == 0
    assert json.loads(capsys.readouterr().out) == schema_of("adapt")
    assert main(["schema", "adpt"]) == 2
    assert "Did you mean `adapt`?" in capsys.readouterr().err


def test_a_name_given_twice_in_yaml_is_an_error_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("data: a.jsonl\nlearning_rate: 0.1\nlearning_rate: 0.2\n")
    with pytest.raises(
        SettingsError, match="`learning_rate` is given twice, in line 2 and in line 3"
    ):
        read_settings_file(AdaptSettings, path)
    path.write_text("tasks:\n  a: {test: x, test: y}\n")
    with pytest.raises(SettingsError, match="`test` is given twice"):
        read_plan(str(path))
    path.write_text("tasks: &t\n  a: {data: [x], test: [y]}\nadapt: {<<: {rank: 4}, rank: 8}\n")
    assert read_plan(str(path)).adapt["rank"] == 8


@pytest.mark.parametrize("device", ["cuda:x", "cuda:", "cpu:0", "gpu", "mps:1"])
def test_a_device_that_is_none_is_refused(device: str) -> None:
    with pytest.raises(SettingsError, match="expected auto, cpu, cuda"):
        BaseSettings(device=device)
