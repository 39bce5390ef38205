"""A place from a seed: walls, floors, colours."""

import colorsys
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy import ndarray
from numpy.random import Generator


@dataclass(eq=False)
class Scene:
    """Cell (i, j) covers x in [i, i+1), z in [j, j+1) metres. The border is solid, the free cells are connected."""

    seed: int
    kind: str
    solid: ndarray  # (N, N) bool
    region: ndarray  # (N, N) int: the place a cell belongs to; places differ in colour
    height: ndarray  # (N, N) f32: metres of the wall that stands on a cell
    style: dict[str, ndarray] = field(repr=False)  # colours and patterns per place, see _style

    def __post_init__(self) -> None:
        self.outdoor = self.kind in ("plaza", "street")
        seen = np.stack(shifted(~self.solid)) & self.solid  # the faces of a cell to -x, +x, -z, +z
        self.faces = np.where(seen, np.cumsum(seen).reshape(seen.shape) - 1, -1).astype(
            np.int32
        )  # their number, or -1


def scene_caption(scene: Scene) -> str:
    """The kind of place and the colours of its two largest parts."""
    hues = (
        "red",
        "orange",
        "yellow",
        "green",
        "green",
        "teal",
        "cyan",
        "blue",
        "blue",
        "purple",
        "pink",
        "crimson",
    )
    largest, walls = (
        np.bincount(scene.region[~scene.solid]).argsort()[::-1][:2],
        scene.style["wall"],
    )
    names = [
        hues[int(colorsys.rgb_to_hsv(*walls[place % len(walls)])[0] * 12) % 12] for place in largest
    ]
    place = {
        "rooms": "rooms joined by doors",
        "maze": "a maze of corridors",
        "plaza": "an open plaza with pillars",
        "street": "a street of facades",
    }
    return f"{place[scene.kind]}, {' and '.join(dict.fromkeys(names))} walls"


KINDS = ("rooms", "maze", "plaza", "street")
SPLITS = {
    name: range(100_000 * i, 100_000 * (i + 1))
    for i, name in enumerate(("train", "tune", "test", "final"))
}
EYE, RADIUS = 1.6, 0.3  # metres: eye above the floor, half the width of the player's body
FAR = 1000.0  # metres: depth written for the sky; where half of the light is lost
CEILING, PILLAR, TALL = (
    3,
    6,
    7,
)  # metres: rooms and mazes, pillars of a plaza, highest facade of a street
_box = lambda n: np.pad(
    np.zeros((n - 2, n - 2), bool), 1, constant_values=True
)  # (n, n) bool: free, solid border


def shifted(
    mask: ndarray,
) -> list[ndarray]:  # the mask as seen from the cells to its +x, -x, +z, -z
    p = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), bool)
    p[1:-1, 1:-1] = mask
    return [p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]]


def flood(
    free: ndarray, start: tuple[int, int]
) -> ndarray:  # (N, N) steps from start over four neighbours, or -1
    steps, front, k = np.where(free, -1, -2), np.zeros_like(free), 0
    front[start] = True
    while front.any():
        steps[front], k = k, k + 1
        front = np.logical_or.reduce(shifted(front)) & (steps == -1)
    return np.maximum(steps, -1)


def _places(
    rng: Generator, n: int, count: int
) -> ndarray:  # (n, n) int: the nearest of `count` scattered points
    sites, cells = rng.uniform(0, n, (count, 2)), np.indices((n, n)).transpose(1, 2, 0) + 0.5
    return ((cells[:, :, None] - sites) ** 2).sum(-1).argmin(-1)


def _cuts(
    rng: Generator, n: int
) -> list[int]:  # where walls cross a line of n cells: rooms of 5 to 11
    first = int(rng.integers(6, 9))
    return [first, int(rng.integers(first + 6, n - 6))] if n - first > 12 else [first + 2]


