"""Turn the many-step model into a 3-step one by judging what it makes of its own output.

What it does. Student, teacher ("real") and critic ("fake") start as copies of one base with memory. The
student makes segments in three steps, the critic learns what these look like, and the student moves
from what the critic expects to what the teacher expects.
Paper: §3.3, Eq. 8, Fig. 6.  Released: the student's weights; no training code.

Why it works. The student's x = G_θ(z) should be distributed as the teacher's data. Compare the two
after adding noise, where both densities are smooth and overlap:

    x_τ = (1 − τ)·x + τ·ε                                                                      (1)
    KL(fake_τ ‖ real_τ) = E over x_τ ~ fake of  log fake_τ(x_τ) − log real_τ(x_τ)

θ enters twice, through the sample and through fake_τ. The second vanishes: E_fake[∂_θ log fake] =
∫ ∂_θ fake = ∂_θ 1 = 0. What is left needs scores alone, s = ∇ log density, and no density:

    ∇_θ KL = E[(s_fake − s_real)(x_τ)·(1 − τ)·∂x/∂θ]                            Eq. 8

A score is a denoiser in disguise (Tweedie: differentiate log ∫ p(x)·N(x_τ; (1 − τ)·x, τ²) dx):

    s(x_τ) = −(x_τ − (1 − τ)·x̂)/τ²,      x̂ = E[x | x_τ] = x_τ − τ·v                            (2)
    s_fake − s_real = (1 − τ)/τ²·(x̂_fake − x̂_real)

So ask the teacher and the critic where x_τ came from. The factor (1 − τ)²/τ² would explode for small
τ; in its place the teacher's own error makes every τ pull about equally:

    g = (x̂_fake − x̂_real) / mean|x − x̂_real|                                                   (3)
    L_student = ½·mean (x − stopgrad(x − g))²,      because then ∂L/∂x = g / numel             (4)
    L_critic  = mean (v_fake(x_τ, τ) − (ε − x))²    flow matching on the student's x           (5)

With guidance the teacher answers v_null + w·(v − v_null) instead of v.                        (6)
Why reverse? KL(fake ‖ real) punishes what the student makes and data do not, blur and ghosts, and
forgives what it leaves out: sharper pictures, less variety.

Self-rollout. In play the student's context is its own output, so it is trained there: segment after
segment, its last 4 latents are the next past, its memory comes from all it made. Earlier segments run
to their last step; the last one stops at a random step, and that one forward pass alone has a graph.

What differs. Open in the paper, ours: 3 steps of the shift-5 grid, fresh noise between them; τ drawn
like σ, then CLAMPED to [.02, .98] (one draw in eleven is exactly .98); "n updates" read as n critic
updates per student update (turns offers both); the mask p = 0.2 on past and memory makes a rollout a
single image-to-video segment. A judge on the critic's last features (off by default) pulls towards
true latents: DMD can be no sharper than its teacher.

Try it: python dmd.py      Tests: pytest tests/test_dmd.py
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flow
from context import Clip, Context, Lens, Memory, Segment, Window
from memory import MemoryBank


@dataclass(frozen=True)
class DMDConfig:
    steps: int = 3  # of the student
    shift: float = 5.0  # of its σ grid and of τ
    tau_min: float = 0.02  # below, teacher and critic agree on everything
    tau_max: float = 0.98  # above, they know nothing
    guidance: float = 1.0  # of the teacher, as in flow.sample: 1 is none, 4 the lineage's "w = 3"
    segments: int = 6  # K: longest self-rollout, in segments of 10 new latents
    most: int = 12  # segments of a rollout when they are short: as far in time, if these suffice
    lens: Lens = Lens()  # how cameras are told
    sink: bool = True  # the last memory is always the oldest latent
    p_mask: float = 0.2  # share of rollouts without past and memory: one image-to-video segment


# ---- what an iteration draws -------------------------------------------------------------------


def draw_segments(
    cfg: DMDConfig, generator: torch.Generator | None = None, new: int = Window.new
) -> int:
    """k ~ U{1..K}, or 1 where past and memory are masked. The same on every rank that has the same seed."""
    masked = float(torch.rand((), generator=generator)) < cfg.p_mask
    as_far = 1 + (cfg.segments - 1) * Window.new // new
    longest = min(as_far, max(cfg.segments, cfg.most))
    k = int(torch.randint(1, longest + 1, (), generator=generator))
    return 1 if masked else k


def draw_exit(cfg: DMDConfig, generator: torch.Generator | None = None) -> int:
    """At which of its steps the student leaves the last segment."""
    return int(torch.randint(cfg.steps, (), generator=generator))


def turns(step: int, ratio: int) -> tuple[bool, bool]:
    """Is it the critic's turn, is it the student's? ratio n > 0: n critic updates per student update
    (our reading); n < 0: −n student updates per critic update."""
    if ratio == 0:
        raise ValueError(
            "ratio must be n > 0 (critic updates per student update) or n < 0 (reversed), got 0"
        )
    critics = ratio > 0 or step % -ratio == 0
    students = ratio < 0 or step % ratio == 0
    return critics, students


def draw_tau(B: int, cfg: DMDConfig, generator: torch.Generator | None = None) -> Tensor:
    """(B,) at which noise levels teacher and critic are compared."""
    return flow.sample_sigma(B, cfg.shift, generator).clamp(cfg.tau_min, cfg.tau_max)


# ---- the two losses ----------------------------------------------------------------------------


def generator_loss(
    x0: Tensor,  # (B, C, N, h, w) of the student, with its graph
    context: Context,  # what the student was given
    real: Callable,  # teacher
    fake: Callable,  # critic
    cfg: DMDConfig = DMDConfig(),
    generator: torch.Generator | None = None,
) -> Tensor:  # scalar: its value says little, its gradient is Eq. 8's
    """Move x to where the teacher would put it, away from where the critic would."""
    with torch.no_grad():
        x = x0.detach().float()
        tau = draw_tau(len(x), cfg, generator).to(x)
        x_tau = flow.add_noise(x, flow.fresh(x, generator), tau)  # (1)

        # where it came from, says the teacher, and where, says the critic
        v_real = real(x_tau, tau, context).float()
        if cfg.guidance != 1:
            v_null = real(x_tau, tau, context.null()).float()
            v_real = v_null + cfg.guidance * (v_real - v_null)  # (6)
        x_real = flow.x0_from_v(x_tau, v_real, tau)  # (2)
        v_fake = fake(x_tau, tau, context).float()
        x_fake = flow.x0_from_v(x_tau, v_fake, tau)

        # a student that is right already divides by zero: no pull
        error = (x - x_real).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1)
        g = ((x_fake - x_real) / error).nan_to_num(0.0, 0.0, 0.0)  # (3)
    return 0.5 * (x0.float() - (x - g)).square().mean()  # (4)


def critic_loss(
    x0: Tensor,  # (B, C, N, h, w) of the student
    context: Context,
    fake: Callable,
    cfg: DMDConfig = DMDConfig(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Plain flow matching with the student's x in the place of data."""
    x = x0.detach().float()
    tau = draw_tau(len(x), cfg, generator).to(x)
    noise = flow.fresh(x, generator)
    v = fake(flow.add_noise(x, noise, tau), tau, context).float()
    return (v - flow.velocity(x, noise)).square().mean()  # (5)


