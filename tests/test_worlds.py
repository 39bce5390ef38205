"""What worlds.py promises, and the geometry of truth.py on its walks."""

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


@pytest.fixture(scope="module")
def walk() -> tuple[Script, Views]:
    """Eighteen degrees to the right, then half a metre on."""
    script = worlds.place(TEST, "l:12 w:4")
    return script, worlds.draw(script)


# ---- plans -----------------------------------------------------------------------------------------


def test_a_number_after_a_turn_multiplies_it() -> None:
    keyboard, mouse = worlds.actions_of("j2.5:2 w:1 -:1")
    assert mouse[:, 1].tolist() == pytest.approx([-0.25, -0.25, 0, 0])
    assert keyboard[:, 0].tolist() == [0, 0, 1, 0]
    assert worlds.actions_of("")[0].shape == (0, 6)


def test_an_undone_plan_leads_home_frame_by_frame() -> None:
    plan = "l2:40 w:4 -:12 a:4"
    keyboard, mouse = worlds.actions_of(f"{plan} {worlds.undone(plan)}")
    poses = camera.integrate((1, -1.6, 2, 0, 30), keyboard, mouse)
    assert torch.allclose(poses, poses.flip(0), atol=1e-5)
    turned = poses[60] - poses[0]
    assert float(turned[4]) == pytest.approx(120, abs=1e-3)


@pytest.mark.parametrize("name", PLACES)
def test_scripts_are_free_of_contact_and_come_back(name: str) -> None:
    offset = PLACES[name]
    script = worlds.revisit(TEST + 2, offset)
    player = world.World(script.scene, pose=script.poses[0].tolist())
    assert not worlds.touches(player, script.keyboard, script.mouse)
    apart = script.poses[-1] - script.poses[0]
    assert float(apart[[0, 2]].norm()) == pytest.approx(offset, abs=0.07)
    assert float(apart[4]) == pytest.approx(360, abs=1e-3)


def test_a_path_without_room_says_so() -> None:
    with pytest.raises(ValueError, match="shorten it"):
        worlds.place(TEST, "w:4000")


def test_the_lists_of_worlds_are_disjoint() -> None:
    lists = [set(seeds) for seeds in scene.SPLITS.values()]
    assert set(scene.SPLITS) == {"train", "tune", "test", "final"}
    assert sum(map(len, lists)) == len(set.union(*lists))


def test_in_third_person_the_player_stands_in_the_picture() -> None:
    script = worlds.place(TEST, "l:12 w:4", view="third")
    frames, depth, c2w = worlds.draw(script, [0])
    K = camera.intrinsics(64, 64).numpy()
    bare = render.render(script.scene, c2w, K, 64, 64)[0]
    changed = (bare != frames).any(-1)[0]
    assert 0.01 < changed.mean() < 0.5
    assert not np.allclose(c2w[0, :3, 3], script.poses[0, :3])
    assert (depth[0][changed] < 4).mean() > 0.8  # an arm's length away


# ---- measures, on frames of a world ----------------------------------------------------------------


@pytest.mark.parametrize("name", metrics.METRICS)
def test_every_measure_ranks_truth_above_a_turn_above_another_world(
    name: str, walk: tuple[Script, Views]
) -> None:
    script, views = walk
    score = metrics.METRICS[name]
    true = views.frames[12:16]
    poses = script.poses[12:16].numpy()
    turned = worlds.shoot(script.scene, poses + [0, 0, 0, 0, 2.0]).frames
    elsewhere = worlds.place(TEST + 1, "l:12 w:4")
    other = worlds.draw(elsewhere, slice(12, 16)).frames
    best = float(score(true, true).mean())
    near = float(score(turned, true).mean())
    far = float(score(other, true).mean())
    assert best > near > far


# ---- geometry --------------------------------------------------------------------------------------


def seen_by(views: Views, at: slice, bank: slice) -> torch.Tensor:
    """Which pixels of frames `at` each frame of `bank` saw."""
    return truth.visible(views.depth[at], views.c2w[at], views.depth[bank], views.c2w[bank])


def test_a_view_sees_itself_and_nothing_behind_its_back(walk: tuple[Script, Views]) -> None:
    script, views = walk
    first = slice(0, 1)
    assert seen_by(views, first, first).float().mean() > 0.99
    back = worlds.shoot(script.scene, script.poses[first].numpy() + [0, 0, 0, 0, 180.0])
    behind = truth.visible(views.depth[first], views.c2w[first], back.depth, back.c2w)
    assert not behind.any()


def test_what_is_new_after_a_turn_lies_on_its_side(walk: tuple[Script, Views]) -> None:
    _, views = walk
    seen = seen_by(views, slice(12, 13), slice(0, 1))[0, 0].numpy()
    assert 0.5 < seen.mean() < 0.95  # 18 degrees further right: a part is new
    columns = np.flatnonzero(~seen.any(0))
    assert len(columns)
    assert columns.min() > 32


def test_registration_finds_where_clean_frames_were_taken() -> None:
    errors = []
    for seed in (TEST, TEST + 1, TEST + 2):
        script = worlds.place(seed, "l:12 w:4")
        frame = worlds.draw(script, [12]).frames[0]
        pose = script.poses[12].numpy()
        start = pose + np.array([0.1, 0, -0.1, 0, 6.0])
        found = worlds.register(script.scene, frame, start)
        assert found.score > 0.99
        errors.append(np.abs(found.pose - pose))
    x, _, z, _, yaw = np.transpose(errors)
    assert np.median(yaw) < 0.25
    assert np.median(np.hypot(x, z)) < 0.01


def test_the_oracle_warp_is_exact_where_it_stands(walk: tuple[Script, Views]) -> None:
    frames, depth, c2w = walk[1]
    shown = torch.from_numpy(frames) / 255
    same = truth.warp(depth[:2], c2w[:2], shown[:2], depth[:2], c2w[:2])
    assert psnr(same, frames[:2]).min() > 45


def test_the_oracle_warp_is_better_than_a_copy_elsewhere(walk: tuple[Script, Views]) -> None:
    frames, depth, c2w = walk[1]
    old = slice(0, 9)
    now = slice(14, 17)
    shown = (torch.from_numpy(frames) / 255)[old]
    warped = truth.warp(depth[now], c2w[now], shown, depth[old], c2w[old])
    shares = memory.overlap(torch.from_numpy(c2w[now]), torch.from_numpy(c2w[old]))
    copied = shown[shares.argmax(1)]
    seen = seen_by(walk[1], now, old).any(1)
    moved = psnr(warped, frames[now], seen)
    still = psnr(copied, frames[now], seen)
    assert (moved > still + 5).all()
    assert torch.equal(warped[~seen], copied[~seen]), "what nobody saw is the old frame as it is"
