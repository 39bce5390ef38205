"""What speed costs, and how long a key takes to be seen.

Speed is bought with INT8, thinner decoders, and fewer latents at once. Whatever is timed is timed
in turns, so that a busy moment of the machine hits all alike.

E = S/2F + T_gen + T_dec        from a key to the light it changes: half a segment of S frames,
                                shown at F per second, then denoising, then decoding
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

import camera
import flow
import memory
import quant
import realtime
import world
from context import Clip, Lens
from dataset.film import psnr
from engine import actors, parts, weights
from lab import bench, players, revisits, worlds
from lab.players import How, Player
from lab.run import Run

PANES = {"Wan2.2": "full", "50 %": "light50", "75 %": "light75"}  # decoders: here, and as files
SIGMAS = (0.9, 0.5, 0.1)
ROUNDS = 9  # of every decoder, in turns
SHOWN = 40  # frames per second
SHORT = (5, 2)  # new latents of shorter segments


# ---- INT8 ---------------------------------------------------------------------------------


def sqnr(true: Tensor, rough: Tensor) -> float:
    """Signal over quantisation noise, dB."""
    noise = (true - rough).square().sum()
    return 10 * math.log10(float(true.square().sum() / noise))


def disturbance(size: Tensor, seed: int) -> Callable[[actors.Denoiser], None]:
    """Noise on what is known of the first segment: in the bank and in the past."""

    def disturb(denoiser: actors.Denoiser) -> None:
        bank = denoiser.bank
        known = bank.store["latents"][bank.size - 10 : bank.size]
        g = torch.Generator().manual_seed(seed)
        known += torch.randn(known.shape, generator=g).to(known) * size
        past = known[-4:].transpose(0, 1)[None]
        denoiser.now = denoiser.now._replace(past=past)

    return disturb


def compare_rollouts(run: Run, p: Player, small: nn.Module, seed: int, segments: int) -> None:
    """How near to float an INT8 rollout stays, and one in float that was pushed as far once."""
    script = worlds.patrol(seed, segments)
    z = players.opened(p, script).latents
    low = p._replace(nets=p.nets | {"dit": small})
    exact = players.rollout(p, script, z, segments)[0].float()
    rough = players.rollout(low, script, z, segments)[0].float()
    # how far the first segment is off is how far the control is pushed
    first = exact[:, :, 4:14]
    error = rough[:, :, 4:14] - first
    size = error.square().mean().sqrt()
    signal = first.square().mean().sqrt()
    run.put("segment 1", {"SQNR": 20 * math.log10(float(signal / size))})

    how = How(after=disturbance(size, seed))
    pushed = players.rollout(p, script, z, segments, how)[0].float()
    for arm, other in (("int8", rough), ("disturbed", pushed)):
        for k in range(2, segments + 1):
            segment = slice(10 * k - 6, 10 * k + 4)
            near = sqnr(exact[:, :, segment], other[:, :, segment])
            run.put(arm, {f"SQNR, segment {k}": near})
    compare_velocities(run, p, small, script, z)


def compare_velocities(
    run: Run,
    p: Player,
    small: nn.Module,  # the same network in INT8
    script: worlds.Script,
    z: Tensor,
) -> None:
    """One call of the network, at several noise levels, on a window in the middle of the walk."""
    c2w = camera.pose_to_c2w(script.poses[None])
    start = torch.tensor([30])
    words = players.prompt(p, script)
    clip = Clip(z.float(), c2w, script.keyboard[None], script.mouse[None], words)
    chosen = memory.select_training(c2w, start, 10)
    x0, context = clip.window(start, 10, 4, chosen, Lens(p.meta["encoding"]))
    # the same noise at every level, so that levels can be compared
    dtype = getattr(torch, p.options.dtype)
    context = context.to(dtype=dtype)
    for sigma in torch.tensor(SIGMAS)[:, None]:
        g = torch.Generator().manual_seed(0)
        x = flow.add_noise(x0, torch.randn(x0.shape, generator=g), sigma).to(dtype)
        v = p.nets["dit"](x, sigma, context).float()
        v_hat = small(x, sigma, context).float()
        run.put("velocity SQNR dB", {f"sigma {sigma.item():.1f}": sqnr(v, v_hat)})


@torch.no_grad()
def int8(run: Run) -> None:
    """M7: what INT8 does to a velocity, a segment and a rollout."""
    p = run.player
    small = copy.deepcopy(p.nets["dit"])
    quant.quantize_(small, "qkvo")
    run.notes.append("self-attention q,k,v,o, kernel torch._int_mm")
    for seed in run.some:
        compare_rollouts(run, p, small, seed, 8 if run.full else 3)


# ---- decoders -----------------------------------------------------------------------------


def load_decoders(run: Run, dtype: torch.dtype) -> dict[str, nn.Module]:
    """All that have been trained; of the others it is said what makes them."""
    found = {}
    for row, name in PANES.items():
        try:
            net = weights.load_vae(parts.vae_of(Path(run.weights), "tiny", name))
        except ValueError:
            stage = "vae" if name == "full" else "lightvae"
            for what in ("33 frames", "streaming", "float32, streaming"):
                run.absent[f"{row}, {what}"] = f"python train.py --stage {stage}"
            continue
        found[row] = net.to(dtype).eval()
    return found


def shown(video: Tensor) -> Tensor:  # (1, 3, F, H, W) in [-1, 1] -> (F, H, W, 3) in [0, 1]
    return (video[0].float().permute(1, 2, 3, 0) + 1) / 2


def score_decoders(
    run: Run,
    found: dict[str, nn.Module],
    frames: ndarray,  # (33, H, W, 3)
) -> tuple[ndarray, Tensor]:  # truth and every decoder's last frame, one below the other; latents
    """True frames through every decoder, from the latents of the one encoder."""
    full = found["Wan2.2"]
    dtype = players.dtype_of(full)
    last = {}
    for n in (9, 33):
        for row, net in found.items():
            video = torch.from_numpy(frames[:n]).permute(3, 0, 1, 2)[None]
            z = full.encode((video / 127.5 - 1).to(dtype))
            made = shown(net.decode(z, clamp=True))
            run.scores(f"{row}, {n} frames", made, frames[:n])
            last[row] = players.picture(made[-1])
            score = psnr(last[row][None], frames[n - 1 : n])
            run.put(f"{row}, {n} frames", {"last frame psnr": score})
    return np.concatenate([frames[-1], *last.values()]), z


def score_generated(run: Run, p: Player, found: dict[str, nn.Module], seed: int) -> None:
    """Thin decoders against the full one, on latents that the model made."""
    script = worlds.revisit(seed, 0.0)
    z = players.opened(p, script).latents
    new = players.rollout(p, script, z, 1)[0].to(players.dtype_of(found["Wan2.2"]))
    made = {row: shown(net.decode(new, clamp=True)) for row, net in found.items()}
    whole = (255 * made.pop("Wan2.2")).round().byte().numpy()
    for row, film in made.items():
        run.scores(f"{row} beside Wan2.2, generated latents", film, whole)


def time_decoders(run: Run, found: dict[str, nn.Module], z: Tensor) -> None:
    """Forty frames of every decoder, as it is and in float32, and of the encoder: in turns."""
    slow = {f"{row}, float32": copy.deepcopy(net).float() for row, net in found.items()}
    jobs = {}
    for row, net in (found | slow).items():
        still = z[:, :, -1:].repeat(1, 1, 10, 1, 1)
        still = still.to(players.dtype_of(net))
        state = net.decode_stream(still)[1]
        jobs[f"{row}, streaming"] = partial(net.decode_stream, still, state, True)
    # beside them the encoder, of ten latents and a picture
    video = torch.zeros(1, 3, 41, worlds.SIZE, worlds.SIZE, dtype=z.dtype)
    jobs["encoder"] = partial(found["Wan2.2"].encode, video)
    for _ in range(ROUNDS):
        for row, job in jobs.items():
            began = time.perf_counter()
            job()
            seconds = time.perf_counter() - began
            run.put(row, {"s": seconds, "FPS": 40 / seconds})


@torch.no_grad()
def decoders(run: Run) -> None:
    """M8: three decoders on true latents of 9 and 33 frames, in turns, and on generated ones."""
    p = players.player(run.weights, "student") or players.player(run.weights, "base", 8)
    dtype = getattr(torch, weights.faster_dtype("cpu"))
    found = load_decoders(run, dtype)
    if "Wan2.2" not in found:
        players.lacking("vae")
    sheet = []
    for seed in run.worlds:
        walk = world.simulate(worlds.scene(seed), 0, 33)
        frames = worlds.shoot(worlds.scene(seed), walk["player"]).frames
        column, z = score_decoders(run, found, frames)
        sheet.append(column)
        if p and seed in run.some:
            score_generated(run, p, found, seed)
    time_decoders(run, found, z)
    run.pictures["decoders"] = np.concatenate(sheet[:6], 1).repeat(3, 0).repeat(3, 1)


# ---- how fast -----------------------------------------------------------------------------


class Times(NamedTuple):
    """Medians of a segment, in seconds."""

    whole: float
    denoise: float
    decode: float


def time_session(run: Run, session: realtime.Session) -> Times:
    """Where the time of a segment goes; the first is apart, and the next five warm up."""
    for k in range(26 if run.full else 14):
        n = session.frames_needed
        turn = torch.tensor([[0.0, 0.1]]).expand(n, 2)
        began = time.perf_counter()
        info = session.step(torch.zeros(n, 6), turn).info
        spent = info["ms"] | {"whole": 1e3 * (time.perf_counter() - began)}
        if k == 0 or k > 5:
            row = "later steps" if k else "first step"
            run.put(row, {f"{part} ms": ms for part, ms in spent.items()})
    parts_of_step = Times._fields
    medians = [np.median(run.row("later steps", f"{part} ms")) for part in parts_of_step]
    return Times(*(float(ms) / 1e3 for ms in medians))


def press(session: realtime.Session, waits: float) -> tuple[float, int]:
    """A key goes down `waits` seconds before the segment on the screen ends: when is it seen? The
    same segment is made twice from one noise, without the key and with it."""
    # without the key, and back
    n = session.frames_needed
    keys = torch.zeros(n, 6)
    still = torch.zeros(n, 2)
    idle = session.step(keys, still).frames.float()
    session.undo()
    # with it, under the same noise
    began = time.perf_counter()
    acted = session.step(keys, still + torch.tensor([0.0, 0.2])).frames
    spent = time.perf_counter() - began
    apart = (acted - idle).abs().mean((1, 2, 3)) > 2  # grey levels
    first = [*apart.tolist(), True].index(True)
    return waits + spent + first / SHOWN, first


def short_segments(run: Run, start: Tensor) -> None:
    """The same by the clock with fewer latents at once, as play takes them where it can."""
    trained = [int(n) for n in run.player.meta["new"].split()]
    for new in SHORT:
        if new not in trained:
            run.absent[f"{new} at once"] = f"the weights have never seen {new} new latents"
            continue
        session = realtime.Session(replace(run.player.options, new=new))
        session.reset(start)
        for _ in range(8):  # the first is longer, the next fill memory and caches
            n = session.frames_needed
            session.step(torch.zeros(n, 6), torch.zeros(n, 2))
        began = time.perf_counter()
        for pressed in (np.arange(20) + 0.5) / 20:
            seconds, first = press(session, n / SHOWN * (1 - pressed))
            values = {"s by the clock": seconds, "frames until it is seen": first}
            run.put(f"{new} at once", values)
        each = (time.perf_counter() - began) / 40  # every press makes two segments
        run.put(f"{new} at once", {"FPS, one after the other": n / each})


def latency(run: Run) -> None:
    """M9: one Session; key to photon by formula and by the clock."""
    flops = bench.segment_flops(parts.Options(preset="5b"))
    # what the paper's own numbers say
    values = {
        "FPS at 1.551 s": 40 / 1.551,
        "TF of a 5b segment": flops[0] / 1e12,
        "TF as released": flops[1] / 1e12,
    }
    run.put("arithmetic", values)
    revisits.reappear(run, {f"{n} latents at once": How(new=n) for n in (10, 5, 2)})

    # what this machine does
    session = realtime.Session(run.player.options)
    start = worlds.draw(worlds.place(run.worlds[0], "w:2"), [0]).frames[0]
    session.reset(torch.from_numpy(start))
    whole, denoise, decode = time_session(run, session)
    values = {
        "FPS, one after the other": 40 / whole,
        "FPS by 40 / max(D, V)": 40 / max(denoise, decode),
        "key to photon at 16 FPS, s": 1.25 + denoise + decode,
    }
    run.put("tiny", values)

    # at 40 FPS a segment takes a second to show; here it is decoded in one piece
    formula = 0.5 + denoise + decode
    run.put("key to photon", {"s by formula": formula})
    events = 60 if run.full else 20
    rng = np.random.default_rng(0)
    for pressed in (np.arange(events) + rng.random(events)) / events:  # one in each part
        seconds, first = press(session, 1 - pressed)
        run.put("key to photon", {"s by the clock": seconds, "frames until it is seen": first})
    clock = run.row("key to photon", "s by the clock").mean()
    run.put("key to photon", {"clock / formula": clock / formula})
    short_segments(run, torch.from_numpy(start))
