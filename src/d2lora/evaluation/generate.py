"""Completions of prompts by a base with or without an adapter, and the `generate` command."""

import json
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from d2lora import fast
from d2lora.adapters.attach import attached, is_folded, merged
from d2lora.adapters.base import Base, load_base
from d2lora.adapters.manifest import Manifest, base_for, check_fit, has_manifest
from d2lora.data.encode import Encoder
from d2lora.data.encoded_sets import encode_prompts
from d2lora.data.files import text_lines
from d2lora.data.reading import read_task
from d2lora.data.rows import Example, kind_of, user
from d2lora.data.tasks import AUTO
from d2lora.errors import DataError, SettingsError, printable
from d2lora.evaluation.decoding import Decoder, Sampling, check_room
from d2lora.runtime.claims import claimed
from d2lora.runtime.console import Reporter
from d2lora.runtime.devices import slow_dtype
from d2lora.runtime.run_folder import write_text
from d2lora.settings import GenerateSettings, Overlong


@contextmanager
def adapted(
    base: Base, adapter: Path | None, *, fast_when: bool
) -> Generator[tuple[nn.Module, fast.Used]]:
    """Yield the base with an adapter on it, or alone, ready to score and decode.

    Args:
        base: The base; afterwards the adapter is off again.
        adapter: The adapter's folder. None: the base alone.
        fast_when: Whether fast paths may be used, and the adapter merged into the base.

    Yields:
        The model, and the record of the fast paths that were used.

    Raises:
        ModelError: If the adapter was made on another base.
    """
    if adapter is None:
        with fast.enabled(base.model, when=fast_when) as used:
            yield base.model, used
        return
    check_fit(adapter, base)
    folding = merged if fast_when else nullcontext
    with (
        attached(base.model, adapter) as model,
        folding(model),
        fast.enabled(model, when=fast_when) as used,
    ):
        if is_folded(model):
            used.take("folded adapter")
        yield model, used


def chat_format_of(adapter: Path | None, wanted: str | None) -> str | None:
    """Return the chat format to prompt an adapter in: as set, else as it was trained."""
    if wanted is not None or adapter is None:
        return wanted
    if has_manifest(adapter):
        return Manifest.read(adapter).chat_format
    return None


def encoder_of(adapter: Path | None, base: Base, wanted: str | None) -> Encoder:
    """Return the encoder for an adapter's prompts: in the chat format and template it learnt.

    Args:
        adapter: The adapter's folder. None: the base alone.
        base: The base, for this adapter where it has new tokens (`base_for`).
        wanted: The chat format that the settings give.
    """
    known = adapter is not None and has_manifest(adapter)
    template = Manifest.read(adapter).chat_template if adapter and known else None
    return Encoder.of(base, chat_format_of(adapter, wanted), template)


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
    as_it_is = settings.prompts is None or kind_of(Path(settings.prompts)) == ".txt"
    if as_it_is and settings.task != AUTO:
        raise SettingsError(
            f"--task {settings.task} is about rows with fields, and this prompt is taken as it is; "
            "leave it out, or give the rows as --prompts FILE"
        )
    examples = _examples(settings)
    adapter = None if settings.adapter is None else Path(settings.adapter)
    base = base_for(load_base(settings), adapter)
    encoder = encoder_of(adapter, base, settings.chat_format)
    sampling = Sampling(settings.temperature, settings.top_p, settings.seed)
    prompts = encode_prompts(encoder, examples, *lengths_of(adapter), settings.max_new_tokens).ids
    places = [example.place for example in examples]
    warning = check_room(prompts, places, base.model, settings.max_new_tokens)
    slow = slow_dtype(base.model.dtype, base.model.device)
    for message in (slow and f"warning: {slow}", warning, adapter and check_fit(adapter, base)):
        if message is not None:
            Reporter().say(message)
    with adapted(base, adapter, fast_when=settings.fast) as (model, _):
        limits = settings.max_new_tokens, settings.batch_size
        decoder = Decoder(model, base, *limits, sampling, Reporter().say)
        outputs = dict(decoder.complete(prompts))
    return [
        {"prompt": example.prompt[-1].content, "output": decode(base, outputs[index])}
        for index, example in enumerate(examples)
    ]


def decode(base: Base, ids: Sequence[int], kept: Sequence[str] = ()) -> str:
    """Return a completion as text, without special tokens but those that are to be kept."""
    shown = list(ids)
    if kept:
        added = base.tokenizer.added_tokens_decoder.items()
        left_out = {id_ for id_, token in added if token.special and str(token) not in kept}
        shown = [id_ for id_ in ids if id_ not in left_out]
    text = base.tokenizer.decode(shown, skip_special_tokens=not kept)
    assert isinstance(text, str)
    return text.strip()


def _examples(settings: GenerateSettings) -> list[Example]:
    if settings.prompt is not None:
        if not settings.prompt.strip():
            raise SettingsError("--prompt is empty")
        try:
            settings.prompt.encode()
        except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
            raise SettingsError("--prompt is not UTF-8 text; put it into a file") from None
        return [Example(user(settings.prompt), "", place="--prompt")]
    assert settings.prompts is not None
    path = Path(settings.prompts)
    if kind_of(path) == ".txt":
        if not path.exists():
            raise DataError(f"{path}: no such file")
        numbered = [(n, line) for n, line in enumerate(text_lines(path), 1) if line.strip()]
        prompts = [Example(user(t), "", place=f"{path}, line {number}") for number, t in numbered]
    else:
        prompts = list(
            read_task(
                [settings.prompts], settings.task, say=Reporter().say, prompts_only=True
            ).examples
        )
    if not prompts:
        raise DataError(f"{path}: the file holds no prompts")
    return prompts


def command(settings: GenerateSettings) -> None:
    """Run `d2lora generate`."""
    read = None if settings.prompts is None else Path(settings.prompts).resolve()
    if settings.out is not None and settings.out.resolve() == read:
        raise SettingsError(f"--out {settings.out} is the file of prompts; choose another")
    with claimed(settings.out, "file"):
        _write(generate(settings), settings)


def _write(rows: list[dict[str, Any]], settings: GenerateSettings) -> None:
    if settings.out is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(settings.out, lines)
    elif len(rows) == 1:
        _print(rows[0]["output"])
    else:
        for row in rows:
            _print(json.dumps(row, ensure_ascii=False))


def _print(text: str) -> None:
    """Print a line as it is, but for what could command a terminal, where it goes to one."""
    sys.stdout.write(f"{printable(text) if sys.stdout.isatty() else text}\n")
