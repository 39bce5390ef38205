"""What a key does to a camera, and where its rays run.

What it does. Actions become poses, poses become camera matrices, and cameras become rays. The rays
are what tells the network where it looks. Readers of foreign data convert to these conventions
when they read.
Paper: §3.2 (relative Plücker encoding).  Released: its own axes and channels (released.py).

Conventions. A camera is c2w = [R | p], 4x4, from camera to world, in metres. R = Ry(yaw)·Rx(pitch)
turns, p is the camera's position. Axes as in OpenCV: x right, y DOWN, z forward; the floor is
y = 0. yaw > 0 turns right, pitch > 0 looks up. K = (fx, fy, cx, cy) in pixels, pixel centres at +0.5. A
pose is five numbers: x, y, z, pitch°, yaw°. action[f] leads from frame f to f + 1.

Why it works. A pixel sees along a line, from the camera's position o in the direction d. The pair
(o, d) changes when o moves along that line, although the line is the same. Plücker's six numbers
do not change:

    line = (d, m),  m = o × d        because (o + s·d) × d = o × d for every s                 (1)

(m is called the moment.) Where in the world a walk takes place should not matter either. So cameras
are given relative to one of them, the anchor c2w_a = [R_a | p_a]; ours is the last past frame:

    g = c2w_a⁻¹·c2w = [R_aᵀ·R | R_aᵀ·(p − p_a)]                                                (2)

Our network is told d and m of each ray, and o too (in units of 2 m): whoever walks straight ahead
sees rays along the way he went, whose moments are near 0 however far he went. And since a small
turn changes d little, also cos kα and sin kα for k = 2, 4, 8, where α is the azimuth of the ray
(its angle to the right of straight ahead): they change k times as fast. Each k comes from the one
before:

    cos 2kα = cos²kα − sin²kα,    sin 2kα = 2·cos kα·sin kα                                    (3)

In one frame a player turns by Δyaw and walks a step. In which direction? Along the mean of the
heading before and after:

    heading = yaw + Δyaw/2                                                                     (4)

The way back turns by −Δyaw, from yaw + Δyaw, and so has the same mean: a step back undoes a step
exactly. With the heading before the turn, or the one after it, it would not.

What differs. What released weights expect instead is in released.py.

Try it: python camera.py      Tests: pytest tests/test_camera.py
"""

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 0.1235  # metres per frame; a diagonal moves 1/√2 of it on each axis
DEGREES = 15.0  # degrees per mouse unit, both axes
DEAD_ZONE = 0.02  # smaller mouse values count as 0
# the camera of the third person, seen from the player's eye
ARM = 2.8  # metres behind it
LIFT = 0.15  # metres above it
TILT = 12.0  # degrees that it looks further down
NEAR, FAR = 0.1, 30.0  # metres: the part of a view that counts as seen
KEYS = ("w", "s", "a", "d", "jump", "attack")  # order of the six keyboard entries


