"""A running game as episodes: four layers, joined by queues only.

    game_layer  --- frames 16 Hz, states 60 Hz --->  capture_layer  --- segments --->  output_layer
         ^ keys                | states                 (a clock of its own)          (episodes on disk)
         '------- agent_layer <'

The game knows of no recording, the player of no capture, and any of them may crash alone and is
started again. So nobody writes down which state belongs to which frame: it has to be found out from
time stamps of two clocks that never agree, and keys from positions alone, as for a foreign game (§4).
Tests: pytest tests/test_recorder.py
"""

import math
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import camera
import world
from dataset import episode, prompt, wsad
from dataset.episode import Episode

FRAME_RATE = 16
STATE_RATE = 60
NOBODY = ((0,) * 6, (0.0, 0.0))  # what happens when nobody plays


# ---- the layers --------------------------------------------------------------------------------------------


def game_layer(
    game: world.World, keys: queue.Queue, states: queue.Queue, screen: queue.Queue
) -> None:
    """Layer 1, the program being played. It knows of no recording."""
    while True:
        try:
            action = keys.get(timeout=0.5)
        except queue.Empty:
            action = NOBODY  # the game goes on
        if action is None:
            return
        before = np.array(game.pose)
        record = game.tick(*action)
        screen.put(("frame", record["time"] / FRAME_RATE, record["frame"]))
        for message in states_of_tick(record["time"], before, np.array(game.pose)):
            screen.put(message)
        states.put(game.pose)


def states_of_tick(tick: int, before: np.ndarray, after: np.ndarray) -> Iterator[tuple]:
    """What a program that runs at 60 Hz shows between two frames."""
    first = math.ceil(tick * STATE_RATE / FRAME_RATE)
    end = math.ceil((tick + 1) * STATE_RATE / FRAME_RATE)
    for k in range(first, end):
        share = k * FRAME_RATE / STATE_RATE - tick
        yield "state", k / STATE_RATE, before + share * (after - before)


def agent_layer(
    mesh: world.NavMesh, rng: np.random.Generator, states: queue.Queue, keys: queue.Queue
) -> None:
    """Layer 2, the player: sees a state, sends keys; walks from one random place to the next."""
    way: list = []
    while (pose := states.get()) is not None:
        here = pose[0], pose[2]
        if way and math.dist(way[0], here) < 0.3:
            way = way[1:]
        if not way:
            goal = (rng.choice(mesh.cells) + 0.5) * mesh.cell
            way = mesh.path(here, tuple(goal))

        dx = way[0][0] - here[0]
        dz = way[0][1] - here[1]
        error = wsad.wrap(math.degrees(math.atan2(dx, dz)) - pose[4])
        forward = int(abs(error) < 12)
        turn = max(-3, min(3, round(error / 1.5))) / 10
        keys.put(((forward, 0, 0, 0, 0, 0), (0.0, turn)))


def capture_layer(
    screen: queue.Queue,
    segments: queue.Queue,
    closed: list[dict],
    count: int,
    frames: int,
    jitter: float = 0.008,
) -> None:
    """Layer 3, the capture program: stamps what arrives with its own late clock, cuts segments.

    When a layer crashes, the segment ends early.
    """
    segment = empty_segment()
    rng = np.random.default_rng(len(closed))
    while len(closed) < count:
        kind, at, value = screen.get()
        stamp = at + 3.217 + rng.uniform(-jitter, jitter)
        segment[kind].append((stamp, at, value))
        if kind == "crash" or len(segment["frame"]) > frames:
            if len(segment["frame"]) > 8:
                closed.append(segment)
                segments.put(segment)
            segment = empty_segment()


def empty_segment() -> dict[str, list]:
    """Lists of (stamp, time, value)."""
    return {"frame": [], "state": [], "crash": []}


