"""A small game with exact cameras and actions: scenes, renderer, characters, clock and explorer.

Paper: §4 (Unreal-Gen: scenes, tick-synchronised capture, navmesh + RL explorer, modular characters). Not released.

    d = F + τ·R,  τ = u/a              heading of a pixel; a, b: forward and up part of the rays of its row
    1/t = (F + τ·R)_k / (w − p)_k      inverse distance to the wall at w: linear in τ, exact in every pixel
    1/t = (b/a) / (h − eye)            inverse distance to floor or ceiling: constant along a row
    the larger 1/t is seen; z-depth = t/a                                                       render()
    pose′ = slide(step_pose(pose, action))      frame, camera, player, action of ONE tick       World.tick()
    Δw = η·(G − baseline)·∇ log π_w    where to go next is learned: REINFORCE on coverage G     train_explorer()

Conventions are memory.py's (OpenCV axes, metres, floor y = 0, eye y = -1.6, action t leads to frame t + 1). A frame
depends on its own float32 camera only: stored cameras render the same bits again. The walk cycle of a figure follows
from where it stands, so its pose is all that must be stored. A scene belongs to the split of its seed (SPLITS).

Not Unreal: one wall height per cell, only the player moves, no roll, |pitch| <= 35°. Ours where the paper is silent:
soft low-frequency paint (a small VAE must learn it), the features, the behaviours. numpy, but for one call of torch.
Demo: python world.py      Tests: pytest tests/test_world.py
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
import torch
from numpy import ndarray
from numpy.random import Generator

from memory import ARM, DEGREES, LIFT, TILT, intrinsics, pose_to_c2w, step_pose

KINDS = ("rooms", "maze", "plaza", "street")
SPLITS = {
    name: range(100_000 * i, 100_000 * (i + 1))
    for i, name in enumerate(("train", "tune", "test", "final"))
}
EYE, RADIUS = 1.6, 0.3  # metres: eye above the floor, half the width of the player's body
MAX_PITCH = 35.0  # degrees: |pitch| + half the vertical field of view must stay below 90
FAR, FOG = 1000.0, 24.0  # metres: depth written for the sky; where half of the light is lost
CEILING, PILLAR, TALL = (
    3,
    6,
    7,
)  # metres: rooms and mazes, pillars of a plaza, highest facade of a street
TEXELS, LEVELS = 16, 4  # texels per metre near the eye, and how often they are halved with distance
SKY = (64, 256)  # rows and columns of the sky panorama
CHUNK = 65_536  # rays drawn at once: temporaries of 256 KB stay in the cache
Actions = list[
    tuple[tuple[int, ...], tuple[float, float]]
]  # six keys and mouse (pitch, yaw) of every tick
_box = lambda n: np.pad(
    np.zeros((n - 2, n - 2), bool), 1, constant_values=True
)  # (n, n) bool: free, solid border


# ---- scenes ----------------------------------------------------------------------------------------------------------
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
        seen = np.stack(_shifted(~self.solid)) & self.solid  # the faces of a cell to -x, +x, -z, +z
        self.faces = np.where(seen, np.cumsum(seen).reshape(seen.shape) - 1, -1).astype(
            np.int32
        )  # their number, or -1


def _shifted(
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
        front = np.logical_or.reduce(_shifted(front)) & (steps == -1)
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


# ---- paint -----------------------------------------------------------------------------------------------------------
_rgb = lambda text: (
    np.array([list(bytes.fromhex(word)) for word in text.split()], np.float32) / 255
)  # (n, 3)
WALLS = _rgb(
    "c46e52 e0c898 ece2cc 96ac84 548e8c 7c9cbc 4a5c8a 80587a d69696 d4aa56 a45448 84865a a8d0b8 78808c aca0c8 ecb890"
)
TRIMS = _rgb("f0ecdf 54423a 2e545c e9dcc0 8c3b34 35406b f3c969")
FLOORS = _rgb("a87e58 c6a478 96948f 707c88 b2745a 7a8c60 c4b8a0 965450 547a7c 78985a")
SKINS = _rgb("fadcc0 eec09a d8a878 b98860 96684a 74503a 543a2c 3c2a22")
HAIRS = _rgb("241c1a 6a4428 c89a50 a84a28 b8b8b8")
SHOES = _rgb("201e20 5c3a26 f0f0ec b03030 2a4a8a 3c6e3c d8b03c 8a8a90")


def _style(rng: Generator, kind: str, count: int) -> dict[str, ndarray]:
    """Colours of every place: no two alike, so that a view tells where it was taken."""
    jitter = lambda: rng.uniform(0.9, 1.08, (count, 3))
    pick = lambda table: table[np.resize(rng.permutation(len(table)), count)] * jitter()
    zenith, horizon = _rgb(
        "5a74b4 f2cfa8" if rng.random() < 0.3 else "5b9bd8 d5e4ec"
    )  # dusk or day
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


@lru_cache(None)
def _patterns() -> (
    ndarray
):  # (16, 2, TALL*16, 64): brightness, and share of the accent colour; repeats every 4 m
    h, s = np.meshgrid(
        (np.arange(TALL * TEXELS) + 0.5) / TEXELS, (np.arange(64) + 0.5) / TEXELS, indexing="ij"
    )
    step = lambda x, w=0.12: np.clip(x / w + 0.5, 0, 1)  # an edge, w metres soft
    wave = lambda x: 0.5 + 0.5 * np.sin(2 * np.pi * x)
    box = lambda x, half: step(half - np.abs(x))
    blobs = 1 - 0.12 * wave(s / 4 + 0.3 * np.sin(h)) * wave(h / 3 + 0.25 * np.sin(np.pi * s))
    paint = [
        (blobs, 0 * h),
        (1, 0.8 * step(wave(s / 2) - 0.5, 0.5)),  # plain, wide stripes
        (1, 0.8 * step(1 - h)),
        (1, 0.8 * box(h - 1.1, 0.25)),  # wainscot, band
        (blobs, 0.5 * step(wave(s / 2 + 0.25 * np.sin(2 * np.pi * h / 3)) - 0.6, 0.4)),  # curtains
        (1, 0.75 * box(s % 2 - 1, 0.65) * box(h - 1.5, 0.95)),  # panels
        (1 - 0.22 * wave(s / 2 + h / 3), 0 * h),
        (1 - 0.18 * wave(h / 1.5), 0.7 * step(h - 2.3)),  # slanting light, frieze
    ]
    for width, tall, period in (
        (0.55, 0.7, 2),
        (0.35, 0.9, 2),
        (0.9, 0.6, 4),
        (0.5, 0.5, 2),
    ):  # windows, and ledges
        windows = (
            box(s % period - period / 2, width) * box((h - 1.9) % 2.4 - 0.7, tall) * step(h - 1.5)
        )
        ledges = np.maximum(windows, 0.6 * box((h - 3.1) % 2.4, 0.18))
        paint += [
            (1 - 0.1 * wave(h / 2.4), 0.7 * windows),
            (1 - 0.14 * step(0.9 - h), 0.7 * ledges),
        ]
    foot = np.where(h < 0.16, 0.55, 1) * (1 - 0.22 * np.exp(-h / 0.3))  # skirting, and dark corners
    return np.stack([np.stack([value * foot, accent]) for value, accent in paint]).astype(
        np.float32
    )


@lru_cache(None)
def _posters() -> (
    ndarray
):  # (12, 2, 48, 32): share of the paper, and of the figure on it; 2 m wide, 3 m high
    y, x = np.meshgrid(
        (np.arange(48) + 0.5) / TEXELS - 1.6, (np.arange(32) + 0.5) / TEXELS - 1, indexing="ij"
    )
    r, angle, ax, ay = np.hypot(x, y), np.arctan2(y, x), np.abs(x), np.abs(y)
    figures = [  # negative inside
        r - 0.5,
        np.abs(r - 0.42) - 0.16,
        np.maximum(ax, ay) - 0.45,
        ax + ay - 0.6,  # disc, ring, square, diamond
        np.maximum(-y - 0.4, 1.7 * ax + y - 0.5) * 0.6,
        np.abs(x + 0.6 * y) - 0.22,  # triangle, slash
        r - 0.42 - 0.18 * np.cos(5 * angle),
        r - 0.4 - 0.2 * np.cos(3 * angle + 1.57),  # flowers
        np.minimum(np.maximum(ax - 0.17, ay - 0.6), np.maximum(ay - 0.17, ax - 0.6)),
        np.hypot(ax - 0.3, y) - 0.26,  # cross, two eyes
        np.maximum(r - 0.6, 0.48 - np.hypot(x - 0.28, y - 0.15)),
        np.abs(y - 0.3 * np.sin(4 * x)) - 0.2,  # moon, wave
    ]
    paper = np.clip(0.5 - np.maximum(ax - 0.82, ay - 0.8) / 0.1, 0, 1)
    return np.stack(
        [np.stack([paper, paper * np.clip(0.5 - f / 0.1, 0, 1)]) for f in figures]
    ).astype(np.float32)


def _paint_walls(scene: Scene) -> ndarray:  # (3, rows, faces*16)
    style, rng = scene.style, np.random.default_rng(scene.style["posters"])
    side, i, j = np.nonzero(scene.faces >= 0)
    di, dj = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])[side].T
    place = (
        scene.region[i, j] if scene.outdoor else scene.region[i + di, j + dj]
    )  # a house, or the room it looks into
    along, rows = (
        np.where(side < 2, j, i) % 4,
        math.ceil(scene.height.max()) * TEXELS,
    )  # x faces run along z
    value, accent = (
        _patterns()
        .reshape(16, 2, -1, 4, TEXELS)[style["pattern"][place], :, :rows, along]
        .swapaxes(0, 1)
    )
    spread = lambda colour: colour.astype(np.float32).T[
        :, :, None, None
    ]  # (faces, 3) -> (3, faces, 1, 1)
    image = spread(style["wall"][place]) * (1 - accent) + spread(style["accent"][place]) * accent
    after = scene.faces[side, i + (side >= 2), j + (side < 2)]  # the next face of the same wall
    left = np.flatnonzero(
        (after >= 0) & ((i + j) % 3 == rng.integers(3)) & (rng.random(len(side)) < 0.6)
    )  # posters
    paper, figure = _posters()[rng.integers(0, 12, len(left))].swapaxes(0, 1)  # (posters, 48, 32)
    back = spread(TRIMS[rng.choice((0, 3, 6), len(left))])
    ink = spread(WALLS[rng.integers(0, len(WALLS), len(left))] * 0.8)
    for part, f in ((np.s_[:, :, :16], left), (np.s_[:, :, 16:], after[left])):
        image[:, f, :48] += (back - image[:, f, :48]) * paper[part] + (ink - back) * figure[part]
    sun = style["sun"][0]  # walls that face it are lighter
    light = 0.86 + 0.14 * np.array(
        [-np.sin(sun), np.sin(sun), -np.cos(sun), np.cos(sun)], np.float32
    )
    return (image * value * light[side, None, None]).transpose(0, 2, 1, 3).reshape(3, rows, -1)


def _paint_ground(scene: Scene) -> list[ndarray]:  # floor and ceiling, (3, N*16, N*16) each
    n, style, solid = len(scene.solid), scene.style, scene.solid.astype(np.float32)
    x, cell = (
        ((np.arange(n * TEXELS) + 0.5) / TEXELS).astype(np.float32),
        np.arange(n, dtype=np.float32),
    )
    low, high = np.where(cell == 0, -9, cell), np.where(cell == n - 1, n + 9, cell + 1)
    near, wide = (
        np.clip((x[:, None] - low) / soft + 0.5, 0, 1)
        - np.clip((x[:, None] - high) / soft + 0.5, 0, 1)
        for soft in (np.float32(0.3), np.float32(1.9))
    )  # (n*16, n) share of cells in texels
    shade = 1 - 0.42 * (wide @ solid @ wide.T)  # darker towards the walls
    over = lambda cells, light: np.stack(
        [near @ c @ near.T * light for c in np.moveaxis(cells.astype(np.float32), -1, 0)]
    )
    floor, tile = style["floor"][scene.region], np.clip(8 * np.sin(np.pi * x / 2), -1, 1)
    if scene.kind == "street":  # asphalt, pavement at the houses
        edge = np.logical_or.reduce(_shifted(scene.solid))
        floor = np.where(edge[..., None], 0.35 * floor + 0.42, 0.25 * floor + 0.27)
    ground = over(floor, shade * (1 + 0.07 * tile[:, None] * tile))  # soft squares of two metres
    if scene.outdoor:
        return [ground, ground[:, :1, :1]]
    lamps = np.outer(*[np.cos(np.pi * (x % 4 - 2) / 4) ** 6] * 2)  # one every four metres
    return [
        ground * (0.9 + 0.2 * lamps),
        over(style["ceiling"][scene.region], 0.78 * shade + 0.35 * lamps),
    ]


def _paint_sky(
    scene: Scene,
) -> ndarray:  # (3, rows, columns): row = h/(1+h), h the tangent of the elevation
    style, p, (sun, high) = scene.style, scene.style["hills"], scene.style["sun"]
    share = ((np.arange(SKY[0]) + 0.5) / SKY[0]).astype(np.float32)[:, None]
    up, az = (
        np.arctan(share / (1 - share)),
        ((np.arange(SKY[1]) + 0.5) / SKY[1] * 2 * np.pi).astype(np.float32),
    )
    mix = lambda image, colour, weight: image + (np.float32(colour)[:, None, None] - image) * weight
    sky = mix(style["zenith"][:, None, None] + 0 * up * az, style["horizon"], np.exp(-2.2 * up))
    cloud = np.sin(3 * az + p[0] + 2 * np.sin(4 * up + p[1])) * np.sin(
        10 * up + 2 * np.sin(2 * az + p[2])
    )
    sky = mix(sky, (1, 1, 1), 0.9 * np.clip(cloud - 0.25, 0, 0.6) * np.clip(4 * up - 0.4, 0, 1))
    gap = np.arccos(
        np.clip(np.sin(up) * np.sin(high) + np.cos(up) * np.cos(high) * np.cos(az - sun), -1, 1)
    )
    sky = mix(
        sky,
        (1, 0.93, 0.72),
        np.clip(0.55 * np.exp(-3.5 * gap) + np.clip((0.16 - gap) / 0.05, 0, 1), 0, 1),
    )
    ridge = (
        0.16
        + 0.05 * np.sin(2 * az + p[0])
        + 0.05 * np.sin(3 * az + p[1])
        + 0.03 * np.sin(7 * az + p[3])
    )
    return mix(
        sky, 0.55 * style["horizon"] + (0.13, 0.19, 0.2), np.clip((ridge - up) / 0.03 + 0.5, 0, 1)
    )  # hills


@lru_cache(8)
def _bake(scene: Scene) -> tuple[ndarray, ndarray, ndarray]:
    """All pictures of a scene at all levels, minus the colour of its fog, in one row: one gather per pixel and channel.
    -> texels (3, total) f32; first texel and length of a row (4, LEVELS) int32 of walls, floor, ceiling, sky."""
    fog = scene.style["fog"].astype(np.float32)[:, None, None]
    images = [
        _paint_walls(scene),
        *_paint_ground(scene),
        _paint_sky(scene) if scene.outdoor else fog,
    ]
    pieces, base, stride, total = (
        [],
        np.zeros((4, LEVELS), np.int32),
        np.zeros((4, LEVELS), np.int32),
        0,
    )
    for k, image in enumerate(images):
        image = (np.clip(image, 0, 1) - fog) * np.float32(255)
        for level in range(LEVELS):
            base[k, level], stride[k, level] = total, image.shape[2]
            pieces.append(image.reshape(3, -1))
            total += pieces[-1].shape[1]
            if k < 3 and image.shape[1] > 1:
                image = _shrink(image, 2)
    return np.concatenate(pieces, 1, dtype=np.float32), base, stride


# ---- renderer --------------------------------------------------------------------------------------------------------
_mip = lambda density: np.log2(np.clip(density, 1, 2**LEVELS - 1)).astype(
    np.int32
)  # texels per pixel -> level
_shrink = lambda x, n: (
    sum(x[..., i::n, j::n] for i in range(n) for j in range(n)) * np.float32(n**-2)
)  # mean of n x n
_clear = lambda q: (
    q * q / (q * q + np.float32(FOG**-2))
)  # share of the light that passes the fog over a distance 1/q


def _walls(
    scene: Scene, p: ndarray, F: ndarray, R: ndarray, tau: ndarray, focal: float
) -> list[ndarray]:
    """The first wall along each heading d = F + τ·R, as coefficients: every pixel then computes its own exact hit.
    All grid lines w of both axes k at once: off = w_k − p_k,  1/t = d_k/off,  crossing at p_o + d_o·off/d_k."""
    n, (B, _, M) = len(scene.solid), tau.shape
    p, F, R, tau = p[:, :, None, None], F[:, :, None, None], R[:, :, None, None], tau[:, None]
    lines = np.arange(1, n, dtype=np.float32)[:, None]
    d = F + R * tau  # (B, 2, 1, M)
    d = np.where(np.abs(d) < 1e-6, np.float32(1e-6), d)
    off = np.where(np.abs(lines - p) < 1e-4, np.float32(1e-4), lines - p)  # (B, 2, n-1, 1)
    q, back = d / off, off < 0
    cross = np.clip(p[:, ::-1] + d[:, ::-1] / d * off, 0, n - 1).astype(
        np.int32
    )  # cell along the wall
    side = 2 * np.arange(2, dtype=np.int32)[:, None, None] + back
    table = np.concatenate(
        [scene.faces[:2], scene.faces[2:].swapaxes(1, 2)]
    )  # [side, across, along]
    face = table.reshape(-1).take((side * n + (lines - back).astype(np.int32)) * n + cross)
    nearest = np.where((face >= 0) & (q > 0), q, 0).reshape(B, -1, M).argmax(1)[:, None]
    pick = lambda x: np.take_along_axis(
        np.broadcast_to(x, q.shape).reshape(B, -1, M), nearest, 1
    )  # (B, 1, M)
    face, off, mip = (
        np.maximum(pick(face), 0),
        pick(off),
        _mip(TEXELS / (np.maximum(pick(q), np.float32(1e-3)) * focal)),
    )
    (_, base, stride), density = _bake(scene), np.int32(TEXELS) >> mip
    height = np.broadcast_to(scene.height, scene.faces.shape)[scene.faces >= 0][face]
    return [
        pick(F) / off,
        pick(R) / off,  # 1/t = A + B·τ
        pick(p[:, ::-1]) - pick(cross),
        pick(F[:, ::-1]),
        pick(R[:, ::-1]),  # along = C + t·(D + E·τ)
        height,
        density.astype(np.float32),
        base[0][mip] + face * density,
        stride[0][mip],
    ]


def _flat(
    scene: Scene, eye: ndarray, F: ndarray, R: ndarray, tau: ndarray, slope: ndarray, focal: float
) -> tuple:
    """Floor, and ceiling or sky above the horizon: inverse distance, number of the texel, clearness."""
    f32, (_, base, stride), (x, y, z) = np.float32, _bake(scene), eye.T[:, :, None, None]
    up, image = slope > 0, np.where(slope > 0, 2, 1)
    q = np.where(
        up, f32(0) if scene.outdoor else slope / (CEILING - y), slope / -y
    )  # 1/t = (b/a) / (h − eye)
    q = np.maximum(q, f32(1 / FAR))
    t = 1 / q
    mip = _mip(TEXELS * t / focal * np.sqrt(np.maximum(t / f32(EYE), 1)))
    density, end = (TEXELS >> mip).astype(f32), f32(len(scene.solid) - 0.01)
    i, j = (
        np.clip(at + t * (F[:, k, None, None] + R[:, k, None, None] * tau), 0, end)
        for k, at in ((0, x), (1, z))
    )
    texel = (
        (i * density).astype(np.int32) * stride[image, mip]
        + (j * density).astype(np.int32)
        + base[image, mip]
    )
    level = 1 / np.sqrt(1 + tau * tau)  # true distance = t / level
    if not scene.outdoor:
        return q, texel, _clear(q * level)
    rise = np.maximum(slope * level, 0)  # tangent of the elevation
    turn = np.arctan2(F[:, 0, None, None], F[:, 1, None, None]) + np.arctan(tau)
    column = (turn * f32(SKY[1] / (2 * np.pi)) + 2 * SKY[1]).astype(np.int32) % SKY[1]
    sky = base[3, 0] + (rise / (1 + rise) * SKY[0]).astype(np.int32) * SKY[1] + column
    return q, np.where(up, sky, texel), np.where(up, f32(1), _clear(q * level))


def _view(scene: Scene, c2w: ndarray, K: ndarray, H: int, W: int) -> tuple[ndarray, ndarray]:
    """(B, 4, 4) cameras, all level or all tilted -> colours (3, B, H, W) f32 and inverse z-depth (B, H, W) f32."""
    f32, level = np.float32, abs(c2w[0, 1, 2]) <= 1e-6
    eye = c2w[:, :3, 3].astype(f32) * f32((1, -1, 1))  # y upwards in here
    F, R = (
        c2w[:, (2, 0), 0].astype(f32) * f32((-1, 1)),
        c2w[:, (0, 2), 0].astype(f32),
    )  # (sin, cos), (cos, -sin)
    sin, cos = (x[:, None, None].astype(f32) for x in (-c2w[:, 1, 2] * (not level), c2w[:, 1, 1]))
    u = ((np.arange(W) + 0.5 - K[:, 2:3]) / K[:, :1]).astype(f32)[:, None]  # (B, 1, W)
    v = ((np.arange(H) + 0.5 - K[:, 3:4]) / K[:, 1:2]).astype(f32)[:, :, None]  # (B, H, 1)
    a, b, focal = cos + v * sin, sin - v * cos, float(K[0, 0])  # forward and up part of a ray
    tau, slope, y = u if level else u / a, b / a, eye[:, 1, None, None]
    fan = tau  # level: a column is a heading
    if not level:  # else 4W of them, nearest per pixel
        span = np.arctan(np.abs(tau).max((1, 2), keepdims=True)) * f32(1.0001)
        fan = np.tan(span * ((np.arange(4 * W, dtype=f32) + f32(0.5)) / (2 * W) - 1))
        ray = np.clip(((np.arctan(tau) / span + 1) * (2 * W)).astype(np.int32), 0, 4 * W - 1)
        ray += 4 * W * np.arange(len(c2w), dtype=np.int32)[:, None, None]
    wall = _walls(scene, eye[:, (0, 2)], F, R, fan, focal)
    A, B, C, D, E, height, density, first, stride = (
        wall if level else [x.reshape(-1).take(ray) for x in wall]
    )
    q_flat, flat, clear = _flat(scene, eye, F, R, tau, slope, focal)
    q = np.maximum(A + B * tau, f32(1e-3))
    seen = q > q_flat  # what is nearer is seen
    if scene.outdoor:
        seen &= (y - height) * q + slope < 0  # below the top of the wall
    along = np.clip(C + (D + E * tau) / q, 0, f32(0.999)) * density
    row = np.clip((y + slope / q) * density, 0, height * density - f32(0.01))
    texel = np.where(seen, first + along.astype(np.int32) + row.astype(np.int32) * stride, flat)
    clear = np.where(seen, _clear(q / np.sqrt(1 + tau * tau)), clear)
    texels, rgb = _bake(scene)[0], np.empty((3, *texel.shape), f32)
    for c, fog in enumerate((scene.style["fog"] * 255).astype(f32)):
        np.take(texels[c], texel, out=rgb[c], mode="clip")
        rgb[c] = rgb[c] * clear + fog
    return rgb, np.where(seen, q, q_flat) * a  # z-depth = t/a


def render(
    scene: Scene,
    c2w: ndarray,
    K: ndarray,
    H: int,
    W: int,
    players: tuple[ndarray, int] | None = None,
    supersample: int = 2,
) -> tuple[ndarray, ndarray]:
    """What cameras (B, 4, 4) without roll see: (B, H, W, 3) uint8, and z-depth (B, H, W) f32 in metres; K (4,) or (B, 4).
    players: poses (B, 5) of the player and the number of its character, third person. supersample: rays per pixel and axis;
    1 is three times faster, with hard edges. A frame depends on its own camera only: any batch gives the same bits."""
    c2w, n = np.asarray(c2w, np.float64), supersample
    if (
        c2w.ndim != 3
        or c2w.shape[1:] != (4, 4)
        or not np.isfinite(c2w).all()
        or (np.abs(c2w[:, 1, 0]) > 1e-3).any()
    ):
        raise ValueError(
            f"c2w must be finite (B, 4, 4) cameras without roll, got {c2w.shape}; make them with cameras()"
        )
    K = np.broadcast_to(np.asarray(K, np.float64), (len(c2w), 4)) * n
    if (
        c2w[:, 1, 1] - np.abs(c2w[:, 1, 2]) * np.maximum(K[:, 3], H * n - K[:, 3]) / K[:, 1] < 0.02
    ).any():
        raise ValueError(
            f"|pitch| + half the vertical field of view must stay below 90°; keep |pitch| <= {MAX_PITCH}"
        )
    rgb, depth = np.empty((len(c2w), H, W, 3), np.uint8), np.empty((len(c2w), H, W), np.float32)
    tilted, size = np.abs(c2w[:, 1, 2]) > 1e-6, max(1, CHUNK // (H * W * n * n))
    for group in (np.flatnonzero(~tilted), np.flatnonzero(tilted)):
        for some in np.split(group, range(size, len(group), size)) if len(group) else ():
            colours, inverse = _view(scene, c2w[some], K[some], H * n, W * n)
            for i, frame in enumerate(some if players is not None else ()):
                _draw_player(
                    colours[:, i], inverse[i], c2w[frame], K[frame], players[0][frame], players[1]
                )
            if n > 1:  # 1/z is linear on a plane: its mean is that of the pixel's centre
                colours, inverse = _shrink(colours, n), _shrink(inverse, n)
            rgb[some] = np.moveaxis(colours, 0, -1) + np.float32(0.5)
            depth[some] = 1 / inverse
    return rgb, depth


# ---- characters ------------------------------------------------------------------------------------------------------
SLOTS = dict(
    skin=8,
    hair=10,
    hat=9,
    torso=12,
    colour=16,
    legs=16,
    shoes=8,
    arms=6,
    pattern=6,
    height=5,
    build=5,
)
N_CHARACTERS = math.prod(SLOTS.values())  # 15,925,248,000


def character(number: int) -> dict[str, int]:
    """A number in mixed radix, one digit per slot."""
    if not 0 <= number < N_CHARACTERS:
        raise ValueError(f"a character is a number from 0 to {N_CHARACTERS - 1}, got {number}")
    return {
        slot: number // math.prod(list(SLOTS.values())[:k]) % size
        for k, (slot, size) in enumerate(SLOTS.items())
    }


@lru_cache(256)
def _body(number: int) -> tuple:
    """Seven boxes: torso, head, hat, two legs, two arms; each with three bands of colour from bottom to top."""
    who = character(number)
    tall, wide = 0.86 + 0.07 * who["height"], 0.8 + 0.1 * who["build"]
    cloth, trim = WALLS[who["colour"]], TRIMS[[0, 1, 2, 6]][who["torso"] % 4]
    skin, hair, shoe, leg = (
        SKINS[who["skin"]],
        HAIRS[who["hair"] % 5],
        SHOES[who["shoes"]],
        WALLS[who["legs"]] * 0.75,
    )
    sleeve, cap = (cloth, trim)[who["arms"] % 2], TRIMS[[6, 4, 5, 0]][who["hat"] % 4]
    brim = [(0.001, 0.001, 0.001), (0.2, 0.03, 0.2), (0.125, 0.1, 0.135)][(who["hat"] + 3) // 4]
    hem, bare, locks = (
        0.18 + 0.16 * (who["torso"] // 4),
        (0.18, 0.45, 0.75)[who["arms"] // 2],
        (0.72, 0.38)[who["hair"] // 5],
    )
    limb, arm = wide * 0.09, wide * 0.065
    boxes = [  # hinge (x, y, z), middle below the hinge, half sizes, swing, bands, where the bands end
        ((0, 1.12, 0), 0, (0.21 * wide, 0.31, 0.125 * wide), 0, (trim, cloth, cloth), (hem, 1)),
        ((0, 1.58, 0), 0, (0.12, 0.15, 0.13), 0, (skin, skin, hair), (0.1, locks)),
        ((0, 1.74, 0), 0, brim, 0, (cap, cap, cap), (0, 1)),
        *(
            ((x * 0.1 * wide, 0.83, 0), 0.415, (limb, 0.415, limb), x, (shoe, leg, leg), (0.2, 1))
            for x in (-1, 1)
        ),
        *(
            (
                (x * (0.21 * wide + arm), 1.4, 0),
                0.32,
                (arm, 0.32, arm),
                -x,
                (skin, skin, sleeve),
                (0.1, bare),
            )
            for x in (-1, 1)
        ),
    ]
    hinge, middle, half, swing, bands, ends = (
        np.array(part, np.float32) for part in zip(*boxes, strict=True)
    )
    return (
        hinge * tall,
        middle * tall,
        half * np.float32((1, tall, 1)),
        swing,
        bands,
        ends,
        trim,
        who["pattern"],
    )


def _draw_player(
    rgb: ndarray, inverse: ndarray, c2w: ndarray, K: ndarray, pose: ndarray, number: int
) -> None:
    """Slab test of seven boxes inside the figure's part of the image, in the player's own frame (x right, y up)."""
    hinge, middle, half, swing, bands, ends, trim, pattern = _body(number)
    x, _, z, _, yaw = map(float, pose)
    sin, cos = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
    turn = np.array([[cos, 0, -sin], [0, -1, 0], [sin, 0, cos]])
    o = turn @ (c2w[:3, 3] - (x, 0, z))  # camera, from the feet
    cx, cy, cz = c2w[:3, :3].T @ ((x, -0.9, z) - c2w[:3, 3])
    u, v = (
        (np.arange(rgb.shape[2]) + 0.5 - K[2]) / K[0],
        (np.arange(rgb.shape[1]) + 0.5 - K[3]) / K[1],
    )
    reach = max(cz - 0.45, 0.25)
    columns, rows = (
        np.flatnonzero(np.abs(u - cx / cz) < 0.6 / reach),
        np.flatnonzero(np.abs(v - cy / cz) < 1.15 / reach),
    )
    if cz < 0.7 or not len(columns) or not len(rows):  # too close it would fill the view
        return
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    d = np.tensordot(
        turn @ c2w[:3, :3], np.stack(np.broadcast_arrays(u[columns], v[rows][:, None], 1.0)), 1
    )
    d = np.where(np.abs(d) < 1e-6, 1e-6, d).astype(np.float32)  # (3, h, w); z-depth λ is at o + λ·d
    back, colours, floor = inverse[window], rgb[:, window[0], window[1]], -d[1] / np.float32(o[1])
    soft = 0.5 * np.exp(
        -((o[0] + d[0] / floor) ** 2 + (o[2] + d[2] / floor) ** 2) / 0.1
    )  # the shadow at the feet
    colours *= 1 - np.where(np.abs(back - floor) < 1e-3, soft, 0).astype(np.float32)
    angle = (
        0.55 * math.sin(2 * math.pi * (x + 0.62 * z) / 1.5) * swing
    )  # a walk cycle from the place alone
    (s, c), o_, l_ = np.stack([np.sin(angle), np.cos(angle)]), np.zeros(7), np.ones(7)
    to_box = np.stack([l_, o_, o_, o_, c, s, o_, -s, c], 1).reshape(7, 3, 3).astype(np.float32)
    origin = np.einsum("kij,kj->ki", to_box, o.astype(np.float32) - hinge)
    origin[:, 1] += middle
    ray = np.einsum("kij,jhw->kihw", to_box, d)
    ray = np.where(np.abs(ray) < 1e-6, np.float32(1e-6), ray)
    one, two = ((side * half - origin)[:, :, None, None] / ray for side in (-1, 1))
    enter, leave = np.minimum(one, two).max(1), np.maximum(one, two).min(1)  # (7, h, w)
    enter = np.where((enter < leave) & (enter > 0), enter, np.float32(FAR))
    box, hit = enter.argmin(0), enter.min(0)
    i, j = np.nonzero(1 / hit > back)
    box, hit = box[i, j], hit[i, j]
    point = (origin[box] + hit[:, None] * ray[box, :, i, j]) / half[box]  # (pixels, 3) in [-1, 1]
    px, py = point[:, 0], point[:, 1]
    band = ((py + 1)[:, None] / 2 > ends[box]).sum(1)  # bottom, middle or top
    paint = bands[box, band]
    print_ = (
        -1 + 0 * px,
        0.3 - np.abs(px),
        np.sin(9 * py),
        0.45 - np.hypot(px, py - 0.3),
        np.sin(4 * px + 5 * py),
        px,
    )[pattern]
    paint[(print_ > 0) & (box == 0) & (band == 1)] = trim
    colours[:, i, j] = (paint * np.float32((0.8, 1, 0.9))[np.abs(point).argmax(1)][:, None] * 255).T
    back[i, j] = 1 / hit


# ---- clock -----------------------------------------------------------------------------------------------------------
def cameras(
    scene: Scene, player: ndarray, view: str = "first"
) -> ndarray:  # (T, 5) -> (T, 4, 4), exact in float32
    """The camera of a player: in the eye, or on a spring arm behind it that shortens before it enters a wall."""
    pose = np.array(player, np.float64)
    if view == "third":
        pitch, yaw = (
            np.radians(np.clip(pose[:, 3] - TILT, -MAX_PITCH, MAX_PITCH)),
            np.radians(pose[:, 4]),
        )
        back = -np.stack(
            [np.sin(yaw) * np.cos(pitch), -np.sin(pitch), np.cos(yaw) * np.cos(pitch)], 1
        )
        arm = np.linspace(0, ARM, 57)
        point = pose[:, None, :3] + (0, -LIFT, 0) + arm[:, None] * back[:, None]  # (T, 57, 3)
        blocked = (-point[..., 1] < 0.3) | (not scene.outdoor) & (-point[..., 1] > CEILING - 0.25)
        for corner in ((-0.2, -0.2), (-0.2, 0.2), (0.2, -0.2), (0.2, 0.2)):
            i, j = (
                np.clip(point[..., (0, 2)] + corner, 0, len(scene.solid) - 1)
                .astype(int)
                .transpose(2, 0, 1)
            )
            blocked |= scene.solid[i, j]
        last = np.where(blocked.any(1), blocked.argmax(1) - 1, len(arm) - 1).clip(0)
        pose = np.concatenate(
            [point[np.arange(len(pose)), last], np.degrees(pitch)[:, None], pose[:, 4:]], 1
        )
    return pose_to_c2w(torch.from_numpy(pose)).numpy().astype(np.float32).astype(np.float64)


class World:
    """The game: a player in a scene. What a tick returns was copied before anything moved.
    pose None: somewhere free, as the seed says. size: pixels of a square frame, 0 draws none."""

    def __init__(
        self,
        scene: Scene,
        view: str = "first",
        character: int = 0,
        pose: Sequence[float] | None = None,
        seed: int = 0,
        size: int = 0,
    ) -> None:
        self.scene, self.view, self.character, self.size, self.time = (
            scene,
            view,
            character,
            size,
            0,
        )
        self.grid, self.nav, rng = (
            scene.solid.tolist(),
            NavMesh(scene),
            np.random.default_rng([scene.seed, seed]),
        )
        x, z = self.nav.point(*rng.choice(self.nav.cells))
        self.pose = (
            (x, -EYE, z, 0.0, 1.5 * int(rng.integers(240)))
            if pose is None
            else tuple(map(float, pose))
        )
        i, j = math.floor(self.pose[0]), math.floor(self.pose[2])
        if (
            view not in ("first", "third")
            or not (0 <= min(i, j) <= max(i, j) < len(self.grid))
            or self.grid[i][j]
        ):
            raise ValueError(
                f"view must be first or third, got {view!r}; x, z must be a free cell, got {self.pose[::2]}"
            )

    def move(self, keyboard: Sequence[float], mouse: Sequence[float]) -> bool:
        """step_pose, then push the body out of the walls it entered, so that it slides. True: it touched one."""
        x, y, z, pitch, yaw = step_pose(self.pose, keyboard, mouse, MAX_PITCH)
        touched = False
        for _ in range(3):  # a corner pushes twice
            for i in range(int(x - RADIUS), int(x + RADIUS) + 1):
                for j in range(int(z - RADIUS), int(z + RADIUS) + 1):
                    dx, dz = (
                        x - min(max(x, i), i + 1),
                        z - min(max(z, j), j + 1),
                    )  # from the nearest point of the cell
                    gap = math.hypot(dx, dz)
                    if self.grid[i][j] and 0 < gap < RADIUS - 1e-9:
                        x, z, touched = (
                            x + dx / gap * (RADIUS - gap),
                            z + dz / gap * (RADIUS - gap),
                            True,
                        )
            if not touched:
                break
        self.pose, self.time = (x, y, z, pitch, yaw), self.time + 1
        return touched

    def tick(self, keyboard: Sequence[float], mouse: Sequence[float]) -> dict:
        """Frame t and the action that leaves it; then the game is at t + 1."""
        player = np.array([self.pose], np.float32).astype(np.float64)
        record = {
            "time": self.time,
            "player": player[0],
            "c2w": cameras(self.scene, player, self.view)[0],
            "keyboard": np.array(keyboard, np.uint8),
            "mouse": np.array(mouse, np.float32),
        }
        if self.size:
            K, figure = (
                intrinsics(self.size, self.size).numpy(),
                (player, self.character) if self.view == "third" else None,
            )
            frame, depth = render(self.scene, record["c2w"][None], K, self.size, self.size, figure)
            record |= {"frame": frame[0], "depth": depth[0]}
        record["contact"] = self.move(record["keyboard"].tolist(), record["mouse"].tolist())
        return record


# ---- navmesh and explorer --------------------------------------------------------------------------------------------
def stop_at_walls(
    scene: Scene, pose: Sequence[float], keyboard: ndarray, mouse: ndarray
) -> ndarray:  # (n, 6), (n, 2) -> (n, 6)
    """The same keys without the steps that would touch a wall: who imagines a known world stays in its rooms.

    No training clip was ever taken inside or behind a wall. A walk that begins there goes on as it likes.
    """
    start = tuple(float(value) for value in pose)
    player = World(scene, pose=start, size=0)
    still = [0.0] * 6
    if player.move(still, [0.0, 0.0]):
        return keyboard
    player.pose = start
    kept = keyboard.copy()
    for t, (keys, turn) in enumerate(zip(keyboard.tolist(), mouse.tolist(), strict=True)):
        here = player.pose
        if player.move(keys, turn):
            kept[t, :4] = 0
            player.pose = step_pose(here, still, turn, MAX_PITCH)
    return kept


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


# ---- behaviour -------------------------------------------------------------------------------------------------------
NONE, W, S, A, D, WA, WD = (
    (*map(int, keys), 0, 0) for keys in ("0000", "1000", "0100", "0010", "0001", "1010", "1001")
)
STILL = (0.0, 0.0)
FACING = {
    0: W,
    45: WA,
    -45: WD,
    90: A,
    -90: D,
    180: S,
}  # looking so many degrees to the right of the way: which keys
MIXTURE = {"rl": 0.3, "walk": 0.15, "loop": 0.3, "palindrome": 0.15, "random": 0.1}


def undo(actions: Actions) -> Actions:  # reversed, W and S, A and D exchanged, mouse negated
    return [((k[1], k[0], k[3], k[2], *k[4:]), (-m[0], -m[1])) for k, m in reversed(actions)]


def _figure(world: World, rng: Generator) -> Actions:
    """A short figure that ends where it began; where it would leave the navmesh, it turns back."""
    speed = float(rng.choice((-0.4, -0.3, -0.2, 0.2, 0.3, 0.4)))
    once, hold, k = (
        round(360 / DEGREES / abs(speed)),
        [(NONE, STILL)] * int(rng.integers(2, 12)),
        int(rng.integers(10, 34)),
    )
    away, tilt = (
        [(NONE, (0.0, speed))] * k,
        [(NONE, (math.copysign(0.2, speed), 0.0))] * int(rng.integers(2, 7)),
    )
    step = [((A, D, S)[int(rng.integers(3))], STILL)] * (k // 2)
    actions = [
        [*away, *hold, *undo(away)],  # look away and back
        [(NONE, (0.0, speed))] * once,  # once around on the spot
        [*tilt, *hold, *undo(tilt)],  # look up or down and back
        [(W, (0.0, speed))] * once,  # walk a circle
        [(A if speed > 0 else D, (0.0, speed))] * once,  # walk around a point, looking at it
        [*step, *hold, *undo(step)],  # side step and back
    ][rng.choice(6, p=(0.32, 0.14, 0.16, 0.12, 0.13, 0.13))]
    pose = world.pose
    for k, (keys, mouse) in enumerate(actions):
        pose = step_pose(pose, keys, mouse)
        if not world.nav.holds(pose[0], pose[2]):
            return actions[:k] + undo(actions[:k])
    return actions


def _go(world: World, rng: Generator, goal: tuple[float, float]) -> Iterator:
    """Follow the navmesh; turn by multiples of 1.5 degrees; sometimes look sideways or walk backwards."""
    facing, fastest = (
        int(rng.choice(list(FACING), p=(0.7, 0.07, 0.07, 0.06, 0.06, 0.04))),
        int(rng.integers(2, 5)),
    )
    for x, z in world.nav.path((world.pose[0], world.pose[2]), goal):
        for _ in range(400):
            dx, dz = x - world.pose[0], z - world.pose[2]
            if math.hypot(dx, dz) < 0.3:
                break
            error = (math.degrees(math.atan2(dx, dz)) + facing - world.pose[4] + 180) % 360 - 180
            units = max(-fastest, min(fastest, round(error / 1.5)))
            yield (
                FACING[facing] if abs(error) < (30 if math.hypot(dx, dz) > 1 else 12) else NONE,
                (0.0, units / 10),
            )


def _tour(world: World, rng: Generator, weights: ndarray, again: bool = False) -> Iterator:
    """Go where the explorer says, look around, go on; or visit a few places near the start again and again."""
    seen, nav, (x, _, z, _, _) = world.scene.solid.copy(), world.nav, world.pose
    near = nav.cells[np.abs(np.hypot(*(nav.cells * nav.cell - (x, z)).T) - rng.uniform(2, 4)) < 1.5]
    stops = [
        (x, z),
        *(nav.point(*cell) for cell in rng.permutation(near)[: int(rng.integers(1, 4))]),
    ]
    while True:
        if rng.random() < 0.55:
            yield from _figure(world, rng)
        here, yaw = (int(world.pose[0]), int(world.pose[2])), math.radians(world.pose[4])
        stops += (
            [stops.pop(0)]
            if again
            else [tuple(k + 0.5 for k in choose(world.scene, seen, here, yaw, weights, rng)[0][-1])]
        )
        yield from _go(world, rng, stops[-1])


def _palindrome(
    walk: Iterator, half: int
) -> Iterator:  # then undo every action: frame 2·half − t repeats frame t
    way = []
    for _, action in zip(range(half), walk, strict=False):
        way.append(action)
        yield action
    yield from undo(way)
    yield from walk


def _random(rng: Generator) -> Iterator:  # keys and turns held for twelve ticks, walls or not
    while True:
        keys = (NONE, W, W, W, S, A, D, WA, WD)[int(rng.integers(9))]
        yield from [(keys, (0.0, float(rng.choice((0, 0, 0.1, 0.2, 0.3, -0.1, -0.2, -0.3)))))] * 12


def simulate(
    scene: Scene, seed: int, frames: int = 241, behaviour: str | None = None, view: str = "first"
) -> dict:
    """A whole walk, to be rendered later; behaviour: one of MIXTURE, None draws one. -> c2w (T, 4, 4) and player (T, 5) f64
    exact in float32, keyboard (T, 6) u8, mouse (T, 2) f32, contact (T,), behaviour. Action t leads to frame t + 1."""
    rng = np.random.default_rng([scene.seed, seed, 7])
    behaviour = behaviour or str(rng.choice(list(MIXTURE), p=list(MIXTURE.values())))
    if behaviour not in MIXTURE:
        raise ValueError(
            f"behaviour must be one of {', '.join(MIXTURE)} or None, got {behaviour!r}"
        )
    world = World(scene, view, seed=seed)
    plan = (
        _tour(world, rng, POLICY * (behaviour != "walk"), behaviour == "loop")
        if behaviour != "random"
        else _random(rng)
    )
    plan = _palindrome(plan, (frames - 1) // 2) if behaviour == "palindrome" else plan
    poses, contact = [world.pose], np.zeros(frames, bool)
    keyboard, mouse = np.zeros((frames, 6), np.uint8), np.zeros((frames, 2), np.float32)
    for t in range(frames - 1):
        keyboard[t], mouse[t] = next(plan)
        contact[t] = world.move(keyboard[t].tolist(), mouse[t].tolist())
        poses.append(world.pose)
    player = np.array(poses, np.float32).astype(np.float64)
    return {
        "c2w": cameras(scene, player, view),
        "player": player,
        "keyboard": keyboard,
        "mouse": mouse,
        "contact": contact,
        "behaviour": behaviour,
    }


if __name__ == "__main__":
    place, start = make_scene(SPLITS["test"][2]), (0.0, -EYE, 0.0, 0.0, 0.0)
    walk = simulate(place, seed=0, frames=129, behaviour="palindrome")
    for side, view in ((64, "first"), (64, "third"), (128, "first"), (128, "third")):
        camera, figure = (
            cameras(place, walk["player"], view),
            (walk["player"], 0) if view == "third" else None,
        )
        K, _, began = intrinsics(side, side).numpy(), _bake(place), time.process_time()
        render(place, camera, K, side, side, figure, supersample=1)
        print(
            f"{side}x{side}, {view} person: {len(camera) / (time.process_time() - began):.0f} frames/s"
        )
    print(
        f"there and back in 128 steps: {math.dist(walk['player'][0], walk['player'][-1]):.1e} m from home"
    )
    circle = reduce(lambda pose, _: step_pose(pose, W, (0.0, 0.1)), range(240), start)
    print(f"a circle of 240 steps closes to {math.dist(circle[:3], start[:3]):.1e} m")
    for name, weights in (
        ("random walk", None),
        ("random waypoints", np.zeros(4)),
        ("learned explorer", POLICY),
    ):
        share = [
            explore(make_scene(seed), weights, np.random.default_rng(seed))[0]
            for seed in SPLITS["test"][:16]
        ]
        print(f"{name}: covers {np.mean(share):.2f} of 16 unseen places in 120 steps")
