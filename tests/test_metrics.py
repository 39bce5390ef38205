"""What metrics.py promises."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.film import psnr
from lab import metrics


def normal(n: int, seed: int) -> Tensor:  # (n, 3)
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, dtype=torch.float64, generator=g)


def striped(n: int = 3) -> Tensor:  # (n, 64, 64, 3): edges, and no two frames alike
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 8, 8, generator=g)
    planes = F.interpolate(coarse, scale_factor=8)
    return planes.movedim(1, 3)


def grey(level: float, n: int = 1) -> Tensor:
    return torch.full((n, 64, 64, 3), level)


def noise_like(frames: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(frames.shape, generator=g)


def blurred(frames: Tensor) -> Tensor:
    planes = frames.movedim(3, 1)
    soft = F.avg_pool2d(planes, 3, 1, 1, count_include_pad=False)
    return soft.movedim(1, 3)


# ---- one picture -----------------------------------------------------------------------------------


BEST = {"psnr": 50.0, "ssim": 1.0, "zncc": 1.0}


@pytest.mark.parametrize("name", BEST)
def test_identical_frames_score_perfectly(name: str) -> None:
    frames = striped()
    score = metrics.METRICS[name](frames, frames)
    assert len(score) == 3
    assert score.tolist() == pytest.approx([BEST[name]] * 3, abs=1e-3)


def test_psnr_of_a_constant_error_is_its_closed_form() -> None:
    score = psnr(grey(0.6), grey(0.5))
    assert score.item() == pytest.approx(20.0, abs=1e-4)


def test_ssim_of_flat_frames_is_its_closed_form() -> None:
    product = 0.5 * 0.7
    squares = 0.5**2 + 0.7**2
    brightness = (2 * product + 1e-4) / (squares + 1e-4)
    score = metrics.ssim(grey(0.5), grey(0.7))
    assert score.item() == pytest.approx(brightness, abs=1e-5)


def test_zncc_does_not_see_a_change_of_brightness() -> None:
    frames = 0.3 + 0.4 * striped()
    assert metrics.zncc(frames + 0.1, frames).min() > 0.9999
    assert metrics.zncc(frames.flip(0), frames)[0] < 0.5


def test_as_sharp_as_the_truth_is_one() -> None:
    frames = striped()
    for some in [*frames.split(1), frames]:
        sharp = metrics.sharpness(some, some).mean()
        assert sharp.item() == pytest.approx(1, abs=1e-5)


def test_blur_lowers_sharpness_and_noise_raises_it() -> None:
    true = striped()
    noisy = true + 0.1 * noise_like(true)
    for k in range(len(true)):
        alone = slice(k, k + 1)
        soft = blurred(true[alone])
        assert metrics.sharpness(soft, true[alone]) < 0.9
        assert metrics.sharpness(noisy[alone], true[alone]) > 1.1


def test_noise_on_a_bare_wall_decides_nothing() -> None:
    bare = torch.cat([striped(2), grey(0.5, n=2)])
    noisy = bare + 0.01 * noise_like(bare)
    assert metrics.sharpness(noisy, bare).mean() < 1.2


# ---- sets ------------------------------------------------------------------------------------------


def test_frechet_of_two_normal_laws_is_its_closed_form() -> None:
    a = normal(20_000, 0)
    b = 2 * normal(20_000, 1)
    b[:, 0] += 1
    shift = 1
    spread = 1 + 4 - 2 * 2  # along each of three axes
    assert metrics.frechet(a, b) == pytest.approx(shift + 3 * spread, rel=0.05)
    assert abs(metrics.frechet(a, a)) < 1e-8


def test_features_have_an_axis_for_eight_frames() -> None:
    frames = striped(17)
    features = metrics.pixel_pca(frames)
    true = features(frames)
    assert true.shape == (17, 2)
    same = abs(metrics.frechet(true, true))
    pale = features(0.3 * frames)
    assert metrics.frechet(pale, true) > 10 * same + 0.1


def test_twfd_of_the_truth_is_nothing() -> None:
    worlds = [striped(8), striped(8).flip(1)]
    assert metrics.twfd(worlds, worlds) == pytest.approx(0, abs=1e-6)
    pale = [0.3 * frames for frames in worlds]
    assert metrics.twfd(pale, worlds) > 0.1


# ---- whose picture, whose motion -------------------------------------------------------------------


def test_a_donors_frames_are_adopted_only_by_a_copy_of_them() -> None:
    true = torch.zeros(3, 8, 8, 3)
    donor = torch.ones(3, 8, 8, 3)
    mask = torch.ones(3, 8, 8, dtype=torch.bool)
    assert metrics.adoption(donor, true, donor, mask) == 1
    assert metrics.adoption(true, true, donor, mask) == 0

    half = true.clone()
    half[:, 4:] = 1.0  # the donor below, the truth above
    below = mask.clone()
    below[:, :4] = False
    assert metrics.adoption(half, true, donor, below) == 1
    assert metrics.adoption(half, true, donor, ~below) == 0


def test_an_answer_goes_both_ways() -> None:
    asked = torch.tensor([[0.0, 0.37], [0.0, -0.37]])
    assert metrics.answered(0.5 * asked, asked, 0.1)
    assert not metrics.answered(0.2 * asked, asked, 0.1)
    always_forward = asked[[0, 0]]
    assert not metrics.answered(always_forward, asked, 0.1)
