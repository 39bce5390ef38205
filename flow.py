"""Learn the velocity that carries noise to data, and walk along it.

What it does. The formulas of flow matching, the noise levels of training and sampling, and three
samplers.
Paper: §3.1, Eq. 3; §3.3 (few steps).  Released: UniPC (Zhao et al. 2023, arXiv 2302.04867), shift
5.

Why it works. Draw a straight line from a clean latent x0 to noise ε ~ N(0, I):

    x_σ = (1 − σ)·x0 + σ·ε,      σ from 0 (data) to 1 (noise)                                  (1)

Its direction is the same all along it:

    v = dx_σ/dσ = ε − x0                                                                       (2)

Through one point x many such lines pass, and the network sees the point only. Trained with the
squared error of v, the best it can answer is their mean, v̂(x, σ) = E[ε − x0 | x_σ = x], Eq. 3. The
mean is enough: through every point it moves as much probability as all lines together do, so a
walk along dx/dσ = v̂(x, σ) from pure noise (σ = 1) to σ = 0 arrives at the density of data.
By (1) and (2), x_σ = x0 + σ·v; take the mean of both sides to get the second line:

    x_next = x_σ + (σ_next − σ)·v̂                one step of euler                            (3)
    x̂0 = x_σ − σ·v̂ = E[x0 | x_σ]                 the clean estimate                           (4)

The error buffer stores x̂0 − x0, distillation compares two x̂0, and the few-step student jumps to x̂0
and adds fresh noise of the next level (renoise). Only a trained student may jump like that: for
others x̂0 is a mean of what is possible, with less spread than data (the demo shows it).

Shift. A large picture survives more noise than a small one, so more steps are spent at high σ,
where its layout is decided. The odds σ/(1 − σ) of an even level are multiplied by s:

    shifted/(1 − shifted) = s·σ/(1 − σ)      ⇔      shifted = s·σ / (1 + (s − 1)·σ)            (5)

The release has s = 5 for pictures of 880 tokens. Ours have 16. If s grows with the square root of
their number (Esser et al. 2024), ours should be about .7; with s = 5 only one draw in six would lie
below σ = .5, where edges are decided. Our own models end with s = 1.5 (results/pilots); a first
training, which has all the layout to learn, begins with s = 5 (results/README.md).

UniPC takes larger steps. (Models of three steps, as the shipped one, do without.) In dx/dσ = (x −
x̂0)/σ, which is (4), only x̂0 is unknown beforehand. So d(x/σ)/dσ = (dx/dσ)/σ − x/σ² = −x̂0/σ². In
the logarithm of the odds of data,

    λ = ln((1 − σ)/σ)                                                                          (6)

e^λ = 1/σ − 1, so that −dσ/σ² = e^λ dλ. Integrate from λ to λ', where σ' = (1 − σ')·e^(−λ'):

    x' = σ'/σ·x + (1 − σ')·∫ e^(μ − λ')·x̂0(μ) dμ,      μ from λ to λ'                          (7)

Exact so far. If x̂0 were constant in between, the integral would be x̂0 times

    1 − e^(−h),    h = λ' − λ                                                                  (8)

A straight line through the last two x̂0 does better (predict). Once the network has answered at the
new place, its x̂0 is used to take the step that led there again, better (correct): no extra call.

What differs. The same results as the release in float32. Noise is drawn where its generator lives,
so that a CPU generator gives the same noise on every device.

Try it: python flow.py      Tests: pytest tests/test_flow.py
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

HIGHEST = 0.999  # level told at the first step, before the shift, of pure noise: as released


# ---- what the network learns -------------------------------------------------------------------------------


def per_sample(sigma: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...), to multiply latents with."""
    return sigma.to(like).view(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return torch.lerp(x0, noise, per_sample(sigma, x0))  # (1)


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    return noise - x0  # (2)


def x0_from_v(x_sigma: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    return x_sigma - per_sample(sigma, v) * v  # (4)


# ---- noise levels ------------------------------------------------------------------------------------------


def shift(sigma, s: float = 5.0):  # float or Tensor
    return s * sigma / (1 + (s - 1) * sigma)  # (5)


def sample_sigma(B: int, s: float = 5.0, generator: torch.Generator | None = None) -> Tensor:
    """(B,) levels for training: uniform over (0, 1], then shifted."""
    return shift(1 - torch.rand(B, generator=generator), s)


def sigma_grid(steps: int, s: float = 5.0) -> Tensor:
    """(steps + 1,) float32 levels for sampling: even, then shifted; they fall to exactly 0."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    even = HIGHEST * (1 - torch.arange(steps, dtype=torch.float64) / steps)
    return F.pad(shift(even, s), (0, 1)).float()


def noise_like(like: Tensor, generator: torch.Generator | Callable | None) -> Tensor:
    """Noise in the shape, type and device of a tensor, drawn on the generator's device.

    In place of a generator, a function may return noise of a given shape, drawn elsewhere.
    """
    if callable(generator):
        return generator(like.shape).to(like)
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device).to(like)


# ---- samplers ----------------------------------------------------------------------------------------------

# v(x, σ) is the network, x at first noise, sigmas fall to 0. A sampler yields after every step; what it
# yields last is the clean latent


def euler(v: Callable, x: Tensor, sigmas: Tensor, generator=None) -> Iterator[Tensor]:
    for now, after in pairwise(sigmas.tolist()):
        x = x + (after - now) * v(x, now)  # (3)
        yield x


def renoise(v: Callable, x: Tensor, sigmas: Tensor, generator=None) -> Iterator[Tensor]:
    """Jump to x̂0, yield it, then add fresh noise of the next level: as the student is trained."""
    for now, after in pairwise(sigmas.tolist()):
        x0 = x - now * v(x, now)  # (4)
        yield x0
        if after > 0:
            x = (1 - after) * x0 + after * noise_like(x0, generator)  # (1)


class Estimate(NamedTuple):
    """A clean estimate, and at which level it was made."""

    sigma: float
    lam: float  # λ of (6)
    x0: Tensor  # x̂0


def log_odds(sigma: float) -> float:
    if sigma == 0:
        return math.inf
    return math.log1p(-sigma) - math.log(sigma)  # (6)


def unipc(v: Callable, x: Tensor, sigmas: Tensor, generator=None) -> Iterator[Tensor]:
    """UniPC of order 2 on x̂0: correct the latent just reached, then predict the next."""
    steps = len(sigmas) - 1
    estimates = deque(maxlen=3)
    came_from = x  # where the last step began
    order = 0  # of the last step: how many estimates it used
    for i, (now, after) in enumerate(pairwise(sigmas.tolist())):
        x0 = x - now * v(x, now)  # (4)
        estimates.append(Estimate(now, log_odds(now), x0))
        if i > 0:
            x = correct(came_from, estimates, order)
        came_from = x
        order = min(2, i + 1, steps - i)
        x = predict(came_from, estimates, after, order)
        yield x


def predict(start: Tensor, estimates: Sequence[Estimate], sigma: float, order: int) -> Tensor:
    """On to level sigma, with the last x̂0 (order 1) or the line through the last two (order 2)."""
    now = estimates[-1]
    lam = log_odds(sigma)
    weight = math.expm1(now.lam - lam)  # (8), negative: e^(−h) − 1; it is −1 where sigma = 0
    trend = 0
    if order == 2:
        # half the change of x̂0 over the step: its mean on the line, as if all μ counted alike
        before = estimates[-2]
        slope = 0.5 * (before.x0 - now.x0) / (before.lam - now.lam)
        trend = slope * (lam - now.lam)
    data = (1 - sigma) * weight * (now.x0 + trend)
    return sigma / now.sigma * start - data  # (7)


def correct(start: Tensor, estimates: Sequence[Estimate], order: int) -> Tensor:
    """The step that led here once more, now that x̂0 is known here too."""
    now = estimates[-1]
    last = estimates[-2]
    h = now.lam - last.lam
    weight = math.expm1(-h)  # (8), negative as above
    if order == 1:
        trend = 0.5 * (now.x0 - last.x0)
    else:
        # Two differences of x̂0, weighted so that (7) is exact if x̂0 is a parabola in λ. With
        # time in steps, (μ − λ)/h, the estimates lie at r, 0 and 1. Under the weights of (7) time
        # has the mean phi1 / weight, its square the mean 2·phi2 / weight. To be exact for both:
        # rho_before + rho_now = phi1 / weight, r·rho_before + rho_now = 2·phi2 / weight
        before = estimates[-3]
        r = (before.lam - last.lam) / h
        phi1 = -weight / h - 1
        phi2 = (weight / h + 1) / h - 0.5
        rho_before = (phi1 / weight - 2 * phi2 / weight) / (1 - r)
        rho_now = phi1 / weight - rho_before
        trend = rho_before * (before.x0 - last.x0) / r + rho_now * (now.x0 - last.x0)
    data = (1 - now.sigma) * weight * (last.x0 + trend)
    return now.sigma / last.sigma * start - data  # (7)


def last_of(steps: Iterator[Tensor]) -> Tensor:
    return deque(steps, maxlen=1).pop()


METHODS = {"euler": euler, "unipc": unipc, "renoise": renoise}


@torch.no_grad()
def sample(
    model: Callable,  # DiT, moe.Experts: (x_sigma, sigma, context, prepared) -> v
    context,  # context.Context; guidance also calls its null()
    sigmas: Tensor,  # (steps + 1,) falling to 0: sigma_grid(steps)
    noise: Tensor,  # (B, C, N, h, w)
    method: str = "euler",  # euler | unipc (as released) | renoise (few-step student)
    guidance: float = 1.0,  # released base model: 5; 1 needs one call per step, not two
    generator: torch.Generator | None = None,  # of renoise's fresh noise
    group: dist.ProcessGroup | None = None,  # ranks that share the work
) -> Tensor:  # (B, C, N, h, w) x0
    """Walk from noise to clean latents along the predicted velocity."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if len(sigmas) < 2:
        raise ValueError(f"sigmas must fall to 0 in at least one step, got {sigmas.tolist()}")

    # what depends on the context alone is computed once, for all steps
    branches = [context] if guidance == 1 else [context, context.null()]
    can_prepare = hasattr(model, "prepare")
    prepared = [model.prepare(branch, group) if can_prepare else None for branch in branches]

    def v(x: Tensor, sigma: float) -> Tensor:
        at = torch.full((len(x),), sigma, device=x.device)
        pairs = zip(branches, prepared, strict=True)
        full, *null = (model(x, at, branch, prepared=p) for branch, p in pairs)
        if not null:
            return full
        # away from the answer without memory, actions and prompt
        return null[0] + guidance * (full - null[0])

    return last_of(METHODS[method](v, noise, sigmas, generator))


def main() -> None:
    """A Gaussian world, whose velocity is known exactly: how far off is each sampler?

    euler and unipc approach the data's spread with more steps. renoise does not: it is for students
    that were trained to jump.
    """
    torch.manual_seed(0)
    mean, spread = 2.0, 0.5

    def v(x: Tensor, sigma: float) -> Tensor:  # E[ε − x0 | x_σ = x] of x0 ~ N(mean, spread²)
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        off = x - (1 - sigma) * mean
        return (sigma - (1 - sigma) * spread**2) / variance * off - mean

    noise = torch.randn(100_000)
    print(f"data: mean {mean:.2f}, spread {spread:.2f}; pure noise: mean 0.00, spread 1.00")
    for name in ("euler", "unipc", "renoise"):
        for steps in (3, 10, 50):
            x = last_of(METHODS[name](v, noise, sigma_grid(steps)))
            print(f"{name:8s}{steps:3d} steps: mean {x.mean():.3f}, spread {x.std():.3f}")


if __name__ == "__main__":
    main()
