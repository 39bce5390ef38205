"""What the action language promises: every string is parsed, or its mistake is pointed at."""

import contextlib
import random
from pathlib import Path

import numpy as np
import pytest

import camera
from dataset.chords import PRESETS, latents_of, read_actions
from dataset.episode import poses_to_c2w


def test_an_action_string_is_one_chord_per_frame() -> None:
    assert latents_of("w:4, w+l:4")[0] == ["w"] * 4 + ["w+l"] * 4
    assert latents_of(" w + l : 8 ")[0] == ["w+l"] * 8
    assert latents_of("_:2s", fps=16)[0] == ["_"] * 32


def test_random_legal_strings_parse_to_their_length() -> None:
    random.seed(0)
    for _ in range(300):
        items = [
            ("+".join(random.sample("wasdijkl", random.randint(1, 3))), 4 * random.randint(1, 50))
            for _ in range(random.randint(1, 6))
        ]
        chords, notes = latents_of(
            ",".join(f"{' ' * random.randint(0, 2)}{keys}:{count}" for keys, count in items)
        )
        assert chords == [keys for keys, count in items for _ in range(count)] and not notes


def test_random_garbage_is_an_error_with_a_caret_or_parses() -> None:
    random.seed(1)
    for _ in range(3000):
        text = "".join(random.choice("wasdx_:+,@ 0123s.\té") for _ in range(random.randint(0, 12)))
        try:
            chords, _ = latents_of(text)
            assert len(chords) % 4 == 0
        except ValueError as error:
            line, caret = str(error).split("\n")[0], str(error).split("\n")[-1]
            assert (
                line.startswith("--actions ")
                and caret.strip().startswith("^")
                and caret.index("^") <= 11 + len(text)
            )


def test_hypothesis_agrees_that_every_string_is_parsed_or_explained() -> None:
    hypothesis = pytest.importorskip(
        "hypothesis", reason="property tests need: pip install hypothesis"
    )

    @hypothesis.settings(max_examples=50, deadline=None, database=None)
    @hypothesis.given(hypothesis.strategies.text(max_size=30))
    def explained(text: str) -> None:
        with contextlib.suppress(ValueError):
            assert len(latents_of(text)[0]) % 4 == 0

    explained()


@pytest.mark.parametrize(
    "text, column, message",
    [
        ("w:40, x:10", 6, "unknown key 'x'; use w a s d i j k l _"),
        ("w+q:4", 2, "unknown key 'q'"),
        ("w:40,", 5, "expected keys:count"),
        ("w", 0, "expected keys:count"),
        ("w:4x", 2, "'4x' is no count; use frames (40) or seconds (2s)"),
        ("_+w:4", 0, "unknown key '_'"),
        ("@nowhere", 0, "@revisit @spin @square @idle"),
        ("w++a:4", 0, "expected keys:count"),
        ("w:-4", 2, "is no count"),
        ("", 0, "expected keys:count"),
    ],
)
def test_a_bad_action_string_points_at_the_column(text: str, column: int, message: str) -> None:
    with pytest.raises(ValueError, match="actions") as caught:
        latents_of(text)
    line, caret = str(caught.value).split("\n")
    assert line == f'--actions "{text}"' and caret.index("^") == 11 + column and message in caret


def test_counts_are_rounded_to_latents_with_a_note() -> None:
    chords, notes = latents_of("w:41, a:1, d:8")
    assert len(chords) == 40 + 4 + 8
    assert notes == [
        "w:41: 41 frames rounded to 40, a multiple of 4",
        "a:1: 1 frames rounded to 4, a multiple of 4",
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_return_to_their_heading(preset: str) -> None:
    keyboard, mouse, _ = read_actions(preset, 16)
    turned = 15 * mouse[:, 1].sum()
    assert abs((turned + 180) % 360 - 180) < 1e-3 and len(keyboard) % 4 == 0


def test_action_files_are_read_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "walk.txt").write_text("w:8\nw+l:8\n")
    keyboard, mouse, _ = read_actions(str(tmp_path / "walk.txt"), 16)
    assert keyboard[:, 0].sum() == 16 and mouse[8:, 1].min() > 0
    np.savez(tmp_path / "keys.npz", keyboard=keyboard, mouse=mouse)
    assert np.array_equal(read_actions(str(tmp_path / "keys.npz"), 16)[1], mouse)
    poses = [(0.0, -1.6, 0.0, 0.0, 0.0)]
    for keys, turn in zip(keyboard.tolist(), mouse.tolist(), strict=True):
        poses.append(camera.step_pose(poses[-1], keys, turn))
    np.savez(tmp_path / "poses.npz", poses=poses_to_c2w(np.array(poses)))
    again, turn, notes = read_actions(str(tmp_path / "poses.npz"), 16)
    assert np.array_equal(again, keyboard) and np.abs(turn - mouse).max() < 1e-3 and notes
    with pytest.raises(
        ValueError,
        match=r"--actions gone.npz: no such file. Give one that exists, or a string like",
    ):
        read_actions("gone.npz", 16)
    np.savez(tmp_path / "odd.npz", nothing=np.zeros(3))
    with pytest.raises(
        ValueError, match=r"odd.npz holds nothing; expected keyboard \(F, 6\) and mouse"
    ):
        read_actions(str(tmp_path / "odd.npz"), 16)
