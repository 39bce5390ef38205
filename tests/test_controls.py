"""What the controls promise: a tap is never lost, a turn adds up, a pitch stays within its limits."""

import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest

from page.controls import MAX_LOOK, Controls
from page.screen import Screen


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_tap_is_never_lost() -> None:
    clock = Clock()
    controls = Controls(clock)
    clock.now = 0.1
    controls.post(["w"])
    clock.now = 0.101
    controls.post([])
    keyboard, _, said = controls.read(40, 40)
    assert keyboard[:4, 0].all() and not keyboard[4:, 0].any() and said["keys"] == ["w"]
    assert not controls.read(40, 40)[0].any(), "a tap acts once"


def test_a_tap_lasts_as_long_as_the_key_was_down() -> None:
    clock = Clock()
    controls = Controls(clock)
    controls.post(["d"])
    clock.now = 0.5
    controls.post([])
    assert controls.read(40, 40)[0][:, 3].sum() == 20  # half a second at 40 fps


def test_a_key_held_over_a_decision_ends_with_its_release() -> None:
    clock = Clock()
    controls = Controls(clock)
    controls.post(["w"])
    clock.now = 1.0
    assert controls.read(40, 40)[0][:, 0].all()
    clock.now = 1.2
    controls.post([])
    assert not controls.read(40, 40)[0].any()


def test_opposite_keys_cancel_and_others_combine() -> None:
    controls = Controls(Clock())
    controls.post(["w", "s", "d"])
    keyboard, mouse, _ = controls.read(8, 40)
    assert keyboard.sum(0).tolist() == [0, 0, 0, 8, 0, 0]
    controls.post(["j", "l"])
    assert not controls.read(8, 40)[1].any()


def test_mouse_pixels_add_up_until_the_decision_and_say_when_they_are_clipped() -> None:
    controls = Controls(Clock())
    controls.post([], 10, -5)
    controls.post([], 30, 0)
    _, mouse, said = controls.read(40, 40)
    assert (
        np.allclose(mouse.sum(0), [0.05, 0.4], atol=1e-6) and not said["clipped"]
    )  # right and up are positive
    controls.post([], 1e4, 0)
    _, mouse, said = controls.read(40, 40)
    assert said["clipped"] and mouse.max() == np.float32(MAX_LOOK)


def test_pitch_stays_within_its_limit() -> None:
    controls, pitch = Controls(Clock()), 0.0
    controls.post(["i"])
    for _ in range(4):
        _, mouse, _ = controls.read(40, 40, pitch, limit=85)
        pitch += 15 * mouse[:, 0].sum()
    assert math.isclose(pitch, 85, abs_tol=1e-3)


def waits_for(lock: AbstractContextManager, look: Callable[[], object]) -> bool:
    """Whether another thread, which looks now, comes back only once the lock is free."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(look()), daemon=True)
    with lock:
        thread.start()
        thread.join(0.2)
        waited = thread.is_alive()
    thread.join(20)
    return waited and len(found) == 1


def test_what_other_threads_change_is_read_under_its_lock() -> None:
    controls = Controls()
    controls.post(["w", "a"])
    assert controls.down() == ["a", "w"]
    assert waits_for(controls.lock, controls.down)

    screen = Screen()
    with screen.seat() as viewer:
        assert screen.plays(viewer) and not screen.plays("another")
        assert waits_for(screen.changed, lambda: screen.plays(viewer))


def test_nobody_waits_while_a_frame_becomes_a_jpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    free = []

    def encode(frame: np.ndarray) -> bytes:
        player = threading.Thread(target=screen.note, kwargs={"stage": "drawing"}, daemon=True)
        player.start()
        player.join(5)
        free.append(not player.is_alive())
        return b"a picture"

    monkeypatch.setattr("page.screen.jpeg_of", encode)
    with screen.seat() as viewer:
        screen.put(np.zeros((1, 8, 8, 3), np.uint8), [{"frame": 1}], 0.01)
        records = screen.take(viewer)
    assert records[-1][1] == b"a picture" and free == [True]
