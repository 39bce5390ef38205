"""What truth.py promises."""

import numpy as np
import pytest
import torch

import camera
import memory
from lab import truth

WHOLE = 4 / 3 * (memory.FAR**3 - memory.NEAR**3)  # cubic metres of a view


def random_cameras(n: int, seed: int = 0, spread: float = 5.0) -> torch.Tensor:
    scale = torch.tensor([spread, 0.5, spread, 20, 120], dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    return camera.pose_to_c2w(torch.randn(n, 5, generator=g).double() * scale)


def beside(pose: list[float]) -> torch.Tensor:
    return camera.pose_to_c2w(torch.tensor([pose], dtype=torch.float64))


# ---- exact overlap ---------------------------------------------------------------------------------


def test_a_view_overlaps_itself_fully() -> None:
    c2w = random_cameras(20, spread=50)
    itself = truth.exact_overlap(c2w, c2w).diagonal()
    torch.testing.assert_close(itself, torch.ones(20), atol=2e-6, rtol=0)


def test_opposite_and_distant_views_do_not_overlap() -> None:
    origin = torch.eye(4)[None]
    assert truth.exact_overlap(origin, beside([0, 0, -0.3, 0, 180.0])).item() == 0
    assert truth.exact_overlap(origin, beside([100.0, 0, 0, 0, 0])).item() == 0


@pytest.mark.parametrize("d", [0.01, 1.0, 10.0, 29.0])
def test_exact_volume_has_its_closed_forms(d: float) -> None:
    near = memory.NEAR
    far = memory.FAR
    origin = torch.eye(4, dtype=torch.float64)[None]

    # ahead: |x|, |y| <= z − d between near + d and far
    ahead = 4 / 3 * ((far - d) ** 3 - near**3)
    found = truth.exact_overlap(origin, beside([0, 0, d, 0, 0])).item()
    assert found == pytest.approx(ahead / WHOLE, abs=2e-6)

    # aside: (2z − d) 2z where z > d/2
    low = max(near, d / 2)
    aside = 4 / 3 * (far**3 - low**3) - d * (far**2 - low**2)
    found = truth.exact_overlap(origin, beside([d, 0, 0, 0, 0])).item()
    assert found == pytest.approx(aside / WHOLE, abs=2e-6)


def dense_overlap(query: torch.Tensor, candidate: torch.Tensor, n: int = 300) -> float:
    """|V_q ∩ V_c| / |V_q| by midpoints: n slices of n x n cells."""
    g = torch.linalg.inv(candidate) @ query
    middle = (torch.arange(n).double() + 0.5) / n
    side = middle * 2 - 1
    grid = torch.meshgrid(side, side, indexing="xy")
    x, y = (v.flatten() for v in grid)

    total = 0.0
    for z in middle * (memory.FAR - memory.NEAR) + memory.NEAR:
        points = torch.stack([x * z, y * z, z.expand_as(x)])
        a, b, c = g[:3, :3] @ points + g[:3, 3:]
        within = torch.maximum(a.abs(), b.abs()) <= c
        within &= (c > memory.NEAR) & (c < memory.FAR)
        total += float(within.double().mean() * z * z)
    return total * 4 * (memory.FAR - memory.NEAR) / n / WHOLE


def test_exact_volume_agrees_with_dense_sampling() -> None:
    query = random_cameras(1, 3)
    moves = torch.tensor([[2, 1, -3, 12, 25], [-6, 0, 4, -20, -40]], dtype=torch.float64)
    candidates = query @ camera.pose_to_c2w(moves)
    dense = torch.tensor([dense_overlap(query[0], c) for c in candidates])
    exact = truth.exact_overlap(query, candidates)[0]
    torch.testing.assert_close(exact, dense, atol=1e-5, rtol=0)


def test_exact_volume_is_symmetric_and_never_above_one() -> None:
    c2w = random_cameras(40, spread=8)
    exact = truth.exact_overlap(c2w, c2w)
    torch.testing.assert_close(exact, exact.T, atol=3e-6, rtol=0)
    assert exact.min() >= 0 and exact.max() <= 1 + 3e-6


# ---- coverage --------------------------------------------------------------------------------------


def test_the_greedy_oracle_covers_at_least_as_much_as_any_choice() -> None:
    seen = torch.from_numpy(np.random.default_rng(0).random((9, 16, 16)) < 0.2)
    best = truth.coverage(seen, truth.greedy(seen, 2))
    assert truth.coverage(seen, range(9)) == 1
    pairs = [truth.coverage(seen, (i, j)) for i in range(9) for j in range(9)]
    assert best >= 0.63 * max(pairs)
    alone = [truth.coverage(seen, [i]) for i in range(9)]
    assert truth.coverage(seen, truth.greedy(seen, 1)) == max(alone)
