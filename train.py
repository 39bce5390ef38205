"""Every stage as a loop you can read.

Paper: §5.1 (settings), §3.1-3.3 (losses), §3.4 (light VAE), §3.5 (experts).  Official training code: not released.

    stage       from    learns                                          loop
    vae         -       frames <-> latents                              train_vae
    lightvae    vae     the same latents through a thinner decoder      train_lightvae
    base        vae     v(x_σ, σ | past, memory, actions, cameras)      train_base       Eq. 1-6
    distill     base    the same in three steps, on its own outputs     train_distill    Eq. 8
    moe         base    one expert per noise range and view             train_base on a part of the σ axis

One step of `base`:  x_σ = (1 − σ)·x0 + σ·ε on the new latents only; past and memory are at t = 0, corrupted by residuals
the model itself made earlier (error_buffer.py); with p = 0.2 there is neither, and the model learns image-to-video.

Departures: learning rates (the paper's suit 5 B parameters), Muon on block matrices, latents encoded once and cached, revisits drawn
more often than they occur, memories made older than they are. All that is drawn in a step is a function of (seed, step) alone: resuming
is exact, and N ranks compute the losses of one process (vae: one rank only; distill: every rank draws noise of its own).

Run folder: config.json · log.jsonl · samples/ · latest · ckpt/000500/ (moe.save).   Tests: pytest tests/test_train.py
"""

import argparse
import copy
import dataclasses
import difflib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import data
import dit
import dmd
import error_buffer
import memory
import moe
import vae as vae_file


def opt(
    default: object, help: str, group: str = "run", paper: str = "", choices: tuple = ()
) -> object:
    """A field that becomes a flag: default, help, and what the paper used."""
    return field(
        default=default, metadata={"help": help, "group": group, "paper": paper, "choices": choices}
    )


@dataclass(frozen=True)
class TrainConfig:
    stage: str = opt("base", "what to train", choices=("vae", "lightvae", "base", "distill", "moe"))
    preset: str = opt("tiny", "size of everything", choices=("micro", "tiny", "small", "5b", "14b"))
    run: str = opt(
        "",
        "name under runs/; an existing one is resumed (default: STAGE-PRESET, moe-EXPERT-PRESET)",
    )
    fresh: bool = opt(False, "delete the run of this name first")
    seed: int = opt(0, "of every draw")
    device: str = opt("auto", "auto | cpu | cuda")
    dtype: str = opt(
        "auto", "compute precision; weights stay float32", choices=("auto", "float32", "bfloat16")
    )
    save_every: int = opt(250, "steps between checkpoints")
    sample_every: int = opt(500, "steps between sample strips and held-out scores; 0 = never")
    log_every: int = opt(20, "steps between log lines")
    keep: int = opt(2, "checkpoints kept")
    dry_run: bool = opt(False, "print the memory table and stop")
    deterministic: bool = opt(False, "torch.use_deterministic_algorithms")
    tensorboard: bool = opt(False, "also write TensorBoard events (needs tensorboard)")
    data: str = opt("", "dataset folder (default: datasets/PRESET, rendered on first use)", "data")
    vae: str = opt("", "VAE weights (default: assets/PRESET/vae.safetensors)", "data")
    init: str = opt("", "weights to start from: a run, a folder or a file", "data")
    net: str = opt(
        "",
        "another network than the preset's, such as 'dim=128 layers=4 sigma_theta=0': see dit.DiTConfig",
        "run",
    )
    overfit: int = opt(0, "train on this many clips only; the loss must fall towards 0", "data")
    steps: int = opt(900, "optimiser steps", "optimisation", "50,000")
    lr: float = opt(1e-3, "AdamW learning rate", "optimisation", "2e-5, §5.1")
    muon: float = opt(
        1e-2,
        "Muon learning rate of the matrices inside blocks; 0 = AdamW everywhere",
        "optimisation",
        "not stated",
    )
    warmup: int = opt(
        50, "steps of linear warm-up, and before errors are injected", "optimisation", "not stated"
    )
    batch: int = opt(16, "clips per step, all ranks together", "optimisation", "not stated")
    accum: int = opt(1, "micro-batches per step", "optimisation", "not stated")
    clip: float = opt(1.0, "gradient norm limit", "optimisation", "not stated")
    decay: float = opt(0.01, "weight decay", "optimisation", "not stated")
    ema: float = opt(0.995, "decay of the averaged weights", "optimisation", "not stated")
    checkpoint_activations: bool = opt(
        False, "recompute blocks in the backward pass", "optimisation", "not stated"
    )
    shift: float = opt(
        5.0,
        "of the training and sampling σ: more steps where layout is decided",
        "optimisation",
        "5 (lineage)",
    )
    p_i2v: float = opt(
        0.2, "batches without past and memory: image to video", "memory", "0.2, §3.1"
    )
    p_memory_off: float = opt(
        0.15,
        "other batches without memory, so that it can be switched off",
        "memory",
        "part of the 0.2",
    )
    p_null: float = opt(
        0.1, "samples with null text and actions, for guidance", "memory", "not stated"
    )
    p_later: float = opt(
        0.5,
        "samples whose memory is from up to 2,000 latents earlier than it was",
        "memory",
        "not stated",
    )
    revisit: float = opt(
        0.5,
        "samples whose window looks at a place seen before and since left",
        "memory",
        "palindromes, share not stated",
    )
    encoding: str = opt(
        "anchored", "ray encoding", "memory", "frame-wise relative", memory.ENCODINGS
    )
    sink: bool = opt(True, "the last memory is always the oldest latent", "memory", "yes")
    new: str = opt(
        "10 5 2",
        "lengths of segments in new latents; every step draws one",
        "memory",
        "10",
    )
    gamma: float = opt(
        1.0, "scale of injected errors, times U(0.8, 1.2)", "error buffer", "not stated"
    )
    p_error: float = opt(
        0.5, "share of samples with injected errors; 0 = off", "error buffer", "not stated"
    )
    inject: str = opt(
        "both",
        "where errors go",
        "error buffer",
        "past and memory, Eq. 5",
        ("both", "past", "memory"),
    )
    error_kind: str = opt(
        "real",
        "replay residuals, or Gaussian noise of equal variance",
        "error buffer",
        "real",
        ("real", "gaussian"),
    )
    p_own: float = opt(
        0.0,
        "share of steps whose errors are the model's own of this very scene, not stored foreign ones",
        "error buffer",
        "not stated",
    )
    decoder_only: bool = opt(
        False,
        "vae: leave the encoder of --init as it is, so that latents stay what they are",
        "light VAE",
    )
    rate: float = opt(
        0.75, "share of decoder channels removed (lightvae)", "light VAE", "0.5 and 0.75, Table 2"
    )
    expert: str = opt(
        "high-first",
        "which expert (moe); dense: one model for all of it",
        "experts",
        "two high by view, one low",
        ("high-first", "high-third", "low", "dense"),
    )
    boundary: float = opt(
        0.9, "σ at which the experts change", "experts", "by SNR, value not stated"
    )
    cold_start: int = opt(
        60, "iterations on one segment with true past", "distillation", "600, §5.1"
    )
    ratio_cold: int = opt(
        5, "critic updates per student update in the cold start", "distillation", "5"
    )
    ratio: int = opt(3, "critic updates per student update afterwards", "distillation", "3")
    segments: int = opt(6, "K: longest self-rollout", "distillation", "6")
    lr_critic: float = opt(1e-4, "critic learning rate", "distillation", "1e-7, §5.1")
    adversarial: float = opt(
        0.0,
        "weight of a judge on the critic's features, as in DMD2; 0 = none",
        "distillation",
        "none",
    )
    guidance: float = opt(1.0, "teacher guidance scale; 1 = none", "distillation", "not stated")
    exit: str = opt(
        "random",
        "which of the student's steps carries the gradient",
        "distillation",
        "not stated",
        ("random", "last"),
    )


