"""What a recording promises: whatever ends it, what was played is there."""

import argparse
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import imageio.v3 as imageio
import numpy as np
import pytest
from playing import ROOT, Viewer, act, dreaming, main, wait_for

from dataset.episode import read_episode
from page import commands, folder
from page.film import Film
from page.recording import Recording


def test_odd_sizes_are_refused_before_encoding(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="mp4 needs even sizes, got 63x65; nearest legal size: 64x66"
    ):
        Film(tmp_path / "odd.mp4", 16, (65, 63))


def test_without_a_video_library_the_frames_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def missing(*_, **__):
        raise ValueError("no libx264")

    monkeypatch.setattr(av, "open", missing)
    player = dreaming(tmp_path, monkeypatch)
    act(player, "w")
    player.save()
    assert (
        'no play.mp4 (no libx264): pip install "imageio[pyav]". Every frame is kept in'
        in capsys.readouterr().out
    )
    assert len(read_episode(tmp_path / "dream").video) == 57


def test_recording_can_be_switched_off_and_on_and_saves_the_last_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch, fps=4)  # a minute is six chunks
    act(player, "w")
    commands.obey(player, {"cmd": "record"})
    act(player, "s")
    player.undo()  # what was taken back is in no recording
    for chord in "a" * 8:
        act(player, chord)
    commands.obey(player, {"cmd": "record"})
    act(player, "d")
    player.save()
    first, second = (
        json.loads((tmp_path / name / "session.json").read_text()) for name in ("dream", "dream-2")
    )
    assert not first["trail"] and len(first["keyboard"]) == 56 and len(second["keyboard"]) == 7 * 40
    assert len(second["trail"]) == 14 + 2 * 10, "two of the 8 chunks are older than a minute"
    assert (
        np.array(second["keyboard"])[:240, 2].all() and np.array(second["keyboard"])[240:, 3].all()
    )
    assert len(read_episode(tmp_path / "dream-2").video) == 1 + 7 * 40


def test_an_undo_reaches_farther_back_than_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    for chord in ("w", "l", "l"):
        act(player, chord)
    for _ in range(2):
        commands.obey(player, {"cmd": "record"})  # off; on again, from the newest frame
    player.undo()
    stands = player.poses[-1]
    act(player, "j")
    player.save()
    session = folder.session_of(tmp_path / "dream-2")
    assert session["poses"][0] == list(stands) and len(session["trail"]) == 14 + 10
    off = np.abs(np.diff(np.array(session["poses"]), axis=0)).max(0)
    assert off[[0, 2]].max() < 0.2 and off[4] < 2, "every action leads to the next pose"


# ---- whatever ends it --------------------------------------------------------------------------------------


