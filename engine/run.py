"""Where one training stands: its folder, its ranks, its step, its log.

    runs/NAME/config.json    every flag; a run that was made with others is refused
              log.jsonl      a line every --log-every steps, and held-out scores
              samples/       pictures on the way
              latest         the newest of ckpt/000500/, ckpt/000750/ ... (checkpoint.py)
              lock           held while it is trained: one process at a time

All that a step draws comes from generator(seed, step), never from where a process happens to stand.
So a resumed run draws what it would have drawn, and every rank draws the whole batch and takes its
rows (share): N ranks see the batches of one.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from engine import checkpoint, cli, configs, flags, meeting, optim, weights
from engine.flags import TrainConfig

MAY_CHANGE = {  # on resume: how long and how often, but nothing that changes a step
    "steps",
    "fresh",
    "dry_run",
    "save_every",
    "sample_every",
    "log_every",
    "keep",
    "device",
    "tensorboard",
    "checkpoint_activations",
}
PATIENCE = timedelta(hours=6)  # of the other ranks while the first one draws, encodes and writes
# streams of draws, so far apart that no two of one run share a seed
STREAMS = {
    "windows": 0,
    "noise": 500_000_000,
    "rollout": 700_000_000,
    "rank": 800_000_000,
    "length": 900_000_000,
}
DTYPES = ("float32", "bfloat16")  # of the computing copy
BEFORE = {"new": "10"}  # what runs did that are older than a flag with another default
VIEWS = {"high-first": "first", "high-third": "third", "low": "both", "dense": "both"}
KEPT_WITH_WEIGHTS = (  # what whoever loads the weights must know
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
    preparing: bool = True  # data are drawn and encoded, no step was made yet
    asked: bool = False  # a signal came
    stop: bool = False  # all ranks know of it
    lock: TextIO | None = None  # on the folder, while it is open

    @property
    def view(self) -> str:
        """Whose eyes this model sees through."""
        return VIEWS[self.cfg.expert] if self.cfg.stage == "moe" else "first"

    def due(self, every: int) -> bool:
        """At the end, and every so many steps."""
        return self.step >= self.cfg.steps or bool(every) and self.step % every == 0

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Others may train here now; and if another rank is gone, what to do."""
        if self.lock:
            self.lock.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.world > 1 and meeting.says_rank_is_gone(error):
            raise ConnectionError(
                f"rank {self.rank} stops at step {self.step}: another rank is gone. "
                "The same command goes on from the newest checkpoint"
            ) from error


# ---- the folder --------------------------------------------------------------------------------------------


def run_folder(name: str) -> Path:
    """runs/NAME; a name is one folder there: nothing outside runs/ is ever written or deleted."""
    if not re.fullmatch(r"[\w][\w.+=-]*", name):
        raise ValueError(
            "--run takes a name under runs/: letters, digits and . _ - + = after a letter or digit, "
            f"got {name!r}; as in --run mine-2"
        )
    return cli.beside("runs", name)


def settings_of(folder: Path) -> dict:
    """The config.json of a run."""
    file = folder / "config.json"
    with configs.reading(file):
        settings = json.loads(file.read_text())
        if not {"stage", "preset", "seed"} <= set(settings):
            raise ValueError("these are no settings of train.py")
    return settings


def files_of(cfg: TrainConfig) -> dict[str, Path]:
    """The weights that a line names, and the VAE; what is not there is said before --fresh deletes."""
    if cfg.data and not cli.find(cfg.data).is_dir():
        raise ValueError(
            f"--data {cfg.data} is no folder; make one with: "
            f"python data.py make --preset {cfg.preset} --out {cfg.data}"
        )
    found = {}
    for name in ("init", "student"):
        if getattr(cfg, name):
            found[name] = weights.find(cli.find(getattr(cfg, name)))
    if cfg.stage != "vae":
        found["vae"] = vae_file(cfg)
    return found


def vae_file(cfg: TrainConfig) -> Path:
    """The VAE of --vae, or the shipped one, or the one trained here."""
    places = [
        cli.beside("assets", cfg.preset, "vae.safetensors"),
        cli.beside("runs", f"vae-{cfg.preset}", "vae.safetensors"),
    ]
    if cfg.vae:
        named = cli.find(cfg.vae)
        inside = named / "vae.safetensors"  # of a run of --stage vae
        places = [inside if inside.exists() else named]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise ValueError(
            f"no VAE at {cli.shown(places[0])}; make one with: "
            f"python train.py --stage vae --preset {cfg.preset}"
        )
    return weights.find(path)


