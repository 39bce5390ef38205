"""Any picture becomes the first frame of a walk; one that names its world brings the truth along.

The start pictures of assets/ are PNG files with a few words of text: the seed and the kind of their
world, and the pose they were drawn from. Such a world is known everywhere: every frame of the model
can be compared with the true one, walls can stop the player, and a camera behind him keeps out of
them.
"""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

import camera
import world
from dataset import episode

UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    SyntaxError,
    OverflowError,
    RecursionError,
    Image.DecompressionBombError,
)
FARTHEST = 1e3  # metres, degrees: no start picture is seen from farther away
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # none that starts another program


@dataclass(frozen=True)
class Start:
    image: np.ndarray  # (H, W, 3) uint8, the model's size
    note: str = ""  # what was done to the picture
    truth: dict | None = None  # the world it shows, if known: then the truth is known everywhere
    pose: tuple[float, ...] = (0.0, -world.EYE, 0.0, 0.0, 0.0)
    kept: bool = False  # a model made the picture, in a known world
    number: int | None = None  # of the start pictures that a link counts; None: it is none of them

    def save(self, path: Path) -> None:
        """A PNG that says which world it shows, and from where."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = PngImagePlugin.PngInfo()
        if self.truth:
            for key, value in {**self.truth["scene"], "pose": self.pose}.items():
                text.add_text(key, json.dumps(value))
            if self.kept:
                text.add_text("kept", "true")
        Image.fromarray(self.image).save(path, pnginfo=text)


def true_views(truth: dict, poses: np.ndarray, H: int, W: int) -> np.ndarray:
    """(n, 5) -> (n, H, W, 3) uint8: what the game's renderer shows there."""
    return world.true_frames(truth, None, H, W, poses)


def player_cameras(view: str, truth: dict | None, poses: Tensor) -> Tensor:
    """(n, 5) float64 -> (n, 4, 4): in the player's eye, or behind him as far as known walls allow."""
    if view == "first":
        return torch.from_numpy(episode.poses_to_c2w(poses))
    if truth:
        return torch.from_numpy(world.eyes(truth, poses.numpy()))
    return camera.over_the_shoulder(poses, world.MAX_PITCH)


def open_start(
    source: Path | bytes, size: tuple[int, int], name: str, view: str = "first"
) -> Start:
    """A start frame of this size (H, W), from a file or its bytes."""
    if isinstance(source, Path) and not source.is_file():
        what = "is no regular file" if source.exists() else "does not exist"
        raise ValueError(f"{source} {what}; give a PNG or JPEG file")
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        picture = Image.open(file, formats=FORMATS)
        picture.load()
        if "seed" in getattr(picture, "text", {}):
            return known_start(picture, size, name, view)
        return fitted_start(picture, size, name)
    except UNREADABLE as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "its format is not known"
        raise ValueError(
            f"{name} cannot be read as a picture ({reason}); give a PNG or JPEG file"
        ) from error


# ---- a picture of a known world, and any other -------------------------------------------------------------


def known_start(picture: Image.Image, size: tuple[int, int], name: str, view: str) -> Start:
    """The world that the file names, drawn again at this size, as the player or who follows him sees it.

    A picture that a model made is kept: the world is only what it is compared with.
    """
    text = picture.text
    seed, kind, pose = (json.loads(text[key]) for key in ("seed", "kind", "pose"))
    truth = {"scene": {"seed": seed, "kind": kind}, "view": view, "character": seed}
    for problem in episode.problems_of_scene(truth, view):
        raise ValueError(problem)
    poses = np.array(pose, float).reshape(1, 5)
    poses[0, 4] = math.fmod(poses[0, 4], 360)
    check_free(truth, poses[0])
    kept = "kept" in text
    image = fitted_start(picture, size, name).image if kept else true_views(truth, poses, *size)[0]
    known = "seen in training" if seed in world.SPLITS["train"] else "held out"
    note = f"{name}: world {seed} ({kind}), {known}"
    return Start(image, note, truth, tuple(poses[0].tolist()), kept)


def check_free(truth: dict, pose: np.ndarray) -> None:
    """Somebody who stands in a wall sees nothing, and gets nowhere."""
    solid = world.make_scene(**truth["scene"]).solid
    if not (abs(pose) < FARTHEST).all():
        raise ValueError("its text says that it was seen from outside of every world")
    x, z = pose[[0, 2]]
    inside = 0 <= min(x, z) and max(x, z) < len(solid)
    if not inside or solid[int(x), int(z)]:
        raise ValueError(f"its text says that it was seen from x {x:g}, z {z:g}: in a wall")


def fitted_start(picture: Image.Image, size: tuple[int, int], name: str) -> Start:
    """Cropped in the middle and resized; the note says what was done."""
    H, W = size
    w, h = picture.size
    alpha = "A" in picture.getbands() or "transparency" in picture.info
    method = Image.Resampling.BOX if w >= 2 * W else Image.Resampling.BICUBIC
    upright = ImageOps.exif_transpose(picture).convert("RGB")
    image = np.array(ImageOps.fit(upright, (W, H), method))

    # people shall not wonder why their photograph looks otherwise
    notes = []
    if alpha:
        notes.append("alpha dropped")
    if (w, h) != (W, H):
        notes.append(f"{w}x{h} → {W}x{H} centre crop")
    if w < W or h < H:
        notes.append(f"enlarged: it is smaller than the model's {W}x{H}")
    done = "; ".join(notes) or "used as it is"
    return Start(image, f"{name}: {done}. A tiny model has only seen its own world.")