VAE = dict(muon=1e-2, lr=2e-3, batch=4, steps=4000, sample_every=0, decay=0.0)
BIG = dict(
    segments=6,
    lr=2e-5,
    muon=0.0,
    batch=64,
    steps=50_000,
    encoding="released",
    new="10",
    checkpoint_activations=True,
    ema=0.999,
)
DMD = dict(lr=5e-7, lr_critic=1e-7, steps=3000, cold_start=600, clip=10.0, guidance=1.0)
CHANGES = {  # what differs from the defaults above: by stage, then by preset, then by both
    "vae": VAE,
    "lightvae": VAE | dict(steps=1500),
    "base": {},
    "moe": dict(steps=600),
    "distill": dict(
        segments=5,
        steps=360,
        lr=3e-5,
        muon=0.0,
        warmup=1,
        ema=0.95,
        batch=8,
        clip=10.0,
        decay=0.0,
        guidance=3.0,
        save_every=40,
        log_every=5,
    ),
    "micro": dict(segments=1, batch=4, steps=20, save_every=10, sample_every=0),
    "5b": BIG,
    "14b": BIG,
    "distill-5b": DMD,
    "distill-14b": DMD,
}
FREE = {
    "steps",
    "fresh",
    "dry_run",
    "save_every",
    "sample_every",
    "log_every",
    "keep",
    "device",
    "tensorboard",
}  # may change on resume
BEFORE = {"new": "10"}  # what runs did that are older than a flag whose default is something else
VAES = vae_file.PRESETS | {"5b": vae_file.PRESETS["wan2.2"], "14b": vae_file.PRESETS["wan2.2"]}
VIEWS = {
    "high-first": "first",
    "high-third": "third",
    "low": "both",
    "dense": "both",
}  # whose eyes an expert has seen through
WINDOW = memory.Window()


@dataclass
class Run:
    """Where one training stands: its folder, its step, its place among the ranks."""

    folder: Path
    cfg: TrainConfig
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    step: int = 0
    asked: bool = False  # a signal came
    stop: bool = False  # all ranks know of it

    @property
    def view(self) -> str:
        return VIEWS[self.cfg.expert] if self.cfg.stage == "moe" else "first"

    def due(self, every: int) -> bool:  # at the end, and every so many steps
        return self.step >= self.cfg.steps or bool(every) and self.step % every == 0


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


