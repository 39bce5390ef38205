"""Keep video, pose, action and prompt together, recorded in the game or read from real footage.

Paper: §4, the data engine; nothing of it is released. An episode is its quadruplet, T = 4k+1 frames, a folder in ViPE's layout:
    video[t]; c2w[t] = [Ry(yaw) Rx(pitch) | p], x right, y DOWN, z forward, metres; K[t] = (fx, fy, cx, cy) pixels, centres at +.5
    keyboard[t], mouse[t]: what was done between frame t and t+1 (valid[t]: known);  prompt: four levels of words, `text` is the model's

Keys from positions (§4, games that log no keys), heading y, position P on the ground:
    y' = y_t + wrap(y_{t+1} − y_t)/2        mid yaw: immune to the seam at ±180°
    d  = P_{t+1} − P_t ;  f = d·forward(y') ;  r = d·right(y') ;  s = hypot(f, r)
    W, S, A, D = the 45° sector of (f, r) if s > 0.35 v0 ;  valid = the step is as long and as straight as a walk
A label means effective motion: who pushes head-on against a wall cannot be told from one who presses nothing.

Ours: caption levels, filter thresholds, the recorder's clocks, an own umT5 (only its tokeniser is optional). Frames are a memory-mapped
.npy (H.264 leaves 22 dB at 64×64). Depth is not stored: `true_views` renders it for any camera.

    python data.py make --preset tiny               render the default dataset; run again to continue after a stop
    python data.py record --out DIR                 an agent plays the running game, four layers record it
    python data.py ingest --format re10k FILES      read a public dataset
    python data.py explore                          compare the explorers on held-out scenes
    python data.py check DIR                        name every bad clip; exit code 2 if there is one
    python data.py view DIR                         view.mp4: frames, keys, map, depth
Demo: python data.py      Tests: pytest tests/test_data.py
"""

import argparse
import collections
import colorsys
import functools
import hashlib
import html
import json
import math
import multiprocessing
import os
import queue
import shutil
import threading
import zipfile
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import memory
import world


# ---------------------------------------------------------------------------------------------------------------- config
@dataclass(frozen=True)
class DataConfig:
    size: int = 64  # pixels, square
    frames: int = 241  # 4k+1: 60 latents + 1, 15 s at 16 fps
    train: int = 600  # first-person episodes, each in a scene of its own
    third: int = 100  # third-person episodes, a split of their own
    tune: int = 32  # held-out scenes for choosing settings
    test: int = 64  # held-out scenes for reported numbers
    seed: int = 0  # of behaviour and characters; scenes are numbered by split


PRESETS = {
    "micro": DataConfig(frames=81, train=4, third=1, tune=1, test=1),
    "tiny": DataConfig(),
    "small": DataConfig(size=128),
}
FIRST_SCENE = {split: world.SPLITS[split].start for split in ("train", "tune", "test")} | {
    "third": 50_000
}  # no scene in two splits
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
_place = lambda root, split, index: root / split / f"{FIRST_SCENE[split] + index:06d}_{index:06d}"
_sha256 = lambda path: hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"
_rms_norm = lambda x, weight: (
    weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
)
_wrap = lambda degrees: (degrees + 180) % 360 - 180
# ---------------------------------------------------------------------------------------------------------------- action
LOOK = {
    "i": (0.1, 0.0),
    "k": (-0.1, 0.0),
    "j": (0.0, -0.1),
    "l": (0.0, 0.1),
}  # (pitch, yaw), 0.1 = 1.5° per frame


def parse_keys(
    chord: str,
) -> tuple[tuple[float, ...], tuple[float, ...]]:  # keyboard (6,), mouse (2,)
    """The action of one frame from its held keys: "w+l" walks forward and turns right, "_" does nothing."""
    keys = {key.strip() for key in chord.split("+")} - {"_"}
    if unknown := sorted(keys - {*memory.KEYS[:4], *LOOK}):
        raise ValueError(
            f"unknown key {unknown[0]!r} in {chord!r}; use w a s d (move), i j k l (look), + to combine, _ for nothing"
        )
    return tuple(float(key in keys) for key in memory.KEYS), tuple(
        sum(LOOK[key][axis] for key in keys & {*LOOK}) for axis in (0, 1)
    )


