"""What failure looks like: a healthy training, and the same one with a single deliberate fault.

    python lab/failures.py distill     a student of three steps, and what spoils it
    python lab/failures.py base        a base from nothing, and what spoils it
    python lab/failures.py report      results/failures.md and its figures, from results/failures.json

An arm is one command of train.py, printed before it runs, and a fault is one flag more in it. Other
faults are none of the training: the healthy weights are played wrongly. Every training leaves four
checkpoints. Each is played through the same held-out worlds, with the same noise, and scored where
the truth is known; so a picture of a fault stands beside the healthy picture of the same moment.
What each fault was expected to do is a table of claims (STUDIES), older than the numbers.

A training that was interrupted goes on when the command is given again; --fresh starts all over.
Tests: pytest tests/test_failures.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder
import base64
import json
import re
import shlex
import subprocess
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import imageio.v3 as imageio
import numpy as np
from numpy import ndarray
from torch import Tensor

import world
from dataset.film import psnr
from engine import cli, parts, weights
from engine.run import lines_of, run_folder
from lab import claims, figures, metrics, players, report, stats, summary, worlds
from lab.run import as_png, origin

MOMENTS = 4  # checkpoints of a training that are played
TAIL = 0.25  # the last part of a log, whose mean is compared
LOGGED = ("critic", "latent_std", "loss", "norm")  # columns of log.jsonl that are curves here
PASSED_ON = {"preset": "tiny", "data": "", "init": "", "dtype": "", "shift": ""}  # of train.py
INLINE = re.compile(r"\{\{(\w+) (.+?)\}\}")  # {{distill psnr: healthy - slow critic}}


class Arm(NamedTuple):
    """A training with one flag more, or the weights of another arm played in another way.

    The second kind needs no training, and its curves are the healthy ones: only play shows it.
    """

    flags: str = ""  # of train.py, after those of the healthy arm
    weights: str = ""  # the arm whose weights are played; its own, if empty
    encoding: str = ""  # how cameras are told in play; as in training, if empty
    method: str = "auto"  # the sampler; auto: what the weights were trained for
    guidance: float = 1.0


class Study(NamedTuple):
    """Arms that differ from the first one, the healthy one, in one thing each; and how they are played.

    Small batches and few steps: enough for a fault to show, not for a good model. The average of
    the weights is a short one (--ema), because few updates have to show in it.
    """

    flags: str  # of every training
    steps: int
    arms: dict[str, Arm]  # the healthy one first
    script_of: Callable[[int], worlds.Script]  # the walk through a world
    segments: int  # of ten latents, which the model makes
    scored: int  # frames at the end of them
    calls: int  # of the network, for a segment
    claims: str  # what is expected, as in lab/claims.py


# ---- the arms, and what was expected of them ----------------------------------------------


def patrol(seed: int) -> worlds.Script:
    """Ten seconds of looking round a known room: whatever the student does wrong comes back to it."""
    return worlds.patrol(seed, 4)


def revisit(seed: int) -> worlds.Script:
    """Back to a view that only the memory knows; a young base is lost if it must walk for longer."""
    return worlds.revisit(seed, 0.0)


DISTILL = Study(
    "--stage distill --batch 4 --segments 3 --cold-start 30 --ema 0.8 --log-every 5",
    160,
    {
        "healthy": Arm(),
        "slow critic": Arm("--lr-critic 1e-5"),
        "fast student": Arm("--lr 1.5e-4"),
        "plain teacher": Arm("--guidance 1"),
        "euler": Arm(weights="healthy", method="euler"),
    },
    patrol,
    4,
    40,
    3,
    """
  healthy       | > 0 x     | sharpness won since the start    | sharpness: healthy - start
  slow critic   | >= 1.05 x | the critic's loss / healthy      | last critic: slow critic / healthy
  slow critic   | > 0       | spread in training - healthy     | last latent_std: slow critic - healthy
  slow critic   | > 0       | spread in play - healthy         | spread: slow critic - healthy
  slow critic   | >= 0.5 dB | PSNR lost against healthy        | psnr: healthy - slow critic
  fast student  | >= 1.1 x  | the critic's loss / healthy      | last critic: fast student / healthy
  fast student  | > 0       | spread in training - healthy     | last latent_std: fast student - healthy
  fast student  | >= 1.2 x  | gradient norm / healthy          | last norm: fast student / healthy
  fast student  | >= 1 dB   | PSNR lost against healthy        | psnr: healthy - fast student
  plain teacher | >= 0.05 x | sharpness lost against healthy   | sharpness: healthy - plain teacher
  plain teacher | >= 0.2 dB | PSNR won against healthy         | psnr: plain teacher - healthy
  euler         | > 0       | sharpness lost, the same weights | sharpness: healthy - euler
  euler         | > 0       | spread lost, the same weights    | spread: healthy - euler
  euler         | dB        | PSNR lost, the same weights      | psnr: healthy - euler
