"""Where one training stands: flags, folder, ranks, log."""

import argparse
import dataclasses
import difflib
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import context
import dit
from dit import DiTConfig
from engine import checkpoint, optim, weights


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
        "anchored", "ray encoding", "memory", "frame-wise relative", context.ENCODINGS
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
VIEWS = {
    "high-first": "first",
    "high-third": "third",
    "low": "both",
    "dense": "both",
}  # whose eyes an expert has seen through


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


def parse(argv: list[str]) -> TrainConfig:
    """Flags from the fields of TrainConfig; the stage and the preset choose what differs from its defaults (CHANGES)."""
    parser = argparse.ArgumentParser(
        description="Every stage as a loop you can read.",
        epilog="also: --plot RUN ... | --export RUN ... FILE",
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


def lengths(cfg: TrainConfig) -> list[int]:
    """The segments that a run is trained for: --new "10 5 2"."""
    words = cfg.new.split()
    allowed = [str(n) for n in context.LENGTHS]
    if not words or not set(words) <= set(allowed):
        raise ValueError(
            f"--new takes some of {' '.join(allowed)} in quotes, as in '10 5 2', got {cfg.new!r}"
        )
    return [int(word) for word in words]


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
    try:
        ours = {"stage", "preset", "seed"} <= set(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        ours = False
    if folder.is_symlink() or not ours:
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
        old.get("resolved_dtype") or str(weights.faster_dtype(device)).removeprefix("torch.")
        if cfg.dtype == "auto"
        else cfg.dtype
    ]
    dist.broadcast_object_list(
        names
    ) if world > 1 else None  # every rank has measured, rank 0 decides
    if rank == 0:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        weights.write_text(
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


def network(cfg: TrainConfig) -> DiTConfig:  # the preset's, changed as --net says
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
    checkpoint.save(run.folder, said, models, ema, opts, run.cfg.keep, **state)


def restore(run: Run, models: dict[str, nn.Module], ema: list[Tensor], opts: list) -> dict:
    state = checkpoint.restore(run.folder, models, ema, opts)
    run.step = state.get("step", 0)
    if run.step and run.rank == 0:
        print(f"resuming {run.folder} at step {run.step} (--fresh starts over)", flush=True)
    if (
        run.rank == 0 and (run.folder / "log.jsonl").exists()
    ):  # steps after the last save will be logged again
        lines = (run.folder / "log.jsonl").read_text().splitlines(keepends=True)
        weights.write_text(
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
            optim.gathered(torch.tensor([run.asked], dtype=torch.uint8, device=run.device)).any()
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
