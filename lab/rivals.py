"""The memory of the paper beside other ways to remember, on one network and the same walks.

The walks are those of revisits.py: look at a view, turn away for longer than a segment sees, come
back to it or to a place beside it. The past window, the noise and the weights are the same in all
arms; what differs is what stands in the five memory slots:

    none          nothing
    last frames   the five newest latents before the past
    pooled        all old latents in five groups of neighbours, each the mean of its group, under
                  the time and the cameras of its middle one
    retrieval     the old latents that overlap most with the coming views: memory.py, ours
    warp cache    an oracle: old frames, moved by their true depth into the coming views, encoded
                  by the VAE, under the cameras of those views

Two more use no network: the old frame that overlaps most with the view, shown as it is (frame
copied), and the warped frames themselves (frames warped). No arm was retrained. The network has
learned to read single latents of old frames, so the averages, and the edges that a warp leaves, are
strange to it: this compares what one can put before these weights, not the ideas at their best.

Milliseconds are of a later segment, 40 frames, without decoding. Numbers kept are what must be
stored of the walk's 177 known frames, beside their cameras: latents, and depths where they are
used.
"""

import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

import memory
from context import Memory, Window, query_offsets, segment_cameras
from engine import actors
from lab import players, revisits, stats, truth, worlds
from lab.players import AS_PLAYED, How, Player
from lab.revisits import LAST, OLD, PLACES, Return
from lab.run import Run
from lab.worlds import SCORED

SEGMENT = np.arange(LAST[-1] - 39, LAST[-1] + 1)  # the frames of a whole segment, the last one
PIXELS = {"all": "psnr", "bank-only": "psnr bank-only"}  # which count -> column of the run
PIECE = 8  # views that are warped at once


# ---- other memories -----------------------------------------------------------------------


