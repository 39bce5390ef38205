"""What data.py promises.

The quadruplet stays together, bad data is named, killed runs resume, foreign clips read alike.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import camera
import context
import data
import world
from dataset import readers
from dataset.episode import (
    Episode,
    filters,
    inspect,
    list_episodes,
    poses_to_c2w,
    problems,
    read_episode,
    sha256_of,
    write_episode,
)
from dataset.film import read_video, write_mp4
from engine import cli
from game.scene import SPLITS

ROOT = Path(__file__).resolve().parent.parent
FEW = {"frames": 41, "train": 3, "third": 1, "tune": 1, "test": 1}
SMALL = replace(data.PRESETS["micro"], **FEW)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.make_dataset(tmp_path_factory.mktemp("dataset"), cfg=SMALL, workers=1)


@pytest.fixture
def episode(dataset: Path, tmp_path: Path) -> Path:
    """One episode that a test may spoil."""
    return Path(shutil.copytree(list_episodes(dataset, "train")[0], tmp_path / "clip"))


def clip_of(dataset: Path, split: str, number: int = 0) -> Episode:
    return read_episode(list_episodes(dataset, split)[number])


# ---- video, pose, action, prompt ---------------------------------------------------------------------------


def test_every_episode_has_video_pose_action_prompt(dataset: Path) -> None:
    e = clip_of(dataset, "train", 1)
    shapes = {
        "video": (41, 64, 64, 3),
        "c2w": (41, 4, 4),
        "K": (41, 4),
        "keyboard": (41, 6),
        "mouse": (41, 2),
        "valid": (41,),
    }
    assert {name: getattr(e, name).shape for name in shapes} == shapes
    assert e.video.dtype == np.uint8
    assert e.video.max() > e.video.min()
    assert e.keyboard.max() == 1
    assert "walls" in e.text


def test_a_latent_sees_the_actions_that_made_it(dataset: Path) -> None:
    e = clip_of(dataset, "train")
    mouse = torch.as_tensor(e.mouse)
    windows = context.action_windows(mouse[None], 5, 1)  # latent 5: frames 17 .. 20
    assert torch.equal(windows[0, 0], mouse[8:20])  # 4i−12 .. 4i−1

    pose = tuple(map(float, e.player[16]))
    for t in range(16, 20):
        keys = e.keyboard[t].tolist()
        pose = camera.step_pose(pose, keys, e.mouse[t].tolist())
    arrived = np.allclose(pose, e.player[20], atol=1e-4)
    assert arrived or e.contact[16:20].any()


def test_a_frame_drawn_again_from_its_stored_camera_is_identical(dataset: Path) -> None:
    some = slice(7, 11)
    for split in ("train", "third"):
        e = clip_of(dataset, split)
        again = world.true_frames(e.meta, e.c2w[some], 64, 64, e.player[some])
        assert np.array_equal(again, e.video[some])
    empty = world.true_frames(e.meta, e.c2w[some], 64, 64)
    assert not np.array_equal(empty, e.video[some])  # the figure is really there


def test_a_clip_is_read_within_a_millisecond(dataset: Path) -> None:
    e = clip_of(dataset, "train")
    took = []
    for _ in range(20):
        began = time.perf_counter()
        np.array(e.video[:57])
        took.append(time.perf_counter() - began)
    assert np.median(took) < 1e-3


# ---- making a dataset --------------------------------------------------------------------------------------


def hashes(root: Path) -> dict[str, str]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    whole = [path for path in files if "/." not in str(path)]
    return {str(path.relative_to(root)): sha256_of(path) for path in whole}


PROGRAM = f"""
import sys
from dataclasses import replace

import data

if __name__ == "__main__":
    cfg = replace(data.PRESETS["micro"], **{FEW})
    data.make_dataset(sys.argv[1], cfg=cfg, workers=2)
