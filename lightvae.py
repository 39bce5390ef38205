"""A decoder a quarter as wide for the same latents.

What it does. The losses of the VAE and of its thin decoders (train.py --stage vae, lightvae). A thin decoder
learns from the full one: its pictures, and its features at two depths through projections, so that the
latents, and every model trained on them, stay what they are.
Paper: §3.4, Table 2 (50 and 75 % of the channels removed).  Released: two decoders, no training.
Tests: pytest tests/test_lightvae.py
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import vae


class LatentNorm(nn.Module):
    """Unit variance in training: batch norm without gain or bias. eval() it for the last steps, then `fold` it."""

    def __init__(self, channels: int, momentum: float = 0.02):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, mu: Tensor) -> Tensor:  # (B, C, T, h, w) -> same, float32
        mu = mu.float()
        if not self.training:
            return (mu - self.mean.view(-1, 1, 1, 1)) * torch.rsqrt(self.var + 1e-5).view(
                -1, 1, 1, 1
            )
        self.steps += 1  # a plain average first, then a moving one
        return F.batch_norm(
            mu, self.mean, self.var, training=True, momentum=max(self.momentum, 1 / int(self.steps))
        )

    @torch.no_grad()
    def fold(self, vae: vae.VAE) -> None:
        """Mean and std go into the VAE, conv2 undoes them: encode becomes norm(mu), decode stays as trained."""
        std, w, b = torch.sqrt(self.var + 1e-5), vae.conv2.weight, vae.conv2.bias
        b.add_(w.flatten(1) @ vae.latent_mean)  # W·(z·s₀ + m₀) + b = W′·(z·s + m) + b′, W′ = W·s₀/s
        w.mul_((vae.latent_std / std).view(1, -1, 1, 1, 1))
        b.sub_(w.flatten(1) @ self.mean)
        vae.set_statistics(tuple(self.mean.tolist()), tuple(std.tolist()))


def structure(a: Tensor, b: Tensor) -> Tensor:
    """Mean |∇a − ∇b| at full, half and quarter size: edges must be where they are, and as sharp."""
    d, total = (a - b).float().flatten(1, 2), 0.0  # colours and frames as channels
    for level in range(3):
        d = F.avg_pool2d(d, 2) if level else d
        total = total + d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()
    return total / 3


def picture_loss(x_hat: Tensor, video: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    error = (x_hat - video).float()
    l1, edges = error.abs().mean(), structure(x_hat, video)
    psnr = -10 * (error.detach().square().mean() / 4).log10()  # the range of a pixel is 2
    return l1 + weight * edges, {"l1": l1.detach(), "structure": edges.detach(), "psnr": psnr}


def vae_loss(
    vae: vae.VAE,
    video: Tensor,
    norm: LatentNorm,
    generator: torch.Generator | None = None,
    noise: float = 0.05,
    weight: float = 0.5,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Encoder and decoder together on video (B, 3, F, H, W) -> L1 + weight · structure, its parts."""
    vae.check_video(video)
    z = norm(vae.moments(video))  # whitened by the batch's own statistics
    z = z + noise * torch.randn(z.shape, generator=generator).to(
        z.device
    )  # neighbours of z mean the same picture
    return picture_loss(vae.decode(z.to(video.dtype)), video, weight)


class Projections(nn.Module):
    """Student features -> teacher widths, two 1×1×1 convolutions per level; thrown away after training."""

    def __init__(self, student: vae.VAEConfig, teacher: vae.VAEConfig):
        super().__init__()
        s, t = student.dec_dim * student.dim_mult[-1], teacher.dec_dim * teacher.dim_mult[-1]
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv3d(s, t, 1), nn.SiLU(), nn.Conv3d(t, t, 1)) for _ in range(2)
        )


def light_loss(
    student: vae.VAE,
    teacher: vae.VAE,
    projections: Projections,
    video: Tensor,
    z: Tensor | None = None,
    weight: float = 0.5,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The pruned decoder redraws video (B, 3, F, H, W) from the full encoder's latents (z, or encoded here).

    Features after the middle and the first up block must project onto the full decoder's (error over variance).
    """
    with torch.no_grad():
        z = teacher.encode(video) if z is None else z
        target = teacher.decoder.features(teacher.unwhiten(z), vae.Stream())
    stream = vae.Stream()
    features = student.decoder.features(student.unwhiten(z), stream)
    x_hat = vae.unpatchify(student.decoder.finish(features[-1], stream), student.cfg.patch)
    match = sum(
        (head(f) - t).float().square().mean() / t.float().var()
        for head, f, t in zip(projections.heads, features, target, strict=True)
    )
    loss, parts = picture_loss(x_hat, video, weight)
    return loss + 0.1 * match, parts | {"features": match.detach()}
