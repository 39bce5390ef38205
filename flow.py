"""Learn the velocity that carries noise to data, and walk along it.

What it does. Four formulas of flow matching, the noise levels of training and sampling, three
samplers.
Paper: §3.1, Eq. 3; §3.3 (few steps).  Released: UniPC (Zhao et al. 2023, arXiv 2302.04867), shift
5.

Why it works. Draw a straight line from a clean latent x0 to noise ε ~ N(0, I):

    x_σ = (1 − σ)·x0 + σ·ε,      σ from 0 (data) to 1 (noise)                                  (1)

Its direction is the same all along it:

    v = dx_σ/dσ = ε − x0                                                                       (2)

The network sees x_σ, not the two ends, so under squared error the best it can say is the mean
velocity of all lines through that point, v̂(x, σ) = E[ε − x0 | x_σ = x], Eq. 3. That suffices:
the flow dx/dσ = v̂(x, σ) carries the density of x_σ to that of x_σ' for every pair of levels.
Start in pure noise, walk to σ = 0, arrive among data:

    x_σ' = x_σ + (σ' − σ)·v̂                      one step of euler                            (3)
    x̂0   = x_σ − σ·v̂ = E[x0 | x_σ]               what it believes the clean latent is        (4)

(4) is why everything else here can speak of x̂0: the error buffer stores x̂0 − x0, distillation
compares two x̂0, and the few-step student jumps to x̂0 and adds fresh noise (renoise).

Shift. A large picture survives more noise than a small one, so more steps are spent where its
layout is decided, at high σ. The shift multiplies the odds of noise by s:

    σ'/(1 − σ') = s·σ/(1 − σ)      ⇔      σ' = s·σ / (1 + (s − 1)·σ)                           (5)

UniPC. On the right clock the flow is linear but for x̂0, and a linear flow has an exact solution:

    λ = ln((1 − σ)/σ)                                                                          (6)
    x(λ') = σ'/σ·x(λ) + (1 − σ')·∫ e^(λ̃ − λ') x̂0(λ̃) dλ̃                                     (7)

While x̂0 stays what it is, the integral is x̂0 times

    −(e^(−h) − 1),    h = λ' − λ                                                               (8)

and the step is exact. A line through the last two x̂0 makes it second order (predictor); once the
network has spoken at the new place, the step that led there is taken again with what it said
(corrector). No more calls.

What differs. Nothing is computed otherwise than released. Noise is drawn where its generator
lives, so that a CPU generator gives the same noise on every device.

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

HIGHEST = 0.999  # noise level of the first step


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
    """(B,) levels for training: uniform over (0, 1], shifted."""
    return shift(1 - torch.rand(B, generator=generator), s)


def sigma_grid(steps: int, s: float = 5.0) -> Tensor:
    """(steps + 1,) float32 levels for sampling, falling to exactly 0."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    even = HIGHEST * (1 - torch.arange(steps, dtype=torch.float64) / steps)
    return F.pad(shift(even, s), (0, 1)).float()


def fresh(like: Tensor, generator: torch.Generator | Callable | None) -> Tensor:
    """Noise in the shape and place of a tensor, drawn where the generator lives.

    A function of a shape may stand for the generator: noise that was drawn elsewhere.
    """
    if callable(generator):
        return generator(like.shape).to(like)
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device).to(like)


# ---- samplers: v(x, σ) is the network; each yields after every step, the last time x0 ----------------------


def euler(v: Callable, x: Tensor, sigmas: Tensor, generator=None) -> Iterator[Tensor]:
    for now, after in pairwise(sigmas.tolist()):
        x = x + (after - now) * v(x, now)  # (3)
        yield x


def renoise(v: Callable, x: Tensor, sigmas: Tensor, generator=None) -> Iterator[Tensor]:
    """Jump to the clean estimate, then add fresh noise of the next level: as the student is trained."""
    for now, after in pairwise(sigmas.tolist()):
        x0 = x - now * v(x, now)  # (4)
        yield x0
        if after > 0:
            x = (1 - after) * x0 + after * fresh(x0, generator)  # (1)


class Belief(NamedTuple):
    """What the network believed the clean latent to be, and where on the way."""

    sigma: float
    lam: float
    x0: Tensor


def log_odds(sigma: float) -> float:
    if sigma == 0:
        return math.inf
    return math.log1p(-sigma) - math.log(sigma)  # (6)


def unipc(v: Callable, x: Tensor, sigmas: Tensor, generator=None) -> Iterator[Tensor]:
    """UniPC of order 2 on x̂0: correct the latent just reached, then predict the next."""
    steps = len(sigmas) - 1
    beliefs = deque(maxlen=3)
    came_from = x  # the corrected latent that the last step began at
    order = 0  # of the last step
    for i, (now, after) in enumerate(pairwise(sigmas.tolist())):
        x0 = x - now * v(x, now)  # (4)
        beliefs.append(Belief(now, log_odds(now), x0))
        if i > 0:
            x = correct(came_from, beliefs, order)
        came_from = x
        order = min(2, i + 1, steps - i)
        x = predict(came_from, beliefs, after, order)
        yield x


def predict(start: Tensor, beliefs: Sequence[Belief], sigma: float, order: int) -> Tensor:
    """On to level sigma, by x̂0 or by the line through the last two."""
    now = beliefs[-1]
    lam = log_odds(sigma)
    weight = math.expm1(now.lam - lam)  # (8); −1 where σ' = 0
    trend = 0
    if order == 2:
        before = beliefs[-2]
        slope = 0.5 * (before.x0 - now.x0) / (before.lam - now.lam)
        trend = slope * (lam - now.lam)
    data = (1 - sigma) * weight * (now.x0 + trend)
    return sigma / now.sigma * start - data  # (7)


def correct(start: Tensor, beliefs: Sequence[Belief], order: int) -> Tensor:
    """The step to where we are once more, now that x̂0 is known here."""
    now = beliefs[-1]
    last = beliefs[-2]
    h = now.lam - last.lam
    weight = math.expm1(-h)  # (8)
    if order == 1:
        trend = 0.5 * (now.x0 - last.x0)
    else:
        # two differences of x̂0, weighted so that the integral in (7) is exact for parabolas:
        # [[1, 1], [r, 1]]·ρ = [φ1, 2·φ2] / weight
        before = beliefs[-3]
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
        return null[0] + guidance * (full - null[0])  # away from what it says without knowing

    return last_of(METHODS[method](v, noise, sigmas, generator))


def main() -> None:
    """A Gaussian world, whose velocity is known exactly: how far does each sampler miss?"""
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
