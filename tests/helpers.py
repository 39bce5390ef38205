"""What several test files build the same way.

The chapters pass a context around as a few small objects: a Segment, a Memory, a Lens, a Clip. A test wants
to change one part and keep the others, so these functions take every part by name.
"""

from pathlib import Path

import torch
from torch import Tensor

import data
import lightvae
import vae
from context import Clip, Context, Lens, Memory, Segment
from dataset import episode
from engine import weights


def make_context(
    past: Tensor,
    times: Tensor,
    cameras: Tensor,
    mouse: Tensor,
    keyboard: Tensor,
    text: Tensor,
    memory: Memory | None = None,
    encoding: str = "anchored",
    stride: int = 8,
    K: Tensor | None = None,
) -> Context:
    """A context out of its parts; shapes as in context.Segment."""
    segment = Segment(times, cameras, mouse, keyboard)
    return segment.context(past, text, memory, Lens(encoding, stride, K))


def clip_context(
    latents: Tensor,
    c2w: Tensor,
    keyboard: Tensor,
    mouse: Tensor,
    text: Tensor,
    start: Tensor,
    n_new: int,
    n_past: int,
    memory_index: Tensor | None = None,
    encoding: str = "anchored",
    stride: int = 8,
    K: Tensor | None = None,
) -> tuple[Tensor, Context]:
    """A window of whole clips: its new latents and their context; shapes as in context.Clip."""
    clip = Clip(latents, c2w, keyboard, mouse, text)
    return clip.window(start, n_new, n_past, memory_index, Lens(encoding, stride, K))


def palindrome(frames: int) -> Tensor:
    """Which frames to show, (F,) long with F = 4k + 1, so that the second half revisits the first.

    n, n, n-1 ... n/2+1, n/2+1 ... n: backwards, and forwards again.
    """
    if frames % 4 != 1 or frames < 5:
        raise ValueError(f"a palindrome needs 4k+1 frames, at least 5, got {frames}")
    last = torch.arange((frames - 1) // 2 + 1, frames)
    return torch.cat([last[-1:], last.flip(0), last])


def make_studio(folder: Path) -> None:
    """A micro dataset and a random micro VAE whose latents have unit variance."""
    data.make_dataset(folder / "datasets/micro", "micro", workers=1)
    torch.manual_seed(0)
    model = vae.VAE(vae.PRESETS["micro"])
    norm = lightvae.LatentNorm(model.cfg.z_dim)
    first = episode.list_episodes(folder / "datasets/micro")[0]
    video = torch.from_numpy(episode.read_episode(first).video[:33].copy())
    with torch.no_grad():
        norm(model.moments(video.permute(3, 0, 1, 2)[None] / 127.5 - 1))
    norm.fold(model)
    # where load_vae looks when nobody names a file
    file = folder / "assets/micro/vae.safetensors"
    weights.write_weights(file, model.state_dict(), weights.vae_metadata(model))