""",
)
BASE = Study(
    "--stage base --net 'dim=128 layers=4 ffn=320' --batch 8 --ema 0.98 --log-every 10",
    600,
    {
        "healthy": Arm(),
        "high rate": Arm("--lr 1e-2 --muon 1e-1"),
        "no null branch": Arm("--p-null 0"),
        "healthy, guided": Arm(weights="healthy", guidance=3.0),
        "no null branch, guided": Arm(weights="no null branch", guidance=3.0),
        "other rays": Arm(weights="healthy", encoding="absolute"),
    },
    revisit,
    2,
    worlds.SCORED,
    8,
    """
  high rate      | >= 1.2 x      | loss / healthy                  | last loss: high rate / healthy
  high rate      | >= 1.5 x      | gradient norm / healthy         | last norm: high rate / healthy
  high rate      | >= 1 dB       | PSNR lost against healthy       | psnr: healthy - high rate
  no null branch | 0.95-1.05 x   | loss / healthy                  | last loss: no null branch / healthy
  no null branch | -0.5-0.5 dB   | PSNR lost, not guided           | psnr: healthy - no null branch
  no null branch | dB            | healthy: PSNR lost by guidance  | psnr: healthy - healthy, guided
  no null branch | >= 1 dB       | PSNR lost, both guided | psnr: healthy, guided - no null branch, guided
  other rays     | >= 1 dB       | PSNR lost, the same weights     | psnr: healthy - other rays
""",
)
STUDIES = {"distill": DISTILL, "base": BASE}


# ---- training -----------------------------------------------------------------------------


def command_of(stage: str, arm: str, args: Namespace) -> list[str]:
    """The words after `python` that train an arm."""
    study = STUDIES[stage]
    steps = args.steps or study.steps
    words = ["train.py", *shlex.split(study.flags), "--steps", str(steps)]
    words += ["--run", f"failures-{stage}-{arm.replace(' ', '-')}"]
    often = f"--save-every {steps // MOMENTS} --keep {2 * MOMENTS} --sample-every 0"
    words += often.split()
    for name in PASSED_ON:
        if getattr(args, name):
            words += [f"--{name}", getattr(args, name)]
    words += ["--fresh"] * args.fresh
    return [*words, *study.arms[arm].flags.split()]


def call(words: list[str]) -> None:
    """A program of this project, in a process of its own; it says itself what was wrong."""
    program, *rest = words
    done = subprocess.run([sys.executable, str(cli.beside(program)), *rest], check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise ValueError(f"this ended with status {done.returncode}: python {shlex.join(words)}")


@dataclass
class Trained:
    """What a training leaves: its curves, and a file of weights for each moment."""

    command: str
    log: dict[str, list[list[float]]]  # column -> [step, value] of each line that has it
    files: dict[int, Path]  # step -> the averaged weights

    @classmethod
    def read(cls, words: list[str]) -> "Trained":
        folder = run_folder(words[words.index("--run") + 1])
        lines = lines_of(folder / "log.jsonl")
        log = {}
        for name in LOGGED:
            if points := [[line["step"], line[name]] for line in lines if name in line]:
                log[name] = points
        saved = sorted(folder.glob("ckpt/[0-9]*/ema.safetensors"))
        files = {int(file.parent.name): file for file in saved}
        # a stop saves, too, between two moments
        apart = int(words[words.index("--save-every") + 1])
        files = {step: file for step, file in files.items() if step % apart == 0}
        return cls(f"python {shlex.join(words)}", log, files)

    def last(self) -> dict[str, float]:
        """Every curve's mean over the last quarter of its lines."""
        found = {}
        for name, points in self.log.items():
            tail = points[-max(1, round(TAIL * len(points))) :]
            found[f"last {name}"] = float(np.mean([value for _, value in tail]))
        return found


# ---- playing ------------------------------------------------------------------------------


class Walk(NamedTuple):
    """A way through a held-out world: what is seen on it, and that as latents."""

    script: worlds.Script
    frames: ndarray  # (F, H, W, 3) true, as far as the model walks
    latents: Tensor  # (1, C, T, h, w) of them


