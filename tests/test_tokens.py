"""New tokens are learnt beside the adapter, and go with it wherever it is used."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import assert_untouched, losses, run, state, weights
from conftest import save_tiny_base
from d2lora import (
    Adapter,
    ConvertSettings,
    EvaluateSettings,
    GenerateSettings,
    ModelError,
    SettingsError,
    WarmStart,
    WarmStartError,
    convert,
    evaluate,
)
from d2lora.adapters.attach import attached
from d2lora.adapters.base import Base, load_base
from d2lora.evaluation.generate import generate
from d2lora.settings import BaseSettings, InspectSettings, PublishSettings
from d2lora.tools.inspect import inspect
from d2lora.tools.publish import publish
from support import dies_at_step, write_rows

TOKENS = ("<thought>", "</thought>")
ROWS = [
    {"prompt": f"What is {n} and 1?", "completion": f"<thought>{n} + 1</thought> {n + 1}"}
    for n in range(24)
]
DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def loaded(name: str) -> Base:
    return load_base(BaseSettings(base=name, dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def thoughts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "thoughts.jsonl", ROWS)


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("tied"), seed=0, tie_word_embeddings=True)


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "tied"])
def base_name(request: pytest.FixtureRequest, tiny_base: str, tied_base: str) -> str:
    return tied_base if request.param else tiny_base


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base_name: str, thoughts: str) -> Adapter:
    out = tmp_path_factory.mktemp("adapter") / "a"
    return run(out, base_name, thoughts, add_tokens=TOKENS)


@torch.no_grad()
def logits_by_peft(base: str, adapter: Path | None, ids: torch.Tensor) -> torch.Tensor:
    """Return what transformers and PEFT compute, with the tokenizer beside the adapter."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is None:
        return model(input_ids=ids).logits
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(adapter)))
    return PeftModel.from_pretrained(model, str(adapter)).eval()(input_ids=ids).logits


def probe(adapter: Adapter) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(adapter.path)
    return tokenizer("2 <thought>2 + 3</thought> 5", return_tensors="pt")["input_ids"]


def test_new_tokens_are_in_the_tokenizer_beside_the_adapter(
    base_name: str, adapter: Adapter
) -> None:
    before, after = (AutoTokenizer.from_pretrained(name) for name in (base_name, adapter.path))
    new = after.convert_tokens_to_ids(list(TOKENS))
    assert new == [len(before), len(before) + 1]
    text = "a <thought>b</thought>c"
    ids = after(text)["input_ids"]
    assert [i for i in ids if i in new] == new
    assert after.decode(ids, skip_special_tokens=True) == text
    assert adapter.manifest.lora.add_tokens == TOKENS


def test_their_rows_alone_are_trained_and_start_at_the_mean(
    tmp_path: Path, base_name: str, thoughts: str, adapter: Adapter
) -> None:
    own = AutoModelForCausalLM.from_pretrained(base_name)
    tied = own.config.tie_word_embeddings
    start = run(tmp_path / "s", base_name, thoughts, add_tokens=TOKENS, max_steps=0)
    beside = {name: w for name, w in weights(adapter).items() if ".lora_" not in name}
    assert len(beside) == (1 if tied else 2)
    for name, rows in beside.items():
        assert rows.shape == (2, 32)
        matrix = own.lm_head.weight if "lm_head" in name else own.model.embed_tokens.weight
        first = weights(start)[name]
        torch.testing.assert_close(first, matrix.mean(0).expand(2, -1), rtol=0, atol=1e-4)
        assert (rows - first).abs().max() > 1e-3
    n_trained = sum(w.numel() for w in weights(adapter).values())
    assert adapter.manifest.cost["n_trainable_parameters"] == n_trained