"""


@pytest.mark.long
def test_a_killed_run_resumes_to_the_same_dataset(dataset: Path, tmp_path: Path) -> None:
    file = tmp_path / "go.py"
    file.write_text(PROGRAM)
    out = tmp_path / "out"
    command = [sys.executable, str(file), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    go = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    # killed as soon as there is one episode
    deadline = time.monotonic() + 40
    while not list(out.glob("*/*/_DONE")) and time.monotonic() < deadline:
        time.sleep(0.02)
    go.send_signal(signal.SIGKILL)
    go.wait()
    data.make_dataset(out, cfg=SMALL, workers=1)
    assert hashes(out) == hashes(dataset)  # and two workers made what one makes


def test_a_full_disk_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def no_room(*job: object) -> None:
        tried.append(job)
        time.sleep(0.1)  # as long as an episode takes: whoever waits for it can stop the others
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "make_episode", no_room)
    with pytest.raises(OSError, match="No space left"):
        data.make_dataset(tmp_path, cfg=SMALL, workers=1)
    assert len(tried) < 6  # of six episodes, three times each


def test_what_fails_three_times_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(*job: object) -> None:
        tried.append(job)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(data, "make_episode", broken)
    with pytest.raises(ValueError, match="6 episodes failed 3 times.*out of memory"):
        data.make_dataset(tmp_path, cfg=SMALL, workers=1)
    assert len(tried) == 18


def test_a_half_written_episode_is_never_listed(dataset: Path, episode: Path) -> None:
    root = episode.parent
    shutil.copytree(episode, root / ".other.part")
    unfinished = Path(shutil.copytree(episode, root / "third"))
    (unfinished / "_DONE").unlink()
    assert list_episodes(root) == [episode]
    with pytest.raises(ValueError, match="no episodes in .*python data.py make"):
        list_episodes(root / "nowhere")


def test_splits_share_no_scene(dataset: Path) -> None:
    seeds = [read_episode(p).meta["scene"]["seed"] for p in list_episodes(dataset)]
    assert len(set(seeds)) == len(seeds) == 6
    assert clip_of(dataset, "test").meta["scene"]["seed"] in SPLITS["test"]


# ---- bad input ---------------------------------------------------------------------------------------------


def spoil(path: Path, file: str, **arrays: np.ndarray) -> None:
    stored = dict(np.load(path / file))
    np.savez(path / file, **{**stored, **arrays})


def test_a_bad_folder_is_named_precisely(episode: Path, capsys: pytest.CaptureFixture) -> None:
    c2w = np.load(episode / "pose/video.npz")["data"]
    bent = c2w.copy()
    bent[3, :3, :3] *= 1.1
    lost = c2w.copy()
    lost[5, 0, 3] = np.nan
    cases = {
        "not a rotation": bent,
        "NaN or infinite at frame 5": lost,
        "w2c, invert it": np.linalg.inv(c2w),
        "expected (41, 4, 4), found (40, 4, 4)": c2w[:40],
    }
    for text, bad in cases.items():
        spoil(episode, "pose/video.npz", data=bad.astype(np.float32))
        with pytest.raises(ValueError) as error:
            read_episode(episode)
        for part in (text, str(episode), "pose/video.npz"):
            assert part in str(error.value)
    assert data.check(episode.parent) == 1
    assert "pose/video.npz" in capsys.readouterr().out


def test_truncated_and_tampered_frames_are_found(
    episode: Path, capsys: pytest.CaptureFixture
) -> None:
    assert data.check(episode.parent) == 0
    capsys.readouterr()
    frames = episode / "rgb/video.npy"
    whole = frames.read_bytes()
    frames.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert inspect(episode)[1] == []
    changed = ["rgb/video.npy: changed since it was written"]
    assert inspect(episode, hashes=True)[1] == changed
    frames.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        read_episode(episode)


def test_missing_and_contradicting_files_are_found(episode: Path) -> None:
    meta = episode / "meta.json"
    meta.write_text(meta.read_text().replace('"T": 41', '"T": 45'))
    assert "meta.json says [45, 64, 64]" in inspect(episode)[1][0]
    (episode / "action/video.npz").unlink()
    assert "action/video.npz" in inspect(episode)[1][0]
    with pytest.raises(ValueError, match="no file _DONE"):
        read_episode(episode.parent)


def test_nothing_unusable_is_written(episode: Path, tmp_path: Path) -> None:
    good = read_episode(episode)
    names = ("video", "c2w", "K", "keyboard", "mouse", "valid", "contact", "player")
    cut = {name: getattr(good, name)[:40] for name in names}
    bad = {
        "expected 4k\\+1 frames, found 40": replace(good, **cut),
        "multiples of 16": replace(good, video=good.video[:, :60]),
        "focal lengths": replace(good, K=good.K / 64),
        "expected 0 or 1": replace(good, keyboard=good.keyboard + 1),
    }
    for text, clip in bad.items():
        with pytest.raises(ValueError, match=text):
            write_episode(tmp_path / "bad", clip)
    assert not (tmp_path / "bad").exists()


def command(*words: object) -> int | None:
    return data.main([str(word) for word in words])


def test_the_command_exits_2_on_a_bad_dataset(episode: Path) -> None:
    (episode / "pose/video.npz").write_bytes(b"")
    assert command("check", episode.parent) == 2
    with pytest.raises(ValueError, match="make takes no path; did you mean --out mine"):
        data.main(["make", "mine"])
    with pytest.raises(ValueError, match="--out must end in .mp4, got v.gif"):
        data.main(["view", "mine", "--out", "v.gif"])
    with pytest.raises(ValueError, match="--size must be 1 to 10000, got 1000000"):
        data.main(["ingest", "--format", "vipe", "--size", "1000000", "mine"])
    with pytest.raises(ValueError, match="needs a path"):
        command("view")


@pytest.mark.parametrize(
    "words, message",
    [
        ("mkae", "did you mean make?"),
        ("make --presett tiny", "did you mean --preset?"),
        ("ingest --format re10 x", "did you mean re10k?"),
        ("make --workers 0", "--workers must be 1 to 10000, got 0"),
        ("explore --count -3", "--count must be 1 to 10000, got -3"),
        ("record --seed -1", "--seed must not be negative, got -1"),
    ],
)
def test_a_mistyped_command_says_what_was_meant(words: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        command(*words.split())
    assert message in str(error.value)


def spoiled_clips(good: Episode) -> dict[str, Episode]:
    """What is wrong -> the clip."""
    video = np.array(good.video)
    far = good.player.copy()
    far[20:, 0] += 1
    spun = good.player.copy()
    spun[10:, 4] += 40
    smeared = video.mean((2,), keepdims=True).astype(np.uint8)
    return {
        "teleport": replace(good, player=far),
        "spin": replace(good, player=spun),
        "frozen": replace(good, video=np.repeat(video[:1], 41, 0)),
        "too dark": replace(good, video=video // 64),
        "blurred": replace(good, video=np.broadcast_to(smeared, video.shape)),
        "no contrast": replace(good, video=video // 64 + np.uint8(120)),
        "labels": replace(good, valid=np.zeros(41, bool)),
    }


def test_bad_clips_are_filtered_good_clips_pass(dataset: Path) -> None:
    for text, clip in spoiled_clips(clip_of(dataset, "train", 1)).items():
        assert any(reason.startswith(text) for reason in filters(clip)), text
    assert not [p for p in list_episodes(dataset) if filters(read_episode(p))]


# ---- readers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> dict:
    """A short known walk that every format below stores in its own way."""
    rng = np.random.default_rng(1)
    t = np.arange(9)
    pose5 = np.zeros((9, 5))
    pose5[:, 0] = 0.12 * np.sin(t / 3)
    pose5[:, 1] = -1.6
    pose5[:, 2] = 0.12 * t
    pose5[:, 3] = 2.0
    pose5[:, 4] = 3.0 * t
    ramp = np.linspace(40, 200, 48)[:, None]
    frames = rng.random((9, 32, 48, 3)) * 40 + ramp
    return {
        "pose5": pose5,
        "c2w": poses_to_c2w(pose5),
        "frames": frames.astype(np.uint8),
        "K": np.array([40.0, 41.0, 24.5, 15.5]),
    }


SIZES = np.array([48, 32, 48, 32])  # what shares of fx, fy, cx, cy are shares of


def images(folder: Path, frames: np.ndarray, name: str = "{:06d}.png") -> Path:
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(i))
    return folder


def quaternions(c2w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w2c as x y z w and t."""
    w2c = np.linalg.inv(c2w)
    R = w2c[:, :3, :3]
    w = np.sqrt(1 + R.trace(axis1=1, axis2=2)) / 2
    twist = R - R.swapaxes(1, 2)
    v = np.stack([twist[:, 2, 1], twist[:, 0, 2], twist[:, 1, 0]], 1)
    v = v / (4 * w[:, None])
    return np.concatenate([v, w[:, None]], 1), w2c[:, :3, 3]


