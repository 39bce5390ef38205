"""What a GPU would be asked to do, on a machine without one (tests/fake_gpu.py): no two devices meet.

A device must be known before the first backward pass of a process, and can't be forgotten: every walk
below is a function that runs in a process of its own.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from fake_gpu import GPU, fake_gpu, register

import dit
import engine.run
import error_buffer
import flow
import moe
import realtime
import train
import vae
from context import Context, Window
from engine import cli, parts
from engine.parts import Options
from realtime import Session

MICRO = Options("micro", "random", dtype="float32", new=2, steps=2)


@pytest.fixture(scope="module")
def apart() -> Iterator[Callable]:
    """apart(walk, ...) is walk(...) in the other process; what it raises is raised here."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, register) as pool:
        yield lambda walk, *arguments: pool.submit(walk, *arguments).result()


@pytest.mark.long
def test_the_fake_device_tells_two_devices_apart_and_keeps_the_numbers(apart: Callable):
    apart(two_devices)


def two_devices() -> None:
    with fake_gpu():
        x = torch.arange(6.0, device=GPU).view(2, 3)
        here = torch.ones(3)
        with pytest.raises(RuntimeError, match="two devices"):
            x + here
        with pytest.raises(RuntimeError, match="two devices"):
            torch.cat([x[0], here])
        assert x.is_leaf and x.device.type == GPU
        assert (x @ here.to(GPU)).tolist() == [3, 12]
        assert x[torch.tensor([1])].cpu().tolist() == [[3, 4, 5]]


# ---- a session ---------------------------------------------------------------------------------------------


def frames_of(session: Session) -> list[torch.Tensor]:
    """The first picture and one segment."""
    grey = torch.full((64, 64, 3), 90, dtype=torch.uint8)
    return [session.reset(grey, seed=3).frames, segment(session)]


def segment(session: Session) -> torch.Tensor:
    return session.step(*realtime.walk_actions(session.frames_needed)).frames


@pytest.mark.long
@pytest.mark.parametrize(
    "change",
    [{"decoder": "light75"}, {"quantize": "qkvo"}, {"new": 10, "steps": 2, "guidance": 2.0}],
    ids=["thin decoder", "INT8", "guided"],
)
def test_a_session_on_a_gpu_draws_what_the_cpu_draws(change: dict, tmp_path: Path, apart: Callable):
    apart(play_twice, change, tmp_path)


def play_twice(change: dict, folder: Path) -> None:
    options = replace(MICRO, **change)
    state = folder / "state.safetensors"
    session = Session(replace(options, device="cpu"))
    here = torch.cat([*frames_of(session), segment(session)])
    with fake_gpu():
        session = Session(replace(options, device=GPU))
        frames = frames_of(session)
        session.save(state)
        frames.append(segment(session))

        # the second segment once more: after it was taken back, and from the file
        session.undo()
        assert torch.equal(segment(session), frames[-1])
        session.restore(state)
        assert torch.equal(segment(session), frames[-1])
    difference = (here.int() - torch.cat(frames).int()).abs()
    # fused kernels of the CPU are not taken for a labelled tensor: the last bit may differ
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


# ---- training ----------------------------------------------------------------------------------------------


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["loss"] if "loss" in row else row["critic"] for row in rows if "it_s" in row]


@pytest.mark.long
@pytest.mark.parametrize("stage", ["vae", "lightvae", "base", "moe", "distill"])
def test_every_stage_trains_and_resumes_on_a_gpu_with_the_losses_of_the_cpu(
    stage: str, studio: Path, tmp_path: Path, apart: Callable
):
    for name in ("assets", "datasets"):
        (tmp_path / name).symlink_to(studio / name)
    apart(train_twice, stage, tmp_path)


