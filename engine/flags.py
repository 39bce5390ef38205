"""What a training is asked to do: every flag of train.py, its default, and what the paper used.

A default is the field's, unless the stage, then the preset, then both together say otherwise
(CHANGES). Where --help names no value of the paper, the paper states none.
"""

import argparse
import dataclasses
import importlib.util
import json
from dataclasses import dataclass, field

import torch

import context
import dit
from engine import cli, configs

STAGES = ("vae", "lightvae", "base", "distill", "moe")
PRESETS = ("micro", "tiny", "small", "5b", "14b")
EXPERTS = ("high-first", "high-third", "low", "dense")
GROUPS = {  # the headings of --help, and the flag that each begins with
    "stage": "run",
    "data": "data",
    "steps": "optimisation",
    "p_i2v": "memory",
    "gamma": "error buffer",
    "decoder_only": "light VAE",
    "expert": "experts",
    "student": "distillation",
}


def opt(default: object, help: str, paper: str = "", choices: tuple[str, ...] = ()) -> object:
    """A field that becomes a flag."""
    about = {"help": help, "paper": paper, "choices": choices}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class TrainConfig:
    """All flags, as config.json of a run keeps them: --p-i2v is p_i2v here."""

    # the run: what is trained, where it is kept, how often something is written
    stage: str = opt("base", "what to train", choices=STAGES)
    preset: str = opt("tiny", "size of everything", choices=PRESETS)
    run: str = opt("", "its name under runs/: one that exists is resumed (default: STAGE-PRESET)")
    fresh: bool = opt(False, "delete the run of this name first")
    seed: int = opt(0, "of every draw")
    device: str = opt("auto", "where", choices=("auto", "cpu", "cuda"))
    dtype: str = opt("auto", "of the computing copy", choices=("auto", "float32", "bfloat16"))
    save_every: int = opt(250, "steps between checkpoints")
    sample_every: int = opt(500, "steps between samples and held-out scores; 0 = never")
    log_every: int = opt(20, "steps between log lines")
    keep: int = opt(2, "checkpoints kept")
    dry_run: bool = opt(False, "print the memory table and stop")
    deterministic: bool = opt(False, "torch.use_deterministic_algorithms")
    tensorboard: bool = opt(False, "also write TensorBoard events (needs tensorboard)")
    net: str = opt(
        "", "changes to the preset's network, as in 'dim=128 sigma_theta=0': dit.DiTConfig"
    )

    # data: episodes, the VAE that encodes them, the weights to start from
    data: str = opt("", "dataset folder (default: datasets/PRESET, rendered on first use)")
    vae: str = opt("", "VAE weights (default: assets/PRESET/vae.safetensors)")
    init: str = opt("", "weights to start from: a run, a folder or a file")
    overfit: int = opt(0, "train on this many clips only; the loss must fall towards 0")

    # optimisation: the learning rates suit a few million parameters, the paper's 5 billion
    steps: int = opt(900, "optimiser steps", "50,000")
    lr: float = opt(
        1e-3, "AdamW learning rate", "2e-5, §5.1; student 5e-7, 1e-7 after its cold start"
    )
    muon: float = opt(1e-2, "Muon learning rate of the blocks' matrices; 0 = AdamW everywhere")
    warmup: int = opt(50, "steps of linear warm-up; before errors are injected, too, if under 50")
    batch: int = opt(16, "clips per step, all ranks together")
    accum: int = opt(1, "micro-batches per step")
    clip: float = opt(1.0, "gradient norm limit")
    decay: float = opt(0.01, "weight decay")
    ema: float = opt(0.995, "decay of the averaged weights")
    checkpoint_activations: bool = opt(False, "recompute blocks in the backward pass")
    compile: bool = opt(False, "base, moe: torch.compile; minutes first, then faster")
    shift: float = opt(1.5, "of σ: more steps where layout is decided", "5 (lineage)")

    # memory: what a window remembers, and what is left out so that it can be switched off
    p_i2v: float = opt(0.2, "batches without memory, whose past is one image", "0.2, §3.1")
    p_memory_off: float = opt(0.15, "other batches without memory", "part of the 0.2")
    p_null: float = opt(0.1, "samples with null text and actions, for guidance")
    p_later: float = opt(0.5, "samples whose memory is up to 2,000 latents older than it was")
    revisit: float = opt(0.5, "windows that look at a place seen before", "palindromes")
    encoding: str = opt("anchored", "of rays", "frame-wise relative", context.ENCODINGS)
    sink: bool = opt(True, "the last memory is always the oldest latent", "yes")
    new: str = opt(
        "10 5 2", "new latents of a segment; every step draws one, repeated ones more often", "10"
    )

    # the error buffer: how the model's own mistakes come back (error_buffer.py)
    gamma: float = opt(1.0, "scale of injected errors, times U(0.8, 1.2)")
    p_error: float = opt(0.5, "share of samples with injected errors; 0 = off")
    inject: str = opt("both", "where errors go", "both, Eq. 5", ("both", "past", "memory"))
    error_kind: str = opt(
        "real", "the errors, or noise of their size", "real", ("real", "gaussian")
    )
    p_own: float = opt(0.0, "steps whose errors are the model's own of this scene, not stored ones")

    # the light VAE: a decoder for the same latents (lightvae.py)
    decoder_only: bool = opt(False, "vae: leave the encoder of --init as it is, and all latents")
    rate: float = opt(0.75, "share of decoder channels removed", "0.5 and 0.75, Table 2")

    # experts: one for low noise, and one per view for high (moe.py)
    expert: str = opt("high-first", "which one; dense: one model for all", "three", EXPERTS)
    boundary: float = opt(0.9, "σ at which the experts change", "by SNR, value not stated")

    # distillation: whose turn it is, and how far the student walks on its own (dmd.py)
    student: str = opt("", "weights the student goes on from (default: those of --init)")
    cold_start: int = opt(60, "iterations on one segment with true past", "600, §5.1")
    ratio_cold: int = opt(5, "critic updates per student update in the cold start", "5")
    ratio: int = opt(3, "critic updates per student update afterwards", "3")
    segments: int = opt(6, "K: longest self-rollout", "6")
    lr_critic: float = opt(1e-4, "critic learning rate", "1e-7, §5.1")
    adversarial: float = opt(0.0, "weight of a judge of latents (distill) or frames (vae)", "none")
    guidance: float = opt(1.0, "teacher guidance scale; 1 = none")
    exit: str = opt("random", "the student's step with the gradient", choices=("random", "last"))


