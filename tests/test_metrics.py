"""What metrics.py promises."""

import pytest
import torch
import torch.nn.functional as F

from dataset.film import psnr
from lab import metrics


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=g)


def striped(n: int = 3) -> torch.Tensor:  # (n, 64, 64, 3): edges, and no two frames alike
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 8, 8, generator=g)
    return F.interpolate(coarse, scale_factor=8).permute(0, 2, 3, 1)


def blurred(frames: torch.Tensor) -> torch.Tensor:
    soft = F.avg_pool2d(frames.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False)
    return soft.permute(0, 2, 3, 1)


# ---- one picture -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, best", [("psnr", 50.0), ("ssim", 1.0), ("zncc", 1.0)])
def test_identical_frames_score_perfectly(name: str, best: float) -> None:
    frames = striped()
    score = metrics.METRICS[name](frames, frames).float()
    torch.testing.assert_close(score, torch.full((3,), best), atol=1e-3, rtol=0)


def test_psnr_of_a_constant_error_is_its_closed_form() -> None:
    grey = torch.full((1, 64, 64, 3), 0.5)
    assert float(psnr(grey + 0.1, grey)) == pytest.approx(20.0, abs=1e-4)


def test_ssim_of_flat_frames_is_its_closed_form() -> None:
    a = torch.full((1, 16, 16, 3), 0.5)
    b = torch.full((1, 16, 16, 3), 0.7)
    brightness = (2 * 0.5 * 0.7 + 1e-4) / (0.5**2 + 0.7**2 + 1e-4)
    assert float(metrics.ssim(a, b)) == pytest.approx(brightness, abs=1e-5)


def test_zncc_does_not_see_a_change_of_brightness() -> None:
    frames = 0.3 + 0.4 * striped()
    assert metrics.zncc(frames + 0.1, frames).min() > 0.9999
    assert metrics.zncc(frames.flip(0), frames)[0] < 0.5


def test_as_sharp_as_the_truth_is_one() -> None:
    for frame in striped():
        alone = frame[None]
        assert float(metrics.sharpness(alone, alone)) == pytest.approx(1, abs=1e-5)
    frames = striped()
    assert float(metrics.sharpness(frames, frames).mean()) == pytest.approx(1, abs=1e-5)


def test_blur_lowers_sharpness_and_noise_raises_it() -> None:
    true = striped()
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(1))
    soft = blurred(true)
    noisy = true + 0.1 * noise
    for k in range(len(true)):
        alone = true[k : k + 1]
        assert float(metrics.sharpness(soft[k : k + 1], alone)) < 0.9
        assert float(metrics.sharpness(noisy[k : k + 1], alone)) > 1.1


def test_noise_on_a_bare_wall_decides_nothing() -> None:
    bare = torch.cat([striped(2), torch.full((2, 64, 64, 3), 0.5)])
    noise = torch.randn(bare.shape, generator=torch.Generator().manual_seed(1))
    assert float(metrics.sharpness(bare + 0.01 * noise, bare).mean()) < 1.2


# ---- sets ------------------------------------------------------------------------------------------


def test_frechet_of_two_normal_laws_is_its_closed_form() -> None:
    a = normal(20_000, 3, 0)
    b = 2 * normal(20_000, 3, 1)
    b[:, 0] += 1
    assert metrics.frechet(a, b) == pytest.approx(1 + 3 * (1 + 4 - 2 * 2), rel=0.05)
    assert abs(metrics.frechet(a, a)) < 1e-8


def test_features_have_an_axis_for_eight_frames() -> None:
    frames = striped(17)
    features = metrics.pixel_pca(frames)
    assert features(frames).shape == (17, 2)
    same = abs(metrics.frechet(features(frames), features(frames)))
    assert metrics.frechet(features(0.3 * frames), features(frames)) > 10 * same + 0.1


def test_twfd_of_the_truth_is_nothing() -> None:
    worlds = [striped(8), striped(8).flip(1)]
    assert metrics.twfd(worlds, worlds) == pytest.approx(0, abs=1e-6)
    assert metrics.twfd([0.3 * frames for frames in worlds], worlds) > 0.1


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
