"""The layers of the VAE: each remembers the frames it will need again, and none looks ahead.

What it does. Convolutions over time that remember frames, the norm before them, residual blocks,
attention inside a frame, the two ways to change resolution, and shortcuts around stages. vae.py stacks
them. Paper: §3.4.  Released: the modules of Wan2.2_VAE.pth, whose parameter names these carry.

Why it works. Causal means: a frame depends on itself and on the past. So a convolution over three
frames reads the present one and the two before it:

    y[t] = W0·x[t−2] + W1·x[t−1] + W2·x[t]                                                       (1)

The output of a chunk then needs two frames from before the chunk. They are kept from the last call,
and put in front of the new ones:

    padded = [kept | x],      kept' = the last two frames of padded                              (2)

Before a video begins, kept is zeros. However long the chunks are, (1) sees for every t the same
three frames as in one long pass.

Norm. The C channels of every pixel are divided by their root mean square, then each channel is
multiplied by a number γ that is learnt:

    y = x / rms,  rms = √(mean_C x² + 1e-6),  n = γ·y                                            (3)

rms depends on every channel, so each y_i depends on every x_j:
∂y_i/∂x_j = (δ_ij − y_i·y_j/C) / rms, where δ_ij is 1 for i = j and else 0. With g = ∂L/∂n, the
gradient of the loss behind the norm, that before it is

    ∂L/∂x = (γ·g − y·mean_C(γ·g·y)) / rms                                                        (4)

It is written out below: so training saves x and one number per pixel, 1/rms, and computes the rest
again. PyTorch would have saved the outcome of every step in between.

Halving and doubling time. The first frame is never paired. Down is a convolution over windows of
three frames, two apart, so that each begins with the last frame of the window before. Up makes two
frames of each; of the first it drops one, since there was only one:

    frames     0   1 2   3 4           Down(x)[k] = Σ_j W_j·x[2k−2+j],  Down(x)[0] = x[0]        (5)
    Down       0   1     2
    Up         0   1 2   3 4           Up(x)[2t−1], Up(x)[2t] = the two halves of conv(x)[t]     (6)

Around each stage, its residual blocks and Down or Up, leads a shortcut that has no weights, and is
added to the outcome. On the way down it takes the mean of neighbours in time, space and channels
(avg_down); on the way up it repeats every value, as often as the new shape is larger (dup_up).

What differs. Every number is computed as released, up to rounding, in another order: tensors are
channels-last; on a CPU (1) runs as a 2-D convolution, which was 2 to 7 times faster there; and (3),
SiLU and (2) write their result once.
Try it: python vae.py      Tests: pytest tests/test_vae.py
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# what a decoder or encoder remembers: slot of a causal layer -> the last frames that it read,
# (B, C, n, H, W), n = 2, or 1 in Down
State = dict[int, Tensor]


# ---- other orders of the same numbers, means and copies of them --------------------------------------------


def frames_as_batch(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B·T, C, H, W), channels last in memory."""
    return x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)


