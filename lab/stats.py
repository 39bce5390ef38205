"""How sure one can be: the unit is the world.

A model is measured on some worlds and judged for all of them, so every interval is over worlds:
95 %, by bootstrap with the corrections for bias and acceleration (BCa), or Student's where there are
fewer than 16 of them and a bootstrap is too narrow. scipy has the statistics; what it lacks stands
below.
"""

import math
import re
from collections.abc import Sequence
from types import ModuleType

import numpy as np

FEW = 16  # under so many values a bootstrap interval is too narrow
BOUND = re.compile(r"(>=|<=|>) (-?[\d.]+)")  # a prediction such as ">= 6"
SPAN = re.compile(r"(-?[\d.]+)-([\d.]+)")  # or "0.9-1.1"
HOLDS = {">=": float.__ge__, "<=": float.__le__, ">": float.__gt__}

Interval = tuple[float, float]


def scipy_stats() -> ModuleType:
    """Only evaluation needs scipy, and only here is it imported."""
    try:
        import scipy.stats
    except ModuleNotFoundError as error:
        raise ValueError("intervals need scipy; type: pip install scipy") from error
    return scipy.stats


# ---- intervals ----------------------------------------------------------------------------


def bca(x: Sequence[float], resamples: int = 10_000) -> Interval:
    """95 % interval of the mean by bootstrap, the same one every time."""
    found = scipy_stats().bootstrap(
        (np.asarray(x, dtype=float),),
        np.mean,
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    low, high = found.confidence_interval
    return float(low), float(high)


def student(x: Sequence[float]) -> tuple[float, float]:
    """Mean and half its 95 % interval, of few worlds or of the few trainings of a method."""
    n = len(x)
    mean = float(np.mean(x))
    if n < 2:
        return mean, math.inf
    error = float(np.std(x, ddof=1)) / math.sqrt(n)
    return mean, float(scipy_stats().t.ppf(0.975, n - 1)) * error


def interval(x: Sequence[float]) -> Interval | None:
    """None for equal values, which say nothing of the next, and for one or two."""
    if len(x) < 3 or min(x) == max(x):
        return None
    if len(x) >= FEW:
        return bca(x)
    mean, half = student(x)
    return mean - half, mean + half


def verdict(x: Sequence[float], predicted: str) -> tuple[str, Interval | None]:
    """What became of a prediction (">= 6", "<= 2", "> 0", "0.9-1.1", "" for none), and the interval:
    met, missed, reported, or unclear where the mean says yes and its interval does not."""
    mean = sum(x) / len(x)
    found = interval(x)
    low, high = found or (mean, mean)
    if bound := BOUND.fullmatch(predicted):
        holds = HOLDS[bound[1]]
        limit = float(bound[2])
        met = holds(mean, limit)
        sure = holds(low, limit) and holds(high, limit)
    elif span := SPAN.fullmatch(predicted):
        first = float(span[1])
        last = float(span[2])
        met = first <= mean <= last
        sure = first <= low and high <= last
    else:
        return "reported", found
    if not met:
        return "missed", found
    return "met" if sure else "unclear", found


# ---- what a rollout's scores say ----------------------------------------------------------


def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:
    """The median of all pairwise slopes: an outlier moves nothing."""
    return float(scipy_stats().theilslopes(y, x).slope)


def time_to_lost(score: Sequence[float], tau: float, run: int = 8) -> int:
    """The first of `run` frames in a row that score under tau; the length where there are none."""
    low = [float(s) < tau for s in score]
    starts = (t for t in range(len(low) - run + 1) if all(low[t : t + run]))
    return next(starts, len(low))


def half_life(at: Sequence[float], value: Sequence[float]) -> float:
    """Where a falling curve reaches half of its first value, between two points in a straight line;
    its end where it never does, and its beginning where there is nothing that could be halved."""
    if value[0] <= 0:
        return float(at[0])
    half = value[0] / 2
    for k in range(1, len(at)):
        if value[k] <= half:
            share = (value[k - 1] - half) / (value[k - 1] - value[k])
            return float(at[k - 1] + share * (at[k] - at[k - 1]))
    return float(at[-1])
