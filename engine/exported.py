"""What a page computes, computed here: its noise, and its files in the place of networks.

A browser has no torch.Generator, so its noise is a hash of (seed, segment, position), made in the
same way by web/flow.js. Whoever compares the two worlds gives a session this noise:

    session.denoiser = HashedDenoiser(network, meta, options)    network: dit.DiT or ExportedNetwork
    session.decoder = ExportedDecoder(first, following)          the files that export.py writes
"""

import time

import numpy as np
import torch
from torch import Tensor

import flow
from context import Context
from engine.actors import Denoiser, Plan

MASK = 2**32 - 1  # arithmetic of 32 bits
GOLDEN = 0x6D2B79F5  # odd: a counter times it visits all 2³² values


# ---- noise -------------------------------------------------------------------------------------------------


def uniform(stream: int, i: np.ndarray) -> np.ndarray:
    """[0, 1) of a counter, mulberry32's hash: the same bits as in web/flow.js."""
    t = (stream + (i + 1) * GOLDEN) & MASK
    t = mixed(t, 15, t | 1)
    t = t ^ ((t + mixed(t, 7, t | 61)) & MASK)
    return (t ^ (t >> 14)) / 2**32


def mixed(t: np.ndarray, shift: int, factor: np.ndarray) -> np.ndarray:
    return ((t ^ (t >> shift)) * factor) & MASK


def gaussian(seed: int, segment: int, n: int) -> np.ndarray:
    """(n,) float32 of N(0, 1), n even: Box and Muller make two of two."""
    stream = (seed * 1_000_003 + segment) & MASK
    i = np.arange(0, n, 2, dtype=np.uint64)
    radius = np.sqrt(-2 * np.log(1 - uniform(stream, i)))  # 1 − u is never 0
    angle = 2 * np.pi * uniform(stream, i + 1)
    pair = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    return pair.astype(np.float32).reshape(-1)


class HashedDenoiser(Denoiser):
    """The denoiser of play, with noise that a browser can draw as well."""

    def draws(self, plan: Plan) -> Tensor:
        """(draws, n, C, h, w): what the first step starts from, then noise of further ones."""
        _, C, _, h, w = plan.context.past.shape
        shape = (draws_of(self.meta, self.options.steps), len(plan.times), C, h, w)
        values = gaussian(self.now.seed, self.now.segment, int(np.prod(shape)))
        return torch.from_numpy(values).view(shape)

    def imagine(self, plan: Plan) -> Tensor:
        noise = iter(self.draws(plan).transpose(1, 2).split(1))  # (1, C, n, h, w) each
        return flow.sample(
            self.model,
            plan.context,
            flow.sigma_grid(self.options.steps, self.meta["shift"]),
            next(noise),
            self.meta["method"],
            generator=lambda shape: next(noise),
        )


def draws_of(meta: dict, steps: int) -> int:
    """How often a sampler needs noise: the few-step one adds some before every further step."""
    return steps if meta["method"] == "renoise" else 1


# ---- files in the place of networks ------------------------------------------------------------------------


class ExportedNetwork:
    """The network in onnxruntime, in the place of dit.DiT."""

    def __init__(self, file: bytes) -> None:
        self.network = open_network(file)

    def __call__(self, x: Tensor, sigma: Tensor, context: Context, prepared: None) -> Tensor:
        T = context.times.shape[1]
        M = context.memory.shape[2]
        clock = torch.cat([torch.arange(M), torch.arange(T - M)])
        clean = torch.cat([context.memory, context.past], 2)
        inputs = {
            "noisy": latents_first(x),
            "sigma": sigma,
            "clean": latents_first(clean),
            "rays": context.rays,
            "mouse": context.mouse,
            "keyboard": context.keyboard,
            "times": context.times[0].int(),
            "clock": clock.int(),
        }
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        (velocity,) = self.network.run(None, feed)
        return torch.from_numpy(velocity).transpose(0, 1)[None]


class ExportedDecoder:
    """The decoder of play, but that onnxruntime decodes."""

    def __init__(self, first: bytes, following: bytes) -> None:
        self.networks = {True: open_network(first), False: open_network(following)}
        self.state: list[np.ndarray] = []

    def decode(self, z: Tensor, begins: bool = False) -> tuple[Tensor, float]:
        began = time.perf_counter()
        network = self.networks[begins]
        tensors = [latents_first(z).numpy()]
        if not begins:
            tensors += self.state
        names = [given.name for given in network.get_inputs()]
        feed = dict(zip(names, tensors, strict=True))
        frames, *self.state = network.run(None, feed)

        rgb = torch.from_numpy(frames[..., :3])  # (F, H, W, 4) of a canvas
        return rgb, 1e3 * (time.perf_counter() - began)


def latents_first(x: Tensor) -> Tensor:
    """(1, C, n, h, w) -> (n, C, h, w): a page appends latents."""
    return x[0].transpose(0, 1)


def open_network(file: bytes) -> object:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors alone
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
