"""Find the old frames that saw what we are about to see.

What it does. Five views of the next segment ask a bank of everything made so far, and one old latent
answers each. Training chooses from whole clips (select_training), play from its bank (MemoryBank).
Paper: §3.2 (camera-aware memory).  Released: inference only.

Why it works. How much of what we are about to see has an old view seen?

    s(q, c) = |V_q ∩ V_c| / |V_q|                   V: the part of a view between NEAR and FAR

If a point is uniform in V_q, then s is the chance that it lies in V_c as well:

    s ≈ (1/n)·Σ_i [p_i in V_c]                      one matrix product and two comparisons          (1)

Uniform in a frustum: its slice at depth z is 2z wide and high, so the volume up to z grows as z³, and
the depth below which a share u of the volume lies is

    z = far·u^⅓                                     sideways, positions are uniform in (−z, z)      (2)

Each question takes the best of what no other has taken; the last slot is the sink: the oldest latent,
where everything began.

What differs. The release takes depths evenly, which counts near points too often (kept as rule
"released"), and lets one latent answer twice. Walls are ignored, as in the paper: overlap is what
could be seen. A view is 90° wide and high here, whatever K says. The exact volume is in lab/truth.py.

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
BRUTE_FORCE = 512  # a bank scores up to so many candidates one by one;
SURVIVORS, FINALISTS, GROUP = (
    160,
    24,
    24,
)  # of more, so many pass the prefilter, then 64 points; its group size
BLOCK = 42 * GROUP  # rows that a bank grows by at first: whole groups always, doubled or not

# ---- retrieval: how much of a new view has an old one seen? ------------------------------------------------


@functools.cache
def frustum_points(rule: str, n: int) -> Tensor:  # (3, P) points of a view, camera axes
    # u_i = (i + ½) (1/g, 1/g², 1/g³) + ½ mod 1, g⁴ = g + 1, fills a cube evenly for any n (R3 sequence)
    steps = 1.2207440846057596 ** -torch.arange(1, 4.0)
    u = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) * steps + 0.5
    across, down, depth_share = (u % 1).float().unbind(-1)
    x = 2 * across - 1
    y = 2 * down - 1
    z = FAR * depth_share ** (1 / 3)  # (2)
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


def overlap(query: Tensor, candidates: Tensor, rule: str = "uniform", points: int = 256) -> Tensor:
    """(Q, 4, 4), candidates for all (N, 4, 4) or for each query (Q, N, 4, 4) -> (Q, N) float32: the share of each new
    view that each old one has seen. rule: sample points "uniform" in volume, or as "released" (1000)."""
    if candidates.dim() == 3:  # a bank checks what it picks per query beforehand
        camera.check_rigid("query", query)
        camera.check_rigid("candidates", candidates)
    g = camera.relative(candidates.double(), query.double()[:, None])
    rows = 65536 // points if g.device.type == "cpu" else 8192  # a piece stays in cache
    pieces = g.flatten(0, 1).split(rows)
    sample = frustum_points(camera.choose("rule", rule, RULES), points).to(g.device)
    shares = [inside(sample, piece.float()).float().mean(-1) for piece in pieces]  # (1)
    return torch.cat(shares).view(g.shape[:2])


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
        asks = new[[n_new - 1 - offset for offset in context.query_offsets(n_new, memory)]]
        around = (
            (ball + camera.relative(new[-1], asks)[:, :3, 3:].float()).transpose(0, 1).flatten(1)
        )
        seen = inside(around, camera.relative(torch.cat([new, old]), new[-1]).float(), math.inf)
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
        self.rule, self.gate, self.free = camera.choose("rule", rule, RULES), gate, free
        self.size, self.store = (
            0,
            {},
        )  # name -> preallocated tensor, of which the first `size` rows are in use

    def __len__(self) -> int:
        return self.size

    def append(self, latents: Tensor, cameras: Tensor, times: Tensor) -> None:
        """(C, n, h, w), c2w (n, 4, 4, 4) of each latent's four frames, (n,) absolute indices that grow."""
        camera.expect("latents", latents, (len(latents), len(times), *latents.shape[-2:]))
        camera.expect("cameras", cameras, (len(times), 4, 4, 4))
        camera.check_rigid("cameras", cameras)
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
        camera.expect("query", query, (len(query), 4, 4))
        camera.check_rigid("query", query)
        if camera.choose("policy", policy, POLICIES) == "none":
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
    pose = camera.integrate((0, -1.6, 0, 0, 0), keyboard, mouse)
    print(
        f"19.8 m out, 180°, back, 180°: {(pose[-1, :3] - pose[0, :3]).norm():.0e} m from the start"
    )
    cameras, bank = context.segment_cameras(camera.pose_to_c2w(pose)[None], 0, 141)[0], MemoryBank()
    bank.append(torch.randn(16, 141, 8, 8), cameras, torch.arange(141))
    for stage, new in (
        ("walking out", 26),
        ("turning away", 50),
        ("walking home", 80),
        ("turned back", 131),
    ):
        asks = [new + 9 - offset for offset in context.query_offsets(10, 5)]
        for policy in ("camera", "recent"):
            slots, scores = bank.retrieve(cameras[asks, -1], before=new - 4, policy=policy)
            found = "  ".join(
                f"{slot} ({score:.2f})" for slot, score in zip(slots.tolist(), scores, strict=True)
            )
            print(
                f"{stage:13s}latents {new}-{new + 9} ask, {policy} answers latent (overlap): {found}"
            )
