"""Read the keys off a trajectory."""

import collections
import math

import numpy as np

import camera

wrap = lambda degrees: (degrees + 180) % 360 - 180
# keyboard (T, 6) uint8, mouse (T, 2) float32, valid (T,) bool: the last row moves nothing and is never valid
Labels = collections.namedtuple("Labels", "keyboard mouse valid")


def project(
    d: np.ndarray, yaw: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # steps (N, 2) in x, z → forward, right
    sin, cos = np.sin(np.radians(yaw)), np.cos(np.radians(yaw))
    return d[:, 0] * sin + d[:, 1] * cos, d[:, 0] * cos - d[:, 1] * sin


def infer_wsad(
    position: np.ndarray,
    yaw: np.ndarray,
    pitch: np.ndarray,  # (T, 3) metres, y down; (T,), (T,) degrees
    v0: float | None = None,  # length of one step; None: the median step above the noise
    inertia: float = 1.0,  # k of v_t = k·u_t + (1−k)·v_{t−1}; 1 is none
    smooth: bool
    | None = None,  # 3-tick box filter; None: only if the noise of a step exceeds a tenth of it
) -> Labels:
    """Read the keys off a trajectory: project each step on the heading at mid yaw, pick one of 8 sectors, gate by speed."""
    xz, dyaw = position[:, [0, 2]].astype(float), wrap(np.diff(yaw.astype(float)))
    d = np.diff(xz, axis=0)  # (T-1, 2)
    if v0 is None:
        speed = np.linalg.norm(d, axis=1)
        v0 = float(np.median(speed[speed >= 0.2 * np.quantile(speed, 0.95)])) or 1.0
    # noise n on positions gives d_{t+1} − d_t the deviation √6 n and d itself √2 n; the median ignores the few changes of keys
    noise = np.median(np.abs(np.diff(d, axis=0))) / 0.6745 / math.sqrt(3) if len(d) > 1 else 0.0
    if smooth or (smooth is None and inertia == 1 and noise > 0.2 * v0):
        d = np.diff(np.concatenate([xz[:1], (xz[:-2] + xz[1:-1] + xz[2:]) / 3, xz[-1:]]), axis=0)
    if inertia < 1:
        d[1:] = (d[1:] - (1 - inertia) * d[:-1]) / inertia  # u_t = (d_t − (1−k)·d_{t−1}) / k
    f, r = project(d, yaw[:-1] + dyaw / 2)  # y' = y_t + Δy/2
    s, narrow = np.hypot(f, r), math.tan(math.radians(22.5))
    moving = s > 0.35 * v0
    along, across = (
        moving & (np.abs(f) > narrow * np.abs(r)),
        moving & (np.abs(r) > narrow * np.abs(f)),
    )
    crooked = np.abs(
        (np.degrees(np.arctan2(r, f)) + 22.5) % 45 - 22.5
    )  # degrees from the middle of the sector
    valid = np.where(moving, (np.abs(s / v0 - 1) < 0.15) & (crooked < 10), s < 0.1 * v0)
    keyboard, mouse = np.zeros((len(yaw), 6), np.uint8), np.zeros((len(yaw), 2), np.float32)
    keyboard[:-1, :4] = np.stack(
        [along & (f > 0), along & (f < 0), across & (r < 0), across & (r > 0)], 1
    )  # W S A D
    mouse[:-1] = np.stack([np.diff(pitch.astype(float)), dyaw], 1) / camera.DEGREES
    mouse[np.abs(mouse) < camera.DEAD_ZONE] = 0
    return Labels(keyboard, mouse, np.append(valid, False))


def wsad_report(labels: Labels, true: np.ndarray, contact: np.ndarray) -> dict[str, float]:
    """Share of frames whose four move keys are all right, apart for free and blocked steps; opposite true keys cancel first."""
    true, contact, valid = true[:-1, :4].astype(bool), contact[:-1], labels.valid[:-1]
    hit = (labels.keyboard[:-1, :4] == (true & ~true[:, [1, 0, 3, 2]])).all(1)
    parts = {
        "all": hit,
        "free": hit[~contact],
        "contact": hit[contact],
        "valid": hit[valid],
        "coverage": valid,
    }
    return {name: float(part.mean()) if len(part) else math.nan for name, part in parts.items()}
