"""What a camera sees in a scene: pictures and depth, exact in every pixel.

Walls stand upright on the lines of a grid, floors are level, cameras do not roll. Then a picture
is two problems in the plane. A pixel at u right and v below the middle, in focal lengths, of a
camera that looks up by p, has a ray whose forward part is a = cos p + v·sin p and whose upward
part is b = sin p − v·cos p. Seen from above it runs along a heading made of the camera's forward F
and right R:

    d = F + τ·R,   τ = u/a                                                                       (1)

Let t be the length of F walked: the ray is then above (x, z) = eye + t·d, at height eye + t·b/a,
and

    z-depth = t/a                                                                                (2)

A wall at w on axis k is met where t·d_k = w − eye_k; o is the other axis:

    1/t = d_k/(w − eye_k) = A + B·τ          linear in τ                                         (3)
    along = eye_o + t·d_o = C + t·(D + E·τ)  where on the wall: its column                       (4)
    height = eye_y + t·b/a                   its row                                             (5)

This is perspective-correct texturing: neither t nor the place on a wall is linear across the
picture, 1/t is. Floor or ceiling at height h, and what hides what:

    1/t = (b/a) / (h − eye_y)                no τ: the same along a row                          (6)
    seen = the largest 1/t                   the nearest                                         (7)

A texel is chosen by where it lies, its size by how many fall on a pixel, TEXELS·t/focal. Fog takes
a share of the light by the true distance r = t·|d| = t·√(1 + τ²):

    clear = 1 / (1 + (r/FOG)²)                                                                   (8)

To find A and B, all grid lines are tried at once, per heading and not per pixel: a column of a level
camera is one heading. A tilted one mixes them (a depends on v), so 4·W headings are searched and every
pixel takes the wall of the nearest: only at a corner may that be the wrong one, and what is computed on
the wall, (3) to (5), is exact again. By (2) and (3) 1/z is linear on a plane, so the mean of a pixel's
four rays is the value at its middle.
Tests: pytest tests/test_world.py
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from game import figure
from game.paint import LEVELS, SKY, TEXELS, bake, shrink
from game.scene import CEILING, EYE, FAR, Scene

MAX_PITCH = 35.0  # degrees: |pitch| + half the vertical field of view must stay below 90
FOG = 24.0  # metres: where half of the light is lost
CHUNK = 65_536  # rays drawn at once: temporaries of 256 KB stay in the cache
LEAST = 1e-3  # inverse metres: farther walls do not exist
f32 = np.float32


@dataclass
class Rays:
    """The pixels of a batch of cameras, all level or all tilted; y upwards in here."""

    eye: ndarray  # (B, 3)
    forward: ndarray  # (B, 2) on the ground, x and z: F
    right: ndarray  # (B, 2): R
    tau: ndarray  # (B, 1, W) of level cameras, else (B, H, W)
    ahead: ndarray  # (B, H, 1): a
    slope: ndarray  # (B, H, 1): b/a
    focal: float  # pixels
    level: bool


class Walls(NamedTuple):
    """The first wall along each ray, as what (3) to (5) need."""

    A: ndarray
    B: ndarray
    C: ndarray
    D: ndarray
    E: ndarray
    height: ndarray  # metres
    density: ndarray  # texels per metre
    first: ndarray  # texel
    stride: ndarray  # texels from one row to the next


def per_camera(x: ndarray) -> ndarray:
    """(B,) -> (B, 1, 1) float32, to compute with beside pixels."""
    return x[:, None, None].astype(f32)


def whole(x: ndarray) -> ndarray:
    return x.astype(np.int32)


def rays_of(c2w: ndarray, K: ndarray, H: int, W: int) -> Rays:
    level = abs(c2w[0, 1, 2]) <= 1e-6
    eye = c2w[:, :3, 3].astype(f32) * f32((1, -1, 1))
    right = c2w[:, (0, 2), 0].astype(f32)  # cos, -sin of the yaw
    forward = right[:, ::-1] * f32((-1, 1))  # sin, cos

    sin = per_camera(-c2w[:, 1, 2] * (not level))  # of the pitch
    cos = per_camera(c2w[:, 1, 1])
    fx, fy, cx, cy = K.T[:, :, None]  # (B, 1) each
    u = (np.arange(W) + 0.5 - cx) / fx
    v = (np.arange(H) + 0.5 - cy) / fy
    u = u.astype(f32)[:, None]  # (B, 1, W)
    v = v.astype(f32)[:, :, None]  # (B, H, 1)

    ahead = cos + v * sin
    slope = (sin - v * cos) / ahead
    tau = u if level else u / ahead  # (1)
    return Rays(eye, forward, right, tau, ahead, slope, float(fx[0, 0]), level)


def level_of_detail(texels_per_pixel: ndarray) -> ndarray:
    """Which of the LEVELS sizes has about one texel per pixel."""
    halved = np.log2(np.clip(texels_per_pixel, 1, 2**LEVELS - 1))
    return whole(halved)


def clearness(q: ndarray) -> ndarray:
    """The share of light that passes the fog over a distance 1/q."""
    return q * q / (q * q + f32(FOG**-2))  # (8)


# ---- walls -------------------------------------------------------------------------------------------------


def first_walls(scene: Scene, rays: Rays, fan: ndarray) -> Walls:
    """The nearest wall along every heading of a fan, τ (B, 1, M): all lines of both axes are tried."""
    n = len(scene.solid)
    B, _, M = fan.shape
    eye = rays.eye[:, (0, 2), None, None]  # (B, axis, line, heading), as all that follows
    forward = rays.forward[:, :, None, None]
    right = rays.right[:, :, None, None]

    # where each heading meets each line
    lines = np.arange(1, n, dtype=f32)[:, None]
    d = forward + right * fan[:, None]  # (B, 2, 1, M)
    d = np.where(np.abs(d) < 1e-6, f32(1e-6), d)
    off = lines - eye  # (B, 2, n-1, 1)
    off = np.where(np.abs(off) < 1e-4, f32(1e-4), off)
    q = d / off  # (3), (B, 2, n-1, M)
    other = slice(None, None, -1)  # the other axis
    cross = eye[:, other] + d[:, other] / d * off
    cell = whole(np.clip(cross, 0, n - 1))

    # which face stands there, if any
    back = off < 0  # seen from its far side: the solid cell is the one before the line
    side = np.int32([[[0]], [[2]]]) + back
    across = whole(lines - back)
    to_x, to_z = scene.faces[:2], scene.faces[2:]
    faces = np.concatenate([to_x, to_z.swapaxes(1, 2)])  # [side, across, along]
    face = faces.reshape(-1).take((side * n + across) * n + cell)
    inverse = np.where((face >= 0) & (q > 0), q, 0)
    nearest = inverse.reshape(B, -1, M).argmax(1)[:, None]  # (7)

    def pick(x: ndarray) -> ndarray:
        """Of that wall: (B, 1, M)."""
        every = np.broadcast_to(x, inverse.shape)
        return np.take_along_axis(every.reshape(B, -1, M), nearest, 1)

    face = np.maximum(pick(face), 0)
    off = pick(off)
    q = np.maximum(pick(q), f32(LEAST))
    mip = level_of_detail(TEXELS / (q * rays.focal))
    density = np.int32(TEXELS) >> mip
    _, base, stride = bake(scene)
    height = np.broadcast_to(scene.height, scene.faces.shape)[scene.faces >= 0]
    return Walls(
        A=pick(forward) / off,
        B=pick(right) / off,
        C=pick(eye[:, other]) - pick(cell),  # from the edge of the face
        D=pick(forward[:, other]),
        E=pick(right[:, other]),
        height=height[face],
        density=density.astype(f32),
        first=base[0][mip] + face * density,
        stride=stride[0][mip],
    )


def walls_of(scene: Scene, rays: Rays, W: int) -> Walls:
    """The first wall along every ray."""
    if rays.level:
        return first_walls(scene, rays, rays.tau)

    # 4·W headings at equal angles, and which of them is nearest to each pixel
    count = 4 * W
    widest = np.abs(rays.tau).max((1, 2), keepdims=True)
    span = np.arctan(widest) * f32(1.0001)
    middle = np.arange(count, dtype=f32) + f32(0.5)
    fan = np.tan(span * (middle / (2 * W) - 1))
    walls = first_walls(scene, rays, fan)  # (B, 1, 4·W)

    angle = np.arctan(rays.tau) / span  # from -1 to 1
    nearest = whole((angle + 1) * (2 * W))
    nearest = np.clip(nearest, 0, count - 1)
    cameras = np.arange(len(rays.eye), dtype=np.int32)
    nearest += count * cameras[:, None, None]
    return Walls(*(x.reshape(-1).take(nearest) for x in walls))


# ---- floor, ceiling, sky -----------------------------------------------------------------------------------


def ground_of(scene: Scene, rays: Rays) -> tuple[ndarray, ndarray, ndarray]:
    """Floor, and ceiling or sky above the horizon: 1/t, number of the texel, clearness."""
    x, y, z = rays.eye.T[:, :, None, None]
    up = rays.slope > 0
    above = f32(0) if scene.outdoor else rays.slope / (CEILING - y)
    q = np.where(up, above, rays.slope / -y)  # (6)
    q = np.maximum(q, f32(1 / FAR))
    t = 1 / q

    # seen at a flat angle, a texel of the floor is lower than wide: coarser ones
    foreshortened = np.sqrt(np.maximum(t / f32(EYE), 1))
    mip = level_of_detail(TEXELS * t / rays.focal * foreshortened)
    density = (TEXELS >> mip).astype(f32)
    i = whole(on_ground(scene, rays, t, x, 0) * density)
    j = whole(on_ground(scene, rays, t, z, 1) * density)
    _, base, stride = bake(scene)
    image = np.where(up, 2, 1)
    texel = i * stride[image, mip] + j + base[image, mip]

    shortening = 1 / np.sqrt(1 + rays.tau * rays.tau)  # t / r
    clear = clearness(q * shortening)
    if not scene.outdoor:
        return q, texel, clear
    sky = base[3, 0] + sky_texel(rays, shortening)
    texel = np.where(up, sky, texel)
    return q, texel, np.where(up, f32(1), clear)


def on_ground(scene: Scene, rays: Rays, t: ndarray, eye: ndarray, axis: int) -> ndarray:
    """x or z of the place that a ray is above, inside of the scene."""
    forward = rays.forward[:, axis, None, None]
    right = rays.right[:, axis, None, None]
    heading = forward + right * rays.tau
    end = f32(len(scene.solid) - 0.01)
    return np.clip(eye + t * heading, 0, end)


def sky_texel(rays: Rays, shortening: ndarray) -> ndarray:
    rows, columns = SKY
    rise = np.maximum(rays.slope * shortening, 0)  # tangent of the elevation
    row = whole(rise / (1 + rise) * rows)
    sin, cos = rays.forward.T
    yaw = np.arctan2(sin, cos)[:, None, None]
    heading = yaw + np.arctan(rays.tau)
    per_radian = f32(columns / (2 * np.pi))
    column = whole(heading * per_radian + 2 * columns) % columns
    return row * columns + column


# ---- the picture -------------------------------------------------------------------------------------------


def view(scene: Scene, c2w: ndarray, K: ndarray, H: int, W: int) -> tuple[ndarray, ndarray]:
    """Cameras (B, 4, 4), all level or all tilted -> colours (3, B, H, W) and 1/z (B, H, W), float32."""
    rays = rays_of(c2w, K, H, W)
    tau = rays.tau
    slope = rays.slope
    y = rays.eye[:, 1, None, None]
    wall = walls_of(scene, rays, W)
    q_flat, flat, clear = ground_of(scene, rays)

    q = np.maximum(wall.A + wall.B * tau, f32(LEAST))  # (3)
    seen = q > q_flat  # (7)
    if scene.outdoor:
        seen &= (y - wall.height) * q + slope < 0  # below the top of the wall

    # numbers are clipped to the face: rounding must not fetch a texel of the next
    along = wall.C + (wall.D + wall.E * tau) / q  # (4)
    column = np.clip(along, 0, f32(0.999)) * wall.density
    top = wall.height * wall.density - f32(0.01)
    row = np.clip((y + slope / q) * wall.density, 0, top)  # (5)
    texel = wall.first + whole(column) + whole(row) * wall.stride
    texel = np.where(seen, texel, flat)
    through = clearness(q / np.sqrt(1 + tau * tau))
    clear = np.where(seen, through, clear)

    # texels are stored minus the fog, so that dimming them leaves it
    texels, _, _ = bake(scene)
    rgb = np.empty((3, *texel.shape), f32)
    fogs = (scene.style["fog"] * 255).astype(f32)
    for channel, fog in enumerate(fogs):
        np.take(texels[channel], texel, out=rgb[channel], mode="clip")
        rgb[channel] = rgb[channel] * clear + fog
    return rgb, np.where(seen, q, q_flat) * rays.ahead  # (2)


def render(
    scene: Scene,
    c2w: ndarray,  # (B, 4, 4), without roll
    K: ndarray,  # (4,) or (B, 4)
    H: int,
    W: int,
    players: tuple[ndarray, int]
    | None = None,  # third person: poses (B, 5), number of the character
    supersample: int = 2,  # rays per pixel and axis; 1 is three times faster, with hard edges
) -> tuple[ndarray, ndarray]:
    """What cameras see: (B, H, W, 3) uint8, and z-depth (B, H, W) float32 in metres.

    A frame depends on its own camera only: any batch gives the same bits.
    """
    n = supersample
    c2w = np.asarray(c2w, np.float64)
    check_cameras(c2w)
    count = len(c2w)
    K = np.broadcast_to(np.asarray(K, np.float64), (count, 4)) * n
    check_pitch(c2w, K, H * n)

    rgb = np.empty((count, H, W, 3), np.uint8)
    depth = np.empty((count, H, W), f32)
    at_once = max(1, CHUNK // (H * W * n * n))
    for some in batches(c2w, at_once):
        colours, inverse = view(scene, c2w[some], K[some], H * n, W * n)
        if players is not None:
            poses, character = players
            for i, k in enumerate(some):
                picture = colours[:, i], inverse[i]
                figure.draw_player(*picture, c2w[k], K[k], poses[k], character)
        if n > 1:  # 1/z is linear on a plane: its mean is that of the pixel's centre
            colours = shrink(colours, n)
            inverse = shrink(inverse, n)
        rgb[some] = np.moveaxis(colours, 0, -1) + f32(0.5)
        depth[some] = 1 / inverse
    return rgb, depth


def batches(c2w: ndarray, size: int) -> list[ndarray]:
    """The numbers of level cameras, then of tilted ones, at most `size` at a time."""
    tilted = np.abs(c2w[:, 1, 2]) > 1e-6
    found = []
    for group in (np.flatnonzero(~tilted), np.flatnonzero(tilted)):
        if len(group):
            found += np.split(group, range(size, len(group), size))
    return found


def check_cameras(c2w: ndarray) -> None:
    usable = c2w.ndim == 3 and c2w.shape[1:] == (4, 4) and np.isfinite(c2w).all()
    if not usable or np.abs(c2w[:, 1, 0]).max(initial=0) > 1e-3:
        wanted = "finite (B, 4, 4) cameras without roll"
        raise ValueError(f"c2w must be {wanted}, got {c2w.shape}; make them with cameras()")


def check_pitch(c2w: ndarray, K: ndarray, H: int) -> None:
    """Every ray must go forwards: a of (1) stays positive."""
    cos = c2w[:, 1, 1]
    sin = np.abs(c2w[:, 1, 2])
    _, fy, _, cy = K.T
    farthest = np.maximum(cy, H - cy) / fy
    if (cos - sin * farthest < 0.02).any():
        rule = "|pitch| + half the vertical field of view must stay below 90°"
        raise ValueError(f"{rule}; keep |pitch| <= {MAX_PITCH}")