# ---------------------------------------------------------------------------------------------------------- command line
def parse(argv: list[str]) -> TrainConfig:
    """Flags from the fields of TrainConfig; the stage and the preset choose what differs from its defaults (CHANGES)."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="also: --plot RUN ... | --export RUN ... FILE"
    )
    groups, names = {}, ["--" + f.name.replace("_", "-") for f in dataclasses.fields(TrainConfig)]
    for f, name in zip(dataclasses.fields(TrainConfig), names, strict=True):
        group = groups.setdefault(
            f.metadata["group"], parser.add_argument_group(f.metadata["group"])
        )
        others = "".join(
            f"; {what}: {changes[f.name]}" for what, changes in CHANGES.items() if f.name in changes
        )
        paper = f"; paper: {f.metadata['paper']}" if f.metadata["paper"] else ""
        kind = {
            "type": type(f.default),
            "choices": f.metadata["choices"] or None,
            "metavar": type(f.default).__name__,
        }
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else kind
        group.add_argument(
            name,
            help=f"{f.metadata['help']} (default {f.default!r}{others}{paper})".replace("%", "%%"),
            default=None,
            **kind,
        )
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, 1)
        raise ValueError(
            f"unknown flag {unknown[0]}"
            + (f"; did you mean {near[0]}?" if near else "; see --help")
        )
    which = args.stage or "base", args.preset or "tiny"
    changes = (
        CHANGES.get(which[0], {}) | CHANGES.get(which[1], {}) | CHANGES.get("-".join(which), {})
    )
    cfg = TrainConfig(
        **changes | {name: value for name, value in vars(args).items() if value is not None}
    )
    shipped = (
        cfg.stage in ("distill", "moe")
        and Path(base := f"assets/{cfg.preset}/base.safetensors").exists()
    )
    name = (
        f"{cfg.stage}-{cfg.expert}-{cfg.preset}"
        if cfg.stage == "moe"
        else f"{cfg.stage}-{cfg.preset}"
    )
    return dataclasses.replace(cfg, run=cfg.run or name, init=cfg.init or (base if shipped else ""))


# ------------------------------------------------------------------------------------------------------------------ setup
def run_folder(name: str) -> Path:
    """runs/NAME; a name is one folder there, so that nothing outside runs/ is ever written or deleted."""
    if not re.fullmatch(r"[\w][\w.+=-]*", name):
        raise ValueError(
            f"--run takes a name under runs/: letters, digits and . _ - + = after a letter or digit, "
            f"got {name!r}; as in --run mine-2"
        )
    return Path("runs") / name


def start_over(folder: Path) -> None:
    """Delete a run, and nothing that is not one."""
    if not folder.exists():
        return
    if folder.is_symlink() or not (folder / "config.json").is_file():
        raise ValueError(
            f"--fresh deletes runs of train.py only, and {folder} has no config.json of one; "
            "remove it yourself, or choose another --run NAME"
        )
    shutil.rmtree(folder)


def setup(cfg: TrainConfig) -> Run:
    """Ranks, device, precision and the run folder; refuses a folder that holds another configuration."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    cuda = torch.cuda.is_available() if cfg.device == "auto" else cfg.device.startswith("cuda")
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    if cfg.decoder_only and not (cfg.init and cfg.stage == "vae"):
        raise ValueError(
            "--decoder-only keeps the encoder of a VAE: --stage vae --decoder-only --init assets/tiny/vae.safetensors"
        )
    if cfg.batch % (world * cfg.accum):
        raise ValueError(
            f"--batch {cfg.batch} does not divide among {world} ranks x {cfg.accum} micro-batches; "
            f"use a multiple of {world * cfg.accum}"
        )
    if world > 1 and (cfg.muon or cfg.stage in ("vae", "lightvae")):
        raise ValueError(
            "several ranks hold shards, and Muon needs whole matrices: add --muon 0 (the VAE stages run on one rank)"
        )
    if world > 1 and cfg.adversarial:
        raise ValueError("the judge of --adversarial is not sharded: one rank, or --adversarial 0")
    lengths(cfg)
    if world > 1:
        torch.cuda.set_device(device) if cuda else None
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.use_deterministic_algorithms(cfg.deterministic)
    folder = run_folder(cfg.run)
    if cfg.fresh and rank == 0:
        start_over(folder)
    dist.barrier() if world > 1 else None
    old = json.loads((folder / "config.json").read_text()) if (folder / "latest").exists() else {}
    new = dataclasses.asdict(cfg)
    rows = [
        f"  {k:<24}{old.get(k)!s:<16}{new[k]!s}"
        for k in new
        if old and k not in FREE and old.get(k, BEFORE.get(k, getattr(TrainConfig, k))) != new[k]
    ]
    if rows:
        raise ValueError(
            f"{folder} was made with another configuration:\n  {'key':<24}{'old':<16}new\n"
            + "\n".join(rows)
            + "\nadd --fresh to start over, or choose another --run NAME"
        )
    names = [
        old.get("resolved_dtype") or str(moe.faster_dtype(device)).removeprefix("torch.")
        if cfg.dtype == "auto"
        else cfg.dtype
    ]
    dist.broadcast_object_list(
        names
    ) if world > 1 else None  # every rank has measured, rank 0 decides
    if rank == 0:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        moe.write_text(
            folder / "config.json",
            json.dumps(new | {"resolved_dtype": names[0], "torch": torch.__version__}, indent=1),
        )
    run = Run(folder, cfg, device, getattr(torch, names[0]), rank, world)

    def ask_to_stop(*_: object) -> None:
        if run.asked:
            raise KeyboardInterrupt
        run.asked = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    return run


def network(cfg: TrainConfig) -> dit.DiTConfig:  # the preset's, changed as --net says
    try:
        changes = {
            name: json.loads(value) for name, value in (word.split("=") for word in cfg.net.split())
        }
        return dataclasses.replace(dit.PRESETS[cfg.preset], **changes)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"--net takes fields of dit.DiTConfig, as in 'dim=128 sigma_theta=0', got {cfg.net!r}"
        ) from error


def generator(
    cfg: TrainConfig, step: int
) -> torch.Generator:  # the one source of randomness of a step
    return torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)


def share(run: Run, x: Tensor) -> Tensor:  # this rank's rows of a batch that every rank draws alike
    return x[run.rank :: run.world]


# ------------------------------------------------------------------------------------------------------- update, save, log
def save(
    run: Run, models: dict[str, nn.Module], ema: list[Tensor], opts: list, **state: object
) -> None:
    names = (
        "stage",
        "preset",
        "shift",
        "encoding",
        "sink",
        "p_memory_off",
        "seed",
        "expert",
        "boundary",
        "new",
    )
    said = {name: getattr(run.cfg, name) for name in names} | {"step": run.step, "view": run.view}
    moe.save(run.folder, said, models, ema, opts, run.cfg.keep, **state)