def store_re10k(k: dict, root: Path) -> Path:
    images(root / "0123456789abcdef", k["frames"])
    lines = ["https://video"]
    for i, c2w in enumerate(k["c2w"]):
        w2c = np.linalg.inv(c2w)[:3].ravel()
        row = [i * 33366, *(k["K"] / SIZES), 0, 0, *w2c]
        lines.append(" ".join(map(str, row)))
    file = root / "0123456789abcdef.txt"
    file.write_text("\n".join(lines))
    return file


def store_dl3dv(k: dict, root: Path) -> Path:
    images(root / "images_4", k["frames"], "frame_{:05d}.png")
    z_up = np.linalg.inv(readers.Z_UP_TO_Y_DOWN)
    opengl = np.diag([1, -1, -1, 1])
    frames = []
    for i, c2w in enumerate(k["c2w"]):
        matrix = (z_up @ c2w @ opengl).tolist()
        frames.append({"file_path": f"images/frame_{i:05d}.png", "transform_matrix": matrix})
    lens = dict(zip(("fl_x", "fl_y", "cx", "cy"), (k["K"] * 4).tolist(), strict=True))
    info = {**lens, "w": 192, "h": 128, "frames": frames[::-1]}
    (root / "transforms.json").write_text(json.dumps(info))
    return root


