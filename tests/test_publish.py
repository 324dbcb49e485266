"""What is published has a card that the hub takes, the files that belong, and no path of ours."""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from adapters import run
from d2lora import (
    ConvertSettings,
    D2LoraError,
    EvaluateSettings,
    ModelError,
    PublishSettings,
    RunError,
    SettingsError,
    WarmStart,
    convert,
    evaluate,
    publish,
)
from d2lora.adapters.base_files import hub_id
from d2lora.adapters.manifest import Adapter
from d2lora.cli import main
from d2lora.data.trained_rows import TrainedRows
from d2lora.embedded import title_rows
from hub import TOKEN, Hub, running_hub
from support import dies_at_step, write_rows

PROBE = torch.arange(5, 60)[None]
# huggingface_hub's own upload of large files, without hf_xet:
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[Hub]:
    with running_hub() as running:
        # huggingface_hub reads these variables once, as it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, titles: str) -> Path:
    return run(tmp_path_factory.mktemp("made") / "titles", tiny_base, titles).path


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, adapter: Path) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    test = write_rows(folder / "test.jsonl", title_rows("test", 4))
    evaluate(
        EvaluateSettings(
            base=tiny_base, adapters=("base", str(adapter)), data=(test,), out=folder / "scores",
            max_new_tokens=4, quiet=True,
        )
    )  # fmt: skip
    return folder / "scores"


def put(folder: Path, hub: Hub | None = None, **changes: Any) -> dict[str, bytes]:
    publish(PublishSettings(folder=folder, to="me/titles", **changes))
    return hub.files["me/titles"] if hub else {}


def write_all(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_an_adapter_from_the_hub_is_the_adapter_that_was_published(
    hub: Hub, adapter: Path, tiny_base: str, tmp_path: Path
) -> None:
    sent = put(adapter, hub)
    assert set(sent) == {
        "README.md", "adapter.json", "adapter_config.json", "adapter_model.safetensors",
        "trained_rows.json",
    }  # fmt: skip
    copy = write_all(sent, tmp_path / "copy")
    both = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(folder))
        for folder in (adapter, copy)
    ]
    with torch.no_grad():
        first, second = (model(input_ids=PROBE).logits for model in both)
    assert torch.equal(first, second)
    assert Adapter.load(copy).manifest.lora == Adapter.load(adapter).manifest.lora
    assert TrainedRows.read(copy) == TrainedRows.read(adapter)


def test_no_path_of_this_machine_is_sent(hub: Hub, adapter: Path, tiny_base: str) -> None:
    assert tiny_base in (adapter / "adapter.json").read_text()
    for name, content in put(adapter, hub).items():
        for place in (adapter.parent, Path(tiny_base).parent, Path.home(), Path.cwd()):
            assert str(place).encode() not in content, name
    manifest = json.loads(hub.files["me/titles"]["adapter.json"])
    assert manifest["base"]["id"] == Path(tiny_base).name
    assert manifest["settings"]["out"] == "titles"
    config = json.loads(hub.files["me/titles"]["adapter_config.json"])
    assert config["base_model_name_or_path"] is None


def test_texts_that_only_look_like_paths_stay(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    copy = write_all({f.name: f.read_bytes() for f in adapter.iterdir()}, tmp_path / "titles")
    record = json.loads((copy / "adapter.json").read_text())
    changed = {
        "chat_template": "{{ '/think' }} /no_think",
        "labels": ["/yes", "/no"],
        "warnings": [f"{copy}/bad_rows.jsonl has 3 rows of 12/40"],
    }
    (copy / "adapter.json").write_text(json.dumps(record | changed))
    sent = json.loads(put(copy, hub)["adapter.json"])
    assert sent["chat_template"] == changed["chat_template"]
    assert sent["labels"] == changed["labels"]
    assert sent["warnings"] == ["bad_rows.jsonl has 3 rows of 12/40"]


def test_the_card_is_valid_and_has_the_scores(
    hub: Hub, adapter: Path, scores: Path, tmp_path: Path
) -> None:
    hub.models.add("owner/base")
    about = tmp_path / "about.md"
    about.write_text("Titles for texts of a small world; of no use elsewhere.\n")
    sent = put(
        adapter, hub, scores=(scores,), base_id="owner/base", license="apache-2.0", about=about
    )
    card = ModelCard(sent["README.md"].decode())
    card.validate()
    assert card.data.base_model == "owner/base"
    assert card.data.library_name == "peft"
    assert card.data.license == "apache-2.0"
    summary = json.loads((scores / "summary.json").read_text())
    found = {score.metric_type: score.metric_value for score in card.data.eval_results}
    assert found == {name: s["mean"] for name, s in summary["scores"][str(adapter)].items()}
    assert {score.dataset_name for score in card.data.eval_results} == {"test.jsonl"}
    assert "of no use elsewhere" in card.text
    config = json.loads(sent["adapter_config.json"])
    assert config["base_model_name_or_path"] == "owner/base"


def test_a_base_that_is_no_model_of_the_hub_is_not_named(
    hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(adapter), "me/titles", "--base-id", "models/mine"]) == 0
    card = ModelCard(hub.files["me/titles"]["README.md"].decode())
    assert card.data.base_model is None
    assert "license" not in card.data.to_dict()
    assert "the card names no base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("embedded", None),
        ("./my-model", None),
        ("~/models", None),
        ("a/b/c", None),
        ("my model/x", None),
        ("", None),
    ],
)
def test_only_a_hub_id_is_named_as_the_base(name: str, expected: str | None) -> None:
    assert hub_id(name) == expected


