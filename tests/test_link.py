"""What page/link.py promises: a walk and its link are the same walk, in both pages."""

from pathlib import Path

import numpy as np
import pytest
from playing import Viewer, act, dreaming, page, wait_for
from test_web import javascript, needs_node

import camera
from page import link, opening
from page.controls import Controls, legal

LENGTHS = [10, 5, 2]
LINKS = [
    "",
    "#seed=7&start=3&new=2&do=w:40,l:60",
    "#do=w:40,w+l:20,_:8,s+k:12",
    "#start=9&do=w%3A5,w+l2.5:8,j0.0125:4",
]
WRONG = [
    ("#seed=x", "seed is a whole number from 0 to 2147483647, not “x”"),
    ("#start=10", "start is a whole number from 0 to 9, not “10”"),
    ("#new=3", "new is one of 10, 5, 2"),
    ("#walk=w:40", "“walk” is none of seed, start, new, do"),
    ("#do=w:99999", "the walk is longer than 40000 frames"),
    ("#do=q:40", "unknown key 'q'"),
    ("#do=w40", "unknown key 'w40'"),
    ("#do=%E0%A4%A", "codec can't decode"),
    ("#" + "&" * 300_000, "it is too long"),
]


def same_again(text: str) -> tuple[link.Walk, str]:
    walk = link.parse(text, 10, LENGTHS)
    return walk, link.write(walk, LENGTHS)


def test_a_link_is_the_walk() -> None:
    walk, again = same_again(LINKS[1])
    assert walk == (7, 3, 2, ("w",) * 40 + ("l",) * 60)
    assert again == LINKS[1]
    assert same_again("")[1] == "#seed=42&start=0"
    assert same_again("#do=w:4")[0].new == 10, "the longest segments need no words"


@pytest.mark.parametrize("text, says", WRONG)
def test_a_link_that_says_nothing_is_explained(text: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        link.parse(text, 10, LENGTHS)
    assert says in str(error.value) and "\n" not in str(error.value)


@needs_node
def test_both_pages_read_a_link_alike() -> None:
    program = """
        const facts = { starts: 10, lengths: [10, 5, 2] };
        return given.map((text) => {
          const found = walk.parseHash(text, facts);
          return { ...found, again: walk.formatHash(found, facts) };
        });
    """
    for text, theirs in zip(LINKS, javascript(program, LINKS), strict=True):
        walk, again = same_again(text)
        assert (walk.seed, walk.start) == (theirs["seed"], theirs["start"])
        assert walk.new == (theirs["fresh"] or 0)
        assert list(walk.chords) == theirs["chords"]
        assert again == theirs["again"]


@needs_node
def test_both_pages_refuse_the_same_links() -> None:
    program = """
        const refused = (text) => {
          try { walk.parseHash(text, { starts: 10, lengths: [10, 5, 2] }); return false; }
          catch (error) { return true; }
        };
        return given.map(refused);
    """
    assert all(javascript(program, [text for text, _ in WRONG[:-1]]))


def test_what_a_mouse_turns_is_written_exactly() -> None:
    controls = Controls()
    generator = np.random.default_rng(0)
    for n in (4, 8, 20, 40, 56):
        controls.post(["w", "d"], *generator.integers(-300, 300, 2))
        keyboard, mouse, _ = controls.read(n, 40)
        chords = [link.chord_of(*row) for row in zip(keyboard, mouse, strict=True)]
        again = legal(*map(np.array, camera.actions_from_keys(chords)), 0, 85)
        assert np.array_equal(again[0], keyboard) and np.array_equal(again[1], mouse)


# ---- behind the page ----------------------------------------------------------------------------


def test_a_walk_is_played_again_from_its_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    player.seed = 7
    player.reset(player.begun)
    act(player, "l1.25")
    act(player, "j")
    text = opening.link_of(player)
    assert text == "#seed=7&start=0&do=l1.25:56,j:40"
    poses, newest = player.poses, player.newest

    player.seed = 8
    player.reset(player.begun)
    opening.walk_link(player, text)
    for key in "lj":
        assert player.script
        keyboard, mouse, about = player.decide(player.session.frames_needed)
        assert about["keys"] == [key]
        player.chunk(keyboard, mouse, about)
    assert player.poses == poses
    assert np.array_equal(player.newest, newest), "the same noise"
    assert not player.script, "from here on the keys are the player's"
    assert opening.link_of(player) == text
    player.undo()
    assert opening.link_of(player) == "#seed=7&start=0&do=l1.25:56"


@pytest.mark.long
def test_a_link_is_played_in_the_page_and_a_foreign_one_is_told(tmp_path: Path) -> None:
    with page(tmp_path) as (player, server):
        viewer = Viewer(server)
        viewer.post("/cmd", cmd="walk", link="#seed=5&start=3&do=w:40,l:60")
        wait_for(lambda: player.seed == 5 and player.frame >= 100)
        assert player.begun.number == 3
        assert player.poses[25][4] - player.poses[0][4] == pytest.approx(90)

        viewer.post("/cmd", cmd="walk", link="#seed=x")
        wait_for(lambda: told(player, "info", "The walk in this link is ignored: seed is a"))
        assert player.seed == 5
        viewer.post("/cmd", cmd="share")
        wait_for(lambda: told(player, "link", "#seed=5&start=3&do=w:40,l:60"))
        viewer.close()


def told(player, name: str, text: str) -> bool:
    return any(text in note.get(name, "") for _, note in list(player.screen.notes))


def test_a_picture_of_one_s_own_has_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = dreaming(tmp_path, monkeypatch)
    player.begun = player.begun.__class__(player.begun.image)
    with pytest.raises(ValueError, match="began with one of the start pictures"):
        opening.link_of(player)
