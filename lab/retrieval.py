"""Which old frames does a rule choose, of those that saw what comes next.

The truth needs no model: exact depth says which pixels of the next views an old frame has seen. A
rule chooses five frames; coverage@5 is what they show together, as a share of what five chosen
greedily show: near the most that any five can, and no bound, so a share may exceed 1.
"""

import time
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

import memory
import world
from context import query_offsets
from lab import truth, worlds
from lab.run import Run


class Walked(NamedTuple):
    """Half a walk through the eyes of the bank, one frame per latent."""

    views: worlds.Views
    poses: ndarray
    asks: ndarray  # the five frames that ask
    stop: int  # frames that may answer

    @property
    def seen(self) -> Tensor:  # (5, N, H, W) bool: which pixels of an ask each old frame saw
        _, depth, c2w = self.views
        now = (depth[self.asks], c2w[self.asks])
        old = (depth[: self.stop], c2w[: self.stop])
        return truth.visible(*now, *old)


def walked(seed: int, kind: str, last: int) -> Walked:
    """The first `last` latents of a walk: a segment is asked for at its end."""
    walk = world.simulate(worlds.scene(seed), 1, 241, kind)
    poses = walk["player"][4::4]
    views = worlds.shoot(worlds.scene(seed), poses, 32, 1)
    asks = last - 1 - np.array(query_offsets(10, 5))
    return Walked(views, poses[:last], asks, last - 14)


def choose(run: Run, walk: Walked, seed: int) -> dict[str, list[int]]:
    """What every rule answers, and how long it takes."""
    # the bank's own rules, and what ignores cameras
    c2w = torch.from_numpy(walk.views.c2w).float()
    query = c2w[walk.asks]
    old = c2w[: walk.stop]
    picks = {}
    for row in ("camera, uniform", "camera, released", "recent", "random"):
        policy, _, rule = row.partition(", ")
        store = memory.MemoryBank(rule or "uniform")
        cameras = old[:, None].expand(-1, 4, -1, -1)
        times = torch.arange(1, walk.stop + 1)
        store.append(torch.zeros(1, walk.stop, 1, 1), cameras, times)
        g = torch.Generator().manual_seed(seed)
        began = time.perf_counter()
        picked, _ = store.retrieve(query, policy=policy, generator=g)
        run.put(row, {"ms": ms_since(began)})
        picks[row] = picked.tolist()

    # the same choice by exact volume
    began = time.perf_counter()
    exact = truth.exact_overlap(query, old)
    every = torch.arange(walk.stop).expand(len(query), -1)
    picked = memory.pick(exact, every, 0, penalty=10.0)
    run.put("camera, exact", {"ms": ms_since(began)})
    picks["camera, exact"] = picked.tolist()
    return picks


def ms_since(began: float) -> float:
    return 1e3 * (time.perf_counter() - began)


def cover(run: Run, seen: Tensor, picks: dict[str, list[int]]) -> None:
    """How much of what any old frame could show do five chosen ones show, against a greedy choice?"""
    together = torch.cat(list(seen), 1)  # (N, 5·H, W): the five views as one
    picks["exact visibility per slot"] = seen.sum((2, 3)).argmax(1).tolist()
    picks["greedy oracle"] = truth.greedy(together, 5)
    most = truth.coverage(together, picks["greedy oracle"])
    for row, chosen in picks.items():
        share = truth.coverage(together, chosen) / (most or np.nan)
        # a view that half of could be seen, and of which the five show next to nothing
        known = [s.any(0).float().mean() >= 0.5 for s in seen]
        missed = [truth.coverage(s, chosen) < 0.1 for s in seen]
        both = np.logical_and(missed, known)
        run.put(row, {"coverage@5": share, "missed views": both.mean()})


def retrieval(run: Run) -> None:
    """M10: truth by exact depth; needs no model. Four half walks in every world."""
    for seed in run.worlds:
        for kind in ("loop", "rl"):
            for last in (45, 60):
                walk = walked(seed, kind, last)
                picks = choose(run, walk, seed)
                cover(run, walk.seen, picks)
                run.facts = run.facts or {
                    "solid": worlds.scene(seed).solid.tolist(),
                    "poses": walk.poses[:, [0, 2, 4]].tolist(),
                    "bank": walk.stop,
                    "asks": walk.asks.tolist(),
                    "chosen": picks["camera, uniform"],
                }
    for key, x in run.raw.items():
        of_world = np.reshape(x, (-1, 4))
        run.raw[key] = np.nanmean(of_world, 1).tolist()
