"""Attend, with a clock per head.

What it does. Rotary positions, the attention product behind one function with several kernels, and the
exchange that lets ranks share a segment by place.
Paper: §3.1-3.2, Eq. 7 (perturbed RoPE).  Released: the same angles, cut at latent 2,048.

Why it works. RoPE turns pair j of a query at time t by ω_j·t and of a key at time t' by ω_j·t', so a
score depends on the lag alone, Σ_j cos(ω_j·(t − t') + φ_j), with

    ω_j = θ^(−j/n)                                                                                 (1)

At lag 0 all terms agree. At some far lags they nearly agree again, and since every head has the same
ω, all heads see that ghost at the same lag: a memory of long ago looks recent. Give every head a base
of its own, and the ghosts fall apart while lag 0 stays:

    θ_h = 10000·(1 + σ_θ·ε_h),   ε_h = linspace(−1, 1, heads)[h]                          Eq. 7    (2)

Ranks share places, not time. Only here do they need each other: rank r holds all heads of its places,

    all heads, own places  --exchange-->  own heads, all places  --attend, exchange back-->  all, own

What differs. Angles are computed on the fly, so there is no end at latent 2,048.

Try it: python dit.py      Tests: pytest tests/test_attention.py tests/test_dit.py
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend as Kernel
from torch.nn.attention import sdpa_kernel


def frequencies(theta: Tensor, pairs: int) -> Tensor:  # (heads,) → (heads, pairs) float64
    j = torch.arange(pairs, dtype=torch.float64, device=theta.device)
    return theta[:, None] ** (-j / pairs)  # (1), of every head


def rope_angles(times: Tensor, h: int, w: int, cfg: object) -> Tensor:
    """(B, T) absolute latent indices → (B, T, h·w, heads, head_dim/2) angles; pairs belong to t | h | w."""
    n = cfg.dim // cfg.heads // 2 // 3  # pairs of h and of w; t has the rest
    epsilon = torch.linspace(-1, 1, cfg.heads, dtype=torch.float64, device=times.device)
    theta = 10000 * (1 + cfg.sigma_theta * epsilon)  # (2)
    time = times[..., None, None, None] * frequencies(theta, cfg.dim // cfg.heads // 2 - 2 * n)
    place, omega = torch.arange(h * w, device=times.device)[:, None, None], frequencies(theta, n)
    space = torch.cat([place // w * omega, place % w * omega], -1)  # (h·w, heads, 2n)
    shape = (*times.shape, h * w, cfg.heads, -1)
    return torch.cat([time.expand(*shape), space.expand(*shape)], -1)


def cos_sin(angles: Tensor) -> Tensor:
    """(...) float64 -> (..., 2) float32: what rotate takes."""
    return torch.stack([angles.cos(), angles.sin()], -1).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn pairs (2j, 2j+1) of x (..., heads, head_dim) by rope (..., heads|1, head_dim/2, 2): cos, sin."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if x.is_cuda:  # real arithmetic compiles into one kernel
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    else:  # a complex product: four times faster on a CPU
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)


CUDNN_FIRST = [
    Kernel.CUDNN_ATTENTION,
    Kernel.FLASH_ATTENTION,
    Kernel.EFFICIENT_ATTENTION,
    Kernel.MATH,
]


@functools.cache
def load_flash() -> Callable | None:  # pip install flash-attn --no-build-isolation
    try:
        from flash_attn import flash_attn_func as kernel
    except ModuleNotFoundError:
        return say("attention: SDPA (flash-attn not installed; same result, slower on long clips)")
    except (ImportError, OSError) as e:
        return say(
            f"flash-attn is installed but does not load ({e}): built for another torch. Using SDPA."
        )
    say("attention: flash-attn")
    return kernel


once = functools.cache(functools.partial(print, file=sys.stderr))
fixed = torch.compiler.assume_constant_result  # a compiled block asks these while it is traced
say, flash_attn = fixed(lambda text: once(text)), fixed(lambda: load_flash())
on_hopper = fixed(lambda: torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9)


def pick_backend(q: Tensor, k: Tensor, ragged: bool) -> str:
    if q.is_cuda:  # flash-attn knows neither float32 nor key masks
        return "flash" if q.element_size() == 2 and not ragged and flash_attn() else "sdpa"
    # on a CPU in bf16 two products and a softmax take half the time of SDPA, as long as the scores stay small
    backend = "softmax" if q.shape[:3].numel() * k.shape[1] <= 2**26 else "sdpa"
    say(f"attention: {'explicit softmax' if backend == 'softmax' else 'SDPA'} (CPU)")
    return backend


def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, backend: str = ""
) -> Tensor:
    """softmax(q·kᵀ/√d)·v for q (B, Lq, heads, head_dim), k and v (B, Lk, heads, head_dim), output like q.

    lengths (B,): how many of each sample's keys are real, at least 1; None: all.
    backend: flash (for ragged keys sdpa), sdpa or softmax, which are the same function; "" picks the fastest.
    """
    (B, _, H, d), Lk = q.shape, k.shape[1]
    if k.shape != v.shape or k.shape != (B, Lk, H, d):
        raise ValueError(
            f"k and v must be {(B, Lk, H, d)} like q, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if backend not in ("", "flash", "sdpa", "softmax"):
        raise ValueError(f"backend must be flash, sdpa, softmax or empty, got {backend!r}")
    mask = None if lengths is None else torch.arange(Lk, device=k.device) < lengths.view(B, 1, 1, 1)
    backend = backend or pick_backend(q, k, mask is not None)
    if backend == "flash" and mask is None:
        return flash_attn()(q, k, v)
    if backend == "softmax":
        q, v = (t.transpose(1, 2).reshape(B * H, -1, d) for t in (q, v))
        kT = k.permute(0, 2, 3, 1).reshape(
            B * H, d, Lk
        )  # transposed in memory: backward is faster so
        scores = torch.baddbmm(q.new_empty(1), q, kT, beta=0, alpha=d**-0.5)  # q·kᵀ/√d
        if mask is not None:
            scores = scores.unflatten(0, (B, H)).masked_fill(~mask, -torch.inf).flatten(0, 1)
        return (scores.softmax(-1) @ v).unflatten(0, (B, H)).transpose(1, 2)
    # on Hopper torch would take its FlashAttention-2 kernel, but cuDNN's is 1.6 times faster
    with sdpa_kernel(CUDNN_FIRST, set_priority=True) if on_hopper() else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask
        )
    return out.transpose(1, 2)


def shares(places: int, group: dist.ProcessGroup | None) -> tuple[list[int], slice]:
    """How many places every rank holds, and which are ours: contiguous, sizes differ by at most one."""
    ranks, me = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    if ranks > places:
        raise ValueError(f"{ranks} ranks cannot share {places} places; use at most {places} ranks")
    sizes = [places // ranks + (r < places % ranks) for r in range(ranks)]
    return sizes, slice(sum(sizes[:me]), sum(sizes[: me + 1]))


def exchange(
    parts: list[Tensor], shapes: list[tuple[int, ...]], group: dist.ProcessGroup
) -> list[Tensor]:
    """All-to-all: parts[r] goes to rank r, a tensor of shapes[r] comes from rank r."""
    sizes = [math.prod(shape) for shape in shapes]
    out, flat = parts[0].new_empty(sum(sizes)), torch.cat([p.flatten() for p in parts])
    dist.all_to_all_single(out, flat, sizes, [p.numel() for p in parts], group)
    return [piece.view(shape) for piece, shape in zip(out.split(sizes), shapes, strict=True)]


def gather_places(y: Tensor, places: list[int], group: dist.ProcessGroup) -> Tensor:
    """(B, T, S_ours, n) -> (B, T, S, n): every rank gets the places of all."""
    B, T, _, n = y.shape
    shapes = [(B, T, S, n) for S in places]
    return torch.cat(exchange([y] * len(places), shapes, group), 2)


def attention_across(
    q: Tensor, k: Tensor, v: Tensor, places: list[int], group: dist.ProcessGroup
) -> Tensor:
    """We bring all heads of our places, attend with our heads over all places, and get our places back."""
    (B, _, H, d), ours, ranks = q.shape, places[dist.get_rank(group)], len(places)
    heads = -(-H // ranks)  # per rank; H is padded up to a multiple

    def own_heads(x: Tensor) -> Tensor:  # (B, T·S_ours, H, d) → (B, T·S, heads, d)
        parts = F.pad(x, (0, 0, 0, heads * ranks - H)).split(heads, 2)
        return torch.cat(
            exchange(parts, [(B, x.shape[1] // ours * S, heads, d) for S in places], group), 1
        )

    out = attention(own_heads(q), own_heads(k), own_heads(v))
    parts = out.split([q.shape[1] // ours * S for S in places], 1)
    return torch.cat(exchange(parts, [(B, q.shape[1], heads, d)] * ranks, group), 2)[:, :, :H]


def rms(x: Tensor, weight: Tensor | None) -> Tensor:  # x / √(mean x² + ε) · weight, last axis
    weight = None if weight is None else weight.to(x.dtype)
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)
    r = (x.square().mean(-1, keepdim=True, dtype=torch.float32) + 1e-6).rsqrt().to(x.dtype)
    return x * r if weight is None else x * r * weight  # on a CPU 2/3 of F.rms_norm's time


class Attention(nn.Module):
    """Projections of the self- and the text attention; q and k are normalised over all heads together."""

    def __init__(self, cfg: object):
        super().__init__()
        self.heads = cfg.heads
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(cfg.dim, eps=1e-6), nn.RMSNorm(cfg.dim, eps=1e-6)

    def query(self, x: Tensor) -> Tensor:  # (B, ..., D) → (B, L, heads, head_dim)
        return rms(self.q(x), self.norm_q.weight).flatten(1, -2).unflatten(-1, (self.heads, -1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:  # the same, twice
        k, v = rms(self.k(x), self.norm_k.weight), self.v(x)
        return tuple(t.flatten(1, -2).unflatten(-1, (self.heads, -1)) for t in (k, v))
