"""Where in a known world was a picture taken, to a hundredth of a metre and a quarter of a degree.

A pose has three unknowns here, x, z and yaw; height and pitch are as given. The score of a pose is
the ZNCC of the picture with the true view from there. A coarse grid of small views finds five
places to start from. From each, Levenberg-Marquardt walks uphill, first on blurred pictures, which
have few summits, then on sharp ones, whose summits are narrow:

    (JᵀJ + λ diag JᵀJ) Δ = −Jᵀe        e: the view minus the picture, J: how the view changes with the pose
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lab import metrics

Look = Callable[[Tensor, int, int], Tensor]  # poses (n, 5), size, rays per pixel and axis -> frames
Free = Callable[[Tensor], Tensor]  # (n, 2) x, z -> (n,) not inside a wall

FREE = [0, 2, 4]  # of a pose: x, z, yaw
STEP = torch.tensor([0.03, 0.03, 1.0], dtype=torch.float64)  # of the derivatives: m, m, degrees
SCALE = torch.tensor([1.0, 1.0, math.degrees(0.5)])  # half a radian counts as a metre
REACH = 0.37  # metres around the given pose; and 18 degrees to either side
APART = 0.15  # of two starts
LONGEST = 0.2  # of one step, in metres
BLURS = {2.0: 6, 1.0: 6, 0.0: 12}  # pixels -> steps


class Found(NamedTuple):
    pose: Tensor  # (5,) float64, as in camera.integrate; height and pitch as given
    score: float  # ZNCC of the picture with the view from there
    ambiguous: bool  # another place explains it as well: plain walls look alike


class Search(NamedTuple):
    """What is looked for, and where."""

    look: Look
    free: Free
    frame: Tensor  # (H, H, 3)
    pose: Tensor  # (5,) float64

    def full_pose(self, p: Tensor) -> Tensor:  # (n, 3) x, z, yaw -> (n, 5)
        poses = self.pose.repeat(len(p), 1)
        poses[:, FREE] = p
        return poses

    def views(self, p: Tensor, blur: float) -> Tensor:
        """Unit vectors of the true views from (n, 3), as fine as the blur leaves visible."""
        rays = 1 if blur else 2
        frames = self.look(self.full_pose(p), len(self.frame), rays)
        return metrics.unit(frames, blur)

    def target(self, blur: float) -> Tensor:
        return metrics.unit(self.frame[None], blur)[0]


def grid(search: Search) -> Tensor:  # (n, 3) free places around the given pose
    steps = torch.linspace(-0.36, 0.36, 5, dtype=torch.float64)
    turns = torch.linspace(-18, 18, 13, dtype=torch.float64)
    places = torch.cartesian_prod(steps, steps, turns)
    near = places[:, :2].norm(dim=1) <= REACH
    places = search.pose[FREE] + places[near]
    return places[search.free(places[:, :2])]


def starts(search: Search) -> Tensor:  # (up to 5, 3)
    """The best places of the grid, as 16x16 pictures, no two of them close together."""
    places = grid(search)
    whole = metrics.planes(search.frame[None])
    small = F.avg_pool2d(whole, len(search.frame) // 16)
    wanted = metrics.unit(small.permute(0, 2, 3, 1))[0]
    frames = search.look(search.full_pose(places), 16, 1)
    scores = metrics.unit(frames) @ wanted

    chosen: list[Tensor] = []
    for place in places[scores.argsort(descending=True)]:
        alone = all(distance(place - other) >= APART for other in chosen)
        if len(chosen) < 5 and alone:
            chosen.append(place)
    return torch.stack(chosen)


def distance(move: Tensor) -> Tensor:  # (..., 3) -> (...), in metres
    return (move / SCALE).norm(dim=-1)


def step_of(
    search: Search,
    p: Tensor,  # (n, 3)
    damping: Tensor,  # (n,) λ
    blur: float,
) -> Tensor:  # (n, 3) Δ, none longer than LONGEST
    """One step of Levenberg-Marquardt from every place."""
    # how the view changes with the pose, by the views a little to both sides
    here = torch.zeros(1, 3)
    ahead = STEP.diag()
    around = torch.cat([here, ahead, -ahead])
    poses = p[:, None] + around  # (n, 7, 3)
    seen = search.views(poses.flatten(0, 1), blur).double()
    seen = seen.view(len(p), 7, -1)
    view, forward, backward = seen.split([1, 3, 3], dim=1)
    e = view - search.target(blur)  # (n, 1, pixels)
    J = (forward - backward) / 2  # (n, 3, pixels), per STEP

    A = J @ J.mT + 1e-9 * torch.eye(3).double()
    diagonal = A.diagonal(dim1=1, dim2=2)
    damped = A + torch.diag_embed(damping[:, None] * diagonal)
    solved = torch.linalg.solve(damped, J @ e.mT)
    move = -STEP * solved.squeeze(-1)
    shorter = LONGEST / distance(move).clamp(min=1e-9)
    return move * shorter.clamp(max=1)[:, None]


def climb(search: Search, p: Tensor, blur: float) -> Tensor:
    """From every place uphill on pictures of this blur; the best few, best first."""

    def cost_of(places: Tensor) -> Tensor:
        wrong = search.views(places, blur) - search.target(blur)
        return wrong.square().sum(1)

    cost = cost_of(p)
    damping = torch.full_like(cost, 1e-2).double()
    for _ in range(BLURS[blur]):
        moved = p + step_of(search, p, damping, blur)
        new = cost_of(moved)
        better = (new < cost) & search.free(moved[:, :2])
        p = torch.where(better[:, None], moved, p)
        cost = torch.where(better, new, cost)
        damping = torch.where(better, damping / 3, damping * 5)
        damping = damping.clamp(1e-4, 1e4)
    kept = 5 if blur > 1 else 2
    return p[cost.argsort()[:kept]]


def register(look: Look, free: Free, frame: Tensor, pose: Tensor) -> Found:
    """The pose near a given one from which the picture is best explained."""
    search = Search(look, free, frame, pose)
    p = starts(search)
    for blur in BLURS:
        p = climb(search, p, blur)

    # two summits that are far apart and equally high: nobody can say which it was
    frames = look(search.full_pose(p), len(frame), 2)
    score = metrics.unit(frames, 1.0) @ search.target(1.0)
    best = int(score.argmax())
    away = p - p[best]
    elsewhere = away[:, :2].norm(dim=1) > 0.1
    turned = away[:, 2].abs() > 2
    as_good = score > score[best] - 0.005
    rivals = (elsewhere | turned) & as_good
    pose = search.full_pose(p)[best]
    return Found(pose, float(score[best]), bool(rivals.any()))
