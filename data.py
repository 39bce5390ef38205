"""Keep video, pose, action and prompt together, recorded in the game or read from real footage.

Paper: §4, the data engine; nothing of it is released. There, training data are video, pose, action and
prompt. Here those four are an episode, a clip of T = 4k + 1 frames. It is a folder of files, named and
arranged as by ViPE, a program that estimates poses from films (dataset/episode.py):

    video[t]     a frame
    c2w[t]       the camera: [Ry(yaw) Rx(pitch) | position], x right, y DOWN, z forward, metres
    K[t]         its lens: focal lengths and centre (fx, fy, cx, cy) in pixels, whose centres are at +0.5
    keyboard[t], mouse[t]   what was done between frame t and t + 1; known where valid[t]
    prompt       words of four kinds: tag, scene, motion, and full, both; the model reads the scene

The episodes of a dataset do not depend on each other. What is in one follows from its split and
number alone, so any process can draw it, in any order; and it is written whole or not at all. So a
run that was killed goes on where it was, and ends with the same bits. No scene is in two splits:
what a model is tested in, it has never seen.

Depth is not stored: `world.true_views` renders it for any camera. Ours where the paper is silent:
the levels of captions, what is filtered out, and the clocks of the recorder. The network that reads
prompts, umT5, is written anew (dataset/prompt.py).

    python data.py make --preset tiny               render the default dataset; run again to continue
    python data.py record --out DIR                 an agent plays the game, four layers record it
    python data.py ingest --format re10k FILES --out DIR/train      read a public dataset
    python data.py explore                          compare the explorers on held-out scenes
    python data.py check DIR                        name every bad clip; exit code 2 if there is one
    python data.py view DIR                         view.mp4: frames, keys, map, depth
Try it: python data.py      Tests: pytest tests/test_data.py
"""

import argparse
import hashlib
import math
import multiprocessing
import os
import signal
import threading
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import camera
import world
from dataset import prompt, readers, recorder, wsad
from dataset.episode import (
    Episode,
    filters,
    inspect,
    list_episodes,
    picture_stats,
    read_episode,
    refuse_foreign,
    write_episode,
)
from dataset.film import write_mp4
from engine import cli


@dataclass(frozen=True)
class DataConfig:
    size: int = 64  # pixels, square
    frames: int = 241  # 4k+1: 60 latents + 1, 15 s at 16 fps
    train: int = 600  # first-person episodes, each in a scene of its own
    third: int = 100  # third-person episodes, a split of their own
    tune: int = 32  # held-out scenes for choosing settings
    test: int = 64  # held-out scenes for reported numbers
    seed: int = 0  # of behaviour and characters; scenes are numbered by split


PRESETS = {
    "micro": DataConfig(frames=81, train=4, third=1, tune=1, test=1),
    "tiny": DataConfig(),
    "small": DataConfig(size=128),
}
FIRST_SCENE = {  # number of a split's first scene, so far apart that no scene is in two
    "train": world.SPLITS["train"].start,
    "tune": world.SPLITS["tune"].start,
    "test": world.SPLITS["test"].start,
    "third": 50_000,
}
MOST = 10_000  # pixels of a side, workers, clips
TRIES = 3  # rounds: a worker may die, of too little memory for instance, and its episodes with it


# ---- rendering a dataset (§4.1) ----------------------------------------------------------------------------


def place_of(root: Path, split: str, index: int) -> Path:
    return root / split / f"{FIRST_SCENE[split] + index:06d}_{index:06d}"


