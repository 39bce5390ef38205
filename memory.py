"""Find the past frames that saw what we are about to see, and say how their cameras relate to ours.

Paper: §3.2 (camera-aware memory), Eq. 6 (context of the loss).  Released code: inference only.

    pose' = pose + action            15° per mouse unit, 0.1235 m per frame, mean heading    step_pose
    g_i   = c2w_a⁻¹ · c2w_i          one camera as another camera sees it                    relative
    ray   = (o, d)                   origin and unit direction of a pixel                    rays
    s(q, c) = |V_q ∩ V_c| / |V_q|    how much of view q's frustum an old view c has seen     overlap
    m_j   = argmax_c s(q_j, c)       five new views ask, one old latent answers each         MemoryBank
    context = [memory | past | new]  on the time axis; memory and past are clean             make_context

Camera: c2w 4x4, OpenCV axes (x right, y DOWN, z forward), metres, floor y = 0; c2w = [Ry(yaw) Rx(pitch) | t],
yaw > 0 turns right, pitch > 0 looks up. K = (fx, fy, cx, cy) in pixels, pixel centres at +0.5.
pose5 = (x, y, z, pitch°, yaw°).  action[t] drives frame t -> t+1.

Rays, "released": each latent relative to the one before, translations divided by the largest; memory relative to
the view that asks for it, unit length; all pixels of a cell folded into channels. Rays, "anchored" (our own training):
each latent, memory too, relative to the last past frame, in metres; per cell its centre ray at the latent's four
frames, with moment o × d and harmonics of the azimuth. To ablate: "absolute", the same from the origin of the world; "none", zeros.

Departures from the release, each tested: half-delta yaw instead of the mean of two wrapped yaws, so actions
undo exactly; sample points uniform in volume, not in depth; no latent twice among the five; action windows do
not slip by one frame after segment 0. As in the paper, overlap ignores walls.
Demo: python memory.py      Tests: pytest tests/test_memory.py
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 0.1235  # metres per frame; a diagonal moves 1/√2 of it on each axis
DEGREES = 15.0  # degrees per mouse unit, both axes
DEAD_ZONE = 0.02  # smaller mouse values count as 0
ARM, LIFT, TILT = 2.8, 0.15, 12.0  # third person: metres behind and above the eye, degrees down
KEYS = ("w", "s", "a", "d", "jump", "attack")  # order of the six keyboard entries
NULL_MOUSE, NULL_KEY = 1.0, -1.0  # "no action": memory tokens and the guidance branch
ACTIONS_SEEN = 12  # per latent: the four that made its frames, eight before
NEAR, FAR = 0.1, 30.0  # metres: the part of a view that counts as seen
RULES = ("uniform", "released", "exact")  # of overlap
ENCODINGS = ("anchored", "absolute", "none", "released")  # of rays
POLICIES = ("camera", "recent", "random", "none")  # of what to remember
ANCHORED_SCALE = 2.0  # metres per unit of o: a segment is 7 m, so |o| is about 1
LENGTHS = (10, 5, 2)  # new latents of a segment that our own models are trained for
BRUTE_FORCE = 512  # a bank scores up to so many candidates one by one;
SURVIVORS, FINALISTS, GROUP = (
    160,
    24,
    24,
)  # of more, so many pass the prefilter, then 64 points; its group size
BLOCK = 42 * GROUP  # rows that a bank grows by at first: whole groups always, doubled or not


@dataclass(frozen=True)
class Window:
    """Every number of time. Latent 0 is frame 0 alone; latent L >= 1 covers frames 4L-3 .. 4L."""

    stride: int = 4  # pixel frames per latent after the first
    first: int = 15  # latents of segment 0: the image and 14 new ones
    past: int = 4  # clean latents every later segment starts from
    new: int = 10  # latents every later segment adds
    memory: int = 5  # retrieved latents

    def latents(self, segments: int) -> int:
        return self.first + self.new * (segments - 1)

    def frames(self, segments: int) -> int:
        return self.stride * (self.latents(segments) - 1) + 1

    def latent_of(self, frame: int) -> int:
        return (frame - 1) // self.stride + 1

    def frames_of(self, latent: int) -> range:
        return (
            range(1)
            if latent == 0
            else range(self.stride * (latent - 1) + 1, self.stride * latent + 1)
        )

    def segment(self, k: int) -> tuple[int, int, int]:
        """First latent, last latent + 1, how many of them are clean past."""
        end = self.latents(k + 1)
        return (0, end, 1) if k == 0 else (end - self.new - self.past, end, self.past)

    def queries(self, k: int) -> list[int]:
        """Latents whose last frames ask for memory, spread over the new ones: end-1, -3, -5, -7, -9."""
        return [self.segment(k)[1] - 1 - offset for offset in query_offsets(self.new, self.memory)]


def query_offsets(new: int, memory: int) -> list[int]:
    """Memory slot j asks this many latents before the newest: 0 2 4 6 8 for 10 new latents and 5 slots."""
    return [slot * new // memory for slot in range(memory)]


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
    # heading = yaw + Δyaw/2      the mean heading makes every step reversible
    heading = math.radians(yaw + 0.5 * d_yaw)
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
    # g = [R_bᵀ R_o | R_bᵀ (t_o − t_b)]      subtracting first stays exact far from the origin
    inverse = base[..., :3, :3].mT
    rotation, shift = (
        inverse @ other[..., :3, :3],
        inverse @ (other[..., :3, 3:] - base[..., :3, 3:]),
    )
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


def segment_cameras(c2w: Tensor, first_latent: int | Tensor, n: int) -> Tensor:
    """(B, F, 4, 4) from global frame 0, an int or (B,) -> (B, n, 4, 4, 4): the cameras of each latent's four
    frames, of which [:, :, -1] is the latent's pose. Latent 0 has frame 0 four times."""
    return take_frames(c2w, first_latent, n, torch.arange(-Window.stride + 1, 1))


