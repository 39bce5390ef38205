"""What is held, tapped and turned becomes the next actions, within what training has seen.

A page posts the keys that are down, not the events: a lost post is mended by the next one. Between
two decisions a key may go down and up again; it is remembered as a tap, and acts for as long as it
lasted.
"""

import math
import threading
import time
from collections.abc import Callable

import numpy as np

import camera
from camera import DEGREES
from context import Window

LATENT = Window.stride  # frames: the shortest time that an action can last
KEYS = tuple("wasdijkl")
SHOW_FPS = 40  # the page aims at the paper's 40 frames per second
FILE_FPS = 16  # without a page, films run at the dataset's rate
LOOK_PER_PIXEL = 0.01  # mouse units
MAX_LOOK = 0.4  # mouse units per frame at most, as in training


def legal(
    keyboard: np.ndarray,  # (n, 6)
    mouse: np.ndarray,  # (n, 2)
    pitch: float,
    limit: float,
) -> tuple[np.ndarray, np.ndarray]:
    """What training has seen: never W with S or A with D, bounded turns, a pitch within ±limit."""
    keyboard = np.array(keyboard, np.float32)
    mouse = np.clip(mouse, -MAX_LOOK, MAX_LOOK).astype(np.float32)
    for pair in ([0, 1], [2, 3]):
        alone = keyboard[:, pair].sum(1) < 2
        keyboard[:, pair] *= alone[:, None]

    # where the pitch would leave its limits it is held there: what is turned is what remains
    path = np.clip(pitch + DEGREES * np.cumsum(mouse[:, 0]), -limit, limit)
    mouse[:, 0] = np.diff(path, prepend=np.clip(pitch, -limit, limit)) / DEGREES
    return keyboard, mouse


class Controls:
    """What is held, tapped and turned since the last decision: nothing can queue up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.lock = threading.Lock()
        self.last = clock()  # when actions were read
        self.turn = np.zeros(2)  # pixels up and right since then
        self.held: dict[str, float] = {}  # key -> when it went down
        self.taps: dict[str, float] = {}  # key -> seconds it was down

    def post(self, keys: list[str], dx: float = 0.0, dy: float = 0.0) -> None:
        """These keys are down now; the mouse has moved so many pixels."""
        with self.lock:
            now = self.clock()
            for key in set(self.held) - set(keys):
                down = self.held.pop(key)
                # pressed after the last decision and gone before the next: without this it never was
                if down >= self.last:
                    self.taps[key] = self.taps.get(key, 0.0) + now - down
            self.held = {key: self.held.get(key, now) for key in keys}
            self.turn = self.turn + (-dy, dx)  # up and right are positive

    def forget(self) -> None:
        """What was tapped and turned while nobody decided, in a pause or a plan, asks for nothing."""
        with self.lock:
            self.taps = {}
            self.turn = np.zeros(2)
            self.last = self.clock()

    def down(self) -> list[str]:
        """The keys that are held now."""
        with self.lock:
            return sorted(self.held)

    def read(
        self, n: int, fps: float, pitch: float = 0.0, limit: float = 85.0
    ) -> tuple[np.ndarray, np.ndarray, dict]:
        """The next n actions: held keys act throughout, taps as long as they lasted, the mouse evenly."""
        with self.lock:
            held = set(self.held)
            taps, self.taps = self.taps, {}
            turn, self.turn = self.turn, np.zeros(2)
            self.last = self.clock()

        # a tap fills whole latents, at least one
        until = {}
        for key, seconds in taps.items():
            until[key] = LATENT * max(1, math.ceil(seconds * fps / LATENT))
        chords = []
        for t in range(n):
            acting = held | {key for key, end in until.items() if t < end}
            chords.append("+".join(sorted(acting)) or "_")

        keyboard, mouse = (part.numpy() for part in camera.actions_from_keys(chords))
        # as finely as a link can say it
        mouse = mouse + np.round(turn * LOOK_PER_PIXEL / n, 5)
        shown = {
            "keys": sorted(held | set(taps)),
            "clipped": bool(np.abs(mouse).max() > MAX_LOOK),
        }
        return *legal(keyboard, mouse, pitch, limit), shown
