"""How sure one can be: the unit is the world."""

import math
import re
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

# What the buffer is for, in numbers: the slope of a rollout's scores, and how long it keeps to the truth.


def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:
    """The median of all pairwise slopes: an outlier moves nothing."""
    x, y = (torch.as_tensor(list(v), dtype=torch.float64) for v in (x, y))
    i, j = torch.triu_indices(len(x), len(x), 1)
    return float(((y[j] - y[i]) / (x[j] - x[i])).quantile(0.5))


def time_to_lost(score: Sequence[float], tau: float, run: int = 8) -> int:
    """The first of `run` frames in a row whose score lies under tau; the length where there are none."""
    low = (torch.as_tensor(score) < tau).tolist()
    return next((t for t in range(len(low) - run + 1) if all(low[t : t + run])), len(low))


def half_life(at: Sequence[float], value: Sequence[float]) -> float:
    """Where a falling curve reaches half of its first value, between two points in a straight line; its end where it never does."""
    half = value[0] / 2
    for (a, x), (b, y) in zip(pairs := list(zip(at, value, strict=True)), pairs[1:], strict=False):
        if y <= half:
            return float(a + (b - a) * (x - half) / (x - y))
    return float(at[-1])


def kaplan_meier(times: Sequence[float], lost: Sequence[bool]) -> list[tuple[float, float]]:
    """(t, share that keeps longer than t) at every time of a loss. Who was still there when watching ended
    (lost false) counts as long as it was watched, and as a loss never."""
    share, curve = 1.0, []
    for t in sorted({t for t, gone in zip(times, lost, strict=True) if gone}):
        there = sum(other >= t for other in times)
        gone = sum(other == t and bool(end) for other, end in zip(times, lost, strict=True))
        # S(t) = Π (1 − lost now / still there)
        share *= 1 - gone / there
        curve.append((t, share))
    return curve


def restricted_mean(times: Sequence[float], lost: Sequence[bool], horizon: float) -> float:
    """Mean time until lost within the horizon: ∫ S dt, the area under that curve."""
    steps = [(0.0, 1.0), *((t, s) for t, s in kaplan_meier(times, lost) if t < horizon)]
    ends = [t for t, _ in steps[1:]] + [horizon]
    return sum(s * (end - t) for (t, s), end in zip(steps, ends, strict=True))


def bootstrap(
    x: Sequence[float], resamples: int = 10_000
) -> tuple[Tensor, Tensor]:  # values, means of resamples
    x = torch.tensor([v for v in map(float, x) if math.isfinite(v)], dtype=torch.float64)
    picks = torch.randint(
        max(1, len(x)), (resamples, len(x)), generator=torch.Generator().manual_seed(0)
    )
    return x, x[picks].mean(1)


def bca(x: Sequence[float], level: float = 0.95, resamples: int = 10_000) -> tuple[float, float]:
    """Bootstrap interval of the mean, corrected for bias and acceleration."""
    x, means = bootstrap(x, resamples)
    if len(x) < 2 or x.min() == x.max():
        return (float(x[0]), float(x[0])) if len(x) and x.min() == x.max() else (math.nan, math.nan)
    normal, d = NormalDist(), (x - x.mean()) / (len(x) - 1)  # mean of the jackknives − each of them
    below = float((means < x.mean()).double().mean())
    bias = normal.inv_cdf(min(max(below, 1 / resamples), 1 - 1 / resamples))
    acceleration = float((d**3).sum() / (6 * (d**2).sum() ** 1.5))
    ends = (bias + normal.inv_cdf(q) for q in ((1 - level) / 2, (1 + level) / 2))
    return tuple(float(means.quantile(normal.cdf(bias + z / (1 - acceleration * z)))) for z in ends)


def equivalent(difference: Sequence[float], margin: float) -> bool:
    """Two one-sided tests at 5 %: the 90 % interval lies inside ± margin. Absence of a difference is no equivalence."""
    low, high = bca(difference, 0.90)
    return -margin < low and high < margin


def p_value(x: Sequence[float], low: float = -math.inf, high: float = math.inf) -> float:
    """That the mean lies outside (low, high) after all: the larger share of resampled means beyond either end."""
    _, means = bootstrap(x)
    return (1 + max(int((means <= low).sum()), int((means >= high).sum()))) / (1 + len(means))


def holm(p: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of m claims hold together: the i-th smallest p below level / (m − i + 1), up to the first that is not."""
    order, held = sorted(range(len(p)), key=lambda k: p[k]), [False] * len(p)
    for i, k in enumerate(order):
        if p[k] > level / (len(p) - i):
            break
        held[k] = True
    return held


STUDENT = (
    0,
    math.inf,
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.16,
    2.145,
)  # t at 95 %, by how many


def student(d: Sequence[float]) -> tuple[float, float]:
    """Mean and half its 95 % interval: a method is known by its few trainings, and not by the worlds one of them saw."""
    x = torch.tensor(list(d), dtype=torch.float64)
    half = STUDENT[min(len(x), 15)] * float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.inf
    return float(x.mean()), half


def verdict(
    x: Sequence[float], predicted: str
) -> tuple[str, float | None, tuple[float, float] | None]:
    """What became of a prediction (">= 6", "<= 2", "> 0", "0.9-1.1", "" for none): met, missed, reported, or unclear where
    the mean says yes and its interval does not; its p-value; the interval: Student's under 16 worlds, where a bootstrap is too
    narrow, and none for equal values, which say nothing of the next. A span around zero is met by equivalence alone."""
    mean, interval, met, ends = sum(x) / len(x), None, None, ()
    if len(x) > 2 and min(x) < max(x):
        _, half = student(x)
        interval = bca(x) if len(x) > 15 else (mean - half, mean + half)
    if bound := re.fullmatch(r"(>=|<=|>) (-?[\d.]+)", predicted):
        limit, holds = (
            float(bound[2]),
            {">=": float.__ge__, "<=": float.__le__, ">": float.__gt__}[bound[1]],
        )
        met, ends = (
            holds(float(mean), limit),
            (-math.inf, limit) if bound[1] == "<=" else (limit, math.inf),
        )
        met = (
            "unclear"
            if met and interval and not all(holds(float(end), limit) for end in interval)
            else met
        )
    elif span := re.fullmatch(r"(-?[\d.]+)-([\d.]+)", predicted):
        ends = float(span[1]), float(span[2])
        low, high = interval or (mean, mean)
        sure = (
            equivalent(x, ends[1])
            if len(x) > 15 and ends[0] == -ends[1]
            else ends[0] <= low and high <= ends[1]
        )
        met = ends[0] <= mean <= ends[1] and (sure or "unclear")
    said = {None: "reported", True: "met", False: "missed"}.get(met, met)
    return said, p_value(x, *ends) if ends and interval else None, interval
