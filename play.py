"""Walk around inside.

The paper shows films. Walk, turn away, come back: `M` switches the memory off and on, `Tab` shows the true world there.

    python play.py --image assets/start.png                       a page in the browser, or the ssh line to reach it
    python play.py --actions "w:40, w+l:2s, @revisit"             no browser: films and a session folder, exit 0
    actions := item ("," item)*     item := keys ":" count | @revisit | @spin | @square | @idle
    keys := "_" | key ("+" key)*    key := w a s d (move) i j k l (look, 1.5° per frame)     count := int | float "s"

HTTP threads touch `Controls`, `Screen` and a queue of commands; the player thread owns the model. Plain HTTP:
    GET  /frames   endless [u32be n][JSON n bytes][u32be m][JPEG m bytes]; m = 0 is a note, the first one {hello, id, …}; 3 unacked at most
    POST /input    {id, keys, dx, dy, shown} → 204: the keys held now, mouse pixels since the last post, newest frame drawn
    POST /cmd      {id, cmd, …} → {ok, error?}; cmd is one of COMMANDS        GET /state   JSON        GET /   the page
The first viewer plays, others watch. Only this machine is served; another --host demands the token printed in the URL.
A session folder is an episode (dataset/episode.py) with play.mp4, play_memory.mp4, start.png, session.json (--replay) and state.safetensors
(--out FOLDER goes on from there). An undo takes back latents, pose and random state.
Tests: pytest tests/test_play.py      Pictures: python play.py --make-start; python play.py --film assets/figures/memory.gif
"""

import argparse
import difflib
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import webbrowser
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import camera
import realtime
import world
from dataset import episode, wsad
from page import recording
from page.player import Player, options_of
from page.server import FILE_FPS, KEYS, LATENT, SHOW_FPS, bind, legal

HERE = Path(__file__).resolve().parent
PRESETS = {
    "@revisit": "l:60, j:60",
    "@spin": "l:240",
    "@square": ", ".join(["w:16, l:60"] * 4),
    "@idle": "_:160",
}
NO_MODEL = """No model for preset {} yet, so you walk in the game itself (--fake). Three ways to a model:
  python train.py --stage base                                    train tiny on this machine, minutes
  python play.py --preset 5b --weights weights/matrix-game-3      the released one; this command says how to get it
  python play.py --fake                                           none: learn the keys"""


def parse_actions(text: str, fps: int = FILE_FPS) -> tuple[list[str], list[str]]:
    """`w:40, w+l:2s, @revisit` → one chord per frame, and notes on what was rounded. Errors point at the column."""
    chords, notes, column = [], [], 0
    for item in text.split(","):
        keys, _, count = item.partition(":")
        names, problem, at = (
            list(re.finditer(r"[^\s+]+", keys)),
            "",
            column + len(item) - len(item.lstrip()),
        )
        unknown = [
            name
            for name in names
            if name[0] not in (*KEYS, "_") or (name[0] == "_" and len(names) > 1)
        ]
        number = re.fullmatch(r"\s*(?:(\d{1,5})|(\d{1,4}(?:\.\d{1,6})?)\s*s)\s*", count, re.ASCII)
        if item.strip() in PRESETS:
            chords += parse_actions(PRESETS[item.strip()])[0]
        elif unknown and unknown[0][0][0] != "@":
            at, problem = (
                column + unknown[0].start(),
                f"unknown key {unknown[0][0]!r}; use w a s d i j k l _",
            )
        elif ":" not in item or not names or keys.count("+") != len(names) - 1:
            problem = f"expected keys:count, as in w:40 or w+l:2s, or {' '.join(PRESETS)}"
        elif not number:
            at, problem = (
                column + len(keys) + 1,
                f"{count.strip()!r} is no count; use frames (40) or seconds (2s)",
            )
        else:
            asked = int(number[1]) if number[1] else float(number[2]) * fps
            frames = max(LATENT, LATENT * round(asked / LATENT))
            notes += [
                f"{item.strip()}: {asked:g} frames rounded to {frames}, a multiple of {LATENT}"
            ] * (frames != asked)
            chords += ["+".join(name[0] for name in names)] * frames
        if problem:
            raise ValueError(f'--actions "{text}"\n{" " * (11 + at)}^ {problem}')
        column += len(item) + 1
    return chords, notes


