"""A walk as an address: the page of play.py and the page of web/ read and write the same links.

    #seed=42&start=3&new=2&do=w:40,l:60

`start` counts the start pictures, `do` is the language of --actions (dataset/chords.py), `new` is
the length of a segment in latents and left out where it is the longest. What a mouse turned is
written in ten-thousandths of a look key, as finely as page/controls.py plays it: the same walk, but
for a pitch that was held at its limit, whose last turn is rounded to that. The page of web/ knows no
walls: a link made there may lead through one, and play.py stops before it.
"""

import itertools
import re
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

import camera
from dataset import chords

SEED = 42
SEEDS = 1 << 31
MOST = 40_000  # frames: 17 minutes at 40 a second
LETTERS = 200_000  # of a link that is read at all
WHOLE = re.compile(r"\d{1,10}", re.ASCII)
PLACES = 4  # decimals of a look key


class Walk(NamedTuple):
    seed: int = SEED
    start: int = 0
    new: int = 0  # 0: as it is
    chords: tuple[str, ...] = ()  # one per frame


def parse(text: str, starts: int, lengths: list[int]) -> Walk:
    """The walk of a link. What does not fit is said in one sentence."""
    if len(text) > LETTERS:
        raise ValueError("it is too long")
    found = {}
    for part in filter(None, text.removeprefix("#").split("&")):
        name, _, value = part.partition("=")
        value = unquote(value, errors="strict")
        if name == "seed":
            found["seed"] = whole_number(name, value, range(SEEDS))
        elif name == "start":
            found["start"] = whole_number(name, value, range(starts))
        elif name == "new":
            found["new"] = one_of(name, value, lengths)
        elif name == "do":
            found["chords"] = tuple(parse_do(value))
        else:
            raise ValueError(f"“{name[:20]}” is none of seed, start, new, do")

    # a walk that was made with the longest segments does not say so
    if found.get("chords"):
        found.setdefault("new", max(lengths))
    return Walk(**found)


def whole_number(name: str, text: str, allowed: range) -> int:
    if WHOLE.fullmatch(text) and int(text) in allowed:
        return int(text)
    raise ValueError(f"{name} is a whole number from 0 to {allowed[-1]}, not “{text[:20]}”")


def one_of(name: str, text: str, allowed: list[int]) -> int:
    if WHOLE.fullmatch(text) and int(text) in allowed:
        return int(text)
    raise ValueError(f"{name} is one of {', '.join(map(str, allowed))}")


def parse_do(text: str) -> list[str]:
    """One chord per frame; whole latents, as everywhere in play."""
    try:
        held = chords.parse(text)
    except ValueError as error:
        # the last line is the reason; the first two point at a column of a command line
        raise ValueError(str(error).rpartition("^ ")[2]) from error
    if sum(frames for _, frames, _ in held) > MOST:
        raise ValueError(f"the walk is longer than {MOST} frames")
    return chords.latents_of(text)[0]


# ---- the other way round ------------------------------------------------------------------------


def write(walk: Walk, lengths: list[int]) -> str:
    """The shortest link of a walk."""
    if walk.seed >= SEEDS:
        raise ValueError(f"a link holds seeds below {SEEDS}, this walk has {walk.seed}")
    if len(walk.chords) > MOST:
        raise ValueError(f"a link holds {MOST} frames, this walk has {len(walk.chords)}")
    parts = [f"seed={walk.seed}", f"start={walk.start}"]
    if walk.new not in (0, max(lengths)):
        parts.append(f"new={walk.new}")
    if walk.chords:
        runs = itertools.groupby(walk.chords)
        held = [f"{chord}:{len(list(frames))}" for chord, frames in runs]
        parts.append("do=" + ",".join(held))
    return "#" + "&".join(parts)


def chord_of(keyboard: np.ndarray, mouse: np.ndarray) -> str:
    """The whole action of a frame as text, unlike camera.keys_from_action, which names what is seen of it."""
    held = [key for key, on in zip("wsad", keyboard, strict=False) if on > 0.5]
    for key, steps in camera.LOOK.items():
        one = float(np.dot(steps, steps))
        times = round(float(np.dot(steps, mouse)) / one, PLACES)
        if times > 0:
            held.append(key if times == 1 else f"{key}{times:.{PLACES}f}".rstrip("0").rstrip("."))
    held.sort(key=lambda key: "wasdijkl".index(key[0]))  # as web/walk.js orders them
    return "+".join(held) or "_"
