"""Let every place of the picture follow the mouse and ask which keys are held.

What it does. One module, in the early blocks of the network, with two branches that add to the
tokens.
Paper: §3.1 (action conditioning, after Matrix-Game 2).  Released: the same weights, under the
same names.

Why it works. The mouse turns the camera, so it moves EVERY place of the picture, each in its own
way and with what it showed a moment ago. Its twelve frames of movement (context.py) join every
token, and each place then attends to itself over time:

    hidden = MLP([x ; mouse])                                                                  (1)
    x      = x + W·attention over time(hidden)                                                 (2)

A key is the same fact for the whole picture, but means something else to a wall than to a hand.
So the keys of all latents become keys and values of attention, once for a clip, and every place
asks them:

    k, v = W·[embed(keys of frame 1), ..., embed(keys of frame 12)]                            (3)
    x    = x + W·attention(query of the place, k, v)                                           (4)

Both branches tell time by a clock of their own, which counts latents within the segment and
restarts after the memory, whose slots hold null actions. Few channels rotate:

    ω_j = 256^(−j/n)                                                                           (5)

Both output layers start at zero: a video model that is given this module still makes the same
videos, and learns to obey from there.

What differs. Nothing that is computed. As released, the q/k norm weights are loaded and not
multiplied (DiTConfig.action_norm_weight multiplies them), and mouse_attn_q asks the KEYBOARD,
despite its name.

Try it: python dit.py      Tests: pytest tests/test_dit.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attention


def clock(memory: int, rest: int, cfg: object, device: torch.device) -> Tensor:
    """(T, 1, head_dim/2) angles of 0 .. memory − 1, then of 0 .. rest − 1."""
    remembered = torch.arange(memory, device=device)
    played = torch.arange(rest, device=device)
    time = torch.cat([remembered, played])[:, None, None]

    base = torch.tensor([256.0], dtype=torch.float64, device=device)
    omega = attention.frequencies(base, cfg.action_rope // 2)  # (5)
    head_dim = cfg.action_width // cfg.action_heads
    still = head_dim - cfg.action_rope
    return F.pad(time * omega, (0, still // 2))


class ActionModule(nn.Module):
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
        self.mouse_attn_q = nn.Linear(D, width, bias=False)  # asks the keyboard
        self.keyboard_attn_kv = nn.Linear(hidden * window, 2 * width, bias=False)
        self.proj_keyboard = nn.Linear(width, D, bias=False)

    def forward(
        self,
        x: Tensor,  # (B, T, S, D)
        mouse: Tensor,  # (B, T, 24)
        keyboard: tuple[Tensor, Tensor],  # from key_value, of all latents
        rope: Tensor,  # (T, 1, head_dim/2, 2) cosines and sines
    ) -> Tensor:
        x = x + self.follow_mouse(x, mouse, rope)
        return x + self.ask_keyboard(x, keyboard, rope)

    def follow_mouse(self, x: Tensor, mouse: Tensor, rope: Tensor) -> Tensor:
        B, T, S, _ = x.shape
        mouse = mouse[:, :, None].expand(-1, -1, S, -1)  # at every place
        hidden = torch.cat([x, mouse], -1)
        hidden = self.mouse_mlp(hidden)  # (1)

        # a batch of places: each attends to itself over time
        qkv = self.t_qkv(hidden).transpose(1, 2)
        qkv = qkv.flatten(0, 1).unflatten(-1, (3, self.heads, -1))  # (B·S, T, 3, heads, head_dim)
        q, k, v = qkv.unbind(2)
        q = self.turn(q, self.img_attn_q_norm, rope)
        k = self.turn(k, self.img_attn_k_norm, rope)
        y = attention.attention(q, k, v)

        y = y.flatten(2).unflatten(0, (B, S))  # (B, S, T, width)
        return self.proj_mouse(y.transpose(1, 2))  # (2)

    def key_value(self, keyboard: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, 12, 6) -> (B, T, heads, head_dim) twice, once for a segment."""
        windows = self.keyboard_embed(keyboard)
        windows = windows.flatten(2)  # (B, T, 12·hidden)
        kv = self.keyboard_attn_kv(windows)  # (3)
        kv = kv.unflatten(-1, (2, self.heads, -1))
        k, v = kv.unbind(2)
        return self.turn(k, self.key_attn_k_norm, rope), v

    def ask_keyboard(self, x: Tensor, keyboard: tuple[Tensor, Tensor], rope: Tensor) -> Tensor:
        T, S = x.shape[1:3]
        q = self.mouse_attn_q(x)
        q = q.unflatten(-1, (self.heads, -1))  # (B, T, S, heads, head_dim)
        q = self.turn(q, self.key_attn_q_norm, rope[:, None])
        k, v = keyboard
        y = attention.attention(q.flatten(1, 2), k, v)
        y = y.flatten(2).unflatten(1, (T, S))
        return self.proj_keyboard(y)  # (4)

    def turn(self, x: Tensor, norm: nn.RMSNorm, rope: Tensor) -> Tensor:
        weight = norm.weight if self.use_norm_weight else None
        return attention.rotate(attention.rms(x, weight), rope)