def restore(run: Run, models: dict[str, nn.Module], ema: list[Tensor], opts: list) -> dict:
    state = moe.restore(run.folder, models, ema, opts)
    run.step = state.get("step", 0)
    if run.step and run.rank == 0:
        print(f"resuming {run.folder} at step {run.step} (--fresh starts over)", flush=True)
    if (
        run.rank == 0 and (run.folder / "log.jsonl").exists()
    ):  # steps after the last save will be logged again
        lines = (run.folder / "log.jsonl").read_text().splitlines(keepends=True)
        moe.write_text(
            run.folder / "log.jsonl",
            "".join(x for x in lines if x.endswith("}\n") and json.loads(x)["step"] <= run.step),
        )
    return state


class Progress:
    """One line per log step and a log.jsonl; a bar when somebody watches."""

    def __init__(self, run: Run) -> None:
        self.run, self.start, self.first, self.sums = run, time.perf_counter(), run.step, {}
        self.bar = tqdm(
            total=run.cfg.steps,
            initial=run.step,
            disable=run.rank > 0 or not sys.stderr.isatty(),
            unit="step",
        )

    def __call__(self, **numbers: float) -> None:
        run = self.run
        for name, value in numbers.items():
            self.sums.setdefault(name, []).append(float(value))
        self.bar.update(1)
        run.stop = bool(
            moe.gathered(torch.tensor([run.asked], dtype=torch.uint8, device=run.device)).any()
        )
        if run.rank == 0 and (run.stop or run.due(run.cfg.log_every)):
            rate = (run.step - self.first) / (time.perf_counter() - self.start)
            line = (
                {"step": run.step}
                | {k: round(sum(v) / len(v), 5) for k, v in self.sums.items()}
                | {"it_s": round(rate, 3)}
            )
            self.sums.clear()
            record(run, line)
            text = "  ".join(f"{k} {v:.5g}" for k, v in line.items())
            self.bar.set_postfix_str(text) if not self.bar.disable else print(text, flush=True)


def record(run: Run, line: dict) -> None:
    """One line of log.jsonl, and of TensorBoard if asked for."""
    with open(run.folder / "log.jsonl", "a") as log:
        log.write(json.dumps(line) + "\n")
    if run.cfg.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(run.folder)) as events:
            events.add_scalars("training", line, line["step"])


# ------------------------------------------------------------------------------------------------------------------- data
def dataset(run: Run) -> Path:
    """The dataset folder; the default one is rendered on first use."""
    root = Path(run.cfg.data or f"datasets/{run.cfg.preset}")
    if run.cfg.data and not root.exists():
        raise ValueError(
            f"--data {root} does not exist; make one with: python data.py make --preset {run.cfg.preset} --out {root}"
        )
    if run.rank == 0 and not run.cfg.data:
        data.make_dataset(root, preset=run.cfg.preset)  # skips every finished episode
    dist.barrier() if run.world > 1 else None
    return root


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
        vae_file.from_weights(*moe.read_weights(path))
        .float()
        .to(device)
        .eval()
        .requires_grad_(False)
    )


@torch.no_grad()
def load_clips(run: Run, vae: nn.Module, root: Path, split: str) -> Clips:
    """Episodes as latents: encoded once per encoder and dataset, then read from the cache beside the episodes."""
    cfg, size = run.cfg, dit.PRESETS[run.cfg.preset]
    paths = data.list_episodes(root, split)
    paths = paths[: cfg.overfit] if cfg.overfit and split != "tune" else paths
    if cfg.stage == "moe" and cfg.expert.startswith(
        "high"
    ):  # they teach obedience, by true keys only; the low expert takes inferred ones, too
        paths = [
            path for path in paths if data.read_episode(path).meta["action_source"] == "engine"
        ]
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
            episode = data.read_episode(path)
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
                    "text": data.embed_prompt(episode.text, size.text_dim, size.text_len).half(),
                }
            )
        moe.write_weights(
            cache, {k: torch.stack([row[k] for row in rows]) for k in rows[0]}, {"split": split}
        )
    dist.barrier() if run.world > 1 else None
    return Clips(**moe.read_weights(cache)[0])


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


def lengths(cfg: TrainConfig) -> list[int]:
    """The segments that a run is trained for: --new "10 5 2"."""
    words = cfg.new.split()
    allowed = [str(n) for n in memory.LENGTHS]
    if not words or not set(words) <= set(allowed):
        raise ValueError(
            f"--new takes some of {' '.join(allowed)} in quotes, as in '10 5 2', got {cfg.new!r}"
        )
    return [int(word) for word in words]


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


def windows(clips: Clips, run: Run, cut: Cut) -> tuple[Tensor, memory.Context]:
    """The new latents of a cut and what the network is told about them."""
    rows = cut.rows
    return memory.clip_context(
        clips.latents[rows].float(),
        clips.c2w[rows],
        clips.keyboard[rows].float(),
        clips.mouse[rows],
        clips.text[rows].float(),
        cut.start,
        cut.n_new,
        cut.n_past,
        cut.memory,
        run.cfg.encoding,
        VAES[run.cfg.preset].stride[1],
    )


def batch(clips: Clips, run: Run, cut: Cut) -> tuple[Tensor, memory.Context]:
    """What a step learns from, on its device: x0 (B, C, N, h, w) and its context."""
    x0, context = windows(clips, run, cut)
    context.times[:, context.memory.shape[2] :] += cut.later[:, None]
    return x0.to(run.device), context.mute(cut.null).to(run.device)


def draw(clips: Clips, run: Run, step: int) -> tuple[Tensor, memory.Context]:
    """The batch of a step: a share of the episodes, a window in each, and its memory."""
    return batch(clips, run, draw_cut(clips, run, step))


