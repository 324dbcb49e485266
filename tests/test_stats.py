"""Intervals with known answers, and honest ones where there is little to know."""

import runpy
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats as reference

from d2lora.evaluation.crossed import crossed_spread, pooled_difference, power
from d2lora.evaluation.stats import (
    difference_p,
    holm,
    mean_interval,
    paired_difference,
    permutation_p,
)
from d2lora.report.curves import mean_of, size_that_scores, steps_to_reach
from support import REPOSITORY

Pair = tuple[np.ndarray, np.ndarray]
Maker = Callable[[np.random.Generator, int, int, float], Pair]


def test_right_or_wrong_scores_take_wilson_s_interval() -> None:
    scores = np.array([1.0] * 7 + [0.0] * 13)
    interval = mean_interval(scores)
    z = reference.norm.ppf(0.975)
    centre = (0.35 + z**2 / 40) / (1 + z**2 / 20)
    half = z / (1 + z**2 / 20) * np.sqrt(0.35 * 0.65 / 20 + z**2 / 1600)
    assert (interval.low, interval.high) == pytest.approx((centre - half, centre + half))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_right_or_all_wrong_is_not_certainty(value: float) -> None:
    interval = mean_interval(np.full(50, value))
    assert interval.mean == value
    assert interval.high - interval.low > 0.05


def test_the_bootstrap_agrees_with_the_normal_interval_on_many_items() -> None:
    scores = np.random.default_rng(0).beta(2, 5, 2000)
    interval = mean_interval(scores)
    half = 1.96 * scores.std(ddof=1) / np.sqrt(len(scores))
    assert interval.low == pytest.approx(scores.mean() - half, abs=half / 15)
    assert interval.high == pytest.approx(scores.mean() + half, abs=half / 15)


def test_a_paired_difference_resamples_items_with_their_seeds_together() -> None:
    generator = np.random.default_rng(1)
    by_item = generator.normal(0.1, 0.3, 400)
    first = generator.random((3, 400))
    difference = paired_difference(first, first + by_item)
    assert difference.mean == pytest.approx(by_item.mean())
    half = 1.96 * by_item.std(ddof=1) / 20
    assert difference.high - difference.low == pytest.approx(2 * half, rel=0.1)
    assert difference.seed_sd == pytest.approx(0, abs=1e-12)
    assert difference.verdict == "helps"


def test_the_spread_over_seeds_is_kept_apart() -> None:
    first = np.zeros((2, 100))
    second = np.stack([np.full(100, 0.2), np.full(100, 0.4)])
    difference = paired_difference(first, second)
    assert difference.seed_sd == pytest.approx(np.sqrt(0.02))
    assert paired_difference(first[:1], second[:1]).seed_sd is None


def test_equal_arms_show_no_difference_without_claiming_certainty() -> None:
    scores = np.ones((3, 60))
    difference = paired_difference(scores, scores)
    assert (difference.mean, difference.verdict) == (0, "no difference seen")
    assert difference.high == pytest.approx(3 / 60)


def test_a_difference_that_all_rows_share_has_an_interval_that_scores_can_have() -> None:
    better = paired_difference(np.zeros((1, 4)), np.ones((1, 4)))
    assert (better.low, better.mean, better.high) == (-0.5, 1, 1)  # 3 of 4 may go as far as -1
    worse = paired_difference(np.ones((1, 60)), np.zeros((1, 60)))
    assert (worse.low, worse.mean, worse.high) == (-1, -1, pytest.approx(-0.9))
    of_losses = paired_difference(np.array([[5.0]]), np.array([[8.0]]))
    assert (of_losses.low, of_losses.high) == (-3, 3)


