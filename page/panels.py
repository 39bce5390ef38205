"""One walk in three panels, the true world, memory on and memory off: the README's first picture.

The same actions are walked twice, so what differs between two panels is what the memory does.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import world
from dataset import episode

ARMS = {"memory on": "camera", "memory off": "none"}
COLUMNS = {"true world": 0, "memory on": 200, "memory off": 400}  # where each panel begins
SIDE = 192  # pixels of a panel
EVERY = 2  # frames
SHOWN = 80  # milliseconds of a picture: one and a half times the walk's own speed
END = 2000  # milliseconds of the last one
NEAR = 1.5  # metres and degrees from the first pose: back where the walk began


def three_panels(walk: Callable[[str, str], None]) -> list[Image.Image]:
    """walk(folder, policy) records the same walk once with every policy."""
    panels = {}
    with tempfile.TemporaryDirectory() as place:
        for title, policy in ARMS.items():
            walk(f"{place}/{policy}", policy)
            clip = episode.read_episode(Path(place) / policy)
            panels[title] = np.array(clip.video)
    H, W = clip.video.shape[1:3]
    panels["true world"] = world.true_frames(clip.meta, clip.c2w, H, W, clip.player)

    # below the panels stands where the walker is
    back = np.abs(clip.player - clip.player[0]).max(1) < NEAR
    length = min(map(len, panels.values()))
    pictures = []
    for t in range(0, length, EVERY):
        frames = {title: panels[title][t] for title in COLUMNS}
        pictures.append(picture_of(frames, phase(t, back)))
    return pictures


def phase(t: int, back: np.ndarray) -> str:
    """What the walker does: the first half leads away."""
    if t <= len(back) // 2:
        return "turning away"
    return "back where we started" if back[t] else "coming back"


def picture_of(frames: dict[str, np.ndarray], below: str) -> Image.Image:
    """Three frames side by side, enlarged without smoothing."""
    font = ImageFont.load_default(17)
    picture = Image.new("RGB", (592, 252), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((296, 237), below, "black", font, "mm")
    for title, x in COLUMNS.items():
        panel = Image.fromarray(frames[title])
        picture.paste(panel.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, 30))
        draw.text((x + SIDE // 2, 15), title, "black", font, "mm")
    return picture


def save_gif(pictures: list[Image.Image], path: Path) -> int:
    """One palette for all, so that nothing flickers. Returns the bytes written."""
    some = np.concatenate([np.asarray(picture) for picture in pictures[::6]])
    palette = Image.fromarray(some).quantize(64)
    first, *rest = [
        picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    durations = [SHOWN] * len(rest) + [END]
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)
    return path.stat().st_size
