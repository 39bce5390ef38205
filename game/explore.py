"""Where to walk: ways through the free cells, and a learned explorer.

Two maps of one place. The navmesh is fine and knows the width of a body: a walk along it touches
nothing. The explorer decides on whole cells, cheaply, where to go next: of eight places drawn at
random it takes k with

    π(k) = softmax_k(f_k · w)                                                                    (1)

f_k are four features of the way there. How good w is shows only after a whole episode, in the
share G of the place that was covered. But the mean of G can be climbed without a derivative of the
game, because ∇ Σ_k π(k)·G = Σ_k π(k)·G·∇ log π(k) is a mean over what was done anyway (REINFORCE):

    ∇ log π(k) = f_k − Σ_j π(j)·f_j                                                              (2)
    Δw = η·(G − baseline)·∇ log π                                                                (3)

The baseline is the moving mean of G: it changes no mean, since Σ_k π(k)·∇ log π(k) = 0, and takes
away most of the noise. The paper trains such an explorer in Unreal (§4); the features are ours.
Tests: pytest tests/test_explore.py
"""

import math
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import pairwise, product

import numpy as np
from numpy import ndarray
from numpy.random import Generator

from game.scene import Scene, flood

Cell = tuple[int, int]
Place = tuple[float, float]  # x and z in metres


# ---- the navmesh -------------------------------------------------------------------------------------------


def neighbours() -> list[tuple[int, int, float]]:
    """Eight steps, and how long each is."""
    around = product((-1, 0, 1), repeat=2)
    return [(a, b, math.hypot(a, b)) for a, b in around if a or b]


def outside(cell: ndarray, x: ndarray) -> ndarray:
    """How far x is from the metre that begins at `cell`."""
    return np.maximum(np.maximum(cell - x, x - cell - 1), 0)


class NavMesh:
    """Where one can walk without touching anything: free space eroded by a radius, on a finer grid."""

    def __init__(self, scene: Scene, cell: float = 0.5, radius: float = 0.6) -> None:
        self.cell = cell
        n = round(len(scene.solid) / cell)
        middle = (np.arange(n) + 0.5) * cell
        x, z = np.argwhere(scene.solid).T[..., None]  # (solid cells, 1) each
        dx = outside(x, middle)[:, :, None]
        dz = outside(z, middle)[:, None]
        away = dx**2 + dz**2 >= radius**2  # (solid cells, n, n)
        free = away.all(0)

        # what cannot be reached is not free
        start = tuple(np.argwhere(free)[0])
        self.free = flood(free, start) >= 0
        self.cells = np.argwhere(self.free)
        self.open = self.free.tolist()  # a list is ten times faster to ask

    def point(self, i: int, j: int) -> Place:
        """The middle of a cell."""
        return float((i + 0.5) * self.cell), float((j + 0.5) * self.cell)

    def holds(self, x: float, z: float) -> bool:
        return self.open[int(x / self.cell)][int(z / self.cell)]

    def nearest(self, place: Place) -> Cell:
        away = self.cells + 0.5 - np.array(place) / self.cell
        i, j = self.cells[np.hypot(*away.T).argmin()].tolist()
        return i, j

    def astar(self, start: Cell, goal: Cell) -> list[Cell]:
        """The shortest way over eight neighbours that cuts no corner."""
        length = {start: 0.0}
        came: dict[Cell, Cell] = {}
        heap = [(0.0, start)]
        steps = neighbours()
        while heap[0][1] != goal:
            _, here = heappop(heap)
            i, j = here
            for a, b, step in steps:
                to = i + a, j + b
                far = length[here] + step
                corner_free = self.open[i + a][j] and self.open[i][j + b]
                if not self.open[i + a][j + b] or not corner_free:
                    continue
                if far < length.get(to, math.inf):
                    length[to] = far
                    came[to] = here
                    heappush(heap, (least(far, to, goal), to))

        way = [goal]
        while way[-1] != start:
            way.append(came[way[-1]])
        return way[::-1]

    def sees(self, a: Place, b: Place) -> bool:
        """Can one walk straight from a to b?"""
        (x0, z0), (x1, z1) = a, b
        n = 1 + int(math.dist(a, b) / 0.1)
        for k in range(n + 1):
            x = x0 + k / n * (x1 - x0)
            z = z0 + k / n * (z1 - z0)
            if not self.holds(x, z):
                return False
        return True

    def path(self, start: Place, goal: Place) -> list[Place]:
        """A*, then string pulling: a corner stays where the straight line from the last one ends."""
        cells = self.astar(self.nearest(start), self.nearest(goal))
        way = [self.point(*cell) for cell in cells]
        corners = way[:1]
        for before, after in pairwise(way):
            if not self.sees(corners[-1], after):
                corners.append(before)
        return [*corners[1:], way[-1]]


