"""What truth.py promises."""

from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from helpers import random_cameras
from torch import Tensor

import camera
import memory
from lab import truth

WHOLE = 4 / 3 * (memory.FAR**3 - memory.NEAR**3)  # cubic metres of a view


def cameras_of(*poses: list[float]) -> Tensor:  # x, y, z, pitch, yaw each
    return camera.pose_to_c2w(torch.tensor(poses).double())


def share_seen_from(*pose: float) -> float:
    """How much of a view from the origin is seen from another pose?"""
    origin = torch.eye(4)[None]
    return truth.exact_overlap(origin, cameras_of(list(pose))).item()


# ---- exact overlap ---------------------------------------------------------------------------------


def test_a_view_overlaps_itself_fully() -> None:
    c2w = random_cameras(20, 0, spread=50)
    itself = truth.exact_overlap(c2w, c2w).diagonal()
    assert itself.tolist() == pytest.approx([1] * 20, abs=2e-6)


def test_opposite_and_distant_views_do_not_overlap() -> None:
    assert share_seen_from(0, 0, -0.3, 0, 180) == 0
    assert share_seen_from(100, 0, 0, 0, 0) == 0


@pytest.mark.parametrize("d", [0.01, 1.0, 10.0, 29.0])
def test_exact_volume_has_its_closed_forms(d: float) -> None:
    near = memory.NEAR
    far = memory.FAR

    # ahead: |x|, |y| <= z − d between near + d and far
    cubes = (far - d) ** 3 - near**3
    ahead = 4 / 3 * cubes
    found = share_seen_from(0, 0, d, 0, 0)
    assert found == pytest.approx(ahead / WHOLE, abs=2e-6)

    # aside: (2z − d) 2z where z > d/2
    low = max(near, d / 2)
    cubes = far**3 - low**3
    squares = far**2 - low**2
    aside = 4 / 3 * cubes - d * squares
    found = share_seen_from(d, 0, 0, 0, 0)
    assert found == pytest.approx(aside / WHOLE, abs=2e-6)


def dense_overlap(query: Tensor, candidate: Tensor) -> float:
    """|V_q ∩ V_c| / |V_q| by midpoints: n slices of n x n cells."""
    n = 300
    g = torch.linalg.inv(candidate) @ query
    R, t = g[:3].split([3, 1], dim=1)
    middle = torch.arange(0.5, n, dtype=torch.float64) / n
    side = middle * 2 - 1
    plane = torch.cartesian_prod(side, side, torch.ones(1).double()).T

    total = 0.0
    depth = memory.FAR - memory.NEAR
    for z in memory.NEAR + depth * middle:
        a, b, c = R @ (plane * z) + t
        beside = torch.maximum(a.abs(), b.abs()) > c
        between = (c > memory.NEAR) & (c < memory.FAR)
        within = between & ~beside
        total += float(within.double().mean() * z**2)
    return total * 4 * depth / n / WHOLE


@pytest.mark.long
def test_exact_volume_agrees_with_dense_sampling() -> None:
    query = random_cameras(1, 3, spread=5)
    ahead = [2, 1, -3, 12, 25]
    aside = [-6, 0, 4, -20, -40]
    candidates = query @ cameras_of(ahead, aside)
    dense = [dense_overlap(query[0], c) for c in candidates]
    exact = truth.exact_overlap(query, candidates)[0]
    assert exact.tolist() == pytest.approx(dense, abs=1e-5)


def test_exact_volume_is_symmetric_and_never_above_one() -> None:
    c2w = random_cameras(40, 0, spread=8)
    exact = truth.exact_overlap(c2w, c2w)
    assert (exact - exact.T).abs().max() <= 3e-6
    assert exact.min() >= 0
    assert exact.max() <= 1 + 3e-6


# ---- coverage --------------------------------------------------------------------------------------


def test_the_greedy_oracle_covers_at_least_as_much_as_any_choice() -> None:
    random = np.random.default_rng(0).random((9, 16, 16))
    seen = torch.from_numpy(random < 0.2)
    assert truth.coverage(seen, range(9)) == 1

    pairs = combinations_with_replacement(range(9), 2)
    most = max(truth.coverage(seen, pair) for pair in pairs)
    chosen = truth.greedy(seen, 2)
    assert truth.coverage(seen, chosen) >= 0.63 * most
    most = max(truth.coverage(seen, [i]) for i in range(9))
    chosen = truth.greedy(seen, 1)
    assert truth.coverage(seen, chosen) == most
