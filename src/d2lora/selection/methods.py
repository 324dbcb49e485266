"""Selection methods: m rows of a pool, numbers in, indices out, without models or files.

Each method is a function of `Features` and `Request`, listed in `METHODS`. A method asks the
features for what it needs, so nothing else is computed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from d2lora.data.sources import nested_order
from d2lora.errors import SettingsError
from d2lora.selection.cache import Array, unit_rows
from d2lora.selection.tfidf import Bags, bags_in_blocks
from d2lora.selection.vectors import best_likeness, facility_location, nearest_in_turn

Floats = NDArray[np.floating[Any]]
DSIR_BUCKETS = 10_000
DSIR_SMOOTHING = 0.1
EASY, HARD = 0.2, 0.8
"""Quantiles of the base's loss between which rows are neither too easy nor too hard."""


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    m: int
    seed: int
    relevance: float = 0.5
    """For `mixture`: 0 is all coverage, 1 all similarity to the task."""


@dataclass(frozen=True)
class Pick:
    """A chosen row and why."""

    index: int
    reason: str
    score: float | None = None


class Features(Protocol):
    """What is known of the pool (N rows) and of the task's examples (M rows, of some files)."""

    n_pool: int

    def sources(self) -> list[str]:
        """Return the source of each pool row."""
        ...

    def task_files(self) -> list[int]:
        """Return the number of the file that each task row is from; empty without a task."""
        ...

    def texts(self) -> tuple[Sequence[str], Sequence[str]]:
        """Return the texts of pool and task rows."""
        ...

    def embeddings(self) -> tuple[Array, Array]:
        """Return vectors of length 1, shapes (N, D) and (M, D); None: the kind that is set."""
        ...

    def gradients(self) -> tuple[Array, Array]:
        """Return sketched gradients, shapes (N, K) and (M, K)."""
        ...

    def losses(self) -> Array:
        """Return the base's mean loss of each pool row's answer, in nats per token, shape (N,)."""
        ...


Method = Callable[[Features, Request], list[Pick]]


def random(features: Features, request: Request) -> list[Pick]:
    """Choose at random: the baseline that is hard to beat (Ivison et al. 2025, 2503.01807)."""
    order = nested_order(features.n_pool, request.seed)[: request.m]
    return [Pick(index, "selected at random") for index in order]


def stratified(features: Features, request: Request) -> list[Pick]:
    """Take every source alike, at random inside of each; small sources are taken whole.

    Equal allocation of stratified sampling (Cochran 1977, chapter 5), as in the examples-
    proportional mixing with a limit of T5 (Raffel et al. 2020, arXiv 1910.10683, section 3.5.2).
    """
    sources = features.sources()
    queues: dict[str, list[int]] = {}
    for index in reversed(nested_order(features.n_pool, request.seed)):
        queues.setdefault(sources[index], []).append(index)
    picks: list[Pick] = []
    while len(picks) < request.m:
        for name in sorted(queues):
            if queues[name] and len(picks) < request.m:
                picks.append(Pick(queues[name].pop(), f"stratum of source {name}"))
    return picks


def diverse(features: Features, request: Request) -> list[Pick]:
    """Cover the pool: facility location on embeddings (Wei, Iyer and Bilmes 2015, PMLR 37).

    The greedy algorithm is stochastic (Mirzasoleiman et al. 2015, arXiv 1409.7938), which keeps
    1 - 1/e of the best coverage, less 5 %, at a cost that does not grow with m.
    """
    pool, _ = features.embeddings()
    return _covering(facility_location(pool, request.m, request.seed))


def mixture(features: Features, request: Request) -> list[Pick]:
    """Weigh coverage of the pool against likeness to the task (Lin and Bilmes 2011, P11-1052).

    Maximises `(1 - w) coverage + w mean likeness`, both from 0 to 1, with w = `relevance`; a
    sum of a submodular and a modular part, so the greedy algorithm keeps its guarantee.
    """
    pool, task = features.embeddings()
    need_task(task, "mixture")
    likeness = (1 + best_likeness(pool, task)) / np.float32(2)
    return _covering(facility_location(pool, request.m, request.seed, likeness, request.relevance))


def similar(features: Features, request: Request) -> list[Pick]:
    """Let the task's examples take their nearest rows in turn (round-robin).

    On the base's hidden states, the default, this is RDS+ (Ivison et al. 2025, arXiv 2503.01807,
    section 3). Several task files take turns first, so that each has an equal part.
    """
    pool, task = features.embeddings()
    return _near("similar", pool, task, features.task_files(), request.m)