def read_actions(
    source: str, fps: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:  # (F, 6), (F, 2), notes
    """An action string, a .txt of one, or an .npz with keyboard and mouse, or with poses (T, 4, 4)."""
    if source.endswith((".txt", ".npz")) and not Path(source).is_file():
        raise ValueError(
            f'--actions {source}: no such file. Give one that exists, or a string like "w:40, w+l:40"'
        )
    if not source.endswith(".npz"):
        chords, notes = parse_actions(
            Path(source).read_text().strip().replace("\n", ",")
            if source.endswith(".txt")
            else source,
            fps,
        )
        return *(part.numpy() for part in camera.actions_from_keys(chords)), notes
    stored = dict(np.load(source, allow_pickle=False))
    if {"keyboard", "mouse"} <= set(stored):
        return stored["keyboard"].astype(np.float32), stored["mouse"].astype(np.float32), []
    poses = [episode.c2w_to_poses(value) for value in stored.values() if value.shape[1:] == (4, 4)]
    if not poses:
        raise ValueError(
            f"{source} holds {', '.join(stored)}; expected keyboard (F, 6) and mouse (F, 2), or camera poses (T, 4, 4)"
        )
    keyboard, mouse, _ = wsad.infer_wsad(poses[0][:, :3], poses[0][:, 4], poses[0][:, 3])
    return keyboard[:-1].astype(np.float32), mouse[:-1], ["the keys were read off the poses"]


def make_start(folder: Path) -> None:
    """Draw the start pictures again, after a change of world.py: every file names its world and its pose."""
    for path in (folder / "start.png", *folder.glob("gallery/*.png")):
        recording.open_start(path, (64, 64), path.name).save(path)


def serve(args: argparse.Namespace) -> None:
    """The page: bind, say where, load the model behind it, wait for Ctrl-C."""
    player = Player(args, args.fps or SHOW_FPS)
    server = bind(player, args.host, args.port)
    port, url = (
        server.server_port,
        f"http://{args.host}:{server.server_port}"
        + (f"/?token={server.token}" if server.token else ""),
    )
    print(
        f"Port {args.port} is taken (another play.py?). Using {port}: {url}"
        if port != args.port
        else f"Open {url}",
        flush=True,
    )
    if not (
        os.environ.get("DISPLAY")
        or os.environ.get("WAYLAND_DISPLAY")
        or sys.platform in ("darwin", "win32")
    ):
        print(
            f"Open from your machine:  ssh -L {port}:127.0.0.1:{port} <this host>  then http://127.0.0.1:{port}",
            flush=True,
        )
    elif not args.no_open:
        webbrowser.open(url)
    player.start()
    args.stop.wait()
    player.join()


# ------------------------------------------------------------------------------------------------------- the command line


FLAGS = {  # name: default (its type is the flag's; a tuple: choices, the first is the default), help
    "image": (
        str(HERE / "assets/start.png"),
        "start picture; any size, centre crop and resize, prints what it did",
    ),
    "weights": (
        "",
        "file, folder, run or hf:ORG/NAME; default: the newest run, else the shipped ones",
    ),
    "actions": (
        "",
        'no browser: "w:40, w+l:2s, @revisit", a .txt or an .npz; writes films and a session, exits 0',
    ),
    "memory": (
        ("camera", "none", "recent", "random"),
        "which old frames it looks back at; the page switches live (M)",
    ),
    "film": (
        "",
        "a .gif: one walk (--actions, else @revisit) as true world, memory on, memory off, side by side",
    ),
    "replay": ("", "a session folder: the same frames again"),
    "out": ("", "session folder (default runs/play-<time>); an existing one goes on"),
    "seed": (42, "of the noise"),
    "steps": (3, "network calls per chunk"),
    "new": (
        0,
        "new latents per chunk, 10, 5 or 2: few act sooner, cost more; 0: in the page the fewest "
        "that this machine sustains, without it 10",
    ),
    "fps": (0, f"of page and films; 0: up to {SHOW_FPS} in the page, {FILE_FPS} without"),
    "pace": (("auto", "live", "turn"), "turn: plan a chunk, press Enter; auto: below 8 fps"),
    "prompt": ("", "what the world is, for models with a text encoder"),
    "preset": (tuple(sorted(realtime.SIZES, key="tiny".__ne__)), "model size"),
    "device": ("auto", "cpu, cuda, cuda:1"),
    "dtype": ("auto", "float32 or bfloat16; auto measures which is faster"),
    "int8": (False, "INT8 attention projections"),
    "vae": (tuple(realtime.DECODERS), "decoder; the light ones are pruned"),
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
    "bench": (False, "5 warm-up and 5 timed chunks"),
    "debug": (False, "tracebacks"),
}


def parse(argv: list[str]) -> argparse.Namespace:
    flags = argparse.ArgumentParser(
        prog="play.py", description="Walk around inside.", allow_abbrev=False
    )
    for name, (default, text) in FLAGS.items():
        kind = (
            {"action": argparse.BooleanOptionalAction}
            if isinstance(default, bool)
            else {"type": type(default)}
        )
        kind = (
            {"choices": default, "default": default[0]}
            if isinstance(default, tuple)
            else {**kind, "default": default}
        )
        flags.add_argument(
            *[f"--{name}"] + ["--mode"] * (name == "view"), help=text, **kind
        )  # --mode: as the release calls it
    args, unknown = flags.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(
            unknown[0].split("=")[0], [f"--{name}" for name in FLAGS], 1
        )
        raise ValueError(
            f"unknown argument {unknown[0]}"
            + (f"; did you mean {near[0]}?" if near else "; see python play.py --help")
        )
    ranks = args.dit_ranks or int(os.environ.get("WORLD_SIZE", 1)) > 1
    if args.view == "third" and (ranks or args.preset in ("5b", "14b")):
        raise ValueError(
            "third-person weights are not public (SkyworkAI/Matrix-Game#69, #76)"
            if not ranks
            else "--view third plays in one process: leave out --dit-ranks and torchrun"
        )
    width, _, height = args.size.partition("x")
    if not re.fullmatch(r"\d{2,4}x\d{2,4}", args.size) or int(width) % 32 or int(height) % 32:
        raise ValueError(f"--size must be WxH in multiples of 32, as in 128x128, got {args.size}")
    args.size, args.stop = (int(height), int(width)), threading.Event()
    args.resume = (
        Path(args.out) if args.out and (Path(args.out) / "state.safetensors").exists() else None
    )
    return args


def find_weights(args: argparse.Namespace) -> None:
    """Fill in what is not given: the newest run of the preset, else the shipped weights, else the game itself."""
    hub = args.weights.removeprefix("hf:")
    if hub != args.weights:
        raise ValueError(
            f"get the files first:  hf download {hub} --local-dir weights/{Path(hub).name}\n"
            f"then: python play.py --preset {args.preset} --weights weights/{Path(hub).name}"
        )
    shipped = [
        file.parent
        for name in ("student", "base")
        if (file := HERE / "assets" / args.preset / f"{name}.safetensors").exists()
    ]
    made = {
        file.parent: json.loads((file.parent / "config.json").read_text())
        for file in Path("runs").glob("*/latest")
    }
    seen = {"first": ("base", "distill"), "third": ("dense",)}[
        args.view
    ]  # stages, or an expert, whose model draws this view alone
    runs = sorted(
        (
            run
            for run, said in made.items()
            if said["preset"] == args.preset and {said["stage"], said.get("expert")} & {*seen}
        ),
        key=lambda run: (run / "latest").stat().st_mtime,
    )
    args.weights = args.weights or str(next(iter([*runs[-1:], *shipped]), ""))
    if not args.weights and not args.fake:
        args.fake = True
        print(NO_MODEL.format(args.preset), flush=True)


def headless(
    args: argparse.Namespace,
    keyboard: np.ndarray,
    mouse: np.ndarray,
    policies: list[str],
    fps: int,
    again: bool = False,  # a replay: its actions were decided when it was played
) -> list[dict]:
    """Walk given actions without a page. The last chunk is filled with standing still; Ctrl-C keeps what is done."""
    player = Player(args, fps)
    player.open()
    t = k = 0
    try:
        while t < len(keyboard) and not args.stop.is_set():
            n = player.session.frames_needed
            player.session.policy = policies[min(k, len(policies) - 1)]

            # the next n rows, filled up with standing still
            rows = []
            for part in (keyboard, mouse):
                rest = np.zeros((max(0, t + n - len(part)), part.shape[1]), np.float32)
                rows.append(np.concatenate([part[t : t + n], rest]))
            keys, turns = legal(*rows, player.poses[-1][3], player.max_pitch)
            if not again:
                keys = player.in_rooms(keys, turns)

            player.chunk(keys, turns, {"keys": [camera.keys_from_action(keyboard[t], mouse[t])]})
            t, k = t + n, k + 1
            if t % 40 < n:
                print(
                    f"frame {player.frame} of {len(keyboard)}   {player.speed():.1f} fps",
                    flush=True,
                )
    finally:
        written = player.save()
    return written


def film(args: argparse.Namespace) -> None:
    """One walk in three panels, the true world, memory on and memory off, as a GIF at one and a half times its speed."""
    (keyboard, mouse, _), panels, pictures, font = (
        read_actions(args.actions or "@revisit", FILE_FPS),
        {},
        [],
        ImageFont.load_default(17),
    )
    if not recording.open_start(Path(args.image), (64, 64), args.image).truth:
        raise ValueError(
            f"--film shows the true world too, and {args.image} names none; take one of assets/"
        )
    with tempfile.TemporaryDirectory() as folder:
        for title, policy in (("memory on", "camera"), ("memory off", "none")):
            args.out = f"{folder}/{policy}"
            headless(args, keyboard, mouse, [policy], FILE_FPS)
            walk = episode.read_episode(Path(args.out))
            panels[title] = np.array(walk.video)
    back = np.abs(walk.player - walk.player[0]).max(1) < 1.5
    panels["true world"] = world.true_frames(
        walk.meta, walk.c2w, *walk.video.shape[1:3], walk.player
    )
    for t in range(0, min(map(len, panels.values())), 2):
        said = (
            "turning away"
            if t <= len(back) // 2
            else "back where we started"
            if back[t]
            else "coming back"
        )
        pictures.append(Image.new("RGB", (592, 252), "white"))
        draw = ImageDraw.Draw(pictures[-1])
        draw.text((296, 237), said, "black", font, "mm")
        for x, title in ((0, "true world"), (200, "memory on"), (400, "memory off")):
            pictures[-1].paste(
                Image.fromarray(panels[title][t]).resize((192, 192), Image.Resampling.NEAREST),
                (x, 30),
            )
            draw.text((x + 96, 15), title, "black", font, "mm")
    palette = Image.fromarray(
        np.concatenate([np.asarray(picture) for picture in pictures[::6]])
    ).quantize(64)  # one for all: no flicker
    first, *rest = (
        picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures
    )
    Path(args.film).parent.mkdir(parents=True, exist_ok=True)
    first.save(
        args.film, save_all=True, append_images=rest, duration=[80] * len(rest) + [2000], loop=0
    )  # ms; the end stays
    print(f"{args.film}: {len(pictures)} pictures, {Path(args.film).stat().st_size / 1e6:.2f} MB")


def replay(args: argparse.Namespace) -> int:
    """The same actions from the same start: identical frames, or the reason why not."""
    file = Path(args.replay) / "session.json" if Path(args.replay).is_dir() else Path(args.replay)
    if not file.is_file():
        raise ValueError(
            f"--replay {args.replay}: no such session; expected a folder written by play.py, or its session.json"
        )
    said = json.loads(file.read_text())
    if said["trail"]:
        raise ValueError(
            f"{file} began in mid-session (resumed, or recording was switched on later): it is a clip and cannot be replayed"
        )
    vars(args).update(
        said["flags"],
        seed=said["seed"],
        prompt=said["prompt"],
        image=str(file.parent / "start.png"),
    )
    keyboard, mouse = (np.array(said[key], np.float32) for key in ("keyboard", "mouse"))
    new, old = (
        headless(
            args, keyboard, mouse, [chunk["policy"] for chunk in said["chunks"]], said["fps"], True
        ),
        said["chunks"],
    )
    same, now = (
        sum(a["sha"] == b["sha"] for a, b in zip(new, old, strict=False)),
        recording.about(args),
    )
    changed = [
        f"{key} was {said[key]}, is {now[key]}"
        for key in ("versions", "weights_sha")
        if said[key] != now[key]
    ]
    print(
        f"{same} of {len(old)} chunks are identical"
        + ("" if same == len(old) else f": {'; '.join(changed) or 'another device?'}")
    )
    return 0 if same == len(old) else 1


def bench(args: argparse.Namespace) -> None:
    """5 chunks to warm up, 5 timed, through the threads and JPEGs a page would see: one markdown row."""
    player, began, seen = Player(args, args.fps or SHOW_FPS), time.monotonic(), []
    with player.screen.seat() as viewer:
        player.controls.post(["w"])
        player.start()
        while player.is_alive() and (not player.begun or player.frame < 10 * SHOW_FPS):
            for header, jpeg in player.screen.take(viewer):
                if jpeg:
                    player.screen.ack(viewer, header["n"])
                    seen.append((time.monotonic(), header["ms"]))
    args.stop.set()
    player.join()
    moments, timed = zip(*seen[len(seen) // 2 :], strict=True)
    gaps = 1000 * np.diff(moments)
    row = {
        "preset": "fake" if args.fake else args.preset,
        "made fps": f"{player.speed():.1f}",
        "shown fps": f"{1000 / gaps.mean():.1f}",
        "p99 gap ms": f"{np.quantile(gaps, 0.99):.1f}",
        "first frame s": f"{seen[0][0] - began:.2f}",
    }
    row |= {
        f"{part} ms": f"{np.median([entry.get(part, 0) for entry in timed]):.1f}"
        for part in ("retrieve", "denoise", "decode", "encode")
    }
    print(
        "\n".join(
            "| " + " | ".join(cells) + " |" for cells in (row, ["---"] * len(row), row.values())
        )
    )


def check(args: argparse.Namespace) -> None:
    """Environment, weights and memory; loads nothing."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    found = (
        f"weights {args.weights} · memory about {realtime.estimate(realtime.resolve(options_of(args))):.2f} GB"
        if not args.fake
        else ""
    )
    print(
        f"python {sys.version.split()[0]} · torch {torch.__version__} · {device}\npreset {args.preset} · {found or 'no weights: the game itself'}"
    )


def main(argv: list[str]) -> int | None:
    args = parse(argv)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # the first one ends in good order, the second at once
        signal.signal(number, lambda *_: os._exit(130) if args.stop.is_set() else args.stop.set())
    if args.make_start or args.replay:
        return make_start(HERE / "assets") if args.make_start else replay(args)
    find_weights(args)
    if args.actions and not args.film:
        keyboard, mouse, notes = read_actions(args.actions, args.fps or FILE_FPS)
        print("\n".join(notes), end="\n" * bool(notes))
        headless(args, keyboard, mouse, [args.memory], args.fps or FILE_FPS)
    else:
        (film if args.film else check if args.check else bench if args.bench else serve)(args)
    return 130 if args.stop.is_set() and (args.actions or args.film) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
