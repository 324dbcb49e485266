"""The search for a learning rate and a length: pure, on curves made by hand."""

import math
from collections.abc import Callable

import pytest

from d2lora.data.sources import split_validation
from d2lora.study.tuning import BEYOND, DOUBLINGS, Candidate, Curve, SearchGrid, Tuned, mean_curve


def searched(grid: SearchGrid, curve_of: Callable[[float, int], Curve | None]) -> tuple[Tuned, int]:
    """Search to the end; return the choice, and how many candidates were tried."""
    tried: dict[Candidate, Curve | None] = {}
    while new := grid.wanted(tried):
        tried |= {c: curve_of(grid.learning_rate(c.place), 8 * 2**c.doublings) for c in new}
    chosen = Tuned.of(grid, tried)
    assert chosen is not None
    return chosen, len(tried)


def valley(rate: float, step: float) -> Callable[[float, int], Curve]:
    """Losses that are lowest at a learning rate and, of it, at a step."""
    return lambda r, end: tuple(
        (s, math.log(r / rate) ** 2 + math.log((s + 1) / (step + 1)) ** 2)
        for s in range(0, end + 1, end // 8)
    )


def test_a_best_learning_rate_and_step_inside_of_the_grid_need_nothing_more() -> None:
    grid = SearchGrid((0.001, 0.003, 0.01), chooses_length=True)
    chosen, n_tried = searched(grid, valley(0.003, 5))
    assert (chosen.learning_rate, chosen.step, n_tried) == (0.003, 5, 3)
    assert not chosen.at_edge
    assert not chosen.at_end


@pytest.mark.parametrize(
    ("best", "n_tried", "at_edge"), [(0.1, 5, True), (0.03, 5, False), (1e-4, 5, True)]
)
def test_a_best_learning_rate_at_an_edge_widens_the_grid_within_bounds(
    best: float, n_tried: int, at_edge: bool
) -> None:
    grid = SearchGrid((0.001, 0.003, 0.01), chooses_length=False)
    chosen, tried = searched(grid, valley(best, 8))
    assert chosen.learning_rate == pytest.approx(best, rel=0.2)
    assert (tried, chosen.at_edge) == (n_tried, at_edge)
    beyond, _ = searched(grid, valley(1e6, 8))
    assert beyond.learning_rate == grid.learning_rate(2 + BEYOND)
    assert beyond.at_edge


def test_a_best_step_at_the_end_doubles_the_length_and_looks_at_learning_rates_there() -> None:
    grid = SearchGrid((0.001, 0.003, 0.01), chooses_length=True)
    lengths: set[tuple[float, int]] = set()

    def curve(rate: float, end: int) -> Curve:
        lengths.add((rate, end))
        return valley(0.003 * 8 / end, 14)(rate, end)  # longer runs want lower learning rates

    chosen, _ = searched(grid, curve)
    assert (chosen.step, chosen.doublings, chosen.at_end) == (14, 1, False)
    assert (0.001, 16) in lengths
    endless, _ = searched(grid, valley(0.003, 1000))
    assert (endless.step, endless.doublings, endless.at_end) == (8 * 2**DOUBLINGS, DOUBLINGS, True)


def test_a_length_that_is_not_chosen_is_judged_by_its_end() -> None:
    overfits = ((0, 3.0), (4, 1.0), (8, 2.5))
    steady = ((0, 3.0), (4, 2.9), (8, 2.0))
    curves = {0.001: steady, 0.01: overfits}
    for chooses, rate, step in ((False, 0.001, None), (True, 0.01, 4)):
        grid = SearchGrid((0.001, 0.01), chooses_length=chooses)
        tried = {Candidate(i, 0): curves[grid.learning_rate(i)] for i in range(2)}
        chosen = Tuned.of(grid, tried)
        assert chosen is not None
        assert (chosen.learning_rate, chosen.step) == (rate, step)


def test_what_failed_is_not_chosen_and_where_all_failed_nothing_is() -> None:
    grid = SearchGrid((0.001, 0.01), chooses_length=True)
    diverged: Curve = ((0, 3.0), (4, math.nan))
    tried = {Candidate(0, 0): ((0, 3.0), (4, 2.5), (8, 2.6)), Candidate(1, 0): None}
    chosen = Tuned.of(grid, tried)
    assert chosen is not None
    assert chosen.learning_rate == 0.001
    assert Tuned.of(grid, {Candidate(0, 0): None, Candidate(1, 0): ()}) is None
    assert Tuned.of(SearchGrid((1.0,), chooses_length=False), {Candidate(0, 0): diverged}) is None


def test_a_step_is_the_same_share_of_a_schedule_of_another_length() -> None:
    curve = ((0, 3.0), (6, 1.0), (12, 2.0))
    assert Tuned(0.01, step=6, curve=curve).stop_of(12) == 6
    assert Tuned(0.01, step=6, curve=curve).stop_of(20) == 10
    assert Tuned(0.01, step=0, curve=curve).stop_of(20) == 0
    assert Tuned(0.01, step=12, curve=curve).stop_of(20) is None
    assert Tuned(0.01).stop_of(20) is None


def test_folds_validate_on_every_row_once_and_their_curves_have_a_mean() -> None:
    for n, k in ((8, 4), (10, 4), (7, 7)):
        parts = [split_validation(range(n), 0.25, (i, k)) for i in range(k)]
        assert sorted(row for _, valid in parts for row in valid) == list(range(n))
        assert all(sorted(train + valid) == list(range(n)) for train, valid in parts)
    assert mean_curve([((0, 1.0), (2, 3.0)), (), ((0, 2.0), (2, 5.0))]) == ((0, 1.5), (2, 4.0))
