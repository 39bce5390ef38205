"""Turn frames into latents and back, one chunk at a time, with a thinner decoder for speed.

What it does. `encode` turns a video into latents, numbers of mean 0 and variance 1 on which all other
files work; `decode` turns latents into frames; `decode_stream` does so chunk by chunk and gives the
same frames, in float32 to the bit. The layers are in vae_blocks.py, the losses in lightvae.py.
Paper: §3.4 (MG-LightVAE), Table 2.  Released: Wan2.2_VAE.pth and MG-LightVAE.pth, no training.

Why it works. A latent holds four frames. Only the first latent holds a single one, so that a
picture is a video, too, namely of one frame:

    latent    0    1          2          3                 F = 1 + 4·(T − 1)                     (1)
    frame     0    1 2 3 4    5 6 7 8    9 10 11 12

In play, the frames of a chunk are shown before the latents of the next one exist. So no layer may
look ahead. Looking back is allowed: a layer that mixes frames reads one or two frames from before
the chunk (vae_blocks.py), and these have to be remembered. Call D the decoder, and s_k all that its
layers remember when chunk k begins:

    frames_k, s_k+1 = D(latents_k, s_k),      s_0 = nothing                                      (2)

Claim: the frames of all chunks, side by side, are those of one pass over all latents. By induction
over the layers: the first one reads the latents and the two frames that it remembers, which are
what one pass would read at that place, so its outputs are those of one pass. They are the second
layer's inputs, and so on. The state does not grow with the video: in the released decoder, 32
layers remember two frames each.

Diffusion adds noise of variance 1, so it wants latents of the same size. What the encoder puts out,
mu, has some mean and deviation per channel. They are measured once, when the encoder is trained;
from then on they are taken out after encoding and put back before decoding:

    z = (mu − mean) / std        what every other file calls a latent                            (3)
    mu = z·std + mean            what the decoder reads, through a 1x1x1 convolution             (4)

A usual VAE has a term in its loss, the KL divergence, that pulls mu towards mean 0 and variance 1,
and makes latents that lie close to each other mean similar pictures. Here (3) does the first, and a
little noise on the latents in training does the second.

MG-LightVAE is the same decoder with fewer channels: every layer keeps a share of its width.

    width' = width·(1 − rate)                                                                    (5)

The encoder stays whole. So latents, and every model trained on them, stay what they are.

What differs. `tiny` is this structure with other numbers: a stride of 4x8x8, 16 channels, and one
residual block less per stage, since a shallower net learnt more in the same time. Up (vae_blocks.py)
makes one frame too many of the first latent and drops it, as released; Wan2.2's own code does
otherwise. The released student narrows its encoder, too, and never uses it: ours has none.
Try it: python vae.py      Tests: pytest tests/test_vae.py
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vae_blocks import (
    Attention,
    CausalConv3d,
    DecoderStage,
    EncoderStage,
    ResidualBlock,
    State,
    Stream,
    causal3,
    patchify,
    rms_gain,
    unpatchify,
)


@dataclass(frozen=True)
class VAEConfig:
    dim: int = 24  # encoder width at full resolution; 0 = no encoder, as in a pruned decoder
    dec_dim: int = 32  # decoder width at full resolution
    z_dim: int = 16  # latent channels
    dim_mult: tuple[int, ...] = (1, 2, 2)  # times dim: the width at each resolution, full to low
    temporal: tuple[bool, ...] = (True, True)  # does this halving of space halve time too?
    res_blocks: int = 1  # per encoder stage; the decoder has one more
    patch: int = 2  # pixels folded into channels before anything else
    mean: tuple[float, ...] = ()  # of mu, per channel; empty = 0
    std: tuple[float, ...] = ()  # of mu, per channel; empty = 1

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns per latent."""
        space = self.patch * 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temporal), space, space

    def frames(self, latents: int) -> int:
        """How many frames a fresh video of so many latents has."""
        return 1 + self.stride[0] * (latents - 1)  # (1)


def numbers(table: str) -> tuple[float, ...]:
    return tuple(float(word) for word in table.split())


