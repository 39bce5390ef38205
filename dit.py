"""Predict the velocity of noisy latents from context, actions and cameras.

Paper: §3.1 (base model, Eq. 3), §3.2 (memory, Eq. 6).  Flow and samplers: flow.py; Eq. 7: attention.py.

    L = ‖(ε − x0) − v̂(x_σ, σ | past, memory, actions, cameras, text)‖²               Eq. 3, 6

Time axis: [memory | past | new]. Memory and past are clean (t = 0); only new latents are noisy and
predicted. A block: self-attention over everything · camera scale and shift · norm3, which REPLACES the
residual · text cross-attention · action module (early blocks) · feed-forward. Tokens (B, T, S, D):
T latents of S places.

Fast forms of the same function, tested against the plain one: modulation as two rows (only timesteps 0
and t exist); a last block that answers only for latents whose output is read; prepare(context), which
keeps what no step changes. Ranks share places, not time: only self-attention and output talk.

Departures: no padding tokens; projections in the weights' dtype, not float32; any batch; ray tokens join
the input (own presets only). Action q/k norm weights: ignored, as released.
`context` is a context.Context, read by attribute: past, memory, times, rays, mouse, keyboard, text.
Demo: python dit.py      Tests: pytest tests/test_dit.py
"""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import attention


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


def timestep(sigma: Tensor, mode: str = "exact") -> Tensor:  # float64, 0..1000
    """The t the network is told. The release truncates it to an integer, then to bf16: 999 becomes 1000."""
    t = 1000 * sigma.double()
    modes = {"exact": t, "integer": t.trunc(), "bf16": t.trunc().bfloat16().double()}
    if mode not in modes:
        raise ValueError(f"timestep must be one of {', '.join(modes)}, got {mode!r}")
    return modes[mode]


# ---- small modules -----------------------------------------------------------------------------------------


def linear32(layer: nn.Linear, x: Tensor) -> Tensor:  # few rows or columns, always float32
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # (B, T, S, D), (B, T, 1, D) twice
    return torch.addcmul(
        shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale
    )  # LN·(1 + scale) + shift


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
        return attention.rotate(
            attention.rms(x, norm.weight if self.use_norm_weight else None), rope
        )

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
            attention.attention(q, k, v).flatten(2).unflatten(0, (B, S)).transpose(1, 2)
        )
        q = self.mouse_attn_q(x).unflatten(-1, (self.heads, -1))  # (B, T, S, heads, head_dim)
        q = self.turned(q, self.key_attn_q_norm, rope[:, None]).flatten(1, 2)
        return x + self.proj_keyboard(attention.attention(q, *kv).flatten(2).unflatten(1, (T, S)))


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
    blocks: list[tuple] | None = None  # per block: Block.prepare; None: every forward computes it


