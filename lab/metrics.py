"""How far apart two pictures are, and two sets of them."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import episode


def ssim(pred: np.ndarray | Tensor, true: np.ndarray | Tensor) -> Tensor:  # (N,)
    """Structural similarity of the grey frames: 7×7 uniform window, biased variances, C1 = 1e-4, C2 = 9e-4."""
    a, b = (
        episode.in_unit_range(pred).mean(1, keepdim=True).double(),
        episode.in_unit_range(true).mean(1, keepdim=True).double(),
    )
    ma, mb, aa, bb, ab = (F.avg_pool2d(x, 7, 1) for x in (a, b, a * a, b * b, a * b))
    score = (
        (2 * ma * mb + 1e-4)
        * (2 * (ab - ma * mb) + 9e-4)
        / ((ma**2 + mb**2 + 1e-4) * (aa - ma**2 + bb - mb**2 + 9e-4))
    )
    return score.mean((1, 2, 3)).float()


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


def adoption(pred: Tensor, true: Tensor, donor: Tensor, mask: Tensor) -> float:
    """Share of frames whose masked pixels are nearer to the donor world, whose memory was given, than to the true one."""
    pred, true, donor = map(planes, (pred, true, donor))
    far = lambda x: ((pred - x).square().mean(1) * torch.as_tensor(mask)).sum((1, 2))
    return float((far(donor) < far(true)).double().mean())


def answered(moved: Sequence, asked: Sequence, dead: float) -> bool:
    """KCtrl: both motions (2, d) go the way that was asked, by more than a dead zone. One motion cannot go both ways."""
    # m·c / |c|
    return bool(((moved * asked).sum(1) / (asked * asked).sum(1) ** 0.5 > dead).all())


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


METRICS = {
    "psnr": episode.psnr,
    "ssim": ssim,
    "gmsd": gmsd,
    "haarpsi": haarpsi,
    "zncc": zncc,
}
BETTER = {name: -1 if name == "gmsd" else 1 for name in METRICS}