def player(options: parts.Options, file: Path, arm: Arm, coders: dict) -> players.Player:
    """The weights of a file as this arm plays them; encoder and decoder are the same for all."""
    how = replace(options, weights=str(file), method=arm.method, guidance=arm.guidance)
    nets, meta = parts.load_parts(how, "dit")
    if arm.encoding:
        meta = meta | {"encoding": arm.encoding}
    return players.Player("failures", how, meta, nets | coders)


def walk_of(p: players.Player, study: Study, seed: int) -> Walk:
    script = study.script_of(seed)
    frames = worlds.draw(script, slice(worlds.KNOWN + 40 * study.segments)).frames
    return Walk(script, frames, players.opened(p, script, frames).latents)


def score(p: players.Player, study: Study, walk: Walk) -> tuple[dict[str, float], ndarray]:
    """PSNR and sharpness of the last frames, the spread of the last latents as a share of the true
    ones', and the very last picture."""
    made = players.rollout(p, walk.script, walk.latents, study.segments)[0]
    film = players.decode(p, made, study.scored)[0]
    true = walk.frames[-study.scored :]
    values = {
        "psnr": float(psnr(film.numpy(), true).mean()),
        "sharpness": float(metrics.sharpness(film, true).mean()),
        "spread": float(made[:, :, -10:].float().std() / walk.latents[:, :, -10:].float().std()),
    }
    return values, players.picture(film[-1])


def shows_most(walks: list[Walk]) -> int:
    """The world whose walk ends before the richest view: on a bare wall no fault is seen."""
    last = np.stack([walk.frames[-1] for walk in walks])
    return int(metrics.energy(last).argmax())


@dataclass
class Played:
    """How the weights of an arm do, moment by moment."""

    scores: dict[str, list[list[float]]] = field(default_factory=dict)  # column -> step -> world
    pictures: list[ndarray] = field(default_factory=list)  # of the world that shows most

    def add(self, p: players.Player, study: Study, walks: list[Walk]) -> None:
        """One moment more, in every world."""
        rows = [score(p, study, walk) for walk in walks]
        for name in rows[0][0]:
            self.scores.setdefault(name, []).append([values[name] for values, _ in rows])
        self.pictures.append(rows[shows_most(walks)][1])


# ---- a study ------------------------------------------------------------------------------


def train_all(stage: str, args: Namespace) -> dict[str, Trained]:
    """Every arm that has weights of its own, one after the other."""
    trained = {}
    for name, arm in STUDIES[stage].arms.items():
        if not arm.weights:
            words = command_of(stage, name, args)
            print("python", shlex.join(words), flush=True)
            call(words)
            trained[name] = Trained.read(words)
    return trained


def start_of(stage: str, args: Namespace) -> list[Path]:
    """The weights that all arms begin with: one file, or none for a base from nothing."""
    shipped = "" if stage == "base" else f"assets/{args.preset}/base.safetensors"
    given = args.init or shipped
    return [weights.find(cli.find(given))] if given else []


def measure(stage: str, args: Namespace, command: str) -> dict:
    """Train every arm that has weights of its own, play all of them, judge what was expected."""
    study = STUDIES[stage]
    seeds = list(world.SPLITS["tune"])[: args.worlds]
    trained = train_all(stage, args)
    start = start_of(stage, args)
    coder = cli.beside("assets", args.preset, "vae.safetensors")
    result = origin(command, "tune", seeds, [*start, coder])

    # the walks; and what the start makes of them when it is played as a student
    # (a base from nothing has no start; its walks are encoded by the VAE beside its first checkpoint)
    every = trained["healthy"].files
    known = [*start, *every.values()][0]
    dtype = args.dtype or "auto"
    options = parts.resolve(parts.Options(args.preset, str(known), steps=study.calls, dtype=dtype))
    coders, _ = parts.load_parts(options, "encoder", "decoder")
    first = player(options, known, Arm(method="renoise"), coders)
    walks = [walk_of(first, study, seed) for seed in seeds]
    raw: claims.Raw = {}
    if start:
        played = Played()
        played.add(first, study, walks)
        raw |= {f"start/{name}": values[-1] for name, values in played.scores.items()}

    # every arm at every moment; an arm without a training has no curves of its own
    facts = {"steps": list(every), "arms": {}}
    pictures = {"truth": walks[shows_most(walks)].frames[-1]}
    for name, arm in study.arms.items():
        made = trained[arm.weights or name]
        played = Played()
        for file in made.files.values():
            played.add(player(options, file, arm, coders), study, walks)
        raw |= {f"{name}/{column}": values[-1] for column, values in played.scores.items()}
        fact = {"scores": played.scores, "played": arm._asdict()}
        if not arm.weights:
            raw |= {f"{name}/{column}": [value] for column, value in made.last().items()}
            fact |= {"command": made.command, "log": made.log}
        facts["arms"][name] = fact
        pictures[name] = np.concatenate(played.pictures, 1)

    notes = [f"{study.calls} calls of the network for a segment, {options.dtype}"]
    judged = [claims.judge(claim, raw, {}) for claim in claims.table(study.claims)]
    coded = {name: as_png(picture) for name, picture in pictures.items()}
    return result | {
        "notes": notes,
        "claims": judged,
        "raw": raw,
        "facts": facts,
        "pictures": coded,
    }