class Block(nn.Module):
    def __init__(self, cfg: DiTConfig, has_actions: bool):
        super().__init__()
        D = cfg.dim
        self.modulation = nn.Parameter(torch.randn(1, 6, D) / D**0.5)
        self.self_attn, self.cross_attn = attention.Attention(cfg), attention.Attention(cfg)
        self.norm3 = nn.LayerNorm(D, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(D, cfg.ffn), nn.GELU("tanh"), nn.Linear(cfg.ffn, D))
        self.cam_injector_layer1, self.cam_injector_layer2 = nn.Linear(D, D), nn.Linear(D, D)
        self.cam_scale_layer, self.cam_shift_layer = nn.Linear(D, D), nn.Linear(D, D)
        self.action_model = ActionModule(cfg) if has_actions else None

    def prepare(self, shared: Prepared) -> tuple:
        """Camera (1 + scale, shift), text (K, V), keyboard (K, V): functions of the context alone."""
        # g = W₂·silu(W₁·P) + P,  P the ray tokens
        g = self.cam_injector_layer2(F.silu(self.cam_injector_layer1(shared.rays))) + shared.rays
        camera = 1 + self.cam_scale_layer(g), self.cam_shift_layer(g)
        keyboard = self.action_model and self.action_model.key_value(
            shared.keyboard, shared.action_rope
        )
        return camera, self.cross_attn.key_value(shared.text), keyboard

    def forward(
        self, x: Tensor, e0: Tensor, shared: Prepared, cache: tuple | None, keep: int
    ) -> Tensor:
        """(B, T, S, D) → (B, keep, S, D), the last `keep` latents. e0 (B, T, 6, D): the time's modulation."""
        camera, text, keyboard = cache or self.prepare(shared)
        old, dtype = x.shape[1] - keep, self.norm3.weight.dtype  # dtype of matrix products
        m = (self.modulation + e0).to(x.dtype)[:, :, :, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = m.unbind(2)  # (B, T, 1, D) each
        a = modulate(x, shift1, scale1).to(dtype)  # 1. self-attention
        q = self.self_attn.query(a[:, old:])
        k, v = self.self_attn.key_value(a)
        q = attention.rotate(q, shared.rope[:, -q.shape[1] :])
        k = attention.rotate(k, shared.rope)
        y = (
            attention.attention(q, k, v)
            if shared.group is None
            else attention.attention_across(q, k, v, shared)
        )
        x, gate1, shift2, scale2, gate2 = (t[:, old:] for t in (x, gate1, shift2, scale2, gate2))
        x = torch.addcmul(x, self.self_attn.o(y.flatten(2)).view_as(x), gate1)
        scale, shift = (t[:, -keep:] for t in camera)  # 2. camera
        x = torch.addcmul(shift, x, scale)
        x = F.layer_norm(
            x, x.shape[-1:], self.norm3.weight.to(x.dtype), self.norm3.bias.to(x.dtype), 1e-6
        )
        y = attention.attention(self.cross_attn.query(x.to(dtype)), *text).flatten(
            2
        )  # 3. residual replaced; text
        x = x + self.cross_attn.o(y).view_as(x)
        if self.action_model is not None:  # 4. actions
            x = self.action_model(
                x.to(dtype),
                shared.mouse[:, -keep:],
                keyboard,
                shared.action_rope[-keep:],
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
        omega = attention.frequencies(t.new_full((1,), 1e4), self.cfg.freq_dim // 2)
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
        places, here = attention.shares(h * w, group)
        p = self.patch_embedding_wancamctrl(patchify(context.rays, cfg.patch)[:, :, here].to(dtype))
        text = F.pad(context.text, (0, 0, 0, cfg.text_len - context.text.shape[1]))
        angles = (
            attention.rope_angles(context.times, h, w, cfg)[:, :, here].flatten(1, 2),
            attention.action_angles(M, context.times.shape[1] - M, cfg, context.times.device),
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
        context,  # context.Context
        prepared: Prepared | None = None,  # from prepare(context): same result, less work
        return_past: bool = False,  # also what is predicted at the past latents, in front
        return_features: bool = False,  # the last block's tokens instead, (B, N, S, D)
    ) -> Tensor:  # (B, C, N, h, w) float32 velocity of the new latents
        (B, C, P, h, w), T = context.past.shape, context.times.shape[1]
        new = T - P - context.memory.shape[2]
        wanted = new + P if return_past else new
        self.check(context, x_sigma=(x_sigma, (B, C, new, h, w)), sigma=(sigma, (B,)))
        shared = prepared or self.prepare(context, blocks=False)
        x = torch.cat([shared.clean, self.embed(x_sigma, shared.here)], 1)  # (B, T, S, D)
        x = x + shared.rays if self.cfg.rays_at_input else x
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
            y = torch.cat(attention.exchange([y] * len(shapes), shapes, shared.group), 2)
        return unpatchify(y, h, w, self.cfg.patch)


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
    turn = attention.rope_angles(torch.tensor([[0, 400]]), 1, 1, model.cfg)[0, :, 0].diff(dim=0)[
        0, :, :12
    ]
    print(
        "Eq. 7, likeness of now and 400 latents ago, per head:",
        *(f"{c:.2f}" for c in turn.cos().mean(-1)),
    )


if __name__ == "__main__":
    main()
