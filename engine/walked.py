"""What a session needs in memory on a device, without that device.

A segment is denoised and decoded by the very code that plays, on tensors of torch's meta device:
they have a shape and no numbers. A Ledger stands by, adds up the storages that are made and are
still held, and its peak is the answer. So a network of any size is measured in seconds on any
machine, and whatever the code keeps too long is counted.

    watched("cuda")  what is computed inside goes the way it goes there, and is written down
    denoising, decoding    bytes of the two halves of a segment; engine/parts.py adds the weights

Not seen: what kernels take for themselves while they run, and the driver's own share.
"""

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attention
import flow
from context import Context
from dit import DiTConfig


class Ledger(TorchDispatchMode):
    """Bytes of the storages that are made inside and live: `now`, and `peak` at most.

    It asks for sizes alone: what it watches may be real, or have no numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # of every storage that lives
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        given = {key_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            # a view of what came in is nothing new: not even of weights, which were there before
            if isinstance(x, Tensor) and key_of(x) not in given:
                self.enter(x.untyped_storage())
        return result

    def enter(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.leave, storage._cdata)

    def leave(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def key_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class Pretend(TorchFunctionMode):
    """Tensors say that they are on a GPU, or on the CPU: the code goes the way it goes there."""

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.answers = {Tensor.is_cuda.__get__: cuda, Tensor.is_cpu.__get__: not cuda}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if func in self.answers:
            return self.answers[func]
        return func(*args, **(kwargs or {}))


def its_result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of attention: like q."""
    return torch.empty_like(q)


@contextlib.contextmanager
def watched(device: str) -> Iterator[Ledger]:
    """What is computed here is computed as on that device, and written down.

    Attention holds its result and nothing else, like the kernels that are made for it.
    """
    kernel = attention.attention
    attention.attention = its_result
    try:
        with torch.no_grad(), Ledger() as ledger, Pretend(device.startswith("cuda")):
            yield ledger
    finally:
        attention.attention = kernel


def told(cfg: DiTConfig, latents: tuple[int, int, int], h: int, w: int) -> Context:
    """All that a network is told of a segment of (memory, past, new) latents; zeros, in float32."""
    memory, past, _ = latents
    T = sum(latents)
    return Context(
        past=torch.zeros(1, cfg.in_dim, past, h, w),
        memory=torch.zeros(1, cfg.in_dim, memory, h, w),
        times=torch.zeros(1, T, dtype=torch.long),
        rays=torch.zeros(1, cfg.ray_channels, T, h, w),
        mouse=torch.zeros(1, T, cfg.action_window, 2),
        keyboard=torch.zeros(1, T, cfg.action_window, 6),
        text=torch.zeros(1, cfg.text_len, cfg.text_dim),
        null_text=torch.zeros(1, cfg.text_len, cfg.text_dim),
    )


def denoising(
    network: nn.Module,
    latents: tuple[int, int, int],  # memory, past, new
    cells: tuple[int, int],  # of a latent
    guidance: float = 1.0,
    device: str = "cpu",  # as if there
) -> int:
    """Bytes that a segment takes at most, beside the weights: one step, which is like all others."""
    weight = next(network.parameters())
    sigmas = flow.sigma_grid(1)
    with watched(device) as ledger:
        with weight.device:
            context = told(network.cfg, latents, *cells).to(dtype=weight.dtype)
            noise = torch.zeros(1, network.cfg.in_dim, latents[-1], *cells)
        flow.sample(network, context, sigmas, noise, guidance=guidance)
    return ledger.peak


def decoding(
    network: nn.Module, at_once: int, cells: tuple[int, int], device: str = "cpu"
) -> tuple[int, int]:
    """Bytes that a decoder takes at most, beside its weights, and what it keeps for the next latents."""
    weight = next(network.parameters())
    with watched(device) as ledger:
        state = None
        for latents in (1, at_once, at_once):
            z = torch.zeros(1, network.cfg.z_dim, latents, *cells).to(weight)
            state = network.decode_stream(z, state, clamp=True)[1]
        del z
        return ledger.peak, ledger.now
