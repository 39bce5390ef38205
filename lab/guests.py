"""Two models behind the door of lab/outside.py: a copycat, and our own.

    python evaluate.py all --quick --model lab.guests:Copycat
    python evaluate.py all --quick --model lab.guests:Shipped

A model of your own is a class like these in a file of yours: `--model my_file:MyModel`.
"""

import numpy as np
import torch
from numpy import ndarray

import camera
import realtime

HERE = (0.0, 0.0, 0.0, 0.0, 0.0)  # x, y, z, pitch, yaw: wherever the walk begins


class Copycat:
    """No network: the first picture, moved across the view as the head turns, its edge repeated where
    the picture ends.

    It turns exactly, back again too, and never walks: what anybody can do who keeps one picture.
    """

    def reset(self, image: ndarray, prompt: str) -> None:
        self.image = image
        self.pose = HERE

    def step(self, keyboard: ndarray, mouse: ndarray) -> ndarray:
        keys = torch.from_numpy(keyboard)
        poses = camera.integrate(self.pose, keys, torch.from_numpy(mouse))
        self.pose = poses[-1].tolist()
        return np.stack([self.turned(yaw) for yaw in np.radians(poses[1:, 4].numpy())])

    def turned(self, yaw: float) -> ndarray:
        """Each pixel of the view is a ray (u, v, 1); turned by the yaw, where in the picture is it?"""
        half = len(self.image) / 2
        u = (np.arange(2 * half) + 0.5) / half - 1  # 90 degrees across: from -1 to 1
        aside = u * np.cos(yaw) + np.sin(yaw)
        ahead = np.cos(yaw) - u * np.sin(yaw)
        ahead = ahead.clip(0.01)  # what is behind lies far beyond the edge
        columns = self.pixels(aside / ahead)
        rows = self.pixels(u[:, None] / ahead)
        return self.image[rows, columns]

    def pixels(self, place: ndarray) -> ndarray:
        """From -1 .. 1 to the nearest pixel that there is."""
        side = len(self.image)
        return np.floor((place + 1) * side / 2).clip(0, side - 1).astype(int)


class Shipped:
    """The shipped student, as play.py drives it: an image, keys, frames."""

    def __init__(self) -> None:
        self.session = realtime.Session(realtime.Options())

    def reset(self, image: ndarray, prompt: str) -> None:
        self.session.reset(torch.from_numpy(image), prompt, seed=0)

    def step(self, keyboard: ndarray, mouse: ndarray) -> torch.Tensor:
        return self.session.step(keyboard, mouse).frames
