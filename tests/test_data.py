"""What data.py promises: the quadruplet stays together, bad data is named, killed runs resume, foreign clips read alike."""

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
    filters,
    inspect,
    list_episodes,
    poses_to_c2w,
    problems,
    read_episode,
    read_video,
    sha256_of,
    write_episode,
    write_mp4,
)
from game.scene import SPLITS

ROOT = Path(__file__).resolve().parent.parent
SMALL = replace(data.PRESETS["micro"], frames=41, train=3, third=1, tune=1, test=1)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.make_dataset(tmp_path_factory.mktemp("dataset"), cfg=SMALL, workers=1)


@pytest.fixture
def episode(dataset: Path, tmp_path: Path) -> Path:
    """One episode that a test may spoil."""
    return Path(shutil.copytree(list_episodes(dataset, "train")[0], tmp_path / "clip"))


# ------------------------------------------------------------------------------------------- video, pose, action, prompt


def test_every_episode_has_video_pose_action_prompt(dataset: Path) -> None:
    e = read_episode(list_episodes(dataset, "train")[1])
    shapes = {
        "video": (41, 64, 64, 3),
        "c2w": (41, 4, 4),
        "K": (41, 4),
        "keyboard": (41, 6),
        "mouse": (41, 2),
        "valid": (41,),
    }
    assert {name: getattr(e, name).shape for name in shapes} == shapes
    assert e.video.dtype == np.uint8 and e.video.max() > e.video.min()
    assert e.keyboard.max() == 1 and "walls" in e.text


def test_a_latent_sees_the_actions_that_made_it(dataset: Path) -> None:
    e = read_episode(list_episodes(dataset, "train")[0])
    windows = context.action_windows(torch.as_tensor(e.mouse)[None], 5, 1)[
        0, 0
    ]  # latent 5: frames 17 .. 20
    assert torch.equal(windows, torch.as_tensor(e.mouse[8:20]))  # 4i−12 .. 4i−1
    pose = tuple(map(float, e.player[16]))
    for t in range(16, 20):
        pose = camera.step_pose(pose, e.keyboard[t].tolist(), e.mouse[t].tolist())
    assert np.allclose(pose, e.player[20], atol=1e-4) or e.contact[16:20].any()


def test_a_frame_drawn_again_from_its_stored_camera_is_identical(dataset: Path) -> None:
    for split in ("train", "third"):
        e = read_episode(list_episodes(dataset, split)[0])
        again = world.true_frames(e.meta, e.c2w[7:11], 64, 64, e.player[7:11])
        assert np.array_equal(again, e.video[7:11])
    assert not np.array_equal(
        world.true_frames(e.meta, e.c2w[7:11], 64, 64), e.video[7:11]
    )  # the figure is really there


def test_a_clip_is_read_within_a_millisecond(dataset: Path) -> None:
    e = read_episode(list_episodes(dataset, "train")[0])
    took = []
    for _ in range(20):
        began = time.perf_counter()
        np.array(e.video[:57])
        took.append(time.perf_counter() - began)
    assert np.median(took) < 1e-3


# ------------------------------------------------------------------------------------------------------ making a dataset


def hashes(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): sha256_of(p)
        for p in sorted(root.rglob("*"))
        if p.is_file() and "/." not in str(p)
    }


