"""A walk without a page: what the tests of sessions and of ranks do the same way.

walk(session, 3)     three segments under actions drawn from their number: repeatable, everywhere
"""

import torch
from torch import Tensor

import realtime
from engine import parts

OPTIONS = parts.Options(preset="micro", weights="random", device="cpu", dtype="float32")
IMAGE = torch.randint(
    0,
    256,
    (64, 64, 3),
    dtype=torch.uint8,
    generator=torch.Generator().manual_seed(0),
)


def actions(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    keyboard = torch.randint(0, 2, (n, 6), generator=g).float()
    return keyboard, 0.1 * torch.randn(n, 2, generator=g)


def walk(session: realtime.Session, segments: int, first: int = 0) -> list[realtime.Chunk]:
    return [
        session.step(*actions(session.frames_needed, k)) for k in range(first, first + segments)
    ]


def pixels(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())
