"""One clip on disk: video, poses, actions, words; and films."""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import camera
from dataset import wsad

ARRAYS = {  # file of an episode → its arrays: dtype, shape after T; the only one of a file is stored as `data`
    "pose/video.npz": {"c2w": ("f4", (4, 4))},
    "intrinsics/video.npz": {"K": ("f4", (4,))},
    "player/video.npz": {"player": ("f4", (5,))},
    "action/video.npz": {
        "keyboard": ("u1", (6,)),
        "mouse": ("f4", (2,)),
        "valid": ("?", ()),
        "contact": ("?", ()),
    },
}
_key = lambda arrays, name: name if len(arrays) > 1 else "data"
_sha256 = lambda path: hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"


def poses_to_c2w(pose5: np.ndarray) -> np.ndarray:  # (T, 5) → (T, 4, 4) float64
    return camera.pose_to_c2w(torch.as_tensor(np.asarray(pose5, float))).numpy()


def c2w_to_poses(c2w: np.ndarray) -> np.ndarray:  # (T, 4, 4) → (T, 5), yaw unwrapped
    pose5 = camera.c2w_to_pose(torch.as_tensor(np.asarray(c2w, float))).numpy()
    return np.concatenate([pose5[:, :4], np.unwrap(pose5[:, 4:], period=360, axis=0)], 1)


def in_unit_range(
    frames: np.ndarray | Tensor,
) -> Tensor:  # (..., H, W, 3) uint8 or float in [0, 1] → (N, 3, H, W) float32
    x = torch.as_tensor(frames)
    if x.ndim < 3 or x.shape[-1] != 3:
        raise ValueError(
            f"frames must be (..., H, W, 3), uint8 or float in [0, 1], got {tuple(x.shape)}"
        )
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    return x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2)


def psnr(
    pred: np.ndarray | Tensor, true: np.ndarray | Tensor, mask: np.ndarray | Tensor | None = None
) -> Tensor:  # (N,)
    """Decibels per frame, at most 50; with a mask (N, H, W) the error is averaged over its pixels only."""
    error = (in_unit_range(pred) - in_unit_range(true)).square().mean(1)  # (N, H, W)
    weight = (
        torch.ones_like(error)
        if mask is None
        else torch.as_tensor(mask).reshape(error.shape).float()
    )
    mse = (error * weight).sum((1, 2)) / weight.sum((1, 2))
    return -10 * mse.clamp_min(1e-5).log10()  # 10 log10(1 / MSE)


_uint8 = lambda frames: (
    (in_unit_range(frames).clamp(0, 1) * 255)
    .round()
    .byte()
    .permute(0, 2, 3, 1)
    .contiguous()
    .numpy()
)


def write_png(
    path: Path, image: np.ndarray | Tensor
) -> None:  # (H, W, 3), uint8 or float in [0, 1]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_uint8(image)[0]).save(path)


def write_mp4(path: Path, frames: np.ndarray | Tensor, fps: int = 16, crf: int = 12) -> None:
    """Frames → mp4 with full colour resolution; crf 12 keeps about 34 dB of 64×64 frames, 0 nearly everything."""
    height, width = _uint8(frames[:1]).shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(
            f"mp4 needs even sizes, got {width}x{height}; nearest legal size: {width + width % 2}x{height + height % 2}"
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"crf": str(crf), "preset": "veryfast", "threads": "1"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_uint8(frame)[0])))
        container.mux(stream.encode())