def test_training_is_the_same_on_fast_paths_and_leaves_the_base_as_it_was(
    tmp_path: Path, base_name: str, thoughts: str
) -> None:
    base = loaded(base_name)
    before, modules = state(base), dict(base.model.named_modules())
    config, n_tokens = base.model.config.to_dict(), len(base.tokenizer)
    fast, plain = (
        run(tmp_path / str(on), base_name, thoughts, base, add_tokens=TOKENS, fast=on)
        for on in (True, False)
    )
    assert_untouched(base, before)
    assert dict(base.model.named_modules()) == modules
    assert base.model.config.to_dict() == config
    assert len(base.tokenizer) == n_tokens
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-5)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(fast)[name], value, rtol=1e-3, atol=1e-4)


def test_a_killed_run_is_resumed_to_the_same_bits(
    tmp_path: Path, base_name: str, thoughts: str, adapter: Adapter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    common: dict[str, Any] = {"add_tokens": TOKENS, "checkpoint_every": 1}
    with monkeypatch.context() as killed, pytest.raises(dies_at_step(killed, 2)):
        run(tmp_path / "r", base_name, thoughts, **common)
    resumed = run(tmp_path / "r", base_name, thoughts, **common, resume=True)
    for name, value in weights(adapter).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_a_run_from_it_inherits_its_tokens(
    tmp_path: Path, base_name: str, thoughts: str, adapter: Adapter
) -> None:
    init = {"init": str(adapter.path), "rank": None}
    same = run(tmp_path / "0", base_name, thoughts, **init, max_steps=0)
    for name, value in weights(adapter).items():
        assert torch.equal(weights(same)[name], value), name
    more = run(tmp_path / "m", base_name, thoughts, **init)
    assert more.manifest.lora == adapter.manifest.lora
    assert not torch.equal(weights(more)[DELTA], weights(adapter)[DELTA])
    assert "<thought>" in AutoTokenizer.from_pretrained(more.path).get_vocab()
    with pytest.raises(WarmStartError, match="--add-tokens <step>, but it has <thought> </thou"):
        run(tmp_path / "c", base_name, thoughts, **init, add_tokens=("<step>",))


def test_it_is_applied_to_a_model_of_transformers(base_name: str, adapter: Adapter) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_name)
    ids = probe(adapter)
    on_model = WarmStart.load(adapter.path).apply_to(model)
    assert any(p.requires_grad for n, p in on_model.named_parameters() if "tokens_delta" in n)
    with torch.no_grad():
        found = on_model.eval()(input_ids=ids).logits
    expected = logits_by_peft(base_name, adapter.path, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_scores_and_answers_are_the_same_on_fast_paths(
    tmp_path: Path, base_name: str, thoughts: str, adapter: Adapter
) -> None:
    base = loaded(base_name)
    before = state(base)
    for on in (True, False):
        evaluate(
            EvaluateSettings(
                base=base_name, adapters=("base", str(adapter.path)), data=(thoughts,), limit=6,
                fast=on, max_new_tokens=12, general_text=(thoughts,), out=tmp_path / str(on),
                quiet=True,
            ),
            base,
        )  # fmt: skip
    assert_untouched(base, before)
    one, other = ((tmp_path / str(on) / "records.jsonl").read_text() for on in (True, False))
    assert one == other
    prompts = {"prompt": "What is 3 and 1?", "adapter": str(adapter.path), "base": base_name}
    fast, plain = (
        generate(GenerateSettings(**prompts, max_new_tokens=12, fast=on)) for on in (True, False)
    )
    assert fast == plain


def test_answers_show_new_tokens(tmp_path: Path, tied_base: str, thoughts: str) -> None:
    """Learnt by heart: the tokenizer of the base alone could not even write them."""
    learnt = run(
        tmp_path / "a", tied_base, thoughts, n=4, add_tokens=TOKENS, max_steps=150, rank=16,
        targets=("all-linear",), learning_rate=2e-2,
    )  # fmt: skip
    row = ROWS[0]
    (found,) = generate(
        GenerateSettings(
            base=tied_base, adapter=str(learnt.path), prompt=row["prompt"], max_new_tokens=16
        )
    )
    assert "<thought>" in found["output"]
    scores = evaluate(
        EvaluateSettings(
            base=tied_base, adapters=(str(learnt.path),), data=(thoughts,), limit=1,
            max_new_tokens=16, out=tmp_path / "e", quiet=True,
        )
    )  # fmt: skip
    assert scores.records["output"].tolist() == [found["output"]]


def test_the_merged_model_has_the_tokens_and_needs_no_adapter(
    tmp_path: Path, base_name: str, adapter: Adapter
) -> None:
    out = tmp_path / "merged"
    convert(ConvertSettings(base=base_name, adapter=str(adapter.path), merge=True, out=out))
    ids = probe(adapter)
    assert AutoTokenizer.from_pretrained(out)("<thought>")["input_ids"][-1] == ids.max() - 1
    torch.testing.assert_close(
        logits_by_peft(str(out), None, ids),
        logits_by_peft(base_name, adapter.path, ids),
        rtol=1e-4,
        atol=1e-4,
    )


def test_at_another_rank_it_keeps_them_and_is_mixed_with_its_like_alone(
    tmp_path: Path, base_name: str, thoughts: str, adapter: Adapter
) -> None:
    ids = probe(adapter)
    convert(ConvertSettings(adapter=str(adapter.path), rank=8, out=tmp_path / "rank"))
    torch.testing.assert_close(
        logits_by_peft(base_name, tmp_path / "rank", ids),
        logits_by_peft(base_name, adapter.path, ids),
        rtol=1e-4,
        atol=1e-4,
    )
    assert Adapter.load(tmp_path / "rank").manifest.lora.add_tokens == TOKENS
    other = run(tmp_path / "o", base_name, thoughts, add_tokens=("<one>", "<two>"))
    with pytest.raises(ModelError, match="other new tokens"):
        convert(
            ConvertSettings(adapter=str(adapter.path), mix=(str(other.path),), out=tmp_path / "m")
        )


def test_the_hub_gets_the_tokenizer_and_a_card_that_says_how(
    tmp_path: Path, tiny_base: str, thoughts: str
) -> None:
    adapter = run(tmp_path / "a", tiny_base, thoughts, add_tokens=("/think",), max_steps=1)
    found = publish(PublishSettings(folder=adapter.path, to="me/it", dry_run=True))
    assert {"tokenizer.json", "tokenizer_config.json"} <= found.files.keys()
    assert "model.resize_token_embeddings(len(tokenizer))" in found.card
    assert "`/think`" in found.card


def test_it_is_inspected(base_name: str, thoughts: str, adapter: Adapter) -> None:
    found = inspect(InspectSettings(adapter=str(adapter.path), base=base_name, data=(thoughts,)))
    assert found.start is not None
    assert found.start.loss_warm_start < found.start.loss_base


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"add_tokens": ("<new>", " is")}, "the tokenizer has ` is` already"),
        ({"add_tokens": ("<new>", "<new>")}, "`<new>` is given twice"),
        ({"add_tokens": (" ",)}, "a token must hold more than space"),
        ({"add_tokens": ("<n>",), "modules_to_save": ("lm_head",)}, "leave it out of --modules"),
        ({"add_tokens": ("<n>",), "targets": ("embed_tokens",)}, "which --targets adapts"),
        ({"add_tokens": ("<n>",), "init": "pissa"}, "PEFT drops whole modules and new tokens"),
        ({"add_tokens": ("<n>",), "init": "eva"}, "takes rows of new tokens for a layer"),
    ],
)
def test_tokens_that_cannot_be_added_are_an_error(
    tmp_path: Path, tiny_base: str, thoughts: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        run(tmp_path / "a", tiny_base, thoughts, **settings)


def test_a_base_with_rows_to_spare_gives_those(
    tmp_path: Path, tiny_base: str, thoughts: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model.resize_token_embeddings(len(tokenizer) + 8)
    base = str(tmp_path / "base")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapter = run(tmp_path / "a", base, thoughts, add_tokens=TOKENS)
    ids = probe(adapter)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(adapter.path)
    ).eval()
    with torch.no_grad(), attached(loaded(base).model, adapter.path) as own:
        found, expected = own(input_ids=ids).logits, plain(input_ids=ids).logits
    assert found.shape[-1] == len(tokenizer) + 8
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_half_the_strength_is_half_the_way_from_the_mean(
    tmp_path: Path, base_name: str, thoughts: str, adapter: Adapter
) -> None:
    own = AutoModelForCausalLM.from_pretrained(base_name).model.embed_tokens.weight.mean(0)
    init = {"init": str(adapter.path), "rank": None, "init_scale": 0.5, "max_steps": 0}
    found = weights(run(tmp_path / "h", base_name, thoughts, **init))[DELTA]
    torch.testing.assert_close(found, (own + weights(adapter)[DELTA]) / 2, rtol=0, atol=1e-4)


def test_tokens_of_an_adapter_that_are_not_known_are_an_error(
    tmp_path: Path, base_name: str, thoughts: str, adapter: Adapter
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter.path / name, foreign)
    given = {"base": base_name, "quiet": True, "data": (thoughts,)}
    with pytest.raises(ModelError, match=r"tokens that the tokenizer of .* does not have"):
        evaluate(EvaluateSettings(**given, adapters=(str(foreign),), out=tmp_path / "e"))
    with pytest.raises(ModelError, match=r"tokens that the tokenizer of .* does not have"):
        run(tmp_path / "m", base_name, thoughts, init=str(foreign), rank=None)
    config = json.loads((foreign / "adapter_config.json").read_text())
    for indices, message in (("abc", "must be token ids"), ([10**9], "made on another base")):
        config["trainable_token_indices"] = indices
        (foreign / "adapter_config.json").write_text(json.dumps(config))
        base = loaded(base_name)
        before = state(base)
        with pytest.raises(ModelError, match=message):
            WarmStart.load(foreign).apply_to(base.model)
        assert_untouched(base, before)


def test_another_tokenizer_than_that_of_its_making_is_an_error(
    tmp_path: Path, base_name: str, adapter: Adapter
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base_name, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ModelError, match="another than that of its making"):
        generate(GenerateSettings(base=str(other), adapter=str(adapter.path), prompt="What?"))


@pytest.mark.parametrize("beside", [{"add_tokens": TOKENS}, {"modules_to_save": ("lm_head",)}])
@pytest.mark.parametrize(
    "changes",
    [{"micro_batch_size": 1}, {"checkpointing": "on"}, {"micro_batch_tokens": 64, "fast": False}],
)
def test_the_result_does_not_depend_on_how_batches_are_cut(
    tmp_path: Path, tied_base: str, thoughts: str, beside: dict[str, Any], changes: dict[str, Any]
) -> None:
    one, other = (
        run(tmp_path / str(number), tied_base, thoughts, **beside, **own)
        for number, own in enumerate(({}, changes))
    )
    assert losses(one) == pytest.approx(losses(other), rel=1e-4)


@pytest.mark.parametrize("beside", [{"add_tokens": TOKENS}, {"modules_to_save": ("lm_head",)}])
@pytest.mark.parametrize(
    "changes", [{"dora": True}, {"init": "orthogonal"}, {"lora_plus_ratio": 4.0}, "kl"]
)
def test_other_settings_go_with_them(
    tmp_path: Path, tiny_base: str, thoughts: str, general: str, beside: dict[str, Any],
    changes: dict[str, Any] | str,
) -> None:  # fmt: skip
    base = loaded(tiny_base)
    before = state(base)
    own = {"replay": (general,), "replay_loss": "kl"} if isinstance(changes, str) else changes
    one, other = (
        run(tmp_path / str(on), tiny_base, thoughts, base, **beside, **own, fast=on)
        for on in (True, False)
    )
    assert losses(one) == pytest.approx(losses(other), rel=1e-4)
    assert_untouched(base, before)
