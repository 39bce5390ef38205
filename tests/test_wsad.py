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
    runs = []
    for seed in range(6):
        for behaviour in ("rl", "loop"):
            runs.append(world.simulate(make_scene(seed), seed, 241, behaviour))
    return runs


@pytest.fixture(scope="module")
def bumps() -> list[dict]:
    return [world.simulate(make_scene(i), i, 241, "random") for i in range(8)]


def infer(player: np.ndarray, step: float | None = camera.STEP, **options: object) -> wsad.Labels:
    x_y_z = player[:, :3]
    pitch, yaw = player[:, 3:].T
    return wsad.infer_wsad(x_y_z, yaw, pitch, step, **options)


def score(run: dict, labels: wsad.Labels) -> dict[str, float]:
    return wsad.wsad_report(labels, run["keyboard"], run["contact"])


def mean(runs: list[dict], key: str, noise: float = 0.0) -> float:
    shares = []
    for run in runs:
        player = run["player"].copy()
        jitter = np.random.default_rng(0).standard_normal((len(player), 3))
        player[:, :3] += noise * jitter
        shares.append(score(run, infer(player))[key])
    return float(np.nanmean(shares))


def test_keys_are_recovered_from_positions(walks: list[dict]) -> None:
    assert mean(walks, "free") >= 0.999
    assert mean(walks, "valid") >= 0.999
    assert mean(walks, "free", noise=0.01) >= 0.99


def test_known_inertia_is_undone(walks: list[dict]) -> None:
    for run in walks[:4]:
        player = run["player"].copy()
        ground = run["player"][:, [0, 2]]
        d = np.diff(ground, axis=0)
        for t in range(1, len(d)):
            d[t] = 0.5 * d[t] + 0.5 * d[t - 1]  # v_t = k·u_t + (1−k)·v_{t−1}
        player[1:, [0, 2]] = ground[0] + np.cumsum(d, 0)
        assert score(run, infer(player, inertia=0.5))["free"] == 1


def test_a_blocked_player_is_flagged_not_guessed(bumps: list[dict]) -> None:
    wrong = 0
    flagged = 0
    for run in bumps:
        labels = infer(run["player"])
        contact = run["contact"][:-1]
        true = run["keyboard"][:-1, :4].astype(bool)
        step = np.diff(run["player"][:, :3], axis=0)
        moved = np.linalg.norm(step, axis=1) > 0.1 * camera.STEP  # a full stop looks like no key
        miss = contact & moved & (labels.keyboard[:-1, :4] != true).any(1)
        wrong += miss.sum()
        flagged += (miss & ~labels.valid[:-1]).sum()
    assert wrong > 100
    assert flagged / wrong >= 0.95


@pytest.fixture(scope="module")
def bend() -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """A walk to the front right that turns across ±180 degrees."""
    keyboard = torch.zeros(60, 6)
    mouse = torch.zeros(60, 2)
    keyboard[:, [0, 3]] = 1
    mouse[:, 1] = 0.1
    player = camera.integrate((0, -1.6, 0, 0, 150), keyboard, mouse).numpy()
    return player, keyboard, mouse


def test_labels_cross_the_yaw_seam_and_swap_in_a_mirror(bend: tuple) -> None:
    player, keyboard, mouse = bend
    wrapped = player.copy()
    wrapped[:, 4] = (player[:, 4] + 180) % 360 - 180
    labels = infer(wrapped)
    assert (labels.keyboard[:-1] == keyboard.numpy()).all()
    assert np.allclose(labels.mouse[:-1], mouse, atol=1e-5)
    assert labels.valid[:-1].all()

    mirrored = player * [-1, 1, 1, 1, -1]
    left_for_right = infer(mirrored).keyboard[:, [0, 1, 3, 2]]
    assert (left_for_right == labels.keyboard[:, :4]).all()


def test_the_length_of_a_step_is_found_where_the_scale_is_unknown(bend: tuple) -> None:
    player, _, _ = bend
    labels = infer(player * [7, 7, 7, 1, 1], step=None)
    assert labels.valid[:-1].all()


def keys(words: tuple[str, ...]) -> np.ndarray:
    rows = [[key in word.split() for key in camera.KEYS] for word in words]
    return np.array(rows, np.uint8)


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
    assert np.isnan(nowhere["contact"])
    assert nowhere["free"] == nowhere["all"] == 4 / 7


# ---- what is sure, and what is not -------------------------------------------------------------------------


def straight(length: float, degrees: float = 0.0) -> np.ndarray:
    """Nine equal steps of a player who looks along z, `degrees` to the right of that: (10, 5)."""
    player = np.zeros((10, 5))
    steps = length * np.arange(10)
    player[:, 0] = steps * np.sin(np.radians(degrees))
    player[:, 2] = steps * np.cos(np.radians(degrees))
    return player


@pytest.mark.parametrize(
    "share, pressed, valid",
    [
        (0.05, 0, True),  # stands
        (0.2, 0, False),  # neither stands nor walks
        (0.5, 1, False),  # a walk that something slows down
        (1.0, 1, True),
        (1.3, 1, False),  # too fast for a walk
    ],
)
def test_a_step_is_a_walk_a_stand_or_unsure(share: float, pressed: int, valid: bool) -> None:
    labels = infer(straight(share * camera.STEP))
    assert (labels.keyboard[:-1, 0] == pressed).all()
    assert not labels.keyboard[:, 1:].any()
    assert (labels.valid[:-1] == valid).all()


@pytest.mark.parametrize(
    "degrees, keys_held, valid",
    [
        (0, "w", True),
        (9, "w", True),
        (20, "w", False),  # crooked: between two sectors
        (25, "w d", False),
        (45, "w d", True),
        (90, "d", True),
        (180, "s", True),
        (-90, "a", True),
        (-135, "s a", True),
    ],
)
def test_eight_sectors_begin_half_way(degrees: float, keys_held: str, valid: bool) -> None:
    labels = infer(straight(camera.STEP, degrees))
    assert (labels.keyboard[:-1] == keys((keys_held,))[0]).all()
    assert (labels.valid[:-1] == valid).all()


def test_the_last_row_moves_nothing_and_is_never_valid() -> None:
    labels = infer(straight(camera.STEP))
    assert not labels.valid[-1]
    assert not labels.keyboard[-1].any()
    assert not labels.mouse[-1].any()


def test_a_turn_below_the_dead_zone_is_none() -> None:
    player = straight(camera.STEP)
    player[:, 4] = 0.9 * camera.DEAD_ZONE * camera.DEGREES * np.arange(10)
    assert not infer(player).mouse.any()
    player[:, 4] *= 2
    assert infer(player).mouse[:-1, 1].all()


def test_standing_about_does_not_change_what_a_step_is() -> None:
    rest = np.zeros((30, 5))
    rest[:, 0] = 1e-4 * (np.arange(30) % 2)
    player = np.concatenate([rest, straight(0.7), rest + straight(0.7)[-1]])
    assert infer(player, step=None).valid[30:38].all()


def test_noise_is_smoothed_where_it_would_hide_a_step(walks: list[dict]) -> None:
    right = []
    for smooth in (None, False):
        shares = []
        for run in walks[:6]:
            player = run["player"].copy()
            jitter = np.random.default_rng(0).standard_normal((len(player), 3))
            player[:, :3] += 0.03 * jitter
            shares.append(score(run, infer(player, smooth=smooth))["free"])
        right.append(np.mean(shares))
    assert right[0] > right[1] + 0.05, right
