"""Attend to everything, be told cameras, text and actions, then think.

What it does. Five steps from tokens to tokens, (B, T, S, D): T latents of S places. A network is
a stack of them (dit.py). Paper: §3.1, §3.2.  Released: Wan2.2's block with cameras and actions
added.

    self-attention over everything · cameras · norm3 and text · actions, in the early blocks · thinking

Why it works. One network works at every noise level, and every branch of every block must know
which: at high noise a layout is to be invented, at low noise an edge to be sharpened. So the
level, as a vector e (dit.py), makes the shift, scale and gate of both big branches ("adaLN"):

    (shift, scale, gate) = learned + W·silu(e)        twice, so six rows                       (1)
    x = x + gate·branch(LN(x)·(1 + scale) + shift)                                             (2)

LN takes from a token how large it is and how far off; what the branch gets instead is for the
level to say, feature by feature, and so is how much of its answer counts. Memory and past are
told that they are clean: what tells them from new latents inside self-attention is no mask, but
(1).

Where does a token look? Its ray token P holds the rays of its cells (camera.py). It scales and
shifts what the token says, after self-attention has gathered what other views saw:

    g = W₂·silu(W₁·P) + P                                                                      (3)
    x = (1 + scale(g))·x + shift(g)                                                            (4)

Both layers start at zero, so that a video model given cameras is at first the model it was.

Step 3 is unusual: norm3 REPLACES the residual stream, as released. From there on x has unit size,
and the first blocks' sums cannot drown what later ones add.

Cheaper, and equal to the bit: prepare() keeps what no step of sampling changes, and a block may
be told to answer only for the last latents, while all of them are still heard.

What differs. Products are in the weights' dtype, not float32.

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
    """(B, T, S, D) by (B, T, 1, D) twice: what a branch gets."""
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
    places: list[int]  # how many places every rank holds; S is our number
    here: slice  # which are ours
    group: dist.ProcessGroup | None  # the ranks that share this segment
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
        """Camera (1 + scale, shift), text (K, V), keyboard (K, V): of the context alone."""
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
        time: Tensor,  # (B, T, 6, D) what the noise level of each latent asks for
        shared: Prepared,
        ready: tuple | None,  # from prepare
        answer: int,  # the last so many latents are answered for, the others only heard
    ) -> Tensor:  # (B, answer, S, D)
        camera, text, keyboard = ready or self.prepare(shared)
        last = slice(x.shape[1] - answer, None)
        dtype = self.norm3.weight.dtype  # of the matrix products; x itself may be float32
        time = (self.modulation + time).to(x.dtype)[:, :, :, None]  # (1)
        shift1, scale1, gate1, shift2, scale2, gate2 = time.unbind(2)

        # 1. memory, past and new latents are ONE sequence: all are asked, those that answer ask
        y = self.attend(modulate(x, shift1, scale1).to(dtype), last, shared)
        x = torch.addcmul(x[:, last], y, gate1[:, last])  # (2)

        # 2. where this place looks from and to
        scale, shift = camera
        x = torch.addcmul(shift[:, last], x, scale[:, last])  # (4)

        # 3. what the world is said to be; from here on the normalised tokens ARE the stream
        x = self.replace_stream(x)
        y = attention.attention(self.cross_attn.query(x.to(dtype)), *text)
        x = x + self.cross_attn.o(y.flatten(2)).view_as(x)

        # 4. what the player does
        if self.action_model is not None:
            mouse = shared.mouse[:, last]
            rope = shared.action_rope[last]
            x = self.action_model(x.to(dtype), mouse, keyboard, rope).to(x.dtype)

        # 5. each place for itself
        y = self.ffn(modulate(x, shift2[:, last], scale2[:, last]).to(dtype))
        return torch.addcmul(x, y, gate2[:, last])  # (2)

    def attend(self, a: Tensor, asking: slice, shared: Prepared) -> Tensor:
        """(B, T, S, D) -> (B, answer, S, D): self-attention, for the latents that ask."""
        asked = a[:, asking]
        q = self.self_attn.query(asked)
        k, v = self.self_attn.key_value(a)
        q = attention.rotate(q, shared.rope[:, -q.shape[1] :])
        k = attention.rotate(k, shared.rope)
        if shared.group is None:
            y = attention.attention(q, k, v)
        else:
            y = attention.attention_across(q, k, v, shared.places, shared.group)
        return self.self_attn.o(y.flatten(2)).view_as(asked)

    def replace_stream(self, x: Tensor) -> Tensor:
        weight = self.norm3.weight.to(x.dtype)
        bias = self.norm3.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)