def action_windows(actions: Tensor, first_latent: int | Tensor, n: int) -> Tensor:
    """(B, F, A) from global frame 0 -> (B, n, 12, A): latent L sees actions 4L−12 .. 4L−1, the four that made its
    frames and the eight before, clamped at 0."""
    return take_frames(actions, first_latent, n, torch.arange(-ACTIONS_SEEN, 0))


def released_windows(actions: Tensor) -> Tensor:  # (B, 57 | 56, A) -> (B, 15 | 14, 12, A)
    """Of one segment: 12 copies of its own first action in front of 4k+1 frames, 8 in front of 4k."""
    fill = ACTIONS_SEEN if actions.shape[1] % Window.stride == 1 else ACTIONS_SEEN - Window.stride
    padded = torch.cat([actions[:, :1].expand(-1, fill, -1), actions], 1)
    return padded.unfold(1, ACTIONS_SEEN, Window.stride)[
        :, : (actions.shape[1] + 3) // Window.stride
    ].mT


def take_frames(x: Tensor, first_latent: int | Tensor, n: int, steps: Tensor) -> Tensor:
    """Frames 4L + step of x (B, F, ...) for each of n latents: (B, n, S, ...), clamped at frame 0, never past the end."""
    latents = torch.as_tensor(first_latent, device=x.device).expand(len(x))[:, None] + torch.arange(
        n, device=x.device
    )
    frames = Window.stride * latents[..., None] + steps.to(x.device)
    if int(frames.max()) >= x.shape[1] or int(latents.min()) < 0:
        raise ValueError(
            f"the clip has frames 0 .. {x.shape[1] - 1}, but latents {int(latents.min())} .. "
            f"{int(latents.max())} need frames up to {int(frames.max())}"
        )
    return x[torch.arange(len(x), device=x.device)[:, None, None], frames.clamp(min=0)]