def expect(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")


def choose(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def rotation(c2w: Tensor) -> Tensor:  # (..., 4, 4) -> (..., 3, 3)
    return c2w[..., :3, :3]


def position(c2w: Tensor) -> Tensor:  # (..., 4, 4) -> (..., 3)
    return c2w[..., :3, 3]


def is_rigid(c2w: Tensor, tolerance: float = 1e-4) -> Tensor:  # (..., 4, 4) -> (...) bool
    """Whether R is a rotation (RᵀR = I and, for its columns, (x × y)·z > 0) and all is finite."""
    R = rotation(c2w).double()
    x, y, z = R.unbind(-1)
    error = R.mT @ R - torch.eye(3).to(R)
    orthonormal = error.abs().amax((-1, -2)) < tolerance
    right_handed = (torch.linalg.cross(x, y) * z).sum(-1) > 0
    finite = c2w[..., :3, :].isfinite().flatten(-2).all(-1)
    return orthonormal & right_handed & finite


def check_rigid(name: str, c2w: Tensor) -> None:
    expect(name, c2w, (*c2w.shape[:-2], 4, 4))
    wrong = (~is_rigid(c2w)).nonzero().tolist()
    if wrong:
        at = wrong[0]
        raise ValueError(
            f"{name}{at} is no camera (finite, RᵀR = I, det +1; released ones need from_released "
            f"first): {c2w[tuple(at)].tolist()}"
        )


# ---- actions to poses ----------------------------------------------------------------------------


def turned(mouse: Sequence[float]) -> list[float]:
    """Degrees of pitch and yaw."""
    return [DEGREES * value if abs(value) >= DEAD_ZONE else 0.0 for value in mouse]


def walked(keyboard: Sequence[float]) -> tuple[int, int, bool]:
    """Forward and right, each -1, 0 or 1, and whether that is a diagonal."""
    w, s, a, d = (held > 0.5 for held in keyboard[:4])
    forward = w - s
    right = d - a
    return forward, right, bool(forward and right)


def step_pose(
    pose: Sequence[float],  # x, y, z, pitch°, yaw°; yaw is never wrapped
    keyboard: Sequence[float],  # w s a d jump attack; the last two do not move
    mouse: Sequence[float],  # pitch, yaw in units of 15°
    max_pitch: float | None = None,  # degrees; None: never clamped
) -> tuple[float, float, float, float, float]:
    """One frame of walking, in plain doubles."""
    x, y, z, pitch, yaw = pose
    d_pitch, d_yaw = turned(mouse)
    forward, right, diagonal = walked(keyboard)

    heading = math.radians(yaw + 0.5 * d_yaw)  # (4)
    sin = math.sin(heading)
    cos = math.cos(heading)
    step = STEP * math.sqrt(0.5) if diagonal else STEP
    x += step * (forward * sin + right * cos)
    z += step * (forward * cos - right * sin)

    limit = math.inf if max_pitch is None else max_pitch
    pitch = min(max(pitch + d_pitch, -limit), limit)
    return x, y, z, pitch, yaw + d_yaw


def integrate(
    pose: Sequence[float], keyboard: Tensor, mouse: Tensor, max_pitch: float | None = None
) -> Tensor:
    """The pose of frame 0, actions (F, 6) and (F, 2) -> poses (F+1, 5) float64."""
    expect("keyboard", keyboard, (len(mouse), len(KEYS)))
    expect("mouse", mouse, (len(mouse), 2))
    poses = [tuple(float(value) for value in pose)]
    for keys, turn in zip(keyboard.tolist(), mouse.tolist(), strict=True):
        poses.append(step_pose(poses[-1], keys, turn, max_pitch))
    return torch.tensor(poses, dtype=torch.float64)


# ---- poses to cameras ----------------------------------------------------------------------------


def pose_to_c2w(pose: Tensor) -> Tensor:  # (..., 5) -> (..., 4, 4), same dtype
    """[Ry(yaw)·Rx(pitch) | p], the product written out."""
    x, y, z, pitch, yaw = pose.unbind(-1)
    pitch = torch.deg2rad(pitch)
    yaw = torch.deg2rad(yaw)
    sp, cp = pitch.sin(), pitch.cos()
    sy, cy = yaw.sin(), yaw.cos()
    zero = torch.zeros_like(x)
    one = torch.ones_like(x)
    rows = [
        [cy, sy * sp, sy * cp, x],
        [zero, cp, -sp, y],
        [-sy, cy * sp, cy * cp, z],
        [zero, zero, zero, one],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def over_the_shoulder(poses: Tensor, max_pitch: float = 85.0) -> Tensor:  # (n, 5) -> (n, 4, 4)
    """The camera of the third person behind a player. In the game walls bring it nearer (world.cameras)."""
    tilted = poses.clone()
    tilted[:, 3] = (poses[:, 3] - TILT).clamp(-max_pitch, max_pitch)
    c2w = pose_to_c2w(tilted)
    forward = c2w[:, :3, 2]
    up = c2w.new_tensor([0, -LIFT, 0])
    c2w[:, :3, 3] += up - ARM * forward
    return c2w


def c2w_to_pose(c2w: Tensor) -> Tensor:  # (..., 4, 4) -> (..., 5)
    """The pose of a camera that does not roll; yaw lies in [-180°, 180°]."""
    x, y, z = rotation(c2w)[..., 2].unbind(-1)  # its forward axis
    yaw = torch.atan2(x, z)
    pitch = torch.asin((-y).clamp(-1, 1))
    angles = torch.stack([pitch, yaw], -1)
    return torch.cat([position(c2w), torch.rad2deg(angles)], -1)


def relative(base: Tensor, other: Tensor) -> Tensor:  # (..., 4, 4) twice -> base⁻¹ · other
    inverse = rotation(base).mT
    turn = inverse @ rotation(other)
    # the positions are subtracted before they are turned: exact even far from the origin
    away = position(other) - position(base)
    shift = inverse @ away[..., None]
    top = torch.cat([turn, shift], -1)  # (2)
    bottom = other.new_tensor([0, 0, 0, 1])
    return torch.cat([top, bottom.expand_as(top[..., :1, :])], -2)


# ---- cameras to rays -----------------------------------------------------------------------------


def intrinsics(H: int, W: int, fov: float = 90.0) -> Tensor:
    """(4,): square pixels, fov degrees across."""
    focal = W / 2 / math.tan(math.radians(fov) / 2)
    return torch.tensor([focal, focal, W / 2, H / 2])


def directions(K: Tensor, H: int, W: int) -> Tensor:  # (..., 4) -> (..., 3, H*W)
    """Through each pixel (u, v), in the camera's axes: ((u − cx)/fx, (v − cy)/fy, 1), at length 1."""
    fx, fy, cx, cy = K[..., None].unbind(-2)
    rows = torch.arange(H).to(K) + 0.5
    columns = torch.arange(W).to(K) + 0.5
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    x = (u.flatten() - cx) / fx
    y = (v.flatten() - cy) / fy
    return F.normalize(torch.stack([x, y, torch.ones_like(x)], -2), dim=-2)


def rays(c2w: Tensor, K: Tensor, H: int, W: int) -> Tensor:  # (..., 4, 4), (4,) -> (..., 6, H, W)
    """Origin and direction of the ray of every pixel, in the axes that c2w leads to."""
    d = rotation(c2w) @ directions(K.to(c2w), H, W)
    o = position(c2w)[..., None].expand_as(d)
    return torch.cat([o, d], -2).unflatten(-1, (H, W))


def moment(o: Tensor, d: Tensor) -> Tensor:  # (..., 3, n) twice -> (..., 3, n)
    """o × d, written out."""
    ox, oy, oz = o.unbind(-2)
    dx, dy, dz = d.unbind(-2)
    product = [
        oy * dz - oz * dy,
        oz * dx - ox * dz,
        ox * dy - oy * dx,
    ]
    return torch.stack(product, -2)  # (1)


def azimuth_waves(d: Tensor) -> Tensor:  # (..., 3, n) -> (..., 6, n)
    """cos kα and sin kα of the azimuth α = atan2(x, z) of rays d, for k = 2, 4, 8."""
    x, _, z = d.unbind(-2)
    radius = (x * x + z * z).sqrt().clamp(min=1e-6)
    cos = z / radius
    sin = x / radius
    waves = []
    for _ in range(3):  # k = 2, 4, 8
        sin_twice = 2 * cos * sin
        cos_twice = cos * cos - sin * sin  # (3)
        cos, sin = cos_twice, sin_twice
        waves += [cos, sin]
    return torch.stack(waves, -2)


ANCHORED_SCALE = 2.0  # metres per unit of o: 40 frames walk up to 4.9 m, so |o| is about 1


def anchored_rays(
    cameras: Tensor,  # (B, L, 4, 4, 4): of each latent's four frames
    anchor: Tensor,  # (B, 4, 4)
    K: Tensor,  # (4,) or (B, 4), in cells
    h: int,
    w: int,
) -> Tensor:  # (B, 60, L, h, w) float32
    """Of the ray through each cell's centre 15 numbers, o, d, m and azimuth, in each of four frames."""
    # in double, for which the difference of two positions kilometres away is still exact
    g = relative(anchor.double()[:, None, None], cameras.double())
    g = g.float().transpose(1, 2)  # (B, 4, L, 4, 4)

    in_camera = directions(K.to(g), h, w).view(-1, 1, 1, 3, h * w)
    d = rotation(g) @ in_camera  # (B, 4, L, 3, h*w)
    o = position(g) / ANCHORED_SCALE
    o = o[..., None].expand_as(d)
    channels = torch.cat([o, d, moment(o, d), azimuth_waves(d)], -2)  # (B, 4, L, 15, h*w)
    return channels.transpose(2, 3).flatten(1, 2).unflatten(-1, (h, w))


# ---- keys by name --------------------------------------------------------------------------------

LOOK = {  # (pitch, yaw) in mouse units; 0.1 is 1.5° per frame
    "i": (0.1, 0.0),
    "k": (-0.1, 0.0),
    "j": (0.0, -0.1),
    "l": (0.0, 0.1),
}


def parse_keys(chord: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(6,) keyboard and (2,) mouse of one frame from its held keys.

    "w+l" walks forward and turns right, "l2.5" turns 2.5 times as far, "_" does nothing.
    """
    pressed = {}
    for key in map(str.strip, chord.split("+")):
        found = re.fullmatch(r"[wasd_]|([ijkl])(\d+(?:\.\d+)?)?", key, re.ASCII)
        if not found:
            raise ValueError(
                f"unknown key {key!r} in {chord!r}; "
                "use w a s d (move), i j k l (look), + to combine, _ for nothing"
            )
        pressed[key[0]] = float(found[2] or 1)

    keyboard = tuple(float(key in pressed) for key in KEYS)
    looking = [key for key in LOOK if key in pressed]
    pitch = sum(pressed[key] * LOOK[key][0] for key in looking)
    yaw = sum(pressed[key] * LOOK[key][1] for key in looking)
    return keyboard, (pitch, yaw)


def actions_from_keys(chords: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Keyboard (F, 6) and mouse (F, 2), one chord per frame."""
    actions = [parse_keys(chord) for chord in chords]
    keyboard = torch.tensor([keys for keys, _ in actions])
    mouse = torch.tensor([turn for _, turn in actions])
    return keyboard.reshape(-1, 6), mouse.reshape(-1, 2)


def keys_from_action(keyboard: Sequence[float], mouse: Sequence[float]) -> str:
    """The chord that an action shows: what a viewer prints over a frame."""
    held = [key for key, on in zip(KEYS, keyboard, strict=True) if on > 0.5]
    for key, (pitch, yaw) in LOOK.items():
        # one of the two is ±0.1, the other 0: does the mouse turn that way, beyond the dead zone?
        if pitch * mouse[0] + yaw * mouse[1] > 0.1 * DEAD_ZONE:
            held.append(key)
    return "+".join(held) or "_"


def main() -> None:
    """A full circle ends where it began; and the moment of a line is the same along it."""
    keyboard, mouse = actions_from_keys(["w+l"] * 241)  # 240 times 1.5° is a full circle
    poses = integrate((0, 0, 0, 0, 0), keyboard[:240], mouse[:240])
    gap = 100 * (poses[-1, :3] - poses[0, :3]).norm()
    print(f"a full circle ends {gap:.1f} cm from its start")

    o = torch.tensor([[1.0], [2.0], [0.0]])
    d = torch.tensor([[0.6], [0.0], [0.8]])
    change = (moment(o + 3 * d, d) - moment(o, d)).norm()
    print(
        f"3 m along a ray: its moment changes by {change:.1f}, its origin by {(3 * d).norm():.1f}"
    )


if __name__ == "__main__":
    main()
