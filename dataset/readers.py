"""Real footage as episodes: the public sets that the paper names."""

import json
from pathlib import Path

import numpy as np

from dataset import episode, prompt, wsad
from dataset.episode import Episode

Z_UP_TO_Y_DOWN = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # world axes


def _square(poses: np.ndarray) -> np.ndarray:  # (N, 3|4, 4) → (N, 4, 4) float64
    poses = np.asarray(poses, float)
    return np.concatenate(
        [poses[:, :3], np.broadcast_to([[[0, 0, 0, 1.0]]], (len(poses), 1, 4))], 1
    )


def quaternion_to_matrix(
    q: np.ndarray, t: np.ndarray
) -> np.ndarray:  # (N, 4) as x y z w, (N, 3) → (N, 4, 4)
    q = q / np.linalg.norm(q, axis=1, keepdims=True)
    V, w = np.cross(np.eye(3), q[:, None, :3]), q[:, 3:, None]  # [v]×
    return _square(
        np.concatenate([np.eye(3) + 2 * w * V + 2 * V @ V, np.asarray(t, float)[:, :, None]], 2)
    )


def interpolate(
    c2w: np.ndarray, times: np.ndarray, at: np.ndarray
) -> np.ndarray:  # (N, 4, 4), (N,), (T,) → (T, 4, 4)
    """Cameras at other moments: positions on the straight line, rotations on the shortest arc (slerp), ends held."""
    if len(c2w) < 2 or np.any(np.diff(times) <= 0):
        raise ValueError(
            f"interpolation needs at least 2 poses at increasing times, got {len(c2w)}"
        )
    i = np.clip(np.searchsorted(times, at, side="right") - 1, 0, len(times) - 2)
    share, a, b = np.clip((at - times[i]) / (times[i + 1] - times[i]), 0, 1), c2w[i], c2w[i + 1]
    turn = a[:, :3, :3].transpose(0, 2, 1) @ b[:, :3, :3]  # R = exp(θ [n]×)
    N = (turn - turn.transpose(0, 2, 1)) / 2  # sin θ [n]×
    sine = np.sqrt((N**2).sum((1, 2)) / 2)
    part = (share * np.arctan2(sine, (turn.trace(axis1=1, axis2=2) - 1) / 2))[:, None, None]
    N /= np.maximum(sine, 1e-12)[:, None, None]
    step = np.eye(3) + np.sin(part) * N + (1 - np.cos(part)) * N @ N  # exp(s θ [n]×)
    p = a[:, :3, 3:] + share[:, None, None] * (b[:, :3, 3:] - a[:, :3, 3:])
    return _square(np.concatenate([a[:, :3, :3] @ step, p], 2))


def _clip(
    video: tuple,
    c2w: np.ndarray,
    K: np.ndarray,
    source: str,
    shares: bool = False,
    text: str = "",
) -> Episode:
    """What every reader ends with: 4k+1 frames, intrinsics of the stored size, keys inferred from the poses."""
    (frames, native), K = video, np.asarray(K, float)
    K = (
        np.stack([K[..., 0, 0], K[..., 1, 1], K[..., 0, 2], K[..., 1, 2]], -1)
        if K.shape[-2:] == (3, 3)
        else K
    )
    K = np.broadcast_to(K * ([*native[::-1]] * 2 if shares else 1), (len(c2w), 4))
    if len(frames) != len(c2w):
        raise ValueError(f"{source}: {len(frames)} frames but {len(c2w)} poses")
    T, player, scale = (
        (len(frames) - 1) // 4 * 4 + 1,
        episode.c2w_to_poses(c2w),
        max(np.divide(frames.shape[1:3], native)),
    )
    K = np.concatenate(
        [
            K[:, :2] * scale,
            (K[:, 2:] - np.divide(native[::-1], 2)) * scale + np.divide(frames.shape[2:0:-1], 2),
        ],
        1,
    )
    keyboard, mouse, valid = (
        x[:T] for x in wsad.infer_wsad(player[:, :3], player[:, 4], player[:, 3])
    )
    meta = {
        "source": source,
        "view": "first",
        "metric": False,
        "fps": 16,
        "action_source": "inferred",
    }
    words = prompt.caption(
        text or "a place filmed by a moving camera", keyboard, mouse, player[:T], source
    )
    return Episode(
        frames[:T],
        c2w[:T].astype(np.float32),
        K[:T].astype(np.float32),
        keyboard.astype(np.uint8),
        mouse.astype(np.float32),
        valid & (np.arange(T) < T - 1),
        np.zeros(T, bool),
        player[:T].astype(np.float32),
        words,
        meta,
    )


_beside = lambda path: (
    path.with_suffix("") if path.with_suffix("").is_dir() else path.with_suffix(".mp4")
)  # images or a film


