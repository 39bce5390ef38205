"""Measure every claim and write the tables and figures.

Paper: §5 and Tables 1-2. It reports speed and VAE fidelity and no metric of the world model; those here are ours.

    PSNR  = min(50, −10 log10 mean (x − x̂)²)            ZNCC = a·b: frames without their channel means, of unit length
    reliance = PSNR with the right memory − with zeros  adoption = share of frames nearer to the donor of a false memory
    gain  = Σ c·m / Σ c²                                motion m measured by registration per motion c commanded
    KCtrl = share of opposite keys with m·c/|c| beyond a dead zone for both: standing still earns nothing
    E     = S/2F + T_gen + T_dec                        action to photon: S frames a segment, shown at F per second

We own the renderer: true frames at any pose, exact depth, what an old frame saw (bank-only pixels: seen in the bank, not in the past
window), where a generated frame was taken (registration). Scores of pictures are in lab/metrics.py, statistics in lab/stats.py. Unit: the
held-out world; arms share worlds, paths and noise; intervals are 95 % BCa over worlds. Rollouts go through realtime.Denoiser, as play
does. Predictions are stored before the run; every table and figure comes from results/*.json alone. What needs retraining:
--weights RUN --out DIR/ARM-SEED (`ablation` is a short command for it); then `compare --out DIR` sets the arms side by side. Departures:
LPIPS, FID, FVD need downloaded networks and are not computed; TWFD uses principal components of pixels, not a trained network.
Commands: python evaluate.py {sanity,memory,drift,explore,action,distill,int8,vae,retrieval,rope,moe,latency,ablation,all,report,compare}
Tests: pytest tests/test_evaluate.py
"""

import argparse
import base64
import copy
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

import attention
import camera
import dit
import flow
import memory
import moe
import quant
import realtime
import world
from context import Clip, Lens, query_offsets, segment_cameras
from dataset import episode
from dataset.prompt import embed_prompt
from engine import weights
from lab import bench, claims, metrics, report, stats, truth
from memory import MemoryBank

ROOT = Path(__file__).resolve().parent
SIZE, KNOWN, SCORED = 64, 177, 12  # pixels; true frames in the bank; frames that are scored

# ---- truth from geometry ---------------------------------------------------------------------------------------------


def shoot(
    scene: world.Scene, poses: ndarray, size: int = SIZE, samples: int = 2, view: str = "first"
) -> tuple[ndarray, ndarray, ndarray]:
    """Frames, depth and cameras of poses (n, 5); in third person with the figure that this world's player has."""
    c2w, figure = (
        world.cameras(scene, poses, view),
        (poses, scene.seed * 123_456_789 % world.N_CHARACTERS),
    )
    return *world.render(
        scene,
        c2w,
        camera.intrinsics(size, size).numpy(),
        size,
        size,
        figure if view == "third" else None,
        samples,
    ), c2w


def register(scene: world.Scene, frame: ndarray | Tensor, pose: Sequence[float]) -> truth.Found:
    """Where in this world was a frame taken, near a pose (5,) and not inside a wall?"""
    look = lambda poses, size, samples: shoot(scene, poses.numpy(), size, samples)[0]
    free = lambda xz: torch.from_numpy(
        ~scene.solid[tuple(np.floor(xz.numpy()).astype(int).clip(0, len(scene.solid) - 1).T)]
    )
    return (
        found := truth.register(look, free, torch.as_tensor(frame), torch.as_tensor(pose))
    )._replace(pose=found.pose.numpy())


# ---- paths with known truth ------------------------------------------------------------------------------------------


Script = namedtuple(
    "Script", "scene poses keyboard mouse known view", defaults=(KNOWN, "first")
)  # poses (F, 5) float64, actions (F-1, 6 | 2);
# it touches nothing, so that integrated actions are the engine's poses; frames 0 .. known-1 fill the bank
scene = lru_cache(maxsize=64)(world.make_scene)


def chords(
    text: str,
) -> tuple[
    Tensor, Tensor
]:  # "j:10 w:4 l2.5:3 -:6": key : frames, after j or l times 1.5 degrees a frame
    held = [
        (key, float(times or 1))
        for key, times, n in re.findall(r"(\S)([\d.]*):(\d+)", text.replace("-", "_"))
        for _ in range(int(n))
    ]
    keyboard, mouse = camera.actions_from_keys([key for key, _ in held])
    return keyboard, mouse * torch.tensor([times for _, times in held]).view(-1, 1)


def undone(text: str) -> str:  # the plan that walks a plan back
    return " ".join(reversed(text.translate(str.maketrans("wsadlj", "swdajl")).split()))


def place(seed: int, text: str, look: int = -1, view: str = "first") -> Script:
    """Where a plan can be walked without touching anything and frame `look` shows more than a near wall."""
    (keyboard, mouse), player, rng = (
        chords(text),
        world.World(scene(seed)),
        np.random.default_rng([seed, 5]),
    )
    for attempt in range(400):
        x, z = player.nav.point(*rng.choice(player.nav.cells))
        poses = camera.integrate(
            (x, -world.EYE, z, 0.0, 1.5 * int(rng.integers(240))), keyboard, mouse
        )
        player.pose = tuple(poses[0].tolist())
        if any(player.move(k, m) for k, m in zip(keyboard.tolist(), mouse.tolist(), strict=True)):
            continue
        rgb, depth, _ = shoot(player.scene, poses[[look]].numpy(), 16, view=view)
        if attempt > 200 or (np.median(depth) > 1.5 and depth.min() > 0.6 and rgb.std() > 20):
            return Script(player.scene, poses, keyboard, mouse, view=view)
    raise ValueError(f"world {seed} has no room for the path {text!r}; shorten it")


def revisit(seed: int, offset: float, view: str = "first") -> Script:
    """Look about, turn round for more than the past window, then side-step (or not), turn back and look at the first view."""
    steps = round(offset / camera.STEP)
    return place(
        seed,
        f"l:10 j:20 l:10 l2:60 l:10 j:20 l:10 -:36 {'ad'[seed % 2]}:{steps} l2.5:48 -:{32 - steps}",
        view=view,
    )


