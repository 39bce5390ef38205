"""The memory of a session, found by a walk without numbers: it is what real tensors take, to the byte."""

import math
from dataclasses import replace

import pytest
import torch
from walking import IMAGE, OPTIONS, actions

import attention
import dit
import moe
import quant
import realtime
import vae
from context import Window
from engine import parts, walked

GPU = parts.Options(preset="5b", device="cuda:0", dtype="bfloat16")


def test_a_ledger_counts_what_was_made_inside_and_lives() -> None:
    weight = torch.ones(50, 20)
    with walked.Ledger() as ledger:
        x = torch.ones(1000)
        view = x[100:].view(2, -1)
        y = weight.t() + 1  # the turned weight is nothing new
        y.add_(1)
        assert (ledger.now, ledger.peak) == (8000, 8000)
        del x
        assert ledger.now == 8000, "a view holds all of it"
        del view
        assert (ledger.now, ledger.peak) == (4000, 8000)


@pytest.mark.long
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("layers", ["", "qkvo"])
def test_a_walk_without_numbers_takes_what_real_tensors_take(device: str, layers: str) -> None:
    taken = []
    for place in ("meta", "cpu"):
        with torch.device(place):
            network = moe.build("tiny", place)
            decoder = vae.VAE(parts.vae_config("tiny", "light75"))
        if layers:
            quant.quantize_(network, layers)
        segment = walked.denoising(network, (5, 4, 2), (8, 8), 1.0, device)
        taken.append((segment, *walked.decoding(decoder, 2, (8, 8), device)))
    assert taken[0] == taken[1] and min(taken[0]) > 1e5
    assert attention.attention.__name__ == "attention", "the walk leaves things as they were"


@pytest.mark.long
def test_the_walk_is_a_segment_of_a_real_session() -> None:
    session = realtime.Session(replace(OPTIONS, steps=1, method="euler"))
    session.reset(IMAGE)
    session.step(*actions(56))
    plan = session.denoiser.plan(*actions(40), "camera")
    given = sum(x.nbytes for x in vars(plan.context).values())
    with walked.Ledger() as ledger:
        latents = session.denoiser.imagine(plan)
    sizes = Window.memory, Window.past, Window.new
    segment = walked.denoising(session.nets["dit"], sizes, (8, 8))
    assert 0.9 < segment / (given + ledger.peak) < 1.1

    state = sum(x.nbytes for x in session.decoder.state.values())
    with walked.Ledger() as ledger:
        session.decoder.decode(latents)
    most, kept = walked.decoding(session.nets["decoder"], Window.new, (8, 8))
    assert kept == state
    assert 0.9 < most / (kept + ledger.peak) < 1.1


def formula(options: parts.Options) -> float:
    """GB by hand: weights, what prepare() keeps of the cameras, and a block at its peak."""
    config = dit.PRESETS[options.preset]
    full = parts.vae_config(options.preset)
    light = parts.vae_config(options.preset, options.decoder)
    with torch.device("meta"):
        networks = (moe.build(options.preset, "meta"), vae.VAE(full), vae.VAE(light))
        networks[1].decoder = None  # it only encodes
        parameters = sum(p.numel() for net in networks for p in net.parameters())

    # a block holds about ten tensors of width dim, and two of the width of its MLP
    tokens = parts.tokens_per_latent(options) * (Window.memory + Window.past + Window.new)
    denoising = tokens * ((2 * config.layers + 10) * config.dim + 2 * config.ffn)
    # the decoder about two of dec_dim channels at the size of the picture
    decoding = 2 * parts.PIECE * light.dec_dim
    memory = options.bank * math.prod(parts.SIZES[options.preset]) // 256 * config.in_dim
    return 2 * (parameters + denoising + decoding + memory) / 1e9


@pytest.mark.long
def test_the_released_size_needs_what_one_would_expect() -> None:
    full = parts.estimate(GPU)
    assert 1 < full / formula(GPU) < 1.25
    smaller = {
        change: full - parts.estimate(replace(GPU, **dict([change])))
        for change in (("decoder", "light75"), ("quantize", "qkvo"))
    }
    light, int8 = smaller.values()
    assert 6 < light < 10, "the decoder's maps at 720p are what it saves"
    assert int8 == pytest.approx(30 * 4 * 3072**2 / 1e9, rel=0.01), "a byte for each weight"


@pytest.mark.long
def test_a_small_gpu_is_told_what_would_fit() -> None:
    text = parts.will_not_fit(GPU, 22.1)
    assert text.startswith("5b bfloat16 at 1280×704 needs ~34 GB, cuda:0 has 22.1 GB free")
    assert "Options, cheapest first:" in text
    assert "--vae light75 (−7.9)" in text and "--int8 (−1.1)" in text
    assert parts.estimate(OPTIONS) < 0.2
