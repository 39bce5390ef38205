"""Turn frames into latents and back, one chunk at a time, with a thinner decoder for speed.

Paper: §3.4 (MG-LightVAE), Table 2.  Released: Wan2.2_VAE.pth and MG-LightVAE.pth; their training code is not.

A latent holds 4 frames, the first only one: F = 1 + 4·(T−1).  Nothing looks into the future:
    y[t] = Σ_k W_k · x[t−2+k],  k = 0, 1, 2      causal convolution; before the first frame x = 0
    n(x) = γ · x / √(mean_C x² + 1e-6)           RMS norm over channels, in the running dtype
    R(x) = x + conv(silu n(conv(silu n(x))))     residual block
    E    = AvgDown(x) + down(R(R(x)))            encoder stage: AvgDown takes means of pixels and channels
    D    = DupUp(x) + up(R(R(R(x))))             decoder stage: DupUp repeats them
    z    = (mu − mean) / std                     what the DiT sees: about unit variance

Streaming. A causal convolution needs the last 2 input frames of the chunk before and nothing else. `state` maps
layer -> those frames; with it, any chunking of the latents gives the frames of one whole decode. First chunk (as
released, unlike Wan2.2): temporal upsampling doubles every frame, then the very first is dropped.

Pruning (MG-LightVAE): width × (1 − rate) in every decoder layer. The full encoder stays, so latents do not change;
a pruned decoder learns to read them (`light_loss`): L1 to the true frames, and its features after the middle block
and the first up block, seen through small projection heads, must match the full decoder's.

Departures. (1) `tiny` is this structure with other numbers: stride 4×8×8, 16 channels, one residual block less per
stage (shallower learnt faster per second). (2) Tensors are channels-last; norm, SiLU and padding are one function
with its own gradient. (3) No pretrained perceptual network: where the literature uses LPIPS we compare gradients at
three scales (`structure`): no download, and blur costs too. (4) No KL: `LatentNorm` whitens the latent, a little
noise smooths it. (5) The released student also narrows its encoder and never uses it; ours has none.
Demo: python vae.py      Tests: pytest tests/test_vae.py
"""

import time
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

State = dict[int, Tensor]  # slot of a causal layer -> (B, C, 1|2, H, W): the last frames it read


@dataclass(frozen=True)
class VAEConfig:
    dim: int = 24  # encoder width at full resolution; 0 = no encoder, as in a pruned decoder
    dec_dim: int = 32  # decoder width at full resolution
    z_dim: int = 16  # latent channels
    dim_mult: tuple[int, ...] = (1, 2, 2)  # width of each resolution, full to low
    temporal: tuple[bool, ...] = (
        True,
        True,
    )  # does this halving of space halve time too? full to low
    res_blocks: int = 1  # per encoder stage; the decoder has one more
    patch: int = 2  # pixels folded into channels before anything else
    mean: tuple[float, ...] = ()  # of mu, per channel; empty = 0
    std: tuple[float, ...] = ()  # of mu, per channel; empty = 1

    @property
    def stride(self) -> tuple[int, int, int]:  # frames, rows, columns per latent
        space = self.patch * 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temporal), space, space


