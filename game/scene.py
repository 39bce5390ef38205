"""A place from a seed: walls, floors, colours.

A scene is a grid of cells, one metre each, that are solid or free:

    rooms    rows of rooms; doors to the next room and to the next row
    maze     blocks of 3 x 3 free cells, joined so that all can be reached, with some loops
    plaza    an open square with pillars
    street   a ring of streets around a block of houses, often with an alley through it

The border is solid and the free cells are connected. Everything follows from the seed: the same
number is the same place on any machine, and no place of one split is in another.
Tests: pytest tests/test_scene.py
"""

import colorsys
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy import ndarray
from numpy.random import Generator

KINDS = ("rooms", "maze", "plaza", "street")
OUTDOOR = ("plaza", "street")
PER_SPLIT = 100_000
SPLITS = {  # whose seeds are whose
    name: range(PER_SPLIT * i, PER_SPLIT * (i + 1))
    for i, name in enumerate(("train", "tune", "test", "final"))
}
EYE = 1.6  # metres above the floor
RADIUS = 0.3  # metres: half the width of the player's body
FAR = 1000.0  # metres: depth written for the sky
CEILING = 3  # metres: of rooms and mazes
PILLAR = 6  # metres: of a plaza
TALL = 7  # metres: the highest facade of a street


# ---- a place -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Scene:
    """Cell (i, j) covers x in [i, i+1), z in [j, j+1) metres."""

    seed: int
    kind: str
    solid: ndarray  # (N, N) bool
    region: ndarray  # (N, N) int: the place a cell belongs to; places differ in colour
    height: ndarray  # (N, N) f32: metres of the wall that stands on a cell
    style: dict[str, ndarray] = field(repr=False)  # colours and patterns per place, see style_of

    def __post_init__(self) -> None:
        self.outdoor = self.kind in OUTDOOR
        # the faces of solid cells to -x, +x, -z, +z that a player can see: their number, or -1
        seen = np.stack(shifted(~self.solid)) & self.solid
        number = np.cumsum(seen).reshape(seen.shape) - 1
        self.faces = np.where(seen, number, -1).astype(np.int32)


def make_scene(seed: int, kind: str | None = None) -> Scene:
    """The same seed is always the same place. Without a kind, seeds take turns through KINDS."""
    kind = KINDS[seed % len(KINDS)] if kind is None else kind
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)} or None, got {kind!r}")
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    layout = {"rooms": rooms, "maze": maze, "plaza": plaza, "street": street}[kind]
    solid, region = layout(rng)
    count = int(region.max()) + 1
    height = heights(rng, kind, solid, region)
    return Scene(seed, kind, solid, region, height, style_of(rng, kind, count))


def heights(rng: Generator, kind: str, solid: ndarray, region: ndarray) -> ndarray:
    count = int(region.max()) + 1
    if kind == "street":
        height = rng.uniform(3.2, TALL, count)[region]
    elif kind == "plaza":  # pillars above every wall, so that none hides behind a lower one
        wall = rng.uniform(3, PILLAR - 0.5, count)[region]
        height = np.where(bordered(len(solid)), wall, PILLAR)
    else:
        height = np.full(solid.shape, CEILING)
    return height.astype(np.float32)


def scene_caption(scene: Scene) -> str:
    """The kind of place and the colours of its two largest parts."""
    places = {
        "rooms": "rooms joined by doors",
        "maze": "a maze of corridors",
        "plaza": "an open plaza with pillars",
        "street": "a street of facades",
    }
    walls = scene.style["wall"]
    size = np.bincount(scene.region[~scene.solid])
    largest = size.argsort()[::-1][:2]
    colours = dict.fromkeys(hue_name(walls[place % len(walls)]) for place in largest)
    return f"{places[scene.kind]}, {' and '.join(colours)} walls"


def hue_name(colour: ndarray) -> str:
    """One of twelve words around the circle of hues."""
    names = "red orange yellow green green teal cyan blue blue purple pink crimson".split()
    hue, _, _ = colorsys.rgb_to_hsv(*colour)
    return names[int(hue * 12) % 12]


# ---- grids -------------------------------------------------------------------------------------------------


def bordered(n: int) -> ndarray:
    """(n, n) bool: free cells with a solid border."""
    return np.pad(np.zeros((n - 2, n - 2), bool), 1, constant_values=True)


def shifted(mask: ndarray) -> list[ndarray]:
    """The mask as seen from the cells to its +x, -x, +z, -z."""
    rows, columns = mask.shape
    p = np.zeros((rows + 2, columns + 2), bool)
    p[1:-1, 1:-1] = mask
    return [p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]]


def flood(free: ndarray, start: tuple[int, int]) -> ndarray:
    """(N, N) steps from start over four neighbours, or -1."""
    steps = np.where(free, -1, -2)
    front = np.zeros_like(free)
    front[start] = True
    count = 0
    while front.any():
        steps[front] = count
        count += 1
        front = np.logical_or.reduce(shifted(front)) & (steps == -1)
    return np.maximum(steps, -1)


