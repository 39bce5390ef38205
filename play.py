"""Walk around inside.

The paper shows films; here one can try what they claim. Walk, turn away, come back: `M` switches
the memory off and on, `Tab` shows the true world at the same place.

    python play.py --image assets/start.png                 a page in the browser, or the ssh line to reach it
    python play.py --actions "w:40, w+l:2s, @revisit"       no browser: films and a session folder, exit 0

The language of --actions is explained in dataset/chords.py. With a page, one thread owns the
model (page/player.py): it decides, makes frames and puts them on a `Screen`. A thread per
connection speaks HTTP (page/server.py): it sends what is on the screen, notes which keys are
held, and queues commands.

    GET  /         the page
    GET  /frames   records without end: [n][n bytes of JSON][m][m bytes of JPEG], n and m in four bytes
                   each, the highest first; a record with m = 0 is a note, the first is {hello, id, …}.
                   No more than 4 pictures are sent that the page has not said it has drawn
    POST /input    {id, keys, dx, dy, shown} → 204: the keys held now, how many pixels the mouse has
                   moved since the last post, the number of the newest picture that was drawn
    POST /cmd      {id, cmd, …} → {ok, error}; cmd is one of commands.COMMANDS
    GET  /state    how things stand, in JSON

The first viewer plays, others watch. Only this machine is served; another --host demands the
token that is printed in the URL. What is played is recorded in a session folder: an episode
(dataset/episode.py) with two films, play.mp4 and play_memory.mp4, and start.png, session.json
(for --replay) and state.safetensors (--out FOLDER goes on from there). If the program is killed,
the folder is completed at the next start (page/folder.py). An undo takes back the latents, the
pose and the state of the random numbers, so that what follows is what would have followed then.

Tests: pytest tests/test_play.py
Pictures: python play.py --make-start; python play.py --film assets/figures/memory.gif
"""

import argparse
import json
import os
import re
import sys
import threading
import time
import webbrowser
from pathlib import Path
from typing import NamedTuple

# threads of torch that wait for work shall sleep: beside another busy process, as a browser is, that
# makes 2.6 times as many frames (results/README.md). Set here, since torch reads it when it is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

import camera
import realtime
from dataset.chords import read_actions
from engine import cli, meeting, parts
from page import folder, panels
from page.controls import FILE_FPS, SHOW_FPS, legal
from page.opening import options_of
from page.player import Player, filled
from page.server import addresses, bind
from page.start import open_start

BENCH = 10 * SHOW_FPS  # frames, ten seconds: the first half warms up, the second is timed
LARGEST = 2048  # pixels of a side of the fake world
NO_MODEL = """No model for preset {} yet: walk in the game itself (python play.py --fake), or:
  python train.py --stage base         train tiny on this machine, minutes
  hf download Skywork/Matrix-Game-3.0 --local-dir weights/matrix-game-3     the released one; then
    python play.py --preset 5b --weights weights/matrix-game-3              on a GPU"""
HUB = """get the files first:  hf download {0} --local-dir weights/{1}
then: python play.py --preset {2} --weights weights/{1}"""
STAGES = {  # the stages of training, or the expert, whose model can draw this view without another
    "first": {"base", "distill"},
    "third": {"dense"},
}


class Script(NamedTuple):
    """Actions that are known before the walk."""

    keyboard: np.ndarray  # (F, 6)
    mouse: np.ndarray  # (F, 2)
    fps: int
    policies: list[str]  # what the memory does in each chunk; the last one goes on to the end
    again: bool = False  # a replay: its actions were decided when it was played


# ---- what a walk can be ------------------------------------------------------------------------------------


