"""One block: attend to everything, take in cameras, text and actions, then an MLP.

What it does. Tokens (B, T, S, D) become tokens: T latents, S places of the picture in each, D
features. The network is a stack of such blocks (dit.py). A block has five steps:

    1. self-attention over the tokens of all latents
    2. cameras scale and shift every token
    3. a norm, then cross-attention to the text
    4. what the player does (actions.py), in the early blocks only
    5. an MLP on every token by itself

Paper: §3.1, §3.2.  Released: Wan2.2's block with cameras and actions added.

Why it works. One network works at every noise level, and the level decides what is to be done: at
high noise a layout is invented, at low noise an edge sharpened. dit.py turns the level of each
latent into a vector e; a linear layer W makes of it a shift, a scale and a gate for each of the
two large branches, self-attention and MLP ("adaLN"):

    (shift, scale, gate) = learned + W·silu(e)        for two branches: six rows of D          (1)
    x = x + gate·branch(LN(x)·(1 + scale) + shift)                                             (2)

`learned` is each block's own (modulation), W is one for all blocks (dit.py, time_projection). LN
brings each token to mean 0 and variance 1. How strongly the branch then sees a feature is up to
scale and shift; how much of its result is added, to the gate. Memory and past get the e of level 0.
No mask sets them apart in self-attention; this does, with their times and cameras.

Cameras. Each token has a ray token P, made of the rays of its cells (dit.py). It acts after
self-attention, when the token has gathered what other views saw:

    g = W₂·silu(W₁·P) + P                                                                      (3)
    x = (1 + scale(g))·x + shift(g)                   scale and shift: a linear layer each     (4)

These two layers start at zero. So a video model that is given cameras makes the same videos at
first.

norm3. A norm usually stands before a branch, and x itself goes on without it. Here, as released,
norm3(x) REPLACES x. Its size starts afresh in every block, so that the sums of the first blocks
do not grow until nothing that later ones add is noticed.

Cheaper, with the same bits: prepare() computes what does not change between the steps of sampling.
And a block may be asked for the last latents only: then all latents are keys and values of its
self-attention, but only these are queries.

What differs. Matrix products are in the weights' dtype, not float32.

Try it: python dit.py      Tests: pytest tests/test_dit.py
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import actions
import attention


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """What a branch gets: x (B, T, S, D), shift and scale (B, T, 1, D) -> (B, T, S, D)."""
    normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, normal, 1 + scale)  # (2)


@dataclass
class Prepared:
    """What the network computes from the context alone: valid for all steps of a segment."""

    clean: Tensor  # (B, M+P, S, D) embedded memory and past
    rays: Tensor  # (B, T, S, D) ray tokens
    text: Tensor  # (B, text_len, D)
    mouse: Tensor  # (B, T, 24)
    keyboard: Tensor  # (B, T, 12, 6)
    rope: Tensor  # (B, T·S, heads, head_dim/2, 2) cosines and sines
    action_rope: Tensor  # (T, 1, action head_dim/2, 2)
    places: list[int]  # how many places each rank holds; S is the number of this rank
    here: slice  # which of all places are this rank's
    group: dist.ProcessGroup | None  # the ranks that share this segment; None: there is one
    blocks: list[tuple] | None = None  # per block: Block.prepare; None: every forward computes it


class Block(nn.Module):
    def __init__(self, cfg: object, has_actions: bool):
        super().__init__()
        D = cfg.dim
        self.modulation = nn.Parameter(torch.randn(1, 6, D) / D**0.5)
        self.self_attn = attention.Attention(cfg)
        self.cross_attn = attention.Attention(cfg)
        self.norm3 = nn.LayerNorm(D, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(D, cfg.ffn), nn.GELU("tanh"), nn.Linear(cfg.ffn, D))
        self.cam_injector_layer1 = nn.Linear(D, D)
        self.cam_injector_layer2 = nn.Linear(D, D)
        self.cam_scale_layer = nn.Linear(D, D)
        self.cam_shift_layer = nn.Linear(D, D)
        self.action_model = actions.ActionModule(cfg) if has_actions else None

    def prepare(self, shared: Prepared) -> tuple:
        """Camera (1 + scale, shift), text (K, V) and keyboard (K, V or None), from the context alone."""
        g = self.cam_injector_layer2(F.silu(self.cam_injector_layer1(shared.rays)))
        g = g + shared.rays  # (3)
        camera = 1 + self.cam_scale_layer(g), self.cam_shift_layer(g)
        text = self.cross_attn.key_value(shared.text)
        keyboard = None
        if self.action_model is not None:
            keyboard = self.action_model.key_value(shared.keyboard, shared.action_rope)
        return camera, text, keyboard

    def forward(
        self,
        x: Tensor,  # (B, T, S, D)
        level: Tensor,  # (B, T, 6, D) W·silu(e) of each latent
        shared: Prepared,
        ready: tuple | None,  # from prepare
        wanted: int,  # results are wanted for this many of the latents, the last ones
    ) -> Tensor:  # (B, wanted, S, D)
        camera, text, keyboard = ready or self.prepare(shared)
        last = slice(x.shape[1] - wanted, None)
        dtype = self.norm3.weight.dtype  # of the matrix products; x itself may be float32
        level = (self.modulation + level).to(x.dtype)[:, :, :, None]  # (1); (B, T, 6, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = level.unbind(2)

        # 1. memory, past and new latents are ONE sequence
        y = self.attend(modulate(x, shift1, scale1).to(dtype), last, shared)
        x = torch.addcmul(x[:, last], y, gate1[:, last])  # (2)

        # 2. from where this place is seen, and in which direction
        scale, shift = camera
        x = torch.addcmul(shift[:, last], x, scale[:, last])  # (4)

        # 3. what the text says of the world; x goes on normalised
        x = self.replace_stream(x)
        y = attention.attention(self.cross_attn.query(x.to(dtype)), *text)
        x = x + self.cross_attn.o(y.flatten(2)).view_as(x)

        # 4. what the player does
        if self.action_model is not None:
            mouse = shared.mouse[:, last]
            rope = shared.action_rope[last]
            x = self.action_model(x.to(dtype), mouse, keyboard, rope).to(x.dtype)

        # 5. every token by itself
        y = self.ffn(modulate(x, shift2[:, last], scale2[:, last]).to(dtype))
        return torch.addcmul(x, y, gate2[:, last])  # (2)

    def attend(self, a: Tensor, last: slice, shared: Prepared) -> Tensor:
        """(B, T, S, D) -> (B, wanted, S, D): self-attention of the last latents to all of them."""
        asking = a[:, last]
        q = self.self_attn.query(asking)
        k, v = self.self_attn.key_value(a)
        q = attention.rotate(q, shared.rope[:, -q.shape[1] :])
        k = attention.rotate(k, shared.rope)
        if shared.group is None:
            y = attention.attention(q, k, v)
        else:
            y = attention.attention_across(q, k, v, shared.places, shared.group)
        return self.self_attn.o(y.flatten(2)).view_as(asking)

    def replace_stream(self, x: Tensor) -> Tensor:
        weight = self.norm3.weight.to(x.dtype)
        bias = self.norm3.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)
