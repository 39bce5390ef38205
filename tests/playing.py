"""A player without a model, a page without a browser: what the tests of play build the same way.

page(tmp_path)       the game itself behind a real server in this process: (player, server)
Viewer(server)       reads the stream of records like the page, and can post
dreaming(tmp_path)   a player whose model is a Dream: fast, deterministic, never the truth
"""

import argparse
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import camera
import play
import realtime
from engine.parts import Options
from page.player import Player
from page.server import bind

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENT = 300  # seconds a browser may need on a machine that is busy with other things


def arguments(*flags: str) -> argparse.Namespace:
    return play.parse([*flags])


def run(*flags: str, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    """play.py as a person starts it, on a machine without a screen."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    return subprocess.run(
        [sys.executable, str(ROOT / "play.py"), *flags],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
    )


def main(folder: Path, *flags: str) -> tuple[int, str]:
    """What main() returns and prints, run in that folder, without the price of another process."""
    here = Path.cwd()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    said = io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(said):
            return play.main([*flags]) or 0, said.getvalue()
    finally:
        os.chdir(here)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def page(tmp_path: Path, *flags: str):
    """A fake session behind a real server in this process: (player, server)."""
    args = arguments("--fake", "--size", "64x64", "--out", str(tmp_path / "session"), *flags)
    player = Player(args, 40)
    server = bind(player, args.host, 18000 + os.getpid() % 2000)
    player.start()
    try:
        wait_for(lambda: player.begun is not None)
        yield player, server
    finally:
        args.stop.set()
        player.join(30)
        server.shutdown()
        server.server_close()


def wait_for(condition, seconds: float = 20) -> None:
    """Until it holds; what never happens is a failure, not a wait."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def ask(
    server, method: str, path: str, body: object = None, headers: dict | None = None
) -> tuple[int, dict]:
    """Status and JSON of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, raw, headers or {})
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    return reply.status, json.loads(text) if text[:1] == b"{" else {}


class Viewer:
    """A page without a browser: reads the stream of records, acknowledges what it is told to."""

    def __init__(self, server) -> None:
        self.server = server
        self.connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        self.connection.request("GET", "/frames")
        self.socket = self.connection.sock
        self.stream = self.connection.getresponse()
        self.hello, _ = self.record()
        self.kept = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)

    def part(self) -> bytes:
        """Four bytes say how many follow."""
        return self.stream.read(int.from_bytes(self.stream.read(4), "big"))

    def record(self) -> tuple[dict, bytes]:
        """A header, and a JPEG or nothing."""
        header = json.loads(self.part())
        return header, self.part()

    def frame(self, ack: bool = True, **wanted: object) -> dict:
        """The header of the next frame that says what is wanted."""
        for _ in range(2000):
            header, jpeg = self.record()
            if jpeg and ack:
                self.post("/input", keys=[], shown=header["n"])
            if jpeg and all(header[key] == value for key, value in wanted.items()):
                return header
        raise AssertionError(f"no frame with {wanted}")

    def post(self, path: str, **body: object) -> tuple[int, dict]:
        return ask(self.server, "POST", path, {"id": self.hello["id"], **body})

    def tell(self, path: str, **body: object) -> None:
        """A post on a connection that stays open, as a browser's does."""
        self.kept.request("POST", path, json.dumps({"id": self.hello["id"], **body}).encode())
        assert self.kept.getresponse().read() == b""

    def close(self) -> None:
        self.kept.close()
        self.socket.shutdown(socket.SHUT_RDWR)
        self.stream.close()
        self.connection.close()


# ---- pictures and models -----------------------------------------------------------------------------------


def save(path: Path, *size: int, mode: str = "RGB") -> Path:
    Image.effect_noise(size, 80).convert(mode).save(path)
    return path


class Dream:
    """A stand-in for a model: chunks of 56 and then 40 frames, grey noise.

    It has the whole interface of realtime.Session.
    """

    def __init__(self, slow: float = 0.0) -> None:
        self.options = Options(device="cpu", dtype="float32")
        self.lengths = [10]
        self.policy = "camera"
        self.slow = slow

    def reset(self, image: torch.Tensor, prompt: str, seed: int, pose: tuple) -> realtime.Chunk:
        self.poses = [tuple(pose)]
        self.chunks: list[int] = []
        self.seed = seed
        self.image = image
        return realtime.Chunk(image[None], {"poses": self.poses, "memory": [], "ms": {}})

    @property
    def frames_needed(self) -> int:
        return 40 if self.chunks else 56

    def step(self, keyboard: torch.Tensor, mouse: torch.Tensor) -> realtime.Chunk:
        time.sleep(self.slow)
        n = len(keyboard)
        assert n == self.frames_needed
        for keys, turn in zip(keyboard.tolist(), mouse.tolist(), strict=True):
            self.poses.append(camera.step_pose(self.poses[-1], keys, turn))
        # other noise in every chunk, the same at every run
        noise = torch.Generator().manual_seed(self.seed + len(self.chunks))
        frames = torch.randint(0, 255, (n, *self.image.shape), generator=noise).byte()
        # as if five old latents were remembered, the last of them the sink
        read = (9, 7, 5, 3, 0) if self.chunks and self.policy != "none" else ()
        picks = [{"latent": k, "frame": 4 * k, "score": 0.5, "sink": k == 0} for k in read]
        self.chunks.append(n)
        ms = {"retrieve": 1.0, "denoise": 2.0, "decode": 3.0}
        return realtime.Chunk(frames, {"poses": self.poses[-n:], "memory": picks, "ms": ms})

    def undo(self) -> None:
        self.poses = self.poses[: -self.chunks.pop()]

    def save(self, path: Path) -> None:
        path.write_text("state")


def dreaming(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *flags: str,
    slow: float = 0.0,  # seconds per segment
    fps: int = 40,  # shown per second: at 4 a minute is 6 chunks
) -> Player:
    """A player whose model is a Dream, at the start of a walk."""
    dream = Dream(slow)
    monkeypatch.setattr(realtime, "open_session", lambda options, ranks: dream)
    player = Player(arguments("--out", str(tmp_path / "dream"), *flags), fps)
    player.open()
    return player


def act(player: Player, chord: str) -> None:
    """One chunk with these keys held."""
    n = player.session.frames_needed
    keyboard, mouse = (part.numpy() for part in camera.actions_from_keys([chord] * n))
    player.chunk(keyboard, mouse, {"keys": [chord]})
