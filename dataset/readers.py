"""Real footage as episodes: the public sets that the paper names.

Every set has its own layout, axes and units. A reader finds the pictures and the cameras and hands
over a `Footage`: poses as c2w in OpenCV axes, intrinsics in pixels of the pictures as they are. What
all share comes after: 4k+1 frames, a crop and the intrinsics that belong to it, keys read off the poses.
Tests: pytest tests/test_data.py
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset import episode, prompt, wsad
from dataset.episode import Episode
from dataset.film import Size, read_video

OPENGL_TO_OPENCV = np.diag([1, -1, -1, 1])  # OpenGL's y is up, it looks along −z
Z_UP_TO_Y_DOWN = np.array(  # world axes
    [
        [1.0, 0, 0, 0],
        [0, 0, -1, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 1],
    ]
)


# ---- cameras -----------------------------------------------------------------------------------------------


def square(poses: np.ndarray) -> np.ndarray:
    """(N, 3 or 4, 4) -> (N, 4, 4) float64."""
    poses = np.asarray(poses, float)
    last = np.zeros((len(poses), 1, 4))
    last[:, :, 3] = 1
    return np.concatenate([poses[:, :3], last], 1)


def quaternion_to_matrix(q: np.ndarray, t: np.ndarray) -> np.ndarray:
    """(N, 4) as x y z w, (N, 3) -> (N, 4, 4)."""
    q = q / np.linalg.norm(q, axis=1, keepdims=True)
    V = np.cross(np.eye(3), q[:, None, :3])  # [v]×
    w = q[:, 3:, None]
    R = np.eye(3) + 2 * w * V + 2 * V @ V
    t = np.asarray(t, float)[:, :, None]
    return square(np.concatenate([R, t], 2))


def interpolate(c2w: np.ndarray, times: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Cameras at other moments: (N, 4, 4), (N,), (T,) -> (T, 4, 4).

    Positions on the straight line, rotations on the shortest arc (slerp), the ends held.
    """
    if len(c2w) < 2 or np.any(np.diff(times) <= 0):
        wanted = "at least 2 poses at increasing times"
        raise ValueError(f"interpolation needs {wanted}, got {len(c2w)}")
    before = np.searchsorted(times, at, side="right") - 1
    i = np.clip(before, 0, len(times) - 2)
    a = c2w[i]
    b = c2w[i + 1]
    gap = times[i + 1] - times[i]
    share = np.clip((at - times[i]) / gap, 0, 1)

    # Rₐᵀ·R_b = exp(θ [n]×): its antisymmetric part is sin θ [n]×, its trace 1 + 2·cos θ
    turn = a[:, :3, :3].swapaxes(1, 2) @ b[:, :3, :3]
    N = (turn - turn.swapaxes(1, 2)) / 2
    sine = np.sqrt((N**2).sum((1, 2)) / 2)
    cosine = (turn.trace(axis1=1, axis2=2) - 1) / 2
    N /= np.maximum(sine, 1e-12)[:, None, None]

    # exp(s·θ [n]×)
    angle = (share * np.arctan2(sine, cosine))[:, None, None]
    bent = (1 - np.cos(angle)) * N @ N
    R = a[:, :3, :3] @ (np.eye(3) + np.sin(angle) * N + bent)
    start = a[:, :3, 3:]
    way = b[:, :3, 3:] - start
    p = start + share[:, None, None] * way
    return square(np.concatenate([R, p], 2))


def of_nearest(values: np.ndarray, times: np.ndarray, at: np.ndarray) -> np.ndarray:
    """What was measured at the nearest moment: there is no sense in a mean of two lenses."""
    return values[np.abs(at[:, None] - times).argmin(1)]


# ---- what all readers end with -----------------------------------------------------------------------------


@dataclass
class Footage:
    frames: np.ndarray  # (T, H, W, 3) uint8, perhaps cropped and resized
    native: Size  # height and width before that
    c2w: np.ndarray  # (T, 4, 4)
    K: np.ndarray  # (4,), (T, 4) or (T, 3, 3): pixels of the native size
    source: str