@torch.no_grad()
def own_errors(
    model: Callable, clips: Clips, run: Run, cut: Cut, g: torch.Generator
) -> dict[str, Tensor]:
    """δ of these very past and memory latents: how the model errs on them in one step from a random σ.

    Stored errors come from other scenes. What a player sees drift is a blur of this one: noise the
    latents to σ ~ U(0, 1) and ask for the clean estimate x̂0, told only the latent before the past.
    """
    P = cut.n_past
    earlier = dataclasses.replace(cut, start=cut.start - P, n_new=P, n_past=1)
    past, context = windows(clips, run, earlier)
    M = context.memory.shape[2]

    # [memory | latent before | past]  ->  [latent before | memory, past]: all but one are asked for
    order = [M, *range(M), *range(M + 1, M + 1 + P)]
    x0 = torch.cat([context.memory, past], 2).to(run.device)
    context = dataclasses.replace(
        context,
        memory=context.memory[:, :, :0],
        times=context.times[:, order],
        rays=context.rays[:, :, order],
        mouse=context.mouse[:, order],
        keyboard=context.keyboard[:, order],
    ).to(run.device)

    sigma = share(run, torch.rand(run.cfg.batch, generator=g)).to(run.device)
    noise = share(run, torch.randn(run.cfg.batch, *x0.shape[1:], generator=g)).to(run.device)
    x_sigma = dit.add_noise(x0, noise, sigma)
    v = model(x_sigma.to(run.dtype), sigma, context.to(dtype=run.dtype)).float()
    delta = dit.x0_from_v(x_sigma, v, sigma) - x0
    return {"memory": delta[:, :, :M], "past": delta[:, :, M:]}


# ------------------------------------------------------------------------------------------------ stages: vae, lightvae
def train_vae(run: Run) -> None:
    """Frames to latents of unit variance and back (losses in vae.py)."""
    cfg, light, root = run.cfg, run.cfg.stage == "lightvae", dataset(run)
    videos = [
        np.array(data.read_episode(p).video)
        for split in ("train", "third")
        for p in data.list_episodes(root, split)
    ]
    torch.manual_seed(cfg.seed)
    teacher = load_vae(cfg, run.device).to(run.dtype) if light else None
    fresh = vae_file.VAE(vae_file.pruned(teacher.cfg, cfg.rate) if light else VAES[cfg.preset])
    model = (vae_file.from_weights(*moe.read_weights(cfg.init)).float() if cfg.init else fresh).to(
        run.device
    )
    if (model.cfg.dim, model.cfg.dec_dim) != (fresh.cfg.dim, fresh.cfg.dec_dim):
        raise ValueError(
            f"--init {cfg.init} has a decoder of width {model.cfg.dec_dim}, this run {fresh.cfg.dec_dim}: see --preset and --rate"
        )
    helper = (
        vae_file.Projections(model.cfg, teacher.cfg)
        if light
        else vae_file.LatentNorm(model.cfg.z_dim)
    )
    if cfg.decoder_only:  # the statistics stay, too; 1e-5 is what LatentNorm adds
        helper.mean, helper.var = model.latent_mean.clone(), model.latent_std.square() - 1e-5
        nn.ModuleList((model.encoder, model.conv1)).requires_grad_(False)
    both = nn.ModuleList((model, helper.to(run.device)))
    opts, ema = moe.optimizers(both, cfg.lr, cfg.muon, cfg.decay), moe.average(both)
    both.cfg = model.cfg
    restore(run, {"training": both}, ema, opts)
    low, progress = moe.twin(both, run.dtype), Progress(run)
    while run.step < cfg.steps and not run.stop:
        video, g = (
            frame_batch(videos, cfg, run.step).to(run.device, run.dtype),
            generator(cfg, run.step),
        )
        helper.train(
            run.step < 0.9 * cfg.steps and not cfg.decoder_only
        )  # at last the decoder sees the very statistics that will be folded in
        fast, fast_helper = moe.refresh(low, both)
        loss, parts = (
            vae_file.light_loss(fast, teacher, fast_helper, video)
            if light
            else vae_file.vae_loss(fast, video, helper, generator=g)
        )
        moe.check_finite(loss, both, run.folder, video=video)
        loss.backward()
        moe.collect(low, both)
        norm = moe.update(
            opts, both, moe.lr_at(run.step, cfg.steps, cfg.warmup), cfg.clip, ema, cfg.ema
        )
        run.step += 1
        progress(loss=loss.detach(), norm=norm, **parts)
        if run.stop or run.due(cfg.save_every):
            save(run, {"training": both}, ema, opts)
            export_vae(run, both, ema, videos)


@torch.no_grad()
def export_vae(run: Run, both: nn.ModuleList, ema: list[Tensor], videos: list[np.ndarray]) -> None:
    """The averaged weights with the latent statistics folded in, as the one file that everything else loads, and a picture of it."""
    model, helper = moe.averaged(both, ema)
    if isinstance(helper, vae_file.LatentNorm):
        helper.fold(model)
    moe.write_weights(
        run.folder / "vae.safetensors",
        {k: v.bfloat16() for k, v in model.state_dict().items()},
        vae_file.metadata(model) | {"stage": run.cfg.stage, "step": run.step},
    )
    full = model if model.cfg.dim else load_vae(run.cfg, run.device)
    truth = (
        torch.from_numpy(np.stack([v[-33:] for v in videos[:6]])).permute(0, 4, 1, 2, 3).float()
        / 127.5
        - 1
    )
    again = model.eval().decode(full.encode(truth.to(run.device))).clamp(-1, 1).cpu()
    strip = torch.cat((truth[:, :, ::8], again[:, :, ::8]), 2).permute(
        0, 3, 2, 4, 1
    )  # (N, H, 2·5, W, 3): truth | reconstruction
    data.write_png(
        run.folder / "samples" / f"step_{run.step:06d}.png",
        (strip.flatten(2, 3).flatten(0, 1) + 1) / 2,
    )


