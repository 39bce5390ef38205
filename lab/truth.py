"""What geometry knows of a world: what old frames saw, how they look from here, exact overlap.

Every model with a memory has a rival that needs no network: old frames, seen again from here by true
depth. A point of the target was seen by an old frame if it lies inside that image and no deeper than
1.02 times the depth there. The sky, at a depth of 1000 m, is a surface too.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

import camera
import memory
from context import Window

Array = ndarray | Tensor


def rays(H: int, W: int) -> Tensor:  # (3, H·W): through every pixel, at depth 1
    fx, fy, cx, cy = camera.intrinsics(H, W).tolist()
    rows = torch.arange(H) + 0.5
    columns = torch.arange(W) + 0.5
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    x = (u.flatten() - cx) / fx
    y = (v.flatten() - cy) / fy
    return torch.stack([x, y, torch.ones_like(x)])


def lookup(
    depth: Array,  # (T, H, W) true z-depth of the targets, metres
    c2w: Array,  # (T, 4, 4) float64
    bank_depth: Array,  # (N, H, W)
    bank_c2w: Array,  # (N, 4, 4)
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the old frames show the points that the targets see, (T, N, H·W) x and y in pixels of
    each old frame; and whether it saw them."""
    depth = torch.as_tensor(depth)
    bank_depth = torch.as_tensor(bank_depth)
    T, H, W = depth.shape
    fx, fy, cx, cy = camera.intrinsics(H, W).tolist()

    # every point of the targets, moved into every old camera
    here = torch.as_tensor(c2w)[:, None]
    g = camera.relative(torch.as_tensor(bank_c2w)[None], here).float()  # (T, N, 4, 4)
    points = rays(H, W) * depth.flatten(1)[:, None, None]  # (T, 1, 3, H·W)
    moved = g[..., :3, :3] @ points + g[..., :3, 3:]
    x, y, z = moved.unbind(2)
    x = fx * x / z + cx
    y = fy * y / z + cy

    # inside the image, and nothing in front of it there
    across = (x >= 0) & (x < W)
    down = (y >= 0) & (y < H)
    inside = across & down & (z > 1e-3)
    cell = y.floor() * W + x.floor()
    cell = torch.where(inside, cell, 0).long()
    flat = bank_depth.flatten(1).expand(T, -1, -1)
    there = flat.gather(2, cell)
    return x, y, inside & (z <= 1.02 * there)


def visible(
    depth: Array,
    c2w: Array,
    bank_depth: Array,
    bank_c2w: Array,
) -> Tensor:  # (T, N, H, W) bool
    """Which pixels of each target has each old frame seen?"""
    seen = lookup(depth, c2w, bank_depth, bank_c2w)[2]
    return seen.unflatten(2, depth.shape[1:])


def masks(
    depth: ndarray,  # (F, H, W) of a whole walk
    c2w: ndarray,  # (F, 4, 4)
    at: Sequence[int],  # T frames
    known: int,  # frames that the bank has, one for each latent
) -> dict[str, ndarray]:  # (T, H, W) bool
    """What the bank has seen or not, and what only it has and not the last window."""
    bank = torch.arange(0, known, Window.stride).numpy()
    seen = visible(depth[at], c2w[at], depth[bank], c2w[bank]).numpy()
    window = Window.stride * (Window.past + Window.new)
    old = bank < known - window
    before = seen[:, old].any(1)
    lately = seen[:, ~old].any(1)
    ever = before | lately
    return {"seen": ever, "unseen": ~ever, "bank-only": before & ~lately}


def warp(
    depth: Array,  # (T, H, W)
    c2w: Array,  # (T, 4, 4)
    bank: Tensor,  # (N, H, W, 3)
    bank_depth: Array,
    bank_c2w: Array,
) -> Tensor:  # (T, H, W, 3)
    """The best use of old frames: each target pixel shows its point as the nearest frame that saw it
    did; what none saw is that pixel of the nearest frame."""
    T, H, W = depth.shape
    N = len(bank)
    x, y, seen = lookup(depth, c2w, bank_depth, bank_c2w)
    near = memory.overlap(torch.as_tensor(c2w), torch.as_tensor(bank_c2w))  # (T, N)
    nearness = torch.where(seen, near[..., None], -1.0)  # (T, N, H·W)
    best = nearness.argmax(1, keepdim=True)

    # one look-up in the bank as a volume: pixels from -1 to 1, and the frame as its depth
    across = 2 * x.gather(1, best) / W - 1
    down = 2 * y.gather(1, best) / H - 1
    frame = (2 * best + 1) / N - 1
    volume = bank.permute(3, 0, 1, 2)[None]
    places = torch.stack([across, down, frame], -1)
    places = places.view(1, T, H, W, 3)
    colour = F.grid_sample(volume, places, padding_mode="border", align_corners=False)
    colour = colour[0].permute(1, 2, 3, 0)
    known = seen.any(1).view(T, H, W, 1)
    return torch.where(known, colour, bank[near.argmax(1)])