def lasting_hashes(cfg: TrainConfig) -> dict[str, str]:
    """Of the files that a run needs each time it goes on: its VAE, and the teacher of a student."""
    lasting = {"vae", "init"} if cfg.stage == "distill" else {"vae"}
    return {name: weights.hash_of(file) for name, file in files_of(cfg).items() if name in lasting}


def refuse_other_files(folder: Path, old: dict, new: dict) -> None:
    """Latents of another VAE, or another teacher, would be learned from without a word."""
    for name, contents in new.items():
        if old.get(name, contents) != contents:
            raise ValueError(
                f"{cli.shown(folder)} was made with another --{name}: the file has changed since. "
                "Put the old one there again, or choose another --run NAME, or --fresh"
            )


def start_over(folder: Path) -> None:
    """Delete a run, and nothing that is not one."""
    if not folder.exists():
        return
    try:
        settings_of(folder)
        ours = True
    except ValueError:
        ours = False
    if folder.is_symlink() or not ours:
        raise ValueError(
            f"--fresh deletes runs of train.py only, and {cli.shown(folder)} has no config.json of one; "
            "remove it yourself, or choose another --run NAME"
        )
    cli.claim(folder).close()  # nor one that is being trained
    shutil.rmtree(folder)


def refuse_other_settings(folder: Path, old: dict, new: dict) -> None:
    """A run goes on with the settings it was made with."""
    rows = []
    for name, value in new.items():
        before = old.get(name, BEFORE.get(name, getattr(TrainConfig, name)))
        if name not in MAY_CHANGE and before != value:
            rows.append(f"  {name:<24}{before!s:<16}{value!s}")
    if rows:
        table = "\n".join([f"  {'key':<24}{'old':<16}new", *rows])
        raise ValueError(
            f"{cli.shown(folder)} was made with another configuration:\n{table}\n"
            "add --fresh to start over, or choose another --run NAME "
            f"(under torchrun --name NAME; --init {cli.shown(folder)} goes on from its weights)"
        )


# ---- the start ---------------------------------------------------------------------------------------------


def setup(cfg: TrainConfig) -> Run:
    """Ranks, device, precision and the run folder; nothing is written before all of it fits."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    flags.check(cfg, world)
    folder = run_folder(cfg.run)
    device = device_of(cfg)
    if world > 1:
        meet(device)
    torch.use_deterministic_algorithms(cfg.deterministic)

    # the folder: emptied if wanted, and refused if it holds another run
    made_of = lasting_hashes(cfg)
    if cfg.fresh and rank == 0:
        start_over(folder)
    if world > 1:
        dist.barrier()
    new = dataclasses.asdict(cfg)
    old = {}
    if (folder / "latest").exists():
        old = settings_of(folder)
        refuse_other_settings(folder, old, new)
        refuse_other_files(folder, old.get("made_of", {}), made_of)
    lock = cli.claim(folder) if rank == 0 else None

    dtype = dtype_of(cfg, old, device)
    if rank == 0:
        (folder / "samples").mkdir(exist_ok=True)
        facts = {"resolved_dtype": dtype, "torch": torch.__version__, "made_of": made_of}
        weights.write_text(folder / "config.json", json.dumps(new | facts, indent=1))
    run = Run(folder, cfg, device, getattr(torch, dtype), rank, world, lock=lock)
    listen(run)
    return run


def device_of(cfg: TrainConfig) -> torch.device:
    cuda = torch.cuda.is_available() if cfg.device == "auto" else cfg.device.startswith("cuda")
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )


def meet(device: torch.device) -> None:
    """All ranks that torchrun started find each other."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)


def dtype_of(cfg: TrainConfig, old: dict, device: torch.device) -> str:
    """The precision of the computing copy. Each rank measures which is faster, rank 0 decides, for good."""
    name = cfg.dtype
    if name == "auto":
        name = old.get("resolved_dtype") or weights.faster_dtype(device)
    choice = torch.tensor(DTYPES.index(name), device=device)
    if dist.is_initialized():
        dist.broadcast(choice, 0)
    return DTYPES[choice]


def listen(run: Run) -> None:
    """The first Ctrl-C or kill asks for a save and a good end, the second ends at once.

    Before the first step there is nothing to save: the first one ends it.
    """

    def ask_to_stop(*_: object) -> None:
        if run.asked or run.preparing:
            raise KeyboardInterrupt
        run.asked = True

    cli.on_stop(ask_to_stop)