# ----------------------------------------------------------------------------------------------------- stages: base, moe
def train_base(run: Run) -> None:
    """Flow matching on the new latents, with memory, past and the model's own mistakes."""
    cfg = run.cfg
    root, decoder = dataset(run), load_vae(cfg, run.device)
    clips, held = seen_by(run.view, run, decoder, root), load_clips(run, decoder, root, "tune")
    parts = {
        "high-first": (cfg.boundary, 1),
        "high-third": (cfg.boundary, 1),
        "low": (0, cfg.boundary),
    }  # of the σ axis
    low_sigma, high_sigma = parts.get(cfg.expert, (0, 1)) if cfg.stage == "moe" else (0, 1)
    model = start_model(run)
    opts, ema = moe.optimizers(model, cfg.lr, cfg.muon, cfg.decay), moe.average(model)
    how = error_buffer.ErrorConfig(probability=cfg.p_error, kind=cfg.error_kind)
    errors = error_buffer.ErrorBuffer(dataclasses.replace(how, warmup=min(how.warmup, cfg.warmup)))
    saved = restore(run, {"diffusion_pytorch_model": model}, ema, opts)
    errors.load_state_dict(saved.get("errors", errors.state_dict()))
    low, progress = moe.twin(model, run.dtype, cfg.checkpoint_activations), Progress(run)
    while run.step < cfg.steps and not run.stop:
        cut = draw_cut(clips, run, run.step)
        x0, context = batch(clips, run, cut)
        g = generator(cfg, run.step + 500_000_000)
        sigma = share(
            run, low_sigma + (high_sigma - low_sigma) * dit.sample_sigma(cfg.batch, cfg.shift, g)
        ).to(run.device)
        noise = share(run, torch.randn(cfg.batch, *x0.shape[1:], generator=g)).to(run.device)
        refreshed = moe.refresh(low, model)
        own = own_errors(refreshed, clips, run, cut, g) if turn_of_own(run, cut, g) else None
        context = inject(errors, context, run, g, own)  # imperfect past and memory     Eq. 2, 5
        x_sigma = dit.add_noise(x0, noise, sigma)  # x_σ = (1 − σ)·x0 + σ·ε
        losses, delta = [], torch.empty_like(x0)
        for rows in (slice(i, None, cfg.accum) for i in range(cfg.accum)):
            part = dataclasses.replace(
                context,
                **{f.name: getattr(context, f.name)[rows] for f in dataclasses.fields(context)},
            )
            v_hat = refreshed(
                x_sigma[rows].to(run.dtype), sigma[rows], part.to(dtype=run.dtype)
            ).float()
            loss = (
                (v_hat - dit.velocity(x0[rows], noise[rows])).square().mean()
            )  # v = ε − x0            Eq. 3, 6
            moe.check_finite(loss, model, run.folder, x0=x0, noise=noise, sigma=sigma)
            (loss / cfg.accum).backward()
            moe.collect(low, model)
            losses.append(moe.gathered(loss.detach()[None]).mean())
            delta[rows] = (
                dit.x0_from_v(x_sigma[rows], v_hat.detach(), sigma[rows]) - x0[rows]
            )  # δ = x̂0 − x0      Eq. 1, 4
        errors.push(moe.gathered(delta), g)
        norm = moe.update(
            opts, model, moe.lr_at(run.step, cfg.steps, cfg.warmup), cfg.clip, ema, cfg.ema
        )
        run.step += 1
        progress(loss=sum(losses) / len(losses), norm=norm, bank=len(errors))
        if run.stop or run.due(cfg.save_every):
            save(run, {"diffusion_pytorch_model": model}, ema, opts, errors=errors.state_dict())
        if (
            cfg.sample_every
            and run.world == 1
            and (cfg.stage == "base" or cfg.expert == "dense")
            and run.due(cfg.sample_every)
        ):
            look(run, moe.averaged(model, ema), decoder, held)


def turn_of_own(run: Run, cut: Cut, g: torch.Generator) -> bool:
    """Whether this step's errors are the model's own of the same scene."""
    if not run.cfg.p_own or cut.n_past == 1:
        return False
    return float(torch.rand((), generator=g)) < run.cfg.p_own


def inject(
    errors: error_buffer.ErrorBuffer,
    context: memory.Context,
    run: Run,
    g: torch.Generator,
    own: dict[str, Tensor] | None = None,
) -> memory.Context:
    """x̃ = x + γ_h·δ on the past, m̃ = m + γ_m·δ on the memory; a lone image is real data and stays."""
    if context.past.shape[2] == 1:
        return context
    perturbed = {}
    for name in ("past", "memory"):
        if run.cfg.inject not in ("both", name):
            continue
        x = getattr(context, name)
        if own is None:  # drawn for the whole batch: every rank takes its rows
            zeros = x.new_zeros(run.cfg.batch, *x.shape[1:])
            delta = share(run, errors.perturb(zeros, run.cfg.gamma, g))
        else:
            amplitude = share(run, errors.amplitude(run.cfg.batch, run.cfg.gamma, g)).to(x)
            delta = amplitude.view(-1, 1, 1, 1, 1) * own[name]
        perturbed[name] = x + delta
    return dataclasses.replace(context, **perturbed)


