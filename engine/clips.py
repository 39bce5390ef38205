"""Episodes as cached latents, and the batch of a step.

A training never sees a video twice: load_clips encodes every episode once and keeps the latents
beside the dataset, in a folder whose name is a digest of the episodes and of the encoder. Its files
are mapped, not read: a dataset may be larger than memory, and every rank reads its own rows alone.
What a step takes out of them is a Cut (which episodes, from where, what to remember), drawn by
draw_cut from (seed, step) alone; windows() turns it into what the network is told and asked.
"""

import copy
import dataclasses
import hashlib
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
from dataset.episode import Episode, list_episodes, read_episode
from engine import cli, parts, weights
from engine.flags import TrainConfig, lengths
from engine.run import Run, generator, share, vae_file

VAES = vae.PRESETS | {"5b": vae.PRESETS["wan2.2"], "14b": vae.PRESETS["wan2.2"]}
WINDOW = Window()
SPLITS = {"first": ["train"], "third": ["third"], "both": ["train", "third"]}  # by view
SHARD = 64  # episodes in a file of cached latents: about 10 MB of the small model's
LENGTHS_OF_FILM = ((9, 1), (9, 1), (17, 2), (33, 4))  # frames, and by how much a batch shrinks


class Column:
    """One field of all episodes. The rows lie in mapped files: only what is asked for is read."""

    def __init__(self, parts: list[Tensor], order: Tensor | None = None) -> None:
        self.parts = parts  # (rows of a file, ...) each
        self.ends = np.cumsum([len(part) for part in parts])
        self.order = torch.arange(int(self.ends[-1])) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.parts[0].shape[1:]

    def __getitem__(self, rows: int | slice | Tensor) -> Tensor:
        found = self.order[rows]
        if found.dim() == 0:
            return self.row(int(found))
        return torch.stack([self.row(number) for number in found.tolist()])

    def row(self, number: int) -> Tensor:
        part = int(np.searchsorted(self.ends, number, side="right"))
        return self.parts[part][number - int(self.ends[part])]


@dataclass
class Clips:
    """A dataset as latents; row e is one episode."""

    latents: Column  # (E, C, T, h, w) float16
    c2w: Column  # (E, F, 4, 4)
    keyboard: Column  # (E, F, 6)
    mouse: Column  # (E, F, 2)
    text: Column  # (E, n, D_text)
    revisit: Column  # (E, T) how much of a window that starts here was seen before its past


# ---- pixels: what a VAE learns from ------------------------------------------------------------------------


def pixels(video: np.ndarray | Tensor) -> Tensor:
    """Grey levels (..., F, H, W, 3) -> (..., 3, F, H, W) in [-1, 1]; exact, whatever computes later."""
    return torch.as_tensor(np.array(video)).movedim(-1, -4).float() / 127.5 - 1


def read_videos(root: Path) -> list[np.ndarray]:
    """Every training episode of both views, as (F, H, W, 3) grey levels."""
    videos = []
    longest = max(frames for frames, _ in LENGTHS_OF_FILM)
    views = [split for split in ("train", "third") if split == "train" or (root / split).exists()]
    for split in views:
        for path in list_episodes(root, split):
            video = np.array(read_episode(path).video)
            size = (videos or [video])[0].shape[1:3]
            if len(video) < longest or video.shape[1:3] != size:
                raise ValueError(
                    f"{path} has {in_words(video.shape[:3])}; the VAE learns from clips of {longest} "
                    f"frames or more, all of one size, and the first are {size[1]}x{size[0]}"
                )
            videos.append(video)
    return videos