WAN_MEAN = numbers("""
    -0.2289 -0.0052 -0.1323 -0.2339 -0.2799  0.0174  0.1838  0.1557 -0.1382  0.0542  0.2813  0.0891
     0.1570 -0.0098  0.0375 -0.1825 -0.2246 -0.1207 -0.0698  0.5109  0.2665 -0.2108 -0.2158  0.2502
    -0.2055 -0.0322  0.1109  0.1567 -0.0729  0.0899 -0.2799 -0.1230 -0.0313 -0.1649  0.0117  0.0723
    -0.2839 -0.2083 -0.0520  0.3748  0.0152  0.1957  0.1433 -0.2944  0.3573 -0.0548 -0.1681 -0.0667
""")
WAN_STD = numbers("""
     0.4765  1.0364  0.4514  1.1677  0.5313  0.4990  0.4818  0.5013  0.8158  1.0344  0.5894  1.0901
     0.6885  0.6165  0.8454  0.4978  0.5759  0.3523  0.7135  0.6804  0.5833  1.4146  0.8986  0.5659
     0.7069  0.5338  0.4889  0.4917  0.4069  0.4999  0.6866  0.4093  0.5709  0.6065  0.6415  0.4944
     0.5726  1.2042  0.5458  1.6887  0.3971  1.0600  0.3943  0.5537  0.5444  0.4089  0.7468  0.7744
""")
RELEASED = VAEConfig(z_dim=48, dim_mult=(1, 2, 4, 4), temporal=(False, True, True), res_blocks=2)
PRESETS = {
    "micro": VAEConfig(dim=8, dec_dim=8),
    "tiny": VAEConfig(),
    "small": replace(RELEASED, dim=24, dec_dim=32, res_blocks=1),
    "wan2.2": replace(RELEASED, dim=160, dec_dim=256, mean=WAN_MEAN, std=WAN_STD),
}


def pruned(cfg: VAEConfig, rate: float, encoder: bool = False) -> VAEConfig:
    """A decoder with (1 − rate) of the channels; the released files carry a thin encoder too."""
    if not 0 <= rate < 1:
        published = "the published ones are 0.5 and 0.75"
        raise ValueError(f"pruning rate must be in [0, 1), got {rate}; {published}")
    dec_dim = max(1, round(cfg.dec_dim * (1 - rate)))  # (5)
    dim = max(1, round(cfg.dim * (1 - rate))) if encoder else 0
    return replace(cfg, dec_dim=dec_dim, dim=dim)


# ---- the two halves ----------------------------------------------------------------------------------------


def middle(width: int) -> nn.ModuleList:
    """At the lowest resolution. Its attention is the one layer where a place sees its whole frame."""
    block, attention = ResidualBlock(width, width), Attention(width)
    return nn.ModuleList([block, attention, ResidualBlock(width, width)])


def head(width: int, out: int) -> nn.ModuleDict:
    """The last norm and convolution, under the released indices."""
    return nn.ModuleDict({"0": rms_gain(width, 3), "2": causal3(width, out)})


class Encoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.dim] + [cfg.dim * m for m in cfg.dim_mult]
        stages = zip(pairwise(widths), [*cfg.temporal, None], strict=True)

        self.conv1 = causal3(3 * cfg.patch**2, widths[0])
        self.downsamples = nn.ModuleList(
            EncoderStage(dim, out, cfg.res_blocks, temporal) for (dim, out), temporal in stages
        )
        self.middle = middle(widths[-1])
        self.head = head(widths[-1], 2 * cfg.z_dim)  # mean and log variance

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """Patchified pixels (B, 12, F, H/2, W/2) -> (B, 2·C, T, h, w)."""
        x = self.conv1(x, stream)
        for layer in [*self.downsamples, *self.middle]:
            x = layer(x, stream)
        return self.head["2"](x, stream, self.head["0"].gamma)


