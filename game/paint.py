"""Paint a scene: what its walls, floors, ceilings and sky look like, texel by texel.

Everything is soft and of low frequency, because a small VAE must learn it; no two places of a scene
are painted alike, because a view must tell where it was taken. Pictures are made once per scene, at
four sizes, and laid out in one row (`bake`), so that drawing a pixel is one look-up per channel.
Tests: pytest tests/test_scene.py
"""

import math
from functools import lru_cache

import numpy as np
from numpy import clip, cos, exp, float32, maximum, ndarray, pi, sin

from game.scene import TALL, TRIMS, WALLS, Scene, shifted

TEXELS = 16  # per metre, near the eye
LEVELS = 4  # sizes of every picture: 16, 8, 4 and 2 texels per metre
PERIOD = 4  # metres after which a wall's pattern repeats
SKY = (64, 256)  # rows and columns of the panorama
AHEAD = (  # the cell that a face looks at
    (-1, 0),
    (1, 0),
    (0, -1),
    (0, 1),
)
WINDOWS = (  # half width, half height, and every how many metres
    (0.55, 0.7, 2),
    (0.35, 0.9, 2),
    (0.9, 0.6, 4),
    (0.5, 0.5, 2),
)
POSTER = (48, 32)  # rows and columns: 3 m high, 2 m wide


def shrink(x: ndarray, n: int) -> ndarray:
    """The mean of every n x n square: (..., H, W) -> (..., H/n, W/n)."""
    total = 0
    for i in range(n):
        for j in range(n):
            total = total + x[..., i::n, j::n]
    return total * float32(n**-2)


def middles(count: int, per_unit: float) -> ndarray:
    """Where the middle of every texel is."""
    return (np.arange(count) + 0.5) / per_unit


def texel_grid(rows: int, columns: int) -> tuple[ndarray, ndarray]:
    """Height and place along a wall, in metres, of every texel."""
    return np.meshgrid(middles(rows, TEXELS), middles(columns, TEXELS), indexing="ij")


def edge(x: ndarray, width: float = 0.12) -> ndarray:
    """From 0 to 1 where x becomes positive, over `width` metres."""
    return clip(x / width + 0.5, 0, 1)


def band(x: ndarray, half: float) -> ndarray:
    """1 where |x| < half, with soft edges."""
    return edge(half - np.abs(x))


def wave(x: ndarray) -> ndarray:
    return 0.5 + 0.5 * sin(2 * pi * x)


# ---- walls -------------------------------------------------------------------------------------------------


@lru_cache(None)
def patterns() -> ndarray:
    """(16, 2, rows, columns): brightness of a wall, and the share of its accent colour."""
    h, s = texel_grid(TALL * TEXELS, PERIOD * TEXELS)
    drift = s / 4 + 0.3 * sin(h)
    swell = h / 3 + 0.25 * sin(pi * s)
    clouded = 1 - 0.12 * wave(drift) * wave(swell)
    curtain = wave(s / 2 + 0.25 * sin(2 * pi * h / 3))
    upright = 0.75 * band(s % 2 - 1, 0.65)

    # rooms and mazes: eight ways to paint a wall
    painted = [
        (clouded, 0 * h),
        (1, 0.8 * edge(wave(s / 2) - 0.5, 0.5)),  # wide stripes
        (1, 0.8 * edge(1 - h)),  # wainscot
        (1, 0.8 * band(h - 1.1, 0.25)),
        (clouded, 0.5 * edge(curtain - 0.6, 0.4)),
        (1, upright * band(h - 1.5, 0.95)),  # panels
        (1 - 0.22 * wave(s / 2 + h / 3), 0 * h),  # slanting light
        (1 - 0.18 * wave(h / 1.5), 0.7 * edge(h - 2.3)),  # frieze
    ]

    # streets: four kinds of windows, without and with ledges
    storey = (h - 1.9) % 2.4 - 0.7
    ledge = 0.6 * band((h - 3.1) % 2.4, 0.18)
    striped = 1 - 0.1 * wave(h / 2.4)
    dark_below = 1 - 0.14 * edge(0.9 - h)
    for width, tall, period in WINDOWS:
        row = band(s % period - period / 2, width)
        windows = row * band(storey, tall) * edge(h - 1.5)
        painted.append((striped, 0.7 * windows))
        painted.append((dark_below, 0.7 * maximum(windows, ledge)))

    # at the foot of every wall a skirting, and the dark of the corner
    skirting = np.where(h < 0.16, 0.55, 1)
    foot = skirting * (1 - 0.22 * exp(-h / 0.3))
    layers = [np.stack([value * foot, accent]) for value, accent in painted]
    return np.stack(layers).astype(float32)


