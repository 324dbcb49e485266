"""The data card of a selected warm-up set: numbers, and a page.

Diversity is the Vendi score (Friedman and Dieng 2023, arXiv 2210.02410): the exponential of the
entropy of the eigenvalues of the similarity matrix over its size, "how many different rows" there
are. Similarity is the cosine of tf-idf weighted words, whatever the selection method, so that
cards of different methods can be compared; a random subset of the same pool stands beside it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from d2lora.data.encode import Encoder
from d2lora.data.ngrams import gram_hashes, word_hashes, words
from d2lora.data.reading import TaskData
from d2lora.data.rows import Example
from d2lora.data.sources import nested_order
from d2lora.errors import printable
from d2lora.runtime.grids import code, inline
from d2lora.selection.hygiene import Cleaned, source_of
from d2lora.selection.tfidf import Array, Bags, count_bags, dense_product, weighted_bags
from d2lora.settings import SelectSettings

SAMPLE = 1000
"""Rows that diversity and similarity are measured on; more would not change them much."""
N_SHOWN, N_SOURCES, _SHOWN_CHARACTERS = 5, 30, 600


def vendi_score(similarity: Array) -> float:
    """Return the Vendi score of a similarity matrix, shape (n, n), with ones on its diagonal.

    From 1, all rows are the same, to n, no two have anything in common.
    """
    eigenvalues = np.linalg.eigvalsh(similarity.astype(np.float64) / len(similarity))
    positive = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def distinct_grams(texts: Sequence[str], n: int) -> float:
    """Return the share of n-grams that are distinct (Li et al. 2016, arXiv 1510.03055)."""
    grams = [gram_hashes(word_hashes(words(text)), n) for text in texts]
    total = sum(map(len, grams))
    return len(np.unique(np.concatenate(grams))) / total if total else 0.0


def measure(
    settings: SelectSettings, method: str, pool: TaskData, task: Sequence[Example],
    cleaned: Cleaned, chosen: Sequence[int], encoder: Encoder,
) -> dict[str, Any]:  # fmt: skip
    """Return the data card as plain values.

    Args:
        settings: What was asked for.
        method: The selection method.
        pool: The whole pool, before cleaning.
        task: The task's examples; may be empty.
        cleaned: What hygiene kept and rejected.
        chosen: Indices of the chosen rows in the pool.
        encoder: Counts tokens.
    """
    sample = [chosen[i] for i in nested_order(len(chosen), settings.seed)[:SAMPLE]]
    at_random = [
        cleaned.kept[i] for i in nested_order(len(cleaned.kept), settings.seed + 1)[: len(sample)]
    ]
    texts = [pool.examples[index].text for index in (*sample, *at_random)]
    task_texts = [task[i].text for i in nested_order(len(task), settings.seed)[:SAMPLE]]
    vectors, task_vectors = weighted_bags(count_bags(texts), count_bags(task_texts))
    sets = {"chosen": vectors[: len(sample)], "random": vectors[len(sample) :]}
    answers: dict[str, set[str]] = {}
    for example in (pool.examples[index] for index in chosen):
        answers.setdefault(example.question, set()).add(example.completion)
    return {
        "method": method,
        "m": len(chosen),
        "n_pool": len(pool.rows) + len(pool.faults),
        "n_clean": len(cleaned.kept),
        "pool": pool.sources,
        "for_task": list(settings.for_task),
        "rejected": cleaned.counts,
        "keep_out": list(settings.keep_out),
        "sources": _sources(pool, cleaned.kept, chosen),
        "tokens": _lengths(pool, sample, encoder),
        "vendi_score": {name: vendi_score(_gram(rows)) for name, rows in sets.items()},
        "vendi_rows": len(sample),
        "distinct_grams": {
            str(n): distinct_grams(texts[: len(sample)], n) for n in (1, 2, 3)
        },
        "similarity_to_task": {
            name: float(dense_product(rows, task_vectors).max(axis=1).mean())
            for name, rows in sets.items()
        } if task else None,
        "prompts_with_several_answers": sum(len(found) > 1 for found in answers.values()),
    }  # fmt: skip


def _gram(rows: Bags) -> Array:
    similarity = dense_product(rows, rows)
    np.fill_diagonal(similarity, 1.0)
    return similarity


def _sources(
    pool: TaskData, kept: Sequence[int], chosen: Sequence[int]
) -> dict[str, dict[str, int]]:
    available = Counter(source_of(pool, index) for index in kept)
    taken = Counter(source_of(pool, index) for index in chosen)
    return {
        name: {"chosen": taken[name], "pool": count}
        for name, count in sorted(available.items(), key=lambda item: (-taken[item[0]], item[0]))
    }


def _lengths(pool: TaskData, sample: Sequence[int], encoder: Encoder) -> dict[str, list[int]]:
    """Return least, quartiles and most, in tokens of the base."""
    items = [encoder.encode(pool.examples[index]) for index in sample]
    lengths = {
        "prompt": [item.n_prompt for item in items],
        "answer": [len(item.ids) - item.n_prompt for item in items],
    }
    return {
        name: [int(value) for value in np.percentile(values, [0, 25, 50, 75, 100])]
        for name, values in lengths.items()
    }


def page(card: dict[str, Any], examples: Sequence[Example]) -> str:
    """Return the data card in Markdown; texts of rows are fenced, so that none is interpreted."""
    rows: dict[str, str] = {
        "rows": f"{card['m']:,} selected of {card['n_clean']:,} clean of {card['n_pool']:,}",
        "method": f"`{card['method']}`" + _for(card),
        "prompt tokens": _quartiles(card["tokens"]["prompt"]),
        "answer tokens": _quartiles(card["tokens"]["answer"]),
        "Vendi score": f"{card['vendi_score']['chosen']:.1f} over {card['vendi_rows']:,} rows "
        f"(random subset: {card['vendi_score']['random']:.1f})",
        "distinct 1-, 2-, 3-grams": ", ".join(f"{v:.1%}" for v in card["distinct_grams"].values()),
        "similarity to the task": _likeness(card["similarity_to_task"]),
        "contamination": _contamination(card),
        "duplicates": f"{card['rejected']['duplicate']:,} exact and "
        f"{card['rejected']['near_duplicate']:,} near duplicates removed",
        "prompts with several answers": f"{card['prompts_with_several_answers']:,}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    sources = "\n".join(
        f"| {inline(name)} | {n['chosen']:,} | {n['pool']:,} |"
        for name, n in list(card["sources"].items())[:N_SOURCES]
    )
    if len(card["sources"]) > N_SOURCES:
        sources += f"\n| {len(card['sources']) - N_SOURCES:,} more, in card.json | | |"
    rejected = "\n".join(f"| {step} | {n:,} |" for step, n in card["rejected"].items() if n)
    shown = "\n\n".join(_fenced(example.text) for example in examples[:N_SHOWN])
    pool = "\n".join(
        f"- {code(d['file'])}, {d['rows']:,} rows, sha256 {code(d['sha256'])}" for d in card["pool"]
    )
    return PAGE.format(
        table=table, sources=sources, rejected=rejected or "| none | 0 |", shown=shown, pool=pool
    )


def _for(card: dict[str, Any]) -> str:
    return " for " + ", ".join(map(code, card["for_task"])) if card["for_task"] else ""


def _quartiles(values: Sequence[int]) -> str:
    least, lower, median, upper, most = values
    return f"median {median}, half from {lower} to {upper}, all from {least} to {most}"


def _likeness(found: dict[str, float] | None) -> str:
    if found is None:
        return "no task given"
    return f"{found['chosen']:.3f} (random subset: {found['random']:.3f})"


def _contamination(card: dict[str, Any]) -> str:
    if not card["keep_out"]:
        return "not checked: name the evaluation files with --keep-out"
    names = ", ".join(map(code, card["keep_out"]))
    return f"{card['rejected']['contaminated']:,} rows that overlap with {names} removed"


def _fenced(text: str) -> str:
    cut = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
    cut = printable(cut)
    fence = "`" * 3
    while fence in cut:
        fence += "`"
    return f"{fence}text\n{cut}\n{fence}"


PAGE = """# A warm-up set selected by d2lora

| | |
|---|---|
{table}

Similarity is the mean, over the selected rows, of the largest tf-idf cosine with an example of the
task. The Vendi score is the effective number of different rows, by the same cosine.

## Sources

| source | selected | clean rows of the pool |
|---|---|---|
{sources}

## Removed

| step | rows |
|---|---|
{rejected}

Each with its reason in `rejected.jsonl`.

## Pool

{pool}

## Examples

{shown}
"""
