"""Predict the velocity of noisy latents from context, actions and cameras.

What it does. A transformer over [memory | past | new]. Memory and past are clean and only looked
at. The new latents are noisy, x_σ at level σ; for them it predicts the velocity v̂, which leads
from data to noise (flow.py). It is trained to make this small:

    L = ‖(ε − x0) − v̂(x_σ, σ | past, memory, actions, cameras, text)‖²                   Eq. 3, 6

Paper: §3.1 (base model), §3.2 (memory in the same sequence).  Its block: block.py.

Why it works. Attention compares every token with every other one, so there should be few of them. A
token is a patch of 1 latent x 2 x 2 cells: its 4·C numbers as one row, times a matrix W_x. (That is
a convolution whose stride is its kernel size, and the weights are stored as one.) T latents of
h x w cells become T times S = h·w/4 tokens:

    token[t, row, column] = W_x·x[:, t, 2·row : 2·row + 2, 2·column : 2·column + 2]            (1)

Noise level. As a single number, .93 is hard to tell from .94. As cosines and sines of 128
frequencies it is not: near levels differ in the fast ones, far levels in the slow ones. An MLP
turns them into a vector e:

    e(t) = MLP(cos ω_j·t, sin ω_j·t),   t = 1000·σ,   ω_j = 10000^(−j/128),   j = 0 .. 127     (2)

A sequence has two levels: 0 in memory and past, σ in the new latents. So e is computed for these
two only, and each latent picks its own:

    e[latent] = e(1000·σ) if it is new, e(0) if not                                            (3)

Cameras. The rays of all cells (camera.py), cut into patches as in (1), become ray tokens r, which
the blocks use:

    r = p + W₂·silu(W₁·p),    p = W_r·rays                                                     (4)

In our own presets they are added to the tokens at the input as well, so that the first attention
can tell already which places of two latents lie in the same direction.

The head turns tokens back into cells. Only the velocity of the new latents is read.

Cheaper, for the same result: prepare(context) computes what does not change between the steps of
sampling, to the same bits. Equal up to rounding: the last block computes only the latents that are
read; ranks share the places of a picture and exchange in self-attention and at the end
(attention.py).

What differs. No padding among the tokens of the video, and batches of any size; in the release rays
enter in the blocks alone.

Try it: python dit.py      Tests: pytest tests/test_dit.py
"""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import actions
import attention
from block import Block, Prepared, modulate, offsets


@dataclass(frozen=True)
class DiTConfig:
    dim: int = 256  # D, token width
    heads: int = 4  # of self- and text attention
    layers: int = 6  # blocks
    ffn: int = 640  # width inside a block's MLP
    in_dim: int = 16  # C, latent channels in and out
    text_dim: int = 64  # width of a word
    text_len: int = 16  # words; missing ones are zeros, which ARE attended to
    freq_dim: int = 256  # cosines and sines of (2), 128 each
    ray_channels: int = 60  # per cell: 15 for each of four frames (camera.anchored_rays)
    sigma_theta: float = 0.8  # σ_θ of Eq. 7, see attention.py; 0 is ordinary RoPE
    patch: tuple[int, int, int] = (1, 2, 2)  # latent cells per token: time (always 1), row, column

    action_blocks: tuple[int, ...] = (0, 1, 2)  # which blocks have an action module
    action_hidden: int = 16  # width of one embedded keyboard frame
    action_width: int = 64  # inner width of both action branches
    action_heads: int = 4
    action_rope: int = 4  # channels per action head that RoPE rotates; the others know no time
    action_window: int = 12  # frames of actions each latent sees
    action_norm_weight: bool = False  # multiply by the action q/k norm weights; released: no

    timestep: str = "exact"  # 1000·σ | "integer": truncated | "bf16": truncated and rounded
    rays_at_input: bool = True  # ray tokens also join the input; released: in the blocks alone
    fp32_stream: bool = False  # float32 residual stream under bf16 weights, as released


