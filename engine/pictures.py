"""What a training shows of itself: held-out revisits, reconstructions, curves."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import flow
from context import Context
from dataset import film
from engine import cli
from engine.clips import WINDOW, Clips, draw, pixels
from engine.run import Run, generator, lines_of, record


@torch.no_grad()
def look(
    run: Run,
    model: nn.Module,  # with its averaged weights
    vae: nn.Module,
    held: Clips,  # episodes that are never trained on
    steps: int = 8,
    method: str = "euler",
) -> None:
    """Held-out revisits, as a picture, a film and numbers.

    From left to right: reconstruction | model | without memory | with another clip's actions. A
    model that uses what it is told comes closest to the reconstruction when it is told the truth.
    """
    # eight windows that return to an old place, nothing left out
    shares = {"revisit": 1.0, "p_i2v": 0.0, "p_memory_off": 0.0, "p_null": 0.0}
    sure = dataclasses.replace(run.cfg, batch=8, new="10", **shares)
    x0, context = draw(held, dataclasses.replace(run, cfg=sure), 0)
    told = {
        "model": context,
        "no memory": context.drop_memory(),
        "wrong actions": actions_of_the_next(context),
    }

    # the same noise for all of them
    noise = torch.randn(x0.shape, generator=generator(sure, 1)).to(run.device, run.dtype)
    sigmas = flow.sigma_grid(steps, sure.shift)
    latents = {"truth": x0}
    for name, context in told.items():
        inputs = context.to(dtype=run.dtype)
        g = generator(sure, 2)  # of the noise between two steps, where there is some
        latents[name] = flow.sample(model, inputs, sigmas, noise, method, generator=g).float()

    frames = {name: decoded(vae, context.past, z) for name, z in latents.items()}
    line = {"step": run.step}
    for name in told:
        score = film.psnr(frames[name], frames["truth"]).mean()
        line[f"psnr {name}"] = round(float(score), 2)
    record(run, line)
    text = " · ".join(f"{name} {line[f'psnr {name}']}" for name in told)
    print(f"step {run.step}: held-out revisits, dB to the reconstruction: {text}", flush=True)

    # four clips as strips of five frames; the first clip as a film, the kinds beside each other
    strips = torch.stack([*frames.values()], 1)[:4, :, 7::8]  # (4, kinds, 5, H, W, 3)
    film.write_png(picture_of(run), side_by_side(strips))
    movie = torch.cat([clips[0] for clips in frames.values()], 2)
    film.write_mp4(picture_of(run).with_suffix(".mp4"), movie)


def actions_of_the_next(context: Context) -> Context:
    """Every sample with the cameras and keys of another."""
    told = {name: getattr(context, name).roll(1, 0) for name in ("rays", "mouse", "keyboard")}
    return dataclasses.replace(context, **told)


def decoded(vae: nn.Module, past: Tensor, new: Tensor) -> Tensor:
    """The frames of the new latents, (B, F, H, W, 3) in [0, 1]; the past fills the decoder's history."""
    video = vae.decode(torch.cat([past, new], 2), clamp=True)
    video = video[:, :, -WINDOW.stride * WINDOW.new :]
    return video.permute(0, 2, 3, 4, 1).cpu() / 2 + 0.5


def side_by_side(frames: Tensor) -> Tensor:
    """(clips, kinds, F, H, W, 3) -> one picture: a row per clip and kind, a column per frame."""
    rows = frames.flatten(0, 1)  # (clips·kinds, F, H, W, 3)
    return rows.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def picture_of(run: Run) -> Path:
    return run.folder / "samples" / f"step_{run.step:06d}.png"


@torch.no_grad()
def look_at_vae(run: Run, model: nn.Module, encoder: nn.Module, videos: list[np.ndarray]) -> None:
    """The last frames of six clips: truth on the left, what the VAE makes of them on the right."""
    truth = pixels(np.stack([video[-33:] for video in videos[:6]]))  # (6, 3, 33, H, W)
    latents = encoder.encode(truth.to(run.device))
    again = model.eval().decode(latents).clamp(-1, 1).cpu()

    # every eighth frame
    strip = torch.cat([truth[:, :, ::8], again[:, :, ::8]], 2)
    strip = strip.permute(0, 2, 3, 4, 1)[:, None]  # (6, 1, 2·5, H, W, 3)
    film.write_png(picture_of(run), (side_by_side(strip) + 1) / 2)


def plot(runs: list[str]) -> None:
    """Loss curves of runs or of their logs, smoothed over ten lines: loss.png beside the first log."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    places = [cli.find(run) for run in runs]
    logs = [place if place.suffix == ".jsonl" else place / "log.jsonl" for place in places]
    for log in logs:
        if not log.exists():
            raise ValueError(
                f"no {log}; --plot takes folders of runs, such as runs/base-tiny, or their logs"
            )
        steps, losses = curve(log)
        n = min(10, len(losses))
        smooth = np.convolve(losses, np.ones(n) / n, "valid")
        name = log.parent.name if log.stem == "log" else log.stem
        plt.plot(steps[n - 1 :], smooth, label=name)
    plt.xlabel("step")
    plt.ylabel("loss")
    plt.yscale("log")
    plt.legend()
    picture = logs[0].with_name("loss.png")
    plt.savefig(picture, dpi=120, bbox_inches="tight")
    print(f"wrote {picture}")


def curve(log: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses; a distillation has its critic's."""
    points = []
    for line in lines_of(log):
        loss = line.get("loss", line.get("critic"))
        if isinstance(loss, int | float):
            points.append((line["step"], loss))
    if not points:
        raise ValueError(f"{log} has no losses yet: nothing was logged so far")
    steps, losses = zip(*points, strict=True)
    return np.array(steps), np.array(losses)
