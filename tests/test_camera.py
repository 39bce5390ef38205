"""What camera.py promises."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import clip_context
from safetensors.torch import load_file

import camera
from camera import relative

GOLDEN = Path(__file__).parent / "golden"
CAMERA, ROLLOUT = (
    load_file(GOLDEN / "camera.safetensors"),
    load_file(GOLDEN / "rollout.safetensors"),
)


def keys(held: str = "") -> list[float]:
    return [float(name in held.split()) for name in camera.KEYS]


def random_actions(frames: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(frames, 6, generator=g) < 0.4).double(), torch.rand(
        frames, 2, generator=g
    ).double() * 0.4 - 0.2


def random_cameras(n: int, seed: int = 0, spread: float = 5.0) -> torch.Tensor:
    scale = torch.tensor([spread, 0.5, spread, 20, 120], dtype=torch.float64)
    return camera.pose_to_c2w(
        torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)).double() * scale
    )


def released_pose5(poses: torch.Tensor) -> torch.Tensor:
    """Released (x forward, y right, z up, pitch, yaw) in centimetres -> ours."""
    p = poses.double()
    return torch.stack([p[:, 1] / 100, -p[:, 2] / 100, p[:, 0] / 100, p[:, 3], p[:, 4]], -1)


def best_time(run: Callable[[], object], rounds: int = 7) -> float:
    """Seconds of one thread's own work, so that a busy machine does not count."""
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(rounds):
        began = time.thread_time()
        run()
        times.append(time.thread_time() - began)
    torch.set_num_threads(threads)
    return min(times)


def test_actions_then_their_inverses_return_home() -> None:
    keyboard, mouse = random_actions(600, 0)
    poses = camera.integrate((1, -1.6, 2, 5, 30), keyboard, mouse)
    back = camera.integrate(poses[-1].tolist(), *camera.invert_actions(keyboard, mouse))
    torch.testing.assert_close(back.flip(0), poses, atol=1e-10, rtol=0)


def test_a_circle_closes_across_the_yaw_seam_and_the_released_one_does_not() -> None:
    keyboard, mouse = (
        torch.tensor(keys("w")).expand(241, 6),
        torch.tensor([0.0, 0.1], dtype=torch.float64).expand(241, 2),
    )
    ours = camera.integrate((0, 0, 0, 0, 0), keyboard[:240], mouse[:240])
    assert (ours[-1, :3] - ours[0, :3]).norm() < 1e-9
    theirs = camera.released_poses(keyboard, mouse)
    assert 24 < (theirs[-1, :3] - theirs[0, :3]).norm() < 25.5


def test_poses_survive_the_camera_matrix() -> None:
    pose = torch.tensor([[1, -1.6, 3, 40, 170], [0, 0, 0, -80, -30.0]], dtype=torch.float64)
    torch.testing.assert_close(camera.c2w_to_pose(camera.pose_to_c2w(pose)), pose)


def test_relative_undoes_itself_and_keeps_precision_far_from_home() -> None:
    a, b = random_cameras(20, 1), random_cameras(20, 2)
    torch.testing.assert_close(a @ relative(a, b), b)
    far = torch.eye(4, dtype=torch.float64).repeat(20, 1, 1)
    far[:, :3, 3] = torch.tensor([1e6, 0, -1e6], dtype=torch.float64)
    torch.testing.assert_close(relative(far @ a, far @ b), relative(a, b), atol=1e-8, rtol=0)


def test_the_released_convention_is_left_handed_and_comes_back_exactly() -> None:
    c2w = random_cameras(20)
    released = camera.to_released(c2w)
    assert (torch.linalg.det(released[:, :3, :3]) < 0).all() and camera.is_rigid(c2w).all()
    assert torch.equal(camera.from_released(released), c2w)
    assert not camera.is_rigid(released).any()


def test_w_moves_along_the_view_and_d_to_its_right() -> None:
    pose = (1.0, -1.6, 2.0, 0.0, 37.0)
    c2w = camera.pose_to_c2w(torch.tensor(pose, dtype=torch.float64))
    for key, axis, sign in (("w", 2, 1), ("s", 2, -1), ("d", 0, 1), ("a", 0, -1)):
        moved = torch.tensor(camera.step_pose(pose, keys(key), (0, 0)), dtype=torch.float64)
        torch.testing.assert_close(moved[:3] - c2w[:3, 3], sign * camera.STEP * c2w[:3, axis])
    assert math.dist(camera.step_pose(pose, keys("w d"), (0, 0))[:3], pose[:3]) == pytest.approx(
        camera.STEP
    )
    assert camera.step_pose(pose, keys("w s jump attack"), (0.019, -0.019)) == pose


