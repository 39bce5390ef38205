"""Predict the velocity of noisy latents from context, actions and cameras, and step along it.

Paper: §3.1 (base model, Eq. 3), §3.2 (memory, Eq. 6; perturbed RoPE, Eq. 7), §3.3 (few steps).

    x_σ = (1−σ)·x0 + σ·ε      v = ε − x0      x0 = x_σ − σ·v      σ = t/1000        flow matching
    σ'  = s·σ / (1 + (s−1)·σ),  s = 5                                                timestep shift
    L   = ‖(ε − x0) − v̂(x_σ, σ | past, memory, actions, cameras, text)‖²             Eq. 3, 6
    θ_h = 10000·(1 + σ_θ·ε_h),  ε_h = linspace(−1, 1, heads)[h]                      Eq. 7: a clock per head

Time axis: [memory | past | new]. Memory and past are clean (t = 0); only new latents are noisy and predicted.
A block: self-attention over everything · camera scale and shift · norm3, which REPLACES the residual · text
cross-attention · action module (early blocks) · feed-forward. Tokens (B, T, S, D): T latents of S places.

Fast forms of the same function, tested against the plain one: modulation as two rows (only timesteps 0 and t
exist); a last block that answers only for latents whose output is read; prepare(context), which keeps what no
step changes. Ranks share places, not time: only self-attention (all-to-all over heads) and output talk.
Approximate, off by default (DiT.reuse): keys and values of the clean tokens stay as the first step left them.

Departures: no padding tokens; projections in the weights' dtype, not float32; angles on the fly, so no end at
latent 2,048; any batch; ray tokens join the input (own presets only). Action q/k norm weights: ignored, as released.
`context` is a memory.Context, read by attribute: past, memory, times, rays, mouse, keyboard, text.
Demo: python dit.py      Tests: pytest tests/test_dit.py
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend as Kernel
from torch.nn.attention import sdpa_kernel


@dataclass(frozen=True)
class DiTConfig:
    dim: int = 256  # D, token width
    heads: int = 4  # of self- and text attention
    layers: int = 6
    ffn: int = 640
    in_dim: int = 16  # C, latent channels in and out
    text_dim: int = 64
    text_len: int = 16  # text rows; missing ones are zero rows, which ARE attended
    freq_dim: int = 256  # sinusoid of the timestep
    ray_channels: int = 60  # ray channels per latent cell
    sigma_theta: float = 0.8  # σ_θ of Eq. 7; 0 is ordinary RoPE
    patch: tuple[int, int, int] = (1, 2, 2)  # latent cells per token: time (always 1), row, column
    action_blocks: tuple[int, ...] = (0, 1, 2)
    action_hidden: int = 16  # width of one embedded keyboard frame
    action_width: int = 64  # inner width of both action branches
    action_heads: int = 4
    action_rope: int = 4  # channels per action head that rotate; the others stand still
    action_window: int = 12  # frames of actions each latent sees
    action_norm_weight: bool = (
        False  # multiply by the action q/k norm weights (the release does not)
    )
    timestep: str = "exact"  # 1000·σ | "integer": truncated | "bf16": truncated and rounded
    rays_at_input: bool = (
        True  # ray tokens also join the input; the release has them in the blocks only
    )
    fp32_stream: bool = False  # float32 residual stream under bf16 weights, as released


PRESETS = {
    "micro": DiTConfig(
        dim=32,
        heads=2,
        layers=2,
        ffn=64,
        in_dim=16,
        text_dim=8,
        text_len=4,
        freq_dim=32,
        action_blocks=(0,),
        action_hidden=4,
        action_width=16,
        action_heads=2,
    ),
    "tiny": DiTConfig(),
    "small": DiTConfig(in_dim=48),
    "5b": DiTConfig(
        dim=3072,
        heads=24,
        layers=30,
        ffn=14336,
        in_dim=48,
        text_dim=4096,
        text_len=512,
        ray_channels=1536,
        action_blocks=tuple(range(15)),
        action_hidden=128,
        action_width=1024,
        action_heads=16,
        action_rope=8,
        timestep="bf16",
        rays_at_input=False,
        fp32_stream=True,
    ),
}
PRESETS["14b"] = replace(
    PRESETS["5b"],
    dim=5120,
    heads=40,
    layers=40,
    ffn=13824,
    timestep="exact",
    action_blocks=tuple(range(20)),
)  # one expert of the 28B pair


# ---- flow matching: what the output means ------------------------------------------------------------------
def shift(sigma, s: float = 5.0):  # float or Tensor
    return s * sigma / (1 + (s - 1) * sigma)  # σ' = s·σ / (1 + (s−1)·σ)


def sigma_grid(steps: int, s: float = 5.0) -> Tensor:  # (steps + 1,) float32, falling to exactly 0
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    start = 0.999 * (
        1 - torch.arange(steps, dtype=torch.float64) / steps
    )  # linspace(0.999, 0) without 0
    return F.pad(shift(start, s), (0, 1)).float()


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return torch.lerp(
        x0, noise, sigma.to(x0).view(-1, *[1] * (x0.ndim - 1))
    )  # x_σ = (1−σ)·x0 + σ·ε


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    return noise - x0  # v = ε − x0


def x0_from_v(x_sigma: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    return x_sigma - sigma.to(v).view(-1, *[1] * (v.ndim - 1)) * v  # x0 = x_σ − σ·v


def sample_sigma(
    B: int, s: float = 5.0, generator: torch.Generator | None = None
) -> Tensor:  # (B,)
    return shift(
        1 - torch.rand(B, generator=generator), s
    )  # for training: uniform over (0, 1], shifted


def timestep(sigma: Tensor, mode: str = "exact") -> Tensor:  # float64, 0..1000
    """The t the network is told. The release truncates it to an integer, then to bf16: 999 becomes 1000."""
    t = 1000 * sigma.double()
    modes = {"exact": t, "integer": t.trunc(), "bf16": t.trunc().bfloat16().double()}
    if mode not in modes:
        raise ValueError(f"timestep must be one of {', '.join(modes)}, got {mode!r}")
    return modes[mode]


# ---- positions ---------------------------------------------------------------------------------------------
def frequencies(theta: Tensor, pairs: int) -> Tensor:  # (heads,) → (heads, pairs) float64
    j = torch.arange(pairs, dtype=torch.float64, device=theta.device)
    return theta[:, None] ** (-j / pairs)  # ω_hj = θ_h^(−j/n)


def rope_angles(times: Tensor, h: int, w: int, cfg: DiTConfig) -> Tensor:
    """(B, T) absolute latent indices → (B, T, h·w, heads, head_dim/2) angles; pairs belong to t | h | w."""
    n = cfg.dim // cfg.heads // 2 // 3  # pairs of h and of w; t has the rest
    epsilon = torch.linspace(-1, 1, cfg.heads, dtype=torch.float64, device=times.device)
    theta = 10000 * (1 + cfg.sigma_theta * epsilon)  # Eq. 7  θ_h = 10000·(1 + σ_θ·ε_h)
    time = times[..., None, None, None] * frequencies(theta, cfg.dim // cfg.heads // 2 - 2 * n)
    place, omega = torch.arange(h * w, device=times.device)[:, None, None], frequencies(theta, n)
    space = torch.cat([place // w * omega, place % w * omega], -1)  # (h·w, heads, 2n)
    shape = (*times.shape, h * w, cfg.heads, -1)
    return torch.cat([time.expand(*shape), space.expand(*shape)], -1)


def action_angles(memory: int, rest: int, cfg: DiTConfig, device: torch.device) -> Tensor:
    """(T, 1, head_dim/2): a local clock that restarts after the memory; only the first channels rotate."""
    t = torch.cat([torch.arange(memory, device=device), torch.arange(rest, device=device)])[
        :, None, None
    ]
    omega = frequencies(t.new_full((1,), 256, dtype=torch.float64), cfg.action_rope // 2)
    return F.pad(t * omega, (0, (cfg.action_width // cfg.action_heads - cfg.action_rope) // 2))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn pairs (2j, 2j+1) of x (..., heads, head_dim) by rope (..., heads|1, head_dim/2, 2): cos, sin."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if x.is_cuda:  # real arithmetic compiles into one kernel
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    else:  # a complex product: four times faster on a CPU
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)


# ---- attention ---------------------------------------------------------------------------------------------
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


# ---- places shared among ranks -----------------------------------------------------------------------------
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


def attention_across(q: Tensor, k: Tensor, v: Tensor, shared: "Prepared") -> Tensor:
    """We bring all heads of our places, attend with our heads over all places, and get our places back."""
    places, group = shared.places, shared.group
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


# ---- small modules -----------------------------------------------------------------------------------------
def linear32(layer: nn.Linear, x: Tensor) -> Tensor:  # few rows or columns, always float32
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # (B, T, S, D), (B, T, 1, D) twice
    return torch.addcmul(
        shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale
    )  # LN·(1 + scale) + shift


def rms(x: Tensor, weight: Tensor | None) -> Tensor:  # x / √(mean x² + ε) · weight, last axis
    weight = None if weight is None else weight.to(x.dtype)
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)
    r = (x.square().mean(-1, keepdim=True, dtype=torch.float32) + 1e-6).rsqrt().to(x.dtype)
    return x * r if weight is None else x * r * weight  # on a CPU 2/3 of F.rms_norm's time


class Attention(nn.Module):
    """Projections of the self- and the text attention; q and k are normalised over all heads together."""

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.heads = cfg.heads
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(cfg.dim, eps=1e-6), nn.RMSNorm(cfg.dim, eps=1e-6)

    def query(self, x: Tensor) -> Tensor:  # (B, ..., D) → (B, L, heads, head_dim)
        return rms(self.q(x), self.norm_q.weight).flatten(1, -2).unflatten(-1, (self.heads, -1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:  # the same, twice
        k, v = rms(self.k(x), self.norm_k.weight), self.v(x)
        return tuple(t.flatten(1, -2).unflatten(-1, (self.heads, -1)) for t in (k, v))


def joined(kept: dict | None, name: str, clean: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """All keys and values: the first step leaves those of the `clean` first tokens in `kept`, later ones bring the new."""
    if kept is None:
        return k, v
    if name in kept:
        return tuple(torch.cat(pair, 1) for pair in zip(kept[name], (k, v), strict=True))
    kept[name] = (
        k[:, :clean].clone(),
        v[:, :clean].clone(),
    )  # copies: a view would hold the new ones in memory, too
    return k, v


class ActionModule(nn.Module):
    """Mouse: self-attention over time, place by place. Keyboard: every place asks the keys of all latents."""

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        D, width, hidden, window = cfg.dim, cfg.action_width, cfg.action_hidden, cfg.action_window
        self.heads, self.use_norm_weight = cfg.action_heads, cfg.action_norm_weight
        self.keyboard_embed = nn.Sequential(
            nn.Linear(6, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )
        self.mouse_mlp = nn.Sequential(
            nn.Linear(D + 2 * window, width),
            nn.GELU("tanh"),
            nn.Linear(width, width),
            nn.LayerNorm(width),
        )  # of eps 1e-5
        self.t_qkv = nn.Linear(width, 3 * width, bias=False)
        self.img_attn_q_norm, self.img_attn_k_norm, self.key_attn_q_norm, self.key_attn_k_norm = (
            nn.RMSNorm(width // self.heads, eps=1e-6) for _ in range(4)
        )
        self.proj_mouse = nn.Linear(width, D, bias=False)
        self.mouse_attn_q = nn.Linear(
            D, width, bias=False
        )  # despite its name: query of the KEYBOARD
        self.keyboard_attn_kv = nn.Linear(hidden * window, 2 * width, bias=False)
        self.proj_keyboard = nn.Linear(width, D, bias=False)

    def turned(self, x: Tensor, norm: nn.RMSNorm, rope: Tensor) -> Tensor:
        return rotate(rms(x, norm.weight if self.use_norm_weight else None), rope)

    def key_value(self, keyboard: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        windows = self.keyboard_embed(keyboard).flatten(2)  # (B, T, 12, 6) → (B, T, 12·hidden)
        k, v = self.keyboard_attn_kv(windows).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.turned(k, self.key_attn_k_norm, rope), v

    def forward(
        self,
        x: Tensor,
        mouse: Tensor,
        kv: tuple[Tensor, Tensor],
        rope: Tensor,
        kept: dict | None = None,
        clean: int = 0,
    ) -> Tensor:
        """x (B, T, S, D), mouse (B, T, 24), rope (T, 1, head_dim/2, 2) → x with both branches added."""
        B, T, S, _ = x.shape
        hidden = self.mouse_mlp(torch.cat([x, mouse[:, :, None].expand(-1, -1, S, -1)], -1))
        qkv = self.t_qkv(hidden).transpose(1, 2).flatten(0, 1)  # (B·S, T, 3·width)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = (
            self.turned(q, self.img_attn_q_norm, rope),
            self.turned(k, self.img_attn_k_norm, rope),
        )
        x = x + self.proj_mouse(
            attention(q, *joined(kept, "mouse", clean, k, v))
            .flatten(2)
            .unflatten(0, (B, S))
            .transpose(1, 2)
        )
        q = self.mouse_attn_q(x).unflatten(-1, (self.heads, -1))  # (B, T, S, heads, head_dim)
        q = self.turned(q, self.key_attn_q_norm, rope[:, None]).flatten(1, 2)
        return x + self.proj_keyboard(attention(q, *kv).flatten(2).unflatten(1, (T, S)))


@dataclass
class Prepared:
    """What the network computes from the context alone: made once for a segment, valid for all its steps."""

    clean: Tensor  # (B, M+P, S, D) embedded memory and past
    rays: Tensor  # (B, T, S, D) ray tokens
    text: Tensor  # (B, text_len, D)
    mouse: Tensor  # (B, T, 24)
    keyboard: Tensor  # (B, T, 12, 6)
    rope: Tensor  # (B, T·S, heads, head_dim/2, 2) cosines and sines
    action_rope: Tensor  # (T, 1, action head_dim/2, 2)
    places: list[int]  # how many places every rank holds; S is our number
    here: slice  # which are ours
    group: dist.ProcessGroup | None  # the ranks that share this segment
    reuse: bool  # of clean keys and values, see DiT.reuse
    blocks: list[tuple] | None = None  # per block: Block.prepare; None: every forward computes it


class Block(nn.Module):
    def __init__(self, cfg: DiTConfig, has_actions: bool):
        super().__init__()
        D = cfg.dim
        self.modulation = nn.Parameter(torch.randn(1, 6, D) / D**0.5)
        self.self_attn, self.cross_attn = Attention(cfg), Attention(cfg)
        self.norm3 = nn.LayerNorm(D, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(D, cfg.ffn), nn.GELU("tanh"), nn.Linear(cfg.ffn, D))
        self.cam_injector_layer1, self.cam_injector_layer2 = nn.Linear(D, D), nn.Linear(D, D)
        self.cam_scale_layer, self.cam_shift_layer = nn.Linear(D, D), nn.Linear(D, D)
        self.action_model = ActionModule(cfg) if has_actions else None

    def prepare(self, shared: Prepared) -> tuple:
        """Camera (1 + scale, shift), text (K, V), keyboard (K, V): functions of the context alone; room for joined()."""
        # g = W₂·silu(W₁·P) + P,  P the ray tokens
        g = self.cam_injector_layer2(F.silu(self.cam_injector_layer1(shared.rays))) + shared.rays
        camera = 1 + self.cam_scale_layer(g), self.cam_shift_layer(g)
        keyboard = self.action_model and self.action_model.key_value(
            shared.keyboard, shared.action_rope
        )
        return (
            camera,
            self.cross_attn.key_value(shared.text),
            keyboard,
            {} if shared.reuse else None,
        )

    def forward(
        self, x: Tensor, e0: Tensor, shared: Prepared, cache: tuple | None, keep: int
    ) -> Tensor:
        """(B, T, S, D) → (B, keep, S, D), the last `keep` latents. e0 (B, T, 6, D): the time's modulation."""
        camera, text, keyboard, kept = cache or self.prepare(shared)
        old, dtype = x.shape[1] - keep, self.norm3.weight.dtype  # dtype of matrix products
        m = (self.modulation + e0).to(x.dtype)[:, :, :, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = m.unbind(2)  # (B, T, 1, D) each
        a = modulate(x, shift1, scale1).to(dtype)  # 1. self-attention
        q, (k, v), rope = self.self_attn.query(a[:, old:]), self.self_attn.key_value(a), shared.rope
        q, k = rotate(q, rope[:, -q.shape[1] :]), rotate(k, rope[:, -k.shape[1] :])
        k, v = joined(kept, "self", shared.clean.shape[1] * shared.clean.shape[2], k, v)
        y = attention(q, k, v) if shared.group is None else attention_across(q, k, v, shared)
        x, gate1, shift2, scale2, gate2 = (t[:, old:] for t in (x, gate1, shift2, scale2, gate2))
        x = torch.addcmul(x, self.self_attn.o(y.flatten(2)).view_as(x), gate1)
        scale, shift = (t[:, -keep:] for t in camera)  # 2. camera
        x = torch.addcmul(shift, x, scale)
        x = F.layer_norm(
            x, x.shape[-1:], self.norm3.weight.to(x.dtype), self.norm3.bias.to(x.dtype), 1e-6
        )
        y = attention(self.cross_attn.query(x.to(dtype)), *text).flatten(
            2
        )  # 3. residual replaced; text
        x = x + self.cross_attn.o(y).view_as(x)
        if self.action_model is not None:  # 4. actions
            x = self.action_model(
                x.to(dtype),
                shared.mouse[:, -keep:],
                keyboard,
                shared.action_rope[-keep:],
                kept,
                shared.clean.shape[1],
            ).to(x.dtype)
        y = self.ffn(modulate(x, shift2, scale2).to(dtype))  # 5. feed-forward
        return torch.addcmul(x, y, gate2)


class Head(nn.Module):
    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)
        self.head = nn.Linear(cfg.dim, math.prod(cfg.patch) * cfg.in_dim)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:  # (B, T, S, D), (B, T, D) → (B, T, S, 4·C)
        shift, scale = (self.modulation + e[:, :, None])[:, :, :, None].unbind(2)
        return linear32(self.head, modulate(x.float(), shift, scale))


