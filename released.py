"""What the released weights were trained with, where ours are not.

What it does. Our models have clean geometry. The published 5B weights have the geometry of the code
that they were trained with, to the last quirk, and see nonsense if they are told anything else. So
each convention of the release that reaches its network is computed here, in its own order of
arithmetic, and compared with golden tensors. context.py and memory.py come here when weights say
encoding "released".
Paper: §3.1-3.2.  Released: the inference code of Matrix-Game 3.0.

    what                  ours                                 released
    axes                  right-handed, y down                 left-handed, z up, det R = −1
    a step goes along     the mean of both headings            the mean of both WRAPPED yaws
    actions of latent L   4L − 12 .. 4L − 1                    4L − 11 .. 4L, in segment 0 as ours
    what tells a camera   origin, direction, moment, azimuth   origin and direction
    relative to           the last past frame                  the latent before; memory: its query
    shifts                in units of 2 m                      scaled to length 1
    points of a view      uniform in volume                    even in depth: near ones count more

Why it matters. Yaw that passes from 179° to −179° has the mean 0°: that one step goes backwards,
and a full circle does not close. Rays without the moment are called Plücker all the same; they
change when the camera moves along its own line of sight. From segment 1 on, the windows of actions
slip by one, and what lies before the segment is not seen: its first action is repeated instead, and
as the very last is not known yet, the one before it. And many of the points of a view lie exactly
on the sides of a view that looks the same way: whether they count is a matter of rounding, so a
view overlaps itself by about .8.

Try it: python released.py      Tests: pytest tests/test_camera.py, test_context.py, test_memory.py
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import camera
from camera import DEAD_ZONE, DEGREES, FAR, NEAR, walked

STRIDE = 4  # frames of a latent
SEEN = 12  # actions that a latent sees


# ---- cameras -------------------------------------------------------------------------------------


def to_released(c2w: Tensor) -> Tensor:
    """Our cameras -> the left-handed ones of the release, whose det R is −1.

    Their world has x forward, y right and z up. Our y (down) becomes their z WITHOUT a change of
    sign, so what looks up here looks down there, as the release does when its mouse says "up".
    The image-down column changes its sign, so that it still points down.
    """
    rows = [2, 0, 1, 3]
    return c2w[..., rows, :] * c2w.new_tensor([1, -1, 1, 1])


def from_released(extrinsics: Tensor) -> Tensor:
    """The inverse of to_released, exact: rows move back and a sign changes, nothing is computed."""
    rows = [1, 2, 0, 3]
    return extrinsics[..., rows, :] * extrinsics.new_tensor([1, -1, 1, 1])


def poses(keyboard: Tensor, mouse: Tensor) -> Tensor:
    """(F, 6), (F, 2) -> (F, 5) float32, in centimetres: where each frame is seen from.

    Angles are float32, and yaw is wrapped to ±180° before the mean is taken.
    """
    pose = torch.zeros(5)
    found = []
    turns = DEGREES * torch.where(mouse.abs() < DEAD_ZONE, 0.0, mouse.float())
    for keys, turn in zip(keyboard.tolist(), turns, strict=True):
        found.append(pose)
        angles = pose[3:] + turn
        angles[1] -= 360 * torch.round(angles[1] / 360)

        forward, right, diagonal = walked(keys)
        mean_yaw = (pose[4] + angles[1]) / 2
        heading = math.radians(float(mean_yaw))
        sin = math.sin(heading)
        cos = math.cos(heading)
        x = cos * forward - sin * right
        y = sin * forward + cos * right
        step = 8.73 if diagonal else 12.35
        move = step * torch.tensor([x, y, 0], dtype=torch.float64)
        here = pose[:3].double() + move
        pose = torch.cat([here.float(), angles])
    return torch.stack(found)


# ---- what the network is told --------------------------------------------------------------------


def windows(actions: Tensor) -> Tensor:  # (B, 57 | 56, A) -> (B, 15 | 14, 12, A)
    """Windows of 12, four apart, over the actions of one segment, one action per frame.

    Its first action is repeated in front: 12 times for segment 0 (4k + 1 frames), else 8 times.
    """
    frames = actions.shape[1]
    copies = SEEN if frames % STRIDE == 1 else SEEN - STRIDE
    before = actions[:, :1].expand(-1, copies, -1)
    padded = torch.cat([before, actions], 1)
    latents = (frames + 3) // STRIDE
    return padded.unfold(1, SEEN, STRIDE)[:, :latents].mT


def action_windows(actions: Tensor, first_latent: int | Tensor, n: int) -> Tensor:
    """(B, F, A) from frame 0 -> (B, n, 12, A): what the latents of one segment see.

    Every frame of the segment has its action, but the last, which repeats the one before.
    """
    B = len(actions)
    device = actions.device
    first = torch.as_tensor(first_latent, device=device).expand(B)
    begins = STRIDE * (first - 1) + 1  # the segment's first frame
    begins = begins.clamp(min=0)
    last = STRIDE * (first + n - 1)  # and its last
    count = int(last[0] - begins[0]) + 1
    frames = begins[:, None] + torch.arange(count, device=device)
    frames = torch.minimum(frames, last[:, None] - 1)
    rows = torch.arange(B, device=device)[:, None]
    return windows(actions[rows, frames])


def rays(
    cameras: Tensor,  # (B, M+T, 4, 4, 4): M memory latents first
    queries: Sequence[int],  # (M,) the latents, of all M+T, that those of the memory answer
    K: Tensor,  # (4,) pixels
    size: tuple[int, int, int],  # latent h, w and pixels per cell
) -> Tensor:  # (B, 6*stride², M+T, h, w) float32
    """Every latent relative to the one before, memory to its query. Exact but for shifts below .1 mm."""
    h, w, stride = size
    pose = to_released(cameras[:, :, -1].double())
    M = len(queries)
    last = cameras.shape[1] - 1

    # g = c2w_reference⁻¹ c2w; the reference of memory is its query, of others the latent before
    # (of the first one itself, so that its g is the identity)
    before = [M, *range(M, last)]
    g = camera.relative(pose[:, [*queries, *before]], pose)  # (B, M+T, 4, 4)

    # shifts lose their scale: each of memory has length 1, the longest of the segment too; shifts
    # below 0.1 mm are left alone, their direction would be noise
    length = g[..., :3, 3].norm(dim=-1)
    length[:, M:] = length[:, M:].amax(1, keepdim=True)
    g[..., :3, 3] /= torch.where(length > 1e-4, length, 1.0)[..., None]

    image = camera.rays(g.float(), K, h * stride, w * stride)
    return fold_cells(image, stride).transpose(1, 2)


def fold_cells(x: Tensor, stride: int) -> Tensor:
    """(B, T, c, h·s, w·s) -> (B, T, c·s², h, w), the pixels of a cell as channels.

    Their order is channel, row in the cell, column in the cell.
    """
    cells = x.unflatten(-1, (-1, stride)).unflatten(-3, (-1, stride))  # (..., c, h, s, w, s)
    return cells.movedim((-3, -1), (-4, -3)).flatten(2, 4)


# ---- how much of a new view an old one has seen --------------------------------------------------


@functools.cache
def points() -> Tensor:  # (3, 1000) of a view, in a camera's axes: even in depth, many on its sides
    side = torch.linspace(-1, 1, 10)
    depth = torch.linspace(NEAR, FAR, 10)
    z, y, x = torch.meshgrid(depth, side, side, indexing="ij")
    return torch.stack([x * z, y * z, z]).flatten(1)


def overlap(query: Tensor, candidates: Tensor) -> Tensor:  # (4, 4), (N, 4, 4) -> (N,)
    """The share of the query's points that each candidate sees: in float32, in the release's axes and
    in its order, because another way to the same formula gives other scores."""
    view = to_released(query).float()
    sample = points().to(view)
    world = view[:3, :3] @ sample + view[:3, 3:]  # (3, 1000)
    shares = []
    for piece in to_released(candidates).float().split(32):  # a piece stays in cache
        back = torch.linalg.inv(piece)
        R = back[:, :3, :3]
        shift = back[:, :3, 3:]
        moved = R @ world + shift
        x, y, z = moved.unbind(1)  # (32, 1000) each
        depth = z.clamp(min=1e-6)

        # pixels of a picture of 1280 x 720
        u = 640 * x / depth + 640
        v = 360 * y / depth + 360
        seen = z > NEAR
        seen &= z < FAR
        seen &= u >= 0
        seen &= u <= 1280
        seen &= v >= 0
        seen &= v <= 720
        shares.append(seen.float().mean(-1))
    return torch.cat(shares)


def main() -> None:
    """A circle that does not close, actions that slip by one, and a view that does not cover itself."""
    keyboard, mouse = camera.actions_from_keys(["w+l"] * 241)  # 240 times 1.5° is a full circle
    way = poses(keyboard, mouse)  # the last action moves nothing yet
    gap = (way[-1, :3] - way[0, :3]).norm()
    print(f"a full circle ends {gap:.1f} cm from its start")

    actions = torch.arange(200.0)[None, :, None]
    seen = action_windows(actions, 11, 14)[0, 4, :, 0]
    print(
        f"latent 15, the first new one of segment 1, sees actions {seen[0]:.0f} .. {seen[-1]:.0f}"
    )

    view = camera.pose_to_c2w(torch.tensor([[0.0, -1.6, 0, 0, 0]]).double())
    print(f"a view overlaps itself by {overlap(view[0], view).item():.2f}")


if __name__ == "__main__":
    main()