def least(far: float, here: Cell, goal: Cell) -> float:
    """How long a way is at least: what is behind, and what remains if nothing is in between."""
    di = abs(here[0] - goal[0])
    dj = abs(here[1] - goal[1])
    diagonal = min(di, dj)
    return far + max(di, dj) + (math.sqrt(2) - 1) * diagonal


# ---- the explorer ------------------------------------------------------------------------------------------

POLICY = np.array([2.57, 6.21, 0.87, 8.78])  # train_explorer() on the first 64 training scenes
SIGHT = 4  # cells around a goal that count as what one sees there


def features(goals: ndarray, here: Cell, yaw: float, steps: ndarray, seen: ndarray) -> ndarray:
    """(goals, 4): length of the way, share of new cells around its end, that per length, how far it is
    straight ahead (a cosine)."""
    length = steps[tuple(goals.T)] / len(steps)
    new = np.array([1 - around(seen, i, j).mean() for i, j in goals])
    heading = math.sin(yaw), math.cos(yaw)
    way = goals - here
    ahead = way @ heading / np.linalg.norm(way, axis=1)
    return np.stack([length, new, 0.2 * new / length, ahead], 1)


def around(cells: ndarray, i: int, j: int) -> ndarray:
    """The cells that one sees from a goal."""
    rows = slice(max(i - SIGHT, 0), i + SIGHT + 1)
    columns = slice(max(j - SIGHT, 0), j + SIGHT + 1)
    return cells[rows, columns]


def way_home(steps: ndarray, goal: Cell) -> list[Cell]:
    """From a goal downhill to a neighbour of the start."""
    way = [goal]
    while steps[way[-1]] > 1:
        i, j = way[-1]
        around = (i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)
        way.append(next(cell for cell in around if steps[cell] == steps[i, j] - 1))
    return way


def choose(
    scene: Scene,
    seen: ndarray,  # (N, N) bool; what the way covers is marked
    here: Cell,
    yaw: float,
    weights: ndarray | None,  # zeros: random waypoints; None: a random walk from cell to cell
    rng: Generator,
) -> tuple[list[Cell], ndarray]:
    """Where to go next -> the cells of the way, and ∇ log π of the choice."""
    steps = flood(~scene.solid, here)
    candidates = steps > 0 if weights is not None else steps == 1
    goals = rng.permutation(np.argwhere(candidates))[:8]
    f = features(goals, here, yaw, steps, seen)
    odds = np.exp(f @ (np.zeros(4) if weights is None else weights))
    odds /= odds.sum()  # (1)
    k = int(rng.choice(len(goals), p=odds))

    i, j = goals[k]
    way = way_home(steps, (int(i), int(j)))
    for i, j in way:  # a cell is covered from its neighbours too
        seen[i - 1 : i + 2, j - 1 : j + 2] = True
    return way[::-1], f[k] - odds @ f  # (2)


def explore(
    scene: Scene, weights: ndarray | None, rng: Generator, budget: int = 120
) -> tuple[float, ndarray]:
    """The share of the free cells that ways of `budget` steps in all cover, and the sum of ∇ log π."""
    free = ~scene.solid
    seen = scene.solid.copy()
    gradient = np.zeros(4)
    here = tuple(rng.choice(np.argwhere(free)).tolist())
    yaw = 0.0
    while True:
        covered = float(seen[free].mean())
        way, change = choose(scene, seen, here, yaw, weights, rng)
        budget -= len(way)
        if budget < 0:  # the last way was too long
            return covered, gradient
        end = way[-1]
        yaw = math.atan2(end[0] - here[0], end[1] - here[1])
        here = end
        gradient = gradient + change


def train_explorer(
    scenes: Sequence[Scene], episodes: int = 400, rate: float = 3.0, seed: int = 0
) -> ndarray:
    """The four weights, by REINFORCE."""
    rng = np.random.default_rng(seed)
    weights = np.zeros(4)
    baseline = 0.65
    for k in range(episodes):
        G, gradient = explore(scenes[k % len(scenes)], weights, rng)
        weights = weights + rate * (G - baseline) * gradient  # (3)
        baseline += 0.05 * (G - baseline)
    return weights
