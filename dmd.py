"""Turn the many-step model into a 3-step one by training it on its own output.

What it does. Three networks start as copies of one trained base. The student makes segments in
three steps. The teacher ("real") stays the base and knows what data look like. The critic ("fake")
keeps learning what the student's segments look like. Every update moves the student's output away
from where the critic expects it, to where the teacher does.
Paper: §3.3, Eq. 8, Fig. 6.  Released: the student's weights; no training code.

Why it works. The student turns noise z into x = G_θ(z); such x should be distributed as data. With
noise added, both densities are smooth and overlap; call them fake_τ and real_τ at level τ:

    x_τ = (1 − τ)·x + τ·ε,    ε ~ N(0, I)                                                      (1)
    KL(fake_τ ‖ real_τ) = E[log fake_τ(x_τ) − log real_τ(x_τ)],    x_τ ~ fake_τ

Differentiate by θ, which enters twice. Through the density fake_τ: E[∂_θ log fake_τ] = ∫ ∂_θ fake_τ
= ∂_θ 1 = 0. And through the sample x_τ: the chain rule, with ∂x_τ/∂x = 1 − τ by (1). What is left
needs no density, only the scores s = ∇ log fake_τ and ∇ log real_τ:

    ∇_θ KL = E[(s_fake(x_τ) − s_real(x_τ))·(1 − τ)·∂x/∂θ]                    Eq. 8

A network that predicts velocities knows the score. If x has the density p, x_τ has the density
∫ p(x)·N(x_τ; (1 − τ)·x, τ²) dx. The gradient of its logarithm is −(x_τ − (1 − τ)·x)/τ², averaged
over all x that may lie behind x_τ, which puts the mean x̂ in the place of x (Tweedie):

    x̂ = E[x | x_τ] = x_τ − τ·v                                 v: the predicted velocity       (2)
    s(x_τ) = −(x_τ − (1 − τ)·x̂)/τ²
    s_fake − s_real = (1 − τ)/τ²·(x̂_fake − x̂_real)

With the 1 − τ of Eq. 8 that is a weight of (1 − τ)²/τ². It only weighs levels against each other:
for small τ it multiplies what the networks get wrong, and near 1 next to nothing pulls. DMD divides
by the teacher's error instead: all τ above .2 or so pull about equally, lower ones less.

    g = (x̂_fake − x̂_real) / mean|x − x̂_real|                                                   (3)

The student's loss is made so that its gradient by x is g; stopgrad(...) counts as a constant:

    L_student = ½·mean (x − stopgrad(x − g))²       so that ∂L/∂x = g / (number of entries)    (4)
    L_critic  = mean (v_fake(x_τ, τ) − (ε − x))²    flow matching with x in the place of data  (5)
    v_real    = v_null + w·(v − v_null)             the teacher under guidance; w = 1: without (6)

Why this direction of KL? KL(fake ‖ real) punishes what the student makes and data do not contain,
blur and ghosts, but not what it leaves out: the pictures are sharper, and vary less.

Self-rollout. In play the student's context is its own output, so it is trained with that: it makes
k segments in a row, each with the last 4 latents as past and memory from all it made. The losses
see the last segment only. That one stops at a random step, so that all three steps learn; its clean
estimate is x, and only this one forward pass is differentiated. The first iterations (--cold-start;
paper: 600) are no rollouts: one segment, whose past and memory are true, with more critic updates
for each of the student's (train.py).

What differs. Open in the paper, chosen here: 3 steps of flow.py's grid with fresh noise in
between; τ drawn like the σ of training, then clamped to [.02, .98] (with a shift of 5, one draw in
eleven becomes .98); "n updates" as n critic updates per student update (turns has the other reading
too); past and memory masked with chance 0.2: the rollout is then one segment that starts from an image.
Ours, off by default: a judge that pulls towards true latents (Judge).

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
    shift: float = 5.0  # of its σ grid and of τ, see flow.py
    tau_min: float = 0.02  # below, x_τ shows x itself, and teacher and critic say the same
    tau_max: float = 0.98  # above, x_τ shows nothing of x
    guidance: float = 1.0  # w of (6), as in flow.sample; other code calls w − 1 the guidance
    segments: int = 6  # the longest rollout, in segments of 10 new latents
    most: int = 12  # of shorter segments: as many as reach as far in time, but no more than these
    lens: Lens = Lens()  # how cameras are told
    sink: bool = True  # the last memory is always latent 1
    p_mask: float = 0.2  # chance that a rollout is cut to one segment from an image, without memory


# ---- what an iteration draws -------------------------------------------------------------------


def draw_segments(
    cfg: DMDConfig,
    generator: torch.Generator | None = None,
    new: int = Window.new,
    frames: int = 10_000,  # of the clip: a rollout ends where its actions end
) -> int:
    """How many segments a rollout has: uniform in 1 .. longest, or 1 if past and memory are masked.

    Ranks that draw with the same seed agree.
    """
    masked = float(torch.rand((), generator=generator)) < cfg.p_mask
    as_far = 1 + (cfg.segments - 1) * Window.new // new
    longest = min(as_far, max(cfg.segments, cfg.most))
    while longest > 1 and Window(new=new).frames(longest) > frames:
        longest -= 1
    k = int(torch.randint(1, longest + 1, (), generator=generator))
    return 1 if masked else k


def draw_exit(cfg: DMDConfig, generator: torch.Generator | None = None) -> int:
    """At which step, 0 .. steps − 1, the last segment of a rollout stops."""
    return int(torch.randint(cfg.steps, (), generator=generator))


def turns(step: int, ratio: int) -> tuple[bool, bool]:
    """Is it the critic's turn, is it the student's?

    ratio n > 0: n critic updates per student update (our reading of the paper); n < 0: the reverse,
    −n student updates per critic update.
    """
    if ratio == 0:
        raise ValueError(
            "ratio must be n > 0 (critic updates per student update) or n < 0 (reversed), got 0"
        )
    critics = ratio > 0 or step % -ratio == 0
    students = ratio < 0 or step % ratio == 0
    return critics, students


def draw_tau(B: int, cfg: DMDConfig, generator: torch.Generator | None = None) -> Tensor:
    """(B,) noise levels at which teacher and critic are compared."""
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
    """L_student: the student is what DMD calls the generator.

    (The argument `generator` is another thing, here as everywhere: it draws random numbers.)
    """
    with torch.no_grad():
        x = x0.detach().float()
        tau = draw_tau(len(x), cfg, generator).to(x)
        x_tau = flow.add_noise(x, flow.noise_like(x, generator), tau)  # (1)

        # where x_τ came from: the teacher's estimate x̂_real and the critic's x̂_fake
        v_real = real(x_tau, tau, context).float()
        if cfg.guidance != 1:
            v_null = real(x_tau, tau, context.null()).float()
            v_real = v_null + cfg.guidance * (v_real - v_null)  # (6)
        x_real = flow.x0_from_v(x_tau, v_real, tau)  # (2)
        v_fake = fake(x_tau, tau, context).float()
        x_fake = flow.x0_from_v(x_tau, v_fake, tau)

        # an x that is exactly the teacher's estimate would divide by zero: it is not moved
        error = (x - x_real).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1)  # of each sample
        g = ((x_fake - x_real) / error).nan_to_num(0.0, 0.0, 0.0)  # (3)
    return 0.5 * (x0.float() - (x - g)).square().mean()  # (4)


def critic_loss(
    x0: Tensor,  # (B, C, N, h, w) of the student
    context: Context,
    fake: Callable,
    cfg: DMDConfig = DMDConfig(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """L_critic: plain flow matching with the student's x in the place of data."""
    x = x0.detach().float()
    tau = draw_tau(len(x), cfg, generator).to(x)
    noise = flow.noise_like(x, generator)
    v = fake(flow.add_noise(x, noise, tau), tau, context).float()
    return (v - flow.velocity(x, noise)).square().mean()  # (5)


