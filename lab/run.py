"""One measurement: its worlds and weights, and what it found.

What is found is rows and columns of numbers, one number for each world: raw["row/column"]. Claims
ask for them by these names. What a run leaves out, and why, stands in `absent`.
"""

import base64
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from dataset.film import psnr
from engine import cli, configs
from lab import metrics, players, registration, truth, worlds
from lab.claims import Raw

SOME = 6  # worlds for what is slow, unless all are asked for
LOST = 0.75  # ZNCC under which a frame is lost, where nobody has measured it yet


# ---- where a number comes from ------------------------------------------------------------


def machine() -> str:
    """The processor, where the system tells its name, and how many cores there are."""
    name = platform.machine()
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        found = re.search(r"model name\s*: (.*)", listed.read_text())
        name = found[1] if found else name
    return f"{name}, {os.cpu_count()} cores"


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    here = cli.beside()
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def origin(command: str, split: str, seeds: list[int], files: Iterable[Path]) -> dict:
    """What to type for the same numbers, with which weights, code and libraries, and where it ran."""
    hashes = {}
    for file in files:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        hashes["/".join(file.parts[-2:])] = digest[:12]
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "seed": 0,
        "machine": machine(),
        "split": split,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "worlds": seeds,
        "commit": commit(),
        "weights": hashes,
    }


def as_png(picture: ndarray) -> str:
    """As it stands in a json."""
    return base64.b64encode(imageio.imwrite("<bytes>", picture, extension=".png")).decode()


# ---- a measurement ------------------------------------------------------------------------


def off(found: registration.Found, pose: ndarray) -> dict[str, float]:
    """How far from a pose a frame was taken."""
    x, _, z, _, yaw = np.abs(found.pose - pose)
    return {"m": np.hypot(x, z), "deg": yaw, "ambiguous": found.ambiguous}


@dataclass
class Run:
    worlds: list[int]  # seeds
    full: bool  # all worlds for the slow rows, longer rollouts
    weights: str  # folder
    out: Path  # folder of the json
    results: Path = Path("results")  # of earlier runs: what counts as lost
    raw: Raw = field(default_factory=dict)  # "row/column" -> a value per world
    absent: dict[str, str] = field(default_factory=dict)  # row or column left out -> why
    pictures: dict[str, ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    facts: dict = field(default_factory=dict)  # what a figure needs beside raw

    @property
    def some(self) -> list[int]:
        return self.worlds if self.full else self.worlds[:SOME]

    @cached_property
    def tau(self) -> float:
        path = self.results / "sanity.json"
        if not path.exists():
            return LOST
        with configs.reading(path):
            return float(
                json.loads(path.read_text())["raw"].get("lost threshold tau/zncc", [LOST])[0]
            )

    @property
    def player(self) -> players.Player:
        """What play.py would use: the student at 3 steps, else the base at 8."""
        found = players.player(self.weights, "student")
        found = found or players.player(self.weights, "base", 8) or players.lacking("base")
        note = f"{found.name}, {found.options.steps} steps, {found.options.dtype}"
        if note not in self.notes:
            self.notes.append(note)
        return found

    # ---- what was found

    def put(self, row: str, values: dict[str, float]) -> None:
        """One more world of a row."""
        for column, value in values.items():
            self.raw.setdefault(f"{row}/{column}", []).append(float(value))

    def row(self, row: str, column: str) -> ndarray:
        """A value for each world."""
        return np.array(self.raw[f"{row}/{column}"])

    def scores(
        self,
        row: str,
        pred: ndarray | Tensor,
        true: ndarray,
        masks: dict[str, ndarray] | None = None,  # PSNR of these pixels alone, too
    ) -> None:
        """All measures of pictures; frames with a nearly empty mask are skipped."""
        found = {name: score(pred, true).mean() for name, score in metrics.METRICS.items()}
        for name, mask in (masks or {}).items():
            if name == "unseen":  # nobody can know what is there
                continue
            some = mask.mean((1, 2)) >= 0.05
            found[f"psnr {name}"] = math.nan
            if some.any():
                score = psnr(pred[some], true[some], mask[some])
                found[f"psnr {name}"] = score.mean()
        self.put(row, found)

    def located(
        self,
        row: str,
        script: worlds.Script,
        frame: Tensor,  # (H, W, 3)
        t: int,  # of the script: where it should have been taken
        views: worlds.Views,  # of the script
    ) -> None:
        """Scores against the true picture from where the frame was taken, and how far off that is:
        what remains when the error of the pose is taken out. Lost frames are counted."""
        # where it was taken, and what is to be seen from there
        pose = script.poses[t].numpy()
        found = worlds.register(script.scene, frame.numpy(), pose)
        there = worlds.shoot(script.scene, found.pose[None])
        # of that, what only the memory can have known
        depth = np.concatenate([views.depth, there.depth])
        c2w = np.concatenate([views.c2w, there.c2w])
        only = truth.masks(depth, c2w, [-1], script.known)["bank-only"]
        inside = math.nan
        if only.mean() >= 0.05:
            inside = psnr(frame[None], there.frames, only)
        whole = psnr(frame[None], there.frames)
        values = {"registered psnr": whole, "registered bank-only": inside}
        self.put(row, values | {"lost": found.score < self.tau} | off(found, pose))
