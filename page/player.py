"""The thread that owns the model: what a viewer asks for becomes frames.

    due ──► decide ──► chunk: step ──► judge ──► recording
     ▲                            └──► show ──► Screen
     └── obey: one command of the page, between two chunks

A decision is made as late as possible: when what is left to show just covers the making of a chunk.
"""

import argparse
import base64
import contextlib
import ctypes
import functools
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

import camera
import realtime
import world
from context import Window
from dataset import film
from engine import cli
from engine.actors import UNDO
from engine.parts import Options
from page import commands, opening
from page import folder as folders
from page.controls import LATENT, SHOW_FPS, Controls, legal
from page.game import FakeSession
from page.recording import Recording
from page.screen import Screen, jpeg_of
from page.start import Start, player_cameras, true_views
from page.wayback import Game

COMMANDS = 16  # that may wait
THUMB = 64  # pixels
THUMBS = 4096  # kept, as many as the bank holds latents
ALONE = 10.0  # seconds without a viewer until the world waits
TIDY = 30.0  # seconds between two returns of free memory
SLOW = 8  # frames per second below which one plays in turns
COMPILING = ", compiling (first time ~60-150 s, cached afterwards)…"

known_scene = functools.lru_cache(maxsize=4)(world.make_scene)


def explain(error: BaseException) -> str:
    """One paragraph instead of a traceback, with the way out where it is known."""
    text = str(error) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        peak = torch.cuda.max_memory_allocated() / 1e9
        return (
            f"out of memory, peak {peak:.1f} GB; what was played is saved. "
            f"Options, cheapest first: --vae light75 · --int8 · --preset small\n{text}"
        )
    if "MPS" in text:
        first = text.splitlines()[0]
        return f"{first}; run with PYTORCH_ENABLE_MPS_FALLBACK=1 or --device cpu"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def give_back() -> None:
    """Return what is free to the system. Between what is kept there are holes, which the allocator
    would hold for ever: 100 MB after twenty minutes. Only glibc can be asked; others do without."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def filled(rows: np.ndarray, n: int) -> np.ndarray:
    """n rows of actions: what is missing at the end is standing still."""
    return np.concatenate([rows, np.zeros((n - len(rows), rows.shape[1]), np.float32)])


class Player(threading.Thread):
    """Obey, decide as late as possible, make a chunk, put it on the screen."""

    def __init__(self, args: argparse.Namespace, fps: int, can_undo: bool = True) -> None:
        super().__init__(daemon=True)
        self.args = args
        self.fps = fps
        self.seed = args.seed
        self.prompt = args.prompt
        self.session: realtime.Session | FakeSession | None = None
        self.recording: Recording | None = None
        self.begun: Start | None = None  # what the walk began with

        # what a viewer wants
        self.controls = Controls()
        self.commands: queue.Queue = queue.Queue(COMMANDS)
        self.plan: list[str] | None = None  # chords of the next latents, in turns
        self.once = False  # make one chunk though paused
        self.own_new = args.new  # new latents of a segment; opening.settle may measure them
        self.set = {"paused": False, "view": "model", "pace": args.pace}
        self.script: list[np.ndarray] | None = None  # keyboard, mouse: played before anybody's keys
        self.game = Game()
        self.gallery = cli.start_pictures()

        # what a viewer gets
        self.screen = Screen()
        self.alone = False
        self.hidden = False  # whoever plays has another tab in front
        self.failed = ""  # why the thread ended
        self.unrecorded = ""  # why the recording ended before the walk
        self.frame = 0
        self.ring: deque = deque()  # what is not recorded: (frames, what is kept, before, poses)
        self.times: list[tuple[int, float]] = []  # (frames, seconds) of the last chunks
        self.tidied = time.monotonic()

        # chunks that can be taken back: (frames, the picture before them)
        chunks = 40 if args.fake else UNDO
        self.undone: deque = deque(maxlen=chunks if can_undo else 0)

    def run(self) -> None:
        try:
            self.open(live=True)
            while not self.args.stop.is_set():
                while not self.commands.empty():
                    commands.obey(self, self.commands.get())
                if self.due():
                    self.chunk(*self.decide(self.session.frames_needed))
                else:
                    time.sleep(0.002)
        except Exception as error:  # whatever it is: the page says it, the session is saved
            self.failed = explain(error)
            self.screen.note(stage=f"stopped: {self.failed}")
            print(self.failed, file=sys.stderr, flush=True)
            if self.args.debug:
                raise
        finally:
            self.save()

    # ---- where a walk begins

    def open(self, live: bool = False) -> None:
        """Load the model, then the start picture or the session that goes on."""
        self.screen.note(stage="loading the model" + (COMPILING if self.args.compile else ""))
        opening.open_walk(self, live)
        print(self.begun.note, flush=True)
        self.screen.note(stage="")

    def reset(self, start: Start, new: int = 0) -> None:
        """Begin (again) from a start picture; what was played so far is saved.

        In segments of as many new latents as a link asks for, else of as many as suit this machine.
        """
        self.save()
        if not self.args.fake:
            self.args.new = new or self.own_new  # the folder has to know it, too
            self.session.options = replace(self.session.options, new=self.args.new)
        first, info = self.begin(start)
        self.enter(start, first[0].numpy(), [tuple(info["poses"][0])])

    def begin(self, start: Start) -> realtime.Chunk:
        """The session alone, at this picture."""
        if self.args.fake:
            self.session.truth = start.truth
        elif self.args.view == "third":
            self.session.denoiser.camera = functools.partial(
                player_cameras, self.args.view, start.truth
            )
        image = torch.from_numpy(start.image)
        return self.session.reset(image, self.prompt, self.seed, start.pose)

    def enter(self, start: Start, newest: np.ndarray, poses: list[tuple]) -> None:
        """All that the player knows of a walk, from its newest frame on."""
        self.begun = start
        self.words = self.prompt  # a new one waits for the next walk
        self.newest = newest
        self.poses = poses  # one per latent, as in the bank
        self.frame = LATENT * (len(poses) - 1)
        self.thumbs = {self.frame: jpeg_of(newest, THUMB)}
        self.times = []
        self.plan = None
        self.script = None
        self.walked: list[tuple] = []  # keyboard and mouse of every chunk
        self.undone.clear()
        self.controls.forget()
        self.game.stop(self)

        # the last minute is kept, in case somebody wants it recorded
        n = LATENT * (1 if self.args.fake else self.session.options.new)
        self.ring = deque(maxlen=60 * self.fps // n)
        self.record()
        self.screen.note(reset=True, truth=bool(start.truth), info=start.note)
        self.show(newest[None], poses[-1:], {"keys": [], "ms": {}}, clear=True)

    # ---- what is kept

    def record(self) -> None:
        """A new folder, from the newest frame on, or from the last minute if that went unrecorded.

        With a trail it cannot be replayed: nobody knows how it came there.
        """
        image, n = self.newest, len(self.poses)
        if self.ring:
            image, n = self.ring[0][2:]
        header = folders.about(self.args) | {
            "fps": self.fps,
            "pose": self.poses[n - 1],
            "seed": self.seed,
            "prompt": self.words,
            "truth": self.begun.truth,
            "trail": self.poses[: n - 1],
            "walls": self.session.inside if self.args.fake else self.begun.truth,
        }
        with self.unless_full():
            self.recording = Recording(self.args.out, self.begun, image, header)
            self.store()

    def store(self) -> None:
        """Whatever is not recorded yet."""
        while self.recording and self.ring:
            frames, about, *_ = self.ring.popleft()
            now = None if self.ring else self.session  # a state belongs to the newest frame
            undoable = sum(n for n, _ in self.undone)
            self.recording.add(frames, about, now, undoable)

    def save(self) -> list[dict]:
        """End the recording, if there is one. Returns its chunks."""
        recording, self.recording = self.recording, None
        chunks = []
        if recording:
            with self.unless_full(ending=True):
                chunks = recording.close(self.session)
        if chunks and not self.args.film:  # which keeps its pictures, not its walks
            print(f"saved {recording.folder}", flush=True)
        return chunks

    @contextlib.contextmanager
    def unless_full(self, ending: bool = False) -> Iterator[None]:
        """A full disk ends the recording, not the walk, and says so; so does what cannot be completed."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.unrecorded = (
                f"not recorded any more: {error}. What was written is kept, "
                "and completed at the next start if there is room"
            )
            if not self.recording and not ending:
                self.unrecorded = f"nothing is recorded: {error}; pass another --out"
            elif self.recording:
                self.recording.abandon()
            self.recording = None
            self.screen.note(info=self.unrecorded)
            print(self.unrecorded, file=sys.stderr, flush=True)

    # ---- what is shown

    def facts(self) -> dict:
        vram = torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else 0
        return {
            **self.set,
            "pace": self.tempo(),
            "slow": self.set["pace"] == "auto" and self.tempo() == "turn",
            "policy": self.session.policy if self.session else self.args.memory,
            "seed": self.seed,
            "gen": self.speed(),
            "fake": self.args.fake,
            "slots": self.session.frames_needed // LATENT if self.session else Window.first - 1,
            "recording": bool(self.recording),
            "vram": round(vram, 1),
        }

    def say_facts(self) -> None:
        """What is set now; frames that were made before still say otherwise."""
        self.screen.note(facts=self.facts() | {"n": self.screen.serial})

    def show(self, frames: np.ndarray, poses: list, about: dict, clear: bool = False) -> None:
        """Put frames on the screen, each with all that the page says about it."""
        first = self.frame - len(frames) + 1
        psnr = about.get("psnr")
        about = about | self.facts()
        headers = []
        for k, pose in enumerate(poses):
            own = {
                "i": first + k,
                "t": (first + k) / self.fps,
                "pose": [round(float(v), 4) for v in pose],
                "psnr": psnr[k // LATENT] if psnr else None,
            }
            headers.append(about | own)

        self.shown = (frames, headers, self.period())
        self.screen.put(*self.shown, clear)

    def period(self) -> float:
        """Seconds of a frame: as fast as they are made, but not faster than they are meant to be."""
        fps = min(self.fps, max(self.speed(), 0.1)) if self.times else self.fps
        return 1 / fps

    def speed(self) -> float:
        """Frames made per second; the first chunk warms up and does not count."""
        recent = self.times[1:][-5:] or self.times or [(0, 1)]
        return sum(n for n, _ in recent) / sum(seconds for _, seconds in recent)

    def state(self) -> dict:
        """GET /state, and what a new viewer is greeted with."""
        now = self.screen.now() or {"header": {}}
        return {
            **now["header"],
            **(self.facts() if self.begun else {}),
            "held": self.controls.down(),
            "stage": self.screen.stage,
            "viewers": len(self.screen.viewers),
            "truth": bool(self.begun and self.begun.truth),
            "game": self.game.told,
            "preset": "fake" if self.args.fake else self.args.preset,
        }

    # ---- when, and what

    def tempo(self) -> str:
        """live, or turn: plan a chunk, press Enter. Where nobody chose, a slow model is played in turns."""
        if self.set["pace"] != "auto":
            return self.set["pace"]
        # a machine that was busy for a moment is not slow: most of the last chunks have to be
        recent = [n < SLOW * seconds for n, seconds in self.times[1:][-5:]]
        return "turn" if len(recent) > 1 and 2 * sum(recent) > len(recent) else "live"

    def due(self) -> bool:
        """Is it time to decide?"""
        self.watch_viewers()
        if self.alone or self.hidden or (self.set["paused"] and not self.once):
            return False
        if self.game.phase == "replay":
            return True
        if self.tempo() == "turn" and not self.script:
            if self.plan is None and not self.screen.left():
                self.show_again()
            return self.plan is not None
        making = self.session.frames_needed / max(1.0, self.speed())
        return self.once or self.screen.left() <= 1.2 * making + 0.01

    def watch_viewers(self) -> None:
        """Without anybody to see it, the world waits."""
        self.hidden = self.hidden and bool(self.screen.viewers)  # who is gone cannot say otherwise
        alone = not self.screen.viewers and time.monotonic() - self.screen.seen > ALONE
        if alone != self.alone:
            self.alone = alone
            print(
                "no viewer for 10 s: waiting" if alone else "a viewer is back: going on", flush=True
            )

    def show_again(self) -> None:
        """The last chunk until there is a plan; what was set in the meantime is said now."""
        frames, headers, period = self.shown
        now = self.facts() | {"again": True}
        again = [h | now | {"seen": {"policy": h["policy"], "view": h["view"]}} for h in headers]
        self.screen.put(frames, again, period)

    @property
    def max_pitch(self) -> float:
        """Degrees: a known world is drawn up to its own limit, any other up to the model's."""
        return world.MAX_PITCH if self.begun.truth else Options.max_pitch

    def in_rooms(self, keyboard: np.ndarray, mouse: np.ndarray) -> np.ndarray:
        """Keys that do not lead into the walls of a known world; the game itself pushes back on its own."""
        if self.args.fake or not self.begun.truth:
            return keyboard
        scene = known_scene(**self.begun.truth["scene"])
        return world.stop_at_walls(scene, self.poses[-1], keyboard, mouse)

    def decide(self, n: int) -> tuple[np.ndarray, np.ndarray, dict]:
        """What the player asks for in the next n frames."""
        pitch = self.poses[-1][3]
        if self.script:
            keyboard, mouse, about = self.next_of_script(n)
            keyboard, mouse = legal(keyboard, mouse, pitch, self.max_pitch)
        elif self.tempo() == "live":
            keyboard, mouse, about = self.controls.read(n, self.fps, pitch, self.max_pitch)
        else:
            slots, self.plan = self.plan or ["_"], None
            chords = [slots[min(t // LATENT, len(slots) - 1)] for t in range(n)]
            keyboard, mouse = (part.numpy() for part in camera.actions_from_keys(chords))
            keyboard, mouse = legal(keyboard, mouse, pitch, self.max_pitch)
            about = {"keys": slots}
        return self.in_rooms(keyboard, mouse), mouse, about

    def next_of_script(self, n: int) -> tuple[np.ndarray, np.ndarray, dict]:
        """n frames of it; after its end one stands still. What was pressed meanwhile is forgotten."""
        self.controls.read(n, self.fps)
        keyboard, mouse = (filled(rows[:n], n) for rows in self.script)
        rest = [rows[n:] for rows in self.script]
        self.script = rest if len(rest[0]) else None
        held = camera.keys_from_action(keyboard[0], mouse[0])
        return keyboard, mouse, {"keys": [] if held == "_" else held.split("+")}

    def actions(self) -> list[np.ndarray]:
        """keyboard (F, 6), mouse (F, 2): all that was walked."""
        none = np.zeros((0, 6), np.float32), np.zeros((0, 2), np.float32)
        keyboards, mice = zip(none, *self.walked, strict=True)
        return [np.concatenate(keyboards), np.concatenate(mice)]

    # ---- a chunk

    def chunk(self, keyboard: np.ndarray, mouse: np.ndarray, about: dict) -> None:
        """One step of the model and all that follows from it: judged, remembered, recorded, shown."""
        n = len(keyboard)
        began = time.monotonic()
        policy = self.session.policy  # a command may switch it before the next chunk
        made, info = self.session.step(torch.from_numpy(keyboard), torch.from_numpy(mouse))
        frames = made.numpy()
        poses = np.array(info["poses"])
        self.once = False
        self.times = [*self.times[:1], *self.times[1:][-4:], (n, time.monotonic() - began)]

        # all that the page and the journal say about it
        psnr = self.judge(frames, poses)
        picks = self.described(info["memory"])
        about["psnr"] = psnr
        before = self.remember(frames, poses)
        self.walked.append((keyboard, mouse))
        text = f"memory {policy}   f{self.frame}   {' '.join(about['keys'])}"
        kept = {
            "keyboard": keyboard.tolist(),
            "mouse": mouse.tolist(),
            "poses": poses.tolist(),
            "policy": policy,
            "ms": info["ms"],
            "memory": picks,
            "psnr": psnr,
            "text": text + (f"   {psnr[-1]:.1f} dB" if psnr else ""),
        }
        self.ring.append((frames, kept, before, len(self.poses) - n // LATENT))
        with self.unless_full():
            self.store()

        # the true renderer may be shown instead; what is kept is what the model made
        self.screen.note(memory=picks)
        shown = frames
        total = 1000 * (time.monotonic() - began)
        about["ms"] = {**info["ms"], "encode": self.screen.encode, "total": total}
        truth = self.begun.truth
        if self.set["view"] == "truth" and truth:
            shown = true_views(truth, poses, *self.size)
        self.show(shown, poses, about, clear=self.game.phase == "replay")
        self.game.see(self, frames, poses)
        if time.monotonic() - self.tidied > TIDY:
            self.tidied = time.monotonic()
            give_back()

    def judge(self, frames: np.ndarray, poses: np.ndarray) -> list[float]:
        """PSNR of the last frame of every latent, where the truth is known and not itself shown."""
        truth = self.begun.truth
        if not truth or self.args.fake:
            return []
        ends = slice(LATENT - 1, None, LATENT)
        right = true_views(truth, poses[ends], *self.size)
        return film.psnr(frames[ends], right).tolist()

    def described(self, memory: list[dict]) -> list[dict]:
        """What was looked back at, where it was seen, and a small picture of it if one is kept."""
        picks = []
        for pick in memory:
            thumb = base64.b64encode(self.thumbs.get(pick["frame"], b"")).decode()
            seen_from = self.poses[-(-pick["frame"] // LATENT)]
            picks.append({**pick, "thumb": thumb, "pose": seen_from})
        return picks

    def remember(self, frames: np.ndarray, poses: np.ndarray) -> np.ndarray:
        """The walk is longer now. Returns the picture before it."""
        n = len(frames)
        before = self.newest
        for k in range(LATENT - 1, n, LATENT):
            self.thumbs[self.frame + k + 1] = jpeg_of(frames[k], THUMB)
        while len(self.thumbs) > THUMBS:  # those of the first two latents stay: one is the sink
            self.thumbs.pop(next(frame for frame in self.thumbs if frame > LATENT))
        self.undone.append((n, before))
        self.poses += map(tuple, poses[LATENT - 1 :: LATENT].tolist())
        self.frame += n
        self.newest = frames[-1]
        return before

    def undo(self) -> None:
        """Take back one chunk, or as many short ones as make a second."""
        taken = 0
        while self.undone and taken < SHOW_FPS:
            self.session.undo()
            n, self.newest = self.undone.pop()
            taken += n
            rows = self.walked.pop()
            if self.script:  # the walk of a link goes on from here: what was taken back comes again
                self.script = [np.concatenate(pair) for pair in zip(rows, self.script, strict=True)]
            if self.ring:
                self.ring.pop()
        self.frame -= taken
        self.poses = self.poses[: len(self.poses) - taken // LATENT]
        if self.recording and self.recording.undo(taken):
            # it began after the place where the player stands now: it holds nothing, and a new one begins
            self.save()
            self.record()
        self.set["view"] = "model"  # whose picture it is
        self.show(self.newest[None], self.poses[-1:], {"keys": [], "ms": {}}, clear=True)
