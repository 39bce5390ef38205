"""A decoder a quarter as wide for the same latents.

What it does. The losses with which train.py makes a VAE (--stage vae) and its thin decoders (--stage
lightvae). A thin decoder learns from the full one, its pictures and its features, so that latents, and
every model trained on them, stay what they are.
Paper: §3.4, Table 2 (50 and 75 % of the channels removed).  Released: two decoders, no training.

Why it works. A convolution from C to C' channels multiplies 27·C·C' numbers per place. Keep a
share 1 − rate of every width, and both factors shrink; only the decoder's first layer, whose
input is the latent, and its last, whose output is pixels, shrink by one:

    (1 − rate)²  <=  cost(rate) / cost(0)  <=  1 − rate                                          (1)

with the lower end nearly reached: half as wide multiplies a quarter as much, a quarter a sixteenth
(the demo counts). Its time falls less: see README.

Pictures are compared twice. L1 alone is kind to blur: where an edge may lie here or there, grey
in between costs no more than either. But slopes differ then: ∂ₓ and ∂ᵧ, the changes of a colour to
the next pixel at the right and below, are compared too, at full, half and quarter size:

    structure = mean over three sizes of (mean |∂ₓx̂ − ∂ₓx| + mean |∂ᵧx̂ − ∂ᵧx|)                   (2)
    picture   = mean |x̂ − x| + w_s·structure                                                     (3)

A student that sees pictures alone must find the way from latents to pixels again. The teacher's
features f, after the middle and after the first stage, say what stands half way; small heads P,
thrown away afterwards, take the student's few channels to the teacher's many:

    light = picture + 0.1·Σ mean |P(f_student) − f_teacher|² / var(f_teacher)                    (4)

Latents need unit variance (vae.py). In training they are whitened by mean and variance of the batch,
which follow the encoder as it learns. So larger latents would not drown the noise that is added:
whitening makes them small again:

    z = (mu − mean) / √(var + 1e-5),     then a little noise: neighbours of z mean the same      (5)

In the last tenth of a training running means take the place of the batch's (train.py), so that the
decoder sees the very numbers it will have. At the end these move into the VAE, in the place of m0
and s0, those it began with (0 and 1 in a new one). The 1x1x1 convolution before the decoder, conv2
of weight W and bias b, was trained on W·(z·s0 + m0) + b. It will be given z·std + mean instead, and
must not notice:

    W' = W·s0/std,     b' = b + W·m0 − W'·mean                                                   (6)

All these errors prefer a middle, squared ones the mean and absolute ones the median. Where the
latent does not say which of several fine patterns was there, both are grey, and the picture is
soft. A second network, the judge J, learns to tell true frames from drawn ones, and the decoder
learns to be taken for true:

    decoder:  mean log(1 + e^(−J(x̂))), w_J times, beside its other losses                       (7)
    judge:    mean log(1 + e^(−J(x))) + mean log(1 + e^(J(x̂)))                                  (8)

Some pattern of the right kind is then better than none. It is rarely the very one, so decibels are
lost: how many, and what is won, stands in results/pilots.

What differs. No pretrained perceptual network: where the literature takes LPIPS we take (2), which
needs no download. The weights of the losses are not published, and of the projections one head is
in the released files; all of them are ours.
Try it: python lightvae.py      Tests: pytest tests/test_lightvae.py
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vae import PRESETS, VAE, VAEConfig, pruned
from vae_blocks import Stream, unpatchify

MATCH = 0.1  # weight of the features, beside a picture loss of about 0.1
Parts = dict[str, Tensor]  # what a loss is made of, for the log


# ---- latents of unit variance ------------------------------------------------------------------------------


class LatentNorm(nn.Module):
    """Batch norm without gain or bias. eval() it for the last steps, then `fold` it."""

    def __init__(self, channels: int, momentum: float = 0.02):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, mu: Tensor) -> Tensor:  # (B, C, T, h, w) -> same, float32
        mu = mu.float()
        if not self.training:
            inv_std = torch.rsqrt(self.var + 1e-5)
            return (mu - self.mean.view(-1, 1, 1, 1)) * inv_std.view(-1, 1, 1, 1)  # (5)
        self.steps += 1  # a plain average first, then a moving one
        momentum = max(self.momentum, 1 / int(self.steps))
        return F.batch_norm(mu, self.mean, self.var, training=True, momentum=momentum)

    @torch.no_grad()
    def fold(self, model: VAE) -> None:
        """encode becomes norm(mu), decode stays as trained."""
        std = torch.sqrt(self.var + 1e-5)
        W = model.conv2.weight
        b = model.conv2.bias
        b.add_(W.flatten(1) @ model.latent_mean)
        W.mul_((model.latent_std / std).view(1, -1, 1, 1, 1))
        b.sub_(W.flatten(1) @ self.mean)  # (6)
        model.set_statistics(tuple(self.mean.tolist()), tuple(std.tolist()))


# ---- what a picture is worth -------------------------------------------------------------------------------


def structure(a: Tensor, b: Tensor) -> Tensor:
    """Edges must be where they are, and as sharp: a, b (B, 3, F, H, W) -> a number."""
    d = (a - b).float().flatten(1, 2)  # colours and frames as channels
    total = 0.0
    for level in range(3):
        d = F.avg_pool2d(d, 2) if level else d
        total = total + d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()
    return total / 3  # (2)


def picture_loss(x_hat: Tensor, video: Tensor, weight: float) -> tuple[Tensor, Parts]:
    error = (x_hat - video).float()
    l1 = error.abs().mean()
    edges = structure(x_hat, video)
    psnr = -10 * (error.detach().square().mean() / 4).log10()  # the range of a pixel is 2
    parts = {"l1": l1.detach(), "structure": edges.detach(), "psnr": psnr}
    return l1 + weight * edges, parts  # (3)


# ---- a judge of sharpness, off by default; the shipped decoder had it --------------------------------------


class Judge(nn.Module):
    """Tells true pictures from drawn ones: a logit for every patch of 18 x 18 pixels.

    It sees two neighbouring frames at once, so that it knows flicker from movement too. By
    GroupNorm, every patch also knows how strong the contrasts of the whole picture are.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(6, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 3, 1, 1),
            nn.GroupNorm(8, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 1),
        )

    def forward(self, video: Tensor) -> Tensor:  # (B, 3, F, H, W) -> (B·(F-1), 1, H/4, W/4)
        pairs = torch.cat([video[:, :, :-1], video[:, :, 1:]], 1)
        return self.layers(pairs.transpose(1, 2).flatten(0, 1))