def start_model(run: Run) -> nn.Module:
    """A fresh model of the preset, or the weights of --init, in float32 and sharded over the ranks."""
    torch.manual_seed(run.cfg.seed)
    model = (
        moe.start_from(run.cfg.init, network(run.cfg))[0].train()
        if run.cfg.init
        else moe.build(network(run.cfg))
    )
    return moe.shard(model.to(run.device), run.dtype)


# -------------------------------------------------------------------------------------------------------- stage: distill
def train_distill(run: Run) -> None:
    """Teacher, critic and student start as one base; the student learns on its own rollouts.                  Eq. 8"""
    cfg = run.cfg
    if not cfg.init:
        raise ValueError(
            "--stage distill needs --init <base run>; make one with: python train.py --stage base"
        )
    root, decoder = dataset(run), load_vae(cfg, run.device)
    clips = load_clips(run, decoder, root, "train")
    held = load_clips(run, decoder, root, "tune")
    how = dmd.DMDConfig(
        shift=cfg.shift, guidance=cfg.guidance, segments=cfg.segments, p_mask=cfg.p_i2v
    )

    # three copies of the base: one is asked, one learns what the student makes, one is the student
    real = moe.twin(start_model(run), run.dtype).requires_grad_(False)
    student, fake = start_model(run), start_model(run)
    judge = dmd.Judge(network(cfg).dim).to(run.device)
    betas = (0.0, 0.95)
    opts = moe.optimizers(student, cfg.lr, cfg.muon, cfg.decay, betas)
    opts_fake = moe.optimizers(fake, cfg.lr_critic, cfg.muon, cfg.decay, betas)
    opts_judge = moe.optimizers(judge, cfg.lr_critic, 0.0, cfg.decay, betas)
    ema = moe.average(student)
    models = {"diffusion_pytorch_model": student, "critic": fake}
    every = opts + opts_fake
    if cfg.adversarial:
        models["judge"] = judge
        every = every + opts_judge
    restore(run, models, ema, every)
    low = moe.twin(student, run.dtype, cfg.checkpoint_activations)
    low_fake = moe.twin(fake, run.dtype)
    progress = Progress(run)

    while run.step < cfg.steps and not run.stop:
        g = generator(cfg, run.step + 700_000_000)  # the same on every rank
        own = generator(cfg, run.step + 800_000_000 + 1_000_000 * run.rank)
        cold = run.step < cfg.cold_start
        critics_turn, students_turn = dmd.turns(run.step, cfg.ratio_cold if cold else cfg.ratio)
        student_in = in_dtype(moe.refresh(low, student), run)
        fast_fake = moe.refresh(low_fake, fake)
        fake_in, features = in_dtype(fast_fake, run), features_of(fast_fake, run)
        exit_step = dmd.draw_exit(how, g) if cfg.exit == "random" else None

        # what the student makes, and in the place of what
        with torch.set_grad_enabled(students_turn):
            if cold:  # one segment, true past and memory
                true, context = draw(clips, run, run.step)
                x0 = dmd.few_step(student_in, context, dmd.fresh(true, own), exit_step, how, own)
            else:  # on its own outputs
                new, _ = draw_length(run, run.step)
                clip, latents = scene(clips, run, run.step)
                k = dmd.draw_segments(how, g, new)
                x0, context = dmd.rollout(student_in, clip, k, exit_step, how, own, new)
                true = latents[:, :, context.times[0, -x0.shape[2] :]]

        numbers = {}
        if students_turn:
            loss = dmd.generator_loss(x0, context, in_dtype(real, run), fake_in, how, own)  # Eq. 8
            if cfg.adversarial:
                fooled = dmd.adversarial_loss(x0, context, features, judge, how, own)
                loss = loss + cfg.adversarial * fooled
            moe.check_finite(loss, student, run.folder, x0=x0)
            loss.backward()
            moe.collect(low, student)
            low_fake.zero_grad(set_to_none=True)  # the student's loss went through both
            judge.zero_grad(set_to_none=True)
            rate = moe.lr_at(run.step, cfg.steps, cfg.warmup)
            numbers["norm"] = moe.update(opts, student, rate, cfg.clip, ema, cfg.ema)
        if critics_turn:
            loss = dmd.critic_loss(x0.detach(), context, fake_in, how, own)
            numbers["critic"] = loss.detach()
            if cfg.adversarial:
                caught = dmd.judge_loss(x0, true, context, features, judge, how, own)
                loss = loss + caught
                numbers["judge"] = caught.detach()
            moe.check_finite(loss, fake, run.folder, x0=x0)
            loss.backward()
            moe.collect(low_fake, fake)
            moe.update(opts_fake, fake, 1.0, cfg.clip, [], 0.0)
            if cfg.adversarial:
                moe.update(opts_judge, judge, 1.0, cfg.clip, [], 0.0)
        run.step += 1
        progress(**numbers, latent_std=x0.detach().std())
        if run.stop or run.due(cfg.save_every):
            save(run, models, ema, every)
        if cfg.sample_every and run.world == 1 and run.due(cfg.sample_every):
            look(run, moe.averaged(student, ema), decoder, held, steps=how.steps, method="renoise")


def in_dtype(model: nn.Module, run: Run) -> Callable:
    """As dmd.py calls a network: float32 outside, the run's precision inside."""
    return lambda x, sigma, context: model(
        x.to(run.dtype), sigma, context.to(dtype=run.dtype)
    ).float()


def features_of(model: nn.Module, run: Run) -> Callable:
    """The same network up to its last block: what the judge looks at."""
    return lambda x, sigma, context: model(
        x.to(run.dtype), sigma, context.to(dtype=run.dtype), return_features=True
    )