def actions_from_keys(
    chords: Sequence[str],
) -> tuple[Tensor, Tensor]:  # keyboard (F, 6), mouse (F, 2)
    actions = [parse_keys(chord) for chord in chords]
    return torch.tensor([a[0] for a in actions]).reshape(-1, 6), torch.tensor(
        [a[1] for a in actions]
    ).reshape(-1, 2)


def keys_from_action(keyboard: Sequence[float], mouse: Sequence[float]) -> str:
    """The chord that an action shows: what a viewer prints over a frame."""
    held = [key for key, on in zip(memory.KEYS, keyboard, strict=True) if on > 0.5]
    held += [
        key
        for key, (pitch, yaw) in LOOK.items()
        if pitch * mouse[0] + yaw * mouse[1] > 0.1 * memory.DEAD_ZONE
    ]
    return "+".join(held) or "_"


# --------------------------------------------------------------------------------------------- keys from positions (WSAD)
# keyboard (T, 6) uint8, mouse (T, 2) float32, valid (T,) bool: the last row moves nothing and is never valid
Labels = collections.namedtuple("Labels", "keyboard mouse valid")


def _project(
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
    xz, dyaw = position[:, [0, 2]].astype(float), _wrap(np.diff(yaw.astype(float)))
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
    f, r = _project(d, yaw[:-1] + dyaw / 2)  # y' = y_t + Δy/2
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
    mouse[:-1] = np.stack([np.diff(pitch.astype(float)), dyaw], 1) / memory.DEGREES
    mouse[np.abs(mouse) < memory.DEAD_ZONE] = 0
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


# ------------------------------------------------------------------------------------------------------ poses and frames
def poses_to_c2w(pose5: np.ndarray) -> np.ndarray:  # (T, 5) → (T, 4, 4) float64
    return memory.pose_to_c2w(torch.as_tensor(np.asarray(pose5, float))).numpy()


def c2w_to_poses(c2w: np.ndarray) -> np.ndarray:  # (T, 4, 4) → (T, 5), yaw unwrapped
    pose5 = memory.c2w_to_pose(torch.as_tensor(np.asarray(c2w, float))).numpy()
    return np.concatenate([pose5[:, :4], np.unwrap(pose5[:, 4:], period=360, axis=0)], 1)


def _unit(
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
    error = (_unit(pred) - _unit(true)).square().mean(1)  # (N, H, W)
    weight = (
        torch.ones_like(error)
        if mask is None
        else torch.as_tensor(mask).reshape(error.shape).float()
    )
    mse = (error * weight).sum((1, 2)) / weight.sum((1, 2))
    return -10 * mse.clamp_min(1e-5).log10()  # 10 log10(1 / MSE)


def ssim(pred: np.ndarray | Tensor, true: np.ndarray | Tensor) -> Tensor:  # (N,)
    """Structural similarity of the grey frames: 7×7 uniform window, biased variances, C1 = 1e-4, C2 = 9e-4."""
    a, b = _unit(pred).mean(1, keepdim=True).double(), _unit(true).mean(1, keepdim=True).double()
    ma, mb, aa, bb, ab = (F.avg_pool2d(x, 7, 1) for x in (a, b, a * a, b * b, a * b))
    score = (
        (2 * ma * mb + 1e-4)
        * (2 * (ab - ma * mb) + 9e-4)
        / ((ma**2 + mb**2 + 1e-4) * (aa - ma**2 + bb - mb**2 + 9e-4))
    )
    return score.mean((1, 2, 3)).float()


_bytes = lambda frames: (
    (_unit(frames).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
)


def write_png(
    path: Path, image: np.ndarray | Tensor
) -> None:  # (H, W, 3), uint8 or float in [0, 1]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_bytes(image)[0]).save(path)


def write_mp4(path: Path, frames: np.ndarray | Tensor, fps: int = 16, crf: int = 12) -> None:
    """Frames → mp4 with full colour resolution; crf 12 keeps about 34 dB of 64×64 frames, 0 nearly everything."""
    height, width = _bytes(frames[:1]).shape[1:3]
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
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_bytes(frame)[0])))
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


# --------------------------------------------------------------------------------------------------------------- episode
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
    bad = np.flatnonzero(~memory.is_rigid(torch.as_tensor(e.c2w), 1e-3).numpy())
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