def batch_as_frames(x: Tensor, batch: int) -> Tensor:
    """(B·T, C, H, W) -> (B, C, T, H, W), without a copy."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def patchify(video: Tensor, p: int) -> Tensor:
    """Fold squares of p x p pixels into channels: (B, 3, F, H, W) -> (B, 3·p·p, F, H/p, W/p).

    Channel (c·p + column)·p + row: the column counts before the row, as released. For p = 2:

        pixels of a square   0 2        channels of colour c   4c, 4c + 1, 4c + 2, 4c + 3
                             1 3
    """
    x = video.unflatten(4, (-1, p))  # b c f H w column
    x = x.unflatten(3, (-1, p))  # b c f h row w column
    x = x.permute(0, 2, 3, 5, 1, 6, 4)  # b f h w c column row
    x = x.flatten(4)
    return x.movedim(-1, 1)  # channels last in memory from here on


def unpatchify(x: Tensor, p: int) -> Tensor:
    """The way back: (B, 3·p·p, F, h, w) -> (B, 3, F, h·p, w·p)."""
    x = x.unflatten(1, (-1, p, p))  # b c column row f h w
    x = x.permute(0, 1, 4, 5, 3, 6, 2)  # b c f h row w column
    x = x.flatten(5)
    return x.flatten(3, 4)


def avg_down(x: Tensor, out: int, time: int, space: int) -> Tensor:
    """Means over `time` frames, space x space pixels and neighbouring channels.

    (B, C, T, H, W) -> (B, out, ⌈T/time⌉, H/space, W/space)
    """
    if space > 1:  # first: a mean over channels never splits a square
        small = F.avg_pool2d(frames_as_batch(x), space)
        x = batch_as_frames(small, x.shape[0])

    # the first frame is alone: zero frames in front of it make its group full, as released
    missing = -x.shape[2] % time
    x = F.pad(x, (0, 0, 0, 0, missing, 0))
    x = x.movedim(1, -1)
    x = x.unflatten(1, (-1, time))  # (B, T/time, time, h, w, C)
    x = x.movedim(2, -1)  # (B, T/time, h, w, C, time): a group is consecutive
    x = x.flatten(4)
    x = x.unflatten(4, (out, -1))
    return x.mean(-1).movedim(-1, 1)


def dup_up_plain(x: Tensor, out: int, time: int, space: int) -> Tensor:
    """Repeat channels, then lay the copies out in time and space: the form to read.

    (B, C, T, H, W) -> (B, out, time·T, space·H, space·W)
    """
    copies = out * time * space * space // x.shape[1]
    x = x.repeat_interleave(copies, dim=1)
    x = x.unflatten(1, (out, time, space, space))
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # B out T time H space W space
    x = x.flatten(6)
    x = x.flatten(4, 5)
    return x.flatten(2, 3)


def dup_up(x: Tensor, out: int, time: int, space: int, first: bool) -> Tensor:
    """dup_up_plain, of whose frames the first chunk has time·T − (time − 1) alone."""
    surplus = time - 1 if first else 0
    if out != x.shape[1]:
        x = dup_up_plain(x, out, time, space)
        return x[:, :, surplus:]

    # as many channels as before: every copy stays in its channel, and can be made without permuting
    x = x.movedim(1, -1)
    x = x.repeat_interleave(time, dim=1)
    x = x.movedim(-1, 1)
    x = x[:, :, surplus:]
    return enlarge(x, space)


def enlarge(x: Tensor, times: int) -> Tensor:
    """Every pixel becomes a square of equal ones."""
    frames = frames_as_batch(x)
    frames = F.interpolate(frames, scale_factor=times, mode="nearest")
    return batch_as_frames(frames, x.shape[0])


# ---- memory, norm, convolution -----------------------------------------------------------------------------


class Stream:
    """What the layers remember during one chunk: `past` came from the last, `next` is for the next."""

    def __init__(self, state: State | None = None):
        self.past = state or {}
        self.next: State = {}
        self.first = not state  # is this the chunk that a video begins with?

    def front(self, slot: int, x: Tensor, frames: int) -> Tensor:
        """The frames before x (B, C, T, H, W): -> (B, C, frames, H, W), zeros if there are none."""
        if slot in self.past:
            return self.past[slot]
        B, C, _, H, W = x.shape
        return x.new_zeros(B, frames, H, W, C).movedim(-1, 1)

    def keep(self, slot: int, x: Tensor, frames: int) -> None:
        """Remember the last frames of x."""
        tail = x[:, :, -frames:].detach()
        # a copy: a view of them would keep the whole chunk in memory. Training does so anyway
        if not torch.is_grad_enabled():
            tail = tail.clone(memory_format=torch.channels_last_3d)
        self.next[slot] = tail


class NormSiLU(torch.autograd.Function):
    """[past | silu(γ·x / rms)]: (B, C, T, H, W) -> (B, C, 2+T, H, W).

    The same as three lines of PyTorch (export.plain_norm_silu), with fewer copies and the gradient
    (4). SiLU is x·sigmoid(x).
    """

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, past: Tensor) -> Tensor:
        B, C, T, H, W = x.shape
        before = past.shape[2]
        gamma = gamma.to(x.dtype)

        # summed in float32, but rounded to x's dtype; from here on changed in place
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).float()
        mean_square = length.square_().mul_(1 / C)
        inv_rms = mean_square.add_(1e-6).rsqrt_().to(x.dtype)  # (B, 1, T, H, W)

        padded = x.new_empty(B, before + T, H, W, C).movedim(-1, 1)
        padded[:, :, :before] = past  # (2)
        n = padded[:, :, before:]
        torch.mul(x, inv_rms, out=n)
        n.mul_(gamma)  # (3)
        F.silu(n, inplace=True)
        ctx.save_for_backward(x, inv_rms, gamma)
        return padded

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, inv_rms, gamma = ctx.saved_tensors
        y = x * inv_rms
        C, T = x.shape[1:3]
        grad = grad[:, :, -T:]  # the frames kept from before are given, not learnt
        g = torch.ops.aten.silu_backward(grad, y * gamma)

        # n = γ·y, one γ for all places
        gy = g * y
        d_gamma = gy.sum((0, 2, 3, 4)).reshape(gamma.shape)

        # in place: y and g are of no further use
        mean = gy.movedim(1, -1) @ (gamma.flatten() / C)  # of γ·g·y, over channels
        shared = y.mul_(mean.unsqueeze(1))
        d_x = g.mul_(gamma).sub_(shared).mul_(inv_rms)  # (4)
        return d_x, d_gamma, None


norm_silu = NormSiLU.apply


def conv3d_as_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C, 2+T, H, W) -> (B, out, T, H, W): the three frames of (1) stacked as 3·C channels."""
    frames = x.shape[2] - 2
    taps = [x[:, :, k : k + frames] for k in range(3)]
    taps = torch.cat(taps, 1)  # (B, 3·C, T, H, W)
    kernel = weight.transpose(1, 2).flatten(1, 2)  # (out, 3·C, 3, 3)
    y = F.conv2d(frames_as_batch(taps), kernel, bias, padding=1)
    return batch_as_frames(y, x.shape[0])


