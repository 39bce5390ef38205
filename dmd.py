"""Turn the many-step model into a 3-step one by judging what it makes of its own output.

Paper: section 3.3, Eq. 8, Fig. 6. Training code: not released; the loss has Self-Forcing's (DMD2's) form.

Student G, teacher ("real") and critic ("fake") start as copies of one memory-augmented base. x = G(noise, c)
is what the student makes; the critic learns what that looks like, the teacher knows what data look like.

    x_τ = (1−τ)·x + τ·ε                             re-noise the student's output
    ∇KL(fake_τ ‖ real_τ) = E[(s_fake − s_real)(x_τ)·(1−τ)·∂x/∂θ]          Eq. 8; s = gradient of log density
    s = −(x_τ − (1−τ)·x̂)/τ²                         a score is a clean estimate x̂ = x_τ − τ·v in disguise
    s_fake − s_real = (1−τ)/τ²·(x̂_fake − x̂_real)
    g = (x̂_fake − x̂_real) / mean|x − x̂_real|        factors of τ dropped, the teacher's own error divides
    L_student = ½·mean (x − stopgrad(x − g))²       so that ∂L/∂x = g / numel             generator_loss
    L_critic  = mean (v_fake(x_τ', τ') − (ε' − x))²  flow matching on the student's x      critic_loss

If fake equals real, g is 0. All three see the same context: past, memory, actions, cameras, text.

Self-rollout: segment after segment on the student's own output; its last 4 latents are the next past, the
memory is retrieved from the pool of all it made. Earlier segments run to their last step; the last one stops
at a random step, and that one forward pass alone has a graph. Cold start: few_step on true past and memory.

Open in the paper, ours: 3 steps of the shift-5 grid, fresh noise between; τ shifted uniform in [.02, .98];
"n updates" read as n critic updates per student update (turns() offers both); the mask p = 0.2 on past and
memory makes the rollout a single image-to-video segment; guidance in the teacher is a setting (train.py: 3).

How well it went is judged without downloaded networks, by pictures beside the truth; evaluate.py asks for it:
    TWFD = |μ₁−μ₂|² + tr(C₁ + C₂ − 2 (C₁^½ C₂ C₁^½)^½)      of 64 principal components of 8x8 frames      frechet
    (JᵀJ + λ diag JᵀJ) Δ = −Jᵀe                     where a picture was taken                             register
    match(x, d) = exp(−10·|after(x + d) − before(x)|)       which keys were held between two             KeyReader

Demo: python dmd.py      Tests: pytest tests/test_dmd.py
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dit
import memory
from memory import Context, Memory, MemoryBank, Window


@dataclass(frozen=True)
class DMDConfig:
    steps: int = 3  # of the student
    shift: float = 5.0  # of its σ grid and of τ
    tau_min: float = 0.02  # below, teacher and critic agree on everything
    tau_max: float = 0.98  # above, they know nothing
    guidance: float = 1.0  # of the teacher, as in dit.sample: 1 is none, 4 the lineage's "w = 3"
    segments: int = 6  # K: longest self-rollout, in segments of 10 new latents
    most: int = 12  # segments of a rollout when they are short: as far in time, if these suffice
    p_mask: float = 0.2  # share of rollouts without past and memory: one image-to-video segment


@dataclass(frozen=True)
class Clip:
    """The world a rollout happens in: one true latent, and where the player goes."""

    image: Tensor  # (B, C, 1, h, w) latent 0
    c2w: Tensor  # (B, F, 4, 4) of every frame, F >= Window().frames(segments)
    keyboard: Tensor  # (B, F, 6)
    mouse: Tensor  # (B, F, 2)
    text: Tensor  # (B, n, text_dim)
    encoding: str = "anchored"  # of the rays, as in memory.make_context
    stride: int = 8  # pixels per latent cell
    sink: bool = True  # the last memory is always the oldest latent


# ---- what an iteration draws -----------------------------------------------------------------------------


def draw_segments(
    cfg: DMDConfig, generator: torch.Generator | None = None, new: int = Window.new
) -> int:
    """k ~ U{1..K}, or 1 where past and memory are masked. The same on every rank that has the same seed."""
    masked = float(torch.rand((), generator=generator)) < cfg.p_mask
    as_far = 1 + (cfg.segments - 1) * Window.new // new
    longest = min(as_far, max(cfg.segments, cfg.most))
    k = int(torch.randint(1, longest + 1, (), generator=generator))
    return 1 if masked else k


def draw_exit(
    cfg: DMDConfig, generator: torch.Generator | None = None
) -> int:  # step of the last segment
    return int(torch.randint(cfg.steps, (), generator=generator))


def turns(
    step: int, ratio: int
) -> tuple[bool, bool]:  # is it the critic's turn, is it the student's?
    """n > 0: n critic updates per student update (our reading). n < 0: −n student updates per critic's."""
    if ratio == 0:
        raise ValueError(
            "ratio must be n > 0 (critic updates per student update) or n < 0 (reversed), got 0"
        )
    return ratio > 0 or step % -ratio == 0, ratio < 0 or step % ratio == 0


