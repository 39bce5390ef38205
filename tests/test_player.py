"""What the player promises: what is asked for is played, judged and remembered."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from playing import Dream, act, arguments, dreaming

import realtime
from dataset.episode import read_episode
from dataset.film import psnr
from page import commands
from page.folder import read_journal
from page.player import Player, explain, give_back
from page.start import true_views


def test_a_model_is_judged_by_the_true_renderer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    act(player, "l")
    frames, headers, _ = player.shown
    truth = true_views(player.begun.truth, np.array([headers[3]["pose"]]), 64, 64)
    assert (
        abs(headers[3]["psnr"] - float(psnr(frames[3:4], truth))) < 0.5
        and 3 < headers[3]["psnr"] < 15
    )


def test_tab_shows_the_true_renderer_at_the_same_pose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    commands.obey(player, {"cmd": "view"})
    act(player, "w")
    frames, headers, _ = player.shown
    assert (
        np.array_equal(
            frames,
            true_views(player.begun.truth, np.array(player.session.poses[-56:]), 64, 64),
        )
        and headers[0]["view"] == "truth"
    )
    player.save()
    assert not np.array_equal(read_episode(tmp_path / "dream").video[1:], frames), (
        "what is recorded is what the model made"
    )


def test_m_switches_the_memory_off_and_on_and_it_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    act(player, "w")
    act(player, "w")
    commands.obey(player, {"cmd": "memory"})
    act(player, "w")
    commands.obey(player, {"cmd": "memory"})
    act(player, "w")
    player.save()
    chunks = json.loads((tmp_path / "dream/session.json").read_text())["chunks"]
    assert [chunk["policy"] for chunk in chunks] == ["camera", "camera", "none", "camera"]
    assert [len(chunk["memory"]) for chunk in chunks] == [0, 5, 0, 5]
    assert set(chunks[1]["memory"][0]) == {"latent", "frame", "score", "sink", "pose"}


def test_an_undone_chunk_is_not_in_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    for chord in "wal":
        act(player, chord)
    commands.obey(player, {"cmd": "undo"})
    assert (
        player.frame == 96
        and player.poses[-1] == tuple(player.session.poses[-1])
        and len(player.poses) == 1 + 96 // 4
    )
    act(player, "d")
    player.save()
    keyboard = np.array(json.loads((tmp_path / "dream/session.json").read_text())["keyboard"])
    assert (
        keyboard[:56, 0].all()
        and keyboard[56:96, 2].all()
        and keyboard[96:, 3].all()
        and len(keyboard) == 136
    )
    for _ in range(6):
        commands.obey(player, {"cmd": "undo"})  # more than there is: no error


def test_a_slow_model_is_played_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    player = dreaming(tmp_path, monkeypatch)
    player.times = [(56, 20.0), (40, 11.0), (40, 11.0)]
    assert player.tempo() == "turn" and not player.due() and player.facts()["slow"]
    commands.obey(player, {"cmd": "run", "plan": [["w"], ["w", "l"], [], ["no key", "d"]]})
    assert player.due()
    keyboard, mouse, said = player.decide(40)
    assert (
        keyboard[:8, 0].all()
        and mouse[4:8, 1].all()
        and not keyboard[8:12].any()
        and keyboard[12:16, 3].all()  # then a wall of the known world ends the walk
    )
    assert player.plan is None and said["keys"] == ["w", "l+w", "_", "d"]
    for recent in ([], [(40, 11.0)], [(40, 1.0), (8, 3.0)], [(8, 3.0), (8, 0.1), (8, 0.1)]):
        player.times = [(56, 20.0), *recent]
        assert player.tempo() == "live", "busy for a moment is not slow"
    player.set["pace"] = "turn"
    assert player.tempo() == "turn" and not player.facts()["slow"], "chosen is not slow"


def test_one_chunk_more_is_refused_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch, "--pace", "turn")
    player.set["paused"] = True
    commands.obey(player, {"cmd": "step"})
    assert not player.once, "it would be made as soon as the pace is live"
    assert any("press Enter" in note.get("info", "") for _, note in player.screen.notes)
    player.set["pace"] = "live"
    commands.obey(player, {"cmd": "step"})
    assert player.once and player.due()


def test_the_start_picture_is_seen_while_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(arguments("--new", "10", "--out", str(tmp_path / "dream")), 40)
    seen = []

    def load(*_: object) -> Dream:
        seen.append(player.screen.now())
        return Dream()

    monkeypatch.setattr(realtime, "open_session", load)
    player.open(live=True)
    early, later = seen[0]["header"], player.screen.now()["header"]
    assert early.keys() == later.keys(), "the page reads all of them"
    differing = {key for key in early if early[key] != later[key]}
    assert differing <= {"slots", "recording"}, "only what a loaded model knows is new"
    assert (seen[0]["frame"] == player.begun.image).all()


def test_a_recording_that_begins_late_says_the_words_of_its_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch, "--prompt", "a garden")
    commands.obey(player, {"cmd": "record"})
    act(player, "w")
    commands.obey(player, {"cmd": "prompt", "text": "a swamp"})
    commands.obey(player, {"cmd": "record"})
    assert read_journal(player.recording.folder)[0]["prompt"] == "a garden"
    commands.obey(player, {"cmd": "restart"})
    assert read_journal(player.recording.folder)[0]["prompt"] == "a swamp"


def test_a_plan_of_one_pace_is_forgotten_in_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch, "--pace", "live")
    commands.obey(player, {"cmd": "run", "plan": ["w"]})
    commands.obey(player, {"cmd": "pace"})
    assert player.tempo() == "turn" and not player.due()


def test_a_failing_model_is_told_on_the_page_and_the_session_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dream = Dream()
    monkeypatch.setattr(realtime, "open_session", lambda options, ranks: dream)
    step, calls = dream.step, []

    def breaks(keyboard: torch.Tensor, mouse: torch.Tensor) -> realtime.Chunk:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("the device is gone")
        return step(keyboard, mouse)

    dream.step = breaks
    player = Player(arguments("--new", "10", "--out", str(tmp_path / "dream")), 400)
    player.start()
    player.join(30)
    assert player.screen.stage == "stopped: RuntimeError: the device is gone"
    assert len(read_episode(tmp_path / "dream").video) == 1 + 56 + 40


def test_memory_and_device_errors_say_the_way_out() -> None:
    assert (
        "out of memory, peak 0.0 GB; what was played is saved. Options, cheapest first: --vae light75"
        in explain(torch.OutOfMemoryError("CUDA"))
    )
    said = explain(
        NotImplementedError("The operator 'aten::x' is not implemented for the MPS device")
    )
    assert "run with PYTORCH_ENABLE_MPS_FALLBACK=1 or --device cpu" in said


def test_an_undo_in_the_walk_of_a_link_is_walked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    keyboard = np.zeros((176, 6), np.float32)
    mouse = np.zeros((176, 2), np.float32)
    mouse[:, 1] = 0.1
    player.script = [keyboard, mouse]
    for k in range(6):
        if player.script:
            player.chunk(*player.decide(player.session.frames_needed))
        if k == 1:
            player.undo()
    assert player.script is None
    assert player.poses[176 // 4][4] - player.poses[0][4] == pytest.approx(264, abs=1e-3)


def test_what_was_tapped_and_turned_in_a_pause_asks_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    commands.obey(player, {"cmd": "pause"})
    player.controls.post(["d"], 4000)
    player.controls.post([])
    commands.obey(player, {"cmd": "pause"})
    keyboard, mouse, about = player.decide(8)
    assert not keyboard.any() and not mouse.any() and about["keys"] == []


def test_m_comes_back_to_the_memory_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch, "--memory", "recent")
    seen = []
    for _ in range(2):
        commands.obey(player, {"cmd": "memory"})
        seen.append(player.session.policy)
    assert seen == ["none", "recent"]


def test_a_walk_that_goes_on_shows_no_wrong_thumbnail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    act(player, "w")
    player.enter(player.begun, player.newest, player.poses)
    pick = {"frame": 8, "latent": 2, "score": 0.5, "sink": False}
    assert player.described([pick])[0]["thumb"] == ""
    assert player.described([pick | {"frame": player.frame}])[0]["thumb"]


def test_a_hidden_tab_lets_the_world_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    player = dreaming(tmp_path, monkeypatch)
    player.set["pace"] = "live"
    waits = []
    with player.screen.seat():
        for on in (False, True, False, True):
            commands.obey(player, {"cmd": "hidden", "on": on})
            player.screen.end = 0.0  # nothing is left to show
            waits.append(not player.due())
    assert waits == [False, True, False, True]
    assert player.due(), "whoever is gone hides nothing"


def test_free_memory_is_given_back_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    given = []
    monkeypatch.setattr("page.player.give_back", lambda: given.append(player.frame))
    act(player, "w")
    player.tidied -= 31.0
    act(player, "w")
    act(player, "w")
    assert given == [96]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_holes_between_what_is_kept_are_given_back() -> None:
    def megabytes() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    blocks = [bytearray(b"x" * 60_000) for _ in range(3000)]  # 180 MB
    kept = blocks[::20]
    before = megabytes()
    del blocks
    give_back()
    assert before - megabytes() > 100 and len(kept) == 150


def test_a_picture_that_is_shown_again_says_how_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch, "--pace", "turn")
    act(player, "w")
    made = player.shown[1][-1]
    commands.obey(player, {"cmd": "memory"})
    commands.obey(player, {"cmd": "view"})
    player.show_again()
    again = player.screen.frames[-1]["header"]
    assert again["seen"] == {"policy": made["policy"], "view": made["view"]}
    assert again["policy"] != made["policy"] and again["view"] != made["view"]
    player.undo()
    assert player.shown[1][-1]["view"] == "model", "what is taken back to is a picture of the model"
