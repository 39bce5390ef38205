"""What several test files build the same way.

The chapters pass a context around as a few small objects: a Segment, a Memory, a Lens, a Clip. A test wants
to change one part and keep the others, so these functions take every part by name.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import camera
import data
import lightvae
import vae
from context import Clip, Context, Lens, Memory, Segment
from dataset import episode
from dit import DiTConfig
from engine import weights
from game import figure

GOLDEN_CONFIG = DiTConfig(  # tests/golden/meta.json in our names
    dim=64,
    heads=2,
    layers=2,
    ffn=128,
    in_dim=48,
    text_dim=64,
    text_len=16,
    freq_dim=256,
    ray_channels=1536,
    sigma_theta=0.0,
    action_blocks=(0,),
    action_hidden=16,
    action_width=64,
    action_heads=4,
    action_rope=4,
    rays_at_input=False,
)

# ---- numbers ---------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(ours: Tensor, golden: Tensor) -> float:
    golden = golden.detach()
    difference = ours.detach() - golden
    return float(difference.norm() / golden.norm())


def best_time(run: Callable[[], object], rounds: int = 7) -> float:
    """Seconds of one thread's own work, so that a busy machine does not count."""
    threads = torch.get_num_threads()
    times = []
    torch.set_num_threads(1)
    for _ in range(rounds):
        began = time.thread_time()
        run()
        times.append(time.thread_time() - began)
    torch.set_num_threads(threads)
    return min(times)


# ---- actions and cameras ---------------------------------------------------------------------------


def keys(held: str = "") -> list[float]:
    return [float(name in held.split()) for name in camera.KEYS]


def random_actions(frames: int, seed: int) -> tuple[Tensor, Tensor]:
    g = seeded(seed)
    keyboard = torch.rand(frames, 6, generator=g) < 0.4
    mouse = torch.rand(frames, 2, generator=g).double()
    return keyboard.double(), mouse * 0.4 - 0.2


def random_cameras(n: int, seed: int = 0, spread: float = 5.0) -> Tensor:
    scale = torch.tensor([spread, 0.5, spread, 20, 120], dtype=torch.float64)
    poses = torch.randn(n, 5, generator=seeded(seed)).double()
    return camera.pose_to_c2w(poses * scale)


def released_pose5(poses: Tensor) -> Tensor:
    """Released (x forward, y right, z up, pitch, yaw) in centimetres -> ours."""
    forward, right, up, pitch, yaw = poses.double().unbind(-1)
    return torch.stack([right / 100, -up / 100, forward / 100, pitch, yaw], -1)


def character_id(digits: dict[str, int]) -> int:
    number = 0
    for slot, size in reversed(figure.SLOTS.items()):
        number = number * size + digits[slot]
    return number


# ---- networks --------------------------------------------------------------------------------------


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """A fresh network predicts zero; move every weight so that every path counts."""
    g = seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return model.eval()


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def plain_rope(x: Tensor, angles: Tensor) -> Tensor:
    turn = torch.polar(torch.ones_like(angles), angles)
    pairs = x.double().unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs) * turn
    return torch.view_as_real(turned).flatten(-2).to(x)


# ---- contexts, a dataset ---------------------------------------------------------------------------


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
