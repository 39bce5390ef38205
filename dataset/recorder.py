"""A running game as episodes: four layers, joined by queues only."""

import math
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

import camera
import world
from dataset import episode, prompt, wsad
from dataset.episode import Episode


def game_layer(
    game: world.World, keys: queue.Queue, states: queue.Queue, screen: queue.Queue
) -> None:
    """Layer 1, the program being played: pictures at 16 Hz, states at 60 Hz of its own clock. It knows of no recording."""
    while True:
        try:
            action = keys.get(timeout=0.5)
        except queue.Empty:
            action = (0,) * 6, (0.0, 0.0)  # nobody plays: the game goes on
        if action is None:
            return
        before, record = np.array(game.pose), game.tick(*action)
        tick, step = record["time"], np.array(game.pose) - before
        screen.put(("frame", tick / 16, record["frame"]))
        for k in range(math.ceil(tick * 60 / 16), math.ceil((tick + 1) * 60 / 16)):
            screen.put(("state", k / 60, before + (k * 16 / 60 - tick) * step))
        states.put(game.pose)


def agent_layer(
    mesh: world.NavMesh, rng: np.random.Generator, states: queue.Queue, keys: queue.Queue
) -> None:
    """Layer 2, the player: sees a state, sends keys; walks from one random place of the navmesh to the next."""
    way = []
    while (pose := states.get()) is not None:
        here = pose[0], pose[2]
        way = way[1:] if way and math.dist(way[0], here) < 0.3 else way
        way = way or mesh.path(here, tuple((rng.choice(mesh.cells) + 0.5) * mesh.cell))
        error = wsad.wrap(
            math.degrees(math.atan2(way[0][0] - here[0], way[0][1] - here[1])) - pose[4]
        )
        keys.put(
            ((int(abs(error) < 12), 0, 0, 0, 0, 0), (0.0, max(-3, min(3, round(error / 1.5))) / 10))
        )


def capture_layer(
    screen: queue.Queue,
    segments: queue.Queue,
    closed: list[dict],
    count: int,
    frames: int,
    jitter: float = 0.008,
) -> None:
    """Layer 3, the capture program: stamps what arrives with its own late clock, cuts segments, ends one early when a layer crashes."""
    segment, rng = {"frame": [], "state": [], "crash": []}, np.random.default_rng(len(closed))
    while len(closed) < count:
        kind, at, value = screen.get()
        segment[kind].append(
            (at + 3.217 + rng.uniform(-jitter, jitter), at, value)
        )  # two clocks never agree
        if kind == "crash" or len(segment["frame"]) > frames:
            if len(segment["frame"]) > 8:
                closed.append(segment)
                segments.put(segment)
            segment = {"frame": [], "state": [], "crash": []}


def output_layer(
    segments: queue.Queue, root: Path, scene: world.Scene, written: list[Path]
) -> None:
    """Layer 4, the dataset: frames get the pose of their time, keys come from positions alone, episodes are written whole."""
    while (segment := segments.get()) is not None:
        written.append(
            episode.write_episode(
                Path(root) / f"{scene.seed:06d}_{len(written):06d}", align(segment, scene)
            )
        )


def align(segment: dict[str, list], scene: world.Scene) -> Episode:
    """Heartbeats tell how far the clocks are apart; frames come evenly, so a line through their stamps removes the jitter."""
    stamps, n = [stamp for stamp, _, _ in segment["frame"]], np.arange(len(segment["frame"]))
    at = np.polyval(np.polyfit(n, stamps, 1), n) - np.median(
        [stamp - time for stamp, time, _ in segment["state"]]
    )
    times, poses = (
        np.array([time for _, time, _ in segment["state"]]),
        np.array([pose for *_, pose in segment["state"]]),
    )
    T = (int(np.sum(at <= times[-1])) - 1) // 4 * 4 + 1
    player = np.stack([np.interp(at[:T], times, column) for column in poses.T], 1).astype(
        np.float32
    )
    labels, video = (
        wsad.infer_wsad(player[:, :3], player[:, 4], player[:, 3], camera.STEP),
        np.stack([picture for *_, picture in segment["frame"][:T]]),
    )
    words, where = (
        prompt.caption(world.scene_caption(scene), *labels[:2], player, scene.kind),
        {"seed": scene.seed, "kind": scene.kind},
    )
    meta = {
        "source": "recorder",
        "view": "first",
        "scene": where,
        "metric": True,
        "action_source": "inferred",
        "fps": 16,
    }
    return Episode(
        video,
        episode.poses_to_c2w(player).astype(np.float32),
        np.tile(camera.intrinsics(*video.shape[1:3]).numpy(), (T, 1)),
        *labels,
        np.zeros(T, bool),
        player,
        words,
        meta,
    )


def supervise(screen: queue.Queue, layer: Callable[..., None], *args: object) -> threading.Thread:
    """Run a layer in a thread of its own; when it crashes, tell the capture layer and start it again."""

    def keep_running() -> None:
        while True:
            try:
                return layer(*args)
            except Exception as error:  # whatever happens to a layer, by design
                screen.put(("crash", 0.0, f"{layer.__name__}: {error}"))

    (thread := threading.Thread(target=keep_running, daemon=True)).start()
    return thread


def record(root: Path, seed: int, count: int = 2, frames: int = 241) -> list[Path]:
    """Let the agent play the game and record `count` segments of it."""
    scene, written, (keys, states, screen, segments) = (
        world.scene_of(seed),
        [],
        (queue.Queue() for _ in range(4)),
    )
    game = world.World(scene, size=64)
    states.put(game.pose)
    threads = [
        supervise(screen, *layer)
        for layer in (
            (game_layer, game, keys, states, screen),
            (agent_layer, world.NavMesh(scene), np.random.default_rng(seed), states, keys),
            (output_layer, segments, root, scene, written),
            (capture_layer, screen, segments, [], count, frames),
        )
    ]
    threads[3].join()
    for inbox, thread in zip((keys, states, segments), threads[:3], strict=True):
        inbox.put(None)
        thread.join()
    return written
