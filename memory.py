"""Find the old frames that saw what we are about to see.

What it does. Five views of the next segment ask a bank of everything made so far, and one old
latent answers each. Training chooses from whole clips (select_training), play from its MemoryBank.
Paper: §3.2 (camera-aware memory).  Released: inference only.

Why it works. How much of what we are about to see has an old view seen?

    s(q, c) = |V_q ∩ V_c| / |V_q|                   V: the part of a view between NEAR and FAR

If a point p is uniform in V_q, s is the chance that it lies in V_c as well, and n points count it:

    s ≈ (1/n)·Σ_i [p_i in V_c]                      one matrix product, two comparisons        (1)

Uniform in a frustum: its slice at depth z is 2z wide and high, so the volume up to z grows as z³,
and the depth below which a share u of the volume lies is

    z = far·u^⅓                                     sideways, uniform in (−z, z)               (2)

How many points? Each term of (1) is 1 with chance s, else 0: a variance of s·(1 − s). The mean of
n independent ones is off by

    error = √(s·(1 − s)/n) ≤ 1/(2·√n)               3 % for 256 points                         (3)

but they need not be independent. Points that fill the cube evenly, by steps whose multiples never
come close to whole numbers (g⁴ = g + 1), are off by a third of that:

    u_i = (i + ½)·(1/g, 1/g², 1/g³) + ½  mod 1                                                 (4)

Each question takes the best of what no other has taken; the last slot is the sink: the oldest
latent, where everything began. Up to 512 candidates are scored one by one; of more, only those
whose view looks at the same place from the same side (frustum_key).

What differs. The release takes depths evenly, which counts near points too often (kept as rule
"released", in its own order of arithmetic), and lets one latent answer twice. Walls are ignored,
as in the paper: overlap is what could be seen. A view is 90° wide and high here, whatever K says.
The exact volume is in lab/truth.py, and tests compare.

Try it: python memory.py      Tests: pytest tests/test_memory.py
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

import camera
import context
from context import Memory, Window

NEAR, FAR = 0.1, 30.0  # metres: the part of a view that counts as seen
RULES = ("uniform", "released")  # of overlap
POLICIES = ("camera", "recent", "random", "none")  # of what to remember
POINTS = 256  # of a view, for its overlap with another
AROUND = 20.0  # metres: how far from a new camera training looks for what old views share with it
POINTS_AROUND = 512  # of each of five new cameras; the release takes 3,000
TAKEN = 10.0  # what a candidate loses when another question has it: more than any overlap

BRUTE_FORCE = 512  # a bank scores up to so many candidates one by one
SURVIVORS = 160  # of more, so many go on by frustum_key
FINALISTS = 24  # and of these, so many by 64 points
GROUP = 24  # see nearest()
BLOCK = 42 * GROUP  # rows that a bank grows by at first: whole groups always, doubled or not


# ---- how much of a new view has an old one seen? -------------------------------------------------


@functools.cache
def frustum_points(rule: str, n: int) -> Tensor:  # (3, P) points of a view, camera axes
    if rule == "released":
        # 10 x 10 x 10, linear in depth, ends included: too many points close by and on the edges
        side = torch.linspace(-1, 1, 10)
        depth = torch.linspace(NEAR, FAR, 10)
        z, y, x = torch.meshgrid(depth, side, side, indexing="ij")
        return torch.stack([x * z, y * z, z]).flatten(1)
    steps = 1.2207440846057596 ** -torch.arange(1, 4.0)
    middle = torch.arange(n, dtype=torch.float64)[:, None] + 0.5
    u = middle * steps + 0.5
    across, down, depth_share = (u % 1).float().unbind(-1)  # (4)
    x = 2 * across - 1
    y = 2 * down - 1
    z = FAR * depth_share ** (1 / 3)  # (2)
    return torch.stack([x * z, y * z, z])


def inside(points: Tensor, g: Tensor, far: float = FAR) -> Tensor:
    """(3, P), (n, 4, 4) -> (n, P) bool: do the points, moved into each camera by g, lie in its
    90° x 90° frustum between NEAR and far?"""
    # all cameras at once: one product (3·n, 3) · (3, P), its rows sorted by axis
    rotations = g[:, :3, :3].transpose(0, 1).flatten(0, 1)
    shifts = g[:, :3, 3].T.flatten()[:, None]
    x, y, z = torch.addmm(shifts, rotations, points).view(3, len(g), -1)
    in_sight = torch.maximum(x.abs_(), y.abs_()) <= z
    return in_sight.logical_and_(z > NEAR).logical_and_(z < far)


def overlap(
    query: Tensor,  # (Q, 4, 4)
    candidates: Tensor,  # (N, 4, 4) for all, or (Q, N, 4, 4)
    rule: str = "uniform",
    points: int = POINTS,
) -> Tensor:  # (Q, N) float32
    """The share of each new view that each old one has seen."""
    camera.choose("rule", rule, RULES)
    if candidates.dim() == 3:  # a bank checks what it picks per query beforehand
        camera.check_rigid("query", query)
        camera.check_rigid("candidates", candidates)
    if rule == "released":
        others = candidates.expand(len(query), *candidates.shape[-3:])
        return torch.stack([*map(released_overlap, query, others)])

    # in double: the way between two cameras far from the origin is still exact
    g = camera.relative(candidates.double(), query.double()[:, None])
    rows = 65536 // points if g.device.type == "cpu" else 8192  # a piece stays in cache
    pieces = g.flatten(0, 1).split(rows)
    sample = frustum_points(rule, points).to(g.device)
    shares = []
    for piece in pieces:
        seen = inside(sample, piece.float())
        shares.append(seen.float().mean(-1))  # (1)
    return torch.cat(shares).view(g.shape[:2])


def released_overlap(query: Tensor, candidates: Tensor) -> Tensor:  # (4, 4), (N, 4, 4) -> (N,)
    """What the release computes: in float32, in its axes and in its order.

    Many of its points lie exactly on the sides of a view that looks the same way. Whether they
    count is a matter of rounding, so another way to the same formula gives other scores.
    """
    view = camera.to_released(query).float()
    sample = frustum_points("released", 0).to(view)
    world = view[:3, :3] @ sample + view[:3, 3:]  # (3, 1000)
    shares = []
    for piece in camera.to_released(candidates).float().split(32):  # a piece stays in cache
        back = torch.linalg.inv(piece)
        moved = (back[:, :3, :3] @ world).add_(back[:, :3, 3:])
        x, y, z = moved.unbind(1)  # (32, 1000) each
        depth = z.clamp(min=1e-6)
        u = x.mul_(640).div_(depth).add_(640)  # pixels of a picture of 1280 x 720
        v = y.mul_(360).div_(depth).add_(360)
        seen = (z > NEAR).logical_and_(z < FAR)
        seen.logical_and_(u >= 0).logical_and_(u <= 1280)
        seen.logical_and_(v >= 0).logical_and_(v <= 720)
        shares.append(seen.float().mean(-1))
    return torch.cat(shares)


def pick(scores: Tensor, index: Tensor, sink: int | None, repeat: float) -> Tensor:
    """(Q, S) twice -> (Q,) of index: the best candidate of each query in turn; one that was taken
    before loses `repeat`. The last slot is the sink's, if there is one."""
    taken = index.new_full((len(index),), -1)
    if sink is not None:
        taken[-1] = sink
    for slot in range(len(index) - (sink is not None)):
        used = (index[slot, :, None] == taken).any(-1)
        taken[slot] = index[slot, (scores[slot] - repeat * used).argmax()]
    return taken