class Decoder(nn.Module):
    """The encoder's mirror image; in two steps, since lightvae.py compares what is between them."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.dec_dim * m for m in (cfg.dim_mult[-1], *cfg.dim_mult[::-1])]
        stages = zip(pairwise(widths), [*cfg.temporal[::-1], None], strict=True)

        self.conv1 = causal3(cfg.z_dim, widths[0])
        self.middle = middle(widths[0])
        self.upsamples = nn.ModuleList(
            DecoderStage(dim, out, cfg.res_blocks + 1, temporal) for (dim, out), temporal in stages
        )
        self.head = head(widths[-1], 3 * cfg.patch**2)

    def features(self, z: Tensor, stream: Stream) -> list[Tensor]:
        """(B, C, T, h, w) -> the activations after the middle, and those after the first stage."""
        x = self.conv1(z, stream)
        for layer in self.middle:
            x = layer(x, stream)
        return [x, self.upsamples[0](x, stream)]

    def finish(self, x: Tensor, stream: Stream) -> Tensor:
        """After the first stage -> patchified pixels."""
        for stage in self.upsamples[1:]:
            x = stage(x, stream)
        return self.head["2"](x, stream, self.head["0"].gamma)

    def forward(self, z: Tensor, stream: Stream) -> Tensor:
        """(B, C, T, h, w) -> patchified pixels (B, 12, F, H/2, W/2)."""
        return self.finish(self.features(z, stream)[-1], stream)


def number_causal_layers(part: nn.Module) -> None:
    """Give every layer that remembers frames its key in the state.

    Only those over three frames do; a 1x1x1 convolution reads the present alone.
    """
    layers = [layer for layer in part.modules() if isinstance(layer, CausalConv3d)]
    remembering = [layer for layer in layers if layer.kernel_size[0] > 1]
    for slot, layer in enumerate(remembering):
        layer.slot = slot


# ---- the model ---------------------------------------------------------------------------------------------


class VAE(nn.Module):
    """encode: frames -> latents.  decode: latents -> frames.  decode_stream: chunk by chunk."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg) if cfg.dim else None
        self.conv1 = CausalConv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1) if cfg.dim else None
        self.conv2 = CausalConv3d(cfg.z_dim, cfg.z_dim, 1)
        self.decoder = Decoder(cfg)
        for part in (self.encoder, self.decoder):
            if part is not None:
                number_causal_layers(part)
        self.set_statistics(cfg.mean, cfg.std)

    def set_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Mean and deviation of mu, per channel: part of the config, not of the released weights.

        Both empty: mean 0 and deviation 1, so that (3) and (4) change nothing.
        """
        channels = self.cfg.z_dim
        given = bool(mean or std)
        if given and not len(mean) == len(std) == channels:
            got = f"got {len(mean)} and {len(std)}"
            raise ValueError(f"mean and std need {channels} numbers each, {got}")

        self.cfg = replace(self.cfg, mean=tuple(mean), std=tuple(std))
        device = self.conv2.weight.device
        latent_mean = torch.tensor(mean or [0.0] * channels, device=device)
        latent_std = torch.tensor(std or [1.0] * channels, device=device)
        self.register_buffer("latent_mean", latent_mean, persistent=False)
        self.register_buffer("latent_std", latent_std, persistent=False)

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1/std, (C, 1, 1, 1) each, in the dtype of `like`.

        Both ways use 1/std, as released: dividing by it rounds otherwise than multiplying by std.
        """
        mean = self.latent_mean.to(like.dtype)
        inv_std = 1 / self.latent_std.to(like.dtype)
        return mean.view(-1, 1, 1, 1), inv_std.view(-1, 1, 1, 1)

    # ---- frames to latents

    def moments(self, video: Tensor, stream: Stream | None = None) -> Tensor:
        """One chunk (B, 3, F, H, W) -> mu (B, C, T, h, w)."""
        x = self.encoder(patchify(video, self.cfg.patch), stream or Stream())
        x = F.conv3d(x, self.conv1.weight, self.conv1.bias)
        return x[:, : self.cfg.z_dim]  # the rest is log variance, which nobody reads

    def encode(self, video: Tensor, chunk: int | None = None) -> Tensor:
        """(B, 3, F, H, W) in [−1, 1] -> z (B, C, T, h, w).

        `chunk` latents at a time need less memory and give the same result.
        """
        self.check_video(video)
        pieces = [video]
        if chunk and video.shape[2] > 1:  # frame 0 alone, then four per latent, as released
            rest = video[:, :, 1:].split(self.cfg.stride[0] * chunk, dim=2)
            pieces = [video[:, :, :1], *rest]

        state = None
        parts = []
        for piece in pieces:
            stream = Stream(state)
            parts.append(self.moments(piece, stream))
            state = stream.next

        mu = torch.cat(parts, 2)
        mean, inv_std = self.statistics(mu)
        return (mu - mean) * inv_std  # (3)

    # ---- latents to frames

    def unwhiten(self, z: Tensor) -> Tensor:
        """z -> what the decoder reads."""
        mean, inv_std = self.statistics(z)
        mu = z / inv_std + mean  # (4)
        x = F.conv3d(mu, self.conv2.weight, self.conv2.bias)
        return x.contiguous(memory_format=torch.channels_last_3d)

    def decode(self, z: Tensor, clamp: bool = False) -> Tensor:
        """z (B, C, T, h, w) of a fresh video -> its frames (B, 3, 1 + 4·(T−1), H, W)."""
        return self.decode_stream(z, None, clamp)[0]

    def decode_stream(
        self, z: Tensor, state: State | None = None, clamp: bool = False
    ) -> tuple[Tensor, State]:
        """The next latents of a video, and what is remembered of it -> their frames, and the new memory.

        state None starts a video: T latents give 1 + 4·(T−1) frames; later ones give 4·T. `state`
        is not changed.

        In float32 without gradient, the latents go one by one: a kernel adds in an order that
        depends on the shape of its input, so bits are equal only where shapes are, and one latent
        is a shape that every way to cut a video has. Otherwise all latents go at once, which is
        faster.
        """
        self.check_latents(z, state)
        exact = z.dtype == torch.float32 and not torch.is_grad_enabled()
        at_once = 1 if exact else z.shape[2]
        frames = []
        for piece in z.split(at_once, dim=2):
            stream = Stream(state)
            pixels = self.decoder(self.unwhiten(piece), stream)
            frames.append(unpatchify(pixels, self.cfg.patch))
            state = stream.next  # (2)
        video = torch.cat(frames, 2)
        return video.clamp(-1, 1) if clamp else video, state

    # ---- what comes in must fit

    def check_weights(self) -> None:
        """A decoder of NaN draws black frames, and nobody is told."""
        for name, weight in self.named_parameters():
            if not weight.isfinite().all():
                hint = "the file is damaged: download or train it again"
                raise ValueError(f"{name} holds NaN or infinite numbers; {hint}")

    def check_video(self, video: Tensor) -> None:
        if self.encoder is None:
            hint = "encode with the full VAE, its latents fit"
            raise ValueError(f"a pruned decoder has no encoder; {hint}")
        if video.dim() != 5 or video.shape[1] != 3:
            raise ValueError(f"video must be (B, 3, F, H, W), got {tuple(video.shape)}")

        per_latent, side, _ = self.cfg.stride
        frames, H, W = video.shape[2:]
        if frames < 1 or (frames - 1) % per_latent:
            fitting = self.cfg.frames(max(0, frames - 1) // per_latent + 1)
            rule = f"video must have 1 + {per_latent}·k frames"
            raise ValueError(f"{rule}, got {frames}; cut it to {fitting}")
        if H % side or W % side:
            raise ValueError(f"height and width must be multiples of {side}, got {H}x{W}")

    def check_latents(self, z: Tensor, state: State | None) -> None:
        if z.dim() != 5 or z.shape[1] != self.cfg.z_dim or z.shape[2] < 1:
            wanted = f"(B, {self.cfg.z_dim}, T >= 1, h, w)"
            raise ValueError(f"latents must be {wanted}, got {tuple(z.shape)}")
        if not state:
            return
        # slot 1 is the first residual block's: as wide as the decoder, as large as a latent
        B, width, _, h, w = state[1].shape
        fits = (z.shape[0], self.decoder.conv1.out_channels, *z.shape[3:])
        if (B, width, h, w) != fits:
            hint = "start a new video with state=None"
            raise ValueError(f"decoder state is not of batch, width and size {fits}; {hint}")


def demo() -> None:
    """However a video is cut, the state makes its frames those of one pass; without it they differ."""
    torch.manual_seed(0)
    model = VAE(PRESETS["micro"])
    z = torch.randn(1, 16, 5, 4, 4)
    with torch.inference_mode():
        whole = model.decode(z)
        frames = whole.shape[2]
        print(f"{z.shape[2]} latents are {frames} frames; 1 + 4·(T − 1) = {model.cfg.frames(5)}")

        print("largest difference from one pass    all, with the state    last piece, without")
        for sizes in ([1] * 5, [4, 1], [2, 3]):
            state = None
            streamed = []
            for piece in z.split(sizes, dim=2):
                video, state = model.decode_stream(piece, state)
                streamed.append(video)
            exact = float((torch.cat(streamed, 2) - whole).abs().max())

            # as a new video, the last piece has three frames less: its first latent is one frame
            alone = model.decode(piece)
            forgetful = float((alone - whole[:, :, -alone.shape[2] :]).abs().max())
            print(f"  in pieces of {str(sizes):<20} {exact:>16.3f} {forgetful:>22.3f}")


if __name__ == "__main__":
    demo()