def store_omniworld(k: dict, root: Path) -> Path:
    images(root / "color", k["frames"])
    q, t = quaternions(k["c2w"])
    (root / "camera").mkdir()
    camera = {
        "quats": q[:, [3, 0, 1, 2]].tolist(),
        "trans": t.tolist(),
        "focals": [40.0] * 9,
        "cx": 24.5,
        "cy": 15.5,
    }
    (root / "camera/split_0.json").write_text(json.dumps(camera))
    split = {"split": [list(range(9))]}
    (root / "split_info.json").write_text(json.dumps(split))
    return root


def store_spatialvid(k: dict, root: Path) -> Path:
    folder = root / "annotations/group_0001/clip"
    folder.mkdir(parents=True)
    q, t = quaternions(k["c2w"][::2])
    np.save(folder / "poses.npy", np.concatenate([t, q], 1))
    np.save(folder / "intrinsics.npy", np.tile(k["K"] / SIZES, (5, 1)))
    indexes = "\n".join(f"{i} {2 * i}" for i in range(5))
    (folder / "indexes.txt").write_text(indexes)
    write_mp4(root / "videos/group_0001/clip.mp4", k["frames"])
    return folder


def store_vipe(k: dict, root: Path) -> Path:
    write_mp4(root / "rgb/walk.mp4", k["frames"])
    values = {"pose": k["c2w"][::2], "intrinsics": np.tile(k["K"], (5, 1))}
    for folder, array in values.items():
        (root / folder).mkdir()
        np.savez(root / folder / "walk.npz", data=array, inds=np.arange(0, 9, 2))
    (root / "intrinsics/walk_camera.txt").write_text("0: PINHOLE\n8: PINHOLE\n")
    return root / "pose/walk.npz"


STORES = {
    "re10k": store_re10k,
    "dl3dv": store_dl3dv,
    "omniworld": store_omniworld,
    "spatialvid": store_spatialvid,
    "vipe": store_vipe,
}


