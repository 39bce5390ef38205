"""vae.py, as claims: identity, limit, reference, behaviour, bad input."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from safetensors.torch import load_file
from torch import Tensor

import vae_blocks
from engine import weights
from vae import PRESETS, VAE, VAEConfig, pruned
from vae_blocks import CausalConv3d, Stream, norm_silu

MICRO = PRESETS["micro"]
WAN = replace(PRESETS["wan2.2"], mean=(), std=())
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def micro() -> VAE:
    torch.manual_seed(0)
    return VAE(MICRO).eval()


def latents(count: int, size: int = 4) -> Tensor:
    return torch.randn(1, 16, count, size, size)


def frames(count: int) -> Tensor:
    return torch.rand(1, 3, count, 32, 32)


def streamed(model: VAE, z: Tensor, sizes: list[int]) -> Tensor:
    state = None
    out = []
    for piece in z.split(sizes, dim=2):
        video, state = model.decode_stream(piece, state)
        out.append(video)
    return torch.cat(out, 2)


def golden_weights(file: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights under their released names, and everything else."""
    golden = load_file(f"tests/golden/{file}.safetensors")
    prefix = "weights."
    names = [name for name in golden if name.startswith(prefix)]
    state = {name.removeprefix(prefix): golden[name] for name in names}
    return state, golden


def parameters(model: VAE) -> int:
    return sum(p.numel() for p in model.parameters())


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)


# ---- identity ----------------------------------------------------------------------------------------------


def test_patchify_round_trips_and_orders_channels_as_released() -> None:
    video = torch.randn(2, 3, 5, 8, 12)
    x = vae_blocks.patchify(video, 2)
    assert torch.equal(vae_blocks.unpatchify(x, 2), video)
    # colour 1, odd columns, even rows
    channel = x[:, 4 * 1 + 2 * 1 + 0]
    assert torch.equal(channel, video[:, 1, :, 0::2, 1::2])


def avg_down_plain(x: Tensor, out: int, time: int, space: int) -> Tensor:
    """Consecutive numbers in the order channel, time, row, column are one group."""
    missing = -x.shape[2] % time
    x = F.pad(x, (0, 0, 0, 0, missing, 0))  # in FRONT
    x = x.unflatten(4, (-1, space))
    x = x.unflatten(3, (-1, space))
    x = x.unflatten(2, (-1, time))
    # B C T time h row w column -> B C time row column T h w
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)
    x = x.flatten(1, 4)
    return x.unflatten(1, (out, -1)).mean(2)


@pytest.mark.parametrize(
    "out, time, space",
    [
        (8, 2, 2),
        (16, 2, 2),
        (8, 1, 2),
        (8, 1, 1),
    ],
)
def test_avg_down_averages_consecutive_channel_time_row_column(
    out: int, time: int, space: int
) -> None:
    x = torch.randn(2, 8, 3, 8, 6)
    plain = avg_down_plain(x, out, time, space)
    close(vae_blocks.avg_down(x, out, time, space), plain)


@pytest.mark.parametrize(
    "out, time, space",
    [
        (8, 2, 2),
        (8, 1, 2),
        (4, 2, 2),
        (4, 1, 2),
    ],
)
def test_dup_up_equals_its_plain_form_and_drops_the_first_frames_once(
    out: int, time: int, space: int
) -> None:
    x = torch.randn(2, 8, 3, 4, 5)
    plain = vae_blocks.dup_up_plain(x, out, time, space)
    later = vae_blocks.dup_up(x, out, time, space, first=False)
    first = vae_blocks.dup_up(x, out, time, space, first=True)
    assert torch.equal(later, plain)
    assert torch.equal(first, plain[:, :, time - 1 :])


def norm_silu_plain(x: Tensor, gamma: Tensor, past: Tensor) -> Tensor:
    """cat(past, silu(γ·x / √(mean x² + 1e-6))): (B, C, T, H, W) -> (B, C, 2+T, H, W)."""
    mean_square = x.float().square().mean(1, keepdim=True)
    y = x * torch.rsqrt(mean_square + 1e-6).to(x.dtype)
    n = F.silu(y * gamma.to(x.dtype))
    return torch.cat([past.to(x.dtype), n], 2)


def with_gradients(form: Callable, x: Tensor, gamma: Tensor, past: Tensor) -> tuple[Tensor, ...]:
    """Its output, and the gradients of x and gamma under a fixed weighting of the output."""
    x = x.clone().requires_grad_()
    gamma = gamma.clone().requires_grad_()
    out = form(x, gamma, past)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out.shape, generator=generator)
    (out * weight).sum().backward()
    return out.detach(), x.grad, gamma.grad


def test_norm_silu_equals_its_plain_form_with_gradient() -> None:
    x = channels_last(2, 8, 3, 4, 5)
    gamma = torch.rand(8, 1, 1, 1) + 0.5
    past = torch.randn(2, 8, 2, 4, 5)
    fast = with_gradients(norm_silu, x, gamma, past)
    plain = with_gradients(norm_silu_plain, x, gamma, past)
    for one, other in zip(fast, plain, strict=True):
        close(one, other, atol=2e-5, rtol=1e-5)