def train_twice(stage: str, folder: Path) -> None:
    early = error_buffer.ErrorConfig(warmup=1)
    usual = ["--preset", "micro", "--dtype", "float32", "--batch", "2", "--log-every", "1"]

    def run(name: str, steps: int, device: str, *flags: str) -> None:
        place = torch.device(device, 0) if device == GPU else torch.device("cpu")
        with mock.patch.object(engine.run, "device_of", lambda cfg: place):
            which = ["--run", name, "--steps", str(steps), "--device", "cpu"]
            assert train.main([*usual, *which, *flags]) == 0

    with (
        mock.patch.object(cli, "ROOT", folder),
        mock.patch.object(engine.run, "listen"),
        mock.patch.object(error_buffer, "ErrorConfig", lambda **kwargs: replace(early, **kwargs)),
    ):
        flags = ["--stage", stage]
        if stage == "distill":
            run("base", 1, "cpu", "--sample-every", "0")
            flags += ["--init", str(folder / "runs/base"), "--adversarial", "0.1"]
            flags += ["--cold-start", "1"]
        run("here", 2, "cpu", *flags)
        with fake_gpu():
            run("there", 1, GPU, *flags)
            run("there", 2, GPU, *flags)
    here = losses(folder / "runs/here")
    there = losses(folder / "runs/there")
    assert len(there) >= 2 and there[-1] == pytest.approx(here[-1], rel=0.02)


# ---- shapes at full size -----------------------------------------------------------------------------------


def full_size(preset: str, device: str) -> tuple[dit.DiT, Context, torch.Tensor]:
    """A network of a preset, what it is told of one segment, and noise; nothing has a number."""
    one = preset.replace("28b-moe", "14b")  # each of two networks
    config = dit.PRESETS[one]
    stride = parts.vae_config(one).stride[1]
    h, w = (side // stride for side in parts.SIZES[one])
    M, P = Window.memory, Window.past
    N = Window.new
    T = M + P + N
    with torch.device("meta"):
        context = Context(
            past=torch.empty(1, config.in_dim, P, h, w),
            memory=torch.empty(1, config.in_dim, M, h, w),
            times=torch.empty(1, T, dtype=torch.long),
            rays=torch.empty(1, config.ray_channels, T, h, w),
            mouse=torch.empty(1, T, 12, 2),
            keyboard=torch.empty(1, T, 12, 6),
            text=torch.empty(1, config.text_len, config.text_dim),
            null_text=torch.empty(1, config.text_len, config.text_dim),
        ).to(dtype=torch.bfloat16)
        noise = torch.empty(1, config.in_dim, N, h, w)
    network = moe.build(preset, "meta")
    # which expert is asked depends on a number, and here are none
    expert = network.low if preset == "28b-moe" else network
    # one block after those that act: all others are alike
    expert.blocks = expert.blocks[: max(config.action_blocks) + 2]
    return expert.to(device, torch.bfloat16), context.to(device), noise.to(device)


@pytest.mark.long
@pytest.mark.parametrize("preset", ["5b", "28b-moe"])
def test_a_step_of_the_full_size_fits_together(preset: str, apart: Callable):
    apart(step_of, preset)


def step_of(preset: str) -> None:
    with fake_gpu("meta"), torch.no_grad():
        network, context, noise = full_size(preset, GPU)
        x0 = flow.sample(network, context, flow.sigma_grid(1), noise, "renoise")
        assert x0.device.type == GPU and x0.shape == noise.shape
        assert x0.shape[-2:] == (44, 80)


def test_the_full_decoder_makes_720p_frames_of_two_streamed_latents(apart: Callable):
    apart(decode_at_full_size)


def decode_at_full_size() -> None:
    with fake_gpu("meta"), torch.no_grad():
        with torch.device("meta"):
            decoder = vae.VAE(vae.pruned(vae.PRESETS["wan2.2"], 0.75))
        decoder.to(GPU, torch.bfloat16)
        z = torch.empty(1, 48, 1, 44, 80, device=GPU, dtype=torch.bfloat16)
        video, state = decoder.decode_stream(z, None)
        assert video.shape == (1, 3, 1, 704, 1280)
        video, state = decoder.decode_stream(z, state)
        assert video.shape == (1, 3, 4, 704, 1280) and video.device.type == GPU
        assert all(x.device.type == GPU for x in state.values())
