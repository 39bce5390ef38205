"""What camera.py promises."""

import math
from pathlib import Path

import pytest
import torch
from helpers import best_time, clip_context, keys, random_actions, random_cameras, released_pose5
from safetensors.torch import load_file
from torch import Tensor, float64
from torch.testing import assert_close

import released
from camera import (
    ANCHORED_SCALE,
    STEP,
    anchored_rays,
    c2w_to_pose,
    integrate,
    intrinsics,
    is_rigid,
    moment,
    pose_to_c2w,
    position,
    rays,
    relative,
    rotation,
    step_pose,
)

HOME = (0, 0, 0, 0, 0)
GOLDEN = Path(__file__).parent / "golden"
CAMERA = load_file(GOLDEN / "camera.safetensors")
ROLLOUT = load_file(GOLDEN / "rollout.safetensors")


def test_actions_then_their_inverses_return_home() -> None:
    keyboard, mouse = random_actions(600, 0)
    poses = integrate((1, -1.6, 2, 5, 30), keyboard, mouse)
    opposite = [1, 0, 3, 2, 4, 5]  # w <-> s, a <-> d
    backwards = keyboard.flip(0)
    back = integrate(poses[-1].tolist(), backwards[:, opposite], -mouse.flip(0))
    assert_close(back.flip(0), poses, atol=1e-10, rtol=0)


def test_a_circle_closes_across_the_yaw_seam_and_the_released_one_does_not() -> None:
    keyboard = torch.tensor(keys("w")).expand(241, 6)
    mouse = torch.tensor([0.0, 0.1], dtype=float64).expand(241, 2)

    def gap(poses: Tensor) -> Tensor:
        return (poses[-1, :3] - poses[0, :3]).norm()

    ours = integrate(HOME, keyboard[:240], mouse[:240])
    theirs = released.poses(keyboard, mouse)
    assert gap(ours) < 1e-9
    assert 24 < gap(theirs) < 25.5


def test_poses_survive_the_camera_matrix() -> None:
    poses = [[1, -1.6, 3, 40, 170], [0, 0, 0, -80, -30.0]]
    poses = torch.tensor(poses, dtype=float64)
    back = c2w_to_pose(pose_to_c2w(poses))
    assert_close(back, poses)


def test_relative_undoes_itself_and_keeps_precision_far_from_home() -> None:
    a = random_cameras(20, 1)
    b = random_cameras(20, 2)
    g = relative(a, b)
    assert_close(a @ g, b)

    far = torch.eye(4, dtype=float64)
    far[:3, 3] = torch.tensor([1e6, 0, -1e6])
    far_g = relative(far @ a, far @ b)
    assert_close(far_g, g, atol=1e-8, rtol=0)


def test_the_released_convention_is_left_handed_and_comes_back_exactly() -> None:
    c2w = random_cameras(20)
    theirs = released.to_released(c2w)
    handedness = torch.linalg.det(rotation(theirs))
    assert (handedness < 0).all()
    assert is_rigid(c2w).all()
    assert torch.equal(released.from_released(theirs), c2w)
    assert not is_rigid(theirs).any()


def test_w_moves_along_the_view_and_d_to_its_right() -> None:
    pose = (1.0, -1.6, 2.0, 0.0, 37.0)
    c2w = pose_to_c2w(torch.tensor(pose, dtype=float64))
    right, _, forward = rotation(c2w).unbind(1)
    for key, way in {"w": forward, "s": -forward, "d": right, "a": -right}.items():
        after = step_pose(pose, keys(key), (0, 0))
        moved = torch.tensor(after[:3], dtype=float64) - position(c2w)
        assert_close(moved, STEP * way)

    after = step_pose(pose, keys("w d"), (0, 0))
    moved = math.dist(after[:3], pose[:3])
    assert moved == pytest.approx(STEP)
    assert step_pose(pose, keys("w s jump attack"), (0.019, -0.019)) == pose


