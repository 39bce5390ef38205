"""The error buffer: what goes in comes out, later, somewhere else, and nothing else changes."""

import io

import pytest
import torch
from helpers import seeded

from error_buffer import ErrorBuffer, ErrorConfig

ALWAYS = ErrorConfig(
    warmup=0, probability=1.0, jitter=0.0, dtype="float32", capacity=8, per_push=99
)


def residual(seed, B=2, T=3):
    return torch.randn(B, 4, T, 2, 2, generator=seeded(seed))


def frames(delta):
    return delta.transpose(1, 2).flatten(0, 1)  # (B·T, C, h, w)


def is_among(frame, candidates):
    return any(torch.equal(frame, c) for c in candidates)


# ---- identity


def test_a_pushed_error_comes_back():
    buffer = ErrorBuffer(ALWAYS)
    delta = residual(0)
    buffer.push(delta, seeded())
    x = torch.zeros(5, 4, 4, 2, 2)
    injected = frames(buffer.perturb(x, generator=seeded()))
    assert len(buffer) == 6
    assert all(is_among(f, frames(delta)) for f in injected)
    assert len({f.sum().item() for f in injected}) > 1  # one draw per latent frame, not per call


def test_the_residual_is_sigma_times_the_velocity_error():
    x0, noise, v_hat = (residual(seed, B=1, T=2) for seed in range(3))
    x_sigma = 0.7 * x0 + 0.3 * noise
    delta = (x_sigma - 0.3 * v_hat) - x0
    torch.testing.assert_close(delta, -0.3 * (v_hat - (noise - x0)), atol=1e-6, rtol=0)


def test_saving_and_restoring_is_exact():
    buffer = ErrorBuffer(ErrorConfig(warmup=0, capacity=8, per_push=4))
    for i in range(4):
        buffer.push(residual(i), seeded(i))
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    twin = ErrorBuffer(buffer.cfg)
    twin.load_state_dict(torch.load(file, weights_only=True))
    x = residual(9)
    perturbed = [b.perturb(x, generator=seeded()) for b in (buffer, twin)]
    assert torch.equal(*perturbed)
    for b in (buffer, twin):  # and so does everything that follows
        b.push(residual(7), seeded(7))
    assert torch.equal(buffer.entries, twin.entries)
    assert buffer.pushes == twin.pushes == 5


def test_an_unused_buffer_can_be_saved():
    twin = ErrorBuffer(ALWAYS)
    twin.load_state_dict(ErrorBuffer(ALWAYS).state_dict())
    assert len(twin) == 0


# ---- limits


def test_an_empty_buffer_changes_nothing():
    x = residual(0)
    assert ErrorBuffer(ALWAYS).perturb(x) is x


def test_zero_gamma_is_identity():
    buffer = ErrorBuffer(ALWAYS)
    buffer.push(residual(0))
    x = residual(1)
    assert torch.equal(buffer.perturb(x, gamma=0.0), x)


def test_nothing_is_injected_before_the_warmup_has_passed():
    buffer = ErrorBuffer(ErrorConfig(warmup=2, probability=1.0))
    x = residual(9)
    buffer.push(residual(0))
    assert torch.equal(buffer.perturb(x), x)
    buffer.push(residual(1))
    assert not torch.equal(buffer.perturb(x), x)


def test_memory_with_no_frames_passes_through():
    buffer = ErrorBuffer(ALWAYS)
    buffer.push(residual(0))
    nothing = torch.zeros(2, 4, 0, 2, 2)
    assert buffer.perturb(nothing).shape == nothing.shape


# ---- behaviour


def test_a_full_buffer_forgets():
    buffer = ErrorBuffer(ALWAYS)
    first = residual(0)
    buffer.push(first, seeded())
    for i in range(1, 30):
        buffer.push(residual(i), seeded(i))
    assert len(buffer) == 8 == len(buffer.entries)
    assert not any(is_among(f, frames(first)) for f in buffer.entries)


