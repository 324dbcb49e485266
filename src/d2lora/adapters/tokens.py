"""New tokens: in the tokenizer, and as rows of the embedding and the head.

The rows are made as transformers makes them, from the mean of all others (Hewitt 2021,
https://nlp.stanford.edu/~johnhew/vocab-expansion.html), the same at every time. PEFT trains them
alone (`trainable_token_indices`) and saves them with the adapter.
"""

import copy
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from d2lora.adapters.foreign import foreign
from d2lora.errors import ModelError, SettingsError, listed

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
"""What a tokenizer may be saved in, beside its configuration."""
_SEED = 0
"""Of the little by which new rows differ from the mean."""


def with_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]
) -> PreTrainedTokenizerBase:
    """Return a tokenizer that knows more tokens, found wherever they stand in a text.

    They are no special tokens, so that data may hold them and completions show them.

    Raises:
        SettingsError: If it has one of them already; it names all.
    """
    known = tokenizer.get_vocab()
    if faults := [
        f"the tokenizer has `{token}` already: leave it out"
        for token in tokens
        if token in known or _is_one(token, tokenizer)
    ]:
        raise SettingsError(f"--add-tokens:\n{listed(faults)}")
    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    return other


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy the tokenizer that lies beside an adapter, if any."""
    for name in (TOKENIZER_CONFIG, *TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def _is_one(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether a text is one token already, be it spelt otherwise in the vocabulary."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def grow(model: PreTrainedModel, n_rows: int) -> Callable[[], None]:
    """Give a model's embedding and head so many rows, where they have fewer.

    Returns:
        What makes the model as it was, bit for bit.

    Raises:
        ModelError: If the model has vocabularies beside them, or is of a kind that cannot grow.
    """
    embedding: Any = model.get_input_embeddings()
    if len(embedding.weight) >= n_rows:
        return lambda: None
    undo = _remembered(model)
    try:
        with foreign(f"the embedding of {type(model).__name__} cannot grow by new tokens"):
            _resize(model, n_rows)
    except ModelError:
        undo()
        raise
    return undo


@contextmanager
def grown(model: PreTrainedModel, n_rows: int) -> Generator[None]:
    """Give a model's embedding and head so many rows inside the block; as `grow`."""
    undo = grow(model, n_rows)
    try:
        yield
    finally:
        undo()


@torch.no_grad()
def _resize(model: PreTrainedModel, n_rows: int) -> None:
    before = _shapes(model)
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        model.resize_token_embeddings(n_rows)
    after = _shapes(model)
    if others := sorted(name for name in before if after.get(name) != before[name]):
        raise ValueError(f"it has rows of tokens elsewhere, too: {others[0]}")
    ids_1T = torch.full((1, 2), n_rows - 1, device=model.device)
    n_words = model(input_ids=ids_1T, use_cache=False).logits.shape[-1]
    if n_words < n_rows:
        raise ValueError(f"its head has {n_words:,} rows instead of {n_rows:,}")


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Return the shapes of all weights but those of the embedding and the head."""
    pair = [model.get_input_embeddings(), model.get_output_embeddings()]
    own = {id(weight) for module in pair if module is not None for weight in module.parameters()}
    return {name: p.shape for name, p in model.named_parameters() if id(p) not in own}


def _remembered(model: PreTrainedModel) -> Callable[[], None]:
    """Return what puts a model's modules, weights and numbers of words back."""
    kept = [
        (module, {name: value for name, value in vars(module).items() if name[0] != "_"},
         dict(module.named_parameters(recurse=False)), dict(module.named_children()))
        for module in model.modules()
    ]  # fmt: skip
    weights = {p: p.data for p in model.parameters()}
    config: Any = model.config.get_text_config()
    n_words = config.vocab_size

    def undo() -> None:
        for module, values, parameters, children in kept:
            for name in vars(module).keys() - values.keys():
                if name[0] != "_":
                    delattr(module, name)
            vars(module).update(values)
            for name, part in {**parameters, **children}.items():
                setattr(module, name, part)
        for parameter, weight in weights.items():
            parameter.data = weight
        config.vocab_size = n_words

    return undo
