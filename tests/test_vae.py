"""vae.py, as claims: identity, limit, reference, behaviour, bad input."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import vae_blocks
from engine import weights
from vae import PRESETS, VAE, Stream, VAEConfig, pruned

MICRO = PRESETS["micro"]
WAN = replace(PRESETS["wan2.2"], mean=(), std=())


@pytest.fixture(scope="module")
def micro() -> VAE:
    torch.manual_seed(0)
    return VAE(MICRO).eval()


def pieces(model: VAE, z: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    state, out = None, []
    for piece in z.split(sizes, dim=2):
        frames, state = model.decode_stream(piece, state)
        out.append(frames)
    return torch.cat(out, 2)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


# ------------------------------------------------------------------------------------------------------ identity


def test_patchify_round_trips_and_orders_channels_as_released() -> None:
    video = torch.randn(2, 3, 5, 8, 12)
    x = vae_blocks.patchify(video, 2)
    assert torch.equal(vae_blocks.unpatchify(x, 2), video)
    assert torch.equal(
        x[:, 4 * 1 + 2 * 1 + 0], video[:, 1, :, 0::2, 1::2]
    )  # colour 1, odd columns, even rows


@pytest.mark.parametrize(
    ("C", "out", "ft", "fs"), [(8, 8, 2, 2), (8, 16, 2, 2), (8, 8, 1, 2), (8, 8, 1, 1)]
)
def test_avg_down_averages_consecutive_channel_time_row_column(
    C: int, out: int, ft: int, fs: int
) -> None:
    x = torch.randn(2, C, 3, 8, 6)
    padded = F.pad(x, (0, 0, 0, 0, 3 % ft, 0))  # in FRONT
    T = padded.shape[2] // ft
    plain = padded.reshape(2, C, T, ft, 8 // fs, fs, 6 // fs, fs).permute(0, 1, 3, 5, 7, 2, 4, 6)
    plain = plain.reshape(2, out, -1, T, 8 // fs, 6 // fs).mean(2)
    torch.testing.assert_close(vae_blocks.avg_down(x, out, ft, fs), plain)


@pytest.mark.parametrize(
    ("C", "out", "ft", "fs"), [(8, 8, 2, 2), (8, 8, 1, 2), (8, 4, 2, 2), (8, 4, 1, 2)]
)
def test_dup_up_equals_its_plain_form_and_drops_the_first_frames_once(
    C: int, out: int, ft: int, fs: int
) -> None:
    x = torch.randn(2, C, 3, 4, 5)
    plain = vae_blocks.dup_up_plain(x, out, ft, fs)
    assert torch.equal(vae_blocks.dup_up(x, out, ft, fs, first=False), plain)
    assert torch.equal(vae_blocks.dup_up(x, out, ft, fs, first=True), plain[:, :, ft - 1 :])


def norm_silu_plain(x: torch.Tensor, gamma: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """cat(past, silu(γ·x / √(mean x² + 1e-6))): (B, C, T, H, W) -> (B, C, 2+T, H, W)."""
    y = x * torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-6).to(x.dtype)
    return torch.cat([past.to(x.dtype), F.silu(y * gamma.to(x.dtype))], 2)


def test_norm_silu_equals_its_plain_form_with_gradient() -> None:
    x = torch.randn(2, 8, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    gamma, past = torch.rand(8, 1, 1, 1) + 0.5, torch.randn(2, 8, 2, 4, 5)
    weight = torch.randn(2, 8, 5, 4, 5)
    results = []
    for form in (vae_blocks.norm_silu, norm_silu_plain):
        a, g = x.clone().requires_grad_(), gamma.clone().requires_grad_()
        out = form(a, g, past)
        (out * weight).sum().backward()
        results.append((out.detach(), a.grad, g.grad))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-5)


def test_causal_conv3d_equals_its_conv2d_form() -> None:
    x, conv = torch.randn(2, 4, 5, 6, 7), vae_blocks.CausalConv3d(4, 8, 3, padding=1)
    torch.testing.assert_close(
        vae_blocks.conv3d_as_conv2d(x, conv.weight, conv.bias),
        F.conv3d(x, conv.weight, conv.bias, padding=(0, 1, 1)),
        atol=1e-5,
        rtol=1e-5,
    )


@torch.inference_mode()
@pytest.mark.parametrize("name", ["micro", "tiny"])
def test_streamed_decode_equals_whole_decode(name: str) -> None:
    torch.manual_seed(1)
    model, z = VAE(PRESETS[name]).eval(), torch.randn(1, 16, 6, 2, 4)
    whole = model.decode(z)
    assert whole.shape == (1, 3, 21, 16, 32)
    for sizes in ([1] * 6, [2, 2, 2], [4, 2], [1, 5], [3, 1, 2]):
        assert torch.equal(pieces(model, z, sizes), whole)  # every bit


def test_the_training_decode_is_the_same_function(micro: VAE) -> None:
    z = torch.randn(1, 16, 4, 4, 4)
    with torch.no_grad():
        streamed = micro.decode(z)
    torch.testing.assert_close(
        micro.decode(z).detach(), streamed, atol=2e-5, rtol=1e-4
    )  # all at once


@torch.no_grad()
def test_chunked_encode_equals_whole_encode(micro: VAE) -> None:
    video = torch.rand(1, 3, 17, 32, 32) * 2 - 1
    whole = micro.encode(video)
    assert whole.shape == (1, 16, 5, 4, 4)
    for chunk in (1, 2, 3):
        torch.testing.assert_close(micro.encode(video, chunk=chunk), whole, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_saved_state_can_be_decoded_from_again(micro: VAE) -> None:
    z = torch.randn(1, 16, 3, 4, 4)
    _, state = micro.decode_stream(z[:, :, :1])
    before = {slot: x.clone() for slot, x in state.items()}
    first, second = (micro.decode_stream(z[:, :, 1:], state)[0] for _ in range(2))
    assert torch.equal(first, second) and all(torch.equal(before[s], state[s]) for s in state)


# --------------------------------------------------------------------------------------------------------- limit


@torch.no_grad()
def test_the_future_never_changes_the_past(micro: VAE) -> None:
    z, video = torch.randn(1, 16, 4, 4, 4), torch.rand(1, 3, 13, 32, 32)
    z2, video2 = z.clone(), video.clone()
    z2[:, :, 2:], video2[:, :, 5:] = 0, 0
    assert torch.equal(micro.decode(z)[:, :, :5], micro.decode(z2)[:, :, :5])
    torch.testing.assert_close(
        micro.encode(video)[:, :, :2], micro.encode(video2)[:, :, :2], atol=1e-6, rtol=1e-5
    )
    assert not torch.equal(micro.decode(z)[:, :, 5:], micro.decode(z2)[:, :, 5:])


@torch.no_grad()
def test_an_image_is_a_video_of_one_frame(micro: VAE) -> None:
    video = torch.rand(1, 3, 9, 32, 32)
    torch.testing.assert_close(
        micro.encode(video[:, :, :1]), micro.encode(video)[:, :, :1], atol=1e-6, rtol=1e-5
    )
    assert micro.decode(torch.randn(1, 16, 1, 4, 4)).shape == (1, 3, 1, 32, 32)


@torch.no_grad()
def test_memory_does_not_grow_over_2000_frames() -> None:
    torch.manual_seed(0)
    model, state, sizes, frames = VAE(pruned(MICRO, 0.75)).bfloat16(), None, set(), 0
    for _ in range(51):
        video, state = model.decode_stream(torch.randn(1, 16, 10, 2, 2).bfloat16(), state)
        frames += video.shape[2]
        sizes.add(
            sum(x.untyped_storage().nbytes() for x in state.values())
        )  # storage: no view keeps a chunk alive
    assert frames > 2000 and len(sizes) == 1 and sizes.pop() < 1e6


# ----------------------------------------------------------------------------------------------------- reference


@torch.no_grad()
@pytest.mark.parametrize(("file", "width"), [("vae_full", 8), ("vae_pruned50", 4)])
def test_matches_official(file: str, width: int) -> None:
    golden = load_file(f"tests/golden/{file}.safetensors")
    model = VAE(replace(WAN, dim=width, dec_dim=width))
    model.load_state_dict(
        {k[8:]: v.float() for k, v in golden.items() if k.startswith("weights.")}, strict=True
    )
    video = golden["video"].float()
    assert relative(model.encode(video), golden["latent"]) < 5e-6
    assert relative(model.encode(video, chunk=1), golden["latent"]) < 5e-6
    assert relative(model.decode(golden["z"]), golden["decoded"]) < 5e-6
    with torch.enable_grad():  # the path that training takes
        assert relative(model.decode(golden["z"]).detach(), golden["decoded"]) < 5e-6


def test_wan_has_the_released_tensors() -> None:
    with torch.device("meta"):
        full, half, quarter = (
            VAE(c) for c in (WAN, pruned(WAN, 0.5, encoder=True), pruned(WAN, 0.75, encoder=True))
        )
    names = {
        k[8:] for k in load_file("tests/golden/vae_full.safetensors") if k.startswith("weights.")
    }
    shapes = {k: tuple(v.shape) for k, v in full.state_dict().items()}
    assert set(shapes) == names and len(names) == 196
    for key, shape in {
        "encoder.conv1.weight": (160, 12, 3, 3, 3),
        "encoder.downsamples.1.downsamples.2.time_conv.weight": (320, 320, 3, 1, 1),
        "encoder.downsamples.2.downsamples.0.shortcut.weight": (640, 320, 1, 1, 1),
        "encoder.head.2.weight": (96, 640, 3, 3, 3),
        "conv1.weight": (96, 96, 1, 1, 1),
        "conv2.weight": (48, 48, 1, 1, 1),
        "decoder.conv1.weight": (1024, 48, 3, 3, 3),
        "decoder.middle.1.to_qkv.weight": (3072, 1024, 1, 1),
        "decoder.middle.1.norm.gamma": (1024, 1, 1),
        "decoder.upsamples.1.upsamples.3.time_conv.weight": (2048, 1024, 3, 1, 1),
        "decoder.head.2.weight": (12, 256, 3, 3, 3),
        "decoder.upsamples.2.upsamples.0.residual.2.weight": (512, 1024, 3, 3, 3),
    }.items():
        assert shapes[key] == shape, key
    millions = [
        round(sum(p.numel() for p in m.parameters()) / 1e6, 2) for m in (full, half, quarter)
    ]
    assert millions == [704.69, 176.98, 44.65]
    assert quarter.decoder.conv1.weight.shape[0] == 256 and quarter.decoder.head[
        "2"
    ].weight.shape == (12, 64, 3, 3, 3)
    assert (
        len(
            {m.slot for m in full.decoder.modules() if isinstance(m, vae_blocks.CausalConv3d)}
            - {-1}
        )
        == 32
    )
    assert PRESETS["wan2.2"].stride == PRESETS["small"].stride == (4, 16, 16) and PRESETS[
        "tiny"
    ].stride == (4, 8, 8)


def test_our_files_carry_their_config() -> None:
    model = VAE(pruned(MICRO, 0.5))
    model.set_statistics([0.5] * 16, [2.0] * 16)
    back = weights.vae_from_weights(
        {k: v.bfloat16() for k, v in model.state_dict().items()}, weights.vae_metadata(model)
    )
    assert (
        back.cfg == model.cfg and back.encoder is None and back.conv2.weight.dtype == torch.float32
    )
    z = torch.randn(1, 16, 1, 2, 2)
    assert relative(back.decode(z), model.decode(z)) < 0.05 and float(back.latent_std[0]) == 2


def test_the_shipped_files_fit_in_8_mb() -> None:
    tiny, files = PRESETS["tiny"], 0
    with torch.device("meta"):
        for cfg in (tiny, pruned(tiny, 0.5), pruned(tiny, 0.75)):
            files += sum(2 * p.numel() for p in VAE(cfg).parameters())
    assert files < 8e6 - 100_000  # less some room for the headers


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 32, 32), "cut it to 5"),
        ((1, 3, 5, 30, 32), "multiples of 8, got 30x32"),
        ((1, 4, 5, 32, 32), "must be (B, 3, F, H, W)"),
        ((3, 5, 32, 32), "must be (B, 3, F, H, W)"),
        ((1, 3, 0, 32, 32), "got 0"),
    ],
)
def test_a_bad_video_is_named(micro: VAE, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        micro.encode(torch.zeros(shape))
    assert message in str(error.value)


@torch.no_grad()
def test_bad_latents_and_foreign_states_are_named(micro: VAE) -> None:
    for shape in ((1, 48, 2, 4, 4), (1, 16, 0, 4, 4), (16, 2, 4, 4)):
        with pytest.raises(ValueError, match="latents must be"):
            micro.decode(torch.zeros(shape))
    _, state = micro.decode_stream(torch.zeros(1, 16, 1, 4, 4))
    with pytest.raises(ValueError, match="start a new video"):
        micro.decode_stream(torch.zeros(1, 16, 1, 8, 4), state)
    with pytest.raises(ValueError, match="encode with the full VAE"):
        VAE(pruned(MICRO, 0.75)).encode(torch.zeros(1, 3, 1, 32, 32))
    with pytest.raises(ValueError, match="rate must be in"):
        pruned(MICRO, 1.0)
    with pytest.raises(ValueError, match="16 numbers each, got 2"):
        micro.set_statistics((0.0, 0.0), (1.0, 1.0))


def test_corrupt_and_foreign_files_are_named(micro: VAE) -> None:
    good, said = dict(micro.state_dict()), weights.vae_metadata(micro)
    with pytest.raises(ValueError, match="do not fit this VAE.*expected Wan2.2_VAE.pth"):
        weights.vae_from_weights({"blocks.0.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="encoder.head.0.gamma missing"):
        weights.vae_from_weights(
            {k: v for k, v in good.items() if k != "encoder.head.0.gamma"}, said
        )
    with pytest.raises(ValueError, match="extra.weight unknown"):
        weights.vae_from_weights(good | {"extra.weight": torch.zeros(1)}, said)
    with pytest.raises(ValueError, match=r"conv2.bias is \(3,\), expected \(16,\)"):
        weights.vae_from_weights(good | {"conv2.bias": torch.zeros(3)}, said)
    with pytest.raises(ValueError, match="do not fit"):
        weights.vae_from_weights(good)  # tiny weights without their config


def test_a_stage_number_is_not_a_stream_slot() -> None:
    layer, stream = vae_blocks.CausalConv3d(4, 4, 1), Stream()
    layer(torch.zeros(1, 4, 1, 2, 2), stream)  # 1×1×1: nothing to remember
    assert stream.next == {}


def test_configs_are_frozen() -> None:
    with pytest.raises(AttributeError):
        VAEConfig().dim = 3
