"""What episode.py promises."""

import torch

from dataset.episode import psnr
from lab import metrics


def test_psnr_and_ssim_know_their_limits() -> None:
    x = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0)) * 0.5
    assert psnr(x, x).tolist() == [50, 50] and torch.allclose(metrics.ssim(x, x), torch.ones(2))
    assert torch.allclose(psnr(x, x + 0.1), torch.full((2,), 20.0), atol=1e-3)  # 10 log10(1 / 0.01)
    assert metrics.ssim(x, x.flip(1)).max() < 0.2
    mask, y = torch.zeros(2, 32, 32), x.clone()
    mask[:, :16], y[:, 16:] = 1, 0
    assert psnr(x, y, mask).tolist() == [50, 50]
    assert psnr((x[:1] * 255).byte(), x[:1]) > 45