WAN_MEAN = (
    -0.2289,
    -0.0052,
    -0.1323,
    -0.2339,
    -0.2799,
    0.0174,
    0.1838,
    0.1557,
    -0.1382,
    0.0542,
    0.2813,
    0.0891,
    0.1570,
    -0.0098,
    0.0375,
    -0.1825,
    -0.2246,
    -0.1207,
    -0.0698,
    0.5109,
    0.2665,
    -0.2108,
    -0.2158,
    0.2502,
    -0.2055,
    -0.0322,
    0.1109,
    0.1567,
    -0.0729,
    0.0899,
    -0.2799,
    -0.1230,
    -0.0313,
    -0.1649,
    0.0117,
    0.0723,
    -0.2839,
    -0.2083,
    -0.0520,
    0.3748,
    0.0152,
    0.1957,
    0.1433,
    -0.2944,
    0.3573,
    -0.0548,
    -0.1681,
    -0.0667,
)
WAN_STD = (
    0.4765,
    1.0364,
    0.4514,
    1.1677,
    0.5313,
    0.4990,
    0.4818,
    0.5013,
    0.8158,
    1.0344,
    0.5894,
    1.0901,
    0.6885,
    0.6165,
    0.8454,
    0.4978,
    0.5759,
    0.3523,
    0.7135,
    0.6804,
    0.5833,
    1.4146,
    0.8986,
    0.5659,
    0.7069,
    0.5338,
    0.4889,
    0.4917,
    0.4069,
    0.4999,
    0.6866,
    0.4093,
    0.5709,
    0.6065,
    0.6415,
    0.4944,
    0.5726,
    1.2042,
    0.5458,
    1.6887,
    0.3971,
    1.0600,
    0.3943,
    0.5537,
    0.5444,
    0.4089,
    0.7468,
    0.7744,
)
RELEASED = dict(z_dim=48, dim_mult=(1, 2, 4, 4), temporal=(False, True, True), res_blocks=2)
PRESETS = {
    "micro": VAEConfig(dim=8, dec_dim=8),
    "tiny": VAEConfig(),
    "small": VAEConfig(dim=24, dec_dim=32, **RELEASED | {"res_blocks": 1}),
    "wan2.2": VAEConfig(dim=160, dec_dim=256, mean=WAN_MEAN, std=WAN_STD, **RELEASED),
}


def pruned(cfg: VAEConfig, rate: float, encoder: bool = False) -> VAEConfig:
    """The config of a decoder (released files: also of an encoder) with (1 − rate) of the channels."""
    if not 0 <= rate < 1:
        raise ValueError(
            f"pruning rate must be in [0, 1), got {rate}; the published ones are 0.5 and 0.75"
        )
    return replace(
        cfg,
        dec_dim=max(1, round(cfg.dec_dim * (1 - rate))),
        dim=max(1, round(cfg.dim * (1 - rate))) if encoder else 0,
    )


# ----------------------------------------------------------------------------------------------- pure maths


