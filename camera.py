"""What a key does to a camera, and where its rays run.

What it does. Actions become poses, poses become camera matrices, cameras become rays: the only way in
which the network learns where it looks. Readers of foreign data convert to these conventions at the door.
Paper: §3.2 (relative Plücker encoding).  Released: its own axes and channels, kept below.

Conventions. c2w 4x4, OpenCV axes (x right, y DOWN, z forward), metres, floor y = 0;
c2w = [Ry(yaw) Rx(pitch) | t], yaw > 0 turns right, pitch > 0 looks up. K = (fx, fy, cx, cy) in pixels,
pixel centres at +0.5. pose5 = (x, y, z, pitch°, yaw°). action[t] drives frame t -> t+1.

Why it works. A pixel sees a line. The line through o in direction d is the same from every point
o + t·d on it, so (o, d) says more than is seen. Plücker's six numbers do not:

    ray = (d, m),   m = o × d          the moment: (o + t·d) × d = o × d for every t               (1)

Cameras are told relative to one of them, the anchor a: then rays do not depend on where in the world
the walk takes place.

    g = c2w_a⁻¹ · c2w = [R_aᵀ R | R_aᵀ (t − t_a)]                                                  (2)

Our anchor is the last past frame. Our channels are o, d and m: o too, because a network can use a
distance that m hides for rays through the origin; and cos kα, sin kα of the azimuth α for k = 2, 4, 8,
finer dials of the same heading.                                                                   (3)

A step goes along the mean heading of its frame, yaw + Δyaw/2, so that an action and its inverse,
undone in reverse order, lead home exactly.                                                        (4)

What differs. The released integrator takes the mean of two wrapped yaws: one step goes astray at ±180°.
Its channels, though called Plücker, are (o, d) without the moment.

Try it: python memory.py      Tests: pytest tests/test_camera.py
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 0.1235  # metres per frame; a diagonal moves 1/√2 of it on each axis
DEGREES = 15.0  # degrees per mouse unit, both axes
DEAD_ZONE = 0.02  # smaller mouse values count as 0
ARM, LIFT, TILT = 2.8, 0.15, 12.0  # third person: metres behind and above the eye, degrees down
KEYS = ("w", "s", "a", "d", "jump", "attack")  # order of the six keyboard entries


def expect(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")


def choose(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def is_rigid(c2w: Tensor, tolerance: float = 1e-4) -> Tensor:  # (..., 4, 4) -> (...) bool
    R = c2w[..., :3, :3].double()
    # RᵀR = I,  (x × y)·z > 0,  everything finite
    orthonormal = (R.mT @ R - torch.eye(3).to(R)).abs().amax((-1, -2)) < tolerance
    right_handed = (torch.linalg.cross(R[..., 0], R[..., 1]) * R[..., 2]).sum(-1) > 0
    return orthonormal & right_handed & c2w[..., :3, :].isfinite().all(-1).all(-1)


def check_rigid(name: str, c2w: Tensor) -> None:
    expect(name, c2w, (*c2w.shape[:-2], 4, 4))
    for at in (~is_rigid(c2w)).nonzero().tolist()[:1]:
        raise ValueError(
            f"{name}{at} is no camera (finite, RᵀR = I, det +1; released ones need from_released first): "
            f"{c2w[tuple(at)].tolist()}"
        )


def step_pose(
    pose: Sequence[float],
    keyboard: Sequence[float],
    mouse: Sequence[float],
    max_pitch: float | None = None,
) -> tuple[float, float, float, float, float]:
    """One frame of walking, in plain doubles. pose = x, y, z, pitch°, yaw° (never wrapped); keyboard = w s a d jump attack
    (the last two do not move); mouse = pitch, yaw in units of 15°; max_pitch in degrees, None: never clamped."""
    x, y, z, pitch, yaw = pose
    d_pitch = DEGREES * mouse[0] if abs(mouse[0]) >= DEAD_ZONE else 0.0
    d_yaw = DEGREES * mouse[1] if abs(mouse[1]) >= DEAD_ZONE else 0.0
    forward, right = (
        (keyboard[0] > 0.5) - (keyboard[1] > 0.5),
        (keyboard[3] > 0.5) - (keyboard[2] > 0.5),
    )
    step = STEP * math.sqrt(0.5) if forward and right else STEP
    heading = math.radians(yaw + 0.5 * d_yaw)  # (4)
    sin, cos = math.sin(heading), math.cos(heading)
    x, z = x + step * (forward * sin + right * cos), z + step * (forward * cos - right * sin)
    limit = math.inf if max_pitch is None else max_pitch
    return x, y, z, min(max(pitch + d_pitch, -limit), limit), yaw + d_yaw


def integrate(
    pose: Sequence[float], keyboard: Tensor, mouse: Tensor, max_pitch: float | None = None
) -> Tensor:
    """pose5 of frame 0, actions (F, 6) and (F, 2) -> (F+1, 5) float64."""
    expect("keyboard", keyboard, (len(mouse), len(KEYS)))
    expect("mouse", mouse, (len(mouse), 2))
    poses = [tuple(float(value) for value in pose)]
    for keys, turn in zip(keyboard.tolist(), mouse.tolist(), strict=True):
        poses.append(step_pose(poses[-1], keys, turn, max_pitch))
    return torch.tensor(poses, dtype=torch.float64)


def invert_actions(keyboard: Tensor, mouse: Tensor) -> tuple[Tensor, Tensor]:
    """The actions that walk (F, 6), (F, 2) back: reversed in time, w <-> s, a <-> d, mouse negated."""
    return keyboard.flip(-2)[..., [1, 0, 3, 2, 4, 5]], -mouse.flip(-2)


def pose_to_c2w(pose: Tensor) -> Tensor:  # (..., 5) -> (..., 4, 4), same dtype
    x, y, z, pitch, yaw = pose.unbind(-1)
    p, a = torch.deg2rad(pitch), torch.deg2rad(yaw)
    sp, cp, sa, ca = p.sin(), p.cos(), a.sin(), a.cos()
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    # c2w = [Ry(yaw) Rx(pitch) | t]
    rows = (
        ca,
        sa * sp,
        sa * cp,
        x,
        zero,
        cp,
        -sp,
        y,
        -sa,
        ca * sp,
        ca * cp,
        z,
        zero,
        zero,
        zero,
        one,
    )
    return torch.stack(rows, -1).unflatten(-1, (4, 4))


def behind(poses: Tensor, max_pitch: float = 85.0) -> Tensor:  # (n, 5) -> (n, 4, 4)
    """The camera of the third person, where no wall shortens its arm (world.cameras does that)."""
    c2w = pose_to_c2w(
        torch.cat(
            [poses[:, :3], (poses[:, 3:4] - TILT).clamp(-max_pitch, max_pitch), poses[:, 4:]], 1
        )
    )
    c2w[:, :3, 3] += c2w.new_tensor([0, -LIFT, 0]) - ARM * c2w[:, :3, 2]
    return c2w


def c2w_to_pose(
    c2w: Tensor,
) -> Tensor:  # (..., 4, 4) -> (..., 5); roll is lost, yaw in [-180°, 180°]
    yaw = torch.rad2deg(torch.atan2(c2w[..., 0, 2], c2w[..., 2, 2]))
    pitch = torch.rad2deg(torch.asin((-c2w[..., 1, 2]).clamp(-1, 1)))
    return torch.cat([c2w[..., :3, 3], pitch[..., None], yaw[..., None]], -1)


def intrinsics(
    H: int, W: int, fov: float = 90.0
) -> Tensor:  # (4,): square pixels, fov degrees across
    focal = W / 2 / math.tan(math.radians(fov) / 2)
    return torch.tensor([focal, focal, W / 2, H / 2])


def relative(base: Tensor, other: Tensor) -> Tensor:  # (..., 4, 4) twice -> base⁻¹ · other
    inverse = base[..., :3, :3].mT
    rotation = inverse @ other[..., :3, :3]
    shift = inverse @ (other[..., :3, 3:] - base[..., :3, 3:])  # (2): exact far from the origin too
    bottom = other.new_tensor([0, 0, 0, 1]).expand(*rotation.shape[:-2], 1, 4)
    return torch.cat([torch.cat([rotation, shift], -1), bottom], -2)


def directions(K: Tensor, H: int, W: int) -> Tensor:  # (..., 4) -> (..., 3, H*W) unit, camera axes
    fx, fy, cx, cy = (value[..., None] for value in K.unbind(-1))
    v, u = torch.meshgrid(torch.arange(H).to(K) + 0.5, torch.arange(W).to(K) + 0.5, indexing="ij")
    # d = ((u − cx)/fx, (v − cy)/fy, 1) / |·|
    x, y = (u.flatten() - cx) / fx, (v.flatten() - cy) / fy
    return F.normalize(torch.stack([x, y, torch.ones_like(x)], -2), dim=-2)


def rays(c2w: Tensor, K: Tensor, H: int, W: int) -> Tensor:  # (..., 4, 4), (4,) -> (..., 6, H, W)
    """The release calls these Plücker channels; they are origin and direction, without the moment o × d."""
    d = c2w[..., :3, :3] @ directions(K.to(c2w), H, W)
    o = c2w[..., :3, 3:].expand_as(d)
    return torch.cat([o, d], -2).unflatten(-1, (H, W))


ANCHORED_SCALE = 2.0  # metres per unit of o: a segment is 7 m, so |o| is about 1


def anchored_rays(cameras: Tensor, anchor: Tensor, K: Tensor, h: int, w: int) -> Tensor:
    """(B, L, 4, 4, 4), (B, 4, 4), K (4,) or (B, 4) in cells -> (B, 60, L, h, w) float32: 15 channels, o, d, o × d
    and azimuth harmonics of the cell's centre, at each of the latent's four frames."""
    # in double: the difference of two places kilometres away is still exact
    g = relative(anchor.double()[:, None, None], cameras.double())  # (2)
    g = g.float().transpose(1, 2)  # (B, 4, L, 4, 4)
    cells = directions(K.to(g), h, w).view(-1, 1, 1, 3, h * w)
    d = g[..., :3, :3] @ cells  # (B, 4, L, 3, h*w)
    o = (g[..., :3, 3:] / ANCHORED_SCALE).expand_as(d)
    x, y, z = d.unbind(-2)
    ox, oy, oz = o.unbind(-2)
    moment = [oy * z - oz * y, oz * x - ox * z, ox * y - oy * x]  # (1)

    # the azimuth is α = atan2(x, z); doubling the angle three times gives k = 2, 4, 8
    radius = (x * x + z * z).sqrt().clamp(min=1e-6)
    cos, sin = z / radius, x / radius
    harmonics = []
    for _ in range(3):
        cos, sin = cos * cos - sin * sin, 2 * cos * sin
        harmonics += [cos, sin]  # (3)

    channels = torch.stack([ox, oy, oz, x, y, z, *moment, *harmonics], 2)
    return channels.flatten(1, 2).unflatten(-1, (h, w))


def to_released(
    c2w: Tensor,
) -> Tensor:  # our cameras -> the left-handed ones of the release, det −1
    # world rows x forward, y right, z from y; the image-down column changes sign: their mouse "up" tilts down
    return c2w[..., [2, 0, 1, 3], :] * c2w.new_tensor([1, -1, 1, 1])


def from_released(extrinsics: Tensor) -> Tensor:  # exact inverse: only signs and places change
    return extrinsics[..., [1, 2, 0, 3], :] * extrinsics.new_tensor([1, -1, 1, 1])


def released_poses(
    keyboard: Tensor, mouse: Tensor
) -> Tensor:  # (F, 6), (F, 2) -> (F, 5) float32, cm
    """The released integrator bit for bit: float32 angles, mean of WRAPPED yaws (one step astray at ±180°)."""
    pose, poses = torch.zeros(5), []
    turns = DEGREES * torch.where(mouse.abs() < DEAD_ZONE, 0.0, mouse.float())
    for keys, turn in zip(keyboard.tolist(), turns, strict=True):
        poses.append(pose)
        angles = pose[3:] + turn
        angles[1] -= 360 * torch.round(angles[1] / 360)
        forward, right = (keys[0] > 0.5) - (keys[1] > 0.5), (keys[3] > 0.5) - (keys[2] > 0.5)
        heading, step = (
            math.radians(float((pose[4] + angles[1]) / 2)),
            8.73 if forward and right else 12.35,
        )
        sin, cos = math.sin(heading), math.cos(heading)
        move = pose.new_tensor(
            [cos * forward - sin * right, sin * forward + cos * right, 0], dtype=torch.float64
        )
        pose = torch.cat([(pose[:3].double() + step * move).float(), angles])
    return torch.stack(poses)


LOOK = {
    "i": (0.1, 0.0),
    "k": (-0.1, 0.0),
    "j": (0.0, -0.1),
    "l": (0.0, 0.1),
}  # (pitch, yaw), 0.1 = 1.5° per frame


def parse_keys(
    chord: str,
) -> tuple[tuple[float, ...], tuple[float, ...]]:  # keyboard (6,), mouse (2,)
    """The action of one frame from its held keys: "w+l" walks forward and turns right, "_" does nothing."""
    keys = {key.strip() for key in chord.split("+")} - {"_"}
    if unknown := sorted(keys - {*KEYS[:4], *LOOK}):
        raise ValueError(
            f"unknown key {unknown[0]!r} in {chord!r}; use w a s d (move), i j k l (look), + to combine, _ for nothing"
        )
    return tuple(float(key in keys) for key in KEYS), tuple(
        sum(LOOK[key][axis] for key in keys & {*LOOK}) for axis in (0, 1)
    )


def actions_from_keys(
    chords: Sequence[str],
) -> tuple[Tensor, Tensor]:  # keyboard (F, 6), mouse (F, 2)
    actions = [parse_keys(chord) for chord in chords]
    return torch.tensor([a[0] for a in actions]).reshape(-1, 6), torch.tensor(
        [a[1] for a in actions]
    ).reshape(-1, 2)


def keys_from_action(keyboard: Sequence[float], mouse: Sequence[float]) -> str:
    """The chord that an action shows: what a viewer prints over a frame."""
    held = [key for key, on in zip(KEYS, keyboard, strict=True) if on > 0.5]
    held += [
        key
        for key, (pitch, yaw) in LOOK.items()
        if pitch * mouse[0] + yaw * mouse[1] > 0.1 * DEAD_ZONE
    ]
    return "+".join(held) or "_"
