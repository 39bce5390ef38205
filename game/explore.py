"""Where to walk: ways through the free cells, and a learned explorer."""

import math
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
from numpy import ndarray
from numpy.random import Generator

from game.scene import Scene, flood


class NavMesh:
    """Where one can walk without touching anything: the free space eroded by a radius, on a finer grid."""

    def __init__(self, scene: Scene, cell: float = 0.5, radius: float = 0.6) -> None:
        self.cell, n = cell, round(len(scene.solid) / cell)
        centre, solid = (np.arange(n) + 0.5) * cell, np.argwhere(scene.solid)
        dx, dz = (
            np.maximum(np.maximum(k - centre, centre - k - 1), 0) for k in solid.T[..., None]
        )  # (solid cells, n)
        free = (dx[:, :, None] ** 2 + dz[:, None] ** 2 >= radius**2).all(0)
        self.free = flood(free, tuple(np.argwhere(free)[0])) >= 0
        self.cells, self.open = np.argwhere(self.free), self.free.tolist()

    def point(self, i: int, j: int) -> tuple[float, float]:  # metres of the middle of a cell
        return float((i + 0.5) * self.cell), float((j + 0.5) * self.cell)

    def holds(self, x: float, z: float) -> bool:
        return self.open[int(x / self.cell)][int(z / self.cell)]

    def astar(self, start: tuple[int, int], goal: tuple[int, int]) -> list[tuple[int, int]]:
        """The shortest way over eight neighbours that cuts no corner: f = length so far + octile distance."""
        length, came, heap = {start: 0.0}, {}, [(0.0, start)]
        steps = [(a, b, math.hypot(a, b)) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
        while heap[0][1] != goal:
            _, (i, j) = heappop(heap)
            for a, b, step in steps:
                to, far = (i + a, j + b), length[i, j] + step
                if (
                    self.open[i + a][j + b]
                    and self.open[i + a][j]
                    and self.open[i][j + b]
                    and far < length.get(to, math.inf)
                ):
                    length[to], came[to], di, dj = (
                        far,
                        (i, j),
                        abs(to[0] - goal[0]),
                        abs(to[1] - goal[1]),
                    )
                    heappush(heap, (far + max(di, dj) + (math.sqrt(2) - 1) * min(di, dj), to))
        way = [goal]
        while way[-1] != start:
            way.append(came[way[-1]])
        return way[::-1]

    def sees(
        self, a: tuple[float, float], b: tuple[float, float]
    ) -> bool:  # one can walk straight from a to b
        n = 1 + int(math.dist(a, b) / 0.1)
        return all(
            self.holds(a[0] + k / n * (b[0] - a[0]), a[1] + k / n * (b[1] - a[1]))
            for k in range(n + 1)
        )

    def path(
        self, start: tuple[float, float], goal: tuple[float, float]
    ) -> list[tuple[float, float]]:
        """A*, then string pulling: a corner stays only where the straight line from the last one ends."""
        near = (
            self.cells[
                np.hypot(*(self.cells + 0.5 - np.array(end) / self.cell).T).argmin()
            ].tolist()
            for end in (start, goal)
        )
        way = [self.point(*cell) for cell in self.astar(*map(tuple, near))]
        corners = way[:1]
        for before, after in pairwise(way):
            if not self.sees(corners[-1], after):
                corners.append(before)
        return [*corners[1:], way[-1]]


POLICY = np.array(
    [2.57, 6.21, 0.87, 8.78]
)  # what train_explorer() finds on the first 64 training scenes


def choose(
    scene: Scene,
    seen: ndarray,
    here: tuple[int, int],
    yaw: float,
    weights: ndarray | None,
    rng: Generator,
) -> tuple:
    """Where to go next: one of eight places drawn at random, π(k) = softmax(f_k · w) -> cells of the way, ∇ log π(k).
    f: length of the way, share of new cells around the goal, the same per length, cosine with the heading. Zero weights
    are random waypoints, None is a random walk from cell to cell. Marks in `seen` (N, N) what the way covers."""
    steps, heading = flood(~scene.solid, here), (math.sin(yaw), math.cos(yaw))
    goals = rng.permutation(np.argwhere(steps > 0 if weights is not None else steps == 1))[:8]
    length = steps[tuple(goals.T)] / len(steps)
    new = np.array(
        [1 - seen[max(i - 4, 0) : i + 5, max(j - 4, 0) : j + 5].mean() for i, j in goals]
    )
    ahead = (goals - here) @ heading / np.linalg.norm(goals - here, axis=1)
    f = np.stack([length, new, 0.2 * new / length, ahead], 1)
    odds = np.exp(f @ (np.zeros(4) if weights is None else weights))
    odds /= odds.sum()
    k = int(rng.choice(len(goals), p=odds))
    path = [tuple(map(int, goals[k]))]
    while steps[path[-1]] > 1:  # downhill, home
        i, j = path[-1]
        path.append(
            next(
                c
                for c in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1))
                if steps[c] == steps[i, j] - 1
            )
        )
    for i, j in path:  # a cell is covered from its neighbours too
        seen[i - 1 : i + 2, j - 1 : j + 2] = True
    return path[::-1], f[k] - odds @ f  # ∇ log π(k) = f_k − Σ π f


def explore(
    scene: Scene, weights: ndarray | None, rng: Generator, budget: int = 120
) -> tuple[float, ndarray]:
    """Share of the free cells that ways of `budget` steps in all cover, and the sum of ∇ log π over the choices."""
    seen, gradient, here, yaw = (
        scene.solid.copy(),
        np.zeros(4),
        tuple(rng.choice(np.argwhere(~scene.solid)).tolist()),
        0.0,
    )
    while True:
        covered = float(seen[~scene.solid].mean())
        path, change = choose(scene, seen, here, yaw, weights, rng)
        budget -= len(path)
        if budget < 0:  # the last way was too long
            return covered, gradient
        yaw, here, gradient = (
            math.atan2(path[-1][0] - here[0], path[-1][1] - here[1]),
            path[-1],
            gradient + change,
        )


def train_explorer(
    scenes: Sequence[Scene], episodes: int = 400, rate: float = 3.0, seed: int = 0
) -> ndarray:  # (4,)
    """REINFORCE. G is the coverage of an episode, the baseline its moving mean."""
    rng, weights, baseline = np.random.default_rng(seed), np.zeros(4), 0.65
    for k in range(episodes):
        G, gradient = explore(scenes[k % len(scenes)], weights, rng)
        weights = weights + rate * (G - baseline) * gradient  # Δw = η·(G − baseline)·∇ log π
        baseline += 0.05 * (G - baseline)
    return weights
