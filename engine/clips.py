"""Episodes as cached latents, and the batch of a step."""

import copy
import dataclasses
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import dit
import memory
import vae
from context import Clip, Context, Lens, Window
from dataset import prompt
from dataset.episode import list_episodes, read_episode
from engine import weights
from engine.run import Run, TrainConfig, generator, lengths, share

VAES = vae.PRESETS | {"5b": vae.PRESETS["wan2.2"], "14b": vae.PRESETS["wan2.2"]}
WINDOW = Window()


@dataclass
class Clips:  # a dataset as latents in memory; row e is one episode
    latents: Tensor  # (E, C, T, h, w) float16
    c2w: Tensor  # (E, F, 4, 4)
    keyboard: Tensor  # (E, F, 6)
    mouse: Tensor  # (E, F, 2)
    text: Tensor  # (E, n, D_text)
    revisit: (
        Tensor  # (E, T) how much a window that starts here shows of what was seen before its past
    )


def frame_batch(
    videos: list[np.ndarray], cfg: TrainConfig, step: int
) -> Tensor:  # (B, 3, F, H, W) in [-1, 1]
    """Random clips of mixed length: a VAE trained on 9 frames alone fades on longer ones."""
    g = generator(cfg, step)
    frames, scale = ((9, 1), (9, 1), (17, 2), (33, 4))[int(torch.randint(4, (), generator=g))]
    clips = []
    for _ in range(max(1, cfg.batch // scale)):
        video = videos[int(torch.randint(len(videos), (), generator=g))]
        start = int(torch.randint(len(video) - frames + 1, (), generator=g))
        clips.append(torch.from_numpy(np.array(video[start : start + frames])))
    return torch.stack(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def load_vae(cfg: TrainConfig, device: torch.device) -> nn.Module:
    places = (
        [Path(cfg.vae)]
        if cfg.vae
        else [
            Path(f"{where}/vae.safetensors")
            for where in (f"assets/{cfg.preset}", f"runs/vae-{cfg.preset}")
        ]
    )
    path = next((p for p in places if p.exists()), None)
    if path is None:
        raise ValueError(
            f"no VAE at {places[0]}; make one with: python train.py --stage vae --preset {cfg.preset}"
        )
    return (
        weights.vae_from_weights(*weights.read_weights(path))
        .float()
        .to(device)
        .eval()
        .requires_grad_(False)
    )


@torch.no_grad()
def load_clips(run: Run, vae: nn.Module, root: Path, split: str) -> Clips:
    """Episodes as latents: encoded once per encoder and dataset, then read from the cache beside the episodes."""
    cfg, size = run.cfg, dit.PRESETS[run.cfg.preset]
    paths = list_episodes(root, split)
    paths = paths[: cfg.overfit] if cfg.overfit and split != "tune" else paths
    if cfg.stage == "moe" and cfg.expert.startswith(
        "high"
    ):  # they teach obedience, by true keys only; the low expert takes inferred ones, too
        paths = [path for path in paths if read_episode(path).meta["action_source"] == "engine"]
    if not paths:
        raise ValueError(
            f"no episodes of split {split!r} in {root}; move some there, or: python data.py make --preset {cfg.preset} --out {root}"
        )
    digest = hashlib.sha256("\n".join(str(p.relative_to(root)) for p in paths).encode())
    for tensor in (
        *vae.encoder.parameters(),
        *vae.conv1.parameters(),
        vae.latent_mean,
        vae.latent_std,
    ):
        digest.update(f"{tensor.double().sum().item():.6g}".encode())
    cache = root / f"latents-{split}-{digest.hexdigest()[:12]}.safetensors"
    if run.rank == 0 and not cache.exists():
        encoder, rows = copy.deepcopy(vae).to(run.dtype), []
        for path in tqdm(paths, desc=f"encoding {split}", disable=not sys.stderr.isatty()):
            episode = read_episode(path)
            video = (
                torch.from_numpy(np.array(episode.video))
                .permute(3, 0, 1, 2)[None]
                .to(run.device, run.dtype)
                / 127.5
                - 1
            )
            c2w = torch.from_numpy(np.array(episode.c2w))
            rows.append(
                {
                    "latents": encoder.encode(video)[0].half().cpu(),
                    "c2w": c2w,
                    "revisit": revisit_score(c2w),
                    "keyboard": torch.from_numpy(np.array(episode.keyboard)),
                    "mouse": torch.from_numpy(np.array(episode.mouse)),
                    "text": prompt.embed_prompt(episode.text, size.text_dim, size.text_len).half(),
                }
            )
        weights.write_weights(
            cache, {k: torch.stack([row[k] for row in rows]) for k in rows[0]}, {"split": split}
        )
    dist.barrier() if run.world > 1 else None
    return Clips(**weights.read_weights(cache)[0])


def seen_by(view: str, run: Run, vae: nn.Module, root: Path) -> Clips:
    """The episodes of a view, or of both in equal shares."""
    parts = [
        load_clips(run, vae, root, split)
        for split in {"first": ["train"], "third": ["third"], "both": ["train", "third"]}[view]
    ]
    often = [torch.arange(max(len(p.latents) for p in parts)) % len(p.latents) for p in parts]
    return Clips(
        *(
            torch.cat([getattr(p, f.name)[rows] for p, rows in zip(parts, often, strict=True)])
            for f in dataclasses.fields(Clips)
        )
    )


def revisit_score(c2w: Tensor) -> Tensor:  # (F, 4, 4) -> (T,)
    """For every possible first new latent: how well older memory covers the views to come, beyond what the past window does."""
    poses = torch.cat((c2w[:1], c2w[WINDOW.stride :: WINDOW.stride]))  # one camera per latent
    seen = memory.overlap(poses, poses, points=64)  # (T, T): query row, candidate column
    score = torch.zeros(len(seen))
    for start in range(WINDOW.past + 2, len(seen) - WINDOW.new + 1):
        new, past = seen[start : start + WINDOW.new], start - WINDOW.past
        score[start] = (new[:, 1:past].amax(1) - new[:, past:start].amax(1)).clamp(min=0).mean()
    return score


def draw_length(run: Run, step: int) -> tuple[int, int]:
    """How many new latents the segment of this step has, and how far into ten it begins."""
    choices = lengths(run.cfg)
    if choices == [WINDOW.new]:
        return WINDOW.new, 0
    g = generator(run.cfg, step + 900_000_000)
    n_new = choices[int(torch.randint(len(choices), (), generator=g))]
    return n_new, int(torch.randint(WINDOW.new - n_new + 1, (), generator=g))


@dataclass(frozen=True)
class Cut:
    """Which windows a step takes out of which episodes: this rank's rows of the batch."""

    rows: Tensor  # (B,) episodes
    start: Tensor  # (B,) their first new latents
    n_past: int
    n_new: int
    memory: Tensor | None  # (B, M) latents to remember
    null: Tensor  # (B,) bool: without text and actions
    later: Tensor  # (B,) latents of silence between memory and past


def draw_cut(clips: Clips, run: Run, step: int) -> Cut:
    """Everything random about a step's windows. The order of the draws is a contract: resuming is exact."""
    cfg, g = run.cfg, generator(run.cfg, step)
    episodes, latents = clips.revisit.shape
    rows = torch.randint(episodes, (cfg.batch,), generator=g)
    chances = torch.tensor([cfg.p_i2v, cfg.p_memory_off])
    i2v, off = (torch.rand(2, generator=g) < chances).tolist()

    # where the windows begin: anywhere with a whole past, or where an old place comes back into view
    anywhere = torch.ones(cfg.batch, latents)
    anywhere[:, : WINDOW.past + 1] = 0
    anywhere[:, latents - WINDOW.new + 1 :] = 0
    looks_back = torch.rand(cfg.batch, 1, generator=g) < cfg.revisit
    weights = torch.where(looks_back, clips.revisit[rows] + 1e-6 * anywhere, anywhere)
    start = torch.multinomial(weights, 1, generator=g)[:, 0]
    n_new, offset = draw_length(run, step)

    null = share(run, torch.rand(cfg.batch, generator=g) < cfg.p_null)
    rows, start = share(run, rows), share(run, start + offset)
    if i2v:
        start, n_past, n_new = torch.ones_like(start), 1, WINDOW.first - 1
    else:
        n_past = WINDOW.past

    index = None
    if not (i2v or off):
        index = memory.select_training(clips.c2w[rows], start, n_new, sink=cfg.sink, generator=g)

    # an hour-long session asks for old memories too: 1 to 2000 latents of silence, evenly on a log scale
    is_late = torch.rand(cfg.batch, generator=g) < cfg.p_later * (index is not None)
    silence = 2000 ** torch.rand(cfg.batch, generator=g)
    later = share(run, (is_late * silence).long())
    return Cut(rows, start, n_past, n_new, index, null, later)


def lens_of(cfg: TrainConfig) -> Lens:
    """How cameras are told in this run."""
    return Lens(cfg.encoding, VAES[cfg.preset].stride[1])


def episodes_of(clips: Clips, rows: Tensor) -> Clip:
    """Some of the episodes, as float32."""
    return Clip(
        latents=clips.latents[rows].float(),
        c2w=clips.c2w[rows],
        keyboard=clips.keyboard[rows].float(),
        mouse=clips.mouse[rows],
        text=clips.text[rows].float(),
    )


def windows(clips: Clips, run: Run, cut: Cut) -> tuple[Tensor, Context]:
    """The new latents of a cut and what the network is told about them."""
    clip = episodes_of(clips, cut.rows)
    return clip.window(cut.start, cut.n_new, cut.n_past, cut.memory, lens_of(run.cfg))


def batch(clips: Clips, run: Run, cut: Cut) -> tuple[Tensor, Context]:
    """What a step learns from, on its device: x0 (B, C, N, h, w) and its context."""
    x0, context = windows(clips, run, cut)
    context.times[:, context.memory.shape[2] :] += cut.later[:, None]
    return x0.to(run.device), context.mute(cut.null).to(run.device)


def draw(clips: Clips, run: Run, step: int) -> tuple[Tensor, Context]:
    """The batch of a step: a share of the episodes, a window in each, and its memory."""
    return batch(clips, run, draw_cut(clips, run, step))


def scene(clips: Clips, run: Run, step: int) -> Clip:
    """Where the rollouts of a step begin and the ways they go; the true latents along them come with it."""
    g = generator(run.cfg, step)
    episodes = torch.randint(len(clips.latents), (run.cfg.batch,), generator=g)
    clip = episodes_of(clips, share(run, episodes))
    return dataclasses.replace(clip, latents=clip.latents.to(run.device))
