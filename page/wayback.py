"""Find the way back: walk out, return, and see how much of the first picture is still there.

    out ── 30 s, or 60 s at most ──► home ── at the start again ──► replay ──► over: the score

The walk home is the player's own, or the way out backwards ("lead me home"), which ends exactly
where it began. Then the same steps are imagined once more without memory, as fast as they can be.
Score: how close, in decibels, the picture on return is to the first one; ten more mean a tenth of
the squared error. The rules are those of web/game.js, and a test plays both.
"""

import base64
import math
from typing import NamedTuple

import numpy as np

from dataset import film
from page.screen import jpeg_of

NEAR = 0.6  # metres and
TURNED = 12.0  # degrees from the first pose: home
SETTLE = 16  # frames after that in which a still closer one counts
EXACT = 0.01  # of those distances: no closer one will come
SHOWN = 256  # pixels of a picture in the result
OPPOSITE = [1, 0, 3, 2, 4, 5]  # w <-> s, a <-> d among the six keys
BUSY = ("out", "home", "replay")

OFF = (
    "Walk out for half a minute, then return to where you began. "
    "How much of the first picture is still there, with memory and without?"
)


class Return(NamedTuple):
    """The picture on return, as far as one knows yet."""

    off: float  # 0: the first pose again, 1: just home
    frame: int
    picture: np.ndarray  # (H, W, 3) uint8
    metres: float
    degrees: float


def distance(pose: tuple, first: tuple) -> tuple[float, float]:
    """Metres to the first pose, and degrees to its view."""
    metres = math.hypot(pose[0] - first[0], pose[2] - first[2])
    turn = abs((pose[4] - first[4] + 180) % 360 - 180)
    return metres, max(turn, abs(pose[3] - first[3]))


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Decibels between two pictures (H, W, 3)."""
    return float(film.psnr(one[None], other[None])[0])


class Game:
    """What the page says of it is `told`; `player` is who walks."""

    least = 30.0  # seconds of the way out, and
    most = 60.0  # at most

    def __init__(self) -> None:
        self.phase = "off"  # off, out, home, replay, over
        self.seconds = 0.0
        self.away: tuple[float, float] | None = None  # metres and degrees, on the way home
        self.best: Return | None = None
        self.scores = (0.0, 0.0)
        self.told = {"phase": "off", "text": OFF, "lead": False, "pictures": []}

    def begin(self, player: object) -> None:
        """From the start picture that the player has, with memory; what was walked so far is saved."""
        player.set["paused"] = False
        player.session.policy = "camera"
        player.reset(player.begun)
        self.first = player.newest
        self.pose = player.poses[0]
        self.seconds = 0.0
        self.away = None
        self.best = None
        self.go(player, "out")

    def stop(self, player: object) -> None:
        """Whatever was asked for; who has not been home has no score."""
        if self.phase == "replay":
            player.session.policy = "camera"
        player.script = None
        self.go(player, "off")

    def go(self, player: object, phase: str) -> None:
        self.phase = phase
        self.told = {
            "phase": phase,
            "text": self.text(),
            "lead": phase == "home" or self.far_enough(),
            "pictures": self.pictures() if phase == "over" else [],
        }
        player.screen.note(game=self.told)

    def lead_home(self, player: object) -> None:
        """The way out backwards, exactly: it is played before anybody's keys."""
        led = self.phase == "home" and player.script
        if not led and (self.phase == "home" or self.far_enough()):
            keyboard, mouse = (rows[::-1] for rows in player.actions())
            player.script = [keyboard[:, OPPOSITE], -mouse]
            self.go(player, "home")

    # ---- every chunk

    def see(self, player: object, frames: np.ndarray, poses: np.ndarray) -> None:
        """These frames were made; the last one is the player's newest."""
        first = player.frame - len(frames) + 1
        if self.phase == "out":
            self.seconds += len(frames) * player.period()
            self.go(player, "home" if self.seconds >= self.most else "out")
        elif self.phase == "home":
            home = any(
                self.arrived(picture, pose, first + k)
                for k, (picture, pose) in enumerate(zip(frames, poses.tolist(), strict=True))
            )
            if home:
                self.replay(player)
            else:
                self.go(player, "home")
        elif self.phase == "replay" and player.frame >= self.best.frame:
            self.finish(player, frames[self.best.frame - first])

    def arrived(self, picture: np.ndarray, pose: tuple, frame: int) -> bool:
        """Home is the closest frame of those that are close."""
        metres, degrees = self.away = distance(pose, self.pose)
        off = metres / NEAR + degrees / TURNED
        close = metres < NEAR and degrees < TURNED
        if close and (self.best is None or off < self.best.off):
            self.best = Return(off, frame, picture, metres, degrees)
        if self.best is None:
            return False
        settled = frame >= self.best.frame + SETTLE
        return self.best.off < EXACT or settled or not close

    def replay(self, player: object) -> None:
        """The same steps without memory, from the same picture and noise."""
        walked = player.actions()
        player.set["paused"] = False
        player.reset(player.begun)
        player.session.policy = "none"
        player.script = walked
        self.go(player, "replay")

    def finish(self, player: object, without: np.ndarray) -> None:
        """The player stands where he stood on return, in the world that was forgotten."""
        self.without = without
        self.scores = tuple(likeness(self.first, p) for p in (self.best.picture, without))
        player.script = None
        player.session.policy = "camera"
        player.set["paused"] = True
        player.say_facts()
        self.go(player, "over")

    # ---- what the page says

    def far_enough(self) -> bool:
        return self.phase == "out" and self.seconds >= self.least

    def text(self) -> str:
        if self.phase == "out":
            if self.far_enough():
                return "Far enough. Return whenever you like."
            so_far = f"{int(self.seconds)} s of {self.least:.0f}"
            return f"Walk out, as far and crooked as you like: {so_far}."
        if self.phase == "home":
            text = "Now return to the ring on the map, and look as you looked at first"
            if self.away is None:
                return text + "."
            return f"{text}: {self.away[0]:.1f} m and {self.away[1]:.0f}° away."
        if self.phase == "replay":
            return "Home. The same steps are imagined once more, without memory…"
        if self.phase == "over":
            on, off = self.scores
            return (
                f"With memory the picture on return is {on:.1f} dB like the first one, without "
                f"{off:.1f} dB ({self.best.metres:.2f} m and {self.best.degrees:.0f}° off). "
                "Higher is closer."
            )
        return OFF

    def pictures(self) -> list[dict]:
        """Side by side: the first picture, with memory, and without."""
        on, off = (f"{score:.1f} dB" for score in self.scores)
        shown = [
            (self.first, "first", "picture"),
            (self.best.picture, on, "with memory"),
            (self.without, off, "without"),
        ]
        return [
            {
                "jpeg": base64.b64encode(jpeg_of(picture, SHOWN)).decode(),
                "title": title,
                "under": under,
            }
            for picture, title, under in shown
        ]
