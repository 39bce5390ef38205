"""Models that walk: loaded as play loads them, driven by the object that play drives.

A rollout begins with what is true: the latents of a script's known frames fill the bank, the last
four of them are the past. Everything after that is the model's own.
"""

import json
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

import moe
import world
from context import Memory, Window, segment_cameras
from dataset.prompt import embed_prompt
from engine import actors, parts
from lab.worlds import Script, draw

STAGES = {"student": "distill"}  # what a network's file is called -> the stage that makes it


class Player(NamedTuple):
    name: str
    options: parts.Options
    meta: dict  # how it was trained
    nets: dict[str, nn.Module]  # dit, encoder, decoder


class Opened(NamedTuple):
    frames: ndarray  # (F, H, W, 3) uint8, true
    latents: Tensor  # (1, C, T, h, w)


class How(NamedTuple):
    """What may differ between two rollouts of one script."""

    policy: str = "camera"  # of memory; none: without
    bank: Tensor | None = None  # other latents under the right poses
    shuffle: bool = False  # the right latents under wrong poses
    actions: tuple[Tensor, Tensor] | None = None  # others than the script's
    seed: int = 0  # of the noise
    later: int = 0  # latents of silence between what is known and now
    new: int = 10  # latents at once
    after: Callable[[actors.Denoiser], None] | None = None  # called after the first segment
    recall: "Recall | None" = None  # what stands in the memory slots, if not what the bank answers


AS_PLAYED = How()

# a denoiser, (5, 4, 4) cameras that ask, the first latent that is too new to answer
Recall = Callable[[actors.Denoiser, Tensor, int], Memory]


def lacking(stage: str, how: str = "") -> NoReturn:
    """The end of a command without weights: what makes them."""
    command = f"python train.py --stage {stage}{how}"
    raise FileNotFoundError(f"no {stage} weights; make them with: {command}")


def is_run(folder: Path, stage: str) -> bool:
    """A run of train.py, of this stage?"""
    if not (folder / "latest").exists():
        return False
    config = json.loads((folder / "config.json").read_text())
    return config["stage"] == stage


@lru_cache(maxsize=8)
def player(
    weights: str,  # a folder of .safetensors, or a run, which plays with the shipped VAE
    name: str,  # student, base, dense, moe-...
    steps: int = 0,
) -> Player | None:
    """None where nobody has trained it yet."""
    file = Path(weights) / f"{name}.safetensors"
    if is_run(Path(weights), STAGES.get(name, name)):
        file = Path(weights)
    if not file.exists():
        return None
    usual = 3 if name == "student" else 50
    options = parts.resolve(parts.Options(weights=str(file), steps=steps or usual))
    nets, meta = parts.load_parts(options, "dit", "encoder", "decoder")
    return Player(name, options, meta, nets)


# ---- frames and latents -------------------------------------------------------------------


def dtype_of(net: nn.Module) -> torch.dtype:
    return next(net.parameters()).dtype


@torch.no_grad()
def decode(
    p: Player,
    z: Tensor,  # (B, C, T, h, w)
    last: int,  # frames that are wanted
) -> Tensor:  # (B, last, H, W, 3) in [0, 1]
    """Four latents before the wanted ones fill the decoder's history."""
    net = p.nets["decoder"]
    wanted = Window().latent_of(last)
    z = z[:, :, -(wanted + 4) :]
    video = net.decode(z.to(dtype_of(net)), clamp=True)[:, :, -last:]
    return (video.float().permute(0, 2, 3, 4, 1) + 1) / 2


@torch.no_grad()
def encode(p: Player, frames: ndarray) -> Tensor:  # (F, H, W, 3) -> (1, C, T, h, w)
    net = p.nets["encoder"]
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None]
    return net.encode((video / 127.5 - 1).to(dtype_of(net)), chunk=12)


def opened(p: Player, script: Script, frames: ndarray | None = None) -> Opened:
    """The true frames of a script, as many as whole latents need, and their latents."""
    if frames is None:
        extra = (len(script.poses) - 1) % 4
        frames = draw(script, slice(len(script.poses) - extra)).frames
    return Opened(frames, encode(p, frames))


