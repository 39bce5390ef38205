"""One clip on disk: video, poses, actions, words.

    CLIP/meta.json                  where it comes from, its size, a hash of every other file
    CLIP/rgb/video.npy              (T, H, W, 3) uint8, memory-mapped: H.264 leaves 22 dB at 64x64
    CLIP/pose/video.npz             c2w, as ViPE's tools read it; so is the next
    CLIP/intrinsics/video.npz       K, in pixels of the stored size
    CLIP/player/video.npz           the pose of the player
    CLIP/action/video.npz           keyboard, mouse, valid, contact
    CLIP/prompt/video.json          words
    CLIP/_DONE                      a hash of meta.json, written last: without it there is no episode

A folder may come from anybody. Whatever is in it, reading it ends in an episode or in words about what
is wrong with which file (`inspect`), and no file outside of it is opened.
Tests: pytest tests/test_episode.py tests/test_data.py
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import camera
import world
from dataset import wsad

ARRAYS = {  # file -> its arrays: dtype, and shape after T
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
FRAMES = "rgb/video.npy"
WORDS = "prompt/video.json"
CAMERAS = "intrinsics/video_camera.txt"  # ViPE wants one line per frame
FILES = {FRAMES, WORDS, CAMERAS, "meta.json", *ARRAYS}


def key_of(arrays: dict, name: str) -> str:
    """The only array of a file is stored as `data`, as ViPE does."""
    return name if len(arrays) > 1 else "data"


def sha256_of(path: Path) -> str:
    if not path.is_file():
        return "missing"
    with open(path, "rb") as file:  # piece by piece: a stranger's may be larger than memory
        return hashlib.file_digest(file, "sha256").hexdigest()


def poses_to_c2w(pose5: np.ndarray) -> np.ndarray:
    """(T, 5) -> (T, 4, 4) float64."""
    return camera.pose_to_c2w(torch.as_tensor(np.asarray(pose5, float))).numpy()


def c2w_to_poses(c2w: np.ndarray) -> np.ndarray:
    """(T, 4, 4) -> (T, 5), yaw unwrapped."""
    pose5 = camera.c2w_to_pose(torch.as_tensor(np.asarray(c2w, float))).numpy()
    yaw = np.unwrap(pose5[:, 4:], period=360, axis=0)
    return np.concatenate([pose5[:, :4], yaw], 1)


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
        """What a model is conditioned on: what can be seen, never what is pressed."""
        return self.prompt["simple"]["scene"]


# ---- what makes an episode unusable ------------------------------------------------------------------------


def problems(e: Episode) -> list[str]:
    """As text; empty for a good one. What is found first makes the rest meaningless."""
    video = e.video
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        return [f"rgb: expected (T, H, W, 3) uint8, found {video.shape} {video.dtype}"]
    found = problems_of_size(video) + problems_of_arrays(e)
    return found or problems_of_values(e)


def problems_of_size(video: np.ndarray) -> list[str]:
    T, H, W, _ = video.shape
    found = []
    if T % 4 != 1:
        fitting = max(1, (T - 1) // 4 * 4 + 1)
        found.append(f"rgb: expected 4k+1 frames, found {T}; cut to {fitting}")
    if H % 16 or W % 16:
        found.append(f"rgb: expected sizes in multiples of 16, found {W}x{H}")
    return found


def problems_of_arrays(e: Episode) -> list[str]:
    """Wrong shapes, and numbers that are none."""
    found = []
    for file, arrays in ARRAYS.items():
        for name, (_, tail) in arrays.items():
            label = f"{file}[{key_of(arrays, name)}]"
            value = getattr(e, name)
            shape = (len(e.video), *tail)
            if value.shape != shape:
                found.append(f"{label}: expected {shape}, found {value.shape}")
            elif not np.isfinite(value).all():
                frame = int(np.argwhere(~np.isfinite(value))[0, 0])
                found.append(f"{label}: NaN or infinite at frame {frame}")
    return found


def problems_of_values(e: Episode) -> list[str]:
    """Cameras that are none or far away, intrinsics in other units, keys that are neither 0 nor 1."""
    found = []

    # cameras
    bent = np.flatnonzero(~camera.is_rigid(torch.as_tensor(e.c2w), 1e-3).numpy())
    if len(bent):
        rule = "not a rotation and a position (RᵀR = I, det +1)"
        found.append(f"pose/video.npz: frames {bent[:3]}... of {len(bent)} are {rule}")
    elif (away := farthest(e.c2w, e.player)) > 6:  # third-person cameras stay within 6 m
        inverted = farthest(np.linalg.inv(e.c2w), e.player) < 6
        hint = "; this is w2c, invert it" if inverted else ""
        found.append(f"pose/video.npz: camera {away:.0f} m from the player{hint}")

    # units of the lens, and what a key can be
    if e.K[:, :2].min() <= 1:
        help = "multiply shares by the width and height"
        found.append(f"intrinsics/video.npz: focal lengths must be pixels; {help}")
    if e.keyboard.max() > 1:
        found.append(f"action/video.npz[keyboard]: expected 0 or 1, found {e.keyboard.max()}")
    return found


def farthest(c2w: np.ndarray, player: np.ndarray) -> float:
    return float(np.linalg.norm(c2w[:, :3, 3] - player[:, :3], axis=1).max())


def problems_of_meta(meta: object, prompt: object) -> list[str]:
    """What rendering, training and the command line will ask for."""
    if not isinstance(meta, dict):
        return [f"meta.json: expected an object, found {type(meta).__name__}"]
    found = []

    # numbers and words that every clip has
    fps = meta.get("fps")
    if not is_number(fps) or not 0 < fps < 1000:
        found.append(f"meta.json[fps]: expected frames per second, found {fps!r:.80}")
    if not isinstance(meta.get("metric"), bool):
        found.append(f"meta.json[metric]: expected true or false, found {meta.get('metric')!r:.80}")
    view = meta.get("view", "first")
    if view not in ("first", "third"):
        found.append(f"meta.json[view]: expected first or third, found {view!r:.80}")
    if not isinstance(meta.get("sha256", {}), dict):
        found.append("meta.json[sha256]: expected an object")

    # only a clip of the embedded world has a scene
    if "scene" in meta:
        found += problems_of_scene(meta, view)
    try:
        words = prompt["simple"]
        texts = [words["scene"], words["full"]]
    except (KeyError, TypeError, IndexError):
        texts = [None]
    if not all(isinstance(text, str) for text in texts):
        found.append(f"{WORDS}: expected simple.scene and simple.full")
    return found


def problems_of_scene(meta: dict, view: object) -> list[str]:
    """A scene is rendered again from its seed and kind."""
    scene = meta["scene"]
    known = isinstance(scene, dict) and set(scene) <= {"seed", "kind"}
    if not known or not is_whole(scene.get("seed"), 2**63):
        return [f"meta.json[scene]: expected a seed and a kind, found {scene!r:.80}"]
    kind = scene.get("kind")
    if kind is not None and kind not in world.KINDS:
        allowed = ", ".join(world.KINDS)
        return [f"meta.json[scene]: kind must be one of {allowed}, found {kind!r:.80}"]
    character = meta.get("character")
    if view == "third" and not is_whole(character, world.N_CHARACTERS):
        return [f"meta.json[character]: expected a number of a character, found {character!r:.80}"]
    return []


# JSON knows no types: true is a number to Python, and 1e999 is infinite


def is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def is_whole(value: object, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


# ---- writing and reading -----------------------------------------------------------------------------------


def write_episode(path: Path, episode: Episode) -> Path:
    """Write into a hidden neighbour, then rename: an episode is there whole or not at all."""
    path = Path(path)
    refuse_foreign(path)
    wrong = problems(episode)
    if wrong:
        raise ValueError(f"{path} not written: " + "; ".join(wrong))

    # a stop at any moment leaves a draft, which nobody lists
    draft = path.parent / f".{path.name}.part"
    shutil.rmtree(draft, ignore_errors=True)
    for folder in ("rgb", "prompt", *(Path(file).parent for file in ARRAYS)):
        (draft / folder).mkdir(parents=True)
    try:
        write_files(draft, episode)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(
            f"cannot write {path}: {error}; make room, then the same command goes on"
        ) from error
    shutil.rmtree(path, ignore_errors=True)
    os.replace(draft, path)
    return path


def refuse_foreign(path: Path) -> None:
    """Nothing is replaced but an episode, or what a kill has left of one."""
    if path.is_symlink() or path.is_file():
        raise ValueError(f"{path} is no folder: remove it, or write to another one")
    files = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}
    foreign = sorted(files - FILES - {"_DONE"})
    if foreign:
        raise ValueError(
            f"{path} holds {foreign[0]}, which is no part of an episode: "
            "move it away, or write to another folder"
        )


def write_files(folder: Path, episode: Episode) -> None:
    T, H, W, _ = episode.video.shape
    np.save(folder / FRAMES, episode.video)
    times = {"inds": np.arange(T), "time": np.arange(T) / episode.meta["fps"]}
    for file, arrays in ARRAYS.items():
        values = {}
        for name, (dtype, _) in arrays.items():
            values[key_of(arrays, name)] = getattr(episode, name).astype(dtype)
        np.savez(folder / file, **values, **times)
    (folder / CAMERAS).write_text("".join(f"{t}: PINHOLE\n" for t in range(T)))
    (folder / WORDS).write_text(json.dumps(episode.prompt, indent=1))

    # every file is in the hash of meta.json, and that is in _DONE
    files = sorted(folder.glob("*/*"))
    sums = {str(file.relative_to(folder)): sha256_of(file) for file in files}
    meta = {**episode.meta, "schema": 1, "T": T, "H": H, "W": W, "sha256": sums}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
    (folder / "_DONE").write_text(sha256_of(folder / "meta.json"))


def inspect(path: Path, hashes: bool = False) -> tuple[Episode | None, list[str]]:
    """Read a folder and name all that is wrong; hashes also find what was changed after writing."""
    path = Path(path)
    if not (path / "_DONE").is_file():
        return None, ["no file _DONE: not an episode, or one that was never finished"]
    try:
        episode = read_files(path)
        with reading("_DONE"):
            done = (path / "_DONE").read_text()
    except (ValueError, OSError) as error:
        return None, [f"cannot be read: {error}"]

    found = problems_of_meta(episode.meta, episode.prompt)
    if found:  # nothing below, and no caller, could use it
        return None, found
    if hashes:
        found += changed_files(path, {**episode.meta.get("sha256", {}), "meta.json": done})
    said = [episode.meta.get(name) for name in "THW"]
    shape = list(episode.video.shape[:3])
    if shape != said:
        found.append(f"rgb: meta.json says {said!s:.80} frames, height, width; found {shape}")
    return episode, found + problems(episode)


def read_files(path: Path) -> Episode:
    inside = Path(os.path.realpath(path))
    for file in (*FILES, "_DONE"):
        # a device or a pipe could be read for ever, a link could lead to anybody's secrets
        if (path / file).exists() and not (path / file).is_file():
            raise ValueError(f"{file} is not a regular file")
        if not Path(os.path.realpath(path / file)).is_relative_to(inside):
            raise ValueError(f"{file} is a link that leads out of the folder")
    with reading("meta.json"):
        meta = json.loads((path / "meta.json").read_text())
    with reading(WORDS):
        prompt = json.loads((path / WORDS).read_text())
    with reading(FRAMES):
        video = np.load(path / FRAMES, mmap_mode="r")
    values = {}
    for file, arrays in ARRAYS.items():
        with reading(file), np.load(path / file) as stored:
            if sum(part.file_size for part in stored.zip.infolist()) > 10_000 + 1000 * len(video):
                raise ValueError("it would be unpacked to more than its frames can need")
            for name, (dtype, _) in arrays.items():
                values[name] = stored[key_of(arrays, name)].astype(dtype, copy=False)
    return Episode(video, **values, prompt=prompt, meta=meta, path=path)


@contextlib.contextmanager
def reading(file: str) -> Iterator[None]:
    """What json, numpy and zipfile raise at a hostile file is no list: one line that names it."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        plain = "".join(letter for letter in reason if letter.isprintable())
        raise ValueError(f"{file}: {type(error).__name__}: {plain[:300]}") from error


