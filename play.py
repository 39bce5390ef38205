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
A session folder is an episode of data.py with play.mp4, play_memory.mp4, start.png, session.json (--replay) and state.safetensors
(--out FOLDER goes on from there). An undo takes back latents, pose and random state.
Tests: pytest tests/test_play.py      Pictures: python play.py --make-start; python play.py --film assets/figures/memory.gif
"""

import argparse
import base64
import contextlib
import difflib
import functools
import hashlib
import io
import json
import math
import os
import queue
import re
import secrets
import signal
import sys
import tempfile
import threading
import time
import webbrowser
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

import data
import realtime
import world

HERE = Path(__file__).resolve().parent
KEYS, LATENT = tuple("wasdijkl"), 4  # LATENT frames are the shortest thing an action can do
SHOW_FPS, FILE_FPS = (
    40,
    16,
)  # the page aims at the paper's 40; without a page films run at the dataset's rate
LOOK_PER_PIXEL, MAX_LOOK = (
    0.01,
    0.4,
)  # mouse units (15°) per pixel; per frame at most, what training has seen
WINDOW, STREAMS, BODY, PICTURE = (
    3,
    8,
    16_384,
    16_000_000,
)  # frames on their way, viewers, bytes of an input, of a picture
PRESETS = {
    "@revisit": "l:60, j:60",
    "@spin": "l:240",
    "@square": ", ".join(["w:16, l:60"] * 4),
    "@idle": "_:160",
}
COMMANDS = (
    "pause",
    "step",
    "undo",
    "restart",
    "seed",
    "memory",
    "view",
    "record",
    "pace",
    "run",
    "image",
    "prompt",
)
NO_MODEL = """No model for preset {} yet, so you walk in the game itself (--fake). Three ways to a model:
  python train.py --stage base                                    train tiny on this machine, minutes
  python play.py --preset 5b --weights weights/matrix-game-3      the released one; this command says how to get it
  python play.py --fake                                           none: learn the keys"""


# ---------------------------------------------------------------------------------------------------------------- actions
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
        return *(part.numpy() for part in data.actions_from_keys(chords)), notes
    stored = dict(np.load(source, allow_pickle=False))
    if {"keyboard", "mouse"} <= set(stored):
        return stored["keyboard"].astype(np.float32), stored["mouse"].astype(np.float32), []
    poses = [data.c2w_to_poses(value) for value in stored.values() if value.shape[1:] == (4, 4)]
    if not poses:
        raise ValueError(
            f"{source} holds {', '.join(stored)}; expected keyboard (F, 6) and mouse (F, 2), or camera poses (T, 4, 4)"
        )
    keyboard, mouse, _ = data.infer_wsad(poses[0][:, :3], poses[0][:, 4], poses[0][:, 3])
    return keyboard[:-1].astype(np.float32), mouse[:-1], ["the keys were read off the poses"]


known_scene = functools.lru_cache(maxsize=4)(world.make_scene)


def legal(
    keyboard: np.ndarray, mouse: np.ndarray, pitch: float, limit: float
) -> tuple[np.ndarray, np.ndarray]:  # (n, 6), (n, 2)
    """What training has seen: never W with S or A with D, bounded turning, a pitch within ±limit degrees."""
    keyboard, mouse = (
        np.array(keyboard, np.float32),
        np.clip(mouse, -MAX_LOOK, MAX_LOOK).astype(np.float32),
    )
    for pair in ([0, 1], [2, 3]):
        keyboard[:, pair] *= (keyboard[:, pair].sum(1) < 2)[:, None]
    path = np.clip(pitch + 15 * np.cumsum(mouse[:, 0]), -limit, limit)
    mouse[:, 0] = np.diff(path, prepend=np.clip(pitch, -limit, limit)) / 15
    return keyboard, mouse


class Controls:
    """What is held, tapped and turned since the last decision. State, not events: nothing can queue up."""

    def __init__(self, clock=time.monotonic) -> None:
        self.clock, self.lock, self.last, self.turn = clock, threading.Lock(), clock(), np.zeros(2)
        self.held, self.taps = {}, {}  # key → when it went down; key → seconds it was down

    def post(self, keys: list[str], dx: float = 0.0, dy: float = 0.0) -> None:
        with self.lock:
            now = self.clock()
            for key in set(self.held) - set(keys):
                down = self.held.pop(key)
                if (
                    down >= self.last
                ):  # a tap: pressed after the last decision, gone before the next
                    self.taps[key] = self.taps.get(key, 0.0) + now - down
            self.held = {key: self.held.get(key, now) for key in keys}
            self.turn = self.turn + (-dy, dx)  # up and right are positive

    def read(
        self, n: int, fps: float, pitch: float = 0.0, limit: float = 85.0
    ) -> tuple[np.ndarray, np.ndarray, dict]:
        """The next n actions: held keys act throughout, taps as long as they lasted (at least a latent), the mouse evenly."""
        with self.lock:
            held, taps, turn = set(self.held), self.taps, self.turn
            self.taps, self.turn, self.last = {}, np.zeros(2), self.clock()
        frames = {
            key: LATENT * max(1, math.ceil(seconds * fps / LATENT)) for key, seconds in taps.items()
        }
        chords = [
            "+".join(sorted(held | {key for key in frames if t < frames[key]})) or "_"
            for t in range(n)
        ]
        keyboard, mouse = (part.numpy() for part in data.actions_from_keys(chords))
        mouse = mouse + turn * LOOK_PER_PIXEL / n
        said = {"keys": sorted(held | set(taps)), "clipped": bool(np.abs(mouse).max() > MAX_LOOK)}
        return *legal(keyboard, mouse, pitch, limit), said


# --------------------------------------------------------------------------------------------------------- start pictures
@dataclass(frozen=True)
class Start:
    image: np.ndarray  # (H, W, 3) uint8, the model's size
    note: str = ""  # what was done to the picture
    truth: dict | None = (
        None  # the world it shows, if the file says so: then the truth is known everywhere
    )
    pose: tuple[float, ...] = (0.0, -world.EYE, 0.0, 0.0, 0.0)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = PngImagePlugin.PngInfo()
        for key, value in (
            {**self.truth["scene"], "pose": self.pose} if self.truth else {}
        ).items():
            text.add_text(key, json.dumps(value))
        Image.fromarray(self.image).save(path, pnginfo=text)


def true_views(
    truth: dict, poses: np.ndarray, H: int, W: int
) -> np.ndarray:  # (n, 5) → (n, H, W, 3) uint8
    return data.true_frames(truth, None, H, W, poses)


def open_start(
    source: Path | bytes, size: tuple[int, int], name: str, view: str = "first"
) -> Start:
    """Any picture becomes a start frame. One that names its world is drawn again at this size, as the player or who follows him sees it."""
    H, W = size
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        picture.load()
        if "seed" in getattr(picture, "text", {}):
            seed, kind, pose = (json.loads(picture.text[key]) for key in ("seed", "kind", "pose"))
            truth, pose = (
                {
                    "scene": {"seed": int(seed), "kind": str(kind)},
                    "view": view,
                    "character": int(seed),
                },
                np.array(pose, float).reshape(1, 5),
            )
            return Start(
                true_views(truth, pose, H, W)[0],
                f"{name}: world {seed} ({kind}), held out",
                truth,
                tuple(pose[0].tolist()),
            )
        alpha, (w, h) = "A" in picture.getbands() or "transparency" in picture.info, picture.size
        method = Image.Resampling.BOX if w >= 2 * W else Image.Resampling.BICUBIC
        fitted = np.array(
            ImageOps.fit(ImageOps.exif_transpose(picture).convert("RGB"), (W, H), method)
        )
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        SyntaxError,
        OverflowError,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(
            f"{name} cannot be read as a picture ({error}); give a PNG or JPEG file"
        ) from error
    notes = ["alpha dropped"] * alpha + [f"{w}x{h} → {W}x{H} centre crop"] * ((w, h) != (W, H))
    notes += [f"enlarged: it is smaller than the model's {W}x{H}"] * (w < W or h < H)
    return Start(
        fitted,
        f"{name}: {'; '.join(notes) or 'used as it is'}. A tiny model has only seen its own world.",
    )


def make_start(folder: Path) -> None:
    """Draw the start pictures again, after a change of world.py: every file names its world and its pose."""
    for path in (folder / "start.png", *folder.glob("gallery/*.png")):
        open_start(path, (64, 64), path.name).save(path)


class FakeSession:
    """The game itself behind the methods of realtime.Session: nothing is imagined, so nothing is forgotten."""

    def __init__(self, size: tuple[int, int], view: str = "first") -> None:
        self.size, self.view, self.frames_needed, self.policy, self.truth = (
            size,
            view,
            LATENT,
            "camera",
            None,
        )

    def enter(self, truth: dict, poses: list[tuple] | None = None) -> None:
        self.inside, self.game = (
            truth,
            world.World(world.make_scene(**truth["scene"]), pose=poses and poses[-1], size=0),
        )
        self.poses = poses or [self.game.pose]

    def reset(
        self, image: torch.Tensor, prompt: str, seed: int, pose: tuple[float, ...]
    ) -> realtime.Chunk:
        unknown = {
            "scene": {"seed": seed, "kind": world.make_scene(seed).kind},
            "view": self.view,
            "character": seed,
        }
        self.enter(self.truth or unknown, [tuple(pose)] if self.truth else None)
        first = torch.from_numpy(true_views(self.inside, np.array(self.poses), *self.size))
        return realtime.Chunk(first, {"ms": {}, "memory": [], "poses": list(self.poses)})

    def step(self, keyboard: torch.Tensor, mouse: torch.Tensor) -> realtime.Chunk:  # (n, 6), (n, 2)
        began, here, turned = (
            time.monotonic(),
            self.poses[-1][4],
            lambda t: abs((self.poses[t][4] - here + 180) % 360 - 180),
        )
        near = (
            []
            if self.policy == "none"
            else [*sorted(range(20, len(self.poses), 20), key=turned)[:4], 0]
        )  # what a memory would look back at
        picks = [
            {"latent": t // 4, "frame": t, "score": 1 - turned(t) / 180, "sink": not t}
            for t in near
        ]
        for keys, turn in zip(keyboard.tolist(), mouse.tolist(), strict=True):
            self.game.tick(keys, turn)
            self.poses.append(self.game.pose)
        frames = torch.from_numpy(
            true_views(self.inside, np.array(self.poses[-len(keyboard) :]), *self.size)
        )
        ms = {"retrieve": 0.0, "denoise": 0.0, "decode": 1000 * (time.monotonic() - began)}
        return realtime.Chunk(
            frames, {"ms": ms, "memory": picks, "poses": self.poses[-len(keyboard) :]}
        )

    def undo(self) -> None:
        self.enter(self.inside, self.poses[:-LATENT])

    def save(self, path: Path) -> None:
        realtime.moe.write_weights(
            path, {"poses": torch.tensor(self.poses, dtype=torch.float64)}, self.inside
        )

    def restore(self, path: Path) -> None:
        tensors, truth = realtime.moe.read_weights(path)
        self.enter(truth, [tuple(pose) for pose in tensors["poses"].tolist()])


# ---------------------------------------------------------------------------------------- what a session leaves on disk
def open_film(path: Path, fps: int, size: tuple[int, int]) -> tuple | None:
    """An mp4 that grows frame by frame, (container, stream), or None where none can be written."""
    if (H := size[0]) % 2 + (W := size[1]) % 2:
        raise ValueError(
            f"mp4 needs even sizes, got {W}x{H}; nearest legal size: {W + W % 2}x{H + H % 2}"
        )
    try:
        container = av.open(str(path), "w")
        stream = container.add_stream(
            "libx264", rate=fps, options={"preset": "ultrafast", "crf": "18", "threads": "1"}
        )
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        return container, stream
    except (OSError, ValueError) as error:  # no encoder, or no place to write to
        print(
            f'no {path.name} ({error}): pip install "imageio[pyav]". Every frame is kept in {path.parent / "rgb"}',
            flush=True,
        )


def memory_panel(width: int, said: dict) -> np.ndarray:  # (96, width, 3) uint8
    """Under the picture of play_memory.mp4: the frames that were looked back at, with scores, and the numbers."""
    panel, side = Image.new("RGB", (width, 96), (20, 24, 31)), min(56, width // 5 - 6)
    draw = ImageDraw.Draw(panel)
    for k, pick in enumerate(said.get("memory", [])[:5]):
        x, thumb = 4 + k * (width - 4) // 5, Image.open(io.BytesIO(base64.b64decode(pick["thumb"])))
        panel.paste(thumb.resize((side, side), Image.Resampling.NEAREST), (x, 4))
        draw.text(
            (x, side + 5),
            f"f{pick['frame']} " + ("sink" if pick["sink"] else f"{pick['score']:.2f}"),
            (165, 175, 188),
        )
    draw.text((4, 80), said.get("text", "start"), (255, 255, 255))
    return np.asarray(panel)


class Recording:
    """A session folder in the making. Chunks wait while an undo may take them back; a thread writes the older ones."""

    def __init__(
        self,
        folder: Path,
        fps: int,
        start: Start,
        image: np.ndarray,
        pose: tuple[float, ...],
        about: dict,
        camera: Callable,
    ) -> None:
        self.folder, self.fps, self.start, self.image, self.pose, self.about, self.camera = (
            folder,
            fps,
            start,
            image,
            pose,
            about,
            camera,
        )
        self.pending, self.writer, self.busy, self.times = (
            deque(),
            ThreadPoolExecutor(1),
            None,
            max(1, 256 // len(image)),
        )
        self.said = tempfile.TemporaryFile(
            "w+"
        )  # what was written, a line per chunk: sessions may last for hours

    def add(self, frames: np.ndarray, said: dict) -> None:
        self.pending.append(
            (
                frames,
                {
                    "n": len(frames),
                    "sha": hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()[:16],
                    **said,
                },
            )
        )
        while sum(len(frames) for frames, _ in self.pending) > (realtime.UNDO + 1) * SHOW_FPS:
            self.commit()

    def undo(self, n: int) -> None:
        while n > 0 and self.pending:
            n -= len(self.pending.pop()[0])

    def commit(self) -> None:
        frames, said = self.pending.popleft()
        (
            self.busy or self.writer.submit(self.begin)
        ).result()  # one chunk is being written at most: a slow disk costs time
        self.busy = self.writer.submit(self.write, frames, said)
        self.said.write(
            json.dumps(
                said
                | {
                    "memory": [
                        {k: v for k, v in pick.items() if k != "thumb"} for pick in said["memory"]
                    ]
                }
            )
            + "\n"
        )

    def begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (H, W), self.raw = (
            (side * self.times for side in self.image.shape[:2]),
            open(self.folder / "frames.tmp", "wb"),
        )
        self.films = [
            open_film(self.folder / "play.mp4", self.fps, (H, W)),
            open_film(self.folder / "play_memory.mp4", self.fps, (H + 96, W)),
        ]
        self.write(self.image[None], {})

    def write(self, frames: np.ndarray, said: dict) -> None:
        """Raw frames for the episode; two films for people, enlarged without smoothing."""
        panel = memory_panel(frames.shape[2] * self.times, said)
        for frame in frames:
            self.raw.write(frame.tobytes())
            big = frame.repeat(self.times, 0).repeat(self.times, 1)
            for film, picture in zip(self.films, (big, np.concatenate([big, panel])), strict=True):
                if film:
                    film[0].mux(film[1].encode(av.VideoFrame.from_ndarray(picture)))

    def close(self, session: realtime.Session | FakeSession) -> list[dict]:
        """Write what is pending and make the folder whole: films, episode, start picture, state, session.json. Returns its chunks."""
        while self.pending:
            self.commit()
        if self.busy:
            self.busy.result()
            self.raw.close()
            self.said.seek(0)
            chunks = [json.loads(line) for line in self.said]
            for container, stream in filter(None, self.films):
                container.mux(stream.encode())
                container.close()
            rows = {
                key: [row for said in chunks for row in said.pop(key)]
                for key in ("keyboard", "mouse", "poses")
            }
            rows["poses"].insert(0, list(self.pose))
            self.save_episode(*(np.array(rows[key]) for key in ("keyboard", "mouse", "poses")))
            self.start.save(self.folder / "start.png")
            session.save(self.folder / "state.safetensors")
            (self.folder / "session.json").write_text(
                json.dumps({**self.about, "fps": self.fps, **rows, "chunks": chunks})
            )
            print(f"saved {self.folder}", flush=True)
        self.writer.shutdown()
        return chunks if self.busy else []

    def save_episode(
        self, keyboard: np.ndarray, mouse: np.ndarray, poses: np.ndarray
    ) -> None:  # (F, 6), (F, 2), (F+1, 5)
        free = [
            world.step_pose(*step)
            for step in zip(poses.tolist(), keyboard.tolist(), mouse.tolist(), strict=False)
        ]
        contact = np.append(
            np.abs(np.array(free) - poses[1:])[:, :3].max(1) > 1e-3, False
        )  # a wall changed this step
        (H, W), last, T = (
            self.image.shape[:2],
            lambda x: np.concatenate([x, x[-1:]]),
            len(poses),
        )  # the last action is a repeat, not valid
        said = {
            "source": "play",
            "view": self.about["flags"]["view"],
            "metric": True,
            "action_source": "engine",
            "fps": self.fps,
        }
        words = data.caption(
            self.about["prompt"] or "a place", last(keyboard), last(mouse), poses, "play"
        )
        clip = data.write_episode(
            self.folder.with_name(self.folder.name + ".tmp"),
            data.Episode(
                np.memmap(self.folder / "frames.tmp", np.uint8, "r", shape=(T, H, W, 3)),
                self.camera(torch.from_numpy(poses)).float().numpy(),
                np.tile(world.intrinsics(H, W).numpy(), (T, 1)),
                last(keyboard).astype(np.uint8),
                last(mouse).astype(np.float32),
                np.arange(T) < T - 1,
                contact,
                poses.astype(np.float32),
                words,
                said | (self.about["truth"] or {}),
            ),
        )
        for file in sorted(
            clip.iterdir(), key=lambda file: file.name == "_DONE"
        ):  # the mark of a whole episode comes last
            os.replace(file, self.folder / file.name)
        clip.rmdir()
        (self.folder / "frames.tmp").unlink()


# ----------------------------------------------------------------------------------------------------------- what is seen
def jpeg_of(frame: np.ndarray, side: int = 0) -> bytes:  # (H, W, 3) uint8
    picture, stream, small = Image.fromarray(frame), io.BytesIO(), max(frame.shape) <= 256
    picture.thumbnail((side or picture.width, side or picture.height))
    picture.save(stream, "JPEG", quality=92 if small else 80, subsampling=0 if small else 2)
    return stream.getvalue()


class Screen:
    """A timeline: every frame has the moment from which it is the picture. Each viewer takes the newest; nothing queues."""

    def __init__(self) -> None:
        self.changed, self.frames, self.notes, self.viewers = (
            threading.Condition(),
            deque(maxlen=400),
            deque(maxlen=32),
            {},
        )
        self.serial, self.end, self.stage, self.seen, self.encode = (
            0,
            0.0,
            "",
            time.monotonic(),
            0.0,
        )

    def put(
        self, frames: np.ndarray, headers: list[dict], period: float, clear: bool = False
    ) -> None:
        """Show frames evenly, after those that are still to come or instead of them. A late chunk is not followed by a burst."""
        with self.changed:
            begin = time.monotonic() if clear else max(self.end, time.monotonic())
            self.end, fresh = begin + len(frames) * period, zip(frames, headers, strict=True)
            entries = [
                {"due": begin + k * period, "frame": frame, "header": header, "jpeg": b""}
                for k, (frame, header) in enumerate(fresh)
            ]
            self.frames = deque([*([] if clear else self.frames), *entries], maxlen=400)
            for entry in entries:
                self.serial = entry["n"] = self.serial + 1
            self.changed.notify_all()

    def note(self, **record: object) -> None:
        with self.changed:
            self.serial, self.stage = self.serial + 1, record.get("stage", self.stage)
            self.notes.append((self.serial, record))
            self.changed.notify_all()

    def left(self) -> float:  # seconds until the last finished frame has had its time
        return max(0.0, self.end - time.monotonic())

    def now(self) -> dict | None:  # what is to be seen at this moment
        with self.changed:
            return next(
                (entry for entry in reversed(self.frames) if entry["due"] <= time.monotonic()), None
            )

    def plays(self, viewer: object) -> bool:
        """The first viewer plays. While there is none, anybody may (curl, tests)."""
        return next(iter(self.viewers), viewer) == viewer

    @contextlib.contextmanager
    def seat(self):
        """A place for one stream: the viewer's name, or None where all are taken."""
        with self.changed:
            viewer = secrets.token_hex(8) if len(self.viewers) < STREAMS else None
            self.viewers |= (
                {viewer: {"unacked": deque(), "sent": 0, "noted": self.serial}} if viewer else {}
            )
        try:
            yield viewer
        finally:
            with self.changed:
                self.viewers.pop(viewer, None)
                self.seen = time.monotonic()

    def ack(self, viewer: object, shown: float) -> None:
        with self.changed:
            unacked = (
                self.viewers[viewer]["unacked"]
                if isinstance(viewer, str) and viewer in self.viewers
                else ()
            )
            while unacked and unacked[0] <= shown:
                unacked.popleft()
            self.changed.notify_all()

    def take(self, viewer: str) -> list[tuple[dict, bytes]]:
        """Notes this viewer has not had, and the newest frame unless WINDOW are on their way. Waits up to 1 s."""
        with self.changed:
            mine, until, records = self.viewers[viewer], time.monotonic() + 1, []
            while not records and time.monotonic() < until:
                records, entry = (
                    [(note, b"") for serial, note in self.notes if serial > mine["noted"]],
                    self.now(),
                )
                if entry and entry["n"] > mine["sent"] and len(mine["unacked"]) < WINDOW:
                    began, entry["jpeg"] = (
                        time.monotonic(),
                        entry["jpeg"] or jpeg_of(entry["frame"]),
                    )
                    self.encode, mine["sent"] = 1000 * (time.monotonic() - began), entry["n"]
                    mine["unacked"].append(entry["n"])
                    told = {
                        "n": entry["n"],
                        "left": self.left(),
                        "role": "play" if self.plays(viewer) else "watch",
                    }
                    records.append((entry["header"] | told, entry["jpeg"]))
                if not records:
                    coming = [
                        entry["due"] for entry in self.frames if entry["due"] > time.monotonic()
                    ]
                    self.changed.wait(max(0.001, min([until, *coming]) - time.monotonic()))
            mine["noted"] = self.serial if records else mine["noted"]
            return records or [({"ping": 1}, b"")]  # a closed tab is noticed by writing to it


