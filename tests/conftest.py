"""Tiny real objects: a random Llama with a real tokenizer, rows of the small world."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from train_tokenizer import train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from d2lora.embedded import general_rows, title_rows, word_problem_rows
from d2lora.runtime.console import quiet_libraries
from support import write_rows

if TYPE_CHECKING:
    from d2lora import WarmStart


def pytest_configure() -> None:
    """Leave the last word to pytest's summary, before anything imports PEFT."""
    quiet_libraries()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["D2LORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def save_tiny_base(folder: Path, seed: int, **changes: int) -> str:
    """Write a random Llama of two layers with a byte-level tokenizer."""
    texts = [row["prompt"] + row["completion"] for row in general_rows("train", 200)]
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.save_pretrained(folder)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{**shape, **changes},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base"), seed=0)


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def general(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "general.jsonl", general_rows("train", 60))


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = word_problem_rows("train", 40)
    return write_rows(tmp_path_factory.mktemp("data") / "problems.jsonl", rows)


@pytest.fixture(scope="session")
def titles(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "titles.jsonl", title_rows("train", 40))


@pytest.fixture(scope="session")
def warm_start(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: str, general: str
) -> "WarmStart":
    """A short warm-up of rank 4 on the tiny base; tests read it and never write into it."""
    out = tmp_path_factory.mktemp("warm") / "start"
    from d2lora import WarmupSettings, warm_up

    return warm_up(
        WarmupSettings(
            base=tiny_base, data=(general,), out=out, max_steps=6, rank=4, batch_size=8,
            learning_rate=1e-2, quiet=True,
        )
    )  # fmt: skip
