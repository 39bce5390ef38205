"""Attend, with a clock per head.

What it does. Three things that attention needs everywhere in the network: the times and places of
tokens as angles (rotary positions, RoPE), the attention product itself, and an exchange for
processes that share the work on one segment.
Paper: §3.1-3.2, Eq. 7 (perturbed RoPE).  Released: the same angles, from a table that ends at
latent 2,048.

Why it works. RoPE takes n pairs of the numbers of a query or key, and reads each pair as a point in
the plane. For a token at time t it turns point j about the origin by the angle ω_j·t. The dot
product of two points depends on their lengths and the angle between them. So when a query at time t
meets a key at time t', only the lag t − t' counts:

    score = Σ_j a_j·cos(ω_j·(t − t') + φ_j)

a_j (the product of the two lengths) and φ_j (the angle between the two points before any turn) come
from what the tokens contain. The frequencies fall from 1 radian per latent to almost 1/θ:

    ω_j = θ^(−j/n),    j = 0 .. n − 1                                                          (1)

The frequencies of a head are called its clock. With one θ for all heads there are far lags at which
many of the turns ω_j·lag are near a multiple of 360 degrees, in all heads at once: a latent of long
ago looks like a recent one. Eq. 7 gives every head h a θ of its own, so that such lags differ from
head to head:

    θ_h = 10000·(1 + σ_θ·ε_h),   ε_h = linspace(−1, 1, heads)[h]   Eq. 7                       (2)

(σ_θ is a constant, 0.8, and has nothing to do with the noise level σ.) How alike do two times look,
whatever the tokens contain? Take every a_j as 1, every φ_j as 0, and the mean over pairs and heads:

    likeness(lag) = mean of cos(ω·lag)                                                         (3)

The demo prints it for a lag of 10, which (2) hardly changes, and the largest one of the lags from 200
to 1,999, which it lowers: in a network of the size `tiny` from 0.68, more than lag 10 has, to 0.44.

The row and the column of a token are told in the same way, by pairs of their own: a third of all
pairs for each. The rest are for time.

Many ranks. A rank is one of several processes, on a GPU each, that compute one segment together.
Each holds some places of the picture, at all times. All layers but self-attention work on one place
at a time; for self-attention the ranks trade places for heads, and back:

    all heads, own places  --exchange-->  own heads, all places  --attend, exchange-->  as before

What differs. Angles are computed when they are needed, so there is no last latent. The product is
flash-attn's for 16-bit numbers on a GPU where that is installed, a plain formula for a training in
bfloat16 on a CPU, and torch's everywhere else.

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
    """Frequencies of every head: (heads, n) for time, (heads, n') for the row and for the column."""
    epsilon = torch.linspace(-1, 1, cfg.heads, dtype=torch.float64, device=device)
    theta = 10000 * (1 + cfg.sigma_theta * epsilon)  # (2)
    pairs = cfg.dim // cfg.heads // 2
    for_row = pairs // 3  # and as many for the column
    for_time = pairs - 2 * for_row
    return frequencies(theta, for_time), frequencies(theta, for_row)


def likeness(lags: Tensor, cfg: object) -> Tensor:  # (n,) latents -> (n,)
    omega, _ = clocks(cfg)  # (heads, pairs)
    angles = lags[:, None, None] * omega
    return angles.cos().mean((-1, -2))  # (3)


def rope_angles(times: Tensor, rows: int, columns: int, cfg: object) -> Tensor:
    """(B, T) absolute latent indices -> (B, T, S, heads, head_dim/2) angles: time | row | column."""
    omega_time, omega_space = clocks(cfg, times.device)
    time = times[..., None, None, None] * omega_time  # (B, T, 1, heads, pairs of time)

    place = torch.arange(rows * columns, device=times.device)[:, None, None]
    row = place // columns
    column = place % columns
    space = torch.cat([row * omega_space, column * omega_space], -1)  # (S, heads, other pairs)

    shape = (*times.shape, rows * columns, cfg.heads, -1)
    return torch.cat([time.expand(*shape), space.expand(*shape)], -1)


def cos_sin(angles: Tensor) -> Tensor:
    """(...) float64 -> (..., 2) float32: what rotate takes."""
    return torch.stack([angles.cos(), angles.sin()], -1).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn pairs (2j, 2j+1) of x (..., heads, head_dim) by rope (..., heads|1, head_dim/2, 2)."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if x.is_cuda:
        # written out, because torch.compile makes one kernel of it
        a, b = pairs.unbind(-1)
        cos, sin = rope.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    else:
        # the same as (a + bi)·(cos + i·sin): at least four times faster on a CPU
        product = torch.view_as_complex(pairs) * torch.view_as_complex(rope)
        turned = torch.view_as_real(product)
    return turned.flatten(-2).to(x.dtype)


# ---- the product ---------------------------------------------------------------------------------

CUDNN_FIRST = [  # torch takes the first that can do it
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


# who compiles (engine/parts.py) takes the answers of these two for constants


def flash_kernel() -> Callable | None:
    return load_flash()


def is_hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


def pick_flash(q: Tensor) -> Callable | None:
    supported = q.is_cuda and q.element_size() == 2  # flash-attn has no float32
    return flash_kernel() if supported else None


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

    heads_first = [x.transpose(1, 2) for x in (q, k, v)]

    # in bfloat16 on a CPU the backward pass of torch's kernel is slower than that of the formula
    if q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return by_formula(*heads_first).transpose(1, 2)

    # on Hopper GPUs torch would take FlashAttention-2; by published figures (not measured here)
    # cuDNN's kernel is 1.6 times faster there
    order = contextlib.nullcontext()
    if q.is_cuda and is_hopper():
        order = sdpa_kernel(CUDNN_FIRST, set_priority=True)
    with order:
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def by_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v


# ---- many ranks ----------------------------------------------------------------------------------


def shares(places: int, group: dist.ProcessGroup | None) -> tuple[list[int], slice]:
    """How many places every rank holds, and which are ours: contiguous, sizes differ by at most one."""
    ranks = 1 if group is None else dist.get_world_size(group)
    me = 0 if group is None else dist.get_rank(group)
    if ranks > places:
        raise ValueError(f"{ranks} ranks cannot share {places} places; use at most {places} ranks")
    each, left = divmod(places, ranks)  # the first ranks take one more, until none is left
    sizes = [each + 1] * left + [each] * (ranks - left)
    begin = sum(sizes[:me])
    return sizes, slice(begin, begin + sizes[me])


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


def gather_places(y: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """(B, T, S_ours, n) -> (B, T, S, n): every rank gets the places of all."""
    B, T, _, n = y.shape
    shapes = [(B, T, S, n) for S in sizes]
    return torch.cat(exchange([y] * len(sizes), shapes, group), 2)


def attention_across(
    q: Tensor, k: Tensor, v: Tensor, sizes: list[int], group: dist.ProcessGroup
) -> Tensor:
    """attention() for ranks that share the places: (B, T·S_ours, H, d) of our places, in and out."""
    B, _, H, d = q.shape
    ranks = len(sizes)
    S_ours = sizes[dist.get_rank(group)]
    heads = (H + ranks - 1) // ranks  # of each rank, rounded up: the last ranks may get zeros

    def own_heads(x: Tensor) -> Tensor:  # (B, T·S_ours, H, d) -> (B, T·S, heads, d)
        T = x.shape[1] // S_ours
        padded = F.pad(x, (0, 0, 0, heads * ranks - H))
        of_each_rank = padded.split(heads, 2)
        shapes = [(B, T * S, heads, d) for S in sizes]
        received = exchange(of_each_rank, shapes, group)
        return torch.cat(received, 1)

    y = attention(own_heads(q), own_heads(k), own_heads(v))  # (B, T·S, heads, d)

    # back: every rank gets its places again, and from every other one the heads that it computed
    T = q.shape[1] // S_ours
    places_of_each_rank = y.split([T * S for S in sizes], 1)
    shapes = [(B, T * S_ours, heads, d)] * ranks
    received = exchange(places_of_each_rank, shapes, group)
    return torch.cat(received, 2)[:, :, :H]


# ---- the layer -----------------------------------------------------------------------------------


def rms(x: Tensor, weight: Tensor | None) -> Tensor:
    """x / √(mean(x²) + 1e-6), times the weight; over the last axis."""
    weight = None if weight is None else weight.to(x.dtype)
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)

    # on a CPU, for thousands of rows in bfloat16, two thirds of the time of F.rms_norm
    mean = x.square().mean(-1, keepdim=True, dtype=torch.float32)
    normal = x * (mean + 1e-6).rsqrt().to(x.dtype)
    return normal if weight is None else normal * weight


class Attention(nn.Module):
    """The layers around attention(): of self-attention, and of attention to the text.

    q and k are normalised over all heads together, before they are split into heads.
    """

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

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (B, L, heads, head_dim) each
        k = rms(self.k(x), self.norm_k.weight)
        return self.split(k), self.split(self.v(x))

    def split(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).unflatten(-1, (self.heads, -1))


# ---- demo ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clocks:
    """The fields of a dit.DiTConfig that clocks() reads."""

    dim: int
    heads: int
    sigma_theta: float


def main() -> None:
    """How alike a time looks to one long ago: with one clock for all heads, and with one per head."""
    far = torch.arange(200, 2000)
    for name, dim, heads in (("tiny", 256, 4), ("5b", 3072, 24)):
        for sigma_theta in (0.0, 0.8):
            cfg = Clocks(dim, heads, sigma_theta)
            near = likeness(torch.tensor([10]), cfg).item()
            largest, where = likeness(far, cfg).max(0)
            print(
                f"{name:4s} σ_θ = {sigma_theta}: 10 latents ago {near:.3f}, "
                f"and {far[where]} latents ago {largest:.3f}"
            )


if __name__ == "__main__":
    main()
