"""The thread that owns the model: what a viewer asks for becomes frames."""

import argparse
import base64
import functools
import json
import math
import queue
import secrets
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch

import camera
import realtime
import world
from dataset import episode
from page import recording, server

HERE = Path(__file__).resolve().parents[1]


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


def explain(error: BaseException) -> str:
    """One paragraph instead of a traceback, with the way out where it is known."""
    text = str(error) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        peak = torch.cuda.max_memory_allocated() / 1e9
        return f"out of memory, peak {peak:.1f} GB; the session is saved. Options, cheapest first: --vae light75 · --int8 · --preset small\n{text}"
    if "MPS" in text:
        return f"{text.splitlines()[0]}; run with PYTORCH_ENABLE_MPS_FALLBACK=1 or --device cpu"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


known_scene = functools.lru_cache(maxsize=4)(world.make_scene)


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
            server.Controls(),
            server.Screen(),
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
            recording.FakeSession(args.size, args.view)
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
            video = episode.read_episode(folder).video
            self.seed, self.prompt, trail = (
                said["seed"],
                said["prompt"],
                [tuple(pose) for pose in said["trail"] + said["poses"][:: server.LATENT]],
            )
            note = f"{folder} goes on at frame {server.LATENT * (len(trail) - 1)}"
            self.reset(
                recording.Start(np.array(video[-1]), note, said["truth"], trail[-1]),
                folder / "state.safetensors",
                trail,
            )
        else:
            self.reset(
                recording.open_start(
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
        self, start: recording.Start, state: Path | None = None, trail: list[tuple] | None = None
    ) -> None:
        """Begin (again) from a start picture, or go on from a saved state; what was played so far is saved."""
        self.save()
        self.begun, self.times, self.plan, n = (
            start,
            [],
            None,
            server.LATENT * (1 if self.args.fake else self.session.options.new),
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
        self.frame, self.thumbs = (
            server.LATENT * (len(self.poses) - 1),
            {0: server.jpeg_of(self.newest, 64)},
        )
        self.record()
        self.screen.note(reset=True, truth=bool(start.truth), info=start.note)
        self.show(self.newest[None], self.poses[-1:], {"keys": [], "ms": {}}, clear=True)

    def camera(self, poses: torch.Tensor) -> torch.Tensor:  # (n, 5) float64 → (n, 4, 4)
        """In the player's eye, or behind him: as far as the walls allow, where they are known."""
        if self.args.view == "first":
            return torch.from_numpy(episode.poses_to_c2w(poses))
        truth = self.session.inside if self.args.fake else self.begun.truth
        return (
            torch.from_numpy(world.eyes(truth, poses.numpy()))
            if truth
            else camera.behind(poses, world.MAX_PITCH)
        )

    def record(self) -> None:
        """A new folder, from the newest frame on or from the last minute, if that went unrecorded. With a trail it cannot be replayed."""
        image, n = self.ring[0][2:] if self.ring else (self.newest, len(self.poses))
        said = recording.about(self.args) | {
            "seed": self.seed,
            "prompt": self.prompt,
            "truth": self.begun.truth,
            "trail": self.poses[: n - 1],
        }
        self.recording = recording.Recording(
            recording.free_folder(self.args.out),
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
            "slots": self.session.frames_needed // server.LATENT,
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
                "psnr": psnr[k // server.LATENT] if psnr else None,
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
            chords = [slots[min(t // server.LATENT, len(slots) - 1)] for t in range(n)]
            keyboard, mouse = camera.actions_from_keys(chords)
            keyboard, mouse = server.legal(keyboard.numpy(), mouse.numpy(), pitch, self.max_pitch)
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
            slice(server.LATENT - 1, n, server.LATENT),
        )  # the last frame of every latent
        self.times = [*self.times[:1], *self.times[1:][-4:], (n, time.monotonic() - began)]
        judged = truth and not self.args.fake
        said["psnr"] = (
            episode.psnr(
                frames[ends], recording.true_views(truth, poses[ends], *self.size)
            ).tolist()
            if judged
            else []
        )
        picks = [
            {
                **pick,
                "thumb": base64.b64encode(self.thumbs.get(pick["frame"], self.thumbs[0])).decode(),
                "pose": self.poses[-(-pick["frame"] // server.LATENT)],
            }
            for pick in info["memory"]
        ]
        self.thumbs |= {self.frame + k + 1: server.jpeg_of(frames[k], 64) for k in range(n)[ends]}
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
                len(self.poses) - n // server.LATENT,
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
            recording.true_views(truth, poses, *self.size)
            if self.set["view"] == "truth" and truth
            else frames,
            poses,
            said,
        )

    def undo(self) -> None:
        """Take back one chunk, or as many short ones as make a second."""
        taken = 0
        while self.undone and taken < server.SHOW_FPS:
            self.session.undo()
            n, self.newest = self.undone.pop()
            taken += n
            self.ring = deque([*self.ring][:-1], self.ring.maxlen)
        self.frame, self.poses = (
            self.frame - taken,
            self.poses[: len(self.poses) - taken // server.LATENT],
        )
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
                    "+".join(sorted(set(slot) & set(server.KEYS))) or "_"
                    for slot in body["plan"][:64]
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
                    start = recording.open_start(
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
                    [key for key in body.get("keys", [])[:16] if key in server.KEYS],
                    max(-4e3, min(4e3, dx)),
                    max(-4e3, min(4e3, dy)),
                )
        elif body.get("cmd") not in server.COMMANDS or not self.screen.plays(viewer):
            return (
                (403, "another tab plays, this one watches")
                if body.get("cmd") in server.COMMANDS
                else (400, f"unknown command; use one of {server.COMMANDS}")
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
