"""What stats.py promises."""

import numpy as np
import pytest

from lab import stats


def test_theil_sen_ignores_an_outlier() -> None:
    y = [2.0 * x for x in range(20)]
    y[7] = 1000.0
    assert stats.theil_sen(range(20), y) == pytest.approx(2.0)


def test_lost_is_eight_frames_in_a_row() -> None:
    assert stats.time_to_lost([0.9] * 5 + [0.1] * 7 + [0.9] + [0.1] * 8, 0.7) == 13
    assert stats.time_to_lost([0.9] * 21, 0.7) == 21
    assert stats.half_life([1, 2, 4], [8, 6, 2]) == 3 and stats.half_life([1, 2, 4], [8, 6, 5]) == 4


def test_kaplan_meier_counts_who_was_watched_and_not_lost():
    times, lost = (
        [2, 3, 3, 5, 8],
        [True, True, False, True, False],
    )  # at 3 one is lost while another is no longer watched
    curve = stats.kaplan_meier(times, lost)
    assert [t for t, _ in curve] == [2, 3, 5]
    assert [s for _, s in curve] == pytest.approx([4 / 5, 4 / 5 * 3 / 4, 4 / 5 * 3 / 4 * 1 / 2])
    assert stats.restricted_mean(times, lost, 8) == pytest.approx(2 + 0.8 + 2 * 0.6 + 3 * 0.3)


def test_without_censoring_the_restricted_mean_is_the_mean_and_without_losses_the_horizon():
    assert stats.restricted_mean([2, 4, 9], [True] * 3, 20) == pytest.approx(5)
    assert stats.restricted_mean([2, 4, 90], [True] * 3, 9) == pytest.approx(5)
    assert stats.restricted_mean([640, 640], [False] * 2, 640) == 640


def test_a_95_percent_interval_covers_the_mean_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    spans = [stats.bca(rng.normal(1.0, 2.0, 32), resamples=1000) for _ in range(200)]
    assert 0.89 <= np.mean([low <= 1.0 <= high for low, high in spans]) <= 0.99


def test_absence_of_a_difference_is_no_equivalence() -> None:
    rng = np.random.default_rng(0)
    assert stats.equivalent(rng.normal(0, 0.5, 64), 0.5)
    assert not stats.equivalent(
        rng.normal(0, 5.0, 8), 0.5
    )  # not different, but not shown to be equal either


def test_holm_stops_at_the_first_that_fails():
    assert stats.holm([0.01, 0.04, 0.001]) == [True, True, True]  # below .05/2, .05/1, .05/3
    assert stats.holm([0.03, 0.04, 0.001]) == [
        False,
        False,
        True,
    ]  # .03 fails .05/2, so .04 is not asked
    assert stats.holm([]) == []


def test_a_p_value_is_small_only_when_the_mean_lies_inside():
    x = np.random.default_rng(0).normal(1.0, 1.0, 32)
    p, mean = stats.p_value, float(x.mean())
    assert p(x, low=0) < 0.001 and p(x, low=2.0) > 0.99 and 0.2 < p(x, low=mean) < 0.8
    assert (
        p(x, -0.5, mean + 0.05) > 0.05 > p(x, 0.0, 2.0)
    )  # two one-sided tests: both ends must be far


def test_students_interval_is_wide_for_few_trainings():
    mean, half = stats.student([0.1, 0.3, 0.5])
    assert mean == pytest.approx(0.3) and half == pytest.approx(4.303 * 0.2 / 3**0.5)
    assert stats.student([1.0])[1] == float("inf")


def test_a_verdict_comes_with_its_p_value():
    assert (
        stats.verdict([2.0, 3.0, 2.5, 3.5, 2.2], "> 0")[0] == "met"
        and stats.verdict([2.0, 3.0, 2.5], "> 0")[1] < 0.01
    )
    said, p, (low, high) = stats.verdict([-9.0, 9.0, 0.1, 3.0, -1.0], "> 0")
    assert said == "unclear" and p > 0.2 and low < 0 < high
    for x, span, said in (
        ([1.0, 1.01, 0.99], "0.9-1.1", "met"),
        ([0.6, 1.4, 1.0], "0.9-1.1", "unclear"),
        ([2.0, 2.1, 2.2], "0.9-1.1", "missed"),
        ([0.1, -0.1, 0.0, 0.05], "-0.5-0.5", "met"),
        ([2.0, -2.0, 0.3], "-0.5-0.5", "unclear"),
    ):
        assert stats.verdict(x, span)[0] == said
    assert stats.verdict([1.0], "") == ("reported", None, None) and stats.verdict(
        [1.0], "<= 0.5"
    ) == ("missed", None, None)


def test_few_worlds_get_the_interval_of_student_and_equal_ones_none() -> None:
    x = [1.0, 2.0, 3.0, 4.0]
    said, _, (low, high) = stats.verdict(x, "> 0")
    assert (
        said == "met"
        and (low + high) / 2 == 2.5
        and high - low == pytest.approx(2 * 3.182 * 1.29099 / 2, abs=1e-3)
    )
    assert stats.verdict([1.0] * 6, ">= 1") == ("met", None, None)
