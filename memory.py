"""Find the old frames that saw what we are about to see.

What it does. Memory has five slots. Four hold the old latents that answer a query best, the camera
of a latent that is to be drawn; the fifth holds the oldest. In play the candidates lie in a
MemoryBank, which holds all latents made so far (after 4,096 only those that show something new, and
every eighth). In training they come from the earlier part of the same clip, by another score than
below: which saw most of what ANY new view sees around the query's camera (select_training).
Paper: §3.2 (camera-aware memory).  Released: code of inference, which also holds a rule for
training that nothing there calls.

Why it works. A view is the part of a camera's frustum up to the depth FAR. The score of a
candidate c for a query q is the share of the new view that the old one covers:

    s(q, c) = |V_q ∩ V_c| / |V_q|                   V: a view, |V|: its volume

If a point p is uniform in V_q, s is the chance that it lies in V_c as well. So draw n points in
V_q and count those that lie in V_c:

    s ≈ (1/n)·Σ_i [p_i in V_c]                      [...] is 1 if true, else 0                 (1)

To test a point it is moved into the axes of c, where V_c is |x| <= z, |y| <= z, NEAR < z < FAR.

Uniform in a frustum: its slice at depth z is 2z wide and 2z high, so the volume up to depth z is
∝ z³, and a share u = (z/FAR)³ of the whole lies in front of z. To draw z, draw u and invert:

    z = FAR·u^⅓                                     x and y uniform in (−z, z)                 (2)

(V_q begins at 0 here, not at NEAR: that is (NEAR/FAR)³, or 4 in 10⁸, of its volume.)

How many points? Each term of (1) is 1 with chance s, else 0, and so has the variance s·(1 − s).
The mean of n independent terms has the standard error

    error = √(s·(1 − s)/n) ≤ 1/(2·√n)               at most 3.1 % for 256 points               (3)

Independent points clump. Multiples of powers of 1/ρ, where ρ is to three dimensions what the golden
ratio is to one, fill the cube of (x share, y share, u) evenly. 256 such points have a third of the
error of 256 independent ones (the demo counts):

    shares_i = (i + ½)·(1/ρ, 1/ρ², 1/ρ³) + ½  mod 1,   ρ = 1.2207.. solves ρ⁴ = ρ + 1          (4)

Which answers? Slot by slot, the best candidate that no earlier slot has taken. The last slot is not
filled by its query. It is the sink: it always holds latent 1, the oldest one with four frames, which
shows where the walk began. A bank scores up to 512 candidates one by one. Of more it scores only
those near by: the 160 with the most similar position and direction (frustum_key), of these the best
24 by 64 points.

What differs. The release spreads its points otherwise (rule "released", see released.py), and may
give one latent to several slots. Here a view is 90° wide and high, whatever the camera's K. As in
the paper walls are ignored: overlap is what could be seen. lab/truth.py has the exact volume, and
tests compare.

Try it: python memory.py      Tests: pytest tests/test_memory.py
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

import camera
import context
import released
from camera import FAR, NEAR, choose, expect
from context import Memory, Window

RULES = ("uniform", "released")  # how points are spread over a view
POLICIES = ("camera", "recent", "random", "none")  # by what to remember; all but one are ablations
POINTS = 256  # of a view, for its overlap with another
AROUND = 20.0  # metres: in training, the radius of the ball of points around a query's camera
POINTS_AROUND = 512  # in each ball; the release takes 3,000
TAKEN = 10.0  # subtracted from the score of a latent that another slot has: more than any score

BRUTE_FORCE = 512  # a bank scores up to so many candidates one by one
SURVIVORS = 160  # of more than that, these are the nearest by frustum_key
FINALISTS = 24  # of the survivors, these are the best by 64 points; they get all POINTS
GROUP = 24  # rows that nearest() reduces to one minimum first
BLOCK = 42 * GROUP  # rows of a bank's first storage: a multiple of GROUP, and so are its doubles


# ---- how much of a new view has an old one seen? -------------------------------------------------


@functools.cache
def uniform_points(n: int) -> Tensor:  # (3, n) points of a view, in a camera's axes
    rho = 1.2207440846057596
    steps = rho ** -torch.arange(1, 4.0)  # (3,)
    middle = torch.arange(n, dtype=torch.float64)[:, None] + 0.5
    shares = middle * steps + 0.5  # (n, 3)
    across, down, u = (shares % 1).float().unbind(-1)  # (4)
    x = 2 * across - 1
    y = 2 * down - 1
    z = FAR * u ** (1 / 3)  # (2)
    return torch.stack([x * z, y * z, z])


def inside(points: Tensor, g: Tensor, far: float = FAR) -> Tensor:
    """(3, P), (n, 4, 4) -> (n, P) bool: which points lie in the view of each of n cameras.

    g moves points into a camera's axes. The view is 90° x 90°, between the depths NEAR and far.
    """
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
    choose("rule", rule, RULES)
    if candidates.dim() == 3:  # those per query come from a bank, which has checked them
        camera.check_rigid("query", query)
        camera.check_rigid("candidates", candidates)
    if rule == "released":
        others = candidates.expand(len(query), *candidates.shape[-3:])
        return torch.stack([*map(released.overlap, query, others)])

    # in double: far from the origin, a difference of two positions in float32 would be coarse
    g = camera.relative(candidates.double(), query.double()[:, None])
    rows = 65536 // points if g.device.type == "cpu" else 8192  # a piece stays in cache
    pieces = g.flatten(0, 1).split(rows)
    sample = uniform_points(points).to(g.device)
    shares = []
    for piece in pieces:
        seen = inside(sample, piece.float())
        shares.append(seen.float().mean(-1))  # (1)
    return torch.cat(shares).view(g.shape[:2])


def pick(scores: Tensor, index: Tensor, sink: int | None, penalty: float) -> Tensor:
    """Scores and indices of candidates, both (Q, S) -> (Q,) the index that each slot gets.

    Slot by slot the best; one that is taken already loses `penalty`. The last slot gets the sink.
    """
    taken = index.new_full((len(index),), -1)
    if sink is not None:
        taken[-1] = sink
    for slot in range(len(index) - (sink is not None)):
        used = (index[slot, :, None] == taken).any(-1)
        taken[slot] = index[slot, (scores[slot] - penalty * used).argmax()]
    return taken


# ---- training: whole clips -----------------------------------------------------------------------


def select_training(
    c2w: Tensor,  # (B, F, 4, 4) of every frame
    start: Tensor,  # (B,) the first new latents
    n_new: int,
    sink: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:  # (B, M) latents to remember; the last is the sink, latent 1, if wanted
    """As the release chooses for training. Each query has a ball of random points around its camera;
    wanted are those that ANY new view sees. Its answer is the old latent that sees most of them.
    (The release judges a latent by its first frame, ours is its last, and counts what any frame of
    the whole window sees, ours what its new latents see.)

    No latent is taken twice, unless there are fewer than M; with none but latent 0, that one.
    """
    if int(start.min()) <= Window.past:
        raise ValueError(
            f"memory is older than {Window.past} past latents: "
            f"start must be > {Window.past}, got {start.tolist()}"
        )
    later = c2w[:, Window.stride :: Window.stride]
    poses = torch.cat([c2w[:, :1], later], 1).double()  # (B, L, 4, 4): the last of each latent

    # uniform in balls, by the argument of (2): up to the radius r lies a share (r/AROUND)³
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
    queries = new[[n_new - 1 - offset for offset in context.query_offsets(n_new, M)]]
    centres = camera.relative(here, queries)[:, :3, 3:].float()  # (M, 3, 1)
    points = (balls + centres).transpose(0, 1).flatten(1)  # (3, M·P)

    # the share of each ball that some new view sees, and the old one as well
    moves = camera.relative(torch.cat([new, old]), here).float()
    seen = inside(points, moves, math.inf)
    wanted = seen[:n_new].any(0)
    common = (seen[n_new:] & wanted).unflatten(1, (M, P))  # (N, M, P)
    scores = common.float().mean(-1).T  # (M, N)

    # of equal scores the newer latent wins: at most half of what one point is worth
    index = torch.arange(oldest, stop, device=poses.device).expand(M, -1)
    newer = index / index.amax().clamp(min=1) * 0.5 / P
    return pick(scores + newer, index, oldest if sink else None, TAKEN)


# ---- play: a bank --------------------------------------------------------------------------------


def frustum_key(c2w: Tensor) -> Tensor:  # (n, 4, 4) -> (n, 6)
    """Six numbers, in metres, that are close together if two views overlap.

    Three are the centroid of the view (of a pyramid: at ¾ of its depth), three its direction, times
    4 m: of several weights tried, the one that found the best candidates.
    """
    forward = c2w[:, :3, 2]
    centroid = c2w[:, :3, 3] + 0.75 * FAR * forward
    return torch.cat([centroid, 4.0 * forward], -1).float()


class MemoryBank:
    """The latents that a session has made, each with its cameras and its time.

    The rows of its storage are in the order of time. Storage doubles when it is full,
    so that appending costs O(1) on average. The first `free` latents are all kept. Later ones are
    kept if no stored view covers a share `gate` of theirs, and every eighth in any case: from then
    on the bank grows with the area explored more than with the hours played.
    """

    def __init__(self, rule: str = "uniform", gate: float = 0.85, free: int = 4096) -> None:
        self.rule = choose("rule", rule, RULES)
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
        expect("latents", latents, (C, len(times), h, w))
        expect("cameras", cameras, (len(times), 4, 4, 4))
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
        """Whether a latent shows enough that is new."""
        if self.size < self.free or time % 8 == 0:
            return True
        scores, _ = self.score(view, 0, self.size)
        return bool(scores[0].max() < self.gate)

    def push(self, row: dict[str, Tensor]) -> None:
        """One latent more; storage that is full doubles."""
        for name, x in row.items():
            if self.size == len(self.store.get(name, ())):
                # not zeros: a page of memory that nothing is written to costs nothing
                bigger = x.new_empty(max(BLOCK, 2 * self.size), *x.shape)
                if self.size:
                    bigger[: self.size] = self.store[name]
                self.store[name] = bigger
            self.store[name][self.size] = x
        self.size += 1

    def nearest(self, query: Tensor, first: int, stop: int) -> Tensor:
        """(Q, 4, 4) -> (Q, SURVIVORS) the rows with the nearest keys: an exact top-k, made cheap.

        |k_q − k_c|² = |k_q|² − 2 k_q·k_c + |k_c|². The first term is the same for every candidate,
        so the order of the rest is that of the distances: one matrix product over the whole bank. A
        top-k over it would cost more than the product. So rows are dealt into `width` groups of 24,
        and the k smallest are sought in the k groups with the smallest minima. No other group holds
        one: the k minima of those groups would all be smaller.
        """
        key = frustum_key(query)
        width = -(-stop // GROUP)
        one = torch.ones_like(key[:, :1])
        ask = torch.cat([-2 * key, one], -1)
        distance = ask @ self.store["keys"][: width * GROUP].T
        distance[:, :first] = torch.inf
        distance[:, stop:] = torch.inf
        distance = distance.view(len(key), GROUP, width)

        # group i has the rows i, i + width, i + 2·width, ...
        best = distance.amin(1).topk(min(SURVIVORS, width), largest=False)
        groups = best.indices[:, None]  # (Q, 1, SURVIVORS), or (Q, 1, width) if that is less
        members = groups + width * torch.arange(GROUP, device=key.device)[:, None]
        few = distance.gather(2, groups.expand(-1, GROUP, -1)).flatten(1)
        closest = few.topk(SURVIVORS, largest=False)
        return members.flatten(1).gather(1, closest.indices)

    def score(self, query: Tensor, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """(Q, 4, 4) -> (Q, S) overlaps with rows first .. stop − 1, and (Q, S) which rows.

        S is smaller than stop − first if only the promising ones were scored.
        """
        cameras = self.store["cameras"]
        every = torch.arange(first, stop, device=query.device).expand(len(query), -1)
        if self.rule == "released":  # every frame is a candidate, not one per latent
            frames = cameras[first:stop].flatten(0, 1)
            scores = overlap(query, frames, self.rule)
            return scores.unflatten(1, (-1, Window.stride)).amax(-1), every
        if stop - first <= BRUTE_FORCE:
            return overlap(query, cameras[every, -1]), every

        # too many to score each: by key, then by 64 points, then by all
        rows = self.nearest(query, first, stop)
        rough = overlap(query, cameras[rows, -1], points=64)
        rows = rows.gather(1, rough.topk(FINALISTS).indices)
        return overlap(query, cameras[rows, -1]), rows

    def retrieve(
        self,
        query: Tensor,  # (Q, 4, 4) cameras, see Segment.asking
        before: int | None = None,  # the segment's first latent: only older ones may answer
        policy: str = "camera",  # one of POLICIES
        sink: bool = True,  # with "camera": the last slot is always the oldest, latent 1
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:  # (Q,) rows for read(), (Q,) their overlaps
        """Which latents to remember."""
        expect("query", query, (len(query), 4, 4))
        camera.check_rigid("query", query)
        if choose("policy", policy, POLICIES) == "none":
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
            rows = (stop - 1 - torch.arange(Q)).clamp(min=first)
        elif policy == "random":
            rows = first + torch.randperm(stop - first, generator=generator).repeat(Q)[:Q]
        else:
            scores, index = self.score(query, first, stop)
            penalty = 0.0 if self.rule == "released" else TAKEN
            rows = pick(scores, index, first if sink else None, penalty)
        rows = rows.to(query.device)
        chosen = self.store["cameras"][rows, -1:]
        return rows, overlap(query, chosen, self.rule)[:, 0]

    def read(self, rows: Tensor) -> Memory:  # (M,) -> a batch of one
        latents = self.store["latents"][rows].transpose(0, 1)
        times = self.store["times"][rows.cpu()].to(rows.device)
        return Memory(latents[None], times[None], self.store["cameras"][rows][None])

    def state_dict(self) -> dict[str, Tensor]:
        """What is stored, not a copy of it: to be written before the next append."""
        return {name: x[: self.size] for name, x in self.store.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.size = len(state.get("times", ()))
        self.store = {}
        missing = -self.size % BLOCK  # empty rows that fill the last block
        for name, x in state.items():
            empty = x.new_zeros(missing, *x.shape[1:])
            self.store[name] = torch.cat([x, empty])


# ---- demo ----------------------------------------------------------------------------------------


def there_and_back() -> Tensor:
    """(141, 4, 4, 4): 40 latents (20 m) straight on, 30 to turn by 180°, 40 home, 30 to turn back."""
    keyboard = torch.zeros(560, 6)
    keyboard[:160, 0] = 1
    keyboard[280:440, 0] = 1
    mouse = torch.zeros(560, 2)
    mouse[160:280, 1] = 0.1
    mouse[440:, 1] = 0.1
    pose = camera.integrate((0, -1.6, 0, 0, 0), keyboard, mouse)
    return context.segment_cameras(camera.pose_to_c2w(pose)[None], 0, 141)[0]


def main() -> None:
    """How exact a number of points is; what is remembered on a walk there and back.

    While the player walks on, the newest latents do as well (the sink costs some overlap). Once he
    has turned back, only the camera finds the old ones.
    """
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
        queries = [new + 9 - offset for offset in context.query_offsets(10, 5)]
        seen = {}
        for policy in ("camera", "recent"):
            rows, scores = bank.retrieve(views[queries], before=new - 4, policy=policy)
            seen[policy] = f"{scores.mean():.2f} by latents {rows.tolist()}"
        print(f"{stage:12s} at latent {new}: overlap {seen['camera']}; newest: {seen['recent']}")


if __name__ == "__main__":
    main()