# ----------------------------------------------------------------------------------------------------------------- words
def embed_prompt(text: str, dim: int, length: int) -> Tensor:  # (length, dim)
    """Words as fixed pseudo-random vectors of unit variance, zeros after the last: what `tiny` uses instead of umT5."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()[:length]
    table = np.array(
        [np.frombuffer(hashlib.shake_128(word.encode()).digest(2 * dim), "<u2") for word in words],
        np.float32,
    )
    return F.pad(
        torch.from_numpy(table.reshape(-1, dim) / 65535 - 0.5) * math.sqrt(12),
        (0, 0, 0, length - len(words)),
    )


def umt5(
    weights: dict[str, Tensor], ids: Tensor, mask: Tensor
) -> Tensor:  # (B, L), (B, L) → (B, L, D)
    """The umT5 encoder under the released key names. Not T5: every layer has a position bias of its own; no 1/√d scaling."""
    x = weights["token_embedding.weight"][ids]
    delta = torch.arange(ids.shape[1])[None, :] - torch.arange(ids.shape[1])[:, None]  # key − query
    far = 8 + (delta.abs().clamp_min(1).float().div(8).log() / math.log(128 / 8) * 8).long()
    bucket = 16 * (delta > 0) + torch.where(delta.abs() < 8, delta.abs(), far.clamp_max(15))
    for i in range(sum(key.endswith("norm1.weight") for key in weights)):
        w = {
            key.removeprefix(f"blocks.{i}."): value
            for key, value in weights.items()
            if key.startswith(f"blocks.{i}.")
        }
        n, bias = (
            _rms_norm(x, w["norm1.weight"]),
            w["pos_embedding.embedding.weight"][bucket].permute(2, 0, 1),
        )  # (heads, L, L)
        q, k, v = (
            F.linear(n, w[f"attn.{name}.weight"]).unflatten(-1, (len(bias), -1)).transpose(1, 2)
            for name in "qkv"
        )
        logits = (q @ k.mT + bias).masked_fill(
            mask[:, None, None, :] == 0, torch.finfo(x.dtype).min
        )
        x = x + F.linear(
            (logits.float().softmax(-1).to(x.dtype) @ v).transpose(1, 2).flatten(2),
            w["attn.o.weight"],
        )
        n = _rms_norm(x, w["norm2.weight"])
        gate = F.gelu(F.linear(n, w["ffn.gate.0.weight"]), approximate="tanh")
        x = x + F.linear(F.linear(n, w["ffn.fc1.weight"]) * gate, w["ffn.fc2.weight"])
    return _rms_norm(x, weights["norm.weight"]) * mask[:, :, None]  # rows after the prompt are 0


def encode_umt5(
    text: str, tokenizer: Path, weights: Callable[[], dict[str, Tensor]], cache: Path
) -> Tensor:  # (512, 4096)
    """A prompt for the released networks, encoded once; `weights` (11.4 GB) is only called when the cache misses."""
    text = " ".join(html.unescape(html.unescape(text)).split())
    file = Path(cache) / f"umt5-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    if not file.exists():
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(
                f"prompt {text!r} is not in {cache}; its tokeniser needs: pip install transformers sentencepiece"
            ) from error
        tokens = AutoTokenizer.from_pretrained(str(tokenizer))(
            text, max_length=512, padding="max_length", truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            embedding = umt5(weights(), tokens.input_ids, tokens.attention_mask)[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embedding": embedding.contiguous()}, f"{file}.part")
        os.replace(f"{file}.part", file)
    return load_file(file)["embedding"]


def caption(
    scene: str, keyboard: np.ndarray, mouse: np.ndarray, player: np.ndarray, tag: str
) -> dict:
    """Four levels of words from templates: tag, scene, motion, full."""
    walked, turned = (
        np.linalg.norm(np.diff(player[:, [0, 2]], axis=0), axis=1).sum(),
        float(player[-1, 4] - player[0, 4]),
    )
    way = ("forward", "backward", "to the left", "to the right")[
        int(keyboard[:, :4].sum(0).argmax())
    ]
    motion = (
        f"The camera walks {walked:.0f} m, mostly {way}"
        if walked > 0.5
        else "The camera stays in its place"
    )
    turn = f", and turns {abs(turned):.0f} degrees {'right' if turned > 0 else 'left'}"
    motion += turn if abs(turned) >= 20 else ", and looks around" if np.abs(mouse).sum() > 2 else ""
    levels = {"tag": tag, "scene": scene, "motion": motion, "full": f"{scene}. {motion}"}
    return {
        "detailed": [
            {"start": 0, "end": len(player) - 1, "prompt": {"start": scene, "dynamic": motion}}
        ],
        "simple": levels,
    }


def scene_caption(scene: world.Scene) -> str:
    """The kind of place and the colours of its two largest parts."""
    hues = (
        "red",
        "orange",
        "yellow",
        "green",
        "green",
        "teal",
        "cyan",
        "blue",
        "blue",
        "purple",
        "pink",
        "crimson",
    )
    largest, walls = (
        np.bincount(scene.region[~scene.solid]).argsort()[::-1][:2],
        scene.style["wall"],
    )
    names = [
        hues[int(colorsys.rgb_to_hsv(*walls[place % len(walls)])[0] * 12) % 12] for place in largest
    ]
    place = {
        "rooms": "rooms joined by doors",
        "maze": "a maze of corridors",
        "plaza": "an open plaza with pillars",
        "street": "a street of facades",
    }
    return f"{place[scene.kind]}, {' and '.join(dict.fromkeys(names))} walls"


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
        memory.STEP if e.meta["metric"] else float(np.median(step[step > 0])) if step.any() else 1.0
    )
    turn, known = (
        np.abs(_wrap(np.diff(e.player[:, 3:].astype(float), axis=0))).max(),
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


# --------------------------------------------------------------------------------------------- rendering a dataset (§4.1)
_scene = functools.lru_cache(maxsize=64)(world.make_scene)


def eyes(
    meta: dict, player: np.ndarray
) -> np.ndarray:  # (T, 5) → (T, 4, 4): the camera of a player there
    return world.cameras(_scene(**meta["scene"]), player, meta.get("view", "first"))


def true_views(
    meta: dict, c2w: np.ndarray | None, H: int, W: int, player: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What any camera (B, 4, 4) sees in the world an episode was recorded in: frames (B, H, W, 3) uint8, depth (B, H, W) metres.
    In third person the figure is drawn where `player` (B, 5) stands, and left out without it. c2w None: the player's own camera."""
    if "scene" not in meta:
        raise ValueError(
            f"only episodes of the embedded world can be rendered again; this one comes from {meta.get('source')}"
        )
    players = (
        (player, meta["character"]) if player is not None and meta.get("view") == "third" else None
    )
    return world.render(
        _scene(**meta["scene"]),
        eyes(meta, player) if c2w is None else c2w,
        memory.intrinsics(H, W).numpy(),
        H,
        W,
        players,
    )