# ---- what differs from these defaults ----------------------------------------------------------------------


def ema_for(updates: int) -> float:
    """The decay that leaves a hundredth of the starting weights in their average."""
    return round(0.01 ** (1 / updates), 4)


# a convolutional network from nothing: short clips, large steps, weights that do not decay
VAE = dict(muon=1e-2, lr=2e-3, batch=4, steps=4000, sample_every=0, decay=0.0)
# a student begins as the base: small steps, no warm-up, and an average over some twenty updates
STUDENT = dict(
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
)
# for tests: a few steps, all of it in seconds
MICRO = dict(segments=1, batch=4, steps=20, save_every=10, sample_every=0)
# the released size, with the release's geometry and the paper's settings where they are known
BIG = dict(
    segments=6,
    lr=2e-5,
    muon=0.0,
    batch=64,
    steps=50_000,
    encoding="released",
    p_memory_off=0.0,
    shift=5.0,
    new="10",
    checkpoint_activations=True,
    ema=0.999,
)
BIG_STUDENT = dict(
    lr=5e-7,
    lr_critic=1e-7,
    steps=3000,
    cold_start=600,
    clip=10.0,
    guidance=1.0,
    ema=ema_for(600 // 5 + 2400 // 3),
)
# a base that begins from nothing learns layout first, where noise is high, and in long segments;
# short segments and fine detail are for one that goes on (--init)
FIRST = dict(shift=5.0, new="10")
CHANGES = {
    "first base": FIRST,
    "vae": VAE,
    "lightvae": VAE | dict(steps=1500),
    "moe": dict(steps=600),
    "distill": STUDENT,
    "micro": MICRO,
    "5b": BIG,
    "14b": BIG,
    "distill-5b": BIG_STUDENT,
    "distill-14b": BIG_STUDENT,
}


MOST = 1e12
# lowest and highest value; what lies outside would train for hours, and learn nothing or worse
RANGES = {
    "steps batch accum log_every keep segments ratio ratio_cold": (1, MOST),
    "save_every sample_every warmup overfit cold_start": (0, MOST),
    "seed": (0, 1 << 40),  # it is multiplied by a million, and must stay a 64-bit number
    "lr lr_critic muon decay adversarial gamma": (0, MOST),
    "shift clip": (1e-6, MOST),
    "guidance": (1, 100),
    "boundary p_i2v p_memory_off p_null p_later revisit p_error p_own": (0, 1),
    "ema": (0, 0.999999),
}
# which stages a flag saves memory in. Elsewhere it would be taken and change nothing, so whoever has
# too little memory would believe that it does not help
SAVES_MEMORY = {
    "accum": ("base", "moe"),
    "checkpoint_activations": ("base", "moe", "distill"),
}


def changes_of(stage: str, preset: str, init: str = "") -> dict[str, object]:
    """What a stage of a preset changes; the more special one wins."""
    begins = "first base" if stage == "base" and not init else stage
    layers = [CHANGES.get(name, {}) for name in (begins, preset, f"{stage}-{preset}")]
    return layers[0] | layers[1] | layers[2]


# ---- the command line --------------------------------------------------------------------------------------


def parser() -> cli.Parser:
    """One flag per field."""
    found = cli.Parser(
        "train.py",
        "Every stage as a loop you can read.",
        epilog="also: --plot RUN ... | --export RUN ... FILE",
    )
    for f in dataclasses.fields(TrainConfig):
        if f.name in GROUPS:
            group = found.add_argument_group(GROUPS[f.name])
        kind = {"type": type(f.default), "metavar": type(f.default).__name__}
        if f.metadata["choices"]:
            kind |= {"choices": f.metadata["choices"]}
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        names = [flag_of(f.name)]
        if f.name == "run":  # torchrun takes --run for a flag of its own
            names.append("--name")
        group.add_argument(*names, help=help_of(f), default=None, **kind)
    return found


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def help_of(f: dataclasses.Field) -> str:
    """What a flag does, its default, where the default differs, what the paper used."""
    words = [f"default {f.default!r}"]
    words += [f"{what}: {new[f.name]}" for what, new in CHANGES.items() if f.name in new]
    if f.metadata["paper"]:
        words.append(f"paper: {f.metadata['paper']}")
    return f"{f.metadata['help']} ({'; '.join(words)})".replace("%", "%%")


def parse(argv: list[str]) -> TrainConfig:
    """What was typed, else what the stage and the preset change, else the defaults."""
    given = vars(parser().parse_args(argv))
    del given["debug"]
    typed = {name: value for name, value in given.items() if value is not None}

    stage = typed.get("stage", TrainConfig.stage)
    preset = typed.get("preset", TrainConfig.preset)
    expert = typed.get("expert", TrainConfig.expert)
    typed.setdefault("run", f"moe-{expert}-{preset}" if stage == "moe" else f"{stage}-{preset}")

    # what starts from a base starts from the shipped one, if nobody says from which
    shipped = f"assets/{preset}/base.safetensors"
    if stage in ("distill", "moe") and cli.beside(shipped).exists():
        typed.setdefault("init", shipped)
    changes = changes_of(stage, preset, typed.get("init", ""))
    cfg = TrainConfig(**changes | typed)
    check_ranges(cfg)
    for name, stages in SAVES_MEMORY.items():
        if typed.get(name, 0) > getattr(TrainConfig, name) and stage not in stages:
            raise ValueError(
                f"{flag_of(name)} is for --stage {', '.join(stages)}; "
                f"{stage} needs less memory with a smaller --batch"
            )
    return cfg


def check_ranges(cfg: TrainConfig) -> None:
    """Every number within its RANGES, also where it comes from a stage or a preset."""
    for names, (lowest, highest) in RANGES.items():
        for name in names.split():
            value = getattr(cfg, name)
            if not lowest <= value <= highest:  # nan is refused, too
                allowed = f"{lowest:g} or more" if highest == MOST else f"{lowest:g} to {highest:g}"
                raise ValueError(f"{flag_of(name)} must be {allowed}, got {value}")


# ---- what some of the flags mean ---------------------------------------------------------------------------


def check(cfg: TrainConfig, world: int) -> None:
    """Refuse what cannot be trained, before anything is touched."""
    if cfg.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard needs: pip install tensorboard")
    if not 0 < cfg.rate < 1:
        raise ValueError(f"--rate is a share between 0 and 1, got {cfg.rate}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"no device {cfg.device}: this machine has none; try --device cpu")
    if cfg.decoder_only and not (cfg.init and cfg.stage == "vae"):
        raise ValueError(
            "--decoder-only keeps the encoder of a VAE: "
            "--stage vae --decoder-only --init assets/tiny/vae.safetensors"
        )
    if cfg.stage == "distill" and not cfg.init:
        raise ValueError(
            "--stage distill needs --init <base run>; make one with: python train.py --stage base"
        )

    # ranks and micro-batches share a batch evenly, and only whole matrices can be made orthogonal
    share = world * cfg.accum
    if cfg.batch % share:
        raise ValueError(
            f"--batch {cfg.batch} does not divide among {world} ranks x {cfg.accum} micro-batches; "
            f"use a multiple of {share}"
        )
    if world > 1 and (cfg.muon or cfg.stage in ("vae", "lightvae")):
        raise ValueError(
            "several ranks hold shards, and Muon needs whole matrices: add --muon 0 "
            "(the VAE stages run on one rank)"
        )
    if world > 1 and cfg.adversarial:
        raise ValueError("the judge of --adversarial is not sharded: one rank, or --adversarial 0")
    lengths(cfg)
    network(cfg)


def lengths(cfg: TrainConfig) -> list[int]:
    """The segments that a run is trained for: --new "10 5 2"."""
    words = cfg.new.split()
    allowed = [str(n) for n in context.LENGTHS]
    if not words or not set(words) <= set(allowed):
        raise ValueError(
            f"--new takes some of {' '.join(allowed)} in quotes, as in '10 5 2', got {cfg.new!r}"
        )
    return [int(word) for word in words]


def network(cfg: TrainConfig) -> dit.DiTConfig:
    """The preset's network, changed as --net says."""
    preset = dataclasses.asdict(dit.PRESETS[cfg.preset])
    try:
        words = [word.split("=") for word in cfg.net.split()]
        changes = {name: json.loads(value) for name, value in words}
        if not set(changes) <= set(preset):
            raise ValueError("no such field")
    except ValueError as error:
        raise ValueError(
            f"--net takes fields of dit.DiTConfig, as in 'dim=128 sigma_theta=0', got {cfg.net!r}"
        ) from error
    changed = configs.ours(preset | changes)

    # RoPE turns the numbers of every head in pairs (attention.py)
    for width, heads in (("dim", "heads"), ("action_width", "action_heads")):
        if getattr(changed, width) % (2 * getattr(changed, heads)):
            raise ValueError(
                f"--net {cfg.net}: {width} must be a multiple of twice {heads}, "
                f"got {getattr(changed, width)} and {getattr(changed, heads)}"
            )
    return changed