# ---- how much five frames show ------------------------------------------------------------


def coverage(
    seen: Tensor,  # (N, H, W) bool
    chosen: Sequence[int],
) -> float:
    """Share of what any frame could show."""
    shown = seen[list(chosen)].any(0).sum()
    most = seen.any(0).sum().clamp(min=1)
    return float(shown / most)


def greedy(seen: Tensor, k: int) -> list[int]:
    """The oracle: always the largest new area."""
    left = seen.flatten(1).clone()
    chosen = []
    for _ in range(k):
        chosen.append(int(left.sum(1).argmax()))
        left &= ~left[chosen[-1]]
    return chosen


# ---- exact overlap ------------------------------------------------------------------------


def frustum_planes(g: Tensor) -> tuple[Tensor, Tensor]:  # (n, 4, 4) -> (n, 12, 3), (n, 12)
    """The six planes n·x + b ≥ 0 of a view, and the six of another one that g moves into it."""
    r = math.sqrt(0.5)
    right = [r, 0, r]
    left = [-r, 0, r]
    below = [0, r, r]
    above = [0, -r, r]
    ahead = [0, 0, 1]
    back = [0, 0, -1]
    normal = g.new_tensor([right, left, below, above, ahead, back])
    normal = normal.expand(len(g), 6, 3)
    offset = g.new_tensor([0, 0, 0, 0, -memory.NEAR, memory.FAR])
    offset = offset.expand(len(g), 6)
    # the moved frustum grows by 10 µm, so that no two planes coincide
    R, t = g[:, :3].split([3, 1], dim=2)
    moved = normal @ R.mT
    moved_offset = offset + 1e-5 - (moved @ t).squeeze(-1)
    planes = torch.cat([normal, moved], 1)
    return planes, torch.cat([offset, moved_offset], 1)


def frustum_intersection(g: Tensor) -> Tensor:  # (n, 4, 4) float64, one view seen by the other
    """|V_q ∩ V_c| / |V_q| exactly, with fixed shapes and no branches. Every edge of the intersection
    lies where two of the 12 planes meet and is cut by the other ten; the divergence theorem turns
    edges into volume: V = ⅙ Σ_{j<k} length_jk (2 b_j b_k − cos_jk (b_j² + b_k²)) / sin_jk."""
    planes, b = frustum_planes(g)
    j, k = torch.triu_indices(12, 12, 1, device=g.device)  # 66 pairs of planes
    first = planes[:, j]
    second = planes[:, k]
    bj = b[:, j, None]
    bk = b[:, k, None]

    # the line of each pair: q + t u/|u|,   q = (b_j u × n_k + b_k n_j × u) / |u|²
    u = torch.linalg.cross(first, second)
    square = u.square().sum(-1, keepdim=True)
    square = square.clamp(min=1e-14)
    length_u = square.sqrt()
    q = bj * torch.linalg.cross(u, second)
    q = q + bk * torch.linalg.cross(first, u)
    q = q / square
    slope = (u / length_u) @ planes.mT  # (n, 66, 12): how fast the line nears each plane
    height = q @ planes.mT + b[:, None]

    # what the other ten planes leave of it; a line that runs beside a plane is not cut by it
    own = F.one_hot(j, 12) + F.one_hot(k, 12) > 0
    flat = (slope.abs() < 1e-9) | own
    cut = -height / torch.where(flat, 1.0, slope)
    enters = torch.where(flat | (slope < 0), -torch.inf, cut)
    leaves = torch.where(flat | (slope > 0), torch.inf, cut)
    inside = leaves.amin(-1) - enters.amax(-1)
    inside = inside.clamp(min=0)
    outside = (flat & ~own & (height < 0)).any(-1)
    parallel = square.squeeze(-1) <= 1e-14
    length = torch.where(outside | parallel, 0.0, inside)

    cosine = (first * second).sum(-1, keepdim=True)
    squares = bj.square() + bk.square()
    weight = (2 * bj * bk - cosine * squares) / length_u
    whole = 4 / 3 * (memory.FAR**3 - memory.NEAR**3)
    pieces = length * weight.squeeze(-1)
    return pieces.sum(-1) / 6 / whole


def exact_overlap(query: Tensor, candidates: Tensor) -> Tensor:
    """(Q, 4, 4), (N, 4, 4) -> (Q, N) float32: the share of each new view that each old one has seen."""
    g = camera.relative(candidates.double(), query.double()[:, None])
    pieces = g.flatten(0, 1).split(256)
    shares = [frustum_intersection(piece).float() for piece in pieces]
    return torch.cat(shares).view(g.shape[:2])