def palindrome(frames: int) -> Tensor:  # (F,) long: which frame to show, F = 4k+1
    """n, n, n−1 … n/2+1, n/2+1 … n: the second half revisits, backwards, what the first half showed."""
    if frames % 4 != 1 or frames < 5:
        raise ValueError(f"a palindrome needs 4k+1 frames, at least 5, got {frames}")
    last = torch.arange((frames - 1) // 2 + 1, frames)
    return torch.cat([last[-1:], last.flip(0), last])


# ---- context: everything the network sees beside the noisy latents -----------------------------------------


@dataclass(frozen=True)
class Memory:
    """Retrieved latents."""

    latents: Tensor  # (B, C, M, h, w)
    times: Tensor  # (B, M) long, absolute latent indices, any order
    cameras: Tensor  # (B, M, 4, 4, 4) c2w of each latent's four frames


@dataclass(frozen=True)
class Context:
    """[memory | past | new] on every time axis; the noisy new latents themselves travel separately."""

    past: Tensor  # (B, C, P, h, w)
    memory: Tensor  # (B, C, M, h, w), M may be 0
    times: Tensor  # (B, M+P+N) long
    rays: Tensor  # (B, R, M+P+N, h, w)
    mouse: Tensor  # (B, M+P+N, 12, 2)
    keyboard: Tensor  # (B, M+P+N, 12, 6)
    text: Tensor  # (B, n, text_dim)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Context":
        every = {field.name: getattr(self, field.name) for field in fields(self)}  # times stay long
        return Context(
            **{
                name: x.to(device, dtype if x.is_floating_point() else None)
                for name, x in every.items()
            }
        )

    def drop_memory(self) -> "Context":
        M = self.memory.shape[2]
        return replace(
            self,
            memory=self.memory[:, :, :0],
            times=self.times[:, M:],
            rays=self.rays[:, :, M:],
            mouse=self.mouse[:, M:],
            keyboard=self.keyboard[:, M:],
        )

    def alone(self) -> "Context":
        """The new latents and their cameras, without anything that came before, text or actions."""
        T = self.times.shape[1] - self.memory.shape[2] - self.past.shape[2]
        bare = replace(
            self,
            memory=self.memory[:, :, :0],
            past=self.past[:, :, :0],
            times=self.times[:, -T:],
            rays=self.rays[:, :, -T:],
            mouse=self.mouse[:, -T:],
            keyboard=self.keyboard[:, -T:],
        )
        return bare.mute(torch.ones(len(self.past), dtype=torch.bool))

    def mute(self, where: Tensor) -> "Context":  # (B,) bool
        """Null actions, zero text for some samples: so training learns the branch guidance subtracts."""
        B, where = len(where), where.to(self.text.device)
        mouse = torch.where(where.view(B, 1, 1, 1), NULL_MOUSE, self.mouse)
        keyboard = torch.where(where.view(B, 1, 1, 1), NULL_KEY, self.keyboard)
        return replace(
            self,
            mouse=mouse,
            keyboard=keyboard,
            text=torch.where(where.view(B, 1, 1), 0.0, self.text),
        )

    def null(self, text: Tensor | None = None) -> "Context":
        """The branch guidance subtracts: no memory, null actions, the negative prompt (zeros if none)."""
        bare = self.drop_memory().mute(torch.ones(len(self.past), dtype=torch.bool))
        return bare if text is None else replace(bare, text=text)


def anchored_rays(cameras: Tensor, anchor: Tensor, K: Tensor, h: int, w: int) -> Tensor:
    """(B, L, 4, 4, 4), (B, 4, 4), K (4,) or (B, 4) in cells -> (B, 60, L, h, w) float32: 15 channels, o, d, o × d
    and azimuth harmonics of the cell's centre, at each of the latent's four frames."""
    # g = c2w_a⁻¹ c2w      in double: the difference of two places kilometres away is still exact
    g = (
        relative(anchor.double()[:, None, None], cameras.double()).float().transpose(1, 2)
    )  # (B, 4, L, 4, 4)
    d = g[..., :3, :3] @ directions(K.to(g), h, w).view(-1, 1, 1, 3, h * w)  # (B, 4, L, 3, h*w)
    o = (g[..., :3, 3:] / ANCHORED_SCALE).expand_as(d)
    (ox, oy, oz), (x, y, z), harmonics = o.unbind(-2), d.unbind(-2), []
    # cos kα, sin kα of the azimuth α = atan2(x, z) for k = 2, 4, 8, by doubling the angle three times
    radius = (x * x + z * z).sqrt().clamp(min=1e-6)
    cos, sin = z / radius, x / radius
    for _ in range(3):
        cos, sin = cos * cos - sin * sin, 2 * cos * sin
        harmonics += [cos, sin]
    moment = [oy * z - oz * y, oz * x - ox * z, ox * y - oy * x]
    return (
        torch.stack([ox, oy, oz, x, y, z, *moment, *harmonics], 2)
        .flatten(1, 2)
        .unflatten(-1, (h, w))
    )


def released_rays(
    cameras: Tensor, M: int, new: int, K: Tensor, size: tuple[int, int, int]
) -> Tensor:
    """(B, M+T, 4, 4, 4), M memory latents first and `new` new ones last, K (4,) in pixels, size = latent h, w
    and pixels per cell -> (B, 6*stride², M+T, h, w) float32."""
    (h, w, stride), pose, T = size, to_released(cameras[:, :, -1].double()), cameras.shape[1] - M
    # past and new latents:  g_i = c2w_{i−1}⁻¹ c2w_i,  g_0 = I;   memory:  g_j = c2w_query(j)⁻¹ c2w_j
    base = [M + T - 1 - offset for offset in query_offsets(new, M)] + [M, *range(M, M + T - 1)]
    g = relative(pose[:, base], pose)
    # t / |t| of memory, t / max |t| of the segment; below 0.1 mm a direction would be rounding noise
    length = g[..., :3, 3].norm(dim=-1)
    length[:, M:] = length[:, M:].amax(1, keepdim=True)
    g[..., :3, 3] /= torch.where(length > 1e-4, length, 1.0)[..., None]
    # (c, h s, w s) -> (c, row in cell, column in cell, h, w): the order the released weights expect
    cells = (
        rays(g.float(), K, h * stride, w * stride)
        .unflatten(-1, (w, stride))
        .unflatten(-3, (h, stride))
    )
    return cells.movedim((-3, -1), (-4, -3)).flatten(2, 4).transpose(1, 2)


def make_context(
    past: Tensor,  # (B, C, P, h, w) clean latents
    times: Tensor,  # (B, P+N) long, absolute latent indices
    cameras: Tensor,  # (B, P+N, 4, 4, 4) c2w, see segment_cameras
    mouse: Tensor,  # (B, P+N, 12, 2), see action_windows
    keyboard: Tensor,  # (B, P+N, 12, 6)
    text: Tensor,  # (B, n, text_dim)
    memory: Memory | None = None,
    encoding: str = "anchored",
    stride: int = 8,  # pixels per latent cell
    K: Tensor | None = None,  # (4,) pixels; anchored also (B, 4); default 90° (released: both ways)
) -> Context:
    """The ONE place where a context is put together: training, distillation, play and evaluation call it."""
    memory = Memory(past[:, :, :0], times[:, :0], cameras[:, :0]) if memory is None else memory
    (B, C, P, h, w), T, M = past.shape, times.shape[1], memory.latents.shape[2]
    for name, x, shape in (
        ("times", times, (B, T)),
        ("cameras", cameras, (B, T, 4, 4, 4)),
        ("text", text, (B, *text.shape[-2:])),
        ("mouse", mouse, (B, T, ACTIONS_SEEN, 2)),
        ("keyboard", keyboard, (B, T, ACTIONS_SEEN, 6)),
        ("memory.latents", memory.latents, (B, C, M, h, w)),
        ("memory.times", memory.times, (B, M)),
        ("memory.cameras", memory.cameras, (B, M, 4, 4, 4)),
    ):
        expect(name, x, shape)
    anchor, cameras = cameras[:, P - 1, -1], torch.cat([memory.cameras.to(cameras), cameras], 1)
    check_rigid("cameras (memory first)", cameras)
    if choose("encoding", encoding, ENCODINGS) == "released":
        image = released_rays(
            cameras,
            M,
            T - P,
            torch.tensor([w, h, w, h]) * stride / 2 if K is None else K,
            (h, w, stride),
        )
    else:
        anchor = torch.eye(4).to(anchor).expand_as(anchor) if encoding == "absolute" else anchor
        image = anchored_rays(
            cameras, anchor, intrinsics(h, w) if K is None else K / stride, h, w
        ) * (encoding != "none")
    times = torch.cat([memory.times.to(times), times], 1)
    mouse = torch.cat([mouse.new_full((B, M, ACTIONS_SEEN, 2), NULL_MOUSE), mouse], 1)
    keyboard = torch.cat([keyboard.new_full((B, M, ACTIONS_SEEN, 6), NULL_KEY), keyboard], 1)
    return Context(
        past, memory.latents.to(past), times, image.to(past.device), mouse, keyboard, text
    )


def clip_context(
    latents: Tensor,
    c2w: Tensor,
    keyboard: Tensor,
    mouse: Tensor,
    text: Tensor,  # whole clips, see below
    start: Tensor,  # (B,) long: the first NEW latent of each sample
    n_new: int,
    n_past: int,
    memory_index: Tensor | None = None,  # (B, M) long: latents to remember
    encoding: str = "anchored",
    stride: int = 8,
    K: Tensor | None = None,
) -> tuple[Tensor, Context]:  # x0 (B, C, N, h, w) and its context
    """Cut a training or evaluation window out of whole clips: latents (B, C, T, h, w), cameras and actions of every
    frame (B, F, 4, 4), (B, F, 6), (B, F, 2), all from frame 0, and text (B, n, text_dim)."""
    first, T = start.to(latents.device) - n_past, n_past + n_new
    if int(first.min()) < 0 or int(first.max()) + T > latents.shape[2]:
        raise ValueError(
            f"start must lie in {n_past} .. {latents.shape[2] - n_new} for {n_past} past and {n_new} "
            f"new latents in a clip of {latents.shape[2]}, got {start.tolist()}"
        )
    rows = torch.arange(len(first), device=first.device)[:, None]
    times = first[:, None] + torch.arange(T, device=first.device)
    window, memory = latents.transpose(1, 2)[rows, times].transpose(1, 2), None
    if memory_index is not None:
        index = memory_index.to(first.device)
        seen = torch.cat(
            [segment_cameras(c2w, latent, 1) for latent in index.to(c2w.device).unbind(1)], 1
        )
        memory = Memory(latents.transpose(1, 2)[rows, index].transpose(1, 2), index, seen)
    context = make_context(
        window[:, :, :n_past],
        times,
        segment_cameras(c2w, first, T),
        action_windows(mouse, first, T),
        action_windows(keyboard, first, T),
        text,
        memory,
        encoding,
        stride,
        K,
    )
    return window[:, :, n_past:], context


# ---- retrieval: how much of a new view has an old one seen? ------------------------------------------------


@functools.cache
def frustum_points(rule: str, n: int) -> Tensor:  # (3, P) points of a view, camera axes
    # u_i = (i + ½) (1/g, 1/g², 1/g³) + ½ mod 1, g⁴ = g + 1, fills a cube evenly for any n (R3 sequence)
    u = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) * 1.2207440846057596 ** -torch.arange(
        1, 4.0
    ) + 0.5
    x, y, z = (u % 1).float().unbind(-1)
    # z = far u^⅓            every point stands for the same volume
    x, y, z = 2 * x - 1, 2 * y - 1, FAR * z ** (1 / 3)
    if rule == "released":
        # 10 x 10 x 10, linear in depth, ends included: too many points close by and on the edges
        side, depth = torch.linspace(-1, 1, 10), torch.linspace(NEAR, FAR, 10)
        z, y, x = torch.meshgrid(depth, side, side, indexing="ij")
    return torch.stack([x * z, y * z, z]).flatten(1)


