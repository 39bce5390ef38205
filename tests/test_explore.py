"""What explore.py promises."""

import math
from itertools import pairwise

import numpy as np
import pytest

from game import explore
from game.explore import NavMesh
from game.scene import RADIUS, SPLITS, make_scene

STRAIGHT = [(1, 0), (-1, 0), (0, 1), (0, -1)]
DIAGONAL = [(1, 1), (1, -1), (-1, 1), (-1, -1)]


def length(points):
    return sum(math.dist(p, q) for p, q in pairwise(points))


def gap_to_walls(start, end, solid):
    """How near the middle of a body comes to the cells of walls on a straight line."""
    count = 2 + int(20 * math.dist(start, end))
    line = np.linspace(start, end, count)[:, None]
    nearest = np.clip(line, solid, solid + 1)
    return np.linalg.norm(line - nearest, axis=-1).min()


def test_paths_stay_in_free_space():
    for seed in range(8):
        scene = make_scene(seed)
        nav = NavMesh(scene)
        rng = np.random.default_rng(seed)
        solid = np.argwhere(scene.solid)
        for _ in range(4):
            a, b = (nav.point(*rng.choice(nav.cells)) for _ in range(2))
            way = [a, *nav.path(a, b)]
            for start, end in pairwise(way):
                assert gap_to_walls(start, end, solid) > RADIUS

            # pulled tight: not longer than the way over cells
            cells = (tuple(int(v / nav.cell) for v in end) for end in (a, b))
            grid = nav.astar(*cells)
            assert length(way) <= 1.001 * nav.cell * length(grid)


def slow_search(nav, start):
    """Bellman-Ford: the length of the shortest way to every cell."""
    best = {start: 0.0}
    front = {start}
    while front:
        new = set()
        for i, j in front:
            for a, b in STRAIGHT + DIAGONAL:
                to = i + a, j + b
                far = best[i, j] + math.hypot(a, b)
                cells = (to, (i + a, j), (i, j + b))  # no corner is cut
                if all(nav.free[cell] for cell in cells) and far < best.get(to, 1e9) - 1e-9:
                    best[to] = far
                    new.add(to)
        front = new
    return best


def test_astar_finds_what_a_slow_search_finds():
    nav = NavMesh(make_scene(1))
    rng = np.random.default_rng(0)
    start, goal = (tuple(cell) for cell in rng.choice(nav.cells, 2).tolist())
    way = nav.astar(start, goal)
    assert abs(length(way) - slow_search(nav, start)[goal]) < 1e-6


def interval_covered(weights, places=40):
    """The 95 % interval of the mean share that an explorer covers of so many unseen places."""
    shares = []
    for seed in SPLITS["test"][:places]:
        covered, _ = explore.explore(make_scene(seed), weights, np.random.default_rng(0))
        shares.append(covered)
    half = 1.96 * np.std(shares) / math.sqrt(len(shares))
    return np.mean(shares) - half, np.mean(shares) + half


@pytest.mark.long
def test_learned_explorer_covers_more_than_waypoints_than_random():
    places = [make_scene(seed) for seed in SPLITS["train"][:64]]
    low_learned, _ = interval_covered(explore.train_explorer(places))
    low_shipped, _ = interval_covered(explore.POLICY)
    low_waypoints, high_waypoints = interval_covered(np.zeros(4))
    _, high_random = interval_covered(None, 10)  # far below
    assert low_waypoints > high_random
    assert low_learned > high_waypoints
    assert low_shipped > high_waypoints
