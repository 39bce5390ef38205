"""How far apart two pictures are, and two sets of them.

Of a picture: PSNR asks how far each pixel is off, SSIM whether the structure is there, ZNCC whether
it shows the same place whatever its brightness, sharpness whether it is blurred (PSNR likes blur).
Of a set: TWFD, the Fréchet distance of frames, sees layout and colour and is blind to blur. Nothing
here needs a downloaded network. Frames are (N, H, W, 3), uint8 or in [0, 1].
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.film import in_unit_range, psnr

Frames = Sequence | Tensor  # NumPy's are welcome, too


def planes(frames: Frames) -> Tensor:  # (N, H, W, 3) -> (N, 3, H, W) float32
    return in_unit_range(frames).clamp(0, 1)


def grey(frames: Frames) -> Tensor:  # (N, H, W)
    return planes(frames).mean(1)


def per_frame(x: Tensor) -> Tensor:  # (N, ...) -> (N,)
    return x.flatten(1).mean(1)


# ---- one picture --------------------------------------------------------------------------


def ssim(pred: Frames, true: Frames) -> Tensor:  # (N,)
    """Structural similarity of the grey frames: 7x7 uniform window, biased variances."""
    a = in_unit_range(pred).mean(1).double()
    b = in_unit_range(true).mean(1).double()
    mean_a = F.avg_pool2d(a, 7, 1)
    mean_b = F.avg_pool2d(b, 7, 1)
    both = mean_a * mean_b
    squares = mean_a**2 + mean_b**2

    # how the means agree, and how what varies around them does
    covariance = F.avg_pool2d(a * b, 7, 1) - both
    variances = F.avg_pool2d(a * a + b * b, 7, 1) - squares
    brightness = (2 * both + 1e-4) / (squares + 1e-4)
    structure = (2 * covariance + 9e-4) / (variances + 9e-4)
    return per_frame(brightness * structure).float()


@lru_cache
def gaussian(
    n: int,
    blur: float,
) -> Tensor:  # (n, n): blurs a column, edges repeat
    here = torch.arange(n)[:, None]
    away = torch.arange(-12, n + 12)[None] - here
    weight = torch.exp(-0.5 * (away / blur) ** 2)
    first = weight[:, :13].sum(1)
    last = weight[:, -13:].sum(1)
    middle = weight[:, 13:-13]
    weight = torch.column_stack([first, middle, last])
    return weight / weight.sum(1, keepdim=True)


def unit(
    frames: Frames,
    blur: float = 0.0,
) -> Tensor:  # (N, 3·H·W), |row| = 1
    x = planes(frames)
    if blur:
        down = gaussian(x.shape[2], blur)
        across = gaussian(x.shape[3], blur)
        x = down @ x @ across.T
    centred = x - x.mean((2, 3), keepdim=True)
    return F.normalize(centred.flatten(1), dim=1)


def zncc(pred: Frames, true: Frames) -> Tensor:  # (N,): a·b of slightly blurred frames
    a = unit(pred, 1.0)
    b = unit(true, 1.0)
    return (a * b).sum(1)


METRICS = {  # more is better
    "psnr": psnr,
    "ssim": ssim,
    "zncc": zncc,
}


def energy(frames: Frames) -> Tensor:  # (N,) mean squared gradients of the grey frames
    picture = grey(frames)
    down = picture.diff(dim=1).square()
    across = picture.diff(dim=2).square()
    return per_frame(down) + per_frame(across)


def sharpness(pred: Frames, true: Frames) -> Tensor:  # (N,) of mean 1 = as sharp
    """Gradients over those of *all* true frames: a bare wall alone decides nothing."""
    most = energy(true).mean()
    return energy(pred) / most.clamp(min=1e-6)


# ---- sets of pictures ---------------------------------------------------------------------


def thumbnails(frames: Frames) -> Tensor:  # (N, 192) float64: 8x8 pixels
    small = F.adaptive_avg_pool2d(planes(frames), 8)
    return small.flatten(1).double()


def pixel_pca(
    reference: Frames,
    dims: int = 64,
) -> Callable[[Frames], Tensor]:
    """Features that need no training and no trust: thumbnails on the principal axes of the
    reference, 8 frames or more per axis."""
    known = thumbnails(reference)
    mean = known.mean(0)
    axes = torch.linalg.svd(known - mean, full_matrices=False).Vh
    kept = max(1, min(dims, len(known) // 8))

    def features(frames: Frames) -> Tensor:  # (N, kept)
        return (thumbnails(frames) - mean) @ axes[:kept].T

    return features


def root(matrix: Tensor) -> Tensor:  # of a positive semi-definite matrix
    values, vectors = torch.linalg.eigh(matrix)
    stretched = vectors * values.clamp(min=0).sqrt()
    return stretched @ vectors.T


def frechet(
    a: Tensor,  # (N, d) features
    b: Tensor,  # (M, d)
) -> float:
    """|μ₁−μ₂|² + tr(C₁ + C₂ − 2 (C₁^½ C₂ C₁^½)^½): the distance of two normal laws."""
    d = a.shape[1]
    A = a.T.cov().view(d, d)
    B = b.T.cov().view(d, d)
    half = root(A)
    common = root(half @ B @ half)
    apart = a.mean(0) - b.mean(0)
    return float(apart @ apart + torch.trace(A + B - 2 * common))


def twfd(
    made: list[Frames],  # of every world
    true: list[Frames],
) -> float:
    """Of all that was made and all that is true, whatever belongs to whatever."""
    made = torch.cat(list(map(torch.as_tensor, made)))
    true = torch.cat(list(map(torch.as_tensor, true)))
    features = pixel_pca(true)
    return frechet(features(made), features(true))


# ---- whose picture, whose motion ----------------------------------------------------------


def adoption(
    pred: Frames,
    true: Frames,
    donor: Frames,  # frames of the world whose memory was given
    mask: Sequence,  # (N, H, W) bool: the pixels that count
) -> float:
    """Share of frames that are nearer to the donor than to the truth."""
    made = planes(pred)
    mask = torch.as_tensor(mask)
    from_donor = (made - planes(donor)).square().mean(1)
    from_truth = (made - planes(true)).square().mean(1)
    nearer = per_frame(from_donor * mask) < per_frame(from_truth * mask)
    return float(nearer.double().mean())


def answered(
    moved: Sequence,  # (2, d): what two opposite keys did
    asked: Sequence,  # (2, d): what they should do
    dead: float,  # a zone of length that counts as standing still
) -> bool:
    """KCtrl: both go the way that was asked, m·c/|c|. One motion cannot go both ways."""
    along = (moved * asked).sum(1)
    length = (asked * asked).sum(1) ** 0.5
    return bool((along / length > dead).all())