def four_numbers(K: np.ndarray) -> np.ndarray:
    """(..., 3, 3) or (..., 4) -> (..., 4): fx, fy, cx, cy."""
    K = np.asarray(K, float)
    if K.shape[-2:] != (3, 3):
        return K
    rows = [0, 1, 0, 1]
    columns = [0, 1, 2, 2]
    return K[..., rows, columns]


def in_pixels(shares: np.ndarray, native: Size) -> np.ndarray:
    """Intrinsics as shares of width and height, (..., 4), in pixels."""
    height, width = native
    return four_numbers(shares) * [width, height, width, height]


def after_crop(K: np.ndarray, native: Size, stored: Size) -> np.ndarray:
    """Focal lengths scale; so does the way of the principal point from the middle."""
    scale = max(np.divide(stored, native))
    old_middle = np.divide(native[::-1], 2)
    new_middle = np.divide(stored[::-1], 2)
    middle = (K[:, 2:] - old_middle) * scale + new_middle
    return np.concatenate([K[:, :2] * scale, middle], 1)


def to_episode(film: Footage) -> Episode:
    """4k+1 frames, intrinsics of the stored size, keys inferred from the poses."""
    count = len(film.c2w)
    if len(film.frames) != count:
        raise ValueError(f"{film.source}: {len(film.frames)} frames but {count} poses")
    T = (count - 1) // 4 * 4 + 1
    K = np.broadcast_to(four_numbers(film.K), (count, 4))
    K = after_crop(K, film.native, film.frames.shape[1:3])
    player = episode.c2w_to_poses(film.c2w)
    labels = wsad.infer_wsad(player[:, :3], player[:, 4], player[:, 3])
    keyboard, mouse, valid = (values[:T] for values in labels)

    place = "a place filmed by a moving camera"
    return Episode(
        video=film.frames[:T],
        c2w=film.c2w[:T].astype(np.float32),
        K=K[:T].astype(np.float32),
        keyboard=keyboard.astype(np.uint8),
        mouse=mouse.astype(np.float32),
        valid=valid & (np.arange(T) < T - 1),
        contact=np.zeros(T, bool),
        player=player[:T].astype(np.float32),
        prompt=prompt.caption(place, keyboard, mouse, player[:T], film.source),
        meta={
            "source": film.source,
            "view": "first",
            "metric": False,
            "fps": 16,
            "action_source": "inferred",
        },
    )


# ---- five sets ---------------------------------------------------------------------------------------------


def read_re10k(path: Path, size: Size | None = None) -> Episode:
    """RealEstate10K `<id>.txt`: intrinsics as shares in columns 1-4, w2c in columns 7-18."""
    rows = np.loadtxt(path, skiprows=1, ndmin=2)
    if rows.shape[1] != 19:
        found = f"found {rows.shape[1]}"
        raise ValueError(f"{path}: expected 19 columns after the first line, {found}")
    images = path.with_suffix("")
    film = images if images.is_dir() else path.with_suffix(".mp4")
    frames, native = read_video(film, size)
    poses = rows[:, 7:].reshape(-1, 3, 4)
    w2c = square(poses)
    K = in_pixels(rows[:, 1:5], native)
    return to_episode(Footage(frames, native, np.linalg.inv(w2c), K, "RealEstate10K"))


def read_dl3dv(path: Path, size: Size | None = None) -> Episode:
    """DL3DV-10K scene folder: c2w in OpenGL axes, world z up; images stay distorted."""
    info = json.loads((path / "transforms.json").read_text())
    rows = sorted(info["frames"], key=image_of)
    smaller = (path / f"images_{divisor}" for divisor in (8, 4, 2))
    folder = next((found for found in smaller if found.is_dir()), path / "images")
    files = [folder / Path(image_of(row)).name for row in rows]
    frames, native = read_video(files, size)

    poses = np.array([row["transform_matrix"] for row in rows])
    c2w = Z_UP_TO_Y_DOWN @ poses @ OPENGL_TO_OPENCV
    # of the full size, which the images are a fraction of
    pixels = np.array([info["fl_x"], info["fl_y"], info["cx"], info["cy"]])
    shares = pixels / [info["w"], info["h"], info["w"], info["h"]]
    K = in_pixels(shares, native)
    return to_episode(Footage(frames, native, c2w, K, "DL3DV-10K"))


