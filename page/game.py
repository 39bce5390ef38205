"""The game itself behind the methods of a Session: nothing is imagined, so nothing is forgotten.

play.py --fake walks in it: to learn the keys without a model, and to test everything around one.
Its chunks are as short as an action can be. It has no memory and needs none, but shows which old
frames a memory would have picked: those that looked the same way.
"""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import realtime
import world
from context import LENGTHS
from dataset.episode import problems_of_scene
from engine import weights
from page.controls import LATENT
from page.start import true_views

RECALLED = 4  # old frames that it shows as if a memory had picked them, and the first
APART = 20  # frames between two that may be picked

Pose = tuple[float, ...]  # x, y, z, pitch, yaw


class FakeSession:
    """reset, step, undo, save, restore: a Session whose world is drawn by the game's own renderer."""

    lengths = LENGTHS  # that a link may name; a game acts at once, whatever it says

    def __init__(self, size: tuple[int, int], view: str = "first") -> None:
        self.size = size
        self.view = view
        self.frames_needed = LATENT
        self.policy = "camera"
        self.truth: dict | None = None  # the world of the start picture, if it names one

    def enter(self, truth: dict, poses: list[Pose] | None = None) -> None:
        """A world, and the way one has come in it."""
        scene = world.make_scene(**truth["scene"])
        self.inside = truth
        self.game = world.World(scene, pose=poses and poses[-1], size=0)
        self.poses = poses or [self.game.pose]

    def reset(self, image: Tensor, prompt: str, seed: int, pose: Pose) -> realtime.Chunk:
        """The world of the start picture; where it names none, the world of the seed."""
        if self.truth:
            self.enter(self.truth, [tuple(pose)])
        else:
            scene = {"seed": seed, "kind": world.make_scene(seed).kind}
            self.enter({"scene": scene, "view": self.view, "character": seed})
        info = {"ms": {}, "memory": [], "poses": list(self.poses)}
        return realtime.Chunk(self.views(self.poses), info)

    def step(self, keyboard: Tensor, mouse: Tensor) -> realtime.Chunk:
        """(n, 6), (n, 2) -> n frames."""
        began = time.monotonic()
        picks = self.recall()
        for keys, turn in zip(keyboard.tolist(), mouse.tolist(), strict=True):
            self.game.tick(keys, turn)
            self.poses.append(self.game.pose)
        new = self.poses[-len(keyboard) :]
        frames = self.views(new)
        decode = 1000 * (time.monotonic() - began)
        ms = {"retrieve": 0.0, "denoise": 0.0, "decode": decode}
        return realtime.Chunk(frames, {"ms": ms, "memory": picks, "poses": new})

    def recall(self) -> list[dict]:
        """What a memory would look back at: frames that looked the same way, and the first."""
        if self.policy == "none":
            return []
        yaw = self.poses[-1][4]

        def turned(t: int) -> float:
            return abs((self.poses[t][4] - yaw + 180) % 360 - 180)

        old = sorted(range(APART, len(self.poses), APART), key=turned)
        return [
            {"latent": t // LATENT, "frame": t, "score": 1 - turned(t) / 180, "sink": not t}
            for t in [*old[:RECALLED], 0]
        ]

    def views(self, poses: list[Pose]) -> Tensor:
        return torch.from_numpy(true_views(self.inside, np.array(poses), *self.size))

    def undo(self) -> None:
        """One chunk back; the game is entered again at the place where it was."""
        self.enter(self.inside, self.poses[:-LATENT])

    def save(self, path: Path) -> None:
        poses = torch.tensor(self.poses, dtype=torch.float64)
        weights.write_weights(path, {"poses": poses}, self.inside)

    def restore(self, path: Path) -> None:
        tensors, truth = weights.read_weights(path)
        wrong = problems_of_scene(truth, truth.get("view"))
        if wrong:
            raise ValueError(wrong[0])
        self.enter(truth, [tuple(pose) for pose in tensors["poses"].tolist()])