def scattered(rng: Generator, n: int, count: int) -> ndarray:
    """(n, n) int: the nearest of `count` scattered points."""
    sites = rng.uniform(0, n, (count, 2))
    cells = np.indices((n, n)).transpose(1, 2, 0) + 0.5
    square = (cells[:, :, None] - sites) ** 2
    return square.sum(-1).argmin(-1)


# ---- four kinds of places: which cells are solid, and which place each belongs to --------------------------


def cuts(rng: Generator, n: int) -> list[int]:
    """Where walls cross a line of n cells: rooms of 5 to 11."""
    first = int(rng.integers(6, 9))
    if n - first <= 12:
        return [first + 2]
    return [first, int(rng.integers(first + 6, n - 6))]


def rooms(rng: Generator) -> tuple[ndarray, ndarray]:
    n = int(rng.integers(18, 24))
    solid = bordered(n)
    region = np.zeros((n, n), int)
    walls = cuts(rng, n)

    # rows of rooms, with a door to the next room and pillars to walk around
    for low, high in pairwise([0, *walls, n]):
        for start, end in pairwise([0, *cuts(rng, n), n]):
            region[low:high, start:end] = region.max() + 1
            if end < n:
                door = int(rng.integers(low + 1, high - 3))
                solid[low:high, end] = True
                solid[door : door + 3, end] = False
            if min(high - low, end - start) >= 8 and rng.random() < 0.7:
                solid[(low + high) // 2, (start + end) // 2] = True

    # two doors to the next row, where three cells on both sides are free
    for wall in walls:
        solid[wall] = True
        free = ~solid[wall - 1] & ~solid[wall + 1]
        wide = free[:-2] & free[1:-1] & free[2:]
        for door in rng.choice(np.flatnonzero(wide), 2):
            solid[wall, door : door + 3] = False
    return solid, region


def maze(rng: Generator) -> tuple[ndarray, ndarray]:
    """Every block opens to +x or to +z, so all are joined; or to both, which makes loops."""
    m = int(rng.integers(4, 6))
    n = 4 * m + 1
    solid = np.ones((n, n), bool)
    for i, j in np.ndindex(m, m):
        x = 4 * i + 1
        z = 4 * j + 1
        way = rng.random()
        solid[x : x + 3, z : z + 3] = False
        solid[x + 3, z : z + 3] &= i + 1 == m or (way < 0.3 and j + 1 < m)
        solid[x : x + 3, z + 3] &= j + 1 == m or (way > 0.7 and i + 1 < m)
    return solid, scattered(rng, n, m * m // 2)


def plaza(rng: Generator) -> tuple[ndarray, ndarray]:
    n = int(rng.integers(18, 23))
    solid = bordered(n)
    pillars = (n - 5) // 5
    for x, z in np.ndindex(pillars, pillars):
        i, j = (5 * x + 4, 5 * z + 4) + rng.integers(0, 2, 2)
        wide, deep = rng.integers(1, 3, 2)
        solid[i : i + wide, j : j + deep] = rng.random() < 0.7
    return solid, scattered(rng, n, 9)


def street(rng: Generator) -> tuple[ndarray, ndarray]:
    n = int(rng.integers(20, 25))
    wide = int(rng.integers(4, 6))
    solid = np.pad(bordered(n - 2), 1, constant_values=True)
    block = slice(2 + wide, n - 2 - wide)
    solid[block, block] = True
    if rng.random() < 0.7:
        at = int(rng.integers(n // 2 - 2, n // 2 + 1))
        along_z = solid if rng.random() < 0.5 else solid.T
        along_z[at : at + 3, 2 : n - 2] = False
    return solid, scattered(rng, n, 16)


# ---- colours -----------------------------------------------------------------------------------------------


def rgb(text: str) -> ndarray:
    """Words of six hexadecimal digits -> (n, 3) from 0 to 1."""
    colours = [list(bytes.fromhex(word)) for word in text.split()]
    return np.array(colours, np.float32) / 255


WALLS = rgb(
    "c46e52 e0c898 ece2cc 96ac84 548e8c 7c9cbc 4a5c8a 80587a "
    "d69696 d4aa56 a45448 84865a a8d0b8 78808c aca0c8 ecb890"
)
TRIMS = rgb("f0ecdf 54423a 2e545c e9dcc0 8c3b34 35406b f3c969")
FLOORS = rgb("a87e58 c6a478 96948f 707c88 b2745a 7a8c60 c4b8a0 965450 547a7c 78985a")
DAY = rgb("5b9bd8 d5e4ec")  # zenith and horizon
DUSK = rgb("5a74b4 f2cfa8")


def style_of(rng: Generator, kind: str, count: int) -> dict[str, ndarray]:
    """Colours of every place: no two alike, so that a view tells where it was taken."""

    def jitter() -> ndarray:
        return rng.uniform(0.9, 1.08, (count, 3))

    def pick(table: ndarray) -> ndarray:
        order = np.resize(rng.permutation(len(table)), count)
        return table[order] * jitter()

    zenith, horizon = DUSK if rng.random() < 0.3 else DAY
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
        "fog": horizon if kind in OUTDOOR else rng.uniform(0.55, 0.68, 3),
        # azimuth and elevation, in radians
        "sun": np.array([rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.9)]),
    }