@lru_cache(None)
def posters() -> ndarray:
    """(12, 2, *POSTER): the share of the paper, and of the figure printed on it."""
    h, s = texel_grid(*POSTER)
    y = h - 1.6
    x = s - 1
    r = np.hypot(x, y)
    angle = np.arctan2(y, x)
    ax = np.abs(x)
    ay = np.abs(y)
    upright = maximum(ax - 0.17, ay - 0.6)
    lying = maximum(ay - 0.17, ax - 0.6)
    bite = 0.48 - np.hypot(x - 0.28, y - 0.15)

    figures = [  # negative inside
        r - 0.5,  # disc
        np.abs(r - 0.42) - 0.16,  # ring
        maximum(ax, ay) - 0.45,  # square
        ax + ay - 0.6,  # diamond
        maximum(-y - 0.4, 1.7 * ax + y - 0.5) * 0.6,  # triangle
        np.abs(x + 0.6 * y) - 0.22,  # slash
        r - 0.42 - 0.18 * cos(5 * angle),  # flower of five leaves
        r - 0.4 - 0.2 * cos(3 * angle + 1.57),  # of three
        np.minimum(upright, lying),  # cross
        np.hypot(ax - 0.3, y) - 0.26,  # two eyes
        maximum(r - 0.6, bite),  # moon
        np.abs(y - 0.3 * sin(4 * x)) - 0.2,  # wave
    ]
    paper = edge(-maximum(ax - 0.82, ay - 0.8), 0.1)
    printed = [paper * edge(-f, 0.1) for f in figures]
    pairs = [np.stack([paper, ink]) for ink in printed]
    return np.stack(pairs).astype(float32)


def per_face(colours: ndarray) -> ndarray:
    """(faces, 3) -> (3, faces, 1, 1), to multiply pictures of faces with."""
    return colours.astype(float32).T[:, :, None, None]


def paint_walls(scene: Scene) -> ndarray:
    """The faces of all solid cells, side by side: (3, rows, faces·TEXELS)."""
    style = scene.style
    side, i, j = np.nonzero(scene.faces >= 0)
    place = scene.region[i, j]  # of the house
    if not scene.outdoor:  # of the room that a face looks into
        di, dj = np.array(AHEAD)[side].T
        place = scene.region[i + di, j + dj]

    # faces to -x and +x run along z, the others along x: which metre of the pattern is this?
    metre = np.where(side < 2, j, i) % PERIOD
    rows = math.ceil(scene.height.max()) * TEXELS
    metres = patterns().reshape(16, 2, -1, PERIOD, TEXELS)
    pattern = style["pattern"][place]
    value, accent = metres[pattern, :, :rows, metre].swapaxes(0, 1)
    # how bright, and how much of the accent colour
    wall = per_face(style["wall"][place])
    trim = per_face(style["accent"][place])
    image = wall * (1 - accent) + trim * accent
    hang_posters(scene, image, (side, i, j))

    # walls that face the sun are lighter
    sun = style["sun"][0]
    east, north = sin(sun), cos(sun)
    towards = np.array([-east, east, -north, north], float32)
    light = 0.86 + 0.14 * towards
    image = image * value * light[side, None, None]  # (3, faces, rows, TEXELS)
    return image.swapaxes(1, 2).reshape(3, rows, -1)


def hang_posters(scene: Scene, image: ndarray, faces: tuple) -> None:
    """Posters of two metres: their left half on one face, the right half on the next of that wall."""
    side, i, j = faces
    rng = np.random.default_rng(scene.style["posters"])
    along_x = side >= 2
    after = scene.faces[side, i + along_x, j + ~along_x]
    every_third = (i + j) % 3 == rng.integers(3)
    hangs = rng.random(len(side)) < 0.6
    left = np.flatnonzero((after >= 0) & every_third & hangs)
    count = len(left)

    rows, columns = POSTER
    motif = rng.integers(0, 12, count)
    paper, figure = posters()[motif].swapaxes(0, 1)  # (posters, 48, 32)
    back = per_face(TRIMS[rng.choice((0, 3, 6), count)])
    colour = rng.integers(0, len(WALLS), count)
    ink = per_face(WALLS[colour] * 0.8)

    middle = columns // 2
    for first, here in ((0, left), (middle, after[left])):
        half = slice(first, first + middle)
        on_paper = (back - image[:, here, :rows]) * paper[..., half]
        printed = (ink - back) * figure[..., half]
        image[:, here, :rows] += on_paper + printed


# ---- floor and ceiling -------------------------------------------------------------------------------------


def share_in_cells(x: ndarray, n: int, soft: float) -> ndarray:
    """How much of each of n cells reaches a texel at x, across soft borders: (texels, n)."""
    soft = float32(soft)
    cell = np.arange(n, dtype=float32)
    low = np.where(cell == 0, -9, cell)  # the outermost cells have no outer border
    high = np.where(cell == n - 1, n + 9, cell + 1)
    x = x[:, None]
    return edge(x - low, soft) - edge(x - high, soft)