def inside(
    points: Tensor, g: Tensor, far: float = FAR
) -> Tensor:  # (3, P), (n, 4, 4) -> (n, P) bool
    """Do the points, moved into each camera by g, lie in its 90° x 90° frustum between NEAR and far?"""
    moved = torch.addmm(
        g[:, :3, 3].T.flatten()[:, None], g[:, :3, :3].transpose(0, 1).flatten(0, 1), points
    )
    x, y, z = moved.view(3, len(g), -1)
    return (torch.maximum(x.abs_(), y.abs_()) <= z).logical_and_(z > NEAR).logical_and_(z < far)


def frustum_intersection(g: Tensor) -> Tensor:  # (n, 4, 4) float64, one view seen by the other
    """|V_q ∩ V_c| / |V_q| exactly, with fixed shapes and no branches. Every edge of the intersection lies where
    two of the 12 planes meet and is cut by the other ten; the divergence theorem turns edges into volume."""
    r = math.sqrt(0.5)  # n·x + b ≥ 0: left right top bottom near far
    normal = g.new_tensor([[r, 0, r], [-r, 0, r], [0, r, r], [0, -r, r], [0, 0, 1], [0, 0, -1]])
    offset = g.new_tensor([0, 0, 0, 0, -NEAR, FAR]).expand(len(g), 6)
    moved = normal @ g[:, :3, :3].mT
    # the moved frustum grows by 10 µm, so that no two planes coincide
    b = torch.cat([offset, offset + 1e-5 - (moved @ g[:, :3, 3:]).squeeze(-1)], 1)
    planes = torch.cat([normal.expand(len(g), 6, 3), moved], 1)  # (n, 12, 3)
    j, k = torch.triu_indices(12, 12, 1, device=g.device)  # 66 pairs of planes
    nj, nk, bj, bk = planes[:, j], planes[:, k], b[:, j, None], b[:, k, None]
    u, cosine = torch.linalg.cross(nj, nk), (nj * nk).sum(-1, keepdim=True)
    square = u.square().sum(-1, keepdim=True).clamp(min=1e-14)
    # line q + t u/|u|,   q = (b_j u × n_k + b_k n_j × u) / |u|²
    q = (bj * torch.linalg.cross(u, nk) + bk * torch.linalg.cross(nj, u)) / square
    slope, height = (u / square.sqrt()) @ planes.mT, q @ planes.mT + b[:, None]  # (n, 66, 12)
    own = (F.one_hot(j, 12) + F.one_hot(k, 12)).bool()
    flat = (slope.abs() < 1e-9) | own
    cut = -height / torch.where(flat, 1.0, slope)
    low = torch.where(flat | (slope < 0), -torch.inf, cut).amax(-1)
    high = torch.where(flat | (slope > 0), torch.inf, cut).amin(-1)
    nowhere = (flat & ~own & (height < 0)).any(-1) | (
        square.squeeze(-1) <= 1e-14
    )  # outside, or parallel
    length = torch.where(nowhere, 0.0, (high - low).clamp(min=0))
    # V = ⅙ Σ_{j<k} length_jk (2 b_j b_k − cos_jk (b_j² + b_k²)) / sin_jk
    weight = (2 * bj * bk - cosine * (bj.square() + bk.square())) / square.sqrt()
    return (length * weight.squeeze(-1)).sum(-1) / 6 / (4 / 3 * (FAR**3 - NEAR**3))


