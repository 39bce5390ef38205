"""Frames out, keys in: the page over plain HTTP."""

import base64
import contextlib
import io
import json
import math
import re
import secrets
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

import camera

HERE = Path(__file__).resolve().parents[1]
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
        keyboard, mouse = (part.numpy() for part in camera.actions_from_keys(chords))
        mouse = mouse + turn * LOOK_PER_PIXEL / n
        said = {"keys": sorted(held | set(taps)), "clipped": bool(np.abs(mouse).max() > MAX_LOOK)}
        return *legal(keyboard, mouse, pitch, limit), said


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
            self.reply(200, (HERE / "page/index.html").read_bytes(), "text/html; charset=utf-8")
        elif route == "/state":
            self.reply(200, player.state())
        else:
            with player.screen.seat() as viewer:
                self.stream(player, viewer)

    def stream(self, player: object, viewer: str | None) -> None:
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


def bind(player: object, host: str, port: int) -> ThreadingHTTPServer:
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