def read_video(
    source: Path | Sequence[Path], size: tuple[int, int] | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """An mp4, a folder of images or a list of them → (T, H, W, 3) uint8, centre-cropped to size, and the native (h, w)."""
    pictures = (
        sorted(source.glob("*.[pj][np]*g"))
        if isinstance(source, Path) and source.is_dir()
        else source
    )
    if absent := [
        p
        for p in ([pictures] if isinstance(pictures, Path) else pictures or [source / "*.png"])
        if not p.is_file()
    ]:
        raise ValueError(f"frames of this clip are missing: no {absent[0]}")
    movie, frames = av.open(str(pictures)) if isinstance(pictures, Path) else None, []
    for image in (
        (frame.to_image() for frame in movie.decode(video=0))
        if movie
        else (Image.open(p).convert("RGB") for p in pictures)
    ):
        (w, h), (H, W) = image.size, size or image.size[::-1]
        scale = max(H / h, W / w)  # crop the middle, then resize
        box = ((w - W / scale) / 2, (h - H / scale) / 2, (w + W / scale) / 2, (h + H / scale) / 2)
        frames.append(
            np.asarray(
                image if (h, w) == (H, W) else image.resize((W, H), Image.Resampling.BICUBIC, box)
            )
        )
    return np.stack(frames), (h, w)


@dataclass
class Episode:
    video: np.ndarray  # (T, H, W, 3) uint8; memory-mapped when read
    c2w: np.ndarray  # (T, 4, 4) float32, camera
    K: np.ndarray  # (T, 4) float32, pixels of the stored size
    keyboard: np.ndarray  # (T, 6) uint8
    mouse: np.ndarray  # (T, 2) float32, (pitch, yaw) in units of 15°
    valid: np.ndarray  # (T,) bool: is action[t] known?
    contact: np.ndarray  # (T,) bool: did a wall change the step from t to t+1?
    player: np.ndarray  # (T, 5) float32, pose of the player (first person: of the camera)
    prompt: dict  # {"detailed": [{start, end, prompt}], "simple": {level: text}}, see `caption`
    meta: dict  # source, view, metric, fps, action_source, scene, behaviour, ...
    path: Path | None = None

    @property
    def text(self) -> str:
        return self.prompt["simple"][
            "scene"
        ]  # what a model is conditioned on: what can be seen, never what is pressed


def problems(e: Episode) -> list[str]:
    """Everything that makes an episode unusable, as text; empty for a good one."""
    if e.video.ndim != 4 or e.video.shape[-1] != 3 or e.video.dtype != np.uint8:
        return [f"rgb: expected (T, H, W, 3) uint8, found {e.video.shape} {e.video.dtype}"]
    T, H, W, _ = e.video.shape
    found = (
        [f"rgb: expected 4k+1 frames, found {T}; cut to {max(1, (T - 1) // 4 * 4 + 1)}"]
        if T % 4 != 1
        else []
    )
    found += [f"rgb: expected sizes in multiples of 16, found {W}x{H}"] if H % 16 or W % 16 else []
    for label, value, shape in (
        (f"{file}[{_key(a, name)}]", getattr(e, name), (T, *a[name][1]))
        for file, a in ARRAYS.items()
        for name in a
    ):
        if value.shape != shape:
            found.append(f"{label}: expected {shape}, found {value.shape}")
        elif not np.isfinite(value).all():
            found.append(
                f"{label}: NaN or infinite at frame {int(np.argwhere(~np.isfinite(value))[0, 0])}"
            )
    if found:
        return found
    bad = np.flatnonzero(~camera.is_rigid(torch.as_tensor(e.c2w), 1e-3).numpy())
    away = lambda c2w: float(
        np.linalg.norm(c2w[:, :3, 3] - e.player[:, :3], axis=1).max()
    )  # third-person cameras stay within 6 m
    w2c = not len(bad) and away(e.c2w) > 6 and away(np.linalg.inv(e.c2w)) < 6
    return [
        text
        for wrong, text in (
            (
                len(bad),
                f"pose/video.npz: frames {bad[:3]}... of {len(bad)} are not a rotation and a position (RᵀR = I, det +1)",
            ),
            (
                not len(bad) and away(e.c2w) > 6,
                f"pose/video.npz: camera {away(e.c2w):.0f} m from the player"
                + "; this is w2c, invert it" * w2c,
            ),
            (
                e.K[:, :2].min() <= 1,
                "intrinsics/video.npz: focal lengths must be pixels; multiply shares by the width and height",
            ),
            (
                e.keyboard.max() > 1,
                f"action/video.npz[keyboard]: expected 0 or 1, found {e.keyboard.max()}",
            ),
        )
        if wrong
    ]


def write_episode(path: Path, episode: Episode) -> Path:
    """Write into a hidden neighbour, then rename: an episode is there whole or not at all. ViPE's tools read pose and intrinsics."""
    path, wrong = Path(path), problems(episode)
    if wrong:
        raise ValueError(f"{path} not written: " + "; ".join(wrong))
    (T, H, W, _), draft = episode.video.shape, path.parent / f".{path.name}.part"
    shutil.rmtree(draft, ignore_errors=True)
    for folder in ("rgb", "prompt", *(Path(file).parent for file in ARRAYS)):
        (draft / folder).mkdir(parents=True)
    np.save(draft / "rgb/video.npy", episode.video)
    for file, arrays in ARRAYS.items():
        values = {
            _key(arrays, name): getattr(episode, name).astype(dtype)
            for name, (dtype, _) in arrays.items()
        }
        np.savez(draft / file, **values, inds=np.arange(T), time=np.arange(T) / episode.meta["fps"])
    (draft / "intrinsics/video_camera.txt").write_text("".join(f"{t}: PINHOLE\n" for t in range(T)))
    (draft / "prompt/video.json").write_text(json.dumps(episode.prompt, indent=1))
    sums = {str(file.relative_to(draft)): _sha256(file) for file in sorted(draft.glob("*/*"))}
    meta = {**episode.meta, "schema": 1, "T": T, "H": H, "W": W, "sha256": sums}
    (draft / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
    (draft / "_DONE").write_text(_sha256(draft / "meta.json"))
    shutil.rmtree(path, ignore_errors=True)
    os.replace(draft, path)
    return path


def inspect(path: Path, hashes: bool = False) -> tuple[Episode | None, list[str]]:
    """Read a folder and name all that is wrong with it; hashes also find what was changed after writing."""
    path, arrays = Path(path), {}
    if not (path / "_DONE").is_file():
        return None, ["no file _DONE: not an episode, or one that was never finished"]
    try:
        meta, prompt = (
            json.loads((path / file).read_text()) for file in ("meta.json", "prompt/video.json")
        )
        for file, keys in ARRAYS.items():
            with np.load(path / file) as stored:
                arrays |= {
                    name: stored[_key(keys, name)].astype(dtype, copy=False)
                    for name, (dtype, _) in keys.items()
                }
        video = np.load(path / "rgb/video.npy", mmap_mode="r")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        return None, [f"cannot be read: {type(error).__name__}: {error}"]
    sums = {**meta.get("sha256", {}), "meta.json": (path / "_DONE").read_text()} if hashes else {}
    found = [
        f"{file}: changed since it was written"
        for file, sha in sums.items()
        if _sha256(path / file) != sha
    ]
    if video.shape[:3] != (meta.get("T"), meta.get("H"), meta.get("W")):
        found.append(
            f"rgb: meta.json says {[meta.get(k) for k in 'THW']} frames, height, width; found {list(video.shape[:3])}"
        )
    episode = Episode(video, **arrays, prompt=prompt, meta=meta, path=path)
    return episode, found + problems(episode)


def read_episode(path: Path) -> Episode:
    """One episode, frames memory-mapped; a bad one is an error that says what is wrong with which file."""
    episode, wrong = inspect(path)
    if wrong:
        raise ValueError(f"{path}: " + "; ".join(wrong))
    return episode


def list_episodes(root: Path | str, split: str | None = None) -> list[Path]:
    """All finished episodes at or below a folder, sorted; half-written ones are never listed."""
    base = Path(root) / (split or "")
    found = sorted(
        p.parent
        for pattern in ("", "*/", "*/*/")
        for p in base.glob(f"{pattern}_DONE")
        if not p.parent.name.startswith(".")
    )
    if not found:
        raise ValueError(
            f"no episodes in {base}; make some with: python data.py make --preset tiny --out {root}"
        )
    return found


def picture_stats(video: np.ndarray) -> dict[str, float]:
    """Mean brightness, contrast and sharpness (0-1) of every second row, and the longest run of unchanged frames."""
    grey = video[:, ::2, :, 1].astype(np.float32) / 255  # (T, H/2, W): green is nearly luminance
    changed = np.flatnonzero(np.append(np.abs(np.diff(grey, axis=0)).mean((1, 2)) > 1e-4, True))
    return {
        "brightness": float(grey.mean()),
        "contrast": float(grey.std((1, 2)).mean()),
        "sharpness": float(np.abs(np.diff(grey, axis=2)).mean()),
        "frozen": int(np.diff(changed, prepend=-1).max() - 1),
    }


def filters(e: Episode, see: dict[str, float] | None = None) -> list[str]:
    """Why a clip should not be trained on: jumps, spins, freezes, unusable pictures, too few labels. The thresholds are ours."""
    see, step = (
        see or picture_stats(e.video),
        np.linalg.norm(np.diff(e.player[:, :3], axis=0), axis=1),
    )
    v0 = (
        camera.STEP if e.meta["metric"] else float(np.median(step[step > 0])) if step.any() else 1.0
    )
    turn, known = (
        np.abs(wsad.wrap(np.diff(e.player[:, 3:].astype(float), axis=0))).max(),
        e.valid[:-1].mean(),
    )
    return [
        text
        for bad, text in (
            (
                step.max() > 3 * v0,
                f"teleport: a step of {step.max() / v0:.1f} times the usual length",
            ),
            (turn > 15.01, f"spin: {turn:.0f} degrees in one frame"),
            (see["frozen"] > 30, f"frozen: {see['frozen']} frames in a row do not change"),
            (
                not 0.04 < see["brightness"] < 0.97,
                f"too dark or too bright: mean {see['brightness']:.2f}",
            ),
            (see["contrast"] < 0.02, f"no contrast: deviation {see['contrast']:.3f}"),
            (see["sharpness"] < 0.002, f"blurred: mean gradient {see['sharpness']:.4f}"),
            (known < 0.5, f"labels: only {known:.0%} of the actions are known"),
        )
        if bad
    ]
