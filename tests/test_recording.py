"""What a recording promises: whatever ends it, what was played is there."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
from playing import act, dreaming

from dataset.episode import read_episode
from page import commands
from page.film import Film


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
    player = dreaming(tmp_path, monkeypatch)
    act(player, "w")
    commands.obey(player, {"cmd": "record"})
    act(player, "s")
    player.undo()  # what was taken back is in no recording
    for chord in "a" * 62:
        act(player, chord)
    commands.obey(player, {"cmd": "record"})
    act(player, "d")
    player.save()
    first, second = (
        json.loads((tmp_path / name / "session.json").read_text()) for name in ("dream", "dream-2")
    )
    assert (
        not first["trail"] and len(first["keyboard"]) == 56 and len(second["keyboard"]) == 61 * 40
    )
    assert len(second["trail"]) == 14 + 2 * 10, "two of the 62 chunks are older than a minute"
    assert (
        np.array(second["keyboard"])[:2400, 2].all()
        and np.array(second["keyboard"])[2400:, 3].all()
    )
    assert len(read_episode(tmp_path / "dream-2").video) == 1 + 61 * 40