def test_intervals_over_few_seeds_stay_where_scores_from_0_to_1_can_differ() -> None:
    first, second = np.zeros((2, 4)), np.array([[1, 1, 1, 1], [0, 0, 0, 1.0]])
    assert paired_difference(first, second).over_seeds == (-1, 1)
    low, high = paired_difference(10 * first, 10 * second).over_seeds or (0, 0)
    assert low < -10 < 10 < high  # of another scale
    table = (second - first)[None]
    assert pooled_difference([table, table], from_0_to_1=True).interval == (-1, 1)
    assert (pooled_difference([table, table]).interval or (0, 0))[1] > 1
    assert pooled_difference([np.ones((2, 2, 4))]).interval == (-0.5, 1)


def test_shapes_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected two equal shapes"):
        paired_difference(np.zeros((2, 3)), np.zeros((2, 4)))


def test_the_permutation_test_agrees_with_all_sign_flips() -> None:
    by_item = np.array([0.3, 0.1, -0.2, 0.4, 0.5, 0.2, 0.1, -0.1])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T
    exact = np.mean(np.abs(signs @ by_item) >= by_item.sum() - 1e-12)
    first = np.zeros((2, 8))
    assert permutation_p(first, first + by_item) == pytest.approx(exact, abs=0.01)


def test_seeds_are_counted_above_equal_and_below() -> None:
    first = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0.1, 0.2]], dtype=float)
    second = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0.2, 0.1, 0]], dtype=float)
    d = paired_difference(first, second)
    assert (d.n_above, d.n_equal, d.n_below) == (1, 2, 1)


def test_arms_that_never_differ_have_p_value_1_and_no_p_value_is_0() -> None:
    same = np.ones((3, 40))
    assert permutation_p(same, same) == 1
    assert 0 < permutation_p(np.zeros((1, 200)), np.ones((1, 200))) < 0.001


def test_holm_adjusts_as_in_the_textbook() -> None:
    # statsmodels.stats.multitest.multipletests([...], method="holm") gives the same.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def answers(generator: np.random.Generator, n_seeds: int, n_items: int, gain: float) -> Pair:
    """Two arms that answer items of their own difficulty, the second better by `gain`."""
    chance = generator.uniform(0.2, 0.7, n_items)
    first, second = (generator.random((n_seeds, n_items)) < chance + g for g in (0.0, gain))
    return first.astype(float), second.astype(float)


def rouge_like(generator: np.random.Generator, n_seeds: int, n_items: int, gain: float) -> Pair:
    """Two arms with scores of titles: many in the middle, some right to the word."""
    mean = generator.beta(2, 2, n_items)
    noise = generator.normal(0, 0.15, (2, n_seeds, n_items))
    own = generator.normal(gain, 0.1, n_items)
    scores = np.clip(np.stack([mean + noise[0], mean + own + noise[1]]), 0, 1)
    return scores[0], scores[1]


def test_the_items_that_power_asks_for_show_the_difference_four_times_out_of_five() -> None:
    generator = np.random.default_rng(3)
    needed = power(*answers(generator, 3, 4000, 0.1), effect=0.1)
    assert needed is not None
    n_items = int(needed.n_items)
    seen = [
        crossed_spread(second - first).p_value(float((second - first).mean())) < 0.05
        for first, second in (answers(generator, 3, n_items, 0.1) for _ in range(200))
    ]
    assert 0.7 <= np.mean(seen) <= 0.95


def test_power_says_where_no_number_of_seeds_is_enough_and_where_nothing_varies() -> None:
    generator = np.random.default_rng(4)
    lasting = generator.choice([-1.0, 1.0], 100)
    zeros = np.zeros((2, 100))
    stuck = power(zeros, zeros + lasting)
    assert stuck is not None
    assert stuck.n_seeds == np.inf
    assert stuck.n_items == pytest.approx((2.8016 / 0.01) ** 2 * lasting.var(ddof=1), rel=1e-3)
    assert power(zeros, zeros) is None


def test_a_curve_reaches_a_loss_between_two_points() -> None:
    curve = [(0.0, 4.0), (10.0, 2.0), (20.0, 1.0)]
    assert steps_to_reach(curve, 3.0) == 5
    assert steps_to_reach(curve, 1.5) == 15
    assert steps_to_reach(curve, 4.5) == 0
    assert steps_to_reach(curve, 0.5) is None