def image_of(row: dict) -> str:
    return row["file_path"]


def read_omniworld(path: Path, size: Size | None = None, split: int = 0) -> Episode:
    """OmniWorld Game or CityWalk scene: w2c quaternions as w x y z, a focal length per frame."""
    camera = path / "camera" / f"split_{split}.json"
    if not camera.is_file():
        help = "a CityWalk archive may hold another form: convert it to ViPE files first"
        raise ValueError(f"{path}: no camera/split_{split}.json; {help}")
    cam = json.loads(camera.read_text())
    numbers = json.loads((path / "split_info.json").read_text())["split"][split]
    files = [path / "color" / f"{number:06d}.png" for number in numbers]
    frames, native = read_video(files, size)

    x_y_z_w = np.array(cam["quats"])[:, [1, 2, 3, 0]]
    w2c = quaternion_to_matrix(x_y_z_w, cam["trans"])
    middle = cam["cx"], cam["cy"]
    K = np.array([[f, f, *middle] for f in cam["focals"]])
    return to_episode(Footage(frames, native, np.linalg.inv(w2c), K, "OmniWorld"))


def read_spatialvid(path: Path, size: Size | None = None) -> Episode:
    """SpatialVID-HQ `annotations/group_x/<id>/`: w2c [t, q x y z w] of some frames, K as shares."""
    group = path.parent.name
    film = path.parents[2] / "videos" / group / f"{path.name}.mp4"
    frames, native = read_video(film, size)
    rows = np.load(path / "poses.npy")
    indexes = np.loadtxt(path / "indexes.txt", ndmin=2)
    times = indexes[:, 1]
    every = np.arange(len(frames))

    w2c = quaternion_to_matrix(rows[:, 3:], rows[:, :3])
    c2w = interpolate(np.linalg.inv(w2c), times, every)
    shares = of_nearest(np.load(path / "intrinsics.npy"), times, every)
    K = in_pixels(shares, native)
    return to_episode(Footage(frames, native, c2w, K, "SpatialVID-HQ"))


def read_vipe(path: Path, size: Size | None = None) -> Episode:
    """ViPE `<base>/pose/<name>.npz` and its neighbours: c2w, pixels; poses of some frames or of all."""
    base = path.parents[1]
    name = path.stem
    kinds = base / "intrinsics" / f"{name}_camera.txt"
    types = set(kinds.read_text().split()[1::2])
    if types != {"PINHOLE"}:
        raise ValueError(f"{kinds}: only PINHOLE cameras can be read, found {sorted(types)}")
    poses, pose_times = read_vipe_array(base / "pose" / f"{name}.npz")
    K, K_times = read_vipe_array(base / "intrinsics" / f"{name}.npz")

    film = base / "rgb" / f"{name}.npy"  # ours
    if not film.exists():  # ViPE itself writes an mp4
        film = film.with_suffix(".mp4")
    frames, native = read_video(film, size)
    every = np.arange(len(frames))
    c2w = interpolate(square(poses), pose_times, every)
    return to_episode(Footage(frames, native, c2w, of_nearest(K, K_times, every), "ViPE"))


def read_vipe_array(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The values, and the frames they belong to; without those, to every frame."""
    with np.load(file) as stored:
        data = stored["data"]
        if "inds" in stored:
            return data, stored["inds"]
        return data, np.arange(len(data))


READERS = {
    "re10k": read_re10k,
    "dl3dv": read_dl3dv,
    "omniworld": read_omniworld,
    "spatialvid": read_spatialvid,
    "vipe": read_vipe,
}


def read(format: str, path: Path, size: Size) -> Episode:
    """By the name of its set; a file that is not in its layout is named."""
    path = Path(os.path.abspath(path))  # a layout may be looked for in the folders above
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is neither a file nor a folder")
    try:
        return READERS[format](path, size)
    except Exception as error:  # a stranger's files can make a reader say anything
        if isinstance(error, ValueError | OSError) and str(path) in str(error):
            raise
        reason = f"{type(error).__name__} {error}"
        raise ValueError(f"{path} is not in the layout of {format}: {reason}") from error