def test_only_the_stated_share_of_samples_is_perturbed():
    buffer = ErrorBuffer(ErrorConfig(warmup=0, probability=0.3))
    buffer.push(residual(0))
    x = torch.zeros(4000, 4, 1, 2, 2)
    hit = buffer.perturb(x, generator=seeded()).flatten(1).any(1)
    assert abs(hit.float().mean().item() - 0.3) < 0.03


def test_gamma_scales_and_jitter_spreads_the_amplitude_per_sample():
    buffer = ErrorBuffer(ErrorConfig(warmup=0, probability=1.0, jitter=0.2, dtype="float32"))
    buffer.push(torch.ones(1, 4, 1, 2, 2))
    x = torch.zeros(500, 4, 3, 2, 2)
    x_tilde = buffer.perturb(x, gamma=0.5, generator=seeded())
    per_sample = x_tilde.flatten(1)
    assert (per_sample.max(1).values == per_sample.min(1).values).all()
    assert 0.4 <= per_sample.min() < 0.41
    assert 0.59 < per_sample.max() <= 0.6


def test_a_seed_fixes_both_what_is_kept_and_what_is_drawn():
    def run():
        buffer = ErrorBuffer(ErrorConfig(warmup=0, capacity=5, per_push=2))
        g = seeded(3)
        for i in range(6):
            buffer.push(residual(i), g)
        return buffer.perturb(residual(9), generator=g)

    assert torch.equal(run(), run())


def test_no_graph_is_kept_and_the_input_is_not_written():
    buffer = ErrorBuffer(ALWAYS)
    buffer.push(residual(0).requires_grad_())
    x = residual(1)
    kept = x.clone()
    assert not buffer.perturb(x).requires_grad
    assert not buffer.entries.requires_grad
    assert torch.equal(x, kept)


def test_half_precision_latents_stay_half_precision():
    buffer = ErrorBuffer(ErrorConfig(warmup=0, probability=1.0))
    buffer.push(residual(0))
    assert buffer.perturb(residual(1).bfloat16()).dtype == torch.bfloat16
    assert buffer.entries.dtype == torch.float16


def test_amplitudes_are_zero_until_the_warmup_and_for_samples_left_alone():
    buffer = ErrorBuffer(ErrorConfig(warmup=1, probability=0.5, jitter=0.1))
    assert not buffer.amplitude(100, generator=seeded()).any()
    buffer.push(residual(0))
    amplitude = buffer.amplitude(1000, 2.0, seeded())
    hit = amplitude > 0
    assert 0.45 < hit.float().mean() < 0.55
    assert ((amplitude[hit] >= 1.8) & (amplitude[hit] <= 2.2)).all()


# ---- bad input


@pytest.mark.parametrize(
    "change, word",
    [
        ({"kind": "pink"}, "kind"),
        ({"dtype": "int8"}, "dtype"),
        ({"capacity": 0}, "capacity"),
        ({"probability": 2.0}, "probability"),
    ],
)
def test_a_wrong_config_names_the_field(change, word):
    with pytest.raises(ValueError, match=word):
        ErrorConfig(**change)


def test_wrong_shapes_and_diverged_steps_are_refused():
    buffer = ErrorBuffer(ALWAYS)
    with pytest.raises(ValueError, match="B, C, T, h, w"):
        buffer.push(torch.zeros(4, 2, 2))
    with pytest.raises(ValueError, match="diverged"):
        buffer.push(torch.full((1, 4, 1, 2, 2), float("nan")))
    buffer.push(residual(0))
    with pytest.raises(ValueError, match="one preset"):
        buffer.perturb(torch.zeros(1, 16, 1, 8, 8))
    with pytest.raises(ValueError, match="capacity"):
        ErrorBuffer(ErrorConfig(capacity=9)).load_state_dict(buffer.state_dict())
