"""How often the statistics of a study are right, by simulation.

    python tests/proof/verdicts.py --runs 1000 > verdicts.md

Scores of S seeds and I test rows are drawn from a model whose true effect is known: a row's
difficulty, which both arms share, a seed's luck, which is each arm's own, and noise. What is
counted: how often an interval holds what it speaks of, and how often a verdict is wrong.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from d2lora.evaluation import stats
from d2lora.evaluation.crossed import NOTHING_SEEN, pooled_difference, power
from d2lora.evaluation.stats import difference_p, holm, paired_difference

Array = NDArray[np.float64]
EFFECT = 0.3
"""Of the arm, on the latent scale, where there is one."""


@dataclass(frozen=True)
class World:
    """What scores are drawn from: normal latent values, and what makes scores of them."""

    name: str
    score: Callable[[Array], Array]
    row_sd: float = 1.0
    """Of the rows' difficulty."""
    seed_sd: float = 0.25
    """Of a seed's luck: as a difference of arms some 5 points."""
    noise_sd: float = 0.7

    def scores(self, rng: np.random.Generator, n_seeds: int, rows: Array, effect: float) -> Array:
        """Draw one arm's scores, shape (S, I); the last column is each seed's true mean."""
        luck = rng.normal(effect, self.seed_sd, (n_seeds, 1))
        drawn = self.score(rows + luck + rng.normal(0, self.noise_sd, (n_seeds, len(rows))))
        return np.hstack([drawn, self.mean(luck)])

    def mean(self, shift: Array) -> Array:
        """Return the mean score over all rows there could be, by Gauss-Hermite quadrature."""
        spread = np.hypot(self.row_sd, self.noise_sd)
        if self.name == "right or wrong":  # a step is beyond a quadrature
            return scipy_stats.norm.cdf((shift - 0.5) / spread)
        if self.name == "mostly ties":
            return scipy_stats.norm.cdf((shift - 1.5) / spread)
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        return (self.score(shift[..., None] + spread * nodes) * weights).sum(-1) / weights.sum()

    def true_effect(self, effect: float) -> float:
        """Return the mean difference over all rows and seeds there could be."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(40)
        own, other = (self.mean(shift + self.seed_sd * nodes) for shift in (effect, 0.0))
        return float(((own - other) * weights).sum() / weights.sum())


WORLDS = (
    World("right or wrong", lambda latent: (latent > 0.5).astype(float)),
    World("skewed", lambda latent: scipy_stats.norm.cdf(latent - 1) ** 2),
    World("mostly ties", lambda latent: (latent > 1.5).astype(float), noise_sd=0.15, seed_sd=0.1),
    World("seeds alike", scipy_stats.norm.cdf, seed_sd=0.0),
)
SHAPES = ((2, 60), (3, 20), (3, 200), (5, 20), (5, 100), (10, 100), (20, 100))


@dataclass
class Tally:
    """Counts of one world and shape."""

    rows_alone: int = 0
    """Intervals over test rows alone that hold the mean of all rows with these seeds."""
    rows_and_seeds: int = 0
    """Intervals over rows and seeds that hold the mean of all rows and seeds."""
    wrong: int = 0
    """Verdicts where there is no effect."""
    seen: int = 0
    """Verdicts in the right direction where there is one."""


def tally(world: World, n_seeds: int, n_rows: int, n_runs: int, seed: int = 0) -> Tally:
    """Simulate comparisons of two arms, without an effect and with one."""
    rng, found, truth = np.random.default_rng(seed), Tally(), world.true_effect(EFFECT)
    for run in range(n_runs):
        rows = rng.normal(0, world.row_sd, n_rows)
        for effect, whole in ((0.0, 0.0), (EFFECT, truth)):
            first = world.scores(rng, n_seeds, rows, 0.0)
            second = world.scores(rng, n_seeds, rows, effect)
            with_these = float((second - first)[:, -1].mean())
            one, other = first[:, :-1], second[:, :-1]
            difference = paired_difference(one, other, run)
            assert difference.over_seeds is not None
            low, high = difference.over_seeds
            told = difference.verdict if difference_p(one, other, run) < 0.05 else NOTHING_SEEN
            if effect:
                found.seen += told == "helps"
                found.rows_and_seeds += low <= whole <= high
                found.rows_alone += difference.low <= with_these <= difference.high
            else:
                found.wrong += told != NOTHING_SEEN
    return found


def study_errors(
    world: World, n_seeds: int, n_rows: int, n_tasks: int, n_sizes: int, n_runs: int
) -> tuple[float, float]:
    """Simulate studies without an effect.

    Returns:
        Shares of studies with any wrong verdict, and with a wrong one of the pooled effect.
    """
    rng, either, pooled = np.random.default_rng(1), 0, 0
    for run in range(n_runs):
        grid: list[list[tuple[Array, Array]]] = []
        for _ in range(n_tasks):
            rows = rng.normal(0, world.row_sd, n_rows)
            arms = (world.scores(rng, n_seeds, rows, 0.0)[:, :-1] for _ in range(2 * n_sizes))
            grid.append(list(zip(arms, arms, strict=True)))
        whole = pooled_difference([np.stack([b - a for a, b in task]) for task in grid])
        pairs = [pair for task in grid for pair in task]
        assert whole.p_value is not None
        p_values = holm([*(difference_p(*pair, run) for pair in pairs), whole.p_value])
        told = [*(paired_difference(*pair, run).verdict for pair in pairs), whole.verdict]
        wrong = [p < 0.05 and v != NOTHING_SEEN for p, v in zip(p_values, told, strict=True)]
        either += any(wrong)
        pooled += wrong[-1]
    return either / n_runs, pooled / n_runs


def power_reached(world: World, n_seeds: int, n_rows: int, n_runs: int) -> float:
    """Return how often the true effect is seen with as many seeds as `power` asks for.

    A pilot of `n_seeds` seeds asks; the study that follows has what it asked for.
    """
    rng, truth, seen, n = np.random.default_rng(2), world.true_effect(EFFECT), 0, 0
    for run in range(n_runs):
        rows = rng.normal(0, world.row_sd, n_rows)
        pilot = [world.scores(rng, n_seeds, rows, e)[:, :-1] for e in (0.0, EFFECT)]
        needed = power(*pilot, effect=truth)
        if needed is None or not np.isfinite(needed.n_seeds):
            continue
        n_asked = int(min(200, max(2, needed.n_seeds)))
        rows = rng.normal(0, world.row_sd, n_rows)
        one, other = (world.scores(rng, n_asked, rows, e)[:, :-1] for e in (0.0, EFFECT))
        n += 1
        seen += difference_p(one, other, run) < 0.05
    return seen / n if n else float("nan")


def tables(n_runs: int) -> Iterator[str]:
    """Yield the lines of the tables, in Markdown."""
    yield "| scores | seeds | test rows | interval over rows, these seeds | over rows and seeds | "
    yield "wrong verdicts | effect seen |\n|---|---|---|---|---|---|---|\n"
    for world in WORLDS:
        for n_seeds, n_rows in SHAPES:
            t = tally(world, n_seeds, n_rows, n_runs)
            shares = (t.rows_alone, t.rows_and_seeds, t.wrong, t.seen)
            cells = " | ".join(f"{100 * share / n_runs:.1f} %" for share in shares)
            yield f"| {world.name} | {n_seeds} | {n_rows} | {cells} |\n"
    yield "\n| scores | tasks | sizes | seeds | test rows | any wrong verdict | "
    yield "pooled one wrong |\n"
    yield "|---|---|---|---|---|---|---|\n"
    for world in WORLDS:
        for n_tasks, n_sizes, n_seeds, n_rows in ((1, 3, 3, 100), (2, 3, 5, 100), (4, 2, 5, 60)):
            single, pooled = study_errors(world, n_seeds, n_rows, n_tasks, n_sizes, n_runs)
            yield f"| {world.name} | {n_tasks} | {n_sizes} | {n_seeds} | {n_rows} | "
            yield f"{100 * single:.1f} % | {100 * pooled:.1f} % |\n"
    yield "\n| scores | seeds of the pilot | test rows | effect seen with the seeds it asks for |\n"
    yield "|---|---|---|---|\n"
    for world in WORLDS:
        for n_seeds, n_rows in ((3, 200), (5, 200), (10, 200)):
            share = power_reached(world, n_seeds, n_rows, n_runs)
            yield f"| {world.name} | {n_seeds} | {n_rows} | {100 * share:.0f} % |\n"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="simulations of each line")
    parser.add_argument("--resamples", type=int, default=1000, help="of bootstraps and sign flips")
    given = parser.parse_args()
    stats.N_RESAMPLES = given.resamples
    for line in tables(given.runs):
        sys.stdout.write(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