def pooled(denoiser: actors.Denoiser, asking: Tensor, before: int) -> Memory:
    """All latents that may answer, as the means of five groups; who asks changes nothing."""
    bank = denoiser.bank
    stop = int(torch.searchsorted(bank.times, before))
    groups = torch.arange(1, stop).tensor_split(Window.memory)
    means = [bank.store["latents"][group].mean(0) for group in groups]
    middles = torch.stack([group[len(group) // 2] for group in groups])
    latents = torch.stack(means, 1)[None]  # (1, C, 5, h, w)
    return replace(bank.read(middles), latents=latents)


def warped(back: Return, shown: Tensor, at: ndarray, old: ndarray) -> Tensor:
    """(N, H, W, 3) old frames, moved by the true depth into the views of the frames `at`."""
    depth = back.views.depth
    c2w = torch.from_numpy(back.views.c2w)
    pieces = np.array_split(at, -(-len(at) // PIECE))
    made = [truth.warp(depth[x], c2w[x], shown, depth[old], c2w[old]) for x in pieces]
    return torch.cat(made)


def warp_cache(
    p: Player,
    back: Return,
    shown: Tensor,  # (N, H, W, 3) the frames OLD, as the VAE shows them
    denoiser: actors.Denoiser,
    asking: Tensor,
    before: int,
) -> Memory:
    """What the coming views would show if old frames were moved to them. The whole segment is warped
    and encoded as a film, as the latents of true frames are; those that ask are taken out of it. Their
    time is that of the old latent which overlaps most: when this was seen."""
    count = denoiser.now.count
    new = Window.new
    oldest = OLD[1:before]  # the last frame of each known latent that may answer
    film = np.arange(Window.stride * (count - 1), Window.stride * (count + new - 1) + 1)
    frames = warped(back, shown[1:before], film, oldest)
    latents = players.encode(p, np.uint8(255 * frames.numpy() + 0.5))[:, :, 1:]

    chosen = [new - 1 - offset for offset in query_offsets(new, len(asking))]
    cameras = segment_cameras(torch.from_numpy(back.views.c2w)[None], count, new)
    views = torch.from_numpy(back.views.c2w[oldest])
    nearest = memory.overlap(asking.cpu().double(), views).argmax(1)
    times = 1 + nearest[None]
    return Memory(latents[:, :, chosen], times, cameras[:, chosen].float())


def arms_of(p: Player, back: Return, shown: Tensor) -> dict[str, How]:
    """What the network is given, by the name of the arm."""
    return {
        "none": How(policy="none"),
        "last frames": How(policy="recent"),
        "pooled": How(recall=pooled),
        "retrieval": AS_PLAYED,
        "warp cache": How(recall=partial(warp_cache, p, back, shown)),
    }


def numbers_kept(latent: int, depth: int) -> dict[str, int]:
    """How many numbers of the known frames every arm stores, if a latent has so many and a depth map."""
    bank = len(OLD) * latent
    with_depth = bank + len(OLD) * depth
    return {
        "none": 0,
        "last frames": Window.memory * latent,
        "pooled": bank,
        "retrieval": bank,
        "warp cache": with_depth,
        "frame copied": bank,
        "frames warped": with_depth,
    }


# ---- the same walk under each -------------------------------------------------------------


def with_network(p: Player, back: Return, arms: dict[str, How]) -> tuple[dict, dict]:
    """The scored frames of every arm, and its milliseconds."""
    made = []
    ms = {}
    for arm, how in arms.items():
        latents, info = players.rollout(p, back.script, back.latents, 2, how)
        made.append(latents)
        ms[arm] = info["ms"]["retrieve"] + info["ms"]["denoise"]
    films = players.decode(p, torch.cat(made), SCORED)
    return dict(zip(arms, films, strict=True)), ms


def without_network(back: Return, shown: Tensor) -> tuple[dict, dict]:
    """A whole segment by copying one old frame for each view, and by warping them."""
    began = time.perf_counter()
    now = torch.from_numpy(back.views.c2w[SEGMENT])
    before = torch.from_numpy(back.views.c2w[OLD])
    copied = shown[memory.overlap(now, before).argmax(1)]
    then = time.perf_counter()
    moved = warped(back, shown, SEGMENT, OLD)
    ms = {
        "frame copied": 1e3 * (then - began),
        "frames warped": 1e3 * (time.perf_counter() - then),
    }
    return {"frame copied": copied[-SCORED:], "frames warped": moved[-SCORED:]}, ms


def compare(run: Run, p: Player, place: str, back: Return) -> dict[str, float]:
    """Every arm of one world at one place, in the rows "place, arm". Returns the milliseconds of each."""
    shown = players.decode(p, back.latents[:, :, : len(OLD)], OLD[-1] + 1)[0, OLD]
    images, ms = with_network(p, back, arms_of(p, back, shown))
    copies, copying = without_network(back, shown)
    for arm, image in (images | copies).items():
        run.scores(f"{place}, {arm}", image, back.true, back.masks)
    return ms | copying


def rivals(run: Run) -> None:
    """One network, seven ways to know what was there; then the table and the figure, as facts."""
    p = run.player
    for seed in run.worlds:
        spent = []
        for place, offset in PLACES.items():
            back = revisits.come_back(p, worlds.revisit(seed, offset))
            spent.append(compare(run, p, place, back))
        # the places of a world are no worlds of their own
        for arm in spent[0]:
            run.put(arm, {"ms": np.mean([ms[arm] for ms in spent])})
    latent = back.latents[0, :, 0].numel()
    kept = numbers_kept(latent, worlds.SIZE**2)
    for arm, numbers in kept.items():
        run.put(arm, {"numbers kept": numbers})
    run.facts["rivals"] = {arm: summary(run, arm) for arm in kept}


def summary(run: Run, arm: str) -> dict:
    """Mean and interval over worlds, by pixels and place; what a segment costs and what is stored."""
    scores = {}
    for pixels, column in PIXELS.items():
        for place in PLACES:
            x = run.row(f"{place}, {arm}", column)
            x = x[np.isfinite(x)].tolist()
            scores.setdefault(pixels, {})[place] = {
                "mean": float(np.mean(x)),
                "interval": stats.interval(x),
            }
    return {
        "scores": scores,
        "ms": float(np.median(run.row(arm, "ms"))),
        "numbers kept": int(run.row(arm, "numbers kept")[0]),
    }
