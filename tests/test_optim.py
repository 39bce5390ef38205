"""The optimiser's step: Muon is torch's, in the precision of the run."""

import pytest
import torch
from torch import nn

from engine.optim import Muon, optimizers

SHAPES = [(32, 32), (64, 24), (24, 64)]


def matrices() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]


def walk(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 3) -> None:
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()


def test_in_bfloat16_muon_is_torchs_to_the_bit() -> None:
    ours, theirs = matrices(), matrices()
    walk(Muon(ours, 0.01, 0.1), ours)
    walk(torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1), theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_in_float32_it_takes_the_same_way_a_little_more_precisely() -> None:
    rough, exact = matrices(), matrices()
    walk(Muon(rough, 0.01), rough)
    walk(Muon(exact, 0.01, dtype=torch.float32), exact)
    for a, b, start in zip(rough, exact, matrices(), strict=True):
        assert (a - b).norm() < 0.05 * (b - start).norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_direction_gets_a_step_of_about_the_same_size(shape: tuple[int, int]) -> None:
    rows, columns = shape
    n = min(shape)
    U, _ = torch.linalg.qr(torch.randn(rows, n, generator=torch.Generator().manual_seed(0)))
    V, _ = torch.linalg.qr(torch.randn(columns, n, generator=torch.Generator().manual_seed(1)))
    g = U @ torch.diag(torch.logspace(0, -1.5, n)) @ V.mT  # thirty times more along one direction
    step = Muon([nn.Parameter(g)], 0.01, dtype=torch.float32).orthogonal(g)
    sizes = torch.linalg.svdvals(step)
    assert 0.3 < sizes.min() and sizes.max() < 1.3
    # the same directions as the nearest orthogonal matrix
    nearest = U @ V.mT
    assert (step * nearest).sum() / (step.norm() * nearest.norm()) > 0.95


def test_matrices_inside_blocks_go_to_muon_and_share_their_memory() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(32, 32)])
    model.head = nn.Linear(32, 32)
    adam, muon = optimizers(model, 1e-3, 1e-2, dtype=torch.float32)
    assert [p.data_ptr() for p in muon.param_groups[0]["params"]] == [
        model.blocks[0].weight.data_ptr()
    ]
    assert len(adam.param_groups[0]["params"]) == 3 and muon.dtype == torch.float32
    assert len(optimizers(model, 1e-3)) == 1