def draw_tau(B: int, cfg: DMDConfig, generator: torch.Generator | None = None) -> Tensor:  # (B,)
    return dit.sample_sigma(B, cfg.shift, generator).clamp(cfg.tau_min, cfg.tau_max)


def fresh(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise drawn on the CPU: the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like)


# ---- the two losses --------------------------------------------------------------------------------------


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
        x_tau = dit.add_noise(x, fresh(x, generator), tau)  # x_τ = (1−τ)·x + τ·ε
        v_real = real(x_tau, tau, context).float()
        if cfg.guidance != 1:  # v = v_null + g·(v_full − v_null)
            v_null = real(x_tau, tau, context.null()).float()
            v_real = v_null + cfg.guidance * (v_real - v_null)
        x_real = dit.x0_from_v(x_tau, v_real, tau)  # x̂ = x_τ − τ·v
        x_fake = dit.x0_from_v(x_tau, fake(x_tau, tau, context).float(), tau)
        # g = (x̂_fake − x̂_real) / mean|x − x̂_real|
        error = (x - x_real).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1)
        g = ((x_fake - x_real) / error).nan_to_num(0.0, 0.0, 0.0)
    # L = ½·mean (x − stopgrad(x − g))²
    return 0.5 * (x0.float() - (x - g)).square().mean()


