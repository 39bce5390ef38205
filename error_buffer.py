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
    probability: float = 0.5  # that a sample is perturbed at all; the others stay bit-identical
    capacity: int = 500  # latent frames kept
    warmup: int = 50  # pushes before the first injection: early errors are an untrained net's
    per_push: int = 16  # frames banked per step: an entry lives about capacity / per_push steps
    kind: str = "real"  # or "gaussian": noise of each entry's size, no structure: the control
    dtype: str = "float16"  # storage on the CPU; "bfloat16" has range instead of precision

    def __post_init__(self):
        allowed = {"kind": ("real", "gaussian"), "dtype": ("float16", "bfloat16", "float32")}
        for name, values in allowed.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(f"ErrorConfig.{name} must be one of {values}, got {value!r}")
        if self.capacity < 1 or self.per_push < 1 or not 0 <= self.probability <= 1:
            raise ValueError(f"need capacity, per_push >= 1 and 0 <= probability <= 1, got {self}")


class ErrorBuffer:
    """State: the stored frames, how many of them are filled, how many pushes there were."""

    def __init__(self, cfg: ErrorConfig = ErrorConfig()):
        self.cfg = cfg
        self.size = 0
        self.pushes = 0
        self.entries: Tensor | None = None  # (capacity, C, h, w), allocated by the first push

    def __len__(self) -> int:
        return self.size

    def push(
        self,
        delta: Tensor,  # (B, C, T, h, w) δ = x̂0 − x0 of the current latents
        generator: torch.Generator | None = None,  # on the CPU; None takes the global one
    ) -> None:
        if delta.ndim != 5:
            raise ValueError(f"push needs delta (B, C, T, h, w), got {tuple(delta.shape)}")
        B, C, T, h, w = delta.shape
        self._check(C, h, w)

        # some latent frames of the batch, each on its own
        picks = torch.randperm(B * T, generator=generator)[: self.cfg.per_push].to(delta.device)
        frames = delta.detach().transpose(1, 2).flatten(0, 1)[picks]
        frames = frames.to("cpu", getattr(torch, self.cfg.dtype))
        if not frames.isfinite().all():
            raise ValueError(
                f"push got NaN or more than {self.cfg.dtype} can hold: the step diverged"
            )

        if self.entries is None:
            self._allocate(frames)
        for frame in frames:
            self.entries[self._slot(generator)] = frame
        self.pushes += 1

    def ready(self) -> bool:
        """Early errors are those of an untrained network: nothing is injected before the warm-up."""
        return self.size > 0 and self.pushes >= self.cfg.warmup

    def amplitude(
        self, B: int, gamma: float | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """(B,) γ with its jitter for the samples that are perturbed, 0 for the others."""
        gamma = self.cfg.gamma if gamma is None else gamma
        hit = torch.rand(B, generator=generator) < self.cfg.probability
        spread = 1 + self.cfg.jitter * (2 * torch.rand(B, generator=generator) - 1)
        return gamma * spread * hit * self.ready()

    def perturb(
        self,
        x: Tensor,  # (B, C, T, h, w) past or memory latents, clean
        gamma: float | None = None,  # γ_h or γ_m; None takes the config's
        generator: torch.Generator | None = None,  # on the CPU; None takes the global one
    ) -> Tensor:  # (B, C, T, h, w) x̃; x itself until the warm-up is over
        if x.ndim != 5:
            raise ValueError(f"perturb needs latents (B, C, T, h, w), got {tuple(x.shape)}")
        B, C, T, h, w = x.shape
        self._check(C, h, w)
        if gamma == 0 or T == 0 or not self.ready():
            return x

        scale = self.amplitude(B, gamma, generator).to(x)
        picks = torch.randint(self.size, (B, T), generator=generator)
        delta = self.entries[picks].transpose(1, 2).to(x)  # (B, C, T, h, w)
        if self.cfg.kind == "gaussian":
            size = delta.std((1, 3, 4), keepdim=True)  # of every latent frame
            delta = size * torch.randn(delta.shape, generator=generator).to(x)

        return x + scale.view(B, 1, 1, 1, 1) * delta  # x̃ = x + γ·δ′      Eq. 2, 5

    def state_dict(self) -> dict:
        """Plain tensors, numbers and strings: torch.load(weights_only=True) reads it back."""
        kept = None if self.entries is None else self.entries[: self.size].clone()
        return {"cfg": asdict(self.cfg), "pushes": self.pushes, "entries": kept}

    def load_state_dict(self, state: dict) -> None:
        here = (self.cfg.capacity, self.cfg.dtype)
        saved = (state["cfg"]["capacity"], state["cfg"]["dtype"])
        if here != saved or state["cfg"].get("buckets", 0):
            raise ValueError(
                f"this error buffer has (capacity, dtype) = {here}, the saved one {saved}"
                f" in {state['cfg'].get('buckets', 0) or 1} shelves: "
                "pass the saved values, or start a new run with --fresh"
            )
        kept = state["entries"]
        self.pushes = state["pushes"]
        self.size = 0 if kept is None else len(kept)
        self.entries = None
        if kept is not None:
            self._allocate(kept)
            self.entries[: self.size] = kept

    def _allocate(self, like: Tensor) -> None:
        self.entries = torch.empty(self.cfg.capacity, *like.shape[1:], dtype=like.dtype)

    def _slot(self, generator: torch.Generator | None) -> int:
        """Where the next frame goes: a free slot, else in the place of a random old one."""
        if self.size == self.cfg.capacity:
            return int(torch.randint(self.cfg.capacity, (), generator=generator))
        self.size += 1
        return self.size - 1

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


def main() -> None:
    """A pushed error comes back in other latents; the Gaussian control has its size, not its shape."""
    g = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.95, 0.7, 0.4, 0.1]).view(-1, 1, 1, 1, 1)
    x0 = torch.randn(4, 16, 10, 8, 8, generator=g)
    v_error = torch.randn(4, 16, 10, 1, 1, generator=g).expand_as(x0)  # the same in every cell
    delta = -sigma * v_error  # Eq. 1  δ = −σ·(v̂ − v)
    print(f"rms of the errors: {delta.square().mean().sqrt():.3f}")

    for kind in ("real", "gaussian"):
        buffer = ErrorBuffer(ErrorConfig(warmup=1, probability=1.0, per_push=40, kind=kind))
        before = buffer.perturb(x0) - x0
        buffer.push(delta, g)
        after = buffer.perturb(x0, generator=g) - x0
        likeness = after.mean((3, 4)).square().mean() / after.square().mean()
        print(
            f"{kind:8s}: rms of x̃ − x  empty {before.square().mean().sqrt():.3f}, "
            f"with {len(buffer)} stored frames {after.square().mean().sqrt():.3f}; "
            f"share of it that is alike in all cells {likeness:.2f}"
        )


if __name__ == "__main__":
    main()
