"""Is the memory used? Walk away and come back, and see what is drawn then.

All differences between the arms of one world are the memory's doing: they share the walk, the noise
and the past window. Rivals without a network: copying the nearest old frame, and the oracle warp,
which moves old pixels by the true depth and is the best use of old frames that there is.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

import attention
import dit
import memory
from dataset.film import psnr
from lab import metrics, players, stats, truth, worlds
from lab.players import AS_PLAYED, How, Player
from lab.run import Run
from lab.worlds import KNOWN, SCORED, Script

PLACES = {"exact": 0.0, "0.4 m": 0.4, "0.85 m": 0.85, "1.9 m": 1.9}  # beside the first view
LAST = np.arange(257 - SCORED, 257)  # the frames of a revisit that are scored
OLD = np.arange(0, KNOWN, 4)  # one frame for each latent of the bank
STARTS = {"from a bank": "l2:120 l:20 j:20 -:16 ", "from a frame": ""}  # plans before a walk out
OUT = {"": "l2:40 w:4 -:12 a:4", "over 8 W ": "l2:40 w:4 -:12 l2:56 s:4 -:28 j2:84"}
GAPS = (0.5, 1, 2, 4, 8)  # windows W of 56 frames between two views of one pose


class Return(NamedTuple):
    """A walk that came back, and what is known of it."""

    script: Script
    views: worlds.Views
    latents: Tensor
    masks: dict[str, ndarray]  # of the scored frames

    @property
    def true(self) -> ndarray:
        return self.views.frames[LAST]


def come_back(p: Player, script: Script) -> Return:
    views = worlds.draw(script)
    masks = truth.masks(views.depth, views.c2w, LAST, KNOWN)
    return Return(script, views, players.opened(p, script, views.frames).latents, masks)


# ---- from the same place and from others --------------------------------------------------


def arms_of(place: str, back: Return, donor: Return) -> dict[str, How]:
    """What a rollout remembers. Most arms differ at the exact place alone."""
    arms = {"camera": AS_PLAYED, "none": How(policy="none")}
    if place == "exact":
        arms |= {
            "recent": How(policy="recent"),
            "random": How(policy="random"),
            "zeros": How(bank=torch.zeros_like(back.latents)),
            "other world": How(bank=donor.latents),
            "wrong poses": How(shuffle=True),
        }
    return arms


def without_network(p: Player, back: Return) -> dict[str, Tensor]:
    """The nearest old frame, and old pixels moved by the true depth, both as the VAE shows them."""
    shown = players.decode(p, back.latents[:, :, : len(OLD)], KNOWN)[0, OLD]
    now = torch.from_numpy(back.views.c2w[LAST])
    before = torch.from_numpy(back.views.c2w[OLD])
    nearest = memory.overlap(now, before).argmax(1)
    depth = back.views.depth
    warped = truth.warp(depth[LAST], now, shown, depth[OLD], before)
    return {"copy nearest": shown[nearest], "oracle warp": warped}


def score_place(
    run: Run,
    p: Player,
    place: str,
    back: Return,
    donor: Return,  # of the world before
) -> dict[str, Tensor]:
    """Every arm of one world at one place, in the rows "place, arm"."""
    arms = arms_of(place, back, donor)
    made = [players.rollout(p, back.script, back.latents, 2, how)[0] for how in arms.values()]
    ceiling = back.latents[:, :, -24:].to(made[0])
    films = players.decode(p, torch.cat([*made, ceiling]), SCORED)
    images = dict(zip((*arms, "VAE ceiling"), films, strict=True))
    images |= without_network(p, back)
    for arm, image in images.items():
        run.scores(f"{place}, {arm}", image, back.true, back.masks)
    run.scores(f"{place}, floor: other world", donor.true, back.true, back.masks)
    for arm in ("camera", "none", "oracle warp"):
        last = images[arm][-1]
        run.located(f"{place}, {arm}", back.script, last, LAST[-1], back.views)
    return images


def strip(back: Return, images: dict[str, Tensor]) -> ndarray:
    """Truth | memory | none | memory of another world | copy, side by side."""
    arms = ("camera", "none", "other world", "copy nearest")
    shown = [players.picture(images[arm][-1]) for arm in arms]
    return np.concatenate([back.true[-1], *shown], 1)


def remember(run: Run) -> None:
    """M1 and M11: come back to what only the bank has seen; then swap the memory."""
    if len(run.worlds) < 2:
        raise ValueError("the foreign memory is that of another world: --worlds must be 2 or more")
    p = run.player
    strips = []
    donor = come_back(p, worlds.revisit(run.worlds[-1], 0.0))  # of the first world
    for seed in run.worlds:
        for place, offset in PLACES.items():
            back = come_back(p, worlds.revisit(seed, offset))
            images = score_place(run, p, place, back, donor)
            if place != "exact":
                continue
            for arm in ("camera", "zeros", "wrong poses", "other world"):
                mask = back.masks["bank-only"]
                share = metrics.adoption(images[arm], back.true, donor.true, mask)
                run.put(f"exact, {arm}", {"adoption": share})
            strips.append(strip(back, images))
            following = back
        donor = following
    for place in PLACES:
        share_of_oracle(run, place)
    there_and_back(run, p)
    run.pictures["revisit"] = np.concatenate(strips[:4]).repeat(2, 0).repeat(2, 1)


def share_of_oracle(run: Run, place: str) -> None:
    """What memory gains over none, of what the oracle warp gains in the mean over worlds."""
    none = run.row(f"{place}, none", "psnr bank-only")
    gain = run.row(f"{place}, camera", "psnr bank-only") - none
    most = run.row(f"{place}, oracle warp", "psnr bank-only") - none
    run.raw[f"{place}, camera/gain / the oracle's"] = (gain / np.nanmean(most)).tolist()


# ---- there and back -----------------------------------------------------------------------


def there_and_back(run: Run, p: Player) -> None:
    """M2 and M3, on walks of one window and of eight; then how long agreement lasts."""
    for seed in run.some:
        for out in OUT:
            for start in STARTS:
                palindrome(run, p, seed, f"{out}{start}")
    floor = run.row("exact, floor: other world", "psnr").mean()
    for start in STARTS:
        for policy in ("camera", "none"):
            row = f"over 8 W {start}, {policy}"
            curves = np.transpose([run.row(row, f"{gap} W apart") for gap in GAPS]) - floor
            run.raw[f"{row}/half-life"] = [stats.half_life(GAPS, curve) for curve in curves]


def palindrome(run: Run, p: Player, seed: int, name: str) -> None:
    """A walk out, then each action undone: frames of one commanded pose beside each other."""
    start = next(start for start in STARTS if name.endswith(start))
    before = STARTS[start]
    out = OUT[name.removesuffix(start)]
    known = len(worlds.actions_of(before)[0]) + 1
    script = worlds.place(seed, f"{before}{out} {worlds.undone(out)} -:40", 0)
    script = script._replace(known=known)
    views = worlds.draw(script)
    z = players.opened(p, script, views.frames).latents

    n = len(worlds.actions_of(out)[0])
    first = 56 if known == 1 else 40  # frames of the first segment
    segments = 1 - (first - 2 * n) // 40
    for policy in ("camera", "none"):
        row = f"{name}, {policy}"
        made = players.rollout(p, script, z, segments, How(policy=policy))[0]
        film = players.decode(p, made, first + 40 * (segments - 1))[0]
        travelled = share_travelled(script, film)
        agreement(run, row, film, views.frames[known:], n, travelled)
        run.put(row, {"travelled / commanded": travelled})
        # the commanded pose is home again
        run.located(row, script, film[2 * n - 1], known + 2 * n - 1, views)


def share_travelled(script: Script, film: Tensor) -> float:
    """How much of the first turn, six frames of it, was drawn."""
    home, turned = script.poses.numpy()[[script.known - 1, script.known + 5]]
    found = worlds.register(script.scene, film[5].numpy(), (home + turned) / 2)
    return (found.pose - home)[4] / (turned - home)[4]


def agreement(
    run: Run,
    row: str,
    film: Tensor,
    true: ndarray,
    n: int,  # actions of the way out
    travelled: float,
) -> None:
    """PSNR between frames of one commanded pose, by the windows between them. A film that stands
    still would agree with itself: where less than half of the way was travelled, the score is that
    of different views."""
    around = np.arange(-3, 4)
    for gap in GAPS:
        if 28 * gap + 3 >= n:
            continue
        ago = n - 1 - int(28 * gap) - around
        now = n - 1 + int(28 * gap) + around
        pair = (film[ago], film[now])
        if travelled < 0.5:
            pair = (true[ago], true[[n - 1] * 7])
        run.put(row, {f"{gap} W apart": psnr(*pair).mean()})


# ---- long ago, and without a part ---------------------------------------------------------


def reappear(run: Run, rows: dict[str, How]) -> None:
    """The exact revisit under other conditions, a row for each."""
    p = run.player
    for seed in run.some:
        back = come_back(p, worlds.revisit(seed, 0.0))
        for row, how in rows.items():
            made = players.rollout(p, back.script, back.latents, 2, how)[0]
            image = players.decode(p, made, SCORED)[0]
            run.scores(row, image, back.true, back.masks)


def likeness(sigma_theta: float) -> Tensor:
    """How alike the likest two times look that are 100-4000 latents apart."""
    cfg = replace(dit.PRESETS["tiny"], sigma_theta=sigma_theta)
    pairs = cfg.dim // cfg.heads // 2
    temporal = pairs - 2 * (pairs // 3)
    times = torch.arange(100, 4000)[None]
    angle = attention.rope_angles(times, 1, 1, cfg)[0, :, 0, :, :temporal]  # (lags, heads, pairs)
    return angle.cos().mean((-1, -2)).max()


def rope(run: Run) -> None:
    """Eq. 7: distant times with and without a clock per head; memory from far back."""
    for sigma in (0.0, 0.1, 0.5, 0.8):
        run.put(f"sigma_theta {sigma}", {"likeness": likeness(sigma)})
    reappear(run, {f"{n} latents later": How(later=n) for n in (0, 200, 800)})
