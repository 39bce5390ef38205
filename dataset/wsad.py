"""Read the keys off a trajectory.

Many games log no keys, but where the player was can be measured (§4). Between two frames the
player, heading y, position P on the ground, made one step d along one of eight directions:

    y' = y_t + wrap(y_{t+1} − y_t)/2        the heading half way: immune to the seam at ±180°         (1)
    f = d·forward(y'),  r = d·right(y')     d = P_{t+1} − P_t                                         (2)

W, S, A, D are the 45° sector in which (f, r) lies, if |d| > 0.35 of a usual step. The label is
valid if the step is as long and as straight as a walk is. It means effective motion: who pushes
head-on against a wall cannot be told from one who presses nothing.

Positions come with noise n, and a difference of two makes it larger: d has the deviation √2·n, and
d_{t+1} − d_t the deviation √6·n. Keys change seldom, so the median of the latter shows n alone:

    noise of d = median|d_{t+1} − d_t| / 0.6745 / √3                                                  (3)

Where that exceeds a fifth of a step, positions are smoothed over three frames. A player with
inertia k moves by v_t = k·u_t + (1 − k)·v_{t−1}; what the keys asked for is

    u_t = (v_t − (1 − k)·v_{t−1}) / k                                                                 (4)

Tests: pytest tests/test_wsad.py
"""

import math
from typing import NamedTuple

import numpy as np

import camera


class Labels(NamedTuple):
    """The last row moves nothing and is never valid."""

    keyboard: np.ndarray  # (T, 6) uint8
    mouse: np.ndarray  # (T, 2) float32
    valid: np.ndarray  # (T,) bool


def wrap(degrees: np.ndarray) -> np.ndarray:
    return (degrees + 180) % 360 - 180


def project(d: np.ndarray, yaw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps (N, 2) in x, z -> forward and right."""
    yaw = np.radians(yaw)
    sin = np.sin(yaw)
    cos = np.cos(yaw)
    x, z = d.T
    return x * sin + z * cos, x * cos - z * sin  # (2)


def usual_step(d: np.ndarray) -> float:
    """The median length of the steps above the noise."""
    speed = np.linalg.norm(d, axis=1)
    moving = speed >= 0.2 * np.quantile(speed, 0.95)
    return float(np.median(speed[moving])) or 1.0


def smoothed(xz: np.ndarray) -> np.ndarray:
    """A box of three frames; the ends stay."""
    middle = (xz[:-2] + xz[1:-1] + xz[2:]) / 3
    return np.concatenate([xz[:1], middle, xz[-1:]])


def infer_wsad(
    position: np.ndarray,  # (T, 3) metres, y down
    yaw: np.ndarray,  # (T,) degrees
    pitch: np.ndarray,  # (T,) degrees
    v0: float | None = None,  # length of one step; None: the median step above the noise
    inertia: float = 1.0,  # k; 1 is none
    smooth: bool | None = None,  # None: only if noise makes it necessary
) -> Labels:
    xz = position[:, [0, 2]].astype(float)
    dpitch = np.diff(pitch.astype(float))
    dyaw = wrap(np.diff(yaw.astype(float)))
    d = np.diff(xz, axis=0)  # (T-1, 2)
    v0 = usual_step(d) if v0 is None else v0

    if smooth is None:
        smooth = inertia == 1 and noise_of(d) > 0.2 * v0
    if smooth:
        d = np.diff(smoothed(xz), axis=0)
    if inertia < 1:
        d[1:] = (d[1:] - (1 - inertia) * d[:-1]) / inertia  # (4)

    middle = yaw[:-1] + dyaw / 2  # (1)
    pressed, valid = sectors(*project(d, middle), v0)
    keyboard = np.zeros((len(yaw), 6), np.uint8)
    keyboard[:-1, :4] = pressed
    mouse = np.zeros((len(yaw), 2), np.float32)
    turn = np.stack([dpitch, dyaw], 1)
    mouse[:-1] = turn / camera.DEGREES
    mouse[np.abs(mouse) < camera.DEAD_ZONE] = 0
    return Labels(keyboard, mouse, np.append(valid, False))


def noise_of(d: np.ndarray) -> float:
    if len(d) < 2:
        return 0.0
    change = np.abs(np.diff(d, axis=0))
    return np.median(change) / 0.6745 / math.sqrt(3)  # (3)


def sectors(f: np.ndarray, r: np.ndarray, v0: float) -> tuple[np.ndarray, np.ndarray]:
    """Which of W S A D explain each step (N, 4), and whether one can be sure (N,)."""
    length = np.hypot(f, r)
    moving = length > 0.35 * v0
    narrow = math.tan(math.radians(22.5))
    size_f = np.abs(f)
    size_r = np.abs(r)
    along = moving & (size_f > narrow * size_r)
    across = moving & (size_r > narrow * size_f)
    pressed = [
        along & (f > 0),
        along & (f < 0),
        across & (r < 0),
        across & (r > 0),
    ]

    angle = np.degrees(np.arctan2(r, f))
    crooked = np.abs((angle + 22.5) % 45 - 22.5)  # degrees from the middle of the sector
    long_enough = np.abs(length / v0 - 1) < 0.15
    like_a_walk = long_enough & (crooked < 10)
    valid = np.where(moving, like_a_walk, length < 0.1 * v0)
    return np.stack(pressed, 1), valid


def wsad_report(labels: Labels, true: np.ndarray, contact: np.ndarray) -> dict[str, float]:
    """The share of frames whose four move keys are all right, apart for free and blocked steps.

    Opposite true keys cancel first. The last frame has no step, and does not count.
    """
    keys = true[:-1, :4].astype(bool)
    opposite = keys[:, [1, 0, 3, 2]]
    contact = contact[:-1]
    valid = labels.valid[:-1]
    inferred = labels.keyboard[:-1, :4]
    hit = (inferred == (keys & ~opposite)).all(1)
    parts = {
        "all": hit,
        "free": hit[~contact],
        "contact": hit[contact],
        "valid": hit[valid],
        "coverage": valid,
    }
    return {name: share(part) for name, part in parts.items()}


def share(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else math.nan