def test_mouse_units_are_fifteen_degrees_and_pitch_up_looks_up() -> None:
    x, y, z, pitch, yaw = camera.step_pose((0, 0, 0, 0, 0), keys(), (0.1, 2))
    assert (pitch, yaw) == pytest.approx((1.5, 30))
    forward = camera.pose_to_c2w(torch.tensor([0, 0, 0, 10.0, 0]))[:3, 2]
    assert forward[1] < 0 and camera.pose_to_c2w(torch.tensor([0, 0, 0, 0, 10.0]))[0, 2] > 0
    assert camera.step_pose((0, 0, 0, 59, 0), keys(), (1, 0), max_pitch=60)[3] == 60


def test_rays_are_unit_and_the_centre_looks_forward() -> None:
    c2w, K = random_cameras(3), camera.intrinsics(33, 65)
    image = camera.rays(c2w, K, 33, 65)
    torch.testing.assert_close(image[:, 3:].norm(dim=1), torch.ones(3, 33, 65, dtype=torch.float64))
    torch.testing.assert_close(image[:, 3:, 16, 32], c2w[:, :3, 2])
    torch.testing.assert_close(image[:, :3, 5, 7], c2w[:, :3, 3])
    assert K.tolist() == pytest.approx([32.5, 32.5, 32.5, 16.5])


@pytest.mark.parametrize("golden", [CAMERA, ROLLOUT], ids=["camera", "rollout"])
def test_released_poses_and_cameras_match_bit_for_bit(golden: dict) -> None:
    assert torch.equal(camera.released_poses(golden["keyboard"], golden["mouse"]), golden["poses"])
    pose = released_pose5(golden["poses"])
    torch.testing.assert_close(
        camera.to_released(camera.pose_to_c2w(pose)), golden["extrinsics"], atol=1e-12, rtol=0
    )
    ours = camera.integrate((0, 0, 0, 0, 0), golden["keyboard"][:-1], golden["mouse"][:-1])
    torch.testing.assert_close(ours, pose, atol=3e-3, rtol=0)  # 8.73 cm is our 12.35/√2 rounded


def test_anchored_rays_are_what_they_say() -> None:
    cameras, anchor = random_cameras(2 * 3 * 4).view(2, 3, 4, 4, 4), random_cameras(2, 9)
    image = camera.anchored_rays(cameras, anchor, camera.intrinsics(5, 6), 5, 6)
    slow = camera.rays(
        relative(anchor[:, None, None], cameras), camera.intrinsics(5, 6), 5, 6
    )  # (2, 3, 4, 6, 5, 6)
    o, d = slow[..., :3, :, :] / camera.ANCHORED_SCALE, slow[..., 3:, :, :]
    azimuth = torch.atan2(d[..., 0, :, :], d[..., 2, :, :])
    waves = torch.stack(
        [wave for k in (2, 4, 8) for wave in ((k * azimuth).cos(), (k * azimuth).sin())], -3
    )
    wanted = (
        torch.cat([o, d, torch.linalg.cross(o, d, dim=-3), waves], -3)
        .permute(0, 2, 3, 1, 4, 5)
        .flatten(1, 2)
    )
    assert image.shape == (2, 60, 3, 5, 6)
    torch.testing.assert_close(image, wanted.float(), atol=2e-5, rtol=0)


def test_building_a_training_context_costs_milliseconds() -> None:
    B, frames = 16, 241
    c2w, latents = (
        random_cameras(B * frames).view(B, frames, 4, 4).float(),
        torch.zeros(B, 16, 61, 8, 8),
    )
    start, index = torch.randint(20, 50, (B,)), torch.randint(1, 15, (B, 5))
    zeros = torch.zeros(B, frames, 6)
    build = lambda: clip_context(
        latents, c2w, zeros, zeros[..., :2], torch.zeros(B, 3, 4), start, 10, 4, index
    )
    assert best_time(build) < 20e-3  # measured: 3 ms