def adversarial_loss(judge: Judge, x_hat: Tensor) -> Tensor:
    """The decoder's extra loss: cross-entropy of "true" for what it drew."""
    return F.softplus(-judge(x_hat).float()).mean()  # (7)


def judge_loss(judge: Judge, x_hat: Tensor, video: Tensor) -> Tensor:
    """The judge's own: cross-entropy of "true" for true and "drawn" for drawn frames."""
    says_true = judge(video).float()
    says_drawn = judge(x_hat.detach()).float()
    return F.softplus(-says_true).mean() + F.softplus(says_drawn).mean()  # (8)


# ---- the two losses ----------------------------------------------------------------------------------------


def vae_loss(
    model: VAE,
    video: Tensor,  # (B, 3, F, H, W)
    norm: LatentNorm,
    generator: torch.Generator | None = None,
    noise: float = 0.05,
    weight: float = 0.5,  # of structure
) -> tuple[Tensor, Parts, Tensor]:  # the loss, what it is made of, and what was drawn
    """Encoder and decoder together."""
    model.check_video(video)
    z = norm(model.moments(video))
    eps = torch.randn(z.shape, generator=generator)
    z = z + noise * eps.to(z.device)  # (5)
    x_hat = model.decode(z.to(video.dtype))
    return *picture_loss(x_hat, video, weight), x_hat


class Projections(nn.Module):
    """Student features -> teacher widths, two 1x1x1 convolutions per level."""

    def __init__(self, student: VAEConfig, teacher: VAEConfig):
        super().__init__()
        narrow = student.dec_dim * student.dim_mult[-1]
        wide = teacher.dec_dim * teacher.dim_mult[-1]
        heads = []
        for _ in range(2):
            first = nn.Conv3d(narrow, wide, 1)
            heads.append(nn.Sequential(first, nn.SiLU(), nn.Conv3d(wide, wide, 1)))
        self.heads = nn.ModuleList(heads)

    def mismatch(self, features: list[Tensor], target: list[Tensor]) -> Tensor:
        total = 0
        for head, f, t in zip(self.heads, features, target, strict=True):
            error = (head(f) - t).float().square().mean()
            total = total + error / t.float().var()
        return total


def light_loss(
    student: VAE,
    teacher: VAE,
    projections: Projections,
    video: Tensor,  # (B, 3, F, H, W)
    weight: float = 0.5,  # of structure
) -> tuple[Tensor, Parts, Tensor]:  # the loss, what it is made of, and what was drawn
    """The thin decoder redraws the video from the full encoder's latents."""
    with torch.no_grad():
        z = teacher.encode(video)
        target = teacher.decoder.features(teacher.unwhiten(z), Stream())

    stream = Stream()
    features = student.decoder.features(student.unwhiten(z), stream)
    pixels = student.decoder.finish(features[-1], stream)
    x_hat = unpatchify(pixels, student.cfg.patch)

    match = projections.mismatch(features, target)
    loss, parts = picture_loss(x_hat, video, weight)
    return loss + MATCH * match, parts | {"features": match.detach()}, x_hat  # (4)


# ---- demo --------------------------------------------------------------------------------------------------


def multiply_adds(model: VAE, latents: int = 3) -> int:
    """Of the decoder's convolutions, for latents of 4 x 4 places: counted while they run."""
    total = 0

    def count(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal total
        total += layer.weight[0].numel() * output.numel()

    convolutions = (nn.Conv2d, nn.Conv3d)
    layers = [layer for layer in model.decoder.modules() if isinstance(layer, convolutions)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.decode(torch.zeros(1, model.cfg.z_dim, latents, 4, 4))
    for hook in hooks:
        hook.remove()
    return total


def demo() -> None:
    full = PRESETS["tiny"]
    whole = multiply_adds(VAE(full))
    print(f"full decoder, width {full.dec_dim}: {whole / 1e6:.0f} million multiply-adds")
    for rate in (0.5, 0.75):
        thin = pruned(full, rate)
        share = multiply_adds(VAE(thin)) / whole  # (1)
        print(
            f"{rate:.0%} pruned, width {thin.dec_dim}: {share:.1%} of them; "
            f"(1 - rate)^2 = {(1 - rate) ** 2:.1%}, 1 - rate = {1 - rate:.0%}"
        )


if __name__ == "__main__":
    demo()
