"""Keep video, pose, action and prompt together, recorded in the game or read from real footage.

Paper: §4, the data engine; nothing of it is released. An episode is its quadruplet, T = 4k+1 frames, a folder in ViPE's layout:
    video[t]; c2w[t] = [Ry(yaw) Rx(pitch) | p], x right, y DOWN, z forward, metres; K[t] = (fx, fy, cx, cy) pixels, centres at +.5
    keyboard[t], mouse[t]: what was done between frame t and t+1 (valid[t]: known);  prompt: four levels of words, `text` is the model's

Keys from positions (§4, games that log no keys), heading y, position P on the ground:
    y' = y_t + wrap(y_{t+1} − y_t)/2        mid yaw: immune to the seam at ±180°
    d  = P_{t+1} − P_t ;  f = d·forward(y') ;  r = d·right(y') ;  s = hypot(f, r)
    W, S, A, D = the 45° sector of (f, r) if s > 0.35 v0 ;  valid = the step is as long and as straight as a walk
A label means effective motion: who pushes head-on against a wall cannot be told from one who presses nothing.

Ours: caption levels, filter thresholds, the recorder's clocks, an own umT5 (only its tokeniser is optional). Frames are a memory-mapped
.npy (H.264 leaves 22 dB at 64×64). Depth is not stored: `true_views` renders it for any camera.

    python data.py make --preset tiny               render the default dataset; run again to continue after a stop
    python data.py record --out DIR                 an agent plays the running game, four layers record it
    python data.py ingest --format re10k FILES      read a public dataset
    python data.py explore                          compare the explorers on held-out scenes
    python data.py check DIR                        name every bad clip; exit code 2 if there is one
    python data.py view DIR                         view.mp4: frames, keys, map, depth
Demo: python data.py      Tests: pytest tests/test_data.py
"""

import argparse
import hashlib
import math
import multiprocessing
import os
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
    write_episode,
    write_mp4,
)


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
FIRST_SCENE = {split: world.SPLITS[split].start for split in ("train", "tune", "test")} | {
    "third": 50_000
}  # no scene in two splits
_place = lambda root, split, index: root / split / f"{FIRST_SCENE[split] + index:06d}_{index:06d}"

# --------------------------------------------------------------------------------------------- rendering a dataset (§4.1)


def render_episode(cfg: DataConfig, split: str, index: int) -> Episode:
    """Episode number `index` of a split: a function of its arguments alone, so that any process may make it, in any order."""
    seed = int.from_bytes(
        hashlib.sha256(f"{cfg.seed} {split} {index}".encode()).digest()[:6], "big"
    )
    view, scene = (
        "third" if split == "third" else "first",
        world.scene_of(FIRST_SCENE[split] + index),
    )
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
    c2w, player = (
        run["c2w"].astype(np.float32),
        run["player"].astype(np.float32),
    )  # rounded first: what is stored is what is drawn
    video, K = (
        world.true_frames(meta, c2w, cfg.size, cfg.size, player),
        camera.intrinsics(cfg.size, cfg.size).numpy(),
    )
    words = prompt.caption(
        world.scene_caption(scene), run["keyboard"], run["mouse"], player, scene.kind
    )
    episode = Episode(
        video,
        c2w,
        np.tile(K, (cfg.frames, 1)),
        run["keyboard"],
        run["mouse"],
        np.arange(cfg.frames) < cfg.frames - 1,
        run["contact"],
        player,
        words,
        meta,
    )
    meta["stats"] = (see := picture_stats(video)) | {
        "contact": float(run["contact"].mean()),
        "filters": filters(episode, see),
    }
    return episode


def _job(root: Path, cfg: DataConfig, split: str, index: int) -> None:
    write_episode(_place(root, split, index), render_episode(cfg, split, index))


