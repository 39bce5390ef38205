"""What flow.py promises."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import flow
from flow import sample, sigma_grid


class Straight:
    """A world of one clean latent: v = (x − x0)/σ. Every sampler must arrive at it, however few its steps."""

    def __init__(self, x0: Tensor):
        self.x0 = x0
        self.calls = 0
        self.prepared = 0

    def prepare(self, context, group=None):
        self.prepared += 1
        return context

    def __call__(self, x: Tensor, sigma: Tensor, context, prepared=None) -> Tensor:
        self.calls += 1
        scale = getattr(context, "scale", 1.0)
        return scale * (x - self.x0) / sigma.view(-1, 1, 1, 1, 1)


def latents(*shape: int) -> tuple[Tensor, Tensor]:
    """Clean ones and noise."""
    return torch.randn(*shape), torch.randn(*shape)


def test_velocity_recovers_the_clean_latent():
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(8, 4, 3, 4, 4, generator=g)
    noise = torch.randn(8, 4, 3, 4, 4, generator=g)
    sigma = flow.sample_sigma(8, 5.0, g)
    x_sigma = flow.add_noise(x0, noise, sigma)
    v = flow.velocity(x0, noise)
    assert torch.allclose(flow.x0_from_v(x_sigma, v, sigma), x0, atol=1e-5)
    assert (sigma > 0).all() and (sigma <= 1).all()

    at_data = flow.add_noise(x0, noise, torch.zeros(8))
    at_noise = flow.add_noise(x0, noise, torch.ones(8))
    assert torch.allclose(at_data, x0, atol=1e-6)
    assert torch.allclose(at_noise, noise, atol=1e-6)


def test_the_shift_of_five_spends_forty_percent_of_the_draws_above_0_875():
    g = torch.Generator().manual_seed(0)
    sigma = flow.sample_sigma(100_000, 5.0, g)
    share = (sigma > 0.875).float().mean()
    assert abs(share - 0.417) < 0.01
    assert torch.equal(flow.shift(sigma, 1.0), sigma)


@pytest.mark.parametrize("method", ["euler", "unipc", "renoise"])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_every_sampler_arrives_where_all_paths_lead(method: str, steps: int):
    x0, noise = latents(2, 3, 4, 2, 2)
    world = Straight(x0)
    arrived = sample(world, None, sigma_grid(steps), noise, method)
    assert torch.allclose(arrived, x0, atol=1e-3)
    assert world.calls == steps and world.prepared == 1


def test_guidance_extrapolates_from_the_null_branch():
    x0, noise = latents(1, 2, 2, 2, 2)
    without = SimpleNamespace(scale=0.5)
    context = SimpleNamespace(scale=1.0, null=lambda: without)
    world = Straight(x0)
    grid = torch.tensor([0.5, 0.0])
    guided = sample(world, context, grid, noise, guidance=5.0)
    # v = v_null + 5·(v_full − v_null) = (0.5 + 5·0.5)·v_full
    assert torch.allclose(guided, noise - 3 * (noise - x0), atol=1e-5)
    assert world.calls == world.prepared == 2


def test_renoising_repeats_with_its_generator_and_the_model_need_not_prepare():
    noise = torch.randn(1, 2, 2, 2, 2)

    def bent(x, sigma, context, prepared=None):
        return x.sin()

    def drawn(seed):
        g = torch.Generator().manual_seed(seed)
        return sample(bent, None, sigma_grid(3), noise, "renoise", generator=g)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_unipc_is_ten_times_closer_than_euler_in_as_many_steps():
    # data N(1, 0.3²): the flow is known, x(0) = 1 + 0.3·(x(σ) − (1−σ))/std(σ)
    spread = 0.3
    x = torch.full((1, 1, 1, 1, 1), 2.0, dtype=torch.float64)

    def std(s):
        return math.hypot((1 - s) * spread, s)

    def v(x, s):
        off = x - (1 - s)
        return off * (s - (1 - s) * spread**2) / std(s) ** 2 - 1

    grid = sigma_grid(20, 1.0)
    start = float(grid[0])
    exact = 1 + spread * (x - (1 - start)) / std(start)

    def error(sampler):
        arrived = list(sampler(v, x, grid))[-1]
        return abs(float(arrived - exact))

    assert error(flow.unipc) < 0.1 * error(flow.euler)


def test_a_grid_without_a_step_is_refused():
    with pytest.raises(ValueError, match="at least one step"):
        world = Straight(torch.zeros(1))
        sample(world, None, torch.tensor([0.5]), torch.zeros(1, 1, 1, 1, 1))


def test_every_sampler_yields_what_it_believes_after_every_step():
    x0, noise = latents(1, 2, 2, 2, 2)

    def v(x, sigma):
        return (x - x0) / sigma

    believes = list(flow.renoise(v, noise, sigma_grid(3)))
    assert len(believes) == 3
    assert all(torch.allclose(x, x0, atol=1e-4) for x in believes)