def patchify(video: Tensor, p: int) -> Tensor:  # (B, 3, F, H, W) -> (B, 3·p·p, F, H/p, W/p)
    B, C, T, H, W = video.shape
    x = video.reshape(B, C, T, H // p, p, W // p, p)  # b c f h q w r
    x = x.permute(0, 2, 3, 5, 1, 6, 4).reshape(
        B, T, H // p, W // p, -1
    )  # channel = (c, column r, row q)
    return x.permute(0, 4, 1, 2, 3)  # channels-last in memory from here on


def unpatchify(x: Tensor, p: int) -> Tensor:  # (B, 3·p·p, F, h, w) -> (B, 3, F, h·p, w·p)
    B, C, T, h, w = x.shape
    x = x.reshape(B, C // (p * p), p, p, T, h, w)  # b c r q f h w
    return x.permute(0, 1, 4, 5, 3, 6, 2).reshape(B, C // (p * p), T, h * p, w * p)


def frames_as_batch(x: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B·T, C, H, W), channels last
    return x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


def batch_as_frames(x: Tensor, B: int) -> Tensor:  # (B·T, C, H, W) -> (B, C, T, H, W), no copy
    return x.unflatten(0, (B, -1)).transpose(1, 2)


def avg_down(
    x: Tensor, out: int, ft: int, fs: int
) -> Tensor:  # (B, C, T, H, W) -> (B, out, ⌈T/ft⌉, …)
    if fs > 1:  # a group always holds whole fs × fs squares
        x = batch_as_frames(F.avg_pool2d(frames_as_batch(x), fs), x.shape[0])
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % ft, 0)).permute(0, 2, 3, 4, 1)  # zero frames in FRONT
    x = x.unflatten(1, (-1, ft)).permute(0, 1, 3, 4, 5, 2)  # B T h w C ft
    return x.reshape(*x.shape[:4], out, -1).mean(-1).permute(0, 4, 1, 2, 3)


def dup_up_plain(x: Tensor, out: int, ft: int, fs: int) -> Tensor:  # the form to read
    B, C, T, H, W = x.shape
    x = x.repeat_interleave(out * ft * fs * fs // C, dim=1).reshape(B, out, ft, fs, fs, T, H, W)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, out, T * ft, H * fs, W * fs)


def dup_up(
    x: Tensor, out: int, ft: int, fs: int, first: bool
) -> Tensor:  # -> (B, out, ft·T, fs·H, fs·W)
    if out == x.shape[1]:  # repeats stay in their channel: nearest ×
        x = (
            x.permute(0, 2, 3, 4, 1).repeat_interleave(ft, dim=1).permute(0, 4, 1, 2, 3)
        )  # stays channels-last
        x = x[:, :, ft - 1 if first else 0 :]
        return batch_as_frames(
            F.interpolate(frames_as_batch(x), scale_factor=fs, mode="nearest"), x.shape[0]
        )
    return dup_up_plain(x, out, ft, fs)[
        :, :, ft - 1 if first else 0 :
    ]  # first chunk: ft·T − (ft−1) frames


class NormSiLU(torch.autograd.Function):
    """cat(past, silu(γ·x / √(mean x² + 1e-6))): (B, C, T, H, W) -> (B, C, 2+T, H, W), written straight into the padded
    tensor and keeping only x: fewer passes over memory."""

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, past: Tensor) -> Tensor:
        B, C, T, H, W = x.shape
        P, gamma = past.shape[2], gamma.to(x.dtype)
        r = torch.linalg.vector_norm(
            x, dim=1, keepdim=True
        ).float()  # summed in float32 whatever x is
        r = r.square_().mul_(1 / C).add_(1e-6).rsqrt_().to(x.dtype)
        out = x.new_empty(B, P + T, H, W, C).permute(0, 4, 1, 2, 3)
        out[:, :, :P] = past
        F.silu(torch.mul(x, r, out=out[:, :, P:]).mul_(gamma), inplace=True)
        ctx.save_for_backward(x, r, gamma)
        return out

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x, r, gamma = ctx.saved_tensors
        y = x * r  # y = x / rms
        g = torch.ops.aten.silu_backward(g[:, :, -x.shape[2] :], y * gamma)
        gy = g * y
        d_gamma = gy.sum((0, 2, 3, 4)).reshape(gamma.shape)
        m = (gy.permute(0, 2, 3, 4, 1) @ (gamma.flatten() / x.shape[1])).unsqueeze(1)
        return (
            g.mul_(gamma).sub_(y.mul_(m)).mul_(r),
            d_gamma,
            None,
        )  # dx = (γg − y·mean(γg·y)) / rms


norm_silu = NormSiLU.apply

# -------------------------------------------------------------------------------------------- small modules


class Stream:
    """Carries the remembered frames through one chunk: reads the old ones, collects the new ones."""

    def __init__(self, state: State | None = None):
        self.past, self.next, self.first = state or {}, {}, not state

    def front(self, slot: int, x: Tensor, n: int, channels: int) -> Tensor:  # the n frames before x
        zeros = x.new_zeros(x.shape[0], n, *x.shape[3:], channels).permute(0, 4, 1, 2, 3)
        return self.past.get(slot, zeros)

    def keep(
        self, slot: int, x: Tensor, n: int
    ) -> None:  # copied: a view would keep the whole chunk alive,
        tail = x[:, :, -n:].detach()  # as training does anyway
        self.next[slot] = (
            tail if torch.is_grad_enabled() else tail.clone(memory_format=torch.channels_last_3d)
        )


def conv3d_as_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:  # (B, C, 2+T, …) -> (B, out, T, …)
    taps = torch.cat(
        [x[:, :, k : x.shape[2] - 2 + k] for k in range(3)], 1
    )  # three frames stacked as channels
    y = F.conv2d(frames_as_batch(taps), weight.transpose(1, 2).flatten(1, 2), bias, padding=1)
    return batch_as_frames(y, x.shape[0])


class CausalConv3d(nn.Conv3d):
    """y[t] depends on x[t−2], x[t−1], x[t]: zeros in space, past frames (zeros at the start) in time."""

    slot = -1  # its key in the stream state, set by the VAE

    def forward(
        self, x: Tensor, stream: Stream, gamma: Tensor | None = None
    ) -> Tensor:  # γ: conv(silu n(x))
        n = self.kernel_size[0] - 1
        if n:
            past = stream.front(self.slot, x, n, self.in_channels)
            x = torch.cat([past, x], 2) if gamma is None else norm_silu(x, gamma, past)
            stream.keep(self.slot, x, n)
        if (
            self.kernel_size == (3, 3, 3)
            and x.is_cpu
            and x.dtype == self.weight.dtype == torch.float32
        ):
            return conv3d_as_conv2d(x, self.weight, self.bias)  # only there: up to 7 times faster
        return F.conv3d(x, self.weight, self.bias, padding=(0, *self.padding[1:]))


def rms_gain(dim: int, axes: int) -> nn.ParameterDict:  # γ of an RMS norm, under its released name
    return nn.ParameterDict({"gamma": torch.ones(dim, *[1] * axes)})


class ResidualBlock(nn.Module):
    def __init__(self, dim: int, out: int):
        super().__init__()
        self.residual = nn.ModuleDict(
            {  # released indices; 1, 4 SiLU, 5 dropout of 0
                "0": rms_gain(dim, 3),
                "2": CausalConv3d(dim, out, 3, padding=1),
                "3": rms_gain(out, 3),
                "6": CausalConv3d(out, out, 3, padding=1),
            }
        )
        nn.init.zeros_(self.residual["6"].weight)  # starts as its shortcut: +1 dB after a minute
        self.shortcut = CausalConv3d(dim, out, 1) if dim != out else None

    def forward(
        self, x: Tensor, stream: Stream
    ) -> Tensor:  # (B, dim, T, H, W) -> (B, out, T, H, W)
        r = self.residual
        h = r["2"](x, stream, r["0"].gamma)
        h = r["6"](h, stream, r["3"].gamma)
        return h + (x if self.shortcut is None else self.shortcut(x, stream))


class Attention(nn.Module):
    """One head over the h·w positions of each frame: space only, so causality is untouched."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = rms_gain(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)  # starts as the identity

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # (B, C, T, H, W) -> same
        f = frames_as_batch(x).permute(0, 2, 3, 1)  # (B·T, H, W, C)
        n = f * torch.rsqrt(f.float().square().mean(-1, keepdim=True) + 1e-6).to(f.dtype)
        n = (n * self.norm.gamma.flatten().to(f.dtype)).flatten(1, 2)
        q, k, v = F.linear(n, self.to_qkv.weight.flatten(1), self.to_qkv.bias).chunk(3, -1)
        a = torch.softmax((q @ k.mT).float() * q.shape[-1] ** -0.5, -1).to(v.dtype) @ v
        a = F.linear(a, self.proj.weight.flatten(1), self.proj.bias).reshape(f.shape)
        return x + batch_as_frames(a.permute(0, 3, 1, 2), x.shape[0])


class Down(nn.Module):
    """Halve space by a strided convolution, then (if temporal) time; the very first frame stays alone."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, stride=2)})
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # -> (B, C, T|⌈T/2⌉, H/2, W/2)
        y = batch_as_frames(self.resample["1"](F.pad(frames_as_batch(x), (0, 1, 0, 1))), x.shape[0])
        if self.time_conv is None:
            return y
        c, slot = self.time_conv, self.time_conv.slot
        seen = (
            y if stream.first else torch.cat([stream.past[slot], y], 2)
        )  # windows (0,1,2), (2,3,4)
        stream.keep(slot, y, 1)
        new = (
            F.conv3d(seen, c.weight, c.bias, stride=(2, 1, 1))
            if seen.shape[2] > 2
            else seen[:, :, :0]
        )
        return torch.cat([y[:, :, :1], new], 2) if stream.first else new


class Up(nn.Module):
    """Double time (if temporal): a convolution with two outputs per frame; then space: nearest × 2, a convolution."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, padding=1)})
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # -> (B, C, T|2T|2T−1, 2H, 2W)
        B = x.shape[0]
        if self.time_conv is not None:
            x = (
                self.time_conv(x, stream).unflatten(1, (2, -1)).permute(0, 3, 1, 4, 5, 2)
            )  # B T 2 H W C
            x = x.flatten(1, 2).permute(0, 4, 1, 2, 3)[
                :, :, 1 if stream.first else 0 :
            ]  # interleaved
        x = F.interpolate(frames_as_batch(x), scale_factor=2, mode="nearest")
        return batch_as_frames(self.resample["1"](x), B)


class EncoderStage(nn.Module):
    def __init__(
        self, dim: int, out: int, blocks: int, temporal: bool | None
    ):  # None: no resampling
        super().__init__()
        self.out, self.ft, self.fs = out, 2 if temporal else 1, 1 if temporal is None else 2
        layers = [ResidualBlock(dim if i == 0 else out, out) for i in range(blocks)]
        self.downsamples = nn.ModuleList(
            layers + ([] if temporal is None else [Down(out, temporal)])
        )

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        short = avg_down(x, self.out, self.ft, self.fs)
        for layer in self.downsamples:
            x = layer(x, stream)
        return x + short


class DecoderStage(nn.Module):
    def __init__(self, dim: int, out: int, blocks: int, temporal: bool | None):
        super().__init__()
        self.out, self.ft, self.up = out, 2 if temporal else 1, temporal is not None
        layers = [ResidualBlock(dim if i == 0 else out, out) for i in range(blocks)]
        self.upsamples = nn.ModuleList(layers + ([Up(out, temporal)] if self.up else []))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        short = dup_up(x, self.out, self.ft, 2, stream.first) if self.up else None
        for layer in self.upsamples:
            x = layer(x, stream)
        return x + short if self.up else x


class Encoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.dim] + [cfg.dim * m for m in cfg.dim_mult]
        self.conv1 = CausalConv3d(3 * cfg.patch**2, widths[0], 3, padding=1)
        self.downsamples = nn.ModuleList(
            EncoderStage(a, b, cfg.res_blocks, t)
            for a, b, t in zip(widths, widths[1:], [*cfg.temporal, None], strict=False)
        )
        self.middle = nn.ModuleList(
            [
                ResidualBlock(widths[-1], widths[-1]),
                Attention(widths[-1]),
                ResidualBlock(widths[-1], widths[-1]),
            ]
        )
        self.head = nn.ModuleDict(
            {
                "0": rms_gain(widths[-1], 3),
                "2": CausalConv3d(widths[-1], 2 * cfg.z_dim, 3, padding=1),
            }
        )

    def forward(
        self, x: Tensor, stream: Stream
    ) -> Tensor:  # (B, 12, F, H/2, W/2) -> (B, 2·z, T, h, w)
        x = self.conv1(x, stream)
        for layer in [*self.downsamples, *self.middle]:
            x = layer(x, stream)
        return self.head["2"](x, stream, self.head["0"].gamma)


class Decoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.dec_dim * m for m in (cfg.dim_mult[-1], *cfg.dim_mult[::-1])]
        self.conv1 = CausalConv3d(cfg.z_dim, widths[0], 3, padding=1)
        self.middle = nn.ModuleList(
            [
                ResidualBlock(widths[0], widths[0]),
                Attention(widths[0]),
                ResidualBlock(widths[0], widths[0]),
            ]
        )
        self.upsamples = nn.ModuleList(
            DecoderStage(a, b, cfg.res_blocks + 1, t)
            for a, b, t in zip(widths, widths[1:], [*cfg.temporal[::-1], None], strict=False)
        )
        self.head = nn.ModuleDict(
            {
                "0": rms_gain(widths[-1], 3),
                "2": CausalConv3d(widths[-1], 3 * cfg.patch**2, 3, padding=1),
            }
        )

    def features(
        self, z: Tensor, stream: Stream
    ) -> list[Tensor]:  # after the middle and first up block
        x = self.conv1(z, stream)
        for layer in self.middle:
            x = layer(x, stream)
        return [x, self.upsamples[0](x, stream)]

    def finish(self, x: Tensor, stream: Stream) -> Tensor:  # first up block -> patchified pixels
        for stage in self.upsamples[1:]:
            x = stage(x, stream)
        return self.head["2"](x, stream, self.head["0"].gamma)

    def forward(
        self, z: Tensor, stream: Stream
    ) -> Tensor:  # (B, z, T, h, w) -> (B, 12, F, H/2, W/2)
        return self.finish(self.features(z, stream)[-1], stream)


# ---------------------------------------------------------------------------------------------- the model


class VAE(nn.Module):
    """encode: frames -> whitened latents.  decode: latents -> frames.  decode_stream: the same, chunk by chunk."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg) if cfg.dim else None
        self.conv1 = CausalConv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1) if cfg.dim else None
        self.conv2 = CausalConv3d(cfg.z_dim, cfg.z_dim, 1)
        self.decoder = Decoder(cfg)
        for part in filter(
            None, (self.encoder, self.decoder)
        ):  # number the layers that remember: 32 when released
            layers = [
                m for m in part.modules() if isinstance(m, CausalConv3d) and m.kernel_size[0] > 1
            ]
            for slot, layer in enumerate(layers):
                layer.slot = slot
        self.set_statistics(cfg.mean, cfg.std)

    def set_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Mean and std of mu, per channel; they travel in the config, not among the released weight names."""
        if (mean or std) and not len(mean) == len(std) == self.cfg.z_dim:
            raise ValueError(
                f"mean and std need {self.cfg.z_dim} numbers each, got {len(mean)} and {len(std)}"
            )
        self.cfg, z, device = (
            replace(self.cfg, mean=tuple(mean), std=tuple(std)),
            self.cfg.z_dim,
            self.conv2.weight.device,
        )
        self.register_buffer(
            "latent_mean", torch.tensor(mean or [0.0] * z, device=device), persistent=False
        )
        self.register_buffer(
            "latent_std", torch.tensor(std or [1.0] * z, device=device), persistent=False
        )

    def _statistics(
        self, like: Tensor
    ) -> tuple[Tensor, Tensor]:  # (z,1,1,1) mean, 1/std in like's dtype
        mean, std = self.latent_mean.to(like.dtype), self.latent_std.to(like.dtype)
        return mean.view(-1, 1, 1, 1), (1 / std).view(-1, 1, 1, 1)

    def moments(
        self, video: Tensor, stream: Stream | None = None
    ) -> Tensor:  # -> mu (B, z, T, h, w)
        x = self.encoder(patchify(video, self.cfg.patch), stream or Stream())
        return F.conv3d(x, self.conv1.weight, self.conv1.bias)[
            :, : self.cfg.z_dim
        ]  # the rest: log variance

    def encode(self, video: Tensor, chunk: int | None = None) -> Tensor:
        """(B, 3, F, H, W) in [−1, 1] -> z (B, C, T, h, w). `chunk` latents at a time: less memory, same result."""
        self._check_video(video)
        pieces, out, state = [video], [], None
        if chunk and video.shape[2] > 1:  # frame 0 alone, then groups of 4, as released
            pieces = [video[:, :, :1], *video[:, :, 1:].split(self.cfg.stride[0] * chunk, dim=2)]
        for piece in pieces:
            stream = Stream(state)
            out.append(self.moments(piece, stream))
            state = stream.next
        mean, inv_std = self._statistics(out[0])
        return (torch.cat(out, 2) - mean) * inv_std  # z = (mu − mean) · (1/std)

    def unwhiten(self, z: Tensor) -> Tensor:  # for the decoder: conv2(z · std + mean)
        mean, inv_std = self._statistics(z)
        z = F.conv3d(z / inv_std + mean, self.conv2.weight, self.conv2.bias)
        return z.contiguous(memory_format=torch.channels_last_3d)

    def decode(self, z: Tensor, clamp: bool = False) -> Tensor:
        """z (B, C, T, h, w) of a fresh video -> its frames (B, 3, 1 + 4·(T−1), H, W)."""
        return self.decode_stream(z, None, clamp)[0]

    def decode_stream(
        self, z: Tensor, state: State | None = None, clamp: bool = False
    ) -> tuple[Tensor, State]:
        """The next latents of a video and what the decoder remembers -> their frames and the new memory.

        state None starts a video: T latents give 1 + 4·(T−1) frames; later ones 4·T. `state` is not changed and does
        not grow. float32 without gradient goes latent by latent: kernels choose their order of summation by shape, so
        only equal shapes give equal bits however a video is cut. Otherwise all go at once, which is faster.
        """
        self._check_latents(z, state)
        exact = z.dtype == torch.float32 and not torch.is_grad_enabled()
        frames = []
        for piece in z.split(1 if exact else z.shape[2], dim=2):
            stream = Stream(state)
            frames.append(unpatchify(self.decoder(self.unwhiten(piece), stream), self.cfg.patch))
            state = stream.next
        return torch.cat(frames, 2).clamp(-1, 1) if clamp else torch.cat(frames, 2), state

    def _check_video(self, video: Tensor) -> None:
        if self.encoder is None:
            raise ValueError(
                "a pruned decoder has no encoder; encode with the full VAE, its latents fit"
            )
        ft, fs, _ = self.cfg.stride
        if video.dim() != 5 or video.shape[1] != 3:
            raise ValueError(f"video must be (B, 3, F, H, W), got {tuple(video.shape)}")
        frames, H, W = video.shape[2:]
        if frames < 1 or (frames - 1) % ft:
            raise ValueError(
                f"video must have 1 + {ft}·k frames, got {frames}; cut it to {max(0, frames - 1) // ft * ft + 1}"
            )
        if H % fs or W % fs:
            raise ValueError(f"height and width must be multiples of {fs}, got {H}x{W}")

    def _check_latents(self, z: Tensor, state: State | None) -> None:
        if z.dim() != 5 or z.shape[1] != self.cfg.z_dim or z.shape[2] < 1:
            raise ValueError(
                f"latents must be (B, {self.cfg.z_dim}, T >= 1, h, w), got {tuple(z.shape)}"
            )
        fits = (z.shape[0], self.decoder.conv1.out_channels, *z.shape[3:])  # batch, width, size
        if state and (state[1].shape[0], state[1].shape[1], *state[1].shape[3:]) != fits:
            raise ValueError(
                f"decoder state is not of batch, width and size {fits}; start a new video with state=None"
            )


def demo() -> None:
    torch.manual_seed(0)
    full, z = VAE(PRESETS["micro"]), torch.randn(1, 16, 5, 4, 4)
    with torch.inference_mode():
        whole = full.decode(z)
        print(f"micro VAE: latents {tuple(z.shape)} -> frames {tuple(whole.shape)}")
        for sizes in ([1] * 5, [4, 1], [2, 3]):
            state, frames = None, []
            for piece in z.split(sizes, dim=2):
                video, state = full.decode_stream(piece, state)
                frames.append(video)
            same = torch.equal(torch.cat(frames, 2), whole)
            print(
                f"  decoded in pieces of {str(sizes):<15} {'bit-equal to whole' if same else 'DIFFERS'}"
            )
        for rate in (0.0, 0.5, 0.75):
            vae, start = VAE(pruned(full.cfg, rate)), time.perf_counter()
            vae.decode(z)
            count, ms = (
                sum(p.numel() for p in vae.decoder.parameters()),
                1e3 * (time.perf_counter() - start),
            )
            print(
                f"decoder pruned by {rate:4.0%}: width {vae.cfg.dec_dim}, {count:7,} parameters, {ms:5.1f} ms"
            )


if __name__ == "__main__":
    demo()