def serve(args: argparse.Namespace) -> int:
    """The page: bind, say where, load the model behind it, wait for Ctrl-C."""
    player = Player(args, args.fps or SHOW_FPS)
    server = bind(player, args.host, args.port)
    port = server.server_port
    url, tunnel = addresses(server, args.host)
    taken = f"Port {args.port} is taken (another play.py?). Using {port}: {url}"
    print(taken if args.port not in (0, port) else f"Open {url}", flush=True)

    # where there is no display, the browser is on the machine that the ssh comes from
    windowed = sys.platform in ("darwin", "win32")
    if not (windowed or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        print(f"Open from your machine:  {tunnel}", flush=True)
    elif not args.no_open:
        webbrowser.open(url)

    player.start()
    while not args.stop.wait(0.2):
        if player.failed and player.begun is None:
            break  # nothing can be shown, and the player has said why
    args.stop.set()
    player.join()
    if player.failed:
        return 1 if player.begun else 2
    return 0


def headless(args: argparse.Namespace, script: Script) -> list[dict]:
    """Walk actions that are known, without a page. Ctrl-C keeps what is done. Returns the chunks."""
    player = Player(args, script.fps, can_undo=False)
    player.open()
    length = len(script.keyboard)
    t = 0
    k = 0
    try:
        while t < length and not args.stop.is_set() and not player.unrecorded:
            # chunk k begins at frame t and has n frames; after the end of the script it stands still
            n = player.session.frames_needed
            player.session.policy = script.policies[min(k, len(script.policies) - 1)]
            keyboard = filled(script.keyboard[t : t + n], n)
            mouse = filled(script.mouse[t : t + n], n)

            # neither look too far up, nor walk into known walls; a second time would round again
            if not script.again:
                keyboard, mouse = legal(keyboard, mouse, player.poses[-1][3], player.max_pitch)
                keyboard = player.in_rooms(keyboard, mouse)
            held = camera.keys_from_action(script.keyboard[t], script.mouse[t])
            player.chunk(keyboard, mouse, {"keys": [held]})
            t += n
            k += 1
            if t % 40 < n:
                done = min(player.frame, length)  # the last segment may be longer than the script
                print(f"frame {done} of {length}   {player.speed():.1f} fps", flush=True)
    finally:
        written = player.save()
    if player.unrecorded:
        raise OSError(player.unrecorded)
    return written


def walk(args: argparse.Namespace) -> int:
    """--actions: films and a session folder."""
    fps = args.fps or FILE_FPS
    keyboard, mouse, notes = read_actions(args.actions, fps)
    for note in notes:
        print(note)
    headless(args, Script(keyboard, mouse, fps, [args.memory]))
    return 130 if args.stop.is_set() else 0


def make_film(args: argparse.Namespace) -> int:
    """--film: one walk with memory and without it, beside the true world."""
    if Path(args.film).suffix != ".gif":
        raise ValueError(f"--film must end in .gif, as in walk.gif, got {args.film}")
    keyboard, mouse, _ = read_actions(args.actions or "@revisit", FILE_FPS)
    if not open_start(Path(args.image), (64, 64), args.image).truth:
        raise ValueError(
            f"--film shows the true world too, and {args.image} names none; take one of assets/"
        )

    def walked(out: str, policy: str) -> None:
        args.out = out
        headless(args, Script(keyboard, mouse, FILE_FPS, [policy]))
        if args.stop.is_set():
            raise KeyboardInterrupt  # half a walk is no film

    pictures = panels.three_panels(walked)
    size = panels.save_gif(pictures, Path(args.film))
    print(f"{args.film}: {len(pictures)} pictures, {size / 1e6:.2f} MB")
    return 0


def replay(args: argparse.Namespace) -> int:
    """The same actions from the same start: identical frames, or the reason why not."""
    file = cli.find(args.replay)
    file = file / "session.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(
            f"--replay {args.replay}: no such session; "
            "expected a folder written by play.py, or its session.json"
        )
    recorded = folder.session_of(file.parent, file.name)
    if recorded["trail"]:
        raise ValueError(
            f"{file} began in mid-session (resumed, or recording was switched on later): "
            "it is a clip and cannot be replayed"
        )

    # the file may have been changed: its flags are checked as if a person had typed them
    with folder.judging(file):
        again = parse(flags_of(recorded) + (["--debug"] if args.debug else []))
        refuse_hub(again)
    again.weights = str(cli.find(again.weights)) if again.weights else ""
    again.out = args.out
    again.stop = args.stop
    again.prompt = recorded["prompt"]
    again.image = str(file.parent / "start.png")
    folder.as_many_threads(recorded)
    keyboard, mouse = (np.array(recorded[key], np.float32) for key in ("keyboard", "mouse"))
    policies = [chunk["policy"] for chunk in recorded["chunks"]]
    new = headless(again, Script(keyboard, mouse, recorded["fps"], policies, again=True))
    return compare(recorded, new, folder.about(again))