def _worker() -> None:
    """A pool process: one thread, and it ends when its parent is killed instead of waiting for ever."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_dataset(
    root: Path | str,
    preset: str = "tiny",
    workers: int | None = None,
    cfg: DataConfig | None = None,
) -> Path:
    """Render every missing episode of a preset. Killed at any moment, it continues where it was, to the same bits."""
    root, cfg, failed = Path(root), cfg or PRESETS[preset], []
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # for the children's BLAS: this process has read it long ago
    for _ in range(3):  # what fails, or sits in a pool whose worker died, gets two more tries
        jobs = [
            (split, i)
            for split in FIRST_SCENE
            for i in range(getattr(cfg, split))
            if not (_place(root, split, i) / "_DONE").exists()
        ]
        if not jobs:
            return root
        pool = (
            futures.ThreadPoolExecutor(1)
            if workers <= 1
            else futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _worker)
        )
        with pool:
            running = {pool.submit(_job, root, cfg, *job): job for job in jobs}
            bar = tqdm(
                futures.as_completed(running),
                f"rendering {root}",
                len(jobs),
                unit="episode",
                mininterval=0.1 if os.isatty(2) else 10,
            )
            failed = [(*running[done], done.exception()) for done in bar if done.exception()]
    if failed:
        raise ValueError(
            f"{len(failed)} episodes failed three times, the others are in {root}; the first: {failed[0]}"
        )
    return root


# -------------------------------------------------------------------------------------------------------------- commands


def view(e: Episode, path: Path, size: int = 256) -> None:
    """An mp4 of one episode: the frame with its keys, the map from above, the depth (the last two if the world is known)."""
    scene = world.scene_of(**e.meta["scene"]) if "scene" in e.meta else None
    depth, ground = (
        world.true_views(e.meta, e.c2w, *e.video.shape[1:3], e.player)[1]
        if scene
        else np.ones(e.video.shape[:3]),
        e.player[:, [0, 2]],
    )
    low, span = (
        (0, len(scene.solid)) if scene else (ground.min(0) - 1, np.ptp(ground, axis=0).max() + 2)
    )
    dots = [tuple(dot) for dot in ((ground - low) / span * [1, -1] + [0, 1]) * size]
    big = lambda x: Image.fromarray(x).resize((size, size), Image.Resampling.NEAREST).convert("RGB")
    plan, frames = (
        big(
            np.where(scene.solid.T[::-1], 96, 40).astype(np.uint8)
            if scene
            else np.full((1, 1), 40, np.uint8)
        ),
        [],
    )
    for t, dot in enumerate(dots):
        image, chart, yaw = big(np.asarray(e.video[t])), plan.copy(), math.radians(e.player[t, 4])
        (pen := ImageDraw.Draw(chart)).line(dots[: t + 1] + [dot], fill=(90, 170, 255), width=2)
        for side in (-math.pi / 4, math.pi / 4):  # the borders of 90° of view
            pen.line(
                [dot, (dot[0] + 24 * math.sin(yaw + side), dot[1] - 24 * math.cos(yaw + side))],
                fill=(255, 210, 80),
            )
        words = f"{t:4d}  {camera.keys_from_action(e.keyboard[t], e.mouse[t])}{'  wall' * int(e.contact[t])}"
        ImageDraw.Draw(image).text(
            (6, 5), words, fill=(255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0)
        )
        frames.append(
            np.concatenate(
                [
                    np.asarray(panel)
                    for panel in (image, chart, big((255 * np.exp(-depth[t] / 6)).astype(np.uint8)))
                ],
                1,
            )
        )
    write_mp4(path, np.stack(frames), e.meta["fps"])


def check(root: Path) -> int:
    """One line per clip; returns the number of bad ones."""
    found = [
        p.parent
        for pattern in ("", "*/", "*/*/")
        for name in ("meta.json", "rgb")
        for p in root.glob(pattern + name)
    ]
    bad, clips = 0, sorted({p for p in found if not p.name.startswith(".")}) or [root]
    for path in clips:
        e, wrong = inspect(path, hashes=True)
        wrong, shape = (
            wrong or [f"filter: {reason}" for reason in filters(e)],
            "x".join(map(str, e.video.shape[:3])) if e else "-",
        )
        bad += bool(wrong)
        print(
            f"{str(path.relative_to(root)):30} {shape:>12} {e.meta.get('source', '?') if e else '-':>9}  {'; '.join(wrong) or 'good'}"
        )
    print(f"{len(clips)} clips, {bad} bad" if bad else f"all {len(clips)} clips are good")
    return bad


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="data.py",
        description="Make, record, import, check and look at training clips.",
        allow_abbrev=False,
        epilog=__doc__.split("\n\n")[-1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "command",
        nargs="?",
        choices=("make", "explore", "record", "ingest", "check", "view"),
        help="see below; none: a demo",
    )
    p.add_argument(
        "paths",
        nargs="*",
        type=Path,
        help="check, view: a dataset or an episode; ingest: pose files or scene folders",
    )
    p.add_argument(
        "--preset",
        default="tiny",
        choices=[*PRESETS],
        help="make: frame size and number of episodes (default tiny)",
    )
    p.add_argument(
        "--out",
        type=Path,
        help="where to write (default datasets/PRESET, datasets/recorded, datasets/FORMAT, view.mp4)",
    )
    p.add_argument("--workers", type=int, help="make: processes (default: one per core)")
    p.add_argument("--format", help=f"ingest: whose layout, {', '.join(readers.READERS)}")
    p.add_argument(
        "--size",
        type=int,
        default=64,
        help="ingest: stored height and width in pixels (default 64)",
    )
    p.add_argument(
        "--count",
        type=int,
        help="record: segments (default 2); explore: held-out scenes (default 40)",
    )
    p.add_argument("--seed", type=int, default=7, help="record: number of the scene (default 7)")
    return p


def run(args: argparse.Namespace) -> int | None:
    if args.format and args.format not in readers.READERS:
        raise ValueError(
            f"--format must be one of {', '.join(readers.READERS)}, got {args.format!r}; another set comes in "
            "as ViPE poses (--format vipe) or as a plain folder of frames (README: Your own data)"
        )
    if args.command in ("check", "view", "ingest") and (
        not args.paths or (args.command == "ingest" and not args.format)
    ):
        raise ValueError(
            f"{args.command} needs a path{' and --format' * (args.command == 'ingest')}; see: python data.py --help"
        )
    if args.command == "make":
        print(
            f"{len(list_episodes(make_dataset(args.out or f'datasets/{args.preset}', args.preset, args.workers)))} episodes"
        )
    elif args.command == "explore":
        for name, weights in (
            ("random walk", None),
            ("random waypoints", np.zeros(4)),
            ("learned waypoints", world.POLICY),
        ):
            share = [
                world.explore(
                    world.scene_of(FIRST_SCENE["test"] + i), weights, np.random.default_rng(i)
                )[0]
                for i in range(args.count or 40)
            ]
            print(
                f"{name:18} cover {np.mean(share):.3f} ± {1.96 * np.std(share) / len(share) ** 0.5:.3f} of unseen scenes in 120 steps"
            )
    elif args.command == "record":
        print(
            *recorder.record(args.out or Path("datasets/recorded"), args.seed, args.count or 2),
            sep="\n",
        )
    elif args.command == "ingest":
        for path in tqdm(args.paths):
            out = (args.out or Path("datasets") / args.format) / path.stem
            tqdm.write(
                str(write_episode(out, readers.READERS[args.format](path, (args.size, args.size))))
            )
    elif args.command == "check":
        return 2 if sum(check(root) for root in args.paths) else None
    else:
        view(
            episode := read_episode(list_episodes(args.paths[0])[0]),
            out := args.out or Path("view.mp4"),
        )
        print(f"{out}: {episode.path}, {episode.prompt['simple']['full']}")


def demo() -> None:
    """Rendered walks, the keys read off their positions, and how many a threshold per axis at the start yaw gets right."""
    walks = [render_episode(DataConfig(frames=121), "test", i) for i in range(4)]
    print(f"{len(walks)} walks of 121 frames; the first: {walks[0].prompt['simple']['full']}")
    for noise in (0.0, 0.01, 0.02):
        right = []
        for e in walks:
            position = e.player[:, :3] + noise * np.random.default_rng(0).standard_normal((121, 3))
            f, r = wsad.project(np.diff(position[:, [0, 2]], axis=0), e.player[:-1, 4])
            naive = (np.stack([f, -f, -r, r], 1) > 0.2 * camera.STEP) == e.keyboard[:-1, :4]
            labels = wsad.infer_wsad(position, e.player[:, 4], e.player[:, 3], camera.STEP)
            right.append(
                (
                    wsad.wsad_report(labels, e.keyboard, e.contact)["free"],
                    naive.all(1)[~e.contact[:-1]].mean(),
                )
            )
        print(
            "position noise {:.0f} cm: {:.1%} of the keys right, a naive threshold {:.1%}".format(
                noise * 100, *np.mean(right, 0)
            )
        )


if __name__ == "__main__":
    commands = parser()
    arguments = commands.parse_intermixed_args()
    try:
        commands.exit(run(arguments) if arguments.command else demo())
    except ValueError as wrong:
        commands.exit(2, f"data.py: {wrong}\n")