def true_frames(
    meta: dict, c2w: np.ndarray | None, H: int, W: int, player: np.ndarray | None = None
) -> np.ndarray:  # (B, H, W, 3) uint8
    return true_views(meta, c2w, H, W, player)[0]


def render_episode(cfg: DataConfig, split: str, index: int) -> Episode:
    """Episode number `index` of a split: a function of its arguments alone, so that any process may make it, in any order."""
    seed = int.from_bytes(
        hashlib.sha256(f"{cfg.seed} {split} {index}".encode()).digest()[:6], "big"
    )
    view, scene = "third" if split == "third" else "first", _scene(FIRST_SCENE[split] + index)
    run = world.simulate(scene, seed, cfg.frames, view=view)
    meta = {
        "source": "world",
        "view": view,
        "scene": {"seed": scene.seed, "kind": scene.kind},
        "behaviour": run["behaviour"],
        "seed": seed,
        "character": seed % world.N_CHARACTERS if view == "third" else None,
        "metric": True,
        "action_source": "engine",
        "fps": 16,
    }
    c2w, player = (
        run["c2w"].astype(np.float32),
        run["player"].astype(np.float32),
    )  # rounded first: what is stored is what is drawn
    video, K = (
        true_frames(meta, c2w, cfg.size, cfg.size, player),
        memory.intrinsics(cfg.size, cfg.size).numpy(),
    )
    words = caption(scene_caption(scene), run["keyboard"], run["mouse"], player, scene.kind)
    episode = Episode(
        video,
        c2w,
        np.tile(K, (cfg.frames, 1)),
        run["keyboard"],
        run["mouse"],
        np.arange(cfg.frames) < cfg.frames - 1,
        run["contact"],
        player,
        words,
        meta,
    )
    meta["stats"] = (see := picture_stats(video)) | {
        "contact": float(run["contact"].mean()),
        "filters": filters(episode, see),
    }
    return episode