def output_layer(
    segments: queue.Queue, root: Path, scene: world.Scene, written: list[Path]
) -> None:
    """Layer 4, the dataset: episodes are written whole."""
    while (segment := segments.get()) is not None:
        name = f"{scene.seed:06d}_{len(written):06d}"
        path = episode.write_episode(Path(root) / name, align(segment, scene))
        written.append(path)


# ---- which state belongs to which frame --------------------------------------------------------------------


def frame_times(segment: dict[str, list]) -> np.ndarray:
    """When the frames were drawn, by the clock of the game.

    States say how far the clocks are apart. Frames come evenly, so a line through their stamps
    removes the jitter.
    """
    stamps = [stamp for stamp, _, _ in segment["frame"]]
    late = np.median([stamp - time for stamp, time, _ in segment["state"]])
    number = np.arange(len(stamps))
    return np.polyval(np.polyfit(number, stamps, 1), number) - late


def align(segment: dict[str, list], scene: world.Scene) -> Episode:
    """Frames get the pose of their time, keys come from positions alone."""
    at = frame_times(segment)
    times = np.array([time for _, time, _ in segment["state"]])
    poses = np.array([pose for *_, pose in segment["state"]])
    known = int(np.sum(at <= times[-1]))
    T = (known - 1) // 4 * 4 + 1

    columns = [np.interp(at[:T], times, column) for column in poses.T]
    player = np.stack(columns, 1).astype(np.float32)
    video = np.stack([picture for *_, picture in segment["frame"][:T]])
    labels = wsad.infer_wsad(player[:, :3], player[:, 4], player[:, 3], camera.STEP)
    place = world.scene_caption(scene)
    return Episode(
        video=video,
        c2w=episode.poses_to_c2w(player).astype(np.float32),
        K=np.tile(camera.intrinsics(*video.shape[1:3]).numpy(), (T, 1)),
        keyboard=labels.keyboard,
        mouse=labels.mouse,
        valid=labels.valid,
        contact=np.zeros(T, bool),
        player=player,
        prompt=prompt.caption(place, labels.keyboard, labels.mouse, player, scene.kind),
        meta={
            "source": "recorder",
            "view": "first",
            "scene": {"seed": scene.seed, "kind": scene.kind},
            "metric": True,
            "action_source": "inferred",
            "fps": FRAME_RATE,
        },
    )


# ---- running them ------------------------------------------------------------------------------------------


def supervise(screen: queue.Queue, layer: Callable[..., None], *args: object) -> threading.Thread:
    """Run a layer in a thread; when it crashes, tell the capture layer and start it again."""

    def keep_running() -> None:
        while True:
            try:
                return layer(*args)
            except Exception as error:  # whatever happens to a layer, by design
                screen.put(("crash", 0.0, f"{layer.__name__}: {error}"))

    thread = threading.Thread(target=keep_running, daemon=True)
    thread.start()
    return thread


def record(root: Path, seed: int, count: int = 2, frames: int = 241) -> list[Path]:
    """Let the agent play the game and record `count` segments of it.

    A segment that the output layer crashes on is lost: that is said at the end, for nobody captures
    it.
    """
    scene = world.scene_of(seed)
    mesh = world.NavMesh(scene)
    rng = np.random.default_rng(seed)
    written: list[Path] = []
    keys, states, screen, segments = (queue.Queue() for _ in range(4))
    game = world.World(scene, size=64)
    failed: queue.Queue = queue.Queue()  # what the output layer crashed on
    states.put(game.pose)

    layers = [
        supervise(screen, game_layer, game, keys, states, screen),
        supervise(screen, agent_layer, mesh, rng, states, keys),
        supervise(failed, output_layer, segments, root, scene, written),
    ]
    capture = supervise(screen, capture_layer, screen, segments, [], count, frames)
    capture.join()
    for inbox, thread in zip((keys, states, segments), layers, strict=True):
        inbox.put(None)
        thread.join()
    if len(written) < count:
        reasons = "; ".join(sorted({text for *_, text in failed.queue}))
        raise ValueError(f"{len(written)} of {count} segments are in {root}: {reasons}")
    return written