# ---- a judge of sharpness, off by default --------------------------------------------------------


class Judge(nn.Module):
    """Tells true latents from generated ones by the critic's last features: one logit per token.

    DMD can be no sharper than its teacher; data are. The judge sees the new latents alone, at noise
    level τ: with past and memory it would find the student by its blurred context, not by its picture.
    """

    def __init__(self, width: int, hidden: int = 64):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.logit = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> Tensor:  # (B, N, S, D) -> (B, N, S)
        return self.logit(F.silu(self.hidden(self.norm(features.float())))).squeeze(-1)


def judge_loss(
    x0: Tensor,  # (B, C, N, h, w) of the student
    true: Tensor,  # (B, C, N, h, w) what the world showed there
    context: Context,
    judge: Callable,  # (x_τ, τ, context) -> a logit per token
    cfg: DMDConfig = DMDConfig(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Cross-entropy of a judge that should say yes to true and no to generated latents, equally noisy."""
    tau = draw_tau(len(x0), cfg, generator).to(x0)
    noise = flow.fresh(x0, generator)
    alone = context.alone()
    says_true = judge(flow.add_noise(true, noise, tau), tau, alone)
    says_made = judge(flow.add_noise(x0.detach(), noise, tau), tau, alone)
    return F.softplus(-says_true).mean() + F.softplus(says_made).mean()


def adversarial_loss(
    x0: Tensor,  # (B, C, N, h, w) of the student, with its graph
    context: Context,
    judge: Callable,
    cfg: DMDConfig = DMDConfig(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """What the student pays for being recognised."""
    tau = draw_tau(len(x0), cfg, generator).to(x0)
    x_tau = flow.add_noise(x0, flow.fresh(x0, generator), tau)
    return F.softplus(-judge(x_tau, tau, context.alone())).mean()


# ---- the student at work -----------------------------------------------------------------------


def few_step(
    student: Callable,
    context: Context,
    noise: Tensor,  # (B, C, N, h, w)
    exit_step: int | None = None,  # give this step's clean estimate; None: the last one's
    cfg: DMDConfig = DMDConfig(),
    generator: torch.Generator | None = None,
) -> Tensor:  # (B, C, N, h, w) x0, with the graph of the exit step alone
    """The sampler that the student is played with, left at a step of choice."""
    exit_step = cfg.steps - 1 if exit_step is None else exit_step
    graph = torch.is_grad_enabled()

    def v(x: Tensor, sigma: float) -> Tensor:
        at = torch.full((len(x),), sigma, device=x.device)
        return student(x, at, context).float()

    estimates = flow.renoise(v, noise, flow.sigma_grid(cfg.steps, cfg.shift), generator)
    for step in range(exit_step + 1):
        with torch.set_grad_enabled(graph and step == exit_step):
            x0 = next(estimates)
    return x0


def rollout(
    student: Callable,
    clip: Clip,  # latent 0, cameras and actions of every frame: the world and the ways to go
    segments: int,  # k, from draw_segments
    exit_step: int | None = None,  # of the last segment; None finishes it
    cfg: DMDConfig = DMDConfig(),
    generator: torch.Generator | None = None,
    new: int = Window.new,  # latents per segment after the first
) -> tuple[Tensor, Context]:  # the last segment's x0 (B, C, N, h, w), and its context
    """Let the student live on its own output; only the exit step of the last segment has a graph."""
    window = Window(new=new)
    frames = window.frames(segments)
    if segments < 1 or clip.c2w.shape[1] < frames:
        raise ValueError(
            f"{segments} segments need cameras and actions of {frames} frames (and at least one "
            f"segment), the clip has {clip.c2w.shape[1]}"
        )
    graph = torch.is_grad_enabled()
    past = clip.latents[:, :, :1]
    rule = "released" if cfg.lens.encoding == "released" else "uniform"
    banks = [MemoryBank(rule) for _ in past]
    remember(banks, past, Segment.cut(clip, 0, 1))

    for k in range(segments):
        last = k == segments - 1
        first, end, P = window.segment(k)
        N = end - first - P
        past = past[:, :, -P:]

        # what the student is told: what it made, what it remembers, where the player goes
        segment = Segment.cut(clip, first, end - first, cfg.lens.encoding)
        found = recall(banks, segment.asking(N), first, cfg.sink) if k else None
        context = segment.context(past, clip.text, found, cfg.lens).to(past.device)

        # one segment; the gradient is that of the last one's exit step
        noise = flow.fresh(past[:, :, :1].expand(-1, -1, N, -1, -1), generator)
        with torch.set_grad_enabled(graph and last):
            x0 = few_step(student, context, noise, exit_step if last else None, cfg, generator)
        if not last:
            remember(banks, x0, segment)
            past = torch.cat([past, x0.to(past)], 2)[:, :, -window.past :]
    return x0, context


def remember(banks: list[MemoryBank], latents: Tensor, segment: Segment) -> None:
    """The newest latents of a segment, each world in its own bank."""
    n = latents.shape[2]
    for row, bank in enumerate(banks):
        cameras = segment.cameras[row, -n:].float()
        bank.append(latents[row], cameras, segment.times[row, -n:])


def recall(banks: list[MemoryBank], query: Tensor, before: int, sink: bool = True) -> Memory:
    """What each world of the batch remembers of its own past; query (B, M, 4, 4)."""
    found = []
    for bank, ask in zip(banks, query, strict=True):
        slots, _ = bank.retrieve(ask.float(), before, sink=sink)
        found.append(bank.read(slots))
    return Memory(
        latents=torch.cat([memory.latents for memory in found]),
        times=torch.cat([memory.times for memory in found]),
        cameras=torch.cat([memory.cameras for memory in found]),
    )


# ---- a Gaussian world, where every answer is known ---------------------------------------------


class Gaussian(nn.Module):
    """The exact velocity of data ~ N(mean, factor·factorᵀ): a perfect teacher, or what critics become."""

    def __init__(self, mean: Tensor, factor: Tensor):  # (C,), (C, C)
        super().__init__()
        self.mean = nn.Parameter(mean)
        self.factor = nn.Parameter(factor)

    def forward(self, x_sigma: Tensor, sigma: Tensor, context: object) -> Tensor:  # (B, C, 1, 1, 1)
        cov = self.factor @ self.factor.T
        s = sigma[:, None]
        white = torch.eye(len(cov))
        spread = (1 - s[..., None]) ** 2 * cov + s[..., None] ** 2 * white  # of x_σ
        # E[x0 | x_σ] = μ + (1−σ)·Σ·[(1−σ)²Σ + σ²I]⁻¹·(x_σ − (1−σ)·μ)
        away = x_sigma.flatten(1) - (1 - s) * self.mean
        x0 = self.mean + (1 - s) * (torch.linalg.solve(spread, away) @ cov)
        return (x_sigma - x0.view_as(x_sigma)) / flow.per_sample(sigma, x_sigma)  # v = (x_σ − x̂0)/σ


class Affine(nn.Module):
    """The smallest student: at each of its steps x̂0 = A·x + b."""

    def __init__(self, C: int, cfg: DMDConfig):
        super().__init__()
        self.sigmas = flow.sigma_grid(cfg.steps, cfg.shift)[:-1]
        self.A = nn.Parameter(0.3 * torch.eye(C).repeat(cfg.steps, 1, 1))
        self.b = nn.Parameter(torch.zeros(cfg.steps, C))

    def forward(self, x_sigma: Tensor, sigma: Tensor, context: object) -> Tensor:
        i = (self.sigmas - sigma[0]).abs().argmin()
        x0 = x_sigma.flatten(1) @ self.A[i].T + self.b[i]
        return (x_sigma - x0.view_as(x_sigma)) / flow.per_sample(sigma, x_sigma)


def distil_gaussian(real: Gaussian, iterations: int = 600, seed: int = 0) -> Iterator[Affine]:
    """The whole algorithm at the size of a proof; yields the student after every iteration.

    Rollouts end at the last step here. With random exits the critic sees the mixture of what the exits
    make, and a critic that can only be one Gaussian finds no fault with a mixture whose two moments
    are right.
    """
    cfg = DMDConfig()
    g = torch.Generator().manual_seed(seed)
    C = len(real.mean)
    student = Affine(C, cfg)
    fake = Gaussian(torch.zeros(C), torch.eye(C))
    opt = torch.optim.Adam(student.parameters(), betas=(0.0, 0.99))
    opt_fake = torch.optim.Adam(fake.parameters(), betas=(0.0, 0.99))
    for step in range(iterations):
        fade = min(1.0, 1.5 * (1 - step / iterations))
        opt.param_groups[0]["lr"] = 0.03 * fade
        opt_fake.param_groups[0]["lr"] = 0.06 * fade
        noise = torch.randn(1024, C, 1, 1, 1, generator=g)
        x0 = few_step(student, None, noise, cfg=cfg, generator=g)

        # the student every second time, the critic always
        if turns(step, 2)[1]:
            opt.zero_grad()
            generator_loss(x0, None, real, fake, cfg, g).backward()
            opt.step()
        opt_fake.zero_grad()
        critic_loss(x0, None, fake, cfg, g).backward()
        opt_fake.step()
        yield student


def toy_teacher() -> Gaussian:
    factor = torch.tensor([[1.0, 0, 0], [0.6, 0.5, 0], [-0.3, 0.2, 0.8]])
    return Gaussian(torch.tensor([1.0, -0.5, 2.0]), factor).requires_grad_(False)


@torch.no_grad()
def distance(student: Affine, real: Gaussian) -> tuple[float, float]:
    """How far the student's mean and covariance are from the data's, relatively."""
    noise = torch.randn(200_000, len(real.mean), 1, 1, 1)
    x0 = few_step(student, None, noise).flatten(1)
    cov = real.factor @ real.factor.T
    mean_off = (x0.mean(0) - real.mean).norm() / real.mean.norm()
    cov_off = (x0.T.cov() - cov).norm() / cov.norm()
    return mean_off.item(), cov_off.item()


def main() -> None:
    """A student of three affine steps becomes its teacher's Gaussian, without seeing one sample of it."""
    torch.manual_seed(0)
    teacher = toy_teacher()
    for i, student in enumerate(distil_gaussian(teacher)):
        if i in (0, 100, 200, 400, 599):
            mean, cov = distance(student, teacher)
            print(f"iteration {i:3d}: student off by {mean:6.1%} in mean, {cov:6.1%} in covariance")

    # the gradient is that of a distance: nothing pulls where critic and teacher agree
    x0 = torch.randn(64, 3, 1, 1, 1, requires_grad=True)
    other = Gaussian(torch.zeros(3), torch.eye(3))
    for name, critic in (("equals the teacher", toy_teacher()), ("is another Gaussian", other)):
        x0.grad = None
        generator_loss(x0, None, teacher, critic).backward()
        print(f"largest gradient where the critic {name}: {x0.grad.abs().max():.0e}")


if __name__ == "__main__":
    main()
