"""What episode.py and film.py promise: a folder from anybody ends in an episode or in words."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from dataset.episode import FILES, inspect, read_episode, sha256_of, write_episode
from dataset.film import psnr, read_video, write_mp4
from lab import metrics


def test_psnr_and_ssim_know_their_limits() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 32, 32, 3, generator=generator) * 0.5
    assert psnr(x, x).tolist() == [50, 50]
    assert torch.allclose(metrics.ssim(x, x), torch.ones(2))
    brighter = psnr(x, x + 0.1)
    assert torch.allclose(brighter, torch.full((2,), 20.0), atol=1e-3)  # 10 log10(1 / 0.01)
    assert metrics.ssim(x, x.flip(1)).max() < 0.2
    assert psnr((x[:1] * 255).byte(), x[:1]) > 45

    upper = torch.zeros(2, 32, 32)
    upper[:, :16] = 1
    half = x.clone()
    half[:, 16:] = 0
    assert psnr(x, half, upper).tolist() == [50, 50]


# ---- hostile folders ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = data.DataConfig(size=32, frames=9)
    clip = data.render_episode(cfg, "third", 0)
    return write_episode(tmp_path_factory.mktemp("good") / "clip", clip)


@pytest.fixture
def clip(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "clip"))


def set_meta(**values: object) -> Callable[[Path], None]:
    """Change entries of meta.json and sign them, as whoever made the folder can."""

    def spoil(clip: Path) -> None:
        file = clip / "meta.json"
        meta = json.loads(file.read_text()) | values
        file.write_text(json.dumps(meta))
        (clip / "_DONE").write_text(sha256_of(file))

    return spoil


def set_text(file: str, text: str) -> Callable[[Path], None]:
    return lambda clip: (clip / file).write_text(text)


def set_bytes(file: str, value: bytes) -> Callable[[Path], None]:
    return lambda clip: (clip / file).write_bytes(value)


def foreign_member(clip: Path) -> None:
    with zipfile.ZipFile(clip / "pose/video.npz", "w") as archive:
        archive.writestr("data", "no array")


def frames_of_a_terabyte(clip: Path) -> None:
    """A header alone: who trusts it asks for more memory than there is."""
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (9, 99999999, 9999), }"
    size = len(header).to_bytes(2, "little")
    array = b"\x93NUMPY\x01\x00" + size + header.encode()
    with zipfile.ZipFile(clip / "player/video.npz", "w") as archive:
        archive.writestr("data.npy", array)


SPOILED = {
    "meta is a list": set_text("meta.json", "[1]"),
    "meta is a number": set_text("meta.json", "7"),
    "meta is too deep": set_text("meta.json", "[" * 100_000),
    "words are a list": set_text("prompt/video.json", "[]"),
    "words without a scene": set_text("prompt/video.json", '{"simple": {"full": "x"}}'),
    "words are numbers": set_text("prompt/video.json", '{"simple": {"full": 1, "scene": 2}}'),
    "mark is no text": set_bytes("_DONE", b"\xff\xfe\x00"),
    "foreign member": foreign_member,
    "array larger than memory": frames_of_a_terabyte,
    "no fps": set_meta(fps=None),
    "fps is infinite": set_meta(fps=float("inf")),
    "fps is zero": set_meta(fps=0),
    "metric is a word": set_meta(metric="yes"),
    "no such view": set_meta(view="second"),
    "sums are a list": set_meta(sha256=["a"]),
    "scene is a word": set_meta(scene="rooms"),
    "scene has no seed": set_meta(scene={"kind": "rooms"}),
    "seed is a word": set_meta(scene={"seed": "1", "kind": "rooms"}),
    "seed is negative": set_meta(scene={"seed": -1, "kind": "rooms"}),
    "seed is huge": set_meta(scene={"seed": 10**300, "kind": "rooms"}),
    "kind is a list": set_meta(scene={"seed": 1, "kind": ["rooms"]}),
    "no such kind": set_meta(scene={"seed": 1, "kind": "forest"}),
    "scene says more": set_meta(scene={"seed": 1, "kind": "rooms", "size": 9}),
    "character is a word": set_meta(character="me"),
    "character is none": set_meta(character=10**12),
}


@pytest.mark.parametrize("name", SPOILED)
def test_whatever_a_folder_holds_its_fault_is_words(
    name: str, clip: Path, capsys: pytest.CaptureFixture
) -> None:
    assert inspect(clip, hashes=True)[1] == []
    SPOILED[name](clip)
    with pytest.raises(ValueError, match="clip: "):
        read_episode(clip)
    assert data.check(clip.parent) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 clips, 1 bad"


@pytest.mark.parametrize("name", ["/dev/zero", "../secret.txt", "x" * 5000, "rgb"])
def test_only_files_of_an_episode_are_opened(name: str, clip: Path) -> None:
    (clip.parent / "secret.txt").write_text("mine")
    set_meta(sha256={name: "0" * 64})(clip)
    _, wrong = inspect(clip, hashes=True)
    assert len(wrong) == 1
    assert "no file of an episode is called" in wrong[0]


def test_a_device_in_the_place_of_a_file_is_not_read(clip: Path) -> None:
    for file in sorted(FILES - {"meta.json"}):
        (clip / file).unlink()
        os.symlink("/dev/zero", clip / file)
    episode, wrong = inspect(clip, hashes=True)
    assert episode is None
    assert "not a regular file" in wrong[0]


@pytest.mark.parametrize("name", ["meta.json", "prompt"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(name: str, clip: Path) -> None:
    """A file, or a folder of files: the words of somebody else's secret would be printed and trained on."""
    outside = clip.with_name(f"outside-{name}")
    (clip / name).rename(outside)
    (clip / name).symlink_to(outside)
    episode, (problem,) = inspect(clip)
    assert episode is None and "is a link that leads out of the folder" in problem

    # who keeps a whole clip elsewhere may point at it
    (clip / name).unlink()
    outside.rename(clip / name)
    clip.with_name("pointer").symlink_to(clip)
    assert inspect(clip.with_name("pointer"))[1] == []


