"""What context.py promises."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import camera
import dit
import released
from camera import relative
from context import (
    ACTIONS_SEEN,
    Clip,
    Window,
    action_windows,
    query_offsets,
    segment_cameras,
)

GOLDEN = Path(__file__).parent / "golden"
CAMERA = load_file(GOLDEN / "camera.safetensors")


def test_window_arithmetic_57_frames_is_15_latents() -> None:
    w = Window()
    assert w.frames(1) == 57
    assert w.frames(2) == 97
    assert w.frames(4) == 177
    assert w.latents(1) == 15
    assert w.latents(2) == 25
    assert w.latents(4) == 45
    assert w.segment(0) == (0, 15, 1)
    assert w.segment(1) == (11, 25, 4)
    assert w.segment(3) == (31, 45, 4)

    assert w.latent_of(0) == 0
    assert w.latent_of(1) == 1
    assert w.latent_of(4) == 1
    assert w.latent_of(5) == 2
    assert w.latent_of(56) == 14
    assert w.frames_of(0) == range(1)
    assert w.frames_of(14) == range(53, 57)

    assert w.queries(1) == list(range(24, 14, -2))
    assert query_offsets(5, 5) == list(range(5))
    assert max(query_offsets(2, 5)) == 1


def test_relative_poses_and_rays_match_official() -> None:
    latents = CAMERA["extrinsics"][0:57:4]
    bases = {
        "first": latents[:1].expand(15, 4, 4),
        "framewise": torch.cat([latents[:1], latents[:-1]]),
    }
    for name, base in bases.items():
        g = relative(base, latents)
        place = g[:, :3, 3]
        place /= place.norm(dim=-1).max()
        golden = CAMERA[f"relative_{name}_0_57"]
        assert_close(g, golden, atol=1e-12, rtol=0)

    extrinsics = CAMERA["extrinsics"][None, 0:9:4, None]
    cameras = released.from_released(extrinsics.expand(-1, -1, 4, -1, -1))
    K = torch.tensor([24.0, 16, 24, 16])
    image = released.rays(cameras, [], K, (32, 48, 1))
    image = image[0].permute(1, 2, 3, 0)
    assert_close(image, CAMERA["plucker_rel"], atol=1e-6, rtol=0)


def test_released_windows_have_the_official_frames() -> None:
    assert (released.STRIDE, released.SEEN) == (Window.stride, ACTIONS_SEEN)

    def windows(first: float, end: float) -> Tensor:
        actions = torch.arange(first, end)[None, :, None]
        return released.windows(actions)[0, :, :, 0]

    first = windows(0.0, 57.0)
    assert first.shape == (15, 12)
    assert first[0].tolist() == [0] * 12
    assert first[3].tolist() == list(range(12))
    assert first[14].tolist() == list(range(44, 56))

    later = windows(41.0, 97.0)
    assert later.shape == (14, 12)
    assert later[0].tolist() == [41] * 9 + [42, 43, 44]
    assert later[2].tolist() == list(range(41, 53))
    assert later[13].tolist() == list(range(85, 97))


def test_a_latent_sees_the_actions_that_made_it_in_every_segment() -> None:
    actions = torch.arange(200.0)[None, :, None].expand(2, -1, 1)
    seen = action_windows(actions, torch.tensor([0, 31]), 14)[..., 0]
    for b, first in ((0, 0), (1, 31)):
        for i in range(14):
            latent = first + i
            wanted = range(4 * latent - 12, 4 * latent)
            assert seen[b, i].tolist() == [max(0, action) for action in wanted]
    theirs = released.windows(actions[:1, :57])
    assert torch.equal(seen[0], theirs[0, :14, :, 0])


def test_released_rays_of_a_still_or_turning_camera_have_no_origin() -> None:
    pose = torch.zeros(1, 57, 5, dtype=torch.float64)
    pose[0, :, 4] = torch.linspace(0, 80, 57)
    cameras = segment_cameras(camera.pose_to_c2w(pose), 0, 15)
    K = torch.full((4,), 16.0)
    image = released.rays(cameras, [], K, (4, 4, 8))
    image = image.unflatten(1, (6, 64))
    origins = image[:, :3]
    lengths = image[:, 3:].norm(dim=1)
    assert origins.abs().max() == 0
    assert_close(lengths, torch.ones_like(lengths))


def clip_context(null_text: Tensor | None):
    clip = Clip(
        latents=torch.randn(2, 3, 20, 4, 4),
        c2w=torch.eye(4).expand(2, 77, 4, 4),
        keyboard=torch.zeros(2, 77, 6),
        mouse=torch.zeros(2, 77, 2),
        text=torch.randn(2, 5, 8),
    )
    start = torch.tensor([6, 8])
    _, context = clip.window(start, 3, 2, torch.tensor([[1, 2], [3, 1]]))
    return context if null_text is None else replace(context, null_text=null_text)


def test_the_null_branch_carries_the_negative_prompt_if_there_is_one() -> None:
    negative = torch.randn(2, 4, 8)
    context = clip_context(negative).to(dtype=torch.float64)
    null = context.null()
    assert torch.equal(null.text, negative.double())
    assert null.memory.shape[2] == 0
    assert (null.mouse == 1).all()
    assert (null.keyboard == -1).all()

    without = clip_context(None).null()
    assert not without.text.any()


def test_the_released_base_model_has_its_published_negative_prompt() -> None:
    words = dit.NEGATIVE_PROMPTS["5b"]
    assert words.startswith("Vibrant colors, overexposure, static, ")
    assert words.endswith(", crowded background, walking backwards")
    assert len(words.split(", ")) == 27
