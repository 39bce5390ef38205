"""What walks.py and revisits.py promise, with a renderer in place of the model."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import camera
from game import scene
from lab import players, revisits, walks, worlds
from lab.players import AS_PLAYED, How
from lab.run import Run
from lab.worlds import Script

TEST = scene.SPLITS["test"].start
SHORT = (0.5, 1, 2)  # gaps of a walk of one window


def perfect(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    """Latents are poses and decoding is rendering; frozen: every frame is that of the last true one."""

    def dream(
        p: object, script: Script, z: object, segments: int, how: How = AS_PLAYED
    ) -> tuple[torch.Tensor, dict]:
        poses = script.poses[script.known - 1 :]
        if how.actions:
            poses = camera.integrate(poses[0], *how.actions)
        n = len(poses) - 1
        made = poses[:1].expand(n, 5) if frozen else poses[1:]
        return made[None], {}

    def render(p: object, poses: torch.Tensor, last: int) -> torch.Tensor:
        # who stands still, and who returns, sees the same again: every pose is drawn once
        places, which = poses.flatten(0, 1).round(decimals=6).unique(dim=0, return_inverse=True)
        frames = worlds.shoot(worlds.scene(TEST), places.numpy()).frames
        return torch.from_numpy(frames)[which].unflatten(0, poses.shape[:2]) / 255

    def opened(p: object, script: Script, frames: object = None) -> players.Opened:
        return players.Opened(worlds.draw(script).frames, None)

    register = worlds.register
    registered = {}

    def register_once(where: object, frame: torch.Tensor, pose: np.ndarray) -> object:
        asked = np.asarray(frame).tobytes(), np.asarray(pose).tobytes()
        if asked not in registered:
            registered[asked] = register(where, frame, pose)
        return registered[asked]

    monkeypatch.setattr(worlds, "register", register_once)
    monkeypatch.setattr(players, "opened", opened)
    monkeypatch.setattr(players, "rollout", dream)
    monkeypatch.setattr(players, "decode", render)


def fresh_run(out: Path) -> Run:
    return Run([TEST], False, "none", out)


@pytest.mark.long
@pytest.mark.parametrize("out, gaps", [("", SHORT), ("over 8 W ", revisits.GAPS)])
def test_there_and_back_rewards_a_return_and_not_a_standstill(
    out: str, gaps: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{out}from a frame"
    score = {}
    for frozen in (False, True):
        perfect(monkeypatch, frozen)
        run = fresh_run(tmp_path)
        revisits.palindrome(run, None, TEST, name)
        row = f"{name}, camera/"
        found = {key: x[0] for key, x in run.raw.items() if key.startswith(row)}
        score[frozen] = {key.removeprefix(row): x for key, x in found.items()}

    back = score[False]
    assert {key for key in back if "apart" in key} == {f"{gap} W apart" for gap in gaps}
    assert min(back[f"{gap} W apart"] for gap in gaps) > 45
    assert back["travelled / commanded"] == pytest.approx(1, abs=0.05)
    assert back["m"] < 0.02
    assert back["deg"] < 0.5
    assert not back["lost"]

    still = score[True]
    assert max(still[f"{gap} W apart"] for gap in (1, 2)) < 30
    assert abs(still["travelled / commanded"]) < 0.1


@pytest.mark.long
@pytest.mark.parametrize("frozen", [False, True])
def test_opposite_keys_count_only_if_both_act(
    frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perfect(monkeypatch, frozen)
    run = fresh_run(tmp_path)
    walks.opposites(run, partial(walks.draw_arms, None), TEST)
    assert set(run.raw) == {f"KCtrl/{name}" for name in walks.OPPOSITE}
    assert all(values == [float(not frozen)] for values in run.raw.values())


def test_more_clocks_make_distant_times_less_alike() -> None:
    assert revisits.likeness(0.8) < revisits.likeness(0.0)