def overlap(query: Tensor, candidates: Tensor, rule: str = "uniform", points: int = 256) -> Tensor:
    """(Q, 4, 4), candidates for all (N, 4, 4) or for each query (Q, N, 4, 4) -> (Q, N) float32: the share of each new
    view that each old one has seen. rule: sample points "uniform" in volume or as "released" (1000), or "exact"."""
    if candidates.dim() == 3:  # a bank checks what it picks per query beforehand
        check_rigid("query", query)
        check_rigid("candidates", candidates)
    g = relative(candidates.double(), query.double()[:, None])
    pieces = g.flatten(0, 1).split(
        65536 // points if g.device.type == "cpu" else 8192
    )  # a piece stays in cache
    if choose("rule", rule, RULES) == "exact":
        return (
            torch.cat([frustum_intersection(piece) for piece in pieces]).float().view(g.shape[:2])
        )
    sample = frustum_points(rule, points).to(g.device)
    return torch.cat([inside(sample, piece.float()).float().mean(-1) for piece in pieces]).view(
        g.shape[:2]
    )


def pick(
    scores: Tensor, index: Tensor, sink: int | None, repeat: float
) -> Tensor:  # (Q, S) twice -> (Q,) of index
    """The best candidate of each query in turn; one taken before costs `repeat`. The last slot is the sink's."""
    taken = index.new_full((len(index),), -1)
    if sink is not None:
        taken[-1] = sink
    for slot in range(len(index) - (sink is not None)):
        used = (index[slot, :, None] == taken).any(-1)
        taken[slot] = index[slot, (scores[slot] - repeat * used).argmax()]
    return taken


