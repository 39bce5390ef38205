"""What worlds.py promises, and the geometry of truth.py on its walks."""

import math
from itertools import chain

import numpy as np
import pytest
import torch

import camera
import memory
import world
from dataset.film import psnr
from game import render, scene
from lab import metrics, truth, worlds
from lab.revisits import PLACES
from lab.worlds import Script, Views

TEST = scene.SPLITS["test"].start
PLAN = "l:12 w:4"  # eighteen degrees to the right, then half a metre on


@pytest.fixture(scope="module")
def walk() -> tuple[Script, Views]:
    script = worlds.place(TEST, PLAN)
    return script, worlds.draw(script)


def after_turn(script: Script, at: slice, degrees: float) -> Views:
    """The same places, after a turn to the right."""
    poses = script.poses.numpy()[at]
    return worlds.shoot(script.scene, poses + [0, 0, 0, 0, degrees])


# ---- plans -----------------------------------------------------------------------------------------


def test_a_number_after_a_turn_multiplies_it() -> None:
    keyboard, mouse = worlds.actions_of("j2.5:2 w:1 -:1")
    pitch, yaw = mouse.T.tolist()
    forward = keyboard[:, 0].tolist()
    assert yaw == pytest.approx([-0.25, -0.25, 0, 0])
    assert forward == [0, 0, 1, 0]
    assert worlds.actions_of("")[0].shape == (0, 6)


def test_an_undone_plan_leads_home_frame_by_frame() -> None:
    plan = "l2:40 w:4 -:12 a:4"
    there_and_back = f"{plan} {worlds.undone(plan)}"
    start = (1, -1.6, 2, 0, 30)
    poses = camera.integrate(start, *worlds.actions_of(there_and_back))
    assert torch.allclose(poses, poses.flip(0), atol=1e-5)
    turned = poses[60] - poses[0]
    assert turned[4].item() == pytest.approx(120, abs=1e-3)


@pytest.mark.parametrize("name", PLACES)
def test_scripts_are_free_of_contact_and_come_back(name: str) -> None:
    offset = PLACES[name]
    script = worlds.revisit(TEST + 2, offset)
    first = script.poses[0]
    player = world.World(script.scene, pose=first.tolist())
    assert not worlds.touches(player, script.keyboard, script.mouse)
    x, _, z, _, turned = (script.poses[-1] - first).tolist()
    assert math.hypot(x, z) == pytest.approx(offset, abs=0.07)
    assert turned == pytest.approx(360, abs=1e-3)


@pytest.mark.long
def test_a_path_without_room_says_so() -> None:
    with pytest.raises(ValueError, match="shorten it"):
        worlds.place(TEST, "w:400")


def test_the_lists_of_worlds_are_disjoint() -> None:
    assert set(scene.SPLITS) == {"train", "tune", "test", "final"}
    seeds = list(chain(*scene.SPLITS.values()))
    assert len(seeds) == len(set(seeds))


def test_in_third_person_the_player_stands_in_the_picture() -> None:
    script = worlds.place(TEST, PLAN, view="third")
    frames, depth, c2w = worlds.draw(script, [0])
    K = camera.intrinsics(64, 64).numpy()
    bare = render.render(script.scene, c2w, K, 64, 64)[0]
    changed = (bare != frames).any(-1)
    assert 0.01 < changed.mean() < 0.5
    near = depth[changed] < 4
    assert near.mean() > 0.8, "an arm's length away"
    eye = c2w[0, :3, 3]
    assert not np.allclose(eye, script.poses[0, :3])


# ---- measures, on frames of a world ----------------------------------------------------------------


@pytest.mark.parametrize("name", metrics.METRICS)
def test_every_measure_ranks_truth_above_a_turn_above_another_world(
    name: str, walk: tuple[Script, Views]
) -> None:
    script, views = walk
    score = metrics.METRICS[name]
    true = views.frames[12:16]
    turned = after_turn(script, slice(12, 16), 2.0).frames
    elsewhere = worlds.place(TEST + 1, PLAN)
    other = worlds.draw(elsewhere, slice(12, 16)).frames
    best = score(true, true).mean()
    near = score(turned, true).mean()
    far = score(other, true).mean()
    assert best > near > far


# ---- geometry --------------------------------------------------------------------------------------


def some(views: Views, at: slice) -> Views:
    return Views(*(values[at] for values in views))


def seen_by(now: Views, old: Views) -> torch.Tensor:  # (T, N, H, W)
    """Which pixels of new views each old view saw."""
    return truth.visible(now.depth, now.c2w, old.depth, old.c2w)


def warped(now: Views, old: Views) -> torch.Tensor:
    shown = torch.from_numpy(old.frames) / 255
    return truth.warp(now.depth, now.c2w, shown, old.depth, old.c2w)


def test_a_view_sees_itself_and_nothing_behind_its_back(walk: tuple[Script, Views]) -> None:
    script, views = walk
    first = some(views, slice(0, 1))
    assert seen_by(first, first).float().mean() > 0.99
    back = after_turn(script, slice(0, 1), 180.0)
    assert not seen_by(first, back).any()


def test_what_is_new_after_a_turn_lies_on_its_side(walk: tuple[Script, Views]) -> None:
    _, views = walk
    first = some(views, slice(0, 1))
    turned = some(views, slice(12, 13))
    seen = seen_by(turned, first)[0, 0].numpy()
    assert 0.5 < seen.mean() < 0.95  # 18 degrees further right: a part is new
    columns = np.flatnonzero(~seen.any(0))
    assert len(columns)
    assert columns.min() > 32


@pytest.mark.long
def test_registration_finds_where_clean_frames_were_taken() -> None:
    errors = []
    for seed in (TEST, TEST + 1, TEST + 2):
        script = worlds.place(seed, PLAN)
        frame = worlds.draw(script, [12]).frames[0]
        pose = script.poses[12].numpy()
        start = pose + [0.1, 0, -0.1, 0, 6.0]
        found = worlds.register(script.scene, frame, start)
        assert found.score > 0.99
        errors.append(np.abs(found.pose - pose))
    x, _, z, _, yaw = np.transpose(errors)
    assert np.median(yaw) < 0.25
    assert np.median(np.hypot(x, z)) < 0.01


def test_the_oracle_warp_is_exact_where_it_stands(walk: tuple[Script, Views]) -> None:
    two = some(walk[1], slice(2))
    assert psnr(warped(two, two), two.frames).min() > 45


def test_the_oracle_warp_is_better_than_a_copy_elsewhere(walk: tuple[Script, Views]) -> None:
    old = some(walk[1], slice(0, 9))
    now = some(walk[1], slice(14, 17))
    seen = seen_by(now, old).any(1)
    moved = warped(now, old)

    # the rival shows the nearest old frame as it is
    shares = memory.overlap(torch.from_numpy(now.c2w), torch.from_numpy(old.c2w))
    nearest = shares.argmax(1)
    copied = torch.from_numpy(old.frames)[nearest] / 255

    better = psnr(moved, now.frames, seen)
    worse = psnr(copied, now.frames, seen)
    assert (better > worse + 5).all()
    assert torch.equal(moved[~seen], copied[~seen]), "what nobody saw is the old frame as it is"