# ---- one step ----------------------------------------------------------------------------------------------


def generator(cfg: TrainConfig, step: int, stream: str = "windows") -> torch.Generator:
    """The source of randomness of a step; what is drawn for different ends has streams of its own."""
    return torch.Generator().manual_seed(cfg.seed * 1_000_003 + STREAMS[stream] + step)


def share(run: Run, x: Tensor) -> Tensor:
    """This rank's rows of a batch that every rank draws alike."""
    return x[run.rank :: run.world]


# ---- checkpoints -------------------------------------------------------------------------------------------


def save(
    run: Run, models: dict[str, nn.Module], ema: list[Tensor], opts: list, **state: object
) -> None:
    """A checkpoint of this step; its weights say what they are."""
    about = {name: getattr(run.cfg, name) for name in KEPT_WITH_WEIGHTS}
    lengths = dict.fromkeys(run.cfg.new.split())  # repeated ones were drawn more often
    about |= {"step": run.step, "view": run.view, "new": " ".join(lengths)}
    checkpoint.save(run.folder, about, models, ema, opts, run.cfg.keep, **state)


def restore(run: Run, models: dict[str, nn.Module], ema: list[Tensor], opts: list) -> dict:
    """Continue from the newest checkpoint, if there is one. Returns what save() was given besides."""
    state = checkpoint.restore(run.folder, models, ema, opts)
    run.step = state.get("step", 0)
    if run.rank == 0:
        if run.step:
            where = cli.shown(run.folder)
            print(f"resuming {where} at step {run.step} (--fresh starts over)", flush=True)
        forget_later_lines(run)
    return state


def forget_later_lines(run: Run) -> None:
    """Steps after the last save will be logged again; a line that a kill cut short goes, too."""
    log = run.folder / "log.jsonl"
    if log.exists():
        kept = [line for line in lines_of(log) if line["step"] <= run.step]
        weights.write_text(log, "".join(json.dumps(line) + "\n" for line in kept))


# ---- the log -----------------------------------------------------------------------------------------------


def lines_of(log: Path) -> list[dict]:
    """The lines of a log.jsonl that say their step: a kill may have cut one short."""
    found = []
    for text in log.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            found.append(line)
    return found


class Progress:
    """One line per log step and a log.jsonl; a bar when somebody watches."""

    def __init__(self, run: Run) -> None:
        self.run = run
        run.preparing = False
        self.start = time.perf_counter()
        self.first = run.step
        self.sums: dict[str, list[float]] = {}
        quiet = run.rank > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=run.cfg.steps, initial=run.step, disable=quiet, unit="step")

    def __call__(self, **numbers: float) -> None:
        """The numbers of a step; also where all ranks learn that one of them was asked to stop."""
        run = self.run
        for name, value in numbers.items():
            self.sums.setdefault(name, []).append(float(value))
        self.bar.update(1)

        asked = torch.tensor([run.asked], dtype=torch.uint8, device=run.device)
        run.stop = bool(optim.gathered(asked).any())
        if run.stop or run.due(run.cfg.log_every):
            if run.rank == 0:
                self.write()
            self.sums.clear()

    def write(self) -> None:
        """The means since the last line, and the pace since the start."""
        run = self.run
        line = {"step": run.step}
        line |= {name: round(sum(v) / len(v), 5) for name, v in self.sums.items()}
        line["it_s"] = round((run.step - self.first) / (time.perf_counter() - self.start), 3)
        record(run, line)

        text = "  ".join(f"{name} {value:.5g}" for name, value in line.items())
        if self.bar.disable:
            try:
                print(text, flush=True)
            except BrokenPipeError:  # whoever read along is gone, as after Ctrl-C
                cli.fall_silent()
                run.asked = True
        else:
            self.bar.set_postfix_str(text)


def record(run: Run, line: dict) -> None:
    """One line of log.jsonl, and of TensorBoard if asked for."""
    with open(run.folder / "log.jsonl", "a") as log:
        log.write(json.dumps(line) + "\n")
    if run.cfg.tensorboard:
        events = tensorboard(run.folder)
        for name, value in line.items():
            events.add_scalar(name, value, line["step"])
        events.flush()


@functools.cache
def tensorboard(folder: Path) -> object:
    """What writes its events: one file for as long as the program runs."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
