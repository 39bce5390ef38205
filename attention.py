"""Attend, with a clock per head.

What it does. Rotary positions, one attention product whatever the kernel, and the exchange that
lets ranks share a segment by place.
Paper: §3.1-3.2, Eq. 7 (perturbed RoPE).  Released: the same angles, cut at latent 2,048.

Why it works. RoPE turns pair j of a query at time t by ω_j·t and of a key at time t' by ω_j·t'.
Turning both by the same angle changes no product, so a score depends on the lag alone, Σ_j
cos(ω_j·(t − t') + φ_j):

    ω_j = θ^(−j/n),    j = 0 .. n − 1                                                          (1)

At lag 0 all terms agree. At some far lags they nearly agree again, and since every head has the
same ω, all heads see that ghost at the same lag: a memory of long ago looks recent. Give every
head a base of its own, and the ghosts fall apart while lag 0 stays:

    θ_h = 10000·(1 + σ_θ·ε_h),   ε_h = linspace(−1, 1, heads)[h]   Eq. 7                       (2)

How alike is a time to one so many latents later? The mean over heads and pairs of what (1) sums:

    likeness(lag) = mean cos(ω·lag)                                                            (3)

The demo prints it for a short lag, where σ_θ changes little, and for the worst ghost far away.

Space has pairs of its own, of row and of column: a token's angles are time | row | column.

Ranks share places, not time. Only here do they need each other: rank r holds all heads of its
places,

    all heads, own places  --exchange-->  own heads, all places  --attend, exchange back-->  all, own

What differs. Angles are computed on the fly, so there is no end at latent 2,048. Torch's product
serves everywhere, but for flash-attn on a GPU where that is installed: the same function.

Try it: python attention.py      Tests: pytest tests/test_attention.py
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend as Kernel
from torch.nn.attention import sdpa_kernel

# ---- positions -----------------------------------------------------------------------------------


def frequencies(theta: Tensor, pairs: int) -> Tensor:  # (heads,) -> (heads, pairs) float64
    j = torch.arange(pairs, dtype=torch.float64, device=theta.device)
    return theta[:, None] ** (-j / pairs)  # (1)


def clocks(cfg: object, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """(heads, pairs) frequencies of time, and of row and column, which get a third of the pairs each."""
    epsilon = torch.linspace(-1, 1, cfg.heads, dtype=torch.float64, device=device)
    theta = 10000 * (1 + cfg.sigma_theta * epsilon)  # (2)
    pairs = cfg.dim // cfg.heads // 2
    of_space = pairs // 3
    return frequencies(theta, pairs - 2 * of_space), frequencies(theta, of_space)


def likeness(lags: Tensor, cfg: object) -> Tensor:  # (n,) latents -> (n,)
    of_time, _ = clocks(cfg)
    return (lags[:, None, None] * of_time).cos().mean((-1, -2))  # (3)


def rope_angles(times: Tensor, h: int, w: int, cfg: object) -> Tensor:
    """(B, T) absolute latent indices -> (B, T, h·w, heads, head_dim/2) angles: time | row | column."""
    of_time, of_space = clocks(cfg, times.device)
    time = times[..., None, None, None] * of_time  # (B, T, 1, heads, n)

    place = torch.arange(h * w, device=times.device)[:, None, None]
    row = place // w * of_space
    column = place % w * of_space
    space = torch.cat([row, column], -1)  # (h·w, heads, 2n)

    shape = (*times.shape, h * w, cfg.heads, -1)
    return torch.cat([time.expand(*shape), space.expand(*shape)], -1)


def cos_sin(angles: Tensor) -> Tensor:
    """(...) float64 -> (..., 2) float32: what rotate takes."""
    return torch.stack([angles.cos(), angles.sin()], -1).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn pairs (2j, 2j+1) of x (..., heads, head_dim) by rope (..., heads|1, head_dim/2, 2)."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if x.is_cuda:
        # real arithmetic compiles into one kernel
        a, b = pairs.unbind(-1)
        cos, sin = rope.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    else:
        # a complex product: four times faster on a CPU
        product = torch.view_as_complex(pairs) * torch.view_as_complex(rope)
        turned = torch.view_as_real(product)
    return turned.flatten(-2).to(x.dtype)


# ---- the product ---------------------------------------------------------------------------------

CUDNN_FIRST = [
    Kernel.CUDNN_ATTENTION,
    Kernel.FLASH_ATTENTION,
    Kernel.EFFICIENT_ATTENTION,
    Kernel.MATH,
]


@functools.cache
def load_flash() -> Callable | None:
    """flash-attn if it is installed and loads; once, with a line that says which it is."""
    kernel = None
    notice = "attention: flash-attn"
    try:
        from flash_attn import flash_attn_func as kernel
    except ModuleNotFoundError:
        notice = "attention: SDPA (flash-attn not installed; same result, slower on long clips)"
    except (ImportError, OSError) as error:
        notice = (
            f"flash-attn is installed but does not load ({error}): built for another torch. "
            "Using SDPA."
        )
    print(notice, file=sys.stderr)
    return kernel


# a block that is being compiled asks these while it is traced, and must not trace them


@torch.compiler.assume_constant_result
def flash_kernel() -> Callable | None:
    return load_flash()


@torch.compiler.assume_constant_result
def is_hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


def pick_flash(q: Tensor) -> Callable | None:
    knows = q.is_cuda and q.element_size() == 2  # no float32
    return flash_kernel() if knows else None


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v of q (B, Lq, heads, d), k and v (B, Lk, heads, d): like q."""
    wanted = (q.shape[0], k.shape[1], *q.shape[2:])
    if k.shape != wanted or v.shape != wanted:
        raise ValueError(
            f"k and v must be {wanted} like q, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    flash = pick_flash(q)
    if flash is not None:
        return flash(q, k, v)

    # on Hopper torch would take its FlashAttention-2 kernel, but cuDNN's is 1.6 times faster
    order = contextlib.nullcontext()
    if q.is_cuda and is_hopper():
        order = sdpa_kernel(CUDNN_FIRST, set_priority=True)
    with order:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


# ---- many ranks ----------------------------------------------------------------------------------


def shares(places: int, group: dist.ProcessGroup | None) -> tuple[list[int], slice]:
    """How many places every rank holds, and which are ours: contiguous, sizes differ by at most one."""
    ranks = 1 if group is None else dist.get_world_size(group)
    me = 0 if group is None else dist.get_rank(group)
    if ranks > places:
        raise ValueError(f"{ranks} ranks cannot share {places} places; use at most {places} ranks")
    sizes = [places // ranks + (rank < places % ranks) for rank in range(ranks)]
    return sizes, slice(sum(sizes[:me]), sum(sizes[: me + 1]))


def exchange(
    parts: list[Tensor], shapes: list[tuple[int, ...]], group: dist.ProcessGroup
) -> list[Tensor]:
    """All-to-all: parts[r] goes to rank r, a tensor of shapes[r] comes from rank r."""
    sizes_in = [part.numel() for part in parts]
    sizes_out = [math.prod(shape) for shape in shapes]
    flat = torch.cat([part.flatten() for part in parts])
    out = flat.new_empty(sum(sizes_out))
    dist.all_to_all_single(out, flat, sizes_out, sizes_in, group)
    return [piece.view(shape) for piece, shape in zip(out.split(sizes_out), shapes, strict=True)]


def gather_places(y: Tensor, places: list[int], group: dist.ProcessGroup) -> Tensor:
    """(B, T, S_ours, n) -> (B, T, S, n): every rank gets the places of all."""
    B, T, _, n = y.shape
    shapes = [(B, T, S, n) for S in places]
    return torch.cat(exchange([y] * len(places), shapes, group), 2)


def attention_across(
    q: Tensor, k: Tensor, v: Tensor, places: list[int], group: dist.ProcessGroup
) -> Tensor:
    """All heads of our places in, all heads of our places out; between, our heads of all places."""
    B, _, H, d = q.shape
    ranks = len(places)
    ours = places[dist.get_rank(group)]
    heads = -(-H // ranks)  # per rank; H is padded up to a multiple

    def own_heads(x: Tensor) -> Tensor:  # (B, T·S_ours, H, d) -> (B, T·S, heads, d)
        latents = x.shape[1] // ours
        padded = F.pad(x, (0, 0, 0, heads * ranks - H))
        shapes = [(B, latents * S, heads, d) for S in places]
        return torch.cat(exchange(padded.split(heads, 2), shapes, group), 1)

    y = attention(own_heads(q), own_heads(k), own_heads(v))  # (B, T·S, heads, d)

    # and back: to every rank its places, from every rank its heads
    latents = q.shape[1] // ours
    parts = y.split([latents * S for S in places], 1)
    shapes = [(B, q.shape[1], heads, d)] * ranks
    return torch.cat(exchange(parts, shapes, group), 2)[:, :, :H]


# ---- the layer -----------------------------------------------------------------------------------


def rms(x: Tensor, weight: Tensor | None) -> Tensor:
    """x / √(mean x² + ε)·weight over the last axis."""
    weight = None if weight is None else weight.to(x.dtype)
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)

    # on a CPU two thirds of F.rms_norm's time
    mean = x.square().mean(-1, keepdim=True, dtype=torch.float32)
    normal = x * (mean + 1e-6).rsqrt().to(x.dtype)
    return normal if weight is None else normal * weight


class Attention(nn.Module):
    """Projections of the self- and the text attention; q and k are normalised over all heads together."""

    def __init__(self, cfg: object):  # dit.DiTConfig
        super().__init__()
        self.heads = cfg.heads
        self.q = nn.Linear(cfg.dim, cfg.dim)
        self.k = nn.Linear(cfg.dim, cfg.dim)
        self.v = nn.Linear(cfg.dim, cfg.dim)
        self.o = nn.Linear(cfg.dim, cfg.dim)
        self.norm_q = nn.RMSNorm(cfg.dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(cfg.dim, eps=1e-6)

    def query(self, x: Tensor) -> Tensor:  # (B, ..., D) -> (B, L, heads, head_dim)
        return self.split(rms(self.q(x), self.norm_q.weight))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:  # the same, twice
        k = rms(self.k(x), self.norm_k.weight)
        return self.split(k), self.split(self.v(x))

    def split(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).unflatten(-1, (self.heads, -1))


# ---- demo ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clocks:
    """What positions need of a dit.DiTConfig."""

    dim: int
    heads: int
    sigma_theta: float


def main() -> None:
    """The ghosts of Eq. 7: how alike a time looks to one long ago, one clock for all or one per head."""
    far = torch.arange(200, 2000)
    for name, dim, heads in (("tiny", 256, 4), ("5b", 3072, 24)):
        for sigma_theta in (0.0, 0.8):
            cfg = Clocks(dim, heads, sigma_theta)
            near = likeness(torch.tensor([10]), cfg).item()
            ghost, where = likeness(far, cfg).max(0)
            print(
                f"{name:4s} σ_θ = {sigma_theta}: 10 latents ago {near:.3f}, "
                f"and {far[where]} latents ago {ghost:.3f}"
            )


if __name__ == "__main__":
    main()