class CausalConv3d(nn.Conv3d):
    """y[t] depends on x[t−2], x[t−1], x[t]: zeros around it in space, past frames in time."""

    slot = -1  # its key in the state of a stream, set by the VAE

    def forward(
        self,
        x: Tensor,  # (B, C, T, H, W)
        stream: Stream,
        gamma: Tensor | None = None,  # given: norm and SiLU come before the convolution
    ) -> Tensor:  # (B, out, T, H, W)
        remembered = self.kernel_size[0] - 1
        if remembered:
            past = stream.front(self.slot, x, remembered)
            if gamma is None:
                x = torch.cat([past, x], 2)  # (2)
            else:
                x = norm_silu(x, gamma, past)
            stream.keep(self.slot, x, remembered)

        # two forms of the same sum; the second is faster on CPUs in float32 alone
        on_cpu = x.is_cpu and x.dtype == self.weight.dtype == torch.float32
        if on_cpu and self.kernel_size == (3, 3, 3):
            return conv3d_as_conv2d(x, self.weight, self.bias)
        around = (0, *self.padding[1:])  # none in time: the past is there already
        return F.conv3d(x, self.weight, self.bias, padding=around)  # (1)


def causal3(dim: int, out: int) -> CausalConv3d:
    return CausalConv3d(dim, out, 3, padding=1)


def rms_gain(dim: int, axes: int) -> nn.ParameterDict:
    """γ of an RMS norm, under its released name."""
    ones = [1] * axes
    return nn.ParameterDict({"gamma": torch.ones(dim, *ones)})


# ---- blocks ------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """x + conv(silu n(conv(silu n(x)))), with a 1x1x1 convolution of x where the width changes."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        # under the released indices; 1 and 4 were SiLU, 5 a dropout of 0
        layers = {
            "0": rms_gain(dim, 3),
            "2": causal3(dim, out),
            "3": rms_gain(out, 3),
            "6": causal3(out, out),
        }
        self.residual = nn.ModuleDict(layers)
        # starts as its shortcut alone, which gave 1 dB more after a minute of training
        nn.init.zeros_(self.residual["6"].weight)
        self.shortcut = CausalConv3d(dim, out, 1) if dim != out else None

    def forward(
        self,
        x: Tensor,  # (B, dim, T, H, W)
        stream: Stream,
    ) -> Tensor:  # (B, out, T, H, W)
        layer = self.residual
        h = layer["2"](x, stream, layer["0"].gamma)
        h = layer["6"](h, stream, layer["3"].gamma)
        if self.shortcut is not None:
            x = self.shortcut(x, stream)
        return h + x


