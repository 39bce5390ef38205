"""What recording.py promises."""

import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from game.scene import SPLITS
from page import recording

ROOT = Path(__file__).resolve().parent.parent


def save(path: Path, *size: int, mode: str = "RGB") -> Path:
    Image.effect_noise(size, 80).convert(mode).save(path)
    return path


def fake() -> recording.FakeSession:
    session = recording.FakeSession((32, 32))
    session.reset(None, "", 3, ())
    return session


def test_a_picture_of_any_size_is_cropped_and_it_says_so(tmp_path: Path) -> None:
    start = recording.open_start(save(tmp_path / "big.png", 400, 300), (64, 128), "big.png")
    assert (
        start.image.shape == (64, 128, 3)
        and "big.png: 400x300 → 128x64 centre crop" in start.note
        and start.truth is None
    )
    assert (
        "alpha dropped"
        in recording.open_start(
            save(tmp_path / "alpha.png", 64, 64, mode="RGBA"), (64, 64), "alpha.png"
        ).note
    )
    assert (
        "enlarged: it is smaller than the model's 64x64"
        in recording.open_start(save(tmp_path / "tiny.png", 8, 8), (64, 64), "tiny.png").note
    )


def test_an_unreadable_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for source, name in (
        (tmp_path / "bad.png", "bad.png"),
        (tmp_path / "gone.png", "gone.png"),
        (b"\x89PNG\r\n\x1a\n", "the dropped picture"),
    ):
        with pytest.raises(
            ValueError, match=f"{name} cannot be read as a picture .*; give a PNG or JPEG file"
        ):
            recording.open_start(source, (64, 64), name)


def test_a_start_picture_carries_its_world_and_the_truth(tmp_path: Path) -> None:
    start = recording.open_start(ROOT / "assets/start.png", (64, 64), "start.png")
    assert start.truth["scene"]["seed"] in SPLITS["test"], (
        "held out: no training has seen this world"
    )
    assert np.array_equal(start.image, np.array(Image.open(ROOT / "assets/start.png")))
    start.save(tmp_path / "again.png")
    again = recording.open_start(tmp_path / "again.png", (128, 128), "again.png")
    assert again.pose == start.pose and again.image.shape == (128, 128, 3), (
        "drawn again at the size that is asked for"
    )


@pytest.mark.parametrize(
    "text",
    [
        {"seed": '"x"', "kind": '"rooms"', "pose": "[0]"},
        {"seed": "1", "kind": '"nowhere"', "pose": "[0,0,0,0,0]"},
        {"seed": "{", "kind": "1", "pose": "[]"},
        {"seed": "1"},
    ],
)
def test_a_lying_picture_is_refused(tmp_path: Path, text: dict) -> None:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    Image.new("RGB", (64, 64)).save(tmp_path / "liar.png", pnginfo=info)
    with pytest.raises(ValueError, match="liar.png cannot be read"):
        recording.open_start(tmp_path / "liar.png", (64, 64), "liar.png")


def test_the_fake_session_is_the_game() -> None:
    session = fake()
    keyboard, mouse = torch.zeros(4, 6), torch.zeros(4, 2)
    mouse[:, 1] = 0.1
    frames, info = session.step(keyboard, mouse)
    assert frames.shape == (4, 32, 32, 3) and frames.dtype == torch.uint8
    assert np.array_equal(
        frames.numpy(), recording.true_views(session.inside, np.array(info["poses"]), 32, 32)
    )
    assert math.isclose(info["poses"][-1][4] - session.poses[0][4], 6.0, abs_tol=1e-5)


def test_a_fake_undo_and_a_restored_state_go_on_alike(tmp_path: Path) -> None:
    session, keyboard, mouse = fake(), torch.zeros(4, 6), torch.full((4, 2), 0.1)
    first = session.step(keyboard, mouse).frames
    session.undo()
    session.save(tmp_path / "state.safetensors")
    assert torch.equal(session.step(keyboard, mouse).frames, first)
    other = recording.FakeSession((32, 32))
    other.restore(tmp_path / "state.safetensors")
    assert torch.equal(other.step(keyboard, mouse).frames, first)


def test_start_up_prints_the_page_and_the_ssh_line(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "play.py"), "--fake", "--port", str(port)],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            env=env,
        )
        first, second = process.stdout.readline(), process.stdout.readline()
    other = int(first.rsplit(":", 1)[1])
    assert (
        first
        == f"Port {port} is taken (another play.py?). Using {other}: http://127.0.0.1:{other}\n"
        and port < other < port + 20
    )
    assert (
        second
        == f"Open from your machine:  ssh -L {other}:127.0.0.1:{other} <this host>  then http://127.0.0.1:{other}\n"
    )
    connection = http.client.HTTPConnection("127.0.0.1", other, timeout=10)
    connection.request("GET", "/state")
    assert json.loads(connection.getresponse().read())["preset"] == "fake"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_odd_sizes_are_refused_before_encoding(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="mp4 needs even sizes, got 63x65; nearest legal size: 64x66"
    ):
        recording.open_film(tmp_path / "odd.mp4", 16, (65, 63))
