"""May the measures be trusted.

Every one must put the truth before a turn of 2 degrees, and that before a frozen film, another
world and noise. Where one does not, nothing is reported.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

from lab import metrics, worlds
from lab.run import Run, off

NEAR = np.array([0.06, 0, -0.05, 0, 3.0])  # where registration starts to search, from the truth
BAD = ("frozen", "other world", "noise")
AT = slice(12, 16)  # frames of a short walk


def blurred(frames: ndarray) -> Tensor:
    sharp = metrics.planes(frames)
    soft = F.avg_pool2d(sharp, 3, 1, 1, count_include_pad=False)
    return soft.permute(0, 2, 3, 1)


def fakes(
    script: worlds.Script,
    true: ndarray,  # (4, H, W, 3)
    other: ndarray,  # of another world
    rng: np.random.Generator,
) -> dict[str, ndarray | Tensor]:
    """From the truth to pure noise; some are the truth but for a detail."""
    turned = script.poses[AT] + torch.tensor([0, 0, 0, 0, 2.0])
    patch = true.copy()
    patch[:, 26:38, 26:38] = other[:, 26:38, 26:38]
    first = worlds.draw(script, [0]).frames
    return {
        "truth": true,
        "patch replaced": patch,
        "blurred": blurred(true),
        "turned 2 degrees": worlds.shoot(script.scene, turned.numpy()).frames,
        "frozen": np.repeat(first, 4, 0),
        "mirrored": true[:, :, ::-1].copy(),
        "other world": other,
        "noise": rng.integers(0, 256, true.shape, np.uint8),
    }


def sanity(run: Run) -> None:
    """M0: fakes of every world; where clean frames were taken; what counts as lost."""
    rng = np.random.default_rng(0)
    scripts = [worlds.place(seed, "l:12 w:4") for seed in run.worlds]
    truth = [worlds.draw(script, AT).frames for script in scripts]
    for i, script in enumerate(scripts):
        for name, fake in fakes(script, truth[i], truth[i - 1], rng).items():
            run.scores(name, fake, truth[i])
            run.put(name, {"sharpness": metrics.sharpness(fake, truth[i]).mean()})
        # a clean frame has to be found where it was taken, from a start nearby
        pose = script.poses[12].numpy()
        found = worlds.register(script.scene, truth[i][0], pose + NEAR)
        run.put("registration of clean frames", off(found, pose))
    for unit in ("deg", "m"):
        error = run.row("registration of clean frames", unit)
        run.put("registration, median", {unit: np.median(error)})
    rank(run)
    sets(run, truth)


def rank(run: Run) -> None:
    """Does every measure order them, and which ZNCC tells another world from a touched-up truth?"""
    for name in metrics.METRICS:
        best = run.row("truth", name).mean()
        near = run.row("turned 2 degrees", name).mean()
        bad = max(run.row(row, name).mean() for row in BAD)
        run.put("ranks fakes as expected", {name: best > near > bad})
        run.put("every measure", {"as expected": best > near > bad})
    foreign = np.quantile(run.row("other world", "zncc"), 0.95)
    patched = np.quantile(run.row("patch replaced", "zncc"), 0.05)
    run.put("lost threshold tau", {"zncc": (foreign + patched) / 2})


def sets(run: Run, truth: list[ndarray]) -> None:
    """TWFD where it should be small: of two halves of the truth, and of the truth and its blur."""
    halves = metrics.twfd(truth[::2], truth[1::2] or truth)
    run.put("two halves of the truth", {"TWFD": halves})
    soft = [blurred(frames) for frames in truth]
    run.put("truth and its blur", {"TWFD": metrics.twfd(soft, truth)})
