"""Models beside each other: the student and its teacher, two experts and one dense model.

All see the same worlds, walks and noise. PSNR rewards blur, so sharpness, the spread between two
seeds where nothing is known, and TWFD stand beside it.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

import flow
from dataset.film import psnr
from lab import metrics, players, revisits, worlds
from lab.players import How, Player
from lab.revisits import LAST, Return
from lab.run import Run
from lab.walks import Film
from lab.worlds import KNOWN, SCORED

BOUNDARIES = (0.75, 0.9, 0.95)  # noise levels where one expert hands over to the other
EXPERTS = "python train.py --stage moe for every expert, joined by --export"
DENSE = "python train.py --stage moe --expert dense"
SHOWN = ("teacher 50", "teacher 3", "student 3")  # in the figure, under the truth


class Model(NamedTuple):
    row: str
    player: Player
    steps: int
    guidance: float = 1.0

    def rollout(self, back: Return, seed: int) -> tuple[Tensor, dict]:
        options = replace(self.player.options, steps=self.steps, guidance=self.guidance)
        p = self.player._replace(options=options)
        return players.rollout(p, back.script, back.latents, 2, How(seed=seed))


# ---- three steps instead of fifty ---------------------------------------------------------


def models_of(teacher: Player, student: Player | None, full: bool) -> list[Model]:
    """Teacher and student at several numbers of steps, and what the student's teacher was."""
    few = (50, 16, 8, 4, 3) if full else (50, 3)
    models = [Model(f"teacher {n}", teacher, n) for n in few]
    models.append(Model("teacher 50, guided", teacher, 50, 3.0))
    if student:
        few = (1, 2, 3, 4, 8) if full else (1, 3)
        models += [Model(f"student {n}", student, n) for n in few]
    return models


def spread(images: Tensor, mask: ndarray) -> float:  # (2, F, H, W, 3), (F, H, W) bool
    """Root mean square between two seeds, over masked pixels."""
    apart = (images[0] - images[1]).square().mean(-1).numpy()
    return math.sqrt((apart * mask).sum() / (mask.sum() or math.nan))


def score_model(run: Run, model: Model, back: Return) -> Film:
    """Two seeds of one revisit; the film of the first, while it turns: its last frames stand still."""
    made = [model.rollout(back, seed) for seed in range(2)]
    film = players.decode(model.player, torch.cat([latents for latents, _ in made]), 80)
    image = film[:, -SCORED:]
    run.scores(model.row, image[0], back.true, back.masks)
    values = {
        "sharpness": metrics.sharpness(image[0], back.true).mean(),
        "ms per segment": np.mean([info["ms"]["denoise"] for _, info in made]),
        "rms, seen": spread(image, back.masks["seen"]),
        "rms, unseen": spread(image, back.masks["unseen"]),
    }
    run.put(model.row, values)
    return Film(film[0], back.views.frames[LAST[-1] - 79 :])


def distill(run: Run) -> None:
    """M6: the teacher at many and few steps against the student."""
    teacher = players.player(run.weights, "base") or players.lacking("base")
    student = players.player(run.weights, "student")
    if not student:
        run.absent["student 3"] = "python train.py --stage distill"

    # every model walks every world twice
    films: dict[str, list[Film]] = {}
    for seed in run.some:
        back = revisits.come_back(teacher, worlds.revisit(seed, 0.4))
        for model in models_of(teacher, student, run.full):
            films.setdefault(model.row, []).append(score_model(run, model, back))
    for row, of_worlds in films.items():
        made = [film.made for film in of_worlds]
        true = [film.true for film in of_worlds]
        run.put(row, {"TWFD": metrics.twfd(made, true)})

    # the figure: the truth, then three models, a world in each column
    strips = [[film.true[-1] for film in films["teacher 50"][:6]]]
    for row in SHOWN:
        strips.append([players.picture(film.made[-1]) for film in films.get(row, [])[:6]])
    rows = [np.concatenate(strip, 1) for strip in strips if strip]
    run.pictures["student"] = np.concatenate(rows).repeat(3, 0).repeat(3, 1)


# ---- two experts or one model -------------------------------------------------------------


def load_experts(run: Run) -> dict[str, Player]:
    """Every joined pair of experts, and the dense model trained as long."""
    files = sorted(Path(run.weights).glob("moe*.safetensors"))
    if not files:
        players.lacking("moe", " --expert high-first, high-third and low, joined by --export")
    # a file of experts knows its own boundary
    models = {}
    for file in files:
        p = players.player(run.weights, file.stem, 8)
        models[f"moe-{p.nets['dit'].boundary:g}"] = p
    dense = players.player(run.weights, "dense", 8)
    if dense:
        models["dense"] = dense
    # what is not there is said, and not measured
    for view in ("first", "third"):
        if "moe-0.9" not in models:
            run.absent[f"moe-0.9, {view}"] = EXPERTS
        if not dense:
            run.absent[f"dense, {view}"] = DENSE
    return models


def compare_views(run: Run, models: dict[str, Player], seed: int, view: str) -> None:
    """A revisit and an errand, of every model."""
    first = next(iter(models.values()))
    script = worlds.revisit(seed, 0.0, view)
    frames, z = players.opened(first, script)
    walk, arms = worlds.errand(seed, view)
    true, z_walk = players.opened(first, walk)
    for name, p in models.items():
        image = players.decode(p, players.rollout(p, script, z, 2)[0], SCORED)[0]
        run.scores(f"{name}, {view}", image, frames[-SCORED:])

        # do true actions lead nearer to the truth than shuffled ones?
        made = []
        for arm in ("true actions", "shuffled actions"):
            made.append(players.rollout(p, walk, z_walk, 1, How(actions=arms[arm]))[0])
        pair = players.decode(p, torch.cat(made), 40)
        obeyed, shuffled = (psnr(x, true[KNOWN : KNOWN + 40]).mean() for x in pair)
        sharpness = metrics.sharpness(image, frames[-SCORED:]).mean()
        effect = obeyed - shuffled
        run.put(f"{name}, {view}", {"sharpness": sharpness, "effect": effect})


def experts(run: Run) -> None:
    """§3.5: experts beside one dense model trained as long, in first and third person."""
    models = load_experts(run)
    first = next(iter(models.values()))
    run.notes.append(f"8 steps, {first.options.dtype}")
    for boundary in BOUNDARIES:
        for steps in (3, 50):
            levels = flow.sigma_grid(steps, first.meta["shift"])[:-1]
            asked = (levels >= boundary).float().mean()
            run.put(f"boundary {boundary}", {f"share of {steps} steps": asked})
    for seed in run.some:
        for view in ("first", "third"):
            compare_views(run, models, seed, view)