def test_a_folder_named_like_a_hub_id_is_no_base_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("models/mine") is None


def test_a_merged_model_is_published_with_what_it_was_made_of(
    hub: Hub, warm_start: WarmStart, tiny_base: str, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    convert(ConvertSettings(base=tiny_base, adapter=str(warm_start.path), merge=True, out=out))
    sent = put(out, hub)
    assert {"config.json", "model.safetensors", "tokenizer.json", "merged.json"} <= set(sent)
    assert not any(str(tmp_path).encode() in content for content in sent.values())
    assert not any(tiny_base.encode() in content for content in sent.values())
    card = ModelCard(sent["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert warm_start.manifest.base.fingerprint in card.text
    copy = write_all(sent, tmp_path / "copy")
    both = [AutoModelForCausalLM.from_pretrained(folder) for folder in (out, copy)]
    with torch.no_grad():
        first, second = (model(input_ids=PROBE).logits for model in both)
    assert torch.equal(first, second)


def test_an_adapter_of_peft_alone_is_published(hub: Hub, tiny_base: str, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(r=2))
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "token.txt").write_text(TOKEN)
    sent = put(tmp_path / "plain", hub)
    assert set(sent) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] is None
    assert b"d2lora" not in sent["README.md"]  # which did not make it


def test_private_means_private(hub: Hub, adapter: Path) -> None:
    put(adapter, hub, private=True)
    assert hub.private["me/titles"]
    hub.private["me/titles"] = False
    hub.files.clear()
    with pytest.raises(SettingsError, match="there already and public"):
        put(adapter, private=True)
    assert not hub.files


def test_a_dry_run_shows_everything_and_sends_nothing(
    hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(adapter), "me/titles", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "library_name: peft" in shown.out
    assert "adapter_model.safetensors" in shown.err
    assert not hub.private
    assert not hub.files


@pytest.mark.usefixtures("hub")
def test_a_dry_run_needs_no_hub(monkeypatch: pytest.MonkeyPatch, adapter: Path) -> None:
    settings = PublishSettings(folder=adapter, to="me/titles", dry_run=True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert any("cannot be reached" in note for note in publish(settings).notes)
    with pytest.raises(RunError, match="cannot be reached"):
        put(adapter)
    monkeypatch.delenv("HF_TOKEN")
    assert any("no token of the hub" in note for note in publish(settings).notes)
    with pytest.raises(RunError, match="hf auth login"):
        put(adapter)


def test_what_the_hub_refuses_is_said_in_its_words(hub: Hub, adapter: Path) -> None:
    hub.faults_of_cards.append('"license" must be one of the known ones')
    with pytest.raises(RunError, match='"license" must be one of'):
        put(adapter)
    hub.role = "read"
    with pytest.raises(SettingsError, match="can only read"):
        put(adapter)


@pytest.mark.usefixtures("hub")
def test_a_token_that_is_not_the_hubs_is_named(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with pytest.raises(SettingsError, match="refused the token"):
        put(adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "titles"}, "expected owner/name"),
        ({"to": "me/a--b"}, "expected owner/name"),
        ({"to": "me/a/b"}, "expected owner/name"),
        ({"to": "someone/titles"}, "who cannot write to someone; choose one of me, lab"),
        ({"base_id": "./my-model"}, "--base-id owner/name"),
        ({"scores": (Path("nowhere"),)}, "nowhere: no finished evaluation"),
        ({"license": "Apache 2.0"}, "such as apache-2.0 or cc-by-4.0; found 'Apache 2.0'"),
        ({"folder": Path("nowhere")}, "nowhere: no such folder"),
        ({"about": Path("nowhere.md")}, r"--about nowhere\.md: cannot be read"),
    ],
)
def test_a_mistake_is_named_before_anything_is_sent(
    hub: Hub, adapter: Path, changes: dict[str, Any], message: str
) -> None:
    settings = {"folder": adapter, "to": "me/titles", **changes}
    with pytest.raises(D2LoraError, match=message):
        publish(PublishSettings(**settings))
    assert not hub.private


@pytest.mark.usefixtures("hub")
def test_scores_of_another_adapter_are_refused(scores: Path, warm_start: Any) -> None:
    with pytest.raises(SettingsError, match="is not among what was evaluated there"):
        put(warm_start.path, scores=(scores,))


@pytest.mark.usefixtures("hub")
def test_scores_on_training_rows_are_refused(
    adapter: Path, tiny_base: str, titles: str, tmp_path: Path
) -> None:
    evaluate(
        EvaluateSettings(
            base=tiny_base, adapters=(str(adapter),), data=(titles,), out=tmp_path / "scores",
            limit=2, max_new_tokens=2, quiet=True,
        )
    )  # fmt: skip
    with pytest.raises(SettingsError, match="say nothing about new text"):
        put(adapter, scores=(tmp_path / "scores" / "summary.json",))


@pytest.mark.usefixtures("hub")
def test_an_unfinished_run_is_not_published(
    tiny_base: str, titles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = dies_at_step(monkeypatch, 2)
    with pytest.raises(killed):
        run(tmp_path / "a", tiny_base, titles)
    with pytest.raises(RunError, match="unfinished run"):
        put(tmp_path / "a")


@pytest.mark.usefixtures("hub")
def test_a_folder_of_something_else_says_what_is_expected(tiny_base: str) -> None:
    with pytest.raises(ModelError, match="neither an adapter"):
        put(Path(tiny_base))


def test_the_command_takes_a_folder_and_a_name_and_nothing_more(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["publish", "a", "me/b", "c"]) == 2
    assert "expected FOLDER TO" in capsys.readouterr().err
