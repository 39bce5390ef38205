"""The imperfect past: what is added to past and memory, so that they look as they will in play.

Two sources of the same kind of error, δ = x̂0 − x0:
    stored    errors of earlier steps, of other scenes (error_buffer.py), by default
    own       what the network makes of these very latents in one step, in a share --p-own of the steps
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import error_buffer
import flow
from context import Context
from engine.clips import Clips, Cut, windows
from engine.flags import TrainConfig
from engine.run import Run, share


def start_errors(cfg: TrainConfig) -> error_buffer.ErrorBuffer:
    """Empty; nothing is injected while the learning rate warms up, or in 50 steps if that is longer."""
    how = error_buffer.ErrorConfig(probability=cfg.p_error, kind=cfg.error_kind)
    return error_buffer.ErrorBuffer(
        dataclasses.replace(how, warmup=min(how.warmup, cfg.warmup)),
    )


def turn_of_own(run: Run, cut: Cut, g: torch.Generator) -> bool:
    """Whether this step's errors are the model's own of the same scene."""
    if not run.cfg.p_own or cut.n_past == 1:
        return False
    return float(torch.rand((), generator=g)) < run.cfg.p_own


@torch.no_grad()
def own_errors(
    predict: Callable, clips: Clips, run: Run, cut: Cut, g: torch.Generator
) -> dict[str, Tensor]:
    """δ of these very past and memory latents: how the model errs on them in one step from a random σ.

    Stored errors come from other scenes. What a player sees drift is a blur of this one: noise the
    latents to σ ~ U(0, 1) and ask for the clean estimate x̂0, told only the latent before the past.
    """
    P = cut.n_past
    earlier = dataclasses.replace(cut, start=cut.start - P, n_new=P, n_past=1)
    past, context = windows(clips, run, earlier)
    M = context.memory.shape[2]

    # [memory | latent before | past]  ->  [latent before | memory, past]: all but one are asked for
    order = [M, *range(M), *range(M + 1, M + 1 + P)]
    x0 = torch.cat([context.memory, past], 2).to(run.device)
    context = dataclasses.replace(
        context,
        memory=context.memory[:, :, :0],
        times=context.times[:, order],
        rays=context.rays[:, :, order],
        mouse=context.mouse[:, order],
        keyboard=context.keyboard[:, order],
    ).to(run.device)

    sigma = share(run, torch.rand(run.cfg.batch, generator=g)).to(run.device)
    noise = share(run, torch.randn(run.cfg.batch, *x0.shape[1:], generator=g)).to(run.device)
    x_sigma = flow.add_noise(x0, noise, sigma)
    delta = flow.x0_from_v(x_sigma, predict(x_sigma, sigma, context), sigma) - x0
    return {"memory": delta[:, :, :M], "past": delta[:, :, M:]}


def inject(
    errors: error_buffer.ErrorBuffer,
    context: Context,
    run: Run,
    g: torch.Generator,
    own: dict[str, Tensor] | None = None,
) -> Context:
    """x̃ = x + γ_h·δ on the past, m̃ = m + γ_m·δ on the memory; a lone image is real data and stays."""
    if context.past.shape[2] == 1:
        return context
    perturbed = {}
    for name in ("past", "memory"):
        if run.cfg.inject not in ("both", name):
            continue
        x = getattr(context, name)
        if own is None:  # drawn for the whole batch: every rank takes its rows
            zeros = x.new_zeros(run.cfg.batch, *x.shape[1:])
            delta = share(run, errors.perturb(zeros, run.cfg.gamma, g))
        else:
            amplitude = share(run, errors.amplitude(run.cfg.batch, run.cfg.gamma, g)).to(x)
            delta = amplitude.view(-1, 1, 1, 1, 1) * own[name]
        perturbed[name] = x + delta
    return dataclasses.replace(context, **perturbed)
