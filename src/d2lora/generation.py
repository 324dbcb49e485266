"""Completions of prompts by a base with or without an adapter, and the `generate` command."""

import json
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from d2lora.artifacts import Manifest, check_fit, has_manifest
from d2lora.console import Reporter
from d2lora.decoding import Decoder, Sampling
from d2lora.encode import Encoder
from d2lora.encoded_sets import encode_prompts
from d2lora.errors import DataError, SettingsError
from d2lora.files import text_lines
from d2lora.lean import lean_layers
from d2lora.models import Base, attach_adapter, detach_adapter, load_base, merged
from d2lora.rows import Example, user
from d2lora.runs import write_text
from d2lora.settings import GenerateSettings, Overlong
from d2lora.tasks import read_task


@contextmanager
def adapted(base: Base, adapter: Path | None) -> Generator[nn.Module]:
    """Give the base with an adapter on it, or alone, ready to score and decode fast.

    Raises:
        ModelError: If the adapter was made on another base.
    """
    if adapter is None:
        with lean_layers(base.model):
            yield base.model
        return
    check_fit(adapter, base)
    model = attach_adapter(base.model, adapter, trainable=False)
    try:
        with merged(model), lean_layers(model):
            yield model
    finally:
        detach_adapter(model)


def chat_format_of(adapter: Path | None, wanted: str | None) -> str | None:
    """Return the chat format to prompt an adapter in: as set, else as it was trained."""
    if wanted is not None or adapter is None:
        return wanted
    if has_manifest(adapter):
        return Manifest.read(adapter).chat_format
    return None


def lengths_of(adapter: Path | None) -> tuple[int, Overlong]:
    """Return the length limit of the rows that an adapter was trained on, and what it did."""
    if adapter is None or not has_manifest(adapter):
        return 0, "error"
    trained = Manifest.read(adapter).settings
    return int(trained.get("max_length", 0)), trained.get("overlong", "error")


def generate(settings: GenerateSettings) -> list[dict[str, Any]]:
    """Complete one prompt or a file of prompts.

    Returns:
        One row per prompt: `prompt` and `output`.

    Raises:
        SettingsError: If not exactly one of `prompt` and `prompts` is given.
        D2LoraError: For a base, an adapter or a file that cannot be used.
    """
    if (settings.prompt is None) == (settings.prompts is None):
        raise SettingsError("give either --prompt TEXT or --prompts FILE")
    examples = _examples(settings)
    adapter = Path(settings.adapter) if settings.adapter else None
    base = load_base(settings)
    encoder = Encoder.of(base, chat_format_of(adapter, settings.chat_format))
    sampling = Sampling(settings.temperature, settings.top_p, settings.seed)
    prompts = encode_prompts(encoder, examples, *lengths_of(adapter)).ids
    with adapted(base, adapter) as model:
        decoder = Decoder(
            model, base, settings.max_new_tokens, settings.batch_size, sampling, settings.lean
        )
        outputs = dict(decoder.complete(prompts))
    return [
        {"prompt": example.prompt[-1].content, "output": decode(base, outputs[index])}
        for index, example in enumerate(examples)
    ]


def decode(base: Base, ids: Sequence[int]) -> str:
    """Return a completion as text."""
    text = base.tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


def _examples(settings: GenerateSettings) -> list[Example]:
    if settings.prompt is not None:
        if not settings.prompt.strip():
            raise SettingsError("--prompt is empty")
        try:
            settings.prompt.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no UTF-8
            raise SettingsError("--prompt is not UTF-8 text; put it into a file") from None
        return [Example(user(settings.prompt), "")]
    assert settings.prompts is not None
    path = Path(settings.prompts)
    if path.suffix == ".txt":
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        prompts = [Example(user(line), "") for line in text_lines(path) if line.strip()]
    else:
        data = read_task([settings.prompts], "prompts", say=Reporter().say)
        prompts = list(data.examples)
    if not prompts:
        raise DataError(f"{path}: the file holds no prompts")
    return prompts


def command(settings: GenerateSettings) -> None:
    """Run `d2lora generate`."""
    rows = generate(settings)
    if settings.out:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(settings.out, lines)
    elif len(rows) == 1:
        sys.stdout.write(rows[0]["output"] + "\n")
    else:
        for row in rows:
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