def _job(root: Path, cfg: DataConfig, split: str, index: int) -> None:
    write_episode(_place(root, split, index), render_episode(cfg, split, index))


def _worker() -> None:
    """A pool process: one thread, and it ends when its parent is killed instead of waiting for ever."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_dataset(
    root: Path | str,
    preset: str = "tiny",
    workers: int | None = None,
    cfg: DataConfig | None = None,
) -> Path:
    """Render every missing episode of a preset. Killed at any moment, it continues where it was, to the same bits."""
    root, cfg, failed = Path(root), cfg or PRESETS[preset], []
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # for the children's BLAS: this process has read it long ago
    for _ in range(3):  # what fails, or sits in a pool whose worker died, gets two more tries
        jobs = [
            (split, i)
            for split in FIRST_SCENE
            for i in range(getattr(cfg, split))
            if not (_place(root, split, i) / "_DONE").exists()
        ]
        if not jobs:
            return root
        pool = (
            futures.ThreadPoolExecutor(1)
            if workers <= 1
            else futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _worker)
        )
        with pool:
            running = {pool.submit(_job, root, cfg, *job): job for job in jobs}
            bar = tqdm(
                futures.as_completed(running),
                f"rendering {root}",
                len(jobs),
                unit="episode",
                mininterval=0.1 if os.isatty(2) else 10,
            )
            failed = [(*running[done], done.exception()) for done in bar if done.exception()]
    if failed:
        raise ValueError(
            f"{len(failed)} episodes failed three times, the others are in {root}; the first: {failed[0]}"
        )
    return root


# ------------------------------------------------------------------------------------- real footage: path, size → Episode
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
        c2w_to_poses(c2w),
        max(np.divide(frames.shape[1:3], native)),
    )
    K = np.concatenate(
        [
            K[:, :2] * scale,
            (K[:, 2:] - np.divide(native[::-1], 2)) * scale + np.divide(frames.shape[2:0:-1], 2),
        ],
        1,
    )
    keyboard, mouse, valid = (x[:T] for x in infer_wsad(player[:, :3], player[:, 4], player[:, 3]))
    meta = {
        "source": source,
        "view": "first",
        "metric": False,
        "fps": 16,
        "action_source": "inferred",
    }
    words = caption(
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
        read_video(_beside(path), size),
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
        read_video([folder / Path(row["file_path"]).name for row in rows], size),
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
        read_video([path / "color" / f"{i:06d}.png" for i in frames], size),
        np.array([[f, f, cam["cx"], cam["cy"]] for f in cam["focals"]]),
    )
    return _clip(video, c2w, K, "OmniWorld")


def read_spatialvid(path: Path, size: tuple | None = None) -> Episode:
    """SpatialVID-HQ `annotations/group_x/<id>/`: w2c [t, q x y z w] of some frames only (slerp fills), K as shares."""
    video = read_video(path.parents[2] / "videos" / path.parent.name / f"{path.name}.mp4", size)
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
        else read_video(frames.with_suffix(".mp4"), size)
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


# --------------------------------------------------- recording a running game (§4): four layers, joined by queues only
def game_layer(
    game: world.World, keys: queue.Queue, states: queue.Queue, screen: queue.Queue
) -> None:
    """Layer 1, the program being played: pictures at 16 Hz, states at 60 Hz of its own clock. It knows of no recording."""
    while True:
        try:
            action = keys.get(timeout=0.5)
        except queue.Empty:
            action = (0,) * 6, (0.0, 0.0)  # nobody plays: the game goes on
        if action is None:
            return
        before, record = np.array(game.pose), game.tick(*action)
        tick, step = record["time"], np.array(game.pose) - before
        screen.put(("frame", tick / 16, record["frame"]))
        for k in range(math.ceil(tick * 60 / 16), math.ceil((tick + 1) * 60 / 16)):
            screen.put(("state", k / 60, before + (k * 16 / 60 - tick) * step))
        states.put(game.pose)


def agent_layer(
    mesh: world.NavMesh, rng: np.random.Generator, states: queue.Queue, keys: queue.Queue
) -> None:
    """Layer 2, the player: sees a state, sends keys; walks from one random place of the navmesh to the next."""
    way = []
    while (pose := states.get()) is not None:
        here = pose[0], pose[2]
        way = way[1:] if way and math.dist(way[0], here) < 0.3 else way
        way = way or mesh.path(here, tuple((rng.choice(mesh.cells) + 0.5) * mesh.cell))
        error = _wrap(math.degrees(math.atan2(way[0][0] - here[0], way[0][1] - here[1])) - pose[4])
        keys.put(
            ((int(abs(error) < 12), 0, 0, 0, 0, 0), (0.0, max(-3, min(3, round(error / 1.5))) / 10))
        )


def capture_layer(
    screen: queue.Queue,
    segments: queue.Queue,
    closed: list[dict],
    count: int,
    frames: int,
    jitter: float = 0.008,
) -> None:
    """Layer 3, the capture program: stamps what arrives with its own late clock, cuts segments, ends one early when a layer crashes."""
    segment, rng = {"frame": [], "state": [], "crash": []}, np.random.default_rng(len(closed))
    while len(closed) < count:
        kind, at, value = screen.get()
        segment[kind].append(
            (at + 3.217 + rng.uniform(-jitter, jitter), at, value)
        )  # two clocks never agree
        if kind == "crash" or len(segment["frame"]) > frames:
            if len(segment["frame"]) > 8:
                closed.append(segment)
                segments.put(segment)
            segment = {"frame": [], "state": [], "crash": []}


def output_layer(
    segments: queue.Queue, root: Path, scene: world.Scene, written: list[Path]
) -> None:
    """Layer 4, the dataset: frames get the pose of their time, keys come from positions alone, episodes are written whole."""
    while (segment := segments.get()) is not None:
        written.append(
            write_episode(
                Path(root) / f"{scene.seed:06d}_{len(written):06d}", align(segment, scene)
            )
        )


def align(segment: dict[str, list], scene: world.Scene) -> Episode:
    """Heartbeats tell how far the clocks are apart; frames come evenly, so a line through their stamps removes the jitter."""
    stamps, n = [stamp for stamp, _, _ in segment["frame"]], np.arange(len(segment["frame"]))
    at = np.polyval(np.polyfit(n, stamps, 1), n) - np.median(
        [stamp - time for stamp, time, _ in segment["state"]]
    )
    times, poses = (
        np.array([time for _, time, _ in segment["state"]]),
        np.array([pose for *_, pose in segment["state"]]),
    )
    T = (int(np.sum(at <= times[-1])) - 1) // 4 * 4 + 1
    player = np.stack([np.interp(at[:T], times, column) for column in poses.T], 1).astype(
        np.float32
    )
    labels, video = (
        infer_wsad(player[:, :3], player[:, 4], player[:, 3], memory.STEP),
        np.stack([picture for *_, picture in segment["frame"][:T]]),
    )
    words, where = (
        caption(scene_caption(scene), *labels[:2], player, scene.kind),
        {"seed": scene.seed, "kind": scene.kind},
    )
    meta = {
        "source": "recorder",
        "view": "first",
        "scene": where,
        "metric": True,
        "action_source": "inferred",
        "fps": 16,
    }
    return Episode(
        video,
        poses_to_c2w(player).astype(np.float32),
        np.tile(memory.intrinsics(*video.shape[1:3]).numpy(), (T, 1)),
        *labels,
        np.zeros(T, bool),
        player,
        words,
        meta,
    )


def supervise(screen: queue.Queue, layer: Callable[..., None], *args: object) -> threading.Thread:
    """Run a layer in a thread of its own; when it crashes, tell the capture layer and start it again."""

    def keep_running() -> None:
        while True:
            try:
                return layer(*args)
            except Exception as error:  # whatever happens to a layer, by design
                screen.put(("crash", 0.0, f"{layer.__name__}: {error}"))

    (thread := threading.Thread(target=keep_running, daemon=True)).start()
    return thread


def record(root: Path, seed: int, count: int = 2, frames: int = 241) -> list[Path]:
    """Let the agent play the game and record `count` segments of it."""
    scene, written, (keys, states, screen, segments) = (
        _scene(seed),
        [],
        (queue.Queue() for _ in range(4)),
    )
    game = world.World(scene, size=64)
    states.put(game.pose)
    threads = [
        supervise(screen, *layer)
        for layer in (
            (game_layer, game, keys, states, screen),
            (agent_layer, world.NavMesh(scene), np.random.default_rng(seed), states, keys),
            (output_layer, segments, root, scene, written),
            (capture_layer, screen, segments, [], count, frames),
        )
    ]
    threads[3].join()
    for inbox, thread in zip((keys, states, segments), threads[:3], strict=True):
        inbox.put(None)
        thread.join()
    return written


# -------------------------------------------------------------------------------------------------------------- commands
def view(e: Episode, path: Path, size: int = 256) -> None:
    """An mp4 of one episode: the frame with its keys, the map from above, the depth (the last two if the world is known)."""
    scene = _scene(**e.meta["scene"]) if "scene" in e.meta else None
    depth, ground = (
        true_views(e.meta, e.c2w, *e.video.shape[1:3], e.player)[1]
        if scene
        else np.ones(e.video.shape[:3]),
        e.player[:, [0, 2]],
    )
    low, span = (
        (0, len(scene.solid)) if scene else (ground.min(0) - 1, np.ptp(ground, axis=0).max() + 2)
    )
    dots = [tuple(dot) for dot in ((ground - low) / span * [1, -1] + [0, 1]) * size]
    big = lambda x: Image.fromarray(x).resize((size, size), Image.Resampling.NEAREST).convert("RGB")
    plan, frames = (
        big(
            np.where(scene.solid.T[::-1], 96, 40).astype(np.uint8)
            if scene
            else np.full((1, 1), 40, np.uint8)
        ),
        [],
    )
    for t, dot in enumerate(dots):
        image, chart, yaw = big(np.asarray(e.video[t])), plan.copy(), math.radians(e.player[t, 4])
        (pen := ImageDraw.Draw(chart)).line(dots[: t + 1] + [dot], fill=(90, 170, 255), width=2)
        for side in (-math.pi / 4, math.pi / 4):  # the borders of 90° of view
            pen.line(
                [dot, (dot[0] + 24 * math.sin(yaw + side), dot[1] - 24 * math.cos(yaw + side))],
                fill=(255, 210, 80),
            )
        words = (
            f"{t:4d}  {keys_from_action(e.keyboard[t], e.mouse[t])}{'  wall' * int(e.contact[t])}"
        )
        ImageDraw.Draw(image).text(
            (6, 5), words, fill=(255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0)
        )
        frames.append(
            np.concatenate(
                [
                    np.asarray(panel)
                    for panel in (image, chart, big((255 * np.exp(-depth[t] / 6)).astype(np.uint8)))
                ],
                1,
            )
        )
    write_mp4(path, np.stack(frames), e.meta["fps"])


def check(root: Path) -> int:
    """One line per clip; returns the number of bad ones."""
    found = [
        p.parent
        for pattern in ("", "*/", "*/*/")
        for name in ("meta.json", "rgb")
        for p in root.glob(pattern + name)
    ]
    bad, clips = 0, sorted({p for p in found if not p.name.startswith(".")}) or [root]
    for path in clips:
        e, wrong = inspect(path, hashes=True)
        wrong, shape = (
            wrong or [f"filter: {reason}" for reason in filters(e)],
            "x".join(map(str, e.video.shape[:3])) if e else "-",
        )
        bad += bool(wrong)
        print(
            f"{str(path.relative_to(root)):30} {shape:>12} {e.meta.get('source', '?') if e else '-':>9}  {'; '.join(wrong) or 'good'}"
        )
    print(f"{len(clips)} clips, {bad} bad" if bad else f"all {len(clips)} clips are good")
    return bad


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="data.py",
        description="Make, record, import, check and look at training clips.",
        allow_abbrev=False,
        epilog=__doc__.split("\n\n")[-1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "command",
        nargs="?",
        choices=("make", "explore", "record", "ingest", "check", "view"),
        help="see below; none: a demo",
    )
    p.add_argument(
        "paths",
        nargs="*",
        type=Path,
        help="check, view: a dataset or an episode; ingest: pose files or scene folders",
    )
    p.add_argument(
        "--preset",
        default="tiny",
        choices=[*PRESETS],
        help="make: frame size and number of episodes (default tiny)",
    )
    p.add_argument(
        "--out",
        type=Path,
        help="where to write (default datasets/PRESET, datasets/recorded, datasets/FORMAT, view.mp4)",
    )
    p.add_argument("--workers", type=int, help="make: processes (default: one per core)")
    p.add_argument("--format", help=f"ingest: whose layout, {', '.join(READERS)}")
    p.add_argument(
        "--size",
        type=int,
        default=64,
        help="ingest: stored height and width in pixels (default 64)",
    )
    p.add_argument(
        "--count",
        type=int,
        help="record: segments (default 2); explore: held-out scenes (default 40)",
    )
    p.add_argument("--seed", type=int, default=7, help="record: number of the scene (default 7)")
    return p


def run(args: argparse.Namespace) -> int | None:
    if args.format and args.format not in READERS:
        raise ValueError(
            f"--format must be one of {', '.join(READERS)}, got {args.format!r}; another set comes in "
            "as ViPE poses (--format vipe) or as a plain folder of frames (README: Your own data)"
        )
    if args.command in ("check", "view", "ingest") and (
        not args.paths or (args.command == "ingest" and not args.format)
    ):
        raise ValueError(
            f"{args.command} needs a path{' and --format' * (args.command == 'ingest')}; see: python data.py --help"
        )
    if args.command == "make":
        print(
            f"{len(list_episodes(make_dataset(args.out or f'datasets/{args.preset}', args.preset, args.workers)))} episodes"
        )
    elif args.command == "explore":
        for name, weights in (
            ("random walk", None),
            ("random waypoints", np.zeros(4)),
            ("learned waypoints", world.POLICY),
        ):
            share = [
                world.explore(_scene(FIRST_SCENE["test"] + i), weights, np.random.default_rng(i))[0]
                for i in range(args.count or 40)
            ]
            print(
                f"{name:18} cover {np.mean(share):.3f} ± {1.96 * np.std(share) / len(share) ** 0.5:.3f} of unseen scenes in 120 steps"
            )
    elif args.command == "record":
        print(*record(args.out or Path("datasets/recorded"), args.seed, args.count or 2), sep="\n")
    elif args.command == "ingest":
        for path in tqdm(args.paths):
            out = (args.out or Path("datasets") / args.format) / path.stem
            tqdm.write(str(write_episode(out, READERS[args.format](path, (args.size, args.size)))))
    elif args.command == "check":
        return 2 if sum(check(root) for root in args.paths) else None
    else:
        view(
            episode := read_episode(list_episodes(args.paths[0])[0]),
            out := args.out or Path("view.mp4"),
        )
        print(f"{out}: {episode.path}, {episode.prompt['simple']['full']}")


def demo() -> None:
    """Rendered walks, the keys read off their positions, and how many a threshold per axis at the start yaw gets right."""
    walks = [render_episode(DataConfig(frames=121), "test", i) for i in range(4)]
    print(f"{len(walks)} walks of 121 frames; the first: {walks[0].prompt['simple']['full']}")
    for noise in (0.0, 0.01, 0.02):
        right = []
        for e in walks:
            position = e.player[:, :3] + noise * np.random.default_rng(0).standard_normal((121, 3))
            f, r = _project(np.diff(position[:, [0, 2]], axis=0), e.player[:-1, 4])
            naive = (np.stack([f, -f, -r, r], 1) > 0.2 * memory.STEP) == e.keyboard[:-1, :4]
            labels = infer_wsad(position, e.player[:, 4], e.player[:, 3], memory.STEP)
            right.append(
                (
                    wsad_report(labels, e.keyboard, e.contact)["free"],
                    naive.all(1)[~e.contact[:-1]].mean(),
                )
            )
        print(
            "position noise {:.0f} cm: {:.1%} of the keys right, a naive threshold {:.1%}".format(
                noise * 100, *np.mean(right, 0)
            )
        )


if __name__ == "__main__":
    commands = parser()
    arguments = commands.parse_intermixed_args()
    try:
        commands.exit(run(arguments) if arguments.command else demo())
    except ValueError as wrong:
        commands.exit(2, f"data.py: {wrong}\n")
