"""What geometry knows: masks, warps, registration, exact overlap."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import camera
import memory
from context import Window
from lab import metrics


class Found(NamedTuple):
    pose: Tensor  # (5,) float64, as in camera.integrate; height and pitch as given
    score: float  # ZNCC of the picture with the view from there
    ambiguous: bool  # another place explains it as well: plain walls look alike


def register(
    look: Callable[
        [Tensor, int, int], Tensor
    ],  # poses (n, 5), size, rays per pixel and axis -> true frames
    free: Callable[[Tensor], Tensor],  # (n, 2) x, z -> (n,) not inside a wall
    frame: Tensor,  # (H, H, 3)
    pose: Tensor,  # (5,) float64 where to search
) -> Found:
    """Coarse grid at 16x16, five starts, Levenberg-Marquardt over blurs 2, 1, 0 in x, z, yaw."""
    size, scale = (
        len(frame),
        torch.tensor([1.0, 1.0, math.degrees(0.5)]),
    )  # half a radian counts as a metre
    whole = lambda p: torch.stack(
        [p[:, 0], 0 * p[:, 0] + pose[1], p[:, 1], 0 * p[:, 0] + pose[3], p[:, 2]], 1
    )
    views = lambda p, blur, samples, side=size: metrics.unit(look(whole(p), side, samples), blur)
    steps = torch.linspace(-0.36, 0.36, 5, dtype=torch.float64)
    grid = torch.cartesian_prod(steps, steps, torch.linspace(-18, 18, 13, dtype=torch.float64))
    grid = pose[[0, 2, 4]] + grid[grid[:, :2].norm(dim=1) <= 0.37]
    grid, small = (
        grid[free(grid[:, :2])],
        F.avg_pool2d(metrics.planes(frame[None]), size // 16).permute(0, 2, 3, 1),
    )
    starts: list[Tensor] = []
    for at in grid[(views(grid, 0, 1, 16) @ metrics.unit(small)[0]).argsort(descending=True)]:
        if len(starts) < 5 and all(float(((at - s) / scale).norm()) >= 0.15 for s in starts):
            starts.append(at)
    p, h = torch.stack(starts), torch.tensor([0.03, 0.03, 1.0], dtype=torch.float64)
    for blur in (2.0, 1.0, 0.0):
        target, fine = metrics.unit(frame[None], blur)[0], 1 if blur else 2
        damping, cost = (
            torch.full((len(p),), 1e-2).double(),
            (views(p, blur, fine) - target).square().sum(1),
        )
        for _ in range(6 if blur else 12):
            around = (p[:, None] + torch.cat([h[None] * 0, h.diag(), -h.diag()])).flatten(0, 1)
            seen = views(around, blur, fine).view(len(p), 7, -1).double()
            J, e = (seen[:, 1:4] - seen[:, 4:]) / 2, seen[:, 0] - target  # per step h
            A = J @ J.mT + 1e-9 * torch.eye(3).double()
            # (JᵀJ + λ diag JᵀJ) Δ = −Jᵀe
            damped = A + damping[:, None, None] * torch.diag_embed(A.diagonal(dim1=1, dim2=2))
            move = -h * torch.linalg.solve(damped, J @ e[..., None])[..., 0]
            move *= (0.2 / (move / scale).norm(dim=1, keepdim=True).clamp(min=1e-9)).clamp(max=1)
            new = (views(p + move, blur, fine) - target).square().sum(1)
            better = (new < cost) & free((p + move)[:, :2])
            p, cost = torch.where(better[:, None], p + move, p), torch.where(better, new, cost)
            damping = torch.where(better, damping / 3, damping * 5).clamp(1e-4, 1e4)
        p = p[cost.argsort()[: 5 if blur > 1 else 2]]
    score = views(p, 1.0, 2) @ metrics.unit(frame[None], 1.0)[0]
    best = int(score.argmax())
    far = ((p - p[best])[:, :2].norm(dim=1) > 0.1) | ((p[:, 2] - p[best, 2]).abs() > 2)
    return Found(
        whole(p)[best], float(score[best]), bool((far & (score > score[best] - 0.005)).any())
    )


# The rival of every model with a memory needs no network: old frames, seen again from here by true depth.


def lookup(
    depth: Tensor,  # (T, H, W) true z-depth of the targets, metres
    c2w: Tensor,  # (T, 4, 4) float64
    bank_depth: Tensor,  # (N, H, W)
    bank_c2w: Tensor,  # (N, 4, 4)
) -> tuple[
    Tensor, Tensor, Tensor
]:  # (T, N, H·W) x, y in pixels of each old frame, and whether it saw that
    """Where the old frames show the points that the targets see. Seen: inside the image and no deeper than 1.02
    times the depth there. The sky, at a depth of 1000 m, is a surface too."""
    depth, c2w, bank_depth, bank_c2w = map(torch.as_tensor, (depth, c2w, bank_depth, bank_c2w))
    (T, H, W), N = depth.shape, len(bank_depth)
    fx, fy, cx, cy = camera.intrinsics(H, W).tolist()
    g = camera.relative(bank_c2w[None], c2w[:, None]).float()  # (T, N, 4, 4)
    v, u = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    z = depth.flatten(1)[:, None]
    points = torch.stack(
        [(u.flatten() - cx) / fx * z, (v.flatten() - cy) / fy * z, z], 2
    )  # (T, 1, 3, H·W)
    x, y, z = (g[..., :3, :3] @ points + g[..., :3, 3:]).unbind(2)
    x, y = fx * x / z + cx, fy * y / z + cy
    inside = (z > 1e-3) & (x >= 0) & (x < W) & (y >= 0) & (y < H)
    cell = torch.where(inside, y.floor() * W + x.floor(), 0).long()
    there = bank_depth.flatten(1).expand(T, N, -1).gather(2, cell)
    return x, y, inside & (z <= 1.02 * there)


def visible(
    depth: Tensor, c2w: Tensor, bank_depth: Tensor, bank_c2w: Tensor
) -> Tensor:  # (T, N, H, W) bool
    return lookup(depth, c2w, bank_depth, bank_c2w)[2].unflatten(2, depth.shape[1:])


def masks(
    depth: Sequence, c2w: Sequence, at: Sequence[int], known: int
) -> dict[str, Sequence]:  # NumPy arrays; each mask (T, H, W) bool
    """Of frames `at`: what the bank, a frame per latent of the first `known`, has seen or not, and what only it has, not the last window."""
    bank = torch.arange(0, known, Window.stride).numpy()
    seen = visible(depth[at], c2w[at], depth[bank], c2w[bank]).numpy()
    old = bank < known - Window.stride * (Window.past + Window.new)
    return {
        "seen": seen.any(1),
        "unseen": ~seen.any(1),
        "bank-only": seen[:, old].any(1) & ~seen[:, ~old].any(1),
    }


def warp(depth: Tensor, c2w: Tensor, bank: Tensor, bank_depth: Tensor, bank_c2w: Tensor) -> Tensor:
    """The best use of old frames (N, H, W, 3): each target pixel shows its point as the nearest frame that saw it did;
    what none saw is that pixel of the nearest frame. (T, H, W, 3)"""
    (T, H, W), N = depth.shape, len(bank)
    x, y, seen = lookup(depth, c2w, bank_depth, bank_c2w)
    near = memory.overlap(torch.as_tensor(c2w), torch.as_tensor(bank_c2w))  # (T, N)
    best = torch.where(seen, near[..., None], -1.0).argmax(1, keepdim=True)  # (T, 1, H·W)
    at = 2 * x.gather(1, best) / W - 1, 2 * y.gather(1, best) / H - 1, (2 * best + 1) / N - 1
    colour = F.grid_sample(
        bank.permute(3, 0, 1, 2)[None],
        torch.stack(at, -1).view(1, T, H, W, 3),
        padding_mode="border",
        align_corners=False,
    )[0].permute(1, 2, 3, 0)
    return torch.where(seen.any(1).view(T, H, W, 1), colour, bank[near.argmax(1)])


def coverage(
    seen: Tensor, chosen: Sequence[int]
) -> float:  # (N, H, W): share of what any frame could show
    return float(seen[list(chosen)].any(0).sum() / seen.any(0).sum().clamp(min=1))


def greedy(seen: Tensor, k: int) -> list[int]:  # the oracle: always the largest new area
    left, chosen = seen.flatten(1).clone(), []
    for _ in range(k):
        chosen.append(int(left.sum(1).argmax()))
        left &= ~left[chosen[-1]]
    return chosen


# The oracle of memory.overlap: how much of a new view an old one has seen, by volume instead of by points.


def frustum_planes(g: Tensor) -> tuple[Tensor, Tensor]:  # (n, 4, 4) -> (n, 12, 3), (n, 12)
    """The six planes n·x + b ≥ 0 of a view, and the six of another one that g moves into it."""
    r = math.sqrt(0.5)
    left_right = [[r, 0, r], [-r, 0, r]]
    top_bottom = [[0, r, r], [0, -r, r]]
    near_far = [[0, 0, 1], [0, 0, -1]]
    normal = g.new_tensor(left_right + top_bottom + near_far)
    offset = g.new_tensor([0, 0, 0, 0, -memory.NEAR, memory.FAR]).expand(len(g), 6)
    # the moved frustum grows by 10 µm, so that no two planes coincide
    moved = normal @ g[:, :3, :3].mT
    moved_offset = offset + 1e-5 - (moved @ g[:, :3, 3:]).squeeze(-1)
    planes = torch.cat([normal.expand(len(g), 6, 3), moved], 1)
    return planes, torch.cat([offset, moved_offset], 1)


def frustum_intersection(g: Tensor) -> Tensor:  # (n, 4, 4) float64, one view seen by the other
    """|V_q ∩ V_c| / |V_q| exactly, with fixed shapes and no branches. Every edge of the intersection
    lies where two of the 12 planes meet and is cut by the other ten; the divergence theorem turns
    edges into volume: V = ⅙ Σ_{j<k} length_jk (2 b_j b_k − cos_jk (b_j² + b_k²)) / sin_jk."""
    planes, b = frustum_planes(g)
    j, k = torch.triu_indices(12, 12, 1, device=g.device)  # 66 pairs of planes
    bj = b[:, j, None]
    bk = b[:, k, None]

    # the line of each pair: q + t u/|u|,   q = (b_j u × n_k + b_k n_j × u) / |u|²
    u = torch.linalg.cross(planes[:, j], planes[:, k])
    square = u.square().sum(-1, keepdim=True).clamp(min=1e-14)
    q = bj * torch.linalg.cross(u, planes[:, k]) + bk * torch.linalg.cross(planes[:, j], u)
    q = q / square
    slope = (u / square.sqrt()) @ planes.mT  # (n, 66, 12): how fast the line nears each plane
    height = q @ planes.mT + b[:, None]

    # what the other ten planes leave of it; a line that runs beside a plane is not cut by it
    own = (F.one_hot(j, 12) + F.one_hot(k, 12)).bool()
    flat = (slope.abs() < 1e-9) | own
    cut = -height / torch.where(flat, 1.0, slope)
    low = torch.where(flat | (slope < 0), -torch.inf, cut).amax(-1)
    high = torch.where(flat | (slope > 0), torch.inf, cut).amin(-1)
    outside = (flat & ~own & (height < 0)).any(-1)
    parallel = square.squeeze(-1) <= 1e-14
    length = torch.where(outside | parallel, 0.0, (high - low).clamp(min=0))

    cosine = (planes[:, j] * planes[:, k]).sum(-1, keepdim=True)
    weight = (2 * bj * bk - cosine * (bj.square() + bk.square())) / square.sqrt()
    whole = 4 / 3 * (memory.FAR**3 - memory.NEAR**3)
    return (length * weight.squeeze(-1)).sum(-1) / 6 / whole


def exact_overlap(query: Tensor, candidates: Tensor) -> Tensor:
    """(Q, 4, 4), (N, 4, 4) -> (Q, N) float32: the share of each new view that each old one has seen."""
    g = camera.relative(candidates.double(), query.double()[:, None])
    shares = [frustum_intersection(piece).float() for piece in g.flatten(0, 1).split(256)]
    return torch.cat(shares).view(g.shape[:2])