def seed_of(cfg: DataConfig, split: str, index: int) -> int:
    """Of behaviour and character: a hash, so that neighbours have nothing in common."""
    digest = hashlib.sha256(f"{cfg.seed} {split} {index}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def render_episode(cfg: DataConfig, split: str, index: int) -> Episode:
    """Episode number `index` of a split: a function of its arguments alone."""
    # what happens: no picture is needed to know it
    seed = seed_of(cfg, split, index)
    view = "third" if split == "third" else "first"
    scene = world.scene_of(FIRST_SCENE[split] + index)
    run = world.simulate(scene, seed, cfg.frames, view=view)
    meta = {
        "source": "world",
        "view": view,
        "scene": {"seed": scene.seed, "kind": scene.kind},
        "behaviour": run["behaviour"],
        "seed": seed,
        "character": seed % world.N_CHARACTERS if view == "third" else None,
        "metric": True,
        "action_source": "engine",
        "fps": 16,
    }

    # rounded first: what is stored is what is drawn
    c2w = run["c2w"].astype(np.float32)
    player = run["player"].astype(np.float32)
    K = camera.intrinsics(cfg.size, cfg.size).numpy()
    words = world.scene_caption(scene)
    episode = Episode(
        video=world.true_frames(meta, c2w, cfg.size, cfg.size, player),
        c2w=c2w,
        K=np.tile(K, (cfg.frames, 1)),
        keyboard=run["keyboard"],
        mouse=run["mouse"],
        valid=np.arange(cfg.frames) < cfg.frames - 1,
        contact=run["contact"],
        player=player,
        prompt=prompt.caption(words, run["keyboard"], run["mouse"], player, scene.kind),
        meta=meta,
    )

    # why a clip might be left out is found once, and stored with it
    see = picture_stats(episode.video)
    touched = float(run["contact"].mean())
    meta["stats"] = see | {"contact": touched, "filters": filters(episode, see)}
    return episode


def make_episode(root: Path, cfg: DataConfig, split: str, index: int) -> None:
    write_episode(place_of(root, split, index), render_episode(cfg, split, index))


def start_worker() -> None:
    """A pool process: one thread, and it ends when its parent is killed instead of waiting for ever."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def missing_episodes(root: Path, cfg: DataConfig) -> list[tuple[str, int]]:
    every = [(split, i) for split in FIRST_SCENE for i in range(getattr(cfg, split))]
    return [(split, i) for split, i in every if not (place_of(root, split, i) / "_DONE").exists()]


def make_dataset(
    root: Path | str,
    preset: str = "tiny",
    workers: int | None = None,  # processes; None: one per core, at most 8
    cfg: DataConfig | None = None,
) -> Path:
    """Render every missing episode. Killed at any moment, it continues to the same bits."""
    root = Path(root)
    cfg = cfg or PRESETS[preset]
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    # for the workers, which read it when they start; this process read it long ago
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failed: list = []
    for _ in range(TRIES):
        jobs = missing_episodes(root, cfg)
        if not jobs:
            return root
        with cli.claim(root):
            failed = render_all(root, cfg, jobs, workers)
    if failed:
        others = f"the others are in {root}"
        raise ValueError(
            f"{len(failed)} episodes failed {TRIES} times, {others}; the first: {failed[0]}"
        )
    return root


def render_all(root: Path, cfg: DataConfig, jobs: list, workers: int) -> list[tuple]:
    """Split, number and error of every episode that failed.

    A file that cannot be written, on a full disk for instance, ends it at once: so would all
    others.
    """
    pool = futures.ThreadPoolExecutor(1)
    if workers > 1:
        spawn = multiprocessing.get_context("spawn")
        pool = futures.ProcessPoolExecutor(workers, spawn, start_worker)

    failed = []
    with pool:
        seconds = 0.1 if os.isatty(2) else 10
        title = f"rendering {root}"
        try:
            running = {pool.submit(make_episode, root, cfg, *job): job for job in jobs}
            done = futures.as_completed(running)
            for job in tqdm(done, title, len(jobs), unit="episode", mininterval=seconds):
                error = job.exception()
                if isinstance(error, OSError):
                    raise error
                if error:
                    failed.append((*running[job], error))
        except BaseException:  # Ctrl-C too: what has begun is finished, the rest is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


# ---- a film of an episode ----------------------------------------------------------------------------------


def enlarge(picture: np.ndarray, size: int) -> Image.Image:
    image = Image.fromarray(picture).resize((size, size), Image.Resampling.NEAREST)
    return image.convert("RGB")


def view(e: Episode, path: Path, size: int = 256) -> None:
    """An mp4: each frame with its keys, a map, and the depth, side by side.

    Walls on the map, and depth, are known of our own world alone; else both are of one grey.
    """
    known = "scene" in e.meta
    depth = np.ones(e.video.shape[:3])
    if known:  # rendered again: no clip stores it
        _, depth = world.true_views(e.meta, e.c2w, *e.video.shape[1:3], e.player)
    plan, dots = plan_of(e, size)
    frames = []
    for t in range(len(e.video)):
        # bright is near
        near = (255 * np.exp(-depth[t] / 6)).astype(np.uint8)
        panels = (frame_with_keys(e, t, size), map_with_way(e, t, plan, dots), enlarge(near, size))
        frames.append(np.concatenate([np.asarray(panel) for panel in panels], 1))
    write_mp4(path, np.stack(frames), e.meta["fps"])


def plan_of(e: Episode, size: int) -> tuple[Image.Image, list[tuple]]:
    """The map, z upwards, and where the player is on it in every frame."""
    ground = e.player[:, [0, 2]]
    if "scene" in e.meta:
        solid = world.scene_of(**e.meta["scene"]).solid
        low = 0
        span = len(solid)
        picture = np.where(solid.T[::-1], 96, 40).astype(np.uint8)
    else:
        low = ground.min(0) - 1
        span = np.ptp(ground, axis=0).max() + 2
        picture = np.full((1, 1), 40, np.uint8)

    # from metres to pixels of the map, whose rows count downwards
    share = (ground - low) / span
    dots = (share * [1, -1] + [0, 1]) * size
    return enlarge(picture, size), [tuple(dot) for dot in dots]


def map_with_way(e: Episode, t: int, plan: Image.Image, dots: list[tuple]) -> Image.Image:
    """The way so far, and the borders of 90 degrees of view."""
    chart = plan.copy()
    pen = ImageDraw.Draw(chart)
    x, y = dots[t]
    pen.line([*dots[: t + 1], dots[t]], fill=(90, 170, 255), width=2)
    for side in (-45, 45):
        angle = math.radians(e.player[t, 4]) + math.radians(side)
        end = x + 24 * math.sin(angle), y - 24 * math.cos(angle)
        pen.line([dots[t], end], fill=(255, 210, 80))
    return chart


def frame_with_keys(e: Episode, t: int, size: int) -> Image.Image:
    image = enlarge(np.asarray(e.video[t]), size)
    keys = camera.keys_from_action(e.keyboard[t], e.mouse[t])
    wall = "  wall" if e.contact[t] else ""
    pen = ImageDraw.Draw(image)
    pen.text((6, 5), f"{t:4d}  {keys}{wall}", fill="white", stroke_width=1, stroke_fill="black")
    return image


# ---- commands ----------------------------------------------------------------------------------------------


def clips_below(root: Path) -> list[Path]:
    """Folders that are, or were meant to be, an episode: root, below it, or one further down."""
    found = []
    for depth in ("", "*/", "*/*/"):
        for name in ("meta.json", "rgb"):
            found += [path.parent for path in root.glob(depth + name)]
    return sorted({path for path in found if not path.name.startswith(".")}) or [root]


def check(root: Path) -> int:
    """One line per clip; returns the number of bad ones."""
    if not root.is_dir():
        raise ValueError(f"no folder {root}; make one with: python data.py make")
    bad = 0
    clips = clips_below(root)
    for path in clips:
        # hashes, too: a clip that was changed after writing is no longer the one that was recorded
        e, wrong = inspect(path, hashes=True)
        if not wrong:
            wrong = [f"filter: {reason}" for reason in filters(e)]
        shape = "x".join(map(str, e.video.shape[:3])) if e else "-"
        source = cli.printable(str(e.meta.get("source", "?")), 40) if e else "-"
        bad += bool(wrong)
        name = cli.printable(str(path.relative_to(root)), 80)
        print(f"{name:30} {shape:>12} {source:>9}  {'; '.join(wrong) or 'good'}")
    print(f"{len(clips)} clips, {bad} bad" if bad else f"all {len(clips)} clips are good")
    return bad


def name_of(format: str, path: Path) -> str:
    """Of the episode that a path becomes. ViPE calls most clips `video`: the folder tells them apart."""
    path = Path(os.path.abspath(path))  # for the names of `.` and `..`
    if format == "vipe":
        return f"{path.parent.parent.name}_{path.stem}"
    return path.name if path.is_dir() else path.stem


def places_for(format: str, paths: list[Path], out: Path) -> dict[Path, Path]:
    """Where every path is written to. Nothing that is read from, and nothing foreign, is replaced."""
    places: dict[Path, Path] = {}
    for path in paths:
        place = out / name_of(format, path)
        if place in places:
            raise ValueError(
                f"{places[place]} and {path} would both become {place}: "
                "ingest one of them with another --out"
            )
        if path.resolve().is_relative_to(place.resolve()):
            raise ValueError(
                f"{path} would be replaced by what is read from it: pass another --out"
            )
        refuse_foreign(place)
        places[place] = path
    return places


def ingest(format: str, paths: list[Path], out: Path, size: int) -> None:
    places = places_for(format, paths, out)
    for place, path in tqdm(places.items(), disable=None):  # None: no bar where nobody watches
        episode = readers.read(format, path, (size, size))
        tqdm.write(str(write_episode(place, episode)))


def explore(count: int) -> None:
    """How much of unseen scenes three explorers cover."""
    explorers = {
        "random walk": None,
        "random waypoints": np.zeros(4),
        "learned waypoints": world.POLICY,
    }
    for name, weights in explorers.items():
        share = world.shares_explored(weights, count)
        error = np.std(share, ddof=1) / len(share) ** 0.5 if count > 1 else math.inf
        scenes = "of unseen scenes in 120 steps (± 1.96 standard errors)"
        print(f"{name:18} cover {np.mean(share):.3f} ± {1.96 * error:.3f} {scenes}")


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(
        "data.py",
        "Make, record, import, check and look at training clips.",
        epilog=__doc__.split("\n\n")[-1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = ("make", "explore", "record", "ingest", "check", "view")
    paths = "check, view: a dataset or an episode; ingest: pose files or scene folders"
    out = "where to write (default datasets/PRESET, datasets/recorded, datasets/FORMAT, view.mp4)"
    count = "record: segments (default 2); explore: held-out scenes (default 40)"
    preset = "make: frame size and number of episodes (default tiny)"

    add = p.add_argument
    add("command", nargs="?", choices=commands, help="see below; none: a demo")
    add("paths", nargs="*", type=Path, help=paths)
    add("--preset", default="tiny", choices=[*PRESETS], help=preset)
    add("--out", type=Path, help=out)
    add("--workers", type=int, help="make: processes (default: one per core)")
    add("--format", help=f"ingest: whose layout, {', '.join(readers.READERS)}")
    add("--size", type=int, default=64, help="ingest: stored height and width (default 64)")
    add("--count", type=int, help=count)
    add("--seed", type=int, default=7, help="record: number of the scene (default 7)")
    return p


def check_arguments(args: argparse.Namespace) -> None:
    # --format names the layout of a public set
    if args.format and args.format not in readers.READERS:
        allowed = ", ".join(readers.READERS)
        hint = cli.did_you_mean(args.format, readers.READERS)
        other = (
            "as ViPE poses (--format vipe) or as a plain folder of frames (README: Your own data)"
        )
        raise ValueError(
            f"--format must be one of {allowed}, got {args.format!r}{hint}; another set comes in {other}"
        )

    # what a command cannot do without
    if args.command == "ingest" and not (args.paths and args.format):
        raise ValueError("ingest needs a path and --format; see: python data.py --help")
    if args.command in ("check", "view") and not args.paths:
        raise ValueError(f"{args.command} needs a path; see: python data.py --help")
    if args.command in ("make", "record", "explore") and args.paths:
        raise ValueError(f"{args.command} takes no path; did you mean --out {args.paths[0]}?")
    if args.command == "view" and args.out and args.out.suffix != ".mp4":
        raise ValueError(f"view draws a film: --out must end in .mp4, got {args.out}")

    # numbers
    for name in ("workers", "size", "count"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= MOST:
            raise ValueError(f"--{name} must be 1 to {MOST}, got {value}")
    if args.seed < 0:
        raise ValueError(f"--seed must not be negative, got {args.seed}")


def run(args: argparse.Namespace) -> int | None:
    """One command; the exit status."""
    check_arguments(args)
    if args.command == "make":
        root = args.out or cli.beside("datasets", args.preset)
        make_dataset(root, args.preset, args.workers)
        print(f"{len(list_episodes(root))} episodes in {cli.shown(root)}")
    elif args.command == "explore":
        explore(args.count or 40)
    elif args.command == "record":
        root = args.out or cli.beside("datasets", "recorded")
        print(*recorder.record(root, args.seed, args.count or 2), sep="\n")
    elif args.command == "ingest":
        root = args.out or cli.beside("datasets", args.format)
        ingest(args.format, args.paths, root, args.size)
    elif args.command == "check":
        bad = sum(check(root) for root in args.paths)
        return 2 if bad else None
    elif args.command == "view":
        episode = read_episode(list_episodes(args.paths[0])[0])
        out = args.out or Path("view.mp4")
        view(episode, out)
        print(f"{out}: {episode.path}, {cli.printable(episode.prompt['simple']['full'])}")
    else:
        demo()
    return None


# ---- demo --------------------------------------------------------------------------------------------------


def keys_by_threshold(position: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """What one would try first: W if the step goes forward, A if it goes left, and so on.

    Forward is where the player looked when the step began.
    """
    f, r = wsad.project(np.diff(position[:, [0, 2]], axis=0), yaw[:-1])
    return np.stack([f, -f, -r, r], 1) > 0.2 * camera.STEP


def demo() -> None:
    """Rendered walks, the keys read off their positions, and how many a threshold gets right."""
    walks = [render_episode(DataConfig(frames=121), "test", i) for i in range(4)]
    words = walks[0].prompt["simple"]["full"]
    print(f"{len(walks)} walks of 121 frames; the first: {words}")
    print("keys read off positions:   dataset/wsad.py   a threshold per axis")
    for noise in (0.0, 0.01, 0.02):
        ours = []
        naive = []
        for e in walks:
            jitter = np.random.default_rng(0).standard_normal((121, 3))
            position = e.player[:, :3] + noise * jitter
            yaw = e.player[:, 4]
            labels = wsad.infer_wsad(position, yaw, e.player[:, 3], camera.STEP)
            ours.append(wsad.wsad_report(labels, e.keyboard, e.contact)["free"])
            hit = (keys_by_threshold(position, yaw) == e.keyboard[:-1, :4]).all(1)
            naive.append(hit[~e.contact[:-1]].mean())
        right = f"{np.mean(ours):>16.1%} {np.mean(naive):>22.1%}"
        print(f"  position noise {noise * 100:.0f} cm    {right}")


def main(words: list[str]) -> int | None:
    return run(parser().parse_intermixed_args(words))


if __name__ == "__main__":
    cli.run(main)
