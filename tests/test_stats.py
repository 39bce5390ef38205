"""What stats.py promises."""

import sys

import numpy as np
import pytest

from lab import stats

pytest.importorskip("scipy", reason="intervals need scipy; pip install scipy")


def test_theil_sen_ignores_an_outlier() -> None:
    y = [2.0 * x for x in range(20)]
    y[7] = 1000.0
    assert stats.theil_sen(range(20), y) == pytest.approx(2.0)


def test_lost_is_eight_frames_in_a_row() -> None:
    almost = [0.9] * 5 + [0.1] * 7 + [0.9]
    assert stats.time_to_lost(almost + [0.1] * 8, 0.7) == 13
    assert stats.time_to_lost([0.9] * 21, 0.7) == 21


def test_a_half_life_lies_between_two_points_or_at_the_end() -> None:
    assert stats.half_life([1, 2, 4], [8, 6, 2]) == 3
    assert stats.half_life([1, 2, 4], [8, 6, 5]) == 4


def test_what_is_lost_from_the_beginning_has_no_half_to_lose() -> None:
    assert stats.half_life([1, 2, 4], [-1, -2, -3]) == 1
    assert stats.half_life([1, 2, 4], [0, 0, 0]) == 1


def test_a_95_percent_interval_covers_the_mean_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(200):
        low, high = stats.bca(rng.normal(1.0, 2.0, 32), resamples=1000)
        covered.append(low <= 1.0 <= high)
    assert 0.89 <= np.mean(covered) <= 0.99


def test_an_interval_is_the_same_every_time() -> None:
    x = np.random.default_rng(2).normal(1.0, 2.0, 20)
    assert stats.bca(x) == stats.bca(x)


def test_students_interval_is_wide_for_few_trainings() -> None:
    mean, half = stats.student([0.1, 0.3, 0.5])
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(4.303 * 0.2 / 3**0.5, rel=1e-3)
    assert stats.student([1.0])[1] == float("inf")


def test_the_mean_says_yes_and_the_interval_does_not() -> None:
    assert stats.verdict([2.0, 3.0, 2.5, 3.5, 2.2], "> 0")[0] == "met"
    word, (low, high) = stats.verdict([-9.0, 9.0, 0.1, 3.0, -1.0], "> 0")
    assert word == "unclear"
    assert low < 0 < high


@pytest.mark.parametrize(
    "values, span, word",
    [
        ([1.0, 1.01, 0.99], "0.9-1.1", "met"),
        ([0.6, 1.4, 1.0], "0.9-1.1", "unclear"),
        ([2.0, 2.1, 2.2], "0.9-1.1", "missed"),
        ([0.1, -0.1, 0.0, 0.05], "-0.5-0.5", "met"),
        ([2.0, -2.0, 0.3], "-0.5-0.5", "unclear"),
    ],
)
def test_a_span_is_met_by_the_whole_interval(values: list, span: str, word: str) -> None:
    assert stats.verdict(values, span)[0] == word


def test_absence_of_a_difference_is_not_equality() -> None:
    rng = np.random.default_rng(0)
    assert stats.verdict(rng.normal(0, 0.5, 64), "-0.5-0.5")[0] == "met"
    assert stats.verdict(rng.normal(0, 5.0, 8), "-0.5-0.5")[0] != "met"


def test_one_value_has_no_interval() -> None:
    assert stats.verdict([1.0], "") == ("reported", None)
    assert stats.verdict([1.0], "<= 0.5") == ("missed", None)


def test_few_worlds_get_the_interval_of_student_and_equal_ones_none() -> None:
    word, (low, high) = stats.verdict([1.0, 2.0, 3.0, 4.0], "> 0")
    assert word == "met"
    assert (low + high) / 2 == 2.5
    assert high - low == pytest.approx(2 * 3.182 * 1.29099 / 2, abs=1e-3)
    assert stats.verdict([1.0] * 6, ">= 1") == ("met", None)


def test_a_missing_scipy_is_one_line_that_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match="pip install scipy"):
        stats.scipy_stats()
