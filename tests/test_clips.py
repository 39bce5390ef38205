"""A dataset larger than memory: cached latents in mapped files, read row by row."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_studio

import data
import dit
import vae
from dataset import episode
from engine import clips, flags, parts, run
from engine.clips import Column

ROOT = Path(clips.__file__).parents[1]


def test_a_column_over_several_files_is_one_tensor():
    whole = torch.arange(70).view(7, 2, 5)
    column = Column(list(whole.split([3, 1, 3])))
    assert len(column) == 7 and column.shape == (7, 2, 5)
    assert torch.equal(column[torch.tensor([6, 0, 3, 2])], whole[[6, 0, 3, 2]])
    assert torch.equal(column[2:5], whole[2:5]) and torch.equal(column[3], whole[3])
    again = Column(column.parts, torch.tensor([4, 4, 0]))
    assert torch.equal(again[:], whole[[4, 4, 0]])


@pytest.mark.long
def test_a_kill_while_encoding_loses_one_file_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_studio(tmp_path)
    monkeypatch.setattr(clips, "SHARD", 2)
    cfg = flags.parse(["--preset", "micro"])
    here = run.Run(tmp_path / "run", cfg, torch.device("cpu"), torch.float32)
    root = tmp_path / "datasets/micro"
    torch.manual_seed(0)
    encoder = vae.VAE(vae.PRESETS["micro"]).eval()

    reader = parts.text_encoder("micro", "")

    # killed in the second file
    encode, seen = clips.encode, []

    def until_the_third(*arguments: object) -> dict:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(arguments)
        return encode(*arguments)

    monkeypatch.setattr(clips, "encode", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        clips.load_clips(here, encoder, root, "train")
    assert len(list(root.glob("latents-train-*/*"))) == 1

    # the next start encodes the other two alone, and the rows are those of one go
    seen.clear()
    monkeypatch.setattr(clips, "encode", lambda *arguments: seen.append(1) or encode(*arguments))
    found = clips.load_clips(here, encoder, root, "train")
    assert len(seen) == 2 and len(found.latents) == 4
    for row, path in enumerate(clips.list_episodes(root, "train")):
        alone = encode(encoder, reader, clips.read_episode(path), here)
        assert torch.equal(found.latents[row], alone["latents"])
        assert torch.equal(found.revisit[row], alone["revisit"])


@pytest.fixture
def here(tmp_path: Path) -> run.Run:
    cfg = flags.parse(["--preset", "micro"])
    return run.Run(tmp_path / "run", cfg, torch.device("cpu"), torch.float32)


@pytest.fixture
def encoder() -> vae.VAE:
    torch.manual_seed(0)
    return vae.VAE(vae.PRESETS["micro"]).eval()


def test_the_words_of_a_clip_are_read_as_a_player_reads_them(
    tmp_path: Path, here: run.Run, encoder: vae.VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def text_encoder(preset: str, path: str) -> object:
        asked.append((preset, path))
        return lambda words: torch.full((4, 8), float(len(words)))

    monkeypatch.setattr(parts, "text_encoder", text_encoder)
    write_clips(tmp_path, [57])
    here.cfg = dataclasses.replace(here.cfg, init="somewhere")
    text = clips.load_clips(here, encoder, tmp_path, "train").text[:]
    words = episode.read_episode(tmp_path / "train/0").text
    assert asked == [("micro", "somewhere")]
    assert torch.equal(text, torch.full((1, 4, 8), float(len(words))).half())


def test_latents_with_words_that_no_player_reads_are_not_used_again(
    tmp_path: Path, here: run.Run, encoder: vae.VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clips(tmp_path, [57])
    paths = clips.list_episodes(tmp_path, "train")
    hashed = clips.digest_of(encoder, tmp_path, paths, here)
    monkeypatch.setattr(parts, "reads_umt5", lambda preset: True)
    assert clips.digest_of(encoder, tmp_path, paths, here) != hashed


def write_clips(root: Path, frames: list[int], first: int = 0) -> None:
    """The same names whatever is in them."""
    for number, count in enumerate(frames):
        clip = data.render_episode(data.DataConfig(size=64, frames=count), "train", first + number)
        episode.write_episode(root / f"train/{number}", clip)


def test_clips_that_are_written_again_under_their_names_are_encoded_again(
    tmp_path: Path, here: run.Run, encoder: vae.VAE
):
    write_clips(tmp_path, [57, 57])
    old = clips.load_clips(here, encoder, tmp_path, "train").latents[:]
    assert torch.equal(clips.load_clips(here, encoder, tmp_path, "train").latents[:], old)
    assert len(list(tmp_path.glob("latents-train-*"))) == 1, "the same clips are encoded once"
    write_clips(tmp_path, [57, 57], first=5)
    new = clips.load_clips(here, encoder, tmp_path, "train").latents[:]
    reader = parts.text_encoder("micro", "")
    right = clips.encode(encoder, reader, episode.read_episode(tmp_path / "train/1"), here)
    assert torch.equal(new[1], right["latents"]) and not torch.equal(new, old)

    # another network has other words
    size = dataclasses.replace(dit.PRESETS["micro"], text_dim=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dit.PRESETS, "micro", size)
        assert clips.load_clips(here, encoder, tmp_path, "train").text.shape[2] == 4

    # another precision makes other latents
    half = dataclasses.replace(here, dtype=torch.bfloat16)
    assert not torch.equal(clips.load_clips(half, encoder, tmp_path, "train").latents[:], new)


def test_episodes_of_another_size_and_folders_that_cannot_be_written_are_said(
    tmp_path: Path, here: run.Run, encoder: vae.VAE, monkeypatch: pytest.MonkeyPatch
):
    write_clips(tmp_path, [57])
    with monkeypatch.context() as patch:
        patch.setitem(parts.SIZES, "micro", (32, 32))
        with pytest.raises(ValueError, match="57 frames of 64x64, and this --preset .* of 32x32"):
            clips.load_clips(here, encoder, tmp_path, "train")

    def full(*_: object) -> None:
        raise OSError("Read-only file system")

    monkeypatch.setattr(clips.weights, "write_weights", full)
    with pytest.raises(OSError, match="Read-only .*; episodes are kept as latents beside them, in"):
        clips.load_clips(here, encoder, tmp_path, "train")


@pytest.mark.parametrize(
    "frames, says",
    [
        (
            [61, 57, 61],
            "train/1 has 57 frames of 64x64, most of this split have 61 frames of 64x64",
        ),
        ([53, 53], "train/0 has 53 frames of 64x64.* 57 frames or longer"),
    ],
)
def test_an_episode_that_does_not_fit_is_named_before_any_is_encoded(
    frames: list[int], says: str, tmp_path: Path, here: run.Run, encoder: vae.VAE
):
    write_clips(tmp_path, frames)
    with pytest.raises(ValueError, match=says) as error:
        clips.load_clips(here, encoder, tmp_path, "train")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("latents-*"))


def test_a_clip_too_short_for_the_vae_is_named(tmp_path: Path):
    write_clips(tmp_path, [33, 29])
    with pytest.raises(ValueError, match="train/1 has 29 frames of 64x64; .* 33 frames or more"):
        clips.read_videos(tmp_path)


def test_views_of_different_length_are_not_mixed(
    monkeypatch: pytest.MonkeyPatch, here: run.Run, encoder: vae.VAE
):
    def of_length(run: run.Run, vae: vae.VAE, root: Path, split: str) -> clips.Clips:
        latents = torch.zeros(2, 4, 15 if split == "third" else 21, 2, 2)
        names = [field.name for field in dataclasses.fields(clips.Clips)]
        return clips.Clips(**dict.fromkeys(names, Column([latents])))

    monkeypatch.setattr(clips, "load_clips", of_length)
    with pytest.raises(ValueError, match=r"train \(4, 21, 2, 2\) and third \(4, 15, 2, 2\)"):
        clips.seen_by("both", here, encoder, Path("x"))


# ---- how much memory a training holds, for datasets of different size

MEASURE = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from engine import clips, weights
torch.set_num_threads(1)
def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
latents = torch.randn(clips.SHARD, 16, 61, 8, 8).half()
def measure(folder, episodes):
    files = []
    for first in range(0, episodes, clips.SHARD):
        files.append(folder / f"{{first:05d}}.safetensors")
        weights.write_weights(files[-1], {{"latents": latents}}, {{}})
    before = held()
    column = clips.Column([weights.read_weights(file)[0]["latents"] for file in files])
    total = 0.0
    for step in range(100):
        rows = torch.randint(len(column), (8,), generator=torch.Generator().manual_seed(step))
        total += column[rows].float().sum().item()
    print(len(column), held() - before, flush=True)
for episodes in (clips.SHARD, 10 * clips.SHARD):
    child = os.fork()  # each begins with the same memory
    if not child:
        folder = Path(sys.argv[1]) / str(episodes)
        folder.mkdir()
        measure(folder, episodes)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own numbers")
def test_ten_times_as_many_episodes_hold_the_same_memory(tmp_path: Path):
    command = [sys.executable, "-c", MEASURE.format(root=str(ROOT)), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(done.stdout)
    first, second = done.stdout.splitlines()
    one, few = map(int, first.split())
    ten, many = map(int, second.split())
    assert ten == 10 * one
    assert many < few + 8 * 1024  # kB; ten times as many latents are 70 MB more