def patrol(
    seed: int, segments: int
) -> Script:  # in the seen room: all round, two steps there and back
    return place(
        seed,
        " l2:20 w:4 s:8 w:4 l2:20 a:4 d:8 a:4 l2:20 -:8 l2:20 w:4 s:4 l2:20 -:8 l2:20"
        * (1 + -(-(KNOWN + 40 * segments) // 176)),
    )


def journey(
    seed: int, segments: int
) -> Script:  # exploring what nobody has seen; the walk that touches least
    walks = (world.simulate(scene(seed), s, KNOWN + 40 * segments, "rl") for s in range(4))
    best = {
        k: torch.as_tensor(v)
        for k, v in min(walks, key=lambda w: w["contact"].sum()).items()
        if isinstance(v, ndarray)
    }
    return Script(scene(seed), best["player"], best["keyboard"][:-1].float(), best["mouse"][:-1])


def draw(
    script: Script, at: Sequence[int] | slice = slice(None)
) -> tuple[ndarray, ndarray, ndarray]:
    return shoot(script.scene, script.poses.numpy()[at], view=script.view)


# ---- rollouts: the object that play drives ---------------------------------------------------------------------------


Player = namedtuple(
    "Player", "name options meta nets"
)  # nets: dit, encoder, decoder, as realtime loads them


@lru_cache(maxsize=8)
def player(weights: str, name: str, steps: int = 0) -> Player | None:
    """The student, the base or the experts as realtime loads them, of a folder or a run; None where nobody has trained them yet."""
    file, stage = Path(weights) / f"{name}.safetensors", {"student": "distill"}.get(name, name)
    if (Path(weights) / "latest").exists() and json.loads(
        (Path(weights) / "config.json").read_text()
    )["stage"] == stage:
        file = Path(weights)  # a run of train.py, with the shipped VAE
    if not file.exists():
        return None
    options = realtime.resolve(
        realtime.Options(weights=str(file), steps=steps or (3 if name == "student" else 50))
    )
    return Player(name, options, *realtime.load_parts(options, "dit", "encoder", "decoder")[::-1])


def lacking(stage: str, how: str = "") -> None:
    raise FileNotFoundError(
        f"no {stage} weights; make them with: python train.py --stage {stage}{how}"
    )


@torch.no_grad()
def decode(
    p: Player, z: Tensor, last: int
) -> Tensor:  # (B, C, T, h, w) -> (B, last, H, W, 3) in [0, 1]
    """The last frames; four latents before them fill the decoder's history."""
    z = z[:, :, -(-(-last // 4) + 4) :]
    video = p.nets["decoder"].decode(z.to(next(p.nets["decoder"].parameters()).dtype), clamp=True)[
        :, :, -last:
    ]
    return (video.float().permute(0, 2, 3, 4, 1) + 1) / 2


@torch.no_grad()
def opened(
    p: Player, script: Script, frames: ndarray | None = None
) -> tuple[Script, ndarray, Tensor]:  # latents (1, C, T, h, w)
    frames = (
        draw(script, slice(len(script.poses) - (len(script.poses) - 1) % 4))[0]
        if frames is None
        else frames
    )
    weight = next(p.nets["encoder"].parameters())
    return (
        script,
        frames,
        p.nets["encoder"].encode(
            torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(weight) / 127.5 - 1, chunk=12
        ),
    )


def prompt(p: Player, script: Script) -> Tensor:
    return embed_prompt(
        world.scene_caption(script.scene), p.nets["dit"].cfg.text_dim, p.nets["dit"].cfg.text_len
    )[None]


def rollout(
    p: Player,
    script: Script,
    z: Tensor,
    segments: int,
    policy: str = "camera",
    bank: Tensor | None = None,
    shuffle: bool = False,
    actions: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    later: int = 0,
    new: int = 10,
    after: Callable | None = None,
) -> tuple[Tensor, dict]:
    """Four true latents and the new ones after them (1, C, 4 + 10·segments, h, w), or 1 + 14 and then 10; what the denoiser said last. bank:
    other latents under the right poses; shuffle: the right ones under wrong poses; later: latents of silence before now; new: at once."""
    K, f = (script.known - 1) // 4 + 1, script.known - 1
    keyboard, mouse = actions or (script.keyboard[f:], script.mouse[f:])
    denoiser = realtime.Denoiser(p.nets["dit"], p.meta, p.options)
    if script.view == "third":  # the arm of the camera shortens at the walls of this world
        denoiser.camera = lambda poses: torch.from_numpy(
            world.cameras(script.scene, poses.numpy(), "third")
        )
    if isinstance(p.nets["dit"], moe.Experts):
        p.nets["dit"].look(script.view)
    denoiser.start(
        realtime.Walk(
            z[:, :, max(0, K - 4) : K],
            prompt(p, script),
            script.poses[: f + 1],
            script.keyboard[:f],
            script.mouse[:f],
            seed,
            int(K > 1),
            K + later,
            4 * later,
        )
    )
    cameras = segment_cameras(denoiser.camera(script.poses[: f + 1])[None], 0, K)[0].float()
    cameras = (
        cameras[torch.randperm(K, generator=torch.Generator().manual_seed(seed))]
        if shuffle
        else cameras
    )
    denoiser.bank.append(
        (z if bank is None else bank)[0, :, :K].to(denoiser.now.past),
        cameras.to(p.options.device),
        torch.arange(K),
    )
    latents = [denoiser.now.past]
    ends = (
        range(4 * new, 40 * segments + 1, 4 * new)
        if K > 1
        else range(56, 40 * segments + 17, 4 * new)
    )  # the first segment of all is longer
    for t, end in zip((0, *ends), ends, strict=False):
        x0, info = denoiser.run(keyboard[t:end], mouse[t:end], policy)
        latents.append(x0)
        if after and t == 0:
            after(denoiser)
    return torch.cat(latents, 2), info


# ---- commands: each fills raw["row/column"] --------------------------------------------------------------------------


@dataclass
class Run:
    worlds: list[int]
    full: bool
    weights: str
    out: Path
    raw: claims.Raw
    pictures: dict[str, ndarray]
    notes: list[str]
    facts: dict  # what a figure needs beside raw

    def put(self, row: str, values: dict[str, float]) -> None:
        for column, value in values.items():
            self.raw.setdefault(f"{row}/{column}", []).append(float(value))

    some = property(lambda self: self.worlds if self.full else self.worlds[:6])  # for what is slow
    tau = property(
        lambda self: (
            report.results(ROOT / "results")
            .get("sanity", {"raw": {}})["raw"]
            .get("lost threshold tau/zncc", [0.75])[0]
        )
    )

    @property
    def player(
        self,
    ) -> Player:  # what play.py would use: the student at 3 steps, else the base at 8
        found = (
            player(self.weights, "student") or player(self.weights, "base", 8) or lacking("base")
        )
        self.notes += (
            [note]
            if (note := f"{found.name}, {found.options.steps} steps, {found.options.dtype}")
            not in self.notes
            else []
        )
        return found

    def scores(
        self,
        row: str,
        pred: ndarray | Tensor,
        true: ndarray,
        masks: dict[str, ndarray] | None = None,
    ) -> None:
        """One world in every column of a row; frames with a nearly empty mask are skipped."""
        self.put(row, {name: metric(pred, true).mean() for name, metric in metrics.METRICS.items()})
        for name, mask in ((name, masks[name]) for name in masks or {} if name != "unseen"):
            some = mask.mean((1, 2)) >= 0.05
            self.put(
                row,
                {
                    f"psnr {name}": episode.psnr(pred[some], true[some], mask[some]).mean()
                    if some.any()
                    else math.nan
                },
            )

    def located(
        self, row: str, script: Script, frame: Tensor, t: int, depth: ndarray, c2w: ndarray
    ) -> None:
        """Registered scores: what remains when the error of the pose is taken out, and that error. Lost frames are counted."""
        found = register(script.scene, frame.numpy(), pose := script.poses[t].numpy())
        true, *there = shoot(script.scene, found.pose[None])
        only = truth.masks(
            *(np.concatenate(x) for x in zip((depth, c2w), there, strict=True)), [-1], script.known
        )["bank-only"]
        there = {
            "registered psnr": episode.psnr(frame[None], true),
            "lost": found.score < self.tau,
            "registered psnr bank-only": episode.psnr(frame[None], true, only)
            if only.mean() >= 0.05
            else math.nan,
        }
        self.put(row, there | off(found, pose))

    def distances(
        self, row: str, name: str, pairs: list[tuple[Tensor, ndarray]]
    ) -> None:  # of distributions, over all worlds
        self.put(row, {name + column: value for column, value in metrics.distances(pairs).items()})


off = lambda found, pose: {
    "m": np.hypot(*(found.pose - pose)[[0, 2]]),
    "deg": abs(found.pose - pose)[4],
    "ambiguous": found.ambiguous,
}


def sanity(run: Run) -> None:
    """M0: every metric must rank fakes as expected; M9 needs no model."""
    rng, scripts = np.random.default_rng(0), [place(s, "l:12 w:4") for s in run.worlds]
    truth = [draw(script, slice(12, 16))[0] for script in scripts]
    soft = lambda x: F.avg_pool2d(metrics.planes(x), 3, 1, 1, count_include_pad=False).permute(
        0, 2, 3, 1
    )
    for i, (script, true) in enumerate(zip(scripts, truth, strict=True)):
        turned, patch = script.poses[12:16] + torch.tensor([0, 0, 0, 0, 2.0]), true.copy()
        patch[:, 26:38, 26:38] = truth[i - 1][:, 26:38, 26:38]
        for name, fake in {
            "truth": true,
            "patch replaced": patch,
            "blurred": soft(true),
            "turned 2 degrees": shoot(script.scene, turned.numpy())[0],
            "frozen": np.repeat(draw(script, [0])[0], 4, 0),
            "mirrored": true[:, :, ::-1].copy(),
            "other world": truth[i - 1],
            "noise": rng.integers(0, 256, true.shape, np.uint8),
        }.items():
            run.scores(name, fake, true)
            run.put(name, {"sharpness": metrics.sharpness(fake, true).mean()})
        pose = script.poses[12].numpy()
        run.put(
            "registration of clean frames",
            off(register(script.scene, true[0], pose + np.array([0.06, 0, -0.05, 0, 3.0])), pose),
        )
    for m, sign in metrics.BETTER.items():
        best, near, *bad = (
            sign * np.mean(run.raw[f"{row}/{m}"])
            for row in ("truth", "turned 2 degrees", "frozen", "other world", "noise")
        )
        run.put("ranks fakes as expected", {m: best > near > max(bad)})
    run.put(
        "lost threshold tau",
        {
            "zncc": (
                np.quantile(run.raw["other world/zncc"], 0.95)
                + np.quantile(run.raw["patch replaced/zncc"], 0.05)
            )
            / 2
        },
    )
    run.distances(
        "two halves of the truth",
        "",
        [(torch.from_numpy(np.concatenate(truth[::2])), np.concatenate(truth[1::2] or truth))],
    )
    run.distances("truth and its blur", "", [(soft(np.concatenate(truth)), np.concatenate(truth))])


def remember(run: Run) -> None:
    """M1 and M11: come back to what only the bank has seen, from the same place and from others; then swap the memory."""
    p, at, strips = run.player, np.arange(257 - SCORED, 257), []
    _, frames, z = opened(p, revisit(run.worlds[-1], 0.0))  # the donor of the first world
    donor = z, frames[at]
    for seed in run.worlds:
        for name, offset in claims.PLACES.items():
            script = revisit(seed, offset)
            frames, depth, c2w = draw(script)
            masks, nearest = (
                truth.masks(depth, c2w, at, KNOWN),
                memory.overlap(*map(torch.from_numpy, (c2w[at], c2w[:KNOWN:4]))).argmax(1),
            )
            z, true = opened(p, script, frames)[2], frames[at]
            arms = {"camera": {}, "none": {"policy": "none"}}
            if name == "exact":
                arms |= {
                    "recent": {"policy": "recent"},
                    "random": {"policy": "random"},
                    "zeros": {"bank": torch.zeros_like(z)},
                    "other world": {"bank": donor[0]},
                    "wrong poses": {"shuffle": True},
                }
            new = [rollout(p, script, z, 2, **how)[0] for how in arms.values()]
            images = dict(
                zip(
                    (*arms, "VAE ceiling"),
                    decode(p, torch.cat([*new, z[:, :, -24:].to(new[0])]), SCORED),
                    strict=True,
                )
            )
            old = np.arange(0, KNOWN, 4)
            shown = decode(p, z[:, :, : len(old)], KNOWN)[0, old]  # the bank as the VAE shows it
            copied, warped = (
                shown[nearest],
                truth.warp(depth[at], c2w[at], shown, depth[old], c2w[old]),
            )
            for arm, image in (
                images
                | {"copy nearest": copied, "oracle warp": warped, "floor: other world": donor[1]}
            ).items():
                run.scores(f"{name}, {arm}", image, true, masks)
            for arm in ("camera", "none", "oracle warp"):
                run.located(
                    f"{name}, {arm}",
                    script,
                    (images | {"oracle warp": warped})[arm][-1],
                    at[-1],
                    depth,
                    c2w,
                )
            if name == "exact":
                for arm in ("camera", "zeros", "wrong poses", "other world"):
                    run.put(
                        f"exact, {arm}",
                        {
                            "adoption": metrics.adoption(
                                images[arm], true, donor[1], masks["bank-only"]
                            )
                        },
                    )
                shown = (
                    np.uint8(255 * x[-1].numpy())
                    for x in (images["camera"], images["none"], images["other world"], copied)
                )
                strips.append(np.concatenate([true[-1], *shown], 1))
                following = z, true
        donor = following
    for seed, out in ((s, out) for s in run.some for out in claims.OUT):
        palindrome(run, p, seed, out)
    run.pictures["revisit"] = (
        np.concatenate(strips[:4]).repeat(2, 0).repeat(2, 1)
    )  # truth | memory | none | of another world | copy


def palindrome(run: Run, p: Player, seed: int, out: str) -> None:
    """M2, M3: a walk out, then each action undone; frames of one commanded pose beside each other, by the windows (W = 56) between them. A
    film that stands still would agree with itself: where less than half of the way was travelled, the score is that of other views."""
    n = len(chords(out)[0])
    for start, before in (("a bank", "l2:120 l:20 j:20 -:16 "), ("one frame", "")):
        script = place(seed, f"{before}{out} {undone(out)} -:40", 0)._replace(
            known=len(chords(before)[0]) + 1
        )
        frames, depth, c2w = draw(script)
        (_, _, z), first = opened(p, script, frames), 56 if script.known == 1 else 40
        home, turned = script.poses.numpy()[[script.known - 1, script.known + 5]]
        for row, policy in (
            (f"palindrome{claims.OUT[out]} from {start}, {policy}", policy)
            for policy in ("camera", "none")
        ):
            segments = 1 - (first - 2 * n) // 40
            image, true = (
                decode(p, rollout(p, script, z, segments, policy)[0], first + 40 * (segments - 1))[
                    0
                ],
                frames[script.known :],
            )
            travelled = (register(script.scene, image[5].numpy(), (home + turned) / 2).pose - home)[
                4
            ] / (turned - home)[4]
            for gap in (gap for gap in claims.GAPS if 28 * gap + 3 < n):
                ago, now = (n - 1 + sign * (int(28 * gap) + np.arange(-3, 4)) for sign in (-1, 1))
                pair = (
                    (image[ago], image[now]) if travelled >= 0.5 else (true[ago], true[[n - 1] * 7])
                )
                run.put(row, {f"{gap} W apart, dB": episode.psnr(*pair).mean()})
            run.put(row, {"travelled / commanded": travelled})
            run.located(
                row, script, image[2 * n - 1], script.known + 2 * n - 1, depth, c2w
            )  # the commanded pose is home again


def follow(
    run: Run, p: Player, arm: str, script: Script, segments: int, policy: str
) -> tuple[Tensor, ndarray, dict[str, list[float]]]:
    """A long rollout: frames, true frames and curves by segment; its summaries go into the row `arm`."""
    _, frames, z = opened(p, script, draw(script, slice(KNOWN + 40 * segments))[0])
    image, true = (
        decode(p, rollout(p, script, z, segments, policy)[0], 40 * segments)[0],
        frames[KNOWN:],
    )
    curve = {
        "psnr": episode.psnr(image, true),
        "zncc": metrics.zncc(image, true),
        "sharpness": torch.cat(
            [
                metrics.sharpness(image[k : k + 40], true[k : k + 40])
                for k in range(0, 40 * segments, 40)
            ]
        ),
        "colour": (255 * image - torch.from_numpy(true)).mean((1, 2)).abs().mean(1),
    }  # grey levels off, mean over the channels
    parts = {name: values.view(segments, 40).mean(1).tolist() for name, values in curve.items()}
    slope = {
        name: 2.5 * stats.theil_sen(range(segments), parts[name]) for name in ("psnr", "colour")
    }
    run.put(
        arm,
        {
            "dB per 100 frames": slope["psnr"],
            "grey levels per 100 frames": slope["colour"],
            "sharpness at the end": parts["sharpness"][-1],
            **{
                f"sharpness after {n}": metrics.sharpness(
                    image[n - 40 : n], true[n - 40 : n]
                ).mean()
                for n in (256, 640)
                if n <= len(true)
            },
            "last 15 % - first, dB": curve["psnr"][-6 * segments :].mean()
            - curve["psnr"][: 6 * segments].mean(),
            "frames until lost": (end := stats.time_to_lost(curve["zncc"], run.tau)),
            "lost": end < len(true),
        },
    )
    return image, true, parts


def drift(run: Run) -> None:
    """M4: in place and exploring; per segment the scores, over all worlds the distance of distributions."""
    p, segments, made = run.player, 16 if run.full else 8, {}
    run.notes.append(f"{segments} segments of 40 frames after {KNOWN} true ones")
    for seed, mode, policy in (
        (s, m, q) for s in run.some for m in ("in place", "exploring") for q in ("camera", "none")
    ):
        image, true, parts = follow(
            run,
            p,
            arm := f"{mode}, {policy}",
            (patrol if mode == "in place" else journey)(seed, segments),
            segments,
            policy,
        )
        for k in range(segments):
            run.put(f"segment {k + 1:02d}", {f"{arm}: {name}": x[k] for name, x in parts.items()})
            made.setdefault((f"segment {k + 1:02d}", f"{arm}: "), []).append(
                (image[40 * k : 40 * k + 40], true[40 * k : 40 * k + 40])
            )
    for where, pairs in made.items():
        run.distances(*where, pairs)


LONG = 24  # segments of 40 frames: a minute at 16 frames/s
SEEN_AT = (0, 64, 160, 320, 640, 960)  # frames that the strip shows: 0, 4, 10, 20, 40 and 60 s
SCORED_AT = (56, 256, 640, 976)  # frames of which the last forty before are scored


def explore(run: Run) -> None:
    """A start picture, and a minute of walking to where nobody has been: is it still a world?

    Truth above, model below, a pair of rows per world, in OUT/explore.png; sharpness against the truth and
    against what the VAE can show of it, for segments of 10, 5 and 2 new latents, as far as they are trained.
    """
    p = run.player
    strips = []
    for seed in run.worlds[:10]:
        script = journey(seed, LONG)._replace(known=1)
        frames = draw(script, slice(0, 40 * LONG + 17))[0]
        z = opened(p, script, frames)[2]
        shown = decode(p, z, len(frames) - 1)[0].numpy()  # by the VAE, the most a model could do
        for new in (int(n) for n in p.meta["new"].split()):
            latents = rollout(p, script, z, LONG, new=new)[0]
            film = decode(p, latents, len(frames) - 1)[0].numpy()
            score_walk(run, f"{new} at once", film, frames[1:], shown)
            if str(new) == p.meta["new"].split()[0]:
                rows = np.concatenate([frames[:1], np.uint8(255 * film + 0.5)])
                pair = [np.concatenate(x[list(SEEN_AT)], 1) for x in (frames, rows)]
                strips.append(np.concatenate(pair))
    half = -(-len(strips) // 2)
    left, right = np.concatenate(strips[:half]), np.concatenate(strips[-half:])
    gap = np.full((len(left), 8, 3), 255, np.uint8)
    picture = np.concatenate([left, gap, right], 1).repeat(2, 0).repeat(2, 1)
    episode.write_png(run.out / "explore.png", picture)
    run.notes.append(f"strip: {run.out / 'explore.png'}, after {SEEN_AT} frames")


def score_walk(run: Run, row: str, film: ndarray, true: ndarray, shown: ndarray) -> None:
    """Sharpness and PSNR of the forty frames before each of SCORED_AT."""
    for end in SCORED_AT:
        last = slice(end - 40, end)
        made = metrics.sharpness(film[last], true[last]).mean()
        most = metrics.sharpness(shown[last], true[last]).mean()
        values = {
            f"sharpness after {end}": made,
            f"sharpness of the VAE after {end}": most,
            f"psnr after {end}": episode.psnr(film[last], true[last]).mean(),
        }
        run.put(row, values)


def errand(seed: int, view: str = "first") -> tuple[Script, dict[str, tuple[Tensor, Tensor]]]:
    """A walk through what the bank knows; its last 40 actions, the same shuffled and with every turn reversed, and none."""
    script, f = place(seed, "l2:120 l:20 j:20 -:16 l:12 w:8 j:12 d:4 s:4 -:4", view=view), KNOWN - 1
    keys, turns, mixed = (
        script.keyboard[f:],
        script.mouse[f:],
        np.random.default_rng(seed).permutation(40),
    )
    return script, {
        "true actions": (keys, turns),
        "shuffled actions": (keys[mixed], -turns[mixed]),
        "no action": (0 * keys, 0 * turns),
    }


def opposites(run: Run, p: Player, seed: int) -> None:
    """Opposite keys from one state under one noise, held for 0.37 m or 12 degrees; dead zone 0.1 m or 2 degrees, eight frames later."""
    script, _, z = opened(p, place(seed, "w:3 s:6 w:3 a:3 d:6 a:3 l2:120 l:10 j:10 -:52"))
    home = script.poses[KNOWN - 1].numpy()
    for name, (one, two, axes, dead) in claims.OPPOSITE.items():
        arms = [chords(f"{held} -:{40 - int(held[-1])}") for held in (one, two)]
        images = decode(
            p, torch.cat([rollout(p, script, z, 1, actions=arm)[0] for arm in arms]), 40
        )[:, 7].numpy()
        moved = np.stack([register(script.scene, image, home).pose for image in images]) - home
        asked = np.stack([camera.integrate(home, *arm)[8].numpy() for arm in arms]) - home
        run.put("KCtrl", {name: metrics.answered(moved[:, axes], asked[:, axes], dead)})


@torch.no_grad()
def read_keys(run: Run, p: Player, reader: metrics.KeyReader, seed: int) -> None:
    """Which keys a small network reads off frames: of the model, of the VAE and the truth (ceilings), without actions and mixed (floors)."""
    script, frames, z = opened(
        p, place(seed, "w:7 s:7 a:7 d:7 l2:120 l:10 j:10 -:8 w:7 s:7 a:7 d:7 l:6 j:6")
    )
    keys, turns = script.keyboard[KNOWN - 1 :], script.mouse[KNOWN - 1 :]
    made, idle = decode(
        p,
        torch.cat([rollout(p, script, z, 1, actions=(on * keys, on * turns))[0] for on in (1, 0)]),
        40,
    )
    for row, image in (
        ("model", made),
        ("VAE", decode(p, z, 40)[0]),
        ("truth", frames[KNOWN:]),
        ("no action", idle),
        ("mixed", made),
    ):
        *pair, held = metrics.pairs(image, keys[1:], turns[1:], torch.zeros(40))
        held = (
            held[torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))]
            if row == "mixed"
            else held
        )
        run.put(
            f"keys read: {row}",
            dict(zip(metrics.READ, metrics.balanced_accuracy(reader(*pair), held), strict=True)),
        )


def obey(run: Run, p: Player, seed: int, at: Sequence[int] = (11, 19, 31, 39)) -> None:
    script, arms = errand(seed)
    _, frames, z = opened(p, script)
    images = decode(
        p, torch.cat([rollout(p, script, z, 1, actions=a)[0] for a in arms.values()]), 40
    )
    for arm, image in zip(arms, images, strict=True):
        run.scores(arm, image, frames[KNOWN : KNOWN + 40])
    if seed in run.some:
        commanded = script.poses[[KNOWN - 1, *(KNOWN + t for t in at)]].numpy()
        found = np.stack(
            [
                commanded[0],
                *(
                    register(
                        script.scene, images[0, t].numpy(), script.poses[KNOWN + t].numpy()
                    ).pose
                    for t in at
                ),
            ]
        )
        for kind, axes in (("turn", (4,)), ("move", (0, 2))):
            m, c = (np.diff(x[:, axes], axis=0) for x in (found, commanded))
            run.put(
                kind,
                {
                    "gain": (m * c).sum() / (c * c).sum(),
                    "relative pose error": np.sqrt(((m - c) ** 2).sum(1).mean()),
                },
            )


def action(run: Run) -> None:
    """M5: true, shuffled and no actions under equal noise; gain by registration, without Sim(3) alignment; opposite keys; keys read."""
    p = run.player
    walks = [
        (where, world.simulate(where, s, 121, "random"))
        for where in map(scene, world.SPLITS["tune"][:32])
        for s in (2, 3)
    ]
    learnt = [
        metrics.pairs(shoot(where, w["player"])[0], w["keyboard"], w["mouse"], w["contact"])
        for where, w in walks
    ]
    reader = metrics.learn_keys(*map(torch.cat, zip(*learnt, strict=True)))
    for seed in run.worlds:
        obey(run, p, seed)
        if seed in run.some:
            opposites(run, p, seed)
            read_keys(run, p, reader, seed)


def distill(run: Run) -> None:
    """M6: the teacher at many and few steps against the student, on the same worlds, paths and noise; two seeds for diversity."""
    teacher, student, at, made = (
        player(run.weights, "base") or lacking("base"),
        player(run.weights, "student"),
        np.arange(257 - SCORED, 257),
        {},
    )
    models = [
        (f"teacher, {n} steps", teacher, n, 1.0)
        for n in ((50, 16, 8, 4, 3) if run.full else (50, 3))
    ]
    models += [
        (f"{claims.T50}, guided", teacher, 50, 3.0),
        *(
            (f"student, {n} steps", student, n, 1.0)
            for n in ((1, 2, 3, 4, 8) if run.full else (1, 3))
        ),
    ]
    for seed in run.some:
        script = revisit(seed, 0.4)
        frames, depth, c2w = draw(script)
        masks, z = truth.masks(depth, c2w, at, KNOWN), opened(teacher, script, frames)[2]
        for row, p, n, w in (model for model in models if model[1]):
            how = replace(p.options, steps=n, guidance=w)
            latents, said = zip(
                *(rollout(p._replace(options=how), script, z, 2, seed=s) for s in range(2)),
                strict=True,
            )
            film = decode(p, torch.cat(latents), 80)
            image = film[:, -SCORED:]
            run.scores(row, image[0], frames[at], masks)
            spread = (image[0] - image[1]).square().mean(-1).numpy()
            run.put(
                row,
                {
                    "sharpness": metrics.sharpness(image[0], frames[at]).mean(),
                    "ms per segment": np.mean([s["ms"]["denoise"] for s in said]),
                }
                | {
                    f"rms between seeds, {w}": math.sqrt(
                        (spread * masks[w]).sum() / (masks[w].sum() or math.nan)
                    )
                    for w in ("seen", "unseen")
                },
            )
            made.setdefault(row, []).append(
                (film[0], frames[at[-1] - 79 :])
            )  # while it turns: the last frames stand still
    for row, pairs in made.items():
        run.distances(row, "", pairs)
    strips = [
        [true[-1] for _, true in made[claims.T50][:6]],
        *(
            [np.uint8(255 * x[-1].numpy()) for x, _ in made[r][:6]]
            for r in (claims.T50, claims.T3, claims.S)
            if r in made
        ),
    ]
    run.pictures["student"] = (
        np.concatenate([np.concatenate(x, 1) for x in strips]).repeat(3, 0).repeat(3, 1)
    )  # truth, teacher twice, student
    run.notes += [] if student else ["student rows: python train.py --stage distill"]


@torch.no_grad()
def int8(run: Run) -> None:
    """M7: what INT8 does to a velocity, a segment and a rollout, beside a float rollout disturbed by as much once."""
    p, segments = run.player, 8 if run.full else 3
    quant.quantize_(small := copy.deepcopy(p.nets["dit"]), "qkvo")
    run.notes.append("self-attention q,k,v,o, kernel torch._int_mm")
    for seed in run.some:
        script, _, z = opened(p, patrol(seed, segments))
        exact, rough = (
            rollout(q, script, z, segments)[0].float()
            for q in (p, p._replace(nets=p.nets | {"dit": small}))
        )
        size = (rough - exact)[:, :, 4:14].square().mean().sqrt()
        run.put(
            "segment 1",
            {
                "latent SQNR dB": 20
                * math.log10(float(exact[:, :, 4:14].square().mean().sqrt() / size))
            },
        )

        def disturb(
            denoiser: realtime.Denoiser, size: Tensor = size, seed: int = seed
        ) -> None:  # what is known of the first segment
            known = denoiser.bank.store["latents"][denoiser.bank.size - 10 : denoiser.bank.size]
            known += (
                torch.randn(known.shape, generator=torch.Generator().manual_seed(seed)).to(known)
                * size
            )
            denoiser.now = denoiser.now._replace(past=known[-4:].transpose(0, 1)[None])

        for arm, other in (
            ("int8", rough),
            ("disturbed", rollout(p, script, z, segments, after=disturb)[0].float()),
        ):
            for k, (a, b) in enumerate(
                zip(exact[:, :, 14:].split(10, 2), other[:, :, 14:].split(10, 2), strict=True), 2
            ):
                run.put(
                    arm,
                    {
                        f"latent SQNR to float, segment {k}": 10
                        * math.log10(float(a.square().sum() / (a - b).square().sum()))
                    },
                )
        c2w, start, dtype = (
            camera.pose_to_c2w(script.poses[None]),
            torch.tensor([30]),
            getattr(torch, p.options.dtype),
        )
        clip = Clip(z.float(), c2w, script.keyboard[None], script.mouse[None], prompt(p, script))
        chosen = memory.select_training(c2w, start, 10)
        x0, context = clip.window(start, 10, 4, chosen, Lens(p.meta["encoding"]))
        for sigma in torch.tensor([[0.9], [0.5], [0.1]]):
            x = flow.add_noise(
                x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), sigma
            )
            v, v_hat = (
                model(x.to(dtype), sigma, context.to(dtype=dtype)).float()
                for model in (p.nets["dit"], small)
            )
            run.put(
                "velocity SQNR dB",
                {
                    f"sigma {sigma.item():.1f}": 10
                    * math.log10(float(v.square().sum() / (v - v_hat).square().sum()))
                },
            )


@torch.no_grad()
def decoders(run: Run) -> None:
    """M8: the three decoders on true latents of 9 and 33 frames, in turns, and on latents that the model made."""
    found, p, dtype = (
        {},
        player(run.weights, "student") or player(run.weights, "base", 8),
        getattr(torch, realtime.faster_dtype("cpu")),
    )
    for row, name in claims.PANES.items():
        try:
            found[row] = realtime.load_vae(Path(run.weights), "tiny", name).to(dtype).eval()
        except ValueError:
            run.notes.append(
                f"{row}: python train.py --stage {'vae' if name == 'full' else 'lightvae'}"
            )
    full = found.get("Wan2.2") or lacking("vae")
    picture, last, sheet = lambda y: (y[0].float().permute(1, 2, 3, 0) + 1) / 2, {}, []
    for seed in run.worlds:
        frames = shoot(scene(seed), world.simulate(scene(seed), 0, 33)["player"])[0]
        for n, (row, model) in ((n, pair) for n in (9, 33) for pair in found.items()):
            video = torch.from_numpy(frames[:n]).permute(3, 0, 1, 2)[None].to(dtype) / 127.5 - 1
            y = picture(model.decode(z := full.encode(video), clamp=True))
            run.scores(f"{row}, {n} frames", y, frames[:n])
            last[row] = np.uint8(255 * y[-1].numpy())
            run.put(
                f"{row}, {n} frames",
                {"last frame psnr": episode.psnr(last[row][None], frames[n - 1 : n])},
            )
        sheet.append(np.concatenate([frames[-1], *last.values()]))
        if p and seed in run.some:
            script, _, z = opened(p, revisit(seed, 0.0))
            new = rollout(p, script, z, 1)[0].to(dtype)
            made = {row: picture(model.decode(new, clamp=True)) for row, model in found.items()}
            for row in list(made)[1:]:
                run.scores(
                    f"{row} beside Wan2.2, generated latents",
                    made[row],
                    (255 * made["Wan2.2"]).round().byte().numpy(),
                )
    both = found | {f"{row}, float32": copy.deepcopy(model).float() for row, model in found.items()}
    still = {
        row: z[:, :, -1:].repeat(1, 1, 10, 1, 1).to(next(model.parameters()).dtype)
        for row, model in both.items()
    }
    jobs = {
        f"{row}, streaming": partial(
            model.decode_stream, still[row], model.decode_stream(still[row])[1], True
        )
        for row, model in both.items()
    }
    for row, job in [
        *(jobs | {"encoder": lambda: full.encode(video[:, :, :1].repeat(1, 1, 41, 1, 1))}).items()
    ] * 9:  # in turns
        began, _ = time.perf_counter(), job()
        run.put(
            row, {"s for 40 frames": (seconds := time.perf_counter() - began), "FPS": 40 / seconds}
        )
    run.pictures["decoders"] = (
        np.concatenate(sheet[:6], 1).repeat(3, 0).repeat(3, 1)
    )  # truth, full, 50 %, 75 %


def retrieval(run: Run) -> None:
    """M10: how much of what any bank frame could show do five chosen ones show? Truth by exact depth; needs no model."""
    for seed, kind, last in (
        (s, k, t) for s in run.worlds for k in ("loop", "rl") for t in (45, 60)
    ):
        walk = world.simulate(scene(seed), 1, 241, kind)
        _, depth, c2w = shoot(
            scene(seed), walk["player"][4::4], 32, 1
        )  # one frame per latent, as the bank keeps them
        asks, stop = np.array([last - 1 - k for k in query_offsets(10, 5)]), last - 14
        seen = truth.visible(depth[asks], c2w[asks], depth[:stop], c2w[:stop])  # (5, N, H, W)
        together, query = torch.cat(list(seen), 1), torch.from_numpy(c2w[asks]).float()
        picks, cameras = {}, torch.from_numpy(c2w[:stop]).float()[:, None].expand(-1, 4, -1, -1)
        for rule, policy in (
            *((rule, "camera") for rule in memory.RULES),
            ("uniform", "recent"),
            ("uniform", "random"),
        ):
            store, row = (
                MemoryBank(rule),
                f"camera, {rule}" if policy == "camera" else policy,
            )
            store.append(torch.zeros(1, stop, 1, 1), cameras, torch.arange(1, stop + 1))
            began, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
            picks[row] = store.retrieve(query, policy=policy, generator=generator)[0].tolist()
            run.put(row, {"ms": 1e3 * (time.perf_counter() - began)})
        began = time.perf_counter()
        exact = truth.exact_overlap(query, cameras[:, -1])
        every = torch.arange(stop).expand(len(query), -1)
        picks["camera, exact"] = memory.pick(exact, every, 0, repeat=10.0).tolist()
        run.put("camera, exact", {"ms": 1e3 * (time.perf_counter() - began)})
        picks |= {
            "exact visibility per slot": seen.sum((2, 3)).argmax(1).tolist(),
            "greedy oracle": truth.greedy(together, 5),
        }
        run.facts = run.facts or {
            "solid": scene(seed).solid.tolist(),
            "poses": walk["player"][4::4][:last, [0, 2, 4]].tolist(),
            "bank": stop,
            "asks": asks.tolist(),
            "chosen": picks["camera, uniform"],
        }
        for row, chosen in picks.items():
            run.put(
                row,
                {
                    "coverage@5": truth.coverage(together, chosen)
                    / (truth.coverage(together, picks["greedy oracle"]) or math.nan),
                    "missed views": np.mean(
                        [
                            truth.coverage(s, chosen) < 0.1 and s.any(0).float().mean() >= 0.5
                            for s in seen
                        ]
                    ),
                },
            )
    run.raw = {
        key: np.nanmean(np.reshape(x, (-1, 4)), 1).tolist() for key, x in run.raw.items()
    }  # of a world


def rope(run: Run) -> None:
    """Eq. 7: how alike times 100-4000 latents apart can look to the temporal clocks, with and without a clock per head; memory from far back."""
    for sigma in (0.0, 0.1, 0.5, 0.8):
        cfg = replace(dit.PRESETS["tiny"], sigma_theta=sigma)
        pairs = cfg.dim // cfg.heads // 2 - 2 * (cfg.dim // cfg.heads // 2 // 3)
        angle = attention.rope_angles(torch.arange(100, 4000)[None], 1, 1, cfg)[
            0, :, 0, :, :pairs
        ]  # (lags, heads, pairs)
        run.put(f"sigma_theta {sigma}", {"likeness": angle.cos().mean((-1, -2)).max()})
    reappear(run, {f"{later} latents later": {"later": later} for later in (0, 200, 800)})


def reappear(run: Run, rows: dict[str, dict]) -> None:
    for seed in run.some:
        frames, depth, c2w = draw(script := revisit(seed, 0.0))
        masks, z = (
            truth.masks(depth, c2w, at := np.arange(257 - SCORED, 257), KNOWN),
            opened(run.player, script, frames)[2],
        )
        for row, how in rows.items():
            run.scores(
                row,
                decode(run.player, rollout(run.player, script, z, 2, **how)[0], SCORED)[0],
                frames[at],
                masks,
            )


def ablation(run: Run) -> None:
    """What a part is worth, for models trained without it: memory on return, at once and much later; drift in place; obedience."""
    reappear(
        run,
        {
            "memory": {},
            "no memory": {"policy": "none"},
            "memory, 800 latents later": {"later": 800},
        },
    )
    for seed in run.some:
        follow(run, run.player, "in place", patrol(seed, 8), 8, "camera")
        obey(run, run.player, seed)


def experts(run: Run) -> None:
    """§3.5: every moe*.safetensors beside one dense model trained as long: revisits, actions and sharpness, in first and third person."""
    for steps, boundary in ((s, b) for s in (3, 50) for b in (0.75, 0.9, 0.95)):
        run.put(
            f"boundary {boundary}",
            {f"share of {steps} steps": (flow.sigma_grid(steps)[:-1] >= boundary).float().mean()},
        )
    files = sorted(Path(run.weights).glob("moe*.safetensors")) or lacking(
        "moe", " --expert high-first, high-third and low, joined by --export"
    )
    joined = [player(run.weights, file.stem, 8) for file in files]
    models = {f"moe-{p.nets['dit'].boundary:g}": p for p in joined} | (
        {"dense": dense} if (dense := player(run.weights, "dense", 8)) else {}
    )
    run.notes += [
        f"8 steps, {joined[0].options.dtype}",
        *([] if dense else ["dense rows: python train.py --stage moe --expert dense"]),
    ]
    for seed, view in ((s, v) for s in run.some for v in ("first", "third")):
        script, frames, z = opened(joined[0], revisit(seed, 0.0, view))
        walk, arms = errand(seed, view)
        _, true, z_walk = opened(joined[0], walk)
        for name, p in models.items():
            image = decode(p, rollout(p, script, z, 2)[0], SCORED)[0]
            run.scores(f"{name}, {view}", image, frames[-SCORED:])
            pair = decode(
                p,
                torch.cat(
                    [rollout(p, walk, z_walk, 1, actions=a)[0] for a in [*arms.values()][:2]]
                ),
                40,
            )
            obeyed, shuffled = (episode.psnr(x, true[KNOWN : KNOWN + 40]).mean() for x in pair)
            run.put(
                f"{name}, {view}",
                {
                    "sharpness": metrics.sharpness(image, frames[-SCORED:]).mean(),
                    "true - shuffled actions, dB": obeyed - shuffled,
                },
            )


def latency(run: Run) -> None:
    """M9: one Session, six steps to warm up; where the time goes, and key to photon: by formula, and by the clock with the same segment made
    twice from one noise, without and with a key that went down at some moment of the segment before."""
    ours, released, _ = bench.segment_flops(realtime.Options(preset="5b"))
    run.put(
        "arithmetic",
        {
            "FPS at 1.551 s a segment": 40 / 1.551,
            "TF of a 5b segment": ours / 1e12,
            "TF as released": released / 1e12,
        },
    )
    reappear(run, {f"{n} latents at once": {"new": n} for n in (10, 5, 2)})
    session = realtime.Session(run.player.options)
    session.reset(torch.from_numpy(draw(place(run.worlds[0], "w:2"), [0])[0][0]))
    for k in range(26 if run.full else 14):
        n, began = session.frames_needed, time.perf_counter()
        info = session.step(torch.zeros(n, 6), torch.tensor([[0.0, 0.1]]).expand(n, 2)).info
        spent = {
            f"{part} ms": ms
            for part, ms in (info["ms"] | {"whole": 1e3 * (time.perf_counter() - began)}).items()
        }
        run.put("later steps" if k else "first step", spent if k in (0, *range(6, 99)) else {})
    P, D, V = (
        float(np.median(run.raw[f"later steps/{part} ms"])) / 1e3
        for part in ("whole", "denoise", "decode")
    )
    run.put(
        "tiny",
        {
            "FPS, one after the other": 40 / P,
            "FPS by 40 / max(D, V)": 40 / max(D, V),
            "key to photon at 16 FPS, s": 1.25 + D + V / 10,
        },
    )
    events, rng, still = (
        60 if run.full else 20,
        np.random.default_rng(0),
        (torch.zeros(40, 6), torch.zeros(40, 2)),
    )
    run.put(
        "action to photon at 40 FPS", {"s by formula": 0.5 + D + V}
    )  # E = S/2F + T_gen + T_dec: here a segment is decoded in one piece
    for pressed in (
        np.arange(events) + rng.random(events)
    ) / events:  # seconds after that segment began to be shown, one in each part
        idle = session.step(*still).frames.float()
        session.undo()
        began, acted = (
            time.perf_counter(),
            session.step(still[0], still[1] + torch.tensor([0.0, 0.2])).frames,
        )
        spent = time.perf_counter() - began
        first = [*((acted - idle).abs().mean((1, 2, 3)) > 2).tolist(), True].index(
            True
        )  # by more than two grey levels
        run.put(
            "action to photon at 40 FPS",
            {"s by the clock": 1 - pressed + spent + first / 40, "frames until it is seen": first},
        )


COMMANDS = {
    "sanity": sanity,
    "memory": remember,
    "drift": drift,
    "explore": explore,
    "action": action,
    "distill": distill,
    "int8": int8,
    "vae": decoders,
    "retrieval": retrieval,
    "rope": rope,
    "moe": experts,
    "latency": latency,
    "ablation": ablation,
}


def measure(name: str, args: argparse.Namespace) -> dict:
    """Store the predictions, run, store everything. Missing weights leave rows unmeasured and say what makes them."""
    split, began = "final" if args.final else "tune" if args.tune else "test", time.perf_counter()
    worlds = list(
        world.SPLITS[split][32 * args.final :][: args.worlds or (64 if args.full else 8)]
    )  # 32 final ones had been opened before
    run, path = (
        Run(worlds, args.full, args.weights, Path(args.out), {}, {}, [], {}),
        Path(args.out, "final" * args.final, f"{name}.json"),
    )
    flags = (
        "".join(f" --{f}" for f in ("full", "final", "tune") if getattr(args, f))
        + f"{'' if args.full else ' --quick'} --worlds {len(worlds)}"
    )
    flags += f" --weights {args.weights}" * (args.weights != str(ROOT / "assets" / "tiny"))
    cpu = (
        re.search(r"model name\s*: (.*)", f.read_text())
        if (f := Path("/proc/cpuinfo")).exists()
        else None
    )
    result = {
        "command": f"python evaluate.py {name}{flags}",
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "seed": 0,
        "machine": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores",
        "split": split,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "worlds": worlds,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip(),
        "weights": {
            "/".join(f.parts[-2:]): hashlib.sha256(f.read_bytes()).hexdigest()[:12]
            for f in Path(args.weights).rglob("*.safetensors")
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    weights.write_text(
        path,
        json.dumps(
            result | {"claims": [claims.judge(c, {}) for c in claims.CLAIMS[name]], "raw": {}}
        ),
    )
    try:
        COMMANDS[name](run)
    except FileNotFoundError as error:
        run.notes.append(f"not measured: {error}")
    pictures = {
        k: base64.b64encode(imageio.imwrite("<bytes>", v, extension=".png")).decode()
        for k, v in run.pictures.items()
    }
    result |= {
        "seconds": round(time.perf_counter() - began, 1),
        "notes": run.notes,
        "claims": [claims.judge(c, run.raw) for c in claims.CLAIMS[name]],
    }
    weights.write_text(
        path, json.dumps(result | {"raw": run.raw, "pictures": pictures, "facts": run.facts})
    )
    return result | {"raw": run.raw}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Measure every claim on worlds with ground truth.")
    parser.add_argument("command", choices=[*COMMANDS, "all", "report", "compare"])
    for flag, default, text in (
        ("full", False, "64 worlds, every arm, 16 segments; up to two hours"),
        ("quick", False, "the default: 8 worlds, minutes"),
        ("final", False, "the worlds kept for the last table; open them once"),
        ("tune", False, "the worlds for choosing settings"),
        ("worlds", 0, "how many, if not those 64 or 8"),
        ("weights", str(ROOT / "assets" / "tiny"), "folder of the .safetensors, or a run"),
        ("out", "results", "folder of the json files"),
        ("against", "none", "compare: the arm that the others are compared with"),
    ):
        parser.add_argument(
            f"--{flag}",
            help=text,
            **{"action": "store_true"}
            if default is False
            else {"type": type(default), "default": default},
        )
    args = parser.parse_args(argv)
    for name in COMMANDS if args.command == "all" else {args.command: 0}.keys() & COMMANDS:
        result = measure(name, args)
        print(
            f"\n## {name} ({result['seconds']} s)\n\n{report.raw_table(result)}\n\n{report.claim_table(result)}",
            flush=True,
        )
    if args.command == "compare":
        print("\n".join((result := report.contrast(Path(args.out), args.against))["table"]))
        weights.write_text(
            Path(args.out).with_name(f"compare-{Path(args.out).name}.json"),
            json.dumps(result, indent=1),
        )
    if args.command == "report":
        report.report(Path(args.out), ROOT / "README.md", ROOT / "assets" / "figures")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
