"""Measure every claim and write the tables and figures.

Paper: §5 and Tables 1-2. It reports speed and VAE fidelity and no metric of the world model; those here are ours.

    PSNR  = min(50, −10 log10 mean (x − x̂)²)            skill = (v − floor) / (ceiling − floor)
    ZNCC  = a·b                                         a, b: frames without their channel means, of unit length
    TWFD  = |μ₁−μ₂|² + tr(C₁ + C₂ − 2 (C₁^½ C₂ C₁^½)^½) Frechet distance of 64 principal components of 8x8 frames
    MMD   = ⟨k⟩₁₁ + ⟨k⟩₂₂ − 2⟨k⟩₁₂, k = (a·b/d + 1)³    unbiased: pairs of a set never hold the same frame twice
    reliance = PSNR with the right memory − with zeros  adoption = share of frames nearer to the donor of a false memory
    gain  = Σ c·m / Σ c²                                motion m measured by registration per motion c commanded

We own the renderer: the true frame at any pose, exact depth, what an old frame saw (bank-only pixels: seen in the bank
but not in the past window), and where a generated frame was taken (registration). Unit: the held-out world, all arms
share worlds, paths and noise; intervals are 95 % BCa over worlds. Rollouts go through realtime.Denoiser, as play does.
Predictions are in the results file before the run; every table and figure comes from results/*.json alone. What needs
retraining is measured with --weights RUN --out DIR/ARM-SEED, and `compare --out DIR` sets the arms side by side.
Departures: LPIPS, FID, FVD and the like need downloaded networks and are not computed.
Commands: python evaluate.py {sanity,memory,drift,action,distill,int8,vae,retrieval,rope,moe,latency,all,report,compare}
Tests: pytest tests/test_evaluate.py
"""
import argparse
import base64
import contextlib
import copy
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import NormalDist

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

import data
import dit
import memory
import moe
import quant
import realtime
import world

ROOT = Path(__file__).resolve().parent
WORLDS = {"tune": 32, "test": 64, "final": 32}          # final: opened once, for the last table
SIZE, KNOWN, SCORED = 64, 177, 12                       # pixels; true frames in the bank; frames that are scored
PLACES = {"exact": 0.0, "0.4 m": 0.4, "0.85 m": 0.85, "1.9 m": 1.9}
PANES = {"Wan2.2": "full", "50 %": "light50", "75 %": "light75"}
Raw = dict[str, list[float]]                            # "row/column" -> one value per world

# ---- images: one value per frame; frames (N, H, W, 3), uint8 or float in [0, 1] -------------------------------------
def planes(frames: ndarray | Tensor) -> Tensor:         # -> (N, 3, H, W) float32
    x = torch.as_tensor(frames)
    return (x.float() / 255 if x.dtype == torch.uint8 else x.float().clamp(0, 1)).permute(0, 3, 1, 2)
def gmsd(pred: ndarray | Tensor, true: ndarray | Tensor) -> Tensor:              # (N,), 0 = equal
    kernel = torch.tensor([[1.0, 0, -1]] * 3) / 3       # Prewitt / 3
    kernels = torch.stack([kernel, kernel.T])[:, None]
    a, b = (F.conv2d(F.avg_pool2d(planes(x).mean(1, keepdim=True), 2), kernels, padding=1).norm(dim=1) for x in (pred, true))
    # g = (2 m₁ m₂ + c) / (m₁² + m₂² + c)
    return ((2 * a * b + 170 / 255**2) / (a * a + b * b + 170 / 255**2)).flatten(1).std(1, correction=0)