# ---- a judge of sharpness, off by default --------------------------------------------------------


class Judge(nn.Module):
    """Tells true latents from generated ones by the critic's last features: one logit per token.

    The student of DMD becomes as sharp as its teacher at best, and data are sharper. The judge sees
    the new latents alone, at noise level τ: a blurred past would tell it which ones are generated
    before it had looked at them.
    """

    def __init__(self, width: int, hidden: int = 64):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.logit = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> Tensor:  # (B, N, S, D) -> (B, N, S), S places a latent
        return self.logit(F.silu(self.hidden(self.norm(features.float())))).squeeze(-1)


def judge_loss(
    x0: Tensor,  # (B, C, N, h, w) of the student
    true: Tensor,  # (B, C, N, h, w) of the clip, at the same times
    context: Context,
    judge: Callable,  # (x_τ, τ, context) -> a logit per token
    cfg: DMDConfig = DMDConfig(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """The judge's own loss: cross-entropy of "true" for true and "made" for generated latents."""
    tau = draw_tau(len(x0), cfg, generator).to(x0)
    noise = flow.noise_like(x0, generator)
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
    """The student's extra loss: cross-entropy of "true" for what it generated."""
    tau = draw_tau(len(x0), cfg, generator).to(x0)
    x_tau = flow.add_noise(x0, flow.noise_like(x0, generator), tau)
    return F.softplus(-judge(x_tau, tau, context.alone())).mean()


# ---- the student at work -----------------------------------------------------------------------


def few_step(
    student: Callable,
    context: Context,
    noise: Tensor,  # (B, C, N, h, w)
    exit_step: int | None = None,  # stop here and return this step's x̂0; None: the last step
    cfg: DMDConfig = DMDConfig(),
    generator: torch.Generator | None = None,
) -> Tensor:  # (B, C, N, h, w) x0, with the graph of the exit step alone
    """The sampler that the student is played with, flow.renoise, as far as exit_step."""
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
    clip: Clip,  # used of it: latent 0, and text, cameras and actions of every frame
    segments: int,  # k, from draw_segments
    exit_step: int | None = None,  # of the last segment; None finishes it
    cfg: DMDConfig = DMDConfig(),
    generator: torch.Generator | None = None,
    new: int = Window.new,  # latents per segment after the first
) -> tuple[Tensor, Context]:  # the last segment's x0 (B, C, N, h, w), and its context
    """Segment after segment on the student's own output, as in play.

    Gradients are kept for the exit step of the last segment only.
    """
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

        # its context: its own latents as past, what it finds in its banks, where the player goes
        segment = Segment.cut(clip, first, end - first, cfg.lens.encoding)
        found = recall(banks, segment.asking(N), first, cfg.sink) if k else None
        context = segment.context(past, clip.text, found, cfg.lens).to(past.device)

        # the noise has the shape of N latents; only the last segment may stop early
        noise = flow.noise_like(past[:, :, :1].expand(-1, -1, N, -1, -1), generator)
        with torch.set_grad_enabled(graph and last):
            x0 = few_step(student, context, noise, exit_step if last else None, cfg, generator)
        if not last:
            remember(banks, x0, segment)
            past = torch.cat([past, x0.to(past)], 2)[:, :, -window.past :]
    return x0, context


def remember(banks: list[MemoryBank], latents: Tensor, segment: Segment) -> None:
    """Store the newest latents of a segment, each sample of the batch in its own bank."""
    n = latents.shape[2]
    for row, bank in enumerate(banks):
        cameras = segment.cameras[row, -n:].float()
        bank.append(latents[row], cameras, segment.times[row, -n:])


def recall(banks: list[MemoryBank], query: Tensor, before: int, sink: bool = True) -> Memory:
    """Memory for every sample of the batch from its own bank; query (B, M, 4, 4)."""
    found = []
    for bank, ask in zip(banks, query, strict=True):
        rows, _ = bank.retrieve(ask.float(), before, sink=sink)
        found.append(bank.read(rows))
    return Memory(
        latents=torch.cat([memory.latents for memory in found]),
        times=torch.cat([memory.times for memory in found]),
        cameras=torch.cat([memory.cameras for memory in found]),
    )


# ---- a Gaussian world, where every answer is known ---------------------------------------------


class Gaussian(nn.Module):
    """The exact velocity of data ~ N(μ, Σ), Σ = factor·factorᵀ, as teacher; to be learned, as critic.

    The best guess at x0 is linear, E[x0 | x_σ] = μ + (1−σ)·Σ·[(1−σ)²·Σ + σ²·I]⁻¹·(x_σ − (1−σ)·μ):
    the covariance of x0 and x_σ times the inverse variance of x_σ.
    """

    def __init__(self, mean: Tensor, factor: Tensor):  # (C,), (C, C)
        super().__init__()
        self.mean = nn.Parameter(mean)
        self.factor = nn.Parameter(factor)

    def forward(self, x_sigma: Tensor, sigma: Tensor, context: object) -> Tensor:  # (B, C, 1, 1, 1)
        cov = self.factor @ self.factor.T
        s = sigma[:, None]  # (B, 1)
        white = torch.eye(len(cov))
        spread = (1 - s[..., None]) ** 2 * cov + s[..., None] ** 2 * white  # (B, C, C) of x_σ
        away = x_sigma.flatten(1) - (1 - s) * self.mean  # (B, C)
        x0 = self.mean + (1 - s) * (torch.linalg.solve(spread, away) @ cov)
        return (x_sigma - x0.view_as(x_sigma)) / flow.per_sample(sigma, x_sigma)  # v = (x_σ − x̂0)/σ


class Affine(nn.Module):
    """The smallest student: x̂0 = A·x_σ + b, with an A and a b for each of its steps."""

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
    """The whole algorithm on C numbers instead of a video; yields the student after every iteration.

    Without random exits: what three exits make together is a mixture of Gaussians, and this critic,
    itself one Gaussian, is content as soon as mean and covariance of the mixture are right.
    """
    cfg = DMDConfig()
    generator = torch.Generator().manual_seed(seed)
    C = len(real.mean)
    student = Affine(C, cfg)
    fake = Gaussian(torch.zeros(C), torch.eye(C))
    opt = torch.optim.Adam(student.parameters(), betas=(0.0, 0.99))
    opt_fake = torch.optim.Adam(fake.parameters(), betas=(0.0, 0.99))
    for step in range(iterations):
        fade = min(1.0, 1.5 * (1 - step / iterations))
        opt.param_groups[0]["lr"] = 0.03 * fade
        opt_fake.param_groups[0]["lr"] = 0.06 * fade
        noise = torch.randn(1024, C, 1, 1, 1, generator=generator)
        x0 = few_step(student, None, noise, cfg=cfg, generator=generator)

        # the student every second time, the critic always
        if turns(step, 2)[1]:
            opt.zero_grad()
            generator_loss(x0, None, real, fake, cfg, generator).backward()
            opt.step()
        opt_fake.zero_grad()
        critic_loss(x0, None, fake, cfg, generator).backward()
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
    """A student of three affine steps comes to make its teacher's Gaussian, without a sample of it."""
    torch.manual_seed(0)
    teacher = toy_teacher()
    for i, student in enumerate(distil_gaussian(teacher)):
        if i in (0, 100, 200, 400, 599):
            mean, cov = distance(student, teacher)
            print(f"iteration {i:3d}: student off by {mean:6.1%} in mean, {cov:6.1%} in covariance")

    # where critic and teacher agree the gradient vanishes, as that of a distance should
    x0 = torch.randn(64, 3, 1, 1, 1, requires_grad=True)
    other = Gaussian(torch.zeros(3), torch.eye(3))
    for name, critic in (("equals the teacher", toy_teacher()), ("is another Gaussian", other)):
        x0.grad = None
        generator_loss(x0, None, teacher, critic).backward()
        print(f"largest gradient where the critic {name}: {x0.grad.abs().max():.0e}")


if __name__ == "__main__":
    main()