def frame_batch(videos: list[np.ndarray], cfg: TrainConfig, step: int) -> Tensor:
    """(B, 3, F, H, W): random clips of mixed length. A VAE trained on 9 frames alone fades on longer ones."""
    g = generator(cfg, step)
    frames, scale = LENGTHS_OF_FILM[int(torch.randint(len(LENGTHS_OF_FILM), (), generator=g))]
    clips = []
    for _ in range(max(1, cfg.batch // scale)):
        video = videos[int(torch.randint(len(videos), (), generator=g))]
        start = int(torch.randint(len(video) - frames + 1, (), generator=g))
        clips.append(video[start : start + frames])
    return pixels(np.stack(clips))


# ---- latents: what all other stages learn from -------------------------------------------------------------


def load_vae(cfg: TrainConfig, device: torch.device) -> nn.Module:
    """The VAE of --vae, or the shipped one, or the one trained here; frozen."""
    model = weights.load_vae(vae_file(cfg))
    return model.float().to(device).eval().requires_grad_(False)


def episodes_for(run: Run, root: Path, split: str) -> list[Path]:
    """The episodes of a split that this training may see."""
    cfg = run.cfg
    try:
        paths = list_episodes(root, split)
    except ValueError:
        paths = []
    if cfg.overfit and split != "tune":
        paths = paths[: cfg.overfit]

    # the high-noise experts teach obedience, by true keys only; the low one takes inferred keys, too
    if cfg.stage == "moe" and cfg.expert.startswith("high"):
        paths = [path for path in paths if read_episode(path).meta["action_source"] == "engine"]
    if not paths:
        where = cli.shown(root)
        raise ValueError(
            f"no episodes in {where}/{split} that --stage {cfg.stage} can learn from: "
            "move some there; --data takes the folder that holds train/ and tune/"
        )
    return paths


def digest_of(vae: nn.Module, root: Path, paths: list[Path], run: Run) -> str:
    """Changes with the episodes and with whatever changes their latents, or their words."""
    digest = hashlib.sha256("\n".join(str(p.relative_to(root)) for p in paths).encode())
    for path in paths:
        digest.update((path / "_DONE").read_bytes())  # a hash of all that is in the episode
    size = dit.PRESETS[run.cfg.preset]
    digest.update(f"{run.dtype} {size.text_dim} {size.text_len}".encode())
    if parts.reads_umt5(run.cfg.preset):
        digest.update(b"umt5")  # older caches have word hashes in its place
    encoder = [*vae.encoder.parameters(), *vae.conv1.parameters()]
    for tensor in (*encoder, vae.latent_mean, vae.latent_std):
        digest.update(f"{tensor.double().sum().item():.6g}".encode())
    return digest.hexdigest()[:12]


def refuse_unequal(paths: list[Path], size: tuple[int, int]) -> None:
    """A batch is cut out of episodes of one shape, each as long as a first segment, of the preset's size."""
    shapes = {path: read_episode(path).video.shape[:3] for path in paths}
    usual = statistics.mode(shapes.values())
    shortest = WINDOW.frames(1)
    for path, shape in shapes.items():
        if shape != usual or shape[0] < shortest:
            raise ValueError(
                f"{path} has {in_words(shape)}, most of this split have {in_words(usual)}: "
                f"all must be alike, and {shortest} frames or longer"
            )
    if usual[1:] != size:
        wanted = in_words((usual[0], *size))
        raise ValueError(
            f"{paths[0].parent} has {in_words(usual)}, and this --preset {wanted}: "
            "read them again with --size, or take another --preset"
        )


def in_words(shape: tuple[int, ...]) -> str:
    frames, height, width = shape
    return f"{frames} frames of {width}x{height}"


def encode(
    encoder: nn.Module,
    reader: Callable[[str], Tensor],  # of prompts: parts.text_encoder
    episode: Episode,
    run: Run,
) -> dict[str, Tensor]:
    """One row of Clips."""
    video = pixels(episode.video)[None].to(run.device, run.dtype)  # (1, 3, F, H, W)
    c2w = torch.from_numpy(np.array(episode.c2w))
    return {
        "latents": encoder.encode(video)[0].half().cpu(),
        "c2w": c2w,
        "revisit": revisit_score(c2w),
        "keyboard": torch.from_numpy(np.array(episode.keyboard)),
        "mouse": torch.from_numpy(np.array(episode.mouse)),
        "text": reader(episode.text).half(),
    }


@torch.no_grad()
def encode_episodes(run: Run, vae: nn.Module, paths: list[Path], files: list[Path]) -> None:
    """Every missing file, SHARD episodes each: what a kill leaves behind is whole, and kept."""
    encoder = copy.deepcopy(vae).to(run.dtype)
    reader = parts.text_encoder(run.cfg.preset, str(cli.find(run.cfg.init)))
    name = files[0].parent.name
    bar = tqdm(total=len(paths), desc=f"encoding {name}", disable=not sys.stderr.isatty())
    for number, file in enumerate(files):
        mine = paths[number * SHARD :][:SHARD]
        if not is_whole(file):
            rows = [encode(encoder, reader, read_episode(path), run) for path in mine]
            tensors = {field: torch.stack([row[field] for row in rows]) for field in rows[0]}
            weights.write_weights(file, tensors, {})
        bar.update(len(mine))


def load_clips(run: Run, vae: nn.Module, root: Path, split: str) -> Clips:
    """Episodes as latents: encoded once per encoder and dataset, then mapped from the cache."""
    paths = episodes_for(run, root, split)
    cache = root / f"latents-{split}-{digest_of(vae, root, paths, run)}"
    count = -(-len(paths) // SHARD)
    files = [cache / f"{number:05d}.safetensors" for number in range(count)]
    if not all(map(is_whole, files)):
        refuse_unequal(paths, parts.SIZES[run.cfg.preset])
    if run.rank == 0:
        try:
            encode_episodes(run, vae, paths, files)
        except OSError as error:
            raise OSError(
                f"{error}; episodes are kept as latents beside them, in {cache}: make room there, or "
                "copy the data to where one may write"
            ) from error
    if run.world > 1:
        dist.barrier()
    return joined([weights.read_weights(file)[0] for file in files])


def is_whole(file: Path) -> bool:
    """Whether a file of the cache is there and can be read; what cannot is made anew."""
    try:
        fields = weights.read_weights(file)[0]
    except ValueError:
        return False
    return {field.name for field in dataclasses.fields(Clips)} <= set(fields)


def joined(shards: list[dict[str, Tensor]]) -> Clips:
    names = [field.name for field in dataclasses.fields(Clips)]
    return Clips(**{name: Column([shard[name] for shard in shards]) for name in names})


def seen_by(view: str, run: Run, vae: nn.Module, root: Path) -> Clips:
    """The episodes of a view, or of both in equal shares."""
    views = [load_clips(run, vae, root, split) for split in SPLITS[view]]
    shapes = [tuple(part.latents.shape[1:]) for part in views]
    if len(set(shapes)) > 1:
        got = " and ".join(
            f"{split} {shape}" for split, shape in zip(SPLITS[view], shapes, strict=True)
        )
        raise ValueError(f"episodes of both views must be alike, got latents (C, T, h, w): {got}")
    most = max(len(part.latents) for part in views)

    # the smaller part comes round again until it is as long as the larger
    first = 0
    order = []
    for part in views:
        order.append(first + torch.arange(most) % len(part.latents))
        first += len(part.latents)
    columns = {}
    for field in dataclasses.fields(Clips):
        files = [shard for part in views for shard in getattr(part, field.name).parts]
        columns[field.name] = Column(files, torch.cat(order))
    return Clips(**columns)


def revisit_score(c2w: Tensor) -> Tensor:  # (F, 4, 4) -> (T,)
    """For every possible first new latent: how well older memory covers the views to come, beyond
    what the past window does."""
    poses = torch.cat([c2w[:1], c2w[WINDOW.stride :: WINDOW.stride]])  # one camera per latent
    seen = memory.overlap(poses, poses, points=64)  # (T, T): query row, candidate column
    score = torch.zeros(len(seen))
    for start in range(WINDOW.past + 2, len(seen) - WINDOW.new + 1):
        new = seen[start : start + WINDOW.new]
        past = start - WINDOW.past
        by_memory = new[:, 1:past].amax(1)
        by_past = new[:, past:start].amax(1)
        score[start] = (by_memory - by_past).clamp(min=0).mean()
    return score


# ---- the batch of a step -----------------------------------------------------------------------------------


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


def draw_length(run: Run, step: int) -> tuple[int, int]:
    """How many new latents the segment of this step has, and how far into ten it begins."""
    choices = lengths(run.cfg)
    if choices == [WINDOW.new]:
        return WINDOW.new, 0
    g = generator(run.cfg, step, "length")
    n_new = choices[int(torch.randint(len(choices), (), generator=g))]
    return n_new, int(torch.randint(WINDOW.new - n_new + 1, (), generator=g))


def draw_cut(clips: Clips, run: Run, step: int) -> Cut:
    """Everything random about a step's windows. The order of the draws is a contract: resuming is exact."""
    cfg = run.cfg
    g = generator(cfg, step)
    episodes, latents = clips.revisit.shape
    rows = torch.randint(episodes, (cfg.batch,), generator=g)
    chances = torch.tensor([cfg.p_i2v, cfg.p_memory_off])
    i2v, off = (torch.rand(2, generator=g) < chances).tolist()

    # where the windows begin: after a whole past and a latent to remember, or where an old place
    # comes back into view
    anywhere = torch.ones(cfg.batch, latents)
    anywhere[:, : WINDOW.past + 1] = 0
    anywhere[:, latents - WINDOW.new + 1 :] = 0
    looks_back = torch.rand(cfg.batch, 1, generator=g) < cfg.revisit
    odds = torch.where(looks_back, clips.revisit[rows] + 1e-6 * anywhere, anywhere)
    start = torch.multinomial(odds, 1, generator=g)[:, 0]
    n_new, offset = draw_length(run, step)
    n_past = WINDOW.past

    # all that was drawn so far was drawn for every rank's rows: from here on there are only our own
    null = share(run, torch.rand(cfg.batch, generator=g) < cfg.p_null)
    rows = share(run, rows)
    start = share(run, start + offset)
    if i2v:
        start = torch.ones_like(start)
        n_past = 1
        n_new = WINDOW.first - 1

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


def host_batch(clips: Clips, run: Run, cut: Cut) -> tuple[Tensor, Context]:
    """What a step learns from, before it goes to the device: x0 (B, C, N, h, w) and its context."""
    x0, context = windows(clips, run, cut)
    context.times[:, context.memory.shape[2] :] += cut.later[:, None]
    return x0, context.mute(cut.null)


def batch(clips: Clips, run: Run, cut: Cut) -> tuple[Tensor, Context]:
    x0, context = host_batch(clips, run, cut)
    return x0.to(run.device), context.to(run.device)


class Ahead:
    """The next step's batch is read while this step is learnt from: it depends on its number alone."""

    def __init__(self, clips: Clips, run: Run) -> None:
        self.clips = clips
        self.run = run
        self.pool = ThreadPoolExecutor(1)
        self.coming: dict[int, Future] = {}  # by step

    def make(self, step: int) -> tuple[Cut, Tensor, Context]:
        cut = draw_cut(self.clips, self.run, step)
        return cut, *host_batch(self.clips, self.run, cut)

    def __call__(self, step: int) -> tuple[Cut, Tensor, Context]:
        now = self.coming.pop(step, None) or self.pool.submit(self.make, step)
        self.coming = {step + 1: self.pool.submit(self.make, step + 1)}
        cut, x0, context = now.result()
        return cut, x0.to(self.run.device), context.to(self.run.device)


def draw(clips: Clips, run: Run, step: int) -> tuple[Tensor, Context]:
    """The batch of a step: a share of the episodes, a window in each, and its memory."""
    return batch(clips, run, draw_cut(clips, run, step))


def scene(clips: Clips, run: Run, step: int) -> Clip:
    """Where the rollouts of a step begin and the ways they go; the true latents along them come with it."""
    g = generator(run.cfg, step)
    episodes = torch.randint(len(clips.latents), (run.cfg.batch,), generator=g)
    clip = episodes_of(clips, share(run, episodes))
    return dataclasses.replace(clip, latents=clip.latents.to(run.device))
