"""What metrics.py promises."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lab import metrics

NOISE = torch.rand(6, 64, 64, 3, generator=torch.Generator().manual_seed(0))
normal = lambda n, d, seed: torch.randn(
    n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_gmsd_does_not_see_a_change_of_brightness_and_sees_noise() -> None:
    grey = 0.3 + 0.4 * NOISE
    assert float(metrics.gmsd(grey + 0.1, grey).max()) < 0.01
    assert float(metrics.gmsd(NOISE, NOISE.flip(0)).min()) > 0.1


def test_haarpsi_equals_a_plain_sum_of_its_definition() -> None:
    a, b = (255 * x.double().numpy() for x in (NOISE[0], NOISE[1]))
    yiq = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    pool = lambda x: x.reshape(32, 2, 32, 2).mean((1, 3))
    a, b = ([pool(x @ row) for row in yiq] for x in (a, b))

    def haar(y: np.ndarray, k: int, down: bool) -> np.ndarray:
        kernel = np.ones((k, k)) / k
        kernel[k // 2 :] *= -1
        kernel, padded = kernel if down else kernel.T, np.pad(y, (k // 2 - 1, k // 2))
        return np.abs(
            [[(padded[i : i + k, j : j + k] * kernel).sum() for j in range(32)] for i in range(32)]
        )

    like = lambda p, q: (2 * p * q + 30) / (p * p + q * q + 30)
    s = [sum(like(haar(a[0], k, d), haar(b[0], k, d)) for k in (2, 4)) / 2 for d in (True, False)]
    w = [np.maximum(haar(a[0], 8, d), haar(b[0], 8, d)) for d in (True, False)]
    mean4 = lambda x: np.pad(np.abs(x[:-1, :-1] + x[1:, :-1] + x[:-1, 1:] + x[1:, 1:]) / 4, (0, 1))
    s, w = (
        [*s, (like(mean4(a[1]), mean4(b[1])) + like(mean4(a[2]), mean4(b[2]))) / 2],
        [*w, (w[0] + w[1]) / 2],
    )
    x = sum((q / (1 + np.exp(-4.2 * p))).sum() for p, q in zip(s, w, strict=True)) / sum(
        q.sum() for q in w
    )
    assert float(metrics.haarpsi(NOISE[:1], NOISE[1:2])) == pytest.approx(
        (math.log(x / (1 - x)) / 4.2) ** 2, abs=1e-4
    )


def test_frechet_of_two_normal_laws_is_its_closed_form() -> None:
    a, b = (
        normal(20_000, 3, 0),
        2 * normal(20_000, 3, 1) + torch.tensor([1.0, 0, 0], dtype=torch.float64),
    )
    assert metrics.frechet(a, b) == pytest.approx(1 + 3 * (1 + 4 - 2 * 2), rel=0.05)
    assert abs(metrics.frechet(a, a)) < 1e-8


def test_mmd_is_unbiased() -> None:
    same = [metrics.mmd(normal(128, 8, 2 * s), normal(128, 8, 2 * s + 1)) for s in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 60**0.5 + 0.01
    assert metrics.mmd(normal(128, 8, 0) + 0.5, normal(128, 8, 1)) > 5 * np.std(same)


def test_a_collapsed_set_is_precise_and_recalls_little():
    true = normal(400, 2, 0)
    assert (
        metrics.share_inside(normal(400, 2, 1), true) > 0.9
        and metrics.share_inside(true, normal(400, 2, 1)) > 0.9
    )
    one = 0.05 * normal(400, 2, 2)  # all near one picture of the truth
    assert metrics.share_inside(one, true) > 0.9 and metrics.share_inside(true, one) < 0.2


def test_a_donors_frames_are_adopted_only_by_a_copy_of_them():
    true, donor, mask = (
        torch.zeros(3, 8, 8, 3),
        torch.ones(3, 8, 8, 3),
        torch.ones(3, 8, 8, dtype=torch.bool),
    )
    assert (
        metrics.adoption(donor, true, donor, mask) == 1
        and metrics.adoption(true, true, donor, mask) == 0
    )
    half = true.clone()
    half[:, 4:] = 1.0  # the donor below, the truth above
    mask[:, :4] = False
    assert (
        metrics.adoption(half, true, donor, mask) == 1
        and metrics.adoption(half, true, donor, ~mask) == 0
    )


def test_balanced_accuracy_of_a_constant_answer_is_one_half():
    held = (torch.rand(200, 6, generator=seeded()) < 0.1).float()
    assert torch.allclose(
        metrics.balanced_accuracy(torch.full((200, 6), -1.0), held), torch.tensor(0.5)
    )
    assert torch.allclose(metrics.balanced_accuracy(2 * held - 1, held), torch.tensor(1.0))
    assert metrics.balanced_accuracy(torch.randn(200, 6, generator=seeded(1)), held).mean() < 0.7


def test_pairs_are_frames_between_which_nothing_changed():
    keyboard, mouse, contact = (
        torch.zeros(12, 6),
        torch.zeros(12, 2),
        torch.zeros(12, dtype=torch.bool),
    )
    keyboard[:5, 0], mouse[5:, 1], contact[11] = (
        1,
        0.3,
        True,
    )  # forward, then turning right, at last against a wall
    frames = torch.arange(13.0)[:, None, None, None].expand(-1, 8, 8, 3) / 13
    before, after, held = metrics.pairs(frames, keyboard, mouse, contact)
    assert (before[:, 0, 0, 0] * 13).round().tolist() == [0, 1, 5, 6, 7] and torch.allclose(
        after - before, torch.tensor(4 / 13)
    )
    assert held.argmax(1).tolist() == [0, 0, 5, 5, 5] and (held.sum(1) == 1).all()


def test_a_reader_learns_which_way_pictures_moved():
    g = seeded()
    wide = F.interpolate(torch.rand(240, 3, 16, 18, generator=g), scale_factor=4)
    right = torch.arange(240) % 2
    after = torch.stack(
        [x[..., 4 + 3 * (2 * r - 1) :][..., :64] for x, r in zip(wide, right.tolist(), strict=True)]
    )
    held = torch.zeros(240, 6)
    held[:, 5], held[:, 4] = (
        right.float(),
        1.0 - right,
    )  # turning right moves the picture to the left
    reader = metrics.learn_keys(wide[:160, ..., 4:68], after[:160], held[:160], steps=40)
    assert sum(p.numel() for p in reader.parameters()) < 110_000
    with torch.no_grad():
        assert (
            metrics.balanced_accuracy(reader(wide[160:, ..., 4:68], after[160:]), held[160:])[
                4:
            ].min()
            > 0.9
        )