@pytest.mark.parametrize("name", STORES)
def test_all_readers_agree_on_one_trajectory(name: str, known: dict, tmp_path: Path) -> None:
    path = STORES[name](known, tmp_path)
    e = readers.READERS[name](path)
    error = np.abs(e.c2w - known["c2w"])
    filled = name in ("spatialvid", "vipe")  # every second pose is interpolated
    assert error.max() < (1e-2 if filled else 1e-5)
    assert error[::2].max() < 1e-5
    K = known["K"].copy()
    if name == "omniworld":  # knows one focal length
        K[1] = K[0]
    assert np.abs(e.K - K).max() < 1e-4
    assert len(e.video) == 9

    # centre crop 32x32, then half the size
    small = readers.read(name, path, (16, 16))
    fx, fy, cx, cy = K
    assert small.video.shape == (9, 16, 16, 3)
    assert np.allclose(small.K[0], np.array([fx, fy, cx - 8, cy]) / 2, atol=1e-4)
    assert problems(small) == []
    assert write_episode(tmp_path / "stored", small)


def test_our_episodes_are_vipe_scenes(dataset: Path, tmp_path: Path) -> None:
    path = list_episodes(dataset, "train")[0]
    e = read_episode(path)
    again = readers.read_vipe(path / "pose/video.npz")
    assert np.array_equal(again.c2w, e.c2w) and np.array_equal(again.video, e.video)
    small = readers.read("vipe", path / "pose/video.npz", (32, 32))
    assert small.video.shape == (41, 32, 32, 3) and np.allclose(small.K, e.K / 2)

    bare = Path(shutil.copytree(path, tmp_path / "bare"))
    poses = bare / "pose/video.npz"
    np.savez(poses, data=e.c2w)  # no inds: one pose per frame
    assert np.abs(readers.read_vipe(poses).c2w - e.c2w).max() < 1e-6
    (bare / "intrinsics/video_camera.txt").write_text("0: MEI\n")
    with pytest.raises(ValueError, match="PINHOLE"):
        readers.read_vipe(poses)


def test_readers_say_what_is_missing(tmp_path: Path, known: dict) -> None:
    file = store_re10k(known, tmp_path)
    shutil.rmtree(tmp_path / "0123456789abcdef")
    with pytest.raises(ValueError, match="0123456789abcdef.mp4"):
        readers.read_re10k(file)
    images(tmp_path / "0123456789abcdef", known["frames"][:7])
    with pytest.raises(ValueError, match="7 frames but 9 poses"):
        readers.read_re10k(file)
    with pytest.raises(ValueError, match="split_0.json"):
        readers.read_omniworld(tmp_path)


def test_a_file_in_another_layout_is_named(tmp_path: Path) -> None:
    (tmp_path / "transforms.json").write_text('{"frames": [{}]}')
    with pytest.raises(ValueError, match="not in the layout of dl3dv: KeyError 'file_path'"):
        readers.read("dl3dv", tmp_path, (16, 16))


# ---- keys, films, the command line -------------------------------------------------------------------------


def test_keys_become_actions_and_come_back() -> None:
    words = ["w+l", "_", "a+i"]
    keyboard, mouse = camera.actions_from_keys(words)
    pressed = torch.zeros(3, 6)
    pressed[0, 0] = 1  # w
    pressed[2, 2] = 1  # a
    assert keyboard.tolist() == pressed.tolist()
    turned = torch.tensor([[0, 0.1], [0, 0], [0.1, 0]])
    assert torch.allclose(mouse, turned)
    rows = zip(keyboard, mouse, strict=True)
    assert [camera.keys_from_action(*row) for row in rows] == words
    with pytest.raises(ValueError, match="unknown key 'x'.*use w a s d"):
        camera.parse_keys("w+x")


def test_view_writes_a_film_of_three_panels(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "view.mp4"
    clip = list_episodes(dataset, "third")[0]
    assert command("view", clip, "--out", out) is None
    frames, native = read_video(out)
    assert len(frames) == 41
    assert native == (256, 768)
    assert frames[:, :, :256].std() > 5
    assert frames[:, :, 512:].std() > 5
    with pytest.raises(ValueError, match="nearest legal size: 64x48"):
        write_mp4(tmp_path / "odd.mp4", np.zeros((2, 47, 63, 3), np.uint8))


def program(folder: Path, *words: object) -> subprocess.CompletedProcess:
    line = [sys.executable, str(ROOT / "data.py"), *map(str, words)]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True)


