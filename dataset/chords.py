"""The action language: which keys are held, for how long.

    actions := item ((","|space) item)*     item  := keys ":" count | @revisit | @spin | @square | @idle
    keys    := "_" | key ("+" key)*         key   := w a s d (move) | i j k l (look), l2.5: 2.5 times as far
    count   := frames | seconds "s"         a look key turns 1.5 degrees a frame; "-" is "_", too

`w:40, w+l:2s, @revisit` walks forward for 40 frames, on in a curve for two seconds, then away and
back. One frame's keys are a chord, which camera.parse_keys understands. Errors point at the column.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

import camera
from dataset import episode, wsad

FPS = 16  # of a second, where nobody says otherwise: the dataset's rate
LATENT = 4  # frames: the shortest time that an action can last in play (context.Window.stride)
PRESETS = {
    "@revisit": "l:60, j:60",
    "@spin": "l:240",
    "@square": ", ".join(["w:16, l:60"] * 4),
    "@idle": "_:160",
}
FLAG = '--actions "'
SEPARATOR = re.compile(r"\s*,\s*|(?<![+:\s])\s+(?![+:\s])")  # "w + l : 8" is one item
COUNT = re.compile(r"\s*(?:(\d{1,5})|(\d{1,4}(?:\.\d{1,6})?)\s*s)\s*", re.ASCII)
KEY = re.compile(r"[wasd]|[ijkl](?:\d{1,3}(?:\.\d{1,4})?)?", re.ASCII)


class Held(NamedTuple):
    chord: str  # "w+l"
    frames: float  # as asked
    item: str  # as written


def parse(text: str, fps: int = FPS) -> list[Held]:
    """What is held, one after the other."""
    found = []
    stripped = text.strip()
    column = text.find(stripped) if stripped else 0
    ends = [*SEPARATOR.finditer(stripped), None]
    begin = 0
    for end in ends:
        item = stripped[begin : end.start() if end else None]
        if item in PRESETS:
            found += parse(PRESETS[item], fps)
        else:
            found.append(parse_item(item, fps, text, column + begin))
        begin = end.end() if end else 0
    return found


def parse_item(item: str, fps: int, text: str, column: int) -> Held:
    """keys:count, which stands at this column of the text."""

    def wrong(at: int, problem: str) -> ValueError:
        return ValueError(f'{FLAG}{text}"\n{" " * (len(FLAG) + column + at)}^ {problem}')

    keys, colon, count = item.partition(":")
    names = list(re.finditer(r"[^\s+]+", keys))
    alone = len(names) == 1
    for name in names:
        nothing = name[0] in ("_", "-") and alone
        if not nothing and not KEY.fullmatch(name[0]) and name[0][0] != "@":
            raise wrong(name.start(), f"unknown key {name[0]!r}; use w a s d i j k l _")

    named = any(name[0][0] == "@" for name in names)
    if named or not colon or not names or keys.count("+") != len(names) - 1:
        raise wrong(0, f"expected keys:count, as in w:40 or w+l:2s, or {' '.join(PRESETS)}")
    number = COUNT.fullmatch(count)
    if not number:
        at = len(keys) + 1
        problem = f"{count.strip()!r} is no count; use frames (40) or seconds (2s)"
        raise wrong(at, problem)

    frames = int(number[1]) if number[1] else float(number[2]) * fps
    chord = "+".join(name[0] for name in names).replace("-", "_")
    return Held(chord, frames, item)


def chords_of(text: str, fps: int = FPS) -> list[str]:
    """The chord of every frame."""
    held = parse(text, fps)
    return [chord for chord, frames, _ in held for _ in range(round(frames))]


def latents_of(text: str, fps: int = FPS) -> tuple[list[str], list[str]]:
    """The chord of every frame in whole latents, as play needs them, and notes on what was rounded."""
    chords = []
    notes = []
    for chord, asked, item in parse(text, fps):
        frames = max(LATENT, LATENT * round(asked / LATENT))
        chords += [chord] * frames
        if frames != asked:
            notes.append(f"{item}: {asked:g} frames rounded to {frames}, a multiple of {LATENT}")
    return chords, notes


def read_actions(source: str, fps: int = FPS) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """keyboard (F, 6), mouse (F, 2) and notes, of a string, a .txt of one, or an .npz.

    The .npz holds keyboard and mouse, or camera poses (T, 4, 4): then the keys are read off them.
    """
    path = Path(source)
    if source.endswith((".txt", ".npz")) and not path.is_file():
        raise ValueError(
            f"--actions {source}: no such file. "
            'Give one that exists, or a string like "w:40, w+l:40"'
        )
    if source.endswith(".npz"):
        return stored_actions(path)
    text = path.read_text().strip() if source.endswith(".txt") else source
    chords, notes = latents_of(text.replace("\n", ","), fps)
    keyboard, mouse = camera.actions_from_keys(chords)
    return keyboard.numpy(), mouse.numpy(), notes


def stored_actions(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    stored = dict(np.load(path, allow_pickle=False))
    if {"keyboard", "mouse"} <= set(stored):
        return stored["keyboard"].astype(np.float32), stored["mouse"].astype(np.float32), []

    trajectories = [x for x in stored.values() if x.ndim == 3 and x.shape[1:] == (4, 4)]
    if not trajectories:
        raise ValueError(
            f"{path} holds {', '.join(stored)}; "
            "expected keyboard (F, 6) and mouse (F, 2), or camera poses (T, 4, 4)"
        )
    poses = episode.c2w_to_poses(trajectories[0])
    keyboard, mouse, _ = wsad.infer_wsad(poses[:, :3], poses[:, 4], poses[:, 3])
    return keyboard[:-1].astype(np.float32), mouse[:-1], ["the keys were read off the poses"]
