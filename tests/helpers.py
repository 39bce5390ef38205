"""What several test files build the same way."""

import torch
from torch import Tensor

from context import Clip, Context, Lens, Memory, Segment


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
    """A context out of its parts, every one of them by name."""
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
    """A window of whole clips, every part by name."""
    clip = Clip(latents, c2w, keyboard, mouse, text)
    return clip.window(start, n_new, n_past, memory_index, Lens(encoding, stride, K))


def palindrome(frames: int) -> Tensor:  # (F,) long: which frame to show, F = 4k+1
    """n, n, n−1 … n/2+1, n/2+1 … n: the second half revisits, backwards, what the first half showed."""
    if frames % 4 != 1 or frames < 5:
        raise ValueError(f"a palindrome needs 4k+1 frames, at least 5, got {frames}")
    last = torch.arange((frames - 1) // 2 + 1, frames)
    return torch.cat([last[-1:], last.flip(0), last])
