"""What a camera sees in a scene: pictures and depth."""

import math
from functools import lru_cache

import numpy as np
from numpy import ndarray

from game import figure
from game.scene import CEILING, EYE, FAR, TALL, TRIMS, WALLS, Scene, shifted

MAX_PITCH = 35.0  # degrees: |pitch| + half the vertical field of view must stay below 90
FOG = 24.0
TEXELS, LEVELS = 16, 4  # texels per metre near the eye, and how often they are halved with distance
SKY = (64, 256)  # rows and columns of the sky panorama
CHUNK = 65_536  # rays drawn at once: temporaries of 256 KB stay in the cache


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
        edge = np.logical_or.reduce(shifted(scene.solid))
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
def bake(scene: Scene) -> tuple[ndarray, ndarray, ndarray]:
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
    (_, base, stride), density = bake(scene), np.int32(TEXELS) >> mip
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
    f32, (_, base, stride), (x, y, z) = np.float32, bake(scene), eye.T[:, :, None, None]
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
    texels, rgb = bake(scene)[0], np.empty((3, *texel.shape), f32)
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
                figure.draw_player(
                    colours[:, i], inverse[i], c2w[frame], K[frame], players[0][frame], players[1]
                )
            if n > 1:  # 1/z is linear on a plane: its mean is that of the pixel's centre
                colours, inverse = _shrink(colours, n), _shrink(inverse, n)
            rgb[some] = np.moveaxis(colours, 0, -1) + np.float32(0.5)
            depth[some] = 1 / inverse
    return rgb, depth