def flags_of(recorded: dict) -> list[str]:
    """The flags of a session as they could have been typed."""
    typed = [f"--seed={recorded['seed']}"]
    for name, value in recorded["flags"].items():
        if name not in folder.FLAGS:
            raise ValueError(f"session.json names an unknown flag {name!r}")
        if name == "size":
            height, width = value
            value = f"{width}x{height}"
        if isinstance(value, bool):
            typed.append(f"--{name}" if value else f"--no-{name}")
        else:
            typed.append(f"--{name}={value}")
    return typed


def compare(recorded: dict, new: list[dict], now: dict) -> int:
    """How many chunks are the same again; and if not all are, what is not as it was."""
    old = recorded["chunks"]
    same = sum(a["sha"] == b["sha"] for a, b in zip(new, old, strict=False))
    verdict = f"{same} of {len(old)} chunks are identical"
    if same == len(new) < len(old):
        print(f"{verdict}; the replay was stopped there")
        return 130
    if same == len(old):
        print(verdict)
        return 0
    changed = [
        f"{key} was {recorded[key]}, is {now[key]}"
        for key in ("versions", "weights_sha")
        if recorded[key] != now[key]
    ]
    print(f"{verdict}: {'; '.join(changed) or 'another device?'}")
    return 1


def bench(args: argparse.Namespace) -> int:
    """Ten seconds of walking, through the threads and JPEGs that a page would see: one markdown row."""
    player = Player(args, args.fps or SHOW_FPS)
    player.set["pace"] = "live"  # a slow model, too: nobody is here to plan its turns
    began = time.monotonic()
    seen = []
    with player.screen.seat() as viewer:
        player.controls.post(["w"])
        player.start()
        while player.is_alive() and player.frame < BENCH:
            for header, jpeg in player.screen.take(viewer):
                if jpeg:
                    player.screen.ack(viewer, header["n"])
                    if header["i"] > 0:  # made, not given
                        seen.append((time.monotonic(), header["ms"]))
    args.stop.set()
    player.join()
    if player.failed or len(seen) < 4:
        return 1  # the player has said why, or it was stopped before there was anything to time

    # of the second half: when a frame was shown, and how many ms its chunk took, by part
    moments, costs = zip(*seen[len(seen) // 2 :], strict=True)
    gaps = 1000 * np.diff(moments)
    row = {
        "preset": "fake" if args.fake else args.preset,
        "made fps": f"{player.speed():.1f}",
        "shown fps": f"{1000 / gaps.mean():.1f}",
        "p99 gap ms": f"{np.quantile(gaps, 0.99):.1f}",
        "first frame s": f"{seen[0][0] - began:.2f}",
    }
    for part in ("retrieve", "denoise", "decode", "encode"):
        row[f"{part} ms"] = f"{np.median([ms.get(part, 0) for ms in costs]):.1f}"
    for cells in (row, ["---"] * len(row), row.values()):
        print("| " + " | ".join(cells) + " |")
    return 0


def check(args: argparse.Namespace) -> int:
    """Environment, weights and memory; loads nothing."""
    device = f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    print(f"python {sys.version.split()[0]} · torch {torch.__version__} · {device}")
    found = "no weights: the game itself"
    if not args.fake:
        gigabytes = parts.estimate(parts.resolve(options_of(args)))
        found = f"weights {args.weights} · memory about {gigabytes:.2f} GB"
    print(f"preset {args.preset} · {found}")
    return 0


def make_start() -> None:
    """Draw the start pictures again, after a change of world.py: every file names its world and its pose."""
    assets = cli.beside("assets")
    for path in (assets / "start.png", *assets.glob("gallery/*.png")):
        open_start(path, (64, 64), path.name).save(path)


# ---- the command line --------------------------------------------------------------------------------------


PRESETS = ("tiny", *(name for name in parts.SIZES if name != "tiny"))
FLAGS = {  # name: default (its type is the flag's; of a tuple of choices the first), help
    "image": (
        str(cli.beside("assets/start.png")),
        "start picture; any size, centre crop and resize",
    ),
    "weights": ("", "file, folder or run; default: the newest run, else the shipped ones"),
    "actions": ("", 'no browser: "w:40, w+l:2s, @revisit", a .txt or an .npz; films, a session'),
    "memory": (
        ("camera", "none", "recent", "random"),
        "which old frames it looks back at; the page switches live (M)",
    ),
    "film": ("", "a .gif: one walk as true world, memory on, memory off, side by side"),
    "replay": ("", "a session folder: the same frames again"),
    "out": ("", "session folder (default runs/play-<time>); an existing one goes on"),
    "seed": (42, "of the noise"),
    "steps": (3, "network calls per chunk"),
    "guidance": (1.0, "1 for students; 5 for a base model, which then takes two calls per step"),
    "new": (
        0,
        "new latents per chunk, 10, 5 or 2: few act sooner, cost more; 0: in the page the fewest "
        "that this machine sustains, without it 10",
    ),
    "fps": (0, f"of page and films; 0: up to {SHOW_FPS} in the page, {FILE_FPS} without"),
    "pace": (("auto", "live", "turn"), "turn: plan a chunk, press Enter; auto: below 8 fps"),
    "prompt": ("", "what the world is, for models with a text encoder"),
    "preset": (PRESETS, "model size"),
    "device": ("auto", "cpu, cuda, cuda:1"),
    "dtype": ("auto", "float32 or bfloat16; auto measures which is faster"),
    "int8": (False, "INT8 attention projections"),
    "vae": (tuple(parts.DECODERS), "decoder; the light ones are pruned"),
    "compile": (False, "torch.compile: first time ~60-150 s"),
    "size": ("128x128", "of the fake world; models have one size"),
    "dit-ranks": (0, "denoising processes beside the one that decodes"),
    "host": ("127.0.0.1", "another one demands a token"),
    "port": (8000, "the next free one is taken"),
    "no-open": (False, "open no browser"),
    "fake": (False, "the game itself in the page, no model"),
    "view": (("first", "third"), "third: over the shoulder, by trained experts"),
    "make-start": (False, "draw the pictures of assets/ again"),
    "check": (False, "environment, weights, memory; loads nothing"),
    "bench": (False, "ten seconds of walking without a browser; the second half is timed"),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags with their defaults. What can be seen to be impossible is refused here."""
    parser = cli.Parser("play.py", "Walk around inside.")
    for name, (default, text) in FLAGS.items():
        names = [f"--{name}"]
        if name == "view":
            names.append("--mode")  # as the release calls it
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction, "default": default}
        elif isinstance(default, tuple):
            kind = {"choices": default, "default": default[0]}
        else:
            kind = {"type": type(default), "default": default}
        parser.add_argument(*names, help=text, **kind)
    args = parser.parse_args(argv)

    ranks = args.dit_ranks or meeting.started() > 1
    if args.view == "third" and ranks:
        raise ValueError("--view third plays in one process: leave out --dit-ranks and torchrun")
    if args.view == "third" and args.preset in ("5b", "14b"):
        raise ValueError("third-person weights are not public (SkyworkAI/Matrix-Game#69, #76)")
    check_ranges(args)
    args.size = size_of(args.size)
    args.image = str(cli.find(args.image))
    args.stop = threading.Event()
    args.resume = None
    return args


def check_ranges(args: argparse.Namespace) -> None:
    """Numbers that would only fail later, and say less."""
    ranges = {
        "seed": (0, folder.SEEDS),
        "steps": (1, 1000),
        "guidance": (1, 100),
        "fps": (0, 240),
        "port": (0, 65_535),
        "dit_ranks": (0, 1024),
    }
    for name, (lowest, highest) in ranges.items():
        value = getattr(args, name)
        if not lowest <= value <= highest:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be {lowest} to {highest}, got {value}")


def size_of(text: str) -> tuple[int, int]:
    """(H, W) of "WxH"."""
    given = re.fullmatch(r"(\d{2,4})x(\d{2,4})", text)
    sides = [int(side) for side in given.groups()] if given else [0]
    if not all(32 <= side <= LARGEST and side % 32 == 0 for side in sides):
        raise ValueError(
            f"--size must be WxH in multiples of 32, as in 128x128, at most {LARGEST}; got {text}"
        )
    width, height = sides
    return height, width


def refuse_hub(args: argparse.Namespace) -> None:
    """Nothing is downloaded behind anybody's back: the message says how to."""
    hub = args.weights.removeprefix("hf:")
    if hub != args.weights:
        raise ValueError(HUB.format(hub, Path(hub).name, args.preset))


def find_weights(args: argparse.Namespace) -> None:
    """Fill in what is not given: the newest run of the preset, else the shipped weights, else the game."""
    refuse_hub(args)
    found = [*runs_of(args), *shipped(args)]
    if args.weights:
        args.weights = str(cli.find(args.weights))
    elif found:
        args.weights = cli.shown(found[0])
    if not args.weights and not args.fake:
        args.fake = True
        print(NO_MODEL.format(args.preset), flush=True)


def runs_of(args: argparse.Namespace) -> list[Path]:
    """Runs that trained a model of this preset and view, the newest first."""
    found = []
    for latest in cli.beside("runs").glob("*/latest"):
        try:
            config = json.loads((latest.parent / "config.json").read_text())
            trained = {config["stage"], config.get("expert")}
            fits = config["preset"] == args.preset and trained & STAGES[args.view]
        except (OSError, ValueError, TypeError, KeyError):  # no run of train.py, or half of one
            continue
        if fits:
            found.append(latest)
    found.sort(key=lambda latest: latest.stat().st_mtime, reverse=True)
    return [latest.parent for latest in found]


def shipped(args: argparse.Namespace) -> list[Path]:
    """The folder of the weights that came with the code, if it holds a student or its teacher."""
    place = cli.beside("assets", args.preset)
    files = (place / f"{name}.safetensors" for name in ("student", "base"))
    return [place] if any(file.exists() for file in files) else []


def end_in_good_order(stop: threading.Event) -> None:
    """Ctrl-C, kill, a dropped ssh line: the first one ends in good order, the second at once."""

    def handle(*_: object) -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    cli.on_stop(handle)


def main(argv: list[str]) -> int:
    args = parse(argv)
    if not meeting.is_first():
        return realtime.help_out()
    end_in_good_order(args.stop)
    if meeting.started() > 1:
        meeting.when_left_alone(args.stop.set)
    if args.make_start:
        make_start()
        return 0
    if args.replay:
        return replay(args)
    find_weights(args)
    if args.check:
        return check(args)
    if args.film:
        return make_film(args)
    if args.bench:
        return bench(args)

    # what was cut off is completed first; then it can go on
    folder.recover(args.out)
    if args.out and (Path(args.out) / "session.json").exists():
        args.resume = Path(args.out)
    return walk(args) if args.actions else serve(args)


if __name__ == "__main__":
    cli.run(main)