def per_pixel(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution is a linear layer on channels: (..., C) -> (..., out)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class Attention(nn.Module):
    """One head over the h·w places of each frame; no frame sees another one."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = rms_gain(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)  # starts as the identity

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # (B, C, T, H, W) -> same
        frames = x.movedim(1, -1).flatten(0, 1)  # (B·T, H, W, C)
        mean_square = frames.float().square().mean(-1, keepdim=True)
        inv_rms = torch.rsqrt(mean_square + 1e-6).to(frames.dtype)
        gamma = self.norm.gamma.flatten().to(frames.dtype)
        n = frames * inv_rms * gamma  # (3)

        places = n.flatten(1, 2)  # (B·T, H·W, C)
        q, k, v = per_pixel(self.to_qkv, places).chunk(3, -1)
        scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
        mixed = torch.softmax(scores, -1).to(v.dtype) @ v

        y = per_pixel(self.proj, mixed).reshape(frames.shape)
        return x + batch_as_frames(y.movedim(-1, 1), x.shape[0])


class Down(nn.Module):
    """Halve space by a strided convolution, then (if temporal) time; the first frame stays alone."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, stride=2)})
        self.time_conv = None
        if temporal:
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # -> (B, C, T|⌈T/2⌉, H/2, W/2)
        padded = F.pad(frames_as_batch(x), (0, 1, 0, 1))  # right and below, as released
        y = batch_as_frames(self.resample["1"](padded), x.shape[0])
        if self.time_conv is None:
            return y

        # the next window begins with the last frame of this chunk: that one is remembered
        slot = self.time_conv.slot
        stream.keep(slot, y, 1)
        if stream.first:
            alone = y[:, :, :1]
            return torch.cat([alone, self.halve(y)], 2)
        return self.halve(torch.cat([stream.past[slot], y], 2))

    def halve(self, seen: Tensor) -> Tensor:
        """Windows (0, 1, 2), (2, 3, 4), ... of the frames seen; none if there are too few."""
        if seen.shape[2] < 3:
            return seen[:, :, :0]
        conv = self.time_conv
        return F.conv3d(seen, conv.weight, conv.bias, stride=conv.stride)  # (5)


class Up(nn.Module):
    """Double time (if temporal) by a convolution with two outputs per frame, then space."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, padding=1)})
        self.time_conv = None
        if temporal:
            self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # -> (B, C, T|2T|2T−1, 2H, 2W)
        if self.time_conv is not None:
            halves = self.time_conv(x, stream).unflatten(1, (2, -1))  # (B, 2, C, T, H, W)
            pairs = halves.permute(0, 3, 1, 4, 5, 2)  # (B, T, 2, H, W, C)
            x = pairs.flatten(1, 2).movedim(-1, 1)  # (B, C, 2·T, H, W)
            surplus = 1 if stream.first else 0
            x = x[:, :, surplus:]  # (6)
        large = frames_as_batch(enlarge(x, 2))
        return batch_as_frames(self.resample["1"](large), x.shape[0])


def residual_blocks(dim: int, out: int, count: int) -> list[nn.Module]:
    """The first of them changes the width."""
    widths = [dim] + [out] * (count - 1)
    return [ResidualBlock(width, out) for width in widths]


class EncoderStage(nn.Module):
    """Residual blocks and Down, and means of the input around them. temporal None: no Down."""

    def __init__(self, dim: int, out: int, blocks: int, temporal: bool | None):
        super().__init__()
        self.out = out
        self.time = 2 if temporal else 1
        self.space = 1 if temporal is None else 2

        layers = residual_blocks(dim, out, blocks)
        if temporal is not None:
            layers.append(Down(out, temporal))
        self.downsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        shortcut = avg_down(x, self.out, self.time, self.space)
        for layer in self.downsamples:
            x = layer(x, stream)
        return x + shortcut


class DecoderStage(nn.Module):
    """Residual blocks and Up, and copies of the input around them. temporal None: the blocks alone."""

    def __init__(self, dim: int, out: int, blocks: int, temporal: bool | None):
        super().__init__()
        self.out = out
        self.time = 2 if temporal else 1
        self.grows = temporal is not None

        layers = residual_blocks(dim, out, blocks)
        if self.grows:
            layers.append(Up(out, temporal))
        self.upsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        shortcut = None
        if self.grows:
            shortcut = dup_up(x, self.out, self.time, 2, stream.first)
        for layer in self.upsamples:
            x = layer(x, stream)
        return x if shortcut is None else x + shortcut