def read_re10k(path: Path, size: tuple | None = None) -> Episode:
    """RealEstate10K `<id>.txt`: w2c, intrinsics as shares of the size in columns 1-4, pose in columns 7-18."""
    rows = np.loadtxt(path, skiprows=1, ndmin=2)
    if rows.shape[1] != 19:
        raise ValueError(f"{path}: expected 19 columns after the first line, found {rows.shape[1]}")
    return _clip(
        episode.read_video(_beside(path), size),
        np.linalg.inv(_square(rows[:, 7:].reshape(-1, 3, 4))),
        rows[:, 1:5],
        "RealEstate10K",
        shares=True,
    )


def read_dl3dv(path: Path, size: tuple | None = None) -> Episode:
    """DL3DV-10K scene folder: c2w in OpenGL axes, world z up; intrinsics of the full size, images stay distorted."""
    info = json.loads((path / "transforms.json").read_text())
    rows = sorted(info["frames"], key=lambda row: row["file_path"])
    folder = next(
        (path / name for name in ("images_8", "images_4", "images_2") if (path / name).is_dir()),
        path / "images",
    )
    c2w = (
        Z_UP_TO_Y_DOWN
        @ np.array([row["transform_matrix"] for row in rows])
        @ np.diag([1, -1, -1, 1])
    )  # OpenGL's y is up, it looks along −z
    K = np.array(
        [
            info["fl_x"] / info["w"],
            info["fl_y"] / info["h"],
            info["cx"] / info["w"],
            info["cy"] / info["h"],
        ]
    )
    return _clip(
        episode.read_video([folder / Path(row["file_path"]).name for row in rows], size),
        c2w,
        K,
        "DL3DV-10K",
        shares=True,
    )


def read_omniworld(path: Path, size: tuple | None = None, split: int = 0) -> Episode:
    """OmniWorld Game or CityWalk scene folder: w2c quaternions in the order w x y z, a focal length per frame."""
    camera = path / "camera" / f"split_{split}.json"
    if not camera.is_file():
        raise ValueError(
            f"{path}: no camera/split_{split}.json; a CityWalk archive may hold another form: convert it to ViPE files first"
        )
    cam, frames = (
        json.loads(camera.read_text()),
        json.loads((path / "split_info.json").read_text())["split"][split],
    )
    c2w = np.linalg.inv(quaternion_to_matrix(np.array(cam["quats"])[:, [1, 2, 3, 0]], cam["trans"]))
    video, K = (
        episode.read_video([path / "color" / f"{i:06d}.png" for i in frames], size),
        np.array([[f, f, cam["cx"], cam["cy"]] for f in cam["focals"]]),
    )
    return _clip(video, c2w, K, "OmniWorld")


def read_spatialvid(path: Path, size: tuple | None = None) -> Episode:
    """SpatialVID-HQ `annotations/group_x/<id>/`: w2c [t, q x y z w] of some frames only (slerp fills), K as shares."""
    video = episode.read_video(
        path.parents[2] / "videos" / path.parent.name / f"{path.name}.mp4", size
    )
    rows, at, every = (
        np.load(path / "poses.npy"),
        np.loadtxt(path / "indexes.txt", ndmin=2)[:, 1],
        np.arange(len(video[0])),
    )
    c2w = interpolate(np.linalg.inv(quaternion_to_matrix(rows[:, 3:], rows[:, :3])), at, every)
    K = np.load(path / "intrinsics.npy")[np.abs(every[:, None] - at).argmin(1)]
    return _clip(video, c2w, K, "SpatialVID-HQ", shares=True)


def read_vipe(path: Path, size: tuple | None = None) -> Episode:
    """ViPE `<base>/pose/<name>.npz` and its neighbours: c2w, pixels; `inds` may be missing or skip frames (slerp fills)."""
    base, name, got = path.parents[1], path.stem, []
    types = set((base / "intrinsics" / f"{name}_camera.txt").read_text().split()[1::2])
    if types != {"PINHOLE"}:
        raise ValueError(
            f"{base}/intrinsics/{name}_camera.txt: only PINHOLE cameras can be read, found {sorted(types)}"
        )
    for folder in ("pose", "intrinsics"):
        with np.load(base / folder / f"{name}.npz") as stored:
            got += [
                stored["data"],
                stored["inds"] if "inds" in stored else np.arange(len(stored["data"])),
            ]
    frames = base / "rgb" / f"{name}.npy"  # ours; ViPE itself writes an mp4
    video = (
        (np.load(frames), np.load(frames, mmap_mode="r").shape[1:3])
        if frames.exists()
        else episode.read_video(frames.with_suffix(".mp4"), size)
    )
    every = np.arange(len(video[0]))
    return _clip(
        video,
        interpolate(_square(got[0]), got[1], every),
        got[2][np.abs(every[:, None] - got[3]).argmin(1)],
        "ViPE",
    )


READERS = {
    "re10k": read_re10k,
    "dl3dv": read_dl3dv,
    "omniworld": read_omniworld,
    "spatialvid": read_spatialvid,
    "vipe": read_vipe,
}