# ---- the network -------------------------------------------------------------------------------------------
def patchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(B, C, T, h, w) → (B, T, places, C·ph·pw): channel, row in the patch, column in the patch."""
    (B, C, T, h, w), (_, ph, pw) = x.shape, patch
    rows, columns = h // ph, w // pw
    x = x.reshape(B, C, T, rows, ph, columns, pw)
    return x.permute(0, 2, 3, 5, 1, 4, 6).reshape(B, T, rows * columns, C * ph * pw)


def unpatchify(
    y: Tensor, h: int, w: int, patch: tuple[int, int, int]
) -> Tensor:  # → (B, C, T, h, w)
    """Not patchify's order: the head's features are row, column, and the channel LAST, as released."""
    (B, T), (_, ph, pw) = y.shape[:2], patch
    return (
        y.reshape(B, T, h // ph, w // pw, ph, pw, -1)
        .permute(0, 6, 1, 2, 4, 3, 5)
        .reshape(B, -1, T, h, w)
    )


class DiT(nn.Module):
    reuse = False  # approximate: after the first step clean tokens are only keys and values

    def __init__(self, cfg: DiTConfig = PRESETS["tiny"]):
        super().__init__()
        self.cfg, D = cfg, cfg.dim
        self.patch_embedding = nn.Conv3d(cfg.in_dim, D, cfg.patch, stride=cfg.patch)
        self.patch_embedding_wancamctrl = nn.Linear(cfg.ray_channels * math.prod(cfg.patch), D)
        self.c2ws_hidden_states_layer1, self.c2ws_hidden_states_layer2 = (
            nn.Linear(D, D),
            nn.Linear(D, D),
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(cfg.text_dim, D), nn.GELU("tanh"), nn.Linear(D, D)
        )
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, D), nn.SiLU(), nn.Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks = nn.ModuleList(Block(cfg, i in cfg.action_blocks) for i in range(cfg.layers))
        self.head = Head(cfg)
        self.initialise()

    def initialise(self) -> None:
        """As released: xavier, small embeddings, and zeros: actions, cameras and output start silent."""
        silent = ("head.head", "proj_mouse", "proj_keyboard", "cam_scale_layer", "cam_shift_layer")
        for name, p in self.named_parameters():
            if name.endswith("bias") or any(layer in name for layer in silent):
                nn.init.zeros_(p)
            elif name.startswith(("text_embedding", "time_embedding")):
                nn.init.normal_(p, std=0.02)
            elif name.endswith("weight") and p.ndim > 1:
                nn.init.xavier_uniform_(p.flatten(1))

    def embed(self, x: Tensor, here: slice) -> Tensor:  # (B, C, T, h, w) → (B, T, S, D)
        weight = self.patch_embedding.weight  # kernel = stride, so a linear layer
        tokens = patchify(x, self.cfg.patch)[:, :, here].to(weight.dtype)
        return F.linear(tokens, weight.flatten(1), self.patch_embedding.bias)

    def embed_time(
        self, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:  # (B,) → e (B, 2, D), e0 (B, 2, 6, D)
        t = timestep(sigma, self.cfg.timestep)
        omega = frequencies(t.new_full((1,), 1e4), self.cfg.freq_dim // 2)
        angle = (
            torch.stack([torch.zeros_like(t), t], 1)[..., None] * omega
        )  # row 0 is t = 0, row 1 is t
        e = linear32(self.time_embedding[0], torch.cat([angle.cos(), angle.sin()], -1))
        e = linear32(self.time_embedding[2], F.silu(e))
        return e, linear32(self.time_projection[1], F.silu(e)).unflatten(-1, (6, -1))

    def prepare(
        self, context, group: dist.ProcessGroup | None = None, blocks: bool = True
    ) -> Prepared:
        """forward(..., prepared=prepare(context)) is the same function, cheaper from the second call on.

        With a group each rank works on its share of the places; all call forward with the same inputs.
        Not under FSDP, whose blocks gather their weights in forward only: leave `prepared` out there.
        """
        self.check(context)
        cfg, dtype, M = self.cfg, self.patch_embedding.weight.dtype, context.memory.shape[2]
        h, w = (n // p for n, p in zip(context.past.shape[-2:], cfg.patch[1:], strict=True))
        places, here = shares(h * w, group)
        p = self.patch_embedding_wancamctrl(patchify(context.rays, cfg.patch)[:, :, here].to(dtype))
        text = F.pad(context.text, (0, 0, 0, cfg.text_len - context.text.shape[1]))
        angles = (
            rope_angles(context.times, h, w, cfg)[:, :, here].flatten(1, 2),
            action_angles(M, context.times.shape[1] - M, cfg, context.times.device),
        )
        rope, action_rope = (torch.stack([a.cos(), a.sin()], -1).float() for a in angles)
        shared = Prepared(
            clean=self.embed(torch.cat([context.memory, context.past], 2), here),
            rays=p + self.c2ws_hidden_states_layer2(F.silu(self.c2ws_hidden_states_layer1(p))),
            text=self.text_embedding(text.to(dtype)),
            mouse=context.mouse.flatten(2).to(dtype),
            keyboard=context.keyboard.to(dtype),
            rope=rope,
            action_rope=action_rope,
            places=places,
            here=here,
            group=group,
            reuse=self.reuse,
        )
        return (
            replace(shared, blocks=[block.prepare(shared) for block in self.blocks])
            if blocks
            else shared
        )

    def check(self, context, **more: tuple[Tensor, tuple]) -> None:
        cfg, M, T = self.cfg, context.memory.shape[2], context.times.shape[1]
        B, _, P, h, w = context.past.shape
        shapes = {
            "past": (B, cfg.in_dim, P, h, w),
            "memory": (B, cfg.in_dim, M, h, w),
            "times": (B, T),
            "rays": (B, cfg.ray_channels, T, h, w),
            "mouse": (B, T, cfg.action_window, 2),
            "keyboard": (B, T, cfg.action_window, 6),
            "text": (B, context.text.shape[1], cfg.text_dim),
        }
        more |= {name: (getattr(context, name), shape) for name, shape in shapes.items()}
        for name, (tensor, shape) in more.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must be {shape} with {M} memory and {P} past of {T} latents, "
                    f"got {tuple(tensor.shape)}"
                )
        if h % cfg.patch[1] or w % cfg.patch[2]:
            raise ValueError(
                f"latents must divide into {cfg.patch[1]}x{cfg.patch[2]} patches, got {h}x{w}"
            )
        if context.text.shape[1] > cfg.text_len:
            raise ValueError(
                f"text must have at most {cfg.text_len} rows, got {context.text.shape[1]}"
            )

    def forward(
        self,
        x_sigma: Tensor,  # (B, C, N, h, w) the new latents, noisy
        sigma: Tensor,  # (B,) their noise level, 0..1
        context,  # memory.Context
        prepared: Prepared | None = None,  # from prepare(context): same result, less work
        return_past: bool = False,  # also what is predicted at the past latents, in front
        return_features: bool = False,  # the last block's tokens instead, (B, N, S, D)
    ) -> Tensor:  # (B, C, N, h, w) float32 velocity of the new latents
        (B, C, P, h, w), T = context.past.shape, context.times.shape[1]
        new = T - P - context.memory.shape[2]
        wanted = new + P if return_past else new
        self.check(context, x_sigma=(x_sigma, (B, C, new, h, w)), sigma=(sigma, (B,)))
        shared = prepared or self.prepare(context, blocks=False)
        if return_past and shared.reuse:
            raise ValueError(
                "with reuse nothing is predicted at the past latents after the first step: leave return_past out"
            )
        x = self.embed(x_sigma, shared.here)  # (B, N, S, D)
        if not (
            shared.reuse and shared.blocks and shared.blocks[0][3]
        ):  # else the clean tokens wait in the blocks
            x = torch.cat([shared.clean, x], 1)  # (B, T, S, D)
        T = x.shape[1]
        x = x + shared.rays[:, -T:] if self.cfg.rays_at_input else x
        x = x.float() if self.cfg.fp32_stream else x
        is_new = (torch.arange(T, device=x.device) >= T - new).long()  # row of t = 0 or of t
        e, e0 = (
            rows.index_select(1, is_new) for rows in self.embed_time(sigma)
        )  # (B, T, D), (B, T, 6, D)
        for i, block in enumerate(self.blocks):
            keep = (
                wanted if i == len(self.blocks) - 1 and block.action_model is None else T
            )  # answer where it is read
            x = block(x, e0, shared, shared.blocks and shared.blocks[i], keep)
        if return_features:
            return x[:, -wanted:]
        y = self.head(x[:, -wanted:], e[:, -wanted:])  # (B, wanted, S, 4·C)
        if shared.group is not None:
            shapes = [(B, wanted, S, y.shape[-1]) for S in shared.places]
            y = torch.cat(exchange([y] * len(shapes), shapes, shared.group), 2)
        return unpatchify(y, h, w, self.cfg.patch)


# ---- samplers: yield the latent after every step -----------------------------------------------------------
def euler(v: Callable, x: Tensor, sigmas: Tensor, generator=None) -> Iterator[Tensor]:
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        x = x + (after - now) * v(x, now)  # x_σ' = x_σ + (σ' − σ)·v
        yield x


def renoise(v: Callable, x: Tensor, sigmas: Tensor, generator=None) -> Iterator[Tensor]:
    """Jump to the clean estimate, then add fresh noise of the next level: as the student is trained."""
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        x = x - now * v(x, now)  # x̂0 = x_σ − σ·v
        if after > 0:
            noise = torch.empty_like(x).normal_(generator=generator)
            x = (1 - after) * x + after * noise  # x_σ' = (1−σ')·x̂0 + σ'·ε
        yield x


def unipc(v: Callable, x: Tensor, sigmas: Tensor, generator=None) -> Iterator[Tensor]:
    """UniPC of order 2, B(h) = e^−h − 1, on x0: correct the latent just reached, then predict the next."""
    sigma = sigmas.tolist()
    lam = [
        math.log1p(-s) - math.log(s) if s else math.inf for s in sigma
    ]  # λ = ln α − ln σ,  α = 1 − σ
    start, older, old, order = x, None, None, 0
    for i, (now, after) in enumerate(zip(sigma[:-1], sigma[1:], strict=True)):
        x0 = x - now * v(x, now)  # x̂_i = z_i − σ_i·v_i
        if i > 0:  # corrector: i−1 → i
            h = lam[i] - lam[i - 1]
            B = math.expm1(-h)
            if order == 1:
                towards = 0.5 * (x0 - old)
            else:
                r = (lam[i - 2] - lam[i - 1]) / h
                phi1, phi2 = -B / h - 1, (B / h + 1) / h - 0.5
                rho0 = (phi1 / B - 2 * phi2 / B) / (1 - r)  # [[1, 1], [r, 1]]·ρ = [φ1, 2·φ2]/B
                towards = rho0 * (older - old) / r + (phi1 / B - rho0) * (x0 - old)
            x = now / sigma[i - 1] * start - (1 - now) * B * (old + towards)
        start, order = x, min(2, len(sigma) - 1 - i, i + 1)  # predictor: i → i+1
        B = math.expm1(lam[i] - lam[i + 1])  # σ' = 0: −1, so x = x̂_i
        towards = (
            0.5 * (old - x0) / (lam[i - 1] - lam[i]) * (lam[i + 1] - lam[i]) if order == 2 else 0
        )
        x = after / now * start - (1 - after) * B * (x0 + towards)
        older, old = old, x0
        yield x


@torch.no_grad()
def sample(
    model: Callable,  # DiT, moe.Experts: (x_sigma, sigma, context, prepared) → v
    context,  # memory.Context; guidance also calls its null()
    sigmas: Tensor,  # (steps + 1,) falling to 0: sigma_grid(steps)
    noise: Tensor,  # (B, C, N, h, w)
    method: str = "euler",  # euler | unipc (as released) | renoise (few-step student)
    guidance: float = 1.0,  # released base model: 5; 1 needs one call per step, not two
    generator: torch.Generator | None = None,  # of renoise's fresh noise
    group: dist.ProcessGroup | None = None,  # ranks that share the work
    revise: Callable
    | None = None,  # before step 1, 2, …: its number → a newer context, None: as it was
) -> Tensor:  # (B, C, N, h, w) x0
    """Walk from noise to clean latents along the predicted velocity."""
    methods = {"euler": euler, "unipc": unipc, "renoise": renoise}
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}")

    def bind(context) -> list[tuple]:  # what every step reads, by branch
        branches = [context] if guidance == 1 else [context, context.null()]
        return [
            (c, model.prepare(c, group) if hasattr(model, "prepare") else None) for c in branches
        ]

    def v(x: Tensor, sigma: float) -> Tensor:
        at = torch.full((len(x),), sigma, device=x.device)
        full, *null = (model(x, at, c, prepared=p) for c, p in bound)
        return (
            null[0] + guidance * (full - null[0]) if null else full
        )  # v_null + g·(v_full − v_null)

    bound, walk = bind(context), methods[method](v, noise, sigmas, generator)
    for step in range(len(sigmas) - 1):
        if step and revise and (newer := revise(step)) is not None:
            bound.clear()  # what is kept is large: never twice
            bound = bind(newer)
        x0 = next(walk)
    return x0


# ---- demo --------------------------------------------------------------------------------------------------
def random_context(
    cfg: DiTConfig, B: int = 1, memory: int = 5, past: int = 4, new: int = 10, size: int = 8
):
    """Right shapes, random content: for demos, tests and timing."""
    T, n, latent = memory + past + new, cfg.action_window, (B, cfg.in_dim)
    times = torch.cat([3 * torch.arange(memory) + 1, torch.arange(past + new) + 31]).expand(B, T)
    return SimpleNamespace(
        past=torch.randn(*latent, past, size, size),
        memory=torch.randn(*latent, memory, size, size),
        rays=torch.randn(B, cfg.ray_channels, T, size, size),
        text=torch.randn(B, 3, cfg.text_dim),
        mouse=torch.randn(B, T, n, 2),
        keyboard=torch.randint(0, 2, (B, T, n, 6)).float(),
        times=times,
    )


def main() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        big = DiT(PRESETS["5b"])
    count = sum(p.numel() for p in big.parameters())
    print(
        f"5b: {len(big.state_dict())} tensors, {count / 1e9:.4f} B parameters (released: 1356, 6.4699 B)"
    )
    model, context = DiT(), random_context(PRESETS["tiny"])
    for p in model.parameters():  # nothing silent, so that every path shows
        nn.init.normal_(p, std=0.05)
    x, sigma = torch.randn(1, 16, 10, 8, 8), torch.tensor([0.7])
    direct, prepared = (model(x, sigma, context, p) for p in (None, model.prepare(context)))
    print(
        f"prepared against direct: {(direct - prepared).abs().max():.1e} of {direct.abs().max():.1f}"
    )
    turn = rope_angles(torch.tensor([[0, 400]]), 1, 1, model.cfg)[0, :, 0].diff(dim=0)[0, :, :12]
    print(
        "Eq. 7, likeness of now and 400 latents ago, per head:",
        *(f"{c:.2f}" for c in turn.cos().mean(-1)),
    )


if __name__ == "__main__":
    main()