def select_training(
    c2w: Tensor,
    start: Tensor,
    n_new: int,
    n_past: int = Window.past,
    memory: int = Window.memory,
    points: int = 512,
    sink: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Whole clips (B, F, 4, 4), first new latents (B,) -> (B, memory) latents to remember; the last is the sink, 1, if wanted.
    The released rule: five new cameras, newest first, scatter points (there 3000) in 20 m around them; the old latent that
    sees most of those that ANY new view sees is taken, none twice; too little history repeats itself, at worst latent 0."""
    if int(start.min()) <= n_past:
        raise ValueError(
            f"memory is older than {n_past} past latents: start must be > {n_past}, got {start.tolist()}"
        )
    poses, chosen = torch.cat([c2w[:, :1], c2w[:, Window.stride :: Window.stride]], 1).double(), []
    ball = F.normalize(torch.randn(memory, 3, points, generator=generator), dim=1)
    ball = (ball * 20.0 * torch.rand(memory, 1, points, generator=generator) ** (1 / 3)).to(
        poses.device
    )
    for pose, first in zip(poses, start.tolist(), strict=True):
        oldest = min(1, first - n_past - 1)
        old, new = pose[oldest : first - n_past], pose[first : first + n_new]
        asks = new[[n_new - 1 - offset for offset in query_offsets(n_new, memory)]]
        around = (ball + relative(new[-1], asks)[:, :3, 3:].float()).transpose(0, 1).flatten(1)
        seen = inside(around, relative(torch.cat([new, old]), new[-1]).float(), math.inf)
        common = (
            (seen[n_new:] & seen[:n_new].any(0)).view(len(old), memory, points).float().mean(-1).T
        )
        index = torch.arange(oldest, oldest + len(old), device=pose.device).expand(memory, -1)
        # the newer one breaks ties
        chosen.append(
            pick(
                common + index / index.amax().clamp(min=1) * 0.5 / points,
                index,
                oldest if sink else None,
                repeat=10.0,
            )
        )
    return torch.stack(chosen)


def frustum_key(c2w: Tensor) -> Tensor:  # (n, 4, 4) -> (n, 6)
    """Frusta overlap when their centroids, ¾ far ahead, are close and they look the same way (4 m per unit: measured)."""
    forward = c2w[:, :3, 2]
    return torch.cat([c2w[:, :3, 3] + 0.75 * FAR * forward, 4.0 * forward], -1).float()


class MemoryBank:
    """Every latent a session has made, with its cameras and time; asked once per segment for the five to remember.
    Storage doubles when full, so appending costs O(1). After `free` latents a gate lets in only views that nothing
    stored overlaps by `gate`, and every eighth: an hour of play then grows with the area explored."""

    def __init__(self, rule: str = "uniform", gate: float = 0.85, free: int = 4096) -> None:
        self.rule, self.gate, self.free = choose("rule", rule, RULES), gate, free
        self.size, self.store = (
            0,
            {},
        )  # name -> preallocated tensor, of which the first `size` rows are in use

    def __len__(self) -> int:
        return self.size

    def append(self, latents: Tensor, cameras: Tensor, times: Tensor) -> None:
        """(C, n, h, w), c2w (n, 4, 4, 4) of each latent's four frames, (n,) absolute indices that grow."""
        expect("latents", latents, (len(latents), len(times), *latents.shape[-2:]))
        expect("cameras", cameras, (len(times), 4, 4, 4))
        check_rigid("cameras", cameras)
        order = (
            self.store.get("times", times)[max(0, self.size - 1) : self.size].tolist()
            + times.tolist()
        )
        if order != sorted(set(order)):
            raise ValueError(
                f"times must grow from latent to latent, got {order} (the bank's last one first)"
            )
        keys = frustum_key((cameras := cameras.to(latents.device))[:, -1])
        rows = {
            "latents": latents.transpose(0, 1),
            "cameras": cameras,
            "times": times.cpu(),
            "keys": torch.cat([keys, keys.square().sum(-1, keepdim=True)], -1),
        }
        for i, time in enumerate(times.tolist()):
            if (
                self.size >= self.free
                and time % 8
                and self.score(cameras[i, -1:], 0, self.size)[0].max() >= self.gate
            ):
                continue
            for name, x in rows.items():
                if self.size == len(self.store.get(name, ())):
                    bigger = x.new_zeros(max(BLOCK, 2 * self.size), *x.shape[1:])
                    bigger[: self.size] = self.store.get(name, bigger[:0])
                    self.store[name] = bigger
                self.store[name][self.size] = x[i]
            self.size += 1

    def nearest(
        self, query: Tensor, first: int, stop: int
    ) -> Tensor:  # (Q, 4, 4) -> (Q, SURVIVORS) slots
        """The slots whose frusta lie closest: exact top-k by frustum_key, one matrix product over the whole bank."""
        key, width = frustum_key(query), -(-stop // GROUP)
        # |k_q − k_c|² = |k_q|² − 2 k_q·k_c + |k_c|²;  the first term is the same for every candidate
        ask = torch.cat([-2 * key, torch.ones_like(key[:, :1])], -1)
        distance = ask @ self.store["keys"][: width * GROUP].T
        distance[:, :first], distance[:, stop:] = torch.inf, torch.inf
        # the k smallest of all lie in the k groups with the smallest minima
        distance = distance.view(len(key), GROUP, width)
        groups = distance.amin(1).topk(min(SURVIVORS, width), largest=False).indices[:, None]
        few = distance.gather(2, groups.expand(-1, GROUP, -1)).flatten(1)
        slots = groups + width * torch.arange(GROUP, device=key.device)[:, None]
        return slots.flatten(1).gather(1, few.topk(SURVIVORS, largest=False).indices)

    def score(
        self, query: Tensor, first: int, stop: int
    ) -> tuple[Tensor, Tensor]:  # (Q, S) overlap and slots
        if self.rule == "released" or stop - first <= BRUTE_FORCE:
            slots = torch.arange(first, stop, device=query.device).expand(len(query), -1)
        else:  # 64 points each choose those that get all of them
            slots = self.nearest(query, first, stop)
            slots = slots.gather(
                1,
                overlap(query, self.store["cameras"][slots, -1], points=64).topk(FINALISTS).indices,
            )
        if self.rule == "released":  # every frame is a candidate, not one per latent
            return overlap(
                query, self.store["cameras"][first:stop].flatten(0, 1), self.rule
            ).unflatten(1, (-1, Window.stride)).amax(-1), slots
        return overlap(query, self.store["cameras"][slots, -1], self.rule), slots

    def retrieve(
        self,
        query: Tensor,
        before: int | None = None,
        policy: str = "camera",
        sink: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cameras of the frames that ask (Q, 4, 4), see Window.queries -> (Q,) slots for read() and (Q,) their overlaps.
        Only latents before `before`, the segment's first, may answer; policies other than "camera" are ablations;
        sink: the last answer to "camera" is always the oldest, latent 1."""
        expect("query", query, (len(query), 4, 4))
        check_rigid("query", query)
        if choose("policy", policy, POLICIES) == "none":
            return torch.zeros(0, dtype=torch.long), torch.zeros(0)
        times = self.store.get("times", torch.zeros(0, dtype=torch.long))[: self.size]
        stop = self.size if before is None else int(torch.searchsorted(times, before))
        if stop == 0:
            raise ValueError(
                f"nothing to remember: the bank holds {self.size} latents, none before {before}; append first"
            )
        first = min(
            int(torch.searchsorted(times, 1)), stop - 1
        )  # latent 0, one frame, only if alone
        Q, query = len(query), query.to(self.store["cameras"])
        if policy == "recent":
            slots = (stop - 1 - torch.arange(Q)).clamp(min=first)
        elif policy == "random":
            slots = first + torch.randperm(stop - first, generator=generator).repeat(Q)[:Q]
        else:
            scores, index = self.score(query, first, stop)
            slots = pick(
                scores,
                index,
                first if sink else None,
                repeat=0.0 if self.rule == "released" else 10.0,
            )
        slots = slots.to(query.device)
        return slots, overlap(query, self.store["cameras"][slots, -1:], self.rule)[:, 0]

    def read(self, slots: Tensor) -> Memory:  # (M,) -> a batch of one
        latents, times = (
            self.store["latents"][slots],
            self.store["times"][slots.cpu()].to(slots.device),
        )
        return Memory(
            latents.transpose(0, 1)[None], times[None], self.store["cameras"][slots][None]
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {name: x[: self.size].clone() for name, x in self.store.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.size = len(state.get("times", ()))
        self.store = {
            name: torch.cat([x, x.new_zeros(-self.size % BLOCK, *x.shape[1:])])
            for name, x in state.items()
        }


if __name__ == "__main__":
    # walk straight on, turn round on the spot, walk home, turn round again: what is remembered at each stage?
    keyboard, mouse = torch.zeros(560, 6), torch.zeros(560, 2)
    keyboard[:160, 0] = keyboard[280:440, 0] = 1
    mouse[160:280, 1] = mouse[440:, 1] = 0.1
    pose = integrate((0, -1.6, 0, 0, 0), keyboard, mouse)
    print(
        f"19.8 m out, 180°, back, 180°: {(pose[-1, :3] - pose[0, :3]).norm():.0e} m from the start"
    )
    cameras, bank = segment_cameras(pose_to_c2w(pose)[None], 0, 141)[0], MemoryBank()
    bank.append(torch.randn(16, 141, 8, 8), cameras, torch.arange(141))
    for stage, new in (
        ("walking out", 26),
        ("turning away", 50),
        ("walking home", 80),
        ("turned back", 131),
    ):
        asks = [new + 9 - offset for offset in query_offsets(10, 5)]
        for policy in ("camera", "recent"):
            slots, scores = bank.retrieve(cameras[asks, -1], before=new - 4, policy=policy)
            found = "  ".join(
                f"{slot} ({score:.2f})" for slot, score in zip(slots.tolist(), scores, strict=True)
            )
            print(
                f"{stage:13s}latents {new}-{new + 9} ask, {policy} answers latent (overlap): {found}"
            )
