"""What a start picture promises: it is cropped and says so, or brings its world along."""

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from playing import ROOT, act, dreaming, save

from game.scene import SPLITS
from page import commands
from page.start import open_start


def test_a_picture_of_any_size_is_cropped_and_it_says_so(tmp_path: Path) -> None:
    start = open_start(save(tmp_path / "big.png", 400, 300), (64, 128), "big.png")
    assert (
        start.image.shape == (64, 128, 3)
        and "big.png: 400x300 → 128x64 centre crop" in start.note
        and start.truth is None
    )
    assert (
        "alpha dropped"
        in open_start(save(tmp_path / "alpha.png", 64, 64, mode="RGBA"), (64, 64), "alpha.png").note
    )
    assert (
        "enlarged: it is smaller than the model's 64x64"
        in open_start(save(tmp_path / "tiny.png", 8, 8), (64, 64), "tiny.png").note
    )


def test_an_unreadable_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for source, name in (
        (tmp_path / "bad.png", "bad.png"),
        (b"\x89PNG\r\n\x1a\n", "the dropped picture"),
    ):
        with pytest.raises(
            ValueError, match=f"{name} cannot be read as a picture .*; give a PNG or JPEG file"
        ):
            open_start(source, (64, 64), name)
    with pytest.raises(ValueError, match="gone.png does not exist; give a PNG or JPEG file"):
        open_start(tmp_path / "gone.png", (64, 64), "gone.png")


def test_a_start_picture_carries_its_world_and_the_truth(tmp_path: Path) -> None:
    start = open_start(ROOT / "assets/start.png", (64, 64), "start.png")
    assert start.truth["scene"]["seed"] in SPLITS["test"], (
        "held out: no training has seen this world"
    )
    assert np.array_equal(start.image, np.array(Image.open(ROOT / "assets/start.png")))
    assert start.note.endswith("held out")
    start.save(tmp_path / "again.png")
    again = open_start(tmp_path / "again.png", (128, 128), "again.png")
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
        {"seed": "[" * 50_000, "kind": '"rooms"', "pose": "[0]"},
        {"seed": "1", "kind": '"rooms"', "pose": "[" * 50_000},
        {"seed": "1", "kind": '"rooms"', "pose": "[0, -1.6, 0, 0, 0]"},
        {"seed": "1", "kind": '"rooms"', "pose": "[1e9, -1.6, 1e9, 0, 0]"},
        {"seed": "1", "kind": '"rooms"', "pose": "[3.5, 1e300, 3.5, 0, 0]"},
        {"seed": "1.5", "kind": '"rooms"', "pose": "[3.5, -1.6, 3.5, 0, 0]"},
        {"seed": "1" + 30 * "0", "kind": '"rooms"', "pose": "[3.5, -1.6, 3.5, 0, 0]"},
    ],
)
def test_a_lying_picture_is_refused(tmp_path: Path, text: dict) -> None:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    Image.new("RGB", (64, 64)).save(tmp_path / "liar.png", pnginfo=info)
    with pytest.raises(ValueError, match="liar.png cannot be read"):
        open_start(tmp_path / "liar.png", (64, 64), "liar.png")


def test_turns_of_a_picture_s_pose_are_counted_from_none(tmp_path: Path) -> None:
    """A heading of a million degrees would be no heading any more before the walk ends."""
    start = open_start(ROOT / "assets/start.png", (64, 64), "start.png")
    turned = (*start.pose[:4], start.pose[4] + 360 * 2777)
    replace(start, pose=turned).save(tmp_path / "turned.png")
    again = open_start(tmp_path / "turned.png", (64, 64), "turned.png")
    assert again.pose == pytest.approx(start.pose)
    assert np.array_equal(again.image, start.image)


def test_a_picture_that_a_model_made_in_a_known_world_is_kept(tmp_path: Path) -> None:
    start = open_start(ROOT / "assets/start.png", (64, 64), "start.png")
    made = replace(start, image=255 - start.image, kept=True)
    made.save(tmp_path / "made.png")
    again = open_start(tmp_path / "made.png", (64, 64), "made.png")
    assert again.kept and again.truth == start.truth and again.pose == start.pose
    assert np.array_equal(again.image, made.image)


def test_a_format_that_starts_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.eps"
    Image.new("RGB", (64, 64)).save(path)
    with pytest.raises(ValueError, match="picture.eps cannot be read as a picture"):
        open_start(path, (64, 64), "picture.eps")


@pytest.mark.parametrize("pose", ["[" * 50_000, "[0, -1.6, 0, 0, 0]"])
def test_a_refused_picture_stops_neither_the_player_nor_its_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pose: str
) -> None:
    info = PngImagePlugin.PngInfo()
    for key, value in {"seed": "1", "kind": '"rooms"', "pose": pose}.items():
        info.add_text(key, value)
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "PNG", pnginfo=info)

    player = dreaming(tmp_path, monkeypatch)
    act(player, "w")
    data = base64.b64encode(stream.getvalue()).decode()
    commands.obey(player, {"cmd": "image", "data": data})
    notes = [note.get("info", "") for _, note in player.screen.notes]
    assert any("the new picture cannot be read as a picture" in note for note in notes)
    assert player.recording and player.frame == 56
    act(player, "w")
    assert player.frame == 96