def test_a_clip_of_one_frame_is_filtered(clip: Path, tmp_path: Path) -> None:
    e = read_episode(clip)
    names = ("video", "c2w", "K", "keyboard", "mouse", "valid", "contact", "player")
    first = {name: np.array(getattr(e, name)[:1]) for name in names}
    short = data.Episode(**first, prompt=e.prompt, meta=e.meta)
    write_episode(tmp_path / "short/one", short)
    assert data.check(tmp_path / "short") == 1


def test_only_an_episode_or_a_part_of_one_is_replaced(clip: Path, tmp_path: Path) -> None:
    e = read_episode(clip)
    place = tmp_path / "place"
    write_episode(place, e)
    (place / "_DONE").unlink()
    shutil.rmtree(place / "rgb")
    assert inspect(write_episode(place, e), hashes=True)[1] == [], (
        "what a kill has left is replaced"
    )

    (place / "rgb/000000.png").write_text("somebody's")
    with pytest.raises(
        ValueError, match="place holds rgb/000000.png, which is no part of an episode"
    ):
        write_episode(place, e)
    assert (place / "rgb/000000.png").read_text() == "somebody's"
    (tmp_path / "link").symlink_to(place)
    with pytest.raises(ValueError, match="link is no folder"):
        write_episode(tmp_path / "link", e)


def test_what_would_be_unpacked_to_more_than_its_frames_need_is_refused(clip: Path) -> None:
    with np.load(clip / "pose/video.npz") as stored:
        arrays = dict(stored)
    np.savez_compressed(clip / "pose/video.npz", **arrays, more=np.zeros(1_000_000))
    assert (clip / "pose/video.npz").stat().st_size < 20_000
    with pytest.raises(ValueError, match="more than its frames can need"):
        read_episode(clip)


def test_a_film_of_any_rate_is_written(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", np.zeros((4, 32, 32, 3), np.uint8), 29.97)
    frames, native = read_video(tmp_path / "a.mp4")
    assert len(frames) == 4 and native == (32, 32)


def test_a_full_disk_is_named_with_the_episode_and_leaves_no_draft(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("1000 requested and 53 written")

    good = read_episode(clip)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="cannot write .*other: 1000 requested .*; make room"):
        write_episode(clip.with_name("other"), good)
    assert [path.name for path in clip.parent.iterdir()] == ["clip"]
