"""How a player walks: keys and turns, tick by tick, that end where they should.

A walk is a generator: it looks at the player, yields the action of this tick, and is asked again
when the player has moved. The paper's explorer (§4) wants coverage; a memory wants places seen
again. So most walks come back, and some come back exactly. A step turns by Δ and moves along the
heading half way, yaw + Δ/2 (camera.py). The inverse action, opposite keys and −Δ, taken at the new
pose, moves along (yaw + Δ) − Δ/2: the same line. So it undoes the step, and undone from the last
to the first

    undo(a_1, ..., a_n) = a_n⁻¹, ..., a_1⁻¹                                                        (1)

leads home, through the very same poses: frame 2·half − t of a palindrome shows what frame t showed.
Tests: pytest tests/test_world.py
"""

import math
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Protocol

import numpy as np
from numpy import ndarray
from numpy.random import Generator

from camera import DEGREES, KEYS, step_pose
from game.explore import POLICY, NavMesh, choose
from game.scene import Scene

Keys = tuple[int, ...]  # six, in the order of camera.KEYS
Action = tuple[Keys, tuple[float, float]]  # keys, and mouse (pitch, yaw) in units of 15 degrees
Actions = list[Action]


def press(*names: str) -> Keys:
    return tuple(int(name in names) for name in KEYS)


NONE = press()
W = press("w")
S = press("s")
A = press("a")
D = press("d")
WA = press("w", "a")
WD = press("w", "d")
STILL = (0.0, 0.0)

# which keys to press when looking so many degrees to the right of the way, and how often that is
FACING = {0: W, 45: WA, -45: WD, 90: A, -90: D, 180: S}
FACING_ODDS = (0.7, 0.07, 0.07, 0.06, 0.06, 0.04)
MIXTURE = {"rl": 0.3, "walk": 0.15, "loop": 0.3, "palindrome": 0.15, "random": 0.1}


class Player(Protocol):
    """What a walk must know of the game."""

    pose: tuple[float, ...]  # x, y, z in metres, pitch and yaw in degrees; changes with every tick
    nav: NavMesh
    scene: Scene


def undo(actions: Actions) -> Actions:
    """The inverse of every action, from the last to the first."""
    back = []
    for (w, s, a, d, *rest), (pitch, yaw) in reversed(actions):
        inverse = (s, w, d, a, *rest), (-pitch, -yaw)
        back.append(inverse)  # (1)
    return back