# ---- the page -----------------------------------------------------------------------------


def fill(text: str, found: dict[str, dict]) -> str:
    """The page with its numbers: {{stage column: row - other}} is the mean over worlds."""

    def number(mark: re.Match) -> str:
        stage, measured = mark.groups()
        if stage not in found:
            return "(not measured)"
        asked = claims.Claim(mark[0], "", None, False, "", "", measured)
        values = claims.values(asked, found[stage]["raw"])
        return summary.digits(sum(values) / len(values))

    return INLINE.sub(number, text)


def tables_of(found: dict[str, dict]) -> dict[str, str]:
    """For every study: what was expected, what was measured, and how to make it again."""
    tables = {}
    for stage in STUDIES:
        names = (stage, f"{stage}:raw", f"{stage}:commands")
        if stage not in found:
            tables |= dict.fromkeys(names, "not measured")
            continue
        result = found[stage]
        arms = result["facts"]["arms"].values()
        commands = [arm["command"] for arm in arms if "command" in arm]
        contents = (
            report.claim_table(result),
            report.raw_table(result),
            "\n".join(["```", *commands, "```"]),
        )
        tables |= dict(zip(names, contents, strict=True))
    return tables


def write_page(out: Path, pictures: Path) -> None:
    """failures.md and its figures; without matplotlib only the page."""
    path = out / "failures.json"
    found = report.stored(path) if path.exists() else {}
    text = (cli.beside("results", "notes", "failures") / "page.md").read_text()
    page = summary.page([fill(text, found)], tables_of(found))
    weights.write_text(out / "failures.md", page)
    pictures.mkdir(parents=True, exist_ok=True)
    for stage, result in found.items():
        strips = {
            name: imageio.imread(base64.b64decode(png)) for name, png in result["pictures"].items()
        }
        try:
            figure = figures.beside_healthy(result["facts"], strips)
        except ModuleNotFoundError:
            print("figures need: pip install matplotlib (the page is written)")
            return
        figures.save(figure, pictures / f"failures-{stage}.png")


def parse(argv: list[str]) -> Namespace:
    parser = cli.Parser("lab/failures.py", __doc__.splitlines()[0])
    parser.add_argument("command", choices=[*STUDIES, "report"])
    parser.add_argument("--worlds", type=int, default=4, help="held-out worlds that are played")
    parser.add_argument("--steps", type=int, default=0, help="of a training, a multiple of 4")
    parser.add_argument("--fresh", action="store_true", help="train anew what is already trained")
    for name, default in PASSED_ON.items():
        parser.add_argument(f"--{name}", default=default, help="as train.py has it")
    parser.add_argument("--out", default=str(cli.beside("results")), help="folder of the json")
    parser.add_argument("--figures", default=str(cli.beside("assets", "figures")), help="folder")
    args = parser.parse_args(argv)
    if args.steps % MOMENTS or args.steps < 0:
        raise ValueError(f"--steps must be a multiple of {MOMENTS}, got {args.steps}")
    if not 1 <= args.worlds <= len(world.SPLITS["tune"]):
        raise ValueError(f"--worlds must be 1 to {len(world.SPLITS['tune'])}, got {args.worlds}")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    out = Path(args.out)
    path = out / "failures.json"
    out.mkdir(parents=True, exist_ok=True)
    stored = report.stored(path) if path.exists() else {}  # or a line, before anything is trained
    if args.command != "report":
        stats.scipy_stats()  # likewise: or a line that says what to install
        result = measure(args.command, args, f"python lab/failures.py {shlex.join(argv)}")
        weights.write_text(path, json.dumps(stored | {args.command: result}))
        print(report.claim_table(result))
    write_page(out, Path(args.figures))


if __name__ == "__main__":
    cli.run(main)
