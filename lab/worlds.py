"""Walks through held-out worlds of which everything is known: frames, depth, cameras, actions.

We own the renderer, so there is a true frame at any pose. A script is a walk that touches nothing:
integrated actions are then the engine's poses, frame by frame. Its first KNOWN frames fill the
bank.

A plan is a text such as "j:10 w:4 l2.5:3 -:6" in the language of dataset/chords.py: j and l turn by
1.5 degrees a frame, or so many times that; "-" stands still.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

import camera
import world
from dataset import chords
from lab import registration

SIZE = 64  # pixels
KNOWN = 177  # true frames in the bank: 45 latents
SCORED = 12  # frames that are scored at the end of a walk
TRIES = 400  # places where a plan is tried
UNDO = str.maketrans("wsadlj", "swdajl")  # a key and its opposite

scene = lru_cache(maxsize=64)(world.make_scene)  # of a seed


class Views(NamedTuple):
    frames: ndarray  # (n, H, W, 3) uint8
    depth: ndarray  # (n, H, W) metres
    c2w: ndarray  # (n, 4, 4) float64


class Script(NamedTuple):
    scene: world.Scene
    poses: Tensor  # (F, 5) float64
    keyboard: Tensor  # (F-1, 6)
    mouse: Tensor  # (F-1, 2)
    known: int = KNOWN  # frames that the bank has
    view: str = "first"


def shoot(
    scene: world.Scene,
    poses: ndarray,  # (n, 5)
    size: int = SIZE,
    samples: int = 2,  # rays per pixel and axis
    view: str = "first",
) -> Views:
    """What is seen from poses; in third person with the figure that this world's player has."""
    c2w = world.cameras(scene, poses, view)
    K = camera.intrinsics(size, size).numpy()
    figure = None
    if view == "third":
        figure = (poses, scene.seed * 123_456_789 % world.N_CHARACTERS)
    frames, depth = world.render(scene, c2w, K, size, size, figure, samples)
    return Views(frames, depth, c2w)


def draw(script: Script, at: Sequence[int] | slice = slice(None)) -> Views:
    return shoot(script.scene, script.poses.numpy()[at], view=script.view)


def register(
    scene: world.Scene,
    frame: ndarray | Tensor,  # (H, W, 3)
    pose: Sequence[float],  # (5,) where to search
) -> registration.Found:
    """Where in this world was a frame taken, near a pose and not inside a wall?"""
    side = len(scene.solid) - 1

    def look(poses: Tensor, size: int, samples: int) -> ndarray:
        return shoot(scene, poses.numpy(), size, samples).frames

    def free(xz: Tensor) -> Tensor:  # (n, 2) -> (n,)
        x, z = np.floor(xz.numpy()).astype(int).clip(0, side).T
        return torch.from_numpy(~scene.solid[x, z])

    frame = torch.as_tensor(frame)
    found = registration.register(look, free, frame, torch.as_tensor(pose))
    return found._replace(pose=found.pose.numpy())


# ---- plans --------------------------------------------------------------------------------


def actions_of(plan: str) -> tuple[Tensor, Tensor]:  # (F, 6), (F, 2)
    return camera.actions_from_keys(chords.chords_of(plan) if plan else [])


def undone(plan: str) -> str:
    """The plan that walks a plan back."""
    return " ".join(reversed(plan.translate(UNDO).split()))


def touches(player: world.World, keyboard: Tensor, mouse: Tensor) -> bool:
    keys = keyboard.tolist()
    turns = mouse.tolist()
    return any(player.move(*action) for action in zip(keys, turns, strict=True))


def place(
    seed: int,
    plan: str,
    look: int = -1,
    view: str = "first",
) -> Script:
    """Where a plan can be walked without touching anything, and frame `look` of it shows more than
    a near wall (after half of the tries that is asked no more)."""
    keyboard, mouse = actions_of(plan)
    player = world.World(scene(seed))
    rng = np.random.default_rng([seed, 5])
    for attempt in range(TRIES):
        x, z = player.nav.point(*rng.choice(player.nav.cells))
        start = (x, -world.EYE, z, 0.0, 1.5 * int(rng.integers(240)))
        poses = camera.integrate(start, keyboard, mouse)
        player.pose = tuple(poses[0].tolist())
        if touches(player, keyboard, mouse):
            continue

        seen = shoot(player.scene, poses[[look]].numpy(), 16, view=view)
        far = np.median(seen.depth) > 1.5 and seen.depth.min() > 0.6
        if attempt > TRIES // 2 or (far and seen.frames.std() > 20):
            return Script(player.scene, poses, keyboard, mouse, view=view)
    raise ValueError(f"world {seed} has no room for the path {plan!r}; shorten it")


# ---- the walks that are measured ----------------------------------------------------------


def revisit(
    seed: int,
    offset: float,  # metres beside the first view
    view: str = "first",
) -> Script:
    """Look about, turn round for more than the past window, then side-step (or not), turn back
    and look at the first view."""
    steps = round(offset / camera.STEP)
    aside = f"{'ad'[seed % 2]}:{steps} l2.5:48 -:{32 - steps}"
    return place(seed, f"l:10 j:20 l:10 l2:60 l:10 j:20 l:10 -:36 {aside}", view=view)


def patrol(seed: int, segments: int) -> Script:
    """In the seen room: all round, two steps there and back."""
    round_trip = " l2:20 w:4 s:8 w:4 l2:20 a:4 d:8 a:4 l2:20 -:8 l2:20 w:4 s:4 l2:20 -:8 l2:20"
    rounds = 1 + -(-(KNOWN + 40 * segments) // 176)
    return place(seed, round_trip * rounds)


def journey(seed: int, segments: int) -> Script:
    """Exploring what nobody has seen: of four walks the one that touches least."""
    frames = KNOWN + 40 * segments
    walks = [world.simulate(scene(seed), s, frames, "rl") for s in range(4)]
    contacts = [walk["contact"].sum() for walk in walks]
    best = walks[int(np.argmin(contacts))]
    keyboard = torch.as_tensor(best["keyboard"])[:-1].float()
    mouse = torch.as_tensor(best["mouse"])[:-1]
    return Script(scene(seed), torch.as_tensor(best["player"]), keyboard, mouse)


def errand(
    seed: int,
    view: str = "first",
) -> tuple[Script, dict[str, tuple[Tensor, Tensor]]]:
    """A walk through what the bank knows, and its last 40 actions: as they are, shuffled with every
    turn reversed, and none."""
    script = place(seed, "l2:120 l:20 j:20 -:16 l:12 w:8 j:12 d:4 s:4 -:4", view=view)
    keys = script.keyboard[KNOWN - 1 :]
    turns = script.mouse[KNOWN - 1 :]
    mixed = np.random.default_rng(seed).permutation(40)
    return script, {
        "true actions": (keys, turns),
        "shuffled actions": (keys[mixed], -turns[mixed]),
        "no action": (0 * keys, 0 * turns),
    }