def test_the_size_that_scores_as_much_is_found_on_a_logarithmic_scale() -> None:
    sizes, scores = [16, 64, 256], [0.2, 0.4, 0.3]
    assert size_that_scores(sizes, scores, 0.3) == pytest.approx(32)
    assert size_that_scores(sizes, scores, 0.1) == 16
    assert size_that_scores(sizes, scores, 0.5) is None


@pytest.mark.slow
@pytest.mark.parametrize("make", [answers, rouge_like])
def test_95_percent_intervals_cover_93_to_97_percent_of_the_time(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2lora.evaluation.stats.N_RESAMPLES", 1000)
    generator = np.random.default_rng(5)
    first, second = make(generator, 3, 400_000, 0.03)
    truth = float((second - first).mean())
    covered = []
    for trial in range(1500):
        d = paired_difference(*make(generator, 3, 200, 0.03), seed=trial)
        covered.append(d.low <= truth <= d.high)
    assert 0.93 <= np.mean(covered) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("make", [answers, rouge_like])
def test_a_difference_is_claimed_in_at_most_5_percent_of_null_studies(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2lora.evaluation.stats.N_RESAMPLES", 1000)
    generator = np.random.default_rng(6)
    claimed = 0
    for _ in range(400):  # a study of three sizes each, in which both arms are the same
        pairs = [make(generator, 3, 150, 0.0) for _ in range(3)]
        p_values = holm([difference_p(*pair) for pair in pairs])
        intervals = [paired_difference(*pair) for pair in pairs]
        claimed += any(
            p < 0.05 and d.verdict != "no difference seen"
            for p, d in zip(p_values, intervals, strict=True)
        )
    assert claimed / 400 <= 0.05 + 1.645 * np.sqrt(0.05 * 0.95 / 400)


def with_seeds(generator: np.random.Generator, n_seeds: int, seed_sd: float) -> Pair:
    """Two arms of which each seed shifts the second one's chance to be right, by 0 in the mean."""
    chance = generator.uniform(0.3, 0.7, 150)
    shift = generator.normal(0, seed_sd, (n_seeds, 1)).clip(-0.3, 0.3)
    first, second = (generator.random((n_seeds, 150)) < chance + s for s in (0.0, shift))
    return first.astype(float), second.astype(float)


@pytest.mark.slow
@pytest.mark.parametrize("n_seeds", [3, 5, 20])
@pytest.mark.parametrize("seed_sd", [0.0, 0.03, 0.1])
def test_intervals_over_seeds_cover_the_truth_where_seeds_differ(
    n_seeds: int, seed_sd: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2lora.evaluation.stats.N_RESAMPLES", 500)
    generator = np.random.default_rng(8)
    covered = 0
    for trial in range(500):
        d = paired_difference(*with_seeds(generator, n_seeds, seed_sd), seed=trial)
        assert d.over_seeds is not None
        covered += d.over_seeds[0] <= 0 <= d.over_seeds[1]
    assert 0.92 <= covered / 500 <= 1.0


def test_nulls_whose_seeds_differ_are_seldom_decided_where_items_alone_would_decide_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("d2lora.evaluation.stats.N_RESAMPLES", 500)
    generator = np.random.default_rng(9)
    found = [paired_difference(*with_seeds(generator, 5, 0.1), seed=trial) for trial in range(200)]
    assert np.mean([d.low <= 0 <= d.high for d in found]) < 0.8
    assert np.mean([d.verdict != "no difference seen" for d in found]) <= 0.07


def test_a_p_value_over_items_and_seeds_is_student_s_where_items_answer_alike() -> None:
    first = np.zeros((4, 30))
    second = np.repeat([[0.1], [0.2], [0.3], [0.4]], 30, axis=1)
    exact = reference.ttest_1samp([0.1, 0.2, 0.3, 0.4], 0).pvalue
    assert difference_p(first, second) == pytest.approx(exact)
    assert permutation_p(first, second) < exact, "items alone would claim too much"


def test_a_pooled_effect_of_means_is_student_s_interval_over_the_seeds_means() -> None:
    differences = np.random.default_rng(10).normal(0.02, 0.05, (3, 8, 1))
    pooled = pooled_difference([differences[:2], differences[2:]])
    exact = reference.ttest_1samp(differences[:, :, 0].mean(axis=0), 0)
    assert pooled.mean == pytest.approx(differences.mean())
    assert pooled.interval == pytest.approx(tuple(exact.confidence_interval()))
    assert pooled.p_value == pytest.approx(exact.pvalue)
    assert (pooled.n_cells, pooled.n_seeds) == (3, 8)
    one = pooled_difference([differences[:, :1]])
    assert (one.interval, one.p_value, one.verdict) == (None, None, "no verdict from one seed")


def test_the_pooled_effect_of_twenty_seeds_is_what_the_results_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of docs/results.md, from the cells that lie beside it."""
    cells = REPOSITORY / "benchmarks" / "studies" / "seeds.csv"
    monkeypatch.setattr("sys.argv", ["over_seeds.py", str(cells)])
    runpy.run_path(str(REPOSITORY / "scripts" / "over_seeds.py"), run_name="__main__")
    printed = capsys.readouterr().out
    row = "| pooled | 3 cells | warm | +2.2 | +0.8 to +3.5, p = 0.0028 | stands |"
    assert row in printed
    assert "2 of 3 stand" in printed
    page = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    assert "+2.2 points (+0.8 to +3.5, p = 0.003;" in page


def test_a_pooled_interval_covers_the_truth_where_sizes_share_seeds_and_items() -> None:
    generator = np.random.default_rng(11)
    covered = 0
    for _ in range(600):
        seeds, items = generator.normal(0, 0.05, (1, 6, 1)), generator.normal(0, 0.3, (1, 1, 60))
        tasks = [seeds + items + generator.normal(0, 0.2, (3, 6, 60)) for _ in range(1)]
        tasks.append(seeds + generator.normal(0, 0.3, (1, 1, 40)) + np.zeros((2, 6, 40)))
        interval = pooled_difference(tasks).interval
        assert interval is not None
        covered += interval[0] <= 0 <= interval[1]
    assert 0.92 <= covered / 600 <= 0.99


def test_curves_of_other_lengths_have_a_mean_as_far_as_the_shortest_goes() -> None:
    curves = [[(0.0, 4.0), (4.0, 2.0)], [(0.0, 2.0), (2.0, 1.0), (8.0, 4.0)]]
    assert mean_of(curves) == [(0.0, 3.0), (2.0, 2.0), (4.0, 2.0)]


def test_the_interval_over_seeds_is_student_s_where_items_answer_alike() -> None:
    first = np.zeros((4, 30))
    second = np.repeat([[0.1], [0.2], [0.3], [0.4]], 30, axis=1)
    d = paired_difference(first, second)
    # scipy.stats.ttest_1samp([0.1, 0.2, 0.3, 0.4], 0).confidence_interval() gives the same.
    assert d.over_seeds == pytest.approx((0.0445739, 0.4554261), abs=1e-6)


def test_one_seed_tells_nothing_of_other_seeds() -> None:
    d = paired_difference(np.zeros((1, 30)), np.ones((1, 30)))
    assert d.over_seeds is None
    assert d.verdict == "no verdict from one seed"


def test_95_percent_intervals_cover_the_truth_about_as_often() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        # Two arms of equal quality, right or wrong on the same items, three seeds.
        difficulty = generator.random(150)
        first, second = (generator.random((3, 150)) < difficulty for _ in range(2))
        d = paired_difference(first.astype(float), second.astype(float), seed=trial)
        covered += d.low <= 0 <= d.high
    assert 0.91 <= covered / 200 <= 0.99