def test_causal_conv3d_equals_its_conv2d_form() -> None:
    x = torch.randn(2, 4, 5, 6, 7)
    conv = vae_blocks.causal3(4, 8)
    flat = vae_blocks.conv3d_as_conv2d(x, conv.weight, conv.bias)
    deep = F.conv3d(x, conv.weight, conv.bias, padding=(0, 1, 1))
    close(flat, deep, atol=1e-5, rtol=1e-5)


CUTS = (
    [1, 1, 1, 1, 1, 1],
    [2, 2, 2],
    [4, 2],
    [1, 5],
    [3, 1, 2],
)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["micro", "tiny"])
def test_streamed_decode_equals_whole_decode(name: str) -> None:
    torch.manual_seed(1)
    model = VAE(PRESETS[name]).eval()
    z = torch.randn(1, 16, 6, 2, 4)
    whole = model.decode(z)
    assert whole.shape == (1, 3, 21, 16, 32)
    for sizes in CUTS:
        assert torch.equal(streamed(model, z, sizes), whole)  # every bit


def test_the_training_decode_is_the_same_function(micro: VAE) -> None:
    z = latents(4)
    with torch.no_grad():
        one_by_one = micro.decode(z)
    all_at_once = micro.decode(z).detach()
    close(all_at_once, one_by_one, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_chunked_encode_equals_whole_encode(micro: VAE) -> None:
    video = frames(17) * 2 - 1
    whole = micro.encode(video)
    assert whole.shape == (1, 16, 5, 4, 4)
    for chunk in (1, 2, 3):
        close(micro.encode(video, chunk=chunk), whole, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_saved_state_can_be_decoded_from_again(micro: VAE) -> None:
    z = latents(3)
    _, state = micro.decode_stream(z[:, :, :1])
    before = {slot: x.clone() for slot, x in state.items()}
    first, _ = micro.decode_stream(z[:, :, 1:], state)
    second, _ = micro.decode_stream(z[:, :, 1:], state)
    assert torch.equal(first, second)
    assert all(torch.equal(before[slot], state[slot]) for slot in state)


# ---- limit -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_future_of_latents_never_changes_past_frames(micro: VAE) -> None:
    z = latents(4)
    other = z.clone()
    other[:, :, 2:] = 0
    one = micro.decode(z)
    two = micro.decode(other)
    assert torch.equal(one[:, :, :5], two[:, :, :5])
    assert not torch.equal(one[:, :, 5:], two[:, :, 5:])


@torch.no_grad()
def test_the_future_of_frames_never_changes_past_latents(micro: VAE) -> None:
    video = frames(13)
    other = video.clone()
    other[:, :, 5:] = 0
    one = micro.encode(video)[:, :, :2]
    two = micro.encode(other)[:, :, :2]
    close(one, two, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_an_image_is_a_video_of_one_frame(micro: VAE) -> None:
    video = frames(9)
    image = micro.encode(video[:, :, :1])
    first = micro.encode(video)[:, :, :1]
    close(image, first, atol=1e-6, rtol=1e-5)
    assert micro.decode(latents(1)).shape == (1, 3, 1, 32, 32)


@torch.no_grad()
def test_memory_does_not_grow_over_2000_frames() -> None:
    torch.manual_seed(0)
    model = VAE(pruned(MICRO, 0.75)).bfloat16()
    state = None
    sizes = set()
    count = 0
    for _ in range(51):
        video, state = model.decode_stream(latents(10, 2).bfloat16(), state)
        count += video.shape[2]
        # of the storage: no view keeps a chunk alive
        storages = [x.untyped_storage() for x in state.values()]
        sizes.add(sum(storage.nbytes() for storage in storages))
    assert count > 2000
    assert len(sizes) == 1
    assert sizes.pop() < 1e6


# ---- reference ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("file, width", [("vae_full", 8), ("vae_pruned50", 4)])
def test_matches_official(file: str, width: int) -> None:
    state, golden = golden_weights(file)
    model = VAE(replace(WAN, dim=width, dec_dim=width))
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
    video = golden["video"].float()
    whole = model.encode(video)
    chunked = model.encode(video, chunk=1)
    decoded = model.decode(golden["z"])
    assert relative_error(whole, golden["latent"]) < 5e-6
    assert relative_error(chunked, golden["latent"]) < 5e-6
    assert relative_error(decoded, golden["decoded"]) < 5e-6
    with torch.enable_grad():  # the path that training takes
        decoded = model.decode(golden["z"]).detach()
    assert relative_error(decoded, golden["decoded"]) < 5e-6


@pytest.fixture(scope="module")
def released() -> tuple[VAE, VAE, VAE]:
    """Full, half and quarter as wide, without memory."""
    with torch.device("meta"):
        half = pruned(WAN, 0.5, encoder=True)
        quarter = pruned(WAN, 0.75, encoder=True)
        return VAE(WAN), VAE(half), VAE(quarter)


RELEASED_SHAPES = {
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
}


def test_wan_has_the_released_tensors(released: tuple[VAE, VAE, VAE]) -> None:
    full, _, _ = released
    names, _ = golden_weights("vae_full")
    shapes = {k: tuple(v.shape) for k, v in full.state_dict().items()}
    assert set(shapes) == set(names)
    assert len(names) == 196
    for key, shape in RELEASED_SHAPES.items():
        assert shapes[key] == shape, key


def test_pruned_wan_has_the_released_sizes(released: tuple[VAE, VAE, VAE]) -> None:
    millions = [round(parameters(model) / 1e6, 2) for model in released]
    assert millions == [704.69, 176.98, 44.65]
    full, _, quarter = released
    assert quarter.decoder.conv1.weight.shape[0] == 256
    assert quarter.decoder.head["2"].weight.shape == (12, 64, 3, 3, 3)

    layers = [m for m in full.decoder.modules() if isinstance(m, CausalConv3d)]
    slots = {layer.slot for layer in layers} - {-1}
    assert len(slots) == 32


def test_the_strides_are_the_released_ones() -> None:
    assert PRESETS["wan2.2"].stride == PRESETS["small"].stride == (4, 16, 16)
    assert PRESETS["tiny"].stride == (4, 8, 8)


def test_our_files_carry_their_config() -> None:
    model = VAE(pruned(MICRO, 0.5))
    model.set_statistics([0.5] * 16, [2.0] * 16)
    stored = {k: v.bfloat16() for k, v in model.state_dict().items()}
    back = weights.vae_from_weights(stored, weights.vae_metadata(model))
    assert back.cfg == model.cfg
    assert back.encoder is None
    assert back.conv2.weight.dtype == torch.float32
    assert float(back.latent_std[0]) == 2
    z = latents(1, 2)
    assert relative_error(back.decode(z), model.decode(z)) < 0.05


def test_the_shipped_files_fit_in_8_mb() -> None:
    tiny = PRESETS["tiny"]
    size = 0
    with torch.device("meta"):
        for cfg in (tiny, pruned(tiny, 0.5), pruned(tiny, 0.75)):
            size += 2 * parameters(VAE(cfg))
    assert size < 8e6 - 100_000  # less some room for the headers


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, message",
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


@pytest.mark.parametrize(
    "shape",
    [
        (1, 48, 2, 4, 4),
        (1, 16, 0, 4, 4),
        (16, 2, 4, 4),
    ],
)
def test_bad_latents_are_named(micro: VAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="latents must be"):
        micro.decode(torch.zeros(shape))


@torch.no_grad()
def test_foreign_states_and_configs_are_named(micro: VAE) -> None:
    _, state = micro.decode_stream(torch.zeros(1, 16, 1, 4, 4))
    with pytest.raises(ValueError, match="start a new video"):
        micro.decode_stream(torch.zeros(1, 16, 1, 8, 4), state)
    with pytest.raises(ValueError, match="encode with the full VAE"):
        VAE(pruned(MICRO, 0.75)).encode(frames(1))
    with pytest.raises(ValueError, match="rate must be in"):
        pruned(MICRO, 1.0)
    with pytest.raises(ValueError, match="16 numbers each, got 2"):
        micro.set_statistics((0.0, 0.0), (1.0, 1.0))


def test_corrupt_and_foreign_files_are_named(micro: VAE) -> None:
    good = dict(micro.state_dict())
    about = weights.vae_metadata(micro)
    without = {k: v for k, v in good.items() if k != "encoder.head.0.gamma"}
    foreign = {"blocks.0.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match="do not fit this VAE.*expected Wan2.2_VAE.pth"):
        weights.vae_from_weights(foreign)
    with pytest.raises(ValueError, match="encoder.head.0.gamma missing"):
        weights.vae_from_weights(without, about)
    with pytest.raises(ValueError, match="extra.weight unknown"):
        weights.vae_from_weights(good | {"extra.weight": torch.zeros(1)}, about)
    with pytest.raises(ValueError, match=r"conv2.bias is \(3,\), expected \(16,\)"):
        weights.vae_from_weights(good | {"conv2.bias": torch.zeros(3)}, about)
    with pytest.raises(ValueError, match="do not fit"):
        weights.vae_from_weights(good)  # tiny weights without their config


def test_weights_that_would_draw_black_frames_are_named(micro: VAE) -> None:
    good = dict(micro.state_dict())
    about = weights.vae_metadata(micro)
    for value in (float("nan"), float("inf")):
        spoiled = good["decoder.head.2.weight"].clone()
        spoiled[0, 0, 0, 0, 0] = value
        with pytest.raises(ValueError, match="decoder.head.2.weight holds NaN"):
            weights.vae_from_weights(good | {"decoder.head.2.weight": spoiled}, about)


def test_a_stage_number_is_not_a_stream_slot() -> None:
    layer = CausalConv3d(4, 4, 1)
    stream = Stream()
    layer(torch.zeros(1, 4, 1, 2, 2), stream)  # 1x1x1: nothing to remember
    assert stream.next == {}


def test_configs_are_frozen() -> None:
    with pytest.raises(AttributeError):
        VAEConfig().dim = 3