def dsir(features: Features, request: Request) -> list[Pick]:
    """Resample the pool by importance towards the task (Xie et al. 2023, arXiv 2302.03169).

    Weights are ratios of probabilities of hashed word uni- and bigrams; Gumbel noise makes the
    choice a sample without replacement. Two things are ours, as the paper has millions of task
    rows and rows of one length. The task's counts are mixed with a tenth of the pool's, since
    tens of examples leave most n-grams unseen. And log ratios are taken less the pool's mean, and
    weights brought to the median length k, times 2 k / (n + k) for n n-grams, else the shortest
    rows always win.
    """
    pool_texts, task_texts = features.texts()
    need_task(task_texts, "dsir")
    raw, target = _gram_counts(pool_texts), _gram_counts(task_texts)
    raw = (raw + 1e-8) / (raw + 1e-8).sum()
    target = (1 - DSIR_SMOOTHING) * target / max(target.sum(), 1.0) + DSIR_SMOOTHING * raw
    ratios = np.log(target / raw)
    ratios -= ratios @ raw
    blocks = [(b @ ratios, np.asarray(b.sum(axis=1)).ravel()) for b in _grams(pool_texts)]
    evidence, lengths = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    typical = np.median(lengths)
    weights: Floats = evidence * 2 * typical / (lengths + typical)
    noise = np.random.default_rng(request.seed).gumbel(size=len(weights))
    order = np.argsort(-(weights + noise), kind="stable")[: request.m]
    return [
        Pick(int(index), "importance weight for the task", float(weights[index])) for index in order
    ]


def _grams(texts: Sequence[str]) -> Iterator[Bags]:
    return bags_in_blocks(texts, DSIR_BUCKETS, 2)


def _gram_counts(texts: Sequence[str]) -> Floats:
    counts = np.zeros(DSIR_BUCKETS)
    for bags in _grams(texts):
        counts += np.asarray(bags.sum(axis=0)).ravel()
    return counts


def gradient(features: Features, request: Request) -> list[Pick]:
    """Choose rows whose training would help the task most (LESS, Xia et al. 2024, 2402.04333).

    A row's score is the largest, over the task's files, of its mean cosine with that file's
    examples (LESS, section 4.2).
    """
    pool, task = features.gradients()
    need_task(task, "gradient")
    files = np.array(features.task_files())
    likely = unit_rows(task)
    wanted = np.stack([likely[files == number].mean(axis=0) for number in np.unique(files)])
    scores = (unit_rows(pool) @ wanted.T).max(axis=1)
    order = np.argsort(-scores, kind="stable")[: request.m]
    return [Pick(int(i), "gradient similar to the task's", float(scores[i])) for i in order]


def perplexity(features: Features, request: Request) -> list[Pick]:
    """Leave out what the base finds too easy or too hard, and choose at random of the middle.

    Marion et al. 2023 (arXiv 2309.04564) found the middle of the perplexities to prune best. The
    band is between the quantiles 0.2 and 0.8 of the loss, wider where m is more.
    """
    losses = features.losses()
    n = features.n_pool
    spare = max(0, request.m - math.floor(n * (HARD - EASY))) / 2
    low, high = math.floor(n * EASY - spare), math.ceil(n * HARD + spare)
    middle = np.argsort(losses, kind="stable")[max(0, low) : high]
    order = [int(middle[place]) for place in nested_order(len(middle), request.seed)]
    return [Pick(i, "medium loss under the base", float(losses[i])) for i in order[: request.m]]


METHODS: dict[str, Method] = {
    "random": random,
    "stratified": stratified,
    "diverse": diverse,
    "similar": similar,
    "dsir": dsir,
    "gradient": gradient,
    "perplexity": perplexity,
    "mixture": mixture,
}


OF_TASK = ("similar", "dsir", "gradient", "mixture")
"""Methods that need examples of a task."""


def choose(method: str, features: Features, request: Request) -> list[Pick]:
    """Choose m distinct rows, best or first first.

    Raises:
        SettingsError: If the pool has fewer than m rows, or the method needs a task.
    """
    if request.m > features.n_pool:
        raise SettingsError(
            f"-m {request.m:,}: only {features.n_pool:,} rows are left in the pool; ask for fewer"
        )
    picks = METHODS[method](features, request)
    assert len({pick.index for pick in picks}) == request.m == len(picks)
    return picks


def need_task(task: Sequence[object] | Array, method: str) -> None:
    """Check that there are examples of a task for a method of `OF_TASK`.

    Raises:
        SettingsError: If there are none.
    """
    if len(task) == 0:
        raise SettingsError(
            f"--method {method} needs examples of the task: give them as --for, or use "
            "random, stratified, diverse or perplexity"
        )


def _near(method: str, pool: Array, task: Array, files: Sequence[int], m: int) -> list[Pick]:
    need_task(task, method)
    return [
        Pick(row, f"nearest to example {place + 1} of task file {number + 1}", score)
        for row, place, number, score in nearest_in_turn(pool, task, files, m)
    ]


def _covering(chosen: Sequence[tuple[int, float]]) -> list[Pick]:
    return [Pick(row, "adds most coverage", gain) for row, gain in chosen]
