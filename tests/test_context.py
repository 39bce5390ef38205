"""What context.py promises."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import camera
from camera import relative
from context import (
    Window,
    action_windows,
    query_offsets,
    released_rays,
    released_windows,
    segment_cameras,
)

GOLDEN = Path(__file__).parent / "golden"
CAMERA, ROLLOUT = (
    load_file(GOLDEN / "camera.safetensors"),
    load_file(GOLDEN / "rollout.safetensors"),
)


def test_window_arithmetic_57_frames_is_15_latents() -> None:
    w = Window()
    assert [w.frames(n) for n in (1, 2, 4)] == [57, 97, 177] and [
        w.latents(n) for n in (1, 2, 4)
    ] == [15, 25, 45]
    assert (
        w.segment(0) == (0, 15, 1) and w.segment(1) == (11, 25, 4) and w.segment(3) == (31, 45, 4)
    )
    assert [w.latent_of(f) for f in (0, 1, 4, 5, 56)] == [0, 1, 1, 2, 14]
    assert list(w.frames_of(0)) == [0] and list(w.frames_of(14)) == [53, 54, 55, 56]
    assert w.queries(1) == [24, 22, 20, 18, 16]
    assert query_offsets(5, 5) == [0, 1, 2, 3, 4] and max(query_offsets(2, 5)) == 1


def test_relative_poses_and_rays_match_official() -> None:
    latents = CAMERA["extrinsics"][0:57:4]
    for name, base in (
        ("first", latents[:1].expand(15, 4, 4)),
        ("framewise", torch.cat([latents[:1], latents[:-1]])),
    ):
        g = relative(base, latents)
        g[:, :3, 3] /= g[:, :3, 3].norm(dim=-1).max()
        torch.testing.assert_close(g, CAMERA[f"relative_{name}_0_57"], atol=1e-12, rtol=0)
    cameras = camera.from_released(
        CAMERA["extrinsics"][None, 0:9:4, None].expand(-1, -1, 4, -1, -1)
    )
    image = released_rays(cameras, 0, 2, torch.tensor([24.0, 16, 24, 16]), (32, 48, 1))
    torch.testing.assert_close(
        image[0].permute(1, 2, 3, 0), CAMERA["plucker_rel"], atol=1e-6, rtol=0
    )


def test_released_windows_have_the_official_frames() -> None:
    first = released_windows(torch.arange(57.0)[None, :, None])[0, :, :, 0]
    later = released_windows(torch.arange(41.0, 97)[None, :, None])[0, :, :, 0]
    assert first.shape == (15, 12) and later.shape == (14, 12)
    assert (
        first[0].tolist() == [0] * 12
        and first[3].tolist() == list(range(12))
        and first[14].tolist() == list(range(44, 56))
    )
    assert later[0].tolist() == [41] * 9 + [42, 43, 44] and later[2].tolist() == list(range(41, 53))
    assert later[13].tolist() == list(range(85, 97))


def test_a_latent_sees_the_actions_that_made_it_in_every_segment() -> None:
    actions = torch.arange(200.0)[None, :, None].expand(2, -1, 1)
    seen = action_windows(actions, torch.tensor([0, 31]), 14)[..., 0]
    for b, first in ((0, 0), (1, 31)):
        for i in range(14):
            latent = first + i
            assert seen[b, i].tolist() == [max(0, a) for a in range(4 * latent - 12, 4 * latent)]
    assert torch.equal(seen[0], released_windows(actions[:1, :57])[0, :14, :, 0])


def test_released_rays_of_a_still_or_turning_camera_have_no_origin() -> None:
    pose = torch.zeros(1, 57, 5, dtype=torch.float64)
    pose[0, :, 4] = torch.linspace(0, 80, 57)
    cameras = segment_cameras(camera.pose_to_c2w(pose), 0, 15)
    image = released_rays(cameras, 0, 14, torch.tensor([16.0, 16, 16, 16]), (4, 4, 8)).unflatten(
        1, (6, 64)
    )
    assert image[:, :3].abs().max() == 0
    torch.testing.assert_close(image[:, 3:].norm(dim=1), torch.ones(1, 64, 15, 4, 4))
