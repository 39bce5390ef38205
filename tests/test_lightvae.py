"""What lightvae.py promises."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightvae
import vae_blocks
from lightvae import LatentNorm, Projections, light_loss, vae_loss
from vae import PRESETS, VAE, pruned

MICRO = PRESETS["micro"]


@pytest.fixture(scope="module")
def micro() -> VAE:
    torch.manual_seed(0)
    return VAE(MICRO).eval()


def clip(seed: int) -> torch.Tensor:
    """Smooth coloured waves that move: (2, 3, 5, 16, 16)."""
    g = torch.Generator().manual_seed(seed)
    phase = torch.rand(2, 3, 1, 1, 1, generator=g) * 6
    speed = torch.randn(2, 3, 1, 1, 1, generator=g) * 0.3
    side = torch.arange(16.0)
    t, y, x = torch.meshgrid(torch.arange(5.0), side, side, indexing="ij")
    return torch.sin(phase + speed * t + 0.2 * x - 0.15 * y) * 0.8


def test_vae_loss_falls_on_one_batch_in_float32_and_bfloat16() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = VAE(MICRO)
        norm = LatentNorm(16)
        video = clip(0)
        opt = torch.optim.AdamW(model.parameters(), 1e-2)
        losses = []
        for _ in range(10):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss, parts, _ = vae_loss(model, video, norm, torch.Generator().manual_seed(0))
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.8 * losses[0], losses
        assert set(parts) == {"l1", "structure", "psnr"} and not parts["l1"].requires_grad


def test_latents_are_white_and_folding_changes_nothing() -> None:
    torch.manual_seed(0)
    model, norm = VAE(MICRO), LatentNorm(16)
    with torch.no_grad():
        model.conv1.bias.normal_()
        model.decoder.conv1.weight.mul_(5)
        for seed in range(30):
            z = norm(model.moments(clip(seed)))
            assert (
                z.mean((0, 2, 3, 4)).abs().max() < 1e-3
                and (z.std((0, 2, 3, 4), correction=0) - 1).abs().max() < 0.02
            )
        norm.eval()
        z = norm(model.moments(clip(1)))
        trained = model.decode(z)
        for _ in range(2):  # again: from folded to folded
            norm.fold(model)
            torch.testing.assert_close(model.encode(clip(1)), z, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(model.decode(z), trained, atol=1e-4, rtol=1e-4)
        assert model.cfg.std != () and model.latent_mean.abs().max() > 0.1
        assert "latent_mean" not in model.state_dict()  # the released names stay alone


def test_a_judge_learns_blur_and_asks_the_decoder_for_edges() -> None:
    torch.manual_seed(0)
    judge = lightvae.Judge(8)
    opt = torch.optim.AdamW(judge.parameters(), 2e-3)
    sharp = torch.rand(2, 3, 3, 16, 16)
    blurred = vae_blocks.batch_as_frames(
        F.avg_pool2d(vae_blocks.frames_as_batch(sharp), 3, 1, 1), 2
    ).requires_grad_()
    for _ in range(40):
        opt.zero_grad()
        lightvae.judge_loss(judge, blurred, sharp).backward()
        opt.step()
    assert lightvae.judge_loss(judge, blurred, sharp) < 0.2  # 2 log 2 = 1.39 at the start
    assert blurred.grad is None  # the judge's own loss does not move the picture

    # following the decoder's loss makes the picture sharper, measured as the page measures it
    before = blurred.detach().clone()
    for _ in range(20):
        blurred.grad = None
        lightvae.adversarial_loss(judge, blurred).backward()
        blurred.data -= 0.01 * blurred.grad / blurred.grad.abs().mean()
    assert blurred.diff(dim=-1).square().mean() > 1.1 * before.diff(dim=-1).square().mean()


def test_a_logit_of_the_judge_is_of_18_x_18_pixels() -> None:
    layers = lightvae.Judge(8).layers
    local = nn.Sequential(*[layer for layer in layers if not isinstance(layer, nn.GroupNorm)])
    pair = torch.randn(1, 6, 64, 64, requires_grad=True)
    logits = local(pair)
    logits[0, 0, 8, 8].backward()
    places = pair.grad.abs().sum((0, 1)).nonzero()
    extent = places.amax(0) - places.amin(0) + 1
    assert extent.tolist() == [18, 18]


def test_pruned_decoder_reads_the_same_latents() -> None:
    torch.manual_seed(0)
    teacher, video = VAE(MICRO), clip(0)
    student = VAE(pruned(MICRO, 0.5))
    heads = Projections(student.cfg, teacher.cfg)
    opt = torch.optim.AdamW([*student.parameters(), *heads.parameters()], 1e-2)
    losses = []
    for _ in range(12):
        loss, parts, _ = light_loss(student, teacher, heads, video)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.85 * losses[0] and parts["features"] < 2
    assert all(p.grad is None for p in teacher.parameters())  # the teacher only shows
    assert student.decode(teacher.encode(video)).shape == video.shape
    counts = [sum(p.numel() for p in m.decoder.parameters()) for m in (teacher, student)]
    assert 3 < counts[0] / counts[1] < 4.5  # half the width, a quarter of the weights


def test_structure_sees_blur_and_ignores_brightness() -> None:
    video = torch.rand(1, 3, 2, 32, 32)
    blurred = vae_blocks.batch_as_frames(
        F.avg_pool2d(vae_blocks.frames_as_batch(video), 3, 1, 1), 1
    )
    assert lightvae.structure(video, video) == 0 and lightvae.structure(video + 0.3, video) < 1e-6
    assert lightvae.structure(blurred, video) > 0.1


@pytest.mark.parametrize("rate", [0.5, 0.75])
def test_a_share_of_the_width_costs_its_square(rate: float) -> None:
    tiny = PRESETS["tiny"]
    whole = lightvae.multiply_adds(VAE(tiny))
    share = lightvae.multiply_adds(VAE(pruned(tiny, rate))) / whole
    assert (1 - rate) ** 2 < share < 1.2 * (1 - rate) ** 2