PRESETS = {
    # for tests: every part is there, as narrow as it can be
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
    # our own models: tiny on the latents of our small VAE, small on those of Wan2.2's
    "tiny": DiTConfig(),
    "small": DiTConfig(in_dim=48),
    # Matrix-Game 3.0 as released, to the last quirk
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
# one expert of the 28B pair (moe.py); never released: 5b but for its size and an exact timestep
PRESETS["14b"] = replace(
    PRESETS["5b"],
    dim=5120,
    heads=40,
    layers=40,
    ffn=13824,
    timestep="exact",
    action_blocks=tuple(range(20)),
)


# what guidance subtracts in place of the prompt, with the released base model: its wording is part of
# the published settings, and the network was trained to be steered away from just that
NEGATIVE_PROMPTS = {
    "5b": (
        "Vibrant colors, overexposure, static, blurred details, subtitles, style, artwork, painting, "
        "still image, overall grayness, worst quality, low quality, JPEG compression residue, ugly, "
        "mutilated, extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, "
        "malformed limbs, fused fingers, still image, cluttered background, three legs, crowded "
        "background, walking backwards"
    ),
}


def timestep(sigma: Tensor, mode: str = "exact") -> Tensor:  # float64, 0..1000
    """The t that the network is told.

    The release truncates it to an integer, as diffusion models with a thousand steps had it, then
    rounds that to bf16: 999 becomes 1000. Its weights have learned from nothing else.
    """
    t = 1000 * sigma.double()
    modes = {"exact": t, "integer": t.trunc(), "bf16": t.trunc().bfloat16().double()}
    if mode not in modes:
        raise ValueError(f"timestep must be one of {', '.join(modes)}, got {mode!r}")
    return modes[mode]


# ---- cells to tokens and back --------------------------------------------------------------------


def patchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(B, C, T, h, w) -> (B, T, S, C·ph·pw), features in the order channel, row, column."""
    B, C, T, h, w = x.shape
    _, ph, pw = patch
    rows = h // ph
    columns = w // pw
    x = x.reshape(B, C, T, rows, ph, columns, pw)
    x = x.permute(0, 2, 3, 5, 1, 4, 6)  # (B, T, rows, columns, C, ph, pw)
    return x.reshape(B, T, rows * columns, C * ph * pw)


def unpatchify(y: Tensor, h: int, w: int, patch: tuple[int, int, int]) -> Tensor:
    """(B, T, S, ph·pw·C) -> (B, C, T, h, w). As released, the channel comes LAST here."""
    B, T = y.shape[:2]
    _, ph, pw = patch
    y = y.reshape(B, T, h // ph, w // pw, ph, pw, -1)
    y = y.permute(0, 6, 1, 2, 4, 3, 5)  # (B, C, T, rows, ph, columns, pw)
    return y.reshape(B, -1, T, h, w)


# ---- parts of the network ------------------------------------------------------------------------


def linear32(layer: nn.Linear, x: Tensor) -> Tensor:
    """In float32 whatever the weights are: for layers of few rows or columns."""
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


class Head(nn.Module):
    """Tokens to cells, in float32; the noise level makes a shift and a scale, as in block.py (2)."""

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.modulation = offsets(2, cfg.dim)
        self.head = nn.Linear(cfg.dim, math.prod(cfg.patch) * cfg.in_dim)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:  # (B, T, S, D), (B, T, D) -> (B, T, S, 4·C)
        level = (self.modulation + e[:, :, None])[:, :, :, None]  # (B, T, 2, 1, D)
        shift, scale = level.unbind(2)
        return linear32(self.head, modulate(x.float(), shift, scale))


# ---- the network ---------------------------------------------------------------------------------


class DiT(nn.Module):
    """The whole network. Its parameters carry the released names, so released files load as they are.

    memory, past, x_sigma ── patches ──┐
    rays ─────────────────── ray tokens ┤
    sigma ────────────────── e ─────────┼── block · block · ... · block ── head ── velocity
    text, mouse, keyboard ──────────────┤
    times ────────────────── RoPE ──────┘
    """

    def __init__(self, cfg: DiTConfig = PRESETS["tiny"]):
        super().__init__()
        self.cfg = cfg
        D = cfg.dim

        # the order is that of stored optimiser states
        self.patch_embedding = nn.Conv3d(cfg.in_dim, D, cfg.patch, stride=cfg.patch)
        self.patch_embedding_wancamctrl = nn.Linear(cfg.ray_channels * math.prod(cfg.patch), D)
        self.c2ws_hidden_states_layer1 = nn.Linear(D, D)
        self.c2ws_hidden_states_layer2 = nn.Linear(D, D)
        self.text_embedding = nn.Sequential(
            nn.Linear(cfg.text_dim, D), nn.GELU("tanh"), nn.Linear(D, D)
        )
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, D), nn.SiLU(), nn.Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks = nn.ModuleList(Block(cfg, i in cfg.action_blocks) for i in range(cfg.layers))
        self.head = Head(cfg)
        if not self.head.modulation.is_meta:
            self.initialise()

    def initialise(self) -> None:
        """As released: the last layers of actions, cameras and head start at zero.

        A fresh network predicts zero; fresh actions and cameras change nothing at first, where rays
        enter in the blocks alone.
        """
        zeros = ("head.head", "proj_mouse", "proj_keyboard", "cam_scale_layer", "cam_shift_layer")
        for name, p in self.named_parameters():
            if name.endswith("bias") or any(layer in name for layer in zeros):
                nn.init.zeros_(p)
            elif name.startswith(("text_embedding", "time_embedding")):
                nn.init.normal_(p, std=0.02)
            elif name.endswith("weight") and p.ndim > 1:
                nn.init.xavier_uniform_(p.flatten(1))

    def forward(
        self,
        x_sigma: Tensor,  # (B, C, N, h, w) the new latents, noisy
        sigma: Tensor,  # (B,) their noise level, 0..1
        context,  # context.Context: past, memory, times, rays, mouse, keyboard and text are read
        prepared: Prepared | None = None,  # from prepare(context): same result, less work
        return_past: bool = False,  # also what is predicted at the past latents, in front: for tests
        return_features: bool = False,  # the last block's tokens instead, (B, N, S, D)
    ) -> Tensor:  # (B, C, N, h, w) float32 velocity of the new latents
        B, C, P, h, w = context.past.shape
        T = context.times.shape[1]
        new = T - P - context.memory.shape[2]
        wanted = new + P if return_past else new
        self.check(context, x_sigma=(x_sigma, (B, C, new, h, w)), sigma=(sigma, (B,)))

        # one sequence: memory and past, which no step changes, and the new latents as they are now
        shared = prepared or self.encode_context(context)
        x = torch.cat([shared.clean, self.embed(x_sigma, shared.here)], 1)  # (B, T, S, D)
        if self.cfg.rays_at_input:
            x = x + shared.rays
        if self.cfg.fp32_stream:
            x = x.float()

        # row 0 of embed_time, of t = 0, for clean latents; row 1, of t = 1000·σ, for new ones
        is_new = (torch.arange(T, device=x.device) >= T - new).long()
        e, from_level = (rows.index_select(1, is_new) for rows in self.embed_time(sigma))  # (3)

        # the last block computes only what is read; not if it has actions, whose attention runs
        # over all times, past and memory included
        ready = shared.blocks or [None] * len(self.blocks)
        for i, block in enumerate(self.blocks):
            is_last = i == len(self.blocks) - 1
            needed = wanted if is_last and block.action_model is None else T
            x = block(x, from_level, shared, ready[i], needed)
        if return_features:
            return x[:, -wanted:]

        # tokens to cells; ranks that share the places bring them together
        y = self.head(x[:, -wanted:], e[:, -wanted:])  # (B, wanted, S, 4·C)
        if shared.group is not None:
            y = attention.gather_places(y, shared.places, shared.group)
        return unpatchify(y, h, w, self.cfg.patch)

    def prepare(self, context, group: dist.ProcessGroup | None = None) -> Prepared:
        """forward(..., prepared=prepare(context)) is the same, cheaper from the second call on.

        With a group each rank works on its share of the places; all call forward with the same
        inputs. Not under FSDP, whose blocks gather their weights in forward only.
        """
        shared = self.encode_context(context, group)
        return replace(shared, blocks=[block.prepare(shared) for block in self.blocks])

    def encode_context(self, context, group: dist.ProcessGroup | None = None) -> Prepared:
        """What all blocks need of the context, in their dtype, for the places of this rank."""
        self.check(context)
        cfg = self.cfg
        dtype = self.patch_embedding.weight.dtype
        memory = context.memory.shape[2]
        T = context.times.shape[1]
        rows = context.past.shape[-2] // cfg.patch[1]
        columns = context.past.shape[-1] // cfg.patch[2]
        places, here = attention.shares(rows * columns, group)

        angles = attention.rope_angles(context.times, rows, columns, cfg)[:, :, here]
        clock = actions.clock(memory, T - memory, context.times.device)
        action_angles = actions.angles(clock, cfg)
        text = F.pad(context.text, (0, 0, 0, cfg.text_len - context.text.shape[1]))
        return Prepared(
            clean=self.embed(torch.cat([context.memory, context.past], 2), here),
            rays=self.embed_rays(context.rays, here),
            text=self.text_embedding(text.to(dtype)),
            mouse=context.mouse.flatten(2).to(dtype),
            keyboard=context.keyboard.to(dtype),
            rope=attention.cos_sin(angles.flatten(1, 2)),
            action_rope=attention.cos_sin(action_angles),
            places=places,
            here=here,
            group=group,
        )

    def embed(self, x: Tensor, here: slice) -> Tensor:  # (B, C, T, h, w) -> (B, T, S, D)
        # the convolution's weight (D, C, 1, 2, 2), flattened to the matrix W_x
        weight = self.patch_embedding.weight
        tokens = patchify(x, self.cfg.patch)[:, :, here].to(weight.dtype)
        return F.linear(tokens, weight.flatten(1), self.patch_embedding.bias)  # (1)

    def embed_rays(self, rays: Tensor, here: slice) -> Tensor:  # (B, R, T, h, w) -> (B, T, S, D)
        tokens = patchify(rays, self.cfg.patch)[:, :, here]
        p = self.patch_embedding_wancamctrl(tokens.to(self.patch_embedding.weight.dtype))
        hidden = F.silu(self.c2ws_hidden_states_layer1(p))
        return p + self.c2ws_hidden_states_layer2(hidden)  # (4)

    def embed_time(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) -> e (B, 2, D), and W·silu(e) of block.py (1), (B, 2, 6, D).

        Row 0 is for t = 0, row 1 for t = 1000·σ. In float32, because bf16 would confuse near
        levels.
        """
        t = timestep(sigma, self.cfg.timestep)
        omega = attention.frequencies(t.new_full((1,), 1e4), self.cfg.freq_dim // 2)
        angle = torch.stack([torch.zeros_like(t), t], 1)[..., None] * omega  # (B, 2, freq_dim/2)
        waves = torch.cat([angle.cos(), angle.sin()], -1)
        e = linear32(self.time_embedding[0], waves)
        e = linear32(self.time_embedding[2], F.silu(e))  # (2)
        return e, linear32(self.time_projection[1], F.silu(e)).unflatten(-1, (6, -1))

    def check(self, context, **more: tuple[Tensor, tuple]) -> None:
        """Wrong shapes are named; `more` holds further tensors, each with its shape."""
        cfg = self.cfg
        B, _, P, h, w = context.past.shape
        M = context.memory.shape[2]
        T = context.times.shape[1]
        words = context.text.shape[1]
        shapes = {
            "past": (B, cfg.in_dim, P, h, w),
            "memory": (B, cfg.in_dim, M, h, w),
            "times": (B, T),
            "rays": (B, cfg.ray_channels, T, h, w),
            "mouse": (B, T, cfg.action_window, 2),
            "keyboard": (B, T, cfg.action_window, 6),
            "text": (B, words, cfg.text_dim),
        }
        wanted = more | {name: (getattr(context, name), shape) for name, shape in shapes.items()}
        for name, (tensor, shape) in wanted.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must be {shape} with {M} memory and {P} past of {T} latents, "
                    f"got {tuple(tensor.shape)}"
                )

        _, ph, pw = cfg.patch
        if h % ph or w % pw:
            raise ValueError(f"latents must divide into {ph}x{pw} patches, got {h}x{w}")
        if words > cfg.text_len:
            raise ValueError(f"text must have at most {cfg.text_len} words, got {words}")


# ---- demo ----------------------------------------------------------------------------------------


def random_context(
    cfg: DiTConfig,
    B: int = 1,
    memory: int = 5,
    past: int = 4,
    new: int = 10,
    size: int = 8,
) -> SimpleNamespace:
    """Right shapes, random content: for demos, tests and timing."""
    T = memory + past + new
    window = cfg.action_window
    old = 3 * torch.arange(memory) + 1
    recent = torch.arange(past + new) + 31
    return SimpleNamespace(
        past=torch.randn(B, cfg.in_dim, past, size, size),
        memory=torch.randn(B, cfg.in_dim, memory, size, size),
        rays=torch.randn(B, cfg.ray_channels, T, size, size),
        text=torch.randn(B, 3, cfg.text_dim),
        mouse=torch.randn(B, T, window, 2),
        keyboard=torch.randint(0, 2, (B, T, window, 6)).float(),
        times=torch.cat([old, recent]).expand(B, T),
    )


@torch.no_grad()
def main() -> None:
    """The released size; the same bits with prepare(); every input has an effect."""
    torch.manual_seed(0)
    with torch.device("meta"):
        big = DiT(PRESETS["5b"])
    tensors = len(big.state_dict())
    parameters = sum(p.numel() for p in big.parameters())
    print(f"5b: {tensors} tensors, {parameters:,} parameters; released: 1356 and 6,469,915,584")

    model = DiT()
    for p in model.parameters():  # no layer at zero, so that every input has an effect
        if p.ndim > 1:
            nn.init.normal_(p, std=0.1)
    context = random_context(model.cfg)
    x = torch.randn(1, 16, 10, 8, 8)
    sigma = torch.tensor([0.7])
    v = model(x, sigma, context)
    difference = (model(x, sigma, context, model.prepare(context)) - v).abs().max()
    print(f"prepared once for all steps, or computed in each: {difference} apart")

    again = (model(x, sigma, context) - v).norm() / v.norm()
    for name in ("memory", "past", "rays", "keyboard", "mouse", "text"):
        other = SimpleNamespace(**vars(context))
        setattr(other, name, torch.randn_like(getattr(context, name)))
        moved = (model(x, sigma, other) - v).norm() / v.norm()
        print(f"another {name}: the velocity moves by {moved:.1%}; the same again: by {again:.1%}")


if __name__ == "__main__":
    main()