def paint_ground(scene: Scene) -> list[ndarray]:
    """Floor and ceiling: (3, N·TEXELS, N·TEXELS) each; no ceiling but a speck under the sky."""
    style = scene.style
    n = len(scene.solid)
    x = middles(n * TEXELS, TEXELS).astype(float32)
    near = share_in_cells(x, n, 0.3)
    wide = share_in_cells(x, n, 1.9)

    def over(cells: ndarray, light: ndarray) -> ndarray:
        """Colours of cells (N, N, 3) -> of texels, blended at the borders."""
        channels = np.moveaxis(cells.astype(float32), -1, 0)
        blended = [near @ channel @ near.T for channel in channels]
        return np.stack(blended) * light

    floor = style["floor"][scene.region]
    if scene.kind == "street":  # asphalt, and a pavement at the houses
        at_house = np.logical_or.reduce(shifted(scene.solid))[..., None]
        floor = np.where(at_house, 0.35 * floor + 0.42, 0.25 * floor + 0.27)

    solid = scene.solid.astype(float32)
    shade = 1 - 0.42 * (wide @ solid @ wide.T)  # darker towards the walls
    stripe = 8 * sin(pi * x / 2)
    tile = clip(stripe, -1, 1)  # soft squares of two metres
    squares = 0.07 * tile[:, None] * tile
    ground = over(floor, shade * (1 + squares))
    if scene.outdoor:
        return [ground, ground[:, :1, :1]]

    glow = cos(pi * (x % 4 - 2) / 4) ** 6  # one lamp every four metres
    lamps = np.outer(glow, glow)
    lit = 0.78 * shade + 0.35 * lamps
    ceiling = over(style["ceiling"][scene.region], lit)
    return [ground * (0.9 + 0.2 * lamps), ceiling]


# ---- sky ---------------------------------------------------------------------------------------------------


def mix(image: ndarray, colour: ndarray, weight: ndarray) -> ndarray:
    difference = float32(colour)[:, None, None] - image
    return image + difference * weight


def paint_sky(scene: Scene) -> ndarray:
    """A panorama (3, *SKY): a row is h/(1 + h), h the tangent of the elevation; a column a heading."""
    style = scene.style
    rows, columns = SKY
    share = middles(rows, rows).astype(float32)[:, None]
    up = np.arctan(share / (1 - share))  # (rows, 1) elevation
    turn = middles(columns, columns) * 2 * pi
    az = turn.astype(float32)  # (columns,) heading
    p, q, r, s = style["hills"]  # phases of the place

    zenith = style["zenith"][:, None, None] + 0 * up * az
    sky = mix(zenith, style["horizon"], exp(-2.2 * up))

    drift = 2 * sin(4 * up + q)
    lift = 2 * sin(2 * az + r)
    cloud = sin(3 * az + p + drift) * sin(10 * up + lift)
    thick = 0.9 * clip(cloud - 0.25, 0, 0.6)
    above_horizon = clip(4 * up - 0.4, 0, 1)
    sky = mix(sky, (1, 1, 1), thick * above_horizon)

    sun, high = style["sun"]
    level = cos(up) * cos(high) * cos(az - sun)
    cosine = sin(up) * sin(high) + level
    gap = np.arccos(clip(cosine, -1, 1))  # angle from the sun
    halo = 0.55 * exp(-3.5 * gap)
    disc = clip((0.16 - gap) / 0.05, 0, 1)
    shine = clip(halo + disc, 0, 1)
    sky = mix(sky, (1, 0.93, 0.72), shine)

    ridge = 0.16 + 0.05 * sin(2 * az + p)
    ridge = ridge + 0.05 * sin(3 * az + q)
    ridge = ridge + 0.03 * sin(7 * az + s)
    hills = 0.55 * style["horizon"] + (0.13, 0.19, 0.2)
    return mix(sky, hills, edge(ridge - up, 0.03))


# ---- all of it ---------------------------------------------------------------------------------------------


@lru_cache(8)
def bake(scene: Scene) -> tuple[ndarray, ndarray, ndarray]:
    """All pictures of a scene at all sizes, minus the colour of its fog, in one row.

    Texels (3, total) float32; the first texel, and the length of a row, (4, LEVELS) int32 each, of
    walls, floor, ceiling and sky.
    """
    fog = scene.style["fog"].astype(float32)
    fog = fog[:, None, None]
    sky = paint_sky(scene) if scene.outdoor else fog
    images = [paint_walls(scene), *paint_ground(scene), sky]

    base = np.zeros((4, LEVELS), np.int32)
    stride = np.zeros((4, LEVELS), np.int32)
    pieces = []
    total = 0
    for k, image in enumerate(images):
        image = clip(image, 0, 1) - fog
        image = image * float32(255)
        for level in range(LEVELS):
            base[k, level] = total
            stride[k, level] = image.shape[2]
            pieces.append(image.reshape(3, -1))
            total += pieces[-1].shape[1]
            if k < 3 and image.shape[1] > 1:
                image = shrink(image, 2)
    return np.concatenate(pieces, 1, dtype=float32), base, stride
