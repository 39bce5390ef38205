"""Replay the model's own mistakes into its training context.

Paper: section 3.1, Eq. 1-2 (past); section 3.2, Eq. 4-5 (past and memory). Training code: not released.

    x0_hat = x_σ − σ·v_hat                what the model thought the clean latent was
    δ = x0_hat − x0 = −σ·(v_hat − v)      how it was wrong                       Eq. 1, 4   push()
    x̃ = x + γ·δ′,  δ′ ~ Uniform(E)        an imperfect frame for a later clip    Eq. 2, 5   perturb()

Why: at play time every past and memory frame is the model's own output; training on clean ones hides that.
The target stays clean, perturbed frames carry no loss, and nothing is injected when the model is used.

Whose residual: that of the current latents only. Past and memory enter at σ = 0, where x0_hat is the input
and δ nothing but what was injected, so Eq. 4's buffer over all three cannot be literal. One buffer serves
both: call perturb once with γ_h for the past and once with γ_m for the memory.

Not in the paper: γ, capacity, replacement, warm-up, how often, one δ per frame or per clip. Ours are in
ErrorConfig: one δ′ per latent frame, the coin and the amplitude once per sample.

The alternative, buckets=50, is the parent method (Stable Video Infinity): one shelf per noise level.
E then no longer follows the density of training σ, and perturb(..., sigma=σ) draws from one level alone.

Whether it helps is read off rollouts: the slope of their scores (theil_sen) and how long they keep to the
truth, S(t) = Π (1 − lost / still there), of which the area is the restricted mean (kaplan_meier); beside them
how sure one can be of a mean over worlds (bca, equivalent, holm).

Demo: python error_buffer.py      Tests: pytest tests/test_error_buffer.py
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class ErrorConfig:
    gamma: float = 1.0  # γ: scale of an injected error
    jitter: float = 0.2  # γ is multiplied by U(1 − jitter, 1 + jitter), once per sample
    probability: float = (
        0.5  # chance that a sample is perturbed at all; the others stay bit-identical
    )
    capacity: int = 500  # latent frames kept, per bucket if there are buckets
    warmup: int = 50  # pushes before the first injection: early errors are an untrained net's
    per_push: int = 16  # frames banked per step: an entry lives about capacity / per_push steps
    replacement: str = (
        "random"  # or "nearest": the L2-nearest old entry makes room, so rare ones stay
    )
    kind: str = "real"  # or "gaussian": noise of each entry's size, no structure: the control
    buckets: int = 0  # 0: one shelf for every σ (the paper); 50: shelves by noise level
    shift: float = 5.0  # buckets are even along the unshifted σ, like the sampler's steps
    dtype: str = "float16"  # storage on the CPU; "bfloat16" has range instead of precision

    def __post_init__(self):
        allowed = {
            "replacement": ("random", "nearest"),
            "kind": ("real", "gaussian"),
            "dtype": ("float16", "bfloat16", "float32"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"ErrorConfig.{name} must be one of {values}, got {getattr(self, name)!r}"
                )
        if (
            self.capacity < 1
            or self.per_push < 1
            or self.buckets < 0
            or not 0 <= self.probability <= 1
        ):
            raise ValueError(
                f"need capacity, per_push >= 1, buckets >= 0, 0 <= probability <= 1, got {self}"
            )


class ErrorBuffer:
    """State: the stored frames, how many each shelf holds, how many pushes there were."""

    def __init__(self, cfg: ErrorConfig = ErrorConfig()):
        self.cfg, self.pushes = cfg, 0
        self.shelves = max(1, cfg.buckets)
        self.counts = [0] * self.shelves
        self.entries: Tensor | None = (
            None  # (shelves·capacity, C, h, w), allocated by the first push
        )

    def __len__(self) -> int:
        return sum(self.counts)

    def shelf(self, sigma: float) -> int:
        """The bucket of a noise level: 0 holds the noisiest."""
        # σ = s·u / (1 + (s−1)·u)  ⇔  u = σ / (s − (s−1)·σ)
        u = sigma / (self.cfg.shift - (self.cfg.shift - 1) * sigma)
        return min(self.shelves - 1, max(0, int((1 - u) * self.shelves)))

    def push(
        self,
        delta: Tensor,  # (B, C, T, h, w) δ = x̂0 − x0 of the current latents
        sigma: Tensor,  # (B,) noise level at which δ was made
        generator: torch.Generator | None = None,  # on the CPU; None takes the global one
    ) -> None:
        if delta.ndim != 5 or sigma.shape != delta.shape[:1]:
            raise ValueError(
                "push needs delta (B, C, T, h, w) and sigma (B,), "
                f"got {tuple(delta.shape)} and {tuple(sigma.shape)}"
            )
        B, C, T, h, w = delta.shape
        self._check(C, h, w)
        picks = torch.randperm(B * T, generator=generator)[: self.cfg.per_push].to(delta.device)
        frames = (
            delta.detach()
            .transpose(1, 2)
            .flatten(0, 1)[picks]
            .to("cpu", getattr(torch, self.cfg.dtype))
        )
        if not frames.isfinite().all():
            raise ValueError(
                f"push got NaN or more than {self.cfg.dtype} can hold: the step diverged"
            )
        if self.entries is None:
            self.entries = torch.empty(
                self.shelves * self.cfg.capacity, C, h, w, dtype=frames.dtype
            )
        for frame, level in zip(frames, sigma[picks // T].tolist(), strict=True):
            self.entries[self._slot(frame, self.shelf(level), generator)] = frame
        self.pushes += 1

    def perturb(
        self,
        x: Tensor,  # (B, C, T, h, w) past or memory latents, clean
        gamma: float | None = None,  # γ_h or γ_m; None takes the config's
        generator: torch.Generator | None = None,  # on the CPU; None takes the global one
        sigma: float | None = None,  # with buckets: only errors made at this level
    ) -> Tensor:  # (B, C, T, h, w) x̃; x itself until the warm-up is over
        if x.ndim != 5:
            raise ValueError(f"perturb needs latents (B, C, T, h, w), got {tuple(x.shape)}")
        B, C, T, h, w = x.shape
        self._check(C, h, w)
        gamma = self.cfg.gamma if gamma is None else gamma
        slots = self._filled(None if sigma is None else self.shelf(sigma))
        if gamma == 0 or T == 0 or not len(slots) or self.pushes < self.cfg.warmup:
            return x
        hit = torch.rand(B, generator=generator) < self.cfg.probability
        scale = gamma * (1 + self.cfg.jitter * (2 * torch.rand(B, generator=generator) - 1))
        picks = slots[torch.randint(len(slots), (B, T), generator=generator)]
        delta = self.entries[picks].transpose(1, 2).to(x)  # (B, C, T, h, w)
        if self.cfg.kind == "gaussian":
            size = delta.std((1, 3, 4), keepdim=True)  # of every latent frame
            delta = size * torch.randn(delta.shape, generator=generator).to(x)
        # Eq. 2, 5  x̃ = x + γ·δ′
        x_tilde = x + scale.to(x).view(B, 1, 1, 1, 1) * delta
        return torch.where(hit.to(x.device).view(B, 1, 1, 1, 1), x_tilde, x)

    def state_dict(self) -> dict:
        """Plain tensors, numbers and strings: torch.load(weights_only=True) reads it back."""
        kept = None if self.entries is None else self.entries[self._filled()].clone()
        return {
            "cfg": asdict(self.cfg),
            "pushes": self.pushes,
            "counts": list(self.counts),
            "entries": kept,
        }

    def load_state_dict(self, state: dict) -> None:
        layout = [(self.cfg.capacity, self.cfg.buckets, self.cfg.dtype)]
        layout += [tuple(state["cfg"][name] for name in ("capacity", "buckets", "dtype"))]
        if layout[0] != layout[1]:
            raise ValueError(
                f"this error buffer has (capacity, buckets, dtype) = {layout[0]}, the saved one "
                f"{layout[1]}: pass the saved values, or start a new run with --fresh"
            )
        self.pushes, self.counts, self.entries = state["pushes"], list(state["counts"]), None
        if state["entries"] is not None:
            self.entries = torch.empty(
                self.shelves * self.cfg.capacity,
                *state["entries"].shape[1:],
                dtype=state["entries"].dtype,
            )
            self.entries[self._filled()] = state["entries"]

    def _filled(self, shelf: int | None = None) -> Tensor:  # (n,) slots that hold an entry
        shelves = range(self.shelves) if shelf is None else [shelf]
        start = [torch.arange(self.counts[s]) + s * self.cfg.capacity for s in shelves]
        return torch.cat(start)

    def _slot(self, frame: Tensor, shelf: int, generator: torch.Generator | None) -> int:
        """Where the next frame of this shelf goes: a free slot, else by the replacement rule."""
        first = shelf * self.cfg.capacity
        if self.counts[shelf] < self.cfg.capacity:
            self.counts[shelf] += 1
            return first + self.counts[shelf] - 1
        if self.cfg.replacement == "random":
            return first + int(torch.randint(self.cfg.capacity, (), generator=generator))
        stored = self.entries[first : first + self.cfg.capacity].flatten(1).float()
        return first + int(torch.cdist(frame.float().view(1, -1), stored).argmin())

    def _check(self, *frame: int) -> None:
        if self.entries is not None and tuple(self.entries.shape[1:]) != frame:
            held = tuple(self.entries.shape[1:])
            raise ValueError(
                f"got latent frames (C, h, w) = {frame}, the buffer holds {held}: "
                "one buffer serves one preset; start a new run with --fresh"
            )


# ---- how fast errors grow --------------------------------------------------------------------------------
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


# ---- how sure one can be: the unit is the world ----------------------------------------------------------


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


def number(x: float | None) -> str:
    return (
        "-"
        if x is None
        else "nan"
        if not math.isfinite(x)
        else f"{x:.0f}"
        if abs(x) >= 1000
        else f"{x:.4g}"
    )


def together(
    claims: Sequence[tuple[float, str, str]],
) -> list[str]:  # p, where it was measured, claim
    """Holm as a table: which claims hold when all of them are asked at once, at 5 %."""
    rows = sorted(claims)
    held = ["holds" if yes else "does not" for yes in holm([p for p, _, _ in rows])]
    return [
        "| command | primary claim | p | with all the others |",
        "|---|---|---|---|",
        *(
            f"| {where} | {claim} | {number(p)} | {said} |"
            for (p, where, claim), said in zip(rows, held, strict=True)
        ),
    ]


def arms(
    found: dict[tuple[str, str], dict[str, float]], against: str
) -> list[str]:  # (claim, arm) -> seed -> value
    """Arms trained several times as a table: every claim by seed, and the difference from the arm `against`, paired by seed."""
    table = [
        "| claim | arm | each seed | mean | difference [95 % over seeds] |",
        "|---|---|---|---|---|",
    ]
    for (name, arm), values in sorted(
        found.items(), key=lambda row: (row[0][0], row[0][1] != against, row[0][1])
    ):
        base = found.get((name, against), {})
        m, half = student([values[seed] - base[seed] for seed in values if seed in base])
        every = sorted(
            {seed for (other, _), seeds in found.items() if other == name for seed in seeds}
        )
        cells = [
            ", ".join(number(values.get(seed)) for seed in every),
            number(sum(values.values()) / len(values)),
        ]
        table.append(
            f"| {name} | {arm} | {' | '.join([*cells, '-' if arm == against else f'{m:+.3g} [{m - half:+.3g}, {m + half:+.3g}]'])} |"
        )
    return table


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


if __name__ == "__main__":
    g = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.95, 0.7, 0.4, 0.1])
    x0, v_error = (
        torch.randn(4, 16, 10, 8, 8, generator=g),
        torch.randn(4, 16, 10, 8, 8, generator=g),
    )
    delta = -sigma.view(-1, 1, 1, 1, 1) * v_error  # Eq. 1  δ = −σ·(v̂ − v)
    for name, cfg in {
        "one shelf": ErrorConfig(warmup=1, probability=1.0, per_push=40),
        "50 shelves": ErrorConfig(warmup=1, probability=1.0, per_push=40, buckets=50),
    }.items():
        buffer = ErrorBuffer(cfg)
        before = (buffer.perturb(x0) - x0).square().mean().sqrt()
        buffer.push(delta, sigma, g)
        after = (buffer.perturb(x0, generator=g) - x0).square().mean().sqrt()
        print(
            f"{name:10s}: rms of x̃ − x  empty {before:.3f}  ·  {len(buffer)} stored frames {after:.3f}"
            f"  (rms of δ {delta.square().mean().sqrt():.3f})"
        )
    for level in sigma.tolist():
        rms = (buffer.perturb(x0, generator=g, sigma=level) - x0).square().mean().sqrt()
        print(
            f"            errors of shelf {buffer.shelf(level):2d} (σ {level:.2f}) alone: rms {rms:.3f}"
        )
