"""Does a rollout keep to the world, and do what it is told.

In place the player looks round a room that the bank knows; exploring leads where nobody has been,
and there truth is one of many answers: sharpness and TWFD say more than PSNR. What a key did is
read off the picture by registration, so a film that stands still earns nothing.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

import camera
from context import LENGTHS
from dataset.film import psnr, write_png
from engine import cli
from lab import metrics, players, revisits, stats, worlds
from lab.players import How, Player
from lab.run import Run
from lab.worlds import KNOWN, Script

ROUTES = {"in place": worlds.patrol, "exploring": worlds.journey}
LONG = 24  # segments of 40 frames: a minute at 16 frames/s
SEEN_AT = (0, 64, 160, 320, 640, 960)  # frames that the strip shows: 0, 4, 10, 20, 40 and 60 s
SCORED_AT = (56, 256, 640, 976)  # frames of which the last forty before are scored
OBEYED = (11, 19, 31, 39)  # frames of an errand that are registered

# held keys of two arms; the axes of (x, y, z, pitch, yaw) that move; a dead zone in metres or degrees
OPPOSITE = {
    "forward, back": ("w:3", "s:3", (0, 2), 0.1),
    "left, right": ("a:3", "d:3", (0, 2), 0.1),
    "turn": ("j2:4", "l2:4", (4,), 2.0),
}

Actions = tuple[Tensor, Tensor]  # (n, 6) keys and (n, 2) mouse
Draw = Callable[[Script, Iterable[Actions]], Tensor]  # see draw_arms


class Film(NamedTuple):
    made: Tensor  # (F, H, W, 3) in [0, 1]
    true: ndarray  # (F, H, W, 3) uint8


# ---- drift --------------------------------------------------------------------------------


def film_of(p: Player, script: Script, segments: int, policy: str) -> Film:
    frames = worlds.draw(script, slice(KNOWN + 40 * segments)).frames
    z = players.opened(p, script, frames).latents
    made = players.rollout(p, script, z, segments, How(policy=policy))[0]
    return Film(players.decode(p, made, 40 * segments)[0], frames[KNOWN:])


def curves_of(film: Film) -> dict[str, Tensor]:
    """A score for every frame; sharpness against the truth of its own segment."""
    made, true = film
    pieces = zip(made.split(40), torch.from_numpy(true).split(40), strict=True)
    wrong = 255 * made - torch.from_numpy(true)
    return {
        "psnr": psnr(made, true),
        "zncc": metrics.zncc(made, true),
        "sharpness": torch.cat([metrics.sharpness(*piece) for piece in pieces]),
        "colour": wrong.mean((1, 2)).abs().mean(1),  # grey levels off, mean over the channels
    }


def follow(
    run: Run,
    p: Player,
    arm: str,
    script: Script,
    segments: int,
    policy: str = "camera",
) -> tuple[Film, dict[str, list[float]]]:
    """A long rollout: the film, and its curves by segment; its summaries go into the row `arm`."""
    film = film_of(p, script, segments, policy)
    return film, summarise(run, arm, film)


def summarise(run: Run, arm: str, film: Film) -> dict[str, list[float]]:
    """A film of whole segments: what became of it in the row `arm`; its curves by segment."""
    curves = curves_of(film)
    segments = len(film.true) // 40
    parts = {name: x.view(segments, 40).mean(1).tolist() for name, x in curves.items()}
    lost = stats.time_to_lost(curves["zncc"].tolist(), run.tau)
    span = 6 * segments  # 15 % of the frames
    values = {
        "dB per 100 frames": 2.5 * stats.theil_sen(range(segments), parts["psnr"]),
        "grey levels per 100 frames": 2.5 * stats.theil_sen(range(segments), parts["colour"]),
        "sharpness at the end": parts["sharpness"][-1],
        "last 15 % - first, dB": curves["psnr"][-span:].mean() - curves["psnr"][:span].mean(),
        "frames until lost": lost,
        "lost": lost < len(film.true),
    }
    for n in (256, 640):
        if n <= len(film.true):
            last = slice(n - 40, n)
            values[f"sharpness after {n}"] = metrics.sharpness(
                film.made[last],
                film.true[last],
            ).mean()
    run.put(arm, values)
    return parts


def drift(run: Run) -> None:
    """M4: in place and exploring, with memory and without; by segment, and of all worlds TWFD."""
    p = run.player
    segments = 16 if run.full else 8
    run.notes.append(f"{segments} segments of 40 frames after {KNOWN} true ones")
    if not run.full:
        for name in ("sharpness after 640", "segment 16"):
            run.absent[name] = "eight segments; --full has sixteen"

    # by segment, for every world
    films: dict[str, list[Film]] = {}
    for seed in run.some:
        for route, script_of in ROUTES.items():
            for policy in ("camera", "none"):
                arm = f"{route}, {policy}"
                film, parts = follow(run, p, arm, script_of(seed, segments), segments, policy)
                films.setdefault(arm, []).append(film)
                for k in range(segments):
                    values = {f"{arm}: {name}": x[k] for name, x in parts.items()}
                    run.put(f"segment {k + 1:02d}", values)

    # TWFD is of sets, and takes the films of all worlds together
    for arm, of_worlds in films.items():
        for k in range(segments):
            piece = slice(40 * k, 40 * k + 40)
            made = [film.made[piece] for film in of_worlds]
            true = [film.true[piece] for film in of_worlds]
            run.put(f"segment {k + 1:02d}", {f"{arm}: TWFD": metrics.twfd(made, true)})


# ---- into the unknown ---------------------------------------------------------------------


def explore(run: Run) -> None:
    """A start picture, and a minute of walking to where nobody has been: is it still a world?

    Truth above, model below, a pair of rows per world, in OUT/explore.png; sharpness against the
    truth and against what the VAE can show of it, for segments of 10, 5 and 2 new latents, as far
    as they are trained.
    """
    p = run.player
    trained = [int(n) for n in p.meta["new"].split()]
    for new in set(LENGTHS) - set(trained):
        run.absent[f"{new} at once"] = f"the weights have never seen {new} new latents"

    strips = []
    for seed in run.worlds[:10]:
        script = worlds.journey(seed, LONG)._replace(known=1)
        frames = worlds.draw(script, slice(0, 40 * LONG + 17)).frames
        z = players.opened(p, script, frames).latents
        shown = players.decode(p, z, len(frames) - 1)[0].numpy()  # the most a model could do
        for new in trained:
            made = players.rollout(p, script, z, LONG, How(new=new))[0]
            film = players.decode(p, made, len(frames) - 1)[0].numpy()
            score_walk(run, f"{new} at once", film, frames[1:], shown)
            if new == trained[0]:
                strips.append(truth_above_model(frames, film))
    path = run.out / "explore.png"
    write_png(path, side_by_side(strips))
    run.notes.append(f"strip: {cli.shown(path)}, after {SEEN_AT} frames")


def truth_above_model(frames: ndarray, film: ndarray) -> ndarray:
    """The two rows of one world, at SEEN_AT."""
    model = np.concatenate([frames[:1], np.uint8(255 * film + 0.5)])
    rows = [np.concatenate(x[list(SEEN_AT)], 1) for x in (frames, model)]
    return np.concatenate(rows)


def side_by_side(strips: list[ndarray]) -> ndarray:
    """Two columns of strips, twice as large."""
    half = -(-len(strips) // 2)
    left = np.concatenate(strips[:half])
    right = np.concatenate(strips[-half:])
    gap = np.full((len(left), 8, 3), 255, np.uint8)
    both = np.concatenate([left, gap, right], 1)
    return both.repeat(2, 0).repeat(2, 1)


def score_walk(
    run: Run,
    row: str,
    film: ndarray | Tensor,
    true: ndarray,
    shown: ndarray | None = None,  # the truth as the VAE shows it
) -> None:
    """Sharpness and PSNR of the forty frames before each of SCORED_AT."""
    for end in SCORED_AT:
        last = slice(end - 40, end)
        values = {f"sharpness after {end}": metrics.sharpness(film[last], true[last]).mean()}
        if shown is not None:
            most = metrics.sharpness(shown[last], true[last]).mean()
            values[f"sharpness of the VAE after {end}"] = most
        values[f"psnr after {end}"] = psnr(film[last], true[last]).mean()
        run.put(row, values)


# ---- actions ------------------------------------------------------------------------------


def draw_arms(p: Player, script: Script, arms: Iterable[Actions]) -> Tensor:
    """(n, 40, H, W, 3): what follows the known frames under each of n pairs of keys and mouse."""
    z = players.opened(p, script).latents
    made = [players.rollout(p, script, z, 1, How(actions=actions))[0] for actions in arms]
    return players.decode(p, torch.cat(made), 40)


def opposites(run: Run, draw: Draw, seed: int) -> None:
    """Opposite keys from one state under one noise, held for 0.37 m or 12 degrees; where is the
    camera eight frames later?"""
    script = worlds.place(seed, "w:3 s:6 w:3 a:3 d:6 a:3 l2:120 l:10 j:10 -:52")
    home = script.poses[KNOWN - 1].numpy()
    held = [keys for pair in OPPOSITE.values() for keys in pair[:2]]
    arms = [worlds.actions_of(f"{keys} -:{40 - int(keys[-1])}") for keys in held]
    images = draw(script, arms)[:, 7].numpy()

    # where each was drawn from, and where it should have been: two after two belong together
    found = [worlds.register(script.scene, image, home).pose for image in images]
    meant = [camera.integrate(home, *actions)[8].numpy() for actions in arms]
    moves = np.stack([found, meant]) - home
    for k, (name, (_, _, axes, dead)) in enumerate(OPPOSITE.items()):
        moved, asked = moves[:, 2 * k : 2 * k + 2, axes]
        run.put("KCtrl", {name: metrics.answered(moved, asked, dead)})


def obey(run: Run, draw: Draw, seed: int) -> None:
    """One walk under true, shuffled and no actions; and where the true ones led."""
    script, arms = worlds.errand(seed)
    true = worlds.draw(script, slice(KNOWN, KNOWN + 40)).frames
    images = draw(script, arms.values())
    for arm, image in zip(arms, images, strict=True):
        run.scores(arm, image, true)
    if seed in run.some:
        measure_gain(run, script, images[0])


def measure_gain(run: Run, script: Script, film: Tensor) -> None:
    """Motion that was drawn per motion that was asked, Σ c·m / Σ c², without aligning anything."""
    commanded = [script.poses[KNOWN - 1].numpy()]
    found = [commanded[0]]
    for t in OBEYED:
        pose = script.poses[KNOWN + t].numpy()
        commanded.append(pose)
        found.append(worlds.register(script.scene, film[t].numpy(), pose).pose)
    for kind, axes in (("turn", (4,)), ("move", (0, 2))):
        m = np.diff(np.stack(found)[:, axes], axis=0)
        c = np.diff(np.stack(commanded)[:, axes], axis=0)
        wrong = ((m - c) ** 2).sum(1).mean()
        gain = (m * c).sum() / (c * c).sum()
        run.put(kind, {"gain": gain, "relative pose error": np.sqrt(wrong)})


def action(run: Run) -> None:
    """M5: true, shuffled and no actions under equal noise; gain; opposite keys."""
    obedience(run, partial(draw_arms, run.player))


def obedience(run: Run, draw: Draw) -> None:
    """All that is asked of whatever draws what follows from keys."""
    for seed in run.worlds:
        obey(run, draw, seed)
    for seed in run.some:
        opposites(run, draw, seed)
    both_act = [run.row("KCtrl", name) for name in OPPOSITE]
    run.raw["KCtrl/mean"] = np.mean(both_act, 0).tolist()


def ablation(run: Run) -> None:
    """What a part is worth, for models trained without it: memory on return, at once and much later;
    drift in place; obedience."""
    rows = {
        "memory": players.AS_PLAYED,
        "no memory": How(policy="none"),
        "memory, 800 latents later": How(later=800),
    }
    revisits.reappear(run, rows)
    for seed in run.some:
        follow(run, run.player, "in place", worlds.patrol(seed, 8), 8)
        obey(run, partial(draw_arms, run.player), seed)