def scene(clips: Clips, run: Run, step: int) -> tuple[dmd.Clip, Tensor]:
    """Where the rollouts of a step begin and the ways they go; and the true latents along them."""
    episodes = torch.randint(
        len(clips.latents), (run.cfg.batch,), generator=generator(run.cfg, step)
    )
    rows = share(run, episodes)
    latents = clips.latents[rows].float().to(run.device)
    clip = dmd.Clip(
        latents[:, :, :1],
        clips.c2w[rows],
        clips.keyboard[rows].float(),
        clips.mouse[rows],
        clips.text[rows].float(),
        run.cfg.encoding,
        VAES[run.cfg.preset].stride[1],
        run.cfg.sink,
    )
    return clip, latents


# ------------------------------------------------------------------------------------------------------- looking at a model
@torch.no_grad()
def look(
    run: Run, model: nn.Module, vae: nn.Module, held: Clips, steps: int = 8, method: str = "euler"
) -> None:
    """Held-out revisits: reconstruction | model | without memory | with another clip's actions, as a picture, a film and numbers."""
    sure = dataclasses.replace(
        run.cfg, batch=8, new="10", revisit=1.0, p_i2v=0.0, p_memory_off=0.0, p_null=0.0
    )
    x0, context = draw(held, dataclasses.replace(run, cfg=sure), 0)
    wrong = dataclasses.replace(
        context, **{k: getattr(context, k).roll(1, 0) for k in ("rays", "mouse", "keyboard")}
    )
    noise, sigmas, g = (
        torch.randn(x0.shape, generator=generator(sure, 1)),
        dit.sigma_grid(steps, sure.shift),
        generator(sure, 2),
    )
    latents = {"truth": x0} | {
        name: dit.sample(
            model,
            c.to(dtype=run.dtype),
            sigmas,
            noise.to(run.device, run.dtype),
            method,
            generator=g,
        ).float()
        for name, c in {
            "model": context,
            "no memory": context.drop_memory(),
            "wrong actions": wrong,
        }.items()
    }
    frames = {
        name: vae.decode(torch.cat((context.past, z), 2), clamp=True)[
            :, :, -WINDOW.stride * WINDOW.new :
        ]  # the past fills
        .permute(0, 2, 3, 4, 1)
        .cpu()
        / 2
        + 0.5
        for name, z in latents.items()
    }  # the decoder's history; (8, F, H, W, 3)
    scores = {
        name: round(float(data.psnr(x, frames["truth"]).mean()), 2)
        for name, x in frames.items()
        if name != "truth"
    }
    record(run, {"step": run.step} | {"psnr " + name: value for name, value in scores.items()})
    print(
        f"step {run.step}: held-out revisits, dB to the reconstruction: "
        + " · ".join(f"{k} {v}" for k, v in scores.items()),
        flush=True,
    )
    strips = torch.stack([*frames.values()], 1)[:4, :, 7::8]  # (4, kinds, 5, H, W, 3)
    path = run.folder / "samples" / f"step_{run.step:06d}"
    data.write_png(
        path.with_suffix(".png"), strips.flatten(0, 1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    )
    data.write_mp4(path.with_suffix(".mp4"), torch.cat([x[0] for x in frames.values()], 2))


# ------------------------------------------------------------------------------------------------------------------- main
def plot(runs: list[str]) -> None:
    """Loss curves of runs or of their logs, smoothed over ten log lines, as loss.png beside the first log."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    logs = [Path(run) if run.endswith(".jsonl") else Path(run) / "log.jsonl" for run in runs]
    for log in logs:
        if not log.exists():
            raise ValueError(
                f"no {log}; --plot takes folders of runs, such as runs/base-tiny, or their logs"
            )
        said = [
            x
            for x in map(json.loads, log.read_text().splitlines())
            if x.keys() & {"loss", "critic"}
        ]
        points = np.array([(x["step"], x.get("loss", x.get("critic"))) for x in said])
        n, name = min(10, len(points)), log.parent.name if log.stem == "log" else log.stem
        plt.plot(points[n - 1 :, 0], np.convolve(points[:, 1], np.ones(n) / n, "valid"), label=name)
    plt.xlabel("step"), plt.ylabel("loss"), plt.yscale("log"), plt.legend()
    plt.savefig(logs[0].parent / "loss.png", dpi=120)
    print(f"wrote {logs[0].parent / 'loss.png'}")


def main(argv: list[str]) -> int:
    if argv[:1] in (["--plot"], ["--export"]):
        if len(argv) < 2 + (argv[0] == "--export"):
            raise ValueError(
                "--plot takes runs or their logs, --export RUN ... FILE takes runs and the file to write"
            )
        return (
            plot(argv[1:]) if argv[0] == "--plot" else moe.export(*argv[1:-1], file=argv[-1])
        ) or 0
    cfg = parse(argv)
    if cfg.dry_run:
        tokens = {"5b": 880, "14b": 880}.get(cfg.preset, 16) * (
            WINDOW.memory + WINDOW.past + WINDOW.new
        )  # per latent, latents
        print(
            f"{cfg.preset}:",
            moe.memory_table(
                network(cfg),
                cfg.batch // cfg.accum,
                tokens,
                cfg.muon > 0,
                cfg.checkpoint_activations,
            ),
        )
        return 0
    run = setup(cfg)
    if run.rank == 0:
        print(
            f"stage {cfg.stage} · preset {cfg.preset} · {run.device} · {run.dtype} · {run.world} rank(s) · {run.folder}",
            flush=True,
        )
    try:
        {"vae": train_vae, "lightvae": train_vae, "distill": train_distill}.get(
            cfg.stage, train_base
        )(run)
    finally:
        dist.destroy_process_group() if dist.is_initialized() else None
    if run.rank == 0:
        print(
            f"stopped at step {run.step}; the same command resumes it"
            if run.stop
            else f"done: {run.folder} at step {run.step}"
        )
    return 130 if run.stop else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