def figure(player: Player, rng: Generator) -> Actions:
    """A short figure that ends where it began; where it would leave the navmesh, it turns back."""
    speed = float(rng.choice((-0.4, -0.3, -0.2, 0.2, 0.3, 0.4)))
    once_around = round(360 / DEGREES / abs(speed))
    hold = [(NONE, STILL)] * int(rng.integers(2, 12))
    ticks = int(rng.integers(10, 34))

    turn = [(NONE, (0.0, speed))] * ticks
    tilt = [(NONE, (math.copysign(0.2, speed), 0.0))] * int(rng.integers(2, 7))
    sideways = (A, D, S)[int(rng.integers(3))]
    step = [(sideways, STILL)] * (ticks // 2)
    orbit = A if speed > 0 else D

    figures = [
        [*turn, *hold, *undo(turn)],  # look away and back
        [(NONE, (0.0, speed))] * once_around,  # on the spot
        [*tilt, *hold, *undo(tilt)],  # look up or down and back
        [(W, (0.0, speed))] * once_around,  # walk a circle
        [(orbit, (0.0, speed))] * once_around,  # walk around a point, looking at it
        [*step, *hold, *undo(step)],  # side step and back
    ]
    odds = (0.32, 0.14, 0.16, 0.12, 0.13, 0.13)
    return stay_on_mesh(player, figures[rng.choice(len(figures), p=odds)])


def stay_on_mesh(player: Player, actions: Actions) -> Actions:
    """The actions, or the way to the edge of the navmesh and back."""
    pose = player.pose
    for done, (keys, mouse) in enumerate(actions):
        pose = step_pose(pose, keys, mouse)
        if not player.nav.holds(pose[0], pose[2]):
            way = actions[:done]
            return way + undo(way)
    return actions


def go(player: Player, rng: Generator, goal: tuple[float, float]) -> Iterator[Action]:
    """Follow the navmesh; turn by multiples of 1.5 degrees; sometimes look sideways or backwards."""
    facing = int(rng.choice(list(FACING), p=FACING_ODDS))
    fastest = int(rng.integers(2, 5))
    here = player.pose[0], player.pose[2]
    for x, z in player.nav.path(here, goal):
        for _ in range(400):  # a corner that cannot be reached must not hold the walk for ever
            dx = x - player.pose[0]
            dz = z - player.pose[2]
            distance = math.hypot(dx, dz)
            if distance < 0.3:
                break

            heading = math.degrees(math.atan2(dx, dz)) + facing
            error = (heading - player.pose[4] + 180) % 360 - 180
            turn = max(-fastest, min(fastest, round(error / 1.5)))
            straight_enough = abs(error) < (30 if distance > 1 else 12)
            keys = FACING[facing] if straight_enough else NONE
            yield keys, (0.0, turn / 10)


def explorer(player: Player, rng: Generator, weights: ndarray) -> Iterator[tuple[float, float]]:
    """Where to go next, as the explorer says: the middle of a cell that shows much unseen ground."""
    seen = player.scene.solid.copy()
    while True:
        here = int(player.pose[0]), int(player.pose[2])
        yaw = math.radians(player.pose[4])
        path, _ = choose(player.scene, seen, here, yaw, weights, rng)
        i, j = path[-1]
        yield i + 0.5, j + 0.5


def places_near(player: Player, rng: Generator) -> list[tuple[float, float]]:
    """Where the player stands, and one to three places two to four metres away."""
    nav = player.nav
    x, _, z, _, _ = player.pose
    away = np.hypot(*(nav.cells * nav.cell - (x, z)).T)
    ring = nav.cells[np.abs(away - rng.uniform(2, 4)) < 1.5]
    cells = rng.permutation(ring)[: int(rng.integers(1, 4))]
    return [(x, z), *(nav.point(*cell) for cell in cells)]


def tour(player: Player, rng: Generator, weights: ndarray, again: bool) -> Iterator[Action]:
    """Go somewhere, look around, go on: where the explorer says, or to the same places again."""
    places = places_near(player, rng)  # drawn in any case, so that a seed keeps its walk
    goals = cycle(places) if again else explorer(player, rng, weights)
    while True:
        if rng.random() < 0.55:
            yield from figure(player, rng)
        yield from go(player, rng, next(goals))


def palindrome(walk: Iterator[Action], half: int) -> Iterator[Action]:
    """There and back: frame 2·half − t repeats frame t."""
    way = []
    for action in islice(walk, half):
        way.append(action)
        yield action
    yield from undo(way)
    yield from walk


def at_random(rng: Generator) -> Iterator[Action]:
    """Keys and turns held for twelve ticks, walls or not."""
    choices = (NONE, W, W, W, S, A, D, WA, WD)
    turns = (0, 0, 0.1, 0.2, 0.3, -0.1, -0.2, -0.3)
    while True:
        keys = choices[int(rng.integers(len(choices)))]
        turn = float(rng.choice(turns))
        yield from [(keys, (0.0, turn))] * 12


def plan(player: Player, rng: Generator, behaviour: str, steps: int) -> Iterator[Action]:
    """The walk of a behaviour, one of MIXTURE."""
    if behaviour == "random":
        return at_random(rng)
    weights = np.zeros(4) if behaviour == "walk" else POLICY  # zeros: random waypoints
    walk = tour(player, rng, weights, again=behaviour == "loop")
    return palindrome(walk, steps // 2) if behaviour == "palindrome" else walk
