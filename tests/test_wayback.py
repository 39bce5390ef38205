"""What page/wayback.py promises: home is home, the score is honest, the rules are those of web/game.js."""

from pathlib import Path

import numpy as np
import pytest
from playing import Viewer, act, dreaming, page, wait_for
from test_web import javascript, needs_node

import camera
from page import commands, wayback
from page.player import Player
from page.wayback import Game


def play(player: Player, do: str) -> None:
    commands.obey(player, {"cmd": "game", "do": do})


def go_on(player: Player) -> None:
    player.chunk(*player.decide(player.session.frames_needed))


def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Player:
    """Two chunks out, and led home."""
    monkeypatch.setattr(Game, "least", 2.0)
    player = dreaming(tmp_path, monkeypatch)
    play(player, "begin")
    act(player, "w+l2")
    play(player, "home")
    assert player.game.phase == "out" and not player.script, "not far enough yet"
    act(player, "d")
    assert player.game.told["lead"]
    play(player, "home")
    monkeypatch.setattr(Player, "in_rooms", anywhere)
    while player.game.phase == "home" and player.frame < 400:
        go_on(player)
    return player


def anywhere(player: Player, keyboard: np.ndarray, mouse: np.ndarray) -> np.ndarray:
    """act() walks through walls; who is led home must be able to, too."""
    return keyboard


def test_led_home_one_is_where_one_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    player = at_home(tmp_path, monkeypatch)
    assert player.game.phase == "replay"
    assert player.game.best.frame == 2 * (56 + 40)
    assert player.game.best.off < 1e-6
    assert player.frame == 0, "the same steps are ahead, without memory"
    assert player.session.policy == "none"


def test_the_end_shows_the_return_with_memory_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = at_home(tmp_path, monkeypatch)
    with_memory = player.game.best.picture
    poses = player.game.pose
    for _ in range(5):
        assert player.due(), "as fast as they are made"
        go_on(player)
    assert player.game.phase == "over" and player.set["paused"]
    assert player.session.policy == "camera" and player.poses[0] == poses

    # a Dream forgets nothing and remembers nothing: the same noise both times
    on, off = player.game.scores
    assert np.array_equal(with_memory, player.game.without) and on == off
    assert on == pytest.approx(wayback.likeness(player.game.first, with_memory))
    pictures = player.game.told["pictures"]
    assert [picture["under"] for picture in pictures] == ["picture", "with memory", "without"]
    assert f"{on:.1f} dB" in player.game.told["text"]


def test_the_game_keeps_its_memory_and_ends_with_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    play(player, "begin")
    act(player, "w")
    for name in ("memory", "undo"):
        commands.obey(player, {"cmd": name})
    assert player.session.policy == "camera" and player.frame == 56
    commands.obey(player, {"cmd": "restart"})
    assert player.game.phase == "off"

    player = at_home(tmp_path / "again", monkeypatch)
    play(player, "stop")
    assert player.session.policy == "camera" and not player.script


def test_after_a_minute_one_has_to_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Game, "most", 2.0)
    player = dreaming(tmp_path, monkeypatch)
    play(player, "begin")
    act(player, "w")
    act(player, "w")
    assert player.game.phase == "home"
    act(player, "_")
    assert "m and 0° away" in player.game.told["text"]


def test_who_looks_at_the_page_again_sees_the_game(tmp_path: Path) -> None:
    with page(tmp_path) as (player, server):
        viewer = Viewer(server)
        viewer.post("/cmd", cmd="game", do="begin")
        wait_for(lambda: player.game.phase == "out" and player.frame > 4)
        viewer.close()
        again = Viewer(server)
        assert again.hello["game"]["phase"] == "out"
        assert again.hello["game"]["text"].startswith("Walk out")
        again.close()


RULES = """
    const played = new game.Game(() => {}, () => {});
    played.begin(null, given[0]);
    played.go("home");
    for (const [index, pose] of given.entries()) {
      played.see({ pixels: null, pose, index });
      if (played.phase === "replay") return [index, played.best.index];
    }
    return null;
"""


@needs_node
@pytest.mark.parametrize("beside", [0.0, 0.3, 1.0])
def test_home_is_where_the_other_page_says(beside: float) -> None:
    """Past the start, at some distance from it: the closest frame counts, once a closer one is unlikely."""
    chords = ["w"] * 40 + ["a"] * round(beside / camera.STEP) + ["s"] * 80
    keyboard, mouse = camera.actions_from_keys(chords)
    poses = camera.integrate((0, -1.6, 0, 0, 0), keyboard, mouse).tolist()
    mine = Game()
    mine.pose = poses[0]
    picture = np.zeros((2, 2, 3), np.uint8)

    # who has not left yet is at home: the way back begins where the way out ends
    ends = [k for k, pose in enumerate(poses) if mine.arrived(picture, pose, k)][:1]
    expected = [ends[0], mine.best.frame] if ends else None
    assert javascript(RULES, poses) == expected


@needs_node
def test_both_pages_measure_alike() -> None:
    one, other = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    opaque = np.full((8, 8, 1), 255, np.uint8)
    given = [np.concatenate([p, opaque], 2).flatten().tolist() for p in (one, other)]
    theirs = javascript("return game.likeness(given[0], given[1]);", given)
    assert wayback.likeness(one, other) == pytest.approx(theirs, abs=1e-4)
    assert wayback.distance([3, 0, 4, 0, 355], [0, 0, 0, 0, 5]) == (5, 10)


@needs_node
def test_the_other_page_leads_home_whatever_was_dragged() -> None:
    chords = ["w+l2.5", "a", "i0.5", "_"]
    back = javascript("return camera.invert(given);", chords)
    assert back == ["_", "k0.5", "d", "s+j2.5"]
