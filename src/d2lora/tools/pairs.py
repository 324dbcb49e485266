"""Preference pairs of a task with gold answers: the model's wrong answers are rejected.

    d2lora pairs --data task.jsonl --adapter warm --out pairs
    d2lora adapt --data pairs/pairs.jsonl --objective dpo --init warm --out adapter

Every prompt is sampled several times from the base or an adapter. The worst sample by the task's
main score is rejected, where it is worse than the chosen completion: the gold answer, or the best
sample that is as good as gold. Prompts without such a sample give no pair.

pairs.jsonl    TRL's conversational preference rows, with the scores of both completions
summary.json   how many prompts gave a pair, and why the others did not
done.json      the marker of completion
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2lora.adapters.base import Base, load_base
from d2lora.adapters.manifest import base_for, base_record
from d2lora.data.encoded_sets import encode_prompts
from d2lora.data.reading import TaskData, read_task
from d2lora.data.rows import Example
from d2lora.data.sources import BAD_ROWS, nested_order, write_bad_rows
from d2lora.errors import DataError, counted
from d2lora.evaluation.decoding import Decoder, Sampling, check_room
from d2lora.evaluation.generate import adapted, decode, encoder_of
from d2lora.evaluation.metrics import Metric, metric_named
from d2lora.evaluation.outputs import scored_output
from d2lora.runtime.console import Reporter
from d2lora.runtime.run_folder import (
    SETTINGS,
    RunFolder,
    new_folder,
    provenance,
    write_json,
    write_text,
)
from d2lora.settings import PairsSettings
from d2lora.settings.seeds import stream_seed

FILE = "pairs.jsonl"


@dataclass(frozen=True)
class PairsMade:
    """The result."""

    path: Path
    n_prompts: int
    n_pairs: int
    n_all_right: int
    """Prompts of which every sample was as good as the chosen completion."""
    n_samples: int
    n_distinct_samples: int
    mean_sample_score: float
    fast_passes: list[str]
    """Names of the fast paths that sampling used."""


@dataclass(frozen=True)
class _Sample:
    text: str
    score: float


@dataclass(frozen=True)
class _Score:
    """The main score of single outputs."""

    metric: Metric
    data: TaskData

    @classmethod
    def of(cls, data: TaskData) -> "_Score":
        return cls(metric_named(data.task.metrics[0], data.task.named.folder), data)

    @property
    def marks(self) -> list[str]:
        """What thoughts stand between."""
        return self.data.task.card.thoughts.split()

    def __call__(self, output: str, example: Example) -> float:
        row = self.data.rows[example.row]
        scores = self.metric.score([scored_output(output, example, row, self.data.task)])
        return next(iter(scores.values()))[0]


def make_pairs(settings: PairsSettings, base: Base | None = None) -> PairsMade:
    """Make preference pairs by sampling.

    Args:
        settings: The task's rows, what is sampled from, and how.
        base: The base already loaded as the settings say.

    Raises:
        D2LoraError: One of its kinds, for settings, data, a base or an adapter that cannot be
            used.
    """
    with RunFolder.open(settings.out, "", whole=True):
        return _make_pairs(settings, base)


def _make_pairs(settings: PairsSettings, base: Base | None) -> PairsMade:
    reporter = Reporter(quiet=settings.quiet)
    data = read_task(
        settings.data, settings.task, skip_bad=settings.skip_bad_rows, say=reporter.say
    )
    if data.task.answers != "open":
        raise DataError(
            f"task {data.task.name} has no open answers to score samples against; give rows of "
            "gsm8k, titles, instruct or another task whose answers are generated"
        )
    if settings.n is not None and settings.n > len(data.examples):
        raise DataError(f"{settings.n} rows are requested, but the data has {len(data.examples)}")
    order = nested_order(len(data.examples), stream_seed(settings.seed, "subset"))
    examples = [data.examples[index] for index in order[: settings.n]]
    score = _Score.of(data)
    base = base or load_base(settings)
    samples, fast_passes = _sampled(settings, base, examples, score, reporter)
    rows: list[dict[str, Any]] = []
    for example, own in zip(examples, samples, strict=True):
        row = _pair(example, own, score, best_sample=settings.chosen == "sample")
        if row is not None:
            rows.append(row)
    if not rows:
        raise DataError(
            "no prompt gave a pair: every sample was as good as the chosen completion; raise "
            "--temperature or --samples, or sample from a weaker model"
        )
    every = [sample for own in samples for sample in own]
    made = PairsMade(
        path=settings.out / FILE,
        n_prompts=len(examples),
        n_pairs=len(rows),
        n_all_right=len(examples) - len(rows),
        n_samples=len(examples) * settings.samples,
        n_distinct_samples=len(every),
        mean_sample_score=sum(sample.score for sample in every) / len(every),
        fast_passes=fast_passes,
    )
    _write(settings, base, data, rows, made)
    if data.faults:
        reporter.say(f"skipped {counted(len(data.faults), 'bad row')}: {settings.out / BAD_ROWS}")
    reporter.say(
        f"{counted(made.n_pairs, 'pair')} of {counted(made.n_prompts, 'prompt')} "
        f"(mean {score.metric.title} of {made.n_distinct_samples:,} distinct "
        f"samples: {made.mean_sample_score:.3f}); written to {made.path}"
    )
    return made


def _sampled(
    settings: PairsSettings,
    base: Base,
    examples: Sequence[Example],
    score: "_Score",
    reporter: Reporter,
) -> tuple[list[list[_Sample]], list[str]]:
    """Return the distinct samples of every prompt, scored, and the fast paths used."""
    folder = None if settings.adapter is None else Path(settings.adapter)
    base = base_for(base, folder)
    encoder = encoder_of(folder, base, settings.chat_format)
    prompts = encode_prompts(
        encoder, examples, settings.max_length, settings.overlong, settings.max_new_tokens
    )
    if message := prompts.report(settings.max_length):
        reporter.say(message)
    places = [example.place for example in examples]
    if message := check_room(prompts.ids, places, base.model, settings.max_new_tokens):
        reporter.say(message)
    repeated = [prompt for prompt in prompts.ids for _ in range(settings.samples)]
    sampling = Sampling(settings.temperature, settings.top_p, settings.seed)
    texts: list[dict[str, None]] = [{} for _ in examples]
    with (
        adapted(base, folder, fast_when=settings.fast) as (model, used),
        reporter.bar("sampling", len(repeated)) as bar,
    ):
        limits = settings.max_new_tokens, settings.batch_size
        decoder = Decoder(model, base, *limits, sampling, reporter.say)
        for done, (index, ids) in enumerate(decoder.complete(repeated), 1):
            texts[index // settings.samples][decode(base, ids, score.marks)] = None
            bar.update(done)
    samples = [
        [_Sample(text, score(text, example)) for text in sorted(own)]
        for example, own in zip(examples, texts, strict=True)
    ]
    return samples, used.names


def _pair(
    example: Example,
    samples: Sequence[_Sample],
    score: Callable[[str, Example], float],
    *,
    best_sample: bool,
) -> dict[str, Any] | None:
    """Return the row of a prompt; None where no sample is worse than the chosen completion."""
    gold = _Sample(example.completion, score(example.completion, example))
    as_good = [sample for sample in samples if sample.score >= gold.score]
    chosen = as_good[0] if best_sample and as_good else gold
    # An empty answer is not a completion to learn from.
    worse = [s for s in samples if s.score < chosen.score and s.text.strip()]
    if not worse:
        return None
    rejected = min(worse, key=lambda sample: (sample.score, sample.text))
    return {
        "prompt": [turn.to_dict() for turn in example.prompt],
        **({"tools": list(example.tools)} if example.tools else {}),
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "chosen_is": "gold" if chosen is gold else "sample",
        "score_chosen": chosen.score,
        "score_rejected": rejected.score,
        "row": example.row,
    }


def _write(
    settings: PairsSettings,
    base: Base,
    data: TaskData,
    rows: Sequence[dict[str, Any]],
    made: PairsMade,
) -> None:
    with new_folder(settings.out) as folder:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / FILE, lines)
        write_bad_rows(data.faults, folder)
        write_text(folder / SETTINGS, settings.to_yaml())
        origin = {**provenance(), "base": base_record(base).model_dump(), "data": data.sources}
        write_json(folder / "provenance.json", origin)
        write_json(folder / "summary.json", {**asdict(made), "path": FILE})
        RunFolder(folder).finish({"kind": "pairs", "n_pairs": made.n_pairs})


def command(settings: PairsSettings) -> None:
    """Run `d2lora pairs`."""
    make_pairs(settings)