def _rooms(
    rng: Generator,
) -> tuple[ndarray, ndarray]:  # rows of rooms; a door to the next room, two to the next row
    n = int(rng.integers(18, 24))
    solid, region, walls = _box(n), np.zeros((n, n), int), _cuts(rng, n)
    for low, high in pairwise([0, *walls, n]):
        for start, end in pairwise([0, *_cuts(rng, n), n]):
            region[low:high, start:end] = region.max() + 1
            if end < n:
                door = int(rng.integers(low + 1, high - 3))
                solid[low:high, end] = True
                solid[door : door + 3, end] = False
            if min(high - low, end - start) >= 8 and rng.random() < 0.7:
                solid[(low + high) // 2, (start + end) // 2] = True  # a pillar to walk around
    for wall in walls:
        solid[wall] = True
        free = ~solid[wall - 1] & ~solid[wall + 1]
        for door in rng.choice(np.flatnonzero(free[:-2] & free[1:-1] & free[2:]), 2):
            solid[wall, door : door + 3] = False
    return solid, region


def _maze(
    rng: Generator,
) -> tuple[ndarray, ndarray]:  # every block opens to +x or +z: all are joined; or both: loops
    m = int(rng.integers(4, 6))
    solid = np.ones((4 * m + 1, 4 * m + 1), bool)
    for i, j in np.ndindex(m, m):
        x, z, way = 4 * i + 1, 4 * j + 1, rng.random()
        solid[x : x + 3, z : z + 3] = False
        solid[x + 3, z : z + 3] &= i + 1 == m or (way < 0.3 and j + 1 < m)
        solid[x : x + 3, z + 3] &= j + 1 == m or (way > 0.7 and i + 1 < m)
    return solid, _places(rng, len(solid), m * m // 2)


def _plaza(rng: Generator) -> tuple[ndarray, ndarray]:  # an open square with pillars
    n = int(rng.integers(18, 23))
    solid = _box(n)
    for x, z in np.ndindex((n - 5) // 5, (n - 5) // 5):
        (i, j), (w, d) = (5 * x + 4, 5 * z + 4) + rng.integers(0, 2, 2), rng.integers(1, 3, 2)
        solid[i : i + w, j : j + d] = rng.random() < 0.7
    return solid, _places(rng, n, 9)


def _street(
    rng: Generator,
) -> tuple[ndarray, ndarray]:  # a ring of streets around a block, often with an alley
    n, w = int(rng.integers(20, 25)), int(rng.integers(4, 6))
    solid = np.pad(_box(n - 2), 1, constant_values=True)
    solid[2 + w : n - 2 - w, 2 + w : n - 2 - w] = True
    if rng.random() < 0.7:
        c, alley = (
            int(rng.integers(n // 2 - 2, n // 2 + 1)),
            solid if rng.random() < 0.5 else solid.T,
        )
        alley[c : c + 3, 2 : n - 2] = False
    return solid, _places(rng, n, 16)


def make_scene(seed: int, kind: str | None = None) -> Scene:
    """The same seed is always the same place. Without a kind, seeds 0, 1, 2, 3, 4 ... take turns through KINDS."""
    kind = KINDS[seed % len(KINDS)] if kind is None else kind
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)} or None, got {kind!r}")
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    solid, region = {"rooms": _rooms, "maze": _maze, "plaza": _plaza, "street": _street}[kind](rng)
    count = int(region.max()) + 1
    height = np.full(solid.shape, CEILING, np.float32)
    if kind == "street":
        height = rng.uniform(3.2, TALL, count).astype(np.float32)[region]
    if kind == "plaza":  # pillars above every wall, so that none hides behind a lower one
        height = np.where(
            _box(len(solid)), rng.uniform(3, PILLAR - 0.5, count)[region], PILLAR
        ).astype(np.float32)
    return Scene(seed, kind, solid, region, height, _style(rng, kind, count))


rgb = lambda text: (
    np.array([list(bytes.fromhex(word)) for word in text.split()], np.float32) / 255
)  # (n, 3)
WALLS = rgb(
    "c46e52 e0c898 ece2cc 96ac84 548e8c 7c9cbc 4a5c8a 80587a d69696 d4aa56 a45448 84865a a8d0b8 78808c aca0c8 ecb890"
)
TRIMS = rgb("f0ecdf 54423a 2e545c e9dcc0 8c3b34 35406b f3c969")
FLOORS = rgb("a87e58 c6a478 96948f 707c88 b2745a 7a8c60 c4b8a0 965450 547a7c 78985a")


def _style(rng: Generator, kind: str, count: int) -> dict[str, ndarray]:
    """Colours of every place: no two alike, so that a view tells where it was taken."""
    jitter = lambda: rng.uniform(0.9, 1.08, (count, 3))
    pick = lambda table: table[np.resize(rng.permutation(len(table)), count)] * jitter()
    zenith, horizon = rgb("5a74b4 f2cfa8" if rng.random() < 0.3 else "5b9bd8 d5e4ec")  # dusk or day
    return {
        "wall": pick(WALLS),
        "floor": pick(FLOORS),
        "ceiling": 0.9 * jitter(),
        "accent": TRIMS[rng.integers(0, len(TRIMS), count)],
        "pattern": rng.integers(0, 8, count) + 8 * (kind == "street"),
        "zenith": zenith,
        "horizon": horizon,
        "hills": rng.uniform(0, 2 * np.pi, 4),
        "posters": rng.integers(0, 2**31, 1),
        "fog": horizon if kind in ("plaza", "street") else rng.uniform(0.55, 0.68, 3),
        "sun": np.array(
            [rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.9)]
        ),  # azimuth, elevation in radians
    }