def changed_files(path: Path, sums: dict[str, str]) -> list[str]:
    """Only files of an episode are opened, whatever meta.json names."""
    found = []
    for file, sha in sums.items():
        if file not in FILES:
            found.append(f"meta.json[sha256]: no file of an episode is called {file!r:.80}")
        elif sha256_of(path / file) != sha:
            found.append(f"{file}: changed since it was written")
    return found


def read_episode(path: Path) -> Episode:
    """Frames memory-mapped; a bad one is an error that says what is wrong with which file."""
    episode, wrong = inspect(path)
    if wrong:
        raise ValueError(f"{path}: " + "; ".join(wrong))
    return episode


def list_episodes(root: Path | str, split: str | None = None) -> list[Path]:
    """All finished episodes at or below a folder, sorted; half-written ones are never listed."""
    base = Path(root) / (split or "")
    marks = [mark for depth in ("", "*/", "*/*/") for mark in base.glob(f"{depth}_DONE")]
    found = sorted(mark.parent for mark in marks if not mark.parent.name.startswith("."))
    if not found:
        help = f"python data.py make --preset tiny --out {root}"
        raise ValueError(f"no episodes in {base}; make some with: {help}")
    return found


# ---- what makes a clip useless for training ----------------------------------------------------------------


def picture_stats(video: np.ndarray) -> dict[str, float]:
    """Brightness, contrast and sharpness (0-1) of every second row; the longest unchanged run."""
    grey = video[:, ::2, :, 1].astype(np.float32) / 255  # (T, H/2, W): green is nearly luminance
    difference = np.abs(np.diff(grey, axis=0)).mean((1, 2))
    changed = np.flatnonzero(np.append(difference > 1e-4, True))
    return {
        "brightness": float(grey.mean()),
        "contrast": float(grey.std((1, 2)).mean()),
        "sharpness": float(np.abs(np.diff(grey, axis=2)).mean()),
        "frozen": int(np.diff(changed, prepend=-1).max() - 1),
    }


