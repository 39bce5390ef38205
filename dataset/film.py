"""Pictures and films: read, written, compared.

Frames are (T, H, W, 3) uint8 on disk; whoever computes with them gets (N, 3, H, W) floats in [0, 1].
Tests: pytest tests/test_episode.py tests/test_data.py
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

Frames = np.ndarray | Tensor  # (..., H, W, 3), uint8 or float in [0, 1]
Size = tuple[int, int]  # height, width


def in_unit_range(frames: Frames) -> Tensor:
    """(..., H, W, 3) uint8 or float in [0, 1] -> (N, 3, H, W) float32."""
    x = torch.as_tensor(frames)
    if x.ndim < 3 or x.shape[-1] != 3:
        wanted = "(..., H, W, 3), uint8 or float in [0, 1]"
        raise ValueError(f"frames must be {wanted}, got {tuple(x.shape)}")
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    return x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2)


def in_bytes(frames: Frames) -> np.ndarray:
    """(..., H, W, 3) -> (N, H, W, 3) uint8."""
    x = in_unit_range(frames).clamp(0, 1) * 255
    return x.round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def psnr(pred: Frames, true: Frames, mask: Frames | None = None) -> Tensor:
    """Decibels per frame (N,), at most 50; with a mask (N, H, W) of its pixels only."""
    error = (in_unit_range(pred) - in_unit_range(true)).square().mean(1)  # (N, H, W)
    weight = torch.ones_like(error)
    if mask is not None:
        weight = torch.as_tensor(mask).reshape(error.shape).float()
    mse = (error * weight).sum((1, 2)) / weight.sum((1, 2))
    return -10 * mse.clamp_min(1e-5).log10()  # 10 log10(1 / MSE)


def write_png(path: Path, image: Frames) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(in_bytes(image)[0]).save(path)


def write_mp4(path: Path, frames: Frames, fps: float = 16, crf: int = 12) -> None:
    """Full colour resolution; crf 12 keeps about 34 dB of 64x64 frames, 0 nearly everything."""
    height, width = in_bytes(frames[:1]).shape[1:3]
    if height % 2 or width % 2:
        legal = f"{width + width % 2}x{height + height % 2}"
        raise ValueError(f"mp4 needs even sizes, got {width}x{height}; nearest legal size: {legal}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
    with av.open(str(path), "w") as container:
        rate = Fraction(fps).limit_denominator(1001)  # films of 29.97 have 30000/1001
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv444p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(in_bytes(frame)[0])
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def read_video(source: Path | Sequence[Path], size: Size | None = None) -> tuple[np.ndarray, Size]:
    """An mp4, an array (.npy), a folder of images or a list of them.

    (T, H, W, 3) uint8, of the middle of every picture if a size is given; and the native size.
    """
    frames = []
    native = (0, 0)
    for image in pictures(source):
        width, height = image.size
        native = height, width
        frames.append(np.asarray(crop_middle(image, size or native)))
    return np.stack(frames), native


def pictures(source: Path | Sequence[Path]) -> Iterator[Image.Image]:
    if isinstance(source, Path) and not source.is_dir():
        require(source)
        if source.suffix == ".npy":
            yield from map(Image.fromarray, np.load(source, mmap_mode="r"))
            return
        with av.open(str(source)) as movie:
            for frame in movie.decode(video=0):
                yield frame.to_image()
        return

    files = sorted(source.glob("*.[pj][np]*g")) if isinstance(source, Path) else source
    for file in files or [source / "*.png"]:
        require(file)
    for file in files:
        yield Image.open(file).convert("RGB")


def require(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"frames of this clip are missing: no {file}")


def crop_middle(image: Image.Image, size: Size) -> Image.Image:
    """The largest part of that shape around the middle, then resized."""
    width, height = image.size
    if (height, width) == size:
        return image
    H, W = size
    scale = max(H / height, W / width)
    half_w = W / scale
    half_h = H / scale
    box = (
        (width - half_w) / 2,
        (height - half_h) / 2,
        (width + half_w) / 2,
        (height + half_h) / 2,
    )
    return image.resize((W, H), Image.Resampling.BICUBIC, box)
