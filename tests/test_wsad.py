"""What wsad.py promises."""

import numpy as np
import pytest
import torch

import camera
import world
from dataset import wsad
from game.scene import make_scene


@pytest.fixture(scope="module")
def walks() -> list[dict]:
    return [
        world.simulate(make_scene(i), i, 241, behaviour)
        for i in range(6)
        for behaviour in ("rl", "loop")
    ]


@pytest.fixture(scope="module")
def bumps() -> list[dict]:
    return [world.simulate(make_scene(i), i, 241, "random") for i in range(8)]


def infer(run: dict, noise: float = 0.0, **options: object) -> wsad.Labels:
    player = run["player"] + np.pad(
        noise * np.random.default_rng(0).standard_normal((len(run["player"]), 3)), ((0, 0), (0, 2))
    )
    return wsad.infer_wsad(player[:, :3], player[:, 4], player[:, 3], camera.STEP, **options)


def mean(runs: list[dict], key: str, noise: float = 0.0) -> float:
    return float(
        np.nanmean(
            [
                wsad.wsad_report(infer(run, noise), run["keyboard"], run["contact"])[key]
                for run in runs
            ]
        )
    )


def test_keys_are_recovered_from_positions(walks: list[dict]) -> None:
    assert mean(walks, "free") >= 0.999 and mean(walks, "valid") >= 0.999
    assert mean(walks, "free", noise=0.01) >= 0.99


def test_known_inertia_is_undone(walks: list[dict]) -> None:
    for run in walks[:4]:
        player, d = run["player"].copy(), np.diff(run["player"][:, [0, 2]], axis=0)
        for t in range(1, len(d)):
            d[t] = 0.5 * d[t] + 0.5 * d[t - 1]  # v_t = k·u_t + (1−k)·v_{t−1}
        player[1:, [0, 2]] = player[0, [0, 2]] + np.cumsum(d, 0)
        labels = wsad.infer_wsad(
            player[:, :3], player[:, 4], player[:, 3], camera.STEP, inertia=0.5
        )
        assert wsad.wsad_report(labels, run["keyboard"], run["contact"])["free"] == 1


def test_a_blocked_player_is_flagged_not_guessed(bumps: list[dict]) -> None:
    wrong = flagged = 0
    for run in bumps:
        labels, contact = infer(run), run["contact"][:-1]
        true = run["keyboard"][:-1, :4].astype(bool)
        moved = (
            np.linalg.norm(np.diff(run["player"][:, :3], axis=0), axis=1) > 0.1 * camera.STEP
        )  # a full stop looks like no key
        miss = contact & moved & (labels.keyboard[:-1, :4] != true).any(1)
        wrong, flagged = wrong + miss.sum(), flagged + (miss & ~labels.valid[:-1]).sum()
    assert wrong > 100 and flagged / wrong >= 0.95


def test_labels_cross_the_yaw_seam_and_swap_in_a_mirror() -> None:
    keyboard, mouse = torch.zeros(60, 6), torch.zeros(60, 2)
    keyboard[:, 0], keyboard[:, 3], mouse[:, 1] = 1, 1, 0.1
    player = camera.integrate((0, -1.6, 0, 0, 150), keyboard, mouse).numpy()
    wrapped = (player[:, 4] + 180) % 360 - 180
    labels = wsad.infer_wsad(player[:, :3], wrapped, player[:, 3], camera.STEP)
    assert (
        (labels.keyboard[:-1] == keyboard.numpy()).all()
        and np.allclose(labels.mouse[:-1], mouse, atol=1e-5)
        and labels.valid[:-1].all()
    )
    mirror = wsad.infer_wsad(player[:, :3] * [-1, 1, 1], -player[:, 4], player[:, 3], camera.STEP)
    assert (mirror.keyboard[:, [0, 1, 3, 2]] == labels.keyboard[:, :4]).all()
    assert (
        wsad.infer_wsad(player[:, :3] * 7, player[:, 4], player[:, 3]).valid[:-1].all()
    )  # unknown scale: v0 from the data


def test_the_score_of_the_keys_by_hand() -> None:
    rows = (  # held, read, valid, contact
        ("w jump", "w", True, False),  # right: jumps are not asked for
        ("w s", "", True, False),  # right: opposite keys cancel
        ("w a d", "w", False, False),  # right
        ("w a", "w", False, False),  # one of two keys is not enough
        ("d", "a", True, False),  # wrong
        ("s", "s", False, True),  # right
        ("w", "", False, True),  # wrong
        ("w", "s", True, True),  # the last row leads nowhere and is not scored
    )

    def keys(words: tuple[str, ...]) -> np.ndarray:
        return np.array([[key in word.split() for key in camera.KEYS] for word in words], np.uint8)

    held, read, valid, contact = zip(*rows, strict=True)
    labels = wsad.Labels(keys(read), np.zeros((8, 2)), np.array(valid))
    assert wsad.wsad_report(labels, keys(held), np.array(contact)) == {
        "all": 4 / 7,
        "free": 3 / 5,
        "contact": 1 / 2,
        "valid": 2 / 3,
        "coverage": 3 / 7,
    }
    nowhere = wsad.wsad_report(labels, keys(held), np.zeros(8, bool))
    assert np.isnan(nowhere["contact"]) and nowhere["free"] == nowhere["all"] == 4 / 7