def test_mouse_units_are_fifteen_degrees_and_pitch_up_looks_up() -> None:
    after = step_pose(HOME, keys(), (0.1, 2))
    assert after[3:] == pytest.approx((1.5, 30))

    def forward(pitch: float, yaw: float) -> Tensor:
        return pose_to_c2w(torch.tensor([0, 0, 0, pitch, yaw]))[:3, 2]

    assert forward(10.0, 0.0)[1] < 0  # y points down
    assert forward(0.0, 10.0)[0] > 0
    after = step_pose((0, 0, 0, 59, 0), keys(), (1, 0), max_pitch=60)
    assert after[3] == 60


def test_rays_are_unit_and_the_centre_looks_forward() -> None:
    c2w = random_cameras(3)
    K = intrinsics(33, 65)
    origins, directions = rays(c2w, K, 33, 65).split(3, 1)
    lengths = directions.norm(dim=1)
    assert_close(lengths, torch.ones_like(lengths))
    assert_close(directions[:, :, 16, 32], c2w[:, :3, 2])
    assert_close(origins[:, :, 5, 7], position(c2w))
    assert K.tolist() == pytest.approx([32.5, 32.5, 32.5, 16.5])


@pytest.mark.parametrize("golden", [CAMERA, ROLLOUT], ids=["camera", "rollout"])
def test_released_poses_and_cameras_match_bit_for_bit(golden: dict) -> None:
    keyboard = golden["keyboard"]
    mouse = golden["mouse"]
    assert torch.equal(released.poses(keyboard, mouse), golden["poses"])

    pose = released_pose5(golden["poses"])
    extrinsics = released.to_released(pose_to_c2w(pose))
    assert_close(extrinsics, golden["extrinsics"], atol=1e-12, rtol=0)

    until_last = keyboard[:-1], mouse[:-1]
    ours = integrate(HOME, *until_last)
    assert_close(ours, pose, atol=3e-3, rtol=0)  # 8.73 cm is our 12.35/√2 rounded


def test_anchored_rays_are_what_they_say() -> None:
    cameras = random_cameras(2 * 3 * 4).view(2, 3, 4, 4, 4)
    anchor = random_cameras(2, 9)
    K = intrinsics(5, 6)
    image = anchored_rays(cameras, anchor, K, 5, 6)

    slow = rays(relative(anchor[:, None, None], cameras), K, 5, 6)  # (2, 3, 4, 6, 5, 6)
    o, d = slow.split(3, -3)
    o = o / ANCHORED_SCALE
    x, _, z = d.unbind(-3)
    azimuth = torch.atan2(x, z)
    waves = []
    for k in (2, 4, 8):
        waves += [(k * azimuth).cos(), (k * azimuth).sin()]
    moment = torch.linalg.cross(o, d, dim=-3)
    wanted = torch.cat([o, d, moment, torch.stack(waves, -3)], -3)
    wanted = wanted.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)

    assert image.shape == (2, 60, 3, 5, 6)
    assert_close(image, wanted.float(), atol=2e-5, rtol=0)


def test_the_moment_of_a_line_is_the_same_from_every_point_on_it() -> None:
    o = torch.randn(3, 10, dtype=float64)
    d = torch.randn(3, 10, dtype=float64)
    along = o + torch.randn(10, dtype=float64) * d
    assert_close(moment(along, d), moment(o, d))


def test_building_a_training_context_costs_milliseconds() -> None:
    B = 16
    frames = 241
    c2w = random_cameras(B * frames).view(B, frames, 4, 4).float()
    latents = torch.zeros(B, 16, 61, 8, 8)
    keyboard = torch.zeros(B, frames, 6)
    mouse = torch.zeros(B, frames, 2)
    text = torch.zeros(B, 3, 4)
    start = torch.randint(20, 50, (B,))
    index = torch.randint(1, 15, (B, 5))

    def build() -> None:
        clip_context(latents, c2w, keyboard, mouse, text, start, 10, 4, index)

    assert best_time(build) < 20e-3  # measured: 3 ms
