"""The same network as one would first write it down: nothing kept, nothing skipped.

Every step embeds all latents, cameras and words anew; every token is told its noise level by rows
of its own; every block, and the head, answers for all tokens, though only the new ones are read. So
do the released modules. The weights are those of a dit.DiT, which must give the same velocities.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import attention
from block import Block
from context import Context
from dit import DiT, linear32, unpatchify


def velocity(model: DiT, x_sigma: Tensor, sigma: Tensor, context: Context) -> Tensor:
    """What model(x_sigma, sigma, context) is."""
    new = x_sigma.shape[2]
    shared = model.encode_context(context)
    noisy = model.embed(x_sigma, shared.here)
    x = torch.cat([shared.clean, noisy], 1)  # (B, T, S, D)
    T, S = x.shape[1:3]
    if model.cfg.rays_at_input:
        x = x + shared.rays
    if model.cfg.fp32_stream:
        x = x.float()

    # clean latents are at t = 0; every token asks for itself
    levels = sigma.new_zeros(len(sigma), T, S)
    levels[:, -new:] = sigma[:, None, None]
    levels = levels.flatten(1)  # (B, T·S)
    e, rows = model.embed_time(levels.flatten())
    e = e[:, 1].unflatten(0, levels.shape)
    rows = rows[:, 1].unflatten(0, levels.shape)

    for block in model.blocks:
        x = answer(block, x, rows, shared)

    # tokens to cells, and only now what nobody reads is left out
    time = model.head.modulation + e[:, :, None]
    shift, scale = time.unbind(2)
    x = modulated(x.flatten(1, 2).float(), shift, scale)
    y = linear32(model.head.head, x)
    y = y.unflatten(1, (T, S))  # (B, T, S, 4·C)
    h, w = context.past.shape[-2:]
    velocities = unpatchify(y, h, w, model.cfg.patch)
    return velocities[:, :, -new:]


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normal * (1 + scale) + shift


def answer(block: Block, x: Tensor, rows: Tensor, shared: object) -> Tensor:
    """A block for all tokens, (B, T, S, D) -> (B, T, S, D), with rows (B, T·S, 6, D) of time."""
    latents = x.shape[1:3]
    dtype = block.norm3.weight.dtype
    own = block.self_attn
    camera, text, keyboard = block.prepare(shared)
    x = x.flatten(1, 2)  # (B, L, D)
    time = (block.modulation[:, None] + rows).to(x.dtype)
    shift1, scale1, gate1, shift2, scale2, gate2 = time.unbind(2)

    # 1. all ask all
    a = modulated(x, shift1, scale1).to(dtype)
    q = own.query(a)
    k, v = own.key_value(a)
    q = attention.rotate(q, shared.rope)
    k = attention.rotate(k, shared.rope)
    y = attention.attention(q, k, v)
    x = x + gate1 * own.o(y.flatten(2))

    # 2. cameras, and 3. words
    scale, shift = camera
    x = x * scale.flatten(1, 2)
    x = block.replace_stream(x + shift.flatten(1, 2))
    q = block.cross_attn.query(x.to(dtype))
    y = attention.attention(q, *text)
    x = x + block.cross_attn.o(y.flatten(2))

    # 4. actions, which look along time at every place, and 5. thinking
    if block.action_model is not None:
        whole = x.unflatten(1, latents).to(dtype)
        moved = block.action_model(whole, shared.mouse, keyboard, shared.action_rope)
        x = moved.flatten(1, 2).to(x.dtype)
    y = modulated(x, shift2, scale2)
    y = block.ffn(y.to(dtype))
    x = x + gate2 * y
    return x.unflatten(1, latents)
