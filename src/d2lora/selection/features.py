"""Features of a pool and of the task's examples for the selection methods, computed on request.

Hidden states, losses and gradients are kept on disk by fingerprint; see `feature_cache`.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from d2lora import fast
from d2lora.adapters.base import Base, load_base
from d2lora.data.encode import Encoder
from d2lora.data.reading import TaskData
from d2lora.data.rows import Example
from d2lora.data.sources import nested_order
from d2lora.data.spool import Lazy
from d2lora.runtime.console import Reporter
from d2lora.runtime.devices import device_of
from d2lora.runtime.run_folder import Stamp, cache_folder, stamp_of
from d2lora.scoring.scorer import TokenScorer, log_probabilities
from d2lora.selection.cache import Array, FeatureCache, block_key
from d2lora.selection.embeddings import SentenceEncoder, base_states, base_width, centred
from d2lora.selection.gradients import GradientFeatures, warmup_rows
from d2lora.selection.hygiene import source_of
from d2lora.selection.tfidf import semantic_vectors
from d2lora.settings import SelectSettings

WORD_WIDTH, _SEED = 128, 0
_VERSION = 2
"""Of the features on disk; to be raised where they come out differently."""


class PoolFeatures:
    """Features of a clean pool and of the task's examples; a `methods.Features`."""

    def __init__(
        self, settings: SelectSettings, pool: TaskData, kept: Sequence[int],
        tasks: Sequence[Sequence[Example]], reporter: Reporter,
    ) -> None:  # fmt: skip
        """Hold the rows; nothing is computed yet.

        Args:
            settings: The base, the embedding, limits and seeds.
            pool: The whole pool.
            kept: Its rows to select from.
            tasks: The examples of each task file.
            reporter: Where progress is shown.
        """
        self.n_pool = len(kept)
        self.examples = Lazy(pool.examples.__getitem__, kept)
        self.task = [example for examples in tasks for example in examples]
        self._settings, self._reporter = settings, reporter
        self._pool, self._kept = pool, kept
        self._files = [number for number, examples in enumerate(tasks) for _ in examples]
        self._cache = FeatureCache(settings.cache or cache_folder(), reporter)
        self._base = cache(lambda: load_base(settings))

    def sources(self) -> list[str]:
        """Return the source of each pool row."""
        return [source_of(self._pool, index) for index in self._kept]

    def task_files(self) -> list[int]:
        """Return the number of the file of each task row."""
        return self._files

    def texts(self) -> tuple[Sequence[str], Sequence[str]]:
        """Return the texts of pool and task rows; those of the pool are read when looked at."""
        examples = self.examples
        pool = Lazy(lambda place: examples[place].text, range(len(examples)))
        return pool, [item.text for item in self.task]

    def embeddings(self) -> tuple[Array, Array]:
        """Return centred vectors of length 1 of pool and task rows.

        Raises:
            SettingsError: If a sentence-transformers model cannot be loaded.
        """
        name = self._settings.embedding
        if name == "words":
            return centred(*semantic_vectors(*self.texts(), WORD_WIDTH, _SEED))
        if name == "base":
            base, encoder = self._encoding()
            width, n = base_width(base), self._settings.feature_tokens
            key = self._key("states", base, encoder)

            def states(block: Sequence[Example]) -> Array:
                with fast.enabled(base.model, when=self._settings.fast):
                    return base_states(base, encoder, block, n)

            pool, task = (
                self._cache.rows(
                    "hidden states", key, rows, width,
                    states,
                )
                for rows in (self.examples, self.task)
            )  # fmt: skip
            return centred(pool, task)
        model = SentenceEncoder(name, device_of(self._settings.device))
        key = json.dumps(["sentence", _VERSION, name, _model_files(name)])
        pool, task = (
            self._cache.rows("embeddings", key, rows, model.width, model.vectors)
            for rows in (self.examples, self.task)
        )
        return centred(pool, task)

    def losses(self) -> Array:
        """Return the base's mean loss of each pool row's answer, in nats per token, shape (N,)."""
        base, encoder = self._encoding()
        scorer = TokenScorer(base.model)
        n = self._settings.feature_tokens

        def losses(block: Sequence[Example]) -> Array:
            items = [encoder.encode(example, n) for example in block]
            with fast.enabled(base.model, when=self._settings.fast):
                sums = log_probabilities(scorer, items, base.pad_id)
            means = [-s / max(1, item.n_supervised) for s, item in zip(sums, items, strict=True)]
            return np.array(means, dtype=np.float32)[:, None]

        key = self._key("losses", base, encoder)
        return self._cache.rows("losses", key, self.examples, 1, losses)[:, 0]

    def gradients(self) -> tuple[Array, Array]:
        """Return sketched Adam directions of pool rows and gradients of task rows."""
        settings = self._settings
        base, encoder = self._encoding()
        n_sample = warmup_rows(self.n_pool, settings.gradient_steps)
        order = nested_order(self.n_pool, settings.seed)[:n_sample]
        sample = [self.examples[index] for index in order]
        made: list[GradientFeatures] = []

        def warmed() -> GradientFeatures:
            if not made:
                self._reporter.say(
                    f"gradients: preliminary warm-up, {settings.gradient_steps} steps on "
                    f"{n_sample:,} rows"
                )
                made.append(
                    GradientFeatures(
                        base, encoder, sample, n_steps=settings.gradient_steps,
                        width=settings.gradient_width, max_tokens=settings.feature_tokens,
                        seed=settings.seed, reporter=self._reporter, fast_when=settings.fast,
                    )
                )  # fmt: skip
            return made[0]

        key = self._key(
            "gradients", base, encoder, settings.gradient_steps, settings.gradient_width,
            settings.seed, block_key("", sample),
        )  # fmt: skip
        width = settings.gradient_width
        try:
            pool = self._cache.rows(
                "gradients", f"{key} pool", self.examples, width,
                lambda block: warmed().of_pool(block),
            )  # fmt: skip
            task = self._cache.rows(
                "task gradients", f"{key} task", self.task, width,
                lambda block: warmed().of_task(block),
            )  # fmt: skip
        finally:
            for features in made:
                features.close()
        return pool, task

    def _encoding(self) -> tuple[Base, Encoder]:
        base = self._base()
        return base, Encoder.of(base, self._settings.chat_format)

    def _key(self, what: str, base: Base, encoder: Encoder, *parts: object) -> str:
        known = [base.fingerprint, tokenizer_sha256(base.tokenizer), encoder.format]
        known += [str(base.model.dtype), base.model.device.type, base.quantization or ""]
        known += [torch.__version__, transformers.__version__]
        own = parts if self._settings.fast else (*parts, "plain passes")
        return json.dumps([what, _VERSION, *known, self._settings.feature_tokens, *own])


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what a tokenizer's token ids follow from: its vocabulary, rules and chat template."""
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    rules = tokenizer.backend_tokenizer.to_str() if fast else sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr((rules, tokenizer.chat_template)).encode()).hexdigest()


def _model_files(name: str) -> list[Stamp]:
    """Return the stamps of a model's files where its name is a folder."""
    files = sorted(file for file in Path(name).rglob("*") if file.is_file())
    return [stamp_of(file) for file in files] if Path(name).is_dir() else []
