"""Learn the velocity that carries noise to data, and walk along it."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def shift(sigma, s: float = 5.0):  # float or Tensor
    return s * sigma / (1 + (s - 1) * sigma)  # σ' = s·σ / (1 + (s−1)·σ)


def sigma_grid(steps: int, s: float = 5.0) -> Tensor:  # (steps + 1,) float32, falling to exactly 0
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    start = 0.999 * (
        1 - torch.arange(steps, dtype=torch.float64) / steps
    )  # linspace(0.999, 0) without 0
    return F.pad(shift(start, s), (0, 1)).float()


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return torch.lerp(
        x0, noise, sigma.to(x0).view(-1, *[1] * (x0.ndim - 1))
    )  # x_σ = (1−σ)·x0 + σ·ε


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    return noise - x0  # v = ε − x0


def x0_from_v(x_sigma: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    return x_sigma - sigma.to(v).view(-1, *[1] * (v.ndim - 1)) * v  # x0 = x_σ − σ·v


def sample_sigma(
    B: int, s: float = 5.0, generator: torch.Generator | None = None
) -> Tensor:  # (B,)
    return shift(
        1 - torch.rand(B, generator=generator), s
    )  # for training: uniform over (0, 1], shifted


def euler(v: Callable, x: Tensor, sigmas: Tensor, generator=None) -> Iterator[Tensor]:
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        x = x + (after - now) * v(x, now)  # x_σ' = x_σ + (σ' − σ)·v
        yield x


def renoise(v: Callable, x: Tensor, sigmas: Tensor, generator=None) -> Iterator[Tensor]:
    """Jump to the clean estimate, then add fresh noise of the next level: as the student is trained."""
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        x = x - now * v(x, now)  # x̂0 = x_σ − σ·v
        if after > 0:
            noise = torch.empty_like(x).normal_(generator=generator)
            x = (1 - after) * x + after * noise  # x_σ' = (1−σ')·x̂0 + σ'·ε
        yield x


def unipc(v: Callable, x: Tensor, sigmas: Tensor, generator=None) -> Iterator[Tensor]:
    """UniPC of order 2, B(h) = e^−h − 1, on x0: correct the latent just reached, then predict the next."""
    sigma = sigmas.tolist()
    lam = [
        math.log1p(-s) - math.log(s) if s else math.inf for s in sigma
    ]  # λ = ln α − ln σ,  α = 1 − σ
    start, older, old, order = x, None, None, 0
    for i, (now, after) in enumerate(zip(sigma[:-1], sigma[1:], strict=True)):
        x0 = x - now * v(x, now)  # x̂_i = z_i − σ_i·v_i
        if i > 0:  # corrector: i−1 → i
            h = lam[i] - lam[i - 1]
            B = math.expm1(-h)
            if order == 1:
                towards = 0.5 * (x0 - old)
            else:
                r = (lam[i - 2] - lam[i - 1]) / h
                phi1, phi2 = -B / h - 1, (B / h + 1) / h - 0.5
                rho0 = (phi1 / B - 2 * phi2 / B) / (1 - r)  # [[1, 1], [r, 1]]·ρ = [φ1, 2·φ2]/B
                towards = rho0 * (older - old) / r + (phi1 / B - rho0) * (x0 - old)
            x = now / sigma[i - 1] * start - (1 - now) * B * (old + towards)
        start, order = x, min(2, len(sigma) - 1 - i, i + 1)  # predictor: i → i+1
        B = math.expm1(lam[i] - lam[i + 1])  # σ' = 0: −1, so x = x̂_i
        towards = (
            0.5 * (old - x0) / (lam[i - 1] - lam[i]) * (lam[i + 1] - lam[i]) if order == 2 else 0
        )
        x = after / now * start - (1 - after) * B * (x0 + towards)
        older, old = old, x0
        yield x


@torch.no_grad()
def sample(
    model: Callable,  # DiT, moe.Experts: (x_sigma, sigma, context, prepared) → v
    context,  # context.Context; guidance also calls its null()
    sigmas: Tensor,  # (steps + 1,) falling to 0: sigma_grid(steps)
    noise: Tensor,  # (B, C, N, h, w)
    method: str = "euler",  # euler | unipc (as released) | renoise (few-step student)
    guidance: float = 1.0,  # released base model: 5; 1 needs one call per step, not two
    generator: torch.Generator | None = None,  # of renoise's fresh noise
    group: dist.ProcessGroup | None = None,  # ranks that share the work
) -> Tensor:  # (B, C, N, h, w) x0
    """Walk from noise to clean latents along the predicted velocity."""
    methods = {"euler": euler, "unipc": unipc, "renoise": renoise}
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}")

    if len(sigmas) < 2:
        raise ValueError(
            f"sigmas must hold a start and an end, got {len(sigmas)}: sigma_grid(steps) has steps + 1"
        )
    # the context is the same at every step: what only depends on it is computed once
    branches = [context] if guidance == 1 else [context, context.null()]
    prepared = [model.prepare(c, group) if hasattr(model, "prepare") else None for c in branches]

    def v(x: Tensor, sigma: float) -> Tensor:
        at = torch.full((len(x),), sigma, device=x.device)
        calls = zip(branches, prepared, strict=True)
        full, *null = (model(x, at, c, prepared=p) for c, p in calls)
        # v_null + g·(v_full − v_null)
        return null[0] + guidance * (full - null[0]) if null else full

    for x in methods[method](v, noise, sigmas, generator):
        x0 = x
    return x0