def prompt(p: Player, script: Script) -> Tensor:  # (1, n, text_dim)
    """The caption that the world has in training."""
    words = world.scene_caption(script.scene)
    cfg = p.nets["dit"].cfg
    return embed_prompt(words, cfg.text_dim, cfg.text_len)[None]


# ---- rollouts -----------------------------------------------------------------------------


def third_person(script: Script) -> Callable[[Tensor], Tensor]:
    """The arm of the camera shortens at the walls of this world."""

    def cameras(poses: Tensor) -> Tensor:
        return torch.from_numpy(world.cameras(script.scene, poses.numpy(), "third"))

    return cameras


def begin(p: Player, script: Script, z: Tensor, how: How) -> actors.Denoiser:
    """A denoiser that stands at the last known frame and remembers the known ones."""
    known = Window().latent_of(script.known)  # latents
    last = script.known - 1
    denoiser = actors.Denoiser(p.nets["dit"], p.meta, p.options)
    if script.view == "third":
        denoiser.camera = third_person(script)
    if isinstance(p.nets["dit"], moe.Experts):
        p.nets["dit"].look(script.view)

    # where the walk stands: all that was known of it is behind it
    walk = actors.Walk(
        past=z[:, :, max(0, known - 4) : known],
        text=prompt(p, script),
        poses=script.poses[: last + 1],
        keyboard=script.keyboard[:last],
        mouse=script.mouse[:last],
        seed=how.seed,
        segment=int(known > 1),
        count=known + how.later,
        origin=4 * how.later,
    )
    denoiser.start(walk)

    # what is remembered: true latents, under their own cameras unless asked otherwise
    poses = denoiser.camera(script.poses[: last + 1])
    cameras = segment_cameras(poses[None], 0, known)[0].float()
    if how.shuffle:
        g = torch.Generator().manual_seed(how.seed)
        cameras = cameras[torch.randperm(known, generator=g)]
    source = z if how.bank is None else how.bank
    latents = source[0, :, :known].to(denoiser.now.past)
    denoiser.bank.append(latents, cameras.to(p.options.device), torch.arange(known))
    if how.recall:
        denoiser.recall = partial(recall_instead, denoiser, how.recall)
    return denoiser


def recall_instead(
    denoiser: actors.Denoiser,
    recall: Recall,
    asking: Tensor,
    before: int,
    policy: str,
) -> tuple[Memory, list[dict]]:
    """In the place of Denoiser.recall: nothing to show beside the memory."""
    return recall(denoiser, asking, before), []


def ends_of(known: int, segments: int, new: int) -> range:
    """The frames after which a segment ends. A first segment of all is longer: it has no past
    but one picture, and makes fourteen latents."""
    if known > 1:
        return range(4 * new, 40 * segments + 1, 4 * new)
    return range(56, 40 * segments + 17, 4 * new)


def rollout(
    p: Player,
    script: Script,
    z: Tensor,  # (1, C, T, h, w) true latents
    segments: int,  # of ten latents, however many are made at once
    how: How = AS_PLAYED,
) -> tuple[Tensor, dict]:  # (1, C, 4 + 10·segments, h, w); what the denoiser said last
    """Four true latents and the new ones after them; from one frame 1 + 14, and then 10 each."""
    denoiser = begin(p, script, z, how)
    first = script.known - 1
    keyboard, mouse = how.actions or (script.keyboard[first:], script.mouse[first:])
    latents = [denoiser.now.past]
    start = 0
    for end in ends_of(script.known, segments, how.new):
        x0, info = denoiser.run(keyboard[start:end], mouse[start:end], how.policy)
        latents.append(x0)
        if how.after and start == 0:
            how.after(denoiser)
        start = end
    return torch.cat(latents, 2), info


def picture(frame: Tensor) -> ndarray:  # of [0, 1] -> uint8, as the figures show it
    return np.uint8(255 * frame.numpy())