def test_a_killed_run_resumes_to_the_same_dataset(dataset: Path, tmp_path: Path) -> None:
    code = (
        "import sys, data; from dataclasses import replace\nif __name__ == '__main__':\n"
        "    data.make_dataset(sys.argv[1], cfg=replace(data.PRESETS['micro'], frames=41, train=3, third=1, tune=1, test=1), workers=2)\n"
    )
    (tmp_path / "go.py").write_text(code)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    go = subprocess.Popen(
        [sys.executable, str(tmp_path / "go.py"), str(out)],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 40
    while not list(out.glob("*/*/_DONE")) and time.monotonic() < deadline:
        time.sleep(0.02)
    go.send_signal(signal.SIGKILL)
    go.wait()
    data.make_dataset(out, cfg=SMALL, workers=1)
    assert hashes(out) == hashes(dataset)  # and two workers made what one makes


def test_a_half_written_episode_is_never_listed(dataset: Path, episode: Path) -> None:
    root = episode.parent
    shutil.copytree(episode, root / ".other.part")
    (shutil.copytree(episode, root / "third") / "_DONE").unlink()
    assert list_episodes(root) == [episode]
    with pytest.raises(ValueError, match="no episodes in .*python data.py make"):
        list_episodes(root / "nowhere")


def test_splits_share_no_scene(dataset: Path) -> None:
    seeds = [read_episode(p).meta["scene"]["seed"] for p in list_episodes(dataset)]
    assert len(set(seeds)) == len(seeds) == 6
    assert read_episode(list_episodes(dataset, "test")[0]).meta["scene"]["seed"] in SPLITS["test"]


# -------------------------------------------------------------------------------------------------------------- bad input


def spoil(path: Path, file: str, **arrays: np.ndarray) -> None:
    stored = dict(np.load(path / file))
    np.savez(path / file, **{**stored, **arrays})


def test_a_bad_folder_is_named_precisely(episode: Path, capsys: pytest.CaptureFixture) -> None:
    c2w = np.load(episode / "pose/video.npz")["data"]
    bent, lost = c2w.copy(), c2w.copy()
    bent[3, :3, :3] *= 1.1
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
        assert (
            text in str(error.value)
            and str(episode) in str(error.value)
            and "pose/video.npz" in str(error.value)
        )
    assert data.check(episode.parent) == 1 and "pose/video.npz" in capsys.readouterr().out


def test_truncated_tampered_and_missing_files_are_found(
    episode: Path, capsys: pytest.CaptureFixture
) -> None:
    assert data.check(episode.parent) == 0
    frames = episode / "rgb/video.npy"
    whole = frames.read_bytes()
    frames.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert inspect(episode)[1] == [] and inspect(episode, hashes=True)[1] == [
        "rgb/video.npy: changed since it was written"
    ]
    frames.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        read_episode(episode)
    frames.write_bytes(whole)
    meta = episode / "meta.json"
    meta.write_text(meta.read_text().replace('"T": 41', '"T": 45'))
    assert "meta.json says [45, 64, 64]" in inspect(episode)[1][0]
    (episode / "action/video.npz").unlink()
    assert "action/video.npz" in inspect(episode)[1][0]
    with pytest.raises(ValueError, match="no file _DONE"):
        read_episode(episode.parent)
    capsys.readouterr()


def test_nothing_unusable_is_written(episode: Path, tmp_path: Path) -> None:
    good = read_episode(episode)
    cut = {
        name: getattr(good, name)[:40]
        for name in ("video", "c2w", "K", "keyboard", "mouse", "valid", "contact", "player")
    }
    for bad, text in (
        (replace(good, **cut), "expected 4k\\+1 frames, found 40"),
        (replace(good, video=good.video[:, :60]), "multiples of 16"),
        (replace(good, K=good.K / 64), "focal lengths"),
        (replace(good, keyboard=good.keyboard + 1), "expected 0 or 1"),
    ):
        with pytest.raises(ValueError, match=text):
            write_episode(tmp_path / "bad", bad)
    assert not (tmp_path / "bad").exists()


def test_the_command_exits_2_on_a_bad_dataset(episode: Path) -> None:
    (episode / "pose/video.npz").write_bytes(b"")
    assert data.run(data.parser().parse_args(["check", str(episode.parent)])) == 2
    with pytest.raises(ValueError, match="needs a path"):
        data.run(data.parser().parse_args(["view"]))


def test_bad_clips_are_filtered_good_clips_pass(dataset: Path) -> None:
    good = read_episode(list_episodes(dataset, "train")[1])
    video, far = np.array(good.video), good.player.copy()
    far[20:, 0] += 1
    spun = good.player + np.array([0, 0, 0, 0, 40]) * (np.arange(41) > 9)[:, None]
    bad = {
        "teleport": replace(good, player=far),
        "spin": replace(good, player=spun),
        "frozen": replace(good, video=np.repeat(video[:1], 41, 0)),
        "too dark": replace(good, video=video // 64),
        "blurred": replace(
            good,
            video=np.broadcast_to(video.mean((2,), keepdims=True).astype(np.uint8), video.shape),
        ),
        "no contrast": replace(good, video=(video // 64 + 120).astype(np.uint8)),
        "labels": replace(good, valid=np.zeros(41, bool)),
    }
    for text, clip in bad.items():
        assert any(reason.startswith(text) for reason in filters(clip)), text
    assert not [p for p in list_episodes(dataset) if filters(read_episode(p))]


# ---------------------------------------------------------------------------------------------------- keys from positions


# ---------------------------------------------------------------------------------------------------------------- readers


@pytest.fixture(scope="module")
def known() -> dict:
    """A short known walk that every format below stores in its own way."""
    rng = np.random.default_rng(1)
    t = np.arange(9)
    pose5 = np.stack([0.12 * np.sin(t / 3), -1.6 + 0 * t, 0.12 * t, 0 * t + 2.0, 3.0 * t], 1)
    frames = (rng.random((9, 32, 48, 3)) * 40 + np.linspace(40, 200, 48)[:, None]).astype(np.uint8)
    return {
        "pose5": pose5,
        "c2w": poses_to_c2w(pose5),
        "frames": frames,
        "K": np.array([40.0, 41.0, 24.5, 15.5]),
    }


def images(folder: Path, frames: np.ndarray, name: str = "{:06d}.png") -> Path:
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(i))
    return folder


def quaternions(c2w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w2c as x y z w and t."""
    R, t = np.linalg.inv(c2w)[:, :3, :3], np.linalg.inv(c2w)[:, :3, 3]
    w = np.sqrt(1 + R.trace(axis1=1, axis2=2)) / 2
    v = np.stack([R[:, 2, 1] - R[:, 1, 2], R[:, 0, 2] - R[:, 2, 0], R[:, 1, 0] - R[:, 0, 1]], 1) / (
        4 * w[:, None]
    )
    return np.concatenate([v, w[:, None]], 1), t


def store_re10k(k: dict, root: Path) -> Path:
    images(root / "0123456789abcdef", k["frames"])
    share = k["K"] / [48, 32, 48, 32]
    rows = [
        [i * 33366, *share, 0, 0, *np.linalg.inv(c2w)[:3].ravel()] for i, c2w in enumerate(k["c2w"])
    ]
    file = root / "0123456789abcdef.txt"
    file.write_text("https://video\n" + "\n".join(" ".join(map(str, row)) for row in rows))
    return file


def store_dl3dv(k: dict, root: Path) -> Path:
    images(root / "images_4", k["frames"], "frame_{:05d}.png")
    world_gl = np.linalg.inv(readers.Z_UP_TO_Y_DOWN) @ k["c2w"] @ np.diag([1, -1, -1, 1])
    frames = [
        {"file_path": f"images/frame_{i:05d}.png", "transform_matrix": m.tolist()}
        for i, m in enumerate(world_gl)
    ]
    fx, fy, cx, cy = (k["K"] * 4).tolist()
    (root / "transforms.json").write_text(
        json.dumps(
            {"fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "w": 192, "h": 128, "frames": frames[::-1]}
        )
    )
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
    (root / "split_info.json").write_text(json.dumps({"split": [list(range(9))]}))
    return root


def store_spatialvid(k: dict, root: Path) -> Path:
    folder = root / "annotations/group_0001/clip"
    folder.mkdir(parents=True)
    q, t = quaternions(k["c2w"][::2])
    np.save(folder / "poses.npy", np.concatenate([t, q], 1))
    np.save(folder / "intrinsics.npy", np.tile(k["K"] / [48, 32, 48, 32], (5, 1)))
    (folder / "indexes.txt").write_text("\n".join(f"{i} {2 * i}" for i in range(5)))
    write_mp4(root / "videos/group_0001/clip.mp4", k["frames"])
    return folder


def store_vipe(k: dict, root: Path) -> Path:
    write_mp4(root / "rgb/walk.mp4", k["frames"])
    for folder, values in (("pose", k["c2w"][::2]), ("intrinsics", np.tile(k["K"], (5, 1)))):
        (root / folder).mkdir()
        np.savez(root / folder / "walk.npz", data=values, inds=np.arange(0, 9, 2))
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
    filled = name in ("spatialvid", "vipe")  # every second pose is interpolated
    assert np.abs(e.c2w - known["c2w"]).max() < (1e-2 if filled else 1e-5)
    assert np.abs(e.c2w[::2] - known["c2w"][::2]).max() < 1e-5
    K = known["K"] * [1, 1, 1, 1] if name != "omniworld" else np.array([40.0, 40.0, 24.5, 15.5])
    assert np.abs(e.K - K).max() < 1e-4 and len(e.video) == 9
    small = readers.READERS[name](path, (16, 16))  # centre crop 32x32, then half the size
    assert small.video.shape == (9, 16, 16, 3) and np.allclose(
        small.K[0], [K[0] / 2, K[1] / 2, (K[2] - 8) / 2, K[3] / 2], atol=1e-4
    )
    assert problems(small) == [] and write_episode(tmp_path / "stored", small)


def test_our_episodes_are_vipe_scenes(dataset: Path, tmp_path: Path) -> None:
    path = list_episodes(dataset, "train")[0]
    e = read_episode(path)
    assert np.array_equal(readers.read_vipe(path / "pose/video.npz").c2w, e.c2w)
    bare = Path(shutil.copytree(path, tmp_path / "bare"))
    np.savez(bare / "pose/video.npz", data=e.c2w)  # no inds: one pose per frame
    assert np.abs(readers.read_vipe(bare / "pose/video.npz").c2w - e.c2w).max() < 1e-6
    (bare / "intrinsics/video_camera.txt").write_text("0: MEI\n")
    with pytest.raises(ValueError, match="PINHOLE"):
        readers.read_vipe(bare / "pose/video.npz")


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


# ------------------------------------------------------------------------------------------- prompts, metrics, keys, view


def test_keys_become_actions_and_come_back() -> None:
    keyboard, mouse = camera.actions_from_keys(["w+l", "_", "a+i"])
    assert keyboard.tolist() == [[1, 0, 0, 0, 0, 0], [0] * 6, [0, 0, 1, 0, 0, 0]]
    assert torch.allclose(mouse, torch.tensor([[0, 0.1], [0, 0], [0.1, 0]]))
    assert [camera.keys_from_action(k, m) for k, m in zip(keyboard, mouse, strict=True)] == [
        "w+l",
        "_",
        "a+i",
    ]
    with pytest.raises(ValueError, match="unknown key 'x'.*use w a s d"):
        camera.parse_keys("w+x")


def test_view_writes_a_film_of_three_panels(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "view.mp4"
    assert (
        data.run(
            data.parser().parse_args(
                ["view", str(list_episodes(dataset, "third")[0]), "--out", str(out)]
            )
        )
        is None
    )
    frames, native = read_video(out)
    assert (
        len(frames) == 41
        and native == (256, 768)
        and frames[:, :, :256].std() > 5
        and frames[:, :, 512:].std() > 5
    )
    with pytest.raises(ValueError, match="nearest legal size: 64x48"):
        write_mp4(tmp_path / "odd.mp4", np.zeros((2, 47, 63, 3), np.uint8))


def test_the_command_line_reads_foreign_clips_and_says_what_is_bad(
    tmp_path: Path, known: dict
) -> None:
    file = store_re10k(known, tmp_path)
    call = lambda *words: subprocess.run(
        [sys.executable, str(ROOT / "data.py"), *map(str, words)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        call(
            "ingest", "--format", "re10k", file, "--size", "32", "--out", tmp_path / "in"
        ).returncode
        == 0
    )
    assert read_episode(tmp_path / "in/0123456789abcdef").video.shape == (9, 32, 32, 3)
    (tmp_path / "in/0123456789abcdef/player/video.npz").unlink()
    done = call("check", tmp_path / "in")
    assert done.returncode == 2 and "player/video.npz" in done.stdout
    done = call("ingest", "--format", "sekai", file)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "re10k, dl3dv, omniworld, spatialvid, vipe, got 'sekai'" in done.stderr
    assert "--format vipe" in done.stderr and "plain folder" in done.stderr
    done = call("view", tmp_path / "nowhere")
    assert (
        done.returncode == 2
        and "python data.py make" in done.stderr
        and "Traceback" not in done.stderr
    )