# ------------------------------------------------------------------------------------------------------------- the player
class Player(threading.Thread):
    """The thread that owns the model: obey, decide as late as possible, make a chunk, put it on the screen."""

    def __init__(self, args: argparse.Namespace, fps: int) -> None:
        super().__init__(daemon=True)
        self.args, self.fps, self.seed, self.prompt, self.session, self.recording, self.begun = (
            args,
            fps,
            args.seed,
            args.prompt,
            None,
            None,
            None,
        )
        self.controls, self.screen, self.commands, self.plan, self.once, self.alone = (
            Controls(),
            Screen(),
            queue.Queue(16),
            None,
            False,
            False,
        )
        self.set, self.gallery = (
            {"paused": False, "view": "model", "pace": args.pace},
            sorted((HERE / "assets/gallery").glob("*.png"))[:10],
        )

    def run(self) -> None:
        try:
            self.open(live=True)
            while not self.args.stop.is_set():
                while not self.commands.empty():
                    self.obey(self.commands.get())
                if self.due():
                    self.chunk(*self.decide(self.session.frames_needed))
                else:
                    time.sleep(0.002)
        except Exception as error:  # whatever it is: the page says it, the session is saved
            self.screen.note(stage=f"stopped: {explain(error)}")
            print(explain(error), file=sys.stderr, flush=True)
            if self.args.debug:
                raise
        finally:
            self.save()

    def open(self, live: bool = False) -> None:
        """Load the model, then the start picture or the session that goes on."""
        self.screen.note(
            stage="loading the model"
            + (
                ", compiling (first time ~60-150 s, cached afterwards)…"
                if self.args.compile
                else ""
            )
        )
        args, folder = self.args, self.args.resume
        said = (
            json.loads((folder / "session.json").read_text())
            if folder
            else {"flags": {"view": args.view}}
        )
        args.view = said["flags"].get("view", "first")  # a session goes on as it began
        self.session = (
            FakeSession(args.size, args.view)
            if args.fake
            else realtime.open_session(options_of(args), args.dit_ranks)
        )
        if not args.fake:
            self.settle(live)
        self.session.policy, self.size = (
            args.memory,
            args.size if args.fake else realtime.SIZES[args.preset],
        )
        if folder:
            video = data.read_episode(folder).video
            self.seed, self.prompt, trail = (
                said["seed"],
                said["prompt"],
                [tuple(pose) for pose in said["trail"] + said["poses"][::LATENT]],
            )
            note = f"{folder} goes on at frame {LATENT * (len(trail) - 1)}"
            self.reset(
                Start(np.array(video[-1]), note, said["truth"], trail[-1]),
                folder / "state.safetensors",
                trail,
            )
        else:
            self.reset(
                open_start(
                    Path(self.args.image), self.size, Path(self.args.image).name, self.args.view
                )
            )
        print(self.begun.note, flush=True)
        self.screen.note(stage="")

    def settle(self, live: bool) -> None:
        """What was measured on this machine is written down: a replay must not measure again."""
        self.args.dtype = self.session.options.dtype
        if live and not self.args.new:
            self.args.new = realtime.shortest_sustained(self.session, self.fps)
        else:
            self.args.new = self.session.options.new

    def reset(
        self, start: Start, state: Path | None = None, trail: list[tuple] | None = None
    ) -> None:
        """Begin (again) from a start picture, or go on from a saved state; what was played so far is saved."""
        self.save()
        self.begun, self.times, self.plan, n = (
            start,
            [],
            None,
            LATENT * (1 if self.args.fake else self.session.options.new),
        )
        self.undone, self.ring = (
            deque(maxlen=40 if self.args.fake else realtime.UNDO),
            deque(maxlen=60 * self.fps // n),
        )  # the unrecorded minute
        if self.args.fake:
            self.session.truth = start.truth
        elif self.args.view == "third":
            self.session.denoiser.camera = self.camera
        first, info = self.session.reset(
            torch.from_numpy(start.image), self.prompt, self.seed, start.pose
        )
        self.newest, self.poses = (
            start.image if state else first[0].numpy(),
            trail or [tuple(info["poses"][0])],
        )
        if state:
            self.session.restore(state)
        self.frame, self.thumbs = LATENT * (len(self.poses) - 1), {0: jpeg_of(self.newest, 64)}
        self.record()
        self.screen.note(reset=True, truth=bool(start.truth), info=start.note)
        self.show(self.newest[None], self.poses[-1:], {"keys": [], "ms": {}}, clear=True)

    def camera(self, poses: torch.Tensor) -> torch.Tensor:  # (n, 5) float64 → (n, 4, 4)
        """In the player's eye, or behind him: as far as the walls allow, where they are known."""
        if self.args.view == "first":
            return torch.from_numpy(data.poses_to_c2w(poses))
        truth = self.session.inside if self.args.fake else self.begun.truth
        return (
            torch.from_numpy(data.eyes(truth, poses.numpy()))
            if truth
            else realtime.memory.behind(poses, world.MAX_PITCH)
        )

    def record(self) -> None:
        """A new folder, from the newest frame on or from the last minute, if that went unrecorded. With a trail it cannot be replayed."""
        image, n = self.ring[0][2:] if self.ring else (self.newest, len(self.poses))
        said = about(self.args) | {
            "seed": self.seed,
            "prompt": self.prompt,
            "truth": self.begun.truth,
            "trail": self.poses[: n - 1],
        }
        self.recording = Recording(
            free_folder(self.args.out),
            self.fps,
            self.begun,
            image,
            self.poses[n - 1],
            said,
            self.camera,
        )
        while self.ring:
            self.recording.add(*self.ring.popleft()[:2])

    def save(self) -> list[dict]:
        recording, self.recording = self.recording, None
        return recording.close(self.session) if recording else []

    def facts(self) -> dict:
        return {
            **self.set,
            "pace": self.tempo(),
            "policy": self.session.policy,
            "seed": self.seed,
            "gen": self.speed(),
            "fake": self.args.fake,
            "slots": self.session.frames_needed // LATENT,
            "recording": bool(self.recording),
            "vram": round(torch.cuda.memory_allocated() / 1e9, 1)
            if torch.cuda.is_available()
            else 0,
        }

    def show(self, frames: np.ndarray, poses: list, said: dict, clear: bool = False) -> None:
        first, psnr, said = self.frame - len(frames) + 1, said.get("psnr"), said | self.facts()
        headers = [
            {
                **said,
                "i": first + k,
                "t": (first + k) / self.fps,
                "pose": [round(float(v), 4) for v in pose],
                "psnr": psnr[k // LATENT] if psnr else None,
            }
            for k, pose in enumerate(poses)
        ]
        self.shown = (
            frames,
            headers,
            1 / (min(self.fps, max(self.speed(), 0.1)) if self.times else self.fps),
        )
        self.screen.put(*self.shown, clear)

    def speed(self) -> float:
        """Frames made per second; the first chunk warms up and does not count."""
        recent = self.times[1:][-5:] or self.times or [(0, 1)]
        return sum(n for n, _ in recent) / sum(seconds for _, seconds in recent)

    def tempo(self) -> str:
        return (
            self.set["pace"]
            if self.set["pace"] != "auto"
            else "turn"
            if len(self.times) > 1 and self.speed() < 8
            else "live"
        )

    def due(self) -> bool:
        """Is it time to decide? As late as possible: when what is left to show just covers the making of a chunk."""
        alone, tempo = (
            not self.screen.viewers and time.monotonic() - self.screen.seen > 10,
            self.tempo(),
        )
        if alone != self.alone:
            self.alone = alone
            print(
                "no viewer for 10 s: waiting" if alone else "a viewer is back: going on", flush=True
            )
        if alone or (self.set["paused"] and not self.once):
            return False
        if tempo == "turn" and self.plan is None and not self.screen.left():
            frames, headers, period = (
                self.shown
            )  # the chunk again, until the next plan; what is set now is said now
            self.screen.put(frames, [header | self.facts() for header in headers], period)
        ready = (
            self.screen.left() <= 1.2 * self.session.frames_needed / max(1.0, self.speed()) + 0.01
        )
        return self.plan is not None if tempo == "turn" else self.once or ready

    @property
    def max_pitch(self) -> float:
        """Degrees: a known world is drawn up to its own limit, any other up to the model's."""
        return world.MAX_PITCH if self.begun.truth else realtime.Options.max_pitch

    def in_rooms(self, keyboard: np.ndarray, mouse: np.ndarray) -> np.ndarray:
        """Keys that do not lead into the walls of a known world; the game itself pushes back on its own."""
        if self.args.fake or not self.begun.truth:
            return keyboard
        scene = known_scene(**self.begun.truth["scene"])
        return world.stop_at_walls(scene, self.poses[-1], keyboard, mouse)

    def decide(self, n: int) -> tuple[np.ndarray, np.ndarray, dict]:
        """What the player asks for in the next n frames, as late as possible."""
        pitch = self.poses[-1][3]
        if self.tempo() == "live":
            keyboard, mouse, said = self.controls.read(n, self.fps, pitch, self.max_pitch)
        else:
            slots, self.plan = self.plan or ["_"], None
            chords = [slots[min(t // LATENT, len(slots) - 1)] for t in range(n)]
            keyboard, mouse = data.actions_from_keys(chords)
            keyboard, mouse = legal(keyboard.numpy(), mouse.numpy(), pitch, self.max_pitch)
            said = {"keys": slots}
        return self.in_rooms(keyboard, mouse), mouse, said

    def chunk(self, keyboard: np.ndarray, mouse: np.ndarray, said: dict) -> None:
        """One step of the model and all that follows from it: judged, remembered, recorded, shown."""
        n, self.once, began, policy, truth = (
            len(keyboard),
            False,
            time.monotonic(),
            self.session.policy,
            self.begun.truth,
        )
        frames, info = self.session.step(torch.from_numpy(keyboard), torch.from_numpy(mouse))
        frames, poses, ends = (
            frames.numpy(),
            np.array(info["poses"]),
            slice(LATENT - 1, n, LATENT),
        )  # the last frame of every latent
        self.times = [*self.times[:1], *self.times[1:][-4:], (n, time.monotonic() - began)]
        judged = truth and not self.args.fake
        said["psnr"] = (
            data.psnr(frames[ends], true_views(truth, poses[ends], *self.size)).tolist()
            if judged
            else []
        )
        picks = [
            {
                **pick,
                "thumb": base64.b64encode(self.thumbs.get(pick["frame"], self.thumbs[0])).decode(),
                "pose": self.poses[-(-pick["frame"] // LATENT)],
            }
            for pick in info["memory"]
        ]
        self.thumbs |= {self.frame + k + 1: jpeg_of(frames[k], 64) for k in range(n)[ends]}
        while len(self.thumbs) > 4096:  # as many as the bank holds; frame 0 stays
            self.thumbs.pop(next(frame for frame in self.thumbs if frame))
        self.undone.append((n, before := self.newest))
        self.poses += map(tuple, poses[ends].tolist())  # one per latent, as in the bank
        self.frame, self.newest = self.frame + n, frames[-1]
        text = f"memory {policy}   f{self.frame}   {' '.join(said['keys'])}" + (
            f"   {said['psnr'][-1]:.1f} dB" if judged else ""
        )
        self.ring.append(
            (
                frames,
                {
                    "keyboard": keyboard.tolist(),
                    "mouse": mouse.tolist(),
                    "poses": poses.tolist(),
                    "policy": policy,
                    "ms": info["ms"],
                    "memory": picks,
                    "psnr": said["psnr"],
                    "text": text,
                },
                before,
                len(self.poses) - n // LATENT,
            )
        )
        while self.recording and self.ring:
            self.recording.add(*self.ring.popleft()[:2])
        self.screen.note(memory=picks)
        said["ms"] = {
            **info["ms"],
            "encode": self.screen.encode,
            "total": 1000 * (time.monotonic() - began),
        }
        self.show(
            true_views(truth, poses, *self.size)
            if self.set["view"] == "truth" and truth
            else frames,
            poses,
            said,
        )

    def undo(self) -> None:
        """Take back one chunk, or as many short ones as make a second."""
        taken = 0
        while self.undone and taken < SHOW_FPS:
            self.session.undo()
            n, self.newest = self.undone.pop()
            taken += n
            self.ring = deque([*self.ring][:-1], self.ring.maxlen)
        self.frame, self.poses = self.frame - taken, self.poses[: len(self.poses) - taken // LATENT]
        if self.recording:
            self.recording.undo(taken)
        self.show(self.newest[None], self.poses[-1:], {"keys": [], "ms": {}}, clear=True)

    def obey(self, body: dict) -> None:
        """One command of the page, between two chunks. What the client sends is data: never a path, never code."""
        cmd, start, swap = body["cmd"], self.begun, lambda value, a, b: b if value == a else a
        try:
            if cmd == "memory":
                self.session.policy = swap(self.session.policy, "camera", "none")
            elif cmd == "pause":
                self.set["paused"] = not self.set["paused"]
            elif cmd == "view" and start.truth:
                self.set["view"] = swap(self.set["view"], "model", "truth")
            elif cmd == "pace":
                self.set["pace"] = swap(self.tempo(), "live", "turn")
            elif cmd == "run":
                self.plan = [
                    "+".join(sorted(set(slot) & set(KEYS))) or "_" for slot in body["plan"][:64]
                ] or None
            elif cmd == "record":
                self.save() if self.recording else self.record()
            elif cmd == "prompt":
                self.prompt = str(body["text"])[:1000]
                self.screen.note(info="The new prompt is used from the next start on (R).")
            elif cmd == "undo":
                self.undo()
            elif cmd == "step":
                self.once = self.set["paused"]
            elif cmd in ("restart", "seed", "image"):
                self.seed = secrets.randbelow(1 << 31) if cmd == "seed" else self.seed
                if cmd == "image":
                    start = open_start(
                        base64.b64decode(body["data"], validate=True),
                        self.size,
                        "the new picture",
                        self.args.view,
                    )
                self.reset(start)
        except (ValueError, TypeError, KeyError) as error:
            self.screen.note(info=f"{cmd}: {error}")
        self.screen.note(facts=self.facts() | {"n": self.screen.serial})

    def heard(self, route: str, body: dict) -> tuple[int, str]:
        """What a POST means: 204, or a status and an error. Called by HTTP threads: touches the controls, or queues a command."""
        viewer = body.get("id")
        if route == "/input":
            dx, dy, shown = (float(body.get(name) or 0) for name in ("dx", "dy", "shown"))
            if not all(map(math.isfinite, (dx, dy, shown))):
                return 400, "dx, dy and shown must be finite numbers"
            self.screen.ack(viewer, shown)
            if self.screen.plays(viewer):
                self.controls.post(
                    [key for key in body.get("keys", [])[:16] if key in KEYS],
                    max(-4e3, min(4e3, dx)),
                    max(-4e3, min(4e3, dy)),
                )
        elif body.get("cmd") not in COMMANDS or not self.screen.plays(viewer):
            return (
                (403, "another tab plays, this one watches")
                if body.get("cmd") in COMMANDS
                else (400, f"unknown command; use one of {COMMANDS}")
            )
        elif self.commands.full():
            return 429, "too many commands at once"
        else:
            self.commands.put(body)
        return 204 if route == "/input" else 200, ""

    def state(self) -> dict:
        """GET /state, and what a new viewer is greeted with."""
        now, begun = self.screen.now() or {"header": {}}, self.begun
        return {
            **now["header"],
            **(self.facts() if begun else {}),
            "held": sorted(self.controls.held),
            "stage": self.screen.stage,
            "viewers": len(self.screen.viewers),
            "truth": bool(begun and begun.truth),
            "preset": "fake" if self.args.fake else self.args.preset,
        }


# ------------------------------------------------------------------------------------------------------------- the server
class Handler(BaseHTTPRequestHandler):
    """Five routes. What a client sends is bounded, checked and treated as data; a wrong request is a 4xx, never a crash."""

    protocol_version, timeout = "HTTP/1.1", 20
    log_message = lambda *said: None  # requests are not news: errors go to the page and to /state

    def handle(self) -> None:
        if self.server.slots.acquire(
            blocking=False
        ):  # 64 connections at once; more are closed unheard
            with contextlib.suppress(
                OSError
            ):  # a client that hangs up in the middle is no error of ours
                super().handle()
            self.server.slots.release()

    def reply(self, status: int, body: bytes | dict = b"", kind: str = "application/json") -> None:
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        self.close_connection |= (
            status >= 400
        )  # what is left unread must not be taken for a request
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def refused(self) -> str:
        """Foreign hosts (DNS rebinding), foreign pages and missing tokens have no business here."""
        host, origin, token = (
            self.headers.get("Host", ""),
            self.headers.get("Origin"),
            self.server.token,
        )
        given = self.path.partition("?token=")[2]
        if token and not secrets.compare_digest(given.encode(), token.encode()):
            return "the token is missing: open the URL that play.py printed"
        if not token and re.sub(r":\d+$", "", host) not in ("127.0.0.1", "localhost", "[::1]"):
            return f"host {host!r} is not this machine"
        return (
            f"origin {origin!r} is not this page" if origin not in (None, f"http://{host}") else ""
        )

    def do_GET(self) -> None:
        error, route, player = self.refused(), self.path.partition("?")[0], self.server.player
        if error or route not in ("/", "/state", "/frames"):
            self.reply(
                403 if error else 404,
                {"ok": False, "error": error or "there is /, /state and /frames"},
            )
        elif route == "/":
            self.reply(200, (HERE / "play.html").read_bytes(), "text/html; charset=utf-8")
        elif route == "/state":
            self.reply(200, player.state())
        else:
            with player.screen.seat() as viewer:
                self.stream(player, viewer)

    def stream(self, player: Player, viewer: str | None) -> None:
        if viewer is None:
            return self.reply(
                503, {"ok": False, "error": f"{STREAMS} viewers are connected already"}
            )
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()
        hello = {
            "hello": 1,
            "version": 1,
            "id": viewer,
            "role": "play" if player.screen.plays(viewer) else "watch",
            "fps": player.fps,
            "keys": KEYS,
        }
        records = [
            (
                {
                    **hello,
                    "gallery": [
                        base64.b64encode(path.read_bytes()).decode() for path in player.gallery
                    ],
                    **player.state(),
                },
                b"",
            )
        ]
        while not player.args.stop.is_set():
            for header, jpeg in records:
                text = json.dumps(header).encode()
                self.wfile.write(
                    len(text).to_bytes(4, "big") + text + len(jpeg).to_bytes(4, "big") + jpeg
                )
            records = player.screen.take(viewer)

    def do_POST(self) -> None:
        error, route, length = (
            self.refused(),
            self.path.partition("?")[0],
            self.headers.get("Content-Length", ""),
        )
        limit = PICTURE if route == "/cmd" else BODY
        if error or route not in ("/input", "/cmd"):
            return self.reply(
                403 if error else 404, {"ok": False, "error": error or "there is /input and /cmd"}
            )
        if not re.fullmatch(r"\d{1,9}", length) or int(length) > limit:
            return self.reply(
                413 if length.isdecimal() else 411,
                {"ok": False, "error": f"Content-Length must be at most {limit}"},
            )
        try:
            status, error = self.server.player.heard(
                route, json.loads(self.rfile.read(int(length)))
            )
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as wrong:
            status, error = 400, f"not understood: {wrong}"
        self.reply(status, b"" if status == 204 else {"ok": not error, "error": error})


def bind(player: Player, host: str, port: int) -> ThreadingHTTPServer:
    """The server on this port, or on the next free one."""
    for place in range(port, port + 20):
        try:
            server = ThreadingHTTPServer((host, place), Handler)
        except OSError as error:
            if place == port + 19:
                raise ValueError(
                    f"cannot serve {host}:{place} ({error.strerror}); pass another --host or --port"
                ) from error
            continue
        server.player, server.slots, server.daemon_threads = player, threading.Semaphore(64), True
        server.token = "" if host in ("127.0.0.1", "localhost") else secrets.token_hex(16)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


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


def options_of(args: argparse.Namespace) -> realtime.Options:
    return realtime.Options(
        preset=args.preset,
        weights=args.weights,
        decoder=args.vae,
        steps=args.steps,
        new=args.new or realtime.Options.new,
        device=args.device,
        dtype=args.dtype,
        quantize="qkvo" if args.int8 else "",
        compile=args.compile,
        view=args.view,
    )


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


def explain(error: BaseException) -> str:
    """One paragraph instead of a traceback, with the way out where it is known."""
    text = str(error) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        peak = torch.cuda.max_memory_allocated() / 1e9
        return f"out of memory, peak {peak:.1f} GB; the session is saved. Options, cheapest first: --vae light75 · --int8 · --preset small\n{text}"
    if "MPS" in text:
        return f"{text.splitlines()[0]}; run with PYTORCH_ENABLE_MPS_FALLBACK=1 or --device cpu"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def free_folder(out: str) -> Path:
    """--out or runs/play-<time>, with a number where that exists: nothing is ever overwritten."""
    base = Path(out or time.strftime("runs/play-%Y%m%d-%H%M%S"))
    return next(
        path
        for path in (
            base.with_name(base.name + (f"-{k}" if k > 1 else "")) for k in range(1, 10_000)
        )
        if not path.exists()
    )


def about(args: argparse.Namespace) -> dict:
    """What a replay needs to be the same again."""
    files = (
        [
            file
            for file in sorted(Path(args.weights).glob("*.safetensors"))
            if file.stat().st_size < 1 << 28
        ]
        if args.weights
        else []
    )
    sha = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}
    flags = {
        name: getattr(args, name)
        for name in (
            "fake",
            "preset",
            "weights",
            "vae",
            "steps",
            "new",
            "device",
            "dtype",
            "int8",
            "size",
            "view",
        )
    }
    return {
        "argv": sys.argv[1:],
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "weights_sha": sha,
        "flags": flags,
    }


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

            player.chunk(keys, turns, {"keys": [data.keys_from_action(keyboard[t], mouse[t])]})
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
    if not open_start(Path(args.image), (64, 64), args.image).truth:
        raise ValueError(
            f"--film shows the true world too, and {args.image} names none; take one of assets/"
        )
    with tempfile.TemporaryDirectory() as folder:
        for title, policy in (("memory on", "camera"), ("memory off", "none")):
            args.out = f"{folder}/{policy}"
            headless(args, keyboard, mouse, [policy], FILE_FPS)
            walk = data.read_episode(Path(args.out))
            panels[title] = np.array(walk.video)
    back = np.abs(walk.player - walk.player[0]).max(1) < 1.5
    panels["true world"] = data.true_frames(
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
    same, now = sum(a["sha"] == b["sha"] for a, b in zip(new, old, strict=False)), about(args)
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