def haarpsi(pred: ndarray | Tensor, true: ndarray | Tensor) -> Tensor:           # (N,), 1 = equal
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    a, b = (F.avg_pool2d(torch.einsum("ij,njhw->nihw", to_yiq, 255 * planes(x)), 2) for x in (pred, true))
    def haar(x: Tensor, k: int) -> Tensor:              # (N, 3, H, W) -> (N, 2, H, W): both orientations of Y
        kernel = torch.ones(k, k) / k * torch.tensor([1.0, -1]).repeat_interleave(k // 2)[:, None]
        return F.conv2d(F.pad(x[:, :1], (k // 2 - 1, k // 2) * 2), torch.stack([kernel, kernel.T])[:, None]).abs()
    like = lambda p, q: (2 * p * q + 30) / (p * p + q * q + 30)
    s, w = (like(haar(a, 2), haar(b, 2)) + like(haar(a, 4), haar(b, 4))) / 2, torch.maximum(haar(a, 8), haar(b, 8))
    smooth = lambda x: F.pad(F.avg_pool2d(x[:, 1:], 2, 1), (0, 1, 0, 1)).abs()
    s = torch.cat([s, like(smooth(a), smooth(b)).mean(1, keepdim=True)], 1)
    w = torch.cat([w, w.mean(1, keepdim=True)], 1)
    score = ((w * torch.sigmoid(4.2 * s)).sum((1, 2, 3)) / w.sum((1, 2, 3)).clamp(min=1e-9)).clamp(1e-6, 1 - 1e-6)
    return torch.where(w.sum((1, 2, 3)) > 0, (torch.logit(score) / 4.2).square(), 1.0)
def sharpness(pred: ndarray | Tensor, true: ndarray | Tensor) -> Tensor:         # (N,) of mean 1 = as sharp; a bare wall alone decides nothing
    a, b = (sum(x.diff(dim=d).square().mean((1, 2)) for d in (1, 2)) for x in (planes(pred).mean(1), planes(true).mean(1)))
    return a / b.mean().clamp(min=1e-6)                 # mean squared gradients, over those of all true frames
@lru_cache
def gaussian(n: int, blur: float) -> Tensor:            # (n, n): blurs a column, edges repeat
    weight = torch.exp(-0.5 * ((torch.arange(-12, n + 12)[None] - torch.arange(n)[:, None]) / blur) ** 2)
    weight = torch.cat([weight[:, :13].sum(1, keepdim=True), weight[:, 13:-13], weight[:, -13:].sum(1, keepdim=True)], 1)
    return weight / weight.sum(1, keepdim=True)
def unit(frames: ndarray | Tensor, blur: float = 0.0) -> Tensor:                 # (N, 3·H·W), |row| = 1
    x = planes(frames)
    x = gaussian(x.shape[2], blur) @ x @ gaussian(x.shape[3], blur).T if blur else x
    return F.normalize((x - x.mean((2, 3), keepdim=True)).flatten(1), dim=1)
def zncc(pred: ndarray | Tensor, true: ndarray | Tensor) -> Tensor:              # (N,): a·b of slightly blurred frames
    return (unit(pred, 1.0) * unit(true, 1.0)).sum(1)
METRICS = {"psnr": data.psnr, "ssim": data.ssim, "gmsd": gmsd, "haarpsi": haarpsi, "zncc": zncc}
BETTER = {"psnr": 1, "ssim": 1, "gmsd": -1, "haarpsi": 1, "zncc": 1}

# ---- distributions of frames -----------------------------------------------------------------------------------------
def pixel_pca(reference: ndarray | Tensor, dims: int = 64) -> Callable[[ndarray | Tensor], Tensor]:
    """Features that need no training and no trust: 8x8 thumbnails on the principal axes of the reference, 8 frames or more per axis."""
    thumbnails = lambda x: F.adaptive_avg_pool2d(planes(x), 8).flatten(1).double()
    mean = thumbnails(reference).mean(0)
    axes = torch.linalg.svd(thumbnails(reference) - mean, full_matrices=False).Vh[:max(1, min(dims, len(reference) // 8))]
    return lambda x: (thumbnails(x) - mean) @ axes.T
def frechet(a: Tensor, b: Tensor) -> float:             # (N, d), (M, d) float64
    root = lambda C: (lambda w, V: V * w.clamp(min=0).sqrt() @ V.T)(*torch.linalg.eigh(C))
    A, B, half = a.T.cov(), b.T.cov(), root(a.T.cov())
    # |μ₁−μ₂|² + tr(C₁ + C₂ − 2 (C₁^½ C₂ C₁^½)^½)
    return float((a.mean(0) - b.mean(0)).square().sum() + (A + B - 2 * root(half @ B @ half)).trace())
def mmd(a: Tensor, b: Tensor) -> float:                 # unbiased, features standardised by b, the truth (the weak ones by a tenth of the strongest)
    a, b = ((x - b.mean(0)) / b.std(0).clamp(min=0.1 * float(b.std(0).max())) for x in (a, b))
    k = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    within = lambda x: (k(x, x).sum() - k(x, x).diagonal().sum()) / (len(x) * (len(x) - 1))
    return float(within(a) + within(b) - 2 * k(a, b).mean())

# ---- statistics: the unit is the world -------------------------------------------------------------------------------
def bca(x: Sequence[float], level: float = 0.95, resamples: int = 10_000) -> tuple[float, float]:
    """Bootstrap interval of the mean, corrected for bias and acceleration."""
    x = np.asarray([v for v in x if math.isfinite(v)], float)
    if len(x) < 2 or np.ptp(x) == 0:
        return (float(x[0]), float(x[0])) if len(x) and np.ptp(x) == 0 else (math.nan, math.nan)
    means = x[np.random.default_rng(0).integers(len(x), size=(resamples, len(x)))].mean(1)
    normal, jack = NormalDist(), (x.sum() - x) / (len(x) - 1)
    bias = normal.inv_cdf(min(max((means < x.mean()).mean(), 1 / resamples), 1 - 1 / resamples))
    d = jack.mean() - jack
    acceleration = (d**3).sum() / (6 * (d**2).sum() ** 1.5)
    ends = (bias + normal.inv_cdf(q) for q in ((1 - level) / 2, (1 + level) / 2))
    return tuple(float(np.quantile(means, normal.cdf(bias + z / (1 - acceleration * z)))) for z in ends)
def equivalent(difference: Sequence[float], margin: float) -> bool:     # TOST at 5 %: the 90 % interval inside ± margin
    low, high = bca(difference, 0.90)
    return bool(-margin < low and high < margin)
def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:         # median of pairwise slopes
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((np.asarray(y)[j] - np.asarray(y)[i]) / (np.asarray(x)[j] - np.asarray(x)[i])))
def time_to_lost(score: Sequence[float], tau: float, run: int = 8) -> int:       # first of `run` frames under tau; else all
    low = np.asarray(score) < tau
    return next((t for t in range(len(low) - run + 1) if low[t:t + run].all()), len(low))

# ---- truth from geometry ---------------------------------------------------------------------------------------------
def shoot(scene: world.Scene, poses: ndarray, size: int = SIZE, samples: int = 2) -> tuple[ndarray, ndarray, ndarray]:
    """Frames, depth and cameras of poses (n, 5)."""
    c2w = world.cameras(scene, poses)
    return *world.render(scene, c2w, memory.intrinsics(size, size).numpy(), size, size, supersample=samples), c2w
def visible(depth: ndarray, c2w: ndarray, bank_depth: ndarray, bank_c2w: ndarray) -> ndarray:
    """Which pixels of the targets (T, H, W) did each bank frame see? (T, N, H, W) bool. Seen: it lies inside the image and no
    deeper than 1.02 times the depth there. The sky, at a depth of 1000 m, is a surface too."""
    (T, H, W), N = depth.shape, len(bank_depth)
    fx, fy, cx, cy = memory.intrinsics(H, W).tolist()
    g = memory.relative(torch.from_numpy(bank_c2w)[None], torch.from_numpy(c2w)[:, None]).float()                # (T, N, 4, 4)
    v, u = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    z = torch.from_numpy(depth).flatten(1)[:, None]
    points = torch.stack([(u.flatten() - cx) / fx * z, (v.flatten() - cy) / fy * z, z.expand(T, 1, H * W)], 2)     # (T, 1, 3, H·W)
    x, y, z = (g[..., :3, :3] @ points + g[..., :3, 3:]).unbind(2)
    x, y = (fx * x / z + cx).floor(), (fy * y / z + cy).floor()
    inside = (z > 1e-3) & (x >= 0) & (x < W) & (y >= 0) & (y < H)
    there = torch.from_numpy(bank_depth).flatten(1).expand(T, N, -1).gather(2, torch.where(inside, y * W + x, 0).long())
    return (inside & (z <= 1.02 * there)).view(T, N, H, W).numpy()
def coverage(seen: ndarray, chosen: Sequence[int]) -> float:            # (N, H, W): share of what any frame could show
    return float(seen[list(chosen)].any(0).sum() / max(1, seen.any(0).sum()))
def greedy(seen: ndarray, k: int) -> list[int]:         # the oracle: always the largest new area
    left, chosen = seen.reshape(len(seen), -1).copy(), []
    for _ in range(k):
        chosen.append(int(left.sum(1).argmax()))
        left &= ~left[chosen[-1]]
    return chosen
Found = namedtuple("Found", "pose score ambiguous")      # pose5; ZNCC there; does another place explain the frame as well?
def register(scene: world.Scene, frame: ndarray, pose: Sequence[float]) -> Found:
    """Where was a frame taken? Coarse grid at 16x16, five starts, Levenberg-Marquardt over blurs 2, 1, 0 in x, z, yaw."""
    pose, scale = np.asarray(pose, float), np.array([1.0, 1.0, math.degrees(0.5)])       # half a radian counts as a metre
    whole = lambda p: np.stack([p[:, 0], 0 * p[:, 0] + pose[1], p[:, 1], 0 * p[:, 0] + pose[3], p[:, 2]], 1)     # x, z, yaw -> poses
    look = lambda p, size=SIZE, samples=1: shoot(scene, whole(p), size, samples)[0]
    free = lambda p: ~scene.solid[tuple(np.floor(p[:, :2]).astype(int).clip(0, len(scene.solid) - 1).T)]     # (n,): not inside a wall
    steps = np.linspace(-0.36, 0.36, 5)
    grid = pose[[0, 2, 4]] + [(x, z, a) for x in steps for z in steps for a in np.linspace(-18, 18, 13) if math.hypot(x, z) <= 0.37]
    grid, starts, small = grid[free(grid)], [], F.avg_pool2d(planes(frame[None]), SIZE // 16).permute(0, 2, 3, 1)
    for at in grid[(unit(look(grid, 16)) @ unit(small)[0]).argsort(descending=True).numpy()]:
        if len(starts) < 5 and all(np.linalg.norm((at - s) / scale) >= 0.15 for s in starts):
            starts.append(at)
    p, h = np.array(starts), np.array([0.03, 0.03, 1.0])
    for blur in (2.0, 1.0, 0.0):
        target, fine = unit(frame[None], blur)[0], 1 if blur else 2
        damping, cost = np.full(len(p), 1e-2), (unit(look(p, samples=fine), blur) - target).square().sum(1).numpy()
        for _ in range(6 if blur else 12):
            around = (p[:, None] + np.concatenate([[h * 0], np.diag(h), -np.diag(h)])).reshape(-1, 3)
            views = unit(look(around, samples=fine), blur).view(len(p), 7, -1).double()
            J, e = ((views[:, 1:4] - views[:, 4:]) / 2).numpy(), (views[:, 0] - target).numpy()      # per step h
            A = J @ J.swapaxes(1, 2)
            # (JᵀJ + λ diag JᵀJ) Δ = −Jᵀe
            move = h * -np.linalg.solve(A + (damping[:, None, None] * A + 1e-9) * np.eye(3), J @ e[..., None])[..., 0]
            move *= np.minimum(1, 0.2 / np.linalg.norm(move / scale, axis=1, keepdims=True).clip(1e-9))
            new = (unit(look(p + move, samples=fine), blur) - target).square().sum(1).numpy()
            better = (new < cost) & free(p + move)
            p, cost = np.where(better[:, None], p + move, p), np.where(better, new, cost)
            damping = np.where(better, damping / 3, damping * 5).clip(1e-4, 1e4)
        p = p[cost.argsort()[:5 if blur > 1 else 2]]
    score = (unit(look(p, samples=2), 1.0) @ unit(frame[None], 1.0)[0]).numpy()
    best = int(score.argmax())
    far = (np.hypot(*(p - p[best])[:, :2].T) > 0.1) | (np.abs(p[:, 2] - p[best, 2]) > 2)
    return Found(whole(p)[best], float(score[best]), bool((far & (score > score[best] - 0.005)).any()))

# ---- paths with known truth ------------------------------------------------------------------------------------------
# A walk without a contact, so that integrated actions are the engine's poses; frames 0 .. known-1 fill the bank.
Script = namedtuple("Script", "scene poses keyboard mouse known", defaults=(KNOWN,))     # poses (F, 5) float64, keyboard (F-1, 6), mouse (F-1, 2)
scene = lru_cache(maxsize=64)(world.make_scene)
def chords(text: str) -> tuple[Tensor, Tensor]:         # "j:10 w:4 l2.5:3 -:6", after j or l: times 1.5 degrees a frame
    keys, turns = [], []
    for chord, count in (part.split(":") for part in text.split()):
        turn = re.fullmatch(r"([jl])([\d.]*)", chord)
        keys += [[float(chord == k) for k in ("w", "s", "a", "d", "jump", "attack")]] * int(count)
        turns += [(0.0, 0.1 * float(turn[2] or 1) * (1 if turn[1] == "l" else -1) if turn else 0.0)] * int(count)
    return torch.tensor(keys), torch.tensor(turns)
def place(seed: int, text: str, look: int = -1) -> Script:
    """Where a plan can be walked without touching anything and frame `look` shows more than a near wall."""
    (keyboard, mouse), player, rng = chords(text), world.World(scene(seed)), np.random.default_rng([seed, 5])
    for attempt in range(400):
        x, z = player.nav.point(*rng.choice(player.nav.cells))
        poses = memory.integrate((x, -world.EYE, z, 0.0, 1.5 * int(rng.integers(240))), keyboard, mouse)
        player.pose = tuple(poses[0].tolist())
        if any(player.move(k, m) for k, m in zip(keyboard.tolist(), mouse.tolist(), strict=True)):
            continue
        rgb, depth, _ = shoot(player.scene, poses[[look]].numpy(), 16)
        if attempt > 200 or (np.median(depth) > 1.5 and depth.min() > 0.6 and rgb.std() > 20):
            return Script(player.scene, poses, keyboard, mouse)
    raise ValueError(f"world {seed} has no room for the path {text!r}; shorten it")
def revisit(seed: int, offset: float) -> Script:
    """Look about, turn round for more than the past window, then side-step (or not), turn back and look at the first view."""
    steps = round(offset / memory.STEP)
    return place(seed, f"l:10 j:20 l:10 l2:60 l:10 j:20 l:10 -:36 {'ad'[seed % 2]}:{steps} l2.5:48 -:{32 - steps}")
def patrol(seed: int, segments: int) -> Script:         # in the seen room: all round, two steps there and back
    beat = "l2:20 w:4 s:8 w:4 l2:20 a:4 d:8 a:4 l2:20 -:8 l2:20 w:4 s:4 l2:20 -:8 l2:20"
    return place(seed, " ".join([beat] * (1 + -(-(KNOWN + 40 * segments) // 176))))
def journey(seed: int, segments: int) -> Script:        # exploring what nobody has seen; the walk that touches least
    walks = (world.simulate(scene(seed), s, KNOWN + 40 * segments, "rl") for s in range(4))
    best = {k: torch.as_tensor(v) for k, v in min(walks, key=lambda w: w["contact"].sum()).items() if isinstance(v, ndarray)}
    return Script(scene(seed), best["player"], best["keyboard"][:-1].float(), best["mouse"][:-1])
def draw(script: Script, at: Sequence[int] | slice = slice(None)) -> tuple[ndarray, ndarray, ndarray]:
    return shoot(script.scene, script.poses.numpy()[at])

# ---- rollouts: the object that play drives ---------------------------------------------------------------------------
Player = namedtuple("Player", "name options meta nets")  # nets: dit, encoder, decoder, as realtime loads them
@lru_cache(maxsize=8)
def player(weights: str, name: str, steps: int = 0) -> Player | None:
    """The student, the base or the experts as realtime loads them, of a folder or a run; None where nobody has trained them yet."""
    file, stage = Path(weights) / f"{name}.safetensors", {"student": "distill"}.get(name, name)
    if (Path(weights) / "latest").exists() and json.loads((Path(weights) / "config.json").read_text())["stage"] == stage:
        file = Path(weights)                                # a run of train.py, with the shipped VAE
    if not file.exists():
        return None
    options = realtime.resolve(realtime.Options(weights=str(file), steps=steps or (3 if name == "student" else 50)))
    return Player(name, options, *realtime.load_parts(options, "dit", "encoder", "decoder")[::-1])
def lacking(stage: str) -> None:
    raise FileNotFoundError(f"no {stage} weights; make them with: python train.py --stage {stage}")
@torch.no_grad()
def decode(p: Player, z: Tensor, last: int) -> Tensor:  # (B, C, T, h, w) -> (B, last, H, W, 3) in [0, 1]
    """The last frames; four latents before them fill the decoder's history."""
    z = z[:, :, -(-(-last // 4) + 4):]
    video = p.nets["decoder"].decode(z.to(next(p.nets["decoder"].parameters()).dtype), clamp=True)[:, :, -last:]
    return (video.float().permute(0, 2, 3, 4, 1) + 1) / 2
@torch.no_grad()
def opened(p: Player, script: Script, frames: ndarray | None = None) -> tuple[Script, ndarray, Tensor]:     # latents (1, C, T, h, w)
    frames = draw(script, slice(len(script.poses) - (len(script.poses) - 1) % 4))[0] if frames is None else frames
    weight = next(p.nets["encoder"].parameters())
    return script, frames, p.nets["encoder"].encode(torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(weight) / 127.5 - 1, chunk=12)
def prompt(p: Player, script: Script) -> Tensor:
    return data.embed_prompt(data.scene_caption(script.scene), p.nets["dit"].cfg.text_dim, p.nets["dit"].cfg.text_len)[None]
def rollout(p: Player, script: Script, z: Tensor, segments: int, policy: str = "camera", bank: Tensor | None = None, shuffle: bool = False,
            actions: tuple[Tensor, Tensor] | None = None, seed: int = 0, later: int = 0, new: int = 10, after: Callable | None = None
            ) -> tuple[Tensor, dict]:
    """Four true latents and the new ones after them (1, C, 4 + 10·segments, h, w), and what the denoiser said last. bank: other latents under
    the right poses; shuffle: the right ones under wrong poses; later: latents of silence before now; new: latents made at once."""
    K, f = (script.known - 1) // 4 + 1, script.known - 1
    keyboard, mouse = actions or (script.keyboard[f:], script.mouse[f:])
    denoiser = realtime.Denoiser(p.nets["dit"], p.meta, p.options)
    denoiser.start(realtime.Walk(z[:, :, K - 4:K], prompt(p, script), script.poses[:f + 1], script.keyboard[:f], script.mouse[:f],
                                 seed, 1, K + later, 4 * later))
    cameras = memory.segment_cameras(memory.pose_to_c2w(script.poses[:f + 1])[None], 0, K)[0].float()
    cameras = cameras[torch.randperm(K, generator=torch.Generator().manual_seed(seed))] if shuffle else cameras
    denoiser.bank.append((z if bank is None else bank)[0, :, :K].to(denoiser.now.past), cameras.to(p.options.device), torch.arange(K))
    latents = [denoiser.now.past]
    for t in range(0, 40 * segments, 4 * new):
        x0, info = denoiser.run(keyboard[t:t + 4 * new], mouse[t:t + 4 * new], policy)
        latents.append(x0)
        if after and t == 0:
            after(denoiser)
    return torch.cat(latents, 2), info
def masks_and_nearest(script: Script, at: ndarray, depth: ndarray, c2w: ndarray) -> tuple[dict, Tensor]:
    """Masks seen, unseen and bank-only (seen, but not in the last 56 frames) of frames `at`; the latent nearest to each."""
    bank = np.arange(0, script.known, 4)
    seen = visible(depth[at], c2w[at], depth[bank], c2w[bank])
    old = bank < script.known - 56
    masks = {"seen": seen.any(1), "unseen": ~seen.any(1), "bank-only": seen[:, old].any(1) & ~seen[:, ~old].any(1)}
    return masks, memory.overlap(torch.from_numpy(c2w[at]), torch.from_numpy(c2w[bank])).argmax(1)

# ---- commands: each fills raw["row/column"] --------------------------------------------------------------------------
@dataclass
class Run:
    worlds: list[int]
    full: bool
    weights: str
    out: Path
    raw: Raw
    pictures: dict[str, ndarray]
    notes: list[str]
    def put(self, row: str, values: dict[str, float]) -> None:
        for column, value in values.items():
            self.raw.setdefault(f"{row}/{column}", []).append(float(value))
    some = property(lambda self: self.worlds if self.full else self.worlds[:6])                       # for what is slow
    tau = property(lambda self: (results(self.out).get("sanity", {}).get("raw") or {TAU: [0.75]})[TAU][0])      # under it a frame is lost
    @property
    def player(self) -> Player:                         # what play.py would use: the student at 3 steps, else the base at 8
        found = player(self.weights, "student") or player(self.weights, "base", 8) or lacking("base")
        self.notes += [note] if (note := f"{found.name}, {found.options.steps} steps, {found.options.dtype}") not in self.notes else []
        return found
    def scores(self, row: str, pred: ndarray | Tensor, true: ndarray, masks: dict[str, ndarray] | None = None) -> None:
        """One world in every column of a row; frames with a nearly empty mask are skipped."""
        self.put(row, {name: metric(pred, true).mean() for name, metric in METRICS.items()})
        for name, mask in ((name, masks[name]) for name in masks or {} if name != "unseen"):
            some = mask.mean((1, 2)) >= 0.05
            self.put(row, {f"psnr {name}": data.psnr(pred[some], true[some], mask[some]).mean() if some.any() else math.nan})
    def located(self, row: str, script: Script, frames: Tensor, at: Sequence[int]) -> None:
        """Registered scores: what remains when the error of the pose is taken out, and that error. Lost frames are counted."""
        for frame, t in zip(frames, at, strict=True):
            found = register(script.scene, frame.numpy(), script.poses[t].numpy())
            image = shoot(script.scene, found.pose[None])[0]
            self.put(row, {"registered psnr": data.psnr(frame[None], image), "lost": found.score < self.tau} | off(found, script.poses[t].numpy()))
    def distances(self, row: str, name: str, pairs: list[tuple[Tensor, ndarray]]) -> None:      # of distributions, over all worlds
        pred, true = torch.cat([a for a, _ in pairs]), torch.from_numpy(np.concatenate([b for _, b in pairs]))
        features = pixel_pca(true)
        self.put(row, {f"{name}TWFD": frechet(features(pred), features(true)), f"{name}MMD": mmd(features(pred), features(true))})
TAU = "lost threshold tau/zncc"
off = lambda found, pose: {"m": np.hypot(*(found.pose - pose)[[0, 2]]), "deg": abs(found.pose - pose)[4], "ambiguous": found.ambiguous}
def sanity(run: Run) -> None:
    """M0: every metric must rank fakes as expected; M9 needs no model."""
    rng, scripts = np.random.default_rng(0), [place(s, "l:12 w:4") for s in run.worlds]
    truth = [draw(script, slice(12, 16))[0] for script in scripts]
    soft = lambda x: F.avg_pool2d(planes(x), 3, 1, 1, count_include_pad=False).permute(0, 2, 3, 1)
    for i, (script, true) in enumerate(zip(scripts, truth, strict=True)):
        turned, patch = script.poses[12:16] + torch.tensor([0, 0, 0, 0, 2.0]), true.copy()
        patch[:, 26:38, 26:38] = truth[i - 1][:, 26:38, 26:38]
        for name, fake in {"truth": true, "patch replaced": patch, "blurred": soft(true), "turned 2 degrees": shoot(script.scene, turned.numpy())[0],
                           "frozen": np.repeat(draw(script, [0])[0], 4, 0), "mirrored": true[:, :, ::-1].copy(), "other world": truth[i - 1],
                           "noise": rng.integers(0, 256, true.shape, np.uint8)}.items():
            run.scores(name, fake, true)
            run.put(name, {"sharpness": sharpness(fake, true).mean()})
        pose = script.poses[12].numpy()
        run.put("registration of clean frames", off(register(script.scene, true[0], pose + np.array([0.06, 0, -0.05, 0, 3.0])), pose))
    for m, sign in BETTER.items():
        best, near, *bad = (sign * np.mean(run.raw[f"{row}/{m}"]) for row in ("truth", "turned 2 degrees", "frozen", "other world", "noise"))
        run.put("ranks fakes as expected", {m: best > near > max(bad)})
    run.put(TAU.split("/")[0], {"zncc": (np.quantile(run.raw["other world/zncc"], 0.95) + np.quantile(run.raw["patch replaced/zncc"], 0.05)) / 2})
    every, features = np.concatenate(truth), pixel_pca(np.concatenate(truth))
    halves = (features(np.concatenate(truth[k::2] or truth)) for k in (0, 1))
    run.put("two halves of the truth", {"TWFD": frechet(*halves)})
    run.put("truth and its blur", {"TWFD": frechet(features(every), features(soft(every)))})
def remember(run: Run) -> None:
    """M1 and M11: come back to what only the bank has seen, from the same place and from others; then swap the memory."""
    p, at, strips = run.player, np.arange(257 - SCORED, 257), []
    _, frames, z = opened(p, revisit(run.worlds[-1], 0.0))                       # the donor of the first world
    donor = z, frames[at]
    for seed in run.worlds:
        for name, offset in PLACES.items():
            script = revisit(seed, offset)
            frames, depth, c2w = draw(script)
            masks, nearest = masks_and_nearest(script, at, depth, c2w)
            z, true = opened(p, script, frames)[2], frames[at]
            arms = {"camera": {}, "none": {"policy": "none"}}
            if name == "exact":
                arms |= {"recent": {"policy": "recent"}, "random": {"policy": "random"}, "zeros": {"bank": torch.zeros_like(z)},
                         "other world": {"bank": donor[0]}, "wrong poses": {"shuffle": True}}
            new = [rollout(p, script, z, 2, **how)[0] for how in arms.values()]
            images = dict(zip((*arms, "VAE ceiling"), decode(p, torch.cat([*new, z[:, :, -24:].to(new[0])]), SCORED), strict=True))
            pasted = {latent: decode(p, z[:, :, :latent + 1], 1)[0, 0] for latent in set(nearest.tolist())}
            copied = torch.stack([pasted[latent] for latent in nearest.tolist()])        # the old frame as the VAE shows it
            for arm, image in (images | {"copy nearest": copied, "floor: other world": donor[1]}).items():
                run.scores(f"{name}, {arm}", image, true, masks)
            for arm in ("camera", "none") if seed in run.some[:64 if run.full else 4] else ():
                run.located(f"{name}, {arm}", script, images[arm][-1:], at[-1:])
            if name == "exact":
                for arm in ("camera", "zeros", "wrong poses", "other world"):
                    run.put(f"exact, {arm}", {"adoption": adoption(images[arm].numpy(), true, donor[1], masks["bank-only"])})
                shown = (np.uint8(255 * x[-1].numpy()) for x in (images["camera"], images["none"], images["other world"], copied))
                strips.append(np.concatenate([true[-1], *shown], 1))
                following = z, true
        donor = following
    run.pictures["revisit"] = np.concatenate(strips[:4]).repeat(2, 0).repeat(2, 1)       # truth | memory | none | of another world | copy
def adoption(pred: ndarray, true: ndarray, donor: ndarray, mask: ndarray) -> float:
    """Share of frames whose bank-only pixels are nearer to the donor world than to the true one."""
    far = lambda x: (((pred - x / 255.0) ** 2).mean(-1) * mask).sum((1, 2))
    return float((far(donor) < far(true)).mean())
def drift(run: Run) -> None:
    """M4: in place and exploring; per segment the scores, over all worlds the distance of distributions."""
    p, segments, made = run.player, 16 if run.full else 8, {}
    run.notes.append(f"{segments} segments of 40 frames after {KNOWN} true ones")
    modes = [(mode, path, policy) for mode, path in (("in place", patrol), ("exploring", journey)) for policy in ("camera", "none")]
    for seed, (mode, path, policy) in ((s, m) for s in run.some for m in modes):
        arm, script = f"{mode}, {policy}", path(seed, segments)
        _, frames, z = opened(p, script, draw(script, slice(KNOWN + 40 * segments))[0])
        image, true = decode(p, rollout(p, script, z, segments, policy)[0], 40 * segments)[0], frames[KNOWN:]
        sharp = torch.cat([sharpness(image[k:k + 40], true[k:k + 40]) for k in range(0, 40 * segments, 40)])
        curve = {"psnr": data.psnr(image, true), "sharpness": sharp, "zncc": zncc(image, true)}
        parts = {name: values.view(segments, 40).mean(1).tolist() for name, values in curve.items()}
        for k in range(segments):
            run.put(f"segment {k + 1:02d}", {f"{arm}: {name}": x[k] for name, x in parts.items()})
            made.setdefault((f"segment {k + 1:02d}", f"{arm}: "), []).append((image[40 * k:40 * k + 40], true[40 * k:40 * k + 40]))
        run.put(arm, {"dB per 100 frames": 2.5 * theil_sen(range(segments), parts["psnr"]), "sharpness at the end": parts["sharpness"][-1],
                      "last 15 % - first, dB": curve["psnr"][-6 * segments:].mean() - curve["psnr"][:6 * segments].mean(),
                      "frames until lost": time_to_lost(curve["zncc"], run.tau)})
    for where, pairs in made.items():
        run.distances(*where, pairs)
def action(run: Run) -> None:
    """M5: true, shuffled and no actions under equal noise; gain by registration, without Sim(3) alignment."""
    p, f, at = run.player, KNOWN - 1, [11, 19, 31, 39]
    for seed in run.worlds:
        script, frames, z = opened(p, place(seed, "l2:120 l:20 j:20 -:16 l:12 w:8 j:12 d:4 s:4 -:4"))
        keys, turns, mixed = script.keyboard[f:f + 40], script.mouse[f:f + 40], np.random.default_rng(seed).permutation(40)
        arms = {"true actions": (keys, turns), "shuffled actions": (keys[mixed], -turns[mixed]), "no action": (0 * keys, 0 * turns)}
        images = decode(p, torch.cat([rollout(p, script, z, 1, actions=a)[0] for a in arms.values()]), 40)
        for arm, image in zip(arms, images, strict=True):
            run.scores(arm, image, frames[KNOWN:KNOWN + 40])
        if seed in run.some:
            commanded = script.poses[[f, *(KNOWN + t for t in at)]].numpy()
            found = np.stack([commanded[0], *(register(script.scene, images[0, t].numpy(), script.poses[KNOWN + t].numpy()).pose for t in at)])
            for kind, axes in (("turn", (4,)), ("move", (0, 2))):
                m, c = (np.diff(x[:, axes], axis=0) for x in (found, commanded))
                run.put(kind, {"gain": (m * c).sum() / (c * c).sum(), "relative pose error": np.sqrt(((m - c) ** 2).sum(1).mean())})
def distill(run: Run) -> None:
    """M6: the teacher at many and few steps against the student, on the same worlds, paths and noise; two seeds for diversity."""
    teacher, student, at, made = player(run.weights, "base") or lacking("base"), player(run.weights, "student"), np.arange(257 - SCORED, 257), {}
    models = [(teacher, n) for n in ((50, 16, 8, 4, 3) if run.full else (50, 3))] + [(student, n) for n in ((1, 2, 3, 4, 8) if run.full else (1, 3))]
    for seed in run.some:
        script = revisit(seed, 0.4)
        frames, depth, c2w = draw(script)
        masks, z = masks_and_nearest(script, at, depth, c2w)[0], opened(teacher, script, frames)[2]
        for p, n in ((p, n) for p, n in models if p):
            row = f"{'teacher' if p is teacher else 'student'}, {n} steps"
            latents, said = zip(*(rollout(p._replace(options=replace(p.options, steps=n)), script, z, 2, seed=s) for s in range(2)), strict=True)
            image = decode(p, torch.cat(latents), SCORED)
            run.scores(row, image[0], frames[at], masks)
            spread = (image[0] - image[1]).square().mean(-1).numpy()
            run.put(row, {"sharpness": sharpness(image[0], frames[at]).mean(), "ms per segment": np.mean([s["ms"]["denoise"] for s in said])} | {
                f"rms between seeds, {w}": math.sqrt((spread * masks[w]).sum() / max(1, masks[w].sum())) for w in ("seen", "unseen")})
            made.setdefault(row, []).append((image[0], frames[at]))
    for row, pairs in made.items():
        run.distances(row, "", pairs)
    strips = [[true[-1] for _, true in made[T50][:6]], *([np.uint8(255 * x[-1].numpy()) for x, _ in made[r][:6]] for r in (T50, T3, S) if r in made)]
    run.pictures["student"] = np.concatenate([np.concatenate(x, 1) for x in strips]).repeat(3, 0).repeat(3, 1)     # truth, teacher twice, student
    run.notes += [] if student else ["student rows: python train.py --stage distill"]
@torch.no_grad()
def int8(run: Run) -> None:
    """M7: what INT8 does to a velocity, a segment and a rollout, beside a float rollout disturbed by as much once."""
    p, segments = run.player, 8 if run.full else 3
    quant.quantize_(small := copy.deepcopy(p.nets["dit"]), "qkvo")
    run.notes.append("self-attention q,k,v,o, kernel torch._int_mm")
    for seed in run.some:
        script, _, z = opened(p, patrol(seed, segments))
        exact, rough = (rollout(q, script, z, segments)[0].float() for q in (p, p._replace(nets=p.nets | {"dit": small})))
        size = (rough - exact)[:, :, 4:14].square().mean().sqrt()
        run.put("segment 1", {"latent SQNR dB": 20 * math.log10(float(exact[:, :, 4:14].square().mean().sqrt() / size))})
        def disturb(denoiser: realtime.Denoiser, size: Tensor = size, seed: int = seed) -> None:      # behind the first segment
            noise = torch.randn(denoiser.now.past.shape, generator=torch.Generator().manual_seed(seed)) * size
            denoiser.now = denoiser.now._replace(past=denoiser.now.past + noise.to(denoiser.now.past))
        for arm, other in (("int8", rough), ("disturbed", rollout(p, script, z, segments, after=disturb)[0].float())):
            for k, (a, b) in enumerate(zip(exact[:, :, 14:].split(10, 2), other[:, :, 14:].split(10, 2), strict=True), 2):
                run.put(arm, {f"latent SQNR to float, segment {k}": 10 * math.log10(float(a.square().sum() / (a - b).square().sum()))})
        c2w, start, dtype = memory.pose_to_c2w(script.poses[None]), torch.tensor([30]), getattr(torch, p.options.dtype)
        x0, context = memory.clip_context(z.float(), c2w, script.keyboard[None], script.mouse[None], prompt(p, script), start, 10, 4,
                                          memory.select_training(c2w, start, 10), p.meta["encoding"])
        for sigma in torch.tensor([[0.9], [0.5], [0.1]]):
            x = dit.add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), sigma)
            v, v_hat = (model(x.to(dtype), sigma, context.to(dtype=dtype)).float() for model in (p.nets["dit"], small))
            run.put("velocity SQNR dB", {f"sigma {sigma.item():.1f}": 10 * math.log10(float(v.square().sum() / (v - v_hat).square().sum()))})
@torch.no_grad()
def decoders(run: Run) -> None:
    """M8: the three decoders on true latents of 9 and 33 frames, in turns, and on latents that the model made."""
    found, p, dtype = {}, player(run.weights, "student") or player(run.weights, "base", 8), getattr(torch, realtime.faster_dtype("cpu"))
    for row, name in PANES.items():
        try:
            found[row] = realtime.load_vae(Path(run.weights), "tiny", name).to(dtype).eval()
        except ValueError:
            run.notes.append(f"{row}: python train.py --stage {'vae' if name == 'full' else 'lightvae'}")
    full = found.get("Wan2.2") or lacking("vae")
    picture, last, sheet = lambda y: (y[0].float().permute(1, 2, 3, 0) + 1) / 2, {}, []
    for seed in run.worlds:
        frames = shoot(scene(seed), world.simulate(scene(seed), 0, 33)["player"])[0]
        for n, (row, model) in ((n, pair) for n in (9, 33) for pair in found.items()):
            video = torch.from_numpy(frames[:n]).permute(3, 0, 1, 2)[None].to(dtype) / 127.5 - 1
            y = picture(model.decode(z := full.encode(video), clamp=True))
            run.scores(f"{row}, {n} frames", y, frames[:n])
            run.put(f"{row}, {n} frames", {"last frame psnr": data.psnr(y[-1:], frames[n - 1:n])})
            last[row] = np.uint8(255 * y[-1].numpy())
        sheet.append(np.concatenate([frames[-1], *last.values()]))
        if p and seed in run.some:
            script, _, z = opened(p, revisit(seed, 0.0))
            new = rollout(p, script, z, 1)[0].to(dtype)
            made = {row: picture(model.decode(new, clamp=True)) for row, model in found.items()}
            for row in list(made)[1:]:
                run.scores(f"{row} beside Wan2.2, generated latents", made[row], (255 * made["Wan2.2"]).round().byte().numpy())
    both = found | {f"{row}, float32": copy.deepcopy(model).float() for row, model in found.items()}
    still = {row: z[:, :, -1:].repeat(1, 1, 10, 1, 1).to(next(model.parameters()).dtype) for row, model in both.items()}
    jobs = {f"{row}, streaming": partial(model.decode_stream, still[row], model.decode_stream(still[row])[1], True) for row, model in both.items()}
    for row, job in [*(jobs | {"encoder": lambda: full.encode(video[:, :, :1].repeat(1, 1, 41, 1, 1))}).items()] * 9:        # in turns
        began, _ = time.perf_counter(), job()
        run.put(row, {"s for 40 frames": (seconds := time.perf_counter() - began), "FPS": 40 / seconds})
    run.pictures["decoders"] = np.concatenate(sheet[:6], 1).repeat(3, 0).repeat(3, 1)                # truth, full, 50 %, 75 %
def retrieval(run: Run) -> None:
    """M10: how much of what any bank frame could show do five chosen ones show? Truth by exact depth; needs no model."""
    for seed, kind, last in ((s, k, t) for s in run.worlds for k in ("loop", "rl") for t in (45, 60)):
        walk = world.simulate(scene(seed), 1, 241, kind)
        _, depth, c2w = shoot(scene(seed), walk["player"][4::4], 32, 1)          # one frame per latent, as the bank keeps them
        asks, stop = np.array([last - 1 - k for k in memory.query_offsets(10, 5)]), last - 14
        seen = visible(depth[asks], c2w[asks], depth[:stop], c2w[:stop])      # (5, N, H, W)
        together, query = np.concatenate(list(seen), 1), torch.from_numpy(c2w[asks]).float()
        picks, cameras = {}, torch.from_numpy(c2w[:stop]).float()[:, None].expand(-1, 4, -1, -1)
        for rule, policy in (*((rule, "camera") for rule in memory.RULES), ("uniform", "recent"), ("uniform", "random")):
            store, row = memory.MemoryBank(rule), f"camera, {rule}" if policy == "camera" else policy
            store.append(torch.zeros(1, stop, 1, 1), cameras, torch.arange(1, stop + 1))
            began, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
            picks[row] = store.retrieve(query, policy=policy, generator=generator)[0].tolist()
            run.put(row, {"ms": 1e3 * (time.perf_counter() - began)})
        picks |= {"exact visibility per slot": seen.sum((2, 3)).argmax(1).tolist(), "greedy oracle": greedy(together, 5)}
        for row, chosen in picks.items():
            run.put(row, {"coverage@5": coverage(together, chosen) / max(coverage(together, picks["greedy oracle"]), 1e-9),
                          "missed views": np.mean([coverage(s, chosen) < 0.1 and s.any(0).mean() >= 0.5 for s in seen])})
def rope(run: Run) -> None:
    """Eq. 7: how alike times 100-4000 latents apart can look to the temporal clocks, with and without a clock per head; memory from far back."""
    for sigma in (0.0, 0.1, 0.5, 0.8):
        cfg = replace(dit.PRESETS["tiny"], sigma_theta=sigma)
        pairs = cfg.dim // cfg.heads // 2 - 2 * (cfg.dim // cfg.heads // 2 // 3)
        angle = dit.rope_angles(torch.arange(100, 4000)[None], 1, 1, cfg)[0, :, 0, :, :pairs]         # (lags, heads, pairs)
        run.put(f"sigma_theta {sigma}", {"likeness": angle.cos().mean((-1, -2)).max()})
    reappear(run, {f"{later} latents later": (run.player, {"later": later}) for later in (0, 200, 800)})
def reappear(run: Run, rows: dict[str, tuple[Player, dict]]) -> None:
    for seed, (row, (p, how)) in ((s, pair) for s in run.some for pair in rows.items()):
        script, frames, z = opened(p, revisit(seed, 0.0))
        run.scores(row, decode(p, rollout(p, script, z, 2, **how)[0], SCORED)[0], frames[-SCORED:])
def experts(run: Run) -> None:
    """§3.5: the share of steps of the high-noise expert; two trained experts beside one dense model, if there are any."""
    for steps, boundary in ((s, b) for s in (3, 50) for b in (0.8, 0.9, 0.95)):
        run.put(f"boundary {boundary}", {f"share of {steps} steps": (dit.sigma_grid(steps)[:-1] >= boundary).float().mean()})
    reappear(run, {row: (player(run.weights, name, 8) or lacking(name), {}) for row, name in (("two experts", "moe"), ("one dense model", "base"))})
def latency(run: Run) -> None:
    """M9: one Session, six steps to warm up; where the time goes, and key to photon."""
    tf = realtime.segment_flops(realtime.Options(preset="5b"))
    run.put("arithmetic", {"FPS at 1.551 s a segment": 40 / 1.551, "TF of a 5b segment": tf[0] / 1e12, "TF as released": tf[1] / 1e12})
    reappear(run, {f"{n} latents at once": (run.player, {"new": n}) for n in (10, 5, 2)})
    session = realtime.Session(run.player.options)
    session.reset(torch.from_numpy(draw(place(run.worlds[0], "w:2"), [0])[0][0]))
    for k in range(26 if run.full else 14):
        n, began = session.frames_needed, time.perf_counter()
        info = session.step(torch.zeros(n, 6), torch.tensor([[0.0, 0.1]]).expand(n, 2)).info
        spent = {f"{part} ms": ms for part, ms in (info["ms"] | {"whole": 1e3 * (time.perf_counter() - began)}).items()}
        run.put("later steps" if k else "first step", spent if k in (0, *range(6, 99)) else {})
    P, D, V = (float(np.median(run.raw[f"later steps/{part} ms"])) / 1e3 for part in ("whole", "denoise", "decode"))
    run.put("tiny", {"FPS, one after the other": 40 / P, "FPS by 40 / max(D, V)": 40 / max(D, V), "key to photon at 16 FPS, s": 1.25 + D + V / 10})

# ---- claims: data, not prose -----------------------------------------------------------------------------------------
# One row: what the paper says, what we predicted ("6-10", ">= 6", "<= 2", "> 0", "" for none), how raw numbers become the measured value
# (None: it cannot be measured here), and whether the row is missed unless it has the paper's digits.
Claim = namedtuple("Claim", "name paper predicted unit where measure exact", defaults=(None, False))
def of(column: str, row: str, other: str = "", ratio: bool = False) -> Callable[[Raw], list[float]]:
    """The values of a row, or their paired difference from another row (or ratio to it): both sides come from one run."""
    pairs = lambda raw: zip(raw[f"{row}/{column}"], raw[f"{other or row}/{column}"], strict=True)
    return lambda raw: [x / y if ratio else x - y if other else x for x, y in pairs(raw)]
C, S, T50, T3 = Claim, "student, 3 steps", "teacher, 50 steps", "teacher, 3 steps"
CLAIMS: dict[str, list[Claim]] = {
    "sanity": [C("metrics that rank fakes as expected", None, ">= 1", "", "M0", lambda r: [r[f"ranks fakes as expected/{m}"][0] for m in BETTER]),
               *(C(f"registration of clean frames, median, {u}", None, f"<= {gate}", u, "M0", lambda r, u=u: np.median(
                   r[f"registration of clean frames/{u}"])) for u, gate in (("deg", 0.25), ("m", 0.01)))],
    "memory": [*(C(f"{at}: memory minus none", None, f">= {gain}", "dB", "§3.2", of("psnr", f"{at}, camera", f"{at}, none"))
                 for at, gain in zip(PLACES, (6, 7, 5, 3), strict=True)),
               *(C(f"{at}: memory minus copying", None, ">= 3", "dB", "§3.2", of("psnr", f"{at}, camera", f"{at}, copy nearest"))
                 for at in [*PLACES][1:]),
               C("exact: VAE ceiling minus memory", None, "<= 1.5", "dB", "§3.2", of("psnr", "exact, VAE ceiling", "exact, camera")),
               C("reliance on what is remembered", None, "> 0", "dB", "M11", of("psnr bank-only", "exact, camera", "exact, zeros")),
               C("adoption of another world's memory", None, ">= 0.7", "", "M11", of("adoption", "exact, other world"))],
    "drift": [*(C(f"in place, memory {said}: slope", None, goal, "dB/100 frames", "§3.1", of("dB per 100 frames", f"in place, {arm}"))
                for said, arm, goal in (("on", "camera", ">= -0.5"), ("off", "none", ""))),
              C("exploring: sharpness at the end", None, "0.85-1.15", "x", "§3.3", of("sharpness at the end", "exploring, camera"))],
    "action": [C("true minus shuffled actions", None, ">= 3", "dB", "§3.1", of("psnr", "true actions", "shuffled actions")),
               *(C(f"gain: {kind}", None, "0.9-1.1", "x", "M5", of("gain", kind)) for kind in ("turn", "move"))],
    "distill": [C("student at 3 steps minus teacher at 50, seen", None, "-0.5-0.5", "dB", "§3.3", of("psnr seen", S, T50)),
                C("student minus teacher, both at 3 steps", None, "> 0", "dB", "§3.3", of("psnr", S, T3)),
                C("TWFD: student / teacher at 50", None, "<= 1.1", "x", "§3.3", of("TWFD", S, T50, True)),
                C("segment time: teacher at 50 / student", None, "10-17", "x", "§3.3", of("ms per segment", T50, S, True))],
    "int8": [C("velocity SQNR at sigma 0.5", None, ">= 25", "dB", "§3.4", of("sigma 0.5", "velocity SQNR dB")),
             C("nearness to float: int8 minus disturbed", None, ">= 0", "dB", "M7", of("latent SQNR to float, segment 3", "int8", "disturbed"))],
    "vae": [*(C(f"{row}: PSNR", paper, goal, "dB", "Table 2", of("psnr", f"{row}, 33 frames"))
              for row, paper, goal in zip(PANES, (33.79, 31.84, 31.14), (">= 30", "", ""), strict=True)),
            *(C(f"{row}: SSIM", 0.99, ">= 0.93" if row == "Wan2.2" else "", "", "Table 2", of("ssim", f"{row}, 33 frames")) for row in PANES),
            *(C(f"{row}: PSNR lost", lost, f"<= {lost + 0.5:.2f}", "dB", "Table 2", of("psnr", "Wan2.2, 33 frames", f"{row}, 33 frames"))
              for row, lost in (("50 %", 1.95), ("75 %", 2.65))),
            *(C(f"{row}: streams faster", paper, goal, "x", "Table 2", of("s for 40 frames", "Wan2.2, streaming", f"{row}, streaming", True))
              for row, paper, goal in (("50 %", 2.53, ">= 2.5"), ("75 %", 5.85, ">= 4"))),
            *(C(f"{row}: streams 40 frames", None, f">= {goal}", "FPS", "§3.4", of("FPS", f"{row}, streaming"))
              for row, goal in (("Wan2.2", 400), ("75 %, float32", 100))),
            *(C(f"{row}: {what}, 17 frames at 720p", paper, "", "s", "Table 2") for what, papers in (
                ("encode + decode", (0.99, 0.52, 0.35)), ("decode", (0.76, 0.30, 0.13))) for row, paper in zip(PANES, papers, strict=True))],
    "retrieval": [C("coverage@5 of the camera rule", None, ">= 0.75", "", "§3.2", of("coverage@5", "camera, uniform")),
                  C("coverage@5: camera minus recent", None, "> 0", "", "§3.2", of("coverage@5", "camera, uniform", "recent")),
                  C("coverage@5: sampled minus exact overlap", None, "-0.05-0.05", "", "§3.4", of("coverage@5", "camera, uniform", "camera, exact"))],
    "rope": [C("likeness of distant times, sigma_theta 0.8 minus 0", None, "<= 0", "", "Eq. 7", of("likeness", "sigma_theta 0.8", "sigma_theta 0.0")),
             C("revisit 800 latents later minus at once", None, "-0.5-0.5", "dB", "§3.2", of("psnr", "800 latents later", "0 latents later"))],
    "moe": [C("two experts minus one dense model", None, "> 0", "dB", "§3.5", of("psnr", "two experts", "one dense model"))],
    "latency": [*(C(f"5B, 8+1 GPUs, {w}", fps, "", "FPS", "Table 1") for w, fps in (("all", 40.0), ("no INT8", 27.38), ("no GPU retrieval", 6.6))),
                C("no LightVAE: 40 frames in 1.551 s", 25.79, "", "FPS", "Table 1", of("FPS at 1.551 s a segment", "arithmetic"), True),
                C("a 5B segment as released", None, "905-906", "TF", "§3.1", of("TF as released", "arithmetic")),
                *(C(f"{n} latents at once minus 10", None, "-0.5-0.5", "dB", "§3.4", of("psnr", f"{n} latents at once", "10 latents at once"))
                  for n in (5, 2)),
                C("tiny on this machine, one after the other", None, ">= 200", "FPS", "§3.4", of("FPS, one after the other", "tiny"))],
}
COMMANDS = {"sanity": sanity, "memory": remember, "drift": drift, "action": action, "distill": distill, "int8": int8, "vae": decoders,
            "retrieval": retrieval, "rope": rope, "moe": experts, "latency": latency}
def judge(claim: Claim, raw: Raw) -> dict:
    """Value, interval and verdict: met, missed, unclear, reported, or not measured."""
    row = {name: getattr(claim, name) for name in ("name", "paper", "predicted", "unit", "where", "exact")}
    x: list[float] = []
    with contextlib.suppress(KeyError):
        x = [v for v in np.atleast_1d(claim.measure(raw) if claim.measure else []).tolist() if math.isfinite(v)]
    if not x:
        return row | {"value": None, "interval": None, "verdict": "not measured"}
    value, met, interval = sum(x) / len(x), None, bca(x) if len(x) > 2 else None
    if claim.exact:
        met = round(value, 2) == claim.paper
    elif bound := re.fullmatch(r"(>=|<=|>) (-?[\d.]+)", claim.predicted):
        holds = {">=": float.__ge__, "<=": float.__le__, ">": float.__gt__}[bound[1]]
        met = holds(float(value), float(bound[2]))
        met = "unclear" if met and interval and not all(holds(float(end), float(bound[2])) for end in interval) else met
    elif span := re.fullmatch(r"(-?[\d.]+)-([\d.]+)", claim.predicted):         # around zero: two one-sided tests
        met = equivalent(x, float(span[2])) if float(span[1]) == -float(span[2]) and len(x) > 2 else float(span[1]) <= value <= float(span[2])
    return row | {"value": value, "interval": interval, "verdict": {None: "reported", True: "met", False: "missed"}.get(met, met)}

# ---- results and report ----------------------------------------------------------------------------------------------
def measure(name: str, args: argparse.Namespace) -> dict:
    """Store the predictions, run, store everything. Missing weights leave rows unmeasured and say what makes them."""
    split = "final" if args.final else "tune" if args.tune else "test"
    worlds, began = list(world.SPLITS[split][:args.worlds or (WORLDS[split] if args.full else 8)]), time.perf_counter()
    run, path = Run(worlds, args.full, args.weights, Path(args.out), {}, {}, []), Path(args.out) / f"{name}.json"
    flags = "".join(f" --{f}" for f in ("full", "final", "tune") if getattr(args, f)) + f"{'' if args.full else ' --quick'} --worlds {len(worlds)}"
    flags += f" --weights {args.weights}" * (args.weights != str(ROOT / "assets" / "tiny"))
    cpu = re.search(r"model name\s*: (.*)", f.read_text()) if (f := Path("/proc/cpuinfo")).exists() else None
    result = {"command": f"python evaluate.py {name}{flags}", "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "seed": 0,
              "machine": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores", "split": split, "threads": torch.get_num_threads(),
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}, "worlds": worlds,
              "weights": {"/".join(f.parts[-2:]): hashlib.sha256(f.read_bytes()).hexdigest()[:12] for f in Path(args.weights).rglob("*.safetensors")}}
    path.parent.mkdir(parents=True, exist_ok=True)
    moe.write_text(path, json.dumps(result | {"claims": [judge(c, {}) for c in CLAIMS[name]], "raw": {}}))
    try:
        COMMANDS[name](run)
    except FileNotFoundError as error:
        run.notes.append(f"not measured: {error}")
    pictures = {k: base64.b64encode(imageio.imwrite("<bytes>", v, extension=".png")).decode() for k, v in run.pictures.items()}
    result |= {"seconds": round(time.perf_counter() - began, 1), "notes": run.notes, "claims": [judge(c, run.raw) for c in CLAIMS[name]]}
    moe.write_text(path, json.dumps(result | {"raw": run.raw, "pictures": pictures}))
    return result | {"raw": run.raw}
def number(x: float | None) -> str:
    return "-" if x is None else "nan" if not math.isfinite(x) else f"{x:.0f}" if abs(x) >= 1000 else f"{x:.4g}"
def claim_table(result: dict) -> str:
    lines = ["| claim | where | paper | predicted | measured [95 %] | verdict |", "|---|---|---|---|---|---|"]
    for c in result["claims"]:
        span = f" [{', '.join(map(number, c['interval']))}]" if c["interval"] else ""
        got = "not measured" if c["value"] is None else f"{number(c['value'])}{span} {c['unit']}".rstrip()
        lines.append(f"| {c['name']} | {c['where']} | {number(c['paper'])} | {c['predicted'] or '-'} | {got} | {c['verdict']} |")
    return "\n".join([*lines, "", footer(result)])
def raw_table(result: dict) -> str:                     # rows and columns as the keys say; means over worlds
    keys = [key.split("/", 1) for key in result["raw"]]
    rows, columns = (list(dict.fromkeys(k[i] for k in keys)) for i in (0, 1))
    mean = lambda x: number(float(np.nanmean(x))) if np.isfinite(x).any() else "nan" if x else ""
    lines = [f"| {' | '.join(['', *columns])} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {' | '.join([r, *(mean(result['raw'].get(f'{r}/{c}', [])) for c in columns)])} |" for r in rows]
    return "\n".join([*lines, "", footer(result)])
def footer(result: dict) -> str:
    v, worlds = result["versions"], f"{len(result['worlds'])} {result['split']} worlds"
    return " · ".join([f"`{result['command']}`", worlds, f"{result['machine']}, {result['threads']} threads", f"torch {v['torch']}",
                       f"{result['date']} UTC", *result.get("notes", [])])
T95 = (0, math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)            # of Student's t, two-sided, by number of seeds
def contrast(folder: Path, against: str) -> dict:
    """Arms trained several times, folder/ARM-SEED/*.json: every claim by seed, and the difference from the arm `against`, paired by seed."""
    found, each = {}, "no ARM-SEED/*.json there"
    for path in sorted(folder.glob("*-*/*.json")):
        (arm, seed), each = path.parent.name.rsplit("-", 1), footer(result := json.loads(path.read_text()))
        for c in (c for c in result["claims"] if c["value"] is not None):
            found.setdefault((f"{c['name']}, {c['unit']}", arm), {})[seed] = c["value"]
    table = ["| claim | arm | each seed | mean | difference [95 % over seeds] |", "|---|---|---|---|---|"]
    for (name, arm), values in sorted(found.items(), key=lambda row: (row[0][0], row[0][1] != against, row[0][1])):
        d = np.array([values[seed] - found[name, against][seed] for seed in values if seed in found.get((name, against), {})])
        m, half = d.mean() if len(d) else math.nan, T95[min(len(d), 8)] * d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else math.inf
        cells = [", ".join(map(number, values.values())), number(np.mean([*values.values()])), f"{m:+.3g} [{m - half:+.3g}, {m + half:+.3g}]"]
        table.append(f"| {name} | {arm} | {' | '.join(cells[:2] + ['-'] if arm == against else cells)} |")
    return {"table": [*table, "", f"`python evaluate.py compare --out {folder} --against {against}` · each seed: {each}"]}
def results(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json")) if path.stem in COMMANDS}
def report(out: Path, readme: Path, figures: Path) -> None:
    """Rewrite what stands between <!-- table:NAME --> (claims) or table:NAME:raw and <!-- /table -->, and the figures, from the json."""
    found = results(out)
    tables = {name: claim_table(result) for name, result in found.items()} | {f"{name}:raw": raw_table(result) for name, result in found.items()}
    tables |= {path.stem: "\n".join(json.loads(path.read_text())["table"]) for path in (*out.glob("bench-*.json"), *out.glob("compare-*.json"))}
    fill = lambda at: f"<!-- table:{at[1]} -->\n{tables.get(at[1], 'not measured')}\n<!-- /table -->"
    if readme.exists():
        moe.write_text(readme, re.sub(r"<!-- table:([\w:-]+) -->.*?<!-- /table -->", fill, readme.read_text(), flags=re.S))
    figures.mkdir(parents=True, exist_ok=True)
    for name, content in (pair for result in found.values() for pair in result.get("pictures", {}).items()):
        (figures / f"{name}.png").write_bytes(base64.b64decode(content))
    try:
        plot(found, figures)
    except ModuleNotFoundError:
        print("figures need: pip install matplotlib (the tables are written)")
def plot(found: dict, figures: Path) -> None:
    """Revisits by arm with floors and ceiling; drift by segment."""
    import matplotlib.figure  # optional
    for name, source, pattern, label in (("memory", "memory", r"exact, ([^/]+)/psnr", "PSNR of an exact revisit, dB"),
                                         ("drift", "drift", r"segment \d+/(.+): psnr", "PSNR by segment, dB"),
                                         ("sharpness", "drift", r"segment \d+/(.+): sharpness", "sharpness by segment, 1 = truth")):
        figure, curves = matplotlib.figure.Figure((7, 3)), {}
        for key, values in sorted(found.get(source, {}).get("raw", {}).items()):
            if at := re.fullmatch(pattern, key):
                curves.setdefault(at[1], []).append(np.mean(values))
        axes = figure.subplots()
        axes.set_title(label)
        for arm, ys in curves.items():
            axes.barh(arm, ys) if name == "memory" else axes.plot(range(1, len(ys) + 1), ys, label=arm)
        if curves:
            axes.legend(*axes.get_legend_handles_labels()).set_visible(name != "memory")
            figure.savefig(figures / f"{name}.png", bbox_inches="tight", dpi=110)
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Measure every claim on worlds with ground truth.")
    parser.add_argument("command", choices=[*COMMANDS, "all", "report", "compare"])
    for flag, default, text in (
        ("full", False, "64 worlds, every arm, 16 segments; up to two hours"), ("quick", False, "the default: 8 worlds, minutes"),
        ("final", False, "the worlds kept for the last table; open them once"), ("tune", False, "the worlds for choosing settings"),
        ("worlds", 0, "how many, if not those 64 or 8"), ("weights", str(ROOT / "assets" / "tiny"), "folder of the .safetensors, or a run"),
        ("out", "results", "folder of the json files"), ("against", "none", "compare: the arm that the others are compared with")):
        kind = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        parser.add_argument(f"--{flag}", help=text, **kind)
    args = parser.parse_args(argv)
    for name in (COMMANDS if args.command == "all" else {args.command: 0}.keys() & COMMANDS):
        result = measure(name, args)
        print(f"\n## {name} ({result['seconds']} s)\n\n{raw_table(result)}\n\n{claim_table(result)}", flush=True)
    if args.command == "compare":
        print("\n".join((result := contrast(Path(args.out), args.against))["table"]))
        moe.write_text(Path(args.out).with_name(f"compare-{Path(args.out).name}.json"), json.dumps(result, indent=1))
    if args.command in ("all", "report"):
        report(Path(args.out), ROOT / "README.md", ROOT / "assets" / "figures")
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
