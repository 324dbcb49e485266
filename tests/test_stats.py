"""Intervals with known answers, and honest ones where there is little to know."""

import numpy as np
import pytest
from scipy import stats as reference

from d2lora.stats import mean_interval, paired_difference


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


def test_the_spread_over_seeds_is_told_apart() -> None:
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


def test_shapes_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected two equal shapes"):
        paired_difference(np.zeros((2, 3)), np.zeros((2, 4)))


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