def filters(e: Episode, see: dict[str, float] | None = None) -> list[str]:
    """Why a clip should not be trained on. The thresholds are ours."""
    if len(e.video) < 2:
        return ["one frame: nothing happens"]
    return filters_of_motion(e) + filters_of_pictures(see or picture_stats(e.video))


def filters_of_motion(e: Episode) -> list[str]:
    step = np.linalg.norm(np.diff(e.player[:, :3], axis=0), axis=1)
    usual = camera.STEP
    if not e.meta["metric"]:
        usual = float(np.median(step[step > 0])) if step.any() else 1.0
    turn = np.abs(wsad.wrap(np.diff(e.player[:, 3:].astype(float), axis=0))).max()
    known = e.valid[:-1].mean()

    found = []
    if step.max() > 3 * usual:
        times = step.max() / usual
        found.append(f"teleport: a step of {times:.1f} times the usual length")
    if turn > 15.01:
        found.append(f"spin: {turn:.0f} degrees in one frame")
    if known < 0.5:
        found.append(f"labels: only {known:.0%} of the actions are known")
    return found


def filters_of_pictures(see: dict[str, float]) -> list[str]:
    found = []
    if see["frozen"] > 30:
        found.append(f"frozen: {see['frozen']} frames in a row do not change")
    if not 0.04 < see["brightness"] < 0.97:
        found.append(f"too dark or too bright: mean {see['brightness']:.2f}")
    if see["contrast"] < 0.02:
        found.append(f"no contrast: deviation {see['contrast']:.3f}")
    if see["sharpness"] < 0.002:
        found.append(f"blurred: mean gradient {see['sharpness']:.4f}")
    return found
