"""Let every place of the picture follow the mouse and ask which keys are held.

What it does. A module of the early blocks (block.py) that tells the network what the player does.
It changes the tokens twice: once by the mouse, once by the keyboard. Of both, each latent is given
twelve frames: the four that lead to it and the eight before (context.py).
Paper: §3.1 (action conditioning, after Matrix-Game 2).  Released: the same weights, under the
same names.

Why it works. The mouse turns the camera, so every place of the picture changes, each from what it
showed before. The twelve movements, 24 numbers, are put beside every token ([x ; mouse]). An MLP
mixes both, and each place attends to itself at all times. What is added to x is

    hidden = MLP([x ; mouse])                                                                  (1)
    moved  = W₁·attention over time(hidden)                                                    (2)

A held key is one fact for the whole picture, but what it changes differs from place to place: a
step forward makes a near wall larger and leaves the sky as it is. So all places share the keyboard.
The twelve states of a latent's keyboard become one key k and one value v of attention (3), and each
token, by a query of its own, reads those of all latents (4), which is added next:

    k, v = W₂·[embed(keyboard in frame 1), ..., embed(keyboard in frame 12)]                   (3)
    held = W₃·attention(query(x), k, v)                                                        (4)

Queries and keys of both branches are rotated by time, as in attention.py, but by a clock of their
own. It counts the latents of a segment, past and new, from 0, and memory latents, whose actions are
null, from 0 as well. Only some numbers of a head are rotated, 4 of 16 in `tiny` and 8 of 64 in
`5b`: n = 2 or 4 pairs, of which pair j turns per latent by

    ω_j = 256^(−j/n)                                                                           (5)

The output layers W₁ and W₃ start at zero (dit.py). So a video model that is given this module still
makes the same videos, and learns from there to obey.

What differs. Nothing that is computed. As in the release, the weights of the q and k norms are
loaded but not multiplied (DiTConfig.action_norm_weight multiplies them), and mouse_attn_q, despite
its name, makes the query to the KEYBOARD.

Try it: python dit.py      Tests: pytest tests/test_dit.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attention


def clock(memory: int, rest: int, device: torch.device) -> Tensor:
    """(T,) of every latent: memory counts 0 .. memory − 1, past and new 0 .. rest − 1."""
    of_memory = torch.arange(memory, device=device)
    of_segment = torch.arange(rest, device=device)
    return torch.cat([of_memory, of_segment])


def angles(time: Tensor, cfg: object) -> Tensor:
    """(T,) -> (T, 1, head_dim/2), by which pairs are turned. Pairs at rest have 0."""
    base = torch.full((1,), 256.0, dtype=torch.float64, device=time.device)
    omega = attention.frequencies(base, cfg.action_rope // 2)  # (5)
    turned = time[:, None, None] * omega

    head_dim = cfg.action_width // cfg.action_heads
    at_rest = head_dim - cfg.action_rope
    return F.pad(turned, (0, at_rest // 2))


class ActionModule(nn.Module):
    """Both branches. The layers have the released names."""

    def __init__(self, cfg: object):  # dit.DiTConfig
        super().__init__()
        D = cfg.dim
        width = cfg.action_width
        hidden = cfg.action_hidden
        window = cfg.action_window
        self.heads = cfg.action_heads
        self.use_norm_weight = cfg.action_norm_weight

        # the order is that of stored optimiser states
        self.keyboard_embed = nn.Sequential(
            nn.Linear(6, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
        )
        self.mouse_mlp = nn.Sequential(
            nn.Linear(D + 2 * window, width),
            nn.GELU("tanh"),
            nn.Linear(width, width),
            nn.LayerNorm(width),
        )
        self.t_qkv = nn.Linear(width, 3 * width, bias=False)
        head_dim = width // self.heads
        self.img_attn_q_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.img_attn_k_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.key_attn_q_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.key_attn_k_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.proj_mouse = nn.Linear(width, D, bias=False)
        self.mouse_attn_q = nn.Linear(D, width, bias=False)  # the keyboard's query
        self.keyboard_attn_kv = nn.Linear(hidden * window, 2 * width, bias=False)
        self.proj_keyboard = nn.Linear(width, D, bias=False)

    def forward(
        self,
        x: Tensor,  # (B, T, S, D)
        mouse: Tensor,  # (B, T, 24) twelve movements of each latent
        keyboard: tuple[Tensor, Tensor],  # from key_value, of all latents
        rope: Tensor,  # (T, 1, head_dim/2, 2) cosines and sines
    ) -> Tensor:
        x = x + self.follow_mouse(x, mouse, rope)
        return x + self.ask_keyboard(x, keyboard, rope)

    def follow_mouse(self, x: Tensor, mouse: Tensor, rope: Tensor) -> Tensor:
        B, T, S, _ = x.shape
        at_every_place = mouse[:, :, None].expand(-1, -1, S, -1)
        both = torch.cat([x, at_every_place], -1)
        hidden = self.mouse_mlp(both)  # (1)

        # attention over time: every place is a sequence of its own, T long
        qkv = self.t_qkv(hidden).transpose(1, 2)  # (B, S, T, 3·width)
        qkv = qkv.flatten(0, 1)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # (B·S, T, 3, heads, head_dim)
        q, k, v = qkv.unbind(2)
        q = self.turn(q, self.img_attn_q_norm, rope)
        k = self.turn(k, self.img_attn_k_norm, rope)
        y = attention.attention(q, k, v)

        y = y.flatten(2).unflatten(0, (B, S))  # (B, S, T, width)
        return self.proj_mouse(y.transpose(1, 2))  # (2)

    def key_value(self, keyboard: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, 12, 6) -> k and v, (B, T, heads, head_dim) each; they serve all steps of a segment."""
        embedded = self.keyboard_embed(keyboard)
        kv = self.keyboard_attn_kv(embedded.flatten(2))  # (3)
        kv = kv.unflatten(-1, (2, self.heads, -1))
        k, v = kv.unbind(2)
        return self.turn(k, self.key_attn_k_norm, rope), v

    def ask_keyboard(self, x: Tensor, keyboard: tuple[Tensor, Tensor], rope: Tensor) -> Tensor:
        T, S = x.shape[1:3]
        q = self.mouse_attn_q(x)
        q = q.unflatten(-1, (self.heads, -1))  # (B, T, S, heads, head_dim)
        q = self.turn(q, self.key_attn_q_norm, rope[:, None])

        # all tokens are the queries of one sequence, which ask the same T keys
        k, v = keyboard
        y = attention.attention(q.flatten(1, 2), k, v)  # (B, T·S, heads, head_dim)
        y = y.flatten(2).unflatten(1, (T, S))
        return self.proj_keyboard(y)  # (4)

    def turn(self, x: Tensor, norm: nn.RMSNorm, rope: Tensor) -> Tensor:
        """A query or key, normalised and rotated by its time."""
        weight = norm.weight if self.use_norm_weight else None
        return attention.rotate(attention.rms(x, weight), rope)
