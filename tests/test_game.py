"""The game itself behind the methods of a session."""

import math
from pathlib import Path

import numpy as np
import torch

from page.game import FakeSession
from page.start import true_views


def fake() -> FakeSession:
    session = FakeSession((32, 32))
    session.reset(None, "", 3, ())
    return session


def test_the_fake_session_is_the_game() -> None:
    session = fake()
    keyboard = torch.zeros(4, 6)
    mouse = torch.tensor([0.0, 0.1]).repeat(4, 1)
    frames, info = session.step(keyboard, mouse)
    assert frames.shape == (4, 32, 32, 3) and frames.dtype == torch.uint8
    right = true_views(session.inside, np.array(info["poses"]), 32, 32)
    assert np.array_equal(frames.numpy(), right)
    turned = info["poses"][-1][4] - session.poses[0][4]
    assert math.isclose(turned, 6.0, abs_tol=1e-5)


def test_a_fake_undo_and_a_restored_state_go_on_alike(tmp_path: Path) -> None:
    session = fake()
    keyboard = torch.zeros(4, 6)
    mouse = torch.full((4, 2), 0.1)
    first = session.step(keyboard, mouse).frames
    session.undo()
    session.save(tmp_path / "state.safetensors")
    assert torch.equal(session.step(keyboard, mouse).frames, first)
    other = FakeSession((32, 32))
    other.restore(tmp_path / "state.safetensors")
    assert torch.equal(other.step(keyboard, mouse).frames, first)
