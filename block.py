"""One block: attend to everything, take in cameras, text and actions, then an MLP.

What it does. Takes tokens x (B, T, S, D) and returns tokens: T = M + P + N latents (memory, past,
new), S places of the picture in each, D numbers per token. The network is a stack of such blocks
(dit.py). A block has five steps:

    1. self-attention over the tokens of all latents
    2. cameras scale and shift every token
    3. a norm, then cross-attention to the text
    4. what the player does (actions.py), in the early blocks only
    5. an MLP on every token by itself

Paper: §3.1, §3.2.  Released: Wan2.2's block with cameras and actions added.

Noise level. The same weights serve every noise level, though at a high one a layout has to be
invented and at a low one an edge sharpened. So each latent has a vector e, made from its level by
dit.py. From e, a linear layer W makes a shift, a scale and a gate for each of the two large
branches, self-attention (1.) and MLP (5.):

    (shift, scale, gate) = learned + W·silu(e)        for two branches: six rows of D          (1)
    x = x + gate·branch(LN(x)·(1 + scale) + shift)                                             (2)

`learned` is a parameter of each block (modulation); W is one for all blocks (dit.time_projection).
LN, layer norm, brings each token to mean 0 and variance 1. Scale and shift then decide how strongly
the branch sees each of the D numbers, the gate how much of its result is added. (Known as adaLN.)

Memory, past and new latents are one sequence without any mask. New ones are told apart by e, which
memory and past have for level 0; memory by its times, its cameras and its null actions
(context.py).

Cameras. Each token has a ray token r, made of the rays of its cells (dit.py). It changes the token
after self-attention: by then the token has collected from other latents what can be seen from here:

    g = W₂·silu(W₁·r) + r                                                                      (3)
    x = (1 + scale(g))·x + shift(g)                   scale and shift: a linear layer each     (4)

Both layers of (4) start at zero, so that at first a video model with cameras added in its blocks
makes the same videos as without.

norm3. Usually a norm is applied to what enters a branch, while x itself is passed on without it.
Here, as in the release, norm3(x) REPLACES x. So x has the same size at this point of every block.
Otherwise it would grow from block to block, and what later blocks add would count less and less.

Less work for the same result. prepare() computes what does not change between the steps of
sampling. And of the last block only the last latents are wanted: then all latents are keys and
values of its self-attention, but only these are queries.

What differs. The release computes the projections of self-attention in float32, whatever the
weights are; here they are computed in the weights' dtype.

Try it: python dit.py      Tests: pytest tests/test_dit.py
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import actions
import attention


def offsets(count: int, width: int) -> nn.Parameter:
    """The part of shifts, scales and gates that all noise levels share: rows of length about one."""
    if torch.empty(0).is_meta:  # shapes alone: drawing would load torch's compiler, for seconds
        return nn.Parameter(torch.empty(1, count, width))
    return nn.Parameter(torch.randn(1, count, width) / width**0.5)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """What enters a branch: x (B, T, S, D), shift and scale (B, T, 1, D) -> (B, T, S, D)."""
    normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, normal, 1 + scale)  # shift + normal·(1 + scale), of (2)


@dataclass
class Prepared:
    """What DiT.encode_context makes of a context: the same in all steps of a segment."""

    clean: Tensor  # (B, M+P, S, D) embedded memory and past
    rays: Tensor  # (B, T, S, D) ray tokens
    text: Tensor  # (B, text_len, D)
    mouse: Tensor  # (B, T, 24)
    keyboard: Tensor  # (B, T, 12, 6)
    rope: Tensor  # (B, T·S, heads, head_dim/2, 2) cosines and sines
    action_rope: Tensor  # (T, 1, action head_dim/2, 2)
    places: list[int]  # how many places each rank holds; S is the number of this rank
    here: slice  # which of all places are this rank's
    group: dist.ProcessGroup | None  # the ranks that share this segment; None: only this process
    blocks: list[tuple] | None = None  # Block.prepare of each; None: each forward computes it anew


class Block(nn.Module):
    def __init__(self, cfg: object, has_actions: bool):
        super().__init__()
        D = cfg.dim
        self.modulation = offsets(6, D)
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
        """From the context alone: a factor and shift by camera, k and v of text, k and v of keyboard."""
        hidden = F.silu(self.cam_injector_layer1(shared.rays))
        g = self.cam_injector_layer2(hidden) + shared.rays  # (3)
        camera = (1 + self.cam_scale_layer(g), self.cam_shift_layer(g))

        text = self.cross_attn.key_value(shared.text)
        keyboard = None
        if self.action_model is not None:
            keyboard = self.action_model.key_value(shared.keyboard, shared.action_rope)
        return camera, text, keyboard

    def forward(
        self,
        x: Tensor,  # (B, T, S, D)
        from_level: Tensor,  # (B, T, 6, D) W·silu(e) of each latent
        shared: Prepared,
        ready: tuple | None,  # from prepare
        wanted: int,  # of how many latents, the last ones, the result is wanted
    ) -> Tensor:  # (B, wanted, S, D)
        camera, text, keyboard = ready or self.prepare(shared)
        last = slice(x.shape[1] - wanted, None)
        dtype = self.norm3.weight.dtype  # of the matrix products; x itself may be float32
        rows = (self.modulation + from_level).to(x.dtype)  # (1)
        rows = rows[:, :, :, None]  # (B, T, 6, 1, D): the same at all places
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(2)

        # 1. self-attention
        inputs = modulate(x, shift1, scale1).to(dtype)
        y = self.attend(inputs, last, shared)
        x = torch.addcmul(x[:, last], y, gate1[:, last])  # (2)

        # 2. cameras
        factor, shift = camera
        x = torch.addcmul(shift[:, last], x, factor[:, last])  # (4)

        # 3. text; norm3(x) replaces x before it
        x = self.replace_stream(x)
        q = self.cross_attn.query(x.to(dtype))
        y = attention.attention(q, *text)
        x = x + self.cross_attn.o(y.flatten(2)).view_as(x)

        # 4. actions
        if self.action_model is not None:
            # `wanted` is all of them: the last block is shortened only if it has no actions (dit.py)
            inputs = x.to(dtype)
            x = self.action_model(inputs, shared.mouse, keyboard, shared.action_rope).to(x.dtype)

        # 5. MLP
        inputs = modulate(x, shift2[:, last], scale2[:, last]).to(dtype)
        y = self.ffn(inputs)
        return torch.addcmul(x, y, gate2[:, last])  # (2)

    def attend(self, x: Tensor, last: slice, shared: Prepared) -> Tensor:
        """(B, T, S, D) -> (B, wanted, S, D): self-attention of the last latents to all of them."""
        asking = x[:, last]
        q = self.self_attn.query(asking)
        k, v = self.self_attn.key_value(x)
        q = attention.rotate(q, shared.rope[:, -q.shape[1] :])
        k = attention.rotate(k, shared.rope)
        if shared.group is None:
            y = attention.attention(q, k, v)
        else:
            y = attention.attention_across(q, k, v, shared.places, shared.group)
        return self.self_attn.o(y.flatten(2)).view_as(asking)

    def replace_stream(self, x: Tensor) -> Tensor:
        """norm3, in the dtype of x."""
        weight = self.norm3.weight.to(x.dtype)
        bias = self.norm3.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)