# ---- training: whole clips -----------------------------------------------------------------------


def select_training(
    c2w: Tensor,  # (B, F, 4, 4) of every frame
    start: Tensor,  # (B,) the first new latents
    n_new: int,
    sink: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:  # (B, M) latents to remember; the last is the sink, latent 1, if wanted
    """The released rule: five of the new cameras, newest first, scatter points around themselves,
    and each takes the old latent that sees most of those that ANY new view sees, none twice. Too
    little history repeats itself, at worst latent 0."""
    if int(start.min()) <= Window.past:
        raise ValueError(
            f"memory is older than {Window.past} past latents: "
            f"start must be > {Window.past}, got {start.tolist()}"
        )
    later = c2w[:, Window.stride :: Window.stride]
    poses = torch.cat([c2w[:, :1], later], 1).double()  # (B, L, 4, 4): the last of each latent

    # uniform in balls, as (2) is in frusta: below the radius u^⅓ lies a share u of the volume
    direction = torch.randn(Window.memory, 3, POINTS_AROUND, generator=generator)
    share = torch.rand(Window.memory, 1, POINTS_AROUND, generator=generator)
    balls = F.normalize(direction, dim=1) * AROUND
    balls = (balls * share ** (1 / 3)).to(poses.device)

    chosen = []
    for clip, first in zip(poses, start.tolist(), strict=True):
        chosen.append(select_one(clip, first, n_new, balls, sink))
    return torch.stack(chosen)


def select_one(poses: Tensor, first: int, n_new: int, balls: Tensor, sink: bool) -> Tensor:
    """One clip's memory: (L, 4, 4) and (M, 3, P) -> (M,)."""
    stop = first - Window.past
    oldest = min(1, stop - 1)
    old = poses[oldest:stop]
    new = poses[first : first + n_new]
    M, _, P = balls.shape

    # the points, in the axes of the newest camera
    here = new[-1]
    asks = new[[n_new - 1 - offset for offset in context.query_offsets(n_new, M)]]
    centres = camera.relative(here, asks)[:, :3, 3:].float()  # (M, 3, 1)
    points = (balls + centres).transpose(0, 1).flatten(1)  # (3, M·P)

    # what any new view sees of them, and each old one too
    moves = camera.relative(torch.cat([new, old]), here).float()
    seen = inside(points, moves, math.inf)
    wanted = seen[:n_new].any(0)
    common = (seen[n_new:] & wanted).unflatten(1, (M, P))  # (N, M, P)
    scores = common.float().mean(-1).T  # (M, N)

    # of equals the newer one: an advantage of less than a point
    index = torch.arange(oldest, stop, device=poses.device).expand(M, -1)
    newer = index / index.amax().clamp(min=1) * 0.5 / P
    return pick(scores + newer, index, oldest if sink else None, TAKEN)


# ---- play: a bank --------------------------------------------------------------------------------


def frustum_key(c2w: Tensor) -> Tensor:  # (n, 4, 4) -> (n, 6)
    """Six numbers that are close if two views overlap: the frustum's centroid, ¾ far ahead, and the
    direction, in units of 4 m (measured)."""
    forward = c2w[:, :3, 2]
    centroid = c2w[:, :3, 3] + 0.75 * FAR * forward
    return torch.cat([centroid, 4.0 * forward], -1).float()


class MemoryBank:
    """Every latent a session has made, with its cameras and time; asked once per segment for the
    five to remember.

    Storage doubles when full, so appending costs O(1). After `free` latents a gate lets in only
    views that nothing stored overlaps by `gate`, and every eighth: an hour of play then grows with
    the area explored.
    """

    def __init__(self, rule: str = "uniform", gate: float = 0.85, free: int = 4096) -> None:
        self.rule = camera.choose("rule", rule, RULES)
        self.gate = gate
        self.free = free
        self.size = 0
        self.store: dict[str, Tensor] = {}  # preallocated; the first `size` rows are in use

    def __len__(self) -> int:
        return self.size

    @property
    def times(self) -> Tensor:
        """(size,) the absolute indices of what is stored."""
        if not self.store:
            return torch.zeros(0, dtype=torch.long)
        return self.store["times"][: self.size]

    def append(self, latents: Tensor, cameras: Tensor, times: Tensor) -> None:
        """(C, n, h, w), c2w (n, 4, 4, 4) of each latent's frames, (n,) absolute indices that grow."""
        C, _, h, w = latents.shape
        camera.expect("latents", latents, (C, len(times), h, w))
        camera.expect("cameras", cameras, (len(times), 4, 4, 4))
        camera.check_rigid("cameras", cameras)
        order = torch.cat([self.times[-1:], times.cpu()]).tolist()
        if order != sorted(set(order)):
            raise ValueError(
                f"times must grow from latent to latent, got {order} (the bank's last one first)"
            )

        cameras = cameras.to(latents.device)
        keys = frustum_key(cameras[:, -1])
        squares = keys.square().sum(-1, keepdim=True)  # see nearest()
        rows = {
            "latents": latents.transpose(0, 1),
            "cameras": cameras,
            "times": times.cpu(),
            "keys": torch.cat([keys, squares], -1),
        }
        for i, time in enumerate(times.tolist()):
            if self.wants(cameras[i, -1:], time):
                self.push({name: x[i] for name, x in rows.items()})

    def wants(self, view: Tensor, time: int) -> bool:
        """Whether the gate lets a latent in."""
        if self.size < self.free or time % 8 == 0:
            return True
        scores, _ = self.score(view, 0, self.size)
        return bool(scores[0].max() < self.gate)

    def push(self, row: dict[str, Tensor]) -> None:
        """One latent more; storage that is full doubles."""
        for name, x in row.items():
            if self.size == len(self.store.get(name, ())):
                bigger = x.new_zeros(max(BLOCK, 2 * self.size), *x.shape)
                if self.size:
                    bigger[: self.size] = self.store[name]
                self.store[name] = bigger
            self.store[name][self.size] = x
        self.size += 1

    def nearest(self, query: Tensor, first: int, stop: int) -> Tensor:
        """(Q, 4, 4) -> (Q, SURVIVORS) slots whose frusta lie closest: exact top-k by frustum_key.

        |k_q − k_c|² = |k_q|² − 2 k_q·k_c + |k_c|², whose first term is the same for every candidate:
        one matrix product over the whole bank. A top-k over all would cost more than that. So slots
        are dealt into `width` groups of 24, and the k smallest are sought in the k groups with the
        smallest minima: no other group can hold one.
        """
        key = frustum_key(query)
        width = -(-stop // GROUP)
        one = torch.ones_like(key[:, :1])
        ask = torch.cat([-2 * key, one], -1)
        distance = ask @ self.store["keys"][: width * GROUP].T
        distance[:, :first] = torch.inf
        distance[:, stop:] = torch.inf
        distance = distance.view(len(key), GROUP, width)

        best = distance.amin(1).topk(min(SURVIVORS, width), largest=False)
        groups = best.indices[:, None]  # (Q, 1, SURVIVORS)
        members = groups + width * torch.arange(GROUP, device=key.device)[:, None]
        few = distance.gather(2, groups.expand(-1, GROUP, -1)).flatten(1)
        closest = few.topk(SURVIVORS, largest=False)
        return members.flatten(1).gather(1, closest.indices)

    def score(self, query: Tensor, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """(Q, 4, 4) -> (Q, S) overlaps and (Q, S) slots of the candidates that are worth scoring."""
        cameras = self.store["cameras"]
        every = torch.arange(first, stop, device=query.device).expand(len(query), -1)
        if self.rule == "released":  # every frame is a candidate, not one per latent
            frames = cameras[first:stop].flatten(0, 1)
            scores = overlap(query, frames, self.rule)
            return scores.unflatten(1, (-1, Window.stride)).amax(-1), every
        if stop - first <= BRUTE_FORCE:
            return overlap(query, cameras[every, -1]), every

        # 64 points each choose those that get all of them
        slots = self.nearest(query, first, stop)
        rough = overlap(query, cameras[slots, -1], points=64)
        slots = slots.gather(1, rough.topk(FINALISTS).indices)
        return overlap(query, cameras[slots, -1]), slots

    def retrieve(
        self,
        query: Tensor,  # (Q, 4, 4) cameras of the frames that ask, see Segment.asking
        before: int | None = None,  # the segment's first latent: only older ones may answer
        policy: str = "camera",  # the others are ablations
        sink: bool = True,  # the last answer to "camera" is always the oldest, latent 1
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:  # (Q,) slots for read(), (Q,) their overlaps
        """What to remember."""
        camera.expect("query", query, (len(query), 4, 4))
        camera.check_rigid("query", query)
        if camera.choose("policy", policy, POLICIES) == "none":
            return torch.zeros(0, dtype=torch.long), torch.zeros(0)
        stop = self.size if before is None else int(torch.searchsorted(self.times, before))
        if stop == 0:
            raise ValueError(
                f"nothing to remember: the bank holds {self.size} latents, "
                f"none before {before}; append first"
            )

        # latent 0 holds one frame instead of four: it answers only if it is alone
        first = min(int(torch.searchsorted(self.times, 1)), stop - 1)
        Q = len(query)
        query = query.to(self.store["cameras"])
        if policy == "recent":
            slots = (stop - 1 - torch.arange(Q)).clamp(min=first)
        elif policy == "random":
            slots = first + torch.randperm(stop - first, generator=generator).repeat(Q)[:Q]
        else:
            scores, index = self.score(query, first, stop)
            repeat = 0.0 if self.rule == "released" else TAKEN
            slots = pick(scores, index, first if sink else None, repeat)
        slots = slots.to(query.device)
        chosen = self.store["cameras"][slots, -1:]
        return slots, overlap(query, chosen, self.rule)[:, 0]

    def read(self, slots: Tensor) -> Memory:  # (M,) -> a batch of one
        latents = self.store["latents"][slots].transpose(0, 1)
        times = self.store["times"][slots.cpu()].to(slots.device)
        return Memory(latents[None], times[None], self.store["cameras"][slots][None])

    def state_dict(self) -> dict[str, Tensor]:
        return {name: x[: self.size].clone() for name, x in self.store.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.size = len(state.get("times", ()))
        self.store = {}
        missing = -self.size % BLOCK
        for name, x in state.items():
            empty = x.new_zeros(missing, *x.shape[1:])
            self.store[name] = torch.cat([x, empty])


# ---- demo ----------------------------------------------------------------------------------------


def there_and_back() -> Tensor:
    """(141, 4, 4, 4): 40 latents straight on, 30 to turn on the spot, 40 home, 30 to turn again."""
    keyboard = torch.zeros(560, 6)
    keyboard[:160, 0] = 1
    keyboard[280:440, 0] = 1
    mouse = torch.zeros(560, 2)
    mouse[160:280, 1] = 0.1
    mouse[440:, 1] = 0.1
    pose = camera.integrate((0, -1.6, 0, 0, 0), keyboard, mouse)
    return context.segment_cameras(camera.pose_to_c2w(pose)[None], 0, 141)[0]


def main() -> None:
    """What a point count is worth, and what a walk there and back remembers."""
    cameras = there_and_back()
    views = cameras[:, -1]
    fine = overlap(views[::10], views, points=16384)  # stands for the true share
    for n in (64, 256, 1024):
        coarse = overlap(views[::10], views, points=n)
        error = (coarse - fine).square().mean().sqrt()
        independent = (fine * (1 - fine) / n).mean().sqrt()  # (3)
        print(
            f"{n:5d} points: overlap is off by {error:.4f}; independent ones by {independent:.4f}"
        )

    bank = MemoryBank()
    latents = torch.randn(16, 141, 8, 8)
    bank.append(latents, cameras, torch.arange(141))
    stages = {"walking out": 26, "turning away": 50, "walking home": 80, "turned back": 131}
    for stage, new in stages.items():
        asks = [new + 9 - offset for offset in context.query_offsets(10, 5)]
        seen = {}
        for policy in ("camera", "recent"):
            slots, scores = bank.retrieve(views[asks], before=new - 4, policy=policy)
            seen[policy] = f"{scores.mean():.2f} by latents {slots.tolist()}"
        print(f"{stage:12s} at latent {new}: seen before {seen['camera']}; newest {seen['recent']}")


if __name__ == "__main__":
    main()