def critic_loss(
    x0: Tensor,  # (B, C, N, h, w) of the student
    context: Context,
    fake: Callable,
    cfg: DMDConfig = DMDConfig(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Plain flow matching with the student's x in the place of data."""
    x = x0.detach().float()
    tau, noise = draw_tau(len(x), cfg, generator).to(x), fresh(x, generator)
    v = fake(dit.add_noise(x, noise, tau), tau, context).float()
    return (v - dit.velocity(x, noise)).square().mean()  # ‖v_fake − (ε' − x)‖²


# ---- a judge of sharpness, off by default ------------------------------------------------------------------


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
    features: Callable,  # the critic's: (x_τ, τ, context) -> (B, N, S, D)
    judge: nn.Module,
    cfg: DMDConfig = DMDConfig(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Cross-entropy of a judge that should say yes to true and no to generated latents, equally noisy."""
    tau = draw_tau(len(x0), cfg, generator).to(x0)
    noise = fresh(x0, generator)
    alone = context.alone()
    says_true = judge(features(dit.add_noise(true, noise, tau), tau, alone))
    says_made = judge(features(dit.add_noise(x0.detach(), noise, tau), tau, alone))
    return F.softplus(-says_true).mean() + F.softplus(says_made).mean()


def adversarial_loss(
    x0: Tensor,  # (B, C, N, h, w) of the student, with its graph
    context: Context,
    features: Callable,
    judge: nn.Module,
    cfg: DMDConfig = DMDConfig(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """What the student pays for being recognised."""
    tau = draw_tau(len(x0), cfg, generator).to(x0)
    x_tau = dit.add_noise(x0, fresh(x0, generator), tau)
    return F.softplus(-judge(features(x_tau, tau, context.alone()))).mean()


# ---- the student at work ---------------------------------------------------------------------------------


def few_step(
    student: Callable,
    context: Context,
    noise: Tensor,  # (B, C, N, h, w)
    exit_step: int | None = None,  # give this step's clean estimate; None: the last one's
    cfg: DMDConfig = DMDConfig(),
    generator: torch.Generator | None = None,
) -> Tensor:  # (B, C, N, h, w) x0, with the graph of the exit step alone
    """dit.sample(…, "renoise") with a way out and a gradient."""
    sigmas = dit.sigma_grid(cfg.steps, cfg.shift).tolist()
    exit_step, graph, x = (
        cfg.steps - 1 if exit_step is None else exit_step,
        torch.is_grad_enabled(),
        noise,
    )
    for i in range(exit_step + 1):
        sigma = torch.full((len(x),), sigmas[i], device=x.device)
        with torch.set_grad_enabled(graph and i == exit_step):
            x0 = dit.x0_from_v(x, student(x, sigma, context).float(), sigma)  # x̂0 = x_σ − σ·v
        if i < exit_step:  # x_σ' = (1−σ')·x̂0 + σ'·ε
            x = dit.add_noise(x0, fresh(x0, generator), torch.full_like(sigma, sigmas[i + 1]))
    return x0


def rollout(
    student: Callable,
    clip: Clip,
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
    past = clip.image
    rule = "released" if clip.encoding == "released" else "uniform"
    banks = [MemoryBank(rule) for _ in past]
    first_camera = memory.segment_cameras(clip.c2w, 0, 1)
    remember(banks, past, first_camera, torch.zeros(1, dtype=torch.long))

    for k in range(segments):
        last = k == segments - 1
        first, end, P = window.segment(k)
        past = past[:, :, -P:]
        times = torch.arange(first, end)
        cameras = memory.segment_cameras(clip.c2w, first, end - first)

        # what the student is told: what it made, what it remembers, where the player goes
        found = None
        if k > 0:
            asks = [latent - first for latent in window.queries(k)]
            found = recall(banks, cameras[:, asks, -1], first, clip.sink)
        context = memory.make_context(
            past,
            times.expand(len(past), -1),
            cameras,
            memory.action_windows(clip.mouse, first, end - first),
            memory.action_windows(clip.keyboard, first, end - first),
            clip.text,
            found,
            clip.encoding,
            clip.stride,
        ).to(past.device)

        # one segment; the gradient is that of the last one's exit step
        noise = fresh(past[:, :, :1].expand(-1, -1, end - first - P, -1, -1), generator)
        with torch.set_grad_enabled(graph and last):
            x0 = few_step(student, context, noise, exit_step if last else None, cfg, generator)
        if not last:
            remember(banks, x0, cameras[:, P:], times[P:])
            past = torch.cat([past, x0.to(past)], 2)[:, :, -window.past :]
    return x0, context


def remember(banks: list[MemoryBank], latents: Tensor, cameras: Tensor, times: Tensor) -> None:
    for bank, x, c2w in zip(banks, latents, cameras, strict=True):
        bank.append(x, c2w.float(), times)


def recall(
    banks: list[MemoryBank], query: Tensor, before: int, sink: bool = True
) -> Memory:  # query (B, M, 4, 4)
    """What each world of the batch remembers of its own past."""
    found = [
        bank.read(bank.retrieve(ask.float(), before, sink=sink)[0])
        for bank, ask in zip(banks, query, strict=True)
    ]
    return Memory(
        *(torch.cat([getattr(m, name) for m in found]) for name in ("latents", "times", "cameras"))
    )


# ---- how far apart two pictures, and two sets of pictures, are -------------------------------------------
# Distribution matching judged without the judges above, and without a downloaded network. Pictures are frames
# (N, H, W, 3), uint8 or in [0, 1]; features (N, d) float64.


def planes(frames: Tensor) -> Tensor:  # -> (N, 3, H, W) float32
    x = torch.as_tensor(frames)
    return (x.float() / 255 if x.dtype == torch.uint8 else x.float().clamp(0, 1)).permute(
        0, 3, 1, 2
    )


def gmsd(pred: Tensor, true: Tensor) -> Tensor:  # (N,), 0 = equal: deviation of gradient similarity
    kernel = torch.tensor([[1.0, 0, -1]] * 3) / 3  # Prewitt / 3
    kernels = torch.stack([kernel, kernel.T])[:, None]
    grey = (F.avg_pool2d(planes(x).mean(1, keepdim=True), 2) for x in (pred, true))
    a, b = (F.conv2d(x, kernels, padding=1).norm(dim=1) for x in grey)
    # g = (2 m₁ m₂ + c) / (m₁² + m₂² + c)
    return (
        ((2 * a * b + 170 / 255**2) / (a * a + b * b + 170 / 255**2))
        .flatten(1)
        .std(1, correction=0)
    )


def haarpsi(
    pred: Tensor, true: Tensor
) -> Tensor:  # (N,), 1 = equal: Haar wavelets, weighted by the coarse
    to_yiq = torch.tensor(
        [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]
    )
    a, b = (
        F.avg_pool2d(torch.einsum("ij,njhw->nihw", to_yiq, 255 * planes(x)), 2)
        for x in (pred, true)
    )

    def haar(x: Tensor, k: int) -> Tensor:  # (N, 3, H, W) -> (N, 2, H, W): both orientations of Y
        kernel = torch.ones(k, k) / k * torch.tensor([1.0, -1]).repeat_interleave(k // 2)[:, None]
        return F.conv2d(
            F.pad(x[:, :1], (k // 2 - 1, k // 2) * 2), torch.stack([kernel, kernel.T])[:, None]
        ).abs()

    like = lambda p, q: (2 * p * q + 30) / (p * p + q * q + 30)
    s = (like(haar(a, 2), haar(b, 2)) + like(haar(a, 4), haar(b, 4))) / 2
    w = torch.maximum(haar(a, 8), haar(b, 8))
    smooth = lambda x: F.pad(F.avg_pool2d(x[:, 1:], 2, 1), (0, 1, 0, 1)).abs()
    s = torch.cat([s, like(smooth(a), smooth(b)).mean(1, keepdim=True)], 1)
    w = torch.cat([w, w.mean(1, keepdim=True)], 1)
    score = (w * torch.sigmoid(4.2 * s)).sum((1, 2, 3)) / w.sum((1, 2, 3)).clamp(min=1e-9)
    return torch.where(
        w.sum((1, 2, 3)) > 0, (torch.logit(score.clamp(1e-6, 1 - 1e-6)) / 4.2).square(), 1.0
    )


def sharpness(pred: Tensor, true: Tensor) -> Tensor:  # (N,) of mean 1 = as sharp
    """Mean squared gradients over those of *all* true frames: a bare wall alone decides nothing."""
    energy = lambda x: sum(planes(x).mean(1).diff(dim=d).square().mean((1, 2)) for d in (1, 2))
    return energy(pred) / energy(true).mean().clamp(min=1e-6)


@lru_cache
def gaussian(n: int, blur: float) -> Tensor:  # (n, n): blurs a column, edges repeat
    weight = torch.exp(
        -0.5 * ((torch.arange(-12, n + 12)[None] - torch.arange(n)[:, None]) / blur) ** 2
    )
    ends = weight[:, :13].sum(1, keepdim=True), weight[:, -13:].sum(1, keepdim=True)
    weight = torch.cat([ends[0], weight[:, 13:-13], ends[1]], 1)
    return weight / weight.sum(1, keepdim=True)


def unit(frames: Tensor, blur: float = 0.0) -> Tensor:  # (N, 3·H·W), |row| = 1
    x = planes(frames)
    x = gaussian(x.shape[2], blur) @ x @ gaussian(x.shape[3], blur).T if blur else x
    return F.normalize((x - x.mean((2, 3), keepdim=True)).flatten(1), dim=1)


def zncc(pred: Tensor, true: Tensor) -> Tensor:  # (N,): a·b of slightly blurred frames
    return (unit(pred, 1.0) * unit(true, 1.0)).sum(1)


def pixel_pca(reference: Tensor, dims: int = 64) -> Callable[[Tensor], Tensor]:
    """Features that need no training and no trust: 8x8 thumbnails on the principal axes of the reference, 8 frames
    or more per axis."""
    thumbnails = lambda x: F.adaptive_avg_pool2d(planes(x), 8).flatten(1).double()
    mean, kept = thumbnails(reference).mean(0), max(1, min(dims, len(reference) // 8))
    axes = torch.linalg.svd(thumbnails(reference) - mean, full_matrices=False).Vh[:kept]
    return lambda x: (thumbnails(x) - mean) @ axes.T


def frechet(a: Tensor, b: Tensor) -> float:
    root = lambda C: (lambda w, V: V * w.clamp(min=0).sqrt() @ V.T)(*torch.linalg.eigh(C))
    A, B = (x.T.cov().view(x.shape[1], x.shape[1]) for x in (a, b))
    half = root(A)
    # |μ₁−μ₂|² + tr(C₁ + C₂ − 2 (C₁^½ C₂ C₁^½)^½)
    return float(
        (a.mean(0) - b.mean(0)).square().sum() + (A + B - 2 * root(half @ B @ half)).trace()
    )


def mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased: pairs within a set never hold one frame twice. Features are standardised by b, the truth (the weak
    ones by a tenth of the strongest); k(a, b) = (a·b/d + 1)³."""
    a, b = ((x - b.mean(0)) / b.std(0).clamp(min=0.1 * float(b.std(0).max())) for x in (a, b))
    k = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    within = lambda x: (k(x, x).sum() - k(x, x).diagonal().sum()) / (len(x) * (len(x) - 1))
    return float(within(a) + within(b) - 2 * k(a, b).mean())


def distances(
    pairs: list[tuple[Tensor, Sequence]],
) -> dict[str, float]:  # made and true frames (N, H, W, 3) of every world
    pred, true = (
        torch.cat([torch.as_tensor(x) for x in side]) for side in zip(*pairs, strict=True)
    )
    a, b = map(pixel_pca(true), (pred, true))
    return {
        "TWFD": frechet(a, b),
        "MMD": mmd(a, b),
        "precision": share_inside(a, b),
        "recall": share_inside(b, a),
    }


def share_inside(a: Tensor, b: Tensor, k: int = 5) -> float:
    """Part of a that lies within reach of b: in a ball round some b, as wide as its k-th neighbour is far.
    share_inside(made, true) is precision, share_inside(true, made) recall: a collapsed model has no recall."""
    reach = torch.cdist(b, b).kthvalue(min(k + 1, len(b)), dim=1).values  # itself is the first
    return float((torch.cdist(a, b) <= reach).any(1).double().mean())


# ---- where was a picture taken? --------------------------------------------------------------------------


class Found(NamedTuple):
    pose: Tensor  # (5,) float64, as in memory.integrate; height and pitch as given
    score: float  # ZNCC of the picture with the view from there
    ambiguous: bool  # another place explains it as well: plain walls look alike


def register(
    look: Callable[
        [Tensor, int, int], Tensor
    ],  # poses (n, 5), size, rays per pixel and axis -> true frames
    free: Callable[[Tensor], Tensor],  # (n, 2) x, z -> (n,) not inside a wall
    frame: Tensor,  # (H, H, 3)
    pose: Tensor,  # (5,) float64 where to search
) -> Found:
    """Coarse grid at 16x16, five starts, Levenberg-Marquardt over blurs 2, 1, 0 in x, z, yaw."""
    size, scale = (
        len(frame),
        torch.tensor([1.0, 1.0, math.degrees(0.5)]),
    )  # half a radian counts as a metre
    whole = lambda p: torch.stack(
        [p[:, 0], 0 * p[:, 0] + pose[1], p[:, 1], 0 * p[:, 0] + pose[3], p[:, 2]], 1
    )
    views = lambda p, blur, samples, side=size: unit(look(whole(p), side, samples), blur)
    steps = torch.linspace(-0.36, 0.36, 5, dtype=torch.float64)
    grid = torch.cartesian_prod(steps, steps, torch.linspace(-18, 18, 13, dtype=torch.float64))
    grid = pose[[0, 2, 4]] + grid[grid[:, :2].norm(dim=1) <= 0.37]
    grid, small = (
        grid[free(grid[:, :2])],
        F.avg_pool2d(planes(frame[None]), size // 16).permute(0, 2, 3, 1),
    )
    starts: list[Tensor] = []
    for at in grid[(views(grid, 0, 1, 16) @ unit(small)[0]).argsort(descending=True)]:
        if len(starts) < 5 and all(float(((at - s) / scale).norm()) >= 0.15 for s in starts):
            starts.append(at)
    p, h = torch.stack(starts), torch.tensor([0.03, 0.03, 1.0], dtype=torch.float64)
    for blur in (2.0, 1.0, 0.0):
        target, fine = unit(frame[None], blur)[0], 1 if blur else 2
        damping, cost = (
            torch.full((len(p),), 1e-2).double(),
            (views(p, blur, fine) - target).square().sum(1),
        )
        for _ in range(6 if blur else 12):
            around = (p[:, None] + torch.cat([h[None] * 0, h.diag(), -h.diag()])).flatten(0, 1)
            seen = views(around, blur, fine).view(len(p), 7, -1).double()
            J, e = (seen[:, 1:4] - seen[:, 4:]) / 2, seen[:, 0] - target  # per step h
            A = J @ J.mT + 1e-9 * torch.eye(3).double()
            # (JᵀJ + λ diag JᵀJ) Δ = −Jᵀe
            damped = A + damping[:, None, None] * torch.diag_embed(A.diagonal(dim1=1, dim2=2))
            move = -h * torch.linalg.solve(damped, J @ e[..., None])[..., 0]
            move *= (0.2 / (move / scale).norm(dim=1, keepdim=True).clamp(min=1e-9)).clamp(max=1)
            new = (views(p + move, blur, fine) - target).square().sum(1)
            better = (new < cost) & free((p + move)[:, :2])
            p, cost = torch.where(better[:, None], p + move, p), torch.where(better, new, cost)
            damping = torch.where(better, damping / 3, damping * 5).clamp(1e-4, 1e4)
        p = p[cost.argsort()[: 5 if blur > 1 else 2]]
    score = views(p, 1.0, 2) @ unit(frame[None], 1.0)[0]
    best = int(score.argmax())
    far = ((p - p[best])[:, :2].norm(dim=1) > 0.1) | ((p[:, 2] - p[best, 2]).abs() > 2)
    return Found(
        whole(p)[best], float(score[best]), bool((far & (score > score[best] - 0.005)).any())
    )


# ---- what old frames could show --------------------------------------------------------------------------
# The rival of every model with a memory needs no network: old frames, seen again from here by true depth.


def lookup(
    depth: Tensor,  # (T, H, W) true z-depth of the targets, metres
    c2w: Tensor,  # (T, 4, 4) float64
    bank_depth: Tensor,  # (N, H, W)
    bank_c2w: Tensor,  # (N, 4, 4)
) -> tuple[
    Tensor, Tensor, Tensor
]:  # (T, N, H·W) x, y in pixels of each old frame, and whether it saw that
    """Where the old frames show the points that the targets see. Seen: inside the image and no deeper than 1.02
    times the depth there. The sky, at a depth of 1000 m, is a surface too."""
    depth, c2w, bank_depth, bank_c2w = map(torch.as_tensor, (depth, c2w, bank_depth, bank_c2w))
    (T, H, W), N = depth.shape, len(bank_depth)
    fx, fy, cx, cy = memory.intrinsics(H, W).tolist()
    g = memory.relative(bank_c2w[None], c2w[:, None]).float()  # (T, N, 4, 4)
    v, u = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    z = depth.flatten(1)[:, None]
    points = torch.stack(
        [(u.flatten() - cx) / fx * z, (v.flatten() - cy) / fy * z, z], 2
    )  # (T, 1, 3, H·W)
    x, y, z = (g[..., :3, :3] @ points + g[..., :3, 3:]).unbind(2)
    x, y = fx * x / z + cx, fy * y / z + cy
    inside = (z > 1e-3) & (x >= 0) & (x < W) & (y >= 0) & (y < H)
    cell = torch.where(inside, y.floor() * W + x.floor(), 0).long()
    there = bank_depth.flatten(1).expand(T, N, -1).gather(2, cell)
    return x, y, inside & (z <= 1.02 * there)


def visible(
    depth: Tensor, c2w: Tensor, bank_depth: Tensor, bank_c2w: Tensor
) -> Tensor:  # (T, N, H, W) bool
    return lookup(depth, c2w, bank_depth, bank_c2w)[2].unflatten(2, depth.shape[1:])


def masks(
    depth: Sequence, c2w: Sequence, at: Sequence[int], known: int
) -> dict[str, Sequence]:  # NumPy arrays; each mask (T, H, W) bool
    """Of frames `at`: what the bank, a frame per latent of the first `known`, has seen or not, and what only it has, not the last window."""
    bank = torch.arange(0, known, Window.stride).numpy()
    seen = visible(depth[at], c2w[at], depth[bank], c2w[bank]).numpy()
    old = bank < known - Window.stride * (Window.past + Window.new)
    return {
        "seen": seen.any(1),
        "unseen": ~seen.any(1),
        "bank-only": seen[:, old].any(1) & ~seen[:, ~old].any(1),
    }


def warp(depth: Tensor, c2w: Tensor, bank: Tensor, bank_depth: Tensor, bank_c2w: Tensor) -> Tensor:
    """The best use of old frames (N, H, W, 3): each target pixel shows its point as the nearest frame that saw it did;
    what none saw is that pixel of the nearest frame. (T, H, W, 3)"""
    (T, H, W), N = depth.shape, len(bank)
    x, y, seen = lookup(depth, c2w, bank_depth, bank_c2w)
    near = memory.overlap(torch.as_tensor(c2w), torch.as_tensor(bank_c2w))  # (T, N)
    best = torch.where(seen, near[..., None], -1.0).argmax(1, keepdim=True)  # (T, 1, H·W)
    at = 2 * x.gather(1, best) / W - 1, 2 * y.gather(1, best) / H - 1, (2 * best + 1) / N - 1
    colour = F.grid_sample(
        bank.permute(3, 0, 1, 2)[None],
        torch.stack(at, -1).view(1, T, H, W, 3),
        padding_mode="border",
        align_corners=False,
    )[0].permute(1, 2, 3, 0)
    return torch.where(seen.any(1).view(T, H, W, 1), colour, bank[near.argmax(1)])


def coverage(
    seen: Tensor, chosen: Sequence[int]
) -> float:  # (N, H, W): share of what any frame could show
    return float(seen[list(chosen)].any(0).sum() / seen.any(0).sum().clamp(min=1))


def greedy(seen: Tensor, k: int) -> list[int]:  # the oracle: always the largest new area
    left, chosen = seen.flatten(1).clone(), []
    for _ in range(k):
        chosen.append(int(left.sum(1).argmax()))
        left &= ~left[chosen[-1]]
    return chosen


def adoption(pred: Tensor, true: Tensor, donor: Tensor, mask: Tensor) -> float:
    """Share of frames whose masked pixels are nearer to the donor world, whose memory was given, than to the true one."""
    pred, true, donor = map(planes, (pred, true, donor))
    far = lambda x: ((pred - x).square().mean(1) * torch.as_tensor(mask)).sum((1, 2))
    return float((far(donor) < far(true)).double().mean())


def answered(moved: Sequence, asked: Sequence, dead: float) -> bool:
    """KCtrl: both motions (2, d) go the way that was asked, by more than a dead zone. One motion cannot go both ways."""
    # m·c / |c|
    return bool(((moved * asked).sum(1) / (asked * asked).sum(1) ** 0.5 > dead).all())


# ---- which keys were held? -------------------------------------------------------------------------------

READ = ("w", "s", "a", "d", "left", "right")


def pairs(
    frames: Tensor, keyboard: Tensor, mouse: Tensor, contact: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames four apart (N, 3, H, W) between which no key changed and no wall was touched, and what was held (N, 6)."""
    keyboard, turn, contact, x = (
        torch.as_tensor(keyboard),
        torch.as_tensor(mouse)[:, 1:],
        torch.as_tensor(contact),
        planes(frames),
    )
    held = torch.cat([keyboard[:, :4] > 0.5, turn < 0, turn > 0], 1)
    at = torch.tensor(
        [
            t
            for t in range(len(x) - 4)
            if (held[t : t + 4] == held[t]).all() and not contact[t : t + 4].any()
        ]
    )
    return x[at], x[at + 4], held[at].float()


class KeyReader(nn.Module):
    """Two frames of a walk to the logits of what was held between them. 102 k parameters, trained on true frames.

    It sees no colours, only how well each shift of the later frame matches the earlier one at each place. Shown the
    frames themselves it learnt the walls it was trained on, and read others at .65 instead of .95.
    """

    def __init__(self, reach: int = 6):  # pixels at half size: turns of up to 18 degrees
        super().__init__()
        self.reach, sizes = reach, (3 * (2 * reach + 1), 32, 48, 64)
        maps = [
            layer
            for a, b in zip(sizes, sizes[1:], strict=False)
            for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.SiLU())
        ]
        self.layers = nn.Sequential(
            *maps, nn.Flatten(), nn.Linear(1024, 48), nn.SiLU(), nn.Linear(48, 6)
        )

    def forward(self, before: Tensor, after: Tensor) -> Tensor:  # (N, 3, 64, 64) twice -> (N, 6)
        (H, W), r = (n // 2 for n in before.shape[2:]), self.reach
        a, b = (
            F.avg_pool2d(before, 2),
            F.pad(F.avg_pool2d(after, 2), (r, r, 1, 1), mode="replicate"),
        )
        shifts = [b[..., i : i + H, j : j + W] for i in range(3) for j in range(2 * r + 1)]
        # match(x, d) = exp(−10·mean |after(x + d) − before(x)|)
        return self.layers(
            torch.stack([(-10 * (shift - a).abs().mean(1)).exp() - 0.5 for shift in shifts], 1)
        )


def learn_keys(
    before: Tensor, after: Tensor, held: Tensor, steps: int = 400, seed: int = 0
) -> KeyReader:
    """Half of every batch is mirrored: a and d, left and right change places."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = KeyReader()
    opt, g = torch.optim.AdamW(reader.parameters()), torch.Generator().manual_seed(seed)
    rare = (1 - held).sum(0) / held.sum(0).clamp(min=1)  # a key weighs as much held as not held
    for step in range(steps):
        opt.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        one, two = torch.randint(len(held), (2, 64), generator=g)
        pair = [torch.cat([x[one], x[two].flip(-1)]) for x in (before, after)]
        labels = torch.cat([held[one], held[two][:, [0, 1, 3, 2, 5, 4]]])
        opt.zero_grad()
        F.binary_cross_entropy_with_logits(reader(*pair), labels, pos_weight=rare).backward()
        opt.step()
    return reader.eval()


def balanced_accuracy(logits: Tensor, held: Tensor) -> Tensor:  # (N, 6) twice -> (6,)
    """Mean of the share of held keys that are read and of the others that are not: one half for who never presses."""
    said, on = logits > 0, held > 0.5
    return (
        (said & on).sum(0) / on.sum(0).clamp(min=1)
        + (~said & ~on).sum(0) / (~on).sum(0).clamp(min=1)
    ) / 2


# ---- a Gaussian world, where every answer is known -------------------------------------------------------


class Gaussian(nn.Module):
    """The exact velocity of data ~ N(mean, factor·factorᵀ): a perfect teacher, or what critics become."""

    def __init__(self, mean: Tensor, factor: Tensor):  # (C,), (C, C)
        super().__init__()
        self.mean, self.factor = nn.Parameter(mean), nn.Parameter(factor)

    def forward(self, x_sigma: Tensor, sigma: Tensor, context: object) -> Tensor:  # (B, C, 1, 1, 1)
        cov, s = self.factor @ self.factor.T, sigma[:, None]
        spread = (1 - s[..., None]) ** 2 * cov + s[..., None] ** 2 * torch.eye(len(cov))  # of x_σ
        # E[x0 | x_σ] = μ + (1−σ)·Σ·[(1−σ)²Σ + σ²I]⁻¹·(x_σ − (1−σ)·μ)
        away = x_sigma.flatten(1) - (1 - s) * self.mean
        x0 = self.mean + (1 - s) * (torch.linalg.solve(spread, away) @ cov)
        return (x_sigma - x0.view_as(x_sigma)) / s.view(-1, 1, 1, 1, 1)  # v = (x_σ − x̂0)/σ


class Affine(nn.Module):
    """The smallest student: at each of its steps x̂0 = A·x + b."""

    def __init__(self, C: int, cfg: DMDConfig):
        super().__init__()
        self.sigmas = dit.sigma_grid(cfg.steps, cfg.shift)[:-1]
        self.A = nn.Parameter(0.3 * torch.eye(C).repeat(cfg.steps, 1, 1))
        self.b = nn.Parameter(torch.zeros(cfg.steps, C))

    def forward(self, x_sigma: Tensor, sigma: Tensor, context: object) -> Tensor:
        i = (self.sigmas - sigma[0]).abs().argmin()
        x0 = x_sigma.flatten(1) @ self.A[i].T + self.b[i]
        return (x_sigma - x0.view_as(x_sigma)) / sigma.view(-1, 1, 1, 1, 1)


def distil_gaussian(real: Gaussian, iterations: int = 600, seed: int = 0) -> Iterator[Affine]:
    """The whole algorithm at the size of a proof; yields the student after every iteration.

    Rollouts end at the last step here. With random exits the critic sees the mixture of what the exits make,
    and a critic that can only be one Gaussian finds no fault with a mixture whose two moments are right.
    """
    cfg, g, C = DMDConfig(), torch.Generator().manual_seed(seed), len(real.mean)
    student, fake = Affine(C, cfg), Gaussian(torch.zeros(C), torch.eye(C))
    opt, opt_fake = (
        torch.optim.Adam(net.parameters(), betas=(0.0, 0.99)) for net in (student, fake)
    )
    for step in range(iterations):
        fade = min(1.0, 1.5 * (1 - step / iterations))
        opt.param_groups[0]["lr"], opt_fake.param_groups[0]["lr"] = 0.03 * fade, 0.06 * fade
        x0 = few_step(
            student, None, torch.randn(1024, C, 1, 1, 1, generator=g), cfg=cfg, generator=g
        )
        if turns(step, 2)[1]:  # the student every second time, the critic always
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
def distance(student: Affine, real: Gaussian) -> tuple[float, float]:  # of mean and covariance
    x0 = few_step(student, None, torch.randn(200_000, len(real.mean), 1, 1, 1)).flatten(1)
    cov = real.factor @ real.factor.T
    return (
        ((x0.mean(0) - real.mean).norm() / real.mean.norm()).item(),
        ((x0.T.cov() - cov).norm() / cov.norm()).item(),
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    teacher = toy_teacher()
    for i, student in enumerate(distil_gaussian(teacher)):
        if i in (0, 100, 200, 400, 599):
            mean, cov = distance(student, teacher)
            print(
                f"iteration {i:3d}: 3-step student off by {mean:6.1%} in mean, {cov:6.1%} in covariance"
            )
    x0 = torch.randn(64, 3, 1, 1, 1, requires_grad=True)
    generator_loss(x0, None, teacher, toy_teacher()).backward()
    print(f"largest gradient when the critic equals the teacher: {x0.grad.abs().max():.0e}")