def started(tmp_path: Path, *flags: str) -> subprocess.Popen:
    """play.py --fake in a process of its own, which records into tmp_path/cut."""
    command = [sys.executable, "-u", str(ROOT / "play.py"), "--fake", "--size", "64x64"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    return subprocess.Popen(
        [*command, "--out", "cut", *flags],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )


def reach(process: subprocess.Popen, line: str) -> None:
    while line not in process.stdout.readline():
        assert process.poll() is None


def frames_of(film: Path) -> int:
    return imageio.improps(film, plugin="pyav").shape[0]


@pytest.mark.long
def test_a_killed_recording_is_completed_replayed_and_goes_on(tmp_path: Path) -> None:
    process = started(tmp_path, "--actions", "w:8, l:4000")
    reach(process, "frame 240")
    process.kill()
    process.wait()
    cut = tmp_path / "cut"
    assert not (cut / "_DONE").exists() and not (cut / "session.json").exists()

    # the next start completes it, and goes on from where it was cut off
    flags = ("--fake", "--size", "64x64", "--actions", "_:4", "--out", "cut")
    code, said = main(tmp_path, *flags)
    frames = len(read_episode(cut).video) - 1
    assert code == 0 and frames >= 200
    assert f"cut was cut off; completed with {frames} frames" in said
    assert f"cut goes on at frame {frames}" in said
    assert not list(cut.glob("*tmp*")) and not list(cut.glob("state-*"))
    first, second = (read_episode(tmp_path / name) for name in ("cut", "cut-2"))
    assert np.array_equal(first.video[-1], second.video[0])

    # the films end at most a second before it, and its actions give its frames
    for name in folder.FILMS:
        assert frames - 16 <= frames_of(cut / name) <= frames + 41
    code, said = main(tmp_path, "--replay", "cut", "--out", "again")
    assert code == 0 and f"{frames // 4} of {frames // 4} chunks are identical" in said


@pytest.mark.long
@pytest.mark.skipif(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="nohup says to go on")
def test_a_dropped_line_ends_a_recording_in_good_order(tmp_path: Path) -> None:
    process = started(tmp_path, "--actions", "w:4000")
    reach(process, "frame 80")
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 130
    assert len(read_episode(tmp_path / "cut").video) > 80


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_the_recording_not_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    for _ in range(6):
        act(player, "l")
    player.recording.wait()
    with monkeypatch.context() as patch:
        patch.setattr(Recording, "write_frames", full_disk)
        for _ in range(3):
            act(player, "l")
        wait_for(lambda: player.recording is None or act(player, "l"))
    assert "not recorded any more: [Errno 28] No space left on device" in player.unrecorded
    assert any("No space left" in note.get("info", "") for _, note in player.screen.notes)
    frame = player.frame
    act(player, "j")
    assert player.frame == frame + 40 and player.save() == []

    # what was written is a session at the next start
    folder.recover(str(tmp_path / "dream"))
    kept = len(read_episode(tmp_path / "dream").video) - 1
    assert kept >= 56 + 40
    assert len(folder.session_of(tmp_path / "dream")["keyboard"]) == kept


def test_a_disk_without_room_for_the_end_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    act(player, "w")
    act(player, "d")
    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_text", full_disk)
        assert player.save() == []
    dream = tmp_path / "dream"
    assert player.unrecorded and not (dream / "_DONE").exists(), "the mark comes last"
    folder.recover(str(dream))
    assert len(read_episode(dream).video) == 1 + 56 + 40
    said = folder.session_of(dream)
    assert said["state"] == 96 and (dream / "state.safetensors").read_text() == "state"


def test_a_folder_has_one_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = dreaming(tmp_path, monkeypatch)
    second = dreaming(tmp_path, monkeypatch)
    assert first.recording.folder.name == "dream" and second.recording.folder.name == "dream-2"
    act(first, "w")
    act(second, "w")
    folder.recover(str(tmp_path / "dream"))  # somebody writes them: they are not lost
    assert not (tmp_path / "dream/_DONE").exists()
    for player in (first, second):
        player.save()
    for name in ("dream", "dream-2"):
        assert len(read_episode(tmp_path / name).video) == 57


def test_where_nothing_was_recorded_no_folder_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    assert (tmp_path / "dream").is_dir()
    player.save()
    assert not (tmp_path / "dream").exists()


def test_a_state_that_was_taken_back_is_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    act(player, "w")
    assert [path.name for path in (tmp_path / "dream").glob("state-*")] == ["state-56.safetensors"]
    player.undo()
    assert not list((tmp_path / "dream").glob("state-*"))
    act(player, "a")
    player.save()
    assert folder.session_of(tmp_path / "dream")["state"] == 56


@pytest.mark.parametrize("name", ["walk [1]", "a?b", "a**"])
def test_a_name_with_marks_of_a_pattern_is_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    player = dreaming(tmp_path, monkeypatch, "--out", str(tmp_path / name))
    act(player, "w")
    act(player, "w")
    player.recording.commit()
    player.recording.wait()
    player.recording.abandon()
    folder.recover(str(tmp_path / name))
    assert len(read_episode(tmp_path / name).video) == 57


@pytest.mark.parametrize("out", [".", "..", "/", __file__])
def test_a_recording_needs_a_folder_of_its_own(out: str) -> None:
    with pytest.raises(ValueError, match="--out must name a new folder"):
        folder.claim(out)


def lines_until(journal: bytes, count: int) -> bytes:
    return b"\n".join(journal.split(b"\n")[:count]) + b"\n"


@pytest.mark.parametrize("torn", [b"", b'{"n": 40, "sha"', b"\xff\xfe"])
def test_a_torn_journal_is_read_as_far_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    for _ in range(3):
        act(player, "w")
    while player.recording.pending:
        player.recording.commit()
    player.recording.wait()
    player.recording.abandon()
    journal = tmp_path / "dream" / folder.JOURNAL
    journal.write_bytes(lines_until(journal.read_bytes(), 4) + torn)  # header, chunk, state, chunk
    folder.recover(str(tmp_path / "dream"))
    assert len(read_episode(tmp_path / "dream").video) == 1 + 56 + 40


@pytest.mark.slow
def test_twenty_kills_at_random_moments_cost_at_most_ten_seconds_each(tmp_path: Path) -> None:
    """Slow: plays in the page's own time, a quarter of a minute at most, then kill -9."""
    rng = random.Random(0)
    missing = []
    for k in range(20):
        place = tmp_path / str(k)
        place.mkdir()
        process = started(place, "--port", str(19300 + k))
        port = int(process.stdout.readline().rsplit(":", 1)[1].split()[0])
        viewer = Viewer(argparse.Namespace(server_port=port))
        until = time.monotonic() + rng.uniform(6, 15)
        shown = 0
        while time.monotonic() < until:
            header = viewer.frame(ack=False)
            viewer.post("/input", keys=rng.sample(["w", "a", "s", "d", "j", "l"], 2))
            viewer.post("/input", keys=[], shown=header["n"])
            shown = header["i"]
        process.kill()
        process.wait()

        code, said = main(place, "--fake", "--size", "64x64", "--actions", "_:4", "--out", "cut")
        frames = len(read_episode(place / "cut").video) - 1
        assert code == 0 and f"cut goes on at frame {frames}" in said
        assert all(frames_of(place / "cut" / name) > 0 for name in folder.FILMS)
        code, said = main(place, "--replay", "cut", "--out", "again")
        assert code == 0, said
        missing.append((shown - frames) / 40)
    print(f"seconds missing after 20 kills: {sorted(round(s, 1) for s in missing)}")
    assert max(missing) <= 10


# ---- what a seeded hand found (tests/test_fuzz.py)


@pytest.mark.parametrize("name", ["session.json", "start.png", "state.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    flags = ("--fake", "--size", "32x32", "--actions", "w:4", "--out", "walk")
    main(tmp_path, *flags)
    (tmp_path / "walk" / name).unlink()
    os.mkfifo(tmp_path / "walk" / name)
    with pytest.raises(ValueError, match=f"{name}.* no regular file"):
        main(tmp_path, *flags)


@pytest.mark.parametrize(
    "line", [b"[]", b'{"n": 4}', b'{"state": "x"}', b"[" * 50_000, b'{"size": [0, 0]}']
)
def test_a_journal_that_makes_no_sense_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, line: bytes
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    act(player, "w")
    player.recording.wait()
    player.recording.abandon()
    journal = tmp_path / "dream/session.jsonl"
    header = journal.read_bytes().split(b"\n")[0]
    lines = [line] if b"size" in line else [header, line]
    journal.write_bytes(b"\n".join(lines) + b"\n")
    folder.recover(str(tmp_path / "dream"))
    said = capsys.readouterr().out
    if line[:2] != b"[[":  # a line that cannot be read ends the journal, as one that was cut off
        assert f"{journal} is damaged: " in said