@pytest.mark.long
def test_the_command_line_reads_foreign_clips_and_says_what_is_bad(
    tmp_path: Path, known: dict
) -> None:
    file = store_re10k(known, tmp_path)
    clips = tmp_path / "in"
    words = ("--format", "re10k", file, "--size", "32", "--out", clips)
    assert program(tmp_path, "ingest", *words).returncode == 0
    clip = clips / "0123456789abcdef"
    assert read_episode(clip).video.shape == (9, 32, 32, 3)
    (clip / "player/video.npz").unlink()
    done = program(tmp_path, "check", clips)
    assert done.returncode == 2
    assert "player/video.npz" in done.stdout


def test_what_is_read_is_never_replaced(
    tmp_path: Path, known: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    file = store_re10k(known, tmp_path / "datasets/re10k")
    pictures = file.with_suffix("")
    before = hashes(pictures)
    with pytest.raises(ValueError, match=r"0123456789abcdef holds .*png, which is no part"):
        command("ingest", "--format", "re10k", file)
    scene = store_dl3dv(known, tmp_path / "datasets/dl3dv/scene")
    with pytest.raises(ValueError, match="would be replaced by what is read from it"):
        command("ingest", "--format", "dl3dv", scene)
    monkeypatch.chdir(scene)
    with pytest.raises(ValueError, match="would be replaced by what is read from it"):
        command("ingest", "--format", "dl3dv", ".")
    assert hashes(pictures) == before and (scene / "transforms.json").exists()


def test_clips_of_one_name_are_told_apart_or_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    clips = list_episodes(dataset, "train")[:2]
    poses = [clip / "pose/video.npz" for clip in clips]
    command("ingest", "--format", "vipe", *poses, "--out", tmp_path / "out")
    written = list_episodes(tmp_path / "out")
    assert [path.name for path in written] == [f"{clip.name}_video" for clip in clips]
    for path, clip in zip(written, clips, strict=True):
        assert np.array_equal(read_episode(path).video, read_episode(clip).video)

    again = shutil.copytree(clips[0], tmp_path / "other" / clips[0].name) / "pose/video.npz"
    with pytest.raises(ValueError, match=f"{again} would both become") as error:
        command("ingest", "--format", "vipe", poses[0], again, "--out", tmp_path / "new")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists(), "refused before anything is written"


@pytest.mark.parametrize(
    "words, parts",
    [
        (
            "ingest --format sekai x",
            (
                "re10k, dl3dv, omniworld, spatialvid, vipe, got 'sekai'",
                "--format vipe",
                "plain folder",
            ),
        ),
        ("ingest --format re10k nowhere.txt", ("nowhere.txt",)),
        ("ingest --format vipe nowhere/pose/a.npz", ("nowhere/intrinsics/a_camera.txt",)),
        ("ingest --format dl3dv nowhere", ("nowhere/transforms.json",)),
        ("view nowhere", ("python data.py make",)),
        ("check nowhere", ("no folder nowhere", "python data.py make")),
    ],
)
def test_a_mistake_is_one_line_and_2(words: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    done = program(tmp_path, *words.split())
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def test_a_stop_while_drawing_begins_no_other_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def draw(root: Path, cfg: data.DataConfig, split: str, index: int) -> None:
        drawn.append(index)
        time.sleep(0.01)
        if len(drawn) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(data, "make_episode", draw)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            data.make_dataset(tmp_path, cfg=data.DataConfig(train=500, third=0), workers=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(drawn) < 250


def test_two_makers_of_one_dataset_do_not_meet(tmp_path: Path) -> None:
    cfg = data.DataConfig(size=32, frames=9, train=1, third=0, tune=0, test=0)
    with cli.claim(tmp_path / "set"):
        with pytest.raises(ValueError, match="another process is at work in"):
            data.make_dataset(tmp_path / "set", workers=1, cfg=cfg)
    data.make_dataset(tmp_path / "set", workers=1, cfg=cfg)
    assert data.check(tmp_path / "set") == 0


def test_what_a_stranger_calls_a_clip_cannot_write_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "set/new\nline\x1b[7m/rgb").mkdir(parents=True)
    assert data.check(tmp_path / "set") == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 2 and "\x1b" not in said and "new?line" in said


def test_a_pipe_is_no_recording(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        data.ingest("re10k", [tmp_path / "pipe.txt"], tmp_path / "out", 32)
