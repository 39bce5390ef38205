"""What explore.py promises."""

import math
from itertools import pairwise

import numpy as np

from game import explore
from game.explore import NavMesh
from game.scene import RADIUS, SPLITS, make_scene


def test_paths_stay_in_free_space():
    for seed in range(8):
        scene = make_scene(seed)
        nav, rng, solid = NavMesh(scene), np.random.default_rng(seed), np.argwhere(scene.solid)
        for _ in range(4):
            a, b = (nav.point(*rng.choice(nav.cells)) for _ in range(2))
            way = [a, *nav.path(a, b)]
            for (x0, z0), (x1, z1) in pairwise(way):
                line = np.linspace((x0, z0), (x1, z1), 2 + int(20 * math.dist((x0, z0), (x1, z1))))
                gap = np.linalg.norm(
                    line[:, None] - np.clip(line[:, None], solid, solid + 1), axis=-1
                ).min()
                assert gap > RADIUS  # of the body's centre to any wall
            grid = nav.astar(*(tuple(int(v / nav.cell) for v in end) for end in (a, b)))
            length = lambda points: sum(math.dist(p, q) for p, q in pairwise(points))
            assert length(way) <= 1.001 * nav.cell * length(grid)  # pulled tight


def test_astar_finds_what_a_slow_search_finds():
    nav = NavMesh(make_scene(1))
    rng = np.random.default_rng(0)
    start, goal = (tuple(cell) for cell in rng.choice(nav.cells, 2).tolist())
    best, front = {start: 0.0}, {start}
    while front:  # Bellman-Ford
        new = set()
        for i, j in front:
            for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
                far = best[i, j] + math.hypot(a, b)
                if (
                    nav.open[i + a][j + b]
                    and nav.open[i + a][j]
                    and nav.open[i][j + b]
                    and far < best.get((i + a, j + b), 1e9) - 1e-9
                ):
                    best[i + a, j + b] = far
                    new.add((i + a, j + b))
        front = new
    way = nav.astar(start, goal)
    assert abs(sum(math.dist(p, q) for p, q in pairwise(way)) - best[goal]) < 1e-6


def test_learned_explorer_covers_more_than_waypoints_than_random():
    scenes = [make_scene(seed) for seed in SPLITS["test"][:40]]
    trained = explore.train_explorer([make_scene(seed) for seed in SPLITS["train"][:64]])
    interval = {}
    for name, weights in (
        ("random", None),
        ("waypoints", np.zeros(4)),
        ("learned", trained),
        ("shipped", explore.POLICY),
    ):
        share = [
            np.mean([explore.explore(s, weights, np.random.default_rng(k))[0] for k in range(2)])
            for s in scenes
        ]
        interval[name] = np.mean(share), 1.96 * np.std(share) / math.sqrt(40)
    for better, worse in (
        ("waypoints", "random"),
        ("learned", "waypoints"),
        ("shipped", "waypoints"),
    ):
        assert (
            interval[better][0] - interval[better][1] > interval[worse][0] + interval[worse][1]
        ), interval
